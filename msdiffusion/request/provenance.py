"""What a picture was drawn from, as JSON inside its PNG: written with it, read back and checked without torch.

The text chunk ``msdiffusion`` holds the request with everything resolved, the references by path and sha256 (or whole),
the model, and the versions. A PNG may come from anyone, so what is read is checked like a request file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from msdiffusion.environment import DTYPES
from msdiffusion.errors import MSDiffusionError, RequestError, shown
from msdiffusion.files import file_sha256, written
from msdiffusion.request.request import MAX_BATCH
from msdiffusion.request.request_file import (
    ARGUMENTS,
    Embedded,
    Entry,
    check_entry,
    for_each_reference,
    is_file,
    parse_json,
    with_embedded_opened,
)

KEY = "msdiffusion"
"""Keyword of the text chunk."""
SCHEMA = "msdiffusion.picture/2"
MAX_EMBEDDED_BYTES = 16 * 2**20
"""Of all embedded references of a picture together. Pillow reads at most 64 MiB of text."""
MAX_RECORD_CHARACTERS = MAX_EMBEDDED_BYTES * 4 // 3 + 2**20
MAX_PNG_BYTES = 512 * 2**20
REQUEST_KEYS = tuple(name for name in ARGUMENTS if name != "num_images")  # a file holds one picture
_SHAPE: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "model": {
        **dict.fromkeys(("adapter", "adapter_sha256", "adapter_config", "base_model", "image_encoder"), (str,)),
        "base_config": (str, type(None)),
        "dtype": (str,),
    },
    "hooks": {"safety_checker": (str, type(None)), "watermark": (str, type(None))},
    "batch": {"size": (int,), "position": (int,)},
    "made_with": dict.fromkeys(("msdiffusion", "torch", "diffusers", "device", "processor", "arithmetic"), (str,)),
}
_LATER = {"processor", "arithmetic"}
"""Keys that files of earlier versions don't have."""


def request_record(arguments: Mapping[str, Any], folder: Path, *, embed: bool = False) -> dict[str, Any]:
    """The part ``request`` of a record: one picture's arguments as JSON can say them.

    Args:
        arguments: of an Entry, with ``phrases``.
        folder: where the PNG will be; paths are written relative to it.
        embed: put the references' files in whole.

    Raises:
        RequestError: a reference cannot be read, or the references are too large to embed.
    """
    room = MAX_EMBEDDED_BYTES

    def reference(item: Path | Embedded) -> dict[str, str]:
        nonlocal room
        if isinstance(item, Path) and not embed:
            return {"path": _relative(item, folder), "sha256": file_sha256(item)}
        content = item.content if isinstance(item, Embedded) else _content(item, room)
        room -= len(content)
        if room < 0:
            raise RequestError(
                f"the references have more than {MAX_EMBEDDED_BYTES // 2**20} MiB together, too much to embed in a "
                "PNG: scale them down, or don't embed them"
            )
        path = item.path if isinstance(item, Embedded) else _relative(item, folder)
        encoded = base64.b64encode(content).decode()
        return {"path": path, "sha256": hashlib.sha256(content).hexdigest(), "content": encoded}

    record = {name: arguments.get(name) for name in REQUEST_KEYS if name not in ("images", "masks")}
    record = json.loads(json.dumps(record, allow_nan=False))  # as it will be read again: lists, no tuples
    views = [item if isinstance(item, list) else [item] for item in arguments["images"]]
    record["images"] = for_each_reference(views, reference)
    masks = arguments.get("masks")
    record["masks"] = None if masks is None else for_each_reference(masks, reference)
    return record


def save_png(picture: Image.Image, path: Path, record: Mapping[str, Any]) -> None:
    """Write a picture with its record, at once or not at all; RequestError where it cannot be written."""
    info = PngInfo()
    info.add_text(KEY, json.dumps(record, allow_nan=False))
    save_at_once(picture, path, pnginfo=info)


def save_at_once(picture: Image.Image, path: Path, **options: Any) -> None:
    """Write a picture, in the format of the suffix, at once or not at all; RequestError where it cannot be written."""
    with written(path) as unfinished:
        picture.save(unfinished, **options)


def read_record(source: str | Path | Image.Image) -> dict[str, Any]:
    """The record of a picture: a PNG's path, or a PIL picture that was opened from one (its ``info`` is read).

    The record's own structure is checked here; the request in it by ``read_request``.

    Raises:
        RequestError: no such file, no PNG, without a record, or with one that is broken or of another version.
    """
    name = "the picture" if isinstance(source, Image.Image) else str(source)
    text = _text_of(source, name)
    if not isinstance(text, str):
        raise RequestError(f"{name} has no metadata of msdiffusion: only PNGs that msdiffusion generate wrote have it")
    if len(text) > MAX_RECORD_CHARACTERS:
        raise RequestError(f"{name}: its metadata has {len(text)} characters; {MAX_RECORD_CHARACTERS} are read at most")
    record = parse_json(text, f"{name}: its metadata")
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise RequestError(f"{name}: its metadata has schema {shown(schema)}; this version reads {SCHEMA!r}")
    wrong = _wrong_part(record)
    if wrong is not None:
        raise RequestError(f"{name}: its metadata is broken: {wrong}")
    return record


def read_request(source: str | Path | Image.Image) -> dict[str, Any]:
    """Arguments of ``MSDiffusion.generate`` that draw a picture of ``msdiffusion generate`` again.

    Args:
        source: a PNG's path, or a PIL picture opened from one. Paths of references are relative to the PNG's folder
            (of a picture that knows no file: the working directory).

    Returns:
        Keyword arguments; references are paths, or PIL pictures where they were embedded.

    Raises:
        RequestError, LayoutError, PhraseError: as read_record; or a reference is missing or has another content, or
            the request cannot be honoured.
    """
    arguments = with_embedded_opened(entry_of(source, read_record(source)).arguments)
    return {"boxes": None, **arguments}  # which generate asks for, unlike what else may be None


def entry_of(source: str | Path | Image.Image, record: Mapping[str, Any]) -> Entry:
    """The request of a record that ``read_record`` gave, checked, with its references found and compared.

    Raises:
        RequestError, LayoutError, PhraseError: as read_request.
    """
    file = getattr(source, "filename", "") if isinstance(source, Image.Image) else source
    name = str(file) or "the picture"
    folder = Path(file).parent.absolute()  # a relative one would be put before the references a second time
    try:
        arguments = dict(record["request"])
        for key in ("images", "masks"):
            if arguments.get(key) is not None:
                arguments[key] = for_each_reference(arguments[key], lambda item: _found(item, folder))
        return check_entry(arguments, folder, name, Path(file).stem)
    except MSDiffusionError as error:
        raise type(error)(f"{name}: {error}") from None


def same_request(planned: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether a record found in a PNG is of the picture that is planned.

    Seeds are compared unless the planned one is None. Where references lie, which versions drew the picture, and in
    which batch, makes no difference.
    """
    return _essence(planned, planned) == _essence(found, planned)


def _essence(record: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, Any]:
    request = dict(record["request"])
    if planned["request"]["seed"] is None:
        request["seed"] = None
    for name in record["left_out"]:  # the model's own size, which a plan doesn't know
        request[name] = None
    for key in ("images", "masks"):
        if request[key] is not None:
            request[key] = for_each_reference(request[key], lambda item: item["sha256"])
    model = {name: value for name, value in record["model"].items() if name != "adapter"}
    return {"request": request, "model": model, "hooks": record["hooks"]}


def _text_of(source: str | Path | Image.Image, name: str) -> Any:
    """The text chunk, also where another program has put it behind the pixels, which then have to be read."""
    given = isinstance(source, Image.Image)
    if not given:
        if not is_file(Path(source)):
            raise RequestError(f"no such file: {name}")
        if Path(source).stat().st_size > MAX_PNG_BYTES:
            raise RequestError(f"{name} has more than {MAX_PNG_BYTES // 2**20} MiB, which is no picture of ours")
    try:
        with nullcontext(source) if given else Image.open(source, formats=["PNG"]) as picture:
            if KEY not in picture.info:
                picture.load()
            return picture.info.get(KEY)
    except Exception as error:  # of broken files pillow raises many things
        raise RequestError(f"{name} is not a PNG that can be read: {error}") from None


def _wrong_part(record: Mapping[str, Any]) -> str | None:
    """What is wrong with the structure of a record, if anything."""
    wanted = {"schema", "request", "left_out", "flagged", *_SHAPE}
    if set(record) != wanted:
        return f"its keys must be {', '.join(sorted(wanted))}"
    for part, shape in _SHAPE.items():
        value = record[part]
        if not isinstance(value, dict) or not set(shape) - _LATER <= set(value) <= set(shape):
            return f"{part} must have the keys {', '.join(sorted(shape))}"
        for name in value:
            types = shape[name]
            if not isinstance(value[name], types) or isinstance(value[name], bool):
                return f"{part}.{name} is {shown(value[name])}"
    if record["model"]["dtype"] not in DTYPES:
        return f"model.dtype is {shown(record['model']['dtype'])}"
    if not 0 <= record["batch"]["position"] < record["batch"]["size"]:
        return f"batch is {shown(record['batch'])}"
    if record["batch"]["size"] > MAX_BATCH:
        return f"batch.size is {record['batch']['size']}, more than {MAX_BATCH}"
    if record["left_out"] not in ([], ["height"], ["width"], ["height", "width"]):
        return f"left_out is {shown(record['left_out'])}"
    if not isinstance(record["flagged"], bool):
        return f"flagged is {shown(record['flagged'])}"
    request = record["request"]
    if not isinstance(request, dict) or set(request) != set(REQUEST_KEYS):
        return f"request must have the keys {', '.join(REQUEST_KEYS)}"
    images, masks = request["images"], request["masks"]
    if not isinstance(images, list) or not all(isinstance(views, list) and views for views in images):
        return "request.images must be lists of references"
    if masks is not None and not isinstance(masks, list):
        return "request.masks must be a list of references"
    references = [*(item for views in images for item in views), *(item for item in masks or [] if item is not None)]
    if not all(_is_reference(item) for item in references):
        return "a reference must have path and sha256, and may have content"
    if type(request["seed"]) is not int:
        return f"request.seed is {shown(request['seed'])}"
    return None


def _is_reference(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and {"path", "sha256"} <= set(item) <= {"path", "sha256", "content"}
        and all(isinstance(value, str) for value in item.values())
    )


def _found(item: Mapping[str, str], folder: Path) -> Path | Embedded:
    """The reference that a record speaks of, if it still is what it was."""
    name = shown(item["path"])
    if "content" in item:
        try:
            content = base64.b64decode(item["content"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"the embedded reference {name} is broken: {error}") from None
        if hashlib.sha256(content).hexdigest() != item["sha256"]:
            raise RequestError(f"the embedded reference {name} is broken: its sha256 is another")
        return Embedded(content, item["path"])
    if "\0" in item["path"]:
        raise RequestError(f"a reference cannot be called {name}")
    path = folder / item["path"]
    if not is_file(path):
        raise RequestError(f"the reference {name} is missing: no such file {shown(str(path), 300)}")
    if file_sha256(path) != item["sha256"]:
        raise RequestError(
            f"the reference {path} has other content than when the picture was drawn (its sha256 differs)"
        )
    return path


def _content(path: Path, limit: int) -> bytes:
    """A file's bytes; of one that is too large just enough to tell."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error}") from None


def _relative(path: Path, folder: Path) -> str:
    """How to get from the PNG's folder to a file; absolute where there is no such way (another drive)."""
    try:
        return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()
