"""The precision that is fastest on the machine a run lands on: bfloat16 where there are units for it, else float32.

On a processor without bfloat16 units autocast to bfloat16 is several times slower than float32; with matrix units (AMX)
it is twice as fast. So one config serves both:

    trainer:
      plugins:
        - class_path: msdiffusion.training.precision.HardwarePrecision
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from msdiffusion.errors import RequestError


def bfloat16_units(device: torch.device) -> str | None:
    """What computes in bfloat16 on a device, in words; None where nothing does, or where nobody knows.

    A GPU counts from compute capability 8.0 on; one that torch can merely make behave so does not. A processor counts
    with AMX tiles or with the bfloat16 instructions of AVX-512.
    """
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return None
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return None
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 does not tell
        for name, words in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")):
            if capabilities.get(name, False):
                return words
    return None


def check_trained_precision(trainer: pl.Trainer) -> None:
    """Refuse a precision that would make the trained weights 16 bits wide.

    Raises:
        RequestError: says what to take.
    """
    if str(trainer.precision) in ("16-true", "bf16-true"):
        raise RequestError(
            f"trainer.precision {trainer.precision} would make the trained weights 16 bits wide, which small steps do "
            "not move: take bf16-mixed, and model.init_args.base_dtype bfloat16 for less memory"
        )


def base_dtype(name: str, trainer: pl.Trainer | None, device: torch.device) -> torch.dtype:
    """Number type of frozen networks on a device: the one of that name; of "auto" the trainer's, if there is one."""
    if name == "auto":
        plugin = None if trainer is None else trainer.precision_plugin
        precision = plugin.choose(device) if isinstance(plugin, HardwarePrecision) else getattr(plugin, "precision", "")
        name = {"bf16": "bfloat16", "16": "float16"}.get(str(precision).split("-")[0], "float32")
    return getattr(torch, name)


class HardwarePrecision(Precision):
    """Lightning's "bf16-mixed" on devices with bfloat16 units, "32-true" on others; it says once which it took.

    For ``trainer.plugins``, without ``trainer.precision``. The choice is made when the device of the process is known,
    and nothing of it is kept in a checkpoint: a run may go on elsewhere. A module that needs to know earlier, as it
    loads its networks, calls ``choose``.
    """

    def __init__(self) -> None:
        self.precision = "32-true"
        self._device: torch.device | None = None

    def choose(self, device: torch.device) -> str:
        """Settle what a device is used with: "bf16-mixed" or "32-true", which is ``precision`` from then on."""
        if self._device is None or self._device.type != device.type:
            units = bfloat16_units(device)
            self.precision = "32-true" if units is None else "bf16-mixed"
            words = f"no bfloat16 units on this {device.type}" if units is None else f"bfloat16 units: {units}"
            rank_zero_info(f"HardwarePrecision takes {self.precision} ({words})")
        self._device = device
        return self.precision

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Lightning calls this once the model is on its device, in every stage."""
        parameter = next(model.parameters(), None)
        if parameter is not None:
            self.choose(parameter.device)
        return super().connect(model, optimizers, lr_schedulers)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Autocast for the steps of training, validation, test and prediction."""
        if self.precision == "bf16-mixed" and self._device is not None:
            # as Lightning's own: a cast weight that outlives its step would be that of the step before
            context = torch.autocast(self._device.type, dtype=torch.bfloat16, cache_enabled=False)
        else:
            context = nullcontext()
        with context:
            yield
