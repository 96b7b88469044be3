"""What a run has logged, as one table and one picture: ``metrics.csv`` and ``curves.png`` in the run's directory.

    python -m msdiffusion.training.curves runs/msd                    # draws runs/msd/curves.png anew
    python -m msdiffusion.training.curves runs/msd runs/other --out both.png

The table holds one number per line, ``step,name,value``, so that what a run logs may change. A resumed run goes on with
the same file: lines after the step that it starts from, which a killed run has left, go.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msdiffusion.errors import DataError
from msdiffusion.files import written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE, PICTURE = "metrics.csv", "curves.png"
HEADER = ("step", "name", "value")
SMOOTHING = 20
"""Logged points over which the training loss is averaged."""

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Name to its points (step, value), in the order of the steps."""


def read_curves(path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The numbers of a table. A last line that a killed run has left unfinished is left out.

    Raises:
        DataError: there is no such file, or it is no such table.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, name, value in _lines(Path(path)):
        curves.setdefault(name, []).append((step, value))
    return {name: sorted(points) for name, points in sorted(curves.items())}


def keep_until(path: Path, step: int, lines: int | None = None) -> int:
    """Leave out of a table what a run has written after the state that it goes on from; nothing where there is none.

    Args:
        step: of that state.
        lines: that it had then; None, or more than it has: not known, then all lines up to the step are kept.

    Returns:
        Number of lines that are kept.

    Raises:
        DataError: it is no such table.
    """
    if not path.exists():
        return 0
    present = _lines(path)
    known = lines is not None and lines <= len(present)
    kept = present[:lines] if known else [line for line in present if line[0] <= step]
    with written(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        writer.writerows((at, name, repr(value)) for at, name, value in kept)
    return len(kept)


def _lines(path: Path) -> list[tuple[int, str, float]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist: is it the folder of a run with the callback RunCurves?")
    text = path.read_text(encoding="utf-8")
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not rows or tuple(rows[0]) != HEADER:
        raise DataError(f"{path} is no table of a run: its first line must be {','.join(HEADER)}")
    lines = []
    for number, row in enumerate(rows[1:], start=2):
        try:
            step, name, value = row
            lines.append((int(step), name, float(value)))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {row} is no step, name and value") from error
    return lines


def draw_curves(runs: Mapping[str, Curves], out: str | Path) -> None:
    """Draw runs into one picture: losses, error by timestep, scores, learning rate, waiting, and what else there is.

    Args:
        runs: label to what a run has logged; one run may have the label "".

    Raises:
        DataError: no run has logged anything.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for curves in runs.values() for name in curves})
    panels = [(title, chosen) for title, chosen in _panels(names) if chosen]
    if not panels:
        raise DataError("there is nothing to draw: no run has logged a number yet")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = 5.2 * columns, 3.4 * rows  # inches
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    # a layout that adapts itself draws everything twice, after every validation
    figure.subplots_adjust(0.6 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.3 / height, wspace=0.2, hspace=0.36)
    for place, (title, chosen) in zip(places, panels, strict=False):
        _panel(place, title, chosen, runs)
    for place in places[len(panels) :]:
        place.axis("off")
    with written(Path(out)) as partial:
        figure.savefig(partial, format="png", dpi=90)


def _panels(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Title and names of each picture, in their order."""

    def are(*starts: str) -> list[str]:
        return [name for name in names if name.startswith(starts)]

    per_timestep = are("validation/loss_t")
    scores = are("validation/score")
    speed = are("training/waiting_share")
    rates = are("training/learning_rate")
    losses = [name for name in names if name.endswith(("/loss", "/loss_in_boxes"))]
    rest = set(names) - {*losses, *per_timestep, *scores, *speed, *rates}
    return [
        ("loss", losses),
        ("validation error by timestep", per_timestep),
        ("scores of validation pictures", scores),
        ("learning rate", rates),
        ("share of time waiting for the loader", speed),
        *((name, [name]) for name in sorted(rest)),
    ]


def _panel(place: Axes, title: str, names: Sequence[str], runs: Mapping[str, Curves]) -> None:
    for label, curves in runs.items():
        for name in names:
            points = curves.get(name, ())
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            text = " ".join(part for part in (label, name if len(names) > 1 else "") if part) or None
            if name == "training/loss" and len(values) > SMOOTHING:
                place.plot(steps, smoothed(values, SMOOTHING), label=f"{text or name} (mean of {SMOOTHING})")
            else:
                place.plot(steps, values, marker="." if len(values) < 30 else "", label=text)
    place.set_title(title, fontsize=10)
    place.set_xlabel("step", fontsize=8)
    place.tick_params(labelsize=8)
    place.grid(alpha=0.3)
    if place.get_legend_handles_labels()[1]:
        place.legend(fontsize=7)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the ``window - 1`` before it, of fewer at the beginning."""
    parts = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [math.fsum(part) / len(part) for part in parts]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the curves of runs; returns the exit status."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m msdiffusion.training.curves", description="Curves of runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, each with its metrics.csv")
    parser.add_argument("--out", type=Path, help=f"default: {PICTURE} in the first run's folder")
    options = parser.parse_args(arguments)
    out = options.runs[0] / PICTURE if options.out is None else options.out
    try:
        labels = ["" if len(options.runs) == 1 else str(run) for run in options.runs]
        draw_curves({label: read_curves(run / TABLE) for label, run in zip(labels, options.runs, strict=True)}, out)
    except DataError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
