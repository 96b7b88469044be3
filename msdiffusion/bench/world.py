"""`msdiffusion bench world`: every row trained, drawn and measured on equal terms; resumable; one table at the end.

A row and training seed is one unit of work with a folder of its own. It is done by a process of its own (`bench.work`),
so several can run side by side, and whatever is finished is never done again as long as what it depends on is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipeline.safe_text import visible
from msdiffusion.bench.rows import ROWS
from msdiffusion.bench.units import Settings, Unit, plan_units
from msdiffusion.errors import DataError, MSDiffusionError, WeightsError
from msdiffusion.files import write_json
from msdiffusion.places import shown

CLIPS = 6000
"""World clips that pairs are mined from, where there are none yet."""


def run(options: argparse.Namespace) -> None:
    """Works through all units, then writes table, comparisons and grid.

    Raises:
        MSDiffusionError: a unit failed; its log is named.
        DataError: `--out` holds results of other settings.
    """
    out = options.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the units are ended too
    settings = Settings.from_options(options)
    units = plan_units(options.rows, options.training_seeds)
    check_model(options.model)
    check_settings(out, settings)
    if any(ROWS[unit.row].training is not None for unit in units):
        ensure_pairs(Path(settings.pairs))
    started = time.monotonic()
    work_through(units, out, options.jobs)
    from msdiffusion.bench.document import write_document
    from msdiffusion.evaluation.results import command_line

    document = options.document or out / "world_benchmark.md"
    finished = finished_units(out, settings, options.training_seeds)
    write_document(document.resolve(), out, settings, finished, command_line())
    print(f"{visible(shown(document))}: {len(units)} units, {time.monotonic() - started:.0f} s")


def check_model(model: Path) -> None:
    """Raise WeightsError, which names the first part that is missing, unless a folder is like the embedded model."""
    networks = ("image_encoder", "judge", "locator", "recognizer")
    for name in ("base/model_index.json", *(f"{network}/model.safetensors" for network in networks)):
        if not (model / name).is_file():
            raise WeightsError(f"--model must be a folder like checkpoints/tiny, but {shown(model / name)} is missing")


def check_settings(out: Path, settings: Settings) -> None:
    """Writes settings.json in a new folder; raises DataError in an old one where it says otherwise, naming where."""
    path = out / "settings.json"
    asked = asdict(settings)
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        pairs = [(name, there.get(name), value) for name, value in asked.items()]
        if differing := [f"{name}: there {old!r}, asked {new!r}" for name, old, new in pairs if old != new]:
            raise DataError(
                f"{shown(out)} holds results of other settings ({'; '.join(differing)}): give another --out, or remove "
                "it"
            )
        return
    write_json(path, asked)


def check_pairs(pairs: Path, *, may_mine: bool) -> None:
    """Raise where a folder that somebody named holds no finished dataset: 6,000 clips would be rendered for it.

    Args:
        pairs: ``--pairs``.
        may_mine: it is the default's place, where they are mined if they are missing.

    Raises:
        DataError: says what to do.
    """
    if may_mine or (pairs / "build.json").is_file():
        return
    why = "is a file" if pairs.is_file() else "holds no build.json" if pairs.is_dir() else "is no folder"
    raise DataError(
        f"--pairs must be a dataset that data_pipeline.build has finished, but {shown(pairs)} {why}; without --pairs "
        f"it is mined from {CLIPS} clips"
    )


def ensure_pairs(pairs: Path) -> None:
    """Mines pairs from fresh world clips where there are none; build.json is written last, so it means complete."""
    if (pairs / "build.json").is_file():
        return
    clips = pairs.parent / "clips"
    for arguments in (
        ("data_pipeline.world", "--out", str(clips), "--count", str(CLIPS)),
        ("data_pipeline.build", "--videos", str(clips), "--out", str(pairs)),
    ):
        print(f"$ python -m {visible(shlex.join(arguments))}", flush=True)
        if subprocess.run([sys.executable, "-m", *arguments], check=False).returncode:
            raise MSDiffusionError(f"python -m {arguments[0]} failed; its message is above")


def work_through(units: Sequence[Unit], out: Path, jobs: int) -> None:
    """Runs the units, `jobs` at a time, those they need first; shows what each is doing.

    Raises:
        MSDiffusionError: one ended with an error, after the others that were running have ended too.
    """
    from tqdm import tqdm

    waiting: list[Unit] = list(units)
    running: dict[Unit, subprocess.Popen[bytes]] = {}
    failed: list[Unit] = []
    # In a log every refresh is a line.
    refresh_seconds, shown_at = (1.0 if sys.stderr.isatty() else 60.0), -math.inf
    try:
        with tqdm(total=len(units), desc="rows", unit="row") as bar:
            while waiting or running:
                for unit in list(waiting):
                    if len(running) >= jobs or failed:
                        break
                    if unit.needs in waiting or unit.needs in running:
                        continue
                    waiting.remove(unit)
                    running[unit] = _start(unit, out, one_thread=jobs > 1)
                for unit, process in list(running.items()):
                    if process.poll() is not None:
                        del running[unit]
                        failed += [unit] if process.returncode else []
                        bar.update()
                if failed and not running:
                    break
                words = "; ".join(f"{unit.row}: {_last_words(unit.folder(out))}" for unit in running)
                bar.set_postfix_str(words[:150], refresh=False)
                if time.monotonic() - shown_at >= refresh_seconds:
                    bar.refresh()
                    shown_at = time.monotonic()
                time.sleep(0.5)
    finally:
        for process in running.values():  # only after an interruption
            _stop(process)
    if failed:
        log = failed[0].folder(out) / "log.txt"
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
        raise MSDiffusionError(f"row {failed[0].row} failed; the end of {shown(log)}:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a unit and the training that it may have started: they are one process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def _start(unit: Unit, out: Path, one_thread: bool) -> subprocess.Popen[bytes]:
    folder = unit.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if one_thread else {})
    command = [sys.executable, "-m", "msdiffusion.bench.work", str(out), unit.row, str(unit.training_seed)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def _last_words(folder: Path) -> str:
    """The newest line of a unit's log, or of its bar."""
    log = folder / "log.txt"
    if not log.is_file():
        return "starting"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:70] for line in reversed(lines) if line.strip()), "starting")


def finished_units(out: Path, settings: Settings, training_seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Row to the measures.json of the asked training seeds, in the order of ROWS.

    A row is left out, and that is said, where a seed is missing or where weights have changed since it was measured.
    """
    from msdiffusion.bench.work import fingerprint

    found = {}
    for row in ROWS:
        if not (out / "rows" / row).is_dir():
            continue
        records = []
        wanted = [unit for unit in plan_units([row], training_seeds) if unit.row == row]
        for unit in wanted:
            path = unit.folder(out) / "measures.json"
            record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            if record is not None and record["inputs"] == fingerprint(out, unit, settings):
                records.append(record)
        if len(records) == len(wanted):
            found[row] = records
        else:
            seeds = f"{len(records)} of {len(wanted)} seeds"
            print(f"left out of the table: {row}, measured for {seeds} on today's weights")
    return found
