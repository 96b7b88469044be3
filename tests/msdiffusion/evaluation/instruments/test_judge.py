"""The judge: reading, saving, guards; and, with the shipped weights, how well it reads renders it has never seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.world import sample_scene
from msdiffusion.errors import DataError, WeightsError
from msdiffusion.evaluation.instruments.judge import QUESTIONS, Judge, JudgeParams
from msdiffusion.evaluation.instruments.networks import as_pixels
from msdiffusion.evaluation.world import accepted_answers

SHIPPED = Path(__file__).parents[4] / "checkpoints" / "tiny" / "judge"


@pytest.fixture(scope="module")
def params():
    return JudgeParams(("dog", "cat"), ("red", "blue", "white"), ("plain", "dots"), ("room", "snow"), widths=(4, 8, 8))


@pytest.fixture
def judge(params):
    torch.manual_seed(0)
    return Judge(params).eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colors": ("red",)}, "colors"),
        ({"patterns": ("dots", "dots")}, "patterns"),
        ({"widths": (4,)}, "widths"),
        ({"margin": 1.0}, "margin"),
        ({"crop_size": 2}, "crop_size"),
    ],
)
def test_params_are_checked(params, changes, message):
    from dataclasses import replace

    with pytest.raises(DataError, match=message):
        replace(params, **changes)


def test_names_belong_to_questions(params):
    assert params.names("color") == ("red", "blue", "white")
    assert params.names("background") == ("room", "snow")


def test_crop_is_the_widened_box_of_its_own_picture(params):
    judge = Judge(params)
    pictures = torch.zeros(2, 3, 64, 64)
    pictures[1, 0, 16:32, 16:32] = 1.0  # red square on black in the second picture
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]]).repeat(2, 1)
    crops = judge.crop(pictures, box, torch.tensor([0, 1]))
    assert crops.shape == (2, 3, params.crop_size, params.crop_size)
    assert crops[0].abs().max() == 0 and crops[1, 1:].abs().max() == 0
    share = crops[1, 0].mean().item()
    assert share == pytest.approx((1 / (1 + 2 * params.margin)) ** 2, abs=0.02)


def test_crop_at_the_edge_stays_inside(params):
    crops = Judge(params).crop(torch.ones(1, 3, 40, 64), torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([0]))
    torch.testing.assert_close(crops, torch.ones_like(crops))


def test_reading_answers_every_box_and_accepts_arrays(judge):
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    boxes = [[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 1.0, 1.0]]
    first, empty = judge.read([picture, Image.fromarray(picture)], [boxes, []])
    assert len(first.boxes) == 2 and empty.boxes == ()
    assert first.background == empty.background
    for box in first.boxes:
        for question in QUESTIONS[:3]:
            assert getattr(box, question) in judge.params.names(question)
            assert 0 < box.confidence[question] <= 1


def test_reading_restores_training_mode(judge):
    judge.train()
    judge.read([Image.new("RGB", (16, 16))], [[]])
    assert judge.training


@pytest.mark.parametrize("box", [[0, 0, 1], [0.5, 0, 0.5, 1], [0, 0, 1.1, 1], [0, float("nan"), 1, 1]])
def test_reading_refuses_bad_boxes(judge, box):
    with pytest.raises(DataError, match="x1, y1, x2, y2"):
        judge.read([Image.new("RGB", (16, 16))], [[box]])


def test_reading_refuses_unequal_lists(judge):
    with pytest.raises(DataError, match="1 pictures, 0 lists"):
        judge.read([Image.new("RGB", (16, 16))], [])


@pytest.mark.parametrize("array", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_pixels_refuse_other_arrays(array):
    with pytest.raises(DataError, match="uint8"):
        as_pixels(array)


def test_saved_judge_reads_the_same(judge, tmp_path):
    judge.save_pretrained(tmp_path / "judge")
    loaded = Judge.from_pretrained(tmp_path / "judge")
    assert loaded.params == judge.params and not loaded.training
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert loaded.read([picture], [[[0, 0, 1, 1]]]) == judge.read([picture], [[[0, 0, 1, 1]]])


def test_loading_guards(judge, tmp_path):
    with pytest.raises(WeightsError, match="config.json is missing"):
        Judge.from_pretrained(tmp_path)
    judge.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "widths": [4, 8, 16]}))
    with pytest.raises(WeightsError, match="can't be loaded"):
        Judge.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    with pytest.raises(WeightsError, match="doesn't describe a judge"):
        Judge.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="model.safetensors is missing"):
        Judge.from_pretrained(tmp_path)


def test_shipped_judge_reads_fresh_held_out_renders():
    judge = Judge.from_pretrained(SHIPPED)
    rng = np.random.default_rng(987)
    scenes = [sample_scene(rng, split="held_out", size=64) for _ in range(150)]
    readings = judge.read([scene.image for scene in scenes], [scene.boxes.tolist() for scene in scenes])
    pairs = [
        (read, subject)
        for reading, scene in zip(readings, scenes, strict=True)
        for read, subject in zip(reading.boxes, scene.subjects, strict=True)
    ]
    assert np.mean([read.category == subject.category for read, subject in pairs]) > 0.97
    assert np.mean([read.color == subject.main_color for read, subject in pairs]) > 0.80
    body = [read.color in accepted_answers(subject)["body_color"] for read, subject in pairs]
    assert np.mean(body) > 0.96
    assert np.mean([read.pattern == subject.pattern for read, subject in pairs]) > 0.95
    assert (
        np.mean([reading.background == scene.background for reading, scene in zip(readings, scenes, strict=True)])
        > 0.98
    )
