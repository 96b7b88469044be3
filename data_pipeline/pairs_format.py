"""The format of a pairs dataset (docs/data_format.md): its names, and the limits of what its files may declare.

Mining writes within them; every reader, mining's and training's, holds to them before it asks for memory or begins to
count, because a dataset may come from anybody. Standard library only.
"""

import re
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.parquet_footer import column_values

PAIRS_SCHEMA = "msdiffusion.pairs/1"
"""Of a sample's json: the one that this version reads and writes."""
BUILD_SCHEMA = "data_pipeline.build/1"
"""Of build.json."""
ANNOTATIONS_SCHEMA = "data_pipeline.annotations/1"
"""Of the boxes and masks beside a clip or a picture."""

MOST_KEY = 200
"""Characters of a key: it becomes the name of a file, with a suffix."""
KEY_CHARACTERS = "A-Za-z0-9_-"
KEY = re.compile(rf"[{KEY_CHARACTERS}]{{1,{MOST_KEY}}}")
"""A key of a sample or of a clip, as mining makes them: nothing in it can lead out of a folder."""
KEY_IN_WORDS = f"1 to {MOST_KEY} letters, digits, - and _"
MEMBER = re.compile(rf"(?P<key>{KEY.pattern})\.(?P<suffix>target\.jpg|json|reference_(?:0|[1-9][0-9]{{0,4}})\.png)")
"""A member of a shard."""
SWAPPED_SUFFIX = "-swapped"
"""Ends the key of a pair that is another pair the other way round: reference frame and target frame exchanged."""

MOST_PIXELS = 1 << 26
"""Of one picture that training reads."""
MOST_SIDE = 65_500
"""Pixels: the longest side of a JPEG."""
MOST_FRAME_PIXELS = 1 << 28
"""Of a frame and of its mask, which may be larger than the cut-out that is kept of it."""
MOST_CAPTION = 10_000
"""Characters."""
MOST_PHRASE = 1_000
"""Characters."""
MOST_SUBJECTS = 256
"""Of one sample."""
MOST_MEMBER_BYTES = 1 << 28
"""Of one picture: the pixels of the largest one, uncompressed, are no more."""
MOST_JSON_BYTES = 1 << 25
"""Of one sample's json."""
MOST_HEADER_BYTES = 1 << 20
"""Of what a tar header holds besides its own 512 bytes: long names, extended attributes."""
MOST_BUILD_BYTES = 1 << 25
"""Of build.json, which has a line for every shard, of report/notes.json and of damaged.json."""
MOST_LINE_BYTES = 1 << 20
"""Of one line of rejected.jsonl."""
BLANK_REFERENCE = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c48900000010494441547801010500faff0000"
    "00000000050001647895380000000049454e44ae426082"
)
"""A transparent PNG of one pixel. All samples of a dataset have as many references as the one with the most subjects,
because readers of WebDataset shards expect the same members of all; this one stands where there is no subject.
"""
SAMPLE_BYTES = 6 * 512
"""The least that a sample takes in a shard: three members, each a header and a block."""


def most_bytes(suffix: str) -> int:
    """Of a member of a shard with this suffix ("json", "target.jpg", ...)."""
    return MOST_JSON_BYTES if suffix == "json" else MOST_MEMBER_BYTES


def is_size(width: Any, height: Any) -> bool:
    """Whether two values are width and height, in pixels, that a frame may have."""
    sides = (width, height)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and 0 < side <= MOST_SIDE for side in sides)
    return whole and width * height <= MOST_FRAME_PIXELS


def fault_of_text(text: Any, most: int) -> str:
    """What is wrong with a caption or a phrase, to be read after its name; "" for nothing."""
    if not isinstance(text, str):
        return "is no text"
    return f"has {len(text):,} characters, more than the {most:,} that are read" if len(text) > most else ""


def tar_member(name: str, content: bytes) -> bytes:
    """Header and content of one member, padded to whole blocks; no clock and no user in it."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


class HeaderFile:
    """A tar file for Python's own reader, when only its headers are wanted: it refuses to read much at once, which a
    header asks for that says it has a name of gigabytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """So many bytes. ValueError for more than a header may have."""
        if not 0 <= size <= MOST_HEADER_BYTES:
            raise ValueError(f"a header says that it has {size:,} bytes, more than {MOST_HEADER_BYTES:,}")
        return self._file.read(size)


# -------------------------------------------------------------------------------------------------------- index.parquet

TEXTS = {"key": MOST_KEY, "shard": MOST_PHRASE, "video": MOST_CAPTION, "caption": MOST_CAPTION}
"""Its columns of texts, and the most characters of one."""
WHOLE = ("width", "height", "num_subjects")
SHARES = ("min_detection_score", "min_match_similarity")
COLUMNS = (*TEXTS, *WHOLE, "phrases", "areas", *SHARES, "frame_gap_seconds")


def open_index(file: Any, columns: Iterable[str], rows: int) -> Any:
    """A pyarrow ParquetFile of an index.parquet whose columns and sizes are what they should be. Texts come as
    dictionaries, so that one that is named a million times is in memory once.

    file: path or open file. columns: that will be read. rows: build.json says, and the most there may be. ValueError,
    to be read after the file's name, for what is not as it should be; errors of pyarrow for a file that is no parquet.
    """
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as plain:
        facts, schema = plain.metadata, plain.schema_arrow
    for name in columns:
        if name not in schema.names:
            raise ValueError(f"has no complete column {name!r}")
        if not _is_of_its_type(name, schema.field(name).type):
            raise ValueError(f"has a column {name!r} of the type {schema.field(name).type}, which is none of its")
    paths = [facts.schema.column(place).path for place in range(facts.num_columns)]
    texts = [path for path in paths if path.partition(".")[0] in (*TEXTS, "phrases")]
    if facts.num_rows > rows:
        raise ValueError(f"has {facts.num_rows:,} rows, and build.json says {rows:,} samples")
    with Path(file).open("rb") if isinstance(file, (str, Path)) else nullcontext(file) as content:
        for path, values, of_group in column_values(content):
            if values > of_group * MOST_SUBJECTS:
                most = f"more than {MOST_SUBJECTS} a row"
                raise ValueError(f"has {values:,} values of {path} in {of_group:,} rows, {most}")
    return ParquetFile(file, metadata=facts, read_dictionary=texts)


def check_texts(batch: Any) -> None:
    """ValueError for too long a text in a batch of an index of ``open_index``, before it becomes Python's values."""
    from pyarrow import compute

    for name in batch.schema.names:
        column = batch.column(name)
        values = column.values if name == "phrases" else column
        if name not in (*TEXTS, "phrases") or not len(values):
            continue
        longest = compute.max(compute.binary_length(getattr(values, "dictionary", values))).as_py() or 0
        most = 4 * TEXTS.get(name, MOST_PHRASE)  # bytes of UTF-8
        if longest > most:
            raise ValueError(f"has a text of {longest:,} bytes in the column {name!r}, more than {most:,}")


def _is_of_its_type(name: str, kind: Any) -> bool:
    from pyarrow import types

    if name in ("phrases", "areas"):
        return types.is_list(kind) and _is_of_its_type("key" if name == "phrases" else "width", kind.value_type)
    if name in TEXTS:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind)
    if name in WHOLE:
        return types.is_integer(kind) or types.is_floating(kind)
    return types.is_floating(kind) or types.is_integer(kind) or types.is_null(kind)


def fault_of_row(row: Mapping[str, Any]) -> str:
    """What is wrong with a row of the index, to be read after its place; "" for nothing."""
    for name, most in TEXTS.items():
        if fault := fault_of_text(row[name], most):
            return f"{name} {fault}"
    if not KEY.fullmatch(row["key"]):
        return f"key {row['key']!r} is none: needed are {KEY_IN_WORDS}"
    if not is_size(row["width"], row["height"]):
        return f"width and height {row['width']!r} and {row['height']!r} are none of a picture of a sample"
    phrases, areas, count = row["phrases"], row["areas"], row["num_subjects"]
    if not (isinstance(phrases, list) and isinstance(areas, list) and len(phrases) == len(areas) == count):
        return f"num_subjects {count!r} is not the number of its phrases and areas"
    if not 0 < count <= MOST_SUBJECTS:
        return f"num_subjects {count} is not in 1 to {MOST_SUBJECTS}"
    if fault := next(filter(None, (fault_of_text(phrase, MOST_PHRASE) for phrase in phrases)), ""):
        return f"phrase {fault}"
    least = {"min_match_similarity": -1.0}
    for name, value in [*(("area", area) for area in areas), *((name, row[name]) for name in SHARES)]:
        if value is None and name == "min_match_similarity":
            continue
        # A cosine may be above 1 by what rounding adds.
        if not isinstance(value, int | float) or not least.get(name, 0.0) - 1e-3 <= value <= 1 + 1e-3:
            return f"{name} {value!r} is not in {least.get(name, 0):g} to 1"
    gap = row["frame_gap_seconds"]
    if gap is not None and not (isinstance(gap, int | float) and 0 <= gap < 1e9):
        return f"frame_gap_seconds {gap!r} is no time of a video"
    return ""
