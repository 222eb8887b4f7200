"""Going back while files are collected, and away from a generation that is damaged."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import GcReport, create_index, describe_index, gc, open_index, rollback, update_index
from lance_dfaiss.build.lease import Lease
from lance_dfaiss.errors import CorruptIndex
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manage import collect
from tests.support import Exact, assert_exact, gaussian, make_dataset

_DIM = 8
_QUERIES = gaussian(5, _DIM, 2)
_NOW = timedelta(0)


@pytest.fixture(params=["plain", "moved"])
def dataset(tmp_path: Path, request: pytest.FixtureRequest) -> lance.LanceDataset:
    """Return a dataset with two generations, where nothing but the pointer leads to the former one.

    If moved, the way back is a new generation that needs files of the former one.
    """
    made = make_dataset(tmp_path / "d", gaussian(300, _DIM, 1), rows_per_fragment=100)
    create_index(made, "vec", "FLAT")
    create_index(made, "vec", "FLAT", replace=True)
    forget(made)
    if request.param == "moved":
        made.delete("id % 7 = 0")
        made.optimize.compact_files()
        assert describe_index(made).unsaved_rows > 0
    return made


def forget(dataset: Any) -> None:
    dataset.checkout_latest()
    dataset.cleanup_old_versions(_NOW, delete_unverified=True)


def generation(dataset: lance.LanceDataset) -> str:
    return describe_index(dataset.uri).pointer.generation


def assert_whole(dataset: lance.LanceDataset) -> None:
    assert lance_dfaiss.verify_index(dataset.uri) == []
    newest = lance.dataset(dataset.uri)
    assert_exact(Exact(newest, "l2"), _QUERIES, *open_index(newest).knn(_QUERIES, 10))


def test_done_while_a_collector_is_about_to_delete(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out = collect._carry_out
    before = generation(dataset)

    def late(*args: Any, **options: Any) -> GcReport:
        rollback(dataset.uri)
        return carry_out(*args, **options)

    monkeypatch.setattr(collect, "_carry_out", late)
    report = gc(dataset, keep_previous=0, min_age=_NOW)
    assert "it was made current again meanwhile" in report.kept.values()
    assert generation(dataset) != before
    assert_whole(dataset)


@pytest.mark.parametrize("before_the_pointer", [True, False])
def test_collected_at_the_pointer(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch, before_the_pointer: bool
) -> None:
    commit = PinnedDataset.commit_pointer
    reports: list[GcReport] = []

    def watched(self: PinnedDataset, *args: Any, **options: Any) -> None:
        if before_the_pointer:
            reports.append(gc(dataset, keep_previous=0, min_age=_NOW))
        commit(self, *args, **options)
        if not before_the_pointer:
            reports.append(gc(dataset, keep_previous=0, min_age=_NOW))

    before = generation(dataset)
    monkeypatch.setattr(PinnedDataset, "commit_pointer", watched)
    rollback(dataset.uri)
    assert any(reason.startswith("a builder holds it") for reason in reports[0].kept.values())
    assert generation(dataset) != before
    assert_whole(dataset)
    leases = list(Path(dataset.uri, "_dfaiss").rglob("lease-*"))
    assert leases == []


def test_what_it_needs_is_held_until_the_pointer_was_checked(
    dataset: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = describe_index(dataset.uri).pointer.previous
    commit, check = PinnedDataset.commit_pointer, Lease.check
    checked: list[str] = []

    def moved(self: PinnedDataset, *args: Any, **options: Any) -> None:
        commit(self, *args, **options)
        checked.clear()

    def watched(self: Lease) -> None:
        check(self)
        checked.append(self.generation)

    monkeypatch.setattr(PinnedDataset, "commit_pointer", moved)
    monkeypatch.setattr(Lease, "check", watched)
    rollback(dataset.uri)
    assert former in checked


def lose(dataset: lance.LanceDataset, pattern: str, act: Callable[[Path], object]) -> None:
    found = list(Path(dataset.uri, "_dfaiss", generation(dataset)).glob(pattern))
    assert found
    for path in found:
        act(path)


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("pattern", ["manifest.json", "shard-*.json", "shard-*.faiss"])
@pytest.mark.parametrize("act", [Path.unlink, lambda path: path.write_text("x")], ids=["lost", "damaged"])
def test_away_from_a_damaged_generation(
    tmp_path: Path, pattern: str, act: Callable[[Path], object], compacted: bool
) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(300, _DIM, 1), rows_per_fragment=100)
    create_index(dataset, "vec", "FLAT")
    lance.write_dataset(dataset.to_table(limit=20), dataset.uri, mode="append")
    update_index(dataset)
    if compacted:
        dataset.checkout_latest()  # type: ignore[no-untyped-call]
        dataset.optimize.compact_files()
    lose(dataset, pattern, act)
    with pytest.raises(CorruptIndex):
        open_index(dataset.uri)
    rollback(dataset.uri)
    found = describe_index(dataset.uri)
    assert (found.indexed_rows, found.masked_rows, found.tail_rows) == (300, 0, 20)
    assert_whole(dataset)
