import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.training.curves import read_curves
from msdiffusion.training.run.checkpoints import RunCheckpoint
from msdiffusion.training.run.run_curves import RunCurves


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.ones(2))

    def training_step(self, batch, index):
        loss = self.weights.square().sum()
        self.log("training/loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("validation/loss", self.weights.square().sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def fit(tmp_path):
    def run(ckpt_path=None, **settings):
        defaults = {"max_steps": 4, "logger": False, "enable_model_summary": False, "enable_progress_bar": False,
                    "num_sanity_val_steps": 1, "accelerator": "cpu", "val_check_interval": 2, "log_every_n_steps": 1,
                    "check_val_every_n_epoch": None}  # fmt: skip
        callbacks = [RunCurves(), RunCheckpoint(every_n_steps=2)]
        trainer = pl.Trainer(callbacks=callbacks, default_root_dir=tmp_path, **defaults | settings)
        loader = torch.utils.data.DataLoader(torch.ones(8, 1))
        trainer.fit(Line(), loader, loader, ckpt_path=ckpt_path)
        return trainer

    return run


def test_a_run_takes_down_what_it_logs(fit, tmp_path):
    trainer = fit()
    curves = read_curves(tmp_path / "metrics.csv")
    assert [step for step, _ in curves["training/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["validation/loss"]] == [2, 4]
    assert curves["training/learning_rate"] == [(step, 0.1) for step in (1, 2, 3, 4)]
    assert curves["training/loss"][0] == (1, 2.0)
    assert curves["validation/loss"][-1][1] == float(trainer.callback_metrics["validation/loss"])
    assert (tmp_path / "curves.png").is_file()


def test_accumulated_batches_are_one_step(fit, tmp_path):
    fit(accumulate_grad_batches=2, log_every_n_steps=2, limit_val_batches=0)
    assert [step for step, _ in read_curves(tmp_path / "metrics.csv")["training/loss"]] == [2, 4]


def test_a_resumed_run_goes_on_with_the_table(fit, tmp_path):
    fit()
    whole = (tmp_path / "metrics.csv").read_text()
    torch_state = tmp_path / "checkpoints" / "last.ckpt"
    fit(max_steps=2)  # a run anew, which writes its table anew
    assert len((tmp_path / "metrics.csv").read_text()) < len(whole)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,training/loss,99.0\n4,trai")  # what a kill after its last checkpoint leaves
    fit(ckpt_path=str(torch_state))
    assert (tmp_path / "metrics.csv").read_text() == whole


def test_a_validation_between_accumulated_batches_is_there_once(fit, tmp_path):
    """It has the step of the state before it, so the step alone doesn't tell what came later."""
    settings = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    fit(max_steps=4, **settings)
    whole = (tmp_path / "metrics.csv").read_text()
    fit(max_steps=1, **settings)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1,validation/loss,0.5\n")  # as a kill in the next step leaves it
    fit(max_steps=4, ckpt_path="last", **settings)
    assert (tmp_path / "metrics.csv").read_text() == whole


def test_nothing_is_written_by_a_run_that_logs_nothing(fit, tmp_path):
    fit(log_every_n_steps=50, limit_val_batches=0)
    assert not (tmp_path / "metrics.csv").exists()
