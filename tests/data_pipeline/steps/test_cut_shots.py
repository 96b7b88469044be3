import numpy as np
import pytest

from data_pipeline.records import Rejected, SettingsError
from data_pipeline.sources import find_videos
from data_pipeline.steps.cut_shots import CutShots, soft_histogram
from data_pipeline.steps.read_videos import ReadVideos


def scene(seed, frames, drift=0):
    """A coarse random picture whose light changes a little and which drifts sideways."""
    rng = np.random.default_rng(seed)
    low, high = [(0, 120), (120, 255)][seed % 2]
    picture = rng.integers(low, high, (8, 8, 3)).repeat(4, 0).repeat(4, 1)
    moved = [np.roll(picture, drift * i, axis=1) + rng.integers(0, 4) for i in range(frames)]
    return np.stack(moved).clip(0, 255).astype(np.uint8)


def test_a_cut_is_found_at_its_frame():
    assert CutShots().cuts(np.concatenate((scene(0, 10), scene(1, 7), scene(2, 5)))) == [10, 17]


def test_motion_is_no_cut():
    assert CutShots().cuts(scene(0, 20, drift=4)) == []


def test_a_change_of_light_is_no_cut():
    pictures = scene(0, 12)
    pictures[6:] = (pictures[6:].astype(int) + 12).clip(0, 255)
    assert CutShots().cuts(pictures) == []


def test_constant_flicker_is_no_cut():
    pictures = np.stack([scene(i, 1)[0] for i in range(20)])
    assert CutShots().cuts(pictures) == []


def test_each_condition_is_needed():
    pictures = np.concatenate((scene(0, 10), scene(1, 10)))
    assert CutShots(min_histogram_change=1.0).cuts(pictures) == []
    assert CutShots(min_pixel_change=1.0).cuts(pictures) == []
    assert CutShots().cuts(pictures) == [10]


def test_two_frames_and_one():
    assert CutShots().cuts(np.concatenate((scene(0, 1), scene(1, 1)))) == [1]
    assert CutShots().cuts(scene(0, 1)) == []


def test_histogram_shares_values_between_bins():
    plain = [soft_histogram(np.full((4, 4, 3), value, dtype=np.uint8)) for value in (100, 103, 255)]
    assert np.allclose([histogram.sum(axis=1) for histogram in plain], 1)
    assert 0.5 * np.abs(plain[0] - plain[1]).sum(axis=1).max() < 0.2


def process(step, folder):
    read = ReadVideos()
    for each in (read, step):
        each.setup()
    return step.process(read.process(find_videos(folder)[0]))


def test_a_video_without_a_cut_is_one_shot(write_clip, tmp_path):
    write_clip(tmp_path)
    [shot] = process(CutShots(), tmp_path).shots
    assert (shot.first, shot.last, shot.start, shot.end) == (0, 11, 0.0, 1.375)


def test_later_frames_are_not_used(write_clip, tmp_path):
    write_clip(tmp_path)
    [shot] = process(CutShots(max_frames=5), tmp_path).shots
    assert (shot.first, shot.last) == (0, 4)


def test_a_single_frame(write_clip, tmp_path):
    write_clip(tmp_path, num_frames=1)
    rejected = process(CutShots(), tmp_path)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "a single frame"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_histogram_change": 0}, r"min_histogram_change must lie in \(0, 1\], got 0"),
        ({"min_pixel_change": 1.5}, "min_pixel_change must lie in"),
        ({"times_neighbours": 0.5}, "times_neighbours must be at least 1, got 0.5"),
        ({"thumbnail": 4}, "thumbnail must be at least 8"),
        ({"max_frames": 1}, "and max_frames 2, got 32 and 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        CutShots(**settings)
