"""Clips per second of mining, and of every step: in this process, with 1 and 2 workers, and on a local Ray.

    python benchmarks/mining.py --clips 200                                              # annotated boxes and masks
    python benchmarks/mining.py --clips 200 --detector embedded --segmenter embedded     # the learned tiny ones
    python benchmarks/mining.py --videos clips/ --rows here 1 2 -- --reader pyav

What follows `--`, or is not known here, goes to `data_pipeline.build`. All rows run one after the other, so that their
ratios are those of one machine and one hour. Starting (importing spaCy and torch in every worker) happens once and is
given apart: the throughput counts from the tenth finished clip to the last one. Milliseconds of a step are wall clock,
mean over the clips that reached it, as the workers measured them.
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
WARM = 10


def finish_times(journal: Journal, files: Sequence[VideoFile]) -> list[float]:
    """Seconds at which the markers of the clips were written, ascending."""
    return sorted(journal._path(file.key, ".json").stat().st_mtime_ns / 1e9 for file in files)


def measure(row: str, steps: list[Step], files: Sequence[VideoFile], out: Path) -> dict[str, float]:
    """Mines the clips and returns clips per second, seconds of starting, and milliseconds of every step."""
    journal = Journal(out)
    journal.start({})
    begun = time.time()
    if row.startswith("ray"):
        options = RayOptions(address="local", workers=int(row[3:]), model_workers=int(row[3:]))
        with ray_session(options, group_steps(steps)):
            run_on_ray(steps, files, journal, options, quiet=True)
    else:
        run(steps, files, journal, workers=0 if row == "here" else int(row), timeout=600.0, quiet=True)
    times = finish_times(journal, files)
    seconds: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    kept = 0
    for marker in journal.markers(files):
        seconds.update(marker["seconds"])
        reached.update(dict.fromkeys(marker["seconds"], 1))
        kept += marker["kept"]
    found = {"clips/s": (len(times) - WARM) / (times[-1] - times[WARM - 1]), "start s": times[0] - begun, "kept": kept}
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
        if len(files) <= WARM:
            parser.error(f"needs more than {WARM} videos, found {len(files)}")
        rows = {row: measure(row, make_steps(arguments), files, Path(folder) / row) for row in known.rows}
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
