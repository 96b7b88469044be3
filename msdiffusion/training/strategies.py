"""Several GPUs that share one adapter: weights, gradients and optimizer states are split between them (FSDP2).

Each GPU of ordinary data parallel training (``--trainer.strategy ddp``) holds the adapter with its gradients and
optimizer states. Here each holds its part alone, and what a layer needs is gathered while it computes (ZeRO stage 3,
Rajbhandari et al. 2020; PyTorch's ``fully_shard``). docs/distributed_training.md says when that is worth while.
"""

from __future__ import annotations

import importlib.util
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy, ModelParallelStrategy

from data_pipeline.models.weights import load_pickle
from msdiffusion.adapter.adapter import MSAdapter
from msdiffusion.errors import RequestError, refused_weights
from msdiffusion.training.learning.sharding import shard_adapter, shard_unet
from msdiffusion.training.run.run_folder import check_checkpoint


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
