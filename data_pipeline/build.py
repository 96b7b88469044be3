"""The list of steps, and the command: ``python -m data_pipeline.build --videos DIR --out DIR``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline import __version__
from data_pipeline.assemble import (
    SCHEMA,
    assemble,
    file_hashes,
    inputs_hash,
    installed_versions,
    settings_hash,
)
from data_pipeline.journal import Journal, write_atomically
from data_pipeline.records import InputError, MiningError, SettingsError, VideoFile
from data_pipeline.run import run
from data_pipeline.sources import find_videos
from data_pipeline.step import Step
from data_pipeline.steps.cut_shots import CutShots
from data_pipeline.steps.detect_boxes import DETECTORS, DetectBoxes
from data_pipeline.steps.filter_pairs import FilterPairs
from data_pipeline.steps.find_entities import FindEntities
from data_pipeline.steps.match_subjects import MatchSubjects
from data_pipeline.steps.pick_frames import PickFrames
from data_pipeline.steps.read_videos import ReadVideos
from data_pipeline.steps.segment_masks import SEGMENTERS, SegmentMasks
from data_pipeline.steps.write_shards import WriteShards


def default_workers() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_parser() -> argparse.ArgumentParser:
    """The command line. Every number has its default and its reason in docs/mining.md."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m data_pipeline.build",
        description="From captioned videos to a dataset of multi-subject pairs (docs/mining.md, docs/data_format.md).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--videos", type=Path, required=True, metavar="DIR", help="folder of videos, subfolders included")
    add("--out", type=Path, required=True, metavar="DIR", help="where the dataset goes; a rerun finishes what is there")
    add(
        "--captions",
        type=Path,
        metavar="FILE",
        help="csv, jsonl or parquet table with the columns video and caption; default: sidecars",
    )
    add(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="json with the boxes and masks of many videos; default: sidecars",
    )
    add(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes; 0 works in this one, without a time limit per clip",
    )
    add("--clip-timeout", type=float, default=120.0, metavar="SECONDS", help="a clip that takes longer is rejected")
    add("--quiet", action="store_true", help="no progress bar")

    group = parser.add_argument_group("reading and frames")
    group.add_argument("--reader", choices=("auto", "decord", "pyav"), default=ReadVideos.reader, help="video decoder")
    group.add_argument(
        "--reference-place", type=float, default=PickFrames.reference_place, help="where in the shot, 0 to 1"
    )
    group.add_argument("--target-place", type=float, default=PickFrames.target_place, help="where in the shot, 0 to 1")
    group.add_argument(
        "--min-gap", type=float, default=PickFrames.min_gap, metavar="SECONDS", help="between the two frames"
    )
    group.add_argument(
        "--max-frames", type=int, default=CutShots.max_frames, help="frames of a video that are looked at"
    )
    group.add_argument("--language-model", metavar="NAME", help="spaCy model; default: the usual small ones")

    group = parser.add_argument_group("boxes and masks")
    group.add_argument("--detector", choices=DETECTORS, default=DetectBoxes.detector, help="where boxes come from")
    group.add_argument("--detector-config", type=Path, metavar="FILE", help="Grounding DINO configuration (Python)")
    group.add_argument("--detector-checkpoint", type=Path, metavar="FILE", help="Grounding DINO weights")
    group.add_argument(
        "--detector-text-encoder", default="", metavar="DIR", help="its BERT, if not the configuration's"
    )
    group.add_argument("--box-threshold", type=float, default=DetectBoxes.box_threshold, help="least score of a box")
    group.add_argument("--segmenter", choices=SEGMENTERS, default=SegmentMasks.segmenter, help="where masks come from")
    group.add_argument(
        "--segmenter-model", default=SegmentMasks.model, metavar="NAME", help="vit_b, vit_l, vit_h or a json file"
    )
    group.add_argument("--segmenter-checkpoint", type=Path, metavar="FILE", help="SAM weights")
    group.add_argument(
        "--embedder", default=MatchSubjects.embedder, help="histogram, timm:NAME or transformers:NAME_OR_DIR"
    )
    group.add_argument("--embedder-checkpoint", type=Path, metavar="FILE", help="weights for timm")
    group.add_argument(
        "--min-similarity", type=float, default=MatchSubjects.min_similarity, help="of a match, a cosine"
    )
    group.add_argument("--device", default="cpu", help="for detector, segmenter and embedder: cpu, cuda, cuda:1")

    group = parser.add_argument_group("filters")
    for name, meaning in FILTERS.items():
        default = getattr(FilterPairs, name)
        group.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=meaning)

    group = parser.add_argument_group("shards")
    group.add_argument(
        "--pairs-per-clip", type=int, choices=(1, 2), default=WriteShards.pairs_per_clip, help="2: also swapped"
    )
    group.add_argument(
        "--pairs-per-shard", type=int, default=WriteShards.pairs_per_shard, help="samples in one tar file"
    )
    return parser


FILTERS = {
    "min_score": "least detection score",
    "min_mask_score": "least mask quality as SAM predicts it",
    "min_area": "least share of the frame that a box covers",
    "max_area": "largest share of the frame that a box covers",
    "max_aspect": "longest side of a box over its other side",
    "min_pixels": "least pixels of a mask",
    "min_fill": "least share of its box that a mask covers",
    "min_mask_agreement": "least overlap (IoU) of a mask's tight box with the detected box",
    "max_border": "largest share of a side that is cut off by the frame's edge",
    "max_box_iou": "boxes of two subjects that overlap more are one thing",
    "max_mask_overlap": "masks of two subjects that overlap more are one thing",
    "min_change": "least mean difference of the two frames inside the subjects' boxes",
    "min_subjects": "fewest subjects of a sample",
    "max_subjects": "most subjects of a sample",
}


def make_steps(arguments: argparse.Namespace) -> list[Step]:
    """The whole pipeline, in order. SettingsError or InputError if the arguments don't make sense; nothing heavy is
    loaded.
    """
    annotated = "annotations" in (arguments.detector, arguments.segmenter)
    if arguments.segmenter == "annotations" and arguments.detector != "annotations":
        raise SettingsError(
            f"annotated masks belong to annotated boxes: with --detector {arguments.detector} use --segmenter sam "
            "--segmenter-checkpoint FILE"
        )
    models = (arguments.language_model,) if arguments.language_model else ()
    return [
        ReadVideos(reader=arguments.reader, annotations=annotated, annotations_file=arguments.annotations),
        CutShots(max_frames=arguments.max_frames),
        PickFrames(
            reference_place=arguments.reference_place,
            target_place=arguments.target_place,
            min_gap=arguments.min_gap,
            annotated_only=arguments.detector == "annotations",
        ),
        FindEntities(language_models=models),
        DetectBoxes(
            detector=arguments.detector,
            config=arguments.detector_config,
            checkpoint=arguments.detector_checkpoint,
            text_encoder=arguments.detector_text_encoder,
            box_threshold=arguments.box_threshold,
            device=arguments.device,
        ),
        SegmentMasks(
            segmenter=arguments.segmenter,
            model=arguments.segmenter_model,
            checkpoint=arguments.segmenter_checkpoint,
            device=arguments.device,
        ),
        MatchSubjects(
            embedder=arguments.embedder,
            checkpoint=arguments.embedder_checkpoint,
            min_similarity=arguments.min_similarity,
            device=arguments.device,
        ),
        FilterPairs(**{name: getattr(arguments, name) for name in FILTERS}),
        WriteShards(pairs_per_clip=arguments.pairs_per_clip, pairs_per_shard=arguments.pairs_per_shard),
    ]


def check_annotations_exist(arguments: argparse.Namespace, files: Sequence[VideoFile]) -> None:
    """InputError if boxes are to be read from annotations and not one video has any."""
    if arguments.detector != "annotations" or arguments.annotations is not None:
        return
    if not any(file.path.with_name(f"{file.path.stem}.annotations.json").is_file() for file in files):
        name = Path(files[0].name).stem
        raise InputError(
            f"the detector 'annotations' reads boxes that come with the videos, but none of {len(files)} has any.\n"
            f"Give sidecars ({name}.annotations.json ...), or --annotations FILE, or find boxes with\n"
            "  --detector groundingdino --detector-config FILE --detector-checkpoint FILE "
            "--segmenter sam --segmenter-checkpoint FILE"
        )


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the pipeline and writes the dataset; returns the content of build.json."""
    if arguments.workers < 0:
        raise SettingsError(f"--workers must be 0 or more, got {arguments.workers}")
    if arguments.clip_timeout <= 0:
        raise SettingsError(f"--clip-timeout must be positive, got {arguments.clip_timeout}")
    files = find_videos(arguments.videos, arguments.captions)
    steps = make_steps(arguments)
    check_annotations_exist(arguments, files)
    settings = {step.name: step.settings() for step in steps}
    journal = Journal(arguments.out)
    journal.start(settings)
    if journal.is_complete():
        return _already_built(journal, files, settings)
    pipeline = {"version": __version__, "settings_hash": settings_hash(settings, __version__)}
    steps[-1] = replace(steps[-1], pipeline=pipeline)
    run(steps, files, journal, workers=arguments.workers, timeout=arguments.clip_timeout, quiet=arguments.quiet)

    content = {
        "schema": SCHEMA,
        **pipeline,
        "settings": settings,
        "files": file_hashes(settings),
        "inputs_hash": inputs_hash(files),
        "versions": installed_versions(),
    }
    content |= assemble(journal, files, arguments.pairs_per_shard)
    from data_pipeline.report import write_report

    tally = write_report(journal, files, [step.name for step in steps], content)
    reasons = {stage: dict(counts.most_common()) for stage, counts in tally.rejected.items() if counts}
    content["counts"]["reasons"] = {stage: reasons[stage] for stage in tally.stages if stage in reasons}
    write_atomically(journal.out / "build.json", json.dumps(content, indent=1).encode())
    journal.close()
    return content


def _already_built(journal: Journal, files: Sequence[VideoFile], settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    content = json.loads((journal.out / "build.json").read_text(encoding="utf-8"))
    if (now := file_hashes(settings)) != content["files"]:
        changed = [name for name in sorted({*now, *content["files"]}) if now.get(name) != content["files"].get(name)]
        raise InputError(
            f"the dataset in {journal.out} is complete, but the file of {', '.join(changed)} has changed since: choose "
            "a new --out"
        )
    if content["inputs_hash"] != inputs_hash(files):
        raise InputError(
            f"the dataset in {journal.out} is complete, but the videos, captions or annotations have changed since "
            f"({content['counts']['videos']} videos then, {len(files)} now): choose a new --out"
        )
    journal.close()  # a run that was stopped between its last two actions leaves the folder behind
    return content


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 a dataset was written, 1 no pair was left, 2 wrong input."""
    arguments = make_parser().parse_args(argv)
    try:
        content = build(arguments)
    except MiningError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        return 130
    counts = content["counts"]
    print(  # noqa: T201
        f"{counts['samples']} samples with {counts['subjects']} subjects from {counts['videos']} videos, "
        f"{counts['rejected']} rejected; look at {arguments.out / 'report.html'}"
    )
    for stage, reasons in counts["reasons"].items():
        for reason, count in reasons.items():
            print(f"  {count} rejected by {stage}: {reason}")  # noqa: T201
    if counts["samples"] == 0:
        print("error: no pair was left; the reasons are above and in rejected.jsonl", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
