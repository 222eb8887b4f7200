"""Servers in threads of the test's own process: real sockets and real loops, without the second that a process takes.

For tests of what servers answer. What happens to processes (killed, stopped, restarted) is tested with processes.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import itertools
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lance_dfaiss.serve.answering import Workload
from lance_dfaiss.serve.cluster import ClusterFile, ServedIndex, plan_cluster, write_cluster
from lance_dfaiss.serve.holdings import HoldingOptions
from lance_dfaiss.serve.server import Server, ServerConfig
from lance_dfaiss.serve.sifter import Sifter
from lance_dfaiss.types import UInt64Array

__all__ = ["Cluster", "Door", "Running", "Settings", "listening", "running"]

_CLUSTERS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What servers of a test are told, beside the cluster.

    All servers of the test process have their filters evaluated by the same processes, as each takes a second to
    start; not if ``own_filters``.
    """

    own_filters: bool = False
    holding: HoldingOptions = field(default_factory=HoldingOptions)
    workload: Workload = field(default_factory=lambda: Workload(threads=1))
    more: dict[str, Any] = field(default_factory=dict)


_LOCK = threading.Lock()


def _filters() -> Sifter:
    with _LOCK:  # two first calls at once would both make one
        return _the_filters()


@functools.cache
def _the_filters() -> Sifter:
    sifter = Sifter(memory_limit_bytes=2 * 1024**3, timeout_seconds=30.0)
    sifter.start()
    atexit.register(sifter.close)
    return sifter


class _Share:
    """What one server sees of the processes that evaluate filters for all."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._keys: set[str] = set()
        self.restarts = 0

    def start(self) -> None:
        _filters()

    def open(self, key: str, *place: Any) -> None:
        self._keys.add(key)
        _filters().open(self._name + key, *place)

    def close_key(self, key: str) -> None:
        self._keys.discard(key)
        _filters().close_key(self._name + key)

    def matching(self, key: str, sql: str) -> UInt64Array:
        return _filters().matching(self._name + key, sql)

    def close(self) -> None:
        for key in list(self._keys):
            self.close_key(key)


class Running:
    """A server on a loop of its own.

    Entered, it is ready or has failed; `launch` does not wait for that.
    """

    def __init__(
        self,
        config: ServerConfig,
        sock: socket.socket,
        http: socket.socket | None = None,
        *,
        own_filters: bool = True,
    ) -> None:
        self.server = Server(config, sock, http)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._problem: BaseException | None = None
        if not own_filters:
            share: Any = _Share(f"{next(_CLUSTERS)}/")
            self.server._sifter = self.server.holdings._sift = share
        self.address: tuple[str, int] = sock.getsockname()
        self._thread = threading.Thread(target=self._run, name=f"server-{config.server_id}")

    @property
    def ended(self) -> bool:
        """Whether the server has stopped by itself."""
        return self._started.is_set() and not self._thread.is_alive()

    def launch(self) -> None:
        """Begin to start."""
        self._thread.start()

    def __enter__(self) -> Running:
        if self._thread.ident is None:
            self.launch()
        assert self._started.wait(60)
        if self._problem is not None:
            self._thread.join()
            raise self._problem
        return self

    def __exit__(self, *exc: object) -> None:
        self.call(self.server.stop)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def call(self, work: Any, *args: Any) -> None:
        """Run something on the server's loop, unless that has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work, *args)

    def _run(self) -> None:
        async def serve() -> None:
            try:
                await self.server.start()
            except BaseException as exc:
                self._problem = exc
                return
            finally:
                self._started.set()
            await self.server.serve_until_stopped()

        try:
            self._loop.run_until_complete(serve())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def listening() -> socket.socket:
    """A socket on a free port of this machine."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


@dataclass
class Cluster:
    """Running servers and their file."""

    location: str
    file: ClusterFile
    servers: list[Running]
    config: ServerConfig
    own_filters: bool
    _stack: ExitStack

    def join(self, weight: float = 1.0) -> Running:
        """Write the next layout, with one more server, and start that; the others have not been told."""
        sock = listening()
        self.file, entry = self.file.with_server("127.0.0.1", sock.getsockname()[1], http_port=None, weight=weight)
        config = replace(self.config, cluster=self.file, server_id=entry.id)
        server = Running(config, sock, own_filters=self.own_filters)
        write_cluster(self.location, self.file)
        self.servers.append(self._stack.enter_context(server))
        return server


@contextmanager
def running(
    folder: Path,
    indexes: Sequence[ServedIndex],
    *,
    servers: int = 1,
    replicas: int = 1,
    refresh_seconds: float = 0.0,
    settings: Settings | None = None,
) -> Iterator[Cluster]:
    """Run a whole cluster, with its file in a folder."""
    settings = Settings() if settings is None else settings
    stack = ExitStack()
    sockets = [stack.enter_context(listening()) for _ in range(servers)]
    cluster = plan_cluster(
        tuple(indexes),
        [("127.0.0.1", sock.getsockname()[1], None) for sock in sockets],
        replicas=replicas,
        refresh_seconds=refresh_seconds,
    )
    location = str(folder / "cluster.json")
    write_cluster(location, cluster)
    config = ServerConfig(
        cluster=cluster,
        server_id=0,
        location=location,
        holding=settings.holding,
        workload=settings.workload,
        **settings.more,
    )
    with stack:
        started = [
            Running(replace(config, server_id=i), sock, own_filters=settings.own_filters)
            for i, sock in enumerate(sockets)
        ]
        for server in started:
            server.launch()
        for server in started:
            stack.enter_context(server)
        yield Cluster(location, cluster, started, config, settings.own_filters, stack)


class Door:
    """Holds up a server's lane: the batch that it takes next is searched once `open` is called."""

    def __init__(self, server: Running) -> None:
        self._lane = server.server.answering.lane
        self._search = self._lane._search
        self._inside, self._opened = threading.Event(), threading.Event()

    def __enter__(self) -> Door:
        self._lane._search = self._wait
        return self

    def __exit__(self, *exc: object) -> None:
        self.open()

    def open(self) -> None:
        """Let it go on."""
        self._lane._search = self._search
        self._opened.set()

    def wait_inside(self) -> None:
        """Wait until a batch has come."""
        assert self._inside.wait(30)

    def _wait(self, batch: Any) -> Any:
        self._inside.set()
        assert self._opened.wait(60)
        return self._search(batch)
