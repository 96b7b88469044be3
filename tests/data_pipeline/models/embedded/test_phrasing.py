import numpy as np

from data_pipeline.models.embedded.phrasing import STOP, Tokens, sample_phrases, tokenize
from data_pipeline.world.palette import CATEGORIES

TRAITS = np.array([[0, 3, 1], [4, 2, 0], [0, 5, 5], [-1, -1, -1]])


def letters(phrase):
    return [200 + ord(letter) for letter in phrase.replace(" ", "")]


def draw(count):
    rng = np.random.default_rng(0)
    return [sample_phrases(rng, TRAITS) for _ in range(count)]


def test_what_is_there_is_nearly_always_asked_for_once():
    asked = [[category for _, category in phrases] for phrases in draw(400)]
    for category in (0, 4):
        counts = [row.count(category) for row in asked]
        assert max(counts) == 1
        assert 0.88 < np.mean(counts) < 0.99


def test_things_that_are_not_there_are_asked_for_too():
    drawn = draw(300)
    assert any(category not in (-1, 0, 4) for phrases in drawn for _, category in phrases)
    assert any(phrase == "beach" and category == -1 for phrases in drawn for phrase, category in phrases)
    assert all(phrases for phrases in drawn)


def test_a_phrase_ends_with_its_category():
    for phrases in draw(100):
        for phrase, category in phrases:
            if category >= 0:
                assert phrase.split()[-1] == CATEGORIES[category]
            else:
                assert phrase.split()[-1] not in CATEGORIES


def test_a_frame_without_subjects_is_asked_about_as_well():
    rng = np.random.default_rng(1)
    empty = np.full((4, 3), -1)
    assert all(sample_phrases(rng, empty) for _ in range(50))


def test_tokens_know_the_category_that_they_ask_for():
    text = tokenize([[("ab", 3), ("c", -1)], [("d", 0)]], Tokens(letters))
    a, b, c, d = (200 + ord(letter) for letter in "abcd")
    assert text.ids.tolist() == [[101, a, b, STOP, c, STOP, 102], [101, d, STOP, 102, 0, 0, 0]]
    assert text.owners.tolist() == [[-1, 3, 3, -1, -1, -1, -1], [-1, 0, -1, -1, -1, -1, -1]]
    assert text.attention.sum(1).tolist() == [7, 4]


def test_phrases_are_encoded_once():
    asked = []

    def encode(phrase):
        asked.append(phrase)
        return [7]

    tokens = Tokens(encode)
    assert [tokens("dog"), tokens("dog"), tokens("cat")] == [(7,)] * 3
    assert asked == ["dog", "cat"]
