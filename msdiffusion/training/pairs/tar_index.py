"""Where the members of a shard lie in its tar file, as arrays: no Python object per pair outlives the walk.

Shape letters: n pairs of one shard, m members of one shard, N pairs of a dataset.
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from data_pipeline.pairs_format import KEY, KEY_IN_WORDS, MOST_KEY, HeaderFile, most_bytes
from msdiffusion.errors import DataError, shown

BLOCK = tarfile.BLOCKSIZE
_AT_ONCE = 100_000
_IN_KEYS = np.array([KEY.fullmatch(chr(code)) is not None for code in range(256)])
"""Per byte, whether it may stand in a key."""
REFERENCE = ("reference_", ".png")
"""Before and after the number of a subject, in the name of the member that shows it."""


class KeyColumn(Sequence[str]):
    """Many short strings in two arrays: 30 bytes for a key of 22 characters, where a list of str takes 80 and more.

    It can be sent to other processes cheaply, and reading it after a fork copies no page of memory.

    Args:
        content: uint8, the strings one after the other in UTF-8.
        ends: int64 (N + 1,), where string i begins (``ends[i]``) and ends (``ends[i + 1]``) in ``content``.
    """

    def __init__(self, content: np.ndarray, ends: np.ndarray) -> None:
        self.content = content
        self.ends = ends

    @classmethod
    def of(cls, keys: Iterable[str]) -> KeyColumn:
        """The column of these strings; half surrogates (file names that are no UTF-8) are kept."""
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        ends = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(key) for key in encoded], out=ends[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def joined(cls, columns: Sequence[KeyColumn]) -> KeyColumn:
        """The columns one after the other."""
        starts = np.cumsum([0, *(column.ends[-1] for column in columns)])
        ends = [np.zeros(1, dtype=np.int64)]
        ends += [column.ends[1:] + start for column, start in zip(columns, starts, strict=False)]
        return cls(np.concatenate([np.zeros(0, np.uint8), *(c.content for c in columns)]), np.concatenate(ends))

    def __len__(self) -> int:
        """Number of strings."""
        return len(self.ends) - 1

    def encoded(self) -> Iterator[bytes]:
        """All strings in UTF-8, one after the other."""
        for first in range(0, len(self), _AT_ONCE):
            ends = self.ends[first : first + _AT_ONCE + 1]
            piece = self.content[ends[0] : ends[-1]].tobytes()
            numbers = (ends - ends[0]).tolist()
            for start, end in itertools.pairwise(numbers):
                yield piece[start:end]

    def __iter__(self) -> Iterator[str]:
        return (key.decode("utf-8", "surrogateescape") for key in self.encoded())

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One string, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} keys, so no number {index}")
        index %= len(self)
        return self.content[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")

    def first_unlawful(self) -> int | None:
        """Number of the first string that can be no key of a pair, or None."""
        lengths = np.diff(self.ends)
        if not len(lengths) or (lengths.min() > 0 and lengths.max() <= MOST_KEY and _IN_KEYS[self.content].all()):
            return None
        return next(number for number, key in enumerate(self) if not KEY.fullmatch(key))

    def take(self, indices: np.ndarray) -> KeyColumn:
        """The strings of these numbers, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        lengths = np.diff(self.ends)[indices]
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        content = np.empty(ends[-1], dtype=np.uint8)
        for first in range(0, len(indices), _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            begin, end = ends[first], ends[min(first + _AT_ONCE, len(indices))]
            # every byte of the result: where its string began before, plus how far into its string it stands
            within = np.arange(begin, end) - np.repeat(ends[:-1][rows], lengths[rows])
            content[begin:end] = self.content[np.repeat(self.ends[indices[rows]], lengths[rows]) + within]
        return KeyColumn(content, ends)

    def first_repeated(self) -> tuple[int, int] | None:
        """Numbers (first, second) of the first string that is there twice, or None; compared exactly, in arrays."""
        import pyarrow

        buffers = [None, pyarrow.py_buffer(self.ends), pyarrow.py_buffer(np.ascontiguousarray(self.content))]
        codes = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(self), buffers).dictionary_encode().indices
        codes = codes.to_numpy()  # equal strings have equal codes, and codes count up as new strings come
        pyarrow.default_memory_pool().release_unused()  # the table of all strings, hundreds of megabytes at full size
        fresh = np.maximum.accumulate(codes, dtype=np.int64) if len(codes) else codes
        repeated = np.flatnonzero(np.diff(fresh, prepend=-1) == 0)
        if not len(repeated):
            return None
        second = int(repeated[0])
        return int(np.flatnonzero(codes == codes[second])[0]), second


@dataclass(frozen=True)
class ShardTable:
    """The members of one shard."""

    keys: KeyColumn
    """Of its n pairs, in the order in which their first members stand in the file."""
    starts: np.ndarray
    """int64 (n + 1,): the members of pair i are the rows ``starts[i]`` to ``starts[i + 1]`` of the arrays below."""
    suffix: np.ndarray
    """int32 (m,): number of the member's suffix in ``suffixes``."""
    offsets: np.ndarray
    """int64 (m,): first byte of the member's content in the tar file."""
    sizes: np.ndarray
    """int64 (m,): bytes of content."""
    bytes: int
    """Size of the tar file."""
    suffixes: tuple[str, ...]
    """``json``, ``target.jpg``, ``reference_0.png``, ...: what follows the first dot of a member's file name."""

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.starts) - 1

    def members(self, place: int) -> dict[str, tuple[int, int]]:
        """Suffix -> (offset, size) in bytes of the members of one pair."""
        rows = slice(self.starts[place], self.starts[place + 1])
        numbers = zip(self.suffix[rows].tolist(), self.offsets[rows].tolist(), self.sizes[rows].tolist(), strict=True)
        return {self.suffixes[number]: (offset, size) for number, offset, size in numbers}

    def incomplete(self) -> list[tuple[int, str]]:
        """(place, what is wrong) of every pair that lacks its json, its target, or a reference before its last one."""
        found = []
        for name in ("json", "target.jpg"):
            number = self.suffixes.index(name) if name in self.suffixes else -1
            has = np.add.reduceat(self.suffix == number, self.starts[:-1]) > 0
            found += [(int(place), f"has no {name}") for place in np.flatnonzero(~has)]
        # number of the subject that each member shows, or -1: n pairs with references 0 ... k sum to k (k + 1) / 2
        subject = np.array([_subject_of(suffix) for suffix in self.suffixes])[self.suffix]
        last = np.maximum.reduceat(subject, self.starts[:-1])
        count = np.add.reduceat(subject >= 0, self.starts[:-1])
        found += [
            (int(place), f"has reference_{last[place]}.png, but {count[place]} references in all")
            for place in np.flatnonzero(count != last + 1)
        ]
        return sorted(found)


def _subject_of(suffix: str) -> int:
    before, after = REFERENCE
    number = suffix.removeprefix(before).removesuffix(after)
    is_one = suffix == f"{before}{number}{after}" and number.isascii() and number.isdigit()
    return int(number) if is_one and str(int(number)) == number else -1


def walk_shard(descriptor: int, name: str) -> ShardTable:
    """Read the headers of a tar file, and nothing else of it.

    Args:
        descriptor: of the open file; its position is neither used nor changed.

    Raises:
        DataError: if it is not a tar file, is cut off or damaged between two members, holds no member, holds one
            twice, one that is larger than any of a pair, or one whose key is none.
    """
    size_of_file = os.fstat(descriptor).st_size
    try:
        rows = list(_walk_plain(descriptor, size_of_file))
    except _UnusualHeaderError:
        rows = _walk_any(descriptor)
    except ValueError as error:
        raise DataError(f"{name} {error}; copy it again or build the dataset again") from error
    end = max((offset + -(-size // BLOCK) * BLOCK for _, offset, size in rows), default=0)
    mark = b"" if end > size_of_file else os.pread(descriptor, BLOCK, end)
    if len(mark) < BLOCK:
        raise DataError(
            f"{name} is cut off: it has {size_of_file} bytes, and a tar file with its members would have more than "
            f"{end}; copy it again or build the dataset again"
        )
    if any(mark):
        raise DataError(f"{name} is damaged after byte {end}; copy it again or build the dataset again")
    if not rows:
        raise DataError(f"{name} holds no pair; build the dataset again, or remove the file")
    table = _table(rows, size_of_file, name)
    if (number := table.keys.first_unlawful()) is not None:
        raise DataError(
            f"{name} holds a pair with the key {shown(table.keys[number])}, but keys are {KEY_IN_WORDS}; build the "
            "dataset again"
        )
    most = np.array([most_bytes(suffix) for suffix in table.suffixes])[table.suffix]
    if len(rows := np.flatnonzero(table.sizes > most)):
        raise DataError(
            f"{name} holds a member {shown(table.suffixes[table.suffix[rows[0]]])} of {table.sizes[rows[0]]:,} bytes, "
            f"more than the {most[rows[0]]:,} that are read; build the dataset again"
        )
    return table


class _UnusualHeaderError(Exception):
    """A lawful header that the quick walk does not read: long names, sizes above 8 GiB, links, other dialects."""


def _walk_plain(descriptor: int, size_of_file: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the files in a tar file of plain headers, as every tar writer makes them for short names.

    Python's own reader takes more than twice as long, which counts where each of many processes opens thousands of
    shards, and it takes a damaged header in the middle for the end of the file.

    Raises:
        ValueError: what is wrong with the file, to be read after its name.
        _UnusualHeaderError: read it with ``_walk_any``.
    """
    position = 0
    while position + BLOCK <= size_of_file:
        block = os.pread(descriptor, BLOCK, position)
        if block == bytes(BLOCK):
            return
        try:
            said = int(block[148:156].strip(b" \0"), 8)
        except ValueError:
            said = -1
        if sum(block) - sum(block[148:156]) + 8 * ord(" ") != said:
            raise ValueError("is not a complete tar file" if position == 0 else f"is damaged after byte {position}")
        digits = block[124:136].strip(b" \0") or b"0"
        if block[257:262] != b"ustar" or block[156:157] not in b"0\x005" or not re.fullmatch(rb"[0-7]+", digits):
            raise _UnusualHeaderError
        name = block[:100].partition(b"\0")[0]
        if block[262] == 0 and block[345]:
            name = block[345:500].partition(b"\0")[0] + b"/" + name
        size = int(digits, 8)
        if block[156:157] != b"5":
            yield name.decode("utf-8", "surrogateescape"), position + BLOCK, size
        position += BLOCK + -(-size // BLOCK) * BLOCK
    if size_of_file < BLOCK:
        raise ValueError(f"is not a complete tar file: it has {size_of_file} bytes")


def _walk_any(descriptor: int) -> list[tuple[str, int, int]]:
    """The same by Python's own reader, which knows every dialect.

    Raises:
        DataError: never; what is wrong shows in the end mark.
    """
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        rows: list[tuple[str, int, int]] = []
        try:
            with tarfile.open(fileobj=HeaderFile(file), mode="r:") as archive:
                rows += ((m.name, m.offset_data, m.size) for m in archive if m.isreg())
        except (tarfile.TarError, EOFError, ValueError, OSError, OverflowError):
            pass  # the walk ended too early, so what follows the last member is no end mark: the caller tells it
    return rows


def _table(rows: Sequence[tuple[str, int, int]], size_of_file: int, name: str) -> ShardTable:
    keys: dict[str, int] = {}
    suffixes: dict[str, int] = {}
    pair = np.empty(len(rows), dtype=np.int64)
    suffix = np.empty(len(rows), dtype=np.int32)
    for row, (member, _, _) in enumerate(rows):
        # as WebDataset does: the key ends at the first dot of the file name
        folder, slash, file_name = member.rpartition("/")
        stem, _, end = file_name.partition(".")
        pair[row] = keys.setdefault(f"{folder}{slash}{stem}", len(keys))
        suffix[row] = suffixes.setdefault(end, len(suffixes))
    order = np.argsort(pair, kind="stable")  # members of one pair need not stand together
    seen = pair * len(suffixes) + suffix
    if len(np.unique(seen)) < len(seen):
        first = {int(code): row for row, code in reversed(list(enumerate(seen)))}
        twice = next(rows[row][0] for row, code in enumerate(seen) if first[int(code)] != row)
        raise DataError(f"{name} holds {twice!r} twice; build the dataset again")
    return ShardTable(
        keys=KeyColumn.of(keys),
        starts=np.searchsorted(pair[order], np.arange(len(keys) + 1)),
        suffix=suffix[order],
        offsets=np.array([offset for _, offset, _ in rows], dtype=np.int64)[order],
        sizes=np.array([size for _, _, size in rows], dtype=np.int64)[order],
        bytes=size_of_file,
        suffixes=tuple(suffixes),
    )
