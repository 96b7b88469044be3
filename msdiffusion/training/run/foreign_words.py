"""What Lightning and jsonargparse say of wrong settings, in one sentence."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from lightning_fabric.utilities.exceptions import MisconfigurationException

from msdiffusion.errors import MSDiffusionError

SPEAKERS = ("pytorch_lightning", "lightning_fabric", "jsonargparse")
TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "a text",
    "<class 'collections.abc.Iterable'>": "a list",
    "<class 'NoneType'>": "null",
}
NO_GPU = (
    "this run is for a GPU (trainer.accelerator), and torch finds none here: configs/msd.yaml is made for a CPU; "
    "another config runs on one with --trainer.accelerator cpu --trainer.devices 1 --trainer.num_nodes 1 "
    "--trainer.strategy auto"
)


def in_one_sentence(message: str) -> str:
    """A message of jsonargparse without the types that it tried and the objects that it held."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    problem = re.search(r"Problem with given class_path '([^']+)':\n\s*(.+)", message)
    if problem and (wanted := re.search(r"Requirement '([\w.-]+)[^']*' not met", message)):
        return f"{problem[1]} needs {wanted[1]}, which is not installed: pip install {wanted[1]}"
    where = keys[0] if keys else ""
    if problem and len(keys) > 1:
        where = f"{where}.init_args.{keys[1]}"
    got = re.search(r"(?:Got value|Given value): (.+)", message)
    expected = re.findall(r"Expected an? (.+?)(?:\. Got value.*)?$", message, re.MULTILINE)
    if problem and not problem[2].startswith("Parser key"):
        return _short(f"{where}: {problem[1]}: {problem[2]}" if where else f"{problem[1]}: {problem[2]}")
    if expected and where:
        kinds = [kind for kind in dict.fromkeys(map(_kind, expected[:1] if problem else expected)) if kind]
        if len(kinds) > 1 and kinds[-1] == "null":
            kinds.pop()
        return _short(f"{where} must be {' or '.join(kinds)}" + (f", got {got[1]}" if got else ""))
    return _short(" ".join(message.split()))


def our_error(error: BaseException | None) -> MSDiffusionError | None:
    """An error of ours, which arrives as the cause of a ValueError of jsonargparse where a constructor raises it."""
    while error is not None and not isinstance(error, MSDiffusionError):
        error = error.__cause__
    return error


def told_by_lightning(error: BaseException) -> str | None:
    """One sentence for an exception by which Lightning refuses a setting; None for others."""
    text = " ".join(str(error).split())
    if isinstance(error, MisconfigurationException):
        return (
            NO_GPU if re.search("No supported gpu backend|CUDAAccelerator|can not run on your", text) else _short(text)
        )
    frames = traceback.extract_tb(error.__traceback__)
    speaker = Path(frames[-1].filename).parts if frames else ()
    if not isinstance(error, (ValueError, TypeError, ImportError)) or not any(name in speaker for name in SPEAKERS):
        return None
    return in_one_sentence(str(error))


def _kind(expected: str) -> str:
    """A type in words; "" where it says nothing to a user."""
    if expected.startswith("path but"):  # jsonargparse would also read a class from a file
        return ""
    if expected.startswith("dot import path"):
        return "the name of a class"
    if literal := re.fullmatch(r"typing\.Literal\[(.*)\]", expected):
        return literal[1]
    return TYPES.get(expected, re.sub(r"<class '([^']+)'>", r"\1", expected))


def _short(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
