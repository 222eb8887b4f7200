"""One server process: from its sockets to its exit status."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import msgspec

from ..errors import DfaissError
from ..serve.loops import new_loop
from ..serve.security import check_listen
from .notices import Notifier
from .options import ServeOptions
from .sockets import adopted

if TYPE_CHECKING:
    from ..serve.server import Server, ServerConfig

__all__ = ["LOG_FORMAT", "Orders", "leave", "main", "quiet_libraries", "run_server"]

_log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

STOP_SECONDS = 20.0
"""How long a server that was told to stop may take beyond its time to drain."""

MAX_FILES = 1_048_576
"""Files and connections that a server may have open where nothing limits them."""

WATCH_SECONDS = 0.1
"""How often it is looked at whether the server is ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a launcher tells a server process on its stdin, as JSON.

    Parameters
    ----------
    server_id : int
        Which server of the cluster this is.
    cluster_file : str
        Where that lies.
    listen_fd, http_fd : int and int or None
        File descriptors of the sockets that it listens on.
    options : ServeOptions
        How to serve.
    """

    server_id: int
    cluster_file: str
    listen_fd: int
    http_fd: int | None
    options: ServeOptions


def main() -> NoReturn:
    """Run the server that stdin describes, for as long as stdin stays open.

    A launcher that ends, however it ends, closes it.
    """
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=Orders)
    logging.basicConfig(level=orders.options.log_level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    quiet_libraries()
    threading.Thread(target=_stop_with_stdin, name="lance-dfaiss-parent", daemon=True).start()
    notifier = Notifier(os.environ)
    try:
        status = _run(orders, notifier)
    except DfaissError as exc:
        from ..serve.wire import failure_of

        notifier.tell(STATUS=str(exc), X_FAILURE=msgspec.json.encode(failure_of(exc)).decode())
        sys.stderr.write(f"error: {exc.message}\n" + (f"  {exc.remedy}\n" if exc.remedy else ""))
        status = 1
    leave(status)


def quiet_libraries() -> None:
    """Keep out of the log what libraries say when they are loaded: half a dozen lines that tell nobody anything."""
    if logging.getLogger().getEffectiveLevel() >= logging.INFO:
        logging.getLogger("faiss.loader").setLevel(logging.WARNING)


def leave(status: int) -> NoReturn:
    """End the process now.

    Not by way of the interpreter: when it is taken down while threads of Lance still read ahead, the process now and
    then aborts, and its exit status would be lost.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_server(
    config: ServerConfig,
    sock: socket.socket,
    http_sock: socket.socket | None = None,
    *,
    notifier: Notifier | None = None,
) -> int:
    """Serve until told to stop, and return the exit status.

    SIGTERM and SIGINT drain the server and then stop it; a second one stops it at once, and so does the first if
    nothing is served yet. SIGHUP has it look for a new cluster file and new versions.

    Parameters
    ----------
    config : ServerConfig
        What to serve, and how.
    sock, http_sock : socket.socket
        Bound, listening; for requests, and for health, metrics and the status page (or None).
    notifier : Notifier, optional
        Told when the server is ready; the default is whoever ``NOTIFY_SOCKET`` names.

    Raises
    ------
    CannotServe
        If others than this machine could connect to the socket with nothing to show.
    DfaissError
        If the server cannot start.
    """
    check_listen(sock.getsockname()[0], config.access, config.tls)
    _allow_files()
    loop = new_loop()
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(_Run(config, sock, http_sock, notifier or Notifier(os.environ)).run())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


class _Run:
    """A server, and what it is told by signals."""

    def __init__(
        self, config: ServerConfig, sock: socket.socket, http_sock: socket.socket | None, notifier: Notifier
    ) -> None:
        from ..serve.server import Server

        self._server: Server = Server(config, sock, http_sock)
        self._drain_seconds = config.drain_seconds
        self._id = config.server_id
        self._notifier = notifier
        self._serving = False
        self._stopping = False
        self._last: object = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._look)
        await self._server.start()
        self._serving = True
        telling = loop.create_task(self._tell())
        await self._server.serve_until_stopped()
        telling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await telling
        return 0

    def _stop(self) -> None:
        if not self._serving:
            _log.info("server %d: stopped before it served anything", self._id)
            leave(0)
        if self._stopping:
            self._server.stop()
            return
        self._stopping = True
        self._notifier.tell(STOPPING=1)
        _after(self._drain_seconds + STOP_SECONDS, self._give_up)
        self._server.drain()

    def _give_up(self) -> None:
        _log.error("server %d: did not stop within %.0f s, ended", self._id, self._drain_seconds + STOP_SECONDS)
        leave(1)

    def _look(self) -> None:
        if self._serving and not self._stopping:
            self._server.look()

    async def _tell(self) -> None:
        """Tell whoever started the server how it is, whenever that changes."""
        while True:
            server = self._server
            epoch, reason = server.holdings.cluster.epoch, server.reason
            now = (server.ready, epoch, reason)
            if now != self._last:
                self._last = now
                if server.ready:
                    self._notifier.tell(READY=1, STATUS=f"ready, epoch {epoch}", X_EPOCH=epoch)
                else:
                    self._notifier.tell(STATUS=f"not ready: {reason}", X_REASON=reason)
            await asyncio.sleep(WATCH_SECONDS)


def _run(orders: Orders, notifier: Notifier) -> int:
    from ..serve.cluster import read_cluster

    sock = adopted(orders.listen_fd)
    http_sock = None if orders.http_fd is None else adopted(orders.http_fd)
    cluster = read_cluster(orders.cluster_file, orders.options.storage_options)
    config = orders.options.config(cluster, orders.server_id, orders.cluster_file)
    return run_server(config, sock, http_sock, notifier=notifier)


def _allow_files() -> None:
    """Take as many file descriptors as one may: connections and files of shards need them, and the default is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (OSError, ValueError) as exc:  # some systems allow less than they say
            _log.warning("at most %d files and connections can be open: %s", soft, exc)


def _stop_with_stdin() -> None:
    """Wait until the launcher has gone, and stop then."""
    while os.read(0, 4096):
        pass
    # Whatever state this process is in: without a handler yet, the signal ends it at once.
    os.kill(os.getpid(), signal.SIGTERM)
    _after(STOP_SECONDS * 2, lambda: os._exit(1))


def _after(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
