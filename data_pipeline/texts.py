"""Text as people's files hold it: one reader for captions, tables, annotations and items, whatever encoding, separator
or type they were written in. What is certain is read; what is not is an error that says what was found.
"""

import ast
import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO

from data_pipeline.errors import ClipError, InputError
from data_pipeline.pairs_format import MOST_CAPTION, fault_of_text

# UTF-32 first: its little-endian mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Without a mark, by which byte of each pair is zero.
UNMARKED = ((1, "utf-16-le"), (0, "utf-16-be"))
BLOCK = 1 << 20
UNREADABLE = "unreadable item"
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
MISSING = frozenset({"nan", "none", "null", "<na>", "nat"})
"""What programs write for a value that is not there."""
BROKEN, NOT_ASCII = re.compile("[\udc80-\udcff]"), re.compile("[^\x00-\x7f]")
NO_WINDOWS = re.compile(rb"[\x00-\x08\x0e-\x1f\x81\x8d\x8f\x90\x9d]|[\xa1-\xff]{4}")
"""Control characters, bytes that Windows-1252 does not have, and four letters above ASCII in a row: Cyrillic, Greek or
Chinese in an encoding of its own.
"""
WINDOWS_NOTE = "is no UTF-8 and was read as Windows-1252; save it as UTF-8 if letters look wrong"
SAVE = "save it as UTF-8"
SEVERAL = "several captions, of which the first was taken"


# ------------------------------------------------------------------------------------------------------------ encodings


def open_text(path: Path, notes: list[str] | None = None, newline: str | None = "") -> TextIO:
    """A file opened as text: UTF-8 or UTF-16 with or without a mark, UTF-32 with one, or Windows-1252 where it is
    certainly no UTF-8, which is said in ``notes``. InputError if it is none of these, or cannot be read.

    newline: as in ``open``.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        encoding = _encoding(file, str(path), notes)
        file.seek(0)
        return io.TextIOWrapper(file, encoding=encoding, newline=newline)
    except BaseException:
        file.close()
        raise


def read_text(path: Path, notes: list[str] | None = None) -> str:
    """The whole text of a file, see ``open_text``."""
    with open_text(path, notes) as file:
        return file.read()


def decode_text(content: bytes, name: str, notes: list[str] | None = None) -> str:
    """The text of a file's content, see ``open_text``. name: of the file, for messages."""
    return content.decode(_encoding(io.BytesIO(content), name, notes))


def _encoding(file: BinaryIO, name: str, notes: list[str] | None) -> str:
    start = file.read(4096)
    encoding = next((encoding for mark, encoding in MARKS if start.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and (zeros := start.count(0)) > len(start) // 4:
        # Letters of the Latin alphabet have a zero in every second byte, no letter but rare ones in the others.
        encoding = next((each for first, each in UNMARKED if start[first::2].count(0) == zeros), "")
        if not encoding:
            raise InputError(f"{name} looks like UTF-16 without a byte-order mark, or is no text: {SAVE}")
    file.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while block := file.read(BLOCK):
            decoder.decode(block)
        decoder.decode(b"", final=True)
        return encoding
    except UnicodeError as error:
        if encoding != "utf-8-sig":
            raise InputError(f"{name} begins as {encoding.upper()} but is none ({error}): {SAVE}") from error
    file.seek(0)
    _check_windows(file.read(), name)
    if notes is not None:
        notes.append(f"{name} {WINDOWS_NOTE}")
    return "cp1252"


def _check_windows(content: bytes, name: str) -> None:
    """InputError unless bytes that are no UTF-8 can well be Windows-1252: other alphabets, and UTF-8 with a damaged
    place, would become wrong letters without a word.
    """
    text = content.decode("utf-8", errors="surrogateescape")
    broken = len(BROKEN.findall(text))
    at = next(i for i, sign in enumerate(text) if BROKEN.match(sign))
    if len(NOT_ASCII.findall(text)) - broken >= broken:
        what, at = "is damaged UTF-8, or in an encoding of its own", len(text[:at].encode())
    elif strange := NO_WINDOWS.search(content):
        what, at = "is neither UTF-8, UTF-16 nor Windows-1252", strange.start()
    else:
        return
    line = content.count(b"\n", 0, at) + 1
    raise InputError(f"{name} {what}: line {line} has the bytes {content[at : at + 8].hex(' ')}; {SAVE}")


# --------------------------------------------------------------------------------------------------------------- values


def clean_caption(text: str) -> str:
    """White space and control characters become one space; half a surrogate pair, which no file can hold, U+FFFD."""
    text = re.sub(r"[\x00-\x1f\x7f]", " ", text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(text.split())


def as_text(value: Any, what: str) -> str:
    """The value, if it is a text; ClipError otherwise."""
    if not isinstance(value, str):
        raise ClipError(UNREADABLE, error=f"{what} must be a text, got {short(value)}")
    return value


def as_caption(value: Any, what: str) -> str:
    """A caption, cleaned; "" for None. Of several, a list of texts, it is the first that is not empty. ClipError for
    any other value, for a text of more than ``MOST_CAPTION`` characters, and for one that a program wrote as if it were
    a text: "['a dog', 'b']", "b'a dog'", "nan".
    """
    if value is None:
        return ""
    texts = value if isinstance(value, list | tuple) else [value]
    found = [clean_caption(as_text(text, what)) for text in texts if text is not None]
    for text in found:
        if fault := fault_of_text(text, MOST_CAPTION):
            raise ClipError(UNREADABLE, error=f"{what} {fault}")
        if text.casefold() in MISSING:
            error = f"{what} is {text!r}, which stands for a missing value: leave it empty"
            raise ClipError(UNREADABLE, error=error)
        if (kind := printed(text)) is not None:
            error = (
                f"{what} is a {kind} written as a text, {short(text)}: a text is needed (jsonl can hold lists of texts)"
            )
            raise ClipError(UNREADABLE, error=error)
    return next(filter(None, found), "")


def is_several(value: Any) -> bool:
    """Whether ``as_caption`` leaves captions of this value out."""
    return isinstance(value, list) and len([text for text in value if text]) > 1


def printed(text: str) -> str | None:
    """The type of the list, dict or bytes that a program printed into a text; None for a text of words."""
    if not re.match(r"[\[({]|[bB][\"']", text) or text[-1] not in "])}\"'":
        return None
    for read in (ast.literal_eval, json.loads):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return type(value).__name__ if isinstance(value, list | dict | tuple | set | bytes) else None
    return None


def counted(count: int, one: str, many: str = "") -> str:
    """Number and noun: "1 row", "2 rows". many: of a word whose plural is not one more s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def short(value: Any) -> str:
    """Type and beginning of a value, for a message."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else f'{text[:80]}...'}"


# --------------------------------------------------------------------------------------------------------------- tables


def plain_columns(names: Iterable[Any], place: str) -> list[str]:
    """Names of columns without their case and the spaces round them; InputError if two become the same."""
    plain = _plain(names)
    if twice := next((name for name in plain if name and plain.count(name) > 1), None):
        raise InputError(f"{place}: two columns are called {twice}")
    return plain


def _plain(names: Iterable[Any]) -> list[str]:
    return [str(name).replace("\ufeff", "").strip().casefold() for name in names]


def check_columns(found: Sequence[str], needed: Sequence[str], place: str) -> None:
    """InputError that names both if a needed column is not among those that were found."""
    if not set(needed) <= set(found):
        columns = f"column{'s' * (len(needed) > 1)} {' and '.join(filter(None, [', '.join(needed[:-1]), needed[-1]]))}"
        raise InputError(f"{place} needs the {columns}; found {', '.join(found) or 'none'}")


def read_csv(path: Path, needed: Sequence[str], notes: list[str] | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table in text with the number of the line that each begins in, from 1: by name of the column, in
    small letters and without spaces round it. Cells that a short row lacks are missing; rows of empty cells are left
    out.

    Columns are parted by commas, semicolons or tabs, by whichever gives the needed ones. InputError for a table without
    them, for a row with more fields than columns or without one of the needed ones, and for quotes that don't fit.
    """
    with open_text(path, notes) as file:
        columns, separator, last = _read_header(file, path, needed)
        rows = csv.reader(file, delimiter=separator, strict=True, skipinitialspace=True)
        header = first = last
        while True:
            first = last + 1
            try:
                cells = next(rows, None)
            except csv.Error as error:
                raise InputError(_quotes(error, path, first, header + rows.line_num)) from error
            if cells is None:
                return
            last = header + rows.line_num
            if not any(cell.strip() for cell in cells):
                continue
            place = f"{path}, line {first}"
            if len(cells) > len(columns):
                raise InputError(
                    f"{place} has {len(cells)} fields, but the table has {len(columns)} columns: a text with a "
                    f"{SEPARATORS[separator]} in it needs quotes round it"
                )
            row = dict(zip(columns, cells, strict=False))
            if missing := [name for name in needed if name not in row]:
                raise InputError(f"{place} has {len(cells)} of {len(columns)} fields: without {', '.join(missing)}")
            _check_swallowed(row, needed[0], separator, place)
            yield first, row


def _read_header(file: TextIO, path: Path, needed: Sequence[str]) -> tuple[list[str], str, int]:
    """Names of the columns, what parts them, and the number of lines that were read."""
    number, line = 0, "\n"
    while line and (not line.strip() or re.match(r"sep=.\s*$", line)):  # the second is Excel's
        line, number = file.readline(), number + 1
    line = line.rstrip("\r\n")
    found = {each: next(csv.reader([line], delimiter=each, skipinitialspace=True), []) for each in SEPARATORS}
    # The last one that has them, or else the one with the most columns, for the message.
    separator = max(SEPARATORS, key=lambda each: (set(needed) <= set(_plain(found[each])), len(found[each])))
    columns = plain_columns(found[separator], str(path))
    check_columns(columns, needed, str(path))
    return columns, separator, number


def _quotes(error: csv.Error, path: Path, first: int, last: int) -> str:
    """What an error of the csv module means, with the lines of the row."""
    if "unexpected end of data" in str(error):
        return f"{path}, line {first}: a quote is opened and never closed; it takes in all lines up to the end"
    place = f"{path}, line {first}" if first >= last else f"{path}, lines {first} to {last}"
    if "expected after" in str(error):
        return (
            f"{place}: text follows a closing quote: a quote is left open, or quotes inside a text are not doubled "
            '(""like this"")'
        )
    return f"{place}: {error}; is a quote left open?"


def _check_swallowed(row: Mapping[str, str], key: str, separator: str, place: str) -> None:
    """InputError if a line within a cell holds, in a field, what names a file as the row itself does: another row."""
    suffix = PurePosixPath(row[key].strip()).suffix.lower()
    lines = (line for cell in row.values() for line in re.split(r"[\r\n]+", cell)[1:]) if suffix else ()
    for parts in (line.split(separator) for line in lines):
        for part in parts:
            if len(parts) > 1 and part.strip(' "').lower().endswith(suffix):
                raise InputError(f"{place}: a quote is left open; it takes in the row of {part.strip()}")


def read_json_lines(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, Any]]:
    """The json values, one a line, with line numbers from 1; a ValueError for one that is no json; no empty lines."""
    # Lines end at "\n" only, not at what splitlines() knows besides: in json that may stand inside a text.
    with open_text(path, notes, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.lstrip("\ufeff")  # files that were joined have their marks inside
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, ValueError(f"line {number} is no json: {error}")
