"""How many threads the libraries take."""

from __future__ import annotations

import os
import sys


def use_one_thread() -> None:
    """For a worker: its processes are the parallelism, and sums over several threads may differ in their last bit.

    Works for a torch that is loaded already, and for one that comes later.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
