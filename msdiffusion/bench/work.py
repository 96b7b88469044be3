"""One unit of the world benchmark, `python -m msdiffusion.bench.work OUT ROW SEED`, started by `msdiffusion bench`.

Trains the row's adapter where that is not done, draws its pictures, measures them, and writes measures.json last.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdiffusion.bench.rows import ROWS, training_arguments
from msdiffusion.bench.units import Settings, Unit
from msdiffusion.errors import MSDiffusionError
from msdiffusion.evaluation.results import device, save_pictures
from msdiffusion.files import file_sha256, folder_sha256, write_json
from msdiffusion.places import CONFIGS, from_here, shown

if TYPE_CHECKING:
    from PIL import Image

    from msdiffusion.evaluation.world import WorldCase


VERSION = 1
"""Raised when measures.py or the drawing changes, so that old results are not taken for new ones."""
INSTRUMENTS = ("judge", "locator", "recognizer")
FROZEN = ("base/unet", "base/text_encoder", "base/text_encoder_2", "base/scheduler", "base/vae", "image_encoder")
"""Parts of the model folder that training and drawing depend on."""


def work(out: Path, unit: Unit) -> None:
    """Does what is left to do for a unit."""
    settings = Settings(**json.loads((out / "settings.json").read_text(encoding="utf-8")))
    folder = unit.folder(out)
    row = ROWS[unit.row]
    if row.training is not None:
        train(folder, unit, settings)
    inputs = fingerprint(out, unit, settings)
    done = folder / "measures.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["inputs"] == inputs:
        print("measured before, nothing has changed")
        return
    done.unlink(missing_ok=True)  # from here on its pictures are replaced
    from msdiffusion.backbone.backbone import quiet_loading
    from msdiffusion.evaluation.measures import Gallery, Instruments, measure_pictures, summarize_measures
    from msdiffusion.evaluation.world import draw_cases

    quiet_loading()
    start = time.monotonic()
    instruments = Instruments.from_pretrained(settings.model)
    cases = draw_cases(pictures=settings.pictures, seed=settings.seed)
    pictures = draw(cases, adapter_folder(out, unit, settings), settings, row.drawing, f"drawing {unit.row}")
    save_pictures(pictures, folder / "pictures")
    drawn = time.monotonic()
    measured = measure_pictures(cases, pictures, instruments, Gallery(instruments.recognizer))
    record = {
        "row": unit.row,
        "training_seed": unit.training_seed,
        "inputs": inputs,
        "device": device(),
        "seconds": {"drawing": round(drawn - start, 1), "measuring": round(time.monotonic() - drawn, 1)},
        "summary": summarize_measures(cases, measured),
        # NaN is no JSON: null where a measure doesn't apply
        "values": {
            name: [None if value != value else round(float(value), 5) for value in values]
            for name, values in measured.items()
        },
    }
    write_json(done, record)


def train(folder: Path, unit: Unit, settings: Settings) -> None:
    """Runs `lightning fit` for a row, or goes on with it; training.json means that it is complete.

    started.json says what the training depends on; it is written before the first step and compared ever after.

    Raises:
        MSDiffusionError: the training failed or was stopped, or what is there was trained on something else.
    """
    inputs = training_inputs(folder, unit, settings)
    started, done = folder / "started.json", folder / "training.json"
    if started.is_file():
        there = json.loads(started.read_text(encoding="utf-8"))
        if differing := [name for name in inputs if there.get(name) != inputs[name]]:
            raise MSDiffusionError(
                f"{shown(folder)} was trained on another state of: {', '.join(differing)}; give another --out, or "
                "remove that folder"
            )
    else:
        write_json(started, inputs)
    if done.is_file():
        return
    last = folder / "checkpoints" / "last.ckpt"
    resume = ["--ckpt_path", "last"] if last.is_file() else []
    config = from_here(CONFIGS / "msd.yaml")
    command = [sys.executable, "-m", "msdiffusion.training", "fit", "-c", config, *inputs["arguments"]]
    start = time.monotonic()
    status = subprocess.run([*command, *resume], check=False).returncode
    # A run that is told to stop saves its state and ends without an error.
    if status or finished_steps(last) < settings.steps:
        raise MSDiffusionError(f"the training ended at step {finished_steps(last)} of {settings.steps}; see above")
    if training_inputs(folder, unit, settings) != inputs:
        raise MSDiffusionError("base, config or pairs changed while the row was trained: remove its folder")
    write_json(done, {"resumed": bool(resume), "device": device(), "seconds": round(time.monotonic() - start, 1)})


def training_inputs(folder: Path, unit: Unit, settings: Settings) -> dict[str, Any]:
    """Everything that decides what a row learns: arguments, and hashes of config, frozen networks and pairs."""
    common = {
        "seed_everything": unit.training_seed,
        "trainer.default_root_dir": str(folder),
        "trainer.max_steps": settings.steps,
        "trainer.val_check_interval": settings.steps,
        "data.init_args.pairs": settings.pairs,
        "data.init_args.batch_size": settings.train_batch,
        "data.init_args.seed": unit.training_seed,
        "model.init_args.base_model": f"{settings.model}/base",
        "model.init_args.image_encoder": f"{settings.model}/image_encoder",
    }
    return {
        "arguments": training_arguments(ROWS[unit.row], common),
        "configs/msd.yaml": file_sha256(CONFIGS / "msd.yaml"),
        "frozen networks": {name: folder_sha256(Path(settings.model) / name) for name in FROZEN},
        "pairs": file_sha256(Path(settings.pairs) / "build.json"),
    }


def finished_steps(checkpoint: Path) -> int:
    """Optimizer steps in a Lightning checkpoint, 0 if there is none."""
    if not checkpoint.is_file():
        return 0
    import torch

    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def adapter_folder(out: Path, unit: Unit, settings: Settings) -> Path | None:
    """Where the adapter is that a unit draws with; None for the true renders."""
    source = ROWS[unit.row].adapter_of
    if source is None:
        return None
    return Path(settings.model) if source == "shipped" else Unit(source, unit.training_seed).folder(out) / "adapter"


def fingerprint(out: Path, unit: Unit, settings: Settings) -> dict[str, Any]:
    """What the measures of a unit depend on: when it changes, they are made again."""
    adapter = adapter_folder(out, unit, settings)
    model = Path(settings.model)
    facts: dict[str, Any] = {
        "version": VERSION,
        "settings": {name: getattr(settings, name) for name in ("pictures", "seed")},
        "instruments": {name: folder_sha256(model / name) for name in INSTRUMENTS},
    }
    if adapter is not None:
        facts["settings"] |= {"draw_batch": settings.draw_batch, "precision": settings.precision}
        facts["adapter"] = {name: file_sha256(adapter / name) for name in ("adapter.safetensors", "config.json")}
        facts["frozen"] = {name: folder_sha256(model / name) for name in FROZEN}
        facts["drawing"] = dict(ROWS[unit.row].drawing or {})
    return facts


def draw(
    cases: Sequence[WorldCase], adapter: Path | None, settings: Settings, drawing: Mapping[str, Any] | None, label: str
) -> list[Image.Image]:
    """One picture per case: the true renders, or what the adapter draws."""
    if adapter is None:
        return [case.truth for case in cases]
    from msdiffusion.evaluation.drawing import picture_maker
    from msdiffusion.generation.generate import MSDiffusion

    model = MSDiffusion.from_pretrained(adapter)
    batches = {"batch_size": settings.draw_batch, "precision": settings.precision}
    return picture_maker(model, label=label, **batches, **(drawing or {}))(cases)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 2 and a message where something is missing."""
    out, row, seed = sys.argv[1:] if arguments is None else arguments
    try:
        work(Path(out), Unit(row, int(seed)))
    except MSDiffusionError as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
