import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_pipeline.models.picture_quality import (
    CHANGE_SIDE,
    SIDE,
    change,
    clipped_share,
    look_at,
    percentiles,
    sharpness,
)


@pytest.fixture
def picture():
    """Squares of several greys and sizes, uint8 (224, 224, 3)."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (14, 14, 1), dtype=np.uint8).repeat(16, 0).repeat(16, 1).repeat(3, 2)


def blurred(picture, radius):
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def test_sharpness_falls_with_blur(picture):
    values = [sharpness(picture), *(sharpness(blurred(picture, radius)) for radius in (1, 2, 4))]
    assert values[0] > 0.5
    assert values == sorted(values, reverse=True)
    assert values[3] < values[0] / 10


def test_blur_in_one_direction_is_blur(picture):
    smeared = np.stack([np.roll(picture, i, axis=1) for i in range(16)]).mean(axis=0).astype(np.uint8)
    assert sharpness(smeared) < sharpness(picture) / 4
    assert sharpness(smeared) == pytest.approx(sharpness(smeared.swapaxes(0, 1)))


def test_a_plain_surface_with_a_clear_outline_is_sharp():
    plain = np.full((100, 100, 3), 200, np.uint8)
    plain[20:80, 20:80] = 90
    assert sharpness(plain) == pytest.approx(1)


def test_sharpness_does_not_depend_on_contrast_but_noise_of_a_wall_is_none(picture):
    assert sharpness(picture // 2) == pytest.approx(sharpness(picture), rel=0.05)
    noise = np.random.default_rng(0).integers(126, 130, (224, 224, 1), dtype=np.uint8).repeat(3, 2)
    assert sharpness(noise) < 0.3 < sharpness((noise.astype(int) - 126).astype(np.uint8) * 60)


def test_large_pictures_are_measured_small_and_small_ones_as_they_are(picture):
    large = picture.repeat(3, 0).repeat(3, 1)
    assert sharpness(large) == pytest.approx(sharpness(picture))
    assert sharpness(picture[:50, :50]) > 0.5
    assert max(large.shape) > SIDE


def test_nothing_to_measure():
    assert sharpness(np.zeros((4, 50, 3), np.uint8)) == 0
    assert sharpness(np.zeros((50, 50, 3), np.uint8)) == 0
    assert clipped_share(np.zeros((0, 3), np.uint8)) == 0


def test_looks(picture):
    looks = look_at(picture)
    assert looks.sharpness == sharpness(picture)
    assert looks.brightness == pytest.approx(picture.mean() / 255, abs=1e-3)
    assert looks.small.shape == (CHANGE_SIDE, CHANGE_SIDE, 3)
    assert look_at(np.full((9, 9, 3), 255, np.uint8)).brightness == 1


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_counted_percentiles_are_those_of_sorting_bit_for_bit(kind):
    if kind is np.float32 and np.lib.NumpyVersion(np.__version__) < "2.4.0":
        pytest.skip("numpy before 2.4 rounds the last bit otherwise")
    rng = np.random.default_rng(1)
    for size in (1, 2, 3, 99, 100, 101, 102, 5000):
        for most in (1, 3, 511):
            values = rng.integers(0, most, size)
            for rank in (0, 1, 37.5, 50, 99, 100):
                # numpy counts a rank in double precision if it comes in an array.
                asked = (rank,) if kind is np.float64 else rank
                wanted = np.percentile(values.astype(np.float32), asked)
                [found] = percentiles(values, (rank,), kind)
                assert (found, type(found)) == (np.asarray(wanted).item(), kind), (size, most, rank)


def test_change_counts_the_tenth_that_changed_most():
    first = np.zeros((CHANGE_SIDE, CHANGE_SIDE, 3), np.float32)
    second = first.copy()
    assert change(first, second) == 0
    second.reshape(-1, 3)[:51] = 1  # half of a tenth of 1024
    assert change(first, second) == pytest.approx(0.5)
    second[:] = 0.25
    assert change(first, second) == pytest.approx(0.25)


def test_clipped_are_black_and_white_not_colours():
    pixels = np.array([[0, 0, 0], [6, 2, 0], [255, 250, 249], [255, 0, 0], [7, 7, 7], [248, 255, 255]], np.uint8)
    assert clipped_share(pixels) == pytest.approx(3 / 6)
