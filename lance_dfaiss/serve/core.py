"""What both clients are made of: calls, gathered and asked on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import AccessDenied, DfaissError, ProtocolError, SnapshotGone, Unavailable
from ..types import MISSING_ROW_ID
from .answers import Answer
from .asking import Asking, Call, unavailable
from .bridge import closed_error, forked_error
from .checks import Asked, Checks, Defaults
from .connection import connection_error
from .fleet import CONNECT_SECONDS, Fleet, Replica
from .questions import COALESCED_QUERIES, FetchAsking, Found, KnnAsking, KnnKey, RangeAsking, RangeKey
from .refusals import no_index
from .wire import Frame, Message, decode

__all__ = ["Core"]

AGAIN = 5
"""How often a search is made anew because its snapshot went away between finding rows and reading their columns."""


class Core:
    """Asks a cluster, on the event loop that runs when it is made.

    Parameters
    ----------
    fleet : Fleet
        The servers; not started.
    defaults : Defaults
        For what a call does not say.

    Attributes
    ----------
    checks : Checks
        Of what callers pass; for any thread.
    """

    def __init__(self, fleet: Fleet, defaults: Defaults) -> None:
        self.fleet = fleet
        self.checks = Checks(fleet, defaults, self.check_usable)
        self._defaults = defaults
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._gathered: dict[KnnKey, list[Call]] = {}
        self._closed = False

    async def begin(self) -> None:
        """Wait until everything can be asked.

        Raises
        ------
        DfaissError
            Why it cannot.
        """
        named = {served.name for served in self.fleet.cluster.indexes}
        if self._defaults.name is not None and self._defaults.name not in named:
            raise no_index(self._defaults.name, tuple(sorted(named)))
        changed = asyncio.Event()
        self.fleet.start()
        self.fleet.waiting.add(changed.set)
        deadline = time.monotonic() + self._defaults.seconds
        try:
            while not self._ready(last=False):
                replicas = self.fleet.replicas.values()
                if all(replica.settled for replica in replicas):
                    self._raise_denied()
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), max(deadline - time.monotonic(), 0.0))
                except asyncio.TimeoutError:
                    break
        finally:
            self.fleet.waiting.discard(changed.set)
        if not self._ready(last=True):
            self._raise_denied()
            raise unavailable(self.fleet, self._defaults.name or min(named, default=""))

    def _ready(self, *, last: bool) -> bool:
        """Tell whether what the client is for can be asked; in the end, any one of several indexes is enough."""
        wanted = self._defaults.name
        names = [wanted] if wanted is not None else [served.name for served in self.fleet.cluster.indexes]
        enough = self._defaults.min_coverage
        settled = all(replica.settled for replica in self.fleet.replicas.values())
        good = []
        for name in names:
            way = self.fleet.ways.get(name)
            partly = enough is not None and (settled or last) and way is not None and way.route.coverage >= enough
            good.append(way is not None and (way.complete or partly))
        return any(good) if last else all(good)

    def _raise_denied(self) -> None:
        for replica in self.fleet.replicas.values():
            if isinstance(replica.error, (AccessDenied, ProtocolError)):
                raise replica.error

    async def close(self) -> None:
        """Hang up; calls that wait get `ClientUnusable`."""
        if self._closed:
            return
        self._closed = True
        for calls in self._gathered.values():
            for call in calls:
                if not call.settle.done():
                    call.settle.set_exception(closed_error())
        self._gathered.clear()
        await self.fleet.close()

    def check_usable(self) -> None:
        """Refuse to go on after `close`, and in a forked process."""
        if self._closed:
            raise closed_error()
        if os.getpid() != self._pid:
            raise forked_error()

    def call(self, key: Any, payload: bytes, n: int, seconds: float) -> Call:
        """Return a call that a coroutine waits for."""
        return Call(key, payload, n, seconds, self._loop.create_future())

    async def settled(self, call: Call, begin: Callable[[], Asking]) -> Any:
        """Ask one question of one call, and wait for the answer."""
        self.check_usable()
        begin().begin()
        return await self._waited(call)

    async def _waited(self, call: Call) -> Any:
        future: Any = call.settle
        try:
            return await future
        except asyncio.CancelledError:
            call.leave()
            raise

    async def ask(self, asked: Asked) -> Found:
        """Search, and wait for what is found."""
        call = self.call(asked.key, asked.payload, asked.n, asked.seconds)
        if isinstance(asked.key, RangeKey):
            found: Found = await self.settled(call, lambda: RangeAsking(self.fleet, call))
            return found
        self.gather(call)
        answer: Found = await self._waited(call)
        return answer

    def gather(self, call: Call) -> None:
        """Have a call asked at the end of this turn of the loop, together with others like it."""
        if not self._gathered:
            self._loop.call_soon(self.ask_gathered)
        self._gathered.setdefault(call.key, []).append(call)

    def ask_gathered(self) -> None:
        """Ask what was gathered."""
        gathered, self._gathered = self._gathered, {}
        self.fleet.gathering = True
        try:
            for key, calls in gathered.items():
                for together in _coalesced(calls):
                    self._ask_together(key, together)
        finally:
            self.fleet.gathering = False
            self.fleet.write()

    def _ask_together(self, key: KnnKey, calls: list[Call]) -> None:
        try:
            if calls[0].n:
                KnnAsking(self.fleet, key, calls).begin()
            else:
                self._nothing_asked(key, calls)
        except Exception as exc:  # an edge: it is the outcome of these calls, and not that of those gathered with them
            for call in calls:
                if not call.settle.done():
                    call.settle.set_exception(exc)

    def _nothing_asked(self, key: KnnKey, calls: Sequence[Call]) -> None:
        """Answer calls without a query."""
        offer, width = self.fleet.offers[key.name], key.k if key.pads else 1
        for call in calls:
            if not call.settle.done():
                answer = Answer(
                    np.empty((0, width), np.float32),
                    np.empty((0, width), np.uint64),
                    coverage=1.0,
                    version=offer.version,
                    generation=offer.generation,
                    at=offer.at,
                )
                call.settle.set_result(Found(answer, offer, None, []))

    async def found(self, asked: Asked) -> tuple[Found, pa.Table | None]:
        """Search, and read the columns that are wanted of the rows that were found, at the same snapshot."""
        deadline = time.monotonic() + asked.seconds
        for again in range(AGAIN + 1):
            found = await self.ask(asked._replace(seconds=max(deadline - time.monotonic(), 0.0)))
            if found.columns is not None or (asked.wanted is not None and not len(asked.wanted)):
                return found, found.columns
            began, row_ids = time.monotonic(), found.answer[1]
            row_ids = row_ids[row_ids != MISSING_ROW_ID]
            payload = row_ids.astype("<u8").tobytes()
            call = self.call(None, payload, len(row_ids), max(deadline - time.monotonic(), 0.0))
            offer, wanted = found.offer, asked.wanted
            try:
                fetched = await self.settled(call, lambda: FetchAsking(self.fleet, offer, wanted, call))  # noqa: B023
            except SnapshotGone:
                if again == AGAIN:
                    raise
                self.fleet.retries += 1
                continue
            found.stages.append((None, {"name": "fetch", "seconds": time.monotonic() - began, "rows": len(fetched)}))
            return found, fetched
        raise AssertionError("unreachable")

    async def tell(self, replica: Replica, message: Message, expected: type[Message], seconds: float) -> Any:
        """Ask one server something that is about itself."""
        if not replica.settled:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._met(replica), min(seconds, CONNECT_SECONDS))
        connection = replica.connection()
        if connection is None:
            raise replica.error or Unavailable(
                f"{replica.name} is not connected", groups=(replica.entry.group,), shards=(), coverage=0.0
            )
        waiting = _Once(expected, self._loop.create_future())
        request_id = connection.send(message, (), waiting)
        self.fleet.asked()
        try:
            return await asyncio.wait_for(waiting.future, seconds)
        except asyncio.TimeoutError as exc:
            raise connection_error(replica.name, exc) from exc
        finally:
            connection.cancel(request_id)

    async def _met(self, replica: Replica) -> None:
        """Wait until a server was reached, or could not be: `begin` waits only for enough of them to search."""
        changed = asyncio.Event()
        self.fleet.waiting.add(changed.set)
        try:
            while not replica.settled:
                changed.clear()
                await changed.wait()
        finally:
            self.fleet.waiting.discard(changed.set)


class _Once:
    """Waits for the answer of one server."""

    def __init__(self, expected: type[Message], future: asyncio.Future[Any]) -> None:
        self.expected = expected
        self.future = future

    def answered(self, frame: Frame) -> None:
        """Hand it over."""
        reply = decode(frame, self.expected)
        if not self.future.done():  # its time may have been over a moment ago
            self.future.set_result(reply)

    def failed(self, error: DfaissError) -> None:
        """Hand over the error."""
        if not self.future.done():
            self.future.set_exception(error)

    def doubted(self) -> None:
        """Wait on: nobody else can answer."""


def _coalesced(calls: Sequence[Call]) -> list[list[Call]]:
    """Return calls in groups that are asked together: not too many queries, and none beside calls without any."""
    groups: list[list[Call]] = []
    room = -1
    for call in calls:
        if call.settle.done():
            continue  # cancelled before it was asked
        if call.n == 0 or call.n > room:
            groups.append([])
            room = COALESCED_QUERIES if call.n else -1
        groups[-1].append(call)
        room -= call.n
    return groups
