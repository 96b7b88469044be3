"""Step 4: the people and things that the caption names."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_pipeline.errors import SettingsError
from data_pipeline.languages import OTHER_LANGUAGE, SPACY_MODELS, english
from data_pipeline.pairs_format import MOST_PHRASE
from data_pipeline.records import Entity, FramePair, NamedPair, Rejected
from data_pipeline.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from data_pipeline.models.language import Chunk


SUBJECTS = ("all", "people", "things")
CACHE_SIZE = 100_000
DENIED = "the caption denies something, which is not asked for"


@dataclass(kw_only=True)
class FindEntities(Step[FramePair, NamedPair]):
    """Noun chunks of the caption as singular nouns with their compounds, colours and materials; what is named twice
    counts once.

    subjects: "all", or only "people" or "things" (animals are things). stop_words, scenery: nouns that are no
    subjects; a few stop words are kept where something describes them ("an orange top" is a garment, "the top" a
    place). language_models: spaCy models to try, in this order; empty for the usual names. max_subjects: detectors get
    slower and more confused with every phrase; the first ones of the caption are kept.
    """

    subjects: str = "all"
    stop_words: frozenset[str] = english.STOP_WORDS
    scenery: frozenset[str] = english.SCENERY
    language_models: tuple[str, ...] = ()
    max_subjects: int = 12

    def __post_init__(self) -> None:
        if self.subjects not in SUBJECTS:
            raise SettingsError(f"subjects must be one of {', '.join(SUBJECTS)}, got {self.subjects!r}")
        if self.max_subjects < 1:
            raise SettingsError(f"max_subjects must be at least 1, got {self.max_subjects}")

    @property
    def preload(self) -> tuple[str, ...]:
        """See Step."""
        return (f"data_pipeline.models.language{'' if self.language_models else '_loaded'}",)

    def setup(self) -> None:
        """Loads the language model."""
        from data_pipeline.models.language import MODELS, load_chunker

        self._chunker = load_chunker(self.language_models or MODELS)
        self._known: dict[str, tuple[tuple[Entity, ...], tuple[str, ...]] | Rejected] = {}

    def process(self, frames: FramePair) -> NamedPair | Rejected:
        """The pair with its entities."""
        caption = frames.video.caption
        if caption not in self._known:
            if len(self._known) >= CACHE_SIZE:
                self._known.clear()
            self._known[caption] = self._read(caption)
        found = self._known[caption]
        if isinstance(found, Rejected):
            return found
        entities, notes = found
        return NamedPair(frames=frames, entities=entities, notes=notes)

    def _read(self, caption: str) -> tuple[tuple[Entity, ...], tuple[str, ...]] | Rejected:
        """Entities and notes of a caption, or why there are none."""
        if language := self._chunker.other_language(caption):
            evidence = {"caption": caption, "language": language}
            if language in SPACY_MODELS:
                evidence["needed"] = f"--language-model {SPACY_MODELS[language]}"
            return Rejected(f"{OTHER_LANGUAGE}{self._chunker.language}", evidence)
        chunks = self._chunker.chunks(caption)
        entities = self.entities(chunks)
        denied = self.entities([replace(chunk, denied=False) for chunk in chunks if chunk.denied])
        if not entities:
            evidence = {"caption": caption, "subjects": self.subjects}
            if denied:
                evidence["denied"] = [entity.phrase for entity in denied]
            return Rejected("no entity in the caption", evidence)
        if long := next((entity for entity in entities if len(entity.phrase) > MOST_PHRASE), None):
            evidence = {"characters": len(long.phrase), "most": MOST_PHRASE, "phrase": long.phrase[:80]}
            return Rejected("phrase of too many characters", evidence)
        return entities, (DENIED,) if denied else ()

    def entities(self, chunks: Sequence[Chunk]) -> tuple[Entity, ...]:
        """Entities of the noun chunks of one caption, in its order, each phrase once."""
        found: list[Entity] = []
        described: list[tuple[str, frozenset[str]]] = []  # head and describing words of each
        for chunk in split_doers(split_owners(map(without_verb, join_colours(without_lone_colours(chunks))))):
            head = singular(*chunk.words[-1][:2])
            kept = describing_words(chunk)
            if chunk.denied or not self._is_subject(chunk, head, kept):
                continue
            phrase = " ".join([*kept, head])
            words = frozenset(kept) - {"and"}
            if any(known == head and same_one(words, before, chunk.definite) for known, before in described):
                continue
            described.append((head, words))
            kind = "person" if is_person(head, kept) else "thing"
            found.append(Entity(phrase=phrase, head=head, mention=chunk.text, position=chunk.position, kind=kind))
        wanted = {"all": ("person", "thing"), "people": ("person",), "things": ("thing",)}[self.subjects]
        return tuple(entity for entity in found if entity.kind in wanted)[: self.max_subjects]

    def _is_subject(self, chunk: Chunk, head: str, kept: Sequence[str]) -> bool:
        bare = len(chunk.words) == 1
        if not any(letter.isalpha() for letter in head) or (
            head in english.COLOURS and not is_colour_thing(chunk, head)
        ):
            return False
        if head in english.GROUPS_OF_PEOPLE and not chunk.counts:
            return True
        if head in self.stop_words and not (kept and head in english.THINGS_IF_DESCRIBED):
            return False
        idea = len(head) > 6 and head.endswith(english.IDEA_ENDINGS) and head not in english.THINGS_WITH_SUCH_ENDINGS
        if idea and chunk.words[-1][0] == head:
            return False
        # "in Paris", but not "in front of a MacBook".
        place = chunk.proper and chunk.preposition in english.LOCATIVES and chunk.words[0][0] not in ("a", "an")
        if (head in self.scenery and "toy" not in kept) or place:
            return False
        if head in english.PATTERNS and chunk.preposition in ("with", "in"):
            return False
        if head in english.BODY_PARTS:
            if head in english.HAIR:
                return False
            if (
                head in english.LIMBS
                and (chunk.owned or (bare and chunk.counts))
                and (chunk.subject or chunk.preposition == "of")
            ):  # "a woman's hands hold a cup", "Hand of a child"
                return True
            alone = bare and chunk.words[-1][0] == head
            if (
                chunk.possessed
                or (chunk.definite and chunk.counts)
                or alone
                or chunk.preposition in ("with", "on", "by")
            ):
                return False
        # "looks at a camera", "the camera zooms in": the one that takes the film
        if head == "camera" and not kept and (chunk.preposition or chunk.words[0][0] == "the"):
            return False
        if head in english.PASTIMES and chunk.words[0][2] != "determiner":  # "plays ping pong"
            return False
        return not (bare and head.endswith("ing") and head not in english.THINGS_IN_ING)


def split_owners(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Owners written without their apostrophe: "a mans hat" is a man and a hat."""
    for chunk in chunks:
        text, _, role = chunk.words[-2] if len(chunk.words) > 1 else ("", "", "")
        owner = english.IRREGULAR_OWNERS.get(text, text[:-1])
        if not (role == "compound" and text.endswith("s") and owner in english.PEOPLE and not chunk.owned):
            yield chunk
            continue
        head = chunk.words[-1][0]
        yield replace(chunk, text=chunk.text[: -len(head)].rstrip(), words=(*chunk.words[:-2], (text, owner, "head")))
        yield replace(
            chunk,
            text=chunk.text[-len(head) :],
            position=chunk.position + len(chunk.text) - len(head),
            words=chunk.words[-1:],
            possessed=True,
            owned=True,
            definite=True,
        )


def split_doers(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Headlines that the parser took for one noun: "Farmer holding box" is a farmer and a box."""
    for chunk in chunks:
        plain = chunk.words[0][2] != "determiner"  # "a baby changing table" is one
        for i, (doer, lemma, _) in enumerate(chunk.words[:-2]):
            verb = chunk.words[i + 1][0]
            if does(doer, lemma) and verb.endswith("ing") and (plain or verb not in english.KINDS):
                before, between, behind = re.split(rf"( {re.escape(verb)} )", chunk.text, maxsplit=1, flags=re.I)
                words = (*chunk.words[:i], (doer, lemma, "head"))
                yield replace(chunk, text=before, words=words, subject=True, counts=False)
                place = chunk.position + len(before + between)
                chunk = replace(chunk, text=behind, position=place, words=chunk.words[i + 2 :], subject=False)
                break
        yield chunk


def does(text: str, lemma: str) -> bool:
    """True for people and animals."""
    return not {text, lemma}.isdisjoint(english.PEOPLE | english.GROUPS_OF_PEOPLE | english.ANIMALS) or is_person(
        lemma, ()
    )


def without_verb(chunk: Chunk) -> Chunk:
    """Without the verb taken for the noun: "an orange helmet looking" is a helmet, "the nurse waves" a nurse."""
    if len(chunk.words) < 2:
        return chunk
    text, (noun, lemma, role) = chunk.words[-1][0], chunk.words[-2]
    one = chunk.words[0][0] in ("a", "an") or chunk.preposition in ("with", "in")
    doer = does(noun, lemma)
    doing = text.endswith("ing") and text not in english.THINGS_IN_ING and role == "compound" and (one or doer)
    deed = doer and text.endswith("s") and not english.STOP_WORDS.isdisjoint((text[:-1], text[:-2]))
    if not (doing or deed):
        return chunk
    return replace(chunk, text=chunk.text[: -len(text)].rstrip(), words=(*chunk.words[:-2], (noun, lemma, "head")))


def is_colour_thing(chunk: Chunk, head: str) -> bool:
    """True for "an orange", "two peaches", "ice cream", "eats peach", but not for "in orange" and "shades of peach"."""
    if head not in english.COLOURED_THINGS:
        return False
    is_thing = len(chunk.words) > 1 or chunk.words[-1][0] != head
    return is_thing or not (chunk.preposition in english.COLOUR_PREPOSITIONS or chunk.part_of in english.COLOUR_WORDS)


def without_lone_colours(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Without colours that the parser took for nouns of their own: "a purple and orange" before "sneaker"."""
    following = [*(chunk.position for chunk in chunks[1:]), -1]
    ends = (chunk.position + len(chunk.text) + 1 for chunk in chunks)
    return [
        chunk
        for chunk, end, behind in zip(chunks, ends, following, strict=False)
        if end != behind or chunk.words[-1][0] not in english.COLOURS
    ]


def join_colours(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Puts together what parsers tear apart: "a grey" and "white kitten" become "a grey and white kitten"."""
    joined: list[Chunk] = []
    for chunk in chunks:
        first = chunk.words[0][0]
        side_by_side = joined and chunk.position == joined[-1].position + len(joined[-1].text) + len(" and ")
        if (
            side_by_side
            and chunk.joined
            and joined[-1].words[-1][0] in english.COLOURS
            and first in english.COLOURS
            and len(chunk.words) > 1
        ):
            before = joined.pop()
            text, lemma, _ = before.words[-1]
            words = (*before.words[:-1], (text, lemma, "adjective"), ("and", "and", "and"), *chunk.words)
            chunk = replace(
                before, text=f"{before.text} and {chunk.text}", words=words, counts=chunk.counts, proper=chunk.proper
            )
        joined.append(chunk)
    return joined


def describing_words(chunk: Chunk) -> list[str]:
    """Compounds, colours, materials and kinds before the head: ["white", "soccer"] of "a white soccer ball"."""
    words = [part for word in chunk.words for part in parts_of_colour(*word)]
    texts = [text for text, _, _ in words]
    kept: list[str] = []
    for i, (text, _, role) in enumerate(words[:-1]):
        following = texts[i + 1]
        if role == "and":
            if kept and kept[-1] == texts[i - 1] and kept[-1] in english.COLOURS and following in english.COLOURS:
                kept.append(text)
        elif (
            role == "compound"
            or (
                role == "adjective"
                and (text in english.DESCRIBING or words[i + 1][1] in english.KINDS_BEFORE.get(text, ()))
            )
            or (role == "adjective" and text in english.SHADES and following in english.COLOURS)
        ):
            kept.append(text)
    return kept


def parts_of_colour(text: str, lemma: str, role: str) -> list[tuple[str, str, str]]:
    """The words of a hyphenated colour: "light-blue", "black-and-white"; any other word as it is."""
    parts = text.split("-")
    if (
        len(parts) == 1
        or role == "head"
        or not all(part in english.COLOURS | english.SHADES or part == "and" for part in parts)
    ):
        return [(text, lemma, role)]
    return [(part, part, "and" if part == "and" else "adjective") for part in parts]


def same_one(words: frozenset[str], before: frozenset[str], definite: bool) -> bool:
    """True if a noun that ``words`` describe is the one named before with other words: "the dog" after "a brown dog",
    or "the brown dog" after "a dog". "A blue cup" after "a red cup" is another one.
    """
    return words == before or (definite and (words < before or not before))


def is_person(head: str, kept: Sequence[str]) -> bool:
    """True for the heads of people: a list of words, and what ends in -man, -woman, -boy, -girl, -person, -player or
    -ist. A list and endings, rather than a network's guess, because a wrong word can then be found and corrected.
    """
    if kept and kept[-1] in english.MACHINES:
        return False
    if head in english.PEOPLE:
        return True
    if head in english.NO_PEOPLE:
        return False
    return head.endswith(english.PERSON_ENDINGS) or (head.endswith("ist") and len(head) > 6)


def singular(text: str, lemma: str) -> str:
    """The lemma of a noun, or its text where there is no singular ("jeans")."""
    return text if text in english.PLURAL_ONLY else english.IRREGULAR.get(text, lemma)
