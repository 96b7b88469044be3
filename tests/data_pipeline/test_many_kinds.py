"""A folder of clips of many kinds goes through the command: what ffmpeg decodes is kept with the right colours and
shapes, or left out by a rule that the report names.
"""

import importlib.util
import json
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from data_pipeline.build import main
from data_pipeline.records import encode_mask
from data_pipeline.shard_reader import Sample, Shard, read_build, rejected_videos

pytestmark = pytest.mark.slow


def neighbour(name, path):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


video_files = neighbour("files_of_many_kinds", "test_video_files.py")
tone_mapping = neighbour("tones_of_many_kinds", "models/test_tone_mapping.py")

KEPT = "kept"
# Rules of mining: the only reasons for which a clip that ffmpeg decodes may be left out.
RULES = {
    ("cut_shots", "a single frame"),
    ("cut_shots", "black bars round the picture"),
    ("pick_frames", "frames too near in time"),
    ("pick_frames", "frames too dark"),
    ("pick_frames", "fewer than two annotated frames in one shot"),
    ("filter_pairs", "near-identical frames"),
    ("filter_pairs", "no subject passed the filters"),
}
FRAMES, FPS = 20, 10
SIZES = ((96, 64), (64, 96), (128, 72), (112, 80))
FAST = ((160, 64), (192, 96))  # in which the ball has a long way to go
COLOURS = ((200, 40, 40), (40, 60, 200), (230, 180, 40), (30, 200, 60))
# For pictures without colours, which have to stand out by their light.
BRIGHT = ((250, 225, 40),)
# How far a colour may be off, of 255. Rounding to 8 bits of limited range: half a step of light (255 / 219) and of the
# differences of colour (255 / 224, 1.86 times into blue) is 1.6 at most, the same once more on the way back: 3. The
# coarsest quantiser that the encoders are told to use adds one step of each: 3. JPEG at quality 95: 2.
WITHIN = 8
# Ten bits of PQ are coarse where a colour at the edge of BT.709 has nearly nothing of a primary: see
# test_video_pictures.py.
WITHIN_HDR = 10

X264 = {"preset": "ultrafast", "crf": "10", "x264-params": "threads=1:scenecut=0"}
GROUPS = {"preset": "veryfast", "crf": "10"}
CLOSED = {**video_files.CLOSED, **GROUPS}
OPEN = {**video_files.OPEN, **GROUPS}
TFF = {**GROUPS, "x264-params": "threads=1:keyint=12:bframes=2:tff=1:scenecut=0"}
BFF = {**GROUPS, "x264-params": "threads=1:keyint=12:bff=1:scenecut=0"}
X265 = {"preset": "ultrafast", "x265-params": "keyint=12:crf=10:pools=none:frame-threads=1:log-level=none"}
FINE = {"b": "8M", "qmin": "2", "qmax": "3", "g": "12"}
FIELDS = {**FINE, "flags": "+ildct+ilme"}
VP9 = {**video_files.VP9, "crf": "10", "b": "0"}
AV1 = {**video_files.AV1, "crf": "15"}
TAGS_709 = {"colorspace": 1, "color_trc": 1, "color_primaries": 1}
TAGS_HDR = {
    name: {"colorspace": 9, "color_trc": code, "color_primaries": 9} for name, code in (("PQ", 16), ("HLG", 18))
}
TEN_BITS = {"pix_fmt": "yuv420p10le"}
HDR, FLIPPED, COMBED = "HDR, tone-mapped", "mirrored, flipped upright", "interlaced, deinterlaced"
OBLONG, CROPPED, SEVERAL = "pixels not square, corrected", "cropped as the container says", "several video streams"
AGAIN = "times that repeat or go back, made even"


def h264(**more):
    return {"options": X264, **more}


def mpeg2(**more):
    return {"codec": "mpeg2video", "options": {**FINE, "bf": "2"}, "fps": 25, **more}


# name of the kind, with the suffix of its files -> what ``encode`` is told, and:
#   notes: what the report says of each; outcome: if it is not kept; frames, sizes, colours: other ones than above
#   stored: what is done with the drawn pictures before; after: what is done with the file
#   first: the drawn frame that is the first one to be seen; within: another tolerance
KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": h264(),
    "h264_closed.mp4": {"options": CLOSED},
    "h264_open.mov": {"options": OPEN},
    "h264_open.mkv": {"options": OPEN},
    "h264_refresh.m4v": {"options": {**GROUPS, **video_files.x264("intra-refresh=1:keyint=12:bframes=0")}},
    "h264_b_frames.avi": {"options": CLOSED},
    "h264_open.ts": {"options": OPEN},
    "h264_open.m2ts": {"options": OPEN, "container": "mpegts", "container_options": {"mpegts_m2ts_mode": "1"}},
    "h264.mts": {"options": CLOSED, "container": "mpegts"},
    "h264.flv": {"options": CLOSED},
    "h264.3gp": {"options": CLOSED},
    "h264.wmv": {"options": CLOSED},
    "h264.mpg": {"options": CLOSED},
    "h264_ten_bits.mp4": {"options": X264, **TEN_BITS},
    "h264_422.mp4": h264(pix_fmt="yuv422p"),
    "h264_444.mkv": h264(pix_fmt="yuv444p"),
    "h264_grey.mp4": h264(pix_fmt="gray", colours_of=BRIGHT, tags={"color_range": 2}),
    "hevc.mp4": {"codec": "libx265", "options": X265},
    "hevc_ten_bits.mkv": {"codec": "libx265", "options": X265, **TEN_BITS},
    "vp8.webm": {"codec": "libvpx", "options": {"g": "20", "crf": "4", "b": "4M", "auto-alt-ref": "1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": VP9},
    "vp9_alpha.webm": {"codec": "libvpx-vp9", "options": {**VP9, "auto-alt-ref": "0"}, "pix_fmt": "yuva420p"},
    "av1.mp4": {"codec": "libsvtav1", "options": AV1},
    "mpeg4.avi": {"codec": "mpeg4", "options": {**FINE, "bf": "2"}},
    "mpeg4_packed.avi": {"codec": "mpeg4", "options": {**FINE, "bf": "2", "b_strategy": "0"}, "after": "pack"},
    "msmpeg4.avi": {"codec": "msmpeg4", "options": FINE},
    "mpeg2.mpg": mpeg2(),
    "mpeg2.ts": mpeg2(),
    "mpeg2_vob.mpeg": mpeg2(container="vob"),
    "mpeg1.mpeg": mpeg2(codec="mpeg1video"),
    "wmv2.wmv": {"codec": "wmv2", "options": FINE},
    "flv1.flv": {"codec": "flv", "options": FINE},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "dnxhd.mov": {
        "codec": "dnxhd", "pix_fmt": "yuv422p", "options": {"profile": "dnxhr_hq"}, "sizes": ((256, 128),),
        "colours": {"dst_colorspace": 1},
    },
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "options": {"qmin": "2", "qmax": "2"}},
    "ffv1.mkv": {"codec": "ffv1"},
    "ffv1_grey.mkv": {"codec": "ffv1", "pix_fmt": "gray", "colours_of": BRIGHT},
    "ffv1_odd.mkv": {"codec": "ffv1", "sizes": ((97, 63), (63, 97))},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "qtrle_rgb.mov": {"codec": "qtrle", "pix_fmt": "rgb24"},
    "png_alpha.mov": {"codec": "png", "pix_fmt": "rgba"},
    "fragments.mp4": {"options": OPEN, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "uneven.mp4": {"options": CLOSED, "stamps": video_files.UNEVEN[:FRAMES]},
    "uneven.webm": {"codec": "libvpx-vp9", "options": VP9, "stamps": video_files.UNEVEN[:FRAMES]},
    "one_a_second.mp4": h264(fps=1, frames=10),
    "fast.mp4": h264(fps=120, frames=90),
    "turned_90.mp4": h264(rotation=90),
    "turned_180.mov": h264(rotation=180),
    "turned_270.mkv": h264(rotation=270),
    "mirrored.mp4": h264(matrix=(-1, 0, 0, 1), notes=[FLIPPED]),
    "upside_down.mov": h264(matrix=(1, 0, 0, -1), notes=[FLIPPED]),
    "transposed.mkv": h264(matrix=(0, 1, 1, 0), notes=[FLIPPED]),
    "oblong.mp4": h264(pixel_aspect=Fraction(4, 3), notes=[OBLONG]),
    "oblong.ts": h264(pixel_aspect=Fraction(16, 11), notes=[OBLONG]),
    "narrow_turned.mkv": h264(pixel_aspect=Fraction(1, 2), rotation=90, notes=[OBLONG]),
    "clap.mov": h264(stored="frame", after="clap", notes=[CROPPED]),
    "pixel_crop.mkv": h264(stored="frame", after="pixel_crop", notes=[CROPPED]),
    "crop_oblong.mkv": h264(stored="frame", after="pixel_crop", pixel_aspect=Fraction(4, 3), notes=[OBLONG, CROPPED]),
    "top_first.mp4": {"options": TFF, "stored": "top", "sizes": FAST, "notes": [COMBED]},
    "bottom_first.mts": {"options": BFF, "stored": "bottom", "container": "mpegts", "sizes": FAST, "notes": [COMBED]},
    "fields.mpg": mpeg2(options=FIELDS, stored="top", sizes=FAST, notes=[COMBED]),
    "pq.mp4": {"options": X264, **TEN_BITS, "light": "PQ", "tags": TAGS_HDR["PQ"], "notes": [HDR]},
    "hlg.mov": {
        "codec": "libx265", "options": X265, **TEN_BITS, "light": "HLG", "tags": TAGS_HDR["HLG"], "notes": [HDR],
    },
    "hlg_turned.mp4": {
        "options": X264, **TEN_BITS, "light": "HLG", "tags": TAGS_HDR["HLG"], "rotation": 270, "notes": [HDR],
    },
    "full_range.mp4": h264(colours={"dst_colorspace": 6, "dst_color_range": 2}, tags={"color_range": 2}),
    "bt709.mp4": h264(colours={"dst_colorspace": 1}, tags=TAGS_709),
    "bt709_of_the_box.mov": h264(colours={"dst_colorspace": 1}, after="tag"),
    "tall_untagged.mp4": h264(colours={"dst_colorspace": 1}, sizes=((160, 720),)),
    "wide_untagged.mkv": h264(colours={"dst_colorspace": 1}, sizes=((1280, 160),)),
    "second_stream.mp4": h264(after="second", notes=[SEVERAL]),
    "cover.mp4": h264(after="cover"),
    "sound.mp4": h264(sound=1),
    "sound.ts": mpeg2(sound=1),
    "sound_first.mp4": h264(sound=0),
    "sound_first.mkv": h264(sound=0),
    "sound_first.flv": {"options": CLOSED, "sound": 0},
    "sound_first.wmv": {"codec": "wmv2", "options": FINE, "sound": 0},
    "edited.mp4": {"options": CLOSED, "after": "edit", "first": 7, "frames": 30},
    "late.mkv": {"options": OPEN, "after": "late"},
    "headless.mkv": {"options": CLOSED, "after": "behead", "first": 12, "frames": 36},
    "stitched.ts": {"options": CLOSED, "after": "stitch", "notes": [AGAIN]},
    "stitched.mpeg": mpeg2(after="stitch", notes=[AGAIN]),
    "two_scenes.mp4": h264(stored="scenes", frames=30),
    "letterbox.mp4": h264(stored="bars", outcome=("cut_shots", "black bars round the picture")),
    "slides.mp4": h264(stored="slides", outcome=("filter_pairs", "near-identical frames")),
    "short.mp4": h264(frames=2, outcome=("pick_frames", "frames too near in time")),
    "single.mp4": h264(frames=1, outcome=("cut_shots", "a single frame")),
    "night.mp4": h264(stored="night", outcome=("pick_frames", "frames too dark")),
}  # fmt: skip
PER_KIND = 3
OWN = ("notes", "outcome", "frames", "sizes", "colours_of", "stored", "after", "first", "light")
FRAME = (16, 4, 8, 12)  # what a container cuts off: left, top, right, bottom


@dataclass(frozen=True)
class Clip:
    """One of the clips: its kind, and its number among those of the kind."""

    kind: str
    number: int

    @property
    def name(self) -> str:
        stem, suffix = self.kind.rsplit(".", 1)
        return f"{stem}_{suffix}_{self.number}.{suffix}"

    @property
    def how(self) -> dict[str, Any]:
        return KINDS[self.kind]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the finished picture."""
        sizes = self.how.get("sizes", SIZES)
        width, height = sizes[self.number % len(sizes)]
        aspect = self.how.get("pixel_aspect", 1)
        return (width, round(height * aspect)) if self.how.get("rotation") else (round(width * aspect), height)

    @property
    def colour(self) -> np.ndarray:
        colours = self.how.get("colours_of", COLOURS)
        colour = np.array(colours[(self.number + len(self.kind)) % len(colours)])
        return np.full(3, colour @ (0.299, 0.587, 0.114)) if colours is BRIGHT else colour

    def pictures(self, later: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """What is to be seen, uint8 (frames, height, width, 3), and masks of the ball. later: part of a frame's time.

        A ball with a light bar at its upper left goes from left to right over grey squares, in an own line each.
        """
        (width, height), frames = self.size, self.how.get("frames", FRAMES)
        rng = np.random.default_rng([self.number, len(self.kind)])
        cells = rng.integers(60, 130, (height // 8 + 1, width // 8 + 1, 1)) + rng.integers(-8, 9, 3)
        ground = cells.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
        rows, columns = np.mgrid[:height, :width]
        radius = 0.28 * min(width, height)
        pictures, masks = ground[None].repeat(frames, 0), np.zeros((frames, height, width), dtype=bool)
        for frame in range(frames):
            way = (frame + later) / max(FRAMES, frames - 1)
            x, y = radius + 4 + way * (width - 2 * radius - 8), height / 2 + (way - 0.5) * 0.1 * height
            masks[frame] = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
            pictures[frame][masks[frame]] = self.colour.round()
            bar = masks[frame] & (np.abs(rows - y + radius * 0.5) < radius * 0.15) & (columns < x)
            pictures[frame][bar] = 235
        return pictures, masks


CLIPS = [Clip(kind, number) for kind in KINDS for number in range(PER_KIND)]


def stored(clip: Clip, pictures: np.ndarray) -> np.ndarray:
    """What is encoded of the drawn pictures."""
    way, (height, width) = clip.how.get("stored"), pictures.shape[1:3]
    if way in ("top", "bottom"):  # lines of two fields, half a frame apart
        pictures = pictures.copy()
        second = 1 if way == "top" else 0
        pictures[:, second::2] = clip.pictures(later=0.5)[0][:, second::2]
    elif way == "bars":
        pictures = pictures.copy()
        pictures[:, : height // 8] = pictures[:, -(height // 8) :] = 0
    elif way == "slides":
        pictures = pictures[:1].repeat(len(pictures), 0)
    elif way == "night":
        pictures = pictures // 16
    elif way == "scenes":  # another picture in the first third
        pictures = pictures.copy()
        pictures[: len(pictures) // 3] = 255 - pictures[: len(pictures) // 3, ::-1]
    if aspect := clip.how.get("pixel_aspect"):
        narrow = (width, round(height / aspect)) if clip.how.get("rotation") else (round(width / aspect), height)
        pictures = np.stack(
            [np.asarray(Image.fromarray(each).resize(narrow, Image.Resampling.BOX)) for each in pictures]
        )
    if way == "frame":
        left, top, right, bottom = FRAME
        drawn, (height, width) = pictures, pictures.shape[1:3]
        shape = (len(drawn), height + top + bottom, width + left + right, 3)
        pictures = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
        pictures[:, top : top + height, left : left + width] = drawn
    if light := clip.how.get("light"):
        linear = tone_mapping.srgb_light(pictures) @ np.linalg.inv(tone_mapping.TO_BT709[9]).T
        pictures = np.round(tone_mapping.CODES[light](np.maximum(linear, 0)) * 65535).astype(np.uint16)
    return pictures


def write(folder: Path, clip: Clip) -> None:
    """The video of a clip, its caption and its annotations."""
    pictures, masks = clip.pictures()
    path, after = folder / clip.name, clip.how.get("after")
    settings = {name: value for name, value in clip.how.items() if name not in OWN}
    if clip.how.get("light"):
        settings["colours"] = {"dst_colorspace": 9}
    # An mkv keeps no times of decoding, which moving packets needs.
    plain = path if after is None else folder / f".plain{'.mp4' if after in ('late', 'behead') else path.suffix}"
    made = stored(clip, pictures)
    if after in ("second", "cover"):
        still = {"pictures": np.full((1, 64, 96, 3), 90, np.uint8), "codec": "mjpeg", "pix_fmt": "yuvj420p"}
        other = {"pictures": np.full((FRAMES, 32, 48, 3), 90, np.uint8), "options": X264, "disposition": Disposition(0)}
        beside = other if after == "second" else {**still, "disposition": Disposition.attached_pic}
        film = {"pictures": made, "options": X264, "disposition": Disposition.default}
        video_files.encode_streams(path, [other if after == "second" else film, film if after == "second" else beside])
    elif after == "stitch":  # two files, put one behind the other
        parts = [video_files.encode(plain, part, **settings).read_bytes() for part in np.array_split(made, 2)]
        path.write_bytes(b"".join(parts))
    else:
        video_files.encode(plain, made, **settings)
    width, height = clip.size
    if after == "clap":
        left, top, right, bottom = FRAME
        box = video_files.clap(width, height, (left - right) // 2, (top - bottom) // 2)
        video_files.add_mp4_box(plain, path, box)
    elif after == "pixel_crop":
        video_files.crop_matroska(plain, path, *FRAME)
    elif after == "tag":
        video_files.tag_container(plain, path, TAGS_709)
    elif after == "pack":
        video_files.repack(plain, path, video_files.packed)
    elif after == "edit":
        video_files.remux(plain, path, shift=-0.7, options={"avoid_negative_ts": "disabled"})
    elif after == "late":
        video_files.remux(plain, path, shift=2.0)
    elif after == "behead":
        video_files.remux(plain, path, drop=range(5))
    if plain != path:
        plain.unlink(missing_ok=True)
    path.with_suffix(".txt").write_text("a ball on the beach")
    frames = []
    for index, mask in enumerate(masks[clip.how.get("first", 0) :]):
        entry = {"id": 0, "box": box_of(mask), "mask_rle": encode_mask(mask)}
        frames.append({"index": index, "objects": [entry]})
    content = {"schema": "data_pipeline.annotations/1", "width": width, "height": height, "fps": FPS}
    content |= {"num_frames": len(frames), "objects": [{"id": 0, "name": "ball"}], "frames": frames}
    path.with_name(f"{path.stem}.annotations.json").write_text(json.dumps(content))


def box_of(mask: np.ndarray) -> list[int]:
    """Left, top, right and bottom of a mask (height, width), in pixels; lines and columns of single pixels are not
    counted."""
    rows, columns = (np.flatnonzero(mask.sum(axis=axis) >= 2) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@dataclass(frozen=True)
class Mined:
    """Folder of the videos, and the dataset: outcome of every video, and the samples."""

    videos: Path
    out: Path
    outcomes: dict[str, Any]
    samples: dict[str, Sample]


@pytest.fixture(scope="module")
def mined(tmp_path_factory: pytest.TempPathFactory) -> Mined:
    folder = tmp_path_factory.mktemp("kinds")
    videos, out = folder / "videos", folder / "pairs"
    videos.mkdir()
    for clip in CLIPS:
        write(videos, clip)
    options = ["--detector", "annotations", "--segmenter", "annotations", "--workers", "0", "--quiet"]
    assert main(["--videos", str(videos), "--out", str(out), *options]) == 0
    outcomes: dict[str, Any] = {entry["video"]: (entry["stage"], entry["reason"]) for entry in rejected_videos(out)}
    samples = {}
    for path in sorted(out.glob("*.tar")):
        shard = Shard(path)
        for sample in map(shard.read, shard.keys):
            name = sample.metadata["source"]["video"]
            assert name not in outcomes
            outcomes[name], samples[name] = KEPT, sample
    return Mined(videos, out, outcomes, samples)


def decoded_frames(path: Path) -> int:
    """How many frames a plain decoder gives for the stream that has the most of them; its errors are passed on."""
    with av.open(str(path)) as container:
        counts = Counter[int]()
        for packet in container.demux(*container.streams.video):
            counts[packet.stream.index] += len(packet.decode())
        return max(counts.values())


def test_how_many_there_are():
    assert len(KINDS) >= 30
    assert len(CLIPS) >= 200
    assert len({kind.rsplit(".", 1)[1] for kind in KINDS}) >= 13


def test_what_a_plain_decoder_reads_is_kept_or_left_out_by_a_rule(mined):
    assert sorted(mined.outcomes) == sorted(clip.name for clip in CLIPS)
    for clip in CLIPS:
        shown = clip.how.get("frames", FRAMES) - clip.how.get("first", 0)
        assert decoded_frames(mined.videos / clip.name) >= shown, clip
    lost = {name: outcome for name, outcome in mined.outcomes.items() if outcome != KEPT}
    assert {name: outcome for name, outcome in lost.items() if outcome not in RULES} == {}
    assert lost == {clip.name: clip.how["outcome"] for clip in CLIPS if "outcome" in clip.how}


def test_the_report_names_every_reason_and_its_count(mined):
    wanted = Counter(clip.how["outcome"] for clip in CLIPS if "outcome" in clip.how)
    counts = read_build(mined.out)["counts"]
    found = {(stage, reason): n for stage, reasons in counts["reasons"].items() for reason, n in reasons.items()}
    assert found == wanted
    assert (counts["videos"], counts["rejected"]) == (len(CLIPS), wanted.total())
    html = (mined.out / "report.html").read_text(encoding="utf-8")
    for (stage, reason), count in wanted.items():
        assert f"{count} {reason}<" in html
        assert f"<summary>{stage}: {reason} ({count})</summary>" in html


def test_the_report_counts_what_is_out_of_the_ordinary(mined):
    wanted = Counter(note for clip in CLIPS for note in clip.how.get("notes", ()))
    notes = json.loads((mined.out / "report" / "notes.json").read_text(encoding="utf-8"))
    assert dict(notes["clips"]) == wanted
    html = (mined.out / "report.html").read_text(encoding="utf-8")
    for note, count in wanted.items():
        assert f'<td>{note}</td><td class="n">{count}</td>' in html, note


@pytest.mark.parametrize("kind", [kind for kind, how in KINDS.items() if "outcome" not in how])
def test_colours_and_shapes_of_what_is_kept(mined, kind):
    for clip in (clip for clip in CLIPS if clip.kind == kind):
        sample = mined.samples[clip.name]
        truth, masks = clip.pictures()
        check_picture(clip, np.asarray(sample.target), truth, masks, sample.metadata["source"]["frame_target"])
        index = sample.metadata["source"]["frame_reference"] + clip.how.get("first", 0)
        [cut_out] = sample.references
        pixels = np.asarray(cut_out)
        left, top, right, bottom = box_of(masks[index])
        assert np.abs(np.array(cut_out.size) - (right - left, bottom - top)).max() <= 1, clip
        colour = np.median(pixels[..., :3][pixels[..., 3] == 255], axis=0)
        assert np.abs(colour - clip.colour).max() <= within(clip), (clip, colour)


def within(clip: Clip) -> int:
    return WITHIN_HDR if "light" in clip.how else WITHIN


def check_picture(clip: Clip, picture: np.ndarray, truth: np.ndarray, masks: np.ndarray, index: int) -> None:
    """Asserts that a picture is the drawn one of this number: its size, the ball's colour, place and shape, and all of
    it in the mean."""
    index += clip.how.get("first", 0)
    assert picture.shape == truth[index].shape, clip
    off = np.abs(picture.astype(int) - truth[index]).mean()
    colour = np.median(picture[masks[index]], axis=0)
    assert np.abs(colour - clip.colour).max() <= within(clip), (clip, colour)
    near = (np.abs(picture - clip.colour) < 60).all(axis=-1)
    wanted, found = np.array(box_of(masks[index])), np.array(box_of(near))
    woven = clip.how.get("stored") in ("top", "bottom")  # which of the two moments is shown is the filter's affair
    assert np.abs(wanted - found).max() <= (4 if woven else 2), (clip, wanted, found)
    assert off <= 7, (clip, off)
    if woven:
        moved = (truth[index] != clip.pictures(later=0.5)[0][index]).any(axis=-1)[1:-1]
        assert comb(picture)[moved].mean() < comb(stored(clip, truth)[index])[moved].mean() / 2, clip


def comb(picture: np.ndarray) -> np.ndarray:
    """How much a line is lighter or darker than the mean of its neighbours: (height - 2, width)."""
    light = picture.astype(float).mean(axis=-1)
    return np.abs(light[1:-1] - (light[:-2] + light[2:]) / 2)
