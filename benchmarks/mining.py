"""Clips per second of mining, and of every step: in this process, with 1 and 2 workers, and on a local Ray.

    python benchmarks/mining.py --clips 200                                              # annotated boxes and masks
    python benchmarks/mining.py --clips 200 --detector embedded --segmenter embedded     # the learned tiny ones
    python benchmarks/mining.py --videos clips/ --rows here 1 2 -- --reader pyav

What follows `--`, or is not known here, goes to `data_pipeline.build`. All rows run one after the other, so that their
ratios are those of one machine and one hour. Starting (Ray; importing spaCy and torch in every worker) happens once:
every row mines one clip, then a few, then all of them, and the throughput is the further clips of the last run over
its further time. The start is the first clip's time, less a clip's share. Milliseconds of a step are wall clock, mean
over the clips that reached it, as the workers measured them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.journal import Journal
from data_pipeline.options import make_parser, make_steps
from data_pipeline.records import VideoFile
from data_pipeline.run import run
from data_pipeline.run_ray import RayOptions, group_steps, ray_session, run_on_ray
from data_pipeline.sources import find_videos
from data_pipeline.step import Step

ROWS = ("here", "1", "2", "ray1", "ray2")
FEW = 20


def mine(row: str, steps: list[Step], files: Sequence[VideoFile], journal: Journal) -> float:
    """Mines the clips in the way of this row; returns the seconds it took, from nothing to the last clip."""
    journal.start({})
    begun = time.perf_counter()
    if row.startswith("ray"):
        options = RayOptions(address="local", workers=int(row[3:]), model_workers=int(row[3:]))
        with ray_session(options, group_steps(steps)):
            run_on_ray(steps, files, journal, options, quiet=True)
    else:
        run(steps, files, journal, workers=0 if row == "here" else int(row), timeout=600.0, quiet=True)
    return time.perf_counter() - begun


def measure(row: str, arguments: argparse.Namespace, files: Sequence[VideoFile], out: Path) -> dict[str, float]:
    """Clips per second, seconds of starting, clips that were kept, and milliseconds of every step."""
    # What is imported here, or in the server that workers are forked from, stays: the first clip pays for it.
    first = mine(row, make_steps(arguments), files[:1], Journal(out / "one"))
    short = mine(row, make_steps(arguments), files[:FEW], Journal(out / "few"))
    journal, steps = Journal(out / "all"), make_steps(arguments)
    rate = (len(files) - FEW) / (mine(row, steps, files, journal) - short)
    seconds: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    kept = 0
    for marker in journal.markers(files):
        seconds.update(marker["seconds"])
        reached.update(dict.fromkeys(marker["seconds"], 1))
        kept += marker["kept"]
    found = {"clips/s": rate, "start s": first - 1 / rate, "kept": kept}
    return found | {step.name: 1000 * seconds[step.name] / max(1, reached[step.name]) for step in steps}


def main() -> None:
    """Renders clips if none are given, then measures every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=200, help="clips of the world to render, 128 pixels, 12 frames")
    parser.add_argument("--videos", type=Path, help="a folder of videos instead")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="here: in this process")
    parser.add_argument("--captions", type=Path, help="captions table for --videos")
    known, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        videos = known.videos
        if videos is None:
            from data_pipeline.world.clips import write_clips

            videos = Path(folder) / "clips"
            write_clips(videos, known.clips, split="held_out")
        arguments = make_parser().parse_args(["--videos", str(videos), *(part for part in rest if part != "--")])
        files = find_videos(videos, known.captions)
        if len(files) <= FEW:
            parser.error(f"needs more than {FEW} videos, found {len(files)}")
        rows = {row: measure(row, arguments, files, Path(folder) / row) for row in known.rows}
    print(f"{len(files)} clips, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<22}" + "".join(f"{row:>10}" for row in rows))
    for name in next(iter(rows.values())):
        unit = "" if name in ("clips/s", "start s", "kept") else " ms"
        print(f"{name + unit:<22}" + "".join(f"{values[name]:>10.2f}" for values in rows.values()))
    first = next(iter(rows.values()))
    steps = {name: value for name, value in first.items() if name not in ("clips/s", "start s", "kept")}
    slowest = max(steps, key=steps.get)
    print(f"bottleneck: {slowest}, {steps[slowest] / sum(steps.values()):.0%} of the time of a clip")


if __name__ == "__main__":
    main()
