import json

import numpy as np
import pytest

from data_pipeline.models.embedded.measure import (
    OTHERS,
    Miner,
    Score,
    TrueObject,
    add_pair,
    hits,
    mask_iou,
    read_annotations,
    sample_twin_clip,
    table,
    true_objects,
    write_twin_clips,
)
from data_pipeline.records import (
    DetectedPair,
    Detection,
    Entity,
    Frame,
    FramePair,
    Match,
    NamedPair,
    Rejected,
    TrainingPair,
    mask_box,
)
from data_pipeline.world.clips import annotate, sample_clip

LEFT, RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)


def entity(name):
    return Entity(phrase=name, head=name, mention=f"a {name}", position=0)


def filled(box, size=8):
    mask = np.zeros((size, size), bool)
    x1, y1, x2, y2 = (round(value * size) for value in box)
    mask[y1:y2, x1:x2] = True
    return mask


def detection(name, box, score=0.9):
    return Detection(entity=entity(name), box=box, score=score, mask=filled(box))


def true_object(number, name, box):
    return TrueObject(number=number, name=name, box=box, mask=filled(box))


def test_each_object_is_hit_once_and_the_surest_chooses_first():
    true = [true_object(0, "dog", LEFT), true_object(1, "dog", RIGHT), true_object(2, "cat", LEFT)]
    found = [
        detection("dog", LEFT, 0.5),
        detection("dog", LEFT, 0.8),
        detection("dog", (0.5, 0.5, 1.0, 0.9), 0.4),
        detection("cat", RIGHT, 0.9),
        detection("beach", LEFT, 0.9),
    ]
    assert [one and one.number for one in hits(found, true)] == [None, 0, 1, None, None]


def test_mask_iou():
    assert mask_iou(filled(LEFT), filled((0.0, 0.0, 0.5, 1.0))) == 0.5
    assert mask_iou(filled(LEFT), np.zeros((8, 8), bool)) == 0.0
    assert mask_iou(np.zeros((8, 8), bool), np.zeros((8, 8), bool)) == 0.0


def test_a_pair_is_counted():
    reference = [true_object(0, "dog", LEFT), true_object(1, "dog", RIGHT)]
    target = [true_object(0, "dog", RIGHT), true_object(1, "dog", LEFT), true_object(2, "cat", LEFT)]
    found = (
        (detection("dog", LEFT), detection("dog", RIGHT), detection("beach", LEFT)),
        (detection("dog", RIGHT), detection("dog", LEFT)),
    )
    swapped = (
        Match(reference=found[0][0], target=found[1][0], similarity=0.9),  # 0 and 0
        Match(reference=found[0][1], target=found[1][0], similarity=0.9),  # 1 and 0
        Match(reference=found[0][2], target=found[1][1], similarity=0.9),  # nothing and 1
    )
    score = Score()
    add_pair(score, (reference, target), found, TrainingPair(frames=None, matches=swapped))
    figures = score.figures()
    assert figures["objects"] == 5
    assert figures["recall"] == pytest.approx(4 / 5)
    assert figures["precision"] == pytest.approx(4 / 5)
    assert figures["box_iou"] == figures["mask_iou"] == pytest.approx(1.0)
    assert figures["categories"]["cat"]["recall"] == 0
    assert figures["categories"][OTHERS]["precision"] == 0
    assert figures["matches_right"] == pytest.approx(1 / 3)
    assert figures["objects_matched"] == pytest.approx(1 / 2)


def test_nothing_found_is_no_division_by_zero():
    score = Score()
    add_pair(score, ([], []), ((), ()), None)
    assert score.figures()["recall"] == score.figures()["precision"] == score.figures()["matches_right"] == 0


def test_truth_comes_from_the_sidecar():
    clip = sample_clip(np.random.default_rng(3), num_subjects=3, size=64, num_frames=4)
    annotations = json.loads(json.dumps(annotate(clip)))
    for index in range(4):
        true = true_objects(annotations, index)
        assert {one.name for one in true} <= {one.category for one in clip.subjects}
        for one in true:
            assert np.array_equal(one.mask, clip.masks[index, one.number])
            assert one.box == mask_box(one.mask)


def test_specks_are_no_truth():
    clip = sample_clip(np.random.default_rng(3), num_subjects=1, size=64, num_frames=1)
    clip.masks[0, 0] = False
    clip.masks[0, 0, 3, 3:18] = True
    assert true_objects(annotate(clip), 0) == []
    clip.masks[0, 0, 3, 3:19] = True
    assert len(true_objects(annotate(clip), 0)) == 1


class FakeStep:
    def __init__(self, answer):
        self.process = answer


class TestMiner:
    """With steps that know the truth."""

    frames = FramePair(
        video=None,
        shot=None,
        reference=Frame(index=0, time=0.0, image=np.zeros((8, 8, 3), np.uint8)),
        target=Frame(index=1, time=1.0, image=np.zeros((8, 8, 3), np.uint8)),
    )

    def miner(self, found):
        """found: frame number -> boxes of dogs."""

        def detect(named):
            frame = named.frames.reference
            assert frame is named.frames.target
            boxes = tuple(detection("dog", box) for box in found[frame.index])
            if not boxes:
                return Rejected("no entity detected in one of the frames")
            return DetectedPair(frames=named.frames, entities=named.entities, reference=boxes, target=boxes)

        def match(pair):
            ends = zip(pair.reference, pair.target, strict=False)
            return TrainingPair(
                frames=pair.frames, matches=tuple(Match(reference=a, target=b, similarity=1.0) for a, b in ends)
            )

        return Miner(
            {
                "find_entities": FakeStep(lambda frames: NamedPair(frames=frames, entities=(entity("dog"),))),
                "detect_boxes": FakeStep(detect),
                "segment_masks": FakeStep(lambda pair: pair),
                "match_subjects": FakeStep(match),
            }
        )

    def annotations(self):
        objects = [{"id": 5, "name": "dog"}]
        places = (LEFT, RIGHT)
        boxes = [{"id": 5, "mask_rle": rle(filled(box))} for box in places]
        return {"objects": objects, "frames": [{"index": i, "objects": [box]} for i, box in enumerate(boxes)]}

    def test_everything_is_found(self):
        seen = []
        score = self.miner({0: [LEFT], 1: [RIGHT]}).measure([(self.frames, self.annotations())], seen.append)
        figures = score.figures()
        assert [figures[name] for name in ("recall", "precision", "mask_iou", "matches_right")] == [1.0] * 4
        assert figures["objects_matched"] == 1.0
        assert len(seen) == 1

    def test_what_one_frame_shows_counts_though_the_pair_is_given_up(self):
        figures = self.miner({0: [LEFT], 1: []}).measure([(self.frames, self.annotations())]).figures()
        assert figures["recall"] == 0.5
        assert figures["objects_matched"] == 0.0
        assert figures["pairs"] == 1


def rle(mask):
    from data_pipeline.records import encode_mask

    return encode_mask(mask)


def test_twins_are_clips_like_others(tmp_path):
    write_twin_clips(tmp_path, 2, split="held_out", seed=4)
    paths = sorted(tmp_path.glob("*.mp4"))
    assert [path.name for path in paths] == ["twins_000000.mp4", "twins_000001.mp4"]
    clip = sample_twin_clip(np.random.default_rng([4, 1]), split="held_out")
    annotations = read_annotations(paths[1])
    assert [one["name"] for one in annotations["objects"]] == [one.category for one in clip.subjects]
    assert paths[1].with_suffix(".txt").read_text().strip() == clip.caption
    categories = [one.category for one in clip.subjects]
    assert len(set(categories)) == len(categories) - 1
    before = paths[0].read_bytes()
    write_twin_clips(tmp_path, 3, split="held_out", seed=4)
    assert paths[0].read_bytes() == before
    assert len(list(tmp_path.glob("*.mp4"))) == 3


def test_twins_keep_their_looks_and_move():
    clip = sample_twin_clip(np.random.default_rng(0), split="train", size=64, num_frames=5)
    assert clip.frames.shape == (5, 64, 64, 3)
    first, last = (mask_box(clip.masks[index, 0]) for index in (0, -1))
    assert first != last


def test_the_table_has_means_and_spread():
    figures = []
    for recall in (0.5, 1.0):
        one = {"objects": 10, "recall": recall, "precision": 1.0, "box_iou": 0.9, "mask_iou": 0.8}
        figures.append({"pairs": 4, **one, "matches_right": 1.0, "objects_matched": recall, "categories": {"dog": one}})
    lines = table("clips", figures).splitlines()
    assert lines[2].startswith("| all | 20 | 0.750 (0.500 to 1.000) | 1.000 (1.000 to 1.000) |")
    assert lines[3].startswith("| dog | 20 |")
    assert lines[-1].startswith("8 pairs of frames")
