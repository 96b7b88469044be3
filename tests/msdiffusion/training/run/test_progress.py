from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler, SimpleProfiler

from msdiffusion.training.run.progress import FETCH, FetchClock, RunProgress


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.ones(2))

    def training_step(self, batch, index):
        return (self.weights * batch.mean()).square().sum()

    def validation_step(self, batch, index):
        self.log("validation/loss", 0.25)

    def test_step(self, batch, index):
        pass

    def predict_step(self, batch, index):
        return []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Slow(torch.utils.data.Dataset):
    """Takes its time, by a clock that only the dataset moves."""

    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.clock[0] += 3.0
        return torch.ones(1)


@pytest.fixture
def trainer(tmp_path):
    def make(progress, **settings):
        defaults = {"max_steps": 4, "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
                    "num_sanity_val_steps": 0, "accelerator": "cpu", "val_check_interval": 2}  # fmt: skip
        return pl.Trainer(callbacks=[progress], default_root_dir=tmp_path, **defaults | settings)

    return make


def loader():
    return torch.utils.data.DataLoader(torch.ones(12, 1), batch_size=2)


def test_progress_shows_the_whole_run(trainer, capsys):
    trainer(RunProgress(refresh_seconds=0)).fit(Line(), loader(), loader())
    shown = capsys.readouterr().err
    assert "training: 100%" in shown
    assert "4/4" in shown
    assert "loss=" in shown
    assert "validation=0.25" in shown
    assert "samples/s=" in shown
    assert "batch" not in shown  # the validations of a run have no bar of their own


def test_the_loss_is_that_of_a_sample_with_accumulation_too(trainer):
    progress = RunProgress(refresh_seconds=0)
    trainer(progress, max_steps=1, accumulate_grad_batches=2, limit_val_batches=0).fit(Line(), loader())
    assert progress._loss == pytest.approx(2.0)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_other_commands_have_a_bar_too(trainer, capsys, command):
    getattr(trainer(RunProgress(refresh_seconds=0)), command)(Line(), loader())
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert {"validate": "validation", "test": "test", "predict": "pictures"}[command] in shown


def test_a_disabled_bar_shows_nothing(trainer, capsys):
    progress = RunProgress(refresh_seconds=0)
    run = trainer(progress)
    progress.disable()
    run.fit(Line(), loader(), loader())
    assert "training" not in capsys.readouterr().err
    progress.enable()
    run.validate(Line(), loader())
    assert "validation" in capsys.readouterr().err


def test_progress_closes_its_bar_on_an_error(trainer, capsys):
    class Failing(Line):
        def training_step(self, batch, index):
            raise RuntimeError("on purpose")

    progress = RunProgress()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(progress).fit(Failing(), loader())
    assert progress._bar.disable  # what tqdm's close() sets
    assert capsys.readouterr().err.endswith("\n")


def test_the_share_of_waiting_is_measured_from_the_loader_alone(trainer, monkeypatch):
    """By a clock that stands still but for 3 seconds of loading and 1 of the step, and 100 of each validation."""
    clock = [0.0]
    monkeypatch.setattr("msdiffusion.training.run.progress.time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Timed(Line):
        def training_step(self, batch, index):
            clock[0] += 1.0
            return super().training_step(batch, index)

        def validation_step(self, batch, index):
            clock[0] += 100.0

    run = trainer(RunProgress(), log_every_n_steps=2, max_steps=8)
    run.fit(Timed(), torch.utils.data.DataLoader(Slow(clock)), loader())
    assert float(run.callback_metrics["training/waiting_share"]) == pytest.approx(0.75)
    assert float(run.callback_metrics["training/samples_per_second"]) == pytest.approx(0.25)


def test_the_clock_hands_everything_on_to_the_runs_own_profiler(tmp_path):
    inner = SimpleProfiler(dirpath=tmp_path, filename="profile")
    clock = FetchClock(inner)
    clock.setup("fit", 0, str(tmp_path))
    for name in (f"[Loop].{FETCH}", "other"):
        with clock.profile(name):
            pass
    assert set(inner.recorded_durations) == {f"[Loop].{FETCH}", "other"}
    waited = clock.waited
    assert clock.take() == waited > 0
    assert clock.waited == 0.0
    assert FETCH in clock.summary()
    clock.describe()
    clock.teardown("fit")
    assert list(tmp_path.iterdir())


def test_a_module_reaches_the_inner_profiler():
    inner, module = PassThroughProfiler(), object()
    clock = FetchClock(inner)
    clock._lightning_module = module
    clock.setup("fit")
    assert inner._lightning_module is module


def test_one_clock_is_enough(trainer):
    run = trainer(RunProgress(), max_steps=2)
    for _ in range(2):
        run.fit(Line(), loader())
    assert isinstance(run.profiler, FetchClock)
    assert not isinstance(run.profiler.inner, FetchClock)
