import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from data_pipeline.errors import ClipError
from data_pipeline.models import video_index
from data_pipeline.models.video_index import close_last, open_video, packets_from, probe
from data_pipeline.models.video_reader import PyAVReader

spec = importlib.util.spec_from_file_location("mining_video_files", Path(__file__).parents[1] / "test_video_files.py")
video_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(video_files)


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "closed.mp4"
    return video_files.encode(path, video_files.numbered(), options=video_files.CLOSED)


def test_key_frames_of_closed_and_open_groups(closed, tmp_path):
    video = open_video(closed)
    assert [key.position for key in video.keys] == [0, 12, 24, 36, 48]
    assert [video.key_of(stamp) for stamp in video.facts.stamps] == [index // 12 for index in range(60)]
    opened = open_video(video_files.encode(tmp_path / "o.mp4", video_files.numbered(), options=video_files.OPEN))
    keys = [opened.facts.stamps.index(key.pts) for key in opened.keys]
    for index, stamp in enumerate(opened.facts.stamps):
        assert opened.key_of(stamp) == max(number for number, key in enumerate(keys) if key <= index)


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_one_file_is_open_at_a_time(closed, tmp_path):
    close_last()
    before = open_files()
    video = open_video(closed)
    assert open_video(closed, video.facts) is video
    assert open_video(closed, replace(video.facts, rotation=90)) is not video
    other = tmp_path / "other.mp4"
    other.write_bytes(closed.read_bytes())
    for path in (closed, other) * 10:
        probe(path)
    assert open_files() == before + 1
    close_last()
    assert open_files() == before


class Container:
    """One that does not go where it is told to."""

    def __init__(self, container, seek):
        self.container, self.asked, self._seek = container, [], seek

    def seek(self, target, stream):
        self.asked.append(target)
        self._seek(self.container, target, stream)

    def demux(self, stream):
        return self.container.demux(stream)


def refuse(container, target, stream):
    raise av.error.PermissionError(1, "cannot seek")


def too_late(container, target, stream):
    container.seek(target + 8 * 1024, stream=stream)


def far_too_late(container, target, stream):
    container.seek(10**9, stream=stream)


def too_early(container, target, stream):
    container.seek(0, stream=stream)


@pytest.mark.parametrize("seek", [refuse, too_late, far_too_late, too_early])
@pytest.mark.parametrize("number", [0, 2])
def test_reading_starts_at_the_key_frame_wherever_a_seek_goes(closed, seek, number):
    video = open_video(closed)
    strange = replace(video, container=Container(video.container, seek))
    packets = list(packets_from(strange, number))
    assert [packet.pts for packet in packets[:-1]] == list(video.positions)[12 * number :]
    assert packets[-1].pts is None
    assert strange.container.asked


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_gif(path):
    video_files.encode(path, video_files.numbered(5), "gif", pix_fmt="rgb8", container="gif")


def write_concat(path):
    video_files.encode(path.with_name("secret.mp4"), video_files.numbered(5))
    path.write_text("ffconcat version 1.0\nfile secret.mp4\n")


def write_playlist(path):
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\nsecret.mp4\n#EXT-X-ENDLIST\n")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b""), "unreadable video"),
        (lambda path: path.write_bytes(b"hello" * 99), "unreadable video"),
        (write_gif, "unreadable video"),
        (write_concat, "unreadable video"),
        (write_playlist, "unreadable video"),
        (write_audio, "no video stream"),
    ],
)
def test_what_is_no_video(tmp_path, write, reason):
    write(tmp_path / "bad.mp4")
    with pytest.raises(ClipError, match=reason):
        probe(tmp_path / "bad.mp4")


def test_a_concat_script_would_read_another_file_if_it_could(tmp_path):
    write_concat(tmp_path / "bad.mp4")
    with av.open(str(tmp_path / "bad.mp4")) as container:
        assert container.format.name == "concat"
        assert next(container.decode(video=0)).width == video_files.WIDTH


def test_a_shorter_file_than_its_header_says(tmp_path, closed):
    path = tmp_path / "cut.mp4"
    front = video_files.remux(closed, tmp_path / "front.mp4", options={"movflags": "faststart"}).read_bytes()
    path.write_bytes(front[: len(front) * 9 // 10])
    with pytest.raises(ClipError, match="frames are missing") as error:
        probe(path)
    assert error.value.evidence["expected"] == 60


def test_a_header_that_was_cut_off(tmp_path, closed):
    content = closed.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: content.index(b"dinf")])
    with pytest.raises(ClipError, match="unknown codec") as error:
        probe(tmp_path / "cut.mp4")
    assert error.value.evidence == {"needed": "a codec that FFmpeg decodes, and a header that is whole"}


def assert_exact(path, numbers):
    """Every frame, in random order and in one go."""
    facts = probe(path)
    assert len(facts.stamps) == len(numbers)
    reader = PyAVReader(path, facts)
    order = np.random.default_rng(0).permutation(len(numbers)).tolist()
    found = {index: video_files.number_of(reader.frames((index,))[0]) for index in order}
    assert [found[index] for index in range(len(numbers))] == numbers
    assert [video_files.number_of(picture) for picture in reader.thumbnails(64, 999)] == numbers
    return facts


AGAIN = "times that repeat or go back, made even"


def test_two_frames_with_the_same_time_stamp_are_counted(closed, tmp_path):
    path = video_files.remux(closed, tmp_path / "twice.mkv", stamps={20: 21})
    facts = assert_exact(path, list(range(60)))
    assert facts.notes == (AGAIN,)
    assert facts.times == pytest.approx([i / 10 for i in range(60)])


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "mpeg1video"])
@pytest.mark.parametrize("kind", ["ts", "mpg"])
def test_files_put_one_behind_the_other(tmp_path, codec, kind):
    options = video_files.CLOSED if codec == "libx264" else video_files.MPEG2
    pictures = video_files.numbered(48)
    parts = [
        video_files.encode(tmp_path / f"{i}.{kind}", part, codec, options, fps=25)
        for i, part in enumerate((pictures[:24], pictures[24:]))
    ]
    path = tmp_path / f"both.{kind}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    facts = assert_exact(path, list(range(48)))
    # H.264 in mpg is counted anyway.
    assert facts.notes == (() if (codec, kind) == ("libx264", "mpg") else (AGAIN,))
    assert facts.times == pytest.approx([i / 25 for i in range(48)])


def test_the_last_two_frames_of_an_mpg_have_one_time(tmp_path):
    options = {"b": "4M", "bf": "2", "g": "12"}
    path = video_files.encode(
        tmp_path / "a.vob", video_files.numbered(24), "mpeg2video", options, fps=30, container="vob"
    )
    facts = assert_exact(path, list(range(24)))
    assert facts.times == pytest.approx([i / 30 for i in range(24)], abs=1e-4)


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "ts", "flv", "wmv"])
@pytest.mark.parametrize("place", [0, 1])
def test_sound_before_and_behind_the_pictures(tmp_path, kind, place):
    codec, options = ("wmv2", video_files.SIMPLE) if kind == "wmv" else ("libx264", video_files.CLOSED)
    path = video_files.encode(tmp_path / f"a.{kind}", video_files.numbered(24), codec, options, sound=place)
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams][place] == "audio"
    assert_exact(path, list(range(24)))


def test_a_frame_without_a_time_stamp_follows_evenly(closed, monkeypatch):
    class Stampless(Container):
        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, stream):
            for packet in self.container.demux(stream):
                if packet.size and packet.pts == 1024 * 7:
                    packet.pts = None
                yield packet

    original = video_index.open_container
    monkeypatch.setattr(video_index, "open_container", lambda path: Stampless(original(path), None))
    assert probe(closed).stamps == tuple(1024 * i for i in range(60))


def test_frames_without_time_stamps_or_a_rate():
    codec = SimpleNamespace(codec=SimpleNamespace(canonical_name="h264"))
    stream = SimpleNamespace(average_rate=None, guessed_rate=None, time_base=None, codec_context=codec)
    with pytest.raises(ClipError, match="frames without time stamps"):
        video_index._times(stream, [video_index.Listed(None, None, True, False, 9, 1)], 0, trusted=True)


def test_a_video_without_a_key_frame(closed, tmp_path):
    path = video_files.remux(closed, tmp_path / "nokey.mkv", drop={0, *range(12, 60)})
    with pytest.raises(ClipError, match="no key frame"):
        probe(path)


def test_pictures_that_are_too_large(closed, monkeypatch):
    monkeypatch.setattr(video_index, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(ClipError, match="too large a picture") as error:
        probe(closed)
    assert error.value.evidence == {"width": 96, "height": 64, "max_pixels": 6143}


@pytest.mark.parametrize("name", ["concat:a|b.mp4", "50%03d.mp4", "a b\n'\"🎈é.mp4", os.fsdecode(b"\xff\xfe.mp4")])
def test_names_are_only_names(closed, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(closed.read_bytes())
    assert len(probe(Path(name)).stamps) == 60


def test_hidden_frames_of_vp8_have_no_number(tmp_path):
    plain = video_files.encode(tmp_path / "plain.webm", video_files.numbered(30), "libvpx", {"g": "10"})
    path = tmp_path / "hidden.webm"
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            content, pts = bytes(packet), packet.pts
            packet.stream = stream
            new.mux(packet)
            if number == 14:
                again = av.Packet(bytes([content[0] & ~video_index.SHOW_FRAME]) + content[1:])
                again.pts = again.dts = pts + 1
                again.time_base, again.stream = packet.time_base, stream
                new.mux(again)
    facts = probe(path)
    assert len(facts.stamps) == 30
    assert [video_files.number_of(picture) for picture in PyAVReader(path, facts).frames((14, 15, 29))] == [14, 15, 29]
