"""Annotation files of others, brought into one form: COCO, YouTube-VIS and OVIS, DAVIS.

Which frames and videos their entries mean, and what is asked of a file, is specified in docs/data_format.md. The
compressed run lengths are those of the COCO API (Lin et al., https://cocodataset.org): numbers in groups of five bits,
each from the third on as the difference to the one two places before.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import ClipError, InputError
from data_pipeline.file_names import path_parts

BAD = "unreadable annotations"
FRAME_FOLDERS = frozenset(
    {"images", "image", "imgs", "img", "img1", "frames", "frame", "jpegimages", "rgb", "color"}
    | {"train", "val", "valid", "validation", "test", "default", "data"}
)
"""Folders that are named after what is in them, and not after a video."""
ROBOFLOW = re.compile(r"_[a-z]+\.rf\.[0-9A-Za-z]+$")
"""What it puts behind the name of a picture."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object in one frame. box: xyxy in pixels; None to take the tight box of the mask."""

    object_id: int | None
    name: str
    box: Sequence[float] | None
    mask_rle: Mapping[str, Any] | None = None
    mask_file: tuple[Path, int] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a file says about one video. size: width, height in pixels, or None if only its masks tell.

    frames: called with the number of frames of the video; gives frame number -> objects, and raises ClipError for
    what is broken, so that a broken video costs no other one. rivals: names that come first where the pictures' names
    can mean several: if there is a video of one of them, the entry is that one's. left_out: in words, what the file has
    besides.
    """

    size: tuple[int, int] | None
    frames: Callable[[int], Mapping[int, Sequence[Found]]]
    rivals: tuple[str, ...] = ()
    left_out: str = ""


def frame_number(name: str) -> int:
    """12 of "clip/frame_00012.jpg", the last number; ClipError if there is none, or if it counts no frames."""
    stem = PurePosixPath(path_parts(name)[-1]).stem if path_parts(name) else ""
    if ROBOFLOW.search(stem):
        raise ClipError(
            BAD,
            error=f"the file name {name!r} is Roboflow's, which counts the pictures that were taken, not the frames of "
            "the video: give the fields video and frame of every image",
        )
    digits = re.findall(r"\d+", stem)
    if not digits:
        raise ClipError(BAD, error=f"no frame number in the file name {name!r}, as 12 in clip/00012.jpg")
    return int(digits[-1])


def video_names(file_name: str) -> tuple[str, ...]:
    """Names of the video that a picture's file name may mean, the likeliest first: its folder; the folder round one
    like "img1"; what stands before the number ("clip" of "clip_00012.jpg" and of "clip_frame_12.jpg"). "" is among them
    if nothing names a video at all ("images/frame_000012.PNG").
    """
    *folders, picture = path_parts(file_name) or [""]
    outer = list(folders)
    while outer and outer[-1].lower() in FRAME_FOLDERS:
        outer.pop()
    stem = PurePosixPath(picture).stem
    named = [ROBOFLOW.sub("", stem)]
    patterns = [r"\d+\D*$", r"^[0-9a-f]{8}-", r"(?:^|[ _.-])(?:frames?|image|img|im|f)$"]  # the 2nd is Label Studio's
    if named[0] != stem:
        patterns.insert(1, r"_[a-z0-9]+$")  # "clip_mp4" of clip.mp4
    for pattern in patterns:
        named.append(re.sub(pattern, "", named[-1], flags=re.IGNORECASE).rstrip(" _.-"))
    found = ["/".join(folders), "/".join(outer)]
    if named[-1]:
        found += ["/".join([*folders, name]) for name in named[1:]]
    return tuple(dict.fromkeys(name for name in found if name or not named[-1]))


def first_number(numbers: Collection[int], num_frames: int) -> int:
    """Of frame 0: the least number if there is one for every frame, in a row, as many tools begin with 1; else 0."""
    whole = len(numbers) == num_frames and max(numbers) - min(numbers) == num_frames - 1
    return min(numbers) if whole else 0


def _whole(value: Any, where: str) -> int:
    """12 of 12, 12.0 and "12"; ClipError for anything else."""
    try:
        number = int(value)
        if isinstance(value, bool) or float(value) != number:
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise ClipError(BAD, error=f"{where} must be a whole number, got {value!r}") from error
    return number


def id_of(value: Any) -> str:
    """An id as others may write it: 7, 7.0 and "7" are the same."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _corner_box(values: Any, where: str) -> tuple[float, ...]:
    """COCO's [x, y, width, height] -> xyxy."""
    try:
        x, y, width, height = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ClipError(BAD, error=f"{where}: a box needs four numbers, got {values!r}") from error
    return x, y, x + width, y + height


def mask_of(segmentation: Any, width: int, height: int) -> Mapping[str, Any] | None:
    """A COCO segmentation as ``decode_segmentation`` reads it."""
    if not segmentation:
        return None
    if isinstance(segmentation, Mapping):
        return segmentation
    if isinstance(segmentation, list) and isinstance(segmentation[0], int | float):  # VIA: a polygon by itself
        segmentation = [segmentation]
    return {"size": [height, width], "polygons": segmentation}


def _found(annotation: Mapping[str, Any], number: Any, names: Mapping[str, str], **values: Any) -> Found:
    """One object with its category's name. values: where, box [x, y, width, height], segmentation, size."""
    where, (width, height) = values["where"], values["size"]
    category = annotation["category_id"]
    if id_of(category) not in names:
        raise ClipError(BAD, error=f"{where}: unknown category {category}, known are {', '.join(list(names)[:20])}")
    mask = mask_of(values["segmentation"], width, height)
    if not values["box"] and mask is None:
        raise ClipError(BAD, error=f"{where}: neither a box nor a mask")
    box = _corner_box(values["box"], where) if values["box"] else None
    track = None if number is None else _whole(number, f"{where}: the number of an object")
    return Found(object_id=track, name=names[id_of(category)], box=box, mask_rle=mask)


def guarded(read: Callable[[int], Mapping[int, Sequence[Found]]]) -> Callable[[int], Mapping[int, Sequence[Found]]]:
    """What a missing field, or one of another type, raises becomes a ClipError."""

    def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
        try:
            return read(num_frames)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ClipError(BAD, error=f"{type(error).__name__}: {error}") from error

    return frames


def _category_names(content: Mapping[str, Any]) -> dict[str, str]:
    _check_unique("categories", content["categories"])
    return {id_of(category["id"]): category["name"] for category in content["categories"]}


def _check_unique(kind: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """InputError if two of the entries have the same id: what refers to it would mean either."""
    seen = set()
    for entry in entries:
        if id_of(entry["id"]) in seen:
            raise InputError(f"two of the {kind} of the annotations have the id {entry['id']!r}: number them anew")
        seen.add(id_of(entry["id"]))


def _by_owner(annotations: Sequence[Mapping[str, Any]], owners: Sequence[Mapping[str, Any]], key: str) -> dict:
    """Annotations by the id of their image or video; InputError if there are some and none of them has one."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for annotation in annotations:
        found.setdefault(id_of(annotation[key]), []).append(annotation)
    known = {id_of(owner["id"]) for owner in owners}
    if found and not found.keys() & known:
        raise InputError(
            f"no annotation belongs to one of the {len(known)} {key.removesuffix('_id')}s: {key} is "
            f"{', '.join(list(found)[:3])} ..., but their ids are {', '.join(sorted(known)[:3])} ..."
        )
    return found


# --------------------------------------------------------------------------------------------------------------- COCO


def read_coco(content: Mapping[str, Any]) -> dict[str, Entry]:
    """COCO's "images", "annotations" and "categories", one image per annotated frame: by its fields "video" and
    "frame", by "videos" and "frame_id" (CocoVID) or "frame_index" (TAO), or by its file_name "clip/00012.jpg".
    "track_id" of an annotation, or of its attributes (CVAT), or "instance_id" (CocoVID) says what is the same object
    in two frames.

    Crowds are left out, see ``without_crowds``.
    """
    names = _category_names(content)
    _check_unique("images", content["images"])
    videos = {id_of(video["id"]): video.get("name") for video in content.get("videos") or ()}
    objects = _by_owner(content["annotations"], content["images"], "image_id")
    kept = without_crowds(content["annotations"])
    left_out = len(content["annotations"]) - len(kept)
    not_crowds = {id(each) for each in kept}
    images: dict[str, list[Mapping[str, Any]]] = {}
    rivals: dict[str, tuple[str, ...]] = {}
    for image in content["images"]:
        said = image.get("video") or videos.get(id_of(image.get("video_id")))
        if said and not isinstance(said, str):
            raise InputError(f"image {image['id']!r} of the annotations: its video must be a text, got {said!r}")
        possible = (said,) if said else video_names(image["file_name"])
        for number, video in enumerate(possible):
            images.setdefault(video, []).append(image)
            rivals.setdefault(video, possible[:number])

    def entry(video: str, some: Sequence[Mapping[str, Any]]) -> Entry:
        size = (some[0].get("width"), some[0].get("height"))

        def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
            by_number: dict[int, Mapping[str, Any]] = {}
            for image in some:
                if (image.get("width"), image.get("height")) != size:
                    raise ClipError(BAD, error=f"images of {video} have different sizes")
                index = _frame_of(image)
                if index in by_number:
                    raise ClipError(BAD, error=f"two images for frame {index} of {video}")
                by_number[index] = image
            first = 0 if any(map(_frame_field, some)) else first_number(by_number, num_frames)
            return {
                index - first: [
                    _found(
                        annotation,
                        _track_of(annotation),
                        names,
                        where=f"frame {index}, annotation {annotation.get('id')}",
                        box=annotation.get("bbox"),
                        segmentation=annotation.get("segmentation"),
                        size=size,
                    )
                    for annotation in objects.get(id_of(image["id"]), ())
                    if id(annotation) in not_crowds
                ]
                for index, image in by_number.items()
            }

        # VIA writes 0 where it does not know.
        if not all(size):
            return Entry(size=None, frames=_no_size, rivals=rivals[video])
        words = f"{left_out} annotations with iscrowd 1 in the whole file" if left_out else ""
        return Entry(size=size, frames=guarded(frames), rivals=rivals[video], left_out=words)

    return {video: entry(video, some) for video, some in images.items()}


def _no_size(num_frames: int) -> Mapping[int, Sequence[Found]]:
    raise ClipError(BAD, error="an image without width and height: they are needed to compare them with the video")


def without_crowds(annotations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """COCO's annotations of single objects. CVAT calls every mask a crowd that was painted: its annotations say whether
    they are occluded; and a file that has nothing but crowds doesn't mean it either.
    """
    single = [
        each for each in annotations if each.get("iscrowd") not in (1, True, "1") or "occluded" in _attributes(each)
    ]
    return single or list(annotations)


def _attributes(annotation: Mapping[str, Any]) -> Mapping[str, Any]:
    attributes = annotation.get("attributes")
    return attributes if isinstance(attributes, Mapping) else {}


def _track_of(annotation: Mapping[str, Any]) -> Any:
    numbers = (annotation.get("track_id"), _attributes(annotation).get("track_id"), annotation.get("instance_id"))
    return next((number for number in numbers if number is not None), None)


def _frame_field(image: Mapping[str, Any]) -> str:
    return next((name for name in ("frame", "frame_index", "frame_id") if image.get(name) is not None), "")


def _frame_of(image: Mapping[str, Any]) -> int:
    if name := _frame_field(image):
        return _whole(image[name], f"image {image['id']}: the field {name}")
    return frame_number(image["file_name"])


# -------------------------------------------------------------------------------------------------------- YouTube-VIS


def read_youtube_vis(content: Mapping[str, Any]) -> dict[str, Entry]:
    """YouTube-VIS and OVIS: "videos" with their file_names, "annotations" with one box and one segmentation per frame,
    null where the object is not seen. The number of an annotation is a track.

    A file stands for the frame at its place in the list if the video has as many frames as the list, and otherwise
    for the frame of the number in its name (YouTube-VIS lists every fifth frame).
    """
    names = _category_names(content)
    _check_unique("videos", content["videos"])
    tracks = _by_owner(content["annotations"], content["videos"], "video_id")

    def entry(video: Mapping[str, Any], rivals: tuple[str, ...]) -> Entry:
        size = (video["width"], video["height"])

        def frames(num_frames: int) -> Mapping[int, Sequence[Found]]:
            files = video["file_names"]
            indices = range(num_frames) if len(files) == num_frames else [frame_number(file) for file in files]
            result: dict[int, list[Found]] = {index: [] for index in indices}
            if len(result) != len(files):
                raise ClipError(BAD, error="two files have the same frame number")
            for track in tracks.get(id_of(video["id"]), ()):
                nothing = [None] * len(files)
                boxes, masks = (track.get(key) or nothing for key in ("bboxes", "segmentations"))
                if not len(boxes) == len(masks) == len(files):
                    raise ClipError(
                        BAD,
                        error=f"object {track['id']} has {len(boxes)} boxes and {len(masks)} masks, but the video "
                        f"{len(files)} frames",
                    )
                for index, box, mask in zip(indices, boxes, masks, strict=True):
                    if not box and not mask:
                        continue
                    where = f"frame {index}, object {track['id']}"
                    found = _found(track, track["id"], names, where=where, box=box, segmentation=mask, size=size)
                    result[index].append(found)
            return result

        return Entry(size=size, frames=guarded(frames), rivals=rivals)

    named = [(video, video_names(video["file_names"][0])) for video in content["videos"]]
    times = Counter(name for _, possible in named for name in possible)
    result: dict[str, Entry] = {}
    for video, possible in named:
        own = [name for name in possible if times[name] == 1]
        if not own:
            last = [other["id"] for other, names_of_it in named if names_of_it == possible][-1]
            raise InputError(
                f"two videos of the annotations have their pictures in the folder {possible[0]!r}, one of them with "
                f"the id {last!r}: leave one of them"
            )
        for name in own:
            result[name] = entry(video, possible[: possible.index(name)])
    return result
