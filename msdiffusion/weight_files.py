"""Writing safetensors: whole or not at all, and for whom the umask says."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor


def write_weights(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors on the CPU by their names, in place of a file of that name, which who reads it keeps as it was.

    A run that is killed meanwhile leaves the earlier file.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.tmp")
    save_file(dict(weights), partial, metadata=None if metadata is None else dict(metadata))
    partial.chmod(_new_file_mode(path.parent))
    partial.replace(path)


def share(folder: str | Path) -> None:
    """Give all safetensors files under a folder the mode of new files: the library lets nobody but the owner read."""
    mode = _new_file_mode(Path(folder))
    for path in Path(folder).rglob("*.safetensors"):
        path.chmod(mode)


def _new_file_mode(folder: Path) -> int:
    """What the umask makes of a new file; seen from one, as asking for it would change it for all threads."""
    trial = folder / f".{uuid4().hex}.tmp"
    trial.touch()
    try:
        return stat.S_IMODE(trial.stat().st_mode)
    finally:
        trial.unlink()
