import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.cli import LightningCLI

from msdiffusion.errors import RequestError, WeightsError
from msdiffusion.training.run.run_cli import RunCLI, differences, find_checkpoint, read_settings


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    return folder.parent


def touch(root, name):
    path = root / "checkpoints" / name
    path.touch()
    return path


@pytest.mark.parametrize("fit", [True, False])
def test_names_are_files_of_the_runs_directory(root, fit):
    for name in ("last", "best"):
        path = touch(root, f"{name}.ckpt")
        assert find_checkpoint(name, str(root), fit) == path


def test_without_a_directory_they_are_looked_for_here(root, monkeypatch):
    touch(root, "last.ckpt")
    monkeypatch.chdir(root)
    assert find_checkpoint("last", None, fit=True) == Path("checkpoints/last.ckpt")


def test_auto_is_last_where_there_is_one(root):
    assert find_checkpoint("auto", str(root), fit=True) is None
    assert find_checkpoint("auto", str(root), fit=True) is None
    path = touch(root, "last.ckpt")
    assert find_checkpoint("auto", str(root), fit=True) == path
    with pytest.raises(RequestError, match="auto is for fit alone"):
        find_checkpoint("auto", str(root), fit=False)


def test_what_a_kill_between_two_renames_has_left_is_found(root):
    path = touch(root, "last.ckpt.old")
    assert find_checkpoint("last", str(root), fit=True) == path


def test_a_file_is_taken_as_it_is(root, tmp_path):
    path = touch(root, "other.ckpt")
    assert find_checkpoint(str(path), None, fit=True) == path


@pytest.mark.parametrize(
    ("name", "fit", "message"),
    [
        ("last", True, r"--ckpt_path last needs .*last\.ckpt.*no checkpoint in .*checkpoints.*default_root_dir.*auto"),
        ("best", False, r"--ckpt_path best needs .*best\.ckpt.*default_root_dir.*meant\)$"),
        ("no.ckpt", False, r"--ckpt_path no\.ckpt is no file, which does not exist"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told(root, name, fit, message):
    with pytest.raises(RequestError, match=message):
        find_checkpoint(name, str(root), fit)


def test_the_folder_of_an_adapter_is_no_checkpoint(tmp_path):
    (tmp_path / "adapter.safetensors").touch()
    with pytest.raises(RequestError, match="is the folder of an adapter.*--model.init_args.adapter"):
        find_checkpoint(str(tmp_path), None, fit=True)


def test_those_that_are_there_are_named(root):
    path = touch(root, "last.ckpt")
    with pytest.raises(
        RequestError, match=f"there are {path}; the best weights are written at the first validation .* take last$"
    ):
        find_checkpoint("best", str(root), fit=False)


def test_settings_are_read_without_the_tensors(tmp_path):
    path = tmp_path / "a.ckpt"
    record = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": {"learning_rate": 0.1}, "global_step": 5}
    torch.save(record, path)
    settings = {"settings": {"learning_rate": 0.1}, "adapter_config": None, "weights_only": True, "step": 5}
    assert read_settings(path) == {
        **settings,
        "lacks": ["pytorch-lightning_version", "epoch", "loops", "optimizer_states", "lr_schedulers"],
    }
    torch.save({**record, "optimizer_states": []}, path)
    assert not read_settings(path)["weights_only"]


def test_what_is_no_checkpoint_is_told(tmp_path):
    path = tmp_path / "a.ckpt"
    for content in ({"a": 1}, [1]):
        torch.save(content, path)
        with pytest.raises(WeightsError, match="lacks its state_dict"):
            read_settings(path)
    path.write_text("text")
    with pytest.raises(WeightsError, match="no checkpoint that can be read"):
        read_settings(path)


def test_settings_that_differ_are_named_with_both_values():
    saved = {
        "_class_path": "a.Model",
        "learning_rate": 0.1,
        "sizes": (1, 2),
        "old": 1,
        "resampler": {"width": 3, "x": None},
    }
    same = {"class_path": "a.Model", "init_args": {"learning_rate": 0.1, "sizes": [1, 2], "resampler": {"width": 3}}}
    assert differences(saved, same) == []
    other = {"class_path": "b.Model", "init_args": {"learning_rate": 0.2, "sizes": [1, 2], "new": 5}}
    assert differences(saved, other) == ["class was a.Model, now b.Model", "learning_rate was 0.1, now 0.2"]
    assert differences({}, other) == []


@pytest.fixture
def refused(root, monkeypatch):
    """Function: names of the files that are logged -> what is left in the run's folder by a run refused at a step.

    ``before`` is what another process does after this one has made its loggers; ``step`` where the run ends.
    """

    def run(*names, before=lambda folder: None, step=0):
        folder = root / "lightning_logs" / "version_0"

        class Logger:
            log_dir = str(folder)

        def fail(command, subcommand):
            assert folder.is_dir(), "made before the run begins, so that others take the next number"
            for name in names:
                (folder / name).touch()
            raise RequestError("no such pairs")

        monkeypatch.setattr(LightningCLI, "_run_subcommand", fail)
        command = RunCLI.__new__(RunCLI)
        before(folder)
        command.trainer = SimpleNamespace(loggers=[Logger()], is_global_zero=True, global_step=step)
        with pytest.raises(RequestError, match="no such pairs"):
            command._run_subcommand("fit")
        return sorted(path.name for path in root.rglob("*") if path.is_file()) if folder.exists() else None

    return run


MINE = f"events.out.tfevents.1.{socket.gethostname()}.{os.getpid()}.0"
OTHERS = f"events.out.tfevents.1.{socket.gethostname()}.{os.getpid() + 1}.0"


def test_a_run_that_is_refused_leaves_no_log(refused, root):
    assert refused(MINE, "hparams.yaml", "config.yaml") is None
    assert [path.name for path in root.iterdir()] == ["checkpoints"]


def test_a_run_that_fails_later_keeps_its_log(refused):
    assert refused(MINE, "config.yaml", step=3) == ["config.yaml", MINE]


def test_the_log_of_another_process_stays(refused):
    """Two that start together choose the same folder."""
    assert refused(MINE, OTHERS, "config.yaml") == ["config.yaml", *sorted([MINE, OTHERS])]


def test_a_folder_that_another_process_has_made_stays(refused):
    def other(folder):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()

    assert refused(MINE, before=other) == ["config.yaml", MINE]


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"loops": None}, ["loops"]),
        ({"loops": 3}, ["loops"]),
        ({"optimizer_states": None, "epoch": None}, ["epoch", "optimizer_states"]),
        ({"lr_schedulers": {}}, ["lr_schedulers"]),
        ({"pytorch-lightning_version": 2}, ["pytorch-lightning_version"]),
        ({"global_step": "5"}, ["global_step"]),
        ({}, []),
    ],
)
def test_what_a_run_needs_to_go_on_is_looked_for(changes, lacking, tmp_path):
    record = {
        "state_dict": {}, "pytorch-lightning_version": "2.5", "epoch": 0, "global_step": 5, "loops": {},
        "optimizer_states": [], "lr_schedulers": [], **changes,
    }  # fmt: skip
    torch.save({name: value for name, value in record.items() if value is not None}, tmp_path / "a.ckpt")
    assert read_settings(tmp_path / "a.ckpt")["lacks"] == lacking
