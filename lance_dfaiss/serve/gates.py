"""Who waits for threads: a bounded number of tasks, each of which can be cancelled, and equal ones together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from .refusals import overloaded

__all__ = ["ENDINGS", "Gate", "Together"]

MAX_INSIDE = 256
"""Requests that wait for, or are on, the threads of one gate."""

ENDINGS = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
"""What is to be passed on also where everything else belongs to a request: Lance's panics are no `Exception`."""

T = TypeVar("T")


class Gate:
    """Some threads, and those who wait for one; for one event loop.

    Nothing waits inside the pool: whoever waits is a task, and when that is cancelled nothing of it is left.

    Parameters
    ----------
    what : str
        What waits, for messages.
    name : str
        Of the threads.
    threads : int
        How many.
    """

    def __init__(self, what: str, name: str, threads: int) -> None:
        self.inside = 0
        """Tasks that wait, or for which a thread works."""
        self._what = what
        self._pool = ThreadPoolExecutor(threads, name)
        self._free = asyncio.Semaphore(threads)

    async def run(self, work: Callable[[], T]) -> T:
        """Run something on a thread, when there is a free one.

        Raises
        ------
        Overloaded
            If too many wait.
        """
        if self.inside >= MAX_INSIDE:
            raise overloaded(self._what, self.inside, MAX_INSIDE)
        self.inside += 1
        try:
            await self._free.acquire()
            try:
                job = self._pool.submit(work)
            except BaseException:
                self._free.release()
                raise
            # The thread is free when it is done, also if nobody waits for it any more.
            loop = asyncio.get_running_loop()
            job.add_done_callback(lambda _: self._done(loop))
            return await asyncio.wrap_future(job)
        finally:
            self.inside -= 1

    def stop(self) -> None:
        """End the threads, when they have done what they are at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _done(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            loop.call_soon_threadsafe(self._free.release)


@dataclass(slots=True, eq=False)
class _Flight(Generic[T]):
    """Work that is being done, and who waits for it."""

    task: asyncio.Task[T]
    turns: set[asyncio.Future[T]] = field(default_factory=set)


class Together(Generic[T]):
    """Work that is done once for all who ask for it meanwhile; for one event loop."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight[T]] = {}

    async def get(self, key: Hashable, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of some work, or raise what it raises; when all who wait are cancelled, it is too.

        Parameters
        ----------
        key : hashable
            Of equal work.
        begin : callable
            Does it, if nobody does already.
        """
        loop = asyncio.get_running_loop()
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(loop.create_task(begin()))
            flight.task.add_done_callback(partial(self._landed, key, flight))
        turn: asyncio.Future[T] = loop.create_future()
        flight.turns.add(turn)
        try:
            return await turn
        finally:
            flight.turns.discard(turn)
            if not flight.turns and not flight.task.done():
                self._forget(key, flight)
                flight.task.cancel()

    def _forget(self, key: Hashable, flight: _Flight[T]) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _landed(self, key: Hashable, flight: _Flight[T], task: asyncio.Task[T]) -> None:
        self._forget(key, flight)
        error = None if task.cancelled() else task.exception()
        for turn in [turn for turn in flight.turns if not turn.done()]:
            if task.cancelled():
                turn.cancel()
            elif error is not None:
                turn.set_exception(error)
                turn.exception()  # or it would be said to be lost, where its waiter has just been cancelled
            else:
                turn.set_result(task.result())
