"""The client for coroutines."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from ..errors import ClientUnusable, DfaissError, InvalidArgument
from ..search import Explanation
from ..search.arguments import checked_row_ids
from ..search.tables import result_table
from ..types import Float32Array
from .answers import METADATA_KEY, Answer, explanation
from .asking import unavailable
from .checks import Asked, checked_seconds
from .core import Core
from .questions import Found, ReconstructAsking
from .stats import ClusterStats, cluster_stats
from .wire import Done, Drain, Reload, Status, StatusReply

__all__ = ["RELOAD_SECONDS", "AsyncClient", "refuse_pickling", "table_of"]

RELOAD_SECONDS = 600.0
"""For `reload`: servers load shards before they answer."""

STATUS_SECONDS = 2.0
"""For the status of one server: it is told from memory."""


class AsyncClient:
    """Searches a cluster from coroutines of one event loop. Made by `connect_async`.

    Calls of the same moment and with the same options travel in one request. Parameters and errors are those of the
    same methods of `Client`.

    Parameters
    ----------
    core : Core
        What asks.
    """

    def __init__(self, core: Core) -> None:
        self.core = core
        self._fleet = core.fleet

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        refuse_pickling()

    async def close(self) -> None:
        """Hang up; calls that wait get `ClientUnusable`."""
        await self.core.close()

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
        asked = self.core.checks.knn(
            queries, k, filter, nprobe, ef, k_factor, include_tail and not fast_search, timeout, allow_partial, index
        )
        found = await self.core.ask(asked)
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
        asked = self.core.checks.search(
            query, k, filter, columns, nprobe, ef, k_factor, include_tail and not fast_search, with_vectors,
            timeout, allow_partial, index,
        )  # fmt: skip
        return table_of(asked, *await self.core.found(asked))

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
        asked = self.core.checks.range_search(
            query, radius, filter, columns, nprobe, include_tail and not fast_search, with_vectors, timeout,
            allow_partial, index,
        )  # fmt: skip
        return table_of(asked, *await self.core.found(asked))

    async def reconstruct(
        self, row_ids: Any, *, timeout: float | None = None, index: str | None = None
    ) -> Float32Array:
        """Decode the vectors of some rows; see `Client.reconstruct`."""
        offer = self.core.checks.offer(index)
        ids = checked_row_ids(row_ids)
        if not len(ids):
            return np.empty((0, offer.dim), np.float32)
        call = self.core.call(offer.index, ids.astype("<u8").tobytes(), len(ids), self.core.checks.seconds(timeout))
        vectors: Float32Array = await self.core.settled(call, lambda: ReconstructAsking(self._fleet, call))
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
        asked = self.core.checks.search(
            query, k, filter, columns, nprobe, ef, k_factor, include_tail and not fast_search, False, timeout,
            allow_partial, index,
        )  # fmt: skip
        asked = asked._replace(key=asked.key._replace(explain=True))
        found, _ = await self.core.found(asked)
        return explanation(found.offer, found.answer, found.stages, k=k, seconds=time.perf_counter() - started)

    def stats(self, *, index: str | None = None) -> ClusterStats:
        """Return what the cluster holds of an index; see `Client.stats`."""
        offer = self.core.checks.offer(index)
        way = self._fleet.ways.get(offer.index)
        if way is None:
            raise unavailable(self._fleet, offer.index)
        return cluster_stats(self._fleet, way)

    async def status(self) -> dict[int, dict[str, Any]]:
        """Ask every server how it is; see `Client.status`."""
        self.core.check_usable()
        replicas = list(self._fleet.replicas.values())
        told = await asyncio.gather(
            *(self.core.tell(replica, Status(), StatusReply, STATUS_SECONDS) for replica in replicas),
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
        self.core.check_usable()
        replicas = list(self._fleet.replicas.values())
        seconds, hold = checked_seconds(timeout), version is not None
        told: dict[int, dict[str, Any]] = {}
        if version is None and replicas:
            # One of them looks which the newest version is, and the others are told: they might find a newer one.
            first = replicas.pop(0)
            reply = await self.core.tell(first, Reload(index=index), Done, seconds)
            told[first.entry.id] = reply.facts
            wanted = [Reload(index=name, version=found) for name, found in reply.facts["versions"].items()]
        else:
            wanted = [Reload(index=index, version=version, hold=hold)]
        for message in wanted:
            done = await asyncio.gather(
                *(self.core.tell(replica, message, Done, seconds) for replica in replicas), return_exceptions=True
            )
            # All have answered before any error is told: none is left in the middle of it unseen.
            for replica, answer in zip(replicas, done, strict=True):
                if isinstance(answer, BaseException):
                    raise answer
                facts = told.setdefault(replica.entry.id, {"at": {}, "versions": {}})
                for key, found in answer.facts.items():
                    facts[key].update(found)
        return told

    async def drain(self, server: int, *, timeout: float | None = None) -> None:
        """Have a server stop, after it has answered what it was asked; see `Client.drain`."""
        self.core.check_usable()
        replica = self._fleet.replicas.get(server)
        if replica is None:
            known = ", ".join(map(str, self._fleet.replicas))
            raise InvalidArgument(
                f"there is no server {server!r} in the cluster", remedy=f"There is {known}", parameter="server",
                value=server,
            )  # fmt: skip
        await self.core.tell(replica, Drain(), Done, self.core.checks.seconds(timeout))


def table_of(asked: Asked, found: Found, fetched: pa.Table | None) -> pa.Table:
    """Return what a search found as a table."""
    answer = found.answer
    facts = {"coverage": answer.coverage, "version": answer.version, "generation": answer.generation}
    metadata = {METADATA_KEY: json.dumps(facts).encode()}
    return result_table(answer[0], answer[1], fetched, single=asked.single, metadata=metadata)


def refuse_pickling() -> NoReturn:
    """Say why a client cannot be pickled."""
    raise ClientUnusable(
        "a client cannot be pickled: its connections belong to this process",
        remedy="Pass the path of the cluster file, and call connect over there",
    )
