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
    """Runs `work`, which makes `count` things, and returns how many of them a CPU second makes."""
    start = time.process_time()
    work()
    return count / (time.process_time() - start)


def main() -> None:
    """Prints a Markdown table of rates at one picture size."""
    parser = argparse.ArgumentParser(description="drawing speed of the procedural world, one process")
    parser.add_argument("--clips", type=int, default=20, help="clips to write (default 20)")
    parser.add_argument("--frames", type=int, default=12, help="frames per clip (default 12)")
    parser.add_argument("--size", type=int, default=128, help="side of scenes and clips in pixels (default 128)")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    size = options.size
    subjects = per_second(lambda: [render_subject(sample_identity(rng), size, supersample=2) for _ in range(200)], 200)
    scenes = per_second(lambda: [sample_scene(rng, size=size) for _ in range(100)], 100)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"size": size, "num_frames": options.frames, "workers": 0}
        clips = per_second(lambda: write_clips(folder, options.clips, **settings), options.clips)
    print(f"| at {size} px | per core and second |\n|---|---|")
    print(f"| subjects drawn | {subjects:.0f} |")
    print(f"| scenes, subjects drawn anew for each | {scenes:.0f} |")
    print(f"| clips of {options.frames} frames, H.264 with both sidecars | {clips:.1f} |")


if __name__ == "__main__":
    main()
