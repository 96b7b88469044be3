"""Pictures for people: layouts drawn over them, cells of grids, texts, and one table of colours. PIL and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from msdiffusion.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

COLORS = (
    (230, 60, 60), (50, 110, 255), (250, 190, 20), (30, 170, 90), (170, 80, 220), (255, 120, 30), (20, 180, 190),
    (240, 90, 170),
)  # fmt: skip
"""RGB of the subjects, in order, and again from the start."""
INK, PAPER = "#22262e", "#ffffff"
LINE_HEIGHT = 19
"""Of texts, in pixels."""
GAP = 4
"""Pixels between the cells of a grid."""
STRENGTH = 0.65
"""Opacity of a map where it is 1."""


def color_of(subject: int) -> tuple[int, int, int]:
    """The colour of the first (0), second, ... subject of a picture."""
    return COLORS[subject % len(COLORS)]


def draw_layout(
    picture: Image.Image,
    *,
    boxes: Sequence[Sequence[float] | None] = (),
    maps: Any = None,
    phrases: Sequence[str] = (),
    side: int = 256,
) -> Image.Image:
    """The picture with each subject's box and map in the subject's colour.

    Args:
        picture: any size.
        boxes: per subject normalised xyxy, or None.
        maps: (subjects, rows, columns) in [0, 1], bool or floating, array or CPU tensor: masks, or what
            ``GenerationResult.layout_maps`` holds for one picture. None: no maps.
        phrases: per subject a name, written into its box or, without one, in a row above.
        side: least length in pixels of the result's shorter side; small pictures are enlarged.

    Returns:
        RGB.

    Raises:
        LayoutError: the maps have another shape, or leave [0, 1].
    """
    factor = max(1, -(-side // min(picture.size)))
    canvas = picture.convert("RGB").resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST if factor > 1 else None
    )
    if maps is not None:
        canvas = _paint_maps(canvas, np.asarray(maps, dtype=np.float32))
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    free_row = 2
    for index in range(max(len(boxes), len(phrases))):
        box = boxes[index] if index < len(boxes) else None
        color = color_of(index)
        corner = (4, free_row)
        if box is None:
            free_row += 12
        else:
            x1, y1, x2, y2 = (round(value * size) for value, size in zip(box, (width, height) * 2, strict=True))
            draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=max(2, factor // 2))
            corner = (x1 + 4, y1 + 2)
        if index < len(phrases):
            draw.text(corner, phrases[index], fill=color, stroke_width=1, stroke_fill="white")
    return canvas


def _paint_maps(canvas: Image.Image, maps: np.ndarray) -> Image.Image:
    if maps.ndim != 3:
        raise LayoutError(f"maps must be (subjects, rows, columns), got {maps.shape}")
    if maps.size and not (maps.min() >= 0 and maps.max() <= 1):
        raise LayoutError(f"maps must be in [0, 1], got values from {maps.min():g} to {maps.max():g}")
    for index, values in enumerate(maps):
        opacity = Image.fromarray((values * STRENGTH * 255).astype(np.uint8))
        color = Image.new("RGB", canvas.size, color_of(index))
        canvas = Image.composite(color, canvas, opacity.resize(canvas.size, Image.Resampling.BILINEAR))
    return canvas


def outline(picture: Image.Image, boxes: Sequence[Sequence[Any]], width: int = 1) -> None:
    """Draw boxes (normalised xyxy) onto a picture, each in the colour of its subject, with lines of `width` pixels."""
    draw = ImageDraw.Draw(picture)
    for index, box in enumerate(boxes):
        corners = [float(edge) * (length - 1) for edge, length in zip(box, picture.size * 2, strict=True)]
        draw.rectangle(corners, outline=color_of(index), width=width)


def draw_boxes(boxes: Sequence[Sequence[float]], phrases: Sequence[str], side: int) -> Image.Image:
    """A layout on an empty RGB sheet of `side` pixels: each box (normalised xyxy) in its colour with its phrase."""
    sheet = Image.new("RGB", (side, side), "#f1f3f6")
    draw = ImageDraw.Draw(sheet, "RGBA")
    for index, (box, phrase) in enumerate(zip(boxes, phrases, strict=True)):
        color = color_of(index)
        corners = [edge * (side - 1) for edge in box]
        draw.rectangle(corners, fill=(*color, 0x30), outline=color, width=3)
        draw.text((corners[0] + 6, corners[1] + 4), phrase, fill=color, font=ImageFont.load_default(14))
    return sheet


def arrange(rows: Sequence[Sequence[Image.Image | None]], side: int) -> Image.Image:
    """Square cells in rows on white, ``GAP`` pixels apart; None leaves a place empty."""
    width = max(len(row) for row in rows) * (side + GAP) + GAP
    grid = Image.new("RGB", (width, len(rows) * (side + GAP) + GAP), PAPER)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            if cell is not None:
                grid.paste(cell, (GAP + x * (side + GAP), GAP + y * (side + GAP)))
    return grid


def reference_cell(picture: Image.Image, side: int, background: tuple[int, int, int], slot: int) -> Image.Image:
    """A cut-out on its background, framed in the colour of its subject."""
    cell = Image.new("RGB", (side, side), background)
    fitted = picture.resize(_inside(picture.size, side - 8), Image.Resampling.BICUBIC)
    cell.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2), fitted)
    ImageDraw.Draw(cell).rectangle((0, 0, side - 1, side - 1), outline=color_of(slot), width=2)
    return cell


def picture_cell(picture: Image.Image, side: int, boxes: Sequence[Any] = ()) -> Image.Image:
    """A picture, whole and in its own proportions, with boxes (normalised xyxy) in the colours of their subjects."""
    fitted = picture.resize(_inside(picture.size, side), Image.Resampling.BICUBIC)
    outline(fitted, boxes, width=2)
    if fitted.size == (side, side):
        return fitted
    cell = Image.new("RGB", (side, side), PAPER)
    cell.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return cell


def _inside(size: tuple[int, int], side: int) -> tuple[int, int]:
    factor = side / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def as_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W) floats in [-1, 1] -> RGB picture."""
    scaled = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(scaled.permute(1, 2, 0).numpy())


def enlarge(picture: Image.Image, side: int) -> Image.Image:
    """A picture at `side` pixels: small ones keep crisp pixels at whole multiples, others are resampled."""
    crisp = side % picture.width == 0 and picture.width == picture.height
    return picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST if crisp else Image.Resampling.LANCZOS)


def text_block(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int, *, size: int) -> None:
    """Text broken into lines of at most `width` pixels."""
    font, line = ImageFont.load_default(size), ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font=font) > width:
            draw.text((left, top), line, fill=INK, font=font)
            top, line = top + LINE_HEIGHT, word
        else:
            line = longer
    draw.text((left, top), line, fill=INK, font=font)
