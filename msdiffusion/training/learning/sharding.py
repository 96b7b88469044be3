"""An adapter, or a UNet, split over several processes, and gathered again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.resampler import ResamplerBlock
from msdiffusion.errors import RequestError


def shard_adapter(adapter: MSAdapter, mesh: DeviceMesh) -> None:
    """Split an adapter's parameters over a mesh, in place; one that is split already stays as it is.

    Each projection of a layer and each block of the resampler is gathered by itself. The adapter as a whole is no unit:
    what it returns is not a tensor, and a projection is needed for a moment only.

    Args:
        adapter: the same on all processes.
        mesh: of one dimension.
    """
    for layer in adapter.layers.values():
        _shard(layer.to_k, mesh)
        _shard(layer.to_v, mesh)
    for part in adapter.resampler.modules():
        if isinstance(part, ResamplerBlock):
            _shard(part, mesh)
    _shard(adapter.resampler, mesh)


def shard_unet(unet: UNet2DConditionModel, mesh: DeviceMesh) -> None:
    """Split a frozen UNet's parameters over a mesh, in place, by its transformer and residual blocks.

    Args:
        unet: the same on all processes, which from now on must call it equally often.
        mesh: of one dimension.
    """
    for part in unet.modules():
        if isinstance(part, (BasicTransformerBlock, ResnetBlock2D, Downsample2D, Upsample2D)):
            _shard(part, mesh)
    _shard(unet, mesh)


def _shard(part: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(part, FSDPModule):
        # said outright, because the outermost parts would stay whole after a forward pass without a backward pass
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Within it, the first process may use and save the trained adapter, and call the UNet, without the others.

    Where nothing is split it does nothing. Where the model is, every process must come here: the trained adapter is
    gathered and stands in its place on the first process until the end, and a split UNet is whole on all of them.

    Args:
        module: after ``setup`` of its strategy.
    """
    adapter = module.trained_adapter
    if not is_sharded(adapter):
        yield
        return
    whole = _gathered(adapter, keep=module.global_rank == 0)
    parent, child = _place_of(module, adapter)
    unet = module.backbone.unet
    blocks = [part for part in unet.modules() if isinstance(part, FSDPModule)]
    try:
        if whole is not None:
            parent._modules[child] = whole
        if blocks:
            unet.set_reshard_after_forward(False)
            for block in blocks:
                block.unshard()
        yield
    finally:
        parent._modules[child] = adapter
        if blocks:
            unet.set_reshard_after_forward(True)
            for block in blocks:
                block.reshard()


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter of a module is split over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@torch.no_grad()
def _gathered(adapter: MSAdapter, keep: bool) -> MSAdapter | None:
    """A whole copy of a split adapter, tensor by tensor; None, after helping, where it shall not be kept."""
    weights = {}
    for name, tensor in adapter.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            weights[name] = full
    if not keep:
        return None
    with torch.device("meta"):
        whole = MSAdapter(adapter.config, {name: layer.to_k.out_features for name, layer in adapter.layers.items()})
    whole.load_state_dict(weights, assign=True)
    return whole.eval()


def _place_of(module: nn.Module, part: nn.Module) -> tuple[nn.Module, str]:
    """(parent, name in it) of a submodule."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if child is part:
                return parent, name
    raise RequestError(f"{type(part).__name__} is no submodule of {type(module).__name__}")
