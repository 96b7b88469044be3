"""What the adapter is trained on, beside the noise: drops, and the errors of each sample. Pure functions of tensors.

Shape letters: B batch, S subjects, C latent channels, h w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from msdiffusion.errors import RequestError
from msdiffusion.request.layout import patch_masks


@dataclass(frozen=True)
class DropRates:
    """How often a sample is trained without a part of its condition.

    The first three exclude one another, the last is independent. Defaults: section "training" of the paper
    (arXiv 2406.07209) and ``config.py`` of the official code.

    Raises:
        RequestError: if a rate is no probability, or the three that exclude one another exceed 1 together.
    """

    image: float = 0.05
    """The references become zeros, as after the image encoder's normalisation; boxes and phrases stay."""
    text: float = 0.05
    """The prompt becomes empty; the phrases that ground the subjects stay."""
    both: float = 0.05
    """Both of these at once."""
    grounding: float = 0.10
    """The resampler sees neither phrases nor boxes, but its learned queries; the attention keeps its boxes."""

    def __post_init__(self) -> None:
        for name, rate in vars(self).items():
            if not 0 <= rate <= 1:
                raise RequestError(f"drop_{name} must be in [0, 1], got {rate}")
        if self.image + self.text + self.both > 1:
            raise RequestError(
                f"drop_image + drop_text + drop_both must not exceed 1, got {self.image} + {self.text} + {self.both}"
            )


def draw_drops(rates: DropRates, condition: Tensor, grounding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples of a batch lose what.

    Args:
        condition: (B,) uniform in [0, 1), which decides about references and prompt.
        grounding: (B,) uniform in [0, 1), which decides about the grounding.

    Returns:
        Three bool tensors (B,) on the same device: image dropped, text dropped, grounding dropped.
    """
    image_only = condition < rates.image
    text_only = (condition >= rates.image) & (condition < rates.image + rates.text)
    both = (condition >= rates.image + rates.text) & (condition < rates.image + rates.text + rates.both)
    return image_only | both, text_only | both, grounding < rates.grounding


def subject_area(boxes: Tensor, height: int, width: int) -> Tensor:
    """float32 (B, 1, h, w): 1 on every latent cell that some box touches, else 0. A padding box touches none."""
    covered = patch_masks(boxes, height, width).any(dim=1)
    return covered.view(-1, 1, height, width).float()


def sample_errors(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean square error of each sample, with a weight per cell.

    Every sample is divided by its own weights, so that the loss of a batch is the mean of the losses of its parts: two
    processes with half a batch each learn what one learns from the whole.

    Args:
        prediction: (B, C, h, w), any float type.
        target: (B, C, h, w).
        weights: (B, 1, h, w) of at least 0; None for one everywhere. They move the attention within a sample, not the
            size of the step.

    Returns:
        float32 (B,); 0 for a sample whose weights are all zero.
    """
    error = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True)
    if weights is None:
        return error.flatten(1).mean(dim=1)
    return (error * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1).clamp(min=1e-6)
