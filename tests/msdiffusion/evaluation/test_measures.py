"""Measures on world cases: the truth scores high, other pictures score low, arrays line up, intervals are honest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.world import render_subject
from msdiffusion.errors import DataError, WeightsError
from msdiffusion.evaluation.measures import (
    MEASURES,
    Gallery,
    Instruments,
    compare_measures,
    copied_poses,
    groups_of,
    measure_pictures,
    summarize_measures,
)
from msdiffusion.evaluation.world import draw_cases

TINY = Path(__file__).parents[3] / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def instruments():
    return Instruments.from_pretrained(TINY)


@pytest.fixture(scope="module")
def gallery(instruments):
    """One for all: it draws and embeds its candidates when they are first asked for, which takes a dozen seconds."""
    return Gallery(instruments.recognizer)


@pytest.fixture(scope="module")
def cases():
    return draw_cases(pictures=30, seed=77)


@pytest.fixture(scope="module")
def truth(cases, instruments, gallery):
    return measure_pictures(cases, [case.truth for case in cases], instruments, gallery)


@pytest.fixture(scope="module")
def shuffled(cases, instruments, gallery):
    """Every case is shown the true render of the next one with as many subjects."""
    pictures = []
    for case in cases:
        others = [other.truth for other in cases if other is not case and len(other.subjects) == len(case.subjects)]
        pictures.append(others[0])
    return measure_pictures(cases, pictures, instruments, gallery)


def test_arrays_hold_one_value_per_subject_or_picture(cases, truth):
    subjects = sum(len(case.subjects) for case in cases)
    assert list(truth) == list(MEASURES)
    for name, measure in MEASURES.items():
        assert truth[name].shape == (subjects if measure.per == "subject" else len(cases),)
        known = truth[name][~np.isnan(truth[name])]
        assert ((known >= 0) & (known <= 1)).all()
        assert len(groups_of(cases, name)) == len(truth[name])
    alone = np.array([len(case.subjects) == 1 for case in cases for _ in case.subjects])
    assert np.isnan(truth["confusion"][alone]).all()
    assert not np.isnan(truth["category"]).any()


def test_true_renders_score_high_and_other_pictures_low(truth, shuffled):
    for name in ("background", "category", "body_color", "pattern", "layout", "retrieval", "product"):
        assert np.nanmean(truth[name]) > 0.7, name
        assert np.nanmean(truth[name]) > np.nanmean(shuffled[name]) + 0.2, name
    assert np.nanmean(truth["confusion"]) < 0.1


def test_another_number_of_pictures_is_refused(cases, instruments, gallery):
    with pytest.raises(DataError, match="30 cases, 1 pictures"):
        measure_pictures(cases, [cases[0].truth], instruments, gallery)
    with pytest.raises(DataError, match="0 cases, 0 pictures"):
        measure_pictures([], [], instruments, gallery)


def paste_subject(case, pose, flip):
    """The case's single subject in its box on the mean colour of the true render."""
    background = np.asarray(case.truth).reshape(-1, 3).mean(0).astype(int)
    picture = Image.new("RGB", (128, 128), tuple(background))
    x1, y1, x2, y2 = (round(edge * 128) for edge in case.boxes[0])
    view = Image.fromarray(render_subject(case.subjects[0], 128, pose=pose, flip=flip)).resize((x2 - x1, y2 - y1))
    picture.paste(view, (x1, y1), view)
    return picture


def test_copied_poses_are_recognised_and_mirrored_ones_are_not():
    cases = draw_cases(pictures=40, seed=5, shares=(1.0,))
    copied = [copied_poses(case, paste_subject(case, *case.reference_poses[0]))[0] for case in cases]
    # the legs of some subjects stand alike in two poses
    assert np.mean(copied) > 0.65
    mirrored = [
        copied_poses(case, paste_subject(case, case.reference_poses[0][0], not case.reference_poses[0][1]))[0]
        for case in cases
    ]
    assert np.mean(mirrored) < 0.2


def test_true_renders_are_no_copies(truth):
    assert np.nanmean(truth["copy"]) < 0.35


def test_gallery_needs_a_rival_and_leaves_the_subject_itself_out(instruments, cases):
    for candidates in (1, 1001):
        with pytest.raises(DataError, match=f"2 to 1000 candidates, got {candidates}"):
            Gallery(instruments.recognizer, candidates=candidates)
    gallery = Gallery(instruments.recognizer, candidates=5)
    identities, embeddings = gallery._of("dog")
    assert len(set(identities)) == len(embeddings) == 5
    case = replace(
        cases[0], subjects=(identities[0],), boxes=cases[0].boxes[:1], reference_poses=cases[0].reference_poses[:1]
    )
    # the gallery's own picture of the subject would tie with anything: it must not be among the rivals
    assert gallery.first_places([case], embeddings[:1], embeddings[:1])[0]


def test_summary_has_mean_interval_and_sizes(cases, truth):
    summary = summarize_measures(cases, truth, resamples=200)
    for name, own in summary.items():
        known = truth[name][~np.isnan(truth[name])]
        assert own["mean"] == pytest.approx(known.mean())
        assert own["low"] <= own["mean"] <= own["high"]
        assert own["count"] == len(known)
    assert set(summary["category"]["by_size"]) == {str(len(case.subjects)) for case in cases}
    nothing = {"confusion": np.full_like(truth["confusion"], np.nan)}
    assert summarize_measures(cases, nothing)["confusion"]["mean"] is None


def test_comparison_of_a_row_with_itself_is_zero(cases, truth, shuffled):
    same = compare_measures(cases, truth, truth)
    assert all((own["difference"], own["low"], own["high"]) == (0, 0, 0) for own in same.values())
    other = compare_measures(cases, shuffled, truth)
    assert other["layout"]["high"] < 0
    assert other["layout"]["difference"] == pytest.approx(shuffled["layout"].mean() - truth["layout"].mean())


def test_missing_instruments_are_told(tmp_path):
    with pytest.raises(WeightsError, match=r"judge\.yaml"):
        Instruments.from_pretrained(tmp_path)


def test_a_picture_of_nothing_copies_no_pose(cases, instruments, gallery):
    blank = [Image.new("RGB", (64, 64), (120, 120, 120)) for _ in cases]
    measured = measure_pictures(cases, blank, instruments, gallery)
    wrong = measured["category"] == 0
    assert wrong.any()
    assert np.isnan(measured["copy"][wrong]).all()
