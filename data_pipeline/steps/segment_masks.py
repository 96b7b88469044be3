"""Step 6: a mask for every box."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.records import (
    DetectedPair,
    Detection,
    Frame,
    InputError,
    Rejected,
    SettingsError,
    box_in_pixels,
)
from data_pipeline.step import Step

SEGMENTERS = ("annotations", "sam")


@dataclass(kw_only=True)
class SegmentMasks(Step[DetectedPair, DetectedPair]):
    """Masks by the segmenter of the given name.

    segmenter: "annotations" or "sam". model: "vit_b", "vit_l", "vit_h", or a json file with the sizes of another SAM;
    checkpoint: its weights. device: "cpu", "cuda", "cuda:1". Detections whose mask is empty, or has no pixel in their
    box, are left out here.
    """

    segmenter: str = "annotations"
    model: str = "vit_b"
    checkpoint: Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.segmenter not in SEGMENTERS:
            raise SettingsError(f"segmenter must be one of {', '.join(SEGMENTERS)}, got {self.segmenter!r}")
        if self.segmenter == "sam":
            if self.model not in ("vit_b", "vit_l", "vit_h") and not Path(self.model).is_file():
                raise InputError(
                    f"--segmenter-model is vit_b, vit_l, vit_h or a json file; there is no file {self.model}"
                )
            if self.checkpoint is None:
                raise SettingsError("the segmenter sam needs --segmenter-checkpoint FILE")
            if not self.checkpoint.is_file():
                raise InputError(f"--segmenter-checkpoint: no file at {self.checkpoint}")

    def setup(self) -> None:
        """Loads the segmenter."""
        if self.segmenter == "annotations":
            from data_pipeline.models.segmenter import AnnotationSegmenter

            self._segmenter = AnnotationSegmenter()
        else:
            from data_pipeline.models.sam import SamSegmenter, load_sam

            self._segmenter = SamSegmenter(load_sam(self.model, self.checkpoint, self.device))

    def process(self, record: DetectedPair) -> DetectedPair | Rejected:
        """The pair with its masks; rejected if one of the frames is left without any."""
        reference, target = (
            self._segment(frame, detections)
            for frame, detections in (
                (record.frames.reference, record.reference),
                (record.frames.target, record.target),
            )
        )
        if not reference or not target:
            evidence = {"reference": len(reference), "target": len(target)}
            return Rejected("all masks are empty in one of the frames", evidence)
        return DetectedPair(frames=record.frames, entities=record.entities, reference=reference, target=target)

    def _segment(self, frame: Frame, detections: tuple[Detection, ...]) -> tuple[Detection, ...]:
        return tuple(found for found in self._segmenter.segment(frame, detections) if shows(found))


def shows(found: Detection) -> bool:
    """True if at least one pixel of the mask lies in the box: else there is nothing to cut out."""
    height, width = found.mask.shape
    x1, y1, x2, y2 = box_in_pixels(found.box, width, height)
    return bool(found.mask[y1:y2, x1:x2].any())
