"""What the numerical libraries read from the environment: set by every command, before torch computes anything."""

from __future__ import annotations

import os
from collections.abc import Mapping

DEFAULTS: Mapping[str, str] = {
    # Threads of OpenMP that spin while they wait make everything 5 to 7 times slower as soon as another process wants
    # the cores. Read when torch is loaded.
    "OMP_WAIT_POLICY": "passive",
    # MKL takes another path, with other last bits, for a matrix that does not begin at a multiple of 16 bytes, unless
    # it is told to reproduce its results. Read at its first product; on other processors than x86 nobody reads it.
    "MKL_CBWR": "AVX2",
}
"""Variable to value, where the user has set none (docs/exactness.md)."""


def prepare_environment() -> None:
    """Set what is not set yet, also for the processes that this one starts. An empty value counts as set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
