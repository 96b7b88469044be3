"""SubjectCondition and its form for one call, on one attention layer, held to the official implementation."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from msdiffusion.adapter.auto_layout import AutoLayout
from msdiffusion.adapter.condition import SubjectCondition
from msdiffusion.attention.control import Layer, Participants, Step
from msdiffusion.attention.rows import Rows, check_seen
from msdiffusion.attention.unet import ControlledAttnProcessor
from msdiffusion.errors import LayoutError, RequestError

LAYER = "layer"
PLACE = Layer(LAYER, "cross", "mid_block", 0, 32, 4)
TEXT = 77
DUMMIES = 4


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


def make_condition(golden, *, scale=1.0, boxes=None, subjects=(0, 1, 2), samples=slice(None), **options):
    tensors, config = golden
    tokens = tensors["encoder_hidden_states"][samples, TEXT + DUMMIES :].unflatten(1, (3, config["num_tokens"]))
    tokens = tokens[:, list(subjects)].flatten(1, 2)
    boxes = tensors["boxes"] if boxes is None else boxes
    weights = torch.as_tensor(scale, dtype=torch.float32).expand(3)[list(subjects)]
    weights = weights.repeat_interleave(config["num_tokens"])[:, None]
    return SubjectCondition(
        keys={LAYER: tokens @ tensors["proc.to_k_ip.weight"].T},
        values={LAYER: tokens @ tensors["proc.to_v_ip.weight"].T * weights},
        boxes=boxes[samples][:, list(subjects)],
        **options,
    )


def run(layer, golden, condition, *, hidden=None, backend="sdpa", samples=slice(None), size=(12, 12), timestep=500):
    """The layer's result; ``size`` are the rows and columns of the latents."""
    tensors, _ = golden
    hidden = tensors["hidden_states"] if hidden is None else hidden
    layer.set_processor(ControlledAttnProcessor(PLACE, backend))
    text = tensors["encoder_hidden_states"][:, :TEXT]
    sample = torch.zeros(hidden[samples].shape[0], 4, *size)
    taking = None if condition is None else participants(condition, sample, timestep)
    return layer(hidden[samples], encoder_hidden_states=text[samples], participants=taking)


def participants(condition, sample, timestep=500):
    """What the hook of a UNet makes of a condition."""
    step = Step(sample, timestep, condition.rows(sample.shape[0]), tuple(sample.shape[-2:]), layers=[PLACE])
    bound = condition.at(step)
    return Participants(step, [] if bound is None else [bound])


def text_only(layer, golden, processor=None):
    tensors, _ = golden
    layer.set_processor(processor or AttnProcessor2_0())
    return layer(tensors["hidden_states"], encoder_hidden_states=tensors["encoder_hidden_states"][:, :TEXT])


@pytest.mark.exact
@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
@pytest.mark.parametrize(
    ("key", "scale"), [("out_scale_0.6", 0.6), ("out_subject_scales_0.3_0.9_0.5", [0.3, 0.9, 0.5])]
)
def test_equals_the_official_attention(layer, golden, backend, key, scale):
    ours = run(layer, golden, make_condition(golden, scale=scale), backend=backend)
    torch.testing.assert_close(ours, golden[0][key], rtol=1e-5, atol=1e-5)


@pytest.mark.exact
@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
def test_equals_the_official_auto_layout(layer, golden, backend):
    tensors, config = golden
    settings = config["auto_layout"]
    layout = AutoLayout(tensors["phrase_token_spans"], settings["mask_threshold"], settings["start_step"])
    condition = make_condition(golden, scale=0.6, auto_layout=layout)
    for step in range(3):
        hidden, timestep = tensors[f"auto_layout_hidden_step{step}"], 900 - 300 * step
        ours = run(layer, golden, condition, hidden=hidden, backend=backend, timestep=timestep)
        torch.testing.assert_close(ours, tensors[f"auto_layout_out_step{step}"], rtol=1e-5, atol=1e-5)


def test_scale_zero_is_the_text_alone_bit_for_bit(layer, golden):
    assert torch.equal(run(layer, golden, make_condition(golden, scale=0.0)), text_only(layer, golden))


@pytest.mark.parametrize("backend", ["sdpa", "softmax"])
def test_empty_boxes_are_the_text_alone_bit_for_bit(layer, golden, backend):
    condition = make_condition(golden, boxes=torch.zeros(2, 3, 4))
    assert torch.equal(run(layer, golden, condition, backend=backend), run(layer, golden, None, backend=backend))


def test_background_rows_are_exactly_the_text(layer, golden):
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5]] * 3] * 2)
    changed = run(layer, golden, make_condition(golden, boxes=boxes)) != run(layer, golden, None)
    changed = changed.any(-1).view(2, 12, 12)
    assert changed[:, :6, :6].all()
    assert not changed[:, 6:].any()
    assert not changed[:, :, 6:].any()


def test_a_wide_latent_maps_boxes_to_its_rows_and_columns(layer, golden):
    boxes = torch.tensor([[[0.75, 0.0, 1.0, 0.5]] * 3] * 2)
    condition = make_condition(golden, boxes=boxes)
    changed = (run(layer, golden, condition, size=(8, 18)) != run(layer, golden, None)).any(-1).view(2, 8, 18)
    expected = torch.zeros(8, 18, dtype=torch.bool)
    expected[:4, 13:] = True
    assert torch.equal(changed, expected.expand(2, -1, -1))


def test_masks_replace_boxes(layer, golden):
    masks = torch.zeros(2, 3, 24, 24, dtype=torch.bool)
    masks[:, :, 1, 23] = True  # one pixel touches one patch
    changed = (run(layer, golden, make_condition(golden, masks=masks)) != run(layer, golden, None)).any(-1)
    assert changed.view(2, 12, 12).nonzero().tolist() == [[0, 0, 11], [1, 0, 11]]


def test_order_of_subjects_does_not_matter(layer, golden):
    straight = run(layer, golden, make_condition(golden, scale=[0.3, 0.9, 0.5]))
    turned = run(layer, golden, make_condition(golden, scale=[0.3, 0.9, 0.5], subjects=(2, 0, 1)))
    torch.testing.assert_close(straight, turned)


def test_an_absent_subject_is_as_if_never_given(layer, golden):
    """Also where its box overlaps others, whose share of the softmax it must not take."""
    boxes = torch.tensor([[[0.0, 0.0, 0.7, 0.7], [0.2, 0.2, 1.0, 1.0], [0.1, 0.3, 0.8, 0.9]]] * 2)
    alone = run(layer, golden, make_condition(golden, boxes=boxes, subjects=(0, 2)))
    present = torch.tensor([[True, False, True]] * 2)
    absent = run(layer, golden, make_condition(golden, boxes=boxes, present=present))
    torch.testing.assert_close(absent, alone)
    boxes[:, 1] = torch.tensor([0.4, 0.4, 0.4, 0.9])
    torch.testing.assert_close(run(layer, golden, make_condition(golden, boxes=boxes)), alone)


def test_items_of_a_batch_do_not_mix(layer, golden):
    boxes = golden[0]["boxes"].clone()
    before = run(layer, golden, make_condition(golden, boxes=boxes))
    boxes[1] = torch.tensor([0.1, 0.1, 0.9, 0.9])
    after = run(layer, golden, make_condition(golden, boxes=boxes))
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_guidance_leaves_the_unconditional_half_alone(layer, golden):
    tensors, _ = golden
    doubled = {
        **tensors,
        "hidden_states": tensors["hidden_states"].repeat(2, 1, 1),
        "encoder_hidden_states": tensors["encoder_hidden_states"].repeat(2, 1, 1),
    }
    both = run(layer, (doubled, None), make_condition(golden, guidance=True))
    torch.testing.assert_close(both[:2], text_only(layer, golden))
    torch.testing.assert_close(both[2:], run(layer, golden, make_condition(golden)))


def test_auto_layout_reads_the_conditional_half(layer, golden):
    tensors, _ = golden
    torch.manual_seed(0)
    noise_hidden, noise_text = (torch.randn_like(tensors[name]) for name in ("hidden_states", "encoder_hidden_states"))
    doubled = {
        **tensors,
        "hidden_states": torch.cat([noise_hidden, tensors["hidden_states"]]),
        "encoder_hidden_states": torch.cat([noise_text, tensors["encoder_hidden_states"]]),
    }
    layout = AutoLayout(tensors["phrase_token_spans"], start_step=1)
    both = run(layer, (doubled, None), make_condition(golden, auto_layout=layout, guidance=True))
    torch.testing.assert_close(both[2:], run(layer, golden, make_condition(golden, auto_layout=layout)))


def test_one_condition_serves_any_number_of_samples(layer, golden):
    tensors, _ = golden
    condition = make_condition(golden, samples=slice(0, 1), num_images=3)
    same = {name: tensors[name][:1].repeat(3, 1, 1) for name in ("hidden_states", "encoder_hidden_states")}
    out = run(layer, (same, None), condition)
    for row in out:
        alone = make_condition(golden, samples=slice(0, 1))
        torch.testing.assert_close(row, run(layer, golden, alone, samples=slice(0, 1))[0])


def test_auto_layout_of_an_unnamed_phrase_has_no_region(layer, golden):
    layout = AutoLayout(torch.zeros(2, 3, 2, dtype=torch.long), start_step=1)
    assert torch.equal(run(layer, golden, make_condition(golden, auto_layout=layout)), run(layer, golden, None))


def test_gradients_reach_keys_and_values_and_background_gives_none(layer, golden):
    for backend in ("sdpa", "softmax"):
        condition = make_condition(golden)
        for states in (condition.keys, condition.values):
            states[LAYER] = states[LAYER].requires_grad_()
        run(layer, golden, condition, backend=backend).sum().backward()
        for states in (condition.keys, condition.values):
            assert states[LAYER].grad.isfinite().all()
            assert states[LAYER].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": torch.zeros(2, 2, 4, 4, dtype=torch.bool)}, r"masks must be \(2, 3, height, width\)"),
        ({"auto_layout": AutoLayout(torch.zeros(2, 2, 2))}, r"spans must be \(2, 3, 2\)"),
        ({"boxes": torch.zeros(3, 3, 4)}, "3 x 3 boxes do not fit keys"),
        ({"windows": torch.zeros(2, 2, 2)}, r"windows must be \(2, 3, 2\)"),
        ({"num_images": 3}, "layouts for 2 pictures do not fit num_images=3"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(golden, options, message):
    with pytest.raises(LayoutError, match=message):
        make_condition(golden, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3),), "spans must be"),
        ((torch.zeros(1, 1, 2), 1.5), "threshold"),
        ((torch.zeros(1, 1, 2), 0.5, 0), "start_step"),
    ],
)
def test_bad_auto_layout_is_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        AutoLayout(*arguments)


def test_wrong_batch_layer_and_size_are_refused(layer, golden):
    tensors, _ = golden
    three = ({k: v[:1].repeat(3, 1, 1) for k, v in tensors.items() if v.ndim == 3}, None)
    with pytest.raises(
        RequestError, match="for 2 pictures, so the UNet's batch should be 2, or 4 with guidance.* is 3"
    ):
        run(layer, three, make_condition(golden))
    with pytest.raises(RequestError, match="for 2 pictures, but the UNet's batch is 3"):
        run(layer, three, make_condition(golden, guidance=False))
    with pytest.raises(RequestError, match="batch with guidance is 3"):
        run(layer, three, make_condition(golden, samples=slice(0, 1), guidance=True))
    with pytest.raises(LayoutError, match="latents of 10 x 10.*144 patches"):
        run(layer, golden, make_condition(golden), size=(10, 10))
    condition = make_condition(golden)
    condition.keys.clear()
    with pytest.raises(RequestError, match="no keys for layer"):
        run(layer, golden, condition)


def test_the_batch_tells_whether_there_is_guidance(layer, golden):
    tensors, _ = golden
    twice = ({k: v.repeat(2, 1, 1) for k, v in tensors.items() if v.ndim == 3}, None)
    condition = make_condition(golden)
    with_guidance = run(layer, twice, condition)
    assert torch.equal(with_guidance[:2], text_only(layer, golden))
    torch.testing.assert_close(with_guidance[2:], run(layer, golden, condition))
    # two pictures without guidance, not one picture with it
    alone = make_condition(golden, samples=slice(0, 1), num_images=2)
    assert not torch.equal(run(layer, golden, alone)[0], text_only(layer, golden)[0])


def test_windows_say_when_a_subject_is_there(layer, golden):
    windows = torch.tensor([[[0.0, 0.5], [0.5, 1.0], [0.0, 1.0]]] * 2)
    timed, always = make_condition(golden, windows=windows), make_condition(golden)
    for timestep, present in ((999, [True, False, True]), (501, [True, False, True]), (500, [False, True, True]),
                              (0, [False, True, True])):  # fmt: skip
        expected = make_condition(golden, present=torch.tensor([present] * 2))
        assert torch.equal(run(layer, golden, timed, timestep=timestep), run(layer, golden, expected))
        assert not torch.equal(run(layer, golden, timed, timestep=timestep), run(layer, golden, always))
    per_sample = run(layer, golden, timed, timestep=torch.tensor([999, 0]))
    assert torch.equal(per_sample[0], run(layer, golden, timed, timestep=999)[0])
    assert torch.equal(per_sample[1], run(layer, golden, timed, timestep=torch.tensor(0))[1])


def test_a_subject_with_a_mask_beside_one_with_a_box(layer, golden):
    masks = torch.zeros(2, 3, 24, 24, dtype=torch.bool)
    masks[:, 0, 23, 0] = True
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.75, 0.0, 1.0, 0.25], [0.0, 0.0, 0.0, 0.0]]] * 2)
    changed = run(layer, golden, make_condition(golden, boxes=boxes, masks=masks)) != run(layer, golden, None)
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[11, 0] = True
    expected[:3, 9:] = True
    assert torch.equal(changed.any(-1).view(2, 12, 12), expected.expand(2, -1, -1))


def steps(layer, golden, condition, timesteps=(900, 600, 300)):
    return torch.stack([run(layer, golden, condition, timestep=timestep) for timestep in timesteps])


def test_auto_layout_starts_per_subject_and_for_some_subjects(layer, golden):
    spans = golden[0]["phrase_token_spans"]

    def drawn(**layout):
        return steps(layer, golden, make_condition(golden, auto_layout=AutoLayout(spans, **layout)))

    boxes, text = steps(layer, golden, make_condition(golden)), drawn(start_step=1)
    late = drawn(start_step=torch.tensor([[1, 1, 1], [3, 3, 3]]))
    assert torch.equal(late[:, 0], text[:, 0])
    assert torch.equal(late[:2, 1], boxes[:2, 1])
    assert torch.equal(late[2, 1], text[2, 1])
    assert torch.equal(drawn(start_step=1, subjects=torch.zeros(2, 3, dtype=torch.bool)), boxes)
    assert torch.equal(drawn(start_step=1, subjects=torch.ones(2, 3, dtype=torch.bool)), text)


def test_a_condition_serves_one_run_after_another(layer, golden):
    condition = make_condition(golden, auto_layout=AutoLayout(golden[0]["phrase_token_spans"], start_step=2))
    first = steps(layer, golden, condition)
    torch.manual_seed(0)
    other = {**golden[0], "hidden_states": torch.randn_like(golden[0]["hidden_states"])}
    steps(layer, (other, None), condition)
    assert torch.equal(steps(layer, golden, condition), first)


def test_layout_maps_show_where_the_text_looked(layer, golden):
    spans = golden[0]["phrase_token_spans"]
    condition = make_condition(golden, auto_layout=AutoLayout(spans, start_step=1))
    with pytest.raises(RequestError, match="no layout maps"):
        condition.layout_maps()
    run(layer, golden, condition)
    maps = condition.layout_maps(12, 12)
    assert maps.shape == (2, 3, 12, 12)
    assert maps.min() >= 0
    named = spans[..., 1] > spans[..., 0]
    assert maps[named].amax(dim=(1, 2)).min() > 0.99
    assert not maps[~named].any()
    # The regions of auto layout are these maps above the threshold: there, and nowhere else, something is read.
    changed = (run(layer, golden, condition) != run(layer, golden, None)).any(-1)
    assert torch.equal(changed, (maps > 0.5).any(1).flatten(1))
    with pytest.raises(RequestError, match="no layout maps"):
        make_condition(golden).layout_maps()


def test_moving_takes_everything_along(layer, golden):
    spans, windows = golden[0]["phrase_token_spans"], torch.tensor([[[0.0, 1.0]] * 3] * 2)
    condition = make_condition(golden, auto_layout=AutoLayout(spans), windows=windows, masks=torch.ones(2, 3, 2, 2) > 0)
    run(layer, golden, condition)
    condition.to("meta", torch.bfloat16)
    parts = [condition.boxes, condition.present, condition.windows, condition.masks, condition._maps.steps]
    parts += [*condition.keys.values(), *condition.values.values()]
    assert {part.device.type for part in parts} == {"meta"}
    assert condition.keys[LAYER].dtype == torch.bfloat16
    assert not condition._attention_masks


def test_masks_of_different_resolutions(layer, golden):
    """A list of masks is as a tensor of them; a missing one leaves the box."""
    torch.manual_seed(0)
    masks = torch.rand(2, 3, 7, 9) > 0.8
    as_lists = [[*masks[0]], [masks[1, 0], None]]
    boxes = golden[0]["boxes"]
    listed = make_condition(golden, masks=as_lists).regions(12, 12)
    stacked = make_condition(golden, masks=masks).regions(12, 12)
    assert torch.equal(listed[0], stacked[0])
    assert torch.equal(listed[1, 0], stacked[1, 0])
    assert torch.equal(listed[1, 1:], make_condition(golden).regions(12, 12)[1, 1:])
    finer = [[mask.repeat_interleave(5, 0).repeat_interleave(3, 1) for mask in row] for row in masks]
    assert torch.equal(make_condition(golden, masks=finer).regions(7, 9), masks.flatten(2))
    with pytest.raises(LayoutError, match=r"masks must be \(2, 3, height, width\).*got \[4, 0\]"):
        make_condition(golden, masks=[[None] * 4, []], boxes=boxes)
    condition = make_condition(golden, masks=as_lists)
    condition.to("meta", torch.float32)
    assert {mask.device.type for row in condition.masks for mask in row if mask is not None} == {"meta"}


def test_the_halves_of_a_batch_are_looked_at(layer, golden):
    noise = torch.randn(4, 4, 2, 2)
    two = make_condition(golden)
    for sample in (noise[:2], torch.cat([noise[:2], noise[:2]])):
        assert not two.rows(len(sample)).sure
        check_seen(two.rows(len(sample)), sample)
    with pytest.raises(RequestError, match="2 pictures.*4 samples, different latents, as without guidance"):
        check_seen(two.rows(4), noise)
    with pytest.raises(RequestError, match="2 samples, every latent twice, as with guidance"):
        check_seen(two.rows(2), torch.cat([noise[:1], noise[:1]]))
    assert make_condition(golden, guidance=True).rows(4) == Rows(("unconditional", "conditional"), 2)
    assert make_condition(golden, guidance=False).rows(2) == Rows(("conditional",), 2)
    assert make_condition(golden, batch_is_sure=True).rows(4).sure


def test_a_batch_that_reads_no_prompt_has_no_subjects(golden):
    """As pipelines give that draw both halves in calls of their own; and a transformer is refused."""
    sample, condition = torch.zeros(2, 4, 12, 12), make_condition(golden)
    assert condition.at(Step(sample, 500, Rows(("unconditional",), 2), (12, 12), layers=[PLACE])) is None
    joint = Layer("transformer_blocks/0/attn", "joint", "transformer_blocks", 0, 32, 4)
    with pytest.raises(RequestError, match="is for a UNet; this is a transformer"):
        condition.at(Step(sample, 500, condition.rows(2), (12, 12), layers=[joint]))


def test_a_broken_off_run_is_forgotten_on_demand_and_grids_are_kept_apart(layer, golden):
    spans = golden[0]["phrase_token_spans"]
    fresh = make_condition(golden, auto_layout=AutoLayout(spans, start_step=2))
    expected = run(layer, golden, fresh, timestep=300)
    used = make_condition(golden, auto_layout=AutoLayout(spans, start_step=2))
    steps(layer, golden, used, (900, 600))
    used.reset()
    assert torch.equal(run(layer, golden, used, timestep=300), expected)
    run(layer, golden, used, timestep=900, size=(8, 18))
    wide = make_condition(golden, auto_layout=AutoLayout(spans, start_step=2))
    run(layer, golden, wide, timestep=900, size=(8, 18))
    assert torch.equal(used.layout_maps(8, 18), wide.layout_maps(8, 18))


def test_auto_layout_goes_on_after_inference_mode(layer, golden):
    spans = golden[0]["phrase_token_spans"]
    expected = steps(layer, golden, make_condition(golden, auto_layout=AutoLayout(spans, start_step=2)))
    with torch.inference_mode():
        condition = make_condition(golden, auto_layout=AutoLayout(spans, start_step=2))
        assert torch.equal(steps(layer, golden, condition), expected)
    with torch.no_grad():
        assert torch.equal(steps(layer, golden, condition), expected)


def test_what_another_processor_returned_is_not_changed(layer, golden):
    kept = []

    class Keeping(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            kept.append(super().__call__(*args, **kwargs))
            return kept[-1]

    tensors, _ = golden
    condition = make_condition(golden, guidance=True)
    layer.set_processor(ControlledAttnProcessor(PLACE, base=Keeping()))
    hidden, text = (tensors[name].repeat(2, 1, 1) for name in ("hidden_states", "encoder_hidden_states"))
    taking = participants(condition, torch.zeros(4, 4, 12, 12))
    layer(hidden, encoder_hidden_states=text[:, :TEXT], participants=taking)
    torch.testing.assert_close(kept[0][:2], kept[0][2:])


def test_regions_are_worked_out_once_per_size(layer, golden, monkeypatch):
    calls = []
    regions = SubjectCondition.regions
    monkeypatch.setattr(SubjectCondition, "regions", lambda self, *grid: calls.append(grid) or regions(self, *grid))
    windows = torch.tensor([[[0.0, 0.5]] * 3] * 2)
    layouts = ({}, {"windows": windows}, {"auto_layout": AutoLayout(golden[0]["phrase_token_spans"])})
    for options in layouts:
        calls.clear()
        steps(layer, golden, make_condition(golden, **options))
        assert calls == [(12, 12)]
