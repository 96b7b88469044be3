"""Step 5: a box for every entity that can be seen, in both frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.records import DetectedPair, InputError, NamedPair, Rejected, SettingsError
from data_pipeline.step import Step

DETECTORS = ("annotations", "groundingdino")


@dataclass(kw_only=True)
class DetectBoxes(Step[NamedPair, DetectedPair]):
    """Boxes by the detector of the given name.

    detector: "annotations" or "groundingdino". config, checkpoint: Grounding DINO's configuration and weights;
    text_encoder: its BERT, a directory or a name that transformers knows, if not the one named in the configuration.
    box_threshold: least score of a box. nms_iou: of two boxes of one phrase that overlap more, the better stays.
    device: "cpu", "cuda", "cuda:1".
    """

    detector: str = "annotations"
    config: Path | None = None
    checkpoint: Path | None = None
    text_encoder: str = ""
    box_threshold: float = 0.35
    nms_iou: float = 0.7
    image_size: int = 800
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise SettingsError(f"detector must be one of {', '.join(DETECTORS)}, got {self.detector!r}")
        if not 0 < self.box_threshold < 1 or not 0 < self.nms_iou <= 1:
            raise SettingsError(f"box_threshold and nms_iou are fractions, got {self.box_threshold} and {self.nms_iou}")
        if self.image_size < 32:
            raise SettingsError(f"image_size must be at least 32, got {self.image_size}")
        if self.detector == "groundingdino":
            for option, path in (("--detector-config", self.config), ("--detector-checkpoint", self.checkpoint)):
                if path is None:
                    raise SettingsError(f"the detector groundingdino needs {option} FILE")
                if not path.is_file():
                    raise InputError(f"{option}: no file at {path}")

    def setup(self) -> None:
        """Loads the detector."""
        if self.detector == "annotations":
            from data_pipeline.models.detector import AnnotationDetector

            self._detector = AnnotationDetector()
        else:
            from data_pipeline.models.grounding_dino import GroundingDino, load_grounding_dino

            model = load_grounding_dino(self.config, self.checkpoint, self.text_encoder, self.device)
            self._detector = GroundingDino(
                model, box_threshold=self.box_threshold, nms_iou=self.nms_iou, image_size=self.image_size
            )

    def process(self, record: NamedPair) -> DetectedPair | Rejected:
        """The pair with its detections; rejected if one of the frames has none."""
        frames, entities = record.frames, record.entities
        reference, target = (
            self._detector.detect(frames.video, frame, entities) for frame in (frames.reference, frames.target)
        )
        if not reference or not target:
            evidence = {
                "phrases": [entity.phrase for entity in entities],
                "reference": len(reference),
                "target": len(target),
            }
            return Rejected("no entity detected in one of the frames", evidence)
        return DetectedPair(frames=frames, entities=entities, reference=reference, target=target)
