import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msdiffusion.errors import RequestError
from msdiffusion.training.samples.cropping import (
    bucket_sizes,
    choose_crop,
    crop_boxes,
    nearest_buckets,
    size_that_covers,
    visible_shares,
)


@st.composite
def layouts(draw, max_subjects=4):
    """(boxes, size, crop): normalised boxes in a picture that covers the crop, one side of it exactly."""
    crop = draw(st.tuples(*[st.sampled_from([8, 56, 64, 96])] * 2))
    rest = draw(st.integers(0, 3 * max(crop)))
    size = (crop[0] + rest, crop[1]) if draw(st.booleans()) else (crop[0], crop[1] + rest)
    edges = st.integers(0, 97)
    boxes = []
    for _ in range(draw(st.integers(1, max_subjects))):
        x1, y1 = draw(edges), draw(edges)
        boxes.append([x1, y1, draw(st.integers(x1 + 3, 100)), draw(st.integers(y1 + 3, 100))])
    return np.array(boxes, dtype=np.float32) / 100, size, crop


uniforms = st.floats(0, 1, exclude_max=True)


@given(layouts(), uniforms, uniforms)
def test_boxes_follow_the_crop_exactly(layout, down, right):
    boxes, (width, height), crop = layout
    top, left = round(down * (height - crop[1])), round(right * (width - crop[0]))
    cropped = crop_boxes(boxes, (width, height), (top, left), crop)
    pixels = boxes.astype(np.float64) * [width, height, width, height]
    # a box edge that can be seen in the crop stays on the same pixel, the others lie on the crop's border
    expected = np.clip(pixels, [left, top, left, top], [left + crop[0], top + crop[1]] * 2)
    np.testing.assert_allclose(cropped * [*crop, *crop] + [left, top, left, top], expected, atol=1e-3)


@given(layouts())
def test_a_box_is_on_the_same_pixels_as_before(layout):
    boxes, (width, height), crop = layout
    pixels = np.round(boxes * [width, height, width, height]).astype(int)
    boxes = pixels / np.array([width, height, width, height])  # whole pixels, so that the comparison is exact
    picture = np.zeros((len(boxes), height, width), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(picture, pixels, strict=True):
        mask[y1:y2, x1:x2] = True
    top, left = (height - crop[1]) // 2, (width - crop[0]) // 2
    cropped = np.round(crop_boxes(boxes, (width, height), (top, left), crop) * [*crop, *crop]).astype(int)
    for mask, (x1, y1, x2, y2) in zip(picture[:, top : top + crop[1], left : left + crop[0]], cropped, strict=True):
        drawn = np.zeros((crop[1], crop[0]), dtype=bool)
        drawn[y1:y2, x1:x2] = True
        np.testing.assert_array_equal(drawn, mask)


@given(layouts(), st.floats(0, 1), st.one_of(st.none(), st.tuples(uniforms, uniforms)))
def test_every_subject_that_stays_can_be_seen(layout, minimum_visible, where):
    boxes, size, crop = layout
    (top, left), kept = choose_crop(boxes, size, crop, minimum_visible, None if where is None else np.array(where))
    assert 0 <= top <= size[1] - crop[1]
    assert 0 <= left <= size[0] - crop[0]
    assert len(kept) >= 1
    cropped = crop_boxes(boxes[kept], size, (top, left), crop)
    assert np.all(cropped[:, 2:] > cropped[:, :2])
    visible = visible_shares(boxes[kept], cropped, size, crop)
    largest = np.argmax(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    assert np.all((visible >= minimum_visible - 1e-4) | (kept == largest))


def test_a_subject_cut_away_is_dropped():
    boxes = np.array([[0.4, 0.2, 0.6, 0.8], [0.0, 0.2, 0.2, 0.8]])
    (top, left), kept = choose_crop(boxes, (192, 64), (64, 64), 0.25)
    assert (top, left) == (0, 64)
    assert kept.tolist() == [0]


def test_a_box_without_area_is_not_visible():
    boxes = np.array([[0.5, 0.2, 0.5, 0.8], [0.25, 0.25, 0.75, 0.75]], dtype=np.float32)
    with np.errstate(all="raise"):
        shares = visible_shares(boxes, boxes, (64, 64), (64, 64))
    assert shares.tolist() == [0, 1]


def test_a_crop_that_loses_everybody_moves_to_the_largest():
    boxes = np.array([[0.0, 0.2, 0.2, 0.8], [0.9, 0.4, 1.0, 0.6]])
    (top, left), kept = choose_crop(boxes, (192, 64), (64, 64), 0.25)
    assert (top, left) == (0, 0)
    assert kept.tolist() == [0]


def test_a_subject_larger_than_any_crop_stays():
    (_, left), kept = choose_crop(np.array([[0.0, 0.0, 1.0, 1.0]]), (256, 64), (64, 64), 0.5)
    assert left == 96
    assert kept.tolist() == [0]


def test_random_crops_reach_both_ends():
    boxes = np.array([[0.0, 0.0, 1.0, 1.0]])
    generator = np.random.default_rng(0)
    lefts = {choose_crop(boxes, (67, 64), (64, 64), 0.0, generator.random(2))[0][1] for _ in range(100)}
    assert lefts == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("size", "expected"),
    [((128, 128), (64, 64)), ((640, 360), (114, 64)), ((32, 48), (64, 96)), ((1000, 999), (64, 64))],
)
def test_short_side_is_exact(size, expected):
    assert size_that_covers(*size, (64, 64)) == expected


sides = st.integers(1, 3000)


@given(sides, sides, st.tuples(sides, sides))
def test_a_resize_covers_the_crop_and_no_more(width, height, crop):
    covering = size_that_covers(width, height, crop)
    assert covering[0] >= crop[0]
    assert covering[1] >= crop[1]
    assert covering[0] == crop[0] or covering[1] == crop[1]
    scale = max(crop[0] / width, crop[1] / height)
    assert abs(covering[0] - width * scale) <= 1
    assert abs(covering[1] - height * scale) <= 1


@given(st.integers(1, 40), st.sampled_from([8, 16, 64]))
def test_buckets_are_as_promised(steps, step):
    resolution = steps * step
    sizes = bucket_sizes(resolution, step)
    assert [resolution, resolution] in sizes.tolist()
    assert (sizes % step == 0).all()
    assert (sizes.prod(1) <= resolution**2).all()
    aspects = sizes[:, 0] / sizes[:, 1]
    assert (aspects >= 0.5).all()
    assert (aspects <= 2).all()
    assert (np.diff(aspects) > 0).all(), "two sizes of one aspect, or out of order"
    assert {tuple(size) for size in sizes.tolist()} == {tuple(size[::-1]) for size in sizes.tolist()}
    # of each, no side can grow by a step on both counts: width for its height or height for its width is the greatest
    wider, higher = (sizes[:, 0] + step) * sizes[:, 1], sizes[:, 0] * (sizes[:, 1] + step)
    assert ((wider > resolution**2) | (higher > resolution**2)).all()


def test_buckets_of_sdxl():
    assert bucket_sizes(1024, 64).tolist() == [
        [704, 1408], [768, 1344], [768, 1280], [832, 1216], [896, 1152], [960, 1088], [1024, 1024],
        [1088, 960], [1152, 896], [1216, 832], [1280, 768], [1344, 768], [1408, 704],
    ]  # fmt: skip


def test_one_step_of_the_resolution_is_the_square_alone():
    assert bucket_sizes(64, 64).tolist() == [[64, 64]]


@pytest.mark.parametrize("step", [0, -8, 48])
def test_a_step_that_does_not_fit_is_refused(step):
    with pytest.raises(RequestError, match="resolution must be a multiple of bucket_step, got 64 and"):
        bucket_sizes(64, step)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=20))
def test_a_picture_goes_to_the_nearest_aspect(pictures):
    buckets = bucket_sizes(512, 64)
    chosen = nearest_buckets(np.array(pictures, dtype=np.int32), buckets)
    for (width, height), bucket in zip(pictures, chosen, strict=True):
        distances = np.abs(np.log((width / height) / (buckets[:, 0] / buckets[:, 1])))
        assert distances[bucket] <= distances.min() + 1e-9


def test_of_equally_near_buckets_the_higher_is_taken():
    assert nearest_buckets(np.array([[100, 100], [101, 100]]), np.array([[32, 64], [128, 64]])).tolist() == [0, 1]
