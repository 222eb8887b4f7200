"""What clients that mean ill did to a server once: bounds on what waits, on answers, and on one request's share."""

from __future__ import annotations

import resource
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lance_dfaiss
from lance_dfaiss.errors import AccessDenied, DeadlineExceeded, FilterTooCostly, InvalidArgument, ServerFailed
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.launch.process import _allow_files
from lance_dfaiss.search.view import View
from lance_dfaiss.serve import answering, peer, sifter, wire
from lance_dfaiss.serve.batcher import Batcher, Waiting
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.serve.holdings import HoldingOptions, Holdings
from lance_dfaiss.serve.reading import row_bytes
from lance_dfaiss.serve.sql import check_filter
from lance_dfaiss.types import Float32Array, UInt64Array
from tests.serve.inprocess import Running, Settings, running
from tests.serve.rawclient import RawClient
from tests.support import clustered, make_dataset
from tests.waiting import until

DIM, ROWS = 16, 2_000
TEXT = "x" * 1_000
PANIC = "date_trunc('year', cast(-9223372036 as timestamp(0)))"
"""An expression that Lance does not survive, as of pylance 14."""


class Panic(BaseException):
    """Like those of Rust libraries: no `Exception`."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedIndex:
    folder = tmp_path_factory.mktemp("data")
    dataset = make_dataset(
        folder / "d",
        clustered(ROWS, DIM, 1),
        rows_per_fragment=500,
        text=pa.array([TEXT] * ROWS),
        odd=pa.array(["y" * 200_000] + ["z"] * (ROWS - 1)),
    )
    lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", name="i", num_partitions=8, num_shards=1)
    return ServedIndex(name="i", dataset=str(folder / "d"), index="i")


@pytest.fixture(scope="module")
def server(served: ServedIndex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = Settings(holding=HoldingOptions(payload=("text", "odd")))
    with running(tmp_path_factory.mktemp("server"), [served], settings=settings) as cluster:
        yield cluster.servers[0]


@pytest.fixture
def client(server: Running) -> Iterator[RawClient]:
    with RawClient(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def row_ids(served: ServedIndex) -> UInt64Array:
    table = lance.dataset(served.dataset).to_table(columns=["id"], with_row_id=True)
    return np.asarray(table.sort_by("id")["_rowid"], dtype=np.uint64)


def view_of(server: Running) -> View:
    newest = server.server.holdings.shelves["i"].newest
    assert newest is not None
    return newest.view


def knn(client: RawClient, n: int = 1, **more: Any) -> wire.Knn:
    return wire.Knn(**{"index": "i", "at": client.offer("i").at, "k": 3, "n": n, **more})


def queries(n: int = 1) -> bytes:
    return clustered(n, DIM, 5).tobytes()


class Filters:
    """Filters of a server that match nothing, each held up until `open` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
        self.begun: Counter[str] = Counter()
        self._opened = threading.Event()
        monkeypatch.setattr(view_of(server), "_sift", self._evaluate)

    def open(self) -> None:
        """Let all go on."""
        self._opened.set()

    def _evaluate(self, sql: str) -> UInt64Array:
        self.begun[sql] += 1
        assert self._opened.wait(60)
        return np.zeros(0, np.uint64)


@contextmanager
def held_up(monkeypatch: pytest.MonkeyPatch, server: Running) -> Iterator[Filters]:
    filters = Filters(monkeypatch, server)
    try:
        yield filters
    finally:
        filters.open()
        until(lambda: not busy(server))


def busy(server: Running) -> int:
    """Requests inside both gates."""
    at = server.server.answering
    return at._filters.inside + at._fetches.inside


# What was cancelled is gone.


def test_cancelled_requests_leave_nothing_behind(
    server: Running, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_up(monkeypatch, server):
        for i in range(600):  # more than may wait
            request = client.send(knn(client, filter=f"id = {10_000 + i}"), queries())
            client.send(wire.Cancel(), request_id=request)
        client.ask(wire.Status())
        until(lambda: not busy(server))
        assert server.server.answering._held_bytes == 0
        waits = client.send(knn(client, filter="id = -1"), queries())
        until(lambda: busy(server) == 1)
    assert isinstance(client.expect(waits)[0], wire.KnnReply)


def test_who_hangs_up_leaves_nothing_behind(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_up(monkeypatch, server):
        with RawClient(server.address) as client:
            for i in range(20):
                client.send(knn(client, 100, filter=f"id = {100 + i}"), queries(100))
            until(lambda: busy(server) == 20)
        until(lambda: not busy(server))
        until(lambda: server.server.answering._held_bytes == 0)


def test_a_request_ends_when_its_time_is_over(
    server: Running, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held_up(monkeypatch, server) as filters:
        blocking = [client.send(knn(client, filter=f"id = {200 + i}"), queries()) for i in range(4)]
        until(lambda: len(filters.begun) == 4)
        with pytest.raises(DeadlineExceeded):
            client.ask(knn(client, filter="id = 210", timeout=0.02), queries())
        assert "id = 210" not in filters.begun
        filters.open()
        for request in blocking:
            client.expect(request)
        assert filters.begun["id = 210"] == 0, "nobody wanted it any more"


def test_a_dropped_request_lets_its_queries_go() -> None:
    batcher: Batcher[str] = Batcher(max_waiting=10, max_batch=2)
    for i in range(5_000):
        request: Waiting[str] = Waiting("a", np.zeros((2, DIM), np.float32), np.inf, i, 0.0)
        assert batcher.offer(request)
        batcher.drop(request)
        batcher.drop(request)
        assert request.queries.nbytes == 0
    assert batcher.waiting == 0
    assert sum(map(len, batcher._turns.values())) < 2_000
    assert batcher.take(0.0) == (None, [])


def test_equal_filters_are_evaluated_once(server: Running, client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_up(monkeypatch, server) as filters:
        asked = [client.send(knn(client, filter="id < 300"), queries()) for _ in range(300)]
        client.ask(wire.Status())
        for request in asked[:100]:  # the first of them too
            client.send(wire.Cancel(), request_id=request)
        client.ask(wire.Status())
        filters.open()
        assert all(isinstance(client.expect(request)[0], wire.KnnReply) for request in asked[100:])
    assert filters.begun == {"id < 300": 1}


def test_a_filter_that_is_known_is_not_checked_again(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[str] = []

    def check(sql: str, **more: Any) -> None:
        on.append(threading.current_thread().name)
        check_filter(sql, **more)

    monkeypatch.setattr(answering, "check_filter", check)
    for _ in range(3):
        client.ask(knn(client, filter="id IN (1, 2, 3)"), queries(), expected=wire.KnnReply)
    assert len(on) == 1
    assert on[0].startswith("lance-dfaiss-filter"), "not on the event loop"


def test_filters_that_match_nothing_are_counted(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(server)
    monkeypatch.setattr(view, "_sift", lambda _: np.zeros(0, np.uint64))
    before = view._filters.ram_bytes
    for i in range(50):
        view.select(f"id = {i} or text = '{'t' * 1_000}'", include_tail=True)
    assert view._filters.ram_bytes - before > 50 * 3_000


# Bounds on answers.


def test_answers_that_nobody_reads(
    server: Running, row_ids: UInt64Array, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "MAX_UNSENT_BYTES", 2**20)
    message = wire.Fetch(index="i", at=client.offer("i").at, n=16_000, columns=("text",))
    payload = np.full(16_000, row_ids[5]).tobytes()
    with RawClient(server.address) as slow:
        one = slow.send(message, payload)
        until(lambda: server.server.answering._unsent_bytes > 2**20)
        for _ in range(4):
            client.send(message, payload)
        port = client.sock.getsockname()[1]
        until(lambda: not [p for p in server.server.answering.peers if p.name.endswith(f":{port}")])
        assert slow.expect(one)[0] == wire.TableReply(rows=16_000), "it asked for no more than that"
    until(lambda: server.server.answering._unsent_bytes == 0)


def test_a_client_that_reads_nothing_is_left(
    server: Running, row_ids: UInt64Array, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "STALLED_SECONDS", 0.05)
    client.send(
        wire.Fetch(index="i", at=client.offer("i").at, n=32_000, columns=("text",)),
        np.full(32_000, row_ids[5]).tobytes(),
    )
    until(lambda: server.server.answering._unsent_bytes > 0)
    until(lambda: not server.server.answering.peers)
    assert server.server.answering._unsent_bytes == 0


def test_columns_of_many_rows_are_bounded(
    client: RawClient, row_ids: UInt64Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lance_dfaiss.serve.reading.MAX_ANSWER_BYTES", 2**20)

    def fetch(column: str, rows: UInt64Array) -> pa.Table:
        message = wire.Fetch(index="i", at=client.offer("i").at, n=len(rows), columns=(column,))
        _, payload = client.ask(message, rows.tobytes(), expected=wire.TableReply)
        return pa.ipc.open_stream(payload).read_all()

    too_many: tuple[tuple[str, UInt64Array], ...] = (
        ("text", row_ids),  # each once
        ("text", row_ids[:510].repeat(3)),
        ("odd", np.concatenate([row_ids, row_ids[:1].repeat(5)])),  # one long row, many times
    )
    for column, rows in too_many:
        with pytest.raises(InvalidArgument, match="the answer would have"):
            fetch(column, rows)
    chosen = np.random.default_rng(0).integers(1, ROWS, 3_000)
    assert fetch("id", row_ids[chosen])["id"].to_pylist() == chosen.tolist()
    assert fetch("text", row_ids[:900])["text"].to_pylist() == [TEXT] * 900


def test_columns_from_ram_are_bounded(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance_dfaiss.serve.reading.MAX_ANSWER_BYTES", 2**20)
    same = np.tile(clustered(ROWS, DIM, 1)[:1], (400, 1)).tobytes()
    with pytest.raises(InvalidArgument, match="the answer would have"):
        client.ask(knn(client, 400, columns=("odd",)), same)
    client.ask(knn(client, 100, columns=("text",)), same[: 100 * DIM * 4], expected=wire.KnnReply)


@given(st.lists(st.one_of(st.none(), st.text(max_size=20)), min_size=1, max_size=20), st.integers(0, 5))
def test_the_bytes_of_rows(texts: list[str | None], start: int) -> None:
    one = pa.array(texts)
    numbers = pa.array(range(len(texts)), pa.int32())
    halves = [[text] * (i % 3) if text else None for i, text in enumerate(texts)]
    lists = pa.array(halves, pa.list_(pa.string()))
    struct = pa.StructArray.from_arrays([one, numbers], ["a", "b"])
    pairs = pa.array([[("k", text)] for text in texts], pa.map_(pa.string(), pa.string()))
    for array in (one, numbers, lists, struct, pairs, one.cast(pa.large_string()), numbers.cast(pa.bool_())):
        some = array.slice(start)
        sizes = row_bytes(some)
        assert len(sizes) == len(some)
        copied = pa.concat_arrays([some, some]).slice(0, len(some))  # alone, not as a part of what it is a slice of
        assert copied.nbytes <= sizes.sum() + 2 * len(some) + 64
        assert sizes.sum() <= 40 * len(some) + 3 * array.nbytes


def test_few_queries_go_together_where_each_is_much_work(client: RawClient, monkeypatch: pytest.MonkeyPatch) -> None:
    message = knn(client, 40, k=10)
    payload = queries(40)
    expected = client.ask(message, payload)[1]
    monkeypatch.setattr(answering, "MAX_BATCH_CANDIDATES", 100)
    seen: list[int] = []
    knn_of = View.knn

    def search(view: View, some: Float32Array, *more: Any) -> Any:
        seen.append(len(some))
        return knn_of(view, some, *more)

    monkeypatch.setattr(View, "knn", search)
    assert client.ask(message, payload)[1] == expected
    assert seen == [10, 10, 10, 10]


# What a request does ends with that request.


def test_what_lance_does_not_survive(client: RawClient, served: ServedIndex, row_ids: UInt64Array) -> None:
    message = wire.Fetch(index="i", at=client.offer("i").at, n=1, columns={"a": PANIC})
    with pytest.raises(InvalidArgument, match="gave up"):
        client.ask(message, row_ids[:1].tobytes())
    index = lance_dfaiss.open_index(served.dataset, "i")
    with pytest.raises(InvalidArgument, match="gave up"):
        index.search(np.zeros(DIM, np.float32), 2, columns={"a": PANIC})
    assert index.search(np.zeros(DIM, np.float32), 2, columns={"a": "left(text, 2)"})["a"].to_pylist() == ["xx", "xx"]


@pytest.mark.parametrize("method", ["knn", "within", "fetch", "vectors", "select"])
def test_panics_end_one_request(
    client: RawClient, row_ids: UInt64Array, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: Any, **__: Any) -> None:
        raise Panic("at the disco")

    at = client.offer("i").at
    message: wire.Message
    message, payload = {
        "knn": (knn(client), queries()),
        "within": (wire.Range(index="i", at=at, radius=1.0), queries()),
        "fetch": (wire.Fetch(index="i", at=at, n=1, columns=("id",)), row_ids[:1].tobytes()),
        "vectors": (wire.Reconstruct(index="i", at=at, n=1), row_ids[:1].tobytes()),
        "select": (knn(client, filter="id > 1234"), queries()),
    }[method]
    with monkeypatch.context() as patch:
        patch.setattr(View, method, panic)
        for _ in range(2):
            with pytest.raises(ServerFailed, match="Panic"):
                client.ask(message, payload)
    client.ask(message, payload)


def test_a_panic_ends_no_loading(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: Any) -> None:
        raise Panic("at the disco")

    holdings = server.server.holdings
    with monkeypatch.context() as patch:
        patch.setattr(Holdings, "_at_moment", panic)
        holdings.follow()
        assert "Panic" in (holdings.shelves["i"].problem or "")
    holdings.follow()
    assert holdings.shelves["i"].problem is None


@pytest.mark.parametrize(("n", "dtype"), [(2, "f4"), (1, "f2"), (1, "who knows")])
def test_queries_of_another_size_are_one_requests_fault(client: RawClient, n: int, dtype: str) -> None:
    with pytest.raises(InvalidArgument):
        client.ask(knn(client, n, dtype=dtype), queries())
    client.ask(knn(client), queries(), expected=wire.KnnReply)


def test_vectors_that_may_not_be_seen(served: ServedIndex, row_ids: UInt64Array, tmp_path: Path) -> None:
    settings = Settings(holding=HoldingOptions(columns=("id",)))
    with (
        running(tmp_path, [served], settings=settings) as cluster,
        RawClient(cluster.servers[0].address) as client,
        pytest.raises(AccessDenied, match="vec"),
    ):
        client.ask(wire.Reconstruct(index="i", at=client.offer("i").at, n=1), row_ids[:1].tobytes())


def test_too_little_memory_for_what_matches(served: ServedIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise MemoryError

    filters = sifter.Sifter(memory_limit_bytes=2**31, timeout_seconds=60.0)
    try:
        filters.start()
        filters.open("k", PinnedDataset(lance.dataset(served.dataset)), None)
        with monkeypatch.context() as patch:
            patch.setattr(sifter._Process, "addresses", no_room)
            with pytest.raises(FilterTooCostly, match="memory"):
                filters.matching("k", "id < 100")
        assert len(filters.matching("k", "id < 7")) == 7, "not what was left of the answer before"
    finally:
        filters.close()


def test_servers_may_open_many_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 1_000), before[1]))
        _allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
