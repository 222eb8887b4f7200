"""`connect` and the clients it returns: everything an `Index` does, over a cluster of servers."""

from __future__ import annotations

import asyncio
import math
import os
import ssl
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa

from ..errors import (
    AccessDenied,
    ClientUnusable,
    DfaissError,
    IndexNotFound,
    InvalidArgument,
    InvalidQuery,
    ProtocolError,
    SnapshotGone,
    Unavailable,
)
from ..search import Explanation
from ..search.arguments import (
    MAX_RESULTS,
    checked_columns,
    checked_filter,
    checked_k,
    checked_radius,
    checked_row_ids,
    too_many_results,
)
from ..spec import SearchOptions
from ..types import MISSING_ROW_ID, Float32Array
from ..vectors import as_queries
from .answers import Answer, columns_with_vectors, explanation, result_table
from .asking import (
    COALESCED_QUERIES,
    Asking,
    Call,
    FetchAsking,
    Found,
    KnnAsking,
    KnnKey,
    RangeAsking,
    RangeKey,
    ReconstructAsking,
    unavailable,
)
from .bridge import Bridge, Slot, forked_error
from .cluster import ClusterFile, read_cluster
from .connection import connection_error
from .fleet import Fleet, FleetOptions, Replica
from .wire import Done, Drain, Frame, Message, Offer, Reload, Status, StatusReply, decode

__all__ = ["Answer", "AsyncClient", "Client", "ClusterStats", "connect", "connect_async"]


TIMEOUT_SECONDS = 10.0
"""For one call, unless said otherwise: long beside any search, short for somebody who waits."""

RELOAD_SECONDS = 600.0
"""For `reload`: servers load shards before they answer."""

STATUS_SECONDS = 2.0
"""For the status of one server: it is told from memory."""

AGAIN = 5
"""How often a search is made anew because its snapshot went away between finding rows and reading their columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStats:
    """What a cluster holds of one index, as its client sees it.

    Parameters
    ----------
    index, metric : str
        Name and metric.
    dim : int
        Dimension.
    version : int
        Dataset version that answers are true to now.
    generation, at : str
        Of the index; and the snapshot.
    epoch : int
        Layout of the cluster.
    rows : int
        Rows that can be found.
    rows_by_group : tuple of int
        Those by shard group.
    servers_by_group : tuple of tuple of int
        Servers that answer now.
    coverage : float
        Share of the rows that there is a server for.
    column : str
        The vector column.
    columns, payload : tuple of str
        What may be asked for, and what of that is in RAM.
    queries, hedged, retried : int
        Queries asked by this client; queries asked of a second server because the first one took long; requests asked
        again because a server failed.
    """

    index: str
    metric: str
    dim: int
    version: int
    generation: str
    at: str
    epoch: int
    rows: int
    rows_by_group: tuple[int, ...]
    servers_by_group: tuple[tuple[int, ...], ...]
    coverage: float
    column: str
    columns: tuple[str, ...]
    payload: tuple[str, ...]
    queries: int
    hedged: int
    retried: int


def connect(
    cluster: str | os.PathLike[str] | ClusterFile,
    *,
    token: str | None = None,
    tls: ssl.SSLContext | str | os.PathLike[str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
    index: str | None = None,
    allow_partial: float | None = None,
    float16: bool = False,
    connections: int = 1,
    storage_options: Mapping[str, str] | None = None,
) -> Client:
    """Connect to a cluster that serves indexes.

    Parameters
    ----------
    cluster : str, path or ClusterFile
        The cluster file that ``lance-dfaiss serve`` wrote: a path, any URL that fsspec reads, or its content. A file
        is read again now and then, so servers may come and go.
    token : str, optional
        What the servers ask for. It is sent after the certificate was checked, and never without TLS but to this host.
    tls : ssl.SSLContext, str or path, optional
        Path of the certificates (PEM) that servers are trusted by, or a context, for instance with a certificate of
        the client. Default: the system's certificates if the cluster file says that servers have TLS.
    timeout : float
        Seconds for connecting, and for each call that does not say otherwise.
    index : str, optional
        Name of the index that calls are for; may be left out when the cluster serves one.
    allow_partial : float, optional
        Share of the rows, 0 to 1, that is enough when not all groups of servers can answer. By default an answer
        covers all rows or is an error.
    float16 : bool
        Send queries as float16: half the bytes, and about three digits.
    connections : int
        To each server.
    storage_options : mapping, optional
        For a cluster file given by URL.

    Returns
    -------
    Client
        To be closed after use; ``with lance_dfaiss.connect(...) as client`` does. Many threads may use one.

    Raises
    ------
    ClusterFileInvalid
        If there is no cluster file, or it is not one.
    Unavailable
        If not all groups have a server that is ready within the time; with the servers' last errors.
    AccessDenied
        If a server refuses the token or the client's certificate, or its own is not trusted.
    ProtocolError
        If a server speaks another protocol.
    IndexNotFound
        Naming the indexes that are served.
    """
    return Client(
        lambda: connect_async(
            cluster,
            token=token,
            tls=tls,
            timeout=timeout,
            index=index,
            allow_partial=allow_partial,
            float16=float16,
            connections=connections,
            storage_options=storage_options,
        )
    )


async def connect_async(
    cluster: str | os.PathLike[str] | ClusterFile,
    *,
    token: str | None = None,
    tls: ssl.SSLContext | str | os.PathLike[str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
    index: str | None = None,
    allow_partial: float | None = None,
    float16: bool = False,
    connections: int = 1,
    storage_options: Mapping[str, str] | None = None,
) -> AsyncClient:
    """Connect to a cluster that serves indexes, from a coroutine.

    Parameters
    ----------
    cluster, token, tls, timeout, index, allow_partial, float16, connections, storage_options
        As for `connect`.

    Returns
    -------
    AsyncClient
        For the event loop that runs now.

    Raises
    ------
    ClusterFileInvalid, Unavailable, AccessDenied, ProtocolError, IndexNotFound
        As `connect` does.
    """
    defaults = _Defaults(_checked_seconds(timeout), index, _checked_share(allow_partial), bool(float16))
    if isinstance(connections, bool) or not isinstance(connections, int) or connections < 1:
        raise InvalidArgument(
            f"connections must be a whole number of at least 1, not {connections!r}",
            parameter="connections",
            value=connections,
        )
    location = None if isinstance(cluster, ClusterFile) else os.fspath(cluster)
    if isinstance(cluster, ClusterFile):
        found = cluster
    else:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(None, read_cluster, os.fspath(cluster), storage_options)
    options = FleetOptions(
        token=token, tls=_tls_context(tls, found.tls), connections=connections, storage_options=storage_options
    )
    client = AsyncClient(Fleet(found, location, options), defaults)
    try:
        await client._begin()
    except BaseException:
        await client.close()
        raise
    return client


class _Defaults(NamedTuple):
    seconds: float
    name: str | None
    min_coverage: float | None
    float16: bool


class _Asked(NamedTuple):
    """A search, checked: what to send, and what to make of the answer."""

    key: Any
    payload: bytes
    n: int
    seconds: float
    offer: Offer
    single: bool
    wanted: list[str] | dict[str, str] | None


class AsyncClient:
    """Searches a cluster from coroutines of one event loop. Made by `connect_async`.

    Calls of the same moment and with the same options travel in one request.
    """

    def __init__(self, fleet: Fleet, defaults: _Defaults) -> None:
        self._fleet = fleet
        self._defaults = defaults
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        self._gathered: dict[KnnKey, list[Call]] = {}
        self._unusable = ""

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        _refuse_pickling()

    async def close(self) -> None:
        """Hang up; calls that wait get `ClientUnusable`."""
        if self._unusable:
            return
        self._unusable = "the client is closed"
        for calls in self._gathered.values():
            for call in calls:
                if not call.settle.done():
                    call.settle.set_exception(self._unusable_error())
        self._gathered.clear()
        await self._fleet.close()

    async def knn(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> Answer:
        """Find the nearest rows, as arrays; see `Client.knn`."""
        asked = self._check_knn(
            queries, k, filter, nprobe, ef, k_factor, include_tail and not fast_search, timeout, allow_partial, index
        )
        found = await self._ask(asked)
        return found.answer

    async def search(
        self,
        query: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        with_vectors: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> pa.Table:
        """Find the nearest rows, as a table; see `Client.search`."""
        asked = self._check_search(
            query, k, filter, columns, nprobe, ef, k_factor, include_tail and not fast_search, with_vectors,
            timeout, allow_partial, index,
        )  # fmt: skip
        return _table(asked, *await self._found(asked))

    async def range_search(
        self,
        query: Any,
        radius: float,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        nprobe: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        with_vectors: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> pa.Table:
        """Find every row nearer than a radius; see `Client.range_search`."""
        asked = self._check_range(
            query, radius, filter, columns, nprobe, include_tail and not fast_search, with_vectors, timeout,
            allow_partial, index,
        )  # fmt: skip
        return _table(asked, *await self._found(asked))

    async def reconstruct(
        self, row_ids: Any, *, timeout: float | None = None, index: str | None = None
    ) -> Float32Array:
        """Decode the vectors of some rows; see `Client.reconstruct`."""
        offer = self._offer(index)
        ids = checked_row_ids(row_ids)
        if not len(ids):
            return np.empty((0, offer.dim), np.float32)
        call = self._call(offer.index, ids.astype("<u8").tobytes(), len(ids), self._seconds(timeout))
        vectors: Float32Array = await self._settled(call, lambda: ReconstructAsking(self._fleet, call))
        return vectors

    async def explain(
        self,
        query: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = (),
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> Explanation:
        """Search, and tell what each group of servers did; see `Client.explain`."""
        started = time.perf_counter()
        asked = self._check_search(
            query, k, filter, columns, nprobe, ef, k_factor, include_tail and not fast_search, False, timeout,
            allow_partial, index,
        )  # fmt: skip
        asked = asked._replace(key=asked.key._replace(explain=True))
        found, _ = await self._found(asked)
        return explanation(found.offer, found.answer, found.stages, k=k, seconds=time.perf_counter() - started)

    def stats(self, *, index: str | None = None) -> ClusterStats:
        """Return what the cluster holds of an index; see `Client.stats`."""
        offer = self._offer(index)
        way = self._fleet.ways.get(offer.index)
        if way is None:
            raise unavailable(self._fleet, offer.index)
        offer, replicas, budget = way.route.offer, self._fleet.everyone(), self._fleet.budget
        return ClusterStats(
            index=offer.index,
            metric=offer.metric,
            dim=offer.dim,
            version=offer.version,
            generation=offer.generation,
            at=offer.at,
            epoch=offer.epoch,
            rows=way.rows,
            rows_by_group=offer.rows,
            servers_by_group=tuple(
                tuple(replicas[place].entry.id for place in members) for members in way.route.members
            ),
            coverage=way.route.coverage,
            column=offer.column,
            columns=offer.columns,
            payload=tuple(name for name in offer.columns if name in way.route.payload),
            queries=budget.asked,
            hedged=budget.hedged,
            retried=self._fleet.retries,
        )

    async def status(self) -> dict[int, dict[str, Any]]:
        """Ask every server how it is; see `Client.status`."""
        self._check_usable()
        replicas = list(self._fleet.replicas.values())
        told = await asyncio.gather(
            *(self._tell(replica, Status(), StatusReply, STATUS_SECONDS) for replica in replicas),
            return_exceptions=True,
        )
        found: dict[int, dict[str, Any]] = {}
        for replica, reply in zip(replicas, told, strict=True):
            if isinstance(reply, DfaissError):
                found[replica.entry.id] = {"server": replica.entry.id, "ready": False, "reason": str(reply)}
            elif isinstance(reply, BaseException):
                raise reply
            else:
                found[replica.entry.id] = reply.status
        return found

    async def reload(
        self, index: str | None = None, version: int | None = None, *, timeout: float = RELOAD_SECONDS
    ) -> dict[int, dict[str, Any]]:
        """Move all servers to a dataset version; see `Client.reload`."""
        self._check_usable()
        replicas = list(self._fleet.replicas.values())
        message, seconds = Reload(index=index, version=version), _checked_seconds(timeout)
        done = await asyncio.gather(
            *(self._tell(replica, message, Done, seconds) for replica in replicas), return_exceptions=True
        )
        # All have answered before any error is told: none is left in the middle of it unseen.
        for reply in done:
            if isinstance(reply, BaseException):
                raise reply
        return {replica.entry.id: reply.facts for replica, reply in zip(replicas, done, strict=True)}  # type: ignore[union-attr]

    async def drain(self, server: int, *, timeout: float | None = None) -> None:
        """Have a server stop, after it has answered what it was asked; see `Client.drain`."""
        self._check_usable()
        replica = self._fleet.replicas.get(server)
        if replica is None:
            known = ", ".join(map(str, self._fleet.replicas))
            raise InvalidArgument(
                f"there is no server {server!r} in the cluster", remedy=f"There is {known}", parameter="server",
                value=server,
            )  # fmt: skip
        await self._tell(replica, Drain(), Done, self._seconds(timeout))

    # Connecting.

    async def _begin(self) -> None:
        """Wait until everything can be asked.

        Raises
        ------
        DfaissError
            Why it cannot.
        """
        named = {served.name for served in self._fleet.cluster.indexes}
        if self._defaults.name is not None and self._defaults.name not in named:
            raise _no_index(self._defaults.name, tuple(sorted(named)))
        changed = asyncio.Event()
        self._fleet.start()
        self._fleet.waiting.add(changed.set)
        deadline = time.monotonic() + self._defaults.seconds
        try:
            while not self._ready(last=False):
                replicas = self._fleet.replicas.values()
                if all(replica.settled for replica in replicas):
                    self._raise_denied()
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), max(deadline - time.monotonic(), 0.0))
                except asyncio.TimeoutError:
                    break
        finally:
            self._fleet.waiting.discard(changed.set)
        if not self._ready(last=True):
            self._raise_denied()
            raise unavailable(self._fleet, self._defaults.name or min(named, default=""))

    def _ready(self, *, last: bool) -> bool:
        """Tell whether what the client is for can be asked; in the end, any one of several indexes is enough."""
        wanted = self._defaults.name
        names = [wanted] if wanted is not None else [served.name for served in self._fleet.cluster.indexes]
        enough = self._defaults.min_coverage
        settled = all(replica.settled for replica in self._fleet.replicas.values())
        good = []
        for name in names:
            way = self._fleet.ways.get(name)
            partly = enough is not None and (settled or last) and way is not None and way.route.coverage >= enough
            good.append(way is not None and (way.complete or partly))
        return any(good) if last else all(good)

    def _raise_denied(self) -> None:
        for replica in self._fleet.replicas.values():
            if isinstance(replica.error, (AccessDenied, ProtocolError)):
                raise replica.error

    # Checking what callers pass; also done in the threads of a Client.

    def _check_usable(self) -> None:
        if self._unusable:
            raise self._unusable_error()
        if os.getpid() != self._pid:
            raise forked_error()

    def _unusable_error(self) -> ClientUnusable:
        return ClientUnusable(self._unusable, remedy="Call connect again")

    def _offer(self, index: str | None) -> Offer:
        """Return the newest offer of an index: what its queries look like."""
        self._check_usable()
        offers = self._fleet.offers
        name = index if index is not None else self._defaults.name
        if name is None:
            served = self._fleet.cluster.indexes
            if len(served) > 1:
                names = sorted(each.name for each in served)
                raise InvalidArgument(
                    f"this cluster serves {len(names)} indexes", remedy=f"Pass index=, one of {', '.join(names)}",
                    parameter="index", value=None,
                )  # fmt: skip
            name = served[0].name if served else ""
        offer = offers.get(name) if isinstance(name, str) else None
        if offer is None:
            names = sorted({*offers, *(each.name for each in self._fleet.cluster.indexes)})
            if name in names:
                raise unavailable(self._fleet, name)
            raise _no_index(name, tuple(names))
        return offer

    def _seconds(self, timeout: float | None) -> float:
        return self._defaults.seconds if timeout is None else _checked_seconds(timeout)

    def _min_coverage(self, allow_partial: float | None) -> float | None:
        return self._defaults.min_coverage if allow_partial is None else _checked_share(allow_partial)

    def _check_knn(
        self, queries: Any, k: int, filter: str | None, nprobe: int | None, ef: int | None, k_factor: int | None,
        tail: bool, timeout: float | None, allow_partial: float | None, index: str | None,
    ) -> _Asked:  # fmt: skip
        offer = self._offer(index)
        array, single = as_queries(queries, offer.dim, offer.metric)
        k = checked_k(k)
        if len(array) * k > MAX_RESULTS:
            raise too_many_results(len(array), k)
        key = self._knn_key(offer, k, filter, nprobe, ef, k_factor, tail, timeout, allow_partial)
        return _Asked(key, self._bytes_of(array), len(array), self._seconds(timeout), offer, single, [])

    def _check_search(
        self, query: Any, k: int, filter: str | None, columns: Any, nprobe: int | None, ef: int | None,
        k_factor: int | None, tail: bool, with_vectors: bool, timeout: float | None, allow_partial: float | None,
        index: str | None,
    ) -> _Asked:  # fmt: skip
        offer = self._offer(index)
        array, single = as_queries(query, offer.dim, offer.metric)
        _checked_widths(nprobe, ef, k_factor)
        wanted = columns_with_vectors(offer, checked_columns(columns), with_vectors)
        k = checked_k(k)
        if len(array) * min(k, max(sum(offer.rows), 1)) > MAX_RESULTS:
            raise too_many_results(len(array), k)
        key = self._knn_key(offer, k, filter, nprobe, ef, k_factor, tail, timeout, allow_partial)
        key = key._replace(pads=False, columns=self._from_ram(offer.index, wanted))
        return _Asked(key, self._bytes_of(array), len(array), self._seconds(timeout), offer, single, wanted)

    def _check_range(
        self, query: Any, radius: Any, filter: str | None, columns: Any, nprobe: int | None, tail: bool,
        with_vectors: bool, timeout: float | None, allow_partial: float | None, index: str | None,
    ) -> _Asked:  # fmt: skip
        offer = self._offer(index)
        array, single = as_queries(query, offer.dim, offer.metric)
        if not single and len(array) != 1:
            raise InvalidArgument(
                f"range_search takes one query, not {len(array)}",
                remedy="Call it once a query",
                parameter="query",
                value=array.shape,
            )
        widths = _checked_widths(nprobe, None, None)
        wanted = columns_with_vectors(offer, checked_columns(columns), with_vectors)
        key = RangeKey(
            offer.index,
            checked_radius(radius, offer.metric),
            self._dtype,
            widths[0],
            checked_filter(filter),
            tail,
            self._from_ram(offer.index, wanted),
            self._min_coverage(allow_partial),
        )
        return _Asked(key, self._bytes_of(array), 1, self._seconds(timeout), offer, True, wanted)

    def _knn_key(
        self, offer: Offer, k: int, filter: str | None, nprobe: int | None, ef: int | None, k_factor: int | None,
        tail: bool, timeout: float | None, allow_partial: float | None,
    ) -> KnnKey:  # fmt: skip
        if nprobe is not None or ef is not None or k_factor is not None:
            nprobe, ef, k_factor = _checked_widths(nprobe, ef, k_factor)
        min_coverage = self._min_coverage(allow_partial)
        return KnnKey(
            offer.index, k, True, offer.dim, self._dtype, nprobe, ef, k_factor, checked_filter(filter), bool(tail), (),
            False, min_coverage, None if min_coverage is None else self._seconds(timeout),
        )  # fmt: skip

    @property
    def _dtype(self) -> str:
        return "f2" if self._defaults.float16 else "f4"

    def _bytes_of(self, queries: Float32Array) -> bytes:
        if not self._defaults.float16:
            return queries.astype("<f4", copy=False).tobytes()
        with np.errstate(over="ignore"):  # looked for below
            half = queries.astype("<f2")
        if not np.isfinite(half).all():
            raise InvalidQuery(
                "a query holds values too large for float16",
                remedy="Connect without float16=True",
                parameter="query",
                value=float(np.abs(queries).max()),
            )
        return half.tobytes()

    def _from_ram(self, index: str, wanted: Sequence[str] | Mapping[str, str] | None) -> tuple[str, ...]:
        """Return the columns to ask for with the search: all, if the servers have all of them in RAM."""
        way = self._fleet.ways.get(index)
        if way is None or not isinstance(wanted, list) or not all(name in way.route.payload for name in wanted):
            return ()
        return tuple(wanted)

    # Asking; on the event loop.

    def _call(self, key: Any, payload: bytes, n: int, seconds: float) -> Call:
        return Call(key, payload, n, seconds, self._loop.create_future())

    async def _settled(self, call: Call, begin: Callable[[], Asking]) -> Any:
        """Ask one question of one call, and wait for the answer."""
        self._check_usable()
        begin().begin()
        return await self._waited(call)

    async def _waited(self, call: Call) -> Any:
        future: Any = call.settle
        try:
            return await future
        except asyncio.CancelledError:
            call.leave()
            raise

    async def _ask(self, asked: _Asked) -> Found:
        call = self._call(asked.key, asked.payload, asked.n, asked.seconds)
        if isinstance(asked.key, RangeKey):
            found: Found = await self._settled(call, lambda: RangeAsking(self._fleet, call))
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
        self._fleet.gathering = True
        try:
            for key, calls in gathered.items():
                for together in _coalesced(calls):
                    if together[0].n:
                        KnnAsking(self._fleet, key, together).begin()
                    else:
                        self._nothing_asked(key, together)
        finally:
            self._fleet.gathering = False
            self._fleet.write()

    def _nothing_asked(self, key: KnnKey, calls: Sequence[Call]) -> None:
        """Answer calls without a query."""
        offer, width = self._fleet.offers[key.name], key.k if key.pads else 1
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

    async def _found(self, asked: _Asked) -> tuple[Found, pa.Table | None]:
        """Search, and read the columns that are wanted of the rows that were found, at the same snapshot."""
        deadline = time.monotonic() + asked.seconds
        for again in range(AGAIN + 1):
            found = await self._ask(asked._replace(seconds=max(deadline - time.monotonic(), 0.0)))
            if found.columns is not None or (asked.wanted is not None and not len(asked.wanted)):
                return found, found.columns
            began, row_ids = time.monotonic(), found.answer[1]
            row_ids = row_ids[row_ids != MISSING_ROW_ID]
            payload = row_ids.astype("<u8").tobytes()
            call = self._call(None, payload, len(row_ids), max(deadline - time.monotonic(), 0.0))
            offer, wanted = found.offer, asked.wanted
            try:
                fetched = await self._settled(call, lambda: FetchAsking(self._fleet, offer, wanted, call))  # noqa: B023
            except SnapshotGone:
                if again == AGAIN:
                    raise
                self._fleet.retries += 1
                continue
            found.stages.append((None, {"name": "fetch", "seconds": time.monotonic() - began, "rows": len(fetched)}))
            return found, fetched
        raise AssertionError("unreachable")

    async def _tell(self, replica: Replica, message: Message, expected: type[Message], seconds: float) -> Any:
        """Ask one server something that is about itself."""
        connection = replica.connection()
        if connection is None:
            raise replica.error or Unavailable(
                f"{replica.name} is not connected", groups=(replica.entry.group,), shards=(), coverage=0.0
            )
        waiting = _Once(expected, self._loop.create_future())
        request_id = connection.send(message, (), waiting)
        self._fleet.asked()
        try:
            return await asyncio.wait_for(waiting.future, seconds)
        except asyncio.TimeoutError as exc:
            raise connection_error(replica.name, exc) from exc
        finally:
            connection.cancel(request_id)


class _Once:
    """Waits for the answer of one server."""

    def __init__(self, expected: type[Message], future: asyncio.Future[Any]) -> None:
        self.expected = expected
        self.future = future

    def answered(self, frame: Frame) -> None:
        """Hand it over."""
        self.future.set_result(decode(frame, self.expected))

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


class Client:
    """Searches a cluster. Made by `connect`; safe to use from many threads, and to be closed after use.

    It has a thread of its own that talks to the servers. A process that was forked needs a client of its own.
    """

    def __init__(self, opened: Callable[[], Coroutine[Any, Any, AsyncClient]]) -> None:
        self._bridge = bridge = Bridge()
        # Also at exit, and for a client that is dropped: the thread must not outlive it.
        self._finalizer = weakref.finalize(self, bridge.stop)
        try:
            self._client = bridge.client = bridge.run(opened)
        except BaseException:
            self._finalizer()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        _refuse_pickling()

    def close(self) -> None:
        """Hang up; calls that wait in other threads get `ClientUnusable`. Safe to call twice."""
        self._finalizer()

    def knn(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> Answer:
        """Find the nearest rows, as arrays.

        Parameters
        ----------
        queries : array-like
            ``(dim,)`` or ``(n_queries, dim)``, any number type.
        k : int
            Results per query.
        filter, nprobe, ef, k_factor, include_tail, fast_search
            As for `Index.knn`; servers are stricter about filters.
        timeout : float, optional
            Seconds until `DeadlineExceeded`; that of `connect` by default.
        allow_partial : float, optional
            Share of the rows that is enough, 0 to 1; that of `connect` by default.
        index : str, optional
            Name of the index; that of `connect`, or the only one, by default.

        Returns
        -------
        Answer
            Distances float32 and row ids uint64, ``(n_queries, k)``, as `Index.knn` returns them; with ``coverage``,
            ``version``, ``generation`` and ``at``, which tell what they are the answer of.

        Raises
        ------
        InvalidQuery, InvalidArgument, InvalidFilter, UnknownColumn, TailTooLarge
            As `Index.knn` does; a server may refuse a filter that is too long, deep or costly.
        IndexNotFound
            Naming the indexes that are served.
        Unavailable
            If too many rows have no server; with the groups, the shards, and the coverage that is left.
        Overloaded
            If all replicas of a group have too much to do.
        DeadlineExceeded
            If the time is over.
        AccessDenied, ServerFailed, ProtocolError
            What else a server may say.
        ClientUnusable
            After `close`, and in a process forked since.
        """
        asked = self._client._check_knn(
            queries, k, filter, nprobe, ef, k_factor, include_tail and not fast_search, timeout, allow_partial, index
        )
        slot = Slot()
        call = Call(asked.key, asked.payload, asked.n, asked.seconds, slot)
        found: Found = self._bridge.ask(call, slot)
        return found.answer

    def search(
        self,
        query: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        with_vectors: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> pa.Table:
        """Find the nearest rows, as a table like `Index.search` returns it.

        Parameters
        ----------
        query : array-like
            ``(dim,)``, or ``(n_queries, dim)`` for a batch.
        k : int
            Results per query.
        columns : sequence of str or mapping, optional
            Columns to fetch, or names and SQL expressions; all that servers give by default, none for ``[]``. If the
            servers have all of them in RAM they come with the results, else one server reads them from the dataset.
        filter, nprobe, ef, k_factor, include_tail, fast_search, with_vectors
            As for `Index.search`.
        timeout, allow_partial, index
            As for `knn`.

        Returns
        -------
        pyarrow.Table
            As `Index.search` returns it. The schema's metadata has ``lance_dfaiss``: JSON with ``coverage``,
            ``version`` and ``generation``.

        Raises
        ------
        DfaissError
            As `knn` does, and as `Index.search` does for columns.
        """
        asked = self._client._check_search(
            query, k, filter, columns, nprobe, ef, k_factor, include_tail and not fast_search, with_vectors,
            timeout, allow_partial, index,
        )  # fmt: skip
        return _table(asked, *self._bridge.run(lambda: self._client._found(asked)))

    def range_search(
        self,
        query: Any,
        radius: float,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        nprobe: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        with_vectors: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> pa.Table:
        """Find every row nearer than a radius.

        Parameters
        ----------
        query : array-like
            ``(dim,)``.
        radius : float
            In the values of ``_distance``; see `Index.range_search`.
        filter, columns, nprobe, include_tail, fast_search, with_vectors
            As for `Index.range_search`.
        timeout, allow_partial, index
            As for `knn`.

        Returns
        -------
        pyarrow.Table
            As `search` returns it for one query.

        Raises
        ------
        DfaissError
            As `search` does, and as `Index.range_search` does for the radius.
        """
        asked = self._client._check_range(
            query, radius, filter, columns, nprobe, include_tail and not fast_search, with_vectors, timeout,
            allow_partial, index,
        )  # fmt: skip
        return _table(asked, *self._bridge.run(lambda: self._client._found(asked)))

    def reconstruct(self, row_ids: Any, *, timeout: float | None = None, index: str | None = None) -> Float32Array:
        """Decode the vectors of some rows, as the index holds them.

        Parameters
        ----------
        row_ids : array-like
            uint64 ``(n,)``, each a row that a search can find.
        timeout, index
            As for `knn`.

        Returns
        -------
        numpy.ndarray
            float32 ``(n, dim)``; see `Index.reconstruct`.

        Raises
        ------
        DfaissError
            As `Index.reconstruct` and `knn` do; all groups must be there.
        """
        return self._bridge.run(lambda: self._client.reconstruct(row_ids, timeout=timeout, index=index))

    def explain(
        self,
        query: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = (),
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        timeout: float | None = None,
        allow_partial: float | None = None,
        index: str | None = None,
    ) -> Explanation:
        """Search, and tell what each group of servers did.

        Parameters
        ----------
        query, k, filter, columns, nprobe, ef, k_factor, include_tail, fast_search
            As for `search`; no columns are fetched by default.
        timeout, allow_partial, index
            As for `knn`.

        Returns
        -------
        Explanation
            Printed, one line a stage; the facts of each begin with the group that it ran in.

        Raises
        ------
        DfaissError
            As `search` does.
        """
        return self._bridge.run(
            lambda: self._client.explain(
                query, k, filter=filter, columns=columns, nprobe=nprobe, ef=ef, k_factor=k_factor,
                include_tail=include_tail, fast_search=fast_search, timeout=timeout, allow_partial=allow_partial,
                index=index,
            )
        )  # fmt: skip

    def stats(self, *, index: str | None = None) -> ClusterStats:
        """Return what the cluster holds of an index, and who answers for it, as known here.

        Parameters
        ----------
        index : str, optional
            As for `knn`.

        Raises
        ------
        Unavailable
            If no server offers the index.
        IndexNotFound
            Naming the indexes that are served.
        """
        return self._client.stats(index=index)

    def status(self) -> dict[int, dict[str, Any]]:
        """Ask every server how it is.

        Returns
        -------
        dict of int to dict
            By server; see ``lance-dfaiss status``. One that does not answer has ``"ready": False`` and a ``"reason"``.
        """
        return self._bridge.run(lambda: self._client.status())

    def reload(
        self, index: str | None = None, version: int | None = None, *, timeout: float = RELOAD_SECONDS
    ) -> dict[int, dict[str, Any]]:
        """Have all servers read the cluster file again and move to a dataset version. For admins.

        Parameters
        ----------
        index : str, optional
            Name of the index; all of them by default.
        version : int, optional
            Dataset version; the newest by default.
        timeout : float
            Seconds to wait for servers, which load what is new.

        Returns
        -------
        dict of int to dict
            What each server says that it did.

        Raises
        ------
        AccessDenied
            If the token is not that of an admin.
        DfaissError
            What went wrong at the first server that failed; all have answered by then.
        """
        return self._bridge.run(lambda: self._client.reload(index, version, timeout=timeout))

    def drain(self, server: int, *, timeout: float | None = None) -> None:
        """Have a server stop, after it has answered what it was asked. For admins.

        Parameters
        ----------
        server : int
            Its id.
        timeout : float, optional
            Seconds until it has said that it will.

        Raises
        ------
        AccessDenied
            If the token is not that of an admin.
        InvalidArgument
            If there is no such server.
        """
        self._bridge.run(lambda: self._client.drain(server, timeout=timeout))


def _table(asked: _Asked, found: Found, fetched: pa.Table | None) -> pa.Table:
    answer = found.answer
    facts = {"coverage": answer.coverage, "version": answer.version, "generation": answer.generation}
    return result_table(answer[0], answer[1], fetched, single=asked.single, facts=facts)


def _refuse_pickling() -> NoReturn:
    raise ClientUnusable(
        "a client cannot be pickled: its connections belong to this process",
        remedy="Pass the path of the cluster file, and call connect over there",
    )


def _no_index(name: Any, available: tuple[str, ...]) -> IndexNotFound:
    return IndexNotFound(
        f"no index {name!r} is served", remedy=f"There is {', '.join(available)}", name=str(name), available=available
    )


def _tls_context(
    given: ssl.SSLContext | str | os.PathLike[str] | None, servers_have_tls: bool
) -> ssl.SSLContext | None:
    """Return how to check certificates; None for no TLS."""
    if isinstance(given, ssl.SSLContext):
        return given
    if given is None:
        return ssl.create_default_context() if servers_have_tls else None
    path = os.fspath(given)
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as exc:  # an ssl.SSLError too
        raise InvalidArgument(
            f"tls: no certificates can be read from {path}: {exc}",
            remedy="Pass the path of a PEM file, or an ssl.SSLContext",
            parameter="tls",
            value=path,
        ) from exc


def _checked_seconds(timeout: Any) -> float:
    good = not isinstance(timeout, bool) and isinstance(timeout, (int, float, np.integer, np.floating))
    if not good or not math.isfinite(timeout) or timeout <= 0:
        raise InvalidArgument(f"timeout must be seconds above 0, not {timeout!r}", parameter="timeout", value=timeout)
    return float(timeout)


def _checked_share(allow_partial: Any) -> float | None:
    if allow_partial is None:
        return None
    good = not isinstance(allow_partial, bool) and isinstance(allow_partial, (int, float, np.integer, np.floating))
    if not good or not 0 <= allow_partial <= 1:
        raise InvalidArgument(
            f"allow_partial must be a share of the rows from 0 to 1, not {allow_partial!r}",
            parameter="allow_partial",
            value=allow_partial,
        )
    return float(allow_partial)


def _checked_widths(
    nprobe: int | None, ef: int | None, k_factor: int | None
) -> tuple[int | None, int | None, int | None]:
    asked = SearchOptions(nprobe=nprobe, ef=ef, k_factor=k_factor)
    return _plain(asked.nprobe), _plain(asked.ef), _plain(asked.k_factor)


def _plain(width: int | None) -> int | None:
    return None if width is None else int(width)  # numpy's numbers do not travel
