"""A tiny Grounding DINO (transformers' classes, small sizes) and its training on the procedural world.

The losses are those of DETR (Hungarian matching, focal loss on the tokens, L1 and GIoU on the boxes) on every decoder
layer. Alone they take hours to find anything. The proposals of the encoder are therefore taught densely: every place
near the middle of a subject has to name it and to give its box, as in detectors without matching (FCOS). Then the
decoder starts from boxes that are nearly right after a few minutes on one processor core.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, ConvNextV2Config, GroundingDinoConfig, GroundingDinoForObjectDetection

from data_pipeline.models.embedded.detector_losses import DetectorBatch, corners_of, decoder_losses, encoder_losses
from data_pipeline.models.embedded.phrasing import Tokens, sample_phrases, tokenize
from data_pipeline.models.embedded.renderings import Renderings
from data_pipeline.models.embedded.training import Losses, TrainingSettings, train
from data_pipeline.models.embedded.vocabulary import MAX_TOKENS, SIZE, load_tokenizer, write_tokenizer
from data_pipeline.models.model_files import share_weights
from data_pipeline.records import Box, box_iou
from data_pipeline.world.palette import CATEGORIES

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels: what Grounding DINO's preprocessing takes off and divides by."""
THRESHOLD, SAME = 0.35, 0.7
"""The pipeline's own defaults of box_threshold and nms_iou."""
STRIDES = (8, 16, 32)
"""Of the three levels of features."""


@dataclass(frozen=True, kw_only=True)
class DetectorSizes:
    """Sizes of the detector; the defaults are those of the shipped one."""

    widths: tuple[int, ...] = (32, 64, 96, 128)
    """Channels of the four stages of the backbone (ConvNeXt V2), at a quarter to a 32nd of the resolution."""
    depths: tuple[int, ...] = (1, 1, 3, 1)
    width: int = 96
    """Of the tokens in encoder and decoder; a multiple of 32, which the group norms need."""
    encoder_layers: int = 1
    decoder_layers: int = 2
    """At least 2: with one, transformers refuses the shared box heads."""
    feed_forward: int = 192
    heads: int = 4
    queries: int = 24
    text_width: int = 64
    text_layers: int = 2
    image_size: int = 128


def build_detector(sizes: DetectorSizes) -> GroundingDinoForObjectDetection:
    """A detector with random weights."""
    backbone = ConvNextV2Config(
        hidden_sizes=list(sizes.widths),
        depths=list(sizes.depths),
        patch_size=4,
        image_size=sizes.image_size,
        out_indices=[2, 3, 4],
        drop_path_rate=0.0,
    )
    text = BertConfig(
        vocab_size=SIZE,
        hidden_size=sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=2,
        intermediate_size=2 * sizes.text_width,
        max_position_embeddings=MAX_TOKENS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config=text,
        d_model=sizes.width,
        encoder_layers=sizes.encoder_layers,
        decoder_layers=sizes.decoder_layers,
        encoder_ffn_dim=sizes.feed_forward,
        decoder_ffn_dim=sizes.feed_forward,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        # Half of the usual sampling points in the encoder: they are most of its time.
        encoder_n_points=2,
        decoder_n_points=4,
        num_feature_levels=3,
        num_queries=sizes.queries,
        dropout=0.0,
        attention_dropout=0.0,
        fusion_droppath=0.0,
        max_text_len=MAX_TOKENS,
    )
    model = GroundingDinoForObjectDetection(config)
    _begin_loudly(model)
    _begin_with_doubt(model)
    return model


@torch.no_grad()
def _begin_loudly(model: GroundingDinoForObjectDetection) -> None:
    """Random weights that keep the size of a signal.

    transformers draws them with a spread of 0.02, right for a width of 768; in layers as narrow as these, nothing of
    the picture would come through, and the first minutes of training would be lost.
    """
    inner = model.model
    wide = [*inner.backbone.modules(), *inner.text_backbone.modules()]
    wide += [layer for name, layer in model.named_modules() if name.endswith((".fc1", ".fc2"))]
    for layer in wide:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


@torch.no_grad()
def _begin_with_doubt(model: GroundingDinoForObjectDetection) -> None:
    """Lets every score begin near sigmoid(-4).

    A score is the sigmoid of a bare scalar product of two normalised vectors, about -30 to 30 with random weights, and
    has no offset. Training would first flatten the vectors, and take long to unflatten them.
    """
    inner, width = model.model, model.config.d_model
    direction = torch.full((width,), width**-0.5)
    inner.encoder.layers[-1].text_enhancer_layer.layer_norm_after.bias.copy_(2 * direction)
    for norm in (inner.enc_output_norm, inner.decoder.layer_norm):
        norm.weight.fill_(0.2)
        norm.bias.copy_(-2 * direction)


def save_detector(model: GroundingDinoForObjectDetection, folder: Path) -> None:
    """A directory as transformers writes it: config.json, model.safetensors, tokenizer, preprocessor_config.json."""
    model.save_pretrained(str(folder))
    share_weights(folder)
    write_tokenizer(folder)
    size = int(model.config.backbone_config.image_size)
    settings = {
        "image_processor_type": "GroundingDinoImageProcessor",
        "processor_class": "GroundingDinoProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size, "longest_edge": round(size * 1333 / 800)},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(SPREAD),
        "do_pad": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------- the batches


def as_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to normalised float32 (B, 3, H, W)."""
    scaled = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(SPREAD).view(3, 1, 1)


def vary(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """The frames in other light, with a little noise. uint8 (B, H, W, 3) to the same."""
    count = len(images)
    gain = rng.uniform(0.85, 1.15, (count, 1, 1, 1)) * rng.uniform(0.96, 1.04, (count, 1, 1, 3))
    noise = rng.standard_normal(images.shape, dtype=np.float32) * rng.uniform(0, 5, (count, 1, 1, 1)).astype(np.float32)
    return np.clip(images * gain.astype(np.float32) + noise, 0, 255).astype(np.uint8)


def sample_batch(rng: np.random.Generator, frames: Renderings, size: int, tokens: Tokens) -> DetectorBatch:
    """``size`` frames, half of them mirrored, with questions."""
    chosen = np.sort(rng.choice(len(frames), size, replace=len(frames) < size))
    images, corners, traits = (np.asarray(values[chosen]) for values in (frames.images, frames.boxes, frames.traits))
    mirrored = rng.random(size) < 0.5
    images, corners = images.copy(), corners.copy()
    images[mirrored] = images[mirrored, :, ::-1]
    there = traits[..., 0] >= 0
    corners[mirrored] = np.stack(
        (1 - corners[mirrored, :, 2], corners[mirrored, :, 1], 1 - corners[mirrored, :, 0], corners[mirrored, :, 3]), -1
    )
    text = tokenize([sample_phrases(rng, rows) for rows in traits], tokens)
    positive = (traits[..., :1] == text.owners[:, None]) & there[..., None]
    centres = np.concatenate(((corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]), -1)
    return DetectorBatch(
        pixels=as_pixels(vary(rng, images)),
        text=text,
        boxes=torch.from_numpy(centres.astype(np.float32)),
        categories=torch.from_numpy(traits[..., 0].astype(np.int64).clip(0)),
        positive=torch.from_numpy(positive),
    )


# ---------------------------------------------------------------------------------------------------------- the losses


class TutoredDetector(nn.Module):
    """The detector and, for training only, a tutor: a linear layer that names the category of every place without
    asking the text. The backbone learns the ten categories from it before text and pictures agree on a language.
    """

    def __init__(self, detector: GroundingDinoForObjectDetection) -> None:
        super().__init__()
        self.detector = detector
        self.tutor = nn.Linear(detector.config.d_model, len(CATEGORIES))

    def losses(self, batch: DetectorBatch) -> Losses:
        """All losses of a batch."""
        detector = self.detector
        output = detector(
            pixel_values=batch.pixels,
            input_ids=torch.from_numpy(batch.text.ids),
            attention_mask=torch.from_numpy(batch.text.attention),
        )
        length = batch.text.ids.shape[1]
        shapes = [tuple(side // stride for side in batch.pixels.shape[2:]) for stride in STRIDES]
        losses = encoder_losses(
            output.enc_outputs_class[..., :length],
            output.enc_outputs_coord_logits.sigmoid(),
            self.tutor(output.encoder_last_hidden_state_vision),
            shapes,
            batch,
        )
        # Logits and boxes of every layer, which transformers computes but hands out for the last layer only.
        states, text = output.intermediate_hidden_states, output.encoder_last_hidden_state_text
        for layer in range(states.shape[1]):
            start = output.init_reference_points if layer == 0 else output.intermediate_reference_points[:, layer - 1]
            boxes = (detector.bbox_embed[layer](states[:, layer]) + torch.special.logit(start, eps=1e-5)).sigmoid()
            losses |= decoder_losses(f"layer{layer}", states[:, layer] @ text.transpose(1, 2), boxes, batch)
        return losses


def detector_lesson(
    model: TutoredDetector, frames: Renderings, tokens: Tokens, batch_size: int, seed: int
) -> Callable[[int], Losses]:
    """The function that ``training.train`` wants: step to losses."""

    def lesson(step: int) -> Losses:
        return model.losses(sample_batch(np.random.default_rng([seed, step]), frames, batch_size, tokens))

    return lesson


def tokens_of(folder: Path) -> Tokens:
    """The tokens of phrases by the tokenizer of a model's folder."""
    tokenizer = load_tokenizer(folder)
    return Tokens(lambda phrase: tokenizer(phrase, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def validate(detector: GroundingDinoForObjectDetection, frames: Renderings, tokens: Tokens) -> dict[str, float]:
    """Recall and precision at IoU 0.5 and a score of THRESHOLD on rendered frames, asked for what is there and for the
    beach, and the mean IoU of what was found. Quick and close to ``measure``, which decodes clips and mines them.
    """
    found = asked = given = 0
    overlaps: list[float] = []
    for start in range(0, len(frames), 24):
        rows = np.arange(start, min(start + 24, len(frames)))
        traits = np.asarray(frames.traits[rows, :, 0])
        present = [list(dict.fromkeys(int(number) for number in row if number >= 0)) for row in traits]
        text = tokenize([[*((CATEGORIES[number], number) for number in row), ("beach", -1)] for row in present], tokens)
        output = detector(
            pixel_values=as_pixels(np.asarray(frames.images[rows])),
            input_ids=torch.from_numpy(text.ids),
            attention_mask=torch.from_numpy(text.attention),
        )
        scores = output.logits[..., : text.ids.shape[1]].sigmoid().numpy()
        boxes = corners_of(output.pred_boxes).numpy()
        for index, row in enumerate(rows):
            for number in present[index]:
                best = scores[index][:, text.owners[index] == number].max(1)
                chosen = _suppress(boxes[index], best)
                true = [tuple(box) for box in np.asarray(frames.boxes[row])[traits[index] == number]]
                hits = match_boxes([tuple(boxes[index][query]) for query in chosen], true)
                found, asked, given = found + len(hits), asked + len(true), given + len(chosen)
                overlaps += hits
    return {
        "recall": found / max(1, asked),
        "precision": found / max(1, given),
        "iou": float(np.mean(overlaps)) if overlaps else 0.0,
    }


def _suppress(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Queries that score at least THRESHOLD, the best first, without those that repeat a better one."""
    kept: list[int] = []
    for query in np.argsort(-scores, kind="stable"):
        if scores[query] < THRESHOLD:
            break
        if all(box_iou(tuple(boxes[query]), tuple(boxes[other])) <= SAME for other in kept):
            kept.append(int(query))
    return kept


def match_boxes(found: list[Box], true: list[Box]) -> list[float]:
    """IoUs of the boxes that hit: each, the best first, takes its best true box, if that is free and fits by 0.5."""
    free, hits = list(true), list[float]()
    for box in found:
        best = max(free, key=lambda other: box_iou(box, other), default=None)
        if best is not None and box_iou(box, best) >= 0.5:
            hits.append(box_iou(box, best))
            free.remove(best)
    return hits


def train_detector(
    frames: Renderings,
    validation: Renderings,
    settings: TrainingSettings,
    work: Path,
    out: Path,
    initial: Path | None = None,
) -> int:
    """Trains a detector on ``frames`` and writes it to ``out``; returns the number of its parameters.

    work: folder for the state of the run, which goes on from there. validation: frames to look at whenever the state
    is saved. initial: folder of another run, whose averaged weights this one begins with.
    """
    write_tokenizer(work)
    tokens = tokens_of(work)
    torch.manual_seed(settings.seed)
    model = TutoredDetector(build_detector(DetectorSizes(image_size=frames.images.shape[1])))
    lesson = detector_lesson(model, frames, tokens, settings.batch_size, settings.seed)

    def report(average: nn.Module, step: int) -> str:
        values = validate(average.detector, validation, tokens)
        return f"step {step}: held-out " + " ".join(f"{name} {value:.3f}" for name, value in values.items())

    averaged = train(model, lesson, settings, work, on_save=report, initial=initial)
    save_detector(averaged.detector, out)
    return sum(value.numel() for value in averaged.detector.parameters())
