import hashlib
import os
from dataclasses import replace

import pytest

from data_pipeline.errors import ClipError, InputError, SettingsError
from data_pipeline.records import Rejected
from data_pipeline.sources import find_videos
from data_pipeline.steps import read_videos
from data_pipeline.steps.read_videos import ReadVideos


@pytest.fixture
def step():
    step = ReadVideos()
    step.setup()
    return step


def test_a_good_clip(step, write_clip, tmp_path):
    path = write_clip(tmp_path)
    [file] = find_videos(tmp_path)
    video = step.process(file)
    assert (video.facts.width, video.facts.height, len(video.facts.stamps)) == (96, 96, 12)
    assert video.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert video.reader in ("decord", "pyav")
    assert sorted(video.annotations.frames) == list(range(12))


@pytest.mark.parametrize("caption", [None, ""])
def test_no_caption(step, write_clip, tmp_path, caption):
    write_clip(tmp_path)
    [file] = find_videos(tmp_path)
    rejected = step.process(replace(file, caption=caption))
    assert rejected.reason == "no caption"
    assert "clip_000000.txt" in rejected.evidence["needed"]


def test_a_caption_file_that_is_unusable_is_told_and_what_was_assumed_is_a_note(step, write_clip, tmp_path):
    path = write_clip(tmp_path)
    path.with_suffix(".txt").write_bytes(b"\xd1\xee\xe1\xe0\xea\xe0")
    rejected = step.process(find_videos(tmp_path)[0])
    assert rejected.reason == "no caption"
    assert rejected.evidence["found"].startswith("caption file is neither UTF-8, UTF-16 nor Windows-1252")
    path.with_suffix(".txt").write_bytes(b"a dog in a caf\xe9")
    sidecar = path.with_name("clip_000000.annotations.json")
    sidecar.write_bytes(sidecar.read_bytes().replace(b"dog", b"d\xe9g"))
    video = step.process(find_videos(tmp_path)[0])
    assert video.caption == "a dog in a caf\u00e9"
    assert [note.partition(" is ")[0] for note in video.notes] == ["caption file", "annotations sidecar"]


def test_empty_file(step, write_clip, tmp_path):
    write_clip(tmp_path).write_bytes(b"")
    assert step.process(find_videos(tmp_path)[0]).reason == "empty file"


def test_vanished_file(step, write_clip, tmp_path):
    path = write_clip(tmp_path)
    [file] = find_videos(tmp_path)
    path.unlink()
    assert step.process(file).reason == "unreadable video"


def test_corrupt_file(step, write_clip, tmp_path):
    path = write_clip(tmp_path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ClipError) as error:
        step.process(find_videos(tmp_path)[0])
    assert error.value.reason in ("unreadable video", "undecodable video", "no video stream", "video without frames")


def test_no_annotations(step, write_clip, tmp_path):
    write_clip(tmp_path).with_name("clip_000000.annotations.json").unlink()
    rejected = step.process(find_videos(tmp_path)[0])
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "no annotations"


def test_annotations_are_not_looked_for_when_nobody_needs_them(write_clip, tmp_path):
    write_clip(tmp_path).with_name("clip_000000.annotations.json").unlink()
    step = ReadVideos(annotations=False)
    step.setup()
    assert step.process(find_videos(tmp_path)[0]).annotations is None


def test_wrong_settings(tmp_path):
    with pytest.raises(SettingsError, match="reader must be auto, decord or pyav, got 'cv2'"):
        ReadVideos(reader="cv2")
    with pytest.raises(InputError, match="no annotations file or folder at"):
        ReadVideos(annotations_file=tmp_path / "missing.json")


def test_a_caption_that_is_not_required(write_clip, tmp_path):
    write_clip(tmp_path)
    [file] = find_videos(tmp_path)
    step = ReadVideos(caption_required=False)
    step.setup()
    assert step.process(replace(file, caption=None)).caption == ""
    assert step.process(file).caption == "a dog and a teapot on the beach"
    assert step.settings()["caption_required"] is False


@pytest.mark.parametrize(
    ("make", "kind"),
    [(os.mkfifo, "pipe"), (os.mkdir, "folder"), (lambda path: path.symlink_to("/dev/null"), "device")],
)
def test_what_is_no_file_is_not_opened(step, write_clip, tmp_path, make, kind):
    path = write_clip(tmp_path)
    [file] = find_videos(tmp_path)
    path.unlink()
    make(path)
    assert step.process(file) == Rejected("not a regular file", {"kind": kind})


def test_a_folder_that_cannot_be_read(step, tmp_path, write_clip, monkeypatch):
    write_clip(tmp_path)
    file = replace(find_videos(tmp_path)[0], path=tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may read everything
    assert step.process(file) == Rejected("unreadable folder")


@pytest.mark.parametrize("target", ["nowhere", "clip_000000.mp4"])
def test_a_link_that_leads_nowhere(step, write_clip, tmp_path, target):
    path = write_clip(tmp_path)
    [file] = find_videos(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / target)
    assert step.process(file).reason == "unreadable video"


def test_a_name_too_long_for_a_sidecar(step, write_clip, tmp_path):
    path = write_clip(tmp_path)
    path.rename(tmp_path / f"{'x' * 251}.mp4")
    (tmp_path / f"{'x' * 251}.txt").write_text("a dog")
    assert step.process(find_videos(tmp_path)[0]).reason == "no annotations"


def test_a_file_that_may_not_be_read(step, write_clip, tmp_path, monkeypatch):
    write_clip(tmp_path)
    [file] = find_videos(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(read_videos, "hash_file", refuse)  # root may read everything
    assert step.process(file) == Rejected("unreadable video", {"error": "PermissionError: Permission denied"})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hdr": "clip"}, "hdr must be one of tonemap, reject, keep, got 'clip'"),
        ({"interlaced": "weave"}, "interlaced must be one of deinterlace, reject, keep, got 'weave'"),
    ],
)
def test_wrong_rules(setting, message):
    with pytest.raises(SettingsError, match=message):
        ReadVideos(**setting)
