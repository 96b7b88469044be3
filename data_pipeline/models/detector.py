"""Boxes for the entities of a caption: from the annotations that came with the video, or from Grounding DINO."""

from __future__ import annotations

from typing import Protocol

from data_pipeline.records import Detection, Entity, Frame, Video


class Detector(Protocol):
    """Finds entities in one frame; several instances of one entity are several detections."""

    def detect(self, video: Video, frame: Frame, entities: tuple[Entity, ...]) -> tuple[Detection, ...]:
        """Detections in the frame, without masks."""
        ...


class AnnotationDetector:
    """Takes the annotated objects whose names the caption mentions. Score 1: somebody vouches for them."""

    def detect(self, video: Video, frame: Frame, entities: tuple[Entity, ...]) -> tuple[Detection, ...]:
        """Detections in the order of the annotations. An object goes to the entity with the longest phrase that it
        fits.
        """
        objects = video.annotations.frames.get(frame.index, ()) if video.annotations else ()
        found = []
        for annotated in objects:
            fitting = [entity for entity in entities if same_thing(entity.phrase, annotated.name)]
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
    """True if one name ends with the words of the other: "soccer ball" and "ball", but not "soccer ball" and "tennis
    ball".
    """
    first, second = phrase.lower().split(), name.lower().replace("_", " ").split()
    shorter = min(len(first), len(second))
    return shorter > 0 and first[-shorter:] == second[-shorter:]
