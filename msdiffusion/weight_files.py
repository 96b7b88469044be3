"""Writing safetensors: whole or not at all, and for whom the umask says."""

from __future__ import annotations

import errno
import stat
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from msdiffusion.errors import reason
from msdiffusion.files import written


def write_weights(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors on the CPU by their names, in place of a file of that name, which who reads it keeps as it was.

    A run that is killed meanwhile leaves the earlier file.

    Raises:
        RequestError: it cannot be written, as on a full disk.
    """
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
    trial = folder / f".{uuid4().hex}.tmp"
    trial.touch()
    try:
        return stat.S_IMODE(trial.stat().st_mode)
    finally:
        trial.unlink()
