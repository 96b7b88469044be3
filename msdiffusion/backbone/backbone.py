"""The frozen parts: a Stable Diffusion pipeline of diffusers (XL or 1.x) and a CLIP image encoder.

Shapes: B batch, N references, L tokens, C cross-attention width, P pooled width, D image encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from msdiffusion.backbone.open_clip_encoder import OpenClipVisionEncoder
from msdiffusion.backbone.pretrained import load_image_encoder, load_pipeline
from msdiffusion.backbone.references import ReferencePreparation
from msdiffusion.environment import DTYPES
from msdiffusion.errors import RequestError, WeightsError, reason, shown
from msdiffusion.own_memory import give_own_memory
from msdiffusion.places import find_model

_HOOKS = {"_hf_hook", "_diffusers_hook"}
"""Attributes of modules by which accelerate and diffusers move weights."""


class Backbone:
    """The frozen pipeline and image encoder, and the few things that training and generation ask of them."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        image_encoder: CLIPVisionModelWithProjection | OpenClipVisionEncoder,
        image_processor: CLIPImageProcessor,
    ) -> None:
        """Take built parts; they are frozen here, and their weights on the CPU copied out of the files they came from.

        Args:
            pipeline: a StableDiffusionXLPipeline, a StableDiffusionPipeline, or one with the same parts (image to
                image, inpainting, ControlNet, ...).
            image_encoder: of transformers, or of open_clip.
            image_processor: its preprocessing.

        Raises:
            WeightsError: the pipeline is of another kind.
        """
        self.kind: Literal["sdxl", "sd1"] = _kind(pipeline)
        """"sdxl", or "sd1": one text encoder, no size conditions."""
        self.pipeline, self.image_encoder, self.image_processor = pipeline, image_encoder, image_processor
        second = [pipeline.text_encoder_2] if self.kind == "sdxl" else []
        for tokenizer, encoder in zip(("tokenizer", "tokenizer_2"), (pipeline.text_encoder, *second), strict=False):
            # A tokenizer whose files tell no limit has one of 10 ** 30, and the encoder no place for more than its own.
            own = getattr(pipeline, tokenizer)
            own.model_max_length = int(min(own.model_max_length, encoder.config.max_position_embeddings))
            own.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # drawing says it
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, *second, image_encoder):
            part.eval().requires_grad_(False)
            give_own_memory(part)

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | Path,
        image_encoder: str | Path,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        *,
        base_config: str | Path | None = None,
        vae_dtype: torch.dtype | str | None = None,
    ) -> Backbone:
        """Load both from folders, files or the hub.

        Args:
            base_model: see ``msdiffusion.backbone.pretrained.load_pipeline``.
            image_encoder: see ``msdiffusion.backbone.pretrained.load_image_encoder``.
            torch_dtype: of all weights; None: float32.
            device: None: the first CUDA device if there is one, else the CPU.
            base_config: for a base model in one file, the pipeline that its configs and tokenizers come from.
            vae_dtype: of the autoencoder's weights, which are never narrower on the way; None: ``torch_dtype``.

        Raises:
            WeightsError: nothing there, or something else than that.
            RequestError: no such dtype or device.
        """
        dtype, device = weights_dtype(torch_dtype), usable_device(device)
        vae_dtype = None if vae_dtype is None else weights_dtype(vae_dtype)
        pipeline = load_pipeline(find_model(base_model), dtype, base_config, vae_dtype).to(device)
        encoder, processor = load_image_encoder(find_model(image_encoder), dtype)
        return cls(pipeline, encoder.to(device), processor)  # moved first: what leaves the CPU is copied that way

    def to(self, device: str | torch.device) -> Backbone:
        """Move all parts; RequestError for a device that there is not, before anything is moved."""
        device = usable_device(device)
        self.pipeline.to(device)
        self.image_encoder.to(device)
        return self

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder between pixels and latents."""
        return self.pipeline.vae

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the first text encoder, whose tokens phrases are counted in."""
        return self.pipeline.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also when offloading keeps the weights elsewhere in the meantime."""
        parts = [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]
        # The pipeline's own answer looks for hooks by hasattr, which takes 30 ms with SDXL's 4,000 modules.
        hooked = any(_HOOKS & vars(module).keys() for part in parts for module in part.modules())
        return self.pipeline._execution_device if hooked else next(parts[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the UNet."""
        return self.unet.dtype

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell, in each direction."""
        return self.pipeline.vae_scale_factor

    @property
    def cross_attention_dim(self) -> int:
        """C."""
        return self.unet.config.cross_attention_dim

    @property
    def phrase_width(self) -> int:
        """Width of a phrase embedding."""
        return self.pipeline.text_encoder.config.hidden_size

    @property
    def image_width(self) -> int:
        """D."""
        return self.image_encoder.config.hidden_size

    def image_width_of(self, features: str) -> int:
        """Width of what ``encode_references`` gives for these features."""
        return self.image_encoder.config.projection_dim if features == "global" else self.image_width

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Text states (B, L, C) and pooled states (B, P) as the pipeline makes them; None for 1.x, which pools none."""
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return encoded[0], encoded[2] if self.kind == "sdxl" else None

    @torch.no_grad()
    def encode_phrases(self, phrases: Sequence[str]) -> Tensor:
        """The first text encoder's pooled output, unprojected: (number of phrases, phrase_width)."""
        tokens = self.tokenizer(
            list(phrases),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.device)
        encoded = self.pipeline.text_encoder(ids)
        if self.pipeline.text_encoder.config.eos_token_id != 2:
            return encoded.pooler_output
        # Configs from before transformers 4.31 name a wrong end of text; then transformers reads at the highest number,
        # which is the last one of the words until textual inversion adds some.
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)
        return encoded.last_hidden_state[torch.arange(len(ends), device=ends.device), ends]

    def prepare_references(
        self, references: Sequence[Image.Image], background: Sequence[int], fit: str = "pad"
    ) -> Tensor:
        """References as the image encoder wants them.

        Args:
            references: PIL pictures of any size, RGB or RGBA (straight alpha).
            background: RGB, 0-255, shown through transparent pixels and, with "pad", beside the picture.
            fit: "pad" centres the picture in a square; "squash" changes its aspect, as the official code does.

        Returns:
            (N, 3, h, w) float32 on the CPU.

        Raises:
            RequestError: unknown ``fit``.
        """
        return ReferencePreparation(self.image_processor, tuple(background), fit)(references)

    @torch.no_grad()
    def encode_references(self, pixel_values: Tensor, features: str = "tokens") -> Tensor:
        """What the image encoder sees in prepared references (N, 3, h, w).

        Args:
            pixel_values: as ``prepare_references`` makes them.
            features: "tokens": the penultimate hidden states (N, L, D); "global": the projected embedding of the whole
                reference (N, 1, P).
        """
        pixels = pixel_values.to(_execution_device(self.image_encoder), self.image_encoder.dtype)
        if features == "global":
            return self.image_encoder(pixels).image_embeds.unsqueeze(1)
        return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, c, h / f, w / f), scaled for the UNet, of pixels (B, 3, h, w) in [-1, 1].

        The autoencoder's own posterior is sampled, with ``generator`` where given.
        """
        with self._full_precision_vae() as vae:
            latents = vae.encode(pixels.to(_execution_device(vae), vae.dtype)).latent_dist.sample(generator)
        mean, deviation = self._latent_statistics(latents)
        return ((latents - mean) * (self.vae.config.scaling_factor / deviation)).to(self.dtype)

    @torch.no_grad()
    def latent_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the autoencoder says about pixels (B, 3, h, w) in [-1, 1], scaled for the UNet, in float32.

        Returns:
            Mean and standard deviation, each (B, c, h / f, w / f): mean + deviation * noise is what
            ``encode_pictures`` samples. The deviation is None where the autoencoder knows one answer only.
        """
        with self._full_precision_vae() as vae:
            posterior = vae.encode(pixels.to(_execution_device(vae), vae.dtype)).latent_dist
        latents, spread = posterior.mean.float(), getattr(posterior, "std", None)
        mean, deviation = self._latent_statistics(latents)
        factor = self.vae.config.scaling_factor / deviation
        return (latents - mean) * factor, None if spread is None else spread.float() * factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of a picture's latents; RequestError for no multiples of ``latent_factor``."""
        factor = self.latent_factor
        if height < factor or width < factor or height % factor or width % factor:
            raise RequestError(
                f"a picture of {height} x {width} pixels (height x width) has no latents: both sides must be multiples "
                f"of {factor} for this base"
            )
        return self.vae.config.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents scaled for the UNet, (B, c, h, w)."""
        mean, deviation = self._latent_statistics(latents)
        latents = latents * (deviation / self.vae.config.scaling_factor) + mean
        with self._full_precision_vae() as vae:
            pixels = vae.decode(latents.to(_execution_device(vae), vae.dtype)).sample
        return self.pipeline.image_processor.postprocess(pixels.float(), output_type="pil")

    @contextmanager
    def _full_precision_vae(self) -> Iterator[AutoencoderKL]:
        """The autoencoder, for a while in float32 if half precision overflows it, as SDXL's does."""
        upcast = self.vae.dtype == torch.float16 and self.vae.config.force_upcast
        if upcast:
            self.vae.to(torch.float32)
        try:
            yield self.vae
        finally:
            if upcast:
                self.vae.to(torch.float16)

    def _latent_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation per channel that the autoencoder's config states, else 0 and 1."""
        config = self.vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or deviation is None:
            mean, deviation = [0.0], [1.0]
        return tuple(latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))

    def added_conditions(
        self, pooled: Tensor | None, original_size: Any, crop_top_left: Any, target_size: Any
    ) -> dict[str, Tensor]:
        """SDXL's extra conditions for the UNet; none for Stable Diffusion 1.x.

        Args:
            pooled: (B, P); None for Stable Diffusion 1.x.
            original_size: (height, width) of the picture before resizing; one pair, or (B, 2).
            crop_top_left: (top, left) of the crop; one pair, or (B, 2).
            target_size: (height, width) of the crop; one pair, or (B, 2).

        Returns:
            {"text_embeds": (B, P), "time_ids": (B, 6)}, or {}.
        """
        if pooled is None:
            return {}
        pairs = [
            torch.as_tensor(pair, dtype=pooled.dtype, device=pooled.device).expand(pooled.shape[0], 2)
            for pair in (original_size, crop_top_left, target_size)
        ]
        return {"text_embeds": pooled, "time_ids": torch.cat(pairs, dim=1)}


def weights_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of weights, also by name ("float16", "torch.float16"), float32 for None; RequestError for others."""
    named = {name: getattr(torch, name) for name in DTYPES}
    found = named.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype or torch.float32
    if found not in (*named.values(), torch.float64):
        raise RequestError(
            f"torch_dtype must be torch.{', torch.'.join(DTYPES)}, or the name of one, got {shown(dtype)}"
        )
    return found


def usable_device(device: str | int | torch.device | None) -> torch.device:
    """The device, tried; for None the first CUDA device, or else the CPU; RequestError where it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(device, bytes):
            raise TypeError("it is no text")
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, TypeError, ImportError, ValueError, AttributeError) as error:
        many = torch.cuda.device_count()
        here = ", ".join(["cpu", *(f"cuda:{number}" for number in range(many))])
        hint = "; an NVIDIA GPU is called cuda" if "gpu" in str(device).lower() else ""
        raise RequestError(
            f"device {shown(device)} cannot be used here ({here} can){hint}: {reason(error)[:200]}"
        ) from None
    return found


def quiet_loading() -> None:
    """Turn off the libraries' bars for loading weights; for command lines."""
    import transformers

    diffusers_logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _kind(pipeline: Any) -> Literal["sdxl", "sd1"]:
    """By its parts, so that image-to-image, inpainting and ControlNet pipelines count; WeightsError for others."""
    parts = (getattr(pipeline, name, None) for name in ("unet", "text_encoder"))
    unet, text_encoder = (getattr(part, "_orig_mod", part) for part in parts)  # torch.compile wraps them
    if isinstance(unet, UNet2DConditionModel) and isinstance(text_encoder, CLIPTextModel):
        if unet.config.addition_embed_type is None:
            return "sd1"
        if unet.config.addition_embed_type == "text_time" and getattr(pipeline, "text_encoder_2", None) is not None:
            return "sdxl"
    raise WeightsError(
        f"the base model is a {type(pipeline).__name__}, but a StableDiffusionXLPipeline, a "
        "StableDiffusionPipeline or one with the same parts, is needed: other kinds have other text encoders, "
        "so no adapter fits them"
    )


def _execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: accelerate's hooks say so for weights that they move."""
    for part in module.modules():
        device = getattr(vars(part).get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device
