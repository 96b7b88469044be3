"""What the adapter is trained on: the noise, the targets, the drops and the loss. Pure functions of tensors.

Shape letters: B batch, S subjects, C latent channels, h w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.layout import patch_masks

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, SchedulerMixin


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


def draw_drops(rates: DropRates, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Which samples of a batch lose what.

    Args:
        rates: see there.
        count: B.
        generator: of the CPU; None for torch's own.

    Returns:
        Three bool tensors (B,) on the CPU: image dropped, text dropped, grounding dropped.
    """
    draw = torch.rand(count, generator=generator)
    image_only = draw < rates.image
    text_only = (draw >= rates.image) & (draw < rates.image + rates.text)
    both = (draw >= rates.image + rates.text) & (draw < rates.image + rates.text + rates.both)
    grounding = torch.rand(count, generator=generator) < rates.grounding
    return image_only | both, text_only | both, grounding


def draw_timesteps(
    count: int, num_timesteps: int, exponent: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Timesteps T * u ** exponent of uniform u: 1 is uniform, below 1 favours the noisy ones, where layout is decided.

    Returns:
        int64 (B,) on the CPU, in [0, num_timesteps).
    """
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (uniform**exponent * num_timesteps).long().clamp(max=num_timesteps - 1)


def training_schedule(scheduler: SchedulerMixin) -> DDPMScheduler:
    """The noise of training for the base's own sampler, whichever that is.

    Samplers such as Euler's put noise on in their own parametrisation; the network was trained on that of DDPM with the
    same betas.

    Raises:
        WeightsError: if the base predicts something other than the noise or the velocity.
    """
    from diffusers import DDPMScheduler

    kept = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    schedule = DDPMScheduler(**{name: scheduler.config[name] for name in kept if name in scheduler.config})
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise WeightsError(
            f"the base predicts {schedule.config.prediction_type!r}; training knows 'epsilon' and 'v_prediction'"
        )
    return schedule


def prediction_target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet should say about noisy latents: the noise, or the velocity where the base predicts that.

    Args:
        schedule: from ``training_schedule``.
        latents: (B, C, h, w) without noise, scaled.
        noise: (B, C, h, w) standard normal.
        timesteps: int64 (B,).

    Returns:
        (B, C, h, w).
    """
    if schedule.config.prediction_type == "epsilon":
        return noise
    return schedule.get_velocity(latents, noise, timesteps)


def subject_area(boxes: Tensor, height: int, width: int) -> Tensor:
    """float32 (B, 1, h, w): 1 on every latent cell that some box touches, else 0. A padding box touches none."""
    covered = patch_masks(boxes, height, width).any(dim=1)
    return covered.view(-1, 1, height, width).float()


def weighted_error(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean square error with a weight per cell; weights of one everywhere give the plain mean.

    Args:
        prediction: (B, C, h, w), any float type.
        target: (B, C, h, w).
        weights: (B, 1, h, w), not all zero.

    Returns:
        float32 scalar. The sum is divided by the sum of the weights, so a weight moves attention, not the step size.
    """
    error = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True)
    return (error * weights).sum() / weights.sum()
