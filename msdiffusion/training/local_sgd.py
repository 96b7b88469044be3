"""Data parallelism for a CPU: processes of one thread each that average their weights every few steps.

    python -m msdiffusion.training.local_sgd --processes 2 fit -c configs/embedded/text_to_image.yaml

Exchanging gradients every step over gloo doubles the CPU time of a small model's step, and two threads in one process
wait for each other. Averaging weights every 12 steps (local SGD, Stich 2019) costs next to nothing. On a GPU use
Lightning's own strategies.

The processes share the order of the samples like ranks of any other run (``PairsDataModule``), and differ in their
weights between two exchanges only. A resumed run starts all of them from the first one's state, optimizer included, so
it is a good continuation, not an exact one.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from data_pipeline.extras import missing_extras

if __name__ == "__main__" and (told := missing_extras("training")):  # the imports below are of that extra
    raise SystemExit(f"error: {told}")

import pytorch_lightning as pl
import torch

from msdiffusion.errors import RequestError
from msdiffusion.training.processes import RANK, STORE, WORLD, process_rank
from msdiffusion.training.run.failures import FailureGuard
from msdiffusion.training.setting_names import check_arguments

GRACE_SECONDS = 60
"""After one process has failed, the others have so long to end by themselves."""


class WeightAveraging(pl.Callback):
    """Averages the trained weights of all processes; does nothing in an ordinary run.

    Their moving averages, which are what is validated and exported, are averaged with them: the mean of the averages is
    the average of the means. The last step of a run is always an exchange. Only rank 0 logs, validates, saves and
    exports. The clock of `BudgetedTraining` is set to the slowest process's, so that all decide to stop at the same
    step; and a signal to one of them ends all after the next exchange.

    Args:
        every_n_steps: steps between two exchanges.

    Raises:
        RequestError: if it is less than 1.
    """

    def __init__(self, every_n_steps: int = 12) -> None:
        if every_n_steps < 1:
            raise RequestError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.active = WORLD in os.environ
        self._exchanged = -1

    @property
    def exchanges(self) -> bool:
        """Whether the processes agree on stopping here, and not among the ranks of Lightning."""
        return self.active

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Joins the group; other ranks than 0 lose their logger, checkpoints, progress bar and validation."""
        if not self.active:
            return
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{os.environ[STORE]}",
            rank=process_rank(),
            world_size=int(os.environ[WORLD]),
        )
        if process_rank() > 0:
            trainer.callbacks = [self, *_guards(trainer)]
            trainer.loggers = []
            trainer.limit_val_batches = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives every process its own randomness, another one after each resume."""
        self._exchanged = trainer.global_step
        if self.active:
            torch.manual_seed(1_000_003 * trainer.global_step + process_rank() + 1)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Every `every_n_steps` steps: weights become their mean over the processes."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 or 0 < trainer.max_steps <= step
        if not self.active or not due or step == self._exchanged:  # the same step again: gradients are accumulated
            return
        self._exchanged = step
        shared = exchanged_weights(pl_module)
        flat = torch.cat([p.flatten() for p in shared])
        torch.distributed.all_reduce(flat)
        flat /= int(os.environ[WORLD])
        pieces = flat.split([p.numel() for p in shared])
        torch._foreach_copy_(shared, [v.view_as(p) for v, p in zip(pieces, shared, strict=True)])
        wanted = torch.tensor(max([0, *(guard.requested or 0 for guard in _guards(trainer))]))
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        for guard in _guards(trainer) if wanted else ():
            guard.stop(int(wanted))
        if hasattr(pl_module, "elapsed"):  # a BudgetedTraining; other modules stop by steps alone
            clock = torch.tensor(pl_module.elapsed)
            torch.distributed.all_reduce(clock, op=torch.distributed.ReduceOp.MAX)
            pl_module.elapsed = float(clock)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the group."""
        if self.active:
            torch.distributed.destroy_process_group()


def exchanged_weights(module: pl.LightningModule) -> list[torch.Tensor]:
    """What is averaged over the processes: the trained weights, and their moving averages where there are any."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    averaged = getattr(module, "averaged", None)  # of MSDiffusionModule
    if averaged is not None:
        trained += list(averaged.parameters())
    return trained + list(getattr(module, "average", {}).values())  # of BudgetedTraining


def _guards(trainer: pl.Trainer) -> list[FailureGuard]:
    return [callback for callback in trainer.callbacks if isinstance(callback, FailureGuard)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes, waits, and ends all of them when one fails. Returns the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m msdiffusion.training.local_sgd",
        description=(
            "Trains on a CPU in several processes of one thread each, which average their weights every "
            "few steps. What follows are the arguments of lightning: fit -c CONFIG ..."
        ),
    )
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default: 2)")
    options, rest = parser.parse_known_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    try:
        check_arguments(rest)  # once, and not in every process
    except RequestError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        shared = {WORLD: str(options.processes), STORE: f"{folder}/store", "OMP_NUM_THREADS": "1"}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "msdiffusion.training", *rest], env={**os.environ, **shared, RANK: str(r)}
            )
            for r in range(options.processes)
        ]

        def stop(*_: object) -> None:
            for child in children:
                child.terminate()

        signal.signal(signal.SIGTERM, stop)
        # Ctrl-C reaches the processes by itself; they end after an exchange, and this one waits for them
        signal.signal(signal.SIGINT, lambda *_: None)
        failed_at: float | None = None
        while any(child.poll() is None for child in children):
            if failed_at is None and any(child.poll() not in (None, 0) for child in children):
                failed_at = time.monotonic()
                stop()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
                for child in children:
                    child.kill()
            time.sleep(0.5)
    return max(abs(child.returncode) for child in children)


if __name__ == "__main__":
    raise SystemExit(main())
