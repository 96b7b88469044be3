"""The layout loss: an ablation of the paper that pushes the attention to each subject's words into the subject's box.

Source: appendix F of the paper (arXiv 2406.07209) tells of such a loss on the attention to text or to image tokens,
added to that of the noise, and leaves it out of the method. The form here is our own, after the losses of Chen et al.
2023 ("Training-free layout control", arXiv 2304.03373) without their square: per cross-attention layer and subject, the
part of the attention to the words of its phrase that falls outside its box.

It works on the attention to the *text*: attention to image tokens is masked by the boxes anyway, so it has no mass
outside them that a loss could move. The adapter is not part of the text's attention, but what it adds to a layer
changes the queries of every later one, and through these the gradient reaches it.

Shape letters: B batch, S subjects, L text tokens, H heads, Q patches.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msdiffusion.attention.control import AttentionCall, Control, Hook, Layer
from msdiffusion.errors import PhraseError
from msdiffusion.request.layout import grid_of, patch_masks
from msdiffusion.request.phrases import find_in_prompt, token_span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from msdiffusion.training.samples.batch import PairsBatch


class PhraseTokens:
    """Which tokens of a caption name a phrase. Answers are remembered: captions come again in every epoch.

    Args:
        tokenizer: of the first text encoder, a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.limit: int = tokenizer.model_max_length
        self._of = lru_cache(maxsize=65536)(self._find)

    def of(self, caption: str, phrase: str) -> tuple[int, ...]:
        """The tokens of the phrase wherever it occurs, the start token counted; none where it does not occur."""
        return self._of(caption, phrase)

    def of_batch(self, batch: PairsBatch, subjects: int, no_text: Sequence[bool]) -> list[list[tuple[int, ...]]]:
        """B lists with the tokens of the first so many phrases; none where the prompt was dropped."""
        return [
            [() if dropped else self.of(caption, phrase) for phrase in phrases[:subjects]]
            for caption, phrases, dropped in zip(batch.captions, batch.phrases, no_text, strict=True)
        ]

    def _find(self, caption: str, phrase: str) -> tuple[int, ...]:
        found: list[int] = []
        occurrence = 0
        while True:
            try:
                find_in_prompt(caption, phrase, occurrence)
            except PhraseError:  # no further one
                return tuple(found)
            try:
                found += range(*token_span(self.tokenizer, caption, phrase, occurrence))
            except PhraseError:  # beyond the end of what the text encoder reads
                return tuple(found)
            occurrence += 1


class LayoutLoss(Control):
    """A control that changes nothing and notes, in each cross-attention layer, where phrases are looked for.

    One object serves one call of the UNet. Subjects that share a phrase share its words, so each of them may be looked
    for in any of their boxes.

    Args:
        tokens: B lists with, per subject, the places of its phrase in the prompt; empty for padding, for a phrase that
            the prompt lacks, and where the prompt was dropped. Subjects with the same places share them.
        boxes: (B, S, 4).
        latent_size: rows and columns of the UNet's latents.
        text_length: L.
    """

    def __init__(
        self, tokens: Sequence[Sequence[tuple[int, ...]]], boxes: Tensor, latent_size: tuple[int, int], text_length: int
    ) -> None:
        B, S = boxes.shape[:2]
        words = torch.zeros(B, text_length, S)
        shared = torch.zeros(B, S, S)
        for row, places in enumerate(tokens):
            for slot, own in enumerate(places):
                if own:
                    words[row, list(own), slot] = 1 / len(own)
                    shared[row, slot, [i for i, other in enumerate(places) if other == own]] = 1
        self.latent_size = latent_size
        self.boxes = boxes
        self.words = words.unsqueeze(1).to(boxes.device, non_blocking=True)  # (B, 1, L, S)
        self.shared = shared.to(boxes.device, non_blocking=True)
        self.counted = shared.to(boxes.device, non_blocking=True).diagonal(dim1=1, dim2=2)
        """float32 (B, S): 1 for every subject that has a loss."""
        self.found = sum(bool(own) for places in tokens for own in places)
        """Number of these."""
        self._regions: dict[int, Tensor] = {}
        self._outside: list[Tensor] = []
        self._closed = False

    def wants(self, layer: Layer) -> Collection[Hook]:
        """The maps of cross-attention."""
        return ("weights",) if layer.kind == "cross" else ()

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """``weights``, untouched.

        With gradient checkpointing a layer is computed again in the backward pass. It must then do the same arithmetic
        as at first, and be counted no second time.
        """
        maps = (weights @ self.words.to(weights.dtype)).float().mean(dim=1)  # (B, Q, S)
        inside = (maps * self._region(maps.shape[1])).sum(dim=1)  # (B, S)
        outside = 1 - inside / maps.sum(dim=1).clamp(min=1e-12)
        if not self._closed:
            self._outside.append(outside)
        return weights

    def loss(self) -> Tensor:
        """float32 (B,) in [0, 1]: per sample the mean over layers and subjects; 0 for samples without a subject.

        After the call of the UNet; nothing is recorded afterwards.
        """
        self._closed = True
        outside = torch.stack(self._outside).mean(dim=0) * self.counted
        return outside.sum(dim=1) / self.counted.sum(dim=1).clamp(min=1)

    def _region(self, patches: int) -> Tensor:
        """float32 (B, Q, S), 1 in a box of the subject or of one of the same name."""
        if patches not in self._regions:
            boxes = patch_masks(self.boxes, *grid_of(patches, *self.latent_size)).float()  # (B, S, Q)
            self._regions[patches] = (self.shared @ boxes > 0).float().transpose(1, 2)
        return self._regions[patches]
