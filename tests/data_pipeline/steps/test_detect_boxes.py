from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.models.detector import AnnotationDetector, same_thing
from data_pipeline.records import AnnotatedObject, Annotations, InputError, NamedPair, Rejected, SettingsError
from data_pipeline.steps.detect_boxes import DetectBoxes

BLACK = np.zeros((8, 8, 3), dtype=np.uint8)


def annotated(name, number=0, box=(0, 0, 0.5, 0.5)):
    return AnnotatedObject(object_id=number, name=name, box=box, attributes={"category": name})


@pytest.fixture
def detect(make_pair, make_entity):
    def run(reference, target, phrases=("dog", "soccer ball")):
        annotations = Annotations(frames={3: tuple(reference), 8: tuple(target)})
        pair = make_pair(BLACK, BLACK, annotations=annotations)
        step = DetectBoxes()
        step.setup()
        return step.process(NamedPair(frames=pair, entities=tuple(make_entity(phrase) for phrase in phrases)))

    return run


def test_annotated_objects_that_the_caption_names(detect):
    pair = detect([annotated("dog", 5), annotated("ball"), annotated("tree")], [annotated("dog", 5)])
    assert [(found.entity.phrase, found.object_id) for found in pair.reference] == [("dog", 5), ("soccer ball", 0)]
    assert [found.entity.phrase for found in pair.target] == ["dog"]
    assert pair.reference[0].score == 1.0
    assert pair.reference[0].attributes == {"category": "dog"}


@pytest.mark.parametrize(("reference", "target"), [(["tree"], ["dog"]), (["dog"], []), ([], [])])
def test_nothing_in_one_of_the_frames(detect, reference, target):
    rejected = detect([annotated(name) for name in reference], [annotated(name) for name in target])
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "no entity detected in one of the frames"
    assert rejected.evidence["phrases"] == ["dog", "soccer ball"]


def test_the_longest_phrase_that_fits(detect):
    pair = detect([annotated("soccer ball")], [annotated("soccer ball")], phrases=("ball", "soccer ball"))
    assert pair.reference[0].entity.phrase == "soccer ball"


@pytest.mark.parametrize(
    ("phrase", "name", "same"),
    [
        ("dog", "dog", True),
        ("soccer ball", "ball", True),
        ("bear", "teddy bear", True),
        ("teddy bear", "Teddy_Bear", True),
        ("soccer ball", "tennis ball", False),
        ("dog", "cat", False),
        ("dog", "", False),
    ],
)
def test_names(phrase, name, same):
    assert same_thing(phrase, name) is same


def test_a_video_without_annotations_has_no_detections(make_pair, make_entity):
    pair = make_pair(BLACK, BLACK)
    assert AnnotationDetector().detect(replace(pair.video, annotations=None), pair.reference, (make_entity(),)) == ()


def test_wrong_settings(tmp_path):
    with pytest.raises(SettingsError, match="detector must be one of annotations, groundingdino, got 'yolo'"):
        DetectBoxes(detector="yolo")
    with pytest.raises(SettingsError, match="are fractions, got 0 and 0.7"):
        DetectBoxes(box_threshold=0)
    with pytest.raises(SettingsError, match="image_size must be at least 32, got 8"):
        DetectBoxes(image_size=8)
    with pytest.raises(SettingsError, match="groundingdino needs --detector-config FILE"):
        DetectBoxes(detector="groundingdino")
    config = tmp_path / "config.py"
    with pytest.raises(InputError, match="--detector-config: no file at"):
        DetectBoxes(detector="groundingdino", config=config, checkpoint=config)
    config.write_text("")
    with pytest.raises(SettingsError, match="groundingdino needs --detector-checkpoint FILE"):
        DetectBoxes(detector="groundingdino", config=config)
