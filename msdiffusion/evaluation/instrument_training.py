"""Training of locator and recognizer on renders: `lightning fit -c configs/embedded/{locator,recognizer}.yaml`.

As for the judge, renders are degraded in many ways and both splits of the identities are shown: these networks measure,
so a prejudice about which subjects exist would only make the ruler crooked. They never see a generated picture.

Letters: B scenes of a batch, N subjects of all of them together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import generalized_box_iou_loss

from data_pipeline.world import CATEGORIES, COLORS, PATTERNS
from data_pipeline.world.renderings import Renderings, RenderingSettings, identity_labels, load_or_render
from data_pipeline.world.subjects import SHAPE_VARIANTS
from msdiffusion.evaluation.instruments.locator import Locator, LocatorParams, grid_centers, layout_ious
from msdiffusion.evaluation.instruments.recognizer import VIEW_BACKGROUND, Recognizer, RecognizerParams
from msdiffusion.evaluation.instruments.training import Batch, InstrumentTraining, check_counts, degrade

LABEL_SIZES = (len(CATEGORIES), len(COLORS), len(COLORS), len(COLORS), len(PATTERNS), SHAPE_VARIANTS)
"""Possible answers per column of `identity_labels`."""


class SubjectScenes(Dataset[Batch]):
    """Rendered scenes and views; a batch is made at once.

    Its further tensors: labels (N, 6) int64 and identities (N,) int64; views (N, 3, H, W) in [0, 1], another picture of
    each subject on grey, and view_boxes (N, 4), where it is in there.
    """

    def __init__(self, renderings: Renderings, seed: int) -> None:
        self.renderings = renderings
        self.labels = identity_labels(renderings.identities)
        self.views_each = len(renderings.views) // len(renderings.identities)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.renderings.images)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = np.sort(np.asarray(indices))
        rng = np.random.default_rng([self.seed, *rows[:4].tolist()])
        data = self.renderings
        members = data.members[rows]
        owners, slots = np.nonzero(members >= 0)
        who = members[owners, slots]
        views = data.views[who * self.views_each + rng.integers(self.views_each, size=len(who))]
        mirrored = rng.random(len(who)) < 0.5
        views = np.where(mirrored[:, None, None, None], views[:, :, ::-1], views).astype(np.float32) / 255
        alpha = views[..., 3:]
        shown = views[..., :3] * alpha + VIEW_BACKGROUND * (1 - alpha)
        return {
            "pictures": torch.from_numpy(data.images[rows]).permute(0, 3, 1, 2).float() / 255,
            "boxes": torch.from_numpy(data.boxes[rows][owners, slots]),
            "owners": torch.from_numpy(owners),
            "labels": torch.from_numpy(self.labels[who]),
            "identities": torch.from_numpy(who.astype(np.int64)),
            "views": torch.from_numpy(shown).permute(0, 3, 1, 2),
            "view_boxes": torch.from_numpy(_opaque_boxes(alpha[..., 0] >= 0.5)),
        }


def _opaque_boxes(masks: np.ndarray) -> np.ndarray:
    """Tight normalised xyxy boxes float32 (N, 4) of non-empty masks (N, H, W)."""
    height, width = masks.shape[1:]
    columns, rows = masks.any(1), masks.any(2)
    edges = [
        columns.argmax(1) / width,
        rows.argmax(1) / height,
        1 - columns[:, ::-1].argmax(1) / width,
        1 - rows[:, ::-1].argmax(1) / height,
    ]
    return np.stack(edges, 1).astype(np.float32)


class InstrumentRenderings(pl.LightningDataModule):
    """Scenes of all identities to learn from, scenes of held-out ones to validate on; cached on disk.

    Args:
        scenes: in the training pool.
        identities: in the training pool.
        validation_scenes: scenes of held-out identities.
        batch_size: scenes per step.
        cache: folder of the rendered arrays.
        size: side of a scene in pixels.
        seed: of the renderings; differs from the seeds of pretraining and evaluation sets.
        workers: processes for rendering.

    Raises:
        DataError: a number below 1.
    """

    def __init__(
        self,
        scenes: int = 16_000,
        identities: int = 5_000,
        validation_scenes: int = 512,
        batch_size: int = 32,
        cache: str = "data/world/renderings",
        size: int = 64,
        seed: int = 2000,
        workers: int = 2,
    ) -> None:
        super().__init__()
        check_counts(scenes=scenes, identities=identities, validation_scenes=validation_scenes, batch_size=batch_size)
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Renders both pools or reads them back."""
        p = self.hparams
        pools = (
            RenderingSettings(p.scenes, p.identities, 2, "all", p.size, seed=p.seed),
            RenderingSettings(p.validation_scenes, 600, 2, "held_out", p.size, seed=p.seed + 1),
        )
        self.train_set, self.validation_set = (
            SubjectScenes(load_or_render(pool, p.cache, p.workers), p.seed) for pool in pools
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches."""
        return DataLoader(
            self.train_set, self.hparams.batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Held-out scenes in a fixed order."""
        return DataLoader(self.validation_set, self.hparams.batch_size, collate_fn=lambda batch: batch)


class LocatorTraining(InstrumentTraining):
    """Confidence by cross-entropy, edges by generalised IoU (Rezatofighi et al. 2019).

    Args:
        output: directory for config.json and model.safetensors.
        learning_rate: peak.
        weight_decay: of AdamW.
        widths: see `LocatorParams`.
    """

    def __init__(
        self,
        output: str,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.02,
        widths: tuple[int, ...] = (24, 48, 96, 128, 160),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = Locator(LocatorParams(widths=tuple(widths)))

    def losses(self, pictures: Tensor, boxes: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """(confidence loss, edge loss) of pictures (B, 3, H, W) with boxes (N, 4) of owners (N,)."""
        logits, found = self.network(pictures)
        target, own = assign_cells(boxes, owners, len(pictures), logits.shape[1])
        counted = target >= 0
        confidence = nn.functional.binary_cross_entropy_with_logits(logits[counted], target[counted].float())
        middle = target == 1
        edges = generalized_box_iou_loss(found[middle], boxes[own[middle]], reduction="sum") / middle.sum().clamp(min=1)
        return confidence, edges

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One step on degraded scenes; their boxes stay exact."""
        pictures = degrade({"pictures": batch["pictures"], "boxes": batch["boxes"]})["pictures"]
        confidence, edges = self.losses(pictures, batch["boxes"], batch["owners"])
        self.log_dict({"confidence": confidence, "edges": edges}, prog_bar=True, batch_size=len(pictures))
        return 4 * confidence + edges

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """IoU of the found boxes on held-out subjects."""
        pixels = (batch["pictures"].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        boxes, owners = batch["boxes"].cpu().numpy(), batch["owners"].cpu().numpy()
        for index, located in enumerate(self.network.find(list(pixels))):
            self.seen["ious"].append(layout_ious(boxes[owners == index], located))

    def on_validation_epoch_end(self) -> None:
        """Mean IoU and share above .5."""
        ious = np.concatenate(self.seen["ious"])
        self.log_dict({"val/iou": float(ious.mean()), "val/found": float((ious >= 0.5).mean())})
        self.print(f"held-out renders: mean IoU {ious.mean():.3f}, IoU >= .5 for {(ious >= 0.5).mean():.3f}")


def assign_cells(boxes: Tensor, owners: Tensor, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Which cells of the grids of `count` pictures must answer for which box.

    Args:
        boxes: (N, 4) normalised xyxy.
        owners: (N,) int64.
        count: B.
        side: G.

    Returns:
        target int64 (B, G, G): 1 in the middle half of a box, -1 (not counted) elsewhere in a box, 0 outside; and own
        int64 (B, G, G): the box of each cell, the smallest where several overlap; meaningless where the target isn't 1.
    """
    centers = grid_centers(side, boxes.device)[None]  # (1, G, G, 2)
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    offset = (centers - middle[:, None, None]).abs() / half[:, None, None]
    inside, central = (offset <= 1).all(-1), (offset <= 0.5).all(-1)  # (N, G, G)
    # A cell is always given to the box whose middle it holds, however small the box is.
    nearest = (centers - middle[:, None, None]).square().sum(-1)
    central = central | (nearest == nearest.amin((1, 2), keepdim=True))
    target = torch.zeros(count, side, side, dtype=torch.int64, device=boxes.device)
    own = torch.zeros_like(target)
    for index in torch.argsort(half.prod(1), descending=True).tolist():  # the smallest comes last and wins
        picture = owners[index]
        target[picture][inside[index] & (target[picture] != 1)] = -1
        target[picture][central[index]] = 1
        own[picture][central[index]] = index
    return target, own


class RecognizerTraining(InstrumentTraining):
    """A box of a scene and another view of its subject meet in one place, apart from all others; parts are named too.

    Contrastive loss over the batch in both directions (Khosla et al. 2020, eq. 2, one positive each), where subjects of
    one identity don't repel each other; and cross-entropy of category, colours, pattern and shape, which tells the
    network early what to look at.

    Args:
        output: directory for config.json and model.safetensors.
        learning_rate: peak.
        weight_decay: of AdamW.
        temperature: of the contrastive loss.
        naming_weight: of the cross-entropies.
        widths: see `RecognizerParams`.
    """

    def __init__(
        self,
        output: str,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.02,
        temperature: float = 0.1,
        naming_weight: float = 0.5,
        widths: tuple[int, ...] = (32, 64, 128, 192),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = Recognizer(RecognizerParams(widths=tuple(widths)))
        width = self.network.params.embedding_width
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in LABEL_SIZES)

    def embeddings(self, batch: Batch, degraded: bool) -> tuple[Tensor, Tensor]:
        """Unit vectors (N, D) of the boxes and of the views."""
        pictures, boxes = batch["pictures"], batch["boxes"]
        views, view_boxes = batch["views"], batch["view_boxes"]
        if degraded:
            shown = degrade({"pictures": pictures, "boxes": boxes})
            pictures, boxes = shown["pictures"], shown["boxes"]
        own = torch.arange(len(views), device=views.device)
        return self.network(pictures, boxes, batch["owners"]), self.network(views, view_boxes, own)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """One step on degraded scenes and clean views."""
        boxes, views = self.embeddings(batch, degraded=True)
        similarity = boxes @ views.T / self.hparams.temperature
        count = len(similarity)
        same = batch["identities"][:, None] == batch["identities"][None]
        twins = same & ~torch.eye(count, dtype=torch.bool, device=same.device)
        similarity = similarity.masked_fill(twins, -1e4)
        partner = torch.arange(count, device=same.device)
        contrastive = nn.functional.cross_entropy(similarity, partner) + nn.functional.cross_entropy(
            similarity.T, partner
        )
        labels = batch["labels"].repeat(2, 1)
        both = torch.cat([boxes, views]) * 8  # unit vectors are too short for confident answers
        naming = sum(
            nn.functional.cross_entropy(head(both), labels[:, column]) for column, head in enumerate(self.heads)
        )
        self.log_dict({"contrastive": contrastive, "naming": naming}, prog_bar=True, batch_size=count)
        return contrastive + self.hparams.naming_weight * naming

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Embeds held-out subjects."""
        for name, part in zip(("boxes", "views"), self.embeddings(batch, degraded=False), strict=True):
            self.seen[name].append(part)
        self.seen["labels"].append(batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """How often the right view comes first among up to 100 of its category."""
        boxes, views, labels = (torch.cat(self.seen[name]) for name in ("boxes", "views", "labels"))
        rate = float(np.mean(list(_first_places(boxes, views, labels))))
        self.log("val/retrieval", rate)
        self.print(f"held-out renders: right one first among 100 of its category {rate:.3f}")


def _first_places(boxes: Tensor, views: Tensor, labels: Tensor) -> Iterator[float]:
    """1.0 or 0.0 per subject; a view with exactly its labels is the same individual and counts as right."""
    for index in range(len(boxes)):
        rivals = ((labels[:, 0] == labels[index, 0]) & ~(labels == labels[index]).all(1)).nonzero().flatten()[:99]
        own = boxes[index] @ views[index]
        yield float((views[rivals] @ boxes[index] < own).all())
