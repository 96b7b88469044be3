"""Places that are written to, tried before the work."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

from data_pipeline.records import InputError, OutputError

LONGEST_NAME = 255
"""Bytes of a name that file systems take."""


def check_folder(folder: Path, flag: str = "--out") -> None:
    """InputError where a file is in a folder's place or above it, OutputError where the system refuses to write there.

    Nothing is left there, no folder either. flag: of the command line.
    """
    if "\0" in str(folder):
        raise InputError(f"{flag}: no folder can have this name: {str(folder)[:300]!r}")
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists() or each.is_symlink())
        if not there.is_dir():
            raise InputError(f"{flag} must be a folder, but {there} is a file: give another place")
        missing = folder.absolute().relative_to(there.absolute()).parts
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in missing):
            raise OutputError(f"{flag}: no folder can have a name of more than {LONGEST_NAME} bytes")
        trial = there / f".{uuid4().hex}.tmp"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise OutputError(f"{flag}: cannot write in {str(folder)[:300]}: {error.strerror or error}") from error


def check_file(path: Path, flag: str = "--out") -> None:
    """``check_folder`` for the folder of a file; InputError where the file is a folder."""
    check_folder(path.parent, flag)
    if path.is_dir():
        raise InputError(f"{flag} must be a file, but {path} is a folder: give the name of a file")
