"""Runs a list of steps on this machine, clip by clip, and leaves each clip's outcome in the journal."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from data_pipeline.errors import MiningError
from data_pipeline.journal import Journal
from data_pipeline.journey import TRY_AGAIN, Finished, Journey, commit, travel
from data_pipeline.pool import Failure, Place, run_pool, uncollected
from data_pipeline.records import VideoFile
from data_pipeline.safe_text import visible
from data_pipeline.step import Step

# Clips in a row that may end in an error that nobody foresaw.
MOST_UNEXPECTED = 50


def make_traveller(steps: Sequence[Step], threads: int | None = 1) -> Callable[[Journey, Place | None], Journey]:
    """Sets the steps up and returns the function that takes one clip through them.

    threads: 1 in a process of its own, where the processes are the parallelism; None leaves them to the caller.
    InputError if a step's device is not here.
    """
    from data_pipeline.models.threads import check_device, use_one_thread

    if threads == 1:
        use_one_thread()
    for step in steps:
        check_device(step.model_device)
        step.set_up()

    def go(journey: Journey, place: Place | None) -> Journey:
        def at(number: int) -> None:
            if place is not None:
                place.value = number

        return travel(steps, journey, at)

    return go


def make_worker(
    steps: Sequence[Step], journal: Journal, threads: int | None = None
) -> Callable[[VideoFile, Place | None], Finished]:
    """The function that mines one clip and commits it, see ``make_traveller``."""
    go = make_traveller(steps, threads)
    return lambda file, place: commit(go(Journey(file), place), journal)


def run(
    steps: Sequence[Step],
    files: Sequence[VideoFile],
    journal: Journal,
    *,
    workers: int,
    timeout: float,
    quiet: bool = False,
    work: tuple[str, str] = ("mining", "clip"),
) -> None:
    """Mines the clips that the journal has not finished yet, with a progress bar.

    workers: processes; 0 works in this one, and then nothing can stop a decoder that hangs. timeout: seconds per clip.
    work: what the progress bar calls the work and one piece of it.
    """
    finished, waiting = split_finished(files, journal)
    if not waiting:
        return
    show_progress(_results(steps, waiting, journal, workers, timeout), finished, len(files), quiet, work)


def preloads(steps: Sequence[Step]) -> tuple[str, ...]:
    """Modules that all workers can share by being forked with them. Nothing is shared if a model runs on a GPU: CUDA
    cannot be used in a process that was forked from one with torch in it.
    """
    if any(step.model_device.startswith("cuda") for step in steps):
        return ()
    return tuple(module for step in steps for module in step.preload)


def split_finished(files: Sequence[VideoFile], journal: Journal) -> tuple[list[Finished], list[VideoFile]]:
    """What the journal has of the clips, and the clips that are still to be mined: those it has not finished, and those
    that fell out for a reason that may not have been theirs.
    """
    finished, waiting = [], []
    for file in files:
        marker = journal.read(file)
        if marker is None or marker.get("reason") in TRY_AGAIN:
            waiting.append(file)
        else:
            finished.append(Finished(kept=marker["kept"]))
    return finished, waiting


def _results(
    steps: Sequence[Step], waiting: Sequence[VideoFile], journal: Journal, workers: int, timeout: float
) -> Iterable[tuple[str, Finished]]:
    if workers == 0:
        with uncollected():
            work = make_worker(steps, journal)
        yield from ((file.name, work(file, None)) for file in waiting)
        return
    make = partial(make_worker, steps, journal, threads=1)
    for file, result in run_pool(make, waiting, workers=workers, timeout=timeout, preload=preloads(steps)):
        if isinstance(result, Failure):
            journey = Journey(file)
            journey.fail(result, steps)
            result = commit(journey, journal)
        yield file.name, result


def show_progress(
    results: Iterable[tuple[str, Finished]],
    finished: Sequence[Finished],
    total: int,
    quiet: bool,
    work: tuple[str, str] = ("mining", "clip"),
) -> None:
    """Runs through the results (name of the clip, what its worker says) behind a progress bar.

    finished: what an earlier run has done of the ``total`` clips. work: see ``run``. The first unexpected error is
    shown in full; MiningError after MOST_UNEXPECTED in a row, which are the fault of the program or of the machine.
    """
    from tqdm import tqdm

    kept = sum(result.kept for result in finished)
    counts = {"kept": kept, "rejected": len(finished) - kept}
    shown, in_a_row = False, 0
    name_of_work, unit = work
    with tqdm(total=total, initial=len(finished), desc=name_of_work, unit=unit, disable=quiet, mininterval=0.5) as bar:
        for name, result in results:
            counts["kept" if result.kept else "rejected"] += 1
            in_a_row = in_a_row + 1 if result.unexpected else 0
            if in_a_row >= MOST_UNEXPECTED:
                raise MiningError(
                    f"{in_a_row} clips in a row ended in an unexpected error; the last one:\n{result.unexpected}\nWhen "
                    "it is mended, the same command tries these clips again"
                )
            if result.unexpected and not shown:
                shown = True
                bar.write(visible(f"{name} is rejected after an unexpected error:\n{result.unexpected}"))
            bar.set_postfix(counts, refresh=False)
            bar.update()
