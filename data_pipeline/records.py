"""The records that travel through the mining steps. Standard library and numpy only.

Frames of reference, for the whole package:

- pictures are uint8 RGB arrays (height, width, 3);
- masks are bool arrays (height, width) of the same frame;
- boxes are ``(x1, y1, x2, y2)`` as fractions of the frame, edges exclusive (all of it is ``(0, 0, 1, 1)``), unless
  the name says pixels;
- times are seconds after the first frame of the video; frame numbers count in order of presentation, from 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import ClipError
from data_pipeline.pairs_format import MOST_FRAME_PIXELS

Box = tuple[float, float, float, float]
LEAST_MASK_SCORE = 0.7
"""A mask that SAM scores lower is often another thing's."""


# -------------------------------------------------------------------------------------------------------------- masks


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths: ``{"size": [height, width], "counts": [zeros, ones, zeros, ...]}``.

    mask: bool (height, width). Runs go down the columns, and the first one counts zeros, so it is 0 if the first
    pixel is set.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask has two axes, got the shape {mask.shape}")
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate(([0], changes, [flat.size])) if flat.size else np.zeros(1, dtype=np.int64)
    counts = np.diff(edges).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": counts}


def mask_size(rle: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) that run lengths or polygons say their mask has; ClipError if they don't say it."""
    try:
        height, width = (int(side) for side in rle["size"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClipError("unreadable mask in the annotations", error=f"no size: {type(error).__name__}") from error
    return height, width


def decode_mask(rle: Mapping[str, Sequence[int]]) -> np.ndarray:
    """Their bool (height, width) mask; ClipError if they don't fill the size, or it is above ``MOST_FRAME_PIXELS``."""
    height, width = mask_size(rle)
    if height * width > MOST_FRAME_PIXELS:
        raise ClipError(
            "mask of too many pixels in the annotations", size=[height, width], max_pixels=MOST_FRAME_PIXELS
        )
    try:
        counts = np.asarray(rle["counts"], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClipError("unreadable mask in the annotations", error=str(error)) from error
    # Single counts first: a sum of huge ones would wrap round to the right number, and repeat() would write anywhere.
    in_range = counts.ndim == 1 and height > 0 and width > 0 and ((counts >= 0) & (counts <= height * width)).all()
    if not in_range or int(counts.sum()) != height * width:
        raise ClipError("unreadable mask in the annotations", size=[height, width], runs=int(counts.size))
    values = np.zeros(len(counts), dtype=bool)
    values[1::2] = True
    return np.repeat(values, counts).reshape((height, width), order="F")


def mask_box(mask: np.ndarray) -> Box:
    """Tight box of a bool (height, width) mask; ValueError for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ValueError("an empty mask has no box")
    height, width = mask.shape
    return (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)


# -------------------------------------------------------------------------------------------------------------- boxes


def box_area(box: Box) -> float:
    """Area as a fraction of the frame; 0 for a reversed box."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def box_intersection(first: Box, second: Box) -> float:
    """Area shared by two boxes, as a fraction of the frame."""
    return box_area(
        (max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3]))
    )


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 if both are empty."""
    shared = box_intersection(first, second)
    union = box_area(first) + box_area(second) - shared
    return shared / union if union > 0 else 0.0


def box_in_pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The box in pixels, rounded outwards and cut at the frame: slices of an array, so edges are exclusive."""
    # The small number undoes what a division and a multiplication add to a whole pixel.
    x1, y1 = (int(np.floor(value * side + 1e-6)) for value, side in ((box[0], width), (box[1], height)))
    x2, y2 = (int(np.ceil(value * side - 1e-6)) for value, side in ((box[2], width), (box[3], height)))
    return max(0, x1), max(0, y1), min(width, x2), min(height, y2)


def cut_out(image: np.ndarray, mask: np.ndarray, box: Box) -> np.ndarray:
    """The subject inside its box, uint8 RGBA (h, w, 4). Outside the mask every channel is 0, so nothing of the
    background leaks.

    image: uint8 (height, width, 3). mask: bool (height, width). box: of the same frame; its crop is rounded outwards.
    """
    x1, y1, x2, y2 = box_in_pixels(box, mask.shape[1], mask.shape[0])
    inside = mask[y1:y2, x1:x2, None]
    pixels = np.empty((*inside.shape[:2], 4), dtype=np.uint8)
    pixels[..., :3] = image[y1:y2, x1:x2] * inside
    pixels[..., 3:] = inside * np.uint8(255)
    return pixels


# -------------------------------------------------------------------------------------------------- the way of a clip

# Records that hold arrays are compared by identity.


@dataclass(frozen=True, kw_only=True)
class VideoFile:
    """A video that was found, not yet opened. name: its path below the videos folder, with forward slashes."""

    name: str
    key: str
    """Unique name without dots, used for the samples of this clip and for its done-marker."""
    path: Path
    caption: str | None
    details: str = ""
    """Changes with whatever else shapes the samples and is neither in the video's file nor in its sidecar."""
    notes: tuple[str, ...] = ()
    """What was assumed when its caption was read, or why there is none. See ``Video``."""


@dataclass(frozen=True, kw_only=True)
class AnnotatedObject:
    """One object in one annotated frame."""

    object_id: int | None
    """The same number in two frames means the same object; None if the annotations don't say."""
    name: str
    box: Box
    attributes: Mapping[str, Any] = field(default_factory=dict)
    mask_rle: Mapping[str, Any] | None = None
    mask_file: tuple[Path, int] | None = None
    """A picture whose pixels hold object numbers, and the number of this object in it."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Boxes and masks that came with a video: frame number -> objects. Frames may be few."""

    frames: Mapping[int, tuple[AnnotatedObject, ...]]
    notes: tuple[str, ...] = ()
    """See ``Video``."""


@dataclass(frozen=True, kw_only=True)
class Colours:
    """How a video codes its colours, by the numbers of ITU-T H.273; 2 is "not said". full_range: None if not said."""

    matrix: int = 2
    transfer: int = 2
    primaries: int = 2
    full_range: bool | None = None


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a look through a video file tells.

    stamps: presentation time stamps of all frames, ascending, in units of ``time_base`` seconds. width, height: of
    the upright picture, with square pixels. How it comes out of the stored one, in this order: ``deinterlace``; the
    colours; ``crop``, pixels that the container cuts off (left, top, right, bottom); ``pixel_aspect``, width of a pixel
    over its height; ``mirrored``, left and right exchanged; ``rotation``, degrees anticlockwise, a multiple of 90;
    ``bars``, black ones that are cut off the upright picture, in the order of ``crop``.

    colours: what the file says about them, used where a frame says nothing. tone_map: "PQ", "HLG" or "SDR" for
    pictures whose light is converted to BT.709 (``models/tone_mapping.py``), else "". notes: see ``Video``.
    """

    codec: str
    container: str
    width: int
    height: int
    rotation: int
    time_base: float
    stamps: tuple[int, ...]
    mirrored: bool = False
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    pixel_aspect: Fraction = Fraction(1)
    bars: tuple[int, int, int, int] = (0, 0, 0, 0)
    colours: Colours = Colours()
    tone_map: str = ""
    deinterlace: bool = False
    if_interlaced: str = "deinterlace"
    """What becomes of interlaced frames though the file did not say so: "deinterlace", "reject" or "keep"."""
    notes: tuple[str, ...] = ()

    @property
    def times(self) -> tuple[float, ...]:
        """Seconds of every frame after the first one, in order of presentation."""
        return tuple((stamp - self.stamps[0]) * self.time_base for stamp in self.stamps)


@dataclass(frozen=True, kw_only=True)
class Video:
    """A video that opened, and what came with it."""

    file: VideoFile
    caption: str
    sha256: str
    facts: VideoFacts
    reader: str
    """Which reader decodes it: "decord" or "pyav"."""
    annotations: Annotations | None
    notes: tuple[str, ...] = ()
    """What is out of the ordinary about the clip, though no reason to reject it: a few words each, the same for every
    clip of its kind ("HDR"). The report counts them. ``NamedPair`` has them too.
    """


@dataclass(frozen=True, kw_only=True)
class Shot:
    """Frames ``first`` to ``last``, both included, without a cut between them."""

    first: int
    last: int
    start: float
    end: float
    """Seconds of the first and of the last frame."""


@dataclass(frozen=True, kw_only=True)
class VideoShots:
    """A video and its shots, in order."""

    video: Video
    shots: tuple[Shot, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the video, to which decoding all frames may have added."""
        return self.video.notes


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One decoded frame. image: uint8 (height, width, 3)."""

    index: int
    time: float
    image: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class FramePair:
    """Two frames of one shot: the subjects are cut out of ``reference``; ``target`` is the picture to be learned."""

    video: Video
    shot: Shot
    reference: Frame
    target: Frame
    number: int = 0
    """Which pair of its clip: 0 for the best one."""


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A thing that the caption names."""

    phrase: str
    """Noun in the singular with its compounds, colours and materials, lower case: "white soccer ball"."""
    head: str
    """The noun alone: "ball"."""
    mention: str
    """The words of the caption: "a white soccer ball"."""
    position: int
    """Where the mention starts in the caption, in characters."""
    kind: str = "thing"
    """"person" or "thing"; an animal is a thing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NamedPair:
    """Two frames and what their caption names."""

    frames: FramePair
    entities: tuple[Entity, ...]
    notes: tuple[str, ...] = ()
    """See ``Video``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """One instance of an entity in one frame, first with a box only, then with a mask."""

    entity: Entity
    box: Box
    score: float
    """Confidence of the detector in [0, 1]; 1 for annotations."""
    object_id: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    annotated: AnnotatedObject | None = None
    """The annotation that it was read from, for a segmenter that reads masks from there."""
    mask: np.ndarray | None = None
    mask_score: float | None = None
    """Mask quality in [0, 1] as the segmenter predicts it; None if it does not say."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectedPair:
    """Detections in both frames. After ``segment_masks`` every one has its mask."""

    frames: FramePair
    entities: tuple[Entity, ...]
    reference: tuple[Detection, ...]
    target: tuple[Detection, ...]
    served: Mapping[str, str] = field(default_factory=dict)
    """Where its "boxes" and "masks" came from, if that differs from clip to clip: "annotations" or a model's name."""

    @property
    def notes(self) -> tuple[str, ...]:
        """See ``Video``."""
        return tuple(f"{what} by {whom}" for what, whom in self.served.items())


@dataclass(frozen=True, kw_only=True, eq=False)
class Match:
    """The same subject in both frames. similarity: cosine of the two cut-outs' embeddings."""

    reference: Detection
    target: Detection
    similarity: float


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A subject that was left out while its pair went on."""

    phrase: str
    stage: str
    reason: str
    evidence: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPair:
    """Two frames with their matched subjects, in the order of the caption."""

    frames: FramePair
    matches: tuple[Match, ...]
    dropped: tuple[Dropped, ...] = ()
    served: Mapping[str, str] = field(default_factory=dict)
    """See ``DetectedPair``."""


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """The samples of one clip, ready for a shard.

    samples: their metadata, as in their json files. blocks: the members of all samples as tar blocks, without an end
    mark.
    """

    samples: tuple[Mapping[str, Any], ...]
    blocks: bytes
    dropped: tuple[Dropped, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """A clip that went no further. The runner fills in the stage."""

    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""
