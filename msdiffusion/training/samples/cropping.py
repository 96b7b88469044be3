"""Crops of training pictures, with the boxes that follow them exactly, and the sizes they may have. Pure numpy.

Boxes are (s, 4) normalised xyxy, s subjects; sizes and crops are (width, height) and corners (top, left), in pixels.
"""

import numpy as np

from msdiffusion.errors import RequestError

# A box that is wholly inside the crop may come back smaller by a rounding of float32.
_ROUNDING = 1e-5

WIDEST = 2.0
"""No bucket is wider than this times its height, or higher than this times its width."""


def size_that_covers(width: int, height: int, crop: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels of the smallest resize of a picture, aspect kept, out of which ``crop`` can be cut."""
    scale = max(crop[0] / width, crop[1] / height)
    return max(crop[0], round(width * scale)), max(crop[1], round(height * scale))


def bucket_sizes(resolution: int, step: int) -> np.ndarray:
    """The sizes that training pictures may have: sides are multiples of ``step``, the area at most resolution².

    For every width the greatest height that is allowed and the other way round, aspects from 1/2 to 2.

    Args:
        resolution: in pixels.
        step: in pixels, at least 1; the resolution is a multiple of it, so that the square is among the sizes.

    Returns:
        int64 (buckets, 2), (width, height), from the highest picture to the widest.

    Raises:
        RequestError: if the resolution is no multiple of the step.
    """
    if step < 1 or resolution % step:
        raise RequestError(f"resolution must be a multiple of bucket_step, got {resolution} and {step}")
    sizes = set()
    for side in range(step, int(resolution * WIDEST) + 1, step):
        other = resolution * resolution // side // step * step
        if 0 < max(side, other) <= WIDEST * min(side, other):
            sizes |= {(side, other), (other, side)}
    return np.array(sorted(sizes, key=lambda size: (size[0] / size[1], size[0])), dtype=np.int64)


def nearest_buckets(sizes: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The bucket whose aspect is nearest to that of each picture, by ratio; of two equally near ones the higher.

    Args:
        sizes: (N, 2) width, height of the pictures.
        buckets: (K, 2) from ``bucket_sizes``.

    Returns:
        int64 (N,).
    """
    aspects = buckets[:, 0] / buckets[:, 1]
    return np.searchsorted(np.sqrt(aspects[1:] * aspects[:-1]), sizes[:, 0] / sizes[:, 1])


def crop_boxes(
    boxes: np.ndarray, size: tuple[int, int], top_left: tuple[int, int], crop: tuple[int, int]
) -> np.ndarray:
    """Boxes in a crop of a picture.

    Args:
        boxes: (s, 4) normalised xyxy of the whole picture.
        size: (width, height) of the whole picture in pixels.
        top_left: (top, left) of the crop in pixels.
        crop: (width, height) of the crop in pixels.

    Returns:
        float32 (s, 4) normalised xyxy of the crop, clipped to [0, 1]; a box outside of the crop has no area.
    """
    top, left = top_left
    scale, offset, sides = (np.array(pair * 2, dtype=np.float64) for pair in (tuple(size), (left, top), tuple(crop)))
    return np.clip((boxes * scale - offset) / sides, 0, 1).astype(np.float32)


def visible_shares(boxes: np.ndarray, cropped: np.ndarray, size: tuple[int, int], crop: tuple[int, int]) -> np.ndarray:
    """float64 (s,): the part of each box's area, in [0, 1], that a crop of ``crop_boxes`` has left of it.

    0 for a box that had no area to begin with.
    """
    before = np.prod(boxes[:, 2:].astype(np.float64) - boxes[:, :2], axis=1) * size[0] * size[1]
    after = np.prod(cropped[:, 2:].astype(np.float64) - cropped[:, :2], axis=1) * crop[0] * crop[1]
    return np.minimum(np.divide(after, before, out=np.zeros_like(after), where=before > 0), 1)


def choose_crop(
    boxes: np.ndarray,
    size: tuple[int, int],
    crop: tuple[int, int],
    minimum_visible: float,
    where: np.ndarray | None = None,
) -> tuple[tuple[int, int], np.ndarray]:
    """Where to crop, and which subjects are in it.

    A crop that would lose every subject is moved to be about the largest one: a pair without subjects teaches nothing.

    Args:
        boxes: (s, 4) normalised xyxy, s >= 1.
        size: (width, height) of the picture in pixels, neither below that of the crop.
        crop: (width, height) in pixels.
        minimum_visible: a subject of whose box less than this part is left counts as cut away, in [0, 1].
        where: (2,) down and to the right, uniform in [0, 1), for a crop anywhere; None for the centre.

    Returns:
        ((top, left) in pixels, int64 indices of the subjects that stay, at least one).
    """
    limits = np.array([size[1] - crop[1], size[0] - crop[0]])
    top_left = limits // 2 if where is None else np.floor(where * (limits + 1)).astype(np.int64)
    kept = _subjects_in_crop(boxes, size, top_left, crop, minimum_visible)
    if len(kept) == 0:
        largest = int(np.argmax(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)))
        centre = (boxes[largest, :2] + boxes[largest, 2:])[::-1] / 2 * np.array([size[1], size[0]])
        top_left = np.clip(np.round(centre - np.array([crop[1], crop[0]]) / 2).astype(int), 0, limits)
        # in a very wide picture even the best crop may show less of a subject than asked: it stays all the same
        kept = np.union1d(_subjects_in_crop(boxes, size, top_left, crop, minimum_visible), [largest])
    return (int(top_left[0]), int(top_left[1])), kept


def _subjects_in_crop(
    boxes: np.ndarray, size: tuple[int, int], top_left: np.ndarray, crop: tuple[int, int], minimum_visible: float
) -> np.ndarray:
    visible = visible_shares(boxes, crop_boxes(boxes, size, (top_left[0], top_left[1]), crop), size, crop)
    # nothing at all is never enough, not even where minimum_visible is 0
    return np.flatnonzero((visible >= minimum_visible - _ROUNDING) & (visible > _ROUNDING))
