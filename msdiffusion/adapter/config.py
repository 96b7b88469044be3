"""AdapterConfig: what config.json beside the weights of an adapter says; names of the files; both in one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from data_pipeline.models.weights import check_plain, load_pickle
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.errors import RequestError, WeightsError, refused_weights, shown
from msdiffusion.request.request import FALLBACKS, SETTINGS, check_settings, first_given

SCHEMA = "msdiffusion.adapter/1"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "adapter.safetensors"
MAX_BYTES = 1_000_000
"""Of a config.json; those that are written have fewer than a thousand."""
CHECKPOINT_SUFFIX = ".ckpt"
CHECKPOINT_PREFIXES = ("averaged.module.", "adapter.")
"""Where an adapter's weights are in a checkpoint's state_dict: the average before what it is the average of."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What config.json beside the weights says; the defaults are those of the official release."""

    resampler: ResamplerParams
    base_model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """Path relative to the adapter's directory, other path, or hub name of the diffusers pipeline."""
    image_encoder: str = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
    """The same of a CLIPVisionModelWithProjection."""
    base_config: str | None = None
    """The same of the pipeline that configs and tokenizers come from, where ``base_model`` is one file of weights."""
    training_resolution: int = 512
    """Side of the training pictures in pixels."""
    largest_side: int | None = None
    """Pixels: side of the largest square pictures that base and adapter were trained on. None: not told."""
    most_subjects: int | None = None
    """Subjects of the fullest pictures that it was trained on. None: not told."""
    closed_vocabulary: bool | None = None
    """Whether the base knows no other words than those that are one token each. None: not told."""
    reference_background: tuple[int, int, int] = (0, 0, 0)
    """RGB, 0-255, behind a cut-out reference."""
    reference_fit: str = "squash"
    """How a reference becomes square: "squash" changes its aspect, "pad" adds background."""
    projector: str = "resampler"
    """What makes tokens of a reference: "resampler" (MS-Diffusion), or "global", one linear layer on the embedding of
    the whole reference (IP-Adapter); a rival for comparisons."""
    regions: str = "boxes"
    """Where a subject is seen: "boxes", or "everywhere" (an ablation: no masks)."""
    defaults: Mapping[str, Any] = field(default_factory=lambda: {"scale": 0.6, "steps": 30, "guidance_scale": 7.5})
    """Defaults of MSDiffusion.generate: scale, steps, guidance_scale, negative_prompt, height, width."""

    def __post_init__(self) -> None:
        background = tuple(self.reference_background)
        if len(background) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in background):
            raise WeightsError(f"reference_background must be three whole numbers in 0-255, got {shown(background)}")
        object.__setattr__(self, "reference_background", background)
        if self.reference_fit not in ("squash", "pad"):
            raise WeightsError(f'reference_fit must be "squash" or "pad", got {shown(self.reference_fit)}')
        if self.projector not in ("resampler", "global"):
            raise WeightsError(f'projector must be "resampler" or "global", got {shown(self.projector)}')
        if self.regions not in ("boxes", "everywhere"):
            raise WeightsError(f'regions must be "boxes" or "everywhere", got {shown(self.regions)}')

        def refuse(name: str, need: str) -> NoReturn:
            raise WeightsError(f"{name} in an adapter's config must be {need}, got {shown(getattr(self, name))}")

        for name, most in (("training_resolution", 16384), ("largest_side", 16384), ("most_subjects", 1000)):
            value = getattr(self, name)
            told = value is not None or name == "training_resolution"
            if told and (type(value) is not int or not 1 <= value <= most):
                refuse(name, f"a whole number from 1 to {most}")
        if self.closed_vocabulary not in (None, True, False):
            refuse("closed_vocabulary", "true or false")
        for name in ("base_model", "image_encoder", "base_config"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name != "base_config" or value is not None):
                refuse(name, "text")
        if not isinstance(self.defaults, Mapping):
            refuse("defaults", "a mapping")
        unknown = set(self.defaults) - set(SETTINGS)
        if unknown:
            raise WeightsError(
                f"unknown defaults {shown(sorted(unknown), 300)} in an adapter's config; known: {sorted(SETTINGS)}"
            )
        try:
            check_settings(self.defaults)
        except RequestError as error:
            raise WeightsError(f"defaults in an adapter's config: {error}") from None

    @property
    def reference_features(self) -> str:
        """What the image encoder must give, see ``Backbone.encode_references``."""
        return "global" if self.projector == "global" else "tokens"

    def drawing(self, **asked: float | None) -> dict[str, Any]:
        """``steps``, ``guidance_scale`` and ``scale`` as asked, else the defaults here, else FALLBACKS."""
        found = {
            name: first_given(asked.get(name), self.defaults.get(name), FALLBACKS[name])
            for name in ("steps", "guidance_scale", "scale")
        }
        return found | {name: float(found[name]) for name in ("guidance_scale", "scale")}

    def to_json(self) -> str:
        """The text of config.json."""
        record = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps({"schema": SCHEMA, **record}, indent=2) + "\n"

    @classmethod
    def read(cls, path: str | Path, source: str | None = None) -> AdapterConfig:
        """``from_json`` of a file, ``source`` in messages; WeightsError too where it cannot be read."""
        source = str(path) if source is None else source
        try:
            if Path(path).stat().st_size > MAX_BYTES:
                raise OSError(f"it is larger than the {MAX_BYTES} bytes that are read")
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WeightsError(f"{source} cannot be read as text in UTF-8: {error}") from None
        return cls.from_json(text, source)

    @classmethod
    def from_json(cls, text: str, source: str = CONFIG_NAME) -> AdapterConfig:
        """Read config.json; WeightsError where it is not JSON, of another schema, or has missing or unknown keys."""
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
            raise WeightsError(f"{source} is not JSON: {error}") from None
        schema = record.pop("schema", None) if isinstance(record, dict) else None
        if schema != SCHEMA:
            raise WeightsError(f"{source} has schema {shown(schema)}; this version reads {SCHEMA!r}")
        unknown = set(record) - {item.name for item in fields(cls)}
        if unknown:
            raise WeightsError(f"{source} has unknown keys {shown(sorted(unknown), 300)}")
        try:
            return cls(**{**record, "resampler": ResamplerParams(**record["resampler"])})
        except (KeyError, TypeError) as error:
            raise WeightsError(f"{source} is incomplete or of another version: {str(error)[:300]}") from None


def read_checkpoint(path: str | Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The adapter in a checkpoint of ``lightning fit``: the averaged weights where the run keeps them.

    Optimizer and schedule are not read from the disk, and no code in the file is run.

    Args:
        path: a ``.ckpt`` file, such as ``checkpoints/last.ckpt`` or ``checkpoints/best.ckpt`` of a run.

    Returns:
        Its config, and its weights by the names of ``MSAdapter.state_dict``, still mapped from the file.

    Raises:
        WeightsError: no such file, no checkpoint, or one of something else than an adapter.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no such file: {path}")
    with refused_weights():
        checkpoint = load_pickle(path)
    record = checkpoint if isinstance(checkpoint, dict) else {}
    weights, config = record.get("state_dict"), record.get("adapter_config")
    if not isinstance(weights, dict) or not isinstance(config, str):
        missing = "adapter_config" if isinstance(weights, dict) else "state_dict"
        raise WeightsError(
            f"{path} is no checkpoint of an adapter, for it has no {missing}: give one that `lightning fit -c "
            "configs/msd.yaml` has written, or the run's folder"
        )
    prefix = next((name for name in CHECKPOINT_PREFIXES if any(key.startswith(name) for key in weights)), None)
    if prefix is None:
        raise WeightsError(f"{path} holds no weights of an adapter, but {shown(sorted(weights))}")
    own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    with refused_weights():
        check_plain(own, path)
    return AdapterConfig.from_json(config, f"adapter_config in {path}"), own
