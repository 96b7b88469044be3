"""The words of the embedded detector, as a tokenizer of BERT's kind.

Grounding DINO finds the ends of phrases by four fixed token numbers, those of BERT's own vocabulary; so they are at the
same places here. Words that are not in the list are spelled in letters.
"""

import json
import string
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_pipeline.errors import InputError
from data_pipeline.models.model_claims import check_network
from data_pipeline.world.palette import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS

SPECIAL = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
SIZE = 1030
MAX_TOKENS = 256
ADJECTIVES = ("striped", "banded", "dotted", "patched", "checked", "plain", "small", "big", "little")
PLACES = (*BACKGROUNDS, "cobblestone")
OTHER_THINGS = (
    "person", "man", "woman", "boy", "girl", "child", "baby", "people", "hand", "face", "tree", "flower", "sky", "sun",
    "cloud", "sea", "water", "sand", "road", "house", "window", "door", "wall", "floor", "table", "chair", "sofa",
    "bed", "lamp", "book", "phone", "computer", "cup", "bottle", "bowl", "plate", "knife", "fork", "bag", "box", "ball",
    "bird", "horse", "cow", "sheep", "elephant", "bear", "mouse", "rabbit", "bicycle", "bus", "truck", "train", "boat",
    "plane", "shirt", "dress", "shoe", "umbrella", "guitar", "piano", "cake", "apple", "banana", "orange", "bread",
    "mountain", "river", "city", "park", "kitchen", "field", "forest", "garden", "camera", "toy", "stone",
)  # fmt: skip
"""Things that the world does not have: asked for in training, so that the detector learns not to find them."""
FUNCTION_WORDS = ("a", "an", "the", "and", "with", "in", "on", "of", "s")


def vocabulary() -> list[str]:
    """The tokens in the order of their numbers, SIZE of them; unused places are called [unused0], [unused1], ..."""
    tokens: list[str | None] = [None] * SIZE
    for token, number in SPECIAL.items():
        tokens[number] = token
    letters = (*string.ascii_lowercase, *string.digits)
    rest = [*letters, *(f"##{letter}" for letter in letters), *"-,'!&"]
    words = (*CATEGORIES, *COLORS, *PATTERNS, *ADJECTIVES, *PLACES, *OTHER_THINGS, *FUNCTION_WORDS)
    rest += [word for word in dict.fromkeys(words) if word not in rest]
    free = [number for number, token in enumerate(tokens) if token is None]
    rest += [f"[unused{number}]" for number in range(len(free) - len(rest))]
    for number, token in zip(free, rest, strict=True):
        tokens[number] = token
    return [str(token) for token in tokens]


def write_tokenizer(folder: Path) -> None:
    """vocab.txt and tokenizer_config.json, which AutoTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocabulary()), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": MAX_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A folder's tokenizer; InputError if its special tokens are not where Grounding DINO looks for them."""
    check_network(folder, tokenizer=True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    for token in ("[CLS]", "[SEP]", ".", "?"):
        if tokenizer.convert_tokens_to_ids(token) != SPECIAL[token]:
            raise InputError(
                f"the tokenizer in {folder} gives {token!r} the number {tokenizer.convert_tokens_to_ids(token)}; "
                f"Grounding DINO needs {SPECIAL[token]}: train the detector anew with this version"
            )
    return tokenizer
