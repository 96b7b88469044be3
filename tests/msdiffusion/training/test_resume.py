"""A run that was killed and resumed ends exactly as one that never was: bit for bit, on a CPU with one thread.

This file is its own program, too: ``python test_resume.py PLAN.json`` makes runs of one small training, each in a
process of its own, so that it may kill itself. The libraries are loaded once; every run is a fork.
"""

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.run import run_curves
from msdiffusion.training.run.checkpoints import RunCheckpoint
from msdiffusion.training.run.pictures import ValidationPictures

MODULE = {
    "resampler": {"width": 32, "depth": 1, "heads": 2, "head_width": 16},
    "learning_rate": 1e-3,
    "warmup_steps": 3,
    "decay": "linear_half",
    "ema_decay": 0.9,
    "drop_image": 0.2,
    "drop_text": 0.2,
    "drop_both": 0.1,
    "drop_grounding": 0.3,
    "noise_offset": 0.1,
}
DATA = {
    "resolution": 32,
    "batch_size": 2,
    "max_subjects": 2,
    "validation_fraction": 0.2,
    "crop": "random",
    "flip_probability": 0.5,
    "subject_dropout": 0.3,
    "box_jitter": 0.1,
    "reference_augmentation": 0.5,
}
TRAINER = {"max_steps": 12, "accumulate_grad_batches": 2, "val_check_interval": 5, "gradient_clip_val": 1.0,
           "log_every_n_steps": 1}  # fmt: skip


class Record(pl.Callback):
    """Writes every validation's metrics with its step, so that runs can be compared whatever they overwrite."""

    def on_validation_end(self, trainer, module):
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if "validation" in name}
        with Path(trainer.default_root_dir, "metrics.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, values]) + "\n")


class Kill(pl.Callback):
    """SIGKILL to this process, the count-th time that it comes to a place."""

    def __init__(self, where, count):
        self.where, self.left = where, count

    def _reached(self, where):
        if where == self.where:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def on_before_backward(self, *arguments):
        self._reached("backward")

    def on_before_zero_grad(self, *arguments):
        self._reached("step")

    def on_train_batch_end(self, *arguments):
        self._reached("batch end")

    def on_validation_batch_end(self, *arguments):
        self._reached("validation")

    def on_save_checkpoint(self, *arguments):
        self._reached("saving")


def run(plan, one):
    torch.set_num_threads(1)
    run_curves.draw_curves = lambda *_: None  # the table is compared; its picture takes as long as five steps
    there = Path(one["root"], "checkpoints", "last.ckpt").exists()
    # nothing but the first weights may depend on torch's own generators
    pl.seed_everything(one.get("seed", 0) if there else 0, verbose=False)
    Path(one["root"]).mkdir(exist_ok=True)
    callbacks = [
        ValidationPictures(every_n_steps=4, count=1, num_steps=1),
        run_curves.RunCurves(),
        Record(),
    ]
    if one.get("kill"):
        callbacks.append(Kill(*one["kill"]))
    callbacks.append(RunCheckpoint(every_n_steps=plan.get("every_n_steps", 2)))
    trainer = pl.Trainer(
        callbacks=callbacks, default_root_dir=one["root"], accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, check_val_every_n_epoch=None,
        **TRAINER | plan.get("trainer", {}),
    )  # fmt: skip
    model = plan["model"]
    module = MSDiffusionModule(
        base_model=f"{model}/base",
        image_encoder=f"{model}/image_encoder",
        **MODULE | plan.get("module", {}),
    )
    data = PairsDataModule(plan["pairs"], **DATA | plan.get("data", {}) | one.get("data", {}))
    trainer.fit(module, data, ckpt_path="last" if one.get("resume") else None)


def main(path):
    plan = json.loads(Path(path).read_text())
    codes = []
    for one in plan["runs"]:
        child = os.fork()
        if child == 0:
            try:
                run(plan, one)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print("codes:", json.dumps(codes))


# The tests


@pytest.fixture
def runs(forked_python, tiny_model_dir, pairs_dir, tmp_path):
    """Function: a list of runs and what the plan has besides -> their exit codes."""

    def start(runs, **plan):
        runs = [{**one, "root": str(tmp_path / one["root"])} for one in runs]
        path = tmp_path / "plan.json"
        path.write_text(
            json.dumps(
                {
                    "model": str(tiny_model_dir),
                    "pairs": str(pairs_dir),
                    "runs": runs,
                    **plan,
                }
            )
        )
        done = subprocess.run(
            [forked_python, __file__, str(path)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1].removeprefix("codes: ")), done.stderr

    return start


def state(root):
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(one, other, name=""):
    """Nested, tensors bit for bit."""
    assert type(one) is type(other), name
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), name
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_equal(one[key], other[key], f"{name}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{name}/{index}")
    else:
        assert one == other, name


def validations(root):
    """Step to what its validation said; where it was done twice, both said the same."""
    found = {}
    for line in (root / "metrics.jsonl").read_text().splitlines():
        step, values = json.loads(line)
        assert found.setdefault(step, values) == values, f"validation of step {step}"
    return found


def assert_same_run(whole, resumed):
    expected, found = state(whole), state(resumed)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks",
                 "PairsDataModule", "hyper_parameters", "adapter_config"):  # fmt: skip
        assert_equal(expected[part], found[part], part)
    assert any(name.startswith("averaged.") for name in found["state_dict"])
    best = [torch.load(root / "checkpoints" / "best.ckpt", weights_only=True) for root in (whole, resumed)]
    assert best[0]["global_step"] == best[1]["global_step"]
    assert_equal(best[0]["state_dict"], best[1]["state_dict"], "best")
    assert validations(whole) == validations(resumed)
    assert (whole / "metrics.csv").read_bytes() == (resumed / "metrics.csv").read_bytes()
    pictures = sorted(path.name for path in (whole / "pictures").iterdir())
    assert len(pictures) >= 2
    assert pictures == sorted(path.name for path in (resumed / "pictures").iterdir())
    for name in pictures:
        assert (whole / "pictures" / name).read_bytes() == (resumed / "pictures" / name).read_bytes(), name


KILLED = -signal.SIGKILL
PLACES = {"backward": 24, "step": 12, "batch end": 24, "validation": 8, "saving": 6}
"""Where a run may be killed, and how often it comes by in 12 steps of two batches."""


def places(seed, count):
    """``count`` kills, at random places of a run; the later ones come by as often at most as the run has left."""
    rng = random.Random(seed)
    kills = []
    for number in range(count):
        where = rng.choice(sorted(PLACES))
        kills.append([where, rng.randint(1, max(1, PLACES[where] // (number + 1)))])
    return kills


@pytest.mark.slow
def test_a_killed_run_that_is_resumed_ends_like_one_that_never_was(runs, tmp_path):
    """At random places, in the middle of epochs, of accumulations, of validations, and of writing a checkpoint."""
    seeds = range(3)
    plan = [{"root": "whole"}]
    for seed in seeds:
        first, second = places(seed, 2)
        plan += [
            {"root": f"run{seed}", "kill": first, "resume": False},
            {"root": f"run{seed}", "kill": second, "resume": True, "seed": 5},
            {"root": f"run{seed}", "resume": True, "seed": 6},
        ]
    codes, errors = runs(plan)
    assert codes[0] == 0, errors
    for seed in seeds:
        first, second, last = codes[1 + 3 * seed : 4 + 3 * seed]
        assert first == KILLED, (seed, errors)
        assert second in (KILLED, 0), (seed, errors)
        assert last == 0, (seed, errors)
    assert KILLED in codes[2::3]
    for seed in seeds:
        assert_same_run(tmp_path / "whole", tmp_path / f"run{seed}")


@pytest.mark.slow
def test_so_it_is_with_loading_processes_and_a_checkpoint_at_every_step(runs, tmp_path):
    """Also at steps that are validated; and processes may load the rest."""
    kills = {
        "validated": ["validation", 4],
        "early": ["saving", 3],
        "late": ["batch end", 9],
    }
    plan = [{"root": "whole"}]
    for root, kill in kills.items():
        plan += [
            {"root": root, "kill": kill},
            {"root": root, "resume": True, "seed": 4, "data": {"num_workers": 2}},
        ]
    codes, errors = runs(plan, every_n_steps=1, trainer={"max_steps": 6, "val_check_interval": 4})
    assert codes == [0, *[KILLED, 0] * len(kills)], errors
    for root in kills:
        assert_same_run(tmp_path / "whole", tmp_path / root)


if __name__ == "__main__":
    main(sys.argv[1])
