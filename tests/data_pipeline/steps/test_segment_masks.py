from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.records import AnnotatedObject, DetectedPair, Rejected, encode_mask
from data_pipeline.steps import segment_masks
from data_pipeline.steps.segment_masks import SegmentMasks

BLACK = np.zeros((8, 8, 3), dtype=np.uint8)
MASK = np.zeros((8, 8), dtype=bool)
MASK[2:5, 2:6] = True


@pytest.fixture
def segment(make_pair, make_detection):
    def detections(masks):
        for mask in masks:
            rle = None if mask is None else encode_mask(mask)
            annotated = AnnotatedObject(object_id=0, name="dog", box=(0, 0, 1, 1), mask_rle=rle)
            yield replace(make_detection(MASK), mask=None, annotated=annotated)

    def run(reference, target):
        step = SegmentMasks(segmenter="annotations")
        step.setup()
        return step.process(pair(reference, target))

    def pair(reference, target):
        first, second = (tuple(detections(masks)) for masks in (reference, target))
        return DetectedPair(frames=make_pair(BLACK, BLACK), entities=(), reference=first, target=second)

    run.pair = pair
    return run


def test_masks_of_the_annotations(segment):
    wider = MASK | np.eye(8, dtype=bool)
    pair = segment([MASK, wider], [MASK])
    assert [int(found.mask.sum()) for found in pair.reference] == [12, int(wider.sum())]
    assert np.array_equal(pair.target[0].mask, MASK)
    assert pair.target[0].mask_score is None


def test_empty_masks_are_left_out(segment):
    assert len(segment([MASK, MASK & False], [MASK]).reference) == 1


def test_a_mask_outside_its_box_is_empty_too(segment):
    elsewhere = np.zeros_like(MASK)
    elsewhere[7, 7] = True
    assert len(segment([MASK, elsewhere], [MASK]).reference) == 1


def test_all_masks_empty(segment):
    rejected = segment([MASK & False], [MASK])
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "all masks are empty in one of the frames"
    assert rejected.evidence == {"reference": 0, "target": 1}


def test_a_box_without_a_mask(segment):
    rejected = segment([MASK], [None])
    assert rejected == Rejected("annotation without a mask", {"phrase": "dog", "frame": 8})


def test_a_broken_pair_does_not_fail_its_neighbours(segment):
    pairs = [segment.pair([MASK], [MASK]), segment.pair([None], [MASK]), segment.pair([MASK, MASK], [MASK])]
    step = SegmentMasks(segmenter="annotations")
    step.setup()
    first, broken, last = step.process_many(pairs)
    assert [len(first.reference), len(last.reference)] == [1, 2]
    assert broken == Rejected("annotation without a mask", {"phrase": "dog", "frame": 3})
    assert step.process_many([]) == []


def test_all_frames_of_a_batch_are_one_request(segment):
    class Whole:
        def __init__(self):
            self.asked = []

        def segment(self, requests):
            self.asked.append([len(found) for _, found in requests])
            return [tuple(replace(one, mask=MASK) for one in found) for _, found in requests]

    step = SegmentMasks(segmenter="annotations")
    step._segmenter = Whole()
    pairs = step.process_many([segment.pair([None], [None, None]), segment.pair([None] * 3, [None] * 4)])
    assert step._segmenter.asked == [[1, 2, 3, 4]]
    assert [(len(pair.reference), len(pair.target)) for pair in pairs] == [(1, 2), (3, 4)]


def test_wrong_settings(tmp_path):
    with pytest.raises(SettingsError, match="must be one of auto, annotations, sam, mobile-sam, embedded, got 'unet'"):
        SegmentMasks(segmenter="unet")
    with pytest.raises(InputError, match="for sam is vit_b, vit_l, vit_h or a json file; there is no file vit_x"):
        SegmentMasks(segmenter="sam", model="vit_x")
    with pytest.raises(InputError, match="for mobile-sam is vit_t or a json file; there is no file vit_b"):
        SegmentMasks(segmenter="mobile-sam", model="vit_b")
    for segmenter in ("sam", "mobile-sam"):
        sizes = tmp_path / "sizes.json"
        sizes.write_text("{}")
        with pytest.raises(SettingsError, match="the sizes in .*sizes.json need their weights: --segmenter-checkpoint"):
            SegmentMasks(segmenter=segmenter, model=str(sizes))
        with pytest.raises(InputError, match="--segmenter-checkpoint: no file at"):
            SegmentMasks(segmenter=segmenter, checkpoint=tmp_path / "sam.pth")
    with pytest.raises(SettingsError, match="frames_per_batch must be at least 1, got 0"):
        SegmentMasks(frames_per_batch=0)


def test_the_size_of_batches_is_recorded_since_it_may_change_last_digits():
    assert SegmentMasks(frames_per_batch=8).settings() != SegmentMasks(segmenter="annotations").settings()


def test_the_embedded_segmenter_brings_its_own_files(tmp_path, monkeypatch):
    step = SegmentMasks(segmenter="embedded", device="cuda:1")
    assert step.model_device == "cuda:1"
    assert step.model_files()["embedded"].is_dir()
    assert SegmentMasks(segmenter="annotations").model_device == ""
    with pytest.raises(SettingsError, match="the segmenter embedded brings its own files"):
        SegmentMasks(segmenter="embedded", model="vit_b")
    monkeypatch.setattr(segment_masks, "SEGMENTER_WEIGHTS", tmp_path / "gone")
    with pytest.raises(InputError, match="--segmenter embedded: no file at .*it comes with a checkout"):
        SegmentMasks(segmenter="embedded")
