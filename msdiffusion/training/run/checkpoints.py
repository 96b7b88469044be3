"""What a run leaves to go on from and to draw with: its newest state, its best weights, the adapter as a directory.

A checkpoint is only ever written between two optimizer steps, after the validation of its step where there is one,
under another name that then takes the old one's place. So whatever is found after a kill is whole, and a resumed run
neither repeats nor leaves out a step or a validation.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from msdiffusion.errors import RequestError
from msdiffusion.training.run.every_n_steps import EveryNSteps
from msdiffusion.training.run.run_folder import (
    ADAPTER_FOLDER,
    BEST,
    BEST_FOLDER,
    FOLDER,
    LAST,
    PLACES,
    existing,
    in_root,
    set_aside,
)
from msdiffusion.training.run.saving import (
    WholeFiles,
    check_finite,
    export,
    random_states,
    restore_random_states,
    save_whole,
)


class RunCheckpoint(pl.callbacks.ModelCheckpoint):
    """Keeps a run's newest state and its best weights in the trainer's root directory.

    - ``checkpoints/last.ckpt``: everything that training goes on from (``--ckpt_path last``).
    - ``checkpoints/best.ckpt``: the weights alone, of the validation with the best score so far; and ``best/``, the
      same as a directory that ``MSDiffusion.from_pretrained`` takes. The score survives a resume.

    A trial, ``fast_dev_run``, keeps nothing.

    It is a ModelCheckpoint so that ``Trainer.fit(ckpt_path="last")`` finds the file, but decides by itself when to
    write: Lightning's own writes a checkpoint before the validation of its step, which a resumed run then leaves out.

    Args:
        every_n_steps: optimizer steps between two states; the end of the run is always kept.
        every_n_minutes: also keep the state when so many minutes have passed since the last one; None: by steps alone.
        monitor: what is best, a name that validation logs; None: keep no best weights.
        mode: "min" or "max": which end of it is better.

    Raises:
        RequestError: at construction, if a number or the mode is out of range; at the first validation, if it logs no
            ``monitor``.
        TrainingError: before anything is written, if a weight is not a finite number.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        every_n_minutes: float | None = None,
        monitor: str | None = "validation/loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if every_n_steps < 1:
            raise RequestError(f"every_n_steps must be at least 1, got {every_n_steps}")
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise RequestError(f"every_n_minutes must be above 0, or null for none, got {every_n_minutes}")
        if mode not in ("min", "max"):
            raise RequestError(f"mode must be 'min' or 'max', got {mode!r}")
        super().__init__(filename="last", every_n_train_steps=every_n_steps, enable_version_counter=False)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.best_monitor, self.best_mode = monitor, mode
        self.best_score: float | None = None
        self.best_step: int | None = None
        self._saved_step = self._seen_step = 0
        self._saved_at = time.monotonic()
        self._pending = False
        self._random_states: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """The same whatever the settings, so that other intervals don't lose the best score."""
        return "RunCheckpoint"

    def state_dict(self) -> dict[str, Any]:
        """The best score and its step."""
        state = {"monitor": self.best_monitor, "mode": self.best_mode}
        return {**state, "best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the best score, unless now something else is called best."""
        if (state_dict.get("monitor"), state_dict.get("mode")) == (self.best_monitor, self.best_mode):
            self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Only now is the root directory known."""
        self.dirpath = str(in_root(trainer, FOLDER))
        best = Path(self.dirpath) / BEST
        self.best_model_path = str(best) if best.exists() else ""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # others are of somebody's own choice
            trainer.strategy.checkpoint_io = WholeFiles()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step that a resumed run starts from is saved already; what a new one finds gets other names."""
        set_aside(trainer, *PLACES)
        # it goes on from a checkpoint of another folder; the first process renames, so it alone knows what is there
        if trainer.strategy.broadcast(existing(in_root(trainer, FOLDER) / BEST) is None):
            self.best_score = self.best_step = None
            self.best_model_path = ""
        self._saved_step = self._seen_step = trainer.global_step
        self._saved_at = time.monotonic()
        if self._random_states is not None and trainer.is_global_zero:
            restore_random_states(self._random_states)
        self._random_states = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Saves after an optimizer step that is due; where its validation comes next, after that."""
        if trainer.global_step == self._seen_step and not self._pending:
            return  # gradients are being accumulated: between two steps there is nothing to go on from
        self._seen_step = trainer.global_step
        self._pending = self._pending or self._is_due(trainer)
        if self._pending and not _validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the weights if they are the best so far, then the state if it is due."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.best_monitor is not None:
            self._keep_best(trainer, pl_module)
        if self._pending:
            self._save(trainer)

    def on_train_epoch_end(self, *_: Any) -> None:
        """Nothing: the last step of an epoch is a step like any other."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The end of the run, where another callback has ended it early."""
        if trainer.global_step > self._saved_step:
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Nothing: in the middle of a step there is no state to go on from."""

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the states of the generators. Nothing of ours depends on them; what a user adds may."""
        checkpoint["random_states"] = random_states()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the generators' states until training starts; other settings of the optimizer replace the old ones."""
        self._random_states = checkpoint.get("random_states")
        follow_settings(checkpoint, dict(pl_module.hparams))

    def _is_due(self, trainer: pl.Trainer) -> bool:
        due = trainer.global_step % self.every_n_steps == 0 or _is_last_step(trainer) or stop_wanted(trainer)
        if self.every_n_minutes is None:
            return due
        by_clock = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        # the clocks of several processes differ, and all of them must save together
        return due or bool(trainer.strategy.broadcast(by_clock))

    def _save(self, trainer: pl.Trainer) -> None:
        if not trainer.fast_dev_run:
            save_whole(trainer, in_root(trainer, FOLDER) / LAST, weights_only=False)
        self._pending = False
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def _keep_best(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        known = sorted(name for name in metrics if not name.startswith("training/"))
        # what only the first process measures is known to it alone
        score, names = trainer.strategy.broadcast(
            (float(metrics[self.best_monitor]) if self.best_monitor in metrics else None, known)
        )
        if score is None:
            raise RequestError(
                f"RunCheckpoint.monitor is {self.best_monitor!r}, but this run's validation logs {names or 'nothing'}: "
                "choose one of these, or null to keep no best weights"
            )
        if not np.isfinite(score):
            warnings.warn(f"{self.best_monitor} is {score} at step {trainer.global_step}: not kept", stacklevel=2)
            return
        better = self.best_score is None or (
            score < self.best_score if self.best_mode == "min" else score > self.best_score
        )
        if not better or trainer.fast_dev_run:
            return
        self.best_score, self.best_step = score, trainer.global_step
        path = in_root(trainer, FOLDER) / BEST
        save_whole(trainer, path, weights_only=True)
        self.best_model_path = str(path)
        export(trainer, module, in_root(trainer, BEST_FOLDER))

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        # Lightning asks before setup
        path = existing(in_root(trainer, FOLDER) / LAST)
        return set() if path is None else {str(path)}


class AdapterExport(EveryNSteps):
    """Writes the adapter directory that ``MSDiffusion.from_pretrained`` takes, over and over at the same place.

    Args:
        every_n_steps: see ``EveryNSteps``.
        directory: of the adapter; None for ``adapter`` in the trainer's root directory.

    Raises:
        TrainingError: when a weight is not a finite number; what was written before stays.
    """

    def __init__(self, every_n_steps: int = 1000, directory: str | None = None) -> None:
        super().__init__(every_n_steps)
        self.directory = directory

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What a new run finds of an earlier one gets other names."""
        set_aside(trainer, *PLACES)
        super().on_train_start(trainer, pl_module)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Nothing is written from weights that are no numbers."""
        check_finite(trainer, module)

    def act(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write it."""
        module.save_pretrained(in_root(trainer, ADAPTER_FOLDER) if self.directory is None else self.directory)


def follow_settings(checkpoint: dict[str, Any], settings: dict[str, Any]) -> None:
    """Put learning rate and weight decay of the run that goes on into the optimizer's saved state.

    There the old values would win over those of the command line, silently. What is equal is not touched.

    Args:
        checkpoint: as loaded; changed in place.
        settings: hyperparameters of the module that goes on.

    Raises:
        RequestError: the learning rate was 0 and is not any more.
    """
    before = checkpoint.get("hyper_parameters", {})
    groups = [group for state in checkpoint.get("optimizer_states", ()) for group in state["param_groups"]]
    old, new = before.get("learning_rate"), settings.get("learning_rate")
    if None not in (old, new) and old != new:
        if old == 0:
            raise RequestError(
                f"learning_rate was 0 in the checkpoint, so there is no course to scale to {new}: start a new run from "
                "its weights, with model.init_args.adapter and the run's folder best/"
            )
        for group in groups:
            group["lr"] *= new / old
            if "initial_lr" in group:
                group["initial_lr"] *= new / old
        for schedule in checkpoint.get("lr_schedulers", ()):
            for name in ("base_lrs", "_last_lr"):
                if name in schedule:
                    schedule[name] = [rate * new / old for rate in schedule[name]]
    decay = settings.get("weight_decay")
    if decay is not None and before.get("weight_decay") not in (None, decay):
        for group in groups:
            group["weight_decay"] = decay


def stop_wanted(trainer: pl.Trainer) -> bool:
    """Whether a signal asks the run to stop after this step (see ``failures.FailureGuard``)."""
    return any(getattr(callback, "stopping", None) is not None for callback in trainer.callbacks)


def _is_last_step(trainer: pl.Trainer) -> bool:
    loop = trainer.fit_loop
    if trainer.global_step >= trainer.max_steps > 0:
        return True
    in_last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return in_last_epoch and loop.epoch_loop.batch_progress.is_last_batch


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates right after this batch: it asks the same, a moment later."""
    loop = trainer.fit_loop.epoch_loop
    if not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
        return False
    loop.val_loop.setup_data()
    return not loop.val_loop.skip
