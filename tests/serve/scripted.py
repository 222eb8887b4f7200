"""Servers that speak the real wire over real sockets, search by brute force, and misbehave when told to."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lance_dfaiss.errors import AccessDenied, DfaissError, SnapshotGone
from lance_dfaiss.serve import wire
from lance_dfaiss.serve.cluster import ClusterFile, ServedIndex, ServerEntry

DIM = 8
MISSING = np.uint64(2**64 - 1)

Script = Callable[["ScriptedServer", wire.Message], Any]
"""Given a request: None to answer it, an error to fail it, or a future to wait for first."""


def rows_of(count: int, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def nearest(vectors: NDArray[np.float32], row_ids: NDArray[np.uint64], queries: NDArray[np.float32], k: int) -> Any:
    distances = np.square(vectors[None] - queries[:, None]).sum(axis=2).astype(np.float32)
    width = max(min(k, len(vectors)), 1)
    found = np.full((len(queries), width), np.inf, np.float32), np.full((len(queries), width), MISSING, np.uint64)
    for i, row in enumerate(distances):
        order = np.lexsort((row_ids, row))[:k]
        found[0][i, : len(order)], found[1][i, : len(order)] = row[order], row_ids[order]
    return found


def offer_of(rows: Iterable[int], group: int, *, version: int = 1, epoch: int = 1, **changes: Any) -> wire.Offer:
    facts: dict[str, Any] = {
        "index": "vec_idx",
        "at": f"{epoch}.{version}",
        "epoch": epoch,
        "version": version,
        "committed_at": float(version),
        "generation": f"g{version}",
        "created_at": "2026-01-01T00:00:00Z",
        "group": group,
        "rows": tuple(rows),
        "shards": (f"shard-{group}",),
        "metric": "l2",
        "dim": DIM,
        "lists": 0,
        "column": "vec",
        "columns": ("id", "vec"),
        "payload": (),
    }
    return wire.Offer(**{**facts, **changes})


class ScriptedServer:
    """One server of a made-up cluster; of row ``i``, group ``i % groups`` holds it, and its id column is ``2 * i``.

    Each snapshot that it offers has the rows ``version`` times as far from the origin, so that a mixture shows.
    """

    def __init__(self, server: int, group: int, vectors: NDArray[np.float32], groups: int) -> None:
        self.server = server
        self.group = group
        self.token = ""
        self.protocol = wire.PROTOCOL
        self.epoch = 1
        self.draining = False
        self.frozen = False
        self.limits = wire.Limits()
        self.script: Script = lambda _server, _message: None
        self.requests: list[wire.Message] = []
        self.cancelled: list[int] = []
        self.greeted = 0
        self.row_ids = np.arange(len(vectors), dtype=np.uint64)[group::groups]
        self.vectors = vectors[group::groups]
        counts = [len(vectors[each::groups]) for each in range(groups)]
        self.offers: tuple[wire.Offer, ...] = (offer_of(counts, group),)
        self.accepted: set[_Connection] = set()
        self.connections: set[_Connection] = set()
        """Of those, the ones that were welcomed."""
        self.port = 0
        self.changed: asyncio.Condition
        self._listener: asyncio.Server | None = None
        self._notices: set[asyncio.Task[None]] = set()

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.changed = asyncio.Condition()
        self._listener = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, ssl=tls)
        self.port = self._listener.sockets[0].getsockname()[1]

    def kill(self) -> None:
        """Go away at once, as a process that is killed does."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in list(self.accepted):
            connection.transport.abort()

    def announce(self) -> None:
        for connection in self.connections:
            connection.send(wire.Offers(epoch=self.epoch, offers=self.offers, draining=self.draining), 0)

    def thaw(self) -> None:
        """Go on after having been frozen, with what came meanwhile."""
        self.frozen = False
        for connection in list(self.connections):
            connection.data_received(b"")

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds that a request or a connection makes so."""
        async with self.changed:
            await asyncio.wait_for(self.changed.wait_for(holds), 20)

    def notice(self) -> None:
        task = asyncio.get_running_loop().create_task(self._notify())
        self._notices.add(task)
        task.add_done_callback(self._notices.discard)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def searches(self) -> int:
        """Searches that it was asked for."""
        return sum(isinstance(message, wire.Knn) for message in self.requests)

    def found(self, message: wire.Knn, payload: memoryview) -> tuple[wire.Message, list[wire.Buffer]]:
        offer = next(offer for offer in self.offers if offer.at == message.at)
        queries = wire.queries_of(payload, message.n, offer.dim, message.dtype)
        vectors = self.vectors[:, : offer.dim] * offer.version
        distances, row_ids = nearest(vectors, self.row_ids, queries, message.k)
        parts = wire.joined_results(distances, row_ids)
        if message.columns:
            parts.append(self.columns(row_ids[row_ids != MISSING], message.columns))
        stages: tuple[dict[str, Any], ...] = ()
        if message.explain:
            stages = ({"name": "scan", "seconds": 0.25, "facts": {"rows": len(self.vectors)}},)
        return wire.KnnReply(n=message.n, width=distances.shape[1], stages=stages), parts

    def within(self, message: wire.Range, payload: memoryview) -> tuple[wire.Message, list[wire.Buffer]]:
        queries = wire.queries_of(payload, 1, DIM, message.dtype)
        distances, row_ids = nearest(self.vectors, self.row_ids, queries, len(self.vectors))
        inside = distances < message.radius
        parts = wire.joined_results(distances[inside], row_ids[inside])
        if message.columns:
            parts.append(self.columns(row_ids[inside], message.columns))
        return wire.RangeReply(n=int(inside.sum())), parts

    def columns(self, row_ids: NDArray[np.uint64], names: Iterable[str]) -> bytes:
        known = {"id": pa.array((2 * row_ids).astype(np.int64)), "half": pa.array(row_ids / 2)}
        sink = pa.BufferOutputStream()
        table = pa.table({name: known[name] for name in names})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    def vectors_of(self, message: wire.Reconstruct, payload: memoryview) -> tuple[wire.Message, list[wire.Buffer]]:
        wanted = wire.row_ids_of(payload, message.n)
        held = np.isin(wanted, self.row_ids)
        at = np.searchsorted(self.row_ids, wanted[held])
        parts: list[wire.Buffer] = [held.astype(np.uint8).tobytes(), self.vectors[at].tobytes()]
        return wire.ReconstructReply(n=message.n, held=int(held.sum()), dim=DIM), parts


class _Connection(asyncio.Protocol):
    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.transport: Any = None
        self.reader = wire.FrameReader(64 * 1024 * 1024)
        self.greeted = False
        self.kept = b""
        self.waiting: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.server.accepted.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.server.accepted.discard(self)
        self.server.connections.discard(self)
        for task in self.waiting:
            task.cancel()
        self.server.notice()

    def send(self, message: wire.Message, request_id: int, payload: Iterable[wire.Buffer] = ()) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"".join(wire.encode(message, request_id, list(payload))))

    def data_received(self, data: bytes) -> None:
        if self.server.frozen:
            self.kept += data
        else:
            data, self.kept = self.kept + data, b""
        if not self.server.frozen:
            for frame in self.reader.feed(data):
                message = wire.decode(frame)
                if isinstance(message, wire.Hello):
                    self.greet(message)
                elif isinstance(message, wire.Cancel):
                    self.server.cancelled.append(frame.request_id)
                else:
                    self.take(message, frame)
        elif data:
            # What a stopped process has not read yet is known to nobody but this test.
            reader = wire.FrameReader(64 * 1024 * 1024)
            for frame in reader.feed(data):
                self.server.requests.append(wire.decode(frame))
        self.server.notice()

    def greet(self, hello: wire.Hello) -> None:
        server = self.server
        server.greeted += 1
        if hello.token != server.token:
            self.send(wire.failure_of(AccessDenied("wrong token")), 0)
            self.transport.close()
            return
        self.send(
            wire.Welcome(
                protocol=server.protocol,
                server=server.server,
                epoch=server.epoch,
                limits=server.limits,
                offers=server.offers,
                draining=server.draining,
            ),
            0,
        )
        server.connections.add(self)

    def take(self, message: wire.Message, frame: wire.Frame) -> None:
        server, payload = self.server, memoryview(bytes(frame.payload))
        if not isinstance(message, wire.Status):
            server.requests.append(message)
        verdict = server.script(server, message)
        if isinstance(verdict, asyncio.Future):
            task = asyncio.get_running_loop().create_task(self.later(verdict, message, frame.request_id, payload))
            self.waiting.add(task)
            task.add_done_callback(self.waiting.discard)
        else:
            self.answer(verdict, message, frame.request_id, payload)

    async def later(self, verdict: Any, message: wire.Message, request_id: int, payload: memoryview) -> None:
        self.answer(await verdict, message, request_id, payload)

    def answer(self, verdict: Any, message: wire.Message, request_id: int, payload: memoryview) -> None:
        server = self.server
        at = getattr(message, "at", None)
        if verdict is None and at is not None and all(offer.at != at for offer in server.offers):
            verdict = SnapshotGone("gone", snapshot=at)
        if isinstance(verdict, DfaissError):
            self.send(wire.failure_of(verdict), request_id)
        elif isinstance(message, wire.Knn):
            reply, parts = server.found(message, payload)
            self.send(reply, request_id, parts)
        elif isinstance(message, wire.Range):
            reply, parts = server.within(message, payload)
            self.send(reply, request_id, parts)
        elif isinstance(message, wire.Fetch):
            names = ("id",) if message.columns is None else tuple(message.columns)
            stream = server.columns(wire.row_ids_of(payload, message.n), names)
            self.send(wire.TableReply(rows=message.n), request_id, [stream])
        elif isinstance(message, wire.Reconstruct):
            reply, parts = server.vectors_of(message, payload)
            self.send(reply, request_id, parts)
        elif isinstance(message, wire.Status):
            self.send(wire.StatusReply(status={"server": server.server, "ready": True}), request_id)
        else:
            moved = {"vec_idx": f"server {server.server}"}
            self.send(wire.Done(facts={"at": moved, "versions": {"vec_idx": 3}}), request_id)


class ScriptedCluster:
    """Servers of ``groups`` groups with ``replicas`` each, over the same made-up rows."""

    def __init__(self, groups: int = 1, replicas: int = 1, rows: int = 40) -> None:
        self.vectors = rows_of(rows)
        self.row_ids = np.arange(rows, dtype=np.uint64)
        self.servers = [
            ScriptedServer(group * replicas + replica, group, self.vectors, groups)
            for group in range(groups)
            for replica in range(replicas)
        ]
        self.replicas = replicas

    async def __aenter__(self) -> ScriptedCluster:
        self._started = list(self.servers)
        for server in self._started:
            await server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for server in self._started:
            server.kill()

    def file(self, *, epoch: int = 1, tls: bool = False, host: str = "127.0.0.1") -> ClusterFile:
        return ClusterFile(
            epoch=epoch,
            replicas=self.replicas,
            refresh_seconds=0.0,
            indexes=(ServedIndex(name="vec_idx", dataset="memory", index="vec_idx"),),
            servers=tuple(
                ServerEntry(id=server.server, host=host, port=server.port, http_port=None, group=server.group)
                for server in self.servers
            ),
            tls=tls,
        )

    def nearest(self, queries: NDArray[np.float32], k: int, version: int = 1) -> Any:
        return nearest(self.vectors * version, self.row_ids, np.atleast_2d(queries), k)


class ClusterThread:
    """A scripted cluster on a thread of its own, for clients that block."""

    def __init__(self, cluster: ScriptedCluster, tls: ssl.SSLContext | None = None) -> None:
        self.cluster = cluster
        self._tls = tls
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> ClusterThread:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(20)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call something on the loop of the servers."""

        async def called() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self.loop).result(20)

    def until(self, server: ScriptedServer, holds: Callable[[], bool]) -> None:
        asyncio.run_coroutine_threadsafe(server.until(holds), self.loop).result(20)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        for server in self.cluster.servers:
            await server.start(self._tls)
        self._ready.set()
        await self._over.wait()
        for server in self.cluster.servers:
            server.kill()
