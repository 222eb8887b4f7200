"""Indexes on S3: beside a dataset that lies there, and through fsspec."""

from __future__ import annotations

from pathlib import Path

import lance
import pytest

import lance_dfaiss
from lance_dfaiss.errors import MissingFile
from lance_dfaiss.storage import FsspecStore, SessionStore, Store
from lance_dfaiss.testing.stores import StoreContract
from tests.storage import cloudlife
from tests.storage.cloudrig import Asked, S3Rig, Session, when
from tests.storage.test_s3_faults import KINDS, store_at


def is_part(asked: Asked) -> bool:
    return asked.method == "PUT" and "uploadId" in asked.query


class TestSessionOnS3(StoreContract):
    @pytest.fixture
    def store(self, s3: S3Rig, bucket: str) -> Store:
        return SessionStore(Session(f"{bucket}/root", storage_options=s3.options), f"{bucket}/root")


class TestFsspecOnS3(StoreContract):
    @pytest.fixture
    def store(self, s3: S3Rig, bucket: str) -> Store:
        pytest.importorskip("s3fs")
        return FsspecStore(f"{bucket}/root", s3.options)


def test_everything_beside_the_dataset(s3: S3Rig, bucket: str) -> None:
    cloudlife.live(f"{bucket}/data.lance", s3.options)


def test_everything_under_an_index_uri(s3: S3Rig, bucket: str, tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    cloudlife.live(str(tmp_path / "data.lance"), s3.options, f"{bucket}/indexes")


@pytest.mark.nightly
def test_everything_in_another_bucket(s3: S3Rig, bucket: str) -> None:
    pytest.importorskip("s3fs")
    other = s3.bucket(f"{bucket.removeprefix('s3://')}-other")
    cloudlife.live(f"{bucket}/data.lance", s3.options, f"{other}/indexes")


def test_servers(s3: S3Rig, bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/data.lance"
    cloudlife.write(uri, s3.options)
    lance_dfaiss.create_index(
        uri, "vec", "IVF_FLAT", num_partitions=6, sample_rate=64, num_shards=4, storage_options=s3.options
    )
    cloudlife.serve(tmp_path, uri, s3.options)


@pytest.mark.nightly
def test_branches_clones_and_the_plug_in(s3: S3Rig, bucket: str) -> None:
    # All with handles: what they were opened with is what everything else is reached with.
    main = cloudlife.write(f"{bucket}/data.lance", s3.options)
    lance_dfaiss.create_index(main, "vec", "FLAT")
    branch = main.create_branch("other")
    branch.insert(cloudlife.table_of(50, 9, 5_000))
    lance_dfaiss.create_index(branch, "vec", "FLAT", name="of_branch")
    assert max(lance_dfaiss.open_index(branch, "of_branch").search([0.0] * 8, k=2_450)["id"].to_pylist()) == 5_049

    main.shallow_clone(f"{bucket}/clone.lance", main.version, storage_options=s3.options)
    clone = lance.dataset(f"{bucket}/clone.lance", storage_options=s3.options)
    with pytest.raises(MissingFile, match="adopt_index"):
        lance_dfaiss.open_index(clone)
    lance_dfaiss.adopt_index(clone, allowed_index_uris=[f"{bucket}/data.lance"])
    mine, theirs = lance_dfaiss.open_index(clone), lance_dfaiss.open_index(main)
    expected = theirs.search([0.0] * 8, k=60, columns=["id"])["id"].to_pylist()
    assert mine.search([0.0] * 8, k=60, columns=["id"])["id"].to_pylist() == expected

    plugged = lance_dfaiss.dataset(f"{bucket}/data.lance", storage_options=s3.options)
    table = plugged.to_table(nearest={"column": "vec", "q": [0.0] * 8, "k": 60}, columns=["id"])
    assert table["id"].to_pylist() == expected


def test_environment_credentials(s3: S3Rig, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    for name, value in s3.options.items():
        monkeypatch.setenv(name.upper(), value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.proxy.url)  # botocore's name for it
    uri = str(tmp_path / "data.lance")
    cloudlife.write(uri, {})
    lance_dfaiss.create_index(uri, "vec", "FLAT", index_uri=f"{bucket}/indexes")
    assert len(lance_dfaiss.open_index(uri, index_uri=f"{bucket}/indexes").search([0.0] * 8, k=3)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_large_files_are_uploaded_in_parts(s3: S3Rig, bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 4 * 11 * 1024  # beyond Lance's 5 MiB
    if kind == "fsspec":  # which takes 50 MiB for a part
        monkeypatch.setattr(pytest.importorskip("s3fs.core"), "calculate_chunksize", lambda *_, **__: 5 * 1024**2)
    store = store_at(kind, bucket, s3.options)
    # One of the parts is turned down, and it alone goes up again.
    s3.proxy.fault = when(is_part, times=1)
    with store.create("large") as path:
        path.write_bytes(content)
    parts = s3.proxy.passed(is_part)
    assert sum(one.sent_bytes for one in parts if one.status == 200) == len(content)
    assert sorted(one.status for one in parts) == [200, 200, 200, 503]
    assert store.read_range("large", len(content) - 1000, 1000) == content[-1000:]
