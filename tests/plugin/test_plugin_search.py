"""The same search on a plain LanceDataset without an index and on ours, option by option."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import lance_dfaiss
from lance_dfaiss.plugin import DfaissScanner
from tests.plugin.twins import BATCH, DIM, QUERY, RNG, ROWS, VECTORS, Pair, ask, rows, same, written


@pytest.fixture(scope="module", params=[False, True], ids=["addresses", "stable"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("pair") / "d.lance"
    written(path, stable=request.param).delete("id % 7 = 0")
    ours = lance_dfaiss.dataset(path).create_index("vec", "FLAT", num_shards=2)
    return lance.dataset(path), ours


OPTIONS: list[dict[str, Any]] = [
    {},
    {"with_row_id": True},
    {"with_row_address": True},
    {"with_row_id": True, "with_row_address": True},
    {"columns": ["s", "_distance", "id"], "with_row_id": True},
    {"columns": ["s", "_rowid", "id"]},
    {"columns": ["s", "_rowid", "id"], "with_row_id": True},
    {"columns": ["s", "_rowaddr", "_rowid", "id"], "with_row_address": True},
    {"columns": []},
    {"columns": [], "with_row_id": True, "with_row_address": True},
    {"columns": ["st.x", "vec"]},
    {"columns": {"a": "id + 1", "b": "s"}},
    {"columns": {"a": "id + 1", "_distance": "_distance", "b": "s"}, "with_row_id": True},
    {"columns": {"a": "id", "near": "_distance * 2"}},
    {"columns": {"a": "id", "row": "_rowid"}},
    {"columns": [], "with_row_id": True},
    {"columns": ["_rowid", "_distance"]},
    {"columns": ["id"], "disable_scoring_autoprojection": True},
    {"columns": [], "disable_scoring_autoprojection": True},
    {"disable_scoring_autoprojection": True},
    {"columns": ["_distance", "id"], "disable_scoring_autoprojection": True},
    {"limit": 2},
    {"limit": 2, "offset": 1},
    {"offset": 3},
    {"limit": 0},
    {"offset": 1_000},
    {"limit": 1_000},
    {"batch_size": 2},
    {"batch_size": 2, "strict_batch_size": True},
    {"prefilter": True},
    {"use_stats": False, "scan_in_order": True, "late_materialization": True, "io_buffer_size": 1 << 20},
    {"include_deleted_rows": False},
]
NEAREST: list[dict[str, Any]] = [
    {},
    {"k": 3},
    {"k": 10_000},
    {"k": None},
    {"metric": "L2"},
    {"metric": "Euclidean"},
    {"nprobes": 3},
    {"minimum_nprobes": 1, "maximum_nprobes": 5},
    {"refine_factor": 2},
    {"ef": 5},
    {"query_parallelism": -1},
    {"approx_mode": "fast"},
    {"use_index": True},
    {"q": [float(x) for x in QUERY]},
    {"q": QUERY.astype(np.float64)},
    {"q": QUERY.astype(np.float16)},
    {"q": pa.array(QUERY)},
    {"q": pa.scalar(QUERY.tolist(), pa.list_(pa.float32(), DIM))},
    {"q": [1] * DIM},
    {"q": BATCH[:1]},
    {"q": [list(map(float, row)) for row in BATCH]},
]


@pytest.mark.parametrize("batch", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scan_options(pair: Pair, options: dict[str, Any], batch: bool) -> None:
    nearest = {"q": BATCH} if batch else {}
    same(ask(pair[0], nearest, options), ask(pair[1], nearest, options))


@pytest.mark.parametrize("nearest", NEAREST, ids=lambda nearest: ",".join(nearest) or "default")
def test_nearest_keys(pair: Pair, nearest: dict[str, Any]) -> None:
    same(ask(pair[0], nearest, {}), ask(pair[1], nearest, {}))
    assert isinstance(pair[1].scanner(nearest={"column": "vec", "q": QUERY, **nearest}), DfaissScanner)


@pytest.mark.parametrize(
    ("nearest", "options"),
    [
        ({"use_index": False}, {}),
        ({"metric": "cosine"}, {}),
        ({"distance_range": (0.0, 5.0)}, {}),
        ({"q": QUERY * np.nan}, {}),
        ({"search_effort": 0.2}, {}),
        ({}, {"filter": pc.field("id") > 100}),
        ({}, {"filter": "_distance < 5"}),
        ({}, {"order_by": ["id"]}),
        ({"q": BATCH}, {"filter": pc.field("id") > 100, "prefilter": True, "with_row_id": True}),
    ],
    ids=str,
)
def test_what_is_not_ours_goes_to_lance(
    pair: Pair, nearest: dict[str, Any], options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "lance_dfaiss.plugin"):
        found = ask(pair[1], nearest, options)
    same(ask(pair[0], nearest, options), found)
    lines = [record for record in caplog.records if "goes to Lance" in record.message]
    assert len(lines) == ("use_index" not in nearest)


def test_fragments_go_to_lance(pair: Pair) -> None:
    with pytest.raises(ValueError, match="fragment scan"):
        ask(pair[1], {}, {"fragments": pair[1].get_fragments()[:1]})


@pytest.mark.parametrize(
    ("nearest", "options"),
    [
        ({"k": 0}, {}),
        ({"k": -1}, {}),
        ({"k": 2.5}, {}),
        ({"q": QUERY[:5]}, {}),
        ({"q": BATCH.ravel()}, {}),
        ({"q": "abc"}, {}),
        ({"nprobes": 0}, {}),
        ({"minimum_nprobes": 9, "maximum_nprobes": 3}, {}),
        ({"refine_factor": 0}, {}),
        ({"ef": 0}, {}),
        ({"approx_mode": "careful"}, {}),
        ({"query_parallelism": -5}, {}),
        ({"metric": "manhattan"}, {}),
        ({"column": "nope"}, {}),
        ({"colour": "red"}, {}),
        ({}, {"limit": -1}),
        ({}, {"offset": -1}),
        ({}, {"columns": ["nope"]}),
        ({}, {"columns": ["id", "id"]}),
        ({}, {"columns": ("id",)}),
        ({}, {"columns": ["id", "query_index"]}),
        ({}, {"columns": {"a": "no_such_function(id)"}}),
        ({}, {"no_such_option": 1}),
    ],
    ids=str,
)
def test_bad_input_raises_what_lance_raises(pair: Pair, nearest: dict[str, Any], options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - Lance says which
        ask(pair[0], nearest, options)
    with pytest.raises(type(theirs.value)):
        ask(pair[1], nearest, options)


def test_the_other_ways_to_read(pair: Pair) -> None:
    call: dict[str, Any] = {"nearest": {"column": "vec", "q": BATCH, "k": 5}, "columns": ["id"]}
    theirs, ours = (ds.to_table(**call) for ds in pair)
    same(theirs, ours)
    same(theirs, pa.Table.from_batches(pair[1].to_batches(**call)))
    scanner = pair[1].scanner(**call)
    assert isinstance(scanner, lance.LanceScanner)
    same(theirs, scanner.to_reader().read_all())
    same(theirs[:4], scanner.head(4))  # type: ignore[no-untyped-call]
    assert scanner.projected_schema.equals(theirs.schema, check_metadata=True)
    assert scanner.dataset_schema == pair[0].schema
    assert scanner.count_rows() == 15
    assert "KNN" in scanner.explain_plan()
    assert "KNN" in scanner.analyze_plan()
    strict = pair[1].scanner(**call, batch_size=4, strict_batch_size=True)
    assert [batch.num_rows for batch in strict.to_batches()] == [4, 4, 4, 3]
    with pytest.raises(ValueError, match="limit/offset"):
        pair[1].scanner(**call, limit=3).count_rows()


def test_positional_options(pair: Pair) -> None:
    nearest = {"column": "vec", "q": QUERY, "k": 5}
    theirs, ours = (ds.scanner(["id"], None, 3, 1, nearest).to_table() for ds in pair)
    same(theirs, ours)
    assert isinstance(pair[1].scanner(["id"], None, 3, 1, nearest), DfaissScanner)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_the_index_says_the_metric(tmp_path: Path, metric: str) -> None:
    plain = written(tmp_path / "d.lance")
    ours = lance_dfaiss.dataset(plain.uri).create_index("vec", "FLAT", metric=metric)
    exact = ask(plain, {"metric": metric}, {})
    same(exact, ask(ours, {}, {}))
    # Lance answers this one: it must not fall back to l2.
    lances = {"filter": pc.field("id") > 9}
    same(ask(plain, {"metric": metric}, lances), ask(ours, {}, lances))
    same(ask(plain, {}, {}), ask(ours, {"metric": "l2"}, {}))
    ours.insert(rows(QUERY[None], ROWS))
    newest = lance.dataset(plain.uri)
    same(ask(newest, {"metric": metric}, {}), ask(ours, {}, {}))


def test_two_indexes_on_one_column(tmp_path: Path) -> None:
    plain = written(tmp_path / "d.lance")
    ours = lance_dfaiss.dataset(plain.uri)
    ours.create_index("vec", "FLAT", "b", "l2").create_index("vec", "FLAT", "a", "cosine")
    for metric in ("l2", "cosine"):
        same(ask(plain, {"metric": metric}, {}), ask(ours, {"metric": metric}, {}))
        assert isinstance(ours.scanner(nearest={"column": "vec", "q": QUERY, "metric": metric}), DfaissScanner)
    same(ask(plain, {"metric": "cosine"}, {}), ask(ours, {}, {}))


def test_default_scan_options(tmp_path: Path) -> None:
    path = written(tmp_path / "d.lance").uri
    # A build through a handle with defaults takes all rows none the less.
    lance_dfaiss.dataset(path, default_scan_options={"columns": ["s"], "limit": 9}).create_index("vec", "FLAT")
    for defaults in ({"with_row_id": True, "columns": ["s"]}, {"limit": 2}, {"filter": "id > 20"}):
        options: dict[str, Any] = {"default_scan_options": defaults}
        theirs, ours = lance.dataset(path, **options), lance_dfaiss.dataset(path, **options)
        same(ask(theirs, {}, {}), ask(ours, {}, {}))
        same(ask(theirs, {}, {"columns": ["id"]}), ask(ours, {}, {"columns": ["id"]}))


def test_nprobes_are_clamped_and_widened(tmp_path: Path) -> None:
    plain = written(tmp_path / "d.lance")
    ours = lance_dfaiss.dataset(plain.uri).create_index("vec", "IVF_FLAT", num_partitions=16)
    same(ask(plain, {}, {}), ask(ours, {"nprobes": 999}, {}))
    narrow = ask(ours, {"nprobes": 1, "k": ROWS}, {})
    assert 0 < narrow.num_rows < ROWS / 2
    assert ask(ours, {"minimum_nprobes": 1, "maximum_nprobes": 1, "k": ROWS}, {}).num_rows == narrow.num_rows
    # Without an upper bound Lance goes on until it has found enough.
    same(ask(plain, {"k": ROWS}, {}), ask(ours, {"minimum_nprobes": 1, "k": ROWS}, {}))
    same(ask(plain, {"k": ROWS}, {}), ask(ours, {"k": ROWS}, {}))


def test_refine_factor(tmp_path: Path) -> None:
    plain = written(tmp_path / "d.lance")
    ours = lance_dfaiss.dataset(plain.uri)
    ours.create_index("vec", factory="SQ8", refine=None)
    call: dict[str, Any] = {"nearest": {"column": "vec", "q": QUERY, "refine_factor": 4}}
    assert not isinstance(ours.scanner(**call), DfaissScanner)
    same(plain.to_table(**call), ours.to_table(**call))
    ours.create_index("vec", factory="SQ4", refine="flat", replace=True)
    call["nearest"]["refine_factor"] = ROWS // 10
    assert isinstance(ours.scanner(**call), DfaissScanner)
    same(plain.to_table(**call), ours.to_table(**call))


def test_ef_widens_hnsw(tmp_path: Path) -> None:
    plain = written(tmp_path / "d.lance")
    ours = lance_dfaiss.dataset(plain.uri).create_index("vec", "HNSW_FLAT")
    same(ask(plain, {}, {}), ask(ours, {"ef": ROWS}, {}))
    assert ask(ours, {"ef": 1}, {}).num_rows == 5


def test_columns_that_lance_cannot_search_but_ours_can(tmp_path: Path) -> None:
    values = RNG.integers(0, 255, (100, DIM)).astype(np.uint8)
    table = pa.table({"vec": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), DIM)})
    ours = lance_dfaiss.dataset(lance.write_dataset(table, tmp_path / "d.lance"))
    ours.create_index("vec", "FLAT")
    found = ours.to_table(nearest={"column": "vec", "q": values[3], "k": 1}, columns=[], with_row_id=True)
    assert found["_rowid"].to_pylist() == [3]


def test_a_search_is_of_the_version_it_was_made_at(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT")
    scanner = ours.scanner(nearest={"column": "vec", "q": VECTORS[3], "k": 1})
    before = scanner.to_table()
    ours.delete("id = 3")
    assert scanner.to_table() == before
    assert before["id"].to_pylist() == [3]
    after: Callable[[], pa.Table] = ours.scanner(nearest={"column": "vec", "q": VECTORS[3], "k": 1}).to_table
    assert after()["id"].to_pylist() != [3]
