"""The attention processors: the text path is diffusers' own, whatever processor was there before."""

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

from msdiffusion.attention.binding import SubjectBinder
from msdiffusion.attention.control import AttentionCall
from msdiffusion.attention.text_cache import TextCache
from msdiffusion.attention.unet import (
    MultiSubjectAttnProcessor,
    MultiSubjectIPAdapterAttnProcessor,
    TransparentAttnProcessor,
)
from msdiffusion.errors import RequestError

LAYER = "layer"
TEXT = 77


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


def text_only(layer, golden, processor=None, **options):
    tensors, _ = golden
    layer.set_processor(processor or AttnProcessor2_0())
    text = tensors["encoder_hidden_states"][:, :TEXT]
    return layer(tensors["hidden_states"], encoder_hidden_states=text, **options)


@pytest.mark.exact
def test_without_subjects_it_is_diffusers_own_attention_bit_for_bit(layer, golden):
    own = text_only(layer, golden, MultiSubjectAttnProcessor(LAYER))
    assert torch.equal(own, text_only(layer, golden))


@pytest.mark.exact
def test_softmax_backend_equals_diffusers_plain_attention(layer, golden):
    own = text_only(layer, golden, MultiSubjectAttnProcessor(LAYER, "softmax"))
    torch.testing.assert_close(own, text_only(layer, golden, AttnProcessor()))


def test_text_masks_are_honoured(layer, golden):
    tensors, _ = golden
    text = tensors["encoder_hidden_states"][:, :TEXT]
    mask = torch.zeros(2, 1, TEXT)
    mask[:, :, 40:] = -10000.0
    results = []
    for processor in (
        AttnProcessor2_0(),
        MultiSubjectAttnProcessor(LAYER),
        MultiSubjectAttnProcessor(LAYER, "softmax"),
    ):
        layer.set_processor(processor)
        results.append(layer(tensors["hidden_states"], encoder_hidden_states=text, attention_mask=mask))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_controls_follow_one_another(layer, golden):
    seen = []

    def halve(hidden, call):
        assert isinstance(call, AttentionCall)
        seen.append(call.layer)
        return hidden / 2

    tensors, _ = golden
    layer.set_processor(MultiSubjectAttnProcessor(LAYER))
    inputs = {"encoder_hidden_states": tensors["encoder_hidden_states"][:, :TEXT]}
    whole = layer(tensors["hidden_states"], **inputs)
    quarter = layer(tensors["hidden_states"], **inputs, controls=[halve, halve])
    bias = layer.to_out[0].bias
    torch.testing.assert_close(quarter - bias, (whole - bias) / 4)
    assert seen == [LAYER, LAYER]


def test_transparent_processor_passes_everything_on(layer, golden, caplog):
    tensors, _ = golden
    layer.set_processor(AttnProcessor2_0())
    expected = layer(tensors["hidden_states"])
    layer.set_processor(TransparentAttnProcessor(AttnProcessor2_0()))
    assert torch.equal(layer(tensors["hidden_states"], subjects=shifted, text_cache=TextCache()), expected)
    layer.set_processor(TransparentAttnProcessor())  # as diffusers makes it while it loads an IP-Adapter
    assert torch.equal(layer(tensors["hidden_states"]), expected)
    assert not caplog.records


def shifted(hidden, call):
    """A control that needs everything it may look at."""
    return hidden + call.query.mean() + call.text_key.mean()


@pytest.mark.exact
@pytest.mark.parametrize("base", [AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(2)])
def test_another_processor_goes_on_working_inside_ours(layer, golden, base):
    inside = MultiSubjectAttnProcessor(LAYER, base=base)
    assert torch.equal(text_only(layer, golden, inside), text_only(layer, golden, base))
    controlled = text_only(layer, golden, inside, subjects=shifted)
    expected = text_only(layer, golden, MultiSubjectAttnProcessor(LAYER), subjects=shifted)
    torch.testing.assert_close(controlled, expected)
    assert not torch.equal(controlled, text_only(layer, golden, base))


@pytest.mark.exact
def test_an_ip_adapter_goes_on_working_inside_ours(layer, golden):
    tensors, _ = golden
    torch.manual_seed(0)
    width = layer.to_q.in_features
    base = IPAdapterAttnProcessor2_0(width, width, num_tokens=(4,), scale=0.7)
    text = (tensors["encoder_hidden_states"][:, :TEXT], [torch.randn(2, 1, 4, width)])

    def run(processor, **options):
        layer.set_processor(processor)
        with torch.no_grad():
            return layer(tensors["hidden_states"], encoder_hidden_states=text, **options)

    expected = run(base)
    ours = MultiSubjectIPAdapterAttnProcessor(base, LAYER)
    assert isinstance(ours, IPAdapterAttnProcessor2_0)
    assert torch.equal(run(ours), expected)
    assert torch.equal(run(ours, subjects=lambda hidden, call: hidden), expected)
    assert not torch.equal(run(ours, subjects=shifted), expected)
    ours.scale[0] = 0.0  # what set_ip_adapter_scale does
    assert torch.equal(run(ours), text_only(layer, golden))


def test_text_keys_are_computed_once_per_text(layer, golden):
    calls = []

    class Counting(nn.Linear):
        def forward(self, states):
            calls.append(states)
            return super().forward(states)

    tensors, _ = golden
    text, cache = tensors["encoder_hidden_states"][:, :TEXT].clone(), TextCache()
    expected = text_only(layer, golden)
    layer.set_processor(MultiSubjectAttnProcessor(LAYER))
    whole, layer.to_k = layer.to_k, Counting(*reversed(layer.to_k.weight.shape), bias=False)
    layer.to_k.load_state_dict(whole.state_dict())
    try:
        with torch.no_grad():

            def run():
                return layer(
                    tensors["hidden_states"], encoder_hidden_states=text, text_cache=cache.begin(text)
                )  # fmt: skip

            assert torch.equal(run(), expected)
            assert torch.equal(run(), expected)
            assert len(calls) == 1
            text.mul_(2)  # changed in place: the cache must not serve it
            assert not torch.equal(run(), expected)
            assert len(calls) == 2
            text = text.clone()
            run()
            assert len(calls) == 3
    finally:
        layer.to_k = whole


def test_text_keys_are_kept_for_one_unet_precision_and_state_of_the_weights(layer, golden):
    text, cache = golden[0]["encoder_hidden_states"][:, :TEXT].clone(), TextCache()
    ours, theirs = object(), object()
    with torch.no_grad():
        assert cache.begin(text, ours).is_new
        key = cache.states(LAYER, layer, text)[0]
        assert not cache.begin(text, ours).is_new
        assert cache.states(LAYER, layer, text)[0] is key
        assert cache.begin(text, theirs).is_new
        with torch.autocast("cpu", torch.bfloat16):
            assert cache.begin(text, theirs).is_new
            assert cache.states(LAYER, layer, text)[0].dtype == torch.bfloat16
        cache.begin(text, ours)
        key = cache.states(LAYER, layer, text)[0]
        layer.to_k.weight.mul_(2)
        try:
            torch.testing.assert_close(cache.states(LAYER, layer, text)[0], 2 * key)
        finally:
            layer.to_k.weight.div_(2)
        with torch.inference_mode():
            assert cache.begin(text.clone(), ours) is None  # nobody counts its changes


def test_the_binder_sees_a_replaced_processor_and_leaves_other_calls_alone(layer, golden):
    binder = SubjectBinder([layer])
    assert binder(None, (), {}) is None
    assert binder(None, (), {"cross_attention_kwargs": {"scale": 0.5}}) is None
    assert binder(None, (), {"cross_attention_kwargs": {"subjects": shifted}}) is None  # needs no binding
    condition = type("Condition", (), {"bind": None, "text_cache": None})()
    with pytest.raises(RequestError, match="as 'subject': its name must be \"subjects\""):
        binder(None, (), {"cross_attention_kwargs": {"subject": condition}})
    given = {"cross_attention_kwargs": {"subjects": type("Condition", (), {"bind": None})()}}
    for processor in (AttnProcessor2_0(), MultiSubjectAttnProcessor()):
        layer.set_processor(processor)
        with pytest.raises(RequestError, match=r"model.install\(\)"):
            binder(None, (), given)
