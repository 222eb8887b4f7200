"""refresh(): the newest version and generation, sharing all that is the same."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import engine
from lance_dfaiss.errors import CorruptIndex, DatasetChanged, IndexNotFound
from lance_dfaiss.search.index import Index
from tests.support import Exact, assert_exact, clustered, fixed_size, make_dataset, same_rows

DIM, ROWS = 16, 400


def _append(uri: str, ids: range, seed: int = 5) -> None:
    rows = pa.table({"id": pa.array(ids, pa.int64()), "vec": fixed_size(clustered(len(ids), DIM, seed))})
    lance.write_dataset(rows, uri, mode="append")


def _built(path: Path, *, stable: bool = False, **asked: Any) -> lance.LanceDataset:
    plain = make_dataset(path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=100, stable=stable)
    return lance_dfaiss.create_index(plain, "vec", **{"index_type": "FLAT", "num_shards": 2, **asked})


def _check(index: Index, *, version: int | None = None) -> None:
    dataset, queries = index.view.pinned.lance, clustered(4, DIM, 2)
    if version is not None:
        assert index.version == dataset.version == version
    assert_exact(Exact(dataset, "l2"), queries, *index.knn(queries, 30), scale=500)


def _loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    loaded: list[str] = []
    load = engine.load_shard

    def noted(store: Any, model: Any, entry: Any, *rest: Any, **more: Any) -> Any:
        loaded.append(entry.name)
        return load(store, model, entry, *rest, **more)

    monkeypatch.setattr("lance_dfaiss.engine.load_shard", noted)
    return loaded


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_moves_with_the_data_and_loads_nothing_again(
    tmp_path: Path, stable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = _built(tmp_path, stable=stable)
    index = lance_dfaiss.open_index(dataset)
    segments = [loaded.segment for loaded in index.view.loaded]
    loaded = _loads(monkeypatch)
    assert not index.refresh()
    _append(dataset.uri, range(1000, 1020))
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    steps: list[Any] = [
        lambda: None,
        lambda: dataset.delete("id % 9 = 2"),
        lambda: dataset.update({"id": "id + 5000"}, where="id % 50 = 7"),
        lambda: dataset.optimize.compact_files(target_rows_per_fragment=1000),
        lambda: dataset.cleanup_old_versions(datetime.timedelta(0)),
        lambda: dataset.add_columns({"twice": "id * 2"}),
        lambda: dataset.delete("id % 9 = 3"),
        lambda: dataset.optimize.compact_files(target_rows_per_fragment=1000, materialize_deletions_threshold=0.0),
        lambda: dataset.drop_columns(["twice"]),
    ]
    for step in steps:
        before = dataset.version
        step()
        changed = dataset.version != before or step is steps[0]
        assert index.refresh() is changed
        assert not index.refresh()
        _check(index, version=dataset.version)
        assert [loaded.segment for loaded in index.view.loaded] == segments
        assert all(a is b for a, b in zip((s.segment for s in index.view.loaded), segments, strict=True))
    assert loaded == []
    assert index.stats().mapped_rows > 300


def test_only_the_delta_of_an_update_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _built(tmp_path)
    index = lance_dfaiss.open_index(dataset)
    first = index.view.loaded[0].segment
    loaded = _loads(monkeypatch)
    for number in range(2):
        _append(dataset.uri, range(1000 * (number + 1), 1000 * (number + 1) + 30), number)
        report = lance_dfaiss.update_index(dataset)
        assert report.added_rows == 30
        loaded.clear()  # the update itself checks what it wrote
        assert index.refresh()
        assert len(loaded) == 1
        assert index.view.loaded[0].segment is first
        assert (index.stats().tail_rows, index.stats().segments) == (0, number + 2)
        _check(index, version=dataset.version)
    fresh = lance_dfaiss.open_index(dataset)
    queries = clustered(10, DIM, 3)
    same_rows(fresh.knn(queries, 40), index.knn(queries, 40))
    lance_dfaiss.rollback(dataset)
    loaded.clear()
    assert index.refresh()
    assert (loaded, index.stats().tail_rows) == ([], 30)
    _check(index)


def test_another_generation_altogether(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    index = lance_dfaiss.open_index(dataset)
    before = index.knn(clustered(2, DIM, 2), 5)
    lance_dfaiss.create_index(dataset.uri, "vec", "IVF_FLAT", num_partitions=4, metric="dot", replace=True)
    assert index.refresh()
    assert (index.stats().index_type, index.stats().metric, index.stats().defaults.nprobe is None) == (
        "IVF_FLAT", "dot", False,
    )  # fmt: skip
    truth, queries = Exact(index.view.pinned.lance, "dot"), clustered(4, DIM, 2)
    assert_exact(truth, queries, *index.knn(queries, 10, nprobe=4), scale=500)
    old = lance_dfaiss.open_index(dataset.checkout_version(dataset.version - 0))
    assert old.knn(clustered(2, DIM, 2), 5)[0].shape == before[0].shape


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_a_column_that_was_renamed_or_cast(tmp_path: Path, stable: bool) -> None:
    dataset = _built(tmp_path, stable=stable)
    index = lance_dfaiss.open_index(dataset)
    half = pa.list_(pa.float16(), DIM)
    changes: Any = [{"path": "vec", "name": "emb"}, {"path": "emb", "name": "vec", "data_type": half}]
    dataset.alter_columns(changes[0])
    assert index.refresh()
    truth, queries = Exact(dataset, "l2", "emb"), clustered(4, DIM, 2)
    assert index.stats().tail_rows == 0
    assert_exact(truth, queries, *index.knn(queries, 10), scale=500)
    assert index.search(queries[0], 3, columns=["id"], with_vectors=True).column_names == [
        "id", "emb", "_distance", "_rowid",
    ]  # fmt: skip
    dataset.alter_columns(changes[1])
    assert index.refresh()
    truth = Exact(dataset, "l2")
    assert index.stats().tail_rows == ROWS
    assert_exact(truth, queries, *index.knn(queries, 10), scale=500)


def test_a_column_that_was_dropped_leaves_the_index_where_it_was(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    index = lance_dfaiss.open_index(dataset)
    version, expected = index.version, index.knn(clustered(3, DIM, 2), 5)
    dataset.drop_columns(["vec"])
    for _ in range(2):
        with pytest.raises(DatasetChanged, match="no vector column 'vec'") as caught:
            index.refresh()
        assert caught.value.remedy
        assert index.version == version
        same_rows(index.knn(clustered(3, DIM, 2), 5), expected)
    with pytest.raises(DatasetChanged):
        lance_dfaiss.open_index(dataset)
    dataset.add_columns(pa.table({"vec": fixed_size(clustered(ROWS, DIM + 1, 1))}).to_reader())
    with pytest.raises(DatasetChanged, match=f"dimension {DIM + 1}"):
        index.refresh()
    dataset.drop_columns(["vec"])
    dataset.add_columns(pa.table({"vec": fixed_size(clustered(ROWS, DIM, 8))}).to_reader())
    assert index.refresh()
    assert index.stats().tail_rows == ROWS
    _check(index)


@pytest.mark.parametrize("also", ["cast", "anew", "in place"])
def test_row_ids_alone_do_not_vouch_for_values_that_were_written_anew(tmp_path: Path, also: str) -> None:
    dataset = _built(tmp_path, stable=True)
    dataset.add_columns({"twice": "id * 2"})
    cast: Any = {"path": "vec", "data_type": pa.list_(pa.float16(), DIM)}
    if also == "cast":
        dataset.alter_columns(cast)
    elif also == "anew":
        dataset.drop_columns(["vec"])
        dataset.add_columns(pa.table({"vec": fixed_size(clustered(ROWS, DIM, 8))}).to_reader())
    else:
        rows = pa.table({"id": pa.array(range(50, 150), pa.int64()), "vec": fixed_size(clustered(100, DIM, 9))})
        dataset.merge_insert("id").when_matched_update_all().write_mode("rewrite_columns").execute(rows)
    dataset.optimize.compact_files(target_rows_per_fragment=1000)
    dataset.update_metadata({"key": "value"})
    dataset.cleanup_old_versions(datetime.timedelta(0))
    index = lance_dfaiss.open_index(dataset)
    _check(index, version=dataset.version)
    assert index.stats().live_rows <= (ROWS - 100 if also == "in place" else 0)


def test_row_ids_alone_find_rows_when_history_is_gone(tmp_path: Path) -> None:
    dataset = _built(tmp_path, stable=True)
    dataset.update({"id": "id + 5000"}, where="id % 40 = 1")
    dataset.delete("id % 9 = 2")
    dataset.optimize.compact_files(target_rows_per_fragment=1000)
    for number in range(3):
        dataset.update_metadata({"number": str(number)})
    dataset.cleanup_old_versions(datetime.timedelta(0))
    index = lance_dfaiss.open_index(dataset)
    stats = index.stats()
    assert stats.tail_rows == dataset.count_rows("id > 5000") > 0
    assert stats.mapped_rows == stats.live_rows == dataset.count_rows() - stats.tail_rows
    _check(index, version=dataset.version)


def test_without_stable_row_ids_they_are_read(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    dataset.optimize.compact_files(target_rows_per_fragment=1000)
    dataset.update_metadata({"key": "value"})
    dataset.cleanup_old_versions(datetime.timedelta(0))
    index = lance_dfaiss.open_index(dataset)
    assert (index.stats().live_rows, index.stats().tail_rows) == (0, ROWS)
    _check(index)


def test_an_index_that_is_gone_or_damaged_leaves_the_open_one(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    index = lance_dfaiss.open_index(dataset)
    expected = index.knn(clustered(3, DIM, 2), 5)
    _append(dataset.uri, range(1000, 1030))
    lance_dfaiss.update_index(dataset)
    newest = lance_dfaiss.open_index(dataset).manifest.generation
    manifest = next(iter((tmp_path / "d" / "_dfaiss").rglob(f"*{newest}*/manifest*.json")))
    text = manifest.read_bytes()
    manifest.write_bytes(text[:-20])
    with pytest.raises(CorruptIndex):
        index.refresh()
    same_rows(index.knn(clustered(3, DIM, 2), 5), expected)
    manifest.write_bytes(text)
    assert index.refresh()
    lance_dfaiss.drop_index(lance.dataset(dataset.uri), "vec_idx")
    with pytest.raises(IndexNotFound):
        index.refresh()
    _check(index)


def test_searches_that_run_meanwhile_see_one_version_or_the_other(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    index = lance_dfaiss.open_index(dataset, filter_columns=["id"])
    # Every version has one vector right at the query, and its id is the number of the version's round.
    query = np.full(DIM, 100, dtype=np.float32)

    def mark(number: int) -> None:
        spot = pa.table({"id": pa.array([10_000 + number], pa.int64()), "vec": fixed_size(query[None])})
        lance.write_dataset(spot, dataset.uri, mode="append")

    mark(0)
    index.refresh()
    stop, failures, seen = threading.Event(), list[str](), set[int]()

    def ask() -> None:
        while not stop.is_set():
            table = index.search(query, 2, columns=["id"], filter="id >= 0")
            distances, ids = table["_distance"].to_pylist(), table["id"].to_pylist()
            if distances[0] != 0 or distances[1] < 1000 or ids[0] < 10_000:
                failures.append(f"{ids} at {distances}")
            seen.add(ids[0])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 8):
            newest = lance.dataset(dataset.uri)
            # One commit takes the old mark away and brings the new one: no version has both or none.
            new = pa.table({"id": pa.array([10_000 + number], pa.int64()), "vec": fixed_size(query[None])})
            merge = newest.merge_insert("id").when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(f"id = {10_000 + number - 1}").execute(new)
            if number == 4:
                lance_dfaiss.update_index(dataset.uri)
            assert index.refresh()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert seen <= set(range(10_000, 10_008))
    assert index.search(query, 1, columns=["id"])["id"].to_pylist() == [10_007]
