"""The command ``msdiffusion generate``: one request from flags, many from a file, or one again from a PNG."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.safe_text import visible
from msdiffusion.environment import DTYPES
from msdiffusion.errors import LayoutError, RequestError, check_place, shown
from msdiffusion.files import check_file, check_folder, place_of
from msdiffusion.places import DEFAULT_MODEL, find_model

if TYPE_CHECKING:
    from msdiffusion.generation.folder import Picture
    from msdiffusion.generation.identity import Identity
    from msdiffusion.generation.safety import Watermark
    from msdiffusion.request.request_file import Entry

PICTURE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
BATCH_SIZE = 4
NOTHING = "-"
"""Stands for "none" where a flag comes once per subject."""
PICTURE_FLAGS = (
    "image", "box", "mask", "phrase", "prompt", "negative_prompt", "num_images", "steps", "guidance_scale", "scale",
    "subject_scales", "subject_windows", "height", "width", "auto_layout", "auto_layout_threshold", "auto_layout_start",
    "seed",
)  # fmt: skip
"""Flags that say what is drawn; None where they are not given."""


class _View(argparse.Action):
    """Another picture of the subject of the last --image."""

    repeated = True

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if not namespace.image:
            parser.error("--view FILE is a further view of the subject before it: give its --image first")
        namespace.image[-1].append(values)


class _Image(argparse.Action):
    """The first picture of the next subject."""

    repeated = True

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        namespace.image = [*(namespace.image or []), [values]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.set_defaults(run=run)
    add = parser.add_argument_group("what is drawn; --image, --box and --phrase once per subject").add_argument
    add("--image", action=_Image, metavar="FILE", help="reference, RGB or RGBA")
    add("--view", action=_View, metavar="FILE", help="another picture of the subject of the --image before it")
    add("--box", action="append", metavar="X1,Y1,X2,Y2", help="fractions of the picture; - for a subject without")
    add("--mask", action="append", metavar="FILE", help="region in black and white; - for a subject without")
    add("--phrase", action="append", metavar="WORDS", help="default: the prompt's noun phrases")
    add("--prompt", metavar="TEXT", help="the scene; name every subject in it")
    add("--negative-prompt", metavar="TEXT", help="what to stay away from; default: the adapter's")
    add("--num-images", type=int, metavar="N", help="how many pictures, each with the next seed (default 1)")
    add("--steps", type=int, metavar="N", help="denoising steps; default: the adapter's, or 30")
    add("--guidance-scale", type=float, metavar="G",
        help="weight of prompt and subjects against the negative prompt; default: the adapter's, or 7.5")  # fmt: skip
    add("--scale", type=float, help="weight of all subjects against the text; default: the adapter's, or 1")
    add("--subject-scales", type=_numbers, metavar="S1,S2,...",
        help="one weight per subject, times --scale (default: 1 each)")  # fmt: skip
    add("--subject-windows", type=_windows, metavar="FROM:TO,...",
        help="per subject the part of the way from noise (0) to picture (1) in which it is there; - for always",
    )  # fmt: skip
    add("--height", type=int, help="pixels, a multiple of 8; default: the adapter's, or the base model's")
    add("--width", type=int, help="the same")
    add("--auto-layout", action="store_true", default=None, help="let the text's attention refine the boxes")
    add("--auto-layout-threshold", type=float, metavar="T",
        help="share of its highest attention that a place needs to belong to a subject, 0 to 1 (default 0.5)",
    )  # fmt: skip
    add("--auto-layout-start", type=int, metavar="STEP",
        help="first step, from 1, that follows the text (default 5; 2 for subjects without a box)")  # fmt: skip
    add("--seed", type=int, help="of the noise; default: a new one each time, which the PNG tells")
    add = parser.add_argument_group("in place of these").add_argument
    add("--request", type=place_of, metavar="FILE", help="many pictures: a YAML or JSON file, see docs/inference.md")
    add("--from-png", type=place_of, metavar="FILE", help="draw a PNG of this command again, exactly")
    add = parser.add_argument_group("what draws").add_argument
    add("--model", default=str(DEFAULT_MODEL), type=find_model, metavar="PLACE",
        help="adapter: folder, hub name, ms_adapter.bin, a run or checkpoint (default: embedded)")  # fmt: skip
    add("--base-model", type=find_model, metavar="PLACE",
        help="another base model of the same architecture; default: the adapter's")  # fmt: skip
    add("--base-config", metavar="PLACE", help="configs for a base model in one .safetensors file")
    add("--image-encoder", type=find_model, metavar="PLACE",
        help="another image encoder of the same widths; default: the adapter's")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    add("--dtype", choices=DTYPES, help="of the weights (default float32)")
    add("--batch-size", type=int, help=f"pictures drawn at once at most (default {BATCH_SIZE})")
    add("--safety-checker", metavar="PLACE", help="folder or hub name; pictures that it flags become black")
    add("--watermark", metavar="TEXT", help="invisible, at most 16 bytes")
    add = parser.add_argument_group("where to").add_argument
    add("--out", required=True, type=place_of, metavar="PLACE",
        help="file (several pictures get numbers: FILE_0, ...); with --request a folder")  # fmt: skip
    add("--overwrite", action="store_true", help="with --request: replace pictures of other requests")
    add("--embed-references", action="store_true", help="put the references into the PNG, to draw it again anywhere")
    add("--layout", action="store_true",
        help="beside each picture NAME that is drawn NAME_layout.png: boxes, phrases, auto layout's maps")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bar and no notes")


def run(options: argparse.Namespace) -> None:
    """Check, load, draw, write; prints the path of every picture that it writes.

    Raises:
        MSDiffusionError: something cannot be honoured; before any weights are loaded where that can be told.
    """
    many = options.request is not None
    _check_sources(options)
    _check_out(options, many)
    for name in ("model", "base_model", "base_config", "image_encoder", "safety_checker"):
        check_place(getattr(options, name), "--" + name.replace("_", "-"), inside=name == "image_encoder")
    entries, record = _entries(options)
    watermark = _watermark(options, record)
    _note(options, "loading the libraries that draw")

    from msdiffusion.backbone.backbone import usable_device
    from msdiffusion.generation import folder as batch
    from msdiffusion.generation.identity import frozen_name, identify, made_with

    device = str(usable_device(options.device))
    dtype = options.dtype or (record["model"]["dtype"] if record else "float32")
    identity = identify(
        options.model, options.base_model, options.image_encoder, dtype, base_config=options.base_config
    )
    hooks = {
        "safety_checker": None if options.safety_checker is None else frozen_name(options.safety_checker),
        "watermark": watermark.text if watermark else None,
    }
    if record is not None:
        _check_model(record, identity, hooks)
        _tell_differences(record["made_with"], made_with(device), dtype)
    folder = options.out if many else options.out.parent
    suffix = ".png" if many else options.out.suffix
    pictures = batch.plan(entries, folder, identity, hooks, suffix=suffix, embed=options.embed_references)
    if many:
        pictures = batch.without_finished(pictures, overwrite=options.overwrite)
        finished = sum(not picture.wanted for picture in pictures)
        if finished:
            _note(options, f"{finished} of {len(pictures)} pictures are there already")
        if finished == len(pictures):
            return
    if options.layout:
        batch.check_layout_paths(pictures)
    _check_pictures([picture for picture in pictures if picture.wanted], identity, watermark, options.layout)
    batches = batch.in_batches(pictures, BATCH_SIZE if options.batch_size is None else options.batch_size)
    if record is not None and options.batch_size is None:
        batches = [batch.repeated(pictures[0], **record["batch"])]
    batch.check_batches(batches)
    _draw(options, device, dtype, batches, watermark)


def _draw(
    options: argparse.Namespace, device: str, dtype: str, batches: list[list[Picture]], watermark: Watermark | None
) -> None:
    import torch
    from tqdm import tqdm

    from msdiffusion.backbone.backbone import quiet_loading
    from msdiffusion.generation import folder as batch
    from msdiffusion.generation.generate import MSDiffusion

    quiet_loading()
    checker = None
    if options.safety_checker is not None:
        from msdiffusion.generation.safety import SafetyChecker

        checker = SafetyChecker.from_pretrained(options.safety_checker, device)
    model = MSDiffusion.from_pretrained(
        options.model,
        base_model=options.base_model,
        image_encoder=options.image_encoder,
        base_config=options.base_config,
        torch_dtype=getattr(torch, dtype),
        device=device,
    )
    model.picture_hooks.extend(hook for hook in (checker, watermark) if hook is not None)
    many = options.request is not None
    total = sum(len(pictures) for pictures in batches if any(picture.wanted for picture in pictures))
    # One bar over everything, whose estimate counts; of one request the steps are more telling. Pictures come in
    # batches: the average since the beginning says more of what is left than the last ones.
    with tqdm(total=total, unit="picture", smoothing=0, disable=options.quiet or not many) as bar:

        def tell(picture: Picture) -> None:
            bar.update()
            if picture.wanted:
                with tqdm.external_write_mode():
                    print(visible(picture.path), flush=True)

        flagged = batch.draw(model, batches, tell, progress=not options.quiet and not many, layouts=options.layout)
    if flagged:
        print(visible(f"flagged by the safety checker, so black: {', '.join(map(str, flagged))}"), file=sys.stderr)


def _check_sources(options: argparse.Namespace) -> None:
    """Raise RequestError unless it is said once what is drawn."""
    given = ["--" + name.replace("_", "-") for name in PICTURE_FLAGS if getattr(options, name) is not None]
    sources = [name for name in ("--request", "--from-png") if getattr(options, name[2:].replace("-", "_")) is not None]
    if len(sources) > 1 or (sources and given):
        also = ", ".join([*sources[1:], *given])
        raise RequestError(f"{sources[0]} says all of what is drawn: leave out {also}")
    if options.batch_size is not None:
        from msdiffusion.request.request import MAX_BATCH
        from msdiffusion.request.subjects import whole_number

        whole_number(options.batch_size, "--batch-size", 1, MAX_BATCH)
    if not sources and options.prompt is None:
        raise RequestError("--prompt is missing (or give --request or --from-png)")
    if not sources and options.image is None:
        raise RequestError("no images: give --image once per subject")


def _entries(options: argparse.Namespace) -> tuple[list[Entry], dict[str, Any] | None]:
    """The requests, and for --from-png the record that the one comes from. Loads no torch."""
    if options.request is not None:
        from msdiffusion.request.request_file import read_request_file

        return read_request_file(options.request), None
    if options.from_png is not None:
        from msdiffusion.request.provenance import entry_of, read_record

        record = read_record(options.from_png)
        _check_png_size(record, options)
        return [replace(entry_of(options.from_png, record), name=options.out.stem)], record
    return [_entry_of_flags(options)], None


def _check_png_size(record: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Raise RequestError where a PNG, which may be a stranger's, asks for more pixels at once than are drawn."""
    from msdiffusion.request.request import check_size

    request, pictures = record["request"], record["batch"]["size"] if options.batch_size is None else 1
    if type(request["height"]) is int and type(request["width"]) is int:
        check_size(request["height"], request["width"], pictures)


def _entry_of_flags(options: argparse.Namespace) -> Entry:
    from msdiffusion.request.request_file import check_entry

    if options.phrase is None:
        _note(options, "reading the phrases of the prompt")
    flags = {name: getattr(options, name) for name in PICTURE_FLAGS}
    images = [views if len(views) > 1 else views[0] for views in flags.pop("image")]
    boxes, masks, phrases = flags.pop("box"), flags.pop("mask"), flags.pop("phrase")
    arguments = {
        **flags,
        "images": images,
        "boxes": None if boxes is None else [None if text == NOTHING else _box(text) for text in boxes],
        "masks": None if masks is None else [None if text == NOTHING else text for text in masks],
        "phrases": phrases,
    }
    entry = check_entry(arguments, Path(), "the request", options.out.stem)
    if phrases is None:
        drawn = ", ".join(
            f"{views[0]} = {phrase}" for views, phrase in zip(options.image, entry.arguments["phrases"], strict=True)
        )
        _note(options, f"phrases from the prompt: {drawn}; --phrase sets them")
    if boxes is None and masks is None:
        _note(options, "no --box and no --mask: every subject finds its place by the text's attention to its phrase")
    return entry


def _check_out(options: argparse.Namespace, many: bool) -> None:
    out = options.out
    if many:
        check_folder(out, "--out")
        return
    if out.suffix.lower() not in PICTURE_TYPES:
        raise RequestError(f"--out must end in one of {', '.join(PICTURE_TYPES)}, got {shown(str(out), 300)}")
    check_file(out, "--out")
    if out.suffix.lower() != ".png":
        if options.embed_references:
            raise RequestError(f"--embed-references needs a PNG; --out is {out}")
        _note(options, f"{out.suffix} keeps no metadata: only a .png can be drawn again with --from-png")


def _note(options: argparse.Namespace, text: str) -> None:
    """Tell what is good to know and nothing to worry about."""
    if not options.quiet:
        print(visible(text), file=sys.stderr, flush=True)


def _watermark(options: argparse.Namespace, record: dict[str, Any] | None) -> Watermark | None:
    """The watermark asked for, or that of the PNG."""
    text = options.watermark
    if text is None and record is not None:
        text = record["hooks"]["watermark"]
    if text is None:
        return None
    from msdiffusion.generation.safety import Watermark

    return Watermark(text)


def _check_pictures(
    pictures: Sequence[Picture], identity: Identity, watermark: Watermark | None, layouts: bool
) -> None:
    """Refuse what would only fail after drawing, or destroy a reference: pictures that cannot be written, would be
    written over what they are drawn from, or cannot carry the watermark.
    """
    from msdiffusion.backbone.configs import native_side
    from msdiffusion.generation import folder as batch

    if watermark is not None:
        side = native_side(identity.sources.base_model, identity.sources.base_config)
        batch.check_sizes(pictures, [watermark], side)
    written = {picture.path.resolve() for picture in pictures}
    if layouts:
        written |= {batch.layout_path(picture.path).resolve() for picture in pictures}
    for path in {path for picture in pictures for path in batch.references(picture)}:
        if path.resolve() in written:
            raise RequestError(f"{path} is what is drawn from, and would be written over: give another --out")
    longest = max((picture.path for picture in pictures), key=lambda path: len(os.fsencode(path.name)))
    check_file(batch.layout_path(longest) if layouts else longest, "--out")


def _check_model(record: dict[str, Any], identity: Identity, hooks: dict[str, str | None]) -> None:
    """Refuse to draw a PNG again with other means than it was drawn with."""
    flags = {
        "adapter_sha256": "model", "adapter_config": "model", "base_model": "base-model",
        "base_config": "base-config", "image_encoder": "image-encoder", "dtype": "dtype",
    }  # fmt: skip
    for name, flag in flags.items():
        drawn, here = record["model"][name], identity.model[name]
        if drawn != here:
            called = f" (its adapter was called {record['model']['adapter']!r})" if flag == "model" else ""
            raise RequestError(f"the PNG was drawn with {name} {drawn!r}, not {here!r}{called}: --{flag} sets it")
    default = identity.defaults.get("negative_prompt")
    if record["request"]["negative_prompt"] is None and default is not None:
        raise RequestError(
            f"the PNG was drawn without a negative prompt, but the adapter's config has {shown(default)} as default "
            "now: take it out of the defaults of its config.json"
        )
    for name, value in hooks.items():
        drawn = record["hooks"][name]
        if drawn != value:
            flag = "--" + name.replace("_", "-")
            asked = f"{flag} {drawn!r}, not {value!r}"
            raise RequestError(f"the PNG was drawn with {asked}: give the same, or none if None")


def _tell_differences(there: dict[str, str], here: dict[str, str], dtype: str) -> None:
    """Say so where a picture may not come out as in the file, to the bit."""
    other = [
        f"{name} {shown(there[name]) if name in there else 'unknown'} (here {here[name]!r})"
        for name in here
        if there.get(name) != here[name]
    ]
    if not other:
        return
    same = all(there[name] == here[name] for name in ("msdiffusion", "torch", "diffusers", "device"))
    # the only difference that was measured (docs/exactness.md)
    measured = same and "processor" in there and here["device"] == "cpu" and dtype == "float32"
    much = " by one step of 255" if measured else ""
    print(f"drawn with {', '.join(other)}: pixels may differ{much}", file=sys.stderr)


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


def _windows(text: str) -> list[list[float] | None]:
    try:
        return [None if part == NOTHING else [float(number) for number in part.split(":")] for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be FROM:TO or {NOTHING} per subject, with commas between them, such as 0:1,0.2:0.8"
        ) from None
