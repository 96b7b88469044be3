"""`msdiffusion evaluate`: held-out subjects drawn with the adapter on and off, read by the judge, compared in pairs.

What the figures mean: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.safe_text import visible
from msdiffusion.errors import RequestError, check_place
from msdiffusion.evaluation.drawing import picture_maker, picture_side
from msdiffusion.evaluation.results import command_line, describe_file, evaluate
from msdiffusion.files import check_folder, place_of
from msdiffusion.places import DEFAULT_MODEL, find_model, shown

ON, OFF = "adapter_on", "adapter_off"
MAX_COUNT = 100_000
"""Pictures, clips, steps of one run: all pictures are kept in memory until the end."""
MAX_SEED = 2**62
"""Others follow from it by counting on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msdiffusion evaluate`; imports nothing heavy."""
    add = parser.add_argument
    add(
        "--model",
        default=str(DEFAULT_MODEL),
        type=find_model,
        help="adapter: folder, hub name, or ms_adapter.bin (default: embedded)",
    )
    add("--judge", default=str(DEFAULT_MODEL / "judge"), type=find_model, help="its folder (default: embedded/judge)")
    add("--subjects", type=int, default=200, help="least number of held-out subjects (default 200)")
    add("--out", type=place_of, required=True, metavar="FOLDER", help="scores, report and pictures go there")
    add("--seed", type=int, default=0, help="of the subject sets and of the noise")
    add("--steps", type=int, help="denoising steps; default: the adapter's")
    add("--guidance-scale", type=float, help="default: the adapter's")
    add("--scale", type=float, help="weight of the subjects when the adapter is on; default: its own")
    add("--batch-size", type=int, default=16, help="pictures drawn at once")
    add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the networks' products; bfloat16 takes half the time on CPUs with AMX and on GPUs",
    )
    parser.set_defaults(run=run, extras=("evaluation",))


def run(options: argparse.Namespace) -> None:
    """Runs the evaluation and writes scores.json, grid.png, index.html and every picture under `options.out`.

    Raises:
        RequestError: a number is out of range, or nothing can be written; before anything is loaded.
        WeightsError: the model or the judge can't be loaded.
    """
    check(options)
    print("loading the model and the judge", file=sys.stderr, flush=True)
    from msdiffusion.backbone.backbone import quiet_loading, usable_device
    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.world import draw_cases
    from msdiffusion.generation.generate import MSDiffusion

    quiet_loading()
    device = usable_device(options.device)
    started = time.monotonic()
    judge = Judge.from_pretrained(options.judge)
    model = MSDiffusion.from_pretrained(options.model, device=device)
    side = picture_side(model)
    cases = draw_cases(options.subjects, seed=options.seed, size=side)
    asked = {name: getattr(options, name) for name in ("steps", "guidance_scale", "scale")}
    drawn = {"batch_size": options.batch_size, "precision": options.precision}
    settings = model.adapter.config.drawing(**asked) | drawn
    scale = settings.pop("scale")
    makers = {
        ON: picture_maker(model, scale=scale, label="adapter on", **settings),
        OFF: picture_maker(model, scale=0.0, label="adapter off", **settings),
    }
    report = evaluate(
        options.out,
        cases,
        makers,
        judge,
        pairs=[(ON, OFF)],
        title="Held-out subjects, adapter on and off",
        introduction="No training of the model has seen any of these combinations of colours and pattern.",
        facts={
            "command": command_line(),
            "model": describe_file(Path(options.model) / "adapter.safetensors"),
            "judge": describe_file(Path(options.judge) / "model.safetensors"),
            "settings": {**settings, "scale": scale, "seed": options.seed, "split": "held_out", "size": side},
        },
        started=started,
    )
    tell_results(options.out, report)


def tell_results(out: Path, report: Mapping[str, Any]) -> None:
    """Print the summary, and where everything is."""
    from msdiffusion.evaluation.report import summarize

    print(summarize(report))
    for name in ("index.html", "grid.png", "scores.json"):
        print(visible(shown(out / name)))


def check(options: argparse.Namespace) -> None:
    """Say what is wrong with the options before anything heavy is loaded, see `run`."""
    from msdiffusion.request.request import MAX_BATCH, check_settings
    from msdiffusion.request.subjects import MAX_STEPS, whole_number

    check_common(options, "subjects")
    whole_number(options.batch_size, "--batch-size", 1, MAX_BATCH)
    if options.steps is not None:
        whole_number(options.steps, "--steps", 1, MAX_STEPS)
    check_settings({"guidance_scale": options.guidance_scale, "scale": options.scale})
    if options.scale == 0:
        raise RequestError(f"--scale must be above 0, got {options.scale}: 0 is the adapter off, which is drawn anyway")
    for name, place in (("--model", options.model), ("--judge", options.judge)):
        check_place(place, name)


def check_common(options: argparse.Namespace, *counts: str) -> None:
    """Check what several commands ask for.

    Args:
        options: with ``seed`` and ``out``.
        counts: names of options that are numbers of things which one run can do, 1 to MAX_COUNT.

    Raises:
        RequestError: a number is out of range, or nothing can be written to ``--out``.
    """
    from msdiffusion.request.subjects import whole_number

    for name in counts:
        whole_number(getattr(options, name), f"--{name.replace('_', '-')}", 1, MAX_COUNT)
    whole_number(options.seed, "--seed", 0, MAX_SEED)
    check_folder(options.out, "--out")
