"""Captions of videos: in files beside them, and in tables."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import ClipError, InputError
from data_pipeline.file_names import Places, beside
from data_pipeline.texts import (
    SEVERAL,
    as_caption,
    check_columns,
    counted,
    decode_text,
    is_several,
    plain_columns,
    read_csv,
    read_json_lines,
    short,
)

COLUMNS = ("video", "caption")
MAX_CAPTION_BYTES = 1 << 20


def read_sidecar_caption(video: Path, notes: list[str] | None = None) -> str | None:
    """The caption in ``clip.txt`` or under "caption" in ``clip.json``; None if there is neither, or nothing in it.

    notes: takes a few words on what was assumed, or why there is no caption in a file that is there.
    """
    notes = [] if notes is None else notes
    for ending in (".txt", ".json"):
        try:
            content = _read_small(beside(video, ending))
            if content is None:
                continue
            text, caption = decode_text(content, "caption file", notes), None
            if ending == ".txt":
                caption = as_caption(text, "caption")
            elif isinstance(data := json.loads(text), dict) and "caption" in data:
                caption = as_caption(data["caption"], "caption")
                if is_several(data["caption"]):
                    notes.append(SEVERAL)
            else:
                notes.append('json without "caption"')
            return caption or None
        except ClipError as error:
            notes.append(f"caption file that cannot be used: {error.evidence['error']}")
        except InputError as error:
            notes.append(str(error))
        except (ValueError, RecursionError) as error:
            notes.append(f"caption file that is no json ({type(error).__name__})")
        except PermissionError:
            notes.append("caption file that cannot be read: no permission")
        except OSError:  # a name that is too long with this suffix
            continue
        return None
    return None


def _read_small(path: Path) -> bytes | None:
    """The content of a file; None if there is none. InputError for one that is too long for a caption."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        content = file.read(MAX_CAPTION_BYTES + 1)
    if len(content) > MAX_CAPTION_BYTES:
        raise InputError(f"caption file of more than {MAX_CAPTION_BYTES} bytes")
    return content


@dataclass(frozen=True)
class Row:
    """A row of a table of captions. place: the line or the row, for messages."""

    caption: str
    place: str


def read_captions(path: Path, notes: list[str] | None = None, places: Places | None = None) -> dict[str, Row]:
    """A table with the columns video and caption: csv, tsv, jsonl or parquet. InputError if it cannot be used.

    A whole number in the column video is a name; a list of texts in the column caption is several captions, of which
    the first that is not empty is taken. notes: takes sentences on what was assumed. places: with them, a caption of
    several lines is looked through for rows of other videos that an open quote has taken in.
    """
    notes = [] if notes is None else notes
    if not path.is_file():
        raise InputError(f"no captions table at {path}")
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"a captions table is {', '.join(readers)}, got {path.name}")
    captions: dict[str, Row] = {}
    several = 0
    for place, row in reader(path, notes):
        try:
            video, caption = _video_name(row["video"]), as_caption(row["caption"], "caption")
        except ClipError as error:
            raise InputError(f"{place}: {error.evidence['error']}") from error
        several += is_several(row["caption"])
        if places is not None and reader is _read_csv:
            _check_open_quote(row["caption"], places, place)
        if captions.setdefault(video, Row(caption, place)).caption != caption:
            raise InputError(f"{place}: {video} has two different captions, the other one in {captions[video].place}")
    if not captions:
        raise InputError(f"{path} has no rows")
    if several:
        notes.append(f"{counted(several, 'row')} of {path} with several captions: the first of each was taken")
    return captions


def _video_name(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ClipError("", error=f"video must be a file name, got {short(value)}")
    return value


def _check_open_quote(caption: str, places: Places, place: str) -> None:
    for line in re.split(r"[\r\n]+", caption)[1:]:
        called, parted, _ = line.partition(next((sign for sign in line if sign in ",;\t"), "\0"))
        if parted and places.find(called.strip(' "'))[0]:
            raise InputError(f"{place}: a quote is left open; it takes in the row of {called.strip()}")


def _read_csv(path: Path, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in read_csv(path, COLUMNS, notes):
        yield f"{path}, line {number}", row


def _read_jsonl(path: Path, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in read_json_lines(path, notes):
        place = f"{path}, line {number}"
        if isinstance(row, ValueError):
            raise InputError(f"{path}, {row}")
        if not isinstance(row, dict):
            raise InputError(f"{place} must be an object with the columns video and caption, got {short(row)}")
        columns = plain_columns(row, place)
        check_columns(columns, COLUMNS, place)
        yield place, dict(zip(columns, row.values(), strict=True))


def _read_parquet(path: Path, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = plain_columns(names, str(path))
            check_columns(columns, COLUMNS, str(path))
            wanted = [names[columns.index(name)] for name in COLUMNS]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {name: row[own] for name, own in zip(COLUMNS, wanted, strict=True)}
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read the captions table {path}: {error}") from error


def match_captions(table: Mapping[str, Row], path: Path, places: Places, notes: list[str]) -> dict[str, str]:
    """Captions by video name, see ``Places``. A row that fits two videos is not used; one that has a video's path comes
    before one that only ends like it. notes: takes sentences on rows that are not used.

    InputError if no row of a table fits any video: then the table belongs to other videos. Also if two rows fit a video
    equally well and differ.
    """
    found: dict[str, tuple[int, str]] = {}
    unused: list[str] = []
    unclear: list[tuple[str, list[str]]] = []
    for called, row in table.items():
        names, doubt = places.find(called)
        if len(names) > 1:
            unclear.append((called, names))
        elif not names:
            unused.append(called)
        else:
            other = found.get(names[0])
            if other is None or doubt < other[0]:
                found[names[0]] = (doubt, called)
                unused += [other[1]] if other else []
            elif doubt > other[0]:
                unused.append(called)
            elif table[other[1]].caption != row.caption:
                raise InputError(
                    f"{table[other[1]].place}, and {row.place}: {other[1]!r} and {called!r} both fit {names[0]!r}, "
                    "with different captions: leave one of them"
                )
    if not found and not unclear:
        first = unused[0]
        raise InputError(
            f"no row of the captions table names a video: it has {first!r}, the folder "
            f"{places.names[0]!r}{places.near(first)}"
        )
    if unused:
        first = unused[0]
        notes.append(
            f"{counted(len(unused), 'row')} of {path} without a video, the first one {first!r}{places.near(first)}"
        )
    if unclear:
        called, names = unclear[0]
        notes.append(
            f"{counted(len(unclear), 'row')} of {path} not used: more than one video fits the first one, {called!r}: "
            f"{names[0]!r} and {names[1]!r}; write the path below the folder, with its suffix"
        )
    return {name: table[called].caption for name, (_, called) in found.items()}
