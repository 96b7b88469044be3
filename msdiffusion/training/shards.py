"""One shard of a pairs dataset -> records and pictures. The format is specified in ``docs/data_format.md``.

A shard is a tar file of the WebDataset layout. It is read by position: its headers are walked once, which gives the
offset of every member, and a sample is then three or four small reads. That allows any order, any number of readers,
and no unpacking. Arrays are numpy: torch is not needed to read pairs. ``catalogue.py`` makes a dataset of shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from data_pipeline.records import ClipError, decode_mask
from msdiffusion.errors import DataError
from msdiffusion.training.tar_index import ShardTable, walk_shard

PAIRS_SCHEMA = "msdiffusion.pairs/1"
"""The one schema that this reader knows."""

SWAPPED_SUFFIX = "-swapped"
"""Ends the key of a pair that is another pair the other way round: reference frame and target frame exchanged."""

HOW_TO_MAKE_PAIRS = (
    "Make one with:\n"
    "  python -m data_pipeline.world --out data/world/clips --count 3000\n"
    "  python -m data_pipeline.build --videos data/world/clips --out {directory}\n"
    "or give --videos a directory of your own captioned videos."
)


@dataclass(frozen=True)
class PairLocation:
    """Where one pair lies in its shard."""

    key: str
    """Unique in the dataset: names the members of the pair inside the tar file."""
    shard: str | Path
    """What messages call the shard: its path or URL."""
    members: Mapping[str, tuple[int, int]]
    """Suffix of the member (``json``, ``target.jpg``, ``reference_0.png``) -> (offset, size) in bytes."""
    descriptor: int | None = None
    """Of the open tar file; None: it is opened for every read, at the path ``shard``."""


@dataclass(frozen=True)
class Pair:
    """One training pair, as it was mined: nothing is resized, cropped, shuffled or dropped."""

    key: str
    caption: str
    target: Image.Image
    """RGB, any size: the frame that the model learns to draw."""
    phrases: tuple[str, ...]
    """Per subject, the words of the caption that name it."""
    boxes: np.ndarray
    """float32 (S, 4): the subjects in the target, normalised xyxy."""
    references: tuple[Image.Image, ...]
    """Per subject, RGBA: its cut-out from the other frame, cropped to the subject."""


class OpenShard:
    """A shard that is being read: an open file and where its members lie.

    Reads leave the position of the file alone, so that processes forked from this one may go on with it.

    Args:
        file: the tar file, opened for binary reading; closed with this object.
        name: what messages call the shard: its path or URL.
        table: of the shard, where it was walked before.

    Raises:
        DataError: as ``walk_shard``; or if the file is another one than was walked.
    """

    def __init__(self, file: BinaryIO, name: str, table: ShardTable | None = None) -> None:
        self.name = name
        self._file = file
        if table is not None and os.fstat(file.fileno()).st_size != table.bytes:
            raise DataError(f"{name} was changed while it was being read: it had {table.bytes} bytes")
        self.table: ShardTable = table if table is not None else walk_shard(file.fileno(), name)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.table)

    def location(self, place: int) -> PairLocation:
        """Where pair number ``place`` of the shard lies."""
        return PairLocation(self.table.keys[place], self.name, self.table.members(place), self._file.fileno())

    def size_of_target(self, place: int) -> tuple[int, int]:
        """(width, height) in pixels of a target, from the header of the picture.

        Raises:
            DataError: if the picture has no such header.
        """
        location = self.location(place)
        try:
            with Image.open(io.BytesIO(_read_member(location, "target.jpg"))) as picture:
                return picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _undecodable(location, "target.jpg", error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def find_shards(directory: str | Path) -> list[Path]:
    """The shards of a pairs dataset, in order of name.

    Raises:
        DataError: if there is no such directory or it holds no shard; the message says which commands make one.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(
            f"no pairs dataset: {directory} does not exist. " + HOW_TO_MAKE_PAIRS.format(directory=directory)
        )
    shards = sorted(directory.glob("*.tar"))
    if not shards:
        raise DataError(
            f"no pairs dataset: {directory} holds no .tar shard. " + HOW_TO_MAKE_PAIRS.format(directory=directory)
        )
    return shards


def index_shards(shards: Sequence[Path]) -> list[PairLocation]:
    """Walk the headers of the shards; nothing is decoded, but the schema of each shard's first pair is checked.

    Raises:
        DataError: if a shard is not a tar file, is cut off, holds no pair, a pair lacks its json or its target, or a
            key occurs twice.
    """
    locations: dict[str, PairLocation] = {}
    for shard in shards:
        members: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.isfile():
                        # as WebDataset does: the key ends at the first dot of the file name
                        folder, _, name = member.name.rpartition("/")
                        stem, _, suffix = name.partition(".")
                        key = f"{folder}/{stem}" if folder else stem
                        members.setdefault(key, {})[suffix] = (member.offset_data, member.size)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"{shard} is not a complete tar file ({error}); build the dataset again") from error
        if not members:
            raise DataError(f"{shard} holds no pair; build the dataset again, or remove the file")
        size_on_disk = shard.stat().st_size
        for key, found in members.items():
            if missing := [suffix for suffix in ("json", "target.jpg") if suffix not in found]:
                raise DataError(f"{shard}: pair {key!r} has no {' and no '.join(missing)}, only {sorted(found)}")
            if any(offset + size > size_on_disk for offset, size in found.values()):
                raise DataError(f"{shard} is cut off inside pair {key!r}; build the dataset again")
            if key in locations:
                raise DataError(f"pair {key!r} is both in {locations[key].shard} and in {shard}; keys must be unique")
            locations[key] = PairLocation(key, shard, found)
        read_record(locations[next(iter(members))])
    return list(locations.values())


def split_by_key(locations: Sequence[PairLocation], fraction: float) -> tuple[list[PairLocation], list[PairLocation]]:
    """(training pairs, validation pairs); which one a pair belongs to is a pure function of its key.

    So the split stays the same when a dataset grows, is sharded differently, or is read in another order. A pair and
    the same pair swapped are on one side: they share their pictures. A fraction above 0 gives at least one validation
    pair.

    Args:
        locations: at least two pairs where fraction is above 0.
        fraction: share of the keys for validation, in [0, 1).

    Raises:
        DataError: if no training pair would be left.
    """
    if fraction == 0:
        return list(locations), []
    draws = {location.key: _uniform_of(location.key.removesuffix(SWAPPED_SUFFIX)) for location in locations}
    threshold = max(fraction, min(draws.values(), default=0.0))  # so that the smallest draw is always held out
    training = [location for location in locations if draws[location.key] > threshold]
    validation = [location for location in locations if draws[location.key] <= threshold]
    if not training:
        raise DataError(
            f"{len(locations)} pairs leave none to train on with validation_fraction={fraction}; "
            "give more pairs, a smaller fraction, or validation_fraction=0"
        )
    return training, validation


def read_record(location: PairLocation) -> dict[str, Any]:
    """The json of a pair, checked against the schema.

    Raises:
        DataError: if it is not json, of another schema version, lacks a field, has no subject, or lacks a reference.
    """
    where = f"{location.shard}: pair {location.key!r}"
    try:
        record = json.loads(_read_member(location, "json"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: its json cannot be read ({error}); build the dataset again") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != PAIRS_SCHEMA:
        raise DataError(
            f"{where} has schema {schema!r}, but this version reads {PAIRS_SCHEMA!r}; "
            "build the dataset again with this version's data_pipeline.build"
        )
    if missing := [name for name in ("caption", "subjects") if name not in record]:
        raise DataError(f"{where} lacks {missing}")
    if not record["subjects"]:
        raise DataError(f"{where} has no subject; a pair needs at least one")
    for number, subject in enumerate(record["subjects"]):
        if missing := [name for name in ("phrase", "target_box") if name not in subject]:
            raise DataError(f"{where}, subject {number} lacks {missing}")
        if f"reference_{number}.png" not in location.members:
            raise DataError(f"{where} has {len(record['subjects'])} subjects, but no reference_{number}.png")
        box = subject["target_box"]
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise DataError(f"{where}, subject {number}: target_box {box} is not a normalised xyxy box inside [0, 1]")
    return record


def read_pair(location: PairLocation, reference_frame: str = "other") -> Pair:
    """Read and decode one pair.

    Args:
        location: from ``index_shards``.
        reference_frame: "other": the cut-outs of the pair's reference frame. "target": the same subjects cut out of
            the target picture itself, as when there is no video.

    Raises:
        DataError: as ``read_record``, or if a picture cannot be decoded, or if a mask that is needed is missing or of
            another size than the target.
    """
    record = read_record(location)
    subjects = record["subjects"]
    if reference_frame == "target":
        return _cut_from_target(location, record)
    return Pair(
        key=location.key,
        caption=record["caption"],
        target=_read_picture(location, "target.jpg", "RGB"),
        phrases=tuple(subject["phrase"] for subject in subjects),
        boxes=np.array([subject["target_box"] for subject in subjects], dtype=np.float32),
        references=tuple(_read_picture(location, f"reference_{i}.png", "RGBA") for i in range(len(subjects))),
    )


def _cut_from_target(location: PairLocation, record: dict[str, Any]) -> Pair:
    """The pair with references cut out of its target by the target's masks."""
    target = _read_picture(location, "target.jpg", "RGB")
    pixels = np.asarray(target)
    references = []
    for number, subject in enumerate(record["subjects"]):
        where = f"{location.shard}: pair {location.key!r}, subject {number}"
        if "target_mask_rle" not in subject:
            raise DataError(f"{where} has no target_mask_rle, so it can't be cut out of the target")
        try:
            mask = decode_mask(subject["target_mask_rle"])
        except ClipError as error:
            raise DataError(f"{where}: {error}") from error
        if mask.shape != pixels.shape[:2] or not mask.any():
            raise DataError(f"{where}: its mask is {mask.shape} with {int(mask.sum())} pixels set; the target is "
                            f"{pixels.shape[:2]}")  # fmt: skip
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        cut = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        alpha = np.where(mask[cut], np.uint8(255), np.uint8(0))[..., None]
        references.append(Image.fromarray(np.concatenate([pixels[cut] * (alpha > 0), alpha], -1)))
    return Pair(
        key=location.key,
        caption=record["caption"],
        target=target,
        phrases=tuple(subject["phrase"] for subject in record["subjects"]),
        boxes=np.array([subject["target_box"] for subject in record["subjects"]], dtype=np.float32),
        references=tuple(references),
    )


def _read_member(location: PairLocation, suffix: str) -> bytes:
    offset, size = location.members[suffix]
    try:
        if location.descriptor is not None:
            return os.pread(location.descriptor, size, offset)
        with Path(location.shard).open("rb") as shard:
            shard.seek(offset)
            return shard.read(size)
    except OSError as error:
        raise DataError(f"{location.shard} could be read when training started, but no longer: {error}") from error


def _read_picture(location: PairLocation, suffix: str, mode: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_read_member(location, suffix))).convert(mode)
    # Pillow raises SyntaxError for a broken png chunk, ValueError for impossible contents
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _undecodable(location, suffix, error) from error


def _undecodable(location: PairLocation, suffix: str, error: Exception) -> DataError:
    return DataError(
        f"{location.shard}: {suffix} of pair {location.key!r} cannot be decoded ({error}). "
        "python -m msdiffusion.training.catalogue DATASET --deep lists every damaged pair"
    )


def _uniform_of(key: str) -> float:
    """A number in [0, 1) that depends on the key alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56
