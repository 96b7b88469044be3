from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ClipError, InputError, SettingsError
from data_pipeline.models.detector import AnnotationDetector, Question, same_thing
from data_pipeline.records import AnnotatedObject, Annotations, DetectedPair, Detection, NamedPair, Rejected
from data_pipeline.steps import detect_boxes
from data_pipeline.steps.detect_boxes import DetectBoxes

BLACK = np.zeros((8, 8, 3), dtype=np.uint8)
HF_FILES = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")


def annotated(name, number=0, box=(0, 0, 0.5, 0.5)):
    return AnnotatedObject(object_id=number, name=name, box=box, attributes={"category": name})


@pytest.fixture
def detect(make_pair, make_entity):
    def run(reference, target, phrases=("dog", "soccer ball")):
        annotations = Annotations(frames={3: tuple(reference), 8: tuple(target)})
        pair = make_pair(BLACK, BLACK, annotations=annotations)
        step = DetectBoxes(detector="annotations")
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
    question = Question(video=replace(pair.video, annotations=None), frame=pair.reference, entities=(make_entity(),))
    assert AnnotationDetector().detect([question]) == [()]


class Recorder:
    """A detector that says where it was asked, and cannot be asked for an elephant."""

    def __init__(self):
        self.calls = []

    def detect(self, questions):
        self.calls.append([question.frame.index for question in questions])
        if any(entity.phrase == "elephant" for question in questions for entity in question.entities):
            raise ClipError("too large", phrase="elephant")
        return [
            tuple(
                Detection(entity=entity, box=(0, 0, 1, 1), score=question.frame.index / 10)
                for entity in question.entities
            )
            for question in questions
        ]


@pytest.fixture
def step_and_recorder():
    step = DetectBoxes(detector="annotations")
    step._annotations, step._network = Recorder(), None
    return step, step._annotations


def test_all_frames_of_all_pairs_in_one_call(step_and_recorder, make_pair, make_entity):
    step, recorder = step_and_recorder
    records = [NamedPair(frames=make_pair(BLACK, BLACK), entities=(make_entity(name),)) for name in ("dog", "cat")]
    first, second = step.process_many(records)
    assert recorder.calls == [[3, 8, 3, 8]]
    assert [found.entity.phrase for found in (*first.reference, *second.target)] == ["dog", "cat"]
    assert (first.reference[0].score, first.target[0].score) == (0.3, 0.8)
    assert step.process_many([]) == []


def test_a_pair_that_cannot_be_asked_about_does_not_fail_the_others(step_and_recorder, make_pair, make_entity):
    step, recorder = step_and_recorder
    phrases = ("dog", "elephant", "cat")
    records = [NamedPair(frames=make_pair(BLACK, BLACK), entities=(make_entity(name),)) for name in phrases]
    first, second, third = step.process_many(records)
    assert isinstance(first, DetectedPair)
    assert isinstance(third, DetectedPair)
    assert (second.reason, second.evidence) == ("too large", {"phrase": "elephant"})
    assert recorder.calls == [[3, 8] * 3, [3, 8], [3, 8], [3, 8]]


def test_wrong_settings(tmp_path):
    with pytest.raises(
        SettingsError, match="detector must be one of auto, annotations, groundingdino, groundingdino-hf.*, got 'yolo'"
    ):
        DetectBoxes(detector="yolo")
    with pytest.raises(SettingsError, match=r"are fractions, got 0 and 0.7"):
        DetectBoxes(box_threshold=0)
    with pytest.raises(SettingsError, match="image_size must be at least 32, got 8"):
        DetectBoxes(image_size=8)
    with pytest.raises(SettingsError, match="frames_per_batch must be at least 1, got 0"):
        DetectBoxes(frames_per_batch=0)


def test_groundingdino_wants_its_files(tmp_path):
    with pytest.raises(SettingsError, match="groundingdino needs --detector-config FILE, or --detector-model"):
        DetectBoxes(detector="groundingdino")
    config = tmp_path / "config.py"
    with pytest.raises(InputError, match="--detector-config: no file at"):
        DetectBoxes(detector="groundingdino", config=config, checkpoint=config)
    config.write_text("")
    with pytest.raises(SettingsError, match="groundingdino needs --detector-checkpoint FILE"):
        DetectBoxes(detector="groundingdino", config=config)
    with pytest.raises(InputError, match=r"--detector-model: .* has no weights \(\*.safetensors or \*.pth\)"):
        DetectBoxes(detector="groundingdino", model=str(tmp_path))
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=r"several files for its weights: name one of a.pth, b.pth"):
        DetectBoxes(detector="groundingdino", model=str(tmp_path))
    DetectBoxes(detector="groundingdino", model=str(tmp_path), checkpoint=Path("b.pth"))
    DetectBoxes(detector="groundingdino", model="owner/repository")  # the hub is asked when the model is needed


def test_groundingdino_hf_wants_its_files(tmp_path):
    assert DetectBoxes(detector="groundingdino-hf").model == "IDEA-Research/grounding-dino-tiny"
    with pytest.raises(
        InputError, match="--detector-model: no directory at .*/no/such/place; give a model's directory"
    ):
        DetectBoxes(detector="groundingdino-hf", model=str(tmp_path / "no/such/place"))
    for name in HF_FILES:
        with pytest.raises(InputError, match=rf"lacks its [\s\S]*{name}[\s\S]* or name another directory or a hub id"):
            DetectBoxes(detector="groundingdino-hf", model=str(tmp_path))
        (tmp_path / name).write_text("{}")
    DetectBoxes(detector="groundingdino-hf", model=str(tmp_path))
    with pytest.raises(SettingsError, match="belong to the detector groundingdino; groundingdino-hf finds everything"):
        DetectBoxes(detector="groundingdino-hf", model=str(tmp_path), text_encoder="bert")


def test_the_embedded_detector_brings_its_own_files(tmp_path, monkeypatch):
    step = DetectBoxes(detector="embedded")
    assert step.model_device == "cpu"
    assert step.model_files()["embedded"].is_dir()
    for setting in ({"model": "other"}, {"text_encoder": "bert"}, {"checkpoint": tmp_path / "a.pth"}):
        with pytest.raises(SettingsError, match="the detector embedded brings its own files"):
            DetectBoxes(detector="embedded", **setting)
    monkeypatch.setattr(detect_boxes, "EMBEDDED_DETECTOR", tmp_path / "gone")
    with pytest.raises(InputError, match="--detector embedded: no directory at"):
        DetectBoxes(detector="embedded")


def test_a_detector_that_reads_annotations_has_no_model():
    assert DetectBoxes(detector="annotations").model_device == ""
    assert DetectBoxes(detector="annotations").model_files() == {}
