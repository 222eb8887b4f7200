"""What a user sees when something is wrong with servers, files, tokens or certificates: real processes.

Each time: an error of a type of ours where it can be acted upon, a line in the server's log, and a server that is
there for everybody else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lance_dfaiss
from lance_dfaiss.errors import (
    AccessDenied,
    CannotServe,
    ClusterFileInvalid,
    CorruptIndex,
    DfaissError,
    InvalidArgument,
    ProtocolError,
    Unavailable,
)
from lance_dfaiss.launch import LocalCluster, ServeOptions
from lance_dfaiss.serve import wire
from lance_dfaiss.serve.client import Client
from lance_dfaiss.serve.security import client_tls
from tests.serve.certificates import make_certificates
from tests.serve.chaos import LISTS, NAME, K, Load, Place, Truth
from tests.serve.rawclient import RawClient
from tests.waiting import until

TOKEN = "a token that is long enough"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, rows=1_000, shards=2)


class Logged(list[str]):
    """What servers write."""

    def wait_for(self, pattern: str) -> None:
        """Wait until a line matches."""
        until(lambda: any(re.search(pattern, line) for line in list(self)))


@contextmanager
def serving(
    place: Place, folder: Path, options: ServeOptions | None = None, **layout: float
) -> Iterator[tuple[LocalCluster, Logged]]:
    said = Logged()
    more = {"refresh_seconds": 0.0, **layout}
    with LocalCluster(
        place.served, cluster_file=folder / "cluster.json", http=False, options=options or ServeOptions(threads=1),
        write_line=said.append, **more,  # type: ignore[arg-type]
    ) as cluster:  # fmt: skip
        yield cluster, said


def assert_serves(client: Client, place: Place) -> None:
    with Load(client, place, threads=1) as load:
        load.wait_more(0.0)
    assert not load.problems(Truth(place))


def test_who_has_no_right_to_ask(place: Place, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    (tmp_path / "token").write_text(TOKEN, encoding="ascii")
    (tmp_path / "token").chmod(0o600)
    options = ServeOptions(
        threads=1,
        tls_cert=str(certificates.server.cert),
        tls_key=str(certificates.server.key),
        tls_client_ca=str(certificates.ca.cert),
        token_file=str(tmp_path / "token"),
    )
    with serving(place, tmp_path, options) as (cluster, said):
        file = cluster.cluster_file
        good, expired = (
            client_tls(certificates.ca.cert, identity.cert, identity.key)
            for identity in (certificates.client, certificates.expired_client)
        )
        with pytest.raises(AccessDenied, match="wrong token"):
            lance_dfaiss.connect(file, token=TOKEN + "!", tls=good)
        said.wait_for("refused: wrong token")
        with pytest.raises(AccessDenied, match=r"(?i)expired"):
            lance_dfaiss.connect(file, token=TOKEN, tls=expired)
        said.wait_for("handshake failed: .*expired")
        with pytest.raises(AccessDenied, match=r"(?i)certificate.required|refused the TLS"):
            lance_dfaiss.connect(file, token=TOKEN, tls=certificates.ca.cert)
        with lance_dfaiss.connect(file, token=TOKEN, tls=good) as client:
            assert_serves(client, place)
        assert not any(TOKEN in line for line in said)


def test_a_server_with_an_expired_certificate(place: Place, tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    options = ServeOptions(threads=1, tls_cert=str(made.expired_server.cert), tls_key=str(made.expired_server.key))
    with serving(place, tmp_path, options) as (cluster, said):
        with pytest.raises(AccessDenied, match="certificate has expired"):
            lance_dfaiss.connect(cluster.cluster_file, tls=made.ca.cert)
        # Clients hang up without saying why, so the server says it when it starts.
        said.wait_for("no client will trust the certificate .*: certificate has expired")


def test_another_protocol_and_wrong_cluster_files(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path) as (cluster, said):
        entry = cluster.cluster.servers[0]
        with RawClient((entry.host, entry.port), hello=False) as raw:
            raw.send(wire.Hello(protocol=wire.PROTOCOL + 1), request_id=0)
            refused = raw.wait_for_end()
        assert isinstance(refused, ProtocolError)
        assert str(wire.PROTOCOL + 1) in str(refused)
        said.wait_for(f"protocol version {wire.PROTOCOL + 1}")

        with lance_dfaiss.connect(cluster.cluster_file) as client:
            content = Path(cluster.cluster_file).read_text()
            half = tmp_path / "half.json"
            half.write_text(content[: len(content) // 2])
            for wrong, reason in ((tmp_path / "none.json", "no such file"), (half, "JSON")):
                with pytest.raises(ClusterFileInvalid, match=reason):
                    lance_dfaiss.connect(wrong)
            # Under the servers' and a client's eyes: they keep what they had.
            Path(cluster.cluster_file).write_text(content[: len(content) // 2])
            cluster.reload()
            said.wait_for("the cluster file stays as it was")
            assert_serves(client, place)
            os.unlink(cluster.cluster_file)
            cluster.reload()
            said.wait_for("stays as it was.*no such file")
            assert_serves(client, place)
            Path(cluster.cluster_file).write_text(content)

        # Stale: it names addresses at which there is nobody, or another server.
        facts = json.loads(content)
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            facts["servers"][0]["port"] = nobody.getsockname()[1]
        stale = tmp_path / "stale.json"
        stale.write_text(json.dumps(facts))
        with pytest.raises(Unavailable, match=r"(?i)refused"):
            lance_dfaiss.connect(stale, timeout=1.0)
        facts["servers"][0].update(id=5, port=entry.port)
        facts.pop("next_id", None)
        stale.write_text(json.dumps(facts))
        with pytest.raises(Unavailable, match="says that it is server 0"):
            lance_dfaiss.connect(stale, timeout=1.0)


def test_a_port_that_is_taken(place: Place, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CannotServe, match=rf"{port}.* is taken"):
            LocalCluster(place.served, cluster_file=tmp_path / "cluster.json", port=port).start()
    assert not (tmp_path / "cluster.json").exists()


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _shards(place: Place) -> list[Path]:
    return sorted(Path(place.uri).rglob("*.faiss"))


def test_a_shard_that_is_corrupt(place: Place, tmp_path: Path) -> None:
    with (
        serving(place, tmp_path, servers=2, replicas=2, refresh_seconds=1.0) as (cluster, said),
        lance_dfaiss.connect(cluster.cluster_file) as client,
    ):
        # Found when a server starts anew: that one refuses, and the other one serves.
        old = _shards(place)
        _flip(old[0])
        os.kill(cluster.pids[0], signal.SIGKILL)
        said.wait_for(r"(?i)corrupt|digest|checksum")
        assert_serves(client, place)
        until(lambda: client.status()[0].get("reason"))
        status = client.status()
        assert not status[0]["ready"]
        assert old[0].name in status[0]["reason"]
        assert status[1]["ready"]
        # Mended, the server takes part again by itself.
        _flip(old[0])
        assert cluster.wait_ready(30)
        until(lambda: sum(map(len, client.stats().servers_by_group)) == 2)
        assert_serves(client, place)


def test_a_new_shard_that_is_corrupt(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path) as (cluster, said), lance_dfaiss.connect(cluster.cluster_file) as client:
        before = client.stats().version
        old = set(_shards(place))
        place.append()
        lance_dfaiss.update_index(place.uri, NAME)
        (new,) = set(_shards(place)) - old
        _flip(new)
        with pytest.raises(CorruptIndex, match=re.escape(new.name)):
            client.reload()
        said.wait_for("cannot be moved")
        assert client.stats().version == before
        assert_serves(client, place)
        _flip(new)
        client.reload()
        assert client.stats().version > before
        assert_serves(client, place)


def test_a_dataset_that_is_gone(place: Place, tmp_path: Path) -> None:
    with serving(place, tmp_path) as (cluster, said), lance_dfaiss.connect(cluster.cluster_file) as client:
        version = client.stats().version
        away = Path(place.uri).rename(tmp_path / "away")
        with pytest.raises(InvalidArgument, match="not found"):
            client.reload()
        said.wait_for("cannot be moved")
        with pytest.raises(DfaissError):
            client.search(place.queries[0], K, nprobe=LISTS, columns=["word"])
        # What is in RAM is searched on.
        assert client.knn(place.queries[0], K, nprobe=LISTS).version == version
        assert cluster.states[0].value == "ready"
        away.rename(place.uri)
        assert_serves(client, place)
    shutil.rmtree(place.uri)
    with pytest.raises(CannotServe, match=r"(?i)dataset"):
        LocalCluster(place.served, cluster_file=tmp_path / "other.json").start()
