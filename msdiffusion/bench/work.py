"""One unit of the world benchmark, `python -m msdiffusion.bench.work OUT ROW SEED`, started by `msdiffusion bench`.

Trains the row's adapter where that is not done, draws its pictures, measures them, and writes measures.json last.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msdiffusion.bench.rows import ROWS, training_arguments
from msdiffusion.bench.world import Settings, Unit
from msdiffusion.errors import MSDiffusionError
from msdiffusion.places import REPOSITORY

if TYPE_CHECKING:
    from PIL import Image

    from msdiffusion.evaluation.world import WorldCase


def work(out: Path, unit: Unit) -> None:
    """Does what is left to do for a unit."""
    settings = Settings(**json.loads((out / "settings.json").read_text(encoding="utf-8")))
    folder = unit.folder(out)
    row = ROWS[unit.row]
    if row.training is not None:
        train(folder, unit, settings)
    adapter = adapter_folder(out, unit, settings)
    inputs = fingerprint(adapter, settings, row.drawing)
    done = folder / "measures.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8"))["inputs"] == inputs:
        print("measured before, nothing has changed")
        return
    from msdiffusion.backbone import quiet_loading
    from msdiffusion.evaluation.measures import Gallery, Instruments, measure_pictures, summarize_measures
    from msdiffusion.evaluation.world import draw_cases

    quiet_loading()
    start = time.monotonic()
    instruments = Instruments.from_pretrained(settings.model)
    cases = draw_cases(pictures=settings.pictures, seed=settings.seed)
    pictures = draw(cases, adapter, settings, row.drawing, f"drawing {unit.row}")
    for index, picture in enumerate(pictures):
        path = folder / "pictures" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    drawn = time.monotonic()
    measured = measure_pictures(cases, pictures, instruments, Gallery(instruments.recognizer))
    record = {
        "row": unit.row,
        "training_seed": unit.training_seed,
        "inputs": inputs,
        "seconds": {"drawing": round(drawn - start, 1), "measuring": round(time.monotonic() - drawn, 1)},
        "summary": summarize_measures(cases, measured),
        # NaN is no JSON: null where a measure doesn't apply
        "values": {
            name: [None if value != value else round(float(value), 5) for value in values]
            for name, values in measured.items()
        },
    }
    partial = done.with_suffix(".tmp")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(done)


def train(folder: Path, unit: Unit, settings: Settings) -> None:
    """Runs `lightning fit` for a row, or goes on with it; training.json means that it is complete.

    Raises:
        MSDiffusionError: the training failed, or was done with other weights of the base.
    """
    common = {
        "seed_everything": unit.training_seed,
        "trainer.default_root_dir": str(folder),
        "trainer.max_steps": settings.steps,
        "data.init_args.pairs": settings.pairs,
        "data.init_args.batch_size": settings.train_batch,
        "data.init_args.seed": unit.training_seed,
        "model.init_args.base_model": f"{settings.model}/base",
        "model.init_args.image_encoder": f"{settings.model}/image_encoder",
    }
    arguments = training_arguments(ROWS[unit.row], common)
    base = hashes(Path(settings.model), ("base/unet/diffusion_pytorch_model.safetensors",
                                         "image_encoder/model.safetensors"))  # fmt: skip
    done = folder / "training.json"
    if done.is_file():
        if json.loads(done.read_text(encoding="utf-8"))["frozen"] != base:
            raise MSDiffusionError(f"{folder} was trained on another base: give another --out, or remove it")
        return
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").is_file() else []
    command = [sys.executable, "-m", "msdiffusion.training", "fit", "-c", "configs/msd.yaml", *arguments, *resume]
    start = time.monotonic()
    if subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
        raise MSDiffusionError("the training failed; its message is above")
    record = {"arguments": arguments, "frozen": base, "seconds": round(time.monotonic() - start, 1)}
    done.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def adapter_folder(out: Path, unit: Unit, settings: Settings) -> Path | None:
    """Where the adapter is that a unit draws with; None for the true renders."""
    source = ROWS[unit.row].adapter_of
    if source is None:
        return None
    return Path(settings.model) if source == "shipped" else Unit(source, unit.training_seed).folder(out) / "adapter"


def fingerprint(adapter: Path | None, settings: Settings, drawing: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the measures of a unit depend on: when it changes, they are made again."""
    instruments = tuple(f"{name}/model.safetensors" for name in ("judge", "locator", "recognizer"))
    facts: dict[str, Any] = {
        "settings": {name: getattr(settings, name) for name in ("pictures", "seed")},
        "instruments": hashes(Path(settings.model), instruments),
    }
    if adapter is not None:
        facts["settings"] |= {"draw_batch": settings.draw_batch, "precision": settings.precision}
        facts["adapter"] = hashes(adapter, ("adapter.safetensors",))
        facts["base"] = hashes(Path(settings.model), ("base/unet/diffusion_pytorch_model.safetensors",))
        facts["drawing"] = dict(drawing or {})
    return facts


def hashes(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """sha256 of files; MSDiffusionError where one is missing."""
    for name in names:
        if not (folder / name).is_file():
            raise MSDiffusionError(f"{folder / name} is missing")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def draw(
    cases: Sequence[WorldCase],
    adapter: Path | None,
    settings: Settings,
    drawing: Mapping[str, Any] | None,
    label: str,
) -> list[Image.Image]:
    """One picture per case: the true renders, or what the adapter draws."""
    if adapter is None:
        return [case.truth for case in cases]
    from msdiffusion.evaluate import picture_maker
    from msdiffusion.generate import MSDiffusion

    model = MSDiffusion.from_pretrained(adapter)
    defaults = model.adapter.config.defaults
    options = {
        "scale": float(defaults.get("scale", 1.0)),
        "steps": defaults.get("steps", 30),
        "guidance_scale": float(defaults.get("guidance_scale", 7.5)),
        "batch_size": settings.draw_batch,
        "precision": settings.precision,
        **(drawing or {}),
    }
    return picture_maker(model, label=label, **options)(cases)


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
