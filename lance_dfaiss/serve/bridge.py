"""From threads that wait to one event loop that asks."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from ..errors import ClientUnusable
from .asking import Call
from .loops import new_loop

__all__ = ["Asker", "Bridge", "Slot", "closed_error", "forked_error"]

_T = TypeVar("_T")


class Asker(Protocol):
    """What lives on the loop."""

    def gather(self, call: Call) -> None:
        """Take a call, to be asked with others."""

    def ask_gathered(self) -> None:
        """Ask what was taken."""

    async def close(self) -> None:
        """Hang up."""


_SIGNAL_SECONDS = 0.5


class Slot:
    """Where a thread waits for an outcome. A bare lock: half the time of an Event or a concurrent Future."""

    __slots__ = ("_done", "_error", "_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._done = False
        self._value: Any = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Tell whether nobody waits any more."""
        return self._done

    def set_result(self, result: Any, /) -> None:
        """Wake the thread with a value."""
        self._value, self._done = result, True
        self._lock.release()

    def set_exception(self, exception: BaseException, /) -> None:
        """Wake the thread with an error."""
        self._error, self._done = exception, True
        self._lock.release()

    def give_up(self) -> None:
        """Take no outcome any more."""
        self._done = True

    def wait(self) -> None:
        """Wait until there is an outcome; signals are handled meanwhile."""
        # The system may hand a signal to any thread, which does not wake this one: Python's handlers run here alone.
        while not self._lock.acquire(timeout=_SIGNAL_SECONDS):
            pass

    def outcome(self) -> Any:
        """Return or raise it."""
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # or it would hold this frame, which holds it
        return self._value


class Job:
    """A coroutine that a thread waits for."""

    __slots__ = ("make", "slot", "task")

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Any]], slot: Slot) -> None:
        self.make = make
        self.slot = slot
        self.task: asyncio.Task[Any] | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run it."""
        self.task = loop.create_task(self.make())
        self.task.add_done_callback(self._finished)

    def leave(self) -> None:
        """Nobody waits for it any more."""
        if self.task is not None:
            self.task.cancel()

    def _finished(self, task: asyncio.Task[Any]) -> None:
        error = ClientUnusable("the client was closed") if task.cancelled() else task.exception()
        if self.slot.done():
            return
        if error is not None:
            self.slot.set_exception(error)
        else:
            self.slot.set_result(task.result())


class Bridge:
    """From threads that wait to the one event loop that asks. It knows no Client, so that one can be dropped."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.client: Asker | None = None
        self.closed = False
        self._closing = False
        self._inbox: deque[tuple[Call | Job, Slot]] = deque()
        self._awake = False
        self._loop = new_loop()
        self._thread = threading.Thread(target=self._turn, name="lance-dfaiss-client", daemon=True)
        self._thread.start()

    def ask(self, item: Call | Job, slot: Slot) -> Any:
        """Hand something to the loop, and wait for its outcome; in any thread but the loop's."""
        if self.pid != os.getpid():
            raise forked_error()
        if self._thread is threading.current_thread():
            raise ClientUnusable("a client was called on its own thread", remedy="Use connect_async in coroutines")
        self._inbox.append((item, slot))
        # Looked at in this order: the loop's thread sets it before it empties the inbox for the last time.
        if self.closed:
            raise closed_error()
        if not self._awake:
            self._awake = True
            self._call(self._take)
        try:
            slot.wait()
        except BaseException:  # KeyboardInterrupt, or whatever else a signal handler raises
            self._call(lambda: _given_up(item, slot))
            raise
        return slot.outcome()

    def run(self, make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run a coroutine on the loop, and wait for it."""
        slot = Slot()
        result: _T = self.ask(Job(make, slot), slot)
        return result

    def stop(self) -> None:
        """Close the client and end the thread; what waits gets `ClientUnusable`. Nothing to do in a forked child."""
        if self.closed or self.pid != os.getpid():
            return
        self._call(lambda: self._loop.create_task(self._close()))
        # The garbage collector may call this on any thread.
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _call(self, function: Callable[[], Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError as exc:
            raise closed_error() from exc

    def _take(self) -> None:
        self._awake = False
        inbox, client = self._inbox, self.client
        while inbox:
            item, slot = inbox.popleft()
            if self._closing:
                slot.set_exception(closed_error())
            elif not slot.done():
                try:
                    if isinstance(item, Job):
                        item.start(self._loop)
                    elif client is not None:
                        client.gather(item)
                except Exception as exc:  # an edge: what comes after it must be taken too
                    slot.set_exception(exc)
        if client is not None:
            client.ask_gathered()

    async def _close(self) -> None:
        self._closing = True
        if self.client is not None:
            await self.client.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()
        self._loop.stop()

    def _turn(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self.closed = True
            self._loop.close()
            while self._inbox:
                _, slot = self._inbox.popleft()
                if not slot.done():
                    slot.set_exception(closed_error())


def _given_up(item: Call | Job, slot: Slot) -> None:
    slot.give_up()
    item.leave()


def closed_error() -> ClientUnusable:
    """Return the error for what comes too late."""
    return ClientUnusable("the client is closed", remedy="Call connect again")


def forked_error() -> ClientUnusable:
    """Return the error for what comes from a child."""
    return ClientUnusable(
        "this process was forked after the client was made, and has none of its connections",
        remedy="Call connect in the child",
    )
