"""Places that are written to: tried before the work, and written whole or not at all; sha256 of what files hold."""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline import outputs
from data_pipeline.errors import MiningError
from msdiffusion.errors import RequestError, reason, shown

if TYPE_CHECKING:
    from torch import Tensor

REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.EIO, errno.EEXIST),
}
"""Kinds of OSError by which a system refuses to write; the command line tells them in one sentence."""


def place_of(text: str) -> Path:
    """A path of the command line; argparse.ArgumentTypeError for an empty one, which would be the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no path: was a variable of the shell empty?")
    return Path(text)


def check_folder(folder: str | Path, name: str, inside: str = "", *, holds: bool = False) -> Path:
    """Say at once that a folder cannot be made or written in. Nothing is left there, no folder either.

    Args:
        folder: that will be made if it is missing.
        name: of the flag or argument.
        inside: the longest name of a file that will be written there.
        holds: what was named is a file, and this the folder that it lies in.

    Returns:
        The folder as a path.

    Raises:
        RequestError: it is no path, a file stands there or above it, the system refuses, or a name is too long.
    """
    place = _path(folder, name)
    try:
        outputs.check_folder(place, name, inside, holds=holds)
    except MiningError as error:
        raise RequestError(str(error)) from None
    return place


def check_file(path: str | Path, name: str) -> Path:
    """``check_folder`` for a file, and the name that it has meanwhile; RequestError too where a folder stands there."""
    place = _path(path, name)
    check_folder(place.parent, name, unfinished(place).name, holds=True)
    if place.is_dir():
        raise RequestError(f"{name} must be a file, but {shown(str(place), 300)} is a folder: give the name of a file")
    return place


@contextmanager
def written(path: Path, under: str | None = None) -> Iterator[Path]:
    """Hands out the name under which a file is written, which then takes its place: whoever sees it sees all of it.

    Folders above it are made. Of what cannot be finished nothing stays.

    Args:
        path: of the file.
        under: its name meanwhile; None: that of ``unfinished``.

    Raises:
        RequestError: it cannot be written.
    """
    partial = unfinished(path) if under is None else path.with_name(under)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise RequestError(f"{shown(str(path), 600)} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # of a name that no file can have, which is said above
            partial.unlink(missing_ok=True)


def unfinished(path: Path) -> Path:
    """What a file is called while it is written; always the same: a rerun replaces what a killed run left."""
    return path.with_name(f".{path.stem}.unfinished{path.suffix}")


def _path(place: str | Path, name: str) -> Path:
    if not isinstance(place, (str, Path)) or not str(place).strip() or "\0" in str(place):
        raise RequestError(f"{name} must be the path of a place to write to, got {shown(place)}")
    return Path(place)


def write_json(path: Path, record: Any) -> None:
    """Writes a JSON file that is there whole or not at all."""
    with written(path) as partial:
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")


def write_weights(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors: tensors on the CPU by their names, in place of a file of that name.

    Who reads that one keeps it as it was, and a run that is killed meanwhile leaves it.

    Raises:
        RequestError: it cannot be written, as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    with written(path, f"{path.name}.tmp") as partial:
        try:
            save_file(dict(weights), partial, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:
            raise OSError(errno.EIO, reason(error)) from None
        share(partial)


def share(place: str | Path) -> None:
    """Give a file, or all safetensors under a folder, the mode of new files: the library's is for the owner alone."""
    place = Path(place)
    mode = _new_file_mode(place if place.is_dir() else place.parent)
    for path in place.rglob("*.safetensors") if place.is_dir() else [place]:
        if not path.is_symlink():  # whose file that is isn't known
            path.chmod(mode)


def _new_file_mode(folder: Path) -> int:
    """What the umask makes of a new file; seen from one, as asking for it would change it for all threads."""
    trial = folder / f".{os.urandom(16).hex()}.tmp"
    trial.touch()
    try:
        return stat.S_IMODE(trial.stat().st_mode)
    finally:
        trial.unlink()


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's content, as 64 hexadecimal digits; RequestError where it cannot be read."""
    try:
        state = Path(path).stat()
        return _sha256(str(path), state.st_mtime_ns, state.st_size)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None


def folder_sha256(folder: Path) -> str:
    """One sha256 of names and contents of all files in a folder, those of folders in it left out.

    Raises:
        RequestError: there are none, or one cannot be read.
    """
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not files:
        raise RequestError(f"{shown(str(folder))} is missing or empty")
    return hashlib.sha256("\n".join(f"{path.name} {file_sha256(path)}" for path in files).encode()).hexdigest()


@functools.lru_cache(maxsize=4096)  # a thousand requests often have the same few references
def _sha256(path: str, modified: int, size: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
