"""What the frozen encoders said about pairs, when it was computed ahead of training.

Shape letters: B batch, S subjects, s subjects of one sample, C latent channels, h w latent rows and columns, L text
tokens, X cross-attention width, P pooled width, N encoder tokens, D encoder width, E phrase width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncodedSample:
    """One pair; its subjects in the order of the file."""

    latent_mean: Tensor
    """(C, h, w), scaled for the UNet."""
    latent_deviation: Tensor | None
    """(C, h, w) of the posterior, scaled; None where the autoencoder has none."""
    prompt_states: Tensor
    """(L, X)."""
    pooled: Tensor | None
    """(P,); None for Stable Diffusion 1.x."""
    phrase_embeddings: Tensor
    """(s, E)."""
    image_tokens: Tensor
    """(s, N, D)."""


@dataclass(frozen=True)
class EncodedPairs:
    """A batch, its subjects padded to S with zeros."""

    latent_mean: Tensor
    """(B, C, h, w)."""
    latent_deviation: Tensor | None
    """(B, C, h, w) or None."""
    prompt_states: Tensor
    """(B, L, X)."""
    pooled: Tensor | None
    """(B, P) or None."""
    phrase_embeddings: Tensor
    """(B, S, E)."""
    image_tokens: Tensor
    """(B, S, N, D)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EncodedPairs:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EncodedPairs:
        """The same in page-locked memory."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> EncodedPairs:
        values = (getattr(self, f.name) for f in fields(self))
        return EncodedPairs(*(None if value is None else change(value) for value in values))
