"""Which videos there are, and their captions. Nothing is decoded here, and nothing heavy is imported until a table
needs it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.records import InputError, VideoFile

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
MAX_KEY = 60


def find_videos(folder: Path, captions: Path | None = None) -> list[VideoFile]:
    """All videos below ``folder`` in the order of their names, each with its caption or None.

    Captions come from the table ``captions`` if one is given and has a row for the video, else from ``clip.txt`` or
    ``clip.json`` beside ``clip.mp4``. InputError for a missing or empty folder or an unusable table.
    """
    if not folder.exists():
        raise InputError(f"no folder of videos at {folder}")
    if not folder.is_dir():
        raise InputError(f"--videos needs a folder, but {folder} is a file")
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    if not paths:
        raise InputError(f"no videos in {folder}: looked for *{', *'.join(SUFFIXES)}, in subfolders too")
    names = sorted(paths)
    table = read_captions(captions) if captions else {}
    by_name = match_captions(table, names)
    keys = make_keys(names)
    return [
        VideoFile(
            name=name, key=keys[name], path=paths[name], caption=by_name.get(name) or read_sidecar_caption(paths[name])
        )
        for name in names
    ]


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
        if counts[key.lower()] > 1 or len(key) > MAX_KEY or key.endswith("-swapped"):
            key = f"{key[: MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        keys[name] = key
    return keys


def read_sidecar_caption(video: Path) -> str | None:
    """The caption in ``clip.txt`` or under "caption" in ``clip.json``; None if there is neither, or nothing in it."""
    text, data = video.with_suffix(".txt"), video.with_suffix(".json")
    if text.is_file():
        return " ".join(text.read_text(encoding="utf-8", errors="replace").split()) or None
    if data.is_file():
        try:
            content = json.loads(data.read_text(encoding="utf-8"))
        except ValueError:
            return None
        caption = content.get("caption") if isinstance(content, dict) else None
        return " ".join(caption.split()) or None if isinstance(caption, str) else None
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
        caption = " ".join(str(row["caption"] or "").split())
        if captions.setdefault(row["video"], caption) != caption:
            raise InputError(f"{path}, row {number}: {row['video']} has two different captions")
    return captions


def _read_csv(path: Path) -> Iterable[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
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
