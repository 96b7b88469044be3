"""Auto layout: regions that follow the text's own attention to each phrase, and the maps they are read from.

Shapes: B batch, S subjects, Q patches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from msdiffusion.errors import RequestError


@dataclass(frozen=True)
class AutoLayout:
    """Let the text's own attention maps replace the regions after some steps (the official "pseudo mask").

    From the ``start_step``-th call of the UNet on, a layer's region of a subject is where the attention to its phrase,
    averaged over the phrase's tokens, the heads and all calls so far, and scaled to [0, 1], exceeds ``threshold``.
    """

    spans: Tensor
    """(B, S, 2) integer [start, end) of each subject's phrase among the text tokens; start = end: no region."""
    threshold: float = 0.5
    start_step: int | Tensor = 5
    """Counted from 1; a number, or (B, S) integers. Samplers of second order (Heun, ...) call the UNet twice a step."""
    subjects: Tensor | None = None
    """(B, S) bool: whose regions are replaced; None: all."""

    def __post_init__(self) -> None:
        if self.spans.ndim != 3 or self.spans.shape[-1] != 2:
            raise RequestError(f"spans must be (batch, subjects, 2), got {tuple(self.spans.shape)}")
        if not 0.0 <= self.threshold <= 1.0:
            raise RequestError(f"auto layout threshold must be in [0, 1], got {self.threshold}")
        if isinstance(self.start_step, int) and self.start_step < 1:
            raise RequestError(f"auto layout start_step counts from 1, got {self.start_step}")
