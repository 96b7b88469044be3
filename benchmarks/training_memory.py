"""Peak memory of training the adapter, setting by setting.

    python benchmarks/training_memory.py                              # the embedded model, real fits on the CPU
    python benchmarks/training_memory.py --sdxl --device cuda         # steps at SDXL's sizes, random weights, on a GPU
    python benchmarks/training_memory.py --analytic                   # what SDXL's weights and states take, by counting

Every figure on the CPU is of a fit of its own in a process of its own: "at start" is what the process holds before the
first step (Python, torch, all networks), "peak" the most it ever held (``ru_maxrss``), "steps" the difference. On a GPU
it is ``torch.cuda.max_memory_allocated``. ``--analytic`` builds the networks on the meta device and counts bytes: it
needs neither weights nor memory, and says nothing about activations.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from training_speed import CONFIG, DATA, MODEL, TRAINER, fit_arguments

AHEAD = (f"{DATA}encodings=require", f"{MODEL}cache_encodings=false")
ASKED = (f"{DATA}encodings=off", f"{MODEL}cache_encodings=false")
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "config": ("the config, encodings made ahead: batch 32, float32, average kept", AHEAD),
    "checkpointing": ("gradient checkpointing", (*AHEAD, f"{MODEL}gradient_checkpointing=true")),
    "batch8": ("batch 8", (*AHEAD, f"{DATA}batch_size=8")),
    "batch64": ("batch 64", (*AHEAD, f"{DATA}batch_size=64")),
    "sdpa": ("attention: sdpa", (*AHEAD, f"{MODEL}attention=sdpa")),
    "no_average": ("no average of the weights", (*AHEAD, f"{MODEL}ema_decay=0")),
    "unfused": ("AdamW not fused", (*AHEAD, f"{MODEL}fused=false")),
    "8bit": ("8-bit AdamW", (*AHEAD, f"{MODEL}optimizer=adamw_8bit")),
    "bf16": ("bfloat16 autocast", (*AHEAD, f"{TRAINER}precision=bf16-mixed", f"{TRAINER}plugins=null")),
    "asked": ("everything encoded at every step", ASKED),
    "kept": ("encodings kept in memory", (f"{DATA}encodings=off", f"{MODEL}cache_encodings=true")),
}


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="peak memory of training")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--pairs", default="data/world/pairs", help="with encodings beside them")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--analytic", action="store_true", help="count the bytes of SDXL's weights and states")
    parser.add_argument("--sdxl", action="store_true", help="steps at SDXL's sizes with random weights")
    parser.add_argument("--device", default="cpu", help="for --sdxl")
    parser.add_argument("--one-run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run:
        print("RESULT", json.dumps(one_fit(options)))
    elif options.analytic:
        print_analytic()
    elif options.sdxl:
        from training_sdxl import print_memory

        print_memory(options.device, options.steps)
    else:
        print_fits(options)


def print_fits(options: argparse.Namespace) -> None:
    """Fits of the embedded model."""
    print("| setting | at start MiB | peak MiB | steps MiB | against the first |\n|---|---|---|---|---|")
    first = None
    for name in options.settings:
        command = [sys.executable, __file__, "--one-run", name, "--pairs", options.pairs, "--steps", str(options.steps)]
        # one thread, and memory that is given back at once, so that the figures are of what is needed
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            print(f"| {SETTINGS[name][0]} | did not run: {reason[:200]} | | | |", flush=True)
            continue
        start, peak = json.loads(found[0].removeprefix("RESULT "))
        first = first or peak - start
        print(
            f"| {SETTINGS[name][0]} | {start:.0f} | {peak:.0f} | {peak - start:.0f} | {(peak - start) / first:.2f} |",
            flush=True,
        )


def one_fit(options: argparse.Namespace) -> tuple[float, float]:
    """MiB before the first step, and at most, of a fit in this process."""
    import pytorch_lightning as pl

    from msdiffusion.training.run.run_cli import read_run

    held: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if not held:
                held.append(resident())

    with tempfile.TemporaryDirectory() as root:
        settings = SETTINGS[options.one_run][1]
        cli = read_run(CONFIG, fit_arguments(settings, options.pairs, options.steps, root))
        cli.trainer.callbacks.append(Watch())
        cli.trainer.fit(cli.model, cli.datamodule)
    return held[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resident() -> float:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def print_analytic() -> None:
    """What SDXL, CLIP-bigG and the adapter of the paper take, in GiB, by counting on the meta device."""
    from training_sdxl import networks_on_meta

    sizes = {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in networks_on_meta().items()
    }
    trained = sizes.pop("adapter")
    print("| network | parameters | float32 GiB | bfloat16 GiB |\n|---|---|---|---|")
    for name, count in {**sizes, "adapter": trained}.items():
        print(f"| {name} | {count / 1e6:,.1f} M | {4 * count / 2**30:.2f} | {2 * count / 2**30:.2f} |")
    gib = trained / 2**30
    encoders = sum(count for name, count in sizes.items() if name not in ("UNet", "autoencoder")) / 2**30
    frozen = sizes["UNet"] / 2**30
    print("\n| setting | GiB without activations |\n|---|---|")
    state = 4 * gib + 4 * gib  # weights and gradients of the adapter
    vae = 4 * sizes["autoencoder"] / 2**30  # stays in float32
    rows = {
        "frozen networks float32, AdamW": 4 * (frozen + encoders) + vae + state + 8 * gib,
        "frozen networks bfloat16, AdamW": 2 * (frozen + encoders) + vae + state + 8 * gib,
        "the same with an average of the weights": 2 * (frozen + encoders) + vae + state + 12 * gib,
        "frozen networks bfloat16, 8-bit AdamW (two bytes a parameter, scales left out)": 2 * (frozen + encoders)
        + vae
        + state
        + 2 * gib,
        "frozen networks bfloat16, AdamW, encoders and autoencoder not resident": 2 * frozen + state + 8 * gib,
    }
    for title, size in rows.items():
        print(f"| {title} | {size:.1f} |")


if __name__ == "__main__":
    main()
