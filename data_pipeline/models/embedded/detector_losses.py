"""What the embedded detector is taught: the losses of its decoder and of the proposals of its encoder."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from data_pipeline.models.embedded.phrasing import Phrasing
from data_pipeline.models.embedded.training import Losses

ALPHA, GAMMA = 0.25, 2.0
BOX_WEIGHT, OVERLAP_WEIGHT, TUTOR_WEIGHT = 5.0, 2.0, 0.5
MIDDLE = 0.5
"""A place teaches the encoder if it lies in the middle of a box, shrunk to this share of its sides."""


@dataclass(frozen=True, eq=False)
class DetectorBatch:
    """Frames with questions, and what is true of them.

    pixels: float32 (B, 3, H, W), normalised. text: the questions. boxes: float32 (B, S, 4), centre, width and height
    as fractions. categories: int64 (B, S), 0 where absent. positive: bool (B, S, T), the tokens that ask for each
    subject; none for a subject nobody asks for.
    """

    pixels: Tensor
    text: Phrasing
    boxes: Tensor
    categories: Tensor
    positive: Tensor


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017), element by element. logits: float, target: float of the same shape."""
    chance = logits.sigmoid()
    plain = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    miss = chance + target - 2 * chance * target
    return (ALPHA * target + (1 - ALPHA) * (1 - target)) * miss.pow(GAMMA) * plain


def corners_of(boxes: Tensor) -> Tensor:
    """(..., 4) centre, width, height to xyxy."""
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), -1)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al. 2019) in [-1, 1] of boxes (..., 4), centre, width, height; broadcasts."""
    a, b = corners_of(first), corners_of(second)
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - shared
    return shared / union.clamp_min(1e-6) - (hull - union) / hull.clamp_min(1e-6)


def box_losses(name: str, found: Tensor, true: Tensor) -> Losses:
    """L1 and GIoU losses of boxes (K, 4) against their truth, means over the K."""
    count = max(1, len(found))
    return {
        f"{name}_box": BOX_WEIGHT * (found - true).abs().sum() / count,
        f"{name}_overlap": OVERLAP_WEIGHT * (1 - overlap(found, true)).sum() / count,
    }


@torch.no_grad()
def assign(logits: Tensor, boxes: Tensor, batch: DetectorBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Which query stands for which subject: frame, query and subject numbers, int64 (K,) each, at least cost.

    logits: (B, Q, T). boxes: (B, Q, 4). The cost is DETR's: focal cost of the subject's tokens, L1 and GIoU.
    """
    chance = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    gain = -(1 - chance).pow(GAMMA) * chance.log() * ALPHA + chance.pow(GAMMA) * (1 - chance).log() * (1 - ALPHA)
    share = batch.positive.float() / batch.positive.sum(-1, keepdim=True).clamp_min(1)
    cost = 2 * gain @ share.transpose(1, 2)
    cost = cost + BOX_WEIGHT * (boxes[:, :, None] - batch.boxes[:, None]).abs().sum(-1)
    cost = (cost - OVERLAP_WEIGHT * overlap(boxes[:, :, None], batch.boxes[:, None])).numpy()
    asked = batch.positive.any(-1).numpy()
    triples = []
    for frame in range(len(cost)):
        subjects = np.flatnonzero(asked[frame])
        for query, column in zip(*linear_sum_assignment(cost[frame][:, subjects]), strict=True):
            triples.append((frame, query, subjects[column]))
    frames, queries, subjects = torch.tensor(triples, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return frames, queries, subjects


def decoder_losses(name: str, logits: Tensor, boxes: Tensor, batch: DetectorBatch) -> Losses:
    """Losses of one decoder layer. logits: (B, Q, T) without padding beyond T. boxes: (B, Q, 4)."""
    attention = torch.from_numpy(batch.text.attention)
    logits = logits.masked_fill(~attention[:, None], 0.0)
    frames, queries, subjects = assign(logits.detach(), boxes.detach(), batch)
    target = torch.zeros_like(logits)
    target[frames, queries] = batch.positive[frames, subjects].float()
    naming = (focal_loss(logits, target) * attention[:, None]).sum() / max(1, len(frames))
    return {f"{name}_name": naming, **box_losses(name, boxes[frames, queries], batch.boxes[frames, subjects])}


def places_of(shapes: list[tuple[int, int]]) -> Tensor:
    """Middles of the cells of all levels, (N, 2) as fractions, x before y."""
    levels = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        levels.append(torch.stack((x, y), -1).reshape(-1, 2))
    return torch.cat(levels)


@torch.no_grad()
def teachers(places: Tensor, finest: int, batch: DetectorBatch) -> Tensor:
    """The subject that each place stands for, int64 (B, N), -1 for none.

    places: (N, 2), the first ``finest`` of them those of the finest level, of which the one nearest to a subject's
    middle always stands for it. A place in the middles of several boxes takes the nearest one by its own size.
    """
    offset = (places[None, None] - batch.boxes[:, :, None, :2]).abs() / (batch.boxes[:, :, None, 2:] / 2).clamp_min(
        1e-6
    )
    distance = offset.amax(-1)
    nearest = distance[..., :finest].argmin(-1)
    inside = (distance < MIDDLE).scatter(2, nearest[..., None], True)
    inside = inside & batch.positive.any(-1)[..., None]
    best = distance.masked_fill(~inside, torch.inf).min(1)
    return best.indices.masked_fill(best.values.isinf(), -1)


def encoder_losses(
    logits: Tensor, boxes: Tensor, guesses: Tensor, shapes: list[tuple[int, int]], batch: DetectorBatch
) -> Losses:
    """Dense losses of the proposals. logits: (B, N, T); boxes: (B, N, 4); guesses: (B, N, categories) of the tutor; N
    cells of all levels, the finest first.
    """
    attention = torch.from_numpy(batch.text.attention)
    logits = logits.masked_fill(~attention[:, None], 0.0)
    owner = teachers(places_of(shapes), shapes[0][0] * shapes[0][1], batch)
    frames, cells = torch.nonzero(owner >= 0, as_tuple=True)
    subjects = owner[frames, cells]
    target = torch.zeros_like(logits)
    target[frames, cells] = batch.positive[frames, subjects].float()
    naming = (focal_loss(logits, target) * attention[:, None]).sum() / max(1, len(frames))
    tutoring = functional.cross_entropy(guesses[frames, cells], batch.categories[frames, subjects], reduction="sum")
    return {
        "encoder_name": naming,
        "tutor": TUTOR_WEIGHT * tutoring / max(1, len(frames)),
        **box_losses("encoder", boxes[frames, cells], batch.boxes[frames, subjects]),
    }
