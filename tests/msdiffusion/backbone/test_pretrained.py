"""Base models and image encoders from folders, files, the hub (replaced here) and open_clip; nothing is unpickled."""

import json
import logging
import pickle
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from msdiffusion.backbone.configs import (
    absolute,
    calls_per_step,
    encoder_widths,
    is_local,
    kind_of_class,
    native_side,
    skeleton_unet,
    split_hub_folder,
)
from msdiffusion.backbone.pretrained import _scheduler_of, load_image_encoder, load_pipeline
from msdiffusion.backbone.single_file import read_single_file
from msdiffusion.errors import WeightsError
from msdiffusion.pixel_autoencoder import PixelUnshuffleAutoencoder
from msdiffusion.places import DEFAULT_MODEL


def test_what_configs_alone_tell(tiny_model_dir, single_file, tmp_path):
    assert (native_side(tiny_model_dir / "base"), calls_per_step(tiny_model_dir / "base")) == (64, 1)
    assert native_side(single_file, tiny_model_dir / "base") == 64
    for unknown in ((single_file, None), (tmp_path, None)):
        assert (native_side(*unknown), calls_per_step(*unknown)) == (None, 1)
    (tmp_path / "scheduler").mkdir()
    for name, calls in (("HeunDiscreteScheduler", 2), ("Nothing", 1), ("utils", 1)):
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
        assert calls_per_step(tmp_path) == calls


def predictions(pipeline):
    """What the four networks answer to the same questions."""
    generator = torch.Generator().manual_seed(0)
    encoded = pipeline.encode_prompt("a dog on the beach", "cpu", 1, False) if not is_xl(pipeline) else (
        pipeline.encode_prompt(prompt="a dog on the beach", device="cpu", do_classifier_free_guidance=False)
    )  # fmt: skip
    added = {}
    if is_xl(pipeline):
        added = {"text_embeds": encoded[2], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    noise = pipeline.unet(latents, 500, encoded[0], added_cond_kwargs=added).sample
    return (
        encoded[0],
        noise,
        pipeline.vae.decode(latents).sample,
        pipeline.vae.encode(noise.new_ones(1, 3, 16, 16))[0].mean,
    )


def is_xl(pipeline):
    return isinstance(pipeline, StableDiffusionXLPipeline)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["folder", "single_file", "half_folder"])
def test_an_autoencoder_in_float32_has_the_weights_of_the_file(form, dtype, single_file, tiny_model_dir, tmp_path):
    """Rounding the others to 16 bits used to round it, too."""
    folder = tiny_model_dir / "base"
    expected = load_pipeline(folder).vae.state_dict()
    assert any((weight != weight.to(dtype)).any() for weight in expected.values())
    if form == "half_folder":  # which has both: files of half a precision go before for all others
        load_pipeline(folder).save_pretrained(tmp_path / "both")
        load_pipeline(folder, torch.float16).save_pretrained(tmp_path / "both", variant="fp16")
        folder = tmp_path / "both"
    given = (single_file, dtype, folder) if form == "single_file" else (folder, dtype)
    pipeline = load_pipeline(*given, vae_dtype=torch.float32)
    assert {pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.text_encoder_2.dtype} == {dtype}
    ours = pipeline.vae.state_dict()
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], weight), name
    assert load_pipeline(*given).vae.dtype == dtype  # as generation has it


def test_half_an_autoencoder_serves_where_there_is_no_other(tiny_model_dir, tmp_path):
    load_pipeline(tiny_model_dir / "base", torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    pipeline = load_pipeline(tmp_path / "half", torch.bfloat16, vae_dtype=torch.float32)
    assert (pipeline.vae.dtype, pipeline.unet.dtype) == (torch.float32, torch.bfloat16)


@pytest.fixture
def no_download(monkeypatch):
    """Nothing here may ask the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("kind", ["sdxl", "sd1"])
@torch.no_grad()
def test_one_file_is_the_pipeline_that_it_was_made_from(
    kind, single_file, sd1_single_file, tiny_model_dir, tiny_sd1_model_dir, no_download
):
    file, folder = {
        "sdxl": (single_file, tiny_model_dir / "base"),
        "sd1": (sd1_single_file, tiny_sd1_model_dir / "base"),
    }[kind]
    loaded, original = load_pipeline(file, base_config=folder), load_pipeline(folder)
    assert type(loaded) is type(original) is {"sdxl": StableDiffusionXLPipeline, "sd1": StableDiffusionPipeline}[kind]
    for ours, theirs in zip(predictions(loaded), predictions(original), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert loaded.scheduler.config.prediction_type == original.scheduler.config.prediction_type
    half = load_pipeline(file, torch.bfloat16, folder)
    assert {half.unet.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}


def test_one_file_loads_without_a_warning(single_file, tiny_model_dir, caplog):
    with caplog.at_level(logging.WARNING):
        load_pipeline(single_file, base_config=tiny_model_dir / "base")
    assert [record.getMessage() for record in caplog.records] == []


def test_one_file_is_checked_by_its_header(single_file, tiny_model_dir, tmp_path):
    assert skeleton_unet(single_file, tiny_model_dir / "base").device.type == "meta"
    assert encoder_widths(single_file, tiny_model_dir / "image_encoder") == (16, 24)


def test_one_file_says_what_it_is_missing(single_file, sd1_single_file, tiny_model_dir, tmp_path, no_download):
    with pytest.raises(WeightsError, match="holds weights only: give base_config=.*StableDiffusionXLPipeline"):
        load_pipeline(single_file)
    with pytest.raises(WeightsError, match="cannot load the configs and tokenizers for .*fine_tune.* from '.*nowhere'"):
        skeleton_unet(single_file, tmp_path / "nowhere")
    with pytest.raises(
        WeightsError, match=r"is a StableDiffusionPipeline \(7 .* text 20 wide\), but .* StableDiffusionXL"
    ):
        skeleton_unet(sd1_single_file, tiny_model_dir / "base")
    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "tokenizer")
    for file in (single_file, tmp_path / "base"):
        with pytest.raises(WeightsError, match="the tokenizer of .*base has no vocabulary: its files are missing"):
            load_pipeline(file, base_config=tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "scheduler")
    with pytest.raises(WeightsError, match="cannot load the configs and tokenizers for .*, or its weights, from"):
        load_pipeline(single_file, base_config=tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "unet")
    with pytest.raises(WeightsError, match="cannot load the configs and tokenizers"):
        skeleton_unet(single_file, tmp_path / "base")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("StableDiffusionXLPipeline", "sdxl"),
        ("StableDiffusionXLInpaintPipeline", "sdxl"),
        ("StableDiffusionPipeline", "sd1"),
        ("StableDiffusionImg2ImgPipeline", "sd1"),
    ],
)
def test_kinds_by_class_name(name, kind):
    assert kind_of_class(name, "base") == kind


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", ""])
def test_other_kinds_are_refused(name, tiny_model_dir, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.40.0"}))
    with pytest.raises(WeightsError, match=f"is a {name or 'pipeline of no kind'}, but a StableDiffusionXLPipeline or"):
        load_pipeline(tmp_path)


def test_half_precision_takes_the_variant_where_there_is_one(tiny_model_dir, tmp_path, monkeypatch):
    load_pipeline(tiny_model_dir / "base").save_pretrained(tmp_path, variant="fp16")
    asked = []
    load = StableDiffusionXLPipeline.from_pretrained.__func__

    def record(cls, name, **options):
        asked.append((str(name), options.get("variant")))
        return load(cls, name, **options)

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", classmethod(record))
    assert load_pipeline(tmp_path, torch.float16).unet.dtype == torch.float16
    assert load_pipeline(tiny_model_dir / "base", torch.float16).unet.dtype == torch.float16
    load_pipeline(tiny_model_dir / "base")
    base = str(tiny_model_dir / "base")
    assert asked == [(str(tmp_path), "fp16"), (base, None), (base, None)]
    # Of a hub repository only a try tells.
    monkeypatch.setattr("msdiffusion.backbone.pretrained.check_vocabulary", lambda pipeline, source: None)
    monkeypatch.setattr("msdiffusion.backbone.pretrained.check_fit", lambda pipeline, source: None)
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(snapshot))

    def hub(cls, name, **options):
        asked.append((options.get("variant"), options["revision"]))
        if "variant" in options:
            raise ValueError("no such modeling files are available")
        return "pipeline"

    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", classmethod(hub))
    assert load_pipeline("owner/name", torch.float16) == "pipeline"
    assert asked[3:] == [("fp16", "0123abc"), (None, "0123abc")]  # of the version whose configs were looked at


def test_skeleton_and_widths_come_from_configs_alone(tiny_model_dir, tmp_path):
    for name in ("base/unet", "base/text_encoder", "image_encoder"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(tiny_model_dir / name / "config.json", tmp_path / name)
    assert skeleton_unet(tmp_path / "base").device.type == "meta"
    assert encoder_widths(tmp_path / "base", tmp_path / "image_encoder") == (16, 24)
    assert encoder_widths(tmp_path / "base", tmp_path / "image_encoder", "global") == (16, 16)
    assert encoder_widths(tmp_path / "base", "open_clip:ViT-bigG-14") == (16, 1664)
    assert encoder_widths(tmp_path / "base", "open_clip:ViT-bigG-14", "global") == (16, 1280)


@pytest.mark.parametrize("call", [skeleton_unet, lambda name: encoder_widths(name, name)])
def test_missing_configs(call, tmp_path):
    with pytest.raises(WeightsError, match="cannot load the .* of the base model from '.*nowhere'"):
        call(tmp_path / "nowhere")


def test_missing_models_are_named(tiny_model_dir, tmp_path):
    with pytest.raises(WeightsError, match="cannot load the base model from '.*nowhere'"):
        load_pipeline(tmp_path / "nowhere")
    for call in (load_image_encoder, lambda name: encoder_widths(tiny_model_dir / "base", name)):
        with pytest.raises(WeightsError, match="cannot load the image encoder from '.*nowhere'"):
            call(tmp_path / "nowhere")
        with pytest.raises(WeightsError, match=r"no config\.json there"):
            call(tmp_path)
        with pytest.raises(WeightsError, match="from the file .*give its folder, or open_clip:MODEL@FILE"):
            call(tiny_model_dir / "image_encoder" / "model.safetensors")


def test_an_encoder_without_preprocessing_gets_clips_own(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir / "image_encoder", tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    _, processor = load_image_encoder(tmp_path)
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (64, 64)


def test_of_a_whole_clip_only_the_vision_tower_is_taken(tiny_model_dir, tmp_path):
    """The laion repositories hold a CLIPModel, whose config has the vision tower's inside."""
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
        projection_dim=12,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    whole = CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    assert "vision_config" in json.loads((tmp_path / "config.json").read_text())
    assert encoder_widths(tiny_model_dir / "base", tmp_path) == (16, 24)
    assert encoder_widths(tiny_model_dir / "base", tmp_path, "global") == (16, 12)
    encoder, processor = load_image_encoder(tmp_path)
    assert isinstance(encoder, CLIPVisionModelWithProjection)
    assert not any(name.startswith("text_model") for name in encoder.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    encoder.eval()
    ours = encoder(pixels, output_hidden_states=True)
    theirs = whole.vision_model(pixels, output_hidden_states=True)
    assert torch.equal(ours.hidden_states[-2], theirs.hidden_states[-2])
    assert torch.equal(ours.image_embeds, whole.visual_projection(theirs.pooler_output))
    assert processor.size["shortest_edge"] == 32


class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", ["torch.save", "pickle"])
@pytest.mark.parametrize("part", ["image_encoder", "base/unet", "base/text_encoder"])
def test_a_pickle_in_place_of_weights_is_refused_and_never_runs(part, write, tiny_model_dir, tmp_path):
    trace = tmp_path / "it_ran"
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    name = "diffusion_pytorch_model.bin" if part == "base/unet" else "pytorch_model.bin"
    for path in (tmp_path / "model" / part).glob("*.safetensors"):
        path.unlink()
    if write == "pickle":
        (tmp_path / "model" / part / name).write_bytes(pickle.dumps({"weight": Malice(trace)}, protocol=2))
    else:
        torch.save({"weight": Malice(trace)}, tmp_path / "model" / part / name)
    with pytest.raises(WeightsError, match="cannot load the (image encoder|base model)") as caught:
        load_image_encoder(tmp_path / "model" / part) if part == "image_encoder" else (
            load_pipeline(tmp_path / "model" / "base")
        )
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not trace.exists()
    torch.load(tmp_path / "model" / part / name, weights_only=False) if write == "torch.save" else None
    assert trace.exists() == (write == "torch.save"), "the file does run code where it is let"


def test_the_embedded_autoencoder_loads_without_a_warning():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("diffusers").addHandler(handler)
    try:
        loaded = load_pipeline(DEFAULT_MODEL / "base")
        logging.getLogger("diffusers.pipelines.pipeline_utils").warning("other news")
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert isinstance(loaded.vae, PixelUnshuffleAutoencoder)
    assert [record.getMessage() for record in records] == ["other news"]


def test_a_folder_inside_a_hub_repository(tmp_path):
    assert split_hub_folder("h94/IP-Adapter/sdxl_models/image_encoder") == (
        "h94/IP-Adapter",
        {"subfolder": "sdxl_models/image_encoder"},
    )
    assert split_hub_folder("owner/name") == ("owner/name", {})
    assert split_hub_folder(tmp_path) == (str(tmp_path), {})


def test_places_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    assert is_local("base")
    assert is_local("open_clip:ViT-L-14@w.safetensors")
    assert not is_local("owner/name")
    assert not is_local("open_clip:ViT-L-14")
    assert absolute("base") == str(tmp_path / "base")
    assert absolute("open_clip:ViT-L-14@w.safetensors") == f"open_clip:ViT-L-14@{tmp_path / 'w.safetensors'}"
    assert absolute("owner/name") == "owner/name"


# ---- files that lack something: whatever is not in them would be random


def edited(place, folder, change):
    """The folder's only safetensors file under ``place``, its tensors changed by a function."""
    shutil.copytree(folder, place, dirs_exist_ok=True)

    def edit(part):
        path = next((place / part).glob("*.safetensors"))
        save_file(change(load_file(path)), path, metadata={"format": "pt"})
        return place

    return edit


def without(text):
    return lambda weights: {name: weight for name, weight in weights.items() if text not in name}


def doubled(name):
    return lambda weights: {
        key: torch.cat([value] * 2) if key.endswith(name) else value for key, value in weights.items()
    }


PARTS = {
    "image_encoder": ("layers.1.mlp", "fc1.bias"),
    "base/text_encoder": ("layers.1.mlp", "fc1.bias"),
    "base/text_encoder_2": ("text_projection", "text_projection.weight"),
    "base/unet": ("mid_block.resnets.1", "mid_block.resnets.1.norm1.bias"),
    "base/vae": ("decoder.mid", "decoder.conv_out.bias"),
}


def load_part(folder, part):
    return load_image_encoder(folder / part) if part == "image_encoder" else load_pipeline(folder / "base")


@pytest.mark.parametrize("part", PARTS)
def test_missing_and_misshapen_tensors_are_named(part, tiny_model_dir, tmp_path):
    lacking, misshapen = PARTS[part]
    edited(tmp_path / "a", tiny_model_dir, without(lacking))(part)
    with pytest.raises(
        WeightsError, match=rf"{part.rpartition('/')[2].replace('_', '.')}.* is incomplete: its files lack \S*{lacking}"
    ) as caught:
        load_part(tmp_path / "a", part)
    assert len(str(caught.value)) < 700
    edited(tmp_path / "b", tiny_model_dir, doubled(misshapen))(part)
    with pytest.raises(WeightsError, match=rf"{misshapen} has shape \(\S+.*, the config asks for \("):
        load_part(tmp_path / "b", part)


def test_an_encoder_whose_tensors_carry_a_prefix_is_refused(tiny_model_dir, tmp_path):
    """It used to be loaded with random weights."""
    edited(tmp_path, tiny_model_dir, lambda weights: {f"clip.{name}": each for name, each in weights.items()})(
        "image_encoder"
    )
    with pytest.raises(WeightsError, match="and 53 more; there are others, such as clip.vision_model.embeddings"):
        load_image_encoder(tmp_path / "image_encoder")


def test_names_of_older_transformers_are_complete(tiny_model_dir, tmp_path):
    def old(weights):
        named = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
        return {**named, "text_model.embeddings.position_ids": torch.arange(40)[None]}

    edited(tmp_path, tiny_model_dir, old)("base/text_encoder")
    loaded, original = load_pipeline(tmp_path / "base"), load_pipeline(tiny_model_dir / "base")
    for name, weight in original.text_encoder.state_dict().items():
        assert torch.equal(loaded.text_encoder.state_dict()[name], weight)


def test_half_precision_lacks_nothing_either(tiny_model_dir, tmp_path):
    load_pipeline(tiny_model_dir / "base").save_pretrained(tmp_path / "both" / "base")
    load_pipeline(tiny_model_dir / "base", torch.float16).save_pretrained(tmp_path / "both" / "base", variant="fp16")
    path = tmp_path / "both" / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file(without("mid_block")(load_file(path)), path)
    with pytest.raises(WeightsError, match="unet of .* is incomplete: its files lack mid_block"):
        load_pipeline(tmp_path / "both" / "base", torch.float16)
    load_pipeline(tmp_path / "both" / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: shutil.rmtree(base / "vae"), "is incomplete: its vae is missing, there is no folder"),
        (lambda base: (base / "model_index.json").write_text("[]"), "is no list of a pipeline's parts"),
        (lambda base: next((base / "unet").glob("*.safetensors")).unlink(), "cannot load the base .*: its unet: "),
        (lambda base: next((base / "text_encoder").glob("*.safetensors")).write_bytes(b"0" * 99), ": its text_encoder"),
        (
            lambda base: (base / "vae" / "config.json").write_text("["),
            "cannot load the base model .*/vae/config.json is",
        ),
    ],
)
def test_what_is_missing_from_a_base_is_named(change, message, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    change(tmp_path / "base")
    with pytest.raises(WeightsError, match=message):
        load_pipeline(tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.diffusion_model.middle_block.2"), "UNet of .*: mid_block.resnets.1.* has shape nothing"),
        (
            without("first_stage_model.decoder.mid"),
            "autoencoder of .*fine_tune.*: decoder.mid_block.* has shape nothing",
        ),
        (without("first_stage_model"), r"fine_tune.* is incomplete: it holds no autoencoder \(first_stage_model"),
        (
            without("0.transformer.text_model.encoder.layers.1.mlp"),
            "the text encoder of .*fine_tune.* is not the one that .*layers.1.mlp",
        ),
        (
            without("embedders.1.model.text_projection"),
            "the second text encoder of .*fine_tune.* is not the one that .*text_projection",
        ),
        (without("embedders.1.model."), r"it holds no second text encoder \(conditioner.embedders.1"),
        (
            doubled("decoder.conv_out.bias"),
            r"autoencoder of .*: decoder.conv_out.bias has shape \(6,\), the config asks",
        ),
        (
            doubled("0.transformer.text_model.final_layer_norm.bias"),
            "the text encoder of .*fine_tune.* is not the one that .*final_layer_norm.bias",
        ),
    ],
)
def test_one_file_that_lacks_something_is_refused_and_says_what(change, message, single_file, tiny_model_dir, tmp_path):
    file = tmp_path / "fine_tune.safetensors"
    save_file(change(load_file(single_file)), file)
    with pytest.raises(WeightsError, match=message) as caught:
        load_pipeline(file, base_config=tiny_model_dir / "base")
    assert "ignore_mismatched" not in str(caught.value)


# ---- what a file says about its noise


def marked(file, place, metadata=None, **marks):
    save_file({**load_file(file), **{name.replace("__", "."): mark for name, mark in marks.items()}}, place, metadata)
    return place


NOTHING = torch.zeros(0)


@pytest.fixture
def epsilon_base(tiny_model_dir, tmp_path):
    """The tiny base with SDXL's own scheduler."""
    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    scheduler.save_pretrained(tmp_path / "base" / "scheduler")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "base"


def test_the_scheduler_follows_what_a_file_says(single_file, epsilon_base, tiny_model_dir, tmp_path):
    plain = load_pipeline(single_file, base_config=epsilon_base).scheduler

    def scheduler(metadata=None, **marks):
        file = marked(single_file, tmp_path / "marked.safetensors", metadata, **marks)
        return _scheduler_of(read_single_file(file), plain, "base")

    assert scheduler() is plain
    assert (plain.config.prediction_type, plain.config.rescale_betas_zero_snr) == ("epsilon", False)
    by_v = scheduler(v_pred=NOTHING)
    assert type(by_v) is EulerDiscreteScheduler
    assert (by_v.config.prediction_type, by_v.config.rescale_betas_zero_snr) == ("v_prediction", False)
    assert by_v.config.timestep_spacing == "leading"
    zero = scheduler(v_pred=NOTHING, ztsnr=NOTHING)
    assert (zero.config.prediction_type, zero.config.rescale_betas_zero_snr) == ("v_prediction", True)
    zero.set_timesteps(10)
    assert zero.timesteps[0] == 999  # where there is no signal
    assert zero.config.beta_schedule == "scaled_linear"
    assert scheduler({"modelspec.prediction_type": "v"}).config.prediction_type == "v_prediction"
    assert scheduler({"modelspec.prediction_type": "epsilon"}).config == plain.config
    assert scheduler(ztsnr=NOTHING).config == plain.config  # noise cannot be told from nothing but noise
    edm = scheduler(edm_vpred__sigma_max=torch.tensor(120.0), edm_vpred__sigma_min=torch.tensor(0.0625))
    assert type(edm) is EDMEulerScheduler
    assert {**edm.config, "sigma_max": 120.0, "sigma_min": 0.0625, "prediction_type": "v_prediction"} == {**edm.config}
    assert edm.config.sigma_data == 1.0
    with pytest.raises(
        WeightsError, match=r"trained with EDM's noise .* is a EulerDiscreteScheduler: give base_config="
    ):
        scheduler(edm_mean=torch.zeros(4), edm_std=torch.ones(4))
    with pytest.raises(
        WeightsError, match=r"edm_vpred.sigma_max of the base model must be one number, got shape \(2,\)"
    ):
        scheduler(edm_vpred__sigma_max=torch.ones(2))
    file = marked(single_file, tmp_path / "marked.safetensors", v_pred=NOTHING, ztsnr=NOTHING)
    assert load_pipeline(file, base_config=epsilon_base).scheduler.config == zero.config


def test_a_scheduler_that_cannot_follow_gives_way_to_one_that_can(sd1_single_file, tiny_sd1_model_dir, tmp_path):
    shutil.copytree(tiny_sd1_model_dir / "base", tmp_path / "base")
    pndm = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    pndm.save_pretrained(tmp_path / "base" / "scheduler")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    file = marked(sd1_single_file, tmp_path / "marked.safetensors", v_pred=NOTHING, ztsnr=NOTHING)
    scheduler = load_pipeline(file, base_config=tmp_path / "base").scheduler
    assert type(scheduler) is DDIMScheduler
    assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == ("v_prediction", True)
    assert (scheduler.config.beta_end, scheduler.config.clip_sample) == (0.012, False)
    assert scheduler.alphas_cumprod[-1] == 0


def test_a_safety_checker_of_the_base_stays_off(tiny_sd1_model_dir, sd1_single_file, tmp_path):
    shutil.copytree(tiny_sd1_model_dir / "base", tmp_path / "base")
    config = CLIPConfig(
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
                       "image_size": 8, "patch_size": 8, "projection_dim": 8},
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
        projection_dim=8,
    )  # fmt: skip
    StableDiffusionSafetyChecker(config).save_pretrained(tmp_path / "base" / "safety_checker")
    CLIPImageProcessor().save_pretrained(tmp_path / "base" / "feature_extractor")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index.pop("requires_safety_checker", None)
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "base").safety_checker is not None
    assert load_pipeline(tmp_path / "base").safety_checker is None
    assert load_pipeline(sd1_single_file, base_config=tmp_path / "base").safety_checker is None
