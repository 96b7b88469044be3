"""Video files for tests: frames that carry their number, in many codecs and containers, and files that are damaged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BITS = 8
WIDTH, HEIGHT = 96, 64
FRAMES = 60
FPS = 10


def numbered(frames: int = FRAMES, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Pictures (frames, height, width, 3) with the frame's own number as eight bars, and below them a red patch on the
    left and a blue one on the right, which tell which way is up."""
    pictures = np.empty((frames, height, width, 3), dtype=np.uint8)
    edges = np.linspace(0, width, BITS + 1).round().astype(int)
    for number in range(frames):
        for bit in range(BITS):
            pictures[number, :, edges[bit] : edges[bit + 1]] = 225 if number >> bit & 1 else 30
    low = height * 5 // 8
    pictures[:, low:] = 128
    pictures[:, low:, : width // 3] = (200, 30, 30)
    pictures[:, low:, -(width // 3) :] = (30, 30, 200)
    return pictures


def number_of(picture: np.ndarray) -> int:
    """The number that such a picture shows, whatever its size; -1 if it is not upright."""
    height, width = picture.shape[:2]
    low = height * 13 // 16
    left, right = picture[low, width // 6].astype(int), picture[low, -(width // 6) - 1].astype(int)
    if not (left[0] > left[2] + 60 and right[2] > right[0] + 60):
        return -1
    places = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    return sum(1 << bit for bit, x in enumerate(places) if picture[height // 8 : height // 2, x].mean() > 128)


def as_stored(pictures: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The pictures (frames, height, width, 3) that this display matrix turns into these, found pixel by pixel."""
    a, b, c, d = matrix
    height, width = pictures.shape[1:3] if a else pictures.shape[2:0:-1]
    y, x = np.mgrid[:height, :width]
    across, down = a * x + c * y, b * x + d * y
    return pictures[:, down - down.min(), across - across.min()]


@contextmanager
def own_scheduling() -> Iterator[None]:
    """Puts this thread's scheduling back: SVT-AV1 leaves whoever opens it at real-time priority, where it may."""
    kept = [os.sched_getscheduler(0), os.sched_getparam(0)] if hasattr(os, "sched_getscheduler") else None
    try:
        yield
    finally:
        if kept:
            os.sched_setscheduler(0, *kept)


@own_scheduling()
def encode(
    path: Path,
    pictures: np.ndarray,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    fps: int = FPS,
    stamps: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    container: str | None = None,
    rotation: int = 0,
    matrix: tuple[int, int, int, int] | None = None,
    pixel_aspect: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    colours: dict[str, int] | None = None,
    tags: dict[str, int] | None = None,
    sound: int | None = None,
) -> Path:
    """pictures: uint8, or uint16 of full range. stamps: in units of 1 / fps. rotation: degrees anticlockwise by which
    players turn the stored pictures, which are turned the other way here, so that they come out upright. matrix: the
    same as a, b, c, d of a display matrix, x' = a x + c y and y' = b x + d y, each -1, 0 or 1. pixel_aspect: width of a
    pixel over its height. colours: dst_colorspace and dst_color_range of the conversion from RGB. tags: what the stream
    says about its colours, attributes of a codec context. sound: where a silent sound track stands, 0 before the video
    or 1 behind it."""
    pictures = np.rot90(pictures, -(rotation // 90), axes=(1, 2))
    if matrix is not None:
        pictures = as_stored(pictures, matrix)
    with av.open(str(path), "w", format=container, options=container_options or {}) as file:
        silence = file.add_stream("aac", rate=16000) if sound == 0 else None
        stream = file.add_stream(codec, rate=fps)
        silence = file.add_stream("aac", rate=16000) if sound else silence
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], pix_fmt
        stream.options = options or {}
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            a, b, c, d = (value << 16 for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        rgb = "rgb24" if pictures.dtype == np.uint8 else "rgb48le"
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=rgb)
            if colours is not None:
                frame = frame.reformat(format=pix_fmt, threads=1, **colours)
                frame.colorspace = (tags or {}).get("colorspace", 2)
            frame.pts, frame.time_base = (i if stamps is None else stamps[i]), Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if silence is not None:
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            noise.sample_rate = 16000
            file.mux(silence.encode(noise))
            file.mux(silence.encode())
    return path


def encode_colour(
    path: Path,
    signal: tuple[int, int, int],
    *,
    codec: str = "libx264",
    matrix: int = 1,
    tags: dict[str, int] | None = None,
    size: tuple[int, int] = (96, 64),
    pix_fmt: str = "yuv420p",
    frames: int = 6,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip of one colour. signal: RGB, 16 bit full range, what a converter with ``matrix`` (H.273) has to give.
    tags: what the stream says about its colours, attributes of a codec context; without them nothing."""
    pictures = np.empty((frames, size[1], size[0], 3), dtype=np.uint16)
    pictures[:] = signal
    options = options or ({"preset": "ultrafast"} if codec == "libx264" else {})
    return encode(path, pictures, codec, options, pix_fmt=pix_fmt, colours={"dst_colorspace": matrix}, tags=tags)


def tag_container(source: Path, path: Path, tags: dict[str, int]) -> Path:
    """The same packets in a file whose container says these things about colours, and the codec nothing."""
    options = {"movflags": "+write_colr"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options) as new:
        origin = old.streams.video[0]
        stream = new.add_stream_from_template(origin)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for packet in old.demux(origin):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return path


def remux(
    source: Path,
    path: Path,
    *,
    shift: float = 0.0,
    drop: Iterable[int] = (),
    stamps: dict[int, int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """The same packets in another file: shifted by seconds, without some (numbers in the order of decoding), or with
    other presentation time stamps (number -> number of the packet whose stamp it takes)."""
    drop, stamps = set(drop), stamps or {}
    with av.open(str(source)) as old, av.open(str(path), "w", options=options or {}) as new:
        origin = old.streams.video[0]
        stream = new.add_stream_from_template(origin)
        packets = [packet for packet in old.demux(origin) if packet.size]
        times = [(packet.pts, packet.dts) for packet in packets]
        move = round(shift / origin.time_base)
        for i, packet in enumerate(packets):
            if i in drop:
                continue
            packet.pts, packet.dts = times[stamps.get(i, i)][0] + move, times[i][1] + move
            packet.stream = stream
            new.mux(packet)
    return path


def add_mp4_box(source: Path, path: Path, box: bytes, kind: bytes = b"avc1") -> Path:
    """The same file with one more box in the description of its first track's pictures (``kind``)."""
    data, start, end, places = source.read_bytes(), 0, source.stat().st_size, []
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", kind):
        while data[start + 4 : start + 8] != name:
            start += int.from_bytes(data[start : start + 4], "big")
            assert start < end, name
        places.append(start)
        end = start + int.from_bytes(data[start : start + 4], "big")
        start += 16 if name == b"stsd" else 8
    made = bytearray(data[:end] + box + data[end:])  # the pictures lie before, so that no place of theirs changes
    for place in places:
        size = int.from_bytes(made[place : place + 4], "big") + len(box)
        made[place : place + 4] = size.to_bytes(4, "big")
    path.write_bytes(bytes(made))
    return path


def clap(width: int, height: int, right: int, down: int) -> bytes:
    """QuickTime's "clean aperture" of this size, its middle moved by so many pixels."""
    values = (width, 1, height, 1, right, 1, down, 1)
    return (40).to_bytes(4, "big") + b"clap" + b"".join(value.to_bytes(4, "big", signed=True) for value in values)


def crop_matroska(source: Path, path: Path, left: int, top: int, right: int, bottom: int) -> Path:
    """The same mkv, which asks players to cut off so many pixels."""
    data = bytearray(source.read_bytes())

    def size_of(place: int) -> tuple[int, int]:
        count = 9 - data[place].bit_length()
        return int.from_bytes(data[place : place + count], "big") - (1 << 7 * count), count

    def resize(place: int, by: int) -> None:
        value, count = size_of(place)
        data[place : place + count] = (value + by + (1 << 7 * count)).to_bytes(count, "big")

    crop = b"".join(
        bytes([0x54, name, 0x81, value]) for name, value in ((0xAA, bottom), (0xBB, top), (0xCC, left), (0xDD, right))
    )

    def child(name: bytes, place: int) -> int:
        """Where the first element of this name begins, among those that stand in a row from ``place`` on."""
        while not data.startswith(name, place):
            size = place + 9 - data[place].bit_length()  # an element's name is as long as a size that begins like it
            place = size + sum(size_of(size))
        return place

    segment = child(b"\x18\x53\x80\x67", 0) + 4
    void = child(b"\xec", segment + size_of(segment)[1])  # empty room after the table of contents
    tracks = child(b"\x16\x54\xae\x6b", void)
    entry = child(b"\xae", tracks + 4 + size_of(tracks + 4)[1])
    video = child(b"\xe0", entry + 1 + size_of(entry + 1)[1])
    end = video + 1 + sum(size_of(video + 1))
    data[end:end] = crop
    for place in (video + 1, entry + 1, tracks + 4):
        resize(place, len(crop))
    after = void + 1 + size_of(void + 1)[1]
    resize(void + 1, -len(crop))
    del data[after : after + len(crop)]
    path.write_bytes(bytes(data))
    return path


def encode_streams(path: Path, streams: Sequence[dict[str, Any]]) -> Path:
    """A file of several video streams. Each: pictures, codec, options, pix_fmt, disposition."""
    with av.open(str(path), "w") as file:
        made = []
        for how in streams:
            stream = file.add_stream(how.get("codec", "libx264"), rate=FPS)
            stream.height, stream.width = how["pictures"].shape[1:3]
            stream.pix_fmt, stream.options = how.get("pix_fmt", "yuv420p"), how.get("options", {})
            stream.codec_context.thread_count = 1
            if "disposition" in how:
                stream.disposition = how["disposition"]
            made.append(stream)
        for stream, how in zip(made, streams, strict=True):
            for i, picture in enumerate(how["pictures"]):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, FPS)
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    return path


def is_b_frame(packet: bytes) -> bool:
    """Whether a packet of MPEG-4 part 2 holds a picture drawn from an earlier and a later one."""
    place = packet.index(b"\x00\x00\x01\xb6")
    return packet[place + 4] >> 6 == 2


def not_coded(packet: bytes, clock: int) -> bytes:
    """The picture of MPEG-4 part 2 that says "nothing new" in place of a packet's. clock: bits of its time."""
    place = packet.index(b"\x00\x00\x01\xb6") + 4
    bits = "".join(f"{byte:08b}" for byte in packet[place : place + 16])
    seconds = bits.index("0", 2)
    head = "01" + bits[2 : seconds + 2 + clock] + "1" + "0"
    head += "0" + "1" * (-(len(head) + 1) % 8)
    return packet[place - 4 : place] + int(head, 2).to_bytes(len(head) // 8, "big")


def repack(source: Path, path: Path, change: Any) -> Path:
    """The packets of an avi as ``change`` makes them of the list of the old ones, one per tick of the clock."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        origin = old.streams.video[0]
        stream = new.add_stream_from_template(origin)
        packets = [packet for packet in old.demux(origin) if packet.size]
        keys = {bytes(packet) for packet in packets if packet.is_keyframe}
        for number, data in enumerate(change([bytes(packet) for packet in packets])):
            packet = av.Packet(data)
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, FPS), stream
            packet.is_keyframe = any(data.startswith(key[:40]) for key in keys)
            new.mux(packet)
    return path


def packed(packets: Sequence[bytes]) -> list[bytes]:
    """As DivX and XviD write B-frames into avi: the first one of a row goes into the packet of the picture before, and
    a picture that is not coded takes the place of the last one."""
    made: list[bytes] = []
    owed = b""
    for number, packet in enumerate(packets):
        after = packets[number + 1] if number + 1 < len(packets) else b""
        if not is_b_frame(packet):
            if after and is_b_frame(after):
                made.append(packet + after)
                owed = not_coded(packet, 4)
            else:
                made.append(packet)
        else:
            if is_b_frame(packets[number - 1]):
                made.append(packet)
            if not after or not is_b_frame(after):
                made.append(owed)
    return [packet.replace(b"Lavc62.28.102", b"DivX503b1393p") for packet in made]


def x264(params: str) -> dict[str, str]:
    """Options of libx264 for one thread."""
    return {"x264-params": f"threads=1:scenecut=0:{params}", "preset": "veryfast"}


CLOSED = x264("keyint=12:bframes=3:b-adapt=0")
OPEN = x264("open-gop=1:keyint=12:bframes=3:b-adapt=0")
LONG = x264("keyint=250:bframes=3")
QUIET_X265 = {"x265-params": "pools=none:frame-threads=1:log-level=none", "preset": "ultrafast"}
X265 = {"x265-params": "keyint=12:bframes=3:pools=none:frame-threads=1:log-level=none", "preset": "ultrafast"}
VP9 = {"g": "20", "deadline": "realtime", "cpu-used": "8"}
AV1 = {"g": "12", "preset": "12", "svtav1-params": "lp=1"}
MPEG2 = {"b": "4M", "bf": "2", "g": "12"}
SIMPLE = {"b": "2M", "g": "12"}
UNEVEN = np.cumsum([0, *np.random.default_rng(0).integers(1, 5, FRAMES - 1)]).tolist()


def noisy(pictures: np.ndarray) -> np.ndarray:
    """With noise between the patches: encoders then use more of what their format offers."""
    noise = np.random.default_rng(0).integers(0, 255, pictures.shape, dtype=np.uint8)
    pictures = pictures.copy()
    width = pictures.shape[2]
    middle = slice(width // 3, width - width // 3)
    low = pictures.shape[1] * 5 // 8
    pictures[:, low:, middle] = noise[:, low:, middle]
    return pictures


ENCODED: dict[str, dict[str, Any]] = {
    "closed.mp4": {"options": CLOSED},
    "open.mp4": {"options": OPEN},
    "long.mp4": {"options": LONG},
    "closed.mkv": {"options": CLOSED},
    "open.mkv": {"options": OPEN},
    "closed.mov": {"options": CLOSED},
    "fragments.mp4": {"options": OPEN, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "refresh.mp4": {"options": x264("intra-refresh=1:keyint=12:bframes=0")},
    "bframes.avi": {"options": CLOSED},
    "plain.avi": {"options": x264("keyint=12:bframes=0")},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "closed.ts": {"options": CLOSED, "container": "mpegts"},
    "open.ts": {"options": OPEN, "container": "mpegts"},
    "closed.flv": {"options": CLOSED},
    "ten_bits.mp4": {"options": CLOSED, "pix_fmt": "yuv420p10le"},
    "full_colour.mp4": {"options": CLOSED, "pix_fmt": "yuv444p"},
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc.mkv": {"codec": "libx265", "options": X265, "pix_fmt": "yuv420p10le"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": VP9},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": VP9},
    "alpha.webm": {"codec": "libvpx-vp9", "options": {**VP9, "auto-alt-ref": "0"}, "pix_fmt": "yuva420p"},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "16"}},
    "av1.mp4": {"codec": "libsvtav1", "options": AV1},
    "av1.webm": {"codec": "libsvtav1", "options": AV1},
    "uneven.mp4": {"options": CLOSED, "stamps": UNEVEN},
    "uneven.webm": {"codec": "libvpx-vp9", "options": VP9, "stamps": UNEVEN},
    "turned_90.mp4": {"options": CLOSED, "rotation": 90},
    "turned_180.mp4": {"options": CLOSED, "rotation": 180},
    "turned_270.mp4": {"options": CLOSED, "rotation": 270},
    "turned_90.mkv": {"options": CLOSED, "rotation": 90},
    "closed.mts": {"options": CLOSED, "container": "mpegts"},
    "open.m2ts": {"options": OPEN, "container": "mpegts", "container_options": {"mpegts_m2ts_mode": "1"}},
    "hevc.ts": {"codec": "libx265", "options": X265},
    "mpeg2.ts": {"codec": "mpeg2video", "options": MPEG2, "fps": 25},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": MPEG2, "fps": 25},
    "mpeg2.mpeg": {"codec": "mpeg2video", "options": MPEG2, "fps": 25, "container": "vob"},
    "mpeg1.mpg": {"codec": "mpeg1video", "options": MPEG2, "fps": 25},
    "bare.mpg": {"codec": "mpeg1video", "options": MPEG2, "fps": 25, "container": "mpeg1video"},
    "h264.mpg": {"options": CLOSED},
    "wmv1.wmv": {"codec": "wmv1", "options": SIMPLE},
    "wmv2.wmv": {"codec": "wmv2", "options": SIMPLE},
    "h264.wmv": {"options": OPEN},
    "flv1.flv": {"codec": "flv", "options": SIMPLE},
    "h264.3gp": {"options": CLOSED},
    "mpeg4.3gp": {"codec": "mpeg4", "options": SIMPLE},
    "mpeg4.mkv": {"codec": "mpeg4", "options": {**SIMPLE, "bf": "2"}},
    "mpeg4.ts": {"codec": "mpeg4", "options": {**SIMPLE, "bf": "2"}},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
}
SHIFTED = {
    "late.mp4": ("closed.mp4", {"shift": 2.0}),
    "late.mkv": ("open.mp4", {"shift": 2.0}),
    "edited.mp4": ("closed.mp4", {"shift": -0.7, "options": {"avoid_negative_ts": "disabled"}}),
    "headless.mkv": ("closed.mp4", {"drop": range(5)}),
    "headless.ts": ("open.ts", {"drop": range(5)}),
}


# MPEG-4 with one, two and three B-frames in a row.
PACKED = ("packed_1.avi", "packed_2.avi", "packed_3.avi")
# The frame of the original pictures that is the first to be seen: an edit list cuts some away, and what comes before
# the first key frame cannot be decoded.
FIRST = {"edited.mp4": 7, "headless.mkv": 12, "headless.ts": 12}


def write_all(folder: Path) -> dict[str, Path]:
    """Writes every kind of readable file; names -> paths."""
    pictures = noisy(numbered())
    paths = {name: encode(folder / name, pictures, **settings) for name, settings in ENCODED.items()}
    paths |= {name: remux(paths[origin], folder / name, **how) for name, (origin, how) in SHIFTED.items()}
    for rows, name in enumerate(PACKED, 1):
        options = {"b": "2M", "g": "12", "bf": str(rows), "b_strategy": "0"}
        plain = encode(folder / "plain_mpeg4.avi", pictures, codec="mpeg4", options=options)
        paths[name] = repack(plain, folder / name, packed)
    return paths


@pytest.mark.parametrize(("width", "height"), [(96, 64), (97, 63), (64, 64), (320, 180)])
def test_a_picture_shows_its_number_and_which_way_is_up(width, height):
    pictures = numbered(256, width, height)
    assert [number_of(picture) for picture in pictures] == list(range(256))
    for turns in (1, 2, 3):
        assert number_of(np.rot90(pictures[77], turns)) == -1
    assert number_of(pictures[77, :, ::-1]) == -1


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="there are no scheduling policies here")
@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_encoding_leaves_this_process_its_place_among_others(tmp_path, codec):
    before = os.sched_getscheduler(0)
    encode(tmp_path / "a.mkv", numbered(2), codec, AV1 if codec == "libsvtav1" else CLOSED)
    assert os.sched_getscheduler(0) == before


def test_packets_in_another_file(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(24), options=CLOSED)
    with av.open(str(remux(path, tmp_path / "b.mkv", shift=1.0, drop=[3]))) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    assert len(packets) == 23
    assert min(packet.pts for packet in packets) == 1000
