"""What a training run shows and leaves behind: progress of the whole run, grids of pictures, checkpoints, the adapter.

Everything lies in the trainer's ``default_root_dir``, so that one setting moves a run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from msdiffusion.errors import RequestError

if TYPE_CHECKING:
    from msdiffusion.training.dataset import PairsBatch, PairsDataModule, TrainingSample
    from msdiffusion.training.module import MSDiffusionModule

BOX_COLORS = ("#e6194b", "#0082c8", "#3cb44b", "#f58231", "#911eb4", "#808000")


class EveryNSteps(pl.Callback):
    """Calls ``act`` after every n optimizer steps, and at the end of the run unless that step was just acted on.

    Args:
        every_n_steps: at least 1.

    Raises:
        RequestError: if it is less.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise RequestError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def act(self, trainer: pl.Trainer, module: MSDiffusionModule) -> None:
        """What is done; only the first of several processes does it."""
        raise NotImplementedError

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run has acted on the step it starts from."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts optimizer steps, not batches: with accumulated gradients several batches make one step."""
        if trainer.global_step % self.every_n_steps == 0:
            self._act_once(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last step is always acted on."""
        self._act_once(trainer, pl_module)

    def _act_once(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            if trainer.is_global_zero:
                self.act(trainer, module)


def _in_root(trainer: pl.Trainer, name: str) -> Path:
    return Path(trainer.default_root_dir) / name


class RunCheckpoint(pl.callbacks.ModelCheckpoint):
    """Keeps the newest state of a run, ``checkpoints/last.ckpt`` in the trainer's root directory, to resume from.

    Lightning's own default is a new directory for every start of a run, where ``--ckpt_path last`` finds nothing.

    Args:
        every_n_steps: optimizer steps between two checkpoints; the end of the run is always kept.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        super().__init__(
            filename="last",
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Only now is the root directory known."""
        self.dirpath = str(_in_root(trainer, "checkpoints"))
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the end of the run."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        # Lightning asks before setup
        self.dirpath = str(_in_root(trainer, "checkpoints"))
        return super()._find_last_checkpoints(trainer)


class AdapterExport(EveryNSteps):
    """Writes the adapter directory that ``MSDiffusion.from_pretrained`` takes, over and over at the same place.

    Args:
        every_n_steps: see ``EveryNSteps``.
        directory: of the adapter; None for ``adapter`` in the trainer's root directory.
    """

    def __init__(self, every_n_steps: int = 1000, directory: str | None = None) -> None:
        super().__init__(every_n_steps)
        self.directory = directory

    def act(self, trainer: pl.Trainer, module: MSDiffusionModule) -> None:
        """Write it."""
        module.save_pretrained(_in_root(trainer, "adapter") if self.directory is None else self.directory)


class ValidationPictures(EveryNSteps):
    """Draws the first validation pairs with the adapter as it is: references, target with boxes, result.

    The grid goes to ``pictures/step_000200.png`` in the trainer's root directory and to TensorBoard. Noise is the same
    every time, so that two grids differ by the training between them.

    Args:
        every_n_steps: see ``EveryNSteps``.
        count: pairs to draw.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 for none.
        scale: weight of the subjects.
        seed: of the noise.
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
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.scale = scale
        self.seed = seed

    def act(self, trainer: pl.Trainer, module: MSDiffusionModule) -> None:
        """Draw the grid; nothing where the run has no validation pairs."""
        datamodule: PairsDataModule = trainer.datamodule
        samples = datamodule.validation_samples(self.count)
        if not samples:
            return
        results = draw_batch(
            module,
            datamodule.collate(samples).to(module.device),
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            scale=self.scale,
            seed=self.seed,
        )
        grid = picture_grid(samples, results, module.adapter.config.reference_background)
        directory = _in_root(trainer, "pictures")
        directory.mkdir(parents=True, exist_ok=True)
        grid.save(directory / f"step_{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                pixels = np.asarray(grid)
                logger.experiment.add_image("validation/pictures", pixels, trainer.global_step, dataformats="HWC")


@torch.no_grad()
def draw_batch(
    module: MSDiffusionModule,
    batch: PairsBatch,
    *,
    num_steps: int,
    guidance_scale: float,
    scale: float,
    seed: int,
) -> list[Image.Image]:
    """Pictures for the captions, references and boxes of a batch, by the base's own diffusers pipeline.

    Args:
        module: after ``configure_model``.
        batch: on the module's device.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        scale: weight of the subjects.
        seed: of the noise, drawn on the CPU, per picture.

    Returns:
        B RGB pictures of the training resolution.
    """
    backbone = module.backbone
    inputs = module.encode(batch, generator=torch.Generator().manual_seed(seed))
    condition = module.trained_adapter(
        inputs.image_tokens.float(),
        inputs.phrase_embeddings.float(),
        inputs.boxes,
        scale=scale,
    )
    R = batch.targets.shape[-1]
    backbone.pipeline.set_progress_bar_config(disable=True)
    latents = backbone.pipeline(
        prompt=batch.captions,
        # no negative prompt, as generation without one: the pipeline decides what stands in for it
        height=R,
        width=R,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(batch))],
        cross_attention_kwargs={"subjects": condition},
        output_type="latent",
    ).images
    return backbone.decode_latents(latents)


def picture_grid(
    samples: list[TrainingSample], results: list[Image.Image], background: tuple[int, int, int]
) -> Image.Image:
    """One row per sample: its references, its target with the boxes drawn on, the result.

    Args:
        samples: with their true targets.
        results: one RGB picture per sample.
        background: RGB behind the references.

    Returns:
        An RGB picture. Small pictures are enlarged to 128 pixels, large ones reduced to 256.
    """
    side = min(max(samples[0].target.shape[0], 128), 256)
    gap = 4
    slots = max(len(sample.references) for sample in samples)
    grid = Image.new("RGB", ((slots + 2) * (side + gap) + gap, len(samples) * (side + gap) + gap), "white")
    for row, (sample, result) in enumerate(zip(samples, results, strict=True)):
        y = gap + row * (side + gap)
        for slot, reference in enumerate(sample.references):
            cell = Image.new("RGB", (side, side), background)
            factor = (side - 8) / max(reference.size)
            size = (max(1, round(reference.width * factor)), max(1, round(reference.height * factor)))
            picture = reference.resize(size, Image.Resampling.BICUBIC)
            cell.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2), picture)
            ImageDraw.Draw(cell).rectangle(
                (0, 0, side - 1, side - 1), outline=BOX_COLORS[slot % len(BOX_COLORS)], width=2
            )
            grid.paste(cell, (gap + slot * (side + gap), y))
        for column, picture in ((slots, Image.fromarray(sample.target)), (slots + 1, result)):
            cell = picture.resize((side, side), Image.Resampling.BICUBIC)
            for slot, box in enumerate(sample.boxes if column == slots else ()):
                _outline(cell, tuple(box.tolist()), slot)
            grid.paste(cell, (gap + column * (side + gap), y))
    return grid


def _outline(picture: Image.Image, box: tuple[float, ...], slot: int) -> None:
    pixels = tuple(edge * (side - 1) for edge, side in zip(box, picture.size * 2, strict=True))
    ImageDraw.Draw(picture).rectangle(pixels, outline=BOX_COLORS[slot % len(BOX_COLORS)], width=2)


class RunProgress(pl.callbacks.ProgressBar):
    """One bar over the whole run, with the time that is left. Lightning's own starts again with every epoch.

    Args:
        refresh_seconds: time between two updates of the bar.
    """

    def __init__(self, refresh_seconds: float = 1.0) -> None:
        super().__init__()
        self.refresh_seconds = refresh_seconds
        self._bar: tqdm | None = None
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (Lightning calls this in all processes but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar."""
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run starts where it was."""
        self._bar = tqdm(
            desc="training",
            total=trainer.estimated_stepping_batches,  # infinite for a run without an end: then no time left is shown
            initial=trainer.global_step,
            unit="step",
            mininterval=self.refresh_seconds,
            dynamic_ncols=True,
            disable=not self._enabled,
        )
        self._start = self._shown = time.monotonic()
        self._samples = 0
        self._loss: float | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves by optimizer steps; shows a smoothed loss, the last validation's, and the samples per second."""
        self._samples += len(batch) * trainer.world_size
        now = time.monotonic()
        # reading the loss waits for the device, so not at every step
        if self._enabled and now - self._shown >= self.refresh_seconds:
            self._shown = now
            loss = float(outputs["loss"])
            self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
            numbers = {"loss": f"{self._loss:.4f}"}
            if "validation/loss" in trainer.callback_metrics:
                numbers["validation"] = f"{float(trainer.callback_metrics['validation/loss']):.4f}"
            numbers["samples/s"] = f"{self._samples / (now - self._start):.1f}"
            self._bar.set_postfix(numbers, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the full bar on the screen."""
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the message starts on its own line."""
        if self._bar is not None:
            self._bar.close()
