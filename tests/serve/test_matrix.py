"""A cluster answers what a local index does: over types of index, layouts, metrics, and what happened to the data.

Each value of each of these meets each value of every other one in some case; all combinations run at night.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss import MISSING_ROW_ID
from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.search.index import Index
from lance_dfaiss.serve.client import Client
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.types import Metric
from tests.serve.inprocess import running
from tests.support import Exact, clustered, fixed_size, make_dataset

DIM, ROWS, SHARDS = 16, 1_400, 9

_IVF = {"num_partitions": 8, "num_shards": SHARDS}
_TYPES: dict[str, dict[str, Any]] = {
    "FLAT": {"index_type": "FLAT", "num_shards": SHARDS},
    "IVF_FLAT": {"index_type": "IVF_FLAT", **_IVF},
    "IVF_SQ": {"index_type": "IVF_SQ", "refine": None, **_IVF},
    "IVF_PQ": {"index_type": "IVF_PQ", "num_sub_vectors": 4, "refine": None, **_IVF},
    "IVF_PQ 4 bit": {"index_type": "IVF_PQ", "num_sub_vectors": 8, "num_bits": 4, "refine": "sq8", **_IVF},
    "HNSW_FLAT": {"index_type": "HNSW_FLAT", "num_shards": 3},
    "IVF_RQ": {"index_type": "IVF_RQ", "refine": None, **_IVF},
}
_EXACT = {"FLAT", "IVF_FLAT", "IVF_SQ", "IVF_PQ"}
"""Those whose rows and distances are the index's to the bit, where the lists to look into are named."""

_LAYOUTS = ((1, 1), (2, 1), (2, 2), (7, 1), (7, 2), (7, 3))
_METRICS: tuple[Metric, ...] = ("l2", "cosine", "dot")
_FACTORS: tuple[tuple[Any, ...], ...] = (tuple(_TYPES), (1, 2, 7), (1, 2, 3), _METRICS, (False, True), (False, True))
_FILTERS = ("number < 40", "number = 7", "word IN ('a', 'c') AND number >= 20", "id < 0")


@dataclass(frozen=True)
class Case:
    """One cluster."""

    kind: str
    servers: int
    replicas: int
    metric: Metric
    changed: bool
    stable: bool

    def __str__(self) -> str:
        history = "changed" if self.changed else "as built"
        ids = "stable ids" if self.stable else "addresses"
        return f"{self.kind}, {self.servers}x{self.replicas}, {self.metric}, {history}, {ids}"


def _pairs(case: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def _cover(cases: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return few of the cases that have all pairs of values between them: always the one with the most new pairs."""
    left = set().union(*map(_pairs, cases))
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(_pairs(case) & left))
        left -= _pairs(best)
        chosen.append(best)
    return chosen


_EVERY = [case for case in itertools.product(*_FACTORS) if case[2] <= case[1]]
_CI = _cover(_EVERY)
_NIGHT = [case for case in _EVERY if case not in _CI]


def _dataset(path: Path, case: Case) -> lance.LanceDataset:
    """Build an index of nine shards over rows some of which are alike; changed in every way since, if so asked."""
    vectors = clustered(ROWS, DIM, 1)
    vectors[700:730] = vectors[:30]
    vectors[1_000:1_015] = vectors[3]  # in several shards
    vectors[5] = np.nan
    number = pa.array([(7 * i) % 100 for i in range(ROWS)], pa.int32())
    word = pa.array(["a", "b", "c", None][i % 4] for i in range(ROWS))
    plain = make_dataset(path, vectors, rows_per_fragment=100, stable=case.stable, number=number, word=word)
    dataset = lance_dfaiss.create_index(plain, "vec", name="i", metric=case.metric, **_TYPES[case.kind])
    if not case.changed:
        return dataset
    dataset.delete("id % 9 = 4 AND id < 500")
    dataset.optimize.compact_files(target_rows_per_fragment=250)
    tail = clustered(60, DIM, 5)
    tail[:10] = vectors[3]
    more = {"id": pa.array(range(5_000, 5_060), pa.int64()), "vec": fixed_size(tail)}
    more |= {"number": pa.array(range(60), pa.int32()), "word": pa.array(["a", "b", None] * 20)}
    dataset = lance.write_dataset(pa.table(more), str(path), mode="append", max_rows_per_file=9)
    dataset.delete("id IN (700, 701, 1003, 5003)")
    return dataset


def _check_knn(client: Client, index: Index, case: Case, queries: Any, truth: Exact) -> None:
    named: dict[str, Any] = {"nprobe": 3} if case.kind.startswith("IVF") else {}
    for count, k in ((1, 10), (7, 1), (7, 60), (100, 10), (1, 2 * ROWS)):
        asked: dict[str, Any]
        for asked in ({}, {"include_tail": False}, {"filter": _FILTERS[0]}, {"filter": _FILTERS[1]}):
            some = queries[:count]
            found, expected = client.knn(some, k, **named, **asked), index.knn(some, k, **named, **asked)
            assert found[0].shape == found[1].shape == expected[0].shape
            assert (found.coverage, found.version) == (1.0, index.version)
            if case.kind in _EXACT or (case.kind == "IVF_RQ" and "filter" not in asked):
                _check_same(found, expected)
            elif case.kind != "IVF_RQ":  # its distances are rounded by all lists that a query looks into
                _check_no_worse(found, expected)
    # Without the first: it is one of 17 rows that are alike, and which of them are cut off is open.
    for some in (queries[1:2], queries[1:]):
        mine, theirs = truth.recall(some, client.knn(some, 10)[1]), truth.recall(some, index.knn(some, 10)[1])
        assert mine >= theirs - 0.005


def _check_same(found: Any, expected: Any) -> None:
    """Assert that answers agree to the bit, but for which of equally far rows are cut off at the end."""
    np.testing.assert_array_equal(found[0], expected[0])
    inside = expected[0] < expected[0][:, -1:]
    np.testing.assert_array_equal(found[1][inside], expected[1][inside])
    for rows in found[1]:
        assert len(set(rows.tolist()) - {int(MISSING_ROW_ID)}) == np.count_nonzero(rows != MISSING_ROW_ID)


def _check_no_worse(found: Any, expected: Any) -> None:
    """Assert that an answer is good where more candidates are ranked, or more lists looked into, in every group."""
    for distances, rows, others, their_rows in zip(*found, *expected, strict=True):
        there = rows != MISSING_ROW_ID
        assert len(set(rows[there].tolist())) == there.sum() >= np.count_nonzero(their_rows != MISSING_ROW_ID)
        assert (np.diff(distances[there]) >= 0).all()
        tolerance = 1e-5 * np.abs(others) + 1e-5
        assert (distances[there] <= (others + tolerance)[there]).all()
        known = dict(zip(their_rows.tolist(), others.tolist(), strict=True))
        for row, distance in zip(rows[there].tolist(), distances[there].tolist(), strict=True):
            assert known.get(row, distance) == pytest.approx(distance, rel=1e-5, abs=1e-5)


def _inside(table: pa.Table) -> pa.Table:
    """Leave out the rows that are as far as the last of their query: which of these are cut off may differ."""
    table = table.replace_schema_metadata(None)
    distances = table["_distance"].to_numpy()
    query = table["query_index"].to_numpy() if "query_index" in table.column_names else np.zeros(len(table), int)
    last = {each: distances[query == each].max() for each in set(query.tolist())}
    return table.filter(pa.array([d < last[q] for q, d in zip(query.tolist(), distances, strict=True)], pa.bool_()))


def _check_tables(client: Client, index: Index, case: Case, queries: Any) -> None:
    asked: dict[str, Any]
    for query, asked in (
        (queries[0], {}),
        (queries[0], {"columns": ["word", "id"]}),
        (queries[:5], {"columns": {"twice": "id + id", "word": "word"}, "filter": _FILTERS[0]}),
        (queries[:5], {"columns": [], "filter": _FILTERS[3]}),
        (queries[:3], {"columns": ["id"], "with_vectors": True}),
    ):
        found, expected = client.search(query, 12, **asked), index.search(query, 12, **asked)
        assert found.schema.remove_metadata() == expected.schema.remove_metadata()
        assert len(found) == len(expected)
        if case.kind in ("FLAT", "IVF_FLAT"):
            assert found["_distance"].equals(expected["_distance"])
            assert _inside(found).equals(_inside(expected))


def _check_ranges(client: Client, index: Index, queries: Any) -> None:
    try:
        index.range_search(queries[0], 1.0)
    except InvalidArgument as exc:
        with pytest.raises(InvalidArgument, match=re.escape(exc.message)):
            client.range_search(queries[0], 1.0)
        return
    near = index.knn(queries[:1], 60)[0][0]
    asked: dict[str, Any]
    for radius in (float(near[35]), float(near[-1])):
        for asked in ({}, {"filter": _FILTERS[0], "columns": ["id", "word"]}, {"include_tail": False, "columns": []}):
            found = client.range_search(queries[0], radius, **asked).replace_schema_metadata(None)
            assert found.equals(index.range_search(queries[0], radius, **asked).replace_schema_metadata(None))


def _check_filters(client: Client, index: Index, queries: Any) -> None:
    for sql in _FILTERS:
        found, expected = client.knn(queries[:2], ROWS, filter=sql)[1], index.knn(queries[:2], ROWS, filter=sql)[1]
        for mine, theirs in zip(found, expected, strict=True):
            assert set(mine.tolist()) == set(theirs.tolist())


def _check(tmp_path: Path, case: Case) -> None:
    index = lance_dfaiss.open_index(_dataset(tmp_path / "d", case), "i")
    truth = Exact(index.view.pinned.lance, case.metric)
    queries = np.concatenate([truth.vectors[3:4].astype(np.float32), clustered(99, DIM, 1) + np.float32(0.1)])
    served = (ServedIndex(name="i", dataset=str(tmp_path / "d"), index="i"),)
    with running(tmp_path, served, servers=case.servers, replicas=case.replicas) as cluster:
        with lance_dfaiss.connect(cluster.location, timeout=60) as client:
            assert client.stats().rows == len(index)
            _check_knn(client, index, case, queries, truth)
            _check_tables(client, index, case, queries)
            _check_ranges(client, index, queries)
            _check_filters(client, index, queries)
            if case.kind != "IVF_RQ":  # it cannot decode
                some = truth.row_ids[::7]
                np.testing.assert_array_equal(client.reconstruct(some), index.reconstruct(some))
        offers = [server.server.holdings.offers[0] for server in cluster.servers]
        assert {offer.at for offer in offers} == {offers[0].at}
        assert sum(offers[0].rows) == len(index)


@pytest.mark.parametrize("case", [Case(*values) for values in _CI], ids=str)
def test_a_cluster_is_the_index(case: Case, tmp_path: Path) -> None:
    _check(tmp_path, case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [Case(*values) for values in _NIGHT], ids=str)
def test_every_cluster_is_the_index(case: Case, tmp_path: Path) -> None:
    _check(tmp_path, case)
