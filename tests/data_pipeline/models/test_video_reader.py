import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.errors import ClipError, SettingsError
from data_pipeline.models import video_reader
from data_pipeline.models.video_reader import DecordReader, PyAVReader, choose_reader, open_reader, probe

spec = importlib.util.spec_from_file_location("mining_video_files", Path(__file__).parents[1] / "test_video_files.py")
video_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(video_files)
number_of, FRAMES = video_files.number_of, video_files.FRAMES
NAMES = [*video_files.ENCODED, *video_files.SHIFTED, *video_files.PACKED]
needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return video_files.write_all(tmp_path_factory.mktemp("videos"))


@pytest.mark.parametrize("name", NAMES)
def test_every_frame_is_the_one_that_was_asked_for(videos, name):
    path, first = videos[name], video_files.FIRST.get(name, 0)
    facts = probe(path)
    assert len(facts.stamps) == FRAMES - first
    assert (facts.width, facts.height) == (video_files.WIDTH, video_files.HEIGHT)
    reader = open_reader(choose_reader("auto", path, facts), path, facts)
    order = np.random.default_rng(0).permutation(len(facts.stamps)).tolist()
    single = {index: reader.frames((index,))[0] for index in order}
    assert {index: number_of(picture) for index, picture in single.items()} == {i: i + first for i in order}
    for pair in ((len(order) // 4, len(order) * 3 // 4), (7, 3), (5, 5)):
        assert [number_of(picture) for picture in reader.frames(pair)] == [index + first for index in pair]
    thumbnails = reader.thumbnails(64, 50)
    assert (thumbnails.shape, thumbnails.dtype) == ((min(50, len(order)), 64, 64, 3), np.uint8)
    assert [number_of(picture) for picture in thumbnails] == list(range(first, first + len(thumbnails)))
    # These were decoded from the beginning, none left out, and kept: the same pixels as those that were sought.
    kept = reader.frames(tuple(range(len(thumbnails))))
    assert all(np.array_equal(picture, single[index]) for index, picture in enumerate(kept))


@pytest.mark.parametrize("name", NAMES)
def test_times_are_seconds_after_the_first_frame(videos, name):
    rate = video_files.ENCODED.get(name, {}).get("fps", video_files.FPS)
    shown = np.asarray(video_files.UNEVEN if name.startswith("uneven") else range(FRAMES)) / rate
    shown = shown[video_files.FIRST.get(name, 0) :]
    # Matroska's clock has milliseconds.
    np.testing.assert_allclose(probe(videos[name]).times, shown - shown[0], atol=1.01e-3)


# The table of docs/mining_measurements.md, section Reading.
WRONG_IN_DECORD = [
    "open.mp4",
    "open.mkv",
    "fragments.mp4",
    "refresh.mp4",
    "hevc.mp4",
    "hevc.mkv",
    "turned_90.mkv",
    "bframes.avi",
    "plain.avi",
    "mpeg4.avi",
    "closed.ts",
    "open.ts",
]
RIGHT_IN_DECORD = [
    "closed.mp4",
    "closed.mov",
    "closed.mkv",
    "closed.flv",
    "ten_bits.mp4",
    "full_colour.mp4",
    "vp8.webm",
    "vp9.webm",
    "vp9.mp4",
    "alpha.webm",
    "mjpeg.avi",
    "uneven.mp4",
    "uneven.webm",
    "late.mp4",
    "turned_90.mp4",
    "turned_180.mp4",
    "turned_270.mp4",
]


def read_wrongly_by_decord(path):
    reader = DecordReader(path, probe(path))
    order = np.random.default_rng(0).permutation(FRAMES).tolist()
    return [index for index in order if number_of(reader._batch(reader.video, [index])[0]) != index]


@needs_decord
@pytest.mark.parametrize("name", WRONG_IN_DECORD)
def test_why_auto_does_not_take_decord(videos, name):
    assert choose_reader("auto", videos[name], probe(videos[name])) == "pyav"
    wrong = read_wrongly_by_decord(videos[name])
    assert len(wrong) > 5, "decord reads this right by now: docs/mining_measurements.md says otherwise"


@needs_decord
@pytest.mark.parametrize("name", RIGHT_IN_DECORD)
def test_where_decord_is_right(videos, name):
    assert read_wrongly_by_decord(videos[name]) == []


@needs_decord
@pytest.mark.parametrize("name", ["edited.mp4", "headless.mkv", "headless.ts"])
def test_decord_counts_frames_that_are_not_shown(videos, name):
    with pytest.raises(ClipError, match="frames are missing"):
        open_reader("decord", videos[name], probe(videos[name])).frames((0,))


@needs_decord
def test_decord_cannot_open_av1(videos):
    with pytest.raises(ClipError, match="unreadable video"):
        open_reader("decord", videos["av1.mp4"], probe(videos["av1.mp4"])).frames((0,))


@needs_decord
@pytest.mark.parametrize("name", ["closed.mp4", "turned_90.mp4"])
def test_decord_gives_the_same_pixels_where_it_is_right(videos, name):
    facts = probe(videos[name])
    wanted = (41, 14)
    pairs = zip(
        *(open_reader(reader, videos[name], facts).frames(wanted) for reader in ("decord", "pyav")), strict=True
    )
    assert all(np.array_equal(first, second) for first, second in pairs)
    [thumbnail] = open_reader("decord", videos[name], facts).thumbnails(64, 1)
    assert number_of(thumbnail) == 0


def test_an_explicit_reader_is_not_second_guessed(videos):
    assert choose_reader("decord", videos["open.mp4"], probe(videos["open.mp4"])) == "decord"


def test_after_a_key_frame_that_is_no_whole_picture_reading_starts_earlier(videos, monkeypatch):
    # Pictures are refreshed column by column over twelve frames: "key frames" mark where that begins.
    starts = []
    original = video_reader.packets_from
    monkeypatch.setattr(
        video_reader, "packets_from", lambda video, number: starts.append(number) or original(video, number)
    )
    facts = probe(videos["refresh.mp4"])
    index = facts.stamps.index(video_reader.open_video(videos["refresh.mp4"], facts).keys[3].pts)
    assert number_of(PyAVReader(videos["refresh.mp4"], facts).frames((index + 1,))[0]) == index + 1
    assert starts == [3, 3, 2]  # the second time nothing was left out


@pytest.mark.parametrize("broken", [3, 5])
def test_a_decoder_that_gives_up_is_given_an_earlier_start(videos, monkeypatch, broken):
    facts = probe(videos["closed.mp4"])
    original, starts = video_reader.packets_from, []

    def packets(video, number):
        starts.append(number)
        if number > 4 - broken:
            raise av.error.InvalidDataError(1, "no reference picture")
        return original(video, number)

    monkeypatch.setattr(video_reader, "packets_from", packets)
    reader = PyAVReader(videos["closed.mp4"], facts)
    if broken == 5:
        with pytest.raises(ClipError, match="undecodable video"):
            reader.frames((50,))
        with pytest.raises(ClipError, match="undecodable video"):
            reader.thumbnails(16, 60)
    else:
        assert number_of(reader.frames((50,))[0]) == 50
    assert starts[:4] == [4, 4, 3, 1]


def test_pictures_that_no_other_one_needs_are_not_decoded(videos, monkeypatch):
    facts = probe(videos["long.mp4"])
    decoded = []

    class Counting(PyAVReader):
        def _decode(self, video, number, wanted, leave_out):
            assert leave_out
            for packet in video_reader.packets_from(video, number):
                packet.stream.codec_context.skip_frame = "NONREF"
                decoded.extend(packet.decode())
            yield from super()._decode(video, number, wanted, leave_out)

    assert number_of(Counting(videos["long.mp4"], facts).frames((50,))[0]) == 50
    assert len(decoded) < 0.7 * FRAMES


@pytest.mark.parametrize("reader", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_frames_that_the_file_lacks(videos, reader):
    facts = probe(videos["closed.mp4"])
    step = facts.stamps[1]
    more = replace(facts, stamps=(*facts.stamps, facts.stamps[-1] + step))
    opened = open_reader(reader, videos["closed.mp4"], more)
    with pytest.raises(ClipError, match="frames are missing"):
        opened.thumbnails(16, 200)
    with pytest.raises(ClipError, match="frames are missing"):
        opened.frames((3, FRAMES))


CUT = ["mpeg4.avi", "bframes.avi", "mjpeg.avi", "closed.flv", "wmv2.wmv", "mpeg2.mpg", "mpeg2.mpeg", "mpeg1.mpg"]


@pytest.mark.parametrize("name", [*CUT, "closed.ts", "open.m2ts", "hevc.ts", "closed.mkv", "vp9.webm"])
@pytest.mark.parametrize("share", [0.5, 0.73])
def test_a_file_that_was_cut_off_is_used_as_far_as_it_goes(videos, tmp_path, name, share, monkeypatch):
    content = videos[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(share * len(content))])
    facts = probe(path)
    thumbnails = (reader := PyAVReader(path, facts)).thumbnails(64, 999)
    count = len(thumbnails)
    assert 8 < count <= len(facts.stamps) <= count + 4 < FRAMES
    assert reader.facts.stamps == facts.stamps[:count]
    assert reader.facts.notes == (() if count == len(facts.stamps) else (video_reader.CUT_OFF,))
    # A frame that comes before a lost one in the file may be shown after it.
    numbers = [number_of(picture) for picture in thumbnails]
    assert numbers == sorted(set(numbers))
    assert numbers[:-4] == list(range(count - 4))
    monkeypatch.setattr(video_reader, "SHORT_CLIP_PIXELS", 0)
    other = PyAVReader(path, reader.facts)
    for index in (count - 1, 0, count // 2):
        assert number_of(other.frames((index,))[0]) == numbers[index]


def test_some_cut_files_lose_a_frame(videos, tmp_path):
    """So that the test above has something to see."""
    path = tmp_path / "cut.avi"
    path.write_bytes(videos["mjpeg.avi"].read_bytes()[:-9000])
    facts = probe(path)
    reader = PyAVReader(path, facts)
    assert len(reader.thumbnails(16, 99)) == len(facts.stamps) - 1
    # Of a longer film only the first frames are looked at, and its end doesn't matter.
    assert len(PyAVReader(path, facts).thumbnails(16, 20)) == 20


@pytest.mark.parametrize("name", ["closed.mp4", "mpeg2.mpg", "mpeg4.avi"])
def test_a_damaged_frame_in_the_middle(videos, tmp_path, name):
    content = bytearray(videos[name].read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = np.random.default_rng(0).bytes(200)
    path = tmp_path / name
    path.write_bytes(bytes(content))
    reader = PyAVReader(path, probe(path))
    with pytest.raises(ClipError, match="a damaged frame|undecodable video") as error:
        reader.thumbnails(16, 99)
    assert error.value.evidence.get("decoded", 30) in range(8, 45)


def test_a_frame_that_never_comes_out_of_the_decoder(videos, monkeypatch):
    facts = probe(videos["closed.mp4"])
    original = video_reader.packets_from
    lost = facts.stamps[30]
    monkeypatch.setattr(
        video_reader, "packets_from", lambda *where: (packet for packet in original(*where) if packet.pts != lost)
    )
    with pytest.raises(ClipError, match="frames are missing") as error:
        PyAVReader(videos["closed.mp4"], facts).frames((30,))
    assert error.value.evidence == {"wanted_time": 3.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"rotation": 90}, "pictures that turn"), ({"width": 64, "height": 96}, "pictures of different sizes")],
)
def test_a_frame_that_is_not_like_the_first_one(videos, change, reason):
    facts = replace(probe(videos["closed.mp4"]), **change)
    with pytest.raises(ClipError, match=reason):
        PyAVReader(videos["closed.mp4"], facts).frames((5,))


def test_frames_of_a_long_clip_are_not_kept(videos, monkeypatch):
    monkeypatch.setattr(video_reader, "SHORT_CLIP_PIXELS", 1000)
    for name in ("pyav", *(["decord"] if importlib.util.find_spec("decord") else [])):
        facts = probe(videos["closed.mp4"])
        reader = {"pyav": PyAVReader, "decord": DecordReader}[name](videos["closed.mp4"], facts)
        assert number_of(reader.thumbnails(64, 200)[33]) == 33
        assert not reader._kept
        assert [number_of(picture) for picture in reader.frames((9, 44))] == [9, 44]


@pytest.mark.parametrize("name", ["closed.mp4", "hevc.mkv", "vp9.webm", "mpeg4.avi"])
@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_file_is_an_error_or_a_frame_but_no_crash(videos, tmp_path, name, seed):
    rng = np.random.default_rng(seed)
    content = bytearray(videos[name].read_bytes())
    for place in rng.integers(0, len(content), 60):
        content[place] = rng.integers(256)
    path = tmp_path / name
    path.write_bytes(bytes(content[: len(content) // 2]) if seed % 2 else bytes(content))
    try:
        facts = probe(path)
        opened = open_reader(choose_reader("auto", path, facts), path, facts)
        assert opened.thumbnails(16, 200).shape[1:] == (16, 16, 3)
        assert len(opened.frames((0, len(facts.stamps) - 1))) == 2
    except ClipError as error:
        assert error.reason


def test_a_missing_decord_is_said(videos, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    facts = probe(videos["closed.mp4"])
    with pytest.raises(SettingsError, match="'decord' is not installed .* use --reader pyav"):
        open_reader("decord", videos["closed.mp4"], facts)
    assert choose_reader("auto", videos["closed.mp4"], facts) == "pyav"
