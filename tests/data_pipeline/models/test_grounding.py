import numpy as np
import pytest
import torch

from data_pipeline.errors import ClipError
from data_pipeline.models.detector import Question
from data_pipeline.models.grounding import (
    GroundingDetector,
    PhraseText,
    Preprocessing,
    boxes_of_phrases,
    phrase_texts,
)
from data_pipeline.records import Frame


class WordTokenizer:
    """A token per word, as far as lengths go."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": text.split() + ["[CLS]", "[SEP]"] * add_special_tokens}


def texts_of(phrases, max_tokens=256):
    return phrase_texts(phrases, WordTokenizer(), max_tokens)


def tokens_of(text):
    return ["[CLS]", *text.split(), "[SEP]"]


def test_a_text_and_where_its_phrases_are():
    [text] = texts_of(["dog", "Red  Ball", "U.S. cats?", "?", ""])
    assert text.text == "dog . red ball . u s cats ."
    assert text.spans == ((0, range(1, 2)), (1, range(3, 5)), (2, range(6, 9)))
    tokens = tokens_of(text.text)
    assert [tokens[span.start : span.stop] for _, span in text.spans] == [["dog"], ["red", "ball"], ["u", "s", "cats"]]
    assert texts_of(["?", "..."]) == []


@pytest.mark.parametrize("max_tokens", [9, 10, 11, 256])
def test_many_phrases_are_asked_for_in_several_texts(max_tokens):
    phrases = [f"thing{i}" if i % 3 else f"red thing{i}" for i in range(150)]
    texts = texts_of(phrases, max_tokens)
    asked = []
    for text in texts:
        tokens = tokens_of(text.text)
        assert len(tokens) <= max_tokens
        assert len(tokens) > max_tokens - 4 or text is texts[-1]  # as few texts as will do
        asked += [(place, " ".join(tokens[span.start : span.stop])) for place, span in text.spans]
        assert all(tokens[span.stop] == "." for _, span in text.spans)
    assert asked == list(enumerate(phrases))


def test_a_phrase_that_no_text_can_hold():
    longest = " ".join(["very"] * 253)
    [text] = texts_of([longest])
    assert len(tokens_of(text.text)) == 256
    with pytest.raises(ClipError, match="phrase too long for the detector") as caught:
        texts_of(["dog", f"{longest} long"])
    assert (caught.value.evidence["tokens"], caught.value.evidence["most"]) == (254, 253)


TWO = PhraseText("dog . red ball .", ((0, range(1, 2)), (4, range(3, 5))))


def test_scores_of_phrases():
    """The best token speaks for its phrase; tokens of no phrase say nothing."""
    scores = np.zeros((4, 8))
    scores[0, [1, 4]] = 0.5, 0.6
    scores[1, [1, 3]] = 0.8, 0.7
    scores[2, [2, 5, 7]] = 0.99
    scores[3, 3] = 0.34
    boxes = np.array([[0.2, 0.2, 0.2, 0.4], [0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 1, 1], [0.9, 0.9, 0.4, 0.4]])
    found = boxes_of_phrases(scores, boxes, TWO, box_threshold=0.35, nms_iou=0.7)
    assert [(one.place, one.score) for one in found] == [(0, 0.8), (4, 0.6)]
    assert found[0].box == pytest.approx((0.4, 0.4, 0.6, 0.6))
    assert found[1].box == pytest.approx((0.1, 0.0, 0.3, 0.4))
    cut = boxes_of_phrases(scores, boxes, TWO, box_threshold=0.3, nms_iou=0.7)[-1]
    assert cut.box == pytest.approx((0.7, 0.7, 1, 1))


def test_of_boxes_of_one_phrase_that_overlap_the_better_stays():
    scores = np.zeros((3, 8))
    scores[:, 1] = 0.5, 0.9, 0.6
    scores[2, 4] = 0.8  # the same place, another phrase
    boxes = np.array([[0.5, 0.5, 0.4, 0.4], [0.5, 0.52, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4]])
    found = boxes_of_phrases(scores, boxes, TWO, box_threshold=0.35, nms_iou=0.7)
    assert [(one.place, one.score) for one in found] == [(0, 0.9), (4, 0.8)]
    assert len(boxes_of_phrases(scores, boxes, TWO, box_threshold=0.35, nms_iou=0.95)) == 3


def test_boxes_without_area_and_answers_without_numbers():
    scores = np.zeros((1, 8))
    scores[0, 1] = 0.9
    assert boxes_of_phrases(scores, np.array([[0.5, 0.5, 0, 0.4]]), TWO, box_threshold=0.3, nms_iou=0.7) == []
    scores[0, 3] = np.nan
    with pytest.raises(ClipError, match="the detector's answer is not a number"):
        boxes_of_phrases(scores, np.array([[0.5, 0.5, 0.1, 0.4]]), TWO, box_threshold=0.3, nms_iou=0.7)


class Fake(GroundingDetector):
    """Finds every phrase of a text in one box whose centre is the mean colour of the picture; counts its batches."""

    def __init__(self, **settings):
        super().__init__(
            WordTokenizer(), Preprocessing(32, 64, (0,) * 3, (1,) * 3), box_threshold=0.3, nms_iou=0.7, **settings
        )
        self.batches = []

    def forward(self, pixels, texts):
        self.batches.append([tuple(pixels.shape[2:]), *texts])
        queries = max(len(text.split()) for text in texts)
        logits = torch.full((len(texts), queries, 32), -9.0)
        for row, text in enumerate(texts):
            for query, token in enumerate(text.split()):
                if token != ".":
                    logits[row, query, query + 1] = 1.0 + query / 100
        centre = pixels.mean(dim=(1, 2, 3))[:, None, None].expand(-1, queries, 2)
        return logits, torch.cat((centre, torch.full_like(centre, 0.1)), dim=2)


def question(make_entity, grey, phrases, size=(32, 48)):
    image = np.full((*size, 3), grey, dtype=np.uint8)
    frame = Frame(index=grey, time=0.0, image=image)
    return Question(video=None, frame=frame, entities=tuple(make_entity(phrase) for phrase in phrases))


def test_frames_of_one_size_share_a_pass(make_entity):
    questions = [
        question(make_entity, 50, ["dog"]),
        question(make_entity, 100, ["cat"], size=(48, 32)),
        question(make_entity, 150, ["red ball", "cup"]),
        question(make_entity, 200, ["hat"]),
        question(make_entity, 250, ["?"]),
    ]
    fake = Fake(batch_size=2)
    found = fake.detect(questions)
    assert fake.batches == [[(32, 48), "dog .", "red ball . cup ."], [(32, 48), "hat ."], [(48, 32), "cat ."]]
    names = [[one.entity.phrase for one in answer] for answer in found]
    assert names == [["dog"], ["cat"], ["cup", "red ball"], ["hat"], []]
    for one, answer in zip(questions[:4], found, strict=False):
        for detection in answer:
            assert detection.box[0] + 0.05 == pytest.approx(one.frame.index / 255, abs=1e-5)


def test_a_pair_is_a_batch_of_its_own(make_entity):
    """What is asked about beside it must not change a pair's last bits: with 2 frames per pass it cannot."""
    fake = Fake(batch_size=2, max_tokens=6)  # so small that every phrase needs a text of its own
    pairs = [[question(make_entity, grey + side, ["red dog", "cat cow"]) for side in (0, 1)] for grey in (50, 90)]
    fake.detect([*pairs[0], *pairs[1]])
    together = fake.batches
    fake.batches = []
    fake.detect(pairs[0])
    fake.detect(pairs[1])
    assert together == fake.batches
    assert all(len(batch) == 3 for batch in together)


def test_phrases_of_several_texts_are_answered_together(make_entity):
    [found] = Fake(max_tokens=6).detect([question(make_entity, 100, ["red ball", "cat"])])
    assert [one.entity.phrase for one in found] == ["red ball", "cat"]
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert Fake().detect([]) == []
