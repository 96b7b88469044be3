"""Clips per second of every mining step, on clips of the procedural world with their annotations.

    python benchmarks/mining.py --clips 60
    python benchmarks/mining.py --videos clips/ --reader pyav

The steps run in this process, on one core, after a first clip has warmed them up. CPU seconds are given beside the wall
clock's: on a machine with other work they are the ones that compare. Setting up (mostly importing spaCy, which imports
torch) happens once per worker and is given apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from data_pipeline.build import find_videos, make_parser, make_steps
from data_pipeline.drawing import draw_preview
from data_pipeline.journal import Journal
from data_pipeline.records import ClipError, Rejected


def measure(videos: Path, reader: str, out: Path) -> None:
    """Prints a table: milliseconds per clip and clips per second of every step."""
    arguments = make_parser().parse_args(["--videos", str(videos), "--out", str(out), "--reader", reader])
    files = find_videos(videos)
    steps = make_steps(arguments)
    begun, begun_cpu = time.perf_counter(), time.process_time()
    for step in steps:
        step.setup()
    print(f"setting up: {time.perf_counter() - begun:.1f} s, {time.process_time() - begun_cpu:.1f} s CPU")
    journal = Journal(out)
    journal.start({})
    wall: Counter[str] = Counter()
    cpu: Counter[str] = Counter()
    clips: Counter[str] = Counter()
    for number, file in enumerate(files):
        if number == 1:
            for counter in (wall, cpu, clips):
                counter.clear()
        record = before = file
        for step in steps:
            start, start_cpu = time.perf_counter(), time.process_time()
            before = record
            try:
                record = step.process(record)
            except ClipError as error:
                record = Rejected(error.reason, error.evidence)
            wall[step.name] += time.perf_counter() - start
            cpu[step.name] += time.process_time() - start_cpu
            clips[step.name] += 1
            if isinstance(record, Rejected):
                break
        start, start_cpu = time.perf_counter(), time.process_time()
        if isinstance(record, Rejected):
            journal.commit(file, {"kept": False}, preview=draw_preview(before))
        else:
            journal.commit(file, {"kept": True, "samples": list(record.samples)}, blocks=record.blocks)
        wall["journal"] += time.perf_counter() - start
        cpu["journal"] += time.process_time() - start_cpu
        clips["journal"] += 1
    print(f"{'step':<16}{'clips':>7}{'ms':>9}{'ms CPU':>9}{'clips/s':>9}{'clips/CPU s':>13}")
    for name, count in clips.items():
        rates = f"{count / wall[name]:>9.0f}{count / max(cpu[name], 1e-9):>13.0f}"
        print(f"{name:<16}{count:>7}{1000 * wall[name] / count:>9.2f}{1000 * cpu[name] / count:>9.2f}{rates}")
    count = clips["read_videos"]
    total, total_cpu = sum(wall.values()), sum(cpu.values())
    rates = f"{count / total:>9.0f}{count / total_cpu:>13.0f}"
    print(f"{'all':<16}{count:>7}{1000 * total / count:>9.2f}{1000 * total_cpu / count:>9.2f}{rates}")


def main() -> None:
    """Renders clips if none are given, then measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clips", type=int, default=60, help="clips of the procedural world to render, 128 pixels, 12 frames"
    )
    parser.add_argument("--videos", type=Path, help="a folder of annotated clips instead")
    parser.add_argument("--reader", choices=("auto", "decord", "pyav"), default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        videos = arguments.videos
        if videos is None:
            from data_pipeline.world.clips import write_clips

            videos = Path(folder) / "clips"
            write_clips(videos, arguments.clips)
        measure(videos, arguments.reader, Path(folder) / "pairs")


if __name__ == "__main__":
    main()
