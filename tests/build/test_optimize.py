"""`optimize_index` moves rows: afterwards an index is what one build over the same rows would have made."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss import engine, optimize_index
from lance_dfaiss.errors import BudgetExceeded, InvalidArgument
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.manifest import check_cover_disjoint
from lance_dfaiss.plan import encode_peak_bytes
from tests.build.living import (
    DIM,
    QUERIES,
    Living,
    answers,
    assert_as_encoded,
    assert_row_ids,
    assert_true,
    current_of,
    rows,
    tail_of,
)
from tests.support import clustered, make_dataset, same_rows

TYPES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": 5},
    "IVF_SQ": {"index_type": "IVF_SQ", "num_partitions": 5, "metric": "cosine"},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_partitions": 3, "num_sub_vectors": 4},
    "IVF_PQ 4 bit": {"index_type": "IVF_PQ", "num_partitions": 3, "num_bits": 4, "refine": "sq8"},
    "OPQ": {"factory": "OPQ4_8,IVF3,PQ4x4fs,RFlat"},
    "RaBitQ": {"index_type": "IVF_RQ", "num_partitions": 3, "metric": "dot"},
}


@pytest.mark.parametrize("kind", TYPES)
def test_a_merge_of_merges_is_one_build(kind: str, tmp_path: Path) -> None:
    seed = len(kind)
    stable = seed % 2 == 0
    living = Living(tmp_path / "d", stable=stable, seed=seed)
    dataset = living.dataset
    lance_dfaiss.create_index(dataset, "vec", **TYPES[kind], num_shards=2)
    for _ in range(2):
        living.append()
        living.index()
        done = [living.step() for _ in range(4)]
        before, tail, found = current_of(dataset), tail_of(dataset), answers(dataset)
        report = optimize_index(dataset, max_dead_share=0)
        after = current_of(dataset)
        assert report.generation == after.manifest.generation, done
        assert report.shards_before == len(before.manifest.shards)
        assert report.shards_after == len(after.manifest.shards)
        assert report.dropped_rows == before.resolution.snapshot.masked_rows
        assert report.changed == (before.manifest.generation != after.manifest.generation)
        assert after.manifest.parent == (before.manifest.generation if report.changed else before.manifest.parent)
        assert tail_of(dataset) == tail
        same_rows(answers(dataset), found)
        assert_as_encoded(dataset)
        if stable:
            assert_row_ids(dataset)
        again = optimize_index(dataset, max_dead_share=0)
        assert (again.changed, again.dropped_rows, again.generation) == (False, 0, report.generation)
    assert lance_dfaiss.verify_index(dataset) == []


@pytest.fixture
def aged(tmp_path: Path) -> lance.LanceDataset:
    """Three shards of 100 rows, four updates of 20 rows, a third of all deleted; FLAT."""
    dataset = make_dataset(tmp_path / "d", clustered(300, DIM, 1), rows_per_fragment=100)
    lance_dfaiss.create_index(dataset, "vec", "FLAT", num_shards=3)
    for first in range(300, 380, 20):
        dataset.insert(rows(first, clustered(20, DIM, first)), mode="append")
        lance_dfaiss.update_index(dataset)
    dataset.delete("id % 3 = 0")
    return dataset


def test_only_what_is_worth_it_is_rewritten(aged: lance.LanceDataset) -> None:
    built = current_of(aged).manifest.shards[:3]
    report = optimize_index(aged, max_dead_share=0.5)
    assert (report.shards_before, report.shards_after) == (7, 4)
    assert report.dropped_rows == 27, "those of the four updates"
    assert current_of(aged).manifest.shards[:3] == built, "the full build's shards are shared"
    assert_true(aged)
    report = optimize_index(aged)
    assert (report.shards_after, report.dropped_rows) == (1, 100)
    assert_true(aged)
    assert not optimize_index(aged).changed


def test_of_shards_that_stay_it_is_written_down_where_their_rows_went(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=50)
    lance_dfaiss.create_index(dataset, "vec", "FLAT", num_shards=2)
    for first in (200, 210):
        dataset.insert(rows(first, clustered(10, DIM, first)), mode="append")
        lance_dfaiss.update_index(dataset)
    old = current_of(dataset).resolution.records
    dataset.optimize.compact_files(target_rows_per_fragment=100)
    assert [fragment.count_rows() for fragment in dataset.get_fragments()] == [100, 120]
    assert optimize_index(dataset).shards_after == 2
    new = current_of(dataset).resolution.records
    assert new[0].index == old[0].index, "the other one shares a fragment with what was added"
    dataset.cleanup_old_versions(timedelta(0))
    assert tail_of(dataset) == set()
    assert_true(dataset)


@pytest.mark.parametrize("kind", ["HNSW_FLAT", "HNSW_SQ"])
def test_graphs_are_encoded_again(kind: Any, tmp_path: Path) -> None:
    living = Living(tmp_path / "d", stable=True, seed=3)
    dataset = living.dataset
    lance_dfaiss.create_index(dataset, "vec", kind, num_shards=2)
    for _ in range(2):
        living.append()
        living.index()
    living.append()
    living.delete()
    living.compact()
    tail = tail_of(dataset)
    report = optimize_index(dataset, max_dead_share=0)
    current = current_of(dataset)
    assert report.changed
    assert report.dropped_rows > 0
    assert current.resolution.snapshot.masked_rows == 0
    assert tail_of(dataset) == tail
    assert len(tail) > 0
    check_cover_disjoint(current.resolution.records)
    assert_row_ids(dataset)
    if kind == "HNSW_FLAT":
        assert_true(dataset)
    assert not optimize_index(dataset, max_dead_share=0).changed


@pytest.mark.parametrize("compacted", [False, True])
def test_rows_without_an_entry_stay_covered(compacted: bool, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(100, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT", metric="cosine")
    bad = clustered(9, DIM, 2)
    bad[3], bad[5], bad[6] = 0, np.nan, np.inf
    for first, null in ((100, (0, 1)), (109, tuple(range(9)))):
        dataset.insert(rows(first, bad, null=null), mode="append")
        lance_dfaiss.update_index(dataset)
    if compacted:
        dataset.optimize.compact_files()
    assert optimize_index(dataset).shards_after == (1 if compacted else 2)
    skipped = current_of(dataset).manifest.skipped
    assert (skipped.null, skipped.non_finite, skipped.zero) == (2 + 9, 2, 1)
    assert not lance_dfaiss.update_index(dataset).changed
    assert_true(dataset, "cosine")
    # Rows of which nothing is left but one without an entry: the shard stays, for update_index to leave it alone.
    dataset.delete("id >= 100 AND id < 109 OR id > 109")
    optimize_index(dataset)
    assert not lance_dfaiss.update_index(dataset).changed
    assert not optimize_index(dataset).changed


def test_shards_without_rows_go(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=100)
    lance_dfaiss.create_index(dataset, "vec", "FLAT", num_shards=2)
    dataset.delete("id < 100")
    report = optimize_index(dataset, max_dead_share=1)
    assert (report.shards_before, report.shards_after, report.dropped_rows) == (2, 1, 100)
    assert_true(dataset)
    dataset.delete("true")
    for _ in range(2):
        report = optimize_index(dataset)
        assert (report.changed, report.shards_after) == (False, 1), "an index keeps a shard"
    dataset.insert(rows(500, clustered(10, DIM, 5)), mode="append")
    assert_true(dataset)


def test_rows_that_come_back_are_searched(aged: lance.LanceDataset) -> None:
    before = aged.version - 1
    optimize_index(aged)
    name, key = "vec_idx", "lance_dfaiss.vec_idx"
    optimized = aged.metadata[key]
    aged.checkout_version(before).restore()  # type: ignore[no-untyped-call]
    aged.checkout_latest()  # type: ignore[no-untyped-call]
    PinnedDataset(aged).commit_pointer(name, aged.metadata[key], optimized, ours="")
    assert_true(aged)
    assert len(tail_of(aged)) == 127
    lance_dfaiss.update_index(aged)
    assert tail_of(aged) == set()
    assert_true(aged)
    optimize_index(aged, max_dead_share=0)
    assert_true(aged)


def test_old_versions_keep_answering(aged: lance.LanceDataset) -> None:
    version = aged.version
    reader = lance_dfaiss.open_index(aged)
    before = reader.knn(QUERIES, 5)
    aged.optimize.compact_files()
    optimize_index(aged, max_dead_share=0)
    same_rows(reader.knn(QUERIES, 5), before)
    same_rows(lance_dfaiss.open_index(lance.dataset(aged.uri, version=version)).knn(QUERIES, 5), before)
    assert reader.refresh()
    assert_true(aged)
    lance_dfaiss.rollback(aged)
    assert_true(aged)


def test_each_task_loads_the_shards_it_needs(aged: lance.LanceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = engine.load_shard

    def counting(*args: Any, **options: Any) -> Any:
        loaded.append(args[2].name)
        return load(*args, **options)

    monkeypatch.setattr(engine, "load_shard", counting)
    cost = engine.footprint("Flat", DIM, "l2", None)
    old = current_of(aged).resolution.records
    largest = max(record.index.length_bytes for record in old)
    for workers in (1, 2):
        handle, budget = aged, encode_peak_bytes(cost, 200) + largest
        report = optimize_index(handle, max_dead_share=0, memory_budget_bytes=budget, num_workers=workers)
        assert report.shards_after == 2
        assert sorted(loaded) == sorted(record.index.name for record in old), "each one, once"
        new = current_of(aged).resolution.records
        assert all(record.cover.physical_rows <= 200 for record in new)
        assert_true(aged)
        loaded.clear()
        lance_dfaiss.rollback(aged)
    aged.optimize.compact_files()
    with pytest.raises(BudgetExceeded, match="the old one that its rows are moved from") as caught:
        optimize_index(aged, memory_budget_bytes=encode_peak_bytes(cost, 200) + largest)
    assert optimize_index(aged, memory_budget_bytes=caught.value.needed_bytes).shards_after == 1


def test_a_place_outside_the_dataset(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(100, DIM, 1))
    where: dict[str, Any] = {"index_uri": str(tmp_path / "elsewhere")}
    lance_dfaiss.create_index(dataset, "vec", "FLAT", **where)
    for first in (100, 110):
        dataset.insert(rows(first, clustered(10, DIM, first)), mode="append")
        lance_dfaiss.update_index(dataset, **where)
    assert optimize_index(dataset, **where).shards_after == 2
    assert_true(dataset, **where)
    assert optimize_index(dataset, retrain=True, **where).shards_after == 1
    assert_true(dataset, **where)
    assert not (tmp_path / "d" / "_dfaiss").exists()


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "0.5", float("nan")])
def test_no_share(share: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="between 0 and 1") as caught:
        optimize_index(tmp_path, max_dead_share=share)
    assert caught.value.parameter == "max_dead_share"
