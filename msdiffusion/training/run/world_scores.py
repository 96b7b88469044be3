"""World scores while a run trains: held-out pairs are drawn, and the world's instruments look at the pictures.

What the figures mean is in docs/evaluation.md. They are for pairs that were mined from clips of the procedural world,
whose records keep who every subject is; other datasets have no such truth, and get no scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from msdiffusion.errors import RequestError
from msdiffusion.places import DEFAULT_MODEL, find_model
from msdiffusion.training.run.every_n_steps import in_first_process
from msdiffusion.training.run.pictures import draw_samples

if TYPE_CHECKING:
    from PIL import Image

    from data_pipeline.world import Identity
    from msdiffusion.evaluation.measures import Gallery, Instruments
    from msdiffusion.evaluation.world import WorldCase
    from msdiffusion.training.samples.batch import TrainingSample
    from msdiffusion.training.samples.dataset import PairsDataset

SCORES = ("category", "color", "body_color", "pattern", "confusion", "layout", "retrieval", "product")
"""Rates in [0, 1] over subjects (the product: over pictures). All but the confusion are better if greater."""


class WorldScores(pl.Callback):
    """Draws the first validation pairs at every n-th validation and logs ``validation/score_NAME`` for each of SCORES.

    They may decide which weights are best: ``RunCheckpoint(monitor="validation/score_retrieval", mode="max")``. Noise
    is the same every time. Where the pairs are not of the world it says so once, and does nothing.

    Args:
        count: pairs to draw.
        every_n_validations: at which validations.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        scale: weight of the subjects.
        seed: of the noise.
        instruments: folder with ``judge``, ``locator`` and ``recognizer``; None for the embedded ones.

    Raises:
        RequestError: at construction, if a number is below 1.
        WeightsError: before the base is loaded, if an instrument is missing.
    """

    def __init__(
        self,
        count: int = 16,
        every_n_validations: int = 1,
        num_steps: int = 25,
        guidance_scale: float = 3.0,
        scale: float = 1.0,
        seed: int = 0,
        instruments: str | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("count", count), ("every_n_validations", every_n_validations), ("num_steps", num_steps)):
            if number < 1:
                raise RequestError(f"{name} must be at least 1, got {number}")
        self.count = count
        self.every_n_validations = every_n_validations
        self.settings = {"num_steps": num_steps, "guidance_scale": guidance_scale, "scale": scale}
        self.seed = seed
        self.instruments = str(DEFAULT_MODEL) if instruments is None else find_model(instruments)
        self._validations = 0
        self._samples: list[TrainingSample] = []
        self._cases: list[WorldCase] = []
        self._looking: tuple[Instruments, Gallery] | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were, so that a resumed run draws at the same ones."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``state_dict``."""
        self._validations = state_dict["validations"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds the pairs and their truth, and loads the instruments, in the first process."""
        if stage not in ("fit", "validate") or not trainer.is_global_zero or self._looking is not None:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        samples = [] if datamodule is None else datamodule.validation_samples(self.count)
        if not samples:
            return
        subjects = subjects_of(datamodule.validation, samples)
        if subjects is None:
            rank_zero_warn(
                "WorldScores: the records of these pairs do not say who of the procedural world their subjects are "
                "(those that a detector has found never do), so there is no truth to score by"
            )
            return
        from msdiffusion.evaluation.measures import Gallery, Instruments

        self._samples, self._cases = samples, [_case(*both) for both in zip(samples, subjects, strict=True)]
        instruments = Instruments.from_pretrained(self.instruments)
        self._looking = instruments, Gallery(instruments.recognizer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, looks and logs; before the end of the validation, so that the best weights may go by it."""
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        with in_first_process(trainer, pl_module) as here:
            if here and self._looking is not None:
                pictures = self._draw(trainer.datamodule, pl_module)
                for name, value in score_pictures(self._cases, pictures, *self._looking).items():
                    pl_module.log(f"validation/score_{name}", value, rank_zero_only=True, batch_size=len(pictures))

    def _draw(self, datamodule: Any, module: Any) -> list[Image.Image]:
        size = datamodule.loading.batch_size  # what fits into memory to train fits to draw
        pictures = []
        for start in range(0, len(self._samples), size):
            samples = self._samples[start : start + size]
            pictures += draw_samples(module, datamodule, samples, seed=self.seed + start, **self.settings)
        return pictures


def subjects_of(dataset: PairsDataset, samples: Sequence[TrainingSample]) -> list[list[Identity]] | None:
    """Who the subjects of samples are, by the records of their pairs; None where the pairs are not of the world.

    Args:
        samples: unchanged, as in validation.
    """
    from data_pipeline.world import Identity

    wanted, records = {sample.key for sample in samples}, {}
    for index in dataset.indices:
        key = dataset.pairs.key(int(index))
        if key in wanted:
            records.setdefault(key, dataset.pairs.record(int(index)))
        if len(records) == len(wanted):
            break
    try:
        return [
            [Identity(**records[sample.key]["subjects"][_place(name)]["attributes"]) for name in sample.reference_ids]
            for sample in samples
        ]
    except (KeyError, TypeError, ValueError):  # no attributes, others, or values that the world doesn't know
        return None


def score_pictures(
    cases: Sequence[WorldCase], pictures: Sequence[Image.Image], instruments: Instruments, gallery: Gallery
) -> dict[str, float]:
    """The means of SCORES over pictures.

    Args:
        cases: what was asked for, and the truth.
        pictures: one per case.

    Returns:
        Name to rate; the confusion is left out where no picture has subjects to be confused.
    """
    from msdiffusion.evaluation.instruments.locator import layout_ious
    from msdiffusion.evaluation.world import BOX_QUESTIONS, mark_mixing, mark_readings, read_pictures

    readings = read_pictures(instruments.judge, cases, pictures)
    marks = mark_readings(cases, readings)
    found = {question: marks[question].astype(np.float64) for question in BOX_QUESTIONS}
    mixed = mark_mixing(cases, readings)
    found["confusion"] = mixed[~np.isnan(mixed)]
    located = instruments.locator.find(list(pictures))
    found["layout"] = np.concatenate(
        [layout_ious(case.boxes, boxes) for case, boxes in zip(cases, located, strict=True)]
    )
    shown = instruments.recognizer.embed(list(pictures), [case.boxes for case in cases])
    own = gallery.own_views(cases)
    found["retrieval"] = gallery.first_places(cases, shown, own).astype(np.float64)
    cosines = np.clip((shown * own).sum(1), 0.0, 1.0).astype(np.float64)
    ends = np.cumsum([len(case.subjects) for case in cases])
    found["product"] = np.array([part.prod() for part in np.split(cosines, ends[:-1])])
    return {name: float(found[name].mean()) for name in SCORES if len(found[name])}


def _place(reference_id: str) -> int:
    """Place of a subject in its record: the last part of ``TrainingSample.reference_ids``."""
    return int(reference_id.rpartition("/")[2])


def _case(sample: TrainingSample, subjects: Sequence[Identity]) -> WorldCase:
    from PIL import Image

    from msdiffusion.evaluation.world import WorldCase

    truth = Image.fromarray(sample.target)
    return WorldCase(
        prompt=sample.caption,
        phrases=sample.phrases,
        boxes=tuple(tuple(float(edge) for edge in box) for box in sample.boxes),
        references=sample.references,
        seed=0,
        subjects=tuple(subjects),
        background="",  # pairs don't say it
        truth=truth,
        masks=np.zeros((len(subjects), *sample.target.shape[:2]), bool),
        reference_poses=(),
    )
