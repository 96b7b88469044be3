"""What becomes of an earlier run's files, with a module of one weight."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.adapter.loading import RUN_PLACES
from msdiffusion.errors import RequestError
from msdiffusion.training.run import run_folder
from msdiffusion.training.run.checkpoints import AdapterExport, RunCheckpoint
from msdiffusion.training.run.run_curves import RunCurves
from msdiffusion.training.run.run_folder import PLACES, EarlierRun, continues, existing, rename_free, set_aside


class Point(pl.LightningModule):
    """Exports its weight as text; validation says ``score``."""

    def __init__(self, value=1.0, score=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(value))
        self.score = score

    def training_step(self, batch, index):
        return self.weight.square()

    def validation_step(self, batch, index):
        self.log("validation/loss", self.score)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def save_pretrained(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "adapter.safetensors").write_text(f"{float(self.weight)}")


@pytest.fixture
def fit(tmp_path):
    def run(module, *callbacks, ckpt_path=None, root="run", **settings):
        defaults = {"max_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None, "logger": False,
                    "num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
        trainer = pl.Trainer(callbacks=list(callbacks), accelerator="cpu", default_root_dir=tmp_path / root,
                             **defaults | settings)  # fmt: skip
        trainer.fit(
            module, torch.utils.data.DataLoader(range(8)), torch.utils.data.DataLoader(range(1)), ckpt_path=ckpt_path
        )
        return trainer

    return run


def weight(path):
    return float((path / "adapter.safetensors").read_text())


def test_the_places_are_those_where_an_adapter_is_looked_for():
    assert PLACES == RUN_PLACES


def test_a_new_run_hands_out_nothing_of_an_earlier_one(fit, tmp_path):
    """Ended before its first validation, it used to give the other's best weights as its own."""
    root = tmp_path / "run"
    fit(Point(1.0), AdapterExport(1), RunCheckpoint(every_n_steps=1))
    assert weight(root / "best") == weight(root / "adapter") == 1.0
    fit(Point(2.0), AdapterExport(1), RunCheckpoint(every_n_steps=1), max_steps=1)
    assert not (root / "best").exists() and not (root / "checkpoints" / "best.ckpt").exists()
    assert weight(root / "adapter") == 2.0
    assert weight(root / "best.1") == weight(root / "adapter.1") == 1.0
    assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["best.1.ckpt", "last.1.ckpt", "last.ckpt"]
    # the second one's score is not compared with the first one's, and a third one takes the next number
    fit(Point(3.0, score=9.0), AdapterExport(1), RunCheckpoint(every_n_steps=1))
    assert [weight(root / name) for name in ("best", "adapter", "adapter.2", "adapter.1")] == [3.0, 3.0, 2.0, 1.0]


def test_a_run_that_is_resumed_keeps_its_best(fit, tmp_path):
    fit(Point(1.0), RunCheckpoint(every_n_steps=1))
    fit(Point(2.0, score=9.0), RunCheckpoint(every_n_steps=1), ckpt_path="last", max_steps=4)
    assert weight(tmp_path / "run" / "best") == 1.0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["best", "checkpoints"]


def test_going_on_from_another_folder_is_another_run(fit, tmp_path):
    """Neither that folder's best score nor this folder's best weights are its own."""
    for root, value in (("one", 1.0), ("two", 2.0)):
        fit(Point(value), RunCheckpoint(every_n_steps=1), root=root)
    last = tmp_path / "one" / "checkpoints" / "last.ckpt"
    fit(Point(0.0, score=9.0), RunCheckpoint(every_n_steps=1), root="two", ckpt_path=str(last), max_steps=4)
    assert weight(tmp_path / "two" / "best") == 1.0  # of the weights that it went on from, though its score is worse
    assert weight(tmp_path / "two" / "best.1") == 2.0


@pytest.mark.parametrize("callback", [AdapterExport, EarlierRun])
def test_each_callback_does_it_alone(fit, tmp_path, callback):
    fit(Point(1.0), AdapterExport(1), RunCheckpoint(every_n_steps=1))
    fit(Point(2.0), callback(), max_steps=1)
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.parametrize(
    ("origin", "step", "expected"),
    [
        (None, 0, False),
        (None, 5, True),  # a further fit of the same trainer
        ("checkpoints/last.ckpt", 5, True),
        ("checkpoints/last.ckpt.old", 5, True),
        ("checkpoints/kept_by_hand.ckpt", 5, True),
        ("checkpoints/last.1.ckpt", 5, False),
        ("checkpoints/best.12.ckpt", 5, False),
        ("checkpoints/last.1.ckpt.old", 5, False),
        ("checkpoints/epoch=3-val_loss=0.25.ckpt", 5, True),  # Lightning's own names
        ("checkpoints/msd_0.7.12.ckpt", 5, True),
        ("checkpoints/very_last.1.ckpt", 5, True),
        ("../other/checkpoints/last.ckpt", 5, False),
    ],
)
def test_what_a_run_goes_on_with(tmp_path, origin, step, expected):
    path = None if origin is None else str(tmp_path / origin)
    assert continues(SimpleNamespace(default_root_dir=tmp_path, ckpt_path=path, global_step=step)) is expected


def test_all_get_one_number_and_what_is_no_runs_stays(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "adapter.safetensors").touch()
    (tmp_path / "last.ckpt.old").touch()
    (tmp_path / "last.1.ckpt").touch()
    (tmp_path / "adapter").mkdir()  # somebody's own: a run without a folder of its own writes where the command stands
    named = rename_free([tmp_path / name for name in ("best", "adapter", "last.ckpt", "missing")])
    assert named == [tmp_path / "best.2", tmp_path / "last.2.ckpt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "best.2", "last.1.ckpt", "last.2.ckpt"]


def test_an_older_folder_that_a_kill_has_left_goes_with_the_newer_one(tmp_path):
    for name in ("last.ckpt", "last.ckpt.old"):  # strategies that split the weights write folders
        (tmp_path / name).mkdir()
    assert rename_free([tmp_path / "last.ckpt"]) == [tmp_path / "last.1.ckpt"]
    assert existing(tmp_path / "last.ckpt") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.1.ckpt", "last.1.ckpt.old"]


def test_a_trial_leaves_a_finished_run_as_it_is(fit, tmp_path):
    """``fast_dev_run`` used to rename everything, and its adapter of one step was the run's from then on."""

    def callbacks():
        return EarlierRun(), AdapterExport(1), RunCheckpoint(every_n_steps=1), RunCurves()

    def contents():
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    fit(Point(1.0), *callbacks(), log_every_n_steps=1)
    before = contents()
    assert {"best.ckpt", "last.ckpt", "adapter.safetensors", "metrics.csv"} <= {path.name for path in before}
    fit(Point(2.0, score=0.5), *callbacks(), fast_dev_run=True, log_every_n_steps=1)
    assert contents() == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_processes_in_one_folder_lose_nothing(tmp_path, monkeypatch, kind):
    """The other one is quicker: between the look and the rename it takes the thing, or its new name."""
    path, new = tmp_path / "last.ckpt", tmp_path / "last.1.ckpt"

    def make(place, text):
        if kind == "folder":
            place.mkdir()
            place = place / "part"
        place.write_text(text)

    make(path, "mine")
    monkeypatch.setattr(run_folder, "_of_a_run", lambda found: [path.rename(tmp_path / "taken")])
    with pytest.raises(RequestError, match=r"last\.ckpt cannot be .* to last\.1\.ckpt: another process works in this"):
        rename_free([path])
    assert [place.name for place in tmp_path.iterdir()] == ["taken"]
    (tmp_path / "taken").rename(path)
    monkeypatch.setattr(run_folder, "_of_a_run", lambda found: True)
    monkeypatch.setattr(run_folder.Path, "exists", lambda place: place == path)
    make(new, "the other's")
    with pytest.raises(RequestError, match="another process works in this folder"):
        rename_free([path])
    for place, text in ((path, "mine"), (new, "the other's")):
        assert (place / "part" if kind == "folder" else place).read_text() == text


def test_only_the_first_process_renames(tmp_path):
    (tmp_path / "metrics.csv").touch()
    other = SimpleNamespace(is_global_zero=False, fast_dev_run=False, default_root_dir=tmp_path, ckpt_path=None,
                            global_step=0)  # fmt: skip
    set_aside(other, "metrics.csv")
    assert (tmp_path / "metrics.csv").exists()
    set_aside(SimpleNamespace(**vars(other) | {"is_global_zero": True}), "metrics.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.1.csv"]
