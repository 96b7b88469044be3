"""Scenes: captions, backgrounds, and boxes and masks that are exactly those of the pixels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.world import BACKGROUNDS, CATEGORIES, Identity, render_background, sample_scene, write_caption
from data_pipeline.world.scenes import (
    MAX_SUBJECTS,
    compose,
    sample_count,
    sample_placement,
    sample_subjects,
    tight_boxes,
)


def named(category):
    return Identity(category, "red", "white", "blue", "dots", 0)


def pixel_box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


class TestSampleScene:
    @settings(max_examples=25)
    @given(
        seed=st.integers(0, 2**32), size=st.sampled_from([48, 64, 128]), split=st.sampled_from(["train", "held_out"])
    )
    def test_truth_is_exact(self, seed, size, split):
        scene = sample_scene(np.random.default_rng(seed), split, size=size)
        count = len(scene.subjects)
        assert 1 <= count <= 3
        assert scene.image.shape == (size, size, 3)
        assert scene.image.dtype == np.uint8
        assert scene.masks.shape == (count, size, size)
        assert scene.masks.dtype == bool
        assert scene.boxes.shape == (count, 4)
        assert scene.boxes.dtype == np.float32
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            assert tuple(np.round(box * size).astype(int)) == pixel_box(mask)
            np.testing.assert_allclose(box * size, np.round(box * size), atol=1e-4)
        assert (scene.masks.sum(0) <= 1).all(), "a pixel belongs to one subject at most"
        assert {subject.split for subject in scene.subjects} == {split}
        assert len({subject.category for subject in scene.subjects}) == count
        assert scene.caption == write_caption(scene.subjects, scene.background)

    def test_equal_seed_equal_scene(self):
        first, second = (sample_scene(np.random.default_rng(7)) for _ in range(2))
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.boxes, second.boxes)
        assert first.subjects == second.subjects
        assert first.caption == second.caption

    def test_another_seed_another_scene(self):
        assert (sample_scene(np.random.default_rng(1)).image != sample_scene(np.random.default_rng(2)).image).any()

    @pytest.mark.parametrize("count", range(1, MAX_SUBJECTS + 1))
    def test_number_of_subjects(self, count):
        assert len(sample_scene(np.random.default_rng(0), num_subjects=count).boxes) == count

    def test_given_subjects_and_background_are_kept(self):
        subjects = [named("teapot"), named("car")]
        scene = sample_scene(np.random.default_rng(0), subjects=subjects, background="snow")
        assert scene.subjects == subjects
        assert scene.caption == "a teapot and a car in the snow"

    def test_refuses_more_subjects_than_fit(self):
        with pytest.raises(ValueError, match="1 to 4 subjects, got 5"):
            sample_scene(np.random.default_rng(0), num_subjects=5)

    def test_subjects_look_like_themselves_in_the_scene(self):
        """The median colour inside the mask of a plain subject is near its main colour, whatever the ground."""
        subject = Identity("backpack", "purple", "yellow", "yellow", "plain", 0)
        for background in BACKGROUNDS:
            scene = sample_scene(np.random.default_rng(3), subjects=[subject], background=background, size=96)
            red, green, blue = np.median(scene.image[scene.masks[0]], axis=0)
            assert blue > red > green, background


class TestWriteCaption:
    @pytest.mark.parametrize(
        ("categories", "background", "caption"),
        [
            (["dog"], "beach", "a dog on the beach"),
            (["dog", "teapot"], "street", "a dog and a teapot on a cobblestone street"),
            (["dog", "hat", "car"], "snow", "a dog, a hat and a car in the snow"),
        ],
    )
    def test_templates(self, categories, background, caption):
        assert write_caption([named(category) for category in categories], background) == caption

    def test_full_detail_names_the_identity(self):
        assert write_caption([named("cat")], "room", "full") == "a red and blue cat with white dots in a room"

    def test_refuses_no_subjects(self):
        with pytest.raises(ValueError, match="at least one subject"):
            write_caption([], "beach")


class TestRenderBackground:
    def test_the_six_of_ms_bench(self):
        assert set(BACKGROUNDS.values()) == {
            "in a room", "in the snow", "in the jungle", "on the beach", "on the grass", "on a cobblestone street",
        }  # fmt: skip

    @pytest.mark.parametrize("name", BACKGROUNDS)
    def test_varies_with_the_seed_only(self, name):
        first, again, other = (render_background(name, np.random.default_rng(seed), 64) for seed in (0, 0, 1))
        assert first.shape == (64, 64, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, again)
        assert np.abs(first.astype(int) - other).mean() > 1

    @pytest.mark.parametrize("name", BACKGROUNDS)
    def test_width_may_differ(self, name):
        assert render_background(name, np.random.default_rng(0), 48, width=80).shape == (48, 80, 3)

    def test_kinds_can_be_told_apart(self):
        """Two pictures of one background are, on average, nearer to each other than to any other background."""
        rng = np.random.default_rng(0)
        pictures = {name: [render_background(name, rng, 16) for _ in range(6)] for name in BACKGROUNDS}
        means = {name: np.mean(views, 0) for name, views in pictures.items()}
        for name, views in pictures.items():
            distance = {other: np.mean([np.abs(view - mean).mean() for view in views]) for other, mean in means.items()}
            assert min(distance, key=distance.get) == name

    def test_refuses_an_unknown_name(self):
        with pytest.raises(ValueError, match="unknown background 'moon'; known: room"):
            render_background("moon", np.random.default_rng(0), 64)


class TestCompose:
    def test_front_takes_the_pixels_of_what_is_behind(self):
        ground = np.zeros((20, 20, 3), np.uint8)
        red, blue = (np.full((10, 10, 4), 255, np.uint8) for _ in range(2))
        red[..., 1:3] = 0
        blue[..., :2] = 0
        image, masks = compose(ground, [red, blue], [(2, 2), (6, 6)])
        assert masks[0].sum() == 100 - 36
        assert masks[1].sum() == 100
        assert (image[masks[0]] == [255, 0, 0]).all()
        assert (image[masks[1]] == [0, 0, 255]).all()

    def test_sprites_may_reach_over_the_border_or_lie_outside(self):
        ground = np.zeros((20, 20, 3), np.uint8)
        sprite = np.full((10, 10, 4), 255, np.uint8)
        _, masks = compose(ground, [sprite, sprite], [(-5, 15), (40, 40)])
        assert pixel_box(masks[0]) == (0, 15, 5, 20)
        assert not masks[1].any()

    def test_half_transparent_pixels_mix_and_do_not_count(self):
        ground = np.full((8, 8, 3), 100, np.uint8)
        sprite = np.full((8, 8, 4), 200, np.uint8)
        sprite[..., 3] = 102
        image, masks = compose(ground, [sprite], [(0, 0)])
        assert not masks.any()
        assert image[0, 0].tolist() == [140, 140, 140]


class TestTightBoxes:
    def test_against_the_definition(self):
        masks = np.random.default_rng(0).random((6, 12, 16)) > 0.97
        masks[:, 3, 4] = True
        for box, mask in zip(tight_boxes(masks), masks, strict=True):
            np.testing.assert_allclose(box * [16, 12, 16, 12], pixel_box(mask), atol=1e-5)

    def test_empty_mask_gives_a_zero_box(self):
        assert tight_boxes(np.zeros((1, 8, 8), bool)).tolist() == [[0, 0, 0, 0]]


class TestSamplePlacement:
    @settings(max_examples=50)
    @given(seed=st.integers(0, 2**32), aspects=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=MAX_SUBJECTS))
    def test_inside_the_picture_with_the_subject_s_aspect(self, seed, aspects):
        boxes = sample_placement(np.random.default_rng(seed), len(aspects), aspects)
        for (x1, y1, x2, y2), aspect in zip(boxes, aspects, strict=True):
            assert 0 < x1 < x2 < 1
            assert 0 < y1 < y2 < 1
            assert (x2 - x1) / (y2 - y1) == pytest.approx(aspect)

    def test_subjects_of_a_pair_rarely_hide_each_other(self):
        scenes = [sample_scene(np.random.default_rng(seed), num_subjects=2) for seed in range(40)]
        overlaps = 0
        for scene in scenes:
            (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = scene.boxes
            common = max(min(ax2, bx2) - max(ax1, bx1), 0) * max(min(ay2, by2) - max(ay1, by1), 0)
            smaller = min((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1))
            overlaps += common > 0.15 * smaller
        assert overlaps <= 2


def test_sample_subjects_never_repeats_a_category():
    for seed in range(30):
        subjects = sample_subjects(np.random.default_rng(seed), 4, "held_out")
        assert len({subject.category for subject in subjects}) == 4
        assert {subject.category for subject in subjects} <= set(CATEGORIES)


def test_sample_count_follows_the_shares():
    rng = np.random.default_rng(0)
    assert {sample_count(rng, (0.0, 1.0)) for _ in range(20)} == {2}
    assert {sample_count(rng) for _ in range(200)} == {1, 2, 3}
