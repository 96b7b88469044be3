import numpy as np
import pytest

from data_pipeline.models.embedder import HistogramEmbedder, load_embedder
from data_pipeline.records import InputError, SettingsError


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
        with pytest.raises(SettingsError, match="embedder must be histogram, timm:NAME or transformers:NAME"):
            load_embedder(name, None, "cpu")


@pytest.mark.slow
def test_timm_with_local_weights(tmp_path):
    import timm
    import torch

    path = tmp_path / "weights.pt"
    torch.manual_seed(0)
    torch.save({"state_dict": timm.create_model("test_resnet", pretrained=False).state_dict()}, path)
    embedder = load_embedder("timm:test_resnet", path, "cpu")
    vectors = embedder.embed([disc(RED), disc(BLUE, 70), disc(RED)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-5)
    with pytest.raises(InputError, match="cannot create the timm model 'no_such_net'"):
        load_embedder("timm:no_such_net", path, "cpu")
    torch.save({"conv1.0.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="cannot load .* into the timm model 'test_resnet'"):
        load_embedder("timm:test_resnet", path, "cpu")
    torch.save({"other.weight": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="lacks .* tensors of 'test_resnet'"):
        load_embedder("timm:test_resnet", path, "cpu")


@pytest.mark.slow
def test_transformers_from_a_local_folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    vectors = load_embedder(f"transformers:{tmp_path}", None, "cpu").embed([disc(RED), disc(BLUE)])
    assert vectors.shape == (2, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    with pytest.raises(InputError, match="cannot load the vision model"):
        load_embedder(f"transformers:{tmp_path / 'missing'}", None, "cpu")
