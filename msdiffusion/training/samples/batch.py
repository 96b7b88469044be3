"""What a training sample and a batch of them hold.

Shape letters: B batch, S subjects (padded in a batch), s subjects of one sample, H W height and width of the training
picture, h w those of the image encoder's input. Boxes are normalised xyxy unless a name says pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from msdiffusion.training.samples.draws import Movable, SampleDraws
from msdiffusion.training.samples.encoded import EncodedPairs, EncodedSample


@dataclass(frozen=True)
class TrainingSample:
    """One pair at training resolution, s <= S subjects of which all can be seen in the target."""

    number: int
    """Of the sample in the run; in validation, of the pair among the validation pairs."""
    weight: float
    """0 for a repetition that only fills up a batch, else 1."""
    stream: tuple[int, ...]
    """What ``generator_for`` takes: where the random numbers of the objective come from."""
    key: str
    caption: str
    size: tuple[int, int]
    """(H, W) of the training picture."""
    target: np.ndarray | None
    """uint8 (H, W, 3) RGB; None where it was encoded ahead."""
    phrases: tuple[str, ...]
    boxes: np.ndarray
    """float32 (s, 4) in the cropped target."""
    references: tuple[Image.Image, ...] | None
    """RGBA cut-outs, any size; None where they were encoded ahead."""
    reference_ids: tuple[str, ...]
    """Name of each reference: what has the same name is the same picture, so its encoding may be kept."""
    original_size: tuple[int, int]
    """(height, width) in pixels of the target before the resize: the first of SDXL's size conditions."""
    crop_top_left: tuple[int, int]
    """(top, left) in pixels of the resized target: the second of SDXL's size conditions."""
    encoded: EncodedSample | None = None
    """What was encoded ahead, its subjects those of this sample."""


@dataclass(frozen=True)
class LoadingFailure:
    """In place of a sample, or of the batch that it belongs to: what went wrong."""

    message: str


@dataclass
class PairsBatch(Movable):
    """A batch, padded to S subjects: a padding subject has present False, a zero box, phrase "" and zero pixels."""

    numbers: Tensor
    """int64 (B,), see ``TrainingSample``."""
    weights: Tensor
    """float32 (B,): 0 for a sample that shall not count, else 1."""
    keys: list[str]
    captions: list[str]
    phrases: list[list[str]]
    """B lists of S phrases."""
    reference_ids: list[list[str]]
    """B lists of S names, "" for padding."""
    size: tuple[int, int]
    """(H, W) of the training pictures."""
    targets: Tensor | None
    """float32 (B, 3, H, W) in [-1, 1]; None where they were encoded ahead."""
    boxes: Tensor
    """float32 (B, S, 4)."""
    present: Tensor
    """bool (B, S)."""
    references: Tensor | None
    """float32 (B, S, 3, h, w), as the image encoder takes them; None where they were encoded ahead."""
    original_sizes: Tensor
    """int64 (B, 2), (height, width)."""
    crops_top_left: Tensor
    """int64 (B, 2), (top, left)."""
    draws: SampleDraws
    """Everything random about the objective."""
    encoded: EncodedPairs | None = None
    """What was encoded ahead."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)
