import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.training.cropping import choose_crop, crop_boxes, size_with_short_side, visible_shares


@st.composite
def layouts(draw, max_subjects=4):
    """(boxes, size, side): normalised boxes in a picture whose short side is the side of the crop."""
    side = draw(st.sampled_from([8, 64, 96]))
    long = side + draw(st.integers(0, 3 * side))
    size = (long, side) if draw(st.booleans()) else (side, long)
    edges = st.integers(0, 97)
    boxes = []
    for _ in range(draw(st.integers(1, max_subjects))):
        x1, y1 = draw(edges), draw(edges)
        boxes.append([x1, y1, draw(st.integers(x1 + 3, 100)), draw(st.integers(y1 + 3, 100))])
    return np.array(boxes, dtype=np.float32) / 100, size, side


@given(layouts(), st.floats(0, 1), st.floats(0, 1))
def test_boxes_follow_the_crop_exactly(layout, down, right):
    boxes, (width, height), side = layout
    top, left = round(down * (height - side)), round(right * (width - side))
    cropped = crop_boxes(boxes, (width, height), (top, left), side)
    pixels = boxes.astype(np.float64) * [width, height, width, height]
    # a box edge that can be seen in the crop stays on the same pixel, the others lie on the crop's border
    expected = np.clip(pixels, [left, top, left, top], [left + side, top + side] * 2)
    np.testing.assert_allclose(cropped * side + [left, top, left, top], expected, atol=1e-3)


@given(layouts())
def test_a_box_is_on_the_same_pixels_as_before(layout):
    boxes, (width, height), side = layout
    pixels = np.round(boxes * [width, height, width, height]).astype(int)
    boxes = pixels / np.array([width, height, width, height])  # whole pixels, so that the comparison is exact
    picture = np.zeros((len(boxes), height, width), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(picture, pixels, strict=True):
        mask[y1:y2, x1:x2] = True
    top, left = (height - side) // 2, (width - side) // 2
    cropped = np.round(crop_boxes(boxes, (width, height), (top, left), side) * side).astype(int)
    for mask, (x1, y1, x2, y2) in zip(picture[:, top : top + side, left : left + side], cropped, strict=True):
        drawn = np.zeros((side, side), dtype=bool)
        drawn[y1:y2, x1:x2] = True
        np.testing.assert_array_equal(drawn, mask)


@given(layouts(), st.floats(0, 1), st.one_of(st.none(), st.integers(0, 2**32)))
def test_every_subject_that_stays_can_be_seen(layout, minimum_visible, seed):
    boxes, size, side = layout
    generator = None if seed is None else np.random.default_rng(seed)
    (top, left), kept = choose_crop(boxes, size, side, minimum_visible, generator)
    assert 0 <= top <= size[1] - side
    assert 0 <= left <= size[0] - side
    assert len(kept) >= 1
    cropped = crop_boxes(boxes[kept], size, (top, left), side)
    assert np.all(cropped[:, 2:] > cropped[:, :2])
    visible = visible_shares(boxes[kept], cropped, size, side)
    largest = np.argmax(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    assert np.all((visible >= minimum_visible - 1e-4) | (kept == largest))


def test_a_subject_cut_away_is_dropped():
    boxes = np.array([[0.4, 0.2, 0.6, 0.8], [0.0, 0.2, 0.2, 0.8]])
    (top, left), kept = choose_crop(boxes, (192, 64), 64, 0.25, None)
    assert (top, left) == (0, 64)
    assert kept.tolist() == [0]


def test_a_crop_that_loses_everybody_moves_to_the_largest():
    boxes = np.array([[0.0, 0.2, 0.2, 0.8], [0.9, 0.4, 1.0, 0.6]])
    (top, left), kept = choose_crop(boxes, (192, 64), 64, 0.25, None)
    assert (top, left) == (0, 0)
    assert kept.tolist() == [0]


def test_a_subject_larger_than_any_crop_stays():
    (_, left), kept = choose_crop(np.array([[0.0, 0.0, 1.0, 1.0]]), (256, 64), 64, 0.5, None)
    assert left == 96
    assert kept.tolist() == [0]


def test_random_crops_reach_both_ends():
    boxes = np.array([[0.0, 0.0, 1.0, 1.0]])
    generator = np.random.default_rng(0)
    lefts = {choose_crop(boxes, (67, 64), 64, 0.0, generator)[0][1] for _ in range(100)}
    assert lefts == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("size", "expected"),
    [((128, 128), (64, 64)), ((640, 360), (114, 64)), ((32, 48), (64, 96)), ((1000, 999), (64, 64))],
)
def test_short_side_is_exact(size, expected):
    assert size_with_short_side(*size, 64) == expected
