"""What is kept over the steps of a run: how many there were, and the keys and values of the text."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from msdiffusion.attention.heads import split_heads
from msdiffusion.attention.rows import Rows


class Runs:
    """The runs of one denoiser. Calls with the same text tensor, unchanged, are of one run.

    What is kept goes when the text goes, so several runs may be under way at once, and nothing outlives them.
    """

    def __init__(self) -> None:
        self._runs = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[Runs], tuple[()]]:
        """Copies of a denoiser begin anew."""
        return Runs, ()

    def begin(self, text: Tensor) -> Run | None:
        """The run that a call with this text is of; None in traced code, which must leave nothing behind."""
        if torch.compiler.is_compiling():
            return None
        device = text.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        made_for = (None if text.is_inference() else text._version, precision)
        run = self._runs.get(text)
        if run is None or run.made_for != made_for:
            run = self._runs[text] = Run(made_for)
        run.number += 1
        return run


class Run:
    """One run of a sampler, or one call of the denoiser."""

    def __init__(self, made_for: tuple[Any, ...]) -> None:
        """``made_for``: version of the text and precision of autocast."""
        self.made_for, self.number = made_for, -1
        self.grid: tuple[Any, tuple[int, int]] = (None, (0, 0))
        """Of a transformer's patches, with the ids that told it: to read it waits for the device, as ``rows`` does."""
        self.rows: Rows | None = None
        self._cache = TextCache()

    def cache(self, states: Tensor) -> TextCache | None:
        """Keys and values of these text states; None where nothing must be kept.

        That is where gradients are recorded, and for tensors of ``inference_mode``, whose changes nobody counts.
        """
        return None if torch.is_grad_enabled() or states.is_inference() else self._cache.of(states)


class TextCache:
    """Keys and values of the text, which do not change over the steps of a run, computed once.

    They hold for one text, and weights that have not been changed since, in place or otherwise. Layers that something
    has been put around, whose strength may change at any step (LoRA), are not cached; nor are those that another
    processor reads (IP-Adapter, attention slicing, ...).
    """

    def __init__(self) -> None:
        self._text: tuple[Any, int] = (None, 0)
        self._states: dict[str, tuple[tuple[Any, ...], Tensor, Tensor]] = {}

    def of(self, text: Tensor) -> TextCache:
        """Itself, emptied if it was of another text."""
        known, version = self._text
        if known is None or known() is not text or version != text._version:
            self._states.clear()
            self._text = (weakref.ref(text), text._version)  # strongly, it would keep the run alive, whose key it is
        return self

    def states(self, layer: str, attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value of one layer, each (R, H, L, D)."""
        known, _ = self._text
        other = known is None or known() is not text  # of a call inside this one
        if other or not (isinstance(attn.to_k, nn.Linear) and isinstance(attn.to_v, nn.Linear)):
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
    return all(a is b or (isinstance(a, int) and a == b) for a, b in zip(ours, theirs, strict=True))


def text_states(attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of the text (R, L, width) for one layer, each (R, H, L, D)."""
    return split_heads(attn.to_k(text), attn.heads), split_heads(attn.to_v(text), attn.heads)
