"""What a corpus of video costs to mine: stage times of real sizes, and a model that adds them up.

    python benchmarks/mining_cost.py --videos ../shared/media/videos --captions ../shared/media/videos/captions.csv

CPU stages are measured on the given clips. The models are built at their real sizes with random weights (speed does
not depend on the values): on a GPU, if there is one, they are measured; without one they are measured once on the CPU,
and a GPU's time is ESTIMATED from counted floating-point operations, and marked so. The assumptions are options.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.journey import Journey, travel
from data_pipeline.options import make_parser, make_steps
from data_pipeline.records import VideoFile
from data_pipeline.sources import find_videos

FRAMES_PER_CLIP = 2
CPU_STAGES = ("read_videos", "cut_shots", "pick_frames", "find_entities")


@dataclass(frozen=True)
class Cost:
    """Seconds of one clip on one device. source: "measured" or "estimated"."""

    stage: str
    device: str
    seconds: float
    source: str


def measure_decoding(videos: Path, captions: Path | None) -> list[Cost]:
    """CPU seconds of the stages before the models, mean over the clips; a first pass warms everything up."""
    arguments = make_parser().parse_args(["--videos", str(videos), "--detector", "embedded", "--segmenter", "embedded"])
    steps = [step for step in make_steps(arguments) if step.name in CPU_STAGES]
    for step in steps:
        step.setup()
    files: Sequence[VideoFile] = find_videos(videos, captions)
    totals: Counter[str] = Counter()
    for measured in (False, True):
        for file in files:
            journey = travel(steps, Journey(file))
            if measured:
                totals.update(journey.seconds)
    return [Cost(name, "CPU core", totals[name] / len(files), "measured") for name in CPU_STAGES]


def build_models() -> dict[str, Callable[[str, int], Callable[[], None]]]:
    """Name -> function that puts the model on a device and returns one forward pass over so many frames."""
    import torch
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    from data_pipeline.models.sam import RELEASED, build_sam

    def detector(device: str, frames: int) -> Callable[[], None]:
        with torch.device(device):
            model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval()
            pixels = torch.zeros(frames, 3, 800, 1333)
            tokens = torch.full((frames, 16), 2000)
        tokens[:, 0], tokens[:, -1], tokens[:, 3::4] = 101, 102, 1012

        def forward() -> None:
            model(pixel_values=pixels, input_ids=tokens, attention_mask=torch.ones_like(tokens))

        return forward

    def segmenter(name: str) -> Callable[[str, int], Callable[[], None]]:
        def make(device: str, frames: int) -> Callable[[], None]:
            sam = build_sam(RELEASED[name]).to(device)
            pixels = torch.zeros(frames, 3, 1024, 1024, device=device)

            def forward() -> None:
                sam.image_encoder(pixels)

            return forward

        return make

    return {
        "Grounding DINO, Swin-T, 800 x 1333": detector,
        "SAM vit_b, image encoder": segmenter("vit_b"),
        "SAM vit_h, image encoder": segmenter("vit_h"),
    }


def time_model(forward: Callable[[], None], device: str, repeats: int) -> float:
    """Median seconds of a forward pass that is not the first one."""
    import torch

    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            begun = time.perf_counter()
            forward()
            if device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def count_operations(forward: Callable[[], None]) -> float:
    """Floating-point operations of a forward pass (a multiplication and an addition are two)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())


def main() -> None:
    """Measures, and prints the stages and what a corpus costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--videos", type=Path, required=True, help="clips of the kind that is to be mined")
    parser.add_argument("--captions", type=Path, help="their captions table")
    parser.add_argument("--clips", type=float, default=3.6e6, help="size of the corpus; the paper's is 3.6 million")
    parser.add_argument("--kept", type=float, default=1.0, help="share of the clips that reach the models")
    parser.add_argument("--peak", type=float, default=300e12, help="assumed peak of a GPU, operations per second")
    parser.add_argument("--utilisation", type=float, default=0.3, help="assumed share of the peak that is reached")
    parser.add_argument("--repeats", type=int, default=1, help="forward passes timed on a CPU (10 on a GPU)")
    options = parser.parse_args()

    import torch

    costs = measure_decoding(options.videos, options.captions)
    gpu = torch.cuda.is_available()
    for name, make in build_models().items():
        # A batch brings a CPU nothing: it is timed on one frame, and the clip has two.
        forward = make("cuda", FRAMES_PER_CLIP) if gpu else make("cpu", 1)
        if gpu:
            time_model(forward, "cuda", 3)
            costs.append(Cost(name, "GPU", time_model(forward, "cuda", 10), "measured"))
            continue
        operations = FRAMES_PER_CLIP * count_operations(forward)
        print(f"{name}: {operations / FRAMES_PER_CLIP / 1e9:,.0f} GFLOP a frame")
        seconds = FRAMES_PER_CLIP * time_model(forward, "cpu", options.repeats)
        costs.append(Cost(name, "CPU core", seconds, "measured"))
        costs.append(Cost(name, "GPU", operations / (options.peak * options.utilisation), "estimated"))
        del forward
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for the models, load {os.getloadavg()[0]:.1f}\n")
    print(f"{'stage':<38}{'device':<10}{'s per clip':>11}{'hours for the corpus':>22}  source")
    for cost in costs:
        hours = cost.seconds * options.clips * (1.0 if cost.stage in CPU_STAGES else options.kept) / 3600
        print(f"{cost.stage:<38}{cost.device:<10}{cost.seconds:>11.4f}{hours:>22,.0f}  {cost.source}")


if __name__ == "__main__":
    main()
