"""Boxes and the patches they cover, for a latent of any height and width.

A box is ``(x1, y1, x2, y2)`` in fractions of the picture: x to the right, y downwards, (0, 0) the upper left corner.
Shapes: B batch, S subjects, Q = height * width patches in row-major order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from msdiffusion.errors import LayoutError, shown

if TYPE_CHECKING:
    from torch import Tensor

Box = tuple[float, float, float, float]


def check_box(box: Any, name: str, *, empty: bool = False) -> Box:
    """The box as a tuple of Python floats, or an error that says why it cannot be one.

    Args:
        box: ``(x1, y1, x2, y2)``, normalised; list, tuple, array or tensor.
        name: what the message calls it.
        empty: let a box without area through.

    Raises:
        LayoutError: it is not four finite numbers, leaves [0, 1], is reversed, or has no area.
    """
    need = "a box is four numbers x1, y1, x2, y2 in fractions of the picture, 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1"
    try:
        if isinstance(box, (str, bytes)):
            raise TypeError
        x1, y1, x2, y2 = (as_number(value) for value in box)
    except (TypeError, ValueError):
        raise LayoutError(f"{name} is {shown(box)}: {need}") from None
    numbers = (x1, y1, x2, y2)
    if not all(math.isfinite(value) for value in numbers):
        raise LayoutError(f"{name} is {numbers}, which is not finite: {need}")
    if not all(0.0 <= value <= 1.0 for value in numbers):
        hint = "; divide pixels by the width and height of the picture" if max(numbers) > 2.0 else ""
        raise LayoutError(f"{name} is {numbers}, which leaves the picture: {need}{hint}")
    if x1 > x2 or y1 > y2:
        raise LayoutError(f"{name} is {numbers}, whose corners are reversed: {need}")
    if not empty and (x1 == x2 or y1 == y2):
        raise LayoutError(f"{name} is {numbers}, which is empty: {need}")
    return numbers


def is_truth(value: Any) -> bool:
    """Whether a value is true or false, of Python's, numpy's or torch's kind, and so no number."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def as_number(value: Any) -> float:
    """A number of any library as a float; ValueError for what is none, or a whole number that no float can hold."""
    if isinstance(value, (str, bytes)) or is_truth(value):
        raise ValueError(f"{shown(value)} is no number")
    try:
        return float(value)
    except (TypeError, OverflowError, RuntimeError) as error:  # torch: a tensor of several
        raise ValueError(str(error)) from None


def patch_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Patches that each box covers, rounded outwards: a patch that a box touches belongs to it.

    Args:
        boxes: (B, S, 4) floating, normalised xyxy. An empty box, such as the padding (0, 0, 0, 0), covers no patch.
            Edges outside [0, 1] are cut at the border.
        height: rows of the patch grid.
        width: columns of the patch grid.

    Returns:
        (B, S, height * width) bool on the device of ``boxes``.

    The arithmetic is float32 whatever the dtype of ``boxes``: half precision puts one edge in a hundred a patch off.
    Source: the official attention processor (``prepare_attention_mask_qk``), which knows square grids only.
    """
    import torch

    boxes = boxes.float()
    x1, y1, x2, y2 = boxes.unsqueeze(-1).unbind(dim=2)  # each (B, S, 1)
    columns = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    rows = torch.arange(height, device=boxes.device, dtype=boxes.dtype)
    in_columns = (columns >= (x1 * width).floor()) & (columns < (x2 * width).ceil()) & (x2 > x1)  # (B, S, width)
    in_rows = (rows >= (y1 * height).floor()) & (rows < (y2 * height).ceil()) & (y2 > y1)  # (B, S, height)
    return (in_rows.unsqueeze(-1) & in_columns.unsqueeze(-2)).flatten(start_dim=2)


def pool_masks(masks: Tensor, height: int, width: int) -> Tensor:
    """Patches that each mask touches, rounded outwards as for boxes.

    Args:
        masks: (B, S, H, W) bool at any resolution.
        height: rows of the patch grid.
        width: columns of the patch grid.

    Returns:
        (B, S, height * width) bool.
    """
    from torch.nn import functional

    pooled = functional.adaptive_max_pool2d(masks.float(), (height, width))
    return (pooled > 0).flatten(start_dim=2)


def grid_of(patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the attention layer that sees ``patches`` patches of a ``height`` x ``width`` latent.

    A UNet halves its maps with stride-2 convolutions that round up, so level k of a 9 x 13 latent is 9x13, 5x7,
    3x4, ...: the sizes follow from the latent alone, and a product tells the level.

    Raises:
        LayoutError: no level of that latent has so many patches, so the layout was made for another latent size.
    """
    rows, columns = height, width
    while rows * columns > patches and (rows, columns) != (1, 1):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != patches:
        raise LayoutError(
            f"the layout was made for latents of {height} x {width}, but an attention layer has {patches} patches, "
            "which is no level of that size: make the condition with the height and width of the latents"
        )
    return rows, columns
