"""Loaded weights get memory of their own, in place of the file that they were read from."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def give_own_memory(*modules: nn.Module) -> None:
    """Copy every parameter and buffer that lies on the CPU, one after the other, in place.

    Libraries map a safetensors file into memory and take its tensors as they lie there: at any multiple of the smallest
    element, which the length of the file's header decides. Some processors multiply them in another order then, so the
    same weights out of another file would draw with other last bits; and a file that is overwritten later would change
    the model, or kill the process. A copy begins where torch puts all its tensors, at a multiple of 64 bytes.

    Args:
        modules: with weights of any dtype. Parameters stay the objects that they are, so ties and optimizers hold.
            Left as they are: weights on other devices (also those that offloading keeps elsewhere), those that
            processes share, sparse ones, and tensors of subclasses (quantized weights).
    """
    for module in modules:
        for tensor in chain(module.parameters(), module.buffers()):
            data = tensor.data
            plain = type(data) is Tensor and data.layout is torch.strided
            if plain and data.device.type == "cpu" and not data.is_shared():
                tensor.data = data.clone()
