"""`msdiffusion bench explore` on the miniature stack: every experiment leaves its table, curve and pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.world import COLORS
from msdiffusion.bench import explore
from msdiffusion.cli import main
from msdiffusion.request.layout import check_box

TINY = Path(__file__).parents[3] / "checkpoints" / "tiny"


def test_strange_boxes_can_be_asked_for():
    for box in explore.STRANGE_BOXES.values():
        check_box(box, "box")  # raises for a box that `generate` refuses


def test_page_curves_and_pictures(tmp_path, tiny_model_dir, monkeypatch):
    model, page = tmp_path / "model", tmp_path / "docs" / "exploration.md"
    shutil.copytree(tiny_model_dir, model)
    for name in ("judge", "locator", "recognizer"):
        shutil.copytree(TINY / name, model / name)
    monkeypatch.setattr(explore, "SCALES", (0.0, 1.2))
    monkeypatch.setattr(explore, "SHIFTS", (1.0, 0.5))
    monkeypatch.setattr(explore, "STRANGE_BOXES", {"tiny": explore.STRANGE_BOXES["tiny"]})
    prompts = []
    from msdiffusion.evaluation import drawing

    original = drawing._draw

    def remembered(cases, *rest, **more):
        prompts.extend(cases)
        return original(cases, *rest, **more)

    monkeypatch.setattr(drawing, "_draw", remembered)
    arguments = ["--model", str(model), "--out", str(tmp_path / "out"), "--document", str(page), "--pictures", "2"]
    assert main(["bench", "explore", *arguments]) == 0
    points = json.loads((tmp_path / "out" / "points.json").read_text())
    assert list(points) == ["scale", "count", "overlap", "boxes", "contradiction"]
    assert [point["x"] for point in points["scale"]] == [0.0, 1.2]
    assert [point["x"] for point in points["count"]] == [1, 2, 3, 4]
    text = page.read_text()
    for name in points:
        assert f"pictures/exploration_{name}.png" in text
        for suffix in ("png", "jpg"):
            assert Image.open(page.parent / "pictures" / f"exploration_{name}.{suffix}").width > 100
    assert "colour of the prompt" in text and "confusion" in text
    # the contradicting prompts name a colour that the subject lacks
    told = [case for case in prompts if any(f" {color} " in case.prompt for color in COLORS)]
    assert told
    for case in told:
        colors = {case.subjects[0].main_color, case.subjects[0].second_color, case.subjects[0].accent_color}
        assert not any(f" {color} " in case.prompt for color in colors)


def test_overlapping_boxes_keep_subjects_and_noise(monkeypatch):
    class Studio:
        scale = 1.0

        def point(self, x, label, cases, scale=None):
            measured = {"confusion": np.zeros(1)}
            return explore.Point(x, label, cases, [], measured, measured)

    points, _, extra = explore.explore_overlap(Studio(), 3, 0)
    assert [point.x for point in points] == [0.0, 0.25, 0.5, 0.75]
    for point in points[1:]:
        for case, first in zip(point.cases, points[0].cases, strict=True):
            assert (case.subjects, case.seed) == (first.subjects, first.seed)
        width = point.cases[0].boxes[0][2] - point.cases[0].boxes[1][0]
        assert width == pytest.approx(point.x * explore.SIDE)
    assert extra["confusion"] == [0.0] * 4
