"""Step 3: choose two frames of one shot and decode them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from data_pipeline.records import Frame, FramePair, Rejected, SettingsError, Shot, VideoShots
from data_pipeline.step import Step


@dataclass(kw_only=True)
class PickFrames(Step[VideoShots, tuple[FramePair, ...]]):
    """Takes the frames at two fixed places of the shot that has them farthest apart in time.

    reference_place, target_place: where in the shot, 0 its first and 1 its last frame; a quarter and three quarters
    keep away from the fades and the half-entered subjects at its ends. min_gap: seconds between the two frames;
    nearer ones show the same moment. annotated_only: take the annotated frames nearest to these places, for a
    detector that reads annotations. pairs_per_clip: pairs that one clip gives at most.
    """

    reference_place: float = 0.25
    target_place: float = 0.75
    min_gap: float = 0.25
    annotated_only: bool = True
    pairs_per_clip: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.reference_place < self.target_place <= 1:
            places = f"{self.reference_place} and {self.target_place}"
            raise SettingsError(f"need 0 <= reference_place < target_place <= 1, got {places}")
        if self.min_gap < 0:
            raise SettingsError(f"min_gap must not be negative, got {self.min_gap}")
        if self.pairs_per_clip < 1:
            raise SettingsError(f"pairs_per_clip must be at least 1, got {self.pairs_per_clip}")

    def setup(self) -> None:
        """Loads the readers."""
        from data_pipeline.models.video_reader import open_reader

        self._open = open_reader

    def process(self, record: VideoShots) -> tuple[FramePair, ...] | Rejected:
        """1 to pairs_per_clip pairs of decoded frames, the best one first."""
        video = record.video
        times = video.facts.times
        frames = self._usable_frames(record)
        choices = []
        for shot in record.shots:
            usable = tuple(index for index in frames if shot.first <= index <= shot.last)
            if len(usable) >= 2:
                pair = self.choose(shot, usable)
                choices.append((times[pair[1]] - times[pair[0]], shot, pair))
        if not choices:
            reason = "fewer than two annotated frames in one shot" if self.annotated_only else "shots of one frame"
            return Rejected(reason, {"shots": len(record.shots), "frames": list(frames[:20])})
        gap, shot, pair = max(choices, key=lambda choice: choice[0])
        if gap < self.min_gap:
            return Rejected("frames too near in time", {"seconds": round(gap, 3), "min_gap": self.min_gap})
        pictures = self._open(video.reader, video.file.path, video.facts).frames(pair)
        reference, target = (
            Frame(index=index, time=times[index], image=picture) for index, picture in zip(pair, pictures, strict=True)
        )
        return (FramePair(video=video, shot=shot, reference=reference, target=target),)

    def _usable_frames(self, record: VideoShots) -> tuple[int, ...]:
        if not self.annotated_only:
            return tuple(range(record.shots[-1].last + 1))
        annotations = record.video.annotations
        return tuple(sorted(index for index, objects in annotations.frames.items() if objects)) if annotations else ()

    def choose(self, shot: Shot, usable: tuple[int, ...]) -> tuple[int, int]:
        """Two of the usable frames, ascending; the outermost two if one frame is nearest to both places."""
        span = shot.last - shot.first
        first, second = (
            nearest(usable, shot.first + place * span) for place in (self.reference_place, self.target_place)
        )
        return (first, second) if first < second else (usable[0], usable[-1])


def nearest(values: tuple[int, ...], wanted: float) -> int:
    """The entry of an ascending, non-empty tuple that lies nearest to ``wanted``; the smaller one if two are as
    near.
    """
    place = bisect_right(values, wanted)
    candidates = values[max(0, place - 1) : place + 1]
    return min(candidates, key=lambda value: (abs(value - wanted), value))
