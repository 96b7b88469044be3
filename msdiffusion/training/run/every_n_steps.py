"""What several callbacks share: acting every n optimizer steps, in the first process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl

from msdiffusion.errors import RequestError


@contextmanager
def in_first_process(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[bool]:
    """Gives whether this is the process that acts. Within it the trained adapter is whole there, even if it is split.

    Every process must come here, because a split adapter is gathered from all of them.
    """
    if trainer.world_size == 1 or not hasattr(module, "trained_adapter"):
        yield trainer.is_global_zero
        return
    from msdiffusion.training.learning.sharding import whole_weights

    with whole_weights(module):
        yield trainer.is_global_zero


class EveryNSteps(pl.Callback):
    """Calls ``act`` after every n optimizer steps, and at the end of the run unless that step was just acted on.

    Not in a trial, ``fast_dev_run``: what it has learned is not worth a place in a run's folder.

    Args:
        every_n_steps: at least 1.

    Raises:
        RequestError: if it is less.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise RequestError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def act(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What is done; only the first of several processes does it."""
        raise NotImplementedError(f"{type(self).__name__} must say what it does every n steps")

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """What all processes do together before; nothing unless overridden."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run has acted on the step it starts from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Counts optimizer steps, not batches: with accumulated gradients several batches make one step."""
        if trainer.global_step % self.every_n_steps == 0:
            self._act_once(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step is always acted on."""
        self._act_once(trainer, pl_module)

    def _act_once(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step > self._last_step and not trainer.fast_dev_run:
            self._last_step = trainer.global_step
            self.prepare(trainer, module)
            with in_first_process(trainer, module) as here:
                if here:
                    self.act(trainer, module)
