"""What servers answer, what they refuse, and that neither harms anybody else: over real sockets."""

from __future__ import annotations

import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import (
    AccessDenied,
    DeadlineExceeded,
    DfaissError,
    FilterRefused,
    IndexNotFound,
    InvalidArgument,
    InvalidFilter,
    InvalidQuery,
    Overloaded,
    ProtocolError,
    ServerFailed,
    SnapshotGone,
    StorageError,
    Unavailable,
    UnknownColumn,
)
from lance_dfaiss.merge import merge_topk
from lance_dfaiss.search.index import Index
from lance_dfaiss.search.view import View
from lance_dfaiss.serve import peer, wire
from lance_dfaiss.serve.answering import Workload
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.serve.holdings import HoldingOptions
from lance_dfaiss.serve.reading import MAX_FETCH_ROWS
from lance_dfaiss.serve.security import Access
from lance_dfaiss.serve.status import IndexStatus, ServerStatus, SnapshotStatus, SwapStatus, TrafficSummary
from tests.serve.inprocess import Cluster, Door, Running, Settings, running
from tests.serve.rawclient import RawClient
from tests.support import clustered, fixed_size, make_dataset, same_rows
from tests.waiting import until

DIM, ROWS, K = 16, 1_000, 10
LIMITS = wire.Limits(frame_bytes=2**20, k=500, queries=200, pending=30)
ADMIN, READER = "the admin's token, long enough", "a reader's token, long enough"


class Data:
    """A dataset with two indexes, some rows outside of them, and some rows gone."""

    def __init__(self, folder: Path) -> None:
        self.uri = str(folder / "d")
        numbers = pa.array([(7 * i) % 100 for i in range(ROWS)], pa.int32())
        words = pa.array([f"word {i}" for i in range(ROWS)])
        vectors = clustered(ROWS, DIM, 1)
        plain = make_dataset(folder / "d", vectors, rows_per_fragment=100, number=numbers, word=words)
        lance_dfaiss.create_index(plain, "vec", "IVF_FLAT", name="near", num_partitions=8, num_shards=5)
        lance_dfaiss.create_index(self.uri, "vec", "FLAT", name="angle", metric="cosine", num_shards=2)
        table = pa.table(
            {
                "id": pa.array(range(ROWS, ROWS + 60), pa.int64()),
                "vec": fixed_size(clustered(60, DIM, 2)),
                "number": pa.array(range(60), pa.int32()),
                "word": pa.array(["new"] * 60),
            }
        )
        dataset = lance.write_dataset(table, self.uri, mode="append", max_rows_per_file=20)
        dataset.delete("id % 50 = 3")
        self.queries = clustered(20, DIM, 3)

    @property
    def served(self) -> tuple[ServedIndex, ...]:
        return tuple(ServedIndex(name=name, dataset=self.uri, index=name) for name in ("near", "angle"))

    def index(self, name: str = "near") -> Index:
        return lance_dfaiss.open_index(self.uri, name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pair(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two servers, half of the rows each."""
    settings = Settings(holding=HoldingOptions(payload=("number",)), workload=Workload(threads=1, limits=LIMITS))
    with running(tmp_path_factory.mktemp("pair"), data.served, servers=2, settings=settings) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def single(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with tokens, little room, and columns that are not for everybody."""
    settings = Settings(
        holding=HoldingOptions(columns=("id", "number"), payload=("number", "word")),
        workload=Workload(threads=1, limits=LIMITS, max_waiting=40, max_batch=16),
        more={"access": Access(read_token=READER.encode(), admin_token=ADMIN.encode())},
    )
    with running(tmp_path_factory.mktemp("single"), data.served, settings=settings) as cluster:
        yield cluster.servers[0]


@pytest.fixture
def client(pair: Cluster) -> Iterator[RawClient]:
    with RawClient(pair.servers[0].address) as connected:
        yield connected


@pytest.fixture
def reader(single: Running) -> Iterator[RawClient]:
    with RawClient(single.address, token=READER) as connected:
        yield connected


def knn(client: RawClient, n: int = 1, k: int = K, **more: Any) -> wire.Knn:
    offer = client.offer(more.pop("index", "near"))
    return wire.Knn(**{"index": offer.index, "at": offer.at, "k": k, "n": n, **more})


def served_still(client: RawClient, data: Data) -> None:
    """Assert that a client gets answers."""
    distances, _ = client.knn(data.queries[:2], 3, client.offer("near"))
    assert np.isfinite(distances).all()


# Answers.


_ASKED: tuple[dict[str, Any], ...] = ({}, {"filter": "number < 30"}, {"tail": False}, {"filter": "word = 'new'"})
_WIDTHS: dict[str, dict[str, Any]] = {"near": {"nprobe": 4}, "angle": {}}


@pytest.mark.parametrize("name", _WIDTHS)
def test_servers_together_answer_what_the_index_does(name: str, pair: Cluster, data: Data) -> None:
    for more in _ASKED:
        answers = []
        for server in pair.servers:
            with RawClient(server.address) as client:
                answers.append(client.knn(data.queries, K, client.offer(name), **_WIDTHS[name], **more))
        asked = {"include_tail" if key == "tail" else key: value for key, value in more.items()}
        same_rows(merge_topk(answers, K), data.index(name).knn(data.queries, K, **_WIDTHS[name], **asked))


def test_ranges_join_to_the_ranges_of_the_index(pair: Cluster, data: Data) -> None:
    expected = data.index().range_search(data.queries[0], 260.0, columns=())
    found: list[tuple[float, int]] = []
    for server in pair.servers:
        with RawClient(server.address) as client:
            offer = client.offer("near")
            message = wire.Range(index="near", at=offer.at, radius=260.0, columns=("number",))
            reply, payload = client.ask(message, data.queries[0].tobytes(), expected=wire.RangeReply)
            distances, row_ids, rest = wire.results_of(payload, 1, reply.n)
            numbers = pa.ipc.open_stream(rest).read_all()
            assert len(numbers) == reply.n
            found += zip(distances[0].tolist(), row_ids[0].tolist(), strict=True)
    assert len(expected) > 10
    assert sorted(found) == list(zip(expected["_distance"].to_pylist(), expected["_rowid"].to_pylist(), strict=True))


def test_columns_come_with_the_results(client: RawClient, data: Data) -> None:
    queries = data.queries[:3]
    reply, payload = client.ask(knn(client, 3, columns=("number",)), queries.tobytes(), expected=wire.KnnReply)
    _, row_ids, rest = wire.results_of(payload, reply.n, reply.width)
    table = pa.ipc.open_stream(rest).read_all()
    assert table.column_names == ["number"]
    expected = data.index().view.fetch(row_ids.ravel(), ["number"])
    assert table["number"].to_pylist() == expected["number"].to_pylist()


def test_columns_come_in_the_order_asked_for(client: RawClient, data: Data) -> None:
    rows = lance.dataset(data.uri).to_table(columns=["id", "word"], with_row_id=True)
    wanted = np.random.default_rng(0).choice(len(rows), size=40)  # with some twice
    row_ids = rows["_rowid"].to_numpy()[wanted]
    offer = client.offer("near")
    for columns, name in (
        (("word", "id"), "word"),
        ({"w": "word", "twice": "id + id"}, "w"),
        (None, "word"),
    ):
        message = wire.Fetch(index="near", at=offer.at, n=40, columns=columns)
        reply, payload = client.ask(message, row_ids.tobytes(), expected=wire.TableReply)
        table = pa.ipc.open_stream(payload).read_all()
        assert reply.rows == len(table) == 40
        assert table[name].to_pylist() == rows["word"].take(wanted).to_pylist()
        if columns is None:
            assert {"id", "vec", "number", "word"} <= set(table.column_names)


def test_each_row_is_reconstructed_by_one_server(pair: Cluster, data: Data) -> None:
    rows = lance.dataset(data.uri).to_table(columns=["vec"], with_row_id=True)
    row_ids = np.append(rows["_rowid"].to_numpy(), rows["_rowid"].to_numpy()[5])[-190:]
    masks = []
    for server in pair.servers:
        with RawClient(server.address) as client:
            message = wire.Reconstruct(index="near", at=client.offer("near").at, n=len(row_ids))
            reply, payload = client.ask(message, row_ids.tobytes(), expected=wire.ReconstructReply)
            mask, vectors = wire.vectors_of(payload, reply.n, reply.held, reply.dim)
            np.testing.assert_array_equal(vectors, data.index().reconstruct(row_ids[mask]))
            masks.append(mask)
    assert (masks[0] ^ masks[1]).all()
    assert masks[0].any()
    assert masks[1].any()


def test_half_precision(client: RawClient, data: Data) -> None:
    offer, rough = client.offer("near"), data.queries.astype(np.float16)
    message = wire.Knn(index="near", at=offer.at, k=K, n=len(rough), dtype="f2")
    reply, payload = client.ask(message, rough.tobytes())
    found = wire.results_of(payload, reply.n, reply.width)[:2]
    same_rows(found, client.knn(rough.astype(np.float32), K, offer))


def test_explained(client: RawClient, data: Data) -> None:
    reply, _ = client.ask(knn(client, explain=True, filter="number < 30"), data.queries[:1].tobytes())
    assert {"filter", "scan"} <= {stage["name"] for stage in reply.stages}
    assert all(stage["seconds"] >= 0 for stage in reply.stages)


def test_more_results_than_rows(client: RawClient, data: Data) -> None:
    distances, row_ids = client.knn(data.queries[0], 500, client.offer("near"), filter="number = 7")
    offer = client.offer("near")
    assert distances.shape[1] <= offer.rows[offer.group]
    assert len(set(row_ids[0].tolist())) == row_ids.shape[1]
    nothing, _ = client.knn(data.queries[0], 5, client.offer("near"), filter="number = 1000")
    assert not np.isfinite(nothing).any()


# Refusals that end a request, and nothing else.

_BAD: dict[str, tuple[dict[str, Any], type[DfaissError], str]] = {
    "index": ({"index": "far"}, IndexNotFound, "near, angle"),
    "snapshot": ({"at": "1.1.1.1"}, SnapshotGone, "not held here"),
    "k over": ({"k": LIMITS.k + 1}, InvalidArgument, "between 1 and 500"),
    "k zero": ({"k": 0}, InvalidArgument, "between 1 and 500"),
    "k negative": ({"k": -1}, InvalidArgument, "between 1 and 500"),
    "k absurd": ({"k": 2**62}, InvalidArgument, "between 1 and 500"),
    "no query": ({"n": 0}, InvalidArgument, "between 1 and 200"),
    "too many": ({"n": LIMITS.queries + 1}, InvalidArgument, "between 1 and 200"),
    "n times k": ({"n": 180, "k": 500}, InvalidArgument, "1,080,000 bytes"),
    "nprobe": ({"nprobe": 9}, InvalidArgument, "8 partitions"),
    "nprobe zero": ({"nprobe": 0}, InvalidArgument, "nprobe"),
    "ef": ({"ef": 10}, InvalidArgument, "HNSW"),
    "k_factor": ({"k_factor": 2}, InvalidArgument, "refine"),
    "sql": ({"filter": "number <"}, FilterRefused, "its end"),
    "not a condition": ({"filter": "number"}, InvalidFilter, "boolean"),
    "refused": ({"filter": "length(repeat(word, 2000000)) > 5"}, FilterRefused, "repeat"),
    "long sum": ({"filter": "number > " + "1+" * 4_000 + "1"}, FilterRefused, "256"),
    "types": ({"filter": "word + 1 = 2"}, InvalidFilter, "word"),
    "filter column": ({"filter": "nothing = 1"}, UnknownColumn, "nothing"),
    "column": ({"columns": ("nothing",)}, UnknownColumn, "number"),
    "no payload": ({"columns": ("word",)}, InvalidArgument, "not held in RAM"),
    "late": ({"timeout": 0.0}, DeadlineExceeded, "no time left"),
    "long late": ({"timeout": -1.0}, DeadlineExceeded, "no time left"),
}


@pytest.mark.parametrize("case", _BAD)
def test_refused_and_the_connection_goes_on(case: str, client: RawClient, data: Data) -> None:
    changes, error, text = _BAD[case]
    message = knn(client)
    for name, value in changes.items():
        setattr(message, name, value)
    queries = np.resize(data.queries, (message.n, DIM))
    with pytest.raises(error, match=text) as caught:
        client.ask(message, queries.tobytes())
    assert type(caught.value) is error
    served_still(client, data)


def test_queries_of_another_size(client: RawClient, data: Data) -> None:
    # The index may have been built anew with another dimension, a moment ago: no reason to hang up.
    query = data.queries[:1].tobytes()
    for message, payload, text in (
        (knn(client, 2), query, "64 bytes are not 2 queries"),
        (knn(client), query + b"\0", "65 bytes"),
        (knn(client), b"", "0 bytes"),
        (knn(client, dtype="f8"), query * 2, "of type 'f8'"),
        (knn(client, dtype="f2"), query, "as f2"),
    ):
        with pytest.raises(InvalidArgument, match=text):
            client.ask(message, payload)
    within = wire.Range(index="near", at=client.offer("near").at, radius=1.0)
    with pytest.raises(InvalidArgument, match="128 bytes are not 1 queries"):
        client.ask(within, query * 2)
    served_still(client, data)


def test_queries_that_are_none(client: RawClient, data: Data) -> None:
    for value in (np.nan, np.inf):
        broken = data.queries[:2].copy()
        broken[1, 3] = value
        with pytest.raises(InvalidQuery):
            client.ask(knn(client, 2), broken.tobytes())
        message = wire.Range(index="near", at=client.offer("near").at, radius=1.0)
        with pytest.raises(InvalidQuery):
            client.ask(message, broken[1].tobytes())
    zero = np.zeros((1, DIM), np.float32)
    with pytest.raises(InvalidQuery, match="zero"):
        client.ask(knn(client, index="angle"), zero.tobytes())
    client.ask(knn(client), zero.tobytes())
    served_still(client, data)


def test_bad_radius(client: RawClient, data: Data) -> None:
    message = wire.Range(index="near", at=client.offer("near").at, radius=np.nan)
    with pytest.raises(InvalidArgument):
        client.ask(message, data.queries[0].tobytes())
    served_still(client, data)


def test_too_many_rows_to_read(client: RawClient, data: Data) -> None:
    offer, row_ids = client.offer("near"), np.zeros(LIMITS.frame_bytes // (4 * DIM) + 1, np.uint64)
    with pytest.raises(InvalidArgument, match="1,048,640 bytes"):
        client.ask(wire.Reconstruct(index="near", at=offer.at, n=len(row_ids)), row_ids.tobytes())
    with pytest.raises(InvalidArgument, match="between 1 and 1,000,000"):
        client.ask(wire.Fetch(index="near", at=offer.at, n=MAX_FETCH_ROWS + 1, columns=("id",)))
    served_still(client, data)


def test_rows_and_columns_that_do_not_exist(client: RawClient, data: Data) -> None:
    offer, nobody = client.offer("near"), np.array([2**40], np.uint64)

    def fetch(columns: Any, row_ids: Any = nobody[:0]) -> Any:
        message = wire.Fetch(index="near", at=offer.at, n=len(row_ids), columns=columns)
        return client.ask(message, row_ids.tobytes())

    with pytest.raises(UnknownColumn, match="nothing"):
        fetch(("nothing",))
    with pytest.raises(DfaissError):
        fetch({"a": "nothing + 1"})
    with pytest.raises(FilterRefused):
        fetch({"a": "repeat(word, 1000)"})
    with pytest.raises(InvalidArgument, match="1001 columns"):
        fetch(tuple(f"c{i}" for i in range(1_001)))
    with pytest.raises(DfaissError):
        fetch(("id",), nobody)
    _, payload = client.ask(wire.Reconstruct(index="near", at=offer.at, n=1), nobody.tobytes())
    assert payload == b"\0"
    served_still(client, data)


def test_only_the_columns_that_are_allowed(reader: RawClient, data: Data) -> None:
    offer = reader.offer("near")
    assert (offer.columns, offer.payload) == (("id", "number"), ("number",))
    row_ids = lance.dataset(data.uri).to_table(columns=[], with_row_id=True)["_rowid"].to_numpy()[:3]

    def fetch(columns: Any) -> list[str]:
        message = wire.Fetch(index="near", at=offer.at, n=3, columns=columns)
        _, payload = reader.ask(message, row_ids.tobytes(), expected=wire.TableReply)
        return [name for name in pa.ipc.open_stream(payload).read_all().column_names if name != "_rowid"]

    assert fetch(None) == ["id", "number"]
    assert fetch(("number",)) == ["number"]
    assert fetch({"n": "number + id"}) == ["n"]
    for columns in (("word",), ("vec",), {"a": "length(word)"}, {"a": "`word`"}):
        with pytest.raises(AccessDenied, match=r"word|vec"):
            fetch(columns)
    for name in ("_rowaddr", "_rowid", "_row_created_at_version", "_fragment_id"):
        with pytest.raises((AccessDenied, UnknownColumn)):
            fetch((name,))
    for sql in ("word = 'new'", "number < 5 AND length(word) > 2", "_rowaddr > 5", "`word` = 'x'"):
        with pytest.raises(AccessDenied):
            reader.ask(knn(reader, filter=sql), data.queries[:1].tobytes())
    with pytest.raises(AccessDenied):  # although it is in RAM
        reader.ask(knn(reader, columns=("word",)), data.queries[:1].tobytes())
    within = wire.Range(index="near", at=offer.at, radius=50.0, columns=("number", "word"))
    with pytest.raises(AccessDenied):
        reader.ask(within, data.queries[0].tobytes())
    reader.ask(knn(reader, filter="number < 50", columns=("number",)), data.queries[:1].tobytes())


# What ends a connection, and no other.


def _raw(kind: int, header: bytes, payload: bytes = b"", request_id: int = 7) -> bytes:
    return struct.pack("<IB3xIQ", len(header) + len(payload), kind, len(header), request_id) + header + payload


def test_what_ends_a_connection(client: RawClient, pair: Cluster, data: Data) -> None:
    good = data.queries[:1].tobytes()
    bad: list[tuple[wire.Message | bytes, bytes, str]] = [
        (wire.Fetch(index="near", at=client.offer("near").at, n=3), good, "not 3 row ids"),
        (wire.Reconstruct(index="near", at=client.offer("near").at, n=3), good, "not 3 row ids"),
        (wire.Hello(protocol=wire.PROTOCOL), b"", "nothing to send"),
        (wire.Done(), b"", "from the wrong side"),
        (_raw(wire.Knn.KIND, b"\xc1"), b"", "does not parse"),
        (_raw(99, b"\x80"), b"", "unknown kind 99"),
        (struct.pack("<IB3xIQ", LIMITS.frame_bytes + 1, wire.Knn.KIND, 5, 1), b"", "at most 1,048,576"),
        (struct.pack("<IB3xIQ", 4, wire.Knn.KIND, 5, 1), b"", "a header of 5"),
    ]
    for message, payload, text in bad:
        with RawClient(pair.servers[0].address) as other:
            if isinstance(message, bytes):
                other.sock.sendall(message)
            else:
                other.send(message, payload)
            farewell = other.wait_for_end()
        assert isinstance(farewell, ProtocolError)
        assert text in str(farewell)
        served_still(client, data)


@pytest.mark.parametrize(
    ("first", "error", "text"),
    [
        (wire.Status(), ProtocolError, "expected Hello"),
        (wire.Knn(index="near", at="x", k=1, n=1), ProtocolError, "expected Hello"),
        (wire.Hello(protocol=2), ProtocolError, "speaks protocol version 2"),
        (wire.Hello(protocol=1, client="x" * wire.HELLO_BYTES), ProtocolError, "Say Hello first"),
        (wire.Hello(protocol=1, token="x" * 20), AccessDenied, "wrong token"),
        (wire.Hello(protocol=1), AccessDenied, "asks for a token"),
    ],
)
def test_before_the_welcome(
    first: wire.Message, error: type[DfaissError], text: str, single: Running, reader: RawClient, data: Data
) -> None:
    with RawClient(single.address, hello=False) as stranger:
        stranger.send(first)
        farewell = stranger.wait_for_end()
    assert type(farewell) is error
    assert text in str(farewell)
    served_still(reader, data)


def test_requests_right_behind_the_hello(single: Running, data: Data) -> None:
    # They arrive in the same packet, and are longer than what may come before it.
    with RawClient(single.address, token=READER) as known:
        message = knn(known, 100, k=1)
    queries = np.resize(data.queries, (100, DIM)).tobytes()
    with RawClient(single.address, hello=False) as client:
        frames = wire.encode(wire.Hello(protocol=1, token=READER), 1) + wire.encode(message, 2, [queries])
        client.sock.sendall(b"".join(frames))
        assert isinstance(client.expect(1)[0], wire.Welcome)
        assert isinstance(client.expect(2)[0], wire.KnnReply)


def test_a_truncated_frame(client: RawClient, pair: Cluster, data: Data) -> None:
    before = len(pair.servers[0].server.answering.peers)
    with RawClient(pair.servers[0].address) as other:
        frame = b"".join(wire.encode(knn(client), 1, [data.queries[:1].tobytes()]))
        other.sock.sendall(frame[:-10])
        other.sock.shutdown(socket.SHUT_WR)
        other.wait_for_end()
    until(lambda: len(pair.servers[0].server.answering.peers) == before)
    served_still(client, data)


# What one client may not take from the others.


def test_somebody_who_says_nothing(pair: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance_dfaiss.serve.peer.HELLO_SECONDS", 0.05)
    with RawClient(pair.servers[0].address, hello=False) as silent, RawClient(pair.servers[0].address) as known:
        assert silent.wait_for_end() is None
        known.ask(wire.Status())


def test_too_many_connections(pair: Cluster, client: RawClient, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = pair.servers[0].server.answering
    monkeypatch.setattr("lance_dfaiss.serve.answering.MAX_CONNECTIONS", len(answering.peers))
    with RawClient(pair.servers[0].address, hello=False) as other:
        assert "as many connections as it takes" in str(other.wait_for_end())
    served_still(client, data)
    until(lambda: len(answering.peers) == 1)
    monkeypatch.undo()
    with RawClient(pair.servers[0].address) as other:
        served_still(other, data)


def test_too_much_that_waits(own: tuple[Running, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    server, data = own
    query = data.queries[:1].tobytes()
    monkeypatch.setattr("lance_dfaiss.serve.answering.MAX_HELD_BYTES", 3 * len(query))
    with RawClient(server.address) as client, Door(server) as door:
        asked = [client.send(knn(client, k=k), query) for k in (3, 4, 5)]
        with pytest.raises(Overloaded, match="bytes of requests"):
            client.ask(knn(client), query)
        client.send(wire.Cancel(), request_id=asked.pop())
        asked.append(client.send(knn(client, k=6), query))
        door.open()
        assert all(isinstance(client.expect(request_id)[0], wire.KnnReply) for request_id in asked)
        for _ in range(5):
            client.ask(knn(client), query)
    assert server.server.answering._held_bytes == 0


def test_too_much_that_is_unfinished(own: tuple[Running, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    server, data = own
    answering = server.server.answering
    monkeypatch.setattr("lance_dfaiss.serve.answering.MAX_UNFINISHED_BYTES", 4_000)
    with RawClient(server.address) as client, RawClient(server.address) as first, RawClient(server.address) as second:
        frame = b"".join(wire.encode(knn(client, 100), 1, [np.resize(data.queries, (100, DIM)).tobytes()]))
        first.sock.sendall(frame[:3_000])
        until(lambda: answering._unfinished_bytes == 3_000)
        second.sock.sendall(frame[:3_000])
        assert "unfinished requests" in str(second.wait_for_end())
        until(lambda: answering._unfinished_bytes == 3_000)
        served_still(client, data)
        first.sock.sendall(frame[3_000:])
        assert isinstance(first.expect(1)[0], wire.KnnReply)
    until(lambda: answering._unfinished_bytes == 0)


def test_too_many_that_read(own: tuple[Running, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    server, data = own
    monkeypatch.setattr("lance_dfaiss.serve.gates.MAX_INSIDE", 2)
    gate, fetch = threading.Event(), View.fetch

    def held_up(view: View, *args: Any, **more: Any) -> pa.Table:
        assert gate.wait(30)
        return fetch(view, *args, **more)

    monkeypatch.setattr(View, "fetch", held_up)
    row_ids = np.arange(4, 6, dtype=np.uint64).tobytes()
    with RawClient(server.address) as client:
        message = wire.Fetch(index="near", at=client.offer("near").at, n=2, columns=("word",))
        asked = [client.send(message, row_ids) for _ in range(2)]
        with pytest.raises(Overloaded, match="read data"):
            client.ask(message, row_ids)
        served_still(client, data)  # searches go on meanwhile
        gate.set()
        assert all(isinstance(client.expect(request_id)[0], wire.TableReply) for request_id in asked)
        client.ask(message, row_ids, expected=wire.TableReply)


# The queue.


def test_an_id_in_use(single: Running, reader: RawClient, data: Data) -> None:
    query = data.queries[:1].tobytes()
    with Door(single) as door, RawClient(single.address, token=READER) as other:
        other.send(knn(reader), query, request_id=5)
        door.wait_inside()
        other.send(knn(reader), query, request_id=5)
        assert "still in use" in str(other.wait_for_end())
        door.open()
    served_still(reader, data)


def test_cancelled_requests_are_not_answered(single: Running, reader: RawClient, data: Data) -> None:
    query, lane = data.queries[:1].tobytes(), single.server.answering.lane
    with Door(single) as door:
        reader.send(knn(reader), query, request_id=1_001)
        door.wait_inside()
        reader.send(knn(reader, k=3), query, request_id=1_002)
        reader.send(knn(reader, k=4), query, request_id=1_003)
        until(lambda: lane.waiting == 2)
        for request_id in (1_001, 1_002, 9_999):  # in the lane, in the queue, and never asked
            reader.send(wire.Cancel(), request_id=request_id)
        until(lambda: lane.waiting == 1)
        reader.send(knn(reader, k=5), query, request_id=1_002)  # the id is free again
        until(lambda: lane.waiting == 2)
        door.open()
        assert reader.expect(1_003)[0].width == 4
        assert reader.expect(1_002)[0].width == 5
    reader.send(wire.Cancel(), request_id=1_003)  # answered long ago
    served_still(reader, data)
    assert not reader._answers


def test_a_client_that_went_away_costs_nothing(single: Running, reader: RawClient, data: Data) -> None:
    lane, queries = single.server.answering.lane, data.queries.tobytes()
    with Door(single) as door:
        reader.send(knn(reader), data.queries[:1].tobytes(), request_id=1)
        door.wait_inside()
        with RawClient(single.address, token=READER) as other:
            other.send(knn(reader, 20, k=3), queries)
            until(lambda: lane.waiting == 20)
        until(lambda: lane.waiting == 0)
        door.open()
        reader.expect(1)
    served_still(reader, data)


def test_deadlines(single: Running, reader: RawClient, data: Data) -> None:
    query = data.queries[:1].tobytes()
    with Door(single) as door:
        searched = reader.send(knn(reader, timeout=0.3), query)
        door.wait_inside()
        waiting = reader.send(knn(reader, k=3, timeout=0.3), query)
        patient = reader.send(knn(reader, k=4, timeout=60.0), query)
        until(lambda: single.server.answering.lane.waiting == 2)
        end = time.monotonic() + 0.31
        until(lambda: time.monotonic() > end)
        door.open()
        for request_id, text in ((searched, "took longer than the 0.300"), (waiting, "was not searched")):
            failure, _ = reader.expect(request_id)
            error = wire.error_of(failure)
            assert isinstance(error, DeadlineExceeded)
            assert text in str(error)
            assert error.seconds == pytest.approx(0.3)
        assert isinstance(reader.expect(patient)[0], wire.KnnReply)
    assert single.server.answering.lane.waiting == 0


def test_a_full_queue(single: Running, reader: RawClient, data: Data) -> None:
    queries = data.queries.tobytes()  # 20; 40 may wait
    with Door(single) as door:
        first = reader.send(knn(reader), data.queries[:1].tobytes())
        door.wait_inside()
        waiting = [reader.send(knn(reader, 20, k=k), queries) for k in (3, 4)]
        until(lambda: single.server.answering.lane.waiting == 40)
        with RawClient(single.address, token=READER) as other:
            with pytest.raises(Overloaded) as caught:
                other.ask(knn(reader), data.queries[:1].tobytes())
            assert caught.value.waiting == 40
            assert caught.value.retry_after_seconds > 0
            door.open()
            for request_id in (first, *waiting):
                assert isinstance(reader.expect(request_id)[0], wire.KnnReply)
            served_still(other, data)
    assert single.server.answering.lane.waiting == 0


def test_too_many_requests_of_one_connection(single: Running, reader: RawClient, data: Data) -> None:
    query = data.queries[:1].tobytes()
    with Door(single) as door:
        asked = [reader.send(knn(reader), query) for _ in range(LIMITS.pending)]
        with pytest.raises(Overloaded, match="requests of this connection"):
            reader.ask(knn(reader), query)
        with RawClient(single.address, token=READER) as other:
            request_id = other.send(knn(reader), query)
            door.open()
            assert isinstance(other.expect(request_id)[0], wire.KnnReply)
        assert all(isinstance(reader.expect(request_id)[0], wire.KnnReply) for request_id in asked)
    served_still(reader, data)


def test_a_large_request_is_searched_in_turns(own: tuple[Running, Data]) -> None:
    server, data = own
    many = np.resize(data.queries, (100, DIM))  # in batches of 16
    with RawClient(server.address) as client, RawClient(server.address) as other, Door(server) as door:
        large = client.send(knn(client, 100), many.tobytes())
        door.wait_inside()
        small = [other.send(knn(other, k=k), data.queries[:1].tobytes()) for k in (3, 4, 5)]
        until(lambda: server.server.answering.lane.waiting == 84 + 3)
        door.open()
        for request_id in small:
            other.expect(request_id)
        reply, payload = client.expect(large)
    distances, row_ids, _ = wire.results_of(payload, reply.n, reply.width)
    same_rows((distances, row_ids), data.index().knn(many, K))


def test_a_client_that_does_not_read(pair: Cluster, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pair.servers[1]
    with RawClient(server.address) as lazy, RawClient(server.address) as other:
        port = lazy.sock.getsockname()[1]
        (mine,) = [each for each in server.server.answering.peers if each.name.endswith(f":{port}")]
        answered, send = [], mine.send

        def noted(message: wire.Message, request_id: int, *rest: Any) -> None:
            send(message, request_id, *rest)
            answered.append(request_id)

        monkeypatch.setattr(mine, "send", noted)
        queries = np.resize(data.queries, (100, DIM)).tobytes()
        message = knn(lazy, 100, k=300)
        asked, answer_bytes = [], 100 * 300 * 12
        while mine._transport.is_reading():
            asked.append(lazy.send(message, queries))
            until(lambda: answered == asked)
            assert len(asked) < 300
        held = mine._transport.get_write_buffer_size()
        assert peer.MAX_UNSENT_BYTES < held < peer.MAX_UNSENT_BYTES + 2 * answer_bytes
        later = [lazy.send(message, queries) for _ in range(5)]
        served_still(other, data)
        assert answered == asked  # the others are not even read
        assert mine._transport.get_write_buffer_size() <= held
        # It reads after all, and has lost nothing.
        assert all(isinstance(lazy.expect(request_id)[0], wire.KnnReply) for request_id in asked + later)


# Life of a server.


def _checked(value: Any, shape: Any) -> None:
    """Assert that a map has exactly the keys of a TypedDict."""
    assert set(value) == set(get_type_hints(shape))


def test_the_shape_of_a_status(single: Running, reader: RawClient, data: Data) -> None:
    served_still(reader, data)
    status = reader.ask(wire.Status(), expected=wire.StatusReply)[0].status
    _checked(status, ServerStatus)
    _checked(status["traffic"], TrafficSummary)
    assert [each["name"] for each in status["indexes"]] == ["near", "angle"]
    for each in status["indexes"]:
        _checked(each, IndexStatus)
        _checked(each["snapshots"][0], SnapshotStatus)
        _checked(each["last_swap"], SwapStatus)
        assert each["last_swap"]["outcome"] == "ok"
        assert each["problem"] is each["loading"] is None
        assert each["coverage"] == 1.0
    near = status["indexes"][0]
    index = data.index()
    assert near["snapshots"][0]["rows"] == len(index) == sum(near["snapshots"][0]["group_rows"])
    assert near["snapshots"][0]["tail_rows"] == index.stats().tail_rows
    assert near["last_swap"]["read_bytes"] > 0
    assert near["payload_bytes"] > 0
    assert status["address"] == "{}:{}".format(*single.address)
    assert (status["ready"], status["draining"], status["reason"], status["queue_limit"]) == (True, False, "", 40)
    assert status["ram_bytes"] > 2**20
    assert status["connections"] >= 1


def test_work_of_admins_is_not_for_readers(single: Running, reader: RawClient, data: Data) -> None:
    assert not reader.welcome.admin
    for message in (wire.Reload(), wire.Reload(index="near", version=2), wire.Drain()):
        with pytest.raises(AccessDenied, match="admins"):
            reader.ask(message)
    with RawClient(single.address, token=ADMIN) as admin:
        assert admin.welcome.admin
        assert admin.ask(wire.Reload(index="near"), expected=wire.Done)[0].facts == {
            "at": {"near": reader.offer("near").at},
            "versions": {"near": reader.offer("near").version},
        }
    assert not single.server.draining
    served_still(reader, data)


@pytest.fixture
def own(data: Data, tmp_path: Path) -> Iterator[tuple[Running, Data]]:
    """A server and a dataset that a test may ruin."""
    shutil.copytree(data.uri, tmp_path / "d")
    mine = Data.__new__(Data)
    mine.uri, mine.queries = str(tmp_path / "d"), data.queries
    settings = Settings(workload=Workload(threads=1, limits=LIMITS, max_batch=16), more={"drain_seconds": 0.3})
    with running(tmp_path, mine.served[:1], settings=settings) as cluster:
        yield cluster.servers[0], mine


def test_reload(own: tuple[Running, Data]) -> None:
    server, data = own
    with RawClient(server.address) as client:
        newest = client.offer("near")
        assert newest.version == lance.dataset(data.uri).version
        for back in (1, 2, 1, None, 1, None, 0):
            version = None if back is None else newest.version - back
            facts = client.ask(wire.Reload(index="near", version=version), expected=wire.Done)[0].facts
            expected = newest.version if version is None else version
            # Offered before it is answered, and the newest of all that is offered: clients turn to it.
            assert facts["at"] == {"near": client.offer("near").at}
            assert client.offer("near").version == expected
            index = lance_dfaiss.open_index(lance.dataset(data.uri, version=expected), "near")
            found = client.knn(data.queries, K, client.offer("near"), nprobe=8)
            same_rows((found[0], found[1]), index.knn(data.queries, K, nprobe=8))
        for name, version, error in (("near", 99, InvalidArgument), ("far", None, IndexNotFound)):
            with pytest.raises(error):
                client.ask(wire.Reload(index=name, version=version))
        assert client.offer("near").at == newest.at
        served_still(client, data)
        status = client.ask(wire.Status())[0].status["indexes"][0]
        assert "99" in status["problem"]
        assert status["last_swap"]["outcome"] == "InvalidArgument"
        client.ask(wire.Reload())
        assert client.ask(wire.Status())[0].status["indexes"][0]["problem"] is None


def test_a_server_that_has_nothing_yet(data: Data, tmp_path: Path) -> None:
    served = ServedIndex(name="near", dataset=str(tmp_path / "d"), index="near")
    query = data.queries[:1].tobytes()
    with (
        running(tmp_path, [served], refresh_seconds=0.1) as cluster,
        RawClient(cluster.servers[0].address) as client,
    ):
        assert client.welcome.offers == ()
        with pytest.raises(SnapshotGone):
            client.ask(wire.Knn(index="near", at="1", k=1, n=1), query)
        status = client.ask(wire.Status())[0].status
        assert not status["ready"]
        assert "near" in status["reason"]
        (index,) = status["indexes"]
        _checked(index, IndexStatus)
        assert index["snapshots"] == []
        assert index["problem"] in status["reason"]
        assert index["last_swap"]["outcome"] != "ok"
        shutil.copytree(data.uri, tmp_path / "d")
        until(lambda: client.listen() and client.offers)  # it is told, and need not ask
        assert isinstance(client.ask(knn(client), query)[0], wire.KnnReply)
        assert client.ask(wire.Status())[0].status["ready"]


def test_drain(own: tuple[Running, Data]) -> None:
    server, data = own
    with RawClient(server.address) as client, RawClient(server.address) as other, Door(server) as door:
        asked = [client.send(knn(client), data.queries[:1].tobytes())]
        door.wait_inside()
        asked.append(client.send(knn(client, k=3), data.queries[:1].tobytes()))
        other.ask(wire.Drain(), expected=wire.Done)
        assert other.said[-1].draining
        asked.append(other.send(knn(other, k=4), data.queries[:1].tobytes()))
        with RawClient(server.address) as late:
            assert late.welcome.draining
            until(lambda: server.server.answering.lane.waiting == 2)
        assert not server.ended
        door.open()
        for who, request_id in zip((client, client, other), asked, strict=True):
            assert isinstance(who.expect(request_id)[0], wire.KnnReply)
        assert client.wait_for_end() is other.wait_for_end() is None
        assert client.said[-1].draining
    until(lambda: server.ended)
    with pytest.raises(ConnectionRefusedError):
        RawClient(server.address)


def test_drain_sends_what_a_slow_client_has_not_read(own: tuple[Running, Data]) -> None:
    server, data = own
    queries = np.resize(data.queries, (100, DIM)).tobytes()
    with RawClient(server.address) as slow, RawClient(server.address) as other:
        asked = [slow.send(knn(slow, 100, k=500), queries) for _ in range(25)]
        other.ask(wire.Drain())
        other.wait_for_end()
        assert all(isinstance(slow.expect(request_id)[0], wire.KnnReply) for request_id in asked)
        assert slow.wait_for_end() is None
    until(lambda: server.ended)


def test_drain_takes_nothing_new_in_the_end(own: tuple[Running, Data]) -> None:
    # Or somebody who goes on asking would keep it from ending.
    server, data = own
    query = data.queries[:1].tobytes()
    with RawClient(server.address) as client, Door(server) as door:
        asked = client.send(knn(client), query)
        door.wait_inside()
        client.ask(wire.Drain())
        until(lambda: server.server.answering.closed)
        with pytest.raises(Unavailable, match="takes nothing new"):
            client.ask(knn(client), query)
        door.open()
        assert isinstance(client.expect(asked)[0], wire.KnnReply)
        assert client.wait_for_end() is None
    until(lambda: server.ended)


def test_nobody_keeps_a_server_from_ending(own: tuple[Running, Data], monkeypatch: pytest.MonkeyPatch) -> None:
    server, data = own
    monkeypatch.setattr("lance_dfaiss.serve.server.FAREWELL_SECONDS", 0.1)
    queries = np.resize(data.queries, (100, DIM)).tobytes()
    with RawClient(server.address) as lazy:
        for _ in range(25):
            lazy.send(knn(lazy, 100, k=500), queries)
        lazy.send(wire.Drain())
        until(lambda: server.ended)


def test_storage_that_fails(own: tuple[Running, Data]) -> None:
    server, data = own
    rows = lance.dataset(data.uri).to_table(columns=[], with_row_id=True)["_rowid"].to_numpy()
    shutil.rmtree(Path(data.uri) / "data")
    with RawClient(server.address) as client:
        offer = client.offer("near")
        with pytest.raises(StorageError):
            client.ask(wire.Fetch(index="near", at=offer.at, n=3, columns=("word",)), rows[:3].tobytes())
        with pytest.raises((StorageError, InvalidFilter)):
            client.ask(knn(client, filter="number < 7"), data.queries[:1].tobytes())
        served_still(client, data)


@pytest.mark.parametrize("what", ["fetch", "knn", "widths"])  # on a thread that reads, on the lane, on the loop
def test_failures_that_nobody_thought_of(
    what: str,
    own: tuple[Running, Data],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, data = own
    rows = np.arange(3, dtype=np.uint64).tobytes()

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a secret")

    with RawClient(server.address) as client, RawClient(server.address) as other, monkeypatch.context() as patch:
        patch.setattr(View, what, broken)
        fetch = wire.Fetch(index="near", at=client.offer("near").at, n=3, columns=("word",))
        message, payload = (fetch, rows) if what == "fetch" else (knn(client), data.queries[:1].tobytes())
        with pytest.raises(ServerFailed, match="server 0 failed: ZeroDivisionError") as caught:
            client.ask(message, payload)
        assert "secret" not in str(caught.value)
        assert caught.value.server == 0
        assert "ZeroDivisionError: a secret" in caplog.text
        patch.undo()
        for each in (client, other):
            served_still(each, data)
