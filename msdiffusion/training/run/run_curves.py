"""The callback that takes down what a run logs, for its curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from msdiffusion.training.curves import HEADER, PICTURE, TABLE, draw_curves, keep_until, read_curves
from msdiffusion.training.run.run_folder import in_root, set_aside, writes


class RunCurves(pl.Callback):
    """Keeps ``metrics.csv`` and draws ``curves.png`` after every validation and at the end, in the run's directory.

    Training's own numbers are taken down every ``log_every_n_steps`` steps, as for the loggers, and the learning rate
    with them; those of a validation when it ends. Only the first process writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines = 0
        self._drawn: int | None = None
        self._resumed: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many lines there are: those that come later are not of a run that is resumed from here."""
        return {"lines": self._lines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self._resumed = state_dict["lines"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run keeps the lines up to the state that it goes on from; a new one leaves the table to its run."""
        set_aside(trainer, TABLE, PICTURE)
        if writes(trainer):
            self._lines = keep_until(in_root(trainer, TABLE), trainer.global_step, self._resumed)
        self._resumed = self._drawn = None
        self._written = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Takes down the numbers of a step that is logged."""
        step = trainer.global_step
        if step == self._written or step % trainer.log_every_n_steps:
            return
        self._written = step
        if writes(trainer):
            rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups[:1]]
            found = {f"training/learning_rate{f'_{i}' if i else ''}": rate for i, rate in enumerate(rates)}
            self._write(trainer, {**found, **_named(trainer, "training/")})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes down what the validation says, and draws."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and writes(trainer):
            self._write(trainer, _named(trainer, "validation/"))
            self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the whole run."""
        if writes(trainer):
            self._draw(trainer)

    def _write(self, trainer: pl.Trainer, numbers: Mapping[str, float]) -> None:
        path = in_root(trainer, TABLE)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([HEADER] if new else [])
            writer.writerows((trainer.global_step, name, repr(value)) for name, value in numbers.items())
        self._lines += len(numbers)

    def _draw(self, trainer: pl.Trainer) -> None:
        path = in_root(trainer, TABLE)
        if path.exists() and self._drawn != self._lines:
            draw_curves({"": read_curves(path)}, in_root(trainer, PICTURE))
            self._drawn = self._lines


def _named(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
    metrics = trainer.callback_metrics
    # where something is logged per step and per epoch, Lightning gives the step's value under another name, too
    return {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}
