"""Masks for boxes: from the annotations that came with the video, or from Segment Anything."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from data_pipeline.errors import ClipError, ModelNeededError
from data_pipeline.models.annotations import read_mask
from data_pipeline.records import Detection, Frame


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


class FillingSegmenter:
    """Reads annotated masks, and asks a network about boxes without one. network: None if none seems needed."""

    def __init__(self, network: Segmenter | None) -> None:
        self._network = network

    def segment(self, requests: Sequence[tuple[Frame, tuple[Detection, ...]]]) -> list[tuple[Detection, ...]]:
        """See Segmenter. ClipError if an annotated mask is broken, ModelNeededError if the network is missing."""
        parts = [
            [(frame, tuple(one for one in found if has_mask(one) is annotated)) for frame, found in requests]
            for annotated in (True, False)
        ]
        read = AnnotationSegmenter().segment(parts[0])
        if not any(found for _, found in parts[1]):
            return read
        if self._network is None:
            raise ModelNeededError(
                "there are annotated boxes without masks: --segmenter mobile-sam (or sam, on a GPU) finds these",
                "segment_masks",
            )
        drawn = self._network.segment(parts[1])
        filled = []
        for (_, found), *ready in zip(requests, read, drawn, strict=True):
            annotated, asked = map(iter, ready)
            filled.append(tuple(next(annotated if has_mask(one) else asked) for one in found))
        return filled


def has_mask(detection: Detection) -> bool:
    """True for a box that was annotated with a mask."""
    annotated = detection.annotated
    return annotated is not None and not (annotated.mask_rle is None and annotated.mask_file is None)
