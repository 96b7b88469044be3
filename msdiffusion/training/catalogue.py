"""A pairs dataset, of any size, on this machine or behind a URL: which pairs there are, and each of them by its number.

    catalogue = read_catalogue("data/world/pairs")  # or "https://.../pairs", "s3://.../pairs-{000000..000099}.tar"
    catalogue.read(1234).target

``python -m msdiffusion.training.catalogue DATASET`` looks for damage (see ``damage.py``).

Shape letters: N pairs.
"""

# ruff: noqa: T201 - main is a command

from __future__ import annotations

import argparse
import hashlib
import sys
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.pairs_format import SWAPPED_SUFFIX
from data_pipeline.safe_text import visible
from msdiffusion.errors import DataError, MSDiffusionError, RequestError
from msdiffusion.training.pairs.columns import Columns, bar, from_headers, from_index, open_shard
from msdiffusion.training.pairs.damage import known_damage, verify, write_damage
from msdiffusion.training.pairs.remote import ShardCache
from msdiffusion.training.pairs.shards import OpenShard, Pair, PairLocation, read_pair, read_record
from msdiffusion.training.pairs.sources import Damage, locate
from msdiffusion.training.pairs.tar_index import ShardTable

OPEN_FILES = 32
"""Of one process. Few, because a file that the cache removes keeps its room on the disk while it is open."""
KEPT_TABLES = 256
"""Where the members lie is remembered for so many shards: 25 MB at 1000 pairs per shard."""


class Catalogue:
    """The pairs of a dataset, in the order of the files.

    It may be sent to other processes, and used after a fork. In one process, one thread may read at a time.
    """

    def __init__(
        self, columns: Columns, skipped: Sequence[Damage] = (), cache: ShardCache | None = None, progress: bool = True
    ) -> None:
        # see ``Columns``; every key is there once
        self.shards, self.shard, self.place, self.keys = columns.shards, columns.shard, columns.place, columns.keys
        self.skipped = tuple(skipped)
        """Damaged shards and pairs that are left out, because that was asked for."""
        self.cache = cache
        self.progress = progress
        self._sizes = columns.sizes
        self._forget()

    def _forget(self) -> None:
        self._files: OrderedDict[int, OpenShard] = OrderedDict()
        self._tables: OrderedDict[int, ShardTable] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.shard)

    @property
    def shard_sizes(self) -> np.ndarray:
        """int64 (number of shards,): how many pairs of this catalogue each shard holds, at least 1."""
        return np.bincount(self.shard, minlength=len(self.shards)).astype(np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """int32 (N, 2): width and height in pixels of every target.

        Without an index.parquet the header of every picture is read, when this is asked for the first time.

        Raises:
            DataError: if one cannot be read.
        """
        if self._sizes is None:
            sizes = np.empty((len(self), 2), dtype=np.int32)
            ends = np.cumsum(self.shard_sizes)
            starts = ends - self.shard_sizes
            for number, _ in enumerate(bar(self.shards, "reading the sizes of pictures", self.progress)):
                for i in range(starts[number], ends[number]):
                    sizes[i] = self._opened(number).size_of_target(int(self.place[i]))
            self._sizes = sizes
        return self._sizes

    def read(self, i: int, reference_frame: str = "other") -> Pair:
        """Pair number ``i``, decoded; ``reference_frame`` as in ``read_pair``.

        Raises:
            DataError: if it is damaged, naming shard and key; if its shard cannot be fetched or has changed.
        """
        return read_pair(self._location(i), reference_frame)

    def record(self, i: int) -> dict[str, Any]:
        """The json of pair number ``i``, checked against the schema; see ``docs/data_format.md``.

        Raises:
            DataError: as ``read``.
        """
        return read_record(self._location(i))

    def prefetch(self, indices: Sequence[int] | np.ndarray) -> None:
        """Start to fetch the remote shards of these pairs, in the order of the first need; returns at once."""
        if self.cache is None or len(indices) == 0:
            return
        numbers, first = np.unique(self.shard[np.asarray(indices)], return_index=True)
        files = [self.shards[number].file for number in numbers[np.argsort(first)]]
        self.cache.prefetch([file for file in files if file.is_remote])

    def single_frame(self, limit: int = 64) -> float:
        """Share of pairs whose references come from the target picture itself, in [0, 1].

        Estimated from at most ``limit`` records, spread evenly; of a remote dataset those of the first shard, so that
        nothing is fetched only to ask.

        Raises:
            RequestError: if ``limit`` is below 1.
            DataError: if a record cannot be read.
        """
        if limit < 1:
            raise RequestError(f"limit must be at least 1, got {limit}")
        known = int(self.shard_sizes[0]) if self.shards[0].file.is_remote else len(self)
        rows = np.unique(np.linspace(0, known - 1, min(limit, known)).round().astype(np.int64))
        sources = [self.record(int(row)).get("source") for row in rows]
        return sum(isinstance(source, dict) and source.get("single_frame") is True for source in sources) / len(rows)

    def close(self) -> None:
        """Close the files that are open; reading opens them again."""
        for opened in self._files.values():
            opened.close()
        self._forget()

    def _location(self, i: int) -> PairLocation:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} pairs, so no number {i}")
        location = self._opened(int(self.shard[i])).location(int(self.place[i]))
        if location.key != self.keys[i]:
            raise DataError(
                f"{location.shard} holds {location.key!r} where index.parquet says {self.keys[i]!r}: they don't belong "
                "together; copy both again"
            )
        return location

    def _opened(self, number: int) -> OpenShard:
        shard = self.shards[number]
        if number in self._files:
            self._files.move_to_end(number)
            if shard.file.is_remote:
                self._files[number].stay()
            return self._files[number]
        opened = open_shard(shard, self.cache, self._tables.get(number))
        self._files[number] = opened
        self._tables[number] = opened.table
        self._tables.move_to_end(number)
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        if len(self._tables) > KEPT_TABLES:
            self._tables.popitem(last=False)
        return opened


def read_catalogue(
    source: str, *, skip_damaged: bool = False, cache: ShardCache | None = None, progress: bool = True
) -> Catalogue:
    """Find the pairs of a dataset.

    Args:
        source: a folder, the URL of one, or a pattern of shards; see ``locate``.
        skip_damaged: leave out what is damaged, with a warning for each shard. So that every process leaves out the
            same, all shards are looked through first, or the list that ``verify`` left is read. False: the first
            damage is an error.
        cache: where remote shards are kept; the default one if None.

    Raises:
        RequestError: if the source cannot be understood.
        DataError: if there is no dataset, it was never finished, a key is there twice, its files contradict each
            other, or something is damaged and ``skip_damaged`` is False.
    """
    found = locate(str(source))
    cache = cache or ShardCache()
    skipped: Sequence[Damage] = ()
    if skip_damaged:
        skipped = known_damage(found, cache)
        if skipped is None:
            skipped = verify(str(source), cache=cache, progress=progress).damaged
        whole = {damage.shard for damage in skipped if damage.key is None}
        _warn_of(skipped)
    elif found.damaged:
        raise DataError(_told(found.damaged))
    columns = from_index(found, cache)
    if columns is None:
        usable = [shard for shard in found.shards if not skip_damaged or shard.name not in whole]
        if not usable:
            raise DataError(f"no shard of {source} can be used. {_told(skipped)}")
        columns = from_headers(usable, cache, progress, check=(lambda _: None) if skip_damaged else None)
    if skipped:
        columns = _without(columns, skipped)
    if not len(columns):
        raise DataError(f"no pair of {source} can be used. {_told(skipped)}")
    if twice := columns.keys.first_repeated():
        places = [columns.shards[columns.shard[row]].place for row in twice]
        raise DataError(
            f"pair {columns.keys[twice[0]]!r} is both in {places[0]} and in {places[1]}; keys must be unique"
        )
    return Catalogue(columns, skipped, cache, progress)


def _without(columns: Columns, skipped: Sequence[Damage]) -> Columns:
    """The columns without what is damaged."""
    wanted = np.ones(len(columns), dtype=bool)
    for number, shard in enumerate(columns.shards):
        lost = {damage.key for damage in skipped if damage.shard == shard.name}
        if lost:
            first, end = np.searchsorted(columns.shard, [number, number + 1])
            wanted[first:end] = [None not in lost and columns.keys[row] not in lost for row in range(first, end)]
    return columns.of(wanted)


def _warn_of(skipped: Sequence[Damage]) -> None:
    """One warning per damaged shard: its name, why, and how many pairs are lost."""
    by_shard: dict[str, list[Damage]] = {}
    for damage in skipped:
        by_shard.setdefault(damage.shard, []).append(damage)
    for shard, damages in by_shard.items():
        lost = "an unknown number of" if damages[0].pairs is None else sum(damage.pairs or 0 for damage in damages)
        warnings.warn(visible(f"left out {lost} pairs of {shard}: {_told(damages)}"), stacklevel=3)


def _told(damages: Sequence[Damage]) -> str:
    """A sentence about damage: the first three reasons, how many more there are."""
    more = f" (and {len(damages) - 3} more)" if len(damages) > 3 else ""
    return "; ".join(damage.reason for damage in damages[:3]) + more


def split_by_key(catalogue: Catalogue, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(training pairs, validation pairs), int64 numbers; which one a pair belongs to is a pure function of its key.

    So the split stays the same when a dataset grows, is sharded differently, or is read in another order. A pair and
    the same pair swapped are on one side: they share their pictures. A fraction above 0 gives at least one validation
    pair.

    Args:
        catalogue: at least two pairs where fraction is above 0.
        fraction: share of the keys for validation, in [0, 1).

    Raises:
        DataError: if no training pair would be left.
    """
    if fraction == 0:
        return np.arange(len(catalogue), dtype=np.int64), np.zeros(0, dtype=np.int64)
    suffix = SWAPPED_SUFFIX.encode()
    draws = np.fromiter(
        (_uniform_of(key.removesuffix(suffix)) for key in catalogue.keys.encoded()), np.float64, len(catalogue)
    )
    held_out = draws <= max(fraction, draws.min(initial=1.0))  # so that the smallest draw is always held out
    if held_out.all():
        raise DataError(
            f"{len(catalogue)} pairs leave none to train on with validation_fraction={fraction}; "
            "give more pairs, a smaller fraction, or validation_fraction=0"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _uniform_of(key: bytes) -> float:
    """A number in [0, 1) that depends on the key alone (Python's own hash changes from run to run)."""
    return int.from_bytes(hashlib.sha256(key).digest()[:7], "big") / 2**56


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where nothing is damaged, 1 where something is, 2 where there is nothing to look at."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m msdiffusion.training.catalogue",
        description="Looks for damaged shards and pairs of a dataset.",
    )
    parser.add_argument("dataset", help="folder, URL of a folder, or pattern of shards")
    parser.add_argument("--deep", action="store_true", help="also decode every picture and mask, and hash local shards")
    parser.add_argument("--write", action="store_true", help="keep the list, for training with skip_damaged")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--cache", metavar="FOLDER", help="where remote shards are kept")
    parser.add_argument("--cache-gigabytes", type=float, default=64, help="most that is kept there (default 64)")
    options = parser.parse_args(arguments)
    try:
        cache = ShardCache(options.cache, int(options.cache_gigabytes * 2**30))
        found = verify(options.dataset, deep=options.deep, cache=cache, workers=options.workers)
        for damage in found.damaged:
            print(f"{visible(damage.reason)} ({'?' if damage.pairs is None else damage.pairs} pairs)")
        print(f"{found.pairs} pairs in {len(found.shards)} shards, {len(found.damaged)} damages")
        if options.write:
            print(f"written to {visible(write_damage(found, cache))}")
    except MSDiffusionError as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if found.damaged else 0


if __name__ == "__main__":
    sys.exit(main())
