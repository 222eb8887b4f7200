"""Outages around the commit: whatever fails and whenever, the generation that is current keeps its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, describe_index, optimize_index, rollback, sync_index, update_index
from lance_dfaiss.build import commit
from lance_dfaiss.build.lease import Lease
from lance_dfaiss.errors import CommitConflict, ReadOnlyStorage, StorageError
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manifest import Pointer
from lance_dfaiss.pointers import find_pointer, never_current, publish
from lance_dfaiss.storage import LocalStore
from tests.build.test_build_changes import Until
from tests.support import Exact, assert_exact, gaussian, make_dataset

_DIM = 8
_QUERIES = gaussian(5, _DIM, 9)


def append(dataset: lance.LanceDataset, rows: int = 30) -> None:
    lance.write_dataset(dataset.to_table(limit=rows), dataset.uri, mode="append")
    dataset.checkout_latest()  # type: ignore[no-untyped-call]


@pytest.fixture
def dataset(tmp_path: Path) -> lance.LanceDataset:
    made = make_dataset(tmp_path / "d", gaussian(200, _DIM, 1), rows_per_fragment=100)
    create_index(made, "vec", "FLAT")
    append(made)
    return made


def generation(dataset: lance.LanceDataset, **where: Any) -> str:
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    return describe_index(dataset, **where).pointer.generation


def assert_whole(dataset: lance.LanceDataset, **where: Any) -> None:
    """Check that the current generation has its files, and answers."""
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    assert lance_dfaiss.verify_index(dataset, **where) == []
    assert_exact(Exact(dataset, "l2"), _QUERIES, *lance_dfaiss.open_index(dataset, **where).knn(_QUERIES, 10))


def retrain(dataset: str, **options: Any) -> object:
    return optimize_index(dataset, retrain=True, **options)


def folders(dataset: lance.LanceDataset) -> set[str]:
    return {path.name for path in Path(dataset.uri, "_dfaiss").iterdir()}


@contextmanager
def answer_lost(*, looks: int) -> Iterator[None]:
    """Let the next commits of the metadata be done but their answer be lost, and as many looks after it fail."""
    update, fresh = lance.LanceDataset.update_metadata, PinnedDataset._fresh
    failing: list[int] = []

    def lose(self: lance.LanceDataset, *args: Any) -> None:
        update(self, *args)
        failing.extend(range(looks))
        raise OSError("connection reset by peer")

    def look(self: PinnedDataset) -> lance.LanceDataset:
        if failing:
            failing.pop()
            raise StorageError("connection reset", location=self.uri)
        return fresh(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lance.LanceDataset, "update_metadata", lose)
        patch.setattr(PinnedDataset, "_fresh", look)
        yield


@pytest.mark.parametrize(
    "change",
    [
        lambda d: update_index(d),
        lambda d: sync_index(d),
        lambda d: optimize_index(d, max_dead_share=0),
        retrain,
        lambda d: create_index(d, "vec", "FLAT", replace=True),
        lambda d: rollback(d),
    ],
    ids=["update", "sync", "optimize", "retrain", "create", "rollback"],
)
@pytest.mark.parametrize("looks", [1, 9])
def test_a_commit_whose_answer_is_lost(
    dataset: lance.LanceDataset, change: Callable[[str], object], looks: int
) -> None:
    update_index(dataset)
    dataset.delete("id % 3 = 0")
    dataset.optimize.compact_files()
    append(dataset)
    before = generation(dataset)
    with answer_lost(looks=looks), pytest.raises(StorageError):
        change(dataset.uri)
    assert generation(dataset) != before  # it was done
    assert_whole(dataset)


def test_a_pointer_file_whose_answer_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: lance.LanceDataset
) -> None:
    def refuse(self: PinnedDataset) -> None:
        raise ReadOnlyStorage("not yours", location=self.uri)

    monkeypatch.setattr(PinnedDataset, "check_writable", refuse)
    where = {"index_uri": str(tmp_path / "elsewhere")}
    dataset = make_dataset(tmp_path / "other", gaussian(200, _DIM, 1), rows_per_fragment=100)
    create_index(dataset, "vec", "FLAT", **where)  # type: ignore[arg-type]
    append(dataset)
    write = LocalStore.write

    def lose(self: LocalStore, name: str, data: bytes) -> None:
        write(self, name, data)
        if name.startswith("pointers/"):
            raise StorageError("timed out", location=name)

    monkeypatch.setattr(LocalStore, "write", lose)
    report = update_index(dataset, **where)  # type: ignore[arg-type]
    assert (report.changed, report.generation) == (True, generation(dataset, **where))
    assert_whole(dataset, **where)
    lance_dfaiss.drop_index(dataset, "vec_idx", **where)  # type: ignore[arg-type]
    assert lance_dfaiss.list_indices(dataset, **where) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("failure", [ValueError("a fault of this program"), KeyboardInterrupt()])
def test_the_check_after_the_pointer_fails_in_any_way(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before = generation(dataset)
    held: list[Lease] = []

    def moved(*args: Any, **options: Any) -> Any:
        done = publish(*args, **options)
        monkeypatch.setattr(Lease, "check", fail)
        return done

    def fail(self: Lease) -> None:
        held.append(self)
        raise failure

    monkeypatch.setattr(commit, "publish", moved)
    with pytest.raises(type(failure)):
        update_index(dataset.uri)
    monkeypatch.undo()
    assert len(held) == 1
    assert generation(dataset) == before  # taken back
    assert_whole(dataset)


@pytest.mark.parametrize("failure", [StorageError("refused", location="x"), OSError("refused")])
def test_taking_back_fails_too(
    dataset: lance.LanceDataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
) -> None:
    before = generation(dataset)

    def moved(*args: Any, **options: Any) -> Any:
        done = publish(*args, **options)
        monkeypatch.setattr(commit, "publish", fail)
        monkeypatch.setattr(commit, "check_present", fail)
        return done

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(commit, "publish", moved)
    with pytest.raises(type(failure), match="refused"):
        update_index(dataset.uri)
    monkeypatch.undo()
    assert generation(dataset) != before
    assert_whole(dataset)
    assert "could not be taken back" in caplog.text


@pytest.mark.parametrize("change", [update_index, retrain])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), StorageError("full", location="x"), ValueError()])
def test_before_the_commit_nothing_stays(
    dataset: lance.LanceDataset, change: Callable[..., object], failure: BaseException
) -> None:
    before = folders(dataset)

    def fail() -> None:
        raise failure

    with pytest.raises(type(failure)):
        change(dataset.uri, progress=Until("encode", 0, fail))
    assert folders(dataset) == before


def test_clearing_up_hides_no_error(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        monkeypatch.setattr(LocalStore, "delete", refuse)
        raise MemoryError("the first one")

    def refuse(self: LocalStore, name: str) -> None:
        raise StorageError("refused", location=f"{self.location}/{name}")

    with pytest.raises(MemoryError, match="the first one"):
        update_index(dataset.uri, progress=Until("encode", 0, fail))
    assert "left to gc" in caplog.text


def test_whoever_built_on_a_lost_answer_keeps_the_files(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is done, its answer lost, and before the look another update has built on it."""
    commit_pointer = PinnedDataset.commit_pointer

    def lose(self: PinnedDataset, *args: Any, **options: Any) -> None:
        monkeypatch.setattr(PinnedDataset, "commit_pointer", commit_pointer)
        commit_pointer(self, *args, **options)
        append(lance.dataset(dataset.uri))
        update_index(dataset.uri)
        raise CommitConflict("another one", name="vec_idx", ours="", theirs="")

    monkeypatch.setattr(PinnedDataset, "commit_pointer", lose)
    with pytest.raises(CommitConflict):
        update_index(dataset.uri)
    assert describe_index(dataset.uri).tail_rows == 0
    assert_whole(dataset)


def test_a_lookup_that_fails_leaves_it_to_gc(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A conflict stays a conflict, and what cannot be found out is not acted upon."""
    before = folders(dataset)

    def down(*_: Any, **__: Any) -> bool:
        raise StorageError("connection refused", location="x")

    monkeypatch.setattr(commit, "never_current", down)
    with pytest.raises(CommitConflict):
        update_index(dataset.uri, progress=Until("encode", 0, lambda: update_index(dataset.uri)))
    assert len(folders(dataset) - before) == 2
    assert "is left to gc: connection refused" in caplog.text
    assert_whole(dataset)


def test_what_is_certain_of_a_pointer_that_lost(dataset: lance.LanceDataset) -> None:
    def pinned() -> PinnedDataset:
        return PinnedDataset(lance.dataset(dataset.uri))

    first = find_pointer(pinned(), None)
    update_index(dataset)
    current = find_pointer(pinned(), None)

    def certain(generation: str, previous: str | None, like: Pointer = first.pointer) -> bool:
        ours = Pointer(
            generation=generation, where="dataset", root=like.root, manifest=like.manifest, previous=previous
        )
        return never_current(pinned(), first.name, ours, index_uri=None)

    assert certain("ours", first.pointer.generation)  # theirs replaced what ours was to replace
    assert certain("ours", current.pointer.generation)  # still there
    assert not certain("ours", "another one")  # several writers in between: ours may be among them
    assert not certain(current.pointer.generation, first.pointer.generation, current.pointer)  # it is current
    assert not certain(first.pointer.generation, None)  # theirs replaced ours
    publish(pinned(), first.name, None, previous=current, index_uri=None)
    assert not certain("ours", current.pointer.generation)  # dropped: nothing tells


def test_adopted_meanwhile_is_a_conflict(tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    os.makedirs(elsewhere)
    dataset = make_dataset(tmp_path / "d", gaussian(200, _DIM, 1), rows_per_fragment=100)
    create_index(dataset, "vec", "FLAT", index_uri=elsewhere)
    append(dataset)
    act = Until("encode", 0, lambda: lance_dfaiss.adopt_index(dataset.uri, source=elsewhere))
    with pytest.raises(CommitConflict):
        update_index(dataset.uri, index_uri=elsewhere, progress=act)
    assert_whole(dataset)
    assert update_index(dataset).added_rows == 30


def test_built_anew_elsewhere_meanwhile_is_a_conflict(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    act = Until("encode", 0, lambda: create_index(dataset.uri, "vec", "FLAT", replace=True, index_uri=elsewhere))
    with pytest.raises(CommitConflict):
        update_index(dataset.uri, progress=act)
    assert_whole(dataset, index_uri=elsewhere)
