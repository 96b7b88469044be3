"""Attention heads taken apart and put together. R rows, N tokens, H heads, D head width, C = H * D layer width."""

from __future__ import annotations

from torch import Tensor


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(R, N, C) to (R, H, N, D)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """(R, H, N, D) to (R, N, C)."""
    return states.transpose(1, 2).flatten(start_dim=2)
