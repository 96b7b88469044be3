"""What is kept over a run: one text, one precision, one state of the weights; and nothing beyond."""

import copy
import gc
import pickle

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from msdiffusion.attention.control import Layer, Participants, Step
from msdiffusion.attention.rows import guided
from msdiffusion.attention.text_cache import Runs
from msdiffusion.attention.unet import ControlledAttnProcessor

NAME = "mid_block/attn2"


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Attention(8, cross_attention_dim=8, heads=2, dim_head=4).requires_grad_(False)


@torch.no_grad()
def test_text_keys_are_computed_once_per_text(layer):
    calls = []

    class Counting(torch.nn.Linear):
        def forward(self, states):
            calls.append(states)
            return super().forward(states)

    text, hidden, runs = torch.randn(2, 5, 8), torch.randn(2, 9, 8), Runs()
    expected = layer(hidden, encoder_hidden_states=text)
    whole, layer.to_k = layer.to_k, Counting(8, 8, bias=False)
    layer.to_k.load_state_dict(whole.state_dict())
    layer.set_processor(ControlledAttnProcessor(Layer(NAME, "cross", "mid_block", 0, 8, 2)))
    step = Step(torch.zeros(2, 4, 3, 3), 500, guided(2, False), (3, 3))

    def run():
        taking = Participants(step, [], runs.begin(text).cache(text))
        return layer(hidden, encoder_hidden_states=text, participants=taking)

    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)
    assert len(calls) == 1
    text.mul_(2)  # changed in place: what was kept must not serve it
    assert not torch.equal(run(), expected)
    assert len(calls) == 2
    text = text.clone()
    run()
    assert len(calls) == 3
    layer.set_processor(AttnProcessor2_0())


@torch.no_grad()
def test_keys_are_kept_for_one_precision_and_state_of_the_weights(layer):
    text, runs = torch.randn(2, 5, 8), Runs()

    def key():
        return runs.begin(text).cache(text).states(NAME, layer, text)[0]

    first = key()
    assert key() is first
    with torch.autocast("cpu", torch.bfloat16):
        assert key().dtype == torch.bfloat16
    again = key()
    assert again is not first
    layer.to_k.weight.mul_(2)
    torch.testing.assert_close(key(), 2 * again)
    with torch.enable_grad():
        assert runs.begin(text).cache(text) is None
    with torch.inference_mode():
        inside = text.clone()
        assert runs.begin(inside).cache(inside) is None  # nobody counts its changes


@torch.no_grad()
def test_runs_count_their_calls_side_by_side_and_go_with_their_text():
    one, other, runs = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), Runs()
    assert [runs.begin(text).number for text in (one, one, other, one, other)] == [0, 1, 0, 2, 1]
    one.add_(1)
    assert runs.begin(one).number == 0
    assert len(runs._runs) == 2
    for copied in (copy.copy(runs), copy.deepcopy(runs), pickle.loads(pickle.dumps(runs))):
        assert len(copied._runs) == 0
    runs.begin(other).cache(other)
    del one, other
    gc.collect()
    assert len(runs._runs) == 0


@torch.no_grad()
def test_other_states_than_the_text_are_kept_while_they_are_the_same(layer):
    """As a control makes them."""
    text, states, runs = torch.zeros(2, 5, 8), torch.randn(2, 5, 8), Runs()
    first = runs.begin(text).cache(states).states(NAME, layer, states)[0]
    assert runs.begin(text).cache(states).states(NAME, layer, states)[0] is first
    others = states.clone()
    assert runs.begin(text).cache(others).states(NAME, layer, others)[0] is not first


@torch.no_grad()
def test_another_text_in_between_gets_its_own_keys(layer):
    """As where a control calls the denoiser inside of a call, or in another thread."""
    text, states, runs = torch.zeros(2, 5, 8), torch.randn(2, 5, 8), Runs()
    cache = runs.begin(text).cache(text)
    outer = cache.states(NAME, layer, text)[0]
    runs.begin(text).cache(states).states(NAME, layer, states)
    assert torch.equal(cache.states(NAME, layer, text)[0], outer)
