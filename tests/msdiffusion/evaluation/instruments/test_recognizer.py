"""The recognizer: embeddings are unit vectors of boxes, guards; shipped weights find individuals again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.world import render_subject, sample_identity, sample_scene
from msdiffusion.errors import DataError, WeightsError
from msdiffusion.evaluation.instruments.recognizer import Recognizer, RecognizerParams, view_on_grey
from msdiffusion.evaluation.measures import Gallery
from msdiffusion.evaluation.world import draw_cases

SHIPPED = Path(__file__).parents[4] / "checkpoints" / "tiny" / "recognizer"


@pytest.fixture
def recognizer():
    torch.manual_seed(0)
    return Recognizer(RecognizerParams(widths=(4, 8), crop_size=16, embedding_width=6)).eval()


@pytest.fixture(scope="module")
def shipped():
    return Recognizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def cases():
    return draw_cases(pictures=60, seed=321)


@pytest.fixture(scope="module")
def gallery(shipped):
    """One for all: it draws and embeds its candidates when they are first asked for, which takes a dozen seconds."""
    return Gallery(shipped)


def test_embeddings_are_unit_vectors_in_the_order_of_the_boxes(recognizer):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(2)]
    boxes = [[(0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1)], [(0.2, 0.2, 0.9, 0.9)]]
    embedded = recognizer.embed(pictures, boxes)
    assert embedded.shape == (3, 6)
    assert embedded.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(recognizer.embed([pictures[1]], [boxes[1]])[0], embedded[2], atol=1e-5)
    np.testing.assert_allclose(recognizer.embed(pictures, boxes, batch_size=1), embedded, atol=1e-5)
    assert recognizer.embed([], []).shape == (0, 6)


def test_what_is_outside_the_box_does_not_matter(recognizer):
    picture = np.full((64, 64, 3), 200, np.uint8)
    other = picture.copy()
    other[:, 48:] = 0
    box = [[(0.1, 0.1, 0.5, 0.5)]]
    np.testing.assert_allclose(recognizer.embed([picture], box), recognizer.embed([other], box), atol=1e-6)


def test_every_picture_needs_its_boxes(recognizer):
    with pytest.raises(DataError, match="1 pictures, 0 lists"):
        recognizer.embed([Image.new("RGB", (8, 8))], [])


def test_views_are_laid_on_grey_and_boxed_tightly():
    view = np.zeros((20, 40, 4), np.uint8)
    view[5:10, 10:30] = (255, 0, 0, 255)
    picture, box = view_on_grey(view)
    assert box == (0.25, 0.25, 0.75, 0.5)
    assert picture[0, 0].tolist() == [128, 128, 128]
    assert picture[7, 20].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"\(height, width, 4\)"),
        (np.zeros((4, 4, 4), np.float32), "uint8"),
        (np.zeros((4, 4, 4), np.uint8), "without an opaque pixel"),
    ],
)
def test_bad_views_are_refused(view, message):
    with pytest.raises(DataError, match=message):
        view_on_grey(view)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"margin": 1.0}, "margin"), ({"widths": (4,)}, "don't fit"), ({"embedding_width": 1}, "at least 2, got 1")],
)
def test_bad_params_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        RecognizerParams(**changes)


def test_saves_and_loads(recognizer, tmp_path):
    with pytest.raises(WeightsError, match=r"configs/embedded/recognizer\.yaml"):
        Recognizer.from_pretrained(tmp_path)
    recognizer.save_pretrained(tmp_path)
    again = Recognizer.from_pretrained(tmp_path)
    view = render_subject(sample_identity(np.random.default_rng(1), "train"), 32)
    np.testing.assert_array_equal(again.embed_views([view]), recognizer.embed_views([view]))


def test_shipped_recognizer_finds_held_out_individuals_among_a_hundred(shipped, cases, gallery):
    shown = shipped.embed([case.truth for case in cases], [case.boxes for case in cases])
    assert gallery.first_places(cases, shown, gallery.own_views(cases)).mean() > 0.85


def test_shipped_recognizer_is_at_chance_on_pictures_of_nothing(shipped, cases, gallery):
    rng = np.random.default_rng(0)
    backgrounds = [sample_scene(rng, size=64, num_subjects=1).image for _ in cases]  # other subjects, elsewhere
    shown = shipped.embed(backgrounds, [case.boxes for case in cases])
    assert gallery.first_places(cases, shown, gallery.own_views(cases)).mean() < 0.08
