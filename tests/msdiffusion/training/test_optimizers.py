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


def test_a_stack_of_matrices_is_orthogonalized_one_by_one():
    matrices = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(1))
    together = orthogonalize(matrices)
    for own, matrix in zip(together, matrices, strict=True):
        torch.testing.assert_close(own.float(), orthogonalize(matrix).float(), atol=0.02, rtol=0)


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
