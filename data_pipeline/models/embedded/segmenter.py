"""A tiny SAM (the package's classes, small sizes) and its training on the procedural world.

Only what the pipeline uses is taught: one box as a prompt, one mask as an answer, and its estimated quality. The
tokens for several masks, points and mask prompts keep their random weights.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam
from torch import Tensor
from torch.nn import functional

from data_pipeline.models.embedded.detector import vary
from data_pipeline.models.embedded.renderings import Renderings
from data_pipeline.models.embedded.training import Losses, TrainingSettings, train
from data_pipeline.models.model_files import share_weights
from data_pipeline.models.sam import SamParams, build_sam

SIZES = SamParams(
    encoder_width=96,
    encoder_depth=3,
    encoder_heads=4,
    global_attention=(1,),
    image_size=128,
    patch_size=8,
    window_size=8,
    prompt_width=64,
    decoder_depth=2,
    decoder_heads=4,
    decoder_mlp_width=128,
)
JITTER = 0.1
"""Each edge of a box prompt is off by up to this share of the box's side, as a detector's are."""
POINT_WEIGHT, SHAPE_WEIGHT, QUALITY_WEIGHT = 10.0, 1.0, 1.0


def build_segmenter(params: SamParams = SIZES) -> Sam:
    """A SAM with random weights."""
    return build_sam(params).train()


def save_segmenter(sam: Sam, params: SamParams, folder: Path) -> None:
    """config.json with the fields of SamParams, and model.safetensors: what ``data_pipeline.models.sam`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(params), indent=2) + "\n", encoding="utf-8")
    save_file({name: value.contiguous() for name, value in sam.state_dict().items()}, folder / "model.safetensors")
    share_weights(folder)


def predict(sam: Sam, pixels: Tensor, frames: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """One mask per box.

    The package's decoder takes one picture with many prompts; here every prompt brings its picture along, so a batch
    holds many of both. For one picture the results are equal. Returns logits (K, size, size) and quality (K,), the
    estimated IoU.

    pixels: float32 (B, 3, size, size) in [0, 255], size that of the model. frames: int64 (K,), the picture of each box.
    boxes: float32 (K, 4), xyxy in pixels.
    """
    scaled = (pixels - sam.pixel_mean) / sam.pixel_std
    features = sam.image_encoder(scaled)[frames]
    sparse, dense = sam.prompt_encoder(points=None, boxes=boxes, masks=None)
    decoder = sam.mask_decoder
    count = len(frames)
    own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight))
    tokens = torch.cat((own.expand(count, -1, -1), sparse), dim=1)
    places = sam.prompt_encoder.get_dense_pe().expand(count, -1, -1, -1)
    states, context = decoder.transformer(features + dense, places, tokens)
    fine = decoder.output_upscaling(context.transpose(1, 2).reshape(features.shape))
    weights = decoder.output_hypernetworks_mlps[0](states[:, 1])
    logits = torch.einsum("kc,kcyx->kyx", weights, fine)
    size = pixels.shape[-1]
    logits = functional.interpolate(logits[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]
    return logits, decoder.iou_prediction_head(states[:, 0])[:, 0]


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU of bool masks (K, H, W) each; 0 where both are empty."""
    shared = (first & second).flatten(1).sum(1)
    union = (first | second).flatten(1).sum(1)
    return shared / union.clamp_min(1)


def mask_losses(logits: Tensor, quality: Tensor, true: Tensor) -> Losses:
    """Cross-entropy on pixels, dice loss on the whole, squared error of the estimated quality.

    logits: (K, H, W). quality: (K,). true: bool (K, H, W).
    """
    wanted = true.float()
    chance = logits.sigmoid()
    dice = 1 - (2 * (chance * wanted).sum((1, 2)) + 1) / (chance.sum((1, 2)) + wanted.sum((1, 2)) + 1)
    with torch.no_grad():
        reached = mask_iou(logits > 0, true)
    return {
        "points": POINT_WEIGHT * functional.binary_cross_entropy_with_logits(logits, wanted),
        "shape": SHAPE_WEIGHT * dice.mean(),
        "quality": QUALITY_WEIGHT * functional.mse_loss(quality, reached),
    }


def jitter(rng: np.random.Generator, boxes: np.ndarray, size: int) -> np.ndarray:
    """Boxes (K, 4), xyxy as fractions, with moved edges, in pixels of a frame of this size. Half as far on average as
    JITTER allows, now and then not at all.
    """
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], (1, 2))
    reach = JITTER * rng.random((len(boxes), 1))
    return ((boxes + sides * reach * rng.uniform(-1, 1, boxes.shape)).clip(0, 1) * size).astype(np.float32)


def segmenter_lesson(sam: Sam, frames: Renderings, batch_size: int, seed: int) -> Callable[[int], Losses]:
    """The function that ``training.train`` wants: step to losses of ``batch_size`` frames with all their subjects."""

    def lesson(step: int) -> Losses:
        rng = np.random.default_rng([seed, step])
        chosen = np.sort(rng.choice(len(frames), batch_size, replace=len(frames) < batch_size))
        images = np.asarray(frames.images[chosen])
        rows, slots = np.nonzero(np.asarray(frames.traits[chosen, :, 0]) >= 0)
        boxes = np.asarray(frames.boxes[chosen])[rows, slots]
        size = images.shape[1]
        pixels = torch.from_numpy(vary(rng, images)).permute(0, 3, 1, 2).float()
        logits, quality = predict(sam, pixels, torch.from_numpy(rows), torch.from_numpy(jitter(rng, boxes, size)))
        return mask_losses(logits, quality, torch.from_numpy(frames.mask(chosen[rows], slots)))

    return lesson


@torch.no_grad()
def validate(sam: Sam, frames: Renderings) -> float:
    """Mean IoU of the masks of all subjects, with boxes that are a little off."""
    ious: list[Tensor] = []
    for start in range(0, len(frames), 24):
        chosen = np.arange(start, min(start + 24, len(frames)))
        rows, slots = np.nonzero(np.asarray(frames.traits[chosen, :, 0]) >= 0)
        images = np.array(frames.images[chosen])
        boxes = jitter(np.random.default_rng(start), np.asarray(frames.boxes[chosen])[rows, slots], images.shape[1])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        logits, _ = predict(sam, pixels, torch.from_numpy(rows), torch.from_numpy(boxes))
        ious.append(mask_iou(logits > 0, torch.from_numpy(frames.mask(chosen[rows], slots))))
    return float(torch.cat(ious).mean())


def train_segmenter(
    frames: Renderings,
    validation: Renderings,
    settings: TrainingSettings,
    work: Path,
    out: Path,
    initial: Path | None = None,
) -> int:
    """As ``train_detector``, of a segmenter."""
    torch.manual_seed(settings.seed)
    params = replace(SIZES, image_size=frames.images.shape[1])
    sam = build_segmenter(params)
    lesson = segmenter_lesson(sam, frames, settings.batch_size, settings.seed)

    def report(average: Sam, step: int) -> str:
        return f"step {step}: held-out mask IoU {validate(average, validation):.3f}"

    averaged = train(sam, lesson, settings, work, on_save=report, initial=initial)
    save_segmenter(averaged, params, out)
    return sum(value.numel() for value in averaged.parameters())
