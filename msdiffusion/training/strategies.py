"""Several GPUs that share one adapter: weights, gradients and optimizer states are split between them (FSDP2).

Each GPU of ordinary data parallel training (``--trainer.strategy ddp``) holds the adapter with its gradients and
optimizer states. Here each holds its part alone, and what a layer needs is gathered while it computes (ZeRO stage 3,
Rajbhandari et al. 2020; PyTorch's ``fully_shard``). docs/distributed_training.md says when that is worth while.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from data_pipeline.models.weights import load_pickle
from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.adapter.resampler import ResamplerBlock
from msdiffusion.errors import RequestError, refused_weights
from msdiffusion.training.run.run_folder import check_checkpoint

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from msdiffusion.training.module import MSDiffusionModule


class ShardedAdapter(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all processes of the run, with the adapter cut up for it.

    Gradient clipping, accumulation and the average of the weights work as ever. A checkpoint is one file with whole
    tensors, the same that every other strategy writes and reads: a run may go on with another number of processes.
    Works with gloo on CPUs too, for trying it out.

    Args:
        shard_unet: also split the frozen UNet. It is gathered block by block in every forward and backward pass, so it
            costs time, and saves its size (SDXL in bfloat16: 5.1 GB) on every GPU but one. The frozen encoders stay
            whole: how often they are asked differs between the processes. Precomputed encodings do without them.
        timeout_minutes: how long a process waits for the others before it gives up.

    Raises:
        RequestError: at construction, if the timeout is not above 0; in ``setup``, if the model has no adapter, or if
            its UNet is compiled and shall be split.
    """

    def __init__(self, shard_unet: bool = False, timeout_minutes: float = 30.0) -> None:
        if not timeout_minutes > 0:
            raise RequestError(f"timeout_minutes must be above 0, got {timeout_minutes}")
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(minutes=timeout_minutes)
        )
        self.shard_unet = shard_unet

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        # Lightning's "auto" means the number of nodes; the number of processes is known only now
        self._data_parallel_size = self.world_size

    def setup(self, trainer: pl.Trainer) -> None:
        """Split the model, which is loaded by now, before the optimizer is made."""
        module = self.lightning_module
        adapter = getattr(module, "adapter", None)
        if not isinstance(adapter, MSAdapter):
            raise RequestError(
                f"{type(self).__name__} splits the adapter of MSDiffusionModule, but {type(module).__name__} has none: "
                "train it with --trainer.strategy ddp"
            )
        # PyTorch warns of changes in place of what a split part returns; the resampler's tokens are never changed
        warnings.filterwarnings("ignore", message=".*returned a view tensor.*", category=UserWarning)
        mesh = self.device_mesh["data_parallel"]
        shard_adapter(adapter, mesh)
        if module.trained_adapter is not adapter:
            # cut in the same places, so that each process averages what it has
            shard_adapter(module.trained_adapter, mesh)
        if self.shard_unet:
            if getattr(module.hparams, "compile", False):
                raise RequestError("shard_unet does not go together with compile: set one of them to false")
            shard_unet(module.backbone.unet, mesh)
        super().setup(trainer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Look at the weights in a checkpoint, then take them; the module sees what is left of it afterwards.

        Raises:
            WeightsError: they are not the module's; names file and tensor.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            with refused_weights():
                checkpoint = load_pickle(path)
            check_checkpoint(self.lightning_module, checkpoint, path)
        return super().load_checkpoint(path, weights_only)


class OffloadedAdapter(DeepSpeedStrategy):
    """DeepSpeed, stage 2: gradients and optimizer states are split, and the latter may lie in main memory.

    For GPUs too small for ``ShardedAdapter`` alone. A checkpoint is a folder, which only the same number of processes
    goes on from; the exported adapter is as ever.

    Args:
        offload: keep the optimizer's states in main memory, where the step is then computed.
        process_group_backend: of torch.distributed; None for that of the device.

    Raises:
        RequestError: at construction, if DeepSpeed is not installed; in ``setup``, if the trainer's precision is not
            "32-true": with others DeepSpeed makes weights and average 16 bits wide, which small steps do not move. Its
            arithmetic is bfloat16 all the same.
    """

    def __init__(self, offload: bool = True, process_group_backend: str | None = None) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise RequestError("OffloadedAdapter needs DeepSpeed: pip install deepspeed, or take ShardedAdapter")
        stage: dict[str, Any] = {"stage": 2}
        if offload:
            stage["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        super().__init__(
            process_group_backend=process_group_backend,
            config={
                "zero_optimization": stage,
                # the optimizer is the module's, not one of DeepSpeed's
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
                # for reports of its speed alone; left out, Lightning asks for a batch before there is a model
                "train_micro_batch_size_per_gpu": 1,
            },
        )

    def setup(self, trainer: pl.Trainer) -> None:
        """Hand the model over to DeepSpeed."""
        check_precision(str(trainer.precision))
        # batches hold what has to stay as it is, such as uniform numbers in float64
        self.precision_plugin.convert_input = lambda data: data
        super().setup(trainer)


def check_precision(precision: str) -> None:
    """Raise unless the trainer's precision keeps weights float32 under DeepSpeed; see ``OffloadedAdapter``.

    Raises:
        RequestError: it is not "32-true".
    """
    if precision != "32-true":
        raise RequestError(
            f"OffloadedAdapter needs trainer.precision 32-true, got {precision}: the arithmetic is bfloat16, but "
            "weights and optimizer have to be float32; set model.init_args.base_dtype bfloat16 for the frozen networks"
        )


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
def whole_weights(module: MSDiffusionModule) -> Iterator[None]:
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
