"""Filters before and after a search: the same on a plain LanceDataset without an index and on ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow.compute as pc
import pytest

import lance_dfaiss
from lance_dfaiss.plugin import DfaissDataset, DfaissScanner
from tests.plugin.twins import BATCH, QUERY, ROWS, Pair, ask, rows, same, written

FILTERS = [
    "id > 100",
    "true",
    "false",
    "id = 208",
    "id < 0",
    "id in (3, 208, 5)",
    "n > 50",
    "n is null",
    "not (n > 50)",
    "st.x > 50 and s is not null",
    "s like 'w1%' or id = 3",
    "vec is not null",
    "_rowid > 30",
    "ID > 100",
    "`id` % 2 = 0",
]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"limit": 3},
    {"offset": 2},
    {"limit": 3, "offset": 2},
    {"limit": 0},
    {"offset": 1_000},
    {"columns": ["s"], "with_row_id": True, "with_row_address": True},
    {"columns": []},
    {"columns": [], "disable_scoring_autoprojection": True},
    {"columns": {"a": "id + 1"}},
    {"columns": ["_rowid", "_distance"]},
    {"use_scalar_index": False},
]


@pytest.fixture(scope="module", params=["plain", "stable", "scalar"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp("filters") / "d.lance"
    dataset = written(path, stable=request.param == "stable")
    dataset.add_columns({"n": "id + 0 * nullif(id % 3, 0)"})
    if request.param == "scalar":
        dataset.create_scalar_index("id", "BTREE")
        dataset.create_scalar_index("n", "BTREE")
    dataset.delete("id % 7 = 0")
    ours = lance_dfaiss.dataset(path).create_index("vec", "FLAT", num_shards=2)
    return lance.dataset(path), ours


def is_ours(dataset: DfaissDataset, **options: Any) -> bool:
    return isinstance(dataset.scanner(nearest={"column": "vec", "q": QUERY}, **options), DfaissScanner)


@pytest.mark.parametrize("prefilter", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("sql", FILTERS)
def test_filters(pair: Pair, sql: str, prefilter: bool) -> None:
    options = {"filter": sql, "prefilter": prefilter}
    for nearest in ({"k": 20}, {"q": BATCH}, {"k": ROWS}):
        same(ask(pair[0], nearest, options), ask(pair[1], nearest, options))
    assert is_ours(pair[1], **options)


@pytest.mark.parametrize("prefilter", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_filters_and_other_options(pair: Pair, options: dict[str, Any], prefilter: bool) -> None:
    wanted = {**options, "filter": "id > 100", "prefilter": prefilter}
    for nearest in ({"k": 20}, {"q": BATCH}):
        same(ask(pair[0], nearest, wanted), ask(pair[1], nearest, wanted))
    assert is_ours(pair[1], **wanted)


def test_a_filter_comes_after_the_search_unless_it_is_asked_for_before(pair: Pair) -> None:
    after, before = (ask(pair[1], {"k": 5}, {"filter": "id > 100", **how}) for how in ({}, {"prefilter": True}))
    assert (after.num_rows, before.num_rows) == (3, 5)


@pytest.mark.parametrize("prefilter", [False, True], ids=["after", "before"])
def test_counts_and_schema(pair: Pair, prefilter: bool) -> None:
    options: dict[str, Any] = {"filter": "n > 50", "prefilter": prefilter, "columns": ["id"]}
    for nearest in ({"column": "vec", "q": QUERY, "k": 50}, {"column": "vec", "q": BATCH}):
        theirs, ours = (dataset.scanner(nearest=nearest, **options) for dataset in pair)
        assert ours.count_rows() == theirs.count_rows()
        assert ours.projected_schema.equals(theirs.projected_schema, check_metadata=True)


def test_default_filters(pair: Pair) -> None:
    for defaults in ({"filter": "id > 20"}, {"filter": "id > 20", "prefilter": True}):
        options: dict[str, Any] = {"default_scan_options": defaults}
        theirs, ours = lance.dataset(pair[0].uri, **options), lance_dfaiss.dataset(pair[0].uri, **options)
        same(ask(theirs, {"k": 20}, {}), ask(ours, {"k": 20}, {}))
        same(ask(theirs, {"k": 20}, {"filter": "n > 3"}), ask(ours, {"k": 20}, {"filter": "n > 3"}))
        assert is_ours(ours)


@pytest.mark.parametrize(
    "options",
    [
        {"filter": pc.field("id") > 100},
        {"filter": pc.field("id") > 100, "prefilter": True},
        {"filter": "_distance < 4.5"},
        {"filter": "id > 100 and _Distance < 4.5"},
        {"filter": "_rowid > 5", "prefilter": True, "fragments": None},
    ],
    ids=str,
)
def test_filters_that_only_lance_knows(pair: Pair, options: dict[str, Any]) -> None:
    same(ask(pair[0], {"k": 20}, options), ask(pair[1], {"k": 20}, options))
    assert is_ours(pair[1], **options) == ("_rowid" in str(options["filter"]))


def test_a_filter_over_the_number_of_the_query(pair: Pair) -> None:
    options = {"filter": "query_index = 1"}
    same(ask(pair[0], {"q": BATCH}, options), ask(pair[1], {"q": BATCH}, options))


@pytest.mark.parametrize("prefilter", [False, True], ids=["after", "before"])
@pytest.mark.parametrize(
    "sql",
    ["", "  ", "id >>> 3", "nope > 3", "id + 1", "null", "_rowoffset > 3", "_distance > 'x'", "st.nope = 1"],
)
def test_bad_filters_raise_what_lance_raises(pair: Pair, sql: str, prefilter: bool) -> None:
    scanners = [
        dataset.scanner(nearest={"column": "vec", "q": QUERY}, filter=sql, prefilter=prefilter) for dataset in pair
    ]
    for read in ("to_table", "count_rows"):
        with pytest.raises(Exception) as theirs:  # noqa: PT011 - Lance says which
            getattr(scanners[0], read)()
        with pytest.raises(type(theirs.value)) as ours:
            getattr(scanners[1], read)()
        # Which columns there are, is told differently.
        assert str(ours.value).partition("Valid fields")[0] == str(theirs.value).partition("Valid fields")[0]
        assert ours.value.__context__ is None


@pytest.mark.parametrize("options", [{"prefilter": 1}, {"fast_search": "yes"}, {"filter": 3}], ids=str)
def test_options_of_the_wrong_type_raise_what_lance_raises(pair: Pair, options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - Lance says which
        ask(pair[0], {}, options)
    with pytest.raises(type(theirs.value)):
        ask(pair[1], {}, options)


def test_a_filter_after_the_search_looks_at_k_rows_of_each_query(pair: Pair) -> None:
    twice = np.stack([QUERY, QUERY])
    found = ask(pair[1], {"q": twice}, {"filter": "id > 100"})
    assert found["query_index"].to_pylist() == [0] * 3 + [1] * 3
    assert found["id"].to_pylist() == [208, 325, 344] * 2


def test_filters_over_columns_that_came_after_the_index(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT")
    ours.add_columns({"late": "id * 2"})
    for prefilter in (False, True):
        options = {"filter": "late > 200", "prefilter": prefilter}
        same(ask(lance.dataset(ours.uri), {"k": 20}, options), ask(ours, {"k": 20}, options))
        assert is_ours(ours, **options)


def test_a_scanner_stays_with_its_version_when_lance_answers(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT")
    scanner = ours.scanner(nearest={"column": "vec", "q": QUERY}, filter="late > 3", prefilter=True)
    ours.add_columns({"late": "id * 2"})
    with pytest.raises(ValueError, match="No field named late"):
        scanner.to_table()


@pytest.mark.parametrize(("kind", "metric"), [("FLAT", "dot"), ("IVF_FLAT", "cosine"), ("HNSW_FLAT", "dot")])
def test_filters_before_the_search_over_every_kind_of_index(tmp_path: Path, kind: str, metric: str) -> None:
    plain = written(tmp_path / "d.lance")
    options = {"num_partitions": 8} if kind == "IVF_FLAT" else {}
    ours = lance_dfaiss.dataset(plain.uri).create_index("vec", kind, metric=metric, **options)  # type: ignore[arg-type]
    asked = {"filter": "id % 40 = 0", "prefilter": True}
    assert is_ours(ours, **asked)
    for k in (3, 10, 50):
        same(ask(plain, {"k": k, "metric": metric}, asked), ask(ours, {"k": k}, asked))


def test_filters_before_the_search_find_appended_rows_too(tmp_path: Path) -> None:
    ours = lance_dfaiss.dataset(written(tmp_path / "d.lance")).create_index("vec", "FLAT")
    ours.insert(rows(np.stack([QUERY, QUERY * 2]), ROWS))
    plain = lance.dataset(ours.uri)
    for prefilter in (False, True):
        options = {"filter": "id % 2 = 0", "prefilter": prefilter}
        same(ask(plain, {}, options), ask(ours, {}, options))
