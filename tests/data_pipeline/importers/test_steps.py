import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ClipError, SettingsError
from data_pipeline.importers.items import ImportItem, ImportSubject
from data_pipeline.importers.steps import OpenPictures, ReadItems, mention_of

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=3)


@given(WORDS, WORDS, WORDS, st.sampled_from([" ", "\n", "  "]))
def test_a_phrase_is_found_among_the_words_of_its_caption(before, phrase, after, space):
    caption = f"{' '.join(before)} {space.join(phrase).upper()}, {' '.join(after)}"
    found = mention_of(" ".join(phrase), caption)
    assert found.lower().split() == phrase
    assert found in caption


@given(WORDS, WORDS)
def test_a_part_of_a_word_is_no_mention(phrase, caption):
    text = " ".join(f"x{word}y" for word in [*caption, *phrase])
    assert mention_of(" ".join(phrase), text) == ""


def test_signs_in_a_phrase_are_taken_as_they_are():
    assert mention_of("dog (brown)", "a dog (brown) and a cat") == "dog (brown)"
    assert mention_of("a.c", "abc") == ""
    assert mention_of("c++ mug", "a C++ mug") == "C++ mug"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"exif": "turn"}, "--exif is refuse, apply, ignore, got 'turn'"), ({"max_pixels": 0}, "at least 1, got 0")],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        OpenPictures(images=Path(), **settings)


@pytest.mark.parametrize(
    ("phrases", "reason"),
    [(["dog"] * 257, "too many subjects"), (["dog", "d" * 1_001], "phrase of too many characters")],
)
def test_items_that_no_reader_would_take(tmp_path, monkeypatch, phrases, reason):
    item = ImportItem(
        target="a.jpg", caption="a dog", subjects=tuple(ImportSubject(phrase=phrase, box=None) for phrase in phrases)
    )
    monkeypatch.setattr("data_pipeline.importers.steps.read_item", lambda file: item)
    with pytest.raises(ClipError, match=reason):
        ReadItems(importer="official").process(None)
