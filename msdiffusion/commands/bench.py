"""Options of `msdiffusion bench`; nothing heavy is imported here."""

from __future__ import annotations

import argparse
from pathlib import Path

from msdiffusion.bench.rows import ROWS
from msdiffusion.commands.evaluate import check_common
from msdiffusion.errors import RequestError
from msdiffusion.files import check_file, place_of
from msdiffusion.places import DEFAULT_MODEL, find_model

DEFAULT_OUT = Path("runs") / "world_benchmark"
MAX_JOBS = 256
DEFAULT_PAIRS = Path("data") / "world" / "pairs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msdiffusion bench world` and `msdiffusion bench explore`."""
    parser.set_defaults(extras=("training", "evaluation"))
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    world = benchmarks.add_parser(
        "world",
        help="train and score MS-Diffusion, its ablations and its rivals on equal terms",
        description="Trains what is not trained yet, draws what is not drawn yet, and writes the table. Run it again "
        "to go on where it was interrupted.",
    )
    _add_common(world, pictures=300)
    add = world.add_argument
    add(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=list(ROWS),
        metavar="ROW",
        help=f"any of {', '.join(ROWS)}; default: all",
    )
    add("--pairs", type=place_of, default=DEFAULT_PAIRS, metavar="FOLDER", help="mined from world clips")
    add("--steps", type=int, default=900, help="training steps of every trained row")
    add("--train-batch", type=int, default=16, help="pairs per step")
    add("--training-seeds", type=int, nargs="+", default=[0], metavar="SEED", help="of each trained row (default 0)")
    add("--jobs", type=int, default=1, help="rows worked on at once, one thread each if above 1")
    add("--document", type=place_of, metavar="FILE.md", help="where the table goes; default: in --out")
    world.set_defaults(run=run_world)
    explore = benchmarks.add_parser(
        "explore",
        help="curves and pictures: scale, number of subjects, overlap, unseen boxes, contradicting prompts",
        description="Draws and scores the shipped adapter where the table doesn't look.",
    )
    _add_common(explore, pictures=40)
    explore.add_argument("--document", type=place_of, metavar="FILE.md", help="where the page goes; default: in --out")
    explore.set_defaults(run=run_explore, out=Path("runs") / "exploration")


def _add_common(parser: argparse.ArgumentParser, pictures: int) -> None:
    add = parser.add_argument
    add("--out", type=place_of, default=DEFAULT_OUT, metavar="FOLDER", help="adapters, pictures, scores")
    add(
        "--model",
        type=lambda place: Path(find_model(place_of(place))),
        default=DEFAULT_MODEL,
        metavar="FOLDER",
        help="embedded model: base, encoder, judge, ...",
    )
    add("--pictures", type=int, default=pictures, help="held-out pictures per row")
    add("--seed", type=int, default=0, help="of the cases and of the noise")
    add("--draw-batch", type=int, default=16, help="pictures drawn at once")
    add("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="while drawing")


def run_world(options: argparse.Namespace) -> None:
    """Checks the numbers, then runs the benchmark.

    Raises:
        RequestError: a number is out of range, a seed is named twice, or nothing can be written.
        DataError: there are no pairs in a folder that was given.
    """
    from msdiffusion.bench.world import check_pairs, run
    from msdiffusion.request.subjects import whole_number

    _check(options, "pictures", "steps", "train_batch")
    whole_number(options.jobs, "--jobs", 1, MAX_JOBS)
    if len(set(options.training_seeds)) != len(options.training_seeds) or min(options.training_seeds) < 0:
        raise RequestError(f"--training-seeds must be different and not below 0, got {options.training_seeds}")
    check_pairs(options.pairs, may_mine=options.pairs.resolve() == DEFAULT_PAIRS.resolve())
    run(options)


def run_explore(options: argparse.Namespace) -> None:
    """Checks the numbers, then runs the exploration.

    Raises:
        RequestError: a number is out of range, or nothing can be written.
        WeightsError: the model or an instrument is not there.
    """
    from msdiffusion.bench.world import check_model

    _check(options, "pictures")
    check_model(options.model)
    from msdiffusion.bench.explore import run

    run(options)


def _check(options: argparse.Namespace, *names: str) -> None:
    from msdiffusion.request.request import MAX_BATCH
    from msdiffusion.request.subjects import whole_number

    check_common(options, *names)
    whole_number(options.draw_batch, "--draw-batch", 1, MAX_BATCH)
    if options.document is not None:
        check_file(options.document, "--document")
