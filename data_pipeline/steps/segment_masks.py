"""Step 6: a mask for every box."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_pipeline.errors import ClipError, InputError, SettingsError
from data_pipeline.places import EMBEDDED_SEGMENTER, SEGMENTER_SIZES, SEGMENTER_WEIGHTS
from data_pipeline.records import DetectedPair, Detection, Frame, Rejected, box_in_pixels
from data_pipeline.step import Step

if TYPE_CHECKING:
    from data_pipeline.models.hub import HubModel
    from data_pipeline.models.segmenter import Segmenter

SEGMENTERS = ("auto", "annotations", "sam", "mobile-sam", "embedded")
MODELS = {"sam": ("vit_b", "vit_l", "vit_h"), "mobile-sam": ("vit_t",)}
Request = tuple[Frame, tuple[Detection, ...]]


@dataclass(kw_only=True)
class SegmentMasks(Step[DetectedPair, DetectedPair]):
    """Masks by the segmenter of the given name.

    segmenter: "annotations", "sam", "mobile-sam", "embedded" (a tiny SAM that comes with the repository), or "auto":
    annotated masks where there are some, for other boxes mobile-sam on a CPU and sam on other devices. model: for
    sam "vit_b", "vit_l" or "vit_h", for mobile-sam "vit_t", or a json file with the sizes of another one; empty for the
    first of these names. checkpoint: its weights, .safetensors or PyTorch's; None for the released ones of a name.
    device: "cpu", "cuda", "cuda:1". frames_per_batch: frames encoded at once. With 2 they are those of one pair, and
    clips do not influence each other; more are quicker on a GPU and may change a mask's score in its last digits.
    model_needed: for auto, whether there are boxes without masks; if not, such a box is a ModelNeededError.

    Detections whose mask is empty, or has no pixel in their box, are left out here.
    """

    path_settings: ClassVar[tuple[str, ...]] = ("model",)

    segmenter: str = "auto"
    model: str = ""
    checkpoint: Path | None = None
    device: str = "cpu"
    frames_per_batch: int = 2
    model_needed: bool = field(default=True, metadata={"hashed": False})

    def __post_init__(self) -> None:
        if self.segmenter not in SEGMENTERS:
            raise SettingsError(f"segmenter must be one of {', '.join(SEGMENTERS)}, got {self.segmenter!r}")
        if self.frames_per_batch < 1:
            raise SettingsError(f"frames_per_batch must be at least 1, got {self.frames_per_batch}")
        if self.segmenter == "embedded":
            self._check_embedded_files()
        if self.segmenter == "annotations" and (self.model or self.checkpoint):
            raise SettingsError("--segmenter-model and --segmenter-checkpoint are not for --segmenter annotations")
        if self.architecture in MODELS:
            known = MODELS[self.architecture]
            # Set here, so that it is recorded with the settings.
            self.model = self.model or known[0]
            if self.model not in known and not os.path.isfile(self.model):  # noqa: PTH113
                raise InputError(
                    f"--segmenter-model for {self.architecture} is {', '.join(known)} or a json file; there is no file "
                    f"{self.model}"
                )
            if self.checkpoint is None and self.model not in known:
                raise SettingsError(f"the sizes in {self.model} need their weights: --segmenter-checkpoint FILE")
            if self.checkpoint is not None and not self.checkpoint.is_file():
                raise InputError(f"--segmenter-checkpoint: no file at {self.checkpoint}")

    @property
    def architecture(self) -> str:
        """The segmenter's name; for auto that of the network: "sam" or "mobile-sam"."""
        if self.segmenter != "auto":
            return self.segmenter
        return "mobile-sam" if self.device == "cpu" and self.model not in MODELS["sam"] else "sam"

    def _check_embedded_files(self) -> None:
        if self.model or self.checkpoint:
            raise SettingsError("the segmenter embedded brings its own files; for others use --segmenter sam")
        for path in (SEGMENTER_SIZES, SEGMENTER_WEIGHTS):
            if not path.is_file():
                raise InputError(f"--segmenter embedded: no file at {path}; it comes with a checkout of the repository")

    @property
    def model_device(self) -> str:
        """See Step."""
        used = self.segmenter != "annotations" and (self.segmenter != "auto" or self.model_needed)
        return self.device if used else ""

    def downloads(self) -> dict[str, HubModel]:
        """See Step."""
        from data_pipeline.models.hub import SEGMENTERS as RELEASED

        named = self.model_device and self.checkpoint is None and self.model in RELEASED
        return {"checkpoint": RELEASED[self.model]} if named else {}

    @property
    def preload(self) -> tuple[str, ...]:
        """See Step."""
        module = "mobile_sam" if self.architecture == "mobile-sam" else "sam"
        return (f"data_pipeline.models.{module}",) if self.model_device else ()

    def model_files(self) -> dict[str, Path]:
        """See Step."""
        found = {"embedded": EMBEDDED_SEGMENTER} if self.segmenter == "embedded" else {}
        return super().model_files() | found

    def setup(self) -> None:
        """Loads the segmenter."""
        from data_pipeline.models.segmenter import AnnotationSegmenter, FillingSegmenter

        if self.segmenter == "annotations":
            self._segmenter: Segmenter = AnnotationSegmenter()
        elif self.segmenter == "auto":
            self._segmenter = FillingSegmenter(self._load() if self.model_needed else None)
        else:
            self._segmenter = self._load()

    def _load(self) -> Segmenter:
        from data_pipeline.models.sam import SamSegmenter, load_sam

        model, checkpoint = self.model, self.checkpoint
        if self.segmenter == "embedded":
            model, checkpoint = str(SEGMENTER_SIZES), SEGMENTER_WEIGHTS
        elif self.checkpoint is None:
            checkpoint = Path(self.place_of("checkpoint"))
        if self.architecture == "mobile-sam":
            from data_pipeline.models.mobile_sam import load_mobile_sam

            return SamSegmenter(load_mobile_sam(model, checkpoint, self.device), self.frames_per_batch)
        return SamSegmenter(load_sam(model, checkpoint, self.device), self.frames_per_batch)

    def process_many(self, records: Sequence[DetectedPair]) -> list[DetectedPair | Rejected]:
        """The pairs with their masks, rejected if a frame is left without any; all frames in one request."""
        requests = []
        for record in records:
            requests += [(record.frames.reference, record.reference), (record.frames.target, record.target)]
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

    def _pair(
        self,
        record: DetectedPair,
        reference: tuple[Detection, ...] | ClipError,
        target: tuple[Detection, ...] | ClipError,
    ) -> DetectedPair | Rejected:
        for failure in (reference, target):
            if isinstance(failure, ClipError):
                return Rejected(failure.reason, failure.evidence)
        reference, target = (tuple(one for one in found if shows(one)) for found in (reference, target))
        if not reference or not target:
            evidence = {"reference": len(reference), "target": len(target)}
            return Rejected("all masks are empty in one of the frames", evidence)
        served = dict(record.served)
        if self.segmenter == "auto":
            # Only networks say how good a mask is.
            network = f"{self.architecture} {self.model}"
            sources = {"annotations" if one.mask_score is None else network for one in (*reference, *target)}
            served["masks"] = " and ".join(sorted(sources))
        return replace(record, reference=reference, target=target, served=served)


def shows(found: Detection) -> bool:
    """True if at least one pixel of the mask lies in the box: else there is nothing to cut out."""
    height, width = found.mask.shape
    x1, y1, x2, y2 = box_in_pixels(found.box, width, height)
    return bool(found.mask[y1:y2, x1:x2].any())
