"""A client over real servers says what an Index in this process says: values, tables, types and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.serve.client import Client
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.serve.holdings import HoldingOptions
from tests.serve.inprocess import Settings, running
from tests.support import clustered, fixed_size, make_dataset, same_rows

DIM = 16
QUERIES = clustered(9, DIM, 7)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, lance_dfaiss.Index]]:
    """Three shards and a tail over two groups of two servers, two columns in RAM; and the same in this process."""
    folder = tmp_path_factory.mktemp("both")
    words = {"number": pa.array(range(600), pa.int32()), "word": pa.array([f"w{i}" for i in range(600)])}
    dataset = make_dataset(folder / "d", clustered(600, DIM, 1), rows_per_fragment=100, **words)
    dataset = lance_dfaiss.create_index(dataset, "vec", index_type="IVF_FLAT", num_partitions=8, num_shards=3)
    tail = {"id": pa.array(range(1000, 1030), pa.int64()), "vec": fixed_size(clustered(30, DIM, 5))}
    more = pa.table({**tail, "number": pa.array(range(30), pa.int32()), "word": pa.array(["tail"] * 30)})
    dataset = lance.write_dataset(more, dataset.uri, mode="append")
    dataset.delete("id % 7 = 3")
    index = lance_dfaiss.open_index(dataset)
    served = ServedIndex(name=index.name, dataset=dataset.uri, index=index.name)
    settings = Settings(own_filters=True, holding=HoldingOptions(payload=("number", "word")))
    with (
        running(folder, [served], servers=4, replicas=2, settings=settings) as cluster,
        lance_dfaiss.connect(cluster.location) as client,
    ):
        yield client, index


OPTIONS: list[dict[str, Any]] = [
    {},
    {"k": 1, "nprobe": 2},
    {"k": 700},
    {"filter": "number < 50"},
    {"filter": "number < 0"},
    {"include_tail": False},
    {"fast_search": True, "filter": "word != 'w5'"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_knn(both: tuple[Client, lance_dfaiss.Index], options: dict[str, Any]) -> None:
    client, index = both
    for queries in (QUERIES, QUERIES[0], np.empty((0, DIM))):
        same_rows(client.knn(queries, **options), index.knn(queries, **options))


@pytest.mark.parametrize("columns", [None, [], ["number"], ["word", "id"], {"more": "number + 1"}], ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:5:2], ids=str)
def test_search(both: tuple[Client, lance_dfaiss.Index], options: dict[str, Any], columns: Any) -> None:
    index = both[1]
    for queries in (QUERIES, QUERIES[0], np.empty((0, DIM))):
        ours, theirs = (each.search(queries, columns=columns, **options) for each in both)
        told = json.loads(ours.schema.metadata[b"lance_dfaiss"])
        assert told == {"coverage": 1.0, "version": index.version, "generation": index.manifest.generation}
        assert ours.replace_schema_metadata(None) == theirs.replace_schema_metadata(None)


def test_range_search_and_reconstruct(both: tuple[Client, lance_dfaiss.Index]) -> None:
    client, index = both
    radius = float(index.knn(QUERIES[0], 30)[0][0, 29])
    ours, theirs = (each.range_search(QUERIES[0], radius, columns=["number"], with_vectors=True) for each in both)
    assert len(theirs) >= 29
    assert ours.replace_schema_metadata(None) == theirs.replace_schema_metadata(None)
    row_ids = theirs["_rowid"].to_numpy()
    np.testing.assert_array_equal(client.reconstruct(row_ids), index.reconstruct(row_ids))


def test_explain_and_stats(both: tuple[Client, lance_dfaiss.Index]) -> None:
    ours, theirs = (each.explain(QUERIES[0], 5, columns=["id"]) for each in both)
    assert (ours.index, ours.version, ours.results, ours.k) == (theirs.index, theirs.version, theirs.results, theirs.k)
    assert (ours.live_rows, ours.tail_rows) == (theirs.live_rows, theirs.tail_rows)
    assert {stage.name for stage in ours.stages} >= {stage.name for stage in theirs.stages}
    assert both[0].stats().rows == len(both[1])


@pytest.mark.parametrize(
    "bad",
    [
        {"k": 0},
        {"nprobe": 0},
        {"nprobe": 99},
        {"ef": 4},
        {"k_factor": 3},
        {"filter": "nope = 1"},
        {"columns": "number"},
        {"columns": ["number", "number"]},
        {"columns": {"a": "nope + 1"}},
        {"columns": {"_distance": "number"}},
    ],
    ids=str,
)
def test_errors(both: tuple[Client, lance_dfaiss.Index], bad: dict[str, Any]) -> None:
    said = []
    for each in both:
        with pytest.raises(lance_dfaiss.DfaissError) as caught:
            each.search(QUERIES[0], **bad)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]


@pytest.mark.parametrize("row_ids", [[10**9], [-1], [[1, 2]]], ids=str)
def test_errors_of_row_ids(both: tuple[Client, lance_dfaiss.Index], row_ids: Any) -> None:
    said = []
    for each in both:
        with pytest.raises(lance_dfaiss.DfaissError) as caught:
            each.reconstruct(row_ids)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]
