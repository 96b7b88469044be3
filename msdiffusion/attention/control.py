"""What may take part in an attention layer, and attention itself.

Shapes: B batch, L text tokens, N attended tokens, Q patches, H heads, D head width, C = H * D layer width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Backend = Literal["sdpa", "softmax"]
"""``sdpa``: torch's fused attention, best for inference and on a GPU. ``softmax``: two matrix products and a softmax,
whose backward is far cheaper on a CPU."""


class AttentionCall:
    """What a control may look at: one call of one cross-attention layer."""

    def __init__(
        self,
        processor: Any,
        query: Tensor,
        text_key: Tensor | Callable[[], Tensor],
        text_mask: Tensor | None,
        owned: bool = False,
    ) -> None:
        """Gather it.

        Args:
            processor: of the layer: knows its ``layer``, ``number`` and ``backend``, which are asked for when they are
                needed only. Code that is compiled once for many layers must not see their names.
            query: (B, H, Q, D).
            text_key: (B, H, L, D), or a function that makes it when it is asked for.
            text_mask: additive mask of the text, broadcastable to (B, H, Q, L).
            owned: whether what was read so far is our own fresh tensor, which a control may change in place.
        """
        self.query, self.text_mask, self.owned, self._processor, self._text_key = (
            query, text_mask, owned, processor, text_key
        )  # fmt: skip

    @property
    def layer(self) -> str:
        """Name of the layer, as in ``MSAdapter.layers``."""
        return self._processor.layer

    @property
    def number(self) -> Tensor | None:
        """(1,) integer, see MultiSubjectAttnProcessor."""
        return self._processor.number

    @property
    def backend(self) -> Backend:
        """How to attend."""
        return self._processor.backend

    @property
    def text_key(self) -> Tensor:
        """(B, H, L, D)."""
        return self._text_key if isinstance(self._text_key, Tensor) else self._text_key()


class AttentionControl(Protocol):
    """Adds to, or rewrites, what a layer read from the text; several may follow one another."""

    def __call__(self, hidden: Tensor, call: AttentionCall) -> Tensor:
        """The new result (B, Q, C) of the layer before its output projection, given the one so far."""
        ...


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
    """Attention of (B, H, Q, D) on (B, H, N, D), heads merged: (B, Q, C).

    ``mask`` is bool (True: may attend) or additive, broadcastable to (B, H, Q, N), or None.
    """
    if backend == "sdpa":
        hidden = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:
        hidden = attention_probabilities(query, key, mask) @ value
    return hidden.transpose(1, 2).flatten(start_dim=2).to(query.dtype)


def attention_probabilities(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of the scaled scores, (B, H, Q, N); ``mask`` as for ``dot_product_attention``."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, H, N, D)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)
