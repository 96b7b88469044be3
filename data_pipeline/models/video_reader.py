"""Decoding: thumbnails of all frames of a video, and single frames, exactly.

Every frame is asked for by its number in the order of presentation, and found by its time stamp: the index
(``video_index``) knows from which key frame it can be decoded. "auto" reads with PyAV, which with this index was exact
on every kind of file that was tried, and quicker than decord on all of them (benchmarks/decoding.py). decord is wrong
without a word on open groups of pictures and on HEVC, and cannot open AV1; it stays for those who ask for it. Both
decode on one thread: workers are the parallelism.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from PIL import Image

from data_pipeline.errors import ClipError, SettingsError
from data_pipeline.models.video_index import OpenVideo, open_video, packets_from, probe
from data_pipeline.models.video_pictures import PictureMaker, deinterlaced, fields_of, may_have_fields
from data_pipeline.reasons import one_line
from data_pipeline.records import VideoFacts

__all__ = ["READERS", "DecordReader", "PyAVReader", "VideoReader", "choose_reader", "open_reader", "probe"]

READERS = ("auto", "decord", "pyav")
# Decoded pixels of a clip that are kept at most: 48 MB, or five seconds of 320 x 240.
SHORT_CLIP_PIXELS = 16_000_000
CUT_OFF = "cut off within a frame, used up to there"
# Their decoders leave out pictures that no other picture is drawn from, and the rest stays the same, bit for bit.
CAN_LEAVE_OUT = frozenset({"h264", "hevc"})


class VideoReader(Protocol):
    """Decodes one file. Both calls raise ClipError if the file does not hold what its container promised."""

    def thumbnails(self, size: int, limit: int) -> np.ndarray:
        """The first ``limit`` frames, squashed to uint8 (frames, size, size, 3)."""
        ...

    def frames(self, indices: tuple[int, ...]) -> list[np.ndarray]:
        """Frames by number, upright: uint8 (height, width, 3) each, in the order of ``indices``."""
        ...


def fits_in_memory(facts: VideoFacts) -> bool:
    """True for clips so short that all frames are decoded once and kept, instead of sought again."""
    return len(facts.stamps) * facts.width * facts.height <= SHORT_CLIP_PIXELS


class PyAVReader:
    """Exact reading with PyAV.

    A wanted frame is decoded from the last key frame that it can be decoded from, several ones from the same key frame
    together. On the way pictures that no other one needs are left out. Where that does not give the frame (a decoder
    may need some time after a key frame that is not a whole picture), reading starts earlier, at last at the beginning.
    """

    def __init__(self, path: Path, facts: VideoFacts) -> None:
        self.path = path
        self.facts = facts
        self._kept: dict[int, Any] = {}
        self._fed, self._torn = 0, False
        self._maker = PictureMaker(facts)
        self._noted = any(note.startswith("interlaced") for note in facts.notes)

    def thumbnails(self, size: int, limit: int) -> np.ndarray:
        """See VideoReader. A file that ends within its last packet loses what cannot be shown; ``facts`` tell it."""
        video, keep = open_video(self.path, self.facts), fits_in_memory(self.facts)
        wanted = self.facts.stamps[:limit]
        pictures: list[np.ndarray] = []
        try:
            for stamp, frame in self._decode(video, 0, wanted, leave_out=False):
                if keep:
                    self._kept[stamp] = frame
                if frame.interlaced_frame:
                    self._note_fields()
                pictures.append(self._maker.thumbnail(frame, size))
        except (av.FFmpegError, OSError) as error:
            self._torn = True
            if self._fed < len(video.sizes) or not pictures:
                raise _undecodable(error) from error
        if len(pictures) < len(wanted):
            if not self._torn or self._fed < len(video.sizes) or not pictures:
                raise ClipError(self._what_is_wrong(), decoded=len(pictures), expected=len(wanted))
            notes = (*self.facts.notes, CUT_OFF)
            self.facts = replace(self.facts, stamps=wanted[: len(pictures)], notes=notes)
        return np.stack(pictures)

    def frames(self, indices: tuple[int, ...]) -> list[np.ndarray]:
        """See VideoReader."""
        stamps = self.facts.stamps
        if not self.facts.deinterlace:
            found = self._found({stamps[index] for index in indices}, self._maker.picture)
            return [found[stamps[index]] for index in indices]
        around = {index: stamps[max(0, index - 1) : index + 2] for index in indices}
        decoded = self._found({stamp for near in around.values() for stamp in near}, lambda frame: frame)
        pictures = {}
        for index, near in around.items():
            frame = deinterlaced([decoded[stamp] for stamp in near], near.index(stamps[index]))
            pictures[index] = self._maker.picture(frame)
        return [pictures[index] for index in indices]

    def _note_fields(self) -> None:
        """Interlaced frames in a clip whose header did not say so: ``facts`` tell it from now on."""
        facts = self.facts
        if self._noted or facts.deinterlace or not may_have_fields(facts.codec):
            return
        self._noted = True
        self.facts = fields_of(facts)

    def _found(self, stamps: set[int], make: Callable[[Any], Any]) -> dict[int, Any]:
        """What ``make`` makes of the decoded frames at these time stamps."""
        found = {stamp: make(self._kept[stamp]) for stamp in stamps if stamp in self._kept}
        if waiting := stamps - found.keys():
            video = open_video(self.path, self.facts)
            groups: dict[int, set[int]] = {}
            for stamp in waiting:
                if stamp not in video.positions:
                    raise ClipError("frames are missing", wanted_time=self._seconds(stamp))
                groups.setdefault(video.key_of(stamp), set()).add(stamp)
            for number, group in sorted(groups.items()):
                found |= self._read(video, number, group, make)
        return found

    def _read(self, video: OpenVideo, number: int, stamps: set[int], make: Callable[[Any], Any]) -> dict[int, Any]:
        """The same, decoded from key frame ``number`` or from an earlier one."""
        found: dict[int, Any] = {}
        leave_out, back = video.facts.codec in CAN_LEAVE_OUT and not video.counted, 1
        while True:
            try:
                for stamp, frame in self._decode(video, number, sorted(stamps - found.keys()), leave_out):
                    found[stamp] = make(frame)
                missing = stamps - found.keys()
                if missing:
                    fault = ClipError(self._what_is_wrong(), wanted_time=self._seconds(min(missing)))
            except (av.FFmpegError, OSError) as error:
                fault = _undecodable(error)
            missing = stamps - found.keys()
            if not missing:
                return found
            if leave_out:
                leave_out = False
            elif number:
                number, back = max(0, number - back), 2 * back
            else:
                raise fault

    def _decode(
        self, video: OpenVideo, number: int, wanted: Sequence[int], leave_out: bool
    ) -> Iterator[tuple[int, Any]]:
        """Decodes from key frame ``number`` on and yields the frames of these ascending time stamps; ends early when
        one has not come in its turn. Errors are those of PyAV.
        """
        own, place, counter = set(wanted), 0, iter(video.facts.stamps)
        self._fed, self._torn = video.keys[number].position, False
        cut = None
        try:
            for packet in packets_from(video, number):
                self._fed += 1
                if self._fed == len(video.sizes) and packet.is_corrupt:  # not every decoder minds half of a packet
                    cut = packet.pts
                if leave_out:
                    needed = packet.pts is None or packet.pts in own
                    packet.stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
                for frame in packet.decode():
                    stamp = next(counter, None) if video.counted else frame.pts
                    if stamp is None or stamp < wanted[place]:
                        continue
                    self._torn = frame.is_corrupt or stamp == cut
                    if stamp > wanted[place] or self._torn:
                        return
                    yield stamp, frame
                    place += 1
                    if place == len(wanted):
                        return
        finally:
            video.stream.codec_context.skip_frame = "DEFAULT"

    def _what_is_wrong(self) -> str:
        """Why the last decoding ended early."""
        return "a damaged frame" if self._torn else "frames are missing"

    def _seconds(self, stamp: int) -> float:
        return round((stamp - self.facts.stamps[0]) * self.facts.time_base, 3)


def _undecodable(error: Exception) -> ClipError:
    return ClipError("undecodable video", error=one_line(error))


class DecordReader:
    """Reading with decord. It indexes the whole file at opening, so it is for clips, not for films."""

    def __init__(self, path: Path, facts: VideoFacts) -> None:
        try:
            import decord
        except ImportError as error:
            raise SettingsError(f"the reader 'decord' is not installed ({error}); use --reader pyav") from error
        if facts.notes:
            raise ClipError("a clip that decord shows wrongly", because=list(facts.notes), needed="--reader auto")
        self._decord = decord
        self.path = path
        self.facts = facts
        self._video: Any = None
        self._kept: np.ndarray | None = None

    def _open(self, **squashed: int) -> Any:
        # decord raises RuntimeError or its own DECORDError, which share no parent but Exception.
        try:
            video = self._decord.VideoReader(str(self.path), num_threads=1, **squashed)
        except Exception as error:
            raise ClipError("unreadable video", error=one_line(error), reader="decord") from error
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
            raise ClipError("undecodable video", error=one_line(error), reader="decord") from error

    def _whole(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at full size; ClipError if they are of another stream, or not turned upright."""
        pictures = self._batch(self.video, indices)
        wanted, size = [self.facts.width, self.facts.height], list(pictures.shape[2:0:-1])
        if size != wanted:
            raise ClipError("pictures of another size", decoded=size, expected=wanted, needed="--reader auto")
        return pictures

    def _all(self) -> np.ndarray:
        if self._kept is None:
            self._kept = self._whole(range(len(self.video)))
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
        return list(self._whole(indices))


def choose_reader(name: str, path: Path, facts: VideoFacts) -> str:
    """The reader for one file: "decord" or "pyav". "auto" takes the one that is exact, on whatever file."""
    return "pyav" if name == "auto" else name


@lru_cache(maxsize=1)
def open_reader(name: str, path: Path, facts: VideoFacts) -> PyAVReader | DecordReader:
    """The reader called ``name`` ("decord" or "pyav") on one file.

    The last one is kept: the steps that read the same clip one after the other share what it has opened and decoded.
    """
    return {"decord": DecordReader, "pyav": PyAVReader}[name](path, facts)
