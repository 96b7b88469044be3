"""Pictures in a folder, with captions and boxes beside them: single frames.

Captions: a row of metadata.jsonl or metadata.csv, ``picture.txt`` or ``picture.json``. Boxes: the row, a COCO file, or
``picture.annotations.json``. All are specified in docs/importing_pairs.md.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.captions import read_sidecar_caption
from data_pipeline.errors import ClipError, InputError
from data_pipeline.file_names import annotations_beside, is_hidden, on_disk, path_parts
from data_pipeline.importers.items import OUTSIDE, Broken, ImportItem, ImportSubject, as_list
from data_pipeline.pairs_format import ANNOTATIONS_SCHEMA, MOST_JSON_BYTES
from data_pipeline.texts import (
    SEVERAL,
    UNREADABLE,
    as_caption,
    as_text,
    clean_caption,
    counted,
    decode_text,
    is_several,
    open_text,
    plain_columns,
    read_csv,
    read_json_lines,
    read_text,
)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
METADATA = ("metadata.jsonl", "metadata.csv")
OBJECT_COLUMNS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("left", "top", "width", "height"),
    ("x", "y", "w", "h"),
    ("x", "y", "width", "height"),
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
    ("bbox",),
    ("box",),
)
"""Columns, in small letters, of tables that have a row per object: Open Images, TensorFlow's, VIA, ..."""
CAPTION_COLUMNS = ("text", "caption")
JSON_COLUMNS = ("boxes", "phrases", "masks", "objects")
Row = Mapping[str, Any]


def list_pictures(folder: Path, notes: list[str] | None = None) -> list[str]:
    """Paths of all pictures below a folder, in order. Hidden ones, those of a trash and those of datasets that this
    program has written there are left out, and links to folders, which ``notes`` takes. InputError if there is none, or
    if a folder cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"no folder of pictures at {folder}")

    def refuse(error: OSError) -> None:
        raise InputError(f"the folder {error.filename} cannot be read: {error.strerror}") from error

    found, links = [], []
    for place, folders, files in os.walk(folder, onerror=refuse):
        if Path(place) != folder and ("build.json" in files or ".mining" in folders):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        links += [path.relative_to(folder).as_posix() for name in folders if (path := Path(place, name)).is_symlink()]
        found += [
            Path(place, name).relative_to(folder).as_posix()
            for name in files
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    told = f"{counted(len(links), 'link')} to folders not followed, the first one {min(links)!r}" if links else ""
    if not found:
        looked = f"looked for *{', *'.join(SUFFIXES)}, in subfolders too"
        raise InputError(f"no pictures in {folder}: {'; '.join(filter(None, [looked, told]))}")
    if told and notes is not None:
        notes.append(told)
    return sorted(found)


def find_metadata(folder: Path, given: Path | None) -> Path | None:
    """The table of the pictures: the one that was given, or metadata.jsonl or metadata.csv in the folder. InputError if
    it is missing, or if there are two, or if it lies in a subfolder.
    """
    if given is not None:
        if not given.is_file():
            raise InputError(f"--metadata: no file at {given}")
        if given.suffix.lower() not in (".jsonl", ".csv"):
            raise InputError(f"--metadata is a .jsonl or .csv, got {given.name}")
        return given
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} has both {METADATA[0]} and {METADATA[1]}: choose one with --metadata FILE")
    if not found:
        for name in METADATA:
            if nested := sorted(folder.glob(f"*/{name}")):
                raise InputError(
                    f"{nested[0]} lies in a subfolder; names in it are below that folder. Import {nested[0].parent} "
                    "on its own, or choose a table with --metadata FILE"
                )
    return found[0] if found else None


def read_metadata(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, Row | ClipError]]:
    """The rows of a table with their line numbers, a ClipError in place of one that is no json. InputError for a table
    without the column file_name. notes: takes what was assumed.
    """
    if path.suffix.lower() != ".jsonl":
        _refuse_objects(path)
        for number, row in read_csv(path, ("file_name",), notes):
            yield number, _json_cells(row)
        return
    for number, row in read_json_lines(path, notes):
        if isinstance(row, ValueError):
            yield number, ClipError(UNREADABLE, error=str(row))
            continue
        if isinstance(row, dict):
            row = dict(zip(plain_columns(row, f"{path}, line {number}"), row.values(), strict=True))
        known = isinstance(row, dict) and isinstance(row.get("file_name"), str)
        yield number, row if known else ClipError(UNREADABLE, error=f"line {number} is no object with a text file_name")


def _refuse_objects(path: Path) -> None:
    """InputError for a table with a row per object, whose pictures would come without boxes, or many times."""
    with open_text(path) as file:
        columns = {name.strip(" \"'").lower() for name in re.split(r"[,;\t]", file.readline().strip())}
    found = next((names for names in OBJECT_COLUMNS if set(names) <= columns), None)
    if found is not None and not {"boxes", "objects"} & columns:
        raise InputError(
            f"{path} has a row per object (columns {', '.join(found)}), but a table here has a row per picture, all of "
            "its boxes in the column boxes as json: [[x1, y1, x2, y2], ...]. Objects in rows are best turned into a "
            "COCO file (images, annotations, categories), which --annotations FILE reads"
        )


def _json_cells(row: Mapping[str, Any]) -> Row | ClipError:
    """A row of a csv, whose lists are written as json."""
    content: dict[str, Any] = {name: value for name, value in row.items() if value}
    for name in JSON_COLUMNS:
        if name in content:
            try:
                content[name] = json.loads(content[name])
            except (ValueError, RecursionError, TypeError) as error:
                return ClipError(UNREADABLE, error=f"the column {name} of {row.get('file_name')!r} is no json: {error}")
    return content if "file_name" in content else ClipError(UNREADABLE, error="a row without file_name")


def row_caption(row: Row) -> str:
    """The caption in the column text or caption, "" if there is neither; ClipError if they differ."""
    captions = {as_caption(row[name], name) for name in CAPTION_COLUMNS if row.get(name) is not None}
    if len(captions) > 1:
        raise ClipError("two captions", captions=sorted(captions))
    return captions.pop() if captions else ""


def row_subjects(row: Row) -> tuple[ImportSubject, ...] | None:
    """The subjects in the columns boxes (xyxy), phrases and masks, or in the column objects (bbox as x, y, width,
    height, and category or categories); None if the row has neither.
    """
    if row.get("objects") is not None:
        if row.get("boxes") is not None:
            raise ClipError("boxes given twice", columns=["boxes", "objects"])
        objects = row["objects"]
        if not isinstance(objects, Mapping):
            raise ClipError(UNREADABLE, error="objects must be an object with the lists bbox and category")
        names = next((objects[name] for name in ("category", "categories") if name in objects), None)
        boxes, phrases = as_list(objects.get("bbox"), "objects.bbox"), as_list(names, "objects.category")
        if any(isinstance(phrase, int) for phrase in phrases):
            raise ClipError(UNREADABLE, error="objects.category holds numbers; write the categories' names there")
        boxes, masks = [corners(box) for box in boxes], None
    else:
        if row.get("boxes") is None:
            return None
        boxes, phrases = as_list(row["boxes"], "boxes"), as_list(row.get("phrases"), "phrases")
        masks = row.get("masks")
    masks = [None] * len(boxes) if masks is None else as_list(masks, "masks")
    if not len(boxes) == len(phrases) == len(masks):
        raise ClipError("lists of different lengths", boxes=len(boxes), phrases=len(phrases), masks=len(masks))
    return tuple(
        ImportSubject(phrase=clean_caption(as_text(phrase, "a phrase")), box=box, mask=mask)
        for phrase, box, mask in zip(phrases, boxes, masks, strict=True)
    )


def corners(box: Any) -> Any:
    """[x, y, width, height] -> [x1, y1, x2, y2]; what is no such list stays as it is, for ``to_box`` to refuse."""
    numbers = isinstance(box, Sequence) and not isinstance(box, str) and len(box) == 4
    if not numbers or not all(isinstance(value, int | float) for value in box):
        return box
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def read_sidecar(path: Path) -> tuple[tuple[ImportSubject, ...], tuple[int, int]]:
    """Subjects and size of ``picture.annotations.json``: the schema of the videos' sidecars with one frame, 0."""
    try:
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            raise ValueError(f"{size:,} bytes, more than the {MOST_JSON_BYTES:,} that are read")
        content = json.loads(decode_text(path.read_bytes(), path.name))
        if content["schema"] != ANNOTATIONS_SCHEMA:
            raise ClipError("unknown annotations schema", found=content["schema"], known=ANNOTATIONS_SCHEMA)
        objects = {each["id"]: each for each in content["objects"]}
        if [frame["index"] for frame in content["frames"]] != [0]:
            raise ClipError("annotations of a picture need one frame, 0", frames=len(content["frames"]))
        subjects = tuple(
            ImportSubject(
                phrase=clean_caption(as_text(objects[found["id"]]["name"], "a name")),
                box=found["box"],
                mask=found.get("mask_rle"),
                attributes=objects[found["id"]].get("attributes", {}),
            )
            for found in content["frames"][0]["objects"]
        )
        return subjects, (int(content["width"]), int(content["height"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ClipError("unreadable annotations", file=path.name, error=f"{type(error).__name__}: {error}") from error


class CocoFile:
    """Boxes and masks of a COCO file, by picture. A picture goes by its path below the folder, or by its file name
    alone where that is unique on both sides. Crowds are left out. The annotations are held in memory.
    """

    def __init__(self, path: Path, pictures: Sequence[str], notes: list[str] | None = None) -> None:
        from data_pipeline.models.annotation_formats import id_of, mask_of, without_crowds

        self._id_of, self._mask_of = id_of, mask_of
        try:
            content = json.loads(read_text(path, notes))
            categories = content["categories"]
            self._names = {id_of(each["id"]): as_text(each["name"], "a category's name") for each in categories}
            self._images = {"/".join(path_parts(each["file_name"])): each for each in content["images"]}
            if len(self._images) < len(content["images"]) or len(self._names) < len(content["categories"]):
                raise InputError(f"{path} has two images of one name, or two categories of one id: leave one of them")
            self._objects: dict[Any, list[Row]] = {}
            for each in without_crowds(content["annotations"]):
                self._objects.setdefault(id_of(each["image_id"]), []).append(each)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, ClipError) as error:
            raise InputError(
                f"cannot read {path} as COCO ({type(error).__name__}: {error}): needed are images, annotations and "
                "categories; boxes in other forms go into metadata.jsonl (docs/importing_pairs.md)"
            ) from error
        own = Counter(PurePosixPath(name).name for name in self._images)
        alone = {PurePosixPath(name).name: name for name in self._images}
        whole = {name: "/".join(path_parts(name)) for name in pictures}
        self._entry = {name: part for name, part in whole.items() if part in self._images}
        last = Counter(PurePosixPath(part).name for part in whole.values())
        for name in pictures:
            part = PurePosixPath(whole[name]).name
            if name not in self._entry and last[part] == own[part] == 1:
                self._entry[name] = alone[part]
        if not self._entry:
            some = next(iter(self._images), "no picture")
            raise InputError(f"{path} names none of the pictures: it has {some!r}, the folder {pictures[0]!r}")
        used = set(self._entry.values())
        unused = [name for name in self._images if name not in used]
        if unused and notes is not None:
            notes.append(f"{counted(len(unused), 'image')} of {path} without a picture, the first one {unused[0]!r}")

    def read(self, picture: str) -> tuple[tuple[ImportSubject, ...], tuple[int, int]] | None:
        """Subjects and size of a picture; None if the file does not know it, ClipError if its entry is broken."""
        if picture not in self._entry:
            return None
        image = self._images[self._entry[picture]]
        try:
            size = (int(image["width"]), int(image["height"]))
            return tuple(self._subject(each, size) for each in self._objects.get(self._id_of(image["id"]), ())), size
        except (ValueError, KeyError, TypeError) as error:
            raise ClipError("unreadable annotations", error=f"{type(error).__name__}: {error}") from error

    def _subject(self, annotation: Row, size: tuple[int, int]) -> ImportSubject:
        category = self._id_of(annotation["category_id"])
        if category not in self._names:
            raise ClipError("unreadable annotations", error=f"unknown category {annotation['category_id']!r}")
        mask = self._mask_of(annotation.get("segmentation"), *size)
        box = annotation.get("bbox") or None
        phrase = clean_caption(self._names[category])
        return ImportSubject(phrase=phrase, box=None if box is None else corners(box), mask=mask)


def read_images(
    folder: Path, metadata: Path | None, annotations: Path | None, normalised: bool, notes: list[str] | None = None
) -> Iterator[ImportItem | Broken]:
    """One item for every picture of the folder, or, with a table, for every row of it.

    metadata: the table, see ``find_metadata``. annotations: a COCO file. normalised: the boxes of the table are
    fractions. notes: takes what was assumed. InputError if what was given cannot be used as a whole.
    """
    pictures = list_pictures(folder, notes)
    coco = CocoFile(annotations, pictures, notes) if annotations is not None else None
    assumed: list[str] = []
    rows = read_metadata(metadata, notes) if metadata else ((0, {"file_name": picture}) for picture in pictures)
    for number, row in rows:
        name = f"line {number}" if isinstance(row, ClipError) else row["file_name"]
        try:
            if isinstance(row, ClipError):
                raise row
            yield to_item(folder, row, coco, normalised, assumed)
        except ClipError as error:
            yield Broken(name=name, reason=error.reason, evidence=error.evidence)
        except (OSError, ValueError) as error:  # a name that no file can have
            yield Broken(name=name, reason=UNREADABLE, evidence={"error": str(error)})
    if notes is not None:
        notes += [f"{counted(count, 'picture')}: {note}" for note, count in Counter(assumed).items()]


def to_item(
    folder: Path, row: Row, coco: CocoFile | None, normalised: bool, notes: list[str] | None = None
) -> ImportItem:
    """The item of one picture. notes: takes what was assumed. ClipError: unusable caption or boxes, boxes twice."""
    name = row["file_name"]
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.name:
        raise ClipError(OUTSIDE, path=name)
    path = on_disk(folder, name)
    sidecar = annotations_beside(path)
    found: dict[str, tuple[tuple[ImportSubject, ...], tuple[int, int] | None]] = {}
    if (own := row_subjects(row)) is not None:
        found["metadata"] = (own, None)
    if coco is not None and (entry := coco.read(path.relative_to(folder).as_posix())) is not None:
        found["--annotations"] = entry
    if sidecar is not None:
        found[sidecar.name] = read_sidecar(sidecar)
    if len(found) > 1:
        raise ClipError("boxes given twice", places=list(found))
    place, (subjects, size) = next(iter(found.items()), ("", ((), None)))
    own: list[str] = []
    caption = row_caption(row) or read_sidecar_caption(path, own) or ""
    if own and not caption:
        raise ClipError("no caption", found="; ".join(own))
    if notes is not None:
        notes += own
        notes += [SEVERAL] * any(is_several(row.get(column)) for column in CAPTION_COLUMNS)
    return ImportItem(
        target=name, caption=caption, subjects=subjects, size=size, normalised=normalised and place == "metadata"
    )
