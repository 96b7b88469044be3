"""Data parallelism for a CPU: processes of one thread each that average their weights every few steps.

    python -m msdiffusion.training.local_sgd --processes 2 fit -c configs/embedded/text_to_image.yaml

Exchanging gradients every step over gloo doubles the CPU time of a small model's step, and two threads in one process
wait for each other. Averaging weights every 12 steps (local SGD, Stich 2019) costs next to nothing. On a GPU use
Lightning's own strategies.
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

import pytorch_lightning as pl
import torch

RANK, WORLD, STORE = "MSD_LOCAL_SGD_RANK", "MSD_LOCAL_SGD_WORLD", "MSD_LOCAL_SGD_STORE"


def process_rank() -> int:
    """Rank of this process among those of the launcher; 0 in an ordinary run."""
    return int(os.environ.get(RANK, "0"))


class WeightAveraging(pl.Callback):
    """Averages the trained weights of all processes; does nothing in an ordinary run.

    Only rank 0 logs, validates, saves and exports. The clock of `BudgetedTraining` is set to the slowest process's, so
    that all decide to stop at the same step.

    Args:
        every_n_steps: steps between two exchanges.
    """

    def __init__(self, every_n_steps: int = 12) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.active = WORLD in os.environ

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
            trainer.callbacks = [self]
            trainer.loggers = []
            trainer.limit_val_batches = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives every process its own randomness, another one after each resume."""
        if self.active:
            torch.manual_seed(1_000_003 * trainer.global_step + process_rank() + 1)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Every `every_n_steps` steps: weights become their mean over the processes."""
        if not self.active or trainer.global_step % self.every_n_steps:
            return
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        flat = torch.cat([p.flatten() for p in trained])
        torch.distributed.all_reduce(flat)
        flat /= int(os.environ[WORLD])
        pieces = flat.split([p.numel() for p in trained])
        torch._foreach_copy_(trained, [v.view_as(p) for v, p in zip(pieces, trained, strict=True)])
        if hasattr(pl_module, "elapsed"):  # a BudgetedTraining; other modules stop by steps alone
            clock = torch.tensor(pl_module.elapsed)
            torch.distributed.all_reduce(clock, op=torch.distributed.ReduceOp.MAX)
            pl_module.elapsed = float(clock)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the group."""
        if self.active:
            torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Starts the processes, waits, and ends all of them when one fails. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m msdiffusion.training.local_sgd", description=__doc__)
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default: 2)")
    options, rest = parser.parse_known_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
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
        while any(child.poll() is None for child in children):
            if any(child.poll() not in (None, 0) for child in children):
                stop()
            time.sleep(0.5)
    return max(abs(child.returncode) for child in children)


if __name__ == "__main__":
    raise SystemExit(main())
