"""Runs of one and the same small training, each in a process of its own: whole, killed, resumed.

    python resume_program.py PLAN.json

The plan: "model", "pairs" (directories) and "runs", a list of {"root", "resume", "kill": null or [where, count]}, and
settings that replace those below ("module", "data", "trainer"). The libraries are loaded once; every run is a fork of
this process, so that it may kill itself.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from msdiffusion.training.checkpoints import RunCheckpoint
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.pictures import ValidationPictures
from msdiffusion.training.run_curves import RunCurves

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
    there = Path(one["root"], "checkpoints", "last.ckpt").exists()
    # nothing but the first weights may depend on torch's own generators
    pl.seed_everything(one.get("seed", 0) if there else 0, verbose=False)
    Path(one["root"]).mkdir(exist_ok=True)
    callbacks = [ValidationPictures(every_n_steps=4, count=1, num_steps=1), RunCurves(), Record()]
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
        base_model=f"{model}/base", image_encoder=f"{model}/image_encoder", **MODULE | plan.get("module", {})
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
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print("codes:", json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1])
