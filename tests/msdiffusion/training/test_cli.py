"""The ``lightning`` command, in this process: what it does, leaves and says."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.loggers import CSVLogger

from msdiffusion.adapter.loading import find_adapter
from msdiffusion.errors import RequestError
from msdiffusion.training import cli
from msdiffusion.training.curves import read_curves
from msdiffusion.training.module import MSDiffusionModule

pytestmark = pytest.mark.usefixtures("loaded_once")

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def config(tiny_model_dir, pairs_dir, tmp_path_factory):
    """Function: folder of the run -> the path of a config for it."""

    def write(root):
        root.mkdir(parents=True, exist_ok=True)
        callbacks = {
            "RunProgress": {}, "RunCurves": {}, "AdapterExport": {"every_n_steps": 2},
            "ValidationPictures": {"every_n_steps": 2, "count": 1, "num_steps": 1},
            "RunCheckpoint": {"every_n_steps": 2},
        }  # fmt: skip
        record = {
            "seed_everything": 0,
            "trainer": {
                "default_root_dir": str(root), "accelerator": "cpu", "max_steps": 2, "val_check_interval": 2,
                "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "enable_model_summary": False,
                "log_every_n_steps": 1,
                "callbacks": [
                    {"class_path": f"msdiffusion.training.callbacks.{name}", "init_args": settings}
                    for name, settings in callbacks.items()
                ],
            },
            "model": {"class_path": "msdiffusion.training.module.MSDiffusionModule", "init_args": {
                "base_model": str(tiny_model_dir / "base"), "image_encoder": str(tiny_model_dir / "image_encoder"),
                "resampler": {"width": 32, "depth": 1, "heads": 2, "head_width": 16}, "learning_rate": 0.01,
                "defaults": {"steps": 1, "scale": 1.0},
            }},
            "data": {"class_path": "msdiffusion.training.datamodule.PairsDataModule", "init_args": {
                "pairs": str(pairs_dir), "resolution": 32, "batch_size": 4, "max_subjects": 2,
                "validation_fraction": 0.2,
            }},
        }  # fmt: skip
        (root / "config.yaml").write_text(yaml.safe_dump(record))
        return root / "config.yaml"

    return write


def lightning(command, config, *more):
    cli.main([command, "-c", str(config), *more])


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """The config of a run of two steps. Tests may read what is in its folder."""
    path = config(tmp_path_factory.mktemp("run"))
    lightning("fit", path)
    return path


def state(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_run_leaves_everything_in_its_folder(trained):
    names = {item.name for item in trained.parent.iterdir()} - {"predictions"}
    assert names == {
        "adapter",
        "best",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "lightning_logs",
        "metrics.csv",
        "pictures",
    }
    curves = read_curves(trained.parent / "metrics.csv")
    for name in ("training/loss", "training/learning_rate", "training/waiting_share", "training/samples_per_second",
                 "validation/loss", "validation/loss_in_boxes"):  # fmt: skip
        assert curves[name], name


@pytest.mark.parametrize("name", ["best", "last"])
def test_validate_and_test_measure_a_checkpoint(trained, capsys, name):
    lightning("validate", trained, "--ckpt_path", name)
    said = capsys.readouterr()
    validated = read_curves(trained.parent / "metrics.csv")["validation/loss"][-1][1]
    assert "validation/loss" in said.out
    assert str(validated)[:8] in said.out
    assert "6/6" in said.err or "100%" in said.err
    lightning("test", trained, "--ckpt_path", str(trained.parent / "checkpoints" / f"{name}.ckpt"))
    said = capsys.readouterr().out
    assert "test/loss" in said
    assert str(validated)[:8] in said


def test_predict_writes_pictures(trained, capsys):
    lightning("predict", trained, "--ckpt_path", "best")
    written = {path.name for path in (trained.parent / "predictions").iterdir()}
    assert "grid.png" in written
    assert len(written) > 2
    assert "pictures" in capsys.readouterr().err


def test_without_a_checkpoint_it_is_said_that_nothing_was_learned(trained, capsys):
    lightning("validate", trained)
    assert "note: validate without --ckpt_path" in capsys.readouterr().err


def test_a_resumed_run_follows_the_command_line(config, tmp_path, capsys, monkeypatch):
    """The old run's settings, which the checkpoint holds, used to win."""
    path, taken = config(tmp_path / "run"), []
    lightning("fit", path, "--model.init_args.decay", "linear")
    capsys.readouterr()
    original = MSDiffusionModule.training_step

    def step(self, *arguments):
        taken.append(self.optimizers().param_groups[0]["lr"])
        return original(self, *arguments)

    monkeypatch.setattr(MSDiffusionModule, "training_step", step)
    more = ["--trainer.max_steps", "4", "--model.init_args.learning_rate", "0.002", "--model.init_args.decay", "none"]
    with pytest.warns(UserWarning, match=r"is not that of the checkpoint .*step 3 takes 0\.002, not 0"):
        lightning("fit", path, "--ckpt_path", str(tmp_path / "run" / "checkpoints" / "last.ckpt"), *more)
    assert taken == pytest.approx([0.002, 0.002])
    said = capsys.readouterr().err
    assert "learning_rate was 0.01, now 0.002" in said
    assert "decay was linear, now none" in said
    assert state(tmp_path / "run")["global_step"] == 4
    curves = read_curves(tmp_path / "run" / "metrics.csv")["training/learning_rate"]
    assert [rate for _, rate in curves[2:]] == pytest.approx([0.002, 0.002])
    assert state(tmp_path / "run")["hyper_parameters"]["learning_rate"] == 0.002


def test_a_new_run_in_the_folder_of_another_says_so(config, tmp_path, capsys, monkeypatch):
    path = config(tmp_path / "run")
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *arguments, **named: None)
    lightning("fit", path)
    assert "note:" not in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    lightning("fit", path)
    assert "note: this is a new run: " in capsys.readouterr().err


def test_a_run_in_the_folder_of_another_is_not_taken_for_it(trained, tmp_path, capsys):
    """It ends before its first validation: then the other's best weights were said, given and drawn as its own."""
    root = tmp_path / "run"
    shutil.copytree(trained.parent, root)
    here = ("--trainer.default_root_dir", str(root))
    lightning("fit", trained, *here, "--trainer.max_steps", "1", "--model.init_args.learning_rate", "0.5")
    assert f"note: the adapter is in {root / 'adapter'}: MSDiffusion" in capsys.readouterr().err
    assert find_adapter(root) == root / "adapter"
    weights = [(folder / "adapter.safetensors").read_bytes() for folder in (root / "best.1", trained.parent / "best")]
    assert weights[0] == weights[1]
    assert [path.name for path in sorted((root / "pictures.1").iterdir())] == ["step_000002.png"]
    said = fails(2, capsys, "predict", trained, *here, "--ckpt_path", "best")
    assert "best.ckpt, which does not exist; there are" in said


@pytest.mark.parametrize(
    ("command", "changes", "told", "advice"),
    [
        ("fit", {"ema_decay": "0.9"}, "ema_decay was 0.0, now 0.9", r"--model\.init_args\.adapter .*/best$"),
        ("fit", {"resampler.width": "48", "resampler.depth": "2"},
         r"resampler\.width was 32, now 48; resampler\.depth was 1, now 2", "start a new adapter without"),
        ("fit", {"projector": "global"}, "projector was resampler, now global", "start a new adapter without"),
        ("fit", {"optimizer": "adamw_8bit"}, "optimizer was adamw, now adamw_8bit", "give the old value"),
        ("validate", {"ema_decay": "0.9"}, "ema_decay was 0.0, now 0.9", "give the old value"),
    ],
)  # fmt: skip
def test_settings_that_no_checkpoint_can_follow_are_refused_before_anything_is_loaded(
    trained, capsys, monkeypatch, command, changes, told, advice
):
    monkeypatch.setattr("msdiffusion.backbone.backbone.Backbone.from_pretrained", None)
    more = [part for name, value in changes.items() for part in (f"--model.init_args.{name}", value)]
    said = fails(2, capsys, command, trained, "--ckpt_path", "last", *more)
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert re.search(f"last.ckpt does not fit these settings: {told}: .*{advice}", line)
    assert len(line) < 400
    assert "Traceback" not in said


class RefusingLogger(CSVLogger):
    """Refuses what it is given."""

    def __init__(self, save_dir: str = "."):
        raise RequestError("no such project")


class NotThere:
    """A library that Lightning has looked for in vain."""

    def __bool__(self):
        return False

    def __str__(self):
        return "Requirement 'wandb>=0.12.10' not met. HINT: Try running `pip install -U 'wandb>=0.12.10'`"


def fails(code, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        lightning(*arguments)
    assert stop.value.code == code
    return capsys.readouterr().err


def test_wrong_demands_are_told_in_one_message(trained, config, tmp_path, capsys):
    empty = config(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    said = fails(2, capsys, "fit", empty, "--data.init_args.pairs", str(tmp_path / "nowhere"))
    assert "nowhere does not exist. Give one with --data.init_args.pairs, or make it" in said
    assert len(said.splitlines()) <= 5
    assert sorted(tmp_path.rglob("*")) == before, "a refused run leaves nothing"
    said = fails(2, capsys, "fit", empty, "--ckpt_path", "last")
    assert "error: --ckpt_path last needs" in said
    assert "Traceback" not in said
    kept = state(trained.parent)
    del kept["loops"]
    torch.save(kept, tmp_path / "cut.ckpt")
    said = fails(2, capsys, "fit", trained, "--ckpt_path", str(tmp_path / "cut.ckpt"))
    assert "cut.ckpt has no loops, so no run can go on from it: take another checkpoint, or start a new run" in said
    (tmp_path / "file").touch()
    for command in ("fit", "predict"):
        said = fails(2, capsys, command, trained, "--trainer.default_root_dir", str(tmp_path / "file" / "run"))
        assert "trainer.default_root_dir must be a folder, but" in said
    said = fails(2, capsys, "fit", trained, "--ckpt_path", "best")
    assert "best.ckpt holds weights alone, nothing to go on from: take --ckpt_path last" in said
    said = fails(2, capsys, "validate", trained, "--model.init_args.learning_rate", "-1")
    assert "error: learning_rate must be above 0, got -1" in said
    said = fails(2, capsys, "validate", trained, "--model.init_args.learning_rat", "1")
    assert "learning_rat" in said


@pytest.mark.parametrize("command", ["fit", "predict"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensor: torch.full_like(tensor, float("nan")), r"to_v\.weight holds \d+ of \d+ numbers that are NaN"),
        (lambda tensor: tensor.int(), r"to_v\.weight is int32: weights are floating-point numbers"),
        (
            lambda tensor: tensor[:1].clone().expand(tensor.shape),
            r"to_v\.weight is no plain tensor .* not all in the file",
        ),
        (lambda tensor: "text", r"to_v\.weight'? is a str: needed are tensors by name"),
    ],
)
def test_strange_weights_in_a_checkpoint_are_refused(trained, tmp_path, capsys, command, change, told):
    """A run used to go on with whole numbers, and to draw black pictures from NaN."""
    checkpoint = state(trained.parent)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("to_v.weight"))
    checkpoint["state_dict"][name] = change(checkpoint["state_dict"][name])
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    more = ("--trainer.default_root_dir", str(tmp_path))
    said = fails(2, capsys, command, trained, "--ckpt_path", str(tmp_path / "odd.ckpt"), *more)
    assert re.search(f"error: {tmp_path}/odd.ckpt: .*{told}", said)


@pytest.mark.parametrize("place", ["strategy", "logger", "callbacks"])
def test_what_a_constructor_refuses_is_told_in_its_own_words(trained, capsys, monkeypatch, place):
    """jsonargparse wraps it into the types that it has tried."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    more = {
        "strategy": ["-c", str(CONFIGS / "strategies" / "deepspeed.yaml")],
        "logger": ["--trainer.logger", f"{__name__}.RefusingLogger"],
        "callbacks": ["--trainer.callbacks+", "RunCheckpoint", "--trainer.callbacks.every_n_steps", "0"],
    }[place]
    if place == "strategy":
        trained = CONFIGS / "msd_sdxl.yaml"
    said = fails(2, capsys, "fit", trained, *more)
    [line] = [line for line in said.splitlines() if not line.startswith(("Seed set", "note:"))]
    reasons = {
        "strategy": "OffloadedAdapter needs DeepSpeed: pip install deepspeed",
        "logger": "no such project",
        "callbacks": "every_n_steps must be at least 1, got 0",
    }
    assert line.startswith(f"error: {reasons[place]}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--trainer.accelerator", "gpu"], "this run is for a GPU (trainer.accelerator), and torch finds none here: "),
        (["--trainer.logger", "WandbLogger"], "pytorch_lightning.loggers.WandbLogger needs wandb, which is not "),
        (["--trainer.max_steps", "many"], "trainer.max_steps must be a whole number, got many"),
        (["--model.init_args.decay", "slow"],
         "model.init_args.decay must be 'none', 'linear', 'linear_half', 'cosine', got slow"),
        (["--trainer.devices", "0"], "`Trainer(devices='0')` value is not a valid input using cpu accelerator."),
        (["--trainer.val_check_interval", "1.5"], "`val_check_interval` should be an integer"),
    ],
)  # fmt: skip
def test_what_others_say_of_wrong_settings_is_one_sentence(trained, capsys, monkeypatch, arguments, told):
    """It was 33 lines of traceback without a GPU, 85 without wandb, 60 of usage for a wrong value."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", NotThere())
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda *given, **named: None)
    said = [line for line in fails(2, capsys, "fit", trained, *arguments).splitlines() if "Seed set" not in line]
    [line] = [line for line in said if not line.startswith("note:")]
    assert line.startswith(f"error: {told}")


def test_a_wrong_name_is_told_before_anything_heavy_is_imported(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "msdiffusion.training.run.run_cli", None)
    said = fails(2, capsys, "fit", trained, "--trainer.max_stepss", "3")
    assert said == "error: unknown setting --trainer.max_stepss: did you mean --trainer.max_steps?\n"


@pytest.mark.parametrize(
    ("arguments", "interval", "told"),
    [
        ([], 2, ""),
        (["--trainer.accumulate_grad_batches", "2"], 4, ""),
        (["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "0.5",
          "--trainer.check_val_every_n_epoch", "1"], 0.5, ""),
        (["--trainer.num_nodes", "2"], 2, "waits until it is started on 1 more machine; on this one alone: --trainer."),
        (["--trainer.num_nodes", "3"], 2, "waits until it is started on 2 more machines; "),
    ],
)  # fmt: skip
def test_what_the_trainer_is_given(config, tmp_path, capsys, monkeypatch, arguments, interval, told):
    """Steps between two validations, whatever is accumulated; and nobody waits for other machines without a word."""
    seen = []
    monkeypatch.setattr("pytorch_lightning.Trainer.fit", lambda trainer, *given, **named: seen.append(trainer))
    lightning("fit", config(tmp_path / "run"), *arguments)
    said = capsys.readouterr().err
    assert seen[0].val_check_interval == interval
    assert (told in said) if told else ("num_nodes" not in said)


def test_a_traceback_can_be_had(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MSD_TRACEBACK", "1")
    with pytest.raises(RequestError, match="--ckpt_path last needs"):
        lightning("fit", config(tmp_path / "run"), "--ckpt_path", "last")


def during_step(monkeypatch, act):
    """``act()`` in the second step of a run."""
    original = MSDiffusionModule.training_step

    def step(self, batch, index):
        loss = original(self, batch, index)
        return loss if self.global_step < 1 else act(loss)

    monkeypatch.setattr(MSDiffusionModule, "training_step", step)


def test_a_loss_that_is_no_number_ends_the_command_with_one_message(config, tmp_path, capsys, monkeypatch):
    during_step(monkeypatch, lambda loss: loss * float("nan"))
    said = fails(1, capsys, "fit", config(tmp_path / "run"))
    assert "error: the loss is nan at step 2, epoch 0, learning rate 0.01; 4 samples of 32 x 32 pixels" in said
    assert "pairs clip_0" in said
    assert "Traceback" not in said


def test_memory_that_is_used_up_does_too(config, tmp_path, capsys, monkeypatch):
    def burst(loss):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    during_step(monkeypatch, burst)
    path = config(tmp_path / "run")
    said = fails(1, capsys, "fit", path, "--trainer.callbacks", "null")  # the guard is there all the same
    assert "error: the memory is used up at step 2" in said
    assert "Traceback" not in said


def test_a_signal_ends_the_command_with_its_state_written(config, tmp_path, capsys, monkeypatch):
    def stop(loss):
        """To the whole group, as a queue of jobs or a terminal does it, not by this process itself."""
        workers = [child.pid for child in multiprocessing.active_children()]
        assert len(workers) >= 2
        subprocess.run(["kill", "-TERM", *map(str, [*workers, os.getpid()])], check=True)
        return loss

    during_step(monkeypatch, stop)
    path = config(tmp_path / "run")
    more = ("--trainer.max_steps", "9", "--data.init_args.num_workers", "2")
    said = fails(143, capsys, "fit", path, *more)
    assert "stopped by SIGTERM after step 2; the last good checkpoint is" in said
    assert state(tmp_path / "run")["global_step"] == 2


def test_other_errors_keep_their_traceback(config, tmp_path, monkeypatch):
    def odd(loss):
        raise KeyError("odd")

    during_step(monkeypatch, odd)
    with pytest.raises(KeyError, match="odd"):
        lightning("fit", config(tmp_path / "run"))
