"""`update_index` encodes exactly the rows that no shard covers."""

from __future__ import annotations

import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss import update_index
from lance_dfaiss.errors import BudgetExceeded, CommitConflict, DatasetChanged, InvalidArgument, InvalidVectors
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
from tests.build.processes import Meeting, Nursery
from tests.build.test_build_changes import Until
from tests.support import clustered, make_dataset, same_rows

TYPES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT", "metric": "cosine"},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": 5, "metric": "dot"},
    "IVF_SQ": {"index_type": "IVF_SQ", "num_partitions": 5, "refine": "fp16"},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_partitions": 3, "num_sub_vectors": 4},
    "IVF_PQ 4 bit": {"index_type": "IVF_PQ", "num_partitions": 3, "num_bits": 4},
    "OPQ": {"factory": "OPQ4_8,IVF3,PQ4x4fs,RFlat"},
    "IVF_RQ": {"index_type": "IVF_RQ", "num_partitions": 3},
    "HNSW_FLAT": {"index_type": "HNSW_FLAT"},
    "HNSW_SQ": {"index_type": "HNSW_SQ"},
}


def _built(path: Path, *, rows: int = 200, stable: bool = False, **options: Any) -> lance.LanceDataset:
    dataset = make_dataset(path / "d", clustered(rows, DIM, 1), rows_per_fragment=100, stable=stable)
    lance_dfaiss.create_index(dataset, "vec", **{"index_type": "FLAT", **options})
    return dataset


def _append(dataset: lance.LanceDataset, first: int, count: int, **options: Any) -> None:
    dataset.insert(rows(first, clustered(count, DIM, first), **options), mode="append")


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_takes_new_rows(kind: str, tmp_path: Path) -> None:
    dataset = _built(tmp_path, rows=300, stable=len(kind) % 2 == 0, **TYPES[kind])
    built = current_of(dataset).manifest
    _append(dataset, 300, 40)
    dataset.update({"id": "id"}, where="id % 20 = 3")
    report = update_index(dataset)
    manifest = current_of(dataset).manifest
    assert (report.changed, report.generation) == (True, manifest.generation)
    assert (report.added_rows, report.mapped_rows) == (40 + 15, 0)
    assert manifest.shards[: len(built.shards)] == built.shards, "old files are shared"
    assert manifest.model == built.model
    assert (manifest.parent, manifest.dataset.version) == (built.generation, dataset.version - 1)
    assert report.added_shards == len(manifest.shards) - len(built.shards)
    assert tail_of(dataset) == set()
    if kind in ("FLAT", "IVF_FLAT", "HNSW_FLAT"):
        assert_true(dataset, manifest.spec.metric)
    if "HNSW" not in kind:
        # Without the dead rows, every shard holds what encoding gives.
        lance_dfaiss.optimize_index(dataset, max_dead_share=0)
        assert_as_encoded(dataset)
    again = update_index(dataset)
    assert not again.changed
    assert (again.added_rows, again.added_shards, again.mapped_rows, again.drift) == (0, 0, 0, None)
    assert lance_dfaiss.verify_index(dataset) == []


@pytest.mark.parametrize("stable", [False, True])
def test_fragments_that_are_partly_covered(stable: bool, tmp_path: Path) -> None:
    """Compactions mix covered rows and rows of the tail; only the latter are encoded."""
    dataset = _built(tmp_path, stable=stable)
    _append(dataset, 200, 30)
    dataset.delete("id % 7 = 0")
    dataset.optimize.compact_files()
    assert len(dataset.get_fragments()) == 1
    tail = tail_of(dataset)
    assert len(tail) == 26
    report = update_index(dataset)
    assert (report.added_rows, report.mapped_rows) == (26, 171)
    record = current_of(dataset).resolution.records[-1]
    assert record.cover.physical_rows == 197
    assert record.skipped.deleted == 171, "what the other shard holds"
    assert tail_of(dataset) == set()
    assert_true(dataset)
    # The way through the compaction is written down.
    dataset.cleanup_old_versions(timedelta(0))
    assert tail_of(dataset) == set()
    assert_true(dataset)
    if stable:
        assert_row_ids(dataset)
    _append(dataset, 300, 10)
    dataset.optimize.compact_files()
    assert update_index(dataset).added_rows == 10
    assert_true(dataset)


def test_any_history_is_caught_up_with(tmp_path: Path) -> None:
    for seed in range(2):
        living = Living(tmp_path / str(seed), stable=bool(seed), seed=seed + 40)
        lance_dfaiss.create_index(living.dataset, "vec", "FLAT", num_shards=2)
        for _ in range(8):
            done = living.step()
            tail = tail_of(living.dataset)
            report = update_index(living.dataset)
            assert report.added_rows <= len(tail), done
            assert tail_of(living.dataset) == set()
            assert_true(living.dataset)
            assert not update_index(living.dataset).changed


def test_rows_that_come_back_after_a_restore(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=100)
    whole = dataset.version
    dataset.delete("id < 10")
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    pointer = dataset.metadata["lance_dfaiss.vec_idx"]
    dataset.checkout_version(whole).restore()  # type: ignore[no-untyped-call]
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    dataset.update_metadata({"lance_dfaiss.vec_idx": pointer})
    assert len(tail_of(dataset)) == 10
    assert_true(dataset)
    assert update_index(dataset).added_rows == 10
    assert_true(dataset)
    dataset.delete("id < 5")
    assert_true(dataset)


def test_a_shard_without_an_entry(tmp_path: Path) -> None:
    """Rows that cannot be indexed are covered all the same, so that nobody looks at them again."""
    dataset = _built(tmp_path, index_type="IVF_PQ", num_partitions=2, num_bits=4)
    bad = clustered(6, DIM, 2)
    bad[0], bad[1] = np.nan, np.inf
    dataset.insert(rows(200, bad, null=(2, 3, 4, 5)), mode="append")
    report = update_index(dataset)
    assert (report.changed, report.added_rows, report.added_shards, report.drift) == (True, 0, 1, None)
    skipped = current_of(dataset).resolution.records[-1].skipped
    assert (skipped.null, skipped.non_finite) == (4, 2)
    assert not update_index(dataset).changed
    index = lance_dfaiss.open_index(dataset)
    assert (index.stats().tail_rows, index.stats().indexed_rows) == (0, 200)
    found = answers(dataset)
    _append(dataset, 210, 5)
    update_index(dataset)
    assert lance_dfaiss.optimize_index(dataset).shards_after == 2
    assert current_of(dataset).manifest.skipped.null == 4
    dataset.delete("id >= 200")
    same_rows(answers(dataset), found)


def test_bad_rows_can_be_refused(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    _append(dataset, 200, 5, null=(2,))
    before = sorted(Path(dataset.uri, "_dfaiss").rglob("*"))
    with pytest.raises(InvalidVectors, match="1 null") as caught:
        update_index(dataset, on_invalid="error")
    assert caught.value.row_ids == ((2 << 32) + 2,)
    assert sorted(Path(dataset.uri, "_dfaiss").rglob("*")) == before
    assert update_index(dataset).added_rows == 4


def test_a_budget_divides_the_new_rows_or_is_too_small(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    for first in (200, 300, 400):
        _append(dataset, first, 100)
    before = sorted(Path(dataset.uri, "_dfaiss").rglob("*"))
    with pytest.raises(BudgetExceeded) as caught:
        update_index(dataset, memory_budget_bytes=1)
    assert sorted(Path(dataset.uri, "_dfaiss").rglob("*")) == before
    one = caught.value.needed_bytes
    report = update_index(dataset, memory_budget_bytes=one, num_workers=2)
    assert (report.added_rows, report.added_shards) == (300, 3)
    assert_true(dataset)


def test_drift_tells_of_other_data(tmp_path: Path) -> None:
    dataset = _built(tmp_path, index_type="IVF_SQ", num_partitions=8)
    dataset.insert(rows(200, clustered(200, DIM, 1)), mode="append")
    same = update_index(dataset).drift
    assert same == pytest.approx(1, abs=0.05)
    dataset.insert(rows(400, clustered(200, DIM, 1) + 20), mode="append")
    other = update_index(dataset).drift
    assert other is not None
    assert other > 5


def test_a_place_outside_the_dataset(tmp_path: Path) -> None:
    where: dict[str, Any] = {"index_uri": str(tmp_path / "elsewhere")}
    dataset = _built(tmp_path, **where)
    _append(dataset, 200, 10)
    assert update_index(dataset, **where).added_rows == 10
    assert_true(dataset, **where)
    assert not update_index(dataset, **where).changed


def test_old_versions_keep_answering(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    _append(dataset, 200, 10)
    version, before = dataset.version, answers(dataset)
    reader = lance_dfaiss.open_index(dataset)
    dataset.delete("id < 100")
    update_index(dataset)
    for index in (reader, lance_dfaiss.open_index(lance.dataset(dataset.uri, version=version))):
        same_rows(index.knn(QUERIES, 12), before)
    # The new generation answers for the old version, too.
    assert_true(dataset)


@pytest.mark.parametrize("by_path", [False, True])
def test_the_newest_version_counts(by_path: bool, tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    stale = lance.dataset(dataset.uri)
    _append(dataset, 200, 10)
    assert update_index(stale.uri if by_path else stale).added_rows == 10
    assert by_path or stale.version == lance.dataset(dataset.uri).version


def test_a_column_that_is_gone(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    dataset.drop_columns(["vec"])
    with pytest.raises(DatasetChanged, match="no vector column 'vec'"):
        update_index(dataset)


def test_bad_options(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [{"num_workers": 0}, {"memory_budget_bytes": -1}, {"on_invalid": "maybe"}]
    for options in bad:
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            update_index(tmp_path, **options)


def test_it_loses_to_another_writer(tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    _append(dataset, 200, 10)
    others: list[Callable[[], object]] = [
        lambda: update_index(dataset.uri),
        lambda: lance_dfaiss.create_index(dataset.uri, "vec", "FLAT", replace=True),
    ]
    for other in others:
        with pytest.raises(CommitConflict):
            update_index(dataset.uri, progress=Until("encode", 0, other))
        dataset.checkout_latest()  # type: ignore[no-untyped-call]
        manifest = current_of(dataset).manifest
        kept = {path.name for path in Path(dataset.uri, "_dfaiss").iterdir()}
        assert manifest.generation in kept
        assert all(Path(dataset.uri, "_dfaiss", name, "manifest.json").exists() for name in kept)
        assert_true(dataset)
        _append(dataset, 300, 10)


def test_of_two_processes_one_wins(nursery: Nursery, tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    _append(dataset, 200, 10)
    meeting = Meeting(tmp_path, ("a", "b"))
    started = [
        nursery.start("keep up", tmp_path, dataset=dataset.uri, action="update_index", meeting=path)
        for path in meeting.paths.values()
    ]
    for name in meeting.paths:
        meeting.wait(name)
    for name in meeting.paths:
        meeting.release(name)
    outcomes = [nursery.wait(each) for each in started]
    assert sorted(outcome.error for outcome in outcomes) == ["", "CommitConflict"], [o.trace for o in outcomes]
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    assert tail_of(dataset) == set()
    assert_true(dataset)


def test_killed_at_any_step_it_leaves_the_old_generation(nursery: Nursery, tmp_path: Path) -> None:
    dataset = _built(tmp_path)
    _append(dataset, 200, 10)
    generation, found = current_of(dataset).manifest.generation, answers(dataset)
    for stop in ("half of shard-00000.faiss", "after shard-00000.json", "half of manifest.json", "before pointer"):
        outcome = nursery.run("keep up", tmp_path, dataset=dataset.uri, action="update_index", stop=stop)
        assert outcome.signal_number == signal.SIGKILL, (stop, outcome.trace)
        dataset.checkout_latest()  # type: ignore[no-untyped-call]
        assert current_of(dataset).manifest.generation == generation
        same_rows(answers(dataset), found)
    assert update_index(dataset).added_rows == 10
    assert lance_dfaiss.verify_index(dataset) == []
