"""Annotation files of others, brought into one form: COCO, YouTube-VIS and OVIS, DAVIS.

Which frames and videos their entries mean, and what is asked of a file, is specified in docs/data_format.md. The
compressed run lengths are those of the COCO API (Lin et al., https://cocodataset.org): numbers in groups of five bits,
each from the third on as the difference to the one two places before.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.records import ClipError, InputError

BAD = "unreadable annotations"
BAD_MASK = "unreadable mask in the annotations"
MOST_PIXELS = 1e9
"""A corner of a polygon beyond that is a mistake, and its edges cannot be computed."""
VOID = 255
"""DAVIS: pixels that belong to nothing for certain."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object in one frame. box: xyxy in pixels; None to take the tight box of the mask."""

    object_id: int | None
    name: str
    box: Sequence[float] | None
    mask_rle: Mapping[str, Any] | None = None
    mask_file: tuple[Path, int] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a file says about one video. size: width, height in pixels, or None if only its masks tell.

    frames: called with the number of frames of the video; gives frame number -> objects, and raises ClipError for
    what is broken, so that a broken video costs no other one.
    """

    size: tuple[int, int] | None
    frames: Callable[[int], Mapping[int, Sequence[Found]]]


def frame_number(name: str) -> int:
    """The last number of a picture's file name: 12 of "clip/frame_00012.jpg"; ClipError if there is none."""
    digits = re.findall(r"\d+", PurePosixPath(name).stem)
    if not digits:
        raise ClipError(BAD, error=f"no frame number in the file name {name!r}")
    return int(digits[-1])


def _corner_box(values: Any, where: str) -> tuple[float, ...]:
    """COCO's [x, y, width, height] -> xyxy."""
    try:
        x, y, width, height = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ClipError(BAD, error=f"{where}: a box needs four numbers, got {values!r}") from error
    return x, y, x + width, y + height


def _mask_of(segmentation: Any, width: int, height: int) -> Mapping[str, Any] | None:
    """A COCO segmentation as ``decode_segmentation`` reads it."""
    if not segmentation:
        return None
    if isinstance(segmentation, Mapping):
        return segmentation
    return {"size": [height, width], "polygons": segmentation}


def _found(annotation: Mapping[str, Any], number: int | None, names: Mapping[int, str], **values: Any) -> Found:
    """One object with its category's name. values: where, box [x, y, width, height], segmentation, size."""
    where, (width, height) = values["where"], values["size"]
    category = annotation["category_id"]
    if category not in names:
        raise ClipError(BAD, error=f"{where}: unknown category {category}, known are {sorted(names)[:20]}")
    mask = _mask_of(values["segmentation"], width, height)
    if values["box"] is None and mask is None:
        raise ClipError(BAD, error=f"{where}: neither a box nor a mask")
    box = None if values["box"] is None else _corner_box(values["box"], where)
    return Found(object_id=number, name=names[category], box=box, mask_rle=mask)


def _guarded(read: Callable[[int], Mapping[int, Sequence[Found]]]) -> Callable[[int], Mapping[int, Sequence[Found]]]:
    """What a missing field, or one of another type, raises becomes a ClipError."""

    def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
        try:
            return read(num_frames)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ClipError(BAD, error=f"{type(error).__name__}: {error}") from error

    return frames


def _category_names(content: Mapping[str, Any]) -> dict[Any, str]:
    _check_unique("categories", content["categories"])
    return {category["id"]: category["name"] for category in content["categories"]}


def _check_unique(kind: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """InputError if two of the entries have the same id: what refers to it would mean either."""
    seen = set()
    for entry in entries:
        if entry["id"] in seen:
            raise InputError(f"two of the {kind} of the annotations have the id {entry['id']!r}: number them anew")
        seen.add(entry["id"])


# --------------------------------------------------------------------------------------------------------------- COCO


def read_coco(content: Mapping[str, Any]) -> dict[str, Entry]:
    """COCO's "images", "annotations" and "categories", one image per annotated frame: by its fields "video" and
    "frame", or by its file_name "clip/00012.jpg". "track_id" of an annotation says what is the same object in two
    frames. Crowds are left out.
    """
    names = _category_names(content)
    _check_unique("images", content["images"])
    objects: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            objects.setdefault(annotation["image_id"], []).append(annotation)
    images: dict[str, list[Mapping[str, Any]]] = {}
    for image in content["images"]:
        video = image.get("video") or str(PurePosixPath(image["file_name"]).parent)
        images.setdefault(video, []).append(image)

    def entry(video: str, some: Sequence[Mapping[str, Any]]) -> Entry:
        size = (some[0]["width"], some[0]["height"])

        def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
            result: dict[int, list[Found]] = {}
            for image in some:
                if (image["width"], image["height"]) != size:
                    raise ClipError(BAD, error=f"images of {video} have different sizes")
                index = image["frame"] if "frame" in image else frame_number(image["file_name"])
                if index in result:
                    raise ClipError(BAD, error=f"two images for frame {index} of {video}")
                result[index] = [
                    _found(
                        annotation,
                        annotation.get("track_id"),
                        names,
                        where=f"frame {index}, annotation {annotation.get('id')}",
                        box=annotation.get("bbox"),
                        segmentation=annotation.get("segmentation"),
                        size=size,
                    )
                    for annotation in objects.get(image["id"], ())
                ]
            return result

        return Entry(size=size, frames=_guarded(frames))

    return {video: entry(video, some) for video, some in images.items()}


# -------------------------------------------------------------------------------------------------------- YouTube-VIS


def read_youtube_vis(content: Mapping[str, Any]) -> dict[str, Entry]:
    """YouTube-VIS and OVIS: "videos" with their file_names, "annotations" with one box and one segmentation per frame,
    null where the object is not seen. The number of an annotation is a track.

    A file stands for the frame at its place in the list if the video has as many frames as the list, and otherwise
    for the frame of the number in its name (YouTube-VIS lists every fifth frame).
    """
    names = _category_names(content)
    _check_unique("videos", content["videos"])
    tracks: dict[Any, list[Mapping[str, Any]]] = {}
    for annotation in content["annotations"]:
        tracks.setdefault(annotation["video_id"], []).append(annotation)

    def entry(video: Mapping[str, Any]) -> Entry:
        size = (video["width"], video["height"])

        def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
            files = video["file_names"]
            indices = range(num_frames) if len(files) == num_frames else [frame_number(file) for file in files]
            result: dict[int, list[Found]] = {index: [] for index in indices}
            if len(result) != len(files):
                raise ClipError(BAD, error="two files have the same frame number")
            for track in tracks.get(video["id"], ()):
                nothing = [None] * len(files)
                boxes, masks = (track.get(key) or nothing for key in ("bboxes", "segmentations"))
                if not len(boxes) == len(masks) == len(files):
                    raise ClipError(
                        BAD,
                        error=f"object {track['id']} has {len(boxes)} boxes and {len(masks)} masks, but the video "
                        f"{len(files)} frames",
                    )
                for index, box, mask in zip(indices, boxes, masks, strict=True):
                    if box is None and mask is None:
                        continue
                    where = f"frame {index}, object {track['id']}"
                    found = _found(track, track["id"], names, where=where, box=box, segmentation=mask, size=size)
                    result[index].append(found)
            return result

        return Entry(size=size, frames=_guarded(frames))

    result: dict[str, Entry] = {}
    for video in content["videos"]:
        folder = str(PurePosixPath(video["file_names"][0]).parent)
        if folder in result:
            raise InputError(
                f"two videos of the annotations have their pictures in the folder {folder!r}, one of them with the id "
                f"{video['id']!r}: leave one of them"
            )
        result[folder] = entry(video)
    return result


# -------------------------------------------------------------------------------------------------------------- DAVIS


def read_davis(names: Mapping[str, Mapping[str, str | None]], folder: Path) -> dict[str, Entry]:
    """DAVIS: for each clip a folder of pictures 00000.png ... whose pixels are object numbers, 0 for the background and
    255 for nothing. DAVIS has no names, so ``names`` gives them: clip -> number -> name, null to leave an object out.
    Numbers are tracks.
    """

    def entry(video: str, named: Mapping[str, str | None]) -> Entry:
        def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
            known = {int(number): name for number, name in named.items()}
            pictures = sorted((folder / video).glob("*.png"))
            if not pictures:
                raise ClipError(BAD, error=f"no pictures in the folder {video} of the masks")
            result: dict[int, list[Found]] = {}
            for picture in pictures:
                index = frame_number(picture.name)
                if index in result:
                    raise ClipError(BAD, error=f"two pictures for frame {index} in the folder {video}")
                numbers = [int(number) for number in np.unique(read_numbers(picture)) if number not in (0, VOID)]
                strange = [number for number in numbers if number not in known]
                if strange:
                    raise ClipError(BAD, error=f"{video}/{picture.name}: no names for the objects {strange[:20]}")
                result[index] = [
                    Found(object_id=number, name=known[number], box=None, mask_file=(picture, number))
                    for number in numbers
                    if known[number] is not None
                ]
            return result

        return Entry(size=None, frames=_guarded(frames))

    return {video: entry(video, named) for video, named in names.items()}


def read_names_table(path: Path) -> dict[str, dict[str, str | None]]:
    """Names of DAVIS objects, from a csv with the columns video, object, name; an empty name leaves an object out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"video", "object", "name"} <= set(columns):
            raise InputError(
                f"cannot read annotations from {path}: a csv of DAVIS names needs the columns video, object, name; "
                f"found {', '.join(columns) or 'none'}"
            )
        names: dict[str, dict[str, str | None]] = {}
        for row in reader:
            if not (row["object"] or "").strip().isdigit():
                raise InputError(f"{path}, line {reader.line_num}: object must be a number, got {row['object']!r}")
            named, number = names.setdefault(row["video"], {}), row["object"].strip()
            if number in named:
                raise InputError(f"{path}, line {reader.line_num}: a second name for object {number} of {row['video']}")
            named[number] = (row["name"] or "").strip() or None
    return names


def read_numbers(path: Path) -> np.ndarray:
    """The object numbers of a palette or grey picture, (height, width) integers; ClipError for any other picture."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            numbers = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(BAD_MASK, file=path.name, error=type(error).__name__) from error
    if numbers.ndim != 2:
        raise ClipError(BAD_MASK, file=path.name, error="needed is a palette or grey picture of object numbers")
    return numbers


# -------------------------------------------------------------------------------------------------------------- masks


def decode_counts(text: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed string; ClipError if it breaks off in a number or has other characters."""
    codes = np.frombuffer(text.encode("latin-1", "replace") if isinstance(text, str) else text, dtype=np.uint8)
    counts: list[int] = []
    value = shift = 0
    for code in codes.tolist():
        group = code - 48
        if not 0 <= group < 64 or shift > 60:
            raise ClipError(BAD_MASK, error="broken compressed run lengths")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:  # more groups follow
            continue
        if group & 16:  # the sign
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ClipError(BAD_MASK, error="broken compressed run lengths")
    return counts


def draw_polygons(polygons: Any, width: int, height: int) -> np.ndarray:
    """Bool (height, width): pixels whose centres lie in at least one polygon, by the even-odd rule. polygons: lists
    [x, y, x, y, ...] in pixels, three points or more.
    """
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        try:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError) as error:
            raise ClipError(BAD_MASK, error="a polygon is a list x, y, x, y, ...") from error
        if len(points) < 3 or not (np.abs(points) < MOST_PIXELS).all():  # nor NaN
            raise ClipError(BAD_MASK, error="a polygon needs three points or more, none of them far away or infinite")
        # How often the outline is crossed on the way from the left edge to a pixel's centre.
        crossings = np.zeros((height, width + 1), dtype=np.int32)
        for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
            (x1, y1), (x2, y2) = sorted([(x1, y1), (x2, y2)], key=lambda point: point[1])
            rows = np.arange(max(0, math.ceil(y1 - 0.5)), min(height, math.ceil(y2 - 0.5)))
            if rows.size:
                at = x1 + (rows + 0.5 - y1) * (x2 - x1) / (y2 - y1)
                np.add.at(crossings, (rows, np.clip(np.ceil(at - 0.5), 0, width).astype(int)), 1)
        mask |= crossings.cumsum(axis=1)[:, :width] % 2 == 1
    return mask


def segmentation_size(segmentation: Mapping[str, Any]) -> Iterable[int]:
    """Height and width of a segmentation; ClipError if they are missing."""
    try:
        height, width = (int(side) for side in segmentation["size"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClipError(BAD_MASK, error=f"no size: {type(error).__name__}") from error
    return height, width
