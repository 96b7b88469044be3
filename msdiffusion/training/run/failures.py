"""When a run cannot go on, or shall not: which batch it was, what to try, and what was kept.

A loss that is no number ends the run before it reaches the weights (on a GPU, where looking at it at once would make
every step wait, one step later; then no checkpoint is written from these weights). Memory that runs out and loaders
that die are told with their batch. A signal lets the step end, has the state written, and ends the run.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from msdiffusion.errors import TrainingError
from msdiffusion.training.run.run_folder import in_root
from msdiffusion.training.run.saving import last_good

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEYS_SHOWN = 4
BATCH_FILE = "failed_batch_{rank}.txt"
"""In the run's folder: all keys of the batch at which this process failed, where a message has no room for them."""


class RunStoppedError(Exception):
    """A signal has ended the run between two steps, after its state was written."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Described:
    """What a message says of one batch, without its tensors."""

    step: int
    epoch: int
    rates: tuple[float, ...]
    """Learning rates of the optimizer."""
    keys: tuple[str, ...]
    """Of the pairs; none for batches of another kind."""
    size: str
    """Samples, pixels and subjects."""

    def __str__(self) -> str:
        rates = ", ".join(f"{rate:.3g}" for rate in self.rates)
        where = f"step {self.step + 1}, epoch {self.epoch}" + (f", learning rate {rates}" if rates else "")
        if not self.keys:
            return f"{where}; {self.size}"
        shown, more = self.keys[:KEYS_SHOWN], len(self.keys) - KEYS_SHOWN
        return f"{where}; {self.size}; pairs {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")


def describe(trainer: pl.Trainer, batch: Any) -> Described:
    """Names a batch, without waiting for its device."""
    keys = tuple(getattr(batch, "keys", ())) if not isinstance(batch, Mapping) else ()
    size = f"{len(keys)} samples"
    if keys:
        if hasattr(batch, "size"):
            height, width = batch.size
            size += f" of {width} x {height} pixels"
        counts = [sum(phrase != "" for phrase in row) for row in getattr(batch, "phrases", ())]
        if counts:
            size += f" with {min(counts)} to {max(counts)} subjects, padded to {len(batch.phrases[0])}"
    else:
        size = f"a batch of {type(batch).__name__}"
    rates = tuple(group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups[:1])
    return Described(trainer.global_step, trainer.current_epoch, rates, keys, size)


class FailureGuard(pl.Callback):
    """Ends a run that cannot go on with a message that helps, and one that shall stop with its state written.

    The ``lightning`` command of this project always has one.

    Args:
        check_gradients: look at the gradients too, before every step of the optimizer. Not with float16, whose scaler
            meets infinite gradients as a matter of course and leaves these steps out.

    Raises:
        TrainingError: while training, for a loss or a gradient that is not finite.
        RunStoppedError: after SIGINT (Ctrl-C) or SIGTERM, between two steps. A second SIGINT ends the run at once.
    """

    def __init__(self, check_gradients: bool = True) -> None:
        super().__init__()
        self.check_gradients = check_gradients
        self.requested: int | None = None
        """The signal that this process has got."""
        self.stopping: int | None = None
        """The signal by which all processes have agreed to stop after this step."""
        self.explanation: TrainingError | None = None
        """Of the exception that ended the run, where there is one."""
        self._seen_step = 0
        self._batch: Described | None = None
        self._trainer: pl.Trainer | None = None
        self._watched: list[_Watched] = []
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on, signals wait for the end of the step."""
        self.requested = self.stopping = None
        self._trainer, self._seen_step = trainer, trainer.global_step
        _tell_of_short_steps(trainer)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops here where it was asked to: the state is written."""
        if self.stopping is not None:
            name = signal.Signals(self.stopping).name
            raise RunStoppedError(
                self.stopping, f"stopped by {name} after step {trainer.global_step}; {last_good(trainer)}"
            )
        self._batch = describe(trainer, batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Looks at the loss."""
        self._look(trainer, "the loss", loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Looks at the gradients, before they are clipped and before they touch a weight."""
        if not self.check_gradients or getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
        gradients = [gradient for gradient in gradients if gradient.numel()]
        if gradients:
            # the norm, as clipping takes it: five times faster on a CPU than to look at every number. It overflows for
            # gradients beyond 1e19, of which no step is to be had either
            self._look(trainer, "the norm of the gradients", torch.stack(torch._foreach_norm(gradients)).sum())

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """All processes agree whether this was the last step. Between accumulated batches there is none to end at."""
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        if any(getattr(callback, "exchanges", False) for callback in trainer.callbacks):
            return  # local_sgd.WeightAveraging agrees when the weights are exchanged
        wanted = self.requested is not None
        if trainer.world_size > 1:
            wanted = trainer.strategy.reduce_boolean_decision(wanted, all=False)
        if wanted:
            self.stop(self.requested or signal.SIGTERM)

    def stop(self, number: int) -> None:
        """All processes have agreed to stop after this step, by this signal."""
        self.stopping = number

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last losses, and the old handlers of signals."""
        self._check_watched(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Keeps what can be said about it; on newer Pythons also as a note of the exception."""
        self._restore_handlers()
        self.explanation = explain(exception, trainer, self._batch)
        if self.explanation is not None and hasattr(exception, "add_note"):
            exception.add_note(str(self.explanation))

    def explain(self, exception: BaseException) -> TrainingError | None:
        """What can be said about the exception that came out of a run; None where it speaks for itself.

        torch raises that a loading process has died wherever this process is at the time, also on the way to
        ``on_exception`` or inside of it; so what is raised in the end is asked once more.
        """
        if self.explanation is None and self._trainer is not None:
            self.explanation = explain(exception, self._trainer, self._batch)
        return self.explanation

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        advice = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        message = f"\n{signal.Signals(number).name}: stopping after this step{advice}\n"
        os.write(2, message.encode())  # print is not safe while another print is interrupted

    def _look(self, trainer: pl.Trainer, what: str, number: Tensor) -> None:
        if number.device.type == "cpu":
            if not torch.isfinite(number).all():
                raise _not_finite(trainer, what, float(number.sum()), self._batch)
            return
        self._check_watched(trainer, what)
        self._watched.append(_Watched(what, number, self._batch))

    def _check_watched(self, trainer: pl.Trainer, what: str | None = None) -> None:
        """Raise for a number that was sent to the CPU a step ago; None for all of them."""
        due = [watched for watched in self._watched if what in (None, watched.what)]
        self._watched = [watched for watched in self._watched if watched not in due]
        for watched in due:
            value = watched.value()
            if not torch.isfinite(torch.tensor(value)):
                raise _not_finite(trainer, watched.what, value, watched.batch)


def _tell_of_short_steps(trainer: pl.Trainer) -> None:
    """Lightning divides the last step of an epoch by all batches of a step, also where fewer are left for it."""
    batches, parts = trainer.num_training_batches, trainer.accumulate_grad_batches
    if parts > 1 and batches != float("inf") and batches % parts:
        rank_zero_warn(
            f"the last step of every epoch has {batches % parts} batches instead of {parts} "
            f"(trainer.accumulate_grad_batches), and counts for less: an epoch of {batches} batches, "
            "trainer.limit_train_batches, is no multiple of it"
        )


class _Watched:
    """A number on its way from a GPU to the CPU, which nobody waits for."""

    def __init__(self, what: str, number: Tensor, batch: Described | None) -> None:
        self.what = what
        self.batch = batch
        self._number = torch.empty((), dtype=torch.float32, pin_memory=True)
        self._number.copy_(number.float().sum(), non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def value(self) -> float:
        self._arrived.synchronize()
        return float(self._number)


def _not_finite(trainer: pl.Trainer, what: str, value: float, batch: Described | None) -> TrainingError:
    return TrainingError(
        f"{what} is {value} at {_named(trainer, batch)}; {last_good(trainer)}. Look at these pairs first (one that is "
        "broken shows up again at the same step); else try a lower learning_rate, a longer warmup_steps, "
        "gradient_clip_val: 1, or precision bf16-mixed or 32-true in place of 16-mixed"
    )


def _named(trainer: pl.Trainer, batch: Described | None) -> str:
    """The batch for a message; where that leaves out keys, all of them go to a file in the run's folder."""
    if batch is None or len(batch.keys) <= KEYS_SHOWN:
        return str(batch)
    path = in_root(trainer, BATCH_FILE.format(rank=trainer.global_rank))
    try:
        path.write_text("\n".join([f"step {batch.step + 1}", *batch.keys, ""]), encoding="utf-8")
    except OSError:  # a full disk: the message is told all the same
        return str(batch)
    return f"{batch} (all: {path})"


def explain(exception: BaseException, trainer: pl.Trainer, batch: Described | None) -> TrainingError | None:
    """What can be said about an exception that another library raised while a run was going on.

    Args:
        batch: that was being worked on; None before the first.

    Returns:
        The error to tell; None where the exception speaks for itself.
    """
    text = str(exception)
    if is_out_of_memory(exception):
        at = "" if batch is None else f" at {_named(trainer, batch)}"
        return TrainingError(
            f"the memory is used up{at} ({_first_line(text)}); {last_good(trainer)}. To need less: a smaller "
            "data.init_args.batch_size with trainer.accumulate_grad_batches (the same result in more, smaller pieces), "
            "model.init_args.gradient_checkpointing: true, trainer.precision: bf16-mixed, encodings made ahead "
            "(python -m msdiffusion.training.precompute), a smaller resolution or max_subjects"
        )
    if is_full_disk(exception):
        return TrainingError(f"the disk is full ({_first_line(text)}); {last_good(trainer)}. Make room first")
    if is_dead_loader(exception):
        at = "" if batch is None else f" after {_named(trainer, batch)}"
        return TrainingError(
            f"a process that loads pairs has died{at} ({_first_line(text)}); {last_good(trainer)}. Mostly the "
            "machine's "
            "memory was used up: try fewer data.init_args.num_workers or a smaller data.init_args.cache_megabytes, "
            "which counts for each of them; num_workers 0 loads in this process and shows its error"
        )
    return None


def is_out_of_memory(exception: BaseException) -> bool:
    """Whether an exception says that memory ran out: CUDA's, the CPU allocator's, or Python's own."""
    if isinstance(exception, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(exception, RuntimeError) and bool(
        re.search("out of memory|DefaultCPUAllocator|alloc_cpu|CUBLAS_STATUS_ALLOC_FAILED", str(exception))
    )


def is_full_disk(exception: BaseException) -> bool:
    """Whether an exception says that a file could not be written for want of room, or of a quota."""
    if isinstance(exception, OSError) and exception.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # libraries in other languages, such as safetensors, have exceptions of their own
    return bool(re.search(r"No space left on device|os error 28\b|Disk quota exceeded", str(exception)))


def is_dead_loader(exception: BaseException) -> bool:
    """Whether an exception says that a process that loads pairs was killed: torch's, or that of a line it left open."""
    if isinstance(exception, RuntimeError):
        return bool(re.search(r"DataLoader worker .*(exited unexpectedly|killed)", str(exception)))
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(exception.__traceback__)]
    # tensors come from a worker through a socket of its own, which may break before torch sees that the worker is gone
    through = any(name.replace(os.sep, "/").endswith("torch/multiprocessing/reductions.py") for name in frames)
    return through and isinstance(exception, (ConnectionError, EOFError, FileNotFoundError))


def _first_line(text: str, limit: int = 160) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return line if len(line) <= limit else line[: limit - 3] + "..."
