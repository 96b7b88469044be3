"""What a run keeps, with a module of four weights: nothing here needs a diffusion model."""

import random
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from msdiffusion.errors import RequestError, TrainingError
from msdiffusion.training.run.checkpoints import AdapterExport, RunCheckpoint, follow_settings
from msdiffusion.training.run.run_folder import existing
from msdiffusion.training.run.saving import WholeFiles, last_good, random_states, restore_random_states, save_whole


class Line(pl.LightningModule):
    """Logs ``scores[k]`` at its k-th validation."""

    def __init__(self, scores=(), learning_rate=0.1, weight_decay=0.0):
        super().__init__()
        self.save_hyperparameters("learning_rate", "weight_decay")
        self.weights = torch.nn.Parameter(torch.arange(4.0))
        self.scores = list(scores)
        self.exported = []

    def training_step(self, batch, index):
        return (self.weights * batch[0].mean()).square().sum()

    def validation_step(self, batch, index):
        pass

    def on_validation_epoch_end(self):
        if self.scores:
            self.log("validation/score", self.scores[self.validations])

    @property
    def validations(self):
        return self.trainer.global_step // self.trainer.val_check_batch - 1

    def configure_optimizers(self):
        p = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=p.learning_rate, weight_decay=p.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, directory):
        self.exported.append((str(directory.name), self.trainer.global_step))


def loader(count=64):
    data = torch.utils.data.TensorDataset(torch.linspace(0.1, 1, count))
    return torch.utils.data.DataLoader(data, batch_size=2)


@pytest.fixture
def fit(tmp_path):
    """Function: module, callbacks and settings -> the trainer after training in tmp_path, validated every 2 steps."""

    def run(module, callbacks, ckpt_path=None, **settings):
        defaults = {"max_steps": 5, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
                    "num_sanity_val_steps": 0, "val_check_interval": 2, "check_val_every_n_epoch": None,
                    "accelerator": "cpu"}  # fmt: skip
        trainer = pl.Trainer(callbacks=callbacks, default_root_dir=tmp_path, **defaults | settings)
        trainer.fit(module, loader(), loader(4), ckpt_path=ckpt_path)
        return trainer

    return run


def read(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("settings", [{"every_n_steps": 0}, {"every_n_minutes": 0}, {"mode": "more"}])
def test_wrong_settings_are_told_at_construction(settings):
    with pytest.raises(RequestError, match=next(iter(settings))):
        RunCheckpoint(**settings)


def test_the_state_is_kept_every_n_steps_and_at_the_end(fit, tmp_path):
    kept = []

    class Watch(RunCheckpoint):
        def _save(self, trainer):
            super()._save(trainer)
            kept.append(read(tmp_path / "checkpoints" / "last.ckpt")["global_step"])

    fit(Line(), [Watch(every_n_steps=2, monitor=None)], max_steps=5)
    assert kept == [2, 4, 5]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_with_accumulation_it_is_kept_once_per_step(fit, tmp_path):
    kept = []

    class Watch(RunCheckpoint):
        def _save(self, trainer):
            kept.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready))
            super()._save(trainer)

    fit(Line(), [Watch(every_n_steps=1, monitor=None)], max_steps=3, accumulate_grad_batches=2, limit_val_batches=0)
    assert kept == [(1, 2), (2, 4), (3, 6)]


def test_the_state_is_kept_by_the_clock(fit, monkeypatch):
    kept, now = [], [0.0]
    monkeypatch.setattr("msdiffusion.training.run.checkpoints.time.monotonic", lambda: now[0])

    class Watch(RunCheckpoint):
        def on_train_batch_end(self, trainer, *arguments):
            now[0] += 30
            super().on_train_batch_end(trainer, *arguments)

        def _save(self, trainer):
            super()._save(trainer)
            kept.append(trainer.global_step)

    fit(Line(), [Watch(every_n_steps=100, every_n_minutes=1, monitor=None)], max_steps=6, limit_val_batches=0)
    assert kept == [2, 4, 6]


def test_a_state_that_is_due_waits_for_the_validation_of_its_step(fit, tmp_path):
    """Then a resumed run neither repeats nor leaves out the validation, and knows its score."""

    class Killed(pl.Callback):
        def on_validation_start(self, trainer, module):
            if trainer.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(Line([5.0, 4.0]), [RunCheckpoint(every_n_steps=2, monitor="validation/score"), Killed()])
    state = read(tmp_path / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 2
    assert state["callbacks"]["RunCheckpoint"]["best_score"] == 5.0


@pytest.mark.parametrize(("mode", "scores", "best"), [("min", [3.0, 1.0, 2.0], 4), ("max", [3.0, 1.0, 2.0], 2)])
def test_the_best_weights_by_validation_are_kept(fit, tmp_path, mode, scores, best):
    module = Line(scores)
    trainer = fit(module, [RunCheckpoint(monitor="validation/score", mode=mode)], max_steps=6)
    kept = read(tmp_path / "checkpoints" / "best.ckpt")
    assert kept["global_step"] == best
    assert "optimizer_states" not in kept and "callbacks" not in kept
    assert module.exported[-1] == ("best", best)
    assert trainer.checkpoint_callback.best_model_path == str(tmp_path / "checkpoints" / "best.ckpt")


def test_the_best_score_survives_a_resume(fit, tmp_path):
    fit(Line([1.0]), [RunCheckpoint(monitor="validation/score")], max_steps=2)
    # another interval is no other callback
    trainer = fit(Line([1.0, 2.0]), [RunCheckpoint(7, monitor="validation/score")], max_steps=4, ckpt_path="last")
    assert trainer.global_step == 4
    assert read(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 2
    # what is best by something else was never measured
    fit(Line([1.0, 2.0, 9.0]), [RunCheckpoint(monitor="validation/score", mode="max")], max_steps=6, ckpt_path="last")
    assert read(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 6


def test_a_score_that_is_no_number_is_never_best(fit, tmp_path):
    with pytest.warns(UserWarning, match="validation/score is nan at step 2"):
        fit(Line([float("nan"), 3.0]), [RunCheckpoint(monitor="validation/score")], max_steps=4)
    assert read(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 4


def test_a_score_that_nobody_logs_is_told_with_those_there_are(fit):
    with pytest.raises(RequestError, match=r"'validation/lost', but .* logs \['validation/score'\]"):
        fit(Line([1.0]), [RunCheckpoint(monitor="validation/lost")])


def test_the_end_is_kept_when_another_callback_stops_the_run(fit, tmp_path):
    class Enough(pl.Callback):
        def on_train_batch_end(self, trainer, *arguments):
            trainer.should_stop = trainer.global_step == 3

    fit(Line(), [RunCheckpoint(monitor=None), Enough()], limit_val_batches=0)
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize("limits", [{"max_steps": 3}, {"max_epochs": 1, "max_steps": -1, "limit_train_batches": 3}])
def test_a_longer_run_goes_on_in_the_middle_of_the_epoch(fit, tmp_path, limits):
    """The end of a run is kept at its last step, not after an epoch that was cut short has been called complete."""
    fit(Line(), [RunCheckpoint(monitor=None)], limit_val_batches=0, **limits)
    progress = read(tmp_path / "checkpoints" / "last.ckpt")["loops"]["fit_loop"]
    assert progress["epoch_loop.batch_progress"]["current"]["ready"] == 3
    assert progress["epoch_progress"]["current"]["completed"] == 0


def test_weights_that_are_no_numbers_are_not_saved(fit, tmp_path):
    class Poison(pl.Callback):
        def on_train_batch_end(self, trainer, module, *arguments):
            if trainer.global_step == 3:
                module.weights.data[1] = float("nan")

    with pytest.raises(TrainingError, match=r"not finite after step 3 \(1 of 1 weights, weights\).*last\.ckpt"):
        fit(Line(), [Poison(), RunCheckpoint(every_n_steps=1, monitor=None)], limit_val_batches=0)
    state = read(tmp_path / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 2
    assert torch.isfinite(state["state_dict"]["weights"]).all()


def test_the_adapter_is_not_exported_from_such_weights(fit):
    module = Line()
    module.weights.data[0] = float("inf")
    with pytest.raises(TrainingError, match="nothing was saved; no checkpoint was written yet"):
        fit(module, [AdapterExport(every_n_steps=1)], enable_checkpointing=False)
    assert module.exported == []


def test_the_adapter_is_exported_to_the_runs_directory_or_elsewhere(tmp_path):
    written = []
    trainer = SimpleNamespace(default_root_dir=tmp_path)
    for directory in (None, "there"):
        AdapterExport(directory=directory).act(trainer, SimpleNamespace(save_pretrained=written.append))
    assert written == [tmp_path / "adapter", "there"]


class Disk:
    """A trainer that writes what it is told, file or folder, or breaks off in the middle."""

    is_global_zero = True
    world_size = 1
    lightning_module = torch.nn.Linear(1, 1)
    strategy = SimpleNamespace(barrier=lambda name: None, reduce_boolean_decision=lambda flag, all: flag)

    def __init__(self, content, folder=False, broken=False):
        self.content, self.folder, self.broken = content, folder, broken

    def save_checkpoint(self, path, weights_only):
        if self.folder:
            path.mkdir()
            path = path / "part"
        path.write_text(self.content)
        if self.broken:
            raise KeyboardInterrupt


@pytest.mark.parametrize("folder", [False, True])
def test_a_kill_while_saving_keeps_the_old_state(tmp_path, folder):
    path = tmp_path / "checkpoints" / "last.ckpt"

    def content():
        return (path / "part" if folder else path).read_text()

    save_whole(Disk("first", folder), path, weights_only=False)
    with pytest.raises(KeyboardInterrupt):
        save_whole(Disk("half", folder, broken=True), path, weights_only=False)
    assert content() == "first"
    assert [item.name for item in path.parent.iterdir()] == ["last.ckpt"]
    save_whole(Disk("second", folder), path, weights_only=False)
    assert content() == "second"
    assert [item.name for item in path.parent.iterdir()] == ["last.ckpt"]


def test_a_kill_between_two_renames_leaves_the_old_folder(tmp_path):
    path = tmp_path / "last.ckpt"
    assert existing(path) is None
    old = tmp_path / "last.ckpt.old"
    old.mkdir()
    assert existing(path) == old
    path.mkdir()
    assert existing(path) == path


@pytest.mark.parametrize("gone", [True, False])
def test_all_processes_hear_from_the_first_whether_there_is_a_best(tmp_path, gone):
    """Those that looked by themselves, before or after it had renamed, had other best scores, and waited for ever."""
    (tmp_path / "checkpoints").mkdir()
    if gone:  # not yet for this process
        (tmp_path / "checkpoints" / "best.ckpt").touch()
    first = SimpleNamespace(broadcast=lambda mine: gone)
    callback = RunCheckpoint()
    callback.best_score = 1.0
    callback.on_train_start(
        SimpleNamespace(is_global_zero=False, fast_dev_run=0, default_root_dir=tmp_path, global_step=5, strategy=first),
        None,
    )
    assert callback.best_score == (None if gone else 1.0)


def test_messages_name_the_last_good_checkpoint(tmp_path):
    trainer = SimpleNamespace(default_root_dir=tmp_path)
    assert last_good(trainer) == "no checkpoint was written yet"
    trainer.checkpoint_callback = SimpleNamespace(last_model_path="elsewhere/last.ckpt")  # Lightning's own
    assert "elsewhere/last.ckpt: go on" in last_good(trainer)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert str(tmp_path / "checkpoints" / "last.ckpt") in last_good(trainer)


def test_other_settings_of_the_optimizer_replace_those_of_the_checkpoint(fit):
    fit(Line(learning_rate=0.1, weight_decay=0.5), [RunCheckpoint(monitor=None)], max_steps=2)
    seen = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, *arguments):
            seen.setdefault("group", dict(trainer.optimizers[0].param_groups[0]))

    module = Line(learning_rate=0.4, weight_decay=0.0)
    trainer = fit(module, [RunCheckpoint(monitor=None), Watch()], max_steps=4, ckpt_path="last")
    assert seen["group"]["lr"] == pytest.approx(0.4 / 3)  # the schedule's factor after two steps
    assert seen["group"]["weight_decay"] == 0.0
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([0.4])
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == pytest.approx([0.4 / 5])


def test_equal_settings_leave_the_checkpoint_alone():
    settings = {"learning_rate": 0.3, "weight_decay": 0.1}
    state = {"param_groups": [{"lr": 0.1 / 3, "initial_lr": 0.1 / 3, "weight_decay": 0.1}]}
    checkpoint = {"hyper_parameters": settings, "optimizer_states": [state], "lr_schedulers": [{"base_lrs": [0.1 / 3]}]}
    expected = repr(checkpoint)
    follow_settings(checkpoint, settings)
    assert repr(checkpoint) == expected
    follow_settings(checkpoint, {})
    assert repr(checkpoint) == expected


@pytest.mark.parametrize(("old", "new"), [(0.0, 0.1), (0.1, 0.0)])
def test_zero_is_a_setting_like_any_other(old, new):
    group = {"lr": 0.2, "initial_lr": 0.2, "weight_decay": old}
    checkpoint = {
        "hyper_parameters": {"learning_rate": 0.2, "weight_decay": old},
        "optimizer_states": [{"param_groups": [group]}],
        "lr_schedulers": [{"base_lrs": [0.2], "_last_lr": [0.2]}],
    }
    follow_settings(checkpoint, {"learning_rate": 0.0, "weight_decay": new})
    assert group == {"lr": 0.0, "initial_lr": 0.0, "weight_decay": new}
    assert checkpoint["lr_schedulers"] == [{"base_lrs": [0.0], "_last_lr": [0.0]}]
    checkpoint["hyper_parameters"]["learning_rate"] = 0.0
    with pytest.raises(RequestError, match="learning_rate was 0 in the checkpoint.*start a new run"):
        follow_settings(checkpoint, {"learning_rate": 0.1})


def test_the_states_of_the_generators_load_safely(tmp_path):
    random.gauss(0, 1)
    np.random.standard_normal()
    torch.save(random_states(), tmp_path / "states")

    def draw():
        return torch.rand(3).tolist(), np.random.standard_normal(3).tolist(), random.gauss(0, 1)

    expected = draw()
    assert draw() != expected
    restore_random_states(torch.load(tmp_path / "states", weights_only=True))
    assert draw() == expected


def test_a_resumed_run_has_the_generators_of_the_old_one(fit):
    drawn = []

    class Draw(pl.Callback):
        def on_train_batch_start(self, *arguments):
            drawn.append(float(torch.rand(())))

    fit(Line(), [RunCheckpoint(monitor=None), Draw()], max_steps=2, limit_val_batches=0)
    after = float(torch.rand(()))
    torch.manual_seed(99)
    fit(Line(), [RunCheckpoint(monitor=None), Draw()], max_steps=3, limit_val_batches=0, ckpt_path="last")
    assert drawn[2] == after


def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(fit, tmp_path):
    """A limit on the size of files stands for the end of the disk: the system refuses to write in the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(pl.Callback):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(
            TrainingError,
            match=r"last\.ckpt could not be written: .*File too large.*; the last good checkpoint is .*last",
        ):
            fit(Line(), [Full(), RunCheckpoint(every_n_steps=1, monitor=None)], limit_val_batches=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_staged_beside_the_run_and_not_in_the_temporary_folder(fit, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    trainer = fit(Line(), [RunCheckpoint(monitor=None)], max_steps=2, limit_val_batches=0)
    assert read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
    record = trainer._checkpoint_connector.dump_checkpoint()
    trainer.strategy.checkpoint_io.save_checkpoint(record, tmp_path / "ours")
    monkeypatch.undo()
    TorchCheckpointIO().save_checkpoint(record, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_other_processes_hear_that_the_first_could_not_write(tmp_path):
    """They wait for it otherwise: only the first has the exception."""
    trainer = Disk("half")
    trainer.strategy = SimpleNamespace(
        **vars(Disk.strategy), checkpoint_io=WholeFiles(), broadcast=lambda told: "No space left on device"
    )
    with pytest.raises(TrainingError, match="could not be written: No space left on device; no checkpoint was written"):
        trainer.default_root_dir = tmp_path
        save_whole(trainer, tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert list((tmp_path / "checkpoints").iterdir()) == []
