"""The page of the world benchmark: table with intervals, who differs from MS-Diffusion, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.picture_formats import open_listed
from msdiffusion.bench.rows import REFERENCE_ROW, ROWS
from msdiffusion.bench.units import Settings, Unit
from msdiffusion.evaluation.drawing import varied
from msdiffusion.evaluation.measures import MEASURES, compare_measures, groups_of, summarize_measures
from msdiffusion.evaluation.report import GridRow, draw_grid
from msdiffusion.evaluation.world import WorldCase, draw_cases
from msdiffusion.files import written

Finished = Mapping[str, Sequence[Mapping[str, Any]]]
GRID_CASES = 7
NOT_RIVALS = ("true_renders", "shipped")
"""Rows that are no methods on equal terms."""


def write_document(path: Path, out: Path, settings: Settings, finished: Finished, command: str) -> None:
    """Writes the page, and its grid of pictures as pictures/NAME.jpg beside it.

    Args:
        path: of the Markdown file.
        out: folder of the benchmark, for the drawn pictures.
        settings: of the run.
        finished: row to the records of its training seeds.
        command: what was typed.
    """
    cases = draw_cases(pictures=settings.pictures, seed=settings.seed)
    values = {row: stacked_values(records) for row, records in finished.items()}
    picture = path.parent / "pictures" / f"{path.stem}.jpg"
    with written(picture) as partial:
        grid(cases, finished, out).save(partial, quality=88, optimize=True)
    page = [
        "# The world benchmark",
        "",
        "<!-- written by `msdiffusion bench world`; edits are lost -->",
        "",
        "MS-Diffusion, its ablations and its rivals on equal terms: the same frozen base and image encoder, the same "
        "mined pairs, the same number of training steps, the same held-out subjects, boxes and noise. What is measured "
        "and how: [evaluation.md](evaluation.md).",
        "",
        "```bash",
        command,
        "```",
        "",
        *facts(settings, finished, cases),
        "",
        *table(cases, values),
        "",
        *legend(finished, out),
        "",
        *comparisons(cases, values),
        "",
        "## Pictures",
        "Held-out subjects; columns are cases, rows are methods.",
        "",
        f"![Grid of the world benchmark](pictures/{picture.name})",
        "",
        *sizes(cases, values),
    ]
    with written(path) as partial:
        partial.write_text("\n".join(page) + "\n", encoding="utf-8")


def stacked_values(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Measure to its values, (training seeds, subjects or pictures); NaN where it doesn't apply."""
    return {
        name: np.stack([np.array(record["values"][name], dtype=np.float64) for record in records]) for name in MEASURES
    }


def facts(settings: Settings, finished: Finished, cases: Sequence[WorldCase]) -> list[str]:
    """What one must know to read the table."""
    seeds = sorted({record["training_seed"] for records in finished.values() for record in records})
    subjects = sum(len(case.subjects) for case in cases)
    several = (
        f"Means over {len(seeds)} training seeds ({', '.join(map(str, seeds))}); intervals are 95 %, bootstrapped over "
        "seeds and pictures."
        if len(seeds) > 1
        else f"One training seed ({seeds[0]}): the intervals are 95 %, bootstrapped over pictures; how much another "
        "training would differ they do not tell."
    )
    devices = sorted({record["device"] for records in finished.values() for record in records})
    return [
        f"{len(cases)} pictures with {subjects} held-out subjects (seed {settings.seed}); every trained row saw "
        f"{settings.steps} steps of {settings.train_batch} pairs = {settings.steps * settings.train_batch:,}. "
        f"{several} Drawn on: {'; '.join(devices)}.",
        "",
        "Learning rate, schedule and loss weights are those of `configs/msd.yaml`, chosen for MS-Diffusion; nothing "
        "was tuned for any other row. References of `reference equals target` come from the target's JPEG, all others "
        "from lossless cut-outs.",
    ]


def table(cases: Sequence[WorldCase], values: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """The Markdown table: a line per row, a column per measure."""
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    heads = [f"{measure.title}{arrows[measure.better]}" for measure in MEASURES.values()]
    rows = {}
    for row, measured in values.items():
        summary = summarize_measures(cases, measured)
        rows[ROWS[row].title] = [_cell(summary[name]) for name in MEASURES]
    return markdown_table(heads, rows)


def markdown_table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a table: a first column without a head for the keys of `rows`, then their cells under `heads`."""
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    return lines + [f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items()]


def _cell(summary: Mapping[str, Any]) -> str:
    if summary["mean"] is None:
        return ""
    return f"{_short(summary['mean'])} <small>[{_short(summary['low'])}, {_short(summary['high'])}]</small>"


def _short(value: float) -> str:
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def legend(finished: Finished, out: Path) -> list[str]:
    """What rows and columns mean, and how large the trained adapters are."""
    rows = []
    for row, records in finished.items():
        weights = Unit(row, records[0]["training_seed"]).folder(out) / "adapter" / "adapter.safetensors"
        size = f" {count_parameters(weights) / 1e6:.1f} M parameters." if weights.is_file() else ""
        rows.append(f"- {ROWS[row].title.strip('*')}: {ROWS[row].meaning}.{size}")
    columns = [f"- {measure.title} (per {measure.per}): {measure.meaning}." for measure in MEASURES.values()]
    return ["Rows:", "", *rows, "", "Columns:", "", *columns]


def count_parameters(weights: Path) -> int:
    """Numbers in a safetensors file; only its header is read."""
    from safetensors import safe_open

    with safe_open(weights, "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def comparisons(cases: Sequence[WorldCase], values: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Where MS-Diffusion wins, ties and loses against each rival on the same cases; nothing without its row."""
    if REFERENCE_ROW not in values:
        return []
    single = len(values[REFERENCE_ROW]["category"]) == 1
    lines = [
        "## Where it wins, and where it does not",
        "In brackets: MS-Diffusion minus the row, on the same cases. A difference counts where its 95 % interval "
        f"leaves out zero; {len(MEASURES)} columns are looked at for each row, so a few may be luck"
        + (", and with one training per row the luck of a training is not in the intervals." if single else "."),
        "",
    ]
    rows: dict[str, list[str]] = {}
    lost: dict[str, list[str]] = {}
    alike: list[str] = []
    for row, measured in values.items():
        if row == REFERENCE_ROW or row in NOT_RIVALS:
            continue
        differences = compare_measures(cases, measured, values[REFERENCE_ROW])
        better, worse = [], []
        for name, found in differences.items():
            sign = MEASURES[name].better
            if sign and (found["low"] > 0 or found["high"] < 0):
                text = f"{MEASURES[name].title} ({-found['difference']:+.2f})"
                (worse if found["difference"] * sign > 0 else better).append(text)
                if found["difference"] * sign > 0:
                    lost.setdefault(MEASURES[name].title, []).append(ROWS[row].title.strip("*"))
        rows[ROWS[row].title] = [", ".join(better) or "nowhere", ", ".join(worse) or "nowhere"]
        if not better and not worse:
            alike.append(ROWS[row].title.strip("*"))
    lines += [*markdown_table(["MS-Diffusion is better", "MS-Diffusion is worse"], rows), ""]
    if lost:
        told = "; ".join(f"in {measure} it loses to: {', '.join(winners)}" for measure, winners in lost.items())
        lines.append(f"MS-Diffusion does **not** win everywhere: {told}.")
    else:
        lines.append("No row is better than MS-Diffusion in any column beyond its interval.")
    if alike:
        lines += [
            "",
            f"MS-Diffusion can not be told from: {'; '.join(alike)}. Whatever it should gain there, it does not show.",
        ]
    return lines


def sizes(cases: Sequence[WorldCase], values: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Means for one, two and three subjects in a picture."""
    chosen = ("category", "body_color", "pattern", "layout", "retrieval", "product")
    counts = np.array([len(case.subjects) for case in cases])
    present = np.unique(counts)
    sizes_of = {name: counts[groups_of(cases, name)] for name in chosen}
    rows = {
        ROWS[row].title: [
            " / ".join(_short(float(np.nanmean(measured[name][:, sizes_of[name] == size]))) for size in present)
            for name in chosen
        ]
        for row, measured in values.items()
    }
    told = f"Means for pictures with {', '.join(map(str, present))} subjects."
    return ["## By number of subjects", told, "", *markdown_table([MEASURES[name].title for name in chosen], rows)]


def grid(cases: Sequence[WorldCase], finished: Finished, out: Path) -> Image.Image:
    """References, boxes, and what each row drew (its first training seed)."""
    chosen = varied(cases, GRID_CASES)
    rows = []
    for row, records in finished.items():
        folder = Unit(row, records[0]["training_seed"]).folder(out) / "pictures"
        pictures = [open_listed(folder / f"{index:04d}.png").convert("RGB") for index in chosen]
        rows.append(GridRow(ROWS[row].title.strip("*"), pictures))
    return draw_grid([cases[index] for index in chosen], rows)
