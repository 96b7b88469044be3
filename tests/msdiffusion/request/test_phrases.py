import time

import pytest
import spacy

from msdiffusion.errors import PhraseError
from msdiffusion.request import phrases
from msdiffusion.request.phrases import beyond_limit, find_in_prompt, find_phrases, noun_phrases, token_span


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a dog and a teapot on the beach", ["dog", "teapot", "beach"]),
        ("an orange dog with blue checks in a room", ["orange dog", "blue checks", "room"]),
        ("two dogs in the jungle", ["dogs", "jungle"]),
        ("a dog in front of a clock", ["dog", "clock"]),
        ("a photo of a red dog on the beach", ["red dog", "beach"]),
        ("a dog beside a photo", ["dog", "photo"]),
        ("it is raining", []),
    ],
)
def test_noun_phrases(prompt, found):
    assert noun_phrases(prompt) == found


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a dog and a teapot on the beach", ["dog", "teapot"]),
        ("a hat, a fish and a car on a cobblestone street", ["hat", "fish", "car"]),
        ("a lantern in the snow", ["lantern"]),
        ("a red cat and a blue clock", ["red cat", "blue clock"]),
        ("  a dog and  a teapot ", ["dog", "teapot"]),
        ("a photo of a dog", ["dog"]),
        ("a close-up of a teapot on the beach", ["teapot"]),
        ("a high quality photo of a dog and a cat on the beach", ["dog", "cat"]),
    ],
)
def test_phrases_are_found_when_they_match_the_count(prompt, found):
    assert find_phrases(prompt, len(found)) == found


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("(a dog:1.3) and (a teapot:0.8) on the beach", ["dog", "teapot"]),
        ("((a dog:1.2)) and (a teapot: .8) on the beach", ["dog", "teapot"]),
        ("(a (red:1.2) dog:0.9) and a teapot", ["red dog", "teapot"]),
        ("a (red:1.2) dog and a [teapot:0.8]", ["red dog", "teapot"]),
        ("((a dog)) and [a teapot] on the beach", ["dog", "teapot"]),
        ("[[a dog]] and {{a teapot}}", ["dog", "teapot"]),
        ("(a dog)1.3 and (a teapot)++ in (deep snow)0.8", ["dog", "teapot"]),
        ("a dog++ and a teapot-- on the beach", ["dog", "teapot"]),
        ("a dog:1.3 and a teapot:0.8", ["dog", "teapot"]),
    ],
)
def test_weights_in_a_prompt_are_no_part_of_names(prompt, found):
    with pytest.warns(
        UserWarning, match="reads weights in the prompt, such as .*: remove brackets and numbers; subject_scales"
    ):
        assert find_phrases(prompt, len(found)) == found


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("(a dog) and (a teapot) on the beach", ["dog", "teapot"]),
        ("a (red) dog and a teapot", ["red dog", "teapot"]),
        (r"a \(red\) dog and a teapot", ["red dog", "teapot"]),
        ("a dog BREAK a teapot", ["dog", "teapot"]),
        ("a dog | a teapot", ["dog", "teapot"]),
        ("a dog (a corgi) on the beach", ["dog", "corgi"]),
        ("a photo of <cat-toy> on the beach", ["cat-toy"]),
        ("a dog at 10:30 and a teapot", ["dog", "teapot"]),
        ("a smiley :) and a dog", ["smiley", "dog"]),
        ("a café and a piñata", ["café", "piñata"]),
        ("a dog on La Rambla y Sol", ["dog"]),
        ("comic con dog", ["comic con dog"]),
        ("MIT robot", ["MIT robot"]),
    ],
)
def test_brackets_that_are_no_weights(prompt, found, recwarn):
    assert find_phrases(prompt, len(found)) == found
    assert not recwarn.list


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a dog, <lora:foo:0.8>, a teapot", "'<lora:foo:0.8>', which names no thing.*load_lora_weights.*--phrase"),
        ("a [dog:cat:0.5] and a teapot", r"'\[dog:cat:0.5\]', which names no thing.*--phrase"),
        ("a [dog|cat] on the beach", r"'\[dog\|cat\]'"),
        ("{a dog|a cat} on the beach", r"'\{a dog\|a cat\}'"),
        ("__animal__ and a teapot", "'__animal__'"),
    ],
)
def test_programs_in_a_prompt_are_refused(prompt, told):
    with pytest.raises(PhraseError, match=told):
        find_phrases(prompt, 1)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("ein Hund und eine Teekanne am Strand", "not English .its small words are 'ein', 'und', 'eine'.*--phrase"),
        ("Ein Hund", "'ein'"),
        ("un chien et une théière sur la plage", "'un', 'et', 'une'"),
        ("un perro y una tetera", "'un', 'y', 'una'"),
        ("un cane e una teiera", "'un', 'e', 'una'"),
        ("um cachorro e um bule", "'um', 'e'"),
        ("een hond en een theepot", "'een', 'en'"),
        ("en hund och en tekanna", "'en', 'och'"),
        ("собака и чайник на пляже", "most of its letters are not Latin"),
        ("et barn og en hund", "'et', 'og', 'en'"),
        ("una mesa sobre la playa", "'una', 'sobre'"),
        ("犬と急須", "most of its letters are not Latin"),
        ("كلب على الشاطئ", "most of its letters are not Latin"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_prompts_of_other_languages_are_refused(prompt, told, count):
    with pytest.raises(PhraseError, match=told):
        find_phrases(prompt, count)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("OG sneakers, teapot", "teapot"),
        ("Infinite Jest cover", "Infinite Jest cover"),
        ("Uma Thurman, portrait photo", "Uma Thurman"),
        ("Una Stubbs portrait", "Una Stubbs portrait"),
        ("dog, cat, 8k, ET", "ET"),
        ("Sobre the cat", "cat"),
    ],
)
def test_names_that_are_words_of_other_languages_are_read(prompt, found):
    assert any(found in phrase for phrase in noun_phrases(prompt)), noun_phrases(prompt)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("on the beach", ["beach"]),
        ("sitting in a room", ["room"]),
        ("a dog in the snow", ["dog", "snow"]),
        ("a dog in a hat", ["dog", "hat"]),
        ("a dog (sunny day)", ["dog"]),
        ("a dog (sunny day) on the beach", ["dog"]),
        ("(masterpiece), a dog and a teapot in a room, (best quality)", ["dog", "teapot"]),
    ],
)
def test_a_guess_is_told(prompt, found):
    with pytest.warns(UserWarning, match=rf"surely.*taken: '{found[0]}'.*phrases=\[\.\.\.\] .--phrase") as told:
        assert find_phrases(prompt, len(found)) == found
    assert len(told) == 1


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a dog and a teapot on the beach", ["dog", "teapot"]),
        ("a man with a hat", ["man", "hat"]),
        ("a dog beside a teapot", ["dog", "teapot"]),
        ("a dog (a corgi)", ["dog", "corgi"]),
        ("a (red) dog in the snow", ["red dog"]),
    ],
)
def test_what_is_no_guess_is_taken_without_a_word(prompt, found, recwarn):
    assert find_phrases(prompt, len(found)) == found
    assert not recwarn.list


def test_brackets_round_a_thing_do_not_leave_it_out():
    with pytest.raises(PhraseError, match="^1 image needs 1 phrase, but"):
        find_phrases("(a dog) and a teapot", 1)


@pytest.mark.parametrize(
    "prompt",
    [
        "a dog [" + ":" * 10_000,
        "a dog [" + "a:" * 5_000,
        "a dog [" + "|" * 10_000,
        "(" + " " * 10_000,
        "(" + "( : " * 2_500,
        " " * 10_000 + "x",
        "(:" + "1" * 10_000,
        "dog++ " * 1_666,
        "(" * 2_500 + "a dog" + ":1)" * 2_500,
        "[" * 5_000 + "a dog" + "]" * 5_000,
    ],
    ids=range(10),
)
@pytest.mark.filterwarnings("ignore:the text encoder reads weights")
def test_no_prompt_takes_long(prompt):
    began = time.process_time()
    phrases._without_weights(prompt)
    assert time.process_time() - began < 0.4  # they take 0.1 at most; they took from 0.5 up to hours


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("(dog : red :1.3) and (a cat :1.)", "dog : red and a cat"),
        ("((a dog:1.2) and (a cat:.5):1.3)", "a dog and a cat"),
        ("( (a [big] dog) ) BREAK BREAK a  |  b", "a big dog, , a, b"),
        ("a dog:(1.3)1", "a dog"),
    ],
)
@pytest.mark.filterwarnings("ignore:the text encoder reads weights")
def test_weights_within_weights(prompt, plain):
    assert phrases._without_weights(prompt) == plain


def test_a_long_prompt_is_quoted_in_short():
    with pytest.raises(PhraseError, match=r"\.\.\. are: 'dog', .* and \d+ more\. Give .*phrases=") as caught:
        find_phrases("a dog, a cat and a hat on the beach. " * 40, 2)
    assert len(str(caught.value)) < 500
    with pytest.raises(PhraseError, match=r"\.\.\., but occurs 0 times") as caught:
        find_in_prompt("a cat " * 200, "dog")
    assert len(str(caught.value)) < 400


def test_the_error_lists_what_was_found():
    with pytest.raises(PhraseError, match="'dog', 'teapot', 'beach'.*--phrase"):
        find_phrases("a dog and a teapot on the beach", 4)
    with pytest.raises(PhraseError, match="are: none"):
        find_phrases("it is raining", 1)


def test_a_missing_language_model_is_an_error_that_helps(monkeypatch):
    def missing(name, **_):
        raise OSError(name)

    phrases._language.cache_clear()
    monkeypatch.setattr(spacy, "load", missing)
    with pytest.raises(PhraseError, match=r"en_core_web_sm.*phrases=\["):
        noun_phrases("a dog")
    phrases._language.cache_clear()


def test_find_in_prompt_reads_whole_words_in_any_case():
    prompt = "A hotdog, a Dog and (a  red\ndog)."
    assert find_in_prompt(prompt, "dog") == (12, 15)
    assert find_in_prompt(prompt, "DOG", 1) == (28, 31)
    assert find_in_prompt(prompt, "red dog") == (24, 31)


@pytest.mark.parametrize(
    ("phrase", "occurrence", "message"),
    [
        ("cat", 0, "'cat' is needed in the prompt"),
        ("dog", 1, "needed 2 times.*occurs 1 time:"),
        ("do", 0, "occurs 0 times"),
        ("  ", 0, "empty"),
    ],
)
def test_what_is_not_in_the_prompt_is_an_error(phrase, occurrence, message):
    with pytest.raises(PhraseError, match=message):
        find_in_prompt("a dog on the beach", phrase, occurrence)


@pytest.mark.parametrize(
    ("prompt", "phrase", "occurrence", "span"),
    [
        ("a dog and a teapot", "dog", 0, (2, 3)),
        ("a dog and a teapot", "teapot", 0, (5, 6)),
        ("a red dog, a dog", "red dog", 0, (2, 4)),
        ("a red dog, a dog", "dog", 1, (6, 7)),
        ("Dog!", "dog", 0, (1, 2)),
        ("a bird and a dog", "bird", 0, (2, 6)),  # four tokens, as the tiny tokenizer does not know the word
    ],
)
def test_token_span(tokenizer, prompt, phrase, occurrence, span):
    assert token_span(tokenizer, prompt, phrase, occurrence) == span
    start, end = span
    decoded = tokenizer.decode(tokenizer(prompt)["input_ids"][start:end]).replace(" ", "")
    assert decoded == phrase.replace(" ", "")


def test_a_phrase_beyond_the_limit_is_an_error(tokenizer):
    fits = "a " * 37 + "dog"  # with both ends 40 tokens
    assert token_span(tokenizer, fits, "dog") == (38, 39)
    with pytest.raises(PhraseError, match="beyond the 40 tokens"):
        token_span(tokenizer, "a " + fits, "dog")


def test_what_the_limit_cuts_off(tokenizer):
    assert beyond_limit(tokenizer, "a " * 38) == ""
    assert beyond_limit(tokenizer, "a " * 38 + "red dog") == "red dog"


def test_characters_that_the_tokenizer_drops(tokenizer, monkeypatch):
    monkeypatch.setattr(phrases, "_offsets", lambda *_: [(0, 0), (0, 1), (0, 0)])
    with pytest.raises(PhraseError, match="drops the phrase"):
        token_span(tokenizer, "a dog", "dog")
