"""Step 4: the things that the caption names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from data_pipeline.records import Entity, FramePair, NamedPair, Rejected, SettingsError
from data_pipeline.step import Step

if TYPE_CHECKING:
    from data_pipeline.models.language import Chunk

# Nouns that name a place in the picture, a quantity, or the picture itself. "in front of a house" gives a noun chunk
# "front".
STOP_WORDS = [
    "air",
    "area",
    "back",
    "background",
    "bit",
    "bottom",
    "bunch",
    "camera",
    "center",
    "centre",
    "clip",
    "close-up",
    "closeup",
    "collection",
    "corner",
    "couple",
    "day",
    "distance",
    "dozen",
    "edge",
    "end",
    "footage",
    "foreground",
    "frame",
    "front",
    "fun",
    "group",
    "half",
    "handful",
    "image",
    "kind",
    "left",
    "line",
    "lot",
    "middle",
    "moment",
    "number",
    "pair",
    "part",
    "photo",
    "photograph",
    "picture",
    "piece",
    "pile",
    "place",
    "portion",
    "position",
    "range",
    "right",
    "row",
    "scene",
    "screen",
    "series",
    "set",
    "shot",
    "side",
    "sort",
    "space",
    "spot",
    "stack",
    "style",
    "surrounding",
    "thing",
    "time",
    "top",
    "type",
    "variety",
    "video",
    "view",
    "way",
]
# Words without a singular, which spaCy's lemmatizer cuts all the same ("trouser", "jean").
PLURAL_ONLY = frozenset(
    [
        "binoculars",
        "clothes",
        "glasses",
        "goggles",
        "headphones",
        "jeans",
        "leggings",
        "overalls",
        "pajamas",
        "pants",
        "pliers",
        "scissors",
        "shorts",
        "sunglasses",
        "tights",
        "tongs",
        "trousers",
        "tweezers",
    ]
)
CACHE_SIZE = 100_000


@dataclass(kw_only=True)
class FindEntities(Step[FramePair, NamedPair]):
    """Noun chunks of the caption, as singular nouns with their compounds; a noun that is named twice counts once.

    stop_words: nouns that are no subjects; one that carries an adjective or a compound is kept ("an orange top" is a
    garment, "the top" a place). language_models: spaCy models to try, in this order; empty for the usual names.
    max_entities: detectors get slower and more confused with every phrase; the first ones of the caption are kept.
    """

    preload: ClassVar[tuple[str, ...]] = ("data_pipeline.models.language",)
    stop_words: tuple[str, ...] = tuple(STOP_WORDS)
    language_models: tuple[str, ...] = ()
    max_entities: int = 12

    def __post_init__(self) -> None:
        if self.max_entities < 1:
            raise SettingsError(f"max_entities must be at least 1, got {self.max_entities}")

    def setup(self) -> None:
        """Loads the language model."""
        from data_pipeline.models.language import MODELS, load_chunker

        self._chunker = load_chunker(self.language_models or MODELS)
        self._known: dict[str, tuple[Entity, ...]] = {}

    def process(self, frames: FramePair) -> NamedPair | Rejected:
        """The pair with its entities."""
        caption = frames.video.caption
        if caption not in self._known:
            if len(self._known) >= CACHE_SIZE:
                self._known.clear()
            self._known[caption] = self.entities(self._chunker.chunks(caption))
        entities = self._known[caption]
        if not entities:
            return Rejected("no entity in the caption", {"caption": caption})
        return NamedPair(frames=frames, entities=entities)

    def entities(self, chunks: list[Chunk]) -> tuple[Entity, ...]:
        """Entities of the noun chunks of one caption, in its order, each phrase once."""
        found: dict[str, Entity] = {}
        for chunk in chunks:
            if chunk.words[-1][1] in self.stop_words and not any(
                role in ("adjective", "compound") for _, _, role in chunk.words
            ):
                continue
            head = singular(*chunk.words[-1][:2])
            compounds = [text for text, _, role in chunk.words if role == "compound"]
            phrase = " ".join([*compounds, head])
            if phrase not in found:
                found[phrase] = Entity(phrase=phrase, head=head, mention=chunk.text, position=chunk.position)
        return tuple(found.values())[: self.max_entities]


def singular(text: str, lemma: str) -> str:
    """The lemma of a noun, or its text where there is no singular ("jeans")."""
    return text if text in PLURAL_ONLY else lemma
