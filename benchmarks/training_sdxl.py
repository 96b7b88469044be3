"""Training steps at SDXL's sizes with random weights, for ``training_speed.py`` and ``training_memory.py``.

The networks are built from their released sizes (SDXL base 1.0, its autoencoder and both text encoders, CLIP-ViT-bigG,
the adapter of the paper). Time and memory of a step do not depend on the values of weights or pixels, so neither a
download nor a dataset is needed: pictures, tokens and noise are random, captions are words.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from denoising_step import SDXL, fill
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from training_plain_loop import PlainTraining
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.training.learning.optimizers import make_optimizer
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.samples.batch import PairsBatch
from msdiffusion.training.samples.draws import OBJECTIVE, SampleDraws, generator_for
from msdiffusion.training.samples.encoded import EncodedPairs

PIXELS = 512
SLOTS = 4
"""That the official script pads every sample to."""
SUBJECTS = (1, 2, 2, 1, 2, 3, 1, 2)
"""Of the samples of a batch, in turn: 1.75 on average, as in the pairs of the procedural world."""
MINIATURE_UNET = {**SDXL, "block_out_channels": (32, 64, 64), "transformer_layers_per_block": (1, 1, 1),
                  "attention_head_dim": (2, 4, 4), "cross_attention_dim": 96,
                  "projection_class_embeddings_input_dim": 6 * 256 + 64}  # fmt: skip


def networks_on_meta(miniature: bool = False) -> dict[str, nn.Module]:
    """The networks without weights; tiny ones of the same kinds where ``miniature``."""
    text = {"vocab_size": 49408, "max_position_embeddings": 77}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**(MINIATURE_UNET if miniature else SDXL))
        channels = (32, 32, 32, 32) if miniature else (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025,
        )
        first, second, vision = (
            ((32, 64, 1, 2), (64, 64, 1, 2), (32, 64, 2, 2))
            if miniature
            else ((768, 3072, 12, 12), (1280, 5120, 32, 20), (1664, 8192, 48, 16))
        )
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        first, second, vision = (dict(zip(names, sizes, strict=True)) for sizes in (first, second, vision))
        projected = second["hidden_size"]
        encoder = CLIPTextModel(CLIPTextConfig(**text, **first))
        encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text, **second, projection_dim=projected))
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**vision, image_size=224, patch_size=14, projection_dim=projected, hidden_act="gelu")
        )
        sizes = {"width": 32, "depth": 1, "heads": 2, "head_width": 16} if miniature else {}
        params = ResamplerParams(
            image_width=vision["hidden_size"],
            phrase_width=first["hidden_size"],
            output_width=unet.config.cross_attention_dim,
            **sizes,
        )
        adapter = MSAdapter.from_unet(unet, params)
    return {
        "UNet": unet,
        "autoencoder": vae,
        "text encoder (CLIP-L)": encoder,
        "text encoder (bigG)": encoder_2,
        "image encoder (bigG)": image_encoder,
        "adapter": adapter,
    }


def networks(device: str, dtype: torch.dtype, miniature: bool) -> tuple[Any, Any, CLIPImageProcessor, dict[str, int]]:
    """(pipeline, image encoder, its preprocessing, sizes of the resampler) with random weights on a device."""
    built = networks_on_meta(miniature)
    params = built.pop("adapter").config.resampler
    for name, network in built.items():
        nn.Module.to(network, torch.float32 if name == "autoencoder" else dtype)
        built[name] = make_buffers(fill(network.to_empty(device=device)))
    unet, vae, encoder, encoder_2, image_encoder = built.values()
    # the tokenizer of the embedded base: which numbers a text becomes does not matter here, how many does
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/tiny/base/tokenizer")
    tokenizer.model_max_length = 77
    pipeline = StableDiffusionXLPipeline(
        vae, encoder, encoder_2, tokenizer, tokenizer, unet, EulerDiscreteScheduler(), add_watermarker=False
    )
    sizes = {name: getattr(params, name) for name in ("width", "depth", "heads", "head_width")}
    return pipeline, image_encoder, CLIPImageProcessor(), sizes


def make_buffers(network: Any) -> Any:
    """Number the positions of CLIP again: buffers come from the meta device without a value."""
    for module in network.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            ids.copy_(torch.arange(ids.shape[-1], device=ids.device).expand_as(ids))
    return network


def plain_step(device: str, batch_size: int, miniature: bool) -> Callable[[], Any]:
    """A step of the plain loop: UNet in float32 under bfloat16 autocast, everything encoded, four slots."""
    pipeline, image_encoder, _, sizes = networks(device, torch.float32, miniature)
    training = PlainTraining.__new__(PlainTraining)
    training.setup(pipeline, image_encoder, sizes, device, 1e-4)
    boxes = torch.zeros(batch_size, SLOTS, 4)
    for row in range(batch_size):
        boxes[row, : SUBJECTS[row % len(SUBJECTS)]] = torch.tensor([0.1, 0.1, 0.6, 0.7])
    batch = {
        "caption": ["a dog and a cat on the beach"] * batch_size,
        "phrases": [["dog", "cat", "", ""]] * batch_size,
        "target": torch.rand(batch_size, 3, PIXELS, PIXELS) * 2 - 1,
        "boxes": boxes,
        "references": torch.randn(batch_size, SLOTS, 3, 224, 224),
    }

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            training.step(batch)

    return step


def our_step(
    device: str,
    batch_size: int,
    miniature: bool,
    *,
    ahead: bool = True,
    optimizer: str = "adamw",
    fused: bool | None = None,
    base_dtype: torch.dtype = torch.bfloat16,
    resident: bool = True,
    **settings: Any,
) -> Callable[[], Any]:
    """A step of ``MSDiffusionModule``.

    Args:
        device: where.
        batch_size: B.
        miniature: tiny networks.
        ahead: take encodings made ahead.
        optimizer: see ``make_optimizer``.
        fused: see there.
        base_dtype: of the frozen networks.
        resident: keep the encoders on the device.
        settings: of the module.
    """
    pipeline, image_encoder, processor, sizes = networks(device, base_dtype, miniature)
    module = MSDiffusionModule("random", "random", resampler=sizes, drop_text=0, drop_both=0, drop_image=0, **settings)
    original = Backbone.from_pretrained
    Backbone.from_pretrained = classmethod(lambda cls, *_, **__: cls(pipeline, image_encoder, processor).to(device))
    try:
        module.configure_model()
    finally:
        Backbone.from_pretrained = original
    module.to(device)
    module.log = lambda *_, **__: None
    if not resident:
        for network in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, image_encoder):
            network.to("meta")
    trained = make_optimizer(module.adapter.parameters(), optimizer, learning_rate=1e-4, weight_decay=0.01, fused=fused)
    batch = random_batch(module, image_encoder.config, batch_size, ahead)

    def step() -> None:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            there = module.transfer_batch_to_device(batch, torch.device(device), 0)
            loss = module.training_step(there, 0)
        loss.backward()
        nn.utils.clip_grad_norm_(module.adapter.parameters(), 1.0)
        trained.step()
        trained.zero_grad()
        if module.averaged is not None:
            module.averaged.update(module.adapter)

    return step


def random_batch(module: MSDiffusionModule, vision: Any, B: int, ahead: bool) -> PairsBatch:
    """A batch on the host, in page-locked memory where there is a GPU."""
    backbone, side = module.backbone, PIXELS
    counts = [SUBJECTS[row % len(SUBJECTS)] for row in range(B)]
    present = torch.arange(SLOTS) < torch.tensor(counts).unsqueeze(1)
    boxes = torch.tensor([0.1, 0.1, 0.6, 0.7]) * present.unsqueeze(-1)
    latent = module.latent_shape(side, side)
    width = backbone.unet.config.cross_attention_dim
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    encoded = EncodedPairs(
        latent_mean=torch.randn(B, *latent),
        latent_deviation=torch.rand(B, *latent),
        prompt_states=torch.randn(B, 77, width).bfloat16(),
        pooled=torch.randn(B, backbone.pipeline.text_encoder_2.config.projection_dim).bfloat16(),
        phrase_embeddings=torch.randn(B, SLOTS, backbone.phrase_width).bfloat16(),
        image_tokens=torch.randn(B, SLOTS, tokens, backbone.image_width).bfloat16(),
    )
    batch = PairsBatch(
        numbers=torch.arange(B),
        weights=torch.ones(B),
        keys=[f"pair {row}" for row in range(B)],
        captions=["a dog and a cat on the beach"] * B,
        phrases=[["dog", "cat", "hat", "clock"][:count] + [""] * (SLOTS - count) for count in counts],
        reference_ids=[
            [f"{row}/{i}" for i in range(count)] + [""] * (SLOTS - count) for row, count in enumerate(counts)
        ],
        size=(side, side),
        targets=None if ahead else torch.rand(B, 3, side, side) * 2 - 1,
        boxes=boxes,
        present=present,
        references=None if ahead else torch.randn(B, SLOTS, 3, 224, 224),
        original_sizes=torch.full((B, 2), side),
        crops_top_left=torch.zeros(B, 2, dtype=torch.long),
        draws=SampleDraws.draw([generator_for(0, OBJECTIVE, row) for row in range(B)], latent),
        encoded=encoded if ahead else None,
    )
    return batch.pin_memory() if torch.cuda.is_available() else batch


SPEED: dict[str, tuple[str, Callable[..., Callable[[], Any]], dict[str, Any]]] = {
    "plain": ("plain loop, UNet float32 under bfloat16 autocast, 4 slots", plain_step, {}),
    "asked": ("ours, everything encoded at every step", our_step, {"ahead": False}),
    "ours": ("**ours, encodings made ahead**", our_step, {}),
    "unfused": ("AdamW not fused", our_step, {"fused": False}),
    "checkpointing": ("gradient checkpointing", our_step, {"gradient_checkpointing": True}),
    "compile": ("torch.compile", our_step, {"compile": True}),
}
MEMORY: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("encodings made ahead, frozen networks bfloat16, fused AdamW", {}),
    "float32": ("frozen networks float32", {"base_dtype": torch.float32}),
    "checkpointing": ("gradient checkpointing", {"gradient_checkpointing": True}),
    "asked": ("everything encoded at every step", {"ahead": False}),
    "away": ("encoders and autoencoder not on the device", {"resident": False}),
    "unfused": ("AdamW not fused", {"fused": False}),
    "8bit": ("8-bit AdamW", {"optimizer": "adamw_8bit"}),
    "average": ("with an average of the weights", {"ema_decay": 0.999}),
}


def print_speed(device: str, steps: int, repeats: int, batch_size: int, miniature: bool = False) -> None:
    """Samples per second, row by row; each alone on the device, medians over the repeats."""
    print(f"{device_name(device)}, batch {batch_size}, {PIXELS} px, torch {torch.__version__}\n")
    print("| variant | samples/s | from - to | x plain |\n|---|---|---|---|")
    base = None
    for title, make, settings in SPEED.values():
        step = make(device, batch_size, miniature, **settings)
        for _ in range(3):
            step()
        rates = []
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(device)
            rates.append(steps * batch_size / (time.perf_counter() - start))
        base = base or statistics.median(rates)
        rate = statistics.median(rates)
        print(f"| {title} | {rate:.2f} | {min(rates):.2f} - {max(rates):.2f} | {rate / base:.2f} |", flush=True)
        del step
        empty(device)


def print_memory(device: str, steps: int, batch_sizes: tuple[int, ...] = (1, 4, 8), miniature: bool = False) -> None:
    """Peak GiB on a GPU, row by row."""
    if torch.device(device).type != "cuda" and not miniature:
        raise SystemExit("--sdxl measures the memory of a GPU: give --device cuda (--analytic needs none)")
    print(f"{device_name(device)}, {PIXELS} px, torch {torch.__version__}\n")
    print(f"| setting | {' | '.join(f'batch {size}: GiB' for size in batch_sizes)} |")
    print("|---|" + "---|" * len(batch_sizes))
    for title, settings in MEMORY.values():
        peaks = []
        for size in batch_sizes:
            empty(device)
            try:
                step = our_step(device, size, miniature, **settings)
                for _ in range(steps):
                    step()
                peaks.append(f"{peak(device):.1f}")
                del step
            except torch.OutOfMemoryError:
                peaks.append("out of memory")
            except Exception as error:  # a library that is missing: the other rows count all the same
                peaks.append(f"did not run: {error}"[:120])
        print(f"| {title} | {' | '.join(peaks)} |", flush=True)


def device_name(device: str) -> str:
    """In words."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def empty(device: str) -> None:
    """Give memory back and count the peak anew."""
    import gc

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float:
    """GiB since ``empty``."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.startswith("cuda") else float("nan")
