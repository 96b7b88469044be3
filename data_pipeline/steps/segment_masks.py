"""Step 6: a mask for every box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_pipeline.places import EMBEDDED_SEGMENTER, SEGMENTER_SIZES, SEGMENTER_WEIGHTS
from data_pipeline.records import (
    ClipError,
    DetectedPair,
    Detection,
    Frame,
    InputError,
    Rejected,
    SettingsError,
    box_in_pixels,
)
from data_pipeline.step import Step

SEGMENTERS = ("annotations", "sam", "mobile-sam", "embedded")
MODELS = {"sam": ("vit_b", "vit_l", "vit_h"), "mobile-sam": ("vit_t",)}
Request = tuple[Frame, tuple[Detection, ...]]


@dataclass(kw_only=True)
class SegmentMasks(Step[DetectedPair, DetectedPair]):
    """Masks by the segmenter of the given name.

    segmenter: "annotations", "sam", "mobile-sam" or "embedded" (a tiny SAM that comes with the repository). model: for
    sam "vit_b", "vit_l" or "vit_h", for mobile-sam "vit_t", or a json file with the sizes of another one; empty for the
    first of these names. checkpoint: its weights, .safetensors or PyTorch's. device: "cpu", "cuda", "cuda:1".
    frames_per_batch: frames encoded at once. With 2 they are those of one pair, and clips do not influence each
    other; more are quicker on a GPU and may change a mask's score in its last digits.

    Detections whose mask is empty, or has no pixel in their box, are left out here.
    """

    path_settings: ClassVar[tuple[str, ...]] = ("model",)

    segmenter: str = "annotations"
    model: str = ""
    checkpoint: Path | None = None
    device: str = "cpu"
    frames_per_batch: int = 2

    def __post_init__(self) -> None:
        if self.segmenter not in SEGMENTERS:
            raise SettingsError(f"segmenter must be one of {', '.join(SEGMENTERS)}, got {self.segmenter!r}")
        if self.frames_per_batch < 1:
            raise SettingsError(f"frames_per_batch must be at least 1, got {self.frames_per_batch}")
        if self.segmenter == "embedded":
            self._check_embedded_files()
        if self.segmenter in MODELS:
            known = MODELS[self.segmenter]
            if self.model not in ("", *known) and not Path(self.model).is_file():
                raise InputError(
                    f"--segmenter-model for {self.segmenter} is {', '.join(known)} or a json file; there is no file "
                    f"{self.model}"
                )
            if self.checkpoint is None:
                raise SettingsError(f"the segmenter {self.segmenter} needs --segmenter-checkpoint FILE")
            if not self.checkpoint.is_file():
                raise InputError(f"--segmenter-checkpoint: no file at {self.checkpoint}")

    def _check_embedded_files(self) -> None:
        if self.model or self.checkpoint:
            raise SettingsError("the segmenter embedded brings its own files; for others use --segmenter sam")
        for path in (SEGMENTER_SIZES, SEGMENTER_WEIGHTS):
            if not path.is_file():
                raise InputError(f"--segmenter embedded: no file at {path}; it comes with a checkout of the repository")

    @property
    def model_device(self) -> str:
        """See Step."""
        return "" if self.segmenter == "annotations" else self.device

    @property
    def preload(self) -> tuple[str, ...]:
        """See Step."""
        modules = {"annotations": (), "mobile-sam": ("data_pipeline.models.mobile_sam",)}
        return modules.get(self.segmenter, ("data_pipeline.models.sam",))

    def model_files(self) -> dict[str, Path]:
        """See Step."""
        found = {"embedded": EMBEDDED_SEGMENTER} if self.segmenter == "embedded" else {}
        return super().model_files() | found

    def setup(self) -> None:
        """Loads the segmenter."""
        if self.segmenter == "annotations":
            from data_pipeline.models.segmenter import AnnotationSegmenter

            self._segmenter = AnnotationSegmenter()
            return
        from data_pipeline.models.sam import SamSegmenter, load_sam

        if self.segmenter == "embedded":
            self._segmenter = SamSegmenter(
                load_sam(str(SEGMENTER_SIZES), SEGMENTER_WEIGHTS, self.device), self.frames_per_batch
            )
            return
        model = self.model or MODELS[self.segmenter][0]
        if self.segmenter == "sam":
            sam = load_sam(model, self.checkpoint, self.device)
        else:
            from data_pipeline.models.mobile_sam import load_mobile_sam

            sam = load_mobile_sam(model, self.checkpoint, self.device)
        self._segmenter = SamSegmenter(sam, self.frames_per_batch)

    def process(self, record: DetectedPair) -> DetectedPair | Rejected:
        """The pair with its masks; rejected if one of the frames is left without any."""
        return self.process_many([record])[0]

    def process_many(self, records: Sequence[DetectedPair]) -> list[DetectedPair | Rejected]:
        """The pairs with their masks, both frames of all of them in one request to the segmenter."""
        requests = [
            (frame, detections)
            for record in records
            for frame, detections in (
                (record.frames.reference, record.reference),
                (record.frames.target, record.target),
            )
        ]
        found = self._segment(requests)
        return [self._pair(record, found[2 * number], found[2 * number + 1]) for number, record in enumerate(records)]

    def _segment(self, requests: Sequence[Request]) -> list[tuple[Detection, ...] | ClipError]:
        try:
            return list(self._segmenter.segment(requests))
        except ClipError:
            # One annotation is broken: asking one by one tells whose.
            return [self._segment_one(request) for request in requests]

    def _segment_one(self, request: Request) -> tuple[Detection, ...] | ClipError:
        try:
            return self._segmenter.segment([request])[0]
        except ClipError as error:
            return error

    @staticmethod
    def _pair(
        record: DetectedPair, reference: tuple[Detection, ...] | ClipError, target: tuple[Detection, ...] | ClipError
    ) -> DetectedPair | Rejected:
        for failure in (reference, target):
            if isinstance(failure, ClipError):
                return Rejected(failure.reason, failure.evidence)
        reference, target = (tuple(one for one in found if shows(one)) for found in (reference, target))
        if not reference or not target:
            evidence = {"reference": len(reference), "target": len(target)}
            return Rejected("all masks are empty in one of the frames", evidence)
        return DetectedPair(frames=record.frames, entities=record.entities, reference=reference, target=target)


def shows(found: Detection) -> bool:
    """True if at least one pixel of the mask lies in the box: else there is nothing to cut out."""
    height, width = found.mask.shape
    x1, y1, x2, y2 = box_in_pixels(found.box, width, height)
    return bool(found.mask[y1:y2, x1:x2].any())
