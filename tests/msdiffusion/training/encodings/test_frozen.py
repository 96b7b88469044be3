import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msdiffusion.training.encodings.frozen import FrozenEncodings


@pytest.fixture(scope="module")
def shipped():
    """The shipped base: wide enough that rounding depends on how many prompts are encoded together."""
    from msdiffusion.backbone.backbone import Backbone
    from msdiffusion.places import DEFAULT_MODEL

    return Backbone.from_pretrained(DEFAULT_MODEL / "base", DEFAULT_MODEL / "image_encoder", device="cpu")


class Pipeline:
    def encode_prompt(self):
        """Only its module is asked for."""


class Letters:
    """A tokenizer of five letters, beside the two special tokens."""

    model_max_length = 7

    def __call__(self, prompt, **options):
        return {"offset_mapping": [(0, 0), *((i, i + 1) for i in range(len(prompt))), (0, 0)]}


class CountingBackbone:
    """Encodes a string as its length and a picture as its mean, and writes down what it was asked."""

    device = torch.device("cpu")
    pipeline, tokenizer = Pipeline(), Letters()

    def __init__(self):
        self.asked = []

    def encode_prompts(self, prompts):
        self.asked.append(list(prompts))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return lengths.view(-1, 1, 1).expand(-1, 4, 2), lengths.view(-1, 1)

    def encode_phrases(self, phrases):
        self.asked.append(list(phrases))
        return torch.tensor([[float(len(phrase))] for phrase in phrases])

    def encode_references(self, pixels, features="tokens"):
        self.asked.append(len(pixels))
        return pixels.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 3, 2)


@pytest.mark.parametrize("keep", [False, True])
def test_captions_that_are_too_long_are_counted_once(keep):
    encodings = FrozenEncodings(CountingBackbone(), keep=keep)
    assert encodings.long_captions.told() is None
    encodings.prompts(["abcde", ""])
    assert encodings.long_captions.told() is None
    for _ in range(2):  # epochs
        encodings.prompts(["abcdefg", "abcde"])
        told = encodings.long_captions.told()
        assert told.startswith("1 caption is longer than the 7 tokens") and told.endswith("ignored, as 'fg'")
    encodings.prompts(["abcdefgh"])
    assert encodings.long_captions.told().startswith("2 captions are longer")


def test_the_library_does_not_print_each_of_them(shipped, caplog):
    long = "a dog and a teapot on the beach " * 20
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.propagate = logging.getLogger("diffusers").propagate = True
    try:
        encodings = FrozenEncodings(shipped, keep=False)
        encodings.prompts([long, f"{long} again"])
        assert caplog.messages == []
        shipped.encode_prompts([long])  # somebody else's captions are none of its business
        assert "input was truncated" in caplog.text
    finally:
        transformers_logger.propagate = logging.getLogger("diffusers").propagate = False
    assert encodings.long_captions.told().startswith("2 captions are longer than the 40 tokens")


@pytest.mark.parametrize("keep", [False, True])
def test_repetitions_are_encoded_once(keep):
    backbone = CountingBackbone()
    encodings = FrozenEncodings(backbone, keep=keep)
    states, pooled = encodings.prompts(["a", "bcd", "a"])
    assert states.shape == (3, 4, 2)
    assert pooled.flatten().tolist() == [1, 3, 1]
    assert encodings.phrases(["xy", "", "xy"]).flatten().tolist() == [2, 0, 2]
    assert backbone.asked == ([["a"], ["bcd"], ["xy"], [""]] if keep else [["a", "bcd"], ["xy", ""]])


def test_kept_answers_are_not_asked_again():
    backbone = CountingBackbone()
    encodings = FrozenEncodings(backbone, keep=True)
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    first = encodings.references(["a", "b", "c", "d"], pixels)
    second = encodings.references(["e", "b", "a"], torch.stack([pixels[3] + 5, pixels[1], pixels[0]]))
    assert first[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert second[:, 0, 0].tolist() == [8, 1, 0]
    assert backbone.asked == [1] * 5


@pytest.mark.exact
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6))
def test_what_is_kept_does_not_depend_on_its_company(shipped, order, cut):
    """So that a run that was resumed in the middle of an epoch sees the same bits."""
    captions = ["a red dog", "a cat", "two hats on a table", "a", "a dog and a cat in a room", ""]
    together, apart = FrozenEncodings(shipped, keep=True), FrozenEncodings(shipped, keep=True)
    expected = together.prompts(captions)
    for part in (order[:cut], order[cut:]):
        if part:
            for all_of_them, found in zip(expected, apart.prompts([captions[i] for i in part]), strict=True):
                assert torch.equal(all_of_them[part], found)


def test_without_keeping_every_call_asks():
    backbone = CountingBackbone()
    encodings = FrozenEncodings(backbone, keep=False)
    encodings.phrases(["dog"])
    encodings.phrases(["dog"])
    assert backbone.asked == [["dog"], ["dog"]]


def test_kept_rows_do_not_hold_their_batch_in_memory():
    encodings = FrozenEncodings(CountingBackbone(), keep=True)
    encodings.references(["a", "b"], torch.zeros(2, 3, 2, 2))
    (tokens,) = encodings._references["a"]
    assert tokens.untyped_storage().nbytes() == tokens.nbytes


def test_the_zero_reference_is_encoded_once():
    backbone = CountingBackbone()
    encodings = FrozenEncodings(backbone, keep=False)
    for _ in range(2):
        assert encodings.zero_reference(torch.ones(2, 4, 3, 2, 2)).tolist() == [[0, 0]] * 3
    assert backbone.asked == [1]
