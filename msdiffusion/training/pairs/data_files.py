"""The files of a dataset, on this machine or behind any URL that fsspec knows: names, sizes, small contents."""

from __future__ import annotations

import errno
import logging
import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.safe_text import visible
from msdiffusion.errors import DataError, RequestError, reason

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_log = logging.getLogger(__name__)
Result = TypeVar("Result")

THIS_RUN = f"run {uuid.uuid4().hex}"
"""Stands for the content of a file of which its server says nothing that changes with it: no other run knows it."""

SILENCE_SECONDS = 60.0
"""A server that sends nothing for so long is taken for gone; a download as a whole may take any time."""


@dataclass(frozen=True)
class DataFile:
    """One file of a dataset, and what is known of it before it is read."""

    place: str
    """Path, or URL with its protocol."""
    bytes: int | None = None
    """Size, where the dataset or the server says it."""
    sha256: str | None = None
    """Of the content, where the dataset says it."""
    stamp: str = ""
    """What the server says that changes with the content (ETag, time of change), so that no stale copy is read; where
    it says nothing, a name of this run."""

    @property
    def name(self) -> str:
        """The last part of the place."""
        return re.split(r"[?#]", self.place, maxsplit=1)[0].rstrip("/").rpartition("/")[2]

    @property
    def is_remote(self) -> bool:
        """Whether it must be fetched before it can be read at any position."""
        return is_remote(self.place)


def is_remote(place: str) -> bool:
    """Whether a place is a URL of another machine or store (``https://``, ``s3://``, ``memory://``, ...)."""
    return "://" in place and not place.startswith(("file://", "local://"))


def local_path(place: str) -> str:
    """The path of a local place, without ``file://``."""
    return place.removeprefix("file://").removeprefix("local://")


def joined(folder: str, name: str) -> str:
    """The place of a file in a folder; what follows a ? or # in a URL stays at its end."""
    if not is_remote(folder):
        return str(Path(local_path(folder), name))
    path, mark, rest = re.match(r"([^?#]*)([?#]?)(.*)", folder, re.DOTALL).groups()
    return f"{path.rstrip('/')}/{name}{mark}{rest}"


def parent_of(place: str) -> str:
    """The folder that a file lies in; what follows a ? or # in a URL stays at its end."""
    if not is_remote(place):
        return str(Path(local_path(place)).parent)
    path, mark, rest = re.match(r"([^?#]*)([?#]?)(.*)", place, re.DOTALL).groups()
    return f"{path.rpartition('/')[0]}{mark}{rest}"


def filesystem(place: str) -> tuple[AbstractFileSystem, str]:
    """(fsspec's file system, the path in it) of a URL.

    Raises:
        RequestError: if fsspec does not know the protocol, or needs a package for it that is not installed.
    """
    import fsspec

    options: dict[str, Any] = {}
    if place.startswith(("http://", "https://")):
        import aiohttp

        # aiohttp ends any request after five minutes unless told otherwise: too little for a shard on a slow line
        limits = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        options = {"client_kwargs": {"timeout": limits}}
    try:
        return fsspec.core.url_to_fs(place, **options)
    except (ImportError, ValueError) as error:
        raise RequestError(f"{place} cannot be read: {reason(error)}") from error


def attempt(what: str, action: Callable[[], Result], attempts: int = 5, first_wait: float = 1.0) -> Result:
    """The result of ``action()``, tried again with longer and longer waits while it fails.

    Args:
        action: raises FileNotFoundError where trying again is of no use.
        first_wait: seconds before the second attempt; every further wait is twice as long, 30 seconds at most.

    Raises:
        FileNotFoundError: from ``action``.
        RequestError: from ``action``.
        DataError: when every attempt failed, with the reason of the last one; at once if the disk is full.
    """
    for number in range(1, attempts + 1):
        try:
            return action()
        except (FileNotFoundError, RequestError):
            raise
        except Exception as error:  # each store has errors of its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"{what} does not fit on the disk: {error}") from error
            why = f"{type(error).__name__}: {reason(error)}"
            if number == attempts:
                raise DataError(f"{what} could not be read in {attempts} attempts; the last one: {why}") from error
            wait = min(first_wait * 2 ** (number - 1), 30.0)
            told = (visible(what), number, attempts, visible(why), wait)
            _log.warning("%s: attempt %d of %d failed (%s), next one in %.1f s", *told)
            time.sleep(wait)
    raise RequestError(f"attempts must be at least 1, got {attempts}")


def read_bytes(place: str, most: int) -> bytes:
    """The whole content of a file, local or remote. most: bytes; a longer one is not read.

    Raises:
        FileNotFoundError: if there is none.
        DataError: if it cannot be read, or is longer.
    """
    if not is_remote(place):
        try:
            with Path(local_path(place)).open("rb") as file:
                content = file.read(most + 1)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise DataError(f"{place} cannot be read: {error}") from error
    else:
        system, path = filesystem(place)
        content = attempt(place, lambda: system.cat_file(path, 0, most + 1))  # a server that knows ranges sends no more
    if len(content) > most:
        raise DataError(f"{place} has more than the {most:,} bytes that are read of such a file")
    return content


def described(place: str) -> DataFile:
    """A file with its size and stamp.

    Raises:
        FileNotFoundError: if there is none.
        DataError: if the server does not answer.
    """
    if not is_remote(place):
        return DataFile(place, bytes=Path(local_path(place)).stat().st_size)
    system, path = filesystem(place)

    def ask() -> dict[str, Any]:
        try:
            return system.info(path)
        except FileNotFoundError as error:
            if not place.startswith(("http://", "https://")):
                raise
            # fsspec says so of every answer that is no success; reading a byte tells missing files from tired servers
            system.cat_file(path, 0, 1)
            raise OSError(f"its server does not describe it: {error}") from error

    info = attempt(place, ask)
    stamp = _stamp(info)
    if not stamp and place.startswith(("http://", "https://")):
        stamp = _stamp(_told_over_http(system, path))
    return DataFile(place, bytes=info.get("size"), stamp=stamp or THIS_RUN)


def _told_over_http(system: AbstractFileSystem, path: str) -> dict[str, str]:
    """The headers that change with the content, of which older versions of fsspec leave out some; empty if none."""
    from fsspec.asyn import sync

    async def ask(method: str) -> dict[str, str]:
        session = await system.set_session()
        options = {"allow_redirects": True} | system.kwargs
        async with session.request(method, system.encode_url(path), **options) as answer:
            answer.raise_for_status()
            return {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}

    for method in ("HEAD", "GET"):  # some answer only one; of the second the content is not read
        try:
            return sync(system.loop, ask, method)
        except Exception as error:  # whatever it is: then nothing is known
            _log.debug("%s of %s: %s", method, path, error)
    return {}


def listed(folder: str) -> list[DataFile]:
    """The files of a folder whose name ends with .tar, in order of name.

    Raises:
        FileNotFoundError: if there is no such folder, or the server does not list it.
        DataError: if the folder cannot be read or the server does not answer.
    """
    if not is_remote(folder):
        try:
            with os.scandir(local_path(folder)) as entries:
                found = [DataFile(e.path, e.stat().st_size) for e in entries if e.name.endswith(".tar") and e.is_file()]
        except (PermissionError, NotADirectoryError) as error:
            raise DataError(f"{folder} cannot be read: {error}") from error
    else:
        system, path = filesystem(folder)
        found = [
            DataFile(system.unstrip_protocol(entry["name"]), entry.get("size"), stamp=_stamp(entry) or THIS_RUN)
            for entry in attempt(folder, lambda: system.ls(path, detail=True))
            if entry["type"] == "file" and entry["name"].endswith(".tar")
        ]
    return sorted(found, key=lambda file: file.name)


def _stamp(info: dict[str, Any]) -> str:
    names = (
        *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "Last-Modified", "generation", "LastModified"),
        *("last_modified", "mtime", "modify", "created"),
    )
    return next((str(info[name]) for name in names if info.get(name)), "")
