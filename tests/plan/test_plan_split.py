"""Fragments that do not fit the budget: cut by rows, every row in one shard, and nothing cut without need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import BudgetExceeded
from lance_dfaiss.manifest import BuildPlan, DatasetEntry, FragmentSignature, decode_plan, encode
from lance_dfaiss.plan import FragmentState, RowCost, encode_peak_bytes, plan_tasks
from lance_dfaiss.spec import ResolvedSpec

COST = RowCost(family="ivf", code_bytes=16, id_bytes=8, refine_bytes=4, link_bytes=0, fixed_bytes=1_000)
LEAST = 4_096

fragment_rows = st.lists(st.integers(0, 60_000), min_size=1, max_size=8)


def states(rows: list[int]) -> list[FragmentState]:
    return [
        FragmentState(
            fragment_id=10 + i,
            physical_rows=count,
            deleted_rows=0,
            signature=FragmentSignature(files=((f"{i}.lance", 0),), overlays=()),
        )
        for i, count in enumerate(rows)
    ]


def budget_for(rows: int) -> int:
    return encode_peak_bytes(COST, rows)


@given(rows=fragment_rows, fitting=st.integers(LEAST + 1, 40_000), num_shards=st.none() | st.integers(1, 30))
def test_every_row_is_in_one_shard_that_fits(rows: list[int], fitting: int, num_shards: int | None) -> None:
    budget = budget_for(fitting)
    try:
        tasks = plan_tasks(states(rows), COST, num_shards=num_shards, budget_bytes=budget, split=True)
    except BudgetExceeded:
        assert num_shards is not None  # too few were asked for
        return
    covered = [np.zeros(count, dtype=int) for count in rows]
    for ordinal, task in enumerate(tasks):
        assert task.ordinal == ordinal
        assert encode_peak_bytes(COST, task.physical_rows) <= budget
        position = 0
        for cover in task.fragments:
            assert cover.first_position == position
            assert cover.physical_rows == rows[cover.fragment_id - 10]
            covered[cover.fragment_id - 10][cover.first_offset : cover.first_offset + cover.positions] += 1
            position += cover.positions
        assert position == task.physical_rows
    assert all((count == 1).all() for count in covered)
    assert num_shards is None or len(tasks) <= num_shards
    plan = BuildPlan(
        generation="a",
        name="i",
        request="r",
        spec=ResolvedSpec(
            index_type="IVF_SQ",
            metric="l2",
            dim=4,
            factory="IVF4,SQ8",
            refine=None,
            num_partitions=4,
            sample_rate=1,
            seed=0,
        ),
        dataset=DatasetEntry(uri="d", version=1, column="c", field_id=0, value_type="float"),
        previous=None,
        tasks=tasks,
    )
    assert decode_plan(encode(plan), location="here") == plan


@given(rows=fragment_rows, fitting=st.integers(LEAST + 1, 100_000), num_shards=st.none() | st.integers(1, 8))
def test_nothing_is_cut_that_fits(rows: list[int], fitting: int, num_shards: int | None) -> None:
    budget = budget_for(fitting)
    try:
        plain = plan_tasks(states(rows), COST, num_shards=num_shards, budget_bytes=budget)
    except BudgetExceeded:
        return
    assert plan_tasks(states(rows), COST, num_shards=num_shards, budget_bytes=budget, split=True) == plain
    assert all(cover.part is None for task in plain for cover in task.fragments)


def test_a_budget_for_a_handful_of_rows_is_refused() -> None:
    with pytest.raises(BudgetExceeded, match="even a shard of 4,096 rows of the 50,000") as refused:
        plan_tasks(states([50_000]), COST, num_shards=None, budget_bytes=budget_for(1_000), split=True)
    needed = refused.value.needed_bytes
    assert len(plan_tasks(states([50_000]), COST, num_shards=None, budget_bytes=needed, split=True)) == 13
    with pytest.raises(BudgetExceeded):
        plan_tasks(states([50_000]), COST, num_shards=None, budget_bytes=needed - 1, split=True)


def test_too_few_shards_asked_for_are_told() -> None:
    with pytest.raises(BudgetExceeded, match="a shard of 30,000 rows") as refused:
        plan_tasks(states([50_000]), COST, num_shards=2, budget_bytes=budget_for(10_000), split=True)
    assert "ask for more shards" in refused.value.remedy
    assert len(plan_tasks(states([50_000]), COST, num_shards=5, budget_bytes=budget_for(10_000), split=True)) == 5


def test_parts_are_equal_and_neighbours_go_together() -> None:
    (small, first), (second,), (third, last) = (
        task.fragments
        for task in plan_tasks(
            states([2_000, 24_000, 2_000]), COST, num_shards=None, budget_bytes=budget_for(10_050), split=True
        )
    )
    assert (small.part, first.part, second.part, third.part, last.part) == (
        None,
        (0, 8_000),
        (8_000, 8_000),
        (16_000, 8_000),
        None,
    )
    assert (first.first_position, third.first_position, last.first_position) == (2_000, 0, 8_000)


def test_unequal_fragments_of_one_id_do_not_merge() -> None:
    one, other = states([5, 5])
    (task,) = plan_tasks([one, replace(other, fragment_id=11)], COST, num_shards=1, budget_bytes=10**9, split=True)
    assert [cover.part for cover in task.fragments] == [None, None]
