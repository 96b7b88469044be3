"""What a run has finished so far: one done-marker per clip, so that a rerun goes on where the last one stopped.

``OUT/.mining/`` holds settings.json (what the run was started with) and, per clip, a marker ``KEY.json``, the tar
blocks of its samples ``KEY.tar`` and, if it was rejected after its frames had been decoded, a preview ``KEY.jpg``.
Every file is written under a temporary name and renamed, the marker last. When the dataset is complete, build.json
appears and the folder goes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import InputError, OutputError
from data_pipeline.file_names import beside
from data_pipeline.records import VideoFile


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to under a temporary name in the same folder, renamed at the end: a reader sees the whole file
    or none.

    OutputError if it cannot be written. Nothing is left behind then, nor after an error inside the block.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. What is finished is kept: free some space, or give "
            "permission, and run the same command again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; OutputError, see ``atomic_file``."""
    with atomic_file(path) as file:
        file.write(content)


def fingerprint(file: VideoFile) -> str:
    """Changes when a clip changes: its size and time of change, its caption, its annotations sidecar."""
    parts: list[Any] = [file.name, file.caption, *([file.details] if file.details else [])]
    for path in (file.path, beside(file.path, ".annotations.json")):
        try:
            status = path.stat()
            parts += [status.st_size, status.st_mtime_ns]
        except OSError:
            parts.append(None)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def flatten(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``{"step": {"name": value}}`` -> ``{"step.name": value}``, values as json gives them back."""
    return {
        f"{step}.{name}": value for step, own in json.loads(json.dumps(settings)).items() for name, value in own.items()
    }


class Journal:
    """The state of one output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / ".mining"

    def is_complete(self) -> bool:
        """True if a run has finished here."""
        return (self.out / "build.json").is_file()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other runs out of the folder while this one works in it; InputError if another one is at work.

        The lock is the kernel's, on an open file: it goes with the process, however that ends.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("w")
        except OSError as error:
            raise OutputError(f"cannot write in {self.folder}: {error.strerror or error}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another run is at work in {self.out}: wait for it, or choose a new --out") from None
            yield

    def forget_if_empty(self) -> None:
        """Removes what ``start`` made if no clip has been finished: a command that was wrong must not keep its folder
        from the one that is right. Only for who holds the lock.
        """
        if self.is_complete() or next(self.folder.glob("*/*.json"), None) is not None:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.out.rmdir()  # if nothing else is in it

    def check(
        self, settings: Mapping[str, Mapping[str, Any]], files: Mapping[str, str] | None = None, version: str = ""
    ) -> dict[str, str] | None:
        """Compares what shapes the dataset with what it was started with; InputError that names what differs, or why
        the folder cannot be used. Writes nothing. Returns the hashes that are recorded, None if nothing is.

        files: hashes of the files that settings name. version: of the pipeline; it is compared first, because another
        one brings other settings.
        """
        stored = self.out / "build.json" if self.is_complete() else self.folder / "settings.json"
        if stored.is_file():
            try:
                content = json.loads(stored.read_text(encoding="utf-8"))
                then = {name: content[name] for name in ("settings", "files", "version")}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{stored} is damaged ({type(error).__name__}: {error}): choose a new --out, or delete {self.out}"
                ) from error
            if then["version"] != version:
                complete = self.is_complete()
                raise InputError(
                    f"{self.out} was {'made' if complete else 'started'} by version {then['version']} of the pipeline, "
                    f"this is {version}: {'use it as it is' if complete else 'finish it with that one'}, or choose a "
                    "new --out"
                )
            self.compare(flatten(settings), flatten(then["settings"]))
            self.compare_files(files or {}, then["files"])
            return dict(then["files"])
        if self.out.exists() and not self.out.is_dir():
            raise InputError(f"--out needs a folder, but {self.out} is a file")
        if self.out.is_dir() and any(self.out.iterdir()) and not self.folder.is_dir():
            raise InputError(f"{self.out} is not empty and no earlier run of this program is in it: choose a new --out")
        return None

    def start(
        self, settings: Mapping[str, Mapping[str, Any]], files: Mapping[str, str] | None = None, version: str = ""
    ) -> dict[str, str]:
        """``check``, and records it all, in a new folder if there is none. Returns the hashes of all files so far."""
        then = self.check(settings, files, version)
        known = {**(then or {}), **(files or {})}
        if self.is_complete() or known == then:
            return known
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {self.out}: {error.strerror or error}") from error
        content = {"settings": settings, "files": known, "version": version}
        write_atomically(self.folder / "settings.json", json.dumps(content, indent=1).encode())
        return known

    def compare_files(self, now: Mapping[str, str], then: Mapping[str, str]) -> None:
        """InputError that names every setting whose file has changed; a model now or then not needed is no change."""
        changed = [name for name in sorted(now.keys() & then.keys()) if now[name] != then[name]]
        if changed:
            raise InputError(
                f"the file of {', '.join(changed)} has changed since the dataset in {self.out} was begun: choose a new "
                "--out, or bring the old file back"
            )

    def compare(self, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
        """InputError that names every setting with another value than before."""
        missing = object()
        changed = [name for name in sorted({*now, *then}) if now.get(name, missing) != then.get(name, missing)]
        if changed:
            lines = (f"  {key}: {then.get(key, 'absent')!r} then, {now.get(key, 'absent')!r} now" for key in changed)
            raise InputError(
                f"{self.out} was started with other settings; use those again, or a new --out:\n" + "\n".join(lines)
            )

    def _path(self, key: str, suffix: str) -> Path:
        # Spread over folders, because some disks are slow with a million files in one.
        return self.folder / f"{zlib.crc32(key.encode()) % 256:02x}" / f"{key}{suffix}"

    def read(self, file: VideoFile) -> dict[str, Any] | None:
        """The marker of a finished clip; None if it is not finished, has changed since, or its samples are not all
        there (a machine that lost its power may keep a file's name and not its content).
        """
        path = self._path(file.key, ".json")
        try:
            marker = json.loads(path.read_text(encoding="utf-8"))
            if marker["kept"] and path.with_suffix(".tar").stat().st_size != marker["bytes"]:
                return None
        except (OSError, ValueError):
            return None
        return marker if marker["fingerprint"] == fingerprint(file) else None

    def commit(
        self, file: VideoFile, marker: Mapping[str, Any], blocks: bytes = b"", preview: bytes = b"", taken: str = ""
    ) -> None:
        """Leaves a clip's results on disk, its marker last.

        taken: the clip's fingerprint from before it was read, "" for one taken now. So a clip that changes while it is
        worked on is mined again by the next run.
        """
        path = self._path(file.key, ".json")
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {path.parent}: {error.strerror or error}") from error
        for suffix, written in ((".tar", blocks), (".jpg", preview)):
            if written:
                write_atomically(path.with_suffix(suffix), written)
            else:  # of an earlier version of the clip
                path.with_suffix(suffix).unlink(missing_ok=True)
        own = {"video": file.name, "key": file.key, "fingerprint": taken or fingerprint(file), "bytes": len(blocks)}
        write_atomically(path, json.dumps({**marker, **own}, separators=(",", ":")).encode())

    def markers(self, files: Iterable[VideoFile]) -> Iterator[dict[str, Any]]:
        """Markers of all clips, in the order of the files; InputError if one is missing."""
        for file in files:
            marker = self.read(file)
            if marker is None:
                raise InputError(f"{file.name} changed while the dataset was being written; run the same command again")
            yield marker

    def blocks(self, key: str) -> bytes:
        """The tar blocks of a kept clip; InputError if they cannot be read any more."""
        path = self._path(key, ".tar")
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}; run the same command again") from error

    def preview(self, key: str) -> bytes | None:
        """The preview of a rejected clip (JPEG), if its frames had been decoded."""
        path = self._path(key, ".jpg")
        return path.read_bytes() if path.is_file() else None

    def close(self) -> None:
        """Removes the working folder of a complete dataset."""
        shutil.rmtree(self.folder, ignore_errors=True)
