import importlib.util
import sys

import av
import numpy as np
import pytest

from data_pipeline.models import video_reader
from data_pipeline.models.video_reader import choose_reader, decord_agrees, is_safe_for_decord, open_reader, probe
from data_pipeline.records import ClipError, SettingsError

BITS = 8
needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")


def numbered(frames, size=64):
    """Frames that show their own number as a bar code of eight bits."""
    pictures = np.full((frames, size, size, 3), 128, dtype=np.uint8)
    for number in range(frames):
        for bit in range(BITS):
            pictures[number, :, bit * 8 : bit * 8 + 8] = 230 if number >> bit & 1 else 20
    return pictures


def number_of(picture):
    width = picture.shape[1] // BITS
    return sum(1 << bit for bit in range(BITS) if picture[:, bit * width + width // 2].mean() > 128)


def encode(path, pictures, codec="libx264", options=None, fps=8, stamps=None):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], "yuv420p"
        stream.options = options or {}
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if stamps is not None:
                frame.pts = stamps[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


CLOSED = {"x264-params": "keyint=20:bframes=3:scenecut=0"}
OPEN = {"x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0"}
FILES = {
    "closed.mp4": ("libx264", CLOSED),
    "open.mp4": ("libx264", OPEN),
    "closed.mkv": ("libx264", CLOSED),
    "vp9.webm": ("libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "old.avi": ("mpeg4", {"g": "12"}),
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: encode(folder / name, numbered(100), codec, options) for name, (codec, options) in FILES.items()}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_every_frame_is_the_one_that_was_asked_for(videos, name, reader):
    facts = probe(videos[name])
    assert len(facts.stamps) == 100
    opened = open_reader(choose_reader(reader, videos[name], facts), videos[name], facts)
    rng = np.random.default_rng(0)
    for pair in np.sort(rng.choice(100, (8, 2), replace=False), axis=1):
        wanted = tuple(int(index) for index in pair)
        assert tuple(number_of(picture) for picture in opened.frames(wanted)) == wanted
    thumbnails = opened.thumbnails(32, 50)
    assert thumbnails.shape == (50, 32, 32, 3)
    assert [number_of(picture) for picture in thumbnails] == list(range(50))


@needs_decord
def test_auto_gives_decord_only_what_decord_reads_right(videos):
    chosen = {name: choose_reader("auto", path, probe(path)) for name, path in videos.items()}
    assert chosen["closed.mp4"] == "decord"
    assert chosen["open.mp4"] == "pyav"


def test_an_explicit_reader_is_not_second_guessed(videos):
    assert choose_reader("decord", videos["open.mp4"], probe(videos["open.mp4"])) == "decord"


@needs_decord
def test_auto_takes_pyav_where_the_time_stamps_disagree(videos):
    facts = probe(videos["closed.mp4"])
    fewer = type(facts)(**{**vars(facts), "stamps": facts.stamps[:-1]})
    shifted = type(facts)(**{**vars(facts), "stamps": (*facts.stamps[:-1], facts.stamps[-1] + facts.stamps[1])})
    assert decord_agrees(videos["closed.mp4"], facts)
    assert not decord_agrees(videos["closed.mp4"], fewer)
    assert not decord_agrees(videos["closed.mp4"], shifted)


@pytest.mark.parametrize(
    "change", [{"codec": "hevc"}, {"codec": "av1"}, {"container": "mpegts"}, {"rotation": 90}, {"open_groups": True}]
)
def test_unsafe_kinds_of_files(videos, change):
    facts = probe(videos["closed.mp4"])
    assert is_safe_for_decord(facts)
    assert not is_safe_for_decord(type(facts)(**{**vars(facts), **change}))


def test_frames_of_uneven_length(tmp_path):
    stamps = np.cumsum([0, *np.random.default_rng(0).integers(1, 5, 39)])
    path = encode(tmp_path / "uneven.mp4", numbered(40), fps=24, stamps=[int(stamp) for stamp in stamps])
    facts = probe(path)
    assert np.allclose(facts.times, stamps / 24, atol=1e-3)
    assert [number_of(picture) for picture in open_reader("pyav", path, facts).frames((7, 31))] == [7, 31]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "unreadable video"), (b"hello" * 99, "unreadable video"), ("audio", "no video stream")],
)
def test_what_is_no_video(tmp_path, content, reason):
    path = tmp_path / "bad.mp4"
    if content == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        path.write_bytes(content)
    with pytest.raises(ClipError, match=reason):
        probe(path)


@pytest.mark.parametrize("reader", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_frames_that_the_file_lacks(videos, reader):
    facts = probe(videos["closed.mp4"])
    step = facts.stamps[1]
    more = type(facts)(**{**vars(facts), "stamps": (*facts.stamps, facts.stamps[-1] + step)})
    opened = open_reader(reader, videos["closed.mp4"], more)
    with pytest.raises(ClipError, match="frames are missing"):
        opened.thumbnails(16, 200)
    with pytest.raises(ClipError, match="frames are missing"):
        opened.frames((3, 100))


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_an_error_or_a_frame_but_no_crash(videos, tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = bytearray(videos["closed.mp4"].read_bytes())
    for place in rng.integers(0, len(content), 60):
        content[place] = rng.integers(256)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(bytes(content[: len(content) // 2]) if seed % 2 else bytes(content))
    try:
        facts = probe(path)
        opened = open_reader(choose_reader("auto", path, facts), path, facts)
        assert opened.thumbnails(16, 200).shape[1:] == (16, 16, 3)
        assert len(opened.frames((2, len(facts.stamps) - 2))) == 2
    except ClipError as error:
        assert error.reason


def test_a_missing_decord_is_said(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    facts = probe(videos["closed.mp4"])
    with pytest.raises(SettingsError, match="'decord' is not installed .* use --reader pyav"):
        open_reader("decord", videos["closed.mp4"], facts)
    assert choose_reader("auto", videos["closed.mp4"], facts) == "pyav"


def test_a_rotation_tag_turns_the_picture(videos, monkeypatch):
    facts = probe(videos["closed.mp4"])
    turned = type(facts)(**{**vars(facts), "rotation": 90})
    [upright], [picture] = (open_reader("pyav", videos["closed.mp4"], known).frames((5,)) for known in (facts, turned))
    assert np.array_equal(picture, np.rot90(upright))


def test_after_a_seek_that_lands_too_late_reading_starts_earlier(videos, monkeypatch):
    facts = probe(videos["open.mp4"])
    starts = []

    class Late(video_reader.PyAVReader):
        def _decode(self, container):
            frames = super()._decode(container)
            starts.append(1)
            if len(starts) == 1:  # pretend that the first seek came out behind the wanted frame
                frames = (frame for frame in frames if frame.pts > facts.stamps[50])
            return frames

    [picture] = Late(videos["open.mp4"], facts).frames((50,))
    assert number_of(picture) == 50
    assert len(starts) == 2
