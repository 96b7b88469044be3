"""The demo: what it runs, what it refuses, what it clears; and once, small, from clips to page."""

import json
import shutil
import sys

import pytest

from msdiffusion.cli import main
from msdiffusion.commands import demo
from msdiffusion.errors import DataError, MSDiffusionError, WeightsError
from msdiffusion.places import CONFIGS, REPOSITORY, from_here


@pytest.fixture
def plan(tmp_path):
    model = REPOSITORY / "checkpoints" / "tiny"
    return demo.Plan(out=tmp_path / "demo", model=model, clips=3, train_steps=2, subjects=4, seed=5)


@pytest.fixture(scope="module")
def model_with_judge(tiny_model_dir, tmp_path_factory):
    """A copy of the miniature stack with an untrained judge."""
    import torch

    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.judge_training import world_params

    directory = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(tiny_model_dir, directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Judge(world_params(widths=(4, 8))).save_pretrained(directory / "judge")
    return directory


def test_commands_are_those_of_the_documents(plan):
    commands = {name: demo.readable(command) for name, command in demo.stage_commands(plan).items()}
    assert "-m data_pipeline.world --out" in commands["clips"]
    assert "--count 3 --split held_out --seed 5" in commands["clips"]
    assert f"-m data_pipeline.build --videos {plan.videos} --out {plan.pairs}" in commands["mining"]
    # what `lightning` is, wherever pip has put its script
    assert commands["fine-tuning"].startswith(
        f"python -m msdiffusion.training fit -c {from_here(CONFIGS / 'msd.yaml')} --trainer.default_root_dir "
    )


def test_paths_inside_the_working_directory_are_short(plan, monkeypatch):
    from dataclasses import replace

    monkeypatch.chdir(REPOSITORY)
    inside = replace(plan, out=REPOSITORY / "out" / "demo")
    assert "--videos out/demo/clips --out out/demo/pairs" in demo.readable(demo.stage_commands(inside)["mining"])
    fine_tuning = demo.readable(demo.stage_commands(inside)["fine-tuning"])
    assert " fit -c configs/msd.yaml " in fine_tuning
    assert "--model.init_args.adapter checkpoints/tiny " in fine_tuning
    assert "--data.init_args.pairs out/demo/pairs --data.init_args.batch_size 1 " in fine_tuning


def test_model_without_a_judge_is_named(tiny_model_dir):
    with pytest.raises(WeightsError, match="judge/model.safetensors is missing"):
        demo.check_model(tiny_model_dir)


def test_an_earlier_demo_is_cleared_and_nothing_else(tmp_path):
    out = tmp_path / "demo"
    demo.clear(out)
    (out / "pairs").mkdir()
    (out / "scores.json").write_text("{}")
    demo.clear(out)
    assert [entry.name for entry in out.iterdir()] == [demo.MARKER]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="no demo made it"):
        demo.clear(foreign)
    assert (foreign / "thesis.txt").read_text() == "mine"


def test_a_failing_command_stops_the_demo_and_is_named(capfd):
    with pytest.raises(MSDiffusionError, match="status 3.*-c 'raise SystemExit"):
        demo.call([sys.executable, "-c", "raise SystemExit(3)"])
    assert "$ python" in capfd.readouterr().out
    with pytest.raises(MSDiffusionError, match="killed by signal 15"):
        demo.call([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"])
    with pytest.raises(MSDiffusionError, match="could not start"):
        demo.call(["no-such-program-here"])


def test_fine_tuning_without_a_result_is_an_error(plan):
    with pytest.raises(MSDiffusionError, match="without an adapter"):
        demo.fine_tune(plan, [sys.executable, "-c", ""])


def test_stages_tell_what_runs_and_what_is_left(capsys):
    done = []
    stages = [demo.Stage("first", 10, lambda: done.append(1)), demo.Stage("second", 20, lambda: done.append(2))]
    demo.run_stages(stages)
    printed = capsys.readouterr().out
    assert done == [1, 2]
    assert "[1/2] first (about 10 s; 30 s to go" in printed
    assert "[2/2] second (about 20 s; 20 s to go" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_small_demo_from_clips_to_page(model_with_judge, tmp_path, capfd):
    """The real commands, on the miniature stack with random weights. Twice the same folder: a rerun must work."""
    out = tmp_path / "demo"
    demo.clear(out)
    (out / "scores.json").write_text("left by an earlier demo")
    arguments = ["--model", str(model_with_judge), "--clips", "6", "--train-steps", "2", "--subjects", "4"]
    assert main(["demo", "--out", str(out), *arguments]) == 0, capfd.readouterr().err
    scores = json.loads((out / "scores.json").read_text())
    assert scores["subjects"] >= 4
    assert set(scores["questions"]["color"]["conditions"]) == {
        "adapter_on",
        "fine_tuned",
        "adapter_off",
        "true_renders",
    }
    assert scores["model"]["sha256"] != scores["fine_tuned model"]["sha256"]
    for name in ("index.html", "grid.png", "pairs/report.html", "pairs/build.json", "fine_tuning/adapter/config.json"):
        assert (out / name).is_file(), name
    assert "[4/4]" in capfd.readouterr().out
