"""Servers in threads of the test's own process: real sockets and real loops, without the second that a process takes.

For tests of what servers answer. What happens to processes (killed, stopped, restarted) is tested with processes.
"""

from __future__ import annotations

import asyncio
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

__all__ = ["Running", "Settings", "listening", "running"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What servers of a test are told, beside the cluster."""

    holding: HoldingOptions = field(default_factory=HoldingOptions)
    workload: Workload = field(default_factory=lambda: Workload(threads=1))
    more: dict[str, Any] = field(default_factory=dict)


class Running:
    """A server on a loop of its own."""

    def __init__(self, config: ServerConfig, sock: socket.socket, http: socket.socket | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._problem: BaseException | None = None
        self.server = Server(config, sock, http)
        self._thread = threading.Thread(target=self._run, name=f"server-{config.server_id}")

    def __enter__(self) -> Running:
        self._thread.start()
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
    sockets = [listening() for _ in range(servers)]
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
    with ExitStack() as stack:
        started = [stack.enter_context(Running(replace(config, server_id=i), sock)) for i, sock in enumerate(sockets)]
        yield Cluster(location, cluster, started)
