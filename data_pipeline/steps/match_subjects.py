"""Step 7: which detection in the target frame is the same subject as which one in the reference frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.records import (
    DetectedPair,
    Detection,
    Dropped,
    InputError,
    Match,
    Rejected,
    SettingsError,
    TrainingPair,
    cut_out,
)
from data_pipeline.step import Step


@dataclass(kw_only=True)
class MatchSubjects(Step[DetectedPair, TrainingPair]):
    """Pairs the instances of each phrase: by object number where the annotations track objects, else by appearance.

    By appearance: the assignment within the phrase with the highest sum of similarities (Hungarian algorithm), of
    which matches below ``min_similarity`` are left out. Object numbers decide without a threshold; the similarity is
    then only recorded.

    embedder: "histogram", "timm:NAME" or "transformers:NAME_OR_DIRECTORY"; checkpoint: local weights for timm.
    min_similarity: 0.6 was set for histograms on the real clips (docs/mining.md); a network needs a value of its own.
    """

    embedder: str = "histogram"
    checkpoint: Path | None = None
    min_similarity: float = 0.6
    device: str = "cpu"

    def __post_init__(self) -> None:
        library, _, model = self.embedder.partition(":")
        if self.embedder != "histogram" and (library not in ("timm", "transformers") or not model):
            raise SettingsError(f"embedder must be histogram, timm:NAME or transformers:NAME, got {self.embedder!r}")
        if not -1 <= self.min_similarity <= 1:
            raise SettingsError(f"min_similarity is a cosine, in [-1, 1], got {self.min_similarity}")
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise InputError(f"--embedder-checkpoint: no file at {self.checkpoint}")

    def setup(self) -> None:
        """Loads the embedder."""
        from scipy.optimize import linear_sum_assignment

        from data_pipeline.models.embedder import load_embedder

        self._embedder = load_embedder(self.embedder, self.checkpoint, self.device)
        self._assign = linear_sum_assignment

    def process(self, record: DetectedPair) -> TrainingPair | Rejected:
        """The pair with its matches, in the order of the caption, then from left to right in the target."""
        matches: list[Match] = []
        dropped: list[Dropped] = []
        for entity in record.entities:
            reference, target = (
                [found for found in detections if found.entity == entity]
                for detections in (record.reference, record.target)
            )
            if not reference and not target:
                continue
            if not reference or not target:
                seen = {"reference": len(reference), "target": len(target)}
                dropped.append(
                    Dropped(phrase=entity.phrase, stage=self.name, reason="in one frame only", evidence=seen)
                )
                continue
            found, lost = self._match(record, entity.phrase, reference, target)
            matches += sorted(found, key=lambda match: match.target.box)
            dropped += lost
        if not matches:
            lost_phrases = [{"phrase": lost.phrase, "reason": lost.reason, **lost.evidence} for lost in dropped]
            return Rejected("no subject matched in both frames", {"subjects": lost_phrases})
        return TrainingPair(frames=record.frames, matches=tuple(matches), dropped=tuple(dropped))

    def _match(
        self, record: DetectedPair, phrase: str, reference: list[Detection], target: list[Detection]
    ) -> tuple[list[Match], list[Dropped]]:
        first, second = (
            self._embedder.embed([cut_out(frame.image, found.mask, found.box) for found in detections])
            for frame, detections in ((record.frames.reference, reference), (record.frames.target, target))
        )
        similarity = np.clip(first @ second.T, -1.0, 1.0)
        tracked = all(found.object_id is not None for found in (*reference, *target))
        if tracked:
            places = {found.object_id: column for column, found in enumerate(target)}
            pairs = [(row, places[found.object_id]) for row, found in enumerate(reference) if found.object_id in places]
        else:
            pairs = list(zip(*self._assign(-similarity), strict=True))
        matches, dropped = [], []
        for row, column in pairs:
            value = float(similarity[row, column])
            if tracked or value >= self.min_similarity:
                matches.append(Match(reference=reference[row], target=target[column], similarity=value))
            else:
                seen = {"similarity": round(value, 3), "min_similarity": self.min_similarity}
                dropped.append(
                    Dropped(phrase=phrase, stage=self.name, reason="too unlike in the two frames", evidence=seen)
                )
        if tracked and not matches:
            dropped.append(
                Dropped(
                    phrase=phrase,
                    stage=self.name,
                    reason="another object of this name in each frame",
                    evidence={"reference": len(reference), "target": len(target)},
                )
            )
        return matches, dropped
