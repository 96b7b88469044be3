"""Which weights an adapter has, by the settings that decide it: what no checkpoint of another structure can follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from msdiffusion.adapter.config import CONFIG_NAME, AdapterConfig
from msdiffusion.adapter.loading import find_adapter
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.errors import RequestError


def check_structure(
    name: str,
    saved: Mapping[str, Any],
    adapter_config: object,
    settings: Mapping[str, Any],
    present: Mapping[str, Any],
    *,
    resume: bool,
    best: str,
) -> None:
    """Refuse a checkpoint whose weights or optimizer's state are of another kind, before they are compared by name.

    Args:
        saved: hyperparameters in it.
        adapter_config: its text in the checkpoint. Of a module without one nothing is known, so it passes.
        present: what ``structure`` or ``asked_structure`` says now.
        resume: whether the optimizer's state is taken, too.
        best: how a new run is told to start from the weights of the old one.

    Raises:
        RequestError: names the settings and what to do.
        WeightsError: the adapter's config in the checkpoint cannot be read.
    """
    if not isinstance(adapter_config, str):
        return
    config = AdapterConfig.from_json(adapter_config, f"adapter_config in {name}")
    changes = []
    ema = [values.get("ema_decay") for values in (saved, settings)]
    if None not in ema and (ema[0] > 0) != (ema[1] > 0):
        changes.append(f"ema_decay was {ema[0]}, now {ema[1]}")
    optimizers = [values.get("optimizer", "adamw") for values in (saved, settings)]
    if resume and optimizers[0] != optimizers[1]:
        changes.append(f"optimizer was {optimizers[0]}, now {optimizers[1]}")
    theirs = structure(config)
    # of the other projector's sizes some are not used
    parts = [part for part in theirs if theirs["projector"] == present.get("projector") or part == "projector"]
    used = ("projector", "resampler.image_width", "resampler.output_width", "resampler.tokens")
    for part in parts:
        if theirs["projector"] == "global" and part not in used:
            continue
        if part in present and theirs[part] != present[part]:
            changes.append(f"{part} was {theirs[part]}, now {present[part]}")
    if not changes:
        return
    advice = "give the old value" if len(changes) == 1 else "give the old values"
    if any(change.startswith(("resampler.", "projector")) for change in changes):
        advice += ", or start a new adapter without this checkpoint"
    else:
        advice += f", or start a new run from its weights, without this checkpoint and with {best}"
    raise RequestError(f"{name} does not fit these settings: {'; '.join(changes)}: {advice}")


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
