"""An update that another writer overtakes is committed on top of what that one did, where the two go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lance
import pytest

import lance_dfaiss
from lance_dfaiss import create_index, describe_index, drop_index, open_index, optimize_index, sync_index, update_index
from lance_dfaiss.errors import CommitConflict
from tests.build.test_build_changes import Until
from tests.support import Exact, assert_exact, gaussian, make_dataset

_DIM = 8
_QUERIES = gaussian(5, _DIM, 9)


@pytest.fixture(params=[False, True], ids=["addresses", "stable"])
def dataset(tmp_path: Path, request: pytest.FixtureRequest) -> lance.LanceDataset:
    made = make_dataset(tmp_path / "d", gaussian(300, _DIM, 1), rows_per_fragment=100, stable=request.param)
    create_index(made, "vec", "FLAT")
    _append(made)
    return made


def _append(dataset: lance.LanceDataset) -> None:
    lance.write_dataset(dataset.to_table(limit=60), dataset.uri, mode="append")
    dataset.checkout_latest()  # type: ignore[no-untyped-call]


def _overtaken(
    dataset: lance.LanceDataset, between: Callable[[lance.LanceDataset], object]
) -> lance_dfaiss.UpdateReport:
    """Update, and let something else happen when the new rows are being encoded."""
    return update_index(dataset, progress=Until("encode", 0, lambda: between(lance.dataset(dataset.uri))))


def _assert_true(dataset: lance.LanceDataset) -> None:
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    assert_exact(Exact(dataset, "l2"), _QUERIES, *open_index(dataset).knn(_QUERIES, 10))


def _compact_and_sync(dataset: lance.LanceDataset) -> None:
    dataset.delete("id % 5 = 0")
    dataset.optimize.compact_files()
    assert sync_index(dataset).changed


def test_a_sync_in_between(dataset: lance.LanceDataset) -> None:
    report = _overtaken(dataset, _compact_and_sync)
    assert (report.changed, report.added_rows) == (True, 60)
    found = describe_index(dataset)
    assert (found.tail_rows, found.unsaved_rows) == (0, 0)
    assert found.mapped_rows == found.indexed_rows - found.masked_rows
    _assert_true(dataset)
    # What the commit on top wrote down is enough once the old versions are gone.
    dataset.cleanup_old_versions(older_than=None, retain_versions=1)
    assert describe_index(dataset).tail_rows == 0
    _assert_true(dataset)


def test_an_optimisation_in_between(dataset: lance.LanceDataset) -> None:
    for _ in range(2):
        update_index(dataset)
        _append(dataset)
    merged: list[int] = []
    _overtaken(dataset, lambda other: merged.append(optimize_index(other).shards_after))
    found = describe_index(dataset)
    assert (found.tail_rows, len(found.manifest.shards)) == (0, merged[0] + 1)
    assert merged[0] < 3
    _assert_true(dataset)


@pytest.mark.parametrize(
    "between",
    [
        lambda other: update_index(other),
        lambda other: create_index(other, "vec", "FLAT", metric="dot", replace=True),
        lambda other: drop_index(other, "vec_idx"),
    ],
    ids=["the same rows", "another model", "no index"],
)
def test_what_does_not_go_together_is_a_conflict(
    dataset: lance.LanceDataset, between: Callable[[lance.LanceDataset], object]
) -> None:
    with pytest.raises(CommitConflict):
        _overtaken(dataset, between)
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    before = lance_dfaiss.list_indices(dataset)
    if before:
        assert describe_index(dataset).tail_rows == 0
