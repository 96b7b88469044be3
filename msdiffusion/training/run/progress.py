"""How a run shows where it is, and how much of its time it waits for the loader."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.profilers import Profiler
from tqdm.auto import tqdm

FETCH = "train_dataloader_next"
"""What Lightning calls, in its profiler, the time from asking for a training batch until it is there."""


class RunProgress(pl.callbacks.ProgressBar):
    """One bar over the whole run, with the time that is left. Lightning's own starts again with every epoch.

    It also logs, every ``log_every_n_steps`` steps and over the steps since the last time:

    - ``training/waiting_share``: the share of the time in which the next batch was waited for. With ``num_workers`` 0
      that is all of the loading; on a GPU, which works on meanwhile, it is an upper bound.
    - ``training/samples_per_second``: of all processes together, validation and what else comes between left out.

    ``lightning validate``, ``test`` and ``predict`` have a bar over their batches.

    Args:
        refresh_seconds: time between two updates of the bar.
    """

    def __init__(self, refresh_seconds: float = 1.0) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (Lightning calls this in all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Puts a clock beside the run's profiler."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not isinstance(trainer.profiler, FetchClock):
            trainer.profiler = FetchClock(trainer.profiler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run starts where it was."""
        self._bar = self._new_bar("training", trainer.estimated_stepping_batches, trainer.global_step, "step")
        self._shown = time.monotonic()
        self._samples = self._window_samples = 0
        self._seconds = self._window_seconds = 0.0
        self._logged_step = trainer.global_step
        self._loss: float | None = None
        self._batch_start: float | None = None
        trainer.profiler.take()

    def on_train_batch_start(self, *_: Any) -> None:
        """Starts the clock of this batch."""
        self._batch_start = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves by optimizer steps; shows a smoothed loss, the last validation's, and the samples per second."""
        now = time.monotonic()
        self._window_samples += len(batch) * trainer.world_size
        self._window_seconds += now - self._batch_start
        # Lightning logs at the steps that are a multiple of log_every_n_steps: the window ends there
        if trainer.global_step != self._logged_step and trainer.global_step % trainer.log_every_n_steps == 0:
            self._log_speed(trainer, pl_module, len(batch))
        # reading the loss waits for the device, so not at every step
        if self._enabled and now - self._shown >= self.refresh_seconds:
            self._shown = now
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
            self._bar.set_postfix(self._numbers(trainer), refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the full bar on the screen."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the message starts on its own line."""
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar of its own over the batches, outside of training."""
        if trainer.state.fn == "validate":
            self._bar = self._new_bar("validation", sum(trainer.num_val_batches), 0, "batch")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar over the batches."""
        self._bar = self._new_bar("test", sum(trainer.num_test_batches), 0, "batch")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A bar over the batches."""
        self._bar = self._new_bar("pictures", sum(trainer.num_predict_batches), 0, "batch")

    def on_validation_batch_end(self, trainer: pl.Trainer, *arguments: Any, **named: Any) -> None:
        """One batch further."""
        if trainer.state.fn != "fit":
            self._bar.update()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the full bar on the screen."""
        if trainer.state.fn != "fit":
            self._close()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def _log_speed(self, trainer: pl.Trainer, module: pl.LightningModule, batch_size: int) -> None:
        waited = trainer.profiler.take()
        whole = self._window_seconds + waited
        if whole > 0:
            speed = self._window_samples / whole
            module.log("training/waiting_share", waited / whole, batch_size=batch_size)
            module.log("training/samples_per_second", speed, batch_size=batch_size)
        self._samples += self._window_samples
        self._seconds += whole
        self._window_samples, self._window_seconds = 0, 0.0
        self._logged_step = trainer.global_step

    def _numbers(self, trainer: pl.Trainer) -> dict[str, str]:
        numbers = {"loss": f"{self._loss:.4f}"}
        if "validation/loss" in trainer.callback_metrics:
            numbers["validation"] = f"{float(trainer.callback_metrics['validation/loss']):.4f}"
        seconds = self._seconds + self._window_seconds + trainer.profiler.waited
        numbers["samples/s"] = f"{(self._samples + self._window_samples) / max(seconds, 1e-9):.1f}"
        return numbers

    def _new_bar(self, label: str, total: float, start: int, unit: str) -> tqdm:
        return tqdm(
            desc=label,
            total=total,  # infinite for a run without an end: then no time left is shown
            initial=start,
            unit=unit,
            mininterval=self.refresh_seconds,
            dynamic_ncols=True,
            disable=not self._enabled,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class FetchClock(Profiler):
    """A profiler that adds up the time in which batches were waited for, and hands everything on to the run's own."""

    def __init__(self, inner: Profiler) -> None:
        super().__init__(dirpath=inner.dirpath, filename=inner.filename)
        self.inner = inner
        self.waited = 0.0
        """Seconds since ``take`` was called last."""
        self._since: float | None = None

    def start(self, action_name: str) -> None:
        """Lightning calls this when something begins."""
        if action_name.endswith(FETCH):
            self._since = time.monotonic()
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        """Lightning calls this when it has ended."""
        self.inner.stop(action_name)
        if action_name.endswith(FETCH) and self._since is not None:
            self.waited += time.monotonic() - self._since
            self._since = None

    def take(self) -> float:
        """Seconds that were waited since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Hands on."""
        if hasattr(self, "_lightning_module"):  # Lightning gives the module to the profiler that it knows
            self.inner._lightning_module = self._lightning_module
        self.inner.setup(stage, local_rank, log_dir)

    def teardown(self, stage: str | None) -> None:
        """Hands on."""
        self.inner.teardown(stage)

    def summary(self) -> str:
        """What the other profiler says."""
        return self.inner.summary()

    def describe(self) -> None:
        """Hands on."""
        self.inner.describe()
