"""Drawing many requests at once: who shares a batch of the denoiser, and what comes of it.

Shapes: P pictures of a batch, S subjects.
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdiffusion.errors import RequestError, shown, warn_caller
from msdiffusion.generation.pipeline_call import call_pipeline
from msdiffusion.generation.pipeline_options import check_options, check_steps
from msdiffusion.generation.safety import FLAGGED
from msdiffusion.generation.subject_batch import Model as EncodingModel
from msdiffusion.generation.subject_batch import SubjectBatch, check_numbers, check_weights, check_windows, written_out
from msdiffusion.request.phrases import beyond_limit
from msdiffusion.request.request import (
    GenerationRequest,
    RequestArguments,
    check_auto_layout_start,
    check_size,
    first_given,
    unknown_argument,
)
from msdiffusion.request.subjects import Subjects

PictureHook = Callable[[list[Image.Image]], list[Image.Image]]
Item = TypeVar("Item")

PHRASES = "phrases"
"""Key in ``picture.info`` of what each subject of the picture was called."""
_ARGUMENTS = ("images", "boxes", "prompt", "phrases", *RequestArguments.__annotations__, "progress", "batch_size")
# Arguments of the diffusers pipeline that a request sets by its own names.
_SET_BY_REQUEST = {
    *("self", "kwargs", "prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale"),
    *("num_images_per_prompt", "generator", "latents", "output_type", "return_dict"),
}


class Model(EncodingModel, Protocol):
    """What drawing needs of MSDiffusion."""

    picture_hooks: list[PictureHook]


@dataclass(frozen=True)
class GenerationResult:
    """What came of one request."""

    pictures: list[Image.Image] | np.ndarray | Tensor
    """As the request's ``output_type`` says."""
    seeds: tuple[int, ...]
    """Of each picture, also where the request left the choice open."""
    phrases: tuple[str, ...]
    """What each subject is called, also where that was read from the prompt. PIL pictures have it in ``info`` too."""
    layout_maps: Tensor | None
    """(pictures, subjects, rows, columns) float32 in [0, 1] on the CPU: where the text's attention saw each phrase.
    None without auto layout."""


@dataclass(frozen=True)
class _Picture:
    """One picture to draw: its request, its number among the request's, its seed."""

    request: int
    number: int
    seed: int


class BatchDrawing:
    """Requests cut into batches for the denoiser, and the drawing of them."""

    def __init__(
        self, model: Model, pipeline: Any, requests: Sequence[GenerationRequest], batch_size: int, progress: bool
    ) -> None:
        """Check the requests against the model, whose ``with_own_scheduler`` the pipeline is.

        Raises:
            RequestError: no requests, an option that the pipeline does not take, latents of a wrong shape, hooks for
                pictures that are not asked for as such.
        """
        if not requests:
            raise RequestError("no requests: there is nothing to draw")
        self.model, self.pipeline, self.requests = model, pipeline, requests
        self.progress = progress
        for request in requests:
            self._check(request)
        warn_beyond_training(
            model,
            [request.subjects for request in requests],
            [request.prompt for request in requests],
            [self._size(request) for request in requests],
        )
        self.pictures = [
            _Picture(index, number, seed + number)
            for index, request in enumerate(requests)
            for seed in [secrets.randbelow(2**31) if request.seed is None else request.seed]
            for number in range(request.num_images)
        ]
        self.batches = grouped(self.pictures, lambda picture: self._key(picture.request), batch_size)
        for batch in self.batches:
            check_size(*self._size(requests[batch[0].request]), len(batch))

    def _check(self, request: GenerationRequest) -> None:
        pipeline = self.pipeline
        known = set(inspect.signature(type(pipeline).__call__).parameters) - _SET_BY_REQUEST
        for name in request.pipeline_options:
            if name not in known:
                hint = unknown_argument(name, known | set(_ARGUMENTS))
                other = "" if name in _SET_BY_REQUEST else f", and neither does {type(pipeline).__name__}"
                raise RequestError(f"generate takes no {name!r}{other}{hint and '; '}{hint}")
        if self.model.picture_hooks and request.output_type != "pil":
            raise RequestError(
                f'picture_hooks take PIL pictures, but output_type is {request.output_type!r}: use "pil", or no hooks'
            )
        layers = pipeline.text_encoder.config.num_hidden_layers
        check_options(pipeline, request.pipeline_options, layers if self.model.backbone.kind == "sd1" else layers - 1)
        check_steps(pipeline.scheduler, self._settings(request)["num_inference_steps"])
        height, width = self._size(request)
        for hook in self.model.picture_hooks:
            if hasattr(hook, "check_size"):
                hook.check_size(width, height)
        if request.latents is not None:
            factor = self.model.backbone.latent_factor
            # An inpainting UNet takes more channels than there are latents.
            channels = self.model.backbone.vae.config.latent_channels
            needed = (request.num_images, channels, height // factor, width // factor)
            if not isinstance(request.latents, Tensor) or tuple(request.latents.shape) != needed:
                kind, shape = type(request.latents).__name__, tuple(request.latents.shape)
                raise RequestError(f"latents must be a tensor of {needed} for these pictures, got {kind} of {shape}")
            if not torch.isfinite(request.latents).all():
                raise RequestError("latents hold values that are no numbers (NaN or infinite)")
        if any(window != (0.0, 1.0) for window in request.subjects.windows):
            check_windows(pipeline.scheduler)
        calls = self._settings(request)["num_inference_steps"] * getattr(pipeline.scheduler, "order", 1)
        check_auto_layout_start(request.subjects, calls)
        tokenizer, options = self.model.backbone.tokenizer, request.pipeline_options
        texts = {"prompt": request.prompt, "negative_prompt": self._negative_prompt(request)}
        for name, text in {**texts, **{name: options.get(name) for name in ("prompt_2", "negative_prompt_2")}}.items():
            rest = beyond_limit(tokenizer, written_out(pipeline, text)) if isinstance(text, str) else ""
            if rest:
                warn_caller(
                    f"the {name} is longer than the {tokenizer.model_max_length} tokens that the text encoder reads; "
                    f"ignored: {shown(rest, 120)}"
                )

    def _size(self, request: GenerationRequest) -> tuple[int, int]:
        """Height and width in pixels."""
        backbone, defaults = self.model.backbone, self.model.adapter.config.defaults
        native = backbone.unet.config.sample_size
        sides = native if isinstance(native, (list, tuple)) and len(native) == 2 else (native, native)
        rows, columns = (side * backbone.latent_factor if isinstance(side, (int, float)) else None for side in sides)
        height = first_given(request.height, defaults.get("height"), rows)
        width = first_given(request.width, defaults.get("width"), columns)
        if height is None or width is None:
            raise RequestError(
                f"the UNet's config does not say how large pictures are (sample_size {shown(native)}): give height= "
                "and width="
            )
        return int(height), int(width)

    def _settings(self, request: GenerationRequest) -> dict[str, Any]:
        """What all pictures of a batch must have in common, by the pipeline's names."""
        drawing = self.model.adapter.config.drawing(steps=request.steps, guidance_scale=request.guidance_scale)
        height, width = self._size(request)
        return {
            "height": height,
            "width": width,
            "num_inference_steps": drawing["steps"],
            "guidance_scale": drawing["guidance_scale"],
            "output_type": request.output_type,
        }

    def _key(self, index: int) -> Hashable:
        """Requests with equal keys may share a batch."""
        request = self.requests[index]
        automatic = any(request.subjects.auto_layout)
        alone = index if request.pipeline_options else None
        # A batch with auto layout gathers maps for all of its pictures, which costs time: not together with others.
        layout = request.subjects.auto_layout_threshold if automatic else None
        plain = self._negative_prompt(request) is None  # the pipeline takes None for all or for nobody
        return (*self._settings(request).values(), request.latents is None, plain, layout, alone)

    def _negative_prompt(self, request: GenerationRequest) -> str | None:
        """None where nobody gave one: then the pipeline does what its base model was made for."""
        default = self.model.adapter.config.defaults.get("negative_prompt")
        return default if request.negative_prompt is None else request.negative_prompt

    def draw(self, on_result: Callable[[int, GenerationResult], None] | None = None) -> list[GenerationResult]:
        """Draw everything; see MSDiffusion.generate_batch."""
        subjects = [request.subjects for request in self.requests]
        prompts = [request.prompt for request in self.requests]
        encoded = SubjectBatch(self.model, self.pipeline.scheduler, subjects, prompts)
        parts: list[dict[int, tuple[Any, Tensor | None]]] = [{} for _ in self.requests]
        results: dict[int, GenerationResult] = {}
        done = 0
        for batch in self.batches:
            drawn, maps = self._draw_batch(batch, encoded, done)
            done += len(batch)
            for row, picture in enumerate(batch):
                index = picture.request
                parts[index][picture.number] = (drawn[row], None if maps is None else self._maps_of(index, maps[row]))
                if len(parts[index]) == self.requests[index].num_images:
                    results[index] = self._result(index, parts[index])
                    parts[index] = {}
                    if on_result is not None:
                        on_result(index, results[index])
        return [results[index] for index in range(len(self.requests))]

    def _draw_batch(self, batch: Sequence[_Picture], encoded: SubjectBatch, done: int) -> tuple[Any, Tensor | None]:
        """Pictures of one batch, and layout maps (P, S, rows, columns) if there are any."""
        request = self.requests[batch[0].request]
        scales = [self.model.adapter.config.drawing(scale=each.scale)["scale"] for each in self.requests]
        # How large the batch is, is known here; and pictures of one seed have equal latents.
        condition = encoded.condition([picture.request for picture in batch], scales, batch_is_sure=True)
        pipeline, options, settings = self.pipeline, request.pipeline_options, self._settings(request)
        # As numbers, so that NaN is seen: in a picture it is black. Pasting into another picture needs pictures.
        if settings["output_type"] in ("pil", "np") and options.get("padding_mask_crop") is None:
            settings["output_type"] = "pt"
        arguments = {
            **self._texts(batch),
            **settings,
            "generator": [torch.Generator("cpu").manual_seed(picture.seed) for picture in batch],
            "latents": self._latents(batch),
        }
        told = f"pictures {done + 1}-{done + len(batch)} of {len(self.pictures)}"
        bar = {"disable": not self.progress, "desc": told}
        output = call_pipeline(pipeline, arguments, options, condition, partial(self._check_numbers, part="UNet"), bar)
        drawn = output.images
        if isinstance(drawn, Tensor):
            self._check_numbers(drawn, "UNet" if request.output_type == "latent" else "VAE")
            if request.output_type in ("pil", "np"):
                drawn = pipeline.image_processor.pt_to_numpy(drawn)
            if request.output_type == "pil":
                drawn = pipeline.image_processor.numpy_to_pil(drawn)
        self._tell_flags(getattr(output, "nsfw_content_detected", None), drawn)
        for hook in self.model.picture_hooks:
            drawn = hook(drawn)
            if len(drawn) != len(batch):
                raise RequestError(f"a picture hook returned {len(drawn)} pictures for {len(batch)}")
        if condition.auto_layout is None:
            return drawn, None
        factor = self.model.backbone.latent_factor
        height, width = self._size(request)
        maps = condition.layout_maps(height // factor, width // factor).cpu()
        return drawn, maps.expand(len(batch), -1, -1, -1)

    def _check_numbers(self, values: Tensor, part: str) -> None:
        """Raise WeightsError where a run gave NaN: names the first network with broken weights, else ``part``."""
        if torch.isfinite(values).all():
            return
        pipeline = self.pipeline
        networks = {
            "text encoder": pipeline.text_encoder,
            "second text encoder": getattr(pipeline, "text_encoder_2", None),
            "adapter": self.model.adapter,
            "UNet": pipeline.unet,
            "VAE": pipeline.vae,
        }
        for name, network in networks.items():
            if network is not None:
                check_weights(name, network)
        check_numbers(values, part, networks[part])

    def _tell_flags(self, flags: Sequence[bool] | None, drawn: Any) -> None:
        """Where a pipeline in memory has a safety checker of its own, say what it turned black."""
        for number, flagged in enumerate(flags or ()):
            if flagged:
                warn_caller(f"the pipeline's own safety checker flagged picture {number}: it is black")
                if isinstance(drawn[number], Image.Image):
                    drawn[number].info[FLAGGED] = True

    def _texts(self, batch: Sequence[_Picture]) -> dict[str, Any]:
        """Prompts as the pipeline takes them: one for all pictures of a request, else one per picture."""
        requests = [self.requests[picture.request] for picture in batch]
        negatives = [self._negative_prompt(request) for request in requests]
        if len({picture.request for picture in batch}) > 1:
            negative = None if negatives[0] is None else negatives
            return {"prompt": [request.prompt for request in requests], "negative_prompt": negative}
        given = requests[0].pipeline_options
        return {
            "prompt": requests[0].prompt if given.get("prompt_embeds") is None else None,
            "negative_prompt": negatives[0] if given.get("negative_prompt_embeds") is None else None,
            "num_images_per_prompt": len(batch),
        }

    def _latents(self, batch: Sequence[_Picture]) -> Tensor | None:
        rows = [self.requests[picture.request].latents for picture in batch]
        if rows[0] is None:
            return None
        chosen = torch.stack([latents[picture.number] for latents, picture in zip(rows, batch, strict=True)])
        return chosen.to(self.model.backbone.dtype)

    def _maps_of(self, index: int, maps: Tensor) -> Tensor:
        """(subjects, rows, columns): the maps of each subject's first view, without padding."""
        return maps[self.requests[index].subjects.first_views]

    def _result(self, index: int, parts: dict[int, tuple[Any, Tensor | None]]) -> GenerationResult:
        pictures, maps = zip(*(parts[number] for number in range(len(parts))), strict=True)
        output_type = self.requests[index].output_type
        if output_type == "np":
            joined: Any = np.stack(pictures)
        else:
            joined = list(pictures) if output_type == "pil" else torch.stack(pictures)
        seeds = tuple(picture.seed for picture in self.pictures if picture.request == index)
        phrases = self.requests[index].subjects.names
        if output_type == "pil":
            for picture in joined:
                picture.info[PHRASES] = phrases
        return GenerationResult(joined, seeds, phrases, None if maps[0] is None else torch.stack(maps))


def grouped(items: Iterable[Item], kind: Callable[[Item], Hashable], size: int) -> list[list[Item]]:
    """The items in batches of at most ``size``, each of one kind, in their order."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]


def warn_beyond_training(
    model: EncodingModel,
    subjects: Sequence[Subjects],
    prompts: Sequence[str | None],
    sizes: Sequence[tuple[int, int]] = (),
) -> None:
    """Warn once of each kind of request that the adapter's config says it was never trained for, and of references that
    are too small to be made out.

    Args:
        model: whose adapter that is; a config that tells nothing warns of nothing.
        subjects: per picture.
        prompts: per picture.
        sizes: per picture height and width in pixels, where they are known.
    """
    seen = model.backbone.image_encoder.config.image_size
    for layout in subjects:
        small = [image.size for image in layout.images if image.width * image.height < (seen / 8) ** 2]
        if small:
            warn_caller(
                f"a reference of {small[0][0]} x {small[0][1]} pixels (width x height) shows next to nothing of its "
                f"subject: the image encoder looks at {seen} x {seen}; give a larger picture"
            )
            break
    config = model.adapter.config
    side, most = config.largest_side, config.most_subjects
    for height, width in sizes:
        if side is not None and not side**2 / 4 <= height * width <= side**2 * 2:
            what = "the same things many times" if height * width > side**2 else "things that cannot be made out"
            warn_caller(
                f"these weights were trained on pictures of {side} x {side} pixels; at {width} x {height} (width x "
                f"height) they draw {what}: draw near {side} x {side}"
            )
            break
    count = max(len(layout.names) for layout in subjects)
    if most is not None and count > most:
        warn_caller(
            f"these weights were trained on pictures of {most} subjects at most; of {count} some are drawn as "
            "something else, or not at all"
        )
    if config.closed_vocabulary:
        tokenizer = model.backbone.tokenizer
        texts = (text for layout, prompt in zip(subjects, prompts, strict=True) for text in (*layout.names, prompt))
        words = dict.fromkeys(word for text in texts for word in re.findall(r"[^\W\d_]+", (text or "").lower()))
        unknown = [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) > 1]
        if unknown:
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            warn_caller(
                f"these weights know few words, and these are none of them: {', '.join(map(repr, unknown[:5]))}{more}; "
                "something else is drawn in their place"
            )
