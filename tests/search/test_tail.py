"""Rows outside the index: searched exactly, within limits, and read once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import InvalidArgument, TailTooLarge
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.search.index import Index
from lance_dfaiss.types import METRICS, MISSING_ROW_ID, Metric
from tests.search.test_exact import EVERY_INDEX
from tests.support import KINDS, Exact, assert_exact, clustered, column_of, fixed_size, live_table, make_dataset

DIM, ROWS = 16, 400


def _more(ids: range, values: np.ndarray, **null: Any) -> pa.Table:
    return pa.table({"id": pa.array(ids, pa.int64()), "vec": fixed_size(values, **null)})


def _append(dataset: lance.LanceDataset, ids: range, seed: int = 5) -> lance.LanceDataset:
    return lance.write_dataset(_more(ids, clustered(len(ids), DIM, seed)), dataset.uri, mode="append")


def _built(path: Path, metric: Metric = "l2", stable: bool = False, **asked: Any) -> lance.LanceDataset:
    plain = make_dataset(path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=100, stable=stable)
    return lance_dfaiss.create_index(plain, "vec", metric=metric, num_shards=2, **{"index_type": "FLAT", **asked})


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note every fragment that is read for its vectors."""
    read: list[int] = []
    blocks = PinnedDataset.blocks

    def noted(self: PinnedDataset, column: Any, fragment_ids: Any, metric: Any) -> Any:
        read.extend(fragment_ids)
        return blocks(self, column, fragment_ids, metric)

    monkeypatch.setattr(PinnedDataset, "blocks", noted)
    return read


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_the_answer_is_exact_with_rows_of_every_kind_outside(tmp_path: Path, metric: Metric, stable: bool) -> None:
    dataset = _built(tmp_path, metric, stable)
    values = clustered(60, DIM, 7)
    values[3], values[5, 2], values[6, 1] = 0, np.nan, np.inf
    dataset = lance.write_dataset(_more(range(1000, 1060), values, null=[0, 9]), dataset.uri, mode="append")
    dataset.update({"id": "id + 5000"}, where="id % 40 = 1")
    dataset.delete("id IN (1010, 1011, 5041)")
    index = lance_dfaiss.open_index(dataset)
    truth, queries = Exact(dataset, metric), clustered(30, DIM, 2)
    stats = index.stats()
    assert (stats.tail_rows, stats.live_rows) == (58 + 9, ROWS - 10)
    for count in (1, 30):
        for k in (1, 10, len(truth), len(truth) + 5):
            assert_exact(truth, queries[:count], *index.knn(queries[:count], k), scale=500)
    assert_exact(truth, values[20:25], *index.knn(values[20:25], 3), scale=500)
    # Rows that Lance moved are known by the id that Lance gives them now.
    table = index.search(queries[0], 500, columns=["id"])
    live = live_table(dataset)
    assert {row["id"]: row["_rowid"] for row in table.to_pylist()}.items() <= live.items()
    assert table.num_rows == len(truth)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_vector(tmp_path: Path, kind: str) -> None:
    column = column_of(kind)
    plain = make_dataset(tmp_path / "d", KINDS[kind](clustered(100, DIM, 3)), rows_per_fragment=60)
    dataset = lance_dfaiss.create_index(plain, column, "FLAT")
    extra = pa.table({"id": pa.array(range(500, 540), pa.int64()), "vec": KINDS[kind](clustered(40, DIM, 4))})
    dataset = lance.write_dataset(extra, dataset.uri, mode="append")
    index, truth = lance_dfaiss.open_index(dataset), Exact(dataset, "l2", column)
    queries = truth.vectors[::20].astype(np.float32) + np.float32(0.25)
    assert index.stats().tail_rows == 40
    assert_exact(truth, queries, *index.knn(queries, 20), scale=float(np.square(truth.vectors).sum(axis=1).max()))


@pytest.mark.parametrize("name", EVERY_INDEX)
def test_every_type_finds_rows_outside_by_their_exact_distance(changed: Callable[[str], Index], name: str) -> None:
    index, values = changed(name), clustered(30, DIM, 5)[4:]
    distances, row_ids = index.knn(values, 1)
    assert distances.max() == 0
    assert (np.diff(row_ids[:, 0].astype(np.int64)) == 1).all()
    np.testing.assert_array_equal(index.reconstruct(row_ids[:, 0]), values)


def test_left_out_on_request(tmp_path: Path) -> None:
    dataset = _append(_built(tmp_path), range(1000, 1020))
    index, query = lance_dfaiss.open_index(dataset), clustered(20, DIM, 5)[3]
    for without in ({"include_tail": False}, {"fast_search": True}, {"include_tail": True, "fast_search": True}):
        asked: Any = without
        row_ids = index.knn(query, 500, **asked)[1][0]
        assert (row_ids != MISSING_ROW_ID).sum() == ROWS
        assert set(row_ids[:ROWS] >> np.uint64(32)) == {0, 1, 2, 3}
        assert index.search(query, 500, columns=[], **asked).num_rows == ROWS
        assert index.range_search(query, 1e9, columns=[], **asked).num_rows == ROWS
        assert index.explain(query, 500, **asked).results == ROWS
    assert index.search(query, 500, columns=[]).num_rows == ROWS + 20 == len(index)


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({"max_tail_rows": 20}, True),
        ({"max_tail_rows": 19}, False),
        ({"max_tail_rows": 0}, False),
        ({"max_tail_bytes": 20 * DIM * 4}, True),
        ({"max_tail_bytes": 20 * DIM * 4 - 1}, False),
    ],
)
def test_limits(tmp_path: Path, limits: dict[str, Any], fits: bool) -> None:
    dataset = _append(_built(tmp_path), range(1000, 1020))
    index, query = lance_dfaiss.open_index(dataset, **limits), clustered(1, DIM, 2)[0]
    assert index.stats().tail_rows == 20
    if fits:
        assert index.search(query, 500, columns=[]).num_rows == ROWS + 20
        return
    searches: list[Any] = [index.knn, index.search, index.explain]
    for search in searches:
        with pytest.raises(TailTooLarge, match="update_index") as caught:
            search(query, 3)
        assert caught.value.rows == 20
        assert "20 rows" in caught.value.message
        search(query, 3, fast_search=True)
    with pytest.raises(TailTooLarge):
        index.range_search(query, 3.0)
    with pytest.raises(TailTooLarge):
        index.knn(query, 3, filter="id > 3")
    lance_dfaiss.update_index(dataset)
    assert index.refresh()
    assert index.search(query, 500, columns=[]).num_rows == ROWS + 20


@pytest.mark.parametrize("value", [-1, 1.5, "3", None, True])
def test_limits_that_are_no_numbers(tmp_path: Path, value: Any) -> None:
    for parameter in ("max_tail_rows", "max_tail_bytes"):
        with pytest.raises(InvalidArgument) as caught:
            lance_dfaiss.open_index(str(tmp_path / "nowhere"), **{parameter: value})
        assert caught.value.parameter == parameter


def test_a_large_tail_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lance_dfaiss.search.tail._WARN_ROWS", 20)
    index = lance_dfaiss.open_index(_append(_built(tmp_path), range(1000, 1020)))
    with caplog.at_level(logging.WARNING, "lance_dfaiss"):
        for _ in range(3):
            index.knn(clustered(1, DIM, 2), 3)
    assert [record.message for record in caplog.records if "update_index" in record.message] == [
        "index 'vec_idx': 20 rows are searched one by one, update_index would index them"
    ]


def test_read_once_and_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _append(_built(tmp_path), range(1000, 1020))
    index, queries = lance_dfaiss.open_index(dataset), clustered(3, DIM, 2)
    read = _reads(monkeypatch)

    def check(expected: list[int]) -> None:
        read.clear()
        for _ in range(2):
            assert_exact(Exact(index.view.pinned.lance, "l2"), queries, *index.knn(queries, 450), scale=500)
            index.knn(queries, 3, filter="id > 5")
            index.search(queries[0], 3, columns=[])
        assert read == expected

    check([4])
    _append(dataset, range(2000, 2010), 6)
    index.refresh()
    check([5])
    lance.dataset(dataset.uri).delete("id IN (1003, 2001)")
    index.refresh()
    check([])
    lance.dataset(dataset.uri).update({"id": "id + 9000"}, where="id = 1004")
    index.refresh()
    check([6])
    # Not read while nobody asks: then from where the last reading was.
    _append(dataset, range(3000, 3010), 7)
    index.refresh()
    _append(dataset, range(4000, 4010), 8)
    index.refresh()
    check([7, 8])
    lance_dfaiss.update_index(lance.dataset(dataset.uri))
    index.refresh()
    check([])
    lance.dataset(dataset.uri, version=dataset.version).restore()  # type: ignore[no-untyped-call]
    index.refresh()
    assert index.stats().tail_rows == 20
    assert_exact(Exact(index.view.pinned.lance, "l2"), queries, *index.knn(queries, 450), scale=500)


def test_deleted_rows_that_a_restore_brings_back_are_read(tmp_path: Path) -> None:
    dataset = _append(_built(tmp_path), range(1000, 1020))
    version = dataset.version
    dataset.delete("id >= 1000 AND id < 1015")
    index, queries = lance_dfaiss.open_index(dataset), clustered(3, DIM, 2)
    index.knn(queries, 3)
    lance.dataset(dataset.uri, version=version).restore()  # type: ignore[no-untyped-call]
    assert index.refresh()
    assert index.stats().tail_rows == 20
    assert_exact(Exact(index.view.pinned.lance, "l2"), queries, *index.knn(queries, 450), scale=500)


def test_another_metric_does_not_get_the_rows_as_they_were_prepared_for_the_last(tmp_path: Path) -> None:
    dataset = _built(tmp_path, "l2")
    version = dataset.version
    appended = _append(dataset, range(1000, 1050))
    index, queries = lance_dfaiss.open_index(appended), clustered(5, DIM, 2)
    index.knn(queries, 3)

    def restore(number: int) -> None:
        lance.dataset(dataset.uri, version=number).restore()  # type: ignore[no-untyped-call]

    for metric in ("cosine", "dot"):
        restore(version)
        built = lance_dfaiss.create_index(dataset.uri, "vec", "FLAT", metric=metric, replace=True)
        pointer: dict[str, Any] = {key: text for key, text in built.metadata.items() if key.startswith("lance_dfaiss.")}
        restore(appended.version)
        lance.dataset(dataset.uri).update_metadata(pointer)  # as a builder does that began before the append
        assert index.refresh()
        assert (index.stats().metric, index.stats().tail_rows) == (metric, 50)
        assert_exact(Exact(index.view.pinned.lance, metric), queries, *index.knn(queries, 450), scale=500)


def _mixed(path: Path) -> tuple[lance.LanceDataset, Index]:
    dataset = _append(_built(path), range(1000, 1020))
    dataset.update({"id": "id + 5000"}, where="id < 5")
    dataset.optimize.compact_files(target_rows_per_fragment=10_000)
    return dataset, lance_dfaiss.open_index(dataset)


def test_rows_of_one_fragment_inside_and_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, index = _mixed(tmp_path)
    stats = index.stats()
    assert len(dataset.get_fragments()) == 1
    assert [fragment.reason for fragment in index.view.snapshot.tail] == ["partial"]
    assert (stats.mapped_rows, stats.tail_rows) == (ROWS - 5, 25)
    queries = clustered(5, DIM, 2)
    assert_exact(Exact(dataset, "l2"), queries, *index.knn(queries, 450), scale=500)
    dataset.delete("id IN (1001, 5001, 77)")
    read = _reads(monkeypatch)
    assert index.refresh()
    assert_exact(Exact(dataset, "l2"), queries, *index.knn(queries, 450), scale=500)
    assert read == []
    assert index.stats().tail_rows == 23


def test_row_ids_give_the_same_vectors_inside_and_outside(tmp_path: Path) -> None:
    dataset, index = _mixed(tmp_path)
    truth = Exact(dataset, "l2")
    order = np.random.default_rng(1).permutation(len(truth))
    np.testing.assert_array_equal(index.reconstruct(truth.row_ids[order]), truth.vectors[order])
    with pytest.raises(InvalidArgument, match="is not in this index"):
        index.reconstruct([int(truth.row_ids[0]), 2**40])
