"""Training the judge: labels, batches, degrading, guards, and a short run that leaves a judge behind."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from data_pipeline.world import sample_scene
from msdiffusion.errors import DataError
from msdiffusion.evaluation.instruments.judge import QUESTIONS, Judge
from msdiffusion.evaluation.instruments.training import degrade
from msdiffusion.evaluation.judge_training import (
    JudgeRenderings,
    JudgeTraining,
    SceneDataset,
    collate_scenes,
    label_scene,
    world_params,
)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [sample_scene(rng, num_subjects=count, size=32) for count in (1, 3, 2)]


@pytest.fixture(scope="module")
def batch(scenes):
    return collate_scenes([label_scene(scene, world_params()) for scene in scenes])


def test_labels_say_what_the_scene_shows(scenes):
    params = world_params()
    for scene in scenes:
        labelled = label_scene(scene, params)
        assert params.backgrounds[labelled.background] == scene.background
        for subject, (category, color, pattern) in zip(scene.subjects, labelled.labels, strict=True):
            assert params.categories[category] == subject.category
            assert params.colors[color] == subject.main_color
            assert params.patterns[pattern] == subject.pattern


def test_batches_know_the_picture_of_every_box(scenes, batch):
    assert batch["pictures"].shape == (3, 3, 32, 32)
    assert batch["owners"].tolist() == [0, 1, 1, 1, 2, 2]
    assert batch["boxes"].shape == (6, 4)
    assert all(len(batch[question]) == 6 for question in QUESTIONS[:3])
    assert len(batch["background"]) == 3
    np.testing.assert_allclose(batch["pictures"][1].permute(1, 2, 0) * 255, scenes[1].image, atol=1e-4)


def test_jpeg_changes_some_readings_and_no_stored_scene(scenes):
    stored = [label_scene(scenes[0], world_params())]
    torch.manual_seed(0)
    readings = [SceneDataset(stored, jpeg=True)[0].picture for _ in range(20)]
    changed = [not np.array_equal(reading, scenes[0].image) for reading in readings]
    assert 0 < sum(changed) < 20
    np.testing.assert_array_equal(SceneDataset(stored)[0].picture, scenes[0].image)


def test_degraded_pictures_stay_pictures_and_labels_stay(batch):
    before = {name: value.clone() for name, value in batch.items()}
    shown = degrade(batch, generator=torch.Generator().manual_seed(1))
    again = degrade(batch, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(shown["pictures"], again["pictures"], rtol=0, atol=0)
    assert shown["pictures"].min() >= 0 and shown["pictures"].max() <= 1
    assert (shown["pictures"] - batch["pictures"]).abs().mean() > 0.005
    assert (shown["boxes"][:, :2] < shown["boxes"][:, 2:]).all()
    assert (shown["boxes"] - batch["boxes"]).abs().max() < 0.1
    for name, value in before.items():
        torch.testing.assert_close(batch[name], value, rtol=0, atol=0)
        if name not in ("pictures", "boxes"):
            assert shown[name] is batch[name]


@pytest.mark.parametrize("name", ["train_scenes", "validation_scenes", "size", "batch_size"])
def test_renderings_refuse_impossible_numbers(name):
    with pytest.raises(DataError, match=f"{name} must be at least 1, got 0"):
        JudgeRenderings(**{name: 0})


def test_renderings_refuse_another_split():
    with pytest.raises(DataError, match="split must be"):
        JudgeRenderings(split="test")


def test_short_run_learns_and_leaves_a_judge(tmp_path):
    pl.seed_everything(0)
    data = JudgeRenderings(train_scenes=16, validation_scenes=8, size=32, batch_size=8)
    module = JudgeTraining(str(tmp_path / "judge"), widths=(8, 16), degrade=False, label_smoothing=0.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=30,
        check_val_every_n_epoch=5,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert {f"val/{question}" for question in QUESTIONS} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["train/category"] < np.log(10)  # better than a blind guess on what it has seen
    judge = Judge.from_pretrained(tmp_path / "judge")
    assert judge.params == world_params(widths=(8, 16))
