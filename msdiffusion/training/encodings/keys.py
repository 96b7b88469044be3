"""What encodings made ahead depend on: the networks that made them, and the settings that change what these are shown.

Each part (latents, references, text) has a key of its own, so that another resolution, say, makes nothing old but the
latents. Training and ``msdiffusion.training.precompute`` ask the same function for the keys; where the answers are the
same, so are the encodings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from msdiffusion.training.samples.encoded import Part

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, PreTrainedTokenizerBase

    from msdiffusion.adapter.config import AdapterConfig
    from msdiffusion.backbone.backbone import Backbone
    from msdiffusion.training.samples.augmentation import Augmentation
    from msdiffusion.training.samples.settings import SampleSettings

SCHEMA = "msdiffusion.encodings/1"
"""Of the manifests and of the files."""

_known_networks: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class PartKey:
    """What one part depends on."""

    part: Part
    models: Mapping[str, str]
    """Name of a network, a tokenizer or a preprocessing -> sha256."""
    settings: Mapping[str, Any]
    """Name of a setting -> value, as JSON has it."""

    def fingerprint(self, dtype: str) -> str:
        """12 hexadecimal digits for the part in files of this number type."""
        content = json.dumps(self.manifest(dtype), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def manifest(self, dtype: str) -> dict[str, Any]:
        """What manifest.json says."""
        return {"schema": SCHEMA, "dtype": dtype, **asdict(self)}

    def differences(self, manifest: Mapping[str, Any]) -> list[str]:
        """What another manifest has that this key has not, in words; nothing where its encodings are these."""
        if manifest.get("schema") != SCHEMA:
            return [f"its format is {manifest.get('schema')!r}, this version reads {SCHEMA!r}"]
        theirs, found = manifest.get("models", {}), []
        for name in sorted({*self.models, *theirs}):
            if self.models.get(name) != theirs.get(name):
                found.append(f"it was made with another {name}, or the same in another precision")
        theirs = manifest.get("settings", {})
        for name in sorted({*self.settings, *theirs}):
            if self.settings.get(name) != theirs.get(name):
                found.append(f"{name} was {theirs.get(name)}, now {self.settings.get(name)}")
        return found


def part_keys(samples: SampleSettings, backbone: Backbone, config: AdapterConfig) -> dict[Part, PartKey]:
    """The keys of what a run with these settings, networks and adapter would encode."""
    pipeline = backbone.pipeline
    text = {"text encoder": digest_of(pipeline.text_encoder), "tokenizer": tokenizer_digest(pipeline.tokenizer)}
    if backbone.kind == "sdxl":
        text["second text encoder"] = digest_of(pipeline.text_encoder_2)
        text["second tokenizer"] = tokenizer_digest(pipeline.tokenizer_2)
    return {
        "latents": PartKey(
            "latents",
            {"autoencoder": digest_of(backbone.vae)},
            {
                "resolution": samples.resolution,
                "bucket_step": samples.bucket_step,
                "crop": "center",
                "minimum_visible": samples.minimum_visible,
            },
        ),
        "references": PartKey(
            "references",
            {
                "image encoder": digest_of(backbone.image_encoder),
                "preprocessing of the image encoder": processor_digest(backbone.image_processor),
            },
            {
                "reference_background": list(config.reference_background),
                "reference_fit": config.reference_fit,
                "reference_features": config.reference_features,
                "reference_frame": samples.reference_frame,
            },
        ),
        "text": PartKey("text", text, {}),
    }


def changing(change: Augmentation) -> dict[Part, str]:
    """Parts that are never twice the same under the settings of the data, and why; they cannot be made ahead."""
    found = dict[Part, str]()
    if change.crop != "center":
        found["latents"] = f"data.init_args.crop is {change.crop!r}, not 'center'"
    elif change.flip_probability > 0:
        found["latents"] = f"data.init_args.flip_probability is {change.flip_probability}, not 0"
    if change.reference_augmentation > 0:
        found["references"] = f"data.init_args.reference_augmentation is {change.reference_augmentation}, not 0"
    elif change.reference_flip_probability > 0:
        found["references"] = f"data.init_args.reference_flip_probability is {change.reference_flip_probability}, not 0"
    return found


def digest_of(network: nn.Module) -> str:
    """sha256 over the config and every tensor of a network, with its type: half a precision makes other encodings.

    Computed once per object: the networks are frozen.
    """
    if network not in _known_networks:
        digest = hashlib.sha256()
        config = getattr(network, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
        # where it was loaded from and by which version is not what it computes
        settings = {name: value for name, value in config.items() if not name.startswith("_") and "version" not in name}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        _known_networks[network] = digest.hexdigest()
    return _known_networks[network]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over how a tokenizer splits text, and how long its texts are."""
    fast = json.loads(tokenizer.backend_tokenizer.to_str())
    # these two are not the tokenizer's own: they remember how it was called last
    parts = {name: value for name, value in fast.items() if name not in ("padding", "truncation")}
    limits = [tokenizer.model_max_length, tokenizer.pad_token, tokenizer.padding_side]
    return hashlib.sha256(json.dumps([parts, limits], sort_keys=True).encode()).hexdigest()


def processor_digest(processor: CLIPImageProcessor) -> str:
    """sha256 over how pictures are resized, cropped and normalised."""
    settings = {name: value for name, value in processor.to_dict().items() if "version" not in name}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
