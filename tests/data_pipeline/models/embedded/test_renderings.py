import numpy as np
import pytest

from data_pipeline.errors import SettingsError
from data_pipeline.models.embedded import renderings
from data_pipeline.models.embedded.renderings import MIN_PIXELS, RenderSettings, render, sample_twins
from data_pipeline.records import mask_box

SETTINGS = RenderSettings(frames=10, size=48, seed=3)


def test_boxes_are_tight_around_the_masks(frames):
    rows, slots = np.nonzero(frames.traits[..., 0] >= 0)
    masks = frames.mask(rows, slots)
    assert len(masks) > 48
    assert masks.shape[1:] == (64, 64)
    assert (masks.sum((1, 2)) >= MIN_PIXELS).all()
    for mask, row, slot in zip(masks, rows, slots, strict=True):
        assert frames.boxes[row, slot] == pytest.approx(mask_box(mask))
    assert (frames.boxes[frames.traits[..., 0] < 0] == 0).all()


def test_some_frames_show_two_of_a_category_and_some_do_not(frames):
    twins = 0
    for row in frames.traits[..., 0]:
        there = row[row >= 0]
        twins += len(set(there)) < len(there)
    assert 3 <= twins <= 40


def test_a_seed_gives_the_same_frames_again_and_another_one_others(tmp_path):
    first = render(SETTINGS, tmp_path / "a", workers=0)
    second = render(SETTINGS, tmp_path / "b", workers=0)
    other = render(RenderSettings(frames=10, size=48, seed=4), tmp_path / "a", workers=0)
    for name in ("images", "boxes", "masks", "traits"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name
    assert not np.array_equal(first.images, other.images)


def test_frames_do_not_depend_on_how_many_follow(tmp_path, monkeypatch):
    monkeypatch.setattr(renderings, "CHUNK", 4)
    few = render(SETTINGS, tmp_path / "few", workers=0)
    many = render(RenderSettings(frames=14, size=48, seed=3), tmp_path / "many", workers=0)
    assert np.array_equal(few.images[:8], many.images[:8])


def test_finished_frames_are_read_back(tmp_path, monkeypatch):
    first = render(SETTINGS, tmp_path, workers=0)
    monkeypatch.setattr(renderings, "_render_chunk", None)
    assert np.array_equal(render(SETTINGS, tmp_path, workers=0).images, first.images)


def test_two_runs_that_render_the_same_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    render_chunk = renderings._render_chunk

    def slow(job):
        if not list(tmp_path.glob("frames-train-????????????")):
            monkeypatch.setattr(renderings, "_render_chunk", render_chunk)
            monkeypatch.setattr("os.getpid", lambda: 4242)
            render(SETTINGS, tmp_path, workers=0)
        return render_chunk(job)

    monkeypatch.setattr(renderings, "_render_chunk", slow)
    assert len(render(SETTINGS, tmp_path, workers=0)) == 10
    assert len(list(tmp_path.iterdir())) == 1


def test_twins_are_of_the_split_and_of_one_category():
    rng = np.random.default_rng(0)
    for _ in range(20):
        subjects = sample_twins(rng, "held_out")
        assert {one.split for one in subjects} == {"held_out"}
        assert len(subjects) - len({one.category for one in subjects}) == 1


@pytest.mark.parametrize("changes", [{"frames": 0}, {"size": 31}, {"size": 33}, {"twins": 1.5}, {"split": "test"}])
def test_settings_that_cannot_be_rendered(changes):
    with pytest.raises(SettingsError, match=str(next(iter(changes.values())))):
        RenderSettings(**changes)
