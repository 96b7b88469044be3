"""What the libraries take of this machine: threads, and devices."""

import os
import sys

from data_pipeline.errors import InputError


def use_one_thread() -> None:
    """For a worker: its processes are the parallelism, and sums over several threads may differ in their last bit.

    Works for a torch that is loaded already, and for one that comes later.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def check_device(device: str) -> None:
    """InputError if a device that a model should run on is not here. "" and "cpu" always are."""
    if device in ("", "cpu"):
        return
    import torch

    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if number >= found:
            raise InputError(f"--device {device}: {found} usable CUDA devices here; take --device cpu, or another one")
    elif not torch.backends.mps.is_available():
        raise InputError(f"--device {device} is not usable here; take --device cpu")
