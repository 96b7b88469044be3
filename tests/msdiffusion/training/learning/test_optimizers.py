"""AdamW as the adapter takes it and the course of its learning rate; Muon: its update, its groups, its guard."""

import pytest
import torch
from torch import nn

from msdiffusion.errors import RequestError
from msdiffusion.training.learning import optimizers
from msdiffusion.training.learning.optimizers import (
    Muon,
    follow_course,
    learning_rate_course,
    make_optimizer,
    orthogonalize,
)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, steps=6).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_both_groups_descend():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 2))
    inputs, target = torch.randn(16, 3, 4, 4), torch.randn(16, 2)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = Muon(matrices, [p for p in model.parameters() if p.ndim < 2], lr=0.01)
    losses = []
    for _ in range(40):
        loss = nn.functional.mse_loss(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_update_has_the_root_mean_square_of_adamw():
    parameter = nn.Parameter(torch.zeros(32, 64))
    parameter.grad = torch.randn(32, 64)
    Muon([parameter], [], lr=1.0, weight_decay=0.0).step()
    assert 0.1 < parameter.detach().square().mean().sqrt() < 0.3


def test_a_vector_among_the_matrices_is_refused():
    with pytest.raises(ValueError, match="two dimensions"):
        Muon([nn.Parameter(torch.zeros(3))], [])


@pytest.mark.exact
def test_state_survives_saving():
    parameter = nn.Parameter(torch.randn(4, 4))
    first = Muon([parameter], [], lr=0.1)
    parameter.grad = torch.randn(4, 4)
    first.step()
    second = Muon([parameter], [], lr=0.1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[parameter]["momentum"], first.state[parameter]["momentum"])


def test_a_stack_of_matrices_is_orthogonalized_one_by_one():
    matrices = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(1))
    together = orthogonalize(matrices)
    for own, matrix in zip(together, matrices, strict=True):
        torch.testing.assert_close(own.float(), orthogonalize(matrix).float(), atol=0.02, rtol=0)


@pytest.mark.exact
def test_parameters_of_one_shape_are_updated_as_if_alone():
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(8, 4, 3, 3, generator=generator) for _ in range(2)]
    gradients = [torch.randn(8, 4, 3, 3, generator=generator) for _ in range(2)]

    def updated(indices):
        parameters = [nn.Parameter(values[i].clone()) for i in indices]
        for parameter, i in zip(parameters, indices, strict=True):
            parameter.grad = gradients[i].clone()
        Muon(parameters, [], lr=0.1).step()
        return [parameter.detach() for parameter in parameters]

    for together, alone in zip(updated([0, 1]), updated([0]) + updated([1]), strict=True):
        torch.testing.assert_close(together, alone, atol=1e-3, rtol=0)


def test_parameters_without_a_gradient_are_left_alone():
    parameter = nn.Parameter(torch.ones(4, 4))
    Muon([parameter], [], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(4, 4))


def train(make, steps=60):
    """Loss at the start and at the end, and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
    inputs, target = torch.randn(64, 128), torch.randn(64, 64)
    optimizer = make(model.parameters())
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1], optimizer


@pytest.mark.parametrize("fused", [None, True, False])
def test_adamw_is_torchs_fused_where_it_can_be(fused):
    first, last, optimizer = train(lambda p: make_optimizer(p, learning_rate=1e-3, weight_decay=0.02, fused=fused))
    assert last < 0.1 * first
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 0.02, (0.9, 0.999))
    assert bool(group["fused"]) == (fused is not False)
    _, plain, _ = train(lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.02))
    assert last == pytest.approx(plain, rel=1e-3)


def test_a_fused_optimizer_lets_gradients_be_clipped():
    """Lightning refuses to clip for optimizers that would undo the scaling of a loss themselves."""
    from lightning_fabric.plugins.precision.amp import _optimizer_handles_unscaling

    parameters = [nn.Parameter(torch.zeros(3))]
    assert _optimizer_handles_unscaling(torch.optim.AdamW(parameters, fused=True))
    assert not _optimizer_handles_unscaling(make_optimizer(parameters, learning_rate=1.0, weight_decay=0.0))


def test_weights_without_a_fused_kernel_get_the_plain_one():
    def parameters():
        return [nn.Parameter(torch.zeros(3, device="meta"))]

    optimizer = make_optimizer(parameters(), learning_rate=1.0, weight_decay=0.0)
    assert not optimizer.param_groups[0]["fused"]
    with pytest.raises(RequestError, match="fused=True cannot be had on meta .* leave fused out"):
        make_optimizer(parameters(), learning_rate=1.0, weight_decay=0.0, fused=True)


def test_eight_bits_train_alike_and_take_a_byte_per_number():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    first, last, optimizer = train(lambda p: make_optimizer(p, "adamw_8bit", learning_rate=1e-3, weight_decay=0.01))
    assert last < 0.1 * first
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert {state["state1"].dtype, state["state2"].dtype} == {torch.uint8}


def test_eight_bits_are_refused_for_split_weights(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    monkeypatch.setattr(optimizers, "DTensor", nn.Parameter)
    with pytest.raises(RequestError, match="cannot train weights that are split over processes"):
        make_optimizer([nn.Parameter(torch.zeros(3))], "adamw_8bit", learning_rate=1.0, weight_decay=0.0)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", {0: 1 / 5, 4: 1, 50: 1, 99: 1}),
        ("linear", {0: 1 / 5, 4: 1, 52: 0.5, 100: 0}),
        ("linear_half", {0: 1 / 5, 4: 1, 50: 1, 75: 0.5, 100: 0}),
        ("cosine", {0: 1 / 5, 4: 1, 28: 0.5 + 0.5**1.5, 52: 0.5, 100: 0, 101: 0}),
    ],
)
def test_course_of_the_learning_rate(decay, expected):
    factor = learning_rate_course(4, decay, 100)
    assert {step: factor(step) for step in expected} == pytest.approx(expected)


def test_the_first_step_of_a_longer_run_takes_its_own_course():
    """The optimizer's state holds the rate of the shorter run's end, 0."""

    def make(total):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
        course = learning_rate_course(2, "linear", total)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, course)

    def resumed(total):
        other, going_on = make(total)
        other.load_state_dict(optimizer.state_dict())
        going_on.load_state_dict(schedule.state_dict())
        return other.param_groups[0], going_on

    optimizer, schedule = make(10)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0
    group, schedule_now = resumed(20)
    assert follow_course(schedule_now) == [(0, pytest.approx(0.3 * 10 / 18))]
    assert group["lr"] == schedule_now.get_last_lr()[0] == pytest.approx(0.3 * 10 / 18)
    group, schedule_now = resumed(10)
    before = group["lr"]
    assert follow_course(schedule_now) == []
    assert group["lr"] is before
