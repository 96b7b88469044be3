"""The judge: small conv nets that read what a picture shows, so that generated pictures can be marked right or wrong.

It is trained on renders of the procedural world only (`judge_training.py`), never on a generated picture, and shares
nothing with the image encoder of the model it judges. From a box it reads category, main colour and pattern; from the
whole picture it reads the background.

Letters: B pictures, N boxes of all pictures together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdiffusion.errors import DataError
from msdiffusion.evaluation.instruments.networks import (
    Instrument,
    PooledReader,
    as_batch,
    check_box_lists,
    crop_boxes,
    resample,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

QUESTIONS = ("category", "color", "pattern", "background")
"""What the judge answers: the first three per box, the last per picture."""


@dataclass(frozen=True)
class JudgeParams:
    """Everything that shapes the networks; saved beside the weights."""

    categories: tuple[str, ...]
    colors: tuple[str, ...]
    patterns: tuple[str, ...]
    backgrounds: tuple[str, ...]
    crop_size: int = 48
    """Side in pixels that every box is resampled to."""
    picture_size: int = 48
    """Side in pixels that the whole picture is resampled to."""
    margin: float = 0.08
    """Share of the box side that is added on every side before the crop, so that outlines survive a tight box."""
    widths: tuple[int, ...] = (32, 64, 128, 192)
    """Channels of the stem and of each halving stage of the box network; the picture network has half of each."""

    def __post_init__(self) -> None:
        for name in ("categories", "colors", "patterns", "backgrounds"):
            names = getattr(self, name)
            if len(names) < 2 or len(set(names)) != len(names):
                raise DataError(f"{name} must be at least two different names, got {names!r}")
        if len(self.widths) < 2 or min(self.widths) < 2:
            raise DataError(f"widths must be at least two numbers above 1, got {self.widths!r}")
        if not 0 <= self.margin < 1:
            raise DataError(f"margin is a share of the box side in [0, 1), got {self.margin}")
        smallest = 2 ** (len(self.widths) - 1)
        for name in ("crop_size", "picture_size"):
            if getattr(self, name) < smallest:
                raise DataError(f"{name} must be at least {smallest} for {len(self.widths)} widths")

    def names(self, question: str) -> tuple[str, ...]:
        """Possible answers to one of `QUESTIONS`, in the order of the classes."""
        answers = dict(zip(QUESTIONS, (self.categories, self.colors, self.patterns, self.backgrounds), strict=True))
        return answers[question]


@dataclass(frozen=True)
class BoxReading:
    """What the judge sees in one box. Confidences are the network's own probabilities, in [0, 1]."""

    category: str
    color: str
    pattern: str
    confidence: dict[str, float]


@dataclass(frozen=True)
class PictureReading:
    """What the judge sees in one picture: the background, and each box in the order given."""

    background: str
    background_confidence: float
    boxes: tuple[BoxReading, ...]


class Judge(Instrument):
    """Reads category, main colour and pattern from boxes, and the background from the whole picture."""

    kind = "judge"
    params_type = JudgeParams

    def __init__(self, params: JudgeParams) -> None:
        super().__init__(params)
        counts = {question: len(params.names(question)) for question in QUESTIONS}
        self.box_reader = PooledReader(params.widths, {question: counts[question] for question in QUESTIONS[:3]})
        halved = [max(2, width // 2) for width in params.widths]
        self.picture_reader = PooledReader(halved, {"background": counts["background"]})

    def crop(self, pictures: Tensor, boxes: Tensor, owners: Tensor) -> Tensor:
        """Crops (N, 3, crop_size, crop_size) as the box network sees them, see `crop_boxes`."""
        return crop_boxes(pictures, boxes, owners, self.params.margin, self.params.crop_size)

    def forward(self, pictures: Tensor, boxes: Tensor, owners: Tensor) -> dict[str, Tensor]:
        """Logits of every question.

        Args:
            pictures: (B, 3, H, W) RGB in [0, 1].
            boxes: (N, 4) normalised xyxy.
            owners: (N,) int64, the picture of each box.

        Returns:
            "category", "color", "pattern": (N, classes); "background": (B, classes).
        """
        whole = resample(pictures, self.params.picture_size)
        crops = self.crop(pictures, boxes, owners)
        return self.box_reader(crops * 2 - 1) | self.picture_reader(whole * 2 - 1)

    @torch.inference_mode()
    def read(
        self, pictures: Sequence[Image | np.ndarray], boxes: Sequence[Sequence[Sequence[float]]]
    ) -> list[PictureReading]:
        """Reads pictures of any sizes.

        Args:
            pictures: PIL pictures or uint8 (H, W, 3) arrays.
            boxes: per picture its boxes, normalised xyxy; the list of a picture may be empty.

        Raises:
            DataError: other numbers of pictures and box lists, or a box that isn't an ordered xyxy inside the picture.
        """
        check_box_lists(pictures, boxes)
        for picture_boxes in boxes:
            for box in picture_boxes:
                if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
                    raise DataError(f"a box is x1, y1, x2, y2 in [0, 1] with x1 < x2 and y1 < y2, got {list(box)}")
        with self.looking() as device:
            return [
                self._read_one(*as_batch(picture, own, device)) for picture, own in zip(pictures, boxes, strict=True)
            ]

    def _read_one(self, picture: Tensor, boxes: Tensor, owners: Tensor) -> PictureReading:
        best = {name: logits.softmax(1).max(1) for name, logits in self(picture, boxes, owners).items()}
        answers = {
            name: [(self.params.names(name)[int(index)], float(value)) for value, index in zip(*found, strict=True)]
            for name, found in best.items()
        }
        background, confidence = answers["background"][0]
        readings = tuple(
            BoxReading(
                **{question: answers[question][index][0] for question in QUESTIONS[:3]},
                confidence={question: answers[question][index][1] for question in QUESTIONS[:3]},
            )
            for index in range(len(boxes))
        )
        return PictureReading(background, confidence, readings)
