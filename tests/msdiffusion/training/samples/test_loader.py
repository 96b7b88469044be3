import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import numpy as np
import pytest
import torch

from msdiffusion.errors import DataError
from msdiffusion.training.catalogue import read_catalogue
from msdiffusion.training.samples.collation import PairsCollator
from msdiffusion.training.samples.dataset import PairsDataset
from msdiffusion.training.samples.loader import FixedSampler, PairsLoader, PlanSampler, make_loader
from msdiffusion.training.samples.mixture import Mixture
from msdiffusion.training.samples.place import Place
from msdiffusion.training.samples.plan import EpochPlan, PlannedDataset, padded_order
from msdiffusion.training.samples.settings import LoadingSettings, SampleSettings

BOX = [(0.1, 0.1, 0.9, 0.9)]


def no_pixels(pictures):
    """Stands in for the image encoder's preprocessing."""
    return torch.zeros(len(pictures), 3, 2, 2)


@pytest.fixture(scope="module")
def pairs(pairs_dir):
    return Mixture([read_catalogue(str(pairs_dir))])


@pytest.fixture(scope="module")
def dataset(pairs):
    return PairsDataset(pairs, np.arange(24), SampleSettings(resolution=16, max_subjects=2), augmented=True)


@pytest.fixture
def plan(pairs):
    return EpochPlan([PlannedDataset(np.arange(24), pairs.shards)], seed=0, global_batch=4, lanes=4)


@pytest.fixture
def make(dataset):
    """Function: sampler, another dataset, options -> loader."""

    def make(sampler, data=dataset, batch_size=4, prefetch_factor=None, **options):
        collate = PairsCollator(2, no_pixels, {(16, 16): (4, 2, 2)})
        settings = {"batch_size": batch_size, "lanes": 1, "shuffle_buffer": 1, "num_workers": 0, "worker_start": None}
        loaders.append(make_loader(data, sampler, LoadingSettings(**settings | options), collate))
        loaders[-1].prefetch_factor = prefetch_factor or loaders[-1].prefetch_factor
        return loaders[-1]

    loaders = []
    yield make
    for loader in loaders:  # as Lightning does; left to the collector of garbage, workers end after some seconds
        if loader.num_workers and loader._iterator is not None:
            loader._iterator._shutdown_workers()


def test_processes_share_every_batch_of_the_plan(plan):
    samplers = [PlanSampler(plan, rank, 2, Place(3)) for rank in range(2)]
    whole = list(PlanSampler(plan, 0, 1, Place(3)))
    assert [len(sampler) for sampler in samplers] == [12, 12]
    parts = [list(sampler) for sampler in samplers]
    assert parts == [whole[0::2], whole[1::2]]
    assert [number for number, _ in whole] == list(range(72, 96))
    assert [index for _, index in whole] == plan.order(3).tolist()


def test_a_sampler_begins_where_it_is_told_to(plan):
    whole = list(PlanSampler(plan, 0, 1, Place()))
    sampler = PlanSampler(plan, 0, 1, Place(0, 2, 2))
    assert list(sampler) == whole[8:]
    assert len(sampler) == 24, "Lightning counts whole epochs"


def test_lightning_numbers_epochs_as_it_likes(plan):
    sampler = PlanSampler(plan, 0, 1, Place(5, 1, 1))
    sampler.set_epoch(0)
    assert next(iter(sampler))[0] == 5 * 24 + 4
    sampler.set_epoch(1)  # nothing was taken yet
    assert next(iter(sampler))[0] == 5 * 24 + 4
    sampler.place.taken = 6
    sampler.set_epoch(1)  # said twice
    assert sampler.place == Place(5, 1, 6)
    sampler.set_epoch(2)
    assert next(iter(sampler))[0] == 6 * 24


def test_the_loader_counts_what_was_taken_and_not_what_was_loaded_ahead(plan, make):
    sampler = PlanSampler(plan, 0, 1, Place())
    batches = iter(make(sampler, num_workers=2, prefetch_factor=3))
    for count in range(1, 4):
        next(batches)
        assert sampler.place.taken == count


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_load_the_same(plan, make, workers):
    alone, shared = (list(make(PlanSampler(plan, 0, 1, Place()), num_workers=count)) for count in (0, workers))
    assert len(alone) == len(shared) == 6
    for one, other in zip(alone, shared, strict=True):
        assert one.keys == other.keys
        torch.testing.assert_close(one.targets, other.targets, rtol=0, atol=0)
        torch.testing.assert_close(one.draws.noise, other.draws.noise, rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Python decides")
def test_workers_are_forked_unless_something_else_is_asked_for(plan, make):
    starts = [
        make(PlanSampler(plan, 0, 1, Place()), num_workers=1, worker_start=start).multiprocessing_context
        for start in (None, "spawn", "forkserver")
    ]
    assert [context.get_start_method() for context in starts] == ["fork", "spawn", "forkserver"]


@pytest.fixture
def damaged(shard_writer, tmp_path):
    """A dataset whose second pair does not decode."""
    write_shard, make_record = shard_writer
    shard = tmp_path / "pairs-000000.tar"
    write_shard(shard, [(key, make_record(key, BOX, (96, 64))) for key in "abcd"])
    content = bytearray(shard.read_bytes())
    start = [i for i in range(len(content)) if content[i : i + 3] == b"\xff\xd8\xff"][1]
    content[start : start + 200] = bytes(200)
    shard.write_bytes(content)
    return PairsDataset(
        Mixture([read_catalogue(str(tmp_path))]), np.arange(4), SampleSettings(resolution=16, max_subjects=2)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_pair_arrives_as_the_readers_words(damaged, make, workers):
    sampler = FixedSampler(*padded_order(np.arange(4), 1, 1), 0, 1)
    batches = iter(make(sampler, damaged, batch_size=1, num_workers=workers))
    assert next(batches).keys == ["a"]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert "'b'" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_validation_is_shared_and_padded(make, pairs):
    data = PairsDataset(pairs, np.arange(9), SampleSettings(resolution=16, max_subjects=2))
    numbers, indices = padded_order(np.arange(9), 2, 2)
    loaders = [make(FixedSampler(numbers, indices, rank, 2), data, batch_size=2) for rank in range(2)]
    batches = [list(loader) for loader in loaders]
    assert [[len(batch) for batch in part] for part in batches] == [[2, 2, 1], [2, 2, 1]]
    seen = [
        (number, key)
        for part in batches for batch in part
        for number, key, weight in zip(batch.numbers.tolist(), batch.keys, batch.weights.tolist(), strict=True)
        if weight
    ]  # fmt: skip
    assert sorted(seen) == [(i, f"clip_{i:06d}") for i in range(9)]
    for _ in range(2):  # every time the same
        assert [batch.keys for batch in loaders[0]] == [batch.keys for batch in batches[0]]


def test_nobody_elses_random_numbers_depend_on_loading(plan, make):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for _ in make(PlanSampler(plan, 0, 1, Place()), num_workers=1):
        pass
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_shards_are_asked_for_once_per_batch_where_a_batch_is_more_than_is_asked_for(plan, make, pairs, monkeypatch):
    asked = []
    monkeypatch.setattr(pairs, "prefetch", lambda indices: asked.append(len(indices)))
    monkeypatch.setattr(PairsLoader, "PREFETCH", 3)
    ahead = make(PlanSampler(plan, 0, 1, Place()))._prefetching()
    next(ahead)
    assert asked == [8]  # this batch and the next one, and no more of the epoch
    assert len(list(ahead)) == 5
    assert asked == [8, 8, 8, 8, 8, 4]


def test_shards_are_asked_for_ahead(plan, make, pairs, monkeypatch):
    asked = []
    monkeypatch.setattr(PairsLoader, "PREFETCH", 8)
    monkeypatch.setattr(pairs.catalogues[0], "prefetch", lambda part: asked.append(part.tolist()))
    order = plan.order(0).tolist()
    for taken, _ in enumerate(make(PlanSampler(plan, 0, 1, Place())), start=1):
        # what comes next was asked for before it is needed
        assert set(order[4 * taken : 4 * taken + 8]) <= set(asked[-1])
    asked.clear()
    next(iter(make(PlanSampler(plan, 1, 2, Place(0, 2, 2)), batch_size=2)))
    assert asked == [order[9::2]]


PROGRAM = """
import json, sys
import pytorch_lightning as pl, torch
from msdiffusion.training.datamodule import PairsDataModule
from msdiffusion.training.samples.loader import PairsLoader

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.validated = [], []
    def prepare_references(self, pictures):
        return torch.zeros(len(pictures), 3, 2, 2)
    def latent_shape(self, height, width):
        return 4, height // 8, width // 8
    def training_step(self, batch, batch_index):
        self.seen.append([batch.numbers.tolist(), batch.keys, batch.draws.timestep.tolist()])
        return self.weight.sum()
    def validation_step(self, batch, batch_index):
        self.validated.append([batch.numbers.tolist(), batch.weights.tolist(), batch.draws.timestep.tolist()])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Note(pl.Callback):
    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(options["out"] + ".ckpt")
        with open(f"{options['out']}-{trainer.global_rank}.json", "w") as file:
            json.dump([module.seen, module.validated], file)

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    for run in options["runs"]:
        options["out"] = run["out"]
        trainer = pl.Trainer(
            accelerator="cpu", strategy=run["strategy"], devices=run["processes"], max_steps=run["steps"], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[Note()], check_val_every_n_epoch=None, val_check_interval=run["steps"],
            limit_val_batches=run.get("validation"),
        )
        data = PairsDataModule(
            options["pairs"], 16, batch_size=4 // run["processes"], validation_fraction=0.3, encodings="off",
            num_workers=run["workers"], worker_start=run["start"],
        )
        module = Recorder()
        trainer.fit(module, data, ckpt_path=run.get("resume"))
"""


@pytest.fixture
def run_program(forked_python, tmp_path, pairs_dir):
    """Function: runs -> for each, what its processes saw: [(seen, validated) per process]."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(*runs):
        for name, run in enumerate(runs):
            run |= {"out": str(tmp_path / str(name))}
            if "resume" in run:
                run["resume"] = str(tmp_path / run["resume"])
        done = subprocess.run(
            [forked_python, "program.py", json.dumps({"pairs": str(pairs_dir), "runs": runs})],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [
            [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(run["processes"])]
            for name, run in enumerate(runs)
        ]

    return start


def together(processes, which=0):
    """Batches of all processes together, samples in the order of their numbers."""
    batches = []
    for parts in zip(*[process[which] for process in processes], strict=True):
        rows = [row for part in parts for row in zip(*part, strict=True)]
        batches.append(sorted(rows))
    return batches


@pytest.mark.slow
def test_two_processes_see_what_one_sees_also_when_resumed(run_program):
    one = {"strategy": "auto", "processes": 1, "workers": 0, "start": None}
    two = {"strategy": "ddp_fork", "processes": 2, "workers": 1, "start": None}
    whole, doubled, first, second, third = run_program(
        one | {"steps": 10},
        two | {"steps": 10},
        two | {"steps": 3},
        two | {"steps": 7, "resume": "2.ckpt"},
        one | {"steps": 10, "resume": "3.ckpt"},  # the rest alone, with batches of twice the size
    )
    assert together(doubled) == together(whole)
    assert together(first) + together(second) + together(third) == together(whole)
    counted = [row for batch in together(doubled, 1) for row in batch if row[1] == 1]
    assert sorted(counted) == sorted(row for batch in together(whole, 1) for row in batch)
    assert len({len(process[1]) for process in doubled}) == 1


@pytest.mark.slow
def test_workers_may_be_spawned(run_program):
    base = {"strategy": "auto", "processes": 1, "steps": 3, "validation": 0}
    plain, spawned = run_program(base | {"workers": 0, "start": None}, base | {"workers": 1, "start": "spawn"})
    assert spawned == plain


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals of other systems")
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_process_that_trains(make, plan):
    """They used to die of it, and with them the step that was still to be ended and saved."""
    loader = make(PlanSampler(plan, 0, 1, Place()), num_workers=1, prefetch_factor=1)
    batches = iter(loader)
    first = next(batches)
    [worker] = loader._iterator._workers
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    rest = list(batches)
    assert [len(batch) for batch in [first, *rest]] == [4] * 6
    assert worker.is_alive()
    worker.terminate()  # by its parent: torch and the end of Python do so
    worker.join(10)
    assert worker.exitcode == 0


@pytest.fixture
def own_fork_server():
    """For one test: a server keeps the signals held that were held when it started."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals of other systems")
@pytest.mark.parametrize("start", ["fork", *(pytest.param(n, marks=pytest.mark.slow) for n in ("spawn", "forkserver"))])
def test_a_signal_to_the_whole_group_while_workers_start(make, plan, monkeypatch, own_fork_server, start):
    """Those that import the libraries first used to die of it."""
    begin = torch.utils.data.DataLoader.__iter__

    def begin_and_signal(loader):
        batches = begin(loader)
        [worker] = batches._workers
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
        return batches

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", begin_and_signal)
    if start == "fork":  # too quick to be met on the way: it would come to its first line much later
        monkeypatch.setattr(torch.utils.data._utils.worker.signal_handling, "_set_worker_signal_handlers", late)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = make(PlanSampler(plan, 0, 1, Place()), num_workers=1, worker_start=start)
    assert [len(batch) for batch in loader] == [4] * 6
    [worker] = loader._iterator._workers
    assert worker.is_alive()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def late():
    time.sleep(0.3)
