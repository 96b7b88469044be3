"""The command line of ``data_pipeline.build``: every setting of every step is an option, with its default and a line of
help. From the parsed options to the list of steps. Why a default is what it is: docs/mining.md.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from data_pipeline.command_line import HelpFormatter, Parser, check_device_name, default_workers, finite, path_of
from data_pipeline.errors import SettingsError
from data_pipeline.step import Step
from data_pipeline.steps.cut_shots import CutShots
from data_pipeline.steps.detect_boxes import DETECTORS, DetectBoxes
from data_pipeline.steps.filter_pairs import FilterPairs
from data_pipeline.steps.find_entities import SUBJECTS, FindEntities
from data_pipeline.steps.match_subjects import MatchSubjects
from data_pipeline.steps.pick_frames import PickFrames
from data_pipeline.steps.read_videos import HDR, INTERLACED, ReadVideos
from data_pipeline.steps.segment_masks import SEGMENTERS, SegmentMasks
from data_pipeline.steps.write_captions import CAPTIONERS, WriteCaptions
from data_pipeline.steps.write_shards import WriteShards


@dataclass(frozen=True)
class Setting:
    """How a field of a step appears on the command line. flag: its name there, if not the field's own."""

    help: str
    flag: str = ""
    choices: Sequence[str] | None = None
    metavar: str | None = None


@dataclass(frozen=True, eq=False)
class StepOptions:
    """The options of one step, under one heading."""

    title: str
    step: type[Step]
    settings: Mapping[str, Setting]

    def flag(self, name: str) -> str:
        """The option of a field, without dashes: "min-area"."""
        return self.settings[name].flag or name.replace("_", "-")

    def default(self, name: str) -> Any:
        """The field's default."""
        field = self._field(name)
        return field.default if field.default_factory is MISSING else field.default_factory()

    def kind(self, name: str) -> Callable[[str], Any]:
        """What makes the field's value of a word of the command line."""
        default, declared = self.default(name), str(self._field(name).type)
        if isinstance(default, tuple | frozenset):
            return str
        named = {"Path": path_of, "int": int, "float": finite}
        if default is None:
            return next(kind for word, kind in named.items() if word in declared)
        return finite if isinstance(default, float) else type(default)

    def _field(self, name: str) -> Field:
        return next(field for field in fields(self.step) if field.name == name)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options to a parser."""
        group = parser.add_argument_group(self.title)
        for name, setting in self.settings.items():
            default, flag = self.default(name), f"--{self.flag(name)}"
            if isinstance(default, bool):
                group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=setting.help)
                continue
            several = isinstance(default, tuple | frozenset)
            group.add_argument(
                flag,
                type=self.kind(name),
                nargs="*" if several else None,
                default=default if len(default if several else ()) < 6 else None,
                choices=setting.choices,
                metavar=setting.metavar,
                # A list of 70 stop words would bury the rest of the help.
                help=setting.help,
            )

    def values(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Keyword arguments for the step."""
        found = {name: getattr(arguments, self.flag(name).replace("-", "_")) for name in self.settings}
        for name, value in found.items():
            default = self.default(name)
            if isinstance(default, tuple | frozenset):
                found[name] = default if value is None else type(default)(value)
        return found


READING = StepOptions(
    "reading",
    ReadVideos,
    {
        "reader": Setting("video decoder", choices=("auto", "decord", "pyav")),
        "hdr": Setting("what becomes of PQ and HLG", choices=HDR),
        "interlaced": Setting("what becomes of interlaced clips", choices=INTERLACED),
    },
)
SHOTS = StepOptions(
    "shots",
    CutShots,
    {
        "max_frames": Setting("frames of a video that are looked at"),
        "cut_ratio": Setting("a cut changes a frame by this times the changes beside it"),
        "min_content": Setting("a cut changes a frame by at least this, 0 to 255"),
        "fade_level": Setting("grey level below which a fade has its middle; 0 looks for none"),
        "thumbnail": Setting("side of the pictures that are compared", metavar="PIXELS"),
    },
)
FRAMES = StepOptions(
    "frames",
    PickFrames,
    {
        "reference_place": Setting("where in the shot, 0 to 1"),
        "target_place": Setting("where in the shot, 0 to 1"),
        "candidates": Setting("frames of a shot that are looked at"),
        "min_gap": Setting("between the two frames", metavar="SECONDS"),
        "min_frame_brightness": Setting("least mean grey level of a frame, 0 to 1"),
        "max_frame_brightness": Setting("largest mean grey level of a frame, 0 to 1"),
        "min_frame_sharpness": Setting("least sharpness of a frame"),
        "pairs_per_clip": Setting("pairs that one clip gives at most"),
    },
)
CAPTIONS = StepOptions(
    "captions",
    WriteCaptions,
    {
        "captioner": Setting(
            "files: captions come with the videos; blip: written where there is none",
            flag="caption",
            choices=CAPTIONERS,
        ),
        "model": Setting(
            "directory or hub id of BLIP; default: Salesforce/blip-image-captioning-large",
            flag="caption-model",
            metavar="NAME",
        ),
        "max_tokens": Setting("length of a caption at most", flag="caption-max-tokens"),
        "frames_per_batch": Setting("pictures in one pass", flag="caption-batch"),
    },
)
ENTITIES = StepOptions(
    "entities",
    FindEntities,
    {
        "subjects": Setting("whom to look for; animals are things", choices=SUBJECTS),
        "max_subjects": Setting("entities of a caption that are looked for", flag="max-entities"),
        "stop_words": Setting("nouns that are no subjects; default: docs/mining.md", metavar="NOUN"),
        "scenery": Setting("nouns that are background; default: docs/mining.md", metavar="NOUN"),
        "language_models": Setting("spaCy models to try, in this order", flag="language-model", metavar="NAME"),
    },
)
BOXES = StepOptions(
    "boxes",
    DetectBoxes,
    {
        "detector": Setting(
            "where boxes come from; auto: annotations of clips that have some, else groundingdino-hf", choices=DETECTORS
        ),
        "model": Setting(
            "directory or hub id of groundingdino-hf or groundingdino; default: IDEA-Research/grounding-dino-tiny",
            flag="detector-model",
            metavar="NAME",
        ),
        "config": Setting(
            "configuration of groundingdino (Python assignments, read and not run)",
            flag="detector-config",
            metavar="FILE",
        ),
        "checkpoint": Setting("weights of groundingdino", flag="detector-checkpoint", metavar="FILE"),
        "text_encoder": Setting(
            "BERT of groundingdino, if not the configuration's", flag="detector-text-encoder", metavar="DIR"
        ),
        "box_threshold": Setting("least score of a box"),
        "nms_iou": Setting("of two boxes of one phrase that overlap more, the better stays"),
        "image_size": Setting("short side of the picture that it sees; default: the model's", metavar="PIXELS"),
        "frames_per_batch": Setting("frames in one pass of the detector", flag="detector-batch"),
    },
)
MASKS = StepOptions(
    "masks",
    SegmentMasks,
    {
        "segmenter": Setting(
            "where masks come from; auto: annotations that have some, else mobile-sam on a CPU and sam elsewhere",
            choices=SEGMENTERS,
        ),
        "model": Setting(
            "sam: vit_b, vit_l, vit_h; mobile-sam: vit_t; or a json file; default: the first of these",
            flag="segmenter-model",
            metavar="NAME",
        ),
        "checkpoint": Setting(
            "weights of the segmenter; default: the released ones, from the hub",
            flag="segmenter-checkpoint",
            metavar="FILE",
        ),
        "frames_per_batch": Setting("frames encoded at once by the segmenter", flag="segmenter-batch"),
    },
)
MATCHING = StepOptions(
    "matching",
    MatchSubjects,
    {
        "embedder": Setting("histogram, dinov2:SIZE, clip:SIZE, timm:NAME or transformers:NAME_OR_DIR"),
        "checkpoint": Setting("weights for timm", flag="embedder-checkpoint", metavar="FILE"),
        "min_similarity": Setting("of a match, a cosine; default: the embedder's", metavar="COSINE"),
        "mutual_best": Setting("a match counts only if each is the other's best"),
        "tie_margin": Setting("partners whose similarities differ by no more are as good as each other"),
    },
)
FILTERS = StepOptions(
    "filters",
    FilterPairs,
    {
        "min_score": Setting("least detection score"),
        "min_mask_score": Setting("least mask quality as SAM predicts it"),
        "min_area": Setting("least share of the frame that a box covers"),
        "max_area": Setting("largest share of the frame that a box covers"),
        "max_aspect": Setting("longest side of a box over its other side"),
        "min_pixels": Setting("least pixels of a mask"),
        "min_fill": Setting("least share of its box that a mask covers"),
        "min_mask_agreement": Setting("least overlap (IoU) of a mask's tight box with the detected box"),
        "max_border": Setting("largest share of a side that is cut off by the frame's edge"),
        "max_clipped": Setting("largest share of a subject's pixels that are black or white"),
        "min_sharpness": Setting("least sharpness of the picture in a box"),
        "max_box_iou": Setting("boxes of two subjects that overlap more are one thing"),
        "max_mask_overlap": Setting("masks of two subjects that overlap more are one thing"),
        "min_change": Setting("least mean difference of the two frames inside the subjects' boxes"),
        "min_subjects": Setting("fewest subjects of a sample"),
        "max_subjects": Setting("most subjects of a sample"),
    },
)
SHARDS = StepOptions(
    "shards",
    WriteShards,
    {
        "both_directions": Setting("a second sample of every pair, reference and target swapped"),
        "pairs_per_shard": Setting("samples in one tar file"),
        "jpeg_quality": Setting("of the target pictures, 1 to 100"),
    },
)
STEPS = (READING, SHOTS, FRAMES, CAPTIONS, ENTITIES, BOXES, MASKS, MATCHING, FILTERS, SHARDS)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m data_pipeline.build",
        description="From captioned videos to a dataset of multi-subject pairs (docs/mining.md, docs/data_format.md).",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--videos", type=path_of, required=True, metavar="DIR", help="folder of videos, subfolders included")
    add(
        "--out",
        type=path_of,
        metavar="DIR",
        help="where the dataset goes; a rerun finishes what is there. Default: DIR-pairs beside the videos",
    )
    add(
        "--captions",
        type=path_of,
        metavar="FILE",
        help="csv, tsv, jsonl or parquet table with the columns video and caption; default: sidecars",
    )
    add(
        "--annotations",
        type=path_of,
        metavar="FILE",
        help="file or folder with the boxes and masks of many videos; default: sidecars",
    )
    add("--device", default="cpu", help="of every model: cpu, cuda, cuda:1")
    add("--quiet", action="store_true", help="no progress bar")
    machines = parser.add_argument_group("machines")
    add = machines.add_argument
    add(
        "--workers",
        type=int,
        default=default_workers(),
        help="processes; 0 works in this one, without a time limit per clip. On Ray: actors of every group of steps "
        "without a model",
    )
    add("--clip-timeout", type=finite, default=120.0, metavar="SECONDS", help="a clip that takes longer is rejected")
    add("--ray", metavar="ADDRESS", help="run on Ray: local, auto, or the address of a cluster")
    add("--model-workers", type=int, default=1, help="on Ray: actors of every step with a model")
    add("--gpu-share", type=finite, default=1.0, help="on Ray: share of a GPU that each of these takes")
    add("--batch-clips", type=int, default=1, help="on Ray: clips in one batch of a model")
    for options in STEPS:
        options.add_to(parser)
    return parser


def make_steps(arguments: argparse.Namespace) -> list[Step]:
    """The whole pipeline, in order. SettingsError or InputError if options make no sense; nothing heavy is loaded."""
    annotated = arguments.detector in ("auto", "annotations")
    if arguments.segmenter == "annotations" and arguments.detector != "annotations":
        raise SettingsError(
            f"annotated masks alone belong to annotated boxes alone: with --detector {arguments.detector} leave "
            "--segmenter away, or use sam, mobile-sam or (for clips of the procedural world) embedded"
        )
    if arguments.annotations is not None and not annotated:
        raise SettingsError(f"--annotations is for the detectors auto and annotations, not for {arguments.detector}")
    check_device_name(arguments.device)
    if arguments.detector == "embedded" and arguments.segmenter == "auto":
        arguments.segmenter = "embedded"
    device = {"device": arguments.device}
    extra: dict[StepOptions, dict[str, Any]] = {
        READING: {
            "annotations": annotated,
            "annotations_file": arguments.annotations,
            "annotations_required": arguments.detector == "annotations",
            "caption_required": arguments.caption == "files",
        },
        CAPTIONS: device,
        FRAMES: {"annotated_only": annotated},
        BOXES: device,
        MASKS: device,
        MATCHING: device,
    }
    return [options.step(**options.values(arguments), **extra.get(options, {})) for options in STEPS]
