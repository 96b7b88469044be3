"""Layouts made visible: boxes, masks and attention maps over a picture. PIL and numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from msdiffusion.errors import LayoutError

COLORS = (
    (230, 60, 60), (50, 110, 255), (250, 190, 20), (30, 170, 90), (170, 80, 220), (255, 120, 30), (20, 180, 190),
    (240, 90, 170),
)  # fmt: skip
"""RGB of the subjects, in order, and again from the start."""
STRENGTH = 0.65
"""Opacity of a map where it is 1."""


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
        color = COLORS[index % len(COLORS)]
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
        color = Image.new("RGB", canvas.size, COLORS[index % len(COLORS)])
        canvas = Image.composite(color, canvas, opacity.resize(canvas.size, Image.Resampling.BILINEAR))
    return canvas
