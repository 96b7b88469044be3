"""Hypothesis strategies that damage a good file: what stands in a document, in a table, in a tar, and single bytes.

A mutation is drawn as small numbers, so that Hypothesis can shrink what it finds to a few of them.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

LITERALS = {
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@overflow": "1e999",
    "@digits": "9" * 5000,
    "@long": '"' + "a" * 20_000 + '"',
    "@deep": "[" * 2000 + "]" * 2000,
    "@deeper": '{"a":' * 20_000 + "1" + "}" * 20_000,
}
"""What json can say and Python's writer does not, or what is long: a text in a document, and put in afterwards."""
TEXTS = (
    "", " ", "0", "-1", "nan", "../../escape", "/etc/hostname", "C:\\x", "a/b", ".", "con", "\0", "\x1b[2J", "\u202e",
    "\ud800", "<b>&", "{{7*7}}", "%s%n", "🐕", "é", "\r\n", "null", "true", "=1+1", "dog", "x" * 300,
)  # fmt: skip
NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, -1e308, 1e-320, 0.5, 10**18, 65536, 100_000)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-3, 300),
    st.floats(-2, 2),
    st.sampled_from(TEXTS),
    st.text(max_size=6),
    st.sampled_from(sorted(LITERALS)),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3)),
    max_leaves=5,
)
edits = st.lists(
    st.tuples(st.sampled_from(("replace", "remove", "repeat", "rename", "swap")), st.integers(0, 10_000), values),
    min_size=1,
    max_size=4,
)


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document, the outermost first."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    for container in waiting:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                waiting.append(container[key])
    return found


def edited(document: Any, changes: Sequence[tuple[str, int, Any]]) -> Any:
    """A copy of a document, changed in each of the places that the numbers mean."""
    root = [copy.deepcopy(document)]
    for what, number, value in changes:
        places = _places(root)
        container, key = places[number % len(places)]
        if what == "replace":
            container[key] = copy.deepcopy(value)
        elif what == "remove" and len(places) > 1 and container is not root:
            container.pop(key)
        elif what == "repeat" and isinstance(container, list) and container is not root:
            container.insert(key, copy.deepcopy(container[key]))
        elif what == "rename" and isinstance(container, dict):
            container[str(value)[:50]] = container.pop(key)
        elif what == "swap":
            other, place = places[(number * 7 + 3) % len(places)]
            container[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(container[key])
    return root[0]


def as_json(document: Any, indent: int | None = None) -> bytes:
    """As a file, with what only a hand writes."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    for name, literal in LITERALS.items():
        text = text.replace(f'"{name}"', literal)
    return text.encode("utf-8", "surrogatepass")


def documents(seed: Any) -> st.SearchStrategy[bytes]:
    """Of a json file."""
    return edits.map(lambda changes: as_json(edited(seed, changes)))


byte_edits = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "remove", "repeat", "insert", "zero")),
        st.integers(0, 1 << 20),
        st.integers(0, 1 << 12),
        st.binary(max_size=8),
    ),
    min_size=1,
    max_size=5,
)


def with_bytes_changed(content: bytes, changes: Sequence[tuple[str, int, int, bytes]]) -> bytes:
    """Bytes of a file turned, cut off, taken out, repeated, put in or set to zero."""
    data = bytearray(content)
    for what, at, length, inserted in changes:
        at %= len(data) + 1
        if what == "flip" and at < len(data):
            data[at] ^= 1 << (length % 8)
        elif what == "cut":
            del data[at:]
        elif what == "remove":
            del data[at : at + length % 64]
        elif what == "repeat":
            data[at:at] = data[at : at + length]
        elif what == "insert":
            data[at:at] = inserted
        elif what == "zero":
            span = len(data[at : at + length % 64])
            data[at : at + span] = bytes(span)
    return bytes(data)


def damaged(seed: bytes) -> st.SearchStrategy[bytes]:
    """Of any file."""
    return byte_edits.map(lambda changes: with_bytes_changed(seed, changes))


def texts(seed: str) -> st.SearchStrategy[bytes]:
    """Of a table or a YAML file: pieces of it taken out, said twice, or replaced by what should not stand there."""
    pieces = [piece for piece in seed.replace(",", "\0,\0").replace("\n", "\0\n\0").split("\0") if piece]

    def change(changes: Sequence[tuple[str, int, Any]]) -> bytes:
        changed = edited(pieces, changes)
        text = [str(piece) for piece in changed] if isinstance(changed, list) else [str(changed)]
        for name, literal in LITERALS.items():
            text = [literal if piece == name else piece for piece in text]
        return "".join(text).encode("utf-8", "surrogatepass")

    return edits.map(change)


def archives(seed: Callable[[], dict[str, bytes]], record: str) -> st.SearchStrategy[bytes]:
    """Of a tar: a record in it, its members' names and order, and what its headers claim (with right checksums)."""
    members = seed()
    document = json.loads(members[record])
    claims = st.lists(
        st.tuples(
            st.integers(0, len(members) - 1),
            st.one_of(
                st.tuples(st.just("size"), st.sampled_from((0, 1, 511, 2**20, 2**33, 2**40))),
                st.tuples(st.just("name"), st.sampled_from(TEXTS[:14]) | st.sampled_from(sorted(members))),
                st.tuples(st.just("type"), st.sampled_from((b"0", b"1", b"2", b"5", b"L", b"x", b"g", b"S"))),
            ),
        ),
        max_size=3,
    )

    def make(changes: Sequence[tuple[str, int, Any]], claimed: Sequence[tuple[int, tuple[str, Any]]]) -> bytes:
        blocks = b""
        for index, (name, content) in enumerate(members.items()):
            if name == record and changes:
                content = as_json(edited(document, changes))
            header = tarfile.TarInfo(name)
            header.size = len(content)
            for number, (attribute, value) in claimed:
                if number == index:
                    setattr(header, attribute, value)
            header.name = header.name.replace("\0", "0").encode("utf-8", "replace").decode() or "x"
            blocks += header.tobuf(tarfile.GNU_FORMAT, "utf-8", "replace") + content + bytes(-len(content) % 512)
        return blocks + bytes(1024)

    return st.builds(make, st.just([]) | edits, claims)


def pictures_with_text(make: Callable[[str], bytes], record: Any) -> st.SearchStrategy[bytes]:
    """Of a PNG with a document in its metadata."""
    return edits.map(lambda changes: make(as_json(edited(record, changes)).decode("utf-8", "replace")))


def tables(rows: Sequence[dict[str, Any]]) -> st.SearchStrategy[bytes]:
    """Of a parquet file: other values, columns that are missing, or of another type."""
    import pyarrow
    import pyarrow.parquet

    def make(changes: Sequence[tuple[str, int, Any]]) -> bytes:
        changed = edited(list(rows), changes)
        changed = [row for row in changed if isinstance(row, dict)] if isinstance(changed, list) else []
        names = sorted({str(name) for row in changed for name in row})
        columns = {}
        for name in names:
            column = [row.get(name) for row in changed]
            try:
                columns[name] = pyarrow.array(column)
            except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
                columns[name] = pyarrow.array([None if value is None else ascii(value) for value in column])
        buffer = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
        except (pyarrow.ArrowException, ValueError):  # an empty struct, a name that is no UTF-8: parquet cannot say it
            pyarrow.parquet.write_table(pyarrow.table({"key": [1]}), buffer)
        return buffer.getvalue()

    return edits.map(make)
