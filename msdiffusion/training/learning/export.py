"""The config of an adapter as a run writes it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.training.learning.settings import AdapterSettings
from msdiffusion.training.samples.settings import SampleSettings

CLOSED_VOCABULARY = 2000
"""Tokens: a tokenizer with fewer was made for a small world, in which every word is one token; CLIP's has 49,408."""


def exported_config(
    settings: AdapterSettings,
    config: AdapterConfig,
    backbone: Backbone,
    samples: SampleSettings | None,
    directory: str | Path | None = None,
) -> dict[str, Any]:
    """Fields of the config that a run changes.

    Args:
        samples: what it is trained on; None where that is not known.
        directory: where it is written: local models are named relative to it. None names them by absolute paths.
    """
    changed: dict[str, Any] = {
        "base_model": _seen_from(directory, settings.base_model),
        "image_encoder": _seen_from(directory, settings.image_encoder),
        "defaults": {**config.defaults, **(settings.defaults or {})},
    }
    if samples is not None:
        native = int(torch.tensor(backbone.unet.config.sample_size).max()) * backbone.latent_factor
        changed |= {
            "training_resolution": samples.resolution,
            "largest_side": max(samples.resolution, native),
            "most_subjects": samples.max_subjects,
            "closed_vocabulary": len(backbone.tokenizer) < CLOSED_VOCABULARY,
        }
    return changed


def _seen_from(directory: str | Path | None, model: str) -> str:
    """How a config names a model: a local one by its path from a directory, or by its absolute one; others by name."""
    if not Path(model).exists():
        return model
    return str(Path(model).resolve()) if directory is None else os.path.relpath(model, directory)
