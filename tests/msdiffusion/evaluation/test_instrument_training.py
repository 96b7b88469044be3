"""Training of locator and recognizer: cells, batches, guards, and a short run of each that learns."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from data_pipeline.world.renderings import RenderingSettings, load_or_render
from msdiffusion.errors import DataError
from msdiffusion.evaluation.instrument_training import (
    InstrumentRenderings,
    LocatorTraining,
    RecognizerTraining,
    SubjectScenes,
    _first_places,
    assign_cells,
)
from msdiffusion.evaluation.instruments.locator import Locator
from msdiffusion.evaluation.instruments.recognizer import Recognizer


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("renderings")


@pytest.fixture(scope="module")
def data(cache):
    module = InstrumentRenderings(
        scenes=64, identities=30, validation_scenes=8, batch_size=16, cache=str(cache), workers=1
    )
    module.setup()
    return module


def test_batches_pair_boxes_with_other_pictures_of_the_same_subject(data):
    batch = data.train_set.__getitems__([3, 1, 2, 5])
    count = len(batch["owners"])
    assert batch["pictures"].shape == (4, 3, 64, 64)
    assert batch["boxes"].shape == batch["view_boxes"].shape == (count, 4)
    assert batch["views"].shape == (count, 3, 64, 64)
    assert batch["labels"].shape == (count, 6)
    for name in ("pictures", "views", "boxes", "view_boxes"):
        assert batch[name].min() >= 0 and batch[name].max() <= 1
    members = data.train_set.renderings.members[[1, 2, 3, 5]]
    assert batch["identities"].tolist() == members[members >= 0].tolist()
    assert batch["owners"].tolist() == np.nonzero(members >= 0)[0].tolist()
    # outside of its box a view is grey
    x1, y1, x2, y2 = (batch["view_boxes"][0] * 64).round().int().tolist()
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
    assert (batch["views"][0][:, outside] - 0.5).abs().max() < 0.01


def test_cells_in_the_middle_answer_and_the_rim_is_not_counted():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]])
    target, own = assign_cells(boxes, torch.tensor([0, 0, 1]), 2, 16)
    assert target.shape == own.shape == (2, 16, 16)
    assert (target[0, 8:] == 0).all() and (target[0, :, 8:] == 0).all()  # outside of both boxes
    assert target[0, 0, 0] == -1  # rim of the large box
    assert target[0, 3, 3] == 1 and own[0, 3, 3] == 0
    assert target[0, 5, 5] == 1 and own[0, 5, 5] == 1  # the smaller box wins where both have their middle
    assert (own[1][target[1] == 1] == 2).all()
    assert (target[1] == 1).sum() == 64


def test_a_box_smaller_than_a_cell_still_has_one():
    target, _ = assign_cells(torch.tensor([[0.51, 0.51, 0.52, 0.52]]), torch.tensor([0]), 1, 16)
    assert (target == 1).sum() == 1


def run(module, data, tmp_path, steps):
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_locator_learns_and_is_written(data, tmp_path):
    pl.seed_everything(0)
    module = LocatorTraining(str(tmp_path / "locator"), learning_rate=5e-3, widths=(8, 12, 16, 16, 16))
    batch = data.train_set.__getitems__(list(range(16)))
    before = sum(module.losses(batch["pictures"], batch["boxes"], batch["owners"])).item()
    metrics = run(module, data, tmp_path, 60)
    module.train()  # as before: statistics of the batch, not the young running ones
    assert sum(module.losses(batch["pictures"], batch["boxes"], batch["owners"])).item() < 0.8 * before
    assert {"val/iou", "val/found"} <= set(metrics)
    Locator.from_pretrained(tmp_path / "locator")


def test_recognizer_learns_and_is_written(data, tmp_path):
    pl.seed_everything(0)
    module = RecognizerTraining(str(tmp_path / "recognizer"), learning_rate=5e-3, widths=(8, 12, 16))
    metrics = run(module, data, tmp_path, 24)
    assert metrics["contrastive"] < 0.9 * 2 * np.log(25)  # two directions, about 25 subjects a batch
    assert 0 <= metrics["val/retrieval"] <= 1
    Recognizer.from_pretrained(tmp_path / "recognizer")


def test_twins_do_not_count_as_rivals():
    boxes = torch.eye(3)
    labels = torch.tensor([[0, 1], [0, 1], [0, 2]])
    views = torch.stack([torch.eye(3)[0], torch.eye(3)[0], torch.eye(3)[2]])
    assert list(_first_places(boxes, views, labels)) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["scenes", "identities", "validation_scenes", "batch_size"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(DataError, match=f"{name} must be at least 1, got 0"):
        InstrumentRenderings(**{name: 0})


def test_both_splits_are_learned_from(cache, data):
    splits = {identity.split for identity in data.train_set.renderings.identities}
    assert splits == {"train", "held_out"}
    assert {i.split for i in data.validation_set.renderings.identities} == {"held_out"}
    settings = RenderingSettings(64, 30, 2, "all", 64, seed=2000)
    again = SubjectScenes(load_or_render(settings, cache, 1), 0)
    assert np.array_equal(again.renderings.images, data.train_set.renderings.images)
