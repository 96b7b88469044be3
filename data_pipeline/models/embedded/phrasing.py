"""What the detector is asked in training: the phrases of a caption, and others that nothing in the frame fits."""

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.models.embedded.vocabulary import OTHER_THINGS, PLACES, SPECIAL
from data_pipeline.world.palette import CATEGORIES, COLORS, PATTERNS

WORDS_OF_PATTERNS = {
    "plain": "plain",
    "stripes": "striped",
    "bands": "banded",
    "dots": "dotted",
    "patch": "patched",
    "checks": "checked",
}
SILENT = 0.06
"""Share of the categories in a frame that nobody asks for: what is not named must not be found."""
MAX_STRANGERS = 3
STOP = SPECIAL["."]


@dataclass(frozen=True, eq=False)
class Phrasing:
    """A batch of questions.

    ids: int64 (B, T), padded with 0. attention: bool (B, T). owners: int64 (B, T), which category (a number in
    CATEGORIES) the phrase of a token asks for, -1 for other phrases, full stops and padding.
    """

    ids: np.ndarray
    attention: np.ndarray
    owners: np.ndarray


def sample_phrases(rng: np.random.Generator, traits: np.ndarray) -> list[tuple[str, int]]:
    """Phrases for a frame, each with the category that it asks for or -1.

    traits: int (S, 3): category, colour and pattern of every subject, -1 where absent. Half of the time the order is
    that of a caption (subjects, then the place), else any.
    """
    present = list(dict.fromkeys(int(row[0]) for row in traits if row[0] >= 0))
    asked = []
    for category in present:
        if rng.random() < SILENT:
            continue
        row = next(row for row in traits if row[0] == category)
        asked.append((_describe(rng, category, int(row[1]), int(row[2])), category))
    strangers = [number for number in range(len(CATEGORIES)) if number not in present]
    for category in rng.choice(strangers, int(rng.integers(0, MAX_STRANGERS + 1)), replace=False):
        colour, pattern = int(rng.integers(len(COLORS))), int(rng.integers(len(PATTERNS)))
        asked.append((_describe(rng, int(category), colour, pattern), int(category)))
    if rng.random() < 0.7:
        place = str(rng.choice(PLACES[:-1]))
        asked.append(("cobblestone street" if place == "street" and rng.random() < 0.7 else place, -1))
    if rng.random() < 0.3:
        asked.append((str(rng.choice(OTHER_THINGS)), -1))
    if rng.random() < 0.15 or not asked:
        letters = rng.choice(list(string.ascii_lowercase), int(rng.integers(3, 9)))
        asked.append(("".join(letters), -1))
    if rng.random() < 0.5:
        asked = [asked[index] for index in rng.permutation(len(asked))]
    return asked


def _describe(rng: np.random.Generator, category: int, colour: int, pattern: int) -> str:
    words = [CATEGORIES[category]]
    if rng.random() < 0.15:
        words.insert(0, tuple(COLORS)[colour])
    if rng.random() < 0.08:
        words.insert(0, WORDS_OF_PATTERNS[PATTERNS[pattern]])
    return " ".join(words)


class Tokens:
    """Token numbers of phrases, remembered: ``encode`` is the slow part of a tokenizer."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        """encode: phrase to token numbers, without special tokens."""
        self._encode = encode
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, phrase: str) -> tuple[int, ...]:
        if phrase not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[phrase] = tuple(self._encode(phrase))
        return self._known[phrase]


def tokenize(batch: Sequence[Sequence[tuple[str, int]]], tokens: Tokens) -> Phrasing:
    """Every list of phrases as "[CLS] dog . red ball . [SEP]"."""
    rows, owners = [], []
    for phrases in batch:
        row, owner = [SPECIAL["[CLS]"]], [-1]
        for phrase, category in phrases:
            numbers = tokens(phrase)
            row += [*numbers, STOP]
            owner += [category] * len(numbers) + [-1]
        rows.append([*row, SPECIAL["[SEP]"]])
        owners.append([*owner, -1])
    length = max(len(row) for row in rows)
    ids = np.zeros((len(rows), length), np.int64)
    attention = np.zeros((len(rows), length), bool)
    belongs = np.full((len(rows), length), -1, np.int64)
    for index, (row, owner) in enumerate(zip(rows, owners, strict=True)):
        ids[index, : len(row)], attention[index, : len(row)], belongs[index, : len(row)] = row, True, owner
    return Phrasing(ids=ids, attention=attention, owners=belongs)
