"""`msdiffusion bench world`: order of work, resuming, guards, and the whole way on the miniature stack."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiffusion.bench import work, world
from msdiffusion.bench.document import _short, comparisons, mean_values
from msdiffusion.bench.rows import ROWS
from msdiffusion.bench.world import Settings, Unit, check_settings, finished_units, plan_units
from msdiffusion.cli import main
from msdiffusion.errors import DataError, MSDiffusionError
from msdiffusion.evaluation.measures import MEASURES
from msdiffusion.evaluation.world import draw_cases

TINY = Path(__file__).parents[3] / "checkpoints" / "tiny"
SETTINGS = Settings(model="m", pairs="p", steps=1, train_batch=2, pictures=3, seed=0, draw_batch=2, precision="float32")


def test_a_row_brings_the_row_whose_adapter_it_draws_with():
    assert plan_units(["auto_layout"], [0]) == [Unit("ms_diffusion", 0), Unit("auto_layout", 0)]
    assert plan_units(["auto_layout", "ms_diffusion"], [0]) == [Unit("ms_diffusion", 0), Unit("auto_layout", 0)]
    assert plan_units(["no_masks"], [3]) == [Unit("no_masks", 3)]


def test_every_training_seed_is_a_unit_but_the_truth_is_measured_once():
    units = plan_units(["ms_diffusion", "true_renders", "shipped"], [0, 1])
    assert units == [Unit("ms_diffusion", 0), Unit("ms_diffusion", 1), Unit("true_renders", 0), Unit("shipped", 0)]


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    check_settings(tmp_path, SETTINGS)
    check_settings(tmp_path, SETTINGS)
    other = Settings(**{**vars(SETTINGS), "steps": 9, "seed": 4})
    with pytest.raises(DataError, match=r"steps: there 1, asked 9; seed: there 0, asked 4"):
        check_settings(tmp_path, other)


class FakeProcess:
    """Ends at the second poll with the status it was given."""

    def __init__(self, status):
        self.status, self.polls, self.returncode = status, 0, None

    def poll(self):
        self.polls += 1
        self.returncode = self.status if self.polls > 1 else None
        return self.returncode


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_units_wait_for_those_they_need(tmp_path, monkeypatch, jobs):
    started, running = [], []

    def start(unit, out, one_thread):
        alive = [u for u, process in running if process.returncode is None]
        assert unit.needs is None or unit.needs not in alive
        assert len(alive) < jobs
        assert one_thread == (jobs > 1)
        started.append(unit)
        running.append((unit, FakeProcess(0)))
        return running[-1][1]

    monkeypatch.setattr(world, "_start", start)
    monkeypatch.setattr(world.time, "sleep", lambda _: None)
    units = plan_units(["subject_masks", "auto_layout", "no_masks"], [0])
    world.work_through(units, tmp_path, jobs)
    assert sorted(started, key=units.index) == units


def test_a_failed_unit_ends_the_run_and_shows_its_log(tmp_path, monkeypatch):
    def start(unit, out, one_thread):
        folder = unit.folder(out)
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text("all was well\nuntil it wasn't\n")
        return FakeProcess(1)

    monkeypatch.setattr(world, "_start", start)
    monkeypatch.setattr(world.time, "sleep", lambda _: None)
    with pytest.raises(MSDiffusionError, match="(?s)row ms_diffusion failed.*until it wasn't"):
        world.work_through(plan_units(["ms_diffusion", "no_masks"], [0]), tmp_path, 1)
    assert not (tmp_path / "rows" / "no_masks").exists()


def test_the_last_words_of_a_log_are_its_newest_bar(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"a line\ntraining 1%\rtraining 2%\r")
    assert world._last_words(tmp_path) == "training 2%"
    assert world._last_words(tmp_path / "nothing") == "starting"


def test_a_training_on_another_base_is_not_taken_over(tmp_path):
    model = tmp_path / "model"
    for name in ("base/unet/diffusion_pytorch_model.safetensors", "image_encoder/model.safetensors"):
        (model / name).parent.mkdir(parents=True)
        (model / name).write_bytes(b"new weights")
    folder = tmp_path / "row"
    folder.mkdir()
    (folder / "training.json").write_text(json.dumps({"frozen": {"base": "old"}}))
    settings = Settings(**{**vars(SETTINGS), "model": str(model)})
    with pytest.raises(MSDiffusionError, match="trained on another base"):
        work.train(folder, Unit("ms_diffusion", 0), settings)


def test_measures_depend_on_weights_and_settings_of_drawing(tmp_path):
    names = (
        *("base/unet/diffusion_pytorch_model.safetensors", "adapter.safetensors"),
        *(f"{name}/model.safetensors" for name in ("judge", "locator", "recognizer")),
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"weights")
    settings = Settings(**{**vars(SETTINGS), "model": str(tmp_path)})
    first = work.fingerprint(tmp_path, settings, {})
    assert first == work.fingerprint(tmp_path, settings, {})
    assert first != work.fingerprint(tmp_path, settings, {"scale": 0.0})
    assert first != work.fingerprint(tmp_path, Settings(**{**vars(settings), "pictures": 4}), {})
    assert first != work.fingerprint(None, settings, None)
    for name in names:
        (tmp_path / name).write_bytes(b"others")
        assert first != work.fingerprint(tmp_path, settings, {})
        (tmp_path / name).write_bytes(b"weights")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(MSDiffusionError, match=r"adapter\.safetensors is missing"):
        work.hashes(tmp_path, ("adapter.safetensors",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "0"], "--pictures must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--draw-batch", "0"], "--draw-batch must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--training-seeds", "1", "1"], "must be different"),
    ],
)
def test_bad_numbers_are_refused_before_any_work(tmp_path, capsys, arguments, message):
    assert main(["bench", "world", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "world", "--rows", "magic"])
    assert "magic" in capsys.readouterr().err


def record_of(cases, level, rng):
    """A unit's record whose measures are right with probability `level`."""
    subjects = sum(len(case.subjects) for case in cases)
    values = {
        name: (rng.random(subjects if measure.per == "subject" else len(cases)) < level).astype(float).tolist()
        for name, measure in MEASURES.items()
    }
    values["confusion"][0] = None
    return {"training_seed": 0, "values": values}


def test_the_page_says_where_the_method_loses():
    cases = draw_cases(pictures=40, seed=1, size=32)
    rng = np.random.default_rng(0)
    finished = {
        "ms_diffusion": [record_of(cases, 0.5, rng)],
        "ip_adapter": [record_of(cases, 0.05, rng)],
        "no_masks": [record_of(cases, 0.95, rng)],
    }
    values = {row: mean_values(records) for row, records in finished.items()}
    text = "\n".join(comparisons(cases, values))
    better, worse = (next(line for line in text.splitlines() if line.startswith(f"| {ROWS[row].title}"))
                     for row in ("ip_adapter", "no_masks"))  # fmt: skip
    assert "pattern (+" in better.split("|")[2] and "pattern" not in better.split("|")[3]
    assert "pattern (-" in worse.split("|")[3]
    assert "does **not** win everywhere" in text and "in pattern it loses to: without masks" in text
    # less confusion is better: the row that shows it more often is the worse one
    assert "confusion" in worse.split("|")[2]
    assert comparisons(cases, {"no_masks": values["no_masks"]}) == []


def test_values_are_averaged_over_training_seeds():
    cases = draw_cases(pictures=5, seed=1, size=32)
    rng = np.random.default_rng(0)
    records = [record_of(cases, 0.5, rng) for _ in range(3)]
    mean = mean_values(records)["pattern"]
    np.testing.assert_allclose(mean, np.mean([record["values"]["pattern"] for record in records], axis=0))
    assert np.isnan(mean_values(records)["confusion"][0])


@pytest.mark.parametrize(("value", "text"), [(0.5, ".50"), (1.0, "1.00"), (0.0, ".00"), (-0.25, "-.25")])
def test_short_numbers(value, text):
    assert _short(value) == text


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, tiny_model_dir):
    """The miniature stack with the shipped instruments."""
    directory = tmp_path_factory.mktemp("bench_model")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    for name in ("judge", "locator", "recognizer"):
        shutil.copytree(TINY / name, directory / name)
    return directory


def test_trains_draws_measures_and_goes_on_where_it_was(tmp_path, model_dir, masked_pairs_dir, monkeypatch):
    out, page = tmp_path / "out", tmp_path / "docs" / "table.md"
    arguments = [
        *("bench", "world", "--out", str(out), "--model", str(model_dir), "--pairs", str(masked_pairs_dir)),
        *("--steps", "2", "--train-batch", "4", "--pictures", "3", "--jobs", "2", "--document", str(page)),
    ]
    assert main([*arguments, "--rows", "same_frame", "true_renders"]) == 0
    folder = Unit("same_frame", 0).folder(out)
    assert json.loads((folder / "training.json").read_text())["arguments"]
    measured = json.loads((folder / "measures.json").read_text())
    assert set(measured["values"]) == set(MEASURES)
    assert Image.open(folder / "pictures" / "0002.png").size == (64, 64)
    text = page.read_text()
    assert "| reference equals target |" in text and "| true renders |" in text
    assert Image.open(page.parent / "pictures" / "table.jpg").width > 300
    # Another row: what is there stays as it is, and MS-Diffusion's adapter is trained for the row that needs it.
    before = (folder / "measures.json").stat().st_mtime_ns
    assert main([*arguments, "--rows", "adapter_off", "same_frame"]) == 0
    assert (folder / "measures.json").stat().st_mtime_ns == before
    assert list(finished_units(out)) == ["ms_diffusion", "same_frame", "adapter_off", "true_renders"]
    assert "adapter off" in page.read_text()


def test_pairs_are_mined_where_there_are_none(tmp_path, monkeypatch):
    calls = []

    class Done:
        returncode = 0

    monkeypatch.setattr(world.subprocess, "run", lambda command, **_: calls.append(command) or Done())
    world.ensure_pairs(tmp_path / "pairs")
    assert [call[2] for call in calls] == ["data_pipeline.world", "data_pipeline.build"]
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "build.json").write_text("{}")
    world.ensure_pairs(tmp_path / "pairs")
    assert len(calls) == 2
    Done.returncode = 1
    with pytest.raises(MSDiffusionError, match=r"data_pipeline\.world failed"):
        world.ensure_pairs(tmp_path / "other")
