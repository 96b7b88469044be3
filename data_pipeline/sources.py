"""Which videos there are, and their captions. Nothing is decoded here, and nothing heavy is imported until a table
needs it.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.records import InputError, VideoFile

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
MAX_KEY = 60
MAX_CAPTION_BYTES = 1 << 20


def find_videos(folder: Path, captions: Path | None = None, unused: list[str] | None = None) -> list[VideoFile]:
    """All videos below ``folder`` in the order of their names, each with its caption or None.

    Captions come from the table ``captions`` if one is given and has a row for the video, else from ``clip.txt`` or
    ``clip.json`` beside ``clip.mp4``. InputError for a missing or empty folder or an unusable table.

    Whatever has the name of a video is in the list, and so is a folder that cannot be read: what cannot be used is for
    ``read_videos`` to reject, so that it is counted. Links to folders are not followed.

    unused: takes the rows of the table that name none of the videos.
    """
    if not folder.exists():
        raise InputError(f"no folder of videos at {folder}")
    if not folder.is_dir():
        raise InputError(f"--videos needs a folder, but {folder} is a file")
    paths = _list_paths(folder)
    if not paths:
        raise InputError(f"no videos in {folder}: looked for *{', *'.join(SUFFIXES)}, in subfolders too")
    names = sorted(paths)
    table = read_captions(captions) if captions else {}
    by_name = match_captions(table, names)
    if unused is not None:
        known = {*names, *(name.rsplit("/", 1)[-1] for name in names)}
        unused += [name for name in table if name not in known]
    keys = make_keys(names)
    return [
        VideoFile(
            name=name, key=keys[name], path=paths[name], caption=by_name.get(name) or read_sidecar_caption(paths[name])
        )
        for name in names
    ]


def _list_paths(folder: Path) -> dict[str, Path]:
    unreadable: list[str] = []
    found = []
    for place, folders, files in os.walk(folder, onerror=lambda error: unreadable.append(str(error.filename))):
        found += [Path(place, name) for name in (*folders, *files) if Path(name).suffix.lower() in SUFFIXES]
    if str(folder) in unreadable:
        raise InputError(f"the folder of videos {folder} cannot be read: give permission, or choose another")
    paths: dict[str, Path] = {}
    for path in sorted({*found, *map(Path, unreadable)}, key=os.fsencode):
        name = readable_name(path.relative_to(folder).as_posix())
        while name in paths:  # another file is called by what this one's odd bytes look like
            name += "~"
        paths[name] = path
    return paths


def readable_name(name: str) -> str:
    """A file's name as text that can be written to any file; bytes that are not UTF-8 become a backslash, an x and two
    hex digits.
    """
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def clean_caption(text: str) -> str:
    """Runs of white space and control characters become one space; half a surrogate pair, which json can hold and no
    file can, becomes U+FFFD.
    """
    text = re.sub(r"[\x00-\x1f\x7f]", " ", text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(text.split())


def decode_text(content: bytes) -> str:
    """Text of a file in UTF-8, with or without a mark, in UTF-16 with one, or else in Windows-1252 (Latin-1 and a few
    quotation marks).
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def make_keys(names: Iterable[str]) -> dict[str, str]:
    """A key for every name: letters, digits, - and _ only, at most 60 of them, unique. A name that needs no change is
    its own key.
    """
    names = list(names)
    plain = {name: re.sub(r"[^A-Za-z0-9_-]+", "_", name.rsplit(".", 1)[0]) for name in names}
    # Letters of another case would be one file on some disks.
    counts = Counter(key.lower() for key in plain.values())
    keys = {}
    for name, key in plain.items():
        if counts[key.lower()] > 1 or len(key) > MAX_KEY or re.search(r"-(swapped|pair\d+)$", key):
            key = f"{key[: MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        keys[name] = key
    return keys


def read_sidecar_caption(video: Path) -> str | None:
    """The caption in ``clip.txt`` or under "caption" in ``clip.json``; None if there is neither, or nothing in it."""
    text = _read_small(video.with_suffix(".txt"))
    if text is not None:
        return clean_caption(decode_text(text)) or None
    data = _read_small(video.with_suffix(".json"))
    if data is None:
        return None
    try:
        content = json.loads(decode_text(data))
    except (ValueError, RecursionError):
        return None
    caption = content.get("caption") if isinstance(content, dict) else None
    return clean_caption(caption) or None if isinstance(caption, str) else None


def _read_small(path: Path) -> bytes | None:
    """The beginning of a file; None if there is none that can be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(MAX_CAPTION_BYTES)
    except OSError:  # no permission, or a name that is too long with this suffix
        return None


def read_captions(path: Path) -> dict[str, str]:
    """A table with the columns video and caption: csv, jsonl or parquet. InputError if it cannot be used."""
    if not path.is_file():
        raise InputError(f"no captions table at {path}")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"a captions table is .csv, .jsonl or .parquet, got {path.name}")
    captions: dict[str, str] = {}
    try:
        rows = list(reader(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the captions table {path}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping) or not isinstance(row.get("video"), str) or "caption" not in row:
            found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
            raise InputError(f"{path}, row {number}: needs the columns video and caption, found {found}")
        caption = clean_caption(str(row["caption"] or ""))
        if captions.setdefault(row["video"], caption) != caption:
            raise InputError(f"{path}, row {number}: {row['video']} has two different captions")
    return captions


def _read_csv(path: Path) -> Iterable[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    # Not splitlines(), which also splits at U+2028 and its like: in json they may stand inside a text.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not json: {error}") from error


def _read_parquet(path: Path) -> Iterable[Mapping[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read the captions table {path}: {error}") from error
    yield from table.to_pylist()


def match_captions(table: Mapping[str, str], names: list[str]) -> dict[str, str]:
    """Captions by video name. A row names its video by its path below the folder, or by the file name alone where
    that is unique.

    InputError if no row of a table fits any video: then the table belongs to other videos.
    """
    last_parts = Counter(name.rsplit("/", 1)[-1] for name in names)
    found = {}
    for name in names:
        last = name.rsplit("/", 1)[-1]
        if name in table:
            found[name] = table[name]
        elif last_parts[last] == 1 and last in table:
            found[name] = table[last]
    if table and not found:
        raise InputError(
            f"no row of the captions table names a video: it has {next(iter(table))!r}, the folder {names[0]!r}"
        )
    return found
