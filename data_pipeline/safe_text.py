"""Text of files on its way to people: to a terminal, which obeys escape sequences, or into a page, which obeys tags.

Captions, names, paths and counts of a dataset may come from anybody. Nothing here repairs them: they are shown as they
are, and do nothing.
"""

import os
import re
import sys
from functools import cache
from typing import Any

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but line end and tab, what turns the direction of text, and halves of characters."""

MOST_MESSAGE = 2500
"""Characters of an error."""


def visible(text: object) -> str:
    r"""Lines for a terminal: control characters as ``\x1b``, a file name's odd bytes as ``\xff``."""
    return _OBEYED.sub(_written_out, str(text))


def error_text(text: str) -> str:
    """Of an error: ``visible``, and without the middle where it quotes somebody's value of thousands of characters."""
    text = visible(text)
    return text if len(text) <= MOST_MESSAGE else f"{text[:1500]} [... of {len(text):,} characters ...] {text[-500:]}"


def visible_line(text: object) -> str:
    r"""One line for a terminal: ``visible``, and ends of lines as ``\n``."""
    return visible(text).replace("\n", "\\n")


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    code = code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code  # a byte of a file name that is no UTF-8
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def write_anything() -> None:
    """Letters that standard output cannot encode are written out from now on, instead of ending a command's work."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")


def nobody_reads() -> int:
    """After a BrokenPipeError of standard output (a command | head): what is left goes nowhere. Returns the status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def printable(text: str) -> str:
    """The text without halves of characters, which file names can hold and no encoding knows."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class Html(str):
    """A text that is HTML: templates take it as it is. Only ``html`` makes some."""

    __slots__ = ()

    def __html__(self) -> str:
        return str(self)


@cache
def _template(source: str) -> Any:
    from jinja2 import Environment, StrictUndefined

    def plain(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not isinstance(value, Html) else value

    how = {"trim_blocks": True, "keep_trailing_newline": True}
    return Environment(autoescape=True, undefined=StrictUndefined, finalize=plain, **how).from_string(source)


def html(template: str, **values: Any) -> Html:
    """A page, or a part of one, from a template of jinja2 that escapes every value: all HTML of this project is made
    here. What it returns stands in another template as it is.

    template: in jinja2's language, without a value in it. values: what it names; one that is missing is an error.
    """
    return Html(_template(template).render(values))
