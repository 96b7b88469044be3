"""`msdiffusion bench explore`: where the table doesn't look. Curves, pictures and a page, from the shipped adapter.

Five questions: how strong should the adapter be, how many subjects can it hold, what if boxes overlap, what of boxes
that no training showed, and who wins when prompt and reference contradict each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.safe_text import visible
from data_pipeline.world import COLORS
from msdiffusion.backbone.backbone import quiet_loading
from msdiffusion.bench.document import markdown_table
from msdiffusion.evaluation.drawing import picture_maker
from msdiffusion.evaluation.measures import MEASURES, Gallery, Instruments, measure_pictures, summarize_measures
from msdiffusion.evaluation.results import command_line, device
from msdiffusion.evaluation.world import WorldCase, accepted_answers, draw_case, draw_cases, read_pictures
from msdiffusion.figures import INK, PAPER, color_of, enlarge, outline
from msdiffusion.files import file_sha256, write_json, written
from msdiffusion.generation.generate import MSDiffusion
from msdiffusion.places import shown

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
COUNTS = (1, 2, 3, 4)
SHIFTS = (1.0, 0.75, 0.5, 0.25)
"""Distance of the centres of two equal boxes, in their sides: 1 is side by side, 0.25 nearly the same place."""
SIDE = 0.45
"""Side of those two boxes."""
STRANGE_BOXES: Mapping[str, tuple[float, float, float, float]] = {
    "tiny": (0.42, 0.55, 0.58, 0.71),
    "whole picture": (0.02, 0.02, 0.98, 0.98),
    "tall and thin": (0.40, 0.05, 0.60, 0.95),
    "wide and flat": (0.05, 0.42, 0.95, 0.62),
    "in the sky": (0.30, 0.00, 0.70, 0.40),
    "lower corner": (0.62, 0.62, 1.00, 1.00),
}
CURVES = ("category", "color", "pattern", "layout", "retrieval", "background")
SHOWN = 6
"""Cases in a strip of pictures."""
CELL = 128


@dataclass(frozen=True)
class Point:
    """One setting of an experiment: its place on the axis, its name, its cases, and what was measured."""

    x: float
    label: str
    cases: list[WorldCase]
    pictures: list[Image.Image]
    measured: dict[str, np.ndarray]
    ceiling: dict[str, np.ndarray]
    """The same measures on the true renders: what the instruments themselves can see."""


@dataclass(frozen=True)
class Studio:
    """Draws and measures cases."""

    model: MSDiffusion
    instruments: Instruments
    gallery: Gallery
    draw_batch: int
    precision: str

    def point(self, x: float, label: str, cases: list[WorldCase], scale: float | None = None) -> Point:
        """Draws cases and measures them; with the adapter's defaults but, where it is given, another scale."""
        batches = {"batch_size": self.draw_batch, "precision": self.precision}
        pictures = picture_maker(self.model, scale=scale, label=label, **batches)(cases)
        truth = [case.truth for case in cases]
        measured, ceiling = (
            measure_pictures(cases, made, self.instruments, self.gallery) for made in (pictures, truth)
        )
        return Point(x, label, cases, pictures, measured, ceiling)


def run(options: argparse.Namespace) -> None:
    """All experiments; leaves points.json, the page, and its pictures.

    Raises:
        WeightsError: the model or an instrument can't be loaded.
    """
    quiet_loading()
    instruments = Instruments.from_pretrained(options.model)
    studio = Studio(
        MSDiffusion.from_pretrained(options.model),
        instruments,
        Gallery(instruments.recognizer),
        options.draw_batch,
        options.precision,
    )
    document = (options.document or options.out / "exploration.md").resolve()
    pictures = document.parent / "pictures"
    page = [
        "# Exploring the embedded default",
        "",
        "<!-- written by `msdiffusion bench explore`; edits are lost -->",
        "",
        f"What the adapter of `{shown(options.model)}` does outside the conditions of [the table](world_benchmark.md). "
        "Held-out subjects; bars are 95 % intervals over pictures. In the tables: drawn / true renders, which say what "
        "judge, locator and recognizer can see at all.",
        "",
        "```bash",
        command_line(),
        "```",
        "",
        f"{device()}; adapter `{file_sha256(options.model / 'adapter.safetensors')[:12]}`, seed "
        f"{options.seed}, {options.pictures} pictures per point.",
    ]
    record: dict[str, Any] = {}
    for name, experiment in EXPERIMENTS.items():
        points, text, extra = experiment(studio, options.pictures, options.seed)
        record[name] = [describe(point) for point in points]
        write_json(options.out / "points.json", record)
        with written(pictures / f"exploration_{name}.png") as partial:
            plot(points, partial, extra)
        with written(pictures / f"exploration_{name}.jpg") as partial:
            strip(points).save(partial, quality=88, optimize=True)
        page += [
            "",
            f"## {text[0]}",
            text[1],
            "",
            *point_table(points, extra),
            "",
            f"![Curves: {text[0]}](pictures/exploration_{name}.png)",
            "",
            f"![Pictures: {text[0]}](pictures/exploration_{name}.jpg)",
        ]
    with written(document) as partial:
        partial.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(visible(shown(document)))


Extra = dict[str, list[float]]
"""Further curves of an experiment: name to one value per point."""
Explored = tuple[list[Point], tuple[str, str], Extra]
"""Points of an experiment; title and text of its section; further curves."""


def explore_scale(studio: Studio, count: int, seed: int) -> Explored:
    """One scale after another on the same cases."""
    cases = draw_cases(pictures=count, seed=seed + 10)
    points = [studio.point(scale, f"scale {scale:g}", cases, scale) for scale in SCALES]
    text = (
        "How strong",
        "The scale weighs the subjects against the text. 0 is the bare base; identity rises with the scale, and the "
        "background says what the text loses.",
    )
    return points, text, {}


def explore_count(studio: Studio, count: int, seed: int) -> Explored:
    """One to four subjects; training showed up to three."""
    points = []
    for number in COUNTS:
        rng = np.random.default_rng([seed, 11, number])
        cases = [draw_case(rng, number) for _ in range(count)]
        points.append(studio.point(number, f"{number} subject{'s' if number > 1 else ''}", cases))
    text = ("How many", "One to four subjects. Neither base nor adapter has seen four in training.")
    return points, text, {}


def explore_overlap(studio: Studio, count: int, seed: int) -> Explored:
    """Two equal boxes that move into each other."""
    points = []
    for shift in SHIFTS:
        left = 0.5 - SIDE * (1 + shift) / 2
        boxes = [(left + SIDE * shift * k, 0.35, left + SIDE * (1 + shift * k), 0.35 + SIDE) for k in (0, 1)]
        rng = np.random.default_rng([seed, 12])  # the same subjects and noise at every distance
        cases = [draw_case(rng, 2, boxes=boxes) for _ in range(count)]
        points.append(studio.point(1 - shift, f"{1 - shift:.0%} of the side", cases))
    text = (
        "Boxes that overlap",
        f"Two boxes of side {SIDE} are pushed into each other; subjects and noise stay. In the overlap patches read "
        "both subjects; the method has no notion of who is in front. Confusion: the box shows the other one's main "
        "colour. The locator reports one box where two overlap by more than .4, so its ceiling falls.",
    )
    return points, text, {"confusion": [float(np.nanmean(point.measured["confusion"])) for point in points]}


def explore_boxes(studio: Studio, count: int, seed: int) -> Explored:
    """Boxes far from anything that training showed."""
    points = []
    for place, (label, box) in enumerate(STRANGE_BOXES.items()):
        rng = np.random.default_rng([seed, 13])
        cases = [draw_case(rng, 1, boxes=[box]) for _ in range(count)]
        points.append(studio.point(place, label, cases))
    text = (
        "Boxes nobody trained on",
        "A single subject in training has a long side of .50 to .76 of the picture, and a shape of its own.",
    )
    return points, text, {}


def explore_contradiction(studio: Studio, count: int, seed: int) -> Explored:
    """The prompt names a colour that the reference doesn't have: "a purple dog" with a green one."""
    rng = np.random.default_rng([seed, 14])
    cases, named = [], []
    while len(cases) < count:
        case = draw_case(rng, 1)
        subject = case.subjects[0]
        others = [c for c in COLORS if c not in (subject.main_color, subject.second_color, subject.accent_color)]
        color = others[int(rng.integers(len(others)))]
        rest = case.prompt.split(" ", 1)[1]  # without its article
        cases.append(replace(case, prompt=f"{'an' if color[0] in 'aeiou' else 'a'} {color} {rest}"))
        named.append(color)
    points = [studio.point(scale, f"scale {scale:g}", cases, scale) for scale in SCALES]
    extra: Extra = {"colour of the prompt": [], "colour of the reference": []}
    for point in points:
        colors = read_pictures(studio.instruments.judge, cases, point.pictures).color
        extra["colour of the prompt"].append(float(np.mean([c == n for c, n in zip(colors, named, strict=True)])))
        own = [accepted_answers(case.subjects[0])["body_color"] for case in cases]
        extra["colour of the reference"].append(float(np.mean([c in o for c, o in zip(colors, own, strict=True)])))
    text = (
        "When the prompt contradicts the reference",
        'The prompt names a colour that the reference does not have ("a purple dog" with a green one). The curves say '
        "whose colour the judge sees in the box (of the reference: its body colour); the rest shows neither.",
    )
    return points, text, extra


EXPERIMENTS: Mapping[str, Callable[[Studio, int, int], Explored]] = {
    "scale": explore_scale,
    "count": explore_count,
    "overlap": explore_overlap,
    "boxes": explore_boxes,
    "contradiction": explore_contradiction,
}


def describe(point: Point) -> dict[str, Any]:
    """A point as plain numbers."""
    return {"x": point.x, "label": point.label, "measures": summarize_measures(point.cases, point.measured)}


def point_table(points: Sequence[Point], extra: Extra) -> list[str]:
    """Means per point as Markdown."""
    heads = [MEASURES[name].title for name in CURVES] + list(extra)
    rows = {}
    for index, point in enumerate(points):
        means = [(np.nanmean(point.measured[name]), np.nanmean(point.ceiling[name])) for name in CURVES]
        cells = [f"{drawn:.2f} / {true:.2f}" for drawn, true in means]
        rows[point.label] = cells + [f"{curve[index]:.2f}" for curve in extra.values()]
    return markdown_table(heads, rows)


def plot(points: Sequence[Point], path: Path, extra: Extra) -> None:
    """Curves with intervals; further curves dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    xs = [point.x for point in points]
    summaries = [describe(point)["measures"] for point in points]
    for name in CURVES:
        means = [summary[name]["mean"] for summary in summaries]
        low = [max(0.0, summary[name]["mean"] - summary[name]["low"]) for summary in summaries]
        high = [max(0.0, summary[name]["high"] - summary[name]["mean"]) for summary in summaries]
        axes.errorbar(xs, means, yerr=[low, high], label=MEASURES[name].title, capsize=2, marker="o", markersize=3)
    for name, curve in extra.items():
        axes.plot(xs, curve, "--", linewidth=2, label=name)
    axes.set_xticks(xs, [point.label for point in points], rotation=20, fontsize=8)
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def strip(points: Sequence[Point]) -> Image.Image:
    """A row per point: its label, then for the first cases the boxes drawn over what came out; references on top."""
    label_width, gap = 150, 6
    shared = all(point.cases is points[0].cases for point in points)
    tops = 1 if shared else 0
    cell_height = CELL + (0 if shared else CELL // 2)
    size = (label_width + SHOWN * (CELL + gap), tops * (CELL + gap) + len(points) * (cell_height + gap))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)

    def paste_references(case: WorldCase, left: int, top: int, room: int) -> None:
        share = CELL // len(case.references)
        for index, reference in enumerate(case.references):
            view = reference.convert("RGBA")
            view.thumbnail((share - 4, room - 8))
            sheet.paste(view, (left + index * share + 2, top + (room - view.height) // 2), view)
            bar = (left + index * share + 2, top + room - 4, left + (index + 1) * share - 2, top + room - 2)
            draw.rectangle(bar, fill=color_of(index))

    if shared:
        draw.text((6, CELL // 2), "references", fill=INK, font=ImageFont.load_default(14))
        for column, case in enumerate(points[0].cases[:SHOWN]):
            paste_references(case, label_width + column * (CELL + gap), 0, CELL)
    for row, point in enumerate(points):
        top = tops * (CELL + gap) + row * (cell_height + gap)
        draw.text((6, top + cell_height // 2), point.label, fill=INK, font=ImageFont.load_default(14))
        for column, (case, picture) in enumerate(zip(point.cases[:SHOWN], point.pictures[:SHOWN], strict=True)):
            left, below = label_width + column * (CELL + gap), top
            if not shared:
                paste_references(case, left, top, CELL // 2)
                below = top + CELL // 2
            cell = enlarge(picture, CELL)
            outline(cell, case.boxes)
            sheet.paste(cell, (left, below))
    return sheet
