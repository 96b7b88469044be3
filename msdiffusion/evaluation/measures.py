"""Everything that is measured on pictures of world cases, per subject and per picture, as plain arrays.

The judge answers questions, the locator finds boxes, the recognizer looks individuals up. Intervals and comparisons are
made from the arrays, so that any two methods can be compared later on the same cases.

Letters: S subjects of all cases together, B cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.world import CATEGORIES, Identity, render_subject, sample_identity
from msdiffusion.errors import DataError
from msdiffusion.evaluation import scores
from msdiffusion.evaluation.instruments.judge import Judge
from msdiffusion.evaluation.instruments.locator import Locator, layout_ious
from msdiffusion.evaluation.instruments.recognizer import Recognizer
from msdiffusion.evaluation.world import WorldCase, mark_mixing, mark_readings, read_pictures

CANDIDATES = 100
"""Held-out individuals of one category among which a subject is looked up."""
POSES = 4
"""Poses that are tried, each in both directions, to see whether a subject stands as in its reference."""
COPY_SIDE = 24
"""Side in pixels that boxes are resampled to when poses are compared."""


@dataclass(frozen=True)
class Measure:
    """One column of a benchmark.

    Attributes:
        title: for tables.
        meaning: one line for people.
        per: "subject" or "picture".
        better: 1 if more is better, -1 if less is, 0 if neither is.
    """

    title: str
    meaning: str
    per: str
    better: int


MEASURES: Mapping[str, Measure] = {
    "background": Measure("background", "the judge sees the background that the prompt names", "picture", 1),
    "category": Measure("category", "the judge sees the subject's category in its box", "subject", 1),
    "color": Measure("main colour", "the judge sees the subject's main colour", "subject", 1),
    "body_color": Measure(
        "body colour", "the main colour, or the second one where the pattern covers half of the body", "subject", 1
    ),
    "pattern": Measure("pattern", "the judge sees the subject's pattern", "subject", 1),
    "layout": Measure("layout IoU", "IoU of the box the locator finds with the requested box", "subject", 1),
    "retrieval": Measure(
        "retrieval", f"the subject is the nearest of {CANDIDATES} held-out individuals of its category", "subject", 1
    ),
    "product": Measure(
        "product", "cosines of all subjects of a picture with their true selves, multiplied", "picture", 1
    ),
    "confusion": Measure("confusion", "the box shows the main colour of another subject of the picture", "subject", -1),
    "copy": Measure(
        "copy-paste",
        f"of {2 * POSES} poses the one of the reference fits best, where the category is right; the rate of the true "
        "renders is luck, more is copying",
        "subject",
        0,
    ),
}


@dataclass(frozen=True)
class Instruments:
    """The three networks that look at pictures."""

    judge: Judge
    locator: Locator
    recognizer: Recognizer

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Instruments:
        """Loads `judge`, `locator` and `recognizer` from a directory of these names.

        Raises:
            WeightsError: one is missing or can't be loaded.
        """
        folder = Path(directory)
        return cls(
            Judge.from_pretrained(folder / "judge"),
            Locator.from_pretrained(folder / "locator"),
            Recognizer.from_pretrained(folder / "recognizer"),
        )


class Gallery:
    """Pictures of held-out individuals, embedded: the candidates of the retrieval.

    Args:
        recognizer: embeds them.
        size: side of their pictures in pixels.
        seed: of identities and poses.
        candidates: individuals that a subject is looked up among, itself included.
    """

    def __init__(self, recognizer: Recognizer, size: int = 64, seed: int = 0, candidates: int = CANDIDATES) -> None:
        if not 2 <= candidates <= 1000:  # there are some thousand held-out individuals of a category
            raise DataError(f"a retrieval needs 2 to 1000 candidates, got {candidates}")
        self.recognizer, self.size, self.seed, self.candidates = recognizer, size, seed, candidates
        self._others: dict[str, tuple[list[Identity], np.ndarray]] = {}

    def _of(self, category: str) -> tuple[list[Identity], np.ndarray]:
        if category not in self._others:
            rng = np.random.default_rng([self.seed, 0xFACE, CATEGORIES.index(category)])
            chosen: dict[Identity, None] = {}
            while len(chosen) < self.candidates:
                chosen.setdefault(sample_identity(rng, "held_out", category))
            pictures = [render_subject(identity, self.size, pose=float(rng.random())) for identity in chosen]
            self._others[category] = list(chosen), self.recognizer.embed_views(pictures)
        return self._others[category]

    def own_views(self, cases: Sequence[WorldCase]) -> np.ndarray:
        """Unit vectors (S, D) of the subjects themselves, each drawn alone in a pose of its own."""
        rng = np.random.default_rng([self.seed, 0x5E1F])
        pictures = [
            render_subject(subject, self.size, pose=float(rng.random())) for case in cases for subject in case.subjects
        ]
        return self.recognizer.embed_views(pictures)

    def first_places(self, cases: Sequence[WorldCase], shown: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Whether each subject's own view is nearer to what its box shows than every other candidate.

        Args:
            cases: whose subjects are looked up.
            shown: unit vectors (S, D) of the boxes.
            own: from `own_views`.

        Returns:
            bool (S,).
        """
        subjects = [subject for case in cases for subject in case.subjects]
        found = np.zeros(len(subjects), bool)
        for index, subject in enumerate(subjects):
            identities, embeddings = self._of(subject.category)
            rivals = [row for row, other in enumerate(identities) if other != subject][: self.candidates - 1]
            found[index] = shown[index] @ own[index] > (embeddings[rivals] @ shown[index]).max()
        return found


def measure_pictures(
    cases: Sequence[WorldCase], pictures: Sequence[Image.Image], instruments: Instruments, gallery: Gallery
) -> dict[str, np.ndarray]:
    """Every measure of MEASURES on one picture per case.

    Args:
        cases: at least one.
        pictures: RGB, one per case.
        instruments: look at them.
        gallery: for the retrieval.

    Returns:
        measure to float64 (S,) or (B,), the subjects of the first case first; NaN where a measure doesn't apply.

    Raises:
        DataError: other numbers of pictures and cases, or none.
    """
    if not cases or len(cases) != len(pictures):
        raise DataError(f"every case needs one picture: {len(cases)} cases, {len(pictures)} pictures")
    readings = read_pictures(instruments.judge, cases, pictures)
    result = {name: flags.astype(np.float64) for name, flags in mark_readings(cases, readings).items()}
    result["confusion"] = mark_mixing(cases, readings)
    located = instruments.locator.find(list(pictures))
    result["layout"] = np.concatenate(
        [layout_ious(case.boxes, found) for case, found in zip(cases, located, strict=True)]
    )
    shown = instruments.recognizer.embed(list(pictures), [case.boxes for case in cases])
    own = gallery.own_views(cases)
    result["retrieval"] = gallery.first_places(cases, shown, own).astype(np.float64)
    cosines = np.clip((shown * own).sum(1), 0.0, 1.0)
    ends = np.cumsum([len(case.subjects) for case in cases])
    result["product"] = np.array([part.prod() for part in np.split(cosines.astype(np.float64), ends[:-1])])
    copied = np.concatenate([copied_poses(case, picture) for case, picture in zip(cases, pictures, strict=True)])
    # Of a box that doesn't show the thing at all, no pose can be told.
    result["copy"] = np.where(result["category"] == 1, copied.astype(np.float64), np.nan)
    return {name: result[name] for name in MEASURES}


def copied_poses(case: WorldCase, picture: Image.Image) -> np.ndarray:
    """Whether each subject stands in its box exactly as in its reference: pose and direction.

    The subject is drawn in POSES poses, the reference's one among them, in both directions, and each drawing on the
    mean colour of the box's rim is compared with the box, pixel by pixel. Some subjects look alike in several poses;
    then the reference's one counts. So luck is no fixed rate: it is the one of the true renders.

    Args:
        case: its `reference_poses` tell how the references stand.
        picture: RGB, any size.

    Returns:
        bool (subjects of the case,).
    """
    copied = []
    for subject, (pose, flip), box in zip(case.subjects, case.reference_poses, case.boxes, strict=True):
        edges = [round(edge * side) for edge, side in zip(box, picture.size * 2, strict=True)]
        edges[2], edges[3] = max(edges[2], edges[0] + 1), max(edges[3], edges[1] + 1)
        square = (COPY_SIDE, COPY_SIDE)
        shown = np.asarray(picture.convert("RGB").crop(edges).resize(square, Image.Resampling.BILINEAR), np.float32)
        border = np.concatenate([shown[0], shown[-1], shown[:, 0], shown[:, -1]]).mean(0)
        errors = []
        for step in range(POSES):
            view = render_subject(subject, 2 * COPY_SIDE, pose=(pose + step / POSES) % 1.0, flip=flip, supersample=1)
            fitted = Image.fromarray(view).convert("RGBa").resize(square, Image.Resampling.BILINEAR).convert("RGBA")
            pixels = np.asarray(fitted, np.float32)
            alpha = pixels[..., 3:] / 255
            whole = pixels[..., :3] * alpha + border * (1 - alpha)
            errors += [float(np.square(shown - whole[:, ::direction]).mean()) for direction in (1, -1)]
        copied.append(int(np.argmin(errors)) == 0)
    return np.array(copied)


def summarize_measures(
    cases: Sequence[WorldCase], measured: Mapping[str, np.ndarray], *, resamples: int = 2000
) -> dict[str, dict[str, Any]]:
    """Mean, 95 % interval and count of every measure, and its mean for each number of subjects.

    Intervals are bootstrapped over pictures (subjects of one picture stand or fall together) and training runs.

    Args:
        cases: the cases.
        measured: from `measure_pictures`; or the same of several training runs stacked, (runs, S) or (runs, B).
        resamples: of the bootstrap.
    """
    sizes = np.array([len(case.subjects) for case in cases])
    summary = {}
    for name, values in measured.items():
        groups = groups_of(cases, name)
        runs = np.atleast_2d(values)
        known = ~np.isnan(runs).any(0)
        if not known.any():
            summary[name] = {"mean": None, "low": None, "high": None, "count": 0, "by_size": {}}
            continue
        spread = scores.interval_over_runs(runs[:, known], groups[known], resamples=resamples)
        own_sizes, values = sizes[groups], runs.mean(0)
        present = np.unique(own_sizes[known])
        summary[name] = {
            "mean": float(values[known].mean()),
            **asdict(spread),
            "count": int(known.sum()),
            "by_size": {str(size): float(values[known & (own_sizes == size)].mean()) for size in present},
        }
    return summary


def compare_measures(
    cases: Sequence[WorldCase], first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """Mean difference (first minus second) of every measure on the same cases, with its 95 % interval.

    Args:
        cases: the cases.
        first, second: from `measure_pictures`, or several training runs stacked; then as many under both (run k is
            compared with run k), or a single one under one of them.
    """
    result = {}
    for name in first:
        difference = np.atleast_2d(first[name]) - np.atleast_2d(second[name])
        known = ~np.isnan(difference).any(0)
        if known.any():
            difference = difference[:, known]
            spread = scores.interval_over_runs(difference, groups_of(cases, name)[known])
            result[name] = {"difference": float(difference.mean()), **asdict(spread)}
    return result


def groups_of(cases: Sequence[WorldCase], measure: str) -> np.ndarray:
    """The picture that each value of a measure belongs to, int64."""
    if MEASURES[measure].per == "picture":
        return np.arange(len(cases))
    return np.array([index for index, case in enumerate(cases) for _ in case.subjects])
