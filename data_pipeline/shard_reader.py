"""Reads the samples of a finished dataset and checks them: for the report, for ``inspect``, for whoever doubts a file.

Members are read in memory, never extracted to the disk. Every fault is an ``InputError`` that names the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.records import InputError

SAMPLE_SCHEMA = "msdiffusion.pairs/1"
BUILD_SCHEMA = "data_pipeline.build/1"
MEMBER = re.compile(r"(?P<key>[A-Za-z0-9_-]+)\.(?P<suffix>target\.jpg|json|reference_(?:0|[1-9][0-9]*)\.png)")
KEY = re.compile(r"[A-Za-z0-9_-]+")
REJECTED_FIELDS = frozenset({"video", "key", "stage", "reason", "evidence"})
# Damaged files must not ask for all memory: no picture of a dataset is near this.
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Sample:
    """One sample, checked. metadata: its json (docs/data_format.md)."""

    metadata: Mapping[str, Any]
    target: Image.Image
    """RGB, of the size in the metadata."""
    references: tuple[Image.Image, ...]
    """RGBA cut-outs, one per subject."""

    @property
    def key(self) -> str:
        """Unique in its dataset."""
        return self.metadata["key"]


class Shard:
    """One tar file of samples. Opening it reads the headers of all members, and their names are checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in self._headers():
            found = MEMBER.fullmatch(member.name)
            if found is None or not member.isreg():
                raise InputError(
                    f"{path} is no shard of pairs: it holds {member.name!r}, where KEY.target.jpg, KEY.reference_0.png "
                    "and KEY.json are expected"
                )
            members = self._members.setdefault(found["key"], {})
            if found["suffix"] in members:
                raise InputError(f"{path} holds {member.name!r} twice")
            members[found["suffix"]] = member

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the file."""
        return list(self._members)

    def _headers(self) -> list[tarfile.TarInfo]:
        if not self.path.is_file():
            raise InputError(f"no file at {self.path}")
        try:
            with tarfile.open(self.path, "r:") as archive:
                members = archive.getmembers()
                end = archive.offset
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            if self._starts_like_a_tar():
                raise InputError(f"{self.path} is damaged or cut short ({error}): mine or copy it again") from error
            raise InputError(f"{self.path} is no tar file ({error})") from error
        with self.path.open("rb") as file:
            file.seek(max((member.offset_data + -(-member.size // 512) * 512 for member in members), default=0))
            rest = file.read(1024)
        if len(rest) < 1024 or any(rest):
            raise InputError(f"{self.path} is cut short after {end} bytes: its end mark is missing; copy it again")
        return members

    def _starts_like_a_tar(self) -> bool:
        with self.path.open("rb") as file:
            return file.read(512)[257:262] == b"ustar"

    def read(self, key: str) -> Sample:
        """One sample. InputError for an unknown key, another schema, missing or superfluous members, and pictures that
        do not open or have another size than the json says.
        """
        if key not in self._members:
            some = ", ".join(self.keys[:5]) + (", ..." if len(self.keys) > 5 else "")
            raise InputError(f"no sample {key!r} in {self.path}; its {len(self.keys)} keys are {some}")
        members = self._members[key]
        if "json" not in members:
            raise InputError(f"{self.path}: the sample {key} has no {key}.json")
        with tarfile.open(self.path, "r:") as archive:
            contents = {suffix: self._content(archive, member) for suffix, member in members.items()}
        metadata = self._metadata(key, contents.pop("json"))
        needed = {"target.jpg", *(f"reference_{i}.png" for i in range(len(metadata["subjects"])))}
        if needed != set(contents):
            missing, extra = sorted(needed - set(contents)), sorted(set(contents) - needed)
            faults = [f"{name} is missing" for name in missing] + [f"{name} belongs to no subject" for name in extra]
            raise InputError(
                f"{self.path}: the sample {key} has {len(metadata['subjects'])} subjects, but {', '.join(faults)}"
            )
        target = self._picture(f"{key}.target.jpg", contents["target.jpg"], "RGB")
        size = (metadata["width"], metadata["height"])
        if target.size != size:
            raise InputError(f"{self.path}: {key}.target.jpg has {target.size} pixels, but its json says {size}")
        references = tuple(
            self._picture(f"{key}.reference_{i}.png", contents[f"reference_{i}.png"], "RGBA")
            for i in range(len(metadata["subjects"]))
        )
        return Sample(metadata, target, references)

    def _content(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        if member.size > MOST_BYTES:
            raise InputError(f"{self.path}: {member.name} claims {member.size} bytes")
        content = archive.extractfile(member)
        if content is None:
            raise InputError(f"{self.path}: {member.name} is no regular file")
        return content.read()

    def _metadata(self, key: str, content: bytes) -> dict[str, Any]:
        try:
            metadata = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: {key}.json is no json ({error})") from error
        schema = metadata.get("schema") if isinstance(metadata, dict) else None
        if schema != SAMPLE_SCHEMA:
            raise InputError(f"{self.path}: {key}.json has the schema {schema!r}; this program reads {SAMPLE_SCHEMA!r}")
        missing = [name for name in ("key", "caption", "width", "height", "subjects", "source") if name not in metadata]
        if missing or not isinstance(metadata["subjects"], list):
            raise InputError(f"{self.path}: {key}.json lacks {', '.join(missing) or 'a list of subjects'}")
        if metadata["key"] != key:
            raise InputError(f"{self.path}: {key}.json says that its key is {metadata['key']!r}")
        return metadata

    def _picture(self, name: str, content: bytes, mode: str) -> Image.Image:
        try:
            picture = Image.open(io.BytesIO(content))
            picture.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{self.path}: {name} does not open ({error})") from error
        return picture.convert(mode)

    def check_hash(self, build: Mapping[str, Any]) -> None:
        """InputError if the file is not the one that build.json lists."""
        entries = {entry["name"]: entry for entry in build["shards"]}
        if self.path.name not in entries:
            raise InputError(f"{self.path} is not listed in the build.json beside it: it belongs to another dataset")
        entry = entries[self.path.name]
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        size = self.path.stat().st_size
        if digest.hexdigest() != entry["sha256"]:
            raise InputError(
                f"{self.path} has changed since it was built: {size} bytes and sha256 {digest.hexdigest()[:12]}..., "
                f"build.json says {entry['bytes']} and {entry['sha256'][:12]}..."
            )


def _is_shard_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), str) for name in ("name", "sha256"))
        and all(isinstance(entry.get(name), int) for name in ("samples", "bytes"))
        and Path(entry["name"]).name == entry["name"]
    )


# What a program of this package reads of build.json.
BUILD_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "settings": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
    "counts": lambda value: isinstance(value, dict) and isinstance(value.get("samples"), int),
    "shards": lambda value: isinstance(value, list) and all(map(_is_shard_entry, value)),
}


def read_build(folder: Path) -> dict[str, Any]:
    """The build.json of a finished dataset; InputError if there is none or it is of another kind or not whole."""
    path = folder / "build.json"
    if not folder.is_dir():
        raise InputError(f"no dataset at {folder}: it is no folder")
    if not path.is_file():
        unfinished = (folder / ".mining").is_dir()
        advice = "run the same mining command again to finish it" if unfinished else "give the --out of a mining run"
        raise InputError(f"{folder} has no build.json, so it is no finished dataset: {advice}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no json ({error}): mine or copy the dataset again") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != BUILD_SCHEMA:
        raise InputError(f"{path} has the schema {schema!r}; this program reads {BUILD_SCHEMA!r}")
    if missing := [name for name, fits in BUILD_FIELDS.items() if not fits(content.get(name))]:
        raise InputError(
            f"{path} lacks {', '.join(missing)}, or what it has there is no such thing: mine or copy the dataset again"
        )
    return content


def rejected_videos(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of rejected.jsonl: video, key, stage, reason, evidence. InputError if it is missing or damaged."""
    path = folder / "rejected.jsonl"
    if not path.is_file():
        raise InputError(f"no {path}: the dataset is not complete")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}, is no json ({error})") from error
            whole = isinstance(entry, dict) and entry.keys() >= REJECTED_FIELDS
            texts = whole and all(isinstance(entry[name], str) for name in REJECTED_FIELDS - {"evidence"})
            if not texts or not KEY.fullmatch(entry["key"]):
                raise InputError(f"{path}, line {number}, is no rejected video: {line.decode()[:200]!r}")
            yield entry


def index_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of index.parquet, a few thousand in memory at a time; InputError if it is missing or damaged."""
    import pyarrow
    import pyarrow.parquet

    path = folder / "index.parquet"
    if not path.is_file():
        raise InputError(f"no {path}: the dataset is not complete")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} does not open ({error})") from error
