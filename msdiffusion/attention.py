"""Cross-attention with subjects: one text path, left as diffusers has it, and controls that add to its result.

A processor holds no state and no weights. What one call needs travels in ``cross_attention_kwargs={"subjects":
condition}``; without it the processors compute exactly what diffusers' own do. So nothing can leak from one call into
the next, and the text path stays open to LoRA, ControlNet and prompts of any length.

Source: section "multi-subject cross-attention" of the paper (arXiv 2406.07209) and
``msdiffusion/models/attention_processor.py`` of the official code; golden tests hold this file to that code.

Shapes: B batch, S subjects, T tokens per subject, N = S * T, L text tokens, Q patches, H heads, D head width,
C = H * D layer width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional

from msdiffusion.errors import LayoutError, RequestError
from msdiffusion.layout import grid_of, patch_masks, pool_masks

Backend = Literal["sdpa", "softmax"]
"""``sdpa``: torch's fused attention, best for inference and on a GPU. ``softmax``: two matrix products and a softmax,
whose backward is far cheaper on a CPU."""


@dataclass(frozen=True)
class AttentionCall:
    """What a control may look at: one call of one cross-attention layer."""

    layer: str
    """Name of the layer, as in ``MSAdapter.layers``."""
    query: Tensor
    """(B, H, Q, D)."""
    text_key: Tensor
    """(B, H, L, D)."""
    text_mask: Tensor | None
    """Additive mask of the text, broadcastable to (B, H, Q, L)."""
    backend: Backend


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


@dataclass(frozen=True)
class AutoLayout:
    """Let the text's own attention maps replace the boxes after some steps (the official "pseudo mask").

    From the ``start_step``-th step on, a layer's region of a subject is where the attention to its phrase, averaged
    over the phrase's tokens, the heads and all steps so far, and scaled to [0, 1], exceeds ``threshold``.
    """

    spans: Tensor
    """(B, S, 2) integer [start, end) of each subject's phrase among the text tokens; start = end: no region."""
    threshold: float = 0.5
    start_step: int = 5

    def __post_init__(self) -> None:
        if self.spans.ndim != 3 or self.spans.shape[-1] != 2:
            raise RequestError(f"spans must be (batch, subjects, 2), got {tuple(self.spans.shape)}")
        if not 0.0 <= self.threshold <= 1.0:
            raise RequestError(f"auto layout threshold must be in [0, 1], got {self.threshold}")
        if self.start_step < 1:
            raise RequestError(f"auto layout start_step counts from 1, got {self.start_step}")


class SubjectCondition:
    """Keys, values and regions of the subjects for one call of a UNet, or one run of a sampler.

    Keys and values are computed once, by ``MSAdapter.condition``; the masks once per resolution. A condition made with
    ``auto_layout`` also counts steps, so it serves one run: make a new one for the next.
    """

    def __init__(
        self,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        boxes: Tensor,
        *,
        height: int,
        width: int,
        masks: Tensor | None = None,
        present: Tensor | None = None,
        auto_layout: AutoLayout | None = None,
        guidance: bool = False,
    ) -> None:
        """Gather what the layers need.

        Args:
            keys: per layer (B, N, C).
            values: per layer (B, N, C), scales multiplied in.
            boxes: (B, S, 4) normalised xyxy; an empty box removes its subject.
            height: rows of the latents.
            width: columns of the latents.
            masks: (B, S, H, W) bool regions of the subjects, any resolution, which replace the boxes.
            present: (B, S) bool; False removes a subject.
            auto_layout: see AutoLayout.
            guidance: the UNet's batch is [unconditional; conditional], and the first half sees no subjects.

        Raises:
            LayoutError: shapes of boxes, masks, spans and keys do not go together.
        """
        B, S = boxes.shape[:2]
        if masks is not None and (masks.ndim != 4 or masks.shape[:2] != boxes.shape[:2]):
            raise LayoutError(f"masks must be ({B}, {S}, height, width) for these boxes, got {tuple(masks.shape)}")
        if auto_layout is not None and auto_layout.spans.shape[:2] != boxes.shape[:2]:
            raise LayoutError(f"spans must be ({B}, {S}, 2) for these boxes, got {tuple(auto_layout.spans.shape)}")
        for layer, key in keys.items():
            if key.shape[0] != B or key.shape[1] % S:
                raise LayoutError(f"{B} x {S} boxes do not fit keys of shape {tuple(key.shape)} in layer {layer}")
        self.keys, self.values = dict(keys), dict(values)
        self.boxes, self.height, self.width = boxes, height, width
        self.guidance, self.auto_layout = guidance, auto_layout
        self._masks, self._present = masks, present
        self._regions: dict[int, tuple[Tensor, Tensor]] = {}
        self._text_maps: dict[str, tuple[Tensor, int]] = {}
        self._phrase_weights: dict[int, Tensor] = {}

    def __call__(self, hidden: Tensor, call: AttentionCall) -> Tensor:
        """Add what the patches read from the subjects: AttentionControl."""
        if not self.guidance:
            return hidden + self._read(call, call.query, first=0)
        half = hidden.shape[0] // 2
        read = self._read(call, call.query[half:], first=half)
        return torch.cat([hidden[:half], hidden[half:] + read])

    def _read(self, call: AttentionCall, query: Tensor, first: int) -> Tensor:
        """(B, Q, C) for the samples from ``first`` on; rows that no region covers are exactly zero."""
        B, H, _, D = query.shape
        if call.layer not in self.keys:
            raise RequestError(f"the condition has no keys for layer {call.layer}: it was made for another UNet")
        key, value = (
            states[call.layer].to(query.dtype).unflatten(-1, (H, D)).transpose(1, 2)
            for states in (self.keys, self.values)
        )
        if key.shape[0] not in (1, B):
            half = " conditional" if self.guidance else ""
            raise RequestError(f"the condition is for {key.shape[0]} samples, but the UNet got {B}{half} ones")
        allowed, background = self._masks_for(call, query, first)
        read = dot_product_attention(
            query, key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1), allowed, call.backend
        )
        return read.masked_fill(background, 0.0)

    def _masks_for(self, call: AttentionCall, query: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Attention mask (B or 1, 1, Q, N) and background (B or 1, Q, 1), both bool."""
        tokens = self.keys[call.layer].shape[1] // self.boxes.shape[1]
        patches = query.shape[2]
        if self.auto_layout is not None:
            regions = self._text_regions(call, query, first, self.auto_layout)
            if regions is not None:
                return _attention_masks(self._only_present(regions), tokens)
        if patches not in self._regions:
            rows, columns = grid_of(patches, self.height, self.width)
            if self._masks is not None:
                regions = pool_masks(self._masks, rows, columns)
            else:
                regions = patch_masks(self.boxes, rows, columns)
            self._regions[patches] = _attention_masks(self._only_present(regions), tokens)
        return self._regions[patches]

    def _only_present(self, regions: Tensor) -> Tensor:
        return regions if self._present is None else regions & self._present.unsqueeze(-1)

    @torch.no_grad()
    def _text_regions(self, call: AttentionCall, query: Tensor, first: int, layout: AutoLayout) -> Tensor | None:
        """Regions (B, S, Q) seen in the text attention of all steps so far, or None while it is too early."""
        mask = call.text_mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[first:]
        probabilities = attention_probabilities(query, call.text_key[first:], mask)  # (B, H, Q, L)
        # Mean over the tokens of each phrase, then over the heads; summed up in float32.
        maps = (probabilities @ self._weights(layout, probabilities)).float().mean(dim=1).transpose(1, 2)  # (B, S, Q)
        total, steps = self._text_maps.get(call.layer, (0.0, 0))
        total, steps = total + maps, steps + 1
        self._text_maps[call.layer] = (total, steps)
        if steps < layout.start_step:
            return None
        maps = total / steps
        low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
        # 1e-5 as in the official code: it also keeps the map of an empty phrase below the threshold.
        return (maps - low) / (high - low + 1e-5) > layout.threshold

    def _weights(self, layout: AutoLayout, probabilities: Tensor) -> Tensor:
        """(B or 1, 1, L, S): 1 / length on the tokens of each phrase."""
        length = probabilities.shape[-1]
        if length not in self._phrase_weights:
            spans = layout.spans.to(probabilities.device)
            start, end = spans[:, None, None, :, 0], spans[:, None, None, :, 1]  # (B, 1, 1, S)
            position = torch.arange(length, device=spans.device).view(1, 1, -1, 1)
            inside = (position >= start) & (position < end)
            self._phrase_weights[length] = (inside / (end - start).clamp(min=1)).to(probabilities.dtype)
        return self._phrase_weights[length]


def _attention_masks(regions: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Regions (B, S, Q) to the attention mask (B, 1, Q, N) and the background (B, Q, 1).

    Background rows may attend to everything, because a softmax over nothing is NaN; the caller zeroes them after.
    """
    background = ~regions.any(dim=1).unsqueeze(-1)
    allowed = regions.transpose(1, 2).repeat_interleave(tokens, dim=-1) | background
    return allowed.unsqueeze(1), background


class MultiSubjectAttnProcessor:
    """Processor of a cross-attention layer: the text, then the subjects and any other controls."""

    def __init__(self, layer: str, backend: Backend = "sdpa") -> None:
        self.layer, self.backend = layer, backend

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        subjects: AttentionControl | None = None,
        controls: Sequence[AttentionControl] = (),
    ) -> Tensor:
        """Attend from (B, Q, C) to the text (B, L, width), then let ``subjects`` and ``controls`` add to it."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], text.shape[0])
            attention_mask = attention_mask.unflatten(0, (text.shape[0], attn.heads))
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for states in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        hidden = dot_product_attention(query, key, value, attention_mask, self.backend)
        call = AttentionCall(self.layer, query, key, attention_mask, self.backend)
        for control in (subjects, *controls):
            if control is not None:
                hidden = control(hidden, call)
        return attn.to_out[1](attn.to_out[0](hidden))


class TransparentAttnProcessor:
    """Processor of every other layer: takes the subjects' keyword, which diffusers hands to all layers, and ignores it.

    Without it diffusers would warn once per self-attention layer and step.
    """

    def __init__(self, base: Any) -> None:
        self.base = base

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        subjects: AttentionControl | None = None,
        controls: Sequence[AttentionControl] = (),
    ) -> Tensor:
        """Whatever the processor that was there before computes."""
        return self.base(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
