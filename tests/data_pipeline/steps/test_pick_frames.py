from dataclasses import replace

import pytest

from data_pipeline.records import Annotations, Rejected, SettingsError, Shot, VideoShots
from data_pipeline.sources import find_videos
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
    [pair] = outcome
    assert pair.number == 0
    return pair


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
        ({"pairs_per_clip": 0}, "pairs_per_clip must be at least 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        PickFrames(**settings)
