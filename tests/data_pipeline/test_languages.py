import pytest

from data_pipeline.languages import SMALL_WORDS, SPACY_MODELS, other_language


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("Ein Hund spielt mit einem roten Ball", "German"),
        ("un chien sur la plage", "French"),
        ("un perro corre por la playa", "Spanish"),
        ("Una donna cammina con il suo cane", "Italian"),
        ("Due bambini mangiano un gelato", "Italian"),
        ("Kinder spielen Ball", "German"),
        ("En hund løber på stranden med to børn", "Danish"),
        ("Nainen ja koira on puistossa", "Finnish"),
        ("Um homem está andando de bicicleta", "Portuguese"),
        ("Een hond speelt met een bal", "Dutch"),
        ("Pies biega po plaży", "Polish"),
        ("Bir köpek sahilde koşuyor", "Turkish"),
        ("Seekor anjing berlari di pantai", "Indonesian"),
        ("Một con chó đang chạy trên bãi biển", "Vietnamese"),
        ("Собака бежит по пляжу", "Russian"),
        ("一只狗在海滩上跑", "Chinese"),
        ("犬がビーチで走っている", "Japanese"),
        ("개가 해변에서 뛰고 있다", "Korean"),
        ("Σκύλος στην παραλία", "Greek"),
        ("كلب على الشاطئ", "Arabic"),
    ],
)
def test_captions_of_other_languages(caption, language):
    assert other_language(caption) == language


@pytest.mark.parametrize(
    "caption",
    [
        "dog",
        "",
        "🐶🐶 12",
        "Los Angeles skyline",
        "Chef en route to cafe",
        "La Sagrada Familia in Barcelona",
        "Une fille in a café holds a piñata and a crème brûlée",
        "a close-up, chef de cuisine, à la carte, on a plate",
        "A man says 你好 to a dog",
        "people do yoga, no music, a van",
        "a boy eats pies in a barn",
        "a kind man in a hat will die",
    ],
)
def test_foreign_words_do_not_make_an_english_caption_foreign(caption):
    assert other_language(caption) == ""


def test_no_english_small_word_speaks_for_another_language():
    for language, words in SMALL_WORDS.items():
        assert language == "English" or SMALL_WORDS["English"].isdisjoint(words), language


def test_what_is_expected_is_not_other():
    assert other_language("un chien sur la plage", "French") == ""
    assert other_language("a dog on a beach", "French") == "English"
    assert other_language("Σκύλος στην παραλία", "Greek") == ""


def test_no_language_is_offered_that_is_not_recognised():
    assert set(SPACY_MODELS) <= {*SMALL_WORDS, "Greek"}
