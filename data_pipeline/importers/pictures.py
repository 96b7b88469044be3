"""Opens the pictures and masks of an item, and refuses what would not be what it seems."""

import hashlib
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from data_pipeline.errors import ClipError
from data_pipeline.file_names import is_file
from data_pipeline.pairs_format import MOST_SIDE
from data_pipeline.picture_formats import open_listed, upright_turn
from data_pipeline.records import AnnotatedObject, Box

MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"})
"""Modes that become RGB without a loss; those of 16 and 32 bits would be cut."""
EXIF = ("refuse", "apply", "ignore")
BAD_PICTURE = "unreadable picture"
TRANSPARENT = "picture with transparency"
BAD_MASK = "unreadable mask"
BAD_BOX = "unreadable box"
MASK_VALUES = "mask with other values than 0 and 1, or 0 and 255"
TOLERANCE = 1.0
"""Pixels by which rounding may put an edge of a box outside its picture."""


@dataclass(frozen=True, eq=False)
class Picture:
    """An opened picture. pixels: uint8 (height, width, 3). sha256: of the file."""

    name: str
    pixels: np.ndarray
    sha256: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def open_picture(path: Path, name: str, max_pixels: int, exif: str) -> Picture:
    """Reads a picture as sRGB.

    name: for the messages. exif: what to do with a picture that asks to be turned: "refuse" it, "apply" the turn (its
    boxes are those of the upright picture), or "ignore" it (they are those of the stored one). An embedded colour
    profile is applied. ClipError for a file that is missing, damaged, larger than ``max_pixels``, transparent, moving,
    or of more than 8 bits.
    """
    if not is_file(path):
        raise ClipError("no such picture", picture=name)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ClipError(BAD_PICTURE, picture=name, error=error.strerror or str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures, which are refused below, and of odd EXIF data
            picture = open_listed(io.BytesIO(content))
            _check_header(picture, name, max_pixels)
            picture.load()
            turn = upright_turn(picture)
            if turn is not None and exif == "refuse":
                raise ClipError(
                    "picture with a rotation in its EXIF data", picture=name, choose="--exif apply or ignore"
                )
            if turn is not None and exif == "apply":
                picture = picture.transpose(turn)
            pixels = np.asarray(_to_srgb(picture, name))
    except ClipError:
        raise
    except Exception as error:  # decoders raise many things at broken files
        raise ClipError(BAD_PICTURE, picture=name, error=f"{type(error).__name__}: {error}") from error
    return Picture(name, pixels, hashlib.sha256(content).hexdigest())


def _check_header(picture: Image.Image, name: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels or max(width, height) > MOST_SIDE:
        limits = {"max_pixels": max_pixels, "max_side": MOST_SIDE}
        raise ClipError("picture too large", picture=name, size=[width, height], **limits)
    if picture.mode not in MODES:
        raise ClipError("picture of more than 8 bits per channel", picture=name, mode=picture.mode)
    # The second picture of an MPO file is a preview or another eye's view.
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise ClipError("picture with several frames", picture=name, frames=picture.n_frames)


def _to_srgb(picture: Image.Image, name: str) -> Image.Image:
    if "A" in picture.getbands() or "transparency" in picture.info:
        if picture.convert("RGBA").getchannel("A").getextrema()[0] < 255:
            raise ClipError(TRANSPARENT, picture=name, needed="an opaque picture, and a mask for it")
        picture = picture.convert("RGB")
    profile = picture.info.get("icc_profile")
    if profile:
        try:
            space = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if picture.mode in ("P", "1"):
                picture = picture.convert("RGB")
            return ImageCms.profileToProfile(picture, space, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            raise ClipError("unusable colour profile", picture=name, error=str(error)) from error
    return picture.convert("RGB")


# -------------------------------------------------------------------------------------------------------------- boxes


def to_box(values: Any, size: tuple[int, int], normalised: bool, where: Mapping[str, Any]) -> tuple[Box, bool]:
    """A box of a source -> (fractions of its picture, whether it was cut at the edge).

    values: xyxy in pixels of the picture of ``size`` (width, height), or fractions of it. where: goes into the
    evidence. A box may reach over the edge by a pixel, which rounding does, and is cut there. ClipError for anything
    that is not a box inside the picture.
    """
    if isinstance(values, list | tuple) and len(values) == 4:
        numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    else:
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ClipError(BAD_BOX, **where, box=repr(values)[:200], needed="four numbers, x1 y1 x2 y2")
    width, height = size
    if normalised:
        if max(map(abs, numbers)) > 2:  # what reaches over the edge by more than its size is no rounding
            raise ClipError("box in pixels where fractions are expected", **where, box=numbers, choose="--boxes pixels")
        numbers = [number * side for number, side in zip(numbers, (width, height) * 2, strict=True)]
    elif all(0 <= number <= 1 for number in numbers):
        raise ClipError("box in fractions where pixels are expected", **where, box=numbers, choose="--boxes normalised")
    x1, y1, x2, y2 = numbers
    evidence = {**where, "box": [round(number, 3) for number in numbers], "picture": [width, height]}
    if min(x1, y1) < -TOLERANCE or x2 > width + TOLERANCE or y2 > height + TOLERANCE:
        raise ClipError("box beyond its picture", **evidence)
    inside = max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)
    if min(inside[2] - inside[0], inside[3] - inside[1]) < 1 - 1e-6:
        raise ClipError("box smaller than a pixel", **evidence, needed="x1 < x2 and y1 < y2")
    box = inside[0] / width, inside[1] / height, inside[2] / width, inside[3] / height
    # Less than one part in a million is what multiplying by the size and dividing again may add.
    return box, any(abs(a - b) > 1e-6 * max(size) for a, b in zip(inside, numbers, strict=True))


# -------------------------------------------------------------------------------------------------------------- masks


def read_mask(mask: Any, path: Path | None, size: tuple[int, int], threshold: int | None) -> np.ndarray:
    """A mask of a source as bool (height, width).

    mask: run lengths (COCO's, compressed or not) or polygons as a mapping, nested lists of rows, or the name of a
    picture or .npy file. path: of that file. size: width and height of the picture that it belongs to. threshold:
    values from it on are inside; None asks for a mask of only 0 and 1 (or false and true), or only 0 and 255.
    ClipError for what is not such a mask.
    """
    width, height = size
    if isinstance(mask, Mapping):
        from data_pipeline.models import annotations

        found = annotations.read_mask(
            AnnotatedObject(object_id=None, name="", box=(0, 0, 1, 1), mask_rle=mask), width, height
        )
        return np.asarray(found)
    if path is not None:
        values = _read_array(path, size) if path.suffix.lower() == ".npy" else _read_mask_picture(path, size)
    else:
        try:
            values = np.asarray(mask)
        except ValueError as error:
            raise ClipError(BAD_MASK, error="rows of different lengths") from error
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    _check_shape(values.shape, size)
    if values.dtype == bool:
        return values
    if values.dtype.kind not in "iuf":
        raise ClipError(BAD_MASK, error=f"values of the type {values.dtype}, needed are numbers")
    if threshold is not None:
        return values >= threshold
    ones = values == 1
    if not (ones | (values == 0)).all():
        ones = values == 255
        if not (ones | (values == 0)).all():
            some = [float(value) for value in np.unique(values)[:8]]
            raise ClipError(MASK_VALUES, values=some, choose="--mask-threshold")
    return ones


def _check_shape(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if shape != (size[1], size[0]):
        raise ClipError("mask of another size than its picture", mask=list(shape), picture=[size[1], size[0]])


def _read_array(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped, so that its shape is seen first
    except (OSError, ValueError, EOFError) as error:
        raise ClipError(BAD_MASK, file=path.name, error=str(error)) from error
    if not isinstance(array, np.ndarray):
        raise ClipError(BAD_MASK, file=path.name, error="an archive of arrays, needed is one array")
    _check_shape(array.shape[:2], size)
    return np.array(array)


def _read_mask_picture(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = open_listed(path)
            _check_shape(picture.size[::-1], size)  # before anything of that size is made
            values = np.asarray(picture)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ClipError(BAD_MASK, file=path.name, error=f"{type(error).__name__}: {error}") from error
    if values.ndim == 3:
        if not (values == values[..., :1]).all():
            raise ClipError(BAD_MASK, file=path.name, error="a coloured picture, needed is a grey one")
        values = values[..., 0]  # a grey picture stored in colour
    return values
