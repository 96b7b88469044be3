import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.training.ray_train import main, train_worker, worker_arguments

REPOSITORY = Path(__file__).parents[3]
LOSS = """
import os, pathlib
import pytorch_lightning as pl

class LostOnce(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        marker = pathlib.Path("lost")
        if trainer.global_rank == 1 and trainer.global_step == 2 and not marker.exists():
            marker.touch()
            os._exit(1)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0", "fit"], "--workers must be at least 1, got 0"),
        (["--cpus", "0", "fit"], "--cpus must be at least 1, got 0"),
        (["--max-failures", "-1", "fit"], "--max-failures must not be below 0, got -1"),
        (["--workers", "2"], "after the options comes the command"),
        (["--worker", "2", "--config", "configs/msd.yaml"], "after the options comes the command"),
    ],
)
def test_wrong_options_are_told_before_a_cluster_starts(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_workers_go_on_from_the_newest_checkpoint_where_failures_are_expected():
    command = ["fit", "-c", "configs/msd.yaml"]
    assert worker_arguments(command, resume=True)[-2:] == ["--ckpt_path", "auto"]
    assert "--ckpt_path" not in worker_arguments(command, resume=False)
    for given in (["--ckpt_path", "some.ckpt"], ["--ckpt_path=some.ckpt"]):
        assert worker_arguments([*command, *given], resume=True)[-2:] != ["--ckpt_path", "auto"]


def test_a_refused_command_is_an_error_of_the_worker(tmp_path, monkeypatch, capsys):
    """Not an exit of its process, which Ray would take for a broken machine."""
    monkeypatch.setattr(sys, "argv", ["worker", "of", "ray"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="ended with status 2"):
        train_worker({"arguments": ["fit", "--no_such_setting", "1"], "folder": str(REPOSITORY)})
    assert Path.cwd() == REPOSITORY
    assert sys.argv == ["worker"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_two_workers_train_and_go_on_when_one_was_lost(tmp_path, tiny_model_dir, pairs_dir):
    pytest.importorskip("ray.train", reason='needs Ray Train: pip install "ray[train]"')
    run = tmp_path / "run"
    settings = {
        "trainer.default_root_dir": run, "trainer.accelerator": "cpu", "trainer.max_steps": 3,
        "trainer.val_check_interval": 2, "trainer.num_sanity_val_steps": 0, "trainer.precision": "32-true",
        "model": "msdiffusion.training.module.MSDiffusionModule",
        "model.base_model": tiny_model_dir / "base", "model.image_encoder": tiny_model_dir / "image_encoder",
        "model.resampler": "{width: 32, depth: 1, heads: 2, head_width: 16}",
        "data": "msdiffusion.training.datamodule.PairsDataModule",
        "data.pairs": pairs_dir, "data.resolution": 32, "data.batch_size": 2, "data.max_subjects": 2,
        "trainer.callbacks+": "msdiffusion.training.callbacks.AdapterExport",
    }  # fmt: skip
    command = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command += ["--trainer.callbacks+", "msdiffusion.training.callbacks.RunCheckpoint"]
    command += ["--trainer.callbacks.every_n_steps", "1", "--trainer.callbacks+", "lost_once.LostOnce"]
    (tmp_path / "lost_once.py").write_text(LOSS)
    paths = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-m", "msdiffusion.training.ray_train", "--workers", "2", "--storage", str(tmp_path / "ray"),
         "--max-failures", "1", "fit", *command],
        capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert (tmp_path / "lost").exists()
    assert "last.ckpt" in done.stdout + done.stderr  # Lightning says what it restored
    adapter = MSAdapter.from_pretrained(run / "adapter")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["PairsDataModule"]["data"]["samples of a batch of all processes"] == 4
    weights = checkpoint["state_dict"]
    assert all(torch.equal(weight, weights[f"adapter.{name}"]) for name, weight in adapter.state_dict().items())
