"""Which videos there are, and their captions. Nothing is decoded, nothing heavy imported until a table needs it."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.pairs_format import KEY_CHARACTERS
from data_pipeline.records import ClipError, InputError, VideoFile
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

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".flv", ".f4v", ".ts", ".mts",
    ".m2ts", ".mpg", ".mpeg", ".vob", ".wmv", ".asf",
)  # fmt: skip
OTHERS = (
    ".ogv", ".ogm", ".rm", ".rmvb", ".mxf", ".gif", ".dv", ".h264", ".h265", ".hevc", ".m2v", ".mjpeg", ".y4m", ".swf",
    ".part", ".crdownload", ".zip", ".tar", ".gz", ".tgz", ".rar", ".7z",
)  # fmt: skip
"""Suffixes of files that a person may take for videos, or that may hold some, and that are not read."""
TRASH = frozenset(
    {"trash", "recycler", "$recycle.bin", "@recycle", "#recycle", "lost+found", "system volume information", "@eadir"}
    | {"__macosx"}
)
"""Folders, in small letters, in which systems keep what was deleted, and pictures and remains of their own."""
COLUMNS = ("video", "caption")
MAX_KEY = 60
MAX_CAPTION_BYTES = 1 << 20


def find_videos(folder: Path, captions: Path | None = None, notes: list[str] | None = None) -> list[VideoFile]:
    """All videos below ``folder`` in the order of their names, each with its caption or None.

    Captions come from the table ``captions`` if one is given and has a row for the video, else from ``clip.txt`` or
    ``clip.json`` beside ``clip.mp4``. InputError for a missing or empty folder or an unusable table.

    Whatever has the name of a video is in the list, and so is a folder that cannot be read: what cannot be used is for
    ``read_videos`` to reject, so that it is counted. Links to folders are not followed. Left out are hidden files and
    folders and those of a trash.

    notes: takes sentences on what was left out and what was assumed.
    """
    notes = [] if notes is None else notes
    if not folder.exists():
        raise InputError(f"no folder of videos at {folder}")
    if not folder.is_dir():
        raise InputError(f"--videos needs a folder, but {folder} is a file")
    paths, left_out = _list_paths(folder)
    if not paths:
        more = "".join(f"; {each}" for each in left_out)
        raise InputError(f"no videos in {folder}: looked for *{', *'.join(SUFFIXES)}, in subfolders too{more}")
    notes += left_out
    names = sorted(paths)
    by_name: dict[str, str] = {}
    if captions:
        places = Places(names, folder)
        by_name = match_captions(read_captions(captions, notes, places), captions, places, notes)
    keys = make_keys(names)
    files = []
    for name in names:
        own: list[str] = []
        caption = by_name.get(name) or read_sidecar_caption(paths[name], own)
        files.append(VideoFile(name=name, key=keys[name], path=paths[name], caption=caption, notes=tuple(own)))
    return files


def _list_paths(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Videos and folders that cannot be read, by name, and sentences on what was left out."""
    unreadable: list[str] = []
    found, hidden, others, links = [], [], Counter(), []
    for place, folders, files in os.walk(folder, onerror=lambda error: unreadable.append(str(error.filename))):
        inside = is_hidden(Path(place).relative_to(folder))
        for name in (*folders, *files):
            if Path(name).suffix.lower() in SUFFIXES:
                (hidden if inside or is_hidden(Path(name)) else found).append(Path(place, name))
        if not inside:
            links += [
                path for name in folders if (path := Path(place, name)).is_symlink() and not is_hidden(Path(name))
            ]
            others.update(suffix for name in files if (suffix := Path(name).suffix.lower()) in OTHERS)
    if str(folder) in unreadable:
        raise InputError(f"the folder of videos {folder} cannot be read: give permission, or choose another")
    locked = [path for path in map(Path, unreadable) if not is_hidden(path.relative_to(folder))]
    paths: dict[str, Path] = {}
    for path in sorted({*found, *locked}, key=os.fsencode):
        name = readable_name(path.relative_to(folder).as_posix())
        while name in paths:  # another file is called by what this one's odd bytes look like
            name += "~"
        paths[name] = path
    notes = []
    if hidden:
        first = readable_name(min(hidden, key=os.fsencode).relative_to(folder).as_posix())
        notes.append(f"left out: {counted(len(hidden), 'video')} hidden or in a trash, the first one {first!r}")
    if links := [path for path in links if path.suffix.lower() not in SUFFIXES]:
        first = readable_name(min(links, key=os.fsencode).relative_to(folder).as_posix())
        notes.append(f"left out: {counted(len(links), 'link')} to folders, not followed, the first one {first!r}")
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"left out: files that may be videos or hold some, but are of no kind that is read: {counts}")
    return paths, notes


def is_hidden(path: Path) -> bool:
    """True for a path below the folder of videos of which a part begins with a dot or is the name of a trash."""
    return any(part.startswith(".") or part.lower() in TRASH for part in path.parts)


def readable_name(name: str) -> str:
    """A file's name as text that any file can hold; bytes that are not UTF-8 become an escaped x and two hex digits."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def path_parts(name: str) -> list[str]:
    r"""Folders and file of a path or an address, written on whatever system: ["a", "b.jpg"] of "C:\a\b.jpg"."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    return [part for part in name.split("/") if part not in ("", ".", "..") and not part.endswith(":")]


def make_keys(names: Iterable[str]) -> dict[str, str]:
    """A key for every name: letters, digits, - and _ only, at most 60, unique; a name that is one stays."""
    names = list(names)
    plain = {name: re.sub(rf"[^{KEY_CHARACTERS}]+", "_", name.rsplit(".", 1)[0]) for name in names}
    # Letters of another case would be one file on some disks.
    counts = Counter(key.lower() for key in plain.values())
    keys = {}
    for name, key in plain.items():
        if counts[key.lower()] > 1 or len(key) > MAX_KEY or re.search(r"-(swapped|pair\d+)$", key):
            key = f"{key[: MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        keys[name] = key
    return keys


def beside(video: Path, ending: str) -> Path:
    """The file ``clip`` + ending beside ``clip.mp4``, see ``on_disk``."""
    return on_disk(video.parent, video.stem + ending)


def on_disk(folder: Path, name: str) -> Path:
    """Where a name below a folder lies: as it is written, else with slashes for backslashes and in either form of
    Unicode; as it is written if none of them is there.
    """
    path = folder / name
    if (name.isascii() and "\\" not in name) or os.path.lexists(path):
        return path
    spellings = (unicodedata.normalize(form, name.replace("\\", "/")) for form in ("NFC", "NFD"))
    return next((other for each in spellings if os.path.lexists(other := folder / each)), path)


def annotations_beside(video: Path) -> Path | None:
    """``clip.annotations.json`` beside ``clip.mp4``; None if there is none."""
    path = beside(video, ".annotations.json")
    return path if is_file(path) else None


def is_file(path: Path) -> bool:
    """True for a file that is there; Path.is_file raises an OSError for a name that is too long."""
    return os.path.isfile(path)  # noqa: PTH113


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


class Places:
    """The videos of a folder by all that people call them: the path, its end, with or without the suffix, on whatever
    system and in whatever form of Unicode it was written.
    """

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names = names
        self._whole: dict[str, list[str]] = {}
        self._ends: dict[str, list[str]] = {}
        above = path_parts(str(folder.resolve()))
        self._above = ["/".join(above[start:]) for start in range(len(above))]
        for name in names:
            parts = _stripped(name)
            stem = [*parts[:-1], parts[-1].rpartition(".")[0] or parts[-1]]
            for form in dict.fromkeys(("/".join(parts), "/".join(stem))):
                self._whole.setdefault(form, []).append(name)
            for start in range(1, len(parts)):
                for form in dict.fromkeys(("/".join(parts[start:]), "/".join(stem[start:]))):
                    self._ends.setdefault(form, []).append(name)
        self._exact = set(names)

    def find(self, called: str) -> tuple[list[str], int]:
        """The videos that may be called so, and in which way: 0 by the path below the folder, or by one that goes
        through the folder; 1 by the end of their paths; 2 by the end of what they are called. The lower, the surer.
        """
        if called in self._exact:
            return [called], 0
        parts = _stripped(called)
        form = "/".join(parts)
        found = self._whole.get(form, [])
        if len(found) > 1:  # clip.mp4 and clip.mov are both called clip, but "clip.mp4" is one of them
            found = [name for name in found if "/".join(_stripped(name)) == form] or found
        if found:
            return found, 0
        for above in self._above:
            if form.startswith(f"{above}/") and (found := self._whole.get(form[len(above) + 1 :], [])):
                return found, 0
        if found := self._ends.get(form, []):
            return found, 1
        for start in range(1, len(parts)):
            if found := self._whole.get("/".join(parts[start:]), []):
                return found, 2
        return [], 2

    def near(self, called: str) -> str:
        """A hint for a message: the video whose name is most like this one; "" if none is."""
        plain = {_plain(name): name for name in reversed(self.names[:1000])}
        found = difflib.get_close_matches(_plain(called), plain, n=1, cutoff=0.75)
        return f"; is it {plain[found[0]]!r}?" if found else ""


def _plain(name: str) -> str:
    """The last part without suffix, case and the zeros before a number."""
    stem, dot, suffix = _stripped(name)[-1].casefold().rpartition(".")
    return (stem if f".{suffix}" in SUFFIXES else stem + dot + suffix).lstrip("0")


def _stripped(name: str) -> list[str]:
    return [stripped for part in path_parts(name) if (stripped := part.strip(" \ufeff\r\n\t"))] or [name]


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
