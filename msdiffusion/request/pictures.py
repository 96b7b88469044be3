"""Pictures that people bring, from a file or of PIL: read as 8 bits, upright, and as sRGB, or refused in our words."""

from __future__ import annotations

import io
import math
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from data_pipeline.picture_formats import NOT_LISTED, open_listed, upright_turn
from msdiffusion.errors import RequestError, shown, warn_caller

VISIBLE = 4
"""An alpha channel that stays below this of 255 shows nothing: masks of 0 and 1 come so."""
MAX_PIXELS = 110_000_000
"""Of a picture in a file: medium-format cameras have 102 megapixels; more takes above 5 s and 1 GB to read."""
MAX_KEPT_PIXELS = 2**25
"""Of a picture once it is open, 0.1 GB: larger ones are reduced before anything else, and are 2,900 a side still."""
SRGB_TOLERANCE = 2
"""Steps of 255 by which a profile may change colours and still be sRGB under another name."""


class Room:
    """Pixels that several pictures may have together, taken by each before it is decoded."""

    def __init__(self, what: str, pixels: int) -> None:
        """``what``: of the pictures, for the message; ``pixels``: at most."""
        self.what, self.most, self.left = what, pixels, pixels

    def take(self, size: tuple[int, ...], name: str) -> None:
        """Take the pixels of a picture of (width, height), called ``name``; RequestError where so many are not left."""
        self.left -= math.prod(size)
        if self.left < 0:
            raise RequestError(
                f"{name} has {' x '.join(map(str, size))} pixels, with which the {self.what} have more than "
                f"{self.most:,} together, the most that are read: make them smaller; 2048 a side are plenty"
            )


_DECODING = threading.Lock()
"""Taken where warnings are held back, which is done for all threads."""
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def open_reference(image: Any, name: str = "image", room: Room | None = None) -> Image.Image:
    """A reference as sRGB: mode RGB, or RGBA (straight alpha) where it has transparency.

    Args:
        image: a picture of PIL, or the path of one; see ``open_upright``. An embedded colour profile is applied; one
            that cannot be used is warned of, and the colours are taken for sRGB.
        name: what messages call it.
        room: see ``open_upright``.

    Raises:
        RequestError: as open_upright; or it is wholly transparent, or nearly so.
    """
    picture = open_upright(image, name, room)
    colours, alpha = _to_srgb(picture, name), None
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        most = alpha.getextrema()[1]
        if most < VISIBLE:
            found = "wholly transparent" if not most else f"nearly transparent (alpha is {most} of 255 at most)"
            raise RequestError(
                f"{name} is {found}, so nothing of the subject can be seen: give a picture whose alpha channel is 255 "
                "on the subject and 0 round it"
            )
        colours.putalpha(alpha)
    return colours


def open_upright(image: Any, name: str = "image", room: Room | None = None) -> Image.Image:
    """A picture of 8 bits in its own mode and colour space, turned as its EXIF orientation says.

    Grey pictures of 16 bits are scaled from 0-65535, with a warning where they hold 10 or 12 bits at most, those of
    floats from [0, 1]; where either holds values that only 0-255 explains, these are kept. Damaged EXIF data turn
    nothing.

    Args:
        image: a picture of PIL, or the path of one.
        name: what messages call it.
        room: what it shares with other pictures.

    Raises:
        RequestError: no such file, not a picture, damaged, of too many pixels, or of values without a known range.
    """
    if isinstance(image, (str, Path)):
        return _decoded(_existing(image, name), name, f"{name}: {shown(str(image), 300)}", room)
    if not isinstance(image, Image.Image):
        hint = ": PIL.Image.fromarray(array) makes one of an array (rows, columns, 3) uint8"
        raise RequestError(
            f"{name} must be a PIL image or the path of one, got {type(image).__name__}"
            f"{hint if hasattr(image, 'shape') else ''}"
        )
    if 0 in image.size:
        raise RequestError(f"{name} has no pixels: its size is {image.size}")
    return _decoded(image, name, name, room)


def open_content(content: bytes, name: str) -> Image.Image:
    """``open_upright`` of the bytes of a file; ``name`` is what messages call it."""
    return _decoded(io.BytesIO(content), name, name)


def refuse_address(text: str, name: str) -> None:
    """Raise RequestError for https://... and the like, which Path would spoil, and which names no file."""
    if "://" in text[:12]:
        raise RequestError(
            f"{name} is the address {shown(text, 200)}; nothing is downloaded: save the picture, and give its file"
        )


def _existing(image: str | Path, name: str) -> Path:
    if isinstance(image, str):
        refuse_address(image, name)
    path = Path(image)
    try:
        if path.is_dir():
            raise RequestError(f"{name}: {path} is a folder: give the file of one picture")
        if not path.is_file():
            raise RequestError(f"{name}: no such file: {path}")
    except (OSError, ValueError) as error:  # a name that no file can have; RequestError is a ValueError too
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{name}: {shown(str(path), 300)} is not a picture that can be read: {error}") from None
    return path


def _decoded(source: Path | io.BytesIO | Image.Image, name: str, called: str, room: Room | None = None) -> Image.Image:
    """``called``: name and path, for messages about the file itself."""
    notes = list[str]()
    try:
        with _DECODING, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pillow's, of many pixels and of EXIF data that nobody asks for
            with nullcontext(source) if isinstance(source, Image.Image) else open_listed(source) as file:
                if file is not source and math.prod(file.size) > MAX_PIXELS:
                    raise Image.DecompressionBombError
                if room is not None:
                    room.take(file.size, called)
                # telephones put a small second picture into their JPEGs, which is MPO
                if file.format != "MPO" and getattr(file, "is_animated", False) and not file.tell():
                    notes.append(f"{called} holds several pictures, of which the first is taken")
                decoded = _upright(file, name, notes)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise RequestError(
            f"{called} has more than {MAX_PIXELS:,} pixels, the most that are read: make it smaller first; the network "
            "sees some hundred pixels a side, so 2048 are plenty"
        ) from None
    except MemoryError:
        raise RequestError(f"{called} has more pixels than the memory holds: make it smaller first") from None
    except UnidentifiedImageError:
        why = _what_else(source) or NOT_LISTED
        raise RequestError(f"{called} is not a picture that can be read: {why}") from None
    except Exception as error:  # decoders raise many things at broken files
        why = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"{called} is not a picture that can be read: {why[:300]}") from None
    for note in notes:
        warn_caller(note)
    return decoded


def _what_else(source: Any) -> str:
    """What a file is instead of a picture, or ""."""
    try:
        with io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else source.open("rb") as file:
            start = file.read(512)
    except (OSError, AttributeError):
        return ""
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        return "it is HEIC, as telephones write it: export it as JPEG or PNG"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page: save the picture itself, not the page that shows it"
    if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text):
        return "it is a drawing in SVG: export it as PNG"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the picture: git lfs pull fetches that"
    return ""


def _reduced(picture: Image.Image) -> Image.Image:
    """The picture by a whole factor smaller if it is larger than MAX_KEPT_PIXELS; never held twice in full."""
    factor = math.ceil(math.sqrt(math.prod(picture.size) / MAX_KEPT_PIXELS))
    if factor <= 1:
        return picture
    mode = picture.mode
    if mode.startswith("I"):
        mode = "I"
    elif picture.has_transparency_data:
        mode = "RGBA"
    elif mode in ("1", "P"):
        mode = "L" if mode == "1" else "RGB"
    smaller = Image.new(mode, tuple(-(-side // factor) for side in picture.size))
    for top in range(0, picture.height, 256 * factor):
        strip = picture.crop((0, top, picture.width, min(top + 256 * factor, picture.height)))
        smaller.paste(strip.convert(mode).reduce(factor), (0, top // factor))
    smaller.info = {key: value for key, value in picture.info.items() if key != "transparency" or mode != "RGBA"}
    return smaller


def _in_8_bits(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """Pictures of more bits, which are one grey channel, as mode L or LA; PIL would cut off what is above 255."""
    if picture.mode != "F" and not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture)
    low, high = values.min(), values.max()
    top = 1 if picture.mode == "F" and high <= 1 else 255 if high <= 255 else 65535
    unclear = picture.mode == "F" and (top == 65535 or 1 < high <= 2)  # the latter is 0 to 1 after a resize, or black
    if not (low >= 0 and high <= top) or unclear:  # NaN is in no range
        need = "0 to 1" if picture.mode == "F" else "0 to 65535"
        raise RequestError(
            f"{name} is a grey picture with values from {low:g} to {high:g}, so what is black and white in it is not "
            f"known: scale it to {need}, or save it with 8 bits"
        )
    if top == 65535 and high < 4096:
        notes.append(
            f"{name} is a grey picture of 16 bits with values up to {high:g} of 65535, so it is nearly black: if its "
            "camera writes 10 or 12 bits, multiply them by 64 or 16 first"
        )
    scaled = values if top == 255 else values * (255 / top)  # of 0-255 PIL itself cuts off the fractions
    if top != 255:
        np.round(scaled, out=scaled)
    grey = scaled.astype(np.uint8)
    result = Image.fromarray(grey)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    result.info = {key: value for key, value in picture.info.items() if key != "transparency"}
    return result


def _upright(picture: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """In 8 bits, and turned as cameras note it in EXIF or XMP data, of which nothing is kept."""
    picture.load()  # before its EXIF data are asked: TIFF files are turned on loading
    method = upright_turn(picture)
    plain = _in_8_bits(_reduced(picture), name, notes)
    result = plain.copy() if method is None else plain.transpose(method)
    result.info = {key: value for key, value in plain.info.items() if key in ("icc_profile", "transparency")}
    return result


def _to_srgb(picture: Image.Image, name: str) -> Image.Image:
    """The colours as sRGB in mode RGB, without alpha."""
    content = picture.info.get("icc_profile")
    if not content:
        return _as_rgb(picture, name)
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        space = profile.profile.xcolor_space.strip()
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}.get(space)
        plain = picture
        if picture.mode != mode:  # then it is in the mode that a profile speaks of, but for transparency
            plain = picture.convert("L") if picture.mode in ("1", "LA", "La") else _as_rgb(picture, name)
        if plain.mode != mode:
            raise ImageCms.PyCMSError(f"it is of {space}, the picture of {picture.mode}")
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB" and _changes_nothing(transform):
            return plain.convert("RGB")
        result = ImageCms.applyTransform(plain, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        warn_caller(
            f"{name}: its colour profile cannot be used ({shown(str(error), 120)}), so its colours are taken for sRGB"
        )
        return _as_rgb(picture, name)
    result.info.clear()
    return result


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform from RGB to sRGB is none: asked of 17 x 17 x 17 colours."""
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(17, -1, 3)
    found = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform)).astype(int)
    return bool(abs(found - colours).max() <= SRGB_TOLERANCE)


def _as_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Mode RGB by PIL; of transparent pixels their colour."""
    try:
        result = picture.convert("RGBA" if picture.has_transparency_data else "RGB").convert("RGB")
    except ValueError as error:  # LAB without a profile
        raise RequestError(
            f"{name} is of the mode {picture.mode}, which cannot be shown as RGB: save it as RGB"
        ) from error
    result.info.clear()
    return result
