import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from msdiffusion.errors import RequestError
from msdiffusion.training.samples.augmentation import (
    Augmentation,
    SampleChances,
    change_reference,
    drop_subjects,
    jitter_boxes,
)

uniforms = st.floats(0, 1, exclude_max=True)


@st.composite
def boxes(draw):
    """Boxes of any size down to slivers."""
    rows = []
    for _ in range(draw(st.integers(1, 8))):
        x1, y1 = draw(st.floats(0, 0.99)), draw(st.floats(0, 0.99))
        x2, y2 = (edge + draw(st.floats(1e-4, 1 - edge)) for edge in (x1, y1))
        rows.append([x1, y1, x2, y2])
    return np.array(rows, dtype=np.float32)


@given(boxes(), st.floats(0, 0.5, exclude_max=True), st.data())
def test_jittered_boxes_stay_boxes_in_the_picture(given_boxes, share, data):
    drawn = data.draw(hnp.arrays(np.float64, (len(given_boxes), 4), elements=uniforms))
    moved = jitter_boxes(given_boxes, share, drawn)
    assert moved.dtype == np.float32
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (moved[:, 2:] > moved[:, :2]).all()
    sides = np.tile(given_boxes[:, 2:] - given_boxes[:, :2], 2)
    assert (np.abs(moved - given_boxes) <= share * sides + 1e-6).all()


def test_jitter_reaches_its_share_to_both_sides():
    box = np.array([[0.4, 0.4, 0.6, 0.8]], dtype=np.float32)
    drawn = np.random.default_rng(0).random((4000, 4))
    moved = np.concatenate([jitter_boxes(box, 0.25, row[None]) for row in drawn]) - box
    np.testing.assert_allclose(moved.min(0), [-0.05, -0.1, -0.05, -0.1], atol=1e-3)
    np.testing.assert_allclose(moved.max(0), [0.05, 0.1, 0.05, 0.1], atol=1e-3)
    np.testing.assert_allclose(moved.mean(0), 0, atol=3e-3)


def test_no_jitter_changes_no_bit():
    box = np.array([[0.1, 0.2, 0.3, 0.7]], dtype=np.float32)
    np.testing.assert_array_equal(jitter_boxes(box, 0.0, np.full((1, 4), 0.9)), box)


@given(st.integers(1, 8), st.floats(0, 1), st.data())
def test_one_subject_always_stays(count, rate, data):
    drawn = data.draw(hnp.arrays(np.float64, 8, elements=uniforms))
    kept = np.array(data.draw(st.permutations(range(8)))[:count])
    staying = drop_subjects(kept, rate, drawn)
    assert len(staying) >= 1
    assert [i for i in kept if i in staying] == staying.tolist(), "the order changed"
    gone = set(kept.tolist()) - set(staying.tolist())
    if len(staying) > 1:
        assert all(drawn[i] >= rate for i in staying)
    assert all(drawn[i] < rate for i in gone)


def test_subjects_are_dropped_as_often_as_asked():
    drawn = np.random.default_rng(0).random((4000, 3))
    staying = [len(drop_subjects(np.arange(3), 0.2, row)) for row in drawn]
    expected = 3 * 0.8 + 0.2**3  # where all would go, one stays
    assert abs(np.mean(staying) - expected) < 0.03


@pytest.fixture
def cut_out():
    """A red and a blue half with a transparent rim, under which there is green that nobody must see."""
    pixels = np.zeros((40, 60, 4), dtype=np.uint8)
    pixels[..., 1] = 255
    pixels[5:35, 5:30] = (200, 40, 40, 255)
    pixels[5:35, 30:55] = (40, 40, 200, 255)
    return Image.fromarray(pixels)


def test_no_strength_changes_no_pixel(cut_out):
    same = change_reference(cut_out, 0.0, False, np.full(4, 0.99))
    np.testing.assert_array_equal(np.asarray(same), np.asarray(cut_out))


def test_flip_mirrors(cut_out):
    flipped = np.asarray(change_reference(cut_out, 0.0, True, np.full(4, 0.99)))
    np.testing.assert_array_equal(flipped, np.asarray(cut_out)[:, ::-1])


def test_nothing_shows_through_from_under_the_mask(cut_out):
    drawn = np.random.default_rng(0).random((20, 4))
    drawn[:, 3] = 0.5  # contrast mixes with grey, which is a colour
    for row in drawn:
        pixels = np.asarray(change_reference(cut_out, 1.0, False, row)).astype(int)
        visible = pixels[pixels[..., 3] > 128]
        assert len(visible) > 800
        assert (visible[:, 1] <= 40 * 1.3 + 16).all(), "green of transparent pixels is drawn in"


def test_rotation_turns_and_shrink_leaves_a_margin(cut_out):
    turned = change_reference(cut_out, 1.0, False, np.array([0.999, 0.0, 0.5, 0.5]))
    assert turned.mode == "RGBA"
    # 50 x 30 visible pixels, turned by 15 degrees
    assert turned.width == pytest.approx(50 * np.cos(np.pi / 12) + 30 * np.sin(np.pi / 12), abs=2)
    assert turned.height == pytest.approx(30 * np.cos(np.pi / 12) + 50 * np.sin(np.pi / 12), abs=2)
    shrunk = change_reference(cut_out, 1.0, False, np.array([0.5, 0.999, 0.5, 0.5]))
    assert shrunk.size == (67, 40)  # 50 x 30 in a frame that is a third larger
    assert shrunk.getchannel("A").getbbox() == (8, 5, 58, 35)


def test_light_changes_but_not_the_outline(cut_out):
    plain, bright = (
        np.asarray(change_reference(cut_out, 1.0, False, np.array([0.5, 0, light, 0.5]))) for light in (0.5, 0.999)
    )
    np.testing.assert_array_equal(plain[..., 3], bright[..., 3])
    assert bright[15, 5, 0] == pytest.approx(200 * 1.3, abs=6)
    assert plain[15, 5, 0] == pytest.approx(200, abs=1)
    flat = np.asarray(change_reference(cut_out, 1.0, False, np.array([0.5, 0, 0.5, 0])))
    distance = np.abs(plain[15, 5, :3].astype(int) - plain[15, 40, :3]).sum()
    assert np.abs(flat[15, 5, :3].astype(int) - flat[15, 40, :3]).sum() == pytest.approx(0.7 * distance, rel=0.05)


def test_a_reference_that_is_all_transparent_stays_so():
    changed = change_reference(Image.new("RGBA", (8, 9)), 1.0, False, np.full(4, 0.9))
    assert not np.asarray(changed)[..., 3].any()


def test_chances_depend_on_the_number_and_on_nothing_else():
    first, again, other = (SampleChances.draw(0, number, 3) for number in (7, 7, 8))
    for name in ("crop", "flip", "order", "dropout", "jitter", "references"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))
    assert not np.array_equal(first.crop, SampleChances.draw(1, 7, 3).crop)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"crop": "left"}, "crop must be 'random' or 'center', got 'left'"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], got 1.5"),
        ({"subject_dropout": -0.1}, "subject_dropout must be in"),
        ({"reference_augmentation": 2}, "reference_augmentation must be in"),
        ({"reference_flip_probability": float("nan")}, "reference_flip_probability must be in"),
        ({"box_jitter": 0.5}, r"box_jitter must be in \[0, 0.5\), so that no box gets lost, got 0.5"),
    ],
)
def test_bad_settings_are_told_at_construction(setting, message):
    with pytest.raises(RequestError, match=message):
        Augmentation(**setting)


@pytest.mark.parametrize("setting", [{"reference_augmentation": 0.1}, {"reference_flip_probability": 0.1}])
def test_references_that_change_are_known(setting):
    assert Augmentation(**setting).changes_references
    assert not Augmentation(box_jitter=0.1, subject_dropout=0.5, flip_probability=1).changes_references
