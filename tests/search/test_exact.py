"""Where FAISS is exact, so is the index: against Lance's own search and against brute force in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import MISSING_ROW_ID
from lance_dfaiss.types import METRICS, Metric
from tests.support import KINDS, Exact, assert_exact, clustered, column_of, fixed_size, make_dataset, same_rows

DIM = 16
_FLOATS = {"float16": np.float16, "float32": np.float32, "float64": np.float64}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", _FLOATS)
def test_flat_equals_lance_without_an_index(tmp_path: Path, kind: str, metric: Metric) -> None:
    dtype = _FLOATS[kind]
    plain = make_dataset(tmp_path / "d", clustered(400, DIM, 1).astype(dtype), rows_per_fragment=150)
    dataset = lance_dfaiss.create_index(plain, "vec", "FLAT", metric=metric, num_shards=2)
    index = lance_dfaiss.open_index(dataset)
    queries = clustered(300, DIM, 2).astype(dtype)
    truth = Exact(dataset, metric)
    scale = float(np.square(queries.astype(np.float64)).sum(axis=1).max()) if metric != "cosine" else 1.0

    def native(query: np.ndarray) -> pa.Table:
        nearest = {"column": "vec", "q": query, "k": 7, "metric": metric, "use_index": False}
        return dataset.to_table(nearest=nearest, with_row_id=True)

    for query in queries[:3]:
        ours, theirs = index.search(query, 7), native(query)
        assert ours.schema.equals(theirs.schema)
        tolerance = 1e-6 * scale + 1e-4 * np.abs(theirs["_distance"].to_numpy())
        if kind != "float16":  # Lance itself sums up float16 with three digits
            assert ours["_rowid"].to_pylist() == theirs["_rowid"].to_pylist()
            assert (np.abs(ours["_distance"].to_numpy() - theirs["_distance"].to_numpy()) <= tolerance).all()
        assert [row["vec"] for row in ours.to_pylist()] == [
            row for row in dataset.take((ours["id"]).to_pylist(), columns=["vec"])["vec"].to_pylist()
        ]
        assert_exact(truth, query, ours["_distance"].to_numpy()[None], ours["_rowid"].to_numpy()[None], scale=scale)

    for count in (1, 3, 25, 300):
        distances, row_ids = index.knn(queries[:count], 7)
        assert distances.shape == row_ids.shape == (count, 7)
        assert distances.dtype == np.float32
        assert row_ids.dtype == np.uint64
        assert_exact(truth, queries[:count], distances, row_ids, scale=scale)
        table = index.search(queries[:count], 7)
        np.testing.assert_array_equal(table["query_index"].to_numpy(), np.repeat(np.arange(count), 7))
        np.testing.assert_array_equal(table["_rowid"].to_numpy(), row_ids.ravel())
        np.testing.assert_array_equal(table["_distance"].to_numpy(), distances.ravel())
    if kind == "float32":
        batch = native(queries[:3])
        ours = index.search(queries[:3], 7)
        assert ours.schema.equals(batch.schema)
        assert ours["_rowid"].to_pylist() == batch["_rowid"].to_pylist()
        assert ours["query_index"].to_pylist() == batch["query_index"].to_pylist()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(_FLOATS)))
def test_flat_equals_brute_force_for_every_other_kind(tmp_path: Path, kind: str, metric: Metric) -> None:
    plain = make_dataset(tmp_path / "d", KINDS[kind](clustered(300, DIM, 3)), rows_per_fragment=120)
    column = column_of(kind)
    dataset = lance_dfaiss.create_index(plain, column, "FLAT", metric=metric, num_shards=2)
    index = lance_dfaiss.open_index(dataset)
    truth = Exact(dataset, metric, column)
    queries = truth.vectors[::30].astype(np.float32) + np.float32(0.25)
    scale = float(np.square(truth.vectors).sum(axis=1).max()) if metric != "cosine" else 1.0
    for count in (1, len(queries)):
        assert_exact(truth, queries[:count], *index.knn(queries[:count], 9), scale=scale)
    assert index.search(queries[0], 9, columns=["id"]).column_names == ["id", "_distance", "_rowid"]


@pytest.mark.parametrize("metric", METRICS)
def test_ivf_flat_is_exact_when_all_lists_are_searched(tmp_path: Path, metric: Metric) -> None:
    plain = make_dataset(tmp_path / "d", clustered(600, DIM, 4), rows_per_fragment=100)
    dataset = lance_dfaiss.create_index(plain, "vec", "IVF_FLAT", metric=metric, num_partitions=12, num_shards=3)
    index = lance_dfaiss.open_index(dataset)
    truth, queries = Exact(dataset, metric), clustered(40, DIM, 5)
    for count in (1, 40):
        assert_exact(truth, queries[:count], *index.knn(queries[:count], 10, nprobe=12), scale=500)


_INDEXES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": 8},
    "IVF_SQ": {"index_type": "IVF_SQ", "num_partitions": 8},
    "IVF_PQ8": {"index_type": "IVF_PQ", "num_partitions": 8, "num_sub_vectors": 8},
    "IVF_PQ4": {"index_type": "IVF_PQ", "num_partitions": 8, "num_bits": 4, "refine": None},
    "IVF_RQ": {"index_type": "IVF_RQ", "num_partitions": 8, "refine": None},
    "SQ8": {"factory": "SQ8"},
    "PCA": {"factory": "PCA8,IVF8,SQ8"},
    "IVF_HNSW": {"index_type": "IVF_SQ", "num_partitions": 8, "coarse": "hnsw"},
}
_APPROXIMATE: dict[str, dict[str, Any]] = {
    "IVF_PQ4 refined": {"index_type": "IVF_PQ", "num_partitions": 8, "num_bits": 4},
    "IVF_RQ refined": {"index_type": "IVF_RQ", "num_partitions": 8},
    "HNSW_FLAT": {"index_type": "HNSW_FLAT"},
    "HNSW_SQ": {"index_type": "HNSW_SQ"},
    "HNSW_SQ refined": {"index_type": "HNSW_SQ", "refine": "fp16"},
}
EVERY_INDEX = {**_INDEXES, **_APPROXIMATE}


def _opened(plain: lance.LanceDataset, num_shards: int, metric: Metric, asked: dict[str, Any]) -> lance_dfaiss.Index:
    built = lance_dfaiss.create_index(
        plain,
        "vec",
        name="i",
        metric=metric,
        num_shards=num_shards,
        replace=True,
        **asked,
    )
    return lance_dfaiss.open_index(built, "i")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", _INDEXES)
def test_the_number_of_shards_changes_nothing(tmp_path: Path, name: str, metric: Metric) -> None:
    plain = make_dataset(tmp_path / "d", clustered(700, DIM, 6), rows_per_fragment=90)
    plain.delete("id % 10 = 3")
    queries = clustered(30, DIM, 7)
    widths: list[dict[str, Any]] = [{}] if name in ("FLAT", "SQ8") else [{"nprobe": 1}, {"nprobe": 3}, {"nprobe": 8}]
    expected: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for num_shards in (1, 7):
        index = _opened(plain, num_shards, metric, _INDEXES[name])
        assert index.stats().shards == num_shards
        assert index.stats().segments == 1
        found = [index.knn(queries[:count], 10, **width) for width in widths for count in (1, 30)]
        expected.append(found)
    for others in expected[1:]:
        for one, other in zip(expected[0], others, strict=True):
            same_rows(one, other)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", _APPROXIMATE)
def test_the_number_of_shards_hardly_changes_recall(tmp_path: Path, name: str, metric: Metric) -> None:
    plain = make_dataset(tmp_path / "d", clustered(900, DIM, 8), rows_per_fragment=120)
    queries = clustered(200, DIM, 9)
    truth = Exact(plain, metric)
    recalls = []
    for num_shards in (1, 7):
        index = _opened(plain, num_shards, metric, _APPROXIMATE[name])
        widths: dict[str, Any] = {"ef": 128} if "HNSW" in name else {"nprobe": 8, "k_factor": 16}
        recalls.append(truth.recall(queries, index.knn(queries, 10, **widths)[1]))
    assert min(recalls) > (0.7 if "RQ" in name else 0.9), recalls
    # More shards of a graph look at more candidates: they may find more, not less.
    assert recalls[0] - min(recalls) <= 0.005, recalls
    if "HNSW" not in name:
        assert max(recalls) - min(recalls) <= 0.005, recalls


def test_ties_come_in_order_of_row_id(tmp_path: Path) -> None:
    values = np.repeat(clustered(20, DIM, 10), 6, axis=0)[np.random.default_rng(1).permutation(120)]
    plain = make_dataset(tmp_path / "d", values, rows_per_fragment=35)
    for asked in (_INDEXES["FLAT"], {**_INDEXES["IVF_FLAT"], "num_partitions": 2}, _APPROXIMATE["HNSW_FLAT"]):
        for metric in METRICS:
            index = _opened(plain, 3, metric, asked)
            truth = Exact(plain, metric)
            for count in (1, 40):
                queries = clustered(count, DIM, 11)
                # A multiple of the group's size, so that no group is cut.
                distances, row_ids = index.knn(queries, 12)
                for query, found, ids in zip(queries, distances, row_ids, strict=True):
                    groups = truth.knn(query, 12)[1].reshape(2, 6)
                    assert len(set(found[:6].tolist())) == len(set(found[6:].tolist())) == 1, "no tie to order"
                    np.testing.assert_array_equal(ids.reshape(2, 6), np.sort(groups, axis=1))


@pytest.mark.parametrize("name", EVERY_INDEX)
def test_k_beyond_the_rows_is_padded(tmp_path: Path, name: str) -> None:
    rows = 300
    plain = make_dataset(tmp_path / "d", clustered(rows, DIM, 12), rows_per_fragment=100)
    index = _opened(plain, 2, "l2", EVERY_INDEX[name])
    widths: dict[str, Any] = {"nprobe": 8} if "IVF" in name or "PCA" in name else {}
    for count in (1, 25):
        queries = clustered(count, DIM, 13)
        distances, row_ids = index.knn(queries, rows + 20, **widths)
        assert distances.shape == (count, rows + 20)
        assert np.isposinf(distances[:, rows:]).all()
        assert (row_ids[:, rows:] == MISSING_ROW_ID).all()
        assert (np.sort(row_ids[:, :rows], axis=1) == np.sort(list(Exact(plain, "l2").row_ids))).all()
        table = index.search(queries, rows + 20, columns=["id"], **widths)
        assert table.num_rows == rows * count
        assert index.search(queries[0], rows + 20, columns=[], **widths).num_rows == rows


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", EVERY_INDEX)
def test_unusable_rows_are_never_found(tmp_path: Path, name: str, metric: Metric) -> None:
    values = clustered(420, DIM, 14)
    values[10:20] = np.nan
    values[100:130, 3] = np.inf
    values[200:300:4] = 0
    null = [0, 5, 139, 140, 141, *range(280, 420, 9)]
    plain = make_dataset(tmp_path / "d", fixed_size(values, null=null), rows_per_fragment=140)
    plain.delete("id IN (1, 2, 3, 150, 419)")
    index = _opened(plain, 3, metric, EVERY_INDEX[name])
    truth = Exact(plain, metric)
    assert len(index) == index.stats().live_rows == len(truth) < 380
    skipped = index.stats().skipped
    assert skipped.deleted == 5
    assert skipped.deleted + skipped.null + skipped.non_finite + skipped.zero == 420 - len(truth)
    assert (skipped.zero > 0) == (metric == "cosine")
    widths: dict[str, Any] = {"nprobe": 8} if "IVF" in name or "PCA" in name else {"ef": 420} if "HNSW" in name else {}
    queries = np.concatenate([clustered(20, DIM, 15), np.full((2, DIM), 1e-3, np.float32)])
    for count in (1, 22):
        distances, row_ids = index.knn(queries[:count], 410, **widths)
        found = row_ids[:, : len(truth)]
        assert np.isfinite(distances[:, : len(truth)]).all()
        assert (np.sort(found, axis=1) == np.sort(truth.row_ids)).all()
        assert (row_ids[:, len(truth) :] == MISSING_ROW_ID).all()


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_row_ids_after_updates_before_the_build(tmp_path: Path, stable: bool) -> None:
    plain = make_dataset(tmp_path / "d", clustered(200, DIM, 16), rows_per_fragment=60, stable=stable)
    plain.update({"id": "id + 1000"}, where="id % 7 = 0")
    plain.delete("id % 5 = 1")
    more = pa.table({"id": pa.array(range(500, 530), pa.int64()), "vec": fixed_size(clustered(30, DIM, 17))})
    plain = lance.write_dataset(more, plain.uri, mode="append")
    plain.optimize.compact_files(target_rows_per_fragment=100)
    plain.update({"id": "id + 5000"}, where="id IN (3, 507)")
    for asked in (_INDEXES["FLAT"], {**_INDEXES["IVF_FLAT"], "num_partitions": 4}):
        index = _opened(plain, 2, "l2", asked)
        truth, queries = Exact(plain, "l2"), clustered(10, DIM, 18)
        widths: dict[str, Any] = {"nprobe": 4} if "num_partitions" in asked else {}
        assert_exact(truth, queries, *index.knn(queries, 15, **widths), scale=500)
        for row in index.search(queries[0], 15, columns=["id", "vec"], **widths).to_pylist():
            np.testing.assert_array_equal(np.float32(row["vec"]), truth.vector(row["_rowid"]))
