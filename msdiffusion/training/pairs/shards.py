"""One shard of a pairs dataset -> records and pictures. The format is specified in ``docs/data_format.md``.

A shard is a tar file of the WebDataset layout. It is read by position: its headers are walked once, which gives the
offset of every member, and a sample is then three or four small reads. That allows any order, any number of readers,
and no unpacking. Arrays are numpy: torch is not needed to read pairs. ``catalogue.py`` makes a dataset of shards.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from data_pipeline.errors import ClipError
from data_pipeline.pairs_format import (
    MOST_CAPTION,
    MOST_PHRASE,
    MOST_PIXELS,
    MOST_SUBJECTS,
    PAIRS_SCHEMA,
    fault_of_text,
)
from data_pipeline.picture_formats import open_listed
from data_pipeline.records import decode_mask, mask_size
from msdiffusion.errors import DataError, shown
from msdiffusion.training.pairs.tar_index import ShardTable, walk_shard

_KINDS = {b"\xff\xd8\xff": JpegImageFile, b"\x89PNG\r\n\x1a\n": PngImageFile}

STAY_SECONDS = 30.0
"""A file that is being read is marked as used no more often than that."""


@dataclass(frozen=True)
class PairLocation:
    """Where one pair lies in its shard."""

    key: str
    """Unique in the dataset: names the members of the pair inside the tar file."""
    shard: str
    """What messages call the shard: its path or URL."""
    members: Mapping[str, tuple[int, int]]
    """Suffix of the member (``json``, ``target.jpg``, ``reference_0.png``) -> (offset, size) in bytes."""
    descriptor: int
    """Of the tar file, which must stay open."""


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
        self._stayed = time.monotonic()
        self.table: ShardTable = table if table is not None else walk_shard(file.fileno(), name)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.table)

    def location(self, place: int) -> PairLocation:
        """Where pair number ``place`` of the shard lies; IndexError if there is none of that number."""
        if not 0 <= place < len(self):
            raise IndexError(f"{self.name} holds {len(self)} pairs, so no number {place}")
        return PairLocation(self.table.keys[place], self.name, self.table.members(place), self._file.fileno())

    def size_of_target(self, place: int) -> tuple[int, int]:
        """(width, height) in pixels of a target, from the header of the picture.

        Raises:
            DataError: if the picture has no such header.
        """
        location = self.location(place)
        try:
            with _opened(_read_member(location, "target.jpg")) as picture:
                return picture.size
        except Exception as error:  # at broken headers pillow raises many things
            raise _undecodable(location, "target.jpg", error) from error

    def stay(self) -> None:
        """Say that the file is in use, for a cache that removes what was not used for the longest time."""
        now = time.monotonic()
        if now > self._stayed + STAY_SECONDS:
            os.utime(self._file.fileno())
            self._stayed = now

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_record(location: PairLocation) -> dict[str, Any]:
    """The json of a pair, checked against the schema.

    Raises:
        DataError: if it is not json, of another schema version, lacks a field, has no subject, more subjects or longer
            texts than ``data_pipeline.pairs_format`` allows, or lacks a reference.
    """
    where = f"{location.shard}: pair {location.key!r}"
    try:
        record = json.loads(_read_member(location, "json"))
    except (ValueError, RecursionError) as error:  # also: numbers of too many digits, brackets in too many brackets
        raise DataError(f"{where}: its json cannot be read ({error}); build the dataset again") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != PAIRS_SCHEMA:
        raise DataError(
            f"{where} has schema {schema!r}, but this version reads {PAIRS_SCHEMA!r}; "
            "build the dataset again with this version's data_pipeline.build"
        )
    if missing := [name for name in ("caption", "subjects") if name not in record]:
        raise DataError(f"{where} lacks {missing}")
    if fault := fault_of_text(record["caption"], MOST_CAPTION):
        raise DataError(f"{where}: its caption {shown(record['caption'])} {fault}")
    if not isinstance(record["subjects"], list) or not record["subjects"]:
        raise DataError(f"{where} has no subject; a pair needs at least one")
    if len(record["subjects"]) > MOST_SUBJECTS:
        count = len(record["subjects"])
        raise DataError(f"{where} has {count:,} subjects, more than the {MOST_SUBJECTS} that are read")
    for number, subject in enumerate(record["subjects"]):
        given = subject if isinstance(subject, dict) else {}
        if missing := [name for name in ("phrase", "target_box") if name not in given]:
            raise DataError(f"{where}, subject {number} lacks {missing}")
        if fault := fault_of_text(subject["phrase"], MOST_PHRASE):
            raise DataError(f"{where}, subject {number}: its phrase {shown(subject['phrase'])} {fault}")
        if f"reference_{number}.png" not in location.members:
            raise DataError(f"{where} has {len(record['subjects'])} subjects, but no reference_{number}.png")
        if not _is_box(subject["target_box"]):
            raise DataError(
                f"{where}, subject {number}: target_box {shown(subject['target_box'])} is not a normalised xyxy box "
                "inside [0, 1] with an area in float32"
            )
    return record


def _is_box(box: Any) -> bool:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        return False
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        return False
    edges = np.array(box, dtype=np.float32)  # as training has it: nearly equal edges become equal
    return bool((edges[:2] < edges[2:]).all())


def read_pair(location: PairLocation, reference_frame: str = "other") -> Pair:
    """Read and decode one pair.

    Args:
        reference_frame: "other": the cut-outs of the pair's reference frame. "target": the same subjects cut out of
            the target picture itself, as when there is no video.

    Raises:
        DataError: as ``read_record``, or if a picture cannot be decoded or has more than ``MOST_PIXELS``, if the target
            has another size than its record says, or if a mask that is needed is missing or of another size than the
            target.
    """
    record = read_record(location)
    phrases, boxes = phrases_and_boxes(record)
    target = _read_picture(location, "target.jpg", "RGB")
    said = (record.get("width", target.width), record.get("height", target.height))
    if target.size != said:
        raise DataError(
            f"{location.shard}: the target of pair {location.key!r} has {target.size} pixels, and its json says "
            f"{said}; build the dataset again"
        )
    if reference_frame == "target":
        references = _cut_from_target(location, record, target)
    else:
        references = [_read_picture(location, f"reference_{i}.png", "RGBA") for i in range(len(phrases))]
    return Pair(
        key=location.key,
        caption=record["caption"],
        target=target,
        phrases=phrases,
        boxes=boxes,
        references=tuple(references),
    )


def phrases_and_boxes(record: dict[str, Any]) -> tuple[tuple[str, ...], np.ndarray]:
    """Those of the subjects of a record, as ``Pair`` has them."""
    subjects = record["subjects"]
    boxes = np.array([subject["target_box"] for subject in subjects], dtype=np.float32)
    return tuple(subject["phrase"] for subject in subjects), boxes


def _cut_from_target(location: PairLocation, record: dict[str, Any], target: Image.Image) -> list[Image.Image]:
    """The subjects of a pair, RGBA, cut out of its target by the target's masks."""
    pixels = np.asarray(target)
    references = []
    for number, subject in enumerate(record["subjects"]):
        where = f"{location.shard}: pair {location.key!r}, subject {number}"
        if "target_mask_rle" not in subject:
            raise DataError(f"{where} has no target_mask_rle, so it can't be cut out of the target")
        try:
            size = mask_size(subject["target_mask_rle"])
            if size != pixels.shape[:2]:  # before anything of that size is made
                raise DataError(f"{where}: its mask is {size}; the target is {pixels.shape[:2]}")
            mask = decode_mask(subject["target_mask_rle"])
        except ClipError as error:
            raise DataError(f"{where}: {error.told}") from error
        if not mask.any():
            raise DataError(f"{where}: its mask is {mask.shape} with 0 pixels set")
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        cut = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        alpha = np.where(mask[cut], np.uint8(255), np.uint8(0))[..., None]
        references.append(Image.fromarray(np.concatenate([pixels[cut] * (alpha > 0), alpha], -1)))
    return references


def _read_member(location: PairLocation, suffix: str) -> bytes:
    offset, size = location.members[suffix]
    try:
        content = os.pread(location.descriptor, size, offset)
    except OSError as error:
        raise DataError(f"{location.shard}: {suffix} of pair {location.key!r} cannot be read: {error}") from error
    if len(content) < size:
        raise DataError(f"{location.shard} became shorter while it was being read: pair {location.key!r} is cut off")
    return content


def _read_picture(location: PairLocation, suffix: str, mode: str) -> Image.Image:
    try:
        picture = _opened(_read_member(location, suffix))
        width, height = picture.size
        if width * height > MOST_PIXELS:
            raise DataError(
                f"{location.shard}: {suffix} of pair {location.key!r} has {width:,} x {height:,} pixels, more than the "
                f"{MOST_PIXELS:,} that are read; build the dataset again with smaller pictures"
            )
        return picture.convert(mode)
    # Pillow raises SyntaxError for a broken png chunk, ValueError for impossible contents, and many others
    except Exception as error:
        raise _undecodable(location, suffix, error) from error


def _opened(content: bytes) -> Image.Image:
    """A picture whose header was read. By its class where that is known: ``open_listed`` warns of large pictures."""
    kind = next((kind for start, kind in _KINDS.items() if content.startswith(start)), open_listed)
    return kind(io.BytesIO(content))


def _undecodable(location: PairLocation, suffix: str, error: Exception) -> DataError:
    return DataError(
        f"{location.shard}: {suffix} of pair {location.key!r} cannot be decoded ({error}). "
        "python -m msdiffusion.training.catalogue DATASET --deep lists every damaged pair"
    )
