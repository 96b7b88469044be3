"""Fixtures shared by all tests: where things are, golden tensors, and a miniature of the whole model stack."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from msdiffusion.environment import prepare_environment

os.environ.setdefault("PYTHONSAFEPATH", "")  # commands that tests call in this process would set it for all
prepare_environment()  # as every command does, before a test imports torch

ASSETS = Path(__file__).parent / "assets"
# Words that are one token to the tiny tokenizer; any other text becomes more tokens.
WORDS = (
    "a",
    "an",
    "the",
    "dog",
    "cat",
    "teapot",
    "clock",
    "hat",
    "red",
    "blue",
    "and",
    "on",
    "in",
    "with",
    "beach",
    "room",
)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared material (real videos, the official golden files); the test skips without it."""
    place = Path(os.environ.get("MSD_SHARED", Path(__file__).parents[2] / "shared"))
    if not place.is_dir():
        pytest.skip(f"needs the shared material: no {place} (set MSD_SHARED)")
    return place


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that at the end no process waits for another one's long file.

    pytest-xdist hands files out as they stand here, with --no-loadscope-reorder.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory) -> str:
    """A Python whose processes start at once, because torch, diffusers and Lightning are loaded: forked_python.py."""
    spec = importlib.util.spec_from_file_location("forked_python", Path(__file__).with_name("forked_python.py"))
    server = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(server)
    base = tmp_path_factory.getbasetemp()
    return server.start((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "forked_python")


@pytest.fixture
def forked_processes(forked_python, monkeypatch) -> None:
    """What a test starts as ``sys.executable`` is started by that Python."""
    monkeypatch.setattr(sys, "executable", forked_python)


@pytest.fixture(scope="session")
def golden_tensors():
    """Function: name -> (tensors, config) computed by the official implementation."""
    from safetensors import safe_open

    def read(name):
        with safe_open(ASSETS / "golden" / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = {
            key: json.loads(value) for key, value in metadata.items() if key.endswith("config") or value[:1] in "[0"
        }
        return tensors, config.get("config", config)

    return read


@pytest.fixture(scope="session")
def official_adapter_file() -> Path:
    """A small ms_adapter.bin written by the official code, for the UNet of the golden file."""
    return ASSETS / "golden" / "ms_adapter.bin"


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A random-weight miniature of the SDXL stack in the layout of checkpoints/tiny. Read it, don't write to it.

    64 px pictures, latents 32 x 32 x 4; CLIP encoders and UNet of a few thousand weights; an adapter with defaults.
    """
    directory = tmp_path_factory.mktemp("tiny_model")
    build_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_sd1_model_dir(tmp_path_factory) -> Path:
    """The same of the Stable Diffusion 1.x stack: one text encoder, no size conditions. Read it, don't write to it."""
    directory = tmp_path_factory.mktemp("tiny_sd1_model")
    build_tiny_sd1_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """The tokenizer of tiny_model_dir."""
    return make_tiny_tokenizer()


def build_tiny_model(directory: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from msdiffusion.adapter.adapter import MSAdapter
    from msdiffusion.adapter.resampler import ResamplerParams

    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_sizes = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=16, projection_dim=16, **text_sizes))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=32, projection_dim=20, **text_sizes))
        unet = UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 2, 4),
            cross_attention_dim=48,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 20,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=64,
            force_upcast=False,
        )
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=64,
                patch_size=8,
                projection_dim=16,
            )
        )
        params = ResamplerParams(
            image_width=24, phrase_width=16, output_width=48, width=32, depth=1, heads=2, head_width=16
        )
        adapter = MSAdapter.from_unet(
            unet,
            params,
            base_model="base",
            image_encoder="image_encoder",
            training_resolution=64,
            reference_background=(255, 255, 255),
            reference_fit="pad",
            defaults={"scale": 0.8, "steps": 3, "guidance_scale": 3.0},
        )
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    pipeline = StableDiffusionXLPipeline(
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )
    pipeline.save_pretrained(directory / "base")
    image_encoder.save_pretrained(directory / "image_encoder")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        directory / "image_encoder"
    )
    adapter.save_pretrained(directory)


def build_tiny_sd1_model(directory: Path) -> None:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    from msdiffusion.adapter.adapter import MSAdapter
    from msdiffusion.adapter.resampler import ResamplerParams

    tokenizer = make_tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=20,
                vocab_size=len(tokenizer),
                max_position_embeddings=tokenizer.model_max_length,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=20,
        )
        vae = AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=64,
        )
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=64,
                patch_size=8,
                projection_dim=16,
            )
        )
        params = ResamplerParams(
            image_width=24, phrase_width=20, output_width=20, width=32, depth=1, heads=2, head_width=16
        )
        adapter = MSAdapter.from_unet(
            unet,
            params,
            base_model="base",
            image_encoder="image_encoder",
            training_resolution=64,
            reference_background=(255, 255, 255),
            reference_fit="pad",
            defaults={"scale": 0.8, "steps": 3, "guidance_scale": 3.0},
        )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(directory / "base")
    image_encoder.save_pretrained(directory / "image_encoder")
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(
        directory / "image_encoder"
    )
    adapter.save_pretrained(directory)


def make_tiny_tokenizer():
    """A CLIP tokenizer whose words are bytes, joined for the few words that tests use; 40 tokens at most."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = [*alphabet, *(character + "</w>" for character in alphabet)]
    merges = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pair := (pieces[0], pieces[1])) not in merges:
                merges.append(pair)
                vocabulary.append(pieces[0] + pieces[1])
            pieces[:2] = [pieces[0] + pieces[1]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges, model_max_length=40
    )
