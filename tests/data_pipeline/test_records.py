import numpy as np
import pytest

from data_pipeline.errors import ClipError
from data_pipeline.records import box_in_pixels, box_intersection, box_iou, cut_out, decode_mask, encode_mask, mask_box


@pytest.mark.parametrize("counts", [[2**62] * 4 + [16], [-1, 17], [[16]], [17]])
def test_run_lengths_that_do_not_fill_the_size_are_refused(counts):
    with pytest.raises(ClipError, match="unreadable mask"):
        decode_mask({"size": [4, 4], "counts": counts})


def test_run_lengths_go_down_the_columns_and_start_with_zeros():
    mask = np.array([[0, 1, 1], [0, 0, 1]], dtype=bool)
    assert encode_mask(mask) == {"size": [2, 3], "counts": [2, 1, 1, 2]}
    assert encode_mask(~mask) == {"size": [2, 3], "counts": [0, 2, 1, 1, 2]}


@pytest.mark.parametrize("seed", range(8))
def test_masks_come_back_from_run_lengths(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((rng.integers(1, 40), rng.integers(1, 40))) < rng.random()
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_run_lengths_equal_those_of_pycocotools():
    tools = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(0).random((17, 23)) < 0.4
    theirs = tools.frPyObjects(encode_mask(mask), 17, 23)
    assert np.array_equal(tools.decode(theirs).astype(bool), mask)


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [2, 3], "counts": [5]},
        {"size": [2, 3], "counts": [7, -1]},
        {"size": [2, 3]},
        {"size": [2], "counts": [2]},
        {"size": [2, 3], "counts": "PYn1"},
    ],
)
def test_bad_run_lengths_are_refused(rle):
    with pytest.raises(ClipError, match="unreadable mask"):
        decode_mask(rle)


def test_a_mask_has_two_axes():
    with pytest.raises(ValueError, match=r"two axes, got the shape \(2, 3, 4\)"):
        encode_mask(np.zeros((2, 3, 4), dtype=bool))


def test_box_of_a_mask_is_tight():
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 4:16] = True
    assert mask_box(mask) == (0.2, 0.2, 0.8, 0.5)
    with pytest.raises(ValueError, match="empty mask"):
        mask_box(np.zeros((3, 3), dtype=bool))


def test_overlap_of_boxes():
    assert box_intersection((0, 0, 0.5, 1), (0.25, 0, 1, 1)) == pytest.approx(0.25)
    assert box_iou((0, 0, 0.5, 1), (0.25, 0, 1, 1)) == pytest.approx(0.25)
    assert box_iou((0, 0, 0.2, 0.2), (0.5, 0.5, 1, 1)) == 0
    assert box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_pixels_of_a_box_are_rounded_outwards_and_stay_in_the_frame():
    assert box_in_pixels((0.11, 0.19, 0.51, 0.99), 10, 10) == (1, 1, 6, 10)
    assert box_in_pixels((-0.2, 0.0, 1.3, 1.0), 10, 10) == (0, 0, 10, 10)
    for x in range(128):  # whole pixels stay whole, whatever the division does to them
        assert box_in_pixels((x / 128, 0, (x + 1) / 128, 1), 128, 7) == (x, 0, x + 1, 7)


def test_cut_out_shows_nothing_outside_the_mask():
    image = np.full((4, 4, 3), 200, dtype=np.uint8)
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 1:3] = mask[2, 1] = True
    pixels = cut_out(image, mask, mask_box(mask))
    assert pixels.shape == (2, 2, 4)
    assert pixels[0, 0].tolist() == [200, 200, 200, 255]
    assert pixels[1, 1].tolist() == [0, 0, 0, 0]
