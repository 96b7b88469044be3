import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from diffusers.models import ControlNetModel
from PIL import Image

from msdiffusion.backbone import references
from msdiffusion.backbone.backbone import Backbone, quiet_loading, usable_device
from msdiffusion.backbone.references import flatten
from msdiffusion.errors import RequestError, WeightsError

WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def sd1_backbone(tiny_sd1_model_dir):
    return Backbone.from_pretrained(tiny_sd1_model_dir / "base", tiny_sd1_model_dir / "image_encoder", device="cpu")


@pytest.fixture(scope="module")
def backbone(tiny_model_dir):
    return Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", device="cpu")


def test_parts_are_frozen_and_sizes_are_read_off(backbone):
    for part in (backbone.unet, backbone.vae, backbone.pipeline.text_encoder_2, backbone.image_encoder):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())
    assert (backbone.cross_attention_dim, backbone.phrase_width, backbone.image_width) == (48, 16, 24)
    assert backbone.latent_factor == 2
    assert (backbone.device.type, backbone.dtype) == ("cpu", torch.float32)


def test_dtype_is_for_all_parts(tiny_model_dir):
    half = Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", torch.bfloat16, "cpu")
    assert {half.dtype, half.image_encoder.dtype, half.pipeline.text_encoder.dtype} == {torch.bfloat16}


def test_prompts_are_encoded_as_the_pipeline_does(backbone):
    states, pooled = backbone.encode_prompts(["a dog", "a cat on the beach"])
    assert states.shape == (2, 40, 48)
    assert pooled.shape == (2, 20)
    torch.testing.assert_close(backbone.encode_prompts(["a dog"])[0], states[:1])


def test_phrases_are_the_unprojected_pooled_output_of_the_first_encoder(backbone):
    embeddings = backbone.encode_phrases(["dog", "red cat"])
    assert embeddings.shape == (2, 16)
    tokens = torch.tensor([backbone.tokenizer("red cat")["input_ids"]])  # without padding: the end token's last state
    states = backbone.pipeline.text_encoder(tokens).last_hidden_state
    torch.testing.assert_close(embeddings[1], states[0, -1], rtol=1e-4, atol=1e-5)


def test_words_after_a_token_of_textual_inversion_count(tiny_model_dir):
    """The configs of Stable Diffusion 1.5 and SDXL name a wrong end of text, 2: read at the new token."""
    ours = Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", device="cpu")
    encoder, plain = ours.pipeline.text_encoder, ours.encode_phrases(["dog", "red cat"])
    ours.tokenizer.add_tokens("<toy>")
    encoder.resize_token_embeddings(len(ours.tokenizer))
    phrases = ["<toy> dog", "<toy> cat", "red <toy>"]
    right = ours.encode_phrases(phrases)
    encoder.config.eos_token_id = encoder.eos_token_id = 2
    assert torch.equal(ours.encode_phrases(phrases), right)
    assert not torch.equal(right[0], right[1])
    assert torch.equal(ours.encode_phrases(["dog", "red cat"]), plain)


def test_references_give_penultimate_states(backbone):
    pixels = backbone.prepare_references([Image.new("RGB", (30, 50)), Image.new("RGBA", (64, 64))], WHITE, "pad")
    assert pixels.shape == (2, 3, 64, 64)
    tokens = backbone.encode_references(pixels)
    assert tokens.shape == (2, 65, 24)
    everything = backbone.image_encoder(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(tokens, everything[-2])
    assert not torch.equal(tokens, everything[-1])


def test_flatten_shows_the_background_through():
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    picture.putpixel((1, 0), (200, 100, 0, 128))
    assert flatten(picture, WHITE).getpixel((0, 0)) == WHITE
    mixed = np.array(flatten(picture, WHITE).getpixel((1, 0)))
    np.testing.assert_allclose(mixed, np.array([200, 100, 0]) * 128 / 255 + 255 * 127 / 255, atol=1)
    assert flatten(Image.new("RGB", (1, 1), (1, 2, 3)), WHITE).getpixel((0, 0)) == (1, 2, 3)


def test_hidden_colours_of_a_cut_out_do_not_matter(backbone):
    """Straight alpha: what lies under transparent pixels must not reach the encoder."""
    one, other = Image.new("RGBA", (40, 40), (255, 0, 0, 0)), Image.new("RGBA", (40, 40), (0, 0, 255, 0))
    for picture in (one, other):
        picture.paste((10, 200, 10, 255), (10, 10, 30, 30))
    pixels = backbone.prepare_references([one, other], WHITE, "pad")
    assert torch.equal(pixels[0], pixels[1])
    opaque = Image.new("RGB", (40, 40), WHITE)
    opaque.paste((10, 200, 10), (10, 10, 30, 30))
    assert torch.equal(backbone.prepare_references([opaque], WHITE, "pad")[0], pixels[0])
    assert not torch.equal(backbone.prepare_references([one], (0, 0, 0), "pad")[0], pixels[0])


def test_pad_keeps_the_aspect_and_squash_does_not(backbone):
    tall = Image.new("RGB", (20, 80), (0, 0, 0))

    def dark_columns(fit):
        pixels = backbone.prepare_references([tall], WHITE, fit)[0]
        return (pixels[0, 32] < pixels.amin() + 0.1).sum().item()

    assert dark_columns("squash") == 64
    assert 14 <= dark_columns("pad") <= 18
    with pytest.raises(RequestError, match="fit must be"):
        backbone.prepare_references([tall], WHITE, "stretch")


@pytest.mark.parametrize("size", [(1200, 200), (150, 1300)])
def test_a_long_reference_is_reduced_before_it_becomes_a_square(backbone, size, monkeypatch):
    picture = Image.effect_noise(size, 60).convert("RGB").resize((60, 60)).resize(size)
    whole = backbone.prepare_references([picture], WHITE)
    monkeypatch.setattr(references, "LONG_SIDE", 1000)
    monkeypatch.setattr(references, "SHORT_SIDE", 300)
    assert abs(backbone.prepare_references([picture], WHITE) - whole).mean() < 0.01  # of a range of 4
    assert references._square(picture, WHITE, "pad").size == (300 if size[0] == 1200 else 325,) * 2
    monkeypatch.undo()
    assert references._square(Image.new("RGB", (16000, 3500)), WHITE, "pad").size == (2286, 2286)
    assert references._square(Image.new("RGB", (8192, 10)), WHITE, "pad").size == (8192, 8192)


def test_pictures_and_latents(backbone):
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = backbone.encode_pictures(pixels, torch.Generator().manual_seed(0))
    assert latents.shape == (2, 4, 16, 24)
    assert torch.equal(latents, backbone.encode_pictures(pixels, torch.Generator().manual_seed(0)))
    pictures = backbone.decode_latents(latents)
    assert [picture.size for picture in pictures] == [(48, 32)] * 2
    scale = backbone.vae.config.scaling_factor
    decoded = backbone.vae.decode(latents / scale).sample
    expected = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(np.asarray(pictures[0], dtype=np.float32), expected, atol=1)


def test_latent_statistics_of_the_config_are_used(backbone):
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = backbone.encode_pictures(pixels, torch.Generator().manual_seed(0)) / backbone.vae.config.scaling_factor
    pictures = backbone.decode_latents(plain * backbone.vae.config.scaling_factor)
    try:
        backbone.vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4)
        shifted = backbone.encode_pictures(pixels, torch.Generator().manual_seed(0))
        mean = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
        torch.testing.assert_close(shifted, (plain - mean) / 2 * backbone.vae.config.scaling_factor)
        again = backbone.decode_latents(shifted)
        np.testing.assert_allclose(np.asarray(again[0], dtype=int), np.asarray(pictures[0], dtype=int), atol=1)
    finally:
        backbone.vae.register_to_config(latents_mean=None, latents_std=None)


@pytest.mark.parametrize("statistics", [(None, None), ([1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0])])
def test_the_posterior_is_what_is_sampled(backbone, statistics):
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    backbone.vae.register_to_config(latents_mean=statistics[0], latents_std=statistics[1])
    try:
        mean, deviation = backbone.latent_posterior(pixels)
        assert mean.dtype == deviation.dtype == torch.float32
        assert mean.shape == deviation.shape == (2, *backbone.latent_shape(32, 48)) == (2, 4, 16, 24)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
        sampled = backbone.encode_pictures(pixels, torch.Generator().manual_seed(0))
        torch.testing.assert_close(mean + deviation * noise, sampled)
    finally:
        backbone.vae.register_to_config(latents_mean=None, latents_std=None)


def test_an_autoencoder_with_one_answer_has_no_deviation(backbone, monkeypatch):
    from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder

    monkeypatch.setattr(backbone.pipeline, "vae", PixelUnshuffleAutoencoder())
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    mean, deviation = backbone.latent_posterior(pixels)
    assert deviation is None
    assert torch.equal(mean, backbone.encode_pictures(pixels))
    assert mean.shape[1:] == backbone.latent_shape(16, 16)


@pytest.mark.parametrize("size", [(33, 32), (32, 33), (0, 32)])
def test_pictures_that_have_no_latents_are_refused(backbone, size):
    with pytest.raises(RequestError, match=rf"{size[0]} x {size[1]} pixels .* multiples of 2 for this base"):
        backbone.latent_shape(*size)


def test_an_autoencoder_that_overflows_is_upcast_for_the_moment(backbone):
    backbone.vae.register_to_config(force_upcast=True)
    backbone.vae.to(torch.float16)
    try:
        latents = backbone.encode_pictures(torch.zeros(1, 3, 16, 16))
        assert latents.isfinite().all()
        backbone.decode_latents(latents)
        assert backbone.vae.dtype == torch.float16
    finally:
        backbone.vae.to(torch.float32)
        backbone.vae.register_to_config(force_upcast=False)


def test_size_conditions_are_the_pipelines(backbone):
    pooled = torch.randn(2, 20)
    one = backbone.added_conditions(pooled, (64, 48), (1, 2), (32, 16))
    assert one["time_ids"].tolist() == [[64, 48, 1, 2, 32, 16]] * 2
    assert one["text_embeds"] is pooled
    each = backbone.added_conditions(pooled, torch.tensor([[64, 48], [80, 90]]), (1, 2), (32, 16))
    assert each["time_ids"][1].tolist() == [80, 90, 1, 2, 32, 16]
    theirs = backbone.pipeline._get_add_time_ids((64, 48), (1, 2), (32, 16), pooled.dtype, 20)
    assert torch.equal(theirs[0], one["time_ids"][0])


def test_another_kind_of_pipeline_is_refused(backbone):
    class OtherPipeline:
        pass

    with pytest.raises(WeightsError, match="OtherPipeline, but a StableDiffusionXLPipeline"):
        Backbone(OtherPipeline(), backbone.image_encoder, backbone.image_processor)


def test_device_and_quiet():
    assert usable_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    quiet_loading()


def test_tiny_layout_is_that_of_the_shipped_weights(tiny_model_dir):
    assert {path.name for path in tiny_model_dir.iterdir()} == {
        "config.json", "adapter.safetensors", "base", "image_encoder",
    }  # fmt: skip
    assert json.loads((tiny_model_dir / "config.json").read_text())["base_model"] == "base"


def test_global_features_are_the_projected_embedding(tiny_model_dir):
    backbone = Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", device="cpu")
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = backbone.encode_references(pixels, "global")
    assert features.shape == (3, 1, 16)
    assert torch.equal(features[:, 0], backbone.image_encoder(pixels).image_embeds)
    assert (backbone.image_width_of("global"), backbone.image_width_of("tokens")) == (16, 24)


# Stable Diffusion 1.x


def test_one_text_encoder_serves_prompts_and_phrases(sd1_backbone):
    assert sd1_backbone.kind == "sd1"
    assert (sd1_backbone.cross_attention_dim, sd1_backbone.phrase_width, sd1_backbone.latent_factor) == (20, 20, 2)
    states, pooled = sd1_backbone.encode_prompts(["a dog", "a cat on the beach"])
    assert states.shape == (2, 40, 20)
    assert pooled is None
    expected, _ = sd1_backbone.pipeline.encode_prompt("a dog", "cpu", 1, False)
    torch.testing.assert_close(states[:1], expected)
    assert sd1_backbone.encode_phrases(["dog", "red cat"]).shape == (2, 20)
    assert sd1_backbone.added_conditions(None, (64, 64), (0, 0), (64, 64)) == {}


def test_a_unet_of_1x_answers(sd1_backbone):
    states, _ = sd1_backbone.encode_prompts(["a dog"])
    latents = sd1_backbone.encode_pictures(torch.zeros(1, 3, 64, 64), torch.Generator().manual_seed(0))
    added = sd1_backbone.added_conditions(None, (64, 64), (0, 0), (64, 64))
    noise = sd1_backbone.unet(latents, 500, states, added_cond_kwargs=added).sample
    assert noise.shape == latents.shape
    assert sd1_backbone.decode_latents(latents)[0].size == (64, 64)


# Pipelines given in memory


def sibling(backbone, kind, **parts):
    names = set(kind._get_signature_keys(kind)[0])  # parts that this pipeline takes
    components = {name: part for name, part in backbone.pipeline.components.items() if name in names}
    options = {"add_watermarker": False} if backbone.kind == "sdxl" else {"requires_safety_checker": False}
    return kind(**components, **parts, **options)


@pytest.mark.parametrize(
    "kind", [StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline, StableDiffusionXLControlNetPipeline]
)
def test_siblings_of_sdxl(backbone, kind):
    parts = {}
    if kind is StableDiffusionXLControlNetPipeline:
        parts["controlnet"] = ControlNetModel.from_unet(backbone.unet, conditioning_channels=3)
    other = Backbone(sibling(backbone, kind, **parts), backbone.image_encoder, backbone.image_processor)
    assert other.kind == "sdxl"
    for ours, theirs in zip(other.encode_prompts(["a dog"]), backbone.encode_prompts(["a dog"]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_siblings_of_1x(sd1_backbone, kind):
    other = Backbone(sibling(sd1_backbone, kind), sd1_backbone.image_encoder, sd1_backbone.image_processor)
    assert other.kind == "sd1"
    assert torch.equal(other.encode_prompts(["a dog"])[0], sd1_backbone.encode_prompts(["a dog"])[0])


def test_a_compiled_unet_counts_as_what_it_wraps(tiny_model_dir, backbone):
    parts = Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", device="cpu").pipeline
    parts.unet = torch.compile(parts.unet)
    assert Backbone(parts, backbone.image_encoder, backbone.image_processor).kind == "sdxl"


def test_a_pipeline_without_the_first_text_encoder_is_refused(backbone):
    refiner = StableDiffusionXLImg2ImgPipeline(
        **{**backbone.pipeline.components, "text_encoder": None, "tokenizer": None}, add_watermarker=False
    )
    with pytest.raises(WeightsError, match="is a StableDiffusionXLImg2ImgPipeline, but"):
        Backbone(refiner, backbone.image_encoder, backbone.image_processor)


# Offloading


def test_the_device_is_where_offloaded_weights_compute(tiny_model_dir):
    """Between two calls the weights themselves are on the meta device."""
    backbone = Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", device="cpu")
    pipeline = backbone.pipeline
    before = backbone.image_encoder(torch.zeros(1, 3, 64, 64)).image_embeds
    for part in (
        pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, backbone.image_encoder,
    ):  # fmt: skip
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert pipeline.unet.device.type == "meta"
    assert backbone.device.type == "cpu"
    assert backbone.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(backbone.encode_references(torch.zeros(1, 3, 64, 64), "global")[:, 0], before)
    assert backbone.encode_phrases(["dog"]).device.type == "cpu"
    latents = backbone.encode_pictures(torch.zeros(1, 3, 64, 64))
    assert latents.device.type == "cpu"
    assert len(backbone.decode_latents(latents)) == 1


def test_the_pipeline_is_asked_for_its_device_only_where_hooks_move_weights(tiny_model_dir, monkeypatch):
    """Its answer is slow, and training needs one at every step."""
    backbone = Backbone.from_pretrained(
        str(tiny_model_dir / "base"), str(tiny_model_dir / "image_encoder"), device="cpu"
    )
    monkeypatch.setattr(type(backbone.pipeline), "_execution_device", "the pipeline's answer")
    assert backbone.device == torch.device("cpu")
    backbone.unet.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert backbone.device == "the pipeline's answer"


def test_a_tokenizer_without_a_limit_gets_the_encoders(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    for name, limit in (("tokenizer", None), ("tokenizer_2", 77)):
        path = tmp_path / "base" / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": limit}))
    ours = Backbone.from_pretrained(tmp_path / "base", tiny_model_dir / "image_encoder", device="cpu")
    assert (ours.tokenizer.model_max_length, ours.pipeline.tokenizer_2.model_max_length) == (40, 40)
    plain = Backbone.from_pretrained(tiny_model_dir / "base", tiny_model_dir / "image_encoder", device="cpu")
    assert torch.equal(ours.encode_prompts(["a dog"])[0], plain.encode_prompts(["a dog"])[0])
    assert torch.equal(ours.encode_phrases(["dog"]), plain.encode_phrases(["dog"]))
