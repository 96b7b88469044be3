from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from msdiffusion.errors import RequestError
from msdiffusion.training.run.every_n_steps import EveryNSteps
from msdiffusion.training.run.run_folder import in_root


class Counter(EveryNSteps):
    def __init__(self, every_n_steps):
        super().__init__(every_n_steps)
        self.prepared, self.steps = [], []

    def prepare(self, trainer, module):
        self.prepared.append(trainer.global_step)

    def act(self, trainer, module):
        self.steps.append(trainer.global_step)


def trainer_at(step, first=True, processes=1):
    return SimpleNamespace(global_step=step, is_global_zero=first, world_size=processes, fast_dev_run=0)


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
    trainer = trainer_at(steps[0] if steps[0] > 1 else 0)
    counter.on_train_start(trainer, None)
    for step in steps:
        trainer.global_step = step
        counter.on_train_batch_end(trainer, None, None, None, 0)
    counter.on_train_end(trainer, None)
    assert counter.steps == counter.prepared == expected


def test_all_processes_prepare_and_the_first_one_acts():
    counter = Counter(1)
    counter.on_train_end(trainer_at(3, first=False, processes=2), object())
    assert (counter.prepared, counter.steps) == ([3], [])


def test_a_split_adapter_is_gathered_by_all_processes(monkeypatch):
    from msdiffusion.training.learning import sharding

    entered = []

    @contextmanager
    def gathered(module):
        entered.append(module)
        yield

    monkeypatch.setattr(sharding, "whole_weights", gathered)
    module = SimpleNamespace(trained_adapter=None)
    for first in (True, False):
        Counter(1).on_train_end(trainer_at(3, first, processes=2), module)
    assert entered == [module, module]


def test_never_is_no_interval():
    with pytest.raises(RequestError, match="every_n_steps must be at least 1, got 0"):
        Counter(0)


def test_places_lie_in_the_runs_directory(tmp_path):
    assert in_root(SimpleNamespace(default_root_dir=str(tmp_path)), "adapter") == tmp_path / "adapter"
