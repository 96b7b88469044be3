"""Validation by the error at fixed timesteps: exact for any number of processes and any batch size.

Shape letters: B batch, K timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor

from msdiffusion.training.learning.objective import sample_errors, subject_area
from msdiffusion.training.samples.batch import PairsBatch


class TimestepErrors:
    """Sums of errors per timestep, kept on the device: nothing waits for it before the end.

    Args:
        timesteps: K numbers, for the names of the results.
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


class TimestepValidation(pl.LightningModule):
    """Validation and test of a module that predicts noise: ``encode``, ``predict_noise`` and ``trained_adapter``."""

    validation_timesteps: list[int]
    """Of which each pair has one, the same at every validation."""

    def on_validation_epoch_start(self) -> None:
        """Nothing is counted yet."""
        self._errors = TimestepErrors(self.validation_timesteps, self.device)

    def validation_step(self, batch: PairsBatch, batch_index: int) -> None:
        """The plain square error with nothing dropped; timestep and noise of a pair are the same at every validation.

        Weights of the loss, which recipes differ in, don't enter, so that recipes can be compared.
        """
        inputs = self.encode(batch)
        places = batch.numbers % len(self.validation_timesteps)
        timesteps = torch.tensor(self.validation_timesteps).to(self.device, non_blocking=True)[places]
        prediction, target = self.predict_noise(self.trained_adapter, inputs, batch.draws.noise, timesteps)
        area = subject_area(inputs.boxes, *inputs.latents.shape[-2:])
        inside = sample_errors(prediction, target, area)
        has_inside = area.flatten(1).any(dim=1)
        self._errors.add(places, sample_errors(prediction, target), inside, has_inside, batch.weights)

    def on_validation_epoch_end(self, stage: str = "validation") -> None:
        """Logs the mean over the timesteps and each of them, over the pairs of all processes."""
        results = self._errors.results(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        for name, value in results.items():
            # the same in all processes already; the mean that Lightning takes of them changes nothing
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", sync_dist=True)

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        """As for validation, under "test/"."""
        self.on_validation_epoch_end("test")
