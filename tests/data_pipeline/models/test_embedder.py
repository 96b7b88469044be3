import json

import numpy as np
import pytest

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.embedder import HistogramEmbedder, hub_name, load_embedder


def disc(colour, size=40, stripes=None):
    rows, columns = np.mgrid[:size, :size]
    inside = (rows - size / 2) ** 2 + (columns - size / 2) ** 2 < (size / 2.2) ** 2
    pixels = np.zeros((size, size, 4), dtype=np.uint8)
    pixels[inside] = (*colour, 255)
    if stripes:
        lines = (rows if stripes == "lying" else columns) // 4 % 2 == 0
        pixels[inside & lines] = (250, 250, 250, 255)
    return pixels


@pytest.fixture
def similarity():
    def compare(first, second):
        vectors = HistogramEmbedder().embed([first, second])
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        return float(vectors[0] @ vectors[1])

    return compare


RED, BLUE = (200, 30, 30), (30, 30, 200)


def test_the_same_thing_at_another_size_or_mirrored(similarity):
    assert similarity(disc(RED, 40, "lying"), disc(RED, 90, "lying")) > 0.9
    assert similarity(disc(RED, 40, "lying"), disc(RED, 40, "lying")[:, ::-1]) > 0.999


def test_colours_and_directions_are_told_apart(similarity):
    same = similarity(disc(RED), disc(RED))
    assert same == pytest.approx(1, abs=1e-5)
    assert similarity(disc(RED), disc(BLUE)) < 0.3
    assert similarity(disc(RED, 40, "lying"), disc(RED, 40, "standing")) < 0.85
    assert similarity(disc((90, 90, 90)), disc((220, 220, 220))) < 0.3


def test_what_is_outside_the_mask_does_not_count(similarity):
    other = disc(RED)
    other[other[..., 3] == 0, :3] = 77
    assert similarity(disc(RED), other) == pytest.approx(1, abs=1e-5)


def test_tiny_and_thin_cutouts(similarity):
    thin = np.zeros((300, 300, 4), dtype=np.uint8)
    thin[:, 0] = (*RED, 255)
    assert similarity(thin, np.full((1, 1, 4), 255, dtype=np.uint8)) >= 0
    assert HistogramEmbedder().embed([]).shape[0] == 0


def test_nothing_has_no_embedding():
    with pytest.raises(ValueError, match="a cut-out without a pixel"):
        HistogramEmbedder().embed([np.zeros((5, 5, 4), dtype=np.uint8)])


def test_unknown_embedders():
    for name in ("resnet", "timm:", "jax:vit"):
        with pytest.raises(SettingsError, match="embedder must be histogram, timm:NAME, transformers:NAME_OR_DIR"):
            load_embedder(name, None, "cpu")


def test_short_names(tmp_path):
    assert hub_name("dinov2:small") == "facebook/dinov2-small"
    assert hub_name("clip:large") == "openai/clip-vit-large-patch14"
    assert hub_name("clip:someone/theirs") == "someone/theirs"
    assert hub_name(f"dinov2:{tmp_path}") == str(tmp_path)
    with pytest.raises(SettingsError, match="'clip:huge' is not known; there are clip:base, clip:large, and clip:DIR"):
        hub_name("clip:huge")


@pytest.mark.slow
def test_timm_with_local_weights(tmp_path):
    import timm
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "weights.pt"
    torch.manual_seed(0)
    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    torch.save({"state_dict": weights}, path)
    embedder = load_embedder("timm:test_resnet", path, "cpu")
    pictures = [disc(RED), disc(BLUE, 70), disc(RED)]
    vectors = embedder.embed(pictures)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    assert embedder.embed([]).shape[0] == 0
    save_file(weights, path.with_suffix(".safetensors"))
    again = load_embedder("timm:test_resnet", path.with_suffix(".safetensors"), "cpu")
    np.testing.assert_array_equal(again.embed(pictures), vectors)
    again.most_at_once = 2
    np.testing.assert_allclose(again.embed(pictures), vectors, atol=1e-5)
    with pytest.raises(InputError, match="cannot create the timm model 'no_such_net'"):
        load_embedder("timm:no_such_net", path, "cpu")
    torch.save({"conv1.0.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="cannot load the timm model 'test_resnet': .*pt is incomplete"):
        load_embedder("timm:test_resnet", path, "cpu")
    torch.save({"other.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="there are others, such as other.weight, which have no place in it"):
        load_embedder("timm:test_resnet", path, "cpu")


class Flag:
    """Would set a flag when it is unpickled."""

    def __reduce__(self):
        return (setattr, (Flag, "is_set", True))


def test_timm_takes_no_strangers_and_repeats_no_advice(tmp_path):
    import timm
    import torch

    path = tmp_path / "weights.pt"
    for name in ("hf-hub:owner/name", "hf_hub:owner/name", f"local-dir:{tmp_path}", "../x"):
        with pytest.raises(InputError, match="it is none of timm's own"):
            load_embedder(f"timm:{name}", path, "cpu")
    torch.save({"state_dict": {"conv1.weight": Flag()}}, path)
    with pytest.raises(InputError, match="it is a pickle of more than tensors, which could run code") as told:
        load_embedder("timm:test_resnet", path, "cpu")
    assert "weights_only" not in str(told.value)
    assert not hasattr(Flag, "is_set")
    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    for name, value, message in (
        ("bn1.bias", float("nan"), "bn1.bias holds 1 of"),
        ("bn1.running_var", float("inf"), "bn1.running_var holds 1 of"),
    ):
        spoilt = {key: tensor.clone() for key, tensor in weights.items()}
        spoilt[name][0] = value
        torch.save(spoilt, path)
        with pytest.raises(InputError, match=rf"weights\.pt: {message}"):
            load_embedder("timm:test_resnet", path, "cpu")
    torch.save({**weights, "bn1.bias": weights["bn1.bias"].int()}, path)
    with pytest.raises(InputError, match="bn1.bias is int32: weights are floating-point numbers"):
        load_embedder("timm:test_resnet", path, "cpu")


def prepared(cutouts, size):
    """The pixels that the networks get, worked out by another way."""
    import torch
    from PIL import Image

    pixels = []
    for cutout in cutouts:
        square = np.full((cutout.shape[0], cutout.shape[1], 3), 128, dtype=np.uint8)
        square[cutout[..., 3] > 0] = cutout[cutout[..., 3] > 0][:, :3]
        small = Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC)
        pixels.append((np.asarray(small, dtype=np.float32) / 255 - 0.5) / 0.5)
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2))


def unit(features):
    return (features / features.norm(dim=1, keepdim=True)).detach().numpy()


@pytest.mark.slow
def test_dinov2_from_a_local_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"--embedder: the directory .* lacks its image settings"):
        load_embedder(f"transformers:{tmp_path}", None, "cpu")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    pictures = [disc(RED), disc(BLUE)]
    expected = unit(model(prepared(pictures, 28)).last_hidden_state[:, 0])
    for name in (f"transformers:{tmp_path}", f"dinov2:{tmp_path}"):
        vectors = load_embedder(name, None, "cpu").embed(pictures)
        assert vectors.shape == (2, 32)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
    with pytest.raises(InputError, match="--embedder: no directory at"):
        load_embedder(f"transformers:{tmp_path / 'missing'}", None, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["both towers", "projected", "plain"])
def test_clip_from_a_local_folder(tmp_path, kind):
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        CLIPVisionModelWithProjection,
    )

    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**tower, "image_size": 32, "patch_size": 16, "projection_dim": 24}
    pixels = prepared([disc(RED), disc(BLUE)], 32)
    if kind == "both towers":
        model = CLIPModel(CLIPConfig(text_config={**tower, "vocab_size": 20}, vision_config=vision, projection_dim=24))
        expected = model.eval().visual_projection(model.vision_model(pixels).pooler_output)
    elif kind == "projected":
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)).eval()
        expected = model(pixels).image_embeds
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**vision)).eval()
        expected = model(pixels).pooler_output
    model.save_pretrained(tmp_path)
    half = [0.5] * 3
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=half, image_std=half
    ).save_pretrained(tmp_path)
    vectors = load_embedder(f"clip:{tmp_path}", None, "cpu").embed([disc(RED), disc(BLUE)])
    assert vectors.shape == (2, 32 if kind == "plain" else 24)
    np.testing.assert_allclose(vectors, unit(expected), atol=1e-5)


@pytest.mark.slow
def test_gaps_in_the_weights_are_refused_and_a_missing_pooler_is_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**sizes, image_size=28, patch_size=14)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    without = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(without) < len(weights)
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pictures = [disc(RED), disc(BLUE)]
    expected = unit(model(prepared(pictures, 28)).last_hidden_state[:, 0])
    np.testing.assert_allclose(
        load_embedder(f"transformers:{tmp_path}", None, "cpu").embed(pictures), expected, atol=1e-5
    )
    without.popitem()
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="--embedder: .* its files lack layernorm.weight"):
        load_embedder(f"transformers:{tmp_path}", None, "cpu")


VIT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
       "patch_size": 16}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 99}
SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
        "encoder_stride": 4}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
SEGMENTS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1], "auxiliary_channels": 8}
FOCAL = {"image_size": 64, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
         "focal_levels": [1, 1], "focal_windows": [3, 3]}  # fmt: skip
# Of every model type that is taken: settings of a small one, and the ends of the classes that it may be saved by.
SAVED = {
    "clip": ({"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}, "Model"),
    "clip_vision_model": ({**VIT, "projection_dim": 16}, "CLIPVisionModel CLIPVisionModelWithProjection"),
    "siglip": ({"text_config": TEXT, "vision_config": VIT}, "Model"),
    "siglip_vision_model": (VIT, "SiglipVisionModel"),
    "dinov2": (VIT, "Model ForImageClassification"),
    "dinov2_with_registers": (VIT, "Model ForImageClassification"),
    "dinov3_vit": (VIT, "Model"),
    "dinov3_convnext": (STAGES, "Model"),
    "vit": (VIT, "Model ForImageClassification ForMaskedImageModeling"),
    "vit_mae": (
        {**VIT, "decoder_hidden_size": 32, "decoder_num_attention_heads": 4, "decoder_num_hidden_layers": 1,
         "decoder_intermediate_size": 32}, "Model ForPreTraining",
    ),
    "vit_msn": (VIT, "Model ForImageClassification"),
    "deit": (VIT, "Model ForImageClassification ForImageClassificationWithTeacher ForMaskedImageModeling"),
    "beit": (
        {**VIT, **SEGMENTS, "vocab_size": 9},
        "Model ForImageClassification ForMaskedImageModeling ForSemanticSegmentation",
    ),
    "data2vec-vision": ({**VIT, **SEGMENTS}, "Model ForImageClassification ForSemanticSegmentation"),
    "ijepa": (VIT, "Model ForImageClassification"),
    "swin": (SWIN, "Model ForImageClassification ForMaskedImageModeling Backbone"),
    "swinv2": (SWIN, "Model ForImageClassification ForMaskedImageModeling"),
    "convnext": (STAGES, "Model ForImageClassification"),
    "convnextv2": (STAGES, "Model ForImageClassification"),
    "resnet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "Model ForImageClassification",
    ),
    "regnet": ({**STAGES, "embedding_size": 8, "groups_width": 4}, "Model ForImageClassification"),
    "efficientnet": (
        {"image_size": 64, "hidden_dim": 640, "in_channels": [32, 16], "out_channels": [16, 24], "kernel_sizes": [3, 3],
         "depthwise_padding": [], "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2],
         "width_coefficient": 0.5}, "Model ForImageClassification",
    ),
    "hiera": (
        {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
         "decoder_hidden_size": 8, "decoder_num_heads": 1, "decoder_depth": 1},
        "Model ForImageClassification ForPreTraining",
    ),
    "pvt_v2": (
        {"image_size": 64, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1],
         "mlp_ratios": [2, 2, 2, 2]}, "Model ForImageClassification",
    ),
    "focalnet": (FOCAL, "Model ForImageClassification ForMaskedImageModeling"),
    "mobilenet_v2": ({"depth_multiplier": 0.25, "image_size": 64},
                     "Model ForImageClassification ForSemanticSegmentation"),
}  # fmt: skip


def test_every_model_type_that_is_taken_is_tried():
    from data_pipeline.models.model_claims import VISION

    assert set(SAVED) == set(VISION)


@pytest.mark.parametrize(("kind", "end"), [(kind, end) for kind, (_, ends) in SAVED.items() for end in ends.split()])
def test_models_are_taken_whatever_class_has_saved_them(kind, end, tmp_path):
    """What stands on top of the network is left out; the network itself is whole."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **SAVED[kind][0])
    name = type(config).__name__.removesuffix("Config") + end
    getattr(transformers, end if hasattr(transformers, end) else name)(config).save_pretrained(tmp_path)
    settings = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    features = load_embedder(f"transformers:{tmp_path}", None, "cpu").embed([disc(RED), disc(BLUE)])
    assert len(features) == 2
    assert np.isfinite(features).all()


def test_a_tensor_of_no_head_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**VIT)).save_pretrained(tmp_path)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    weights = load_file(tmp_path / "model.safetensors")
    weights["vit.strange.weight"] = next(iter(weights.values()))
    save_file({name: each.clone() for name, each in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"no place in this network: .*strange\.weight"):
        load_embedder(f"transformers:{tmp_path}", None, "cpu")
