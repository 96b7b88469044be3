"""The loaders of a training run: which pairs, in which order, in which process, from which place on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from msdiffusion.errors import DataError, RequestError
from msdiffusion.training.catalogue import Catalogue, read_catalogue, split_by_key
from msdiffusion.training.encodings.keys import PartKey, changing, part_keys
from msdiffusion.training.encodings.store import open_store
from msdiffusion.training.pairs.remote import ShardCache
from msdiffusion.training.processes import WORLD, process_rank
from msdiffusion.training.samples.augmentation import Augmentation
from msdiffusion.training.samples.batch import PairsBatch, TrainingSample
from msdiffusion.training.samples.collation import PairsCollator
from msdiffusion.training.samples.dataset import PairsDataset
from msdiffusion.training.samples.encoded import EncodingStore, Part
from msdiffusion.training.samples.loader import FixedSampler, PairsLoader, PlanSampler, make_loader
from msdiffusion.training.samples.mixture import MixedStore, Mixture
from msdiffusion.training.samples.place import Place, resumed_place
from msdiffusion.training.samples.plan import EpochPlan, PlannedDataset, padded_order
from msdiffusion.training.samples.settings import LoadingSettings, SampleSettings, SourceSettings
from msdiffusion.training.setting_names import grouped

SINGLE_FRAMES = 0.1
"""A greater share of pairs whose references come from the target picture itself is worth a warning."""


class PairsDataModule(pl.LightningDataModule):
    """Loaders for the pairs datasets that ``data_pipeline.build`` writes.

    The model must offer ``prepare_references(pictures) -> Tensor``, so that training sees references exactly as
    generation will, and ``latent_shape(height, width) -> (C, h, w)`` of the latents of a picture.

    Every sample of a run has a number, which decides all chance about it, and every place of the order follows from
    ``seed``: see ``EpochPlan``. A resumed run goes on at the very sample where the checkpoint was written, also in the
    middle of an epoch, with any number of workers, and of processes as long as their batches together are as large.

    Args:
        pairs: directory or address of the shards; or several of them with their weights, ``{source: weight}``: samples
            are then taken from each in these proportions (see ``EpochPlan`` for what an epoch is).
        resolution: side of the square training picture in pixels, a multiple of 8.
        validation_pairs: other pairs, used whole for validation. Without it, a part of ``pairs`` is held out.
        validation_fraction: that part, in [0, 1), by a hash of the key; 0 for no validation.
        test_pairs: pairs for ``lightning test`` and ``lightning predict``. Without it, these take the validation pairs.
        batch_size: per process.
        max_subjects: subjects of one picture that are trained together; batches are padded to it.
        bucket_step: 0 for square pictures. Else pictures of other aspects are cropped to the nearest of the sizes whose
            sides are multiples of this number of pixels, whose area is at most resolution², and whose aspect is
            between 1/2 and 2; a batch of all processes has one size.
        crop: "random" or "center" part of the training picture; validation always takes the centre.
        flip_probability: of mirroring the target and its boxes, in [0, 1].
        minimum_visible: a subject of whose box the crop leaves less than this part is dropped, in [0, 1].
        subject_dropout: per subject, the probability in [0, 1] that its box and its reference are left out while the
            caption still names it. One subject always stays.
        box_jitter: each edge of a box moves by up to this part of the box's side, in [0, 0.5).
        reference_augmentation: strength in [0, 1] of small changes to the references: rotation up to 15 degrees,
            shrinking by up to a quarter, brightness and contrast by up to 30 %.
        reference_flip_probability: of mirroring a reference, in [0, 1].
        lanes: from how many places of the dataset the samples come in turn; raised to a multiple of the number of
            processes. See ``EpochPlan``.
        shuffle_buffer: samples of a lane that are shuffled with one another.
        num_workers: processes that load. 0 is right for small pictures held in memory, on few cores.
        worker_start: how they start: "fork", "spawn" or "forkserver"; None for "fork" on Linux and Python's own choice
            elsewhere. Those that are not forked are sent the catalogue and what the model prepares references with.
        cache_megabytes: memory, per loading process, for decoded pairs. 0 reads the shards every time.
        encodings: what ``msdiffusion.training.precompute`` computed ahead: "auto" uses what is there and refuses what
            does not fit the run, "require" is an error where nothing is there, "off" looks for nothing.
        encodings_folder: the ``--out`` of that command; None: beside the shards.
        skip_damaged: leave damaged shards and pairs out with a warning. Otherwise they are an error.
        shard_folder: where shards from an address are kept; None for a folder in the user's cache.
        shard_gigabytes: how much of them is kept there.
        seed: of the order of the pairs and of all chance in training.
        reference_frame: "other": references come from the other frame of the video, as the method wants it. "target":
            from the target picture itself, for comparisons: such training teaches to copy and paste.

    Raises:
        RequestError: at construction, if a setting is out of range; when training starts, if the checkpoint that is to
            be resumed was written with other data, or a size of the pictures does not fit the model.
        DataError: in ``setup``, if the dataset is missing (the message says which command makes one), damaged, or of
            another schema.
    """

    def __init__(
        self,
        pairs: str | dict[str, float],
        resolution: int,
        validation_pairs: str | None = None,
        validation_fraction: float = 0.05,
        test_pairs: str | None = None,
        batch_size: int = 8,
        max_subjects: int = 4,
        bucket_step: int = 0,
        crop: Literal["random", "center"] = "center",
        flip_probability: float = 0.0,
        minimum_visible: float = 0.25,
        subject_dropout: float = 0.0,
        box_jitter: float = 0.0,
        reference_augmentation: float = 0.0,
        reference_flip_probability: float = 0.0,
        lanes: int = 8,
        shuffle_buffer: int = 2048,
        num_workers: int = 0,
        worker_start: Literal["fork", "spawn", "forkserver"] | None = None,
        cache_megabytes: int = 1024,
        encodings: Literal["auto", "require", "off"] = "auto",
        encodings_folder: str | None = None,
        skip_damaged: bool = False,
        shard_folder: str | None = None,
        shard_gigabytes: float = 64.0,
        seed: int = 0,
        reference_frame: Literal["other", "target"] = "other",
    ) -> None:
        given = locals()
        super().__init__()
        self.samples = grouped(SampleSettings, given, augmentation=grouped(Augmentation, given))
        self.source = grouped(SourceSettings, given)
        self.loading = grouped(LoadingSettings, given)
        self.training: PairsDataset | None = None
        self.validation: PairsDataset | None = None
        self.test: PairsDataset | None = None
        self._digest = ""
        self._sampler: PlanSampler | None = None
        self._resumed: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find and index the shards. Lightning does this before the model loads: a missing dataset is told at once."""
        if stage in ("test", "predict") and self.source.test_pairs is not None:
            if self.test is None:
                self.test = self._whole(self.source.test_pairs)
            return
        if self.training is not None:
            return
        mixture = Mixture([self._catalogue(source) for source in self.source.weights])
        fraction = 0.0 if self.source.validation_pairs is not None else self.source.validation_fraction
        splits = [split_by_key(catalogue, fraction) for catalogue in mixture.catalogues]
        training, held_out = (
            np.concatenate([split[side] + start for split, start in zip(splits, mixture.starts[:-1], strict=True)])
            for side in (0, 1)
        )
        num_processes, batches = self._processes()[1], self._batches_per_step()
        size = self.loading.batch_size
        if stage in ("fit", None) and len(training) < size * num_processes * batches:
            processes = f" in each of {num_processes} processes" if num_processes > 1 else ""
            one = "one batch" if batches == 1 else f"the {batches} batches of a step (trainer.accumulate_grad_batches)"
            raise DataError(
                f"{', '.join(self.source.weights)} has {len(training)} pairs to train on, fewer than {one} of "
                f"{size}{processes}; mine more clips, or train with a smaller data.init_args.batch_size"
            )
        self.training = PairsDataset(mixture, training, self.samples, augmented=True)
        self._digest = mixture.digest(training)
        if stage in ("fit", None) and self.samples.reference_frame == "other":
            _warn_of_single_frames(mixture)
        self.validation = (
            PairsDataset(mixture, held_out, self.samples)
            if self.source.validation_pairs is None
            else self._whole(self.source.validation_pairs)
        )

    def train_dataloader(self) -> PairsLoader:
        """All processes together see the batches of the plan, from the place on where a resumed run stopped.

        Raises:
            RequestError: if the checkpoint that is resumed was written with other data, or doesn't say where it was.
        """
        rank, num_processes = self._processes()
        hparams = getattr(self.trainer.lightning_module, "hparams", {})
        if self.samples.augmentation.changes_references and hparams.get("cache_encodings", False):
            raise RequestError(
                "cache_encodings keeps the encoding of every reference, but reference_augmentation or "
                "reference_flip_probability make each one another picture every time, so memory would fill with "
                "encodings that nobody asks for again; set one of them off: --model.init_args.cache_encodings false"
            )
        plan = self.plan(num_processes)
        self._sampler = PlanSampler(plan, rank, num_processes, self._first_place(plan))
        return self._loader(self._with_encodings(self.training), self._sampler)

    def val_dataloader(self) -> PairsLoader | list:
        """In the order of the files; nothing where there is no validation pair."""
        return self._fixed_loader(self.validation)

    def test_dataloader(self) -> PairsLoader | list:
        """The pairs of ``test_pairs``, or the validation pairs."""
        return self._fixed_loader(self.validation if self.test is None else self.test)

    def predict_dataloader(self) -> PairsLoader | list:
        """As ``test_dataloader``, always with the pictures of the pairs: predictions are shown beside them."""
        return self._fixed_loader(self.validation if self.test is None else self.test, pictures=True)

    def plan(self, num_processes: int) -> EpochPlan:
        """The order of the run when so many processes share it; after ``setup``."""
        dataset, shards = self.training, self.training.pairs.shards
        parts = np.searchsorted(dataset.indices, dataset.pairs.starts)
        plan = EpochPlan(
            [
                PlannedDataset(dataset.indices[start:end], shards[dataset.indices[start:end]], weight, source)
                for (source, weight), start, end in zip(self.source.weights.items(), parts[:-1], parts[1:], strict=True)
            ],
            seed=self.samples.seed,
            global_batch=num_processes * self.loading.batch_size,
            lanes=-(-self.loading.lanes // num_processes) * num_processes,
            shuffle_buffer=self.loading.shuffle_buffer,
            buckets=dataset.buckets,
            batches_per_step=self._batches_per_step(),
        )
        if lost := plan.pairs_never_trained():
            named = ", ".join(
                f"{count} of {'x'.join(map(str, self.samples.sizes[bucket]))}" for bucket, count in lost.items()
            )
            rank_zero_warn(
                f"pairs that are never trained on, because their bucket has fewer than one batch of "
                f"{plan.global_batch}: {named} pixels. A larger bucket_step makes fewer buckets."
            )
        return plan

    def teardown(self, stage: str | None = None) -> None:
        """Close the shards; reading opens them again."""
        for catalogue in self.catalogues():
            catalogue.close()

    def validation_samples(self, count: int) -> list[TrainingSample]:
        """The first ``count`` validation pairs, the same every time, with pictures; fewer where there are fewer."""
        return [self.validation[i] for i in range(min(count, len(self.validation)))]

    def catalogues(self) -> list[Catalogue]:
        """Every dataset of the run, each once: those to train on, to validate on and to test on; after ``setup``."""
        datasets = [dataset for dataset in (self.training, self.validation, self.test) if dataset is not None]
        found = [catalogue for dataset in datasets for catalogue in dataset.pairs.catalogues]
        return list({id(catalogue): catalogue for catalogue in found}.values())

    def fixed_dataset(self, catalogue: Catalogue) -> PairsDataset:
        """All pairs of a dataset as validation sees them, by their numbers in the catalogue."""
        return PairsDataset(Mixture([catalogue]), np.arange(len(catalogue)), self.samples)

    def collate(self, samples: Sequence[TrainingSample]) -> PairsBatch:
        """Samples to a batch, as the loaders do it."""
        return self._collator()(samples)

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, and what it is a place in. Lightning keeps it in every checkpoint."""
        if self._sampler is None:
            return {}
        plan = self._sampler.plan
        epoch, batch = self._sampler.place.to_resume(self.trainer.fit_loop, plan.batches_per_epoch)
        return {"epoch": epoch, "batch": batch, "data": self._identity(plan)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember it until the loader of the training pairs is made."""
        self._resumed = dict(state)

    def _first_place(self, plan: EpochPlan) -> Place:
        fit_loop = getattr(self.trainer, "fit_loop", None)
        if fit_loop is None or not fit_loop.is_resuming:
            # another fit of the same trainer goes on with the next epoch
            return Place(0 if fit_loop is None else fit_loop.epoch_progress.current.processed)
        return resumed_place(self._resumed, self._identity(plan), fit_loop)

    def _identity(self, plan: EpochPlan) -> dict[str, Any]:
        return plan.identity() | {"keys of the pairs": self._digest}

    def _processes(self) -> tuple[int, int]:
        """(rank of this process, how many there are)."""
        if WORLD in os.environ:
            return process_rank(), int(os.environ[WORLD])
        return getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)

    def _batches_per_step(self) -> int:
        return getattr(self.trainer, "accumulate_grad_batches", 1)

    def _catalogue(self, source: str) -> Catalogue:
        cache = ShardCache(self.source.shard_folder, int(self.source.shard_gigabytes * 2**30))
        return read_catalogue(source, skip_damaged=self.source.skip_damaged, cache=cache)

    def _whole(self, source: str) -> PairsDataset:
        return self.fixed_dataset(self._catalogue(source))

    def _stores(self, dataset: PairsDataset) -> EncodingStore | None:
        wanted, model = self.source.encodings, self.trainer.lightning_module
        if wanted == "off":
            return None

        def keys() -> dict[Part, PartKey]:
            return part_keys(self.samples, model.backbone, model.adapter.config)

        never, folder = changing(self.samples.augmentation), self.source.encodings_folder
        stores = [
            open_store(catalogue, never, keys, folder, wanted == "require") for catalogue in dataset.pairs.catalogues
        ]
        return None if any(store is None for store in stores) else MixedStore(dataset.pairs, stores)

    def _collator(self) -> PairsCollator:
        model = self.trainer.lightning_module
        shapes = {(h, w): model.latent_shape(h, w) for w, h in self.samples.sizes.tolist()}
        return PairsCollator(self.samples.max_subjects, model.prepare_references, shapes)

    def _with_encodings(self, dataset: PairsDataset) -> PairsDataset:
        return dataset.reading(self._stores(dataset))

    def _loader(self, dataset: PairsDataset, sampler: PlanSampler | FixedSampler) -> PairsLoader:
        return make_loader(dataset, sampler, self.loading, self._collator())

    def _fixed_loader(self, dataset: PairsDataset, pictures: bool = False) -> PairsLoader | list:
        """In order; ``pictures``: read them also where everything was encoded ahead."""
        if len(dataset) == 0:
            return []
        if not pictures:
            dataset = self._with_encodings(dataset)
        # of the processes of local_sgd only the first one validates
        rank, num_processes = (0, 1) if WORLD in os.environ else self._processes()
        numbers, indices = padded_order(dataset.indices, num_processes, self.loading.batch_size, dataset.buckets)
        return self._loader(dataset, FixedSampler(numbers, indices, rank, num_processes))


def _warn_of_single_frames(mixture: Mixture) -> None:
    shares = [catalogue.single_frame(64) for catalogue in mixture.catalogues]
    if max(shares) > SINGLE_FRAMES:
        rank_zero_warn(
            f"about {max(shares):.0%} of the pairs of a dataset have references from the target picture itself: such "
            "training teaches to copy and paste. Mine pairs from videos where you can, or mix them in with a greater "
            "weight"
        )
