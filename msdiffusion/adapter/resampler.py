"""The grounding resampler: what a subject looks like, what it is called and where it goes, as a few tokens.

Source: section "grounding resampler" of the paper (arXiv 2406.07209) and ``msdiffusion/models/projection.py`` of the
official code; golden tests hold this file to that code.

Shapes: B batch, S subjects, N = B * S, L encoder tokens, D encoder width, P phrase width, T tokens per subject,
C cross-attention width, W inner width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from msdiffusion.errors import WeightsError, shown


@dataclass(frozen=True, kw_only=True)
class ResamplerParams:
    """Sizes of a GroundingResampler; saved with its weights."""

    image_width: int
    """Width of the image encoder's hidden states (1664 for CLIP-bigG)."""
    phrase_width: int
    """Width of the pooled phrase embedding (768 for SDXL's first text encoder)."""
    output_width: int
    """Width of the UNet's cross-attention (2048 for SDXL)."""
    width: int = 1280
    """Inner width."""
    depth: int = 4
    """Number of attention + feed-forward blocks."""
    heads: int = 20
    head_width: int = 64
    tokens: int = 16
    """Tokens per subject."""
    feed_forward_factor: int = 4
    box_frequencies: int = 8
    """Frequencies of the Fourier features of a box."""
    grounding: bool = True
    """False: queries are learned, and neither phrase nor box is seen (an ablation, as in IP-Adapter Plus)."""

    def __post_init__(self) -> None:
        if not isinstance(self.grounding, bool):
            raise WeightsError(f"resampler parameter grounding must be true or false, got {shown(self.grounding)}")
        for name, value in vars(self).items():
            if name == "grounding":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise WeightsError(
                    f"resampler parameter {name} must be a whole number of at least 1, got {shown(value)}"
                )

    @property
    def grounding_width(self) -> int:
        """Width of phrase embedding and box features together."""
        return self.phrase_width + 8 * self.box_frequencies


class GroundingResampler(nn.Module):
    """Image tokens, phrase embedding and target box of each subject to T tokens for the UNet's cross-attention."""

    def __init__(self, params: ResamplerParams) -> None:
        super().__init__()
        self.params = params
        width = params.width
        self.null_queries = nn.Parameter(torch.randn(1, params.tokens, width) / math.sqrt(width))
        if params.grounding:
            self.query_projection = nn.Sequential(
                nn.Linear(params.grounding_width, 2 * params.grounding_width),
                nn.GELU(),
                nn.Linear(2 * params.grounding_width, params.tokens * width),
            )
            self.query_norm = nn.LayerNorm(width)
        self.image_projection = nn.Linear(params.image_width, width)
        self.blocks = nn.ModuleList(ResamplerBlock(params) for _ in range(params.depth))
        self.final_norm = nn.LayerNorm(width)
        self.output_projection = nn.Linear(width, params.output_width)
        self.output_norm = nn.LayerNorm(params.output_width)

    def forward(
        self,
        image_tokens: Tensor,
        phrase_embeddings: Tensor,
        boxes: Tensor,
        drop_grounding: Tensor | None = None,
    ) -> Tensor:
        """Tokens of each subject; subjects do not see one another.

        Args:
            image_tokens: (B, S, L, D) hidden states of the image encoder.
            phrase_embeddings: (B, S, P) pooled phrase embeddings.
            boxes: (B, S, 4) target boxes, normalised xyxy.
            drop_grounding: (B,) or (B, S) bool; samples, or subjects, whose phrase and box are replaced by learned
                queries.

        Returns:
            (B, S, T, C).

        Raises:
            WeightsError: a width is not the one this resampler was made for.
        """
        _check_widths(self.params, image_tokens, phrase_embeddings)
        B, S = image_tokens.shape[:2]
        queries = self._queries(phrase_embeddings, boxes, drop_grounding).flatten(0, 1)  # (N, T, W)
        image = self.image_projection(image_tokens.flatten(0, 1))  # (N, L, W)
        for block in self.blocks:
            queries = block(image, queries)
        tokens = self.output_norm(self.output_projection(self.final_norm(queries)))
        return tokens.unflatten(0, (B, S))

    def _queries(self, phrase_embeddings: Tensor, boxes: Tensor, drop_grounding: Tensor | None) -> Tensor:
        """Initial queries (B, S, T, W) from what and where."""
        if not self.params.grounding:
            return self.null_queries.to(phrase_embeddings.dtype).expand(*boxes.shape[:2], -1, -1)
        grounding = torch.cat([phrase_embeddings, self.box_features(boxes).to(phrase_embeddings.dtype)], dim=-1)
        queries = self.query_projection(grounding).unflatten(-1, (self.params.tokens, self.params.width))
        queries = self.query_norm(queries)
        if drop_grounding is None:
            return queries
        dropped = drop_grounding.bool().reshape(len(boxes), -1, 1, 1)
        return torch.where(dropped, self.null_queries.to(queries.dtype), queries)

    def box_features(self, boxes: Tensor) -> Tensor:
        """Fourier features (B, S, 8 * box_frequencies) of boxes (B, S, 4).

        For each frequency f, from 1 to 100 in a geometric row: sin(f * box), then cos(f * box). There is no factor of
        2 pi, as in the official weights. The arithmetic is float32.
        """
        # Made here rather than kept in a buffer, which module.half() would round.
        steps = torch.arange(self.params.box_frequencies, device=boxes.device, dtype=torch.float32)
        frequencies = 100.0 ** (steps / self.params.box_frequencies)
        angles = boxes.float().unsqueeze(-2) * frequencies.unsqueeze(-1)  # (B, S, frequencies, 4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(start_dim=-2)


class ResamplerBlock(nn.Module):
    """Cross-attention from the queries to image and queries, then a feed-forward network, both residual."""

    def __init__(self, params: ResamplerParams) -> None:
        super().__init__()
        hidden = params.feed_forward_factor * params.width
        self.attention = ResamplerAttention(params)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(params.width),
            nn.Linear(params.width, hidden, bias=False),
            nn.GELU(),
            nn.Linear(hidden, params.width, bias=False),
        )

    def forward(self, image: Tensor, queries: Tensor) -> Tensor:
        """Queries (N, T, W) after one look at the image tokens (N, L, W)."""
        queries = queries + self.attention(image, queries)
        return queries + self.feed_forward(queries)


class ResamplerAttention(nn.Module):
    """Perceiver attention: keys and values come from the image tokens and the queries together."""

    def __init__(self, params: ResamplerParams) -> None:
        super().__init__()
        inner = params.heads * params.head_width
        self.heads = params.heads
        self.image_norm = nn.LayerNorm(params.width)
        self.query_norm = nn.LayerNorm(params.width)
        self.to_q = nn.Linear(params.width, inner, bias=False)
        self.to_kv = nn.Linear(params.width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, params.width, bias=False)

    def forward(self, image: Tensor, queries: Tensor) -> Tensor:
        """What the queries (N, T, W) read from the image tokens (N, L, W) and from one another: (N, T, W)."""
        image, queries = self.image_norm(image), self.query_norm(queries)
        key, value = self.to_kv(torch.cat([image, queries], dim=1)).chunk(2, dim=-1)
        query, key, value = (self._split(states) for states in (self.to_q(queries), key, value))
        # So few queries that a plain softmax, whose backward is the fastest on a CPU, costs nothing anywhere.
        # The scale is shared between query and key, which keeps the products inside the range of half precision.
        root_scale = query.shape[-1] ** -0.25
        scores = (query * root_scale) @ (key * root_scale).transpose(-2, -1)
        probabilities = scores.float().softmax(dim=-1).to(value.dtype)
        return self.to_out((probabilities @ value).transpose(1, 2).flatten(start_dim=2))

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, tokens, head width)


class GlobalProjector(nn.Module):
    """One embedding of each whole reference to T tokens: what the first IP-Adapter does (arXiv 2308.06721).

    A rival of GroundingResampler with the same interface, for comparisons; phrase and box are not seen.
    """

    def __init__(self, params: ResamplerParams) -> None:
        """Build with random weights; of the params, ``image_width``, ``tokens`` and ``output_width`` count."""
        super().__init__()
        self.params = params
        self.projection = nn.Linear(params.image_width, params.tokens * params.output_width)
        self.output_norm = nn.LayerNorm(params.output_width)

    def forward(
        self,
        image_tokens: Tensor,
        phrase_embeddings: Tensor,
        boxes: Tensor,
        drop_grounding: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, S, T, C) of global embeddings (B, S, 1, D); the other arguments are not used.

        Raises:
            WeightsError: a width is not the one this projector was made for, or there is more than one embedding.
        """
        _check_widths(self.params, image_tokens, phrase_embeddings)
        if image_tokens.shape[2] != 1:
            raise WeightsError(f"the projector takes one embedding per reference, got {image_tokens.shape[2]} tokens")
        return self.output_norm(self.projection(image_tokens.squeeze(2)).unflatten(-1, (self.params.tokens, -1)))


def _check_widths(params: ResamplerParams, image_tokens: Tensor, phrase_embeddings: Tensor) -> None:
    given = (image_tokens.shape[-1], phrase_embeddings.shape[-1])
    if given != (params.image_width, params.phrase_width):
        raise WeightsError(
            f"the resampler takes image tokens {params.image_width} wide and phrase embeddings "
            f"{params.phrase_width} wide, but got {given[0]} and {given[1]}: the encoders belong to another adapter"
        )
