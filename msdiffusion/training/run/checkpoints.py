"""What a run leaves to go on from and to draw with: its newest state, its best weights, the adapter as a directory.

A checkpoint is only ever written between two optimizer steps, after the validation of its step where there is one,
under another name that then takes the old one's place. So whatever is found after a kill is whole, and a resumed run
neither repeats nor leaves out a step or a validation.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from msdiffusion.errors import RequestError, TrainingError, reason
from msdiffusion.training.run.every_n_steps import EveryNSteps, in_first_process
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

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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


def export(trainer: pl.Trainer, module: pl.LightningModule, directory: Path) -> None:
    """Write a module's adapter directory; nothing for modules that have no such thing. Every process calls this."""
    if hasattr(module, "save_pretrained"):
        with in_first_process(trainer, module) as here:
            if here:
                module.save_pretrained(directory)


def save_whole(trainer: pl.Trainer, path: Path, weights_only: bool) -> None:
    """Save a checkpoint in place of the one that is there, which stays whole until the new one is.

    Args:
        trainer: of the run; every process calls this.
        path: of the file, or of the folder where the strategy writes one.
        weights_only: leave out optimizer, schedule and callbacks.

    Raises:
        TrainingError: a weight is not a finite number, or the file could not be written (a full disk); nothing of it
            stays, and the message names the last good checkpoint.
    """
    check_finite(trainer, trainer.lightning_module)
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
    trainer.strategy.barrier("before saving")
    try:
        trainer.save_checkpoint(partial, weights_only=weights_only)
        # where only the first process writes, the others have to hear of it
        files = getattr(trainer.strategy, "checkpoint_io", None)
        failure = trainer.strategy.broadcast(files.failure) if isinstance(files, WholeFiles) else None
        if failure is not None:
            raise TrainingError(f"{path} could not be written: {failure}; {last_good(trainer)}")
    except BaseException:
        if trainer.is_global_zero:
            _remove(partial)
        raise
    if trainer.is_global_zero:
        if partial.is_dir():  # a folder cannot take the place of another in one step: see ``existing``
            if path.exists():
                _remove(old)
                path.rename(old)
            partial.rename(path)
            _remove(old)
        else:
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # whoever wrote it
            partial.replace(path)
    trainer.strategy.barrier("after saving")


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint straight to its file.

    Lightning's own keeps the whole file in memory, then in the temporary folder, which is often small, and moves it. In
    ``save_whole`` the file has another name until it is whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: str | None = None
        """Why the last one was not written. An exception of one process would leave the others waiting for it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it, with Lightning's bytes; sets ``failure``."""
        self.failure = None
        try:
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch tells some of the system's errors in words of its own
            told: BaseException = error
            while not isinstance(told, OSError) and (told.__cause__ or told.__context__) is not None:
                told = told.__cause__ or told.__context__
            self.failure = reason(told)


def check_finite(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise unless every trained and averaged weight is a finite number, in all processes alike.

    Raises:
        TrainingError: names the first weights that are not, and the last good checkpoint.
    """
    weights = {name: getattr(weight, "to_local", lambda w=weight: w)() for name, weight in module.named_parameters()}
    finite = {name: torch.isfinite(weight.detach()).all() for name, weight in weights.items()}
    whole = not finite or bool(torch.stack(list(finite.values())).all())
    if trainer.strategy.reduce_boolean_decision(whole, all=True):
        return
    broken = [name for name, flag in finite.items() if not flag]
    where = f"{len(broken)} of {len(weights)} weights, {', '.join(broken[:3])}" if broken else "weights of others"
    raise TrainingError(
        f"the weights are not finite after step {trainer.global_step} ({where}), so nothing was saved; "
        f"{last_good(trainer)}"
    )


def last_good(trainer: pl.Trainer) -> str:
    """Where the last good checkpoint of a run is, for messages."""
    path = existing(in_root(trainer, FOLDER) / LAST)
    if path is None:  # runs may bring Lightning's own ModelCheckpoint, with a folder of its own
        written = getattr(getattr(trainer, "checkpoint_callback", None), "last_model_path", "")
        if not written:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {written}: go on from it with --ckpt_path {written}"
    return f"the last good checkpoint is {path}: go on from it with --ckpt_path last"


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


def random_states() -> dict[str, Any]:
    """States of the generators of torch, numpy and Python, of types that load with ``weights_only=True``."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()
    version, inner, following = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), place, has_gauss, gauss],
        "python": [version, list(inner), following],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo ``random_states``; on another number of GPUs theirs are left alone."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    kind, keys, place, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    version, inner, following = states["python"]
    random.setstate((version, tuple(inner), following))


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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
