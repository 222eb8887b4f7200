"""A fragment that does not fit the budget becomes several shards; nobody can tell from the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import create_index
from lance_dfaiss.engine import footprint
from lance_dfaiss.errors import BudgetExceeded, StorageFull
from lance_dfaiss.plan import encode_peak_bytes
from lance_dfaiss.search.index import Index
from lance_dfaiss.storage import LocalStore
from tests.support import Exact, assert_exact, clustered, fixed_size, make_dataset, same_rows

DIM, ROWS = 4, 20_000
VECTORS = clustered(ROWS, DIM, 11)
QUERIES = clustered(12, DIM, 12)


def budget(factory: str, refine: Any = None, rows: int = 6_000) -> int:
    """Return what suffices for shards of so many rows."""
    return encode_peak_bytes(footprint(factory, DIM, "l2", refine), rows)


EXACT: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT", "memory_budget_bytes": budget("Flat")},
    "IVF_FLAT": {"index_type": "IVF_FLAT", "num_partitions": 4, "memory_budget_bytes": budget("IVF4,Flat")},
}
CODED: dict[str, dict[str, Any]] = {
    "IVF_SQ refined": {
        "index_type": "IVF_SQ",
        "num_partitions": 4,
        "refine": "flat",
        "memory_budget_bytes": budget("IVF4,SQ8", "flat"),
    },
    "HNSW_FLAT": {"index_type": "HNSW_FLAT", "memory_budget_bytes": budget("HNSW32,Flat")},
}


def write(path: Path, *, stable: bool = False) -> lance.LanceDataset:
    """Write one fragment with deleted and null rows, and a small one."""
    column = fixed_size(VECTORS, null=[0, 5_004, 19_997])
    dataset = make_dataset(path, column, rows_per_fragment=ROWS, stable=stable, number=pa.array(range(ROWS)))
    dataset.delete("id % 7 = 3 OR (id > 9000 AND id < 9500)")
    more = {"id": pa.array(range(ROWS, ROWS + 100)), "vec": fixed_size(clustered(100, DIM, 13))}
    return lance.write_dataset(pa.table({**more, "number": more["id"]}), dataset.uri, mode="append")


def parts(index: Index) -> list[list[tuple[int, int] | None]]:
    return [[cover.part for cover in record.cover.fragments] for record in index.view.generation.records]


def check(dataset: lance.LanceDataset, index: Index) -> None:
    truth = Exact(lance.dataset(dataset.uri), "l2")
    assert_exact(truth, QUERIES, *index.knn(QUERIES, 20, nprobe=4 if index.manifest.spec.num_partitions else None))
    assert len(index) == len(truth)


@pytest.mark.parametrize(
    ("kind", "stable"),
    [
        ("FLAT", False),
        ("IVF_FLAT", True),
        pytest.param("FLAT", True, marks=pytest.mark.nightly),
        pytest.param("IVF_FLAT", False, marks=pytest.mark.nightly),
    ],
)
def test_split_index_is_exact_and_stays_so(tmp_path: Path, kind: str, stable: bool) -> None:
    dataset = write(tmp_path / "d", stable=stable)
    dataset = create_index(dataset, "vec", **EXACT[kind], num_workers=2)
    index = lance_dfaiss.open_index(dataset)
    assert len(parts(index)) == 4
    assert all(rows[0] is not None for rows in parts(index))
    check(dataset, index)
    assert index.manifest.skipped.null == 3
    assert index.manifest.recall is None or index.manifest.recall.points[-1].recall > 0.9
    assert lance_dfaiss.verify_index(dataset) == []
    # What happens to the dataset afterwards happens to parts of fragments.
    dataset.delete("id IN (4999, 5000, 5002, 10000)")
    dataset.update({"number": "number + 1"}, where="id > 14000 AND id < 14100")
    assert index.refresh()
    assert index.stats().tail_rows > 0
    check(dataset, index)
    assert lance_dfaiss.update_index(dataset).changed
    dataset.optimize.compact_files(target_rows_per_fragment=8_000)
    assert index.refresh()
    check(dataset, index)
    assert lance_dfaiss.sync_index(dataset).changed
    index = lance_dfaiss.open_index(dataset)
    assert index.stats().unsaved_rows == 0
    assert index.stats().tail_rows == 0
    check(dataset, index)
    lance_dfaiss.optimize_index(dataset, max_dead_share=0.01)
    check(dataset, lance_dfaiss.open_index(dataset))


@pytest.mark.parametrize("kind", CODED)
def test_every_type_can_be_split(tmp_path: Path, kind: str) -> None:
    dataset = create_index(write(tmp_path / "d"), "vec", **CODED[kind])
    index = lance_dfaiss.open_index(dataset)
    assert len(parts(index)) == 4
    truth = Exact(lance.dataset(dataset.uri), "l2")
    distances, row_ids = index.knn(QUERIES, 10)
    assert truth.recall(QUERIES, row_ids) > 0.9
    for query, found, rows in zip(QUERIES, distances, row_ids, strict=True):
        exact = [np.square(truth.vector(row) - query).sum() for row in rows]
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


def test_split_build_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path / "d")
    write_whole = LocalStore.write
    written: list[str] = []

    def full(store: LocalStore, name: str, data: bytes) -> None:
        if "shard-" in name and len(written) == 2:
            raise StorageFull("no room", location=name)
        if "shard-" in name:
            written.append(name)
        write_whole(store, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "write", full)
        with pytest.raises(StorageFull):
            create_index(dataset, "vec", **EXACT["IVF_FLAT"])
    dataset = create_index(dataset, "vec", **EXACT["IVF_FLAT"], resume=True)
    index = lance_dfaiss.open_index(dataset)
    assert set(written) < {shard.record.name for shard in index.manifest.shards}
    check(dataset, index)
    whole = create_index(write(tmp_path / "e"), "vec", "IVF_FLAT", num_partitions=4, num_shards=1)
    same_rows(index.knn(QUERIES, 15, nprobe=4), lance_dfaiss.open_index(whole).knn(QUERIES, 15, nprobe=4))


def test_update_splits_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "d"
    dataset = make_dataset(path, VECTORS[:300], rows_per_fragment=ROWS)
    dataset = create_index(dataset, "vec", "IVF_FLAT", num_partitions=4)
    dataset = lance.write_dataset(
        pa.table({"id": pa.array(range(300, ROWS)), "vec": fixed_size(VECTORS[300:])}),
        str(path),
        mode="append",
        max_rows_per_file=ROWS,
    )
    report = lance_dfaiss.update_index(dataset, memory_budget_bytes=budget("IVF4,Flat"))
    assert report.added_shards == 4
    index = lance_dfaiss.open_index(dataset)
    check(dataset, index)


def test_budget_for_nothing_is_refused_as_before(tmp_path: Path) -> None:
    with pytest.raises(BudgetExceeded, match="the budget is"):
        create_index(write(tmp_path / "d"), "vec", "FLAT", memory_budget_bytes=budget("Flat", rows=500))


def test_workers_that_will_have_no_shard_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = write(tmp_path / "d.lance")

    def shards(num_shards: int | None, budget_bytes: int, index_type: Any = "FLAT") -> int:
        caplog.clear()
        spec = lance_dfaiss.IndexSpec(name="x", column="vec", index_type=index_type)
        options = lance_dfaiss.BuildOptions(
            executor="ray", num_workers=4, num_shards=num_shards, memory_budget_bytes=budget_bytes
        )
        return len(lance_dfaiss.plan_index(dataset, spec, options).plan.tasks)

    assert shards(None, budget("Flat", rows=100_000)) == 2, "one for each worker, as far as there are fragments"
    assert "2 of 4 workers will encode" in caplog.text
    assert shards(None, 2**30, "HNSW_FLAT") == 1, "graphs are searched one after the other"
    assert "1 of 4 workers will encode" in caplog.text
    assert shards(8, budget("Flat", rows=100_000)) == 2, "what fits is not cut"
    assert "2 of 4 workers will encode" in caplog.text
    assert shards(None, budget("Flat", rows=5_000)) >= 4
    assert "will encode" not in caplog.text
