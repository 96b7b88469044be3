"""What programs that show a sample ask of its json, field by field: a dataset may come from anybody."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.pairs_format import MOST_CAPTION, MOST_PHRASE, MOST_SUBJECTS, fault_of_text, is_size


def _is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def is_count(value: Any) -> bool:
    """Whether a value is a whole number, 0 or more, that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def is_seconds(value: Any) -> bool:
    """Whether a value is a time: a finite number of seconds, 0 or more."""
    return _is_number(value, 0, 1e12)


def _is_box(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4 or not all(_is_number(edge, 0, 1) for edge in value):
        return False
    return value[0] < value[2] and value[1] < value[3]


def _is_short(value: Any) -> bool:
    return not fault_of_text(value, MOST_CAPTION)


# What the programs that show a sample ask of its json: name, whether it may be missing, and whether a value fits.
Fields = tuple[tuple[str, bool, Callable[[Any], bool]], ...]


SUBJECT_FIELDS: Fields = (
    ("phrase", False, lambda value: not fault_of_text(value, MOST_PHRASE)),
    ("mention", False, _is_short),
    ("kind", True, _is_short),
    ("target_box", False, _is_box),
    ("reference_box", False, _is_box),
    ("area", False, lambda value: _is_number(value, 0, 1)),
    ("detection_score", False, lambda value: _is_number(value, 0, 1)),
    ("match_similarity", True, lambda value: value is None or _is_number(value, -1.001, 1.001)),
    ("attributes", True, lambda value: isinstance(value, dict)),
    ("target_mask_rle", True, lambda value: isinstance(value, dict)),
)


SOURCE_FIELDS: Fields = (
    ("video", False, _is_short),
    ("sha256", False, _is_short),
    ("pair", True, is_count),
    ("boxes", True, _is_short),
    ("masks", True, _is_short),
)


MINED_FIELDS: Fields = (
    ("frame_reference", False, is_count),
    ("frame_target", False, is_count),
    ("t_reference", False, is_seconds),
    ("t_target", False, is_seconds),
    ("shot", False, lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_seconds, value))),
)


IMPORTED_FIELDS: Fields = (
    ("importer", False, _is_short),
    ("references", True, lambda value: isinstance(value, list) and all(map(_is_reference, value))),
)


def _is_reference(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_short(value.get("picture")):
        return False
    size = value.get("size")
    return isinstance(size, list) and len(size) == 2 and is_size(*size)


def _fault_of(values: Mapping[str, Any], fields: Fields) -> str:
    for name, may_miss, fits in fields:
        if name not in values and may_miss:
            continue
        if name not in values:
            return f"without {name}"
        if not fits(values[name]):
            text = repr(values[name])
            return f"{name} is {text if len(text) <= 80 else f'{text[:80]}...'}"
    return ""


def fault_of_sample(metadata: Mapping[str, Any]) -> str:
    """What is wrong with the json of a sample in which all fields are there that every sample has; "" for nothing."""
    if fault := fault_of_text(metadata["caption"], MOST_CAPTION):
        return f"the caption {fault}"
    if not is_size(metadata["width"], metadata["height"]):
        return f"no picture has {metadata['width']!r} x {metadata['height']!r} pixels"
    subjects, source = metadata["subjects"], metadata["source"]
    if not 0 < len(subjects) <= MOST_SUBJECTS:
        return f"{len(subjects):,} subjects, needed are 1 to {MOST_SUBJECTS}"
    for number, subject in enumerate(subjects):
        if fault := "no object" if not isinstance(subject, dict) else _fault_of(subject, SUBJECT_FIELDS):
            return f"subject {number}: {fault}"
    if not isinstance(source, dict):
        return "source is no object"
    if fault := _fault_of(source, (*SOURCE_FIELDS, *(IMPORTED_FIELDS if "importer" in source else MINED_FIELDS))):
        return f"source: {fault}"
    return "" if isinstance(metadata.get("pipeline", {}), dict) else "pipeline is no object"
