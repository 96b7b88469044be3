"""What may take part in the attention of a denoiser, and attention itself.

A control is an object that a caller hands to the denoiser for its calls; the denoiser keeps nothing of it. In each
layer it may change what is attended to (``sources``), read or change the attention map (``weights``), and change what
was read (``result``); besides, it may give other text states (``text``) and other latents (``latents``).

Shapes: R rows of the batch, L text tokens, Q queries, K keys, H heads, D head width, C = H * D layer width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from msdiffusion.attention.heads import merge_heads
from msdiffusion.attention.rows import Rows
from msdiffusion.attention.text_cache import TextCache
from msdiffusion.errors import RequestError

Backend = Literal["sdpa", "softmax"]
"""``sdpa``: torch's fused attention, best for inference and on a GPU. ``softmax``: two matrix products and a softmax,
whose backward is far cheaper on a CPU."""
Hook = Literal["sources", "weights", "result"]
HOOKS = get_args(Hook)
Kind = Literal["self", "cross", "joint"]


@dataclass(frozen=True)
class Layer:
    """An attention layer of a denoiser."""

    name: str
    """As in ``MSAdapter.layers``: ``mid_block/attentions/0/transformer_blocks/0/attn2``."""
    kind: Kind
    """joint: text and picture attend to both at once, as in Flux."""
    stage: str
    """The first part of its name: down_blocks, mid_block, up_blocks, transformer_blocks, single_transformer_blocks."""
    number: int
    """Its place among the layers of its kind and width, from 0."""
    width: int
    heads: int


class Step:
    """One call of the denoiser; the hook makes it."""

    def __init__(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        rows: Rows,
        grid: tuple[int, int],
        *,
        number: int | None = None,
        text_tokens: int = 0,
        layers: Sequence[Layer] = (),
        shared: bool = False,
    ) -> None:
        """Gather it.

        Args:
            sample: what the denoiser is given.
            timestep: of the call, in the denoiser's own units; a number, or a tensor of one or of R numbers.
            rows: what the rows of the batch are.
            grid: rows and columns of the latents (of a transformer's patches).
            number: of the calls with this text, from 0; a sampler of second order makes two per step. None in code that
                is compiled as a whole, which can't count.
            text_tokens: L.
            layers: of the denoiser.
            shared: whether blocks are compiled one by one, so that layers share code.
        """
        self.sample, self.rows, self.grid, self.number = sample, rows, grid, number
        self.text_tokens, self.layers, self.shared = text_tokens, layers, shared
        # A number would be part of compiled blocks; a tensor is converted only where somebody asks for it.
        number_given = not isinstance(timestep, Tensor)
        self._timestep = torch.full((1,), float(timestep), device=sample.device) if number_given else timestep

    @property
    def timestep(self) -> Tensor:
        """(1,) or (R,) float32 on the sample's device."""
        return self._timestep.to(self.sample.device, torch.float32).reshape(-1)


class ControlledProcessor:
    """What all our processors know of their layer."""

    layer: Layer | None
    """None: no control takes part here."""
    kind: Kind | None
    """Of the layer; code that layers share may know it, and nothing else of the layer."""
    number: Tensor
    """(1,) integer, by which such code finds what is the layer's own."""
    backend: Backend

    def belong_to(self, layer: Layer | None, backend: Backend) -> None:
        """Say where the processor works."""
        self.layer, self.kind, self.backend = layer, None if layer is None else layer.kind, backend
        self.number = torch.tensor([0 if layer is None else layer.number])


class AttentionCall:
    """One call of one layer. Its tensors must not be changed in place: some serve other steps too."""

    def __init__(
        self,
        processor: ControlledProcessor,
        step: Step | None,
        query: Tensor,
        key: Tensor | Callable[[], Tensor],
        value: Tensor | Callable[[], Tensor],
        mask: Tensor | None,
        text: slice,
        image: slice,
    ) -> None:
        """Gather it.

        Args:
            processor: of the layer: its ``layer`` is asked for when it is needed only. Code that is compiled once for
                many layers must not see their names.
            step: the call of the denoiser.
            query: (R, H, Q, D), after norms and rotary embedding.
            key: (R, H, K, D), likewise; or a function that makes it when it is asked for.
            value: (R, H, K, D), or a function.
            mask: bool (True: may attend) or additive, broadcastable to (R, H, Q, K).
            text: which keys are of the text; in joint layers which queries, too.
            image: which are of the picture.
        """
        self._processor, self.step, self.query, self._key, self._value = processor, step, query, key, value
        self.mask, self.text, self.image = mask, text, image

    @property
    def layer(self) -> Layer:
        """Where it happens."""
        return self._processor.layer

    @property
    def number(self) -> Tensor:
        """(1,) integer: ``layer.number`` for code that many layers share."""
        return self._processor.number

    @property
    def backend(self) -> Backend:
        """How to attend."""
        return self._processor.backend

    @property
    def key(self) -> Tensor:
        """(R, H, K, D)."""
        return self._key if isinstance(self._key, Tensor) else self._key()

    @property
    def value(self) -> Tensor:
        """(R, H, K, D)."""
        return self._value if isinstance(self._value, Tensor) else self._value()

    def replaced(
        self,
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | Literal["as it is"] | None = "as it is",
    ) -> AttentionCall:
        """A copy with other sources; ``mask=None`` takes the mask away."""
        changed = copy.copy(self)
        changed.query = self.query if query is None else query
        changed._key, changed._value = (self._key if key is None else key), (self._value if value is None else value)
        changed.mask = self.mask if isinstance(mask, str) else mask
        return changed


class Control:
    """Takes part in the attention of a denoiser. Nothing happens in a hook that is not overridden.

    Several controls follow one another in the order given: each sees what the ones before it have made.
    """

    def rows(self, samples: int) -> Rows | None:
        """What the rows of a batch of so many samples are, if this control knows."""
        return None

    def at(self, step: Step) -> Control | None:
        """The control for one call of the denoiser: for what all its layers share. None: it takes no part."""
        return self

    def wants(self, layer: Layer) -> Collection[Hook]:
        """Which hooks it has in a layer."""
        return ()

    def text(self, step: Step, states: Tensor) -> Tensor:
        """Other text states than (R, L, width). Return the same object at each step where they are the same."""
        return states

    def sources(self, call: AttentionCall) -> AttentionCall:
        """Other queries, keys, values or mask: ``call.replaced(...)``."""
        return call

    def weights(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """Another map than (R, H, Q, K), whose rows sum to one; the same object after a mere look at it.

        Not in place: in compiled code and under ``inference_mode`` nobody would see it.
        """
        return weights

    def result(self, call: AttentionCall, hidden: Tensor) -> Tensor:
        """Other results than (R, Q, C), before the output projection; ``hidden`` may be changed in place."""
        return hidden

    def latents(self, step: Step, latents: Tensor) -> Tensor:
        """Other latents after a step of the sampler; ``step.rows`` are the pictures, ``step.number`` counts steps."""
        return latents


class Participants:
    """The controls of one call of the denoiser, as its layers get them."""

    def __init__(self, step: Step, controls: Sequence[Control], text_cache: TextCache | None = None) -> None:
        """``controls`` are those of this call; ``text_cache`` keeps keys and values of the text, see TextCache.

        Raises:
            RequestError: layers share code, which must not depend on their names, and a control wants not all of a
                kind; or it wants a hook that there is not.
        """
        self.step, self.controls, self.text_cache = step, controls, text_cache
        self._by_kind: dict[str, list[tuple[Control, Collection[Hook]]]] | None = None
        if step.shared:
            self._by_kind = {}
            for layer in step.layers:
                wanted = self._of(layer)
                if self._by_kind.setdefault(layer.kind, wanted) != wanted:
                    raise RequestError(
                        f"a control takes part in some {layer.kind}-attention layers only, which does not go together "
                        "with compile_repeated_blocks(): compile the whole denoiser, or let it take part in all"
                    )

    def of(self, processor: ControlledProcessor) -> list[tuple[Control, Collection[Hook]]]:
        """Controls and their hooks in the layer of a processor."""
        if not self.controls:
            return []
        return self._of(processor.layer) if self._by_kind is None else self._by_kind[processor.kind]

    def _of(self, layer: Layer) -> list[tuple[Control, Collection[Hook]]]:
        wanted = [(control, control.wants(layer)) for control in self.controls]
        for control, hooks in wanted:
            for hook in hooks:
                if hook not in HOOKS:
                    raise RequestError(f"{type(control).__name__} wants {hook!r}: hooks are {', '.join(HOOKS)}")
        return [(control, hooks) for control, hooks in wanted if hooks]


def attend(call: AttentionCall, controls: Sequence[tuple[Control, Collection[Hook]]]) -> Tensor:
    """Attention with controls, heads merged: (R, Q, C).

    A control that only looks at the map changes nothing, bit for bit: what is read from a map that nobody changed is
    read as it would be without controls.
    """
    for control, hooks in controls:
        if "sources" in hooks:
            call = control.sources(call)
    weights = None
    if any("weights" in hooks for _, hooks in controls):
        own = attention_probabilities(call.query, call.key, call.mask)
        weights = read_weights(call, own, controls)
        if weights is None and call.backend == "softmax":
            weights = own
    if weights is None:
        hidden = dot_product_attention(call.query, call.key, call.value, call.mask, call.backend)
    else:
        hidden = merge_heads(weights @ call.value).to(call.query.dtype)
    return change_result(call, hidden, controls)


def read_weights(
    call: AttentionCall, own: Tensor, controls: Sequence[tuple[Control, Collection[Hook]]]
) -> Tensor | None:
    """The map after all controls that want it; None where nobody has changed it."""
    counted = not torch.compiler.is_compiling() and not own.is_inference()
    version = own._version if counted else 0
    weights = own
    for control, hooks in controls:
        if "weights" in hooks:
            weights = control.weights(call, weights)
    return None if weights is own and not (counted and own._version != version) else weights


def change_result(call: AttentionCall, hidden: Tensor, controls: Sequence[tuple[Control, Collection[Hook]]]) -> Tensor:
    """The result after all controls that want it."""
    for control, hooks in controls:
        if "result" in hooks:
            hidden = control.result(call, hidden)
    return hidden


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: Backend) -> Tensor:
    """Attention of (R, H, Q, D) on (R, H, K, D), heads merged: (R, Q, C).

    ``mask`` is bool (True: may attend) or additive, broadcastable to (R, H, Q, K), or None.
    """
    if backend == "sdpa":
        hidden = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:
        hidden = attention_probabilities(query, key, mask) @ value
    return merge_heads(hidden).to(query.dtype)


def attention_probabilities(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of the scaled scores, (R, H, Q, K); ``mask`` as for ``dot_product_attention``."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)
