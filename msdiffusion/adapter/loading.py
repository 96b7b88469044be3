"""Finding and loading: an adapter with the places of its frozen models, checked against their configs.

Nothing large is read before the parts are known to fit.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.config import CHECKPOINT_SUFFIX, CONFIG_NAME, SCHEMA, WEIGHTS_NAME, AdapterConfig
from msdiffusion.adapter.official import OFFICIAL_NAME, read_record
from msdiffusion.attention.unet import cross_attentions
from msdiffusion.backbone.configs import absolute, encoder_widths, hub_reason, is_local, skeleton_unet
from msdiffusion.backbone.open_clip_encoder import names_open_clip
from msdiffusion.backbone.single_file import names_single_file
from msdiffusion.errors import RequestError, WeightsError, check_place, shown
from msdiffusion.places import find_model

RUN_PLACES = ("best", "adapter", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
"""What a run leaves (``msdiffusion.training.run.checkpoints``), in the order in which it is wanted."""

# CLIP encoders by the width of their tokens: what a message can recommend beside the adapter's own.
_ENCODERS = {1664: "open_clip:ViT-bigG-14", 1280: "open_clip:ViT-H-14", 1024: "openai/clip-vit-large-patch14"}


@dataclass(frozen=True)
class Sources:
    """Where the frozen models of an adapter are."""

    base_model: str
    """Folder, hub name or ``.safetensors`` file."""
    image_encoder: str
    """Folder, hub name or ``open_clip:...``."""
    base_config: str | None = None
    """For a base model in one file: folder or hub name of the pipeline that configs and tokenizers come from."""

    @property
    def local(self) -> bool:
        """Whether any of them is a place on this machine."""
        return any(is_local(source) for source in vars(self).values() if source is not None)

    def absolute(self) -> Sources:
        """The same places, named so that the working directory doesn't matter."""
        return Sources(**{name: None if place is None else absolute(place) for name, place in vars(self).items()})


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter with what it needs, known to fit."""

    adapter: MSAdapter
    """On the CPU."""
    sources: Sources
    unet: UNet2DConditionModel
    """The base model's UNet without its weights."""


def load_adapter(
    model: str | Path,
    base_model: str | Path | None = None,
    image_encoder: str | Path | None = None,
    base_config: str | Path | None = None,
    **config: Any,
) -> LoadedAdapter:
    """An adapter on the CPU, checked against the configs of its backbone, with the places of the two frozen models.

    Args:
        model: an adapter's folder or hub repository, ours or official; the official ``ms_adapter.bin``; a checkpoint of
            ``lightning fit``, or the folder of a whole run; "embedded", the one that comes along.
        base_model: in place of the one that the adapter names: folder, hub name, or ``.safetensors`` file.
        image_encoder: in place of the one that the adapter names: folder, hub name, or ``open_clip:...``.
        base_config: for a base model in one file, the pipeline that its configs and tokenizers come from. None: the
            base model that the adapter names.
        config: for the official file: ``head_width`` and fields of AdapterConfig.

    Raises:
        WeightsError: something is missing, or the parts do not fit; the message names both shapes.
        RequestError: ``config`` is given for an adapter that has a config of its own.
    """
    places = {"base_model": base_model, "image_encoder": image_encoder, "base_config": base_config}
    for option, given in places.items():
        place = find_model(given) if isinstance(given, (str, Path)) else given
        check_place(place, f"{option}=", inside=option == "image_encoder")
    place = find_adapter(model)
    if place.is_file() and place.suffix != CHECKPOINT_SUFFIX:
        sources = model_sources(place, None, base_model, image_encoder, base_config)
        record = read_record(place)  # first: if it is something else, no hub need be asked for a base model
        unet = skeleton_unet(sources.base_model, sources.base_config)
        adapter = MSAdapter.from_official_record(record, unet, source=str(place), **{**vars(sources), **config})
    else:
        if config:
            raise RequestError(
                f"{', '.join(config)} is for the official ms_adapter.bin; {model} says so itself, in its {CONFIG_NAME}"
            )
        if place.is_file():
            adapter, folder = MSAdapter.from_checkpoint(place), place.parent
        else:
            adapter, folder = MSAdapter.from_pretrained(place), place
        sources = model_sources(folder, adapter.config, base_model, image_encoder, base_config)
        _check_there(sources, model)
        unet = skeleton_unet(sources.base_model, sources.base_config)
        check_base(adapter, unet, sources.base_model, _place(folder, adapter.config.base_model))
    widths = encoder_widths(sources.base_model, sources.image_encoder, adapter.config.reference_features)
    check_encoders(adapter.config, *widths, sources)
    return LoadedAdapter(adapter, sources, unet)


def check_options(options: Iterable[str], loader: Callable[..., Any]) -> None:
    """Raise RequestError for an option that a loader doesn't know, as other libraries' may, with what to do instead.

    Args:
        options: names of such.
        loader: MSDiffusion.from_pretrained.
    """
    places = {
        "dtype": "it is called torch_dtype",
        "variant": "in half precision the variant fp16 is taken by itself where there is one",
        "scheduler": "set model.pipeline.scheduler after loading",
        "device_map": "say device=, or call model.enable_model_cpu_offload() after loading",
        "safety_checker": "add one to model.picture_hooks after loading (msdiffusion.generation.safety)",
    }
    known = [name for name in inspect.signature(loader).parameters if name != "others"]
    for name in options:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
        raise RequestError(f"from_pretrained takes no {name!r}: {places.get(name, hint)}")


def check_base(adapter: MSAdapter, unet: UNet2DConditionModel, base_model: str, needed: str) -> None:
    """Raise WeightsError unless the adapter is for a UNet of this architecture, with both sizes and what is needed.

    Args:
        adapter: the trained part.
        unet: on any device.
        base_model: where it is, for the message.
        needed: where the one is that the adapter names.
    """
    ours, theirs = adapter.layers, cross_attentions(unet)
    width, their_width = adapter.config.resampler.output_width, unet.config.cross_attention_dim
    advice = "" if needed == base_model else f": use {needed} or a fine-tune of it"
    if len(ours) != len(theirs) or (width != their_width and isinstance(their_width, int)):
        raise WeightsError(
            f"the adapter is for a UNet with {len(ours)} cross-attention layers that read text {width} wide, but the "
            f"base model {base_model} has {len(theirs)} that read text {their_width} wide{advice}"
        )
    try:
        adapter.check_unet(unet)
    except WeightsError as error:
        raise WeightsError(f"{error} (the base model is {base_model}){advice}") from None


def check_encoders(config: AdapterConfig, phrase_width: int, image_width: int, sources: Sources | None = None) -> None:
    """Raise WeightsError unless text and image encoder are as wide as the adapter expects, with the model needed.

    Args:
        config: the adapter's.
        phrase_width: of the text encoder.
        image_width: of the image encoder's features.
        sources: where the encoders are, for the message.
    """
    for what, ours, theirs in (
        ("phrase embeddings", config.resampler.phrase_width, phrase_width),
        ("image tokens", config.resampler.image_width, image_width),
    ):
        if ours == theirs:
            continue
        is_text = what == "phrase embeddings"
        encoder = "text encoder" if is_text else "image encoder"
        given = None if sources is None else sources.base_model if is_text else sources.image_encoder
        needed = config.base_model if is_text else config.image_encoder
        advice = f"use the {encoder} that the adapter was trained on"
        if needed != given:
            advice += f", of {needed}" if is_text else f", {needed}"
        if not is_text and config.reference_features == "tokens" and ours in _ENCODERS and _ENCODERS[ours] != given:
            advice += f" (or {_ENCODERS[ours]})"
        origin = "" if given is None else f" ({given})"
        raise WeightsError(f"the adapter takes {what} {ours} wide, but this {encoder} gives {theirs}{origin}: {advice}")


def find_adapter(model: str | Path) -> Path:
    """A folder with an adapter of ours, an official ``ms_adapter.bin``, or a checkpoint of ``lightning fit``.

    Of a hub repository after downloading it. Of a run's folder (``runs/msd``) what lies in it: the best adapter by
    validation, else the newest, else a checkpoint.

    Raises:
        WeightsError: there is nothing of that name, or no adapter in it.
    """
    if not isinstance(model, (str, Path)) or not str(model).strip():
        raise WeightsError(f"an adapter is given by its folder, file or hub name, got {shown(model)}")
    check_place(find_model(model), "the adapter")  # told before a hub or the base model is asked
    path = Path(find_model(model))
    if path.is_file():
        _check_file(path)
        return path
    if not path.is_dir():
        path = _download(str(model))
    if not _is_ours(path) and (path / OFFICIAL_NAME).is_file():
        return path / OFFICIAL_NAME
    if not (path / CONFIG_NAME).is_file():
        for place in RUN_PLACES:
            found = path / place
            if found.is_file() or (found / WEIGHTS_NAME).is_file():
                return found
        held = sorted(path.glob(f"*{CHECKPOINT_SUFFIX}"))
        if held:
            raise WeightsError(
                f"{path} is no adapter's folder, but holds checkpoints: give one of them, such as {held[-1]}"
            )
        if (path / "model_index.json").is_file():
            raise WeightsError(f"{path} is a base model, not an adapter: give it as base_model=, beside an adapter")
        inside = next((file.parent for file in sorted(path.glob(f"*/{WEIGHTS_NAME}")) if _is_ours(file.parent)), None)
        if inside is not None:
            raise WeightsError(f"{path} is no adapter, but holds some: give one of them, such as {inside}")
    return path


def _check_file(path: Path) -> None:
    """Raise WeightsError where a file is none that an adapter can be read from, with a hint where it belongs."""
    if path.name in (WEIGHTS_NAME, CONFIG_NAME) and _is_ours(path.parent):
        raise WeightsError(f"{path} is one file of an adapter: give its folder, {path.parent}")
    if path.suffix.lower() not in (".bin", ".pt", ".pth", CHECKPOINT_SUFFIX):
        raise WeightsError(
            f"{path} is no adapter: that is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, a checkpoint "
            f"(*{CHECKPOINT_SUFFIX}), or the official {OFFICIAL_NAME}; a base model in one file goes to base_model=, a "
            "LoRA to model.pipeline.load_lora_weights, which needs the package peft (the extra lora)"
        )


def _download(name: str) -> Path:
    """The files of an adapter in a hub repository: the config first, which tells whose layout it is."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_NAME]))
        if not _is_ours(folder):
            return Path(snapshot_download(name, allow_patterns=[OFFICIAL_NAME]))
        config = AdapterConfig.read(folder / CONFIG_NAME, f"{name}/{CONFIG_NAME}")
        # Models may lie in the repository; a hub name matches no file in it.
        models = [place for place in (config.base_model, config.image_encoder, config.base_config) if place is not None]
        patterns = [CONFIG_NAME, WEIGHTS_NAME, *models, *(f"{place}/**" for place in models)]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise WeightsError(
            f"no such folder: {name}; as a hub repository it cannot be had either: {hub_reason(error)}"
        ) from error


def _is_ours(folder: Path) -> bool:
    """Whether a folder's config.json is that of our adapters, of any version; broken ones count, to be reported."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return not (folder / OFFICIAL_NAME).is_file()
    return isinstance(record, dict) and str(record.get("schema", "")).startswith(SCHEMA.partition("/")[0])


def model_sources(
    folder: Path,
    config: AdapterConfig | None,
    base_model: str | Path | None = None,
    image_encoder: str | Path | None = None,
    base_config: str | Path | None = None,
) -> Sources:
    """The places of the frozen models: named in an adapter's config, or given instead as for ``load_adapter``.

    Args:
        folder: the adapter's.
        config: what it says; None: of the official file, which says nothing.
    """
    if config is None:
        named = AdapterConfig.base_model  # the release doesn't say what it was trained on; everybody knows
        base = find_model(named if base_model is None else base_model)
        encoder = find_model(AdapterConfig.image_encoder if image_encoder is None else image_encoder)
        configs = base_config if base_config is not None else named if names_single_file(base) else None
        return Sources(base, encoder, None if configs is None else str(configs))
    base = _place(folder, config.base_model) if base_model is None else find_model(base_model)
    encoder = _place(folder, config.image_encoder) if image_encoder is None else find_model(image_encoder)
    if not names_single_file(base):
        return Sources(base, encoder)
    if base_config is None:
        named = _place(folder, config.base_model if config.base_config is None else config.base_config)
        base_config = None if names_single_file(named) else named
    return Sources(base, encoder, None if base_config is None else str(base_config))


def _check_there(sources: Sources, model: str | Path) -> None:
    """Raise WeightsError for a folder that is not there, as after copying an adapter: no hub can have that."""
    for option, place in vars(sources).items():
        if place is None or is_local(place) or names_open_clip(place) or names_single_file(place):
            continue
        inner = r"(/\w[\w.-]*)*" if option == "image_encoder" else ""  # a folder inside a repository
        if not re.fullmatch(rf"\w[\w.-]*/\w[\w.-]*{inner}", place):
            raise WeightsError(
                f"no {option.replace('_', ' ')} for the adapter {model}: there is no folder {place}, seen from here or "
                f"from the adapter's folder (was it copied without it?): give {option}=, folder or hub name of it"
            )


def _place(folder: Path, name: str) -> str:
    """A model named in a config: relative to the adapter's folder where that exists, else as ``find_model`` has it."""
    inside = folder / name
    return str(inside) if inside.exists() else find_model(name)
