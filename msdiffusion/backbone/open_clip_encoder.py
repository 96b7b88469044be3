"""open_clip's CLIP vision towers behind the interface of transformers' ``CLIPVisionModelWithProjection``.

Named ``open_clip:MODEL``, ``open_clip:MODEL/TAG`` (a release of that model) or ``open_clip:MODEL@FILE.safetensors``.
Only the vision tower is built and read.

Shapes: N pictures, L tokens (the class token first), D width, P width of the projected embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from data_pipeline.models.weights import check_finite, fill, state_of
from msdiffusion.errors import WeightsError, reason, refused_weights

PREFIX = "open_clip:"
_WEIGHTS_NAME = "open_clip_model.safetensors"
# What a plain CLIP tower may state of itself; anything else is another network (timm's, attention pooling, ...).
_PLAIN = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
# open_clip's names, after "visual.", and those of transformers.
_RENAMES = (
    (r"^class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^ln_pre\.", "vision_model.pre_layrnorm."),  # transformers spells it so
    (r"^ln_post\.", "vision_model.post_layernorm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"vision_model.encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"vision_model.encoder.layers.\1.mlp.fc2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"vision_model.encoder.layers.\1.self_attn.out_proj."),
)


@dataclass(frozen=True)
class OpenClipName:
    """A parsed ``open_clip:...``."""

    model: str
    tag: str | None = None
    file: Path | None = None

    @classmethod
    def parse(cls, name: str) -> OpenClipName:
        """Read ``open_clip:MODEL[/TAG | @FILE.safetensors]``; WeightsError for anything else."""
        rest = str(name).removeprefix(PREFIX)
        model, at, file = rest.partition("@")
        model, _, tag = model.partition("/")
        if not model or (at and not file):
            raise WeightsError(f"{name!r} must be {PREFIX}MODEL, {PREFIX}MODEL/TAG or {PREFIX}MODEL@FILE.safetensors")
        if file and Path(file).suffix.lower() != ".safetensors":
            raise WeightsError(f"{name!r}: the weights must be a .safetensors file; pickles are not opened")
        return cls(model, tag or None, Path(file) if file else None)

    def __str__(self) -> str:
        return PREFIX + self.model + (f"/{self.tag}" if self.tag else "") + (f"@{self.file}" if self.file else "")


@dataclass(frozen=True)
class VisionOutput:
    """The part of transformers' output that is asked for."""

    image_embeds: Tensor
    """(N, P)."""
    hidden_states: tuple[Tensor, Tensor] | None
    """What the last two blocks give, each (N, L, D): [-2] and [-1] are those of transformers."""


def names_open_clip(name: str | Path) -> bool:
    """Whether an image encoder is one of open_clip's."""
    return str(name).startswith(PREFIX)


def vision_config(name: OpenClipName) -> CLIPVisionConfig:
    """The sizes of a vision tower, without its weights, as transformers states them.

    Raises:
        WeightsError: no such model or release, or its vision tower is not a plain CLIP transformer.
    """
    import open_clip

    record = open_clip.get_model_config(name.model)
    if record is None:
        close = [model for model in open_clip.list_models() if model.startswith(name.model[:5])]
        raise WeightsError(f"open_clip has no model {name.model!r}; near it: {close[:8]}")
    sizes = record["vision_cfg"]
    if not set(sizes) <= _PLAIN or not isinstance(sizes["layers"], int):
        raise WeightsError(
            f"the vision tower of open_clip's {name.model} is not a plain CLIP transformer ({sorted(sizes)}), so its "
            "tokens can't be had; use one such as ViT-bigG-14"
        )
    quick = _release(name).get("quick_gelu", record.get("quick_gelu", False))
    return CLIPVisionConfig(
        hidden_size=sizes["width"],
        intermediate_size=int(sizes["width"] * sizes.get("mlp_ratio", 4.0)),
        projection_dim=record["embed_dim"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["width"] // sizes.get("head_width", 64),
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        hidden_act="quick_gelu" if quick else "gelu",
        layer_norm_eps=1e-5,
    )


def _release(name: OpenClipName) -> Mapping[str, Any]:
    """What open_clip knows of a release: where its weights are, mean, std; nothing for a file of one's own."""
    import open_clip

    if name.file is not None:
        return {}
    tags = open_clip.list_pretrained_tags_by_model(name.model)
    if name.tag is not None and name.tag not in tags:
        raise WeightsError(f"open_clip has no release {name.tag!r} of {name.model}; it has {tags}")
    return open_clip.get_pretrained_cfg(name.model, name.tag or tags[0]) if tags else {}


class OpenClipVisionEncoder(nn.Module):
    """A vision tower of open_clip that answers as transformers' does."""

    def __init__(self, visual: nn.Module, config: CLIPVisionConfig, processor: CLIPImageProcessor) -> None:
        """Take a built ``open_clip.transformer.VisionTransformer`` with its sizes and preprocessing."""
        super().__init__()
        self.visual, self.config, self.processor = visual, config, processor

    @classmethod
    def from_pretrained(cls, name: str | OpenClipName, dtype: torch.dtype = torch.float32) -> OpenClipVisionEncoder:
        """Build the tower and read its weights, from a file or after downloading them.

        Raises:
            WeightsError: no such model, release or file, or weights of another model.
        """
        name = name if isinstance(name, OpenClipName) else OpenClipName.parse(name)
        config, release = vision_config(name), _release(name)
        path = name.file if name.file is not None else _download(name, release)
        with torch.device("meta"):
            visual = _build(config)
        with refused_weights():
            source = f"{path}, read as the {name.model} of open_clip"
            fill(visual, _read_visual(path), source, assign=True)
            check_finite(state_of(visual.to(dtype)).items(), source)
        return cls(visual, config, _processor(config, release))

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.visual.proj.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.visual.proj.dtype

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> VisionOutput:
        """Embeddings and, if asked for, the states of the last two blocks, of pictures (N, 3, h, w)."""
        answer = self.visual.forward_intermediates(pixel_values, indices=2, output_fmt="NLC", output_extra_tokens=True)
        states = zip(answer["image_intermediates_prefix"], answer["image_intermediates"], strict=True)
        hidden = tuple(torch.cat(pair, dim=1) for pair in states) if output_hidden_states else None
        return VisionOutput(answer["image_features"], hidden)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tower as a folder of transformers, which needs no open_clip any more."""
        with torch.device("meta"):
            model = CLIPVisionModelWithProjection(self.config)
        model.load_state_dict(to_transformers(self.visual.state_dict()), strict=False, assign=True)
        model.to(self.dtype).save_pretrained(directory)


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an open_clip vision tower by the names of ``CLIPVisionModelWithProjection``.

    Args:
        weights: ``visual.state_dict()``: query, key and value stacked in one matrix, the projection as (D, P).

    Raises:
        WeightsError: a weight that a plain CLIP tower doesn't have.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stacked = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if name == "proj":
            result["visual_projection.weight"] = tensor.T.contiguous()
        elif stacked:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                key = f"vision_model.encoder.layers.{stacked[1]}.self_attn.{part}_proj.{stacked[2]}"
                result[key] = piece.clone()
        else:
            new = next((re.sub(old, to, name) for old, to in _RENAMES if re.match(old, name)), None)
            if new is None:
                raise WeightsError(f"visual.{name} is no weight of a plain CLIP vision tower")
            result[new] = tensor
    return result


def _build(config: CLIPVisionConfig) -> nn.Module:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    sizes = CLIPVisionCfg(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        head_width=config.hidden_size // config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size + 1e-9,  # it is truncated after the product
        patch_size=config.patch_size,
        image_size=config.image_size,
    )
    return _build_vision_tower(config.projection_dim, sizes, quick_gelu=config.hidden_act == "quick_gelu")


def _download(name: OpenClipName, release: Mapping[str, Any]) -> Path:
    repository = release.get("hf_hub", "").rstrip("/")
    if not repository:
        raise WeightsError(f"{name}: open_clip knows no hub repository with these weights; give {PREFIX}MODEL@FILE")
    try:
        return Path(hf_hub_download(repository, _WEIGHTS_NAME))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise WeightsError(
            f"cannot load the image encoder {name}: {_WEIGHTS_NAME} of {repository}: {reason(error)}"
        ) from error


def _read_visual(path: Path) -> dict[str, Tensor]:
    """The vision tower's weights in a file of a whole CLIP or of the tower alone; the rest is not read."""
    if not path.is_file():
        raise WeightsError(f"no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            prefix = "visual." if any(name.startswith("visual.") for name in names) else ""
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from None


def _processor(config: CLIPVisionConfig, release: Mapping[str, Any]) -> CLIPImageProcessor:
    """The release's own preprocessing; CLIP's mean and deviation where it states none."""
    side = config.image_size
    statistics = {
        ours: list(release[theirs])
        for ours, theirs in (("image_mean", "mean"), ("image_std", "std"))
        if theirs in release
    }
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **statistics)
