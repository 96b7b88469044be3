"""What is asked of MSDiffusion.generate, checked once, before the first tensor and without torch."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from msdiffusion.errors import PhraseError, RequestError
from msdiffusion.layout import Box, check_boxes
from msdiffusion.phrases import find_in_prompt, find_phrases

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEED = 2**63 - 1
"""Largest seed of a torch generator."""
SIZE_STEP = 8
"""Pixels that height and width must be a multiple of, as in every Stable Diffusion pipeline."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Checked arguments of one call; None means "the adapter's default"."""

    images: tuple[Image.Image, ...]
    """RGB or RGBA."""
    boxes: tuple[Box, ...]
    prompt: str
    phrases: tuple[str, ...]
    occurrences: tuple[int, ...]
    """Which occurrence of its phrase in the prompt each subject is, from 0."""
    negative_prompt: str | None
    num_images: int
    steps: int | None
    guidance_scale: float | None
    scale: float | None
    subject_scales: tuple[float, ...] | None
    height: int | None
    width: int | None
    auto_layout: bool
    auto_layout_threshold: float
    auto_layout_start: int
    seed: int | None
    output_type: OutputType
    batch_size: int


def check_request(
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
    batch_size: int = 4,
) -> GenerationRequest:
    """Check the arguments of MSDiffusion.generate, which documents them, and open the images.

    Raises:
        RequestError: counts differ, a file is missing, a number is out of range, ...
        LayoutError: a box cannot be a box.
        PhraseError: phrases cannot be found.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"the prompt is empty ({prompt!r}): say what the picture shows, naming each subject")
    images = _sequence(images, "images")
    checked_boxes = check_boxes(boxes)
    named = None if phrases is None else _sequence(phrases, "phrases")
    _check_counts(len(images), len(checked_boxes), None if named is None else len(named))
    _whole(num_images, "num_images", 1)
    _whole(batch_size, "batch_size", 1)
    _whole(auto_layout_start, "auto_layout_start", 1)
    _number(auto_layout_threshold, "auto_layout_threshold", 0.0, 1.0)
    if steps is not None:
        _whole(steps, "steps", 1)
    if seed is not None:
        _whole(seed, "seed", 0)
        if seed + num_images > MAX_SEED:
            raise RequestError(f"seed + num_images must be at most {MAX_SEED}, got {seed} + {num_images}")
    for name, value in (("guidance_scale", guidance_scale), ("scale", scale)):
        if value is not None:
            _number(value, name, 0.0, math.inf)
    for name, size in (("height", height), ("width", width)):
        if size is not None:
            _whole(size, name, SIZE_STEP)
            if size % SIZE_STEP:
                near = max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)
                raise RequestError(f"{name} is {size}, but must be a multiple of {SIZE_STEP}: for example {near}")
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise RequestError(f"negative_prompt must be text, got {negative_prompt!r}")
    scales = _check_scales(subject_scales, len(images))
    opened = tuple(open_reference(image, f"images[{index}]") for index, image in enumerate(images))
    texts = _check_phrases(named, prompt, len(images))
    occurrences = _occurrences(texts, checked_boxes)
    if auto_layout:
        for phrase, occurrence in zip(texts, occurrences, strict=True):
            find_in_prompt(prompt, phrase, occurrence)
        if steps is not None and auto_layout_start > steps:
            warnings.warn(
                f"auto_layout has no effect: it starts at step {auto_layout_start}, but there are {steps} steps",
                stacklevel=3,
            )
    return GenerationRequest(
        images=opened,
        boxes=tuple(checked_boxes),
        prompt=prompt,
        phrases=texts,
        occurrences=occurrences,
        negative_prompt=negative_prompt,
        num_images=num_images,
        steps=steps,
        guidance_scale=guidance_scale,
        scale=scale,
        subject_scales=scales,
        height=height,
        width=width,
        auto_layout=auto_layout,
        auto_layout_threshold=auto_layout_threshold,
        auto_layout_start=auto_layout_start,
        seed=seed,
        output_type=output_type,
        batch_size=batch_size,
    )


def open_reference(image: Image.Image | str | Path, name: str = "image") -> Image.Image:
    """The picture as RGB, or as RGBA where it has transparency, turned as its EXIF orientation says.

    Raises:
        RequestError: no such file, or not a picture.
    """
    if isinstance(image, (str, Path)):
        path = Path(image)
        if not path.is_file():
            raise RequestError(f"{name}: no such file: {path}")
        try:
            with Image.open(path) as file:
                file.load()
                image = ImageOps.exif_transpose(file)
        except (UnidentifiedImageError, OSError) as error:
            raise RequestError(f"{name}: {path} is not a picture that can be read: {error}") from None
    if not isinstance(image, Image.Image):
        raise RequestError(f"{name} must be a PIL image or the path of one, got {type(image).__name__}")
    if 0 in image.size:
        raise RequestError(f"{name} has no pixels: its size is {image.size}")
    image = ImageOps.exif_transpose(image)  # cameras store what they see and note how they were held
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _sequence(values: Any, name: str) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes, Path, Image.Image)) or not isinstance(values, Sequence):
        raise RequestError(f"{name} must be a list with one item per subject, got {type(values).__name__}")
    return tuple(values)


def _check_counts(images: int, boxes: int, phrases: int | None) -> None:
    counts = {"images": images, "boxes": boxes} | ({} if phrases is None else {"phrases": phrases})
    if images == 0:
        raise RequestError("no images: give at least one reference image, with one box each")
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise RequestError(f"each subject needs one of each, but there are {listed}")


def _check_scales(subject_scales: Sequence[float] | None, count: int) -> tuple[float, ...] | None:
    if subject_scales is None:
        return None
    scales = _sequence(subject_scales, "subject_scales")
    if len(scales) != count:
        raise RequestError(f"subject_scales must hold one number per image ({count}), got {len(scales)}")
    return tuple(_number(value, f"subject_scales[{index}]", 0.0, math.inf) for index, value in enumerate(scales))


def _check_phrases(phrases: tuple[Any, ...] | None, prompt: str, count: int) -> tuple[str, ...]:
    if phrases is None:
        return tuple(find_phrases(prompt, count))
    for index, phrase in enumerate(phrases):
        if not isinstance(phrase, str) or not phrase.strip():
            raise PhraseError(f"phrases[{index}] is {phrase!r}: name each subject, for example 'dog'")
    return phrases


def _occurrences(phrases: Sequence[str], boxes: Sequence[Box]) -> tuple[int, ...]:
    """The n-th use of a phrase means its n-th occurrence; several views of one subject share phrase and box."""
    numbers: dict[tuple[str, Box], int] = {}
    used: Counter[str] = Counter()
    for phrase, box in zip(phrases, boxes, strict=True):
        key = " ".join(phrase.lower().split())
        if (key, box) not in numbers:
            numbers[key, box] = used[key]
            used[key] += 1
    return tuple(numbers[" ".join(p.lower().split()), box] for p, box in zip(phrases, boxes, strict=True))


def _whole(value: Any, name: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def _number(value: Any, name: str, least: float, most: float) -> float:
    span = f"in [{least:g}, {most:g}]" if math.isfinite(most) else f"of at least {least:g}"
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise RequestError(f"{name} must be a number {span}, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or not least <= number <= most:
        raise RequestError(f"{name} must be a number {span}, got {value!r}")
    return number
