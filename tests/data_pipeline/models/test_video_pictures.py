import importlib.util
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
from av.stream import Disposition

from data_pipeline.errors import ClipError
from data_pipeline.models.video_pictures import DEFAULT_RULES, PictureRules, may_have_fields
from data_pipeline.models.video_reader import open_reader, probe
from data_pipeline.records import VideoFile
from data_pipeline.steps.cut_shots import CutShots
from data_pipeline.steps.read_videos import ReadVideos


def neighbour(name, path):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


video_files = neighbour("files_of_pictures", "test_video_files.py")
tone_mapping = neighbour("tones_of_pictures", "models/test_tone_mapping.py")
RED = (200, 40, 60)
RED_SIGNAL = tuple(257 * value for value in RED)
TAGS_709 = {"colorspace": 1, "color_trc": 1, "color_primaries": 1}
TAGS_HDR = {
    "PQ": {"colorspace": 9, "color_trc": 16, "color_primaries": 9},
    "HLG": {"colorspace": 9, "color_trc": 18, "color_primaries": 9},
}


def read(path, rules=DEFAULT_RULES, index=2):
    """Facts, one picture, and one thumbnail."""
    facts = probe(path, rules)
    reader = open_reader("pyav", path, facts)
    [picture] = reader.frames((index,))
    assert picture.shape == (facts.height, facts.width, 3)
    return facts, picture, reader.thumbnails(16, 50)[index]


def assert_colour(picture, wanted, within=4):
    middle = picture[picture.shape[0] // 2, picture.shape[1] // 2].astype(int)
    assert np.abs(middle - wanted).max() <= within, middle


CODECS = {
    "libx264": ("yuv420p", {}, ["mp4", "mov", "mkv"]),
    "libx265": ("yuv420p10le", video_files.QUIET_X265, ["mp4", "mov", "mkv"]),
    "libvpx-vp9": ("yuv420p", video_files.VP9, ["mp4", "webm"]),
    "prores_ks": ("yuv422p10le", {}, ["mov", "mkv"]),
    "mpeg2video": ("yuv420p", {"b": "4M"}, ["mkv", "mov"]),
    "mpeg4": ("yuv420p", {"b": "4M"}, ["mp4"]),
}


@pytest.mark.parametrize(("codec", "kind"), [(codec, kind) for codec, (*_, kinds) in CODECS.items() for kind in kinds])
def test_colours_that_only_the_container_tells(tmp_path, codec, kind):
    pix_fmt, options, _ = CODECS[codec]
    plain = video_files.encode_colour(
        tmp_path / f"plain.{kind}", RED_SIGNAL, codec=codec, pix_fmt=pix_fmt, options=options
    )
    tagged = video_files.tag_container(plain, tmp_path / f"tagged.{kind}", TAGS_709)
    _, picture, thumbnail = read(tagged)
    assert_colour(picture, RED, within=6)
    assert_colour(thumbnail, RED, within=6)
    # The same without tags is BT.601, so that the tags were needed.
    _, picture, _ = read(plain)
    assert np.abs(picture[32, 48].astype(int) - RED).max() > 12


@pytest.mark.parametrize(
    ("size", "matrix"), [((1280, 720), 1), ((720, 1280), 1), ((1920, 800), 1), ((1280, 536), 1), ((854, 480), 6)]
)
def test_large_video_without_tags_is_bt709_and_small_one_bt601(tmp_path, size, matrix):
    path = video_files.encode_colour(tmp_path / "a.mp4", RED_SIGNAL, matrix=matrix, size=size, frames=3)
    _, picture, thumbnail = read(path)
    assert_colour(picture, RED)
    assert_colour(thumbnail, RED)


@pytest.mark.parametrize("matrix", [1, 5, 6, 4, 7, 9])
@pytest.mark.parametrize("size", [(96, 64), (1280, 720)])
def test_colours_that_the_codec_tells(tmp_path, matrix, size):
    path = video_files.encode_colour(
        tmp_path / "a.mp4", RED_SIGNAL, matrix=matrix, size=size, frames=3, tags={"colorspace": matrix}
    )
    assert_colour(read(path)[1], RED)


def test_rgb_video_is_not_converted(tmp_path):
    path = video_files.encode_colour(
        tmp_path / "a.mov", RED_SIGNAL, codec="qtrle", pix_fmt="rgb24", size=(1280, 720), frames=3
    )
    assert_colour(read(path)[1], RED, within=1)


@pytest.mark.parametrize(
    ("matrix", "name"),
    [(8, "YCgCo"), (10, "BT.2020 with constant luminance"), (13, "number 13"), (14, "ICtCp")],
)
def test_a_matrix_that_cannot_be_converted_is_called_so(tmp_path, matrix, name):
    path = video_files.encode_colour(tmp_path / "a.mp4", RED_SIGNAL, tags={"colorspace": matrix})
    with pytest.raises(ClipError, match="unknown colour matrix") as error:
        probe(path)
    assert name in error.value.evidence["matrix"]


@pytest.mark.parametrize("transfer", TAGS_HDR)
@pytest.mark.parametrize("colour", tone_mapping.COLOURS)
def test_hdr_comes_out_as_its_sdr_colour(tmp_path, transfer, colour):
    signal = tone_mapping.signal(colour, transfer)[0, 0].tolist()
    path = video_files.encode_colour(
        tmp_path / "a.mp4", signal, pix_fmt="yuv420p10le", matrix=9, tags=TAGS_HDR[transfer], frames=3
    )
    facts, picture, thumbnail = read(path)
    assert (facts.tone_map, facts.notes) == (transfer, ("HDR, tone-mapped",))
    # Ten bits are coarse where a colour at the edge of BT.709 has nearly nothing of a primary.
    assert_colour(picture, colour, within=10)
    assert_colour(thumbnail, colour, within=10)


@pytest.mark.parametrize("transfer", TAGS_HDR)
def test_hdr_that_only_the_container_tells(tmp_path, transfer):
    plain = video_files.encode_colour(
        tmp_path / "plain.mp4",
        tone_mapping.signal(RED, transfer)[0, 0].tolist(),
        codec="libx265",
        pix_fmt="yuv420p10le",
        options=video_files.QUIET_X265,
        matrix=9,
    )
    facts, picture, _ = read(video_files.tag_container(plain, tmp_path / "a.mov", TAGS_HDR[transfer]))
    assert (facts.tone_map, facts.notes) == (transfer, ("HDR, tone-mapped",))
    assert_colour(picture, RED)


@pytest.mark.parametrize("transfer", TAGS_HDR)
def test_hdr_that_tells_no_matrix_and_no_primaries(tmp_path, transfer):
    path = video_files.encode_colour(
        tmp_path / "a.mp4",
        tone_mapping.signal(RED, transfer)[0, 0].tolist(),
        pix_fmt="yuv420p10le",
        matrix=9,
        tags={"color_trc": TAGS_HDR[transfer]["color_trc"]},
    )
    assert_colour(read(path)[1], RED)


def test_dolby_vision_without_a_picture_for_others(tmp_path):
    plain = video_files.encode_colour(tmp_path / "plain.mp4", RED_SIGNAL)
    for profile in (5, 8):
        record = bytes([1, 0, profile << 1, 1 << 3 | 5, 0]) + bytes(19)
        path = tmp_path / f"{profile}.mp4"
        video_files.add_mp4_box(plain, path, (32).to_bytes(4, "big") + b"dvcC" + record)
        if profile == 8:
            read(path)
            continue
        with pytest.raises(ClipError, match="unknown colour matrix") as error:
            probe(path)
        assert "Dolby Vision, profile 5" in error.value.evidence["matrix"]


@pytest.mark.parametrize("transfer", TAGS_HDR)
def test_hdr_by_other_rules(tmp_path, transfer):
    signal = tone_mapping.signal(RED, transfer)[0, 0]
    path = video_files.encode_colour(
        tmp_path / "a.mkv",
        signal.tolist(),
        codec="libx265",
        pix_fmt="yuv420p10le",
        matrix=9,
        tags=TAGS_HDR[transfer],
        options=video_files.QUIET_X265,
    )
    facts, picture, _ = read(path, PictureRules(hdr="keep"))
    assert (facts.tone_map, facts.notes) == ("", ("HDR, kept as it is",))
    assert_colour(picture, signal // 257)
    with pytest.raises(ClipError, match="HDR video") as error:
        probe(path, PictureRules(hdr="reject"))
    assert error.value.evidence == {"transfer": transfer, "needed": "SDR, or --hdr tonemap"}


def test_a_wide_gamut_is_converted_and_counted(tmp_path):
    light = np.linalg.inv(tone_mapping.TO_BT709[9]) @ tone_mapping.srgb_light(RED)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 65535
    path = video_files.encode_colour(
        tmp_path / "a.mp4",
        signal.astype(int).tolist(),
        matrix=9,
        tags={"colorspace": 9, "color_trc": 14, "color_primaries": 9},
    )
    facts, picture, _ = read(path)
    assert facts.notes == ("wide gamut, converted to BT.709",)
    assert_colour(picture, RED)


def test_an_ordinary_clip_is_nothing_special(tmp_path):
    path = video_files.encode_colour(tmp_path / "a.mp4", RED_SIGNAL, tags=TAGS_709)
    facts, picture, _ = read(path)
    assert (facts.tone_map, facts.notes, facts.deinterlace) == ("", (), False)
    assert_colour(picture, RED)


TOP_FIELD_FIRST = {"x264-params": "threads=1:keyint=12:bframes=2:tff=1:scenecut=0"}
INTERLACED = {
    "h264.mp4": {"options": TOP_FIELD_FIRST},
    "h264.ts": {"options": TOP_FIELD_FIRST, "container": "mpegts"},
    "bff.mkv": {"options": {"x264-params": "threads=1:keyint=12:bff=1:scenecut=0"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": {"flags": "+ildct+ilme", "b": "4M"}, "fps": 25},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"flags": "+ildct+ilme", "b": "4M"}},
    "prores.mov": {"codec": "prores_ks", "options": {"flags": "+ildct"}, "pix_fmt": "yuv422p10le"},
}


def woven(frames=30, width=96, height=64):
    """Numbered pictures in whose middle a bright bar moves by six pixels from field to field, even lines first."""
    pictures = video_files.numbered(frames, width, height)
    low = slice(height * 5 // 8, height)
    for number, picture in enumerate(pictures):
        for parity in (0, 1):
            left = width // 3 + (6 * (2 * number + parity)) % (width // 3 - 8)
            lines = picture[low][parity::2]
            lines[:, width // 3 : -(width // 3)] = 30
            lines[:, left : left + 8] = 225
    return pictures


def comb(picture):
    """How much a line differs from the lines two above and below less than from its neighbours."""
    rows = picture[44:62, 34:62].astype(int).mean(axis=-1)
    return np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).mean() - np.abs(rows[2:] - rows[:-2]).mean() / 2


@pytest.fixture(scope="module")
def interlaced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interlaced")
    return {name: video_files.encode(folder / name, woven(), **how) for name, how in INTERLACED.items()}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_clips_lose_their_combs_and_no_frame(interlaced, name, monkeypatch):
    path = interlaced[name]
    facts = probe(path)
    assert facts.notes == ("interlaced, deinterlaced",)
    count = len(facts.stamps)
    reader = open_reader("pyav", path, facts)
    order = np.random.default_rng(0).permutation(count).tolist()
    single = {index: reader.frames((index,))[0] for index in order}
    assert [video_files.number_of(single[index]) for index in range(count)] == list(range(30))
    # From the beginning to the end in one go, and after everything was kept: the same pixels.
    assert all(
        np.array_equal(a, single[i]) for i, a in enumerate(open_reader("pyav", path, facts).frames(range(count)))
    )
    assert [video_files.number_of(picture) for picture in reader.thumbnails(64, 99)] == list(range(30))
    assert all(np.array_equal(a, single[i]) for i, a in enumerate(reader.frames(tuple(range(count)))))
    kept = probe(path, PictureRules(interlaced="keep"))
    assert kept.notes == ("interlaced, kept as it is",)
    [combed] = open_reader("pyav", path, kept).frames((10,))
    assert comb(combed) > 40
    assert comb(single[10]) < 12
    # The lines of one field stay; colours are interpolated between lines, so that grey is looked at.
    same = [np.abs(combed[i:60:2, 40:56].astype(int) - single[10][i:60:2, 40:56]).max() <= 3 for i in (44, 45)]
    assert sorted(same) == [False, True]
    with pytest.raises(ClipError, match="interlaced video"):
        probe(path, PictureRules(interlaced="reject"))


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg2.mpg"])
def test_the_same_as_a_filter_over_the_whole_clip(interlaced, name):
    facts = probe(interlaced[name])
    pictures = open_reader("pyav", interlaced[name], facts).frames(tuple(range(len(facts.stamps))))
    with av.open(str(interlaced[name])) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
        graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), sink).configure()
        for frame in container.decode(stream):
            graph.push(frame)
        graph.push(None)
        for picture in pictures:
            assert np.array_equal(picture, sink.pull().to_ndarray(format="rgb24"))


@pytest.fixture
def half_interlaced(tmp_path):
    """Twelve progressive frames, then 30 interlaced ones."""
    how = {"codec": "mpeg2video", "fps": 25}
    first = video_files.encode(tmp_path / "a.ts", video_files.numbered(12), options={"b": "4M", "g": "12"}, **how)
    second = video_files.encode(tmp_path / "b.ts", woven(), options=INTERLACED["mpeg2.mpg"]["options"], **how)
    path = tmp_path / "both.ts"
    with av.open(str(path), "w") as new:
        stream = None
        for source, delay in ((first, 0), (second, 12 * 3600)):
            with av.open(str(source)) as old:
                stream = stream or new.add_stream_from_template(old.streams.video[0])
                for packet in old.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + delay, packet.dts + delay, stream
                        new.mux(packet)
    return path


def test_a_clip_that_is_interlaced_later_on(half_interlaced):
    facts = probe(half_interlaced)
    assert (facts.notes, facts.deinterlace) == ((), False)
    reader = open_reader("pyav", half_interlaced, facts)
    reader.thumbnails(16, 99)
    assert (reader.facts.notes, reader.facts.deinterlace) == (("interlaced, deinterlaced",), True)
    assert comb(open_reader("pyav", half_interlaced, reader.facts).frames((22,))[0]) < 12
    with pytest.raises(ClipError, match="interlaced video"):
        open_reader("pyav", half_interlaced, probe(half_interlaced, PictureRules(interlaced="reject"))).thumbnails(
            16, 99
        )


@pytest.mark.parametrize("codec", ["libx265", "libvpx-vp9"])
def test_codecs_whose_frames_have_no_fields(codec):
    assert not may_have_fields({"libx265": "hevc", "libvpx-vp9": "vp9"}[codec])


MATRICES = [
    (1, 0, 0, 1),
    (0, -1, 1, 0),
    (-1, 0, 0, -1),
    (0, 1, -1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_turned_and_mirrored_clips_come_out_upright(tmp_path, matrix, kind):
    path = video_files.encode(tmp_path / f"a.{kind}", video_files.numbered(9), matrix=matrix)
    facts, picture, thumbnail = read(path, index=5)
    assert (facts.width, facts.height) == (96, 64)
    assert (video_files.number_of(picture), video_files.number_of(thumbnail)) == (5, 5)
    a, b, c, d = matrix
    assert facts.notes == (("mirrored, flipped upright",) if a * d - b * c < 0 else ())


def test_a_slanted_clip(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height = 96, 64
        stream.set_display_rotation(30)
        for number in range(3):
            frame = av.VideoFrame(96, 64, "yuv420p")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(ClipError, match="slanted pictures"):
        probe(path)


@pytest.mark.parametrize(
    ("aspect", "width"),
    [((4, 3), 128), ((1, 2), 48), ((8, 9), 85), ((16, 11), 140), ((1, 1), 96), ((1281, 1280), 96), ((100, 101), 96)],
)
@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "avi"])
def test_pixels_become_square(tmp_path, kind, aspect, width):
    path = video_files.encode(tmp_path / f"a.{kind}", video_files.numbered(9), pixel_aspect=Fraction(*aspect))
    facts, picture, thumbnail = read(path, index=5)
    assert picture.shape == (64, width, 3)
    assert (video_files.number_of(picture), video_files.number_of(thumbnail)) == (5, 5)
    assert facts.notes == (("pixels not square, corrected",) if width != 96 else ())


def test_a_ball_stays_round_when_pixels_are_squared_and_turned(tmp_path):
    y, x = np.mgrid[:96, :128]
    ball = np.where(((x - 70) ** 2 + (y - 40) ** 2 < 30**2)[..., None], 230, 30).astype(np.uint8).repeat(3, axis=2)
    squeezed = ball[:, ::2]  # stored at half the width
    path = video_files.encode(tmp_path / "a.mp4", squeezed[None].repeat(5, axis=0), pixel_aspect=Fraction(2, 1))
    _, picture, _ = read(path)
    assert picture.shape == (96, 128, 3)
    mask = picture.mean(axis=-1) > 128
    assert (mask.any(axis=0).sum(), mask.any(axis=1).sum()) == (pytest.approx(60, abs=2), pytest.approx(60, abs=2))
    # Stored lying on its side, so that it is the height of the finished picture that grows.
    tall = ball[::2]
    path = video_files.encode(
        tmp_path / "b.mp4", tall[None].repeat(5, axis=0), rotation=90, pixel_aspect=Fraction(2, 1)
    )
    _, picture, _ = read(path)
    mask = picture.mean(axis=-1) > 128
    assert picture.shape == (96, 128, 3)
    assert (mask.any(axis=0).sum(), mask.any(axis=1).sum()) == (pytest.approx(60, abs=2), pytest.approx(60, abs=2))


def crop_clip(folder, kind, pixel_aspect=None):
    """Numbered pictures of 96 x 64 in a frame of noise of 16 pixels on the left, 4 above, 8 right, 12 below."""
    pictures = np.random.default_rng(0).integers(0, 255, (9, 80, 120, 3), dtype=np.uint8)
    pictures[:, 4:68, 16:112] = video_files.numbered(9)
    path = video_files.encode(folder / f"plain.{kind}", pictures, options={"crf": "10"}, pixel_aspect=pixel_aspect)
    if kind == "mkv":
        return video_files.crop_matroska(path, folder / "cut.mkv", 16, 4, 8, 12)
    return video_files.add_mp4_box(path, folder / f"cut.{kind}", video_files.clap(96, 64, 4, -4))


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
def test_what_the_container_cuts_off_is_not_seen(tmp_path, kind):
    facts, picture, thumbnail = read(crop_clip(tmp_path, kind), index=5)
    assert (facts.crop, facts.notes) == ((16, 4, 8, 12), ("cropped as the container says",))
    assert picture.shape == (64, 96, 3)
    wanted = video_files.numbered(9)[5].astype(int)
    assert np.abs(picture.astype(int) - wanted)[2:30, 2:-2].mean() < 6
    assert (video_files.number_of(picture), video_files.number_of(thumbnail)) == (5, 5)


def test_cropped_first_then_squared(tmp_path):
    _, picture, _ = read(crop_clip(tmp_path, "mkv", Fraction(4, 3)), index=5)
    assert picture.shape == (64, 128, 3)
    assert video_files.number_of(picture) == 5


def test_a_container_that_cuts_everything_off(tmp_path):
    path = video_files.encode(tmp_path / "plain.mkv", video_files.numbered(5))
    video_files.crop_matroska(path, tmp_path / "cut.mkv", 50, 0, 50, 0)
    with pytest.raises(ClipError, match="nothing left of the picture|unreadable video|no video stream"):
        probe(tmp_path / "cut.mkv")


def film(**more):
    return {"pictures": video_files.numbered(20), "options": video_files.CLOSED, **more}


STILL = {"pictures": np.full((1, 128, 192, 3), 90, np.uint8), "codec": "mjpeg", "pix_fmt": "yuvj420p"}
OTHER = {"pictures": np.full((20, 64, 96, 3), 90, np.uint8), "options": video_files.CLOSED}


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "beside",
    [
        STILL,
        {**STILL, "disposition": Disposition.default},
        {**OTHER, "disposition": Disposition(0)},
        {**OTHER, "pictures": np.full((20, 32, 48, 3), 90, np.uint8), "disposition": Disposition.default},
        {**STILL, "pictures": np.full((2, 128, 192, 3), 90, np.uint8), "disposition": Disposition.default},
    ],
    ids=["picture", "default picture", "not default", "smaller", "two pictures"],
)
def test_the_film_of_several_streams(tmp_path, kind, place, beside):
    streams = [film(disposition=Disposition.default)]
    streams.insert(place, beside)
    path = video_files.encode_streams(tmp_path / f"a.{kind}", streams)
    facts = probe(path)
    reader = open_reader("pyav", path, facts)
    order = np.random.default_rng(0).permutation(20).tolist()
    assert [video_files.number_of(reader.frames((index,))[0]) for index in order] == order
    assert [video_files.number_of(picture) for picture in reader.thumbnails(64, 99)] == list(range(20))
    if importlib.util.find_spec("decord"):
        with pytest.raises(ClipError, match="decord shows wrongly|another size"):
            open_reader("decord", path, facts).frames((3,))


def test_the_steps_pass_on_what_is_out_of_the_ordinary(tmp_path):
    signal = tone_mapping.signal(RED, "HLG")[0, 0].tolist()
    path = video_files.encode_colour(
        tmp_path / "a.mp4", signal, pix_fmt="yuv420p10le", matrix=9, tags=TAGS_HDR["HLG"], frames=12
    )
    file = VideoFile(name="a.mp4", key="a", path=path, caption="a red wall")
    read, cut = ReadVideos(annotations=False), CutShots()
    read.setup(), cut.setup()
    video = read.process(file)
    assert video.notes == cut.process(video).notes == ("HDR, tone-mapped",)
    strict = ReadVideos(annotations=False, hdr="reject")
    strict.setup()
    with pytest.raises(ClipError, match="HDR video"):
        strict.process(file)


def test_a_late_interlaced_clip_is_told_by_the_shots(half_interlaced):
    file = VideoFile(name="both.ts", key="both", path=half_interlaced, caption="bars")
    read, cut = ReadVideos(annotations=False), CutShots()
    read.setup(), cut.setup()
    video = read.process(file)
    found = cut.process(video)
    assert (video.notes, found.notes, found.video.facts.deinterlace) == ((), ("interlaced, deinterlaced",), True)
