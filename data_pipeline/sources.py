"""Which videos there are, and their captions. Nothing is decoded, nothing heavy imported until a table needs it."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.captions import match_captions, read_captions, read_sidecar_caption
from data_pipeline.errors import InputError
from data_pipeline.file_names import SUFFIXES, Places, is_hidden, readable_name
from data_pipeline.pairs_format import KEY_CHARACTERS
from data_pipeline.records import VideoFile
from data_pipeline.texts import counted

OTHERS = (
    ".ogv", ".ogm", ".rm", ".rmvb", ".mxf", ".gif", ".dv", ".h264", ".h265", ".hevc", ".m2v", ".mjpeg", ".y4m", ".swf",
    ".part", ".crdownload", ".zip", ".tar", ".gz", ".tgz", ".rar", ".7z",
)  # fmt: skip
"""Suffixes of files that a person may take for videos, or that may hold some, and that are not read."""
MAX_KEY = 60


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
