"""SubjectCondition: what a UNet needs to draw subjects, in one object that any diffusers pipeline hands on.

``cross_attention_kwargs={"subjects": condition}`` is all there is to say. Keys and values of the subjects are computed
when the condition is made; masks once per latent size; only the text's attention maps (auto layout) change over a run.

Shapes: B rows that see subjects (1 layout serves any), S subjects, T tokens per subject, N = S * T, L text tokens, Q
patches, H heads, D head width, C = H * D layer width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor
from torch.nn import functional

from msdiffusion.adapter.auto_layout import AutoLayout
from msdiffusion.attention.control import (
    AttentionCall,
    Control,
    Hook,
    Layer,
    Step,
    dot_product_attention,
)
from msdiffusion.attention.heads import split_heads
from msdiffusion.attention.maps import TextMaps, to_unit_range
from msdiffusion.attention.rows import PROMPTED, Rows, guided
from msdiffusion.errors import LayoutError, RequestError
from msdiffusion.request.layout import grid_of, patch_masks, pool_masks
from msdiffusion.request.subjects import true_or_false, whole_number

Masks = Sequence[Sequence[Tensor | None]]
NULL_TOKENS = 8
"""Tokens with value zero that patches outside every region attend to, so that they read exactly zero. Eight keep the
number of tokens a multiple of eight, as fused kernels like it."""


class SubjectCondition(Control):
    """Keys, values and regions of the subjects for runs of a sampler, or single calls of a UNet.

    One object serves one run after another: nothing that a run leaves behind changes the next one. A run begins where
    the timestep rises, or is the first one of the run before, as in samplers of one step.
    """

    def __init__(
        self,
        keys: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        boxes: Tensor,
        *,
        masks: Tensor | Masks | None = None,
        present: Tensor | None = None,
        windows: Tensor | None = None,
        train_timesteps: int = 1000,
        auto_layout: AutoLayout | None = None,
        num_images: int | None = None,
        guidance: bool | None = None,
        inert: bool = False,
        phrases: Sequence[str] = (),
        batch_is_sure: bool = False,
    ) -> None:
        """Gather what the layers need.

        Args:
            keys: per layer (B, N, C).
            values: per layer (B, N, C), scales multiplied in.
            boxes: (B, S, 4) normalised xyxy; an empty box removes its subject.
            masks: (B, S, H, W) bool regions of the subjects, any resolution, which replace the boxes; where one is
                empty, the box counts. Or, for masks of different resolutions, per picture a list of (H, W) bool
                tensors and None, at most S long.
            present: (B, S) bool; False removes a subject.
            windows: (B, S, 2) in [0, 1]: the part [start, end) of the way from noise to picture in which a subject is
                there. A call with timestep t is 1 - t / ``train_timesteps`` of the way, as for diffusers'
                ``denoising_end``.
            train_timesteps: of the noise schedule.
            auto_layout: see AutoLayout.
            num_images: pictures in the batch, without the unconditional ones; None: B.
            guidance: whether the UNet's batch is [unconditional; conditional], whose first half sees no subjects; None:
                it is if it has twice as many samples as there are pictures.
            inert: no subject has any weight, so nothing needs to be computed.
            phrases: what each subject is called, for whoever looks.
            batch_is_sure: ``num_images`` needs no check against the latents of the first call.

        Raises:
            LayoutError: shapes of boxes, masks, spans and keys do not go together.
            RequestError: ``num_images`` or ``guidance`` cannot be that.
        """
        if not isinstance(boxes, Tensor) or boxes.ndim != 3 or boxes.shape[-1] != 4 or 0 in boxes.shape:
            shape = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
            raise LayoutError(f"boxes must be (pictures, subjects, 4), got {shape}")
        if num_images is not None:
            num_images = whole_number(num_images, "num_images", 1)
        if guidance is not None:
            guidance = true_or_false(guidance, "guidance")
        B, S = boxes.shape[:2]
        if isinstance(masks, Tensor):
            fitting = masks.ndim == 4 and masks.shape[:2] == boxes.shape[:2]
        else:
            fitting = masks is None or (len(masks) == B and all(len(row) <= S for row in masks))
        if not fitting:
            shape = tuple(masks.shape) if isinstance(masks, Tensor) else [len(row) for row in masks]
            raise LayoutError(f"masks must be ({B}, {S}, height, width) for these boxes, got {shape}")
        if windows is not None and windows.shape != (B, S, 2):
            raise LayoutError(f"windows must be ({B}, {S}, 2) for these boxes, got {tuple(windows.shape)}")
        if auto_layout is not None and auto_layout.spans.shape[:2] != boxes.shape[:2]:
            raise LayoutError(f"spans must be ({B}, {S}, 2) for these boxes, got {tuple(auto_layout.spans.shape)}")
        for layer, key in keys.items():
            if key.shape[0] != B or key.shape[1] % S:
                raise LayoutError(f"{B} x {S} boxes do not fit keys of shape {tuple(key.shape)} in layer {layer}")
        self.num_images = B if num_images is None else num_images
        if B not in (1, self.num_images):
            raise LayoutError(f"layouts for {B} pictures do not fit num_images={self.num_images}")
        # Zero tokens after the subjects', for the background to attend to.
        self.keys = {layer: functional.pad(key, (0, 0, 0, NULL_TOKENS)) for layer, key in keys.items()}
        self.values = {layer: functional.pad(value, (0, 0, 0, NULL_TOKENS)) for layer, value in values.items()}
        self.boxes, self.masks, self.windows = boxes, masks, windows
        # An empty box stays empty when auto layout comes: it means "not there".
        there = (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        if masks is not None:
            there = there | self._has_mask()
        self.present = there if present is None else there & present
        self.inert = inert
        self.phrases, self.batch_is_sure = tuple(phrases), batch_is_sure
        self.train_timesteps, self.guidance, self.auto_layout = train_timesteps, guidance, auto_layout
        self._attention_masks: dict[tuple[int, int, int], Tensor] = {}
        self._regions: dict[tuple[int, int, int], Tensor] = {}
        self._stacks: dict[int, tuple[Tensor, Tensor]] = {}
        self._maps = None if auto_layout is None else TextMaps(boxes.device)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> SubjectCondition:
        """Move it, in place; ``at`` does so where a UNet runs elsewhere, as with offloading."""
        self.keys = {layer: key.to(device, dtype) for layer, key in self.keys.items()}
        self.values = {layer: value.to(device, dtype) for layer, value in self.values.items()}
        self.boxes, self.present = self.boxes.to(device), self.present.to(device)
        if isinstance(self.masks, Tensor):
            self.masks = self.masks.to(device)
        elif self.masks is not None:
            self.masks = [[None if mask is None else mask.to(device) for mask in row] for row in self.masks]
        self.windows = None if self.windows is None else self.windows.to(device)
        self._attention_masks.clear()
        self._regions.clear()
        self._stacks.clear()
        self.reset()
        return self

    def reset(self) -> None:
        """Forget what the text's attention saw.

        Needed only where a run with auto layout was broken off, and the next one with this condition begins at a lower
        timestep: a run that begins at the top is told from the last one by itself.
        """
        self._maps = None if self.auto_layout is None else TextMaps(self.boxes.device)

    def _has_mask(self) -> Tensor:
        """(B, S) bool; there are masks."""
        if isinstance(self.masks, Tensor):
            return self.masks.flatten(2).any(dim=-1)
        flags = torch.zeros(self.boxes.shape[:2], dtype=torch.bool)
        for picture, row in enumerate(self.masks):
            for subject, mask in enumerate(row):
                flags[picture, subject] = mask is not None
        return flags.to(self.boxes.device)

    def regions(self, rows: int, columns: int) -> Tensor:
        """(B, S, rows * columns) bool: what boxes and masks cover of a grid of patches."""
        boxed = patch_masks(self.boxes, rows, columns)
        if self.masks is None:
            return boxed
        if isinstance(self.masks, Tensor):
            return torch.where(self._has_mask().unsqueeze(-1), pool_masks(self.masks, rows, columns), boxed)
        pooled = [
            [region if mask is None else pool_masks(mask[None, None], rows, columns)[0, 0] for mask, region in pairs]
            for pairs in (zip_longest(row, regions) for row, regions in zip(self.masks, boxed, strict=True))
        ]
        return torch.stack([torch.stack(row) for row in pooled])

    def rows(self, samples: int) -> Rows:
        """What the rows of a batch of so many samples are.

        Raises:
            RequestError: neither as many samples as there are pictures nor twice as many, or not those of the layouts.
        """
        B = self.boxes.shape[0]
        if self.guidance is None:
            if samples in (self.num_images, 2 * self.num_images):
                return guided(self.num_images, samples > self.num_images, self.batch_is_sure)
            raise RequestError(
                f"the condition is for {self.num_images} pictures, so the UNet's batch should be {self.num_images}, or "
                f"{2 * self.num_images} with guidance, but it is {samples}: make the condition with num_images=... "
                '(or, for batches of other parts, as of PAG or InstructPix2Pix, say which: "rows": Rows(...))'
            )
        count = samples // 2 if self.guidance else samples
        if B not in (1, count) or (self.guidance and samples % 2):
            half = " with guidance" if self.guidance else ""
            raise RequestError(f"the condition is for {B} pictures, but the UNet's batch{half} is {samples}")
        return guided(count, self.guidance)

    def at(self, step: Step) -> BoundCondition | None:
        """The condition for one call of the UNet, None if it is inert or nothing in the batch reads the prompt.

        Raises:
            RequestError: the batch is not one of these pictures; or there is auto layout, which each layer remembers
                for itself, where layers share code.
        """
        if any(layer.kind == "joint" for layer in step.layers):
            raise RequestError("a condition of subjects is for a UNet; this is a transformer with joint attention")
        if not set(step.rows.branches) & set(PROMPTED):
            return None
        B, seeing = self.boxes.shape[0], step.rows.prompted()
        if B not in (1, seeing.stop - seeing.start):
            raise RequestError(
                f"the condition is for {B} pictures, but {seeing.stop - seeing.start} rows of the UNet's batch read "
                f"the prompt ({', '.join(step.rows.branches)} of {step.rows.pictures})"
            )
        if self.inert:
            return None
        if self.boxes.device != step.sample.device:
            self.to(step.sample.device, step.sample.dtype)
        if self._maps is not None and not torch.compiler.is_compiling() and self._maps.is_stale():
            self.reset()
        if step.shared and self.auto_layout is not None:
            raise RequestError(
                "auto layout and subjects without a box do not go together with compile_repeated_blocks(): compile the "
                "whole UNet, pipeline.unet.compile()"
            )
        return BoundCondition(self, step, seeing)

    def stacks(self, layers: Sequence[Layer]) -> dict[int, tuple[Tensor, Tensor]]:
        """Per layer width keys and values (layers, B, N, C) of all cross-attention layers so wide, by their number."""
        if not self._stacks:
            names: dict[int, list[str]] = {}
            for layer in sorted(layers, key=lambda layer: layer.number):
                if layer.kind == "cross":
                    names.setdefault(layer.width, []).append(layer.name)
            self._stacks = {
                width: tuple(torch.stack([states[name] for name in named]) for states in (self.keys, self.values))
                for width, named in names.items()
            }
        return self._stacks

    @torch.no_grad()
    def layout_maps(self, rows: int = 32, columns: int = 32) -> Tensor:
        """Where the text's attention saw each phrase in the last run: what auto layout goes by.

        Args:
            rows: of the maps.
            columns: of the maps.

        Returns:
            (B, S, rows, columns) float32 in [0, 1]: the mean over layers, each scaled to [0, 1] per subject.

        Raises:
            RequestError: no auto layout, or nothing drawn yet.
        """
        if self._maps is None or not self._maps.totals:
            raise RequestError("there are no layout maps: they are gathered by a run with auto_layout")
        return self._maps.mean(rows, columns)


class BoundCondition(Control):
    """A condition for one call of the UNet."""

    def __init__(self, condition: SubjectCondition, step: Step, seeing: slice) -> None:
        """Work out what all layers of the call share; ``seeing`` are the rows that see subjects."""
        self._stacks = condition.stacks(step.layers) if step.shared else None
        self.condition, self.step, self.seeing = condition, step, seeing
        self.present = condition.present
        # Traced code (torch.compile) must leave nothing behind in objects that outlive the call.
        traced = torch.compiler.is_compiling()
        changing = condition.windows is not None or traced
        self._attention_masks: dict[tuple[int, int, int], Tensor] = {} if changing else condition._attention_masks
        self._regions: dict[tuple[int, int, int], Tensor] = {} if traced else condition._regions
        self._phrase_weights: dict[int, Tensor] = {}
        self._seen: Tensor | None = None  # regions that the text's map shows in the layer that is at work
        if condition.windows is not None:
            start, end = condition.windows.unbind(-1)  # (B, S)
            way = 1.0 - self._timesteps().reshape(-1, 1) / condition.train_timesteps
            inside = (way >= start) & ((way < end) | (end >= 1.0))
            self.present = self.present & inside
        if condition._maps is not None:
            condition._maps.begin(self._timesteps().amax())

    def _timesteps(self) -> Tensor:
        """(1,) or (B,) timesteps of the samples that see subjects, float32, on their device."""
        timesteps = self.step.timestep
        return timesteps if timesteps.shape[0] == 1 else timesteps[self.seeing]

    def wants(self, layer: Layer) -> Collection[Hook]:
        """Adds to what cross-attention layers read; with auto layout it looks at their maps first."""
        if layer.kind == "self":
            return ()
        if layer.name not in self.condition.keys:
            raise RequestError(f"the condition has no keys for layer {layer.name!r}: it was made for another UNet")
        return ("result",) if self.condition.auto_layout is None else ("weights", "result")

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """Look where the text's words are seen."""
        layout = self.condition.auto_layout
        self._seen = self._text_regions(call, weights[self.seeing], layout) & self.present.unsqueeze(-1)
        return weights

    def result(self, call: AttentionCall, hidden: Tensor) -> Tensor:
        """Add what the patches read from the subjects."""
        seeing = self.seeing
        query = call.query[seeing]
        B, H, Q, _ = query.shape
        key, value = (
            split_heads(states.to(query.dtype), H).expand(B, -1, -1, -1) for states in self._states(call, query)
        )
        tokens = (key.shape[2] - NULL_TOKENS) // self.condition.boxes.shape[1]
        allowed = self._mask(Q, tokens) if self._seen is None else _attention_mask(self._seen, tokens)
        read = dot_product_attention(query, key, value, allowed, call.backend)
        if hidden.shape[0] == B:
            return hidden + read
        if hidden.requires_grad or read.requires_grad:
            return torch.cat([hidden[: seeing.start], hidden[seeing] + read, hidden[seeing.stop :]])
        hidden[seeing] += read
        return hidden

    def _states(self, call: AttentionCall, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, C) of a layer."""
        if self._stacks is not None:  # by number: the layers of a width share one code, which must hold no names
            keys, values = self._stacks[query.shape[1] * query.shape[3]]
            return keys.index_select(0, call.number).squeeze(0), values.index_select(0, call.number).squeeze(0)
        name = call.layer.name
        return self.condition.keys[name], self.condition.values[name]

    def _mask(self, patches: int, tokens: int) -> Tensor:
        if self._stacks is not None:  # nothing may be remembered, as above
            return _attention_mask(self._new_regions(patches) & self.present.unsqueeze(-1), tokens)
        level = (*self.step.grid, patches)
        if level not in self._attention_masks:
            regions = self._given_regions(patches) & self.present.unsqueeze(-1)
            self._attention_masks[level] = _attention_mask(regions, tokens)
        return self._attention_masks[level]

    def _given_regions(self, patches: int) -> Tensor:
        """(B, S, Q) of boxes or masks."""
        level = (*self.step.grid, patches)
        if level not in self._regions:
            self._regions[level] = self._new_regions(patches)
        return self._regions[level]

    def _new_regions(self, patches: int) -> Tensor:
        return self.condition.regions(*grid_of(patches, *self.step.grid))

    @torch.no_grad()
    def _text_regions(self, call: AttentionCall, probabilities: Tensor, layout: AutoLayout) -> Tensor:
        """Regions (B, S, Q) seen in the text's maps (B, H, Q, L) of all steps so far, where it is time for them."""
        maps = self.condition._maps
        # Mean over the tokens of each phrase, then over the heads; summed up in float32.
        seen = (probabilities @ self._weights(layout, probabilities)).float().mean(dim=1).transpose(1, 2)  # (B, S, Q)
        patches = seen.shape[2]
        mean = maps.add(call.layer.name, seen, grid_of(patches, *self.step.grid))
        chosen = maps.steps >= torch.as_tensor(layout.start_step, device=seen.device).unsqueeze(-1)
        if layout.subjects is not None:
            chosen = chosen & layout.subjects.to(seen.device).unsqueeze(-1)
        return torch.where(chosen, to_unit_range(mean) > layout.threshold, self._given_regions(patches))

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


def _attention_mask(regions: Tensor, tokens: int) -> Tensor:
    """Regions (B, S, Q) to the attention mask (B, 1, Q, N + NULL_TOKENS), bool.

    A softmax over nothing is NaN, so patches that no region covers attend to the zero tokens, and nobody else does.
    """
    background = ~regions.any(dim=1).unsqueeze(-1)
    allowed = regions.transpose(1, 2).repeat_interleave(tokens, dim=-1)
    return torch.cat([allowed, background.expand(-1, -1, NULL_TOKENS)], dim=-1).unsqueeze(1)
