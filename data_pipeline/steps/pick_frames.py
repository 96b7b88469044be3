"""Step 3: choose the two frames of each pair, and decode them."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import SettingsError
from data_pipeline.records import Frame, FramePair, Rejected, Shot, VideoShots
from data_pipeline.step import Step

if TYPE_CHECKING:
    from data_pipeline.models.picture_quality import Looks

# A pair with this much change (``picture_quality.change``, 0 to 1) shows change enough: more is not better.
ENOUGH_CHANGE = 0.1
# Two frames with this share of the sharpness of the sharpest one are sharp enough.
ENOUGH_SHARPNESS = 0.7
# A shot whose best pair scores this much ends the search for a better shot.
GOOD_SCORE = 0.5
# Shots that are looked at for every pair wanted, at most.
SHOTS_PER_PAIR = 4
# Decoded pixels of the candidates of one shot, at most: 7 frames of 4K, 2 of 8K.
CANDIDATE_PIXELS = 64_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """A decoded frame that no rule speaks against, and its measures."""

    frame: Frame
    looks: Looks


@dataclass(frozen=True, kw_only=True, eq=False)
class _Choice:
    """Two candidates of one shot and their score in [0, 1]."""

    shot: Shot
    reference: _Candidate
    target: _Candidate
    score: float

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sorts the best one first: by score, then by the time between the frames, then by place in the video."""
        gap = self.target.frame.time - self.reference.frame.time
        return (-self.score, -round(gap, 6), self.reference.frame.index)


@dataclass(kw_only=True)
class PickFrames(Step[VideoShots, tuple[FramePair, ...]]):
    """Looks at a few frames of a shot and takes the two that make the best pair.

    How candidates are chosen, left out and scored, and what the settings bound: docs/mining.md. Places are fractions of
    the shot (0 is its first frame, 1 its last); with 2 candidates exactly the two places are used. annotated_only: of
    clips with annotations, the annotated frames nearest to these places. min_gap: seconds.

    Shots are looked at in the order of their longest gaps, until as many as pairs are wanted (pairs_per_clip) gave one
    that scores 0.5 or more, and at most four for every pair wanted. Each shot that was looked at gives its best pair
    before one gives a second, and second pairs share as few frames with the first ones as they can.
    """

    reference_place: float = 0.25
    target_place: float = 0.75
    candidates: int = 5
    min_gap: float = 0.25
    annotated_only: bool = True
    pairs_per_clip: int = 1
    min_frame_brightness: float = 0.05
    max_frame_brightness: float = 0.97
    min_frame_sharpness: float = 0.12

    def __post_init__(self) -> None:
        if not 0 <= self.reference_place < self.target_place <= 1:
            places = f"{self.reference_place} and {self.target_place}"
            raise SettingsError(f"need 0 <= reference_place < target_place <= 1, got {places}")
        if self.candidates < 2:
            raise SettingsError(f"candidates must be at least 2, got {self.candidates}")
        if self.min_gap < 0:
            raise SettingsError(f"min_gap must not be negative, got {self.min_gap}")
        if self.pairs_per_clip < 1:
            raise SettingsError(f"pairs_per_clip must be at least 1, got {self.pairs_per_clip}")
        if not 0 <= self.min_frame_brightness < self.max_frame_brightness <= 1:
            limits = f"{self.min_frame_brightness} and {self.max_frame_brightness}"
            raise SettingsError(f"need 0 <= min_frame_brightness < max_frame_brightness <= 1, got {limits}")
        if self.min_frame_sharpness < 0:
            raise SettingsError(f"min_frame_sharpness must not be negative, got {self.min_frame_sharpness}")

    def setup(self) -> None:
        """Loads the readers and the measures."""
        from data_pipeline.models import picture_quality
        from data_pipeline.models.video_reader import open_reader

        self._open, self._quality = open_reader, picture_quality

    def process(self, record: VideoShots) -> tuple[FramePair, ...] | Rejected:
        """1 to pairs_per_clip pairs of decoded frames, the best one first."""
        video = record.video
        times = video.facts.times
        usable = self._usable_frames(record)
        shots = [(shot, frames) for shot in record.shots if len(frames := _within(usable, shot)) >= 2]
        if not shots:
            looked_at = record.shots[-1].last + 1
            late = [index for index in usable if index >= looked_at]
            evidence = {"shots": len(record.shots), "frames": list(usable[:20])}
            if len(usable) - len(late) < 2 <= len(usable):
                evidence["needed"] = f"two of them among the first {looked_at}, which --max-frames limits"
                return Rejected("annotated frames after max_frames", evidence)
            annotated = self.annotated_only and video.annotations is not None
            reason = "fewer than two annotated frames in one shot" if annotated else "shots of one frame"
            return Rejected(reason, evidence)
        count = min(self.candidates, max(2, CANDIDATE_PIXELS // (video.facts.width * video.facts.height)))
        wanted = [(shot, self.places(shot, frames, times, count)) for shot, frames in shots]
        wanted.sort(key=lambda place: (times[place[1][0]] - times[place[1][-1]], place[0].first))
        _, (first, *_, last) = wanted[0]
        if times[last] - times[first] < self.min_gap:
            gap = round(times[last] - times[first], 3)
            return Rejected("frames too near in time", {"seconds": gap, "min_gap": self.min_gap})

        reader = self._open(video.reader, video.file.path, video.facts)
        by_shot: list[list[_Choice]] = []
        faults: list[tuple[str, dict[str, float]]] = []
        for shot, indices in wanted[: SHOTS_PER_PAIR * self.pairs_per_clip]:
            if times[indices[-1]] - times[indices[0]] < self.min_gap:
                break
            pictures = zip(indices, reader.frames(indices), strict=True)
            frames = [Frame(index=index, time=times[index], image=picture) for index, picture in pictures]
            if choices := self._choices(shot, frames, faults):
                by_shot.append(choices)
            if sum(choices[0].score >= GOOD_SCORE for choices in by_shot) >= self.pairs_per_clip:
                break
        if not by_shot:
            return _rejection(faults)
        pairs = []
        for number, choice in enumerate(self._best(by_shot)):
            reference, target = choice.reference.frame, choice.target.frame
            pairs.append(FramePair(video=video, shot=choice.shot, reference=reference, target=target, number=number))
        return tuple(pairs)

    def places(self, shot: Shot, usable: Sequence[int], times: Sequence[float], count: int) -> tuple[int, ...]:
        """Numbers of the frames to look at, ascending, at least two: the usable ones nearest to ``count`` places in
        the shot; the outermost two where those are too few or all too near in time.

        usable: ascending frame numbers within the shot, at least two. times: seconds of all frames of the video.
        """
        span = shot.last - shot.first
        places = np.linspace(self.reference_place, self.target_place, count)
        found = sorted({nearest(usable, shot.first + float(place) * span) for place in places})
        if len(found) < 2 or times[found[-1]] - times[found[0]] < self.min_gap:
            found = [usable[0], usable[-1]]
        return tuple(found)

    def fault(self, looks: Looks) -> tuple[str, dict[str, float]] | None:
        """What speaks against a frame: the reason and what was measured; None if nothing does."""
        light = round(looks.brightness, 4)
        if light < self.min_frame_brightness:
            return "frames too dark", {"brightness": light, "min_frame_brightness": self.min_frame_brightness}
        if light > self.max_frame_brightness:
            return "frames too bright", {"brightness": light, "max_frame_brightness": self.max_frame_brightness}
        sharp = round(looks.sharpness, 4)
        if sharp < self.min_frame_sharpness:
            return "frames blurred", {"sharpness": sharp, "min_frame_sharpness": self.min_frame_sharpness}
        return None

    def _usable_frames(self, record: VideoShots) -> tuple[int, ...]:
        annotations = record.video.annotations if self.annotated_only else None
        if annotations is None:
            return tuple(range(record.shots[-1].last + 1))
        return tuple(sorted(index for index, objects in annotations.frames.items() if objects))

    def _choices(
        self, shot: Shot, frames: Sequence[Frame], faults: list[tuple[str, dict[str, float]]]
    ) -> list[_Choice]:
        """All pairs of good frames far enough apart, the best first; ``faults`` takes what spoke against the others."""
        good = []
        for frame in frames:
            looks = self._quality.look_at(frame.image)
            fault = self.fault(looks)
            if fault is None:
                good.append(_Candidate(frame=frame, looks=looks))
            else:
                faults.append(fault)
        sharpest = max((candidate.looks.sharpness for candidate in good), default=0.0)
        choices = [
            _Choice(shot=shot, reference=first, target=second, score=self._score(first, second, sharpest))
            for first, second in combinations(good, 2)
            if second.frame.time - first.frame.time >= self.min_gap
        ]
        return sorted(choices, key=lambda choice: choice.rank)

    def _score(self, first: _Candidate, second: _Candidate, sharpest: float) -> float:
        moved = min(1.0, self._quality.change(first.looks.small, second.looks.small) / ENOUGH_CHANGE)
        least = min(first.looks.sharpness, second.looks.sharpness)
        # Rounded, so that the last bits of a sum decide nothing.
        return round(moved * (min(1.0, least / (ENOUGH_SHARPNESS * sharpest)) if sharpest > 0 else 1.0), 6)

    def _best(self, by_shot: list[list[_Choice]]) -> list[_Choice]:
        chosen: list[_Choice] = []
        left = [choice for choices in by_shot for choice in choices]
        while left and len(chosen) < self.pairs_per_clip:
            shots = Counter(choice.shot for choice in chosen)
            frames = {frame.frame.index for choice in chosen for frame in (choice.reference, choice.target)}

            def preference(choice: _Choice, shots: Counter = shots, frames: set[int] = frames) -> tuple[Any, ...]:
                shared = (choice.reference.frame.index in frames) + (choice.target.frame.index in frames)
                return (shots[choice.shot], shared, *choice.rank)

            best = min(left, key=preference)
            chosen.append(best)
            left.remove(best)
        return sorted(chosen, key=lambda choice: choice.rank)


def _within(frames: Sequence[int], shot: Shot) -> tuple[int, ...]:
    return tuple(index for index in frames if shot.first <= index <= shot.last)


def _rejection(faults: Sequence[tuple[str, dict[str, float]]]) -> Rejected:
    """The most common fault, the first of equals, with the measures of its first frame."""
    counts = Counter(reason for reason, _ in faults)
    reason = max(counts, key=lambda name: counts[name])
    evidence = next(measured for name, measured in faults if name == reason)
    return Rejected(reason, {**evidence, "frames": counts[reason]})


def nearest(values: Sequence[int], wanted: float) -> int:
    """The entry of an ascending, non-empty sequence nearest to ``wanted``; of two that are as near the smaller one."""
    place = bisect_right(values, wanted)
    candidates = values[max(0, place - 1) : place + 1]
    return min(candidates, key=lambda value: (abs(value - wanted), value))
