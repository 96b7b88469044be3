"""Whole pictures with the embedded model: loading, the first picture, and eight prompts at once against one by one.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python benchmarks/generation.py

Loading and the first picture are measured in fresh processes, imports apart. Batch and single calls take turns within
one process; their ratio counts. The denoiser's batches are counted, not assumed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msdiffusion import MSDiffusion

FRESH = """
import time
start = time.perf_counter()
import torch, diffusers, transformers
from msdiffusion import MSDiffusion
from msdiffusion.backbone.backbone import quiet_loading
from msdiffusion.adapter import adapter
from msdiffusion.backbone import backbone
from PIL import Image
copy, copying = backbone.give_own_memory if {copies!r} else lambda *modules: None, 0
def timed(*modules):
    global copying
    begun = time.perf_counter()
    copy(*modules)
    copying += time.perf_counter() - begun
backbone.give_own_memory = adapter.give_own_memory = timed
quiet_loading()
imported = time.perf_counter()
model = MSDiffusion.from_pretrained({model!r}, device="cpu")
loaded = time.perf_counter()
model.generate([Image.new("RGB", (64, 64), "red")], [(0, 0, 1, 1)], "a dog on the beach", ["dog"], progress=False)
drawn = time.perf_counter()
resident = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
print(imported - start, loaded - imported, copying, drawn - loaded, resident)
"""
SCENES = ("on the beach", "in the snow", "in the jungle", "on the grass")


def main() -> None:
    """Print both tables."""
    from msdiffusion.places import DEFAULT_MODEL

    parser = argparse.ArgumentParser(description="whole pictures with the embedded model")
    parser.add_argument("--model", default=str(DEFAULT_MODEL))
    parser.add_argument("--runs", type=int, default=3, help="fresh processes, and rounds of batch against single")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--mapped", action="store_true", help="leave the weights in their files, to compare")
    options = parser.parse_args()
    print("| in a fresh process | seconds, or MiB: median |\n|---|---|")
    runs = [fresh(options.model, not options.mapped) for _ in range(options.runs)]
    names = (
        "import the libraries", "load the model", "of that copying weights out of their files", "first picture",
        "resident memory, MiB",
    )  # fmt: skip
    for name, values in zip(names, zip(*runs, strict=True), strict=True):
        print(f"| {name} | {statistics.median(values):.2f} |")
    print(f"\nload {os.getloadavg()[0]:.1f}")
    batch_against_single(options)


def fresh(model: str, copies: bool) -> list[float]:
    """Seconds of importing, loading, the copying in that, and drawing, and MiB, of a process of its own."""
    output = subprocess.check_output([sys.executable, "-c", FRESH.format(model=model, copies=copies)], text=True)
    return [float(value) for value in output.split()[-5:]]


def batch_against_single(options: argparse.Namespace) -> None:
    """Time ``prompts`` requests in one batch and one by one."""
    from msdiffusion import MSDiffusion
    from msdiffusion.backbone.backbone import quiet_loading
    from msdiffusion.evaluation.world import draw_cases

    quiet_loading()
    model = MSDiffusion.from_pretrained(options.model, device="cpu")
    cases = draw_cases(pictures=options.prompts, seed=0)
    requests: list[dict[str, Any]] = [
        {"images": case.references, "boxes": case.boxes, "prompt": case.prompt, "phrases": case.phrases, "seed": i}
        for i, case in enumerate(cases)
    ]
    calls = count_calls(model)
    times: dict[str, list[float]] = {"one batch": [], "one by one": []}
    evaluations: dict[str, int] = {}
    for _ in range(options.runs):
        for name in times:
            calls.clear()
            start = time.perf_counter()
            if name == "one batch":
                model.generate_batch(requests, progress=False, batch_size=options.prompts)
            else:
                for request in requests:
                    model.generate(**request, progress=False)
            times[name].append(time.perf_counter() - start)
            evaluations[name] = len(calls)
    subjects = sum(len(case.subjects) for case in cases)
    print(f"\n{options.prompts} prompts with {subjects} subjects, {model.adapter.config.defaults['steps']} steps:\n")
    print("| way | seconds, median | calls of the UNet |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {evaluations[name]} |")
    ratios = sorted(b / s for b, s in zip(times["one batch"], times["one by one"], strict=True))
    print(f"\nbatch / single: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def count_calls(model: MSDiffusion) -> list[int]:
    """A list that grows by the batch size at every call of the UNet."""
    calls: list[int] = []
    model.backbone.unet.register_forward_pre_hook(lambda unet, args: calls.append(len(args[0])))
    return calls


if __name__ == "__main__":
    main()
