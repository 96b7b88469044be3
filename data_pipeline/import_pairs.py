"""The command: ``python -m data_pipeline.import_pairs --from official ITEMS --images DIR --out DIR``, or
``--from images DIR --out DIR``. What it reads is specified in docs/importing_pairs.md, what it writes in
docs/data_format.md.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline import __version__
from data_pipeline.assemble import already_made, assemble, beginning, finish, outcome, settings_hash
from data_pipeline.command_line import HelpFormatter, Parser, check_pool, default_workers, finite, path_of
from data_pipeline.errors import InputError, MiningError, SettingsError
from data_pipeline.extras import need_extras
from data_pipeline.file_names import Places
from data_pipeline.importers.images import find_metadata, list_pictures, read_images
from data_pipeline.importers.items import Broken, ImportItem, ItemFile, Spool
from data_pipeline.importers.official import check_items_file, read_official
from data_pipeline.importers.pictures import EXIF
from data_pipeline.importers.steps import CutSubjects, OpenPictures, ReadItems, WritePairs
from data_pipeline.journal import Journal, atomic_file
from data_pipeline.outputs import check_folder
from data_pipeline.run import run
from data_pipeline.safe_text import visible
from data_pipeline.step import Step

IMPORTERS = ("official", "images")
BOXES = ("pixels", "normalised")
ONLY_FOR = {
    "official": {"images": "--images", "allow_absolute": "--allow-absolute"},
    "images": {"metadata": "--metadata", "annotations": "--annotations"},
}
"""Options that belong to one importer."""
SPOOL = "items.jsonl"
NOTES = {
    "single_frame": "samples are single frames: a reference is cut out of the target itself, which teaches to copy",
    "subjects_without_mask": "subjects came without a mask: their cut-outs are whole boxes, background included",
    "phrases_not_in_caption": "subjects have a phrase that is not in their caption: auto layout and the layout loss "
    "cannot use it",
    "boxes_cut": "boxes reached over the edge of their picture by up to a pixel, and were cut there",
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m data_pipeline.import_pairs",
        description="Brings pairs of others into the format that training reads (docs/importing_pairs.md).",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--from",
        dest="importer",
        choices=IMPORTERS,
        required=True,
        help="official: items in the layout of the official MS-Diffusion dataset class; images: a folder of pictures "
        "with captions and boxes",
    )
    add("source", type=path_of, metavar="ITEMS_OR_DIR", help="official: .json, .jsonl or .parquet; images: the folder")
    add(
        "--out",
        type=path_of,
        required=True,
        metavar="DIR",
        help="where the dataset goes; a rerun finishes what is there",
    )
    add("--images", type=path_of, metavar="DIR", help="official: the folder that the items' paths are below")
    add(
        "--metadata",
        type=path_of,
        metavar="FILE",
        help="images: jsonl or csv with file_name, text, boxes, phrases; default: metadata.jsonl or .csv in the folder",
    )
    add("--annotations", type=path_of, metavar="FILE", help="images: a COCO file with boxes and masks")
    add("--boxes", choices=BOXES, default="pixels", help="what numbers the boxes are, xyxy in both cases")
    add(
        "--mask-threshold",
        type=int,
        metavar="VALUE",
        help="masks: values from this one on are the subject; default: only 0 and 1, or 0 and 255, are understood",
    )
    add("--exif", choices=EXIF, default="refuse", help="pictures that ask to be turned: boxes are of the upright "
        "picture (apply), or of the stored one (ignore)")  # fmt: skip
    add("--require-phrases", action="store_true", help="reject items with a phrase that is not in the caption")
    add("--allow-absolute", action="store_true", help="official: follow absolute paths, and links out of --images")
    add("--max-pixels", type=int, default=64_000_000, help="of a picture; larger ones are rejected unopened")
    add("--pairs-per-shard", type=int, default=1000, help="samples in one tar file")
    add("--jpeg-quality", type=int, default=95, help="of the target pictures, 1 to 100")
    add("--workers", type=int, default=default_workers(), help="processes; 0 works in this one")
    add("--item-timeout", type=finite, default=120.0, metavar="SECONDS", help="an item that takes longer is rejected")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """SettingsError or InputError for what is wrong before anything is read."""
    other = next(name for name in IMPORTERS if name != arguments.importer)
    for name, flag in ONLY_FOR[other].items():
        if getattr(arguments, name):
            raise SettingsError(f"{flag} belongs to --from {other}, not to --from {arguments.importer}")
    if not (arguments.out / "build.json").is_file():  # of a finished dataset nothing is written
        check_folder(arguments.out)
    check_pool(arguments.workers, arguments.item_timeout, "--item-timeout")
    if arguments.mask_threshold is not None and arguments.mask_threshold < 1:
        raise SettingsError(f"--mask-threshold must be at least 1, got {arguments.mask_threshold}")
    if arguments.importer == "official":
        check_items_file(arguments.source)
        if arguments.images is None:
            raise SettingsError("--from official needs --images DIR: the folder that the paths of the items are below")
        if not arguments.images.is_dir():
            raise InputError(f"no folder of pictures at {arguments.images}")
        return
    list_pictures(arguments.source)
    arguments.images = arguments.source
    arguments.metadata = find_metadata(arguments.source, arguments.metadata)
    if arguments.annotations is not None and not arguments.annotations.is_file():
        raise InputError(f"--annotations: no file at {arguments.annotations}")
    if arguments.boxes == "normalised" and arguments.metadata is None:
        raise SettingsError("--boxes normalised is for boxes in a metadata table; sidecars and COCO files hold pixels")


def make_steps(arguments: argparse.Namespace) -> list[Step]:
    """The steps of the import, in order. SettingsError if a setting is out of range."""
    own = arguments
    return [
        ReadItems(importer=own.importer, boxes=own.boxes, require_phrases=own.require_phrases),
        OpenPictures(
            images=own.images, allow_absolute=own.allow_absolute, max_pixels=own.max_pixels, exif=own.exif
        ),
        CutSubjects(images=own.images, allow_absolute=own.allow_absolute, mask_threshold=own.mask_threshold),
        WritePairs(importer=own.importer, pairs_per_shard=own.pairs_per_shard, jpeg_quality=own.jpeg_quality),
    ]  # fmt: skip


def find_items(arguments: argparse.Namespace, path: Path, quiet: bool, keep: bool = True) -> list[ItemFile]:
    """Every item of the source; with ``keep`` they are written to the file ``path``, from which the workers take them.

    InputError if there is none, or if what they say cannot be meant (see ``check_items``).
    """
    from tqdm import tqdm

    normalised = arguments.boxes == "normalised"
    notes: list[str] = []
    if arguments.importer == "official":
        items: Iterable[ImportItem | Broken] = read_official(arguments.source, normalised, notes)
    else:
        items = read_images(arguments.source, arguments.metadata, arguments.annotations, normalised, notes)
    with atomic_file(path) if keep else nullcontext(None) as file:
        spool = Spool(arguments.images, path, file, arguments.allow_absolute)
        for item in tqdm(
            _readable(items, arguments.source), desc="reading items", unit="item", disable=quiet, mininterval=0.5
        ):
            spool.add(item)
    for note in notes:
        print(visible(f"note: {note}"), file=sys.stderr)  # noqa: T201
    files = spool.files()
    check_items(arguments, spool, files)
    return files


def _readable(items: Iterable[ImportItem | Broken], source: Path) -> Iterator[ImportItem | Broken]:
    try:
        yield from items
    except OSError as error:
        raise InputError(f"cannot read {source}: {error}") from error


def check_items(arguments: argparse.Namespace, spool: Spool, files: Sequence[ItemFile]) -> None:
    """InputError for what is wrong with all items alike, so that it is told in a second and not after hours."""
    if not files:
        raise InputError(f"no items in {arguments.source}")
    if spool.wanted and not spool.pictures:
        near = Places(list_pictures(arguments.images), arguments.images).near(spool.missing)
        raise InputError(
            f"none of the {spool.wanted} target pictures is in {arguments.images}, the first one is {spool.missing!r}: "
            f"paths of items are below that folder{near}"
        )
    pixels = {unit: count for (normalised, unit), count in spool.boxes.items() if not normalised}
    if pixels and set(pixels) == {"fractions"}:
        raise InputError(
            f"the boxes of all {sum(pixels.values())} items lie between 0 and 1, but pixels of the original pictures "
            "are expected (taken as pixels, all subjects would vanish): if they are fractions, say --boxes normalised"
        )
    fractions = {unit: count for (normalised, unit), count in spool.boxes.items() if normalised}
    if fractions and set(fractions) == {"pixels"}:
        raise InputError(
            f"--boxes normalised, but the boxes of all {sum(fractions.values())} items have numbers above 2: they look "
            "like pixels, so leave the option out"
        )
    if arguments.importer == "images" and not spool.boxes and not spool.broken:
        if not any(file.caption for file in files):
            raise InputError(
                f"no picture in {arguments.source} has a caption or boxes: docs/importing_pairs.md says where they go"
            )
        raise InputError(
            f"no picture in {arguments.source} has boxes: give metadata.jsonl with the columns file_name, text, boxes "
            "and phrases, or --annotations COCO_FILE, or PICTURE.annotations.json beside each"
        )


def import_pairs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Does what the command line says; returns the content of build.json."""
    check(arguments)
    steps = make_steps(arguments)
    settings = {step.name: step.settings() for step in steps}
    journal = Journal(arguments.out)
    journal.start(settings, {}, __version__)
    path = journal.folder / SPOOL
    if journal.is_complete():
        files = find_items(arguments, path, arguments.quiet, keep=False)
        return already_made(journal, files, "items", "its items or pictures")
    pipeline = {"version": __version__, "settings_hash": settings_hash(settings, __version__)}
    steps[-1].pipeline = pipeline
    with journal.lock():
        try:
            files = find_items(arguments, path, arguments.quiet)
            content = beginning({**pipeline, "importer": arguments.importer}, settings, {}, files)
            how = {"workers": arguments.workers, "timeout": arguments.item_timeout, "quiet": arguments.quiet}
            run(steps, files, journal, **how, work=("importing", "item"))
            content |= assemble(journal, files, arguments.pairs_per_shard)
            content["counts"] |= count_notes(journal, files)
            finish(journal, files, steps, content)
        except BaseException:
            journal.forget_if_empty()
            raise
    return content


def count_notes(journal: Journal, files: Sequence[ItemFile]) -> dict[str, int]:
    """How often something happened that a reader of the dataset should know: the keys of ``NOTES``."""
    counts = Counter(dict.fromkeys(NOTES, 0))
    for marker in journal.markers(files):
        for sample in marker["samples"] if marker["kept"] else ():
            counts["single_frame"] += bool(sample["source"].get("single_frame"))
            counts["boxes_cut"] += sample["source"].get("boxes_cut", 0)
            for subject in sample["subjects"]:
                counts["subjects_without_mask"] += "reference_mask_rle" not in subject
                counts["phrases_not_in_caption"] += not subject["mention"]
    return dict(counts)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 a dataset was written, 1 no pair was left, 2 wrong input."""
    arguments = make_parser().parse_args(argv)
    say = partial(print, file=sys.stderr)
    try:
        need_extras("mining")
        content = import_pairs(arguments)
    except MiningError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    counts = content["counts"]
    notes = [f"  note: {counts[name]} {text}" for name, text in NOTES.items() if counts[name]]
    print("\n".join([*outcome(content, arguments.out, "item"), *notes]))  # noqa: T201
    if counts["samples"] == 0:
        say("error: no pair was left; the reasons are above and in rejected.jsonl")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
