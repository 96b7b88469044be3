"""What the rows of a denoiser's batch are: pictures with and without the prompt, one part after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msdiffusion.errors import RequestError, shown

BRANCHES = ("unconditional", "conditional", "image", "perturbed")
PROMPTED = ("conditional", "perturbed")
"""Branches that read the prompt, and so show subjects."""


@dataclass(frozen=True)
class Rows:
    """Parts of a batch, in order, each of all its pictures.

    Samplers with guidance have ("unconditional", "conditional"), those without only ("conditional",). diffusers'
    InstructPix2Pix has ("conditional", "image", "unconditional"), its PAG pipelines ("unconditional", "conditional",
    "perturbed").
    """

    branches: tuple[str, ...]
    """Of BRANCHES, each at most once."""
    pictures: int
    sure: bool = True
    """False: only the size of the batch says so."""

    def __post_init__(self) -> None:
        """Raise RequestError for branches that nobody knows, or no pictures."""
        known = isinstance(self.branches, tuple) and self.branches and set(self.branches) <= set(BRANCHES)
        if not known or len(set(self.branches)) < len(self.branches):
            raise RequestError(f"branches must be a tuple of {', '.join(BRANCHES)}, got {shown(self.branches)}")
        if isinstance(self.pictures, bool) or not isinstance(self.pictures, int) or self.pictures < 1:
            raise RequestError(f"pictures must be a whole number from 1, got {shown(self.pictures)}")

    @property
    def samples(self) -> int:
        """Rows of the whole batch."""
        return len(self.branches) * self.pictures

    def of(self, *branches: str) -> slice:
        """The rows of these branches, which must follow one another.

        Raises:
            RequestError: the batch has no such branch, or others lie between them.
        """
        places = sorted(self.branches.index(branch) for branch in branches if branch in self.branches)
        if not places or len(places) < len(branches) or places[-1] - places[0] != len(places) - 1:
            raise RequestError(f"the batch has no part {' and '.join(branches)}: it is {', '.join(self.branches)}")
        return slice(places[0] * self.pictures, (places[-1] + 1) * self.pictures)

    def prompted(self) -> slice:
        """The rows that read the prompt."""
        return self.of(*(branch for branch in self.branches if branch in PROMPTED))


def guided(pictures: int, guidance: bool, sure: bool = True) -> Rows:
    """What a sampler with or without guidance gives to a denoiser."""
    return Rows(("unconditional", "conditional") if guidance else ("conditional",), pictures, sure)


def seen(sample: Tensor) -> Rows:
    """What the batch looks like: a sampler with guidance gives every latent twice. It waits for the device.

    Two pictures of one seed look the same without guidance: whoever draws such says ``rows``.

    Raises:
        RequestError: every latent is there three times.
    """
    samples = sample.shape[0]
    latents = sample[:, :4]  # InstructPix2Pix's start picture follows
    if samples % 3 == 0 and torch.equal(latents[: samples // 3], latents[-samples // 3 :]):
        raise RequestError(
            f"the batch of {samples} holds every latent three times: say what its parts are, "
            '"rows": Rows(("conditional", "image", "unconditional"), pictures)'
        )
    twice = samples % 2 == 0 and torch.equal(sample[: samples // 2], sample[samples // 2 :])
    return guided(samples // 2 if twice else samples, twice)


def check_seen(rows: Rows, sample: Tensor) -> None:
    """Raise RequestError where the size of a batch says something else of guidance than its values; waits likewise."""
    samples = sample.shape[0]
    if samples % 2 or len(seen(sample).branches) == len(rows.branches):
        return
    told = (
        "different latents, as without guidance" if len(rows.branches) == 2 else "every latent twice, as with guidance"
    )
    raise RequestError(
        f"the condition is for {rows.pictures} pictures, but the UNet's batch holds {samples} samples, {told}: "
        "make the condition with the right num_images=..., or say guidance=True or False"
    )
