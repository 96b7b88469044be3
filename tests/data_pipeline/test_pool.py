import functools
import sys

import pytest

from data_pipeline import pool
from data_pipeline.errors import InputError, MiningError
from data_pipeline.pool import Failure, run_pool

# Workers import this by name: it has to be a file on the path, not a function of a test.
WORK = """
import os, threading, time
from data_pipeline.errors import InputError

def make(kind):
    if kind == "no model":
        raise InputError("no model here")
    if kind == "bug":
        raise KeyError("a bug")
    if kind == "death":
        os._exit(3)
    return work

def work(task, place):
    place.value = 2
    if task == "hang":
        time.sleep(60)
    if task == "die":
        os._exit(7)
    if task.startswith("die later"):
        threading.Timer(0.5, os._exit, (7,)).start()
    if task.startswith("slow"):
        time.sleep(2)
    return task.upper()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "pool_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pool_work", raising=False)

    def start(tasks, kind="good", workers=2, timeout=20.0):
        import pool_work

        make = functools.partial(pool_work.make, kind)
        return dict(run_pool(make, tasks, workers=workers, timeout=timeout))

    return start


def test_every_task_has_its_result(run):
    tasks = [f"t{i}" for i in range(20)]
    assert run(tasks) == {task: task.upper() for task in tasks}


def test_a_task_that_hangs_and_one_that_kills_take_nobody_with_them(run):
    results = run(["a", "hang", "b", "c", "die", "d", "e"], workers=1, timeout=3.0)
    assert results.pop("hang") == Failure("timeout", 2, "stopped after 3 seconds")
    assert results.pop("die") == Failure("died", 2, "exit code 7")
    assert results == {task: task.upper() for task in "abcde"}


def test_a_worker_that_dies_while_it_is_idle_costs_nothing(run):
    # The first worker takes the two slow tasks; the second one has finished the others when it dies.
    tasks = ["slow", "slow again", "die later", "die later too"]
    assert run(tasks) == {task: task.upper() for task in tasks}


def test_no_tasks(run):
    assert run([]) == {}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("no model", InputError, "no model here"),
        ("bug", MiningError, "a worker could not start:[^$]*KeyError: 'a bug'"),
        ("death", MiningError, r"a worker died while it was starting \(exit code 3\)"),
    ],
)
def test_a_worker_that_cannot_start_stops_the_run(run, kind, error, message):
    with pytest.raises(error, match=message):
        run(["a"], kind=kind)


def test_workers_are_replaced_after_many_tasks_and_nothing_is_lost(run, monkeypatch):
    monkeypatch.setattr(pool, "TASKS_UNTIL_REPLACED", 3)
    started = []
    start = pool._start
    monkeypatch.setattr(pool, "_start", lambda *arguments: started.append(1) or start(*arguments))
    tasks = [f"t{i}" for i in range(10)]
    assert run(tasks) == {task: task.upper() for task in tasks}
    assert len(started) >= 4


def test_a_large_task_behind_one_that_hangs_does_not_block_the_run(run):
    large = "b" * 1_000_000
    assert run(["hang", large, "c"], workers=1, timeout=2.0) == {
        "hang": Failure("timeout", 2, "stopped after 2 seconds"),
        large: large.upper(),
        "c": "C",
    }


def test_a_guard_gives_results_failures_and_errors_and_goes_on_after_each(tmp_path, monkeypatch):
    (tmp_path / "guard_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    import guard_work

    guard = pool.Guard(functools.partial(guard_work.make, "good"))
    try:
        assert guard.work("a", 20.0) == "A"
        assert guard.work("hang", 1.0) == Failure("timeout", 2, "stopped after 1 seconds")
        assert guard.work("b", 20.0) == "B"
        assert guard.work("die", 20.0) == Failure("died", 2, "exit code 7")
        assert guard.work("c", 20.0) == "C"
    finally:
        guard.close()
    broken = pool.Guard(functools.partial(guard_work.make, "no model"))
    for _ in range(2):
        with pytest.raises(InputError, match="no model here"):
            broken.work("a", 20.0)
