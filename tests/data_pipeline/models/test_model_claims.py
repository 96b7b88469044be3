"""What folders of strangers claim: each row is a harmless file that asks for something, and what is said of it."""

import json
import os
import time

import pytest

from data_pipeline.errors import InputError
from data_pipeline.models.model_claims import CLIP_VISION, check_network, check_pipeline, configs_here, read_sizes

INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.42.1",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CLIP = {"model_type": "clip_text_model", "hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 49408}
FILES = {
    "model_index.json": INDEX,
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000},
    "text_encoder/config.json": CLIP,
    "text_encoder_2/config.json": {**CLIP, "hidden_size": 1280, "num_hidden_layers": 32},
    "tokenizer/tokenizer_config.json": {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
    "tokenizer/vocab.json": {"auto_map": 0, "backbone": 1},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "sample_size": 128,
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "sample_size": 1024,
    },
}


SHARDS = {"weight_map": {"a": "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"}}


@pytest.fixture
def pipeline(tmp_path):
    """SDXL's own claims, shortened."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def change(folder, file, **entries):
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries} if path.exists() else entries))


def test_what_released_models_claim_is_taken(pipeline):
    check_pipeline(pipeline)
    change(pipeline, "model_index.json", vae=["msdiffusion.pixel_autoencoder", "PixelUnshuffleAutoencoder"])
    change(pipeline, "vae/config.json", _class_name="PixelUnshuffleAutoencoder")
    change(pipeline, "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    change(pipeline, "model_index.json", feature_extractor=["transformers", "CLIPImageProcessorFast"])
    change(pipeline, "model_index.json", controlnet=["diffusers", "ControlNetModel"])  # not loaded
    change(pipeline, "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    (pipeline / "scheduler/scheduler_config.json").write_text('{"lambda_min_clipped": -Infinity, "steps_offset": 1}')
    change(pipeline, "tokenizer/tokenizer_config.json", model_max_length=10**30, special_tokens_map_file="/a/b.json")
    change(pipeline, "text_encoder/config.json", quantization_config=None, attn_implementation="sdpa")
    check_pipeline(pipeline)
    change(pipeline, "tokenizer/tokenizer_config.json", model_max_length=None)
    check_pipeline(pipeline)


TAKEN = [
    ("unet/diffusion_pytorch_model.safetensors.index.fp16.json", {"metadata": {"total_size": 5 * 10**9}, **SHARDS}),
    ("unet/diffusion_pytorch_model.fp16.safetensors.index.json", {"metadata": {"total_size": 5 * 10**9}, **SHARDS}),
    ("text_encoder/trainer_state.json", {"total_flos": 3e17, "best_metric": float("nan"), "auto_map": 1}),
    ("text_encoder/all_results.json", {"train_samples_per_second": 10**7}),
    ("text_encoder/modules.json", [{"path": "1_Pooling"}]),
    ("text_encoder/tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer"}),  # none is loaded from there
    ("unet/config.json", {**FILES["unet/config.json"], "optimization_step": 150_000, "update_after_step": 0}),
    ("unet/config.json", {**FILES["unet/config.json"], "mask_value": -1e9, "global_step": 3_000_000}),
    ("text_encoder/config.json", {**CLIP, "rope_theta": 1_000_000, "image_token_index": 128_000}),
    ("tokenizer/tokenizer_config.json", {"tokenizer_file": "/home/somebody/.cache/tokenizer.json"}),
    ("tokenizer/tokenizer_config.json", {"vocab_file": "./vocab.json", "merges_file": "./merges.txt"}),
    ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]}),
    ("model_index.json", {**INDEX, "safety_checker": ["diffusers", "StableDiffusionSafetyChecker"]}),
    ("model_index.json", {**INDEX, "safety_checker": ["diffusers.pipelines.stable_diffusion.safety_checker", "A"]}),
    ("model_index.json", {**INDEX, "watermark": ["stable_diffusion_xl", "StableDiffusionXLWatermarker"]}),
    ("model_index.json", {**INDEX, "controlnet": ["diffusers.pipelines.controlnet.multicontrolnet", "Multi"]}),
    ("model_index.json", {**INDEX, "gadget": ["own", "Gadget"], "other": {"a": 1}}),
    ("feature_extractor/preprocessor_config.json", {"size": {"shortest_edge": 224, "longest_edge": 9_999_999}}),
]


@pytest.mark.parametrize(("file", "content"), TAKEN)
def test_what_folders_of_real_users_hold_is_taken(file, content, pipeline):
    (pipeline / file).parent.mkdir(exist_ok=True)
    (pipeline / file).write_text(json.dumps(content))
    change(pipeline, "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    check_pipeline(pipeline)


CODE = "nothing of a model's folder is run"
PIPELINES = [
    ("model_index.json", {"vae": ["own_code", "Flag"]}, "vae is Flag of own_code, which is not loaded .*: allowed is "),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderOobleck"]}, "allowed is AutoencoderKL, Asymm"),
    ("model_index.json", {"vae": ["msdiffusion.pixel_autoencoder", "torch"]}, "vae is torch of msdiffusion"),
    ("model_index.json", {"unet": ["msdiffusion.pixel_autoencoder", "PixelUnshuffleAutoencoder"]}, "unet is Pixel"),
    ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, "allowed is UNet2DConditionModel of diff"),
    ("model_index.json", {"unet": ["os", "system"]}, "unet is system of os"),
    ("model_index.json", {"unet": ["diffusers.models", "UNet2DConditionModel"]}, "of diffusers.models, which is not"),
    ("model_index.json", {"unet": ["Diffusers", "UNet2DConditionModel"]}, "of Diffusers, which is not loaded"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "allowed is CLIPTextModel of transform"),
    ("model_index.json", {"text_encoder": ["transformers", "AutoModel"]}, "text_encoder is AutoModel of transformers"),
    ("model_index.json", {"tokenizer": ["transformers", "T5Tokenizer"]}, "allowed is CLIPTokenizer, CLIPTokenizerFast"),
    ("model_index.json", {"scheduler": ["own", "DDIMScheduler"]}, "allowed is a ...Scheduler of diffusers"),
    ("model_index.json", {"scheduler": ["diffusers", "utils"]}, "scheduler is utils of diffusers"),
    ("model_index.json", {"vae": ["diffusers"]}, r"vae is \['diffusers'\]: needed is \[library, class\]"),
    ("model_index.json", {"vae": {"a": 1}}, r"needed is \[library, class\]"),
    ("model_index.json", {"vae": [None, "AutoencoderKL"]}, r"needed is \[library, class\]"),
    ("model_index.json", {"_class_name": ["own", "StableDiffusionXLOwn"]}, "a class in a file of its own: allowed is"),
    ("model_index.json", {"custom_pipelines": {"own": {}}}, f"custom_pipelines .*{CODE}"),
    ("model_index.json", {"trust_remote_code": True}, f"trust_remote_code is True.*{CODE}"),
    ("unet/config.json", {"auto_map": {"AutoModel": "own.Own"}}, f"auto_map .* asks for code of its own: {CODE}"),
    ("unet/config.json", {"_class_name": "FluxTransformer2DModel"}, "of the class 'Flux.*': needed is UNet2DCondition"),
    ("unet/config.json", {"quantization_config": {"load_in_4bit": True}}, "asks for quantized weights"),
    ("unet/config.json", {"block_out_channels": [8] * 13}, "block_out_channels has 13 entries: at most 12"),
    ("unet/config.json", {"layers_per_block": 201}, "layers_per_block is 201: at most 200"),
    ("unet/config.json", {"layers_per_block": 20, "transformer_layers_per_block": [[9, 1], 10]}, "600 layers: at most"),
    ("vae/config.json", {"layers_per_up_block": 199}, "4 stages of 199 layers_per_block .* 796 layers: at most 400"),
    ("unet/config.json", {"cross_attention_dim": 10**6}, "cross_attention_dim is 1000000: at most 65536"),
    ("unet/config.json", {"sample_size": 10**8}, "sample_size is 100000000: at most 65536"),
    ("unet/config.json", {"num_class_embeds": 10**8}, "at most 1000000"),
    ("unet/config.json", {"whatever": 10**300}, "whatever is .*: at most 65536"),
    ("unet/config.json", {"whatever": 10**8}, "whatever is 100000000: at most 65536"),
    ("unet/config.json", {"whatever": 1e300}, "whatever is 1e.300: at most 1000000000"),
    ("unet/config.json", {"norm_eps": float("nan")}, "norm_eps is nan: needed is a finite number"),
    ("unet/config.json", {"norm_eps": "own"}, "norm_eps is 'own': needed is a number"),
    ("unet/config.json", {"norm_eps": True}, "norm_eps is True: needed is a number"),
    ("unet/config.json", {"sample_size": -3}, "sample_size is -3: needed is a size of 1 or more"),
    ("unet/config.json", {"sample_size": [8, 0]}, "sample_size is .*: needed is a size of 1 or more"),
    ("vae/config.json", {"scaling_factor": "own"}, "scaling_factor is 'own': needed is a number"),
    ("vae/config.json", {"shift_factor": [1]}, "shift_factor is .*: needed is a number"),
    ("vae/config.json", {"latents_mean": "own"}, "latents_mean is 'own': needed is a list of numbers"),
    ("vae/config.json", {"latents_std": ["1"]}, "latents_std is .*: needed is a list of numbers"),
    ("vae/config.json", {"up_block_out_channels": [8] * 13}, "up_block_out_channels has 13 entries: at most 12"),
    ("text_encoder/config.json", {"model_type": "t5"}, "is of model_type 't5': needed is clip or clip_text_model"),
    ("text_encoder/config.json", {"model_type": None}, "is of model_type None"),
    ("text_encoder/config.json", {"auto_map": {"AutoModel": "own.Own"}}, f"auto_map .*{CODE}"),
    ("text_encoder/config.json", {"text_config": {"auto_map": {"AutoModel": "own.Own"}}}, f"auto_map .*{CODE}"),
    ("text_encoder/config.json", {"attn_implementation": "somebody/kernel"}, "allowed is eager, sdpa"),
    ("text_encoder/config.json", {"_attn_implementation_internal": "a/b@main"}, "allowed is eager, sdpa"),
    ("text_encoder/config.json", {"attn_implementation": {"": "a/b"}}, "allowed is eager, sdpa"),
    ("text_encoder/config.json", {"use_kernels": True}, "asks for compiled code from a hub"),
    ("text_encoder/config.json", {"num_hidden_layers": 100_000}, "num_hidden_layers is 100000: at most 200"),
    ("text_encoder/config.json", {"vocab_size": 10**9}, "vocab_size is 1000000000: at most 1000000"),
    ("text_encoder/config.json", {"max_position_embeddings": 10**7}, "max_position_embeddings .*: at most 65536"),
    ("text_encoder/config.json", {"hidden_size": -(10**7)}, "hidden_size is -10000000: at most 65536"),
    ("text_encoder/adapter_config.json", {"base_model_name_or_path": "a/b"}, "a PEFT adapter of another model"),
    ("text_encoder/model.safetensors.index.json", {"weight_map": {"a": "../b.bin"}}, "needed is a file beside it"),
    ("text_encoder/model.safetensors.index.json", {"weight_map": {"a": "/etc/b"}}, "needed is a file beside it"),
    ("text_encoder/model.safetensors.index.json", {"weight_map": {"a": 1}}, "'a' lies in 1: needed is a file"),
    ("text_encoder/model.safetensors.index.fp16.json", {"weight_map": {"a": "../b.bin"}}, "needed is a file beside it"),
    ("text_encoder/config.json", {"configuration_files": ["a/config.1.json"]}, "needed are files beside it"),
    ("text_encoder/config.9.0.json", {"model_type": "t5"}, "is of model_type 't5': needed is clip"),
    ("text_encoder/model.safetensors.index.json", {}, "weight_map must give the file of every tensor"),
    ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}, f"auto_map .*{CODE}"),
    ("tokenizer/tokenizer_config.json", {"tokenizer_class": "OwnTokenizer"}, "tokenizer_class is 'Own.*allowed is"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 0}, "model_max_length is 0: needed is a number"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77'"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": True}, "model_max_length is True"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": float("inf")}, "model_max_length is inf"),
    ("tokenizer/tokenizer_config.json", {"merges_file": "/etc/hostname"}, "merges_file .*: needed is a file beside"),
    ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.1.json"]}, "needed are files beside"),
    ("tokenizer/tokenizer.9.0.json", {"padding": {"strategy": {"Fixed": 10**9}}}, "padding to 1000000000 tokens"),
    ("tokenizer/tokenizer_config.json", {"merges_file": "../a.txt"}, "merges_file .*: needed is a file beside it"),
    ("tokenizer/tokenizer.json", {"padding": {"strategy": {"Fixed": 10**9}}}, "padding to 1000000000 tokens: at most"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is .*: at most 10000"),
    ("scheduler/scheduler_config.json", {"solver_order": 10**8}, "solver_order is 100000000: at most 8"),
    ("scheduler/scheduler_config.json", {"predictor_order": 9}, "predictor_order is 9: at most 8"),
    ("scheduler/scheduler_config.json", {"own_count": 10**8}, "own_count is 100000000: at most 65536"),
    ("scheduler/scheduler_config.json", {"steps_offset": 10**6}, "steps_offset is 1000000: at most 10000"),
    ("scheduler/scheduler_config.json", {"beta_start": float("inf")}, "beta_start is inf: needed is a finite"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1, float("nan")]}, "trained_betas is nan"),
    ("scheduler/scheduler_config.json", {"auto_map": {"a": "own.Own"}}, f"auto_map .*{CODE}"),
]


@pytest.mark.parametrize(("file", "entries", "message"), PIPELINES)
def test_strange_pipelines_are_refused_by_file_and_entry(file, entries, message, pipeline):
    change(pipeline, file, **entries)
    began = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        check_pipeline(pipeline)
    assert str(caught.value).startswith(str(pipeline / file))
    assert len(str(caught.value).replace(str(pipeline), "")) < 400
    assert time.perf_counter() - began < 1


NETWORKS = [
    ("config.json", {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"}, "a network of timm: give timm:NAME"),
    ("config.json", {"model_type": "llama"}, "is of model_type 'llama': needed is clip or clip_vision_model"),
    ("config.json", {"use_pretrained_backbone": True}, "asks for weights from elsewhere"),
    ("config.json", {"backbone": "owner/name"}, "asks for weights from elsewhere"),
    ("config.json", {"model_args": {"checkpoint_path": "a.bin"}}, "model_args .*settings of a network of timm"),
    ("config.json", {"vision_config": {"num_hidden_layers": 10**6}}, "num_hidden_layers is 1000000: at most 200"),
    ("config.json", {"vision_config": {"image_size": 100_000}}, "image_size is 100000: at most 4096"),
    ("config.json", {"depths": [1] * 50}, "depths has 50 entries: at most 12"),
    ("preprocessor_config.json", {"size_divisor": 10**8}, "size_divisor is 100000000: at most 65536"),
    ("preprocessor_config.json", {"size": {"longest_edge": 10**6}}, "longest_edge is 1000000: at most 4096"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 1, "longest_edge": 10**10}}, "longest_edge beside .* at m"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 10**6}}, "shortest_edge is 1000000: at most 4096"),
    ("preprocessor_config.json", {"crop_size": {"height": 50_000, "width": 1}}, "height is 50000: at most 4096"),
    ("preprocessor_config.json", {"crop_size": 50_000}, "crop_size is 50000: at most 4096"),
    ("preprocessor_config.json", {"image_std": [1, 0, 1]}, "no number may be 0"),
    ("preprocessor_config.json", {"image_processor_type": "Own"}, "allowed is an image processor of transformers"),
    ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "own.Own"}}, f"auto_map .*{CODE}"),
    ("processor_config.json", {"image_processor": {"auto_map": {"A": "own.Own"}}}, f"auto_map .*{CODE}"),
    ("generation_config.json", {"custom_generate": "owner/name"}, f"custom_generate .*{CODE}"),
]


@pytest.mark.parametrize(("file", "entries", "message"), NETWORKS)
def test_strange_networks_are_refused_by_file_and_entry(file, entries, message, tmp_path):
    change(tmp_path, "config.json", model_type="clip", id2label={"0": "auto_map"})
    check_network(tmp_path, CLIP_VISION)
    change(tmp_path, file, **entries)
    with pytest.raises(InputError, match=message) as caught:
        check_network(tmp_path, CLIP_VISION)
    assert str(caught.value).startswith(str(tmp_path / file))


def test_files_that_are_no_settings(tmp_path):
    path = tmp_path / "config.json"
    for content, message in (
        (b"[1, 2]", r"holds no settings by name, but \[1, 2\]"),
        (b"{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", None),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON|a is .*: at most"),
    ):
        path.write_bytes(content)
        if message is None:
            check_network(tmp_path)
            continue
        with pytest.raises(InputError, match=message):
            check_network(tmp_path)
    with path.open("wb") as file:
        file.truncate(30_000_000)
    with pytest.raises(InputError, match="has 30 MB: at most 20 are read"):
        check_network(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="is no ordinary file"):
        check_network(tmp_path)


SIZES = [
    ({"widths": [8, 2.5]}, r"widths is \[8, 2.5\]: needed are whole numbers"),
    ({"image_size": "1024"}, "image_size is '1024': needed are whole numbers"),
    ({"image_size": -16}, "needed are whole numbers"),
    ({"image_size": True}, "needed are whole numbers"),
    ({"image_size": 1024.0}, "needed are whole numbers"),
    ({"image_size": 32768}, "at most 4096"),
    ({"encoder_width": 10**6}, "at most 65536"),
    ({"encoder_depth": 10**4}, "at most 200"),
    ({"depths": [1] * 40}, "depths has 40 entries"),
    ({"auto_map": {"a": "b"}}, "needed are whole numbers"),
]


@pytest.mark.parametrize(("sizes", "message"), SIZES)
def test_sizes_are_whole_numbers_within_limits(sizes, message, tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps({"widths": [64, 128], "image_size": 1024}))
    assert read_sizes(tmp_path / "sizes.json") == {"widths": [64, 128], "image_size": 1024}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    with pytest.raises(InputError, match=message):
        read_sizes(tmp_path / "sizes.json")


def test_configs_of_a_repository_are_fetched_and_their_version_kept(tmp_path, monkeypatch):
    assert configs_here(str(tmp_path), "unet") == (tmp_path / "unet", {})
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "0123abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert configs_here("owner/name") == (tmp_path / "0123abc", {"revision": "0123abc"})
    assert configs_here("owner/name", "unet") == (tmp_path / "0123abc/unet", {"revision": "0123abc"})
    assert asked == [("owner/name", ["*.json"]), ("owner/name", ["unet/*.json"])]
