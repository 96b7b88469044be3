"""Masks in annotation files: COCO's compressed run lengths, polygons, pictures of object numbers, and DAVIS, which has
nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.errors import ClipError, InputError
from data_pipeline.models.annotation_formats import BAD, Entry, Found, first_number, frame_number, guarded
from data_pipeline.pairs_format import MOST_PIXELS
from data_pipeline.texts import read_csv

BAD_MASK = "unreadable mask in the annotations"
FARTHEST = 1e9
"""A corner of a polygon beyond that is a mistake, and its edges cannot be computed."""
MOST_POLYGONS = 1_000
"""Of one object: each is drawn over the whole frame."""
VOID = 255
"""DAVIS: pixels that belong to nothing for certain; the one object, where there is nothing else (DAVIS 2016)."""


def read_davis(names: Mapping[str, Mapping[str, str | None]], folder: Path) -> dict[str, Entry]:
    """DAVIS: for each clip a folder of pictures 00000.png ... whose pixels are object numbers, 0 for the background and
    255 for nothing. DAVIS has no names, so ``names`` gives them: clip -> number -> name, null to leave an object out.
    Numbers are tracks. Where a clip's pictures hold 0 and 255 only (DAVIS 2016), 255 is its one object.
    """

    def entry(video: str, named: Mapping[str, str | None]) -> Entry:
        def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
            known = {int(number): name for number, name in named.items()}
            by_number: dict[int, Path] = {}
            for picture in _mask_pictures(folder, video):
                index = frame_number(picture.name)
                if index in by_number:
                    raise ClipError(BAD, error=f"two pictures for frame {index} in the folder {video}")
                by_number[index] = picture
            numbers = {index: set(np.unique(read_numbers(file)).tolist()) - {0} for index, file in by_number.items()}
            pixels = dict(zip(known, known, strict=True))  # object -> what its pixels hold
            if VOID not in known:
                if set.union(*numbers.values()) == {VOID}:
                    if len(known) != 1:
                        raise ClipError(
                            BAD,
                            error=f"the masks of {video} hold 0 and 255 only, one object as in DAVIS 2016, but there "
                            f"are names for the objects {sorted(known)[:20]}: give one name",
                        )
                    pixels = dict.fromkeys(known, VOID)
                else:
                    numbers = {index: found - {VOID} for index, found in numbers.items()}
            result: dict[int, list[Found]] = {}
            first = first_number(by_number, num_frames)
            for index, picture in sorted(by_number.items()):
                strange = sorted(numbers[index] - set(pixels.values()))
                if strange:
                    raise ClipError(BAD, error=f"{video}/{picture.name}: no names for the objects {strange[:20]}")
                result[index - first] = [
                    Found(object_id=number, name=name, box=None, mask_file=(picture, pixels[number]))
                    for number, name in sorted(known.items())
                    if name is not None and pixels[number] in numbers[index]
                ]
            return result

        words = "objects without a name" if None in named.values() else ""
        return Entry(size=None, frames=guarded(frames), left_out=words)

    return {video: entry(video, named) for video, named in names.items()}


def _mask_pictures(folder: Path, video: str) -> list[Path]:
    """The png pictures of a clip; ClipError that says what is there instead."""
    place = next(
        (here for name in (video, str(PurePosixPath(video).with_suffix(""))) if (here := folder / name).is_dir()), None
    )
    if place is None:
        raise ClipError(
            BAD, error=f"no pictures in the folder {video} of the masks: there is no folder {folder / video}"
        )
    files = sorted(file for file in place.iterdir() if file.is_file())
    pictures = [file for file in files if file.suffix.lower() == ".png"]
    if not pictures:
        others = ", ".join(sorted({file.suffix or file.name for file in files})) or "nothing"
        raise ClipError(BAD, error=f"no pictures in the folder {video} of the masks: needed is .png, found {others}")
    return pictures


def read_names_table(path: Path, notes: list[str] | None = None) -> dict[str, dict[str, str | None]]:
    """Names of DAVIS objects, from a csv with the columns video, object, name; an empty name leaves an object out."""
    names: dict[str, dict[str, str | None]] = {}
    for line, row in read_csv(path, ("video", "object", "name"), notes):
        number = row["object"].strip()
        if not number.isdigit():
            raise InputError(f"{path}, line {line}: object must be a number, got {row['object']!r}")
        named = names.setdefault(row["video"], {})
        if number in named:
            raise InputError(f"{path}, line {line}: a second name for object {number} of {row['video']}")
        named[number] = row["name"].strip() or None
    return names


def read_numbers(path: Path) -> np.ndarray:
    """Object numbers of a palette or grey picture (grey in colours too), integers (height, width); else ClipError."""
    from PIL import Image

    from data_pipeline.picture_formats import open_listed

    try:
        with open_listed(path) as picture:
            if picture.width * picture.height > MOST_PIXELS:  # before it is decoded; no video has more
                raise ClipError(BAD_MASK, file=path.name, error="too many pixels", size=list(picture.size))
            mode, numbers = picture.mode, np.asarray(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ClipError(BAD_MASK, file=path.name, error=type(error).__name__) from error
    if mode in ("LA", "RGBA") and (numbers[..., -1] == 255).all():
        numbers = numbers[..., :-1]
    if numbers.ndim == 3 and mode in ("LA", "RGB", "RGBA") and (numbers == numbers[..., :1]).all():
        numbers = numbers[..., 0]
    if numbers.ndim != 2:
        raise ClipError(
            BAD_MASK, file=path.name, error=f"needed is a palette or grey picture of object numbers, found {mode}"
        )
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


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
    if not isinstance(polygons, list) or len(polygons) > MOST_POLYGONS:
        raise ClipError(BAD_MASK, error=f"polygons must be a list of {MOST_POLYGONS} at most")
    for polygon in polygons:
        try:
            points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        except (TypeError, ValueError, OverflowError) as error:
            raise ClipError(BAD_MASK, error="a polygon is a list x, y, x, y, ...") from error
        if len(points) < 3 or not (np.abs(points) < FARTHEST).all():  # nor NaN
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
