"""Weight averaging between CPU processes."""

import os
import subprocess
import sys
import textwrap

import pytest

from msdiffusion.training.local_sgd import WeightAveraging, main, process_rank


def test_an_ordinary_run_is_rank_zero_and_untouched():
    assert process_rank() == 0
    assert not WeightAveraging().active


def test_wrong_settings_are_refused(capsys):
    with pytest.raises(ValueError, match="at least 1"):
        WeightAveraging(every_n_steps=0)
    with pytest.raises(SystemExit):
        main(["--processes", "0", "fit"])
    assert "--processes must be at least 1" in capsys.readouterr().err


def test_two_processes_end_with_the_mean_of_their_weights(tmp_path):
    """Two real processes with different weights exchange them once through gloo."""
    program = textwrap.dedent(
        """
        import sys, torch
        from types import SimpleNamespace
        from msdiffusion.training.local_sgd import WeightAveraging, process_rank
        class Model(torch.nn.Linear):
            elapsed = 0.0
        model = Model(2, 2)
        torch.nn.init.constant_(model.weight, process_rank())
        model.elapsed = 10.0 * process_rank()
        averaging = WeightAveraging(every_n_steps=1)
        trainer = SimpleNamespace(callbacks=[averaging], loggers=[], limit_val_batches=1, global_step=1)
        averaging.setup(trainer, model, "fit")
        averaging.on_train_batch_end(trainer, model, None, None, 0)
        averaging.teardown(trainer, model, "fit")
        assert (model.weight == 0.5).all(), model.weight
        assert model.elapsed == 10.0
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
