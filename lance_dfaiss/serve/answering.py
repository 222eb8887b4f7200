"""From a request to its answer: checked on the event loop, searched on the lane, read on other threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from ..engine import limit_threads
from ..errors import (
    AccessDenied,
    DeadlineExceeded,
    DfaissError,
    InvalidArgument,
    ProtocolError,
    ServerFailed,
    Unavailable,
)
from ..search.arguments import checked_radius
from ..search.trace import Trace
from ..search.view import Selection, View
from ..search.widths import Widths
from ..types import MISSING_ROW_ID, Float32Array, UInt64Array
from ..vectors import as_queries
from .batcher import Batch, Batcher, Slice, Waiting
from .gates import ENDINGS, Gate, Together
from .holdings import Held, Holdings
from .lane import Lane, Outcome
from .metrics import ServerMetrics, Stage
from .peer import Peer, Ticket
from .reading import MAX_FETCH_ROWS, Reading
from .refusals import over_limit, overloaded, too_late, too_long
from .security import Access, Rights
from .sql import check_filter
from .wire import (
    Buffer,
    Cancel,
    Done,
    Drain,
    Fetch,
    Frame,
    Knn,
    KnnReply,
    Limits,
    Message,
    Offers,
    Range,
    RangeReply,
    Reconstruct,
    Reload,
    Status,
    StatusReply,
    decode,
    failure_of,
    joined_results,
    queries_of,
    row_ids_of,
)

__all__ = ["Answering", "Control", "Workload"]

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 2_048
"""Connections of one server: each may hold a few megabytes of a frame that is not complete."""

MAX_HELD_BYTES = 1024**3
"""Payloads of all requests that wait: many small ones are bounded by their number, a few large ones by this."""

MAX_UNFINISHED_BYTES = 1024**3
"""Of frames that have not arrived completely, over all connections."""

MAX_UNSENT_BYTES = 1024**3
"""Of answers that clients have not read, over all connections."""

MAX_CANDIDATES = 1_000_000
"""Candidates of one query, and width of a graph search: beyond that, one query is as much work as a hundred."""

MAX_BATCH_CANDIDATES = 2_000_000
"""The same of all queries that are searched in one call: some ten bytes each, and more where they are ranked again."""

MAX_FREE_HEADER_BYTES = 512
"""Longer headers are counted like payloads: filters and lists of columns."""

RESULT_BYTES = 12
"""A distance and a row id."""

FILTER_THREADS = FETCH_THREADS = 4
"""They wait for another process, and for storage."""


class Control(Protocol):
    """What a server can be asked about itself, and told to do."""

    def reload(self, index: str | None, version: int | None, *, hold: bool) -> Awaitable[dict[str, Any]]:
        """Move to a version, and stay there if asked to."""

    def drain(self) -> None:
        """Turn clients away, and stop."""

    def status(self) -> Awaitable[Mapping[str, Any]]:
        """Tell how it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How much is taken on.

    Parameters
    ----------
    threads : int
        Cores that one search may use.
    max_waiting, max_batch : int
        Queries that may wait, and that are searched in one call.
    limits : Limits
        What is taken from one client.
    """

    threads: int
    max_waiting: int = 4_096
    max_batch: int = 256
    limits: Limits = field(default_factory=Limits)


class _Search(NamedTuple):
    """What is the same in all requests of a batch."""

    held: Held
    k: int
    widths: Widths
    selection: Selection
    trace: Trace | None
    most: int
    """Queries in one call."""


class _Within(NamedTuple):
    """A search by radius: never together with another."""

    held: Held
    radius: float
    nprobe: int | None
    selection: Selection
    ticket: Ticket
    most: int = 1


@dataclass(slots=True, eq=False)
class _Results:
    """The answer to a search, as it grows."""

    held: Held
    columns: tuple[str, ...]
    waiting: Waiting[Any] | None = None
    searched_at: float = 0.0
    left: int = 0
    distances: Float32Array | None = None
    row_ids: UInt64Array | None = None


class Answering:
    """Answers the requests of all connections of a server.

    Parameters
    ----------
    server_id : int
        For messages.
    holdings : Holdings
        What there is to ask.
    access : Access
        Who may do what.
    workload : Workload
        How much is taken on.
    metrics : ServerMetrics
        Told of everything.
    control : Control
        What admins ask for.
    """

    def __init__(
        self,
        server_id: int,
        holdings: Holdings,
        access: Access,
        workload: Workload,
        metrics: ServerMetrics,
        control: Control,
    ) -> None:
        self.server_id = server_id
        self.limits = workload.limits
        self.offers = Offers(epoch=holdings.cluster.epoch, offers=())
        self.peers: set[Peer] = set()
        self.closed = False
        """Nothing new is taken; what was asked before is answered."""
        self._holdings = holdings
        self._access = access
        self._metrics = metrics
        self._control = control
        self._reading = Reading(holdings.allowed_columns)
        # Apart, so that slow filters never hold up fetches.
        self._filters = Gate("filters", "lance-dfaiss-filter", FILTER_THREADS)
        self._fetches = Gate("requests that read data", "lance-dfaiss-fetch", FETCH_THREADS)
        self._selecting: Together[Selection] = Together()
        self._held_bytes = 0
        self._unfinished_bytes = 0
        self._unsent_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._max_batch = workload.max_batch
        batcher: Batcher[Any] = Batcher(
            max_waiting=workload.max_waiting, max_batch=workload.max_batch, most=lambda key: key.most
        )
        self.lane = Lane(batcher, self._search, self._deliver)
        self._threads = workload.threads
        self._handlers: dict[int, Callable[[Peer, Frame], None]] = {
            Knn.KIND: self._knn,
            Range.KIND: self._range,
            Fetch.KIND: self._fetch,
            Reconstruct.KIND: self._reconstruct,
            Status.KIND: self._status,
            Reload.KIND: self._reload,
            Drain.KIND: self._drain,
            Cancel.KIND: self._cancel,
        }

    def start(self) -> None:
        """Begin; on the event loop."""
        self._loop = asyncio.get_running_loop()
        self.lane.start()

    def stop(self) -> None:
        """End the threads; what they have not begun is forgotten."""
        self.lane.stop()
        for gate in (self._filters, self._fetches):
            gate.stop()

    def publish(self, offers: Offers) -> None:
        """Tell all clients what can be asked for now."""
        self.offers = offers
        for peer in self.peers:
            peer.announce(offers)

    def joined(self, peer: Peer) -> bool:
        """Note a connection; False if there are too many."""
        self.peers.add(peer)
        return len(self.peers) <= MAX_CONNECTIONS

    def left(self, peer: Peer) -> None:
        """Note that a connection has ended."""
        self.peers.discard(peer)

    def rights_of(self, token: str, *, certificate: bool) -> Rights:
        """Return what somebody may do."""
        return self._access.rights_of(token, certificate=certificate)

    def unfinished(self, more_bytes: int) -> bool:
        """Note that so many more bytes of frames wait for the rest; False if there are too many."""
        self._unfinished_bytes += more_bytes
        return more_bytes <= 0 or self._unfinished_bytes <= MAX_UNFINISHED_BYTES

    def dropped(self, ticket: Ticket) -> None:
        """Stop working on a request that nobody waits for."""
        if ticket.task is None:
            self._release(ticket)
        else:
            ticket.task.cancel()  # what it holds is let go when it has ended
        # Not for the next collection of garbage: it refers to the ticket, and may hold megabytes.
        results, ticket.work = ticket.work, None
        if isinstance(results, _Results) and results.waiting is not None:
            self.lane.drop(results.waiting)

    def unsent(self, more_bytes: int) -> bool:
        """Note that so many more bytes of answers wait to be read; False if there are too many."""
        self._unsent_bytes += more_bytes
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            # Counted when something was sent last; since then some of it was read.
            self._unsent_bytes += sum(peer.recount() for peer in self.peers)
        return self._unsent_bytes <= MAX_UNSENT_BYTES

    def handle(self, peer: Peer, frame: Frame) -> None:
        """Answer a request, now or later.

        Raises
        ------
        ProtocolError
            If it is no request.
        """
        handler = self._handlers.get(frame.kind)
        if handler is None:
            raise ProtocolError(f"a frame of kind {frame.kind} is nothing to send to a server")
        if frame.request_id in peer.pending and frame.kind != Cancel.KIND:
            raise ProtocolError(f"request id {frame.request_id} is still in use")
        try:
            if self.closed and frame.kind != Cancel.KIND:
                raise Unavailable(f"server {self.server_id} stops, and takes nothing new", remedy="Ask another one")
            handler(peer, frame)
        except ProtocolError:
            raise
        except Exception as exc:  # an edge: it is this request's, and the connection goes on
            ticket = peer.pending.get(frame.request_id) or Ticket(
                peer, frame.request_id, "refused", time.monotonic(), 0
            )
            peer.pending[frame.request_id] = ticket
            self._fail(ticket, exc)

    def _open(self, peer: Peer, frame: Frame, kind: str, timeout: float | None, queries: int = 1) -> Ticket:
        """Note a request, if the client has not too many already."""
        now = time.monotonic()
        length_bytes = len(frame.payload)
        if len(frame.header) > MAX_FREE_HEADER_BYTES:
            length_bytes += len(frame.header)
        ticket = Ticket(peer, frame.request_id, kind, now, _deadline(now, timeout), queries, length_bytes)
        peer.pending[frame.request_id] = ticket
        self._held_bytes += ticket.length_bytes
        if self._held_bytes > MAX_HELD_BYTES:
            raise overloaded("bytes of requests", self._held_bytes, MAX_HELD_BYTES)
        if len(peer.pending) > self.limits.pending:
            raise overloaded("requests of this connection", len(peer.pending), self.limits.pending)
        return ticket

    def _knn(self, peer: Peer, frame: Frame) -> None:
        message: Knn = decode(frame, Knn)
        ticket = self._open(peer, frame, "knn", message.timeout, message.n)
        held = self._holdings.find(message.index, message.at)
        self._check_sizes(message.n, message.k)
        view = held.view
        queries = _queries(frame, message.n, view, message.dtype)
        widths = view.widths(message.nprobe, message.ef, message.k_factor)
        for parameter, value in (("k_factor", message.k * widths.k_factor), ("ef", widths.ef)):
            if value > MAX_CANDIDATES:
                raise over_limit(parameter, value, MAX_CANDIDATES)
        ticket.work = _Results(held, self._reading.check_in_ram(held, message.columns))
        trace = Trace() if message.explain else None
        candidates = max(message.k * widths.k_factor, widths.ef)
        most = max(1, min(self._max_batch, MAX_BATCH_CANDIDATES // candidates))

        def submit(selection: Selection) -> None:
            key = _Search(held, message.k, widths, selection, trace, most)
            self._submit(ticket, Waiting(key, queries, ticket.deadline, ticket, ticket.started))

        self._select(ticket, held, message.filter, message.tail, submit, trace)

    def _range(self, peer: Peer, frame: Frame) -> None:
        message: Range = decode(frame, Range)
        ticket = self._open(peer, frame, "range", message.timeout)
        held = self._holdings.find(message.index, message.at)
        view = held.view
        query = _queries(frame, 1, view, message.dtype)
        view.widths(message.nprobe, None, None)
        radius = checked_radius(message.radius, view.metric)
        ticket.work = _Results(held, self._reading.check_in_ram(held, message.columns))

        def submit(selection: Selection) -> None:
            key = _Within(held, radius, message.nprobe, selection, ticket)
            self._submit(ticket, Waiting(key, query, ticket.deadline, ticket, ticket.started))

        self._select(ticket, held, message.filter, message.tail, submit, None)

    def _fetch(self, peer: Peer, frame: Frame) -> None:
        message: Fetch = decode(frame, Fetch)
        ticket = self._open(peer, frame, "fetch", message.timeout, message.n)
        held = self._holdings.find(message.index, message.at)
        if not 0 <= message.n <= MAX_FETCH_ROWS:
            raise over_limit("row_ids", message.n, MAX_FETCH_ROWS)
        row_ids = row_ids_of(frame.payload, message.n)
        columns = self._reading.checked_columns(held, message.columns, message.n)
        self._read(ticket, "fetch", lambda: self._reading.columns(held, row_ids, columns, ticket.check))

    def _reconstruct(self, peer: Peer, frame: Frame) -> None:
        message: Reconstruct = decode(frame, Reconstruct)
        ticket = self._open(peer, frame, "reconstruct", message.timeout, message.n)
        held = self._holdings.find(message.index, message.at)
        self._reading.check_vectors(held)
        self._check_answer(message.n * held.view.model.spec.dim * 4, "row_ids")
        row_ids = row_ids_of(frame.payload, message.n)
        self._read(ticket, "fetch", lambda: self._reading.vectors(held, row_ids))

    def _status(self, peer: Peer, frame: Frame) -> None:
        ticket = self._open(peer, frame, "status", None)

        async def status() -> Message:
            return StatusReply(status=dict(await self._control.status()))

        self._later(ticket, status)

    def _reload(self, peer: Peer, frame: Frame) -> None:
        message: Reload = decode(frame, Reload)
        ticket = self._open(peer, frame, "reload", None)
        _check_admin(peer)

        async def reload() -> Message:
            return Done(facts=await self._control.reload(message.index, message.version, hold=message.hold))

        self._later(ticket, reload)

    def _drain(self, peer: Peer, frame: Frame) -> None:
        ticket = self._open(peer, frame, "drain", None)
        _check_admin(peer)
        self._control.drain()
        self._finish(ticket, Done())

    def _cancel(self, peer: Peer, frame: Frame) -> None:
        ticket = peer.pending.pop(frame.request_id, None)
        if ticket is not None:
            ticket.gone = True
            self.dropped(ticket)

    def _check_sizes(self, queries: int, k: int) -> None:
        limits = self.limits
        for parameter, value, most in (("k", k, limits.k), ("queries", queries, limits.queries)):
            if not 1 <= value <= most:
                raise over_limit(parameter, value, most)
        self._check_answer(queries * k * RESULT_BYTES, "k")

    def _check_answer(self, length_bytes: int, parameter: str) -> None:
        if length_bytes > self.limits.frame_bytes:
            raise too_long(parameter, length_bytes, self.limits.frame_bytes)

    def _select(
        self,
        ticket: Ticket,
        held: Held,
        filter_sql: str | None,
        tail: bool,
        submit: Callable[[Selection], None],
        trace: Trace | None,
    ) -> None:
        """Find out what to look at, on this thread if that is known, and go on."""
        view = held.view
        # What is known was checked before: a check may take as long as many searches.
        selection = None if trace is not None else view.cached(filter_sql, include_tail=tail)
        if selection is not None:
            submit(selection)
            return

        def evaluate() -> Selection:
            if filter_sql is not None:
                check_filter(filter_sql, columns=self._holdings.allowed_columns)
            return view.select(filter_sql, include_tail=tail, trace=trace)

        async def select() -> None:
            started = time.monotonic()
            # A search that is explained tells of its own filter.
            key = (view, filter_sql, tail, trace)
            found = await self._selecting.get(key, lambda: self._filters.run(evaluate))
            self._metrics.stage("filter", time.monotonic() - started)
            if not ticket.gone:
                submit(found)

        self._later(ticket, select)

    def _submit(self, ticket: Ticket, waiting: Waiting[Any]) -> None:
        results: _Results = ticket.work
        results.left = len(waiting.queries)
        self.lane.submit(waiting)
        results.waiting = waiting  # only now: what was never in the queue must not be taken out of it

    def _read(self, ticket: Ticket, stage: Stage, read: Callable[[], tuple[Message, list[Buffer]]]) -> None:
        """Answer from a thread that reads."""

        async def answer() -> None:
            started = time.monotonic()
            message, payload = await self._fetches.run(read)
            self._metrics.stage(stage, time.monotonic() - started)
            self._finish(ticket, message, payload)

        self._later(ticket, answer)

    def _later(self, ticket: Ticket, work: Callable[[], Awaitable[Message | None]]) -> None:
        """Run what takes longer; its message, if it has one, or its failure is the answer."""
        timer: asyncio.TimerHandle | None = None

        async def run() -> None:
            try:
                message = await work()
                if message is not None:
                    self._finish(ticket, message)
            except ENDINGS:
                raise
            except BaseException as exc:  # an edge: it belongs to the request
                self._fail(ticket, exc)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if timer is not None:
                timer.cancel()
            if ticket.task is task:
                ticket.task = None
            if ticket.gone and ticket.task is None:
                self._release(ticket)

        ticket.task = task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(ended)
        if ticket.deadline < math.inf:
            timer = self._loop.call_later(ticket.deadline - time.monotonic(), self._expire, ticket)

    def _expire(self, ticket: Ticket) -> None:
        self._fail(ticket, too_late(ticket.deadline - ticket.started))

    def _release(self, ticket: Ticket) -> None:
        """Count the payload of a request no more."""
        self._held_bytes -= ticket.length_bytes
        ticket.length_bytes = 0

    def _search(self, batch: Batch) -> Sequence[Outcome]:
        """Search a batch; on the lane's thread."""
        started = time.monotonic()
        lone = batch.queries == 1 and isinstance(batch.key, _Search)
        # FAISS's number of threads belongs to the thread that calls it.
        limit_threads(batch.key.held.lone_threads if lone else self._threads)
        if isinstance(batch.key, _Within):
            outcomes = self._search_within(batch, started)
        else:
            outcomes = self._search_nearest(batch, started)
        self._metrics.stage("search", time.monotonic() - started)
        self._metrics.batch(batch.queries)
        return outcomes

    def _search_nearest(self, batch: Batch, started: float) -> list[Outcome]:
        key: _Search = batch.key
        parts = [part.request.queries[part.start : part.stop] for part in batch.slices]
        queries = parts[0] if len(parts) == 1 else np.concatenate(parts)
        distances, row_ids = key.held.view.knn(
            np.ascontiguousarray(queries), key.k, key.widths, key.selection, key.trace
        )
        outcomes: list[Outcome] = []
        at = 0
        for part in batch.slices:
            end = at + part.stop - part.start
            outcomes.append((part.request.ticket, (part, started, distances[at:end], row_ids[at:end])))
            at = end
        return outcomes

    def _search_within(self, batch: Batch, started: float) -> list[Outcome]:
        key: _Within = batch.key
        part = batch.slices[0]
        distances, row_ids = key.held.view.within(part.request.queries, key.radius, key.nprobe, key.selection)
        return [(key.ticket, (part, started, distances[None], row_ids[None]))]

    def _deliver(self, outcomes: Sequence[Outcome]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._delivered, outcomes)

    def _delivered(self, outcomes: Sequence[Outcome]) -> None:
        """Answer the requests that a batch has finished; on the event loop."""
        for ticket, outcome in outcomes:
            if ticket.gone:
                continue
            if isinstance(outcome, BaseException):
                self._fail(ticket, outcome)
            elif self._add(ticket, *outcome):
                try:
                    self._answer(ticket)
                except Exception as exc:  # an edge: the others of the batch have their answers all the same
                    self._fail(ticket, exc)

    def _add(self, ticket: Ticket, part: Slice, started: float, distances: Float32Array, row_ids: UInt64Array) -> bool:
        """Add the results of some queries; tell whether they were the last."""
        results: _Results = ticket.work
        count = len(part.request.queries)
        if part.start == 0:
            results.searched_at = started
            self._metrics.stage("queue", started - ticket.started)
        results.left -= part.stop - part.start
        if part.stop - part.start == count:
            results.distances, results.row_ids = distances, row_ids
            return True
        if results.distances is None or results.row_ids is None:
            shape = (count, distances.shape[1])
            results.distances, results.row_ids = np.empty(shape, np.float32), np.empty(shape, np.uint64)
        results.distances[part.start : part.stop] = distances
        results.row_ids[part.start : part.stop] = row_ids
        return results.left == 0

    def _answer(self, ticket: Ticket) -> None:
        results: _Results = ticket.work
        assert results.distances is not None
        assert results.row_ids is not None
        now = time.monotonic()
        if now > ticket.deadline:
            self._expire(ticket)
            return
        n, width = results.distances.shape
        reply: Message
        if ticket.kind == "range":
            self._check_answer(width * RESULT_BYTES, "radius")
            reply = RangeReply(n=width)
        else:
            key: _Search = cast("Waiting[_Search]", results.waiting).key
            stages = () if key.trace is None else (_snapshot(key.held), *map(_told, key.trace.stages))
            reply = KnnReply(
                n=n,
                width=width,
                queued=results.searched_at - ticket.started,
                searched=now - results.searched_at,
                stages=stages,
            )
        payload = joined_results(results.distances, results.row_ids)
        if not results.columns:
            self._finish(ticket, reply, payload)
            return
        row_ids = results.row_ids[results.row_ids != MISSING_ROW_ID]

        def read() -> tuple[Message, list[Buffer]]:
            columns = self._reading.columns_in_ram(results.held, row_ids, results.columns, ticket.check)
            return reply, [*payload, columns]

        self._read(ticket, "encode", read)

    def _finish(self, ticket: Ticket, message: Message, payload: Sequence[Buffer] = ()) -> None:
        if ticket.gone:
            return
        ticket.peer.send(message, ticket.request_id, payload)  # first: it may be too long, and then fails
        del ticket.peer.pending[ticket.request_id]
        ticket.gone, ticket.work = True, None
        if ticket.task is None:  # or it is let go with the task
            self._release(ticket)
        self._metrics.answered(ticket.kind, "ok", ticket.queries, time.monotonic() - ticket.started)
        _log.debug("%s of %s answered: %d queries", ticket.kind, ticket.peer.name, ticket.queries)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        if ticket.gone:
            return
        self.dropped(ticket)
        ticket.peer.pending.pop(ticket.request_id, None)
        ticket.gone = True
        if isinstance(error, DfaissError):
            known = error
            _log.debug("%s of %s failed: %s", ticket.kind, ticket.peer.name, error)
        else:
            _log.error("%s of %s failed", ticket.kind, ticket.peer.name, exc_info=error)
            known = ServerFailed(
                f"server {self.server_id} failed: {type(error).__name__}",
                remedy="Its log has the traceback",
                server=self.server_id,
            )
        ticket.peer.send(failure_of(known), ticket.request_id)
        self._metrics.answered(ticket.kind, type(known).__name__, ticket.queries, time.monotonic() - ticket.started)


def _deadline(now: float, timeout: float | None) -> float:
    if timeout is None:
        return math.inf
    if not timeout > 0:  # also what is no number
        raise DeadlineExceeded("there was no time left when the request arrived", seconds=0.0)
    return now + timeout


def _queries(frame: Frame, n: int, view: View, dtype: str) -> Float32Array:
    """Return the queries of a request, checked."""
    dim = view.model.spec.dim
    try:
        raw = queries_of(frame.payload, n, dim, dtype)
    except ProtocolError as exc:  # of this request only: the index may be another one than the client has seen
        raise InvalidArgument(exc.message, remedy=exc.remedy, parameter="queries", value=len(frame.payload)) from exc
    return as_queries(raw, dim, view.metric)[0]


def _check_admin(peer: Peer) -> None:
    if not peer.admin:
        raise AccessDenied("that is for admins", remedy="Connect with the admin token")


def _snapshot(held: Held) -> dict[str, Any]:
    """Return what is searched, in the form of a stage."""
    snapshot = held.view.snapshot
    facts = {
        "factory": held.view.generation.manifest.spec.factory,
        "live_rows": int(snapshot.live_rows),
        "masked_rows": int(snapshot.masked_rows),
        "mapped_rows": int(snapshot.mapped_rows),
        "tail_rows": int(held.view.tail.rows),
    }
    return {"name": "snapshot", "seconds": 0.0, "facts": facts}


def _told(stage: Any) -> dict[str, Any]:
    facts = {name: value.item() if isinstance(value, np.generic) else value for name, value in stage.facts.items()}
    return {"name": stage.name, "seconds": stage.seconds, "facts": facts}
