"""The search lane: the one thread of a server that searches, batch after batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DeadlineExceeded
from .batcher import Batch, Batcher, Waiting
from .refusals import overloaded

__all__ = ["Lane", "Outcome"]

Outcome = tuple[Any, Any]
"""The ticket of a request, and its answer or the exception in its place."""


class Lane:
    """Searches what waits, on a thread of its own.

    Parameters
    ----------
    batcher : Batcher
        What waits.
    search : callable
        Given a batch, return one outcome for each request that is finished with it.
    deliver : callable
        Given all outcomes of a batch; called on the lane's thread, so it must only pass them on.
    """

    def __init__(
        self,
        batcher: Batcher[Any],
        search: Callable[[Batch], Sequence[Outcome]],
        deliver: Callable[[Sequence[Outcome]], None],
    ) -> None:
        self._batcher = batcher
        self._search = search
        self._deliver = deliver
        self._changed = threading.Condition(threading.Lock())
        self._idle = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lance-dfaiss-lane", daemon=True)

    def start(self) -> None:
        """Begin to search."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the batch in hand, and end; what still waits is forgotten."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        """Queries that wait."""
        return self._batcher.waiting

    def submit(self, request: Waiting[Any]) -> None:
        """Put a request in the queue.

        Raises
        ------
        Overloaded
            If there is no room.
        """
        with self._changed:
            if self._batcher.offer(request):
                if self._idle:
                    self._changed.notify()
                return
            waiting = self._batcher.waiting
        raise overloaded("queries", waiting, self._batcher.max_waiting)

    def drop(self, request: Waiting[Any]) -> None:
        """Forget a request."""
        with self._changed:
            self._batcher.drop(request)

    def _run(self) -> None:
        while True:
            with self._changed:
                batch, expired = self._batcher.take(time.monotonic())
                while batch is None and not expired:
                    if self._stopping:
                        return
                    self._idle = True
                    self._changed.wait()
                    self._idle = False
                    batch, expired = self._batcher.take(time.monotonic())
                if self._stopping:
                    return
            if expired:
                self._deliver([(request.ticket, _too_late(request)) for request in expired])
            if batch is not None:
                self._deliver(self._searched(batch))

    def _searched(self, batch: Batch) -> Sequence[Outcome]:
        try:
            return self._search(batch)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # an edge: whatever it is belongs to the requests, and the lane goes on
            return [(part.request.ticket, exc) for part in batch.slices]


def _too_late(request: Waiting[Any]) -> DeadlineExceeded:
    seconds = request.deadline - request.arrived
    return DeadlineExceeded(
        f"the query waited for the {seconds:.3f} s that it had, and was not searched",
        remedy="Give it more time, or the cluster more replicas",
        seconds=seconds,
    )
