"""What is asked of MSDiffusion.generate, checked once, before the first tensor and without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from msdiffusion.errors import RequestError, shown, warn_caller
from msdiffusion.request.subjects import (
    MAX_STEPS,
    MAX_WEIGHT,
    SUBJECT_DEFAULTS,
    SubjectArguments,
    Subjects,
    check_subjects,
    check_text,
    number_between,
    whole_number,
)

MISSING: Any = object()
"""Stands for an argument that must be given, so that its lack is told after a wrong name of it."""
OTHER_NAMES: Mapping[str, str] = {
    other: ours
    for ours, others in {
        "images": "image reference references reference_images ref_images subject_images",
        "boxes": "box bbox bboxes bounding_boxes layout",
        "masks": "mask mask_image mask_images",
        "phrases": "phrase names",
        "prompt": "text prompts",
        "negative_prompt": "negative neg_prompt",
        "steps": "num_inference_steps num_steps sampling_steps",
        "num_images": "num_images_per_prompt num_samples n",
        "guidance_scale": "cfg cfg_scale guidance",
        "scale": "ip_adapter_scale weight",
        "subject_scales": "weights scales",
        "seed": "generator random_seed manual_seed",
    }.items()
    for other in others.split()
}
"""What other libraries call arguments of generate."""

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEED = 2**63 - 1
"""Largest seed of a torch generator."""
FALLBACKS: Mapping[str, Any] = {"steps": 30, "guidance_scale": 7.5, "scale": 1.0, "negative_prompt": None}
"""For what neither a request nor the adapter's config says."""
SETTINGS = ("steps", "guidance_scale", "scale", "height", "width", "negative_prompt")
"""Arguments that an adapter's config may give defaults for."""
SIZE_STEP = 8
"""Pixels that height and width must be a multiple of, as in every Stable Diffusion pipeline."""
MAX_SIDE = 8192
"""Pixels of height and width."""
MAX_PIXELS, MAX_BATCH_PIXELS = 2**24, 2**26
"""Of one picture (4096 x 4096), and of all that are drawn at once (64 of 1024 x 1024)."""
MAX_IMAGES = 1000
"""Of one request: all of them are kept in memory."""
MAX_BATCH = 256
"""Pictures drawn at once."""


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


class RequestArguments(SubjectArguments, total=False):
    """Arguments of MSDiffusion.generate beside images, boxes, prompt and phrases that say what is drawn."""

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


DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(RequestArguments.__annotations__),
    **SUBJECT_DEFAULTS,
    "num_images": 1,
    "output_type": "pil",
}
"""Of arguments that are left out, as the signature of MSDiffusion.generate has them."""


def check_request(
    images: Sequence[Any],
    boxes: Sequence[Sequence[float] | None] | None,
    prompt: str,
    phrases: Sequence[str] | None = None,
    **arguments: Unpack[RequestArguments],
) -> GenerationRequest:
    """Check the arguments of MSDiffusion.generate, which documents them, and open the images.

    Those of other names are options of the diffusers pipeline.

    Raises:
        RequestError: counts differ, a file is missing, a number is out of range, ...
        LayoutError: a box or a mask cannot be one.
        PhraseError: phrases cannot be found.
    """
    if isinstance(images, str) and isinstance(prompt, Sequence) and not isinstance(prompt, str):
        raise RequestError(
            f"images is the text {shown(images)}, and prompt {shown(prompt)}: the order is images, boxes, prompt"
        )
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        raise RequestError(
            f"prompt is one text, got {shown(prompt)}: for several prompts call generate_batch([...]) with a mapping "
            "of arguments for each"
        )
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"the prompt is empty ({shown(prompt)}): say what the picture shows, naming each subject")
    given = {**DEFAULTS, **arguments}
    num_images, seed = whole_number(given["num_images"], "num_images", 1, MAX_IMAGES), given["seed"]
    if seed is not None:
        seed = whole_number(seed, "seed", 0, MAX_SEED)
        if seed + num_images > MAX_SEED:
            raise RequestError(f"seed + num_images must be at most {MAX_SEED}, got {seed} + {shown(num_images)}")
    settings = check_settings({name: given[name] for name in SETTINGS})
    output_type, latents = given["output_type"], given["latents"]
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {shown(output_type)}")
    if latents is not None and (getattr(latents, "ndim", None) != 4 or latents.shape[0] != num_images):
        shape = tuple(latents.shape) if hasattr(latents, "shape") else type(latents).__name__
        raise RequestError(
            f"latents must be ({num_images}, channels, rows, columns) for {num_images} pictures: {shape}"
        )
    subjects = {name: given[name] for name in SUBJECT_DEFAULTS}
    return GenerationRequest(
        subjects=check_subjects(images, boxes, phrases, prompt=prompt, **subjects),
        prompt=prompt,
        num_images=num_images,
        seed=seed,
        output_type=output_type,
        latents=latents,
        pipeline_options={name: value for name, value in arguments.items() if name not in DEFAULTS},
        **settings,
    )


def check_given(arguments: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise RequestError for an argument that is left out, with the name under which it was perhaps given.

    Args:
        arguments: MISSING where they are.
        options: what else was given.
    """
    for name in (name for name, value in arguments.items() if value is MISSING):
        other = next((option for option in options if OTHER_NAMES.get(option) == name), None)
        none = "; boxes=None leaves every subject's place to the text" if name == "boxes" else ""
        given = f", and it takes no {other!r}: here it is {name}=" if other else none
        raise RequestError(f"generate needs {name}{given}")


def check_requests(requests: Sequence[GenerationRequest | Mapping[str, Any]]) -> list[GenerationRequest]:
    """The requests of generate_batch; in those that are mappings ``boxes`` may be left out.

    Raises:
        RequestError, LayoutError, PhraseError: as check_request; or one is no mapping, or says what is of the call.
    """
    if isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, Iterable):
        raise RequestError(
            f"requests must be a list with a mapping of generate's arguments for each request, got {shown(requests)}"
        )
    return [
        request if isinstance(request, GenerationRequest) else _request_of(request, index)
        for index, request in enumerate(requests)
    ]


def _request_of(arguments: Any, index: int) -> GenerationRequest:
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise RequestError(
            f"requests[{index}] must be a mapping of generate's arguments, such as {{'images': [...], 'prompt': ...}}, "
            f"got {shown(arguments)}"
        )
    wrong = sorted({"progress", "batch_size"} & arguments.keys())
    if wrong:
        raise RequestError(f"requests[{index}]: {' and '.join(wrong)} are of the whole call, not of one request")
    missing = sorted({"images", "prompt"} - arguments.keys())
    if missing:
        raise RequestError(f"requests[{index}] has no {' and no '.join(missing)}")
    return check_request(**{"boxes": None, **arguments})


def unknown_argument(name: str, known: Iterable[str]) -> str:
    """What to say of an argument of generate that there is not: the name that it has here, or a known one like it."""
    ours = OTHER_NAMES.get(name)
    if ours == "seed" and name == "generator":
        return "here it is seed=, a whole number; generator.initial_seed() is that of a torch.Generator"
    if ours is not None:
        return f"here it is {ours}="
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Any of SETTINGS as plain numbers and text, None as it is; RequestError where one cannot be that."""
    found = dict(settings)
    for name, value in settings.items():
        if value is None:
            continue
        if name == "steps":
            found[name] = whole_number(value, name, 1, MAX_STEPS)
        elif name in ("height", "width"):
            size = found[name] = whole_number(value, name, SIZE_STEP, MAX_SIDE)
            if size % SIZE_STEP:
                near = max(SIZE_STEP, round(size / SIZE_STEP) * SIZE_STEP)
                raise RequestError(f"{name} is {size}, but must be a multiple of {SIZE_STEP}: for example {near}")
        elif name == "negative_prompt":
            check_text(value, name)
        else:
            found[name] = number_between(value, name, 0.0, MAX_WEIGHT)
    if found.get("height") and found.get("width"):
        check_size(found["height"], found["width"])
    return found


def check_size(height: int, width: int, pictures: int = 1) -> None:
    """Raise RequestError where pictures that are drawn at once have too many pixels, before anything is allocated."""
    if height * width > MAX_PIXELS:
        raise RequestError(
            f"a picture of {width} x {height} (width x height) has {height * width:,} pixels; {MAX_PIXELS:,} are drawn "
            "at most: draw a smaller one, and enlarge it"
        )
    if pictures * height * width > MAX_BATCH_PIXELS:
        raise RequestError(
            f"{pictures} pictures of {width} x {height} (width x height) have {pictures * height * width:,} pixels; "
            f"{MAX_BATCH_PIXELS:,} are drawn at once at most: {MAX_BATCH_PIXELS // (height * width)} such pictures, "
            "which the batch size says"
        )


def check_auto_layout_start(subjects: Subjects, steps: int) -> None:
    """Say where auto layout would start too late to do anything in so many calls of the UNet.

    Raises:
        RequestError: a subject without a box would never get a place.
    """
    starts = zip(subjects.auto_layout_starts, subjects.auto_layout, subjects.boxes, strict=True)
    late = [(start, box is None) for start, automatic, box in starts if automatic and start > steps]
    for start, free in late:
        if free:
            raise RequestError(
                f"a subject without a box needs auto layout, which starts at step {start}, but there are {steps} steps"
            )
    if late:
        warn_caller(f"auto_layout has no effect: it starts at step {late[0][0]}, but there are {steps} steps")


def first_given(*values: Any) -> Any:
    """The first value that is not None, if any."""
    return next((value for value in values if value is not None), None)
