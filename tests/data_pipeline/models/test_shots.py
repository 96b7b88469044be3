from functools import partial

import numpy as np
import pytest
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, StatsManager, ThresholdDetector

from data_pipeline.models import shots
from data_pipeline.models.shots import changes, find_cuts

find = partial(find_cuts, cut_ratio=3.0, min_content=20.0, fade_level=12)


def scene(seed, frames, drift=0):
    """A coarse random picture whose light changes a little and which drifts sideways. Returns uint8 (F, 32, 32, 3)."""
    rng = np.random.default_rng(seed)
    low, high = [(20, 120), (120, 235)][seed % 2]
    picture = rng.integers(low, high, (8, 8, 3)).repeat(4, 0).repeat(4, 1)
    moved = [np.roll(picture, drift * i, axis=1) + rng.integers(0, 4) for i in range(frames)]
    return np.stack(moved).clip(0, 255).astype(np.uint8)


def blend(first, second, weights):
    weights = np.asarray(weights)[:, None, None, None]
    return (first * (1 - weights) + second * weights).astype(np.uint8)


def test_changes_are_those_that_the_library_measures():
    pictures = np.concatenate((scene(0, 4, drift=3), scene(1, 3), np.zeros((2, 32, 32, 3), np.uint8)))
    detector = ContentDetector(threshold=255)
    stats = detector.stats_manager = StatsManager()
    for number, picture in enumerate(pictures):
        detector.process_frame(FrameTimecode(number, 25.0), np.ascontiguousarray(picture[..., ::-1]))
    key = ContentDetector.FRAME_SCORE_KEY
    wanted = [stats.get_metrics(FrameTimecode(number, 25.0), [key])[0] for number in range(1, len(pictures))]
    assert changes(pictures).tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_seen_at_once_is_what_the_library_finds_frame_by_frame(seed):
    rng = np.random.default_rng(seed)
    parts = [scene(int(rng.integers(50)), int(rng.integers(1, 9)), int(rng.integers(3))) for _ in range(3)]
    pictures = np.concatenate([(part * rng.uniform(0, 1)).astype(np.uint8) for part in parts])
    if seed % 2:
        pictures = 255 - pictures
    found = find(pictures)
    still = np.concatenate((pictures[:1].repeat(2, 0), pictures, pictures[-1:].repeat(2, 0)))
    wanted = shots._detect(
        AdaptiveDetector(adaptive_threshold=3.0, min_content_val=20.0, window_width=2, min_scene_len=0), still
    )
    for threshold, side in ((12, "FLOOR"), (243, "CEILING")):
        method = ThresholdDetector.Method[side]
        wanted |= shots._detect(ThresholdDetector(threshold=threshold, method=method, min_scene_len=0), still)
    assert found == sorted(number - 2 for number in wanted if 0 < number - 2 < len(pictures))


def test_cuts_are_found_at_their_frames():
    assert find(np.concatenate((scene(0, 10), scene(1, 7), scene(2, 5)))) == [10, 17]


@pytest.mark.parametrize("place", [1, 2, 3, 10, 18, 19])
def test_a_cut_near_either_end_is_found(place):
    assert find(np.concatenate((scene(0, place), scene(1, 20 - place)))) == [place]


def test_two_frames_and_one():
    assert find(np.concatenate((scene(0, 1), scene(1, 1)))) == [1]
    assert find(scene(0, 1)) == []


@pytest.mark.parametrize(("level", "seed"), [(0, 0), (255, 1)], ids=["black", "white"])
def test_a_fade_through_black_or_white_is_one_cut_in_its_middle(level, seed):
    plain = np.full((1, 32, 32, 3), level, np.uint8)
    away = np.linspace(0, 1, 8)
    # Grey, since near black the hue leaps and is itself a change.
    first, second = (scene(each, 30)[..., :1].repeat(3, -1) for each in (seed, seed + 2))
    pictures = np.concatenate(
        (first[:15], blend(first[15:23], plain, away), blend(second[:8], plain, away[::-1]), second[8:])
    )
    [cut] = find(pictures)
    assert 21 <= cut <= 25
    # Every step of this fade is too small and too much like its neighbours to be a cut.
    assert find(pictures, fade_level=0) == []


def test_a_fade_in_at_the_start_is_no_cut():
    away = np.linspace(0, 1, 8)
    first = scene(0, 20)[..., :1].repeat(3, -1)
    assert find(np.concatenate((blend(np.zeros_like(first[:8]), first[:8], away), first))) == []


@pytest.mark.parametrize(
    "pictures",
    [
        scene(0, 20),
        scene(0, 20, drift=4),
        (scene(1, 12).astype(int) + np.repeat([0, -20], 6)[:, None, None, None]).clip(0, 255).astype(np.uint8),
        np.stack([scene(i, 1)[0] for i in range(20)]),
    ],
    ids=["standing still", "fast motion", "a lamp goes out", "constant flicker"],
)
def test_no_cut(pictures):
    assert find(pictures) == []


def test_each_condition_is_needed():
    pictures = np.concatenate((scene(0, 10, drift=1), scene(1, 10, drift=1)))
    assert find(pictures) == [10]
    assert find(pictures, min_content=250.0) == []
    assert find(pictures, cut_ratio=1000.0) == []
