"""Reads ``ms_adapter.bin``, the file of the official release, into this project's names.

The file holds {"image_proj": resampler, "ms_adapter": "<index>.to_k_ip.weight" and "<index>.to_v_ip.weight",
"dummy_image_tokens": inert}. The index counts ``unet.attn_processors``, self-attention layers included. The dummy
tokens have no effect on any output, so they are left behind.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msdiffusion.errors import WeightsError
from msdiffusion.resampler import ResamplerParams

# Longest first where one is the beginning of another.
_RENAMES = (
    (r"^grounding_latents$", "null_queries"),
    (r"^latent_proj\.", "query_projection."),
    (r"^latent_norm\.", "query_norm."),
    (r"^proj_in\.", "image_projection."),
    (r"^attention_norm\.", "final_norm."),
    (r"^proj_out\.", "output_projection."),
    (r"^norm_out\.", "output_norm."),
    (r"^layers\.(\d+)\.0\.norm1\.", r"blocks.\1.attention.image_norm."),
    (r"^layers\.(\d+)\.0\.norm2\.", r"blocks.\1.attention.query_norm."),
    (r"^layers\.(\d+)\.0\.", r"blocks.\1.attention."),
    (r"^layers\.(\d+)\.1\.", r"blocks.\1.feed_forward."),
)


@dataclass(frozen=True)
class OfficialAdapter:
    """The contents of ms_adapter.bin."""

    params: ResamplerParams
    resampler: dict[str, Tensor]
    """Weights by this project's names."""
    layers: dict[tuple[str, str], Tensor]
    """By (index, "to_k" or "to_v")."""
    layer_names: dict[str, str]
    """Index to the name of the UNet's processor."""


def read_official(path: str | Path, processor_names: Sequence[str], *, head_width: int = 64) -> OfficialAdapter:
    """Read the file without unpickling code.

    Args:
        path: the file.
        processor_names: ``list(unet.attn_processors)``.
        head_width: width of a resampler head, which the file does not tell.

    Raises:
        WeightsError: no such file, not such a file, or made for a UNet with other layers.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no such file: {path}")
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} is not a file of tensors only, so it is not opened: {reason}") from None
    if not isinstance(record, dict) or not {"image_proj", "ms_adapter"} <= record.keys():
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise WeightsError(f"{path} is no official ms_adapter.bin: needs image_proj and ms_adapter, found {found}")
    resampler = rename_resampler(record["image_proj"])
    params = infer_params(resampler, head_width, str(path))
    layers, names = _layers(record["ms_adapter"], processor_names, str(path))
    return OfficialAdapter(params, resampler, layers, names)


def rename_resampler(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official resampler's weights under this project's names; unknown names stay as they are."""
    return {_rename(name): tensor for name, tensor in weights.items()}


def _rename(name: str) -> str:
    for pattern, new in _RENAMES:
        renamed, count = re.subn(pattern, new, name)
        if count:
            return renamed
    return name


def infer_params(resampler: dict[str, Tensor], head_width: int, source: str = "weights") -> ResamplerParams:
    """The sizes of a resampler, read from the shapes of its weights (this project's names).

    Raises:
        WeightsError: a weight is missing, or the head width does not divide the attention's width.
    """
    try:
        tokens, width = resampler["null_queries"].shape[1:]
        inner = resampler["blocks.0.attention.to_q.weight"].shape[0]
        grounding = resampler["query_projection.0.weight"].shape[1]
        depth = 1 + max(int(name.split(".")[1]) for name in resampler if name.startswith("blocks."))
        # Official widths of the phrase: the rest of the grounding is 8 numbers for each of 8 frequencies.
        frequencies = 8
        sizes: dict[str, Any] = {
            "image_width": resampler["image_projection.weight"].shape[1],
            "phrase_width": grounding - 8 * frequencies,
            "output_width": resampler["output_projection.weight"].shape[0],
            "width": width,
            "depth": depth,
            "heads": inner // head_width,
            "head_width": head_width,
            "tokens": tokens,
            "feed_forward_factor": resampler["blocks.0.feed_forward.1.weight"].shape[0] // width,
            "box_frequencies": frequencies,
        }
    except KeyError as error:
        raise WeightsError(f"{source} has no {error.args[0]}: not the official grounding resampler") from None
    if inner % head_width:
        raise WeightsError(f"{source}: the resampler's attention is {inner} wide, which {head_width} does not divide")
    return ResamplerParams(**sizes)


def _layers(
    weights: dict[str, Tensor], processor_names: Sequence[str], source: str
) -> tuple[dict[tuple[str, str], Tensor], dict[str, str]]:
    layers: dict[tuple[str, str], Tensor] = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(\d+)\.to_([kv])_ip\.weight", name)
        if match is None:
            raise WeightsError(f"{source} has an unknown key {name} in ms_adapter")
        layers[(match[1], f"to_{match[2]}")] = tensor
    indices = sorted({index for index, _ in layers}, key=int)
    expected = [str(index) for index, name in enumerate(processor_names) if name.endswith("attn2.processor")]
    if indices != expected:
        raise WeightsError(
            f"{source} has weights for {len(indices)} cross-attention layers (up to number "
            f"{indices[-1] if indices else 'none'}), but the UNet has {len(expected)} "
            f"(up to {expected[-1] if expected else 'none'}): use the base model that it was trained on"
        )
    return layers, {index: processor_names[int(index)] for index in indices}
