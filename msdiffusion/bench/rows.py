"""The rows of the world benchmark: what each method is, how it is trained, and how its pictures are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESAMPLER = {"width": 192, "depth": 3, "heads": 6, "head_width": 32}
"""Sizes of every row's resampler: those of configs/msd.yaml."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        title: for the table.
        meaning: one line for people.
        training: settings of `lightning fit -c configs/msd.yaml` in which the row differs from MS-Diffusion; None
            where nothing is trained.
        adapter_of: the row whose adapter it draws with, "shipped" for the one of the embedded model, None for none.
        drawing: options of `picture_maker` in which it differs from the adapter's defaults; None where the pictures
            are the true renders.
    """

    title: str
    meaning: str
    training: Mapping[str, Any] | None
    adapter_of: str | None
    drawing: Mapping[str, Any] | None = field(default_factory=dict)


_UNGROUNDED = {"model.init_args.resampler": {**RESAMPLER, "grounding": False}}
_UNMASKED = {"model.init_args.regions": "everywhere"}

ROWS: Mapping[str, Row] = {
    "ms_diffusion": Row("**MS-Diffusion**", "grounding resampler and box masks", {}, "ms_diffusion"),
    "learned_queries": Row(
        "without grounding init",
        "the resampler starts from learned queries; phrases and boxes reach it not at all",
        _UNGROUNDED,
        "learned_queries",
    ),
    "no_masks": Row(
        "without masks", "every patch may look at every subject, in training and drawing", _UNMASKED, "no_masks"
    ),
    "ip_adapter_plus": Row(
        "neither (IP-Adapter-Plus-style)",
        "learned queries and no masks",
        _UNGROUNDED | _UNMASKED,
        "ip_adapter_plus",
    ),
    "ip_adapter": Row(
        "IP-Adapter",
        "four tokens from one embedding of each whole reference, no masks",
        {"model.init_args.resampler": {"tokens": 4}, "model.init_args.projector": "global", **_UNMASKED},
        "ip_adapter",
    ),
    "same_frame": Row(
        "reference equals target",
        "MS-Diffusion trained with references cut out of the target picture itself: no video pairs",
        {"data.init_args.reference_frame": "target"},
        "same_frame",
    ),
    "subject_masks": Row(
        "mask instead of box",
        "MS-Diffusion's adapter; its regions are the silhouettes of the true render, which tell the pose too",
        None,
        "ms_diffusion",
        {"regions": "masks"},
    ),
    "auto_layout": Row(
        "auto layout",
        "MS-Diffusion's adapter; from the fifth step on its regions are where the text attends to the phrase",
        None,
        "ms_diffusion",
        {"regions": "auto_layout"},
    ),
    "adapter_off": Row("adapter off", "the bare base: prompt only", None, "ms_diffusion", {"scale": 0.0}),
    "true_renders": Row("true renders", "the world's own drawing: the ceiling of every column", None, None, None),
    "shipped": Row(
        "*embedded default*", "the adapter in checkpoints/tiny: MS-Diffusion trained longer", None, "shipped"
    ),
}
REFERENCE_ROW = "ms_diffusion"
"""The row that the others are compared with."""


def training_arguments(row: Row, common: Mapping[str, Any]) -> list[str]:
    """Arguments of `lightning fit` that follow the config file: the common ones, then the row's own."""
    arguments: list[str] = []
    for key, value in {**common, **(row.training or {})}.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{key}", shown]
    return arguments
