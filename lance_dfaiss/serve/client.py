"""`connect` and the clients it returns: everything an `Index` does, over a cluster of servers."""

from __future__ import annotations

import asyncio
import os
import ssl
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn

import pyarrow as pa

from ..errors import InvalidArgument
from ..search import Explanation
from ..types import Float32Array
from .answers import Answer
from .asking import Call
from .async_client import RELOAD_SECONDS, AsyncClient, refuse_pickling, table_of
from .bridge import Bridge, Slot
from .checks import Defaults, checked_seconds, checked_share, tls_context
from .cluster import ClusterFile, read_cluster
from .core import Core
from .fleet import Fleet, FleetOptions
from .questions import Found
from .stats import ClusterStats

__all__ = ["Answer", "AsyncClient", "Client", "ClusterStats", "connect", "connect_async"]

TIMEOUT_SECONDS = 10.0
"""For one call, unless said otherwise: long beside any search, short for somebody who waits."""


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
    defaults = Defaults(checked_seconds(timeout), index, checked_share(allow_partial), bool(float16))
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
        token=token, tls=tls_context(tls, found.tls), connections=connections, storage_options=storage_options
    )
    core = Core(Fleet(found, location, options), defaults)
    try:
        await core.begin()
    except BaseException:
        await core.close()
        raise
    return AsyncClient(core)


class Client:
    """Searches a cluster. Made by `connect`; safe to use from many threads, and to be closed after use.

    It has a thread of its own that talks to the servers. A process that was forked needs a client of its own.
    """

    def __init__(self, opened: Callable[[], Coroutine[Any, Any, AsyncClient]]) -> None:
        self._bridge = bridge = Bridge()
        # Also at exit, and for a client that is dropped: the thread must not outlive it.
        self._finalizer = weakref.finalize(self, bridge.stop)
        try:
            self._client = bridge.run(opened)
            bridge.client = self._client.core
        except BaseException:
            self._finalizer()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        refuse_pickling()

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
        asked = self._client.core.checks.knn(
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
        asked = self._client.core.checks.search(
            query, k, filter, columns, nprobe, ef, k_factor, include_tail and not fast_search, with_vectors,
            timeout, allow_partial, index,
        )  # fmt: skip
        return table_of(asked, *self._bridge.run(lambda: self._client.core.found(asked)))

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
        asked = self._client.core.checks.range_search(
            query, radius, filter, columns, nprobe, include_tail and not fast_search, with_vectors, timeout,
            allow_partial, index,
        )  # fmt: skip
        return table_of(asked, *self._bridge.run(lambda: self._client.core.found(asked)))

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
            Dataset version; the newest by default. One that is named is held until the next call: servers do not
            follow the dataset meanwhile.
        timeout : float
            Seconds to wait for servers, which load what is new.

        Returns
        -------
        dict of int to dict
            By server: ``at`` and ``versions``, the snapshot and dataset version of each index it moved.

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
