"""Training of the embedded base: text-to-image and image encoder, on renderings of the procedural world.

Run by `lightning fit -c configs/embedded/text_to_image.yaml` and `.../image_encoder.yaml`. The recipe and what was
measured about it stand in docs/training.md.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from data_pipeline.world import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS, write_caption
from data_pipeline.world.renderings import RenderingSettings, load_or_render
from msdiffusion.errors import WeightsError, reason
from msdiffusion.files import share
from msdiffusion.training.embedded.budget import BudgetedTraining
from msdiffusion.training.embedded.networks import build_base, build_image_encoder
from msdiffusion.training.embedded.pools import IdentityViews, SceneCaptions, prepare_views
from msdiffusion.training.learning.optimizers import Muon
from msdiffusion.training.processes import process_rank


class WorldRenderings(pl.LightningDataModule):
    """Renders the world ahead of time (cached on disk) and serves scenes or identity views.

    Args:
        kind: "scenes" for the text-to-image base, "identities" for the image encoder.
        scenes: scenes in the training pool.
        identities: identities in the training pool.
        batch_size: samples per step.
        cache: folder of the rendered arrays.
        size: side of a scene in pixels.
        seed: of the renderings and the batch order.
        workers: processes for rendering.
    """

    def __init__(
        self,
        kind: str = "scenes",
        scenes: int = 40_000,
        identities: int = 5_000,
        batch_size: int = 32,
        cache: str = "data/world/renderings",
        size: int = 64,
        seed: int = 0,
        workers: int = 2,
    ) -> None:
        super().__init__()
        if kind not in ("scenes", "identities"):
            raise ValueError(f"kind must be scenes or identities, got {kind!r}")
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Renders or reads the training pool and a held-out pool of 512 scenes and 600 identities."""
        p = self.hparams
        train = RenderingSettings(p.scenes, p.identities, 2, "train", p.size, seed=p.seed)
        held_out = RenderingSettings(512, 600, 2, "held_out", p.size, seed=p.seed + 1)
        pools = [load_or_render(settings, p.cache, p.workers) for settings in (train, held_out)]
        if p.kind == "scenes":
            self.train_set, self.validation_set = (SceneCaptions(pool, p.seed) for pool in pools)
        else:
            self.train_set, self.validation_set = (IdentityViews(pool, 2) for pool in pools)

    def _loader(self, data: Dataset, shuffle: bool) -> DataLoader:
        generator = torch.Generator().manual_seed(1000 * self.hparams.seed + process_rank())
        settings = {"shuffle": shuffle, "drop_last": shuffle, "generator": generator}
        return DataLoader(data, self.hparams.batch_size, collate_fn=lambda batch: batch, **settings)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of the train split."""
        return self._loader(self.train_set, True)

    def val_dataloader(self) -> DataLoader:
        """Batches of held-out identities, in a fixed order."""
        return self._loader(self.validation_set, False)


class TextToImagePretraining(BudgetedTraining):
    """The embedded text-to-image base: UNet and both text encoders from scratch, v-prediction.

    Args:
        channels: UNet channels, see `build_base`.
        latent_factor: pixels per latent cell, see `build_base`.
        initial: directory of a base to go on from, with an optimizer and a budget of its own; None starts from scratch.
            (An interrupted run is resumed by --ckpt_path FILE instead, which brings its old settings along.)
        box_weight: weight of the loss inside subject boxes; the background is 1.
        timestep_exponent: t = 1000 u ** exponent with u uniform; under 1 favours noisy steps.
        text_drop: share of empty captions, for classifier-free guidance.
        naming_weight: weight of the loss that makes both pooled text embeddings name their own tokens; it gives
            `text_encoder` a meaningful pooler_output, which the adapter uses to embed phrases.
        others: see `BudgetedTraining`.
    """

    def __init__(
        self,
        output: str = "runs/embedded/base",
        channels: tuple[int, ...] = (64, 96, 160),
        learning_rate: float = 1.5e-3,
        max_steps: int = 12_000,
        budget_minutes: float | None = None,
        decay_share: float = 0.5,
        warmup_steps: int = 100,
        ema_decay: float = 0.999,
        export_minutes: float = 10.0,
        box_weight: float = 4.0,
        timestep_exponent: float = 0.75,
        text_drop: float = 0.1,
        naming_weight: float = 0.05,
        latent_factor: int = 2,
        initial: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        from diffusers.models.attention_processor import AttnProcessor

        self.pipeline = build_base(channels, latent_factor=latent_factor)
        if initial is not None:
            load_weights(self.pipeline, initial)
        self.unet = self.pipeline.unet
        # On a CPU the backward pass of fused attention takes longer than the plain product and softmax.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder, self.text_encoder_2 = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        for encoder in (self.text_encoder, self.text_encoder_2):
            encoder.set_attn_implementation("eager")
        vocabulary = len(self.pipeline.tokenizer)
        self.naming = nn.ModuleList(
            nn.Linear(encoder.config.hidden_size, vocabulary) for encoder in (self.text_encoder, self.text_encoder_2)
        )
        self.register_buffer("alphas", self.pipeline.scheduler.alphas_cumprod.float(), persistent=False)
        empty = self.pipeline.tokenizer("", padding="max_length").input_ids
        self.register_buffer("empty_tokens", torch.tensor(empty), persistent=False)
        self.prepare_average()

    def trained_modules(self) -> nn.ModuleDict:
        """UNet and text encoders."""
        return nn.ModuleDict(
            {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}
        )

    def configure_optimizers(self) -> Muon:
        """Muon on the weight matrices, AdamW on norms, biases and embeddings."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad]
        plain = ("embed", "conv_in", "conv_out", "naming")

        def is_matrix(name: str, p: nn.Parameter) -> bool:
            return p.ndim >= 2 and not any(word in name for word in plain)

        return Muon(
            [p for n, p in named if is_matrix(n, p)],
            [p for n, p in named if not is_matrix(n, p)],
            lr=self.hparams.learning_rate,
        )

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L) to states (B, L, C), pooled (B, P), and the naming loss, as SDXL uses its two encoders."""
        first = self.text_encoder(tokens, output_hidden_states=True)
        second = self.text_encoder_2(tokens, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        present = torch.zeros(len(tokens), len(self.pipeline.tokenizer), device=tokens.device).scatter_(1, tokens, 1.0)
        naming = sum(
            nn.functional.binary_cross_entropy_with_logits(head(pooled).float(), present, reduction="sum") / len(tokens)
            for head, pooled in zip(self.naming, (first.pooler_output, second.text_embeds), strict=True)
        )
        return states, second.text_embeds, naming

    def denoising_errors(
        self, batch: dict[str, Tensor], timesteps: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Square errors of the predicted velocity (B, h, w), mean over channels, and the naming loss of a batch.

        Args:
            batch: of `SceneCaptions`.
            timesteps: (B,).
            generator: CPU generator of the noise; None for torch's own.
        """
        pixels = batch["images"].float().div(127.5).sub(1)
        vae = self.pipeline.vae
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        if generator is None:
            noise = torch.randn_like(latents)
        else:
            noise = torch.randn(latents.shape, generator=generator).to(latents)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        states, pooled, naming = self.encode_text(batch["tokens"])
        size = pixels.shape[-1]
        time_ids = pixels.new_tensor([[size, size, 0, 0, size, size]]).expand(len(pixels), -1)
        predicted = self.unet(
            noisy, timesteps, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
        return (predicted.float() - target).square().mean(1), naming

    def box_weights(
        self, boxes: Tensor, side: int, inside_weight: float | None = None, outside_weight: float = 1.0
    ) -> Tensor:
        """Normalised boxes (B, S, 4) to weights (B, side, side): `box_weight` inside any box by default, else 1."""
        centers = (torch.arange(side, device=boxes.device) + 0.5) / side
        inside_x = (centers >= boxes[..., :1]) & (centers <= boxes[..., 2:3])
        inside_y = (centers >= boxes[..., 1:2]) & (centers <= boxes[..., 3:])
        inside = (inside_y[..., :, None] & inside_x[..., None, :]).any(1).float()
        weight = self.hparams.box_weight if inside_weight is None else inside_weight
        return outside_weight + (weight - outside_weight) * inside

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One denoising step on a batch of scenes."""
        count = len(batch["images"])
        dropped = torch.rand(count, device=self.device) < self.hparams.text_drop
        batch = {**batch, "tokens": torch.where(dropped[:, None], self.empty_tokens, batch["tokens"])}
        u = torch.rand(count, device=self.device)
        timesteps = (1000 * u**self.hparams.timestep_exponent).long().clamp(max=999)
        errors, naming = self.denoising_errors(batch, timesteps)
        weight = self.box_weights(batch["boxes"], errors.shape[-1])
        loss = (errors * weight).sum() / weight.sum()
        self.log_dict({"loss": loss, "naming": naming}, prog_bar=True)
        return loss + self.hparams.naming_weight * naming

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """On held-out scenes, at fixed timesteps with fixed noise: the loss, and the plain error inside the boxes.

        The latter depends on no weighting, so it compares recipes.
        """
        count = len(batch["images"])
        for t in (250, 500, 750):
            generator = torch.Generator().manual_seed(batch_idx)
            errors, _ = self.denoising_errors(batch, torch.full((count,), t, device=self.device), generator)
            weight = self.box_weights(batch["boxes"], errors.shape[-1])
            inside = self.box_weights(batch["boxes"], errors.shape[-1], 1.0, 0.0)
            self.log(f"validation_loss_{t}", (errors * weight).sum() / weight.sum(), batch_size=count)
            self.log(f"validation_in_boxes_{t}", (errors * inside).sum() / inside.sum(), batch_size=count)

    def export(self) -> None:
        """Writes the diffusers pipeline and a grid of samples for fixed prompts and seeds."""
        output = Path(self.hparams.output)
        self.pipeline.save_pretrained(output)
        share(output)
        draw_samples(self.pipeline, output.parent / f"{output.name}_samples" / f"step_{self.global_step:06d}.png")


def load_weights(pipeline: Any, directory: str) -> None:
    """Puts the weights of a saved base of the same architecture into `pipeline`.

    Raises:
        WeightsError: there is no base, or it has another architecture.
    """
    from msdiffusion.backbone.pretrained import load_pipeline

    try:
        if not Path(directory).is_dir():
            raise FileNotFoundError("no such folder")
        saved = load_pipeline(directory)
        for name in ("unet", "text_encoder", "text_encoder_2"):
            getattr(pipeline, name).load_state_dict(getattr(saved, name).state_dict())
    except (OSError, ValueError, RuntimeError, AttributeError, WeightsError) as error:
        raise WeightsError(f"initial={directory!r} holds no base of this architecture: {reason(error)}") from error


def draw_samples(pipeline: Any, path: Path, count: int = 24, steps: int = 20, guidance_scale: float = 3.0) -> None:
    """Draws a grid of samples of the base for fixed held-out captions and seeds and writes it as PNG."""
    from PIL import Image

    from data_pipeline.world.scenes import sample_subjects

    rng = np.random.default_rng(7)
    names = tuple(BACKGROUNDS)
    details = ("plain", "color", "full")
    prompts = [
        write_caption(sample_subjects(rng, 1 + (i % 4 == 3), "held_out"), names[i % 6], details[i % 3])
        for i in range(count)
    ]
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(i) for i in range(count)],
    ).images
    columns = 8
    side = pictures[0].width * 2
    grid = Image.new("RGB", (columns * side, math.ceil(count / columns) * side))
    for i, picture in enumerate(pictures):
        grid.paste(picture.resize((side, side), Image.Resampling.NEAREST), (i % columns * side, i // columns * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


LABELS = {
    "category": len(CATEGORIES),
    "main_color": len(COLORS),
    "second_color": len(COLORS),
    "accent_color": len(COLORS),
    "pattern": len(PATTERNS),
    "shape": 4,
}
"""What the image encoder learns to name, in the order of `identity_labels`."""


class ImageEncoderPretraining(BudgetedTraining):
    """The embedded CLIP image encoder: names an identity's parts, tells identities apart, and keeps the pixels.

    Three losses: cross-entropy of every label; supervised contrastive loss between two views of an identity (Khosla et
    al. 2020, eq. 2, one positive each); reconstruction of each patch from its token in hidden_states[-2], the layer
    that the adapter reads, so that patterns survive there.

    Args:
        temperature: of the contrastive loss.
        pixel_weight: weight of the reconstruction.
        others: see `BudgetedTraining`.
    """

    def __init__(
        self,
        output: str = "runs/embedded/image_encoder",
        learning_rate: float = 1e-3,
        max_steps: int = 6_000,
        budget_minutes: float | None = None,
        decay_share: float = 0.7,
        warmup_steps: int = 100,
        ema_decay: float = 0.998,
        export_minutes: float = 10.0,
        temperature: float = 0.1,
        pixel_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = build_image_encoder()
        config = self.encoder.config
        self.patch = config.patch_size
        self.heads = nn.ModuleDict({name: nn.Linear(config.projection_dim, n) for name, n in LABELS.items()})
        self.pixels = nn.Linear(config.hidden_size, 3 * self.patch**2)
        self.prepare_average()

    def trained_modules(self) -> nn.ModuleDict:
        """The encoder alone; heads are thrown away."""
        return nn.ModuleDict({"encoder": self.encoder})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the learning rate follows the budget."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.05)

    def losses(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss terms and accuracies of pictures (2 B, 3, H, W) whose halves are two views, labels (B, 6)."""
        outputs = self.encoder(pixels, output_hidden_states=True)
        labels = labels.repeat(2, 1)
        terms: dict[str, Tensor] = {}
        for column, (name, head) in enumerate(self.heads.items()):
            logits = head(outputs.image_embeds).float()
            terms[f"naming_{name}"] = nn.functional.cross_entropy(logits, labels[:, column])
            terms[f"accuracy_{name}"] = (logits.argmax(1) == labels[:, column]).float().mean().detach()
        normal = nn.functional.normalize(outputs.image_embeds.float(), dim=1)
        similarity = normal @ normal.T / self.hparams.temperature
        similarity = similarity.masked_fill(torch.eye(len(normal), dtype=torch.bool, device=normal.device), -1e4)
        partner = torch.arange(len(normal), device=normal.device).roll(len(normal) // 2)
        terms["contrastive"] = nn.functional.cross_entropy(similarity, partner)
        terms["accuracy_retrieval"] = (similarity.argmax(1) == partner).float().mean().detach()
        patches = nn.functional.pixel_unshuffle(pixels, self.patch).flatten(2).transpose(1, 2)
        terms["pixels"] = nn.functional.mse_loss(self.pixels(outputs.hidden_states[-2][:, 1:]).float(), patches)
        return terms

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One step on two augmented views of each identity."""
        pixels = torch.cat([prepare_views(batch["views"][:, k], True) for k in (0, 1)])
        terms = self.losses(pixels, batch["labels"])
        self.log_dict({k: v for k, v in terms.items() if not k.startswith("naming")}, prog_bar=False)
        self.log("retrieval", terms["accuracy_retrieval"], prog_bar=True)
        naming = sum(v for k, v in terms.items() if k.startswith("naming"))
        return naming + terms["contrastive"] + self.hparams.pixel_weight * terms["pixels"]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accuracies on held-out identities, views as they are."""
        pixels = torch.cat([prepare_views(batch["views"][:, k], False) for k in (0, 1)])
        terms = self.losses(pixels, batch["labels"])
        self.log_dict({f"validation_{k}": v for k, v in terms.items()}, batch_size=len(batch["labels"]))

    def export(self) -> None:
        """Writes the encoder and its image processor."""
        from transformers import CLIPImageProcessor

        self.encoder.save_pretrained(self.hparams.output)
        size = self.encoder.config.image_size
        CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
        ).save_pretrained(self.hparams.output)
