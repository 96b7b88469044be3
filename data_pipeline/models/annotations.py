"""Boxes and masks that come with the videos: a sidecar file per clip, or one file for a whole corpus.

Sidecar: ``clip.annotations.json``, schema "data_pipeline.annotations/1"; its object numbers are tracks: the same
number in two frames is the same object. One file for many videos is recognised by its content: COCO, YouTube-VIS or
OVIS, DAVIS with a table of names (data_pipeline/models/annotation_formats.py), or ours, a json with ``videos: {name:
{file, width, height, annotations: [{frame, objects, mask_png}]}}``, whose object numbers only number the objects
inside one frame (and index the mask picture), so they say nothing about identity. All are specified in
docs/data_format.md.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.errors import ClipError, InputError
from data_pipeline.file_names import SUFFIXES, Places, annotations_beside, is_hidden, path_parts
from data_pipeline.models.annotated_masks import (
    BAD_MASK,
    decode_counts,
    draw_polygons,
    read_davis,
    read_names_table,
    read_numbers,
)
from data_pipeline.models.annotation_formats import BAD, Entry, Found, read_coco, read_youtube_vis
from data_pipeline.pairs_format import ANNOTATIONS_SCHEMA, MOST_JSON_BYTES
from data_pipeline.records import AnnotatedObject, Annotations, Box, VideoFile, decode_mask, mask_box, mask_size
from data_pipeline.texts import counted, decode_text, read_text

KNOWN = """\
  ours:         {"videos": {name: {"file", "width", "height", "annotations"}}}
  COCO:         {"images": [...], "annotations": [...], "categories": [...]}
  YouTube-VIS:  {"videos": [...], "annotations": [...], "categories": [...]}, also OVIS
  DAVIS:        {"masks": FOLDER, "videos": {clip: {"1": name, ...}}}, or a csv with the columns video, object, name
Most tools can export COCO."""
OTHERS = {
    ".xml": "an xml of CVAT's or Pascal VOC's",
    ".txt": "a text of MOT's or YOLO's",
    ".ndjson": "Labelbox's own format",
    ".zip": "an archive, which has to be unpacked",
}
"""Suffixes of what tools export besides."""


def _pixel_box(values: Any, width: int, height: int, where: str) -> Box:
    try:
        x1, y1, x2, y2 = (float(value) for value in values)
        if not all(map(math.isfinite, (x1, y1, x2, y2))):  # json knows NaN, which min and max would turn into an edge
            raise ValueError("not finite")
    except (TypeError, ValueError, OverflowError) as error:  # the last: a whole number of more digits than a float
        raise ClipError(BAD, error=f"{where}: a box needs four numbers, got {values!r}") from error
    # Hand-drawn and tracked boxes reach over the frame by a pixel or so; only what is inside can be seen.
    box = (max(0.0, x1) / width, max(0.0, y1) / height, min(width, x2) / width, min(height, y2) / height)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ClipError(BAD, error=f"{where}: the box {[x1, y1, x2, y2]} has no area inside {width} x {height}")
    return box


def read_sidecar(path: Path, width: int, height: int, num_frames: int) -> Annotations:
    """Annotations of one clip of the given size; ClipError if the file disagrees with the video or with its schema."""
    notes: list[str] = []
    try:
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            raise ClipError(BAD, error=f"{size:,} bytes, more than the {MOST_JSON_BYTES:,} that are read")
        content = json.loads(decode_text(path.read_bytes(), "annotations sidecar", notes))
        if content.get("schema") != ANNOTATIONS_SCHEMA:
            found = content.get("schema") or f"no schema, but {', '.join(sorted(content)) or 'an empty object'}"
            hint = "--annotations FILE reads COCO, YouTube-VIS and DAVIS"
            raise ClipError("unknown annotations schema", found=found, known=ANNOTATIONS_SCHEMA, hint=hint)
        _check_size(content, width, height)
        objects = {entry["id"]: entry for entry in content["objects"]}
        if len(objects) < len(content["objects"]):
            raise ClipError(BAD, error="two objects have the same id")
        frames: dict[int, tuple[AnnotatedObject, ...]] = {}
        for frame in content["frames"]:
            index = _check_index(frame["index"], num_frames)
            if index in frames:
                raise ClipError(BAD, error=f"two entries for frame {index}")
            frames[index] = tuple(
                AnnotatedObject(
                    object_id=found["id"],
                    name=objects[found["id"]]["name"],
                    attributes=objects[found["id"]].get("attributes", {}),
                    box=_pixel_box(found["box"], width, height, f"frame {index}, object {found['id']}"),
                    mask_rle=found.get("mask_rle"),
                )
                for found in frame["objects"]
            )
            _check_once(frames[index], index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ClipError(BAD, error=f"{type(error).__name__}: {error}") from error
    return Annotations(frames=frames, notes=tuple(notes))


def _check_size(content: Mapping[str, Any], width: int, height: int) -> None:
    if (content["width"], content["height"]) != (width, height):
        raise ClipError(
            "annotations of another size", annotated=[content["width"], content["height"]], video=[width, height]
        )


def _check_index(index: Any, num_frames: int) -> int:
    if not isinstance(index, int) or not 0 <= index < num_frames:
        raise ClipError(
            "annotations of a frame that is not in the video",
            frame=index,
            frames=num_frames,
            needed=f"0 to {num_frames - 1}; numbers that begin elsewhere are understood if every frame has a picture",
        )
    return index


def _check_once(objects: Sequence[AnnotatedObject], index: int) -> None:
    numbers = [found.object_id for found in objects if found.object_id is not None]
    twice = next((number for number in numbers if numbers.count(number) > 1), None)
    if twice is not None:
        raise ClipError(BAD, error=f"object {twice} is twice in frame {index}")


class AnnotationSource:
    """Finds the annotations of each video: in the file for many videos if one is given and knows the video, else in
    the sidecar. notes: takes sentences on what was assumed when the file was read.
    """

    def __init__(self, corpus: Path | None, notes: list[str] | None = None) -> None:
        self._corpus = corpus
        self._videos = read_many(corpus, notes) if corpus else {}
        self._by_last: dict[str, list[tuple[list[str], str]]] = {}
        for key in self._videos:
            parts = path_parts(key)
            self._by_last.setdefault(parts[-1] if parts else "", []).append((parts, key))
        self._alone: dict[Path, bool] = {}

    def knows(self, video: Path, name: str) -> bool:
        """Whether there is anything about the video called ``name``."""
        return bool(self._keys_of(video, name)) or annotations_beside(video) is not None

    def check_names(self, folder: Path, files: Sequence[VideoFile]) -> list[str]:
        """Sentences on entries of the file for many videos that name none of these. InputError if no entry names one
        and no video has a sidecar.
        """
        names = [file.name for file in files]
        places = Places(names, folder)
        unused = []
        for key, entry in self._videos.items():
            found = [places.find(each) for each in (key, *entry.rivals) if each]
            # Without a name it is the one video's, see _keys_of, which takes no end of a path either.
            if not any(videos and way != 1 for videos, way in found) and (key or len(names) > 1):
                unused.append(key)
        if not unused:
            return []
        nameless = "of pictures whose names name no video (several videos need names like 'clip/00012.jpg')"
        first = repr(unused[0]) if unused[0] else nameless
        entries = counted(len(unused), "entry", "entries")
        what = f"the first one {first}, the folder has {names[0]!r}{places.near(unused[0])}"
        if len(unused) == len(self._videos) and not any(annotations_beside(file.path) for file in files):
            raise InputError(f"no video is named in {entries} of {self._corpus}: {what}")
        return [f"{entries} of {self._corpus} without a video, {what}"]

    def read(self, video: Path, name: str, width: int, height: int, num_frames: int) -> Annotations | None:
        """Annotations of the video called ``name``; None if there are none; ClipError if they are unusable."""
        keys = self._keys_of(video, name)
        if len(keys) > 1:
            raise ClipError(BAD, error=f"two entries for this video: {' and '.join(keys[:2])}")
        if keys:
            entry = self._videos[keys[0]]
            annotations = _from_entry(entry, width, height, num_frames)
            besides = {"left_out": entry.left_out} if entry.left_out else {}
        else:
            sidecar, besides = annotations_beside(video), {}
            if sidecar is None:
                return None
            annotations = read_sidecar(sidecar, width, height, num_frames)
        if not any(annotations.frames.values()):
            raise ClipError("annotations without an object", annotated_frames=len(annotations.frames), **besides)
        return annotations

    def needed(self, name: str) -> dict[str, Any]:
        """What ``read`` looked for in vain, and what there is."""
        stem = str(PurePosixPath(name).with_suffix(""))
        sidecar = f"{PurePosixPath(stem).name}.annotations.json"
        if self._corpus is None:
            return {"needed": f"{sidecar} or --annotations FILE"}
        found = [key or "pictures whose names name no video" for key in self._videos]
        return {"needed": f"an entry for {stem} in {self._corpus.name}, or {sidecar}", "found": found[:10]}

    def _keys_of(self, video: Path, name: str) -> list[str]:
        """Names of the entries for a video: that which is its path, with or without the suffix; else those that end
        with it ("JPEGImages/480p/clip"), unless they are another video's; else the one without any name, for a video
        that is alone.
        """
        wanted = path_parts(name)
        both = (wanted, [*wanted[:-1], PurePosixPath(wanted[-1]).stem])
        near = [pair for last in dict.fromkeys(each[-1] for each in both) for pair in self._by_last.get(last, ())]
        root = video.parents[len(wanted) - 1]
        exact = [key for parts, key in near if parts in both]
        ending = [key for parts, key in near if parts[-len(wanted) :] in both]
        for keys in (exact, ending):
            if own := [key for key in keys if not self._is_anothers(key, name, root)]:
                # What the pictures' names only may mean comes last.
                return [key for key in own if not self._videos[key].rivals] or own
        return [""] if "" in self._videos and self._is_alone(root) else []

    def _is_anothers(self, key: str, name: str, root: Path) -> bool:
        """True if the entry's name, or one that its pictures would rather mean, is the path of another video."""
        for meant in (*self._videos[key].rivals, key):
            parts = path_parts(meant)
            for start in range(len(parts)):
                path = "/".join(parts[start:])
                possible = (path, *(path + suffix for lower in SUFFIXES for suffix in (lower, lower.upper())))
                there = [file for file in possible if file.lower().endswith(SUFFIXES) and (root / file).exists()]
                if there:
                    return name not in there
        return False

    def _is_alone(self, root: Path) -> bool:
        if root not in self._alone:
            found = (path for path in root.rglob("*") if path.name.lower().endswith(SUFFIXES))
            videos = (path for path in found if not is_hidden(path.relative_to(root)))
            self._alone[root] = len(list(islice(videos, 2))) == 1
        return self._alone[root]


def read_many(path: Path, notes: list[str] | None = None) -> dict[str, Entry]:
    """Video -> what the file says about it. Videos go by their path below the folder of videos, with or without its
    suffix. A folder stands for the names.json or names.csv in it (DAVIS). InputError if the file is of none of the
    known formats.
    """
    if path.is_dir():
        tables = [path / name for name in ("names.json", "names.csv") if (path / name).is_file()]
        if not tables:
            others = [file.relative_to(path).as_posix() for file in sorted(path.glob("**/*.json"))[:3]]
            hint = f"; there is {', '.join(others)}: give the file itself" if others else ""
            raise InputError(
                f"the annotations folder {path} has no names.json or names.csv, which DAVIS masks need{hint}"
            )
        path = tables[0]
    if path.suffix.lower() in OTHERS:
        raise InputError(
            f"cannot read annotations from {path}: it is {OTHERS[path.suffix.lower()]}; known formats are\n{KNOWN}"
        )
    try:
        if path.suffix.lower() == ".csv":
            return read_davis(read_names_table(path, notes), path.parent)
        content = json.loads(read_text(path, notes))
        return _recognise(content)(content, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"cannot read annotations from {path}: {type(error).__name__}: {error}; known formats are\n{KNOWN}"
        ) from error


def _recognise(content: Any) -> Callable[[Any, Path], dict[str, Entry]]:
    if isinstance(content, list) and content and isinstance(content[0], dict):
        raise ValueError(f"found a list (Label Studio's own?) of objects with {', '.join(sorted(content[0])[:10])}")
    if not isinstance(content, dict):
        raise ValueError(f"found a {type(content).__name__} instead of an object")
    lists = {key for key, value in content.items() if isinstance(value, list)}
    videos = content.get("videos")
    if {"images", "annotations", "categories"} <= lists and (content["images"] or "videos" not in lists):
        return lambda coco, path: read_coco(coco)
    if {"videos", "annotations", "categories"} <= lists:
        return lambda tracks, path: read_youtube_vis(tracks)
    if isinstance(videos, dict) and videos and all(isinstance(video, dict) for video in videos.values()):
        if all(video and all(key.isdigit() for key in video) for video in videos.values()):
            return lambda davis, path: read_davis(davis["videos"], path.parent / davis.get("masks", "."))
        return lambda corpus, path: _read_corpus(corpus, path.parent)
    strange = [
        f"{key}, which is no list" for key in ("images", "annotations", "categories") if key in {*content} - lists
    ]
    names = sorted({*content} - {name.partition(",")[0] for name in strange})
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    raise ValueError(f"found {', '.join([*names[:20], *more, *strange]) or 'an empty object'}")


def _read_corpus(content: Mapping[str, Any], folder: Path) -> dict[str, Entry]:
    def entry(video: Mapping[str, Any]) -> Entry:
        def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
            result: dict[int, list[Found]] = {}
            try:
                for frame in video["annotations"]:
                    if frame["frame"] in result:
                        raise ClipError(BAD, error=f"two entries for frame {frame['frame']}")
                    picture = folder / frame["mask_png"] if frame.get("mask_png") else None
                    result[frame["frame"]] = [
                        Found(
                            object_id=None,
                            name=found["name"],
                            box=found["box_xyxy"],
                            mask_file=(picture, int(found["id"])) if picture else None,
                            attributes=found.get("attributes", {}),
                        )
                        for found in frame["objects"]
                    ]
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise ClipError(BAD, error=f"{type(error).__name__}: {error}") from error
            return result

        return Entry(size=(video["width"], video["height"]), frames=frames)

    result: dict[str, Entry] = {}
    for name, video in content["videos"].items():
        if not isinstance(video["file"], str):
            raise InputError(f"the file of {name!r} in the annotations must be a text, got {video['file']!r}")
        if video["file"] in result:
            raise InputError(
                f"the annotations have two entries for the file {video['file']!r}, one of them called {name!r}: leave "
                "one of them"
            )
        result[video["file"]] = entry(video)
    return result


def _from_entry(entry: Entry, width: int, height: int, num_frames: int) -> Annotations:
    if entry.size is not None:
        _check_size({"width": entry.size[0], "height": entry.size[1]}, width, height)
    frames = {}
    for index, objects in entry.frames(num_frames).items():
        _check_index(index, num_frames)
        frames[index] = tuple(_annotated(found, index, width, height) for found in objects)
        _check_once(frames[index], index)
    return Annotations(frames=frames)


def _annotated(found: Found, index: int, width: int, height: int) -> AnnotatedObject:
    where = f"frame {index}, {found.name}" + ("" if found.object_id is None else f" {found.object_id}")
    if not isinstance(found.name, str) or not (found.object_id is None or isinstance(found.object_id, int)):
        raise ClipError(BAD, error=f"{where}: a name must be a text and a number of an object whole")
    names = ("object_id", "name", "attributes", "mask_rle", "mask_file")
    values = {name: getattr(found, name) for name in names}
    if found.box is not None:
        return AnnotatedObject(box=_pixel_box(found.box, width, height, where), **values)
    mask = read_mask(AnnotatedObject(box=(0, 0, 1, 1), **values), width, height)
    if mask is None or not mask.any():
        raise ClipError(BAD, error=f"{where}: an empty mask, and no box")
    return AnnotatedObject(box=mask_box(mask), **values)


def read_mask(found: AnnotatedObject, width: int, height: int) -> np.ndarray | None:
    """The bool (height, width) mask of an annotated object, or None if it came with a box only."""
    if found.mask_rle is not None:
        size = mask_size(found.mask_rle)
        if size != (height, width):  # before anything of that size is made
            raise ClipError("mask of another size", mask=list(size[::-1]), video=[width, height])
        return _decode(found.mask_rle, width, height)
    if found.mask_file is None:
        return None
    path, number = found.mask_file
    mask = read_numbers(path) == number
    if mask.shape != (height, width):
        raise ClipError("mask of another size", mask=list(mask.shape[::-1]), video=[width, height])
    return mask


def _decode(segmentation: Mapping[str, Any], width: int, height: int) -> np.ndarray:
    if "polygons" in segmentation:
        return draw_polygons(segmentation["polygons"], width, height)
    counts = segmentation.get("counts")
    if isinstance(counts, str | bytes):
        counts = decode_counts(counts)
    if not isinstance(counts, list):
        raise ClipError(BAD_MASK, error="counts must be a list or a text")
    try:
        return decode_mask({"size": [height, width], "counts": counts})
    except OverflowError as error:
        raise ClipError(BAD_MASK, error=f"run lengths of too many digits: {error}") from error
