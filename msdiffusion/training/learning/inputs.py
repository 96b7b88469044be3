"""A batch of pairs as the denoiser and the adapter take it: latents, text, and what the encoders see of the subjects.

Shape letters: B batch, S subjects (of the largest sample), n subjects of all samples, L encoder tokens, D encoder
width, C cross-attention width, P phrase width, T tokens per subject, h w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.condition import SubjectCondition
from msdiffusion.backbone.backbone import Backbone
from msdiffusion.training.encodings.frozen import FrozenEncodings
from msdiffusion.training.samples.batch import PairsBatch


@dataclass(frozen=True)
class Inputs:
    """A batch after the frozen encoders."""

    latents: Tensor
    """float32 (B, channels, h, w), scaled."""
    prompt_states: Tensor
    """(B, L, C)."""
    added_conditions: dict[str, Tensor] | None
    """What the UNet takes beside the prompt."""
    image_tokens: Tensor
    """(B, S, L, D), zeros for padding."""
    phrase_embeddings: Tensor
    """(B, S, P), zeros for padding."""
    boxes: Tensor
    """float32 (B, S, 4)."""
    subjects: Tensor
    """int64 (n,): places of the subjects that are there among the B * S, in order."""


def subject_slots(batch: PairsBatch) -> list[list[int]]:
    """B lists of the slots that hold a subject: what ``present`` says, without waiting for the device."""
    return [[slot for slot, name in enumerate(names) if name] for names in batch.reference_ids]


class BatchEncoder:
    """Asks the frozen networks about batches, or takes what they said ahead of training.

    Args:
        size_condition: what SDXL's size conditions say of a target: "picture", its own size and crop, or "resolution",
            always a whole picture of the training size.
    """

    def __init__(
        self, backbone: Backbone, encodings: FrozenEncodings, size_condition: Literal["picture", "resolution"]
    ) -> None:
        self.backbone, self.encodings, self.size_condition = backbone, encodings, size_condition
        self._empty_prompt: tuple[Tensor, Tensor | None] | None = None
        self._zero_reference: Tensor | None = None

    @torch.no_grad()
    def encode(
        self, batch: PairsBatch, no_image: Sequence[bool] | None = None, no_text: Sequence[bool] | None = None
    ) -> Inputs:
        """What the frozen networks say about a batch, the same inside of autocast as outside.

        Args:
            batch: on the device of the networks.
            no_image: B flags: samples whose references are zeros; None for none.
            no_text: B flags: samples whose prompt is empty; None for none.
        """
        # Asked as ahead of the run: in their own precision, whatever arithmetic the trained part has.
        with torch.autocast(batch.boxes.device.type, enabled=False):
            slots = subject_slots(batch)
            S = max(1, *(slot + 1 for row in slots for slot in row))
            places = [row * S + slot for row, own in enumerate(slots) for slot in own]
            subjects = torch.tensor(places).to(batch.boxes.device, non_blocking=True)
            states, pooled = self._prompts(batch, no_text)
            return Inputs(
                latents=self._latents(batch),
                prompt_states=states,
                added_conditions=self._added_conditions(batch, pooled),
                image_tokens=self._image_tokens(batch, slots, S, subjects, no_image),
                phrase_embeddings=self._phrases(batch, slots, S, subjects),
                boxes=batch.boxes[:, :S],
                subjects=subjects,
            )

    def _latents(self, batch: PairsBatch) -> Tensor:
        """float32, the posterior's sample that the batch's own random numbers choose."""
        if batch.encoded is not None and batch.encoded.has_latents:
            mean, deviation = batch.encoded.latent_mean.float(), batch.encoded.latent_deviation
        else:
            mean, deviation = self.backbone.latent_posterior(batch.targets)
        return mean if deviation is None else mean + deviation.float() * batch.draws.posterior

    def _prompts(self, batch: PairsBatch, no_text: Sequence[bool] | None) -> tuple[Tensor, Tensor | None]:
        dropped = [row for row, flag in enumerate(no_text or ()) if flag]
        if batch.encoded is None or not batch.encoded.has_text:
            captions = ["" if row in dropped else caption for row, caption in enumerate(batch.captions)]
            return self.encodings.prompts(captions)
        states, pooled = batch.encoded.prompt_states, batch.encoded.pooled
        if not dropped:
            return states, pooled
        if self._empty_prompt is None:
            empty, empty_pooled = self.encodings.prompts([""])
            self._empty_prompt = empty[0], None if empty_pooled is None else empty_pooled[0]
        rows = torch.tensor(dropped).to(states.device, non_blocking=True)
        columns = []
        for values, empty in zip((states, pooled), self._empty_prompt, strict=True):
            columns.append(None if values is None else _with_rows(values, rows, empty))
        return columns[0], columns[1]

    def _phrases(self, batch: PairsBatch, slots: list[list[int]], S: int, subjects: Tensor) -> Tensor:
        if batch.encoded is not None and batch.encoded.has_text:
            return batch.encoded.phrase_embeddings[:, :S]
        phrases = [batch.phrases[row][slot] for row, own in enumerate(slots) for slot in own]
        return _scattered(self.encodings.phrases(phrases), subjects, len(batch), S)

    def _image_tokens(
        self, batch: PairsBatch, slots: list[list[int]], S: int, subjects: Tensor, no_image: Sequence[bool] | None
    ) -> Tensor:
        dropped = [row for row, flag in enumerate(no_image or ()) if flag]
        if batch.encoded is not None and batch.encoded.has_references:
            tokens = batch.encoded.image_tokens[:, :S]
            if not dropped:
                return tokens
            hidden = [row * S + slot for row in dropped for slot in slots[row]]
            rows = torch.tensor(hidden).to(tokens.device, non_blocking=True)
            return _with_rows(tokens.flatten(0, 1), rows, self._zero_tokens()).unflatten(0, (len(batch), S))
        names = [batch.reference_ids[row][slot] for row, own in enumerate(slots) for slot in own]
        shown = [i for i, row in enumerate(r for r, own in enumerate(slots) for _ in own) if row not in dropped]
        if len(shown) == len(names):
            pixels = batch.references[:, :S].flatten(0, 1)[subjects]
            return _scattered(self.encodings.references(names, pixels), subjects, len(batch), S)
        zero = self._zero_tokens()
        tokens = zero.expand(len(names), *zero.shape)
        if shown:
            rows = torch.tensor(shown).to(subjects.device, non_blocking=True)
            pixels = batch.references[:, :S].flatten(0, 1)[subjects[rows]]
            seen = self.encodings.references([names[i] for i in shown], pixels)
            tokens = tokens.clone().index_copy_(0, rows, seen.to(tokens.dtype))
        return _scattered(tokens, subjects, len(batch), S)

    def _zero_tokens(self) -> Tensor:
        """(L, D): what the image encoder says of zero pixels, which is what a dropped reference becomes."""
        if self._zero_reference is None:
            like = self.backbone.prepare_references([Image.new("RGB", (8, 8))], (0, 0, 0))
            self._zero_reference = self.encodings.zero_reference(like)
        return self._zero_reference

    def _added_conditions(self, batch: PairsBatch, pooled: Tensor | None) -> dict[str, Tensor]:
        if pooled is None:
            return {}
        # in the UNet's own precision: half a precision of encodings made ahead would round the sizes
        pooled = pooled.to(self.backbone.dtype)
        size = torch.tensor(batch.size).to(pooled.device, non_blocking=True).expand(len(batch), 2)
        if self.size_condition == "picture":
            return self.backbone.added_conditions(pooled, batch.original_sizes, batch.crops_top_left, size)
        return self.backbone.added_conditions(pooled, size, torch.zeros_like(size), size)


def make_condition(
    adapter: MSAdapter, inputs: Inputs, drop_grounding: Tensor | None = None, **options: Any
) -> SubjectCondition:
    """The condition of a batch; the resampler computes the subjects that are there, and no padding.

    Args:
        drop_grounding: bool (B,), samples whose phrases and boxes the resampler does not see; None for none.
        options: of ``MSAdapter.condition``.
    """
    B, S = inputs.boxes.shape[:2]
    embeddings = (inputs.image_tokens, inputs.phrase_embeddings, inputs.boxes)
    own = [part.flatten(0, 1)[inputs.subjects].unsqueeze(1).float() for part in embeddings]
    dropped = None if drop_grounding is None else drop_grounding.repeat_interleave(S)[inputs.subjects]
    tokens = adapter.resampler(*own, dropped).squeeze(1)  # (n, T, C)
    return adapter.condition(_scattered(tokens, inputs.subjects, B, S), inputs.boxes, **options)


def _scattered(values: Tensor, places: Tensor, B: int, S: int) -> Tensor:
    """(n, ...) at their places in (B, S, ...), zeros elsewhere."""
    if len(values) < B * S:
        values = values.new_zeros(B * S, *values.shape[1:]).index_copy(0, places, values)
    return values.unflatten(0, (B, S))


def _with_rows(values: Tensor, rows: Tensor, row: Tensor) -> Tensor:
    """A copy of (N, ...) with one and the same (...) in some of its rows."""
    return values.index_copy(0, rows, row.to(values.dtype).expand(len(rows), *row.shape))
