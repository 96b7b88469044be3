"""What an importer reads of its source, in one form for all of them, and the file that the workers take it from.

An item is a target picture, a caption and subjects. Items are read one after the other and written down, a line each,
in the working folder of the run: so hundreds of thousands of them, with masks, pass through without being held in
memory, and a worker is told nothing but where its line lies.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data_pipeline.errors import ClipError, InputError
from data_pipeline.file_names import on_disk, readable_name
from data_pipeline.records import VideoFile
from data_pipeline.sources import make_keys
from data_pipeline.texts import UNREADABLE, short

OUTSIDE = "path outside the folder of pictures"


@dataclass(frozen=True, kw_only=True)
class ImportSubject:
    """One subject as its source says it; nothing is checked yet but what has to be a text is one."""

    phrase: str
    box: Any
    """xyxy in the target picture; None to take the tight box of the mask (in a single frame)."""
    reference: str | None = None
    """The picture that it is cut out of; None for the target itself."""
    reference_box: Any = None
    """xyxy in the reference picture; not used where that is the target."""
    mask: Any = None
    """Of the reference picture: run lengths or polygons (a mapping), nested lists, or the name of a file; or None."""
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImportItem:
    """One target picture with its caption and subjects. Paths are below the folder of pictures."""

    target: str
    caption: str
    subjects: tuple[ImportSubject, ...]
    size: tuple[int, int] | None = None
    """(width, height) that the source says the target has, in pixels; None if it says nothing."""
    normalised: bool = False
    """True if boxes are fractions of the picture, False if they are pixels."""

    @property
    def paths(self) -> list[str]:
        """Every file that the item names."""
        named = [self.target]
        for subject in self.subjects:
            named += [path for path in (subject.reference, subject.mask) if isinstance(path, str)]
        return named


@dataclass(frozen=True, kw_only=True)
class Broken:
    """An item that could not be read."""

    name: str
    reason: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ItemFile(VideoFile):
    """An item that was found. path: its target picture. spool, offset, length: where it is written down, in bytes."""

    spool: Path
    offset: int
    length: int


def as_list(value: Any, what: str) -> list[Any]:
    """The value, if it is a list; ClipError otherwise."""
    if not isinstance(value, list):
        raise ClipError(UNREADABLE, error=f"{what} must be a list, got {short(value)}")
    return value


def place_of(root: Path, path: str, allow_absolute: bool) -> Path:
    """Where a path of an item lies. ClipError if it leaves the folder of pictures, also by ``..`` or by a link.

    allow_absolute: absolute paths, and links out of the folder, are followed; ``..`` never is.
    """
    parts = PurePosixPath(path.replace("\\", "/"))
    if not path or "\0" in path or ".." in parts.parts:
        raise ClipError(OUTSIDE, path=path)
    place = on_disk(root, path)
    if allow_absolute:
        return place
    try:
        inside = not parts.is_absolute() and place.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, half a letter, links in a circle
        raise ClipError(OUTSIDE, path=path, error=str(error)) from error
    if not inside:
        raise ClipError(OUTSIDE, path=path, allow="--allow-absolute")
    return place


def unit_of_boxes(item: ImportItem) -> str:
    """What numbers of boxes look like: "fractions" if all are in [0, 1], "pixels" if one is above 2; else ""."""
    numbers: list[float] = []
    for subject in item.subjects:
        for box in (subject.box, subject.reference_box):
            if isinstance(box, Sequence) and not isinstance(box, str):
                numbers += [number for number in box if isinstance(number, int | float)]
    if any(number > 2 for number in numbers):
        return "pixels"
    return "fractions" if numbers and all(0 <= number <= 1 for number in numbers) else ""


def _fields(value: Any) -> Mapping[str, Any]:
    if isinstance(value, ImportItem | ImportSubject | Broken):
        return vars(value)
    raise TypeError(f"a {type(value).__name__}")


def _printable(name: str) -> str:
    try:
        return readable_name(name) or "item"
    except UnicodeEncodeError:  # half a surrogate pair that no file name can hold
        return name.encode("utf-8", errors="backslashreplace").decode()


class Spool:
    """Writes items down and remembers where."""

    def __init__(self, root: Path, path: Path, file: BinaryIO | None, allow_absolute: bool) -> None:
        self._root, self._path, self._file, self._allow_absolute = root, path, file, allow_absolute
        self._offset = 0
        self._seen: Counter[str] = Counter()
        self._found: list[dict[str, Any]] = []
        self.boxes: Counter[tuple[bool, str]] = Counter()
        """Items by what their boxes are said to be (normalised or not) and what they look like."""
        self.broken = 0
        """Items that could not be read."""
        self.pictures = 0
        """Items whose target picture is there."""
        self.wanted = 0
        """Items that name one."""
        self.missing = ""
        """The first target picture that is not there."""

    def add(self, item: ImportItem | Broken) -> None:
        """Writes one item down."""
        content = {"broken": item} if isinstance(item, Broken) else item
        try:  # vars() and not asdict(), which would copy every number of a mask
            line = json.dumps(content, separators=(",", ":"), default=_fields).encode()
        except (TypeError, ValueError) as error:
            name = item.name if isinstance(item, Broken) else item.target
            self.add(Broken(name=name, reason=UNREADABLE, evidence={"error": f"not to be written as json: {error}"}))
            return
        if self._file is not None:
            self._file.write(line + b"\n")
        self.broken += isinstance(item, Broken)
        name = _printable(item.name if isinstance(item, Broken) else item.target)
        self._seen[name] += 1
        if self._seen[name] > 1:  # one picture with several captions
            name = f"{name} ({self._seen[name]})"
        path, details = self._look(item, line)
        self._found.append({"name": name, "path": path, "details": details, "offset": self._offset,
                            "length": len(line), "caption": getattr(item, "caption", None)})  # fmt: skip
        self._offset += len(line) + 1

    def _look(self, item: ImportItem | Broken, line: bytes) -> tuple[Path, str]:
        """The target picture, and a hash that changes with the item and with every file that it names."""
        parts: list[Any] = [hashlib.sha256(line).hexdigest()]
        place = self._root / "no picture"
        for number, path in enumerate([] if isinstance(item, Broken) else item.paths):
            status = None
            with contextlib.suppress(ClipError, OSError, ValueError):
                found = place_of(self._root, path, self._allow_absolute)
                place = found if number == 0 else place
                status = found.stat()
            parts.append(None if status is None else [status.st_size, status.st_mtime_ns])
            if number == 0:
                self.wanted += 1
                self.pictures += status is not None
                if status is None and not self.missing:
                    self.missing = path
        if isinstance(item, ImportItem) and item.subjects:
            self.boxes[item.normalised, unit_of_boxes(item)] += 1
        return place, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def files(self) -> list[ItemFile]:
        """All items, in order, each with a key of its own."""
        keys = make_keys(each["name"] for each in self._found)
        for name, key in keys.items():
            if not key:  # ".png": nothing but a suffix
                keys[name] = f"item-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return [ItemFile(key=keys[each["name"]], spool=self._path, **each) for each in self._found]


def read_item(file: ItemFile) -> ImportItem:
    """The item as it was written down. ClipError for what the source had unusable; InputError if the file has gone."""
    try:
        with file.spool.open("rb") as lines:
            lines.seek(file.offset)
            content = json.loads(lines.read(file.length))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file.spool} any more ({error}): run the same command again") from error
    if "broken" in content:
        raise ClipError(content["broken"]["reason"], **content["broken"]["evidence"])
    subjects = tuple(ImportSubject(**subject) for subject in content.pop("subjects"))
    size = content.pop("size")
    return ImportItem(subjects=subjects, size=tuple(size) if size else None, **content)
