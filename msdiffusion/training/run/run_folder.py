"""What lies in a run's folder, the trainer's ``default_root_dir``, and what becomes of it when another run begins."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_info

from data_pipeline.models.weights import check_weights
from msdiffusion.errors import RequestError, refused_weights

FOLDER = "checkpoints"
LAST, BEST = "last.ckpt", "best.ckpt"
ADAPTER_FOLDER, BEST_FOLDER = "adapter", "best"
PLACES = (BEST_FOLDER, ADAPTER_FOLDER, f"{FOLDER}/{BEST}", f"{FOLDER}/{LAST}")
"""Where what a run has learned lies, in the order in which it is wanted."""
_SET_ASIDE = re.compile(rf"({Path(LAST).stem}|{Path(BEST).stem})\.\d+\.ckpt(\.old)?")
"""Checkpoints of other runs, which ``rename_free`` has named. Lightning's own may have numbers in their names too."""
_WRITTEN = ("*.safetensors", "*/*.safetensors", "step_*.png")


def in_root(trainer: pl.Trainer, name: str) -> Path:
    """A place in the run's directory, the trainer's ``default_root_dir``: one setting moves everything."""
    return Path(trainer.default_root_dir) / name


def writes(trainer: pl.Trainer) -> bool:
    """Whether this process writes in the run's directory: the first one, unless it is a trial, ``fast_dev_run``."""
    return trainer.is_global_zero and not trainer.fast_dev_run


def existing(path: Path) -> Path | None:
    """A checkpoint that ``save_whole`` wrote, also if it was killed between two renames; None where there is none."""
    old = path.with_name(path.name + ".old")
    return path if path.exists() else old if old.exists() else None


def check_checkpoint(module: pl.LightningModule, checkpoint: Mapping[str, Any], source: str | Path) -> None:
    """Raise unless the weights in a checkpoint are those of a module, before it is given any.

    Args:
        module: with its networks, whole or split over processes; nothing is changed.
        checkpoint: what Lightning has read. Without weights it passes: some strategies have taken them out by then.

    Raises:
        WeightsError: names file and tensor.
    """
    if "state_dict" in checkpoint:
        with refused_weights():
            check_weights(module, checkpoint["state_dict"], source, counters=False)


def set_aside(trainer: pl.Trainer, *names: str) -> None:
    """Rename what an earlier run has left, unless this run goes on with it: ``best`` to ``best.1``, and so on.

    Otherwise whoever asks for this run's best weights before its first validation would be handed those of the other
    one. Names stay in their folder, because adapters name their base model relative to it. Called when training starts,
    in every process; the first one acts.

    Args:
        trainer: of a run that has read its checkpoint, if it has one, and has not begun.
    """
    if writes(trainer) and not continues(trainer):
        rename_free([in_root(trainer, name) for name in names])


def continues(trainer: pl.Trainer) -> bool:
    """Whether a run goes on with what is in its folder: from a checkpoint of it, or in a further fit of a trainer."""
    if trainer.ckpt_path is None:
        return trainer.global_step > 0
    origin = Path(trainer.ckpt_path).resolve()
    return origin.is_relative_to(in_root(trainer, FOLDER).resolve()) and not _SET_ASIDE.fullmatch(origin.name)


def rename_free(paths: Sequence[Path]) -> list[Path]:
    """Rename what is there of ``paths`` so that all get the same number, the first that is free; say so.

    Returns:
        The new paths.

    Raises:
        RequestError: another process works in the same folder.
    """
    present = [(path, found) for path in paths if (found := existing(path)) is not None and _of_a_run(found)]
    number, named = 1, [path for path, _ in present]
    while present:
        named = [path.with_name(f"{path.stem}.{number}{path.suffix}") for path, _ in present]
        if not any(path.exists() for path in named):
            break
        number += 1
    for (path, found), new in zip(present, named, strict=True):
        _rename(found, new)
        if (old := path.with_name(path.name + ".old")).exists():  # or ``existing`` would take it for the new run's
            _rename(old, new.with_name(new.name + ".old"))
    if named:
        rank_zero_info(f"of an earlier run, kept as: {', '.join(map(str, named))}")
    return named


def _rename(path: Path, new: Path) -> None:
    """Rename to a name that nothing has, not even since somebody looked."""
    try:
        if path.is_dir():
            path.rename(new)  # never over a folder that holds something
        else:
            new.touch(exist_ok=False)  # to be replaced at once: another process that comes to this line is told
            try:
                path.replace(new)
            except OSError:
                new.unlink()
                raise
    except OSError as error:
        raise RequestError(
            f"{path} cannot be renamed to {new.name}: another process works in this folder, it seems "
            f"({error.strerror}); give each run a folder of its own (trainer.default_root_dir)"
        ) from error


def _of_a_run(path: Path) -> bool:
    """A file, a checkpoint in a folder, or a folder with what a run writes: without a root, others may lie here too."""
    return not path.is_dir() or ".ckpt" in path.name or any(any(path.glob(name)) for name in _WRITTEN)


class EarlierRun(pl.Callback):
    """What an earlier run has learned gets other names when a new one begins, whichever callbacks that one has."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See ``set_aside``."""
        set_aside(trainer, *PLACES)
