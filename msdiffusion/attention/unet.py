"""Attention of a UNet with controls: what is read stays as diffusers has it, and controls take part.

A processor holds no state and no weights. What one call needs travels in ``cross_attention_kwargs``; without controls
the processors compute exactly what diffusers' own do. So nothing can leak from one call into the next, and the text
path stays open to LoRA, ControlNet and prompts of any length. A processor that somebody else has put in place
(IP-Adapter, attention slicing, fused projections) goes on working inside ours: controls may look at its map and change
its result, but neither sources nor weights.

Source: section "multi-subject cross-attention" of the paper (arXiv 2406.07209) and
``msdiffusion/models/attention_processor.py`` of the official code; golden tests hold this file to that code.

Shapes: R rows of the batch, L text tokens, Q patches, H heads, D head width, C = H * D layer width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from torch import Tensor, nn

from msdiffusion.attention.control import (
    AttentionCall,
    Backend,
    ControlledProcessor,
    Layer,
    Participants,
    attend,
    attention_probabilities,
    change_result,
    read_weights,
)
from msdiffusion.attention.heads import split_heads
from msdiffusion.attention.text_cache import text_states
from msdiffusion.errors import RequestError, WeightsError

NOTHING = slice(0, 0)


class ControlledAttnProcessor(ControlledProcessor):
    """Processor of a layer in which controls take part."""

    def __init__(self, layer: Layer | None = None, backend: Backend = "sdpa", base: Any = None) -> None:
        """Name the layer.

        Args:
            layer: None where no control can take part, and when diffusers makes one of its own accord, as it does while
                it loads or unloads an IP-Adapter: then it must be installed anew.
            backend: how to attend.
            base: somebody else's processor, which reads in place of ours; None: as diffusers' default would.
        """
        self.belong_to(layer, backend)
        self.base = base
        self._plain = AttnProcessor2_0() if backend == "sdpa" else AttnProcessor()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Any] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        participants: Participants | None = None,
        subjects: None = None,
        controls: None = None,
    ) -> Tensor:
        """Attend from (R, Q, C) to the text (R, L, width), or to itself, with whoever takes part."""
        refuse_unbound(subjects, controls)
        if self.base is not None or self.kind is None:
            base = self._plain if self.base is None else self.base
            return _through_base(
                base, self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, participants
            )
        wanted = [] if participants is None else participants.of(self)
        if not wanted and self.kind == "self":
            return self._plain(attn, hidden_states, encoder_hidden_states, attention_mask)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        attention_mask = _mask_of_text(attn, attention_mask, text)
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        cache = None if participants is None or self.kind == "self" else participants.text_cache
        # Compiled code must not look at what the cache holds by now, or it would be compiled for every state of it.
        cached = cache is not None and not torch.compiler.is_compiling()
        key, value = cache.states(self.layer.name, attn, text) if cached else text_states(attn, text)
        step = None if participants is None else participants.step
        call = AttentionCall(self, step, query, key, value, attention_mask, *_parts(self.kind))
        return attn.to_out[1](attn.to_out[0](attend(call, wanted)))


class ControlledIPAdapterAttnProcessor(ControlledProcessor, IPAdapterAttnProcessor2_0):
    """The same where an IP-Adapter is loaded: text, then the IP-Adapter, then the controls.

    It is an IPAdapterAttnProcessor2_0, sharing the weights and the scale of the one that it replaces, so that
    ``set_ip_adapter_scale`` and ``unload_ip_adapter`` of the pipeline go on working.
    """

    def __init__(self, base: IPAdapterAttnProcessor2_0, layer: Layer, backend: Backend = "sdpa") -> None:
        """Take the place of ``base``; the rest as for ControlledAttnProcessor."""
        torch.nn.Module.__init__(self)  # the parent's own would draw random weights first
        for name in ("hidden_size", "cross_attention_dim", "num_tokens", "scale", "to_k_ip", "to_v_ip"):
            setattr(self, name, getattr(base, name))
        self.belong_to(layer, backend)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Any] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
        participants: Participants | None = None,
        subjects: None = None,
        controls: None = None,
    ) -> Tensor:
        """Attend from (R, Q, C) to the text and the IP-Adapter's tokens, with whoever takes part."""
        refuse_unbound(subjects, controls)
        return _through_base(
            super().__call__, self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, participants,
            scale=scale, ip_adapter_masks=ip_adapter_masks,
        )  # fmt: skip


def refuse_unbound(subjects: Any, controls: Any) -> None:
    """Raise RequestError for a condition that reached a layer as its user gave it: it would be ignored."""
    if subjects is not None or controls:
        raise RequestError("call the denoiser itself, not its forward(): hooks bind the condition to each call")


def _mask_of_text(attn: Attention, mask: Tensor | None, text: Tensor) -> Tensor | None:
    """What diffusers hands to a layer, broadcastable to (R, H, Q, L)."""
    if mask is None:
        return None
    return attn.prepare_attention_mask(mask, text.shape[1], text.shape[0]).unflatten(0, (text.shape[0], attn.heads))


def _parts(kind: str | None) -> tuple[slice, slice]:
    """Which keys of a layer are of the text, and which of the picture."""
    everything = slice(None)
    return (NOTHING, everything) if kind == "self" else (everything, NOTHING)


def _through_base(
    base: Callable[..., Tensor],
    processor: ControlledProcessor,
    attn: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | tuple[Tensor, Any] | None,
    attention_mask: Tensor | None,
    temb: Tensor | None,
    participants: Participants | None,
    **options: Any,
) -> Tensor:
    """What another processor reads, with the controls' part before the layer's output projection."""
    if temb is not None:  # not every processor knows it
        options["temb"] = temb
    wanted = [] if participants is None or processor.kind is None else participants.of(processor)
    if not wanted:
        return base(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
    inner = _WithoutOutput(attn)
    hidden = base(inner, hidden_states, encoder_hidden_states, attention_mask, **options).clone()
    text = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
    text = hidden_states if text is None else text
    call = AttentionCall(
        processor,
        participants.step,
        split_heads(inner.to_q(hidden_states), attn.heads),
        lambda: split_heads(attn.to_k(text), attn.heads),
        lambda: split_heads(attn.to_v(text), attn.heads),
        _mask_of_text(attn, attention_mask, text),
        *_parts(processor.kind),
    )
    hooks = {hook for _, wanted_hooks in wanted for hook in wanted_hooks}
    own = attention_probabilities(call.query, call.key, call.mask) if "weights" in hooks else None
    if "sources" in hooks or (own is not None and read_weights(call, own, wanted) is not None):
        raise RequestError(
            f"a control wants to change what {processor.layer.name} attends to, but {type(base).__name__} of another "
            "library attends there: take that away (unload_ip_adapter, disable_attention_slicing, ...), or the control"
        )
    return attn.to_out[1](attn.to_out[0](change_result(call, hidden, wanted)))


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


def unet_processors(unet: UNet2DConditionModel, backend: Backend) -> tuple[dict[str, Any], list[Layer]]:
    """Processors by name that let controls take part, around whatever is there, and the layers where they can."""
    layers = unet_layers(unet)
    processors: dict[str, Any] = {}
    for name, present in unet.attn_processors.items():
        layer = layers.get(name)
        if isinstance(present, IPAdapterAttnProcessor2_0):
            processors[name] = ControlledIPAdapterAttnProcessor(present, layer, backend)
            continue
        base = present.base if isinstance(present, ControlledAttnProcessor) else present
        plain = base is None or type(base) in (AttnProcessor, AttnProcessor2_0)
        processors[name] = ControlledAttnProcessor(layer, backend, None if plain else base)
    return processors, list(layers.values())


def unet_layers(unet: UNet2DConditionModel) -> dict[str, Layer]:
    """The layers in which controls can take part, by the names of their processors, in the order of these.

    Raises:
        WeightsError: see ``cross_attentions``.
    """
    cross, numbers, layers = cross_attentions(unet), Counter[tuple[str, int]](), {}
    for processor in unet.attn_processors:
        name = layer_name(processor)
        module = cross.get(name) or unet.get_submodule(processor.removesuffix(".processor"))
        kind: Literal["self", "cross"] = "cross" if name in cross else "self"
        if kind == "self" and (not name.endswith("attn1") or module.is_cross_attention or _has_other_parts(module)):
            continue
        width = module.inner_dim
        layers[processor] = Layer(name, kind, name.partition("/")[0], numbers[kind, width], width, module.heads)
        numbers[kind, width] += 1
    return layers


def remove_pag(unet: Any) -> None:
    """Put ours in place of the processors that a run with PAG put into self-attention."""
    present = unet.attn_processors
    left = [name for name, processor in present.items() if isinstance(processor, PAG_PROCESSORS)]
    if left:
        layers = unet_layers(unet)
        backend = next((each.backend for each in present.values() if isinstance(each, ControlledProcessor)), "sdpa")
        ours = {name: ControlledAttnProcessor(layers.get(name), backend) for name in left}
        unet.set_attn_processor({**present, **ours})


PAG_PROCESSORS = (PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0)


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
        if _has_other_parts(module):
            raise WeightsError(f"{path} is not a plain cross-attention layer: this kind of UNet is not supported")
        found[layer_name(name)] = module
    if not found:
        raise WeightsError("the UNet has no cross-attention layers (attn2), so there is nothing to adapt")
    return found


def _has_other_parts(module: nn.Module) -> bool:
    parts = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "add_k_proj")
    return any(getattr(module, part, None) is not None for part in parts)


def layer_name(processor_name: str) -> str:
    """What a layer is called in an adapter, by the name of its processor."""
    return processor_name.removesuffix(".processor").replace(".", "/")  # a module's name may not hold a dot
