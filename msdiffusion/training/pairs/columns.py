"""All pairs of a dataset as columns: from index.parquet where there is one, else from the headers of the shards.

At the size of the paper (3.6 million pairs) a Python object per pair would take gigabytes in every process, so keys,
shards, places and sizes are arrays from the file to the training loop.

Shape letters: N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from data_pipeline.pairs_format import KEY_IN_WORDS, MOST_SIDE, check_texts, open_index
from msdiffusion.errors import DataError, reason, shown
from msdiffusion.training.pairs.data_files import DataFile, described, local_path
from msdiffusion.training.pairs.remote import ShardCache
from msdiffusion.training.pairs.shards import OpenShard, read_record
from msdiffusion.training.pairs.sources import Shard, Source
from msdiffusion.training.pairs.tar_index import KeyColumn, ShardTable

ROWS_AT_ONCE = 10_000
"""Of index.parquet, before their texts are looked at."""
PATIENCE_SECONDS = 3.0
"""What takes longer shows a progress bar."""


@dataclass(frozen=True)
class Columns:
    """The pairs of some shards: shard by shard, in each by place."""

    shards: tuple[Shard, ...]
    """With the number of their samples."""
    shard: np.ndarray
    """int32 (N,): number in ``shards``, never decreasing."""
    place: np.ndarray
    """int32 (N,): number of the pair in its shard, from 0."""
    keys: KeyColumn
    """N keys."""
    sizes: np.ndarray | None
    """int32 (N, 2): width and height of the target in pixels; None where only the records have them."""

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.shard)

    def of(self, wanted: np.ndarray) -> Columns:
        """Only the pairs where ``wanted``, bool (N,), is True; shards that lose all their pairs go too."""
        rows = np.flatnonzero(wanted)
        numbers, shard = np.unique(self.shard[rows], return_inverse=True)
        return Columns(
            tuple(self.shards[number] for number in numbers),
            shard.astype(np.int32),
            self.place[rows],
            self.keys.take(rows),
            None if self.sizes is None else self.sizes[rows],
        )


def open_file(file: DataFile, cache: ShardCache | None) -> BinaryIO:
    """A file of a dataset for reading at any position; a remote one comes through the cache.

    Raises:
        DataError: if it is not there or cannot be read.
    """
    if file.is_remote:
        if cache is None:
            raise DataError(f"{file.place} is remote, and there is no cache to fetch it to")
        return cache.open(file)
    try:
        return Path(local_path(file.place)).open("rb")
    except OSError as error:
        raise DataError(f"{file.place} cannot be read: {error}") from error


def bar(items: Sequence[Shard], title: str, progress: bool) -> tqdm:
    """The items behind a progress bar that appears only when they take long."""
    return tqdm(items, desc=title, unit="shard", delay=PATIENCE_SECONDS, disable=not progress)


def from_index(source: Source, cache: ShardCache | None) -> Columns | None:
    """The columns of a source by its index.parquet; None where it has none.

    Raises:
        DataError: if the index is damaged, lacks a column, or contradicts build.json.
    """
    if source.index is None or source.listed is None:
        return None
    try:
        file = described(source.index.place)
    except FileNotFoundError:
        return None
    names, codes, keys, sizes = _read_index(file, cache, source)
    unknown = [name for name in names if name not in source.listed]
    if unknown:
        raise DataError(f"{file.place} names the shard {unknown[0]}, which build.json does not list: copy both again")
    rows = np.bincount(codes, minlength=len(names))
    counted = dict(zip(names, rows.tolist(), strict=True))
    for name, samples in source.listed.items():
        if counted.get(name, 0) != samples:
            raise DataError(
                f"{file.place} has {counted.get(name, 0)} rows of {name}, and build.json says {samples} samples: "
                "they don't belong together; copy both again"
            )
    wanted = {shard.name: number for number, shard in enumerate(source.shards)}
    number_of = np.array([wanted.get(name, -1) for name in names], dtype=np.int32)
    shard = number_of[codes]
    order = np.argsort(shard, kind="stable")
    order = order[np.searchsorted(shard[order], 0) :]  # without the rows of shards that nobody asked for
    shard = shard[order]
    starts = np.searchsorted(shard, np.arange(len(source.shards)))
    place = (np.arange(len(shard)) - starts[shard]).astype(np.int32)
    if len(order) < len(keys) or (np.diff(order) < 0).any():
        keys, sizes = keys.take(order), sizes[order]
    return Columns(source.shards, shard, place, keys, sizes)


def _read_index(
    file: DataFile, cache: ShardCache | None, source: Source
) -> tuple[list[str], np.ndarray, KeyColumn, np.ndarray]:
    """(names of shards, number of each row's name, keys, int32 (N, 2) sizes) of an index.parquet.

    Nothing that the file says is believed before it is compared: a small file can say that it has any number of rows,
    and the same text in all of them.
    """
    import pyarrow

    columns = ("key", "shard", "width", "height")
    with open_file(file, cache) as content:
        try:
            with open_index(content, columns, sum(source.listed.values())) as index:
                batches = list(_checked(index.iter_batches(ROWS_AT_ONCE, columns=list(columns))))
                table = pyarrow.Table.from_batches(batches, batches[0].schema if batches else pyarrow.schema([]))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file.place} cannot be read ({reason(error)}): copy it again") from error
        except ValueError as error:
            raise DataError(f"{file.place} {error}: copy it again, or build the dataset again") from error
    if not table.num_rows:
        return [], np.zeros(0, np.int32), KeyColumn.of([]), np.zeros((0, 2), np.int32)
    shard = pyarrow.concat_arrays(table["shard"].unify_dictionaries().chunks)
    keys = _key_column(pyarrow.concat_arrays(table["key"].cast(pyarrow.large_string()).chunks))
    if (row := keys.first_unlawful()) is not None:
        raise DataError(f"{file.place} has the key {shown(keys[row])}, but keys are {KEY_IN_WORDS}")
    sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], axis=1)
    if not ((sizes > 0) & (sizes <= MOST_SIDE)).all():
        row = int(np.flatnonzero(~((sizes > 0) & (sizes <= MOST_SIDE)).all(axis=1))[0])
        raise DataError(
            f"{file.place} says that {shown(keys[row])} has {sizes[row][0]} x {sizes[row][1]} pixels: sides are 1 to "
            f"{MOST_SIDE}"
        )
    return shard.dictionary.to_pylist(), shard.indices.to_numpy(), keys, sizes.astype(np.int32)


def _checked(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches of an index, texts no longer than any; of millions of different keys no dictionary is kept."""
    import pyarrow

    for batch in batches:
        check_texts(batch)
        for name in batch.schema.names:
            if batch.column(name).null_count:
                raise ValueError(f"has no complete column {name!r}")
        yield batch.set_column(batch.schema.names.index("key"), "key", batch.column("key").cast(pyarrow.string()))


def _key_column(keys: object) -> KeyColumn:
    """A pyarrow LargeStringArray as a column, without a Python object per key."""
    _, ends, content = keys.buffers()
    ends = np.frombuffer(ends, dtype=np.int64)[keys.offset : keys.offset + len(keys) + 1]
    content = np.frombuffer(content if content is not None else b"", dtype=np.uint8)[ends[0] : ends[-1]]
    return KeyColumn(content, ends - ends[0])


def from_headers(
    shards: Sequence[Shard], cache: ShardCache | None, progress: bool, check: Callable[[OpenShard], None] | None = None
) -> Columns:
    """The columns of shards, from walking the headers of all of them; the first record of each is read.

    Args:
        shards: local, or remote and then fetched whole, one after the other.
        check: looks at every open shard; by default ``check_shard``.

    Raises:
        DataError: from ``check``, or if a shard cannot be fetched, is no complete tar file or has another number of
            samples than build.json says.
    """
    tables = []
    counted = []
    for shard in bar(shards, "reading the headers of shards", progress):
        with open_shard(shard, cache) as opened:
            (check or check_shard)(opened)
            tables.append(opened.table.keys)
            counted.append(replace(shard, samples=len(opened)))
    lengths = [len(keys) for keys in tables]
    return Columns(
        tuple(counted),
        np.repeat(np.arange(len(counted), dtype=np.int32), lengths),
        np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        KeyColumn.joined(tables),
        None,
    )


def open_shard(shard: Shard, cache: ShardCache | None, table: ShardTable | None = None) -> OpenShard:
    """A shard for reading, its headers walked unless ``table`` already says where its members lie.

    Raises:
        DataError: if it cannot be fetched or opened, is no complete tar file, has another number of samples than
            build.json says, or another size than when the table was made.
    """
    file = open_file(shard.file, cache)
    try:
        opened = OpenShard(file, shard.place, table)
        if shard.samples is not None and len(opened) != shard.samples:
            raise DataError(
                f"{shard.place} holds {len(opened)} samples, and build.json says {shard.samples}: copy both again"
            )
    except DataError:
        file.close()
        raise
    return opened


def check_shard(opened: OpenShard) -> None:
    """See that every pair of a shard has its members, and that the first record is of our schema.

    Raises:
        DataError: if not; the message names shard and pair.
    """
    for place, what in opened.table.incomplete():
        raise DataError(f"{opened.name}: pair {opened.table.keys[place]!r} {what}; build the dataset again")
    read_record(opened.location(0))
