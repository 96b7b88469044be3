"""The hook of a denoiser: what controls see of a call, and that a call without them is diffusers' own."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from torch._dynamo.utils import counters

from msdiffusion.attention.binding import after_steps, install, is_installed
from msdiffusion.attention.control import Control
from msdiffusion.attention.rows import Rows, guided
from msdiffusion.errors import RequestError

SIZE = 8


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4,
        layers_per_block=1, attention_head_dim=(2, 4), cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False)  # fmt: skip


LATENTS = torch.randn(2, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
TWICE = torch.cat([LATENTS, LATENTS])
TEXT = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(2))


def predict(unet, sample=TWICE, text=TEXT, timestep=500, grad=False, **kwargs):
    with torch.set_grad_enabled(grad):
        return unet(sample, timestep, text[: len(sample)], cross_attention_kwargs=kwargs or None).sample


class Watching(Control):
    """Notes what it is shown, in the layers of some kinds."""

    def __init__(self, *kinds):
        self.kinds, self.steps, self.layers = kinds, [], []

    def at(self, step):
        self.steps.append(step)
        return self

    def wants(self, layer):
        return ("sources", "weights", "result") if layer.kind in self.kinds else ()

    def sources(self, call):
        self.layers.append(call.layer)
        return call


class Scaling(Control):
    """Multiplies what the layers of a kind read, in some rows, without being noticed by torch.compile."""

    def __init__(self, kind, factor, *branches):
        self.kind, self.factor, self.branches = kind, factor, branches

    def wants(self, layer):
        return ("result",) if layer.kind == self.kind else ()

    def result(self, call, hidden):
        if not self.branches:
            return hidden * self.factor
        rows = call.step.rows.of(*self.branches)
        return torch.cat([hidden[: rows.start], hidden[rows] * self.factor, hidden[rows.stop :]])


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.exact
@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
def test_a_control_left_out_leaves_nothing_behind(unet, backend):
    if backend == "softmax":
        install(unet, backend)
    expected = predict(unet)
    layers = install(unet, backend)
    assert {layer.kind for layer in layers} == {"self", "cross"}
    assert len(layers) == len(unet.attn_processors)
    assert is_installed(unet)
    assert torch.equal(predict(unet), expected)
    assert not torch.equal(predict(unet, controls=[Scaling("self", 0.5)]), expected)
    for nothing in ({}, {"controls": []}, {"controls": None}, {"subjects": None}, {"scale": 1.0}):
        assert torch.equal(predict(unet, **nothing), expected)
    watching = Watching("cross", *(["self"] if backend == "sdpa" else []))
    assert torch.equal(predict(unet, controls=[watching]), expected)
    assert watching.layers


def test_what_a_control_sees_of_a_call(unet):
    layers = install(unet)
    watching = Watching("self", "cross")
    for timestep in (900, 300):
        predict(unet, timestep=timestep, controls=[watching])
    first, second = watching.steps
    assert (first.number, second.number) == (0, 0)  # predict cuts out another text each time
    assert first.timestep.tolist() == [900]
    assert first.grid == (SIZE, SIZE)
    assert first.rows == guided(2, True)
    assert first.text_tokens == 7
    assert watching.layers[: len(layers)] == [
        layer
        for stage in ("down", "mid", "up")
        for layer in layers
        if layer.stage == f"{stage}_block" + "s" * (stage != "mid")
    ]
    assert {(layer.width, layer.heads) for layer in layers} == {(8, 2), (16, 4)}
    with torch.no_grad():
        for _ in range(2):
            unet(LATENTS, torch.tensor([1, 2]), TEXT[:2], cross_attention_kwargs={"controls": [watching]})
    assert watching.steps[-1].timestep.tolist() == [1, 2]
    assert watching.steps[-1].rows == guided(2, False)


def test_calls_with_one_text_are_counted(unet):
    install(unet)
    watching = Watching()
    with torch.no_grad():
        for text in (TEXT, TEXT, TEXT.clone(), TEXT):
            unet(TWICE, 5, text, cross_attention_kwargs={"controls": [watching]})
    assert [step.number for step in watching.steps] == [0, 1, 0, 2]


def test_two_controls_compose_in_the_order_given(unet):
    install(unet)
    half, double = Scaling("cross", 0.5), Scaling("cross", 2.0)
    assert torch.equal(predict(unet, controls=[half, double]), predict(unet))
    assert torch.equal(predict(unet, subjects=half, controls=[double]), predict(unet))
    order = []

    class Noting(Scaling):
        def result(self, call, hidden):
            order.append(self.factor)
            return hidden

    predict(unet, subjects=Noting("cross", 1), controls=[Noting("cross", 2), Noting("cross", 3)])
    assert order[:6] == [1, 2, 3, 1, 2, 3]


def test_other_text(unet):
    """As null-text inversion gives: the prediction is that of the other text, whose keys are kept as well."""
    install(unet)
    other = TEXT.flip(0).contiguous()

    class Replacing(Control):
        def text(self, step, states):
            assert states is TEXT
            return other

    expected = predict(unet, text=other)
    with torch.no_grad():
        for _ in range(2):
            drawn = unet(TWICE, 500, TEXT, cross_attention_kwargs={"controls": [Replacing()]}).sample
            assert torch.equal(drawn, expected)
            by_name = unet(sample=TWICE, timestep=500, encoder_hidden_states=TEXT,
                           cross_attention_kwargs={"controls": [Replacing()]}).sample  # fmt: skip
            assert torch.equal(by_name, expected)


def test_text_of_another_length(unet):
    install(unet)
    longer, watching = torch.cat([TEXT, TEXT], dim=1), Watching("cross")

    class Longer(Control):
        def text(self, step, states):
            return longer

    assert torch.equal(predict(unet, controls=[Longer(), watching]), predict(unet, text=longer))
    assert watching.steps[0].text_tokens == 14


@pytest.mark.parametrize(
    "rows",
    [Rows(("conditional", "image", "unconditional"), 1), Rows(("unconditional", "conditional", "perturbed"), 1)],
)
def test_batches_of_three_parts(unet, rows):
    install(unet)
    sample, bare = TWICE[:3], predict(unet, TWICE[:3])
    changed = predict(unet, sample, controls=[Scaling("cross", 0.0, "conditional")], rows=rows)
    differs = [not torch.equal(one, other) for one, other in zip(changed, bare, strict=True)]
    assert differs == [branch == "conditional" for branch in rows.branches]
    everywhere = predict(unet, sample, controls=[Scaling("cross", 0.0)], rows=rows)
    close(everywhere[rows.of("conditional")], changed[rows.of("conditional")])


def test_gradient_checkpointing_changes_nothing(unet):
    install(unet, "softmax")
    sample = TWICE.clone().requires_grad_()
    controls = [Scaling("self", 0.5), Watching("self", "cross"), Scaling("cross", 2.0)]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.train().enable_gradient_checkpointing()
        predict(unet, sample, grad=True, controls=controls, rows=guided(2, True)).square().sum().backward()
        gradients.append(sample.grad)
        sample.grad = None
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


@pytest.mark.parametrize("way", ["whole", "blocks"])
@pytest.mark.slow
def test_compiled_code(unet, way):
    install(unet)
    controls = [Scaling("self", 0.5, "conditional"), Scaling("cross", 2.0)]
    given = {"controls": controls, "rows": guided(2, True)}
    expected, bare = predict(unet, **given), predict(unet)
    torch.compiler.reset()
    counters.clear()
    if way == "whole":
        unet.compile(fullgraph=True, backend="eager")
    else:
        unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    try:
        close(predict(unet, timestep=torch.tensor(500), **given), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for timestep in (400, 300):
                predict(unet, timestep=torch.tensor(timestep), **given)
            close(predict(unet, timestep=torch.tensor(500), **given), expected)
        assert not counters["graph_break"]
        close(predict(unet), bare)
    finally:
        torch.compiler.reset()


def test_shared_code_knows_no_layer_of_its_own(unet):
    """Blocks that are compiled once for all: a control of some layers only would be in none or in all."""
    install(unet)

    class Up(Scaling):
        def wants(self, layer):
            return super().wants(layer) if layer.stage == "up_blocks" else ()

    plain, changed = predict(unet), predict(unet, controls=[Up("cross", 0.0)])
    assert not torch.equal(plain, changed)
    unet.compile_repeated_blocks(backend="eager")
    with pytest.raises(RequestError, match="in some cross-attention layers only.*compile the whole denoiser"):
        predict(unet, controls=[Up("cross", 0.0)])
    torch.compiler.reset()


def test_processors_of_pag_without_rows_are_refused(unet):
    """Their batch may look like one with guidance. What takes their place attends as the others do."""
    layers = install(unet, "softmax")
    own = next(layer for layer in layers if layer.kind == "self").name.replace("/", ".")
    unet.get_submodule(own).set_processor(PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(RequestError, match="as of PAG, don't show what they are"):
        predict(unet, controls=[Scaling("cross", 1.0)])
    assert {processor.backend for processor in unet.attn_processors.values()} == {"softmax"}
    predict(unet, controls=[Scaling("self", 1.0)])  # ours again


def test_latents_after_a_step():
    class Adding(Control):
        def __init__(self, value):
            self.value, self.steps = value, []

        def latents(self, step, latents):
            self.steps.append(step)
            return latents * 2 + self.value

    one, other = Adding(1), Adding(10)
    callback = after_steps([one, Control(), other])
    assert callback(None, 3, torch.tensor(500), {"latents": LATENTS, "more": 1}).keys() == {"latents", "more"}
    close(callback(None, 3, torch.tensor(500), {"latents": LATENTS})["latents"], (LATENTS * 2 + 1) * 2 + 10)
    step = one.steps[0]
    assert (step.number, step.timestep.tolist(), step.rows, step.grid) == (3, [500], guided(2, False), (SIZE, SIZE))
    seen = []
    after = after_steps([one], lambda *given: seen.append(given[-1]["latents"]))
    assert torch.equal(after(None, 0, 1, {"latents": LATENTS})["latents"], seen[0])
    replaced = after_steps([one], lambda *given: {"latents": 0})
    assert replaced(None, 0, 1, {"latents": LATENTS}) == {"latents": 0}
    assert after_steps([Control()], print) is print
    assert after_steps([]) is None
    with pytest.raises(RequestError, match="not packed ones"):
        callback(None, 0, 1, {"latents": LATENTS.flatten(2)})
    with pytest.raises(RequestError, match='callback_on_step_end_tensor_inputs must hold "latents"'):
        callback(None, 0, 1, {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"condition": Control()}, "as 'condition': its name must be \"subjects\""),
        ({"controls": Control()}, "controls must be a list, got"),
        ({"controls": [lambda call: call]}, "must be Control objects, got"),
        ({"subjects": 3}, "must be Control objects, got 3"),
        ({"controls": [Control()], "rows": Rows(("conditional",), 3)}, "for a batch of 4, got Rows"),
        ({"controls": [Control()], "rows": 4}, "for a batch of 4, got 4"),
    ],
)
def test_wrong_words_are_refused(unet, given, message):
    install(unet)
    with pytest.raises(RequestError, match=message):
        predict(unet, **given)


def test_replaced_processors_are_refused_where_a_control_would_be_ignored(unet):
    layers = install(unet)
    own = next(layer for layer in layers if layer.kind == "self").name.replace("/", ".")
    unet.get_submodule(own).set_processor(AttnProcessor2_0())
    assert is_installed(unet)
    predict(unet, controls=[Scaling("cross", 1.0)])
    with pytest.raises(RequestError, match=r"model.install\(\)"):
        predict(unet, controls=[Scaling("self", 1.0)])
    unet.set_attn_processor(AttnProcessor2_0())
    assert not is_installed(unet)
    with pytest.raises(RequestError, match=r"model.install\(\)"):
        predict(unet, controls=[Scaling("cross", 1.0)])
    install(unet)
    predict(unet, controls=[Scaling("self", 1.0)])


@pytest.mark.parametrize(
    ("denoiser", "backend", "message"),
    [(torch.nn.Linear(1, 1), "sdpa", "UNet2DConditionModel or a FluxTransformer2DModel, got Linear"),
     (torch.nn.Linear(1, 1), "flash", 'backend must be "sdpa" or "softmax"')],
)  # fmt: skip
def test_what_controls_cannot_be_installed_in(denoiser, backend, message):
    with pytest.raises(RequestError, match=message):
        install(denoiser, backend)
