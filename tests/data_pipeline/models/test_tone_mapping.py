import numpy as np
import pytest

from data_pipeline.models.tone_mapping import (
    KNEE,
    ROWS,
    TO_BT709,
    bend,
    linear_light,
    peak_of,
    to_bt709,
)

# Light as a multiple of reference white, by the standards' own formulas in the other direction.
COLOURS = [(200, 40, 60), (20, 200, 40), (10, 30, 220), (128, 128, 128), (0, 0, 0), (220, 180, 90)]


def srgb_light(colour):
    value = np.asarray(colour) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def pq(light):
    power = (np.asarray(light) * 203 / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light):
    scene = np.asarray(light) * 0.26496256
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


CODES = {"PQ": pq, "HLG": hlg}


def signal(colour, transfer, primaries=9):
    """16 bit signal of an sRGB colour whose white is reference white."""
    light = np.linalg.inv(TO_BT709[primaries]) @ srgb_light(colour)
    return np.round(CODES[transfer](np.maximum(light, 0)) * 65535).astype(np.uint16).reshape(1, 1, 3)


@pytest.mark.parametrize("primaries", [9, 12])
@pytest.mark.parametrize("transfer", CODES)
@pytest.mark.parametrize("colour", COLOURS)
def test_colours_below_the_knee_come_out_as_they_are_in_sdr(colour, transfer, primaries):
    [[found]] = to_bt709(signal(colour, transfer, primaries), transfer, primaries)
    assert np.abs(found.astype(int) - colour).max() <= 1


def test_a_wide_gamut_in_sdr():
    red = np.full((1, 1, 3), (200 * 257, 40 * 257, 60 * 257), dtype=np.uint16)
    assert to_bt709(red, "SDR", 1).tolist() == [[[200, 40, 60]]]
    [[found]] = to_bt709(red, "SDR", 9)
    assert found.tolist() == [249, 0, 55]  # redder than BT.709's (200, 40, 60)
    white = np.full((1, 1, 3), 65535, dtype=np.uint16)
    assert to_bt709(white, "SDR", 9).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("transfer", CODES)
def test_highlights_are_squeezed_in_order_and_keep_their_hue(transfer):
    light = np.linspace(0, 1.2 * peak_of(transfer), 400)
    bent = bend(light, peak_of(transfer))
    assert np.array_equal(bent[light <= KNEE], light[light <= KNEE])
    assert (np.diff(bent[light < peak_of(transfer)]) > 0).all()
    assert bent.max() == pytest.approx(1)
    assert bend(np.array([KNEE, KNEE + 1e-4]), 4.0)[1] - KNEE == pytest.approx(1e-4, rel=1e-2)  # without a kink
    white = np.round(CODES[transfer](np.ones(3)) * 65535).astype(np.uint16).reshape(1, 1, 3)
    assert 238 <= to_bt709(white, transfer, 9).min() <= to_bt709(white, transfer, 9).max() <= 243
    lamp = np.round(CODES[transfer](np.array([3.0, 1.5, 0.75])) * 65535).astype(np.uint16).reshape(1, 1, 3)
    red, green, blue = srgb_light(to_bt709(lamp, transfer, 1)[0, 0])
    assert red / green == pytest.approx(2, rel=0.05)
    assert green / blue == pytest.approx(2, rel=0.05)


def test_the_anchors_of_the_standards():
    assert linear_light(np.array(0.5806888), "PQ") * 203 == pytest.approx(203, rel=1e-4)
    assert linear_light(np.array(1.0), "PQ") * 203 == pytest.approx(10000)
    assert linear_light(np.array(0.75), "HLG") == pytest.approx(1)
    assert linear_light(np.array(0.38), "HLG") == pytest.approx(0.18, abs=0.005)  # an 18 % grey card


def test_pictures_of_any_height():
    picture = np.random.default_rng(0).integers(0, 65536, (ROWS + 3, 5, 3)).astype(np.uint16)
    whole = to_bt709(picture, "PQ", 9)
    assert (whole.shape, whole.dtype) == (picture.shape, np.uint8)
    assert np.array_equal(whole[-1:], to_bt709(picture[-1:], "PQ", 9))
