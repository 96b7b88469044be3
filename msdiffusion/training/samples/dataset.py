"""Pairs -> training samples: resize, crop, order of the subjects, what chance changes.

Shape letters: B batch, S subjects (padded in a batch), s subjects of one sample, H W height and width of the training
picture, h w those of the image encoder's input. Boxes are normalised xyxy unless a name says pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from msdiffusion.errors import DataError
from msdiffusion.training.pairs.shards import Pair, phrases_and_boxes
from msdiffusion.training.samples.augmentation import (
    SampleChances,
    change_reference,
    drop_subjects,
    jitter_boxes,
)
from msdiffusion.training.samples.batch import LoadingFailure, TrainingSample
from msdiffusion.training.samples.cropping import choose_crop, crop_boxes, nearest_buckets, size_that_covers
from msdiffusion.training.samples.draws import OBJECTIVE, VALIDATION, number_of
from msdiffusion.training.samples.encoded import EncodingStore
from msdiffusion.training.samples.mixture import Mixture
from msdiffusion.training.samples.settings import SampleSettings


@dataclass(frozen=True)
class _ResizedPair:
    """A pair after everything that is the same in every epoch: what the memory cache holds."""

    caption: str
    target: np.ndarray | None
    """uint8 (H', W', 3), as small as covers the training picture; None where it was encoded ahead."""
    resized: tuple[int, int]
    """(width, height) of that."""
    original_size: tuple[int, int]
    """(height, width)."""
    phrases: tuple[str, ...]
    boxes: np.ndarray
    references: tuple[Image.Image, ...] | None
    """None where they were encoded ahead."""

    @property
    def num_bytes(self) -> int:
        pictures = 0 if self.target is None else self.target.nbytes
        return 1000 + pictures + sum(4 * r.width * r.height for r in self.references or ())


class PairsDataset(Dataset[TrainingSample]):
    """Pairs at training resolution.

    An item is asked for by ``(number, index)``: sample ``number`` of the run shows the pair with this index in the
    catalogue. All chance about it comes from the number, so that any process may make it at any time.
    ``dataset[i]`` with one number is sample i of the i-th pair.

    Args:
        pairs: where they are read from.
        indices: int64 (n,), the pairs that belong to this dataset.
        settings: how they become samples.
        augmented: as in training. Otherwise the same sample every time: centre crop, nothing changed, subjects in the
            order of the file; as in validation, where a number of n or more marks a repetition that shall not count
            (weight 0).
        store: encodings made ahead; pictures that it stands for are not decoded.
    """

    def __init__(
        self,
        pairs: Mixture,
        indices: np.ndarray,
        settings: SampleSettings,
        *,
        augmented: bool = False,
        store: EncodingStore | None = None,
    ) -> None:
        self.pairs = pairs
        self.indices = indices
        self.settings = settings
        self.augmentation = settings.augmentation if augmented else None
        self.store = store
        # int (len(pairs),), row of the sizes for each pair; None where there is one size only
        self.buckets = nearest_buckets(pairs.sizes, settings.sizes) if len(settings.sizes) > 1 else None
        self._free_bytes = int(settings.cache_megabytes * 2**20)
        self._cache: dict[int, _ResizedPair] = {}

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.indices)

    def reading(self, store: EncodingStore | None) -> PairsDataset:
        """The same pairs with encodings made ahead, or without."""
        augmented = self.augmentation is not None
        return PairsDataset(self.pairs, self.indices, self.settings, augmented=augmented, store=store)

    def size_of(self, index: int) -> tuple[int, int]:
        """(width, height) in pixels of the training picture of a pair."""
        width, height = self.settings.sizes[0 if self.buckets is None else self.buckets[index]].tolist()
        return width, height

    def centred_target(self, pair: Pair, index: int) -> np.ndarray:
        """uint8 (H, W, 3): the target of a pair as every epoch shows it where the crop is the centre, and no flip."""
        crop = self.size_of(index)
        size = size_that_covers(*pair.target.size, crop)
        (top, left), _ = choose_crop(pair.boxes, size, crop, self.settings.minimum_visible, None)
        return np.ascontiguousarray(_resize(pair.target, size)[top : top + crop[1], left : left + crop[0]])

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[TrainingSample | LoadingFailure]:
        """The samples of a batch. What cannot be read is handed on as a message: the loader raises it where it is seen.

        An error that is raised in a loading worker would arrive as a text with the worker's own stack in it.
        """
        samples: list[TrainingSample | LoadingFailure] = []
        for item in items:
            try:
                samples.append(self[item])
            except DataError as error:
                samples.append(LoadingFailure(str(error)))
        return samples

    def __getitem__(self, item: tuple[int, int] | int) -> TrainingSample:
        """A sample.

        Raises:
            DataError: if the pair cannot be read.
            IndexError: if there is no pair of this number; those below 0 do not count from the end.
        """
        if not isinstance(item, tuple) and not 0 <= item < len(self.indices):
            raise IndexError(f"pairs are numbered from 0 to {len(self.indices) - 1}, so there is no number {item}")
        number, index = item if isinstance(item, tuple) else (item, int(self.indices[item]))
        pair = self._resized(index)
        crop = self.size_of(index)
        change, chances = self.augmentation, SampleChances.draw(self.settings.seed, number, len(pair.phrases))
        where = chances.crop if change is not None and change.crop == "random" else None
        (top, left), kept = choose_crop(pair.boxes, pair.resized, crop, self.settings.minimum_visible, where)
        if change is not None:
            # the order decides nothing in the method, so the adapter must not learn any from the miner's habits
            kept = kept[np.argsort(chances.order[kept])]
            kept = drop_subjects(kept, change.subject_dropout, chances.dropout)
        kept = kept[: self.settings.max_subjects]
        boxes = crop_boxes(pair.boxes[kept], pair.resized, (top, left), crop)
        target = None if pair.target is None else pair.target[top : top + crop[1], left : left + crop[0]]
        if change is not None and chances.flip < change.flip_probability:
            target = None if target is None else target[:, ::-1]
            boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
            left = pair.resized[0] - crop[0] - left  # SDXL's crop condition speaks of the picture as it is shown
        if change is not None:
            boxes = jitter_boxes(boxes, change.box_jitter, chances.jitter[kept])
        key, shard = self.pairs.key(index), self.pairs.shard_name(index)
        # with the shard: keys are unique in one dataset only, and the validation pairs may be another one
        names = [f"{shard}/{key}/{i}" for i in kept]
        if change is not None and change.changes_references:
            names = [f"{name}#{number}" for name in names]  # another picture each time
        return TrainingSample(
            number=number,
            weight=1.0 if change is not None or number < len(self) else 0.0,
            stream=(self.settings.seed, OBJECTIVE, number) if change is not None else (0, VALIDATION, number_of(key)),
            key=key,
            caption=pair.caption,
            size=(crop[1], crop[0]),
            target=None if target is None else np.ascontiguousarray(target),
            phrases=tuple(pair.phrases[i] for i in kept),
            boxes=boxes,
            references=self._references(pair, kept, chances),
            reference_ids=tuple(names),
            original_size=pair.original_size,
            crop_top_left=(top, left),
            encoded=None if self.store is None else self.store.read(index).subjects(kept.tolist()),
        )

    def _references(
        self, pair: _ResizedPair, kept: np.ndarray, chances: SampleChances
    ) -> tuple[Image.Image, ...] | None:
        if pair.references is None:
            return None
        change, references = self.augmentation, [pair.references[i] for i in kept]
        if change is not None and change.changes_references:
            flips = chances.references[kept, 0] < change.reference_flip_probability
            references = [
                change_reference(reference, change.reference_augmentation, bool(flip), uniforms)
                for reference, flip, uniforms in zip(references, flips, chances.references[kept, 1:], strict=True)
            ]
        return tuple(references)

    def _resized(self, index: int) -> _ResizedPair:
        if index in self._cache:
            return self._cache[index]
        crop = self.size_of(index)
        have = frozenset() if self.store is None else self.store.parts
        resized = self._read(index, crop, "latents" not in have, "references" not in have)
        if resized.num_bytes <= self._free_bytes:
            self._free_bytes -= resized.num_bytes
            self._cache[index] = resized
        return resized

    def _read(self, index: int, crop: tuple[int, int], target: bool, references: bool) -> _ResizedPair:
        """A pair with its pictures, or without those that are not needed; with neither, none is decoded."""
        if target or references:
            pair = self.pairs.read(index, self.settings.reference_frame)
            caption, phrases, boxes, size = pair.caption, pair.phrases, pair.boxes, pair.target.size
        else:
            record, size = self.pairs.record(index), self.pairs.size(index)
            caption, (phrases, boxes) = record["caption"], phrases_and_boxes(record)
        covering = size_that_covers(*size, crop)
        return _ResizedPair(
            caption=caption,
            target=_resize(pair.target, covering) if target else None,
            resized=covering,
            original_size=size[::-1],
            phrases=phrases,
            boxes=boxes,
            references=pair.references if references else None,
        )


def _resize(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """uint8 (height, width, 3)."""
    return np.asarray(picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS))
