"""Cut-outs of things in photographs, by SAM: ``msdiffusion cutout PHOTO... --out DIR`` runs this."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from data_pipeline.command_line import Parser, check_device_name, path_of
from data_pipeline.errors import ClipError, InputError, MiningError, MissingModelError, SettingsError
from data_pipeline.extras import need_extras
from data_pipeline.journal import atomic_file
from data_pipeline.outputs import check_folder
from data_pipeline.places import SEGMENTER_SIZES, SEGMENTER_WEIGHTS
from data_pipeline.records import LEAST_MASK_SCORE, Box, Detection, Entity, Frame, box_in_pixels, mask_box
from data_pipeline.records import cut_out as cut_out_of_box
from data_pipeline.safe_text import visible

if TYPE_CHECKING:
    from data_pipeline.models.segmenter import Segmenter

MIDDLE: Box = (0.1, 0.1, 0.9, 0.9)
MODELS = {"mobile-sam": "vit_t", "sam": "vit_b"}
MAX_PIXELS = 100_000_000
SPILL = 0.05
"""Part of the box's sides by which a mask may reach over it: boxes are drawn by hand."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="msdiffusion cutout",
        description="Cuts one thing out of each photograph: DIR/PHOTO.png with transparency, a reference for "
        "msdiffusion generate. Nothing is overwritten.",
    )
    add = parser.add_argument
    add("photos", nargs="+", type=path_of, metavar="PHOTO", help="JPEG, PNG, WebP, BMP or TIFF, opaque, 8 bits")
    add("--out", type=path_of, required=True, metavar="DIR", help="made if it is missing")
    add(
        "--box",
        action="append",
        metavar="X1,Y1,X2,Y2",
        help="where the thing is, in fractions of the photo; once for all photos, or once per photo in their order "
        f"(default: the middle, {','.join(map(str, MIDDLE))})",
    )
    add(
        "--segmenter",
        choices=(*MODELS, "embedded"),
        default="mobile-sam",
        help="mobile-sam (41 MB, downloaded at the first run; default), sam (375 MB, finer edges), or embedded (comes "
        "with the repository, for pictures of the procedural world only)",
    )
    add(
        "--segmenter-checkpoint",
        type=path_of,
        metavar="FILE",
        help="its weights, where they lie on this machine already",
    )
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    return parser


def cut_out(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The thing alone, cropped to its mask.

    pixels: uint8 (height, width, 3). mask: bool (height, width), not empty. Returns uint8 (rows, columns, 4): straight
    alpha, 255 on the mask; all channels 0 beside it.
    """
    return cut_out_of_box(pixels, mask, mask_box(mask))


def boxes_of(texts: Sequence[str] | None, count: int) -> list[Box]:
    """A box per photo, in fractions; SettingsError for what is none, or for another number of them."""
    if texts is None:
        return [MIDDLE] * count
    if len(texts) not in (1, count):
        raise SettingsError(
            f"--box once for all photos, or once for each of the {count}; it was given {len(texts)} times"
        )
    boxes = [_box(text) for text in texts]
    return boxes * count if len(boxes) == 1 else boxes


def _box(text: str) -> Box:
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--box is {text!r}, but must be four numbers: x1,y1,x2,y2 in fractions") from None
    if not all(map(math.isfinite, (x1, y1, x2, y2))) or not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        pixels = "; these are pixels: divide them by width and height" if max(x1, y1, x2, y2) > 2 else ""
        raise SettingsError(f"--box {text}: needed are fractions with 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1{pixels}")
    return x1, y1, x2, y2


def places_of(photos: Sequence[Path], out: Path) -> list[Path]:
    """Where each cut-out is written; InputError for a photo that is not there, and for a place that is taken."""
    check_folder(out)
    taken: dict[str, Path] = {}
    for photo in photos:
        if not photo.is_file():
            kind = "a folder: give the photos in it" if photo.is_dir() else "no such photo"
            raise InputError(f"{photo}: {kind}")
        place = out / f"{photo.stem}.png"
        if place.exists():
            raise InputError(f"{place} is there already, and nothing is overwritten: give another --out")
        if other := taken.get(place.name.casefold()):
            raise InputError(f"{other} and {photo} would both become {place}: cut them out into two folders")
        taken[place.name.casefold()] = photo
    return [out / f"{photo.stem}.png" for photo in photos]


def load_segmenter(name: str, checkpoint: Path | None, device: str) -> Segmenter:
    """The network; without a checkpoint the released weights. InputError, MissingModelError: not to be had."""
    if name == "embedded":
        model, checkpoint = str(SEGMENTER_SIZES), checkpoint or SEGMENTER_WEIGHTS
    else:
        model = MODELS[name]
    from data_pipeline.models import hub
    from data_pipeline.models.sam import SamSegmenter, load_sam

    if checkpoint is None:
        released = hub.SEGMENTERS[model]
        try:
            hub.fetch([released], _tell)
        except MissingModelError as error:
            raise MissingModelError(f"{error}\n(a file that is here already: --segmenter-checkpoint FILE)") from error
        checkpoint = hub.place_of(released)
    if name == "mobile-sam":
        from data_pipeline.models.mobile_sam import load_mobile_sam

        return SamSegmenter(load_mobile_sam(model, checkpoint, device), 1)
    return SamSegmenter(load_sam(model, checkpoint, device), 1)


def reach(box: Box, shape: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns that a mask may have: the box, and SPILL of its sides beyond. shape: (height, width) first."""
    width, height = box[2] - box[0], box[3] - box[1]
    wide = (
        max(0.0, box[0] - SPILL * width),
        max(0.0, box[1] - SPILL * height),
        min(1.0, box[2] + SPILL * width),
        min(1.0, box[3] + SPILL * height),
    )
    x1, y1, x2, y2 = box_in_pixels(wide, shape[1], shape[0])
    return slice(y1, y2), slice(x1, x2)


def is_cut(mask: np.ndarray, box: Box) -> bool:
    """Whether a mask, bool (height, width), runs along what it may reach: along a fifth of a side inside the photo, or
    along most of two sides of the photo. Then it is the background, or a thing that goes on beyond the box.
    """
    rows, columns = part = reach(box, mask.shape)
    inside = mask[part]
    sides = [inside[0].mean(), inside[-1].mean(), inside[:, 0].mean(), inside[:, -1].mean()]
    of_photo = [rows.start == 0, rows.stop == mask.shape[0], columns.start == 0, columns.stop == mask.shape[1]]
    return sum(sides) > 1.5 or any(side > 0.2 for side, edge in zip(sides, of_photo, strict=True) if not edge)


def find_mask(segmenter: Segmenter, pixels: np.ndarray, box: Box) -> tuple[np.ndarray, float]:
    """Mask of the thing in a box, bool (height, width), and how good the network thinks that it is, in [0, 1].

    What lies further outside the box than a hand may err is left out. ClipError if nothing is left.
    """
    entity = Entity(phrase="thing", head="thing", mention="thing", position=0)
    thing = Detection(entity=entity, box=box, score=1.0)
    [[found]] = segmenter.segment([(Frame(index=0, time=0.0, image=pixels), (thing,))])
    part = reach(box, pixels.shape)
    mask = np.zeros(pixels.shape[:2], bool)
    mask[part] = found.mask[part]
    if not mask.any():
        raise ClipError("nothing found in the box", box=[round(value, 3) for value in box], choose="--box")
    return mask, float(found.mask_score)


def run(arguments: argparse.Namespace) -> None:
    """Does what the command line says. MiningError for wrong input; photos that were cut out before stay."""
    from data_pipeline.importers.pictures import TRANSPARENT, open_picture

    boxes = boxes_of(arguments.box, len(arguments.photos))
    places = places_of(arguments.photos, arguments.out)
    check_device_name(arguments.device)
    if arguments.segmenter_checkpoint is not None and not arguments.segmenter_checkpoint.is_file():
        raise InputError(f"--segmenter-checkpoint: no file at {arguments.segmenter_checkpoint}")
    for photo in arguments.photos:  # all, before the first is cut out
        try:
            open_picture(photo, str(photo), MAX_PIXELS, "apply")
        except ClipError as error:
            if error.reason != TRANSPARENT:
                raise
            raise InputError(f"{photo} has transparent parts, so it is cut out already: use it as it is") from error
    _tell(f"loading {arguments.segmenter}")
    segmenter = load_segmenter(arguments.segmenter, arguments.segmenter_checkpoint, arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for photo, place, box in zip(arguments.photos, places, boxes, strict=True):
        pixels = open_picture(photo, str(photo), MAX_PIXELS, "apply").pixels
        try:
            mask, score = find_mask(segmenter, pixels, box)
        except ClipError as error:
            raise ClipError(error.reason, picture=str(photo), **error.evidence) from error
        with atomic_file(place) as file:
            Image.fromarray(cut_out(pixels, mask)).save(file, "PNG")
        _tell(f"{photo}: {mask.mean():.0%} of the photo, the network's own score {score:.2f}")
        if score < LEAST_MASK_SCORE:
            _tell(
                f"note: {place} may be something else, so low a score has it: look at it, and give --box X1,Y1,X2,Y2 "
                "close round the thing if it is"
            )
        if is_cut(mask, box):
            _tell(
                f"note: in {place} the mask runs along the box's edge: it is the background, or the thing is cut off; "
                "look at it, and give --box X1,Y1,X2,Y2 round the whole thing"
            )
        print(visible(place), flush=True)  # noqa: T201


def _tell(line: str) -> None:
    print(visible(line), file=sys.stderr, flush=True)  # noqa: T201


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 wrong input."""
    arguments = make_parser().parse_args(argv)
    try:
        need_extras("mining")
        run(arguments)
    except ClipError as error:
        _tell(f"msdiffusion cutout: error: {error.told}")
        return 2
    except MiningError as error:
        _tell(f"msdiffusion cutout: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
