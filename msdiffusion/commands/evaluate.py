"""`msdiffusion evaluate`: held-out subjects drawn with the adapter on and off, read by the judge, compared in pairs.

This is where the generator meets the evaluation, which knows nothing of it. What the figures mean: docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.safe_text import visible
from msdiffusion.errors import RequestError, check_place
from msdiffusion.files import check_folder, place_of, written
from msdiffusion.places import DEFAULT_MODEL, find_model, shown

if TYPE_CHECKING:
    from PIL import Image

    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.world import PictureMaker, WorldCase
    from msdiffusion.generation.generate import MSDiffusion

ON, OFF = "adapter_on", "adapter_off"
GRID_CASES = 12
MAX_COUNT = 100_000
"""Pictures, clips, steps of one run: all pictures are kept in memory until the end."""
MAX_SEED = 2**62
"""Others follow from it by counting on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msdiffusion evaluate`; imports nothing heavy."""
    parser.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        type=find_model,
        help="adapter: folder, hub name, or ms_adapter.bin (default: embedded)",
    )
    parser.add_argument(
        "--judge",
        default=str(DEFAULT_MODEL / "judge"),
        type=find_model,
        help="its folder (default: embedded/judge)",
    )
    parser.add_argument("--subjects", type=int, default=200, help="least number of held-out subjects (default 200)")
    parser.add_argument(
        "--out", type=place_of, required=True, metavar="FOLDER", help="scores, report and pictures go there"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the subject sets and of the noise")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the adapter's")
    parser.add_argument("--guidance-scale", type=float, help="default: the adapter's")
    parser.add_argument("--scale", type=float, help="weight of the subjects when the adapter is on; default: its own")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures drawn at once")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the networks' products; bfloat16 takes half the time on CPUs with AMX and on GPUs",
    )
    parser.set_defaults(run=run)


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
    from msdiffusion.evaluation.world import draw_cases, evaluate_world
    from msdiffusion.generation.generate import MSDiffusion

    quiet_loading()
    device = usable_device(options.device)
    started = time.monotonic()
    judge = Judge.from_pretrained(options.judge)
    model = MSDiffusion.from_pretrained(options.model, device=device)
    cases = draw_cases(options.subjects, seed=options.seed, size=picture_side(model))
    settings = {
        "steps": options.steps or model.adapter.config.defaults.get("steps", 30),
        "guidance_scale": _given(options.guidance_scale, model.adapter.config.defaults.get("guidance_scale", 7.5)),
        "batch_size": options.batch_size,
        "precision": options.precision,
    }
    scale = _given(options.scale, model.adapter.config.defaults.get("scale", 1.0))
    makers = {
        ON: picture_maker(model, scale=scale, label="adapter on", **settings),
        OFF: picture_maker(model, scale=0.0, label="adapter off", **settings),
    }
    report, pictures = evaluate_world(cases, makers, judge, pairs=[(ON, OFF)])
    facts = {
        "command": command_line(),
        "model": describe_file(Path(options.model) / "adapter.safetensors"),
        "judge": describe_file(Path(options.judge) / "model.safetensors"),
        "settings": {
            **settings,
            "scale": scale,
            "seed": options.seed,
            "split": "held_out",
            "size": picture_side(model),
        },
        "seconds": round(time.monotonic() - started, 1),
        "versions": versions(),
    }
    write_results(
        options.out,
        cases,
        report,
        pictures,
        judge,
        title="Held-out subjects, adapter on and off",
        introduction="No training of the model has seen any of these combinations of colours and pattern.",
        facts=facts,
    )


def check(options: argparse.Namespace) -> None:
    """Say what is wrong with the options before anything heavy is loaded.

    Raises:
        RequestError: a number is out of range, or nothing can be written to ``--out``.
        WeightsError: a model is not there.
    """
    from msdiffusion.request.request import MAX_BATCH, check_settings
    from msdiffusion.request.subjects import MAX_STEPS, whole_number

    check_counts({"--subjects": options.subjects})
    whole_number(options.batch_size, "--batch-size", 1, MAX_BATCH)
    whole_number(options.seed, "--seed", 0, MAX_SEED)
    if options.steps is not None:
        whole_number(options.steps, "--steps", 1, MAX_STEPS)
    check_settings({"guidance_scale": options.guidance_scale, "scale": options.scale})
    if options.scale == 0:
        raise RequestError(f"--scale must be above 0, got {options.scale}: 0 is the adapter off, which is drawn anyway")
    for name, place in (("--model", options.model), ("--judge", options.judge)):
        check_place(place, name)
    check_folder(options.out, "--out")


def check_counts(counts: Mapping[str, int]) -> None:
    """Raise RequestError unless each is a number of things that one run can do, 1 to MAX_COUNT; by their flags."""
    from msdiffusion.request.subjects import whole_number

    for flag, count in counts.items():
        whole_number(count, flag, 1, MAX_COUNT)


def picture_maker(
    model: MSDiffusion,
    *,
    scale: float,
    steps: int,
    guidance_scale: float,
    batch_size: int,
    label: str,
    precision: str = "float32",
    regions: str = "boxes",
) -> PictureMaker:
    """A callable that draws one picture per case with one scale of the adapter, several cases at a time.

    The noise of a case depends on its own seed only: the same for every scale, batch size and order. Cases are drawn
    together with others of as many subjects, so that nothing is padded.

    Args:
        model: the generator.
        scale: of the adapter; 0 switches it off.
        steps: denoising steps.
        guidance_scale: weight against the empty prompt.
        batch_size: cases drawn at once at most.
        label: of the progress bar.
        precision: "float32", or "bfloat16" for matrix products and convolutions in bfloat16, all else in float32.
        regions: where subjects are shown: in their "boxes"; in the "masks" of the true render; or, from the fifth step
            on, where the text's attention is: "auto_layout".

    Raises:
        RequestError: unknown regions.
    """
    if regions not in ("boxes", "masks", "auto_layout"):
        raise RequestError(f'regions must be "boxes", "masks" or "auto_layout", got {regions!r}')

    def make(cases: Sequence[WorldCase]) -> list[Image.Image]:
        from tqdm import tqdm

        pictures: dict[int, Image.Image] = {}
        with tqdm(total=len(cases), desc=label, unit="picture") as bar:
            for batch in _batches(cases, batch_size):
                drawn = _draw(
                    [cases[index] for index in batch], model, scale, steps, guidance_scale, precision, regions
                )
                pictures.update(zip(batch, drawn, strict=True))
                bar.update(len(batch))
        return [pictures[index] for index in range(len(cases))]

    return make


def picture_side(model: MSDiffusion) -> int:
    """Side in pixels of the pictures that the base model was made for."""
    return model.backbone.unet.config.sample_size * model.backbone.latent_factor


def _batches(cases: Sequence[WorldCase], batch_size: int) -> list[list[int]]:
    """Indices of the cases in batches of one number of subjects."""
    by_count: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        by_count.setdefault(len(case.subjects), []).append(index)
    return [
        indices[first : first + batch_size]
        for _, indices in sorted(by_count.items())
        for first in range(0, len(indices), batch_size)
    ]


def _draw(
    cases: Sequence[WorldCase],
    model: MSDiffusion,
    scale: float,
    steps: int,
    guidance_scale: float,
    precision: str,
    regions: str,
) -> list[Image.Image]:
    """One batch of the denoiser with another prompt, layout and seed for every picture."""
    import torch

    from msdiffusion.request.request import check_request

    requests = [
        check_request(
            case.references,
            case.boxes,
            case.prompt,
            case.phrases,
            masks=list(case.masks) if regions == "masks" else None,
            scale=scale,
            steps=steps,
            guidance_scale=guidance_scale,
            auto_layout=regions == "auto_layout",
            seed=case.seed,
        )
        for case in cases
    ]
    with torch.autocast(model.adapter.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="these weights ")  # what they can't do is measured on purpose
            results = model.generate_batch(requests, progress=False, batch_size=len(requests))
    return [result.pictures[0] for result in results]


def write_results(
    out: Path,
    cases: Sequence[WorldCase],
    report: Mapping[str, Any],
    pictures: Mapping[str, Sequence[Image.Image]],
    judge: Judge,
    *,
    title: str,
    introduction: str,
    facts: Mapping[str, Any],
    links: Mapping[str, str] | None = None,
) -> None:
    """Leaves scores.json, grid.png, index.html and pictures/CONDITION/NUMBER.png in `out`; prints the summary.

    Args:
        out: folder, made if need be; files of these names are replaced.
        cases, report, pictures: from `evaluate_world`.
        judge: marks the pictures of the grid.
        title, introduction: of the page.
        facts: what else scores.json and the page tell: command, files, settings, times.
        links: label to address of further pages beside this one.
    """
    from msdiffusion.evaluation.report import GridRow, draw_grid, summarize, write_page
    from msdiffusion.evaluation.world import read_pictures

    out.mkdir(parents=True, exist_ok=True)
    scores = {**{key: report[key] for key in report if key != "questions"}, **facts, "questions": report["questions"]}
    with written(out / "scores.json") as file:
        file.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    for condition, made in pictures.items():
        folder = out / "pictures" / condition
        folder.mkdir(parents=True, exist_ok=True)
        for index, picture in enumerate(made):
            with written(folder / f"{index:04d}.png") as file:
                picture.save(file)
    chosen = varied(cases, GRID_CASES)
    columns = [cases[index] for index in chosen]
    rows = []
    for condition, made in pictures.items():
        shown_pictures = [made[index] for index in chosen]
        readings = read_pictures(judge, columns, shown_pictures)
        rows.append(GridRow(condition.replace("_", " "), shown_pictures, readings))
    grid = draw_grid(columns, rows)
    with written(out / "grid.png") as file:
        grid.save(file, optimize=True)
    with written(out / "index.html") as file:
        write_page(
            file,
            title=title,
            introduction=introduction,
            scores=report,
            pictures=[
                ("Pictures: what the judge reads is green where it is right, of a colour either of its two", grid)
            ],
            details={label: value if isinstance(value, str) else json.dumps(value) for label, value in facts.items()},
            links=links or {},
        )
    print(summarize(report))
    for name in ("index.html", "grid.png", "scores.json"):
        print(visible(shown(out / name)))


def varied(cases: Sequence[WorldCase], count: int) -> list[int]:
    """Indices of up to `count` cases, as evenly over the numbers of subjects as there are cases, in their order."""
    by_size: dict[int, list[int]] = {}
    for index, case in enumerate(cases):
        by_size.setdefault(len(case.subjects), []).append(index)
    chosen: list[int] = []
    while len(chosen) < min(count, len(cases)):
        for queue in by_size.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return sorted(chosen, key=lambda index: (len(cases[index].subjects), index))


def command_line() -> str:
    """The command that is running, as one would type it."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def describe_file(path: Path) -> dict[str, str]:
    """Path and sha256 of a file; no sum where it isn't a local file (a hub name)."""
    if not path.is_file():
        return {"path": shown(path.parent)}
    return {"path": shown(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("msdiffusion", "torch", "diffusers", "transformers")}


def _given(value: float | None, default: float) -> float:
    return float(default if value is None else value)
