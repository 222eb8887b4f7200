"""Which task is tried next, when an attempt is lost, and when it gets a twin: decisions alone, no I/O.

A task is attempted once; again, elsewhere, when its worker is lost; and a second time at the same time when it is far
slower than the others and no other task waits. The first result of a task wins. Time is told by the caller, so that
nothing here depends on a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from statistics import median

__all__ = ["Attempt", "AttemptRules", "Attempts", "Gain", "Pulse"]

# A look at the workers that comes later than this is the driver's own pause (overload, a laptop that slept): time in
# which nobody listened is not held against them.
_LONGEST_STEP_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRules:
    """When an attempt is given up.

    Parameters
    ----------
    max_retries : int
        Attempts of a task that may be lost before its build fails, less one.
    silence_seconds : float
        A worker that has begun, and is not heard of for so long, is lost. Workers tell of themselves each half second.
    stall_seconds : float
        A worker that is heard of, but has finished no row and no byte for so long, is lost. Writing a shard finishes
        none until all of it is written.
    start_seconds : float
        A task that has not begun so long after it was submitted is submitted again; it is not lost.
    twin_factor : float
        A task that takes so many times longer than tasks of its size gets a twin.
    twin_seconds : float
        No task gets a twin earlier.
    """

    max_retries: int = 3
    silence_seconds: float = 60.0
    stall_seconds: float = 900.0
    start_seconds: float = 300.0
    twin_factor: float = 2.0
    twin_seconds: float = 20.0


class Pulse:
    """How long nothing was heard of whom.

    Parameters
    ----------
    limit_seconds : float
        Who is quiet for longer is overdue.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._quiet: dict[int, float] = {}
        self._looked: float | None = None

    def heard(self, ident: int) -> None:
        """Take a sign of life."""
        self._quiet[ident] = 0.0

    def forget(self, ident: int) -> None:
        """Expect nothing more of it."""
        self._quiet.pop(ident, None)

    def overdue(self, now: float) -> set[int]:
        """Return who is overdue; call it after the signs up to now were taken."""
        step = 0.0 if self._looked is None else min(max(now - self._looked, 0.0), _LONGEST_STEP_SECONDS)
        self._looked = now
        self._quiet = {ident: quiet + step for ident, quiet in self._quiet.items()}
        return {ident for ident, quiet in self._quiet.items() if quiet > self._limit}


@dataclass(frozen=True, slots=True)
class Gain:
    """What a task has done for the first time; twins and retries repeat what was counted before."""

    rows: int = 0
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt of one task.

    Attributes
    ----------
    ident : int
        Different for each attempt.
    task : int
        Position of the task.
    number : int
        1 for the first attempt of a task.
    avoid : frozenset of str
        Nodes where it should not run, if there are others.
    twin : bool
        Whether another attempt of the task was running when it was made.
    node : str or None
        Where it runs; None before it is heard of.
    worker : str
        Host and process, once it is heard of.
    begun : float or None
        When it was heard of first.
    rows, num_bytes : int
        What it has finished.
    """

    ident: int
    task: int
    number: int
    avoid: frozenset[str]
    twin: bool
    submitted: float
    node: str | None = None
    worker: str = ""
    begun: float | None = None
    rows: int = 0
    num_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Task:
    rows: int
    attempts: int = 0
    done: bool = False
    running: list[Attempt] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)
    losses: list[str] = field(default_factory=list)
    counted_rows: int = 0
    counted_bytes: int = 0


class Attempts:
    """The state of all tasks of one run.

    Parameters
    ----------
    rows : sequence of int
        Size of each task.
    slots : int
        Attempts at the same time.
    rules : AttemptRules
        When one is given up.
    gone : set of str, optional
        Nodes that had gone before.
    """

    def __init__(self, rows: Sequence[int], slots: int, rules: AttemptRules, *, gone: Set[str] = frozenset()) -> None:
        self._tasks = [_Task(count) for count in rows]
        self._waiting = deque(range(len(rows)))
        self._slots = slots
        self._rules = rules
        self._running: dict[int, Attempt] = {}
        self._idents = 0
        self._heard = Pulse(rules.silence_seconds)
        self._moved = Pulse(rules.stall_seconds)
        self._cut_off: set[str] = set()
        self._gone = set(gone)
        self._pace: list[float] = []

    @property
    def done(self) -> bool:
        """Whether every task has a result."""
        return all(task.done for task in self._tasks)

    @property
    def running(self) -> tuple[Attempt, ...]:
        """Attempts that were submitted and have not ended."""
        return tuple(self._running.values())

    def losses(self, task: int) -> tuple[str, ...]:
        """Return why each lost attempt of a task was lost."""
        return tuple(self._tasks[task].losses)

    def made(self, task: int) -> int:
        """Return how many attempts of a task were made so far."""
        return self._tasks[task].attempts

    def begin(self, now: float) -> Attempt | None:
        """Return the attempt to submit next; None while there is nothing to do, or no slot.

        Parameters
        ----------
        now : float
            Seconds.
        """
        if len(self._running) >= self._slots:
            return None
        if self._waiting:
            return self._submit(self._waiting.popleft(), now)
        slowest = self._straggler(now)
        return None if slowest is None else self._submit(slowest, now)

    def heard(self, ident: int, node: str, worker: str, rows: int, num_bytes: int, *, now: float) -> Gain:
        """Take a report of a worker.

        Parameters
        ----------
        ident : int
            Of the attempt; one that has ended is ignored.
        node, worker : str
            Where it runs.
        rows, num_bytes : int
            What it has finished so far.
        now : float
            Seconds.

        Returns
        -------
        Gain
            What is new in it for the whole run.
        """
        attempt = self._running.get(ident)
        if attempt is None:
            return Gain()
        self._heard.heard(ident)
        if attempt.begun is None or rows > attempt.rows or num_bytes > attempt.num_bytes:
            self._moved.heard(ident)
        if attempt.begun is None:
            attempt.begun = now
        attempt.node, attempt.worker = node, worker
        self._tasks[attempt.task].nodes.add(node)
        attempt.rows, attempt.num_bytes = max(rows, attempt.rows), max(num_bytes, attempt.num_bytes)
        return self._count(attempt)

    def finished(
        self, ident: int, rows: int, num_bytes: int, seconds: float
    ) -> tuple[Gain, tuple[Attempt, ...]] | None:
        """Take a result.

        Parameters
        ----------
        ident : int
            Of the attempt.
        rows, num_bytes : int
            What it has finished in all.
        seconds : float
            How long it ran.

        Returns
        -------
        tuple of (Gain, tuple of Attempt), or None
            What is new in it, and the attempts of the same task that are not needed any more. None if the task has a
            result already.
        """
        attempt = self._end(ident)
        if attempt is None or self._tasks[attempt.task].done:
            return None
        task = self._tasks[attempt.task]
        attempt.rows, attempt.num_bytes = max(rows, attempt.rows), max(num_bytes, attempt.num_bytes)
        gain = self._count(attempt)
        task.done = True
        self._pace.append(seconds / max(task.rows, 1))
        losers = tuple(other for other in task.running if other is not attempt)
        for loser in losers:
            self._end(loser.ident)
        task.running.clear()
        return gain, losers

    def lost(self, ident: int, why: str, *, cut_off: bool = False) -> bool:
        """Take the loss of an attempt; the task will be tried again.

        Parameters
        ----------
        ident : int
            Of the attempt.
        why : str
            For the error, should it come to one.
        cut_off : bool
            Whether its node went silent, so that other tasks avoid it too.

        Returns
        -------
        bool
            False if the task was lost too often: the run has failed.
        """
        attempt = self._end(ident)
        if attempt is None:
            return True
        task = self._tasks[attempt.task]
        task.running.remove(attempt)
        task.losses.append(why)
        if cut_off and attempt.node is not None:
            self._cut_off.add(attempt.node)
        if task.running:
            return True  # its twin goes on
        # First in the line: the others have not lost any time yet.
        self._waiting.appendleft(attempt.task)
        return len(task.losses) <= self._rules.max_retries

    def put_back(self, ident: int) -> None:
        """Take back an attempt that never began; it counts as none."""
        attempt = self._end(ident)
        if attempt is None:
            return
        task = self._tasks[attempt.task]
        task.running.remove(attempt)
        task.attempts -= 1
        if not task.running:
            self._waiting.append(attempt.task)

    def look(self, now: float) -> tuple[tuple[Attempt, ...], tuple[Attempt, ...], tuple[Attempt, ...]]:
        """Return the attempts that are overdue; call it after the reports up to now were taken.

        Parameters
        ----------
        now : float
            Seconds.

        Returns
        -------
        silent, stalled, not_begun : tuple of Attempt
            See `AttemptRules`. The caller ends them, and says `lost` or `put_back`.
        """
        silent = self._heard.overdue(now)
        stalled = self._moved.overdue(now) - silent
        late = {
            ident
            for ident, attempt in self._running.items()
            if attempt.begun is None and now - attempt.submitted > self._rules.start_seconds
        }
        return self._named(silent), self._named(stalled), self._named(late)

    def left_behind(self, gone: Set[str]) -> tuple[tuple[Attempt, ...], tuple[Attempt, ...]]:
        """Return the attempts that nodes which have gone since the last call leave behind.

        Parameters
        ----------
        gone : set of str
            All nodes that have gone so far.

        Returns
        -------
        begun, not_begun : tuple of Attempt
            Those that ran there; and those not heard of yet, which may have been on their way there. The caller ends
            them, and says `lost` or `put_back`.
        """
        news = gone - self._gone
        self._gone |= news
        # Nothing more is sent there anyway; but sent as before, a task would wait with those that hang on their way.
        self._cut_off |= news
        if not news:
            return (), ()
        begun = tuple(attempt for attempt in self.running if attempt.node in news)
        return begun, tuple(attempt for attempt in self.running if attempt.begun is None)

    def _named(self, idents: set[int]) -> tuple[Attempt, ...]:
        return tuple(self._running[ident] for ident in sorted(idents))

    def _end(self, ident: int) -> Attempt | None:
        self._heard.forget(ident)
        self._moved.forget(ident)
        return self._running.pop(ident, None)

    def _submit(self, position: int, now: float) -> Attempt:
        task = self._tasks[position]
        task.attempts += 1
        self._idents += 1
        attempt = Attempt(
            ident=self._idents,
            task=position,
            number=task.attempts,
            avoid=frozenset(task.nodes | self._cut_off),
            twin=bool(task.running),
            submitted=now,
        )
        task.running.append(attempt)
        self._running[attempt.ident] = attempt
        return attempt

    def _count(self, attempt: Attempt) -> Gain:
        task = self._tasks[attempt.task]
        # A worker that says more rows than there are must not push the whole beyond its end.
        rows = max(min(attempt.rows, task.rows) - task.counted_rows, 0)
        num_bytes = max(attempt.num_bytes - task.counted_bytes, 0)
        task.counted_rows += rows
        task.counted_bytes += num_bytes
        return Gain(rows, num_bytes)

    def _straggler(self, now: float) -> int | None:
        """Return the task whose only attempt is furthest behind, if a second one would probably overtake it."""
        if not self._pace:
            return None
        pace = median(self._pace)
        worst, position = 0.0, None
        for attempt in self._running.values():
            task = self._tasks[attempt.task]
            if attempt.begun is None or len(task.running) > 1:
                continue
            usual = pace * max(task.rows, 1)
            elapsed = now - attempt.begun
            if elapsed < max(self._rules.twin_factor * usual, self._rules.twin_seconds):
                continue
            rows_left = max(task.rows - attempt.rows, 0)
            # What is left at its pace so far. All rows done, it still has to write: as long as it likes.
            left = elapsed * rows_left / attempt.rows if attempt.rows and rows_left else elapsed
            if left > usual and left > worst:
                worst, position = left, attempt.task
        return position
