import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.utils import logging

from data_pipeline.models.detector import Question
from data_pipeline.models.embedded.detector import (
    DetectorSizes,
    TutoredDetector,
    as_pixels,
    build_detector,
    detector_lesson,
    match_boxes,
    sample_batch,
    save_detector,
    tokens_of,
    train_detector,
    validate,
    vary,
)
from data_pipeline.models.embedded.detector_losses import (
    DetectorBatch,
    assign,
    corners_of,
    focal_loss,
    overlap,
    places_of,
    teachers,
)
from data_pipeline.models.embedded.phrasing import Phrasing
from data_pipeline.models.embedded.training import TrainingSettings
from data_pipeline.models.embedded.vocabulary import write_tokenizer
from data_pipeline.models.grounding_dino_hf import GroundingDinoHF, load_grounding_dino_hf
from data_pipeline.records import Entity, Frame

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
logging.disable_progress_bar()
MICRO = DetectorSizes(
    widths=(16, 16, 32, 32), depths=(1, 1, 1, 1), width=32, feed_forward=32, heads=2, queries=8, text_width=16,
    text_layers=1, image_size=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return tokens_of(folder)


@pytest.fixture
def batch(frames, tokens):
    return sample_batch(np.random.default_rng(0), frames, 6, tokens)


def make_batch(boxes, positive):
    """One frame; text of five tokens."""
    length = 5
    text = Phrasing(
        ids=np.zeros((1, length), np.int64),
        attention=np.ones((1, length), bool),
        owners=np.full((1, length), -1),
    )
    return DetectorBatch(
        pixels=torch.zeros(1, 3, 64, 64),
        text=text,
        boxes=torch.tensor([boxes]),
        categories=torch.zeros(1, len(boxes), dtype=torch.int64),
        positive=torch.tensor([positive]),
    )


def test_a_score_begins_low(batch):
    torch.manual_seed(0)
    output = build_detector(MICRO)(
        pixel_values=batch.pixels,
        input_ids=torch.from_numpy(batch.text.ids),
        attention_mask=torch.from_numpy(batch.text.attention),
    )
    there = torch.from_numpy(batch.text.attention)[:, None].expand(-1, MICRO.queries, -1)
    logits = output.logits[..., : batch.text.ids.shape[1]][there]
    assert -7 < logits.mean() < -2
    assert (logits > 0).float().mean() < 0.1


def test_focal_loss_weighs_cross_entropy():
    logits, target = torch.tensor([0.0, 2.0, -2.0]), torch.tensor([1.0, 0.0, 1.0])
    chance = logits.sigmoid()
    plain = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    expected = torch.stack(
        (
            0.25 * (1 - chance[0]) ** 2 * plain[0],
            0.75 * chance[1] ** 2 * plain[1],
            0.25 * (1 - chance[2]) ** 2 * plain[2],
        )
    )
    assert torch.allclose(focal_loss(logits, target), expected)


def test_overlap_is_the_generalised_iou():
    one = torch.tensor([0.5, 0.5, 0.4, 0.4])
    assert overlap(one, one).item() == pytest.approx(1.0)
    # Side by side, touching: no intersection, a hull that both fill.
    assert overlap(one, torch.tensor([0.9, 0.5, 0.4, 0.4])).item() == pytest.approx(0.0, abs=1e-6)
    # Corner to corner: half of the hull is empty.
    assert overlap(one, torch.tensor([0.9, 0.9, 0.4, 0.4])).item() == pytest.approx(-0.5)
    # One half of it.
    assert overlap(one, torch.tensor([0.5, 0.6, 0.4, 0.2])).item() == pytest.approx(0.5)


def test_mirrored_frames_have_mirrored_boxes(frames, tokens):
    """The brightest corner of a white square goes where its box goes."""
    size = frames.images.shape[1]
    images, boxes = np.zeros((4, size, size, 3), np.uint8), np.zeros((4, 4, 4), np.float32)
    images[:, 8:16, 4:20], boxes[:, 0] = 255, np.array([4, 8, 20, 16]) / size
    traits = np.full((4, 4, 3), -1, np.int8)
    traits[:, 0] = 2
    known = type(frames)(images=images, boxes=boxes, masks=np.zeros((4, 4, 1), np.uint8), traits=traits)
    drawn = sample_batch(np.random.default_rng(2), known, 4, tokens)
    places = set()
    for pixels, box in zip(drawn.pixels, drawn.boxes[:, 0], strict=True):
        x1, y1, x2, y2 = (round(value) for value in (corners_of(box) * size).tolist())
        bright = pixels.mean(0) > 1
        assert bright[y1:y2, x1:x2].all()
        assert bright.sum() == (y2 - y1) * (x2 - x1)
        places.add(x1)
    assert places == {4, size - 20}


def test_positive_tokens_are_those_of_the_subject(batch):
    for row, owners in enumerate(batch.text.owners):
        for slot in range(4):
            asks = batch.positive[row, slot].numpy()
            assert set(owners[asks]) <= {int(batch.categories[row, slot])}
    assert batch.positive.any(-1).sum() >= 6


def test_vary_changes_the_light_a_little(frames):
    varied = vary(np.random.default_rng(0), np.asarray(frames.images[:8]))
    assert varied.dtype == np.uint8
    change = np.abs(varied.astype(int) - frames.images[:8].astype(int)).mean((1, 2, 3))
    assert (change > 0).all()
    assert (change < 45).all()


def test_queries_are_given_to_subjects_at_least_cost():
    boxes = [[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.3, 0.3], [0.5, 0.5, 0.1, 0.1]]
    positive = [[False, True, False, False, False], [False, False, False, True, False], [False] * 5]
    logits = torch.full((1, 4, 5), -4.0)
    logits[0, 3, 1] = logits[0, 0, 3] = 3.0
    found = torch.tensor([[boxes[1], boxes[2], boxes[0], boxes[0]]])
    frames, queries, subjects = assign(logits, found, make_batch(boxes, positive))
    # The third subject is asked for by nobody, and of two queries with one box the better-named one stands for it.
    assert frames.tolist() == [0, 0]
    assert sorted(zip(queries.tolist(), subjects.tolist(), strict=True)) == [(0, 1), (3, 0)]


def test_a_batch_that_nobody_asks_about_has_no_assignment():
    frames, queries, subjects = assign(
        torch.zeros(1, 4, 5), torch.rand(1, 4, 4), make_batch([[0.5, 0.5, 0.2, 0.2]], [[False] * 5])
    )
    assert len(frames) == len(queries) == len(subjects) == 0


def test_places_in_the_middle_of_a_subject_teach():
    shapes = [(8, 8), (4, 4)]
    places = places_of(shapes)
    assert places[:2].tolist() == [[0.0625, 0.0625], [0.1875, 0.0625]]
    boxes = [[0.25, 0.25, 0.5, 0.5], [0.76, 0.76, 0.02, 0.02], [0.75, 0.25, 0.5, 0.5]]
    asked, silent = [True, False, False, False, False], [False] * 5
    owner = teachers(places, 64, make_batch(boxes, [asked, asked, silent]))[0]
    fine, coarse = owner[:64].reshape(8, 8), owner[64:].reshape(4, 4)
    assert (fine[1:3, 1:3] == 0).all()
    assert (fine == 0).sum() == 4
    assert (fine == 1).nonzero().tolist() == [[6, 6]]  # too small for any middle: the nearest place
    assert (coarse == 0).sum() == 0  # the middles of coarse cells lie on the rim of its middle
    assert (owner == 2).sum() == 0


def test_boxes_hit_once_each():
    true = [(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)]
    assert match_boxes([true[0], true[0], (0.5, 0.5, 1.0, 0.9)], true) == pytest.approx([1.0, 0.8])
    assert match_boxes([(0.0, 0.5, 0.5, 1.0)], true) == []
    assert match_boxes([], true) == []


def test_training_lowers_every_loss(frames, tokens, tmp_path):
    """A minute's worth of training in small: the same 8 frames again and again."""
    few = type(frames)(
        images=frames.images[:8], boxes=frames.boxes[:8], masks=frames.masks[:8], traits=frames.traits[:8]
    )
    torch.manual_seed(0)
    model = TutoredDetector(build_detector(MICRO)).train()
    lesson = detector_lesson(model, few, tokens, 8, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(40):
        losses = lesson(step)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    for name in history[0]:
        first, last = (np.mean([losses[name] for losses in part]) for part in (history[:5], history[-5:]))
        assert last < first, name
    assert history[-1].keys() == {
        "encoder_name", "tutor", "encoder_box", "encoder_overlap", "layer0_name", "layer0_box", "layer0_overlap",
        "layer1_name", "layer1_box", "layer1_overlap",
    }  # fmt: skip


def test_logits_and_boxes_that_are_taught_are_those_of_the_library(batch):
    """The last layer's, which transformers hands out: the losses work on the same numbers."""
    torch.manual_seed(0)
    model = TutoredDetector(build_detector(MICRO)).eval()
    output = model.detector(
        pixel_values=batch.pixels,
        input_ids=torch.from_numpy(batch.text.ids),
        attention_mask=torch.from_numpy(batch.text.attention),
    )
    start = torch.special.logit(output.intermediate_reference_points[:, 0], eps=1e-5)
    boxes = (model.detector.bbox_embed[1](output.intermediate_hidden_states[:, 1]) + start).sigmoid()
    logits = output.intermediate_hidden_states[:, 1] @ output.encoder_last_hidden_state_text.transpose(1, 2)
    assert torch.allclose(boxes, output.pred_boxes, atol=1e-6)
    there = torch.from_numpy(batch.text.attention)[:, None].expand_as(logits)
    assert torch.allclose(logits[there], output.logits[..., : logits.shape[2]][there], atol=1e-5)


def test_a_saved_detector_is_loaded_by_the_pipeline(tmp_path, frames):
    torch.manual_seed(0)
    model = build_detector(MICRO).eval()
    save_detector(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
    loaded, tokenizer, preprocessing = load_grounding_dino_hf(str(tmp_path), "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    image = np.asarray(frames.images[0])
    assert torch.allclose(preprocessing(image), as_pixels(image[None])[0], atol=1e-5)
    detector = GroundingDinoHF(loaded, tokenizer, preprocessing, box_threshold=1e-6, nms_iou=0.7)
    entities = tuple(Entity(phrase=word, head=word, mention=word, position=0) for word in ("dog", "zyzzyva"))
    found = detector.detect([Question(video=None, frame=Frame(index=0, time=0.0, image=image), entities=entities)])
    assert {one.entity.phrase for one in found[0]} <= {"dog", "zyzzyva"}
    assert found[0]


def test_train_detector_writes_a_detector(tmp_path, frames, monkeypatch):
    monkeypatch.setattr("data_pipeline.models.embedded.detector.DetectorSizes", lambda image_size: MICRO)
    settings = TrainingSettings(steps=2, batch_size=2)
    count = train_detector(frames, frames, settings, tmp_path / "run", tmp_path / "model")
    loaded = load_grounding_dino_hf(str(tmp_path / "model"), "cpu")[0]
    assert count == sum(value.numel() for value in loaded.parameters())
    values = validate(loaded, frames, tokens_of(tmp_path / "model"))
    assert set(values) == {"recall", "precision", "iou"}
