"""Training of the adapter on a frozen base: a LightningModule for ``lightning fit -c configs/msd.yaml``.

Shape letters: B batch, C latent channels, h w latent rows and columns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.backbone.backbone import Backbone, quiet_loading
from msdiffusion.backbone.references import ReferencePreparation
from msdiffusion.errors import RequestError
from msdiffusion.request.request import FALLBACKS
from msdiffusion.training.encodings.frozen import FrozenEncodings
from msdiffusion.training.learning.averaging import AveragedAdapter
from msdiffusion.training.learning.drawing import draw_batch
from msdiffusion.training.learning.export import exported_config
from msdiffusion.training.learning.inputs import BatchEncoder, Inputs, make_condition
from msdiffusion.training.learning.layout_loss import LayoutLoss, PhraseTokens
from msdiffusion.training.learning.objective import DropRates, draw_drops, sample_errors, subject_area
from msdiffusion.training.learning.optimizers import (
    Decay,
    OptimizerName,
    follow_course,
    learning_rate_course,
    make_optimizer,
)
from msdiffusion.training.learning.schedules import draw_shares, training_schedule
from msdiffusion.training.learning.settings import TrainingSettings, validation_timesteps
from msdiffusion.training.learning.structure import check_structure, structure
from msdiffusion.training.learning.validation_errors import TimestepValidation
from msdiffusion.training.precision import base_dtype, check_trained_precision
from msdiffusion.training.run.run_folder import check_checkpoint
from msdiffusion.training.samples.batch import PairsBatch


class MSDiffusionModule(TimestepValidation):
    """The adapter learns to predict the noise of target pictures, given references, phrases, boxes and prompt.

    Only the adapter is a submodule: the optimizer, the checkpoints and the synchronisation of several processes see
    nothing else. The base is loaded in ``configure_model``, after the dataset was found. All chance comes with the
    batches (``PairsBatch.draws``): the module draws no random number.

    Args:
        base_model: directory or hub name of a diffusers pipeline (Stable Diffusion XL, 1.x, or one of their layouts).
            Whether it predicts noise, velocity, picture or flow is read from its scheduler.
        image_encoder: directory or hub name of a CLIPVisionModelWithProjection.
        adapter: an adapter to go on from, whatever ``MSDiffusion.from_pretrained`` takes: its directory or hub name,
            the folder of a run, a checkpoint, the official ``ms_adapter.bin``. None starts from scratch, with keys and
            values copied from the frozen ones that read the text.
        resampler: sizes of a new adapter's resampler that differ from the paper's (fields of ``ResamplerParams``; the
            widths of the base are filled in). Like the next two, it may not contradict an ``adapter`` to go on from.
        reference_background: RGB, 0-255, behind a cut-out reference of a new adapter. Default: black, as officially.
        reference_fit: how its references become square, "squash" (official) or "pad".
        projector: what makes its tokens, "resampler" (default) or "global" (IP-Adapter; for comparisons).
        regions: where it shows a subject, "boxes" (default) or "everywhere" (no masks; for comparisons).
        defaults: of ``MSDiffusion.generate`` with the trained adapter: scale, steps, guidance_scale, ...
        optimizer: "adamw", or "adamw_8bit" (bitsandbytes), whose state is a quarter as large; see ``make_optimizer``.
        fused: AdamW in one kernel; None: where the device has one.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: the learning rate rises linearly over so many optimizer steps.
        decay: "none" keeps the learning rate; "linear" and "cosine" lower it to 0 over the whole run, "linear_half"
            over its last half.
        ema_decay: above 0, an average of the weights is kept with this decay (less in the first steps), validated and
            exported instead of the weights themselves.
        drop_image: see ``DropRates``.
        drop_text: see ``DropRates``.
        drop_both: see ``DropRates``.
        drop_grounding: see ``DropRates``.
        loss_weighting: "uniform" (the paper's) or "min_snr", which caps the weight of samples with little noise and
            of those with much (Hang et al. 2023, arXiv 2303.09556); see ``NoiseSchedule.min_snr_weights``.
        min_snr_gamma: of that weighting.
        noise_offset: strength of noise that is one number per channel and picture, so that very dark and very bright
            pictures are learned; 0 for none.
        box_loss_weight: weight of the loss inside the subjects' boxes against 1 outside.
        layout_loss_weight: weight of ``LayoutLoss``, an ablation of the paper; 0 for none. It costs time and memory.
        timestep_sampling: "uniform", or "logit_normal", which favours the middle; see ``draw_shares``.
        timestep_exponent: below 1 favours the noisy timesteps; see ``draw_shares``.
        validation_timesteps: at which the error of held-out pairs is measured, in turn; None: a tenth, three, five,
            seven and nine tenths of the schedule.
        size_condition: what SDXL's size conditions say of a target: "picture", its own size and crop, as SDXL was
            trained; or "resolution", always a whole picture of the training resolution, as the embedded base was.
        attention: "sdpa", or "softmax", which is faster in training on a CPU.
        base_dtype: of the frozen networks but the autoencoder, which stays float32: "auto" follows the trainer's
            precision.
        cache_encodings: keep the encodings of every prompt, phrase and reference in memory (small datasets).
        gradient_checkpointing: recompute the UNet's activations in the backward pass, for less memory.
        compile: compile the UNet's repeated blocks (``torch.compile``); the first steps then take minutes.

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
        optimizer: OptimizerName = "adamw",
        fused: bool | None = None,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        decay: Decay = "none",
        ema_decay: float = 0.0,
        drop_image: float = 0.05,
        drop_text: float = 0.05,
        drop_both: float = 0.05,
        drop_grounding: float = 0.10,
        loss_weighting: Literal["uniform", "min_snr"] = "uniform",
        min_snr_gamma: float = 5.0,
        noise_offset: float = 0.0,
        box_loss_weight: float = 1.0,
        layout_loss_weight: float = 0.0,
        timestep_sampling: Literal["uniform", "logit_normal"] = "uniform",
        timestep_exponent: float = 1.0,
        validation_timesteps: list[int] | None = None,
        size_condition: Literal["picture", "resolution"] = "picture",
        attention: Literal["sdpa", "softmax"] = "sdpa",
        base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        cache_encodings: bool = False,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        # every argument is a number, a string or a list of these, so that a checkpoint loads with weights_only=True
        self.save_hyperparameters()
        self.settings = TrainingSettings.of(self.hparams)
        self.drop_rates = DropRates(image=drop_image, text=drop_text, both=drop_both, grounding=drop_grounding)
        self.backbone: Backbone | None = None
        self.adapter: MSAdapter | None = None
        self.averaged: AveragedAdapter | None = None

    def configure_model(self) -> None:
        """Load the frozen base, make or load the adapter, and put its processors into the UNet."""
        if self.adapter is not None:
            return
        settings, base, loss = self.settings, self.settings.base, self.settings.loss
        if self._trainer is not None:
            check_trained_precision(self.trainer)
        quiet_loading()
        # Lightning says that the module moves batches, not the data module: which is so
        warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device`")
        adapter = settings.adapter.given()
        device = self.device if self._trainer is None else self.trainer.strategy.root_device
        backbone = Backbone.from_pretrained(
            settings.adapter.base_model,
            settings.adapter.image_encoder,
            torch_dtype=base_dtype(base.base_dtype, self._trainer, device),
            device=device,
            # a half-precision autoencoder overflows on some pictures, and it is a small part of the time
            vae_dtype=torch.float32,
        )
        self.schedule = training_schedule(backbone.pipeline.scheduler)
        self.validation_timesteps = validation_timesteps(loss.validation_timesteps, self.schedule.num_timesteps)
        self.adapter = (settings.adapter.new(backbone) if adapter is None else adapter).float().to(device)
        self.adapter.install(backbone.unet, backend=base.attention)
        if base.gradient_checkpointing:
            backbone.unet.enable_gradient_checkpointing()
        if base.compile:
            backbone.unet.compile_repeated_blocks()
        if settings.optimizer.ema_decay > 0:
            self.averaged = AveragedAdapter(self.adapter, settings.optimizer.ema_decay)
        self.backbone = backbone
        self.encodings = FrozenEncodings(
            backbone, keep=base.cache_encodings, features=self.adapter.config.reference_features
        )
        self.encoder = BatchEncoder(backbone, self.encodings, base.size_condition)
        self.phrase_tokens = PhraseTokens(backbone.tokenizer)

    @property
    def trained_adapter(self) -> MSAdapter:
        """The adapter as it is validated and exported: the averaged weights where they are kept."""
        return self.adapter if self.averaged is None else self.averaged.module

    @property
    def prepare_references(self) -> ReferencePreparation:
        """Pictures -> float32 (N, 3, h, w) for the image encoder, as generation with this adapter prepares them.

        It knows the image processor alone, so that loading processes can be given it.
        """
        config = self.adapter.config
        return ReferencePreparation(
            self.backbone.image_processor, tuple(config.reference_background), config.reference_fit
        )

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of so many pixels.

        Raises:
            RequestError: a side does not fit the base.
        """
        return self.backbone.latent_shape(height, width)

    def transfer_batch_to_device(self, batch: PairsBatch, device: torch.device, dataloader_idx: int) -> PairsBatch:
        """The batch on a device, but for the numbers that decide on the host: to ask the device would be to wait."""
        draws, moved = batch.draws, batch.to(device, non_blocking=True)
        deciding = {name: getattr(draws, name) for name in ("condition", "grounding", "timestep")}
        return replace(moved, draws=replace(moved.draws, **deciding))

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on the adapter's parameters alone, with the learning rate's course."""
        settings = self.settings.optimizer
        optimizer = make_optimizer(
            self.adapter.parameters(),
            settings.optimizer,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=settings.fused,
        )
        total_steps = math.inf
        if settings.decay != "none":
            total_steps = self.trainer.estimated_stepping_batches
            if math.isinf(total_steps):
                raise RequestError(
                    f"decay={settings.decay!r} needs to know where the run ends: give trainer.max_steps or "
                    "trainer.max_epochs, or decay='none'"
                )
            # Lightning may have made the loader to count the steps, before a resumed run knows its place in the data.
            # It has no public way to say so: without this, it would begin at the first pair again.
            self.trainer.fit_loop._combined_loader = None
        course = learning_rate_course(settings.warmup_steps, settings.decay, total_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, course)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A resumed run takes the course of these settings from its first step on; says so where it is another one."""
        for config in self.trainer.lr_scheduler_configs:
            for old, new in follow_course(config.scheduler):
                rank_zero_warn(
                    f"the course of the learning rate is not that of the checkpoint (trainer.max_steps, decay or "
                    f"warmup_steps changed): step {self.global_step + 1} takes {new:.4g}, not {old:.4g}"
                )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """The step, and the average's right after it: whoever looks afterwards sees both of the same step."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.averaged is not None:
            self.averaged.update(self.adapter)

    def teardown(self, stage: str) -> None:
        """Say once how many captions were too long."""
        told = None if self.backbone is None else self.encodings.long_captions.told()
        if told is not None:
            rank_zero_warn(told)

    def training_step(self, batch: PairsBatch, batch_index: int) -> Tensor:
        """The loss of a batch, with the drops, noise and timesteps that its samples bring along."""
        settings, draws = self.settings.loss, batch.draws
        no_image, no_text, no_grounding = draw_drops(self.drop_rates, draws.condition, draws.grounding)
        inputs = self.encode(batch, no_image.tolist(), no_text.tolist())
        shares = draw_shares(draws.timestep, settings.timestep_sampling, settings.timestep_exponent)
        timesteps = self.schedule.timesteps(shares).to(self.device, non_blocking=True)
        noise = draws.noise + settings.noise_offset * draws.offset if settings.noise_offset > 0 else draws.noise
        size, layout = inputs.latents.shape[-2:], None
        if settings.layout_loss_weight > 0:
            tokens = self.phrase_tokens.of_batch(batch, inputs.boxes.shape[1], no_text.tolist())
            layout = LayoutLoss(tokens, inputs.boxes, size, inputs.prompt_states.shape[1])
        prediction, target = self.predict_noise(
            self.adapter, inputs, noise, timesteps, no_grounding.to(self.device, non_blocking=True), layout
        )
        area = subject_area(inputs.boxes, *size)
        errors = sample_errors(prediction, target, 1 + (settings.box_loss_weight - 1) * area)
        if settings.loss_weighting == "min_snr":
            errors = errors * self.schedule.min_snr_weights(timesteps, settings.min_snr_gamma)
        loss = errors.mean()
        if layout is not None:
            misplaced = layout.loss().mean()
            loss = loss + settings.layout_loss_weight * misplaced
            self.log("training/layout_loss", misplaced.detach(), batch_size=len(batch))
            # of all subjects, those whose words the prompt has: without any the layout loss would be 0 unnoticed
            self.log("training/layout_subjects", layout.found / len(inputs.subjects), batch_size=len(batch))
        self.log("training/loss", loss.detach(), batch_size=len(batch), prog_bar=True)
        inside = sample_errors(prediction.detach(), target, area).mean()
        self.log("training/loss_in_boxes", inside, batch_size=len(batch))
        return loss

    def predict_step(self, batch: PairsBatch, batch_index: int) -> list[Image.Image]:
        """RGB pictures for the pairs of a batch, drawn with the trained adapter's defaults."""
        settings = {**FALLBACKS, **self.exported_config()["defaults"]}
        return self.draw_batch(
            batch,
            num_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            scale=settings["scale"],
            seeds=batch.numbers.tolist(),
        )

    @torch.no_grad()
    def draw_batch(
        self, batch: PairsBatch, *, num_steps: int, guidance_scale: float, scale: float, seeds: Sequence[int]
    ) -> list[Image.Image]:
        """RGB pictures for the pairs of a batch, subjects of this weight; see ``learning.drawing``."""
        condition = make_condition(self.trained_adapter, self.encode(batch), scale=scale)
        return draw_batch(
            self.backbone, condition, batch, num_steps=num_steps, guidance_scale=guidance_scale, seeds=seeds
        )

    def encode(
        self, batch: PairsBatch, no_image: Sequence[bool] | None = None, no_text: Sequence[bool] | None = None
    ) -> Inputs:
        """What the frozen networks say about a batch on the module's device; see ``BatchEncoder.encode``."""
        return self.encoder.encode(batch, no_image, no_text)

    def predict_noise(
        self,
        adapter: MSAdapter,
        inputs: Inputs,
        noise: Tensor,
        timesteps: Tensor,
        no_grounding: Tensor | None = None,
        layout: LayoutLoss | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What the UNet says about noisy latents, and what it should say, each (B, C, h, w).

        Args:
            adapter: the trained one or its average.
            noise: float32 (B, C, h, w).
            timesteps: (B,), as the base's schedule makes them.
            no_grounding: bool (B,), see ``DropRates``; None for none.
            layout: looks on in the attention layers; None for nobody.
        """
        # said outright: a batch filled up with repetitions may look like one with guidance
        condition = make_condition(adapter, inputs, no_grounding, guidance=False)
        dtype = self.backbone.unet.dtype
        prediction = self.backbone.unet(
            self.schedule.noisy(inputs.latents, noise, timesteps).to(dtype),
            timesteps,
            encoder_hidden_states=inputs.prompt_states.to(dtype),
            added_cond_kwargs=inputs.added_conditions,
            cross_attention_kwargs={"subjects": condition} | ({} if layout is None else {"controls": (layout,)}),
            return_dict=False,
        )[0]
        return prediction, self.schedule.target(inputs.latents, noise, timesteps)

    def exported_config(self, directory: str | Path | None = None) -> dict[str, Any]:
        """Fields of the adapter's config as this run writes it into a directory; see ``learning.export``."""
        datamodule = None if self._trainer is None else getattr(self.trainer, "datamodule", None)
        samples = None if datamodule is None else datamodule.samples
        return exported_config(self.settings.adapter, self.adapter.config, self.backbone, samples, directory)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the trained adapter as a directory that ``MSDiffusion.from_pretrained`` takes.

        The base model and the image encoder are named in its config: relative to the directory where they are local.
        """
        self.trained_adapter.save_pretrained(directory, **self.exported_config(directory))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The adapter's config goes along as text, so that the checkpoint alone is enough to generate."""
        checkpoint["adapter_config"] = replace(self.adapter.config, **self.exported_config()).to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose weights or optimizer's state are of another kind, before they are compared by name.

        Raises:
            RequestError: a setting was changed that decides which of them there are.
            WeightsError: the adapter's config in it cannot be read, or a tensor is lacking, left over, of another shape
                or kind, or holds numbers that are none.
        """
        if self.adapter is None:
            return
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        check_structure(
            "the checkpoint",
            checkpoint.get("hyper_parameters") or {},
            checkpoint.get("adapter_config"),
            self.hparams,
            structure(self.adapter.config),
            resume=fits and "optimizer_states" in checkpoint,
            best="adapter='RUN/best'",
        )
        source = None if self._trainer is None else self.trainer.ckpt_path
        check_checkpoint(self, checkpoint, source or "the checkpoint")
