"""`python -m data_pipeline.world --out DIR --count N`: writes clips of the procedural world."""

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.command_line import Parser, path_of
from data_pipeline.errors import MiningError
from data_pipeline.extras import need_extras
from data_pipeline.outputs import check_folder
from data_pipeline.safe_text import visible


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2 for wrong arguments)."""
    parser = Parser(
        prog="python -m data_pipeline.world",
        description="Writes H.264 clips of the procedural world, each with a caption (.txt) and exact annotations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=path_of, required=True, metavar="DIR", help="folder to write to; a rerun continues it"
    )
    parser.add_argument("--count", type=int, default=100, help="number of clips")
    parser.add_argument("--split", choices=("train", "held_out", "all"), default="train", help="identities to show")
    parser.add_argument("--seed", type=int, default=0, help="of the whole set")
    parser.add_argument("--num-subjects", type=int, default=None, help="subjects in every clip, 1 to 4; none: 1 to 3")
    parser.add_argument("--size", type=int, default=128, help="side of the square frames in pixels")
    parser.add_argument("--num-frames", type=int, default=12, help="frames of a clip")
    parser.add_argument("--fps", type=int, default=8, help="frames per second")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 works in this one")
    options = vars(parser.parse_args(arguments))

    from data_pipeline.world.clips import write_clips

    try:
        need_extras("mining")
        check_folder(options["out"])
        paths = write_clips(options.pop("out"), options.pop("count"), **options)
    except (MiningError, ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(paths)} clips in {visible(paths[0].parent)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
