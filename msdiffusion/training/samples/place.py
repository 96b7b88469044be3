"""How far a run came in its data, and how that stands to what Lightning counts.

Lightning's count of epochs is not that of the data: it takes an epoch for ended when ``max_steps`` or a stop comes in
the middle of one, and goes on with its next epoch when such a run is resumed; and when a run of ``max_steps`` is
resumed from a checkpoint of the very end of an epoch, it trains one batch of the old one more. Here the place in the
data is what counts, and Lightning is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msdiffusion.errors import RequestError

if TYPE_CHECKING:
    from pytorch_lightning.loops import _FitLoop

ANEW = "Start a new run from its weights: without --ckpt_path, with --model.init_args.adapter DIRECTORY"


@dataclass
class Place:
    """A place in the order of a run; the loader moves it on."""

    epoch: int = 0
    start: int = 0
    """Batches of this epoch that were taken before this run began, or before the epoch was begun again."""
    taken: int = 0
    """Batches of this epoch that were taken so far, those included."""

    def begin_epoch(self) -> None:
        """Lightning begins another epoch: so does the data, if anything of the old one was taken."""
        if self.taken > self.start:
            self.epoch += 1
            self.start = self.taken = 0

    def to_resume(self, fit_loop: _FitLoop, batches_per_epoch: int) -> tuple[int, int]:
        """(epoch, batch) where a run goes on that is resumed from a checkpoint of this moment.

        A batch counts as trained when Lightning will not train it again: when its step is done, also where the
        checkpoint is written before Lightning has counted it (in ``on_train_batch_end``); but not where an exception
        came in between.

        Args:
            batches_per_epoch: of the data; Lightning may be told to train fewer.
        """
        batch = self.start
        if self.taken > self.start:
            progress = fit_loop.epoch_loop.batch_progress
            stepped = progress.total.ready == progress.total.started == progress.total.processed
            batch = min(self.taken, progress.current.ready if stepped else progress.current.completed)
        if batch >= min(batches_per_epoch, fit_loop.max_batches):
            return self.epoch + 1, 0
        return self.epoch, batch


def tell_lightning(fit_loop: _FitLoop, place: Place) -> None:
    """Correct what a resumed Lightning believes about its epoch, before the first batch is asked for.

    Args:
        fit_loop: of a trainer that has read a checkpoint, but has not begun.
        place: where the data go on.
    """
    epochs, batches = fit_loop.epoch_progress, fit_loop.epoch_loop.batch_progress
    if place.start == 0 and batches.is_last_batch and batches.total.completed < batches.total.processed:
        # from the end of an epoch's last batch: Lightning goes on with the next epoch, but never counts it as begun
        for count in (epochs.current, epochs.total):
            count.ready += 1
            count.started += 1
            count.processed += 1
            count.completed += 1
        batches.is_last_batch = False
        return
    if not 0 < epochs.current.ready == epochs.current.processed:
        return  # the checkpoint is from within an epoch: there Lightning is right
    if place.start > 0:
        for count in (epochs.current, epochs.total):
            count.processed = count.completed = count.ready - 1
        fit_loop.restarting = True  # now Lightning finds the epoch unfinished
    elif fit_loop.restarting:
        for count in (epochs.current, epochs.total):
            count.completed = count.processed
        fit_loop.epoch_loop.restarting = False  # so that it begins an epoch, with all its counts at 0


def resumed_place(state: dict[str, Any], identity: dict[str, Any], fit_loop: _FitLoop) -> Place:
    """The place that a checkpoint names; Lightning is told.

    Args:
        state: "epoch", "batch", and "data": what they are a place in. Empty where the checkpoint names none.
        fit_loop: of a trainer that has read the checkpoint, but has not begun.

    Raises:
        RequestError: if there is no place, or the data are others than those of the checkpoint.
    """
    if not state:
        raise RequestError(
            f"the checkpoint does not say how far it came in its data, so nothing can go on from it. {ANEW}"
        )
    theirs = state["data"]
    differing = [name for name in identity if identity[name] != theirs.get(name)]
    if differing:
        told = "; ".join(f"{name}: {theirs.get(name)} then, {identity[name]} now" for name in differing)
        way = "Resume with the same data"
        if "batches of an epoch" in differing:
            way = (
                "Resume with the trainer.accumulate_grad_batches of then; if an earlier version wrote it, whose epochs "
                "ended in part of a step, with one that divides the batches of an epoch"
            )
        raise RequestError(
            f"the checkpoint was written with other data, so there is no place in these to go on from ({told}). "
            f"{way}. Or: {ANEW}"
        )
    place = Place(state["epoch"], state["batch"], state["batch"])
    tell_lightning(fit_loop, place)
    return place
