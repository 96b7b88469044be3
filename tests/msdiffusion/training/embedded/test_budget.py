"""Budgets of pretraining: learning rate, clock, average. Real runs are in test_pretrain.py."""

from types import SimpleNamespace

import pytest
import torch

from msdiffusion.errors import WeightsError
from msdiffusion.training.embedded.budget import BudgetedTraining
from msdiffusion.training.pretrain import ImageEncoderPretraining, TextToImagePretraining


def test_export_writes_the_average_and_keeps_the_training_weights(tmp_path, monkeypatch):
    model = TextToImagePretraining(output=str(tmp_path / "base"), channels=(32, 32, 32))
    written = {}
    monkeypatch.setattr(model, "export", lambda: written.update(bias=model.unet.conv_out.bias.detach().clone()))
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(3.0)
    model.average["unet.conv_out.bias"].fill_(2.0)
    model.trainer = SimpleNamespace(fast_dev_run=0)
    model.export_average()
    assert (written["bias"] == 2).all()
    assert (model.unet.conv_out.bias == 3).all()


def test_learning_rate_rises_stays_and_falls_to_zero(tmp_path, monkeypatch):
    model = ImageEncoderPretraining(output=str(tmp_path), learning_rate=1.0, decay_share=0.5, warmup_steps=1)
    optimizer = model.configure_optimizers()
    rates = []
    for progress in (0.0, 0.5, 0.75, 1.0):
        monkeypatch.setattr(ImageEncoderPretraining, "progress", progress)
        model.set_learning_rate(optimizer)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.0])


def test_minutes_end_the_budget_before_the_steps_do(tmp_path):
    model = ImageEncoderPretraining(output=str(tmp_path), max_steps=1000, budget_minutes=2.0)
    model.elapsed = 60.0
    assert model.progress == pytest.approx(0.5)
    model.elapsed = 500.0
    assert model.progress == 1.0


@pytest.mark.parametrize(
    ("origin", "step", "kept"),
    [
        (None, 0, False),
        (None, 5, True),  # a further fit of the same trainer
        ("checkpoints/last.ckpt", 5, True),
        ("checkpoints/last.1.ckpt", 5, False),  # of a run that was set aside: so was its export
        ("../other/checkpoints/last.ckpt", 5, False),
    ],
)
def test_a_new_run_gives_an_earlier_export_another_name_and_one_that_goes_on_does_not(tmp_path, origin, step, kept):
    model = ImageEncoderPretraining(output=str(tmp_path / "encoder"))
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "model.safetensors").write_text("1")
    model.trainer = SimpleNamespace(is_global_zero=True, fast_dev_run=0, default_root_dir=tmp_path / "run",
                                    global_step=step, ckpt_path=origin and str(tmp_path / "run" / origin))  # fmt: skip
    model.on_train_start()
    name = "encoder" if kept else "encoder.1"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "model.safetensors").read_text() == "1"


def test_a_trial_exports_nothing(tmp_path):
    model = ImageEncoderPretraining(output=str(tmp_path / "encoder"))
    model.trainer = SimpleNamespace(is_global_zero=True, fast_dev_run=1)
    model.on_train_end()
    assert not (tmp_path / "encoder").exists()


def test_the_base_class_says_what_is_missing():
    bare = BudgetedTraining()
    with pytest.raises(NotImplementedError, match="which modules it trains"):
        bare.trained_modules()
    with pytest.raises(NotImplementedError, match="how it is saved"):
        bare.export()


def test_a_strange_average_or_weight_is_refused(tmp_path):
    model = ImageEncoderPretraining(output=str(tmp_path))
    good = {"state_dict": model.state_dict(), "average": model.average, "elapsed": 1.0}
    model.on_load_checkpoint(good)
    name = next(iter(model.average))
    nan = torch.full_like(model.average[name], float("nan"))
    for change, told in (
        ({"average": {**model.average, name: nan}}, f"the average in the checkpoint: {name} holds .* that are NaN"),
        ({"average": {**model.average, "strange": nan}}, "the average in .* no place in this network: strange"),
        ({"average": None}, "lacks its average or its clock"),
        ({"elapsed": "long"}, "lacks its average or its clock"),
        ({"state_dict": {**model.state_dict(), "strange": nan}}, "no place in this network: strange"),
    ):
        with pytest.raises(WeightsError, match=told):
            model.on_load_checkpoint({**good, **change})
