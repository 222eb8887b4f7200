"""Shards cover every fragment once, in order, within the budget; or the budget is refused with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import BudgetExceeded
from lance_dfaiss.manifest import FragmentSignature
from lance_dfaiss.plan import FragmentState, RowCost, encode_peak_bytes, estimate, plan_tasks
from lance_dfaiss.spec import ResolvedSpec
from lance_dfaiss.testing.strategies import fragment_states, row_costs

_FLAT = RowCost(family="flat", code_bytes=100, id_bytes=0, refine_bytes=0, link_bytes=0, fixed_bytes=0)


def _fragments(*rows: int) -> list[FragmentState]:
    nothing = FragmentSignature(files=(), overlays=())
    return [
        FragmentState(fragment_id=i, physical_rows=count, deleted_rows=0, signature=nothing)
        for i, count in enumerate(rows)
    ]


@given(fragment_states(), row_costs(), st.integers(1, 10**12), st.none() | st.integers(1, 40))
def test_every_fragment_is_in_exactly_one_task(
    fragments: list[FragmentState], cost: RowCost, budget: int, num_shards: int | None
) -> None:
    refused: BudgetExceeded | None = None
    try:
        tasks = plan_tasks(fragments, cost, num_shards=num_shards, budget_bytes=budget)
    except BudgetExceeded as exc:
        refused = exc
    if refused is not None:
        assert refused.needed_bytes > refused.budget_bytes == budget
        return
    assert [task.ordinal for task in tasks] == list(range(len(tasks)))
    covers = [cover for task in tasks for cover in task.fragments]
    assert [(c.fragment_id, c.physical_rows, c.signature) for c in covers] == [
        (f.fragment_id, f.physical_rows, f.signature) for f in fragments
    ]
    for task in tasks:
        assert task.fragments, "a shard must hold something"
        position = 0
        for cover in task.fragments:
            assert cover.first_position == position
            position += cover.physical_rows
        assert task.physical_rows == position
        assert encode_peak_bytes(cost, task.physical_rows) <= budget
    if num_shards is not None:
        assert len(tasks) == min(num_shards, len(fragments))


@given(fragment_states(), row_costs(), st.integers(1, 10**12))
def test_the_budget_is_refused_only_when_one_fragment_alone_exceeds_it(
    fragments: list[FragmentState], cost: RowCost, budget: int
) -> None:
    alone = max(encode_peak_bytes(cost, fragment.physical_rows) for fragment in fragments)
    if alone > budget:
        with pytest.raises(BudgetExceeded) as caught:
            plan_tasks(fragments, cost, num_shards=None, budget_bytes=budget)
        assert caught.value.needed_bytes == alone
        assert f"{alone:,}" in str(caught.value)
    else:
        assert plan_tasks(fragments, cost, num_shards=None, budget_bytes=budget)


@given(fragment_states(), row_costs())
def test_one_shard_when_everything_fits(fragments: list[FragmentState], cost: RowCost) -> None:
    whole = encode_peak_bytes(cost, sum(fragment.physical_rows for fragment in fragments))
    assert len(plan_tasks(fragments, cost, num_shards=None, budget_bytes=whole)) == 1
    if len(fragments) > 1 and max(encode_peak_bytes(cost, f.physical_rows) for f in fragments) <= whole - 1:
        assert len(plan_tasks(fragments, cost, num_shards=None, budget_bytes=whole - 1)) > 1


@given(st.integers(1, 60), st.integers(1, 60))
def test_equal_fragments_are_shared_out_equally(fragments: int, num_shards: int) -> None:
    tasks = plan_tasks(_fragments(*[7] * fragments), _FLAT, num_shards=num_shards, budget_bytes=10**9)
    sizes = [len(task.fragments) for task in tasks]
    assert max(sizes) - min(sizes) <= 1


@given(fragment_states(max_rows=1000), st.integers(2, 10))
def test_no_shard_is_more_than_a_fragment_over_its_share(fragments: list[FragmentState], num_shards: int) -> None:
    rows = [fragment.physical_rows for fragment in fragments]
    tasks = plan_tasks(fragments, _FLAT, num_shards=num_shards, budget_bytes=10**12)
    assert max(task.physical_rows for task in tasks) <= sum(rows) / len(tasks) + 2 * max(rows)


def test_the_refusal_names_fragments_and_bytes() -> None:
    one, both = (encode_peak_bytes(_FLAT, rows) for rows in (2000, 3000))
    assert both - one == 1000 * 100
    with pytest.raises(
        BudgetExceeded, match=rf"2,000 rows \(fragments 1\) needs {one:,} bytes, .* the budget is {one - 1:,}"
    ):
        plan_tasks(_fragments(1000, 2000), _FLAT, num_shards=None, budget_bytes=one - 1)
    with pytest.raises(BudgetExceeded, match=rf"3,000 rows \(fragments 0, 1\) needs {both:,} bytes"):
        plan_tasks(_fragments(1000, 2000), _FLAT, num_shards=1, budget_bytes=one)


@given(fragment_states(max_size=5), row_costs())
def test_the_estimate_counts_every_physical_row(fragments: list[FragmentState], cost: RowCost) -> None:
    tasks = plan_tasks(fragments, cost, num_shards=2, budget_bytes=10**15)
    spec = ResolvedSpec(
        index_type="FLAT", metric="l2", dim=8, factory="Flat", refine=None, num_partitions=0, sample_rate=256, seed=1
    )
    found = estimate(spec, cost, tasks, sample=10, cores=2)
    rows = sum(fragment.physical_rows for fragment in fragments)
    assert found.index_bytes == rows * cost.row_bytes + cost.fixed_bytes
    assert found.sample_bytes == 10 * 8 * 4
    assert found.peak_bytes >= max(encode_peak_bytes(cost, task.physical_rows) for task in tasks)
    assert found.encode_seconds > 0
