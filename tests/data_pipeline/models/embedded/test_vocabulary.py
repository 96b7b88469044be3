import pytest

from data_pipeline.errors import InputError
from data_pipeline.models.embedded.vocabulary import SIZE, SPECIAL, load_tokenizer, vocabulary, write_tokenizer
from data_pipeline.world.palette import BACKGROUNDS, CATEGORIES, COLORS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def test_special_tokens_are_where_grounding_dino_looks_for_them(tokenizer):
    numbers = [tokenizer.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", ".", "?")]
    assert numbers == [101, 102, 1012, 1029]
    assert tokenizer.pad_token_id == SPECIAL["[PAD]"] == 0
    assert tokenizer("dog . cat .")["input_ids"][0] == 101


def test_every_token_has_one_number():
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens)) == SIZE


def test_words_of_the_world_are_one_token(tokenizer):
    for word in (*CATEGORIES, *COLORS, *BACKGROUNDS, "striped", "person"):
        assert tokenizer.tokenize(word) == [word]


def test_unknown_words_are_spelled(tokenizer):
    assert tokenizer.tokenize("Yurt") == ["y", "##u", "##r", "##t"]
    assert tokenizer.tokenize("dogs") == ["dog", "##s"]
    assert tokenizer.tokenize("\N{CJK UNIFIED IDEOGRAPH-72AC}") == ["[UNK]"]


def test_a_tokenizer_with_tokens_elsewhere_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    words = vocabulary()
    words[101], words[110] = words[110], words[101]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    with pytest.raises(InputError, match=r"\[CLS\].*110.*needs 101"):
        load_tokenizer(tmp_path)
