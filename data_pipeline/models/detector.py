"""Boxes for the entities of a caption: from the annotations that came with the video, or from Grounding DINO."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.records import Detection, Entity, Frame, Video


@dataclass(frozen=True, eq=False)
class Question:
    """What a detector is asked: where in this frame are these entities?"""

    video: Video
    frame: Frame
    entities: tuple[Entity, ...]


class Detector(Protocol):
    """Finds entities in frames; several instances of one entity are several detections."""

    def detect(self, questions: Sequence[Question]) -> list[tuple[Detection, ...]]:
        """Detections without masks, one tuple per question, in their order."""
        ...


class AnnotationDetector:
    """Takes the annotated objects whose names the caption mentions. Score 1: somebody vouches for them."""

    def detect(self, questions: Sequence[Question]) -> list[tuple[Detection, ...]]:
        """Detections in the order of the annotations. An object goes to the entity of the longest phrase that fits."""
        return [self._one(question) for question in questions]

    def _one(self, question: Question) -> tuple[Detection, ...]:
        annotations = question.video.annotations
        found = []
        for annotated in annotations.frames.get(question.frame.index, ()) if annotations else ():
            fitting = [entity for entity in question.entities if same_thing(entity.phrase, annotated.name)]
            if fitting:
                found.append(
                    Detection(
                        entity=max(fitting, key=lambda entity: len(entity.phrase)),
                        box=annotated.box,
                        score=1.0,
                        object_id=annotated.object_id,
                        attributes=annotated.attributes,
                        annotated=annotated,
                    )
                )
        return tuple(found)


def same_thing(phrase: str, name: str) -> bool:
    """True if one name ends with the words of the other: "soccer ball" and "ball", not "tennis ball"."""
    first, second = phrase.lower().split(), name.lower().replace("_", " ").split()
    shorter = min(len(first), len(second))
    return shorter > 0 and first[-shorter:] == second[-shorter:]
