"""Tasks on a Ray cluster.

Ray moves the functions and starts the processes; everything that decides about an attempt is ours (`attempts`), because
Ray by itself can wait for minutes when a link is cut, and accepts what a worker sends whose node it has declared dead.
So each attempt is a Ray task without Ray's retries, workers report to an actor beside the driver, and whoever falls
silent or stands still is given up and replaced elsewhere.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

from ..errors import DfaissError, InvalidArgument, TaskFailed
from ..manifest import ShardTask
from .attempts import Attempt, AttemptRules, Attempts
from .ray_cluster import (
    FETCH_SECONDS,
    INLINE_BYTES,
    WAIT_SECONDS,
    Listener,
    RayCluster,
    bad_environment,
    first_line,
    mismatch,
    trace_of,
)
from .ray_worker import Answer, Beat
from .runner import Work, task_failed

__all__ = ["AttemptReport", "RayRunner"]

_log = logging.getLogger(__name__)

R = TypeVar("R")

# For attempts that are told to stop: time to end at their next block and to remove their temporary files.
_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptReport:
    """How one attempt of a task went.

    Parameters
    ----------
    ordinal : int
        Of the shard.
    attempt : int
        1 for the first attempt of a task.
    attempts : int
        How many of them had been made by then.
    twin : bool
        Whether it ran beside another attempt of the task.
    outcome : str
        ``"done"``; ``"lost"``: tried again; ``"beaten"``: its twin was faster; ``"failed"``: it ended the build.
    why : str
        Unless it is done.
    node, worker : str
        Id of the node; host and process. Empty if it was never heard of.
    seconds : float
        From its beginning at the worker; for one that was lost, as far as is known here.
    rows, num_bytes : int
        What it had finished.
    peak_bytes : int
        Most memory that its process held during the task; 0 if unknown.
    """

    ordinal: int
    attempt: int
    attempts: int
    twin: bool
    outcome: Literal["done", "lost", "beaten", "failed"]
    why: str
    node: str
    worker: str
    seconds: float
    rows: int
    num_bytes: int
    peak_bytes: int


class RayRunner:
    """Runs tasks on the workers of a Ray cluster.

    Which cluster, and how it is come by, is `RayCluster`'s.

    Parameters
    ----------
    num_workers : int
        Tasks at a time. A cluster that cannot run as many yet may grow: they wait in Ray's queue, where its autoscaler
        sees them.
    address : str, optional
        As ``ray.init`` takes it; by default what ``RAY_ADDRESS`` says, and without that a cluster is started.
    remote_args : mapping, optional
        Options of each Ray task: ``num_cpus`` (1; also the threads FAISS uses), ``memory``, ``resources``,
        ``runtime_env``, ... .
    task_deadline_seconds : float, optional
        A task that finishes nothing for so long is given up and tried elsewhere; `AttemptRules.stall_seconds`.
    rules : AttemptRules, optional
        All deadlines.

    Attributes
    ----------
    reports : list of AttemptReport
        One per attempt that has ended, in order of their ends.
    cluster : RayCluster
        Where they run.

    Raises
    ------
    ExtraMissing
        If Ray is not installed.
    InvalidArgument
        If an argument cannot be used.
    """

    def __init__(
        self,
        num_workers: int,
        address: str | None = None,
        remote_args: Mapping[str, Any] | None = None,
        *,
        task_deadline_seconds: float | None = None,
        rules: AttemptRules | None = None,
    ) -> None:
        if num_workers < 1:
            raise InvalidArgument(
                f"num_workers must be at least 1, not {num_workers}", parameter="num_workers", value=num_workers
            )
        rules = rules or AttemptRules()
        if task_deadline_seconds is not None:
            rules = replace(rules, stall_seconds=task_deadline_seconds)
        self.num_workers = num_workers
        self.cluster = RayCluster(address, remote_args or {}, rules)
        self.reports: list[AttemptReport] = []
        self._runs = 0

    def __enter__(self) -> RayRunner:
        self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Connect to the cluster, and look at every node that could run a task; again, this does nothing.

        Raises
        ------
        ClusterUnreachable
            If there is no cluster at the address.
        WorkerMismatch
            If a node lacks a package, or has other versions than this process.
        """
        self.cluster.connect()

    def close(self) -> None:
        """Give back what was taken; again, this does nothing."""
        self.cluster.close()

    def run(self, work: Work[R], tasks: Sequence[ShardTask]) -> Iterator[R]:
        """Run every task; see `Runner.run`.

        An error of this package that a worker raised comes as itself; its cause is a `TaskFailed` that names fragments
        and worker and has the worker's traceback.

        Raises
        ------
        ClusterUnreachable, WorkerMismatch
            As `connect`, and when no node has room for a task, or a node that joined later has other versions.
        """
        if not tasks:
            return
        self.connect()
        self._runs += 1
        yield from _Drive(self, work, tasks, self._runs).results()


@dataclass(slots=True, eq=False)
class _Flight:
    """An attempt on its way, as Ray knows it."""

    attempt: Attempt
    name: str
    ref: Any
    stop_by: float | None = None


class _Drive(Generic[R]):
    """One run: submits attempts, listens, and settles their ends."""

    def __init__(self, runner: RayRunner, work: Work[R], tasks: Sequence[ShardTask], run: int) -> None:
        self._runner = runner
        self._cluster = runner.cluster
        self._ray = runner.cluster.ray
        self._work = work
        self._tasks = tasks
        self._run = run
        rows = [task.physical_rows for task in tasks]
        self._attempts = Attempts(rows, runner.num_workers, runner.cluster.rules, gone=runner.cluster.gone())
        self._flights: dict[Any, _Flight] = {}
        self._leaving: dict[Any, _Flight] = {}
        self._listener = Listener(runner.cluster)
        self._recipe: Any = None

    def results(self) -> Iterator[R]:
        """Yield results until every task has one."""
        # By value: bytes stay bytes until the worker's versions are known to be right.
        self._recipe = self._ray.put(pickle.dumps(self._work.recipe()))
        try:
            while not self._attempts.done:
                self._submit()
                yield from self._settle()
                self._listen()
                self._end_leaving()
        finally:
            self._leave_all()

    def _submit(self) -> None:
        busy: dict[str, int] = {}
        for flight in self._flights.values():
            if flight.attempt.node is not None:
                busy[flight.attempt.node] = busy.get(flight.attempt.node, 0) + 1
        while (attempt := self._attempts.begin(time.monotonic())) is not None:
            data = pickle.dumps(self._tasks[attempt.task])
            task = data if len(data) <= INLINE_BYTES else self._ray.put(data)
            name = f"{self._run}.{attempt.ident}"
            ref = self._cluster.submit(self._recipe, task, name, attempt.avoid, busy)
            self._flights[ref] = _Flight(attempt, name, ref)
            if attempt.number > 1:
                _log.info("shard %d: attempt %d%s", self._ordinal(attempt), attempt.number, " (twin)" * attempt.twin)

    def _settle(self) -> Iterator[R]:
        """Wait a moment, and take the answers that have come."""
        # Not fetched to this node: over a cut link that could take for ever.
        ready, _ = self._ray.wait(list(self._flights), timeout=WAIT_SECONDS, fetch_local=False)
        for ref in ready:
            yield from self._take(self._flights[ref])

    def _take(self, flight: _Flight) -> Iterator[R]:
        attempt, errors = flight.attempt, self._ray.exceptions
        del self._flights[flight.ref]
        try:
            answer = self._ray.get(flight.ref, timeout=FETCH_SECONDS)
        except errors.RuntimeEnvSetupError as exc:
            raise bad_environment(exc) from exc
        except errors.TaskUnschedulableError:
            self._attempts.put_back(attempt.ident)  # the node that it was meant for has gone
        except errors.RayTaskError as exc:
            # Not the task's own error, which comes as an answer: our function could not even begin.
            raise self._failed(attempt, f"could not begin: {exc.cause}", trace_of(exc)) from exc
        except errors.RayError as exc:
            self._lose(flight, first_line(exc), cause=exc)
        else:
            yield from self._answered(attempt, answer)

    def _answered(self, attempt: Attempt, answer: Answer | tuple[str, dict[str, str]]) -> Iterator[R]:
        if isinstance(answer, tuple):
            raise mismatch(self._cluster.versions, dict([answer]))
        beat = answer.beat
        attempt.node, attempt.worker = beat.node, beat.worker
        if answer.kind in ("refused", "failed"):
            self._report(attempt, "failed", answer.cause, answer)
            failed = self._failed(attempt, f"failed on {beat.worker}: {answer.cause}", answer.trace)
            if answer.kind == "failed":
                raise failed
            error: DfaissError = pickle.loads(answer.payload)
            raise error from failed
        if answer.kind == "stopped":  # by itself: it had not reached the board for too long
            self._report(attempt, "lost", "it could not reach the driver", answer)
            self._retry(attempt, "it could not reach the driver", cut_off=True)
            return
        won = self._attempts.finished(attempt.ident, beat.rows, beat.num_bytes, answer.seconds)
        if won is None:
            self._report(attempt, "beaten", "another attempt was first", answer)
            return
        gain, losers = won
        self._report(attempt, "done", "", answer)
        beaten = {loser.ident for loser in losers}
        for flight in [flight for flight in self._flights.values() if flight.attempt.ident in beaten]:
            self._report(flight.attempt, "beaten", f"attempt {attempt.number} was first")
            self._ask_to_leave(flight)
        self._work.progressed(gain.rows, gain.num_bytes)
        result: R = pickle.loads(answer.payload)
        yield result

    def _listen(self) -> None:
        """Read the board, when it is time, and give up who is overdue."""
        beats = self._listener.hear()
        if beats is None:
            return
        now = time.monotonic()
        self._book(beats, now)
        silent, stalled, not_begun = self._attempts.look(now)
        rules = self._cluster.rules
        for attempt in silent:
            self._give_up(attempt, f"nothing was heard of it for {rules.silence_seconds:g} s", cut_off=True)
        for attempt in stalled:
            self._give_up(attempt, f"it made no progress for {rules.stall_seconds:g} s")
        if not_begun:
            self._submit_again(not_begun)
        if silent:
            # What was sent to the same host after its link was cut waits for Ray to notice, which may take minutes.
            self._take_back([attempt for attempt in self._attempts.running if attempt.begun is None])
        # Ray knows that a host is gone long before calls to it fail, if its link was cut.
        begun, not_begun = self._attempts.left_behind(self._cluster.gone())
        for attempt in begun:
            self._give_up(attempt, "its node has gone", cut_off=True)
        self._take_back(not_begun)

    def _book(self, beats: Mapping[str, Beat], now: float) -> None:
        """Take reports, and book what is new in them."""
        rows = num_bytes = 0
        for name, beat in beats.items():
            run, _, ident = name.partition(".")
            if int(run) == self._run:
                gain = self._attempts.heard(int(ident), beat.node, beat.worker, beat.rows, beat.num_bytes, now=now)
                rows += gain.rows
                num_bytes += gain.num_bytes
        if rows or num_bytes:
            self._work.progressed(rows, num_bytes)

    def _give_up(self, attempt: Attempt, why: str, *, cut_off: bool = False) -> None:
        flight = next(flight for flight in self._flights.values() if flight.attempt is attempt)
        del self._flights[flight.ref]
        self._cancel(flight)
        self._lose(flight, why, cut_off=cut_off)

    def _lose(self, flight: _Flight, why: str, *, cut_off: bool = False, cause: Exception | None = None) -> None:
        self._report(flight.attempt, "lost", why)
        self._retry(flight.attempt, why, cut_off=cut_off, cause=cause)

    def _retry(self, attempt: Attempt, why: str, *, cut_off: bool = False, cause: Exception | None = None) -> None:
        worker = attempt.worker or "a worker that was not heard of"
        _log.warning("shard %d: lost attempt %d on %s: %s", self._ordinal(attempt), attempt.number, worker, why)
        if self._attempts.lost(attempt.ident, f"{worker}: {why}", cut_off=cut_off):
            return
        losses = self._attempts.losses(attempt.task)
        raise task_failed(
            self._tasks[attempt.task],
            f"was lost {len(losses)} times: {'; '.join(losses)}",
            worker=worker,
            trace="",
            remedy="Workers that are killed are often out of memory: more shards, a smaller memory_budget_bytes, or"
            " ray_remote_args={'memory': ...} help; create_index keeps finished shards under resume=True",
        ) from cause

    def _submit_again(self, attempts: Sequence[Attempt]) -> None:
        """Take back what has not begun: it may wait for room, or hang on its way to a node that is cut off."""
        if not self._cluster.room():
            raise self._cluster.no_room()
        _log.warning("%d tasks wait for room in the cluster", len(attempts))
        self._take_back(attempts)

    def _take_back(self, attempts: Sequence[Attempt]) -> None:
        """Have attempts that never began wait for their turn again."""
        waiting = {attempt.ident for attempt in attempts}
        for flight in [flight for flight in self._flights.values() if flight.attempt.ident in waiting]:
            del self._flights[flight.ref]
            self._cancel(flight)
            self._attempts.put_back(flight.attempt.ident)

    def _ask_to_leave(self, flight: _Flight) -> None:
        self._flights.pop(flight.ref, None)
        self._cluster.board.stop.remote([flight.name])
        flight.stop_by = time.monotonic() + _GRACE_SECONDS
        self._leaving[flight.ref] = flight

    def _end_leaving(self) -> None:
        if not self._leaving:
            return
        gone, _ = self._ray.wait(list(self._leaving), num_returns=len(self._leaving), timeout=0, fetch_local=False)
        for ref in gone:
            del self._leaving[ref]
        now = time.monotonic()
        for flight in [each for each in self._leaving.values() if each.stop_by is not None and now > each.stop_by]:
            del self._leaving[flight.ref]
            self._cancel(flight)

    def _leave_all(self) -> None:
        """Stop what still runs: nobody waits for it."""
        if self._flights:
            # Who has begun is asked to leave, which takes a block's time; who has not, is not waited for.
            with suppress(self._ray.exceptions.RayError):
                self._book(self._ray.get(self._cluster.board.read.remote(), timeout=_GRACE_SECONDS), time.monotonic())
        for flight in list(self._flights.values()):
            if flight.attempt.begun is None:
                self._flights.pop(flight.ref)
                self._cancel(flight)
            else:
                self._ask_to_leave(flight)
        while self._leaving:
            self._ray.wait(list(self._leaving), timeout=WAIT_SECONDS, fetch_local=False)
            self._end_leaving()

    def _cancel(self, flight: _Flight) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.cancel(flight.ref, force=True)

    def _failed(self, attempt: Attempt, what: str, trace: str) -> TaskFailed:
        return task_failed(self._tasks[attempt.task], what, worker=attempt.worker, trace=trace)

    def _ordinal(self, attempt: Attempt) -> int:
        return self._tasks[attempt.task].ordinal

    def _report(
        self,
        attempt: Attempt,
        outcome: Literal["done", "lost", "beaten", "failed"],
        why: str,
        answer: Answer | None = None,
    ) -> None:
        begun = attempt.begun
        self._runner.reports.append(
            AttemptReport(
                ordinal=self._ordinal(attempt),
                attempt=attempt.number,
                attempts=self._attempts.made(attempt.task),
                twin=attempt.twin,
                outcome=outcome,
                why=why,
                node=attempt.node or "",
                worker=attempt.worker,
                seconds=answer.seconds if answer else 0.0 if begun is None else time.monotonic() - begun,
                rows=answer.beat.rows if answer else attempt.rows,
                num_bytes=answer.beat.num_bytes if answer else attempt.num_bytes,
                peak_bytes=answer.peak_bytes if answer else 0,
            )
        )
