"""Muon: momentum whose update is orthogonalised, for the weight matrices of the embedded base.

Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale that makes
its update as large as AdamW's is from Liu et al., "Muon is Scalable for LLM Training" (2025), section 2.2. The Muon of
torch takes matrices only; here convolution kernels are flattened to (out, in * height * width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 4) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix.

    Args:
        matrix: (rows, columns) float.
        steps: iterations; 4 bring the singular values near 1.

    Returns:
        (rows, columns) bfloat16.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    transposed = x.shape[0] > x.shape[1]
    if transposed:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels, AdamW for everything else, in one optimizer.

    Args:
        matrices: parameters with at least two dimensions.
        others: norms, biases, embeddings.
        lr: learning rate of both groups (the Muon update has AdamW's root mean square).
        momentum: of the Muon group.
        weight_decay: decoupled, for the matrices only.
        steps: Newton-Schulz iterations.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float = 1.5e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        steps: int = 4,
    ) -> None:
        groups = [
            {"params": list(matrices), "muon": True, "weight_decay": weight_decay},
            {"params": list(others), "muon": False, "weight_decay": 0.0},
        ]
        if any(p.ndim < 2 for p in groups[0]["params"]):
            raise ValueError("Muon orthogonalises matrices: every parameter of `matrices` needs two dimensions or more")
        super().__init__(groups, {"lr": lr, "momentum": momentum, "steps": steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update. `closure` recomputes the loss, as Lightning passes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._update_matrix if group["muon"] else self._update_other
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update(parameter, group)
        return loss

    def _update_matrix(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.lerp_(parameter.grad, 1 - group["momentum"])
        nesterov = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
        scale = 0.2 * math.sqrt(max(nesterov.shape))
        update = orthogonalize(nesterov, group["steps"]).view_as(parameter).to(parameter.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)

    def _update_other(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = 0.9, 0.98
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].lerp_(parameter.grad.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        root = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
        parameter.addcdiv_(mean, root, value=-group["lr"])
