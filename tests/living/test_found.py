"""Bugs that the state machine found, each as its shortest story."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import UnknownColumn
from tests.support import Exact, assert_exact, fixed_size, make_dataset

DIM = 8


def _vectors(rows: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).integers(-3, 4, (rows, DIM)).astype(np.float32)


def _alter(dataset: lance.LanceDataset, change: Any) -> None:
    dataset.alter_columns(change)  # the stubs take the dictionary for its keys


def _check(index: lance_dfaiss.Index, dataset: lance.LanceDataset, column: str = "vec") -> None:
    queries = _vectors(3, 99)
    assert_exact(Exact(dataset, "l2", column), queries, *index.knn(queries, 12), scale=500)


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_a_compaction_that_moves_a_scalar_index_is_followed(tmp_path: Path, stable: bool) -> None:
    dataset = make_dataset(tmp_path / "d", _vectors(60, 1), rows_per_fragment=10, stable=stable)
    dataset = lance_dfaiss.create_index(dataset, "vec", "FLAT")
    dataset.create_scalar_index("id", "BTREE")
    dataset.delete("id % 7 = 2")
    dataset.optimize.compact_files(target_rows_per_fragment=30)
    index = lance_dfaiss.open_index(dataset)
    assert (index.stats().tail_rows, index.stats().mapped_rows) == (0, dataset.count_rows())
    _check(index, dataset)


def test_columns_in_memory_of_a_dataset_that_lost_all_rows(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", _vectors(20, 1))
    index = lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec", "FLAT"), filter_columns=["id"])
    dataset.delete("true")
    assert index.refresh()
    assert (index.knn(_vectors(1, 2), 3, filter="id >= 0")[0] == np.inf).all()
    lance.write_dataset(pa.table({"id": pa.array([50]), "vec": fixed_size(_vectors(1, 3))}), dataset, mode="append")
    assert index.refresh()
    assert np.isfinite(index.knn(_vectors(1, 2), 1, filter="id = 50")[0]).all()


def test_columns_in_memory_follow_their_names(tmp_path: Path) -> None:
    """Renaming writes no file, but a filter means another column afterwards."""
    numbers = {"low": pa.array(range(20)), "high": pa.array(range(100, 120))}
    dataset = make_dataset(tmp_path / "d", _vectors(20, 1), **numbers)
    index = lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec", "FLAT"), filter_columns=["low"])
    assert np.isfinite(index.knn(_vectors(1, 2), 5, filter="low < 5")[0]).all()
    _alter(dataset, {"path": "low", "name": "old"})
    index.refresh()
    with pytest.raises(UnknownColumn):
        index.knn(_vectors(1, 2), 5, filter="low < 5")
    _alter(dataset, {"path": "high", "name": "low"})
    index.refresh()
    assert np.isposinf(index.knn(_vectors(1, 2), 5, filter="low < 5")[0]).all()
    assert np.isfinite(index.knn(_vectors(1, 2), 5, filter="old < 5")[0]).all()


def test_a_column_in_memory_that_is_dropped_ends_no_refresh(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", _vectors(20, 1), word=pa.array(["a", "b"] * 10))
    index = lance_dfaiss.open_index(lance_dfaiss.create_index(dataset, "vec", "FLAT"), filter_columns=["word"])
    dataset.drop_columns(["word"])
    assert index.refresh()
    _check(index, dataset)
    with pytest.raises(UnknownColumn):
        index.knn(_vectors(1, 2), 5, filter="word = 'a'")
    dataset.add_columns({"word": "'a'"})
    assert index.refresh()
    assert np.isfinite(index.knn(_vectors(1, 2), 20, filter="word = 'a'")[0]).all()


def test_field_ids_that_an_overwrite_dealt_anew_name_no_other_column(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", _vectors(20, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    # The field id that the vectors had is now that of ``other``, a vector column too.
    table = pa.table(
        {"id": pa.array(range(20)), "other": fixed_size(_vectors(20, 2)), "vec": fixed_size(_vectors(20, 3))}
    )
    dataset = lance.write_dataset(table, dataset, mode="overwrite")
    _check(lance_dfaiss.open_index(dataset), dataset)
    numbers = pa.table({"id": pa.array(range(20)), "other": pa.array(range(20)), "vec": fixed_size(_vectors(20, 3))})
    dataset = lance.write_dataset(numbers, dataset, mode="overwrite")
    _check(lance_dfaiss.open_index(dataset), dataset)


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_rows_of_two_shards_that_stand_side_by_side_are_followed_apart(tmp_path: Path, stable: bool) -> None:
    dataset = make_dataset(tmp_path / "d", _vectors(20, 1), stable=stable)
    dataset = lance_dfaiss.create_index(dataset, "vec", "FLAT")
    rows = pa.table({"id": pa.array(range(20, 30)), "vec": fixed_size(_vectors(10, 2))})
    dataset = lance.write_dataset(rows, dataset, mode="append")
    lance_dfaiss.update_index(dataset)
    living = lance_dfaiss.open_index(dataset)
    dataset.optimize.compact_files()
    for number in (5, 7):
        # Both shards' rows are neighbours in one fragment now, and move on together.
        dataset.delete(f"id = {number}")
        dataset.optimize.compact_files(materialize_deletions_threshold=0.0)
        living.refresh()
        _check(living, dataset)
    assert lance_dfaiss.sync_index(dataset).mapped_rows == 28
    index = lance_dfaiss.open_index(dataset)
    assert (index.stats().mapped_rows, index.stats().tail_rows) == (28, 0)
    _check(index, dataset)
