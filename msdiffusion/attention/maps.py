"""Sums of the text's attention maps over a run.

Shapes: B batch, S subjects, Q patches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class TextMaps:
    """Sums over the steps of one run of the text's attention to each phrase, per layer.

    All arithmetic stays on the device: counting, and starting again where the timestep rises, cost no waiting.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.totals: dict[str, Tensor] = {}
        """(B, S, Q) float32 per layer."""
        self.grids: dict[str, tuple[int, int]] = {}
        self.steps = torch.zeros((), device=device)
        self.first_timestep, self.last_timestep = torch.full((2,), -torch.inf, device=device).unbind()
        self.kept = torch.zeros((), device=device)
        """1 where the run goes on, 0 in its first step."""

    def is_stale(self) -> bool:
        """Whether these sums were made under ``inference_mode``, and so cannot be changed outside of it."""
        made = (self.steps, *self.totals.values())
        return not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in made)

    def begin(self, timestep: Tensor) -> None:
        """Count a call of the UNet; ``timestep`` is one number."""
        # Within a run samplers of second order repeat a timestep, or round it up by a hair, but never the first one.
        self.kept.copy_((timestep < self.first_timestep) & (timestep <= self.last_timestep + 0.5))
        self.first_timestep.copy_(torch.where(self.kept > 0, self.first_timestep, timestep))
        self.steps.mul_(self.kept).add_(1)
        self.last_timestep.copy_(timestep)

    def add(self, layer: str, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """Add the maps (B, S, Q) of one step; returns their mean over the steps so far."""
        if layer not in self.totals or self.totals[layer].shape != maps.shape or self.grids[layer] != grid:
            self.totals[layer] = torch.zeros_like(maps)
            self.grids[layer] = grid
        # where, not a product: what an earlier run left may be infinite
        total = self.totals[layer]
        total.copy_(torch.where(self.kept > 0, total, 0.0) + maps)
        return total / self.steps

    def mean(self, rows: int, columns: int) -> Tensor:
        """(B, S, rows, columns) in [0, 1]."""
        resized = [
            functional.interpolate(
                to_unit_range(total).unflatten(-1, self.grids[layer]), (rows, columns), mode="bilinear"
            )
            for layer, total in self.totals.items()
        ]
        return to_unit_range(torch.stack(resized).mean(dim=0).flatten(2)).unflatten(-1, (rows, columns))


def to_unit_range(maps: Tensor) -> Tensor:
    """Scaled to [0, 1] along the last axis; the official 1e-5 keeps the map of an empty phrase at 0."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    return (maps - low) / (high - low + 1e-5)
