"""Object stores for tests: real servers on loopback, behind a proxy that counts requests and makes them fail.

The servers are moto (S3, in this process), azurite (Azure), s3rver (S3 without conditional writes, so unsafe) and
Ceph's gateway (S3 as well, see `tests.storage.radosrig`). Azurite and s3rver come from npm: they are found on the PATH,
in ``node_modules`` of the repository, or in the folder that the environment variable NODE_PROGRAMS names; tests that
need a server that is not installed skip.
"""

from __future__ import annotations

import http.client
import itertools
import logging
import os
import random
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from lance.file import LanceFileSession as Session

from tests.storage import radosrig

__all__ = [
    "REFUSED",
    "SLOW_DOWN",
    "Answer",
    "Asked",
    "AzureRig",
    "Proxy",
    "S3Rig",
    "Session",
    "at_rate",
    "azurite",
    "moto",
    "radosgw",
    "s3rver",
    "when",
]

ACCESS_KEY, SECRET_KEY, REGION = radosrig.ACCESS_KEY, radosrig.SECRET_KEY, "us-east-1"
AZURE_ACCOUNT = "devstoreaccount1"
# The one key that every emulator has; it is published and opens nothing else.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_START_SECONDS = 30
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


def _s3_error(status: int, code: str, message: str) -> Answer:
    text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'
    return Answer(status, text.encode(), {"Content-Type": "application/xml", "x-ms-error-code": code})


SLOW_DOWN = _s3_error(503, "SlowDown", "Please reduce your request rate.")
REFUSED = _s3_error(403, "AccessDenied", "Access Denied")


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
                proxy.slow.wait(_START_SECONDS)
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


@dataclass(frozen=True)
class S3Rig:
    """An S3 server behind a proxy.

    Attributes
    ----------
    server : str
        URL of the server itself, past the proxy.
    """

    proxy: Proxy
    server: str

    def bucket(self, name: str) -> str:
        """Make a bucket; its URL."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def drop(self, name: str) -> None:
        """Delete a bucket with all that is in it, as somebody might in the middle of a build."""
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            for item in page.get("Contents", ()):
                client.delete_object(Bucket=name, Key=item["Key"])
        client.delete_bucket(Bucket=name)

    def names(self, bucket: str) -> list[str]:
        """List what is in a bucket, past the proxy."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]

    def client(self) -> Any:
        """Return a boto3 client of the server itself."""
        boto3 = pytest.importorskip("boto3")
        return boto3.client(
            "s3",
            endpoint_url=self.server,
            aws_access_key_id=self.options["aws_access_key_id"],
            aws_secret_access_key=self.options["aws_secret_access_key"],
            region_name=REGION,
        )

    @property
    def options(self) -> dict[str, str]:
        """Storage options as Lance takes them, for the proxy."""
        return {
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": SECRET_KEY,
            "aws_region": REGION,
            "aws_endpoint": self.proxy.url,
            "allow_http": "true",
            "aws_virtual_hosted_style_request": "false",
        }


@dataclass(frozen=True)
class AzureRig:
    """An Azure server behind a proxy."""

    proxy: Proxy
    server: str

    def container(self, name: str) -> str:
        """Make a container; its URL."""
        blob = pytest.importorskip("azure.storage.blob")
        with blob.BlobServiceClient(f"{self.server}/{AZURE_ACCOUNT}", credential=AZURE_KEY) as client:
            client.create_container(name).close()
        return f"az://{name}"

    @property
    def options(self) -> dict[str, str]:
        """Storage options as Lance takes them, for the proxy."""
        return {
            "account_name": AZURE_ACCOUNT,
            "account_key": AZURE_KEY,
            "azure_storage_endpoint": f"{self.proxy.url}/{AZURE_ACCOUNT}",
            "allow_http": "true",
        }


@contextmanager
def moto() -> Iterator[S3Rig]:
    """Run moto in this process."""
    module = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server,s3]'")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with Proxy(f"http://{host}:{port}") as proxy:
            yield S3Rig(proxy, f"http://{host}:{port}")
    finally:
        server.stop()


@contextmanager
def radosgw() -> Iterator[S3Rig]:
    """Run Ceph's gateway with all that it needs: a dozen seconds to start."""
    missing = radosrig.missing_programs()
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: {radosrig.INSTALL}")
    with radosrig.rados_gateway() as server, Proxy(server) as proxy:
        yield S3Rig(proxy, server)


@contextmanager
def azurite() -> Iterator[AzureRig]:
    """Run azurite, in a process of its own that keeps everything in memory."""
    flags = ["--blobHost", "127.0.0.1", "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    command = [_program("azurite-blob"), *flags, "--inMemoryPersistence", "--blobPort"]
    with _running(command) as server, Proxy(server) as proxy:
        yield AzureRig(proxy, server)


@contextmanager
def s3rver(folder: Path) -> Iterator[S3Rig]:
    """Run s3rver, which takes no notice of the conditions of a write."""
    command = [_program("s3rver"), "--address", "127.0.0.1", "--directory", str(folder), "--silent"]
    # Its own fixed keys: it checks signatures.
    with _running([*command, "--port"]) as server, Proxy(server) as proxy:
        yield _S3rverRig(proxy, server)


class _S3rverRig(S3Rig):
    @property
    def options(self) -> dict[str, str]:
        return {**super().options, "aws_access_key_id": "S3RVER", "aws_secret_access_key": "S3RVER"}


def _program(name: str) -> str:
    places = [Path(__file__).parents[2] / "node_modules" / ".bin"]
    if "NODE_PROGRAMS" in os.environ:
        places.insert(0, Path(os.environ["NODE_PROGRAMS"]))
    found = shutil.which(name) or next((str(place / name) for place in places if (place / name).exists()), None)
    if found is None:
        pytest.skip(f"{name} is not installed: npm install --no-save azurite s3rver")
    return found


@contextmanager
def _running(command: Sequence[str]) -> Iterator[str]:
    """Run a server on a free port, given as the last argument; its URL."""
    port = _free_port()
    with subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port, server)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=_START_SECONDS)


def _free_port() -> int:
    """Choose a port: these servers do not say which one they were given when they are asked to take any."""
    while True:
        # Below those that clients' ends are given, which may be taken again before the server has started.
        port = random.randint(15_000, 32_000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    pause = threading.Event()
    for _ in range(_START_SECONDS * 20):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert server.poll() is None, f"it ended with {server.returncode}"
            pause.wait(0.05)
    raise TimeoutError(f"nothing listens on port {port}")
