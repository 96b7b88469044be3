"""Worker processes that hold their models, work on one task at a time, and may hang or die without harm to others."""

import contextlib
import gc
import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

from data_pipeline.errors import MiningError

Task = TypeVar("Task")
Place = Any  # a shared integer: the number of the stage that a worker is in

# One task waits in the pipe while the worker has another in hand, so that it never waits for the parent.
TASKS_PER_WORKER = 2
# A larger task is not sent ahead: the pipe may be too small for it, and a worker that hangs would block the parent.
BYTES_SENT_AHEAD = 16_384
# A worker is replaced after so many: allocators keep a little of what every decoder and every model has used.
TASKS_UNTIL_REPLACED = 10_000


@dataclass(frozen=True)
class Failure:
    """A task that took its worker with it. stage: the number that the worker had written to its place."""

    kind: str
    """ "timeout" or "died"."""
    stage: int
    detail: str


@dataclass(eq=False)
class _Worker(Generic[Task]):
    process: Any
    connection: Connection
    place: Place
    ready: bool = False
    tasks: deque[Task] = field(default_factory=deque)
    fed: int = 0
    """Tasks that it has been given."""
    started: float = 0.0
    """When the task in hand was begun, or was next in the pipe."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: every collection during imports walks thousands of modules, hardly any garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _serve(make: Callable[[], Callable[[Any, Place], Any]], connection: Connection, place: Place) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        with uncollected():
            work = make()
    except MiningError as error:
        connection.send(("failed", error))
        return
    except Exception:
        connection.send(("failed", MiningError(f"a worker could not start:\n{traceback.format_exc()}")))
        return
    connection.send(("ready", None))
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the parent has been killed
            return
        place.value = 0
        try:
            result = work(task, place)
        except MiningError as error:  # nothing about this task: the disk is full, say
            connection.send(("failed", error))
            return
        with contextlib.suppress(OSError):  # the parent has been killed; the next recv says so
            connection.send(("done", result))


def run_pool(
    make: Callable[[], Callable[[Task, Place], Any]],
    tasks: Iterable[Task],
    *,
    workers: int,
    timeout: float,
    preload: tuple[str, ...] = (),
) -> Iterator[tuple[Task, Any]]:
    """Yields every task with its result, or with a ``Failure``, in the order in which they finish.

    make: called once in every worker, gives the function that does the work; both must pickle. timeout: seconds per
    task, after which its worker is replaced. preload: modules that are imported once for all workers, where the
    platform can. What ``make`` raises is raised here, and so is a MiningError that the work raises.
    """
    waiting = deque(tasks)
    context = _context(preload)
    pool: list[_Worker[Task]] = []
    try:
        pool = [_start(context, make) for _ in range(min(workers, len(waiting)))]
        while waiting or any(worker.tasks for worker in pool):
            for worker in pool:
                _feed(worker, waiting)
            for worker in _speaking(pool, timeout):
                outcome = _listen(worker)
                if outcome is None:
                    continue
                if not worker.tasks:  # it died with nothing in hand: no task has failed
                    pool[pool.index(worker)] = _replace(context, make, worker, waiting)
                    continue
                task = worker.tasks.popleft()
                worker.started = time.monotonic()
                if isinstance(outcome, Failure):
                    pool[pool.index(worker)] = _replace(context, make, worker, waiting)
                yield task, outcome
            for worker in [worker for worker in pool if worker.fed >= TASKS_UNTIL_REPLACED and not worker.tasks]:
                pool[pool.index(worker)] = _replace(context, make, worker, waiting)
            for worker in [worker for worker in pool if worker.tasks and time.monotonic() - worker.started > timeout]:
                if worker.ready and not worker.connection.poll():
                    task = worker.tasks.popleft()
                    failure = Failure("timeout", worker.place.value, f"stopped after {timeout:g} seconds")
                    pool[pool.index(worker)] = _replace(context, make, worker, waiting)
                    yield task, failure
    finally:
        for worker in pool:
            _stop(worker)


class Guard(Generic[Task]):
    """One worker that is asked one task at a time by a caller that waits, such as an actor on a cluster."""

    def __init__(self, make: Callable[[], Callable[[Task, Place], Any]], preload: tuple[str, ...] = ()) -> None:
        self._make, self._preload = make, preload
        self._worker: _Worker[Task] | None = None

    def work(self, task: Task, timeout: float) -> Any:
        """The result, or a ``Failure`` if the task hung or killed its worker, which is then replaced. MiningErrors of
        ``make`` and of the work are raised here.
        """
        if self._worker is None:
            self._worker = _start(_context(self._preload), self._make)
        worker = self._worker
        try:
            while not worker.ready:
                _listen(worker)
            worker.started = time.monotonic()
            worker.fed += 1
            with contextlib.suppress(OSError):  # it has died while it was idle: noticed below
                worker.connection.send(task)
            if worker.connection.poll(timeout):
                outcome = _listen(worker)
            else:
                outcome = Failure("timeout", worker.place.value, f"stopped after {timeout:g} seconds")
        except MiningError:
            self.close()
            raise
        if isinstance(outcome, Failure) or worker.fed >= TASKS_UNTIL_REPLACED:
            self.close()
        return outcome

    def close(self) -> None:
        """Ends the worker; the next task starts another."""
        if self._worker is not None:
            _stop(self._worker)
            self._worker = None


def _context(preload: tuple[str, ...]) -> Any:
    # Workers are forked from a server that is small, has one thread, and has done the slow imports; a plain fork
    # would copy whatever threads and locks the parent has.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["data_pipeline.server_start", "data_pipeline.run", *preload])
    return context


def _start(context: Any, make: Callable[[], Any]) -> _Worker:
    ours, theirs = context.Pipe()
    place = context.Value("i", 0, lock=False)
    process = context.Process(target=_serve, args=(make, theirs, place), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process=process, connection=ours, place=place)


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _replace(context: Any, make: Callable[[], Any], worker: _Worker, waiting: deque) -> _Worker:
    waiting.extendleft(reversed(worker.tasks))
    _stop(worker)
    return _start(context, make)


def _feed(worker: _Worker, waiting: deque) -> None:
    while waiting and worker.ready and len(worker.tasks) < TASKS_PER_WORKER and worker.fed < TASKS_UNTIL_REPLACED:
        if not worker.tasks:
            worker.started = time.monotonic()
        packed = ForkingPickler.dumps(waiting[0])
        if worker.tasks and len(packed) > BYTES_SENT_AHEAD:
            return
        worker.tasks.append(waiting.popleft())
        worker.fed += 1
        try:
            worker.connection.send_bytes(packed)
        except OSError:  # it has just died: noticed when its end of the pipe is read
            return


def _speaking(pool: list[_Worker], timeout: float) -> list[_Worker]:
    busy = [worker.started + timeout - time.monotonic() for worker in pool if worker.ready and worker.tasks]
    spoken = set(wait([worker.connection for worker in pool], timeout=max(0.0, min(busy, default=timeout)) + 0.01))
    return [worker for worker in pool if worker.connection in spoken]


def _listen(worker: _Worker) -> Any:
    """The result or the failure of the task in hand; None if the worker only said that it is ready."""
    try:
        kind, content = worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        if not worker.ready:
            raise MiningError(f"a worker died while it was starting (exit code {worker.process.exitcode})") from None
        return Failure("died", worker.place.value, f"exit code {worker.process.exitcode}")
    if kind == "failed":
        raise content
    if kind == "ready":
        worker.ready = True
        return None
    return content
