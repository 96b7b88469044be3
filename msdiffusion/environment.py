"""What decides last bits: variables that libraries read, set by every command before torch computes; the processor."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from data_pipeline.safe_text import write_anything

DEFAULTS: Mapping[str, str] = {
    # Threads of OpenMP that spin while they wait make everything 5 to 7 times slower as soon as another process wants
    # the cores. Read when torch is loaded.
    "OMP_WAIT_POLICY": "passive",
    # MKL takes another path, with other last bits, for a matrix that does not begin at a multiple of 16 bytes, unless
    # it is told to reproduce its results. Read at its first product; on other processors than x86 nobody reads it.
    "MKL_CBWR": "AVX2",
}
"""Variable to value, where the user has set none (docs/exactness.md)."""
DTYPES = ("float32", "float16", "bfloat16")
"""Names of the weights' dtypes that the commands offer."""
_OF_ARITHMETIC = (
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY",
)  # fmt: skip


def prepare_environment() -> None:
    """Set what is not set yet, also for the processes that this one starts. An empty value counts as set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not _imports_from_here():
        # A program that pip installs imports nothing from where its user stands, so its processes don't either.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    write_anything()


def _imports_from_here() -> bool:
    try:
        return str(Path.cwd()) in map(os.path.abspath, sys.path)
    except OSError:  # the working folder is gone
        return False


def arithmetic(device: str) -> dict[str, str]:
    """What decides the last bits of a result on this machine, beside the versions of the libraries.

    Args:
        device: "cpu", "cuda", "cuda:1", ...

    Returns:
        ``processor``: its name; ``arithmetic``: the instructions that torch takes of it, the variables that limit or
        change them, and the number of threads; of a GPU its compute capability.
    """
    import torch

    if device.startswith("cuda"):
        version = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return {"processor": torch.cuda.get_device_name(device), "arithmetic": f"compute capability {version}"}
    if not device.startswith("cpu"):
        return {"processor": f"{device.partition(':')[0]} of {_processor()}", "arithmetic": "not told"}
    variables = [f"{name}={os.environ[name]}" for name in _OF_ARITHMETIC if os.environ.get(name)]
    parts = [torch.backends.cpu.get_cpu_capability(), *variables, f"threads={torch.get_num_threads()}"]
    return {"processor": _processor(), "arithmetic": " ".join(parts)}


def _processor() -> str:
    """The CPU's name with family and model, by which a library chooses its kernels: hosts hide much of the name."""
    facts = dict[str, str]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            facts[name.strip()] = value.strip()
    if "model name" not in facts:
        import platform

        return platform.processor() or platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"
