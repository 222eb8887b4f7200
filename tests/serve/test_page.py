"""The HTTP port answers what it should, takes little from strangers, and the page shows names as text."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from html.parser import HTMLParser
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.serve import page
from lance_dfaiss.serve.metrics import ServerMetrics
from lance_dfaiss.serve.page import StatusPort
from lance_dfaiss.serve.page_html import CONTENT_POLICY, notes_of, status_page
from lance_dfaiss.serve.status import ServerStatus, ServerSummary
from tests.serve.status_example import index, port, snapshot, status, traffic, troubled

NOW = 1_800_000_000.0
SWAP = {"at": NOW, "seconds": 1.0, "outcome": "CorruptIndex", "read_bytes": 0, "detail": ""}
PATHS = ("/", "/healthz", "/readyz", "/metrics", "/status.json")


def ask(
    of: StatusPort, path: str, method: str = "GET", headers: dict[str, str] | None = None, body: bytes | None = None
) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection(*of.address, timeout=20)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer, answer.read().decode()
    finally:
        connection.close()


def send(of: StatusPort, data: bytes) -> bytes:
    """Send bytes as they are and return all that comes back."""
    with socket.create_connection(of.address, timeout=20) as link:
        link.sendall(data)
        return b"".join(iter(lambda: link.recv(65_536), b""))


@contextmanager
def stuck() -> Iterator[tuple[threading.Event, Any]]:
    """Give a status that does not come, like that of an event loop that hangs, until the event is set."""
    free = threading.Event()

    def wait() -> ServerStatus:
        free.wait(60)
        return status()

    try:
        yield free, wait
    finally:
        free.set()


# What is answered


@pytest.mark.parametrize("path", [*PATHS, "/?x=1", "/healthz?verbose"])
def test_every_path_answers_and_head_has_no_body(path: str) -> None:
    with port() as opened:
        got, body = ask(opened, path)
        head, nothing = ask(opened, path, "HEAD")
    assert (got.status, head.status, nothing) == (200, 200, "")
    assert len(body) > 2
    assert head.getheader("Content-Type") == got.getheader("Content-Type")
    assert got.getheader("Cache-Control") == "no-store"
    assert got.getheader("X-Content-Type-Options") == "nosniff"
    assert got.getheader("Content-Security-Policy") == CONTENT_POLICY
    assert "Python" not in str(got.getheaders())


@pytest.mark.parametrize(
    "path", ["/nothing", "//healthz/..", "/metrics/", "/../../etc/passwd", "/%2e%2e", "http://[::1"]
)
def test_other_paths_are_not_found(path: str) -> None:
    with port() as opened:
        assert send(opened, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()).startswith(b"HTTP/1.1 404 ")


def test_the_status_is_told_as_json() -> None:
    made = troubled(NOW)
    with port(lambda: made) as opened:
        answer, body = ask(opened, "/status.json")
    assert answer.getheader("Content-Type") == "application/json"
    assert json.loads(body) == made


def test_readiness_follows_the_server_and_gives_the_reason() -> None:
    ready = threading.Event()
    metrics = ServerMetrics()
    with port(lambda: status(reason="words is\nbeing loaded"), ready=ready.is_set, metrics=metrics) as opened:
        answer, body = ask(opened, "/readyz")
        assert (answer.status, body) == (503, "not ready: words is being loaded\n")
        assert "lance_dfaiss_ready 0.0" in ask(opened, "/metrics")[1]
        assert ask(opened, "/healthz")[0].status == 200  # alive all the same
        ready.set()
        assert ask(opened, "/readyz")[0].status == 200
        assert "lance_dfaiss_ready 1.0" in ask(opened, "/metrics")[1]


def test_a_hanging_event_loop_is_told_and_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "ANSWER_SECONDS", 0.05)
    with stuck() as (free, wait), port(wait) as opened:
        answers = [ask(opened, path) for path in ("/healthz", "/healthz", "/readyz", "/", "/status.json")]
        assert [answer.status for answer, _ in answers] == [503] * 5
        assert "event loop gave no answer within 0.05 s" in answers[0][1]
        assert sum(thread.name == "dfaiss-http-status" for thread in threading.enumerate()) == 1
        answer, body = ask(opened, "/metrics")
        assert answer.status == 200
        assert "lance_dfaiss_ready 0.0" in body
        monkeypatch.setattr(page, "ANSWER_SECONDS", 20.0)
        free.set()
        assert ask(opened, "/healthz")[0].status == 200


def test_a_status_that_fails_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> ServerStatus:
        raise ValueError("secret")

    with port(fail) as opened:
        answers = [ask(opened, path) for path in ("/", "/healthz", "/status.json")]
        assert ask(opened, "/metrics")[0].status == 200
    assert [answer.status for answer, _ in answers] == [500] * 3
    assert not any("secret" in body for _, body in answers)
    assert sum("ValueError: secret" in (record.exc_text or "") for record in caplog.records) == 4


def test_gauges_are_brought_up_to_date_before_they_are_read() -> None:
    metrics = ServerMetrics()

    def measure() -> ServerStatus:
        metrics.waiting(41)
        return status()

    with port(measure, metrics=metrics) as opened:
        assert "lance_dfaiss_waiting_queries 41.0" in ask(opened, "/metrics")[1]


def test_requests_are_logged_at_debug_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "lance_dfaiss.serve.page"), port() as opened:
        ask(opened, "/healthz")
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert "GET /healthz" in caplog.text


# What is taken from strangers


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:9999", "[::1]:80", "search.example", "Search.Example.:7780"],
)
def test_our_names_are_taken(host: str) -> None:
    with port(hosts=["search.example:7780"]) as opened:
        assert ask(opened, "/healthz", headers={"Host": host})[0].status == 200


@pytest.mark.parametrize("host", ["evil.example", "search.example.evil", "10.0.0.1", "", "localhost@evil", "[::2]:80"])
@pytest.mark.parametrize("path", PATHS)
def test_other_names_are_refused(host: str, path: str) -> None:
    with port(hosts=["search.example"]) as opened:
        answer, body = ask(opened, path, headers={"Host": host})
    assert (answer.status, "lance" in body) == (421, False)


@pytest.mark.parametrize("headers", ["", "Host: localhost\r\nHost: localhost\r\n"])
def test_a_request_has_one_host(headers: str) -> None:
    with port() as opened:
        assert send(opened, f"GET / HTTP/1.1\r\n{headers}\r\n".encode()).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "\xff"])
def test_other_methods_are_refused(method: str) -> None:
    with port() as opened:
        answer = send(opened, f"{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1"))
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert b"Allow: GET, HEAD\r\n" in answer


@pytest.mark.parametrize("header", ["Content-Length: 5", "Content-Length: x", "Transfer-Encoding: chunked"])
def test_bodies_are_refused(header: str) -> None:
    with port() as opened:
        answer = send(opened, f"GET / HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_an_expectation_gets_no_invitation() -> None:
    with port() as opened:
        answer = send(opened, b"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "data", [b"G" * 9_000, b"GET / HTTP/1.1\r\nX: " + b"y" * 9_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 2_000]
)
def test_long_requests_are_refused(data: bytes) -> None:
    with port() as opened:
        # More than is read would make the kernel throw the answer away: exactly as much is sent.
        assert send(opened, data[: page.REQUEST_BYTES]).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"GET / HTTP/3.0\r\n\r\n", b"HTTP/1.1 505 "),
        (b"GET / HTTP/x\r\n\r\n", b"HTTP/1.1 400 "),
        (b"<script>alert(1)</script> a b c d\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"HTTP/1.1 431 "),
        (b"GET /\r\n\r\n", b""),
        (b"\r\n", b""),
    ],
)
def test_what_is_no_request_gets_a_short_answer(data: bytes, answer: bytes) -> None:
    with port() as opened:
        got = send(opened, data)
        assert ask(opened, "/healthz")[0].status == 200
    assert got[: len(answer)] == answer
    assert b"script" not in got.partition(b"\r\n\r\n")[2]
    assert bool(got) is bool(answer)


@given(st.binary(max_size=300))
def test_no_bytes_end_the_port(data: bytes) -> None:
    with socket.create_connection(SHARED.address, timeout=20) as link:
        link.sendall(data)
        link.shutdown(socket.SHUT_WR)
        b"".join(iter(lambda: link.recv(65_536), b""))
    assert ask(SHARED, "/healthz")[0].status == 200


SHARED: StatusPort


@pytest.fixture(autouse=True, scope="module")
def shared() -> Iterator[None]:
    """Open one port for the property tests."""
    global SHARED
    with port() as SHARED:
        yield


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: "])
def test_a_slow_client_is_cut_off(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "REQUEST_SECONDS", 0.1)
    with port() as opened:
        assert send(opened, sent) == b""


def test_a_dripping_client_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "REQUEST_SECONDS", 0.2)
    with port() as opened, socket.create_connection(opened.address, timeout=0.02) as link:
        link.sendall(b"GET /")
        sent = 0
        while not is_cut(link):  # one byte now and then: each read is in time, the request is not
            sent += 1
    assert 0 < sent < page.REQUEST_BYTES / 10


def is_cut(link: socket.socket) -> bool:
    """Send one byte, and say whether the other side has closed."""
    try:
        link.sendall(b"x")
        return link.recv(100) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_a_crowd_is_answered_busy_and_then_as_before() -> None:
    with port() as opened:
        with ExitStack() as crowd:
            for _ in range(page.MAX_CONNECTIONS):
                crowd.enter_context(socket.create_connection(opened.address))
            answers = [ask(opened, "/healthz") for _ in range(page.MAX_CONNECTIONS + 3)]
            assert {(answer.status, body) for answer, body in answers} == {(503, "Too many connections\n")}
            assert sum(thread.name == "dfaiss-http-request" for thread in threading.enumerate()) <= page.MAX_CONNECTIONS
        while ask(opened, "/healthz")[0].status != 200:
            pass  # until the crowd's threads have seen that it is gone; the test's time limit ends it otherwise


def test_who_is_refused_is_not_cut_off_while_asking() -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
    with port() as opened, ExitStack() as crowd:
        for _ in range(page.MAX_CONNECTIONS):
            crowd.enter_context(socket.create_connection(opened.address))
        link = crowd.enter_context(socket.create_connection(opened.address))
        assert link.recv(12) == b"HTTP/1.1 503"
        link.sendall(request)
        link.sendall(b"\r\n")  # fails once the first part was met by a closed socket
        assert link.recv(1_000).endswith(b"Too many connections\n")


def test_no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "REQUEST_SECONDS", 60.0)
    before = set(threading.enumerate())
    with port() as opened, ExitStack() as links:
        address = opened.address
        idle = [links.enter_context(socket.create_connection(address)) for _ in range(3)]
        while sum(thread.name == "dfaiss-http-request" for thread in threading.enumerate()) < len(idle):
            pass
        began = time.monotonic()
        opened.close()
        assert time.monotonic() - began < 20  # far less than the time that those may take to ask
        assert set(threading.enumerate()) == before
        assert [link.recv(100) for link in idle] == [b""] * 3
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=5)


def test_closing_waits_for_a_status_that_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "ANSWER_SECONDS", 0.05)
    before = set(threading.enumerate())
    with stuck() as (free, wait), port(wait) as opened:
        assert ask(opened, "/healthz")[0].status == 503
        monkeypatch.setattr(page, "ANSWER_SECONDS", 60.0)
        closing = threading.Thread(target=opened.close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        free.set()
        closing.join()
        assert set(threading.enumerate()) == before


def test_closing_twice_or_before_the_start_is_fine() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    opened = StatusPort(sock, metrics=ServerMetrics(), status=status, ready=lambda: True, hosts=())
    opened.close()
    opened.close()
    assert sock.fileno() == -1


def test_a_socket_of_an_event_loop_is_taken_too() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    opened = StatusPort(sock, metrics=ServerMetrics(), status=status, ready=lambda: True, hosts=())
    opened.start()
    try:
        assert ask(opened, "/healthz")[0].status == 200
    finally:
        opened.close()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_is_spoken() -> None:
    try:
        sock = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as exc:
        pytest.skip(f"no IPv6 loopback: {exc}")
    opened = StatusPort(sock, metrics=ServerMetrics(), status=status, ready=lambda: True, hosts=())
    opened.start()
    try:
        assert ask(opened, "/healthz", headers={"Host": f"[::1]:{opened.address[1]}"})[0].status == 200
    finally:
        opened.close()


# What the page shows


class Reader(HTMLParser):
    """Takes a page apart: its elements with the names of their attributes, its texts, its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.style = ""
        self._in_style = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self._in_style = tag == "style"

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
        elif data.strip():
            self.texts.append(data.strip())


def shown(of: ServerStatus) -> str:
    return " | ".join(Reader(status_page(of, NOW)).texts)


def test_the_page_tells_what_a_person_on_call_asks() -> None:
    text = shown(status(NOW))
    for wanted in (
        "Server 1", "Ready", "words", "s3://corpora/wordnet/words.lance", "214", "7d0c1a52", "4 min ago", "1,204,518",
        "50.1% of all rows", "1.60 GiB", "of 4.00 GiB", "8,412", "1.12 ms", "p99 4.63 ms", "10.1.0.14:7700",
        "this server", "4 servers, 2 groups, 2 replicas, layout 3", "took 3.41 s, 4.20 MiB read",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "warning" not in text


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = status_page(troubled(NOW), NOW)
    read = Reader(text)
    assert not {"script", "img", "iframe", "form", "object"} & {tag for tag, _ in read.elements}
    names = {name for _, attributes in read.elements for name in attributes}
    assert not any(name.startswith("on") or name == "style" for name in names)
    digest = base64.b64encode(hashlib.sha256(read.style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in CONTENT_POLICY
    assert "url(" not in read.style
    assert "@import" not in read.style
    assert "default-src 'none'" in CONTENT_POLICY
    assert '<meta http-equiv="refresh" content="5">' in text


def with_names(name: str, http: str | None = None) -> ServerStatus:
    """A status in which everything that is text is this."""
    swap = {"at": NOW, "seconds": 1.0, "outcome": name, "read_bytes": 0, "detail": name}
    named = index(
        NOW, name=name, dataset=name, index=name, index_type=name, factory=name, metric=name, payload=[name],
        last_swap=swap, loading=name, problem=name,
        snapshots=[snapshot(NOW, at=name, generation=name)],
    )  # fmt: skip
    kinds = [{"kind": name, "count": 1, "p50": 1.0, "p90": 1.0, "p99": 1.0}]
    stages = [{"stage": name, "count": 1, "p50": 1.0, "p90": 1.0, "p99": 1.0}]
    return status(
        NOW, ready=False, reason=name, address=name, version=name, indexes=[named],
        servers=[ServerSummary(id=0, address=name, http=http, group=0)],
        traffic=traffic(kinds=kinds, stages=stages),
    )  # fmt: skip


@given(st.text(min_size=1) | st.text("<>&\"'{}=/ %;x", min_size=1))
def test_no_name_changes_the_page(name: str) -> None:
    plain, hostile = Reader(status_page(with_names("x"), NOW)), Reader(status_page(with_names(name), NOW))
    assert hostile.elements == plain.elements
    assert hostile.links == plain.links


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>", "</style><script>alert(1)</script>", "</title><h1>x", '"><img src=x onerror=y>',
        "' onmouseover='alert(1)", "{0}{header}{__class__}", "javascript:alert(1)", "\udcff\x00\x1b[31m\u202egpj.exe",
        "&lt;b&gt;", "x" * 100_000,
    ],
)  # fmt: skip
def test_hostile_names_are_shown_as_they_are(name: str) -> None:
    with port(lambda: with_names(name, http="x")) as opened:
        answer, body = ask(opened, "/")
    assert answer.status == 200
    read = Reader(body)
    assert read.elements == Reader(status_page(with_names("x"), NOW)).elements
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[:400])
    assert sum(visible in text for text in read.texts) >= 10
    assert len(body) < 100_000


@pytest.mark.parametrize(
    ("http", "linked"),
    [
        ("10.1.0.11:7780", True), ("search-1.example:80", True), ("[fd00::1]:7780", True), (None, False),
        ("evil.example/x:80", False), ("user@evil:80", False), ("javascript:1", True), ("a:80\n", False),
        ('a:80"onclick="x', False), ("//evil:80", False), ("a", False), ("ａ:80", False),
    ],
)  # fmt: skip
def test_links_lead_to_status_pages_only(http: str | None, linked: bool) -> None:
    links = Reader(status_page(with_names("x", http), NOW)).links
    ours = [link for link in links if not link.startswith(("data:image/svg+xml,", "/"))]
    assert ours == ([f"http://{http}/"] if linked else [])


def test_notes_tell_what_is_wrong_worst_first() -> None:
    notes = notes_of(troubled(NOW))
    assert [note.level for note in notes] == ["bad", *["warn"] * 5, "info"]
    text = " ".join(f"{note.about}: {note.text}" for note in notes)
    for wanted in (
        "words: The last swap failed: Version 215 needs 1.92 GiB", "14,220 rows were moved", "lance-dfaiss sync",
        "96,400 rows have no entry", "Memory: 3.70 GiB of 4.00 GiB", "Queue: Nearly full", "replaced 2 times",
        "images: Loading version 12: 3 of 8 shards",
    ):  # fmt: skip
        assert wanted in text, wanted
        assert wanted.partition(": ")[2] in shown(troubled(NOW))
    assert notes_of(status(NOW)) == []


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"problem": "the dataset is gone"}, "the dataset is gone"),
        ({"problem": "too large", "last_swap": {**SWAP, "detail": "too large"}}, "too large"),  # told once
        ({"problem": None, "last_swap": {**SWAP, "detail": ""}}, "The last swap failed: CorruptIndex"),
        ({"snapshots": [snapshot(NOW, unsaved_rows=1)]}, "1 rows were moved"),
        ({"snapshots": [snapshot(NOW, rows=20_000, tail_rows=1_000)], "coverage": 1.0}, "1,000 rows have no entry"),
        ({"snapshots": [snapshot(NOW, rows=20_000, tail_rows=999)], "coverage": 1.0}, None),
        ({"snapshots": [snapshot(NOW, rows=20_001, tail_rows=1_000)], "coverage": 1.0}, None),
        ({"snapshots": [snapshot(NOW, rows=40_000, tail_rows=1_000)], "coverage": 0.5}, "1,000 rows have no entry"),
        ({"snapshots": [snapshot(NOW), snapshot(NOW, unsaved_rows=9)]}, None),  # an old one: goes by itself
        ({"last_swap": None}, None),
    ],
)
def test_each_note_by_itself(changes: dict[str, object], about: str | None) -> None:
    notes = notes_of(status(NOW, indexes=[index(NOW, **changes)]))
    assert [about in note.text for note in notes if about] == ([True] if about else [])
    assert bool(notes) is (about is not None)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "Ready"),
        ({"ready": False, "reason": "not yet"}, "Not ready"),
        ({"draining": True}, "Draining"),
        ({"draining": True, "ready": False}, "Draining"),
    ],
)
def test_the_state_is_told_in_header_and_title(changes: dict[str, object], word: str) -> None:
    text = status_page(status(NOW, **changes), NOW)
    assert f"<title>{word} · server 1 · lance-dfaiss</title>" in text
    assert f">{word}</span>" in text


def test_a_server_that_just_began_has_a_page() -> None:
    empty = status(
        NOW, ready=False, reason="starting", started_at=NOW + 3, servers=[], groups=0, indexes=[], waiting=0,
        ram_limit_bytes=0, queue_limit=0, traffic=traffic(kinds=[], stages=[], qps_10s=0.0, qps_60s=0.0, history=[]),
    )  # fmt: skip
    text = shown(empty)
    for wanted in ("Not ready", "starting", "None is served", "up 0 s", "Nothing in the last minute", "no limit"):
        assert wanted in text
    assert not re.search(r"\bnan\b|\binf\b|None\b(?! is)", text)


@pytest.mark.parametrize("rows", [[], [0, 0], [5], [0, 7]])
def test_groups_without_rows_are_drawn(rows: list[int]) -> None:
    held = index(NOW, coverage=0.0, snapshots=[snapshot(NOW, rows=sum(rows), tail_rows=0, group_rows=rows)])
    assert "0% of all rows" in shown(status(NOW, indexes=[held]))


@pytest.mark.parametrize(("coverage", "text"), [(1.0, "100%"), (0.99999, "99.9%"), (0.00001, "0.1%"), (0.25, "25.0%")])
def test_coverage_is_not_rounded_to_all_or_nothing(coverage: float, text: str) -> None:
    assert f"{text} of all rows" in shown(status(NOW, indexes=[index(NOW, coverage=coverage)]))


def test_what_the_metrics_sum_up_can_be_shown() -> None:
    metrics = ServerMetrics()
    metrics.answered("knn", "ok", 4, 0.0012)
    metrics.stage("search", 0.0009)
    assert "knn" in shown(status(NOW, traffic=metrics.summary()))
