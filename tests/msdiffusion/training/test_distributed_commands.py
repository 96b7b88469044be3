"""Two processes by the commands that a user gives: torchrun, Lightning's own processes, SLURM's variables."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from msdiffusion.adapter.adapter import MSAdapter

REPOSITORY = Path(__file__).parents[3]
SHARDED = REPOSITORY / "configs" / "strategies" / "sharded.yaml"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
pytestmark = pytest.mark.usefixtures("forked_processes")
FAILURE = """
import pytorch_lightning as pl

class FailingProcess(pl.Callback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == 1:
            raise ValueError(f"process {self.rank} has a bad day")
"""


@pytest.fixture
def config(tmp_path, tiny_model_dir, pairs_dir):
    """A run of three steps in two processes, as a file for ``lightning fit``."""
    settings = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "devices": 2, "strategy": "ddp",
            "max_steps": 3, "num_sanity_val_steps": 0, "val_check_interval": 2, "enable_model_summary": False,
            "gradient_clip_val": 1.0,
            "callbacks": [
                {"class_path": "msdiffusion.training.callbacks.AdapterExport", "init_args": {"every_n_steps": 2}},
                {"class_path": "msdiffusion.training.callbacks.RunCheckpoint", "init_args": {"every_n_steps": 2}},
                {
                    "class_path": "msdiffusion.training.callbacks.ValidationPictures",
                    "init_args": {"every_n_steps": 2, "count": 1, "num_steps": 2},
                },
            ],
        },
        "model": {
            "class_path": "msdiffusion.training.module.MSDiffusionModule",
            "init_args": {
                "base_model": str(tiny_model_dir / "base"),
                "image_encoder": str(tiny_model_dir / "image_encoder"),
                "resampler": {"width": 32, "depth": 1, "heads": 2, "head_width": 16},
                "ema_decay": 0.9,
            },
        },
        "data": {
            "class_path": "msdiffusion.training.datamodule.PairsDataModule",
            "init_args": {"pairs": str(pairs_dir), "resolution": 32, "batch_size": 2, "max_subjects": 2},
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def run(*command, folder, **variables):
    """(exit status, what was said). No process that the command started may be left."""
    paths = os.pathsep.join([str(REPOSITORY), str(folder)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder,
        start_new_session=True,
    )  # fmt: skip
    try:
        # also waits for the children, who hold the same pipe
        said, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, said


def check_run(folder):
    adapter = MSAdapter.from_pretrained(folder / "adapter")
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    weights = checkpoint["state_dict"]
    for name, weight in adapter.state_dict().items():
        assert torch.equal(weight, weights[f"averaged.module.{name}"])
    assert sorted(path.name for path in (folder / "pictures").glob("step_*")) == ["step_000002.png", "step_000003.png"]


@pytest.mark.slow
def test_torchrun_trains_a_sharded_adapter(config, tmp_path):
    command = ("-m", "msdiffusion.training", "fit", "-c", str(config), "-c", str(SHARDED))
    status, said = run(sys.executable, *TORCHRUN, *command, folder=tmp_path)
    assert status == 0, said
    check_run(tmp_path / "run")


@pytest.mark.slow
def test_processes_of_lightning_train(config, tmp_path):
    status, said = run(sys.executable, "-m", "msdiffusion.training", "fit", "-c", str(config), folder=tmp_path)
    assert status == 0, said
    check_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank"),
    [(TORCHRUN, 1), ((), 0), ((), 1)],
    ids=["torchrun-1", "lightning-0", "lightning-1"],
)
def test_a_process_that_fails_ends_the_others(config, tmp_path, launcher, rank):
    (tmp_path / "failing.py").write_text(FAILURE)
    fail = ("--trainer.callbacks+", "failing.FailingProcess", "--trainer.callbacks.rank", str(rank))
    command = (sys.executable, *launcher, "-m", "msdiffusion.training", "fit", "-c", str(config), *fail)
    status, said = run(*command, folder=tmp_path)
    assert status != 0
    assert f"process {rank} has a bad day" in said


@pytest.mark.slow
def test_processes_of_slurm_train(config, tmp_path):
    """What srun does, on one node: as many processes as there are tasks, each with its number in its environment."""
    common = {
        "SLURM_JOB_ID": "40001", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_NODELIST": "localhost", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0",
    }  # fmt: skip
    command = (sys.executable, "-m", "msdiffusion.training", "fit", "-c", str(config))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **common}
    processes = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**environment, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    check_run(tmp_path / "run")
