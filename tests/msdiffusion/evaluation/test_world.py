"""The benchmark on the world: frozen cases, honest bookkeeping, and scores that answer known readings."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_pipeline.world import COLORS
from msdiffusion.errors import DataError
from msdiffusion.evaluation import world

PAIR = [("adapter_on", "adapter_off")]


class EchoJudge:
    """Reads pictures that carry their own answers: see `signed_picture`."""

    def __init__(self, answers):
        self.answers = answers

    def read(self, pictures, boxes):
        found = []
        for picture, own in zip(pictures, boxes, strict=True):
            reading = self.answers[picture.getpixel((0, 0))]
            assert len(reading.boxes) == len(own)
            found.append(reading)
        return found


@pytest.fixture(scope="module")
def cases():
    return world.draw_cases(40, seed=5, size=32)


def right_readings(cases):
    subjects = [subject for case in cases for subject in case.subjects]
    return world.Readings(
        category=tuple(subject.category for subject in subjects),
        color=tuple(subject.main_color for subject in subjects),
        pattern=tuple(subject.pattern for subject in subjects),
        background=tuple(case.background for case in cases),
    )


def with_colors(cases, colors):
    return replace(right_readings(cases), color=tuple(colors))


def test_cases_are_held_out_frozen_and_enough(cases):
    again = world.draw_cases(40, seed=5, size=32)
    assert sum(len(case.subjects) for case in cases) >= 40
    assert {len(case.subjects) for case in cases} == {1, 2, 3}
    for case, same in zip(cases, again, strict=True):
        assert (case.prompt, case.boxes, case.seed, case.subjects) == (
            same.prompt,
            same.boxes,
            same.seed,
            same.subjects,
        )
        np.testing.assert_array_equal(np.asarray(case.truth), np.asarray(same.truth))
        assert all(subject.split == "held_out" for subject in case.subjects)
        assert len(case.boxes) == len(case.references) == len(case.phrases) == len(case.subjects)
        assert all(0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 for x1, y1, x2, y2 in case.boxes)
        assert all(phrase in case.prompt for phrase in case.phrases)
        assert all(reference.mode == "RGBA" for reference in case.references)
    assert len({case.seed for case in cases}) == len(cases)
    assert world.draw_cases(40, seed=6, size=32)[0].subjects != cases[0].subjects


def test_the_prompt_gives_no_colour_away(cases):
    assert not any(color in case.prompt.split() for case in cases for color in COLORS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subjects": 0}, "got 0"),
        ({"subjects": 1, "shares": (0.5, 0.2)}, "sum to 1"),
        ({"subjects": 1, "shares": ()}, "sum to 1"),
    ],
)
def test_impossible_draws_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        world.draw_cases(**options)


def test_perfect_against_constant_colours(cases):
    count = sum(len(case.subjects) for case in cases)
    readings = {"adapter_on": right_readings(cases), "adapter_off": with_colors(cases, ["teal"] * count)}
    result = world.score_readings(cases, readings, pairs=PAIR)
    color = result["color"]
    teal = sum(subject.main_color == "teal" for case in cases for subject in case.subjects)
    assert color["conditions"]["adapter_on"]["rate"] == 1.0
    assert color["conditions"]["adapter_off"]["right"] == teal
    assert color["conditions"]["adapter_off"]["shuffled"] == pytest.approx(teal / count)
    assert color["chance"] == 1 / 11
    by_size = color["conditions"]["adapter_off"]["by_size"]
    assert set(by_size) == {"1", "2", "3"}
    single = [case.subjects[0].main_color == "teal" for case in cases if len(case.subjects) == 1]
    assert by_size["1"] == pytest.approx(np.mean(single))
    (test,) = color["tests"]
    assert (test["only_first"], test["only_second"]) == (count - teal, 0)
    assert test["p_value"] == pytest.approx(2.0 ** (1 - (count - teal)))
    assert test["low"] <= test["difference"] <= test["high"]
    assert result["category"]["tests"][0]["p_value"] == 1.0
    assert result["background"]["conditions"]["adapter_off"]["count"] == len(cases)
    json.dumps(result)


def test_body_colour_accepts_the_second_colour_of_even_patterns_only(cases):
    subjects = [subject for case in cases for subject in case.subjects]
    readings = {"second": with_colors(cases, [subject.second_color for subject in subjects])}
    result = world.score_readings(cases, readings, pairs=[])
    even = sum(subject.pattern in ("stripes", "bands", "checks") for subject in subjects)
    assert result["color"]["conditions"]["second"]["right"] == 0
    assert result["body_color"]["conditions"]["second"]["right"] == even > 0
    assert result["body_color"]["chance"] == pytest.approx((len(subjects) + even) / len(subjects) / 11)


def test_mixing_counts_colours_of_neighbours_only(cases):
    swapped = []
    for case in cases:
        colors = [subject.main_color for subject in case.subjects]
        swapped += colors[1:] + colors[:1]
    eligible = sum(
        bool({other.main_color for other in case.subjects} - {subject.main_color})
        for case in cases
        for subject in case.subjects
    )
    assert world.mixing_rate(cases, right_readings(cases)) == {"rate": 0.0, "count": eligible}
    mixed = world.mixing_rate(cases, with_colors(cases, swapped))
    assert mixed["count"] == eligible
    assert mixed["rate"] > 0.9
    single = [case for case in cases if len(case.subjects) == 1]
    assert world.mixing_rate(single, right_readings(single)) is None


def test_scoring_guards(cases):
    right = right_readings(cases)
    with pytest.raises(DataError, match="adapter_off"):
        world.score_readings(cases, {"adapter_on": right}, pairs=PAIR)
    with pytest.raises(DataError, match="no cases"):
        world.score_readings([], {"adapter_on": right}, pairs=[])
    with pytest.raises(DataError, match=f"{len(cases)} cases, 1 pictures"):
        world.read_pictures(EchoJudge({}), cases, [Image.new("RGB", (8, 8))])


def test_evaluation_reads_every_condition_and_the_true_renders():
    from msdiffusion.evaluation.instruments.judge import BoxReading, PictureReading

    (case,) = world.draw_cases(1, seed=1, size=32, shares=(1.0,))
    subject = case.subjects[0]
    right = BoxReading(subject.category, subject.main_color, subject.pattern, {})
    wrong = BoxReading(
        subject.category, next(name for name in COLORS if name != subject.main_color), subject.pattern, {}
    )
    answers = {
        (255, 0, 0): PictureReading(case.background, 1.0, (right,)),
        (0, 255, 0): PictureReading(case.background, 1.0, (wrong,)),
        case.truth.getpixel((0, 0)): PictureReading(case.background, 1.0, (right,)),
    }
    makers = {
        "adapter_on": lambda given: [Image.new("RGB", (32, 32), (255, 0, 0)) for _ in given],
        "adapter_off": lambda given: [Image.new("RGB", (32, 32), (0, 255, 0)) for _ in given],
    }
    report, pictures = world.evaluate_world([case], makers, EchoJudge(answers), pairs=PAIR)
    rates = {name: own["rate"] for name, own in report["questions"]["color"]["conditions"].items()}
    assert rates == {"adapter_on": 1.0, "adapter_off": 0.0, "true_renders": 1.0}
    assert (report["pictures"], report["subjects"], report["sets_by_size"]) == (1, 1, {"1": 1})
    assert set(pictures) == {"adapter_on", "adapter_off", "true_renders"}


def test_a_number_of_pictures_can_be_asked_for(cases):
    drawn = world.draw_cases(pictures=7, seed=5, size=32)
    assert len(drawn) == 7
    assert [case.seed for case in drawn] == [case.seed for case in cases[:7]]


@pytest.mark.parametrize("options", [{}, {"subjects": 3, "pictures": 3}])
def test_subjects_or_pictures_but_not_both(options):
    with pytest.raises(DataError, match="either subjects or pictures"):
        world.draw_cases(**options)
    with pytest.raises(DataError, match="at least 1 picture, got 0"):
        world.draw_cases(pictures=0)


def test_cases_know_masks_and_poses(cases):
    from data_pipeline.world import render_subject

    for case in cases[:5]:
        assert case.masks.shape == (len(case.subjects), 32, 32)
        assert case.masks.dtype == bool
        for subject, (pose, flip), reference in zip(case.subjects, case.reference_poses, case.references, strict=True):
            again = render_subject(subject, 32, pose=pose, flip=flip)
            np.testing.assert_array_equal(again, np.asarray(reference))


def test_boxes_can_be_given():
    boxes = [(0.1, 0.1, 0.5, 0.9), (0.4, 0.2, 0.9, 0.6)]
    case = world.draw_case(np.random.default_rng(0), 2, boxes=boxes)
    assert [list(box) for box in case.boxes] == [list(box) for box in boxes]
    rows, columns = np.nonzero(case.masks[1])
    assert (columns.min() / 64, (columns.max() + 1) / 64) == pytest.approx((0.4, 0.9), abs=0.03)
    assert (rows.min() / 64, (rows.max() + 1) / 64) == pytest.approx((0.2, 0.6), abs=0.03)
    with pytest.raises(DataError, match="3 subjects, 2 boxes"):
        world.draw_case(np.random.default_rng(0), 3, boxes=boxes)
    with pytest.raises(DataError, match="x1 < x2"):
        world.draw_case(np.random.default_rng(0), 1, boxes=[(0.5, 0.1, 0.4, 0.9)])


def test_mixing_is_marked_per_box(cases):
    readings = right_readings(cases)
    marks = world.mark_mixing(cases, readings)
    assert len(marks) == len(readings.color)
    assert np.nanmax(marks) == 0
    pair = next(c for c in cases if len(c.subjects) == 2 and c.subjects[0].main_color != c.subjects[1].main_color)
    swapped = with_colors([pair], [s.main_color for s in pair.subjects][::-1])
    assert world.mark_mixing([pair], swapped).tolist() == [1.0, 1.0]
