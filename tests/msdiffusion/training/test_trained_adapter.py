"""From training to pictures: what a run leaves is taken by everything that draws."""

import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from msdiffusion.cli import main
from msdiffusion.generation.generate import MSDiffusion
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.run.checkpoints import AdapterExport, RunCheckpoint


@pytest.fixture(scope="module")
def trained(tiny_model_dir, pairs_dir, tmp_path_factory):
    """The folder of a run of two steps whose average differs from its weights."""
    root = tmp_path_factory.mktemp("run")
    module = MSDiffusionModule(
        base_model=str(tiny_model_dir / "base"),
        image_encoder=str(tiny_model_dir / "image_encoder"),
        resampler={"width": 32, "depth": 1, "heads": 2, "head_width": 16},
        defaults={"steps": 2, "scale": 1.0},
        learning_rate=0.01,
        ema_decay=0.5,
    )
    data = PairsDataModule(str(pairs_dir), 32, batch_size=4, max_subjects=2, validation_fraction=0.2)
    trainer = pl.Trainer(
        callbacks=[AdapterExport(every_n_steps=2), RunCheckpoint(every_n_steps=2)], default_root_dir=root, max_steps=2,
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, val_check_interval=2,
    )  # fmt: skip
    trainer.fit(module, data)
    assert not torch.equal(module.adapter.resampler.null_queries, module.trained_adapter.resampler.null_queries)
    return root


def draw(model):
    reference = Image.new("RGBA", (20, 20), (200, 30, 40, 255))
    [picture] = model.generate([reference], [[0.2, 0.2, 0.8, 0.8]], "a dog", ["dog"], seed=3, progress=False,
                               height=32, width=32)  # fmt: skip
    return np.asarray(picture)


@pytest.mark.exact
@pytest.mark.parametrize("place", ["checkpoints/last.ckpt", "checkpoints/best.ckpt", "best", ""])
def test_what_a_run_leaves_draws_what_the_exported_adapter_draws(trained, place):
    expected = draw(MSDiffusion.from_pretrained(trained / "adapter", device="cpu"))
    assert expected.std() > 0
    assert (draw(MSDiffusion.from_pretrained(trained / place, device="cpu")) == expected).all()


@pytest.mark.exact
def test_it_does_so_from_another_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = MSDiffusion.from_pretrained(trained / "checkpoints" / "best.ckpt", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    again = MSDiffusion.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.adapter.config.defaults["steps"] == 2
    assert (draw(again) == draw(model)).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the maps of this process")
def test_a_checkpoint_does_not_stay_mapped(trained):
    model = MSDiffusion.from_pretrained(trained / "checkpoints" / "last.ckpt", device="cpu")
    assert str(trained) not in Path("/proc/self/maps").read_text()
    assert {parameter.data_ptr() % 64 for parameter in model.adapter.parameters()} == {0}


def test_the_best_weights_are_small(trained):
    sizes = {name: (trained / "checkpoints" / f"{name}.ckpt").stat().st_size for name in ("best", "last")}
    assert sizes["best"] < 0.6 * sizes["last"]


def test_the_command_draws_from_a_checkpoint(trained, tmp_path):
    Image.new("RGBA", (20, 20), (200, 30, 40, 255)).save(tmp_path / "dog.png")
    for name, model in (("a", trained / "checkpoints" / "last.ckpt"), ("b", trained / "adapter")):
        arguments = ["generate", "--model", str(model), "--image", str(tmp_path / "dog.png"), "--box",
                     "0.2,0.2,0.8,0.8", "--prompt", "a dog", "--seed", "3", "--height", "32", "--width", "32",
                     "--out", str(tmp_path / f"{name}.png")]  # fmt: skip
        assert main(arguments) in (None, 0)
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab"]
    assert (pictures[0] == pictures[1]).all()
