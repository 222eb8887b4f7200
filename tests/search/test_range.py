"""range_search, with_vectors and explain: all that lies inside, and a true account of what was done."""

from __future__ import annotations

import logging
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import InvalidArgument, InvalidQuery
from lance_dfaiss.search.index import Index
from lance_dfaiss.types import METRICS, Metric
from tests.search.test_exact import EVERY_INDEX
from tests.support import KINDS, Exact, clustered, fixed_size, make_dataset

DIM, ROWS = 16, 400


def _appended(dataset: lance.LanceDataset, ids: range) -> lance.LanceDataset:
    rows = pa.table({"id": pa.array(ids, pa.int64()), "vec": fixed_size(clustered(len(ids), DIM, 5))})
    return lance.write_dataset(rows, dataset.uri, mode="append")


def _changed(path: Path, metric: Metric, asked: dict[str, Any]) -> lance.LanceDataset:
    """Two shards, some rows deleted, some compacted away from where they were, some in the tail."""
    plain = make_dataset(path / "d", clustered(ROWS, DIM, 1), rows_per_fragment=50)
    dataset = lance_dfaiss.create_index(plain, "vec", metric=metric, num_shards=2, **asked)
    dataset.delete("id % 9 = 4 AND id < 200")
    dataset.optimize.compact_files(target_rows_per_fragment=150)
    dataset = _appended(dataset, range(1000, 1030))
    dataset.delete("id IN (300, 301, 1003)")
    return dataset


def _inside(table: pa.Table, radius: float) -> dict[int, float]:
    distances, row_ids = table["_distance"].to_numpy(), table["_rowid"].to_numpy()
    assert (np.diff(distances) >= 0).all()
    assert (distances < np.float64(radius)).all()
    ties = np.diff(distances) == 0
    assert (row_ids[1:][ties] > row_ids[:-1][ties]).all()
    found = dict(zip(row_ids.tolist(), distances.tolist(), strict=True))
    assert len(found) == table.num_rows
    return found


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["FLAT", "IVF_FLAT", "HNSW_FLAT"])
def test_everything_inside_is_found(tmp_path: Path, name: str, metric: Metric) -> None:
    dataset = _changed(tmp_path, metric, EVERY_INDEX[name])
    index, truth = lance_dfaiss.open_index(dataset), Exact(dataset, metric)
    assert index.stats().tail_rows == 29
    for query in clustered(3, DIM, 2):
        distances = truth.distances(query)
        for share in (0.003, 0.1, 0.5, 1.0):
            radius = float(np.quantile(distances, share)) + (1e-3 if share == 1 else 0)
            for sql, kept in ((None, True), ("id % 2 = 0", False), ("id < 0", False)):
                found = _inside(index.range_search(query, radius, filter=sql, columns=[]), radius)
                matching = dataset.to_table(columns=[], filter=sql, with_row_id=True)["_rowid"].to_numpy()
                rows = np.isin(truth.row_ids, matching)
                # Only what lies at the border may fall on either side of it.
                spare = 1e-4 * max(abs(radius), 1) + 1e-6 * 500
                sure = set(truth.row_ids[rows & (distances < radius - spare)].tolist())
                maybe = set(truth.row_ids[rows & (distances < radius + spare)].tolist())
                assert sure <= set(found) <= maybe
                assert kept or len(found) < len(truth)
                everything = dict(zip(truth.row_ids.tolist(), distances.tolist(), strict=True))
                assert all(abs(everything[row] - d) <= spare for row, d in found.items())


@pytest.mark.parametrize("name", EVERY_INDEX)
def test_a_search_with_all_rows_and_a_radius_agree(changed: Callable[[str], Index], name: str) -> None:
    index, query = changed(name), clustered(1, DIM, 2)[0]
    if not index.view.loaded[0].segment.can_range:
        assert name == "IVF_RQ"
        with pytest.raises(InvalidArgument, match="refine") as caught:
            index.range_search(query, 10.0)
        assert caught.value.remedy
        # Whatever there is to look at.
        for sql in ("id < 5", "id < 0", "id = 1004"):
            with pytest.raises(InvalidArgument, match="refine"):
                index.range_search(query, 10.0, filter=sql)
        return
    widths: dict[str, Any] = {"nprobe": 8} if "IVF" in name or "PCA" in name else {"ef": ROWS} if "HNSW" in name else {}
    refined: dict[str, Any] = {"k_factor": ROWS} if index.view.loaded[0].segment.has_refine else {}
    distances, row_ids = index.knn(query, len(index), **widths, **refined)
    for at in (0, 1, 20, len(index) - 1):
        radius = float(distances[0, at])
        if radius <= 0:
            continue
        for given in (radius, np.float32(radius), np.nextafter(np.float32(radius), np.float32(np.inf))):
            found = _inside(index.range_search(query, given, columns=[]), float(given))
            expected = {int(row) for row, d in zip(row_ids[0], distances[0], strict=True) if d < given}
            spare = 1e-4 * radius + 1e-4
            border = {int(row) for row, d in zip(row_ids[0], distances[0], strict=True) if abs(d - radius) <= spare}
            assert set(found) ^ expected <= border
    assert len(_inside(index.range_search(query, float("inf"), columns=[]), np.inf)) == len(index)


def test_few_lists_find_less(changed: Callable[[str], Index]) -> None:
    index, query = changed("IVF_FLAT"), clustered(1, DIM, 2)[0]
    counts = [index.range_search(query, 1e6, columns=[], nprobe=n, fast_search=True).num_rows for n in (1, 4, 8)]
    assert 0 < counts[0] < counts[1] < counts[2] == index.stats().live_rows
    for name, nprobe in (("IVF_FLAT", 9), ("IVF_FLAT", 0), ("FLAT", 1)):
        with pytest.raises(InvalidArgument) as caught:
            changed(name).range_search(query, 3.0, nprobe=nprobe)
        assert caught.value.parameter == "nprobe"


@pytest.mark.parametrize(
    "radius", ["1", None, True, float("nan"), np.float32("nan"), [1.0], np.array(2.0), 1j, 0, -1, -np.inf]
)
def test_what_is_no_radius(changed: Callable[[str], Index], radius: Any) -> None:
    with pytest.raises(InvalidArgument, match="radius must be") as caught:
        changed("FLAT").range_search(clustered(1, DIM, 2)[0], radius)
    assert caught.value.parameter == "radius"


@pytest.mark.parametrize(
    ("radius", "share"),
    [
        *((huge, 1) for huge in (1e300, 3.5e38, float("inf"), 10**400, np.float64(1e39), 10**30, np.int64(2**62))),
        *((tiny, 0) for tiny in (1e-320, Fraction(1, 10**400), np.float16(1e-4), 1, np.uint8(3), Fraction(1, 2))),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_numbers_of_every_kind_and_size(changed: Callable[[str], Index], radius: Any, share: int) -> None:
    for name in ("FLAT", "IVF_SQ", "HNSW_SQ"):
        table = changed(name).range_search(np.full(DIM, 50), radius, columns=[])
        assert table.num_rows == share * len(changed(name))


def test_any_number_under_dot(tmp_path: Path) -> None:
    dataset = _changed(tmp_path, "dot", EVERY_INDEX["FLAT"])
    index, query = lance_dfaiss.open_index(dataset), clustered(1, DIM, 2)[0]
    for radius in (-1e300, float("-inf"), -(10**400), -3e38):
        assert index.range_search(query, radius, columns=[]).num_rows == 0
    for radius in (1e300, float("inf"), 10**400, 3e38):
        assert index.range_search(query, radius, columns=[]).num_rows == len(index)
    assert 0 < index.range_search(query, 0, columns=[]).num_rows < len(index)


def test_the_border_itself_is_outside(tmp_path: Path) -> None:
    values = np.zeros((5, 2), dtype=np.float32)
    values[:, 0] = [1, 2, 3, 4, 5]
    index = lance_dfaiss.open_index(lance_dfaiss.create_index(make_dataset(tmp_path / "d", values), "vec", "FLAT"))
    query = np.zeros(2)
    for radius, rows in ((9, 2), (9.000001, 3), (np.nextafter(9.0, 10.0), 3), (8.999999, 2), (1, 0), (1e-300, 0)):
        assert index.range_search(query, radius, columns=[]).num_rows == rows, radius


def test_one_query_at_a_time(changed: Callable[[str], Index]) -> None:
    index, queries = changed("FLAT"), clustered(2, DIM, 2)
    with pytest.raises(InvalidArgument, match="one query") as caught:
        index.range_search(queries, 3.0)
    assert caught.value.parameter == "query"
    with pytest.raises(InvalidQuery):
        index.range_search(np.ones(DIM + 1), 3.0)
    one, same = index.range_search(queries[0], 900.0), index.range_search(queries[:1], 900.0)
    assert one.equals(same)
    assert one.column_names == ["id", "vec", "number", "_distance", "_rowid"]
    empty = index.range_search(queries[0], 1e-9, columns=["id"])
    assert (empty.num_rows, empty.column_names) == (0, ["id", "_distance", "_rowid"])


def test_with_vectors(changed: Callable[[str], Index], tmp_path: Path) -> None:
    index, query = changed("IVF_SQ"), clustered(1, DIM, 2)[0]
    truth = Exact(index.view.pinned.lance, "l2")
    given: list[Any] = [[], ["id"], ["vec"], None, {"twice": "id * 2"}, {"vec": "vec"}, {"vec": "`vec`"}]
    for columns in given:
        tables = [
            index.search(query, 40, columns=columns, with_vectors=True),
            index.range_search(query, 1e6, columns=columns, with_vectors=True),
        ]
        for table in tables:
            names = ["id", "number"] if columns is None else [name for name in columns if name != "vec"]
            assert {*table.column_names[:-2]} == {*names, "vec"}
            for row in table.to_pylist():
                np.testing.assert_array_equal(row["vec"], truth.vector(row["_rowid"]))
    with pytest.raises(InvalidArgument, match="'vec'") as caught:
        index.search(query, 3, columns={"vec": "id"}, with_vectors=True)
    assert caught.value.parameter == "columns"
    struct = make_dataset(tmp_path / "struct", KINDS["struct"](clustered(50, DIM, 1)))
    nested = lance_dfaiss.open_index(lance_dfaiss.create_index(struct, "vec.emb", "FLAT"))
    table = nested.search(query, 3, columns=["id"], with_vectors=True)
    assert table.column_names == ["id", "vec.emb", "_distance", "_rowid"]
    assert table["vec.emb"].to_pylist() == [clustered(50, DIM, 1)[i].tolist() for i in table["id"].to_pylist()]


@pytest.mark.parametrize("name", EVERY_INDEX)
def test_explain_tells_what_is_true(changed: Callable[[str], Index], name: str) -> None:
    index, queries = changed(name), clustered(3, DIM, 2)
    dataset, stats = index.view.pinned.lance, index.stats()
    told = index.explain(queries, 7)
    assert (told.queries, told.k, told.results, told.version) == (3, 7, 21, dataset.version)
    assert (told.live_rows, told.masked_rows) == (stats.live_rows, stats.masked_rows)
    assert (told.mapped_rows, told.tail_rows) == (stats.mapped_rows, 29)
    assert stats.mapped_rows > 0 < stats.masked_rows
    assert stats.live_rows + 29 == dataset.count_rows()
    scans = [stage for stage in told.stages if stage.name == "scan"]
    assert sum(stage.facts["rows"] for stage in scans) == stats.live_rows
    assert sum(stage.facts["masked"] for stage in scans) == ROWS - stats.live_rows
    tail = told.stage("tail")
    assert tail is not None
    assert tail.facts["rows"] == 29
    assert told.stage("filter") is told.stage("fetch") is None
    assert 0 <= sum(stage.seconds for stage in told.stages) <= told.seconds
    if index.view.family == "ivf":
        segment = index.view.loaded[0].segment
        for nprobe in (1, 8):
            coarse = index.explain(queries, 7, nprobe=nprobe, fast_search=True).stage("coarse")
            assert coarse is not None
            probed = segment.probe(queries, nprobe, ef=1)
            assert coarse.facts["lists_probed"] == 3 * nprobe
            assert coarse.facts["positions_scanned"] == probed.rows_scanned.sum()
            sizes = segment.list_sizes()
            assert sizes is not None
            assert (coarse.facts["positions_scanned"] == 3 * sizes.sum()) == (nprobe == 8)
    filtered = index.explain(queries, 7, filter="id % 2 = 0", columns=["id"])
    facts = [filtered.stage(stage) for stage in ("filter", "fetch")]
    assert None not in facts
    assert facts[0].facts == {"matches": dataset.count_rows("id % 2 = 0"), "cached": False}  # type: ignore[union-attr]
    assert facts[1].facts == {"rows": 21}  # type: ignore[union-attr]
    again = index.explain(queries, 7, filter="id % 2 = 0").stage("filter")
    assert again is not None
    assert again.facts["cached"] is True
    for line in (
        "3 queries",
        f"{stats.live_rows:,} rows live",
        f"{stats.masked_rows:,} masked",
        "29 in the tail",
        "scan",
    ):
        assert line in str(told)


def test_explain_tells_of_the_second_look(tmp_path: Path) -> None:
    plain = make_dataset(tmp_path / "d", clustered(3000, DIM, 1))
    dataset = lance_dfaiss.create_index(plain, "vec", "IVF_FLAT", num_partitions=16)
    dataset.delete("id % 100 <> 0")
    index = lance_dfaiss.open_index(dataset)
    told = index.explain(clustered(1, DIM, 2), 30)
    widened = told.stage("widen")
    assert widened is not None
    assert widened.facts == {"queries": 1, "lists": 16}
    assert told.results == 30
    assert index.explain(clustered(1, DIM, 2), 30, nprobe=1).stage("widen") is None


def test_rows_whose_way_is_not_written_down_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = _changed(tmp_path, "l2", EVERY_INDEX["FLAT"])
    with caplog.at_level(logging.WARNING, "lance_dfaiss"):
        index = lance_dfaiss.open_index(dataset)
    assert index.stats().unsaved_rows == index.stats().mapped_rows > 0
    assert any("sync_index" in record.message for record in caplog.records)
    caplog.clear()
    lance_dfaiss.sync_index(dataset)
    with caplog.at_level(logging.WARNING, "lance_dfaiss"):
        assert lance_dfaiss.open_index(dataset).stats().unsaved_rows == 0
        assert index.refresh()
    assert index.stats().unsaved_rows == 0
    assert caplog.records == []
