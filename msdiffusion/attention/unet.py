"""Cross-attention with subjects: one text path, left as diffusers has it, and controls that add to its result.

A processor holds no state and no weights. What one call needs travels in ``cross_attention_kwargs={"subjects":
condition}``; without it the processors compute exactly what diffusers' own do. So nothing can leak from one call into
the next, and the text path stays open to LoRA, ControlNet and prompts of any length. A processor that somebody else has
put in place (IP-Adapter, attention slicing, fused projections) goes on working inside ours.

Source: section "multi-subject cross-attention" of the paper (arXiv 2406.07209) and
``msdiffusion/models/attention_processor.py`` of the official code; golden tests hold this file to that code.

Shapes: B batch, L text tokens, N attended tokens, Q patches, H heads, D head width, C = H * D layer width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from torch import Tensor, nn
from torch.nn import functional

from msdiffusion.errors import RequestError

Backend = Literal["sdpa", "softmax"]
"""``sdpa``: torch's fused attention, best for inference and on a GPU. ``softmax``: two matrix products and a softmax,
whose backward is far cheaper on a CPU."""


class AttentionCall:
    """What a control may look at: one call of one cross-attention layer."""

    def __init__(
        self,
        processor: MultiSubjectAttnProcessor | MultiSubjectIPAdapterAttnProcessor,
        query: Tensor,
        text_key: Tensor | Callable[[], Tensor],
        text_mask: Tensor | None,
    ) -> None:
        """Gather it.

        Args:
            processor: of the layer.
            query: (B, H, Q, D).
            text_key: (B, H, L, D), or a function that makes it when it is asked for.
            text_mask: additive mask of the text, broadcastable to (B, H, Q, L).
        """
        self.query, self.text_mask, self._processor, self._text_key = query, text_mask, processor, text_key

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
    def owned(self) -> bool:
        """Whether what was read so far is the processor's own fresh tensor, which a control may change in place."""
        return isinstance(self._processor, MultiSubjectAttnProcessor) and self._processor.base is None

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
            return _text_states(attn, text)
        weights = (attn.to_k.weight, attn.to_v.weight)
        if any(weight.is_inference() for weight in weights):
            return _text_states(attn, text)
        weighed = (*weights, *(weight._version for weight in weights))
        if layer not in self._states or not _same_things(weighed, self._states[layer][0]):
            self._states[layer] = (weighed, *_text_states(attn, text))
        return self._states[layer][1:]


def _same_things(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Whether objects are the same and numbers equal (tensors must not be compared by value)."""
    return len(ours) == len(theirs) and all(
        a is b or (isinstance(a, int) and isinstance(b, int) and a == b) for a, b in zip(ours, theirs, strict=True)
    )


def _text_states(attn: Attention, text: Tensor) -> tuple[Tensor, Tensor]:
    return split_heads(attn.to_k(text), attn.heads), split_heads(attn.to_v(text), attn.heads)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, H, N, D)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


class MultiSubjectAttnProcessor:
    """Processor of a cross-attention layer: the text, then the subjects and any other controls."""

    def __init__(
        self, layer: str = "", backend: Backend = "sdpa", base: Any = None, number: Tensor | None = None
    ) -> None:
        """Name the layer.

        Args:
            layer: as in ``MSAdapter.layers``. Empty when diffusers makes one of its own accord, as it does while it
                unloads an IP-Adapter: then it must be installed anew before it can show subjects.
            backend: how to attend.
            base: the processor that reads the text; None: this one does, as diffusers' AttnProcessor2_0 would.
            number: (1,) integer, the layer's number among those of its width. Blocks that are compiled once for all
                layers find their keys by it: a name would be part of the code.
        """
        self.layer, self.backend, self.base, self.number = layer, backend, base, number

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Any] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        subjects: AttentionControl | None = None,
        controls: Sequence[AttentionControl] = (),
        text_cache: TextCache | None = None,
    ) -> Tensor:
        """Attend from (B, Q, C) to the text (B, L, width), then let ``subjects`` and ``controls`` add to it."""
        if self.base is not None:
            return _through_base(
                self.base, self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, subjects, controls
            )
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, text.shape[1], text.shape[0])
            attention_mask = attention_mask.unflatten(0, (text.shape[0], attn.heads))
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        # Compiled code must not look at what the cache holds by now, or it would be compiled for every state of it.
        cached = text_cache is not None and not torch.compiler.is_compiling()
        key, value = text_cache.states(self.layer, attn, text) if cached else _text_states(attn, text)
        hidden = dot_product_attention(query, key, value, attention_mask, self.backend)
        if subjects is not None or controls:
            call = AttentionCall(self, query, key, attention_mask)
            hidden = _apply_controls(hidden, call, subjects, controls)
        return attn.to_out[1](attn.to_out[0](hidden))


class MultiSubjectIPAdapterAttnProcessor(IPAdapterAttnProcessor2_0):
    """The same where an IP-Adapter is loaded: text, then the IP-Adapter, then the subjects.

    It is an IPAdapterAttnProcessor2_0, sharing the weights and the scale of the one that it replaces, so that
    ``set_ip_adapter_scale`` and ``unload_ip_adapter`` of the pipeline go on working.
    """

    def __init__(
        self, base: IPAdapterAttnProcessor2_0, layer: str, backend: Backend = "sdpa", number: Tensor | None = None
    ) -> None:
        """Take the place of ``base``; the rest as for MultiSubjectAttnProcessor."""
        torch.nn.Module.__init__(self)  # the parent's own would draw random weights first
        for name in ("hidden_size", "cross_attention_dim", "num_tokens", "scale", "to_k_ip", "to_v_ip"):
            setattr(self, name, getattr(base, name))
        self.layer, self.backend, self.number = layer, backend, number

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Any] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
        subjects: AttentionControl | None = None,
        controls: Sequence[AttentionControl] = (),
        text_cache: TextCache | None = None,
    ) -> Tensor:
        """Attend from (B, Q, C) to the text and the IP-Adapter's tokens, then let the controls add to it."""
        return _through_base(
            super().__call__, self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, subjects,
            controls, scale=scale, ip_adapter_masks=ip_adapter_masks,
        )  # fmt: skip


def _through_base(
    base: Callable[..., Tensor],
    processor: MultiSubjectAttnProcessor | MultiSubjectIPAdapterAttnProcessor,
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | tuple[Tensor, Any] | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    subjects: AttentionControl | None,
    controls: Sequence[AttentionControl],
    **options: Any,
) -> Tensor:
    """What another processor reads, with the controls' part added before the layer's output projection."""
    if temb is not None:  # not every processor knows it
        options["temb"] = temb
    if subjects is None and not controls:
        return base(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
    inner = _WithoutOutput(attn)
    hidden = base(inner, hidden_states, encoder_hidden_states, attention_mask, **options)
    text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
    text = hidden_states if text is None else text
    call = AttentionCall(
        processor,
        split_heads(inner.to_q(hidden_states), attn.heads),
        lambda: split_heads(attn.to_k(text), attn.heads),
        None,
    )
    return attn.to_out[1](attn.to_out[0](_apply_controls(hidden, call, subjects, controls)))


class _WithoutOutput:
    """An attention layer whose output projection does nothing, and whose query is computed once."""

    def __init__(self, attn: Attention) -> None:
        self._attn = attn
        self._query: Tensor | None = None
        self.to_out = (_same, _same)
        self.residual_connection, self.rescale_output_factor = False, 1.0

    def to_q(self, hidden_states: Tensor) -> Tensor:
        if self._query is None:
            self._query = self._attn.to_q(hidden_states)
        return self._query

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _apply_controls(
    hidden: Tensor, call: AttentionCall, subjects: AttentionControl | None, controls: Sequence[AttentionControl]
) -> Tensor:
    for control in (subjects, *controls):
        if control is not None:
            hidden = control(hidden, call)
    return hidden


class TransparentAttnProcessor:
    """Processor of every other layer: takes the subjects' keywords, which diffusers hands to all layers, ignores them.

    Without it diffusers would warn once per self-attention layer and step.
    """

    def __init__(self, base: Any = None) -> None:
        """``base`` is the processor that was there before; None: diffusers' default."""
        self.base = AttnProcessor2_0() if base is None else base

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        subjects: AttentionControl | None = None,
        controls: Sequence[AttentionControl] = (),
        text_cache: TextCache | None = None,
    ) -> Tensor:
        """Whatever the processor that was there before computes."""
        options = {} if temb is None else {"temb": temb}  # not every processor knows it
        return self.base(attn, hidden_states, encoder_hidden_states, attention_mask, **options)


def remove_pag(unet: Any) -> None:
    """Put ours in place of the processors that a run with PAG put into self-attention."""
    present = unet.attn_processors
    left = [name for name, processor in present.items() if isinstance(processor, PAG_PROCESSORS)]
    if left:
        unet.set_attn_processor({**present, **{name: TransparentAttnProcessor() for name in left}})


PAG_PROCESSORS = (PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0)
OUR_PROCESSORS = (MultiSubjectAttnProcessor, MultiSubjectIPAdapterAttnProcessor)


class SubjectBinder:
    """Forward pre-hook of a UNet: tells a condition the size of the latents and the timestep of this call.

    Everything that depends on them is worked out once per call of the UNet instead of once per layer.
    """

    def __init__(self, layers: Sequence[Attention], blocks: Sequence[nn.Module] = ()) -> None:
        """Take the cross-attention layers and the blocks that they are in."""
        self.layers, self.blocks = list(layers), list(blocks)

    def in_place(self) -> bool:
        """Whether every layer's processor still shows subjects."""
        return all(isinstance(layer.processor, OUR_PROCESSORS) and layer.processor.layer for layer in self.layers)

    def __call__(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Replace the condition by its form for this call.

        Raises:
            RequestError: the processors were replaced after the adapter was installed, or the condition has another
                name than "subjects": it would be ignored.
        """
        given = kwargs.get("cross_attention_kwargs")
        subjects = given.get("subjects") if given else None
        for name, value in (given or {}).items():
            if name != "subjects" and hasattr(value, "bind") and hasattr(value, "text_cache"):
                raise RequestError(f'cross_attention_kwargs has a condition as {name!r}: its name must be "subjects"')
        if not hasattr(subjects, "bind"):
            return None
        if not self.in_place():
            raise RequestError(
                "attention processors of the UNet were replaced after the adapter was installed (load_ip_adapter, "
                "attention slicing, ...), so the subjects would be ignored: call model.install(), or make the "
                "condition after the change"
            )
        sample, timestep, text = (
            args[index] if len(args) > index else kwargs[name]
            for index, name in enumerate(("sample", "timestep", "encoder_hidden_states"))
        )
        shared = any(block._compiled_call_impl is not None for block in self.blocks)
        if shared:
            for layer in self.layers:
                layer.processor.number = layer.processor.number.to(sample.device)
        try:
            bound, cache = subjects.bind(sample, timestep, shared), subjects.text_cache.begin(text, unet)
        except RequestError:
            remove_pag(unet)  # its pipeline takes its processors away at the end of a run, which there won't be
            raise
        if bound is not None and cache is not None and cache.is_new:  # once per run
            subjects.check_halves(sample)
        return args, {**kwargs, "cross_attention_kwargs": {**given, "subjects": bound, "text_cache": cache}}
