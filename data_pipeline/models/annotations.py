"""Boxes and masks that come with the videos: a sidecar file per clip, or one file for a whole corpus.

Sidecar: ``clip.annotations.json``, schema "data_pipeline.annotations/1"; its object numbers are tracks: the same
number in two frames is the same object. Corpus: a json with ``videos: {name: {file, width, height, annotations:
[{frame, objects, mask_png}]}}``; its object numbers only number the objects inside one frame (and index the mask
picture), so they say nothing about identity. Both formats are specified in docs/data_format.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.records import AnnotatedObject, Annotations, Box, ClipError, InputError, decode_mask

SCHEMA = "data_pipeline.annotations/1"
BAD = "unreadable annotations"


def sidecar_path(video: Path) -> Path:
    """``clip.mp4`` -> ``clip.annotations.json``."""
    return video.with_name(f"{video.stem}.annotations.json")


def _pixel_box(values: Any, width: int, height: int, where: str) -> Box:
    try:
        x1, y1, x2, y2 = (float(value) for value in values)
        if not all(map(math.isfinite, (x1, y1, x2, y2))):  # json knows NaN, which min and max would turn into an edge
            raise ValueError("not finite")
    except (TypeError, ValueError) as error:
        raise ClipError(BAD, error=f"{where}: a box needs four numbers, got {values!r}") from error
    # Hand-drawn and tracked boxes reach over the frame by a pixel or so; only what is inside can be seen.
    box = (max(0.0, x1) / width, max(0.0, y1) / height, min(width, x2) / width, min(height, y2) / height)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ClipError(BAD, error=f"{where}: the box {[x1, y1, x2, y2]} has no area inside {width} x {height}")
    return box


def read_sidecar(path: Path, width: int, height: int, num_frames: int) -> Annotations:
    """Annotations of one clip of the given size; ClipError if the file disagrees with the video or with its schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ClipError("unknown annotations schema", found=content["schema"], known=SCHEMA)
        _check_size(content, width, height)
        objects = {entry["id"]: entry for entry in content["objects"]}
        frames = {}
        for frame in content["frames"]:
            index = _check_index(frame["index"], num_frames)
            frames[index] = tuple(
                AnnotatedObject(
                    object_id=found["id"],
                    name=objects[found["id"]]["name"],
                    attributes=objects[found["id"]].get("attributes", {}),
                    box=_pixel_box(found["box"], width, height, f"frame {index}, object {found['id']}"),
                    mask_rle=found.get("mask_rle"),
                )
                for found in frame["objects"]
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ClipError(BAD, error=f"{type(error).__name__}: {error}") from error
    return Annotations(frames=frames)


def _check_size(content: Mapping[str, Any], width: int, height: int) -> None:
    if (content["width"], content["height"]) != (width, height):
        raise ClipError(
            "annotations of another size", annotated=[content["width"], content["height"]], video=[width, height]
        )


def _check_index(index: Any, num_frames: int) -> int:
    if not isinstance(index, int) or not 0 <= index < num_frames:
        raise ClipError("annotations of a frame that is not in the video", frame=index, frames=num_frames)
    return index


class AnnotationSource:
    """Finds the annotations of each video: in the corpus file if one is given and knows the video, else in the
    sidecar.
    """

    def __init__(self, corpus: Path | None) -> None:
        self._folder = corpus.parent if corpus else None
        self._videos = _read_corpus(corpus) if corpus else {}

    def read(self, video: Path, name: str, width: int, height: int, num_frames: int) -> Annotations | None:
        """Annotations of the video called ``name``; None if there are none; ClipError if they are unusable."""
        entry = self._videos.get(name)
        if entry is not None:
            return self._from_corpus(entry, width, height, num_frames)
        sidecar = sidecar_path(video)
        return read_sidecar(sidecar, width, height, num_frames) if sidecar.is_file() else None

    def _from_corpus(self, entry: Mapping[str, Any], width: int, height: int, num_frames: int) -> Annotations:
        try:
            _check_size(entry, width, height)
            frames = {}
            for frame in entry["annotations"]:
                index = _check_index(frame["frame"], num_frames)
                picture = self._folder / frame["mask_png"] if frame.get("mask_png") else None
                frames[index] = tuple(
                    AnnotatedObject(
                        object_id=None,
                        name=found["name"],
                        attributes=found.get("attributes", {}),
                        box=_pixel_box(found["box_xyxy"], width, height, f"frame {index}, object {found['id']}"),
                        mask_file=(picture, int(found["id"])) if picture else None,
                    )
                    for found in frame["objects"]
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClipError(BAD, error=f"{type(error).__name__}: {error}") from error
        return Annotations(frames=frames)


def _read_corpus(path: Path) -> dict[str, Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {entry["file"]: entry for entry in content["videos"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        needed = 'a json with {"videos": {name: {"file", "width", "height", "annotations"}}}'
        raise InputError(
            f"cannot read annotations from {path}: {type(error).__name__}: {error}; needed is {needed}"
        ) from error


def read_mask(found: AnnotatedObject, width: int, height: int) -> np.ndarray | None:
    """The bool (height, width) mask of an annotated object, or None if it came with a box only."""
    if found.mask_rle is not None:
        mask = decode_mask(found.mask_rle)
    elif found.mask_file is not None:
        from PIL import Image, UnidentifiedImageError

        path, number = found.mask_file
        try:
            with Image.open(path) as picture:
                mask = np.asarray(picture) == number
        except (OSError, UnidentifiedImageError) as error:
            raise ClipError("unreadable mask in the annotations", file=path.name, error=type(error).__name__) from error
    else:
        return None
    if mask.shape != (height, width):
        raise ClipError("mask of another size", mask=list(mask.shape[::-1]), video=[width, height])
    return mask
