"""The benchmark on the procedural world: frozen sets of held-out subjects, read by the judge, compared in pairs.

Each case has a true render of the same subjects in the same boxes: reading those gives the ceiling that the judge
itself sets. Pictures come from any callable, so nothing here knows how they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_pipeline.world import BACKGROUNDS, CATEGORIES, COLORS, PATTERNS, Identity, render_subject, sample_scene
from msdiffusion.errors import DataError
from msdiffusion.evaluation import scores

if TYPE_CHECKING:
    from msdiffusion.evaluation.instruments.judge import Judge

BOX_QUESTIONS = ("category", "color", "body_color", "pattern")
"""What is marked per box. "color" asks for the main colour; "body_color" also accepts the second one where a pattern
covers half of the body (EVEN_PATTERNS): there the eye can't tell which of the two is the main one."""
QUESTIONS = (*BOX_QUESTIONS, "background")
EVEN_PATTERNS = ("stripes", "bands", "checks")
SCHEMA = "msdiffusion.scores/1"
TRUTH = "true_renders"
CLASSES = {
    "category": len(CATEGORIES),
    "color": len(COLORS),
    "body_color": len(COLORS),
    "pattern": len(PATTERNS),
    "background": len(BACKGROUNDS),
}
"""Question to the number of possible answers."""


@dataclass(frozen=True)
class WorldCase:
    """One picture to make: what the generator is given, and the truth it never sees."""

    prompt: str
    phrases: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    """Normalised xyxy, one per subject."""
    references: tuple[Image.Image, ...]
    """RGBA cut-outs, each in another pose than in `truth`."""
    seed: int
    """Of the noise: the same under every condition."""
    subjects: tuple[Identity, ...]
    background: str
    truth: Image.Image
    """RGB render of these subjects in these boxes."""
    masks: np.ndarray = field(repr=False, compare=False)
    """bool (S, size, size): the subjects' visible pixels in `truth`."""
    reference_poses: tuple[tuple[float, bool], ...] = field(repr=False, compare=False)
    """Pose in [0, 1) and whether mirrored, of each reference."""


PictureMaker = Callable[[Sequence[WorldCase]], list[Image.Image]]
"""Makes one picture per case, in order."""


def draw_cases(
    subjects: int | None = None,
    *,
    pictures: int | None = None,
    seed: int = 0,
    size: int = 64,
    split: str = "held_out",
    shares: Sequence[float] = (0.5, 0.35, 0.15),
) -> list[WorldCase]:
    """Draws subject sets until they are enough; the same arguments give the same cases, more of them the same first.

    Args:
        subjects: least number of subjects over all cases; or
        pictures: number of cases.
        seed: of identities, layouts, backgrounds and of the noise seeds.
        size: side of the true renders in pixels.
        split: identities to draw from; "held_out" were never seen in any training.
        shares: how often a case has one, two, three, ... subjects.

    Raises:
        DataError: not exactly one of subjects and pictures is given, it is below 1, or the shares don't form a
            distribution.
    """
    if (subjects is None) == (pictures is None):
        raise DataError(f"give either subjects or pictures, got subjects={subjects} and pictures={pictures}")
    what, wanted = ("picture", pictures) if subjects is None else ("subject", subjects)
    if wanted < 1:
        raise DataError(f"an evaluation needs at least 1 {what}, got {wanted}")
    if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise DataError(f"shares must be at least 0 and sum to 1, got {tuple(shares)}")
    rng = np.random.default_rng([seed, 0x5C0E])
    cases: list[WorldCase] = []
    drawn = 0
    while drawn < wanted:
        count = 1 + int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))
        cases.append(draw_case(rng, count, size=size, split=split))
        drawn += 1 if subjects is None else count
    return cases


def draw_case(
    rng: np.random.Generator,
    num_subjects: int,
    *,
    size: int = 64,
    split: str = "held_out",
    boxes: Sequence[Sequence[float]] | None = None,
) -> WorldCase:
    """Draws one case of a given number of subjects, see `draw_cases`.

    Args:
        rng: source of everything.
        num_subjects: 1 to 4.
        size: side of the true render in pixels.
        split: of the identities.
        boxes: normalised xyxy, in place of drawn ones; later ones are in front. Subjects are stretched to them in the
            true render, and the case asks for exactly these boxes.

    Raises:
        DataError: another number of boxes than subjects, or a box that isn't an ordered xyxy inside the picture.
    """
    if boxes is not None and len(boxes) != num_subjects:
        raise DataError(f"every subject needs one box: {num_subjects} subjects, {len(boxes)} boxes")
    for x1, y1, x2, y2 in boxes or ():
        if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
            raise DataError(f"a box is x1, y1, x2, y2 in [0, 1] with x1 < x2 and y1 < y2, got {(x1, y1, x2, y2)}")
    scene = sample_scene(rng, split=split, num_subjects=num_subjects, size=size, boxes=boxes)
    poses = tuple((float(rng.random()), bool(rng.random() < 0.5)) for _ in scene.subjects)
    references = tuple(
        Image.fromarray(render_subject(subject, size, pose=pose, flip=flip))
        for subject, (pose, flip) in zip(scene.subjects, poses, strict=True)
    )
    return WorldCase(
        prompt=scene.caption,
        phrases=tuple(subject.category for subject in scene.subjects),
        boxes=tuple(tuple(float(edge) for edge in box) for box in (scene.boxes if boxes is None else boxes)),
        references=references,
        seed=int(rng.integers(2**31)),
        subjects=tuple(scene.subjects),
        background=scene.background,
        truth=Image.fromarray(scene.image),
        masks=scene.masks,
        reference_poses=poses,
    )


@dataclass(frozen=True)
class Readings:
    """What the judge read from one picture per case: one answer per box, flat over the cases, or one per picture."""

    category: tuple[str, ...]
    color: tuple[str, ...]
    pattern: tuple[str, ...]
    background: tuple[str, ...]

    def answers(self, question: str) -> tuple[str, ...]:
        """The answers to one of QUESTIONS; "body_color" is another way to mark the answers to "color"."""
        return getattr(self, "color" if question == "body_color" else question)


def accepted_answers(subject: Identity) -> dict[str, frozenset[str]]:
    """Question per box to the answers that are right for a subject."""
    second = {subject.second_color} if subject.pattern in EVEN_PATTERNS else set()
    return {
        "category": frozenset({subject.category}),
        "color": frozenset({subject.main_color}),
        "body_color": frozenset({subject.main_color} | second),
        "pattern": frozenset({subject.pattern}),
    }


def read_pictures(judge: Judge, cases: Sequence[WorldCase], pictures: Sequence[Image.Image]) -> Readings:
    """Lets the judge read one picture per case.

    Raises:
        DataError: other numbers of pictures and cases.
    """
    if len(cases) != len(pictures):
        raise DataError(f"every case needs one picture: {len(cases)} cases, {len(pictures)} pictures")
    found = judge.read(pictures, [case.boxes for case in cases])
    boxes = [box for picture in found for box in picture.boxes]
    return Readings(
        category=tuple(box.category for box in boxes),
        color=tuple(box.color for box in boxes),
        pattern=tuple(box.pattern for box in boxes),
        background=tuple(picture.background for picture in found),
    )


def mark_readings(cases: Sequence[WorldCase], readings: Readings) -> dict[str, np.ndarray]:
    """Question to booleans: right or wrong, one per box, or for the background one per picture."""
    return {
        question: np.array(
            [answer in own for own, answer in zip(_accepted(cases, question), readings.answers(question), strict=True)]
        )
        for question in QUESTIONS
    }


def score_readings(
    cases: Sequence[WorldCase], readings: Mapping[str, Readings], *, pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Rates, intervals and paired tests for every question; plain numbers, ready for JSON.

    Args:
        cases: the cases that were read.
        readings: condition name ("adapter_on", "adapter_off", "true_renders", ...) to its readings.
        pairs: conditions to test against each other, the first expected to be better.

    Returns:
        per question: "conditions" (rate, right, count, 95 % interval; `shuffled` is the rate that answers of the same
        distribution reach by luck; `by_size` has the rate for sets of one, two, ... subjects), "chance" (of a blind
        guess) and "tests" (difference with its interval over pictures, exact McNemar p over boxes, exact sign-test p
        over pictures); and "mixing", see `mixing_rate`.

    Raises:
        DataError: no cases, or a pair names an unknown condition.
    """
    if not cases:
        raise DataError("there are no cases to score")
    for name in {name for pair in pairs for name in pair}:
        if name not in readings:
            raise DataError(f"no readings for condition {name!r}; there are {', '.join(readings)}")
    marks = {name: mark_readings(cases, own) for name, own in readings.items()}
    pictures = np.array([index for index, case in enumerate(cases) for _ in case.subjects])
    set_sizes = np.array([len(case.subjects) for case in cases])
    result: dict[str, Any] = {}
    for question in QUESTIONS:
        accepted = _accepted(cases, question)
        groups = np.arange(len(cases)) if question == "background" else pictures
        sizes = set_sizes[groups]
        result[question] = {
            "chance": sum(map(len, accepted)) / len(accepted) / CLASSES[question],
            "conditions": {
                name: {
                    **_rate(marks[name][question]),
                    "shuffled": scores.chance_agreement(accepted, own.answers(question)),
                    "by_size": {
                        str(size): scores.accuracy(marks[name][question][sizes == size]) for size in np.unique(sizes)
                    },
                }
                for name, own in readings.items()
            },
            "tests": [
                {"first": first, "second": second, **_compare(marks[first][question], marks[second][question], groups)}
                for first, second in pairs
            ],
        }
    result["mixing"] = {name: mixing_rate(cases, own) for name, own in readings.items()}
    return result


def mixing_rate(cases: Sequence[WorldCase], readings: Readings) -> dict[str, float | int] | None:
    """How often a box shows the main colour of ANOTHER subject of its picture, which box masks should prevent.

    Counted are boxes of pictures with several subjects, where some other subject has another main colour.

    Returns:
        {"rate", "count"}, or None if no picture has such boxes.
    """
    mixed = mark_mixing(cases, readings)
    counted = mixed[~np.isnan(mixed)]
    return {"rate": float(counted.mean()), "count": len(counted)} if len(counted) else None


def mark_mixing(cases: Sequence[WorldCase], readings: Readings) -> np.ndarray:
    """Per box 1.0 where it shows the main colour of another subject of its picture, 0.0 where it doesn't.

    NaN where no other subject has another main colour than its own.
    """
    answers, mixed = iter(readings.color), []
    for case in cases:
        colors = [subject.main_color for subject in case.subjects]
        for own, answer in zip(colors, answers, strict=False):
            others = set(colors) - {own}
            mixed.append(float(answer in others) if others else np.nan)
    return np.array(mixed)


def evaluate_world(
    cases: Sequence[WorldCase],
    makers: Mapping[str, PictureMaker],
    judge: Judge,
    *,
    pairs: Sequence[tuple[str, str]],
) -> tuple[dict[str, Any], dict[str, list[Image.Image]]]:
    """Makes the pictures of every condition, reads them beside the true renders, and scores them.

    Args:
        cases: from `draw_cases`.
        makers: condition name to the callable that makes its pictures.
        judge: reads the pictures.
        pairs: conditions to compare, see `score_readings`.

    Returns:
        the scores (plain numbers: schema, counts, questions) and the pictures per condition, the true renders included.

    Raises:
        DataError: a maker returns another number of pictures than cases.
    """
    pictures = {name: make(cases) for name, make in makers.items()}
    pictures[TRUTH] = [case.truth for case in cases]
    readings = {name: read_pictures(judge, cases, made) for name, made in pictures.items()}
    counts = [len(case.subjects) for case in cases]
    report = {
        "schema": SCHEMA,
        "pictures": len(cases),
        "subjects": sum(counts),
        "sets_by_size": {str(count): counts.count(count) for count in sorted(set(counts))},
        "questions": score_readings(cases, readings, pairs=pairs),
    }
    return report, pictures


def _accepted(cases: Sequence[WorldCase], question: str) -> list[frozenset[str]]:
    """The right answers, one set per box, or for the background one per picture."""
    if question == "background":
        return [frozenset({case.background}) for case in cases]
    return [accepted_answers(subject)[question] for case in cases for subject in case.subjects]


def _rate(right: np.ndarray) -> dict[str, float | int]:
    count = int(right.sum())
    return {
        "rate": count / right.size,
        "right": count,
        "count": int(right.size),
        **asdict(scores.wilson_interval(count, right.size)),
    }


def _compare(first: np.ndarray, second: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    boxes = scores.mcnemar_exact(first, second)
    pictures = scores.paired_group_test(first, second, groups)
    spread = scores.bootstrap_interval(first.astype(float) - second.astype(float), groups=groups)
    return {
        "difference": boxes.difference,
        **asdict(spread),
        "only_first": boxes.only_first,
        "only_second": boxes.only_second,
        "p_value": boxes.p_value,
        "pictures": {
            "count": pictures.count,
            "better_with_first": pictures.only_first,
            "better_with_second": pictures.only_second,
            "p_value": pictures.p_value,
        },
    }
