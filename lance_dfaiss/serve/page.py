"""The HTTP port: health, readiness, metrics and the status page.

For probes, Prometheus and people. It runs on threads of its own, so it answers also when the event loop does not, and
says so then. Everybody who can connect may read, and nothing can be changed here.

It takes little from strangers: GET and HEAD without a body, 8 KiB a request within five seconds, one request a
connection, a few connections at a time. The ``Host`` header must be one of ours: otherwise a page from anywhere could
read this one, by having its own name resolve to this address.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # the builtin one only from Python 3.11
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Generic, TypeVar, cast

from .._version import __version__
from .metrics import CONTENT_TYPE as METRICS_TYPE
from .metrics import ServerMetrics
from .page_html import CONTENT_POLICY, status_page
from .status import ServerStatus

__all__ = ["StatusPort", "host_of"]

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0
"""How long the event loop may take to say how it is."""

MAX_CONNECTIONS = 16
REQUEST_BYTES = 8 * 1024
REQUEST_SECONDS = 5.0
_LINGER_SECONDS = 1.0
_POLL_SECONDS = 0.1

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_TEXT = "text/plain; charset=utf-8"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": CONTENT_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Connection": "close",
}
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 21\r\n"
    b"Retry-After: 1\r\nConnection: close\r\n\r\nToo many connections\n"
)

_T = TypeVar("_T")


class StatusPort:
    """Serves health, metrics and the status page on a socket.

    Parameters
    ----------
    sock : socket
        Bound and listening; owned from here on.
    metrics : ServerMetrics
        For ``/metrics``.
    status : callable
        Returns a `ServerStatus`, and returns it only while the event loop answers; brings gauges up to date. Called
        on a thread, never twice at a time, also before metrics are read.
    ready : callable
        Whether the server takes queries. Called on any thread; must return at once.
    hosts : collection of str
        Names under which this port may be asked for, without port. Loopback names and the address that a connection
        came in on are always good.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        metrics: ServerMetrics,
        status: Callable[[], ServerStatus],
        ready: Callable[[], bool],
        hosts: Collection[str],
    ) -> None:
        self._server = _Server(sock, _Answers(metrics, status, ready), hosts)
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The host and port that are listened on."""
        host, port = self._server.socket.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Begin to answer."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="dfaiss-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering and end the threads; connections that are open are cut. Can be called again.

        Waits for a status that is being made, so an event loop must call it on another thread.
        """
        # The listening socket is only closed, not shut down: a launcher may hold it too, for the next server.
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()


class _OneAtATime(Generic[_T]):
    """Calls a function on a thread, once at a time: who asks meanwhile gets the same answer.

    So a function that hangs holds one thread, however often it is asked for.
    """

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._running: Future[_T] | None = None
        self._thread: threading.Thread | None = None

    def __call__(self, seconds: float) -> _T:
        """Return what the function returns.

        Raises
        ------
        TimeoutError
            If it has not returned within that time.
        """
        with self._lock:
            future = self._running
            if future is None:
                future = self._running = Future()
                self._thread = threading.Thread(
                    target=self._run, args=(future,), name="dfaiss-http-status", daemon=True
                )
                self._thread.start()
        try:
            return future.result(seconds)
        except FutureTimeout as exc:
            raise TimeoutError(f"no answer within {seconds:g} s") from exc

    def close(self) -> None:
        """Wait for the thread; one whose function hangs is left behind, nothing can end it."""
        if self._thread is not None:
            self._thread.join(ANSWER_SECONDS)

    def _run(self, future: Future[_T]) -> None:
        try:
            result = self._function()
        except BaseException as exc:  # whatever it is, it is for the one who waits
            self._done()
            future.set_exception(exc)
        else:
            self._done()
            future.set_result(result)

    def _done(self) -> None:
        with self._lock:
            self._running = None


class _Answers:
    """What is answered to which path."""

    def __init__(self, metrics: ServerMetrics, status: Callable[[], ServerStatus], ready: Callable[[], bool]) -> None:
        self._metrics = metrics
        self._ready = ready
        self._status = _OneAtATime(status)
        self._paths: dict[str, Callable[[], tuple[HTTPStatus, str, str | bytes]]] = {
            "/": self._page,
            "/healthz": self._health,
            "/metrics": self._render,
            "/readyz": self._readiness,
            "/status.json": self._json,
        }

    def close(self) -> None:
        """Wait for what was asked."""
        self._status.close()

    def to(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Return status, content type and body."""
        answer = self._paths.get(path)
        if answer is None:
            return HTTPStatus.NOT_FOUND, _TEXT, b"Not found\n"
        try:
            status, content_type, body = answer()
        except TimeoutError as exc:
            status, content_type, body = HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"The event loop gave {exc}\n"
        except Exception:
            _log.exception("could not answer %s", path)
            status, content_type, body = HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, "Failed; the log has the traceback\n"
        # Names may hold what is no text: bytes of file names that are not UTF-8.
        return status, content_type, body.encode("utf-8", "backslashreplace") if isinstance(body, str) else body

    def _health(self) -> tuple[HTTPStatus, str, str]:
        self._status(ANSWER_SECONDS)
        return HTTPStatus.OK, _TEXT, "ok\n"

    def _readiness(self) -> tuple[HTTPStatus, str, str]:
        status = self._status(ANSWER_SECONDS)
        if self._ready():
            return HTTPStatus.OK, _TEXT, "ready\n"
        reason = " ".join(status["reason"].split())
        return HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"not ready: {reason or 'no reason is known'}\n"

    def _render(self) -> tuple[HTTPStatus, str, bytes]:
        self._metrics.ready(self._takes_queries())
        return HTTPStatus.OK, METRICS_TYPE, self._metrics.render()

    def _takes_queries(self) -> bool:
        # A server brings its gauges up to date when it is asked for its status. Metrics are there also without.
        try:
            self._status(ANSWER_SECONDS)
        except TimeoutError as exc:
            _log.warning("the event loop gave %s", exc)
            return False
        except Exception:
            _log.exception("the status could not be made")
            return False
        return self._ready()

    def _json(self) -> tuple[HTTPStatus, str, str]:
        return HTTPStatus.OK, "application/json", json.dumps(self._status(ANSWER_SECONDS), indent=1) + "\n"

    def _page(self) -> tuple[HTTPStatus, str, str]:
        return HTTPStatus.OK, "text/html; charset=utf-8", status_page(self._status(ANSWER_SECONDS), time.time())


class _Server(HTTPServer):
    """One thread a connection, a few connections at a time, on a socket that listens already."""

    def __init__(self, sock: socket.socket, answers: _Answers, hosts: Collection[str]) -> None:
        super().__init__(sock.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()  # the one that the base class has made
        self.socket = sock
        self.answers = answers
        self.hosts = _LOOPBACK | {host_of(host) for host in hosts}
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}
        self._refused: deque[tuple[float, socket.socket]] = deque()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                thread = threading.Thread(
                    target=self._answer, args=(request, client_address), name="dfaiss-http-request", daemon=True
                )
                self._open[request] = thread
        if full:
            self._refuse(request)
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads on this machine
            del self._open[request]
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """Log what went wrong before a request had its thread."""
        _log.exception("%s: request not taken", client_address)

    def _answer(self, request: socket.socket, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except OSError as exc:
            _log.debug("%s: connection lost: %s", client_address, exc)
        except Exception:
            _log.exception("%s: request failed", client_address)
        finally:
            self.shutdown_request(request)
            with self._lock:
                del self._open[request]

    def _refuse(self, request: socket.socket) -> None:
        # Closing with bytes unread would make the client's system throw the answer away, so it is closed a little
        # later, when the request has come.
        request.setblocking(False)
        with contextlib.suppress(OSError):
            request.send(_BUSY)
            request.shutdown(socket.SHUT_WR)
        self._refused.append((time.monotonic() + _LINGER_SECONDS, request))
        self._release(keep=MAX_CONNECTIONS)

    def service_actions(self) -> None:
        """Close what was refused a while ago; called after every round of the accepting thread."""
        self._release(keep=MAX_CONNECTIONS)

    def _release(self, keep: int) -> None:
        while self._refused and (len(self._refused) > keep or self._refused[0][0] < time.monotonic()):
            request = self._refused.popleft()[1]
            with contextlib.suppress(OSError):
                request.recv(REQUEST_BYTES)
            request.close()

    def server_close(self) -> None:
        """Close all sockets and wait for the threads to end."""
        self.socket.close()
        self._release(keep=0)
        with self._lock:
            running = list(self._open.items())
        for request, _ in running:
            with contextlib.suppress(OSError):  # ended meanwhile
                request.shutdown(socket.SHUT_RDWR)
        for _, thread in running:
            # One that waits for the event loop needs that long.
            thread.join(ANSWER_SECONDS + REQUEST_SECONDS)
        self.answers.close()


class _RequestTooLong(Exception):
    """A request line and headers of more than `REQUEST_BYTES`."""


class _RequestReader:
    """Reads lines of one request, with one limit on its bytes and one on its time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._until = time.monotonic() + REQUEST_SECONDS
        self._left = REQUEST_BYTES
        self._waiting = b""

    def readline(self, limit: int = -1) -> bytes:
        """Return the next line with its end, or what there was before the other side closed."""
        while b"\n" not in self._waiting:
            if not self._left:
                raise _RequestTooLong
            seconds = self._until - time.monotonic()
            if seconds <= 0:
                raise TimeoutError("the request did not come in time")
            self._sock.settimeout(seconds)
            data = self._sock.recv(self._left)
            if not data:
                break
            self._left -= len(data)
            self._waiting += data
        end = self._waiting.find(b"\n") + 1 or len(self._waiting)
        line, self._waiting = self._waiting[:end], self._waiting[end:]
        assert limit < 0 or len(line) <= limit  # the standard library's limits are wider than ours
        return line

    def close(self) -> None:
        """Nothing to do: the socket is closed by the server."""


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: _Server
    connection: socket.socket

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = cast(Any, _RequestReader(self.connection))

    def handle_one_request(self) -> None:
        self.close_connection = True
        try:
            self.raw_requestline = self.rfile.readline()
            # The base class has answered where this is False.
            if not self.raw_requestline or not self.parse_request() or self.request_version == "HTTP/0.9":
                return
            self.connection.settimeout(REQUEST_SECONDS)
            self._answer()
        except _RequestTooLong:
            self.requestline, self.request_version, self.command = "", "HTTP/1.1", "GET"
            self._send(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TEXT, b"Request too long\n")
        except TimeoutError as exc:
            _log.debug("%s: %s", self.address_string(), exc)
        self.close_connection = True

    def handle_expect_100(self) -> bool:
        """Ask for no body: none is taken."""
        return True

    def _answer(self) -> None:
        if self.command not in ("GET", "HEAD"):
            self._send(HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"Only GET and HEAD\n", {"Allow": "GET, HEAD"})
        elif self.headers.get("Content-Length", "0").strip() != "0" or "Transfer-Encoding" in self.headers:
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, _TEXT, b"No body, please\n")
        elif not self._is_our_name():
            self._send(HTTPStatus.MISDIRECTED_REQUEST, _TEXT, b"This server does not go by that name\n")
        else:
            self._send(*self.server.answers.to(self.path.partition("?")[0]))

    def _is_our_name(self) -> bool:
        named = self.headers.get_all("Host", [])
        if len(named) != 1:
            return False
        host = host_of(named[0])
        return host in self.server.hosts or host == host_of(self.connection.getsockname()[0])

    def _send(self, status: HTTPStatus, content_type: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": content_type, "Content-Length": str(len(body)), **_HEADERS, **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:  # noqa: ARG002
        """Answer a request that the base class refuses, in plain text and without repeating any of it."""
        self.command = getattr(self, "command", None) or "GET"
        self.request_version = "HTTP/1.1"  # not known yet; under 0.9 an answer has no headers
        self._send(HTTPStatus(code), _TEXT, f"{HTTPStatus(code).phrase}\n".encode())

    def version_string(self) -> str:
        """Name the server without what it is made of."""
        return f"lance-dfaiss/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        """Log at DEBUG: probes come every few seconds."""
        _log.debug("%s: %r", self.address_string(), format % args)


def host_of(text: str) -> str:
    """Return the host of ``host``, ``host:port``, ``[address]`` or ``[address]:port``, in a form to compare.

    Examples
    --------
    >>> host_of("Search.Example.:8080"), host_of("[::1]:80"), host_of("::1")
    ('search.example', '::1', '::1')
    >>> host_of("::ffff:10.0.0.1")  # an IPv4 connection, as a socket for both kinds shows it
    '10.0.0.1'
    """
    text = text.strip().lower().removeprefix("::ffff:")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    if text.count(":") > 1:
        return text  # an IPv6 address by itself
    return text.partition(":")[0].rstrip(".")
