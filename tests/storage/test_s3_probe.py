"""Stores that take no notice of conditional writes are refused: Lance loses rows there without an error."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import lance
import pytest

import lance_dfaiss
from lance_dfaiss.errors import UnsafeStorage
from lance_dfaiss.storage import FsspecStore, check_conditional_writes
from tests.storage import cloudlife
from tests.storage.cloudrig import REFUSED, SLOW_DOWN, Asked, S3Rig, s3rver, when

pytest.importorskip("obstore")


def is_put(asked: Asked) -> bool:
    return asked.method == "PUT"


def test_a_safe_store_is_asked_once(s3: S3Rig, bucket: str) -> None:
    for folder in ("a.lance", "b.lance"):
        check_conditional_writes(f"{bucket}/{folder}/_dfaiss", s3.options)
    assert sorted(s3.proxy.statuses().elements()) == [200, 200, 412]  # created, deleted, refused
    assert s3.names(bucket.removeprefix("s3://")) == []


def test_a_store_without_conditions_is_refused(s3: S3Rig, bucket: str) -> None:
    s3.proxy.without = {"if-none-match"}
    for _ in range(2):  # it is asked again, for the server may have been replaced
        with pytest.raises(UnsafeStorage, match="loses rows") as caught:
            check_conditional_writes(f"{bucket}/a.lance/_dfaiss", s3.options)
        assert caught.value.location == f"{bucket}/a.lance/_dfaiss"
    assert s3.names(bucket.removeprefix("s3://")) == []
    s3.proxy.without = set()
    check_conditional_writes(f"{bucket}/a.lance/_dfaiss", s3.options)


def test_nothing_is_built_on_an_unsafe_store(s3: S3Rig, bucket: str) -> None:
    uri = f"{bucket}/a.lance"
    cloudlife.write(uri, s3.options)
    before = s3.names(bucket.removeprefix("s3://"))
    s3.proxy.without = {"if-none-match"}
    with pytest.raises(UnsafeStorage):
        lance_dfaiss.create_index(uri, "vec", "FLAT", storage_options=s3.options)
    assert s3.names(bucket.removeprefix("s3://")) == before


def test_nothing_is_committed_on_an_unsafe_store(s3: S3Rig, bucket: str) -> None:
    # Built while it was safe, or by a version that did not ask: a later commit is refused as well.
    uri = f"{bucket}/a.lance"
    cloudlife.write(uri, s3.options)
    s3.proxy.without = {"if-none-match"}
    handle = lance.dataset(uri, storage_options=s3.options)
    pinned = lance_dfaiss.lance_io.PinnedDataset(handle)
    with pytest.raises(UnsafeStorage):
        pinned.commit_pointer("i", None, "{}", ours="g")
    assert pinned.latest().version == pinned.version


def test_a_store_that_the_environment_names_is_asked_too(
    s3: S3Rig, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.options.items():
        monkeypatch.setenv(name.upper() if name.startswith("aws_") else f"AWS_{name.upper()}", value)
    s3.proxy.without = {"if-none-match"}
    with pytest.raises(UnsafeStorage):
        check_conditional_writes(f"{bucket}/a.lance/_dfaiss")


def test_a_lost_answer_is_no_second_writer(s3: S3Rig, bucket: str) -> None:
    s3.proxy.after = when(is_put, SLOW_DOWN, times=1)
    check_conditional_writes(f"{bucket}/a.lance/_dfaiss", s3.options)
    assert s3.proxy.statuses()[503] == 1


def test_a_store_that_gives_no_answer_is_not_refused(s3: S3Rig, bucket: str, caplog: pytest.LogCaptureFixture) -> None:
    s3.proxy.fault = when(is_put, REFUSED)
    check_conditional_writes(f"{bucket}/a.lance/_dfaiss", s3.options)
    assert caplog.text == ""  # who may not write learns it from the commit
    s3.proxy.reset()
    with caplog.at_level(logging.WARNING):
        check_conditional_writes(f"{bucket}-gone/a.lance/_dfaiss", s3.options)
    assert "could not be checked" in caplog.text
    assert "NoSuchBucket" in caplog.text


def test_without_obstore_a_warning_says_what_to_install(
    s3: S3Rig, bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    for _ in range(2):
        check_conditional_writes(f"{bucket}/a.lance/_dfaiss", s3.options)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install" in caplog.text or "Install" in caplog.text
    assert not s3.proxy.passed()


def test_other_places_are_not_asked(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", "memory://x", "s3+ddb://bucket/a.lance"):
        check_conditional_writes(url)


def test_pointers_under_an_index_uri(s3: S3Rig, bucket: str) -> None:
    pytest.importorskip("s3fs")
    s3.proxy.without = {"if-none-match"}
    unsafe = FsspecStore(f"{bucket}/indexes", s3.options)
    with pytest.raises(UnsafeStorage):
        unsafe.check_conditional_writes()
    s3.proxy.without = set()
    unsafe.check_conditional_writes()
    s3.proxy.reset()
    unsafe.check_conditional_writes()
    assert not s3.proxy.passed()
    assert s3.names(bucket.removeprefix("s3://")) == []


@pytest.mark.nightly
def test_a_real_server_without_conditions(tmp_path: Path) -> None:
    with s3rver(tmp_path / "s3") as rig:
        uri = f"{rig.bucket('bucket')}/a.lance"
        cloudlife.write(uri, rig.options)
        with pytest.raises(UnsafeStorage):
            lance_dfaiss.create_index(uri, "vec", "FLAT", storage_options=rig.options)
