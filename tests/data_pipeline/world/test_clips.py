"""Clips on disk: real H.264 that two readers agree on, with sidecars that tell the truth about every frame."""

import json

import av
import numpy as np
import pytest

from data_pipeline.records import decode_mask
from data_pipeline.world import BACKGROUNDS, Identity
from data_pipeline.world.__main__ import main
from data_pipeline.world.clips import annotate, encode_mask, sample_clip, write_clips, write_video
from data_pipeline.world.scenes import write_caption

SETTINGS = {"split": "held_out", "size": 64, "num_frames": 6, "fps": 8, "workers": 0}
COUNT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, COUNT, seed=5, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def videos(folder):
    return sorted(folder.glob("*.mp4"))


def annotations_of(video):
    return json.loads(video.with_suffix(".annotations.json").read_text())


def frames_by_pyav(video):
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def pixel_box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


class TestFiles:
    def test_names(self, folder):
        expected = {
            f"clip_{i:06d}{end}" for i in range(COUNT) for end in (".mp4", ".txt", ".annotations.json")
        }  # fmt: skip
        assert {path.name for path in folder.iterdir() if path.name.startswith("clip")} == expected
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], "no temporary file stays"

    def test_videos_are_h264_of_the_asked_size(self, videos):
        for video in videos:
            with av.open(str(video)) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name == "h264"
                assert (stream.width, stream.height) == (64, 64)
                assert stream.average_rate == 8

    def test_decord_and_pyav_read_the_annotated_frames(self, videos):
        decord = pytest.importorskip("decord")
        for video in videos:
            reader = decord.VideoReader(str(video), num_threads=1)
            annotations = annotations_of(video)
            assert len(reader) == annotations["num_frames"] == len(annotations["frames"]) == 6
            by_decord = reader.get_batch(list(range(6))).asnumpy()
            np.testing.assert_array_equal(by_decord, frames_by_pyav(video))
            starts = reader.get_frame_timestamp(list(range(6)))[:, 0]
            np.testing.assert_allclose([frame["time"] for frame in annotations["frames"]], starts, atol=1e-6)

    def test_captions_name_the_subjects_in_order(self, videos):
        for video in videos:
            annotations = annotations_of(video)
            subjects = [Identity(**thing["attributes"]) for thing in annotations["objects"]]
            assert [subject.category for subject in subjects] == [thing["name"] for thing in annotations["objects"]]
            caption = video.with_suffix(".txt").read_text().strip()
            assert caption == write_caption(subjects, annotations["background"])
            assert {subject.split for subject in subjects} == {"held_out"}

    def test_boxes_are_exactly_tight_around_the_masks(self, videos):
        for video in videos:
            annotations = annotations_of(video)
            assert annotations["schema"] == "data_pipeline.annotations/1"
            assert [frame["index"] for frame in annotations["frames"]] == list(range(6))
            for frame in annotations["frames"]:
                masks = [decode_mask(thing["mask_rle"]) for thing in frame["objects"]]
                assert [thing["box"] for thing in frame["objects"]] == [pixel_box(mask) for mask in masks]
                assert np.sum(masks, axis=0).max() <= 1, "a pixel belongs to one subject at most"


class TestSeeds:
    def test_equal_seeds_give_equal_bytes(self, folder, videos, tmp_path):
        """And a clip depends on its number, not on how many there are or which process wrote it."""
        write_clips(tmp_path, 2, seed=5, **(SETTINGS | {"workers": 1}))
        for path in sorted(tmp_path.glob("clip*")):
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name

    def test_other_seeds_give_other_clips(self, videos, tmp_path):
        [other] = write_clips(tmp_path, 1, seed=6, **SETTINGS)
        assert (frames_by_pyav(other) != frames_by_pyav(videos[0])).any()

    def test_clips_of_one_set_differ(self):
        clips = [
            sample_clip(np.random.default_rng([0, i]), num_subjects=1, size=32, num_frames=1) for i in range(40)
        ]  # fmt: skip
        assert {clip.background for clip in clips} == set(BACKGROUNDS)
        assert len({clip.subjects[0] for clip in clips}) == 40

    def test_a_second_call_goes_on_and_keeps_what_is_there(self, tmp_path):
        [first] = write_clips(tmp_path, 1, seed=5, **SETTINGS)
        written = first.stat().st_mtime_ns
        assert len(write_clips(tmp_path, 2, seed=5, **SETTINGS)) == 2
        assert first.stat().st_mtime_ns == written

    def test_a_folder_of_other_settings_is_refused(self, tmp_path):
        write_clips(tmp_path, 1, seed=5, **SETTINGS)
        with pytest.raises(FileExistsError, match=r"holds clips of other settings .* take another folder"):
            write_clips(tmp_path, 1, seed=6, **SETTINGS)


@pytest.fixture(scope="module")
def clips():
    return [sample_clip(np.random.default_rng(seed), size=64, num_frames=8) for seed in range(12)]


class TestSampleClip:
    def test_shapes(self, clips):
        for clip in clips:
            assert clip.frames.shape == (8, 64, 64, 3)
            assert clip.frames.dtype == np.uint8
            assert clip.masks.shape == (8, len(clip.subjects), 64, 64)

    def test_subjects_move(self, clips):
        """The first and the last frame must show a subject differently: they are a pair for training."""
        moved = []
        for clip in clips:
            for index in range(len(clip.subjects)):
                first, last = clip.masks[0, index], clip.masks[-1, index]
                if first.any() and last.any():
                    moved.append(np.abs(np.subtract(pixel_box(first), pixel_box(last))).max())
        assert np.mean(np.array(moved) >= 4) > 0.8

    def test_subjects_stay_in_the_frame_and_mostly_visible(self, clips):
        for clip in clips:
            areas = clip.masks.mean((2, 3))
            assert (areas > 0).all(0).mean() > 0.9
            assert not clip.masks[..., 0, :].any()
            assert not clip.masks[..., 0].any()

    def test_given_number_of_subjects(self):
        assert len(sample_clip(np.random.default_rng(0), num_subjects=3, size=32, num_frames=1).subjects) == 3

    def test_hidden_subject_is_absent_from_its_frame_only(self, clips):
        clip = clips[0]
        masks = clip.masks.copy()
        masks[2, 0] = False
        objects = [frame["objects"] for frame in annotate(type(clip)(**(vars(clip) | {"masks": masks})))["frames"]]
        assert [len(found) for found in objects] == [len(clip.subjects) - (i == 2) for i in range(8)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 63}, "even, at least 16 and at most 2048 pixels, got 63"),
        ({"size": 8}, "even, at least 16 and at most 2048 pixels, got 8"),
        ({"num_frames": 0}, "got 0 frames at 8 fps"),
        ({"fps": 0}, "got 6 frames at 0 fps|got 1 frames at 0 fps"),
        ({"num_subjects": 0}, "1 to 4 subjects, got 0"),
        ({"num_subjects": 5}, "1 to 4 subjects, got 5"),
        ({"split": "test"}, "split must be train, held_out or all"),
        ({"count": 0}, "count must be at least 1 and at most 1000000, got 0"),
    ],
)
def test_refuses_bad_settings_before_it_writes(tmp_path, change, message):
    arguments = {"count": 1} | SETTINGS | change
    with pytest.raises(ValueError, match=message):
        write_clips(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_encoding_keeps_the_picture(tmp_path):
    frames = np.stack([sample_clip(np.random.default_rng(0), size=64, num_frames=4).frames]).reshape(4, 64, 64, 3)
    write_video(tmp_path / "clip.mp4", frames, fps=4)
    difference = np.abs(frames_by_pyav(tmp_path / "clip.mp4").astype(int) - frames)
    assert difference.mean() < 6


def test_encoding_repeats_itself(tmp_path):
    """This clip made x264 write three different files in twelve calls while its mbtree was on."""
    clip = sample_clip(np.random.default_rng([5, 1]), split="held_out", size=64, num_frames=6)
    files = set()
    for _ in range(10):
        write_video(tmp_path / "clip.mp4", clip.frames, clip.fps)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1


def test_masks_are_encoded_as_the_pipeline_decodes_them():
    rng = np.random.default_rng(0)
    for mask in [rng.random((7, 5)) > 0.5, np.zeros((4, 6), bool), np.ones((4, 6), bool)]:
        np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


class TestCommand:
    def test_writes_clips(self, tmp_path, capsys):
        arguments = "--count 1 --size 32 --num-frames 2 --num-subjects 2 --workers 0 --split all --seed 3"
        assert main(["--out", str(tmp_path), *arguments.split()]) == 0
        assert "1 clips in" in capsys.readouterr().out
        assert len(annotations_of(tmp_path / "clip_000000.mp4")["objects"]) == 2

    def test_a_wrong_setting_is_one_line(self, tmp_path, capsys):
        assert main(["--out", str(tmp_path / "out"), "--size", "33"]) == 2
        assert capsys.readouterr().err == "error: size must be even, at least 16 and at most 2048 pixels, got 33\n"
