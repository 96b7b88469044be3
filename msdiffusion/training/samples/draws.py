"""The random numbers of training: each sample of a run has its own, which depend on nothing but its number.

So a run that was stopped and goes on, two processes in place of one, another batch size or another number of loading
workers all see the same noise for the same sample: nothing random is carried in the state of a generator.

Shape letters: B batch, C latent channels, h w latent rows and columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

AUGMENTATION, OBJECTIVE, ORDER, VALIDATION = range(4)
"""What random numbers are for. Streams of different purposes have nothing in common."""


def generator_for(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """A generator of its own for a purpose and any numbers (of a sample, an epoch, ...), all of them >= 0."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, *numbers])))


def number_of(key: str) -> int:
    """A number >= 0 that depends on a key alone, for pairs that shall always see the same noise."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")


class Movable:
    """A dataclass of tensors and of others of its kind; what is neither stays where it is."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on a device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory (the data loader calls this)."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: change(value) for n, value in values.items() if isinstance(value, Tensor | Movable)})


@dataclass(frozen=True)
class SampleDraws(Movable):
    """What chance decides about the loss of a batch."""

    condition: Tensor
    """float64 (B,) uniform in [0, 1): whether references, prompt or both are dropped."""
    grounding: Tensor
    """float64 (B,) uniform: whether the grounding is dropped."""
    timestep: Tensor
    """float64 (B,) uniform: the timestep."""
    noise: Tensor
    """float32 (B, C, h, w) standard normal: what is put on the latents."""
    posterior: Tensor
    """float32 (B, C, h, w) standard normal: the sample of the autoencoder's posterior."""
    offset: Tensor
    """float32 (B, C, 1, 1) standard normal: the noise offset, before its strength."""

    @classmethod
    def draw(cls, generators: Sequence[np.random.Generator], latent_shape: tuple[int, int, int]) -> SampleDraws:
        """One row per generator, drawn in this order: three uniforms, noise, posterior, offset."""
        uniforms = np.stack([generator.random(3) for generator in generators])
        noise, posterior, offset = (
            torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators]))
            for shape in (latent_shape, latent_shape, (latent_shape[0], 1, 1))
        )
        condition, grounding, timestep = torch.from_numpy(uniforms.T.copy())
        return cls(condition, grounding, timestep, noise, posterior, offset)
