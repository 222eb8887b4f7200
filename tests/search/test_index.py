"""What an open index answers, refuses and reports; and that it is true to its dataset version."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import IndexNotFound, InvalidArgument, InvalidQuery, UnknownColumn
from lance_dfaiss.types import METRICS, Metric
from tests.support import Exact, assert_exact, clustered, fixed_size, live_table, make_dataset, same_rows

DIM, ROWS = 16, 600

INDEXES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": 8},
    "IVF_SQ": {"index_type": "IVF_SQ", "num_partitions": 8},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_partitions": 8, "num_bits": 4},
    "IVF_RQ": {"index_type": "IVF_RQ", "num_partitions": 8},
    "HNSW_FLAT": {"index_type": "HNSW_FLAT"},
    "HNSW_SQ": {"index_type": "HNSW_SQ"},
}


def _alter(dataset: lance.LanceDataset, change: Any) -> None:
    dataset.alter_columns(change)  # the stubs take the dictionary for its keys


def _widths(name: str) -> dict[str, Any]:
    return {"nprobe": 8} if "IVF" in name else {"ef": ROWS} if "HNSW" in name else {}


def _built(path: Path, name: str, *, metric: Metric = "l2", stable: bool = False, **more: Any) -> lance.LanceDataset:
    words = pa.array([f"w{i}" for i in range(ROWS)])
    plain = make_dataset(path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=150, stable=stable, word=words)
    return lance_dfaiss.create_index(plain, "vec", metric=metric, num_shards=2, **INDEXES[name], **more)


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
@pytest.mark.parametrize("name", INDEXES)
def test_rows_deleted_after_the_build_never_appear(tmp_path: Path, name: str, stable: bool) -> None:
    dataset = _built(tmp_path, name, stable=stable)
    whole = lance_dfaiss.open_index(dataset)
    before = whole.knn(clustered(3, DIM, 2), 20, **_widths(name))
    # Some rows here and there, one fragment altogether, and all but a few of another.
    for condition in ("id % 9 = 4", "id >= 150 AND id < 300", "id >= 310 AND id < 449"):
        dataset.delete(condition)
        index = lance_dfaiss.open_index(dataset)
        live = set(live_table(dataset).values())
        stats = index.stats()
        assert len(index) == stats.live_rows == len(live)
        assert stats.masked_rows == ROWS - len(live)
        for count in (1, 25):
            distances, row_ids = index.knn(clustered(count, DIM, 2), 20, **_widths(name))
            assert np.isfinite(distances).all(), "min(k, live) rows must come back"
            assert set(row_ids.ravel().tolist()) <= live
        everything = index.knn(clustered(1, DIM, 3), ROWS, **_widths(name))[1][0]
        assert set(everything[: len(live)].tolist()) == live
    # The index opened before the deletions still answers for its own version.
    same_rows(whole.knn(clustered(3, DIM, 2), 20, **_widths(name)), before)


@pytest.mark.parametrize("name", ["FLAT", "IVF_FLAT", "HNSW_FLAT"])
def test_k_rows_come_back_at_the_default_widths_after_most_were_deleted(tmp_path: Path, name: str) -> None:
    asked = {**INDEXES[name], **({"num_partitions": 16} if "IVF" in name else {})}
    plain = make_dataset(tmp_path / "d", clustered(3000, DIM, 1))
    dataset = lance_dfaiss.create_index(plain, "vec", **asked)
    dataset.delete("id % 100 <> 0")
    index = lance_dfaiss.open_index(dataset)
    assert len(index) == 30
    assert np.isfinite(index.knn(clustered(50, DIM, 2), 20)[0]).all()


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_whose_rows_are_all_deleted(tmp_path: Path, name: str) -> None:
    dataset = _built(tmp_path, name)
    dataset.delete("id >= 0")
    index = lance_dfaiss.open_index(dataset)
    assert len(index) == 0
    for query in (clustered(1, DIM, 2)[0], clustered(25, DIM, 2)):
        distances, _ = index.knn(query, 5)
        assert np.isposinf(distances).all()
        table = index.search(query, 5)
        assert table.num_rows == 0
        assert table.column_names[-5:] == ["id", "vec", "word", "_distance", "_rowid"]


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
@pytest.mark.parametrize("change", ["append", "update", "merge", "rewrite", "compact", "cast", "anew", "overwrite"])
def test_rows_that_the_index_does_not_cover_are_searched_beside_it(tmp_path: Path, change: str, stable: bool) -> None:
    dataset = _built(tmp_path, "IVF_FLAT", stable=stable)
    version = dataset.version
    expected = lance_dfaiss.open_index(dataset).knn(clustered(5, DIM, 2), 10, nprobe=8)
    rows = pa.table({"id": pa.array([7], pa.int64()), "vec": fixed_size(clustered(1, DIM, 9))})
    if change == "append":
        dataset = lance.write_dataset(rows, dataset.uri, mode="append")
    elif change == "update":
        dataset.update({"word": "'x'"}, where="id = 7")
    elif change == "merge":
        rows = rows.append_column("word", pa.array(["x"]))
        dataset.merge_insert("id").when_matched_update_all().execute(rows)
    elif change == "rewrite":
        dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(rows)
    elif change == "compact":
        dataset.optimize.compact_files(target_rows_per_fragment=400)
    elif change == "cast":
        _alter(dataset, {"path": "vec", "data_type": pa.list_(pa.float16(), DIM)})
    elif change == "anew":
        dataset.drop_columns(["vec"])
        dataset.add_columns(pa.table({"vec": fixed_size(clustered(ROWS, DIM, 1))}).to_reader())
    else:
        dataset = lance.write_dataset(dataset.to_table(), dataset.uri, mode="overwrite", max_rows_per_file=150)
    if change == "overwrite" and not dataset.metadata:
        with pytest.raises(IndexNotFound):
            lance_dfaiss.open_index(dataset)
    else:
        index = lance_dfaiss.open_index(dataset)
        rest, wide = "added", {fragment.fragment_id for fragment in dataset.get_fragments()}
        expected_tail = {
            "append": {4: rest}, "update": {4: rest}, "merge": {4: rest}, "rewrite": {0: "rewritten"}, "compact": {},
        }.get(change, dict.fromkeys(wide, rest if change == "overwrite" else "rewritten"))  # fmt: skip
        assert {fragment.fragment_id: fragment.reason for fragment in index.view.snapshot.tail} == expected_tail
        assert index.stats().mapped_rows == (ROWS if change == "compact" else 0)
        answer = index.knn(clustered(5, DIM, 2), 10, nprobe=8)
        assert_exact(Exact(dataset, "l2"), clustered(5, DIM, 2), *answer, scale=500)
    old = lance_dfaiss.open_index(dataset.checkout_version(version))
    same_rows(old.knn(clustered(5, DIM, 2), 10, nprobe=8), expected)
    rebuilt = lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", num_partitions=4, replace=True)
    answer = lance_dfaiss.open_index(rebuilt).knn(clustered(5, DIM, 2), 10, nprobe=4)
    assert_exact(Exact(rebuilt, "l2"), clustered(5, DIM, 2), *answer, scale=500)


def test_changes_that_leave_the_vectors_alone_leave_the_index_open(tmp_path: Path) -> None:
    dataset = _built(tmp_path, "IVF_FLAT")
    queries = clustered(5, DIM, 2)
    expected = lance_dfaiss.open_index(dataset).knn(queries, 10, nprobe=8)
    dataset.add_columns({"double": "id * 2"})
    _alter(dataset, {"path": "word", "name": "term"})
    dataset.update_metadata({"key": "value"})
    words = pa.table({"id": pa.array([13], pa.int64()), "term": ["changed"]})
    dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(words)
    index = lance_dfaiss.open_index(dataset)
    same_rows(index.knn(queries, 10, nprobe=8), expected)
    assert index.search(queries[0], 3, columns=["double", "term"]).column_names == [
        "double", "term", "_distance", "_rowid",
    ]  # fmt: skip


def test_branches_have_indexes_of_their_own(tmp_path: Path) -> None:
    main = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=80)
    branch = main.create_branch("side")
    more = pa.table({"id": pa.array(range(1000, 1050), pa.int64()), "vec": fixed_size(clustered(50, DIM, 5))})
    branch = lance.write_dataset(more, branch.uri, mode="append")
    branch = lance_dfaiss.create_index(branch, "vec", "FLAT", num_shards=2)
    main = lance_dfaiss.create_index(main, "vec", "FLAT", name="main_idx")
    queries = clustered(10, DIM, 6)
    assert_exact(Exact(branch, "l2"), queries, *lance_dfaiss.open_index(branch).knn(queries, 20), scale=500)
    assert_exact(Exact(main, "l2"), queries, *lance_dfaiss.open_index(main).knn(queries, 20), scale=500)
    assert lance_dfaiss.open_index(main).name == "main_idx"
    assert (tmp_path / "d" / "_dfaiss").is_dir()
    assert not (tmp_path / "d" / "tree" / "side" / "_dfaiss").exists()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, lance_dfaiss.Index]:
    return {
        name: lance_dfaiss.open_index(_built(tmp_path_factory.mktemp(name), name, metric="cosine")) for name in INDEXES
    }


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (np.ones(DIM - 1), r"\(15,\)"),
        (np.ones((3, DIM + 1)), r"\(3, 17\)"),
        (np.ones((2, 2, DIM)), "shape"),
        (np.float32(3), "shape"),
        ([], "shape"),
        ("word", "numbers"),
        ([[1.0] * DIM, [1.0] * (DIM - 1)], "numbers"),
        (np.full(DIM, np.nan), "query 0 holds NaN"),
        (np.array([np.ones(DIM), np.full(DIM, np.inf)]), "query 1 holds NaN"),
        (np.full(DIM, 1e30), "too large"),
        (np.full(DIM, 1e300), "too large"),
        (np.array([np.ones(DIM), np.zeros(DIM)]), "query 1 is the zero vector"),
    ],
)
def test_queries_that_cannot_be_searched(opened: dict[str, lance_dfaiss.Index], query: Any, says: str) -> None:
    for search in (opened["FLAT"].knn, opened["IVF_PQ"].search):
        with pytest.raises(InvalidQuery, match=says):
            search(query)


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", None, True])
def test_k_must_be_a_positive_whole_number(opened: dict[str, lance_dfaiss.Index], k: Any) -> None:
    for search in (opened["FLAT"].knn, opened["FLAT"].search):
        with pytest.raises(InvalidArgument, match="k must be") as caught:
            search(np.ones(DIM), k)
        assert caught.value.parameter == "k"


@pytest.mark.parametrize(
    ("name", "widths", "parameter"),
    [
        ("IVF_FLAT", {"nprobe": 9}, "nprobe"),
        ("IVF_FLAT", {"nprobe": 0}, "nprobe"),
        ("IVF_FLAT", {"ef": 10}, "ef"),
        ("IVF_FLAT", {"k_factor": 2}, "k_factor"),
        ("HNSW_FLAT", {"nprobe": 1}, "nprobe"),
        ("HNSW_FLAT", {"ef": 0}, "ef"),
        ("HNSW_SQ", {"k_factor": 2}, "k_factor"),
        ("FLAT", {"nprobe": 1}, "nprobe"),
        ("FLAT", {"ef": 1}, "ef"),
        ("FLAT", {"k_factor": 1}, "k_factor"),
        ("IVF_PQ", {"k_factor": 0}, "k_factor"),
        ("IVF_PQ", {"k_factor": 1.5}, "k_factor"),
    ],
)
def test_widths_that_mean_nothing_are_refused(
    opened: dict[str, lance_dfaiss.Index], name: str, widths: dict[str, Any], parameter: str
) -> None:
    for search in (opened[name].knn, opened[name].search):
        with pytest.raises(InvalidArgument) as caught:
            search(np.ones(DIM), 3, **widths)
        assert caught.value.parameter == parameter


@pytest.mark.parametrize("metric", METRICS)
def test_the_callers_query_is_not_touched(tmp_path: Path, metric: Metric) -> None:
    index = lance_dfaiss.open_index(_built(tmp_path, "FLAT", metric=metric))
    for query in (5 * clustered(1, DIM, 2)[0], 5 * clustered(3, DIM, 2)):
        kept = query.copy()
        first = index.knn(query, 5)
        index.search(query, 5)
        np.testing.assert_array_equal(query, kept)
        query.flags.writeable = False
        same_rows(index.knn(query, 5), first)
        wide = query.astype(np.float64)
        same_rows(index.knn(wide, 5), first)
        same_rows(index.knn(wide.tolist(), 5), first)
        same_rows(index.knn(np.asfortranarray(query), 5), first)


@pytest.mark.parametrize("name", INDEXES)
def test_many_threads_get_the_answers_of_one(opened: dict[str, lance_dfaiss.Index], name: str) -> None:
    index, queries = opened[name], clustered(24, DIM, 2)
    widths: dict[str, Any] = _widths(name)

    def ask(number: int) -> Any:
        k = 1 + number % 7
        return index.knn(queries[number], k, **widths), index.search(queries[number : number + 2], k, columns=["id"])

    alone = [ask(number) for number in range(22)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, [*range(22)] * 3))
    for number, (arrays, table) in enumerate(together):
        same_rows(arrays, alone[number % 22][0])
        assert table.equals(alone[number % 22][1])


def test_many_threads_decode_at_once(tmp_path: Path) -> None:
    dataset = _built(tmp_path, "IVF_SQ")
    row_ids = np.array(list(live_table(dataset).values()), dtype=np.uint64)
    expected = lance_dfaiss.open_index(dataset).reconstruct(row_ids)
    index = lance_dfaiss.open_index(dataset)
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: index.reconstruct(row_ids), range(12)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", INDEXES)
def test_reconstruct(opened: dict[str, lance_dfaiss.Index], name: str) -> None:
    index = opened[name]
    values = clustered(ROWS, DIM, 1)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    wanted = [599, 0, 151, 151]
    row_ids = [((i // 150) << 32) + i % 150 for i in wanted]
    found = index.reconstruct(row_ids)
    assert found.shape == (4, DIM)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values[wanted], atol=0.02)
    if "FLAT" in name:
        np.testing.assert_allclose(found, values[wanted], rtol=1e-5, atol=1e-6)
    assert index.reconstruct([]).shape == (0, DIM)
    for missing in (150, (9 << 32), 2**64 - 1):
        with pytest.raises(InvalidArgument, match=f"row {missing} is not in this index"):
            index.reconstruct([row_ids[0], missing])


def test_reconstruct_refuses_deleted_rows(tmp_path: Path) -> None:
    dataset = _built(tmp_path, "IVF_FLAT")
    dataset.delete("id = 3")
    index = lance_dfaiss.open_index(dataset)
    with pytest.raises(InvalidArgument, match="row 3 is not in this index"):
        index.reconstruct([3])
    np.testing.assert_array_equal(index.reconstruct([4])[0], clustered(ROWS, DIM, 1)[4])


def test_columns(opened: dict[str, lance_dfaiss.Index]) -> None:
    index, query = opened["IVF_FLAT"], clustered(1, DIM, 2)[0]
    row_ids = index.knn(query, 6)[1][0]
    expected_ids = [(int(row) >> 32) * 150 + (int(row) & 0xFFFFFFFF) for row in row_ids]

    def names(columns: Any) -> list[str]:
        table = index.search(query, 6, columns=columns)
        assert table["_rowid"].to_pylist() == row_ids.tolist()
        return list(table.column_names)

    assert names(None) == ["id", "vec", "word", "_distance", "_rowid"]
    assert names([]) == ["_distance", "_rowid"]
    assert names(["word", "id"]) == ["word", "id", "_distance", "_rowid"]
    assert names({}) == ["_distance", "_rowid"]
    table = index.search(query, 6, columns={"twice": "id * 2", "name": "upper(word)"})
    assert table.column_names == ["twice", "name", "_distance", "_rowid"]
    assert table["twice"].to_pylist() == [2 * i for i in expected_ids]
    assert table["name"].to_pylist() == [f"W{i}" for i in expected_ids]
    with pytest.raises(UnknownColumn, match="nope") as caught:
        index.search(query, 6, columns=["id", "nope"])
    assert caught.value.available == ("id", "vec", "word")


def test_a_batch_names_its_queries(opened: dict[str, lance_dfaiss.Index]) -> None:
    index, queries = opened["HNSW_SQ"], clustered(4, DIM, 2)
    table = index.search(queries, 3, columns=["id"])
    assert table.column_names == ["query_index", "id", "_distance", "_rowid"]
    assert table["query_index"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert index.search(queries[:1], 3).column_names[0] == "query_index"
    assert "query_index" not in index.search(queries[0], 3).column_names
    nothing = index.search(np.zeros((0, DIM), np.float32), 3, columns=["id"])
    assert (nothing.num_rows, nothing.column_names) == (0, ["query_index", "id", "_distance", "_rowid"])
    assert index.knn(np.zeros((0, DIM), np.float32), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("name", INDEXES)
def test_the_same_query_gets_the_same_answer(opened: dict[str, lance_dfaiss.Index], name: str) -> None:
    for queries in (clustered(1, DIM, 2)[0], clustered(30, DIM, 2)):
        same_rows(opened[name].knn(queries, 10), opened[name].knn(queries, 10))


@pytest.mark.parametrize("name", INDEXES)
def test_stats(opened: dict[str, lance_dfaiss.Index], name: str) -> None:
    index = opened[name]
    stats = index.stats()
    assert (stats.name, stats.metric, stats.dim, stats.version) == ("vec_idx", "cosine", DIM, index.version)
    assert stats.index_type == name
    assert stats.factory == index.manifest.spec.factory
    assert (stats.indexed_rows, stats.masked_rows, stats.live_rows, stats.skipped.total) == (ROWS, 0, ROWS, 0)
    assert (stats.shards, stats.segments) == (2, 2 if "HNSW" in name else 1)
    code = {"FLAT": 64, "IVF_FLAT": 64, "IVF_SQ": 16, "IVF_PQ": 20, "IVF_RQ": 18, "HNSW_FLAT": 64, "HNSW_SQ": 16}[name]
    assert code * ROWS < stats.ram_bytes < (code + 8 + 400) * ROWS
    assert stats.recall is not None
    assert 0.5 < stats.recall <= 1
    assert (stats.list_imbalance is not None) == ("IVF" in name)
    if stats.list_imbalance is not None:
        assert 1 <= stats.list_imbalance <= 8
    assert (stats.defaults.nprobe is not None) == ("IVF" in name)
    assert (stats.defaults.ef is not None) == ("HNSW" in name)
    assert len(index) == ROWS
    assert "vec_idx" in repr(index)
