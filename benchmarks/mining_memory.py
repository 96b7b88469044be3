"""Memory of a mining run over many clips: the parent and its workers, sampled while the real command runs.

    python benchmarks/mining_memory.py --clips 2000 --out docs/pictures/mining_memory.png

The clips are those of the procedural world; 50 are drawn and linked under as many names as are wanted. A line through
the second half of each process's samples gives its growth per thousand clips. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

DRAWN = 50
SUFFIXES = (".mp4", ".txt", ".annotations.json")


@dataclass
class Series:
    """Megabytes of one process, and how many clips were done at each sample."""

    name: str
    clips: list[int] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)

    def growth(self) -> float:
        """Megabytes per thousand clips, by least squares over the second half of the run."""
        clips, megabytes = np.asarray(self.clips, dtype=float), np.asarray(self.megabytes)
        late = (clips >= clips.max() / 2) & (clips < clips.max())  # then the shards are written
        return float(np.polyfit(clips[late], megabytes[late], 1)[0] * 1000)


def write_clips(folder: Path, count: int, seed: int) -> None:
    """The drawn clips under ``count`` names."""
    from data_pipeline.world.clips import write_clips as write_world

    drawn = write_world(str(folder.with_name("drawn")), min(DRAWN, count), seed=seed)
    folder.mkdir()
    for number in range(count):
        source = Path(drawn[number % len(drawn)])
        for suffix in SUFFIXES:
            name = source.with_name(source.name.removesuffix(".mp4") + suffix)
            os.link(name, folder / f"clip_{number:06d}{suffix}")


def processes_below(parent: int, depth: int = 0) -> Iterator[tuple[int, int]]:
    """The process and all its descendants, each with its depth below the first one."""
    yield parent, depth
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from processes_below(int(child), depth + 1)


def own_memory(process: int) -> float:
    """Megabytes that a process has written to, a page that several share being split among them. Pages of libraries
    don't count: who else uses those on the machine is no matter of ours.
    """
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) / 1000
    return 0.0


def sample(command: list[str], out: Path, interval: float) -> list[Series]:
    """Runs the command and watches its processes until the last clip is done; the first series is their sum."""
    together, series = Series("all together"), {}
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while run.poll() is None:
        time.sleep(interval)
        done = sum(1 for _ in out.glob(".mining/??/*.json"))
        if done < max(together.clips, default=0):  # the shards are written, the journal goes
            continue
        try:
            # Workers are forked from a server that has done the slow imports.
            now = {
                process: (("parent", "server", "worker")[min(depth, 2)], own_memory(process))
                for process, depth in processes_below(run.pid)
            }
        except (FileNotFoundError, ProcessLookupError):  # one has just ended
            continue
        for process, (name, megabytes) in now.items():
            own = series.setdefault(process, Series(name))
            own.clips.append(done)
            own.megabytes.append(megabytes)
        together.clips.append(done)
        together.megabytes.append(sum(megabytes for _, megabytes in now.values()))
    if run.returncode:
        raise SystemExit(f"the run failed with exit code {run.returncode}")
    return [together, *series.values()]


def draw(series: list[Series], path: Path) -> None:
    """Memory over finished clips."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for own in series:
        axes.plot(own.clips, own.megabytes, label=f"{own.name}: {own.growth():+.1f} MB per 1000 clips")
    axes.set(xlabel="clips finished", ylabel="own memory, MB", ylim=(0, None))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Writes the clips, mines them, prints the growth, draws it."""
    parser = argparse.ArgumentParser(description="Memory of a mining run over many clips.")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="picture to draw")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        videos, out = Path(scratch) / "videos", Path(scratch) / "pairs"
        write_clips(videos, arguments.clips, arguments.seed)
        command = [sys.executable, "-m", "data_pipeline.build", "--videos", str(videos), "--out", str(out)]
        begun = time.monotonic()
        options = ["--detector", "annotations", "--segmenter", "annotations", "--workers", str(arguments.workers)]
        series = sample([*command, *options, "--quiet"], out, arguments.interval)
    busy = [own for own in series if len(own.clips) > 5 and max(own.clips) > arguments.clips / 2]
    busy = [own for own in busy if max(own.megabytes) > 12]  # Python's resource tracker does no mining
    for own in busy:
        quarter, last = np.searchsorted(own.clips, [arguments.clips // 4, max(own.clips)])
        early, late = own.megabytes[quarter], own.megabytes[last - 1]
        print(f"{own.name}: {early:.0f} MB after a quarter of the clips, {late:.0f} MB before the last one;")
        print(f"  over the second half {own.growth():+.2f} MB per 1000 clips")
    print(f"{arguments.clips} clips in {time.monotonic() - begun:.0f} s")
    if arguments.out:
        draw(busy, arguments.out)


if __name__ == "__main__":
    main()
