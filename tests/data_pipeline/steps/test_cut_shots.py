from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.errors import SettingsError
from data_pipeline.records import Annotations, Rejected
from data_pipeline.sources import find_videos
from data_pipeline.steps.cut_shots import CutShots
from data_pipeline.steps.read_videos import ReadVideos


def process(step, folder):
    read = ReadVideos(annotations=False)
    for each in (read, step):
        each.setup()
    return step.process(read.process(find_videos(folder)[0]))


def test_a_video_without_a_cut_is_one_shot(write_clip, tmp_path):
    write_clip(tmp_path)
    [shot] = process(CutShots(), tmp_path).shots
    assert (shot.first, shot.last, shot.start, shot.end) == (0, 11, 0.0, 1.375)


@pytest.fixture
def film(tmp_path, write_clip, draw_clip, write_video):
    """Two scenes of 12 and 8 frames, and a fade through black of 12 frames to a third one, of 6 before and after."""
    scenes = [draw_clip((name,), seed=seed, num_frames=12)[0] for seed, name in enumerate(("dog", "teapot", "fish"))]
    scenes[1] = 255 - scenes[1]
    away = np.linspace(0, 1, 6)[:, None, None, None]
    parts = [scenes[0], scenes[1][:8], scenes[1][:6] * (1 - away), scenes[2][:6] * away, scenes[2][6:]]
    write_video(tmp_path / "film.mp4", np.concatenate(parts).astype(np.uint8))
    (tmp_path / "film.txt").write_text("a dog on the beach")
    return tmp_path


def test_shots_of_a_film_with_a_cut_and_a_fade(film):
    shots = process(CutShots(), film).shots
    assert [(shot.first, shot.last) for shot in shots[:1]] == [(0, 11)]
    assert len(shots) == 3
    assert shots[1].first == 12
    assert 24 <= shots[2].first <= 27
    assert shots[2].last == 37
    assert shots[2].start == shots[2].first / 8


def test_no_fades_are_looked_for_at_level_0(film):
    assert [shot.first for shot in process(CutShots(fade_level=0), film).shots] == [0, 12]


def test_later_frames_are_not_used(write_clip, tmp_path):
    write_clip(tmp_path)
    [shot] = process(CutShots(max_frames=5), tmp_path).shots
    assert (shot.first, shot.last) == (0, 4)


def test_a_single_frame(write_clip, tmp_path):
    write_clip(tmp_path, num_frames=1)
    rejected = process(CutShots(), tmp_path)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "a single frame"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cut_ratio": 0.5}, "cut_ratio must be at least 1, got 0.5"),
        ({"min_content": 0}, r"min_content must lie in \(0, 255\], got 0"),
        ({"fade_level": 128}, r"fade_level must lie in 0..127, got 128"),
        ({"thumbnail": 4}, "thumbnail must be at least 8"),
        ({"max_frames": 1}, "and max_frames 2, got 32 and 1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingsError, match=message):
        CutShots(**settings)


@pytest.fixture
def letterboxed(tmp_path, write_clip, draw_clip, write_video):
    """Two scenes of 12 frames between black bars: 16 lines above and below, or columns at the sides."""

    def write(sides=False, slides=False):
        scenes = [draw_clip((name,), seed=seed, num_frames=12)[0] for seed, name in enumerate(("dog", "teapot"))]
        scenes[1] = 255 - scenes[1]
        if slides:
            scenes = [scene[:1].repeat(12, axis=0) for scene in scenes]
        edge, none = (16, 16), (0, 0)
        pictures = np.pad(np.concatenate(scenes), (none, none if sides else edge, edge if sides else none, none))
        write_video(tmp_path / "film.mp4", pictures)
        (tmp_path / "film.txt").write_text("a dog on the beach")
        return tmp_path

    return write


@pytest.mark.parametrize("sides", [False, True])
def test_black_bars_are_cut_off(letterboxed, sides):
    found = process(CutShots(), letterboxed(sides))
    assert [(shot.first, shot.last) for shot in found.shots] == [(0, 11), (12, 23)]
    facts = found.video.facts
    assert facts.bars == pytest.approx((16, 0, 16, 0) if sides else (0, 16, 0, 16), abs=1)
    assert found.notes == ("black bars, cut off",)
    from data_pipeline.models.video_reader import open_reader

    [picture] = open_reader("pyav", found.video.file.path, facts).frames((3,))
    assert picture.shape == (facts.height, facts.width, 3)
    assert min(picture[0].mean(), picture[-1].mean(), picture[:, 0].mean(), picture[:, -1].mean()) > 40


def test_a_slideshow_is_cut_between_its_slides(letterboxed):
    found = process(CutShots(), letterboxed(slides=True))
    assert [(shot.first, shot.last) for shot in found.shots] == [(0, 11), (12, 23)]


def test_annotations_are_of_the_picture_with_its_bars(letterboxed, tmp_path):
    read = ReadVideos(annotations=False)
    step = CutShots()
    for each in (read, step):
        each.setup()
    video = replace(read.process(find_videos(letterboxed())[0]), annotations=Annotations(frames={}))
    said = replace(video, annotations=None, notes=("said before",))
    assert step.process(said).notes == ("said before", "black bars, cut off")
    rejected = step.process(video)
    assert rejected.reason == "black bars round the picture"
    assert rejected.evidence["needed"] == "annotated clips without"


def test_what_was_noted_before_is_not_lost(letterboxed):
    read, step = ReadVideos(annotations=False), CutShots()
    for each in (read, step):
        each.setup()
    video = read.process(find_videos(letterboxed())[0])
    found = step.process(replace(video, notes=("a caption in Windows-1252",)))
    assert found.notes == ("a caption in Windows-1252", "black bars, cut off")


def test_an_ordinary_clip_keeps_its_facts(write_clip, tmp_path):
    write_clip(tmp_path)
    read = ReadVideos(annotations=False)
    read.setup()
    video = read.process(find_videos(tmp_path)[0])
    found = process(CutShots(), tmp_path)
    assert (found.video, found.notes) == (video, ())
