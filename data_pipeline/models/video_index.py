"""What is in a video file: its packets are listed, none is decoded.

The list gives the time stamps of all frames, so that frame 17 is the 17th to be shown, and the key frame from which
each one can be decoded. The file stays open for the reader that comes next: opening it twice costs as much as decoding
a short group of pictures.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from data_pipeline.models.video_pictures import (
    DEFAULT_RULES,
    PictureRules,
    colours_of,
    crop_of,
    description_of,
    fields_of,
    light_of,
    may_have_fields,
    orientation_of,
    pixel_aspect_of,
    shape_notes,
    upright_size,
)
from data_pipeline.records import ClipError, VideoFacts

# Nothing else is opened, whatever a file is called: a playlist or a concat script named clip.mp4 would make FFmpeg
# read other files, and a still picture is no video.
CONTAINERS = "mov,matroska,webm,avi,mpegts,flv,asf,mpeg,mpegvideo"
# Larger pictures are a mistake or an attack: a file of a few kilobytes can ask for gigabytes.
MAX_PIXELS = 8192 * 8192
# Decoders that give a whole picture right after a key frame. With others reading starts at the first frame.
SEEKABLE_CODECS = frozenset(
    {"h264", "hevc", "vvc", "vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg", "prores", "ffv1"}
)
PROGRESSIVE = 1  # among FFmpeg's orders of fields; 0 is "not said", larger ones are interlaced
SHOW_FRAME = 0x10  # in the first byte of a VP8 frame


class Key(NamedTuple):
    """A packet from which decoding can start. position: its place in the order of decoding."""

    position: int
    pts: int
    dts: int


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenVideo:
    """An open file and its index.

    positions: time stamp -> place in the order of decoding, of every packet. keys: in the order of decoding, the first
    one being where reading starts. counted: the time stamps of the packets don't belong to the pictures (AVI has none
    of its own), so frames are counted as they come out of the decoder.
    """

    path: Path
    container: Any
    stream: Any
    facts: VideoFacts
    positions: Mapping[int, int]
    keys: tuple[Key, ...]
    counted: bool

    def key_of(self, stamp: int) -> int:
        """Number of the last key frame from which the frame at ``stamp`` can be decoded.

        A frame that is shown before a key frame but decoded after it (an open group) needs the key frame before.
        """
        number = bisect_right(self.keys, self.positions[stamp], key=lambda key: key.position) - 1
        while number > 0 and self.keys[number].pts > stamp:
            number -= 1
        return max(0, number)


_last: list[OpenVideo] = []


def open_container(path: Path) -> Any:
    """An open container of a known kind whose video, if it has one, is decoded on one thread; ClipError."""
    try:
        # The prefix keeps FFmpeg from taking a name like "concat:x.mp4" for a protocol.
        container = av.open(f"file:{path}", options={"format_whitelist": CONTAINERS})
    except (av.FFmpegError, OSError) as error:
        raise ClipError("unreadable video", error=one_line(error)) from error
    for stream in container.streams.video:
        stream.thread_type = "NONE"
    return container


def one_line(error: BaseException) -> str:
    """The kind and the first line of an error, for the evidence of a rejection."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def probe(path: Path, rules: PictureRules = DEFAULT_RULES) -> VideoFacts:
    """Facts of a video; the file stays open until the next one is probed. ClipError if there is no video in it, or
    ``rules`` reject it.
    """
    return open_video(path, rules=rules).facts


def open_video(path: Path, facts: VideoFacts | None = None, rules: PictureRules = DEFAULT_RULES) -> OpenVideo:
    """The file with its index. If ``facts`` are those of the file opened last, that one is given.

    One file is open at a time: the one opened before is closed.
    """
    if facts is not None and _last and _last[0].path == path and _last[0].facts == facts:
        return _last[0]
    close_last()
    container = open_container(path)
    try:
        video = _index(path, container, rules)
    except (av.FFmpegError, OSError) as error:
        container.close()
        raise ClipError("undecodable video", error=one_line(error)) from error
    except BaseException:
        container.close()
        raise
    _last.append(video)
    return video


def close_last() -> None:
    """Closes the file that was opened last, if it is still open."""
    while _last:
        _last.pop().container.close()


def _index(path: Path, container: Any, rules: PictureRules) -> OpenVideo:
    # A cover picture is a video stream too.
    streams = [stream for stream in container.streams.video if not stream.disposition & stream.disposition.attached_pic]
    if not streams:
        raise ClipError("no video stream")
    stream = streams[0]
    context = stream.codec_context
    if context is None:
        raise ClipError("unknown codec")
    codec = context.codec.canonical_name
    colours = colours_of(context)  # now: decoders forget what only the container says
    if context.width * context.height > MAX_PIXELS:
        raise ClipError("too large a picture", width=context.width, height=context.height, max_pixels=MAX_PIXELS)
    packets, damaged, listed = [], 0, 0
    for packet in container.demux(stream):
        listed += packet.dts is not None or bool(packet.size)  # all but the empty one at the end
        if not packet.size or (codec == "vp8" and not bytes(packet)[0] & SHOW_FRAME):
            continue
        damaged += packet.is_corrupt
        packets.append((packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
    _check_complete(container, stream, listed, damaged)
    time_base = float(stream.time_base or 0)
    if any(pts is None for pts, *_ in packets):
        raise ClipError("frames without time stamps", container=container.format.name, codec=codec)
    counted = "avi" in container.format.name.split(",") and codec in ("h264", "hevc") and bool(context.has_b_frames)
    keys = [Key(i, pts, pts if dts is None else dts) for i, (pts, dts, key, _) in enumerate(packets) if key]
    if not keys:
        raise ClipError("no key frame" if packets else "video without frames")
    # What comes before the first key frame, or is shown before it, cannot be decoded.
    first = keys[0]
    shown = [pts for pts, _, _, discard in packets[first.position :] if not discard and pts >= first.pts]
    stamps = np.unique(np.asarray(shown, dtype=np.int64))
    if len(stamps) != len(shown):
        raise ClipError("two frames with the same time stamp", frames=len(shown), times=len(stamps))
    if not shown or not time_base:
        raise ClipError("video without frames")
    tone_map, notes = light_of(colours, rules)
    description = description_of(container, stream)
    rotation, mirrored = _orientation(container, stream, description)
    crop, aspect = crop_of(description), pixel_aspect_of(stream)
    width, height = upright_size((context.width, context.height), crop, aspect, rotation)
    if width * height > MAX_PIXELS:
        raise ClipError("too large a picture", width=width, height=height, max_pixels=MAX_PIXELS)
    positions = {pts: i for i, (pts, *_) in enumerate(packets)}
    facts = VideoFacts(
        codec=codec,
        container=container.format.name,
        width=width,
        height=height,
        rotation=rotation,
        time_base=time_base,
        stamps=tuple(stamps.tolist()),
        mirrored=mirrored,
        crop=crop,
        pixel_aspect=aspect,
        colours=colours,
        tone_map=tone_map,
        if_interlaced=rules.interlaced,
        notes=(*notes, *shape_notes(aspect, crop, mirrored)),
    )
    if _interlaced(container, stream, codec):
        facts = fields_of(facts)
    return OpenVideo(
        path=path,
        container=container,
        stream=stream,
        facts=facts,
        positions=positions,
        keys=tuple(keys) if codec in SEEKABLE_CODECS and not counted else (first,),
        counted=counted,
    )


def _check_complete(container: Any, stream: Any, found: int, damaged: int) -> None:
    # mp4 lists its packets in its header; a shorter file still opens. What an edit list cuts away is not in the list.
    expected = len(stream.index_entries) if "mp4" in container.format.name.split(",") else found
    if found < expected:
        raise ClipError("frames are missing", found=found, expected=expected)
    if damaged:
        raise ClipError("damaged packets", damaged=damaged, packets=found)


def _orientation(container: Any, stream: Any, description: str) -> tuple[int, bool]:
    """Turn and flip of the stored pictures, see ``orientation_of``.

    Only frames carry them, and a frame costs more than all packets: so one is decoded only where the description of the
    stream speaks of a display matrix.
    """
    if "display matrix" not in description:
        return 0, False
    container.seek(stream.start_time or 0, stream=stream)
    first = next(container.decode(stream), None)
    return orientation_of(first) if first is not None else (0, False)


def _interlaced(container: Any, stream: Any, codec: str) -> bool:
    """Whether frames are woven of two fields. The header says so, or the first frame where there is none that could."""
    order = int(stream.codec_context.field_order)
    if order or not may_have_fields(codec):
        return order > PROGRESSIVE and may_have_fields(codec)
    container.seek(stream.start_time or 0, stream=stream)
    try:
        first = next(container.decode(stream), None)
    except av.FFmpegError:  # reading will say so
        return False
    return first is not None and first.interlaced_frame


def packets_from(video: OpenVideo, number: int) -> Iterator[Any]:
    """Packets in the order of decoding from key frame ``number`` on, and at the end the empty one that makes a decoder
    give what it holds back.

    Where a container goes when it is asked for a time differs from format to format. So the first packet that comes is
    looked up, and if it lies behind the key frame, an earlier place is tried; at last the file is read from its start.
    """
    key = video.keys[number]
    earlier = [before.dts for before in reversed(video.keys[:number])]
    for target in dict.fromkeys((key.pts, key.dts, *earlier)):
        try:
            video.container.seek(target, stream=video.stream)
        except av.FFmpegError:
            continue
        packets = _skip_to(key, video, video.container.demux(video.stream))
        first = next(packets, None)
        if first is not None:
            yield first
            yield from packets
            return
    with open_container(video.path) as container:
        yield from _skip_to(key, video, container.demux(container.streams[video.stream.index]))


def _skip_to(key: Key, video: OpenVideo, packets: Iterator[Any]) -> Iterator[Any]:
    """The packets from this key frame on; none if the first one lies behind it."""
    begun = False
    for packet in packets:
        if (
            not packet.size and packet.dts is not None
        ):  # "the last picture again", in AVI; a decoder takes it as the end
            continue
        if not begun:
            position = video.positions.get(packet.pts, -1)
            if position > key.position:
                return
            begun = position == key.position
        if begun:
            yield packet
