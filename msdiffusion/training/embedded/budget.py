"""Training within a budget of steps or minutes: what the parts of the embedded base share.

On a machine of unknown speed a number of steps says little, so the learning rate can follow the clock instead.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from data_pipeline.models.weights import check_weights
from msdiffusion.errors import WeightsError, refused_weights
from msdiffusion.training.processes import process_rank
from msdiffusion.training.run.run_folder import check_checkpoint, continues, rename_free, writes

STOP_EVERY = 12
"""A run ends at a multiple of this many steps: where processes of `local_sgd` have exchanged their clocks."""


class BudgetedTraining(pl.LightningModule):
    """What both pretrainings share: a time or step budget, linear decay over its last part, EMA, export.

    Its classes take these arguments, and save them as hyperparameters:

    Args:
        output: folder that receives the trained part.
        learning_rate: peak learning rate.
        max_steps: steps of the whole budget.
        budget_minutes: ends the run earlier when this much training time has passed (time before a resume counts);
            None for steps only. On a shared machine the decay then still reaches zero.
        decay_share: last share of the budget over which the learning rate falls linearly to zero.
        warmup_steps: linear rise at the start.
        ema_decay: of the averaged weights that are exported.
        export_minutes: how often the averaged weights are written to `output`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elapsed = 0.0
        self._goes_on = False
        self._last_tick = self._last_export = time.monotonic()

    def trained_modules(self) -> nn.ModuleDict:
        """The modules whose weights are averaged and exported."""
        raise NotImplementedError(f"{type(self).__name__} must say which modules it trains")

    def export(self) -> None:
        """Writes the trained part, with averaged weights in place, to `output`."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is saved")

    def prepare_average(self) -> None:
        """Starts the moving average; called once the modules exist."""
        self.average = {name: p.detach().clone() for name, p in self.trained_modules().named_parameters()}

    @property
    def progress(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        p = self.hparams
        by_time = self.elapsed / (60 * p.budget_minutes) if p.budget_minutes is not None else 0.0
        return min(1.0, max(self.global_step / p.max_steps, by_time))

    def set_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Trapezoid: warm-up, constant, linear decay."""
        p = self.hparams
        decay = min(1.0, (1 - self.progress) / p.decay_share)
        rate = p.learning_rate * decay * min(1.0, (self.global_step + 1) / max(1, p.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate

    def on_train_start(self) -> None:
        """The clock starts after rendering. What another run has exported there gets another name."""
        goes_on = self._goes_on or continues(self.trainer)
        if process_rank() == 0 and writes(self.trainer) and not goes_on:
            rename_free([Path(self.hparams.output)])
        self._last_tick = self._last_export = time.monotonic()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Sets the learning rate of this step."""
        self.set_learning_rate(self.optimizers())

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Averages the weights, counts the time, exports now and then, and stops at the end of the budget."""
        # Before this process adds its own time: at a step of the exchange all processes then decide alike.
        if self.progress >= 1.0 and (self.global_step % STOP_EVERY == 0 or self.global_step >= self.hparams.max_steps):
            self.trainer.should_stop = True
        now = time.monotonic()
        self.elapsed += now - self._last_tick
        self._last_tick = now
        decay = min(self.hparams.ema_decay, (1 + self.global_step) / (10 + self.global_step))
        parameters = dict(self.trained_modules().named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [parameters[n].detach() for n in self.average], 1 - decay)
        self.log("progress", self.progress, prog_bar=True)
        if now - self._last_export > 60 * self.hparams.export_minutes:
            self.export_average()
            self._last_export = self._last_tick = time.monotonic()

    @torch.no_grad()
    def export_average(self) -> None:
        """Swaps the averaged weights in, exports, and swaps the training weights back; in the first process only."""
        if process_rank() > 0 or self.trainer.fast_dev_run:
            return
        parameters = dict(self.trained_modules().named_parameters())
        backup = {name: p.detach().clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.copy_(self.average[name])
        self.eval()
        self.export()
        self.train()
        for name, p in parameters.items():
            p.copy_(backup[name])

    def on_train_end(self) -> None:
        """Exports the final weights."""
        self.export_average()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the average and the clock."""
        checkpoint["average"], checkpoint["elapsed"] = self.average, self.elapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the average and the clock. A run of the same output is this one, wherever its checkpoints lie.

        Raises:
            WeightsError: a tensor is lacking, left over, of another shape or kind, or holds numbers that are none.
        """
        source = (None if self._trainer is None else self.trainer.ckpt_path) or "the checkpoint"
        if not isinstance(checkpoint.get("average"), dict) or not isinstance(checkpoint.get("elapsed"), (int, float)):
            raise WeightsError(f"{source} lacks its average or its clock: it is of no pretraining of this kind")
        check_checkpoint(self, checkpoint, source)
        trained = self.trained_modules()
        buffers = [name for name, _ in trained.named_buffers()]
        with refused_weights():
            check_weights(trained, checkpoint["average"], f"the average in {source}", may_lack=buffers)
        self._goes_on = checkpoint.get("hyper_parameters", {}).get("output") == self.hparams.output
        self.average, self.elapsed = checkpoint["average"], checkpoint["elapsed"]
