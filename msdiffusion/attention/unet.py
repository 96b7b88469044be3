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
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from torch import Tensor, nn

from msdiffusion.attention.control import AttentionCall, AttentionControl, Backend, dot_product_attention, split_heads
from msdiffusion.attention.text_cache import TextCache, text_states
from msdiffusion.errors import WeightsError


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
        key, value = text_cache.states(self.layer, attn, text) if cached else text_states(attn, text)
        hidden = dot_product_attention(query, key, value, attention_mask, self.backend)
        if subjects is not None or controls:
            call = AttentionCall(self, query, key, attention_mask, owned=True)
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


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """The UNet's cross-attention layers by name, in the order of ``unet.attn_processors``: down, up, mid.

    Raises:
        WeightsError: there are none, or they have parts that the processors do not know.
    """
    found = {}
    for name in unet.attn_processors:
        path = name.removesuffix(".processor")
        if not path.endswith("attn2"):
            continue
        module = unet.get_submodule(path)
        if any(
            getattr(module, part, None) is not None for part in ("group_norm", "spatial_norm", "norm_q", "add_k_proj")
        ):
            raise WeightsError(f"{path} is not a plain cross-attention layer: this kind of UNet is not supported")
        found[layer_name(name)] = module
    if not found:
        raise WeightsError("the UNet has no cross-attention layers (attn2), so there is nothing to adapt")
    return found


def layer_name(processor_name: str) -> str:
    """What a layer is called in an adapter, by the name of its processor."""
    return processor_name.removesuffix(".processor").replace(".", "/")  # a module's name may not hold a dot
