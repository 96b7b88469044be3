import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msdiffusion.cli import main
from msdiffusion.errors import RequestError
from msdiffusion.generation import folder as batch
from msdiffusion.generation.generate import MSDiffusion
from msdiffusion.generation.identity import identify
from msdiffusion.request.provenance import read_record
from msdiffusion.request.request_file import check_entry

HOOKS = {"safety_checker": None, "watermark": None}
BOX = (0, 0, 1, 1)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return MSDiffusion.from_pretrained(tiny_model_dir, device="cpu")


@pytest.fixture(scope="module")
def identity(tiny_model_dir):
    return identify(str(tiny_model_dir), None, None, "float32")


@pytest.fixture
def folder(tmp_path):
    for name in ("red", "blue", "green"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    return tmp_path


def entry(folder, name, **changes):
    arguments = {"images": ["red.png"], "boxes": [BOX], "phrases": ["dog"], "prompt": "a dog", "seed": 0, **changes}
    return check_entry(arguments, folder, name, name)


def entries(folder):
    """Nine pictures, of three kinds."""
    return [
        entry(folder, "a", num_images=3),
        entry(folder, "b", images=["blue.png"], prompt="a red dog", seed=9),
        entry(folder, "c", width=48, height=40),
        entry(folder, "d", images=[["green.png", "red.png"]], seed=3, num_images=2),
        entry(folder, "e", images=["green.png"], boxes=None, prompt="the dog", scale=0.5, seed=5),
        entry(folder, "f", images=["green.png"], prompt="the cat and a dog", subject_windows=[[0, 0.5]], seed=6),
    ]


def planned(folder, identity, out="out", chosen=None, **options):
    return batch.plan(entries(folder) if chosen is None else chosen, folder / out, identity, HOOKS, **options)


def draw(model, pictures, size=2, on_picture=lambda picture: None):
    batch.draw(model, batch.in_batches(pictures, size), on_picture)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_plan(folder, identity):
    pictures = planned(folder, identity)
    names = ["a_0", "a_1", "a_2", "b", "c", "d_0", "d_1", "e", "f"]
    assert [picture.path for picture in pictures] == [folder / "out" / f"{name}.png" for name in names]
    assert [picture.arguments["seed"] for picture in pictures] == [0, 1, 2, 9, 0, 3, 4, 5, 6]
    assert all(picture.arguments["num_images"] == 1 for picture in pictures)
    request = pictures[0].record["request"]
    assert (request["steps"], request["scale"], request["guidance_scale"]) == (3, 0.8, 3.0), "the adapter's own"
    assert (request["negative_prompt"], request["auto_layout"], request["height"]) == (None, False, None)
    assert pictures[0].record["left_out"] == ["height", "width"]
    assert pictures[4].record["left_out"] == []


def test_batches_hold_one_kind_and_stay_the_same(folder, identity):
    pictures = planned(folder, identity)
    cut = batch.in_batches(pictures, 2)
    assert [[picture.path.stem for picture in part] for part in cut] == [
        ["a_0", "a_1"], ["a_2", "b"], ["f"], ["c"], ["d_0", "d_1"], ["e"],
    ]  # fmt: skip
    (folder / "out").mkdir()
    marked = batch.without_finished(pictures)
    assert [len(part) for part in batch.in_batches(marked, 2)] == [len(part) for part in cut]


def test_a_seed_that_nobody_chose(folder, identity):
    one, two = planned(folder, identity, chosen=[entry(folder, "x", seed=None, num_images=2)])
    assert one.record["request"]["seed"] is None
    assert two.arguments["seed"] == one.arguments["seed"] + 1


def test_every_picture_tells_what_it_is(model, folder, identity):
    told = []
    draw(model, planned(folder, identity), on_picture=told.append)
    assert len(told) == len({picture.path for picture in told}) == 9
    record = read_record(folder / "out" / "b.png")
    assert (record["request"]["seed"], record["request"]["prompt"]) == (9, "a red dog")
    assert (record["request"]["width"], record["request"]["height"]) == (64, 64)
    assert record["batch"] == {"size": 2, "position": 1}
    assert record["made_with"]["torch"] == torch.__version__
    assert record["made_with"]["device"] == "cpu"
    assert {"processor", "arithmetic"} <= set(record["made_with"])
    assert record["model"]["adapter_sha256"] == identity.model["adapter_sha256"]
    assert Image.open(folder / "out" / "c.png").size == (48, 40)


def test_each_picture_is_the_one_that_generate_draws(model, folder, identity):
    draw(model, planned(folder, identity), size=4)
    request = entries(folder)[0].arguments
    alone = model.generate(**{**request, "num_images": 1, "seed": 2}, progress=False)[0]
    ours = np.asarray(Image.open(folder / "out" / "a_2.png")).astype(int)
    assert abs(ours - np.asarray(alone)).max() <= 1


class Killed(BaseException):
    """Nobody catches this."""


@pytest.mark.parametrize("survivors", range(8))
def test_a_killed_run_goes_on_where_it_stopped(model, folder, identity, survivors, whole_run):
    count = 0

    def kill(picture):
        nonlocal count
        count += 1
        if count > survivors:
            raise Killed

    with pytest.raises(Killed):
        draw(model, planned(folder, identity), on_picture=kill)
    assert len(contents(folder / "out")) == survivors + 1, "each is written before it is told"
    pictures = batch.without_finished(planned(folder, identity))
    assert sum(picture.wanted for picture in pictures) == 8 - survivors
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    draw(model, pictures)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was there is not written again"
    assert contents(folder / "out") == whole_run


@pytest.fixture(scope="module")
def whole_run(model, identity, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    for name in ("red", "blue", "green"):
        Image.new("RGB", (16, 16), name).save(folder / f"{name}.png")
    draw(model, planned(folder, identity))
    return contents(folder / "out")


def test_a_kill_while_a_file_is_written(model, folder, identity, monkeypatch, whole_run):
    save = Image.Image.save

    def torn(self, path, *arguments, **options):
        save(self, path, *arguments, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise Killed

    monkeypatch.setattr(Image.Image, "save", torn)
    with pytest.raises(Killed):
        draw(model, planned(folder, identity))
    monkeypatch.undo()
    assert not list((folder / "out").glob("[a-z]*.png"))
    draw(model, batch.without_finished(planned(folder, identity)))
    assert contents(folder / "out") == whole_run


def test_what_is_there_already(model, folder, identity):
    draw(model, planned(folder, identity))
    finished = batch.without_finished(planned(folder, identity))
    assert not any(picture.wanted for picture in finished)
    draw(model, finished, on_picture=lambda picture: pytest.fail("drawn"))
    chosen = [entry(folder, "b", images=["blue.png"], prompt="a red dog", seed=None)]
    [any_seed] = batch.without_finished(planned(folder, identity, chosen=chosen))
    assert not any_seed.wanted
    (folder / "out" / "a_1.png").unlink()
    missing = [picture.path.stem for picture in batch.without_finished(planned(folder, identity)) if picture.wanted]
    assert missing == ["a_1"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: Image.new("RGB", (16, 16), "white").save(folder / "blue.png"), r"b.png \(another request\)"),
        (lambda folder: (folder / "out" / "b.png").write_bytes(b"x"), r"b.png \(no picture of this command\)"),
    ],
)
def test_others_are_not_overwritten_unasked(model, folder, identity, spoil, reason):
    draw(model, planned(folder, identity))
    spoil(folder)
    with pytest.raises(RequestError, match=f"there already, but not from this request and model: .*{reason}; --over"):
        batch.without_finished(planned(folder, identity))
    pictures = batch.without_finished(planned(folder, identity), overwrite=True)
    assert [picture.path.stem for picture in pictures if picture.wanted] == ["b"]
    draw(model, pictures)
    assert not any(picture.wanted for picture in batch.without_finished(planned(folder, identity)))


def test_pictures_of_another_model_are_others(model, folder, identity, tiny_model_dir):
    draw(model, planned(folder, identity))
    half = identify(str(tiny_model_dir), None, None, "float16")
    with pytest.raises(
        RequestError, match=r"a_0.png \(another model\), .*a_2.png \(another model\) and 6 more; --over"
    ):
        batch.without_finished(planned(folder, half))


@pytest.mark.exact
def test_a_picture_repeated_in_its_batch_is_the_same_to_the_last_bit(model, folder, identity):
    draw(model, planned(folder, identity), size=3)
    for name in ("a_1", "b", "d_1", "e", "f"):
        record = read_record(folder / "out" / f"{name}.png")
        [again] = [picture for picture in planned(folder, identity, out="again") if picture.path.stem == name]
        batch.draw(model, [batch.repeated(again, **record["batch"])], lambda picture: None)
        assert (folder / "again" / f"{name}.png").read_bytes() == (folder / "out" / f"{name}.png").read_bytes()


def test_a_reference_changed_during_the_run(model, folder, identity):
    pictures = planned(folder, identity)
    Image.new("RGB", (16, 16), "white").save(folder / "green.png")
    with pytest.raises(RequestError, match="green.png was changed since the run began"):
        draw(model, pictures)
    assert "a_0.png" in contents(folder / "out")


def test_a_reference_too_large_to_embed_names_its_request(folder, identity, monkeypatch):
    monkeypatch.setattr("msdiffusion.request.provenance.MAX_EMBEDDED_BYTES", 10)
    with pytest.raises(RequestError, match="a: the references have more than"):
        planned(folder, identity, embed=True)


def test_hooks_see_every_picture_and_flags_are_recorded(model, folder, identity, monkeypatch):
    def black(pictures):
        for picture in pictures:
            picture.info["flagged"] = True
        return pictures

    monkeypatch.setattr(model, "picture_hooks", [black])
    draw(model, planned(folder, identity, chosen=[entry(folder, "a")]))
    assert read_record(folder / "out" / "a.png")["flagged"] is True


def test_other_formats_have_no_record(model, folder, identity):
    draw(model, planned(folder, identity, chosen=[entry(folder, "a")], suffix=".JPG"))
    assert Image.open(folder / "out" / "a.JPG").format == "JPEG"


def test_a_subject_that_would_never_find_its_place(folder, identity):
    late = entry(folder, "late", boxes=None, auto_layout_start=4)
    with pytest.raises(RequestError, match="late: a subject without a box .* starts at step 4, but there are 3 steps"):
        planned(folder, identity, chosen=[late])
    planned(folder, identity, chosen=[entry(folder, "in_time", boxes=None, auto_layout_start=4, steps=4)])


def test_a_sampler_of_two_calls_per_step_gives_a_subject_more_time(folder, tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    path = tmp_path / "model" / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "HeunDiscreteScheduler"}))
    heun = identify(str(tmp_path / "model"), None, None, "float32")
    planned(folder, heun, chosen=[entry(folder, "x", boxes=None, auto_layout_start=4)])
    with pytest.raises(RequestError, match="starts at step 7, but there are 6"):
        planned(folder, heun, chosen=[entry(folder, "x", boxes=None, auto_layout_start=7)])


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_a_real_kill(folder, tiny_model_dir):
    """SIGKILL in the middle, then the same command again: the same files as of a run that nobody disturbed."""
    lines = [
        "defaults: {images: [red.png], boxes: [[0, 0, 1, 1]], phrases: [dog], steps: 20}",
        "pictures:",
        *(f"- {{prompt: a dog, seed: {seed}}}" for seed in range(12)),
    ]
    (folder / "requests.yaml").write_text("\n".join(lines))

    def arguments(out):
        return [
            "generate", "--request", str(folder / "requests.yaml"), "--out", str(folder / out), "--quiet",
            "--model", str(tiny_model_dir), "--device", "cpu", "--batch-size", "2",
        ]  # fmt: skip

    process = subprocess.Popen([sys.executable, "-m", "msdiffusion.cli", *arguments("killed")])
    end = time.monotonic() + 60
    while not list((folder / "killed").glob("0*.png")) and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = len(list((folder / "killed").glob("0*.png")))
    assert 0 < there < 12
    assert main(arguments("killed")) == main(arguments("whole")) == 0
    assert len(contents(folder / "whole")) == 12
    finished = {name: content for name, content in contents(folder / "killed").items() if name[0] != "."}
    assert finished == contents(folder / "whole")
