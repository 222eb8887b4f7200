"""Pointers in the dataset and under ``index_uri``: which one counts, and where a replacement goes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lance
import pytest

from lance_dfaiss import create_index, describe_index, drop_index, list_indices, open_index
from lance_dfaiss.errors import CommitConflict, InvalidArgument, UntrustedLocation
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.pointers import absolute_location, find_pointer, publish
from tests.build import datasets
from tests.build.processes import Nursery

NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def shared() -> Iterator[Path]:
    """Give a folder that another user may look into, with ``elsewhere`` for it to write."""
    folder = Path(tempfile.mkdtemp(prefix="lance-dfaiss-pointers-"))
    folder.chmod(0o755)
    (folder / "elsewhere").mkdir()
    os.chown(folder / "elsewhere", NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


@as_root
def test_index_of_a_dataset_that_became_read_only(nursery: Nursery, shared: Path, tmp_path: Path) -> None:
    dataset = datasets.write(shared / "dataset")
    elsewhere = str(shared / "elsewhere")
    create_index(dataset, "vector", "FLAT", "idx")
    first = find_pointer(PinnedDataset(dataset), "idx")
    assert first.origin == "metadata"
    build: dict[str, Any] = {
        "user": NOBODY, "dataset": dataset.uri, "index_uri": elsewhere, "index_type": "FLAT", "name": "idx",
        "replace": True,
    }  # fmt: skip
    for _ in range(2):
        assert (outcome := nursery.run("build", tmp_path, **build)).error == "", outcome.trace
    second = find_pointer(PinnedDataset(dataset), "idx", elsewhere)
    assert (second.origin, find_pointer(PinnedDataset(dataset), "idx")) == ("file", first)

    # Who may write the dataset replaces the file all the same.
    create_index(dataset, "vector", "FLAT", "idx", index_uri=elsewhere, replace=True)
    third = find_pointer(PinnedDataset(dataset), "idx", elsewhere)
    assert (third.origin, third.pointer.previous) == ("file", second.pointer.generation)
    drop_index(dataset, "idx", index_uri=elsewhere)
    assert (list_indices(dataset, index_uri=elsewhere), list_indices(dataset)) == ([], ["idx"])
    create_index(dataset, "vector", "FLAT", "idx", index_uri=elsewhere)
    assert list_indices(dataset, index_uri=elsewhere) == ["idx"]


@as_root
def test_drop_of_a_metadata_pointer_without_rights(nursery: Nursery, shared: Path, tmp_path: Path) -> None:
    dataset = datasets.write(shared / "dataset")
    create_index(dataset, "vector", "FLAT", "idx")
    where: dict[str, Any] = {"user": NOBODY, "dataset": dataset.uri, "index_uri": str(shared / "elsewhere")}
    assert (outcome := nursery.run("drop", tmp_path, name="idx", **where)).error == "", outcome.trace
    assert nursery.run("list", tmp_path, **where).result == []
    assert list_indices(dataset.uri) == ["idx"]


@as_root
def test_read_only_datasets_share_an_index_uri(nursery: Nursery, shared: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        path = str(datasets.write(shared / name).uri)
        where: dict[str, Any] = {"user": NOBODY, "dataset": path, "index_uri": str(shared / "elsewhere")}
        outcome = nursery.run("build", tmp_path, index_type="FLAT", name="idx", **where)
        assert outcome.error == "", outcome.trace
        assert describe_index(path, index_uri=str(shared / "elsewhere")).pointer.root == path


def test_a_metadata_pointer_that_moved_is_a_conflict(tmp_path: Path) -> None:
    dataset, elsewhere = datasets.write(tmp_path / "d"), str(tmp_path / "elsewhere")
    create_index(dataset, "vector", "FLAT", "idx", index_uri=elsewhere)
    found = find_pointer(PinnedDataset(dataset), "idx", elsewhere)
    assert found.origin == "metadata"
    create_index(dataset, "vector", "FLAT", "idx", index_uri=elsewhere, replace=True)
    for previous in (found, None):
        with pytest.raises(CommitConflict):
            publish(PinnedDataset(dataset), "idx", found.pointer, previous=previous, index_uri=elsewhere)


def test_a_relative_place_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.write(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    create_index(dataset, "vector", "FLAT", "idx", index_uri="elsewhere")
    assert describe_index(dataset, index_uri="elsewhere").pointer.where == str(tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    for uri in (str(tmp_path / "elsewhere"), f"file://{tmp_path}/elsewhere", f"{tmp_path}/d/../elsewhere/"):
        assert len(open_index(dataset, index_uri=uri)) == 1200
        assert len(open_index(dataset, allowed_index_uris=[uri])) == 1200
    with pytest.raises(UntrustedLocation):
        open_index(dataset, allowed_index_uris=["elsewhere"])


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/x", "s3://secret@bucket/x", "abfss://c:secret@account/x"])
def test_credentials_in_a_place_are_refused(tmp_path: Path, uri: str) -> None:
    dataset: lance.LanceDataset = datasets.write(tmp_path / "d", datasets.vectors(20))
    with pytest.raises(InvalidArgument, match="storage_options") as caught:
        create_index(dataset, "vector", "FLAT", index_uri=uri)
    assert "secret" not in str(caught.value)
    assert "secret" not in str(caught.value.value)
    assert dataset.version == 1


@pytest.mark.parametrize("uri", ["s3://bucket/x", "abfss://container@account.dfs.core.windows.net/x"])
def test_urls_stay(uri: str) -> None:
    assert absolute_location(uri) == absolute_location(uri + "/") == uri
