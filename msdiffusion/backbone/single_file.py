"""Base models in one file, in the layout of the original Stable Diffusion code, judged by their header alone.

Only safetensors are taken: the older formats (.ckpt) are pickles, which run code when they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_pipeline.models.weights import check_dtypes, check_names, file_headings, is_counter
from msdiffusion.errors import WeightsError, reason, refused_weights

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
# Where the first text encoder keeps its position embedding, whose last size is the width; by kind of model.
_TEXT_ENCODERS = {
    "sdxl": ("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",),
    "sd1": (
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "cond_stage_model.model.positional_embedding",  # Stable Diffusion 2
    ),
}
_MORE = {"sdxl": (("conditioner.embedders.1.", "second text encoder"),), "sd1": ()}
# Tensors that fine-tunes carry to say how they were trained, as ComfyUI reads them; the last two are Playground's.
_MARKS = ("v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
_MOST_OF_A_MARK = 64
# Beginnings of the names of all networks; what else is in such files (schedules, averages) is not read.
_NETWORKS = (UNET_PREFIX, VAE_PREFIX, "conditioner.embedders.", "cond_stage_model.")
# Beginnings of what the training of such networks has left in files, which nobody reads.
LEFT_OVER = (f"{VAE_PREFIX}loss.", f"{VAE_PREFIX}model_ema.")
_WEIGHT_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class SingleFile:
    """What the header of a checkpoint tells."""

    path: Path
    kind: str
    """"sdxl", or "sd1": one text encoder."""
    phrase_width: int
    """Width of the first text encoder."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor, by its name in the file."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """What the file says about the noise that it was trained with, as settings of a scheduler of diffusers: nothing,
    ``prediction_type``, ``rescale_betas_zero_snr``, or those of EDM, which have ``sigma_data``."""

    @property
    def cross_attentions(self) -> tuple[int, int]:
        """Number of cross-attention layers, and the width of the text that they read."""
        keys = [
            shape
            for name, shape in self.shapes.items()
            if name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight")
        ]
        return len(keys), keys[0][1] if keys else 0


def names_single_file(base_model: str | Path) -> bool:
    """Whether a base model is given as a file of weights, there or not."""
    path = Path(base_model)
    return path.is_file() or (path.suffix.lower() in _WEIGHT_FILES and not path.is_dir())


def read_single_file(path: str | Path) -> SingleFile:
    """The header of a checkpoint; no weights are read, and nothing is ever unpickled.

    Raises:
        WeightsError: no such file, no safetensors, or no Stable Diffusion model in the original layout.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no such file: {path}")
    if path.suffix.lower() not in (*_WEIGHT_FILES, ""):
        raise WeightsError(f"the base model {path} is no model: give a folder, a hub name, or a .safetensors file")
    if path.suffix.lower() != ".safetensors":
        raise WeightsError(
            f"the base model {path} is not opened: a {path.suffix or 'file without suffix'} is or may be a pickle, "
            "which can run any code when it is read; use the .safetensors version of the model"
        )
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            large = [name for name in _MARKS if math.prod(shapes.get(name, ())) > _MOST_OF_A_MARK]
            if large:
                raise WeightsError(
                    f"the base model {path} is broken: {large[0]} is no mark, its shape is {shapes[large[0]]}"
                )
            sampling = _sampling({name: file.get_tensor(name) for name in _MARKS if name in shapes}, file.metadata())
    except SafetensorError as error:
        raise WeightsError(f"the base model {path} is not a safetensors file: {error}") from None
    with refused_weights():
        headings = {name: each for name, each in file_headings(path).items() if name.startswith(_NETWORKS)}
        used = {name: heading for name, heading in headings.items() if not name.startswith(LEFT_OVER)}
        check_dtypes(f"the base model {path}", used)
    encoders = {name: kind for kind, names in _TEXT_ENCODERS.items() for name in names}
    for name, shape in shapes.items():
        if (name.endswith("attn2.to_k.weight") or name in encoders) and len(shape) != 2:
            raise WeightsError(f"the base model {path} is broken: {name} is no matrix, its shape is {shape}")
    for name, kind in encoders.items():
        if name not in shapes or not any(key.startswith(UNET_PREFIX) for key in shapes):
            continue
        for prefix, what in ((VAE_PREFIX, "autoencoder"), *_MORE[kind]):
            if not any(key.startswith(prefix) for key in shapes):
                raise WeightsError(
                    f"the base model {path} is incomplete: it holds no {what} ({prefix}*): use the full version of "
                    "the checkpoint"
                )
        return SingleFile(path, kind, shapes[name][-1], shapes, sampling)
    raise WeightsError(
        f"the base model {path} is no Stable Diffusion checkpoint in the original layout with its text encoders: needs "
        f"{UNET_PREFIX}* and {_TEXT_ENCODERS['sdxl'][0]} (SDXL) or {_TEXT_ENCODERS['sd1'][0]} (1.x); it has "
        f"{sorted(shapes)[:2]}, ..."
    )


def _sampling(marks: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """See SingleFile.sampling; ``metadata`` may say it by the names of ModelSpec."""
    if "edm_mean" in marks and "edm_std" in marks:
        return {"sigma_data": 0.5}
    edges = {}
    for name, mark in marks.items():
        if name.startswith("edm_vpred."):
            if mark.numel() != 1:
                raise WeightsError(f"{name} of the base model must be one number, got shape {tuple(mark.shape)}")
            edges[name.rpartition(".")[2]] = float(mark)
    if "sigma_max" in edges:  # without a least noise: that of CosXL, the release that began with it
        return {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_min": 0.002, **edges}
    if "v_pred" in marks or (metadata or {}).get("modelspec.prediction_type") == "v":
        return {"prediction_type": "v_prediction", **({"rescale_betas_zero_snr": True} if "ztsnr" in marks else {})}
    return {}


def check_shapes(file: SingleFile, part: str, network: torch.nn.Module, config_source: str) -> None:
    """Raise unless one of the file's networks has the names and shapes that a config asks for.

    Args:
        file: the checkpoint.
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        network: built from the config, on the meta device.
        config_source: where the config came from, for the message.

    Raises:
        WeightsError: names the first difference, with both shapes.
    """
    what, prefix, convert, known = _layout(file, part, network)
    held = {
        name: torch.empty(shape, device="meta")
        for name, shape in file.shapes.items()
        if name.startswith(prefix) and not name.startswith(LEFT_OVER)
    }
    advice = "base_config= names the pipeline that the checkpoint was made from"
    try:
        converted = convert(dict(held))
        own = {_flat(name): tuple(weight.shape) for name, weight in network.state_dict().items()}
        theirs = {_flat(name): tuple(tensor.shape) for name, tensor in converted.items()}
        by_name = part.startswith("text")  # tensors are cut up on the way: what is used can't be told from the results
        targets = {name: convert({name: tensor}) for name, tensor in held.items()} if by_name else {}
    except KeyError as error:
        raise WeightsError(
            f"{file.path} has no {error.args[0]}, which the config of {config_source} asks for: {advice}"
        ) from None
    except (IndexError, RuntimeError) as error:
        raise WeightsError(f"{file.path}: its {what} has tensors that are none of it: {reason(error)}") from None
    for name, shape in own.items():
        if theirs.get(name) != shape:
            raise WeightsError(
                f"the {what} of {file.path} is not the one that {config_source} describes: {name} has shape "
                f"{theirs.get(name, 'nothing')}, the config asks for {shape}: {advice}"
            )
    if by_name:
        extra = [name for name, made in targets.items() if not made or any(_flat(each) not in own for each in made)]
    else:
        used = {id(tensor) for each in converted.values() for tensor in (each, each._base)}
        extra = [name for name, tensor in held.items() if id(tensor) not in used]
        extra += [name for name in theirs if name not in own]
    extra = [name for name in extra if not name.startswith(known) and not is_counter(name)]
    with refused_weights():
        check_names(f"the {what} of {file.path}", (), extra)


def _layout(
    file: SingleFile, part: str, network: torch.nn.Module
) -> tuple[str, str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tuple[str, ...]]:
    """A part for messages; how its names in the file begin; what turns tensors by these names into those of the
    network; and beginnings of names that are left out where the network has no place for them.
    """
    from diffusers.loaders import single_file_utils as layouts

    if part == "unet":
        return "UNet", UNET_PREFIX, lambda held: layouts.convert_ldm_unet_checkpoint(held, dict(network.config)), ()
    if part == "vae":
        read = layouts.convert_ldm_vae_checkpoint
        return "autoencoder", VAE_PREFIX, lambda held: read(held, dict(network.config)), ()
    place = "cond_stage_model." if file.kind == "sd1" else f"conditioner.embedders.{int(part.endswith('_2'))}."
    inner = f"{place}model."
    # the second of SDXL, and that of 2.x
    open_clip = f"{place}transformer.text_model.embeddings.position_embedding.weight" not in file.shapes

    def convert(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if open_clip:
            return layouts.convert_open_clip_checkpoint(network, held, inner)
        return layouts.convert_ldm_clip_checkpoint(held)

    # the other tower, and the layer that 2.x does without
    other = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    known = (
        *layouts.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE,
        *(f"{inner}{name}" for name in ("logit_scale", "text_projection", "visual.")),
        *(f"{place}logit_scale", *(f"{place}transformer.{name}" for name in other)),
    )
    return "second text encoder" if part.endswith("_2") else "text encoder", place, convert, known


def _flat(name: str) -> str:
    """The name of a weight of a text encoder, which has them below ``text_model`` or not, by transformers' version."""
    return name.removeprefix("text_model.")
