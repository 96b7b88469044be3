"""Where a model's files are: in a directory of this machine, or in a repository of the Hugging Face hub.

Standard library only, so that a step can refuse a missing file before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipeline.records import InputError

Needed = Mapping[str, Sequence[str]]
"""What a directory must hold: meaning -> file names of which one is enough. A name with a star is a pattern."""

TRANSFORMERS_MODEL: Needed = {
    "configuration": ("config.json",),
    "weights": ("model.safetensors", "model.safetensors.index.json"),
}
IMAGE_SETTINGS: Needed = {"image settings": ("preprocessor_config.json", "processor_config.json")}
TEXT_AND_IMAGE_MODEL: Needed = {
    **TRANSFORMERS_MODEL,
    "tokenizer": ("tokenizer.json", "vocab.txt"),
    **IMAGE_SETTINGS,
}


def is_hub_id(name: str) -> bool:
    """True for "owner/repository" (or one bare name) that is no directory here: the hub is then asked for it."""
    looks_local = name.startswith((".", "/", "~", "\\")) or "\\" in name or name.count("/") > 1
    return bool(name) and not looks_local and not Path(name).exists()


def check_model_directory(name: str, option: str, needed: Needed) -> None:
    """InputError if ``name`` is a directory that lacks a file, or a path at which there is none.

    option: the command line's, for the message. Nothing is read, and a hub id passes: its files are not here yet.
    """
    if is_hub_id(name):
        return
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(
            f"{option}: no directory at {name}; give a model's directory, or its hub id (owner/repository)"
        )
    missing = [
        f"{meaning} ({' or '.join(names)})"
        for meaning, names in needed.items()
        if not any(next(folder.glob(pattern), None) for pattern in names)
    ]
    if missing:
        raise InputError(
            f"{option}: the directory {name} lacks its {', '.join(missing)}; save a model there with save_pretrained, "
            "or name another directory or a hub id"
        )


def find_files(name: str, option: str, needed: Needed) -> dict[str, Path]:
    """The files of a model, meaning -> path; those of a hub id are downloaded (huggingface_hub keeps them).

    InputError where one is missing, where several fit and none is named exactly, or where the hub does not answer.
    """
    listing = _hub_listing(name, option) if is_hub_id(name) else _local_listing(name, option)
    chosen = {}
    for meaning, patterns in needed.items():
        fitting = next((found for p in patterns if (found := [file for file in listing if Path(file).match(p)])), [])
        if not fitting:
            raise InputError(f"{option}: {name} has no {meaning} ({' or '.join(patterns)})")
        if len(fitting) > 1:
            raise InputError(f"{option}: {name} has several files for its {meaning}: name one of {', '.join(fitting)}")
        chosen[meaning] = fitting[0]
    if not is_hub_id(name):
        return {meaning: Path(name) / file for meaning, file in chosen.items()}
    return {meaning: _download(name, file, option) for meaning, file in chosen.items()}


def _local_listing(name: str, option: str) -> list[str]:
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(
            f"{option}: no directory at {name}; give a model's directory, or its hub id (owner/repository)"
        )
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _hub_listing(name: str, option: str) -> list[str]:
    import huggingface_hub

    try:
        return sorted(huggingface_hub.list_repo_files(name))
    except Exception as error:  # no network, no such repository, no permission: no common parent
        raise InputError(_hub_problem(name, option, error)) from error


def _download(name: str, file: str, option: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except Exception as error:
        raise InputError(_hub_problem(f"{name}/{file}", option, error)) from error


def _hub_problem(name: str, option: str, error: Exception) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{option}: cannot get {name} from the hub ({first}); download it elsewhere and give its directory"
