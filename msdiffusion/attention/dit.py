"""Joint attention of a Flux transformer with controls: text and picture attend to both at once.

Without a control that wants a layer, diffusers' own processor reads there. Source: diffusers' FluxAttnProcessor.

Shapes: R rows of the batch, L text tokens, N all tokens (the text's first), H heads, D head width, C = H * D.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from msdiffusion.attention.control import AttentionCall, Backend, ControlledProcessor, Layer, Participants, attend
from msdiffusion.attention.unet import layer_name, refuse_unbound
from msdiffusion.errors import RequestError


class ControlledFluxAttnProcessor(ControlledProcessor):
    """Processor of a joint layer, of two streams or one, in which controls take part."""

    def __init__(self, layer: Layer | None = None, backend: Backend = "sdpa", base: Any = None) -> None:
        """``base``: what was there before, which reads where no control takes part; None: diffusers' default."""
        self.belong_to(layer, backend)
        self.base = FluxAttnProcessor() if base is None else base

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        participants: Participants | None = None,
        subjects: None = None,
        controls: None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from picture and text to both.

        Layers of two streams get and give (R, N - L, C) and (R, L, C); those of one get and give (R, N, C).
        """
        refuse_unbound(subjects, controls)
        wanted = [] if participants is None or self.kind is None else participants.of(self)
        if not wanted:
            return self.base(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if type(self.base) is not FluxAttnProcessor:
            raise RequestError(
                f"a control takes part in {self.layer.name}, but {type(self.base).__name__} of another library "
                "attends there: take that away, or the control"
            )
        states = _states(attn, hidden_states)
        if encoder_hidden_states is not None:
            text = _states(attn, encoder_hidden_states, added=True)
            states = [torch.cat(parts, dim=1) for parts in zip(text, states, strict=True)]
        query, key, value = states
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in (query, key))
        L = participants.step.text_tokens
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        rows, columns = participants.step.grid  # other pictures may follow (Kontext)
        image = slice(L, L + rows * columns)
        call = AttentionCall(self, participants.step, query, key, value, attention_mask, slice(0, L), image)
        hidden = attend(call, wanted)
        if encoder_hidden_states is None:
            return hidden
        return attn.to_out[1](attn.to_out[0](hidden[:, L:].contiguous())), attn.to_add_out(hidden[:, :L].contiguous())


def _states(attn: FluxAttention, tokens: Tensor, added: bool = False) -> list[Tensor]:
    """Query, key and value of a stream, (R, N, H, D) each, after the norms."""
    if attn.fused_projections:
        states = (attn.to_added_qkv if added else attn.to_qkv)(tokens).chunk(3, dim=-1)
    elif added:
        states = (attn.add_q_proj(tokens), attn.add_k_proj(tokens), attn.add_v_proj(tokens))
    else:
        states = (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in states)
    query_norm, key_norm = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    return [query_norm(query), key_norm(key), value]


def flux_processors(transformer: FluxTransformer2DModel, backend: Backend) -> tuple[dict[str, Any], list[Layer]]:
    """Processors by name that let controls take part, around whatever is there, and the layers."""
    processors: dict[str, Any] = {}
    layers = []
    for name, present in transformer.attn_processors.items():
        attn = transformer.get_submodule(name.removesuffix(".processor"))
        path = layer_name(name)
        layers.append(Layer(path, "joint", path.partition("/")[0], len(layers), attn.inner_dim, attn.heads))
        base = present.base if isinstance(present, ControlledFluxAttnProcessor) else present
        # One with weights (IP-Adapter) stays where it is, and its weights with it: no control takes part there.
        own = isinstance(base, nn.Module)
        processors[name] = base if own else ControlledFluxAttnProcessor(layers[-1], backend, base)
    return processors, layers
