"""Runs a list of steps on this machine, clip by clip, and leaves each clip's outcome in the journal."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_pipeline.drawing import draw_preview
from data_pipeline.journal import Journal
from data_pipeline.pool import Failure, Place, run_pool
from data_pipeline.records import ClipError, Dropped, EncodedPair, Rejected, VideoFile
from data_pipeline.step import Step


@dataclass(frozen=True)
class Finished:
    """What a worker says about a finished clip."""

    kept: bool
    unexpected: str = ""
    """The traceback of an error that no step foresaw: a fault of the program, not of the clip."""


def mine_clip(steps: Sequence[Step], file: VideoFile, place: Place | None = None) -> tuple[dict[str, Any], Any, Any]:
    """Takes one clip through the steps, which have been set up.

    place: where to leave the number of the step in hand. Returns the marker for the journal, the outcome
    (``EncodedPair`` or ``Rejected``) and the last record before it.
    """
    record: Any = file
    before: Any = file
    seconds: dict[str, float] = {}
    for number, step in enumerate(steps):
        if place is not None:
            place.value = number
        begun = time.perf_counter()
        before = record
        try:
            record = step.process(record)
        except ClipError as error:
            record = Rejected(error.reason, error.evidence)
        except Exception:
            record = Rejected("unexpected error", {"traceback": traceback.format_exc(limit=-6)})
        seconds[step.name] = round(time.perf_counter() - begun, 6)
        if isinstance(record, Rejected):
            record = Rejected(record.reason, record.evidence, step.name)
            break
    return {**_describe(record), "seconds": seconds}, record, before


def _describe(outcome: EncodedPair | Rejected) -> dict[str, Any]:
    if isinstance(outcome, Rejected):
        return {"kept": False, "stage": outcome.stage, "reason": outcome.reason, "evidence": dict(outcome.evidence)}
    return {
        "kept": True,
        "samples": list(outcome.samples),
        "dropped": [_as_dict(dropped) for dropped in outcome.dropped],
    }


def _as_dict(dropped: Dropped) -> dict[str, Any]:
    return {
        "phrase": dropped.phrase,
        "stage": dropped.stage,
        "reason": dropped.reason,
        "evidence": dict(dropped.evidence),
    }


def make_worker(steps: Sequence[Step], journal: Journal) -> Callable[[VideoFile, Place | None], Finished]:
    """Sets the steps up and returns the function that mines one clip and commits it."""
    for step in steps:
        step.setup()

    def work(file: VideoFile, place: Place | None) -> Finished:
        marker, outcome, before = mine_clip(steps, file, place)
        if isinstance(outcome, Rejected):
            journal.commit(file, marker, preview=draw_preview(before))
            return Finished(kept=False, unexpected=outcome.evidence.get("traceback", ""))
        journal.commit(file, marker, blocks=outcome.blocks)
        return Finished(kept=True)

    return work


def run(
    steps: Sequence[Step],
    files: Sequence[VideoFile],
    journal: Journal,
    *,
    workers: int,
    timeout: float,
    quiet: bool = False,
) -> None:
    """Mines the clips that the journal has not finished yet, with a progress bar.

    workers: processes; 0 works in this one, and then nothing can stop a decoder that hangs. timeout: seconds per clip.
    """
    from tqdm import tqdm

    finished = {file.key: marker["kept"] for file in files if (marker := journal.read(file)) is not None}
    waiting = [file for file in files if file.key not in finished]
    if not waiting:
        return
    counts = {"kept": sum(finished.values()), "rejected": len(finished) - sum(finished.values())}
    unexpected = 0
    make = partial(make_worker, steps, journal)
    if workers == 0:
        work = make()
        results = ((file, work(file, None)) for file in waiting)
    else:
        preload = tuple(module for step in steps for module in step.preload)
        results = run_pool(make, waiting, workers=workers, timeout=timeout, preload=preload)
    with tqdm(
        total=len(files), initial=len(finished), desc="mining", unit="clip", disable=quiet, mininterval=0.5
    ) as bar:
        for file, result in results:
            if isinstance(result, Failure):
                reason = "took too long" if result.kind == "timeout" else "the worker died"
                stage = steps[result.stage].name
                rejected = Rejected(reason, {"detail": result.detail}, stage)
                journal.commit(file, {**_describe(rejected), "seconds": {}})
                result = Finished(kept=False)
            counts["kept" if result.kept else "rejected"] += 1
            if result.unexpected:
                unexpected += 1
                if unexpected == 1:
                    bar.write(f"{file.name} is rejected after an unexpected error:\n{result.unexpected}")
            bar.set_postfix(counts, refresh=False)
            bar.update()
