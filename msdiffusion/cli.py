"""The ``msdiffusion`` command: generate, evaluate, bench, demo, convert. Heavy libraries load after the checks."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from data_pipeline.extras import missing_extras
from data_pipeline.safe_text import nobody_reads, visible
from msdiffusion import __version__
from msdiffusion.commands import bench, demo, evaluate
from msdiffusion.commands import generate as generate_command
from msdiffusion.environment import prepare_environment
from msdiffusion.errors import MSDiffusionError, RequestError, check_place, shown
from msdiffusion.files import REFUSALS, check_file, check_folder, place_of, written
from msdiffusion.places import CONFIGS, config_names, find_model

if TYPE_CHECKING:
    from msdiffusion.adapter.config import AdapterConfig


CUTOUT = "data_pipeline.cutout"
"""A process of its own: this package may not know the networks of data_pipeline."""
DESCRIPTION = (
    "Draw pictures of your own things, each in its box; score and convert what draws them. Training is a command of "
    "its own: lightning fit."
)
ELSEWHERE = dict.fromkeys(("train", "training", "finetune", "fit"), "lightning fit -c configs/msd.yaml")
ELSEWHERE |= dict.fromkeys(("mine", "build", "mining"), "python -m data_pipeline.build")
"""Commands that people look for here."""


class _Formatter(argparse.HelpFormatter):
    """Adds defaults that are numbers or words where the text does not tell them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        known = type(action.default) in (int, float, str) and action.default != argparse.SUPPRESS
        return f"{action.help} (default: %(default)s)" if known and "default" not in action.help else action.help


class _Parser(argparse.ArgumentParser):
    """Tells wrong calls in one line, with the nearest right name, in place of all usage."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _Formatter, "allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest:  # told by the command's own parser, which knows its flags
            near = difflib.get_close_matches(rest[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            blanks = self._blanks(list(args or ()), rest[0])
            hint = f": {blanks}" if blanks else f": did you mean {near[0]}?" if near else ""
            self.error(f"there is no {shown(rest[0])}{hint}")
        return found, rest

    def _blanks(self, arguments: list[str], left: str) -> str:
        """What to say where an option's value was cut at its blanks by the shell; ``left``: its first other word."""
        known = self._option_string_actions
        places = [place for place, word in enumerate(arguments) if word == left and arguments[place - 1] not in known]
        if left.startswith("--") or not places:
            return ""
        end = first = places[0]
        while first and arguments[first - 1] not in known:
            first -= 1
        while end < len(arguments) and arguments[end] not in known:
            end += 1
        words = [shown(word)[1:-1] for word in arguments[first:end]]
        if not first or len(words) < 2:
            return ""
        flag = arguments[first - 1]
        action = known[flag]
        if action.nargs == 0:
            return ""
        if all(re.fullmatch(r"[-+.\d,]+", word) for word in words):
            return f"numbers go with commas and without blanks, {flag} {','.join(word.strip(',') for word in words)}"
        quoted = f'{flag} "{" ".join(words)}"'
        if isinstance(action, argparse._AppendAction) or getattr(action, "repeated", False):
            return f"{flag} takes one: {' '.join(f'{flag} {word}' for word in words)}, or with its blanks {quoted}"
        # a file name that is whole is followed by something else
        return "" if "." in words[0] else f"what has blanks in it needs quotes, {quoted}"

    def error(self, message: str) -> NoReturn:
        if wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w.-]+", wrong[2]), n=1)
            near = [ELSEWHERE[wrong[1]]] if wrong[1] in ELSEWHERE else near
            message += f": did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {visible(message)} ({self.prog} --help lists what there is)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prepare_environment()
    if arguments[:1] == ["cutout"]:
        return subprocess.call([sys.executable, "-m", CUTOUT, *arguments[1:]])
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(_bind_negative(arguments))
    try:
        if told := missing_extras(*getattr(options, "extras", ())):
            raise RequestError(told)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        return nobody_reads()
    except MSDiffusionError as error:
        print(f"msdiffusion: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in REFUSALS or os.environ.get("MSD_TRACEBACK"):
            raise
        place = shown(str(error.filename), 300) if error.filename else "a file"
        print(f"msdiffusion: error: {visible(place)} cannot be written or read: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="msdiffusion", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"msdiffusion {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, declare, summary in (
        ("generate", generate_command.add_arguments, "draw pictures of your subjects, each in its box"),
        ("convert", _add_convert, "turn the official ms_adapter.bin into an adapter folder, or back"),
        ("configs", _add_configs, "list the configs of lightning fit that come along, or copy some, to change them"),
        ("cutout", None, "cut things out of photographs, to draw them: PNGs with transparency, by SAM"),
        ("evaluate", evaluate.add_arguments, "draw held-out subjects with the adapter on and off, and score both"),
        ("bench", bench.add_arguments, "compare methods on the procedural world, and explore where this one fails"),
        ("demo", demo.add_arguments, "mine, fine-tune, generate and score on fresh clips"),
    ):
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if declare is not None:
            declare(command)
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=find_model, help="ms_adapter.bin, or an adapter's folder, or a hub repository with one of them")
    add("--to", choices=("folder", "official"), default="folder", help="what is written")
    add("--out", required=True, type=place_of, metavar="PLACE", help="folder, or file such as ms_adapter.bin")
    add("--base-model", type=find_model, help="the SDXL pipeline it was trained on; only configs are read")
    add("--base-config", help="configs for a base model in one .safetensors file")
    add("--image-encoder", type=find_model, help="the image encoder it was trained on; only configs are read")
    add("--head-width", type=int, help="of the official file's resampler, which it doesn't tell: 64")
    add("--license", metavar="NAME", help="of the weights, for the model card; default: not told")
    parser.set_defaults(run=_convert)


def _add_configs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to copy, such as msd.yaml; default: none")
    parser.add_argument("--out", type=place_of, default=".", metavar="FOLDER", help="where to; default: here")
    parser.set_defaults(run=_configs)


def _configs(options: argparse.Namespace) -> None:
    there = config_names()
    check_folder(options.out, "--out")
    for name in options.names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            raise RequestError(
                f"no config {shown(name)} comes along: {f'did you mean {near[0]}?' if near else ', '.join(there)}"
            )
        if (options.out / name).exists():
            raise RequestError(f"{options.out / name} is there already: give another --out, or remove it")
    for name in options.names:
        with written(options.out / name) as place:
            shutil.copyfile(CONFIGS / name, place)
        print(visible(options.out / name))
    if not options.names:
        for name in there:
            [purpose, *_] = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
            print(f"{name:<32}{purpose.removeprefix('# ')}")


def _convert(options: argparse.Namespace) -> None:
    _check_convert(options)
    print("loading the libraries that read weights", file=sys.stderr, flush=True)

    from msdiffusion.adapter.card import write_card
    from msdiffusion.adapter.loading import find_adapter, load_adapter
    from msdiffusion.adapter.resampler import ResamplerParams

    sizes = {} if options.head_width is None else {"head_width": options.head_width}
    found = load_adapter(options.model, options.base_model, options.image_encoder, options.base_config, **sizes)
    if options.to == "official":
        found.adapter.to_official(options.out, found.unet)
        _tell_what_is_lost(found.adapter.config)
    else:
        found.adapter.save_pretrained(options.out, **vars(found.sources.absolute()))
        write_card(options.out, found.adapter, license=options.license)
        released = found.adapter.config.resampler.width == ResamplerParams.width
        if options.head_width is None and not released and find_adapter(options.model).suffix == ".bin":
            print(
                "the official file does not tell the width of the resampler's heads. 64 was taken, as in the release, "
                "but this adapter is of another size: where that is wrong, so are its pictures; --head-width says it",
                file=sys.stderr,
            )
    print(visible(options.out))


def _check_convert(options: argparse.Namespace) -> None:
    for name in ("model", "base_model", "base_config", "image_encoder"):
        flag = name if name == "model" else "--" + name.replace("_", "-")
        check_place(getattr(options, name), flag, inside=name == "image_encoder")
    if options.to == "official" and options.out.suffix != ".bin":
        raise RequestError(f"--to official writes one file: --out must end in .bin, got {options.out}")
    if options.to == "official" and options.license is not None:
        raise RequestError("--license is for the model card, which --to official does not write")
    (check_folder if options.to == "folder" else check_file)(options.out, "--out")


def _tell_what_is_lost(config: AdapterConfig) -> None:
    """The official file holds weights only: its reader must be told what differs from the release."""
    from msdiffusion.adapter.config import AdapterConfig

    told = ("base_model", "image_encoder", "reference_background", "reference_fit", "defaults")
    release = AdapterConfig(resampler=config.resampler)
    lost = {name: getattr(config, name) for name in told if getattr(config, name) != getattr(release, name)}
    if config.resampler.head_width != 64:
        lost["head_width"] = config.resampler.head_width
    if lost:
        print(f"not in the official file, and not as in the release: {lost}", file=sys.stderr)


def _bind_negative(arguments: list[str]) -> list[str]:
    """Join "--box -0.1,0,1,1" with "=": argparse would take the value for an option, and hide the real mistake."""
    numeric = ("--box", "--subject-scales", "--subject-windows")
    bound: list[str] = []
    for argument in arguments:
        if bound and bound[-1] in numeric and argument[:1] == "-" and argument[1:2] in set("0123456789.,"):
            bound[-1] += "=" + argument
        else:
            bound.append(argument)
    return bound


if __name__ == "__main__":
    sys.exit(main())
