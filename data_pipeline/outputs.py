"""Places that are written to, tried before the work."""

import errno
import os
from pathlib import Path

from data_pipeline.errors import InputError, OutputError
from data_pipeline.reasons import shown

LONGEST_NAME = 255
"""Bytes of a name that file systems take."""


def check_folder(folder: Path, flag: str = "--out", inside: str = "", *, holds: bool = False) -> None:
    """Say at once that a folder cannot be made or written in. Nothing is left there, no folder either. InputError
    if a file stands there or above it; OutputError if the system refuses to write there, or a name is too long.

    folder: it may be missing. flag: of the command line, or the name of the argument. inside: the longest name of a
    file that will be written there. holds: what was named is a file, and this the folder that it lies in.
    """
    try:
        if "\0" in str(folder):
            raise ValueError("a name with a null character")
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists() or each.is_symlink())
        if not there.is_dir():
            what = "is a file" if there.is_file() else "is no folder"
            need = "must lie in a folder" if holds else "must be a folder"
            raise InputError(f"{flag} {need}, but {shown(str(there), 300)} {what}: give another place")
        parts = (*folder.absolute().relative_to(there.absolute()).parts, inside)
        if long := next((part for part in parts if len(os.fsencode(part)) > LONGEST_NAME), None):
            told = f"{os.strerror(errno.ENAMETOOLONG)}, {LONGEST_NAME} bytes are the most: {shown(long)}"
            raise OSError(errno.ENAMETOOLONG, told)
        trial = there / f".{os.urandom(16).hex()}.tmp"
        trial.touch()
        trial.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        told = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{flag} {shown(str(folder), 300)} cannot be written: {told}") from error


def check_file(path: Path, flag: str = "--out") -> None:
    """``check_folder`` for the folder of a file; InputError where the file is a folder."""
    check_folder(path.parent, flag, path.name, holds=True)
    if path.is_dir():
        raise InputError(f"{flag} must be a file, but {shown(str(path), 300)} is a folder: give the name of a file")
