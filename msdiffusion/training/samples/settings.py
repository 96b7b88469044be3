"""Settings of the pairs in groups: where they are read, how one becomes a training sample, how they are loaded.

What each one means stands at ``PairsDataModule``, which takes all of them side by side, as configs have them. Each
group raises a RequestError for what is out of range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from msdiffusion.errors import RequestError
from msdiffusion.training.samples.augmentation import Augmentation
from msdiffusion.training.samples.cropping import bucket_sizes
from msdiffusion.training.setting_names import check_choices, check_number


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How a pair becomes a sample; encodings made ahead depend on some of it."""

    resolution: int
    bucket_step: int = 0
    max_subjects: int = 4  # of a pair with more: chosen at random, the first ones where nothing is changed
    minimum_visible: float = 0.25
    reference_frame: Literal["other", "target"] = "other"
    augmentation: Augmentation = field(default_factory=Augmentation)
    cache_megabytes: float = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("resolution", "bucket_step", "max_subjects", "cache_megabytes", "seed"):
            check_number(name, getattr(self, name))
        if not 0 <= self.minimum_visible <= 1:
            raise RequestError(f"minimum_visible must be in [0, 1], got {self.minimum_visible}")
        check_choices(self)
        _ = self.sizes  # so that a resolution that is no multiple of the step is told at once

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 (buckets, 2), width and height in pixels that training pictures may have."""
        # where all pictures are squares, the resolution needs to be no multiple of anything
        return bucket_sizes(self.resolution, self.bucket_step or self.resolution)


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Where pairs and their encodings are."""

    pairs: str | dict[str, float]
    validation_pairs: str | None
    validation_fraction: float
    test_pairs: str | None
    skip_damaged: bool
    shard_folder: str | None
    shard_gigabytes: float
    encodings: Literal["auto", "require", "off"]
    encodings_folder: str | None

    def __post_init__(self) -> None:
        if not self.shard_gigabytes > 0:
            raise RequestError(f"shard_gigabytes must be above 0, got {self.shard_gigabytes}")
        if not 0 <= self.validation_fraction < 1:
            raise RequestError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")
        check_choices(self)
        if not self.weights:
            raise RequestError("pairs names no dataset; give a directory, or several as {directory: weight}")
        for source, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise RequestError(f"pairs: the weight of {source!r} must be a number above 0, got {weight}")

    @property
    def weights(self) -> dict[str, float]:
        """Of every dataset to train on."""
        return {self.pairs: 1.0} if isinstance(self.pairs, str) else dict(self.pairs)


@dataclass(frozen=True, kw_only=True)
class LoadingSettings:
    """How samples are ordered and loaded."""

    batch_size: int
    lanes: int
    shuffle_buffer: int
    num_workers: int
    worker_start: Literal[None, "fork", "spawn", "forkserver"]

    def __post_init__(self) -> None:
        for name in ("batch_size", "lanes", "shuffle_buffer", "num_workers"):
            check_number(name, getattr(self, name))
        check_choices(self)
