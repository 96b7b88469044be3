"""What the adapter costs: a denoising step of the UNet with subjects, against the bare UNet with its own processors.

    python benchmarks/denoising_step.py                     # the embedded model
    python benchmarks/denoising_step.py --sdxl --device cuda --dtype float16

A step is one call of the UNet on [unconditional; conditional], as in a sampler with guidance. The variants take turns
within one run, so that whatever else the machine does hits all of them alike; medians count, and their ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from msdiffusion.adapter import MSAdapter
from msdiffusion.attention import AutoLayout
from msdiffusion.loading import load_adapter
from msdiffusion.places import DEFAULT_MODEL
from msdiffusion.resampler import ResamplerParams

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def main() -> None:
    """Print a Markdown table: variant, median and fastest milliseconds, ratio to the bare UNet."""
    parser = argparse.ArgumentParser(description="the adapter's share of a denoising step")
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="adapter folder (default: the embedded one)")
    parser.add_argument("--sdxl", action="store_true", help="random weights of SDXL's sizes instead, 1024 px")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--latent", type=int, help="side of the latents (default: the model's own)")
    parser.add_argument("--text-tokens", type=int, default=77)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    unet, adapter = random_sdxl(options) if options.sdxl else trained(options)
    print(
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M UNet, {options.pictures} picture(s) with guidance, "
        f"{options.subjects} subjects, {options.device}, {options.dtype}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n"
    )
    times = measure(unet, adapter, options)
    bare = statistics.median(times["bare UNet"])
    print("| variant | median ms | fastest ms | ratio |\n|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {1e3 * median:.2f} | {1e3 * min(values):.2f} | {median / bare:.3f} |")


def trained(options: argparse.Namespace) -> tuple[UNet2DConditionModel, MSAdapter]:
    """The UNet and the adapter of a folder."""
    adapter, base, _ = load_adapter(options.model)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    if options.dtype != torch.float32:  # what it is; diffusers warns of every cast
        unet.to(options.dtype)
    return unet.to(options.device).eval(), adapter.to(options.device, options.dtype).eval()


def random_sdxl(options: argparse.Namespace) -> tuple[UNet2DConditionModel, MSAdapter]:
    """Random weights of the released sizes, made on the device itself."""
    with torch.device(options.device), default_dtype(options.dtype):
        unet = UNet2DConditionModel(**SDXL).eval()
        params = ResamplerParams(image_width=1664, phrase_width=768, output_width=2048)
        return unet, MSAdapter.from_unet(unet, params).eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def measure(unet: UNet2DConditionModel, adapter: MSAdapter, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round by variant."""
    own = unet.attn_processors
    adapter.install(unet)
    installed = unet.attn_processors
    side = options.latent or unet.config.sample_size
    B, S = options.pictures, options.subjects
    like = {"device": options.device, "dtype": options.dtype}
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    inputs = {
        "sample": torch.randn(2 * B, unet.config.in_channels, side, side, **like),
        "timestep": torch.tensor(500, device=options.device),
        "encoder_hidden_states": torch.randn(2 * B, options.text_tokens, unet.config.cross_attention_dim, **like),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2 * B, pooled, **like),
            "time_ids": torch.zeros(2 * B, 6, **like),
        },
    }
    tokens = torch.randn(1, S, adapter.tokens_per_subject, unet.config.cross_attention_dim, **like)
    left = torch.arange(S, device=options.device) / S
    boxes = torch.stack([left, torch.full_like(left, 0.25), left + 1 / S, torch.full_like(left, 0.75)], dim=-1)[None]
    spans = torch.stack([torch.arange(S) + 1, torch.arange(S) + 2], dim=-1)[None].to(options.device)

    def condition(**layout: AutoLayout) -> dict[str, object]:
        made = adapter.condition(tokens, boxes, height=side, width=side, guidance=True, **layout)
        return {"subjects": made}

    layout = AutoLayout(spans, start_step=1)
    variants = {
        "bare UNet": (own, None),
        "adapter installed, no subjects": (installed, None),
        "with subjects": (installed, condition()),
        "with subjects, auto layout": (installed, condition(auto_layout=layout)),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.rounds + 2):
        for name, (processors, kwargs) in variants.items():
            unet.set_attn_processor(dict(processors))  # diffusers empties the dictionary it is given
            elapsed = timed(lambda kwargs=kwargs: unet(**inputs, cross_attention_kwargs=kwargs).sample, options.device)
            if turn >= 2:  # the first rounds warm caches up
                times[name].append(elapsed)
    return times


def timed(work: Callable[[], Tensor], device: str) -> float:
    """Seconds of one call, the device's queue included."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
