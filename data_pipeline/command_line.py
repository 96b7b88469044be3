"""What the commands of this package share: their parser, kinds of values, and checks of what several ask for."""

import argparse
import difflib
import math
import os
import re
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.errors import SettingsError
from data_pipeline.safe_text import visible, write_anything

MAX_WORKERS = 1024
"""Processes of one machine."""
LONGEST_TIMEOUT = 86_400
"""Seconds of a day; what is longer is a mistake, and too long for the clocks of some systems."""


def path_of(text: str) -> Path:
    """A path at which there is something, or may be: not one that is too long, goes in a circle or is forbidden, which
    would be an error wherever it is looked at first.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no path: was a variable of the shell empty?")
    try:
        os.stat(text)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot look at {text[:200]!r}: {why}") from error
    return Path(text)


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN: no comparison would ever notice those."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"needs an ordinary number, got {text}")
    return number


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a line or two, with a likely option for a misspelled one, instead of all there are."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        """As argparse's, but options are not to be abbreviated."""
        super().__init__(*arguments, **{"allow_abbrev": False, **settings})
        write_anything()  # every command begins with its parser

    def error(self, message: str) -> NoReturn:
        """Exits with 2."""
        known = list(self._option_string_actions)
        for word in re.findall(r"--[\w-]+", message.partition("unrecognized arguments:")[2]):
            if near := difflib.get_close_matches(word, known, n=1):
                message += f"\ndid you mean {near[0]} for {word}?"
        left = message.partition("unrecognized arguments:")[2].split()
        if left and all(re.fullmatch(r"[-+.,\d]+", word) for word in left):
            message += "\nnumbers that belong together have commas between them and no blanks: --box 0,0,0.5,1"
        if "--caption:" in message:
            message += "\na table of captions is given with --captions FILE"
        self.exit(2, f"error: {visible(message)}\n{self.prog} --help lists all options\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, "", (), False)
        return action.help if plain else super()._get_help_string(action)


def default_workers() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_pool(workers: int, timeout: float, flag: str) -> None:
    """SettingsError for a wrong number of processes, or of seconds for one clip, which ``flag`` sets."""
    if not 0 <= workers <= MAX_WORKERS:
        raise SettingsError(f"--workers must be 0 or more, and {MAX_WORKERS} at most, got {workers}")
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise SettingsError(f"{flag} must lie above 0 and up to {LONGEST_TIMEOUT} s, got {timeout}")


def check_device_name(device: str) -> None:
    """SettingsError for a word that names no device of ours; whether it is here is asked of torch later."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?|mps", device):
        raise SettingsError(f"--device is cpu, cuda, cuda:1 or mps, got {device[:80]!r}")
