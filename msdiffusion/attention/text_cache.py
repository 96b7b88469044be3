"""Keys and values of the text, kept over the steps of a run."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
)
from torch import Tensor, nn

from msdiffusion.attention.control import split_heads


class TextCache:
    """Keys and values of the text, which do not change over the steps of a run, computed once.

    They hold for one UNet, one text tensor, one precision of autocast, and weights that have not been changed since, in
    place or otherwise. Layers that something has been put around, whose strength may change at any step (LoRA), are
    not cached; nor are those that another processor reads (IP-Adapter, attention slicing, ...).
    """

    def __init__(self) -> None:
        self._made_for: tuple[Any, ...] = ()
        self._states: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]] = {}
        self.is_new = True
        """Whether the last call of ``begin`` found another text than the one before."""

    def begin(self, text: Tensor, unet: Any = None) -> TextCache | None:
        """The cache, emptied unless it was made for these; None where nothing must be kept.

        That is where gradients are recorded, where code is traced, and for tensors of ``inference_mode``, whose
        changes nobody counts.
        """
        self.is_new = True
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or text.is_inference():
            return None
        device = text.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        made_for = (text, text._version, unet, precision)
        self.is_new = not _same_things(made_for, self._made_for)
        if self.is_new:
            self._states.clear()
            self._made_for = made_for
        return self

    def states(self, layer: str, attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of one layer, each (B, H, L, D)."""
        if not (isinstance(attn.to_k, nn.Linear) and isinstance(attn.to_v, nn.Linear)):
            return text_states(attn, text)
        weights = (attn.to_k.weight, attn.to_v.weight)
        if any(weight.is_inference() for weight in weights):
            return text_states(attn, text)
        weighed = (*weights, *(weight._version for weight in weights))
        if layer not in self._states or not _same_things(weighed, self._states[layer][0]):
            self._states[layer] = (weighed, *text_states(attn, text))
        return self._states[layer][1:]


def _same_things(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Whether objects are the same and numbers equal (tensors must not be compared by value)."""
    return len(ours) == len(theirs) and all(
        a is b or (isinstance(a, int) and isinstance(b, int) and a == b) for a, b in zip(ours, theirs, strict=True)
    )


def text_states(attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of the text (B, L, width) for one layer, each (B, H, L, D)."""
    return split_heads(attn.to_k(text), attn.heads), split_heads(attn.to_v(text), attn.heads)
