"""Which model draws, told without loading it: names and fingerprints that records of pictures have."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from msdiffusion import __version__
from msdiffusion.adapter.config import CHECKPOINT_SUFFIX, CONFIG_NAME, WEIGHTS_NAME, AdapterConfig, read_checkpoint
from msdiffusion.adapter.loading import Sources, find_adapter, model_sources
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.backbone.configs import is_local
from msdiffusion.backbone.open_clip_encoder import OpenClipName, names_open_clip
from msdiffusion.environment import arithmetic
from msdiffusion.errors import WeightsError
from msdiffusion.files import file_sha256

_SAMPLES, _SAMPLE_BYTES = 64, 2**16
_NOT_IDENTITY = (
    "base_model", "image_encoder", "base_config", "defaults", "largest_side", "most_subjects", "closed_vocabulary"
)  # fmt: skip
"""What an adapter's config says of places, which are told by their content, of arguments, which records have, and of
what it was trained for, which changes no picture."""
_MODEL_FILES = (
    *(".safetensors", ".bin", "config.json", "index.json", "tokenizer.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
"""Weights, configs and vocabularies."""


@dataclass(frozen=True)
class Identity:
    """Which model draws, told without loading it."""

    model: Mapping[str, str | None]
    """As records have it."""
    defaults: Mapping[str, Any]
    """Of the adapter."""
    sources: Sources
    """Where the frozen models are."""


def identify(
    model: str, base_model: str | None, image_encoder: str | None, dtype: str, base_config: str | None = None
) -> Identity:
    """Find the adapter and say what it is; arguments as for MSDiffusion.from_pretrained, the dtype by its name.

    Raises:
        WeightsError: there is no such adapter, or its config is broken.
    """
    place = find_adapter(model)
    official = place.is_file() and place.suffix != CHECKPOINT_SUFFIX
    if official:  # which says nothing but weights
        config = AdapterConfig(resampler=ResamplerParams(image_width=1, phrase_width=1, output_width=1))
    elif place.is_file():
        config, _ = read_checkpoint(place)
    else:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (place / name).is_file():
                raise WeightsError(f"{place} holds no {name}: an adapter is {CONFIG_NAME} and {WEIGHTS_NAME}")
        config = AdapterConfig.read(place / CONFIG_NAME)
    folder, weights = (place.parent, place) if place.is_file() else (place, place / WEIGHTS_NAME)
    sources = model_sources(folder, None if official else config, base_model, image_encoder, base_config)
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_IDENTITY}
    names = {
        "adapter": Path(model).resolve().name if Path(model).exists() else model,
        "adapter_sha256": file_sha256(weights),
        "adapter_config": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        "base_model": frozen_name(sources.base_model),
        "base_config": None if sources.base_config is None else frozen_name(sources.base_config),
        "image_encoder": frozen_name(sources.image_encoder),
        "dtype": dtype,
    }
    return Identity(names, config.defaults, sources)


def frozen_name(source: str) -> str:
    """A frozen model as records call it: a hub name, or a local place's last part with a fingerprint of its content."""
    if names_open_clip(source):
        name = OpenClipName.parse(source)
        return source if name.file is None else str(replace(name, file=Path(_fingerprinted(name.file))))
    return _fingerprinted(Path(source)) if is_local(source) else source


def made_with(device: str) -> dict[str, str]:
    """Versions, kind of device, and what computes there: all that decides the last bits of a picture."""
    kind = device.partition(":")[0]
    versions = {"msdiffusion": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return {**versions, "device": kind, **arithmetic(device)}


def _fingerprinted(place: Path) -> str:
    inside = [place] if place.is_file() else [file for file in place.rglob("*") if file.name.endswith(_MODEL_FILES)]
    digest = hashlib.sha256()
    for file in sorted(path for path in inside if path.is_file()):
        own = _without_place(file)
        size = file.stat().st_size if own is None else len(own)
        digest.update(f"{file.relative_to(place) if place.is_dir() else ''} {size}\n".encode())
        # samples will do: reading ten gigabytes would take longer than drawing
        with file.open("rb") if own is None else io.BytesIO(own) as content:
            for number in range(_SAMPLES):
                content.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(content.read(_SAMPLE_BYTES))
    return f"{place.resolve().name}#{digest.hexdigest()[:16]}"


def _without_place(file: Path) -> bytes | None:
    """A config without the place that it was once loaded from, which saving writes into it; None: as it stands."""
    if file.suffix != ".json" or b'"_name_or_path"' not in (content := file.read_bytes()):
        return None
    try:
        record = json.loads(content)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    record.pop("_name_or_path", None)
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()  # as diffusers and transformers write it
