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


def _trained(name: str, title: str, meaning: str, **training: Any) -> tuple[str, Row]:
    return name, Row(title, meaning, {key.replace("__", "."): value for key, value in training.items()}, name)


_MODEL, _DATA = "model__init_args__", "data__init_args__"

ROWS: Mapping[str, Row] = dict(
    [
        _trained("ms_diffusion", "**MS-Diffusion**", "grounding resampler and box masks"),
        _trained(
            "learned_queries",
            "without grounding init",
            "the resampler starts from learned queries; phrases and boxes reach it not at all",
            **{f"{_MODEL}resampler": {**RESAMPLER, "grounding": False}},
        ),
        _trained(
            "no_masks",
            "without masks",
            "every patch may look at every subject, in training and drawing",
            **{f"{_MODEL}regions": "everywhere"},
        ),
        _trained(
            "ip_adapter_plus",
            "neither (IP-Adapter-Plus-style)",
            "learned queries and no masks",
            **{f"{_MODEL}resampler": {**RESAMPLER, "grounding": False}, f"{_MODEL}regions": "everywhere"},
        ),
        _trained(
            "ip_adapter",
            "IP-Adapter",
            "four tokens from one embedding of each whole reference, no masks",
            **{
                f"{_MODEL}resampler": {"tokens": 4},
                f"{_MODEL}projector": "global",
                f"{_MODEL}regions": "everywhere",
            },
        ),
        _trained(
            "same_frame",
            "reference equals target",
            "MS-Diffusion trained with references cut out of the target picture itself: no video pairs",
            **{f"{_DATA}reference_frame": "target"},
        ),
        (
            "subject_masks",
            Row(
                "mask instead of box",
                "MS-Diffusion's adapter; its regions are the silhouettes of the true render, which tell the pose too",
                None,
                "ms_diffusion",
                {"regions": "masks"},
            ),
        ),
        (
            "auto_layout",
            Row(
                "auto layout",
                "MS-Diffusion's adapter; from the fifth step on its regions are where the text attends to the phrase",
                None,
                "ms_diffusion",
                {"regions": "auto_layout"},
            ),
        ),
        (
            "adapter_off",
            Row("adapter off", "the bare base: prompt only", None, "ms_diffusion", {"scale": 0.0}),
        ),
        ("true_renders", Row("true renders", "the world's own drawing: the ceiling of every column", None, None, None)),
        (
            "shipped",
            Row("*embedded default*", "the adapter in checkpoints/tiny: MS-Diffusion trained longer", None, "shipped"),
        ),
    ]
)
REFERENCE_ROW = "ms_diffusion"
"""The row that the others are compared with."""


def training_arguments(row: Row, common: Mapping[str, Any]) -> list[str]:
    """Arguments of `lightning fit` that follow the config file: the common ones, then the row's own."""
    arguments: list[str] = []
    for key, value in {**common, **(row.training or {})}.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{key}", shown]
    return arguments
