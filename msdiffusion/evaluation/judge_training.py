"""Training the judge on renders: `lightning fit -c configs/embedded/judge.yaml`.

Generated pictures are softer, noisier and more bent than renders, so the renders are degraded in many ways while the
judge learns. It still never sees a generated picture: what it learns can't lean towards one model.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_pipeline.picture_formats import open_listed
from data_pipeline.world import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS, Scene, sample_scene
from msdiffusion.errors import DataError
from msdiffusion.evaluation.instruments.judge import QUESTIONS, Judge, JudgeParams
from msdiffusion.evaluation.instruments.networks import as_pixels
from msdiffusion.evaluation.instruments.training import Batch, InstrumentTraining, check_counts, degrade


def world_params(**changes: object) -> JudgeParams:
    """The judge's parameters for the vocabulary of the procedural world."""
    return JudgeParams(tuple(CATEGORIES), tuple(COLORS), tuple(PATTERNS), tuple(BACKGROUNDS), **changes)


@dataclass(frozen=True)
class LabelledScene:
    """One render in memory: uint8 (H, W, 3), normalised xyxy boxes (S, 4), class numbers."""

    picture: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    """(S, 3) int64: category, main colour, pattern."""
    background: int


def label_scene(scene: Scene, params: JudgeParams) -> LabelledScene:
    """A rendered scene as class numbers of `params`."""
    names = (params.categories, params.colors, params.patterns)
    shown = [(subject.category, subject.main_color, subject.pattern) for subject in scene.subjects]
    labels = [[own.index(name) for own, name in zip(names, subject, strict=True)] for subject in shown]
    return LabelledScene(
        picture=scene.image,
        boxes=np.asarray(scene.boxes, dtype=np.float32),
        labels=np.asarray(labels, dtype=np.int64),
        background=params.backgrounds.index(scene.background),
    )


class SceneDataset(Dataset[LabelledScene]):
    """Rendered scenes; with `jpeg`, each reading passes through JPEG of a random quality half of the time."""

    def __init__(self, scenes: Sequence[LabelledScene], *, jpeg: bool = False) -> None:
        self.scenes = scenes
        self.jpeg = jpeg

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> LabelledScene:
        scene = self.scenes[index]
        if self.jpeg and torch.rand(()) < 0.5:
            quality = int(torch.randint(30, 96, ()))
            return LabelledScene(_through_jpeg(scene.picture, quality), scene.boxes, scene.labels, scene.background)
        return scene


def collate_scenes(scenes: Sequence[LabelledScene]) -> Batch:
    """Scenes of one size as a batch, with int64 labels: category, color, pattern (N,) and background (B,)."""
    labels = torch.from_numpy(np.concatenate([scene.labels for scene in scenes]))
    owners = [torch.full((len(scene.boxes),), index) for index, scene in enumerate(scenes)]
    return {
        "pictures": torch.stack([as_pixels(scene.picture) for scene in scenes]),
        "boxes": torch.from_numpy(np.concatenate([scene.boxes for scene in scenes])),
        "owners": torch.cat(owners),
        "background": torch.tensor([scene.background for scene in scenes]),
        **{question: labels[:, column] for column, question in enumerate(QUESTIONS[:3])},
    }


class JudgeRenderings(pl.LightningDataModule):
    """Scenes rendered into memory: all identities to learn from, other renders of held-out ones to validate on.

    The judge learns from both splits on purpose. A combination is ordered (red with blue stripes may be held out while
    blue with red stripes is not), so a judge that knows the train split only learns what never occurs in it, and reads
    held-out subjects, the very ones that are scored, with a prejudice: their main colour fell from .90 to .75.
    """

    def __init__(
        self,
        train_scenes: int = 10000,
        validation_scenes: int = 1000,
        size: int = 64,
        batch_size: int = 40,
        seed: int = 1000,
        split: str = "all",
    ) -> None:
        """
        Args:
            train_scenes, validation_scenes: number of renders of each split.
            size: side of the renders in pixels.
            batch_size: scenes per step.
            seed: of the renders; differs from the seeds of the pretraining and of the evaluation sets.
            split: identities to learn from, "all" or "train".

        Raises:
            DataError: a number below 1, or another split.
        """
        super().__init__()
        check_counts(train_scenes=train_scenes, validation_scenes=validation_scenes, size=size, batch_size=batch_size)
        if split not in ("all", "train"):
            raise DataError(f'split must be "all" or "train", got {split!r}')
        self.train_scenes = train_scenes
        self.validation_scenes = validation_scenes
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.split = split
        self._rendered: dict[str, list[LabelledScene]] = {}

    def setup(self, stage: str) -> None:
        """Renders both splits once; `stage` only tells that training or validation is about to begin."""
        if not self._rendered:
            self._rendered = {
                "train": self._render(self.split, self.train_scenes, self.seed),
                "held_out": self._render("held_out", self.validation_scenes, self.seed + 1),
            }

    def train_dataloader(self) -> DataLoader[LabelledScene]:
        data = SceneDataset(self._rendered["train"], jpeg=True)
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True, collate_fn=collate_scenes)

    def val_dataloader(self) -> DataLoader[LabelledScene]:
        return DataLoader(SceneDataset(self._rendered["held_out"]), self.batch_size, collate_fn=collate_scenes)

    def _render(self, split: str, count: int, seed: int) -> list[LabelledScene]:
        params, rng = world_params(), np.random.default_rng(seed)
        steps = tqdm(range(count), desc=f"rendering {split} scenes", mininterval=2)
        return [label_scene(sample_scene(rng, split=split, size=self.size), params) for _ in steps]


class JudgeTraining(InstrumentTraining):
    """Cross-entropy on every question at once; writes the judge to `output` when training ends."""

    def __init__(
        self,
        output: str,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.02,
        label_smoothing: float = 0.05,
        degrade: bool = True,
        widths: tuple[int, ...] = (32, 64, 128, 192),
    ) -> None:
        """
        Args:
            output: directory for config.json and model.safetensors.
            learning_rate: peak of a one-cycle schedule.
            weight_decay: of AdamW.
            label_smoothing: share of the target spread over the other classes.
            degrade: bend, blur, dim and dirty the training renders, and jitter their boxes.
            widths: channels of the box network, see JudgeParams.
        """
        super().__init__()
        self.save_hyperparameters()
        self.network = Judge(world_params(widths=tuple(widths)))
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        if self.hparams.degrade:
            batch = degrade(batch)
        logits = self.network(batch["pictures"], batch["boxes"], batch["owners"])
        losses = {question: self.loss(logits[question], batch[question]) for question in QUESTIONS}
        self.log_dict({f"train/{question}": loss for question, loss in losses.items()}, batch_size=len(batch["boxes"]))
        total = torch.stack(list(losses.values())).sum()
        self.log("loss", total, prog_bar=True, logger=False)
        return total

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        # A fixed generator, so that every validation degrades the renders in the same way.
        generator = torch.Generator().manual_seed(batch_index)
        for prefix, shown in (("val", batch), ("val_degraded", degrade(batch, generator=generator))):
            logits = self.network(shown["pictures"], shown["boxes"], shown["owners"])
            for question in QUESTIONS:
                self.seen[f"{prefix}/{question}"].append(logits[question].argmax(1) == batch[question])

    def on_validation_epoch_end(self) -> None:
        rates = {name: torch.cat(flags).float().mean() for name, flags in self.seen.items()}
        self.log_dict(rates, prog_bar=False)
        self.print("held-out renders: " + ", ".join(f"{name} {float(rate):.3f}" for name, rate in rates.items()))


def _through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return np.asarray(open_listed(buffer).convert("RGB"))
