"""The locator: exact geometry, matching, guards; with the shipped weights, how well it finds held-out subjects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.world import sample_scene
from msdiffusion.errors import DataError, WeightsError
from msdiffusion.evaluation.instruments.locator import (
    Located,
    Locator,
    LocatorParams,
    box_ious,
    grid_centers,
    layout_ious,
)

SHIPPED = Path(__file__).parents[4] / "checkpoints" / "tiny" / "locator"


@pytest.fixture
def locator():
    torch.manual_seed(0)
    return Locator(LocatorParams(widths=(4, 4, 4, 4, 4))).eval()


@st.composite
def boxes(draw):
    x1, y1 = draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))
    return x1, y1, draw(st.floats(x1 + 0.05, 1)), draw(st.floats(y1 + 0.05, 1))


def located(*found):
    return Located(np.array(found, np.float32).reshape(-1, 4), np.ones(len(found), np.float32))


def test_forward_gives_a_confidence_and_an_ordered_box_per_cell(locator):
    logits, found = locator(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 16, 16)
    assert found.shape == (2, 16, 16, 4)
    centers = grid_centers(16)
    assert (found[..., :2] < centers).all() and (found[..., 2:] > centers).all()


def test_grid_centers_are_x_then_y():
    centers = grid_centers(2)
    assert centers[0, 1].tolist() == [0.75, 0.25]


def test_pictures_of_any_size_and_kind_are_found(locator):
    pictures = [Image.new("RGB", (40, 90), "red"), np.zeros((64, 64, 3), np.uint8)]
    assert len(locator.find(pictures)) == 2
    assert locator.find([]) == []


def test_overlapping_boxes_are_reported_once(locator):
    found = torch.tensor([[0.1, 0.1, 0.5, 0.5], [0.12, 0.1, 0.5, 0.5], [0.6, 0.6, 0.9, 0.9], [0.2, 0.2, 0.2, 0.5]])
    result = locator._select(torch.tensor([0.8, 0.9, 0.5, 0.99]), found)
    np.testing.assert_allclose(result.boxes, found[[1, 2]].numpy())
    np.testing.assert_allclose(result.confidence, [0.9, 0.5])
    assert len(locator._select(torch.tensor([0.1] * 4), found).boxes) == 0


@given(boxes(), boxes())
def test_iou_is_symmetric_and_one_with_itself(first, second):
    a, b = np.array([first]), np.array([second])
    assert box_ious(a, b)[0, 0] == pytest.approx(box_ious(b, a)[0, 0])
    assert 0 <= box_ious(a, b)[0, 0] <= 1 + 1e-9
    assert box_ious(a, a)[0, 0] == pytest.approx(1)


def test_iou_of_known_boxes():
    assert box_ious(np.array([[0, 0, 1, 1.0]]), np.array([[0, 0, 0.5, 1.0]]))[0, 0] == pytest.approx(0.5)
    assert box_ious(np.array([[0, 0, 0, 0.0]]), np.array([[0, 0, 0, 0.0]]))[0, 0] == 0


def test_found_boxes_are_dealt_out_so_that_the_sum_is_largest():
    """The first box fits both; the greedy choice would leave the second requested box with nothing."""
    left, right = (0.0, 0.0, 0.5, 1.0), (0.4, 0.0, 1.0, 1.0)
    between = (0.1, 0.0, 0.6, 1.0)
    ious = layout_ious([left, right], located(between, left))
    assert ious[0] == pytest.approx(1.0)
    assert 0 < ious[1] < 0.5


def test_missing_and_surplus_boxes():
    box = (0.1, 0.1, 0.5, 0.5)
    assert layout_ious([box], located()).tolist() == [0.0]
    assert layout_ious([box, (0.6, 0.6, 0.9, 0.9)], located(box)).tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert layout_ious([box], located((0.6, 0.6, 0.9, 0.9), box)).tolist() == pytest.approx([1.0], abs=1e-6)
    assert layout_ious([], located(box)).shape == (0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picture_size": 40}, "multiple of 16, got 40"),
        ({"widths": (4, 4)}, "five numbers"),
        ({"threshold": 0.0}, "threshold must lie"),
        ({"overlap": 1.0}, "overlap must lie"),
    ],
)
def test_bad_params_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        LocatorParams(**changes)


def test_saves_and_loads(locator, tmp_path):
    locator.save_pretrained(tmp_path)
    again = Locator.from_pretrained(tmp_path)
    assert again.params == locator.params
    picture = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(picture)[1], locator(picture)[1])


def test_other_directories_are_refused(locator, tmp_path):
    with pytest.raises(WeightsError, match=r"config\.json is missing; lightning fit -c configs/embedded/locator\.yaml"):
        Locator.from_pretrained(tmp_path)
    locator.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "msdiffusion.judge"}, "doesn't describe a locator"),
        ({"widths": [4, 4, 4, 4, 8]}, "can't be loaded"),
        ({"surprise": 1}, "can't be loaded"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(WeightsError, match=message):
            Locator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        Locator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="can't be loaded"):
        Locator.from_pretrained(tmp_path)


def test_shipped_locator_finds_fresh_held_out_subjects():
    shipped = Locator.from_pretrained(SHIPPED)
    rng = np.random.default_rng(654)
    scenes = [sample_scene(rng, split="held_out", size=64) for _ in range(100)]
    found = shipped.find([scene.image for scene in scenes])
    ious = np.concatenate([layout_ious(scene.boxes, own) for scene, own in zip(scenes, found, strict=True)])
    assert ious.mean() > 0.85
    surplus = sum(len(own.boxes) for own in found) - len(ious)
    assert surplus < 0.05 * len(ious)
