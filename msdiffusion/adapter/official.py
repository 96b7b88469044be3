"""Reads and writes ``ms_adapter.bin``, the file of the official release, by this project's names.

The file holds {"image_proj": resampler, "ms_adapter": "<index>.to_k_ip.weight" and "<index>.to_v_ip.weight",
"dummy_image_tokens": inert}. The index counts ``unet.attn_processors``, self-attention layers included. The dummy
tokens have no effect on any output, so they are left behind, and written as zeros.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.models.weights import check_plain, load_pickle
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.errors import WeightsError, reason, refused_weights, shown, warn_caller
from msdiffusion.files import written
from msdiffusion.request.subjects import whole_number

OFFICIAL_NAME = "ms_adapter.bin"
DUMMY_TOKENS = 4
# Beginnings of the resampler's names, theirs and ours, "#" a number; longest first where one begins another.
_NAMES = (
    ("grounding_latents", "null_queries"),
    ("latent_proj.", "query_projection."),
    ("latent_norm.", "query_norm."),
    ("proj_in.", "image_projection."),
    ("attention_norm.", "final_norm."),
    ("proj_out.", "output_projection."),
    ("norm_out.", "output_norm."),
    ("layers.#.0.norm1.", "blocks.#.attention.image_norm."),
    ("layers.#.0.norm2.", "blocks.#.attention.query_norm."),
    ("layers.#.0.", "blocks.#.attention."),
    ("layers.#.1.", "blocks.#.feed_forward."),
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


def read_record(path: str | Path) -> dict[str, Any]:
    """The file's tensors, no code unpickled; WeightsError where there is no such file, or it holds more than that."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no such file: {path}")
    with refused_weights():
        record = load_pickle(path)  # mapped: what it holds is told before gigabytes are read
    if not isinstance(record, dict) or not {"image_proj", "ms_adapter"} <= record.keys():
        if isinstance(record, dict) and "state_dict" in record:
            raise WeightsError(
                f"{path} is no official ms_adapter.bin but a checkpoint of a training: give the run's folder, or the "
                "checkpoint under a name that ends in .ckpt"
            )
        found = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise WeightsError(
            f"{path} is no official ms_adapter.bin: needs image_proj and ms_adapter, found {shown(found, 200)}"
        )
    more = sorted(map(str, record.keys() - {"image_proj", "ms_adapter", "dummy_image_tokens"}))
    if more:
        warn_caller(f"{path} also holds {shown(more, 200)}, which an adapter has no place for: left out")
    with refused_weights():
        for part in ("image_proj", "ms_adapter"):
            check_plain(record[part], f"{path}: {part}")
    return record


def from_record(
    record: Mapping[str, Any], processor_names: Sequence[str], *, head_width: int = 64, source: str = OFFICIAL_NAME
) -> OfficialAdapter:
    """The tensors of the file by this project's names.

    Args:
        record: as ``read_record`` gives it.
        processor_names: ``list(unet.attn_processors)``.
        head_width: width of a resampler head, which the file does not tell.
        source: for messages.

    Raises:
        WeightsError: something is missing, or it was made for a UNet with other layers.
        RequestError: the head width is no width.
    """
    for part in ("image_proj", "ms_adapter"):
        weights = record[part]
        if not isinstance(weights, Mapping) or not all(isinstance(weight, Tensor) for weight in weights.values()):
            raise WeightsError(f"{source}: {part} must hold tensors by name")
    resampler = rename_resampler(record["image_proj"])
    params = infer_params(resampler, head_width, source)
    layers, names = _layers(record["ms_adapter"], processor_names, source)
    return OfficialAdapter(params, resampler, layers, names)


def to_record(
    params: ResamplerParams,
    resampler: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Tensor]],
    processor_names: Sequence[str],
) -> dict[str, Any]:
    """The contents of the file, of an adapter by this project's names.

    Args:
        params: sizes of the resampler.
        resampler: its weights.
        layers: by the name of the UNet's processor, the weights "to_k" and "to_v".
        processor_names: ``list(unet.attn_processors)``, in which the layers are counted.

    Raises:
        WeightsError: the file cannot hold this adapter, or it is for another UNet.
    """
    if not params.grounding:
        raise WeightsError("an adapter without grounding is an ablation that the official file cannot hold")
    if params.box_frequencies != 8:
        raise WeightsError(f"the official file is for 8 frequencies per box, this adapter has {params.box_frequencies}")
    expected = {name for name in processor_names if name.endswith("attn2.processor")}
    if expected != layers.keys():
        raise WeightsError(
            f"the adapter has {len(layers)} cross-attention layers and the UNet {len(expected)}, not all the same: use "
            "the base model that it was trained on"
        )
    plain = {
        _rename(name, [(ours, theirs) for theirs, ours in _NAMES]): tensor.detach()
        for name, tensor in resampler.items()
    }
    projections = {
        f"{index}.{part}_ip.weight": layers[name][part].detach()
        for index, name in enumerate(processor_names)
        if name in layers
        for part in ("to_k", "to_v")
    }
    queries = plain["grounding_latents"]
    dummy = torch.zeros(1, DUMMY_TOKENS, params.output_width, dtype=queries.dtype, device=queries.device)
    return {"image_proj": plain, "ms_adapter": projections, "dummy_image_tokens": dummy}


def write_record(record: Mapping[str, Any], path: str | Path) -> None:
    """Write the file: tensors only, so that ``torch.load(path, weights_only=True)`` reads it."""
    path = Path(path)
    # Clones: of a tensor that is part of a larger storage, torch.save would write the whole storage.
    clones = _map_tensors(record, lambda tensor: tensor.cpu().clone(memory_format=torch.contiguous_format))
    with written(path, f"{path.name}.tmp") as partial:  # torch.save writes the name into the file
        try:
            torch.save(clones, partial)
        except RuntimeError as error:  # of a full disk
            raise OSError(errno.EIO, reason(error)) from None


def _map_tensors(record: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        name: change(value) if isinstance(value, Tensor) else _map_tensors(value, change)
        for name, value in record.items()
    }


def rename_resampler(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official resampler's weights under this project's names; unknown names stay as they are."""
    return {_rename(name, _NAMES): tensor for name, tensor in weights.items()}


def _rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    for old, new in table:
        match = re.match(re.escape(old).replace(r"\#", r"(\d+)"), name)
        if match is not None and (old.endswith(".") or match[0] == name):
            return new.replace("#", "".join(match.groups())) + name[match.end() :]
    return name


def infer_params(resampler: dict[str, Tensor], head_width: int, source: str = "weights") -> ResamplerParams:
    """The sizes of a resampler, read from the shapes of its weights (this project's names).

    Raises:
        WeightsError: a weight is missing or has other axes, or the head width does not divide the attention's width.
        RequestError: the head width is no width.
    """
    head_width = whole_number(head_width, "head_width", 1)
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
    except (ValueError, IndexError, ZeroDivisionError):
        raise WeightsError(f"{source}: a weight has other axes than in the official grounding resampler") from None
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
