"""The locator: a small conv net that finds where the subjects of a picture are, whatever they are.

It tells how well a generated picture keeps the requested boxes. One stage, no anchors: every cell of a coarse grid
says whether it lies in the middle of a subject, and how far the four edges of that subject are (FCOS, Tian et al.
2019). Like the judge it learns from renders only (`instrument_training.py`).

Letters: B pictures, G side of the grid, K boxes found in one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from msdiffusion.errors import DataError
from msdiffusion.evaluation.instruments.networks import HalvingStage, Instrument, as_pixels, resample

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class LocatorParams:
    """Everything that shapes the network; saved beside the weights."""

    picture_size: int = 64
    """Side in pixels that pictures are resampled to; a multiple of 16."""
    widths: tuple[int, ...] = (24, 48, 96, 128, 160)
    """Channels of the stem and of the four halving stages; the grid stands after the second."""
    threshold: float = 0.3
    """Least confidence of a box that is reported."""
    overlap: float = 0.4
    """Of two boxes with a larger IoU only the more confident one is reported."""

    def __post_init__(self) -> None:
        if self.picture_size < 16 or self.picture_size % 16:
            raise DataError(f"picture_size must be a positive multiple of 16, got {self.picture_size}")
        if len(self.widths) != 5 or min(self.widths) < 2:
            raise DataError(f"widths must be five numbers above 1, got {self.widths!r}")
        for name in ("threshold", "overlap"):
            if not 0 < getattr(self, name) < 1:
                raise DataError(f"{name} must lie in (0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class Located:
    """The subjects found in one picture, most confident first."""

    boxes: np.ndarray
    """float32 (K, 4) normalised xyxy."""
    confidence: np.ndarray
    """float32 (K,) in [0, 1]."""


class Locator(Instrument):
    """Finds the boxes of all subjects in a picture."""

    kind = "locator"
    params_type = LocatorParams

    def __init__(self, params: LocatorParams) -> None:
        super().__init__(params)
        w = params.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, w[0], 3, padding=1), nn.ReLU(), HalvingStage(w[0], w[1]), HalvingStage(w[1], w[2])
        )
        self.middle, self.coarse = HalvingStage(w[2], w[3]), HalvingStage(w[3], w[4])
        # From coarse to fine: a cell must know the whole subject to tell where it ends.
        self.from_coarse, self.from_middle = nn.Conv2d(w[4], w[3], 1), nn.Conv2d(w[3], w[2], 1)
        self.head = nn.Sequential(nn.Conv2d(w[2], w[2], 3, padding=1), nn.ReLU(), nn.Conv2d(w[2], 5, 1))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) RGB in [0, 1] to confidence logits (B, G, G) and normalised xyxy boxes (B, G, G, 4)."""
        side = self.params.picture_size
        if pictures.shape[2:] != (side, side):
            pictures = resample(pictures, side)
        fine = self.stem(pictures * 2 - 1)
        middle = self.middle(fine)
        middle = middle + nn.functional.interpolate(self.from_coarse(self.coarse(middle)), scale_factor=2.0)
        fine = fine + nn.functional.interpolate(self.from_middle(middle), scale_factor=2.0)
        output = self.head(torch.relu(fine)).permute(0, 2, 3, 1).float()
        distances = nn.functional.softplus(output[..., 1:] - 1)  # left, top, right, bottom, in sides of the picture
        centers = grid_centers(output.shape[1], output.device)
        return output[..., 0], torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], -1)

    @torch.inference_mode()
    def find(self, pictures: Sequence[Image | np.ndarray], batch_size: int = 64) -> list[Located]:
        """The subjects of every picture (PIL pictures, or uint8 (H, W, 3) arrays), boxes cut at the border."""
        found: list[Located] = []
        with self.looking() as device:
            for first in range(0, len(pictures), batch_size):
                pixels = [as_pixels(picture)[None].to(device) for picture in pictures[first : first + batch_size]]
                logits, boxes = self(torch.cat([resample(each, self.params.picture_size) for each in pixels]))
                found += [
                    self._select(own.flatten().sigmoid(), own_boxes.flatten(0, 1).clamp(0, 1))
                    for own, own_boxes in zip(logits, boxes, strict=True)
                ]
        return found

    def _select(self, confidence: Tensor, boxes: Tensor) -> Located:
        sure = (confidence >= self.params.threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        confidence, boxes = confidence[sure], boxes[sure]
        kept = nms(boxes, confidence, self.params.overlap)
        return Located(boxes[kept].cpu().numpy(), confidence[kept].cpu().numpy())


def grid_centers(side: int, device: torch.device | str = "cpu") -> Tensor:
    """Centres (side, side, 2) of a grid's cells as x, y in [0, 1]."""
    steps = (torch.arange(side, device=device) + 0.5) / side
    return torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)


def layout_ious(requested: Sequence[Sequence[float]], located: Located) -> np.ndarray:
    """IoU of each requested box with the found box that is its own, 0 where none is.

    Found boxes are dealt to the requested ones so that the sum of the IoUs is largest; each is used once.

    Args:
        requested: S boxes, normalised xyxy.
        located: what the locator found in the picture.

    Returns:
        float64 (S,) in [0, 1].
    """
    from scipy.optimize import linear_sum_assignment

    wanted = np.asarray(requested, dtype=np.float64).reshape(-1, 4)
    ious = np.zeros(len(wanted))
    if len(wanted) and len(located.boxes):
        table = box_ious(wanted, located.boxes.astype(np.float64))
        rows, columns = linear_sum_assignment(-table)
        ious[rows] = table[rows, columns]
    return ious


def box_ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """IoU (N, M) of boxes (N, 4) and (M, 4), xyxy; an empty box has IoU 0 with everything."""
    return box_iou(torch.from_numpy(first), torch.from_numpy(second)).nan_to_num().numpy()
