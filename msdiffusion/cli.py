"""The ``msdiffusion`` command: generate, evaluate, bench, demo, convert. Heavy libraries load after the checks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msdiffusion import __version__, demo, evaluate
from msdiffusion.bench import command as bench
from msdiffusion.errors import LayoutError, MSDiffusionError, RequestError
from msdiffusion.places import DEFAULT_MODEL

if TYPE_CHECKING:
    from PIL import Image

    from msdiffusion.request import GenerationRequest

PICTURE_TYPES = (".png", ".jpg", ".jpeg", ".webp")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(_bind_negative(arguments))
    # Threads of OpenMP that spin while they wait make everything many times slower as soon as another process wants
    # the cores (docs/training.md). Read when torch is imported, so it must be set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        options.run(options)
    except MSDiffusionError as error:
        print(f"msdiffusion: error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="msdiffusion", description=__doc__.split(". ")[0])
    parser.add_argument("--version", action="version", version=f"msdiffusion {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_convert(commands)
    for name, module, summary in (
        ("evaluate", evaluate, "draw held-out subjects with the adapter on and off, and score both"),
        ("bench", bench, "compare methods on the procedural world, and explore where this one fails"),
        ("demo", demo, "mine, fine-tune, generate and score on fresh clips"),
    ):
        module.add_arguments(commands.add_parser(name, help=summary, description=module.__doc__.split("\n\n")[0]))
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    add = commands.add_parser(
        "generate",
        help="draw pictures of your subjects, each in its box",
        description="Give --image, --box and --phrase once per subject, in the same order.",
    )
    add.add_argument("--model", default=str(DEFAULT_MODEL), help="adapter: folder, hub name, or ms_adapter.bin")
    add.add_argument("--base-model", help="another SDXL pipeline of the same architecture")
    add.add_argument("--image-encoder", help="another image encoder of the same architecture")
    add.add_argument("--image", action="append", default=[], metavar="FILE", help="reference, RGB or RGBA")
    add.add_argument("--box", action="append", default=[], metavar="X1,Y1,X2,Y2", help="fractions of the picture")
    add.add_argument("--phrase", action="append", metavar="WORDS", help="default: the prompt's noun phrases")
    add.add_argument("--prompt", required=True)
    add.add_argument("--negative-prompt")
    add.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="several pictures get numbers: FILE_0, ..."
    )
    add.add_argument("--num-images", type=int, default=1)
    add.add_argument("--steps", type=int)
    add.add_argument("--guidance-scale", type=float)
    add.add_argument("--scale", type=float, help="weight of all subjects against the text")
    add.add_argument("--subject-scales", type=_numbers, metavar="S1,S2,...", help="one weight per subject")
    add.add_argument("--height", type=int)
    add.add_argument("--width", type=int)
    add.add_argument("--auto-layout", action="store_true", help="let the text's attention refine the boxes")
    add.add_argument("--auto-layout-threshold", type=float, default=0.5)
    add.add_argument("--auto-layout-start", type=int, default=5, metavar="STEP")
    add.add_argument("--seed", type=int)
    add.add_argument("--batch-size", type=int, default=4, help="pictures drawn at once at most")
    add.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    add.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add.add_argument("--quiet", action="store_true", help="no progress bar")
    add.set_defaults(run=_generate)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    add = commands.add_parser("convert", help="turn the official ms_adapter.bin into an adapter folder")
    add.add_argument("file", help="ms_adapter.bin")
    add.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    add.add_argument("--base-model", help="the SDXL pipeline it was trained on; only configs are read")
    add.add_argument("--image-encoder", help="the image encoder it was trained on; only configs are read")
    add.add_argument("--head-width", type=int, default=64, help="of the resampler; the file does not tell (default 64)")
    add.set_defaults(run=_convert)


def _generate(options: argparse.Namespace) -> None:
    request = _request(options)
    if options.out.suffix.lower() not in PICTURE_TYPES:
        raise RequestError(f"--out must end in one of {', '.join(PICTURE_TYPES)}, got {options.out}")
    if options.phrase is None:
        drawn = ", ".join(f"{image} = {phrase}" for image, phrase in zip(options.image, request.phrases, strict=True))
        print(f"phrases from the prompt: {drawn}; --phrase sets them", file=sys.stderr)
    import torch

    from msdiffusion.backbone import quiet_loading
    from msdiffusion.generate import MSDiffusion

    _check_device(options.device)
    quiet_loading()
    model = MSDiffusion.from_pretrained(
        options.model,
        base_model=options.base_model,
        image_encoder=options.image_encoder,
        torch_dtype=getattr(torch, options.dtype),
        device=options.device,
    )
    pictures = model.run(request, progress=not options.quiet)
    for path in _save(pictures, options.out):
        print(path)


def _check_device(device: str | None) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"--device {device} can't be used here ({reason}); cpu always can") from error


def _request(options: argparse.Namespace) -> GenerationRequest:
    from msdiffusion.request import check_request

    return check_request(
        options.image,
        [_box(text) for text in options.box],
        options.prompt,
        options.phrase,
        negative_prompt=options.negative_prompt,
        num_images=options.num_images,
        steps=options.steps,
        guidance_scale=options.guidance_scale,
        scale=options.scale,
        subject_scales=options.subject_scales,
        height=options.height,
        width=options.width,
        auto_layout=options.auto_layout,
        auto_layout_threshold=options.auto_layout_threshold,
        auto_layout_start=options.auto_layout_start,
        seed=options.seed,
        batch_size=options.batch_size,
    )


def _convert(options: argparse.Namespace) -> None:
    from msdiffusion.loading import load_adapter

    adapter, _, _ = load_adapter(options.file, options.base_model, options.image_encoder, head_width=options.head_width)
    adapter.save_pretrained(options.out)
    print(options.out)


def _save(pictures: Sequence[Image.Image], out: Path) -> list[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    numbered = [out.with_stem(f"{out.stem}_{index}") for index in range(len(pictures))]
    paths = [out] if len(pictures) == 1 else numbered
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path, quality=95)  # of formats that lose something
    return paths


def _box(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise LayoutError(f"--box is {text!r}, but must be four numbers: x1,y1,x2,y2 in fractions") from None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers with commas between them") from None


def _bind_negative(arguments: list[str]) -> list[str]:
    """Join "--box -0.1,0,1,1" with "=": argparse would take the value for an option, and hide the real mistake."""
    bound: list[str] = []
    for argument in arguments:
        if (
            bound
            and bound[-1] in ("--box", "--subject-scales")
            and argument[:1] == "-"
            and argument[1:2] in set("0123456789.")
        ):
            bound[-1] += "=" + argument
        else:
            bound.append(argument)
    return bound


if __name__ == "__main__":
    sys.exit(main())
