"""What the adapter costs: a denoising step of the UNet with subjects, against the bare UNet with its own processors.

    python benchmarks/denoising_step.py                                           # the embedded model
    python benchmarks/denoising_step.py --sdxl --latent 64 --dtype bfloat16       # SDXL's sizes, 512 px, random weights
    python benchmarks/denoising_step.py --sdxl --latent 64 --dtype bfloat16 --memory
    python benchmarks/denoising_step.py --sdxl --narrow --latent 64               # SDXL's structure, a fifth as wide

A step is one call of the UNet on [unconditional; conditional], as in a sampler with guidance. The variants take turns
within one run, in an order that turns round, so that whatever else the machine does hits all of them alike; medians
count, and their ratio. On a CPU that others use too, the ratio of CPU time is steadier.

``naive`` is the straightforward way to do the same: masks rebuilt and keys projected in every layer at every step, an
explicit softmax, the unconditional half not left out. Its prediction is compared with ours.

``peer`` is what a user would take instead: diffusers' IP-Adapter Plus with a mask per subject and 16 tokens each. Its
projection of the image tokens runs at every step, as in diffusers' pipelines.

A second table is of the cross-attention layers alone, on what they were given in that step: it says what the care is
worth where the rest of the UNet does not drown it.

``--memory`` measures the peak of a process of its own for the bare UNet and for the UNet with subjects instead.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn
from torch.nn import functional

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.auto_layout import AutoLayout
from msdiffusion.adapter.loading import load_adapter
from msdiffusion.adapter.resampler import ResamplerParams
from msdiffusion.attention.unet import cross_attentions
from msdiffusion.places import DEFAULT_MODEL
from msdiffusion.request.layout import patch_masks

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
    parser.add_argument("--narrow", action="store_true", help="with --sdxl: every layer a fifth as wide")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--subjects", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--latent", type=int, help="side of the latents (default: the model's own)")
    parser.add_argument("--text-tokens", type=int, default=77)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--memory-of", choices=("bare", "subjects"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_memory()
        return
    options.dtype = getattr(torch, options.dtype)
    if options.memory_of:
        print(peak_memory(options))
        return
    unet, adapter = random_sdxl(options) if options.sdxl else trained(options)
    print(
        f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M UNet, {options.pictures} picture(s) with guidance, "
        f"{options.subjects} subjects, {options.device}, {options.dtype}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}\n",
        flush=True,
    )
    for title, times in measure(unet, adapter, options).items():
        print_table(title, times)


def print_table(title: str, times: dict[str, list[tuple[float, float]]]) -> None:
    """One row per variant, compared with the bare UNet."""
    columns = ("median ms", "fastest ms", "ratio of medians", "ratio of fastest", "ratio of CPU time")
    print(f"{title}:\n\n| variant | {' | '.join(columns)} |\n|---|---|---|---|---|---|")
    bare_wall, bare_cpu = zip(*times["bare"], strict=True)
    for name, values in times.items():
        wall, cpu = zip(*values, strict=True)
        median = statistics.median(wall)
        print(
            f"| {VARIANTS[name]} | {1e3 * median:.1f} | {1e3 * min(wall):.1f} | "
            f"{median / statistics.median(bare_wall):.3f} | {min(wall) / min(bare_wall):.3f} | "
            f"{statistics.median(cpu) / statistics.median(bare_cpu):.3f} |"
        )
    print(flush=True)


VARIANTS = {
    "bare": "bare UNet, diffusers' own processors",
    "installed": "adapter installed, no subjects",
    "subjects": "with subjects",
    "auto": "with subjects, auto layout",
    "naive": "with subjects, the naive way",
    "peer": "IP-Adapter Plus of diffusers, a mask per subject",
}


def trained(options: argparse.Namespace) -> tuple[UNet2DConditionModel, MSAdapter]:
    """The UNet and the adapter of a folder."""
    loaded = load_adapter(options.model)
    unet = UNet2DConditionModel.from_pretrained(loaded.sources.base_model, subfolder="unet")
    if options.dtype != torch.float32:  # what it is; diffusers warns of every cast
        unet.to(options.dtype)
    return unet.to(options.device).eval(), loaded.adapter.to(options.device, options.dtype).eval()


def random_sdxl(options: argparse.Namespace) -> tuple[UNet2DConditionModel, MSAdapter]:
    """Random weights of the released sizes, made on the device itself."""
    return random_unet(options), random_adapter(options)


def sdxl_config(options: argparse.Namespace) -> dict[str, Any]:
    """SDXL's UNet, or with ``--narrow`` one whose layers and heads are a fifth."""
    narrow = {"block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4)} if options.narrow else {}
    return SDXL | narrow


def random_unet(options: argparse.Namespace) -> UNet2DConditionModel:
    """SDXL's UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_config(options))
    nn.Module.to(unet, options.dtype)  # diffusers own method warns of a cast that loses nothing here
    return fill(unet.to_empty(device=options.device))


def random_adapter(options: argparse.Namespace) -> MSAdapter:
    """The released adapter's sizes."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_config(options))
        adapter = MSAdapter.from_unet(unet, ResamplerParams(image_width=1664, phrase_width=768, output_width=2048))
    return fill(adapter.to(options.dtype).to_empty(device=options.device))


@torch.no_grad()
def fill(module: Any) -> Any:
    """Values for empty weights, of a size that keeps activations finite; far cheaper than each layer's own start."""
    for name, weight in module.named_parameters():
        if weight.ndim == 1:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.uniform_(-1, 1).mul_(weight[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def inputs_of(unet: UNet2DConditionModel, options: argparse.Namespace) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Arguments of the UNet, subject tokens, and boxes side by side."""
    side = options.latent or unet.config.sample_size
    B, S = options.pictures, options.subjects
    like = {"device": options.device, "dtype": options.dtype}
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    torch.manual_seed(0)
    inputs = {
        "sample": torch.randn(B, unet.config.in_channels, side, side, **like).repeat(2, 1, 1, 1),  # as guidance does
        "timestep": torch.tensor(500, device=options.device),
        "encoder_hidden_states": torch.randn(2 * B, options.text_tokens, unet.config.cross_attention_dim, **like),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2 * B, pooled, **like),
            "time_ids": torch.zeros(2 * B, 6, **like),
        },
    }
    tokens = torch.randn(1, S, 16, unet.config.cross_attention_dim, **like)
    left = torch.arange(S, device=options.device) / S
    boxes = torch.stack([left, torch.full_like(left, 0.25), left + 1 / S, torch.full_like(left, 0.75)], dim=-1)[None]
    return inputs, tokens, boxes


@torch.no_grad()
def measure(
    unet: UNet2DConditionModel, adapter: MSAdapter, options: argparse.Namespace
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Wall and CPU seconds of every round by variant, of the step and of the cross-attention layers alone."""
    own = unet.attn_processors
    naive = naive_processors(unet, adapter)
    adapter.install(unet)
    installed = unet.attn_processors
    inputs, tokens, boxes = inputs_of(unet, options)
    B, S = options.pictures, options.subjects
    spans = torch.stack([torch.arange(S) + 1, torch.arange(S) + 2], dim=-1)[None].to(options.device)
    conditions = {
        "subjects": adapter.condition(tokens, boxes, scale=0.6, num_images=B),
        "auto": adapter.condition(tokens, boxes, num_images=B, auto_layout=AutoLayout(spans, start_step=1)),
    }
    text = inputs["encoder_hidden_states"]
    subject_text = tokens.flatten(1, 2).expand(2 * B, -1, -1)
    joined = {**inputs, "encoder_hidden_states": torch.cat([text, subject_text], dim=1)}
    naive_kwargs = {"text_tokens": text.shape[1], "boxes": torch.cat([0 * boxes, boxes]).repeat_interleave(B, 0)}
    variants: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
        "bare": (own, inputs, None),
        "installed": (installed, inputs, None),
        "subjects": (installed, inputs, {"subjects": conditions["subjects"]}),
        "auto": (installed, inputs, {"subjects": conditions["auto"]}),
        "naive": (naive, joined, {"naive": naive_kwargs}),
    }
    projection = None
    if "peer" in options.variants:
        processors, projection, images, masks = peer(unet, adapter, boxes, options)
        arguments = inputs | {"added_cond_kwargs": inputs["added_cond_kwargs"] | {"image_embeds": images}}
        variants["peer"] = (processors, arguments, {"ip_adapter_masks": masks})
    variants = {name: variants[name] for name in variants if name in {"bare", *options.variants}}

    def step(name: str) -> Tensor:
        processors, arguments, kwargs = variants[name]
        unet.encoder_hid_proj = None  # it has attention of its own
        unet.set_attn_processor(dict(processors))  # diffusers empties the dictionary it is given
        unet.encoder_hid_proj = projection if name == "peer" else None
        unet.register_to_config(encoder_hid_dim_type="ip_image_proj" if name == "peer" else None)
        return unet(**arguments, cross_attention_kwargs=kwargs).sample

    if {"naive", "subjects"} <= variants.keys():
        ours, theirs, bare = (step(name).float() for name in ("subjects", "naive", "bare"))
        difference, effect = (ours - theirs).abs().max().item(), (ours - bare).abs().max().item()
        print(f"largest difference between ours and the naive way: {difference:.2g}; subjects change {effect:.2g}\n")
    layers = list(cross_attentions(unet).values())
    seen = watch(layers, lambda: step("bare"))
    taking = {name: handed_on(layers[0], lambda name=name: step(name)) for name in conditions if name in variants}

    image_tokens = None if projection is None else projection(images)

    def attend(name: str) -> Tensor:
        processors, arguments, kwargs = variants[name]
        states, extra = arguments["encoder_hidden_states"], dict(kwargs or {})
        if name == "peer":
            states = (states, image_tokens)
        if name in taking:
            extra = {"participants": taking[name]}
        for layer, processor, hidden in zip(layers, layer_processors(processors), seen, strict=True):
            layer.set_processor(processor)
            result = layer(hidden, encoder_hidden_states=states, **extra)
        return result

    return {
        "One step": in_turns(list(variants), step, options, options.rounds),
        "Its cross-attention layers alone": in_turns(list(variants), attend, options, 3 * options.rounds),
    }


def in_turns(
    names: list[str], work: Callable[[str], Tensor], options: argparse.Namespace, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each, round by round, in an order that turns; a first round is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            elapsed = timed(lambda name=name: work(name), options.device)
            if turn:
                times[name].append(elapsed)
    return times


def watch(layers: list[Attention], work: Callable[[], Tensor]) -> list[Tensor]:
    """What each layer is given as hidden states while ``work`` runs."""
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, index=index: seen.__setitem__(index, args[0]))
        for index, layer in enumerate(layers)
    ]
    work()
    for hook in hooks:
        hook.remove()
    return [seen[index] for index in range(len(layers))]


def handed_on(layer: Attention, work: Callable[[], Tensor]) -> Any:
    """What takes part in a layer while ``work`` runs."""
    given: list[Any] = []
    hook = layer.register_forward_pre_hook(lambda _, __, kwargs: given.append(kwargs["participants"]), with_kwargs=True)
    work()
    hook.remove()
    return given[0]


def layer_processors(processors: dict[str, Any]) -> list[Any]:
    """Those of the cross-attention layers, in order."""
    return [processor for name, processor in processors.items() if name.endswith("attn2.processor")]


class NaiveAttnProcessor:
    """The straightforward way, as a reader of the paper would write it first: a measure of what care is worth.

    Subjects stand after the text in ``encoder_hidden_states``; keys, values and masks are made anew in every layer at
    every step, the softmax is written out, and the unconditional half is computed although nothing comes of it.
    """

    def __init__(self, to_k: nn.Linear, to_v: nn.Linear, scale: float = 0.6, tokens: int = 16) -> None:
        self.to_k, self.to_v, self.scale, self.tokens = to_k, to_v, scale, tokens

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        naive: dict[str, Any] | None = None,
    ) -> Tensor:
        """Attend from (B, Q, C) to text and subjects (B, L, width)."""
        assert naive is not None
        text = encoder_hidden_states[:, : naive["text_tokens"]]
        subjects = encoder_hidden_states[:, naive["text_tokens"] :]
        heads = attn.heads

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (heads, -1)).transpose(1, 2)

        query = split(attn.to_q(hidden_states))
        hidden = functional.scaled_dot_product_attention(query, split(attn.to_k(text)), split(attn.to_v(text)))
        bias, inside = self._masks(naive["boxes"], query)
        bias = bias.repeat_interleave(heads, dim=0)
        keys, values = split(self.to_k(subjects)).flatten(0, 1), split(self.to_v(subjects)).flatten(0, 1)
        scores = torch.baddbmm(
            bias.to(query.dtype), query.flatten(0, 1), keys.transpose(1, 2), alpha=query.shape[-1] ** -0.5
        )
        probabilities = scores.float().softmax(dim=-1).to(query.dtype)
        probabilities = torch.where(inside.repeat_interleave(heads, dim=0), probabilities, 0.0)
        hidden = hidden + self.scale * torch.bmm(probabilities, values).unflatten(0, (-1, heads))
        return attn.to_out[1](attn.to_out[0](hidden.transpose(1, 2).flatten(2)))

    def _masks(self, boxes: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Additive mask (B, Q, N) and rows inside any box (B, Q, 1) of a square picture."""
        side = math.isqrt(query.shape[2])
        ticks = torch.arange(side, device=query.device)
        regions = []
        for box in boxes.unbind(1):
            x1, y1, x2, y2 = (box * side).unbind(-1)
            columns = (ticks >= x1.floor()[:, None]) & (ticks < x2.ceil()[:, None])
            rows = (ticks >= y1.floor()[:, None]) & (ticks < y2.ceil()[:, None])
            regions.append((rows[:, :, None] & columns[:, None, :]).flatten(1))
        allowed = torch.stack(regions, dim=-1)
        bias = torch.where(allowed, 0.0, -10000.0).repeat_interleave(self.tokens, dim=-1)
        return bias, allowed.any(dim=-1, keepdim=True)


class IgnoringAttnProcessor(AttnProcessor2_0):
    """diffusers' own, which takes the naive way's keyword so that nobody warns of it."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        naive: dict[str, Any] | None = None,
    ) -> Tensor:
        """As the parent."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


def naive_processors(unet: UNet2DConditionModel, adapter: MSAdapter) -> dict[str, Any]:
    """The naive processors for every attention layer of the UNet."""
    layers = {f"{name.replace('/', '.')}.processor": name for name in cross_attentions(unet)}
    return {
        name: NaiveAttnProcessor(adapter.layers[layers[name]].to_k, adapter.layers[layers[name]].to_v)
        if name in layers
        else IgnoringAttnProcessor()
        for name in unet.attn_processors
    }


def peer(
    unet: UNet2DConditionModel, adapter: MSAdapter, boxes: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Any], nn.Module, list[Tensor], list[Tensor]]:
    """Processors, projection, image tokens and masks of an IP-Adapter Plus: random weights of its sizes."""
    like = {"device": options.device, "dtype": options.dtype}
    width = unet.config.cross_attention_dim
    with torch.device("meta"):
        projection = MultiIPAdapterImageProjection(
            [
                IPAdapterPlusImageProjection(
                    1280, width, hidden_dims=1280, depth=4, dim_head=64, heads=20, num_queries=16
                )
            ]
        )
        own = {
            f"{name.replace('/', '.')}.processor": IPAdapterAttnProcessor2_0(
                layer.to_k.out_features, width, num_tokens=(16,), scale=[[0.6] * options.subjects]
            )
            for name, layer in cross_attentions(unet).items()
        }
    processors = {
        name: fill(own[name].to(options.dtype).to_empty(device=options.device)) if name in own else AttnProcessor2_0()
        for name in unet.attn_processors
    }
    projection = fill(projection.to(options.dtype).to_empty(device=options.device))
    images = [torch.randn(2 * options.pictures, options.subjects, 257, 1280, **like)]
    side = 8 * (options.latent or unet.config.sample_size)
    masks = patch_masks(boxes, side, side).unflatten(-1, (side, side)).to(**like)
    return processors, projection, images, [masks]


def print_memory() -> None:
    """Peak memory of a fresh process each for the bare UNet and with subjects, beside the adapter's weights."""
    rest = [argument for argument in sys.argv[1:] if argument != "--memory"]
    peaks, weights = {}, 0.0
    for what in ("bare", "subjects"):
        command = [sys.executable, __file__, *rest, "--memory-of", what]
        peak, weights = map(float, subprocess.check_output(command, text=True).split()[-2:])
        peaks[what] = peak
    more = peaks["subjects"] - peaks["bare"]
    print("| peak memory | MiB |\n|---|---|")
    print(f"| bare UNet | {peaks['bare']:.0f} |\n| with subjects | {peaks['subjects']:.0f} |")
    print(f"| the adapter's weights | {weights:.0f} |")
    print(
        f"| more than bare UNet and adapter's weights | {more - weights:.0f}, {(more - weights) / peaks['bare']:.1%} |"
    )


@torch.no_grad()
def peak_memory(options: argparse.Namespace) -> str:
    """Peak of this process over two steps, and the weight of the adapter's weights, both in MiB."""
    unet = random_unet(options) if options.sdxl else trained(options)[0]
    with_subjects = options.memory_of == "subjects"
    adapter = (random_adapter(options) if options.sdxl else trained(options)[1]) if with_subjects else None
    inputs, tokens, boxes = inputs_of(unet, options)
    kwargs, weights = None, 0
    if adapter is not None:
        adapter.install(unet)
        kwargs = {"subjects": adapter.condition(tokens, boxes, num_images=options.pictures)}
        weights = sum(weight.nbytes for weight in adapter.parameters())
    for _ in range(2):
        unet(**inputs, cross_attention_kwargs=kwargs)
    if options.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"{peak / 2**20:.1f} {weights / 2**20:.1f}"


def timed(work: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call, the device's queue included."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize()
    return time.perf_counter() - start, time.process_time() - cpu


if __name__ == "__main__":
    main()
