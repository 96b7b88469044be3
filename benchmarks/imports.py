"""Seconds until the front doors answer: `import msdiffusion`, and `--help` of the commands.

    python benchmarks/imports.py --runs 7 --heavy

Each run is a new process; the median counts, so one that had to read the disk does no harm. CPU seconds stand beside
the wall clock's: they change less when other work runs on the machine. The bare interpreter's own start is measured
too, for it is part of each figure. `--heavy` adds the doors that load torch on purpose.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

SCRIPTS = Path(sysconfig.get_path("scripts"))
DOORS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import msdiffusion": [sys.executable, "-c", "import msdiffusion"],
    "msdiffusion --help": [str(SCRIPTS / "msdiffusion"), "--help"],
    "python -m data_pipeline.build --help": [sys.executable, "-m", "data_pipeline.build", "--help"],
}
HEAVY_DOORS = {
    "from msdiffusion import MSDiffusion": [sys.executable, "-c", "from msdiffusion import MSDiffusion"],
    "lightning --help": [str(SCRIPTS / "lightning"), "--help"],
}


def cpu_of_children() -> float:
    """CPU seconds of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(command: list[str]) -> tuple[float, float]:
    """Wall clock and CPU seconds of one run of a command, which must succeed."""
    start, cpu = time.perf_counter(), cpu_of_children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start, cpu_of_children() - cpu


def main() -> None:
    """Prints a Markdown table: door, median and fastest wall clock, median CPU seconds."""
    parser = argparse.ArgumentParser(description="time from a command to its answer")
    parser.add_argument("--runs", type=int, default=7, help="processes per door (default 7)")
    parser.add_argument("--heavy", action="store_true", help="also time the doors that load torch")
    options = parser.parse_args()
    print("| door | median s | fastest s | median CPU s |\n|---|---|---|---|")
    for door, command in (DOORS | HEAVY_DOORS if options.heavy else DOORS).items():
        wall, cpu = zip(*(seconds(command) for _ in range(options.runs)), strict=True)
        row = f"{statistics.median(wall):.2f} | {min(wall):.2f} | {statistics.median(cpu):.2f}"
        print(f"| `{door}` | {row} |", flush=True)


if __name__ == "__main__":
    main()
