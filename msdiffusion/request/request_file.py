"""Many requests in one YAML or JSON file: read and checked, every one of them, without torch.

    defaults:            # optional: arguments of MSDiffusion.generate for all pictures
      steps: 20
    pictures:
      - name: beach      # optional: of the file that is written
        prompt: a dog and a teapot on the beach
        images: [dog.png, [teapot.png, teapot_from_behind.png]]
        boxes: [[0, 0.25, 0.5, 0.75], [0.5, 0.25, 1, 0.75]]

Paths are relative to the file. A boundary: what comes in is not trusted, what goes out is checked.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdiffusion.errors import MSDiffusionError, RequestError, shown
from msdiffusion.request.pictures import open_content, refuse_address
from msdiffusion.request.request import OTHER_NAMES, GenerationRequest, RequestArguments, check_request

if TYPE_CHECKING:
    from PIL import Image

ARGUMENTS = (
    *("images", "boxes", "prompt", "phrases"),
    *(name for name in RequestArguments.__annotations__ if name not in ("output_type", "latents")),
)
"""Arguments of MSDiffusion.generate that say what is drawn; the others say how it is handed over."""
MAX_FILE_BYTES = 16 * 2**20
MAX_YAML_BYTES = 2**20
"""YAML is read slowly."""
MAX_DEPTH = 100
"""Of lists and mappings in one another."""
MAX_NAME, MAX_NAME_BYTES = 100, 200
"""Letters of a name, and bytes in UTF-8; file systems take 255, with number, suffix and mark of unfinished files."""
MAX_PICTURES = 100_000
"""Of one request: names for all of them are made before the first is drawn."""
_DEVICES = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9¹²³]", re.IGNORECASE)


@dataclass(frozen=True)
class Embedded:
    """A reference that travels inside a PNG: the bytes of its file."""

    content: bytes
    path: str
    """Where the file was, for messages."""

    def open(self) -> Image.Image:
        """The picture; RequestError where it is none."""
        return open_content(self.content, f"the embedded reference {shown(self.path)}")


@dataclass(frozen=True)
class Entry:
    """One request: checked arguments of MSDiffusion.generate, and what to call it."""

    where: str
    """For messages: its place in the file."""
    name: str
    """For the file that is written, without suffix."""
    arguments: Mapping[str, Any]
    """Those that were given, and ``phrases``. References are a Path or an Embedded each, or a list of such."""


def read_request_file(path: str | Path) -> list[Entry]:
    """Read a request file and check every request in it.

    Raises:
        RequestError: the file cannot be read, or requests in it are wrong; the message has a line for
            each of the first three.
    """
    path = Path(path)
    content = _parse(path)
    if not isinstance(content, Mapping):
        raise RequestError(f"{path} must be a mapping with the key pictures, got {shown(content)}")
    _check_keys(content, ("defaults", "pictures"), str(path))
    defaults, pictures = content.get("defaults"), content.get("pictures")
    defaults = {} if defaults is None else defaults
    if not isinstance(defaults, Mapping):
        raise RequestError(f"{path}: defaults must be a mapping of arguments, got {shown(defaults)}")
    _check_keys(defaults, ARGUMENTS, f"{path}: defaults")
    if not isinstance(pictures, list) or not pictures:
        raise RequestError(f"{path}: pictures must be a list with an entry per request, got {shown(pictures)}")
    if len(pictures) > MAX_PICTURES:
        raise RequestError(
            f"{path}: pictures has {len(pictures)} entries; {MAX_PICTURES} are drawn at most: use several files"
        )
    entries, errors, taken = [], [], {}
    for index, picture in enumerate(pictures):
        where = f"pictures[{index}]"
        try:
            if not isinstance(picture, Mapping):
                raise RequestError(f"must be a mapping of arguments, got {shown(picture)}")
            _check_keys(picture, ("name", *ARGUMENTS), "")
            name = _check_name(picture.get("name"), index)
            where += f" ({name})" if "name" in picture else ""
            given = {key: value for key, value in picture.items() if key != "name"}
            entry = check_entry({**defaults, **given}, path.parent, where, name)
            _claim_names(entry, taken)
            entries.append(entry)
        except MSDiffusionError as error:
            errors.append(f"{where}: {error}")
    if len(errors) == 1:
        raise RequestError(f"{path}: {errors[0]}")
    if errors:
        more = [f"and {len(errors) - 3} more"] if len(errors) > 3 else []
        lines = "\n  ".join([*errors[:3], *more])
        raise RequestError(f"{path}: {len(errors)} of {len(pictures)} entries are wrong:\n  {lines}")
    return entries


def check_entry(arguments: Mapping[str, Any], folder: Path, where: str, name: str) -> Entry:
    """Check one request; its references are opened, and closed again.

    Args:
        arguments: of MSDiffusion.generate; None is as good as left out. References are paths relative to ``folder``, or
            Embedded.
        folder: of the file that says so.
        where: what messages call it.
        name: of the file to write.

    Raises:
        RequestError, LayoutError, PhraseError: an argument cannot be honoured, or is unknown.
    """
    _check_keys(arguments, ARGUMENTS, "")
    given = {key: value for key, value in arguments.items() if value is not None}
    for key in ("prompt", "images"):
        if key not in given:
            raise RequestError(f"{key} is missing")
    if not isinstance(given["prompt"], str):
        raise RequestError(f"prompt must be text, got {shown(given['prompt'])}: quote it")
    for key in ("images", "masks"):
        if key in given:
            given[key] = _references(given[key], folder, key)
    request = open_request(given)
    given["phrases"] = _per_subject(request.subjects.phrases, given["images"])
    return Entry(where, name, given)


def open_request(arguments: Mapping[str, Any]) -> GenerationRequest:
    """``check_request`` of an entry's arguments, with its references opened."""
    opened = with_embedded_opened(arguments)
    opened.setdefault("boxes", None)
    try:
        return check_request(**opened)
    except RecursionError:
        raise RequestError("an argument is nested too deeply") from None


def with_embedded_opened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """An entry's arguments as generate takes them: embedded references as pictures; RequestError where one is none."""

    def opened(reference: Any) -> Any:
        return reference.open() if isinstance(reference, Embedded) else reference

    given = {key: value for key, value in arguments.items() if value is not None}
    return {
        key: for_each_reference(value, opened) if key in ("images", "masks") else value for key, value in given.items()
    }


def for_each_reference(references: Sequence[Any], function: Callable[[Any], Any]) -> list[Any]:
    """The references with a function applied to each, None and lists of views kept."""
    return [
        None if item is None else [function(view) for view in item] if isinstance(item, list) else function(item)
        for item in references
    ]


def is_file(path: Path) -> bool:
    """Whether a file is there; False, and no error, also of names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _parse(path: Path) -> Any:
    if not is_file(path):
        raise RequestError(f"no such file: {path}")
    is_json, size = path.suffix.lower() == ".json", path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise RequestError(f"{path} has more than {MAX_FILE_BYTES // 2**20} MiB, which is no request file")
    if size > MAX_YAML_BYTES and not is_json:
        raise RequestError(
            f"{path} has {size:,} bytes; of YAML {MAX_YAML_BYTES:,} are read at most: put what repeats under defaults, "
            f"or write it as .json, of which {MAX_FILE_BYTES:,} are read"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read as text in UTF-8: {error}") from None
    return parse_json(text, str(path)) if is_json else _parse_yaml(text, path)


def parse_json(text: str, source: str) -> Any:
    """JSON; RequestError for keys given twice, NaN, infinity, and what is nested too deeply, in ``source``."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise RequestError(f"{source}: the key {shown(key)} is given twice")
            found[key] = value
        return found

    def refuse(word: str) -> None:
        raise RequestError(f"{source}: {word} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise RequestError(f"{source} is nested too deeply") from None
    except RequestError:
        raise
    except ValueError as error:  # also whole numbers of thousands of digits
        raise RequestError(f"{source} is not JSON: {error}") from None


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml

    parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, which PyYAML's wheels bring

    class Loader(parser):
        """Plain data only, without duplicate keys."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            # YAML 1.1 reads 0123 as an octal number, and 12:30:45 to the base of 60: nobody means that.
            number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            if number and re.fullmatch(r"[-+]?0[0-7_]+|[^:]*:.*", str(node.value)):
                line = node.start_mark.line + 1
                raise RequestError(
                    f"{path}, line {line}: {shown(node.value)} is another number in YAML: write it without zeros in "
                    "front or colons, or in quotes if it is text"
                )
            return super().construct_object(node, deep)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                name = str(key.value)  # of a mapping or list as key, which is refused anyway, something long
                if name in seen:
                    line = key.start_mark.line + 1
                    raise RequestError(f"{path}, line {line}: the key {shown(name)} is given twice")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        depth = 0
        for event in yaml.parse(text, Loader=parser):  # before anything is built: aliases may grow without bounds
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise RequestError(f"{path}, line {line}: aliases (*) are not read; put what repeats under defaults")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise RequestError(f"{path} is nested too deeply")
        return yaml.load(text, Loader=Loader)
    except RequestError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and "\t" in "".join(text.splitlines()[mark.line : mark.line + 1])[: mark.column + 1]:
            raise RequestError(
                f"{path}, line {mark.line + 1}: a tab is there, which YAML takes neither for blanks nor in front: put "
                "blanks in its place"
            ) from None
        raise RequestError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except Exception as error:  # of values that aren't what their tag says (!!bool x), PyYAML raises many things
        raise RequestError(f"{path} is not YAML: {' '.join(f'{type(error).__name__}: {error}'.split())}") from None


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = [OTHER_NAMES.get(str(key))] if OTHER_NAMES.get(str(key)) in known else []
            near = near or difflib.get_close_matches(str(key)[:100], known, n=1)
            hint = f"; is {near[0]} meant?" if near else f"; known: {', '.join(known)}"
            raise RequestError(f"{where + ': ' if where else ''}unknown key {shown(key)}{hint}")


def _check_name(name: Any, index: int) -> str:
    if name is None:
        return f"{index:04d}"
    if not isinstance(name, str):
        raise RequestError(f"name must be text, got {shown(name)}: quote it")
    # One file in one folder on every system: no separators, no hidden files, nothing that Windows would cut off.
    if len(name) > MAX_NAME or not re.fullmatch(r"\w(?:[\w .+-]*[\w+-])?", name):
        raise RequestError(
            f"name must be at most {MAX_NAME} letters, digits, spaces, or any of . _ + -, and begin and end with a "
            f"letter or digit, got {shown(name)}"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise RequestError(f"name must be at most {MAX_NAME_BYTES} bytes in UTF-8, got {shown(name)}")
    if _DEVICES.fullmatch(name.partition(".")[0].strip()):
        raise RequestError(f"name {shown(name)} is a device on Windows: give another")
    return name


def picture_names(entry: Entry) -> list[str]:
    """Names of an entry's pictures without suffix: its own, or with numbers where it has several."""
    count = entry.arguments.get("num_images", 1)
    return [entry.name] if count == 1 else [f"{entry.name}_{number}" for number in range(count)]


def _claim_names(entry: Entry, taken: dict[str, str]) -> None:
    names = picture_names(entry)
    if len(taken) + len(names) > MAX_PICTURES:
        raise RequestError(f"with its {len(names)} the file asks for more than {MAX_PICTURES} pictures: use several")
    for name in names:
        other = taken.setdefault(name.casefold(), entry.where)  # Beach.png and beach.png are one file on some systems
        if other != entry.where:
            raise RequestError(f"its picture would be called {name!r}, as that of {other}: give another name")


def _references(values: Any, folder: Path, key: str) -> list[Any]:
    if not isinstance(values, list):
        raise RequestError(f"{key} must be a list with one item per subject, got {shown(values)}")
    found = []
    for index, value in enumerate(values):
        name = f"{key}[{index}]"
        if value is None and key == "masks":
            found.append(None)
        elif isinstance(value, list) and key == "images":
            found.append([_reference(view, folder, f"{name}[{number}]") for number, view in enumerate(value)])
        else:
            found.append(_reference(value, folder, name))
    return found


def _reference(value: Any, folder: Path, name: str) -> Path | Embedded:
    if isinstance(value, Embedded):
        return value
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value):
        raise RequestError(f"{name} must be the path of a picture, got {shown(value)}")
    if isinstance(value, str):
        refuse_address(value, name)
    return folder / value


def _per_subject(values: Sequence[Any], images: Sequence[Any]) -> list[Any]:
    """One value per subject out of one per view."""
    found, position = [], 0
    for image in images:
        found.append(values[position])
        position += len(image) if isinstance(image, list) else 1
    return found
