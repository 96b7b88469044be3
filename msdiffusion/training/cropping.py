"""Square crops of training pictures, with the boxes that follow them exactly. Pure numpy.

Boxes are (s, 4) normalised xyxy, s subjects; sizes are (width, height) and corners (top, left), both in pixels.
"""

import numpy as np

# A box that is wholly inside the crop may come back smaller by a rounding of float32.
_ROUNDING = 1e-5


def size_with_short_side(width: int, height: int, resolution: int) -> tuple[int, int]:
    """(width, height) in pixels after a resize that makes the short side exactly ``resolution``, aspect kept."""
    scale = resolution / min(width, height)
    return max(resolution, round(width * scale)), max(resolution, round(height * scale))


def crop_boxes(boxes: np.ndarray, size: tuple[int, int], top_left: tuple[int, int], side: int) -> np.ndarray:
    """Boxes in a square crop of a picture.

    Args:
        boxes: (s, 4) normalised xyxy of the whole picture.
        size: (width, height) of the whole picture in pixels.
        top_left: (top, left) of the crop in pixels.
        side: of the crop in pixels.

    Returns:
        float32 (s, 4) normalised xyxy of the crop, clipped to [0, 1]; a box outside of the crop has no area.
    """
    width, height = size
    top, left = top_left
    scale = np.array([width, height, width, height], dtype=np.float64)
    offset = np.array([left, top, left, top], dtype=np.float64)
    return np.clip((boxes * scale - offset) / side, 0, 1).astype(np.float32)


def visible_shares(boxes: np.ndarray, cropped: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """float64 (s,): the part of each box's area, in [0, 1], that a crop of ``crop_boxes`` has left of it."""
    before = np.prod(boxes[:, 2:].astype(np.float64) - boxes[:, :2], axis=1) * size[0] * size[1]
    after = np.prod(cropped[:, 2:].astype(np.float64) - cropped[:, :2], axis=1) * side * side
    return np.minimum(after / before, 1)


def choose_crop(
    boxes: np.ndarray,
    size: tuple[int, int],
    side: int,
    minimum_visible: float,
    generator: np.random.Generator | None,
) -> tuple[tuple[int, int], np.ndarray]:
    """Where to crop a square, and which subjects are in it.

    A crop that would lose every subject is moved to be about the largest one: a pair without subjects teaches nothing.

    Args:
        boxes: (s, 4) normalised xyxy, s >= 1.
        size: (width, height) of the picture in pixels, neither below ``side``.
        side: of the crop in pixels.
        minimum_visible: a subject of whose box less than this part is left counts as cut away, in [0, 1].
        generator: for a crop anywhere; None for the centre.

    Returns:
        ((top, left) in pixels, int64 indices of the subjects that stay, at least one).
    """
    limits = np.array([size[1] - side, size[0] - side])
    top_left = limits // 2 if generator is None else generator.integers(0, limits + 1)
    kept = _subjects_in_crop(boxes, size, top_left, side, minimum_visible)
    if len(kept) == 0:
        largest = int(np.argmax(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)))
        centre = (boxes[largest, :2] + boxes[largest, 2:])[::-1] / 2 * np.array([size[1], size[0]])
        top_left = np.clip(np.round(centre - side / 2).astype(int), 0, limits)
        # in a very wide picture even the best crop may show less of a subject than asked: it stays all the same
        kept = np.union1d(_subjects_in_crop(boxes, size, top_left, side, minimum_visible), [largest])
    return (int(top_left[0]), int(top_left[1])), kept


def _subjects_in_crop(
    boxes: np.ndarray, size: tuple[int, int], top_left: np.ndarray, side: int, minimum_visible: float
) -> np.ndarray:
    visible = visible_shares(boxes, crop_boxes(boxes, size, (top_left[0], top_left[1]), side), size, side)
    # nothing at all is never enough, not even where minimum_visible is 0
    return np.flatnonzero((visible >= minimum_visible - _ROUNDING) & (visible > _ROUNDING))
