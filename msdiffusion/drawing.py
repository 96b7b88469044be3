"""Drawing many requests at once: who shares a batch of the denoiser, and one condition for all of its pictures.

Shapes: P pictures of a batch, S subjects (of the picture with the most; the others are padded with empty boxes), T
tokens per subject, C cross-attention width.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import secrets
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from msdiffusion.condition import AutoLayout, SubjectCondition
from msdiffusion.errors import RequestError
from msdiffusion.phrases import beyond_limit, token_span
from msdiffusion.request import FALLBACKS, GenerationRequest
from msdiffusion.subjects import WHOLE, Subjects

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from msdiffusion.adapter import MSAdapter
    from msdiffusion.backbone import Backbone

PictureHook = Callable[[list[Image.Image]], list[Image.Image]]

# Arguments of the diffusers pipeline that a request sets by its own names.
_SET_BY_REQUEST = {
    *("self", "kwargs", "prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale"),
    *("num_images_per_prompt", "generator", "latents", "output_type", "return_dict"),
}


class Model(Protocol):
    """What drawing needs of MSDiffusion."""

    backbone: Backbone
    adapter: MSAdapter
    picture_hooks: list[PictureHook]

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline."""
        ...

    def install(self) -> None:
        """Put the attention processors in place."""
        ...

    def at_work(self) -> AbstractContextManager[torch.device]:
        """The device to compute on, with image encoder and adapter there for a while."""
        ...

    def scale_of(self, scale: float | None) -> float:
        """The weight of all subjects, the adapter's own for None."""
        ...

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """The public call, whose arguments' names a hint may suggest."""
        ...


@dataclass(frozen=True)
class GenerationResult:
    """What came of one request."""

    pictures: list[Image.Image] | np.ndarray | Tensor
    """As the request's ``output_type`` says."""
    seeds: tuple[int, ...]
    """Of each picture, also where the request left the choice open."""
    layout_maps: Tensor | None
    """(pictures, subjects, rows, columns) float32 in [0, 1] on the CPU: where the text's attention saw each phrase.
    None without auto layout."""


class SubjectBatch:
    """The subjects of several pictures, encoded once, and conditions for any choice of them."""

    @torch.no_grad()
    def __init__(self, model: Model, layouts: Sequence[Subjects], prompts: Sequence[str | None]) -> None:
        """Encode references, phrases and boxes of all pictures together.

        Args:
            model: whose encoders, resampler and projections these are.
            layouts: checked subjects per picture.
            prompts: per picture; needed where a layout has auto layout.

        Raises:
            PhraseError: a phrase cannot be found among the prompt's tokens.
        """
        if not model.adapter.is_installed(model.backbone.unet):
            model.install()
        self.model, self.layouts = model, layouts
        tokenizer, written = model.backbone.tokenizer, functools.partial(_written_out, model.pipeline)
        self._spans = [
            [
                token_span(tokenizer, written(prompt or ""), written(phrase), occurrence) if automatic else (0, 0)
                for phrase, occurrence, automatic in zip(
                    layout.phrases, layout.occurrences, layout.auto_layout, strict=True
                )
            ]
            for layout, prompt in zip(layouts, prompts, strict=True)
        ]
        counts = [len(layout.images) for layout in layouts]
        boxes = [WHOLE if box is None else box for layout in layouts for box in layout.boxes]
        with model.at_work() as device:
            all_boxes = torch.tensor([boxes], dtype=torch.float32, device=device)
            tokens = self._tokens(all_boxes, device)  # (1, all subjects, T, C)
        self._tokens_of = tokens[0].split(counts)
        self._boxes_of = all_boxes[0].split(counts)

    def _tokens(self, boxes: Tensor, device: torch.device) -> Tensor:
        backbone, adapter = self.model.backbone, self.model.adapter
        config, dtype = adapter.config, adapter.dtype
        images = [image for layout in self.layouts for image in layout.images]
        phrases = [_written_out(self.model.pipeline, phrase) for layout in self.layouts for phrase in layout.phrases]
        free = torch.tensor([[box is None for layout in self.layouts for box in layout.boxes]], device=device)
        pixels = backbone.prepare_references(images, config.reference_background, config.reference_fit)
        image_tokens = backbone.encode_references(pixels, config.reference_features).unsqueeze(0).to(device, dtype)
        phrase_embeddings = backbone.encode_phrases(phrases).unsqueeze(0).to(device, dtype)
        return adapter.resampler(image_tokens, phrase_embeddings, boxes, free)

    @torch.no_grad()
    def condition(
        self, pictures: Sequence[int], scales: Sequence[float], *, guidance: bool | None = None
    ) -> SubjectCondition:
        """One condition for a batch of pictures.

        Args:
            pictures: per picture of the batch the index of its layout.
            scales: per layout the weight of all its subjects.
            guidance: see SubjectCondition.
        """
        different = sorted(set(pictures))
        rows = different if len(different) == 1 else list(pictures)  # one layout serves any number of pictures
        layouts = [self.layouts[row] for row in rows]
        S = max(len(layout.images) for layout in layouts)
        device = self._boxes_of[0].device

        def padded(values: Sequence[Tensor]) -> Tensor:
            """Stack tensors whose first axis is the subjects; missing ones are zero."""
            return torch.stack(
                [functional.pad(value, (0, 0) * (value.ndim - 1) + (0, S - len(value))) for value in values]
            )

        def table(name: str, dtype: torch.dtype) -> Tensor:
            return padded([torch.tensor(getattr(layout, name), dtype=dtype) for layout in layouts]).to(device)

        automatic = table("auto_layout", torch.bool)
        auto_layout = None
        if any(flag for layout in layouts for flag in layout.auto_layout):
            thresholds = {layout.auto_layout_threshold for layout in layouts if any(layout.auto_layout)}
            auto_layout = AutoLayout(
                padded([torch.tensor(self._spans[row]) for row in rows]).to(device),
                thresholds.pop(),
                table("auto_layout_starts", torch.long),
                automatic,
            )
        windows = None
        if any(window != (0.0, 1.0) for layout in layouts for window in layout.windows):
            windows = table("windows", torch.float32)
        adapter = self.model.adapter
        chosen = [float(scales[row]) for row in rows]
        with self.model.at_work():
            return adapter.condition(
                padded([self._tokens_of[row] for row in rows]),
                padded([self._boxes_of[row] for row in rows]),
                scale=chosen[0] if len(chosen) == 1 else chosen,
                subject_scales=table("scales", torch.float32),
                masks=_stack_masks(layouts, S, device),
                windows=windows,
                train_timesteps=self.model.pipeline.scheduler.config.num_train_timesteps,
                auto_layout=auto_layout,
                num_images=len(pictures),
                guidance=guidance,
            )


def _written_out(pipeline: Any, text: str) -> str:
    """The text as the pipeline tokenizes it: a textual inversion of several vectors is as many words."""
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    return text if convert is None else convert(text, pipeline.tokenizer)


def _stack_masks(layouts: Sequence[Subjects], S: int, device: torch.device) -> Tensor | None:
    """(P, S, rows, columns) bool regions if any subject has a mask; empty for those that have a box."""
    masks = [mask for layout in layouts for mask in layout.masks if mask is not None]
    if not masks:
        return None
    rows, columns = (max(mask.shape[axis] for mask in masks) for axis in (0, 1))  # as fine as the finest
    stacked = torch.zeros(len(layouts), S, rows, columns, dtype=torch.bool)
    for picture, layout in enumerate(layouts):
        for subject, mask in enumerate(layout.masks):
            if mask is not None:
                whole = torch.from_numpy(mask)[None, None].float()
                stacked[picture, subject] = functional.interpolate(whole, (rows, columns), mode="nearest-exact") > 0
    return stacked.to(device)


@dataclass(frozen=True)
class _Picture:
    """One picture to draw: its request, its number among the request's, its seed."""

    request: int
    number: int
    seed: int


class BatchDrawing:
    """Requests cut into batches for the denoiser, and the drawing of them."""

    def __init__(self, model: Model, requests: Sequence[GenerationRequest], batch_size: int, progress: bool) -> None:
        """Check the requests against the model.

        Raises:
            RequestError: no requests, an option that the pipeline does not take, latents of a wrong shape, hooks for
                pictures that are not asked for as such.
        """
        if not requests:
            raise RequestError("no requests: there is nothing to draw")
        self.model, self.requests, self.batch_size, self.progress = model, requests, batch_size, progress
        for request in requests:
            self._check(request)
        self.pictures = [
            _Picture(index, number, seed + number)
            for index, request in enumerate(requests)
            for seed in [secrets.randbelow(2**31) if request.seed is None else request.seed]
            for number in range(request.num_images)
        ]

    def _check(self, request: GenerationRequest) -> None:
        pipeline = self.model.pipeline
        known = set(inspect.signature(type(pipeline).__call__).parameters) - _SET_BY_REQUEST
        for name in request.pipeline_options:
            if name not in known:
                ours = set(inspect.signature(type(self.model).generate).parameters) - {"self", "pipeline_options"}
                near = difflib.get_close_matches(name, sorted(known | ours), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise RequestError(f"generate takes no {name!r}, and neither does {type(pipeline).__name__}{hint}")
        if self.model.picture_hooks and request.output_type != "pil":
            raise RequestError(
                f'picture_hooks take PIL pictures, but output_type is {request.output_type!r}: use "pil", or no hooks'
            )
        if request.latents is not None:
            height, width = self._size(request)
            factor = self.model.backbone.latent_factor
            channels = self.model.backbone.unet.config.in_channels
            needed = (request.num_images, channels, height // factor, width // factor)
            if tuple(request.latents.shape) != needed:
                raise RequestError(f"latents must be {needed} for these pictures, got {tuple(request.latents.shape)}")
        for name, text in (("prompt", request.prompt), ("negative_prompt", request.negative_prompt or "")):
            tokenizer = self.model.backbone.tokenizer
            rest = beyond_limit(tokenizer, _written_out(pipeline, text))
            if rest:
                warnings.warn(
                    f"the {name} is longer than the {tokenizer.model_max_length} tokens that the text encoder reads; "
                    f"ignored: {rest!r}",
                    stacklevel=6,
                )

    def _size(self, request: GenerationRequest) -> tuple[int, int]:
        """Height and width in pixels."""
        backbone, defaults = self.model.backbone, self.model.adapter.config.defaults
        side = backbone.unet.config.sample_size * backbone.latent_factor
        return first_given(request.height, defaults.get("height"), side), first_given(
            request.width, defaults.get("width"), side
        )

    def _settings(self, request: GenerationRequest) -> dict[str, Any]:
        """What all pictures of a batch must have in common, by the pipeline's names."""
        defaults = self.model.adapter.config.defaults
        height, width = self._size(request)
        return {
            "height": height,
            "width": width,
            "num_inference_steps": first_given(request.steps, defaults.get("steps"), FALLBACKS["steps"]),
            "guidance_scale": float(
                first_given(request.guidance_scale, defaults.get("guidance_scale"), FALLBACKS["guidance_scale"])
            ),
            "output_type": request.output_type,
        }

    def _key(self, index: int) -> Hashable:
        """Requests with equal keys may share a batch."""
        request = self.requests[index]
        automatic = any(request.subjects.auto_layout)
        alone = index if request.pipeline_options else None
        # A batch with auto layout gathers maps for all of its pictures, which costs time: not together with others.
        layout = request.subjects.auto_layout_threshold if automatic else None
        return (*self._settings(request).values(), request.latents is None, layout, alone)

    def batches(self) -> list[list[_Picture]]:
        """All pictures, those that may share a batch together, at most ``batch_size`` at once."""
        groups: dict[Hashable, list[_Picture]] = {}
        for picture in self.pictures:
            groups.setdefault(self._key(picture.request), []).append(picture)
        size = self.batch_size
        return [group[first : first + size] for group in groups.values() for first in range(0, len(group), size)]

    def draw(self, on_result: Callable[[int, GenerationResult], None] | None = None) -> list[GenerationResult]:
        """Draw everything; see MSDiffusion.generate_batch."""
        subjects = [request.subjects for request in self.requests]
        encoded = SubjectBatch(self.model, subjects, [request.prompt for request in self.requests])
        parts: list[dict[int, tuple[Any, Tensor | None]]] = [{} for _ in self.requests]
        results: dict[int, GenerationResult] = {}
        done = 0
        for batch in self.batches():
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
        scales = [self.model.scale_of(each.scale) for each in self.requests]
        condition = encoded.condition([picture.request for picture in batch], scales)
        pipeline = self.model.pipeline
        pipeline.set_progress_bar_config(
            disable=not self.progress, desc=f"pictures {done + 1}-{done + len(batch)} of {len(self.pictures)}"
        )
        options = dict(request.pipeline_options)
        kwargs = {**(options.pop("cross_attention_kwargs", None) or {}), "subjects": condition}
        try:
            output = pipeline(
                **self._texts(batch),
                **self._settings(request),
                generator=[torch.Generator("cpu").manual_seed(picture.seed) for picture in batch],
                latents=self._latents(batch),
                cross_attention_kwargs=kwargs,
                **options,
            )
        finally:
            pipeline._cross_attention_kwargs = None  # the pipeline would keep the condition alive
        drawn = output.images
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

    def _texts(self, batch: Sequence[_Picture]) -> dict[str, Any]:
        """Prompts as the pipeline takes them: one for all pictures of a request, else one per picture."""
        default = self.model.adapter.config.defaults.get("negative_prompt")
        requests = [self.requests[picture.request] for picture in batch]
        negatives = [
            first_given(request.negative_prompt, default, FALLBACKS["negative_prompt"]) for request in requests
        ]
        if len({picture.request for picture in batch}) > 1:
            return {"prompt": [request.prompt for request in requests], "negative_prompt": negatives}
        given = requests[0].pipeline_options
        return {
            "prompt": None if "prompt_embeds" in given else requests[0].prompt,
            "negative_prompt": None if "negative_prompt_embeds" in given else negatives[0],
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
        numbers = self.requests[index].subjects.numbers
        return maps[[numbers.index(number) for number in range(max(numbers) + 1)]]

    def _result(self, index: int, parts: dict[int, tuple[Any, Tensor | None]]) -> GenerationResult:
        pictures, maps = zip(*(parts[number] for number in range(len(parts))), strict=True)
        output_type = self.requests[index].output_type
        if output_type == "np":
            joined: Any = np.stack(pictures)
        else:
            joined = list(pictures) if output_type == "pil" else torch.stack(pictures)
        seeds = tuple(picture.seed for picture in self.pictures if picture.request == index)
        return GenerationResult(joined, seeds, None if maps[0] is None else torch.stack(maps))


def first_given(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)
