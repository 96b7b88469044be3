"""Optimizers and courses of the learning rate: AdamW for the adapter, Muon for the embedded base.

Muon is momentum whose update is orthogonalised, for weight matrices. Source: Keller Jordan et al., "Muon: An optimizer
for hidden layers in neural networks" (2024); the scale that makes its update as large as AdamW's is from Liu et al.,
"Muon is Scalable for LLM Training" (2025), section 2.2. The Muon of torch takes matrices only; here convolution kernels
are flattened to (out, in * height * width).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from msdiffusion.errors import RequestError, reason

OptimizerName = Literal["adamw", "adamw_8bit"]
Decay = Literal["none", "linear", "linear_half", "cosine"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 4) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix.

    Args:
        matrices: (..., rows, columns) float; leading dimensions are a stack of independent matrices.
        steps: iterations; 4 bring the singular values near 1.

    Returns:
        (..., rows, columns) bfloat16.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels, AdamW for everything else, in one optimizer.

    Args:
        matrices: parameters with at least two dimensions.
        others: norms, biases, embeddings.
        lr: learning rate of both groups (the Muon update has AdamW's root mean square).
        weight_decay: decoupled, for the matrices only.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float = 1.5e-3,
        weight_decay: float = 0.01,
    ) -> None:
        groups = [
            {"params": list(matrices), "muon": True, "weight_decay": weight_decay},
            {"params": list(others), "muon": False, "weight_decay": 0.0},
        ]
        if any(p.ndim < 2 for p in groups[0]["params"]):
            raise ValueError("Muon orthogonalises matrices: every parameter of `matrices` needs two dimensions or more")
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "steps": 4})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update. `closure` recomputes the loss, as Lightning passes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                self._update_matrices(parameters, group)
            else:
                for parameter in parameters:
                    self._update_other(parameter, group)
        return loss

    def _update_matrices(self, parameters: list[nn.Parameter], group: dict) -> None:
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        # Matrices of one shape are one stack: a few large products in place of thousands of small ones.
        stacks: dict[tuple[int, int], list[int]] = {}
        for index, direction in enumerate(nesterov):
            stacks.setdefault(tuple(direction.flatten(1).shape), []).append(index)
        for shape, members in stacks.items():
            updates = orthogonalize(torch.stack([nesterov[i].flatten(1) for i in members]), group["steps"])
            rate = group["lr"] * 0.2 * math.sqrt(max(shape))
            for index, update in zip(members, updates, strict=True):
                parameters[index].add_(update.view_as(parameters[index]), alpha=-rate)

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


def check_optimizer(name: str, fused: bool | None) -> None:
    """Refuse settings of ``make_optimizer`` before anything is loaded.

    Raises:
        RequestError: an unknown name, a library that is missing, or ``fused`` where it means nothing.
    """
    if name not in ("adamw", "adamw_8bit"):
        raise RequestError(f"optimizer must be 'adamw' or 'adamw_8bit', got {name!r}")
    if name == "adamw_8bit":
        if fused is not None:
            raise RequestError("fused is a setting of optimizer='adamw': leave it out with 'adamw_8bit'")
        if find_spec("bitsandbytes") is None:
            raise RequestError(
                "optimizer='adamw_8bit' needs the library bitsandbytes, which is not installed: pip install "
                "bitsandbytes, or train with optimizer='adamw'"
            )


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    name: OptimizerName = "adamw",
    *,
    learning_rate: float,
    weight_decay: float,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """AdamW with torch's default betas (.9, .999).

    Args:
        parameters: what it trains, on the device it is trained on.
        name: "adamw" is torch's. "adamw_8bit" is that of bitsandbytes, whose two averages take one byte each per weight
            in place of four (Dettmers et al. 2021, arXiv 2110.02861); tensors of less than 4096 weights stay as they
            are.
        fused: one kernel for the whole step; None: where the device has one.

    Raises:
        RequestError: as ``check_optimizer``; also where the device has no fused kernel that was asked for, and for
            8 bits of weights that are split over processes.
    """
    check_optimizer(name, fused)
    parameters = list(parameters)
    settings = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw_8bit":
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise RequestError(
                "optimizer='adamw_8bit' cannot train weights that are split over processes: use optimizer='adamw', or "
                "a strategy that keeps them whole, such as ddp"
            )
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    missing = None if fused is False else _why_not_fused(parameters[0])
    if fused and missing is not None:
        raise RequestError(f"fused=True cannot be had on {parameters[0].device} ({missing}): leave fused out")
    if fused is False or missing is not None:
        return torch.optim.AdamW(parameters, **settings)
    optimizer = torch.optim.AdamW(parameters, fused=True, **settings)
    # A loss scaler then divides the gradients itself, before they are clipped; Lightning refuses to clip otherwise.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def _why_not_fused(parameter: nn.Parameter) -> str | None:
    """What torch says of a fused step of one number of this type on this device; None if it just does it."""
    probe = nn.Parameter(torch.zeros(1, dtype=parameter.dtype, device=parameter.device))
    probe.grad = torch.zeros_like(probe)
    try:
        torch.optim.AdamW([probe], fused=True).step()
    except (RuntimeError, NotImplementedError) as error:
        return reason(error)
    return None


def learning_rate_course(warmup_steps: int, decay: Decay, total_steps: float) -> Callable[[int], float]:
    """Optimizer step -> factor of the learning rate.

    Args:
        warmup_steps: the factor rises linearly to 1 over so many steps.
        decay: then "none" keeps it, "linear" and "cosine" lower it to 0 over the rest, "linear_half" over the last half
            of the run.
        total_steps: of the run.
    """
    start = total_steps / 2 if decay == "linear_half" else warmup_steps

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        if decay == "none" or step < start:
            return warm
        left = min(1.0, max(0.0, (total_steps - step) / max(1.0, total_steps - start)))
        return warm * (0.5 - 0.5 * math.cos(math.pi * left) if decay == "cosine" else left)

    return factor


def follow_course(schedule: torch.optim.lr_scheduler.LambdaLR) -> list[tuple[float, float]]:
    """Give the optimizer the rate of the schedule's own course, where a checkpoint has left that of an older course.

    The state of an optimizer holds the rate of its next step. So the first step of a run that was resumed to go further
    would take what the shorter run had come down to: 0.

    Args:
        schedule: after its state was restored; what agrees is not touched.

    Returns:
        (old rate, new rate) of each group of parameters that changed.
    """
    moved = []
    rates = []
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        rate = base * factor(schedule.last_epoch)
        if not math.isclose(group["lr"], rate, rel_tol=1e-9):
            moved.append((group["lr"], rate))
            group["lr"] = rate
        rates.append(group["lr"])
    if moved:
        schedule._last_lr = rates
    return moved
