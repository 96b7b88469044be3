"""Samples per second of training the adapter, against the plain loop that encodes everything at every step.

    python benchmarks/training_speed.py                                    # the embedded model, on two cores
    python benchmarks/training_speed.py --variants plain ours --repeats 5
    python benchmarks/training_speed.py --sdxl --device cuda               # SDXL's sizes, random weights, on a GPU

Every figure is of a run of its own, in processes of its own, on the same real pairs. The variants take turns, so that
whatever else the machine does hits all of them alike; medians over the turns count, and the ratio to the plain loop
within each turn. The first steps of a run are not counted. The plain loop is ``training_plain_loop.py``; all others are
real fits of the config by Lightning, with its average of the weights, clipping and logging, and with its callbacks but
those that write pictures, exports and checkpoints every so many steps.

    python benchmarks/training_speed.py --step-by-step                     # on a machine that others use too

``--step-by-step`` puts all variants into one process of one thread, where they take turns after every single step
(loader, step, optimizer, average), and counts CPU time: no other load can favour one of them. It says nothing about
threads and processes.

Beside the wall clock stands the CPU time of all processes together: on a machine that others use too, its ratio is the
steadier one. "waiting" is the share of the wall time between the end of a step and the start of the next one, in which
the loader is at work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG = "configs/msd.yaml"
PAIRS = "data/world/pairs"
CALLBACKS = [
    {"class_path": f"msdiffusion.training.{name}"} for name in ("local_sgd.WeightAveraging", "callbacks.RunProgress")
]
"""Of the config's, those that act at every step."""
MODEL, DATA, TRAINER = "--model.init_args.", "--data.init_args.", "--trainer."


def fit_arguments(settings: Sequence[str], pairs: str, steps: int, root: str) -> list[str]:
    """More settings of a fit on the CPU that trains, and does nothing besides."""
    return [
        *settings, f"{DATA}pairs={pairs}", f"{TRAINER}limit_val_batches=0", f"{TRAINER}max_steps={steps}",
        f"{TRAINER}default_root_dir={root}", f"{TRAINER}enable_checkpointing=false",
        f"{TRAINER}callbacks={json.dumps(CALLBACKS)}", f"{TRAINER}accelerator=cpu",
    ]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    title: str
    processes: int = 1
    threads: int = 1
    settings: tuple[str, ...] = ()
    """More arguments of ``lightning fit``."""
    patch: str = ""
    """A change that no setting makes, see ``patched``."""
    plain_slots: int = 0
    """Above 0: the plain loop, padded to so many subjects."""
    steps: int = 0
    """Above 0: so many steps instead of the usual number."""


OURS = (f"{DATA}encodings=require", f"{MODEL}cache_encodings=false")
VARIANTS = {
    "plain": Variant("plain loop, two threads, padded to 4 subjects as officially", threads=2, plain_slots=4),
    "plain3": Variant("plain loop, two threads, padded to 3 subjects as ours", threads=2, plain_slots=3),
    "plain1": Variant("plain loop, one thread, 4 subjects", plain_slots=4),
    "ours": Variant("**ours: encodings made ahead, two processes of one thread (local_sgd)**", 2, settings=OURS),
    "kept": Variant(
        "encodings kept in memory instead", 2, settings=(f"{DATA}encodings=off", f"{MODEL}cache_encodings=true")
    ),
    "asked": Variant(
        "everything encoded at every step", 2, settings=(f"{DATA}encodings=off", f"{MODEL}cache_encodings=false")
    ),
    "padded": Variant("padding subjects computed too", 2, settings=OURS, patch="padded"),
    "sdpa": Variant("attention: sdpa", 2, settings=(*OURS, f"{MODEL}attention=sdpa")),
    "batch16": Variant("batches of 16 in place of 32", 2, settings=(*OURS, f"{DATA}batch_size=16"), steps=32),
    "channels_last": Variant("UNet in channels_last", 2, settings=OURS, patch="channels_last"),
    "worker": Variant("a loading process for each", 2, settings=(*OURS, f"{DATA}num_workers=1")),
    "threads": Variant("one process of two threads", threads=2, settings=OURS),
    "ddp": Variant(
        "DDP (gloo) in place of local_sgd", 1, settings=(*OURS, f"{TRAINER}devices=2", f"{TRAINER}strategy=ddp")
    ),
    "one": Variant("one process of one thread", settings=OURS),
    "bf16": Variant(
        "bfloat16 autocast, whatever the processor has",
        2,
        settings=(*OURS, f"{TRAINER}precision=bf16-mixed", f"{TRAINER}plugins=null"),
        steps=4,
    ),
    "compile": Variant("torch.compile", 2, settings=(*OURS, f"{MODEL}compile=true")),
}
USUAL = ("plain", "plain3", "ours", "kept", "asked", "padded", "sdpa", "batch16", "channels_last", "worker", "threads")


@dataclass
class Measured:
    """What the turns of one variant gave."""

    samples_per_second: list[float] = field(default_factory=list)
    cpu_milliseconds: list[float] = field(default_factory=list)
    """Per sample, all processes together."""
    waiting: list[float] = field(default_factory=list)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="training against the plain loop")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(USUAL))
    parser.add_argument("--pairs", default=PAIRS)
    parser.add_argument("--steps", type=int, default=16, help="that are counted, of 32 samples in each process")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sdxl", action="store_true", help="SDXL's sizes with random weights instead")
    parser.add_argument("--device", default="cpu", help="for --sdxl")
    parser.add_argument("--batch-size", type=int, default=8, help="for --sdxl")
    parser.add_argument("--miniature", action="store_true", help="with --sdxl: tiny networks, to try the script")
    parser.add_argument("--step-by-step", action="store_true", help="one process, CPU time, turns after every step")
    parser.add_argument("--one-run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_run:
        print("RESULT", json.dumps(one_run(json.loads(options.one_run))))
        return
    if options.sdxl:
        from training_sdxl import print_speed

        print_speed(options.device, options.steps, options.repeats, options.batch_size, options.miniature)
        return
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(options.pairs)
        if options.step_by_step and not (pairs / "encodings").is_dir():
            parser.error("--step-by-step needs --pairs with encodings beside them: run msdiffusion.training.precompute")
        if options.step_by_step:
            step_by_step([name for name in options.variants if name in STEPWISE], pairs, options)
            return
        if not (pairs / "encodings").is_dir():
            pairs = encoded_copy(pairs, Path(folder, "pairs"))
        measured = {name: Measured() for name in options.variants}
        for turn in range(options.repeats):
            names = options.variants[turn % len(measured) :] + options.variants[: turn % len(measured)]
            for name in names:
                take_turn(name, measured[name], pairs, options, Path(folder))
            print_table(measured, turn + 1)


def encoded_copy(pairs: Path, copy: Path) -> Path:
    """The dataset beside encodings of its own: the shards are links, so that nothing is written to the original."""
    copy.mkdir()
    for path in pairs.iterdir():
        if path.suffix in (".tar", ".json", ".parquet"):
            (copy / path.name).symlink_to(path.resolve())
    subprocess.run(
        [sys.executable, "-m", "msdiffusion.training.precompute", "-c", CONFIG, "--pairs", str(copy)],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return copy


def take_turn(name: str, measured: Measured, pairs: Path, options: argparse.Namespace, folder: Path) -> None:
    """One run of a variant, in fresh processes."""
    variant = VARIANTS[name]
    task = {
        "name": name,
        "pairs": str(pairs),
        "steps": variant.steps or options.steps,
        "warmup": min(options.warmup, variant.steps or options.warmup),
        "root": str(folder / "runs"),
    }
    shutil.rmtree(folder / "store", ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(variant.threads), "PYTHONWARNINGS": "ignore"}
    if not variant.plain_slots:
        environment.setdefault("OMP_WAIT_POLICY", "passive")  # as the lightning command does
    children = []
    for rank in range(variant.processes):
        shared = {}
        if variant.processes > 1:
            store = folder / f"store-{time.monotonic_ns()}" if rank == 0 else store  # noqa: F821
            shared = {
                "MSD_LOCAL_SGD_RANK": str(rank),
                "MSD_LOCAL_SGD_WORLD": str(variant.processes),
                "MSD_LOCAL_SGD_STORE": str(store),
            }
        children.append(
            subprocess.Popen(
                [sys.executable, __file__, "--one-run", json.dumps(task)],
                env=environment | shared,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for child in children:
        output, errors = child.communicate()
        found = [line for line in output.splitlines() if line.startswith("RESULT ")]
        if child.returncode or not found:
            raise SystemExit(f"{name} failed:\n{errors[-3000:]}")
        results += [json.loads(line.removeprefix("RESULT ")) for line in found]
    measured.samples_per_second.append(sum(result["samples"] / result["wall"] for result in results))
    measured.cpu_milliseconds.append(
        1e3 * sum(result["cpu"] for result in results) / sum(result["samples"] for result in results)
    )
    measured.waiting.append(max(result["waiting"] for result in results))
    print(
        f"{name}: {measured.samples_per_second[-1]:.1f} samples/s, {measured.cpu_milliseconds[-1]:.1f} CPU ms per "
        f"sample, load {os.getloadavg()[0]:.1f}",
        file=sys.stderr,
        flush=True,
    )


def one_run(task: dict[str, Any]) -> dict[str, float]:
    """Samples, wall seconds, CPU seconds and share of waiting of this process's part of a run."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    variant = VARIANTS[task["name"]]
    return plain_run(variant, task) if variant.plain_slots else fit_run(variant, task)


def plain_run(variant: Variant, task: dict[str, Any]) -> dict[str, float]:
    """The plain loop."""
    from training_plain_loop import PlainPairs, PlainTraining

    resampler = {"width": 192, "depth": 3, "heads": 6, "head_width": 32}
    training = PlainTraining("checkpoints/tiny/base", "checkpoints/tiny/image_encoder", resampler)
    batches = training.batches(PlainPairs(Path(task["pairs"]), 64, variant.plain_slots, training.processor), 32)
    for _ in range(task["warmup"]):
        training.step(next(batches))
    start, cpu, waiting = time.perf_counter(), time.process_time(), 0.0
    for _ in range(task["steps"]):
        before = time.perf_counter()
        batch = next(batches)
        waiting += time.perf_counter() - before
        training.step(batch)
    wall = time.perf_counter() - start
    cpu = time.process_time() - cpu
    return {"samples": 32 * task["steps"], "wall": wall, "cpu": cpu, "waiting": waiting / wall}


def fit_run(variant: Variant, task: dict[str, Any]) -> dict[str, float]:
    """A fit of the config."""
    import warnings

    from msdiffusion.training.run.run_cli import read_run

    warnings.filterwarnings("ignore")
    with patched(variant.patch):
        steps = task["warmup"] + task["steps"]
        cli = read_run(CONFIG, fit_arguments(variant.settings, task["pairs"], steps, task["root"]))
        clock = Clock(cli.model, task["warmup"])
        cli.trainer.fit(cli.model, cli.datamodule)
    return clock.result


class Clock:
    """Measures the steps of a fit after the first ones, by hooks of the model.

    Not a callback: the processes of local_sgd but the first have none but its own.

    Args:
        model: that is trained.
        warmup: steps that are not counted.
    """

    def __init__(self, model: Any, warmup: int) -> None:
        self.model, self.warmup, self.result = model, warmup, {}
        model.on_train_batch_start, model.on_train_batch_end = self.begin, self.end

    def begin(self, batch: Any, index: int) -> None:
        """The batch is there."""
        if self.model.global_step == self.warmup:
            self.start, self.cpu = time.perf_counter(), time.process_time()
            self.ended, self.waited, self.samples = self.start, 0.0, 0
        elif self.model.global_step > self.warmup:
            self.waited += time.perf_counter() - self.ended

    def end(self, outputs: Any, batch: Any, index: int) -> None:
        """The optimizer has made its step."""
        if self.model.global_step > self.warmup:
            self.ended = time.perf_counter()
            self.samples += len(batch)
            wall, cpu = self.ended - self.start, time.process_time() - self.cpu
            self.result = {"samples": self.samples, "wall": wall, "cpu": cpu, "waiting": self.waited / wall}


STEPWISE = ("plain", "plain3", "ours", "kept", "asked", "padded", "sdpa", "channels_last", "batch16")
"""Variants that differ in more than threads and processes."""


def step_by_step(names: list[str], pairs: Path, options: argparse.Namespace) -> None:
    """CPU milliseconds per sample of every variant, in one process of one thread."""
    import torch

    torch.set_num_threads(1)
    steps = {name: plain_stepper(VARIANTS[name], pairs) if VARIANTS[name].plain_slots
             else our_stepper(VARIANTS[name], pairs) for name in names}  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.warmup + options.steps * options.repeats):
        for name, step in steps.items():
            start = time.process_time()
            samples = step()
            if turn >= options.warmup:
                times[name].append(1e3 * (time.process_time() - start) / samples)
    print(f"load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {len(times[names[0]])} steps each, in turns\n")
    print("| variant | CPU ms per sample: median | fastest | slowest | plain / this |\n|---|---|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[names[0]], values, strict=True))
        title = (
            VARIANTS[name].title.replace(", two threads", "").replace(", two processes of one thread (local_sgd)", "")
        )
        print(f"| {title} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} | {ratio:.2f} |")


def plain_stepper(variant: Variant, pairs: Path) -> Callable[[], int]:
    """A function that makes a step of the plain loop and says of how many samples."""
    from training_plain_loop import PlainPairs, PlainTraining

    resampler = {"width": 192, "depth": 3, "heads": 6, "head_width": 32}
    training = PlainTraining("checkpoints/tiny/base", "checkpoints/tiny/image_encoder", resampler)
    batches = training.batches(PlainPairs(pairs, 64, variant.plain_slots, training.processor), 32)

    def step() -> int:
        training.step(next(batches))
        return 32

    return step


def our_stepper(variant: Variant, pairs: Path) -> Callable[[], int]:
    """The same of ours: what a fit does at every step, without Lightning's own share."""
    import torch

    from msdiffusion.training import module as module_room
    from msdiffusion.training.learning.optimizers import make_optimizer
    from msdiffusion.training.precompute import load_run

    settings = [*variant.settings, f"{DATA}pairs={pairs}"]
    with patched(variant.patch):
        datamodule, model = load_run(CONFIG, settings, "cpu")
        make_condition = module_room.make_condition
    model.log = lambda *_, **__: None
    optimizer = make_optimizer(model.adapter.parameters(), learning_rate=1e-3, weight_decay=0.01)
    loader = datamodule.train_dataloader()

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()

    def step() -> int:
        usual, module_room.make_condition = module_room.make_condition, make_condition
        batch = next(batches)
        loss = model.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.adapter.parameters(), 1.0)
        optimizer.step()
        if model.averaged is not None:
            model.averaged.update(model.adapter)
        module_room.make_condition = usual
        return len(batch)

    return step


class patched:  # noqa: N801 - a context manager
    """Changes that no setting makes: "padded", "channels_last", or "" for none.

    Args:
        what: which.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        from msdiffusion.training import module

        self.original = (module.make_condition, module.MSDiffusionModule.configure_model)
        if self.what == "padded":
            module.make_condition = padded_condition
        elif self.what == "channels_last":
            configure = self.original[1]

            def configure_model(self: Any) -> None:
                import torch

                configure(self)
                self.backbone.unet.to(memory_format=torch.channels_last)

            module.MSDiffusionModule.configure_model = configure_model

    def __exit__(self, *_: object) -> None:
        from msdiffusion.training import module

        module.make_condition, module.MSDiffusionModule.configure_model = self.original


def padded_condition(adapter: Any, inputs: Any, drop_grounding: Any = None, **options: Any) -> Any:
    """The condition with the resampler run on all slots, as before subjects were packed."""
    tokens = adapter.resampler(
        inputs.image_tokens.float(), inputs.phrase_embeddings.float(), inputs.boxes, drop_grounding
    )
    return adapter.condition(tokens, inputs.boxes, **options)


def print_table(measured: dict[str, Measured], turns: int) -> None:
    """One row per variant: medians, spread, ratios to the plain loop."""
    import torch

    print(f"\n{turns} turn(s), load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {os.cpu_count()} cores\n")
    print("| variant | samples/s | from - to | x plain | CPU ms per sample | x plain | waiting |")
    print("|---|---|---|---|---|---|---|")
    base = measured.get("plain")
    for name, values in measured.items():
        rate, cpu = statistics.median(values.samples_per_second), statistics.median(values.cpu_milliseconds)
        ratios = ("", "")
        if base is not None:
            pairs = zip(values.samples_per_second, base.samples_per_second, strict=True)
            cpus = zip(base.cpu_milliseconds, values.cpu_milliseconds, strict=True)
            ratios = tuple(f"{statistics.median(a / b for a, b in both):.2f}" for both in (pairs, cpus))
        print(
            f"| {VARIANTS[name].title} | {rate:.1f} | {min(values.samples_per_second):.1f} - "
            f"{max(values.samples_per_second):.1f} | {ratios[0]} | {cpu:.1f} | {ratios[1]} | "
            f"{statistics.median(values.waiting):.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
