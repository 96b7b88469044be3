"""The subjects of a picture: references, names, boxes or masks, weights; checked without torch."""

from __future__ import annotations

import logging
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from PIL import Image

from msdiffusion.errors import LayoutError, PhraseError, RequestError, shown, warn_caller
from msdiffusion.request.layout import Box, as_number, check_box, is_truth
from msdiffusion.request.phrases import find_in_prompt, find_phrases, occurs
from msdiffusion.request.pictures import Room, open_reference, open_upright

AUTO_LAYOUT_START, FREE_LAYOUT_START = 5, 2
"""First step, counted from 1, that follows the text's attention: for subjects with a box (official), and without."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
MAX_SUBJECTS = 256
"""Of one picture, all views counted."""
MAX_REFERENCE_PIXELS = 240_000_000
"""Of all references of a picture together: ten photographs of 24 megapixels, 1 GB in memory."""
MAX_MASK_PIXELS = 2**26
"""Of all masks of a picture together: 64 of 1024 x 1024."""
MAX_STEPS = 1000
"""Timesteps of the noise schedule that every base model was trained on."""
MAX_WEIGHT = 1000.0
"""Of scales and guidance: far beyond it networks give values that are no numbers."""
MAX_TEXT = 10_000
"""Characters of a prompt or a phrase; the text encoders read some 75 words."""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """Checked subjects of one picture. One entry per reference: several views of a subject are several entries."""

    images: tuple[Image.Image, ...]
    """RGB or RGBA."""
    phrases: tuple[str, ...]
    boxes: tuple[Box | None, ...]
    """Normalised xyxy; None: the subject is free, and finds its place by auto layout."""
    masks: tuple[np.ndarray | None, ...]
    """(rows, columns) bool over the whole picture, any resolution, in place of the box as region."""
    scales: tuple[float, ...]
    windows: tuple[tuple[float, float], ...]
    """Part of the way from noise (0) to picture (1) in which the subject is there: [start, end)."""
    occurrences: tuple[int, ...]
    """Which occurrence of its phrase in the prompt each subject is, from 0."""
    auto_layout: tuple[bool, ...]
    """Whether the text's attention replaces the subject's region, from ``auto_layout_starts`` on."""
    auto_layout_starts: tuple[int, ...]
    auto_layout_threshold: float
    numbers: tuple[int, ...]
    """Which subject each entry is a view of, from 0."""

    @property
    def first_views(self) -> list[int]:
        """Per subject the index of its first entry."""
        return [self.numbers.index(number) for number in range(max(self.numbers) + 1)]

    @property
    def names(self) -> tuple[str, ...]:
        """One phrase per subject."""
        return tuple(self.phrases[view] for view in self.first_views)


class SubjectArguments(TypedDict, total=False):
    """What a call may say of its subjects beside references, boxes, phrases and prompt; lists have an item for each."""

    masks: Sequence[Any] | None
    """A bool array (rows, columns), a picture in black and white, its path, or None."""
    subject_scales: Sequence[float] | None
    """A weight."""
    subject_windows: Sequence[Sequence[float] | None] | None
    """(start, end) in [0, 1], or None: always."""
    auto_layout: bool
    """Every subject's region follows the text's attention; free subjects' always does."""
    auto_layout_threshold: float
    """In [0, 1]."""
    auto_layout_start: int | None
    """Counted from 1; None: 5, and 2 for free subjects."""


SUBJECT_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(SubjectArguments.__annotations__),
    "auto_layout": False,
    "auto_layout_threshold": 0.5,
}


def check_subjects(
    images: Sequence[Any],
    boxes: Sequence[Sequence[float] | None] | None,
    phrases: Sequence[str] | None,
    *,
    prompt: str | None = None,
    **arguments: Unpack[SubjectArguments],
) -> Subjects:
    """Check what belongs to the subjects, one of each per subject; see MSDiffusion.condition.

    Args:
        images: per subject a picture, the path of one, or a list of such: several views of the same subject.
        boxes: per subject normalised xyxy, or None: free. None for all: no layout.
        phrases: per subject its name; None: the prompt's noun phrases.
        prompt: needed where phrases are left out or a subject's place comes from the text.
        arguments: those left out are SUBJECT_DEFAULTS.

    Raises:
        RequestError, LayoutError, PhraseError: as for check_request.
        TypeError: an argument of another name.
    """
    unknown = next((name for name in arguments if name not in SUBJECT_DEFAULTS), None)
    if unknown is not None:
        raise TypeError(f"MSDiffusion.condition() got an unexpected keyword argument {unknown!r}")
    given = {**SUBJECT_DEFAULTS, **arguments}
    images = as_sequence(images, "images")
    count = len(images)
    if count == 0:
        raise RequestError("no images: give at least one reference image per subject")
    pictures = sum(len(image) if isinstance(image, (list, tuple)) else 1 for image in images)
    if max(count, pictures) > MAX_SUBJECTS:
        raise RequestError(
            f"{max(count, pictures)} references: a picture can have {MAX_SUBJECTS} at most, all views counted; leave "
            "some out"
        )
    if prompt is not None:
        check_text(prompt, "the prompt")
    layout: tuple[Any, ...] = (None,) * count if boxes is None else _boxes(boxes)
    named = None if phrases is None else as_sequence(phrases, "phrases", 1)
    _check_counts(count, None if boxes is None else len(layout), None if named is None else len(named))
    room = Room("references", MAX_REFERENCE_PIXELS)
    views = [_views(image, f"images[{index}]", room) for index, image in enumerate(images)]
    check_mask = partial(_check_mask, room=Room("masks", MAX_MASK_PIXELS))
    regions = _per_subject(given["masks"], "masks", count, "mask, or None,", 3, None, check_mask, LayoutError)
    layout = tuple(
        _mask_box(mask) if box is None and mask is not None else box for box, mask in zip(layout, regions, strict=True)
    )
    for index, box in enumerate(layout):
        if box is not None and regions[index] is None and (box[0] == box[2] or box[1] == box[3]):
            warn_caller(f"boxes[{index}] has no area, so that subject is left out")
    check_scale = partial(number_between, least=0.0, most=MAX_WEIGHT)
    scales = _per_subject(given["subject_scales"], "subject_scales", count, "number", 1, 1.0, check_scale)
    windows = _per_subject(
        given["subject_windows"], "subject_windows", count, "(start, end), or None,", 2, (0.0, 1.0), _check_window
    )
    auto_layout = true_or_false(given["auto_layout"], "auto_layout")
    threshold = number_between(given["auto_layout_threshold"], "auto_layout_threshold", 0.0, 1.0)
    start = given["auto_layout_start"]
    if start is not None:
        # samplers of second order count twice a step
        start = whole_number(start, "auto_layout_start", 1, 2 * MAX_STEPS)
    texts = _check_phrases(named, prompt, count)
    occurrences = _occurrences(texts, layout)
    missing = [] if prompt is None else [text for text in dict.fromkeys(texts) if not occurs(prompt, text)]
    if missing and not auto_layout and all(box is not None for box in layout):
        warn_caller(
            f"the prompt does not hold {', '.join(map(shown, missing))}, so the base model is not told of it: name "
            "every subject in the prompt as in phrases"
        )
    free = [box is None for box in layout]
    automatic = [auto_layout or is_free for is_free in free]
    for index in range(count):
        if automatic[index]:
            if prompt is None:
                why = "auto_layout" if auto_layout else f"subject {index} has no box, so its place"
                raise RequestError(f"{why} follows the text's attention to the phrases: give the prompt")
            find_in_prompt(prompt, texts[index], occurrences[index])
    starts = [start or (FREE_LAYOUT_START if is_free else AUTO_LAYOUT_START) for is_free in free]

    def spread(values: Sequence[Any]) -> tuple[Any, ...]:
        """One per view."""
        return tuple(value for value, subject in zip(values, views, strict=True) for _ in subject)

    return Subjects(
        images=tuple(view for subject in views for view in subject),
        phrases=spread(texts),
        boxes=spread(layout),
        masks=spread(regions),
        scales=spread(scales),
        windows=spread(windows),
        occurrences=spread(occurrences),
        auto_layout=spread(automatic),
        auto_layout_starts=spread(starts),
        auto_layout_threshold=threshold,
        numbers=spread(range(count)),
    )


def as_sequence(values: Any, name: str, axes: int | None = None) -> tuple[Any, ...]:
    """The values as a tuple; an array or a tensor counts if it has so many axes."""
    if axes is not None and getattr(values, "ndim", None) == axes:
        values = values.tolist()
    if isinstance(values, (str, bytes, Path, Image.Image)) or not isinstance(values, Sequence):
        raise RequestError(f"{name} must be a list with one item per subject, got {type(values).__name__}")
    return tuple(values)


def _boxes(boxes: Any) -> tuple[Box | None, ...]:
    """Boxes as tuples of numbers, None kept; a box without area is let through here."""
    if isinstance(boxes, (str, bytes)) or not isinstance(boxes, Iterable):
        raise LayoutError(f"boxes must be a list of boxes (x1, y1, x2, y2), or None for no layout, got {boxes!r}")
    boxes = list(boxes)
    if boxes and all(isinstance(value, (int, float)) for value in boxes):
        raise LayoutError(
            f"boxes must be a list of boxes, one for each image, got {boxes!r}: [{boxes!r}] is a list of one"
        )
    return tuple(None if box is None else check_box(box, f"boxes[{i}]", empty=True) for i, box in enumerate(boxes))


def _check_counts(images: int, boxes: int | None, phrases: int | None) -> None:
    counts = {"images": images, "boxes": boxes, "phrases": phrases}
    counts = {name: count for name, count in counts.items() if count is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise RequestError(f"each subject needs one of each, but there are {listed}")


def _views(image: Any, name: str, room: Room) -> tuple[Image.Image, ...]:
    """A reference, or the several views of a subject, opened."""
    if isinstance(image, (list, tuple)):
        if not image:
            raise RequestError(f"{name} is an empty list: a subject needs at least one view")
        return tuple(open_reference(view, f"{name}[{index}]", room) for index, view in enumerate(image))
    return (open_reference(image, name, room),)


def _per_subject(
    values: Any,
    name: str,
    count: int,
    what: str,
    axes: int,
    default: Any,
    check: Callable[[Any, str], Any],
    kind: type[RequestError | LayoutError] = RequestError,
) -> tuple[Any, ...]:
    """A checked value for each subject, the default for all where there are none; ``axes`` of an array of them."""
    if values is None:
        return (default,) * count
    values = as_sequence(values, name, axes)
    if len(values) != count:
        raise kind(f"{name} must hold one {what} per subject ({count}), got {len(values)}")
    return tuple(check(value, f"{name}[{index}]") for index, value in enumerate(values))


def _check_mask(mask: Any, name: str, room: Room) -> np.ndarray | None:
    if mask is None:
        return None
    need = "a mask is a bool array (rows, columns), or a picture that is black and white"
    if isinstance(mask, (str, Path, Image.Image)):
        picture = open_upright(mask, name, room)
        if picture.has_transparency_data:
            raise LayoutError(f"{name} has transparency, so it is not clear what is inside: {need}")
        values = np.asarray(picture.convert("RGB"))
        if not ((values == 0) | (values == 255)).all() or (values != values[..., :1]).any():
            raise LayoutError(f"{name} has other colours than black and white: {need}")
        array = values[..., 0] == 255
    else:
        try:
            array = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask)  # a tensor may be on a GPU
        except (RuntimeError, TypeError) as error:
            raise LayoutError(f"{name} cannot be read ({shown(str(error), 200)}): {need}") from None
        if array.ndim != 2 or array.dtype != bool:
            raise LayoutError(f"{name} is {array.dtype} of shape {array.shape}: {need}")
        room.take(array.shape[::-1], name)
    if not array.any():
        raise LayoutError(f"{name} is empty: no pixel belongs to the subject; to leave it out, give it scale 0")
    return array


def _mask_box(mask: np.ndarray) -> Box:
    """The smallest box round a mask, in fractions of the picture."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    height, width = mask.shape
    return (
        float(columns[0] / width),
        float(rows[0] / height),
        float((columns[-1] + 1) / width),
        float((rows[-1] + 1) / height),
    )


def _check_window(window: Any, name: str) -> tuple[float, float]:
    if window is None:
        return 0.0, 1.0
    need = "must be (start, end) with 0 <= start < end <= 1"
    if getattr(window, "ndim", None) == 1:
        window = window.tolist()
    if isinstance(window, (str, bytes)) or not isinstance(window, Sequence) or len(window) != 2:
        raise RequestError(f"{name} {need}, got {shown(window)}")
    start, end = (number_between(value, name, 0.0, 1.0) for value in window)
    if start >= end:
        raise RequestError(f"{name} {need}, got {window!r}")
    return start, end


def _check_phrases(phrases: tuple[Any, ...] | None, prompt: str | None, count: int) -> tuple[str, ...]:
    if phrases is None:
        if prompt is None:
            raise RequestError("give one phrase per subject, or the prompt to read them from")
        found = tuple(find_phrases(prompt, count))
        logging.getLogger(__name__).info("phrases taken from the prompt: %s", ", ".join(map(repr, found)))
        return found
    for index, phrase in enumerate(phrases):
        if not isinstance(phrase, str) or not phrase.strip():
            raise PhraseError(f"phrases[{index}] is {shown(phrase)}: name each subject, for example 'dog'")
        try:
            check_text(phrase, f"phrases[{index}]")
        except RequestError as error:
            raise PhraseError(str(error)) from None
    return phrases


def _occurrences(phrases: Sequence[str], boxes: Sequence[Box | None]) -> tuple[int, ...]:
    """The n-th use of a phrase means its n-th occurrence; several views of one subject share phrase and box."""
    numbers: dict[tuple[str, Box | None], int] = {}
    used: Counter[str] = Counter()
    found = []
    for phrase, box in zip(phrases, boxes, strict=True):
        key = " ".join(phrase.lower().split())
        if (key, box) not in numbers or box is None:  # two free subjects of one name are two things
            numbers[key, box] = used[key]
            used[key] += 1
        found.append(numbers[key, box])
    return tuple(found)


def check_text(text: Any, name: str) -> str:
    """The text, if it is one that tokenizers can read; else RequestError."""
    if not isinstance(text, str):
        raise RequestError(f"{name} must be text, got {shown(text)}")
    if len(text) > MAX_TEXT:
        raise RequestError(f"{name} has {len(text)} characters; {MAX_TEXT} are read at most")
    half = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if half is not None:
        raise RequestError(f"{name} holds {half!r}, half of a character (a lone surrogate): {shown(text)}")
    return text


def whole_number(value: Any, name: str, least: int, most: int | None = None) -> int:
    """The value as an int, if it is a whole number in [least, most], of any library; else RequestError."""
    try:
        number = None if is_truth(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise RequestError(f"{name} must be a whole number of at least {least}, got {shown(value)}")
    if most is not None and number > most:
        raise RequestError(f"{name} must be at most {most}, got {shown(value)}")
    return number


def true_or_false(value: Any, name: str) -> bool:
    """The value as a bool, if it is True or False, of any library; else RequestError: "no" would count as true."""
    if not is_truth(value) or getattr(value, "ndim", 0):
        raise RequestError(f"{name} must be true or false, got {shown(value)}")
    return bool(value)


def number_between(value: Any, name: str, least: float, most: float) -> float:
    """The value as a float, if it is a finite number in [least, most]; else RequestError."""
    try:
        number = as_number(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not least <= number <= most:
        raise RequestError(f"{name} must be a number in [{least:g}, {most:g}], got {shown(value)}")
    return number
