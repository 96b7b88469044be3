"""How a condition reaches the layers of a UNet: what is installed in it, and the hook that binds each call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
)
from torch import nn

from msdiffusion.attention.control import Backend
from msdiffusion.attention.unet import (
    OUR_PROCESSORS,
    MultiSubjectAttnProcessor,
    MultiSubjectIPAdapterAttnProcessor,
    TransparentAttnProcessor,
    cross_attentions,
    layer_name,
    remove_pag,
)
from msdiffusion.errors import RequestError


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


def install(unet: UNet2DConditionModel, widths: Mapping[str, int], backend: Backend = "sdpa") -> None:
    """Give a UNet the processors that read a condition. Without one they change nothing.

    Processors that somebody else has put in place (IP-Adapter, attention slicing, ...) go on working inside ours.
    Doing it again changes nothing, and puts back what has been replaced since.

    Args:
        unet: the UNet.
        widths: of its cross-attention layers that show subjects, by name.
        backend: "sdpa", or "softmax", whose backward is cheaper on a CPU (then for all attention of the UNet).

    Raises:
        RequestError: unknown backend.
    """
    if backend not in ("sdpa", "softmax"):
        raise RequestError(f'backend must be "sdpa" or "softmax", got {backend!r}')
    unet = getattr(unet, "_orig_mod", unet)  # torch.compile(unet) wraps it; hooks belong on the inner one
    numbers, counts = {}, Counter[int]()
    for layer, width in widths.items():
        numbers[layer] = torch.tensor([counts[width]])
        counts[width] += 1
    processors: dict[str, Any] = {}
    for name, present in unet.attn_processors.items():
        layer = layer_name(name)
        if isinstance(present, IPAdapterAttnProcessor2_0):
            processors[name] = MultiSubjectIPAdapterAttnProcessor(present, layer, backend, numbers[layer])
            continue
        ours = isinstance(present, (MultiSubjectAttnProcessor, TransparentAttnProcessor))
        base = present.base if ours else present
        plain = base is None or isinstance(base, (AttnProcessor, AttnProcessor2_0))
        if layer in widths:
            processors[name] = MultiSubjectAttnProcessor(layer, backend, None if plain else base, numbers[layer])
        else:
            own = AttnProcessor2_0() if backend == "sdpa" else AttnProcessor()
            processors[name] = TransparentAttnProcessor(own if plain else base)
    unet.set_attn_processor(processors)
    for handle, hook in list(unet._forward_pre_hooks.items()):
        if isinstance(hook, SubjectBinder):
            del unet._forward_pre_hooks[handle]
            unet._forward_pre_hooks_with_kwargs.pop(handle, None)
    attentions = cross_attentions(unet)
    blocks = [unet.get_submodule(name.replace("/", ".").rpartition(".")[0]) for name in attentions]
    unet.register_forward_pre_hook(SubjectBinder(list(attentions.values()), blocks), with_kwargs=True)


def is_installed(unet: UNet2DConditionModel) -> bool:
    """Whether every cross-attention layer of the UNet shows subjects."""
    unet = getattr(unet, "_orig_mod", unet)
    return any(isinstance(hook, SubjectBinder) and hook.in_place() for hook in unet._forward_pre_hooks.values())
