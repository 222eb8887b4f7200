"""What an attack on the search found: names that mislead, histories that are long, RAM that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import DatasetChanged
from lance_dfaiss.lance_io import DatasetHistory, PinnedDataset
from tests.support import Exact, assert_exact, fixed_size, gaussian, make_dataset

DIM, ROWS = 8, 120
QUERIES = gaussian(4, DIM, 9)


def _check(dataset: lance.LanceDataset, column: str = "vec") -> lance_dfaiss.Index:
    index = lance_dfaiss.open_index(dataset)
    assert_exact(Exact(dataset, "l2", column), QUERIES, *index.knn(QUERIES, 10))
    return index


def _swap_names(dataset: lance.LanceDataset) -> None:
    for old, new in (("vec", "was"), ("other", "vec"), ("was", "other")):
        dataset.alter_columns({"path": old, "name": new})  # type: ignore[dict-item]


@pytest.mark.parametrize("version", ["legacy", "2.0", "stable"])
def test_columns_that_swap_their_names(tmp_path: Path, version: Any) -> None:
    table = pa.table({"vec": fixed_size(gaussian(ROWS, DIM, 1)), "other": fixed_size(gaussian(ROWS, DIM, 2))})
    dataset = lance.write_dataset(table, str(tmp_path / "d"), data_storage_version=version)
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    _swap_names(dataset)
    assert _check(dataset).stats().tail_rows == ROWS
    lance_dfaiss.update_index(dataset)
    _swap_names(dataset)
    _check(dataset)


def test_a_column_that_only_has_the_field_id_is_another_one(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    table = pa.table({"id": pa.array(range(ROWS), pa.int64()), "emb": fixed_size(gaussian(ROWS, DIM, 2))})
    dataset = lance.write_dataset(table, dataset.uri, mode="overwrite")
    with pytest.raises(DatasetChanged, match="'vec'"):
        lance_dfaiss.open_index(dataset)
    with pytest.raises(DatasetChanged, match="'vec'"):
        lance_dfaiss.update_index(dataset)


@pytest.mark.parametrize("name", ["_rowid", "_ROWID", "_RowAddr"])
def test_system_columns_in_any_spelling_are_those_of_the_dataset(tmp_path: Path, name: str) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1), rows_per_fragment=30)
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    index = lance_dfaiss.open_index(dataset, filter_columns=["id"])
    row_ids = index.knn(QUERIES[0], ROWS, filter=f"{name} >= {3 << 32}")[1]
    assert sorted(row_ids[row_ids != lance_dfaiss.MISSING_ROW_ID].tolist()) == [(3 << 32) + i for i in range(30)]


def test_fragments_that_vanished_one_by_one_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fragments = 120
    dataset = make_dataset(tmp_path / "d", gaussian(fragments * 2, DIM, 1), rows_per_fragment=2)
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    # All of half of them at once, then some by themselves.
    dataset.delete(f"id < {fragments}")
    for i in range(fragments, fragments + 10, 2):
        dataset.delete(f"id >= {i} AND id < {i + 2}")
    lance.write_dataset(dataset.to_table(limit=3), dataset.uri, mode="append")
    asked: list[int] = []
    known = DatasetHistory.fragment_ids

    def counted(self: DatasetHistory, version: int) -> frozenset[int] | None:
        asked.append(version)
        return known(self, version)

    monkeypatch.setattr(DatasetHistory, "fragment_ids", counted)
    _check(lance.dataset(dataset.uri))
    assert len(asked) < 100, "each fragment was looked for by itself"


def test_deletions_of_all_fragments_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1), rows_per_fragment=3)
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    dataset.delete("id % 3 = 1")
    reads: list[int] = []
    read = PinnedDataset.live_offsets_of

    def counted(self: PinnedDataset, fragment_ids: list[int]) -> dict[int, np.ndarray]:
        reads.append(len(fragment_ids))
        return read(self, fragment_ids)

    monkeypatch.setattr(PinnedDataset, "live_offsets_of", counted)
    index = _check(dataset)
    assert reads == [ROWS // 3]
    lance.dataset(dataset.uri).delete("id = 0")
    assert index.refresh()
    assert reads == [ROWS // 3, 1]


def test_a_branch_that_was_made_again_is_noticed(tmp_path: Path) -> None:
    main = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1))
    lance_dfaiss.create_index(main, "vec", "FLAT")
    made = []
    for seed in (2, 3):
        branch = main.create_branch("b", main.version)
        table = pa.table({"id": pa.array(range(20), pa.int64()), "vec": fixed_size(gaussian(20, DIM, seed))})
        lance.write_dataset(table, branch.uri, mode="append")
        branch.checkout_latest()  # type: ignore[no-untyped-call]
        made.append(branch)
        if seed == 2:
            index = lance_dfaiss.open_index(branch)
            main.branches.delete("b")
    assert made[0].version == made[1].version
    assert index.refresh()
    assert_exact(Exact(made[1], "l2"), QUERIES, *index.knn(QUERIES, 10))


def test_a_living_index_does_not_fall_to_pieces(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    index = lance_dfaiss.open_index(dataset)
    for first in range(1000, 1020):
        table = pa.table({"id": pa.array([first], pa.int64()), "vec": fixed_size(gaussian(1, DIM, first))})
        lance.write_dataset(table, dataset.uri, mode="append")
        lance_dfaiss.update_index(dataset)
        assert index.refresh()
        assert index.stats().segments <= 8
    assert_exact(Exact(dataset, "l2"), QUERIES, *index.knn(QUERIES, 10))


def test_the_tail_is_held_once_and_let_go(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    index = lance_dfaiss.open_index(dataset)
    alone = index.stats().ram_bytes
    rows = 20_000
    table = pa.table({"id": pa.array(range(rows), pa.int64()), "vec": fixed_size(gaussian(rows, DIM, 2))})
    lance.write_dataset(table, dataset.uri, mode="append")
    index.refresh()
    index.knn(QUERIES, 10)
    vectors = rows * DIM * 4
    assert vectors < index.stats().ram_bytes - alone < 2 * vectors + rows * 5 * 8
    lance_dfaiss.update_index(dataset)
    index.refresh()
    assert index.view.tail.ram_bytes == 0


def test_what_leaves_the_tail_out_does_not_read_it(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    lance.write_dataset(dataset.to_table(limit=50), dataset.uri, mode="append")
    index = lance_dfaiss.open_index(dataset.uri, max_tail_rows=10)
    explained = index.explain(QUERIES, 5, filter="id < 20", include_tail=False)
    assert explained.results == 4 * 5
    assert explained.stage("tail") is None


def test_columns_held_for_filters_are_counted(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", gaussian(ROWS, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    with_columns = lance_dfaiss.open_index(dataset, filter_columns=["id"]).stats().ram_bytes
    assert with_columns - lance_dfaiss.open_index(dataset).stats().ram_bytes >= ROWS * (8 + 8)


def test_lists_of_another_length_are_no_vectors(tmp_path: Path) -> None:
    kind = pa.list_(pa.float32())
    vectors = gaussian(ROWS, DIM, 1).tolist()
    dataset = lance.write_dataset(pa.table({"vec": pa.array(vectors, kind)}), str(tmp_path / "d"))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    index = lance_dfaiss.open_index(dataset)
    more = pa.table({"vec": pa.array([[1.0, 2.0], vectors[0]], kind)})
    lance.write_dataset(more, dataset.uri, mode="append")
    index.refresh()
    for _ in range(2):
        assert len(index.search(vectors[0], 2, columns=[])) == 2
        assert len(index.search(vectors[0], ROWS + 5, columns=[])) == ROWS + 1
        assert lance_dfaiss.update_index(dataset).added_rows in (0, 1)
        index.refresh()
    assert index.stats().tail_rows == 0
    longer = pa.table({"vec": pa.array(gaussian(9, DIM + 1, 3).tolist(), kind)})
    dataset = lance.write_dataset(longer, dataset.uri, mode="overwrite")
    with pytest.raises(DatasetChanged, match=f"dimension {DIM + 1}"):
        lance_dfaiss.open_index(dataset)
