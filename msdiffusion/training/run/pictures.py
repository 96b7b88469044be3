"""Pictures that a run draws: of held-out pairs while it trains, and of every pair by ``lightning predict``.

Shape letters: B batch, S subjects.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image, ImageDraw

from data_pipeline.pairs_format import KEY, KEY_IN_WORDS
from data_pipeline.picture_formats import open_listed
from msdiffusion.errors import DataError, RequestError
from msdiffusion.figures import GAP, arrange, as_picture, picture_cell, reference_cell
from msdiffusion.training.run.every_n_steps import EveryNSteps
from msdiffusion.training.run.run_folder import in_root, set_aside

if TYPE_CHECKING:
    from msdiffusion.training.samples.batch import TrainingSample

FOLDER = "pictures"
PROGRESS = "progress.png"
HEADER = 14
"""Height in pixels of the step numbers over the strip."""


class ValidationPictures(EveryNSteps):
    """Draws the first validation pairs with the adapter as it is: references, target with boxes, result.

    The grid goes to ``pictures/step_000200.png`` in the trainer's root directory, and to TensorBoard or Weights &
    Biases, whichever the run logs to; ``pictures/progress.png`` shows the results of all steps side by side. Noise is
    the same every time, so that two grids differ by the training between them.

    Args:
        every_n_steps: see ``EveryNSteps``.
        count: pairs to draw.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 for none.
        scale: weight of the subjects.
        seed: of the noise.

    Raises:
        RequestError: if a number is below 1.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        count: int = 8,
        num_steps: int = 25,
        guidance_scale: float = 5.0,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps)
        if count < 1 or num_steps < 1:
            raise RequestError(f"count and num_steps must be at least 1, got {count} and {num_steps}")
        self.count = count
        self.settings = {"num_steps": num_steps, "guidance_scale": guidance_scale, "scale": scale, "seed": seed}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pictures of an earlier run are not shown beside those of a new one."""
        set_aside(trainer, FOLDER)
        super().on_train_start(trainer, pl_module)

    def act(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw the grid; nothing where the run has no validation pairs."""
        samples = trainer.datamodule.validation_samples(self.count)
        if not samples:
            return
        results = draw_samples(module, trainer.datamodule, samples, **self.settings)
        grid = picture_grid(samples, results, module.adapter.config.reference_background)
        directory = in_root(trainer, FOLDER)
        directory.mkdir(parents=True, exist_ok=True)
        grid.save(directory / f"step_{trainer.global_step:06d}.png")
        strip = progress_strip(directory, trainer.global_step)
        if strip is not None:
            strip.save(directory / PROGRESS)
        log_picture(trainer, "validation/pictures", grid)


def log_picture(trainer: pl.Trainer, name: str, picture: Image.Image) -> None:
    """Hand a picture to every logger of the run that takes pictures, at the current step."""
    for logger in trainer.loggers:
        if isinstance(logger, pl.loggers.TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(picture), trainer.global_step, dataformats="HWC")
        elif isinstance(logger, pl.loggers.WandbLogger):
            logger.log_image(name, [picture], step=trainer.global_step)


def draw_samples(
    module: pl.LightningModule, datamodule: Any, samples: Sequence[TrainingSample], seed: int, **settings: Any
) -> list[Image.Image]:
    """Pictures for samples of any sizes, in their order.

    Args:
        module: with a ``draw_batch`` as that of MSDiffusionModule.
        samples: at least one; those of one size are drawn together.
        seed: of the noise: that of sample i is ``seed + i``.
        settings: others of ``draw_batch``.

    Returns:
        One RGB picture per sample, as large as its target.
    """
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        by_size.setdefault(sample.target.shape, []).append(index)
    pictures: dict[int, Image.Image] = {}
    for indices in by_size.values():
        batch = datamodule.collate([samples[index] for index in indices]).to(module.device)
        drawn = module.draw_batch(batch, seeds=[seed + index for index in indices], **settings)
        pictures.update(zip(indices, drawn, strict=True))
    return [pictures[index] for index in range(len(samples))]


def picture_grid(
    samples: Sequence[TrainingSample], results: Sequence[Image.Image], background: tuple[int, int, int]
) -> Image.Image:
    """One row per sample: its references, its target with the boxes drawn on, the result.

    Args:
        samples: with their true targets.
        background: RGB behind the references.

    Returns:
        An RGB picture of square cells. Small pictures are enlarged to 128 pixels, large ones reduced to 256.
    """
    side = min(max(*samples[0].target.shape[:2], 128), 256)
    slots = max(len(sample.references) for sample in samples)
    rows = []
    for sample, result in zip(samples, results, strict=True):
        row: list[Image.Image | None] = [
            reference_cell(picture, side, background, slot) for slot, picture in enumerate(sample.references)
        ]
        row += [None] * (slots - len(row))
        row += [picture_cell(Image.fromarray(sample.target), side, sample.boxes), picture_cell(result, side)]
        rows.append(row)
    return arrange(rows, side)


def progress_strip(directory: Path, until: int, columns: int = 10) -> Image.Image | None:
    """The results of a run's grids side by side, the step above each: the same pairs as training goes on.

    Args:
        directory: with grids ``step_NNNNNN.png``. Those of another height than the newest don't count, nor those after
            ``until``, which a run has drawn that was then resumed from before them.
        until: the newest step.
        columns: at most so many steps, evenly chosen; the first and the newest are among them.

    Returns:
        An RGB picture; None where there are fewer than two grids.
    """
    found = sorted(
        (int(m[1]), path) for path in directory.iterdir() if (m := re.fullmatch(r"step_(\d+)\.png", path.name))
    )
    grids = {step: path for step, path in found if step <= until}
    if until not in grids:
        return None
    with open_listed(grids[until]) as newest:
        height = newest.height
    kept = []
    for step, path in grids.items():
        with open_listed(path) as grid:
            if grid.height == height:
                kept.append((step, grid.convert("RGB")))
    if len(kept) < 2:
        return None
    chosen = np.unique(np.linspace(0, len(kept) - 1, min(columns, len(kept))).round().astype(int))
    side = _side_of(kept[-1][1])
    strip = Image.new("RGB", (len(chosen) * (side + GAP) + GAP, HEADER + height), "white")
    draw = ImageDraw.Draw(strip)
    for column, index in enumerate(chosen):
        step, grid = kept[index]
        x = GAP + column * (side + GAP)
        draw.text((x, 2), str(step), fill="black")
        strip.paste(grid.crop((grid.width - GAP - side, 0, grid.width - GAP, height)), (x, HEADER))
    return strip


class PredictionPictures(pl.Callback):
    """Keeps what ``lightning predict`` draws: ``predictions/KEY.png``, and ``predictions/grid.png`` of the first ones.

    Every process writes its own pictures; the grid is of the first process's.

    Args:
        directory: where; None for ``predictions`` in the trainer's root directory.
        grid: so many pictures go into the grid, each beside its target with the boxes where the target was read.
    """

    def __init__(self, directory: str | None = None, grid: int = 16) -> None:
        super().__init__()
        self.directory = directory
        self.grid = grid
        self._cells: list[list[Image.Image | None]] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Write a batch; samples that only fill up the last batch of a process are left out."""
        directory = in_root(trainer, "predictions") if self.directory is None else Path(self.directory)
        directory.mkdir(parents=True, exist_ok=True)
        for row, (key, picture) in enumerate(zip(batch.keys, outputs, strict=True)):
            if not batch.weights[row]:
                continue
            if not KEY.fullmatch(key):  # data modules of others may have keys that lead out of the folder
                raise DataError(f"the key {key!r} of a pair can name no picture: keys are {KEY_IN_WORDS}")
            picture.save(directory / f"{key}.png")
            if trainer.is_global_zero and len(self._cells) < self.grid:
                boxes = [box.tolist() for box, here in zip(batch.boxes[row], batch.present[row], strict=True) if here]
                target = None if batch.targets is None else as_picture(batch.targets[row])
                shown = Image.new("RGB", picture.size, "white") if target is None else target
                self._cells.append([picture_cell(shown, 192, boxes), picture_cell(picture, 192)])
        if trainer.is_global_zero and self._cells:
            arrange(self._cells, 192).save(directory / "grid.png")


def _side_of(grid: Image.Image) -> int:
    """Side of a grid's cells: width and height are multiples of it plus gaps, and it lies between 128 and 256."""
    for side in range(256, 127, -1):
        if (grid.height - GAP) % (side + GAP) == 0 and (grid.width - GAP) % (side + GAP) == 0:
            return side
    raise RequestError(f"no grid of this project: {grid.size}")
