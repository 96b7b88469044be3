"""Which files a model has, in a directory of this machine (those of the hub: ``hub``).

Standard library only, so that a step can refuse a missing file before anything heavy is imported.
"""

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.errors import InputError

Needed = Mapping[str, Sequence[str]]
"""What a directory must hold: meaning -> file names of which one is enough. A name with a star is a pattern."""

TRANSFORMERS_MODEL: Needed = {
    "configuration": ("config.json",),
    "weights": ("model.safetensors", "model.safetensors.index.json"),
}
IMAGE_SETTINGS: Needed = {"image settings": ("preprocessor_config.json", "processor_config.json")}
TEXT_AND_IMAGE_MODEL: Needed = {**TRANSFORMERS_MODEL, "tokenizer": ("tokenizer.json", "vocab.txt"), **IMAGE_SETTINGS}


def is_hub_id(name: str) -> bool:
    """True for "owner/repository" (or one bare name) that is no directory here: the hub is then asked for it."""
    looks_local = name.startswith((".", "/", "~", "\\")) or "\\" in name or name.count("/") > 1
    # Unlike Path.exists it says False for a name that is too long.
    return bool(name) and not looks_local and not os.path.exists(name)  # noqa: PTH110


def check_model_directory(name: str, option: str, needed: Needed) -> None:
    """InputError if ``name`` is a directory that lacks a file, or a path at which there is none.

    option: the command line's, for the message. Nothing is read, and a hub id passes: its files are not here yet.
    """
    if is_hub_id(name):
        return
    folder = Path(name)
    if not os.path.isdir(name):  # noqa: PTH112
        raise InputError(
            f"{option}: no directory at {name}; give a model's directory, or its hub id (owner/repository)"
        )
    missing = [
        f"{meaning} ({' or '.join(names)})"
        for meaning, names in needed.items()
        if not any(next(folder.glob(pattern), None) for pattern in names)
    ]
    missing += [f"part {part}" for part in missing_parts(folder)]
    if missing:
        raise InputError(
            f"{option}: the directory {name} lacks its {', '.join(missing)}; save a model there with save_pretrained, "
            "or name another directory or a hub id"
        )


def choose_files(name: str, option: str, needed: Needed, listing: Sequence[str]) -> dict[str, str]:
    """Which of the files of a model is which, meaning -> file: those that fit the first pattern that any fits.

    InputError where one is missing, or where several fit and none is named exactly.
    """
    chosen = {}
    for meaning, patterns in needed.items():
        fitting = next((found for p in patterns if (found := [file for file in listing if fits(file, p)])), [])
        if not fitting:
            raise InputError(f"{option}: {name} has no {meaning} ({' or '.join(patterns)})")
        if len(fitting) > 1:
            raise InputError(f"{option}: {name} has several files for its {meaning}: name one of {', '.join(fitting)}")
        chosen[meaning] = fitting[0]
    return chosen


def missing_parts(folder: Path) -> list[str]:
    """Files that the index of weights in several files names and that are not there."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        parts = sorted({str(part) for part in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or what the loader will say more about
        return []
    whole = (folder / "model.safetensors").is_file()  # which is taken then
    return [] if whole else [part for part in parts if not (folder / part).is_file()]


def fits(file: str, pattern: str) -> bool:
    """Whether a path in a model's folder fits a pattern. "*.json" is meant of the folder itself: "onnx/config.json",
    beside it, belongs to something else.
    """
    return file.count("/") == pattern.count("/") and Path(file).match(pattern)


def share_weights(folder: Path, like: str = "config.json") -> None:
    """Gives the weights in a folder the mode of another file there: safetensors makes them their owner's alone."""
    mode = stat.S_IMODE((folder / like).stat().st_mode)
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def list_files(folder: Path) -> list[str]:
    """The files of a folder and of those in it, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
