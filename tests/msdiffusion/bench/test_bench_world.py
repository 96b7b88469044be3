"""`msdiffusion bench world`: order of work, resuming, guards, and the whole way on the miniature stack."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msdiffusion import files
from msdiffusion.bench import work, world
from msdiffusion.bench.document import _short, comparisons, stacked_values
from msdiffusion.bench.rows import ROWS
from msdiffusion.bench.units import Settings, Unit, plan_units
from msdiffusion.bench.world import check_settings, finished_units
from msdiffusion.cli import main
from msdiffusion.errors import DataError, MSDiffusionError
from msdiffusion.evaluation.measures import MEASURES, summarize_measures
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


@pytest.fixture
def fake_model(tmp_path):
    """Folders with one file each where weights would be, and settings that point to them."""
    model = tmp_path / "model"
    for name in (*work.FROZEN, *work.INSTRUMENTS):
        (model / name).mkdir(parents=True)
        (model / name / "weights").write_bytes(b"weights")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "build.json").write_text("{}")
    for name in ("adapter.safetensors", "config.json"):
        (model / name).write_bytes(b"adapter")
    return Settings(**{**vars(SETTINGS), "model": str(model), "pairs": str(tmp_path / "pairs")})


def fake_training(monkeypatch, folder, steps, status=0):
    """Replaces `lightning fit` by something that leaves a checkpoint at a step."""
    import torch

    calls = []

    def run(command, **_):
        calls.append(command)
        (folder / "checkpoints").mkdir(exist_ok=True)
        torch.save({"global_step": steps}, folder / "checkpoints" / "last.ckpt")
        return type("Done", (), {"returncode": status})

    monkeypatch.setattr(work.subprocess, "run", run)
    return calls


def test_a_training_that_was_stopped_is_not_complete_but_gone_on_with(tmp_path, fake_model, monkeypatch):
    """Lightning ends without an error when it is told to stop."""
    folder = tmp_path / "row"
    settings = Settings(**{**vars(fake_model), "steps": 10})
    calls = fake_training(monkeypatch, folder, steps=4)
    with pytest.raises(MSDiffusionError, match="ended at step 4 of 10"):
        work.train(folder, Unit("ms_diffusion", 0), settings)
    assert not (folder / "training.json").exists()
    assert "--ckpt_path" not in calls[0]
    calls = fake_training(monkeypatch, folder, steps=10)
    work.train(folder, Unit("ms_diffusion", 0), settings)
    assert calls[0][-2:] == ["--ckpt_path", "last"]
    assert json.loads((folder / "training.json").read_text())["resumed"]
    work.train(folder, Unit("ms_diffusion", 0), settings)
    assert len(calls) == 1  # complete: not trained again
    fake_training(monkeypatch, tmp_path / "other", steps=10, status=1)
    (tmp_path / "other").mkdir()
    with pytest.raises(MSDiffusionError, match="training ended"):
        work.train(tmp_path / "other", Unit("ms_diffusion", 0), settings)


@pytest.mark.parametrize(
    ("changed", "name"),
    [("model/base/unet/weights", "frozen networks"), ("model/base/text_encoder/weights", "frozen networks"),
     ("pairs/build.json", "pairs")],
)  # fmt: skip
def test_a_training_on_something_else_is_not_taken_over(tmp_path, fake_model, monkeypatch, changed, name):
    folder = tmp_path / "row"
    fake_training(monkeypatch, folder, steps=1)
    work.train(folder, Unit("ms_diffusion", 0), fake_model)
    (tmp_path / changed).write_text("others")
    with pytest.raises(MSDiffusionError, match=f"trained on another state of: {name}"):
        work.train(folder, Unit("ms_diffusion", 0), fake_model)


def test_a_base_that_changes_during_the_training_is_noticed(tmp_path, fake_model, monkeypatch):
    folder = tmp_path / "row"
    calls = fake_training(monkeypatch, folder, steps=1)
    run = work.subprocess.run

    def and_change(command, **options):
        (tmp_path / "model" / "base" / "unet" / "weights").write_text("a newer base")
        return run(command, **options)

    monkeypatch.setattr(work.subprocess, "run", and_change)
    with pytest.raises(MSDiffusionError, match="changed while the row was trained"):
        work.train(folder, Unit("ms_diffusion", 0), fake_model)
    assert calls and not (folder / "training.json").exists()


def test_measures_depend_on_weights_configs_and_drawing(tmp_path, fake_model):
    unit = Unit("shipped", 0)
    first = work.fingerprint(tmp_path, unit, fake_model)
    assert first == work.fingerprint(tmp_path, unit, fake_model)
    assert first != work.fingerprint(tmp_path, unit, Settings(**{**vars(fake_model), "pictures": 4}))
    assert first != work.fingerprint(tmp_path, Unit("true_renders", 0), fake_model)
    for path in sorted(Path(fake_model.model).rglob("*")):
        if path.is_file():
            before = path.read_bytes()
            path.write_bytes(b"others")
            assert first != work.fingerprint(tmp_path, unit, fake_model), path
            path.write_bytes(before)


def test_stale_rows_and_missing_seeds_stay_out_of_the_table(tmp_path, fake_model, capsys):
    for seed in (0, 1):
        unit = Unit("shipped", seed)
        record = {"inputs": work.fingerprint(tmp_path, unit, fake_model), "training_seed": seed}
        files.write_json(unit.folder(tmp_path) / "measures.json", record)
    assert list(finished_units(tmp_path, fake_model, [0])) == ["shipped"]
    assert len(finished_units(tmp_path, fake_model, [0, 1])["shipped"]) == 1  # it has no training seeds
    (tmp_path / "rows" / "no_masks").mkdir()
    assert list(finished_units(tmp_path, fake_model, [0])) == ["shipped"]
    assert "no_masks, measured for 0 of 1" in capsys.readouterr().out
    (tmp_path / "model" / "locator" / "weights").write_text("another locator")
    assert finished_units(tmp_path, fake_model, [0]) == {}


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(MSDiffusionError, match=r"adapter\.safetensors cannot be read"):
        files.file_sha256(tmp_path / "adapter.safetensors")
    with pytest.raises(MSDiffusionError, match="missing or empty"):
        files.folder_sha256(tmp_path / "nothing")


def test_the_model_is_looked_at_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench", "world", "--model", str(tmp_path / "typo"), "--out", str(out)]) == 2
    assert "model_index.json is missing" in capsys.readouterr().err
    assert not out.exists()


def test_an_interruption_ends_the_units_and_their_trainings(tmp_path, monkeypatch):
    """The unit is a shell with a child of its own; both are gone afterwards."""
    import subprocess

    processes = []

    def start(unit, out, one_thread):
        processes.append(subprocess.Popen(["sh", "-c", "sleep 60 & wait"], start_new_session=True))
        assert running(processes[-1].pid)
        return processes[-1]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "_start", start)
    with monkeypatch.context() as patched:
        patched.setattr(world.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            world.work_through([Unit("no_masks", 0)], tmp_path, 1)
    assert processes[0].returncode is not None
    # Both have their signal; the one that nobody waits for may need a moment to get it.
    deadline = time.monotonic() + 10
    while running(processes[0].pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running(processes[0].pid)


def running(group):
    """Processes of a group that still do something; what nobody has collected yet (a zombie) does nothing."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = status.parent.name, status.read_text().rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(rest[2]) == group and rest[0] not in "ZX":
            found.append(pid)
    return found


def test_a_unit_that_can_not_be_done_says_so(tmp_path, capsys):
    files.write_json(tmp_path / "settings.json", vars(SETTINGS))
    assert work.main([str(tmp_path), "shipped", "0"]) == 2
    assert "error: " in capsys.readouterr().out


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
    values = {row: stacked_values(records) for row, records in finished.items()}
    text = "\n".join(comparisons(cases, values))
    better, worse = (next(line for line in text.splitlines() if line.startswith(f"| {ROWS[row].title}"))
                     for row in ("ip_adapter", "no_masks"))  # fmt: skip
    assert "pattern (+" in better.split("|")[2] and "pattern" not in better.split("|")[3]
    assert "pattern (-" in worse.split("|")[3]
    assert "does **not** win everywhere" in text and "in pattern it loses to: without masks" in text
    # less confusion is better: the row that shows it more often is the worse one
    assert "confusion" in worse.split("|")[2]
    assert comparisons(cases, {"no_masks": values["no_masks"]}) == []
    same = {"ms_diffusion": values["ms_diffusion"], "same_frame": values["ms_diffusion"]}
    text = "\n".join(comparisons(cases, same))
    assert "can not be told from: reference equals target" in text and "No row is better" in text


def test_values_of_training_seeds_are_stacked():
    cases = draw_cases(pictures=5, seed=1, size=32)
    rng = np.random.default_rng(0)
    records = [record_of(cases, 0.5, rng) for _ in range(3)]
    pattern = stacked_values(records)["pattern"]
    np.testing.assert_array_equal(pattern[1], records[1]["values"]["pattern"])
    assert pattern.shape[0] == 3
    assert np.isnan(stacked_values(records)["confusion"][:, 0]).all()
    # seeds that disagree widen the interval
    alone = summarize_measures(cases, {"pattern": pattern[:1]})["pattern"]
    assert summarize_measures(cases, {"pattern": pattern})["pattern"]["mean"] == pytest.approx(pattern.mean())
    runs = np.stack([np.zeros_like(pattern[0]), np.ones_like(pattern[0])])
    spread = summarize_measures(cases, {"pattern": runs})["pattern"]
    assert (spread["low"], spread["high"]) == (0, 1)
    assert alone["count"] == pattern.shape[1]


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


@pytest.mark.usefixtures("forked_processes")
def test_trains_draws_measures_and_goes_on_where_it_was(tmp_path, model_dir, masked_pairs_dir, monkeypatch):
    out, page = tmp_path / "out", tmp_path / "docs" / "table.md"
    arguments = [
        *("bench", "world", "--out", str(out), "--model", str(model_dir), "--pairs", str(masked_pairs_dir)),
        *("--steps", "2", "--train-batch", "4", "--pictures", "3", "--jobs", "2", "--document", str(page)),
    ]
    assert main([*arguments, "--rows", "same_frame", "true_renders"]) == 0
    folder = Unit("same_frame", 0).folder(out)
    assert json.loads((folder / "started.json").read_text())["arguments"]
    assert json.loads((folder / "training.json").read_text())["resumed"] is False
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
    settings = Settings(**json.loads((out / "settings.json").read_text()))
    assert list(finished_units(out, settings, [0])) == ["ms_diffusion", "same_frame", "adapter_off", "true_renders"]
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
