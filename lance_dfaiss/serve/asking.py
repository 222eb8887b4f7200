"""One question to a cluster: asked of one replica of each group, at one snapshot, until there is an answer.

Runs on the event loop, by callbacks: a task for each query would cost more than asking it.
"""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import (
    AccessDenied,
    DeadlineExceeded,
    DfaissError,
    IndexNotFound,
    InvalidArgument,
    Overloaded,
    ProtocolError,
    SnapshotGone,
    TailTooLarge,
    Unavailable,
    UnknownColumn,
)
from .connection import Connection
from .fleet import Fleet, Replica, Way
from .routing import HEDGE_BURST_QUERIES, coverage_of, pick
from .wire import Buffer, Frame, Message

__all__ = ["Asking", "Call", "Part", "Settle", "unavailable"]

# Servers whose errors are told at once.
_REASONS = 8

# These are the caller's doing: another replica would say the same.
_CALLERS = (InvalidArgument, UnknownColumn, IndexNotFound, AccessDenied, TailTooLarge, DeadlineExceeded)

# These may pass when a server comes back, or another snapshot is offered.
_PASSING = (Unavailable, SnapshotGone)


class Settle(Protocol):
    """Where the outcome of a call goes: an asyncio.Future, or what a thread waits on."""

    def done(self) -> bool:
        """Tell whether nobody waits any more."""

    def set_result(self, result: Any, /) -> None:
        """Hand over the answer."""

    def set_exception(self, exception: BaseException, /) -> None:
        """Hand over an error."""


class Call:
    """One call of a user, waiting for its part of an answer.

    Parameters
    ----------
    key : object
        What is asked; calls of equal keys can be asked together.
    payload : bytes
        The queries, or row ids.
    n : int
        How many.
    seconds : float
        The time that there is.
    settle : Settle
        Where the outcome goes.
    """

    __slots__ = ("asking", "deadline", "key", "n", "payload", "seconds", "settle")

    def __init__(self, key: Any, payload: bytes, n: int, seconds: float, settle: Settle) -> None:
        self.key = key
        self.payload = payload
        self.n = n
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.settle = settle
        self.asking: Asking | None = None

    def leave(self) -> None:
        """Nobody waits for it any more. ``settle`` must be done."""
        if self.asking is not None:
            self.asking.left()


class _Attempt:
    """One request to one server."""

    __slots__ = ("connection", "part", "replica", "request_id", "sent_at")

    def __init__(self, part: Part, replica: Replica, connection: Connection, now: float) -> None:
        self.part = part
        self.replica = replica
        self.connection = connection
        self.sent_at = now
        self.request_id = 0

    def answered(self, frame: Frame) -> None:
        """Take the answer."""
        try:
            self.part.answered(self, frame)
        except ProtocolError:
            raise  # the connection's matter: it fails this, and all that it cannot be trusted with any more
        except Exception as exc:  # an edge, see `Asking.safely`
            self.part.asking.fail(exc)

    def failed(self, error: DfaissError) -> None:
        """Try elsewhere."""
        self.part.asking.safely(self.part.failed, self, error)

    def doubted(self) -> None:
        """Try elsewhere too."""
        self.part.asking.safely(self.part.doubted)


class Part:
    """What one group is asked: of one replica, of the next if that fails, of a second one if it takes too long."""

    __slots__ = ("asking", "attempts", "error", "group", "members", "start", "stop", "timer")

    def __init__(self, asking: Asking, group: int, members: Sequence[Replica], start: int, stop: int) -> None:
        self.asking = asking
        self.group = group
        self.members = members
        self.start = start
        self.stop = stop
        self.attempts: list[_Attempt] = []
        self.timer: asyncio.TimerHandle | None = None
        self.error: DfaissError | None = None

    @property
    def n(self) -> int:
        """Queries, or rows."""
        return self.stop - self.start

    def ask(self) -> bool:
        """Ask a replica that was not asked yet; False if there is none."""
        untried = self._untried()
        if not untried:
            return False
        asking, now = self.asking, time.monotonic()
        replica = pick(untried, now, random.random)
        connection = replica.connection()
        assert connection is not None
        message, payload = asking.message(self, max(asking.deadline - now, 0.001))
        attempt = _Attempt(self, replica, connection, now)
        attempt.request_id = connection.send(message, payload, attempt)
        # Noted once it is sent: what cannot be sent has no answer that would undo this.
        asking.tried.add((self.start, asking.at, replica, replica.session))
        self.attempts.append(attempt)
        replica.began(self.n, now)
        asking.fleet.asked()
        if self.timer is None and self.n <= HEDGE_BURST_QUERIES and len(untried) > 1:
            self._arm(asking.fleet.delay(asking.kind).seconds)
        return True

    def answered(self, attempt: _Attempt, frame: Frame) -> None:
        """Take the first answer; the others are not needed any more."""
        asking = self.asking
        value = asking.read(self, frame)
        now, n = time.monotonic(), self.n
        seconds = now - attempt.sent_at
        attempt.replica.ended(n)
        attempt.replica.answered(seconds, now)
        if n <= HEDGE_BURST_QUERIES:
            asking.fleet.delay(asking.kind).saw(seconds)
        self.attempts.remove(attempt)
        for other in self.attempts:
            if other.sent_at < attempt.sent_at:
                other.replica.overtaken(now - other.sent_at, now)
                other.replica.probe(other.connection, other.sent_at)
        self.end()
        asking.part_done(self, value)

    def failed(self, attempt: _Attempt, error: DfaissError) -> None:
        """Ask another replica, unless it is the caller's fault."""
        asking = self.asking
        if attempt not in self.attempts:
            return  # cancelled a moment ago, by the failure of another request on the same connection
        self.attempts.remove(attempt)
        attempt.replica.ended(self.n)
        if isinstance(error, _CALLERS):
            asking.fail(error)
            return
        self.error = error
        if isinstance(error, Overloaded):
            attempt.replica.refused(getattr(error, "retry_after_seconds", 0.0), time.monotonic())
        if isinstance(error, SnapshotGone):
            asking.fleet.forget(attempt.replica, asking.index, asking.at)
        if self.attempts:
            return
        if self.ask():
            asking.fleet.retries += 1
        else:
            asking.part_failed(self)

    def doubted(self) -> None:
        """Ask another replica, if all that were asked are silent. That is no hedge: it is done for dead servers."""
        if self.attempts and all(attempt.replica.suspect for attempt in self.attempts) and self.ask():
            self.asking.fleet.retries += 1

    def end(self) -> None:
        """Cancel whatever is under way."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        attempts, self.attempts = self.attempts, []
        for attempt in attempts:
            attempt.connection.cancel(attempt.request_id)
            attempt.replica.ended(self.n)
            attempt.replica.owes(attempt.connection)

    def why(self) -> DfaissError:
        """Return why there is no answer."""
        if self.error is None and any(replica.connected for replica in self.members):
            waiting = sum(replica.outstanding for replica in self.members)
            return Overloaded(
                f"{waiting} queries of this client wait for group {self.group}, as many as its servers take",
                remedy="Ask less at once",
                waiting=waiting,
                retry_after_seconds=0.05,
            )
        return self.error or Unavailable(f"no server of group {self.group} is there", groups=(self.group,))

    def _untried(self) -> list[Replica]:
        tried, at, start = self.asking.tried, self.asking.at, self.start
        found = []
        for replica in self.members:
            if not replica.draining and not replica.gone:
                fresh = (start, at, replica, replica.session) not in tried
                if fresh and replica.connection() is not None:
                    found.append(replica)
        return found

    def _arm(self, seconds: float) -> None:
        self.timer = self.asking.loop.call_later(seconds, self.asking.safely, self._hedge, seconds)

    def _hedge(self, seconds: float) -> None:
        """Ask another replica too, if that is not too much."""
        self.timer = None
        untried, now = self._untried(), time.monotonic()
        if not untried:
            return
        helpful = any(replica.may_help(now) for replica in untried)
        if not helpful or not self.asking.fleet.budget.spend(self.n) or not self.ask():
            self._arm(2 * seconds)


class Asking(ABC):
    """A question of one or more calls, asked together.

    Parameters
    ----------
    fleet : Fleet
        Whom to ask.
    index : str
        Name of the index.
    calls : list of Call
        Who waits.
    min_coverage : float or None
        Share of the rows that is enough, 0 to 1; None for all.
    """

    kind = ""
    """Answers of one kind take about equally long."""

    def __init__(self, fleet: Fleet, index: str, calls: list[Call], min_coverage: float | None) -> None:
        self.fleet = fleet
        self.loop = asyncio.get_running_loop()
        self.index = index
        self.calls = calls
        self.min_coverage = min_coverage
        self.at = ""
        self.tried: set[tuple[int, str, Replica, int]] = set()
        """First query, snapshot, server, and how often that had been connected to: whom not to ask again."""
        self.deadline = max(call.deadline for call in calls)
        self.n = sum(call.n for call in calls)
        self._way: Way | None = None
        self._open: list[Part] = []
        self._answers: dict[tuple[int, int], Any] = {}
        self._answered: dict[int, int] = {}
        self._chunks = 1
        self._left_out: set[int] = set()
        self._stuck: list[Part] = []
        self._parked = False
        self._over = False
        self._patience: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None

    # What a kind of question is.

    @abstractmethod
    def message(self, part: Part, seconds: float) -> tuple[Message, Sequence[Buffer]]:
        """Return what to send."""

    @abstractmethod
    def read(self, part: Part, frame: Frame) -> Any:
        """Return what was answered; `ProtocolError` if it makes no sense."""

    @abstractmethod
    def finish(self, answers: dict[tuple[int, int], Any]) -> None:
        """Settle all calls, given the answers by group and first query or row."""

    def chunk(self) -> int:
        """Return how many queries or rows go in one request."""
        return self.n

    def find(self) -> Way | None:
        """Return how to ask now."""
        return self.fleet.ways.get(self.index)

    @property
    def way(self) -> Way:
        """How it is asked; there is one once it is."""
        assert self._way is not None
        return self._way

    @property
    def coverage(self) -> float:
        """Share of the rows that those hold who are not left out."""
        return self._covered(self._left_out) if self._left_out else 1.0

    # What is done with it.

    def begin(self) -> None:
        """Ask."""
        for call in self.calls:
            call.asking = self
        self.fleet.askings.add(self)
        self.fleet.budget.earn(self.n)
        self._expire()  # first: from here on there is an end, whatever happens
        try:
            if not self._over:
                self._start(self.find())
        except Exception as exc:  # an edge, see `safely`
            self.fail(exc)

    def safely(self, step: Callable[..., None], *given: Any) -> None:
        """Take a step that the event loop asks for. An exception is the outcome of this question.

        Outside it would befall others, who are asked in the same turn of the loop, and those who wait for this would
        not learn of it.
        """
        try:
            step(*given)
        except Exception as exc:
            self.fail(exc)

    def part_done(self, part: Part, value: Any) -> None:
        """Take the answer of a group."""
        self._open.remove(part)
        self._answers[part.group, part.start] = value
        self._answered[part.group] = self._answered.get(part.group, 0) + 1
        if not self._open and not self._stuck:
            self._finish()

    def part_failed(self, part: Part) -> None:
        """Look for another way, once all replicas of a group have failed."""
        if self._retry(part):
            return
        error = part.why()
        if self._may_leave_out(part.group):
            self._leave_out(part.group)
            if not self._open and not self._stuck:
                self._finish()
        elif isinstance(error, _PASSING):
            self._open.remove(part)
            self._stuck.append(part)
            self._park()
        else:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Give all calls an error."""
        calls = [call for call in self.calls if not call.settle.done()]
        self._end()
        for call in calls:
            # Each its own: they are raised in different threads and tasks.
            own = error if len(calls) == 1 else _copied(error)
            call.settle.set_exception(own)

    def left(self) -> None:
        """Stop, if nobody waits any more."""
        if not self._over and all(call.settle.done() for call in self.calls):
            self._end()

    def _start(self, way: Way | None) -> None:
        if way is None or not self._enough(way):
            self._park()
            return
        self._cancel_parts()
        self._way, self.at = way, way.at
        self._answers, self._answered, self._left_out = {}, {}, set(way.route.missing)
        step = max(self.chunk(), 1)
        starts = range(0, max(self.n, 1), step)
        self._chunks = len(starts)
        self._open = [
            Part(self, group, members, start, min(start + step, self.n))
            for group, members in way.asked
            for start in starts
        ]
        for part in list(self._open):
            if self._way is not way or self._over:
                return
            if not part.ask():
                self.part_failed(part)
        if not self._open and not self._stuck and not self._over and self._way is way:
            self._finish()

    def _retry(self, part: Part) -> bool:
        """Ask a group again, or all of them at another snapshot, if there is somebody new to ask."""
        way = self.find()
        if way is None or not self._enough(way):
            return False
        if way.at == self.at:
            part.members = dict(way.asked).get(part.group, ())
            if part.ask():
                self.fleet.retries += 1
                return True
            return False
        self.fleet.retries += 1
        self._start(way)
        return True

    def _park(self) -> None:
        """Wait until the ways change; a server that was restarted is back in a moment."""
        if self._parked:
            return
        now = time.monotonic()
        grace = min(self.fleet.grace(self.index, now), max(self.deadline - now, 0.0))
        if grace <= 0:
            self._give_up()
            return
        self._parked = True
        self.fleet.waiting.add(self._changed)
        self._patience = self.loop.call_later(grace, self.safely, self._give_up)

    def _unpark(self) -> None:
        if self._parked:
            self._parked = False
            self.fleet.waiting.discard(self._changed)
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _changed(self) -> None:
        self.safely(self._try_again)

    def _try_again(self) -> None:
        """Ask again what is stuck."""
        way = self.find()
        if self._over or way is None or not self._enough(way):
            return
        if self._way is None or way.at != self.at:
            self._unpark()
            self._start(way)
            return
        for part in list(self._stuck):
            part.members = dict(way.asked).get(part.group, ())
            if part.ask():
                self._stuck.remove(part)
                self._open.append(part)
        if not self._stuck:
            self._unpark()

    def _give_up(self) -> None:
        errors = [part.why() for part in self._stuck]
        gone = next((error for error in errors if isinstance(error, SnapshotGone)), None)
        self.fail(gone or unavailable(self.fleet, self.index, tuple({part.group for part in self._stuck})))

    def _enough(self, way: Way) -> bool:
        if way.complete:
            return True
        return self.min_coverage is not None and way.route.coverage >= self.min_coverage

    def _covered(self, left_out: set[int]) -> float:
        route = self.way.route
        return coverage_of(route.offer.rows, (group for group in route.needed if group not in left_out))

    def _may_leave_out(self, *groups: int) -> bool:
        return self.min_coverage is not None and self._covered(self._left_out.union(groups)) >= self.min_coverage

    def _leave_out(self, group: int) -> None:
        self._left_out.add(group)
        for part in [part for part in self._open if part.group == group]:
            part.end()
            self._open.remove(part)
        self._stuck = [part for part in self._stuck if part.group != group]
        self._answers = {key: value for key, value in self._answers.items() if key[0] != group}

    def _finish(self) -> None:
        calls = [call for call in self.calls if not call.settle.done()]
        self._end()
        try:
            self.finish(self._answers)
        except Exception as exc:  # an edge: what does not fit together must reach the callers, not the event loop
            for call in calls:
                if not call.settle.done():
                    call.settle.set_exception(exc)

    def _expire(self) -> None:
        """Answer the calls whose time is over, and look again when that of the next is."""
        self._timer = None
        now = time.monotonic()
        waiting = [call for call in self.calls if not call.settle.done()]
        late = [call for call in waiting if call.deadline <= now]
        if late and self._way is not None and self.min_coverage is not None:
            unfinished = {part.group for part in (*self._open, *self._stuck)}
            if self._may_leave_out(*unfinished):
                # What came is enough; those who wait together have equal time when they take a part.
                for group in unfinished:
                    self._leave_out(group)
                self._finish()
                return
        for call in late:
            call.settle.set_exception(_too_late(call.seconds))
        if len(late) == len(waiting):
            self._end()
        else:
            first = min(call.deadline for call in waiting if call.deadline > now)
            self._timer = self.loop.call_later(first - now, self.safely, self._expire)

    def _cancel_parts(self) -> None:
        for part in self._open:
            part.end()
        self._open, self._stuck = [], []

    def _end(self) -> None:
        self._over = True
        self.fleet.askings.discard(self)
        self._cancel_parts()
        self._unpark()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for call in self.calls:
            call.asking = None


def unavailable(fleet: Fleet, index: str, failed: Sequence[int] = ()) -> Unavailable:
    """Return the error for an index that not enough servers answer for."""
    missing = fleet.missing(index, failed)
    groups = f"group {', '.join(map(str, missing.groups))}" if missing.groups else "it"
    shards = f", which holds {len(missing.shards)} shards ({', '.join(missing.shards[:4])})" if missing.shards else ""
    return Unavailable(
        f"index {index!r}: no server answers for {groups}{shards}; {missing.coverage:.1%} of the rows are left"
        + "".join(f"; {reason}" for reason in fleet.reasons(index)[:_REASONS]),
        remedy="See that the servers run, or pass allow_partial= to take what there is",
        groups=missing.groups,
        shards=missing.shards,
        coverage=missing.coverage,
    )


def _too_late(seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"there was no answer within {seconds:g} s", remedy="Pass a longer timeout=, or ask less", seconds=seconds
    )


def _copied(error: Exception) -> Exception:
    if not isinstance(error, DfaissError):
        return error  # a bug: nothing is known of how to copy it
    cls, arguments = error.__reduce__()[:2]
    copy: DfaissError = cls(*arguments)
    copy.__cause__ = error.__cause__
    return copy
