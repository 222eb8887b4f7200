"""Filters: exactly the rows that Lance says match, on everything that can become of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lance_dfaiss
from lance_dfaiss.errors import InvalidArgument, InvalidFilter, StorageError, UnknownColumn
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.search.filters import FilterCache
from lance_dfaiss.search.index import Index
from lance_dfaiss.types import MISSING_ROW_ID
from tests.search.test_exact import EVERY_INDEX
from tests.support import Exact, assert_exact, clustered, fixed_size, make_dataset

DIM, ROWS = 16, 600


def _columns(ids: range) -> dict[str, pa.Array]:
    rng = np.random.default_rng(len(ids) + ids[0])
    numbers = rng.integers(0, 100, len(ids))
    words = pa.array([None if n % 7 == 0 else f"w{n % 5}" for n in numbers.tolist()], pa.string())
    depth = pa.array([None if n % 11 == 0 else n for n in numbers.tolist()], pa.int32())
    inner = pa.StructArray.from_arrays([depth, words], names=["depth", "word"])
    meta = pa.StructArray.from_arrays([inner], names=["inner"], mask=pa.array((numbers % 13 == 0).tolist()))
    return {"number": pa.array(numbers, pa.int32()), "word": words, "meta": meta}


def _table(ids: range, seed: int) -> pa.Table:
    vectors = fixed_size(clustered(len(ids), DIM, seed))
    return pa.table({"id": pa.array(ids, pa.int64()), "vec": vectors, **_columns(ids)})


FILTERS = [
    "false",
    "id < 0",
    "id = 77",
    "id IN (3, 40, 41, 200, 599, 1003)",
    "number < 10",
    "number % 3 = 1 AND word = 'w2'",
    "word IS NULL",
    "word IS NOT NULL",
    "word LIKE 'w%' OR id > 550",
    "meta.inner.depth > 50",
    "meta.inner.depth IS NULL",
    "meta IS NULL",
    "NOT (meta.inner.word = 'w1')",
    "number >= 1",
    "true",
]


def _matches(dataset: lance.LanceDataset, filter_sql: str) -> Exact:
    """The truth about what a filter leaves, by asking Lance for the rows without any index."""
    matching = dataset.scanner(columns=["id"], filter=filter_sql, use_scalar_index=False, with_row_id=True).to_table()
    truth = Exact(dataset, "l2")
    kept = np.isin(truth.row_ids, matching["_rowid"].to_numpy())
    truth.row_ids, truth.vectors = truth.row_ids[kept], truth.vectors[kept]
    return truth


def _check(index: Index, dataset: lance.LanceDataset, filters: list[str], *, exact: bool = True, **widths: Any) -> None:
    queries = clustered(4, DIM, 99)
    for sql in filters:
        truth = _matches(dataset, sql)
        for k in (1, 10, max(len(truth), 1), len(truth) + 3):
            for count in (1, 4):
                distances, row_ids = index.knn(queries[:count], k, filter=sql, **widths)
                if exact:
                    assert_exact(truth, queries[:count], distances, row_ids, scale=500)
                found = row_ids != MISSING_ROW_ID
                assert (found.sum(axis=1) == min(k, len(truth))).all(), (sql, k)
                assert np.isin(row_ids[found], truth.row_ids).all(), sql
                assert all(len(set(row[row != MISSING_ROW_ID])) == (row != MISSING_ROW_ID).sum() for row in row_ids)
        table = index.search(queries[0], 5, filter=sql, columns=["id"])
        assert table.num_rows == min(5, len(truth))


def _change(dataset: lance.LanceDataset) -> lance.LanceDataset:
    """Deletes, updates, an append, a compaction of some fragments: rows of every kind."""
    dataset.delete("id % 17 = 3")
    dataset.update({"number": "number + 1000"}, where="id % 50 = 10")
    dataset.delete("id >= 100 AND id < 190")
    dataset.optimize.compact_files(target_rows_per_fragment=150, materialize_deletions_threshold=0.01)
    dataset = lance.write_dataset(_table(range(1000, 1040), 5), dataset.uri, mode="append")
    dataset.delete("id IN (1001, 1002, 5)")
    return dataset


@pytest.mark.parametrize("indexed", [False, True], ids=["", "scalar indexes"])
@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
@pytest.mark.parametrize("name", ["FLAT", "IVF_FLAT"])
def test_exact_indexes_give_the_exact_answer(tmp_path: Path, name: str, stable: bool, indexed: bool) -> None:
    plain = make_dataset(
        tmp_path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=100, stable=stable, **_columns(range(ROWS))
    )
    if indexed:
        plain.create_scalar_index("number", "BTREE")
        plain.create_scalar_index("word", "BITMAP")
    dataset = lance_dfaiss.create_index(plain, "vec", num_shards=2, **EVERY_INDEX[name])
    widths: dict[str, Any] = {"nprobe": 8} if name == "IVF_FLAT" else {}
    _check(lance_dfaiss.open_index(dataset), dataset, FILTERS[::2], **widths)
    dataset = _change(dataset)
    index = lance_dfaiss.open_index(dataset)
    stats = index.stats()
    assert stats.mapped_rows > 100
    assert stats.tail_rows == dataset.count_rows("number >= 1000") + 38 > 40
    assert stats.masked_rows > 50
    _check(index, dataset, FILTERS, **widths)
    # Without the tail: only rows of the index.
    tail = {
        (f.fragment_id << 32) + o
        for f in index.view.snapshot.tail
        for o in (range(f.state.physical_rows) if f.offsets is None else f.offsets.tolist())
    }
    truth = _matches(dataset, "number >= 0")
    row_ids = index.knn(clustered(1, DIM, 3), 1000, filter="number >= 0", include_tail=False)[1]
    assert (row_ids != MISSING_ROW_ID).sum() == len(truth) - stats.tail_rows
    assert stable or not tail & set(row_ids.ravel().tolist())


@pytest.mark.parametrize("few", [True, False], ids=["as vectors", "by mask"])
@pytest.mark.parametrize("name", EVERY_INDEX)
def test_every_type_finds_as_many_as_there_are(
    changed: Callable[[str], Index], name: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, filters = changed(name), ["id IN (1, 2, 1004)", "number < 20", "number >= 1"]
    if not few:
        monkeypatch.setattr("lance_dfaiss.search.view._EXACT_BYTES", -1)
        filters = [f"({sql})" for sql in filters]  # none that was worked out before
    _check(index, index.view.pinned.lance, filters, exact=False)
    if few and name in ("FLAT", "IVF_FLAT", "HNSW_FLAT"):
        # Few matches are compared one by one, whatever the default widths.
        _check(index, index.view.pinned.lance, filters[:2])


def test_every_selectivity(tmp_path: Path) -> None:
    plain = make_dataset(tmp_path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=150)
    dataset = lance_dfaiss.create_index(plain, "vec", "IVF_FLAT", num_partitions=8)
    _check(lance_dfaiss.open_index(dataset), dataset, [f"id >= {ROWS - rows}" for rows in (0, 1, 2, 30, 300, 599, 600)])


def test_vectors_that_are_null_match_no_filter(tmp_path: Path) -> None:
    values = clustered(100, DIM, 1)
    values[40:60] = np.nan
    plain = make_dataset(tmp_path / "d", fixed_size(values, null=[1, 2]))
    dataset = lance_dfaiss.create_index(plain, "vec", "FLAT")
    more = pa.table({"id": pa.array(range(200, 220), pa.int64()), "vec": fixed_size(values[30:50], null=[0])})
    dataset = lance.write_dataset(more, dataset.uri, mode="append")
    index = lance_dfaiss.open_index(dataset)
    _check(index, dataset, ["true", "id < 3", "vec IS NULL", "id >= 35 AND id < 65", "id > 190"])


def test_filters_on_the_system_columns(tmp_path: Path) -> None:
    plain = make_dataset(tmp_path / "d", clustered(100, DIM, 1), rows_per_fragment=30, stable=True)
    dataset = lance_dfaiss.create_index(plain, "vec", "FLAT")
    dataset.update({"id": "id + 500"}, where="id = 7")
    for columns in ((), ("id",)):
        index = lance_dfaiss.open_index(dataset, filter_columns=columns)
        for sql in (
            "_rowid < 20",
            f"_row_last_updated_at_version = {dataset.version}",
            "_rowaddr > 4294967296 AND id > 3",
        ):
            found = index.search(clustered(1, DIM, 2)[0], 200, filter=sql, columns=["id"])
            expected = dataset.to_table(columns=["id"], filter=sql)["id"].to_pylist()
            assert sorted(found["id"].to_pylist()) == sorted(expected) != []


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("errors") / "d"
    plain = make_dataset(path, clustered(100, DIM, 1), rows_per_fragment=30, **_columns(range(100)))
    return lance_dfaiss.open_index(lance_dfaiss.create_index(plain, "vec", "FLAT"), filter_columns=["number"])


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("", "expected: an expression"),
        ("  ", "expected: an expression"),
        ("number >", "expected: an expression"),
        ("number > 3 AND (id < 5", "sql parser error"),
        ("id IN ()", "expected: an expression"),
        ("id", "does not return a boolean"),
        ("number", "does not return a boolean"),
        ("word = 3", "could not convert"),
        ("number = 'x'", "could not convert"),
        ("nofunction(id) = 3", "nofunction"),
        ("10 / (id - id) = 1", "divide by zero"),
        ("10 / (number - number) = 1", "divide by zero"),
        ("cast(word AS int) = 1", "cast"),
    ],
)
def test_lance_says_what_is_wrong_with_a_filter(index: Index, sql: str, says: str) -> None:
    query = clustered(1, DIM, 2)[0]
    for search in (index.knn, index.search, index.explain):
        with pytest.raises(InvalidFilter) as caught:
            search(query, 3, filter=sql)
        assert says in caught.value.message.lower()
        assert repr(sql) in caught.value.message
        assert ".rs:" not in str(caught.value)
        assert (caught.value.parameter, caught.value.value) == ("filter", sql)
    with pytest.raises(InvalidFilter):
        index.range_search(query, 3.0, filter=sql)


@pytest.mark.parametrize("sql", ["nope = 3", "number > 3 AND nope IS NULL", "_distance < 3", "meta.inner.nope = 1"])
def test_a_column_that_does_not_exist(index: Index, sql: str) -> None:
    expected = InvalidArgument if "." in sql else UnknownColumn
    with pytest.raises((UnknownColumn, InvalidFilter)) as caught:
        index.search(clustered(1, DIM, 2)[0], 3, filter=sql)
    if expected is UnknownColumn:
        assert isinstance(caught.value, UnknownColumn)
        assert caught.value.available == ("id", "vec", "number", "word", "meta")
        assert caught.value.column in sql
    assert "nope" in str(caught.value) or "_distance" in str(caught.value)


@pytest.mark.parametrize("given_filter", [3, True, b"id > 3", ["id > 3"], np.str_, {"id": 3}], ids=repr)
def test_what_is_no_string_is_no_filter(index: Index, given_filter: Any) -> None:
    with pytest.raises(InvalidArgument, match="SQL in a string") as caught:
        index.knn(clustered(1, DIM, 2), 3, filter=given_filter)
    assert caught.value.parameter == "filter"


def test_a_failing_disk_is_not_blamed_on_the_filter(tmp_path: Path) -> None:
    plain = make_dataset(tmp_path / "d", clustered(100, DIM, 1))
    opened = lance_dfaiss.open_index(lance_dfaiss.create_index(plain, "vec", "FLAT"))
    for file in (tmp_path / "d" / "data").iterdir():
        file.unlink()
    with pytest.raises(StorageError):
        opened.knn(clustered(1, DIM, 2), 3, filter="id > 3")


def _count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note every filter that the dataset is asked for."""
    asked: list[str] = []
    matching = PinnedDataset.matching

    def noted(self: PinnedDataset, filter_sql: str, fragment_ids: Any = None) -> Any:
        asked.append(filter_sql)
        return matching(self, filter_sql, fragment_ids)

    monkeypatch.setattr(PinnedDataset, "matching", noted)
    return asked


def test_a_filter_is_evaluated_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _count(monkeypatch)
    query = clustered(1, DIM, 2)[0]
    for _ in range(3):
        index.knn(query, 3, filter="word = 'w1'")
        index.search(query, 3, filter="word = 'w1'")
        index.range_search(query, 1e9, filter="word = 'w1'")
    assert asked == ["word = 'w1'"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: index.knn(query, 5, filter=f"word = 'w{i % 3}'")[1].tolist(), range(30)))
    assert all(answers[i] == answers[i % 3] for i in range(30))


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_filter_columns_answer_without_reading_and_stay_right(
    tmp_path: Path, stable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_dataset(
        tmp_path / "d", clustered(300, DIM, 1), rows_per_fragment=70, stable=stable, **_columns(range(300))
    )
    dataset = lance_dfaiss.create_index(plain, "vec", "FLAT")
    first = dataset.version
    dataset.delete("id < 20")
    index = lance_dfaiss.open_index(dataset, filter_columns=["number", "meta.inner.depth", "number"])
    asked = _count(monkeypatch)
    held = [
        "number < 30",
        "number IS NULL",
        "meta.inner.depth > 50",
        "meta IS NULL AND number > 5",
        "NUMBER < 3",
        "true",
    ]

    def check(note: str) -> None:
        dataset.checkout_latest()  # type: ignore[no-untyped-call]
        assert index.refresh(), note
        asked.clear()
        _check(index, dataset, held)
        assert asked == [], note
        index.knn(clustered(1, DIM, 2), 3, filter="word = 'w1' AND number > 3")
        assert asked == ["word = 'w1' AND number > 3"], note

    dataset.delete("id % 7 = 2")
    check("deleted")
    lance.write_dataset(_table(range(1000, 1030), 4), dataset.uri, mode="append")
    check("appended")
    dataset.update({"number": "number + 25"}, where="id % 4 = 0")
    check("updated")
    changed = pa.table({"id": pa.array(range(60, 200), pa.int64()), "number": pa.array([7] * 140, pa.int32())})
    dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(changed)
    check("written in place")
    dataset.optimize.compact_files(target_rows_per_fragment=1000)
    check("compacted")
    dataset.add_columns({"twice": "number * 2"})
    check("a column more")
    lance.write_dataset(_table(range(2000, 2010), 4).select(["id", "vec"]), dataset.uri, mode="append")
    check("appended without the columns")
    lance.dataset(dataset.uri, version=first).restore()  # type: ignore[no-untyped-call]
    check("restored")


def test_filter_columns_that_are_renamed_or_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_dataset(tmp_path / "d", clustered(100, DIM, 1), rows_per_fragment=30, **_columns(range(100)))
    dataset = lance_dfaiss.create_index(plain, "vec", "FLAT")
    index = lance_dfaiss.open_index(dataset, filter_columns=["number", "word"])
    asked = _count(monkeypatch)
    changes: Any = [{"path": "number", "name": "old"}, {"path": "id", "name": "number"}]
    dataset.alter_columns(changes[0])
    index.refresh()
    _check(index, dataset, ["old < 30"])
    with pytest.raises(UnknownColumn):
        index.knn(clustered(1, DIM, 2), 3, filter="number < 30")
    dataset.alter_columns(changes[1])  # another column takes the name
    dataset.drop_columns(["word"])
    index.refresh()
    asked.clear()
    found = index.search(clustered(1, DIM, 2)[0], 200, filter="number < 30", columns=["number"])
    assert sorted(found["number"].to_pylist()) == list(range(30))
    assert asked == []
    with pytest.raises(UnknownColumn):
        index.knn(clustered(1, DIM, 2), 3, filter="word = 'w1'")


def test_names_that_differ_only_in_case(tmp_path: Path) -> None:
    words = {"Word": pa.array(["a"] * 25 + ["b"] * 25), "word": pa.array(["c"] * 10 + ["d"] * 40)}
    dataset = lance_dfaiss.create_index(make_dataset(tmp_path / "d", clustered(50, DIM, 1), **words), "vec", "FLAT")
    for columns in ((), ("Word",), ("word",)):
        index = lance_dfaiss.open_index(dataset, filter_columns=columns)
        for sql, rows in (("Word = 'a'", 25), ("word = 'c'", 10), ("WORD = 'a'", 25), ("`word` = 'd'", 40)):
            assert index.search(clustered(1, DIM, 2)[0], 50, filter=sql, columns=[]).num_rows == rows, (columns, sql)


@pytest.mark.parametrize(
    ("columns", "error"), [(["nope"], UnknownColumn), ("number", InvalidArgument), ([3], InvalidArgument)]
)
def test_filter_columns_that_make_no_sense(index: Index, columns: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        lance_dfaiss.open_index(index.view.pinned.lance, filter_columns=columns)


def test_the_rewritten_column_of_a_filter_that_was_cached_is_read_again(tmp_path: Path) -> None:
    plain = make_dataset(tmp_path / "d", clustered(100, DIM, 1), rows_per_fragment=30, **_columns(range(100)))
    dataset = lance_dfaiss.create_index(plain, "vec", "FLAT")
    index = lance_dfaiss.open_index(dataset)
    _check(index, dataset, ["number < 50"])
    changed = pa.table({"id": pa.array(range(60), pa.int64()), "number": pa.array([90] * 60, pa.int32())})
    dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(changed)
    index.refresh()
    assert index.stats().tail_rows == 0
    _check(index, dataset, ["number < 50"])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=40), st.integers(1, 100))
def test_the_cache_stays_within_its_bytes(steps: list[tuple[int, int]], most: int) -> None:
    cache, held = FilterCache(most), dict[int, tuple[object, int]]()
    for key, size in steps:
        if size % 3 == 0:
            found = cache.get(key)
            assert found is (held[key][0] if key in held else None)
            if key in held:
                held[key] = held.pop(key)
            continue
        value = object()
        cache.put(key, value, size)
        held.pop(key, None)
        held[key] = (value, size)
        while sum(entry[1] for entry in held.values()) > most and len(held) > 1:
            del held[next(iter(held))]
        assert cache.ram_bytes == sum(entry[1] for entry in held.values())
        assert cache.ram_bytes <= max(most, size)
