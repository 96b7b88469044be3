"""Seconds until the front doors answer: `import msdiffusion`, and `--help` of the three commands.

    python benchmarks/imports.py --runs 7

Each run is a new process; the median counts, so one that had to read the disk does no harm. The bare interpreter's own
start is measured beside them, for it is part of each figure.
"""

from __future__ import annotations

import argparse
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
    "from msdiffusion import MSDiffusion": [sys.executable, "-c", "from msdiffusion import MSDiffusion"],
    "lightning --help": [str(SCRIPTS / "lightning"), "--help"],
}


def seconds(command: list[str]) -> float:
    """Wall time of one run of a command, which must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints a Markdown table: door, median, fastest and slowest run."""
    parser = argparse.ArgumentParser(description="time from a command to its answer")
    parser.add_argument("--runs", type=int, default=7, help="processes per door (default 7)")
    runs = parser.parse_args().runs
    print("| door | median s | fastest | slowest |\n|---|---|---|---|")
    for door, command in DOORS.items():
        times = [seconds(command) for _ in range(runs)]
        print(f"| `{door}` | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} |", flush=True)


if __name__ == "__main__":
    main()
