"""The exponential average of an adapter's weights over the steps of its training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from msdiffusion.adapter.adapter import MSAdapter


class AveragedAdapter(nn.Module):
    """A copy of an adapter that follows its weights: each step, average = d * average + (1 - d) * weights.

    d grows with the number n of steps so far, min(decay, (1 + n) / (10 + n)), so that the first weights are forgotten.
    Torch's own AveragedModel asks the device for n at every step, and so waits for it; here nobody has to ask. The
    weights may be split over processes (DTensor), if the copy is split in the same places.

    Args:
        adapter: is copied.
        decay: in [0, 1).
    """

    def __init__(self, adapter: MSAdapter, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.module: MSAdapter = copy.deepcopy(adapter).requires_grad_(False)
        self.register_buffer("n_averaged", torch.zeros((), dtype=torch.int64))
        self._steps: int | None = 0

    @torch.no_grad()
    def update(self, adapter: MSAdapter) -> None:
        """Move towards an adapter's weights; to be called once after each optimizer step."""
        if self._steps is None:  # once after a checkpoint was loaded
            self._steps = int(self.n_averaged)
        towards = 1 - min(self.decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(list(self.module.parameters()), list(adapter.parameters()), towards)
        self._steps += 1
        self.n_averaged += 1

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *arguments: object) -> None:
        super()._load_from_state_dict(state_dict, *arguments)
        self._steps = None
