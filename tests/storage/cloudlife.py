"""Everything that is done with an index, on whichever store it lies, against exact search."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import IndexNotFound
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.serve.holdings import HoldingOptions
from tests.serve.inprocess import Settings, running
from tests.support import Exact, assert_exact, clustered, fixed_size

__all__ = ["DIM", "ROWS", "live", "serve", "table_of", "write"]

DIM, ROWS, PARTITIONS = 8, 2_400, 6
QUERIES = clustered(5, DIM, seed=2)


def table_of(rows: int, seed: int, first: int = 0) -> pa.Table:
    """Rows of ``id``, ``vec`` and ``even``."""
    ids = np.arange(first, first + rows)
    return pa.table({"id": ids, "vec": fixed_size(clustered(rows, DIM, seed)), "even": ids % 2 == 0})


def write(uri: str, options: Mapping[str, str]) -> lance.LanceDataset:
    """Write the dataset, in three fragments."""
    return lance.write_dataset(table_of(ROWS, 1), uri, max_rows_per_file=ROWS // 3, storage_options=dict(options))


def live(uri: str, options: Mapping[str, str], index_uri: str | None = None) -> None:
    """Build, search, change, check, roll back, clean up, serve nothing, drop."""
    where: dict[str, Any] = {"storage_options": options, "index_uri": index_uri}
    trusted = {**where, "allowed_index_uris": [] if index_uri is None else [index_uri]}
    handle = write(uri, options)
    lance_dfaiss.create_index(uri, "vec", "IVF_FLAT", num_partitions=PARTITIONS, sample_rate=64, num_shards=2, **where)
    handle.checkout_latest()  # type: ignore[no-untyped-call]
    assert lance_dfaiss.list_indices(uri, **where) == ["vec_idx"]
    _search(uri, handle, trusted)

    handle.delete("id % 7 = 3")
    handle = lance.write_dataset(table_of(200, 3, ROWS), uri, mode="append", storage_options=dict(options))
    _search(uri, handle, trusted)  # the tail is read as well
    assert lance_dfaiss.update_index(uri, **trusted).added_rows == 200
    _search(uri, handle, trusted)
    before = lance_dfaiss.describe_index(uri, **trusted)
    lance_dfaiss.optimize_index(uri, max_dead_share=0.05, **trusted)
    assert lance_dfaiss.describe_index(uri, **trusted).manifest.generation != before.manifest.generation
    _search(uri, handle, trusted)
    assert lance_dfaiss.verify_index(uri, **trusted) == []

    lance_dfaiss.rollback(uri, **trusted)
    assert lance_dfaiss.describe_index(uri, **trusted).manifest.generation == before.manifest.generation
    _search(uri, handle, trusted)
    lance_dfaiss.drop_index(uri, "vec_idx", **where)
    with pytest.raises(IndexNotFound):
        lance_dfaiss.open_index(uri, **trusted)
    # Versions that name them are still there, so nothing is collected before Lance forgets those.
    assert lance_dfaiss.gc(uri, dry_run=True, min_age=timedelta(0), keep_previous=0, **where).files == ()
    handle.checkout_latest()  # type: ignore[no-untyped-call]
    handle.cleanup_old_versions(timedelta(0))
    report = lance_dfaiss.gc(uri, min_age=timedelta(0), keep_previous=0, **where)
    assert before.manifest.generation in report.generations


def _search(uri: str, handle: lance.LanceDataset, trusted: dict[str, Any]) -> None:
    handle.checkout_latest()  # type: ignore[no-untyped-call]
    index = lance_dfaiss.open_index(uri, **trusted)
    assert_exact(Exact(handle, "l2"), QUERIES, *index.knn(QUERIES, k=10, nprobe=PARTITIONS), scale=100.0)
    table = index.search(QUERIES[0], k=5, nprobe=PARTITIONS, filter="even", columns=["id", "even"])
    assert table["even"].to_pylist() == [True] * 5


def serve(folder: Path, uri: str, options: Mapping[str, str]) -> None:
    """Serve the index from two servers, and compare with the index in this process."""
    index = lance_dfaiss.open_index(uri, storage_options=options)
    settings = Settings(holding=HoldingOptions(storage_options=options))
    with (
        running(
            folder, [ServedIndex(name="vec_idx", dataset=uri, index="vec_idx")], servers=2, settings=settings
        ) as cluster,
        lance_dfaiss.connect(cluster.location) as client,
    ):
        ours, theirs = index.knn(QUERIES, k=10, nprobe=3), client.knn(QUERIES, k=10, nprobe=3)
        np.testing.assert_array_equal(ours[1], theirs[1])
        found = client.search(QUERIES[0], k=3, filter="even", columns=["id"])
        assert all(number % 2 == 0 for number in found["id"].to_pylist())
