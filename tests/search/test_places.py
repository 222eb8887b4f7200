"""Runs of rows against a dictionary of every single row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lance_dfaiss.search import filters, places
from lance_dfaiss.search.filters import match_addresses
from lance_dfaiss.search.places import Places, RunMap, expand, row_addresses, run_starts, split_addresses
from lance_dfaiss.testing.strategies import row_id_runs
from lance_dfaiss.types import Int64Array, UInt64Array

Row = tuple[int, int, int]
"""Position, fragment, offset."""

_LAST_OFFSET = 2**32 - 1


@st.composite
def runs(draw: st.DrawFn, *, disjoint: bool = True, max_runs: int = 12) -> list[tuple[int, int, int, int]]:
    """Runs of a few fragments, close to one another: they often touch, and where allowed they overlap."""
    found: list[tuple[int, int, int, int]] = []
    ends: dict[int, int] = {}
    position = 0
    for _ in range(draw(st.integers(0, max_runs))):
        length, fragment = draw(st.integers(1, 6)), draw(st.sampled_from([0, 1, 2, 7]))
        if disjoint:
            position += draw(st.integers(0, 2))
            offset = ends.get(fragment, 0) + draw(st.integers(0, 2))
            ends[fragment] = offset + length
        else:
            position, offset = draw(st.integers(0, 30)), draw(st.integers(0, 10))
        found.append((position, fragment, offset, length))
        position += length
    if disjoint and found:
        # Positions lie one after the other, offsets in any order.
        offsets = draw(st.permutations(range(len(found))))
        moved = [(found[i][1], found[i][2], found[i][3]) for i in offsets]
        starts = itertools.accumulate([0, *(length + 1 for _, _, length in moved)])
        gap = draw(st.booleans())
        found = [(start - (0 if gap else at), *run) for at, (start, run) in enumerate(zip(starts, moved, strict=False))]
    return found


def _rows(table: list[tuple[int, int, int, int]]) -> list[Row]:
    return [(p + i, f, o + i) for p, f, o, n in table for i in range(n)]


def _rows_of(found: Places) -> list[Row]:
    assert all(column.dtype == np.int64 for column in found.columns)
    return _rows([(int(p), int(f), int(o), int(n)) for p, f, o, n in zip(*found.columns, strict=True)])


@given(row_id_runs())
def test_positions_and_numbers_are_each_others_inverse(runs: tuple[Int64Array, UInt64Array, Int64Array]) -> None:
    firsts, ids, lengths = runs
    table = {int(p) + i: int(r) + i for p, r, n in zip(firsts, ids, lengths, strict=True) for i in range(int(n))}
    mapping = RunMap(firsts, ids, lengths)
    positions = np.array(list(table), dtype=np.int64)
    row_ids = np.array(list(table.values()), dtype=np.uint64)
    np.testing.assert_array_equal(mapping.numbers(positions), row_ids)
    np.testing.assert_array_equal(mapping.positions(row_ids), positions)
    width = len(positions) // 2
    square = positions[: 2 * width].reshape(2, width)
    np.testing.assert_array_equal(mapping.numbers(square), row_ids[: 2 * width].reshape(2, width))
    again = RunMap.of_rows(positions, row_ids)
    np.testing.assert_array_equal(again.numbers(positions), row_ids)
    assert len(again.runs[0]) <= len(firsts)


@example((np.array([0]), np.array([0], dtype=np.uint64), np.array([1])), [2**63])
@given(row_id_runs(), st.lists(st.integers(0, 2**64 - 2), max_size=30))
def test_numbers_that_are_not_covered_have_no_position(
    runs: tuple[Int64Array, UInt64Array, Int64Array], asked: list[int]
) -> None:
    firsts, ids, lengths = runs
    covered = {int(r) + i: int(p) + i for p, r, n in zip(firsts, ids, lengths, strict=True) for i in range(int(n))}
    # Right before and right after a run is where mistakes are made.
    asked += [int(r) - 1 for r in ids if r] + [int(r) + int(n) for r, n in zip(ids, lengths, strict=True)]
    found = RunMap(firsts, ids, lengths).positions(np.array(asked, dtype=np.uint64))
    assert found.tolist() == [covered.get(row, -1) for row in asked]


def test_a_map_of_nothing() -> None:
    empty = RunMap.of_rows(np.empty(0, np.int64), np.empty(0, np.uint64))
    assert empty.positions(np.array([0, 7], np.uint64)).tolist() == [-1, -1]
    assert empty.numbers(np.array([[-1]])).shape == (1, 1)


@given(runs(), st.data())
def test_where_keeps_the_marked_rows(table: list[tuple[int, int, int, int]], data: st.DataObject) -> None:
    rows = _rows(table)
    positions = max((position for position, _, _ in rows), default=-1) + 1
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=positions, max_size=positions)), dtype=bool)
    found = Places.of(table).where(kept)
    assert _rows_of(found) == [row for row in rows if kept[row[0]]]
    assert found.rows == sum(bool(kept[row[0]]) for row in rows)


@given(runs())
def test_joined_runs_hold_the_same_rows_and_could_not_be_fewer(table: list[tuple[int, int, int, int]]) -> None:
    joined = Places.of(table).joined()
    rows = _rows(table)
    assert _rows_of(joined) == rows
    breaks = sum((q - p, g, t - s) != (1, f, 1) for (p, f, s), (q, g, t) in itertools.pairwise(rows))
    assert len(joined) == (breaks + 1 if rows else 0)


@given(runs(disjoint=False), st.booleans())
def test_disjoint_keeps_the_first_of_each_position_and_address(
    table: list[tuple[int, int, int, int]], ordered: bool
) -> None:
    given_places = Places.join([Places.of([run]) for run in table]) if ordered else Places.of(table)
    kept = _rows_of(given_places.disjoint())
    everything = _rows_of(given_places)
    positions, addresses = [row[0] for row in kept], [row[1:] for row in kept]
    assert len(set(positions)) == len(positions)
    assert len(set(addresses)) == len(addresses)
    assert set(kept) <= set(everything)
    first = {row[1:]: row for row in reversed(everything)}
    expected: dict[int, Row] = {}
    for row in everything:
        if first[row[1:]] == row:
            expected.setdefault(row[0], row)
    assert sorted(kept) == sorted(expected.values())
    if len(set(everything)) == len(everything) == len({r[0] for r in everything}) == len({r[1:] for r in everything}):
        assert sorted(kept) == sorted(everything)


@pytest.mark.parametrize("few", [0, 2, 2_000])
@given(table=runs(), data=st.data())
def test_marks_are_set_where_rows_live(few: int, table: list[tuple[int, int, int, int]], data: st.DataObject) -> None:
    rows = _rows(table)
    sizes = {f: max(o for _, g, o in rows if g == f) + 1 for _, f, _ in rows}
    dead = data.draw(st.sets(st.sampled_from(sorted(sizes)))) if sizes else set()
    alive = {
        f: np.array(data.draw(st.lists(st.booleans(), min_size=sizes[f], max_size=sizes[f])), dtype=bool) for f in dead
    }
    marks = np.zeros(max((p for p, _, _ in rows), default=-1) + 3, dtype=bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "_FEW_RUNS", few)
        Places.of(table).mark(marks, {**alive, 99: np.zeros(3, dtype=bool)})
    expected = np.zeros(len(marks), dtype=bool)
    for position, fragment, offset in rows:
        expected[position] = fragment not in alive or bool(alive[fragment][offset])
    assert marks.tolist() == expected.tolist()


@given(runs(), st.sets(st.sampled_from([0, 1, 2, 7, 8])))
def test_some_fragments(table: list[tuple[int, int, int, int]], wanted: set[int]) -> None:
    assert _rows_of(Places.of(table).in_fragments(wanted)) == [row for row in _rows(table) if row[1] in wanted]


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 5)), max_size=10))
def test_expand_counts_through_every_run(table: list[tuple[int, int]]) -> None:
    firsts, lengths = (np.array([run[i] for run in table], dtype=np.int64) for i in range(2))
    found = expand(firsts, lengths)
    assert found.dtype == np.int64
    assert found.tolist() == [first + i for first, length in table for i in range(length)]


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, _LAST_OFFSET)), max_size=10))
def test_addresses_come_apart_again(pairs: list[tuple[int, int]]) -> None:
    fragments, offsets = (np.array([pair[i] for pair in pairs], dtype=np.int64) for i in range(2))
    addresses = row_addresses(fragments, offsets)
    assert addresses.tolist() == [(f << 32) + o for f, o in pairs]
    again = split_addresses(addresses)
    assert [again[0].tolist(), again[1].tolist()] == [fragments.tolist(), offsets.tolist()]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=12, max_size=12))
def test_a_run_starts_where_one_number_does_not_follow(left: list[int], right: list[int]) -> None:
    a, b = np.array(left, dtype=np.int64), np.array(right[: len(left)], dtype=np.uint64)
    expected = [i for i in range(len(a)) if i == 0 or a[i] != a[i - 1] + 1 or int(b[i]) != int(b[i - 1]) + 1]
    assert run_starts(a, b).tolist() == expected


@pytest.mark.parametrize("few", [0, 500])
@given(table=runs(), data=st.data())
def test_addresses_become_positions_and_the_rest(
    few: int, table: list[tuple[int, int, int, int]], data: st.DataObject
) -> None:
    rows = _rows(table)
    by_address = {(f << 32) + o: p for p, f, o in rows}
    strange = st.sampled_from([(f << 32) + o for f in (0, 1, 2, 3, 7) for o in range(40)])
    asked = data.draw(st.sets(st.sampled_from(sorted(by_address)) | strange if by_address else strange))
    order = data.draw(st.permutations(sorted(asked)))
    positions = max((p for p, _, _ in rows), default=-1) + 1
    live = np.array(data.draw(st.lists(st.booleans(), min_size=positions, max_size=positions)), dtype=bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "_FEW_RUNS", few)
        found = match_addresses(np.array(order, dtype=np.uint64), Places.of(table).run_map(), live)
    expected = {by_address[a] for a in asked if a in by_address and live[by_address[a]]}
    assert set(np.flatnonzero(found.mask(positions)).tolist()) == expected
    assert found.rows == len(expected)
    assert found.addresses.tolist() == sorted(a for a in asked if a not in by_address)


@given(runs(), st.sets(st.integers(0, 60), max_size=8), st.booleans())
def test_cut_runs_lie_on_one_side_of_every_border(
    table: list[tuple[int, int, int, int]], borders: set[int], twice: bool
) -> None:
    every = sorted([*borders, *(borders if twice else ())])
    cut = Places.of(table).cut(np.array(every, dtype=np.int64))
    assert _rows_of(cut) == _rows(table)
    for position, length in zip(cut.positions.tolist(), cut.lengths.tolist(), strict=True):
        assert length > 0
        assert not borders & set(range(position + 1, position + length))
