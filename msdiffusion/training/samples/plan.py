"""The order in which a run sees its pairs: a pure function of seed, epoch and the sizes of the shards.

Nothing is remembered from one epoch to the next and nothing is exchanged between processes, so that every process
finds its own part alone, a stopped run finds its place again, and two processes see what one would have seen.

How the order of one dataset is made: its shards are put in random order and laid in a ring, which is cut open
anywhere, so that no pair comes early or late by habit; that row is cut into lanes of equal length; within each lane,
samples are shuffled in blocks of ``shuffle_buffer``; then the lanes take turns. So place p belongs to lane p % lanes
(in a mixture, places are counted through all epochs for that), and process r of R, which takes the places p % R == r,
reads only from its own lanes, each of them nearly in the order of the files: that is what makes shards on a slow or
distant disk bearable.

Letters: N pairs, L lanes, R processes, B samples per process and batch, G = R * B samples of a batch of all processes.
A place counts the samples of an epoch over all processes. Indices are those of the pairs in their catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.samples.draws import ORDER, generator_for


@dataclass(frozen=True)
class PlannedDataset:
    """One dataset of a mixture: only the pairs that are trained on, in the order of the files.

    Raises:
        RequestError: if the weight is not above 0.
        DataError: if there is no pair, or if the pairs of a shard do not lie together.
    """

    indices: np.ndarray
    """int64 (N,)."""
    shards: np.ndarray
    """(N,) number of each pair's shard; equal ones side by side."""
    weight: float = 1.0
    """Share of the samples of a mixture, relative to the other weights."""
    name: str = "pairs"
    """For messages."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise RequestError(f"the weight of {self.name} must be a number above 0, got {self.weight}")
        if len(self.indices) == 0:
            raise DataError(f"{self.name} has no pair to train on")
        starts = self.shards[self._starts]
        if len(np.unique(starts)) != len(starts):
            raise DataError(f"{self.name}: the pairs of a shard do not lie side by side in its catalogue")

    def __len__(self) -> int:
        """N."""
        return len(self.indices)

    @property
    def _starts(self) -> np.ndarray:
        """Where another shard begins."""
        return np.flatnonzero(np.concatenate([[True], self.shards[1:] != self.shards[:-1]]))

    def in_random_shards(self, generator: np.random.Generator) -> np.ndarray:
        """int64 (N,): the indices with their shards in random order, nothing else changed."""
        starts = self._starts
        lengths = np.diff(np.append(starts, len(self)))
        shuffled = generator.permutation(len(starts))
        ends = np.cumsum(lengths[shuffled])
        shift = starts[shuffled] - (ends - lengths[shuffled])
        return self.indices[np.arange(len(self)) + np.repeat(shift, lengths[shuffled])]


class EpochPlan:
    """Which pair is at which place of which epoch.

    With one dataset an epoch is one pass: every pair once, but for those that would make an incomplete batch of all
    processes at the end (other ones in each epoch).

    A mixture is one endless row of places: rows of L places in turn from its datasets, evenly spread. A round has as
    many rows as all datasets have pairs together (and no broken one); after each round every dataset has had its share
    exactly, to one row, and at any place to fewer rows than there are datasets, and one. An epoch is as many whole
    batches as fit into a round, and the next one goes on where it ended: nothing is left out. Each dataset runs
    through passes of its own, which do not stop at the ends of epochs: no pair comes again before every other of its
    dataset came.

    With buckets, every batch of all processes has pairs of one bucket. Pairs wait until their batch is full, so the
    order within a bucket stays; what does not fill a batch by the end of the epoch is left out of it. In a mixture
    with buckets an epoch is made of one round, and the share of the buckets changes from epoch to epoch: so that all
    epochs are equally long, the last batches are left out too. Together that is fewer than G samples per bucket, and G
    more, in each epoch: the passes go on as if these had been trained, so shares and passes hold only nearly there.

    Args:
        datasets: at least one.
        global_batch: G.
        lanes: L; the order depends on it.
        shuffle_buffer: samples of a lane that are shuffled with one another.
        buckets: int (all pairs,), bucket of the pair with each index; None where all targets have one size.
        batches_per_step: batches whose gradients make one step. An epoch is whole steps, as it would be with one batch
            of that size; with buckets, the batches of a step may be of different ones.

    Raises:
        RequestError: if a number is out of range, or if a weight is so small that the dataset would not come in every
            epoch.
        DataError: if the pairs do not fill one batch.
    """

    def __init__(
        self,
        datasets: Sequence[PlannedDataset],
        *,
        seed: int,
        global_batch: int,
        lanes: int = 8,
        shuffle_buffer: int = 2048,
        buckets: np.ndarray | None = None,
        batches_per_step: int = 1,
    ) -> None:
        for name, number, least in (
            ("seed", seed, 0), ("global_batch", global_batch, 1), ("lanes", lanes, 1),
            ("shuffle_buffer", shuffle_buffer, 1), ("batches_per_step", batches_per_step, 1),
        ):  # fmt: skip
            if number < least:
                raise RequestError(f"{name} must be at least {least}, got {number}")
        self.datasets = tuple(datasets)
        self.seed = seed
        self.global_batch = global_batch
        self.lanes = lanes
        self.shuffle_buffer = shuffle_buffer
        self.buckets = buckets
        weights = [Fraction(dataset.weight) for dataset in self.datasets]  # exact, so that no rounding adds up
        self._until = [sum(weights[:d], Fraction(0)) / sum(weights) for d in range(len(weights) + 1)]
        self._rows = sum(map(len, self.datasets)) // lanes
        if len(self.datasets) > 1:
            for dataset, weight in zip(self.datasets, weights, strict=True):
                if weight / sum(weights) * self._rows < 1:
                    raise RequestError(
                        f"the weight {dataset.weight} of {dataset.name} gives it less than one row of {lanes} samples "
                        f"in an epoch of {self._rows} rows; raise it, leave the dataset out, or lower lanes"
                    )
        whole, pairs = self._count_batches(), sum(map(len, self.datasets))
        self.batches_per_epoch = whole // batches_per_step * batches_per_step
        self._left_out = whole - self.batches_per_epoch
        if whole and not self.batches_per_epoch:
            raise DataError(
                f"{pairs} pairs to train on make {whole} batches of {global_batch}, fewer than "
                f"the {batches_per_step} of one step; mine more clips, or train with a smaller "
                "trainer.accumulate_grad_batches or data.init_args.batch_size"
            )
        if self.batches_per_epoch < 1:
            raise DataError(
                f"{pairs} pairs to train on are fewer than one batch of {global_batch} of all "
                "processes together" + (" in every bucket" if buckets is not None else "")
                + "; mine more clips, or train with a smaller data.init_args.batch_size"
            )  # fmt: skip

    @property
    def samples_per_epoch(self) -> int:
        """Places of an epoch, the same in all epochs, a multiple of G."""
        return self.batches_per_epoch * self.global_batch

    def __len__(self) -> int:
        """As ``samples_per_epoch``."""
        return self.samples_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """int64 (samples_per_epoch,): the index of the pair at each place."""
        if len(self.datasets) > 1 and self.buckets is None:
            return self._mixture_places(epoch * self.samples_per_epoch, (epoch + 1) * self.samples_per_epoch)
        places = self._pass(0, epoch, 0) if len(self.datasets) == 1 else self._mixture(epoch)
        if self.buckets is not None:
            places = self._in_batches_of_one_bucket(places)
        return places[: self.samples_per_epoch]

    def pairs_never_trained(self) -> dict[int, int]:
        """Buckets with fewer pairs than one batch of all processes, and how many they have: these never come."""
        if self.buckets is None:
            return {}
        counts = self._bucket_counts()
        return {int(bucket): int(n) for bucket, n in enumerate(counts) if 0 < n < self.global_batch}

    def identity(self) -> dict[str, Any]:
        """What the order follows from, but for the names of the pairs: as JSON knows it."""
        identity = {
            "pairs and weight of each dataset": [[len(dataset), float(dataset.weight)] for dataset in self.datasets],
            "samples of a batch of all processes": self.global_batch,
            "lanes": self.lanes,
            "shuffle_buffer": self.shuffle_buffer,
            "pairs of each picture size": None if self.buckets is None else np.bincount(self.buckets).tolist(),
            "seed": self.seed,
        }
        if self._left_out:  # older checkpoints are places in epochs with an incomplete step at the end
            identity["batches of an epoch"] = self.batches_per_epoch
        if len(self.datasets) > 1 and self.buckets is None and self._rows * self.lanes % self.global_batch:
            # older checkpoints of such a mixture are places in another order
            identity["epochs of the mixture"] = "each goes on where the one before ended"
        return identity

    def rows_before(self, dataset: int, number: int) -> int:
        """Rows that a dataset of a mixture has had in all rounds before the one of this number."""
        edges = (self._until[d] * number * self._rows for d in (dataset, dataset + 1))
        below, above = (int(edge + Fraction(1, 2)) for edge in edges)
        return above - below

    def _bucket_counts(self) -> np.ndarray:
        return np.bincount(np.concatenate([self.buckets[dataset.indices] for dataset in self.datasets]))

    def _count_batches(self) -> int:
        if self.buckets is None:
            places = len(self.datasets[0]) if len(self.datasets) == 1 else self._rows * self.lanes
            return places // self.global_batch
        counts = self._bucket_counts()
        if len(self.datasets) == 1:
            return int((counts // self.global_batch).sum())
        # each bucket may keep back all but one of a batch
        waiting = np.count_nonzero(counts) * (self.global_batch - 1)
        return (self._rows * self.lanes - waiting) // self.global_batch

    def _pass(self, number: int, pass_number: int, first_lane: int) -> np.ndarray:
        """int64 (N,): one pass through a dataset, lanes taking turns from ``first_lane`` on."""
        dataset = self.datasets[number]
        generator = generator_for(self.seed, ORDER, number, pass_number)
        row = np.roll(dataset.in_random_shards(generator), generator.integers(len(dataset)))
        order = np.empty_like(row)
        start = 0
        for lane in range(self.lanes):
            mine = order[(lane - first_lane) % self.lanes :: self.lanes]  # longer by one where N is no multiple of L
            mine[:] = _shuffled_in_blocks(row[start : start + len(mine)], self.shuffle_buffer, generator)
            start += len(mine)
        return order

    def _mixture_places(self, start: int, end: int) -> np.ndarray:
        """Places [start, end) of the endless row of rounds. Place s is in lane s % L."""
        length = self._rows * self.lanes
        rounds = range(start // length, -(-end // length))
        together = np.concatenate([self._mixture(number) for number in rounds])
        return together[start - rounds.start * length : end - rounds.start * length]

    def _mixture(self, number: int) -> np.ndarray:
        """int64 (rows * L,): one round."""
        rows, times, sources = [], [], []
        for d in range(len(self.datasets)):
            first, last = self.rows_before(d, number), self.rows_before(d, number + 1)
            rows.append(self._stream(d, first * self.lanes, last * self.lanes).reshape(-1, self.lanes))
            times.append((np.arange(last - first) + 0.5) / max(1, last - first))
            sources.append(np.full(last - first, d))
        turn = np.lexsort([np.concatenate(sources), np.concatenate(times)])
        return np.concatenate(rows)[turn].ravel()

    def _stream(self, number: int, start: int, end: int) -> np.ndarray:
        """Places [start, end) of the endless row of passes of a dataset. Place s is in lane s % L."""
        N = len(self.datasets[number])
        pieces = [np.empty(0, dtype=np.int64)]
        for pass_number in range(start // N, -(-end // N)):
            begin = pass_number * N
            order = self._pass(number, pass_number, begin % self.lanes)
            pieces.append(order[max(0, start - begin) : end - begin])
        return np.concatenate(pieces)

    def _in_batches_of_one_bucket(self, places: np.ndarray) -> np.ndarray:
        batches, ready = [], []
        buckets = self.buckets[places]
        for bucket in np.unique(buckets):
            where = np.flatnonzero(buckets == bucket)
            full = where[: len(where) // self.global_batch * self.global_batch].reshape(-1, self.global_batch)
            batches.append(places[full])
            ready.append(full[:, -1])
        return np.concatenate(batches)[np.argsort(np.concatenate(ready))].ravel()


def _shuffled_in_blocks(row: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Shuffled within blocks of ``size``. The first one ends anywhere, so that blocks are others each time."""
    first = min(int(generator.integers(1, size + 1)), len(row))
    whole = first + (len(row) - first) // size * size
    return np.concatenate([
        generator.permutation(row[:first]),
        generator.permuted(row[first:whole].reshape(-1, size), axis=1).ravel(),
        generator.permutation(row[whole:]),
    ])  # fmt: skip


def padded_order(
    indices: np.ndarray, num_processes: int, batch_size: int, buckets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The places of a validation: every pair once, in the order of the files, and what fills up the last batches.

    All processes get equally many samples, and every batch has pairs of one bucket only: without buckets, the order is
    that of the files; with them, the buckets come one after the other.

    Args:
        indices: int64 (n,), at least one.
        buckets: int (all pairs,) as in ``EpochPlan``.

    Returns:
        (numbers, indices), int64, of equal length. A number below n is the place of the pair in ``indices``; a number
        of n or more marks a repetition that shall not count.
    """
    groups = [np.arange(len(indices))]
    if buckets is not None:
        groups = [np.flatnonzero(buckets[indices] == bucket) for bucket in np.unique(buckets[indices])]
    numbers, repeated = [], len(indices)
    for i, group in enumerate(groups):
        # a batch that is not full may only be the last one
        multiple = num_processes if i == len(groups) - 1 else num_processes * batch_size
        missing = -len(group) % multiple
        numbers.append(np.concatenate([group, np.arange(repeated, repeated + missing)]))
        groups[i] = np.concatenate([group, np.resize(group, missing)]).astype(np.int64)
        repeated += missing
    return np.concatenate(numbers), indices[np.concatenate(groups)]
