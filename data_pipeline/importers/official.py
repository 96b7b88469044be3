"""Items in the layout of the official MS-Diffusion dataset class (https://github.com/MS-Diffusion/MS-Diffusion,
``msdiffusion/dataset/datagenerator.py``): read from .json, .jsonl or .parquet.

An item is ``{text, image_file, reference_image_files, image_boxes, reference_image_boxes, reference_image_masks,
image_phrases}``, flat or under the key ``datas``. Boxes are xyxy in pixels of the original pictures. Pickled files are
refused: reading one runs whatever code is in it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from data_pipeline.errors import ClipError, InputError
from data_pipeline.importers.items import Broken, ImportItem, ImportSubject, as_list
from data_pipeline.texts import UNREADABLE, as_caption, as_text, clean_caption, open_text, read_json_lines

SUFFIXES = (".json", ".jsonl", ".parquet")
PICKLED = frozenset({".pkl", ".pickle", ".pt", ".pth", ".npy", ".npz", ".joblib"})
FIELDS = ("text", "image_file", "reference_image_files", "image_boxes", "reference_image_boxes", "image_phrases")
LISTS = ("image_phrases", "image_boxes", "reference_image_files", "reference_image_boxes")
BLOCK = 1 << 20
NOT_SPACE = re.compile(r"\S")


def check_items_file(path: Path) -> None:
    """InputError if there is no such file, or if it is of a kind that is not read."""
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        raise InputError(
            f"{path} may hold a pickle, and reading a pickle runs whatever code is in it, so it is not read. If you "
            "trust the file, write its items as json with the program that made it, one a line, and give the .jsonl"
        )
    if suffix not in SUFFIXES:
        raise InputError(f"items are read from {', '.join(SUFFIXES)}, got {path.name}")
    if not path.is_file():
        raise InputError(f"no file of items at {path}")


def read_official(path: Path, normalised: bool, notes: list[str] | None = None) -> Iterator[ImportItem | Broken]:
    """The items of a file, one at a time; what cannot be read of one is told in its place.

    normalised: boxes are fractions of the pictures, not pixels. notes: takes what was assumed. InputError if the file
    as a whole cannot be read.
    """
    readers = {".json": _read_json, ".jsonl": _read_lines, ".parquet": _read_parquet}
    for number, content in enumerate(readers[path.suffix.lower()](path, notes)):
        name = f"item {number}"
        if isinstance(content, Broken):
            yield content
            continue
        try:
            if isinstance(content, Mapping) and isinstance(content.get("datas"), Mapping):
                content = content["datas"]
            yield to_item(content, normalised)
        except ClipError as error:
            if isinstance(content, Mapping) and isinstance(content.get("image_file"), str):
                name = content["image_file"]
            yield Broken(name=name, reason=error.reason, evidence={**error.evidence, "item": number})


def to_item(content: Any, normalised: bool) -> ImportItem:
    """One item. ClipError if a field is missing or of another type, or if its lists are of different lengths."""
    if not isinstance(content, Mapping):
        raise ClipError(UNREADABLE, error=f"an item is an object, got a {type(content).__name__}")
    if missing := [name for name in FIELDS if name not in content]:
        raise ClipError(UNREADABLE, error=f"without {', '.join(missing)}; found {', '.join(map(str, content))[:200]}")
    for name in ("image_file", "reference_image_files"):
        values = content[name] if isinstance(content[name], list) else [content[name]]
        if any(isinstance(value, bytes | Mapping) for value in values):
            raise ClipError("pictures inside the table", field=name, needed="names of files below --images")
    phrases, boxes, references, reference_boxes = (as_list(content[name], name) for name in LISTS)
    masks = content.get("reference_image_masks")
    masks = [None] * len(phrases) if masks is None else as_list(masks, "reference_image_masks")
    lengths = {name: len(content[name]) for name in LISTS} | {"reference_image_masks": len(masks)}
    if len(set(lengths.values())) > 1:
        raise ClipError("lists of different lengths", **lengths)
    return ImportItem(
        target=as_text(content["image_file"], "image_file"),
        caption=as_caption(as_text(content["text"], "text"), "text"),
        subjects=tuple(
            ImportSubject(
                phrase=clean_caption(as_text(phrase, "a phrase")),
                box=box,
                reference=as_text(reference, "a reference_image_file"),
                reference_box=reference_box,
                mask=mask,
            )
            for phrase, box, reference, reference_box, mask in zip(
                phrases, boxes, references, reference_boxes, masks, strict=True
            )
        ),
        normalised=normalised,
    )


def _read_lines(path: Path, notes: list[str] | None = None) -> Iterator[Any]:
    for number, value in read_json_lines(path, notes):
        if isinstance(value, ValueError):
            value = Broken(name=f"line {number}", reason=UNREADABLE, evidence={"error": str(value)})
        yield value


def _read_json(path: Path, notes: list[str] | None = None) -> Iterator[Any]:
    """The elements of a json list, read piece by piece: with masks such a file may be larger than the memory."""
    decoder = json.JSONDecoder()
    with open_text(path, notes) as file:
        text = _Window(path, file)
        if text.next_sign() != "[":
            raise InputError(
                f"{path}: a .json of items is one list, [{{...}}, ...], but it begins with {text.ahead()!r}; a file "
                "with one item in each line is a .jsonl"
            )
        text.skip()
        number = 0
        while text.next_sign() != "]":
            if number:
                if text.next_sign() != ",":
                    raise InputError(
                        f"{path}: after item {number - 1} comes {text.ahead()!r}, not a comma or a bracket"
                    )
                text.skip()
                text.next_sign()
            yield text.decode(decoder, number)
            number += 1
        text.skip()
        if text.next_sign():
            raise InputError(f"{path} is no json: after the end of the list comes {text.ahead()!r}")


class _Window:
    """The part of a text file that is being read."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._text, self._place = "", 0

    def _more(self, size: int) -> bool:
        block = self._file.read(size)
        self._text, self._place = self._text[self._place :] + block, 0
        return bool(block)

    def next_sign(self) -> str:
        """The next character that is no white space, not taken; "" at the end of the file."""
        while True:
            found = NOT_SPACE.search(self._text, self._place)
            if found:
                self._place = found.start()
                return found[0]
            self._place = len(self._text)
            if not self._more(BLOCK):
                return ""

    def ahead(self) -> str:
        """A few characters from here, for a message; "the end of the file" there."""
        return self._text[self._place :][:20] or "the end of the file"

    def skip(self) -> None:
        """Takes one character."""
        self._place += 1

    def decode(self, decoder: json.JSONDecoder, number: int) -> Any:
        """Takes one json value. An item longer than what was read is tried again, each time with twice as much."""
        size = BLOCK
        while True:
            try:
                item, self._place = decoder.raw_decode(self._text, self._place)
                return item
            except RecursionError as error:
                raise InputError(f"{self._path}: item {number} is nested too deeply") from error
            except ValueError as error:
                if not self._more(size):
                    raise InputError(
                        f"{self._path}: item {number} is no json, or the file breaks off ({error}): copy it again"
                    ) from error
                size *= 2


def _read_parquet(path: Path, notes: list[str] | None = None) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
