"""How many values the columns of a parquet file hold, read from its footer without pyarrow.

pyarrow says it too, but ends the whole process at some damaged footers where it should raise an error.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

MARK = b"PAR1"


def column_values(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Per row group and column: its path in the schema, its number of values, and the rows of its group.

    ValueError, to be read after the file's name, for a footer that is broken.
    """
    file.seek(0, 2)
    size = file.tell()
    file.seek(max(0, size - 8))
    length, mark = struct.unpack("<I4s", file.read(8).rjust(8, b"\0"))
    if mark != MARK or length > size - 8:
        raise ValueError("is no parquet file")
    file.seek(size - 8 - length)
    try:
        footer = _Compact(file.read(length)).struct()
        # numbers of the fields as in parquet.thrift: FileMetaData, RowGroup, ColumnChunk, ColumnMetaData
        for group in footer[4]:
            for chunk in group[1]:
                yield b".".join(chunk[3][3]).decode(), int(chunk[3][5]), int(group[3])
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError, struct.error):
        raise ValueError("has a broken footer") from None


class _Compact:
    """Thrift's compact protocol: a struct is a dict from the numbers of its fields to their values."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def take(self, count: int) -> bytes:
        taken = self.content[self.place : self.place + count]
        if len(taken) != count:
            raise IndexError(count)
        self.place += count
        return taken

    def varint(self) -> int:
        value = shift = 0
        while True:
            [byte] = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError(shift)

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self.take(1)[0]
        if kind in (4, 5, 6):
            return self.integer()
        if kind == 7:
            return self.take(8)
        if kind == 8:
            return self.take(self.varint())
        if kind in (9, 10):
            [head] = self.take(1)
            count, of = head >> 4, head & 15
            return [self.item(of) for _ in range(self.varint() if count == 15 else count)]
        if kind == 11 and (count := self.varint()):
            [kinds] = self.take(1)
            return [(self.item(kinds >> 4), self.item(kinds & 15)) for _ in range(count)]
        if kind == 11:
            return []
        if kind == 12:
            return self.struct()
        raise ValueError(kind)

    def item(self, kind: int) -> Any:
        """In a list, where truth takes a byte of its own."""
        return self.take(1) == b"\1" if kind in (1, 2) else self.value(kind)

    def struct(self) -> dict[int, Any]:
        fields, number = dict[int, Any](), 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.integer()
            fields[number] = self.value(head & 15)
        return fields
