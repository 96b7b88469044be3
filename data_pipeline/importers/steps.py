"""The steps of an import: read an item, open its pictures, cut its subjects out, write the sample."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.errors import ClipError, SettingsError
from data_pipeline.importers.items import ImportItem, ImportSubject, ItemFile, place_of, read_item
from data_pipeline.importers.pictures import EXIF, Picture, open_picture, read_mask, to_box
from data_pipeline.options import SHARDS
from data_pipeline.pairs_format import MOST_PHRASE, MOST_SUBJECTS, PAIRS_SCHEMA, fault_of_text
from data_pipeline.records import Box, EncodedPair, Rejected, box_area, box_in_pixels, cut_out, encode_mask, mask_box
from data_pipeline.step import Step

UNHASHED: dict[str, Any] = {"metadata": {"hashed": False}}


@dataclass(frozen=True, kw_only=True)
class FoundItem:
    """An item and the file it was found as."""

    file: ItemFile
    item: ImportItem


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenedItem:
    """An item with its pictures open. pictures: by name; the target is among them."""

    file: ItemFile
    item: ImportItem
    pictures: Mapping[str, Picture]


@dataclass(frozen=True, kw_only=True, eq=False)
class CutSubject:
    """A subject with its cut-out. Boxes are fractions, each of its own picture."""

    subject: ImportSubject
    target_box: Box
    reference_box: Box
    cutout: np.ndarray
    """uint8 RGBA (h, w, 4)."""
    mask: np.ndarray | None
    """bool, of the whole reference picture; None if the subject came with a box only."""
    reference: Picture
    single_frame: bool
    """True if it was cut out of the target picture itself."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CutItem:
    """An item whose subjects are cut out. boxes_cut: boxes that reached over an edge by up to a pixel."""

    opened: OpenedItem
    subjects: tuple[CutSubject, ...]
    boxes_cut: int


@dataclass(kw_only=True)
class ReadItems(Step[ItemFile, FoundItem]):
    """Takes an item from where it was written down, and checks what can be checked without its pictures.

    importer: where items came from, "official" or "images". boxes: "pixels" or "normalised", recorded here and applied
    when the items were written down. require_phrases: a phrase that does not occur in the caption rejects the item.
    """

    importer: Literal["official", "images"]
    boxes: Literal["pixels", "normalised"] = "pixels"
    require_phrases: bool = False

    def process(self, file: ItemFile) -> FoundItem | Rejected:
        """The item."""
        item = read_item(file)
        if not item.caption:
            raise ClipError("no caption")
        if not item.subjects:
            raise ClipError("no subjects" if self.importer == "official" else "no boxes")
        if len(item.subjects) > MOST_SUBJECTS:
            raise ClipError("too many subjects", subjects=len(item.subjects), most=MOST_SUBJECTS)
        for number, subject in enumerate(item.subjects):
            if fault := fault_of_text(subject.phrase, MOST_PHRASE):
                raise ClipError("phrase of too many characters", subject=number, error=f"the phrase {fault}")
            if not subject.phrase:
                raise ClipError("empty phrase", subject=number)
            if self.require_phrases and not mention_of(subject.phrase, item.caption):
                raise ClipError("phrase not in the caption", phrase=subject.phrase, caption=item.caption)
        return FoundItem(file=file, item=item)


@dataclass(kw_only=True)
class OpenPictures(Step[FoundItem, OpenedItem]):
    """Opens the target picture and those of the references, each once.

    images: the folder that paths are below. allow_absolute: they may also be elsewhere. max_pixels: of one picture.
    exif: see ``open_picture``.
    """

    images: Path = field(**UNHASHED)
    allow_absolute: bool = False
    max_pixels: int = 64_000_000
    exif: Literal["refuse", "apply", "ignore"] = "refuse"

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise SettingsError(f"--max-pixels must be at least 1, got {self.max_pixels}")
        if self.exif not in EXIF:
            raise SettingsError(f"--exif is {', '.join(EXIF)}, got {self.exif!r}")

    def process(self, found: FoundItem) -> OpenedItem | Rejected:
        """The item with its pictures."""
        item = found.item
        pictures: dict[str, Picture] = {}
        for name in dict.fromkeys([item.target, *(each.reference for each in item.subjects if each.reference)]):
            path = place_of(self.images, name, self.allow_absolute)
            pictures[name] = open_picture(path, name, self.max_pixels, self.exif)
        size = pictures[item.target].size
        if item.size is not None and item.size != size:
            raise ClipError("annotations of another size", annotated=list(item.size), picture=list(size))
        return OpenedItem(file=found.file, item=item, pictures=pictures)


@dataclass(kw_only=True)
class CutSubjects(Step[OpenedItem, CutItem]):
    """Checks boxes and masks against the pictures and cuts the subjects out.

    mask_threshold: see ``pictures.read_mask``.
    """

    images: Path = field(**UNHASHED)
    allow_absolute: bool = field(default=False, **UNHASHED)
    mask_threshold: int | None = None

    def process(self, opened: OpenedItem) -> CutItem | Rejected:
        """The item with its cut-outs."""
        cut = [self._cut(number, subject, opened) for number, subject in enumerate(opened.item.subjects)]
        return CutItem(
            opened=opened, subjects=tuple(subject for subject, _ in cut), boxes_cut=sum(count for _, count in cut)
        )

    def _cut(self, number: int, subject: ImportSubject, opened: OpenedItem) -> tuple[CutSubject, int]:
        item, target = opened.item, opened.pictures[opened.item.target]
        reference = opened.pictures[subject.reference] if subject.reference else target
        # By content: a copy under another name is the same picture.
        single_frame = reference.sha256 == target.sha256
        where = {"subject": number, "phrase": subject.phrase}
        mask = None
        if subject.mask is not None:
            path = place_of(self.images, subject.mask, self.allow_absolute) if isinstance(subject.mask, str) else None
            mask = read_mask(subject.mask, path, reference.size, self.mask_threshold)
            if not mask.any():
                raise ClipError("mask without a pixel", **where)
        if subject.box is None and subject.reference is None and mask is not None:
            target_box, cut = mask_box(mask), 0
        else:
            target_box, cut = to_box(subject.box, target.size, item.normalised, {**where, "of": "target"})
        reference_box = target_box
        if subject.reference is not None:
            at = {**where, "of": "reference"}
            reference_box, also_cut = to_box(subject.reference_box, reference.size, item.normalised, at)
            cut += also_cut
        whole = np.ones(reference.pixels.shape[:2], dtype=bool) if mask is None else mask
        x1, y1, x2, y2 = box_in_pixels(reference_box, *reference.size)
        if not whole[y1:y2, x1:x2].any():
            raise ClipError("mask without a pixel inside its box", **where)
        boxes = {"target_box": target_box, "reference_box": reference_box}
        of = {"reference": reference, "single_frame": single_frame, "mask": mask}
        cutout = cut_out(reference.pixels, whole, reference_box)
        return CutSubject(subject=subject, cutout=cutout, **boxes, **of), int(cut)


@dataclass(kw_only=True)
class WritePairs(Step[CutItem, EncodedPair]):
    """Encodes the sample as ``data_pipeline.build`` does (docs/data_format.md).

    pipeline: version and settings hash, copied into every sample.
    """

    importer: str = field(**UNHASHED)
    pairs_per_shard: int = 1000
    jpeg_quality: int = 95
    pipeline: Mapping[str, str] = field(default_factory=dict, **UNHASHED)

    def __post_init__(self) -> None:
        self._writer = SHARDS.step(pairs_per_shard=self.pairs_per_shard, jpeg_quality=self.jpeg_quality)

    def process(self, cut: CutItem) -> EncodedPair | Rejected:
        """The sample."""
        opened = cut.opened
        target = opened.pictures[opened.item.target]
        metadata = self.metadata(cut, target)
        blocks = self._writer.encode(metadata, target.pixels, [subject.cutout for subject in cut.subjects])
        return EncodedPair(samples=(metadata,), blocks=blocks)

    def metadata(self, cut: CutItem, target: Picture) -> dict[str, Any]:
        """The json of the sample."""
        file = cut.opened.file
        source: dict[str, Any] = {"video": file.name, "sha256": target.sha256, "importer": self.importer}
        if any(subject.single_frame for subject in cut.subjects):
            source["single_frame"] = True
        if not all(subject.reference is target for subject in cut.subjects):
            source["references"] = [
                {"picture": each.reference.name, "sha256": each.reference.sha256, "size": list(each.reference.size)}
                for each in cut.subjects
            ]
        if cut.boxes_cut:
            source["boxes_cut"] = cut.boxes_cut
        return {
            "schema": PAIRS_SCHEMA,
            "key": file.key,
            "caption": cut.opened.item.caption,
            "width": target.size[0],
            "height": target.size[1],
            "subjects": [describe(subject, cut.opened.item.caption) for subject in cut.subjects],
            "source": source,
            "pipeline": dict(self.pipeline),
        }


def describe(cut: CutSubject, caption: str) -> dict[str, Any]:
    """The entry of one subject in the json of its sample. What an import does not know is missing, or null."""
    content: dict[str, Any] = {
        "phrase": cut.subject.phrase,
        "mention": mention_of(cut.subject.phrase, caption),
        "target_box": [round(value, 6) for value in cut.target_box],
        "reference_box": [round(value, 6) for value in cut.reference_box],
        "detection_score": 1.0,
        "match_similarity": 1.0 if cut.single_frame else None,
        "area": round(box_area(cut.target_box), 6),
        "attributes": dict(cut.subject.attributes),
    }
    if cut.mask is not None:
        content["reference_mask_rle"] = encode_mask(cut.mask)
        if cut.subject.reference is None:  # the reference picture is the target picture, so their masks are one
            content["target_mask_rle"] = content["reference_mask_rle"]
            content["area"] = round(float(cut.mask.mean()), 6)
    return content


def mention_of(phrase: str, caption: str) -> str:
    """The words of the caption that are the phrase, whatever their case; "" if it does not occur there."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    found = re.search(rf"(?<!\w){words}(?!\w)", caption, flags=re.IGNORECASE)
    return found[0] if found else ""
