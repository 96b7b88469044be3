"""Scores as pure functions of arrays: rates, intervals, paired tests, and the cosine metrics of the field.

No model, no picture and no file is touched here. Letters: N samples, S subjects, D feature width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from msdiffusion.errors import DataError


@dataclass(frozen=True)
class Interval:
    """A confidence interval with both ends in the unit of the estimated quantity."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Two conditions measured on the same N samples, each sample right or wrong under each of them."""

    count: int
    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float
    """Two-sided, exact: how likely a split of the disagreements at least this uneven is if both were equally good."""

    @property
    def difference(self) -> float:
        """Rate of the first condition minus rate of the second, in [-1, 1]."""
        return (self.only_first - self.only_second) / self.count


def accuracy(right: ArrayLike) -> float:
    """Share of true entries.

    Args:
        right: booleans of any shape, at least one.

    Raises:
        DataError: there is nothing to average.
    """
    return float(_flags(right, "right").mean())


def wilson_interval(successes: int, count: int, z: float = 1.959963984540054) -> Interval:
    """Wilson's score interval for a rate (Wilson 1927): stays in [0, 1] and is honest near 0 and 1.

    Args:
        successes: how many of `count` were right.
        count: number of independent trials, at least 1.
        z: standard normal quantile; the default gives 95 %.

    Raises:
        DataError: no trials, or more successes than trials.
    """
    if count < 1 or not 0 <= successes <= count:
        raise DataError(f"a rate needs 0 <= successes <= count and count >= 1, got {successes} of {count}")
    rate = successes / count
    spread = z * z / count
    centre = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    # At 0 and at 1 the two terms are equal; rounding must not push an end a hair over the edge.
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_interval(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    statistic: Callable[[NDArray[np.float64]], float] = np.mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap; with `groups`, whole groups are drawn: subjects of one picture stand or fall together.

    Args:
        values: N numbers.
        groups: N labels; samples with one label are drawn together. None: every sample is its own group.
        statistic: maps the drawn values to one number.
        level: coverage, in (0, 1).
        resamples: number of bootstrap draws.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        DataError: no values, or another number of groups than values.
    """
    numbers = np.asarray(values, dtype=np.float64).ravel()
    if numbers.size == 0:
        raise DataError("an interval needs at least one value, got none")
    if not 0 < level < 1:
        raise DataError(f"level must lie in (0, 1), got {level}")
    labels = np.arange(numbers.size) if groups is None else np.asarray(groups).ravel()
    if labels.size != numbers.size:
        raise DataError(f"every value needs one group: {numbers.size} values, {labels.size} groups")
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(seed)
    if statistic is np.mean:  # a mean needs only the sums of the groups, all draws at once
        sums, sizes = np.array([numbers[own].sum() for own in members]), np.array([own.size for own in members])
        picks = generator.integers(len(members), size=(resamples, len(members)))
        drawn = sums[picks].sum(1) / sizes[picks].sum(1)
    else:
        drawn = np.empty(resamples)
        for index in range(resamples):
            picks = generator.integers(len(members), size=len(members))
            drawn[index] = statistic(numbers[np.concatenate([members[pick] for pick in picks])])
    tail = (1 - level) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high))


def interval_over_runs(
    values: ArrayLike, groups: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of a mean over training runs and pictures: both runs and whole groups are drawn anew.

    With one run it equals `bootstrap_interval`: what another training would have given can't be known from one.

    Args:
        values: (runs, N), the same samples under every run.
        groups: N labels; samples with one label are drawn together.
        level, resamples, seed: as for `bootstrap_interval`.

    Raises:
        DataError: no values, or another number of groups than samples.
    """
    numbers = np.atleast_2d(np.asarray(values, dtype=np.float64))
    labels = np.asarray(groups).ravel()
    if numbers.size == 0 or labels.size != numbers.shape[1]:
        raise DataError(f"every sample needs one group: values of shape {numbers.shape}, {labels.size} groups")
    if len(numbers) == 1:
        return bootstrap_interval(numbers[0], groups=labels, level=level, resamples=resamples, seed=seed)
    _, index = np.unique(labels, return_inverse=True)
    sums = np.stack([np.bincount(index, weights=run) for run in numbers])  # (runs, groups)
    sizes = np.bincount(index)
    generator = np.random.default_rng(seed)
    runs = generator.integers(len(numbers), size=(resamples, len(numbers)))
    picks = generator.integers(len(sizes), size=(resamples, len(sizes)))
    drawn = np.array(
        [sums[own].mean(0)[picked].sum() / sizes[picked].sum() for own, picked in zip(runs, picks, strict=True)]
    )
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def sign_test(positive: int, negative: int) -> float:
    """Exact two-sided sign test: p of a split at least as uneven as this one under a fair coin, ties left out.

    Args:
        positive, negative: counts of samples that went one way and the other.

    Raises:
        DataError: a negative count.
    """
    if positive < 0 or negative < 0:
        raise DataError(f"counts can't be negative, got {positive} and {negative}")
    total, smaller = positive + negative, min(positive, negative)
    # Integer arithmetic: thousands of samples neither overflow nor underflow before the last division.
    tail = sum(math.comb(total, k) for k in range(smaller + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**total)))


def mcnemar_exact(first: ArrayLike, second: ArrayLike) -> PairedTest:
    """McNemar's test in its exact form (a sign test on the disagreements; McNemar 1947).

    Args:
        first, second: booleans (N,): right or wrong of the same N samples under two conditions.

    Raises:
        DataError: no samples, or two different numbers of them.
    """
    one, two = _flags(first, "first"), _flags(second, "second")
    if one.shape != two.shape:
        raise DataError(f"a paired test needs the same samples twice, got {one.size} and {two.size}")
    return _count_votes(one, two)


def paired_group_test(first: ArrayLike, second: ArrayLike, groups: ArrayLike) -> PairedTest:
    """The stricter companion of `mcnemar_exact`: one vote per group (per picture), so that neighbours count once.

    A group votes for the condition that got more of its samples right; equal groups are ties (`both` when some were
    right under both conditions, else `neither`).

    Args:
        first, second: booleans (N,).
        groups: N labels.

    Raises:
        DataError: the three differ in length, or are empty.
    """
    one, two = _flags(first, "first"), _flags(second, "second")
    labels = np.asarray(groups).ravel()
    if not one.size == two.size == labels.size:
        raise DataError(f"first, second and groups must have one length, got {one.size}, {two.size}, {labels.size}")
    names, index = np.unique(labels, return_inverse=True)
    return _count_votes(*(np.bincount(index, weights=right, minlength=names.size) for right in (one, two)))


def _count_votes(for_first: NDArray[Any], for_second: NDArray[Any]) -> PairedTest:
    """The test of votes for either condition, flags or numbers (N,), by which is greater."""
    only_first, only_second = int((for_first > for_second).sum()), int((for_second > for_first).sum())
    ties = for_first == for_second
    return PairedTest(
        count=for_first.size,
        both=int((ties & (for_first > 0)).sum()),
        only_first=only_first,
        only_second=only_second,
        neither=int((ties & (for_first == 0)).sum()),
        p_value=sign_test(only_first, only_second),
    )


def chance_agreement(accepted: Sequence[Collection[str]], read: Sequence[str]) -> float:
    """Share that would be right if the readings were dealt to the samples at random, in [0, 1].

    It is the sum over answers of P(answer is read) * P(answer is accepted): the level that readings reach when they
    follow their own distribution and ignore the sample. It exceeds 1 / classes where classes are not equally frequent.

    Args:
        accepted: N collections of the answers that count as right for a sample.
        read: N answers.

    Raises:
        DataError: lengths differ or are zero.
    """
    if not read or len(accepted) != len(read):
        raise DataError(f"accepted and read must have one length above 0, got {len(accepted)} and {len(read)}")
    shares = Counter(read)
    return sum(shares[answer] * sum(answer in own for own in accepted) for answer in shares) / len(read) ** 2


def cosine_similarity(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Row by row cosine in [-1, 1].

    Args:
        first, second: features (..., D) of one shape, no row all zero.

    Returns:
        (...,) float64.

    Raises:
        DataError: shapes differ, or a row is zero (its direction is undefined).
    """
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != two.shape or one.ndim == 0:
        raise DataError(f"cosines are taken row by row between equal shapes, got {one.shape} and {two.shape}")
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
    if not np.all(lengths > 0):
        raise DataError("a feature row is all zero: its direction, and so its cosine, is undefined")
    return np.clip((one * two).sum(-1) / lengths, -1.0, 1.0)


def text_alignment(pictures: ArrayLike, prompts: ArrayLike) -> float:
    """CLIP-T: mean cosine between each picture's and its prompt's embedding in a shared space (raw, not times 100).

    Args:
        pictures, prompts: (N, D).
    """
    return float(np.mean(cosine_similarity(pictures, prompts)))


def subject_fidelity(pictures: ArrayLike, references: Sequence[ArrayLike]) -> float:
    """CLIP-I or DINO, by the features given: mean cosine of a picture with its references, averaged over pictures.

    Every picture weighs the same, whatever its number of references (the DreamBooth protocol for one subject).

    Args:
        pictures: (N, D).
        references: N arrays (S_n, D) with S_n >= 1.
    """
    return float(np.mean([row.mean() for row in _reference_cosines(pictures, references)]))


def multi_subject_fidelity(pictures: ArrayLike, references: Sequence[ArrayLike]) -> float:
    """M-DINO: PRODUCT over a picture's subjects of their cosines, averaged over pictures (MS-Diffusion, section 4).

    One missing subject pulls the whole picture down. A negative cosine counts as 0, so that two missing subjects don't
    multiply to a positive score.

    Args:
        pictures: (N, D).
        references: N arrays (S_n, D) with S_n >= 1.
    """
    return float(np.mean([np.prod(np.clip(row, 0.0, 1.0)) for row in _reference_cosines(pictures, references)]))


def _reference_cosines(pictures: ArrayLike, references: Sequence[ArrayLike]) -> list[NDArray[np.float64]]:
    features = np.asarray(pictures, dtype=np.float64)
    if features.ndim != 2 or len(features) == 0 or len(features) != len(references):
        raise DataError(
            f"every picture needs its references: features of shape {features.shape}, {len(references)} reference sets"
        )
    cosines = []
    for picture, own in zip(features, references, strict=True):
        rows = np.asarray(own, dtype=np.float64)
        if rows.ndim != 2 or len(rows) == 0:
            raise DataError(f"references of one picture must be (subjects, width), got {rows.shape}")
        cosines.append(cosine_similarity(np.broadcast_to(picture, rows.shape), rows))
    return cosines


def _flags(values: ArrayLike, name: str) -> NDArray[np.bool_]:
    flags = np.asarray(values)
    if flags.size == 0:
        raise DataError(f"{name} is empty: a rate needs at least one sample")
    if flags.dtype != np.bool_:
        raise DataError(f"{name} must hold booleans (right or wrong), got {flags.dtype}")
    return flags.ravel()
