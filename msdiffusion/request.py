"""What is asked of MSDiffusion.generate, checked once, before the first tensor and without torch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msdiffusion.errors import RequestError
from msdiffusion.subjects import Subjects, check_subjects, number_between, whole_number

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEED = 2**63 - 1
"""Largest seed of a torch generator."""
FALLBACKS: Mapping[str, Any] = {"steps": 30, "guidance_scale": 7.5, "scale": 1.0, "negative_prompt": ""}
"""For what neither a request nor the adapter's config says."""
SIZE_STEP = 8
"""Pixels that height and width must be a multiple of, as in every Stable Diffusion pipeline."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Checked arguments of one call; None means "the adapter's default"."""

    subjects: Subjects
    prompt: str
    negative_prompt: str | None
    num_images: int
    steps: int | None
    guidance_scale: float | None
    scale: float | None
    height: int | None
    width: int | None
    seed: int | None
    output_type: OutputType
    latents: Any
    """None or a tensor (num_images, channels, rows, columns) of unit noise; only its type is unknown here."""
    pipeline_options: Mapping[str, Any]
    """Further arguments of the diffusers pipeline."""


def check_request(
    images: Sequence[Any],
    boxes: Sequence[Sequence[float] | None] | None,
    prompt: str,
    phrases: Sequence[str] | None = None,
    *,
    masks: Sequence[Any] | None = None,
    negative_prompt: str | None = None,
    num_images: int = 1,
    steps: int | None = None,
    guidance_scale: float | None = None,
    scale: float | None = None,
    subject_scales: Sequence[float] | None = None,
    subject_windows: Sequence[Sequence[float] | None] | None = None,
    height: int | None = None,
    width: int | None = None,
    auto_layout: bool = False,
    auto_layout_threshold: float = 0.5,
    auto_layout_start: int | None = None,
    seed: int | None = None,
    output_type: OutputType = "pil",
    latents: Any = None,
    **pipeline_options: Any,
) -> GenerationRequest:
    """Check the arguments of MSDiffusion.generate, which documents them, and open the images.

    Raises:
        RequestError: counts differ, a file is missing, a number is out of range, ...
        LayoutError: a box or a mask cannot be one.
        PhraseError: phrases cannot be found.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"the prompt is empty ({prompt!r}): say what the picture shows, naming each subject")
    whole_number(num_images, "num_images", 1)
    if steps is not None:
        whole_number(steps, "steps", 1)
    if seed is not None:
        whole_number(seed, "seed", 0)
        if seed + num_images > MAX_SEED:
            raise RequestError(f"seed + num_images must be at most {MAX_SEED}, got {seed} + {num_images}")
    for name, value in (("guidance_scale", guidance_scale), ("scale", scale)):
        if value is not None:
            number_between(value, name, 0.0, math.inf)
    for name, size in (("height", height), ("width", width)):
        if size is not None:
            whole_number(size, name, SIZE_STEP)
            if size % SIZE_STEP:
                near = max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)
                raise RequestError(f"{name} is {size}, but must be a multiple of {SIZE_STEP}: for example {near}")
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise RequestError(f"negative_prompt must be text, got {negative_prompt!r}")
    if latents is not None and (getattr(latents, "ndim", None) != 4 or latents.shape[0] != num_images):
        shape = tuple(latents.shape) if hasattr(latents, "shape") else type(latents).__name__
        raise RequestError(
            f"latents must be ({num_images}, channels, rows, columns) for {num_images} pictures: {shape}"
        )
    subjects = check_subjects(
        images,
        boxes,
        phrases,
        prompt=prompt,
        masks=masks,
        subject_scales=subject_scales,
        subject_windows=subject_windows,
        auto_layout=auto_layout,
        auto_layout_threshold=auto_layout_threshold,
        auto_layout_start=auto_layout_start,
    )
    first = min(
        (s for s, auto in zip(subjects.auto_layout_starts, subjects.auto_layout, strict=True) if auto), default=1
    )
    if steps is not None and first > steps:
        if None in subjects.boxes:
            raise RequestError(
                f"a subject without a box needs auto layout, which starts at step {first}, but there are {steps} steps"
            )
        warnings.warn(
            f"auto_layout has no effect: it starts at step {first}, but there are {steps} steps", stacklevel=3
        )
    return GenerationRequest(
        subjects=subjects,
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_images=num_images,
        steps=steps,
        guidance_scale=guidance_scale,
        scale=scale,
        height=height,
        width=width,
        seed=seed,
        output_type=output_type,
        latents=latents,
        pipeline_options=pipeline_options,
    )
