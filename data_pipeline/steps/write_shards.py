"""Step 9: a pair becomes the files of its samples. The runner puts them into shards, in the clips' order of names."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.errors import SettingsError
from data_pipeline.pairs_format import PAIRS_SCHEMA, SWAPPED_SUFFIX, tar_member
from data_pipeline.records import EncodedPair, Frame, Match, Rejected, TrainingPair, cut_out, encode_mask
from data_pipeline.step import Step


@dataclass(kw_only=True)
class WriteShards(Step[TrainingPair, EncodedPair]):
    """Encodes target pictures (JPEG, 4:4:4), reference cut-outs (PNG with alpha) and metadata (json), as
    docs/data_format.md specifies.

    both_directions: False takes the earlier frame as the reference, True adds the swapped direction as a sample of its
    own. pairs_per_shard: samples in one tar file. pipeline: version and settings hash, copied into every sample. The
    same pair always gives the same bytes.
    """

    both_directions: bool = False
    pairs_per_shard: int = 1000
    jpeg_quality: int = 95
    pipeline: Mapping[str, str] = field(default_factory=dict, metadata={"hashed": False})

    def __post_init__(self) -> None:
        if self.pairs_per_shard < 1:
            raise SettingsError(f"pairs_per_shard must be at least 1, got {self.pairs_per_shard}")
        if not 1 <= self.jpeg_quality <= 100:
            raise SettingsError(f"jpeg_quality must lie in 1..100, got {self.jpeg_quality}")

    def process(self, pair: TrainingPair) -> EncodedPair | Rejected:
        """One or two samples."""
        frames = pair.frames
        # The best pair of a clip has its key, the others ``KEY-pair1`` and so on.
        key = frames.video.file.key + (f"-pair{frames.number}" if frames.number else "")
        directions = [(key, frames.reference, frames.target, pair.matches)]
        if self.both_directions:
            swapped = tuple(
                Match(reference=match.target, target=match.reference, similarity=match.similarity)
                for match in pair.matches
            )
            directions.append((f"{key}{SWAPPED_SUFFIX}", frames.target, frames.reference, swapped))
        samples, blocks = [], []
        for name, reference, target, matches in directions:
            metadata = self.metadata(name, pair, reference, target, matches)
            cutouts = [cut_out(reference.image, match.reference.mask, match.reference.box) for match in matches]
            blocks.append(self.encode(metadata, target.image, cutouts))
            samples.append(metadata)
        return EncodedPair(samples=tuple(samples), blocks=b"".join(blocks), dropped=pair.dropped)

    def encode(self, metadata: Mapping[str, Any], target: np.ndarray, cutouts: Sequence[np.ndarray]) -> bytes:
        """The members of one sample as tar blocks.

        metadata: its json. target: uint8 (height, width, 3). cutouts: uint8 RGBA (h, w, 4), one for each subject.
        """
        members = {"target.jpg": encode_jpeg(target, self.jpeg_quality)}
        members |= {f"reference_{i}.png": encode_png(cutout) for i, cutout in enumerate(cutouts)}
        members["json"] = json.dumps(metadata, separators=(",", ":")).encode()
        return b"".join(tar_member(f"{metadata['key']}.{suffix}", content) for suffix, content in members.items())

    def metadata(
        self, key: str, pair: TrainingPair, reference: Frame, target: Frame, matches: tuple[Match, ...]
    ) -> dict[str, Any]:
        """The json of one sample, as specified in docs/data_format.md."""
        video, shot = pair.frames.video, pair.frames.shot
        height, width = target.image.shape[:2]
        return {
            "schema": PAIRS_SCHEMA,
            "key": key,
            "caption": video.caption,
            "width": width,
            "height": height,
            "subjects": [describe(match) for match in matches],
            "source": {
                "video": video.file.name,
                "sha256": video.sha256,
                "pair": pair.frames.number,
                "frame_reference": reference.index,
                "frame_target": target.index,
                "t_reference": round(reference.time, 6),
                "t_target": round(target.time, 6),
                "shot": [round(shot.start, 6), round(shot.end, 6)],
                **pair.served,
            },
            "pipeline": dict(self.pipeline),
        }


def describe(match: Match) -> dict[str, Any]:
    """The entry of one subject in the json of a sample."""
    reference, target = match.reference, match.target
    return {
        "phrase": target.entity.phrase,
        "mention": target.entity.mention,
        "kind": target.entity.kind,
        "target_box": [round(float(value), 6) for value in target.box],
        "reference_box": [round(float(value), 6) for value in reference.box],
        "target_mask_rle": encode_mask(target.mask),
        "reference_mask_rle": encode_mask(reference.mask),
        "detection_score": round(min(reference.score, target.score), 6),
        "match_similarity": round(match.similarity, 4),
        "area": round(float(target.mask.mean()), 6),
        "attributes": dict(target.attributes),
    }


def encode_jpeg(picture: np.ndarray, quality: int) -> bytes:
    """uint8 (height, width, 3) as a JPEG with full colour resolution."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 (height, width, 4) as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
