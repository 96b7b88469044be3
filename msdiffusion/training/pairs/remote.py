"""A bounded cache of remote shards on the local disk.

Shards are read by random access, so a remote one is fetched whole, checked, and read from the disk. The processes of a
machine share the cache: a lock per file (``flock``, which ends with the process that holds it) lets one of them fetch
while the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from msdiffusion.errors import DataError, RequestError
from msdiffusion.files import file_sha256
from msdiffusion.training.pairs.data_files import DataFile, attempt, filesystem

_log = logging.getLogger(__name__)


def default_cache_folder() -> Path:
    """Where remote shards are kept unless said otherwise: below the user's own cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msdiffusion" / "shards"


class ShardCache:
    """Remote files, whole and checked, in a folder of bounded size.

    Any number of processes and threads may use one folder. The bound holds for what the folder shows; a file that is
    removed while a process reads it takes its room until that process opens others. An object may be sent to other
    processes and used after a fork: each process has its own background thread.

    Args:
        folder: made where it does not exist; ``default_cache_folder()`` where None.
        max_bytes: when more would be kept, those go that were not used for the longest time.
        attempts: how often a download is tried before it is an error.
        first_wait: seconds between the first attempts, see ``attempt``.

    Raises:
        RequestError: if a number is out of range.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        max_bytes: int = 64 * 2**30,
        attempts: int = 5,
        first_wait: float = 1.0,
    ) -> None:
        if max_bytes < 1 or attempts < 1 or first_wait < 0:
            raise RequestError(
                "a cache needs max_bytes and attempts of at least 1 and first_wait of at least 0, "
                f"got {max_bytes}, {attempts} and {first_wait}"
            )
        self.folder = Path(folder) if folder is not None else default_cache_folder()
        self.max_bytes = max_bytes
        self.attempts = attempts
        self.first_wait = first_wait
        self._background = _Background()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_background"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._background = _Background()

    def open(self, file: DataFile) -> BinaryIO:
        """A file for reading at any position, fetched first where it is not here.

        Raises:
            DataError: if it cannot be fetched, or is not what the dataset says it is, or if the folder cannot be
                written; the message names the place.
        """
        path = self.path_of(file)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(path):
                if not self._is_here(path, file):
                    self._fetch(file, path)
                now = time.time_ns()  # the kernel's own clock for files counts in steps of milliseconds
                os.utime(path, ns=(now, now))
                return path.open("rb")
        except OSError as error:
            raise DataError(f"{self.folder} cannot be used as a cache: {error}; choose another folder") from error

    def path_of(self, file: DataFile) -> Path:
        """Where a file is kept; other content, by its sha256 or else its place and stamp, gives another path."""
        identity = file.sha256 or f"{file.place} {file.bytes} {file.stamp}"
        return self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}-{file.name[-100:]}"

    def has(self, file: DataFile) -> bool:
        """Whether a file is here already."""
        return self._is_here(self.path_of(file), file)

    def prefetch(self, files: Sequence[DataFile]) -> None:
        """Fetch files in the background, in this order, after those that an earlier call asked for.

        No more than half of the cache waits to be fetched, so that what is being read stays; what is beyond that is
        left to a later call. A download that fails is tried again, and told, when the file is opened.
        """
        waiting = self._background.waiting()
        known = [file.bytes for file in (*waiting, *files) if file.bytes is not None]
        usual = sum(known) // len(known) if known else 0
        room = self.max_bytes // 2
        room -= sum(file.bytes if file.bytes is not None else usual for file in waiting)
        ahead: list[DataFile] = []
        for file in files:
            if file in waiting or file in ahead or self.has(file):
                continue
            room -= file.bytes if file.bytes is not None else usual
            if room < 0 and (ahead or waiting):
                break
            ahead.append(file)
        self._background.add(ahead, self._fetch_ahead)

    def wait(self) -> None:
        """Wait until everything that ``prefetch`` was asked for is here, or has failed."""
        self._background.wait()

    def _fetch_ahead(self, file: DataFile) -> None:
        try:
            self.open(file).close()
        except (DataError, RequestError) as error:
            _log.warning("not fetched ahead: %s", error)

    def _is_here(self, path: Path, file: DataFile) -> bool:
        try:
            return file.bytes in (None, path.stat().st_size)
        except FileNotFoundError:
            return False

    def _fetch(self, file: DataFile, path: Path) -> None:
        """Download, check, rename; the caller holds the file's lock."""
        if file.bytes is not None and file.bytes > self.max_bytes:
            raise DataError(
                f"{file.place} has {file.bytes:,} bytes, more than the whole cache {self.folder} may keep "
                f"({self.max_bytes:,}); allow the cache more"
            )
        self._make_room(file.bytes or 0, keep=path)
        part = _part_of(path)

        def download() -> None:
            system, remote = filesystem(file.place)
            system.get_file(remote, str(part))
            _check(file, part)

        try:
            attempt(file.place, download, self.attempts, self.first_wait)
        except FileNotFoundError as error:
            raise DataError(
                f"{file.place} does not exist: the dataset names it, but the server has no such file"
            ) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        part.replace(path)
        self._make_room(0, keep=path)

    def _make_room(self, needed: int, keep: Path) -> None:
        """Remove the longest unused until ``needed`` more bytes fit, and what killed processes left half."""
        with self._locked(self.folder / "all"):
            kept = []
            for path in self.folder.iterdir():
                try:
                    if path.name.endswith(".part") and path != _part_of(keep):
                        self._remove(self.folder / path.name[1:].removesuffix(".part"), path)
                    elif not path.name.startswith("."):
                        status = path.stat()
                        kept.append((status.st_mtime_ns, status.st_size, path))
                except FileNotFoundError:  # fetched or removed in this moment
                    continue
            total = sum(size for _, size, _ in kept) + needed
            for _, size, path in sorted(kept):
                if total <= self.max_bytes:
                    break
                if path != keep and self._remove(path, path):
                    total -= size

    def _remove(self, path: Path, victim: Path) -> bool:
        """Remove ``victim`` unless another process holds the lock of ``path`` just now."""
        with self._locked(path, wait=False) as free:
            if free:
                victim.unlink(missing_ok=True)
            return free

    @contextmanager
    def _locked(self, path: Path, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a path; yields False where somebody else has it and ``wait`` is False."""
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                # said aloud: a process forked in the meantime has the descriptor too, closing ours would not free it
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


class _Background:
    """A thread that works through a list; one per process, also after a fork."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._waiting: deque[DataFile] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def waiting(self) -> tuple[DataFile, ...]:
        """What is to be done still."""
        if self._process != os.getpid():  # threads and locks of the parent are worth nothing after a fork
            self._start()
        with self._changed:
            return tuple(self._waiting)

    def add(self, files: Sequence[DataFile], work: Callable[[DataFile], None]) -> None:
        """Work through these files too; after ``waiting``."""
        with self._changed:
            self._waiting.extend(files)
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._run, args=(work,), name="prefetch", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until nothing waits or is being worked on."""
        if self._process == os.getpid():
            with self._changed:
                self._changed.wait_for(lambda: self._thread is None)

    def _run(self, work: Callable[[DataFile], None]) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                file = self._waiting.popleft()
            work(file)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _check(file: DataFile, path: Path) -> None:
    """Raises DataError if a file is not what the dataset says."""
    size = path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        raise DataError(f"{size} bytes came, and there should be {file.bytes}")
    if file.sha256 is not None and (found := file_sha256(path)) != file.sha256:
        raise DataError(f"its sha256 is {found[:12]}..., and build.json says {file.sha256[:12]}...")
