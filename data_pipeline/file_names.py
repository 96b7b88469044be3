"""Names of videos and of files beside them: on disk, in tables, and as people write them."""

import difflib
import os
import unicodedata
from pathlib import Path

SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".flv", ".f4v", ".ts", ".mts",
    ".m2ts", ".mpg", ".mpeg", ".vob", ".wmv", ".asf",
)  # fmt: skip
TRASH = frozenset(
    {"trash", "recycler", "$recycle.bin", "@recycle", "#recycle", "lost+found", "system volume information", "@eadir"}
    | {"__macosx"}
)
"""Folders, in small letters, in which systems keep what was deleted, and pictures and remains of their own."""


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
