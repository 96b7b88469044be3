import json
import time
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import save_file

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.auto_layout import AutoLayout
from msdiffusion.adapter.config import AdapterConfig
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.attention.unet import ControlledAttnProcessor, cross_attentions
from msdiffusion.errors import LayoutError, RequestError, WeightsError
from msdiffusion.generation.identity import identify


@pytest.fixture(scope="module")
def golden(golden_tensors):
    return golden_tensors("unet")


def make_unet(golden, **changes):
    tensors, config = golden
    unet = UNet2DConditionModel(**{**config["unet_config"], **changes})
    if not changes:
        unet.load_state_dict({k.removeprefix("unet."): v for k, v in tensors.items() if k.startswith("unet.")})
    return unet.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def unet(golden):
    return make_unet(golden)


@pytest.fixture(scope="module")
def adapter(golden, unet, official_adapter_file):
    head_width = golden[1]["resampler_config"]["dim_head"]
    return MSAdapter.from_official(official_adapter_file, unet, head_width=head_width).eval().requires_grad_(False)


def make_condition(adapter, golden, **options):
    tensors, config = golden
    return adapter(
        tensors["image_tokens"].unflatten(0, (2, 3)),
        tensors["phrase_embeds"].unflatten(0, (2, 3)),
        options.pop("boxes", tensors["boxes"]),
        drop_grounding=torch.tensor(config["drop_grounding_tokens"]),
        **{"scale": config["scale"], **options},
    )


def predict(unet, golden, condition=None, latents=None, later=0):
    tensors, _ = golden
    return unet(
        tensors["latents"] if latents is None else latents,
        tensors["timesteps"] - later,
        encoder_hidden_states=tensors["text_states"],
        added_cond_kwargs={"text_embeds": tensors["text_embeds"], "time_ids": tensors["time_ids"]},
        cross_attention_kwargs=None if condition is None else {"subjects": condition},
    ).sample


@pytest.mark.exact
def test_whole_unet_equals_the_official_prediction(golden, unet, adapter):
    tensors, _ = golden
    for backend in ("sdpa", "softmax"):
        adapter.install(unet, backend)
        with_subjects = predict(unet, golden, make_condition(adapter, golden))
        torch.testing.assert_close(with_subjects, tensors["noise_pred"], rtol=1e-4, atol=1e-4)
        without = predict(unet, golden)
        torch.testing.assert_close(without, tensors["noise_pred_without_adapter"], rtol=1e-4, atol=1e-4)
    assert (tensors["noise_pred"] - tensors["noise_pred_without_adapter"]).abs().max() > 0.05  # the test can tell


@pytest.mark.exact
def test_official_file_converts_to_ours_and_predicts_the_same(golden, unet, adapter, tmp_path):
    adapter.save_pretrained(tmp_path, base_model="base", reference_fit="pad")
    again = MSAdapter.from_pretrained(tmp_path)
    assert (again.config.base_model, again.config.reference_fit) == ("base", "pad")
    assert again.config.resampler == adapter.config.resampler
    adapter.install(unet)
    expected = predict(unet, golden, make_condition(adapter, golden))
    again.install(unet)
    assert torch.equal(predict(unet, golden, make_condition(again, golden)), expected)


def test_layers_are_numbered_down_up_mid(adapter, unet):
    names = list(adapter.layers)
    assert names == list(cross_attentions(unet))
    blocks = [name.split("/")[0] for name in names]
    assert blocks == sorted(blocks, key=["down_blocks", "up_blocks", "mid_block"].index)


def test_a_pickle_with_code_is_not_opened(unet, tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("the file's code ran",))

    torch.save({"image_proj": Evil(), "ms_adapter": {}}, tmp_path / "evil.bin")
    with pytest.raises(WeightsError, match="tensors only"):
        MSAdapter.from_official(tmp_path / "evil.bin", unet)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1, 2], "needs image_proj and ms_adapter, found .list."),
        ({"state_dict": {}}, "but a checkpoint of a training: give the run's folder, or the checkpoint under a name"),
        ({"image_proj": {}, "ms_adapter": {}}, "has no null_queries"),
    ],
)
def test_other_files_are_no_official_adapter(unet, tmp_path, record, message):
    torch.save(record, tmp_path / "other.bin")
    with pytest.raises(WeightsError, match=message):
        MSAdapter.from_official(tmp_path / "other.bin", unet)


def test_missing_and_broken_official_files(unet, tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        MSAdapter.from_official(tmp_path / "nowhere.bin", unet)
    (tmp_path / "text.bin").write_text("hello")
    with pytest.raises(WeightsError, match="tensors only"):
        MSAdapter.from_official(tmp_path / "text.bin", unet)


def edited(official_adapter_file, tmp_path, edit):
    record = torch.load(official_adapter_file, weights_only=True)
    edit(record)
    torch.save(record, tmp_path / "edited.bin")
    return tmp_path / "edited.bin"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["ms_adapter"].pop("1.to_k_ip.weight"), r"files lack layers.down_blocks/1/.*to_k.weight"),
        (lambda r: r["ms_adapter"].update({"layer.weight": torch.zeros(1)}), "unknown key layer.weight"),
        (
            lambda r: [r["ms_adapter"].pop(k) for k in list(r["ms_adapter"]) if k.startswith("1.")],
            "cross-attention layers",
        ),
        (lambda r: r["image_proj"].pop("proj_in.bias"), r"files lack resampler.image_projection.bias"),
        (lambda r: r["image_proj"].update({"pos_emb": torch.zeros(1)}), r"no place in this network: resampler.pos_emb"),
    ],
)
def test_incomplete_official_files_are_refused(unet, official_adapter_file, tmp_path, edit, message):
    with pytest.raises(WeightsError, match=message):
        MSAdapter.from_official(edited(official_adapter_file, tmp_path, edit), unet, head_width=16)


def test_head_width_must_divide(unet, official_adapter_file):
    with pytest.raises(WeightsError, match="64 wide, which 48 does not divide"):
        MSAdapter.from_official(official_adapter_file, unet, head_width=48)


def test_another_architecture_is_named_with_both_shapes(golden, adapter, official_adapter_file):
    wider = make_unet(golden, block_out_channels=[16, 32, 128], attention_head_dim=[2, 4, 8])
    with pytest.raises(WeightsError, match=r"\(64, 32\).*\(128, 32\)"):
        adapter.install(wider)
    other_text = make_unet(golden, cross_attention_dim=48)
    with pytest.raises(WeightsError, match=r"\(32, 32\).*\(32, 48\)"):
        adapter.install(other_text)
    deeper = make_unet(golden, transformer_layers_per_block=[1, 1, 3])
    with pytest.raises(WeightsError, match="11 cross-attention layers, but this one has 15; .*only in the UNet"):
        adapter.install(deeper)
    with pytest.raises(WeightsError, match="cross-attention layers"):
        MSAdapter.from_official(official_adapter_file, deeper, head_width=16)


def test_a_unet_without_cross_attention_is_refused():
    unet = UNet2DConditionModel(
        block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], mid_block_type=None,
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    with pytest.raises(WeightsError, match="no cross-attention"):
        cross_attentions(unet)


def test_from_unet_copies_the_frozen_keys_and_values(unet):
    params = ResamplerParams(
        image_width=48, phrase_width=24, output_width=32, width=32, depth=1, heads=2, head_width=16
    )
    fresh = MSAdapter.from_unet(unet, params, reference_background=(255, 255, 255))
    for name, module in cross_attentions(unet).items():
        assert torch.equal(fresh.layers[name].to_k.weight, module.to_k.weight)
        assert torch.equal(fresh.layers[name].to_v.weight, module.to_v.weight)
        assert fresh.layers[name].to_k.weight.data_ptr() != module.to_k.weight.data_ptr()
    assert all(weight.requires_grad for weight in fresh.parameters())
    assert fresh.config.reference_background == (255, 255, 255)


def test_install_is_silent_repeatable_and_leaves_the_bare_unet(golden, unet, adapter, caplog):
    bare = make_unet(golden)
    expected = predict(bare, golden)
    adapter.install(unet)
    adapter.install(unet)
    processors = unet.attn_processors.values()
    assert {type(processor) for processor in processors} == {ControlledAttnProcessor}
    assert {processor.base for processor in processors} == {None}
    predict(unet, golden, make_condition(adapter, golden))
    assert torch.equal(predict(unet, golden), expected)
    assert not caplog.records


def test_softmax_backend_is_for_all_attention(unet, adapter):
    adapter.install(unet, "softmax")
    plain = [processor._plain for processor in unet.attn_processors.values()]
    assert plain
    assert all(isinstance(processor, AttnProcessor) for processor in plain)
    with pytest.raises(RequestError, match="backend"):
        adapter.install(unet, "flash")


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"subject_scales": [0, 0, 0]}, {"boxes": torch.zeros(2, 3, 4)}])
def test_nothing_to_add_is_the_bare_unet_bit_for_bit(golden, unet, adapter, options):
    adapter.install(unet)
    assert torch.equal(predict(unet, golden, make_condition(adapter, golden, **options)), predict(unet, golden))


def test_scales_compose(golden, unet, adapter):
    adapter.install(unet)

    def with_scales(**options):
        return predict(unet, golden, make_condition(adapter, golden, **options))

    torch.testing.assert_close(with_scales(scale=0.8, subject_scales=[0.5] * 3), with_scales(scale=0.4))
    torch.testing.assert_close(
        with_scales(scale=0.5, subject_scales=[0.4, 1.0, 0.6]), with_scales(scale=1.0, subject_scales=[0.2, 0.5, 0.3])
    )
    per_sample = torch.tensor([[0.2, 0.5, 0.3], [1.0, 1.0, 1.0]])
    both = with_scales(scale=1.0, subject_scales=per_sample)
    torch.testing.assert_close(both[0], with_scales(scale=1.0, subject_scales=[0.2, 0.5, 0.3])[0])
    torch.testing.assert_close(both[1], with_scales(scale=1.0)[1])


def test_a_subject_of_scale_zero_equals_an_empty_box(golden, unet, adapter):
    adapter.install(unet)
    boxes = golden[0]["boxes"].clone()
    silent = predict(unet, golden, make_condition(adapter, golden, boxes=boxes, subject_scales=[1, 0, 1]))
    boxes[:, 1] = 0.0
    torch.testing.assert_close(silent, predict(unet, golden, make_condition(adapter, golden, boxes=boxes)))


def test_calls_do_not_leak_into_one_another(golden, unet, adapter):
    adapter.install(unet)
    spans = torch.tensor([[[1, 2], [3, 5], [6, 7]]] * 2)

    def sample(auto_layout):
        condition = make_condition(
            adapter, golden, auto_layout=AutoLayout(spans, start_step=2) if auto_layout else None
        )
        return torch.stack([predict(unet, golden, condition, later=step) for step in range(3)])

    boxes_first, text_first = sample(False), sample(True)
    assert not torch.equal(boxes_first, text_first)
    assert torch.equal(boxes_first[0], text_first[0])  # the boxes rule before start_step
    assert torch.equal(sample(False), boxes_first)
    assert torch.equal(sample(True), text_first)


@pytest.mark.parametrize(("height", "width"), [(8, 24), (9, 13), (17, 11)])
def test_any_latent_size(golden, unet, adapter, height, width):
    adapter.install(unet)
    torch.manual_seed(0)
    latents = torch.randn(2, 4, height, width)
    condition = make_condition(adapter, golden)
    result = predict(unet, golden, condition, latents)
    assert result.isfinite().all()
    assert not torch.equal(result, predict(unet, golden, None, latents))


def test_a_text_of_any_length(golden, unet, adapter):
    tensors, _ = golden
    adapter.install(unet)
    longer = ({**tensors, "text_states": tensors["text_states"].repeat(1, 2, 1)}, None)
    # Every text token twice is the same attention, so the subjects must not have moved either.
    doubled = predict(unet, longer, make_condition(adapter, golden))
    torch.testing.assert_close(doubled, predict(unet, golden, make_condition(adapter, golden)), rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_trained_weight(golden, unet, adapter):
    trained = MSAdapter(adapter.config, {name: layer.to_k.out_features for name, layer in adapter.layers.items()})
    trained.load_state_dict(adapter.state_dict())
    trained.install(unet, "softmax")
    predict(unet, golden, make_condition(trained, golden)).pow(2).mean().backward()
    without = [name for name, weight in trained.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []
    assert all(weight.grad.isfinite().all() for weight in trained.parameters())
    trained.install(unet, "sdpa")
    plain = {name: weight.grad.clone() for name, weight in trained.named_parameters()}
    trained.zero_grad()
    predict(unet, golden, make_condition(trained, golden)).pow(2).mean().backward()
    for name, weight in trained.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name], rtol=1e-3, atol=1e-6)


def test_condition_checks_shapes_and_counts(golden, adapter):
    tokens = torch.zeros(1, 2, 16, 32)
    with pytest.raises(LayoutError, match=r"\(1, 2, 16, 32\).*\(1, 3, 4\)"):
        adapter.condition(tokens, torch.zeros(1, 3, 4))
    with pytest.raises(RequestError, match=r"one number per subject \(2\)"):
        adapter.condition(tokens, torch.zeros(1, 2, 4), subject_scales=[1, 1, 1])


def rewrite(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "other/9"}, "other/9"),
        ({"colour": 1}, "unknown keys.*colour"),
        ({"resampler": {"depth": 2}}, "incomplete"),
        ({"reference_fit": "stretch"}, "reference_fit"),
        ({"reference_background": [0, 0, 300]}, "reference_background"),
        ({"defaults": {"stepz": 3}}, "stepz"),
        ({"defaults": 3}, "defaults in an adapter's config must be a mapping, got 3"),
        ({"defaults": {"scale": "lots"}}, r"defaults in an adapter's config: scale must be a number in \[0, 1000\]"),
        ({"defaults": {"guidance_scale": True}}, "guidance_scale must be a number"),
        ({"defaults": {"steps": 2.5}}, "steps must be a whole number"),
        ({"defaults": {"height": 100}}, "height is 100, but must be a multiple of 8"),
        ({"defaults": {"width": 80_000}}, "width must be at most 8192"),
        ({"defaults": {"negative_prompt": 3}}, "negative_prompt must be text"),
        ({"base_model": 3}, "base_model in an adapter's config must be text, got 3"),
        ({"base_config": []}, r"base_config in an adapter's config must be text, got \[\]"),
    ],
)
def test_bad_configs_are_refused(adapter, tmp_path, changes, message):
    adapter.save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(WeightsError, match=message):
        MSAdapter.from_pretrained(tmp_path)


def test_config_and_weights_of_different_adapters_are_named_with_both_shapes(adapter, tmp_path):
    adapter.save_pretrained(tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())["resampler"]
    rewrite(tmp_path, resampler={**sizes, "image_width": 64})
    with pytest.raises(WeightsError, match=r"\(64, 48\).*\(64, 64\)"):
        MSAdapter.from_pretrained(tmp_path)
    rewrite(tmp_path, resampler={**sizes, "depth": 9})
    with pytest.raises(WeightsError, match="there are 2, but the config asks for depth 9"):
        MSAdapter.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "size", [{"depth": 10**6}, {"width": 10**15}, {"width": 10**30}, {"feed_forward_factor": 10**18}]
)
def test_sizes_that_no_weights_have_are_refused_at_once(adapter, tmp_path, size):
    """To build a network of a depth that a hostile config names would never end."""
    adapter.save_pretrained(tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())["resampler"]
    rewrite(tmp_path, resampler={**sizes, **size})
    weights = {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}
    config = (tmp_path / "config.json").read_text()
    torch.save({"state_dict": weights, "adapter_config": config}, tmp_path / "hostile.ckpt")
    start = time.monotonic()
    with pytest.raises(WeightsError, match="asks for|no adapter has the sizes"):
        MSAdapter.from_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="asks for|no adapter has the sizes"):
        MSAdapter.from_checkpoint(tmp_path / "hostile.ckpt")
    assert time.monotonic() - start < 5


def test_missing_and_broken_adapter_files(adapter, tmp_path):
    with pytest.raises(WeightsError, match=r"no config\.json"):
        MSAdapter.from_pretrained(tmp_path)
    adapter.save_pretrained(tmp_path)
    (tmp_path / "adapter.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        MSAdapter.from_pretrained(tmp_path)
    for name in ("layers.a.b.to_k.weight", "layers..to_k.weight"):
        save_file({**adapter.state_dict(), name: torch.zeros(2, 2)}, tmp_path / "adapter.safetensors")
        with pytest.raises(WeightsError, match=r"adapter\.safetensors: no layer can be called so"):
            MSAdapter.from_pretrained(tmp_path)
    save_file({"layers.a.to_k.weight": torch.tensor(1.0)}, tmp_path / "adapter.safetensors")
    with pytest.raises(WeightsError, match="missing|its files lack"):
        MSAdapter.from_pretrained(tmp_path)
    for content, message in (
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"\xff\xfe", r"config\.json cannot be read as text in UTF-8"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            MSAdapter.from_pretrained(tmp_path)
        with pytest.raises(WeightsError, match=message):
            identify(str(tmp_path), None, None, "float32")


def test_released_config_has_the_official_defaults():
    config = AdapterConfig(resampler=ResamplerParams(image_width=1664, phrase_width=768, output_width=2048))
    assert (config.reference_background, config.reference_fit) == ((0, 0, 0), "squash")
    assert AdapterConfig.from_json(config.to_json()) == config


def test_without_regions_every_patch_reads_every_subject_that_is_there(golden, unet, adapter):
    """The ablation "no masks" equals masks of the whole picture; an empty box still removes its subject."""
    ablation = MSAdapter(replace(adapter.config, regions="everywhere"), layer_widths(adapter))
    ablation.load_state_dict(adapter.state_dict())
    ablation.install(unet)
    boxes = golden[0]["boxes"].clone()
    boxes[:, 1] = 0
    whole = boxes.clone()
    whole[boxes[..., 2] > 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    masks = (boxes[..., 2] > 0)[..., None, None].expand(-1, -1, 16, 16)
    adapter.install(unet)
    tokens = adapter.resampler(
        golden[0]["image_tokens"].unflatten(0, (2, 3)), golden[0]["phrase_embeds"].unflatten(0, (2, 3)), boxes
    )
    expected = predict(unet, golden, adapter.condition(tokens, boxes, masks=masks))
    ours = predict(unet, golden, ablation.condition(tokens, boxes))
    assert torch.equal(ours, expected)
    boxed = predict(unet, golden, adapter.condition(tokens, boxes))
    assert not torch.allclose(ours, boxed, atol=1e-4)


def layer_widths(adapter):
    return {name: layer.to_k.out_features for name, layer in adapter.layers.items()}


def test_global_projector_saves_loads_and_asks_for_one_embedding(adapter, tmp_path):
    params = ResamplerParams(image_width=24, phrase_width=16, output_width=32, tokens=4)
    rival = MSAdapter(AdapterConfig(resampler=params, projector="global", regions="everywhere"), {"a": 16})
    assert rival.config.reference_features == "global"
    assert adapter.config.reference_features == "tokens"
    rival.save_pretrained(tmp_path)
    again = MSAdapter.from_pretrained(tmp_path)
    assert again.config == rival.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in rival.state_dict().items())
    assert again.tokens_per_subject == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"projector": "linear"}, 'projector must be "resampler" or "global"'), ({"regions": "masks"}, "regions must be")],
)
def test_unknown_ablations_are_refused(adapter, changes, message):
    with pytest.raises(WeightsError, match=message):
        replace(adapter.config, **changes)
