"""Snapshot resolution, on its own: which positions are live and whose rows they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lance_dfaiss.errors import DatasetChanged
from lance_dfaiss.manifest import Cover, FragmentSignature, RunTable
from lance_dfaiss.plan import FragmentState, RowCost, plan_tasks
from lance_dfaiss.search.snapshot import RowIdMap, fragments_to_read, resolve_snapshot
from lance_dfaiss.testing.strategies import fragment_states, row_id_runs
from lance_dfaiss.types import Int64Array, UInt64Array

_COST = RowCost(family="flat", code_bytes=1, id_bytes=0, refine_bytes=0, link_bytes=0, fixed_bytes=0)


def _covers(states: list[FragmentState], num_shards: int, skipped: set[int]) -> list[Cover]:
    """Covers of the states as built; ``skipped`` are positions of the generation."""
    covers, first = [], 0
    for task in plan_tasks(states, _COST, num_shards=num_shards, budget_bytes=10**12):
        here = sorted(p - first for p in skipped if first <= p < first + task.physical_rows)
        covers.append(
            Cover(
                physical_rows=task.physical_rows,
                fragments=task.fragments,
                row_ids=None,
                deleted=RunTable.empty(2),
                skipped=RunTable.of(np.array([(p, 1) for p in here], dtype=np.uint64).reshape(-1, 2)),
                remap=None,
            )
        )
        first += task.physical_rows
    return covers


@given(row_id_runs())
def test_positions_and_row_ids_are_each_others_inverse(runs: tuple[Int64Array, UInt64Array, Int64Array]) -> None:
    firsts, ids, lengths = runs
    table = {int(p) + i: int(r) + i for p, r, n in zip(firsts, ids, lengths, strict=True) for i in range(int(n))}
    mapping = RowIdMap(firsts, ids, lengths)
    positions = np.array(list(table), dtype=np.int64)
    row_ids = np.array(list(table.values()), dtype=np.uint64)
    np.testing.assert_array_equal(mapping.row_ids(positions), row_ids)
    np.testing.assert_array_equal(mapping.positions(row_ids), positions)
    width = len(positions) // 2
    square = positions[: 2 * width].reshape(2, width)
    np.testing.assert_array_equal(mapping.row_ids(square), row_ids[: 2 * width].reshape(2, width))


@example((np.array([0]), np.array([0], dtype=np.uint64), np.array([1])), [2**63])
@given(row_id_runs(), st.lists(st.integers(0, 2**64 - 2), max_size=30))
def test_row_ids_that_are_not_covered_have_no_position(
    runs: tuple[Int64Array, UInt64Array, Int64Array], asked: list[int]
) -> None:
    firsts, ids, lengths = runs
    covered = {int(r) + i: int(p) + i for p, r, n in zip(firsts, ids, lengths, strict=True) for i in range(int(n))}
    # Right before and right after a run is where mistakes are made.
    asked += [int(r) - 1 for r in ids if r] + [int(r) + int(n) for r, n in zip(ids, lengths, strict=True)]
    found = RowIdMap(firsts, ids, lengths).positions(np.array(asked, dtype=np.uint64))
    assert found.tolist() == [covered.get(row, -1) for row in asked]


def test_a_map_of_nothing() -> None:
    empty = RowIdMap(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64))
    assert empty.positions(np.array([0, 7], np.uint64)).tolist() == [-1, -1]


@given(st.data(), fragment_states(max_size=6, max_rows=12), st.integers(1, 4))
def test_live_is_what_is_indexed_and_not_deleted(
    data: st.DataObject, states: list[FragmentState], num_shards: int
) -> None:
    total = sum(state.physical_rows for state in states)
    skipped = data.draw(st.sets(st.integers(0, total - 1)))
    covers = _covers(states, num_shards, skipped)
    now, live_offsets, expected, position = [], {}, [], 0
    for state in states:
        fate = data.draw(st.sampled_from(("kept", "some deleted", "all deleted")))
        alive = set(range(state.physical_rows))
        if fate == "all deleted":
            alive = set()
        elif fate == "some deleted":
            alive = data.draw(st.sets(st.sampled_from(sorted(alive)), min_size=1))
        if alive:
            now.append(dataclasses.replace(state, deleted_rows=state.physical_rows - len(alive)))
            live_offsets[state.fragment_id] = np.array(sorted(alive), dtype=np.int64)
        expected += [offset in alive and position + offset not in skipped for offset in range(state.physical_rows)]
        position += state.physical_rows
    read = fragments_to_read(covers, now)
    assert read == [state.fragment_id for state in now if state.deleted_rows]
    snapshot = resolve_snapshot(covers, now, {i: live_offsets[i] for i in read}, version=9)
    assert snapshot.live.tolist() == expected
    assert snapshot.version == 9
    assert snapshot.indexed_rows == total - len(skipped)
    assert snapshot.live_rows == sum(expected)
    assert snapshot.masked_rows == total - len(skipped) - sum(expected)
    addresses = [(state.fragment_id << 32) + offset for state in states for offset in range(state.physical_rows)]
    np.testing.assert_array_equal(snapshot.row_ids.row_ids(np.arange(total)), np.array(addresses, dtype=np.uint64))


def test_stable_row_ids_come_from_the_cover() -> None:
    signature = FragmentSignature(files=(("a", 0),), overlays=())
    states = [FragmentState(fragment_id=i, physical_rows=4, deleted_rows=0, signature=signature) for i in (0, 5)]
    runs = [[(0, 100, 3), (3, 7, 1)], [(1, 50, 3)]]
    covers = [
        dataclasses.replace(cover, row_ids=RunTable.of(np.array(table, dtype=np.uint64)))
        for cover, table in zip(_covers(states, 2, {4}), runs, strict=True)
    ]
    snapshot = resolve_snapshot(covers, states, {}, version=1)
    assert snapshot.row_ids.row_ids(np.array([0, 1, 2, 3, 5, 6, 7])).tolist() == [100, 101, 102, 7, 50, 51, 52]
    assert snapshot.row_ids.positions(np.array([7, 52, 103], np.uint64)).tolist() == [3, 7, -1]


@given(st.data(), fragment_states(min_size=2, max_size=8, max_rows=5))
def test_rows_that_are_not_covered_are_named(data: st.DataObject, states: list[FragmentState]) -> None:
    covers = _covers(states, 2, set())
    changed = data.draw(st.sets(st.sampled_from([state.fragment_id for state in states]), min_size=1))
    other = FragmentSignature(files=(("rewritten", 0),), overlays=())
    longer = data.draw(st.booleans())
    now = [
        state
        if state.fragment_id not in changed
        else dataclasses.replace(state, physical_rows=state.physical_rows + 1)
        if longer
        else dataclasses.replace(state, signature=other)
        for state in states
    ]
    with pytest.raises(DatasetChanged, match="were rewritten") as caught:
        resolve_snapshot(covers, now, {}, version=4)
    assert caught.value.fragments == tuple(sorted(changed))

    kept = [state for state in states if state.fragment_id not in changed]
    if kept:
        with pytest.raises(DatasetChanged, match="added or compacted") as caught:
            resolve_snapshot(_covers(kept, 2, set()), states, {}, version=4)
        assert caught.value.fragments == tuple(sorted(changed))
