"""Step 2: find the cuts, so that the two frames of a pair come from one shot."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np

from data_pipeline.errors import SettingsError
from data_pipeline.records import Rejected, Shot, Video, VideoFacts, VideoShots
from data_pipeline.step import Step

# Frames that are decoded at full size to measure black bars.
LOOKS = 5
CUT_OFF = "black bars, cut off"


@dataclass(kw_only=True)
class CutShots(Step[Video, VideoShots]):
    """Cuts and fades, found by PySceneDetect's AdaptiveDetector and ThresholdDetector on small pictures of all frames.

    thumbnail: side of these pictures, pixels; frames are squashed to squares. cut_ratio, min_content: a cut changes a
    frame by at least min_content (mean difference of hue, saturation and value, 0 to 255) and by cut_ratio times the
    mean of the two changes on either side, since fast motion lasts and a cut does not. fade_level: a stretch of frames
    with a mean below it, or above 255 - fade_level, is the middle of a fade; 0 looks for none. Slow dissolves are not
    found. Only the first ``max_frames`` frames are looked at; later ones are not used. Black bars round the picture are
    cut off; a clip with annotations, which are of the whole picture, is rejected for them.
    """

    preload: ClassVar[tuple[str, ...]] = ("scenedetect",)

    cut_ratio: float = 3.0
    min_content: float = 20.0
    fade_level: int = 12
    thumbnail: int = 32
    max_frames: int = 3000

    def __post_init__(self) -> None:
        if self.cut_ratio < 1:
            raise SettingsError(f"cut_ratio must be at least 1, got {self.cut_ratio}")
        if not 0 < self.min_content <= 255:
            raise SettingsError(f"min_content must lie in (0, 255], got {self.min_content}")
        if not 0 <= self.fade_level < 128:
            raise SettingsError(f"fade_level must lie in 0..127, got {self.fade_level}")
        if self.thumbnail < 8 or self.max_frames < 2:
            raise SettingsError(
                f"thumbnail must be at least 8 and max_frames 2, got {self.thumbnail} and {self.max_frames}"
            )

    def setup(self) -> None:
        """Loads the readers and PySceneDetect."""
        from data_pipeline.models import black_bars
        from data_pipeline.models.shots import find_cuts
        from data_pipeline.models.video_reader import open_reader

        self._open, self._find_cuts, self._bars = open_reader, find_cuts, black_bars

    def process(self, video: Video) -> VideoShots | Rejected:
        """The shots of the video; a video without a cut is one shot."""
        if len(video.facts.stamps) < 2:
            return Rejected("a single frame", {"frames": 1})
        reader = self._open(video.reader, video.file.path, video.facts)
        pictures = reader.thumbnails(self.thumbnail, self.max_frames)
        if reader.facts != video.facts:  # frames say more than the header
            video = _now_known(video, reader.facts)
        if self._bars.may_have_bars(pictures):
            # Full-sized pictures tell where they end; thumbnails only that there is something to look for.
            places = sorted({len(pictures) * place // LOOKS for place in range(LOOKS)})
            frames = self._open(video.reader, video.file.path, video.facts).frames(tuple(places))
            bars = self._bars.find_bars(frames)
            if any(bars):
                if video.annotations is not None:
                    return Rejected("black bars round the picture", {"bars": bars, "needed": "annotated clips without"})
                left, top, right, bottom = bars
                facts = video.facts
                pictures = _within(pictures, bars, (facts.width, facts.height))
                size = {"width": facts.width - left - right, "height": facts.height - top - bottom}
                video = _now_known(video, replace(facts, **size, bars=bars, notes=(*facts.notes, CUT_OFF)))
        cuts = self._find_cuts(
            pictures, cut_ratio=self.cut_ratio, min_content=self.min_content, fade_level=self.fade_level
        )
        starts = [0, *cuts, len(pictures)]
        times = video.facts.times
        shots = [
            Shot(first=start, last=end - 1, start=times[start], end=times[end - 1]) for start, end in pairwise(starts)
        ]
        return VideoShots(video=video, shots=tuple(shots))


def _now_known(video: Video, facts: VideoFacts) -> Video:
    """The video with facts of which more is known than before."""
    new = tuple(note for note in facts.notes if note not in video.facts.notes)
    return replace(video, facts=facts, notes=(*video.notes, *new))


def _within(thumbnails: np.ndarray, bars: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Thumbnails (frames, height, width, 3) without the lines that bars of a picture of this size touch."""
    height, width = thumbnails.shape[1:3]
    left, right = (-(-bar * width // size[0]) for bar in (bars[0], bars[2]))
    top, bottom = (-(-bar * height // size[1]) for bar in (bars[1], bars[3]))
    return thumbnails[:, top : height - bottom, left : width - right]
