"""A server: one event loop for sockets, one lane for searches, one loader, a few threads for what reads data."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .._version import __version__
from ..errors import DfaissError
from ..machine import resident_bytes, usable_cores
from .answering import Answering, Workload
from .cluster import ClusterFile, note_versions, read_cluster
from .gates import ENDINGS
from .holdings import HoldingOptions, Holdings, Swap
from .metrics import ServerMetrics
from .page import StatusPort
from .peer import HELLO_SECONDS, Peer
from .report import holding_of, index_status
from .security import Access
from .sifter import Sifter
from .status import ServerStatus
from .wire import Offers

__all__ = ["Server", "ServerConfig"]

_log = logging.getLogger(__name__)

GRID_MARGIN_SECONDS = 0.2
"""How long after a point of the grid servers look for versions: a commit becomes visible a moment after its time."""

WATCH_SECONDS = 5.0
"""How often the cluster file is read again where versions are not followed more often than that."""

FAREWELL_SECONDS = 5.0
"""How long clients may take to read their last answers."""

RETIRE_SECONDS = 10.0
"""How long nobody has asked a server that is not in the cluster any more, when it ends."""

SWITCH_SECONDS = 0.0005
"""How long a thread may keep the interpreter while another waits for it: the lane hands over a hundred times a
second, and Python's 5 ms would be most of a query's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a server is told when it starts.

    Parameters
    ----------
    cluster : ClusterFile
        Layout and indexes.
    server_id : int
        Which of its servers this is.
    location : str or None
        Where the cluster file lies; it is read again now and then. None: it never changes.
    holding : HoldingOptions
        How snapshots are held.
    access : Access
        Who may do what.
    tls : ssl.SSLContext or None
        For the port of requests.
    workload : Workload
        How much is taken on.
    filter_seconds, filter_bytes
        Time and memory for one filter.
    drain_seconds : float
        How long a server that is told to stop goes on answering, so that clients have turned away.
    """

    cluster: ClusterFile
    server_id: int
    location: str | None = None
    holding: HoldingOptions = field(default_factory=HoldingOptions)
    access: Access = field(default_factory=Access)
    tls: ssl.SSLContext | None = None
    workload: Workload = field(default_factory=lambda: Workload(threads=usable_cores()))
    filter_seconds: float = 10.0
    filter_bytes: int = 2 * 1024**3
    drain_seconds: float = 1.0


class Server:
    """Serves its share of the indexes of a cluster.

    Parameters
    ----------
    config : ServerConfig
        What to serve, and how.
    sock : socket.socket
        Bound, listening; for requests.
    http : socket.socket or None
        Bound, listening; for health, metrics and the status page.
    """

    def __init__(self, config: ServerConfig, sock: socket.socket, http: socket.socket | None = None) -> None:
        self.config = config
        self.metrics = ServerMetrics()
        self._sock = sock
        self._http = http
        self._started_at = time.time()
        self._sifter = Sifter(memory_limit_bytes=config.filter_bytes, timeout_seconds=config.filter_seconds)
        self.holdings = Holdings(
            config.cluster,
            config.server_id,
            config.holding,
            self._sifter,
            config.workload.threads,
            self._offers_changed,
            self._swapped,
        )
        self.answering = Answering(config.server_id, self.holdings, config.access, config.workload, self.metrics, self)
        self.draining = False
        self._retired_at: float | None = None
        # What the cluster file said last about versions to stay at: only what changes there is an order.
        self._noted = config.cluster.versions
        # One thread: loads never run beside each other.
        self._loader = ThreadPoolExecutor(1, "lance-dfaiss-loader")

    async def start(self) -> None:
        """Listen, load, warm, and become ready.

        Raises
        ------
        DfaissError
            If an index cannot be loaded.
        """
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        sys.setswitchinterval(SWITCH_SECONDS)
        self.answering.start()
        self._page = self._status_port()
        self._listener = await self._loop.create_server(
            lambda: Peer(self.answering),
            sock=self._sock,
            ssl=self.config.tls,
            ssl_handshake_timeout=None if self.config.tls is None else HELLO_SECONDS,
        )
        await self._run(self._sifter.start)
        await self._run(self.holdings.follow, self._grid_point())
        problems = [shelf.problem for shelf in self.holdings.shelves.values() if shelf.problem is not None]
        for problem in problems:
            _log.error("server %d: %s", self.config.server_id, problem)
        self._following = self._loop.create_task(self._follow())
        _log.info(
            "server %d: listening on %s:%d, %s, group %d of %d, %d threads",
            self.config.server_id,
            *self._sock.getsockname()[:2],
            "ready" if self.ready else "not ready",
            self.holdings.group,
            self.holdings.cluster.groups,
            self.config.workload.threads,
        )

    async def serve_until_stopped(self) -> None:
        """Serve until `stop` or `drain` is called, then close everything."""
        await self._stopped.wait()
        self._following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._following
        self._listener.close()
        await self._hang_up()
        await self._loop.run_in_executor(self._loader, self.answering.stop)
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._sifter.close()
        if self._page is not None:
            # A probe that is being answered waits for this loop.
            await self._loop.run_in_executor(None, self._page.close)
        _log.info("server %d: stopped", self.config.server_id)

    async def _hang_up(self) -> None:
        """Send what is left to send, but not to those who do not read it."""
        for peer in list(self.answering.peers):
            peer.close()
        end = self._loop.time() + FAREWELL_SECONDS
        while self.answering.peers and self._loop.time() < end:
            await asyncio.sleep(0.005)
        for peer in list(self.answering.peers):
            peer.abort()

    def stop(self) -> None:
        """Stop at once; safe to call from a signal handler of the loop."""
        self._stopped.set()

    def drain(self) -> None:
        """Tell clients to turn away, answer what they still ask for in the next moment, and stop."""
        if self.draining:
            return
        self.draining = True
        _log.info("server %d: draining", self.config.server_id)
        self._publish()
        self._loop.create_task(self._drained())

    @property
    def ready(self) -> bool:
        """Whether it answers for everything it should."""
        return self.holdings.complete and not self.draining

    def reload(self, index: str | None, version: int | None, *, hold: bool) -> asyncio.Future[dict[str, Any]]:
        """Read the cluster file again and move to a version, on the loader's thread."""
        return self._run(self._reload, index, version, hold)

    def look(self) -> asyncio.Future[None]:
        """Look for a new cluster file and new versions now, on the loader's thread."""
        return self._run(self._look)

    async def status(self) -> ServerStatus:
        """Tell how it is: what it holds, how busy it is, what went wrong."""
        config, holdings = self.config, self.holdings
        cluster = holdings.cluster
        self._measure()
        return {
            "server": config.server_id,
            "ready": self.ready,
            "draining": self.draining,
            "reason": self.reason,
            "epoch": cluster.epoch,
            "group": holdings.group,
            "groups": cluster.groups,
            "replicas": cluster.replicas,
            "address": "{}:{}".format(*self._sock.getsockname()[:2]),
            "started_at": self._started_at,
            "pid": os.getpid(),
            "version": __version__,
            "threads": config.workload.threads,
            "ram_bytes": resident_bytes(),
            "ram_limit_bytes": config.holding.ram_limit_bytes,
            "waiting": self.answering.lane.waiting,
            "queue_limit": config.workload.max_waiting,
            "connections": len(self.answering.peers),
            "filter_restarts": self._sifter.restarts,
            "servers": [
                {
                    "id": entry.id,
                    "address": f"{entry.host}:{entry.port}",
                    "http": None if entry.http_port is None else f"{entry.host}:{entry.http_port}",
                    "group": entry.group,
                }
                for entry in cluster.servers
            ],
            "indexes": [index_status(shelf) for shelf in holdings.shelves.values()],
            "traffic": self.metrics.summary(),
        }

    @property
    def reason(self) -> str:
        """Why it is not ready; empty when it is."""
        if self.draining:
            return "draining"
        for name, shelf in self.holdings.shelves.items():
            if shelf.newest is None or shelf.newest.offer.epoch != self.holdings.cluster.epoch:
                return f"index {name!r}: {shelf.problem or shelf.loading or 'not loaded yet'}"
        return ""

    def _status_port(self) -> StatusPort | None:
        if self._http is None:
            return None
        port = StatusPort(
            self._http,
            metrics=self.metrics,
            status=self._status_from_elsewhere,
            ready=lambda: self.ready,
            hosts=tuple(entry.host for entry in self.config.cluster.servers),
        )
        port.start()
        return port

    def _status_from_elsewhere(self) -> ServerStatus:
        # By way of the loop: an answer also proves that the loop still turns.
        return asyncio.run_coroutine_threadsafe(self.status(), self._loop).result(timeout=2.0)

    def _run(self, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return self._loop.run_in_executor(self._loader, work, *args)

    def _grid_point(self) -> float | None:
        refresh = self.holdings.cluster.refresh_seconds
        return time.time() // refresh * refresh if refresh else None

    async def _follow(self) -> None:
        while True:
            seconds = self._until_next_look()
            await asyncio.sleep(min(seconds, WATCH_SECONDS))
            try:
                await self._run(self._look if seconds <= WATCH_SECONDS else self._watch)
            except ENDINGS:
                raise
            except BaseException:  # an edge: whatever it is, it may be over at the next look
                _log.exception("server %d: could not look for what is new", self.config.server_id)

    def _until_next_look(self) -> float:
        refresh = self.holdings.cluster.refresh_seconds
        if not refresh:
            return WATCH_SECONDS
        margin = min(GRID_MARGIN_SECONDS, refresh / 4)
        return refresh - (time.time() - margin) % refresh

    def _watch(self) -> None:
        """Take up what the cluster file orders, between two looks for versions."""
        self._reread()
        if self._retired_at is None:
            self.holdings.follow_held()

    def _look(self) -> None:
        self._reread()
        if self._retired_at is not None:
            return
        if self.holdings.cluster.refresh_seconds:
            self.holdings.follow(self._grid_point())
        else:
            self.holdings.catch_up()
            self.holdings.follow_held()

    def _reread(self) -> None:
        """Take up a new cluster file; one that cannot be read changes nothing."""
        if self.config.location is None:
            return
        try:
            cluster = read_cluster(self.config.location, self.config.holding.storage_options)
        except DfaissError as exc:
            _log.warning("server %d: the cluster file stays as it was: %s", self.config.server_id, exc)
            return
        if cluster.epoch == self.holdings.cluster.epoch and cluster.versions != self._noted:
            self._noted = cluster.versions
            self.holdings.hold(cluster.versions)
        if cluster.epoch <= self.holdings.cluster.epoch:
            return
        if all(entry.id != self.config.server_id for entry in cluster.servers):
            self._retire(cluster.epoch)
            return
        self._retired_at = None
        self._noted = cluster.versions
        _log.info("server %d: cluster epoch %d", self.config.server_id, cluster.epoch)
        dropped = set(self.holdings.shelves) - {served.name for served in cluster.indexes}
        self.holdings.lay_out(cluster)
        for name in dropped:
            self.metrics.forget(name)

    def _retire(self, epoch: int) -> None:
        """Drain, once clients have turned to the layout that this server is not in: the others have to load first."""
        now = time.monotonic()
        if self._retired_at is None:
            self._retired_at = now
            _log.warning(
                "server %d is not in epoch %d of the cluster: it ends when not asked", self.config.server_id, epoch
            )
        if now - max(self._retired_at, self.holdings.used_at) >= RETIRE_SECONDS:
            self._loop.call_soon_threadsafe(self.drain)

    def _reload(self, index: str | None, version: int | None, hold: bool) -> dict[str, Any]:
        self._reread()
        moved = self.holdings.move(index, version)
        # Where versions are not followed, a server that is started later must come to where this one is now.
        stays = hold or not self.holdings.cluster.refresh_seconds
        versions = {name: self.holdings.version_of(name) for name in moved}
        held = {name: version if stays else None for name, version in versions.items()}
        self.holdings.hold(held)
        self._write_down(held)
        return {"at": moved, "versions": versions}

    def _write_down(self, versions: Mapping[str, int | None]) -> None:
        """Note in the cluster file at which versions indexes stay, unless another server has."""
        if self.config.location is None:
            return
        try:
            note_versions(self.config.location, versions, self.config.holding.storage_options)
            self._noted = {**self._noted, **versions}
        except DfaissError as exc:
            _log.warning(
                "server %d: a server that is started later may be at another version, for the cluster file cannot be"
                " changed: %s",
                self.config.server_id,
                exc,
            )

    def _offers_changed(self) -> None:
        self._loop.call_soon_threadsafe(self._publish)

    def _swapped(self, index: str, swap: Swap) -> None:
        self.metrics.swap(index, swap.outcome, swap.seconds)
        if swap.outcome == "ok":
            self.metrics.stage("load", swap.seconds)
        else:
            self.metrics.load_failure(index)

    def _publish(self) -> None:
        holdings = self.holdings
        offers = Offers(epoch=holdings.cluster.epoch, offers=holdings.offers, draining=self.draining)
        self.answering.publish(offers)

    def _measure(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.waiting(self.answering.lane.waiting)
        self.metrics.connections(len(self.answering.peers))
        self.metrics.filter_restarts(self._sifter.restarts)
        self.metrics.place(self.config.server_id, self.holdings.group, self.holdings.cluster.epoch)
        for name, shelf in self.holdings.shelves.items():
            facts = holding_of(shelf)
            if facts is not None:
                self.metrics.holding(name, facts)

    async def _drained(self) -> None:
        """Wait until clients have turned away, take nothing new, and wait until everything is answered."""
        await asyncio.sleep(self.config.drain_seconds)
        self.answering.closed = True  # or those who go on asking would keep it from ending
        while any(peer.pending for peer in self.answering.peers):
            await asyncio.sleep(0.01)
        self.stop()
