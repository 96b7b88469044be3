"""Runs the list of steps on Ray Data: the same steps, the same journal, the same dataset as on one machine.

Neighbouring steps without a model share CPU actors, in which each clip is worked on by a guarded child process (a
decoder that hangs or dies takes one clip along). Every step with a model has a pool of actors of its own, with a share
of a GPU if it runs on one, and takes several clips in a batch. The last actors write to the journal, so ``OUT`` must
lie on a file system that all machines see. Shards, too, are written by the workers.
"""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.assemble import ShardPlan, write_shard
from data_pipeline.errors import InputError, MiningError, OutputError, SettingsError
from data_pipeline.extras import missing_extras
from data_pipeline.journal import Journal
from data_pipeline.journey import Finished, Journey, advance, commit
from data_pipeline.pool import Failure, Guard
from data_pipeline.records import VideoFile
from data_pipeline.run import make_traveller, preloads, show_progress, split_finished
from data_pipeline.step import Step


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where and how wide to run.

    address: "local" starts Ray on this machine, anything else is the address of a running cluster ("auto", "ray://...").
    workers: actors of every group of steps without a model. model_workers: actors of every step with a model.
    gpu_share: of one GPU, for each of these. batch_clips: clips in one batch of a model; 1 gives the bytes of a local
    run, more may change the last bit of a score. timeout: seconds per clip in a group without a model.
    """

    address: str
    workers: int = 2
    model_workers: int = 1
    gpu_share: float = 1.0
    batch_clips: int = 1
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name in ("workers", "model_workers", "batch_clips"):
            if getattr(self, name) < 1:
                raise SettingsError(f"on Ray {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.gpu_share <= 1:
            raise SettingsError(f"gpu_share must lie in (0, 1], got {self.gpu_share}")


def group_steps(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in order: neighbours without a model together, each with a model alone; the last must have none."""
    if steps[-1].model_device:
        raise SettingsError(f"the last step cannot have a model, but {steps[-1].name} has one")
    groups: list[list[Step]] = []
    for step in steps:
        if step.model_device or not groups or groups[-1][-1].model_device:
            groups.append([])
        groups[-1].append(step)
    return groups


# ------------------------------------------------------------------------------------------------------ in the workers


def enter(folder: str) -> None:
    """Works where the driver works, if that place is here too: settings may name files by relative paths."""
    with contextlib.suppress(OSError):
        os.chdir(folder)


class GuardedSteps:
    """An actor for steps without a model. Rows in: {"journey": Journey}.

    With a journal it is the last one: it leaves the outcomes there, and only names and verdicts go on to the driver.
    """

    def __init__(self, steps: Sequence[Step], folder: str, timeout: float, journal: Journal | None = None) -> None:
        enter(folder)
        self._steps, self._timeout, self._journal = steps, timeout, journal
        self._guard: Guard[Journey] = Guard(partial(make_traveller, steps), preloads(steps))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same rows, one group of steps later; in the last actor {"name", "kept", "unexpected"}."""
        journeys = [self._one(journey) for journey in batch["journey"]]
        if self._journal is None:
            return {"journey": _column(journeys)}
        return {"name": [journey.file.name for journey in journeys], **self._commit(journeys)}

    def _commit(self, journeys: Sequence[Journey]) -> dict[str, list[Any]]:
        verdicts: dict[str, list[Any]] = {"kept": [], "unexpected": [], "error": [], "error_class": []}
        for journey in journeys:
            finished = Finished(kept=False)
            if journey.stopped_by is None:
                try:
                    finished = commit(journey, self._journal)
                except MiningError as error:
                    journey.stopped_by = error
            stop = journey.stopped_by
            verdicts["kept"].append(finished.kept)
            verdicts["unexpected"].append(finished.unexpected)
            verdicts["error"].append("" if stop is None else str(stop))
            verdicts["error_class"].append("" if stop is None else type(stop).__name__)
        return verdicts

    def _one(self, journey: Journey) -> Journey:
        if not journey.alive or journey.stopped_by is not None:
            return journey
        try:
            result = self._guard.work(journey, self._timeout)
        except MiningError as error:
            journey.stopped_by = error
            return journey
        if isinstance(result, Failure):
            journey.fail(result, self._steps)
            return journey
        return result


class ModelStep:
    """An actor for one step with a model, which takes all clips of a batch at once."""

    def __init__(self, steps: Sequence[Step], folder: str) -> None:
        from data_pipeline.models.threads import check_device, use_one_thread

        enter(folder)
        [self._step] = steps
        if self._step.model_device == "cpu":
            use_one_thread()
        self._error: MiningError | None = None
        try:
            check_device(self._step.model_device)
            self._step.set_up()
        except MiningError as error:  # raised here, it would be lost among Ray's own
            self._error = error
        except Exception:
            self._error = MiningError(f"a worker could not start {self._step.name}:\n{traceback.format_exc()}")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The same rows, one step later."""
        journeys = list(batch["journey"])
        if self._error is None:
            advance(self._step, [journey for journey in journeys if journey.stopped_by is None])
        else:
            for journey in journeys:
                journey.stopped_by = journey.stopped_by or self._error
        return {"journey": _column(journeys)}


def _column(journeys: list[Journey]) -> Any:
    import numpy as np

    column = np.empty(len(journeys), dtype=object)
    column[:] = journeys
    return column


# ------------------------------------------------------------------------------------------------------- in the driver


def check_ray(options: RayOptions) -> None:
    """InputError if Ray is not installed; before anything heavy is done."""
    if told := missing_extras("ray"):
        raise InputError(f"--ray {options.address}: {told}")


def check_resources(options: RayOptions, groups: Sequence[Sequence[Step]], there: Mapping[str, float]) -> None:
    """InputError if the actors ask for more processors or GPUs than the cluster has: they would wait for ever.

    there: as ``ray.cluster_resources()`` gives it.
    """
    models = [group[0].model_device for group in groups if group[0].model_device]
    asked = {
        "CPU": float(options.workers * (len(groups) - len(models)) + options.model_workers * len(models)),
        "GPU": options.gpu_share * options.model_workers * sum(device.startswith("cuda") for device in models),
    }
    short = [
        f"{asked[name]:g} {name}s, but has {there.get(name, 0):g}" for name in asked if asked[name] > there.get(name, 0)
    ]
    if short:
        raise InputError(
            f"the actors need {'; '.join(short)} on Ray at {options.address!r}: lower --workers, --model-workers or "
            "--gpu-share, or take --device cpu"
        )


@contextlib.contextmanager
def ray_session(options: RayOptions, groups: Sequence[Sequence[Step]]) -> Iterator[None]:
    """A running Ray with room for all actors of these groups of steps, stopped at the end if we started it. InputError
    if there is no cluster at the address, or too small a one.
    """
    # What Ray says of its own workings would bury our progress bar; its log files have it all.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ours = not ray.is_initialized()
    if ours and options.address == "local":
        # Actors wait for each other's rows: each must have its (nominal) processor, whatever the machine has.
        processors = len(groups) * max(options.workers, options.model_workers) + 2
        ray.init(address="local", num_cpus=processors, **quiet)
    elif ours:
        try:
            ray.init(address=options.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot reach a Ray cluster at {options.address!r}: {error}") from error
    check_resources(options, groups, ray.cluster_resources())
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "ray"]:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def run_on_ray(
    steps: Sequence[Step], files: Sequence[VideoFile], journal: Journal, options: RayOptions, *, quiet: bool = False
) -> None:
    """Mines the clips that the journal has not finished yet. Needs a ``ray_session``."""
    import ray

    finished, waiting = split_finished(files, journal)
    if not waiting:
        return
    # Small blocks: rows go on to the next actors as soon as their block is through.
    blocks = min(len(waiting), max(4 * options.workers, len(waiting) // 32))
    rows = ray.data.from_items([{"journey": Journey(file)} for file in waiting], override_num_blocks=blocks)
    groups = group_steps(steps)
    for group in groups:
        device = group[0].model_device
        actors = options.model_workers if device else options.workers
        arguments: dict[str, Any] = {"steps": group, "folder": str(Path.cwd())}
        if not device:
            arguments |= {"timeout": options.timeout, "journal": journal if group is groups[-1] else None}
        rows = rows.map_batches(
            ModelStep if device else GuardedSteps,
            fn_constructor_kwargs=arguments,
            batch_size=options.batch_clips if device else 1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=options.gpu_share if device.startswith("cuda") else 0,
        )
    results = ((row["name"], _finished(row)) for row in rows.iter_rows())
    show_progress(results, finished, len(files), quiet)


def _finished(row: dict[str, Any]) -> Finished:
    """What the last actor says of a clip. Raises what stops the whole run."""
    if row["error"]:
        kinds = {kind.__name__: kind for kind in (InputError, OutputError, SettingsError)}
        raise kinds.get(row["error_class"], MiningError)(row["error"])
    return Finished(kept=bool(row["kept"]), unexpected=row["unexpected"])


def write_on_ray(journal: Journal, plans: Sequence[ShardPlan]) -> Iterator[dict[str, Any]]:
    """Writes the shards by the workers of the cluster, several at a time; their entries in the order of the plans."""
    import ray

    write = ray.remote(write_shard)
    for reference in [write.remote(journal, plan) for plan in plans]:
        try:
            yield ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MiningError):
                raise OutputError(str(error.cause)) from None
            raise
