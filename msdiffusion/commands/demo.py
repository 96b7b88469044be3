"""`msdiffusion demo`: the whole loop on this machine. Clips, mining, fine-tuning, pictures, scores, and a page.

The first three stages are the commands that anybody would type, run as processes and shown before they run.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.safe_text import visible
from msdiffusion.commands.evaluate import OFF, ON, check_common, tell_results
from msdiffusion.errors import DataError, MSDiffusionError, WeightsError
from msdiffusion.files import place_of
from msdiffusion.places import CONFIGS, DEFAULT_MODEL, find_model, from_here, shown

MARKER = ".msdiffusion-demo"
"""Written first, so that a later run knows the folder for its own and may clear it."""
FINE_TUNED = "fine_tuned"
BATCH_SIZE = 8


@dataclass(frozen=True)
class Stage:
    """One step of the demo: what it does, how long it takes on two idle CPU cores, and the work."""

    title: str
    seconds: int
    work: Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """Everything a demo needs to know; paths are absolute."""

    out: Path
    model: Path
    clips: int
    train_steps: int
    subjects: int
    seed: int

    @property
    def videos(self) -> Path:
        """Folder of the rendered clips."""
        return self.out / "clips"

    @property
    def pairs(self) -> Path:
        """Folder of the mined dataset."""
        return self.out / "pairs"

    @property
    def train_batch(self) -> int:
        """Pairs per fine-tuning step: 16, or fewer where few clips are mined, since some of them give no pair."""
        return max(1, min(16, self.clips // 3))

    @property
    def adapter(self) -> Path:
        """Folder of the fine-tuned adapter."""
        return self.out / "fine_tuning" / "adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `msdiffusion demo`; imports nothing heavy."""
    add = parser.add_argument
    add("--out", type=place_of, required=True, metavar="FOLDER", help="an earlier demo in it is replaced")
    add("--model", type=place_of, default=DEFAULT_MODEL, help="folder of the adapter to start from")
    add("--clips", type=int, default=60, help="clips to write and mine (default 60)")
    add("--train-steps", type=int, default=30, help="fine-tuning steps (default 30)")
    add("--subjects", type=int, default=40, help="least number of held-out subjects to draw (default 40)")
    add("--seed", type=int, default=0, help="of clips, subject sets and noise")
    parser.set_defaults(run=run, extras=("mining", "training", "evaluation"))


def run(options: argparse.Namespace) -> None:
    """Runs all stages and leaves index.html, grid.png and scores.json in `options.out`.

    Raises:
        RequestError: a number is out of range, or nothing can be written to ``--out``.
        WeightsError: there are no weights to start from.
        DataError: the folder holds something that no demo made.
        MSDiffusionError: a stage failed; the message holds its command.
    """
    check_common(options, "clips", "train_steps", "subjects")
    plan = Plan(
        out=options.out.resolve(),
        model=Path(find_model(options.model)).resolve(),
        **{name: getattr(options, name) for name in ("clips", "train_steps", "subjects", "seed")},
    )
    check_model(plan.model)
    clear(plan.out)
    commands = stage_commands(plan)
    stages = [
        Stage(f"writing {plan.clips} clips of held-out subjects", 5, lambda: call(commands["clips"])),
        Stage("mining pairs from the clips", 15, lambda: call(commands["mining"])),
        Stage(
            f"fine-tuning the adapter for {plan.train_steps} steps",
            50,
            lambda: fine_tune(plan, commands["fine-tuning"]),
        ),
        Stage("drawing and scoring pictures of other held-out subjects", 100, lambda: draw_and_score(plan, commands)),
    ]
    run_stages(stages)
    print(f"\nDone. Open {visible(shown(plan.out / 'index.html'))} in a browser.")


def run_stages(stages: Sequence[Stage]) -> None:
    """Runs the stages in order, with a line before and after each: which one, how long it should take, what is left."""
    begun = time.monotonic()
    for number, stage in enumerate(stages, 1):
        left = sum(later.seconds for later in stages[number - 1 :])
        print(
            f"\n[{number}/{len(stages)}] {stage.title} (about {stage.seconds} s; {left} s to go, on two idle cores)",
            flush=True,
        )
        start = time.monotonic()
        stage.work()
        now = time.monotonic()
        print(f"[{number}/{len(stages)}] took {now - start:.0f} s, {now - begun:.0f} s since the start", flush=True)


def check_model(model: Path) -> None:
    """Raise WeightsError, which names what is missing, unless `model` has what the demo starts from."""
    for name in ("adapter.safetensors", "config.json", "judge/model.safetensors"):
        if not (model / name).is_file():
            raise WeightsError(f"the demo starts from trained weights, but {shown(model / name)} is missing")


def clear(out: Path) -> None:
    """Makes `out` an empty folder of a demo; an earlier demo in it is removed, anything else is left alone.

    Raises:
        DataError: `out` is a folder with something in it that no demo made.
    """
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise DataError(f"{shown(out)} isn't empty and no demo made it: give another --out, or empty it yourself")
        for entry in out.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("made by `msdiffusion demo`; the next one may clear this folder\n", encoding="utf-8")


def stage_commands(plan: Plan) -> dict[str, list[str]]:
    """The command of every stage that is a process, as argument lists; paths as seen from here."""
    out, python, model = from_here, sys.executable, "--model.init_args"
    return {
        "clips": [
            *(python, "-m", "data_pipeline.world", "--out", out(plan.videos), "--count", str(plan.clips)),
            *("--split", "held_out", "--seed", str(plan.seed)),
        ],
        # The clips bring their annotations along; the learned detector and segmenter don't look at them.
        "mining": [
            *(python, "-m", "data_pipeline.build", "--videos", out(plan.videos), "--out", out(plan.pairs)),
            *("--detector", "embedded", "--segmenter", "embedded"),
        ],
        "fine-tuning": [
            *(python, "-m", "msdiffusion.training", "fit", "-c", out(CONFIGS / "msd.yaml")),
            *("--trainer.default_root_dir", out(plan.adapter.parent), "--trainer.max_steps", str(plan.train_steps)),
            *("--data.init_args.pairs", out(plan.pairs), "--data.init_args.batch_size", str(plan.train_batch)),
            *(f"{model}.adapter", out(plan.model), f"{model}.base_model", out(plan.model / "base")),
            *(f"{model}.image_encoder", out(plan.model / "image_encoder")),
            # These shape a new adapter; the one we go on from brings its own.
            *(f"{model}.resampler", "null", f"{model}.defaults", "null"),
            *(f"{model}.reference_background", "null", f"{model}.reference_fit", "null"),
            # So few steps must not wander off: a tenth of the full run's rate, and the plain weights are kept.
            *(f"{model}.learning_rate", "1e-4", f"{model}.warmup_steps", "0", f"{model}.ema_decay", "0"),
        ],
    }


def fine_tune(plan: Plan, command: Sequence[str]) -> None:
    """Runs the training command and makes sure that it left an adapter."""
    call(command)
    if not (plan.adapter / "adapter.safetensors").is_file():
        raise MSDiffusionError(f"the fine-tuning ended without an adapter in {shown(plan.adapter)}")


def call(command: Sequence[str]) -> None:
    """Shows a command and runs it; its output goes straight to the terminal.

    Raises:
        MSDiffusionError: it could not be started, or ended with an error.
    """
    line = readable(command)
    print(f"$ {visible(line)}", flush=True)
    try:
        status = subprocess.run(list(command), check=False).returncode
    except OSError as error:
        raise MSDiffusionError(f"could not start this command: {line}\n{error}") from error
    if status != 0:
        how = f"ended with status {status}, its message is above" if status > 0 else f"was killed by signal {-status}"
        raise MSDiffusionError(f"the demo stops: this command {how}: {line}")


def readable(command: Sequence[str]) -> str:
    """A command as one would type it: programs without the path of their environment."""
    return shlex.join([Path(command[0]).name, *command[1:]])


def draw_and_score(plan: Plan, commands: dict[str, list[str]]) -> None:
    """Pictures of held-out subjects with the shipped adapter, the fine-tuned one and none; scores, grid and page."""
    from msdiffusion.backbone.backbone import quiet_loading
    from msdiffusion.evaluation.drawing import picture_maker, picture_side
    from msdiffusion.evaluation.instruments.judge import Judge
    from msdiffusion.evaluation.results import describe_file, evaluate
    from msdiffusion.evaluation.world import draw_cases
    from msdiffusion.generation.generate import MSDiffusion

    quiet_loading()
    started = time.monotonic()
    judge = Judge.from_pretrained(plan.model / "judge")
    shipped = MSDiffusion.from_pretrained(plan.model)
    tuned = MSDiffusion.from_pretrained(plan.adapter)
    side = picture_side(shipped)
    # Another seed than that of `msdiffusion evaluate` and of the clips: other subjects, layouts and noise.
    cases = draw_cases(plan.subjects, seed=plan.seed + 1000, size=side)
    settings = {**shipped.adapter.config.drawing(), "batch_size": BATCH_SIZE}
    scale = settings.pop("scale")
    makers = {
        ON: picture_maker(shipped, scale=scale, label="adapter on (shipped)", **settings),
        FINE_TUNED: picture_maker(tuned, scale=scale, label="adapter fine-tuned just now", **settings),
        OFF: picture_maker(shipped, scale=0.0, label="adapter off", **settings),
    }
    report = evaluate(
        plan.out,
        cases,
        makers,
        judge,
        pairs=[(ON, OFF), (FINE_TUNED, OFF)],
        title="MS-Diffusion, the whole loop",
        introduction=introduction(plan),
        facts={
            **{f"{name} command": readable(command) for name, command in commands.items()},
            "model": describe_file(plan.model / "adapter.safetensors"),
            "fine_tuned model": describe_file(plan.adapter / "adapter.safetensors"),
            "judge": describe_file(plan.model / "judge" / "model.safetensors"),
            "settings": {**settings, "scale": scale, "seed": plan.seed + 1000, "split": "held_out", "size": side},
        },
        started=started,
        links={
            "The mined pairs, and why others were rejected": "pairs/report.html",
            "What the fine-tuning drew of held-out pairs": "fine_tuning/pictures",
        },
    )
    tell_results(plan.out, report)


def introduction(plan: Plan) -> str:
    """What the page says above its figures, in plain words."""
    return (
        f"This page was made from nothing but what comes with the package: {plan.clips} captioned clips of invented "
        "subjects were written, pairs were mined from them by a small detector and a small segmenter that saw nothing "
        "but the videos and their captions, the adapter was fine-tuned on the pairs for "
        f"{plan.train_steps} steps, and the pictures below were drawn and scored.\n\n"
        "adapter on: the shipped adapter, which has never seen these subjects, nor their combinations of category, "
        "colours and pattern. fine tuned: the same adapter after the few steps of this demo, which show that training "
        "runs; they are far too few to make it better, and their clips show held-out combinations. "
        "adapter off: the bare base model, which gets the prompt but neither references nor boxes. true renders: the "
        "subjects drawn by the world itself in the same boxes, so what the judge gets wrong there is the judge's own "
        "limit."
    )
