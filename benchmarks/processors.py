"""The exact tests, and a sample of drawing and training, under several processors that this one plays.

    make test-processors                        # all of them, in under ten minutes on two cores
    python benchmarks/processors.py smallest    # some of them

torch, oneDNN and MKL are told by their own variables to leave out instructions of this processor, so that they compute
in another order. Within a setting every exact promise (docs/exactness.md) must hold; between settings last bits differ,
and the table says by how much. What the processor doesn't have can't be played.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SSE = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
TWO = {"OMP_NUM_THREADS": "2"}
FREE = {"MKL_CBWR": ""}
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "as-is": {},
    "two-threads": TWO,
    "without-bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx2-free": {**AVX2, **FREE},
    "smallest": {**SSE, "MKL_CBWR": "COMPATIBLE"},
    "smallest-free-two-threads": {**SSE, **FREE, **TWO},
}
"""Name to variables. MKL_CBWR is as the commands set it unless said; "free" is without it."""
STEPS = 10


def main() -> int:
    """Print a row per setting as it is done; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"default: all of {', '.join(SETTINGS)}")
    parser.add_argument("--sample", nargs=2, type=Path, metavar=("PAIRS", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sample:
        return sample(*options.sample)
    if unknown := [name for name in options.settings if name not in SETTINGS]:
        parser.error(f"no setting {unknown[0]!r}; there are {', '.join(map(repr, SETTINGS))}")
    files = [str(path) for path in sorted(Path(ROOT, "tests").rglob("test_*.py")) if "mark.exact" in path.read_text()]
    print(f"{len(files)} files of exact tests\n", flush=True)
    print("| processor | exact tests | float32 picture | bfloat16 picture | losses | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    failed, first = False, None
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder))
        for name in options.settings or SETTINGS:
            began = time.monotonic()
            own = {key: value for key, value in os.environ.items() if key not in {*SSE, *FREE}}
            environment = {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **SETTINGS[name]}
            finish_sample = start_sample(pairs, Path(folder, "sample.npz"), environment)
            passed, told = run_tests(files, environment)
            one = finish_sample()
            first = one if first is None else first
            cells = [told, *differences(first, one), f"{time.monotonic() - began:.0f}"]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            failed = failed or not passed
    return int(failed)


def run_tests(files: list[str], environment: Mapping[str, str]) -> tuple[bool, str]:
    """Whether the exact tests pass, and how many; what pytest says of failures is shown."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "exact", "-n", "2", "--dist", "load", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-20_000:] + done.stderr[-2_000:])
    last = next((line for line in reversed(done.stdout.splitlines()) if " passed" in line or " failed" in line), "none")
    return done.returncode == 0, last.split(" in ")[0]


def differences(first: Mapping[str, np.ndarray], one: Mapping[str, np.ndarray]) -> list[str]:
    """How far a sample is from that of the first setting."""
    cells = []
    for part in ("float32", "bfloat16"):
        gap = np.abs(first[part].astype(int) - one[part].astype(int))
        cells.append("equal" if not gap.any() else f"{(gap > 0).mean():.1%} of values off, by {gap.max()} at most")
    gap = np.abs(one["losses"] / first["losses"] - 1).max()
    return [*cells, "equal" if gap == 0 else f"{gap:.0e}"]


def start_sample(pairs: Path, file: Path, environment: Mapping[str, str]) -> Callable[[], dict[str, np.ndarray]]:
    """Draw and train in a process of its own, beside the tests; the function waits for what it found."""
    command = [sys.executable, __file__, "--sample", str(pairs), str(file)]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def finish() -> dict[str, np.ndarray]:
        errors = running.communicate()[1]
        if running.returncode:
            raise RuntimeError(f"the sample failed: {errors[-2_000:]}")
        return dict(np.load(file, allow_pickle=False))

    return finish


def make_pairs(folder: Path) -> Path:
    """A few pairs of the procedural world, mined by its exact annotations."""
    for command in (
        ["data_pipeline.world", "--out", str(folder / "clips"), "--count", "12"],
        ["data_pipeline.build", "--videos", str(folder / "clips"), "--out", str(folder / "pairs"), "--quiet",
         "--detector", "annotations", "--segmenter", "annotations"],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    return folder / "pairs"


def sample(pairs: Path, file: Path) -> int:
    """A picture of the embedded model, two steps of one in bfloat16, and the losses of ten steps; to a file."""
    from msdiffusion.environment import prepare_environment

    prepare_environment()
    import pytorch_lightning as pl
    import torch

    from msdiffusion import MSDiffusion
    from msdiffusion.evaluation.world import draw_cases
    from msdiffusion.places import DEFAULT_MODEL
    from msdiffusion.training.datamodule import PairsDataModule
    from msdiffusion.training.module import MSDiffusionModule

    case = draw_cases(pictures=2, seed=0)[1]
    found = {}
    for name, steps in (("float32", 25), ("bfloat16", 2)):  # bfloat16 is slow where the processor doesn't have it
        model = MSDiffusion.from_pretrained(DEFAULT_MODEL, torch_dtype=getattr(torch, name), device="cpu")
        pictures = model.generate(
            case.references, case.boxes, case.prompt, case.phrases, seed=0, steps=steps, progress=False
        )
        found[name] = np.asarray(pictures[0])

    losses: list[float] = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: object, outputs: dict, *_: object) -> None:
            losses.append(outputs["loss"].item())

    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        callbacks=[Losses()])  # fmt: skip
    data = PairsDataModule(str(pairs), resolution=64, batch_size=4, max_subjects=3, validation_fraction=0)
    places = {"base_model": str(DEFAULT_MODEL / "base"), "image_encoder": str(DEFAULT_MODEL / "image_encoder")}
    trainer.fit(MSDiffusionModule(**places, adapter=str(DEFAULT_MODEL), learning_rate=1e-4), data)
    np.savez(file, losses=np.array(losses), **found)
    return 0 if len(losses) == STEPS else 1


if __name__ == "__main__":
    sys.exit(main())
