from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipeline.errors import SettingsError
from data_pipeline.models import video_reader
from data_pipeline.records import Annotations, FramePair, Rejected, Shot, VideoShots
from data_pipeline.sources import find_videos
from data_pipeline.steps import pick_frames
from data_pipeline.steps.pick_frames import PickFrames, nearest
from data_pipeline.steps.read_videos import ReadVideos


def shot(first, last):
    return Shot(first=first, last=last, start=first / 8, end=last / 8)


@pytest.fixture
def video(write_clip, tmp_path):
    write_clip(tmp_path)
    step = ReadVideos()
    step.setup()
    return step.process(find_videos(tmp_path)[0])


def pick(video, *shots, annotated=None, **settings):
    step = PickFrames(**settings)
    step.setup()
    if annotated is not None:
        frames = {index: video.annotations.frames[index] for index in annotated}
        video = replace(video, annotations=Annotations(frames=frames))
    outcome = step.process(VideoShots(video=video, shots=shots))
    if isinstance(outcome, Rejected):
        return outcome
    assert [pair.number for pair in outcome] == list(range(len(outcome)))
    return outcome[0] if step.pairs_per_clip == 1 else outcome


def test_a_quarter_and_three_quarters(video):
    pair = pick(video, shot(0, 11))
    assert (pair.reference.index, pair.target.index) == (3, 8)
    assert (pair.reference.time, pair.target.time) == (0.375, 1.0)
    assert pair.reference.image.shape == (96, 96, 3)


def test_the_shot_with_the_largest_gap_is_taken(video):
    pair = pick(video, shot(0, 2), shot(3, 11), min_gap=0)
    assert pair.shot == shot(3, 11)
    assert pair.reference.index >= 3


def test_only_annotated_frames(video):
    assert [frame.index for frame in both(pick(video, shot(0, 11), annotated=[0, 10]))] == [0, 10]
    assert [frame.index for frame in both(pick(video, shot(0, 11), annotated=[2, 4, 7, 11]))] == [2, 7]


def test_the_outermost_if_one_frame_is_nearest_to_both_places(video):
    assert [frame.index for frame in both(pick(video, shot(0, 11), annotated=[0, 4]))] == [0, 4]
    assert [frame.index for frame in both(pick(video, shot(0, 11), annotated=[5, 11], min_gap=0))] == [5, 11]


@pytest.mark.parametrize("annotated", [[9, 11], [2, 9, 11]])
def test_objects_that_come_after_the_last_frame_looked_at(video, annotated):
    rejected = pick(video, shot(0, 7), annotated=annotated)
    assert rejected.reason == "annotated frames after max_frames"
    assert rejected.evidence["frames"] == annotated
    assert rejected.evidence["needed"] == "two of them among the first 8, which --max-frames limits"


def both(pair):
    return pair.reference, pair.target


def test_all_frames_if_the_detector_needs_no_annotations(video):
    assert [frame.index for frame in both(pick(video, shot(0, 11), annotated=[], annotated_only=False))] == [3, 8]


@pytest.mark.parametrize(
    ("annotated", "shots"), [([], (shot(0, 11),)), ([4], (shot(0, 11),)), ([2, 8], (shot(0, 5), shot(6, 11)))]
)
def test_one_annotated_frame_in_a_shot_is_not_enough(video, annotated, shots):
    rejected = pick(video, *shots, annotated=annotated)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "fewer than two annotated frames in one shot"
    assert rejected.evidence == {"shots": len(shots), "frames": annotated}


def test_shots_of_one_frame(video):
    rejected = pick(video, shot(0, 0), shot(1, 1), annotated_only=False)
    assert rejected.reason == "shots of one frame"


def test_frames_too_near_in_time(video):
    rejected = pick(video, shot(0, 11), annotated=[4, 5])
    assert rejected.reason == "frames too near in time"
    assert rejected.evidence == {"seconds": 0.125, "min_gap": 0.25}


# ------------------------------------------------------------------------------------------ which of the candidates


@pytest.fixture
def film(tmp_path, write_video):
    """Function: frames -> a video of them, opened, without annotations."""

    def make(pictures):
        write_video(tmp_path / "film.mp4", pictures, options={"crf": "12"})
        (tmp_path / "film.txt").write_text("a dog on the beach")
        step = ReadVideos(annotations=False)
        step.setup()
        return step.process(find_videos(tmp_path)[0])

    return make


def blurred(picture, radius):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def frames_of(outcome):
    pairs = [outcome] if isinstance(outcome, FramePair) else outcome
    return [(pair.reference.index, pair.target.index) for pair in pairs]


def test_a_blurred_frame_is_passed_over(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=13)
    places = {"annotated_only": False, "reference_place": 0, "target_place": 1}
    assert frames_of(pick(film(pictures), shot(0, 12), **places)) == [(0, 12)]
    pictures[12] = blurred(pictures[12], 2)
    assert frames_of(pick(film(pictures), shot(0, 12), **places)) == [(0, 9)]


def test_among_good_pairs_the_longest_gap_counts_not_the_largest_change(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=13, speed=3)
    pictures[9] = 255 - pictures[9]
    assert frames_of(pick(film(pictures), shot(0, 12), annotated_only=False, reference_place=0, target_place=1)) == [
        (0, 12)
    ]


def test_a_subject_that_comes_back_to_its_place_is_taken_on_its_way(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=7, speed=3)
    there_and_back = np.concatenate((pictures, pictures[-2::-1]))
    assert len(there_and_back) == 13
    [(first, second)] = frames_of(
        pick(film(there_and_back), shot(0, 12), annotated_only=False, reference_place=0, target_place=1)
    )
    assert (first, second) != (0, 12)
    assert second - first >= 6


def test_two_candidates_are_the_two_places(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=13)
    pictures[9] = blurred(pictures[9], 1)
    assert frames_of(pick(film(pictures), shot(0, 12), annotated_only=False, candidates=2)) == [(3, 9)]


@pytest.fixture
def decoded(monkeypatch):
    """The frames that were decoded, in the order of the calls."""
    calls = []
    for reader in (video_reader.DecordReader, video_reader.PyAVReader):
        original = reader.frames

        def frames(self, indices, original=original):
            calls.extend(indices)
            return original(self, indices)

        monkeypatch.setattr(reader, "frames", frames)
    return calls


def test_few_frames_are_decoded_of_a_long_shot(film, draw_clip, decoded):
    pictures, _ = draw_clip(("dog",), num_frames=200, speed=0)
    pictures = np.stack([np.roll(picture, i, axis=1) for i, picture in enumerate(pictures)])
    pick(film(pictures), shot(0, 99), shot(100, 199), annotated_only=False)
    assert decoded == [25, 37, 49, 62, 74]


def test_fewer_candidates_of_very_large_frames(film, draw_clip, decoded, monkeypatch):
    monkeypatch.setattr(pick_frames, "CANDIDATE_PIXELS", 3 * 96 * 96)
    pictures, _ = draw_clip(("dog",), num_frames=13)
    pick(film(pictures), shot(0, 12), annotated_only=False)
    assert decoded == [3, 6, 9]
    monkeypatch.setattr(pick_frames, "CANDIDATE_PIXELS", 1)
    decoded.clear()
    pick(film(pictures), shot(0, 12), annotated_only=False)
    assert decoded == [3, 9]


def test_a_bad_shot_gives_way_to_a_shorter_good_one(film, draw_clip):
    still, moving = draw_clip(("dog",), num_frames=16, speed=0)[0], draw_clip(("cat",), num_frames=10)[0]
    both_shots = np.concatenate((still, moving))
    pair = pick(film(both_shots), shot(0, 15), shot(16, 25), annotated_only=False)
    assert pair.shot == shot(16, 25)
    assert pick(film(both_shots), shot(0, 15), annotated_only=False).shot == shot(0, 15)


# ----------------------------------------------------------------------------------------------------- several pairs


def three_shots(draw_clip):
    clips = [draw_clip((name,), num_frames=12, seed=seed)[0] for seed, name in enumerate(("dog", "cat", "fish"))]
    return np.concatenate(clips), (shot(0, 11), shot(12, 23), shot(24, 35))


def test_pairs_of_one_clip_come_from_different_shots_first(film, draw_clip):
    pictures, shots = three_shots(draw_clip)
    video = film(pictures)
    options = {"annotated_only": False, "min_gap": 0}
    one, two, five = (pick(video, *shots, pairs_per_clip=count, **options) for count in (1, 2, 5))
    assert frames_of(two)[0] == frames_of(one)[0]
    assert len({pair.shot for pair in two}) == 2
    assert len({pair.shot for pair in five}) == 3
    assert len(set(frames_of(five))) == 5
    for pair in five:
        assert pair.shot.first <= pair.reference.index < pair.target.index <= pair.shot.last


def test_second_pairs_of_a_shot_share_no_frame_if_that_is_possible(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=13)
    pairs = pick(film(pictures), shot(0, 12), annotated_only=False, pairs_per_clip=2)
    assert len({index for frames in frames_of(pairs) for index in frames}) == 4


def test_no_more_pairs_than_there_are(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=13)
    options = {"annotated_only": False, "pairs_per_clip": 9}
    assert frames_of(pick(film(pictures), shot(0, 12), candidates=2, **options)) == [(3, 9)]
    assert len(pick(film(pictures), shot(0, 12), candidates=3, **options)) == 3


def test_every_pair_keeps_the_least_gap(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=13)
    pairs = pick(film(pictures), shot(0, 12), annotated_only=False, pairs_per_clip=9, min_gap=0.5)
    assert pairs
    assert all(pair.target.time - pair.reference.time >= 0.5 for pair in pairs)


def test_the_same_pairs_every_time(film, draw_clip):
    pictures, shots = three_shots(draw_clip)
    options = {"annotated_only": False, "pairs_per_clip": 4}
    assert frames_of(pick(film(pictures), *shots, **options)) == frames_of(pick(film(pictures), *shots, **options))


# ------------------------------------------------------------------------------------------------ rules about frames

# What is done to a good clip: first so much that it is rejected, then less, so that it is kept; the reason.
RULES = {
    "dark": (lambda picture: picture * 0.08, lambda picture: picture * 0.6, "frames too dark"),
    "bright": (lambda picture: 245 + picture * 0.04, lambda picture: 120 + picture * 0.5, "frames too bright"),
    "blurred": (lambda picture: blurred(picture, 4), lambda picture: blurred(picture, 0.5), "frames blurred"),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_rejects_and_keeps(film, draw_clip, rule):
    too_much, less, reason = RULES[rule]
    pictures, _ = draw_clip(("dog",), num_frames=13, size=192)
    rejected, kept = (
        pick(
            film(np.stack([change(picture) for picture in pictures]).clip(0, 255).astype(np.uint8)),
            shot(0, 12),
            annotated_only=False,
        )
        for change in (too_much, less)
    )
    assert isinstance(rejected, Rejected)
    assert rejected.reason == reason
    assert rejected.evidence["frames"] == 5
    assert isinstance(kept, FramePair)


def test_one_dark_frame_is_passed_over(film, draw_clip):
    pictures, _ = draw_clip(("dog",), num_frames=13)
    pictures[3] = 0
    assert frames_of(pick(film(pictures), shot(0, 12), annotated_only=False))[0][0] > 3


@pytest.mark.parametrize("seconds", [0.25, 0.5])
def test_the_outermost_frames_if_the_places_are_too_near_in_time(video, seconds):
    pair = pick(video, shot(0, 11), annotated=[0, 5, 6, 11], min_gap=seconds, reference_place=0.45, target_place=0.55)
    assert [frame.index for frame in both(pair)] == [0, 11]


def test_nearest():
    assert nearest((0, 10, 20), 4) == 0
    assert nearest((0, 10, 20), 5) == 0
    assert nearest((0, 10, 20), 6) == 10
    assert nearest((7,), 99) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference_place": 0.8}, "need 0 <= reference_place < target_place <= 1, got 0.8 and 0.75"),
        ({"target_place": 1.1}, "got 0.25 and 1.1"),
        ({"min_gap": -1}, "min_gap must not be negative, got -1"),
        ({"candidates": 1}, "candidates must be at least 2, got 1"),
        ({"min_frame_brightness": 0.99}, "need 0 <= min_frame_brightness < max_frame_brightness <= 1, got 0.99 and"),
        ({"max_frame_brightness": 1.1}, "got 0.05 and 1.1"),
        ({"min_frame_sharpness": -1}, "min_frame_sharpness must not be negative, got -1"),
        ({"pairs_per_clip": 0}, "pairs_per_clip must be at least 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        PickFrames(**settings)
