"""Measures of single pictures: sharpness, brightness, clipping, and the change between two."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# Longer side of the picture that is measured: what CLIP's image encoders see of a reference.
SIDE = 224
# Distance of the pixels that are compared: of neighbours the rounding and the blocks of a codec would count as edges.
STEP = 2
# Contrasts below this many grey levels count as this much: else the noise of a plain wall would be its sharpness.
LEAST_CONTRAST = 40.0
# Side of the picture that change is measured on: camera noise averages out.
CHANGE_SIDE = 32
# Grey levels that count as clipped at either end; video codecs shift them by a few.
CLIPPED_LEVELS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Looks:
    """What was measured on one picture."""

    sharpness: float
    """How abrupt the strongest edges are, from 0 to about 2: see ``sharpness``."""
    brightness: float
    """Mean grey level, 0 (black) to 1 (white)."""
    small: np.ndarray
    """float32 (CHANGE_SIDE, CHANGE_SIDE, 3) in [0, 1], for ``change``."""


def look_at(picture: np.ndarray) -> Looks:
    """Measures a picture, uint8 RGB (height, width, 3), shrunk to ``SIDE`` pixels first."""
    image = _at_side(picture)
    levels = np.asarray(image.convert("L"))
    small = image.resize((CHANGE_SIDE, CHANGE_SIDE), Image.Resampling.BOX)
    return Looks(
        sharpness=_edges(levels),
        brightness=float(levels.mean(dtype=np.float32) / 255),
        small=np.asarray(small, dtype=np.float32) / 255,
    )


def sharpness(picture: np.ndarray) -> float:
    """The 99th percentile of the absolute second difference of the grey levels (of pixels ``STEP`` apart), over their
    contrast (99th less 1st percentile); of the two directions, across and down, the lower one, since motion blurs one
    of them only.

    picture: uint8 RGB (height, width, 3), shrunk to ``SIDE`` pixels on its longer side first and never enlarged; with
    fewer than 5 pixels on one side the answer is 0. The measure of an edge falls with the square of the width of its
    blur, whatever the edge divides, so a plain surface with a clear outline is sharp.
    """
    return _edges(np.asarray(_at_side(picture).convert("L")))


def _at_side(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    scale = SIDE / max(image.size)
    if scale >= 1:
        return image
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BOX)


def _edges(levels: np.ndarray) -> float:
    if min(levels.shape) < 2 * STEP + 1:
        return 0.0
    low, high = percentiles(levels, (1, 99))
    levels = levels.astype(np.int16)
    middle = slice(STEP, -STEP)
    across = np.abs(levels[:, 2 * STEP :] + levels[:, : -2 * STEP] - 2 * levels[:, middle])
    down = np.abs(levels[2 * STEP :] + levels[: -2 * STEP] - 2 * levels[middle])
    edges = min(*percentiles(across, (99,), np.float32), *percentiles(down, (99,), np.float32))
    return float(edges / max(high - low, LEAST_CONTRAST))


def percentiles(values: np.ndarray, ranks: tuple[float, ...], kind: type[np.floating] = np.float64) -> list[Any]:
    """Those of np.percentile (linear interpolation) bit for bit, in a fraction of its time: small whole numbers are
    counted instead of sorted.

    values: integers, none negative. kind: of the numbers that are interpolated, and of the answers.
    """
    up_to = np.cumsum(np.bincount(values.ravel()))
    found = []
    for rank in ranks:
        place = (values.size - 1) * (rank / 100)
        before = int(place)
        low, high = map(kind, np.searchsorted(up_to, (before, min(before + 1, values.size - 1)), side="right"))
        part = place - before
        found.append(low + (high - low) * kind(part) if part < 0.5 else high - (high - low) * kind(1 - part))
    return found


def clipped_share(pixels: np.ndarray) -> float:
    """Share of pixels whose three channels are all black or all white, within ``CLIPPED_LEVELS``: they show no surface.

    pixels: uint8 RGB (pixels, 3); 0 for none.
    """
    if len(pixels) == 0:
        return 0.0
    black, white = pixels.max(axis=1) <= CLIPPED_LEVELS, pixels.min(axis=1) >= 255 - CLIPPED_LEVELS
    return float((black | white).mean())


def change(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference, 0 to 1, of the ``small`` of two pictures, over the tenth of their pixels that changed
    most: behind a small subject that moves the picture may stand still.
    """
    moved = np.abs(first - second).mean(axis=-1).ravel()
    most = max(1, moved.size // 10)
    return float(np.partition(moved, -most)[-most:].mean())
