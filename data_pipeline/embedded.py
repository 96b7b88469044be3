"""``python -m data_pipeline.embedded train detector|segmenter``: the models with which the pipeline mines without any
download, trained on the procedural world; ``measure``: what they find of the truth on clips they have not seen.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.records import MiningError

RUNS = Path("runs/mining_models")
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
    train.add_argument("part", choices=("detector", "segmenter"), help="which model")
    add = train.add_argument
    add("--out", type=Path, metavar="DIR", help=f"where the model is written; default: {RUNS}/PART")
    add("--work", type=Path, default=RUNS, metavar="DIR", help="rendered frames, and the state of the run: to go on")
    add("--frames", type=int, default=30_000, help="frames rendered ahead")
    add("--steps", type=int, help=f"optimizer steps; default: {DETECTOR_STEPS} and {SEGMENTER_STEPS}")
    add("--batch-size", type=int, default=16, help="frames of a step")
    add("--learning-rate", type=float, default=1e-3, help="peak, after the warm-up")
    add("--seed", type=int, default=0, help="of the weights, the frames and the batches")
    add("--threads", type=int, default=1, help="processor cores")
    add("--workers", type=int, default=2, help="processes that render; 0: this one")
    return parser


def train(arguments: argparse.Namespace) -> str:
    """Trains a part and writes it; returns what to tell. A run that was stopped goes on."""
    import torch

    from data_pipeline.models.embedded.renderings import RenderSettings, render
    from data_pipeline.models.embedded.training import TrainingSettings

    part: str = arguments.part
    out = arguments.out or arguments.work / part
    default_steps = DETECTOR_STEPS if part == "detector" else SEGMENTER_STEPS
    settings = TrainingSettings(
        steps=default_steps if arguments.steps is None else arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    chosen = RenderSettings(frames=arguments.frames, seed=arguments.seed)
    # Validation frames have another seed than those of `measure`, which are decoded from clips.
    checked = RenderSettings(frames=240, seed=arguments.seed + 1, split="held_out")
    torch.set_num_threads(arguments.threads)
    frames, validation = (render(which, arguments.work, arguments.workers) for which in (chosen, checked))
    if part == "detector":
        from data_pipeline.models.embedded.detector import train_detector as train_part
    else:
        from data_pipeline.models.embedded.segmenter import train_segmenter as train_part
    count = train_part(frames, validation, settings, arguments.work / f"{part}_run", out)
    return f"{part}: {count} parameters in {out}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 2 for wrong arguments and input that cannot be used."""
    options = make_parser().parse_args(arguments)
    try:
        print(train(options))  # noqa: T201
    except MiningError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
