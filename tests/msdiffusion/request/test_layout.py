import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdiffusion.errors import LayoutError, MSDiffusionError
from msdiffusion.request.layout import check_box, grid_of, patch_masks, pool_masks

sides = st.integers(1, 40)
fractions = st.floats(0, 1, width=32)


@st.composite
def box_tensors(draw):
    count = draw(st.integers(1, 4))
    boxes = [
        sorted(draw(st.tuples(fractions, fractions))) + sorted(draw(st.tuples(fractions, fractions)))
        for _ in range(count)
    ]
    return torch.tensor([[x1, y1, x2, y2] for x1, x2, y1, y2 in boxes])[None]


@settings(deadline=None, max_examples=50)
@given(box_tensors(), sides, sides)
def test_masks_equal_a_loop_over_patches(boxes, height, width):
    masks = patch_masks(boxes, height, width).view(1, -1, height, width)
    for box, mask in zip(boxes[0], masks[0], strict=True):
        expected = torch.zeros(height, width, dtype=torch.bool)
        x1, y1, x2, y2 = box.numpy()
        if x2 > x1 and y2 > y1:
            scale_x, scale_y = np.float32(width), np.float32(height)
            for row in range(math.floor(y1 * scale_y), math.ceil(y2 * scale_y)):
                for column in range(math.floor(x1 * scale_x), math.ceil(x2 * scale_x)):
                    expected[row, column] = True
        assert torch.equal(mask, expected)


@settings(deadline=None, max_examples=50)
@given(box_tensors(), sides, sides)
def test_a_box_with_area_always_covers_a_patch_and_an_empty_one_never(boxes, height, width):
    has_area = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    assert torch.equal(patch_masks(boxes, height, width).any(-1), has_area)


@settings(deadline=None, max_examples=50)
@given(box_tensors(), sides, sides)
def test_mirroring_rows_and_columns_transposes_the_mask(boxes, height, width):
    mask = patch_masks(boxes, height, width).view(1, -1, height, width)
    swapped = patch_masks(boxes[..., [1, 0, 3, 2]], width, height).view(1, -1, width, height)
    assert torch.equal(mask, swapped.transpose(-1, -2))


@settings(deadline=None, max_examples=50)
@given(box_tensors(), st.integers(1, 12), st.integers(1, 12))
def test_a_coarser_grid_covers_what_the_finer_one_does(boxes, height, width):
    fine = patch_masks(boxes, 2 * height, 2 * width).view(1, -1, height, 2, width, 2).any(dim=5).any(dim=3)
    assert torch.equal(fine, patch_masks(boxes, height, width).view(1, -1, height, width))


def test_the_whole_picture_covers_every_patch():
    assert patch_masks(torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]), 7, 5).all()


def test_half_precision_boxes_are_measured_in_float32():
    box = torch.tensor([[[0.125, 0.25, 0.5, 0.75]]])  # exact in half precision
    assert torch.equal(patch_masks(box.half(), 96, 96), patch_masks(box, 96, 96))


def test_a_mask_of_a_box_pools_to_the_patches_of_the_box():
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 10:30, 5:61] = True
    box = torch.tensor([[[5 / 64, 10 / 64, 61 / 64, 30 / 64]]])
    assert torch.equal(pool_masks(mask, 16, 16), patch_masks(box, 16, 16))


@pytest.mark.parametrize(
    ("patches", "latent", "grid"),
    [
        (1024, (32, 32), (32, 32)),
        (256, (32, 32), (16, 16)),
        (35, (9, 13), (5, 7)),
        (12, (9, 13), (3, 4)),
        (1, (5, 3), (1, 1)),
    ],
)
def test_grid_follows_from_latent_and_patches(patches, latent, grid):
    assert grid_of(patches, *latent) == grid


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(1, 200))
def test_every_level_of_a_latent_is_found(height, width):
    rows, columns = height, width
    while (rows, columns) != (1, 1):
        assert grid_of(rows * columns, height, width) == (rows, columns)
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)


def test_a_grid_of_another_latent_is_refused():
    with pytest.raises(LayoutError, match="32 x 32.*100 patches"):
        grid_of(100, 32, 32)


def test_good_boxes_come_back_as_tuples():
    expected = (0.0, 0.25, 0.5, 0.75)
    assert check_box([0, 0.25, 0.5, 0.75], "box") == expected
    assert check_box(np.array([0, 0.25, 0.5, 0.75]), "box") == expected
    assert check_box(torch.tensor([0, 0.25, 0.5, 0.75]), "box") == expected
    assert check_box([0.5, 0, 0.5, 1], "box", empty=True) == (0.5, 0, 0.5, 1)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.1, 0.1, 0.5], "four numbers"),
        ([0.1, 0.1, 0.5, 0.5, 0.5], "four numbers"),
        (["a", 0.1, 0.5, 0.5], "four numbers"),
        ("0123", "four numbers"),
        (None, "four numbers"),
        (0.5, "four numbers"),
        ([0.1, 0.1, float("nan"), 0.5], "not finite"),
        ([0.1, 0.1, float("inf"), 0.5], "not finite"),
        ([-0.1, 0.1, 0.5, 0.5], "leaves the picture"),
        ([0.1, 0.1, 1.01, 0.5], "leaves the picture"),
        ([10, 10, 500, 500], "divide pixels"),
        ([0.5, 0.1, 0.1, 0.5], "reversed"),
        ([0.1, 0.5, 0.5, 0.1], "reversed"),
        ([0.1, 0.1, 0.1, 0.5], "empty"),
        ([0, 0, 0, 0], "empty"),
    ],
)
def test_bad_boxes_are_refused_by_name(box, message):
    with pytest.raises(LayoutError, match=message) as error:
        check_box(box, "boxes[1]")
    assert "boxes[1]" in str(error.value)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, MSDiffusionError)
