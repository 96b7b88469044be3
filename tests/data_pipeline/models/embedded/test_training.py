import csv
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline.errors import InputError, SettingsError
from data_pipeline.models.embedded.training import TrainingSettings, begin_from, check_resume, describe_run, train

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
    with pytest.raises(InputError, match=r"other settings.*\n  steps: 12 then, 13 now$"):
        train(model, loss, replace(SETTINGS, steps=13), tmp_path)
    check_resume(tmp_path, replace(SETTINGS, save_every=1, log_every=1))  # they decide nothing
    check_resume(tmp_path / "none", SETTINGS)


def test_the_state_of_a_run_that_learned_from_something_else_is_refused(tmp_path):
    model, loss = make()
    settings = replace(SETTINGS, learns_from={"frames": 6, "twins": 0.2, "initial": ""})
    train(model, loss, settings, tmp_path, stop_after=2)
    check_resume(tmp_path, settings)
    other = replace(settings, learns_from={"frames": 7, "twins": 0.2, "initial": "step 2"})
    for refuse in (lambda: check_resume(tmp_path, other), lambda: train(model, loss, other, tmp_path)):
        with pytest.raises(InputError, match=r"anew:\n  frames: 6 then, 7 now\n  initial: '' then, 'step 2' now$"):
            refuse()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.save({**state, "settings": "[('seed', 0)]"}, tmp_path / "state.pt")  # as it was written once
    with pytest.raises(InputError, match="does not tell what the run learned from"):
        check_resume(tmp_path, settings)


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04"])
def test_a_broken_state_is_refused(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    model, loss = make()
    for read in (
        lambda: check_resume(tmp_path, SETTINGS),
        lambda: describe_run(tmp_path),
        lambda: begin_from(model, tmp_path),
        lambda: train(model, loss, SETTINGS, tmp_path),
    ):
        with pytest.raises(InputError, match=r"state.pt does not open \(\w+\): delete it to begin anew"):
            read()
    torch.save({"weights": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="is not the state of a run, which holds average, model"):
        check_resume(tmp_path, SETTINGS)


def test_a_run_is_described_by_its_step_and_its_weights(tmp_path):
    model, loss = make()
    train(model, loss, SETTINGS, tmp_path / "one", stop_after=5)
    first = describe_run(tmp_path / "one")
    assert first.startswith("step 5, weights ")
    model, loss = make()
    train(model, loss, SETTINGS, tmp_path / "two", stop_after=5)
    assert describe_run(tmp_path / "two") == first
    train(model, loss, SETTINGS, tmp_path / "two")
    assert describe_run(tmp_path / "two") != first


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


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"batch_size": 0}, {"save_every": 0}, {"average": 1.0}, {"seed": -1}]
)
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
