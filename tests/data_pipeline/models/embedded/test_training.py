import csv
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline.models.embedded.training import TrainingSettings, begin_from, train
from data_pipeline.records import InputError, SettingsError

SETTINGS = TrainingSettings(
    steps=12, batch_size=8, learning_rate=0.05, warmup=3, average=0.9, save_every=5, log_every=4
)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))

    def loss(step):
        inputs = torch.from_numpy(np.random.default_rng(step).standard_normal((8, 3)).astype(np.float32))
        return {"square": (model(inputs)[:, 0] - inputs.sum(1)).square().mean()}

    return model, loss


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def rows(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_loss_falls(tmp_path):
    model, loss = make()
    before = float(loss(99)["square"].detach())
    train(model, loss, TrainingSettings(steps=150, learning_rate=0.05, warmup=5), tmp_path)
    assert float(loss(99)["square"].detach()) < 0.1 * before


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_that_was_stopped_gives_the_same_weights(tmp_path, stop):
    model, loss = make()
    whole = train(model, loss, SETTINGS, tmp_path / "whole")
    model, loss = make()
    train(model, loss, SETTINGS, tmp_path / "halves", stop_after=stop)
    with torch.no_grad():
        model[0].weight.fill_(7)  # a new process begins with other weights
    again = train(model, loss, SETTINGS, tmp_path / "halves")
    assert torch.equal(weights(again), weights(whole))


def test_a_finished_run_is_not_trained_again(tmp_path):
    model, loss = make()
    first = weights(train(model, loss, SETTINGS, tmp_path))
    assert torch.equal(weights(train(model, lambda step: pytest.fail("trained"), SETTINGS, tmp_path)), first)


def test_what_comes_back_is_the_running_mean(tmp_path):
    model, loss = make()
    averaged = train(model, loss, SETTINGS, tmp_path)
    assert not torch.equal(weights(averaged), weights(model))
    assert not averaged.training


def test_losses_are_logged(tmp_path):
    model, loss = make()
    train(model, loss, SETTINGS, tmp_path)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == ["4", "8", "12"]
    assert set(logged[0]) == {"step", "frames_per_second", "square", "loss"}
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])


def test_saving_reports(tmp_path):
    model, loss = make()
    seen = []

    def report(averaged, step):
        seen.append((step, averaged.training))
        return "seen"

    train(model, loss, SETTINGS, tmp_path, on_save=report)
    assert seen == [(5, False), (10, False), (12, False)]


def test_the_state_of_another_run_is_refused(tmp_path):
    model, loss = make()
    train(model, loss, SETTINGS, tmp_path, stop_after=2)
    with pytest.raises(InputError, match="other settings"):
        train(model, loss, TrainingSettings(steps=13), tmp_path)


def test_the_state_of_another_model_is_refused(tmp_path):
    model, loss = make()
    train(model, loss, SETTINGS, tmp_path, stop_after=2)
    with pytest.raises(InputError, match="other sizes"):
        train(nn.Linear(3, 1), loss, SETTINGS, tmp_path)


def test_the_rate_rises_and_falls():
    settings = TrainingSettings(steps=100, learning_rate=1.0, warmup=10)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == pytest.approx(1.0) == rates[10]
    assert all(later <= sooner for sooner, later in pairwise(rates[10:]))
    assert rates[-1] < 0.02


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": 0}, {"save_every": 0}, {"average": 1.0}])
def test_settings_that_make_no_sense(changes):
    with pytest.raises(SettingsError, match=next(iter(changes))):
        TrainingSettings(**{"steps": 5, **changes})


def test_a_run_begins_with_the_averaged_weights_of_another(tmp_path):
    model, loss = make()
    first = weights(train(model, loss, SETTINGS, tmp_path))
    model, _ = make()
    begin_from(model, tmp_path)
    assert torch.equal(weights(model), first)
    with pytest.raises(InputError, match="other sizes"):
        begin_from(nn.Linear(3, 1), tmp_path)
