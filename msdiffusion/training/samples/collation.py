"""Training samples -> a padded batch.

Shape letters: B batch, S subjects, C latent channels, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdiffusion.training.samples.batch import LoadingFailure, PairsBatch, TrainingSample
from msdiffusion.training.samples.draws import SampleDraws, generator_for
from msdiffusion.training.samples.encoded import EncodedPairs

PrepareReferences = Callable[[list[Image.Image]], Tensor]
"""RGBA pictures -> what the image encoder takes, float (N, 3, h, w); the model being trained provides it."""


@dataclass(frozen=True)
class PairsCollator:
    """Samples -> PairsBatch, in the loading workers. An object, so that these can be given it."""

    max_subjects: int
    """S, to which every sample is padded."""
    prepare_references: PrepareReferences
    latent_shapes: dict[tuple[int, int], tuple[int, int, int]]
    """(height, width) of a training picture -> (C, h, w) of its latents."""

    def __call__(self, samples: Sequence[TrainingSample | LoadingFailure]) -> PairsBatch | LoadingFailure:
        """A batch of samples of one size, every one with 1 to S subjects; or the first failure among them."""
        for sample in samples:
            if isinstance(sample, LoadingFailure):
                return sample
        B, S = len(samples), self.max_subjects
        boxes = torch.zeros(B, S, 4)
        present = torch.zeros(B, S, dtype=torch.bool)
        for row, sample in enumerate(samples):
            boxes[row, : len(sample.boxes)] = torch.from_numpy(sample.boxes)
            present[row, : len(sample.boxes)] = True
        encoded = [sample.encoded for sample in samples if sample.encoded is not None]
        return PairsBatch(
            numbers=torch.tensor([sample.number for sample in samples]),
            weights=torch.tensor([sample.weight for sample in samples]),
            keys=[sample.key for sample in samples],
            captions=[sample.caption for sample in samples],
            phrases=[_pad(sample.phrases, S) for sample in samples],
            reference_ids=[_pad(sample.reference_ids, S) for sample in samples],
            size=samples[0].size,
            targets=_targets(samples),
            boxes=boxes,
            present=present,
            references=self._references(samples, present),
            original_sizes=torch.tensor([sample.original_size for sample in samples]),
            crops_top_left=torch.tensor([sample.crop_top_left for sample in samples]),
            draws=SampleDraws.draw(
                [generator_for(*sample.stream) for sample in samples], self.latent_shapes[samples[0].size]
            ),
            encoded=EncodedPairs.stack(encoded, S) if encoded else None,
        )

    def _references(self, samples: Sequence[TrainingSample], present: Tensor) -> Tensor | None:
        if samples[0].references is None:
            return None
        prepared = self.prepare_references([picture for sample in samples for picture in sample.references])
        references = prepared.new_zeros(*present.shape, *prepared.shape[1:])
        references[present] = prepared
        return references


def _targets(samples: Sequence[TrainingSample]) -> Tensor | None:
    if samples[0].target is None:
        return None
    pixels = torch.from_numpy(np.stack([sample.target for sample in samples]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _pad(strings: Sequence[str], length: int) -> list[str]:
    return [*strings, *[""] * (length - len(strings))]
