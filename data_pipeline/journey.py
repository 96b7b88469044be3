"""A clip on its way through the steps, on any machine: what it has become so far, and what is said of it at the end."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.drawing import draw_preview
from data_pipeline.errors import MiningError, ModelNeededError
from data_pipeline.journal import Journal, fingerprint
from data_pipeline.pool import Failure
from data_pipeline.records import EncodedPair, Rejected, VideoFile
from data_pipeline.step import Step

UNEXPECTED, TOO_SLOW, DIED = "unexpected error", "took too long", "the worker died"
# Reasons that may be the machine's or the program's and not the clip's: such a clip is tried again by the next run.
TRY_AGAIN = frozenset({UNEXPECTED, TOO_SLOW, DIED})


@dataclass
class Branch:
    """One pair of a clip; before its frames are picked, the clip itself."""

    record: Any
    """What the last step made of it; ``Rejected`` once it has fallen out, ``EncodedPair`` at the end."""
    number: int = 0
    passed: int = 0
    """Steps that it has passed."""
    preview: bytes = b""
    """JPEG of the record before it was rejected, if its frames had been decoded."""

    @property
    def alive(self) -> bool:
        """False once it has been rejected."""
        return not isinstance(self.record, Rejected)


@dataclass
class Journey:
    """One clip: first one branch, then as many as it has pairs."""

    file: VideoFile
    branches: list[Branch] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    """What the records on the way said about the clip (``Video.notes``)."""
    fingerprint: str = ""
    """The clip as it was before it was opened."""
    stopped_by: MiningError | None = None
    """What stops the whole run and was met while this clip was in hand: a full disk, weights that don't fit. On a
    cluster it travels with the clip to whoever can stop the run.
    """

    def __post_init__(self) -> None:
        self.branches = self.branches or [Branch(self.file)]
        self.fingerprint = self.fingerprint or fingerprint(self.file)

    @property
    def alive(self) -> bool:
        """False once every pair has been rejected."""
        return any(branch.alive for branch in self.branches)

    def fail(self, failure: Failure, steps: Sequence[Step]) -> None:
        """Rejects whatever is still alive, because the clip took its worker with it in one of these steps."""
        reason = TOO_SLOW if failure.kind == "timeout" else DIED
        for branch in self.branches:
            if branch.alive:
                branch.record = Rejected(reason, {"detail": failure.detail}, steps[failure.stage].name)


def advance(step: Step, journeys: Sequence[Journey]) -> None:
    """Takes every living branch of the clips through one step, all in one batch.

    A step that makes several records of one (``pick_frames``) splits the branch. An error that nobody foresaw rejects
    the branch that set it off, with its traceback, and no other.
    """
    places = [(journey, branch) for journey in journeys for branch in journey.branches if branch.alive]
    if not places:
        return
    begun = time.perf_counter()
    results = _process(step, [branch.record for _, branch in places])
    share = (time.perf_counter() - begun) / len(places)
    for (journey, branch), result in zip(places, results, strict=True):
        journey.seconds[step.name] = round(journey.seconds.get(step.name, 0.0) + share, 6)
        if isinstance(result, Rejected):
            branch.preview = _preview(branch.record)
            branch.record = Rejected(result.reason, result.evidence, step.name)
            continue
        branch.record, *others = result if isinstance(result, tuple) else (result,)
        journey.notes.update(*(getattr(each, "notes", ()) for each in (branch.record, *others)))
        branch.passed += 1
        journey.branches += [Branch(record, number, branch.passed) for number, record in enumerate(others, start=1)]


def _process(step: Step, records: list[Any]) -> list[Any]:
    try:
        results = step.process_many(records)
        if len(results) != len(records):
            raise RuntimeError(f"{step.name} gave {len(results)} results for {len(records)} records")
        return results
    except ModelNeededError:
        raise
    except Exception:
        if len(records) > 1:
            return [result for record in records for result in _process(step, [record])]
        [record], caught = records, traceback.format_exc(limit=-6)
        error = caught.strip().rsplit("\n", 1)[-1]
        return [Rejected(UNEXPECTED, {"error": error, "caption": _caption(record), "traceback": caught})]


def _caption(record: Any) -> str:
    for name in ("frames", "video", "opened", "item"):  # NamedPair -> FramePair -> Video, CutItem -> OpenedItem -> item
        record = getattr(record, name, record)
    return getattr(record, "caption", None) or ""


def _preview(record: Any) -> bytes:
    try:
        return draw_preview(record)
    except Exception:  # what a clip was rejected for matters more than its picture
        return b""


def outcome(journey: Journey) -> EncodedPair | Rejected:
    """What became of the clip: the samples of all its pairs, or why the pair that came farthest was rejected."""
    kept = [branch.record for branch in journey.branches if branch.alive]
    if kept:
        return EncodedPair(
            samples=tuple(sample for pair in kept for sample in pair.samples),
            blocks=b"".join(pair.blocks for pair in kept),
            dropped=tuple(lost for pair in kept for lost in pair.dropped),
        )
    return max(journey.branches, key=lambda branch: (branch.passed, -branch.number)).record


def commit(journey: Journey, journal: Journal) -> Finished:
    """Leaves the outcome of a clip in the journal."""
    result = outcome(journey)
    if isinstance(result, Rejected):
        marker = {"kept": False, "stage": result.stage, "reason": result.reason, "evidence": dict(result.evidence)}
        first = max(journey.branches, key=lambda branch: (branch.passed, -branch.number))
        lost = [branch for branch in journey.branches if branch is not first]
        blocks, preview = b"", first.preview
    else:
        marker = {"kept": True, "samples": list(result.samples), "dropped": list(map(vars, result.dropped))}
        lost = [branch for branch in journey.branches if not branch.alive]
        blocks, preview = result.blocks, b""
    marker["lost_pairs"] = [
        {"number": branch.number, "stage": why.stage, "reason": why.reason, "evidence": dict(why.evidence)}
        for branch in lost
        if isinstance(why := branch.record, Rejected)
    ]
    marker["seconds"] = journey.seconds
    marker["notes"] = sorted(journey.notes)
    journal.commit(journey.file, marker, blocks=blocks, preview=preview, taken=journey.fingerprint)
    rejected = [branch.record for branch in journey.branches if not branch.alive]
    unexpected = next((why.evidence["traceback"] for why in rejected if why.reason == UNEXPECTED), "")
    return Finished(kept=marker["kept"], unexpected=unexpected)


@dataclass(frozen=True)
class Finished:
    """What a worker says about a finished clip."""

    kept: bool
    unexpected: str = ""
    """The traceback of an error that no step foresaw: a fault of the program, not of the clip."""


def travel(steps: Sequence[Step], journey: Journey, at: Callable[[int], None] = lambda number: None) -> Journey:
    """Takes one clip through steps that have been set up. at: told the number of each step before it begins."""
    for number, step in enumerate(steps):
        if not journey.alive:
            break
        at(number)
        advance(step, [journey])
    return journey
