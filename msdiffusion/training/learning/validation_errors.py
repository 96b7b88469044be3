"""The error at fixed timesteps, summed over a validation: exact for any number of processes and any batch size.

Shape letters: B batch, K timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class TimestepErrors:
    """Sums of errors per timestep, kept on the device: nothing waits for it before the end.

    Args:
        timesteps: K numbers, for the names of the results.
        device: where the errors come from.
    """

    def __init__(self, timesteps: Sequence[int], device: torch.device | str) -> None:
        self.timesteps = list(timesteps)
        # double, so that the order in which batches come changes nothing that anybody sees
        kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._sums = torch.zeros(len(self.timesteps), 4, dtype=kind, device=device)

    def add(self, places: Tensor, errors: Tensor, inside: Tensor, has_inside: Tensor, weights: Tensor) -> None:
        """Count a batch.

        Args:
            places: int64 (B,), which of the timesteps each sample had.
            errors: (B,), of the whole picture.
            inside: (B,), inside the boxes.
            has_inside: bool (B,), whether there is a box.
            weights: (B,), 0 for a sample that shall not count.
        """
        boxed = weights * has_inside
        rows = torch.stack([errors * weights, weights, inside * boxed, boxed], dim=1)
        self._sums.index_add_(0, places, rows.to(self._sums.dtype))

    def results(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the timesteps that occurred, "loss" and "loss_in_boxes", and "loss_t300" of each of them.

        Args:
            reduce: sums a tensor over all processes.
        """
        total, count, inside, boxed = reduce(self._sums).cpu().unbind(dim=1)
        seen = count > 0
        if not seen.any():
            return {}
        means = total[seen] / count[seen]
        results = {"loss": float(means.mean())}
        if (boxed > 0).any():
            results["loss_in_boxes"] = float((inside[boxed > 0] / boxed[boxed > 0]).mean())
        names = (timestep for timestep, flag in zip(self.timesteps, seen.tolist(), strict=True) if flag)
        return results | {f"loss_t{name}": mean for name, mean in zip(names, means.tolist(), strict=True)}
