"""Joint attention: a Flux transformer without controls is diffusers' own, and controls reach both streams."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch._dynamo.utils import counters

from msdiffusion.attention.binding import install, is_installed
from msdiffusion.attention.control import Control
from msdiffusion.attention.rows import guided
from msdiffusion.errors import RequestError

ROWS, COLUMNS, TOKENS = 3, 5, 4


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)  # fmt: skip


def arguments(**more):
    generator = torch.Generator().manual_seed(0)
    ids = torch.zeros(ROWS, COLUMNS, 3)
    ids[..., 1], ids[..., 2] = torch.arange(ROWS)[:, None], torch.arange(COLUMNS)
    return {
        "hidden_states": torch.randn(2, ROWS * COLUMNS, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, TOKENS, 12, generator=generator),
        "pooled_projections": torch.randn(2, 6, generator=generator),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TOKENS, 3),
        "return_dict": False,
        **more,
    }


@torch.no_grad()
def predict(transformer, *controls, **more):
    given = {"joint_attention_kwargs": {"controls": list(controls)}} if controls else {}
    return transformer(**arguments(**given, **more))[0]


class Joint(Control):
    """Functions in place of hooks."""

    def __init__(self, stage="", **hooks):
        self.stage, self.hooks, self.calls = stage, tuple(hooks), []
        vars(self).update(hooks)

    def wants(self, layer):
        return self.hooks if layer.stage.startswith(self.stage) else ()


@pytest.mark.exact
def test_without_a_control_it_is_diffusers_own_bit_for_bit(transformer):
    expected = predict(transformer)
    layers = install(transformer)
    assert is_installed(transformer)
    assert torch.equal(predict(transformer), expected)
    assert torch.equal(predict(transformer, Control()), expected)
    assert [(layer.kind, layer.stage, layer.number) for layer in layers] == [
        ("joint", "transformer_blocks", 0), ("joint", "transformer_blocks", 1),
        ("joint", "single_transformer_blocks", 2), ("joint", "single_transformer_blocks", 3),
    ]  # fmt: skip
    assert {(layer.width, layer.heads) for layer in layers} == {(32, 2)}
    install(transformer)
    assert torch.equal(predict(transformer), expected)


@pytest.mark.parametrize("fused", [False, True])
def test_controls_that_change_nothing_change_nothing(transformer, fused):
    if fused:
        transformer.fuse_qkv_projections()
    expected = predict(transformer)
    install(transformer)
    calls = []
    watching = Joint(
        sources=lambda call: calls.append(call) or call,
        weights=lambda call, weights: weights,
        result=lambda call, hidden: hidden,
    )
    torch.testing.assert_close(predict(transformer, watching), expected, rtol=0, atol=1e-5)
    assert len(calls) == 4
    for call in calls:
        assert (call.text, call.image) == (slice(0, TOKENS), slice(TOKENS, TOKENS + ROWS * COLUMNS))
        assert call.query.shape == call.key.shape == call.value.shape == (2, 2, TOKENS + ROWS * COLUMNS, 16)
        assert call.step.grid == (ROWS, COLUMNS)
        assert call.step.rows == guided(2, False)
        assert call.step.timestep.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("stage", ["transformer_blocks", "single"])
def test_every_hook_takes_part(transformer, stage):
    """Barring the first text token by a mask is as taking its column out of the map; results can be changed."""
    install(transformer)
    bare = predict(transformer)

    def barred(call):
        mask = torch.ones(call.key.shape[2], dtype=torch.bool)
        mask[0] = False
        return call.replaced(mask=mask.view(1, 1, 1, -1))

    def renormalized(call, weights):
        rest = weights.clone()
        rest[..., 0] = 0
        return rest / rest.sum(dim=-1, keepdim=True)

    one, other = (
        predict(transformer, Joint(stage, **hook)) for hook in ({"sources": barred}, {"weights": renormalized})
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert (one - bare).abs().max() > 1e-4
    silent = Joint(stage, result=lambda call, hidden: torch.zeros_like(hidden))
    assert (predict(transformer, silent) - bare).abs().max() > 1e-4


def test_pictures_that_share_their_keys(transformer):
    install(transformer)
    bare = predict(transformer)

    def shared(open_to_others):
        def sources(call):
            image = call.image
            key, value = (torch.cat([states, states.flip(0)[:, :, image]], dim=2) for states in (call.key, call.value))
            mask = torch.ones(key.shape[2], dtype=torch.bool)
            mask[call.key.shape[2] :] = open_to_others
            return call.replaced(key=key, value=value, mask=mask.view(1, 1, 1, -1))

        return Joint(sources=sources)

    torch.testing.assert_close(predict(transformer, shared(False)), bare, rtol=0, atol=1e-5)
    assert (predict(transformer, shared(True)) - bare).abs().max() > 1e-3


@pytest.mark.slow
def test_blocks_compiled_one_by_one(transformer):
    install(transformer)
    half = Joint(result=lambda call, hidden: hidden * 0.5)
    expected = predict(transformer, half)
    torch.compiler.reset()
    counters.clear()
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    try:
        torch.testing.assert_close(predict(transformer, half), expected, rtol=0, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            predict(transformer, half)
        # As without us: blocks of two streams, of one, and the first of one, whose input lies otherwise in memory.
        assert counters["stats"]["unique_graphs"] == 3
        assert not counters["graph_break"]
    finally:
        torch.compiler.reset()


def test_what_another_library_reads_is_not_taken_over(transformer):
    class Other(FluxAttnProcessor.__mro__[1]):
        def __call__(self, *args, **kwargs):
            return FluxAttnProcessor()(*args, **kwargs)

    transformer.set_attn_processor(Other())
    expected = predict(transformer)
    install(transformer)
    assert torch.equal(predict(transformer), expected)
    with pytest.raises(RequestError, match="but Other of another library"):
        predict(transformer, Joint(result=lambda call, hidden: hidden))
    with pytest.raises(RequestError, match="call the denoiser itself"):
        transformer.forward(**arguments(joint_attention_kwargs={"controls": [Control()]}))


def test_the_picture_among_other_pictures_and_sizes(transformer):
    """One text for two sizes; and a reference beside the picture, as Kontext has it, is not of the picture."""
    install(transformer)
    calls = []
    watching = Joint(sources=lambda call: calls.append(call) or call)
    given = arguments(joint_attention_kwargs={"controls": [watching]})
    turned = given["img_ids"].clone()
    turned[:, 1], turned[:, 2] = given["img_ids"][:, 2], given["img_ids"][:, 1]
    both = torch.cat([given["img_ids"], given["img_ids"] + torch.tensor([1.0, 0, 0])])
    for more in ({}, {"img_ids": turned.flip(0)}, {"img_ids": both, "hidden_states": torch.zeros(2, 30, 4)}):
        transformer(**given | more)
    assert [call.step.grid for call in calls[::4]] == [(ROWS, COLUMNS), (COLUMNS, ROWS), (ROWS, COLUMNS)]
    assert calls[-1].image == slice(TOKENS, TOKENS + ROWS * COLUMNS)
    assert calls[-1].query.shape[2] == TOKENS + 2 * ROWS * COLUMNS


def test_equal_pictures_are_no_guidance(transformer):
    install(transformer)
    calls = []
    given = arguments(joint_attention_kwargs={"controls": [Joint(sources=lambda call: calls.append(call) or call)]})
    transformer(**given | {"hidden_states": torch.zeros(2, ROWS * COLUMNS, 4)})
    assert calls[0].step.rows == guided(2, False)


def test_processors_with_weights_stay_where_they_are(transformer):
    """An IP-Adapter's: no control takes part there, and its weights stay the transformer's."""

    class Weighty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def __call__(self, *args, **kwargs):
            return FluxAttnProcessor()(*args, **kwargs)

    transformer.transformer_blocks[0].attn.set_processor(Weighty())
    before = set(transformer.state_dict())
    install(transformer)
    assert set(transformer.state_dict()) == before
    with pytest.raises(RequestError, match="transformer_blocks/0/attn was replaced"):
        predict(transformer, Joint(result=lambda call, hidden: hidden))
    predict(transformer, Joint("single", result=lambda call, hidden: hidden))
