"""How a base's training pictures became noisy, and what its UNet had to say about them: diffusion or flow matching.

Shape letters: B batch, C latent channels, h w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from msdiffusion.errors import RequestError, WeightsError

DIFFUSION_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DiffusionSchedule:
    """DDPM with the betas of the base, which predicts the noise, the velocity or the picture.

    T, ``num_timesteps``, is the end of the timesteps.

    Args:
        scheduler: of diffusers; it computes everything but the weights.
    """

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler
        self.prediction: Literal["epsilon", "v_prediction", "sample"] = scheduler.config.prediction_type
        self.num_timesteps: int = scheduler.config.num_train_timesteps

    def timesteps(self, shares: Tensor) -> Tensor:
        """Timesteps, as the UNet takes them, of shares (B,) in [0, 1) of the way to noise: int64 (B,), T * share."""
        return (shares * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) with noise (B, C, h, w) on them, at timesteps (B,)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the UNet should say about them, (B, C, h, w): the noise, the velocity or the latents."""
        if self.prediction == "epsilon":
            return noise
        return latents if self.prediction == "sample" else self.scheduler.get_velocity(latents, noise, timesteps)

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """float32 (B,): weights of the errors under min-SNR weighting (Hang et al. 2023, arXiv 2303.09556).

        There the error of the picture itself weighs min(SNR, gamma). An error of the noise is SNR times, one of the
        velocity SNR + 1 times as large, and so is divided by that. Where there is no signal: 1 for noise, 0 for
        velocity and picture.
        """
        signal = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()  # the share of the variance
        snr = signal / (1 - signal)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)
        capped = snr.clamp(max=gamma)
        return capped if self.prediction == "sample" else capped / (snr + 1)


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching: (1 - s) * latents + s * noise at the timestep T * s, and the UNet says noise - latents.

    Source: Lipman et al. 2022 (arXiv 2210.02747) with the straight paths of rectified flow (Liu et al. 2022, arXiv
    2209.03003); the shift is that of Esser et al. 2024 (arXiv 2403.03206), section 5.3.2, as diffusers' schedulers have
    it.

    A ``shift`` above 1 draws more of the noisy samples, as the base was trained.
    """

    num_timesteps: int = 1000
    shift: float = 1.0

    def timesteps(self, shares: Tensor) -> Tensor:
        """float32 (B,): T * shift * share / (1 + (shift - 1) * share), not rounded."""
        return (self.num_timesteps * self.shift * shares / (1 + (self.shift - 1) * shares)).float()

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See ``DiffusionSchedule``."""
        share = (timesteps / self.num_timesteps).to(latents.dtype).view(-1, 1, 1, 1)
        return (1 - share) * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The flow from picture to noise."""
        return noise - latents

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """See ``DiffusionSchedule``. The picture is noisy - s * flow, so an error of the flow weighs s² times that.

        SNR = ((1 - s) / s) squared, hence min(SNR, gamma) * s squared = min(1 - s, s * root of gamma) squared.
        """
        share = timesteps.float() / self.num_timesteps
        return torch.minimum(1 - share, share * gamma**0.5).square()


NoiseSchedule = DiffusionSchedule | FlowSchedule
"""What training asks of a base: where on the way to noise a sample is, and what the UNet should say there."""


def training_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise of training for the base's own sampler, whichever that is.

    Samplers such as Euler's put noise on in their own parametrisation; a diffusion network was trained on that of DDPM
    with the same betas. A base is one of flow matching where its sampler is (``FlowMatch...``) or says so
    (``use_flow_sigmas``, prediction type "flow_prediction").

    Raises:
        WeightsError: if the base predicts something else, or its sampler shifts by resolution.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    prediction = config.get("prediction_type", "flow_prediction" if name.startswith("FlowMatch") else "epsilon")
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas", False) or prediction == "flow_prediction":
        return _flow_schedule(name, prediction, config)
    if prediction not in DIFFUSION_PREDICTIONS:
        raise WeightsError(
            f"the base predicts {prediction!r}; training knows {', '.join(map(repr, DIFFUSION_PREDICTIONS))} and flows"
        )
    kept = (
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
        "rescale_betas_zero_snr",
    )
    return DiffusionSchedule(DDPMScheduler(**{name: config[name] for name in kept if name in config}))


def _flow_schedule(name: str, prediction: str, config: Any) -> FlowSchedule:
    if prediction != "flow_prediction":
        raise WeightsError(
            f"the base's scheduler, {name}, has the sigmas of flow matching but predicts {prediction!r}: "
            "training knows 'flow_prediction' there, so correct prediction_type or use_flow_sigmas in its "
            "scheduler_config.json"
        )
    if config.get("use_dynamic_shifting", False):
        raise WeightsError(
            f"the base's scheduler, {name}, shifts its timesteps by the resolution (use_dynamic_shifting), which is "
            "defined for transformers, not for a UNet: give its scheduler_config.json a fixed shift"
        )
    shift = config.get("shift", config.get("flow_shift", 1.0))
    return FlowSchedule(config.get("num_train_timesteps", 1000), 1.0 if shift is None else float(shift))


def draw_shares(
    uniform: Tensor, sampling: Literal["uniform", "logit_normal"] = "uniform", exponent: float = 1.0
) -> Tensor:
    """How far on the way from picture to noise samples are, of uniform numbers in [0, 1).

    Args:
        uniform: float64 (B,).
        sampling: "uniform": uniform ** exponent. "logit_normal": the logistic function of a standard normal number,
            which favours the middle (Esser et al. 2024, section 3.1).
        exponent: 1 is uniform, below 1 favours the noisy end, where layout is decided.

    Returns:
        float64 (B,) in [0, 1].

    Raises:
        RequestError: unknown ``sampling``.
    """
    if sampling == "uniform":
        return uniform**exponent
    if sampling == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(uniform))
    raise RequestError(f"timestep_sampling must be 'uniform' or 'logit_normal', got {sampling!r}")
