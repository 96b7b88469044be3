"""Arguments of the diffusers pipeline that ``generate`` hands on: checked before the pipeline fails midway at them.

What the pipeline itself refuses with a traceback, or takes without a word for something else, is told here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from PIL import Image
from torch import Tensor

from msdiffusion.errors import RequestError, shown
from msdiffusion.request.layout import as_number
from msdiffusion.request.request import MAX_SIDE
from msdiffusion.request.subjects import MAX_STEPS, MAX_WEIGHT, as_sequence, check_text, number_between, whole_number

_LEAST = 1e-6
"""Of a share that diffusers takes for "not given" where it is 0."""
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "guidance_rescale": (0.0, 1.0),
    "eta": (0.0, 1.0),
    "strength": (0.0, 1.0),
    "denoising_start": (0.0, 1.0),
    "denoising_end": (_LEAST, 1.0),
    "pag_scale": (0.0, MAX_WEIGHT),
    "pag_adaptive_scale": (0.0, MAX_WEIGHT),
    "aesthetic_score": (0.0, 100.0),
    "negative_aesthetic_score": (0.0, 100.0),
}
"""Least and most."""
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("original_size", "target_size", "negative_original_size", "negative_target_size"), 1),
    **dict.fromkeys(("crops_coords_top_left", "negative_crops_coords_top_left"), 0),
}
"""Pairs of whole numbers, and the least of them."""


def check_options(pipeline: Any, options: Mapping[str, Any], most_skipped: int) -> None:
    """Refuse what the pipeline would fail at midway, or take for something else.

    Args:
        pipeline: of diffusers; its scheduler is looked at too.
        options: arguments of its call, of names that it knows; None counts as left out.
        most_skipped: layers of the text encoder that ``clip_skip`` may leave out.

    Raises:
        RequestError: the scheduler is not made for drawing, or an option cannot be honoured.
    """
    _check_scheduler(pipeline)
    for name, value in options.items():
        if value is None:
            continue
        if name.endswith("prompt_embeds"):
            _check_embeddings(name, value)
        elif name in ("prompt_2", "negative_prompt_2"):
            check_text(value[0] if isinstance(value, list) and len(value) == 1 else value, name)
        elif name in _NUMBERS:
            number_between(value, name, *_NUMBERS[name])
        elif name in _SIZES:
            _check_pair(name, value, _SIZES[name])
        elif name in ("callback_on_step_end", "callback") and not callable(value):
            raise RequestError(f"{name} must be a function of (pipeline, step, timestep, tensors), got {shown(value)}")
        elif name in ("timesteps", "sigmas"):
            _check_schedule(name, value, pipeline.scheduler)
    _check_given_to_callback(pipeline, options.get("callback_on_step_end_tensor_inputs"))
    attention = options.get("cross_attention_kwargs")
    if attention is not None and (not isinstance(attention, Mapping) or "subjects" in attention):
        raise RequestError(
            "cross_attention_kwargs must be a mapping of names to values, without subjects, which generate itself "
            f"hands on, got {shown(attention)}"
        )
    adapted = getattr(pipeline.unet, "encoder_hid_proj", None) is not None
    if not adapted and any(options.get(name) is not None for name in ("ip_adapter_image", "ip_adapter_image_embeds")):
        raise RequestError(
            "ip_adapter_image is for an IP-Adapter, and none is loaded: model.pipeline.load_ip_adapter(...) first"
        )
    for kind in ("", "negative_"):
        pooled = f"{kind}pooled_prompt_embeds"
        known = inspect.signature(type(pipeline).__call__).parameters
        if pooled in known and options.get(f"{kind}prompt_embeds") is not None and options.get(pooled) is None:
            raise RequestError(f"{kind}prompt_embeds needs {pooled} beside it: encode_prompt gives both")
    if isinstance(pipeline, PAGMixin) and options.get("pag_scale", 3.0) != 0:  # its own default
        raise RequestError(
            "PAG gives the UNet batches of three parts: say pag_scale=0, or call the pipeline with "
            "model.condition(...) and rows"
        )
    if options.get("clip_skip") is not None:
        whole_number(options["clip_skip"], "clip_skip", 0, most_skipped)
    _check_start(options.get("image"))


def _check_scheduler(pipeline: Any) -> None:
    scheduler = pipeline.scheduler
    step = inspect.signature(scheduler.step).parameters.values()
    needed = [each for each in step if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    if (
        not hasattr(scheduler, "init_noise_sigma")
        or not hasattr(scheduler, "order")
        or "Inverse" in type(scheduler).__name__
        or len(needed) > 3  # output, timestep, sample
    ):
        raise RequestError(
            f"{type(scheduler).__name__} is not made for drawing with this pipeline: take another scheduler, for "
            "instance DDIMScheduler.from_config(model.pipeline.scheduler.config)"
        )


def check_steps(scheduler: Any, steps: int) -> None:
    """Raise RequestError for more steps than the scheduler has timesteps, at which several fail."""
    most = scheduler.config.get("num_train_timesteps")
    if isinstance(most, int) and steps > most:
        raise RequestError(f"steps must be at most {most}, the timesteps of {type(scheduler).__name__}, got {steps}")


def _check_embeddings(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and not torch.isfinite(value).all():
        raise RequestError(f"{name} holds values that are no numbers (NaN or infinite)")
    if not (isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RequestError(f"{name} must be of one prompt, with 1 as first size, got {shape}")


def _check_pair(name: str, value: Any, least: int) -> None:
    try:
        numbers = as_sequence(value, name, 1)
    except RequestError:
        numbers = ()
    if len(numbers) != 2:
        raise RequestError(f"{name} must be two whole numbers, of rows and of columns, got {shown(value)}")
    for number in numbers:
        whole_number(number, f"{name} {shown(value)}: each", least, MAX_SIDE)


def _check_schedule(name: str, value: Any, scheduler: Any) -> None:
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise RequestError(
            f"{type(scheduler).__name__} takes no {name}: take another scheduler, for instance EulerDiscreteScheduler"
            ".from_config(model.pipeline.scheduler.config), or say steps="
        )
    most = scheduler.config.num_train_timesteps - 1 if name == "timesteps" else math.inf
    need = f"{name} must be 1 to {MAX_STEPS} numbers from high to low, at least 0" + f" and at most {most}" * (
        name == "timesteps"
    )
    try:
        numbers = [as_number(number) for number in as_sequence(value, name, 1)]
    except ValueError:  # RequestError is one
        raise RequestError(f"{need}, got {shown(value)}") from None
    falling = all(first >= second for first, second in pairwise(numbers))
    if not 0 < len(numbers) <= MAX_STEPS or not falling or not all(0 <= each <= most for each in numbers):
        raise RequestError(f"{need}, got {shown(value)}")


def _check_given_to_callback(pipeline: Any, names: Any) -> None:
    known = list(getattr(pipeline, "_callback_tensor_inputs", ()))
    if names is not None and not (isinstance(names, (list, tuple)) and all(name in known for name in names)):
        raise RequestError(
            f"callback_on_step_end_tensor_inputs must be a list of {', '.join(known)}; got {shown(names)}"
        )


def _check_start(start: Any) -> None:
    """The picture that img2img and inpainting begin with."""
    for image in start if isinstance(start, (list, tuple)) else [start]:
        if isinstance(image, (str, Path)):
            raise RequestError(f"image must be a picture, got the path {shown(str(image))}: open it with PIL")
        found = image.mode if isinstance(image, Image.Image) else None
        if isinstance(image, np.ndarray) and image.ndim in (3, 4) and image.shape[-1] in (2, 4):
            found = f"an array of {image.shape[-1]} channels"
        if found is not None and found != "RGB":
            raise RequestError(
                f"image is {found}, but the pipeline wants RGB (it takes four channels for latents): image.convert"
                '("RGB"), or paste a cut-out on a background'
            )
