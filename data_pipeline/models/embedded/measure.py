"""What the pipeline finds of the world's truth: boxes, masks, and the same subject in two frames.

The steps of the pipeline do the work, on clips that are encoded, written, read and decoded like anybody's. Here is only
what is compared with what.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.models.embedded.renderings import MIN_PIXELS, sample_twins
from data_pipeline.records import (
    Box,
    DetectedPair,
    Detection,
    FramePair,
    NamedPair,
    Rejected,
    TrainingPair,
    box_iou,
    decode_mask,
    mask_box,
)
from data_pipeline.step import Step
from data_pipeline.world.clips import Clip, write_clip
from data_pipeline.world.palette import BACKGROUNDS
from data_pipeline.world.scenes import compose, fit_sprites, render_background, sample_placement, write_caption
from data_pipeline.world.subjects import render_subject

LEAST_OVERLAP = 0.5
"""IoU from which a box counts as found."""
OTHERS = "others"
"""The row of boxes for phrases that are no category of the world, "beach" say: all of them are wrong."""


@dataclass(frozen=True, eq=False)
class TrueObject:
    """A subject as it is to be seen in one frame. number: the same in both frames."""

    number: int
    name: str
    box: Box
    mask: np.ndarray


@dataclass
class Tally:
    """Counts of one category, or of all: of objects, of boxes, of boxes that hit, and the IoUs of those."""

    true: int = 0
    given: int = 0
    box_ious: list[float] = field(default_factory=list)
    mask_ious: list[float] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds the counts of another tally."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict[str, float]:
        """Recall and precision, and mean IoU of the boxes and masks that hit; 0 where there is nothing to divide by."""
        hits = len(self.box_ious)
        return {
            "objects": self.true,
            "recall": hits / self.true if self.true else 0.0,
            "precision": hits / self.given if self.given else 0.0,
            "box_iou": float(np.mean(self.box_ious)) if hits else 0.0,
            "mask_iou": float(np.mean(self.mask_ious)) if hits else 0.0,
        }


@dataclass
class Score:
    """What was found in many pairs of frames.

    Matches are right if both ends hit the same object. ``in_both``: objects to be seen in both frames.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    pairs: int = 0
    in_both: int = 0
    matches: int = 0
    right: int = 0

    def total(self) -> Tally:
        """All categories together."""
        total = Tally()
        for tally in self.tallies.values():
            total.add(tally)
        return total

    def figures(self) -> dict[str, Any]:
        """Everything as JSON values: the figures of ``Tally``, of all and by category, and those of the matches."""
        return {
            "pairs": self.pairs,
            **self.total().figures(),
            "matches_right": self.right / self.matches if self.matches else 0.0,
            "objects_matched": self.right / self.in_both if self.in_both else 0.0,
            "categories": {name: tally.figures() for name, tally in sorted(self.tallies.items())},
        }


def hits(found: Sequence[Detection], true: Sequence[TrueObject]) -> list[TrueObject | None]:
    """For every detection the object that it hits, or None.

    The best-scored one chooses first: the object of its name that its box fits best, if that is free and fits by at
    least LEAST_OVERLAP.
    """
    result: list[TrueObject | None] = [None] * len(found)
    free = list(true)
    for place in sorted(range(len(found)), key=lambda place: -found[place].score):
        named = [one for one in free if one.name == found[place].entity.head]
        best = max(named, key=lambda one: box_iou(found[place].box, one.box), default=None)
        if best is not None and box_iou(found[place].box, best.box) >= LEAST_OVERLAP:
            result[place] = best
            free = [one for one in free if one is not best]
    return result


def mask_iou(first: np.ndarray, second: np.ndarray) -> float:
    """IoU of two bool (height, width) masks, 0 if both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 0.0


def add_pair(
    score: Score,
    true: tuple[Sequence[TrueObject], Sequence[TrueObject]],
    found: Detections,
    matched: TrainingPair | None,
) -> None:
    """Counts one pair of frames: reference and target, with what is true, what was found, and what was matched."""
    owner: dict[int, TrueObject | None] = {}
    names = {one.name for one in (*true[0], *true[1])}
    for objects, detections in zip(true, found, strict=True):
        for one in objects:
            score.tallies.setdefault(one.name, Tally()).true += 1
        for detection, one in zip(detections, hits(detections, objects), strict=True):
            owner[id(detection)] = one
            name = detection.entity.head if detection.entity.head in names else OTHERS
            tally = score.tallies.setdefault(name, Tally())
            tally.given += 1
            if one is not None:
                tally.box_ious.append(box_iou(detection.box, one.box))
                tally.mask_ious.append(mask_iou(detection.mask, one.mask))
    score.pairs += 1
    score.in_both += len({one.number for one in true[0]} & {one.number for one in true[1]})
    for match in matched.matches if matched else ():
        ends = owner[id(match.reference)], owner[id(match.target)]
        score.matches += 1
        score.right += None not in ends and ends[0].number == ends[1].number


Detections = tuple[tuple[Detection, ...], tuple[Detection, ...]]
"""Those of the reference and those of the target."""
Found = tuple[FramePair, Detections]


@dataclass(frozen=True, eq=False)
class Miner:
    """The steps that are measured, by their names, set up."""

    steps: dict[str, Step]

    def find(self, frames: FramePair) -> tuple[Detections, TrainingPair | None]:
        """Detections with masks of both frames, and the matched pair if there is one.

        Each frame is asked about on its own: the pipeline gives a pair up if one of its frames is empty, and what was
        found in the other one would not be counted.
        """
        named = self.steps["find_entities"].process(frames)
        if isinstance(named, Rejected):
            return ((), ()), None
        both = (frames.reference, frames.target)
        alone = [FramePair(video=frames.video, shot=frames.shot, reference=one, target=one) for one in both]
        reference, target = (self._detections(NamedPair(frames=one, entities=named.entities)) for one in alone)
        if not reference or not target:
            return (reference, target), None
        pair = DetectedPair(frames=frames, entities=named.entities, reference=reference, target=target)
        matched = self.steps["match_subjects"].process(pair)
        return (reference, target), None if isinstance(matched, Rejected) else matched

    def _detections(self, named: NamedPair) -> tuple[Detection, ...]:
        boxed = self.steps["detect_boxes"].process(named)
        masked = boxed if isinstance(boxed, Rejected) else self.steps["segment_masks"].process(boxed)
        return () if isinstance(masked, Rejected) else masked.reference

    def measure(
        self, clips: Iterable[tuple[FramePair, dict[str, Any]]], seen: Callable[[Found], None] | None = None
    ) -> Score:
        """The score on pairs of frames, each with the annotations of its clip (docs/data_format.md).

        seen: called with (pair, (detections of the reference, detections of the target)), to draw them, say.
        """
        score = Score()
        for frames, sidecar in clips:
            true = tuple(true_objects(sidecar, frame.index) for frame in (frames.reference, frames.target))
            found, matched = self.find(frames)
            add_pair(score, true, found, matched)
            if seen is not None:
                seen((frames, found))
        return score


def true_objects(annotations: dict[str, Any], index: int) -> list[TrueObject]:
    """The subjects of a frame that show at least MIN_PIXELS pixels."""
    names = {one["id"]: one["name"] for one in annotations["objects"]}
    frame = next(frame for frame in annotations["frames"] if frame["index"] == index)
    found = []
    for one in frame["objects"]:
        mask = decode_mask(one["mask_rle"])
        if mask.sum() >= MIN_PIXELS:
            found.append(TrueObject(number=one["id"], name=names[one["id"]], box=mask_box(mask), mask=mask))
    return found


def read_annotations(video: Path) -> dict[str, Any]:
    """The sidecar of a clip of the world."""
    return json.loads(video.with_name(f"{video.stem}.annotations.json").read_text(encoding="utf-8"))


def table(title: str, figures: Sequence[dict[str, Any]]) -> str:
    """Figures of several seeds as a Markdown table: means, and in brackets the least and the greatest of the seeds."""

    def cell(values: Sequence[float]) -> str:
        mean = float(np.mean(values))
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        return f"{mean:.3f}{spread}"

    columns = ("recall", "precision", "box_iou", "mask_iou")
    names = sorted({name for one in figures for name in one["categories"]})
    rows = [("all", list(figures)), *((name, [one["categories"].get(name) for one in figures]) for name in names)]
    lines = [f"| {title} | objects | {' | '.join(column.replace('_', ' ') for column in columns)} |"]
    lines.append("|---" * 6 + "|")
    for name, of_seeds in rows:
        there = [one for one in of_seeds if one is not None]
        cells = [cell([one[column] for one in there]) for column in columns]
        lines.append(f"| {name} | {sum(one['objects'] for one in there)} | {' | '.join(cells)} |")
    right, matched = (cell([one[key] for one in figures]) for key in ("matches_right", "objects_matched"))
    pairs = sum(one["pairs"] for one in figures)
    lines += [
        "",
        f"{pairs} pairs of frames; matches that are right: {right}; objects in both frames matched: {matched}",
    ]
    return "\n".join(lines)


def sample_twin_clip(rng: np.random.Generator, *, split: str, size: int = 128, num_frames: int = 12) -> Clip:
    """A clip that shows two subjects of one category, and maybe a third subject of another one, which the world's own
    clips never do: which of the two is which has to be told by their looks. They walk about freely and may change
    places.
    """
    subjects = sample_twins(rng, split)
    background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    ground = render_background(background, rng, size)
    views = [[render_subject(one, size, pose=rng.random(), supersample=2) for _ in range(2)] for one in subjects]
    aspects = [pair[0].shape[1] / pair[0].shape[0] for pair in views]
    start, stop = (np.array(sample_placement(rng, len(subjects), aspects)) for _ in range(2))
    frames, masks = [], []
    for share in np.linspace(0, 1, num_frames):
        shown = [pair[int(share > 0.5)] for pair in views]
        sprites, corners = fit_sprites(shown, start + (stop - start) * share, size)
        image, visible = compose(ground, sprites, corners)
        frames.append(image)
        masks.append(visible)
    caption = write_caption(subjects, background)
    return Clip(np.stack(frames), np.stack(masks), subjects, background, caption, 8)


def write_twin_clips(folder: Path, count: int, *, split: str, seed: int) -> None:
    """Clips of ``sample_twin_clip`` with caption and annotations, as the world writes its own; a rerun continues."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = folder / f"twins_{index:06d}.mp4"
        if not path.exists():
            write_clip(path, sample_twin_clip(np.random.default_rng([seed, index]), split=split))
