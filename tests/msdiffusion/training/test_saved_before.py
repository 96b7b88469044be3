"""What version 0.1.0 saved (commit 10884d7, before the packages got their rooms) loads, goes on and is drawn again.

tests/assets/saved_before: two PNGs of `msdiffusion generate --embed-references` on the embedded default, their request
file, and a run of two steps of configs/msd.yaml on the miniature of SDXL and the pairs of tests/msdiffusion/training.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.cli import main
from msdiffusion.request.request_file import read_request_file

ROOT = Path(__file__).parents[3]
SAVED = ROOT / "tests" / "assets" / "saved_before"


@pytest.mark.parametrize("name", ["both", "free"])
def test_a_picture_is_drawn_again(name, tmp_path, capsys):
    """To one step of 255: the commands of 0.1.0 did not fix the arithmetic of MKL."""
    assert main(["generate", "--from-png", str(SAVED / f"{name}.png"), "--out", str(tmp_path / "again.png")]) == 0
    then, now = (np.asarray(Image.open(path), int) for path in (SAVED / f"{name}.png", tmp_path / "again.png"))
    assert abs(then - now).max() <= 1
    assert (then != now).mean() < 0.001


def test_its_request_file_is_read(tmp_path):
    shutil.copy(SAVED / "requests.yaml", tmp_path)
    for name in ("dog", "teapot"):
        shutil.copy(ROOT / "docs" / "pictures" / f"{name}.png", tmp_path)
    assert [entry.name for entry in read_request_file(tmp_path / "requests.yaml")] == ["both", "free"]


def test_adapter_and_checkpoint_of_a_run_are_read():
    exported, kept = (
        MSAdapter.from_pretrained(SAVED / "run" / "best"),
        torch.load(SAVED / "run" / "checkpoints" / "last.ckpt", weights_only=True),
    )
    averaged = {name.removeprefix("averaged.module."): tensor for name, tensor in kept["state_dict"].items()}
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, averaged[name]), name
    again = MSAdapter.from_checkpoint(SAVED / "run" / "checkpoints" / "last.ckpt")
    assert again.config.resampler == exported.config.resampler
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, exported.state_dict()[name]), name


def test_a_run_goes_on_with_its_own_config(tiny_model_dir, pairs_dir, tmp_path):
    shutil.copytree(SAVED / "run", tmp_path / "run")
    (tmp_path / "tiny").symlink_to(tiny_model_dir)
    (tmp_path / "pairs").symlink_to(pairs_dir)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["model"]["class_path"] == "msdiffusion.training.module.MSDiffusionModule"
    command = [sys.executable, "-m", "msdiffusion.training", "fit", "-c", "run/config.yaml"]
    more = ["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_steps", "4", "--trainer.val_check_interval", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
