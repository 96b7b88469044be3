"""Draws every picture of docs/inference.md with the embedded model: `make docs`. About three minutes on two cores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw

from data_pipeline.world import CATEGORIES, render_subject, sample_identity
from msdiffusion import MSDiffusion
from msdiffusion.backbone.backbone import quiet_loading
from msdiffusion.figures import draw_layout
from msdiffusion.places import DEFAULT_MODEL

FOLDER = Path(__file__).parent / "pictures"
SIDE, GAP, LABEL = 128, 6, 14
DOG, TEAPOT = FOLDER / "dog.png", FOLDER / "teapot.png"
LEFT, RIGHT = (0.0, 0.25, 0.5, 0.75), (0.5, 0.25, 1.0, 0.75)
PROMPT = "a dog and a teapot on the beach"
TWO: dict[str, Any] = {
    "images": [DOG, TEAPOT],
    "boxes": [LEFT, RIGHT],
    "prompt": PROMPT,
    "phrases": ["dog", "teapot"],
    "seed": 1,
    "progress": False,
}

Row = Sequence[tuple[str, Image.Image]]


def strip(row: Row) -> Image.Image:
    """Pictures side by side, enlarged to one height, each under its label."""
    pictures = [picture.convert("RGB") for _, picture in row]
    sizes = [(round(SIDE * picture.width / picture.height), SIDE) for picture in pictures]
    width = sum(size[0] + GAP for size in sizes) + GAP
    canvas = Image.new("RGB", (width, SIDE + LABEL + 2 * GAP), "white")
    left = GAP
    for (label, _), picture, size in zip(row, pictures, sizes, strict=True):
        ImageDraw.Draw(canvas).text((left, 2), label, fill="black")
        canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, LABEL + GAP))
        left += size[0] + GAP
    return canvas


def one(model: MSDiffusion, **changes: Any) -> Image.Image:
    """A picture of dog and teapot."""
    return model.generate(**{**TWO, **changes})[0]


def references() -> list[tuple[str, Image.Image]]:
    """The two references on white."""
    shown = []
    for path in (DOG, TEAPOT):
        cut_out = Image.open(path).convert("RGBA")
        shown.append((path.stem, Image.alpha_composite(Image.new("RGBA", cut_out.size, "white"), cut_out)))
    return shown


def boxes(model: MSDiffusion) -> Row:
    """The boxes of the page's first call, and others."""
    layouts = [[LEFT, RIGHT], [RIGHT, LEFT], [(0, 0.4, 0.6, 1), (0.6, 0, 1, 0.4)]]
    drawn = [(layout, one(model, boxes=layout)) for layout in layouts]
    return [
        *references(),
        *(("", draw_layout(picture, boxes=layout, phrases=TWO["phrases"])) for layout, picture in drawn),
    ]


def scale(model: MSDiffusion) -> Row:
    """Weight of all subjects, and of one."""
    drawn = [(f"scale {value:g}", one(model, scale=value)) for value in (0, 0.3, 0.6, 1.0)]
    return [*drawn, ("subject_scales 1, 0", one(model, subject_scales=[1, 0]))]


def views(model: MSDiffusion) -> Row:
    """One view of a subject, and three."""
    generator = np.random.default_rng(3)
    identity = sample_identity(generator, "held_out", CATEGORIES[0])
    sprites = [Image.fromarray(render_subject(identity, 96, pose=pose)) for pose in (0.1, 0.5, 0.9)]
    phrase = CATEGORIES[0]
    common = {"boxes": [(0.2, 0.2, 0.8, 0.8)], "prompt": f"a {phrase} on the grass", "phrases": [phrase]}
    shown = [
        (f"view {index}", Image.alpha_composite(Image.new("RGBA", sprite.size, "white"), sprite))
        for index, sprite in enumerate(sprites)
    ]
    return [
        *shown,
        ("view 0 alone", one(model, images=[sprites[0]], **common)),
        ("all three", one(model, images=[sprites], **common)),
    ]


def free(model: MSDiffusion) -> Row:
    """No layout at all, the layout that the text made, and one free subject beside one with a box."""
    request = {name: value for name, value in TWO.items() if name != "progress"}
    result = model.generate_batch([{**request, "boxes": None}], progress=False)[0]
    mixed = one(model, boxes=[LEFT, None])
    return [
        ("boxes=None", result.pictures[0]),
        ("its layout_maps", draw_layout(result.pictures[0], maps=result.layout_maps[0], phrases=TWO["phrases"])),
        ("boxes=None, scale 0", one(model, boxes=None, scale=0)),
        ("boxes=[box, None]", draw_layout(mixed, boxes=[LEFT, None], phrases=TWO["phrases"])),
    ]


def auto_layout(model: MSDiffusion) -> Row:
    """Boxes kept, and left after some steps."""
    request = {name: value for name, value in TWO.items() if name != "progress"}
    result = model.generate_batch([{**request, "auto_layout": True}], progress=False)[0]
    return [
        ("boxes", draw_layout(one(model), boxes=TWO["boxes"])),
        ("auto_layout=True", draw_layout(result.pictures[0], boxes=TWO["boxes"])),
        ("its layout_maps", draw_layout(result.pictures[0], maps=result.layout_maps[0], phrases=TWO["phrases"])),
        ("auto_layout_start=15", one(model, auto_layout=True, auto_layout_start=15)),
        ("threshold .3", one(model, auto_layout=True, auto_layout_threshold=0.3)),
    ]


def masks(model: MSDiffusion) -> Row:
    """A round region and one with a corner missing, in place of boxes."""
    rows, columns = np.mgrid[0:64, 0:64] / 64
    disc = (rows - 0.5) ** 2 + (columns - 0.25) ** 2 < 0.22**2
    corner = (columns > 0.5) & (rows > 0.2) & ~((columns > 0.75) & (rows < 0.5))
    picture = one(model, boxes=None, masks=[disc, corner])
    mixed = one(model, boxes=[None, RIGHT], masks=[disc, None])
    return [
        ("masks", draw_layout(Image.new("RGB", (64, 64), "white"), maps=np.stack([disc, corner]))),
        ("drawn in them", picture),
        ("", draw_layout(picture, maps=np.stack([disc, corner]) * 0.5)),
        ("mask, and box", draw_layout(mixed, boxes=[None, RIGHT])),
    ]


def windows(model: MSDiffusion) -> Row:
    """The teapot there for a part of the way."""
    spans = [(0.0, 1.0), (0.0, 0.25), (0.0, 0.5), (0.5, 1.0)]
    return [(f"teapot {start:g} to {end:g}", one(model, subject_windows=[None, (start, end)])) for start, end in spans]


def sizes(model: MSDiffusion) -> Row:
    """Wide and high pictures."""
    drawn = [(size, one(model, height=size[1], width=size[0])) for size in ((64, 64), (96, 64), (112, 48), (48, 80))]
    return [(f"{w} x {h}", draw_layout(picture, boxes=TWO["boxes"])) for (w, h), picture in drawn]


def many(model: MSDiffusion) -> Row:
    """Eight subjects at once."""
    generator = np.random.default_rng(7)
    names = list(CATEGORIES[:8])
    sprites = [
        Image.fromarray(render_subject(sample_identity(generator, "held_out", name), 96, pose=0.5)) for name in names
    ]
    layout = [(x, y, x + 0.25, y + 0.4) for y in (0.08, 0.54) for x in (0.0, 0.25, 0.5, 0.75)]
    prompt = ", ".join(f"a {name}" for name in names[:-1]) + f" and a {names[-1]} on the grass"
    common = {"images": sprites, "boxes": layout, "prompt": prompt, "phrases": names}
    sheet = Image.new("RGB", (4 * 96, 2 * 96), "white")
    for index, sprite in enumerate(sprites):
        sheet.paste(sprite, (index % 4 * 96, index // 4 * 96), sprite)
    picture = one(model, **common, height=64, width=128)
    return [("eight references", sheet), ("64 x 128", draw_layout(picture, boxes=layout))]


def batch(model: MSDiffusion) -> Row:
    """Four requests with one, two and no layouts in one batch of the denoiser."""
    requests = [
        {"images": [DOG], "boxes": [(0.2, 0.2, 0.8, 0.8)], "prompt": "a dog in the snow", "phrases": ["dog"]},
        {"images": [TEAPOT], "boxes": [(0.1, 0.3, 0.6, 0.8)], "prompt": "a teapot on the grass", "phrases": ["teapot"]},
        {name: value for name, value in TWO.items() if name not in ("progress", "seed")},
        {"images": [DOG], "boxes": None, "prompt": "a dog in the jungle", "phrases": ["dog"]},
    ]
    results = model.generate_batch([{**request, "seed": 5} for request in requests], progress=False)
    labels = ("dog, snow", "teapot, grass", "both, beach", "dog, jungle, no box")
    return [(label, result.pictures[0]) for label, result in zip(labels, results, strict=True)]


def image_to_image(model: MSDiffusion) -> Row:
    """A picture of something else, redrawn with the subjects."""
    start = one(model, scale=0, seed=4)
    pipeline = StableDiffusionXLImg2ImgPipeline(**model.pipeline.components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    condition = model.condition(TWO["images"], TWO["boxes"], TWO["phrases"])
    row = [("start", start)]
    for strength in (0.5, 0.7, 0.9):
        picture = pipeline(
            PROMPT,
            image=start,
            strength=strength,
            num_inference_steps=25,
            guidance_scale=3.0,
            negative_prompt="",
            generator=torch.Generator().manual_seed(0),
            cross_attention_kwargs={"subjects": condition},
        ).images[0]
        row.append((f"strength {strength:g}", picture))
    return row


def inpainting(model: MSDiffusion) -> Row:
    """The subject drawn into a part of a given picture.

    StableDiffusionXLInpaintPipeline takes latents of 4 channels, as SDXL's are; the embedded base has 12. So the rest
    of the picture is put back after each step here, which is what that pipeline does.
    """
    start = one(model, images=[TEAPOT], boxes=[RIGHT], phrases=["teapot"], prompt="a teapot on the beach")
    hole = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(hole).rectangle((2, 14, 30, 50), fill=255)
    pixels = torch.from_numpy(np.array(start)).permute(2, 0, 1)[None] / 127.5 - 1
    kept = model.backbone.encode_pictures(pixels)
    inside = torch.from_numpy(np.array(hole.resize(kept.shape[:1:-1]))) > 0
    noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))

    def put_back(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        later = pipeline.scheduler.timesteps[step + 1 : step + 2]
        around = pipeline.scheduler.add_noise(kept, noise, later) if len(later) else kept
        return {"latents": torch.where(inside, tensors["latents"], around)}

    common = {"images": [DOG], "boxes": [LEFT], "phrases": ["dog"], "callback_on_step_end": put_back}
    return [
        ("start", start),
        ("the hole", hole),
        ("with the dog", one(model, **common)),
        ("prompt alone", one(model, **common, scale=0)),
    ]


def schedulers(model: MSDiffusion) -> Row:
    """The same request with other samplers."""
    own, row = model.pipeline.scheduler, []
    kinds: list[tuple[Any, int, dict[str, Any]]] = [
        (DDIMScheduler, 25, {}),
        (EulerDiscreteScheduler, 25, {}),
        (EulerAncestralDiscreteScheduler, 25, {}),
        (DPMSolverMultistepScheduler, 10, {}),
        (UniPCMultistepScheduler, 8, {}),
    ]
    for kind, steps, options in kinds:
        model.pipeline.scheduler = kind.from_config(own.config, **options)
        row.append((f"{kind.__name__.removesuffix('Scheduler')[:14]} {steps}", one(model, steps=steps)))
    model.pipeline.scheduler = own
    return row


def pipeline_options(model: MSDiffusion) -> Row:
    """What goes through to the pipeline: weighted prompts, FreeU, a callback."""
    pipeline = model.pipeline
    plain, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPT, negative_prompt="", device="cpu")
    empty = pipeline.encode_prompt("", device="cpu", do_classifier_free_guidance=False)[0]
    row = [("plain", one(model))]
    for weight in (0.6, 1.4):
        weighted = {
            "prompt_embeds": empty + weight * (plain - empty),
            "negative_prompt_embeds": negative,
            "pooled_prompt_embeds": pooled,
            "negative_pooled_prompt_embeds": negative_pooled,
        }
        row.append((f"prompt x {weight:g}", one(model, **weighted)))
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    row.append(("FreeU", one(model)))
    pipeline.disable_freeu()
    seen: list[torch.Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step in (4, 12):
            seen.append(tensors["latents"].clone())
        return tensors

    one(model, callback_on_step_end=keep)
    return [
        *row,
        *((f"step {step}", model.backbone.decode_latents(x)[0]) for step, x in zip((4, 12), seen, strict=True)),
    ]


FEATURES: dict[str, Callable[[MSDiffusion], Row]] = {
    function.__name__: function
    for function in (
        *(boxes, scale, views, free, auto_layout, masks, windows, sizes, many, batch),
        *(image_to_image, inpainting, schedulers, pipeline_options),
    )
}


def main() -> None:
    """Write inference_FEATURE.png for every feature, or for those named on the command line."""
    quiet_loading()
    model = MSDiffusion.from_pretrained(DEFAULT_MODEL, device="cpu")
    for name in sys.argv[1:] or FEATURES:
        feature = FEATURES[name]
        path = FOLDER / f"inference_{name}.png"
        strip(feature(model)).save(path, optimize=True)
        print(path.name, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
