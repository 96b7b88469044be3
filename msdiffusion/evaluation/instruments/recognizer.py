"""The recognizer: a small conv net that tells individuals of one category apart.

A box of a picture and a plain picture of a subject become embeddings of one space, so that the subject drawn in a box
can be looked up among many candidates. It shares nothing with the model's image encoder and learns from renders only
(`instrument_training.py`).

Letters: N boxes or pictures, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from msdiffusion.errors import DataError
from msdiffusion.evaluation.instruments.networks import Instrument, PooledReader, as_batch, check_box_lists, crop_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

VIEW_BACKGROUND = 0.5
"""Grey behind a plain picture of a subject, in [0, 1]."""


@dataclass(frozen=True)
class RecognizerParams:
    """Everything that shapes the network; saved beside the weights."""

    crop_size: int = 48
    """Side in pixels that every box is resampled to."""
    margin: float = 0.08
    """Share of the box side that is added on every side before the crop."""
    widths: tuple[int, ...] = (32, 64, 128, 192)
    """Channels of the stem and of each halving stage."""
    embedding_width: int = 96
    """D."""

    def __post_init__(self) -> None:
        if self.crop_size < 2 ** (len(self.widths) - 1) or len(self.widths) < 2 or min(self.widths) < 2:
            raise DataError(f"widths {self.widths!r} don't fit a crop of {self.crop_size} pixels")
        if not 0 <= self.margin < 1:
            raise DataError(f"margin is a share of the box side in [0, 1), got {self.margin}")
        if self.embedding_width < 2:
            raise DataError(f"embedding_width must be at least 2, got {self.embedding_width}")


class Recognizer(Instrument):
    """Embeds what a box shows; embeddings of one individual have a large cosine."""

    kind = "recognizer"
    params_type = RecognizerParams

    def __init__(self, params: RecognizerParams) -> None:
        super().__init__(params)
        self.trunk = PooledReader(params.widths, {"embedding": params.embedding_width})

    def forward(self, pictures: Tensor, boxes: Tensor, owners: Tensor) -> Tensor:
        """Unit vectors (N, D).

        Args:
            pictures: (B, 3, H, W) RGB in [0, 1].
            boxes: (N, 4) normalised xyxy.
            owners: (N,) int64, the picture of each box.
        """
        crops = crop_boxes(pictures, boxes, owners, self.params.margin, self.params.crop_size)
        return nn.functional.normalize(self.trunk(crops * 2 - 1)["embedding"].float(), dim=1)

    @torch.inference_mode()
    def embed(
        self,
        pictures: Sequence[Image | np.ndarray],
        boxes: Sequence[Sequence[Sequence[float]]],
        batch_size: int = 64,
    ) -> np.ndarray:
        """What the boxes of pictures of any sizes show.

        Args:
            pictures: PIL pictures or uint8 (H, W, 3) arrays.
            boxes: per picture its boxes, normalised xyxy.
            batch_size: boxes embedded at once.

        Returns:
            float32 (N, D) unit vectors, the boxes of the first picture first.

        Raises:
            DataError: other numbers of pictures and box lists.
        """
        check_box_lists(pictures, boxes)
        if not pictures:
            return np.zeros((0, self.params.embedding_width), np.float32)
        with self.looking() as device:
            crops = [
                crop_boxes(*as_batch(picture, own, device), self.params.margin, self.params.crop_size)
                for picture, own in zip(pictures, boxes, strict=True)
            ]
            rows = [self.trunk(part * 2 - 1)["embedding"] for part in torch.cat(crops).split(batch_size)]
            return nn.functional.normalize(torch.cat(rows).float(), dim=1).cpu().numpy()

    def embed_views(self, views: Sequence[np.ndarray]) -> np.ndarray:
        """Plain pictures of subjects, uint8 RGBA (H, W, 4), to unit vectors float32 (N, D)."""
        shown = [view_on_grey(view) for view in views]
        return self.embed([picture for picture, _ in shown], [[box] for _, box in shown])


def view_on_grey(view: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """A cut-out, uint8 RGBA (H, W, 4), on grey: uint8 RGB (H, W, 3) and the normalised xyxy box of its opaque part.

    Raises:
        DataError: another shape or type, or nothing in it is opaque.
    """
    if view.ndim != 3 or view.shape[2] != 4 or view.dtype != np.uint8:
        raise DataError(f"a view must be uint8 of shape (height, width, 4), got {view.dtype} {view.shape}")
    opaque = view[..., 3] >= 128
    if not opaque.any():
        raise DataError("a view without an opaque pixel shows no subject")
    alpha = view[..., 3:].astype(np.float32) / 255
    picture = view[..., :3] * alpha + 255 * VIEW_BACKGROUND * (1 - alpha)
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    height, width = opaque.shape
    box = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
    return picture.round().astype(np.uint8), box
