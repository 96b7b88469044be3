"""What decides how a pair becomes a training sample, apart from the pair."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from msdiffusion.errors import RequestError
from msdiffusion.training.samples.augmentation import Augmentation
from msdiffusion.training.samples.cropping import bucket_sizes
from msdiffusion.training.setting_names import check_number


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """The settings of ``PairsDataModule`` that samples depend on; encodings made ahead depend on some of them.

    Raises:
        RequestError: one is out of range.
    """

    resolution: int
    """Side in pixels of a square training picture."""
    bucket_step: int = 0
    """Sides of pictures of other aspects are multiples of it; 0: all are squares."""
    max_subjects: int = 4
    """Of a pair with more, this many are chosen at random (the first ones where nothing is changed)."""
    minimum_visible: float = 0.25
    """See ``choose_crop``; in [0, 1]."""
    reference_frame: Literal["other", "target"] = "other"
    """See ``read_pair``."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    """What is changed in training."""
    cache_megabytes: float = 0
    """Resized pairs are kept in memory up to this size, in every process that reads."""
    seed: int = 0
    """Of all chance."""

    def __post_init__(self) -> None:
        for name in ("resolution", "bucket_step", "max_subjects", "cache_megabytes", "seed"):
            check_number(name, getattr(self, name))
        if not 0 <= self.minimum_visible <= 1:
            raise RequestError(f"minimum_visible must be in [0, 1], got {self.minimum_visible}")
        if self.reference_frame not in ("other", "target"):
            raise RequestError(f"reference_frame must be 'other' or 'target', got {self.reference_frame!r}")
        self.sizes  # noqa: B018 - so that a resolution that is no multiple of the step is told at once

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 (buckets, 2), width and height in pixels that training pictures may have."""
        # where all pictures are squares, the resolution needs to be no multiple of anything
        return bucket_sizes(self.resolution, self.bucket_step or self.resolution)
