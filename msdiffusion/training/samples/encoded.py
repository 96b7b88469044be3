"""What the frozen encoders said about pairs, when it was computed ahead of training.

``msdiffusion.training.precompute`` writes it, an ``EncodingStore`` reads it, the loader hands it to the model.

Shape letters: B batch, S subjects, s subjects of one sample, C latent channels, h w latent rows and columns, L text
tokens, X cross-attention width, P pooled width, N encoder tokens, D encoder width, E phrase width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from msdiffusion.errors import DataError
from msdiffusion.training.samples.draws import Movable

Part = Literal["latents", "references", "text"]
"""What can be computed ahead, each part without the others."""

PARTS: tuple[Part, ...] = ("latents", "references", "text")

FIELDS: dict[Part, tuple[str, ...]] = {
    "latents": ("latent_mean", "latent_deviation"),
    "references": ("image_tokens",),
    "text": ("prompt_states", "pooled", "phrase_embeddings"),
}
"""Fields of ``EncodedSample`` and ``EncodedPairs`` that belong together."""

SUBJECT_FIELDS = ("phrase_embeddings", "image_tokens")
"""Fields of ``EncodedSample`` with one row per subject."""


class EncodingStore(Protocol):
    """Where encodings are read from. It can be pickled, and read by several processes at once."""

    @property
    def parts(self) -> frozenset[Part]:
        """What it holds; the fields of other parts are None in everything it reads."""
        ...

    def read(self, index: int) -> EncodedSample:
        """The encodings of pair ``index`` of the catalogue that the store was opened for."""
        ...


@dataclass(frozen=True)
class Encodings(Movable):
    """Of one pair, without B and with s subjects in the order of the file; or of a batch, padded to S with zeros.

    A part that was not computed ahead is None.
    """

    latent_mean: Tensor | None
    """(B, C, h, w), scaled for the UNet."""
    latent_deviation: Tensor | None
    """(B, C, h, w) of the posterior, scaled; None where the autoencoder has none."""
    prompt_states: Tensor | None
    """(B, L, X)."""
    pooled: Tensor | None
    """(B, P); None for Stable Diffusion 1.x."""
    phrase_embeddings: Tensor | None
    """(B, S, E)."""
    image_tokens: Tensor | None
    """(B, S, N, D)."""

    @property
    def has_latents(self) -> bool:
        """Whether the target picture was encoded ahead, so that nobody needs its pixels."""
        return self.latent_mean is not None

    @property
    def has_text(self) -> bool:
        """Whether prompt and phrases were encoded ahead."""
        return self.prompt_states is not None

    @property
    def has_references(self) -> bool:
        """Whether the references were encoded ahead, so that nobody needs their pixels."""
        return self.image_tokens is not None


class EncodedSample(Encodings):
    """One pair."""

    def only(self, parts: frozenset[Part]) -> EncodedSample:
        """The same without other parts."""
        return replace(self, **{
            name: None for part in PARTS if part not in parts for name in FIELDS[part]
        })  # fmt: skip

    def subjects(self, kept: Sequence[int]) -> EncodedSample:
        """The same with only these subjects, in this order."""
        rows = torch.as_tensor(kept, dtype=torch.long)
        values = {name: getattr(self, name) for name in SUBJECT_FIELDS}
        return replace(self, **{name: value[rows] for name, value in values.items() if value is not None})


class EncodedPairs(Encodings):
    """A batch."""

    @classmethod
    def stack(cls, samples: Sequence[EncodedSample], max_subjects: int) -> EncodedPairs:
        """Samples with 1 to ``max_subjects`` subjects each, to a batch.

        Raises:
            DataError: if some samples have a field that others lack.
        """
        columns: list[Tensor | None] = []
        for field in fields(EncodedSample):
            values = [getattr(sample, field.name) for sample in samples]
            missing = sum(value is None for value in values)
            if missing == len(values):
                columns.append(None)
            elif missing:
                raise DataError(
                    f"{missing} of {len(values)} pairs of a batch have no {field.name} computed ahead, the others do: "
                    "run msdiffusion.training.precompute with the same --parts for all datasets of the run, or train "
                    "with data.init_args.encodings=off"
                )
            elif field.name in SUBJECT_FIELDS:
                padded = values[0].new_zeros(len(values), max_subjects, *values[0].shape[1:])
                for row, value in enumerate(values):
                    padded[row, : len(value)] = value
                columns.append(padded)
            else:
                columns.append(torch.stack(values))
        return cls(*columns)
