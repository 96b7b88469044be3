import numpy as np
import pytest
import torch

from data_pipeline.models.embedded.segmenter import (
    JITTER,
    build_segmenter,
    jitter,
    mask_iou,
    mask_losses,
    predict,
    save_segmenter,
    segmenter_lesson,
    train_segmenter,
    validate,
)
from data_pipeline.models.embedded.training import TrainingSettings
from data_pipeline.models.sam import SamParams, SamSegmenter, load_sam
from data_pipeline.records import Detection, Entity, Frame

MICRO = SamParams(
    encoder_width=32, encoder_depth=2, encoder_heads=2, global_attention=(1,), image_size=64, patch_size=8,
    window_size=4, prompt_width=32, decoder_depth=1, decoder_heads=2, decoder_mlp_width=32,
)  # fmt: skip
DOG = Entity(phrase="dog", head="dog", mention="a dog", position=0)


@pytest.fixture
def sam():
    torch.manual_seed(0)
    return build_segmenter(MICRO)


def test_masks_are_those_of_the_pipeline(sam, frames, tmp_path):
    """The batched decoder of the training gives what SamSegmenter gives frame by frame."""
    save_segmenter(sam, MICRO, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
    loaded = SamSegmenter(load_sam(str(tmp_path / "config.json"), tmp_path / "model.safetensors", "cpu"))
    boxes = np.array([[0.1, 0.2, 0.6, 0.7], [0.3, 0.1, 0.9, 0.8], [0.0, 0.0, 0.5, 0.4]])
    rows = np.array([0, 0, 1])
    pixels = torch.from_numpy(np.array(frames.images[:2])).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        logits, quality = predict(
            sam.eval(), pixels, torch.from_numpy(rows), torch.from_numpy((boxes * 64).astype(np.float32))
        )
    requests = []
    for row in (0, 1):
        asked = [Detection(entity=DOG, box=tuple(box), score=1.0) for box in boxes[rows == row]]
        requests.append((Frame(index=row, time=0.0, image=np.asarray(frames.images[row])), tuple(asked)))
    found = [one for per_frame in loaded.segment(requests) for one in per_frame]
    assert len(found) == 3
    for one, mask, score in zip(found, logits > 0, quality, strict=True):
        assert np.array_equal(one.mask, mask.numpy())
        assert one.mask_score == pytest.approx(float(score.clamp(0, 1)), abs=1e-5)


def test_jittered_boxes_stay_near_and_inside():
    rng = np.random.default_rng(0)
    boxes = np.tile(np.array([[0.0, 0.2, 0.4, 0.4]]), (500, 1))
    moved = jitter(rng, boxes, 100)
    assert moved.dtype == np.float32
    assert moved.min() >= 0
    off = np.abs(moved - boxes * 100) / [40, 20, 40, 20]
    assert off.max() <= JITTER + 1e-6
    assert 0.01 < off[:, 1:].mean() < JITTER / 2


def test_mask_iou():
    first, second = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    first[0, :2] = second[0, :2] = True
    first[1, :2] = second[1, 1:3] = True
    assert mask_iou(first, second).tolist() == pytest.approx([1.0, 1 / 3, 0.0])


def test_a_perfect_mask_costs_nothing():
    true = torch.zeros(2, 8, 8, dtype=torch.bool)
    true[:, 2:6, 2:6] = True
    logits = torch.where(true, 30.0, -30.0)
    assert all(float(value) < 1e-6 for value in mask_losses(logits, torch.ones(2), true).values())
    assert float(mask_losses(-logits, torch.ones(2), true)["quality"]) == pytest.approx(1.0)
    assert float(mask_losses(-logits, torch.ones(2), true)["shape"]) > 0.9


def test_training_lowers_the_loss(sam, frames):
    lesson = segmenter_lesson(sam, frames, 8, seed=0)
    optimizer = torch.optim.AdamW(sam.parameters(), lr=2e-3)
    history = []
    for step in range(30):
        total = torch.stack(list(lesson(step).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(float(total.detach()))
    assert np.mean(history[-5:]) < 0.8 * np.mean(history[:5])


def test_train_segmenter_writes_a_segmenter(tmp_path, frames, monkeypatch):
    monkeypatch.setattr("data_pipeline.models.embedded.segmenter.SIZES", MICRO)
    settings = TrainingSettings(steps=2, batch_size=2)
    count = train_segmenter(frames, frames, settings, tmp_path / "run", tmp_path / "model")
    loaded = load_sam(str(tmp_path / "model/config.json"), tmp_path / "model/model.safetensors", "cpu")
    assert count == sum(value.numel() for value in loaded.parameters())
    assert 0 <= validate(loaded, frames) <= 1
