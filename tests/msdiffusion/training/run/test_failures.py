"""Runs that cannot go on, or shall not, with a module of one weight."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from msdiffusion.errors import TrainingError
from msdiffusion.training.run.checkpoints import RunCheckpoint
from msdiffusion.training.run.failures import (
    KEYS_SHOWN,
    FailureGuard,
    RunStoppedError,
    describe,
    explain,
    is_dead_loader,
    is_out_of_memory,
)


@dataclass
class Batch:
    keys: list
    phrases: list
    size: tuple = (48, 32)

    def __len__(self):
        return len(self.keys)


class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Batch([f"clip_{index}", "other"], [["dog", "", ""], ["dog", "cat", ""]])


class Fragile(pl.LightningModule):
    """Fails as it is told in step 3 (counted from 0)."""

    def __init__(self, failure=None, value=float("nan")):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.failure = failure
        self.value = value

    def training_step(self, batch, index):
        loss = self.weight.square().sum()
        if self.global_step != 3:
            return loss
        if self.failure == "loss":
            return loss * self.value
        if self.failure == "gradient":
            return (self.weight * 0).sqrt().sum()  # 0, with an infinite slope
        if isinstance(self.failure, Exception):
            raise self.failure
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.125)


@pytest.fixture
def fit(tmp_path):
    def run(module, *callbacks, **settings):
        defaults = {"max_steps": 6, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
                    "accelerator": "cpu"}  # fmt: skip
        callbacks = [*callbacks, RunCheckpoint(every_n_steps=1, monitor=None)]
        trainer = pl.Trainer(callbacks=callbacks, default_root_dir=tmp_path, **defaults | settings)
        trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
        return trainer

    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_change(fit, value):
    module = Fragile("loss", value)
    with pytest.raises(TrainingError) as told:
        fit(module, FailureGuard())
    for part in (f"the loss is {value} at step 4, epoch 0, learning rate 0.125", "pairs clip_3, other", "last.ckpt",
                 "2 samples of 32 x 48 pixels with 1 to 2 subjects, padded to 3", "lower learning_rate"):  # fmt: skip
        assert part in str(told.value)
    assert torch.isfinite(module.weight).all()


def test_a_gradient_that_is_no_number_does_too(fit):
    module = Fragile("gradient")
    with pytest.raises(TrainingError, match="the norm of the gradients is nan at step 4.*clip_3"):
        fit(module, FailureGuard())
    assert torch.isfinite(module.weight).all()


def test_a_great_gradient_is_a_number():
    guard, weight = FailureGuard(), torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 1e15)
    trainer = SimpleNamespace(precision_plugin=None)
    guard.on_before_optimizer_step(trainer, None, torch.optim.SGD([weight], lr=1))


def test_gradients_are_not_looked_at_where_a_scaler_does_or_nobody_wants_it(fit):
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), float("inf"))
    optimizer = torch.optim.SGD([weight], lr=1)
    scaled = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    FailureGuard().on_before_optimizer_step(scaled, None, optimizer)
    plain = SimpleNamespace(precision_plugin=None)
    FailureGuard(check_gradients=False).on_before_optimizer_step(plain, None, optimizer)
    with pytest.raises(TrainingError):
        FailureGuard().on_before_optimizer_step(
            SimpleNamespace(precision_plugin=None, default_root_dir="nowhere"), None, optimizer
        )


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("MPS backend out of memory"),
    MemoryError(),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=range(len(OUT_OF_MEMORY)))
def test_memory_that_is_used_up_is_told_with_the_batch(fit, error):
    guard = FailureGuard()
    with pytest.raises(type(error)) as raised:
        fit(Fragile(error), guard)
    told = str(guard.explanation)
    for part in ("memory is used up at step 4", "clip_3", "32 x 48", "last.ckpt", "accumulate_grad_batches"):
        assert part in told
    assert "more" not in told.split("last.ckpt")[0]  # the first line of what torch says is enough
    assert raised.value.__notes__ == [told]


def test_a_real_allocation_that_fails_is_known():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert is_out_of_memory(raised.value)


def test_other_errors_speak_for_themselves(fit):
    guard = FailureGuard()
    with pytest.raises(ValueError, match="on purpose"):
        fit(Fragile(ValueError("on purpose")), guard)
    assert guard.explanation is None
    assert not is_out_of_memory(ValueError("out of memory"))


DEADLY = """
import os, signal, sys
import pytorch_lightning as pl
import torch
from msdiffusion.training.run.failures import FailureGuard

class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(1)

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
    def training_step(self, batch, index):
        return (self.weight * batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

guard = FailureGuard()
trainer = pl.Trainer(callbacks=[guard], max_steps=4, logger=False, enable_progress_bar=False, accelerator="cpu",
                     enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.argv[1])
try:
    trainer.fit(Module(), torch.utils.data.DataLoader(Deadly(), num_workers=1))
except Exception as error:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where something else noticed first, torch would raise it here again
    print(guard.explain(error) or repr(error))
"""


@pytest.mark.usefixtures("forked_processes")
def test_a_loading_process_that_dies_is_told(tmp_path):
    """In a process of its own: torch raises it wherever the process is when the system says so, in pytest too."""
    command = [sys.executable, "-c", DEADLY, str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    for part in ("a process that loads pairs has died", "num_workers", "cache_megabytes"):
        assert part in told.stdout, told.stdout + told.stderr


def test_what_came_out_of_a_run_is_asked_once_more(tmp_path):
    """A message of torch that came on the way to the guard, or from inside of it."""
    guard = FailureGuard()
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    assert guard.explain(error) is None  # before a run there is nothing to say
    guard.on_train_start(
        SimpleNamespace(global_step=0, default_root_dir=tmp_path, accumulate_grad_batches=1, num_training_batches=1),
        None,
    )
    guard._restore_handlers()
    assert str(guard.explain(error)).startswith("a process that loads pairs has died (DataLoader worker (pid 7)")


def test_a_line_that_breaks_elsewhere_is_no_dead_loader():
    def broken():
        raise ConnectionResetError("of a server")

    with pytest.raises(ConnectionResetError) as raised:
        broken()
    assert not is_dead_loader(raised.value)


def test_a_batch_is_described_without_its_tensors():
    trainer = SimpleNamespace(global_step=0, current_epoch=2, optimizers=[])
    many = Batch([f"k{i}" for i in range(KEYS_SHOWN + 3)], [["a"]] * (KEYS_SHOWN + 3))
    text = str(describe(trainer, many))
    assert text.startswith("step 1, epoch 2; ")
    assert text.endswith("pairs k0, k1, k2, k3 and 3 more")
    assert str(describe(trainer, {"pixels": 1})) == "step 1, epoch 2; a batch of dict"


@pytest.mark.parametrize("room", [True, False])
def test_a_message_stays_short_and_no_key_is_lost(tmp_path, room):
    """Of a batch of 64 pairs it had two thousand characters."""
    root = tmp_path if room else tmp_path / "nowhere"
    trainer = SimpleNamespace(global_step=0, current_epoch=0, optimizers=[], default_root_dir=root, global_rank=1)
    keys = [f"clip_of_some_name_{i:06d}" for i in range(64)]
    told = str(explain(MemoryError("no room"), trainer, describe(trainer, Batch(keys, [["a"]] * 64))))
    assert len(told) < 1000
    assert f"{keys[3]} and 60 more" in told
    if room:
        assert f"more (all: {tmp_path / 'failed_batch_1.txt'})" in told
        assert (tmp_path / "failed_batch_1.txt").read_text().split("\n") == ["step 1", *keys, ""]


def test_before_the_first_batch_there_is_none_to_name(tmp_path):
    told = explain(MemoryError("no room"), SimpleNamespace(default_root_dir=tmp_path), None)
    assert str(told).startswith("the memory is used up (no room); no checkpoint was written yet")


class Signal(pl.Callback):
    def __init__(self, number, times=1):
        self.number, self.times = number, times

    def on_train_batch_start(self, trainer, *arguments):
        if trainer.global_step == 2:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_and_its_state_be_written(fit, tmp_path, number, capfd):
    module, before = Fragile(), signal.getsignal(number)
    with pytest.raises(
        RunStoppedError, match=rf"{number.name} after step 3; .*last\.ckpt.*--ckpt_path last"
    ) as stopped:
        fit(module, FailureGuard(), Signal(number), max_steps=6)
    assert stopped.value.number == number
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err
    assert signal.getsignal(number) == before


def test_the_state_is_written_at_a_signal_even_where_it_is_not_due(fit, tmp_path):
    callbacks = [FailureGuard(), Signal(signal.SIGTERM), RunCheckpoint(every_n_steps=100, monitor=None)]
    trainer = pl.Trainer(callbacks=callbacks, default_root_dir=tmp_path, max_steps=6, logger=False,
                         enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")  # fmt: skip
    with pytest.raises(RunStoppedError):
        trainer.fit(Fragile(), torch.utils.data.DataLoader(Batches(), batch_size=None))
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_between_accumulated_batches_it_waits_for_the_step(fit, tmp_path):
    class InTheMiddle(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 2:  # the first of the two batches of step 2
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStoppedError, match="after step 2"):
        fit(Fragile(), InTheMiddle(), FailureGuard(), accumulate_grad_batches=2, max_steps=4)
    progress = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]
    assert progress["epoch_loop.batch_progress"]["current"]["ready"] == 4


def test_a_second_interrupt_ends_the_run_at_once(fit, tmp_path):
    with pytest.raises(SystemExit):  # what Lightning makes of a KeyboardInterrupt
        fit(Fragile(), FailureGuard(), Signal(signal.SIGINT, times=2))
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_signal_at_the_last_step_changes_nothing(fit):
    assert fit(Fragile(), FailureGuard(), Signal(signal.SIGTERM), max_steps=3).global_step == 3


def test_processes_agree_to_stop():
    """The signal came to another process; this one learns of it when they exchange."""
    guard = FailureGuard()
    strategy = SimpleNamespace(reduce_boolean_decision=lambda flag, all: True)
    trainer = SimpleNamespace(
        world_size=2, strategy=strategy, callbacks=[guard], global_step=1, accumulate_grad_batches=1
    )
    guard.on_train_batch_end(trainer, None, None, None, 0)
    assert guard.stopping == signal.SIGTERM


def test_local_sgd_agrees_by_itself():
    guard = FailureGuard()
    guard.requested = signal.SIGTERM
    trainer = SimpleNamespace(world_size=1, global_step=1, callbacks=[SimpleNamespace(exchanges=True)])
    guard.on_train_batch_end(trainer, None, None, None, 0)
    assert guard.stopping is None


@pytest.mark.usefixtures("forked_processes")
def test_outside_the_main_thread_signals_are_left_alone():
    program = textwrap.dedent(
        """
        import threading, signal
        from msdiffusion.training.run.failures import FailureGuard
        guard = FailureGuard()
        from types import SimpleNamespace
        trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, num_training_batches=1)
        thread = threading.Thread(target=guard.on_train_start, args=(trainer, None))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert guard._handlers == {}
        """
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_loss_is_looked_at_one_step_later():
    guard = FailureGuard()
    trainer = SimpleNamespace(default_root_dir="nowhere", global_step=0, current_epoch=0, optimizers=[])
    guard.on_train_batch_start(trainer, None, Batch(["first"], [["a"]]), 0)
    guard.on_before_backward(trainer, None, torch.full((), float("nan"), device="cuda"))
    guard.on_train_batch_start(trainer, None, Batch(["second"], [["a"]]), 1)
    with pytest.raises(TrainingError, match="pairs first"):
        guard.on_before_backward(trainer, None, torch.ones((), device="cuda"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "runs/metrics.csv"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors'
    ],
)
def test_a_full_disk_is_told_whoever_wrote(fit, error):
    guard = FailureGuard()
    with pytest.raises(type(error)):
        fit(Fragile(error), guard)
    assert str(guard.explanation).startswith("the disk is full (")
    assert "last.ckpt" in str(guard.explanation)


def test_a_step_that_lacks_batches_is_told(fit):
    """Of the data of others: ours make whole steps of an epoch."""
    with pytest.warns(UserWarning, match="last step of every epoch has 2 batches instead of 3"):
        fit(Fragile(), FailureGuard(), accumulate_grad_batches=3, max_steps=1)
