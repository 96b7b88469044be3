"""Step 2: find the cuts, so that the two frames of a pair come from one shot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from data_pipeline.records import Rejected, SettingsError, Shot, Video, VideoShots
from data_pipeline.step import Step

BINS = 12
NEIGHBOURS = 8


@dataclass(kw_only=True)
class CutShots(Step[Video, VideoShots]):
    """Cuts where two neighbouring frames differ in their colours and in their layout, and far more than the frames
    around them.

    All frames are compared as thumbnails of ``thumbnail`` x ``thumbnail`` pixels. A cut needs a colour histogram
    distance of at least ``min_histogram_change`` and a mean pixel difference of at least ``min_pixel_change`` (both
    in [0, 1]), and a pixel difference ``times_neighbours`` times the median of the 8 changes on either side: fast
    motion is fast for more than one frame, a cut is not. Slow dissolves are not found. Only the first ``max_frames``
    frames are looked at; later ones are not used.
    """

    min_histogram_change: float = 0.12
    min_pixel_change: float = 0.08
    times_neighbours: float = 3.0
    thumbnail: int = 32
    max_frames: int = 3000

    def __post_init__(self) -> None:
        for name in ("min_histogram_change", "min_pixel_change"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingsError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        if self.times_neighbours < 1:
            raise SettingsError(f"times_neighbours must be at least 1, got {self.times_neighbours}")
        if self.thumbnail < 8 or self.max_frames < 2:
            raise SettingsError(
                f"thumbnail must be at least 8 and max_frames 2, got {self.thumbnail} and {self.max_frames}"
            )

    def setup(self) -> None:
        """Loads the readers."""
        from data_pipeline.models.video_reader import open_reader

        self._open = open_reader

    def process(self, video: Video) -> VideoShots | Rejected:
        """The shots of the video; a video without a cut is one shot."""
        if len(video.facts.stamps) < 2:
            return Rejected("a single frame", {"frames": 1})
        pictures = self._open(video.reader, video.file.path, video.facts).thumbnails(self.thumbnail, self.max_frames)
        starts = [0, *self.cuts(pictures), len(pictures)]
        times = video.facts.times
        shots = [
            Shot(first=start, last=end - 1, start=times[start], end=times[end - 1]) for start, end in pairwise(starts)
        ]
        return VideoShots(video=video, shots=tuple(shots))

    def cuts(self, pictures: np.ndarray) -> list[int]:
        """Numbers of the frames that begin a new shot. pictures: uint8 (frames, height, width, 3)."""
        if len(pictures) < 2:
            return []
        histograms = np.stack([soft_histogram(picture) for picture in pictures])
        colour = 0.5 * np.abs(np.diff(histograms, axis=0)).sum(axis=-1).mean(axis=-1)
        small = pictures.astype(np.float32) / 255
        layout = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
        found = []
        for i in np.flatnonzero((colour >= self.min_histogram_change) & (layout >= self.min_pixel_change)):
            around = np.concatenate((layout[max(0, i - NEIGHBOURS) : i], layout[i + 1 : i + 1 + NEIGHBOURS]))
            if around.size == 0 or layout[i] >= self.times_neighbours * np.median(around):
                found.append(int(i) + 1)
        return found


def soft_histogram(picture: np.ndarray) -> np.ndarray:
    """One histogram per colour channel, float64 (3, BINS), each summing to 1. picture: uint8 (height, width, 3).

    Each value is shared between its two nearest bins: else a slight change of light moves a plain sky from one bin to
    the next.
    """
    place = picture.reshape(-1, 3).astype(np.float64) * ((BINS - 1) / 255)
    low = place.astype(np.int64)
    share = place - low
    rows = []
    for channel in range(3):
        counts = np.bincount(low[:, channel], weights=1 - share[:, channel], minlength=BINS + 1)
        counts += np.bincount(low[:, channel] + 1, weights=share[:, channel], minlength=BINS + 1)
        rows.append(counts[:BINS])
    return np.stack(rows) / len(place)
