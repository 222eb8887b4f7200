"""`optimize_index(retrain=True)`: a new model of the same settings, over the rows as they are now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss import optimize_index
from lance_dfaiss.errors import CommitConflict, InsufficientData, InvalidArgument
from tests.build.living import DIM, assert_true, current_of, rows, tail_of
from tests.build.test_build_changes import Until
from tests.support import clustered, make_dataset

TYPES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT"},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_partitions": 4, "num_bits": 4, "metric": "cosine", "seed": 5},
    "coarse": {"index_type": "IVF_FLAT", "num_partitions": 6, "coarse": "hnsw", "sample_rate": 64},
    "factory": {"factory": "PCA4,IVF4,SQ8,RFlat", "metric": "dot"},
    "HNSW": {"index_type": "HNSW_SQ"},
}


@pytest.mark.parametrize("kind", TYPES)
def test_settings_stay_and_everything_else_is_new(kind: str, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1), rows_per_fragment=100)
    lance_dfaiss.create_index(dataset, "vec", **TYPES[kind], num_shards=2)
    dataset.insert(rows(200, clustered(100, DIM, 2)), mode="append")
    lance_dfaiss.update_index(dataset)
    dataset.insert(rows(300, clustered(50, DIM, 3)), mode="append")
    dataset.delete("id % 4 = 0")
    before = current_of(dataset)
    report = optimize_index(dataset, retrain=True)
    after = current_of(dataset)
    old, new = before.manifest, after.manifest
    assert new.spec == old.spec
    assert (new.name, new.dataset.column, new.parent) == (old.name, old.dataset.column, old.generation)
    assert after.generation.found.pointer.previous == old.generation
    assert (report.changed, report.generation) == (True, new.generation)
    assert (report.shards_before, report.shards_after, report.dropped_rows) == (3, 1, 75)
    # What a build of the same over the same rows makes.
    again = lance_dfaiss.create_index(dataset, "vec", name="again", **TYPES[kind])
    expected = current_of(again, name="again").manifest
    assert new.model.fingerprint == expected.model.fingerprint
    assert new.spec == expected.spec
    assert [s.indexed_rows for s in new.shards] == [s.indexed_rows for s in expected.shards]
    assert (new.recall is None) == (expected.recall is None)
    assert tail_of(lance_dfaiss.drop_index(dataset, "again") or dataset) == set()
    lance_dfaiss.rollback(dataset)
    assert current_of(dataset).manifest.generation == old.generation


def test_a_model_that_no_longer_fits_is_replaced(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(400, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "IVF_SQ", num_partitions=8)
    dataset.insert(rows(400, clustered(400, DIM, 2) + 30), mode="append")
    drift = lance_dfaiss.update_index(dataset).drift
    assert drift is not None
    assert drift > 5
    optimize_index(dataset, retrain=True)
    dataset.insert(rows(800, clustered(400, DIM, 2) + 30), mode="append")
    drift = lance_dfaiss.update_index(dataset).drift
    assert drift is not None
    assert drift < 2


def test_given_centroids_are_not_kept(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1))
    given = np.zeros((2, DIM), dtype=np.float32)
    given[1] = 1
    lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", ivf_centroids=given)
    old = current_of(dataset).manifest.model.fingerprint
    optimize_index(dataset, retrain=True)
    assert current_of(dataset).manifest.model.fingerprint.centroids != old.centroids
    assert_true(dataset)


def _generations(dataset: lance.LanceDataset) -> set[str]:
    return {path.name for path in Path(dataset.uri, "_dfaiss").iterdir()}


def test_too_few_rows_leave_the_old_index(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", num_partitions=20)
    dataset.delete("id >= 10")
    before = _generations(dataset)
    with pytest.raises(InsufficientData):
        optimize_index(dataset, retrain=True)
    assert _generations(dataset) == before
    assert_true(dataset)


@pytest.mark.parametrize("what", ["update", "drop", "error"])
def test_what_did_not_win_leaves_nothing(what: str, tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", clustered(200, DIM, 1))
    lance_dfaiss.create_index(dataset, "vec", "FLAT")
    dataset.insert(rows(200, clustered(10, DIM, 2)), mode="append")

    def act() -> None:
        if what == "update":
            lance_dfaiss.update_index(dataset.uri)
        elif what == "drop":
            lance_dfaiss.drop_index(dataset.uri, "vec_idx")
        else:
            raise InvalidArgument("enough", parameter="x", value=0)

    with pytest.raises(InvalidArgument if what == "error" else CommitConflict):
        optimize_index(dataset.uri, retrain=True, progress=Until("check", 0, act))
    dataset.checkout_latest()  # type: ignore[no-untyped-call]
    if what == "drop":
        assert lance_dfaiss.list_indices(dataset) == []
        return
    current = current_of(dataset).manifest
    named = {current.generation, *({current.parent} if current.parent else set())}
    assert _generations(dataset) == named
    assert_true(dataset)
