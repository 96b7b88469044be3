"""Muon: the update is orthogonal, both groups descend, the guard fires."""

import pytest
import torch
from torch import nn

from msdiffusion.training.optimizers import Muon, orthogonalize


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


def test_state_survives_saving():
    parameter = nn.Parameter(torch.randn(4, 4))
    first = Muon([parameter], [], lr=0.1)
    parameter.grad = torch.randn(4, 4)
    first.step()
    second = Muon([parameter], [], lr=0.1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[parameter]["momentum"], first.state[parameter]["momentum"])
