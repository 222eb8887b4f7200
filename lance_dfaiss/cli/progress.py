"""Progress for a person: bars on a terminal, a line now and then elsewhere; always on stderr."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, TextIO

from ..progress import Progress, ProgressEvent, SilentProgress
from .text import format_bytes, format_seconds

__all__ = ["BarProgress", "LineProgress", "StoppableProgress", "reporting"]

_SECONDS_BETWEEN_LINES = 1.0


def _numbers(event: ProgressEvent) -> str:
    """Return rows, bytes, pace and time left of a phase, as far as it counts them."""
    parts = []
    if event.total_rows:
        parts.append(f"{event.done_rows:,} of {event.total_rows:,} rows")
    if event.done_bytes:
        parts.append(format_bytes(event.done_bytes))
    if event.done_rows and event.elapsed_seconds > 0:
        parts.append(f"{event.done_rows / event.elapsed_seconds:,.0f} rows/s")
    elif event.done_bytes and event.elapsed_seconds > 0:
        parts.append(f"{format_bytes(int(event.done_bytes / event.elapsed_seconds))}/s")
    if event.remaining_seconds:
        parts.append(f"{format_seconds(event.remaining_seconds)} left")
    return ", ".join(parts)


class LineProgress:
    """One line when a phase ends, and in between at most one a second: for log files and pipes.

    Parameters
    ----------
    stream : file
        Where to; one that is closed by its reader is not written to again.
    clock : callable
        Seconds, monotonic.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._wrote_at = clock()
        self._last: dict[str, tuple[ProgressEvent, float]] = {}
        self._open = True

    def update(self, event: ProgressEvent) -> None:
        """Write a line if the last one is a second old."""
        self._last[event.phase] = (event, self._clock())
        if self._clock() - self._wrote_at >= _SECONDS_BETWEEN_LINES:
            self._write(f"{event.phase}: {_numbers(event)}" if _numbers(event) else f"{event.phase} ...")

    def finish(self, phase: str) -> None:
        """Write the phase's last line."""
        event, at = self._last.pop(phase)
        # The work after the last report counts too, and nothing is left to do.
        seconds = event.elapsed_seconds + self._clock() - at
        numbers = _numbers(replace(event, done_rows=event.total_rows, elapsed_seconds=seconds))
        self._write(f"{phase} done in {format_seconds(seconds)}{': ' if numbers else ''}{numbers}")

    def _write(self, line: str) -> None:
        self._wrote_at = self._clock()
        if not self._open:
            return
        try:
            print(line, file=self._stream, flush=True)
        except BrokenPipeError:
            # Nobody reads the progress any more; that is no reason to stop the work.
            self._open = False


class BarProgress:
    """A bar for each phase, drawn by rich.

    Parameters
    ----------
    stream : file
        The terminal.
    transient : bool
        Wipe the bars away at the end.
    """

    def __init__(self, stream: TextIO, *, transient: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description:<7}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[numbers]}"),
            console=Console(file=stream),
            transient=transient,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> BarProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, event: ProgressEvent) -> None:
        """Move the phase's bar."""
        if event.phase not in self._tasks:
            self._tasks[event.phase] = self._bars.add_task(event.phase, total=event.total_rows or None, numbers="")
        self._bars.update(self._tasks[event.phase], completed=event.done_rows, numbers=_numbers(event))

    def finish(self, phase: str) -> None:
        """Fill the phase's bar."""
        task = self._tasks.pop(phase)
        self._bars.update(task, total=1, completed=1)


class StoppableProgress:
    """Passes reports on until it is told to stop; then the next report ends the work.

    An interrupt reaches only the main thread. Worker threads are reached here, through the reports
    that they make, so that a build does not first finish the shards it has begun.

    Parameters
    ----------
    listener : Progress
        Whom to pass them to.
    """

    def __init__(self, listener: Progress) -> None:
        self._listener = listener
        self._stopped = False

    def stop(self) -> None:
        """Let the next report raise."""
        self._stopped = True

    def update(self, event: ProgressEvent) -> None:
        """Pass a report on.

        Raises
        ------
        KeyboardInterrupt
            After `stop`.
        """
        if self._stopped:
            raise KeyboardInterrupt
        self._listener.update(event)

    def finish(self, phase: str) -> None:
        """Pass the end of a phase on."""
        self._listener.finish(phase)


@contextmanager
def reporting(*, only_on_terminal: bool = False) -> Iterator[Progress]:
    """Give a listener that writes to stderr, and that an interrupt stops in every thread.

    Parameters
    ----------
    only_on_terminal : bool
        Say nothing where there is no terminal, and leave nothing on one: for commands that are run many times.
    """
    if sys.stderr.isatty():
        with BarProgress(sys.stderr, transient=only_on_terminal) as bars, _stopped_by_interrupt(bars) as progress:
            yield progress
    else:
        with _stopped_by_interrupt(SilentProgress() if only_on_terminal else LineProgress(sys.stderr)) as progress:
            yield progress


@contextmanager
def _stopped_by_interrupt(listener: Progress) -> Iterator[Progress]:
    progress = StoppableProgress(listener)

    def stop(signum: int, frame: FrameType | None) -> None:
        progress.stop()
        signal.default_int_handler(signum, frame)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        # Ignored, as for a job in the background, or taken by someone else: theirs to decide.
        yield progress
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield progress
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
