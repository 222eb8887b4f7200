"""Keep account of what a build takes, and write it down beside what was built."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Generic, Protocol, TypeVar

from .._version import __version__
from ..errors import CorruptIndex, StorageError
from ..manifest import BuildReport, PhaseReport, ShardRecord, ShardTask, TaskReport, encode
from ..progress import PhaseMeter
from ..storage import Store
from .runner import Recipe, Work

__all__ = ["AttemptTime", "ReportBook", "TimedWork"]

_log = logging.getLogger(__name__)

R = TypeVar("R")


class AttemptTime(Protocol):
    """What is known of an attempt at a task that has ended."""

    @property
    def ordinal(self) -> int:
        """Of its shard."""

    @property
    def attempts(self) -> int:
        """How many there had been by then."""

    @property
    def outcome(self) -> str:
        """``"done"`` if its result counts."""

    @property
    def why(self) -> str:
        """How it ended otherwise."""

    @property
    def worker(self) -> str:
        """Who made it; empty if it was never heard of."""

    @property
    def seconds(self) -> float:
        """How long it took."""

    @property
    def peak_bytes(self) -> int:
        """Most memory that its process held during it; 0 if unknown."""


@dataclass(frozen=True, slots=True)
class _Here:
    """An `AttemptTime` of this process, which is attempted once."""

    ordinal: int
    seconds: float
    worker: str
    attempts: int = 1
    outcome: str = "done"
    why: str = ""
    peak_bytes: int = 0


class TimedWork(Generic[R]):
    """Does the work that it is given, and notes how long each task took that was done in this process.

    Parameters
    ----------
    work : Work
        What to do.
    """

    def __init__(self, work: Work[R]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._times: list[AttemptTime] = []

    def __call__(self, task: ShardTask, /) -> R:
        """Do one task."""
        started = time.perf_counter()
        result = self._work(task)
        spent = time.perf_counter() - started
        with self._lock:
            self._times.append(_Here(task.ordinal, spent, threading.current_thread().name))
        return result

    def stop(self) -> None:
        """Make the tasks that are running end soon."""
        self._work.stop()

    def recipe(self) -> Recipe[R]:
        """Return what another process needs to do the same work; who sends it there notes the times."""
        return self._work.recipe()

    def progressed(self, rows: int, num_bytes: int) -> None:
        """Book what another process has done."""
        self._work.progressed(rows, num_bytes)

    @property
    def times(self) -> Sequence[AttemptTime]:
        """Of the tasks that were done here."""
        return tuple(self._times)


class ReportBook:
    """The account of one run of a build; what happens elsewhere is entered by whoever knows.

    Parameters
    ----------
    executor : str
        ``"local"`` or ``"ray"``.
    workers : int
        Shards encoded at the same time, at the most.
    """

    def __init__(self, *, executor: str, workers: int) -> None:
        self._executor = executor
        self._workers = workers
        self._started = time.perf_counter()
        self._phases: list[PhaseReport] = []
        self._tasks: tuple[TaskReport, ...] = ()

    @property
    def seconds(self) -> list[tuple[str, float]]:
        """Time of each phase that has ended."""
        return [(phase.name, phase.seconds) for phase in self._phases]

    def end(self, meter: PhaseMeter) -> None:
        """Enter a phase that has ended."""
        self._phases.append(
            PhaseReport(
                name=meter.phase, seconds=round(meter.seconds, 3), rows=meter.rows, length_bytes=meter.num_bytes
            )
        )

    def enter_tasks(self, records: Sequence[ShardRecord], attempts: Iterable[AttemptTime]) -> None:
        """Enter the shards.

        Parameters
        ----------
        records : sequence of ShardRecord
            All of them, in order.
        attempts : iterable of AttemptTime
            All that were made at them in this run, in the order in which they ended.
        """
        made: dict[int, list[AttemptTime]] = {}
        for attempt in attempts:
            made.setdefault(attempt.ordinal, []).append(attempt)
        self._tasks = tuple(_task(record, made.get(record.ordinal, [])) for record in records)

    def write(self, store: Store, generation: str) -> None:
        """Write the report. Raises nothing of the store's: what it tells of is done, and needs no report.

        Parameters
        ----------
        store : Store
            Where generations lie.
        generation : str
            The one that was built.
        """
        report = BuildReport(
            generation=generation,
            attempt=uuid.uuid4().hex[:12],
            created_at=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            created_by=f"lance-dfaiss {__version__}",
            executor=self._executor,
            workers=self._workers,
            seconds=round(time.perf_counter() - self._started, 3),
            phases=tuple(self._phases),
            tasks=self._tasks,
        )
        try:
            store.write(report.file_name, encode(report))
        except (StorageError, CorruptIndex) as failure:
            _log.warning("the report of the build of generation %s could not be written: %s", generation, failure)


def _task(record: ShardRecord, attempts: Sequence[AttemptTime]) -> TaskReport:
    done = next((attempt for attempt in attempts if attempt.outcome == "done"), None)
    return TaskReport(
        ordinal=record.ordinal,
        rows=record.cover.physical_rows,
        length_bytes=sum(entry.length_bytes for entry in record.files),
        seconds=None if done is None else round(done.seconds, 3),
        attempts=max((attempt.attempts for attempt in attempts), default=0),
        worker=None if done is None else done.worker or "unknown",
        peak_bytes=None if done is None else done.peak_bytes or None,
        losses=tuple(
            f"{attempt.worker or 'never heard of'}: {attempt.outcome}{f', {attempt.why}' if attempt.why else ''}"
            for attempt in attempts
            if attempt is not done
        ),
    )
