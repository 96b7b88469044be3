"""Every exception that this package raises on purpose.

Catch ``MSDiffusionError`` to catch them all; those that blame a value are also a ``ValueError``.
"""

import collections.abc
import contextlib
import difflib
import pathlib
import re
import sys
import warnings

from data_pipeline.reasons import reason as reason
from data_pipeline.reasons import shown as shown
from data_pipeline.safe_text import error_text, visible

_MODEL_FILES = (".bin", ".ckpt", ".safetensors", ".pt", ".pth")


def warn_caller(message: str) -> None:
    """Warn, and name the line outside this package that called it, from whatever depth."""
    passed = (__package__, "torch")  # torch: the wrapper of no_grad
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in passed:
        frame, level = frame.f_back, level + 1
    warnings.warn(visible(message), stacklevel=level)


def check_place(model: object, name: str, *, inside: bool = False) -> None:
    """Say at once, before a library is loaded or a hub asked, that a model's file or folder is not there.

    Args:
        model: file, folder, hub name or None, as it was given.
        name: of the flag.
        inside: a hub name may go on with a folder inside its repository.

    Raises:
        WeightsError: it can only be a place on this machine, and nothing is there; or it is an address, or no text.
    """
    if model is None:
        return
    text = str(model)
    if not isinstance(model, (str, pathlib.Path)) or not text.strip():
        raise WeightsError(f"{name} is given by its folder, file or hub name, got {shown(model)}")
    if "\0" in text or max(len(part.encode(errors="replace")) for part in text.split("/")) > 255:
        raise WeightsError(f"{name}: nothing can have the name {shown(text)}")
    near = text != "embedded" and difflib.get_close_matches(text.lower(), ["embedded"], cutoff=0.8)
    if near and not pathlib.Path(text).exists():
        raise WeightsError(f"no such file or folder: {shown(text)} ({name}): did you mean embedded?")
    hub = re.match(r"(?:(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/|hf://)([^/?#]+/[^/?#]+)", text)
    if (hub or "://" in text) and not pathlib.Path(text).exists():
        here = f", here {hub[1]}" if hub else ""
        raise WeightsError(f"{shown(text, 300)} ({name}) is an address: a hub repository is given as owner/name{here}")
    local = text.startswith(("/", ".", "~")) or "\\" in text or text.endswith(_MODEL_FILES)
    local = local or (text.count("/") > 1 and not inside)
    if local and not text.startswith("open_clip:") and not pathlib.Path(text).exists():
        raise WeightsError(f"no such file or folder: {shown(text, 300)} ({name})")


class MSDiffusionError(Exception):
    """Base of every error raised on purpose by this package. Its text may be printed: names of files in it, and what
    else comes from anybody, do nothing there.
    """

    def __str__(self) -> str:
        return error_text(super().__str__())


class LayoutError(MSDiffusionError, ValueError):
    """Boxes or masks that cannot be a layout: outside the picture, reversed, empty, or not four numbers."""


class PhraseError(MSDiffusionError, ValueError):
    """A phrase is not in the prompt, is cut off by the tokenizer's limit, or cannot be told from the others."""


class RequestError(MSDiffusionError, ValueError):
    """An argument cannot be honoured, or two arguments disagree."""


class DataError(MSDiffusionError, ValueError):
    """A dataset is missing, incomplete, or written to a schema this version does not know."""


class WeightsError(MSDiffusionError):
    """Weights are missing, incomplete, or belong to another architecture."""


class TrainingError(MSDiffusionError):
    """A training run cannot go on, though its settings, data and weights were fine: the message names the batch."""


@contextlib.contextmanager
def refused_weights() -> collections.abc.Iterator[None]:
    """What the common door for weights (``data_pipeline.models.weights``) refuses in this block is a WeightsError."""
    from data_pipeline.errors import InputError

    try:
        yield
    except InputError as error:
        raise WeightsError(str(error)) from None
