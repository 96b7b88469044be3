"""Which formats of pictures are opened: the one place where Pillow is given a file.

Pillow knows dozens, and some of those run other programs to open a file. What a name says counts for nothing.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
_KNOWN = [name for name in FORMATS if name != "AVIF" or find_spec("PIL.AvifImagePlugin")]
"""Pillow before 11.3 reads no AVIF, and raises a KeyError if it is asked to."""
NOT_LISTED = "it is in none of the formats that are read: JPEG, PNG, WebP, AVIF, GIF, BMP and TIFF"


def open_listed(source: str | Path | IO[bytes]) -> Image.Image:
    """A picture whose header was read, and no pixel yet.

    UnidentifiedImageError for a file of another format; OSError if it cannot be read; at broken headers Pillow raises
    many things.
    """
    try:
        return Image.open(source, formats=_KNOWN)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(NOT_LISTED) from error


ORIENTATION = 0x0112
"""EXIF tag that says how a camera was held."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Its values, and what turns the picture upright."""


def upright_turn(picture: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright; None for nothing, also where its EXIF data are damaged: the pixels are well.

    Not Pillow's own exif_transpose, which writes the data anew and fails at damaged ones.
    """
    try:
        orientation = picture.getexif().get(ORIENTATION)
    except Exception:  # of damaged data there are many kinds
        return None
    return TURNS.get(orientation) if isinstance(orientation, int) else None
