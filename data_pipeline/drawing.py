"""Pictures for the report: frames with their boxes and masks, cut-outs, contact sheets. Pillow and numpy only."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.lettering import draw_text, joins, text_box, text_width
from data_pipeline.records import Box, DetectedPair, FramePair, NamedPair, TrainingPair, box_in_pixels

HEIGHT = 168
# Of a picture, in its heights: of a strip one pixel high, a drawing would take gigabytes.
WIDEST = 32
# Of letters, in pixels.
PHRASE_SIZE, TEXT_SIZE, HEADING_SIZE = 11, 12, 16
# Of text under a picture, at most.
LINES = 5
COLOURS = ((230, 57, 70), (29, 120, 220), (42, 157, 76), (244, 162, 30), (145, 70, 200), (0, 170, 170), (120, 85, 60))
Drawn = tuple[str, Box, np.ndarray | None]
"""A phrase, its box, and its bool (height, width) mask if there is one."""
Tile = tuple[Image.Image, str]
"""A picture and the text under it."""


def draw_frame(image: np.ndarray, subjects: Sequence[Drawn], height: int = HEIGHT) -> Image.Image:
    """The frame at this height, masks tinted, boxes and phrases in one colour per subject. image: uint8 (h, w, 3)."""
    pixels = image.astype(np.float32)
    for number, (_, _, mask) in enumerate(subjects):
        if mask is not None:
            pixels[mask] = 0.6 * pixels[mask] + 0.4 * np.asarray(COLOURS[number % len(COLOURS)], dtype=np.float32)
    width = min(max(1, round(image.shape[1] * height / image.shape[0])), WIDEST * height)
    picture = Image.fromarray(pixels.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for number, (phrase, box, _) in enumerate(subjects):
        colour = COLOURS[number % len(COLOURS)]
        x1, y1, x2, y2 = box_in_pixels(box, width, height)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        place = (x1 + 3, min(max(0, y1 + 1), height - 14))
        draw.rectangle(text_box(place, phrase, PHRASE_SIZE), fill=colour)
        draw_text(draw, place, phrase, PHRASE_SIZE, (255, 255, 255))
    return picture


def draw_cut_out(cutout: Image.Image, height: int) -> Image.Image:
    """An RGBA cut-out, fitted into a square of the given side, on a checkerboard."""
    squares = (np.indices((height, height)) // 8).sum(axis=0) % 2
    board = Image.fromarray((205 + 30 * squares).astype(np.uint8)).convert("RGB")
    scale = (height - 4) / max(cutout.size)
    size = tuple(max(1, round(side * scale)) for side in cutout.size)
    small = cutout.resize(size, Image.Resampling.BICUBIC)
    board.paste(small, ((height - size[0]) // 2, (height - size[1]) // 2), small)
    return board


def beside(pictures: Sequence[Image.Image], gap: int = 3) -> Image.Image:
    """Pictures of one height, side by side on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        row.paste(picture, (x, 0))
        x += picture.width + gap
    return row


def contact_sheet(tiles: Sequence[Tile | str], width: int = 1500) -> Image.Image:
    """Tiles, a few lines of text under each, in rows that fit the width. A string is a heading for what follows."""
    gap, line = 10, 15
    placed: list[tuple[Image.Image, list[str], int, int]] = []
    headings: list[tuple[str, int]] = []
    x, y, row_height = gap, gap, 0
    for tile in tiles:
        if isinstance(tile, str):
            y += row_height + gap if row_height else 0
            headings.append((_wrapped(tile, HEADING_SIZE, width - 2 * gap, most=1)[0], y))
            x, y, row_height = gap, y + 24, 0
            continue
        picture, text = tile
        if picture.width > width - 2 * gap:
            picture = picture.resize((width - 2 * gap, max(1, picture.height * (width - 2 * gap) // picture.width)))
        lines = _wrapped(text, TEXT_SIZE, max(picture.width, 160))
        tile_width, tile_height = max(picture.width, 160), picture.height + line * len(lines) + 4
        if x > gap and x + tile_width > width - gap:
            x, y, row_height = gap, y + row_height + gap, 0
        placed.append((picture, lines, x, y))
        x, row_height = x + tile_width + gap, max(row_height, tile_height)
    sheet = Image.new("RGB", (width, y + row_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for words, top in headings:
        draw_text(draw, (gap, top), words, HEADING_SIZE, (0, 0, 0))
    for picture, lines, left, top in placed:
        sheet.paste(picture, (left, top))
        for number, words in enumerate(lines):
            draw_text(draw, (left, top + picture.height + 2 + line * number), words, TEXT_SIZE, (30, 30, 30))
    return sheet


def _wrapped(text: str, size: int, width: int, most: int = LINES) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if _fits(longer, size, width):
                lines[-1] = longer
                continue
            if lines[-1]:
                lines.append("")
            while len(lines) <= most and not _fits(word, size, width):  # a path, or a language without spaces
                fits = _fitting(word[: width + 1], size, width)
                if fits == len(word):
                    break
                lines[-1:] = [word[:fits], ""]
                word = word[fits:]
            lines[-1] = word
            if len(lines) > most:
                break
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} ..."]


def _fits(text: str, size: int, width: int) -> bool:
    # No letter is narrower than a pixel, so that long texts need no measuring.
    return len(text) <= width and text_width(text, size) <= width


def _fitting(word: str, size: int, width: int) -> int:
    """How many characters of a word fit into the width, one at least; what belongs together stays together."""
    ends = [n for n in range(1, len(word) + 1) if n == len(word) or not (joins(word[n]) or word[n - 1] == "\u200d")]
    place = bisect_right(ends, width, key=lambda end: text_width(word[:end], size))
    return ends[max(0, place - 1)]


def draw_preview(record: Any) -> bytes:
    """Both frames of a record as a JPEG, with whatever has been found in them; no bytes if nothing was decoded yet."""
    if not isinstance(record, FramePair | NamedPair | DetectedPair | TrainingPair):
        return b""
    frames, subjects = getattr(record, "frames", record), ((), ())
    if isinstance(record, DetectedPair):
        subjects = (record.reference, record.target)
    elif isinstance(record, TrainingPair):
        subjects = ([match.reference for match in record.matches], [match.target for match in record.matches])
    pictures = [
        draw_frame(frame.image, [(found.entity.phrase, found.box, found.mask) for found in detections])
        for frame, detections in zip((frames.reference, frames.target), subjects, strict=True)
    ]
    buffer = io.BytesIO()
    beside(pictures).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
