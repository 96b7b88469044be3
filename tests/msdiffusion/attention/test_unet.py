"""The attention processors: what is read is diffusers' own, whatever processor was there before, and controls."""

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

from msdiffusion.attention.control import Control, Layer, Participants, Step
from msdiffusion.attention.rows import guided
from msdiffusion.attention.unet import ControlledAttnProcessor, ControlledIPAdapterAttnProcessor
from msdiffusion.errors import RequestError

CROSS = Layer("mid_block/attentions/0/transformer_blocks/0/attn2", "cross", "mid_block", 0, 32, 4)
SELF = Layer("mid_block/attentions/0/transformer_blocks/0/attn1", "self", "mid_block", 0, 32, 4)
TEXT = 77


class Acting(Control):
    """Functions in place of methods."""

    def __init__(self, **hooks):
        self.hooks, self.calls = tuple(hooks), []
        for name, hook in hooks.items():
            setattr(self, name, lambda call, *states, hook=hook: self.calls.append(call) or hook(call, *states))

    def wants(self, layer):
        return self.hooks


def shifted(call, hidden):
    """Needs everything it may look at."""
    return hidden + call.query.mean() + call.key.mean() + call.value.mean()


def taking(*controls):
    return Participants(Step(torch.zeros(2, 4, 12, 12), 500, guided(2, False), (12, 12)), controls)


@pytest.fixture(scope="module")
def golden(golden_tensors):
    return golden_tensors("attention")


@pytest.fixture(scope="module")
def layer(golden):
    tensors, config = golden
    width = tensors["attn.to_q.weight"].shape[0]
    module = Attention(width, cross_attention_dim=width, heads=config["heads"], dim_head=width // config["heads"])
    module.load_state_dict({k.removeprefix("attn."): v for k, v in tensors.items() if k.startswith("attn.")})
    return module.requires_grad_(False)


def read(layer, golden, processor=None, *controls, cross=True, **options):
    tensors, _ = golden
    layer.set_processor(processor or AttnProcessor2_0())
    text = tensors["encoder_hidden_states"][:, :TEXT] if cross else None
    if controls:
        options["participants"] = taking(*controls)
    return layer(tensors["hidden_states"], encoder_hidden_states=text, **options)


@pytest.mark.exact
@pytest.mark.parametrize("where", [CROSS, SELF])
def test_without_controls_it_is_diffusers_own_attention_bit_for_bit(layer, golden, where):
    cross = where is CROSS
    own = read(layer, golden, ControlledAttnProcessor(where), cross=cross)
    assert torch.equal(own, read(layer, golden, cross=cross))


@pytest.mark.exact
@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
@pytest.mark.parametrize("where", [CROSS, SELF])
def test_controls_that_change_nothing_change_nothing(layer, golden, where, backend):
    """Bit for bit, also where they look at everything; the softmax backend may go another way in self-attention."""
    cross = where is CROSS
    own = ControlledAttnProcessor(where, backend)
    watching = Acting(
        sources=lambda call: call, weights=lambda call, weights: weights, result=lambda call, hidden: hidden
    )
    plain, watched = read(layer, golden, own, cross=cross), read(layer, golden, own, watching, cross=cross)
    assert len(watching.calls) == 3
    if cross or backend == "sdpa":
        assert torch.equal(watched, plain)
    torch.testing.assert_close(watched, plain)


@pytest.mark.exact
def test_softmax_backend_equals_diffusers_plain_attention(layer, golden):
    own = read(layer, golden, ControlledAttnProcessor(CROSS, "softmax"))
    torch.testing.assert_close(own, read(layer, golden, AttnProcessor()))


def test_text_masks_are_honoured(layer, golden):
    tensors, _ = golden
    text = tensors["encoder_hidden_states"][:, :TEXT]
    mask = torch.zeros(2, 1, TEXT)
    mask[:, :, 40:] = -10000.0
    results = []
    for processor in (
        AttnProcessor2_0(),
        ControlledAttnProcessor(CROSS),
        ControlledAttnProcessor(CROSS, "softmax"),
    ):
        layer.set_processor(processor)
        results.append(layer(tensors["hidden_states"], encoder_hidden_states=text, attention_mask=mask))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_controls_follow_one_another_in_the_order_given(layer, golden):
    double, add = Acting(result=lambda _, hidden: hidden * 2), Acting(result=lambda _, hidden: hidden + 1)
    own = ControlledAttnProcessor(CROSS)

    def before_output(*controls):
        return read(layer, golden, own, *controls) - layer.to_out[0].bias

    unit = torch.ones(2, 144, layer.to_q.in_features) @ layer.to_out[0].weight.T
    plain = before_output()
    torch.testing.assert_close(before_output(double, add), 2 * plain + unit)
    torch.testing.assert_close(before_output(add, double), 2 * plain + 2 * unit)


@pytest.mark.parametrize("where", [CROSS, SELF])
def test_every_hook_takes_part(layer, golden, where):
    """A map that is replaced, keys that are masked, and values that others have, against what they must give."""
    cross = where is CROSS
    own = ControlledAttnProcessor(where)
    keys = TEXT if cross else 144
    first = torch.zeros(1, 1, 1, keys)
    first[..., 0] = 1
    only = Acting(weights=lambda _, weights: first.expand_as(weights))
    barred = Acting(sources=lambda call: call.replaced(mask=first.bool()))
    torch.testing.assert_close(
        read(layer, golden, own, only, cross=cross), read(layer, golden, own, barred, cross=cross)
    )
    swapped = Acting(
        sources=lambda call: call.replaced(query=call.query.flip(0), key=call.key.flip(0), value=call.value.flip(0))
    )
    torch.testing.assert_close(
        read(layer, golden, own, swapped, cross=cross), read(layer, golden, own, cross=cross).flip(0)
    )
    call = swapped.calls[0]
    assert call.layer is where
    assert (call.text, call.image) == ((slice(None), slice(0, 0)) if cross else (slice(0, 0), slice(None)))
    assert call.query.shape == (2, 4, 144, 8)
    assert call.key.shape == call.value.shape == (2, 4, keys, 8)


def test_self_attention_that_others_take_part_in(layer, golden):
    """Shared self-attention whose masks are empty is one's own; with full ones, what is shared is read."""

    def sharing(open_to_others):
        def sources(call):
            others = [torch.cat([states, states.flip(0)], dim=2) for states in (call.key, call.value)]
            mask = torch.cat([torch.ones(144, dtype=torch.bool), torch.full((144,), open_to_others)])
            return call.replaced(key=others[0], value=others[1], mask=mask.view(1, 1, 1, -1))

        return Acting(sources=sources)

    own = ControlledAttnProcessor(SELF)
    alone = read(layer, golden, own, cross=False)
    torch.testing.assert_close(read(layer, golden, own, sharing(False), cross=False), alone)
    assert (read(layer, golden, own, sharing(True), cross=False) - alone).abs().max() > 1e-3


def test_a_processor_without_a_layer_passes_everything_on(layer, golden, caplog):
    """As diffusers makes one while it loads an IP-Adapter."""
    ours = ControlledAttnProcessor()
    for cross in (True, False):
        expected = read(layer, golden, cross=cross)
        assert torch.equal(read(layer, golden, ours, Acting(result=shifted), cross=cross), expected)
    assert not caplog.records


@pytest.mark.exact
@pytest.mark.parametrize("base", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(2)])
def test_another_processor_goes_on_working_inside_ours(layer, golden, base):
    inside = ControlledAttnProcessor(CROSS, base=base)
    assert torch.equal(read(layer, golden, inside), read(layer, golden, base))
    controlled = read(layer, golden, inside, Acting(result=shifted))
    expected = read(layer, golden, ControlledAttnProcessor(CROSS), Acting(result=shifted))
    torch.testing.assert_close(controlled, expected)
    assert not torch.equal(controlled, read(layer, golden, base))
    maps = []
    looking = Acting(weights=lambda _, weights: maps.append(weights) or weights)
    assert torch.equal(read(layer, golden, inside, looking), read(layer, golden, base))
    read(layer, golden, ControlledAttnProcessor(CROSS), looking)
    torch.testing.assert_close(maps[0], maps[1])
    for hooks in ({"weights": lambda _, weights: weights / 2}, {"sources": lambda call: call}):
        with pytest.raises(RequestError, match=f"wants to change what .*attn2 attends to, but {type(base).__name__}"):
            read(layer, golden, inside, Acting(**hooks))


@pytest.mark.exact
def test_an_ip_adapter_goes_on_working_inside_ours(layer, golden):
    tensors, _ = golden
    torch.manual_seed(0)
    width = layer.to_q.in_features
    base = IPAdapterAttnProcessor2_0(width, width, num_tokens=(4,), scale=0.7)
    text = (tensors["encoder_hidden_states"][:, :TEXT], [torch.randn(2, 1, 4, width)])

    def run(processor, *controls):
        layer.set_processor(processor)
        options = {"participants": taking(*controls)} if controls else {}
        with torch.no_grad():
            return layer(tensors["hidden_states"], encoder_hidden_states=text, **options)

    expected = run(base)
    ours = ControlledIPAdapterAttnProcessor(base, CROSS)
    assert isinstance(ours, IPAdapterAttnProcessor2_0)
    assert torch.equal(run(ours), expected)
    assert torch.equal(run(ours, Acting(result=lambda _, hidden: hidden)), expected)
    assert not torch.equal(run(ours, Acting(result=shifted)), expected)
    ours.scale[0] = 0.0  # what set_ip_adapter_scale does
    assert torch.equal(run(ours), read(layer, golden))


def test_what_comes_past_the_hook_is_refused(layer, golden):
    for processor in (ControlledAttnProcessor(CROSS), ControlledAttnProcessor()):
        for given in ({"subjects": Control()}, {"controls": [Control()]}):
            with pytest.raises(RequestError, match="call the denoiser itself"):
                read(layer, golden, processor, **given)
        read(layer, golden, processor, subjects=None, controls=[])


@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
def test_a_map_that_is_changed_in_place_is_changed(layer, golden, backend):
    own = ControlledAttnProcessor(CROSS, backend)
    halved = Acting(weights=lambda _, weights: weights / 2)
    in_place = Acting(weights=lambda _, weights: weights.div_(2))
    assert torch.equal(read(layer, golden, own, in_place), read(layer, golden, own, halved))
    inside = ControlledAttnProcessor(CROSS, base=SlicedAttnProcessor(2))
    with pytest.raises(RequestError, match="wants to change what"):
        read(layer, golden, inside, in_place)


def test_wrong_words_of_a_control_are_refused(layer, golden):
    odd = Acting()
    odd.hooks = ("results",)
    with pytest.raises(RequestError, match="Acting wants 'results': hooks are sources, weights, result"):
        read(layer, golden, ControlledAttnProcessor(CROSS), odd)
    with pytest.raises(TypeError, match="keys"):
        read(layer, golden, ControlledAttnProcessor(CROSS), Acting(sources=lambda call: call.replaced(keys=1)))


def test_a_map_without_its_mask(layer, golden):
    mask = torch.zeros(2, 1, TEXT)
    mask[:, :, 40:] = -10000.0
    free = Acting(sources=lambda call: call.replaced(mask=None))
    own = ControlledAttnProcessor(CROSS)
    assert torch.equal(read(layer, golden, own, free, attention_mask=mask), read(layer, golden, own))


def test_the_map_round_another_processor_knows_the_mask(layer, golden):
    mask = torch.zeros(2, 1, TEXT)
    mask[:, :, 40:] = -10000.0
    maps = []
    looking = Acting(weights=lambda _, weights: maps.append(weights) or weights)
    for base in (None, SlicedAttnProcessor(2)):
        read(layer, golden, ControlledAttnProcessor(CROSS, base=base), looking, attention_mask=mask)
    torch.testing.assert_close(*maps)
    assert maps[0][..., 40:].max() == 0
