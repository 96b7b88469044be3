"""Step 5: a box for every entity that can be seen, in both frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from data_pipeline.errors import ClipError, InputError, ModelNeededError, SettingsError
from data_pipeline.places import EMBEDDED_DETECTOR
from data_pipeline.records import Annotations, DetectedPair, Detection, NamedPair, Rejected
from data_pipeline.step import Step

if TYPE_CHECKING:
    from data_pipeline.models.detector import Detector
    from data_pipeline.models.hub import HubModel

# What the detectors' setup imports: seconds of importing for every worker.
PRELOAD = {
    "groundingdino": ("data_pipeline.models.grounding_dino", "transformers.models.bert.modeling_bert"),
    "groundingdino-hf": (
        "data_pipeline.models.grounding_dino_hf",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.grounding_dino.image_processing_pil_grounding_dino",
        "transformers.models.grounding_dino.modeling_grounding_dino",
    ),
}
DETECTORS = ("auto", "annotations", "groundingdino", "groundingdino-hf", "embedded")


@dataclass(kw_only=True)
class DetectBoxes(Step[NamedPair, DetectedPair]):
    """Boxes by the detector of the given name.

    detector: "annotations"; "groundingdino" (the package groundingdino-py); "groundingdino-hf" (transformers);
    "embedded" (a tiny one of transformers that comes with the repository and knows the procedural world only); "auto":
    the annotations of clips that have some, groundingdino-hf for the others. model: a directory or a hub id with the
    detector's files, for auto and groundingdino-hf the released one if empty. For groundingdino, config and checkpoint
    are then the names of two of these files, if it has several; without a model they are paths. text_encoder: the BERT
    of groundingdino, a directory or a name that transformers knows, if not the one of its configuration.
    box_threshold: least score of a box. nms_iou: of two boxes of one phrase that overlap more, the better stays.
    image_size: pixels of a frame's short side; None for what the model says (800 for groundingdino).
    device: "cpu", "cuda", "cuda:1". frames_per_batch: frames in one forward pass. With 2 they are those of one pair,
    and clips do not influence each other; more are quicker on a GPU and may change boxes in their last digits.
    model_needed: for auto, whether there are clips without annotations; if not, such a clip is a ModelNeededError.
    """

    path_settings: ClassVar[tuple[str, ...]] = ("model", "text_encoder")

    detector: str = "auto"
    model: str = ""
    config: Path | None = None
    checkpoint: Path | None = None
    text_encoder: str = ""
    box_threshold: float = 0.35
    nms_iou: float = 0.7
    image_size: int | None = None
    device: str = "cpu"
    frames_per_batch: int = 2
    model_needed: bool = field(default=True, metadata={"hashed": False})

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise SettingsError(f"detector must be one of {', '.join(DETECTORS)}, got {self.detector!r}")
        if not 0 < self.box_threshold < 1 or not 0 < self.nms_iou <= 1:
            raise SettingsError(f"box_threshold and nms_iou are fractions, got {self.box_threshold} and {self.nms_iou}")
        if self.image_size is not None and self.image_size < 32:
            raise SettingsError(f"image_size must be at least 32, got {self.image_size}")
        if self.frames_per_batch < 1:
            raise SettingsError(f"frames_per_batch must be at least 1, got {self.frames_per_batch}")
        if self.detector == "groundingdino":
            self._check_package_files()
        elif self.detector in ("auto", "groundingdino-hf"):
            self._check_hf_files()
        elif self.detector == "embedded":
            self._check_embedded_files()

    def _check_package_files(self) -> None:
        if self.model:
            from data_pipeline.models.hub import find_files
            from data_pipeline.models.model_files import is_hub_id

            if not is_hub_id(self.model):
                find_files(self.model, "--detector-model", self._needed())
            return
        for option, path in (("--detector-config", self.config), ("--detector-checkpoint", self.checkpoint)):
            if path is None:
                raise SettingsError(
                    f"the detector groundingdino needs {option} FILE, or --detector-model DIR_OR_HUB_ID with both files"
                )
            if not path.is_file():
                raise InputError(f"{option}: no file at {path}")

    def _check_hf_files(self) -> None:
        from data_pipeline.models.hub import GROUNDING_DINO
        from data_pipeline.models.model_files import TEXT_AND_IMAGE_MODEL, check_model_directory

        # Set here, so that it is recorded with the settings.
        self.model = self.model or GROUNDING_DINO.hub_id
        if self.config or self.checkpoint or self.text_encoder:
            raise SettingsError(
                "--detector-config, --detector-checkpoint and --detector-text-encoder belong to the detector "
                f"groundingdino; {self.detector} finds everything in --detector-model"
            )
        check_model_directory(self.model, "--detector-model", TEXT_AND_IMAGE_MODEL)

    def _check_embedded_files(self) -> None:
        from data_pipeline.models.model_files import TEXT_AND_IMAGE_MODEL, check_model_directory

        if self.model or self.config or self.checkpoint or self.text_encoder:
            raise SettingsError(
                "the detector embedded brings its own files; for others use groundingdino-hf or groundingdino"
            )
        check_model_directory(str(EMBEDDED_DETECTOR), "--detector embedded", TEXT_AND_IMAGE_MODEL)

    @property
    def _by_model(self) -> bool:
        """Whether a network is asked at all."""
        return self.detector != "annotations" and (self.detector != "auto" or self.model_needed)

    @property
    def model_device(self) -> str:
        """See Step."""
        return self.device if self._by_model else ""

    def downloads(self) -> dict[str, HubModel]:
        """See Step."""
        from data_pipeline.models.hub import HubModel, transformers_model
        from data_pipeline.models.model_files import is_hub_id

        if not self._by_model or not is_hub_id(self.model):
            return {}
        package = self.detector == "groundingdino"
        return {"model": HubModel(self.model, self._needed()) if package else transformers_model(self.model)}

    @property
    def preload(self) -> tuple[str, ...]:
        """See Step."""
        kind = "groundingdino" if self.detector == "groundingdino" else "groundingdino-hf"
        return PRELOAD[kind] if self._by_model else ()

    def model_files(self) -> dict[str, Path]:
        """See Step."""
        found = {"embedded": EMBEDDED_DETECTOR} if self.detector == "embedded" else {}
        return super().model_files() | found

    def _needed(self) -> dict[str, tuple[str, ...]]:
        return {
            "configuration": (str(self.config),) if self.config else ("*.py",),
            "weights": (str(self.checkpoint),) if self.checkpoint else ("*.safetensors", "*.pth"),
        }

    def setup(self) -> None:
        """Loads the detector."""
        from data_pipeline.models.detector import AnnotationDetector

        self._annotations = AnnotationDetector()
        self._network = self._load() if self._by_model else None

    def _load(self) -> Detector:
        settings = {
            "box_threshold": self.box_threshold,
            "nms_iou": self.nms_iou,
            "image_size": self.image_size,
            "batch_size": self.frames_per_batch,
        }
        if self.detector in ("auto", "groundingdino-hf", "embedded"):
            from data_pipeline.models.grounding_dino_hf import GroundingDinoHF, load_grounding_dino_hf

            name = str(EMBEDDED_DETECTOR) if self.detector == "embedded" else self.place_of("model")
            return GroundingDinoHF(*load_grounding_dino_hf(name, self.device), **settings)
        from data_pipeline.models.grounding_dino import GroundingDino, load_grounding_dino

        config, checkpoint = self.config, self.checkpoint
        if self.model:
            from data_pipeline.models.hub import find_files

            files = find_files(self.model, "--detector-model", self._needed())
            config, checkpoint = files["configuration"], files["weights"]
        return GroundingDino(load_grounding_dino(config, checkpoint, self.text_encoder, self.device), **settings)

    def process_many(self, records: Sequence[NamedPair]) -> list[DetectedPair | Rejected]:
        """The pairs with their detections, rejected if a frame has none; all frames are asked about in one call."""
        try:
            return self._detect(records)
        except ClipError as error:
            if len(records) == 1:
                return [Rejected(error.reason, error.evidence)]
            # One of them cannot be asked about: one by one the others can.
            return [self.process(record) for record in records]

    def _detect(self, records: Sequence[NamedPair]) -> list[DetectedPair | Rejected]:
        annotated = [self._by_annotations(record) for record in records]
        if self._network is None and not all(annotated):  # they were taken away after the run had looked for them
            raise ModelNeededError("there are videos without annotations: run the same command again", self.name)
        found: list[DetectedPair | Rejected | None] = [None] * len(records)
        for detector, wanted in ((self._annotations, True), (self._network, False)):
            numbers = [number for number, known in enumerate(annotated) if known is wanted]
            for number, pair in zip(numbers, self._ask(detector, [records[each] for each in numbers]), strict=True):
                found[number] = pair
        return found

    def _by_annotations(self, record: NamedPair) -> bool:
        if self.detector == "auto":
            return record.frames.video.annotations is not None
        return self.detector == "annotations"

    def _ask(self, detector: Detector, records: Sequence[NamedPair]) -> list[DetectedPair | Rejected]:
        from data_pipeline.models.detector import Question

        if not records:
            return []
        questions = [
            Question(video=record.frames.video, frame=frame, entities=record.entities)
            for record in records
            for frame in (record.frames.reference, record.frames.target)
        ]
        found = detector.detect(questions)
        annotated = detector is self._annotations
        served = {"boxes": "annotations" if annotated else self.model} if self.detector == "auto" else {}
        both = zip(found[::2], found[1::2], strict=True)
        return [
            self._pair(record, *pair, served, record.frames.video.annotations if annotated else None)
            for record, pair in zip(records, both, strict=True)
        ]

    @staticmethod
    def _pair(
        record: NamedPair,
        reference: tuple[Detection, ...],
        target: tuple[Detection, ...],
        served: Mapping[str, str],
        named: Annotations | None,
    ) -> DetectedPair | Rejected:
        if not reference or not target:
            evidence = {"phrases": [entity.phrase for entity in record.entities]}
            evidence |= {"reference": len(reference), "target": len(target), **served}
            if named is not None:  # whoever reads it sees whether it is the words that differ
                indices = (record.frames.reference.index, record.frames.target.index)
                evidence["annotated"] = sorted({one.name for index in indices for one in named.frames.get(index, ())})
            return Rejected("no entity detected in one of the frames", evidence)
        return DetectedPair(
            frames=record.frames, entities=record.entities, reference=reference, target=target, served=served
        )
