import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipeline.errors import SettingsError
from data_pipeline.records import DetectedPair, NamedPair, Rejected, TrainingPair
from data_pipeline.sources import find_videos
from data_pipeline.steps.cut_shots import CutShots
from data_pipeline.steps.detect_boxes import DetectBoxes
from data_pipeline.steps.filter_pairs import FilterPairs, border_contact, difference
from data_pipeline.steps.match_subjects import MatchSubjects
from data_pipeline.steps.pick_frames import PickFrames
from data_pipeline.steps.read_videos import ReadVideos
from data_pipeline.steps.segment_masks import SegmentMasks

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
        step = FilterPairs(**settings)
        step.setup()
        return step.process(pair)

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


# ---------------------------------------------------------------------------- every rule, on clips that were decoded

WIDE = 128
ROWS, COLUMNS = np.mgrid[:WIDE, :WIDE]


def ellipse(y, x, high, wide):
    """A mask with this middle and these whole axes."""
    return (2 * (ROWS - y) / high) ** 2 + (2 * (COLUMNS - x) / wide) ** 2 < 1


def paint(picture, mask, colour):
    """A surface with a fine pattern, so that it has something to be sharp with."""
    picture[mask] = colour
    picture[mask & ((ROWS // 3 + COLUMNS // 3) % 4 == 0)] = np.asarray(colour) * 0.6


def render(shapes, *, speed=2, finish=None, colours=((200, 60, 40), (40, 70, 200), (40, 160, 70), (190, 150, 30))):
    """12 frames of shapes (functions of the shift in pixels, to masks) that move to the right over a coarse ground.

    finish: changes a finished frame, (picture, its masks) -> picture. Returns pictures (12, H, W, 3) and masks
    (12, shapes, H, W).
    """
    ground = np.random.default_rng(1).integers(90, 160, (16, 16, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    pictures, all_masks = [], []
    for frame in range(12):
        picture = ground.copy()
        masks = [shape(speed * (frame - 6)) for shape in shapes]
        for mask, colour in zip(masks, colours * 2, strict=False):
            paint(picture, mask, colour)
        pictures.append(picture if finish is None else finish(picture, masks))
        all_masks.append(masks)
    return np.stack(pictures), np.asarray(all_masks)


@pytest.fixture
def mine(tmp_path, write_video, annotate, make_entity):
    """Writes a clip with its annotations and takes it through the steps; returns what the filters make of it."""

    def run(pictures, masks, *, names=("dog",), alter=None, box=None, **settings):
        names = names if len(names) == masks.shape[1] else tuple(f"dog{i}" for i in range(masks.shape[1]))
        write_video(tmp_path / "clip.mp4", pictures, options={"crf": "12"})
        (tmp_path / "clip.txt").write_text("a dog on the beach")
        sidecar = annotate(names, masks)
        for entry in sidecar["frames"]:
            for found in entry["objects"] if box else ():
                found["box"] = box(found["box"])
        (tmp_path / "clip.annotations.json").write_text(json.dumps(sidecar))
        record = find_videos(tmp_path)[0]
        for step in (ReadVideos(), CutShots(), PickFrames(candidates=2)):
            step.setup()
            record = step.process(record)
            assert not isinstance(record, Rejected)
        record = NamedPair(frames=record[0], entities=tuple(make_entity(name) for name in names))
        for step in (
            DetectBoxes(detector="annotations"),
            SegmentMasks(segmenter="annotations"),
            MatchSubjects(),
            FilterPairs(**settings),
        ):
            step.setup()
            if alter is not None and isinstance(record, DetectedPair) and record.target[0].mask is not None:
                record = replace(record, target=tuple(replace(found, **alter) for found in record.target))
            record = step.process(record)
        return record

    return run


def one(high, wide, y=64, x=64):
    """One subject of this size."""
    return [lambda shift: ellipse(y, x + shift, high, wide)]


def ring(thickness):
    return [lambda shift: ellipse(64, 64 + shift, 60, 60) & ~ellipse(64, 64 + shift, 60 - thickness, 60 - thickness)]


def blur_subjects(radius):
    def finish(picture, masks):
        smooth = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
        # The outline is blurred as well, so all of the picture round the subject is.
        near = np.logical_or.reduce([np.roll(masks[0], (dy, dx), (0, 1)) for dy in (-9, 0, 9) for dx in (-9, 0, 9)])
        picture[near] = smooth[near]
        return picture

    return finish


def expose(level):
    def finish(picture, masks):
        picture[masks[0] & (ROWS % 16 > 2)] = level
        return picture

    return finish


def shrink_box(pixels):
    return lambda box: [box[0], box[1] + pixels, box[2], box[3]]


def two(apart):
    """Two subjects of one size, the second one so many pixels below the first."""
    return [lambda shift: ellipse(54, 60 + shift, 50, 50), lambda shift: ellipse(54 + apart, 60 + shift, 50, 50)]


def row(count):
    return [lambda shift, i=i: ellipse(16 + 24 * i, 64 + shift, 22, 30) for i in range(count)]


GOOD_CLIP = {"shapes": one(60, 50)}
# A clip that the rule must reject, one near it that it must keep, and the reason. "alter" changes the detections of the
# target, "box" the annotated boxes; annotations have no scores of their own.
CLIPS = {
    "detection score": ({"alter": {"score": 0.29}}, {"alter": {"score": 0.31}}, "detection score too low"),
    "mask score": ({"alter": {"mask_score": 0.69}}, {"alter": {"mask_score": 0.71}}, "mask score too low"),
    "small": ({"shapes": one(12, 12)}, {"shapes": one(20, 20)}, "box too small"),
    "large": ({"shapes": one(110, 110), "speed": 1}, {"shapes": one(100, 100), "speed": 1}, "box too large"),
    "thin": ({"shapes": one(84, 16)}, {"shapes": one(60, 18)}, "box too long and thin"),
    "few pixels": ({"shapes": one(15, 15)}, {"shapes": one(18, 18)}, "too few pixels in the mask"),
    "sticks": ({"shapes": ring(4), "min_sharpness": 0}, {"shapes": ring(10)}, "mask covers too little of its box"),
    "mask and box": ({"box": shrink_box(24)}, {"box": shrink_box(6)}, "mask and box disagree"),
    "cut off": ({"shapes": one(60, 50, y=10)}, {"shapes": one(60, 50, y=31)}, "cut off at the frame's edge"),
    "white": ({"finish": expose(255)}, {"finish": expose(225)}, "under- or over-exposed"),
    "black": ({"finish": expose(0)}, {"finish": expose(30)}, "under- or over-exposed"),
    "blurred": ({"finish": blur_subjects(5)}, {"finish": blur_subjects(0.7)}, "blurred"),
    "the same twice": (
        {"shapes": two(0), "names": ("dog", "puppy")},
        {"shapes": two(20), "names": ("dog", "puppy")},
        "detected twice",
    ),
    "standing still": ({"speed": 0}, {"speed": 1}, "near-identical frames"),
    "too few": (
        {"min_subjects": 2},
        {"min_subjects": 2, "shapes": two(30), "names": ("dog", "cat"), "max_mask_overlap": 1},
        "fewer subjects than min_subjects",
    ),
    "too many": ({"shapes": row(5)}, {"shapes": row(4)}, "more subjects than max_subjects"),
}


@pytest.mark.parametrize("name", CLIPS)
def test_every_rule_rejects_a_clip_and_keeps_one_near_it(mine, name):
    bad, good, reason = CLIPS[name]
    outcomes = []
    for options in (bad, good):
        options = {**GOOD_CLIP, **options}
        drawing = {key: options.pop(key) for key in ("speed", "finish") if key in options}
        outcomes.append(mine(*render(options.pop("shapes"), **drawing), **options))
    rejected, kept = outcomes
    if isinstance(rejected, Rejected):
        found = {rejected.reason, *(lost["reason"] for lost in rejected.evidence.get("subjects", ()))}
    else:
        found = {lost.reason for lost in rejected.dropped}
    assert reason in found
    assert isinstance(kept, TrainingPair)
    assert kept.dropped == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_area": -0.1}, r"min_area must lie in \[0, 1\], got -0.1"),
        ({"max_mask_overlap": 1.2}, "max_mask_overlap must lie in"),
        ({"min_area": 0.8}, "min_area 0.8 must be below max_area 0.7"),
        ({"max_aspect": 0.5}, "max_aspect must be at least 1, got 0.5"),
        ({"min_subjects": 0}, "need 1 <= min_subjects <= max_subjects, got 0 and 4"),
        ({"min_subjects": 3, "max_subjects": 2}, "got 3 and 2"),
        ({"max_subjects": 257}, "max_subjects is 256 at most, got 257"),
        ({"max_clipped": 1.5}, r"max_clipped must lie in \[0, 1\], got 1.5"),
        ({"min_sharpness": -0.1}, "min_sharpness must not be negative, got -0.1"),
        ({"min_pixels": 0}, "min_pixels must be at least 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        FilterPairs(**settings)
