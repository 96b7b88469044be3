"""Black bars that were encoded into a picture: above and below (letterbox), at the sides (pillarbox), or both."""

import functools
from collections.abc import Sequence

import numpy as np

Bars = tuple[int, int, int, int]
"""Width of the bars in pixels: left, top, right, bottom."""

# A bar is nowhere brighter than this, 0 to 255: black is 0, and encoders add some noise.
BLACK = 28
# The line next to a bar is brighter than that by this much, in this share of its pixels: a night sky has no such edge.
EDGE, EDGE_SHARE = 16, 0.5
# Of a side at most; more is a dark picture with something bright in it.
MOST = 0.4


def _brightest(pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """The largest value of each pixel in any picture and channel, uint8 (height, width)."""
    return functools.reduce(np.maximum, pictures).max(axis=-1)


def _lines(seen: np.ndarray) -> tuple[int, int]:
    """Black lines at the top and at the bottom of a picture of what was seen; 0 where it is not a bar."""
    black = seen.max(axis=1) <= BLACK
    if black.all():
        return 0, 0
    found = []
    for lines, dark in ((seen, black), (seen[::-1], black[::-1])):
        width = int(np.argmin(dark))
        # The second line behind the edge: the first one is often half of the bar.
        inside = lines[min(width + 1, len(lines) - 1)]
        is_bar = width <= MOST * len(lines) and (inside > BLACK + EDGE).mean() >= EDGE_SHARE
        found.append(width if is_bar else 0)
    return found[0], found[1]


def find_bars(pictures: Sequence[np.ndarray] | np.ndarray) -> Bars:
    """Bars that are black in all of these pictures, uint8 RGB (height, width, 3) each, of one size."""
    seen = _brightest(pictures)
    top, bottom = _lines(seen)
    left, right = _lines(seen[top : len(seen) - bottom].T)
    return left, top, right, bottom


def may_have_bars(thumbnails: np.ndarray) -> bool:
    """Whether small pictures of all frames, uint8 (frames, size, size, 3), have a black line at one of their edges:
    what find_bars is worth trying for. Bars that are thinner than such a line are not looked for.
    """
    edges = (thumbnails[:, 0], thumbnails[:, -1], thumbnails[:, :, 0], thumbnails[:, :, -1])
    return any(edge.max() <= BLACK for edge in edges)
