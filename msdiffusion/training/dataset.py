"""Pairs -> training batches: resize, crop, order of the subjects, padding.

Shape letters: B batch, S subjects (padded in a batch), R side of the training picture, h w input of the image encoder.
Boxes are normalised xyxy unless a name says pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.cropping import choose_crop, crop_boxes, size_with_short_side
from msdiffusion.training.local_sgd import process_rank
from msdiffusion.training.shards import PairLocation, find_shards, index_shards, read_pair, split_by_key

PrepareReferences = Callable[[list[Image.Image]], Tensor]
"""RGBA pictures -> what the image encoder takes, float (N, 3, h, w); the model being trained provides it."""


@dataclass(frozen=True)
class TrainingSample:
    """One pair at training resolution, s <= S subjects of which all can be seen in the target."""

    key: str
    caption: str
    target: np.ndarray
    """uint8 (R, R, 3) RGB."""
    phrases: tuple[str, ...]
    boxes: np.ndarray
    """float32 (s, 4) in the cropped target."""
    references: tuple[Image.Image, ...]
    """RGBA cut-outs, any size."""
    reference_ids: tuple[str, ...]
    """Name of each reference, the same in every epoch: under it an encoding may be kept."""
    original_size: tuple[int, int]
    """(height, width) in pixels of the target before the resize: the first of SDXL's size conditions."""
    crop_top_left: tuple[int, int]
    """(top, left) in pixels of the resized target: the second of SDXL's size conditions."""


@dataclass
class PairsBatch:
    """A batch, padded to S subjects: a padding subject has present False, a zero box, phrase "" and zero pixels."""

    keys: list[str]
    captions: list[str]
    phrases: list[list[str]]
    """B lists of S phrases."""
    reference_ids: list[list[str]]
    """B lists of S names, "" for padding."""
    targets: Tensor
    """float32 (B, 3, R, R) in [-1, 1]."""
    boxes: Tensor
    """float32 (B, S, 4)."""
    present: Tensor
    """bool (B, S)."""
    references: Tensor
    """float32 (B, S, 3, h, w), as the image encoder takes them."""
    original_sizes: Tensor
    """int64 (B, 2)."""
    crops_top_left: Tensor
    """int64 (B, 2)."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PairsBatch":
        """The same batch with its tensors on a device (Lightning calls this)."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()})

    def pin_memory(self) -> "PairsBatch":
        """The same batch in page-locked memory (the data loader calls this)."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.pin_memory() for name, tensor in tensors.items()})


@dataclass(frozen=True)
class _ResizedPair:
    """A pair after everything that is the same in every epoch: what the memory cache holds."""

    caption: str
    target: np.ndarray
    """uint8 (H', W', 3), short side R."""
    original_size: tuple[int, int]
    phrases: tuple[str, ...]
    boxes: np.ndarray
    references: tuple[Image.Image, ...]

    @property
    def num_bytes(self) -> int:
        return self.target.nbytes + sum(4 * r.width * r.height for r in self.references)


class PairsDataset(Dataset[TrainingSample]):
    """Pairs at training resolution.

    Args:
        locations: the pairs, as ``index_shards`` finds them.
        resolution: side R of the training picture in pixels.
        max_subjects: of a pair with more, this many are chosen at random (the first ones where ``augment`` is False).
        crop: "random" or "center"; both leave the short side whole. Applies where ``augment`` is True.
        flip_probability: of mirroring target and boxes left to right. The references stay as they are.
        minimum_visible: see ``choose_crop``.
        augment: True for training. False gives the same sample every time: centre crop, no flip, order of the file.
        cache_bytes: resized pairs are kept in memory up to this size, in every process that reads.
        reference_frame: see ``read_pair``.
    """

    def __init__(
        self,
        locations: Sequence[PairLocation],
        resolution: int,
        max_subjects: int,
        *,
        crop: Literal["random", "center"] = "center",
        flip_probability: float = 0.0,
        minimum_visible: float = 0.25,
        augment: bool = True,
        cache_bytes: int = 0,
        reference_frame: Literal["other", "target"] = "other",
    ) -> None:
        self.reference_frame = reference_frame
        self.locations = list(locations)
        self.resolution = resolution
        self.max_subjects = max_subjects
        self.crop = crop
        self.flip_probability = flip_probability
        self.minimum_visible = minimum_visible
        self.augment = augment
        self._free_bytes = cache_bytes
        self._cache: dict[int, _ResizedPair] = {}

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.locations)

    def __getitem__(self, index: int) -> TrainingSample:
        """A sample; with ``augment`` its random choices come from torch's generator, which the loader seeds per worker.

        Raises:
            DataError: if the pair cannot be read.
        """
        pair = self._resized(index)
        generator = np.random.default_rng(int(torch.randint(2**62, ()))) if self.augment else None
        height, width = pair.target.shape[:2]
        side = self.resolution
        (top, left), kept = choose_crop(
            pair.boxes, (width, height), side, self.minimum_visible, generator if self.crop == "random" else None
        )
        if generator is not None:
            # the order decides nothing in the method, so the adapter must not learn any from the miner's habits
            kept = generator.permutation(kept)
        kept = kept[: self.max_subjects]
        boxes = crop_boxes(pair.boxes[kept], (width, height), (top, left), side)
        target = pair.target[top : top + side, left : left + side]
        if generator is not None and generator.random() < self.flip_probability:
            target = target[:, ::-1]
            boxes[:, [0, 2]] = 1 - boxes[:, [2, 0]]
            left = width - side - left  # SDXL's crop condition speaks of the picture as it is shown
        key, shard = self.locations[index].key, self.locations[index].shard
        return TrainingSample(
            key=key,
            caption=pair.caption,
            target=np.ascontiguousarray(target),
            phrases=tuple(pair.phrases[i] for i in kept),
            boxes=boxes,
            references=tuple(pair.references[i] for i in kept),
            # with the shard: keys are unique in one dataset only, and the validation pairs may be another one
            reference_ids=tuple(f"{shard}/{key}/{i}" for i in kept),
            original_size=pair.original_size,
            crop_top_left=(top, left),
        )

    def _resized(self, index: int) -> _ResizedPair:
        if index in self._cache:
            return self._cache[index]
        pair = read_pair(self.locations[index], self.reference_frame)
        width, height = pair.target.size
        size = size_with_short_side(width, height, self.resolution)
        target = pair.target if size == pair.target.size else pair.target.resize(size, Image.Resampling.LANCZOS)
        resized = _ResizedPair(
            caption=pair.caption,
            target=np.asarray(target),
            original_size=(height, width),
            phrases=pair.phrases,
            boxes=pair.boxes,
            references=pair.references,
        )
        if resized.num_bytes <= self._free_bytes:
            self._free_bytes -= resized.num_bytes
            self._cache[index] = resized
        return resized


class PairsCollator:
    """Samples -> PairsBatch. An object, not a closure, so that worker processes can be given it.

    Args:
        max_subjects: S, to which every sample is padded.
        prepare_references: of the model being trained.
    """

    def __init__(self, max_subjects: int, prepare_references: PrepareReferences) -> None:
        self.max_subjects = max_subjects
        self.prepare_references = prepare_references

    def __call__(self, samples: Sequence[TrainingSample]) -> PairsBatch:
        """Every sample has 1 to S subjects."""
        B, S = len(samples), self.max_subjects
        boxes = torch.zeros(B, S, 4)
        present = torch.zeros(B, S, dtype=torch.bool)
        for row, sample in enumerate(samples):
            boxes[row, : len(sample.boxes)] = torch.from_numpy(sample.boxes)
            present[row, : len(sample.boxes)] = True
        prepared = self.prepare_references([picture for sample in samples for picture in sample.references])
        references = prepared.new_zeros(B, S, *prepared.shape[1:])
        references[present] = prepared
        targets = torch.from_numpy(np.stack([sample.target for sample in samples]))
        return PairsBatch(
            keys=[sample.key for sample in samples],
            captions=[sample.caption for sample in samples],
            phrases=[_pad(sample.phrases, S) for sample in samples],
            reference_ids=[_pad(sample.reference_ids, S) for sample in samples],
            targets=targets.permute(0, 3, 1, 2).float() / 127.5 - 1,
            boxes=boxes,
            present=present,
            references=references,
            original_sizes=torch.tensor([sample.original_size for sample in samples]),
            crops_top_left=torch.tensor([sample.crop_top_left for sample in samples]),
        )


def _pad(strings: Sequence[str], length: int) -> list[str]:
    return [*strings, *[""] * (length - len(strings))]


class PairsDataModule(pl.LightningDataModule):
    """Loaders for the pairs datasets that ``data_pipeline.build`` writes.

    The model must offer ``prepare_references`` (see ``PrepareReferences``), so that training sees references exactly as
    generation will.

    Args:
        pairs: directory of the shards.
        resolution: side of the training picture in pixels, a multiple of 8.
        validation_pairs: another directory, used whole for validation. Without it, a part of ``pairs`` is held out.
        validation_fraction: that part, in [0, 1), by a hash of the key; 0 for no validation.
        batch_size: per process.
        max_subjects: subjects of one picture that are trained together; batches are padded to it.
        crop: "random" or "center" square of the training picture; validation always takes the centre.
        flip_probability: of mirroring the target and its boxes, in [0, 1].
        minimum_visible: a subject of whose box the crop leaves less than this part is dropped, in [0, 1].
        num_workers: processes that load. 0 is right for small pictures held in memory, on few cores.
        cache_megabytes: memory, per loading process, for decoded pairs. 0 reads the shards every time.
        seed: of the order of the pairs.
        reference_frame: "other": references come from the other frame of the video, as the method wants it. "target":
            from the target picture itself, for comparisons: such training teaches to copy and paste.

    Raises:
        RequestError: at construction, if a number is out of range.
        DataError: in ``setup``, if the dataset is missing (the message says which command makes one), damaged, or of
            another schema.
    """

    def __init__(
        self,
        pairs: str,
        resolution: int,
        validation_pairs: str | None = None,
        validation_fraction: float = 0.05,
        batch_size: int = 8,
        max_subjects: int = 4,
        crop: Literal["random", "center"] = "center",
        flip_probability: float = 0.0,
        minimum_visible: float = 0.25,
        num_workers: int = 0,
        cache_megabytes: int = 1024,
        seed: int = 0,
        reference_frame: Literal["other", "target"] = "other",
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("batch_size", batch_size, 1), ("max_subjects", max_subjects, 1),
            ("num_workers", num_workers, 0), ("cache_megabytes", cache_megabytes, 0),
        ):  # fmt: skip
            if number < least:
                raise RequestError(f"{name} must be at least {least}, got {number}")
        if resolution < 8 or resolution % 8:
            raise RequestError(f"resolution must be a positive multiple of 8, got {resolution}")
        for name, share in (("flip_probability", flip_probability), ("minimum_visible", minimum_visible)):
            if not 0 <= share <= 1:
                raise RequestError(f"{name} must be in [0, 1], got {share}")
        if not 0 <= validation_fraction < 1:
            raise RequestError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
        if crop not in ("random", "center"):
            raise RequestError(f"crop must be 'random' or 'center', got {crop!r}")
        if reference_frame not in ("other", "target"):
            raise RequestError(f"reference_frame must be 'other' or 'target', got {reference_frame!r}")
        self.reference_frame = reference_frame
        self.pairs = pairs
        self.resolution = resolution
        self.validation_pairs = validation_pairs
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.max_subjects = max_subjects
        self.crop = crop
        self.flip_probability = flip_probability
        self.minimum_visible = minimum_visible
        self.num_workers = num_workers
        self.cache_megabytes = cache_megabytes
        self.seed = seed
        self.training: PairsDataset | None = None
        self.validation: PairsDataset | None = None

    def setup(self, stage: str | None = None) -> None:
        """Find and index the shards. Lightning does this before the model loads: a missing dataset is told at once."""
        if self.training is not None:
            return
        locations = index_shards(find_shards(self.pairs))
        if self.validation_pairs is not None:
            held_out = index_shards(find_shards(self.validation_pairs))
        else:
            locations, held_out = split_by_key(locations, self.validation_fraction)
        if len(locations) < self.batch_size:
            raise DataError(
                f"{self.pairs} has {len(locations)} pairs to train on, fewer than one batch of {self.batch_size}; "
                "mine more clips, or train with a smaller data.init_args.batch_size"
            )
        self.training = self._dataset(locations, augment=True)
        self.validation = self._dataset(held_out, augment=False)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, the last batch dropped where it is not full."""
        return self._loader(self.training, shuffle=True)

    def val_dataloader(self) -> DataLoader | list:
        """In the order of the files; nothing where there is no validation pair."""
        return self._loader(self.validation, shuffle=False) if len(self.validation) else []

    def validation_samples(self, count: int) -> list[TrainingSample]:
        """The first ``count`` validation pairs, the same every time; fewer where there are fewer."""
        return [self.validation[i] for i in range(min(count, len(self.validation)))]

    def collate(self, samples: Sequence[TrainingSample]) -> PairsBatch:
        """Samples to a batch, as the loaders do it."""
        return self._collator()(samples)

    def _dataset(self, locations: Sequence[PairLocation], augment: bool) -> PairsDataset:
        return PairsDataset(
            locations,
            self.resolution,
            self.max_subjects,
            crop=self.crop if augment else "center",
            flip_probability=self.flip_probability,
            minimum_visible=self.minimum_visible,
            augment=augment,
            cache_bytes=self.cache_megabytes * 2**20,
            reference_frame=self.reference_frame,
        )

    def _collator(self) -> PairsCollator:
        return PairsCollator(self.max_subjects, self.trainer.lightning_module.prepare_references)

    def _loader(self, dataset: PairsDataset, shuffle: bool) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # the processes of local_sgd each draw an order of their own
            generator=torch.Generator().manual_seed(1000 * self.seed + process_rank()) if shuffle else None,
            collate_fn=self._collator(),
        )
