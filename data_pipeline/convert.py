"""Weights in another library's spelling: ``python -m data_pipeline.convert groundingdino --to hf IN OUT``."""

import argparse
import sys
from collections.abc import Sequence

from data_pipeline.command_line import Parser, path_of
from data_pipeline.errors import InputError, MiningError, SettingsError
from data_pipeline.extras import need_extras
from data_pipeline.outputs import check_folder
from data_pipeline.safe_text import visible


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m data_pipeline.convert",
        description="Converts weights between libraries. Nothing is overwritten.",
    )
    commands = parser.add_subparsers(dest="model", required=True)
    dino = commands.add_parser(
        "groundingdino",
        help="Grounding DINO between groundingdino-py and transformers",
        description="Grounding DINO between the package groundingdino-py and transformers' GroundingDino classes.",
    )
    dino.add_argument("--to", choices=("hf", "package"), required=True, help="the library to convert for")
    dino.add_argument("source", metavar="IN", help="directory or hub id of the model to read")
    dino.add_argument("out", metavar="OUT", type=path_of, help="directory to write; it must be new or empty")
    dino.add_argument("--config", metavar="NAME", default="*.py", help="with --to hf: which configuration in IN")
    dino.add_argument("--checkpoint", metavar="NAME", default="", help="with --to hf: which weights in IN")
    dino.add_argument(
        "--text-encoder", metavar="DIR", default="", help="with --to hf: its BERT, if not the configuration's"
    )
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """Does what the command line says. SettingsError or InputError before anything is written."""
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise InputError(f"{arguments.out} exists and is not empty: choose a new directory")
    check_folder(arguments.out, "OUT")
    if arguments.to == "package":
        if arguments.config != "*.py" or arguments.checkpoint or arguments.text_encoder:
            raise SettingsError("--config, --checkpoint and --text-encoder belong to --to hf")
        from data_pipeline.models.grounding_dino_weights import convert_to_package

        convert_to_package(arguments.source, arguments.out)
        return
    from data_pipeline.models.grounding_dino_weights import convert_to_hf
    from data_pipeline.models.hub import find_files

    weights = (arguments.checkpoint,) if arguments.checkpoint else ("*.safetensors", "*.pth")
    files = find_files(arguments.source, "IN", {"configuration": (arguments.config,), "weights": weights})
    convert_to_hf(files["configuration"], files["weights"], arguments.text_encoder, arguments.out)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 wrong input."""
    arguments = make_parser().parse_args(argv)
    try:
        need_extras("mining")
        convert(arguments)
    except MiningError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"wrote {visible(arguments.out)}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
