"""Which shards are rewritten: decided without a dataset, for any shards there can be."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.build.regroup import Regrouping, ShardState, regroup
from lance_dfaiss.manifest import FragmentCover, FragmentSignature, ShardTask
from lance_dfaiss.plan import FragmentState, RowCost, encode_peak_bytes, plan_tasks

COST = RowCost(family="ivf", code_bytes=100, id_bytes=8, refine_bytes=0, link_bytes=0, fixed_bytes=0)
ROOM = 1000
SAME = FragmentSignature(files=(), overlays=())
BUDGET = encode_peak_bytes(COST, ROOM)

Sizes = dict[int, int]


def _small(positions: int) -> bool:
    return encode_peak_bytes(COST, 8 * positions) <= BUDGET


def _regroup(shards: Sequence[ShardState], sizes: Sizes, share: float = 0.2) -> Regrouping:
    def divide(fragments: Collection[int], rewritten: Collection[int]) -> Sequence[ShardTask]:
        assert rewritten
        states = [
            FragmentState(
                fragment_id=i,
                physical_rows=sizes[i],
                deleted_rows=0,
                signature=SAME,
            )
            for i in sorted(fragments)
        ]
        return plan_tasks(states, COST, num_shards=None, budget_bytes=BUDGET)

    return regroup(shards, sizes, max_dead_share=share, is_small=_small, divide=divide)


def _shard(fragments: Sequence[int], *, positions: int, added: bool = True, dead: int = 0) -> ShardState:
    return ShardState(
        added=added, positions=positions, entries=positions, live=positions - dead, fragments=frozenset(fragments)
    )


@st.composite
def _indexes(draw: st.DrawFn) -> tuple[list[ShardState], Sizes]:
    sizes = draw(st.dictionaries(st.integers(0, 20), st.integers(1, ROOM), max_size=10))
    shards = []
    for _ in range(draw(st.integers(1, 12))):
        fragments = draw(st.lists(st.sampled_from(sorted(sizes)), unique=True, max_size=3)) if sizes else []
        entries = draw(st.integers(0, 300))
        shards.append(
            ShardState(
                added=draw(st.booleans()),
                positions=entries + draw(st.integers(0, 300)),
                entries=entries,
                live=draw(st.integers(0, entries)) if fragments else 0,
                fragments=frozenset(fragments),
            )
        )
    return shards, sizes


def _afterwards(shards: Sequence[ShardState], choice: Regrouping) -> list[ShardState]:
    gone = choice.dropped | choice.rewritten
    return [shard for number, shard in enumerate(shards) if number not in gone] + [
        _shard(task.fragment_ids, positions=task.physical_rows) for task in choice.tasks
    ]


@given(_indexes(), st.sampled_from([0.0, 0.2, 1.0]))
def test_any_index_is_regrouped_once(index: tuple[list[ShardState], Sizes], share: float) -> None:
    shards, sizes = index
    choice = _regroup(shards, sizes, share)
    assert not choice.dropped & choice.rewritten
    # Every fragment with a row of a rewritten shard is in one new shard, and no other is in any.
    held = [i for task in choice.tasks for i in task.fragment_ids]
    assert sorted(held) == sorted(frozenset[int]().union(*(shards[n].fragments for n in choice.rewritten)))
    assert [task.ordinal for task in choice.tasks] == list(range(len(choice.tasks)))
    assert all(encode_peak_bytes(COST, task.physical_rows) <= BUDGET for task in choice.tasks)
    after = _afterwards(shards, choice)
    assert after, "an index has a shard"
    # Shards with many dead entries are gone; of those without rows only the last shard of all may be left.
    assert not any(shard.dead_share > share and shard.fragments for shard in after)
    assert all(shard.fragments for shard in after) or len(after) == 1
    if not choice.changes:
        assert after == shards
    elif not any(shard.dead_share > share for shard in shards if shard.fragments):
        assert len(after) < len(shards), "nothing is rewritten for nothing"
    assert not _regroup(after, sizes, share).changes


def test_small_added_shards_are_joined_and_nothing_else() -> None:
    sizes = {i: 100 for i in range(6)}
    built = [_shard([0], positions=100, added=False), _shard([1], positions=100, added=False)]
    assert not _regroup([*built, _shard([2], positions=100)], sizes).changes
    choice = _regroup([*built, *(_shard([i], positions=100) for i in (2, 3, 4, 5))], sizes)
    assert choice.rewritten == {2, 3, 4, 5}
    assert [task.fragment_ids for task in choice.tasks] == [(2, 3, 4, 5)]


def test_large_added_shards_stay_as_they_are() -> None:
    sizes = {0: 500, 1: 130, 2: 10}
    assert not _regroup([_shard([i], positions=size) for i, size in sizes.items()], sizes).changes


def test_a_share_is_exceeded_not_reached() -> None:
    sizes = {0: 100, 1: 100}
    shards = [_shard([0], positions=100, added=False, dead=20), _shard([1], positions=100, added=False, dead=21)]
    choice = _regroup(shards, sizes)
    assert (sorted(choice.rewritten), [task.fragment_ids for task in choice.tasks]) == ([1], [(1,)])


def test_neighbours_in_compacted_fragments_come_along() -> None:
    """Two additions of 50 rows lie in one fragment with 900 rows of the full build."""
    shards = [
        _shard([7], positions=900, added=False),
        _shard([7], positions=50),
        _shard([7], positions=50),
        _shard([8], positions=100, added=False),
    ]
    choice = _regroup(shards, {7: 1000, 8: 100})
    assert (sorted(choice.rewritten), [task.fragment_ids for task in choice.tasks]) == ([0, 1, 2], [(7,)])


def test_shards_without_rows_are_dropped_but_the_last() -> None:
    empty = _shard([], positions=100, dead=100)
    choice = _regroup([empty, _shard([1], positions=100, added=False), empty], {1: 100})
    assert (sorted(choice.dropped), len(choice.rewritten), choice.tasks) == ([0, 2], 0, ())
    assert _regroup([empty, empty], {}).dropped == {1}
    assert not _regroup([empty], {}).changes


def test_what_a_task_makes_is_numbered_anew() -> None:
    task = ShardTask(
        ordinal=7,
        fragments=(
            FragmentCover(
                fragment_id=3,
                physical_rows=10,
                first_position=0,
                signature=SAME,
            ),
        ),
    )
    choice = regroup(
        [_shard([3], positions=10, dead=9)],
        {3: 10},
        max_dead_share=0.5,
        is_small=lambda _: True,
        divide=lambda *_: [task],
    )
    assert choice.tasks == (ShardTask(ordinal=0, fragments=task.fragments),)
