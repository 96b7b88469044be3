"""Identities and their pictures: what is refused, what is split, what a drawing promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.world import CATEGORIES, COLORS, PATTERNS, Identity, render_subject, sample_identity
from data_pipeline.world.subjects import SHAPE_VARIANTS

PLAIN = {"category": "dog", "main_color": "red", "second_color": "blue", "accent_color": "blue", "pattern": "plain"}


def striped(category="dog", shape=0, **colors):
    fields = {"main_color": "red", "second_color": "white", "accent_color": "blue", "pattern": "stripes"} | colors
    return Identity(category=category, shape=shape, **fields)


def every_identity(category):
    """All lawful identities of a category with shape 0."""
    for main, second, accent in itertools.product(COLORS, repeat=3):
        for pattern in PATTERNS:
            if main not in (second, accent) and (pattern != "plain" or second == accent):
                yield Identity(category, main, second, accent, pattern, 0)


class TestIdentity:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"category": "unicorn"}, "unknown category 'unicorn'; known: dog"),
            ({"pattern": "zigzag"}, "unknown pattern 'zigzag'"),
            ({"accent_color": "mauve"}, "unknown color 'mauve'"),
            ({"second_color": "red", "accent_color": "red"}, "must differ from the main color 'red'"),
            ({"second_color": "green"}, "second_color must equal accent_color"),
            ({"shape": SHAPE_VARIANTS}, "shape must be in 0..3, got 4"),
            ({"shape": -1}, "shape must be in 0..3, got -1"),
        ],
    )
    def test_refuses_what_it_cannot_draw(self, change, message):
        with pytest.raises(ValueError, match=message):
            Identity(**(PLAIN | {"shape": 0} | change))

    def test_enough_to_choose_from(self):
        assert len(CATEGORIES) >= 10
        assert len(PATTERNS) >= 6

    def test_split_never_depends_on_shape_or_accent(self):
        """Else a held-out colour-pattern combination would be seen in training with another part shape."""
        for shape, accent in itertools.product(range(SHAPE_VARIANTS), ("blue", "green", "white")):
            assert striped(shape=shape, accent_color=accent).split == striped().split

    def test_held_out_combinations_are_never_trained(self):
        """A combination is (main, second, pattern): held out in every category, or in some of them only."""
        splits = {}
        for category in CATEGORIES:
            for identity in every_identity(category):
                combination = (identity.main_color, identity.second_color, identity.pattern)
                splits.setdefault(combination, {}).setdefault(category, set()).add(identity.split)
        assert all(len(found) == 1 for by_category in splits.values() for found in by_category.values())
        everywhere = [c for c, by_category in splits.items() if set.union(*by_category.values()) == {"held_out"}]
        assert 0.15 < len(everywhere) / len(splits) < 0.25
        shares = [sum("held_out" in found for found in by.values()) / len(by) for by in splits.values()]
        assert 0.28 < np.mean(shares) < 0.44  # 1 - 0.8 * 0.8 = 0.36

    @pytest.mark.parametrize(
        ("identity", "detail", "phrase"),
        [
            (Identity(**PLAIN, shape=0), "plain", "a dog"),
            (Identity(**PLAIN, shape=0), "full", "a red and blue dog"),
            (striped(main_color="orange"), "color", "an orange dog"),
            (striped(), "full", "a red and blue dog with white stripes"),
            (striped(pattern="patch"), "full", "a red and blue dog with a white patch"),
        ],
    )
    def test_describe(self, identity, detail, phrase):
        assert identity.describe(detail) == phrase

    def test_describe_refuses_an_unknown_detail(self):
        with pytest.raises(ValueError, match="detail must be plain, color or full, got 'everything'"):
            striped().describe("everything")

    def test_as_dict_makes_the_same_identity_again(self):
        assert Identity(**striped().as_dict()) == striped()


class TestSampleIdentity:
    @given(
        seed=st.integers(0, 2**32), split=st.sampled_from(["train", "held_out"]), category=st.sampled_from(CATEGORIES)
    )
    def test_keeps_to_the_split_and_the_seed(self, seed, split, category):
        identity = sample_identity(np.random.default_rng(seed), split, category)
        assert identity.split == split
        assert identity.category == category
        assert identity == sample_identity(np.random.default_rng(seed), split, category)

    def test_train_and_held_out_share_no_combination(self):
        rng = np.random.default_rng(0)
        train, held_out = (
            {
                (i.category, i.main_color, i.second_color, i.pattern)
                for i in (sample_identity(rng, s) for _ in range(800))
            }
            for s in ("train", "held_out")
        )
        assert train.isdisjoint(held_out)

    def test_draws_everything(self):
        drawn = [sample_identity(np.random.default_rng(seed), "all") for seed in range(500)]
        assert {i.category for i in drawn} == set(CATEGORIES)
        assert {i.pattern for i in drawn} == set(PATTERNS)
        assert {i.main_color for i in drawn} == set(COLORS)
        assert {i.split for i in drawn} == {"train", "held_out"}

    def test_refuses_an_unknown_split(self):
        with pytest.raises(ValueError, match="split must be train, held_out or all, got 'test'"):
            sample_identity(np.random.default_rng(0), "test")


class TestRenderSubject:
    @pytest.mark.parametrize("shape", range(SHAPE_VARIANTS))
    @pytest.mark.parametrize("category", CATEGORIES)
    def test_picture_is_cropped_tight_and_of_the_asked_size(self, category, shape):
        picture = render_subject(striped(category, shape), 48)
        assert picture.dtype == np.uint8
        assert picture.shape[2] == 4
        assert max(picture.shape[:2]) == 48
        alpha = picture[..., 3]
        assert all(edge.any() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]))
        assert 0.2 < (alpha > 127).mean() < 1

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_main_color_covers_more_than_any_other(self, category):
        """Judges and readers take the main colour from the pixels, so it must dominate where the pattern is plain."""
        identity = Identity(category, "purple", "yellow", "yellow", "plain", 0)
        picture = render_subject(identity, 64).astype(int)
        solid = picture[picture[..., 3] > 250][:, :3]
        names = list(COLORS)
        nearest = np.abs(solid[:, None] - np.array([COLORS[name] for name in names])).sum(-1).argmin(1)
        counts = np.bincount(nearest, minlength=len(names))
        colored = {name: counts[i] for i, name in enumerate(names) if name in ("purple", "yellow", "green", "red")}
        assert max(colored, key=colored.get) == "purple"

    def test_every_part_of_an_identity_is_visible(self):
        base = striped()
        changes = [{"main_color": "green"}, {"second_color": "yellow"}, {"accent_color": "pink"}, {"pattern": "dots"}]
        pictures = [render_subject(striped(**change), 48) for change in changes] + [
            render_subject(striped(shape=1), 48)
        ]
        for other in pictures:
            reference = render_subject(base, 48)
            assert other.shape != reference.shape or (other != reference).any(-1).mean() > 0.01

    def test_equal_arguments_equal_pictures(self):
        np.testing.assert_array_equal(render_subject(striped(), 40, pose=0.3), render_subject(striped(), 40, pose=0.3))

    def test_flip_mirrors(self):
        np.testing.assert_array_equal(render_subject(striped(), 40, flip=True), render_subject(striped(), 40)[:, ::-1])

    def test_light_changes_colors_but_not_the_outline(self):
        bright, plain = render_subject(striped(), 40, light=1.2), render_subject(striped(), 40)
        np.testing.assert_array_equal(bright[..., 3], plain[..., 3])
        assert bright[..., :3].mean() > plain[..., :3].mean()

    @pytest.mark.parametrize("category", CATEGORIES)
    def test_pose_moves_little(self, category):
        """A pose may differ between two frames of a clip; the subject must stay the same one."""
        still, moved = (render_subject(striped(category), 64, pose=pose) for pose in (0.0, 0.25))
        height, width = (min(a, b) for a, b in zip(still.shape[:2], moved.shape[:2], strict=True))
        assert min(height, width) > 20
        assert abs(still.shape[0] - moved.shape[0]) + abs(still.shape[1] - moved.shape[1]) <= 16

    def test_refuses_a_size_without_room(self):
        with pytest.raises(ValueError, match="at least 8 pixels, got size 7"):
            render_subject(striped(), 7)
