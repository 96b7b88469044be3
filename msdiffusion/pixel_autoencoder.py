"""A lossless autoencoder: latents are rearranged pixels.

The embedded base works on pictures of 64 px, where a learned autoencoder costs more quality than it saves compute.
This class has the interface a diffusers pipeline asks of its `vae`, so the embedded base is an ordinary
StableDiffusionXLPipeline directory; model_index.json names this module.

Slicing and tiling save memory in a learned autoencoder. Here nothing is computed and nothing needs saving, so the
switches exist, for code that sets them on any `vae`, and change no picture.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class PixelDistribution:
    """The point distribution of an encoded picture: `sample` and `mode` are the same tensor."""

    def __init__(self, latents: Tensor) -> None:
        self.mean = latents

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, h, w); the generator is accepted for the common interface and not needed."""
        return self.mean

    def mode(self) -> Tensor:
        """(B, C, h, w)."""
        return self.mean


class PixelUnshuffleAutoencoder(ModelMixin, ConfigMixin):
    """Latents are `pixel_unshuffle(x, factor) - shift`; multiply by `scaling_factor` as for any diffusers vae.

    Args:
        block_out_channels: only its length counts, as diffusers reads the spatial factor of a vae from the number of
            its stages: factor = 2 ** (len - 1).
        latent_channels: must be 3 * factor ** 2.
        shift: mean of the training pictures in [-1, 1].
        scaling_factor: one over their standard deviation.

    Raises:
        ValueError: if latent_channels does not follow from the number of stages.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (1, 1),
        latent_channels: int = 12,
        in_channels: int = 3,
        out_channels: int = 3,
        shift: float = 0.1,
        scaling_factor: float = 2.0,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        self.factor = 2 ** (len(block_out_channels) - 1)
        if latent_channels != in_channels * self.factor**2 or in_channels != out_channels:
            raise ValueError(
                f"{len(block_out_channels)} stages mean a factor of {self.factor} and {in_channels * self.factor**2} "
                f"latent channels for {in_channels} picture channels, got {latent_channels} ({out_channels} out)"
            )
        self.use_slicing = self.use_tiling = False
        # Pipelines ask a vae for its dtype and device, which torch reads from a parameter.
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)

    def enable_slicing(self) -> None:
        """Does nothing but set ``use_slicing``: there is no work to divide."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Unset ``use_slicing``."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Does nothing but set ``use_tiling``: there is no work to divide."""
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Unset ``use_tiling``."""
        self.use_tiling = False

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[PixelDistribution]:
        """Pictures (B, 3, H, W) in [-1, 1] to unscaled latents (B, 3 f², H / f, W / f)."""
        distribution = PixelDistribution(nn.functional.pixel_unshuffle(x, self.factor) - self.config.shift)
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents (B, 3 f², h, w) to pictures (B, 3, h f, w f), nominally in [-1, 1]."""
        sample = nn.functional.pixel_shuffle(z + self.config.shift, self.factor)
        return DecoderOutput(sample=sample) if return_dict else (sample,)
