"""Indexes of every type over a dataset that has changed in every way since; built once for all modules."""

from __future__ import annotations

import functools
from collections.abc import Callable

import lance
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.search.index import Index
from tests.search.test_exact import EVERY_INDEX
from tests.support import clustered, fixed_size, make_dataset

DIM, ROWS, TAIL = 16, 400, 29


@pytest.fixture(scope="session")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Index]:
    """Give the index of a type: two shards of 400 rows, rows deleted, compacted, and 29 of 30 appended ones left."""

    @functools.cache
    def opened(name: str) -> Index:
        numbers = pa.array([(7 * i) % 100 for i in range(ROWS)], pa.int32())
        path = tmp_path_factory.mktemp("changed") / "d"
        plain = make_dataset(path, clustered(ROWS, DIM, 1), rows_per_fragment=50, number=numbers)
        dataset = lance_dfaiss.create_index(plain, "vec", num_shards=2, **EVERY_INDEX[name])
        dataset.delete("id % 9 = 4 AND id < 200")
        dataset.optimize.compact_files(target_rows_per_fragment=150)
        more = {"id": pa.array(range(1000, 1030), pa.int64()), "vec": fixed_size(clustered(30, DIM, 5))}
        rows = pa.table({**more, "number": pa.array(range(30), pa.int32())})
        dataset = lance.write_dataset(rows, dataset.uri, mode="append")
        dataset.delete("id IN (300, 301, 1003)")
        return lance_dfaiss.open_index(dataset)

    return opened
