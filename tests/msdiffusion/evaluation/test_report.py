"""Grids and pages: every case is there, the page needs no other file, marks have the right colour."""

import re

import numpy as np
import pytest
from PIL import Image, ImageColor

from msdiffusion.errors import DataError
from msdiffusion.evaluation import report, world

PAIR = [("adapter_on", "adapter_off")]


@pytest.fixture(scope="module")
def cases():
    return world.draw_cases(5, seed=2, size=32, shares=(0.0, 1.0))


@pytest.fixture(scope="module")
def readings(cases):
    subjects = [subject for case in cases for subject in case.subjects]
    right = world.Readings(
        category=tuple(subject.category for subject in subjects),
        color=tuple(subject.main_color for subject in subjects),
        pattern=tuple(subject.pattern for subject in subjects),
        background=tuple(case.background for case in cases),
    )
    nothing = ("nothing",) * len(subjects)
    wrong = world.Readings(nothing, nothing, nothing, ("nowhere",) * len(cases))
    return {"adapter_on": right, "adapter_off": wrong}


@pytest.fixture(scope="module")
def scored(cases, readings):
    questions = world.score_readings(cases, readings, pairs=PAIR)
    return {"subjects": 6, "pictures": len(cases), "questions": questions}


def has_color(picture, color):
    return bool((np.asarray(picture) == ImageColor.getrgb(color)).all(-1).any())


def test_grid_has_one_column_per_case_and_marks_answers(cases, readings):
    pictures = [case.truth for case in cases]
    good = report.draw_grid(cases, [report.GridRow("on", pictures, readings["adapter_on"])])
    bad = report.draw_grid(cases, [report.GridRow("off", pictures, readings["adapter_off"])])
    plain = report.draw_grid(cases, [report.GridRow("true", pictures)])
    assert good.width == report.LABEL_WIDTH + len(cases) * (report.CELL + report.GAP) + report.GAP
    assert good.height > plain.height
    assert has_color(good, report.GOOD) and not has_color(good, report.BAD)
    assert has_color(bad, report.BAD) and not has_color(bad, report.GOOD)


def test_grid_guards(cases):
    with pytest.raises(DataError, match="at least one case"):
        report.draw_grid([], [])
    with pytest.raises(DataError, match=f"'on' has 1 pictures for {len(cases)} cases"):
        report.draw_grid(cases, [report.GridRow("on", [cases[0].truth])])


def test_page_is_one_file_with_the_scores(tmp_path, scored):
    path = tmp_path / "index.html"
    picture = Image.new("RGB", (4, 4))
    report.write_page(
        path,
        title="Scores <1>",
        introduction="first\n\nsecond",
        scores=scored,
        pictures=[("Grid", picture)],
        details={"command": "a & b"},
        links={"pairs": "pairs/report.html"},
    )
    page = path.read_text(encoding="utf-8")
    assert "Scores &lt;1&gt;" in page and "a &amp; b" in page and "<p>second</p>" in page
    assert "6 subjects" in page and "main colour" in page and "adapter off" in page
    assert '<a href="pairs/report.html">pairs</a>' in page
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)


def test_summary_names_every_figure(scored):
    text = report.summarize(scored)
    assert "adapter on" in text and "main colour" in text and "p = 0.0" in text
    assert len(text.splitlines()) == 2 + 5 + 5


def test_p_values_are_readable():
    assert [report.format_p(value) for value in (1.0, 0.0123456, 0.0)] == ["1", "0.0123", "< 1e-15"]
