"""Who carries out a build's tasks: a protocol, and the runner that uses this process's own threads.

A runner that uses other processes asks the work for its recipe, sends that, and opens it there.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

from ..engine import limit_threads
from ..errors import DfaissError, TaskFailed
from ..machine import usable_cores
from ..manifest import ShardTask
from ..progress import PhaseMeter

__all__ = ["LocalRunner", "LocalWork", "Recipe", "Runner", "TaskStopped", "Work", "task_failed"]

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class TaskStopped(Exception):
    """A task ended because it was told to; never seen outside a runner."""


class LocalWork(Protocol[R_co]):
    """What threads of this process do with each task."""

    def __call__(self, task: ShardTask, /) -> R_co:
        """Do one task; may run in another thread."""

    def stop(self) -> None:
        """Make the tasks that are running end soon, with `TaskStopped` or a result."""


class Work(LocalWork[R_co], Protocol[R_co]):
    """What any runner does with each task: other processes can do it too."""

    def recipe(self) -> Recipe[R_co]:
        """Return what another process needs to do the same work."""

    def progressed(self, rows: int, num_bytes: int, /) -> None:
        """Book what another process has done."""


class Recipe(Protocol[R_co]):
    """How another process comes to do the same work: small and picklable, without handles and without vectors."""

    def open(self, progressed: Callable[[int, int], None], /) -> Work[R_co]:
        """Open what the work needs, in the process that will do it.

        Parameters
        ----------
        progressed : callable
            Told rows and bytes while a task runs; from any thread.
        """


class Runner(Protocol):
    """Runs independent tasks somewhere."""

    def run(self, work: Work[R], tasks: Sequence[ShardTask]) -> Iterator[R]:
        """Run every task, and yield results as they finish, in any order.

        Parameters
        ----------
        work : Work
            Takes one task; may run in another thread.
        tasks : sequence of ShardTask
            What to run it on.

        Raises
        ------
        DfaissError
            The first error of this package that a task raised; tasks not yet begun are dropped.
        TaskFailed
            If a task raised anything else: fragments, worker, cause and traceback. What the caller's listener raises
            comes as it is.
        """


class LocalRunner:
    """Runs tasks on threads of this process; FAISS and Lance release the interpreter lock.

    Parameters
    ----------
    num_workers : int
        Tasks at a time. The machine's cores are divided among them.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers

    def run(self, work: LocalWork[R], tasks: Sequence[ShardTask]) -> Iterator[R]:
        """Run every task; see `Runner.run`."""
        workers = min(self._num_workers, len(tasks))
        if workers <= 1:
            for task in tasks:
                yield _attempt(work, task, worker="local")
            return
        yield from _run_threads(work, tasks, workers)


def _run_threads(work: LocalWork[R], tasks: Sequence[ShardTask], workers: int) -> Iterator[R]:
    share = max(usable_cores() // workers, 1)
    with ThreadPoolExecutor(workers, "dfaiss-build", initializer=limit_threads, initargs=(share,)) as pool:
        waiting = {pool.submit(_attempt, work, task, worker=f"local thread of {workers}") for task in tasks}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            # Left early (an error, Ctrl-C): nobody waits for shards that nobody will use.
            if waiting:
                work.stop()
            for future in waiting:
                future.cancel()


def _attempt(work: LocalWork[R], task: ShardTask, *, worker: str) -> R:
    try:
        return work(task)
    except (DfaissError, TaskStopped):
        raise
    except Exception as exc:
        if _is_the_listeners(exc):
            raise
        raise task_failed(
            task, f"failed on {worker}: {type(exc).__name__}: {exc}", worker=worker, trace=traceback.format_exc()
        ) from exc


def _is_the_listeners(exc: Exception) -> bool:
    """Tell whether an error comes from the caller's listener, which a task tells of its progress in its own thread."""
    # A meter does nothing else that could fail.
    return any(frame.f_code is PhaseMeter.add.__code__ for frame, _line in traceback.walk_tb(exc.__traceback__))


def task_failed(task: ShardTask, what: str, *, worker: str, trace: str, remedy: str = "") -> TaskFailed:
    """Return the error of a task that failed for another reason than an error of this package.

    Parameters
    ----------
    task : ShardTask
        The task.
    what : str
        Predicate of the message.
    worker : str
        Who did it.
    trace : str
        The worker's traceback; empty if there is none.
    remedy : str
        Other than to mend the cause.
    """
    return TaskFailed(
        f"shard {task.ordinal} (fragments {_span(task.fragment_ids)}) {what}",
        remedy=remedy or "Run it again once the cause is gone; create_index keeps finished shards under resume=True",
        task=f"shard {task.ordinal}",
        fragments=task.fragment_ids,
        worker=worker,
        worker_traceback=trace,
    )


def _span(ids: tuple[int, ...]) -> str:
    return str(ids[0]) if len(ids) == 1 else f"{ids[0]} to {ids[-1]}"
