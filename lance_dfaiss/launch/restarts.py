"""When a server process that has ended is started again. Pure: clocks and processes are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

__all__ = ["Life", "RestartPolicy", "State"]


class State(Enum):
    """Where a server process is in its life."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    RESTARTING = "restarting"
    WAITING = "waiting"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How patient one is.

    Parameters
    ----------
    first_seconds, longest_seconds : float
        Pause before a server is started again after its first crash, which doubles with each further one; and the
        longest.
    steady_seconds : float
        A server that was ready for so long has recovered: its crashes are forgotten.
    early_ends : int
        A server that ends so many times in a row before it is ready is given up.
    """

    first_seconds: float = 0.2
    longest_seconds: float = 30.0
    steady_seconds: float = 60.0
    early_ends: int = 3

    def pause(self, crashes: int) -> float:
        """Return the seconds to wait after so many crashes in a row."""
        return min(self.longest_seconds, self.first_seconds * 2.0 ** min(crashes - 1, 60))


@dataclass(frozen=True, slots=True)
class Life:
    """The state of one server process, and what it remembers of those before.

    Parameters
    ----------
    state : State
        What it is doing.
    since : float
        When that began, monotonic seconds.
    due : float
        When a waiting one is to be started.
    crashes : int
        Unexpected ends in a row.
    early : int
        Those of them that came before the server was ready, again in a row.
    """

    state: State
    since: float
    due: float = 0.0
    crashes: int = 0
    early: int = 0

    @property
    def runs(self) -> bool:
        """Whether there is a process."""
        return self.state in (State.STARTING, State.READY, State.STOPPING, State.RESTARTING)

    @property
    def over(self) -> bool:
        """Whether there will be no process any more."""
        return self.state in (State.STOPPED, State.FAILED)

    def started(self, now: float) -> Life:
        """Return the life after a process was started."""
        return replace(self, state=State.STARTING, since=now)

    def not_started(self, now: float, policy: RestartPolicy) -> Life:
        """Return the life after no process could be started: the machine is short of something, and may not stay so."""
        crashes = self.crashes + 1
        return replace(self, state=State.WAITING, since=now, due=now + policy.pause(crashes), crashes=crashes)

    def ready(self, now: float) -> Life:
        """Return the life once it takes requests; unchanged if it was told to stop meanwhile."""
        return replace(self, state=State.READY, since=now, early=0) if self.state is State.STARTING else self

    def told_to_stop(self, now: float) -> Life:
        """Return the life once it was told to stop for good; one that waits for a restart has stopped with that."""
        if self.over:
            return self
        return replace(self, state=State.STOPPING if self.runs else State.STOPPED, since=now)

    def told_to_restart(self, now: float) -> Life:
        """Return the life once it was told to stop and start again; one that is over comes back."""
        return replace(
            self, state=State.RESTARTING if self.runs else State.WAITING, since=now, due=now, crashes=0, early=0
        )

    def ended(self, status: int, now: float, policy: RestartPolicy) -> Life:
        """Return the life after the process ended.

        Parameters
        ----------
        status : int
            Its exit status; negative for a signal.
        now : float
            Monotonic seconds.
        policy : RestartPolicy
            Decides what comes next.
        """
        if self.state is State.STOPPING:
            return replace(self, state=State.STOPPED, since=now)
        if self.state is State.RESTARTING:
            return replace(self, state=State.WAITING, since=now, due=now)
        was_ready = self.state is State.READY
        if was_ready and status == 0:
            # Somebody with the right to do so told it to stop, or it is not in the cluster file any more.
            return replace(self, state=State.STOPPED, since=now)
        recovered = was_ready and now - self.since >= policy.steady_seconds
        crashes = 1 if recovered else self.crashes + 1
        early = 0 if was_ready else self.early + 1
        if early >= policy.early_ends:
            return replace(self, state=State.FAILED, since=now, crashes=crashes, early=early)
        return replace(
            self, state=State.WAITING, since=now, due=now + policy.pause(crashes), crashes=crashes, early=early
        )
