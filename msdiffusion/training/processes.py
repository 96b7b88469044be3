"""Which of the processes of ``local_sgd`` this one is."""

from __future__ import annotations

import os

RANK, WORLD, STORE = "MSD_LOCAL_SGD_RANK", "MSD_LOCAL_SGD_WORLD", "MSD_LOCAL_SGD_STORE"


def process_rank() -> int:
    """Rank of this process among those of the launcher; 0 in an ordinary run."""
    return int(os.environ.get(RANK, "0"))
