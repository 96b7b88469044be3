"""open_clip's vision towers answer as transformers' do, from the same weights."""

import dataclasses

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionModelWithProjection

import msdiffusion.backbone.open_clip_encoder
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.backbone.open_clip_encoder import OpenClipName, OpenClipVisionEncoder, to_transformers, vision_config
from msdiffusion.backbone.pretrained import load_image_encoder, load_pipeline
from msdiffusion.errors import WeightsError

SIZES = {"image_size": 56, "layers": 5, "width": 104, "head_width": 52, "mlp_ratio": 4.9231, "patch_size": 14}


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """The sizes of ViT-bigG-14, divided by about sixteen."""
    known = {
        "ViT-small-14": {"embed_dim": 80, "vision_cfg": SIZES, "text_cfg": {}},
        "ViT-small-14-quickgelu": {"embed_dim": 80, "vision_cfg": SIZES, "text_cfg": {}, "quick_gelu": True},
    }
    given = open_clip.get_model_config
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: known.get(name) or given(name))


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A whole CLIP's file with random weights, of which only the vision tower matters."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    torch.manual_seed(0)
    visual = _build_vision_tower(80, CLIPVisionCfg(**SIZES))
    with torch.no_grad():
        for weight in visual.parameters():  # biases and norms are trivial at first, which would hide mistakes
            weight.add_(torch.randn_like(weight) * 0.05)
    path = tmp_path_factory.mktemp("open_clip") / "open_clip_model.safetensors"
    weights = {f"visual.{name}": weight for name, weight in visual.state_dict().items()}
    save_file({**weights, "logit_scale": torch.zeros(1), "token_embedding.weight": torch.zeros(9, 8)}, path)
    return path


@pytest.mark.exact
@pytest.mark.parametrize("model", ["ViT-small-14", "ViT-small-14-quickgelu"])
@torch.no_grad()
def test_tokens_and_embeddings_equal_those_of_transformers(model, weights_file):
    ours = OpenClipVisionEncoder.from_pretrained(f"open_clip:{model}@{weights_file}").eval()
    theirs = CLIPVisionModelWithProjection(ours.config).eval()
    missing, unexpected = theirs.load_state_dict(to_transformers(ours.visual.state_dict()), strict=False)
    assert unexpected == []
    assert [name for name in missing if "position_ids" not in name] == []
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    answer, expected = ours(pixels, output_hidden_states=True), theirs(pixels, output_hidden_states=True)
    assert answer.hidden_states[-2].shape == (3, 17, 104)
    for k in (-2, -1):
        torch.testing.assert_close(answer.hidden_states[k], expected.hidden_states[k], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer.image_embeds, expected.image_embeds, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answer.hidden_states[-2], answer.hidden_states[-1])
    assert ours(pixels).hidden_states is None


@torch.no_grad()
def test_a_backbone_takes_either(weights_file, tiny_model_dir, tmp_path):
    pipeline = load_pipeline(tiny_model_dir / "base")
    ours = Backbone(pipeline, *load_image_encoder(f"open_clip:ViT-small-14@{weights_file}"))
    ours.image_encoder.save_pretrained(tmp_path)
    ours.image_processor.save_pretrained(tmp_path)
    theirs = Backbone(pipeline, *load_image_encoder(tmp_path))
    assert isinstance(theirs.image_encoder, CLIPVisionModelWithProjection)
    assert (ours.image_width, ours.image_width_of("global")) == (104, 80)
    assert not any(weight.requires_grad for weight in ours.image_encoder.parameters())
    picture = Image.effect_noise((70, 40), 80).convert("RGB")
    pixels = ours.prepare_references([picture], (0, 0, 0))
    assert torch.equal(pixels, theirs.prepare_references([picture], (0, 0, 0)))
    for features in ("tokens", "global"):
        torch.testing.assert_close(
            ours.encode_references(pixels, features), theirs.encode_references(pixels, features), rtol=1e-5, atol=1e-5
        )


def test_dtype(weights_file):
    half = OpenClipVisionEncoder.from_pretrained(f"open_clip:ViT-small-14@{weights_file}", torch.bfloat16)
    assert (half.dtype, half.device.type) == (torch.bfloat16, "cpu")
    assert half(torch.zeros(1, 3, 56, 56, dtype=torch.bfloat16)).image_embeds.dtype == torch.bfloat16


def test_released_sizes_are_known_without_weights():
    config = vision_config(OpenClipName.parse("open_clip:ViT-bigG-14/laion2b_s39b_b160k"))
    assert (config.hidden_size, config.projection_dim, config.image_size, config.num_hidden_layers) == (
        1664, 1280, 224, 48,
    )  # fmt: skip
    assert (config.intermediate_size, config.num_attention_heads, config.hidden_act) == (8192, 16, "gelu")
    assert vision_config(OpenClipName.parse("open_clip:ViT-L-14/openai")).hidden_act == "quick_gelu"


def test_the_full_tower_is_built_with_the_released_shapes():
    with torch.device("meta"):
        visual = msdiffusion.backbone.open_clip_encoder._build(
            vision_config(OpenClipName.parse("open_clip:ViT-bigG-14"))
        )
    shapes = {name: tuple(weight.shape) for name, weight in visual.state_dict().items()}
    assert len(shapes) == 584
    assert shapes["transformer.resblocks.47.mlp.c_fc.weight"] == (8192, 1664)
    assert sum(weight.numel() for weight in visual.parameters()) == pytest.approx(1844.9e6, rel=1e-4)


def test_a_release_is_downloaded_and_preprocessed_its_own_way(weights_file, monkeypatch):
    asked = []
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["first", "second"])
    releases = {
        "first": {"hf_hub": "laion/first/", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
        "second": {"hf_hub": "", "url": "somewhere"},
    }
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: releases[tag])
    monkeypatch.setattr(
        msdiffusion.backbone.open_clip_encoder, "hf_hub_download", lambda *name: asked.append(name) or str(weights_file)
    )
    encoder = OpenClipVisionEncoder.from_pretrained("open_clip:ViT-small-14")
    assert asked == [("laion/first", "open_clip_model.safetensors")]
    assert [*encoder.processor.image_mean, *encoder.processor.image_std] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    with pytest.raises(WeightsError, match="knows no hub repository with these weights"):
        OpenClipVisionEncoder.from_pretrained("open_clip:ViT-small-14/second")
    with pytest.raises(WeightsError, match=r"no release 'third' of ViT-small-14; it has \['first', 'second'\]"):
        OpenClipVisionEncoder.from_pretrained("open_clip:ViT-small-14/third")

    def offline(*name):
        raise OSError("offline")

    monkeypatch.setattr(msdiffusion.backbone.open_clip_encoder, "hf_hub_download", offline)
    with pytest.raises(WeightsError, match="open_clip_model.safetensors of laion/first: offline"):
        OpenClipVisionEncoder.from_pretrained("open_clip:ViT-small-14")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:", "must be open_clip:MODEL"),
        ("open_clip:ViT-small-14@", "must be open_clip:MODEL"),
        ("open_clip:ViT-small-14@weights.pt", "must be a .safetensors file; pickles are not opened"),
        ("open_clip:ViT-small-14@nowhere.safetensors", "no such file: nowhere.safetensors"),
        ("open_clip:ViT-bogG-14", "no model 'ViT-bogG-14'; near it"),
        ("open_clip:ViT-B-16-SigLIP", "not a plain CLIP transformer"),
        ("open_clip:RN50", "not a plain CLIP transformer"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(WeightsError, match=message):
        OpenClipVisionEncoder.from_pretrained(name)


def test_weights_of_another_model(weights_file, tmp_path):
    with pytest.raises(
        WeightsError, match=r"read as the ViT-B-32 of open_clip is incomplete: its files lack transformer\.res"
    ):
        OpenClipVisionEncoder.from_pretrained(f"open_clip:ViT-B-32@{weights_file}")
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        OpenClipVisionEncoder.from_pretrained(f"open_clip:ViT-small-14@{tmp_path / 'w.safetensors'}")
    with pytest.raises(WeightsError, match=r"visual\.attn_pool\.query is no weight of a plain CLIP"):
        to_transformers({"attn_pool.query": torch.zeros(1)})


@pytest.mark.parametrize("name", ["open_clip:A", "open_clip:A/tag", "open_clip:A@/x/y.safetensors"])
def test_names_are_written_as_they_are_read(name):
    assert str(OpenClipName.parse(name)) == name
    assert dataclasses.asdict(OpenClipName.parse(name))["model"] == "A"
