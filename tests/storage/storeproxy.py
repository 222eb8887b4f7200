"""An HTTP proxy in front of an object store: it counts requests, makes some fail, and holds them up.

Imports no test library, as the benchmarks use it too.
"""

from __future__ import annotations

import http.client
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

__all__ = ["BUSY", "REFUSED", "SLOW_DOWN", "Answer", "Asked", "Fault", "Passed", "Proxy", "at_rate", "when"]

_HOLD_SECONDS = 30
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"}


@dataclass(frozen=True)
class Asked:
    """One request, as it came."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]

    @property
    def is_listing(self) -> bool:
        """Whether it lists a bucket or container."""
        return self.method == "GET" and ("list-type=2" in self.query or "comp=list" in self.query)


@dataclass(frozen=True)
class Answer:
    """What the proxy says instead of the server."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Passed:
    """A request that went by, with the bytes of its body and of the answer's."""

    asked: Asked
    status: int
    sent_bytes: int
    received_bytes: int


Fault = Callable[[Asked], Answer | None]


def _error(status: int, code: str, message: str) -> Answer:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(status, text.encode(), {"Content-Type": "application/xml", "x-ms-error-code": code})


SLOW_DOWN = _error(503, "SlowDown", "Please reduce your request rate.")
BUSY = _error(503, "ServerBusy", "The server is currently unable to receive requests.")
"""The same, as Azure says it."""
REFUSED = _error(403, "AccessDenied", "Access Denied")


def at_rate(rate: float, answer: Answer = SLOW_DOWN, *, seed: int = 1) -> Fault:
    """Let a share of all requests fail, as a seeded choice."""
    choice, lock = random.Random(seed), threading.Lock()

    def fault(_: Asked) -> Answer | None:
        with lock:
            return answer if choice.random() < rate else None

    return fault


def when(test: Callable[[Asked], bool], answer: Answer = SLOW_DOWN, *, times: int | None = None) -> Fault:
    """Let the requests fail that a test holds for: all, or the first few."""
    numbers = itertools.count(1)

    def fault(asked: Asked) -> Answer | None:
        return answer if test(asked) and (times is None or next(numbers) <= times) else None

    return fault


class Proxy:
    """An HTTP proxy on loopback in front of one server.

    Attributes
    ----------
    fault : callable or None
        Asked for each request; what it returns is answered, and the server never sees the request.
    after : callable or None
        The same, but the server has carried the request out by then: only the answer is lost.
    without : set of str
        Headers, in lower case, that are taken out of requests.
    slow : threading.Event or None
        Requests wait for it.
    most_at_once : int
        Most requests that were on their way at one moment.
    """

    def __init__(self, server: str) -> None:
        self.fault: Fault | None = None
        self.after: Fault | None = None
        self.without: set[str] = set()
        self.slow: threading.Event | None = None
        self.most_at_once = 0
        self._at_once = 0
        self._passed: list[Passed] = []
        self._lock = threading.Lock()
        self._server = _Server(self, urlsplit(server).netloc)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        """Forget what passed, and let all requests through as they are."""
        with self._lock:
            self._passed, self.most_at_once = [], self._at_once
        self.fault = self.after = self.slow = None
        self.without = set()

    def passed(self, test: Callable[[Asked], bool] = lambda _: True) -> list[Passed]:
        """Return the requests that were answered since the last reset."""
        with self._lock:
            return [one for one in self._passed if test(one.asked)]

    def statuses(self) -> Counter[int]:
        """Return how often each status was answered."""
        return Counter(one.status for one in self.passed())

    @contextmanager
    def _one_more(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def _note(self, passed: Passed) -> None:
        with self._lock:
            self._passed.append(passed)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: Proxy, upstream: str) -> None:
        self.proxy, self.upstream = proxy, upstream
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up is its own affair, and the test sees the rest."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self._upstream = http.client.HTTPConnection(self.server.upstream)

    def finish(self) -> None:
        self._upstream.close()
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def _pass(self) -> None:
        proxy = self.server.proxy
        path, _, query = self.path.partition("?")
        headers = {key.lower(): value for key, value in self.headers.items()}
        asked = Asked(self.command, path, query, headers)
        body = self._body()
        with proxy._one_more():
            if proxy.slow is not None:
                proxy.slow.wait(_HOLD_SECONDS)
            answer = None if proxy.fault is None else proxy.fault(asked)
            if answer is None:
                answer = self._forward(body, {k: v for k, v in headers.items() if k not in proxy.without})
                lost = None if proxy.after is None else proxy.after(asked)
                answer = answer if lost is None else lost
        proxy._note(Passed(asked, answer.status, len(body), len(answer.body)))
        self._answer(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        kept = {key: value for key, value in headers.items() if key not in _HOP_BY_HOP and key != "expect"}
        if body or self.command in ("PUT", "POST"):
            kept["content-length"] = str(len(body))
        for last in (False, True):
            try:
                self._upstream.request(self.command, self.path, body, kept)
                response = self._upstream.getresponse()
                return Answer(response.status, response.read(), dict(response.getheaders()))
            except (http.client.HTTPException, OSError):
                self._upstream.close()  # the server gave up an idle connection: once more, on a new one
                if last:
                    raise
        raise AssertionError("unreachable")

    def _answer(self, answer: Answer) -> None:
        self.send_response_only(answer.status)
        for key, value in answer.headers.items():
            if key.lower() not in _HOP_BY_HOP:
                self.send_header(key, value)
        length = {k.lower(): v for k, v in answer.headers.items()}.get("content-length")
        if answer.status not in (204, 304):
            self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
