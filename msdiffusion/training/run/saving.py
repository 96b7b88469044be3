"""Checkpoints that are whole or not there, and never of weights that are no numbers."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from msdiffusion.errors import TrainingError, reason
from msdiffusion.training.run.every_n_steps import in_first_process
from msdiffusion.training.run.run_folder import FOLDER, LAST, existing, in_root


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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
