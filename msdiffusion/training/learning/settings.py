"""Settings of the adapter's training: refused where they cannot be, and turned into an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.config import CHECKPOINT_SUFFIX, CONFIG_NAME, AdapterConfig
from msdiffusion.adapter.loading import find_adapter
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.backbone.configs import skeleton_unet
from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.places import find_model
from msdiffusion.training.learning.optimizers import check_optimizer

CHOICES: dict[str, tuple[str, ...]] = {
    "decay": ("none", "linear", "linear_half", "cosine"),
    "loss_weighting": ("uniform", "min_snr"),
    "timestep_sampling": ("uniform", "logit_normal"),
    "size_condition": ("picture", "resolution"),
    "attention": ("sdpa", "softmax"),
    "base_dtype": ("auto", "float32", "bfloat16", "float16"),
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of ``MSDiffusionModule`` that cannot be honoured, before anything is loaded.

    Args:
        settings: its arguments by name.

    Raises:
        RequestError: names the first one, what it was, and what it may be.
    """
    for name in ("learning_rate", "box_loss_weight", "timestep_exponent", "min_snr_gamma"):
        if not 0 < settings[name] < float("inf"):
            raise RequestError(f"{name} must be above 0, got {settings[name]}")
    for name in ("weight_decay", "warmup_steps", "noise_offset", "layout_loss_weight"):
        if not 0 <= settings[name] < float("inf"):
            raise RequestError(f"{name} must not be below 0, got {settings[name]}")
    if not 0 <= settings["ema_decay"] < 1:
        raise RequestError(f"ema_decay must be in [0, 1), got {settings['ema_decay']}")
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise RequestError(f"{name} must be one of {choices}, got {settings[name]!r}")
    if settings["timestep_sampling"] != "uniform" and settings["timestep_exponent"] != 1:
        raise RequestError(
            f"timestep_exponent={settings['timestep_exponent']} tilts timestep_sampling='uniform': leave it at 1 with "
            f"{settings['timestep_sampling']!r}"
        )
    if settings["compile"] and settings["layout_loss_weight"] > 0:
        raise RequestError(
            "layout_loss_weight looks into the attention layers while they compute, which compile does not allow: set "
            "one of the two to 0 or false"
        )
    _check_timesteps(settings["validation_timesteps"])
    check_optimizer(settings["optimizer"], settings["fused"])
    _check_adapter(settings)


def _check_timesteps(timesteps: Any) -> None:
    if timesteps is None:
        return
    whole = all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in timesteps)
    if not timesteps or not whole or len(set(timesteps)) < len(timesteps):
        raise RequestError(
            f"validation_timesteps must be different whole numbers of at least 0, one or more, got {timesteps}"
        )


def _check_adapter(settings: Mapping[str, Any]) -> None:
    """Build the config of the adapter once with any widths, as it will be built when the base is known."""
    sizes = settings["resampler"] or {}
    known = {field.name for field in fields(ResamplerParams)} - {"image_width", "phrase_width", "output_width"}
    unknown = set(sizes) - known
    if unknown and settings["adapter"] is None:
        raise RequestError(f"resampler has unknown sizes {sorted(unknown)}; known: {sorted(known)}")
    try:
        params = ResamplerParams(
            image_width=1, phrase_width=1, output_width=1, **{name: sizes[name] for name in known & set(sizes)}
        )
        AdapterConfig(resampler=params, **new_adapter_config(settings))
        if settings["defaults"] is not None:
            AdapterConfig(resampler=params, defaults=settings["defaults"])
    except (WeightsError, TypeError) as error:
        raise RequestError(str(error)) from None


def validation_timesteps(given: list[int] | None, num_timesteps: int) -> list[int]:
    """The fixed timesteps of validation; five that are equally spaced where none are given.

    Raises:
        RequestError: one is beyond the base's schedule.
    """
    if given is None:
        return [num_timesteps * share // 10 for share in (1, 3, 5, 7, 9)]
    if max(given) >= num_timesteps:
        raise RequestError(
            f"validation_timesteps={given} go beyond the schedule of the base, whose last timestep is "
            f"{num_timesteps - 1}"
        )
    return list(given)


def new_adapter_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a new adapter's AdapterConfig, but ``resampler``; what was not given keeps its default."""
    config: dict[str, Any] = {"base_model": settings["base_model"], "image_encoder": settings["image_encoder"]}
    if settings["reference_background"] is not None:
        config["reference_background"] = tuple(settings["reference_background"])
    for name in ("reference_fit", "projector", "regions"):
        if settings[name] is not None:
            config[name] = settings[name]
    return config


def new_adapter(settings: Mapping[str, Any], backbone: Backbone) -> MSAdapter:
    """A fresh adapter for a base: random resampler, keys and values of the frozen ones that read the text."""
    params = ResamplerParams(
        image_width=backbone.image_width_of("global" if settings["projector"] == "global" else "tokens"),
        phrase_width=backbone.phrase_width,
        output_width=backbone.cross_attention_dim,
        **(settings["resampler"] or {}),
    )
    return MSAdapter.from_unet(backbone.unet, params, **new_adapter_config(settings))


def given_adapter(settings: Mapping[str, Any]) -> MSAdapter:
    """The adapter to go on from: whatever ``MSDiffusion.from_pretrained`` takes for one.

    Raises:
        RequestError: a setting contradicts it.
        WeightsError: it cannot be read.
    """
    place = find_adapter(settings["adapter"])
    if place.is_dir():
        adapter = MSAdapter.from_pretrained(place)
    elif place.suffix == CHECKPOINT_SUFFIX:
        adapter = MSAdapter.from_checkpoint(place)
    else:
        sizes = {name: size for name, size in (settings["resampler"] or {}).items() if name == "head_width"}
        unet = skeleton_unet(find_model(settings["base_model"]))
        adapter = MSAdapter.from_official(place, unet, **sizes, **new_adapter_config(settings))
    config = adapter.config
    theirs = {name: getattr(config.resampler, name, None) for name in settings["resampler"] or {}}
    for name, present in (
        ("resampler", theirs),
        ("reference_background", list(config.reference_background)),
        ("reference_fit", config.reference_fit),
        ("projector", config.projector),
        ("regions", config.regions),
    ):
        asked = settings[name]
        if asked is not None and asked != present:
            raise RequestError(
                f"{name}={asked} contradicts the adapter {settings['adapter']!r}, which was trained with {present}: "
                f"leave {name} out, or start a new adapter without adapter="
            )
    return adapter


def other_structure(
    saved: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: AdapterConfig | None,
    present: Mapping[str, Any],
    resume: bool,
) -> list[str]:
    """Settings whose change no checkpoint can follow, because its weights or its optimizer's state are others.

    Args:
        saved: hyperparameters in the checkpoint.
        settings: hyperparameters now.
        config: of the adapter in the checkpoint; None for a module without one, of which nothing is known.
        present: as ``structure`` gives it.
        resume: whether the optimizer's state is taken, too.

    Returns:
        "name was A, now B" of each.
    """
    if config is None:
        return []
    found = []
    ema = [values.get("ema_decay") for values in (saved, settings)]
    if None not in ema and (ema[0] > 0) != (ema[1] > 0):
        found.append(f"ema_decay was {ema[0]}, now {ema[1]}")
    optimizers = [values.get("optimizer", "adamw") for values in (saved, settings)]
    if resume and optimizers[0] != optimizers[1]:
        found.append(f"optimizer was {optimizers[0]}, now {optimizers[1]}")
    theirs = structure(config)
    # of the other projector's sizes some are not used
    names = [name for name in theirs if theirs["projector"] == present.get("projector") or name == "projector"]
    used = ("projector", "resampler.image_width", "resampler.output_width", "resampler.tokens")
    for name in names:
        if theirs["projector"] == "global" and name not in used:
            continue
        if name in present and theirs[name] != present[name]:
            found.append(f"{name} was {theirs[name]}, now {present[name]}")
    return found


def structure(config: AdapterConfig) -> dict[str, Any]:
    """What decides which weights an adapter has, by the names of the settings."""
    sizes = {f"resampler.{name}": value for name, value in asdict(config.resampler).items()}
    return {"projector": config.projector, **sizes}


def asked_structure(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the adapter that settings ask for, before anything is loaded; what is not known yet is left out."""
    if settings.get("adapter") is not None:
        folder = Path(settings["adapter"])
        path = (find_adapter(folder) if folder.is_dir() else folder) / CONFIG_NAME
        return structure(AdapterConfig.read(path)) if path.is_file() else {}
    widths = ("image_width", "phrase_width", "output_width")  # of the base
    defaults = {field.name: field.default for field in fields(ResamplerParams) if field.name not in widths}
    sizes = {**defaults, **(settings.get("resampler") or {})}
    return {
        "projector": settings.get("projector") or "resampler",
        **{f"resampler.{name}": sizes[name] for name in defaults},
    }


def way_out(changes: list[str], best: str) -> str:
    """What to do about changes that ``other_structure`` has found.

    Args:
        changes: of at least one setting.
        best: how a new run is told to start from the weights of the old one.
    """
    advice = "give the old value" if len(changes) == 1 else "give the old values"
    if any(change.startswith(("resampler.", "projector")) for change in changes):
        return f"{advice}, or start a new adapter without this checkpoint"
    return f"{advice}, or start a new run from its weights, without this checkpoint and with {best}"
