"""Training of the adapter on a frozen base: a LightningModule for ``lightning fit -c configs/msd.yaml``.

Shape letters: B batch, S subjects, T tokens per subject, L encoder tokens, D encoder width, C cross-attention width,
R side of the training picture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from msdiffusion.adapter import MSAdapter
from msdiffusion.backbone import Backbone, quiet_loading
from msdiffusion.errors import RequestError
from msdiffusion.resampler import ResamplerParams
from msdiffusion.training.dataset import PairsBatch
from msdiffusion.training.encodings import FrozenEncodings
from msdiffusion.training.objective import (
    DropRates,
    draw_drops,
    draw_timesteps,
    prediction_target,
    subject_area,
    training_schedule,
    weighted_error,
)


@dataclass(frozen=True)
class Inputs:
    """A batch after the frozen encoders."""

    latents: Tensor
    """float32 (B, channels, h, w), scaled."""
    prompt_states: Tensor
    """(B, L, C)."""
    added_conditions: dict[str, Tensor] | None
    """What the UNet takes beside the prompt."""
    image_tokens: Tensor
    """(B, S, L, D)."""
    phrase_embeddings: Tensor
    """(B, S, P)."""
    boxes: Tensor
    """float32 (B, S, 4)."""


class MSDiffusionModule(pl.LightningModule):
    """The adapter learns to predict the noise of target pictures, given references, phrases, boxes and prompt.

    Only the adapter is a submodule: the optimizer, the checkpoints and the synchronisation of several processes see
    nothing else. The base is loaded in ``configure_model``, after the dataset was found.

    Args:
        base_model: directory or hub name of a diffusers pipeline (Stable Diffusion XL or one of its layout).
        image_encoder: directory or hub name of a CLIPVisionModelWithProjection.
        adapter: directory of an adapter to go on from; None starts from scratch, with keys and values copied from the
            frozen ones that read the text.
        resampler: sizes of a new adapter's resampler that differ from the paper's (fields of ``ResamplerParams``; the
            widths of the base are filled in). Like the next two, it may not contradict an ``adapter`` to go on from.
        reference_background: RGB, 0-255, behind a cut-out reference of a new adapter. Default: black, as officially.
        reference_fit: how its references become square, "squash" (official) or "pad".
        projector: what makes its tokens, "resampler" (default) or "global" (IP-Adapter; for comparisons).
        regions: where it shows a subject, "boxes" (default) or "everywhere" (no masks; for comparisons).
        defaults: of ``MSDiffusion.generate`` with the trained adapter: scale, steps, guidance_scale, ...
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: the learning rate rises linearly over so many optimizer steps.
        decay: "none" keeps the learning rate; "linear" lowers it to 0 over the whole run, "linear_half" over its last
            half.
        ema_decay: above 0, an average of the weights is kept with this decay (less in the first steps), validated and
            exported instead of the weights themselves.
        drop_image: see ``DropRates``.
        drop_text: see ``DropRates``.
        drop_both: see ``DropRates``.
        drop_grounding: see ``DropRates``.
        box_loss_weight: weight of the loss inside the subjects' boxes against 1 outside.
        timestep_exponent: see ``draw_timesteps``; 1 is uniform.
        size_condition: what SDXL's size conditions say of a target: "picture", its own size and crop, as SDXL was
            trained; or "resolution", always a whole picture of the training resolution, as the embedded base was.
        attention: "sdpa", or "softmax", which is faster in training on a CPU.
        base_dtype: of the frozen networks but the autoencoder, which stays float32: "auto" follows the trainer's
            precision.
        cache_encodings: keep the encodings of every prompt, phrase and reference in memory (small datasets).
        gradient_checkpointing: recompute the UNet's activations in the backward pass, for less memory.

    Raises:
        RequestError: at construction, if a setting is out of range; later, if it contradicts the adapter to go on from,
            or if the learning rate shall decay in a run without an end.
        WeightsError: in ``configure_model``, if weights are missing or do not fit one another.
    """

    def __init__(
        self,
        base_model: str,
        image_encoder: str,
        adapter: str | None = None,
        resampler: dict[str, Any] | None = None,
        reference_background: list[int] | None = None,
        reference_fit: Literal["squash", "pad"] | None = None,
        projector: Literal["resampler", "global"] | None = None,
        regions: Literal["boxes", "everywhere"] | None = None,
        defaults: dict[str, Any] | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        decay: Literal["none", "linear", "linear_half"] = "none",
        ema_decay: float = 0.0,
        drop_image: float = 0.05,
        drop_text: float = 0.05,
        drop_both: float = 0.05,
        drop_grounding: float = 0.10,
        box_loss_weight: float = 1.0,
        timestep_exponent: float = 1.0,
        size_condition: Literal["picture", "resolution"] = "picture",
        attention: Literal["sdpa", "softmax"] = "sdpa",
        base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        cache_encodings: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.drop_rates = DropRates(image=drop_image, text=drop_text, both=drop_both, grounding=drop_grounding)
        for name, number in (
            ("learning_rate", learning_rate),
            ("box_loss_weight", box_loss_weight),
            ("timestep_exponent", timestep_exponent),
        ):
            if not number > 0:
                raise RequestError(f"{name} must be above 0, got {number}")
        for name, number in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            if number < 0:
                raise RequestError(f"{name} must not be below 0, got {number}")
        if not 0 <= ema_decay < 1:
            raise RequestError(f"ema_decay must be in [0, 1), got {ema_decay}")
        for name, choice, choices in (
            ("decay", decay, ("none", "linear", "linear_half")),
            ("size_condition", size_condition, ("picture", "resolution")),
            ("attention", attention, ("sdpa", "softmax")),
            ("base_dtype", base_dtype, ("auto", "float32", "bfloat16", "float16")),
        ):
            if choice not in choices:
                raise RequestError(f"{name} must be one of {choices}, got {choice!r}")
        # every argument is a number, a string or a list of these, so that a checkpoint loads with weights_only=True
        self.save_hyperparameters()
        self.backbone: Backbone | None = None
        self.adapter: MSAdapter | None = None
        self.averaged: AveragedModel | None = None

    def configure_model(self) -> None:
        """Load the frozen base, make or load the adapter, and put its processors into the UNet."""
        if self.adapter is not None:
            return
        hparams = self.hparams
        quiet_loading()
        adapter = None if hparams.adapter is None else self._given_adapter()
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        backbone = Backbone.from_pretrained(
            hparams.base_model, hparams.image_encoder, torch_dtype=self._base_dtype(), device=device
        )
        # a half-precision autoencoder overflows on some pictures, and it is a small part of the time
        backbone.vae.float()
        self.schedule = training_schedule(backbone.pipeline.scheduler)
        self.adapter = (self._new_adapter(backbone) if adapter is None else adapter).float().to(device)
        self.adapter.install(backbone.unet, backend=hparams.attention)
        if hparams.gradient_checkpointing:
            backbone.unet.enable_gradient_checkpointing()
        if hparams.ema_decay > 0:
            self.averaged = AveragedModel(self.adapter, multi_avg_fn=_averaging(hparams.ema_decay))
            self.averaged.requires_grad_(False)
        self.backbone = backbone
        self.encodings = FrozenEncodings(
            backbone, keep=hparams.cache_encodings, features=self.adapter.config.reference_features
        )

    def _base_dtype(self) -> torch.dtype:
        name = self.hparams.base_dtype
        if name == "auto":
            precision = "32-true" if self._trainer is None else str(self.trainer.precision)
            name = {"bf16": "bfloat16", "16": "float16"}.get(precision.split("-")[0], "float32")
        return getattr(torch, name)

    def _given_adapter(self) -> MSAdapter:
        hparams = self.hparams
        adapter = MSAdapter.from_pretrained(hparams.adapter)
        theirs = {name: getattr(adapter.config.resampler, name, None) for name in hparams.resampler or {}}
        for name, asked, present in (
            ("resampler", hparams.resampler, theirs),
            ("reference_background", hparams.reference_background, list(adapter.config.reference_background)),
            ("reference_fit", hparams.reference_fit, adapter.config.reference_fit),
            ("projector", hparams.projector, adapter.config.projector),
            ("regions", hparams.regions, adapter.config.regions),
        ):
            if asked is not None and asked != present:
                raise RequestError(
                    f"{name}={asked} contradicts the adapter {hparams.adapter!r}, which was trained with {present}: "
                    f"leave {name} out, or start a new adapter without adapter="
                )
        return adapter

    def _new_adapter(self, backbone: Backbone) -> MSAdapter:
        hparams = self.hparams
        params = ResamplerParams(
            image_width=backbone.image_width_of("global" if hparams.projector == "global" else "tokens"),
            phrase_width=backbone.phrase_width,
            output_width=backbone.cross_attention_dim,
            **(hparams.resampler or {}),
        )
        config: dict[str, Any] = {"base_model": hparams.base_model, "image_encoder": hparams.image_encoder}
        if hparams.reference_background is not None:
            config["reference_background"] = tuple(hparams.reference_background)
        for name in ("reference_fit", "projector", "regions"):
            if hparams[name] is not None:
                config[name] = hparams[name]
        return MSAdapter.from_unet(backbone.unet, params, **config)

    @property
    def trained_adapter(self) -> MSAdapter:
        """The adapter as it is validated and exported: the averaged weights where they are kept."""
        return self.adapter if self.averaged is None else self.averaged.module

    def prepare_references(self, pictures: list[Image.Image]) -> Tensor:
        """Pictures -> float32 (N, 3, h, w) for the image encoder, as generation with this adapter prepares them."""
        config = self.adapter.config
        return self.backbone.prepare_references(pictures, config.reference_background, config.reference_fit)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the trained adapter as a directory that ``MSDiffusion.from_pretrained`` takes.

        The base model and the image encoder are named in its config: relative to the directory where they are local.
        """
        config: dict[str, Any] = {
            "base_model": _seen_from(directory, self.hparams.base_model),
            "image_encoder": _seen_from(directory, self.hparams.image_encoder),
        }
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        if datamodule is not None:
            config["training_resolution"] = datamodule.resolution
        if self.hparams.defaults is not None:
            config["defaults"] = self.hparams.defaults
        self.trained_adapter.save_pretrained(directory, **config)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the adapter's parameters alone, with the learning rate's course."""
        optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay
        )
        total_steps = self.trainer.estimated_stepping_batches
        if self.hparams.decay != "none" and math.isinf(total_steps):
            raise RequestError(
                f"decay={self.hparams.decay!r} needs to know where the run ends: give trainer.max_steps or "
                "trainer.max_epochs, or decay='none'"
            )
        course = _learning_rate_course(self.hparams.warmup_steps, self.hparams.decay, total_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: PairsBatch, batch_index: int) -> Tensor:
        """The loss of a batch, with its random drops, noise and timesteps."""
        no_image, no_text, no_grounding = draw_drops(self.drop_rates, len(batch))
        inputs = self.encode(batch, no_image, no_text)
        noise = torch.randn_like(inputs.latents)
        timesteps = draw_timesteps(len(batch), self.schedule.config.num_train_timesteps, self.hparams.timestep_exponent)
        loss, inside = self._loss(self.adapter, inputs, noise, timesteps.to(self.device), no_grounding.to(self.device))
        self.log("training/loss", loss, batch_size=len(batch), prog_bar=True)
        self.log("training/loss_in_boxes", inside, batch_size=len(batch))
        return loss

    def validation_step(self, batch: PairsBatch, batch_index: int) -> None:
        """The loss with nothing dropped, and noise and timesteps that are the same at every validation."""
        generator = torch.Generator().manual_seed(batch_index)
        inputs = self.encode(batch, generator=generator)
        noise = torch.randn(inputs.latents.shape, generator=generator).to(inputs.latents)
        num_timesteps = self.schedule.config.num_train_timesteps
        timesteps = ((torch.arange(len(batch)) + 0.5) / len(batch) * num_timesteps).long().to(self.device)
        loss, inside = self._loss(self.trained_adapter, inputs, noise, timesteps, None)
        self.log("validation/loss", loss, batch_size=len(batch), prog_bar=True, sync_dist=True)
        self.log("validation/loss_in_boxes", inside, batch_size=len(batch), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: PairsBatch, batch_index: int) -> None:
        """Move the average after every optimizer step (not after every batch, where gradients are accumulated)."""
        if self.averaged is not None and self.trainer.global_step > int(self.averaged.n_averaged):
            self.averaged.update_parameters(self.adapter)

    @torch.no_grad()
    def encode(
        self,
        batch: PairsBatch,
        no_image: Tensor | None = None,
        no_text: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Inputs:
        """What the frozen networks say about a batch.

        Args:
            batch: on the model's device.
            no_image: bool (B,), samples whose references are zeros; None for none.
            no_text: bool (B,), samples whose prompt is empty; None for none.
            generator: of the autoencoder's posterior; None for torch's own.
        """
        B, S = batch.present.shape
        captions = batch.captions if no_text is None else [
            "" if dropped else caption for caption, dropped in zip(batch.captions, no_text.tolist(), strict=True)
        ]  # fmt: skip
        states, pooled = self.encodings.prompts(captions)
        phrases = self.encodings.phrases([phrase for row in batch.phrases for phrase in row]).unflatten(0, (B, S))

        seen = batch.present if no_image is None else batch.present & ~no_image.to(batch.present.device).unsqueeze(1)
        zero = self.encodings.zero_reference(batch.references)
        image_tokens = zero.expand(B, S, *zero.shape).clone()
        if seen.any():
            names = [name for row, flags in zip(batch.reference_ids, seen.tolist(), strict=True)
                     for name, flag in zip(row, flags, strict=True) if flag]  # fmt: skip
            image_tokens[seen] = self.encodings.references(names, batch.references[seen]).to(zero.dtype)

        with torch.autocast(self.device.type, enabled=False):
            latents = self.backbone.encode_pictures(batch.targets, generator)
        R = batch.targets.shape[-1]
        sizes = torch.full_like(batch.original_sizes, R)
        if self.hparams.size_condition == "picture":
            added = self.backbone.added_conditions(pooled, batch.original_sizes, batch.crops_top_left, sizes)
        else:
            added = self.backbone.added_conditions(pooled, sizes, torch.zeros_like(sizes), sizes)
        return Inputs(latents.float(), states, added, image_tokens, phrases, batch.boxes)

    def _loss(
        self, adapter: MSAdapter, inputs: Inputs, noise: Tensor, timesteps: Tensor, no_grounding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(loss to train on, mean square error inside the boxes alone), float32 scalars."""
        height, width = inputs.latents.shape[-2:]
        condition = adapter(
            inputs.image_tokens.float(),
            inputs.phrase_embeddings.float(),
            inputs.boxes,
            drop_grounding=no_grounding,
        )
        noisy = self.schedule.add_noise(inputs.latents, noise, timesteps)
        dtype = self.backbone.unet.dtype
        prediction = self.backbone.unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=inputs.prompt_states.to(dtype),
            added_cond_kwargs=inputs.added_conditions,
            cross_attention_kwargs={"subjects": condition},
            return_dict=False,
        )[0]
        target = prediction_target(self.schedule, inputs.latents, noise, timesteps)
        area = subject_area(inputs.boxes, height, width)
        loss = weighted_error(prediction, target, 1 + (self.hparams.box_loss_weight - 1) * area)
        return loss, weighted_error(prediction.detach(), target, area)


def _averaging(decay: float) -> Any:
    """Exponential average for AveragedModel whose window grows with the steps, so that early weights are forgotten."""

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor) -> None:
        steps = int(num_averaged)
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + steps) / (10 + steps)))

    return update


def _learning_rate_course(warmup_steps: int, decay: str, total_steps: float) -> Any:
    """Optimizer step -> factor of the learning rate."""
    start = total_steps / 2 if decay == "linear_half" else warmup_steps

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        if decay == "none" or step < start:
            return warm
        return warm * max(0.0, (total_steps - step) / max(1.0, total_steps - start))

    return factor


def _seen_from(directory: str | Path, model: str) -> str:
    """How a config.json in ``directory`` names a model: a local one by the path from there, another by its name."""
    return os.path.relpath(model, directory) if Path(model).exists() else model
