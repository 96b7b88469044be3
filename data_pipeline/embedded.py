"""``python -m data_pipeline.embedded train detector|segmenter``: the models with which the pipeline mines without any
download, trained on the procedural world; ``measure``: what they find of the truth on clips they have not seen.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.drawing import beside, draw_frame
from data_pipeline.errors import InputError, MiningError, SettingsError
from data_pipeline.extras import need_extras
from data_pipeline.options import make_parser as make_mining_parser
from data_pipeline.options import make_steps
from data_pipeline.outputs import check_folder
from data_pipeline.places import EMBEDDED
from data_pipeline.records import FramePair, Rejected
from data_pipeline.sources import find_videos
from data_pipeline.step import Step

RUNS = Path("runs/mining_models")
MODELS = EMBEDDED
DRAWN = 3
"""Pairs of every set of clips in the picture."""
PARTS = ("detector", "segmenter")
DETECTOR_STEPS, SEGMENTER_STEPS = 6600, 3000


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m data_pipeline.embedded",
        description="Trains and measures the tiny detector and segmenter of checkpoints/tiny/mining.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shown = argparse.ArgumentDefaultsHelpFormatter
    train = commands.add_parser("train", help="train one of the models", allow_abbrev=False, formatter_class=shown)
    train.add_argument("part", choices=PARTS, help="which model")
    add = train.add_argument
    add("--out", type=Path, metavar="DIR", help=f"where the model is written; default: {RUNS}/PART")
    add("--work", type=Path, default=RUNS, metavar="DIR", help="rendered frames, and the state of the run: to go on")
    add("--frames", type=int, default=30_000, help="frames rendered ahead")
    add("--twins", type=float, default=0.2, help="share of the draws with two subjects of one category")
    add("--initial", type=Path, metavar="DIR", help="run to begin from (the folder of its state.pt)")
    add("--steps", type=int, help=f"optimizer steps; default: {DETECTOR_STEPS} and {SEGMENTER_STEPS}")
    add("--batch-size", type=int, default=16, help="frames of a step")
    add("--learning-rate", type=float, default=1e-3, help="peak, after the warm-up")
    add("--seed", type=int, default=0, help="of the weights, the frames and the batches")
    add("--threads", type=int, default=1, help="processor cores")
    add("--workers", type=int, default=2, help="processes that render; 0: this one")

    measure = commands.add_parser(
        "measure", help="compare what they find with the truth", allow_abbrev=False, formatter_class=shown
    )
    add = measure.add_argument
    add("--models", type=Path, default=MODELS, metavar="DIR", help="with the folders detector and segmenter")
    add("--clips", type=int, default=200, help="clips of the world, as the demo mines them")
    add("--twins", type=int, default=100, help="clips that show two subjects of one category")
    add("--split", choices=("train", "held_out", "all"), default="held_out", help="identities to show")
    add("--seeds", type=int, nargs="+", default=[1000, 2000], metavar="SEED", help="a set of clips for each")
    add("--box-threshold", type=float, default=0.35, help="least score of a box")
    add("--work", type=Path, default=RUNS, metavar="DIR", help="where the clips are written, and read again")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--pictures", type=Path, metavar="FILE", help="also draw some frames with what was found, as PNG")

    curves = commands.add_parser(
        "curves", help="draw the losses of training", allow_abbrev=False, formatter_class=shown
    )
    curves.add_argument("--work", type=Path, default=RUNS, metavar="DIR", help="where the runs are")
    curves.add_argument("--out", type=Path, default=RUNS / "curves.png", metavar="FILE", help="the picture, PNG")
    return parser


def train(arguments: argparse.Namespace) -> str:
    """Trains a part and writes it; returns what to tell. A run that was stopped goes on."""
    from data_pipeline.models.embedded.renderings import VERSION, RenderSettings, render
    from data_pipeline.models.embedded.training import TrainingSettings, check_resume, describe_run, use_cores

    part: str = arguments.part
    out, run = arguments.out or arguments.work / part, arguments.work / f"{part}_run"
    default_steps = DETECTOR_STEPS if part == "detector" else SEGMENTER_STEPS
    settings = TrainingSettings(
        steps=default_steps if arguments.steps is None else arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    chosen = RenderSettings(frames=arguments.frames, twins=arguments.twins, seed=arguments.seed)
    # Validation frames have another seed than those of `measure`, which are decoded from clips.
    checked = replace(chosen, frames=min(240, arguments.frames), seed=arguments.seed + 1, split="held_out")
    use_cores(arguments.threads)
    if arguments.workers < 0:
        raise SettingsError(f"--workers must be 0 or more, got {arguments.workers}")
    check_folder(run, "--work")
    check_folder(out, "--out")
    if arguments.initial is not None and not (arguments.initial / "state.pt").is_file():
        raise InputError(f"--initial: there is no state.pt in {arguments.initial}; name the folder of a run, PART_run")
    # What the weights come from, beside the settings: a state of other frames must not go on.
    initial = describe_run(arguments.initial) if arguments.initial else ""
    settings = replace(settings, learns_from={**asdict(chosen), "rendering": VERSION, "initial": initial})
    check_resume(run, settings)
    frames, validation = (render(which, arguments.work, arguments.workers) for which in (chosen, checked))
    if part == "detector":
        from data_pipeline.models.embedded.detector import train_detector as train_part
    else:
        from data_pipeline.models.embedded.segmenter import train_segmenter as train_part
    count = train_part(frames, validation, settings, run, out, arguments.initial)
    return f"{part}: {count} parameters in {out}"


def measured_steps(models: Path, box_threshold: float) -> dict[str, Step]:
    """The pipeline's steps by name, set up, with the detector and the segmenter in ``models``."""
    steps = {step.name: step for step in make_steps(make_mining_parser().parse_args(["--videos", str(models)]))}
    detector, segmenter = models / "detector", models / "segmenter"
    changes = {
        "read_videos": {"annotations": False},
        "pick_frames": {"annotated_only": False},
        "detect_boxes": {"detector": "groundingdino-hf", "model": str(detector), "box_threshold": box_threshold},
        "segment_masks": {
            "segmenter": "sam",
            "model": str(segmenter / "config.json"),
            "checkpoint": segmenter / "model.safetensors",
        },
    }
    wanted = ("read_videos", "cut_shots", "pick_frames", "find_entities", *changes, "match_subjects")
    chosen = {name: replace(steps[name], **changes.get(name, {})) for name in wanted}
    for step in chosen.values():
        step.setup()
    return chosen


def picked(steps: dict[str, Step], folder: Path, count: int) -> Iterator[tuple[FramePair, dict[str, Any]]]:
    """The first pair of frames of the first clips of a folder, with the annotations of its clip."""
    from data_pipeline.models.embedded.measure import read_annotations

    for file in find_videos(folder, None)[:count]:
        record: Any = file
        for name in ("read_videos", "cut_shots", "pick_frames"):
            record = steps[name].process(record)
            if isinstance(record, Rejected):
                raise InputError(f"{file.name} was rejected by {name}: {record.reason} {dict(record.evidence)}")
        yield record[0], read_annotations(file.path)


def measure(arguments: argparse.Namespace) -> str:
    """Measures the models on new clips; returns the tables."""
    from data_pipeline.models.embedded.measure import Miner, table, write_twin_clips
    from data_pipeline.world.clips import write_clips

    if arguments.clips < 1 or arguments.twins < 0:
        raise SettingsError(f"need at least one clip, got --clips {arguments.clips} --twins {arguments.twins}")
    if min(arguments.seeds) < 0:
        raise SettingsError(f"--seeds must be 0 or more, got {' '.join(map(str, arguments.seeds))}")
    check_folder(arguments.work, "--work")
    steps = measured_steps(arguments.models, arguments.box_threshold)
    miner = Miner(steps)
    drawn: list[tuple] = []
    figures: dict[str, list[dict[str, Any]]] = {"clips": [], "twins": []}
    for seed in arguments.seeds:
        for kind, count in (("clips", arguments.clips), ("twins", arguments.twins)):
            if not count:
                continue
            folder = arguments.work / f"{kind}-{arguments.split}-{seed}"
            write = write_clips if kind == "clips" else write_twin_clips
            write(folder, count, split=arguments.split, seed=seed)
            shown: list[tuple] = []
            clips = tqdm(picked(steps, folder, count), total=count, desc=f"{kind}, seed {seed}")
            figures[kind].append(miner.measure(clips, shown.append).figures())
            drawn += shown[:DRAWN]
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if arguments.pictures:
        draw(drawn, arguments.pictures)
    return "\n\n".join(table(name, of_seeds) for name, of_seeds in figures.items() if of_seeds)


def draw(pairs: Sequence[tuple], path: Path) -> None:
    """Draws pairs as ``Miner.measure`` shows them, a row of four each: the frames, and what was found in them."""
    from PIL import Image

    rows = []
    for frames, found in pairs:
        pictures = [draw_frame(frame.image, []) for frame in (frames.reference, frames.target)]
        for frame, detections in zip((frames.reference, frames.target), found, strict=True):
            shown = [(f"{one.entity.phrase} {one.score:.2f}", one.box, one.mask) for one in detections]
            pictures.append(draw_frame(frame.image, shown))
        rows.append(beside(pictures))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + 3 for row in rows)), (255, 255, 255))
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + 3
    path.parent.mkdir(parents=True, exist_ok=True)
    # A palette: a third of the bytes, and nothing that an eye would miss.
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_curves(arguments: argparse.Namespace) -> str:
    """Draws log.csv of the runs that are there, a panel each; returns where. InputError if there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = [path for part in PARTS if (path := arguments.work / f"{part}_run" / "log.csv").is_file()]
    if not logs:
        raise InputError(f"no run in {arguments.work}: train a part first, or name its folder with --work")
    figure, panels = pyplot.subplots(1, len(logs), figsize=(5.5 * len(logs), 3.8), squeeze=False)
    for panel, path in zip(panels[0], logs, strict=True):
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name in rows[0]:
            if name not in ("step", "frames_per_second"):
                panel.plot([int(row["step"]) for row in rows], [float(row[name]) for row in rows], label=name)
        panel.set(title=path.parent.name.removesuffix("_run"), xlabel="step", ylabel="loss", yscale="log")
        panel.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=90)
    pyplot.close(figure)
    return f"the curves of {len(logs)} runs are in {arguments.out}"


COMMANDS = {"train": train, "measure": measure, "curves": draw_curves}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 2 for wrong arguments and input that cannot be used."""
    options = make_parser().parse_args(arguments)
    try:
        need_extras("mining")
        print(COMMANDS[options.command](options))  # noqa: T201
    except MiningError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
