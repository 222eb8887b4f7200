"""Which filters pass the check, that Lance reads them the same way, and that none of them hurts it."""

from __future__ import annotations

import datetime as dt
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lance_dfaiss.errors import AccessDenied, FilterRefused, FilterTooCostly, InvalidFilter, StorageError, UnknownColumn
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.serve import sifter as sifter_module
from lance_dfaiss.serve.sifter import Sifter
from lance_dfaiss.serve.sql import (
    FUNCTIONS,
    MAX_DEPTH,
    MAX_DOUBLINGS,
    MAX_FILTER_BYTES,
    MAX_OPERATORS,
    MAX_PATTERN_CHARS,
    MAX_REGEXES,
    check_filter,
)

Row = dict[str, Any]
ROWS = 60
DAY, HOUR = dt.date(2020, 1, 1), dt.datetime(2020, 1, 1)


def _row(i: int) -> Row:
    return {
        "a": i,
        "Foo": i % 4,
        "f": i / 3 if i % 7 else None,
        "s": f"name{i % 5}" if i % 6 else None,
        "b": i % 2 == 0,
        "d": DAY + dt.timedelta(days=i),
        "ts": HOUR + dt.timedelta(hours=i),
        "l": [i, i + 1],
        "tags": ["x", f"y{i % 3}"],
        "st": {"x": i, "y": f"q{i % 4}", "z": {"w": i}},
        "odd name": i,
        "größe": i,
        "select": i,
        "quote": ["it's", 'say "hi"', "back\\slash", "tick`"][i % 4],
    }


DATA = [_row(i) for i in range(ROWS)]

# What a filter means; None (unknown) counts as not matching.
CORPUS: list[tuple[str, Callable[[Row], Any]]] = [
    ("a = 3", lambda r: r["a"] == 3),
    ("a == 3", lambda r: r["a"] == 3),
    ("a <> 3 AND a != 4", lambda r: r["a"] not in (3, 4)),
    ("a<3 or a>=57", lambda r: r["a"] < 3 or r["a"] >= 57),
    ("a > 3 and (a <= 10 or b)", lambda r: r["a"] > 3 and (r["a"] <= 10 or r["b"])),
    ("not b", lambda r: not r["b"]),
    ("NOT (b AND a > 10)", lambda r: not (r["b"] and r["a"] > 10)),
    ("not not b", lambda r: r["b"]),
    ("b", lambda r: r["b"]),
    ("b = true", lambda r: r["b"]),
    ("b is true", lambda r: r["b"]),
    ("b IS NOT FALSE", lambda r: r["b"]),
    ("true", lambda _: True),
    ("false", lambda _: False),
    ("s is null", lambda r: r["s"] is None),
    ("s IS NOT NULL and f is null", lambda r: r["s"] is not None and r["f"] is None),
    ("a = null", lambda _: False),
    ("s is distinct from 'name1'", lambda r: r["s"] != "name1"),
    ("s is not distinct from 'name1'", lambda r: r["s"] == "name1"),
    ("a in (1, 2,3 )", lambda r: r["a"] in (1, 2, 3)),
    ("a not in (1,2)", lambda r: r["a"] not in (1, 2)),
    ("s in ('name1', \"name2\")", lambda r: r["s"] in ("name1", "name2")),
    ("a between 3 and 7", lambda r: 3 <= r["a"] <= 7),
    ("a not between 3 and 7 and b", lambda r: not 3 <= r["a"] <= 7 and r["b"]),
    ("s like 'name_'", lambda r: r["s"] is not None),
    ("s like '%1'", lambda r: r["s"] == "name1"),
    ("s not like '%1'", lambda r: r["s"] not in (None, "name1")),
    ("s ilike 'NAME1'", lambda r: r["s"] == "name1"),
    ('s = "name1"', lambda r: r["s"] == "name1"),
    ("\"s\" = 's'", lambda _: True),
    ("\"a\" = 'b'", lambda _: False),
    ("quote = 'it''s'", lambda r: r["quote"] == "it's"),
    ('quote = "it\'s"', lambda r: r["quote"] == "it's"),
    ('quote = "say ""hi"""', lambda r: r["quote"] == 'say "hi"'),
    ("quote = 'back\\slash'", lambda r: r["quote"] == "back\\slash"),
    ("quote = 'tick`'", lambda r: r["quote"] == "tick`"),
    ("quote = 'x -- y /* z */ ; (select 1)'", lambda _: False),
    ("s = 'a\\' or b", lambda r: r["b"]),
    ("a + 1 = 4", lambda r: r["a"] == 3),
    ("a*2+1 > 11 and a - 5 < 10", lambda r: r["a"] * 2 + 1 > 11 and r["a"] - 5 < 10),
    ("a % 3 = 1", lambda r: r["a"] % 3 == 1),
    ("a / 2 = 4", lambda r: r["a"] // 2 == 4),
    ("a = - - 3", lambda r: r["a"] == 3),
    ("-a < -50", lambda r: r["a"] > 50),
    ("f > 1.5", lambda r: r["f"] is not None and r["f"] > 1.5),
    ("f < .5", lambda r: r["f"] is not None and r["f"] < 0.5),
    ("f > 1e1", lambda r: r["f"] is not None and r["f"] > 10),
    ("`odd name` = 3", lambda r: r["odd name"] == 3),
    ("`größe` = 3", lambda r: r["größe"] == 3),
    ("`select` = 3", lambda r: r["select"] == 3),
    ("Foo = 2", lambda r: r["Foo"] == 2),
    ("st.x = 3", lambda r: r["a"] == 3),
    ("`st`.`x` = 3 or st.z.w = 4", lambda r: r["a"] in (3, 4)),
    ("st['y'] = 'q1'", lambda r: r["st"]["y"] == "q1"),
    ("get_field(st, 'x') = 3", lambda r: r["a"] == 3),
    ("l[1] = 3", lambda r: r["l"][0] == 3),
    ("l = [3, 4]", lambda r: r["l"] == [3, 4]),
    ("array_has(tags, 'y1')", lambda r: "y1" in r["tags"]),
    ("array_has_any(tags, ['y1', 'y2'])", lambda r: not {"y1", "y2"}.isdisjoint(r["tags"])),
    ("array_has_all(tags, ['x', 'y2'])", lambda r: {"x", "y2"} <= set(r["tags"])),
    ("array_length(l) = 2", lambda _: True),
    ("d = date '2020-01-03'", lambda r: r["d"] == dt.date(2020, 1, 3)),
    ("d >= cast('2020-02-01' as date)", lambda r: r["d"] >= dt.date(2020, 2, 1)),
    ("ts > timestamp '2020-01-02 00:00:00'", lambda r: r["ts"] > dt.datetime(2020, 1, 2)),
    ("ts between timestamp '2020-01-01' and timestamp '2020-01-02'", lambda r: r["a"] <= 24),
    ("date_part('hour', ts) = 3", lambda r: r["ts"].hour == 3),
    ("date_trunc('day', ts) = timestamp '2020-01-02'", lambda r: r["ts"].date() == dt.date(2020, 1, 2)),
    ("to_timestamp('2020-01-02') < ts", lambda r: r["ts"] > dt.datetime(2020, 1, 2)),
    ("lower(upper(s)) = 'name1'", lambda r: r["s"] == "name1"),
    ("length(s) = 5 and char_length(s) < 6", lambda r: r["s"] is not None),
    ("starts_with(s, 'name') and ends_with(s, '2')", lambda r: r["s"] == "name2"),
    ("contains(s, 'ame3')", lambda r: r["s"] == "name3"),
    ("left(s, 2) = 'na' and strpos(s, '4') > 0", lambda r: r["s"] == "name4"),
    ("regexp_like(s, '^name[12]$')", lambda r: r["s"] in ("name1", "name2")),
    ("regexp_match(s, 'e3') is not null", lambda r: r["s"] == "name3"),
    ("abs(a - 10) < 3 and round(f) >= 3", lambda r: abs(r["a"] - 10) < 3 and r["f"] is not None),
    ("coalesce(s, 'none') = 'none'", lambda r: r["s"] is None),
    ("greatest(a, 50) = 50", lambda r: r["a"] <= 50),
    ("nullif(a, 3) is null", lambda r: r["a"] == 3),
    ("cast(a as string) = '3'", lambda r: r["a"] == 3),
    ("try_cast(s as int) is null", lambda _: True),
    ("cast(a as double) / 2 = 1.5", lambda r: r["a"] == 3),
    ("cast(a as decimal(10, 2)) = 3", lambda r: r["a"] == 3),
    ("cast(a as int unsigned) = 3", lambda r: r["a"] == 3),
    (" a\t=\n3 ", lambda r: r["a"] == 3),
]

REFUSED = [
    ("", "nothing"),
    ("  ", "nothing"),
    ("a = 3 -- c", "comment"),
    ("a--3 = 1", "comment"),
    ("a = /* c */ 3", "comment"),
    ("a = 3;", "';'"),
    ("a in (select a)", "SELECT"),
    ("exists (select 1)", "exists"),
    ("a = (SELECT 1)", "SELECT"),
    ("case when b then true else false end", "CASE"),
    ("ts > now()", "now()"),
    ("random() < 0.5", "random()"),
    ("d > current_date", "CURRENT_DATE"),
    ("repeat(s, 2) = 'x'", "repeat()"),
    ("REPEAT (s, 2) = 'x'", "REPEAT()"),
    ("lpad(s, 1000000) = 'x'", "lpad()"),
    ("concat(s, s) = 'x'", "concat()"),
    ("s || s = 'x'", "'|'"),
    ("replace(s, 'a', 'bbbb') = 'x'", "replace()"),
    ("array_repeat(1, 10) = l", "array_repeat()"),
    ("a.lower(s) = 'x'", "'('"),
    ("`lower`(s) = 'x'", "'('"),
    ("s = E'a'", '"E\'"'),
    ("s = N'a'", '"N\'"'),
    ("s = X'6'", '"X\'"'),
    ("s = 'a' 'b'", "\"'b'\""),
    ("s = 'a", '"\'"'),
    ('s = "a', "'\"'"),
    ("`a = 3", "'`'"),
    ("`a``b` = 3", "`a``"),
    ("`st.x` = 3", "'`'"),
    ("s = $1", "'$'"),
    ("s = ?", "'?'"),
    ("s = :x", "':'"),
    ("a = 1_000", "1_"),
    ("a = 0x10", "0x"),
    ("a = 1..2", "number"),
    ("a = " + "1" * 65, "number"),
    ("a::int = 3", "':'"),
    ("größe = 3", "'ö'"),
    ("a\u00a0= 3", "'\\xa0'"),
    ("a = 3\0", "'\\x00'"),
    ("a = '\ud800'", "character"),
    ("a = b = b", "'='"),
    ("a is null is null", "'is'"),
    ("a in (1) in (true)", "'in'"),
    ("a in 1", "'1'"),
    ("a in ()", "')'"),
    ("(a, b) = (1, 2)", "','"),
    ("(a", "its end"),
    ("a)", "')'"),
    ("a = ", "its end"),
    ("a and", "its end"),
    ("a 3", "'3'"),
    ("a not 3", "'3'"),
    ("a is 3", "'3'"),
    ("a between 1 or 2", "'or'"),
    ("l[1:2] = l", "':'"),
    ("l[1, 2] = l", "','"),
    ("a. = 3", "'='"),
    ('"st".x = 3', "'.'"),
    ('st."x" = 3', "'\"x\"'"),
    ("cast(a as varchar) = 'x'", "'varchar'"),
    ("cast(a as decimal(100, 2)) = 1", "'100'"),
    ("cast(a)", "')'"),
    ("lower() = 'x'", "')'"),
    ("a collate nocase = 'x'", "'collate'"),
    ("a <=> 3", "'>'"),
    ("a << 3", "'<'"),
    ("regexp_like(s, s)", "no text"),
    ("regexp_like(s, 'a', lower('I'))", "no text"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> lance.LanceDataset:
    path = tmp_path_factory.mktemp("sql") / "rows.lance"
    return lance.write_dataset(pa.Table.from_pylist(DATA), str(path), max_rows_per_file=25)


@pytest.fixture(scope="module")
def thin(dataset: lance.LanceDataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sifter]:
    """Evaluates filters on threads of 1 MB of stack, half of what they have by default."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sifter_module, "_STACK_BYTES", str(1024 * 1024))
        sifter = Sifter(memory_limit_bytes=512 * 1024 * 1024, timeout_seconds=20)
        sifter.open("rows", PinnedDataset(dataset), None)
        shifted = pa.Table.from_pylist([{**_row(i + 7), "a": i} for i in range(ROWS)], schema=dataset.schema)
        others = lance.write_dataset(
            shifted, str(tmp_path_factory.mktemp("others") / "rows.lance"), max_rows_per_file=25
        )
        sifter.open("others", PinnedDataset(others), None)
        sifter.start()
        yield sifter
        sifter.close()


def _evaluate(sifter: Sifter, sql: str, key: str = "rows") -> list[int] | None:
    """Evaluate a filter that passed the check: it may be wrong (None), but must do no harm."""
    try:
        return [int(row) for row in sifter.matching(key, sql)]
    except FilterTooCostly:
        raise
    except (InvalidFilter, UnknownColumn):
        return None


@pytest.mark.parametrize(("sql", "meaning"), CORPUS, ids=[sql for sql, _ in CORPUS])
def test_a_harmless_filter_passes_and_means_what_it_says(
    dataset: lance.LanceDataset, sql: str, meaning: Callable[[Row], Any]
) -> None:
    check_filter(sql, columns=None)
    check_filter(sql, columns=DATA[0].keys())
    expected = [row["a"] for row in DATA if meaning(row)]
    assert dataset.to_table(columns=["a"], filter=sql)["a"].to_pylist() == expected


@pytest.mark.parametrize(("sql", "found"), REFUSED, ids=[repr(sql)[:40] for sql, _ in REFUSED])
def test_what_is_not_understood_is_refused_by_place(sql: str, found: str) -> None:
    with pytest.raises(FilterRefused) as caught:
        check_filter(sql, columns=None)
    assert found in caught.value.message
    assert " at character " in caught.value.message
    assert caught.value.remedy


def test_a_refusal_names_the_character() -> None:
    with pytest.raises(FilterRefused, match="at character 13"):
        check_filter("a = 3 and b ; c", columns=None)


def test_every_function_of_the_list_is_known_to_lance(dataset: lance.LanceDataset) -> None:
    for name in sorted(FUNCTIONS):
        with pytest.raises(ValueError, match=r".") as caught:
            dataset.to_table(columns=[], filter=f"{name}(1, 2, 3, 4, 5, 6, 7) = 'x'", with_row_id=True)
        assert "Invalid function" not in str(caught.value), name


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (f"s = '{'x' * (MAX_FILTER_BYTES - 6)}'", f"s = '{'x' * (MAX_FILTER_BYTES - 5)}'"),
        (f"s = '{'ö' * (MAX_FILTER_BYTES // 2 - 3)}'", f"s = '{'ö' * (MAX_FILTER_BYTES // 2)}'"),
        (*(f"a > {'+'.join(['a'] * n)}" for n in (MAX_OPERATORS, MAX_OPERATORS + 1)),),
        (*(" and ".join(["b"] * n) for n in (MAX_OPERATORS + 1, MAX_OPERATORS + 2)),),
        (*(f"coalesce({','.join(['b'] * n)})" for n in (MAX_OPERATORS, MAX_OPERATORS + 1)),),
        (*(f"st{'.x' * n} = 1" for n in (MAX_OPERATORS - 1, MAX_OPERATORS + 1)),),
        (*("(" * n + "b" + ")" * n for n in (MAX_DEPTH, MAX_DEPTH + 1)),),
        (*("not " * n + "b" for n in (MAX_DEPTH, MAX_DEPTH + 1)),),
        (*("a = " + "- " * n + "3" for n in (MAX_DEPTH, MAX_DEPTH + 1)),),
        (*("b in (" * n + "b" + ")" * n for n in (MAX_DEPTH, MAX_DEPTH + 1)),),
        (*("cast(" * n + "a" + " as int)" * n + " = 3" for n in (MAX_DEPTH, MAX_DEPTH + 1)),),
        (*("l = " + "[" * n + "1" + "]" * n for n in (MAX_DEPTH, MAX_DEPTH + 1)),),
        (*("coalesce(" * n + "s" + ",'x')" * n + "='x'" for n in (MAX_DOUBLINGS, MAX_DOUBLINGS + 1)),),
        (*("(" * n + "b" + " between b and true)" * n for n in (MAX_DOUBLINGS, MAX_DOUBLINGS + 1)),),
        (*(" or ".join(["regexp_like(s, 'x')"] * n) for n in (MAX_REGEXES, MAX_REGEXES + 1)),),
        (*(f"regexp_like(s, '{'x' * n}')" for n in (MAX_PATTERN_CHARS, MAX_PATTERN_CHARS + 1)),),
    ],
    ids=[
        "length", "bytes", "sum", "and", "arguments", "path", "parentheses", "not", "minus", "in", "cast", "brackets",
        "coalesce", "between", "regexes", "pattern",
    ],
)  # fmt: skip
def test_each_limit_is_where_it_says_and_lance_takes_what_is_within(thin: Sifter, good: str, bad: str) -> None:
    check_filter(good, columns=None)
    with pytest.raises(FilterRefused):
        check_filter(bad, columns=None)
    _evaluate(thin, good)
    assert thin.restarts == 0


def test_a_list_of_values_may_be_long(dataset: lance.LanceDataset) -> None:
    sql = f"a in ({','.join(map(str, range(3, 3000)))})"
    check_filter(sql, columns=["a"])
    assert dataset.count_rows(sql) == ROWS - 3


@pytest.mark.parametrize(
    "sql",
    [
        f"a > {'+'.join(['1'] * 4000)}",
        " and ".join(["a > 1"] * 400_000),
        "length(repeat(s, 2000000)) > 5",
    ],
    ids=["sum", "and", "repeat"],
)
def test_what_was_seen_to_end_a_server_is_refused(sql: str) -> None:
    with pytest.raises(FilterRefused) as caught:
        check_filter(sql, columns=None)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "sql",
    ["a = 1", "`a` = 1", "_rowid = 3", "st.x = 1", "st.x.y = 1", "\"secret\" = 'secret'", "whole.thing['x'] = 1"],
)
def test_allowed_columns_may_be_named(sql: str) -> None:
    check_filter(sql, columns=["a", "st.x", "whole"])


@pytest.mark.parametrize(
    "sql",
    [
        "secret = 1",
        "a = 1 or secret = 1",
        "`secret` = 1",
        "A = 1",
        "st = st",
        "st.y = 1",
        "st['x'] = 1",
        "get_field(st, 'x') = 1",
        "st.xx = 1",
        "lower(secret) = 'x'",
        "a in (1, secret)",
        "l[secret] = 1",
        "[secret] = [1]",
        "cast(secret as int) = 1",
        "a between secret and 2",
        "a is distinct from secret",
        "a like secret",
        "not secret",
        "-secret > 1",
        "date = 1",
        "array = 1",
        "_rowaddr = 1",
        "_rowid.x = 1",
        "t.a = 1",
        "`true`",
    ],
)
def test_a_column_that_is_not_allowed_is_denied(sql: str) -> None:
    check_filter(sql, columns=None)
    with pytest.raises(AccessDenied, match="may not name column"):
        check_filter(sql, columns=["a", "st.x"])


def test_what_stands_in_double_quotes_is_never_a_column_in_lance(dataset: lance.LanceDataset) -> None:
    """The check takes it for a text: if Lance took it for a column, that would be a way around the allow-list."""
    places = ["{0} = 's'", "{0} is null", "lower({0}) = 's'", "{0} in ('s')", "'s' in ({0})", "{0} like 's'"]
    places += [
        "coalesce({0}, 'x') = 's'",
        "cast({0} as string) = 's'",
        "array_has([{0}], 's')",
        "nullif({0}, 's') = ''",
    ]
    for place in places:
        filters = place.format('"s"'), place.format("'s'")
        assert dataset.count_rows(filters[0]) == dataset.count_rows(filters[1]), place


_NAMES = st.sampled_from(["a", "f", "s", "b", "d", "ts", "l", "tags", "st.x", "st", "`odd name`", "Foo", "nosuch"])
_VALUES = st.sampled_from(
    ["1", "-1", "0", "2.5", "'name1'", '"x"', "null", "true", "date '2020-01-02'", "[1, 2]", "''"]
)
_TYPES = st.sampled_from(
    ["int", "bigint unsigned", "string", "double", "date", "timestamp(3)", "decimal(5, 2)", "binary"]
)
_CALLS = st.sampled_from(sorted(FUNCTIONS - {"regexp_like", "regexp_match"}))


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, st.sampled_from(["=", "<", ">=", "<>", "+", "-", "*", "/", "%", "and", "or"]), inner).map(
            " ".join
        ),
        inner.map(lambda x: f"({x})"),
        inner.map(lambda x: f"not {x}"),
        inner.map(lambda x: f"- {x}"),
        inner.map(lambda x: f"{x} is not null"),
        two.map(lambda x: f"({x[0]}) is distinct from ({x[1]})"),
        st.tuples(inner, inner, inner).map(lambda x: f"({x[0]}) between ({x[1]}) and ({x[2]})"),
        st.tuples(inner, st.lists(inner, min_size=1, max_size=4)).map(lambda x: f"({x[0]}) in ({', '.join(x[1])})"),
        two.map(lambda x: f"({x[0]}) like ({x[1]})"),
        two.map(lambda x: f"{x[0]}[{x[1]}]"),
        st.lists(inner, min_size=1, max_size=3).map(lambda x: f"[{', '.join(x)}]"),
        st.tuples(inner, _TYPES).map(lambda x: f"cast({x[0]} as {x[1]})"),
        st.tuples(_CALLS, st.lists(inner, min_size=1, max_size=3)).map(lambda x: f"{x[0]}({', '.join(x[1])})"),
    )


_FILTERS = st.recursive(_NAMES | _VALUES, _larger, max_leaves=12)


def _passes(sql: str) -> bool:
    try:
        check_filter(sql, columns=None)
    except FilterRefused:
        return False
    return True


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(_FILTERS.filter(_passes))
def test_whatever_passes_does_lance_no_harm(thin: Sifter, sql: str) -> None:
    _evaluate(thin, sql)
    assert thin.restarts == 0


_PIECES = """
a|s|b|st|.|x|(|)|[|]|,|=|<|>|-|+|*|/|%| and | or | not | in | is | null | between | like |'|"|`|\\|''|""|1|.5|e|E|X
| as | int |cast(|lower(|coalesce(|date | distinct from |a = a|"s"|'s'|ö|--|/*|*/|;|&|#|$|:|@|_rowid|A|true
""".replace("\n", "").split("|")

_NEAR_A = st.sampled_from(
    ["a", "`a`", "A", "_rowid", '"s"', "'s'", '"b"', "s", "st.x", '"st".x', "'", '"', "\\", "true"]
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(st.lists(st.sampled_from(_PIECES), max_size=25).map("".join) | st.recursive(_NEAR_A, _larger, max_leaves=6))
def test_what_passes_for_one_column_depends_on_no_other(thin: Sifter, sql: str) -> None:
    """Rows with equal values of that column, and others of all the rest, match just the same."""
    try:
        check_filter(sql, columns=["a"])
    except (FilterRefused, AccessDenied):
        return
    assert _evaluate(thin, sql) == _evaluate(thin, sql, "others"), sql


def _deep(seed: int) -> str:
    """A filter near the limits: chains of operators around nests of whatever nests."""
    draw = random.Random(seed)
    nests = ["({})", "({} + 1)", "-{}", "abs({})", "cast({} as bigint)", "round({})", "(1 - {})", "greatest({}, 1)"]
    value = "a"
    for _ in range(draw.randint(MAX_DEPTH // 2, MAX_DEPTH)):
        bigger = draw.choice(nests).format(value)
        value = bigger if _passes(f"{bigger} > 1") else value
    parts = [
        draw.choice(["a", "1", "f", "-1", "(a)", "a % 7", "l[1]"]) for _ in range(draw.randint(100, MAX_OPERATORS))
    ]
    parts.insert(draw.randrange(len(parts)), value)
    chained = draw.choice([" + ", " - ", " * "]).join(parts)
    while not _passes(f"{chained} > 1"):
        chained = chained.rpartition(" ")[0].rstrip(" +-*%")
    return f"{chained} > 1"


@pytest.mark.parametrize("seed", range(12))
def test_filters_near_the_limits_do_no_harm_on_a_small_stack(thin: Sifter, seed: int) -> None:
    sql = _deep(seed)
    assert len(sql) > 200
    _evaluate(thin, sql)
    assert thin.restarts == 0


def test_the_check_needs_little_stack_itself() -> None:
    limit = sys.getrecursionlimit()
    depth = 0
    frame = sys._getframe()
    while frame is not None:
        depth, frame = depth + 1, frame.f_back  # type: ignore[assignment]
    sys.setrecursionlimit(depth + 150)
    try:
        check_filter("(" * MAX_DEPTH + "b" + ")" * MAX_DEPTH, columns=None)
    finally:
        sys.setrecursionlimit(limit)


def test_a_part_of_sql_that_lance_has_no_code_for_is_a_wrong_filter(dataset: lance.LanceDataset) -> None:
    with pytest.raises(InvalidFilter, match="is not implemented"):
        PinnedDataset(dataset).matching("s = $1")


def test_constants_that_lance_cannot_fold_are_a_wrong_filter(dataset: lance.LanceDataset) -> None:
    with pytest.raises(InvalidFilter, match=r"cannot use the filter .*Can not run arithmetic negative"):
        PinnedDataset(dataset).matching("- ts = d")


def test_a_fragment_that_is_not_there_is_told(dataset: lance.LanceDataset) -> None:
    with pytest.raises(StorageError, match="no fragment 77"):
        PinnedDataset(dataset).matching("a > 1", [0, 77])


def test_no_fragments_match_nothing(dataset: lance.LanceDataset, tmp_path: Path) -> None:
    assert len(PinnedDataset(dataset).matching("a > 1", [])) == 0
    assert tmp_path.exists()
