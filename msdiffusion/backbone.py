"""The frozen parts: a Stable Diffusion XL pipeline of diffusers and a CLIP image encoder.

This is the only room that loads other people's weights.

Shapes: B batch, N references, L tokens, C cross-attention width, P pooled width, D image encoder width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import deprecation_utils
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from msdiffusion.errors import RequestError, WeightsError

# diffusers loads a component of a pipeline only from a module that is already imported: the embedded base has this one
from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder

SQUASH_SIDE = 512
"""Pixels of the square that the official scripts squash a reference to before CLIP's own resizing."""

# What a missing or broken folder, hub name or file raises inside diffusers, transformers and huggingface_hub.
_LOADING_ERRORS = (OSError, ValueError, HfHubHTTPError, HFValidationError)
# diffusers renamed its keyword after 0.39, and warns of the old name.
_DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


class Backbone:
    """The frozen pipeline and image encoder, and the few things that training and generation ask of them."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        image_encoder: CLIPVisionModelWithProjection,
        image_processor: CLIPImageProcessor,
    ) -> None:
        """Take built parts; they are frozen here.

        Raises:
            WeightsError: the pipeline is not of the SDXL kind.
        """
        if not isinstance(pipeline, StableDiffusionXLPipeline):
            raise WeightsError(
                f"the base model is a {type(pipeline).__name__}, but a StableDiffusionXLPipeline is needed: other "
                "kinds have other text encoders, so no adapter fits them"
            )
        self.pipeline, self.image_encoder, self.image_processor = pipeline, image_encoder, image_processor
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, image_encoder):
            part.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        base_model: str | Path,
        image_encoder: str | Path,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Backbone:
        """Load both from folders or from the hub.

        Args:
            base_model: a StableDiffusionXLPipeline.
            image_encoder: a CLIPVisionModelWithProjection; "owner/name/folder" finds a folder inside a hub repository.
            torch_dtype: of all weights; None: float32.
            device: None: the first CUDA device if there is one, else the CPU.

        Raises:
            WeightsError: nothing there, or something else than that.
        """
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        try:
            with _own_autoencoder_expected():
                pipeline = StableDiffusionXLPipeline.from_pretrained(
                    str(base_model), add_watermarker=False, **{_DTYPE: dtype}
                )
        except _LOADING_ERRORS as error:
            raise _not_loaded("base model", base_model, error) from error
        name, options = _split_hub_folder(image_encoder)
        try:
            encoder = CLIPVisionModelWithProjection.from_pretrained(name, dtype=dtype, **options)
        except _LOADING_ERRORS as error:
            raise _not_loaded("image encoder", image_encoder, error) from error
        backbone = cls(pipeline, encoder, _image_processor(name, options, encoder.config))
        return backbone.to(default_device() if device is None else device)

    def to(self, device: str | torch.device) -> Backbone:
        """Move all parts."""
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
        """Of the UNet."""
        return self.unet.device

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
    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text states (B, L, C) and pooled states (B, P) of both text encoders, as the pipeline makes them."""
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return states, pooled

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
        return self.pipeline.text_encoder(tokens.input_ids.to(self.device)).pooler_output

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
        squares = [_square(flatten(reference, background), background, fit) for reference in references]
        return self.image_processor(images=squares, return_tensors="pt").pixel_values

    @torch.no_grad()
    def encode_references(self, pixel_values: Tensor, features: str = "tokens") -> Tensor:
        """What the image encoder sees in prepared references (N, 3, h, w).

        Args:
            pixel_values: as ``prepare_references`` makes them.
            features: "tokens": the penultimate hidden states (N, L, D); "global": the projected embedding of the whole
                reference (N, 1, P).
        """
        pixels = pixel_values.to(self.image_encoder.device, self.image_encoder.dtype)
        if features == "global":
            return self.image_encoder(pixels).image_embeds.unsqueeze(1)
        return self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, c, h / f, w / f), scaled for the UNet, of pixels (B, 3, h, w) in [-1, 1].

        The autoencoder's own posterior is sampled, with ``generator`` where given.
        """
        with self._full_precision_vae() as vae:
            latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample(generator)
        mean, deviation = self._latent_statistics(latents)
        return ((latents - mean) * (self.vae.config.scaling_factor / deviation)).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents scaled for the UNet, (B, c, h, w)."""
        mean, deviation = self._latent_statistics(latents)
        latents = latents * (deviation / self.vae.config.scaling_factor) + mean
        with self._full_precision_vae() as vae:
            pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
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
        self, pooled: Tensor, original_size: Any, crop_top_left: Any, target_size: Any
    ) -> dict[str, Tensor]:
        """SDXL's extra conditions for the UNet.

        Args:
            pooled: (B, P).
            original_size: (height, width) of the picture before resizing; one pair, or (B, 2).
            crop_top_left: (top, left) of the crop; one pair, or (B, 2).
            target_size: (height, width) of the crop; one pair, or (B, 2).

        Returns:
            {"text_embeds": (B, P), "time_ids": (B, 6)}.
        """
        pairs = [
            torch.as_tensor(pair, dtype=pooled.dtype, device=pooled.device).expand(pooled.shape[0], 2)
            for pair in (original_size, crop_top_left, target_size)
        ]
        return {"text_embeds": pooled, "time_ids": torch.cat(pairs, dim=1)}


def flatten(reference: Image.Image, background: Sequence[int]) -> Image.Image:
    """The picture as RGB, with ``background`` (RGB, 0-255) where it is transparent."""
    if not reference.has_transparency_data:
        return reference.convert("RGB")
    canvas = Image.new("RGBA", reference.size, (*background, 255))
    return Image.alpha_composite(canvas, reference.convert("RGBA")).convert("RGB")


def _square(picture: Image.Image, background: Sequence[int], fit: str) -> Image.Image:
    if fit == "squash":
        return picture.resize((SQUASH_SIDE, SQUASH_SIDE), Image.Resampling.BICUBIC)
    if fit == "pad":
        side = max(picture.size)
        canvas = Image.new("RGB", (side, side), tuple(background))
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return canvas
    raise RequestError(f'fit must be "pad" or "squash", got {fit!r}')


def skeleton_unet(base_model: str | Path) -> UNet2DConditionModel:
    """The UNet of a pipeline without its weights (on the meta device): names and shapes for checks and conversion.

    Raises:
        WeightsError: there is no such pipeline, or it has no UNet.
    """
    try:
        config = UNet2DConditionModel.load_config(str(base_model), subfolder="unet")
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)
    except _LOADING_ERRORS as error:
        raise _not_loaded("UNet of the base model", base_model, error) from error


def encoder_widths(base_model: str | Path, image_encoder: str | Path, features: str = "tokens") -> tuple[int, int]:
    """Widths of a phrase embedding and of the image encoder's features, read from the configs alone.

    Args:
        base_model: directory or hub name.
        image_encoder: directory or hub name.
        features: see ``Backbone.encode_references``.

    Raises:
        WeightsError: a config is not there.
    """
    from transformers import CLIPTextConfig

    try:
        text = CLIPTextConfig.from_pretrained(str(base_model), subfolder="text_encoder")
    except _LOADING_ERRORS as error:
        raise _not_loaded("text encoder of the base model", base_model, error) from error
    name, options = _split_hub_folder(image_encoder)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():  # transformers would give its defaults
        raise WeightsError(f"cannot load the image encoder from {name!r}: no config.json there")
    try:
        vision = CLIPVisionConfig.from_pretrained(name, **options)
    except _LOADING_ERRORS as error:
        raise _not_loaded("image encoder", image_encoder, error) from error
    return text.hidden_size, vision.projection_dim if features == "global" else vision.hidden_size


def default_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quiet_loading() -> None:
    """Turn off the libraries' bars for loading weights; for command lines."""
    import transformers

    diffusers_logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def _own_autoencoder_expected() -> Iterator[None]:
    """Keep diffusers from warning, at each loading, that the embedded base's autoencoder is none of its own classes."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")

    def is_other_news(record: logging.LogRecord) -> bool:
        return PixelUnshuffleAutoencoder.__name__ not in record.getMessage()

    logger.addFilter(is_other_news)
    try:
        yield
    finally:
        logger.removeFilter(is_other_news)


def _image_processor(name: str, options: Mapping[str, str], config: CLIPVisionConfig) -> CLIPImageProcessor:
    """The encoder's own preprocessing where the folder has one, else CLIP's at the encoder's size."""
    try:
        return CLIPImageProcessor.from_pretrained(name, **options)
    except _LOADING_ERRORS:  # the released image encoders come without preprocessor_config.json
        side = config.image_size
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _split_hub_folder(name: str | Path) -> tuple[str, dict[str, str]]:
    """Split "owner/name/folder" into "owner/name" and {"subfolder": "folder"}; local folders stay whole."""
    text = str(name)
    parts = text.split("/")
    if Path(text).exists() or len(parts) < 3 or text.startswith(("/", ".", "~")):
        return text, {}
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}


def _not_loaded(what: str, name: str | Path, error: Exception) -> WeightsError:
    lines = str(error).strip().splitlines()
    return WeightsError(f"cannot load the {what} from {str(name)!r}: {lines[0] if lines else type(error).__name__}")
