"""Text in any script, drawn with Pillow, whose own font knows ASCII and hardly more.

Other texts are drawn in DejaVu Sans (in matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew), so that they stay in one
piece and libraqm can order them; and what that lacks in the first of the Noto fonts that has it (manimgx-fonts: emoji,
scripts of Asia and Africa; manimgx-fonts-cjk: Chinese, Japanese, Korean). Always these, never the system's, so that the
same dataset gives the same pictures everywhere.
"""

import importlib.util
import unicodedata
from functools import cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

# What holds them, and where in it.
FONTS = (
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    ("manimgx_fonts", "*.ttf"),
    ("manimgx_fonts_cjk", "*.ttc"),
)
SIMPLIFIED_CHINESE = 2  # its place in the collection of CJK fonts: how characters look that several languages share
REGULAR = 400


@cache
def _files() -> tuple[Path, ...]:
    files: list[Path] = []
    for package, pattern in FONTS:
        found = importlib.util.find_spec(package)  # finds, and doesn't load: matplotlib takes a while
        if found and found.origin:
            files += sorted(Path(found.origin).parent.glob(pattern))
    return tuple(files)


@cache
def _characters(file: Path) -> frozenset[int]:
    from fontTools.ttLib import TTFont

    with TTFont(file, lazy=True, fontNumber=SIMPLIFIED_CHINESE if file.suffix == ".ttc" else -1) as font:
        return frozenset(font.getBestCmap())


@cache
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    if file.suffix != ".ttc":
        return ImageFont.truetype(file, size)
    font = ImageFont.truetype(file, size, index=SIMPLIFIED_CHINESE)
    font.set_variation_by_axes([REGULAR])  # else it is as thin as can be
    return font


@cache
def _own_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


@cache
def _file_of(character: str) -> Path:
    return next((file for file in _files() if ord(character) in _characters(file)), _files()[0])


def joins(character: str) -> bool:
    """True for what belongs to the character before it: accents, vowel signs, joiners, the colour of a hand."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or "\U0001f3fb" <= character <= "\U0001f3ff"


def _pieces(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in parts of one font each, from left to right."""
    text = text.replace("\n", " ")  # Pillow would begin a line
    if text.isascii() or not _files():
        return [(_own_font(size), text)]
    pieces: list[tuple[Path, str]] = []
    for character in text:
        file = pieces[-1][0] if pieces and joins(character) else _file_of(character)
        if pieces and pieces[-1][0] == file:
            pieces[-1] = (file, pieces[-1][1] + character)
        else:
            pieces.append((file, character))
    strong = (kind for kind in map(unicodedata.bidirectional, text) if kind in ("L", "R", "AL"))
    if next(strong, "L") != "L":  # a line that begins with Arabic or Hebrew goes from right to left
        pieces.reverse()
    return [(_font(file, size), part) for file, part in pieces]


def text_width(text: str, size: int) -> float:
    """Pixels of one line of text. size: of the font, pixels."""
    return sum(font.getlength(part) for font, part in _pieces(text, size))


def text_box(place: tuple[float, float], text: str, size: int) -> tuple[float, float, float, float]:
    """The box in pixels that ``draw_text`` fills: left, top, right, bottom."""
    x, baseline = place[0], place[1] + _own_font(size).getmetrics()[0]
    boxes = []
    for font, part in _pieces(text, size):
        left, top, right, bottom = font.getbbox(part, anchor="ls")
        boxes.append((x + left, baseline + top, x + right, baseline + bottom))
        x += font.getlength(part)
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def draw_text(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: tuple[int, int, int]
) -> None:
    """Draws one line of text. place: its left upper corner. size: of the font, pixels. fill: RGB."""
    x, baseline = place[0], place[1] + _own_font(size).getmetrics()[0]
    for font, part in _pieces(text, size):
        draw.text((x, baseline), part, font=font, fill=fill, anchor="ls")
        x += font.getlength(part)
