"""What is in a video file: its packets are listed, none is decoded.

The list gives the time stamps of all frames, so that frame 17 is the 17th to be shown, and the key frame from which
each one can be decoded. The file stays open for the reader that comes next: opening it twice costs as much as decoding
a short group of pictures.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition

from data_pipeline.errors import ClipError
from data_pipeline.models.mpeg4_frames import MAX_NOT_CODED, is_packed, pictures_in
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
from data_pipeline.reasons import one_line
from data_pipeline.records import VideoFacts

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
# Containers that tell when a packet is decoded, and not when it is shown.
TIMELESS = frozenset({"avi", "asf"})
# No containers at all, only pictures in a row: FFmpeg makes times up.
BARE = frozenset({"mpegvideo"})
SHOW_FRAME = 0x10  # in the first byte of a VP8 frame


class Key(NamedTuple):
    """A packet from which decoding can start. position: its place in the order of decoding."""

    position: int
    pts: int
    dts: int


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenVideo:
    """An open file and its index.

    positions: time stamp -> place in the order of decoding, of every packet. sizes: of all packets, in bytes. keys: in
    the order of decoding, the first one being where reading starts. counted: the time stamps of the packets don't
    belong to the pictures (AVI has none of its own), so frames are counted as they come out of the decoder;
    ``positions`` then has the numbers of frames.
    """

    path: Path
    container: Any
    stream: Any
    facts: VideoFacts
    positions: Mapping[int, int]
    sizes: tuple[int, ...]
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


def probe(path: Path, rules: PictureRules = DEFAULT_RULES) -> VideoFacts:
    """Facts of a video; the file stays open until the next one's. ClipError: no video in it, or ``rules`` reject it."""
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
        # Facts that were found while the file was read before.
        if facts is not None and facts.stamps == video.facts.stamps[: len(facts.stamps)]:
            video = replace(video, facts=facts)
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


class Listed(NamedTuple):
    """A packet with something in it, as listed. pictures: how many a decoder gives for it."""

    pts: int | None
    dts: int | None
    is_key: bool
    is_discard: bool
    size: int
    pictures: int


def _list(container: Any, streams: Sequence[Any]) -> tuple[Any, list[Listed]]:
    """The stream that is the film, and its packets in the order of decoding; ClipError if some are missing.

    Of several streams those of one picture are left out if there are others; then the default one is taken, then the
    one with the most pixels.
    """
    codecs = {stream.index: stream.codec_context.codec.canonical_name for stream in streams}
    tables: dict[int, list[Listed]] = {stream.index: [] for stream in streams}
    texts: dict[int, list[bytes | None]] = {stream.index: [] for stream in streams}
    listed = Counter[int]()
    packed: dict[int, bool] = {}
    for packet in container.demux(*streams):
        # Not ``packet.stream_index``: that of the empty packets at the end is 0, whatever their stream.
        number, size = packet.stream.index, packet.size
        codec = codecs[number]
        listed[number] += packet.dts is not None or bool(size)  # all but the empty one at the end
        if not size or (codec == "vp8" and not bytes(packet)[0] & SHOW_FRAME):
            continue
        if codec == "mpeg4":
            if number not in packed:
                packed[number] = is_packed(bytes(packet.stream.codec_context.extradata or b"") + bytes(packet))
            small = packed[number] or not texts[number] or size <= MAX_NOT_CODED
            texts[number].append(bytes(packet) if small else None)
        tables[number].append(Listed(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard, size, 1))

    def rank(stream: Any) -> tuple[bool, bool, int, int]:
        context, count = stream.codec_context, len(tables[stream.index])
        default = bool(stream.disposition & stream.disposition.default)
        return count > 1, default, count * context.width * context.height, -stream.index

    film = max(streams, key=rank)
    # mp4 lists its packets in its header; a shorter file still opens. What an edit list cuts away is not in the list.
    found, is_mp4 = listed[film.index], "mp4" in container.format.name.split(",")
    if is_mp4 and found < len(film.index_entries):
        raise ClipError("frames are missing", found=found, expected=len(film.index_entries))
    packets, data = tables[film.index], texts[film.index]
    if container.format.name in BARE:
        packets = [packet._replace(pts=None) for packet in packets]
    if data:
        header = bytes(film.codec_context.extradata or b"") + (data[0] or b"")
        pictures = pictures_in(data, header)
        packets = [packet._replace(pictures=count) for packet, count in zip(packets, pictures, strict=True)]
    return film, packets


def _moving(container: Any) -> list[Any]:
    """The video streams that may be the film: no covers, no pictures of chapters, nothing without a decoder."""
    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & still]
    if not streams:
        raise ClipError("no video stream")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise ClipError("unknown codec", needed="a codec that FFmpeg decodes, and a header that is whole")
    return known


def _is_counted(container: Any, stream: Any, packets: Sequence[Listed]) -> bool:
    """Whether the time stamps of packets don't belong to the pictures that come out of them."""
    delayed = bool(stream.codec_context.has_b_frames)
    untimed = not TIMELESS.isdisjoint(container.format.name.split(","))
    codec = stream.codec_context.codec.canonical_name
    return (
        # A demuxer can reorder MPEG-2 and MPEG-4 part 2, whose packets tell what kind of picture they hold.
        (untimed and delayed and codec not in ("mpeg4", "mpeg2video", "mpeg1video"))
        or any(packet.pts is None for packet in packets)
        or any(packet.pictures > 1 or (delayed and packet.pictures < 1) for packet in packets)
    )


def _start_again(packets: Sequence[Listed]) -> bool:
    """Whether times repeat or go back, in the order of decoding: files that were put one behind the other, and the end
    of an mpg, whose last two frames may have one time.
    """
    times = [packet.pts for packet in packets if packet.pts is not None and not packet.is_discard]
    order = [packet.dts for packet in packets if packet.dts is not None]
    return len(set(times)) < len(times) or any(after < before for before, after in pairwise(order))


def _times(stream: Any, coming: Sequence[Listed], first: int, trusted: bool) -> np.ndarray:
    """Ascending time stamps of all frames, int64; ClipError if nobody can tell. coming: the packets from the first key
    frame on, which is shown at ``first``. trusted: False if their times are not those of the frames.
    """
    packed = any(packet.pictures > 1 for packet in coming)
    # What is shown before the first key frame cannot be decoded.
    shown = [
        packet.pts
        for packet in coming
        if packet.pts is not None and packet.pts >= first and not packet.is_discard and (packed or packet.pictures)
    ]
    frames = sum(packet.pictures for packet in coming)
    if not trusted or any(packet.pts is None for packet in coming) or (packed and len(shown) < frames):
        # Some files tell the time only now and then: their frames follow each other evenly.
        rate = stream.average_rate or stream.guessed_rate
        if not rate or not stream.time_base:
            raise ClipError("frames without time stamps", codec=stream.codec_context.codec.canonical_name)
        step = 1 / float(rate * stream.time_base)
        steps = np.diff([packet.dts for packet in coming if packet.dts is not None])
        if not trusted and (steps > 0).any():  # of times that start again FFmpeg makes a wrong rate
            step = float(steps[(steps > 0) & (steps < 2 * np.median(steps[steps > 0]))].mean())
        return first + np.round(np.arange(frames) * step).astype(np.int64)
    if packed:
        shown = sorted(shown)[:frames]
    return np.sort(np.asarray(shown, dtype=np.int64))


def _index(path: Path, container: Any, rules: PictureRules) -> OpenVideo:
    streams = _moving(container)
    for stream in streams:
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise ClipError("too large a picture", width=width, height=height, max_pixels=MAX_PIXELS)
    stream, packets = _list(container, streams)
    context = stream.codec_context
    codec = context.codec.canonical_name
    colours = colours_of(context)  # before a frame is decoded: decoders forget what only the container says
    counted = _is_counted(container, stream, packets)
    keys = [
        Key(place, one.pts or 0, one.pts or 0 if one.dts is None else one.dts)
        for place, one in enumerate(packets)
        if one.is_key
    ]
    if not keys:
        raise ClipError("no key frame" if packets else "video without frames")
    first = keys[0]
    coming = packets[first.position :]
    again = not counted and _start_again(coming)
    counted = counted or again
    stamps = _times(stream, coming, first.pts, not again).tolist()
    if not stamps or not stream.time_base:
        raise ClipError("video without frames")
    said = {"several video streams": len(streams) > 1, "times that repeat or go back, made even": again}
    several = [note for note, holds in said.items() if holds]
    tone_map, notes = light_of(colours, rules)
    description = description_of(container, stream)
    rotation, mirrored = _orientation(container, stream, description)
    crop, aspect = crop_of(description), pixel_aspect_of(stream)
    width, height = upright_size((context.width, context.height), crop, aspect, rotation)
    if width * height > MAX_PIXELS:
        raise ClipError("too large a picture", width=width, height=height, max_pixels=MAX_PIXELS)
    facts = VideoFacts(
        codec=codec,
        container=container.format.name,
        width=width,
        height=height,
        rotation=rotation,
        time_base=float(stream.time_base),
        stamps=tuple(stamps),
        mirrored=mirrored,
        crop=crop,
        pixel_aspect=aspect,
        colours=colours,
        tone_map=tone_map,
        if_interlaced=rules.interlaced,
        notes=(*notes, *several, *shape_notes(aspect, crop, mirrored)),
    )
    if _interlaced(container, stream, codec):
        facts = fields_of(facts)
    return OpenVideo(
        path=path,
        container=container,
        stream=stream,
        facts=facts,
        positions={pts: i for i, pts in enumerate(stamps if counted else (packet.pts for packet in packets))},
        sizes=tuple(packet.size for packet in packets),
        keys=tuple(keys) if codec in SEEKABLE_CODECS and not counted else (first,),
        counted=counted,
    )


def _orientation(container: Any, stream: Any, description: str) -> tuple[int, bool]:
    """Turn and flip of the stored pictures, see ``orientation_of``.

    Only frames carry them, and a frame costs more than all packets: so one is decoded only where the description of the
    stream speaks of a display matrix.
    """
    first = None
    if "display matrix" in description:
        container.seek(stream.start_time or 0, stream=stream)
        first = next(container.decode(stream), None)
    return (0, False) if first is None else orientation_of(first)


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
    if video.counted:
        with open_container(video.path) as container:
            packets = container.demux(container.streams[video.stream.index])
            filled = (packet for packet in packets if packet.size or packet.dts is None)
            yield from islice(filled, key.position, None)
        return
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
        # "The last picture again", in AVI; a decoder takes it as the end.
        if not packet.size and packet.dts is not None:
            continue
        if not begun:
            position = video.positions.get(packet.pts, -1)
            if position > key.position:
                return
            begun = position == key.position
            # Where a parser cuts the packets, the first ones after a seek may be torn, or have each other's times.
            if begun and packet.size != video.sizes[position]:
                return
        if begun:
            yield packet
