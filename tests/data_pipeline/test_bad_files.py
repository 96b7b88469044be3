"""Every kind of file that a folder of videos may hold is mined, or rejected with a reason that can be counted."""

import importlib.util
import json
import os
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_pipeline.build import main
from data_pipeline.errors import ClipError
from data_pipeline.file_names import readable_name
from data_pipeline.models import video_index
from data_pipeline.records import Rejected, VideoFile, encode_mask
from data_pipeline.sources import find_videos
from data_pipeline.steps.cut_shots import CutShots
from data_pipeline.steps.read_videos import ReadVideos

spec = importlib.util.spec_from_file_location("mining_video_files", Path(__file__).with_name("test_video_files.py"))
video_files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(video_files)
encode, remux = video_files.encode, video_files.remux

CAPTION = "a dog on the beach"
FRAMES = 12


def draw(width: int, height: int, frames: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """An ellipse with a stripe that moves to the right: pictures (F, H, W, 3), masks (F, H, W)."""
    rows, columns = np.mgrid[:height, :width]
    cells = np.random.default_rng(0).integers(90, 160, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pictures = np.repeat(cells.repeat(8, 0).repeat(8, 1)[None, :height, :width], frames, 0)
    masks = np.zeros((frames, height, width), dtype=bool)
    high, wide = 0.4 * height, min(0.2 * width, 0.9 * height)
    for frame in range(frames):
        x = 0.35 * width + frame * max(1, min(width, height) // 40)
        masks[frame] = (min(width, height) < 3) | (((rows - height / 2) / high) ** 2 + ((columns - x) / wide) ** 2 < 1)
        pictures[frame][masks[frame]] = (200, 40, 40)
        pictures[frame][masks[frame] & (np.abs(rows - height / 2) < 3)] = (240, 240, 240)
    return pictures, masks


def describe(path: Path, masks: np.ndarray | None, caption: str | bytes | None = CAPTION) -> None:
    """Writes the caption, and the sidecar of a clip with these masks; without masks one that says nothing."""
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption.encode() if isinstance(caption, str) else caption)
    frames = []
    for index, mask in enumerate([] if masks is None else masks):
        ys, xs = np.nonzero(mask)
        if len(ys):
            box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            frames.append({"index": index, "objects": [{"id": 0, "box": box, "mask_rle": encode_mask(mask)}]})
    height, width = (96, 96) if masks is None else masks.shape[1:]
    content = {"schema": "data_pipeline.annotations/1", "width": width, "height": height, "fps": 8}
    content |= {"num_frames": len(frames), "objects": [{"id": 0, "name": "dog"}], "frames": frames}
    sidecar = path.with_name(f"{path.stem}.annotations.json")
    if len(os.fsencode(sidecar.name)) <= 255:
        sidecar.write_text(json.dumps(content))


READ, KEPT = "read_videos", "kept"
NO_VIDEO = (READ, "unreadable video")

# What the encoder is told, the size, and what becomes of the clip.
SOUND = {
    "h264.mp4": ({}, (96, 96), KEPT),
    "no_caption_but_a_table.mp4": ({}, (96, 96), KEPT),
    "open_groups.mp4": ({"options": video_files.OPEN}, (96, 96), KEPT),
    "hevc.mp4": ({"codec": "libx265", "options": video_files.X265}, (96, 96), KEPT),
    "vp9.webm": ({"codec": "libvpx-vp9", "options": video_files.VP9}, (96, 96), KEPT),
    "av1.mp4": ({"codec": "libsvtav1", "options": video_files.AV1}, (96, 96), KEPT),
    "mpeg4.avi": ({"codec": "mpeg4", "options": {"g": "12", "bf": "2"}}, (96, 96), KEPT),
    "h264_with_b_frames.avi": ({"options": video_files.CLOSED}, (96, 96), KEPT),
    "ten_bits.mkv": ({"pix_fmt": "yuv420p10le"}, (96, 96), KEPT),
    "full_colour.mp4": ({"pix_fmt": "yuv444p"}, (96, 96), KEPT),
    "alpha.webm": ({"codec": "libvpx-vp9", "options": video_files.VP9, "pix_fmt": "yuva420p"}, (96, 96), KEPT),
    "grey.mkv": ({"codec": "ffv1", "pix_fmt": "gray"}, (96, 96), KEPT),
    "uneven_times.mp4": ({"stamps": video_files.UNEVEN[:FRAMES]}, (96, 96), KEPT),
    "turned.mp4": ({"rotation": 90}, (128, 64), KEPT),
    "webm_named.mp4": ({"codec": "libvpx-vp9", "options": video_files.VP9, "container": "webm"}, (96, 96), KEPT),
    "transport_stream_named.mp4": ({"options": video_files.OPEN, "container": "mpegts"}, (96, 96), KEPT),
    "fragments.mp4": ({"container_options": {"movflags": "frag_keyframe+empty_moov"}}, (96, 96), KEPT),
    "odd_size.mkv": ({"codec": "ffv1"}, (97, 63), KEPT),
    "odd_size.mp4": ({"pix_fmt": "yuv444p"}, (97, 63), KEPT),
    "wide.mp4": ({"options": {"preset": "ultrafast"}}, (7680, 64), ("pick_frames", "frames blurred")),
    "two_pixels.mkv": ({"codec": "ffv1", "pix_fmt": "yuv444p"}, (2, 2), ("pick_frames", "frames blurred")),
    "one_pixel.mkv": ({"codec": "ffv1", "pix_fmt": "yuv444p"}, (1, 1), ("pick_frames", "frames blurred")),
    "one_frame.mp4": ({"frames": 1}, (96, 96), ("cut_shots", "a single frame")),
    "two_frames.mp4": ({"frames": 2}, (96, 96), ("pick_frames", "frames too near in time")),
    "motion_jpeg.avi": ({"codec": "mjpeg", "pix_fmt": "yuvj420p"}, (96, 96), KEPT),
    "animation_named.mp4": ({"codec": "gif", "pix_fmt": "rgb8", "container": "gif"}, (96, 96), NO_VIDEO),
}
NAMES = {
    "with spaces and 'quotes' \".mp4": KEPT,
    "new\nline.mp4": KEPT,
    "hündchen 犬 \U0001f415.mp4": KEPT,
    "upper.MP4": KEPT,
    "concat:h264.mp4": KEPT,
    "50%03d.mp4": KEPT,
    os.fsdecode(b"not utf-8 \xff\xfe.mp4"): KEPT,
    f"{'long' * 50}.mp4": KEPT,
    f"{'longer' * 41}xxxxx.mp4": (READ, "no annotations"),  # no sidecar can be beside it
}
CAPTIONS = {
    "emoji.mp4": ("a \U0001f415 dog on the beach", KEPT),
    "latin.mp4": ("a dog on the plage dorée".encode("latin-1"), KEPT),
    "long_caption.mp4": (" ".join([CAPTION] * 400), KEPT),
    "only_white_space.mp4": (" \n\t", (READ, "no caption")),
    "empty_caption.mp4": ("", (READ, "no caption")),
    "no_caption_file.mp4": (None, (READ, "no caption")),
    "nothing_named.mp4": ("over there", ("find_entities", "no entity in the caption")),
}
DAMAGED = {
    "empty.mp4": (READ, "empty file"),
    "cut_in_the_header.mp4": (READ, "no video stream"),
    "cut_at_10.mp4": NO_VIDEO,
    "cut_at_50.mp4": NO_VIDEO,
    "cut_at_90.mp4": NO_VIDEO,
    "cut_at_50_header_first.mp4": (READ, "frames are missing"),
    "cut_at_90_header_first.mp4": (READ, "frames are missing"),
    "cut_at_90.mkv": KEPT,
    "without_moov.mp4": NO_VIDEO,
    "sound_only.mp4": (READ, "no video stream"),
    "text.mp4": NO_VIDEO,
    "picture.mp4": NO_VIDEO,
    "playlist.mp4": NO_VIDEO,
    "script.mp4": NO_VIDEO,
    "noise.mp4": NO_VIDEO,
    "zeros.mkv": NO_VIDEO,
    "same_times.mkv": KEPT,
    "backward_times.mkv": ("cut_shots", "frames are missing"),
    "no_key_frame.mkv": (READ, "no key frame"),
    "headless.mkv": KEPT,
    "folder.mp4": (READ, "not a regular file"),
    "pipe.mp4": (READ, "not a regular file"),
    "device.mp4": (READ, "not a regular file"),
    "dangling.mp4": NO_VIDEO,
    "circle.mp4": NO_VIDEO,
    "linked.mp4": KEPT,
    "deep/good.mp4": KEPT,
    "other_size.mp4": (READ, "annotations of another size"),
    "broken_sidecar.mp4": (READ, "unreadable annotations"),
}
# What a decoder makes of flipped bytes is its own affair, as long as it says so or gives pictures.
FLIPPED = {f"flipped_{seed}{suffix}": None for seed in range(4) for suffix in (".mp4", ".mkv")}
EXPECTED = {
    **{name: outcome for name, (_, _, outcome) in SOUND.items()},
    **NAMES,
    **{name: outcome for name, (_, outcome) in CAPTIONS.items()},
    **DAMAGED,
    **FLIPPED,
}


def write_sound(folder: Path) -> None:
    for name, (settings, (width, height), _) in SOUND.items():
        settings = dict(settings)
        pictures, masks = draw(width, height, settings.pop("frames", FRAMES))
        encode(folder / name, pictures, fps=8, **settings)
        describe(folder / name, masks)


def write_sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_damaged(folder: Path, good: Path, masks: np.ndarray) -> None:
    (folder / "deep").mkdir()
    content = good.read_bytes()
    front = remux(good, folder / "front.mp4", options={"movflags": "faststart"})
    matroska = remux(good, folder / "plain.mkv")
    written = {
        "empty.mp4": b"",
        "cut_in_the_header.mp4": front.read_bytes()[:200],
        "cut_at_10.mp4": content[: len(content) // 10],
        "cut_at_50.mp4": content[: len(content) // 2],
        "cut_at_90.mp4": content[: len(content) * 9 // 10],
        "cut_at_50_header_first.mp4": front.read_bytes()[: len(content) // 2],
        "cut_at_90_header_first.mp4": front.read_bytes()[: len(content) * 9 // 10],
        "cut_at_90.mkv": matroska.read_bytes()[: len(content) * 9 // 10],
        "without_moov.mp4": content[: content.rindex(b"moov") - 4],
        "text.mp4": b"This is no video.\n" * 100,
        "playlist.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\nh264.mp4\n#EXT-X-ENDLIST\n",
        "script.mp4": b"ffconcat version 1.0\nfile h264.mp4\n",
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "zeros.mkv": bytes(5000),
        "deep/good.mp4": content,
        "other_size.mp4": content,
        "broken_sidecar.mp4": content,
    }
    for name, data in written.items():
        (folder / name).write_bytes(data)
    for name in FLIPPED:
        data = bytearray((good if name.endswith("mp4") else matroska).read_bytes())
        rng = np.random.default_rng(int(name[8]))
        for place in rng.integers(len(data) // 4, len(data) * 3 // 4, 8):
            data[place] ^= 1 << rng.integers(8)
        (folder / name).write_bytes(data)
    write_sound_only(folder / "sound_only.mp4")
    Image.fromarray(np.zeros((96, 96, 3), dtype=np.uint8)).save(folder / "picture.mp4", format="PNG")
    remux(good, folder / "same_times.mkv", stamps={5: 6})
    remux(good, folder / "backward_times.mkv", stamps={5: 6, 6: 5})
    remux(good, folder / "no_key_frame.mkv", drop=[0])
    long, long_masks = draw(96, 96, 2 * FRAMES)
    pair = encode(folder / "pair.mp4", long, fps=8, options=video_files.CLOSED)
    remux(pair, folder / "headless.mkv", drop=[0, 1])
    for path in (front, matroska, pair):
        path.unlink()
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "dangling.mp4").symlink_to(folder / "nowhere")
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    (folder / "linked.mp4").symlink_to(good)
    (folder / "round").symlink_to(folder, target_is_directory=True)
    for name in (*DAMAGED, *FLIPPED):
        describe(folder / name, {"headless.mkv": long_masks[FRAMES:], "cut_at_90.mkv": masks[:6]}.get(name, masks))
    describe(folder / "other_size.mp4", draw(128, 64)[1])
    (folder / "broken_sidecar.annotations.json").write_text('{"schema"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "videos"
    folder.mkdir()
    write_sound(folder)
    masks = draw(96, 96)[1]
    good = folder / "h264.mp4"
    for name in (*NAMES, *CAPTIONS):
        (folder / name).write_bytes(good.read_bytes())
        describe(folder / name, masks, CAPTIONS.get(name, (CAPTION,))[0])
    write_damaged(folder, good, masks)
    (folder / "no_caption_but_a_table.txt").unlink()
    row = f"no_caption_but_a_table.mp4,{CAPTION}\n"
    (folder / "captions.csv").write_text("video,caption\n" + row * 2, encoding="utf-8-sig")
    return folder


def mine(folder, out, workers):
    options = ["--captions", str(folder / "captions.csv"), "--workers", str(workers), "--quiet"]
    options += ["--detector", "annotations", "--segmenter", "annotations"]
    return main(["--videos", str(folder), "--out", str(out), *options, "--clip-timeout", "60"])


@pytest.fixture(scope="module")
def mined(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("mined") / "pairs"
    assert mine(folder, out, 0) == 0
    return out


def outcomes(out):
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(entry["video"], (entry["stage"], entry["reason"])) for entry in rejected]
    with tarfile.open(out / "pairs-000000.tar") as shard:
        samples = [json.load(shard.extractfile(member)) for member in shard if member.name.endswith(".json")]
    return [*found, *((sample["source"]["video"], KEPT) for sample in samples)]


def test_every_file_is_in_the_dataset_or_among_the_rejected_once(mined):
    assert sorted(name for name, _ in outcomes(mined)) == sorted(map(readable_name, EXPECTED))
    assert len(EXPECTED) > 70


@pytest.mark.parametrize("name", EXPECTED, ids=readable_name)
def test_what_becomes_of_a_file(mined, name):
    found = dict(outcomes(mined))[readable_name(name)]
    if name in FLIPPED:
        assert found == KEPT or found[1] in ("undecodable video", "frames are missing", "a damaged frame")
    else:
        assert found == EXPECTED[name]


def test_no_file_sets_off_an_error_that_nobody_foresaw(mined):
    assert "unexpected error" not in {outcome[1] for _, outcome in outcomes(mined)}
    assert "Traceback" not in (mined / "rejected.jsonl").read_text(encoding="utf-8")


def test_two_workers_say_the_same(folder, mined, tmp_path):
    assert mine(folder, tmp_path / "out", 2) == 0
    for name in ("pairs-000000.tar", "rejected.jsonl", "index.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (mined / name).read_bytes()


def resident_megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory and open files are read from /proc")
def test_opening_bad_files_leaves_nothing_behind(folder):
    read, cut = ReadVideos(annotations=False, caption_required=False), CutShots()
    read.setup()
    cut.setup()
    bad = [file for file in find_videos(folder) if file.path.name in DAMAGED or file.path.name in FLIPPED]

    def open_all() -> int:
        for file in bad:
            try:
                video = read.process(file)
                if not isinstance(video, Rejected):
                    cut.process(video)
            except ClipError:
                pass
        video_index.close_last()
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    assert len(bad) >= 35
    open_all()
    files, megabytes = open_all(), resident_megabytes()
    for _ in range(6):
        assert open_all() == files
    assert resident_megabytes() - megabytes < 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file; a refusal is played in test_read_videos.py")
def test_a_file_that_may_not_be_read(folder, tmp_path):
    path = tmp_path / "locked.mp4"
    path.write_bytes((folder / "h264.mp4").read_bytes())
    path.chmod(0)
    step = ReadVideos()
    step.setup()
    file = VideoFile(name="locked.mp4", key="locked", path=path, caption=CAPTION)
    assert step.process(file).evidence == {"error": "PermissionError: Permission denied"}
