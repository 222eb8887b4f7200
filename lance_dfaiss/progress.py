"""How a long operation tells what it is doing: a protocol, and a listener that keeps silent.

The library never draws anything. A caller passes an object with these two methods; the command
line draws bars with it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["PhaseMeter", "Progress", "ProgressEvent", "SilentProgress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEvent:
    """One report of one phase.

    Parameters
    ----------
    phase : str
        ``"plan"``, ``"train"``, ``"encode"``, ``"check"``, ``"commit"`` or ``"load"``.
    done_rows, total_rows : int
        Rows finished and rows in the whole phase; 0 when the phase does not count rows.
    done_bytes : int
        Bytes read or written so far by the phase.
    elapsed_seconds : float
        Since the phase began.
    """

    phase: str
    done_rows: int = 0
    total_rows: int = 0
    done_bytes: int = 0
    elapsed_seconds: float = 0.0

    @property
    def remaining_seconds(self) -> float | None:
        """Time left at the pace so far; None before there is a pace."""
        if not self.done_rows or not self.total_rows:
            return None
        return self.elapsed_seconds * (self.total_rows - self.done_rows) / self.done_rows


@runtime_checkable
class Progress(Protocol):
    """A listener for build and load progress. Called from the thread that does the work."""

    def update(self, event: ProgressEvent) -> None:
        """Take one report; raising stops the operation."""

    def finish(self, phase: str) -> None:
        """Be told that a phase has ended well."""


class SilentProgress:
    """Listens to everything and says nothing: the default."""

    def update(self, event: ProgressEvent) -> None:
        """Ignore the report."""

    def finish(self, phase: str) -> None:
        """Ignore the end of the phase."""


class PhaseMeter:
    """Counts rows and bytes of one phase from many threads and reports them.

    Parameters
    ----------
    progress : Progress
        Listener.
    phase : str
        Name of the phase.
    total_rows : int
        Rows of the whole phase; 0 when it does not count rows.
    """

    def __init__(self, progress: Progress, phase: str, total_rows: int = 0) -> None:
        self._progress = progress
        self._phase = phase
        self._total_rows = total_rows
        self._rows = 0
        self._bytes = 0
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self.add()

    def add(self, rows: int = 0, num_bytes: int = 0) -> None:
        """Count and report."""
        with self._lock:
            self._rows += rows
            self._bytes += num_bytes
            self._progress.update(
                ProgressEvent(
                    phase=self._phase,
                    done_rows=self._rows,
                    total_rows=self._total_rows,
                    done_bytes=self._bytes,
                    elapsed_seconds=self.seconds,
                )
            )

    def finish(self) -> None:
        """Report the end of the phase."""
        self._progress.finish(self._phase)

    @property
    def phase(self) -> str:
        """Name of the phase."""
        return self._phase

    @property
    def rows(self) -> int:
        """Rows counted so far."""
        return self._rows

    @property
    def num_bytes(self) -> int:
        """Bytes counted so far."""
        return self._bytes

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return time.perf_counter() - self._started
