from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.records import Rejected, SettingsError, TrainingPair
from data_pipeline.steps.filter_pairs import FilterPairs, border_contact, difference

SIZE = 100


def block(y, x, height, width):
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


GOOD = block(30, 30, 30, 30)


@pytest.fixture
def noise():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(2)]


@pytest.fixture
def check(make_pair, noise):
    def run(*matches, frames=None, **settings):
        pair = TrainingPair(frames=make_pair(*(frames or noise)), matches=tuple(matches))
        return FilterPairs(**settings).process(pair)

    return run


def reasons(outcome):
    if isinstance(outcome, Rejected):
        return [lost["reason"] for lost in outcome.evidence["subjects"]]
    return [lost.reason for lost in outcome.dropped]


def test_a_good_pair_passes_untouched(check, make_match):
    match = make_match(GOOD, GOOD)
    outcome = check(match)
    assert outcome.matches == (match,)
    assert outcome.dropped == ()


# Each rule of a single subject: the mask that breaks it, what else is wrong with the detection, the reason.
FAULTS = [
    (GOOD, {"score": 0.2}, "detection score too low"),
    (GOOD, {"mask_score": 0.5}, "mask score too low"),
    (block(30, 30, 9, 9), {}, "box too small"),
    (block(5, 5, 90, 90), {}, "box too large"),
    (block(30, 10, 10, 50), {}, "box too long and thin"),
    (block(10, 30, 50, 10), {}, "box too long and thin"),
    (block(30, 30, 14, 14), {}, "too few pixels in the mask"),
    (block(0, 30, 30, 30), {}, "cut off at the frame's edge"),
    (block(70, 30, 30, 30), {}, "cut off at the frame's edge"),
    (block(30, 0, 30, 30), {}, "cut off at the frame's edge"),
    (block(30, 70, 30, 30), {}, "cut off at the frame's edge"),
    (block(30, 30, 20, 20), {"box": (0.3, 0.3, 0.6, 0.6)}, "mask and box disagree"),
    (block(60, 60, 30, 30), {"box": (0.3, 0.3, 0.6, 0.6)}, "mask covers too little of its box"),
    (np.eye(SIZE, dtype=bool) & block(20, 20, 60, 60) | block(20, 20, 13, 12), {}, "mask covers too little of its box"),
]


@pytest.mark.parametrize("side", ["reference", "target"])
@pytest.mark.parametrize(("mask", "changes", "reason"), FAULTS)
def test_every_rule_of_a_subject(check, make_match, make_detection, mask, changes, reason, side):
    match = replace(make_match(GOOD, GOOD), **{side: make_detection(mask, **changes)})
    outcome = check(match)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "no subject passed the filters"
    assert reasons(outcome) == [reason]
    assert len(outcome.evidence["subjects"][0]) == 4  # phrase, reason, what was measured, the limit


def test_a_bad_subject_leaves_and_the_others_stay(check, make_match):
    good, small = make_match(GOOD, GOOD), make_match(block(80, 80, 5, 5), block(80, 80, 5, 5), "cat")
    outcome = check(small, good)
    assert outcome.matches == (good,)
    [lost] = outcome.dropped
    assert (lost.phrase, lost.stage, lost.reason) == ("cat", "filter_pairs", "box too small")


def test_one_thing_detected_twice(check, make_match):
    sure, unsure = make_match(GOOD, GOOD, "woman"), make_match(GOOD, GOOD, "person", score=0.5)
    outcome = check(unsure, sure)
    assert outcome.matches == (sure,)
    assert reasons(outcome) == ["detected twice"]


def test_a_mask_inside_another(check, make_match):
    whole, part = make_match(block(20, 20, 60, 40), block(20, 20, 60, 40)), make_match(GOOD, GOOD, "shirt")
    outcome = check(part, whole)
    assert outcome.matches == (whole,)
    assert outcome.dropped[0].evidence == {"mask_overlap": 1.0, "max_mask_overlap": 0.8}


def test_a_box_inside_another_stays(check, make_match):
    man = block(10, 20, 80, 50) & ~block(40, 40, 16, 16)
    ball = block(40, 40, 16, 16)
    assert len(check(make_match(man, man, "man"), make_match(ball, ball, "ball")).matches) == 2


def test_too_many_subjects_the_largest_stay_in_their_order(check, make_match):
    sizes = [16, 20, 18, 22, 24]
    places = [(5, 5), (5, 40), (5, 70), (50, 5), (50, 50)]
    masks = [block(*place, size, size) for place, size in zip(places, sizes, strict=True)]
    outcome = check(*[make_match(mask, mask, f"thing{i}") for i, mask in enumerate(masks)], max_border=1)
    assert [match.target.entity.phrase for match in outcome.matches] == ["thing1", "thing2", "thing3", "thing4"]
    assert reasons(outcome) == ["more subjects than max_subjects"]


def test_too_few_subjects(check, make_match):
    outcome = check(make_match(GOOD, GOOD), min_subjects=2)
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "fewer subjects than min_subjects"
    assert outcome.evidence["left"] == 1


def test_near_identical_frames(check, make_match, noise):
    almost = (noise[0].astype(int) + 1).clip(0, 255).astype(np.uint8)
    outcome = check(make_match(GOOD, GOOD), frames=(noise[0], almost))
    assert isinstance(outcome, Rejected)
    assert outcome.reason == "near-identical frames"
    assert outcome.evidence["change"] < 0.02


def test_only_the_subjects_boxes_count_for_the_difference(make_pair, make_match, noise):
    moved = noise[0].copy()
    moved[:20] = noise[1][:20]
    assert difference(make_pair(noise[0], moved), [make_match(GOOD, GOOD)]) == 0


def test_a_limit_of_zero_is_a_limit(check, make_match):
    assert isinstance(check(make_match(block(0, 30, 30, 30), GOOD), max_border=0), Rejected)
    grazing = block(0, 40, 1, 5) | block(1, 30, 29, 30)
    assert not isinstance(check(make_match(grazing, GOOD)), Rejected)
    assert isinstance(check(make_match(grazing, GOOD), max_border=0), Rejected)


def test_border_contact_is_a_share_of_a_side():
    assert border_contact(GOOD, (0.3, 0.3, 0.6, 0.6)) == 0
    assert border_contact(block(0, 30, 30, 30), (0.3, 0, 0.6, 0.3)) == pytest.approx(1)
    assert border_contact(block(0, 40, 1, 6) | block(1, 30, 29, 30), (0.3, 0, 0.6, 0.3)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_area": -0.1}, r"min_area must lie in \[0, 1\], got -0.1"),
        ({"max_mask_overlap": 1.2}, "max_mask_overlap must lie in"),
        ({"min_area": 0.8}, "min_area 0.8 must be below max_area 0.7"),
        ({"max_aspect": 0.5}, "max_aspect must be at least 1, got 0.5"),
        ({"min_subjects": 0}, "need 1 <= min_subjects <= max_subjects, got 0 and 4"),
        ({"min_subjects": 3, "max_subjects": 2}, "got 3 and 2"),
        ({"min_pixels": 0}, "min_pixels must be at least 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        FilterPairs(**settings)
