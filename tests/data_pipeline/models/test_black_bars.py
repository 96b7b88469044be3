import numpy as np
import pytest

from data_pipeline.models.black_bars import find_bars, may_have_bars


def scene(frames=5, height=96, width=160, seed=0):
    """Smooth pictures, brighter than black nearly everywhere."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 255, (frames, height // 16, width // 16, 3))
    return coarse.repeat(16, axis=1).repeat(16, axis=2).astype(np.uint8)


def barred(left=0, top=0, right=0, bottom=0, noise=0):
    pictures = np.pad(scene(), ((0, 0), (top, bottom), (left, right), (0, 0)))
    return np.maximum(pictures, np.random.default_rng(1).integers(0, noise + 1, pictures.shape)).astype(np.uint8)


@pytest.mark.parametrize("noise", [0, 12])
@pytest.mark.parametrize(
    "bars",
    [(0, 12, 0, 12), (20, 0, 20, 0), (20, 12, 20, 12), (0, 12, 0, 0), (0, 7, 0, 30), (30, 0, 0, 0), (0, 0, 0, 0)],
)
def test_bars_are_found_to_the_pixel(bars, noise):
    left, top, right, bottom = bars
    assert find_bars(barred(left, top, right, bottom, noise)) == bars


def test_a_dark_frame_among_others_hides_nothing():
    pictures = barred(top=12, bottom=12)
    pictures[1] = 0
    assert find_bars(pictures) == (0, 12, 0, 12)
    assert find_bars(pictures[1:2]) == (0, 0, 0, 0)


def test_dark_pictures_have_no_bars():
    night = np.linspace(0, 120, 96)[:, None, None].repeat(160, 1).repeat(3, 2).astype(np.uint8)
    assert find_bars([night]) == (0, 0, 0, 0)
    spot = np.zeros((96, 160, 3), np.uint8)
    spot[40:60, 70:90] = 255  # a lamp in the night
    assert find_bars([spot]) == (0, 0, 0, 0)
    stage = np.zeros((96, 160, 3), np.uint8)
    stage[70:] = 200  # more than MOST of it is dark
    assert find_bars([stage]) == (0, 0, 0, 0)


def test_thumbnails_tell_what_to_look_at():
    assert not may_have_bars(scene(height=32, width=32))
    pictures = scene(height=32, width=32)
    pictures[:, :, -1] = 10
    assert may_have_bars(pictures)
    pictures[2, 5, -1] = 90  # in one frame something is seen there
    assert not may_have_bars(pictures)
