"""Indexes on Ceph's object gateway: the S3 of a second, independent implementation. Nightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from lance_dfaiss.errors import StorageError
from lance_dfaiss.storage import FsspecStore, SessionStore, Store, check_conditional_writes
from lance_dfaiss.testing.stores import StoreContract
from tests.storage import cloudlife
from tests.storage.cloudrig import S3Rig, Session, at_rate
from tests.storage.test_s3_faults import KINDS, build, check, race, store_at

pytestmark = pytest.mark.nightly


class TestSessionOnRados(StoreContract):
    @pytest.fixture
    def store(self, rados: S3Rig, rados_bucket: str) -> Store:
        return SessionStore(Session(f"{rados_bucket}/root", storage_options=rados.options), f"{rados_bucket}/root")


class TestFsspecOnRados(StoreContract):
    @pytest.fixture
    def store(self, rados: S3Rig, rados_bucket: str) -> Store:
        pytest.importorskip("s3fs")
        return FsspecStore(f"{rados_bucket}/root", rados.options)


def test_everything_beside_the_dataset(rados: S3Rig, rados_bucket: str) -> None:
    cloudlife.live(f"{rados_bucket}/data.lance", rados.options)


def test_everything_under_an_index_uri(rados: S3Rig, rados_bucket: str, tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    cloudlife.live(str(tmp_path / "data.lance"), rados.options, f"{rados_bucket}/indexes")


def test_servers(rados: S3Rig, rados_bucket: str, tmp_path: Path) -> None:
    uri = f"{rados_bucket}/data.lance"
    cloudlife.write(uri, rados.options)
    build(uri, rados.options, num_shards=4)
    cloudlife.serve(tmp_path, uri, rados.options)


def test_a_tenth_of_requests_refused(rados: S3Rig, rados_bucket: str) -> None:
    uri = f"{rados_bucket}/data.lance"
    cloudlife.write(uri, rados.options)
    rados.proxy.fault = at_rate(0.1)
    build(uri, rados.options)
    check(uri, rados.options)
    assert rados.proxy.statuses()[503] >= 5


def test_conditional_writes_are_found_to_be_honoured(rados: S3Rig, rados_bucket: str) -> None:
    pytest.importorskip("obstore")
    check_conditional_writes(f"{rados_bucket}/data.lance/_dfaiss", rados.options)
    assert rados.proxy.statuses()[412] == 1
    assert rados.names(rados_bucket.removeprefix("s3://")) == []


@pytest.mark.parametrize("index_in_bucket", [False, True])
def test_two_builders_race(rados: S3Rig, rados_bucket: str, tmp_path: Path, index_in_bucket: bool) -> None:
    race(rados.options, rados_bucket, tmp_path, index_in_bucket=index_in_bucket)


def test_nothing_depends_on_what_this_server_gets_wrong(rados: S3Rig, rados_bucket: str) -> None:
    # Release 16 refuses every If-Match, and completes an upload in parts whatever its condition was.
    uri = f"{rados_bucket}/data.lance"
    cloudlife.write(uri, rados.options)
    build(uri, rados.options)
    build(uri, rados.options, replace=True)
    changes = [one.asked for one in rados.proxy.passed() if one.asked.method in ("PUT", "POST")]
    assert not [asked for asked in changes if "if-match" in asked.headers]
    conditional = [asked for asked in changes if "if-none-match" in asked.headers]
    assert {asked.method for asked in conditional} == {"PUT"}
    assert not [asked for asked in conditional if asked.query]


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_file_is_created_once(rados: S3Rig, rados_bucket: str, kind: str) -> None:
    content = bytes(range(256)) * (4 * 1024 * 110)  # s3fs sends parts of 50 MiB, from twice that on
    store = store_at(kind, rados_bucket, rados.options)
    with store.create("large") as path:
        path.write_bytes(content)
    assert len(rados.proxy.passed(lambda asked: "uploadId" in asked.query and asked.method == "PUT")) > 1
    assert store.read_range("large", len(content) - 1000, 1000) == content[-1000:]
    with pytest.raises(StorageError), store.create("large") as path:
        path.write_bytes(b"another")
    assert store.read_range("large", 0, 256) == content[:256]
