"""Training in two CPU processes (gloo): the same weights as one process with twice the batch, and what may go wrong.

This file is its own program, too: ``torchrun --nproc-per-node 2 test_distributed.py EXPERIMENT FOLDER MODEL PAIRS
HELD_OUT``. ``session`` runs all that need no process of their own, because starting costs more than training here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.learning.sharding import is_sharded, whole_weights
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.strategies import ShardedAdapter

RESAMPLER = {"width": 32, "depth": 1, "heads": 2, "head_width": 16}
GLOBAL_BATCH = 4
EPOCHS, BATCHES = 2, 6
"""24 pairs to train on: six batches in each epoch."""
CLIP = 0.01
"""Less than the norm of any gradient here, so that every one is clipped."""
INTERRUPTION = 8
"""After so many steps a checkpoint is written: in the middle of the second epoch."""


class Recorder(pl.Callback):
    """Writes down what a run sees and leaves, for the tests to look at: name_0.json of process 0, and checkpoints."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.seen, self.validations, self.norms = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.adapter.parameters() if p.grad is not None])
        self.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([trainer.current_epoch, batch_idx, batch.keys, batch.numbers.tolist()])
        if trainer.global_step == INTERRUPTION:
            trainer.save_checkpoint(self.folder / f"{self.name}_interrupted.ckpt")

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(float(trainer.callback_metrics["validation/loss"]))

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.folder / f"{self.name}.ckpt")
        with whole_weights(pl_module):
            if trainer.is_global_zero:
                pl_module.save_pretrained(self.folder / f"{self.name}_adapter")
        parameters = {name: p.to_local() if hasattr(p, "to_local") else p for name, p in pl_module.named_parameters()}
        record = {
            "seen": self.seen,
            "validations": self.validations,
            "norms": self.norms,
            "shapes": {name: [list(p.shape), list(parameters[name].shape)] for name, p in pl_module.named_parameters()},
            "unet": [is_sharded(pl_module.backbone.unet), sum(_local_size(p) for p in _unet_parameters(pl_module))],
            "optimizer": sum(_local_size(s["exp_avg"]) for s in trainer.optimizers[0].state.values()),
        }
        (self.folder / f"{self.name}_{trainer.global_rank}.json").write_text(json.dumps(record))


def _unet_parameters(module):
    return module.backbone.unet.parameters()


def _local_size(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def fit(folder, name, model, pairs, held_out, *, strategy, processes, workers=0, resume=None, **settings):
    """A run of two epochs with everything on that could differ between processes."""
    pl.seed_everything(0, verbose=False)
    batch_size = GLOBAL_BATCH // processes // settings.get("accumulate_grad_batches", 1)
    module = MSDiffusionModule(
        f"{model}/base", f"{model}/image_encoder", resampler=RESAMPLER, learning_rate=1e-3, ema_decay=0.9,
        warmup_steps=2, decay="linear", drop_image=0.2, drop_text=0.2, drop_grounding=0.3,
    )  # fmt: skip
    data = PairsDataModule(
        str(pairs), 32, validation_pairs=str(held_out), batch_size=batch_size, max_subjects=2,
        crop="random", flip_probability=0.5, subject_dropout=0.2, box_jitter=0.1, reference_augmentation=0.5,
        num_workers=workers,
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", strategy=strategy, devices=processes, max_epochs=EPOCHS, gradient_clip_val=CLIP,
        default_root_dir=folder, callbacks=[Recorder(folder, name)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else True)
    return module


def session(folder, *places):
    """All experiments of two processes; ``torchrun`` has told this process which one it is."""
    torch.set_num_threads(1)
    folder = Path(folder)
    two = {"processes": 2}
    fit(folder, "ddp", *places, strategy="ddp", workers=2, **two)
    fit(folder, "ddp_resumed", *places, strategy="ddp", resume=folder / "ddp_interrupted.ckpt", **two)
    fit(folder, "sharded", *places, strategy=ShardedAdapter(), **two)
    start = folder / "sharded_interrupted.ckpt"
    fit(folder, "sharded_resumed", *places, strategy=ShardedAdapter(), workers=2, resume=start, **two)
    fit(folder, "all_sharded", *places, strategy=ShardedAdapter(shard_unet=True), **two)


def spawned(folder, *places):
    """Processes that Lightning makes itself."""
    fit(Path(folder), "spawned", *places, strategy="ddp_spawn", processes=2)


EXPERIMENTS = {"session": session, "spawned": spawned}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*command):
    """A command that must succeed; the package is found without being installed, from wherever the tests run."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forked_python, tiny_model_dir, pairs_dir, few_pairs_dir):
    """Folder with what all runs of this page left."""
    folder = tmp_path_factory.mktemp("runs")
    places = (tiny_model_dir, pairs_dir, few_pairs_dir)
    fit(folder, "one", *places, strategy="auto", processes=1)
    run(forked_python, *TORCHRUN, __file__, "session", str(folder), *map(str, places))
    run(forked_python, __file__, "spawned", str(folder), *map(str, places))
    return folder


def record(runs, name, rank=0):
    return json.loads((runs / f"{name}_{rank}.json").read_text())


def checkpoint(runs, name):
    return torch.load(runs / f"{name}.ckpt", weights_only=True)


def assert_same_state(ours, theirs, **tolerance):
    """Weights, their average and the optimizer's states."""
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], **tolerance)
    torch.testing.assert_close(
        ours["optimizer_states"][0]["state"], theirs["optimizer_states"][0]["state"], **tolerance
    )
    assert ours["global_step"] == theirs["global_step"]
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "spawned", "ddp_resumed", "sharded", "sharded_resumed", "all_sharded"])
def test_two_processes_equal_one_with_twice_the_batch(runs, name):
    one, two = checkpoint(runs, "one"), checkpoint(runs, name)
    assert any(key.startswith("averaged.") for key in one["state_dict"])
    assert_same_state(two, one, rtol=1e-5, atol=1e-5)
    validations = record(runs, "one")["validations"]
    ours = record(runs, name)["validations"]
    assert ours == pytest.approx(validations[-len(ours) :], rel=1e-5)
    norms, ours = record(runs, "one")["norms"], record(runs, name, 1)["norms"]
    assert ours == pytest.approx(norms[-len(ours) :], rel=1e-4)
    assert min(ours) > CLIP


@pytest.mark.slow
def test_the_runs_learned_something(runs, tiny_model_dir):
    """Without this, two runs that do nothing would be equal."""
    first, last = checkpoint(runs, "one_interrupted")["state_dict"], checkpoint(runs, "one")["state_dict"]
    trained = [key for key in last if key.startswith("adapter.")]
    assert all((last[key] - first[key]).abs().max() > 1e-4 for key in trained)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_every_pair_is_seen_once_in_an_epoch_by_one_of_the_workers(runs, name):
    """Two processes; those of ``ddp`` with two loading workers each."""
    for epoch in range(EPOCHS):
        parts = [
            [key for e, _, keys, _ in record(runs, name, rank)["seen"] if e == epoch for key in keys] for rank in (0, 1)
        ]
        assert [len(part) for part in parts] == [12, 12]
        assert sorted(parts[0] + parts[1]) == [f"clip_{i:06d}" for i in range(24)]


@pytest.mark.slow
def test_each_batch_of_both_processes_is_the_batch_of_one(runs):
    """In this order: place p of the batch of one process is place p // 2 of process p % 2."""
    one = record(runs, "one")["seen"]
    halves = [record(runs, "ddp", rank)["seen"] for rank in (0, 1)]
    assert len(one) == EPOCHS * BATCHES
    for whole, *parts in zip(one, *halves, strict=True):
        for column in (2, 3):
            assert [parts[p % 2][column][p // 2] for p in range(GLOBAL_BATCH)] == whole[column]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_a_resumed_run_equals_the_uninterrupted_one(runs, name):
    """Bit for bit, from the middle of an epoch; ``ddp`` with other workers than before."""
    assert_same_state(checkpoint(runs, f"{name}_resumed"), checkpoint(runs, name), rtol=0, atol=0)
    seen, resumed = record(runs, name, 1)["seen"], record(runs, f"{name}_resumed", 1)["seen"]
    assert resumed == seen[INTERRUPTION:]


@pytest.mark.slow
def test_the_strategies_write_the_same_checkpoints(runs):
    """So that a run may go on under another strategy, and everything that reads checkpoints reads these."""
    ddp, sharded = checkpoint(runs, "ddp"), checkpoint(runs, "sharded")
    assert ddp.keys() == sharded.keys()
    assert list(ddp["state_dict"]) == list(sharded["state_dict"])
    ours, theirs = (c["optimizer_states"][0]["param_groups"] for c in (ddp, sharded))
    assert [group["params"] for group in ours] == [group["params"] for group in theirs]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["ddp_interrupted", "sharded_interrupted"])
def test_one_process_goes_on_where_two_stopped(runs, start, tmp_path, tiny_model_dir, pairs_dir, few_pairs_dir):
    places = (tiny_model_dir, pairs_dir, few_pairs_dir)
    fit(tmp_path, "alone", *places, strategy="auto", processes=1, resume=runs / f"{start}.ckpt")
    assert_same_state(checkpoint(tmp_path, "alone"), checkpoint(runs, "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_accumulated_gradients_equal_a_larger_batch(runs, tmp_path, tiny_model_dir, pairs_dir, few_pairs_dir):
    places = (tiny_model_dir, pairs_dir, few_pairs_dir)
    fit(tmp_path, "small", *places, strategy="auto", processes=1, accumulate_grad_batches=2)
    assert_same_state(checkpoint(tmp_path, "small"), checkpoint(runs, "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_each_process_holds_its_part_alone(runs):
    parts = [record(runs, "sharded", rank) for rank in (0, 1)]
    names = parts[0]["shapes"].keys()
    assert any(name.startswith("averaged.") for name in names)
    total = 0
    for name in names:
        (whole, ours), (_, theirs) = (part["shapes"][name] for part in parts)
        assert ours[1:] == theirs[1:] == whole[1:], name
        assert ours[0] + theirs[0] == whole[0], name
        assert whole[0] == 1 or ours[0] < whole[0], f"{name} is not split"
        total += torch.Size(whole).numel() if name.startswith("adapter.") else 0
    assert parts[0]["optimizer"] + parts[1]["optimizer"] == total
    assert parts[1]["optimizer"] < 0.55 * total
    assert record(runs, "ddp")["optimizer"] == total


@pytest.mark.slow
def test_the_unet_is_split_when_asked(runs):
    size = record(runs, "one")["unet"][1]
    assert record(runs, "one")["unet"] == record(runs, "sharded")["unet"] == [False, size]
    (first, ours), (second, theirs) = (record(runs, "all_sharded", rank)["unet"] for rank in (0, 1))
    assert first and second
    assert ours + theirs == size
    assert max(ours, theirs) < 0.6 * size


@pytest.mark.slow
def test_a_sharded_run_leaves_an_adapter(runs, tiny_model_dir):
    from msdiffusion import MSDiffusion

    adapter = MSAdapter.from_pretrained(runs / "sharded_adapter")
    averaged = checkpoint(runs, "sharded")["state_dict"]
    for name, weight in adapter.state_dict().items():
        assert torch.equal(weight, averaged[f"averaged.module.{name}"])
    model = MSDiffusion.from_pretrained(runs / "sharded_adapter", device="cpu")
    assert torch.equal(model.adapter.resampler.null_queries, adapter.resampler.null_queries)


if __name__ == "__main__":
    EXPERIMENTS[sys.argv[1]](*sys.argv[2:])
