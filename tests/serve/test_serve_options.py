"""Every option of a server and of a client acts where it should."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import fsspec
import lance
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import lance_dfaiss
from lance_dfaiss.errors import FilterTooCostly
from lance_dfaiss.lance_io.place import DatasetPlace
from lance_dfaiss.launch.options import ServeOptions
from lance_dfaiss.serve import fleet
from lance_dfaiss.serve.answering import Workload
from lance_dfaiss.serve.cluster import ClusterFile, ServedIndex, plan_cluster, read_cluster, write_cluster
from lance_dfaiss.serve.holdings import HoldingOptions
from lance_dfaiss.serve.server import ServerConfig
from lance_dfaiss.serve.wire import Limits
from tests.serve.certificates import make_certificates
from tests.serve.inprocess import Running, Settings, listening, running
from tests.serve.scripted import ScriptedCluster
from tests.support import clustered, make_dataset

ROWS, DIM = 300, 8
GIVEN: dict[str, Any] = {
    "threads": 3,
    "memory_limit_bytes": 10**9,
    "payload": ("a",),
    "filter_columns": ("b",),
    "columns": ("c", "d"),
    "max_k": 17,
    "max_queries": 19,
    "max_waiting": 23,
    "filter_seconds": 2.5,
    "filter_bytes": 29 * 10**6,
    "grace_seconds": 31.0,
    "storage_options": {"key": "open"},
    "allowed_index_uris": ("s3://b/x",),
    "cache_dir": None,  # what they do is tested with real servers in test_serve_cache.py
    "cache_bytes": None,
}
# Files, and what is a matter of processes.
ELSEWHERE = {"tls_cert", "tls_key", "tls_client_ca", "token_file", "admin_token_file", "log_level"}


def planned() -> ClusterFile:
    served = ServedIndex(name="i", dataset="/d.lance", index="i")
    return plan_cluster([served], [("127.0.0.1", 4000, None), ("127.0.0.1", 4001, None)])


def test_every_option_reaches_the_part_that_it_is_for() -> None:
    assert {field.name for field in fields(ServeOptions)} == GIVEN.keys() | ELSEWHERE
    config = ServeOptions(**GIVEN).config(planned(), 1, "c.json")
    assert config == ServerConfig(
        cluster=planned(),
        server_id=1,
        location="c.json",
        holding=HoldingOptions(
            payload=("a",),
            filter_columns=("b",),
            columns=("c", "d"),
            ram_limit_bytes=10**9,
            grace_seconds=31.0,
            storage_options={"key": "open"},
            allowed_index_uris=("s3://b/x",),
        ),
        workload=Workload(threads=3, max_waiting=23, limits=Limits(k=17, queries=19)),
        filter_seconds=2.5,
        filter_bytes=29 * 10**6,
    )


def test_options_that_are_not_given_are_those_of_the_parts() -> None:
    # Two servers of one machine share what it has.
    config = ServeOptions(threads=1, memory_limit_bytes=1).config(planned(), 0, None)
    plain = ServerConfig(cluster=planned(), server_id=0, workload=Workload(threads=1))
    assert config == replace(plain, holding=replace(plain.holding, ram_limit_bytes=1))
    machine, half = ServeOptions().shared_by(1), ServeOptions().shared_by(2)
    assert machine.threads is not None
    assert machine.memory_limit_bytes is not None
    assert half.threads == max(machine.threads // 2, 1)
    assert half.memory_limit_bytes == pytest.approx(machine.memory_limit_bytes / 2, rel=0.05)


def test_files_with_tokens_and_certificates_reach_it_too(tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    for name, token in (("read", "r" * 20), ("admin", "a" * 20)):
        (tmp_path / name).write_text(token)
        (tmp_path / name).chmod(0o600)
    options = ServeOptions(
        token_file=str(tmp_path / "read"),
        admin_token_file=str(tmp_path / "admin"),
        tls_cert=str(made.server.cert),
        tls_key=str(made.server.key),
        tls_client_ca=str(made.ca.cert),
    )
    config = options.config(planned(), 0, None)
    assert (config.access.read_token, config.access.admin_token) == (b"r" * 20, b"a" * 20)
    assert config.access.mutual_tls
    assert config.tls is not None


# What is told to a server acts.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A dataset with an index of its own and one that lies elsewhere."""
    folder = tmp_path_factory.mktemp("place")
    words = pa.array([f"word {i}" for i in range(ROWS)])
    dataset = make_dataset(folder / "d", clustered(ROWS, DIM, 1), rows_per_fragment=100, word=words)
    lance_dfaiss.create_index(dataset, "vec", "FLAT", name="near")
    elsewhere = str(folder / "elsewhere")
    lance_dfaiss.create_index(str(folder / "d"), "vec", "FLAT", name="far", index_uri=elsewhere)
    return str(folder / "d"), elsewhere


def test_filters_have_the_time_memory_and_columns_that_the_server_was_told(
    place: tuple[str, str], tmp_path: Path
) -> None:
    served = ServedIndex(name="near", dataset=place[0], index="near")
    settings = Settings(
        own_filters=True,
        holding=HoldingOptions(filter_columns=("word",)),
        more={"filter_seconds": 0.3, "filter_bytes": 1_234_567_890},
    )
    with running(tmp_path, [served], settings=settings) as cluster:
        server = cluster.servers[0].server
        [offer] = server.holdings.offers
        costly = "levenshtein(repeat(word, 40000), repeat(word, 40001)) = 1"
        with pytest.raises(FilterTooCostly, match=r"0\.3 seconds.*one may take 0\.3 s and 1,234,567,890 bytes"):
            server._sifter.matching(f"near/{offer.at}", costly)
        assert [opened.columns for opened in server._sifter._open.values()] == [("word",)]


def test_an_index_that_lies_elsewhere_is_served_if_that_is_allowed(place: tuple[str, str], tmp_path: Path) -> None:
    served = ServedIndex(name="far", dataset=place[0], index="far")
    with running(tmp_path, [served]) as cluster:
        problem = cluster.servers[0].server.holdings.shelves["far"].problem
        assert problem is not None
        assert "outside the dataset" in problem
    settings = Settings(holding=HoldingOptions(allowed_index_uris=(place[1],)))
    with running(tmp_path, [served], settings=settings) as cluster, lance_dfaiss.connect(cluster.location) as client:
        assert client.knn(clustered(1, DIM, 2), 3)[1].shape == (1, 3)


# Storage options.


class Guarded(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store that nobody reaches without its key."""

    protocol = "guarded"
    cachable = False

    def __init__(self, key: str = "", **more: Any) -> None:
        if key != "open":
            raise PermissionError("the wrong key")
        super().__init__(**more)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).replace("guarded://", "memory://guarded/"))


KEY = {"key": "open"}
URL = "guarded://c.json"


@pytest.fixture
def guarded() -> Iterator[None]:
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    yield
    Guarded.store.clear()


@pytest.mark.usefixtures("guarded")
def test_a_client_reads_a_cluster_file_with_its_options_and_reads_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "REREAD_GAP_SECONDS", 0.01)
    monkeypatch.setattr(fleet, "REREAD_SECONDS", 0.02)

    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster:
            both = cluster.servers
            cluster.servers = both[:1]
            write_cluster(URL, cluster.file(), storage_options=KEY)
            async with await lance_dfaiss.connect_async(URL, storage_options=KEY) as client:
                assert (await client.knn(clustered(1, cluster.vectors.shape[1], 2), 3))[1].shape == (1, 3)
                cluster.servers = both
                write_cluster(URL, cluster.file(epoch=2), storage_options=KEY)
                await both[1].until(lambda: both[1].greeted == 1)

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.usefixtures("guarded")
def test_a_server_reads_and_writes_its_cluster_file_and_dataset_with_its_options(place: tuple[str, str]) -> None:
    sock = listening()
    served = ServedIndex(name="near", dataset=place[0], index="near")
    cluster = plan_cluster([served], [("127.0.0.1", sock.getsockname()[1], None)], refresh_seconds=0.0)
    write_cluster(URL, cluster, storage_options=KEY)
    config = ServerConfig(
        cluster=cluster,
        server_id=0,
        location=URL,
        holding=HoldingOptions(storage_options=KEY),
        workload=Workload(threads=1),
    )
    with (
        sock,
        Running(config, sock, own_filters=False) as server,
        lance_dfaiss.connect(URL, storage_options=KEY) as client,
    ):
        newest = server.server.holdings.shelves["near"].newest
        assert newest is not None
        options = DatasetPlace.of(newest.view.pinned).storage_options
        assert options is not None
        assert options["key"] == "open"
        version = lance.dataset(place[0]).version
        client.reload(version=version)
        assert read_cluster(URL, KEY).indexes[0].version == version
