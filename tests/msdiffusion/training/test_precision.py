"""HardwarePrecision: what it takes on which machine, in which stages, and that a run can go on elsewhere."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from msdiffusion.training import precision
from msdiffusion.training.precision import HardwarePrecision, bfloat16_units


class Watcher(pl.LightningModule):
    """Notes the type that a product of float32 matrices comes out in, per stage."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.seen = {}

    def _look(self, stage, batch):
        result = self.layer(batch)
        self.seen[stage] = result.dtype
        return result.float().square().mean()

    def training_step(self, batch):
        return self._look("fit", batch)

    def validation_step(self, batch):
        self._look("validate", batch)

    def test_step(self, batch):
        self._look("test", batch)

    def predict_step(self, batch):
        self._look("predict", batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


def trainer(tmp_path, **settings):
    defaults = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plugins = [HardwarePrecision()]
    return pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, plugins=plugins, **defaults | settings
    )


def data():
    return DataLoader(torch.randn(4, 4), batch_size=2)


@pytest.fixture
def units(monkeypatch):
    """Function: what the machine has, in words."""
    return lambda words: monkeypatch.setattr(precision, "bfloat16_units", lambda device: words)


@pytest.mark.parametrize(("words", "name", "dtype"), [
    ("AMX", "bf16-mixed", torch.bfloat16), (None, "32-true", torch.float32),
])  # fmt: skip
def test_every_stage_computes_in_what_the_machine_has(units, tmp_path, words, name, dtype):
    units(words)
    module = Watcher()
    run = trainer(tmp_path, gradient_clip_val=1.0)
    run.fit(module, data(), data())
    assert run.precision == name
    run.test(module, data(), verbose=False)
    run.predict(module, data())
    assert module.seen == dict.fromkeys(("fit", "validate", "test", "predict"), dtype)
    assert module.layer.weight.dtype == torch.float32
    fresh = Watcher()
    trainer(tmp_path).validate(fresh, data(), verbose=False)
    assert fresh.seen == {"validate": dtype}


def test_a_run_goes_on_where_there_are_no_such_units(units, tmp_path):
    units("AMX")
    module = Watcher()
    run = trainer(tmp_path)
    run.fit(module, data())
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert module.seen["fit"] == torch.bfloat16
    units(None)
    again = Watcher()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(again, data(), ckpt_path=tmp_path / "run.ckpt")
    assert again.seen["fit"] == torch.float32
    assert run.global_step == 4


def test_the_choice_is_told_once(monkeypatch, units):
    told = []
    monkeypatch.setattr(precision, "rank_zero_info", told.append)
    units("AMX")
    plugin = HardwarePrecision()
    assert plugin.precision == "32-true"
    assert plugin.choose(torch.device("cpu")) == plugin.choose(torch.device("cpu")) == plugin.precision == "bf16-mixed"
    assert told == ["HardwarePrecision takes bf16-mixed (bfloat16 units: AMX)"]
    plugin.connect(nn.Linear(2, 2), [], [])
    assert len(told) == 1


def test_without_a_device_nothing_is_cast(units):
    units("AMX")
    with HardwarePrecision().forward_context():
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(("capabilities", "words"), [
    ({"amx_bf16": True, "avx512_bf16": True}, "AMX"),
    ({"amx_bf16": False, "avx512_bf16": True}, "AVX-512 BF16"),
    ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, None),
    ({}, None),
])  # fmt: skip
def test_units_of_a_processor(monkeypatch, capabilities, words):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert bfloat16_units(torch.device("cpu")) == words


@pytest.mark.parametrize(("supported", "capability", "words"), [
    (True, (9, 0), "some GPU"), (True, (8, 0), "some GPU"), (True, (7, 5), None), (False, (9, 0), None),
])  # fmt: skip
def test_units_of_a_gpu(monkeypatch, supported, capability, words):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert bfloat16_units(torch.device("cuda", 0)) == words


def test_other_devices_stay_in_float32():
    assert bfloat16_units(torch.device("meta")) is None
