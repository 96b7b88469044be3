"""Masks for boxes: from the annotations that came with the video, or from Segment Anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from data_pipeline.models.annotations import read_mask
from data_pipeline.records import ClipError, Detection, Frame


class Segmenter(Protocol):
    """Gives every detection of a frame its mask."""

    def segment(self, requests: Sequence[tuple[Frame, tuple[Detection, ...]]]) -> list[tuple[Detection, ...]]:
        """The same detections in the same order, with masks; a mask may be empty."""
        ...


class AnnotationSegmenter:
    """Reads the masks that belong to annotated boxes."""

    def segment(self, requests: Sequence[tuple[Frame, tuple[Detection, ...]]]) -> list[tuple[Detection, ...]]:
        """ClipError if an annotated object has a box only."""
        return [self._one(frame, detections) for frame, detections in requests]

    def _one(self, frame: Frame, detections: tuple[Detection, ...]) -> tuple[Detection, ...]:
        height, width = frame.image.shape[:2]
        found = []
        for detection in detections:
            mask = read_mask(detection.annotated, width, height) if detection.annotated else None
            if mask is None:
                raise ClipError("annotation without a mask", phrase=detection.entity.phrase, frame=frame.index)
            found.append(replace(detection, mask=mask))
        return tuple(found)
