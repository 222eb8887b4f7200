"""Overloaded stores, lost answers, closed and deleted buckets, two builders at once: on S3, through a proxy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss.errors import ClusterFileInvalid, CommitConflict, IndexNotFound, ReadOnlyStorage, StorageError
from lance_dfaiss.progress import ProgressEvent
from lance_dfaiss.serve.cluster import (
    ServedIndex,
    existing_cluster,
    note_versions,
    plan_cluster,
    read_cluster,
    write_cluster,
)
from lance_dfaiss.storage import FsspecStore, SessionStore, Store
from tests.storage import cloudlife
from tests.storage.cloudrig import REFUSED, SLOW_DOWN, Asked, S3Rig, Session, at_rate, when
from tests.support import Exact, assert_exact

KINDS = ("session", "fsspec")


def store_at(kind: str, bucket: str, options: dict[str, str]) -> Store:
    if kind == "session":
        return SessionStore(Session(f"{bucket}/root", storage_options=options), f"{bucket}/root")
    pytest.importorskip("s3fs")
    return FsspecStore(f"{bucket}/root", options)


def is_listing(asked: Asked) -> bool:
    return asked.is_listing


def is_range(asked: Asked) -> bool:
    return asked.method == "GET" and "range" in asked.headers


class After:
    """Does something when a build has finished a phase."""

    def __init__(self, phase: str, action: Callable[[], object]) -> None:
        self._phase, self._action = phase, action

    def update(self, event: ProgressEvent) -> None:
        """Take a report."""

    def finish(self, phase: str) -> None:
        if phase == self._phase:
            self._action()


def build(uri: str, options: dict[str, str], **more: Any) -> None:
    wanted = {"num_partitions": 6, "sample_rate": 64, "num_shards": 2, **more}
    lance_dfaiss.create_index(uri, "vec", "IVF_FLAT", storage_options=options, **wanted)


def check(uri: str, options: dict[str, str], **more: Any) -> None:
    handle = lance.dataset(uri, storage_options=options)
    index = lance_dfaiss.open_index(uri, storage_options=options, **more)
    answer = index.knn(cloudlife.QUERIES, k=10, nprobe=6)
    assert_exact(Exact(handle, "l2"), cloudlife.QUERIES, *answer, scale=100.0)


def test_a_tenth_of_requests_refused(s3: S3Rig, bucket: str) -> None:
    uri = f"{bucket}/data.lance"
    cloudlife.write(uri, s3.options)
    s3.proxy.fault = at_rate(0.1)
    build(uri, s3.options)
    check(uri, s3.options)
    assert lance_dfaiss.verify_index(uri, storage_options=s3.options) == []
    assert s3.proxy.statuses()[503] >= 5
    s3.proxy.reset()
    check(uri, s3.options)


def test_a_cluster_file_with_the_options_of_the_dataset(s3: S3Rig, bucket: str) -> None:
    pytest.importorskip("s3fs")
    location = f"{bucket}/cluster.json"
    index = ServedIndex(name="vec_idx", dataset=f"{bucket}/data.lance", index="vec_idx")
    assert existing_cluster(location, s3.options) is None
    s3.proxy.fault = when(lambda asked: asked.method == "PUT", times=1)
    write_cluster(location, plan_cluster([index], [("127.0.0.1", 4000, None)]), storage_options=s3.options)
    s3.proxy.fault = when(lambda asked: asked.method == "GET", times=1)
    note_versions(location, {"vec_idx": 3}, s3.options)
    assert read_cluster(location, s3.options).versions == {"vec_idx": 3}
    with pytest.raises(ClusterFileInvalid, match="no such file"):
        read_cluster(f"{bucket}/other.json", s3.options)


@pytest.mark.nightly  # botocore takes its time between repetitions
def test_a_tenth_of_requests_refused_under_an_index_uri(s3: S3Rig, bucket: str, tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    uri, place = str(tmp_path / "data.lance"), f"{bucket}/indexes"
    cloudlife.write(uri, {})
    s3.proxy.fault = at_rate(0.1)
    build(uri, s3.options, index_uri=place)
    check(uri, s3.options, index_uri=place)
    assert s3.proxy.statuses()[503] >= 5


@pytest.fixture
def impatient(s3: S3Rig, bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that asks once: only of failures that get past all repetitions is there something to see."""
    monkeypatch.setattr("lance_dfaiss.storage.retries._PATIENCE_SECONDS", 0.0)
    options: dict[str, Any] = {**s3.options, "client_max_retries": "0"}
    if kind == "fsspec":
        monkeypatch.setattr(pytest.importorskip("s3fs").S3FileSystem, "retries", 1)
        options["config_kwargs"] = {"retries": {"max_attempts": 1}, "s3": {"addressing_style": "path"}}
    return store_at(kind, bucket, options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_throttled_range_is_repeated(s3: S3Rig, bucket: str, kind: str) -> None:
    store = store_at(kind, bucket, s3.options)
    store.write("g/a", bytes(range(256)))
    s3.proxy.fault = when(is_range, times=2)
    assert store.read_range("g/a", 100, 50) == bytes(range(100, 150))
    assert s3.proxy.statuses()[503] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_throttled_range_is_no_short_file(s3: S3Rig, impatient: Store) -> None:
    impatient.write("g/a", bytes(range(256)))
    s3.proxy.fault = when(is_range)
    with pytest.raises(StorageError) as caught:
        impatient.read_range("g/a", 100, 50)
    assert type(caught.value) is StorageError


@pytest.mark.parametrize("kind", KINDS)
def test_a_throttled_listing_is_never_empty(s3: S3Rig, impatient: Store) -> None:
    store = impatient
    store.write("g/a", b"a")
    assert [file.name for file in store.list("g")] == ["g/a"]
    s3.proxy.fault = when(is_listing)
    with pytest.raises(StorageError):
        store.list("g")
    s3.proxy.fault = when(is_listing, REFUSED)
    with pytest.raises(StorageError):
        store.list("")


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_bucket_is_no_empty_folder(s3: S3Rig, bucket: str, kind: str) -> None:
    store = store_at(kind, bucket, s3.options)
    s3.drop(bucket.removeprefix("s3://"))
    with pytest.raises(StorageError):
        store.list("g")
    with pytest.raises(StorageError, match=r"Check that the bucket|cannot be written"):
        store.write("g/a", b"a")


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_whose_answer_was_lost(s3: S3Rig, bucket: str, kind: str) -> None:
    store = store_at(kind, bucket, s3.options)
    s3.proxy.after = when(lambda asked: asked.method == "PUT", SLOW_DOWN, times=1)
    store.write("g/a", b"a")
    assert s3.proxy.statuses()[503] == 1
    assert store.read("g/a", max_bytes=1) == b"a"
    with pytest.raises(StorageError):
        store.write("g/a", b"b")


def test_a_commit_whose_answer_was_lost(s3: S3Rig, bucket: str) -> None:
    uri = f"{bucket}/data.lance"
    cloudlife.write(uri, s3.options)
    s3.proxy.after = when(lambda asked: asked.method == "PUT" and "/_versions/" in asked.path, SLOW_DOWN, times=1)
    build(uri, s3.options)
    assert s3.proxy.statuses()[503] == 1
    check(uri, s3.options)


def test_no_permission_to_write(s3: S3Rig, bucket: str) -> None:
    uri = f"{bucket}/data.lance"
    cloudlife.write(uri, s3.options)
    s3.proxy.fault = when(lambda asked: asked.method in ("PUT", "POST"), REFUSED)
    with pytest.raises(ReadOnlyStorage, match="index_uri"):
        build(uri, s3.options)
    assert not s3.proxy.passed(lambda asked: asked.method == "GET" and "/data/" in asked.path), "it had begun to read"


def test_permission_lost_in_mid_build(s3: S3Rig, bucket: str) -> None:
    uri = f"{bucket}/data.lance"
    cloudlife.write(uri, s3.options)
    fault = when(lambda asked: asked.method == "PUT", REFUSED)
    with pytest.raises(ReadOnlyStorage):
        build(uri, s3.options, progress=After("train", lambda: setattr(s3.proxy, "fault", fault)))
    s3.proxy.reset()
    with pytest.raises(IndexNotFound):
        lance_dfaiss.open_index(uri, storage_options=s3.options)
    build(uri, s3.options, resume=True)
    check(uri, s3.options)


def test_bucket_gone_in_mid_build(s3: S3Rig, bucket: str) -> None:
    uri = f"{bucket}/data.lance"
    cloudlife.write(uri, s3.options)
    with pytest.raises(StorageError, match=r"Not found|bucket"):
        build(uri, s3.options, progress=After("train", lambda: s3.drop(bucket.removeprefix("s3://"))))


@pytest.mark.parametrize("index_in_bucket", [False, True])
def test_two_builders_race(s3: S3Rig, bucket: str, tmp_path: Path, index_in_bucket: bool) -> None:
    if index_in_bucket:
        pytest.importorskip("s3fs")
    race(s3.options, bucket, tmp_path, index_in_bucket=index_in_bucket)


def race(options: dict[str, str], bucket: str, tmp_path: Path, *, index_in_bucket: bool) -> None:
    """Let two builders commit at one moment: one wins, and the other is told who."""
    more: dict[str, Any] = {}
    uri = f"{bucket}/data.lance"
    if index_in_bucket:
        uri, more = str(tmp_path / "data.lance"), {"index_uri": f"{bucket}/indexes"}
    cloudlife.write(uri, options)
    together = threading.Barrier(2)

    def one() -> BaseException | None:
        try:
            build(uri, options, progress=After("check", lambda: together.wait(60)), **more)
        except CommitConflict as conflict:
            return conflict
        return None

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: one(), range(2))
    (conflict,) = [lost for lost in (first, second) if lost is not None]
    assert isinstance(conflict, CommitConflict)
    assert conflict.theirs == lance_dfaiss.describe_index(uri, storage_options=options, **more).manifest.generation
    assert lance_dfaiss.verify_index(uri, storage_options=options, **more) == []
    check(uri, options, **more)


def test_pointers_of_a_dataset_that_cannot_be_written(s3: S3Rig, bucket: str) -> None:
    pytest.importorskip("s3fs")
    uri, place = f"{bucket}/data.lance", f"{s3.bucket(bucket.removeprefix('s3://') + '-other')}/indexes"
    cloudlife.write(uri, s3.options)
    key = f"/{bucket.removeprefix('s3://')}/"
    s3.proxy.fault = when(lambda asked: asked.method == "PUT" and asked.path.startswith(key), REFUSED)
    # The answer to the pointer's own write is lost as well.
    s3.proxy.after = when(lambda asked: asked.method == "PUT" and "/pointers/" in asked.path, SLOW_DOWN, times=1)
    build(uri, s3.options, index_uri=place)
    assert s3.proxy.statuses()[503] == 1
    check(uri, s3.options, index_uri=place)
    build(uri, s3.options, index_uri=place, replace=True)
    lance_dfaiss.drop_index(uri, "vec_idx", index_uri=place, storage_options=s3.options)
    with pytest.raises(IndexNotFound):
        lance_dfaiss.open_index(uri, index_uri=place, storage_options=s3.options)


@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_flight_are_many_and_bounded(s3: S3Rig, bucket: str, kind: str) -> None:
    store = store_at(kind, bucket, s3.options)
    store.write("g/a", bytes(100))
    s3.proxy.slow = threading.Event()
    with ThreadPoolExecutor(80) as pool:
        done = [pool.submit(store.read_range, "g/a", 0, 100) for _ in range(80)]
        while s3.proxy.most_at_once < 64 and not any(each.done() for each in done):
            threading.Event().wait(0.01)
        s3.proxy.slow.set()
        assert all(each.result() == bytes(100) for each in done)
    assert s3.proxy.most_at_once == 64
