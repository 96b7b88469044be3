"""What every Grounding DINO has in common, whichever library runs it: pictures, texts, batches, boxes per phrase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from data_pipeline.errors import ClipError
from data_pipeline.models.detector import Question
from data_pipeline.records import Box, Detection, box_area, box_iou

LONGEST_OVER_SHORTEST = 1333 / 800


@dataclass(frozen=True)
class Preprocessing:
    """From a frame to what the network takes: the short side scaled to ``shortest`` pixels unless the long one would
    exceed ``longest``, colours normalised.

    Bit for bit the transforms of the package groundingdino-py; transformers' PIL processor differs from them by one
    pixel on some very long pictures.
    """

    shortest: int = 800
    longest: int = 1333
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def resized_to(self, shortest: int | None) -> Preprocessing:
        """The same for another short side, its longest side in the proportion of 1333 to 800; None changes nothing."""
        if shortest is None:
            return self
        return Preprocessing(shortest, round(shortest * LONGEST_OVER_SHORTEST), self.mean, self.std)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in pixels that a picture of this size is scaled to."""
        shortest, smaller, larger = self.shortest, min(width, height), max(width, height)
        if larger / smaller * shortest > self.longest:
            shortest = round(self.longest * smaller / larger)
        if smaller == shortest:
            return width, height
        if width < height:
            return shortest, int(shortest * height / width)
        return int(shortest * width / height), shortest

    def __call__(self, image: np.ndarray) -> torch.Tensor:
        """image: uint8 (height, width, 3). Returns float32 (3, new height, new width)."""
        picture = Image.fromarray(image)
        picture = picture.resize(self.size(*picture.size), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
        mean, std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (self.mean, self.std))
        return pixels.sub_(mean).div_(std)


class PhraseText(NamedTuple):
    """One text that asks for phrases: "dog . red ball ."."""

    text: str
    spans: tuple[tuple[int, range], ...]
    """Of each phrase: its place in the list of phrases, and the positions of its tokens in the text."""


def phrase_texts(phrases: Sequence[str], tokenizer: Any, max_tokens: int) -> list[PhraseText]:
    """The texts that ask for all phrases, each of at most ``max_tokens`` tokens: one, unless the phrases are many.

    A phrase without a token ("?") cannot be asked for and is in no text. ClipError for a phrase too long for any text.
    """
    texts: list[PhraseText] = []
    parts: list[str] = []
    spans: list[tuple[int, range]] = []
    position = 1  # position 0 is the start token
    for place, phrase in enumerate(phrases):
        # Full stops and question marks separate phrases.
        words = " ".join(phrase.lower().replace(".", " ").replace("?", " ").split())
        length = len(tokenizer(words, add_special_tokens=False)["input_ids"]) if words else 0
        if length == 0:
            continue
        if length + 3 > max_tokens:
            raise ClipError("phrase too long for the detector", phrase=phrase[:80], tokens=length, most=max_tokens - 3)
        if position + length + 2 > max_tokens:
            texts.append(PhraseText(" ".join(parts), tuple(spans)))
            parts, spans, position = [], [], 1
        parts.append(f"{words} .")
        spans.append((place, range(position, position + length)))
        position += length + 1
    return [*texts, PhraseText(" ".join(parts), tuple(spans))] if parts else texts


class PhraseBox(NamedTuple):
    """A box that was found for the phrase at ``place``."""

    place: int
    score: float
    box: Box


def boxes_of_phrases(
    scores: np.ndarray, boxes: np.ndarray, text: PhraseText, *, box_threshold: float, nms_iou: float
) -> list[PhraseBox]:
    """The boxes that a network's queries give to the phrases of one text, the best first.

    scores: (queries, tokens), sigmoids in [0, 1]. boxes: (queries, 4), centre and size as fractions of the picture.
    A phrase scores the best of its tokens; a box goes to its best phrase if that scores at least ``box_threshold``; of
    two boxes of one phrase that overlap by more than ``nms_iou`` the better stays. ClipError if a score is not a
    number.
    """
    by_phrase = np.stack([scores[:, span.start : span.stop].max(axis=1) for _, span in text.spans], axis=1)
    if not np.isfinite(by_phrase).all() or not np.isfinite(boxes).all():
        raise ClipError("the detector's answer is not a number", text=text.text)
    corners = np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), axis=1).clip(0, 1)
    best, choice = by_phrase.max(axis=1), by_phrase.argmax(axis=1)
    found: list[PhraseBox] = []
    for row in np.argsort(-best, kind="stable"):
        if best[row] < box_threshold:
            break
        box: Box = tuple(float(value) for value in corners[row])
        place = text.spans[int(choice[row])][0]
        rivals = (other.box for other in found if other.place == place)
        if box_area(box) > 0 and all(box_iou(box, other) <= nms_iou for other in rivals):
            found.append(PhraseBox(place, float(best[row]), box))
    return found


class GroundingDetector:
    """A detector (see data_pipeline.models.detector.Detector) round a Grounding DINO; subclasses run the network.

    Frames of one size after scaling share a forward pass, up to ``batch_size`` of them, in the order of the questions.
    With two frames per pass, the default, the two frames of a clip are always a batch of their own, so that an answer
    does not depend, not even in its last bits, on which other clips are asked about in the same call.
    """

    def __init__(
        self,
        tokenizer: Any,
        preprocessing: Preprocessing,
        *,
        box_threshold: float,
        nms_iou: float,
        image_size: int | None = None,
        batch_size: int = 2,
        max_tokens: int = 256,
    ) -> None:
        """image_size: pixels of the short side, None for that of the preprocessing."""
        self.tokenizer = tokenizer
        self.preprocessing = preprocessing.resized_to(image_size)
        self.box_threshold = box_threshold
        self.nms_iou = nms_iou
        self.batch_size = batch_size
        self.max_tokens = max_tokens

    def forward(self, pixels: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the network. pixels: float32 (B, 3, height, width). Returns the tokens' logits (B, queries, tokens) and
        the boxes (B, queries, 4), centre and size as fractions of the picture.
        """
        raise NotImplementedError

    @torch.inference_mode()
    def detect(self, questions: Sequence[Question]) -> list[tuple[Detection, ...]]:
        """Detections, the best first; those of one entity overlap each other by at most ``nms_iou``.

        ClipError if one of the questions cannot be asked or answered.
        """
        batches: dict[tuple[int, int], list[tuple[int, PhraseText]]] = {}
        texts: dict[tuple[str, ...], list[PhraseText]] = {}  # the frames of a pair are asked for the same
        for number, question in enumerate(questions):
            height, width = question.frame.image.shape[:2]
            phrases = tuple(entity.phrase for entity in question.entities)
            if phrases not in texts:
                texts[phrases] = phrase_texts(phrases, self.tokenizer, self.max_tokens)
            for text in texts[phrases]:
                batches.setdefault(self.preprocessing.size(width, height), []).append((number, text))
        found: list[list[PhraseBox]] = [[] for _ in questions]
        for jobs in batches.values():
            for start in range(0, len(jobs), self.batch_size):
                self._answer(questions, jobs[start : start + self.batch_size], found)
        return [
            tuple(
                Detection(entity=question.entities[one.place], box=one.box, score=one.score)
                for one in sorted(boxes, key=lambda one: -one.score)
            )
            for question, boxes in zip(questions, found, strict=True)
        ]

    def _answer(
        self, questions: Sequence[Question], jobs: list[tuple[int, PhraseText]], found: list[list[PhraseBox]]
    ) -> None:
        pixels = torch.stack([self.preprocessing(questions[number].frame.image) for number, _ in jobs])
        logits, boxes = self.forward(pixels, [text.text for _, text in jobs])
        scores, boxes = (values.float().cpu().numpy() for values in (logits.sigmoid(), boxes))
        for (number, text), own_scores, own_boxes in zip(jobs, scores, boxes, strict=True):
            found[number] += boxes_of_phrases(
                own_scores, own_boxes, text, box_threshold=self.box_threshold, nms_iou=self.nms_iou
            )
