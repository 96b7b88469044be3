from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from msdiffusion.errors import DataError, RequestError
from msdiffusion.figures import COLORS, GAP, arrange
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.module import MSDiffusionModule
from msdiffusion.training.run.pictures import (
    HEADER,
    PredictionPictures,
    ValidationPictures,
    draw_samples,
    log_picture,
    picture_grid,
    progress_strip,
)
from msdiffusion.training.samples.batch import TrainingSample


@pytest.fixture
def run(tiny_model_dir, pairs_dir, tmp_path):
    """Function: callbacks and settings of the trainer -> the trainer after training; everything lies in tmp_path."""

    def train(callbacks, data=None, **settings):
        module = MSDiffusionModule(
            base_model=str(tiny_model_dir / "base"),
            image_encoder=str(tiny_model_dir / "image_encoder"),
            resampler={"width": 32, "depth": 1, "heads": 2, "head_width": 16},
            defaults={"steps": 2},
        )
        defaults = {"accelerator": "cpu", "default_root_dir": tmp_path, "max_steps": 3, "logger": False,
                    "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
                    "num_sanity_val_steps": 0, "limit_val_batches": 1}  # fmt: skip
        trainer = pl.Trainer(callbacks=callbacks, **defaults | settings)
        data = {"resolution": 32, "batch_size": 4, "max_subjects": 2, "validation_fraction": 0.2, **(data or {})}
        trainer.fit(module, PairsDataModule(str(pairs_dir), **data))
        return trainer

    return train


@pytest.mark.parametrize("settings", [{"count": 0}, {"num_steps": 0}])
def test_pictures_need_a_count_and_steps(settings):
    with pytest.raises(RequestError, match="must be at least 1"):
        ValidationPictures(**settings)


def test_pictures_are_drawn_and_logged(run, tmp_path):
    from pytorch_lightning.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="log", version="")
    run([ValidationPictures(every_n_steps=2, count=2, num_steps=2)], max_steps=3, logger=logger)
    grid = Image.open(tmp_path / "pictures" / "step_000002.png")
    assert grid.size == (4 + 4 * 132, 4 + 2 * 132)  # two references, target, result
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["images"] == ["validation/pictures"]
    strip = np.asarray(Image.open(tmp_path / "pictures" / "progress.png"))
    assert strip.shape == (HEADER + 4 + 2 * 132, 4 + 2 * 132, 3)  # steps 2 and 3
    results = np.asarray(grid)[:, -132:-4]
    assert (strip[HEADER:, 4:132] == results).all()


def test_nothing_is_drawn_without_validation_pairs(run, tmp_path):
    run([ValidationPictures(every_n_steps=1)], data={"validation_fraction": 0}, max_steps=1)
    assert not (tmp_path / "pictures").exists()


def test_wandb_gets_the_pictures_too():
    """A logger of the real class, without its account."""

    class Offline(pl.loggers.WandbLogger):
        def __init__(self):
            self.images = []

        def log_image(self, key, images, step=None, **options):
            self.images.append((key, [image.size for image in images], step))

    logger = Offline()
    log_picture(SimpleNamespace(loggers=[logger, object()], global_step=7), "grid", Image.new("RGB", (3, 2)))
    assert logger.images == [("grid", [(3, 2)], 7)]


def test_drawing_leaves_training_as_it_was(run):
    """The pictures' noise has its own generator, and the adapter's processors stay."""
    pl.seed_everything(0)
    without = run([], max_steps=2).lightning_module.adapter.state_dict()
    pl.seed_everything(0)
    drawn = run([ValidationPictures(every_n_steps=1, count=1, num_steps=1)], max_steps=2)
    for name, tensor in drawn.lightning_module.adapter.state_dict().items():
        assert torch.equal(tensor, without[name]), name


def test_validation_draws_what_generation_draws(run):
    from msdiffusion.generation.generate import MSDiffusion

    trainer = run([], max_steps=1)
    module, [sample] = trainer.lightning_module, trainer.datamodule.validation_samples(1)
    settings = {"guidance_scale": 3.0, "scale": 0.7}
    [drawn] = module.draw_batch(trainer.datamodule.collate([sample]), num_steps=2, seeds=[5], **settings)
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
        seed=5,
        **settings,
    )
    assert drawn.size == generated.size
    difference = np.asarray(drawn, dtype=int) - np.asarray(generated, dtype=int)
    assert np.abs(difference).max() <= 2


def test_rectangles_are_drawn_in_their_own_size(run, tmp_path):
    trainer = run(
        [ValidationPictures(every_n_steps=1, count=2, num_steps=1)],
        data={"bucket_step": 8, "batch_size": 2},
        max_steps=1,
    )
    samples = trainer.datamodule.validation_samples(2)
    height, width = samples[0].size
    assert width > height
    drawn = draw_samples(
        trainer.lightning_module, trainer.datamodule, samples, num_steps=1, guidance_scale=1.0, scale=1.0, seed=0
    )
    assert [picture.size for picture in drawn] == [(width, height)] * 2
    assert (tmp_path / "pictures" / "step_000001.png").is_file()


def test_samples_of_several_sizes_come_back_in_their_order():
    class Batch(list):
        def to(self, device):
            return self

    seen = []
    samples = [SimpleNamespace(name=i, target=np.zeros((8, 8 + 8 * (i % 2), 3))) for i in range(4)]

    def fake_draw(batch, **settings):
        seen.append([sample.name for sample in batch])
        return [f"picture {sample.name}" for sample in batch]

    module = SimpleNamespace(device="cpu", draw_batch=fake_draw)
    drawn = draw_samples(module, SimpleNamespace(collate=Batch), samples, seed=0)
    assert drawn == [f"picture {i}" for i in range(4)]
    assert seen == [[0, 2], [1, 3]]


def make_sample(**changes):
    sample = TrainingSample(
        number=0,
        weight=1.0,
        stream=(0, 0, 0),
        key="a",
        caption="a dog",
        size=(32, 32),
        target=np.full((32, 32, 3), 10, dtype=np.uint8),
        phrases=("dog",),
        boxes=np.array([[0.25, 0.25, 0.75, 0.75]], dtype=np.float32),
        references=(Image.new("RGBA", (8, 16), (0, 0, 0, 0)),),
        reference_ids=("a/0",),
        original_size=(32, 32),
        crop_top_left=(0, 0),
    )
    return replace(sample, **changes)


def test_grid_shows_references_boxes_and_result():
    grid = np.asarray(picture_grid([make_sample()], [Image.new("RGB", (32, 32), (0, 200, 0))], (1, 2, 3)))
    assert grid.shape == (136, 400, 3)
    assert grid[68, 68].tolist() == [1, 2, 3]  # a transparent reference shows the background
    assert grid[68, 200].tolist() == [10, 10, 10]
    assert grid[4 + 32, 200].tolist() == list(COLORS[0])  # the upper edge of the box
    assert grid[68, 332].tolist() == [0, 200, 0]


def test_grid_keeps_the_proportions_of_rectangles():
    wide = make_sample(target=np.full((32, 64, 3), 10, dtype=np.uint8), boxes=np.array([[0.0, 0.0, 1.0, 1.0]]))
    grid = np.asarray(picture_grid([wide], [Image.new("RGB", (64, 32), (0, 200, 0))], (0, 0, 0)))
    assert grid[20, 332].tolist() == [255, 255, 255]  # above the picture
    assert grid[68, 332].tolist() == [0, 200, 0]
    assert grid[4 + 32, 200].tolist() == list(COLORS[0])  # the box lies round the picture, not round the cell


def write_grid(directory, step, value, side=128, rows=1):
    cells = [[Image.new("RGB", (side, side), (value, value, value))] for _ in range(rows)]
    arrange(cells, side).save(directory / f"step_{step:06d}.png")


def test_the_strip_shows_the_steps_of_this_run(tmp_path):
    assert progress_strip(tmp_path, 10) is None
    write_grid(tmp_path, 10, 10)
    assert progress_strip(tmp_path, 10) is None
    write_grid(tmp_path, 20, 20)
    write_grid(tmp_path, 25, 25, rows=2)  # of other settings
    write_grid(tmp_path, 30, 30)
    write_grid(tmp_path, 40, 40)  # drawn before the run was resumed from step 20
    (tmp_path / "progress.png").touch()
    strip = np.asarray(progress_strip(tmp_path, 30))
    assert [int(strip[80, 60 + column * 132, 0]) for column in range(3)] == [10, 20, 30]
    assert strip.shape[1] == 3 * 132 + GAP
    assert progress_strip(tmp_path, 35) is None


def test_a_long_run_has_its_first_and_newest_step_in_the_strip(tmp_path):
    for step in range(1, 24):
        write_grid(tmp_path, step, step)
    strip = np.asarray(progress_strip(tmp_path, 23, columns=4))
    assert [int(strip[80, 60 + column * 132, 0]) for column in range(4)] == [1, 8, 16, 23]


def test_a_strip_of_something_else_is_refused(tmp_path):
    for step in (1, 2):
        Image.new("RGB", (50, 60)).save(tmp_path / f"step_{step:06d}.png")
    with pytest.raises(RequestError, match="no grid of this project"):
        progress_strip(tmp_path, 2)


def test_predictions_are_written_under_their_keys(run, tmp_path):
    trainer = run([PredictionPictures(grid=3)], max_steps=1)
    trainer.predict(trainer.lightning_module, datamodule=trainer.datamodule, return_predictions=False)
    keys = [sample.key for sample in trainer.datamodule.validation_samples(99)]
    written = {path.stem for path in (tmp_path / "predictions").iterdir()}
    assert written == {*keys, "grid"}
    assert Image.open(tmp_path / "predictions" / f"{keys[0]}.png").size == (32, 32)
    assert Image.open(tmp_path / "predictions" / "grid.png").size == (GAP + 2 * 196, GAP + min(3, len(keys)) * 196)


def test_what_only_fills_up_a_batch_is_not_written(tmp_path):
    batch = SimpleNamespace(
        keys=["a", "b"],
        weights=torch.tensor([1.0, 0.0]),
        boxes=torch.zeros(2, 1, 4),
        present=torch.ones(2, 1, dtype=torch.bool),
        targets=None,
    )
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True)
    callback = PredictionPictures(directory=str(tmp_path / "there"))
    callback.on_predict_batch_end(trainer, None, [Image.new("RGB", (8, 8))] * 2, batch, 0)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"a.png", "grid.png"}


@pytest.mark.parametrize("key", ["../up", "/abs", "a/b", "", "a.b", "\x1b[2J"])
def test_no_picture_is_written_outside_its_folder(tmp_path, key):
    """Data modules of others may have any keys; the reader of shards refuses them itself."""
    batch = SimpleNamespace(keys=[key], weights=torch.ones(1))
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True)
    with pytest.raises(DataError, match="can name no picture: keys are 1 to 200 letters, digits, - and _"):
        PredictionPictures().on_predict_batch_end(trainer, None, [Image.new("RGB", (8, 8))], batch, 0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
