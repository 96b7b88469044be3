"""What an evaluation leaves: scores, pictures and a page, and what they were made with."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdiffusion.evaluation.drawing import varied
from msdiffusion.files import file_sha256, written
from msdiffusion.places import shown

if TYPE_CHECKING:
    from PIL import Image

    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.world import PictureMaker, WorldCase


GRID_CASES = 12


def evaluate(
    out: Path,
    cases: Sequence[WorldCase],
    makers: Mapping[str, PictureMaker],
    judge: Judge,
    *,
    pairs: Sequence[tuple[str, str]],
    title: str,
    introduction: str,
    facts: Mapping[str, Any],
    started: float,
    links: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Draws and scores; leaves scores.json, grid.png, index.html and pictures/CONDITION/NUMBER.png.

    Args:
        out: folder, made if need be; files of these names are replaced.
        cases, makers, pairs: as for `evaluate_world`.
        judge: reads the pictures, and marks those of the grid.
        title, introduction: of the page.
        facts: what else scores.json and the page tell: command, files, settings; times and versions are added.
        started: `time.monotonic()` of the beginning.
        links: label to address of further pages beside this one.

    Returns:
        the scores, see `evaluate_world`.
    """
    from msdiffusion.evaluation.report import GridRow, draw_grid, write_page
    from msdiffusion.evaluation.world import evaluate_world, read_pictures

    report, pictures = evaluate_world(cases, makers, judge, pairs=pairs)
    facts = {**facts, "seconds": round(time.monotonic() - started, 1), "versions": versions()}
    scores = {**{key: report[key] for key in report if key != "questions"}, **facts, "questions": report["questions"]}
    with written(out / "scores.json") as file:
        file.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    for condition, made in pictures.items():
        save_pictures(made, out / "pictures" / condition)
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
    return report


def save_pictures(pictures: Sequence[Image.Image], folder: Path) -> None:
    """Writes 0000.png, 0001.png, ... into a folder, which is made if need be."""
    for index, picture in enumerate(pictures):
        with written(folder / f"{index:04d}.png") as file:
            picture.save(file)


def command_line() -> str:
    """The command that is running, as one would type it."""
    arguments = [shown(part) if Path(part).is_absolute() else part for part in sys.argv[1:]]
    return shlex.join([Path(sys.argv[0]).name, *arguments])


def describe_file(path: Path) -> dict[str, str]:
    """Path and sha256 of a file; no sum where it isn't a local file (a hub name)."""
    if not path.is_file():
        return {"path": shown(path.parent)}
    return {"path": shown(path), "sha256": file_sha256(path)}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("msdiffusion", "torch", "diffusers", "transformers")}


def device() -> str:
    """What computes here, in words."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
