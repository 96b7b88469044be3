"""What a message may repeat of others: the words of libraries, values that somebody gave. Standard library only."""

import re


def reason(error: BaseException) -> str:
    """The first line of what another library says, with the second where it ends in a colon.

    Without escape codes, and cut off after 500 characters.

    Of a pickle that is not opened, our own words: torch's, timm's and diffusers' go on to say how to run it all the
    same.
    """
    text = str(error)
    if type(error).__name__ == "UnpicklingError" or re.search("weights[_ ]only|unpickl", text, re.IGNORECASE):
        return "it is a pickle of more than tensors, which could run code when it is read"
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines[0] = f"{lines[0].rstrip()} {lines[1].strip()}"
    return lines[0][:500] if lines else type(error).__name__


def shown(value: object, limit: int = 80) -> str:
    """How a message quotes a value that somebody gave: on one line, and cut off after ``limit`` characters."""
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except ValueError:  # Python writes whole numbers of thousands of digits only when told to
        text = f"{type(value).__name__} of more digits than can be written"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(error: BaseException) -> str:
    """The kind and the first line of an error, for the evidence of a rejection.

    Without what PyAV adds from FFmpeg's log: whether it does, and of which file, depends on what else the process has
    done (torchvision 0.24 switches it on for all).
    """
    return f"{type(error).__name__}: {error}".partition("; last error log: ")[0].splitlines()[0][:200]
