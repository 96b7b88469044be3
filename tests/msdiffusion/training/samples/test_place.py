"""Runs are stopped wherever a checkpoint can be written, and go on: what they saw together is what one run sees."""

import itertools

import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.errors import RequestError
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.samples.place import Place, resumed_place

pytestmark = pytest.mark.usefixtures("loaded_once")

BATCHES = 5
"""Of an epoch: 23 pairs in batches of 4."""


class Recorder(pl.LightningModule):
    """Learns nothing; notes the epoch and the samples of every batch that it is trained on."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.fail_at = [], fail_at

    def prepare_references(self, pictures):
        return torch.zeros(len(pictures), 3, 2, 2)

    def latent_shape(self, height, width):
        return 4, height // 8, width // 8

    def training_step(self, batch, batch_index):
        if len(self.seen) == self.fail_at:
            raise ArithmeticError("the step fails")
        self.seen.append((self.trainer.current_epoch, batch.numbers.tolist(), batch.keys))
        return self.weight.sum()

    def validation_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Saver(pl.Callback):
    """Saves at every moment of one kind, as WHEN-STEP.ckpt."""

    def __init__(self, when, folder):
        self.when, self.folder = when, folder
        self.saved = {}

    def save(self, trainer, when):
        if when == self.when and trainer.global_step not in self.saved:
            self.saved[trainer.global_step] = self.folder / f"{when}-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(self.saved[trainer.global_step])

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "batch")

    def on_validation_end(self, trainer, module):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, "epoch")

    def on_train_end(self, trainer, module):
        self.save(trainer, "end")

    def on_exception(self, trainer, module, exception):
        self.save(trainer, "exception")


@pytest.fixture
def run(pairs_dir):
    """Function: settings of trainer and data -> what was seen, [(epoch, numbers, keys) of each batch]."""

    def make(saver=None, ckpt_path=None, data=None, fail_at=None, datamodule=None, **settings):
        defaults = {
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "max_epochs": None,
        }  # fmt: skip
        trainer = pl.Trainer(**defaults | settings, callbacks=[] if saver is None else [saver])
        own = {"resolution": 16, "batch_size": 4, "validation_fraction": 0.1, "encodings": "off"}
        module = Recorder(fail_at)
        datamodule = PairsDataModule(str(pairs_dir), **own | (data or {})) if datamodule is None else datamodule
        try:
            trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
        except ArithmeticError:
            assert fail_at is not None
        return module.seen

    return make


def limits(by, accumulate):
    """A run of a bit more than two epochs, ended by steps or by epochs."""
    steps = BATCHES // accumulate * 2 + 2
    return {"accumulate_grad_batches": accumulate} | ({"max_steps": steps} if by == "steps" else {"max_epochs": 3})


VALIDATED = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("by", ["steps", "epochs"])
@pytest.mark.parametrize("when", ["batch", "validation", "epoch"])
def test_a_resumed_run_sees_what_was_left(run, tmp_path, when, by, accumulate):
    settings = limits(by, accumulate) | (VALIDATED if when == "validation" else {})
    saver = Saver(when, tmp_path)
    whole = run(saver, **settings)
    assert [numbers[0] for _, numbers, _ in whole] == list(range(0, 4 * len(whole), 4))
    assert len(saver.saved) >= 2
    saver.saved.pop(0, None)  # before the first step, with half of its gradients
    for step, path in saver.saved.items():
        done = step * accumulate
        if when == "validation" and accumulate == 2:
            continue  # validation counts batches, so it may come between two steps: tested without accumulation
        assert run(ckpt_path=path, **settings) == whole[done:], f"resumed at step {step}"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("when", ["epoch", "end"])
def test_a_run_that_ended_is_made_longer(run, tmp_path, when, accumulate):
    """The end of a run is the end of an epoch to Lightning, wherever it comes; not to the data."""
    settings = limits("steps", accumulate)
    whole = run(**settings)
    for steps in range(1, settings["max_steps"]):
        saver = Saver(when, tmp_path / str(steps))
        first = run(saver, **settings | {"max_steps": steps})
        assert first == whole[: len(first)]
        assert run(ckpt_path=saver.saved[steps], **settings) == whole[len(first) :], f"ended at step {steps}"


def test_a_run_of_epochs_that_was_told_to_stop_goes_on_in_mid_epoch(run, tmp_path):
    class Stopper(Saver):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 7

    whole = run(max_epochs=3)
    saver = Stopper("end", tmp_path)
    assert run(saver, max_epochs=3) == whole[:7]
    assert run(ckpt_path=saver.saved[7], max_epochs=3) == whole[7:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_resumed_twice(run, tmp_path, accumulate):
    """Also at the end of an epoch's last step, after which Lightning would not count the next epoch as begun."""
    settings = limits("steps", accumulate)
    whole = run(**settings)
    first = Saver("batch", tmp_path / "first")
    run(first, **settings | {"max_steps": 4})
    for step in (1, 2, 3):
        second = Saver("batch", tmp_path / str(step))
        run(second, ckpt_path=first.saved[step], **settings)
        for later in range(step + 1, settings["max_steps"]):
            seen = run(ckpt_path=second.saved[later], **settings)
            assert seen == whole[later * accumulate :], f"resumed at step {step} and at step {later}"


def test_a_batch_that_failed_is_seen_again(run, tmp_path):
    whole = run(max_steps=12)
    for batches in (3, 5, 7):
        saver = Saver("exception", tmp_path / str(batches))
        assert run(saver, max_steps=12, fail_at=batches) == whole[:batches]
        assert run(ckpt_path=saver.saved[batches], max_steps=12) == whole[batches:]


def test_epochs_cut_short_are_cut_short_again(run, tmp_path):
    settings = {"max_steps": 8, "limit_train_batches": 3}
    saver = Saver("batch", tmp_path)
    whole = run(saver, **settings)
    assert [numbers[0] // 4 for _, numbers, _ in whole] == [0, 1, 2, 5, 6, 7, 10, 11]
    for step in range(1, 8):
        assert run(ckpt_path=saver.saved[step], **settings) == whole[step:]


@pytest.mark.parametrize("workers", [(0, 2), (2, 1)])
def test_workers_change_nothing(run, tmp_path, workers):
    whole = run(max_steps=12)
    before, after = ({"num_workers": count} for count in workers)
    saver = Saver("batch", tmp_path)
    assert run(saver, max_steps=8, data=before) == whole[:8]
    for step in (3, 5, 7):
        assert run(ckpt_path=saver.saved[step], max_steps=12, data=after) == whole[step:]


def test_lightning_does_not_warn_of_a_loader_that_cannot_be_resumed(run, tmp_path, recwarn):
    saver = Saver("batch", tmp_path)
    run(saver, max_steps=3)
    run(ckpt_path=saver.saved[2], max_steps=4)
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"lanes": 4}, "lanes: 8 then, 4 now"),
        ({"shuffle_buffer": 5}, "shuffle_buffer: 2048 then, 5 now"),
        ({"batch_size": 2}, "samples of a batch of all processes: 4 then, 2 now"),
        ({"validation_fraction": 0.0}, r"weight of each dataset: \[\[23, 1.0\]\] then, \[\[24, 1.0\]\] now"),
        ({"resolution": 32, "bucket_step": 8}, "pairs of each picture size: None then"),
    ],
)
def test_other_data_are_told(run, tmp_path, other, message):
    saver = Saver("batch", tmp_path)
    run(saver, max_steps=2)
    with pytest.raises(RequestError, match=rf"(?s)other data.*{message}.*--model.init_args.adapter"):
        run(ckpt_path=saver.saved[2], max_steps=4, data=other)


def test_other_pairs_of_the_same_number_are_told(run, tmp_path, shard_writer):
    write_shard, make_record = shard_writer
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        keys = [f"{folder.name}{i}" for i in range(8)]
        entries = [(key, make_record(key, [(0.1, 0.1, 0.9, 0.9)], (32, 32))) for key in keys]
        write_shard(folder / "pairs-000000.tar", entries, (32, 32))
    saver = Saver("batch", tmp_path)
    settings = {"resolution": 16, "validation_fraction": 0, "batch_size": 4, "encodings": "off"}
    run(saver, max_steps=2, datamodule=PairsDataModule(str(folders[0]), **settings))
    with pytest.raises(RequestError, match="keys of the pairs"):
        run(ckpt_path=saver.saved[2], max_steps=4, datamodule=PairsDataModule(str(folders[1]), **settings))


def test_a_change_that_moves_no_place_is_no_obstacle(run, tmp_path):
    saver = Saver("batch", tmp_path)
    run(saver, max_steps=2)
    seen = run(ckpt_path=saver.saved[2], max_steps=4, data={"box_jitter": 0.1, "crop": "random", "max_subjects": 8})
    assert [numbers[0] for _, numbers, _ in seen] == [8, 12]


def test_a_checkpoint_without_a_place_is_refused(run, tmp_path):
    saver = Saver("batch", tmp_path)
    run(saver, max_steps=2)
    checkpoint = torch.load(saver.saved[2], weights_only=True)
    del checkpoint["PairsDataModule"]
    torch.save(checkpoint, saver.saved[2])
    with pytest.raises(RequestError, match="does not say how far it came in its data"):
        run(ckpt_path=saver.saved[2], max_steps=4)


def test_another_run_of_the_same_data_module_begins_at_the_beginning(run, pairs_dir):
    datamodule = PairsDataModule(str(pairs_dir), 16, batch_size=4, validation_fraction=0.1, encodings="off")
    first, second = (run(max_steps=7, datamodule=datamodule) for _ in range(2))
    assert first == second


def test_another_fit_of_the_same_trainer_begins_an_epoch(pairs_dir):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, max_epochs=1,
    )  # fmt: skip
    datamodule = PairsDataModule(str(pairs_dir), 16, batch_size=4, validation_fraction=0.1, encodings="off")
    module = Recorder()
    trainer.fit(module, datamodule)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, datamodule)
    assert [numbers[0] // 4 for _, numbers, _ in module.seen] == list(range(2 * BATCHES))


def test_loaders_made_anew_every_epoch_go_on(run):
    assert run(max_steps=12, reload_dataloaders_every_n_epochs=1) == run(max_steps=12)


def test_epochs_without_a_batch_are_none():
    place = Place(3, 2, 2)
    place.begin_epoch()
    assert place == Place(3, 2, 2)
    place.taken += 1
    place.begin_epoch()
    assert place == Place(4, 0, 0)


def test_epochs_differ_and_lose_nothing(run):
    seen = run(max_epochs=2)
    epochs = [list(itertools.chain(*[keys for epoch, _, keys in seen if epoch == number])) for number in (0, 1)]
    assert epochs[0] != epochs[1]
    assert all(len(set(keys)) == 20 for keys in epochs)


def test_an_epoch_of_other_steps_is_refused_with_what_to_do():
    """A checkpoint of before an epoch was whole steps, or of another accumulation."""
    state = {"epoch": 0, "batch": 3, "data": {"seed": 0}}
    with pytest.raises(RequestError) as refused:
        resumed_place(state, {"seed": 0, "batches of an epoch": 12}, None)
    assert "(batches of an epoch: None then, 12 now). Resume with the trainer.accumulate_grad_batches of then; if" in (
        told := str(refused.value)
    )
    assert "Start a new run from its weights: without --ckpt_path" in told
