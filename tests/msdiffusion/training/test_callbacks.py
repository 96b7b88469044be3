from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from msdiffusion.errors import RequestError
from msdiffusion.training.callbacks import (
    AdapterExport,
    EveryNSteps,
    RunCheckpoint,
    RunProgress,
    ValidationPictures,
    draw_batch,
    picture_grid,
)
from msdiffusion.training.dataset import PairsDataModule, TrainingSample
from msdiffusion.training.module import MSDiffusionModule


class Counter(EveryNSteps):
    def __init__(self, every_n_steps):
        super().__init__(every_n_steps)
        self.steps = []

    def act(self, trainer, module):
        self.steps.append(trainer.global_step)


@pytest.fixture
def run(tiny_model_dir, pairs_dir, tmp_path):
    """Function: callbacks and settings of the trainer -> the trainer after training; everything lies in tmp_path."""

    def train(callbacks, ckpt_path=None, **settings):
        module = MSDiffusionModule(
            base_model=str(tiny_model_dir / "base"),
            image_encoder=str(tiny_model_dir / "image_encoder"),
            resampler={"width": 32, "depth": 1, "heads": 2, "head_width": 16},
        )
        defaults = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "max_steps": 3,
            "logger": False,
            "enable_checkpointing": any(isinstance(callback, RunCheckpoint) for callback in callbacks),
            "enable_progress_bar": any(isinstance(callback, RunProgress) for callback in callbacks),
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 1,
        }
        trainer = pl.Trainer(callbacks=callbacks, **defaults | settings)
        data = PairsDataModule(str(pairs_dir), 32, batch_size=4, max_subjects=2, validation_fraction=0.2)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    return train


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [
        (2, [1, 2, 3, 4], [2, 4]),
        (2, [1, 2, 3, 4, 5], [2, 4, 5]),
        (9, [1, 2, 3], [3]),
        (2, [1, 1, 2, 2, 3, 3], [2, 3]),  # gradients accumulated over two batches: steps are optimizer steps
        (2, [4, 5, 6], [6]),  # resumed at step 4, which was acted on before
    ],
)
def test_every_n_steps_and_at_the_end(every, steps, expected):
    counter = Counter(every)
    trainer = SimpleNamespace(global_step=steps[0] if steps[0] > 1 else 0, is_global_zero=True)
    counter.on_train_start(trainer, None)
    for step in steps:
        trainer.global_step = step
        counter.on_train_batch_end(trainer, None, None, None, 0)
    counter.on_train_end(trainer, None)
    assert counter.steps == expected


def test_only_the_first_process_acts():
    counter = Counter(1)
    counter.on_train_end(SimpleNamespace(global_step=3, is_global_zero=False), None)
    assert counter.steps == []


def test_never_is_no_interval():
    with pytest.raises(RequestError, match="every_n_steps must be at least 1, got 0"):
        Counter(0)


@pytest.mark.parametrize("settings", [{"count": 0}, {"num_steps": 0}])
def test_pictures_need_a_count_and_steps(settings):
    with pytest.raises(RequestError, match="must be at least 1"):
        ValidationPictures(**settings)


def test_adapter_is_exported(run, tmp_path):
    from msdiffusion.adapter import MSAdapter

    trainer = run([AdapterExport(every_n_steps=2)])
    exported = MSAdapter.from_pretrained(tmp_path / "adapter").state_dict()
    for name, tensor in trainer.lightning_module.adapter.state_dict().items():
        assert torch.equal(exported[name], tensor)


def test_adapter_is_exported_elsewhere(tmp_path):
    written = []
    AdapterExport(directory="there").act(
        SimpleNamespace(default_root_dir=tmp_path), SimpleNamespace(save_pretrained=written.append)
    )
    assert written == ["there"]


def test_pictures_are_drawn_and_logged(run, tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="log", version="")
    run([ValidationPictures(every_n_steps=2, count=2, num_steps=2)], max_steps=2, logger=logger)
    grid = Image.open(tmp_path / "pictures" / "step_000002.png")
    assert grid.size == (4 + 4 * 132, 4 + 2 * 132)  # two references, target, result
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["validation/pictures"]


def test_drawing_leaves_training_as_it_was(run):
    """The pictures' noise has its own generator, and the adapter's processors stay."""
    pl.seed_everything(0)
    without = run([], max_steps=2).lightning_module.adapter.state_dict()
    pl.seed_everything(0)
    drawn = run([ValidationPictures(every_n_steps=1, count=1, num_steps=1)], max_steps=2)
    for name, tensor in drawn.lightning_module.adapter.state_dict().items():
        torch.testing.assert_close(tensor, without[name])


def test_validation_draws_what_generation_draws(run):
    from msdiffusion.generate import MSDiffusion

    trainer = run([], max_steps=1)
    module, [sample] = trainer.lightning_module, trainer.datamodule.validation_samples(1)
    settings = {"guidance_scale": 3.0, "scale": 0.7, "seed": 5}
    [drawn] = draw_batch(module, trainer.datamodule.collate([sample]), num_steps=2, **settings)
    model = MSDiffusion(module.backbone, module.trained_adapter)
    [generated] = model.generate(
        sample.references,
        sample.boxes.tolist(),
        sample.caption,
        sample.phrases,
        height=32,
        width=32,
        steps=2,
        progress=False,
        **settings,
    )
    assert drawn.size == generated.size
    difference = np.asarray(drawn, dtype=int) - np.asarray(generated, dtype=int)
    assert np.abs(difference).max() <= 2


def test_a_run_resumes_from_its_last_checkpoint(run, tmp_path):
    run([RunCheckpoint(every_n_steps=2)], max_steps=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    counter = Counter(1)
    trainer = run([counter, RunCheckpoint(every_n_steps=2)], max_steps=2, ckpt_path="last")
    assert counter.steps == [2]
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 2
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_progress_shows_the_whole_run(run, capsys):
    run([RunProgress(refresh_seconds=0)], max_steps=2, val_check_interval=1)
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "loss=" in shown
    assert "validation=" in shown
    assert "samples/s=" in shown


def test_progress_closes_its_bar_on_an_error(run, capsys):
    class Failing(pl.Callback):
        def on_train_batch_end(self, *arguments):
            raise RuntimeError("on purpose")

    progress = RunProgress()
    with pytest.raises(RuntimeError, match="on purpose"):
        run([progress, Failing()])
    assert progress._bar.disable  # what tqdm's close() sets
    assert capsys.readouterr().err.endswith("\n")


def test_grid_shows_references_boxes_and_result():
    target = np.full((32, 32, 3), 10, dtype=np.uint8)
    transparent = Image.new("RGBA", (8, 16), (0, 0, 0, 0))
    sample = TrainingSample(
        key="a",
        caption="a dog",
        target=target,
        phrases=("dog",),
        boxes=np.array([[0.25, 0.25, 0.75, 0.75]], dtype=np.float32),
        references=(transparent,),
        reference_ids=("a/0",),
        original_size=(32, 32),
        crop_top_left=(0, 0),
    )
    grid = np.asarray(picture_grid([sample], [Image.new("RGB", (32, 32), (0, 200, 0))], (1, 2, 3)))
    assert grid.shape == (136, 400, 3)
    assert grid[68, 68].tolist() == [1, 2, 3]  # a transparent reference shows the background
    assert grid[68, 200].tolist() == [10, 10, 10]
    assert grid[4 + 32, 200].tolist() == [0xE6, 0x19, 0x4B]  # the upper edge of the box
    assert grid[68, 332].tolist() == [0, 200, 0]
