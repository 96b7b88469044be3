"""Every door that weights come in by, and what it says of files that lack a tensor, have one too many, or hold numbers
that are none: the name of file and tensor. Nothing here is run by the files: flags are set by modules that never load.
"""

import json
import shutil
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import InputError
from msdiffusion.errors import WeightsError
from msdiffusion.places import DEFAULT_MODEL


def part_of_pipeline(part):
    def load(folder):
        from msdiffusion.backbone.pretrained import load_pipeline

        load_pipeline(folder / "base")

    return f"base/{part}", load


def load_encoder(folder):
    from msdiffusion.backbone.pretrained import load_image_encoder

    load_image_encoder(folder / "image_encoder")


def load_adapter(folder):
    from msdiffusion.adapter.adapter import MSAdapter

    MSAdapter.from_pretrained(folder)


def load_by_ckpt_path(folder):
    """The same weights as a run has them; nothing is drawn."""
    import pytorch_lightning as pl

    from msdiffusion.adapter.config import AdapterConfig
    from msdiffusion.training.module import MSDiffusionModule

    config = AdapterConfig.read(folder / "config.json")
    sizes = {name: getattr(config.resampler, name) for name in ("width", "depth", "heads", "head_width")}
    module = MSDiffusionModule(str(folder / "base"), str(folder / "image_encoder"), resampler=sizes)
    weights = {f"adapter.{name}": tensor for name, tensor in load_file(folder / "adapter.safetensors").items()}
    record = {"state_dict": weights, "pytorch-lightning_version": pl.__version__, "epoch": 0, "global_step": 0}
    torch.save(record, folder / "last.ckpt")
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(accelerator="cpu", limit_predict_batches=0, **quiet)
    trainer.predict(module, torch.utils.data.DataLoader([0]), ckpt_path=folder / "last.ckpt")


def instrument(name):
    def load(folder):
        from msdiffusion.evaluation.instruments.judge import Judge
        from msdiffusion.evaluation.instruments.locator import Locator
        from msdiffusion.evaluation.instruments.recognizer import Recognizer

        {"judge": Judge, "locator": Locator, "recognizer": Recognizer}[name].from_pretrained(folder / name)

    return name, load


def load_detector(folder):
    from data_pipeline.models.grounding_dino_hf import load_grounding_dino_hf

    load_grounding_dino_hf(str(folder / "mining/detector"), "cpu")


def load_segmenter(folder):
    from data_pipeline.models.sam import load_sam

    place = folder / "mining/segmenter"
    load_sam(str(place / "config.json"), place / "model.safetensors", "cpu")


def load_embedder(folder):
    from data_pipeline.models.embedder import load_transformers

    load_transformers(str(folder / "image_encoder"), "cpu")


def load_timm_embedder(folder):
    from data_pipeline.models.embedder import load_timm

    load_timm("test_resnet", folder / "timm/model.safetensors", "cpu")


def make_timm_embedder(folder):
    import timm

    folder.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), folder / "model.safetensors")


def load_safety_checker(folder):
    from msdiffusion.generation.safety import SafetyChecker

    SafetyChecker.from_pretrained(folder / "safety")


def make_safety_checker(folder):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


# Models that no fixture has; their tests of other kinds are beside their modules.
MADE = {"timm": make_timm_embedder, "safety": make_safety_checker}


# Door: folder of the file, what loads it, and a tensor; first those of tiny_model_dir, then those of checkpoints/tiny.
DOORS = {
    "image encoder": ("image_encoder", load_encoder, "vision_model.encoder.layers.1.mlp.fc1.bias"),
    "vision embedder": ("image_encoder", load_embedder, "vision_model.encoder.layers.1.mlp.fc1.bias"),
    "timm embedder": ("timm", load_timm_embedder, "layer1.0.bn1.bias"),
    "safety checker": ("safety", load_safety_checker, "visual_projection.weight"),
    "text encoder": (*part_of_pipeline("text_encoder"), "final_layer_norm.bias"),
    "second text encoder": (*part_of_pipeline("text_encoder_2"), "text_projection.weight"),
    "unet": (*part_of_pipeline("unet"), "mid_block.resnets.1.norm1.bias"),
    "vae": (*part_of_pipeline("vae"), "decoder.conv_out.bias"),
    "adapter": ("", load_adapter, "resampler.output_norm.bias"),
    "checkpoint by --ckpt_path": ("", load_by_ckpt_path, "resampler.output_norm.bias"),
    "judge": (*instrument("judge"), "box_reader.heads.category.bias"),
    "locator": (*instrument("locator"), "head.2.bias"),
    "recognizer": (*instrument("recognizer"), "trunk.heads.embedding.bias"),
    "detector": ("mining/detector", load_detector, "model.level_embed"),
    "segmenter": ("mining/segmenter", load_segmenter, "mask_decoder.iou_token.weight"),
}
WITHOUT_CONFIG = ("checkpoint by --ckpt_path", "timm embedder")
SHIPPED = ("judge", "locator", "recognizer", "mining/detector", "mining/segmenter")


def wrong(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


CHANGES = {
    "lacking": (lambda tensor: None, r"its files lack \S*{name}\b"),
    "extra": (None, r"no place in this network: (adapter\.)?strange\.weight"),
    "misshapen": (lambda tensor: torch.cat([tensor, tensor]), r"{name} has shape \("),
    "nan": (wrong(float("nan")), r"{name} holds 1 of \d+ numbers that are NaN or infinite: get the file anew"),
    "inf": (wrong(float("inf")), r"{name} holds 1 of \d+ numbers"),
    "-inf in bfloat16": (lambda tensor: wrong(float("-inf"))(tensor).bfloat16(), r"{name} holds 1 of \d+ numbers"),
    "int32": (lambda tensor: tensor.int(), r"{name} is (I32|int32): weights are floating-point numbers"),
    "uint8": (lambda tensor: tensor.byte(), r"{name} is (U8|uint8): .*quantized weights are not read"),
    "bool": (lambda tensor: tensor.bool(), r"{name} is (BOOL|bool)"),
    "complex64": (lambda tensor: tensor.to(torch.complex64), r"{name} is (C64|complex64)"),
}


@pytest.fixture
def model(tiny_model_dir, tmp_path, request):
    """A copy of the folder that a door needs."""
    place = DOORS[request.getfixturevalue("door")][0]
    if place in MADE:
        MADE[place](tmp_path / place)
        return tmp_path
    source = (DEFAULT_MODEL if place in SHIPPED else tiny_model_dir) / place
    if place.startswith("base/"):
        source, place = tiny_model_dir / "base", "base"
    shutil.copytree(source, tmp_path / place, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("door", DOORS)
def test_no_door_takes_strange_weights(door, change, model):
    place, load, name = DOORS[door]
    edit, message = CHANGES[change]
    path = next((model / place).glob("*.safetensors"))
    weights = load_file(path)
    [name] = [each for each in weights if each.endswith(name)]
    if edit is None:
        weights["strange.weight"] = torch.zeros(2)
    elif (tensor := edit(weights.pop(name))) is not None:
        weights[name] = tensor
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises((WeightsError, InputError), match=message.format(name=name.removeprefix("text_model."))) as told:
        load(model)
    assert len(str(told.value).replace(str(model), "").splitlines()) <= 5
    assert str(model) in str(told.value)  # which file or folder


@pytest.mark.parametrize("door", [door for door in DOORS if door not in WITHOUT_CONFIG])
def test_a_config_of_gigabytes_is_refused_before_they_are_asked_for(door, model):
    """32 layers of 65,536 features would be 4 TB."""
    place, load, _ = DOORS[door]
    path = model / place / "config.json"
    config = json.loads(path.read_text())
    large = {
        "image encoder": {"hidden_size": 65536, "intermediate_size": 65536, "num_hidden_layers": 32},
        "vision embedder": {"hidden_size": 65536, "intermediate_size": 65536, "num_hidden_layers": 32},
        "safety checker": {
            "vision_config": {"hidden_size": 65536, "intermediate_size": 65536, "num_attention_heads": 64}
        },
        "text encoder": {"hidden_size": 65536, "intermediate_size": 65536, "num_hidden_layers": 32},
        "second text encoder": {"hidden_size": 65536, "intermediate_size": 65536, "num_hidden_layers": 32},
        "unet": {"block_out_channels": [32768] * 3},
        "vae": {"block_out_channels": [32768] * 2},
        "adapter": {"resampler": {**config.get("resampler", {}), "width": 65536, "heads": 1024, "head_width": 64}},
        "judge": {"widths": [32, 65536, 65536, 65536]},
        "locator": {"widths": [65536] * 5},
        "recognizer": {"widths": [32, 65536, 65536, 65536]},
        "detector": {"d_model": 65536, "encoder_ffn_dim": 65536},
        "segmenter": {"encoder_width": 65536, "encoder_depth": 100},
    }
    path.write_text(json.dumps({**config, **large[door]}))
    with pytest.raises(
        (WeightsError, InputError), match="asks for [0-9,]+ numbers, the files hold|has shape|asks for|files lack"
    ):
        load(model)


# ---- what folders of real users hold beside


def copied(tiny_model_dir, folder):
    for part in ("base", "image_encoder"):
        shutil.copytree(tiny_model_dir / part, folder / part)


def as_pickle(path, name):
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


def half_beside_pickle(folder):
    for part, stem, pickled in (("unet", "diffusion_pytorch_model", ""), ("text_encoder", "model", "pytorch_model")):
        path = folder / "base" / part / f"{stem}.safetensors"
        shutil.copy(path, path.with_name(f"{stem}.fp16.safetensors"))
        as_pickle(path, f"{pickled or stem}.bin")


def sharded_half(folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "base/unet").half()
    shutil.rmtree(folder / "base/unet")
    unet.save_pretrained(folder / "base/unet", variant="fp16", max_shard_size="60KB")
    path = folder / "base/unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    content = json.loads(path.read_text())
    content["metadata"]["total_size"] = 5_000_000_000  # as of the real one
    path.write_text(json.dumps(content))


def other_vae(folder):
    from diffusers import AsymmetricAutoencoderKL

    vae = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 8),
        latent_channels=json.loads((folder / "base/unet/config.json").read_text())["out_channels"],
        norm_num_groups=4,
    )
    shutil.rmtree(folder / "base/vae")
    vae.save_pretrained(folder / "base/vae")
    name_part(folder, "vae", "AsymmetricAutoencoderKL")


def name_part(folder, part, kind):
    path = folder / "base/model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), part: ["diffusers", kind]}))


def scheduler_of_few_steps(folder):
    name_part(folder, "scheduler", "LCMScheduler")
    path = folder / "base/scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "LCMScheduler", "original_inference_steps": 2}))


def scheduler_of_other_pipelines(folder):  # drawing asks for another
    name_part(folder, "scheduler", "FlowMatchEulerDiscreteScheduler")
    (folder / "base/scheduler/scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')


def half_alone(folder):
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folder / "base" / part / f"{stem}.safetensors"
        path.rename(path.with_name(f"{stem}.fp16.safetensors"))


def other_release_beside(folder):
    path = folder / "image_encoder/model.safetensors"
    shutil.copy(path, path.with_name("open_clip_model.safetensors"))
    as_pickle(path, "pytorch_model.bin")
    settings = path.with_name("preprocessor_config.json")
    content = json.loads(settings.read_text())
    content["size"]["longest_edge"] = 9_999_999
    settings.write_text(json.dumps(content))
    (path.parent / "trainer_state.json").write_text(json.dumps({"total_flos": 3e17}))
    (path.parent / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "SiglipTokenizer"}))


def parts_never_loaded(folder):
    path = folder / "base/model_index.json"
    index = json.loads(path.read_text())
    index |= {
        "safety_checker": ["diffusers.pipelines.stable_diffusion.safety_checker", "StableDiffusionSafetyChecker"],
        "watermark": ["stable_diffusion_xl", "StableDiffusionXLWatermarker"],
        "controlnet": ["diffusers.pipelines.controlnet.multicontrolnet", "MultiControlNetModel"],
        "gadget": ["own_code", "Gadget"],
    }
    path.write_text(json.dumps(index))


def other_machines_tokenizer(folder):
    path = folder / "base/tokenizer/tokenizer_config.json"
    elsewhere = {
        "tokenizer_file": "/home/somebody/.cache/tokenizer.json",
        "vocab_file": "./vocab.json",
        "merges_file": "/a/b",
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **elsewhere}))


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (half_beside_pickle, torch.float32),
        (half_beside_pickle, torch.float16),
        (sharded_half, torch.float16),
        (half_alone, torch.float32),
        (half_alone, torch.float16),  # of two parts
        (other_release_beside, torch.float32),
        (other_vae, torch.float32),
        (scheduler_of_few_steps, torch.float32),
        (scheduler_of_other_pipelines, torch.float32),
        (parts_never_loaded, torch.float32),
        (other_machines_tokenizer, torch.float32),
    ],
)
def test_what_lies_beside_is_not_in_the_way(change, dtype, tiny_model_dir, tmp_path):
    from msdiffusion.backbone.pretrained import load_image_encoder, load_pipeline

    copied(tiny_model_dir, tmp_path)
    plain = load_pipeline(tmp_path / "base", dtype)
    change(tmp_path)
    changed = load_pipeline(tmp_path / "base", dtype)
    for part in ("unet", "text_encoder"):
        ours, theirs = getattr(changed, part).state_dict(), getattr(plain, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert changed.tokenizer("a red cat").input_ids == plain.tokenizer("a red cat").input_ids
    load_image_encoder(tmp_path / "image_encoder", dtype)


# ---- code that folders bring along: a module that would set a flag


CODE = "import builtins\nbuiltins.flag_of_a_stranger = True\n\n\nclass Own:\n    pass\n"


@pytest.mark.parametrize(
    ("file", "entries", "module"),
    [
        ("base/model_index.json", {"vae": ["own_code", "Own"]}, "base/vae/own_code.py"),
        ("base/model_index.json", {"unet": ["own_code", "Own"]}, "base/unet/own_code.py"),
        ("base/model_index.json", {"scheduler": ["own_code", "Own"]}, "base/scheduler/own_code.py"),
        ("base/model_index.json", {"_class_name": ["own_code", "StableDiffusionXLPipeline"]}, "base/own_code.py"),
        ("base/text_encoder/config.json", {"auto_map": {"AutoModel": "own_code.Own"}}, "base/text_encoder/own_code.py"),
        ("base/unet/config.json", {"auto_map": {"AutoModel": "own_code.Own"}}, "base/unet/own_code.py"),
        (
            "base/tokenizer/tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["own_code.Own", None]}},
            "base/tokenizer/own_code.py",
        ),
    ],
)
def test_code_in_a_base_model_is_named_and_stays_unread(file, entries, module, tiny_model_dir, tmp_path, monkeypatch):
    import builtins

    import diffusers

    from msdiffusion.backbone.pretrained import load_pipeline

    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    (tmp_path / module).write_text(CODE)
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    monkeypatch.syspath_prepend(str((tmp_path / module).parent))  # so that an import would find it

    def asked(cls, *arguments, **options):
        raise AssertionError("a library was asked first")

    for kind in (diffusers.StableDiffusionXLPipeline, diffusers.DiffusionPipeline, diffusers.UNet2DConditionModel):
        monkeypatch.setattr(kind, "from_pretrained", classmethod(asked))
        monkeypatch.setattr(kind, "load_config", classmethod(asked))
    for given in ((tmp_path / "base",), (single(tmp_path), torch.float32, tmp_path / "base")):
        with pytest.raises(WeightsError, match=rf"{path}: .*(own_code|code of its own)"):
            load_pipeline(*given)
    assert not hasattr(builtins, "flag_of_a_stranger")
    assert "own_code" not in sys.modules


def single(folder):
    """A file with the names that make it a base model of the kind SDXL."""
    names = (
        "model.diffusion_model.a", "first_stage_model.a", "conditioner.embedders.1.a",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    )  # fmt: skip
    save_file({name: torch.zeros(2, 2) for name in names}, folder / "tune.safetensors")
    return folder / "tune.safetensors"


@pytest.mark.parametrize("config", ["config.json", "preprocessor_config.json"])
def test_code_in_an_encoder_is_named(config, tiny_model_dir, tmp_path):
    from msdiffusion.backbone.configs import encoder_widths
    from msdiffusion.backbone.pretrained import load_image_encoder

    shutil.copytree(tiny_model_dir / "image_encoder", tmp_path / "encoder")
    path = tmp_path / "encoder" / config
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "own_code.Own"}}))
    for call in (load_image_encoder, lambda place: encoder_widths(tiny_model_dir / "base", place)):
        with pytest.raises(
            WeightsError, match=rf"cannot load the image encoder .*{path}: auto_map is .*code of its own"
        ):
            call(tmp_path / "encoder")


# ---- parts of different makes


@pytest.mark.parametrize("parts", [("tokenizer", "text_encoder"), ("unet",), ("vae",), ("scheduler",)])
def test_a_base_without_a_part_is_refused(parts, tiny_model_dir, tmp_path):
    """As SDXL's refiner is, which has one text encoder of two."""
    from msdiffusion.backbone.pretrained import load_pipeline

    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    path = tmp_path / "base/model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **{part: [None, None] for part in parts}}))
    with pytest.raises(
        WeightsError, match=f"has no {', '.join(parts)}: a StableDiffusionXLPipeline with all|cannot load"
    ):
        load_pipeline(tmp_path / "base")


def test_parts_of_different_models_are_refused(tiny_model_dir, tiny_sd1_model_dir, tmp_path):
    from msdiffusion.backbone.pretrained import load_pipeline

    for name, part, message in (
        ("a", "text_encoder", r"the text is 20 \+ 32 wide, but the UNet reads text 48 wide"),
        ("b", "unet", r"takes None|the text is 16 \+ 32 wide, but the UNet reads text 20 wide"),
    ):
        shutil.copytree(tiny_model_dir / "base", tmp_path / name)
        shutil.rmtree(tmp_path / name / part)
        shutil.copytree(tiny_sd1_model_dir / "base" / part, tmp_path / name / part)
        with pytest.raises(WeightsError, match=f"the parts of .* are of different models: .*({message})"):
            load_pipeline(tmp_path / name)
    shutil.copytree(tiny_model_dir / "base", tmp_path / "c")
    tokenizer = tmp_path / "c/tokenizer/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["vocab"]["word</w>"] = 5000
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="tokenizer of .* numbers its tokens up to 5000, but the text_encoder knows"):
        load_pipeline(tmp_path / "c")


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (
            "text_encoder/config.json",
            {"eos_token_id": 7},
            "takes token 7 for the end of a text, but its tokenizer writ",
        ),
        ("unet/config.json", {"class_embed_type": "identity"}, "class_embed_type 'identity', so it asks for more than"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0: pictures are divided by it"),
        ("unet/config.json", {"attention_head_dim": 0}, "cannot load the base model .* unet: "),
        ("unet/config.json", {"block_out_channels": []}, "cannot load the base model .* unet: "),
        ("unet/config.json", {"down_block_types": ["Own"] * 3}, "cannot load the base model .* unet: .*Own"),
        ("text_encoder/config.json", {"hidden_act": "own"}, "cannot load the base model .* text_encoder: "),
        ("scheduler/scheduler_config.json", {"beta_schedule": "own"}, "cannot load the base model .*own"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "cannot load the base model "),
        ("scheduler/scheduler_config.json", {"prediction_type": "own"}, "scheduler of .* takes no steps .*own"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "own"}, "takes no steps .*own"),
        (
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.1] * 10},
            "takes no steps .*trained_betas has 10 numbers: needed are 1000",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "LCMScheduler", "original_inference_steps": 0},
            r"\(LCMScheduler\) takes no steps",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "LCMScheduler", "original_inference_steps": 9999},
            r"\(LCMScheduler\) takes no steps",
        ),
        ("vae/config.json", {"latents_mean": [1], "latents_std": [1]}, "has 1 numbers of latents_mean: needed are"),
        ("text_encoder/config.json", {"num_attention_heads": 7}, "cannot load the base model .* text_encoder: .*7"),
        ("text_encoder/config.json", {"eos_token_id": "own"}, "cannot load the base model .* text_encoder: .*eos_tok"),
        ("text_encoder/config.json", {"vocab_size": "own"}, "cannot load the base model .* text_encoder: .*vocab"),
        (
            "tokenizer_2/tokenizer_config.json",
            {"model_max_length": 9},
            "tokenizer and text_encoder read 40 tokens, tokenizer_2 and text_encoder_2 9",
        ),
    ],
)
def test_settings_that_no_library_can_build_are_told_shortly(file, entries, message, tiny_model_dir, tmp_path):
    from msdiffusion.backbone.pretrained import load_pipeline

    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    path = tmp_path / "base" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    if file.startswith("scheduler"):
        index = json.loads((tmp_path / "base/model_index.json").read_text())
        index["scheduler"][1] = entries.get("_class_name", index["scheduler"][1])
        (tmp_path / "base/model_index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=message) as told:
        load_pipeline(tmp_path / "base")
    assert len(str(told.value)) < 900


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"crop_size": {"height": 32, "width": 32}}, "looks at 3 x 64 x 64 pixels, but its .* gives 3 x 32 x 32"),
        ({"do_resize": False, "do_center_crop": False}, "gives 3 x 9 x 9: they belong to different models"),
        ({"image_std": [1e-45, 1e-45, 1e-45]}, "gives 3 x 64 x 64, not all of them numbers|prepares no picture"),
        ({"image_mean": [0.5, 0.5]}, "prepares no picture"),
    ],
)
def test_preprocessing_of_another_encoder_is_refused(entries, message, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir / "image_encoder", tmp_path / "image_encoder")
    path = tmp_path / "image_encoder/preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(WeightsError, match=message):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
        ({"layer_norm_eps": "own"}, "layer_norm_eps is 'own': needed is a number"),
        ({"image_size": "own"}, "image_size"),
        ({"hidden_act": 5}, "hidden_act"),
        ({"patch_size": 0}, "patch_size is 0: needed is a size of 1 or more"),
    ],
)
def test_settings_of_an_encoder_that_no_library_can_build_are_told_shortly(entries, message, tiny_model_dir, tmp_path):
    from msdiffusion.backbone.configs import encoder_widths

    shutil.copytree(tiny_model_dir / "image_encoder", tmp_path / "image_encoder")
    path = tmp_path / "image_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(WeightsError, match=f"cannot load the image encoder .*{message}") as told:
        load_encoder(tmp_path)
    assert len(str(told.value)) < 900
    with pytest.raises(WeightsError, match="cannot load the image encoder"):
        encoder_widths(tiny_model_dir / "base", tmp_path / "image_encoder")


# ---- one file


FIRST, SECOND = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.diffusion_model.out.2.bias": wrong(float("nan"))}, r"unet of .*tune.* conv_out.bias holds 1 of"),
        ({"first_stage_model.decoder.conv_out.bias": wrong(float("inf"))}, r"vae of .* decoder.conv_out.bias holds"),
        ({"model.diffusion_model.out.2.bias": lambda each: each.int()}, r"out\.2\.bias is I32: weights are floating"),
        ({"model.diffusion_model.scaled_fp8": lambda each: torch.zeros(2)}, r"no place in this network: .*scaled_fp8"),
        ({"first_stage_model.more.weight": lambda each: torch.zeros(2)}, r"no place in this network: .*more\.weight"),
        ({"edm_vpred.sigma_max": lambda each: torch.zeros(9, 9)}, r"edm_vpred.sigma_max is no mark, its shape"),
        ({f"{FIRST}strange.weight": lambda each: torch.zeros(2)}, r"the text encoder .* no place .*strange\.weight"),
        (
            {f"{FIRST}encoder.layers.9.mlp.fc1.bias": lambda each: torch.zeros(2)},
            r"the text encoder .* no place .*9\.mlp",
        ),
        (
            {f"{FIRST}final_layer_norm.bias": lambda each: torch.zeros(2)},
            r"the text encoder .*_norm\.bias has shape \(2",
        ),
        ({f"{FIRST}final_layer_norm.bias": None}, r"the text encoder .*final_layer_norm\.bias has shape nothing"),
        (
            {f"{SECOND}strange.weight": lambda each: torch.zeros(2)},
            r"second text encoder .* no place .*strange\.weight",
        ),
        ({f"{SECOND}transformer.resblocks.9.ln_1.bias": lambda each: torch.zeros(2)}, r"second .* no place .*9\.ln_1"),
        ({f"{SECOND}ln_final.bias": lambda each: torch.zeros(2)}, r"second .*final_layer_norm\.bias has shape \(2"),
        ({f"{SECOND}transformer.resblocks.0.attn.in_proj_bias": None}, r"second .*_proj\.bias has shape nothing"),
        ({f"{SECOND}text_projection": lambda each: torch.zeros(())}, r"second text encoder has tensors that are none"),
    ],
)
def test_one_file_with_strange_weights_is_refused(change, message, single_file, tiny_model_dir, tmp_path):
    from msdiffusion.backbone.pretrained import load_pipeline

    weights = load_file(single_file)
    for name, edit in change.items():
        weights[name] = weights.get(name) if edit is None else edit(weights.get(name))
        if edit is None:
            del weights[name]
    save_file(weights, tmp_path / "tune.safetensors")
    with pytest.raises(WeightsError, match=message):
        load_pipeline(tmp_path / "tune.safetensors", base_config=tiny_model_dir / "base")


@pytest.mark.parametrize("kind", ["sdxl", "sd1"])
def test_what_training_leaves_in_one_file_is_left_out(
    kind, single_file, sd1_single_file, tiny_model_dir, tiny_sd1_model_dir, tmp_path
):
    from msdiffusion.backbone.pretrained import load_pipeline

    whole, model = (single_file, tiny_model_dir) if kind == "sdxl" else (sd1_single_file, tiny_sd1_model_dir)
    first = FIRST if kind == "sdxl" else "cond_stage_model.transformer.text_model."
    outer = first.removesuffix("text_model.")
    leftovers = {
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.perceptual_loss.net.slice1.0.weight": torch.zeros(3, 3),
        "first_stage_model.model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
        "first_stage_model.model_ema.decay": torch.tensor(0.9),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "alphas_cumprod": torch.zeros(5),
        f"{first}embeddings.position_ids": torch.arange(77)[None],
        f"{outer}logit_scale": torch.zeros(()),
        f"{outer}text_projection.weight": torch.zeros(3, 3),
        f"{outer}vision_model.post_layernorm.bias": torch.zeros(3),
    }
    if kind == "sdxl":
        leftovers |= {f"{SECOND}logit_scale": torch.zeros(()), f"{SECOND}visual.conv1.weight": torch.zeros(3)}
    save_file({**load_file(whole), **leftovers}, tmp_path / "tune.safetensors")
    expected, found = (
        load_pipeline(path, base_config=model / "base") for path in (whole, tmp_path / "tune.safetensors")
    )
    for part in ("unet", "vae", "text_encoder", *(("text_encoder_2",) if kind == "sdxl" else ())):
        theirs = getattr(found, part).state_dict()
        assert all(torch.equal(weight, theirs[name]) for name, weight in getattr(expected, part).state_dict().items())


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_one_file_with_more_layers_than_its_config_is_refused(part, single_file, tiny_model_dir, tmp_path):
    """The rest of them was dropped without a word."""
    from msdiffusion.backbone.pretrained import load_pipeline

    shutil.copytree(tiny_model_dir / "base", tmp_path / "base")
    path = tmp_path / "base" / part / "config.json"
    config = json.loads(path.read_text())
    assert config["num_hidden_layers"] > 1
    path.write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(WeightsError, match="text encoder of .* no place in this network: .*1"):
        load_pipeline(single_file, base_config=tmp_path / "base")


# ---- adapters in pickles


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tensor: tensor[:1].expand(10**6, *tensor.shape[1:]), "its numbers are not all in the file"),
        (lambda tensor: torch.zeros(10**6, device="meta"), "is no plain tensor .*on meta|its numbers are not all"),
        (lambda tensor: tensor.to_sparse(), "is no plain tensor"),
        (lambda tensor: tensor.int(), "is int32: weights are floating-point numbers"),
        (wrong(float("nan")), "holds 1 of .* numbers that are NaN"),
        (lambda tensor: "text", "is a str: needed are tensors by name"),
    ],
)
def test_a_checkpoint_with_strange_tensors_is_refused(make, message, tiny_model_dir, tmp_path):
    from msdiffusion.adapter.adapter import MSAdapter

    adapter = MSAdapter.from_pretrained(tiny_model_dir)
    weights = {f"adapter.{name}": weight for name, weight in adapter.state_dict().items()}
    weights["adapter.resampler.output_norm.bias"] = make(weights["adapter.resampler.output_norm.bias"])
    torch.save({"state_dict": weights, "adapter_config": adapter.config.to_json()}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsError, match=message):
        MSAdapter.from_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"training_resolution": 10**9}, "training_resolution .* from 1 to 16384, got 1000000000"),
        ({"training_resolution": None}, "training_resolution .* from 1 to 16384, got None"),
        ({"largest_side": 10**9}, "largest_side .* from 1 to 16384"),
        ({"most_subjects": 10**9}, "most_subjects .* from 1 to 1000"),
        ({"base_model": "x" * 2_000_000}, "larger than the 1000000 bytes that are read"),
    ],
)
def test_numbers_of_an_adapters_config_have_limits(entries, message, tiny_model_dir, tmp_path):
    for file in ("config.json", "adapter.safetensors"):
        shutil.copy(tiny_model_dir / file, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    with pytest.raises(WeightsError, match=message):
        load_adapter(tmp_path)


def test_a_packed_checkpoint_is_not_unpacked(tiny_model_dir, tmp_path):
    """A few bytes can be packed that grow to gigabytes; torch packs nothing."""
    from msdiffusion.adapter.adapter import MSAdapter

    torch.save({"state_dict": {}, "adapter_config": ""}, tmp_path / "plain.ckpt")
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as plain:
        with zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    with pytest.raises(WeightsError, match=r"packed\.ckpt: .* in it is compressed: torch writes no such files"):
        MSAdapter.from_checkpoint(tmp_path / "packed.ckpt")
    (tmp_path / "packed.ckpt").rename(tmp_path / "ms_adapter.bin")
    with pytest.raises(WeightsError, match=r"ms_adapter\.bin: .* in it is compressed"):
        MSAdapter.from_official(tmp_path / "ms_adapter.bin", None)
