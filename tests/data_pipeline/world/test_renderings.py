"""Scenes rendered ahead of time: the same whatever the number of workers, and read back from their cache."""

import numpy as np
import pytest

from data_pipeline.world import BACKGROUNDS
from data_pipeline.world.renderings import RenderingSettings, center_view, identity_labels, load_or_render

SETTINGS = RenderingSettings(scenes=12, identities=10, views=2, split="held_out", size=32, seed=3)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    cache = tmp_path_factory.mktemp("renderings")
    return cache, load_or_render(SETTINGS, cache, workers=1)


def test_arrays_are_as_described(rendered):
    _, renderings = rendered
    assert renderings.images.shape == (12, 32, 32, 3)
    assert renderings.images.dtype == np.uint8
    assert renderings.boxes.shape == (12, 3, 4)
    assert renderings.views.shape == (20, 32, 32, 4)
    assert renderings.backgrounds.max() < len(BACKGROUNDS)
    assert {identity.split for identity in renderings.identities} == {"held_out"}
    present = renderings.members >= 0
    assert present[:, 0].all()
    np.testing.assert_array_equal(renderings.boxes[~present], 0)
    assert (renderings.boxes[present][:, 2:] > renderings.boxes[present][:, :2]).all()


def test_second_call_reads_the_cache(rendered):
    cache, renderings = rendered
    [folder] = cache.iterdir()
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = load_or_render(SETTINGS, cache, workers=1)
    np.testing.assert_array_equal(again.images, renderings.images)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_another_seed_another_folder(rendered, tmp_path):
    _, renderings = rendered
    other = load_or_render(RenderingSettings(scenes=2, identities=10, split="held_out", size=32, seed=4), tmp_path, 1)
    assert (other.images[0] != renderings.images[0]).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scenes": -1}, "scenes >= 0"),
        ({"identities": 0}, "identities >= 1"),
        ({"views": 0}, "views >= 1"),
        ({"shares": ()}, "1 to 3 probabilities"),
        ({"shares": (0.25, 0.25, 0.25, 0.25)}, "1 to 3 probabilities"),
    ],
)
def test_refuses_settings_that_cannot_be_rendered(change, message):
    with pytest.raises(ValueError, match=message):
        RenderingSettings(**change)


def test_center_view_keeps_the_sprite():
    sprite = np.full((4, 6, 4), 7, np.uint8)
    view = center_view(sprite, 8)
    np.testing.assert_array_equal(view[2:6, 1:7], sprite)
    assert view.sum() == sprite.sum()


def test_identity_labels_has_a_row_per_identity(rendered):
    _, renderings = rendered
    labels = identity_labels(renderings.identities)
    assert labels.shape == (10, 6)
    assert labels.dtype == np.int64
    assert labels[:, 0].tolist() == list(range(10))
