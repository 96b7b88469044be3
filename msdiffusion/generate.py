"""class MSDiffusion: pictures of your subjects, each in its box, in the scene that the prompt names."""

from __future__ import annotations

import secrets
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor

from msdiffusion.adapter import MSAdapter
from msdiffusion.attention import AutoLayout
from msdiffusion.backbone import Backbone, default_device
from msdiffusion.errors import WeightsError
from msdiffusion.loading import check_encoders, load_adapter
from msdiffusion.phrases import beyond_limit, token_span
from msdiffusion.request import GenerationRequest, OutputType, check_request

BASE_FOLDER, ENCODER_FOLDER = "base", "image_encoder"


class MSDiffusion:
    """A frozen backbone with a trained adapter installed."""

    def __init__(self, backbone: Backbone, adapter: MSAdapter, sources: tuple[str, str] | None = None) -> None:
        """Take built parts; the adapter is frozen, moved beside the UNet and installed there.

        Args:
            backbone: the frozen parts.
            adapter: the trained part.
            sources: where base model and image encoder came from, for save_pretrained; None: built in memory.

        Raises:
            WeightsError: they do not fit; the message names both shapes.
        """
        features = adapter.config.reference_features
        check_encoders(adapter.config, backbone.phrase_width, backbone.image_width_of(features))
        adapter.install(backbone.unet)
        self.backbone, self.sources = backbone, sources
        self.adapter = adapter.to(backbone.device, backbone.dtype).eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        base_model: str | Path | None = None,
        image_encoder: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> MSDiffusion:
        """Load an adapter and the models it was trained on.

        Args:
            model: an adapter's folder, a hub repository, or the official ``ms_adapter.bin``.
            base_model: folder or hub name of another SDXL pipeline of the same architecture, such as a fine-tune.
            image_encoder: the same for the image encoder.
            torch_dtype: of all weights; None: float32. ``torch.float16`` suits SDXL on a GPU.
            device: None: the first CUDA device if there is one, else the CPU.

        Raises:
            WeightsError: something is missing, or parts of different models; before any large file is read where that
                can be told from the configs.
        """
        adapter, base, encoder = load_adapter(model, base_model, image_encoder)
        backbone = Backbone.from_pretrained(base, encoder, torch_dtype, default_device() if device is None else device)
        return cls(backbone, adapter, (base, encoder))

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline, for LoRA, other schedulers, offloading, ..."""
        return self.backbone.pipeline

    def to(self, device: str | torch.device) -> MSDiffusion:
        """Move all parts."""
        self.backbone.to(device)
        self.adapter.to(device)
        return self

    def generate(
        self,
        images: Sequence[Image.Image | str | Path],
        boxes: Sequence[Sequence[float]],
        prompt: str,
        phrases: Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        num_images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scale: float | None = None,
        subject_scales: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        auto_layout: bool = False,
        auto_layout_threshold: float = 0.5,
        auto_layout_start: int = 5,
        seed: int | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
        batch_size: int = 4,
    ) -> list[Image.Image] | np.ndarray | Tensor:
        """Draw pictures with each subject in its box.

        Where None is allowed, the adapter's own default is used. Several views of one subject: repeat its phrase and
        box. Arguments are checked before anything is computed.

        Args:
            images: one reference per subject: PIL pictures, RGB or RGBA (cut-outs), or paths of such.
            boxes: one (x1, y1, x2, y2) per subject, in fractions of the picture, x to the right and y downwards.
            prompt: the scene; name every subject in it.
            phrases: what each subject is called, such as "dog". None: the prompt's noun phrases, if they match the
                images one to one.
            negative_prompt: what to stay away from.
            num_images: how many pictures. Picture k is the one that ``seed=seed + k`` gives alone.
            steps: denoising steps.
            guidance_scale: weight of the prompt and the subjects against the negative prompt; 1 or less: no guidance.
            scale: weight of all subjects against the text; 0 is the bare base model, exactly.
            subject_scales: one weight per subject that multiplies ``scale``; 0 leaves a subject out.
            height: pixels, a multiple of 8.
            width: pixels, a multiple of 8.
            auto_layout: after some steps, follow the regions that the text's attention gives the phrases instead of
                the boxes. Every phrase must be in the prompt.
            auto_layout_threshold: how much of its highest attention a patch needs to belong to a subject, in [0, 1].
            auto_layout_start: the first step, counted from 1, with these regions.
            seed: of the noise, which is drawn on the CPU so that every device gives the same. None: a new one.
            output_type: "pil" a list of pictures, "np" (n, height, width, 3) in [0, 1], "pt" (n, 3, height, width) in
                [0, 1], "latent" (n, channels, rows, columns).
            progress: show a bar.
            batch_size: pictures drawn at once at most.

        Raises:
            RequestError, LayoutError, PhraseError: an argument cannot be honoured.
        """
        request = check_request(
            images,
            boxes,
            prompt,
            phrases,
            negative_prompt=negative_prompt,
            num_images=num_images,
            steps=steps,
            guidance_scale=guidance_scale,
            scale=scale,
            subject_scales=subject_scales,
            height=height,
            width=width,
            auto_layout=auto_layout,
            auto_layout_threshold=auto_layout_threshold,
            auto_layout_start=auto_layout_start,
            seed=seed,
            output_type=output_type,
            batch_size=batch_size,
        )
        return self.run(request, progress=progress)

    @torch.no_grad()
    def run(self, request: GenerationRequest, *, progress: bool = True) -> list[Image.Image] | np.ndarray | Tensor:
        """Draw what a checked request asks for; see ``generate``."""
        defaults = self.adapter.config.defaults
        side = self.backbone.unet.config.sample_size * self.backbone.latent_factor
        height = _first(request.height, defaults.get("height"), side)
        width = _first(request.width, defaults.get("width"), side)
        guidance_scale = float(_first(request.guidance_scale, defaults.get("guidance_scale"), 7.5))
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        self._warn_of_cut_prompts(request)
        spans = self._spans(request) if request.auto_layout else None
        tokens, boxes = self.subject_tokens(request.images, request.phrases, request.boxes)
        pipeline = self.pipeline
        pipeline.set_progress_bar_config(disable=not progress)
        batches = []
        for first in range(0, request.num_images, request.batch_size):
            count = min(request.batch_size, request.num_images - first)
            condition = self.adapter.condition(
                tokens,
                boxes,
                height=height // self.backbone.latent_factor,
                width=width // self.backbone.latent_factor,
                scale=_first(request.scale, defaults.get("scale"), 1.0),
                subject_scales=request.subject_scales,
                # It collects text maps, so every batch has its own.
                auto_layout=None
                if spans is None
                else AutoLayout(spans, request.auto_layout_threshold, request.auto_layout_start),
                guidance=guidance_scale > 1.0 and self.backbone.unet.config.time_cond_proj_dim is None,
            )
            try:
                output = pipeline(
                    prompt=request.prompt,
                    negative_prompt=_first(request.negative_prompt, defaults.get("negative_prompt"), ""),
                    height=height,
                    width=width,
                    num_inference_steps=_first(request.steps, defaults.get("steps"), 30),
                    guidance_scale=guidance_scale,
                    num_images_per_prompt=count,
                    generator=[torch.Generator("cpu").manual_seed(seed + first + k) for k in range(count)],
                    cross_attention_kwargs={"subjects": condition},
                    output_type=request.output_type,
                )
            finally:
                pipeline._cross_attention_kwargs = None  # the pipeline would keep the condition alive
            batches.append(output.images)
        if request.output_type == "pil":
            return [picture for batch in batches for picture in batch]
        return np.concatenate(batches) if request.output_type == "np" else torch.cat(batches)

    @torch.no_grad()
    def subject_tokens(
        self,
        images: Sequence[Image.Image],
        phrases: Sequence[str],
        boxes: Sequence[Sequence[float]],
    ) -> tuple[Tensor, Tensor]:
        """Tokens (1, S, T, C) and boxes (1, S, 4) of S subjects, as ``adapter.condition`` takes them.

        With these a condition can be made for any diffusers pipeline on the same UNet, by
        ``cross_attention_kwargs={"subjects": condition}``.
        """
        backbone, config = self.backbone, self.adapter.config
        pixels = backbone.prepare_references(images, config.reference_background, config.reference_fit)
        device, dtype = self.adapter.device, self.adapter.dtype
        image_tokens = backbone.encode_references(pixels, config.reference_features).unsqueeze(0).to(device, dtype)
        phrase_embeddings = backbone.encode_phrases(phrases).unsqueeze(0).to(device, dtype)
        box_tensor = torch.tensor([[list(box) for box in boxes]], dtype=torch.float32, device=device)
        return self.adapter.resampler(image_tokens, phrase_embeddings, box_tensor), box_tensor

    def _spans(self, request: GenerationRequest) -> Tensor:
        """(1, S, 2) token spans of the phrases in the prompt."""
        spans = [
            token_span(self.backbone.tokenizer, request.prompt, phrase, occurrence)
            for phrase, occurrence in zip(request.phrases, request.occurrences, strict=True)
        ]
        return torch.tensor([spans], device=self.backbone.device)

    def _warn_of_cut_prompts(self, request: GenerationRequest) -> None:
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
            rest = beyond_limit(self.backbone.tokenizer, text)
            if rest:
                limit = self.backbone.tokenizer.model_max_length
                warnings.warn(
                    f"the {name} is longer than the {limit} tokens that the text encoder reads; ignored: {rest!r}",
                    stacklevel=4,
                )

    def save_pretrained(self, directory: str | Path, *, include_backbone: bool = False) -> None:
        """Write the adapter, so that from_pretrained(directory) gives this model again.

        Args:
            directory: is made if it is missing.
            include_backbone: also write base model and image encoder, for a directory that needs nothing else. Without
                it the config points to where they were loaded from.

        Raises:
            WeightsError: ``include_backbone`` is off, and the backbone was not loaded from anywhere.
        """
        directory = Path(directory)
        if include_backbone:
            self.pipeline.save_pretrained(directory / BASE_FOLDER)
            self.backbone.image_encoder.save_pretrained(directory / ENCODER_FOLDER)
            self.backbone.image_processor.save_pretrained(directory / ENCODER_FOLDER)
            base, encoder = BASE_FOLDER, ENCODER_FOLDER
        elif self.sources is None:
            raise WeightsError("this model's backbone was built in memory: save it with include_backbone=True")
        else:
            base, encoder = (
                str(Path(source).resolve()) if Path(source).exists() else source for source in self.sources
            )
        self.adapter.save_pretrained(directory, base_model=base, image_encoder=encoder)

    def push_to_hub(
        self, repo_id: str, *, include_backbone: bool = False, private: bool = False, token: str | None = None
    ) -> str:
        """Upload what save_pretrained writes to a hub repository, which is made if it is missing; returns its address.

        Raises:
            WeightsError: the config would point to a folder of this machine.
        """
        if not include_backbone and (self.sources is None or any(Path(source).exists() for source in self.sources)):
            raise WeightsError("the backbone lies on this machine only: push with include_backbone=True")
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, include_backbone=include_backbone)
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(url)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
