"""How fast one core draws the procedural world: subjects, scenes, and whole clips with their sidecars.

    OMP_NUM_THREADS=1 python benchmarks/rendering.py --clips 40 --size 128
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable

import numpy as np

from data_pipeline.world import render_subject, sample_identity, sample_scene
from data_pipeline.world.clips import write_clips


def per_second(work: Callable[[], object], count: int) -> float:
    """Runs `work` `count` times and returns how many fit into a second."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return count / (time.perf_counter() - start)


def main() -> None:
    """Prints a Markdown table of rates at one picture size."""
    parser = argparse.ArgumentParser(description="drawing speed of the procedural world, one process")
    parser.add_argument("--clips", type=int, default=20, help="clips to write (default 20)")
    parser.add_argument("--frames", type=int, default=12, help="frames per clip (default 12)")
    parser.add_argument("--size", type=int, default=128, help="side of scenes and clips in pixels (default 128)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    subjects = per_second(lambda: render_subject(sample_identity(rng), options.size, supersample=2), 200)
    scenes = per_second(lambda: sample_scene(rng, size=options.size), 100)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_clips(folder, options.clips, size=options.size, num_frames=options.frames)
        clips = options.clips / (time.perf_counter() - start)
    print(f"| at {options.size} px, one process | per second |\n|---|---|")
    print(f"| subjects drawn | {subjects:.0f} |")
    print(f"| scenes, subjects drawn anew for each | {scenes:.0f} |")
    print(f"| clips of {options.frames} frames, H.264 with both sidecars | {clips:.1f} |")


if __name__ == "__main__":
    main()
