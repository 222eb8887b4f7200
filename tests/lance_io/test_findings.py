"""Datasets of unusual make: packed structs, the legacy format, empty lists, files that are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from lance_dfaiss import create_index, open_index
from lance_dfaiss.errors import (
    CommitConflict,
    InsufficientData,
    ReadOnlyStorage,
    StorageError,
)
from lance_dfaiss.lance_io import PinnedDataset
from tests.build import datasets
from tests.support import gaussian, make_dataset


def _packed(values: np.ndarray[Any, Any]) -> pa.Table:
    emb = datasets.table(values)["vector"].combine_chunks()
    number = pa.array(range(len(values)), pa.int64())
    struct = pa.StructArray.from_arrays([emb, number], names=["emb", "n"])
    fields = [pa.field("id", pa.int64()), pa.field("s", struct.type, metadata={b"packed": b"true"})]
    return pa.Table.from_arrays([number, struct], schema=pa.schema(fields))


def test_a_packed_struct_written_anew_is_noticed(tmp_path: Path) -> None:
    dataset = lance.write_dataset(_packed(datasets.vectors(50)), str(tmp_path / "d"))
    create_index(dataset, "s.emb", "FLAT", "idx")
    pinned = PinnedDataset(dataset)
    before = pinned.fragments(pinned.vector_column("s.emb"))
    assert all(state.signature.files for state in before)
    changed: Any = dataset.get_fragments()[0]
    fragment, modified = changed.update_columns(_packed(datasets.vectors(50, seed=8)), left_on="id", right_on="id")
    operation = lance.LanceOperation.Update(updated_fragments=[fragment], fields_modified=modified)
    after = lance.LanceDataset.commit(dataset.uri, operation, read_version=dataset.version)
    index = open_index(after, "idx")
    assert (index.stats().live_rows, [fragment.reason for fragment in index.view.snapshot.tail]) == (0, ["rewritten"])
    assert index.knn(datasets.vectors(50, seed=8), 1)[0].max() == 0


def test_the_legacy_format_can_be_indexed(tmp_path: Path) -> None:
    values = datasets.vectors(50)
    dataset = lance.write_dataset(datasets.table(values), str(tmp_path / "d"), data_storage_version="legacy")
    index = open_index(create_index(dataset, "vector", "FLAT"))
    assert np.array_equal(index.knn(values, 1)[1][:, 0], np.arange(50))


def test_a_fragment_without_the_column_has_no_vectors(tmp_path: Path) -> None:
    dataset = datasets.write(tmp_path / "d", datasets.vectors(20))
    dataset = lance.write_dataset(dataset.to_table(columns=["number"]), dataset.uri, mode="append")
    pinned = PinnedDataset(dataset)
    assert [bool(s.signature.files) for s in pinned.fragments(pinned.vector_column("vector"))] == [True, False]
    index = open_index(create_index(dataset, "vector", "FLAT"))
    assert (len(index), index.stats().skipped.null) == (20, 20)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32())])
def test_empty_lists_do_not_tell_the_dimension(tmp_path: Path, kind: pa.DataType) -> None:
    some = pa.table({"vector": pa.array([[], None, [1.0, 2.0, 3.0]], kind)})
    pinned = PinnedDataset(lance.write_dataset(some, str(tmp_path / "some")))
    assert pinned.vector_column("vector").dim == 3
    none = lance.write_dataset(pa.table({"vector": pa.array([[], None], kind)}), str(tmp_path / "none"))
    with pytest.raises(InsufficientData, match="no vector"):
        create_index(none, "vector")


@pytest.mark.parametrize("what", ["sample", "blocks"])
def test_missing_data_files_are_told_in_our_words(tmp_path: Path, what: str) -> None:
    dataset = datasets.write(tmp_path / "d", datasets.vectors(20))
    pinned = PinnedDataset(dataset)
    column = pinned.vector_column("vector")
    for path in (tmp_path / "d" / "data").iterdir():
        path.unlink()
    with pytest.raises(StorageError, match="could not read") as caught:
        pinned.sample(column, 5, "l2", 1) if what == "sample" else list(pinned.blocks(column, [0], "l2"))
    assert caught.value.location == dataset.uri
    assert "\n" not in caught.value.message


def test_a_removed_dataset_is_told_in_our_words(tmp_path: Path) -> None:
    pinned = PinnedDataset(datasets.write(tmp_path / "d", datasets.vectors(20)))
    (tmp_path / "d").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="could not read"):
        pinned.latest()


def _failing(monkeypatch: pytest.MonkeyPatch, message: str, times: int, other: str | None = None) -> list[int]:
    """Make the next commits fail with Lance's words, as object stores do; ``other`` commits first."""
    update: Any = lance.LanceDataset.update_metadata
    failed: list[int] = []

    def failing(self: Any, updates: dict[str, Any]) -> Any:
        if len(failed) < times:
            failed.append(1)
            if other is not None:
                update(lance.dataset(self.uri), {key: other for key in updates})
            raise OSError(message)
        return update(self, updates)

    monkeypatch.setattr(lance.LanceDataset, "update_metadata", failing)
    return failed


def test_a_conflict_with_something_else_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.write(tmp_path / "d", datasets.vectors(20))
    failed = _failing(monkeypatch, "Incompatible transaction", 4)
    create_index(dataset, "vector", "FLAT", "idx")
    assert len(failed) == 4
    failed = _failing(monkeypatch, "commit conflict", 100)
    with pytest.raises(StorageError, match="could not commit") as caught:
        create_index(dataset, "vector", "FLAT", "other")
    assert type(caught.value) is StorageError
    assert len(failed) == 5


def test_another_pointer_is_a_conflict_whatever_lance_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.write(tmp_path / "d", datasets.vectors(20))
    create_index(dataset, "vector", "FLAT", "idx")
    theirs = next(iter(dataset.metadata.values()))
    _failing(monkeypatch, "the connection was lost", 1, other=theirs)
    with pytest.raises(CommitConflict):
        PinnedDataset(dataset).commit_pointer("other", None, "{}", ours="us")


@pytest.mark.parametrize(
    "message", ["PermissionDenied: no", "Client error: AccessDenied", "status 403, Forbidden", "HTTP 403: no"]
)
def test_refusals_of_object_stores_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    dataset = datasets.write(tmp_path / "d", datasets.vectors(20))
    _failing(monkeypatch, message, 2)
    with pytest.raises(ReadOnlyStorage):
        create_index(dataset, "vector", "FLAT", "idx")
    elsewhere = str(tmp_path / "elsewhere")
    create_index(dataset, "vector", "FLAT", "idx", index_uri=elsewhere)
    assert len(open_index(dataset, "idx", index_uri=elsewhere)) == 20
    assert not dataset.metadata


def test_a_403_in_a_path_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = datasets.write(tmp_path / "d", datasets.vectors(20))
    _failing(monkeypatch, "lost the connection to /bucket/403/a-403-b", 1)
    with pytest.raises(StorageError) as caught:
        create_index(dataset, "vector", "FLAT", "idx")
    assert type(caught.value) is StorageError


def test_versions_are_listed_again_when_one_goes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(10, 4, 1))
    dataset.delete("id = 1")
    listed = lance.LanceDataset.versions
    failures = iter([ValueError("Not found: _versions/18446744073709551614.manifest"), None])

    def tripping(self: lance.LanceDataset) -> object:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        return listed(self)

    monkeypatch.setattr(lance.LanceDataset, "versions", tripping)
    assert [version.version for version in PinnedDataset(dataset).every_version()] == [1, 2]
