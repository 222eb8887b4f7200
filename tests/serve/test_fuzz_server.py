"""A server process against whatever can connect to it: broken frames, half a connection, no word, the wrong protocol.

All the while somebody else asks it, and every answer is right.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.errors import ProtocolError
from lance_dfaiss.launch import LocalCluster, ServeOptions
from lance_dfaiss.serve import wire
from lance_dfaiss.serve.peer import HELLO_SECONDS
from tests.serve.certificates import make_certificates
from tests.serve.chaos import GROWTH, Load, Place, Truth, resident
from tests.serve.mutated_frames import frame_of, frames_of_every_kind, mutated
from tests.serve.rawclient import RawClient

HELLO = frame_of(wire.Hello(protocol=wire.PROTOCOL))
Address = tuple[str, int]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), shards=2)


@pytest.fixture(scope="module")
def truth(place: Place) -> Truth:
    return Truth(place)


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the server logs."""
    return []


@pytest.fixture(scope="module")
def cluster(place: Place, said: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    file, token = folder / "cluster.json", folder / "token"
    token.write_text("only admins may stop servers", encoding="ascii")
    token.chmod(0o600)
    options = ServeOptions(threads=1, admin_token_file=str(token))
    with LocalCluster(
        place.served, cluster_file=file, refresh_seconds=0.0, http=False, options=options, write_line=said.append
    ) as started:
        yield started


@pytest.fixture(scope="module")
def address(cluster: LocalCluster) -> Address:
    return cluster.cluster.servers[0].host, cluster.cluster.servers[0].port


@pytest.fixture(scope="module")
def silent(address: Address) -> Iterator[list[socket.socket]]:
    """Connections that do not say who they are: not a word, half a word, or a letter now and then."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_connection(address)) for _ in range(30)]
        found[1].sendall(HELLO[:9])
        enough = threading.Event()

        def drip() -> None:
            for byte in HELLO:
                if enough.wait(2 * HELLO_SECONDS / len(HELLO)):
                    return
                with contextlib.suppress(OSError):
                    found[0].sendall(bytes([byte]))

        thread = threading.Thread(target=drip)
        thread.start()
        stack.callback(thread.join)
        stack.callback(enough.set)
        yield found


@pytest.fixture(autouse=True)
def unharmed(
    cluster: LocalCluster, place: Place, truth: Truth, silent: list[socket.socket], said: list[str]
) -> Iterator[Load]:
    """Somebody else's connection, on which all is well during every test; the server stays the same process."""
    del silent  # opened before anything else
    pid = cluster.pids[0]
    # No filters, each of which would be another one: what they find is kept, up to 256 MiB.
    kinds = ("knn", "knn", "knn", "knn", "search")
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place, threads=2, kinds=kinds) as load:
        yield load
        load.wait_more(0.0)
    assert not load.problems(truth)
    assert len(load.seen) >= 2
    assert cluster.pids == {0: pid}
    assert not [line for line in said if "Traceback" in line], said[-30:]


def _stream(rng: np.random.Generator, frames: list[bytes]) -> bytes:
    """Some bytes that a client may send: mostly a good hello, then frames, one at least with damage."""
    chosen = [frames[int(i)] for i in rng.integers(0, len(frames), int(rng.integers(1, 5)))]
    broken = int(rng.integers(0, len(chosen)))
    chosen[broken] = mutated(rng, chosen[broken])
    return (HELLO if rng.random() < 0.8 else b"") + b"".join(chosen)


def _frames(offer: wire.Offer) -> list[bytes]:
    """Good frames: every kind, and requests that this server answers."""
    vectors = np.arange(2 * offer.dim, dtype="<f4").tobytes()
    ids = np.arange(2, dtype="<u8").tobytes()
    on: dict[str, Any] = {"index": offer.index, "at": offer.at}
    return [
        *frames_of_every_kind(),
        frame_of(wire.Knn(**on, k=3, n=2), 11, vectors),
        frame_of(wire.Knn(**on, k=3, n=2, filter="id > 7"), 12, vectors),
        frame_of(wire.Knn(**on, k=3, n=2, explain=True, nprobe=2), 13, vectors),
        frame_of(wire.Range(**on, radius=3.0), 14, vectors[: 4 * offer.dim]),
        frame_of(wire.Fetch(**on, n=2, columns=("id", "word")), 15, ids),
        frame_of(wire.Reconstruct(**on, n=2), 16, ids),
    ]


def _send(source: str, address: Address, stream: bytes) -> None:
    """Send bytes, and read until the server has hung up, as it must once nothing can follow."""
    with socket.create_connection(address, timeout=60.0, source_address=(source, 0)) as sock:
        # Reset in the end, so that the port is free again at once.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            sock.sendall(stream)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass


def _bombard(address: Address, streams: int, seed: int) -> None:
    """Send streams of broken frames from several connections at a time."""
    with RawClient(address) as client:
        frames = _frames(client.offers[0])

    def send(thread: int) -> None:
        rng = np.random.default_rng([seed, thread])
        for _ in range(streams // 4):
            _send(f"127.0.0.{thread + 1}", address, _stream(rng, frames))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(send, thread) for thread in range(4)]:
            done.result()


def _assert_flat_under_bombardment(cluster: LocalCluster, address: Address, streams: int) -> None:
    _bombard(address, 500, seed=1)  # whatever is made once is made now
    before = resident(cluster.pids[0])
    _bombard(address, streams, seed=2)
    assert resident(cluster.pids[0]) <= GROWTH * before


def test_broken_frames(cluster: LocalCluster, address: Address) -> None:
    _assert_flat_under_bombardment(cluster, address, 5_000)


@pytest.mark.nightly
@pytest.mark.timeout(3_600)
def test_a_million_streams_of_broken_frames(cluster: LocalCluster, address: Address) -> None:
    _assert_flat_under_bombardment(cluster, address, 1_000_000)


def test_half_open_connections(address: Address) -> None:
    # The client has said all it will, but reads on; another one hangs up in the middle of a frame, or of an answer.
    with RawClient(address) as client:
        frames = _frames(client.offers[0])
    good = frames[-6]
    for stream in (b"", HELLO[:7], HELLO, HELLO + good, HELLO + good[:30]):
        _send("127.0.0.1", address, stream)
    for stream in (HELLO + good, HELLO + good[:-9]):
        with socket.create_connection(address) as sock:
            sock.sendall(stream)


def test_a_slow_sender(address: Address, place: Place) -> None:
    with RawClient(address) as client:
        offer = client.offers[0]
        query = place.queries[:1].astype("<f4").tobytes()
        expected = client.ask(wire.Knn(index=offer.index, at=offer.at, k=5, n=1), query)
        frame = frame_of(wire.Knn(index=offer.index, at=offer.at, k=5, n=1), 99, query)
        for byte in frame:
            client.sock.sendall(bytes([byte]))
        assert client.expect(99)[1] == expected[1]


def _send_for_ever(client: RawClient, message: wire.Message, payload: bytes) -> None:
    for number in range(100, 20_000):
        client.send(message, payload, request_id=number)


def test_a_reader_that_does_not_read(cluster: LocalCluster, address: Address, place: Place) -> None:
    # Its answers pile up to a bound, and then nothing more is taken from it.
    before = resident(cluster.pids[0])
    with RawClient(address) as client:
        offer = client.offers[0]
        query = np.repeat(place.queries[:1], 200, axis=0).astype("<f4").tobytes()
        client.sock.settimeout(1.0)
        message = wire.Knn(index=offer.index, at=offer.at, k=1_000, n=200)
        with pytest.raises(TimeoutError):
            _send_for_ever(client, message, query)
        assert resident(cluster.pids[0]) <= before + 200e6


def test_five_hundred_idle_connections(cluster: LocalCluster, address: Address) -> None:
    with contextlib.ExitStack() as stack:
        before = resident(cluster.pids[0])
        clients = [stack.enter_context(RawClient(address)) for _ in range(500)]
        assert resident(cluster.pids[0]) <= before + 500 * 100_000
        clients[-1].ask(wire.Status(), expected=wire.StatusReply)


def test_clear_text_at_a_port_with_tls(place: Place, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    options = ServeOptions(tls_cert=str(certificates.server.cert), tls_key=str(certificates.server.key), threads=1)
    file = tmp_path / "cluster.json"
    with LocalCluster(place.served, cluster_file=file, refresh_seconds=0.0, http=False, options=options) as cluster:
        entry = cluster.cluster.servers[0]
        for stream in (HELLO, b"GET / HTTP/1.1\r\n\r\n", bytes(5_000)):
            # At once, not when its patience is over.
            with socket.create_connection((entry.host, entry.port), timeout=HELLO_SECONDS / 2) as sock:
                sock.sendall(stream)
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(1 << 16):
                        pass
        with lance_dfaiss.connect(file, tls=certificates.ca.cert) as client, Load(client, place, threads=1) as load:
            load.wait_more(0.0)
    assert not load.problems(Truth(place))


def test_tls_at_a_port_with_clear_text(cluster: LocalCluster) -> None:
    context = ssl.create_default_context()
    with pytest.raises(ProtocolError):
        lance_dfaiss.connect(cluster.cluster_file, tls=context)


def test_who_does_not_say_who_they_are_is_hung_up_on(silent: list[socket.socket]) -> None:
    # They were opened before the other tests, which took some of the time that this needs.
    end = time.monotonic() + HELLO_SECONDS + 10.0
    for sock in silent:
        sock.settimeout(max(end - time.monotonic(), 0.1))
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 16):
                pass
