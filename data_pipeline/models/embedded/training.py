"""The training loop that detector and segmenter share: plain, resumable, and the same whatever interrupts it.

What a step learns from depends on the seed and the number of the step only, so a run that is killed and goes on gives
the weights of a run that was not.
"""

import copy
import csv
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data_pipeline.errors import InputError, SettingsError

Losses = dict[str, Tensor]
"""Named parts of the loss, scalars; their sum is minimised."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train.

    steps: optimizer steps of the whole run. batch_size: frames of a step. learning_rate: peak, after ``warmup`` steps;
    then a cosine down to a hundredth. average: decay of the running mean of the weights, which is what is shipped.
    clip: largest norm of a gradient. save_every, log_every: in steps. seed: of the weights and of every batch.
    learns_from: what else decides the weights (the frames, the run to begin from), by name: plain numbers and texts
    that are recorded with the others, so that a run does not go on with another one's.
    """

    steps: int
    batch_size: int = 24
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: int = 200
    clip: float = 1.0
    average: float = 0.998
    save_every: int = 500
    log_every: int = 50
    seed: int = 0
    learns_from: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise SettingsError(f"average is the decay of a running mean, in [0, 1), got {self.average}")
        if not 0 <= self.seed < 2**63:
            raise SettingsError(f"seed must be a whole number from 0 to 2**63 - 1, got {self.seed}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, numbered from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def begin_from(model: nn.Module, folder: Path) -> None:
    """Gives a model the averaged weights of the run in ``folder``; InputError if its model has other sizes."""
    content = _read_state(folder / "state.pt")
    try:
        model.load_state_dict(content["average"])
    except RuntimeError as error:
        raise InputError(f"{folder} holds a run of a model of other sizes: {error}") from error


def describe_run(folder: Path) -> str:
    """How far the run in ``folder`` is, and a checksum of its averaged weights. InputError: its state does not open."""
    content = _read_state(folder / "state.pt")
    digest = hashlib.sha256()
    for name, value in sorted(content["average"].items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return f"step {content['step']}, weights {digest.hexdigest()[:12]}"


def check_resume(folder: Path, settings: TrainingSettings) -> None:
    """InputError if ``folder`` holds another run's state, or one that does not open. Quick: before any rendering."""
    path = folder / "state.pt"
    if path.is_file():
        _check_record(path, _read_state(path), settings)


def use_cores(count: int) -> None:
    """Lets torch compute on ``count`` processor cores. SettingsError for none."""
    if count < 1:
        raise SettingsError(f"training needs at least one processor core, got {count}")
    torch.set_num_threads(count)


def train(
    model: nn.Module,
    loss: Callable[[int], Losses],
    settings: TrainingSettings,
    folder: Path,
    *,
    initial: Path | None = None,
    stop_after: int | None = None,
    on_save: Callable[[nn.Module, int], str] | None = None,
) -> nn.Module:
    """Trains until ``settings.steps``, going on from ``folder``/state.pt if it is there; log.csv is beside it. Returns
    the averaged model, in evaluation mode; the weights of ``model`` are changed in place.

    loss: from the number of a step to the losses of its batch; it must depend on nothing else that is random.
    initial: folder of another run, see ``begin_from``. stop_after: return after this step, as if killed there; for
    tests. on_save: called with the averaged model and the step whenever the state is saved; its answer is printed.
    InputError if the folder holds the state of another run (other settings, ``learns_from`` among them, or a model of
    other sizes), or one that does not open.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if initial is not None:
        begin_from(model, initial)
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98))
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    step = _resume(folder / "state.pt", model, optimizer, average, settings)
    model.train()
    since, seen, sums = time.perf_counter(), 0, dict[str, float]()
    while step < settings.steps and (stop_after is None or step < stop_after):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        losses = loss(step)
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        step += 1
        _blend(average, model, min(settings.average, (1 + step) / (10 + step)))
        seen += 1
        for name, value in (*losses.items(), ("loss", total)):
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if step % settings.log_every == 0 or step == settings.steps:
            speed = seen * settings.batch_size / (time.perf_counter() - since)
            _log(folder / "log.csv", step, speed, {name: value / seen for name, value in sums.items()})
            since, seen, sums = time.perf_counter(), 0, {}
        if step % settings.save_every == 0 or step in (settings.steps, stop_after):
            states = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
            _save(folder / "state.pt", {"step": step, "settings": _record(settings), **states})
            if on_save is not None:
                tqdm.write(on_save(_averaged(model, average), step))
                model.train()
                since = time.perf_counter()
    return _averaged(model, average)


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Biases, norms and embeddings do not decay."""
    decayed = [value for value in model.parameters() if value.requires_grad and value.ndim >= 2]
    others = [value for value in model.parameters() if value.requires_grad and value.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def _blend(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    values = model.state_dict()
    floats = [name for name, value in values.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floats], [values[name] for name in floats], 1 - decay)


def _averaged(model: nn.Module, average: dict[str, Tensor]) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.load_state_dict(average)
    return twin.eval()


def _record(settings: TrainingSettings) -> dict[str, Any]:
    unrecorded = ("save_every", "log_every", "learns_from")
    kept = {name: value for name, value in vars(settings).items() if name not in unrecorded}
    return {**settings.learns_from, **kept}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is broken decides which of many unrelated errors comes out
        raise InputError(
            f"{path} does not open ({type(error).__name__}): delete it to begin anew, or put back a whole copy"
        ) from error
    needed = {"step", "settings", "model", "average", "optimizer"}
    if not isinstance(content, dict) or not content.keys() >= needed:
        raise InputError(f"{path} is not the state of a run, which holds {', '.join(sorted(needed))}: name another")
    return content


def _check_record(path: Path, content: Mapping[str, Any], settings: TrainingSettings) -> None:
    then, now = content["settings"], _record(settings)
    if not isinstance(then, dict):
        raise InputError(
            f"{path} does not tell what the run learned from, an older version wrote it: take another folder, or "
            "delete it to begin anew; --initial still reads it"
        )
    missing = object()
    changed = [name for name in sorted({*now, *then}) if now.get(name, missing) != then.get(name, missing)]
    if changed:
        lines = [f"  {name}: {then.get(name, 'absent')!r} then, {now.get(name, 'absent')!r} now" for name in changed]
        raise InputError(
            f"{path} belongs to a run with other settings; use those again, take another folder, or delete it to begin "
            "anew:\n" + "\n".join(lines)
        )


def _save(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    torch.save(content, partial)
    partial.replace(path)


def _resume(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    settings: TrainingSettings,
) -> int:
    if not path.is_file():
        return 0
    content = _read_state(path)
    _check_record(path, content, settings)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise InputError(f"{path} belongs to a model of other sizes; delete it to begin anew: {error}") from error
    optimizer.load_state_dict(content["optimizer"])
    for name, value in content["average"].items():
        average[name].copy_(value)
    return int(content["step"])


def _log(path: Path, step: int, speed: float, values: dict[str, float]) -> None:
    new = not path.is_file()
    row = {"step": step, "frames_per_second": round(speed, 1), **{name: round(v, 4) for name, v in values.items()}}
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    parts = " ".join(f"{name} {value:.3f}" for name, value in values.items())
    tqdm.write(f"step {step}: {speed:.0f} frames/s, {parts}")
