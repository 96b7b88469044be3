"""Reads the samples of a finished dataset and checks them: for the report, for ``inspect``, for whoever doubts a file.

Members are read in memory, never extracted to the disk. Every fault is an ``InputError`` that names the file.
"""

import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.errors import ClipError, InputError
from data_pipeline.pairs_format import (
    BLANK_REFERENCE,
    BUILD_SCHEMA,
    COLUMNS,
    KEY,
    MEMBER,
    MOST_BUILD_BYTES,
    MOST_LINE_BYTES,
    MOST_SUBJECTS,
    PAIRS_SCHEMA,
    SAMPLE_BYTES,
    HeaderFile,
    check_texts,
    fault_of_row,
    is_size,
    most_bytes,
    open_index,
)
from data_pipeline.picture_formats import open_listed
from data_pipeline.records import decode_mask, mask_size
from data_pipeline.sample_checks import fault_of_sample, is_count

REJECTED_FIELDS = frozenset({"video", "key", "stage", "reason", "evidence"})


@dataclass(frozen=True)
class Sample:
    """One sample, checked. metadata: its json (docs/data_format.md)."""

    metadata: Mapping[str, Any]
    target: Image.Image
    """RGB, of the size in the metadata."""
    references: tuple[Image.Image, ...]
    """RGBA cut-outs, one per subject."""
    masks: tuple[np.ndarray | None, ...]
    """Per subject its mask in the target, bool (height, width), if it has one."""

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
            if member.size > most_bytes(found["suffix"]):
                raise InputError(
                    f"{path}: {member.name} has {member.size:,} bytes, more than the {most_bytes(found['suffix']):,} "
                    "that are read"
                )
            members[found["suffix"]] = member

    @property
    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the file."""
        return list(self._members)

    def _headers(self) -> list[tarfile.TarInfo]:
        if not self.path.is_file():
            raise InputError(f"no file at {self.path}")
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=HeaderFile(file), mode="r:") as archive:
                members = archive.getmembers()
                end = archive.offset
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
            with self.path.open("rb") as file:
                is_tar = file.read(512)[257:262] == b"ustar"
            what, advice = ("damaged or cut short", ": mine or copy it again") if is_tar else ("no tar file", "")
            raise InputError(f"{self.path} is {what} ({error}){advice}") from error
        behind = max((member.offset_data + -(-member.size // 512) * 512 for member in members), default=0)
        with self.path.open("rb") as file:
            file.seek(min(behind, self.path.stat().st_size))
            rest = file.read(1024)
        if len(rest) < 1024 or any(rest):
            raise InputError(f"{self.path} is cut short after {end} bytes: its end mark is missing; copy it again")
        return members

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
        count = len(metadata["subjects"])
        needed = {"target.jpg", *(f"reference_{i}.png" for i in range(count))}
        for number in range(count, MOST_SUBJECTS):  # in the place of subjects that this sample has not, and others have
            if contents.get(f"reference_{number}.png") == BLANK_REFERENCE:
                del contents[f"reference_{number}.png"]
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
        return Sample(metadata, target, references, tuple(self._masks(key, metadata)))

    def _masks(self, key: str, metadata: Mapping[str, Any]) -> Iterator[np.ndarray | None]:
        size = (metadata["height"], metadata["width"])
        for number, subject in enumerate(metadata["subjects"]):
            rle = subject.get("target_mask_rle")
            try:
                if rle is not None and mask_size(rle) != size:  # before anything of that size is made
                    raise InputError(
                        f"{self.path}: subject {number} of {key}.json has a mask of {mask_size(rle)} pixels, its "
                        f"picture {size} (height, width)"
                    )
                yield None if rle is None else decode_mask(rle)
            except ClipError as error:
                raise InputError(f"{self.path}: subject {number} of {key}.json: {error.told}") from error

    def _content(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
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
        if schema != PAIRS_SCHEMA:
            raise InputError(f"{self.path}: {key}.json has the schema {schema!r}; this program reads {PAIRS_SCHEMA!r}")
        missing = [name for name in ("key", "caption", "width", "height", "subjects", "source") if name not in metadata]
        if missing or not isinstance(metadata["subjects"], list):
            raise InputError(f"{self.path}: {key}.json lacks {', '.join(missing) or 'a list of subjects'}")
        if metadata["key"] != key:
            raise InputError(f"{self.path}: {key}.json says that its key is {metadata['key']!r}")
        if fault := fault_of_sample(metadata):
            raise InputError(f"{self.path}: {key}.json: {fault} (docs/data_format.md says what is expected)")
        return metadata

    def _picture(self, name: str, content: bytes, mode: str) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of large pictures, which are refused here, and of odd EXIF data
                picture = open_listed(io.BytesIO(content))
                if not is_size(*picture.size):
                    raise ValueError(f"it says that it has {picture.width:,} x {picture.height:,} pixels")
                return picture.convert(mode)
        except Image.DecompressionBombError:
            raise InputError(f"{self.path}: {name} does not open (it says that it has too many pixels)") from None
        except Exception as error:  # decoders raise many things at broken files
            raise InputError(f"{self.path}: {name} does not open ({error or type(error).__name__})") from error

    def check_hash(self, build: Mapping[str, Any]) -> None:
        """InputError if the file is not the one that build.json lists."""
        entries = {entry["name"]: entry for entry in build["shards"]}
        if self.path.name not in entries:
            raise InputError(f"{self.path} is not listed in the build.json beside it: it belongs to another dataset")
        entry = entries[self.path.name]
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            size = self.path.stat().st_size
            raise InputError(
                f"{self.path} has changed since it was built: {size} bytes and sha256 {digest[:12]}..., "
                f"build.json says {entry['bytes']} and {entry['sha256'][:12]}..."
            )


def _is_shard_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), str) for name in ("name", "sha256"))
        and all(is_count(entry.get(name)) for name in ("samples", "bytes"))
        and Path(entry["name"]).name == entry["name"]
    )


# What a program of this package reads of build.json.
BUILD_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "settings": lambda value: isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict),
    "counts": lambda value: isinstance(value, dict) and is_count(value.get("samples")),
    "shards": lambda value: isinstance(value, list) and all(map(_is_shard_entry, value)),
}


def read_json(path: Path, advice: str) -> Any:
    """The content of a json file; InputError, with the advice, if it is none or longer than any of ours."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BUILD_BYTES + 1)
        if len(content) > MOST_BUILD_BYTES:
            raise InputError(f"{path} has more than the {MOST_BUILD_BYTES:,} bytes that are read: {advice}")
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # an InputError is a ValueError
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no json ({error}): {advice}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def read_build(folder: Path) -> dict[str, Any]:
    """The build.json of a finished dataset; InputError if there is none or it is of another kind or not whole."""
    path = folder / "build.json"
    if not folder.is_dir():
        raise InputError(f"no dataset at {folder}: it is no folder")
    if not path.is_file():
        unfinished = (folder / ".mining").is_dir()
        advice = "run the same mining command again to finish it" if unfinished else "give the --out of a mining run"
        raise InputError(f"{folder} has no build.json, so it is no finished dataset: {advice}")
    content = read_json(path, "mine or copy the dataset again")
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
        for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE_BYTES + 1), b""), start=1):
            if len(line) > MOST_LINE_BYTES:
                raise InputError(f"{path}, line {number}, has more than the {MOST_LINE_BYTES:,} bytes that are read")
            try:
                entry = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}, is no json ({error})") from error
            whole = isinstance(entry, dict) and entry.keys() >= REJECTED_FIELDS
            texts = whole and all(isinstance(entry[name], str) for name in REJECTED_FIELDS - {"evidence"})
            if not texts or not KEY.fullmatch(entry["key"]):
                raise InputError(f"{path}, line {number}, is no rejected video: {line.decode()[:200]!r}")
            yield entry


def index_rows(folder: Path, build: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of index.parquet, a few hundred in memory at a time; InputError if it is missing or damaged, or if it is
    not what its shards, as build.json lists them, can hold.
    """
    import pyarrow

    path = folder / "index.parquet"
    if not path.is_file():
        raise InputError(f"no {path}: the dataset is not complete")
    for entry in build["shards"]:
        shard = folder / entry["name"]
        if shard.is_file() and entry["samples"] * SAMPLE_BYTES > shard.stat().st_size:
            raise InputError(
                f"build.json says that {shard} holds {entry['samples']:,} samples, for which it is too small"
            )
    number = 0
    try:
        with open_index(path, COLUMNS, sum(entry["samples"] for entry in build["shards"])) as file:
            for batch in file.iter_batches(batch_size=256, columns=list(COLUMNS)):
                check_texts(batch)
                for row in batch.to_pylist():
                    number += 1
                    if fault := fault_of_row(row):
                        raise InputError(f"{path}, row {number}: {fault}")
                    yield row
    except InputError:
        raise
    except ValueError as error:  # pyarrow's errors are some too
        if isinstance(error, pyarrow.ArrowException):
            raise InputError(f"{path} does not open ({error})") from error
        raise InputError(f"{path} {error}: mine or copy the dataset again") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} does not open ({error})") from error
