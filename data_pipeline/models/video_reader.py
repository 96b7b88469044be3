"""Decoding: facts of a video, thumbnails of all its frames, and single frames, exactly.

Two readers with the same three calls. decord is quick, and wrong without a word on open groups of pictures and on
HEVC (frames 2 or 3 off), and it cannot open AV1; PyAV with the re-seek rule below was exact on every mp4, mkv, webm
and avi that was tried. So ``choose_reader`` with "auto" gives decord only what decord reads right. Both decode on one
thread: workers are the parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from data_pipeline.records import ClipError, SettingsError, VideoFacts

READERS = ("auto", "decord", "pyav")
SAFE_CODECS = frozenset({"h264", "mpeg4", "vp8", "vp9"})
# Decoded pixels of a clip that are kept at most: 48 MB, or five seconds of 320 x 240.
SHORT_CLIP_PIXELS = 16_000_000
SAFE_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm", "avi"})


class VideoReader(Protocol):
    """Decodes one file. Both calls raise ClipError if the file does not hold what its container promised."""

    def thumbnails(self, size: int, limit: int) -> np.ndarray:
        """The first ``limit`` frames, squashed to uint8 (frames, size, size, 3)."""
        ...

    def frames(self, indices: tuple[int, ...]) -> list[np.ndarray]:
        """Frames by number, ascending: uint8 (height, width, 3) each."""
        ...


def _open(path: Path) -> Any:
    """An open container whose video, if it has one, is decoded on one thread."""
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise ClipError("unreadable video", error=_one_line(error)) from error
    for stream in container.streams.video:
        stream.thread_type = "NONE"
    return container


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def probe(path: Path) -> VideoFacts:
    """Facts of a video: all packets are listed, one frame is decoded. ClipError if there is no video in it."""
    with _open(path) as container:
        if not container.streams.video:
            raise ClipError("no video stream")
        stream = container.streams.video[0]
        stamps, open_groups, key_stamp, first = [], False, None, None
        try:
            for packet in container.demux(stream):
                if packet.pts is None or packet.is_discard:
                    continue
                stamps.append(packet.pts)
                if packet.is_keyframe:
                    key_stamp = packet.pts
                elif key_stamp is not None and packet.pts < key_stamp:
                    open_groups = True
            container.seek(0, stream=stream)
            first = next(container.decode(stream), None)
        except (av.FFmpegError, OSError) as error:
            raise ClipError("undecodable video", error=_one_line(error)) from error
        if first is None or not stamps:
            raise ClipError("video without frames")
        if len(set(stamps)) != len(stamps):
            raise ClipError("two frames with the same time stamp")
        rotation = round(first.rotation / 90) * 90 % 360
        width, height = (first.height, first.width) if rotation % 180 else (first.width, first.height)
        return VideoFacts(
            codec=stream.codec_context.name,
            container=container.format.name,
            width=width,
            height=height,
            rotation=rotation,
            time_base=float(stream.time_base),
            stamps=tuple(sorted(stamps)),
            open_groups=open_groups,
        )


def fits_in_memory(facts: VideoFacts) -> bool:
    """True for clips so short that all frames are decoded once and kept, instead of sought again."""
    return len(facts.stamps) * facts.width * facts.height <= SHORT_CLIP_PIXELS


class PyAVReader:
    """Exact reading with PyAV.

    The re-seek rule: after a seek the first decoded frame may already lie behind the wanted one; then seek again 1, 2,
    4, ... seconds earlier, and decode forward to the wanted time stamp.
    """

    def __init__(self, path: Path, facts: VideoFacts) -> None:
        self.path = path
        self.facts = facts
        self._kept: dict[int, Any] = {}
        # One converter for all frames: setting one up costs more than using it on a small frame.
        self._converter = VideoReformatter()

    def thumbnails(self, size: int, limit: int) -> np.ndarray:
        """See VideoReader."""
        wanted = self.facts.stamps[:limit]
        pictures = {}
        for stamp, frame in self._up_to(wanted[-1]):
            small = self._converter.reformat(frame, width=size, height=size, format="rgb24")
            pictures[stamp] = self._upright(small.to_ndarray())
        missing = [stamp for stamp in wanted if stamp not in pictures]
        if missing:
            raise ClipError("frames are missing", decoded=len(wanted) - len(missing), expected=len(wanted))
        return np.stack([pictures[stamp] for stamp in wanted])

    def frames(self, indices: tuple[int, ...]) -> list[np.ndarray]:
        """See VideoReader."""
        stamps = [self.facts.stamps[index] for index in indices]
        if all(stamp in self._kept for stamp in stamps):
            return [self._picture(self._kept[stamp]) for stamp in stamps]
        with _open(self.path) as container:
            return [self._picture(self._frame_at(container, stamp)) for stamp in stamps]

    def _up_to(self, last: int) -> Iterator[tuple[int, Any]]:
        keep = fits_in_memory(self.facts)
        with _open(self.path) as container:
            for frame in self._decode(container):
                if frame.pts is None or frame.pts > last:
                    break
                if keep:
                    self._kept[frame.pts] = frame
                yield frame.pts, frame

    def _decode(self, container: Any) -> Iterator[Any]:
        try:
            yield from container.decode(container.streams.video[0])
        except (av.FFmpegError, OSError) as error:
            raise ClipError("undecodable video", error=_one_line(error)) from error

    def _frame_at(self, container: Any, stamp: int) -> Any:
        stream = container.streams.video[0]
        first_stamp = self.facts.stamps[0]
        earlier = 0.0
        while True:
            start = max(first_stamp, stamp - round(earlier / self.facts.time_base))
            container.seek(start, stream=stream, backward=True)
            overshot = False
            for count, frame in enumerate(self._decode(container)):
                if frame.pts is None or frame.pts < stamp:
                    continue
                if frame.pts == stamp:
                    return frame
                overshot = count == 0
                break
            if not overshot or start == first_stamp:
                seconds = round((stamp - first_stamp) * self.facts.time_base, 3)
                raise ClipError("frames are missing", wanted_time=seconds)
            earlier = max(1.0, 2 * earlier)

    def _picture(self, frame: Any) -> np.ndarray:
        return self._upright(self._converter.reformat(frame, format="rgb24").to_ndarray())

    def _upright(self, picture: np.ndarray) -> np.ndarray:
        # PyAV hands out pictures as stored; rotation counts degrees anticlockwise, as np.rot90 does.
        turns = self.facts.rotation // 90
        return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture


class DecordReader:
    """Reading with decord. It indexes the whole file at opening, so it is for clips, not for films."""

    def __init__(self, path: Path, facts: VideoFacts) -> None:
        try:
            import decord
        except ImportError as error:
            raise SettingsError(f"the reader 'decord' is not installed ({error}); use --reader pyav") from error
        self._decord = decord
        self.path = path
        self.facts = facts
        self._video: Any = None
        self._kept: np.ndarray | None = None

    def _open(self, **size: int) -> Any:
        # decord raises RuntimeError or its own DECORDError, which share no parent but Exception.
        try:
            video = self._decord.VideoReader(str(self.path), num_threads=1, **size)
        except Exception as error:
            raise ClipError("unreadable video", error=_one_line(error), reader="decord") from error
        # A damaged file opens with fewer frames and no error: the "75 %" frame would be another one.
        if len(video) != len(self.facts.stamps):
            raise ClipError("frames are missing", decoded=len(video), expected=len(self.facts.stamps), reader="decord")
        return video

    @property
    def video(self) -> Any:
        """The file at full size, opened once."""
        if self._video is None:
            self._video = self._open()
        return self._video

    def _batch(self, video: Any, indices: Sequence[int]) -> np.ndarray:
        try:
            return video.get_batch(list(indices)).asnumpy()
        except Exception as error:
            raise ClipError("undecodable video", error=_one_line(error), reader="decord") from error

    def _all(self) -> np.ndarray:
        if self._kept is None:
            self._kept = self._batch(self.video, range(len(self.video)))
        return self._kept

    def thumbnails(self, size: int, limit: int) -> np.ndarray:
        """See VideoReader."""
        if fits_in_memory(self.facts):
            pictures = (Image.fromarray(picture) for picture in self._all()[:limit])
            return np.stack([np.asarray(picture.resize((size, size), Image.Resampling.BOX)) for picture in pictures])
        video = self._open(width=size, height=size)
        return self._batch(video, range(min(limit, len(video))))

    def frames(self, indices: tuple[int, ...]) -> list[np.ndarray]:
        """See VideoReader."""
        if fits_in_memory(self.facts):
            pictures = self._all()
            return [pictures[index].copy() for index in indices]
        return list(self._batch(self.video, indices))


def is_safe_for_decord(facts: VideoFacts) -> bool:
    """True for the kinds of files on which decord gave every frame right: closed groups, common codecs and
    containers.
    """
    containers = set(facts.container.split(","))
    return (
        facts.codec in SAFE_CODECS
        and bool(containers & SAFE_CONTAINERS)
        and not facts.open_groups
        and not facts.rotation
    )


def decord_agrees(path: Path, facts: VideoFacts) -> bool:
    """True if decord opens the file, counts as many frames, and shows each within half a frame of its time stamp."""
    try:
        video = open_reader("decord", path, facts).video
        starts = np.asarray(video.get_frame_timestamp(range(len(video))))[:, 0]
    except (ClipError, SettingsError):
        return False
    times = np.asarray(facts.times)
    gap = float(np.diff(times).min()) if len(times) > 1 else 1.0
    return bool(np.abs(starts - starts[0] - times).max() < gap / 2)


def choose_reader(name: str, path: Path, facts: VideoFacts) -> str:
    """The reader for one file: "decord" or "pyav". "auto" takes decord where it is safe and agrees with the time
    stamps.
    """
    if name != "auto":
        return name
    return "decord" if is_safe_for_decord(facts) and decord_agrees(path, facts) else "pyav"


@lru_cache(maxsize=1)
def open_reader(name: str, path: Path, facts: VideoFacts) -> PyAVReader | DecordReader:
    """The reader called ``name`` ("decord" or "pyav") on one file.

    The last one is kept: the steps that read the same clip one after the other share what it has opened and decoded.
    """
    return {"decord": DecordReader, "pyav": PyAVReader}[name](path, facts)
