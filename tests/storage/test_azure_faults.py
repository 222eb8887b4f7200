"""Overload, lost answers and lost permissions on Azure, whose libraries have words and pauses of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lance_dfaiss.errors import ReadOnlyStorage, StorageError
from lance_dfaiss.storage import FsspecStore, SessionStore, Store
from tests.storage import cloudlife
from tests.storage.cloudrig import BUSY, REFUSED, Asked, AzureRig, Session, at_rate, when
from tests.storage.test_s3_faults import KINDS, After, build, check, race

CONTENT = bytes(range(256)) * 16


@pytest.fixture(autouse=True)
def _no_pauses_of_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Azure's SDK waits for 15, 18 and 24 seconds between its attempts; that it makes them is not to be shown here.
    policies = pytest.importorskip("azure.storage.blob.aio")
    monkeypatch.setattr(policies.ExponentialRetry, "get_backoff_time", lambda *_: 0.01)


def store_at(kind: str, container: str, options: dict[str, str], *, attempts: int | None = None) -> Store:
    if kind == "session":
        more = {} if attempts is None else {"client_max_retries": str(attempts - 1)}
        return SessionStore(Session(f"{container}/root", storage_options={**options, **more}), f"{container}/root")
    pytest.importorskip("adlfs")
    return FsspecStore(f"{container}/root", options)


def is_listing(asked: Asked) -> bool:
    return asked.is_listing


def is_range(asked: Asked) -> bool:
    return asked.method == "GET" and bool({"range", "x-ms-range"} & set(asked.headers))


def test_a_tenth_of_requests_refused(azure: AzureRig, container: str) -> None:
    uri = f"{container}/data.lance"
    cloudlife.write(uri, azure.options)
    azure.proxy.fault = at_rate(0.1, BUSY)
    build(uri, azure.options)
    check(uri, azure.options)
    assert azure.proxy.statuses()[503] >= 5
    azure.proxy.reset()
    check(uri, azure.options)


def test_a_tenth_of_requests_refused_under_an_index_uri(azure: AzureRig, container: str, tmp_path: Path) -> None:
    pytest.importorskip("adlfs")
    uri, place = str(tmp_path / "data.lance"), f"{container}/indexes"
    cloudlife.write(uri, {})
    azure.proxy.fault = at_rate(0.1, BUSY)
    build(uri, azure.options, index_uri=place)
    check(uri, azure.options, index_uri=place, allowed_index_uris=[place])
    assert azure.proxy.statuses()[503] >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_throttled_listing_is_never_empty(
    azure: AzureRig, container: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only of the failures that get past all repetitions is there something to see: there are fewer of them here.
    monkeypatch.setattr("lance_dfaiss.storage.retries._PATIENCE_SECONDS", 0.0)
    store = store_at(kind, container, azure.options, attempts=1)
    store.write("g/a", b"a")
    azure.proxy.fault = when(is_listing, BUSY)
    with pytest.raises(StorageError):
        store.list("g")
    azure.proxy.fault = when(is_listing, REFUSED)
    with pytest.raises(StorageError):
        store.list("")
    azure.proxy.fault = when(is_listing, BUSY, times=1)
    store = store_at(kind, container, azure.options)
    assert [file.name for file in store.list("g")] == ["g/a"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_throttled_range_is_no_short_file(
    azure: AzureRig, container: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_at(kind, container, azure.options)
    store.write("g/a", CONTENT)
    azure.proxy.fault = when(is_range, BUSY, times=2)
    assert store.read_range("g/a", 100, 300) == CONTENT[100:400]
    assert azure.proxy.statuses()[503] == 2
    monkeypatch.setattr("lance_dfaiss.storage.retries._PATIENCE_SECONDS", 0.0)
    store = store_at(kind, container, azure.options, attempts=1)
    azure.proxy.fault = when(is_range, BUSY)
    with pytest.raises(StorageError) as caught:
        store.read_range("g/a", 100, 300)
    assert type(caught.value) is StorageError


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_whose_answer_was_lost(azure: AzureRig, container: str, kind: str) -> None:
    store = store_at(kind, container, azure.options)
    azure.proxy.after = when(lambda asked: asked.method == "PUT", BUSY, times=1)
    store.write("g/a", b"a")
    assert azure.proxy.statuses()[503] == 1
    assert store.read("g/a", max_bytes=1) == b"a"
    with pytest.raises(StorageError):
        store.write("g/a", b"b")


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # of adlfs, to itself
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_file_goes_up_in_blocks(azure: AzureRig, container: str, kind: str) -> None:
    size = 12 if kind == "session" else 66  # Lance begins at 5 MiB, the SDK at 64
    content = bytes(range(256)) * (4 * 1024 * size)
    store = store_at(kind, container, azure.options)
    with store.create("large") as path:
        path.write_bytes(content)
    assert len(azure.proxy.passed(lambda asked: "comp=block&" in f"{asked.query}&")) > 1
    assert store.read_range("large", len(content) - 1000, 1000) == content[-1000:]


@pytest.mark.nightly
def test_permission_lost_in_mid_build(azure: AzureRig, container: str) -> None:
    uri = f"{container}/data.lance"
    cloudlife.write(uri, azure.options)
    fault = when(lambda asked: asked.method == "PUT", REFUSED)
    with pytest.raises(ReadOnlyStorage):
        build(uri, azure.options, progress=After("train", lambda: setattr(azure.proxy, "fault", fault)))
    azure.proxy.reset()
    build(uri, azure.options, resume=True)
    check(uri, azure.options)


@pytest.mark.nightly
@pytest.mark.parametrize("index_in_container", [False, True])
def test_two_builders_race(azure: AzureRig, container: str, tmp_path: Path, index_in_container: bool) -> None:
    if index_in_container:
        pytest.importorskip("adlfs")
    race(azure.options, container, tmp_path, index_in_bucket=index_in_container)
