"""The order of a run, handed out to its processes, and the loaders that follow it and know how far they came.

Letters: R processes, B samples per process and batch, G = R * B.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from msdiffusion.errors import DataError
from msdiffusion.training.samples.batch import LoadingFailure, PairsBatch
from msdiffusion.training.samples.collation import PairsCollator
from msdiffusion.training.samples.dataset import PairsDataset
from msdiffusion.training.samples.place import Place
from msdiffusion.training.samples.plan import EpochPlan
from msdiffusion.training.samples.settings import LoadingSettings


class PlanSampler(DistributedSampler):
    """Hands out (number of the sample, index of the pair) for the places of one process.

    Lightning leaves a DistributedSampler alone and tells it each epoch, whose number means nothing here: see ``Place``.

    Args:
        num_processes: R, a divisor of the plan's global batch.
        place: where to begin. The loader moves it on.
    """

    def __init__(self, plan: EpochPlan, rank: int, num_processes: int, place: Place) -> None:
        super().__init__(plan, num_replicas=num_processes, rank=rank, shuffle=False)
        self.plan = plan
        self.place = place
        self._announced: int | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Lightning begins its epoch of this number."""
        if self._announced is not None and epoch != self._announced:
            self.place.begin_epoch()
        self._announced = epoch

    def __len__(self) -> int:
        """Samples of a whole epoch for this process, also where it begins in the middle of one."""
        return self.plan.samples_per_epoch // self.num_replicas

    def order(self) -> np.ndarray:
        """int64 (samples_per_epoch,): the indices of this epoch, of all processes."""
        if self._order is None or self._order[0] != self.place.epoch:
            self._order = (self.place.epoch, self.plan.order(self.place.epoch))
        return self._order[1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """From the first batch that was not taken yet."""
        order, before = self.order(), self.place.epoch * self.plan.samples_per_epoch
        for place in range(self.place.start * self.plan.global_batch + self.rank, len(order), self.num_replicas):
            yield before + place, int(order[place])


class FixedSampler(DistributedSampler):
    """Hands out the places of a validation, the same every time.

    Args:
        numbers: int64 (n,) from ``padded_order``.
        indices: int64 (n,) likewise.
        num_processes: R, a divisor of n.
    """

    def __init__(self, numbers: np.ndarray, indices: np.ndarray, rank: int, num_processes: int) -> None:
        super().__init__(numbers, num_replicas=num_processes, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.numbers = numbers
        self.indices = indices

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(number, index) of this process's samples."""
        mine = np.s_[self.rank :: self.num_replicas]
        return iter(zip(self.numbers[mine].tolist(), self.indices[mine].tolist(), strict=True))


class PairsLoader(DataLoader):
    """Loads batches, and moves the ``Place`` of its sampler on with each batch that is taken.

    It has the arguments of ``DataLoader`` and no others, because Lightning makes loaders anew for prediction: see
    ``make_loader``.
    """

    PREFETCH = 1024
    """Samples of this process whose shards are asked for ahead of time; one batch, where that is more."""

    def __iter__(self) -> Iterator[PairsBatch]:
        """Batches.

        Raises:
            DataError: if a pair cannot be read, with the words of the reader also where a worker met it.
        """
        with _signals_held(self):
            batches = super().__iter__()  # before threads are started to fetch shards: this may fork
        ahead = self._prefetching() if isinstance(self.sampler, PlanSampler) else itertools.repeat(None)
        next(ahead, None)
        for batch in batches:
            if isinstance(batch, LoadingFailure):
                raise DataError(batch.message)
            if isinstance(self.sampler, PlanSampler):
                self.sampler.place.taken += 1
            next(ahead, None)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the data module keeps the place. That there is this method tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do, see ``state_dict``."""

    def _prefetching(self) -> Iterator[None]:
        sampler = self.sampler
        order = sampler.order()[sampler.rank :: sampler.num_replicas]
        first = sampler.place.start * self.batch_size
        batches = max(1, self.PREFETCH // self.batch_size)
        step = batches * self.batch_size
        for start in range(first, len(order), step):
            self.dataset.pairs.prefetch(order[start : start + 2 * step])
            for _ in range(batches):
                yield


@contextmanager
def _signals_held(loader: DataLoader) -> Iterator[None]:
    """Workers that start meanwhile hold signals back, too, until they have come to ``ignore_signals``.

    Without it, those that import libraries first would die of a signal to the whole group for seconds.
    """
    if not loader.num_workers or not hasattr(signal, "sigwaitinfo"):
        yield
        return
    context = loader.multiprocessing_context or multiprocessing.get_context()
    if context.get_start_method() != "fork":
        resource_tracker.ensure_running()  # where it starts later, it lets the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int = 0) -> None:
    """Leaves signals that are sent to the whole group to the process that trains: it still needs batches to stop.

    Only that process ends a worker. torch's own handler of SIGTERM knows it from others, but ends the worker in any
    case; so the signal is waited for here, where Python tells who sent it. Where it does not (macOS), the worker is in
    a group of its own.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        if hasattr(os, "setpgid"):
            os.setpgid(0, 0)
        return
    parent = multiprocessing.parent_process()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that start later take it over
    threading.Thread(target=wait_for_parent, daemon=True).start()


def make_loader(
    dataset: PairsDataset, sampler: PlanSampler | FixedSampler, settings: LoadingSettings, collate: PairsCollator
) -> PairsLoader:
    """A loader of the pairs in a sampler's order; of a plan, only whole batches are loaded.

    Workers stay from epoch to epoch. Where nobody says how they start, they are forked on Linux, where nothing needs to
    be sent to them and the catalogue is shared.
    """
    workers: dict[str, Any] = {}
    if settings.num_workers > 0:
        workers = {
            "worker_init_fn": ignore_signals,
            "persistent_workers": True,
            "multiprocessing_context": settings.worker_start or ("fork" if sys.platform == "linux" else None),
        }
    return PairsLoader(
        dataset,
        batch_size=settings.batch_size,
        sampler=sampler,
        collate_fn=collate,
        drop_last=isinstance(sampler, PlanSampler),
        pin_memory=torch.cuda.is_available(),
        # a generator of its own, so that nobody else's random numbers depend on loading
        generator=torch.Generator().manual_seed(0),
        num_workers=settings.num_workers,
        **workers,
    )
