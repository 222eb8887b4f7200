"""What is searched together, and in what order: a bounded queue of requests. No threads, no clock, no I/O."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from ..types import Float32Array

__all__ = ["Batch", "Batcher", "Slice", "Waiting"]

K = TypeVar("K", bound=Hashable)

_MOST_GONE = 1_024
_NOTHING = np.zeros((0, 0), np.float32)


@dataclass(slots=True, eq=False)
class Waiting(Generic[K]):
    """A request in the queue.

    Parameters
    ----------
    key : hashable
        Requests of equal keys can be searched in one call.
    queries : numpy.ndarray
        float32 ``(n, dim)``, n at least 1.
    deadline : float
        When nobody waits for the answer any more, by the clock that `Batcher.take` is told; inf for never.
    ticket : object
        Of use to whoever made the request.
    arrived : float
        By the same clock.
    """

    key: K
    queries: Float32Array
    deadline: float
    ticket: Any
    arrived: float
    taken: int = field(default=0, init=False)
    gone: bool = field(default=False, init=False)

    @property
    def left(self) -> int:
        """Queries that were not taken yet."""
        return 0 if self.gone else len(self.queries) - self.taken


class Slice(NamedTuple):
    """Some queries of one request: from ``start`` to before ``stop``."""

    request: Waiting[Any]
    start: int
    stop: int


class Batch(NamedTuple):
    """What to search in one call."""

    key: Any
    slices: list[Slice]
    queries: int


class Batcher(Generic[K]):
    """Requests that wait to be searched.

    Those of equal keys go together, up to ``max_batch`` queries; keys take turns, so that none waits for longer than
    one batch of each other key. A request of more queries than that is taken in several turns.

    Parameters
    ----------
    max_waiting : int
        Queries that may wait. One request alone may have more.
    max_batch : int
        Queries in one batch.
    most : callable, optional
        Given a key, the same for its batches, if that is less; at least 1.
    """

    def __init__(self, *, max_waiting: int, max_batch: int, most: Callable[[K], int] | None = None) -> None:
        self.max_waiting = max_waiting
        self.max_batch = max_batch
        self.waiting = 0
        """Queries that wait."""
        self._most = most
        self._gone = 0
        self._turns: OrderedDict[K, deque[Waiting[K]]] = OrderedDict()

    def offer(self, request: Waiting[K]) -> bool:
        """Take a request, or return False when there is no room for it."""
        count = len(request.queries)
        if self.waiting and self.waiting + count > self.max_waiting:
            return False
        self.waiting += count
        queue = self._turns.get(request.key)
        if queue is None:
            self._turns[request.key] = deque((request,))
        else:
            queue.append(request)
        return True

    def drop(self, request: Waiting[K]) -> None:
        """Forget a request whose answer nobody wants any more; what was taken of it is not affected."""
        if request.gone:
            return
        self.waiting -= request.left
        request.gone = True
        if not request.taken:
            request.queries = _NOTHING  # megabytes, perhaps
        self._gone += 1
        if self._gone > _MOST_GONE:
            self._sweep()

    def take(self, now: float) -> tuple[Batch | None, list[Waiting[K]]]:
        """Return what to search next, if anything waits, and the requests whose time was over before their turn."""
        expired: list[Waiting[K]] = []
        while self._turns:
            key, queue = self._turns.popitem(last=False)
            most = self.max_batch if self._most is None else min(self.max_batch, self._most(key))
            slices, count = self._from(queue, most, now, expired)
            if queue:
                self._turns[key] = queue
            if slices:
                return Batch(key, slices, count), expired
        return None, expired

    def _sweep(self) -> None:
        """Take those that are gone out of the queue; now and then, as that looks at all of it."""
        self._gone = 0
        for key, queue in list(self._turns.items()):
            left = deque(request for request in queue if not request.gone)
            if left:
                self._turns[key] = left
            else:
                del self._turns[key]

    def _from(
        self, queue: deque[Waiting[K]], most: int, now: float, expired: list[Waiting[K]]
    ) -> tuple[list[Slice], int]:
        slices: list[Slice] = []
        count = 0
        while queue and count < most:
            request = queue[0]
            if request.gone:
                queue.popleft()
                continue
            if request.deadline <= now:
                queue.popleft()
                self.drop(request)
                expired.append(request)
                continue
            start = request.taken
            stop = min(len(request.queries), start + most - count)
            slices.append(Slice(request, start, stop))
            request.taken = stop
            count += stop - start
            self.waiting -= stop - start
            if stop == len(request.queries):
                queue.popleft()
        return slices, count
