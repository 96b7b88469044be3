"""Weight averaging between CPU processes."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from msdiffusion.training.local_sgd import WeightAveraging, exchanged_weights, main
from msdiffusion.training.processes import process_rank


def test_an_ordinary_run_is_rank_zero_and_untouched():
    assert process_rank() == 0
    assert not WeightAveraging().active


def test_wrong_settings_are_refused(capsys):
    with pytest.raises(ValueError, match="at least 1"):
        WeightAveraging(every_n_steps=0)
    with pytest.raises(SystemExit):
        main(["--processes", "0", "fit"])
    assert "--processes must be at least 1" in capsys.readouterr().err


def test_moving_averages_are_exchanged_with_the_weights():
    module = torch.nn.Linear(1, 1)
    module.bias.requires_grad_(False)
    assert [tensor.data_ptr() for tensor in exchanged_weights(module)] == [module.weight.data_ptr()]
    module.averaged = torch.nn.Linear(1, 1).requires_grad_(False)
    module.average = {"weight": torch.zeros(3)}
    assert [tensor.numel() for tensor in exchanged_weights(module)] == [1, 1, 1, 3]


@pytest.mark.parametrize(("steps", "expected"), [([1, 2, 3, 4, 5], [2, 4, 5]), ([1, 1, 2, 2, 3, 3], [2, 3])])
def test_weights_are_exchanged_every_n_steps_and_at_the_last(monkeypatch, steps, expected):
    """With accumulated gradients several batches belong to one step."""
    exchanged = []
    monkeypatch.setenv("MSD_LOCAL_SGD_WORLD", "1")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op=None: exchanged.append(trainer.global_step))
    averaging = WeightAveraging(every_n_steps=2)
    trainer = SimpleNamespace(global_step=0, max_steps=steps[-1], callbacks=[averaging])
    averaging.on_train_start(trainer, None)
    for trainer.global_step in steps:
        averaging.on_train_batch_end(trainer, torch.nn.Linear(1, 1), None, None, 0)
    assert sorted(set(exchanged)) == expected
    assert len(exchanged) == 2 * len(expected)  # weights, and whether to stop


@pytest.mark.usefixtures("forked_processes")
def test_two_processes_end_with_the_mean_of_their_weights(tmp_path):
    """Two real processes with different weights exchange them once through gloo; a signal to one is told to both."""
    program = textwrap.dedent(
        """
        import sys, torch
        from types import SimpleNamespace
        from msdiffusion.training.run.failures import FailureGuard
        from msdiffusion.training.local_sgd import WeightAveraging
        from msdiffusion.training.processes import process_rank
        from msdiffusion.training.run.progress import RunProgress
        class Model(torch.nn.Linear):
            elapsed = 0.0
        model = Model(2, 2)
        torch.nn.init.constant_(model.weight, process_rank())
        model.elapsed = 10.0 * process_rank()
        averaging, guard = WeightAveraging(every_n_steps=1), FailureGuard()
        progress = RunProgress()
        trainer = SimpleNamespace(
            callbacks=[averaging, progress, guard], loggers=[], limit_val_batches=1, global_step=1, max_steps=3
        )
        averaging.setup(trainer, model, "fit")
        assert (progress in trainer.callbacks) == (process_rank() == 0)
        guard.requested = 15 if process_rank() == 1 else None
        guard.on_train_batch_end(trainer, model, None, None, 0)
        assert guard.stopping is None
        averaging.on_train_batch_end(trainer, model, None, None, 0)
        averaging.teardown(trainer, model, "fit")
        assert (model.weight == 0.5).all(), model.weight
        assert model.elapsed == 10.0
        assert guard.stopping == 15
        """
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "MSD_LOCAL_SGD_RANK": str(rank),
                "MSD_LOCAL_SGD_WORLD": "2",
                "MSD_LOCAL_SGD_STORE": str(tmp_path / "store"),
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=400) for process in processes] == [0, 0]


def test_the_launcher_reports_a_failing_process():
    assert main(["--processes", "1", "no-such-command"]) != 0
