"""Snapshot resolution, on its own: every row against a world that knows who lies where."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_dfaiss.manifest import Cover, FragmentCover, FragmentSignature, Remap, RemapTarget, RunTable
from lance_dfaiss.manifest.validation import Place
from lance_dfaiss.plan import FragmentState, RowCost, plan_tasks
from lance_dfaiss.search.places import Places
from lance_dfaiss.search.snapshot import (
    Located,
    Snapshot,
    fragments_to_read,
    locate,
    match_row_ids,
    new_remaps,
    settle,
)
from lance_dfaiss.testing.strategies import fragment_states
from lance_dfaiss.types import Int64Array

_COST = RowCost(family="flat", code_bytes=1, id_bytes=0, refine_bytes=0, link_bytes=0, fixed_bytes=0)

Row = tuple[int, int]
"""Fragment and offset."""


def _signature(name: str) -> FragmentSignature:
    return FragmentSignature(files=((name, 0),), overlays=())


def _state(fragment_id: int, rows: int, alive: int | None = None, name: str | None = None) -> FragmentState:
    signature = _signature(f"{fragment_id}" if name is None else name)
    deleted = 0 if alive is None else rows - alive
    return FragmentState(fragment_id=fragment_id, physical_rows=rows, deleted_rows=deleted, signature=signature)


def _runs(numbers: list[int]) -> RunTable:
    """Table of single rows."""
    return RunTable.of(np.array([(number, 1) for number in sorted(numbers)], dtype=np.uint64).reshape(-1, 2))


def _cover(fragments: list[tuple[int, int, str]], *, skipped: list[int] = [], deleted: list[int] = []) -> Cover:  # noqa: B006
    """Cover of ``(fragment, rows, signature)`` each."""
    first, covers = 0, []
    for fragment_id, rows, name in fragments:
        covers.append(
            FragmentCover(fragment_id=fragment_id, physical_rows=rows, first_position=first, signature=_signature(name))
        )
        first += rows
    return Cover(
        physical_rows=first,
        fragments=tuple(covers),
        row_ids=None,
        skipped=_runs(sorted({*skipped, *deleted})),
        deleted=_runs(deleted),
        remap=None,
    )


def _covers(states: list[FragmentState], num_shards: int, skipped: set[int]) -> list[Cover]:
    """Covers of the states as built; ``skipped`` are positions of the generation."""
    covers, first = [], 0
    for task in plan_tasks(states, _COST, num_shards=num_shards, budget_bytes=10**12):
        here = [p - first for p in skipped if first <= p < first + task.physical_rows]
        cover = Cover(
            physical_rows=task.physical_rows,
            fragments=task.fragments,
            row_ids=None,
            deleted=RunTable.empty(2),
            skipped=_runs(here),
            remap=None,
        )
        covers.append(cover)
        first += task.physical_rows
    return covers


def _settled(
    covers: list[Cover],
    states: list[FragmentState],
    live: dict[int, Int64Array],
    followed: Places | None = None,
    *,
    version: int = 9,
) -> tuple[Located, Snapshot]:
    located = locate(covers, states)
    followed = Places.of([]) if followed is None else followed
    read = fragments_to_read(states, located.direct, located.mapped, followed)
    return located, settle(covers, states, located, followed, {i: live[i] for i in read}, version=version)


def _tail(snapshot: Snapshot, live: dict[int, set[int]]) -> set[Row]:
    found = [
        (fragment.fragment_id, offset)
        for fragment in snapshot.tail
        for offset in (sorted(live[fragment.fragment_id]) if fragment.offsets is None else fragment.offsets.tolist())
    ]
    assert len(found) == len(set(found)) == snapshot.tail_rows
    return set(found)


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
    located, snapshot = _settled(covers, now, live_offsets)
    read = fragments_to_read(now, located.direct, located.mapped)
    assert read == [state.fragment_id for state in now if state.deleted_rows]
    assert snapshot.live.tolist() == expected
    assert snapshot.version == 9
    assert snapshot.indexed_rows == total - len(skipped)
    assert snapshot.live_rows == sum(expected)
    assert snapshot.masked_rows == total - len(skipped) - sum(expected)
    # Rows without an entry are known all the same: they are no tail.
    assert (snapshot.tail, snapshot.mapped_rows) == ((), 0)
    addresses = [(state.fragment_id << 32) + offset for state in states for offset in range(state.physical_rows)]
    alive_positions = np.flatnonzero(snapshot.live)
    np.testing.assert_array_equal(
        snapshot.row_ids.numbers(alive_positions), np.array(addresses, dtype=np.uint64)[alive_positions]
    )


def test_stable_row_ids_come_from_the_cover() -> None:
    states = [_state(i, 4, name="a") for i in (0, 5)]
    runs = [[(0, 100, 3), (3, 7, 1)], [(1, 50, 3)]]
    covers = [
        dataclasses.replace(cover, row_ids=RunTable.of(np.array(table, dtype=np.uint64)))
        for cover, table in zip(_covers(states, 2, {4}), runs, strict=True)
    ]
    _, snapshot = _settled(covers, states, {})
    assert snapshot.row_ids.numbers(np.array([0, 1, 2, 3, 5, 6, 7])).tolist() == [100, 101, 102, 7, 50, 51, 52]
    assert snapshot.row_ids.positions(np.array([7, 52, 103], np.uint64)).tolist() == [3, 7, -1]


@dataclass
class World:
    """Shards over fragments that were deleted from, rewritten, compacted; and what is known of all that.

    ``home`` is where each encoded row was read from, ``now`` where it lies, if it is still as it was encoded.
    """

    covers: list[Cover]
    states: list[FragmentState]
    live: dict[int, set[int]]
    home: dict[int, Row]
    now: dict[int, Row]
    entries: set[int]
    remapped: set[int]
    moved: set[int]


@st.composite
def worlds(draw: st.DrawFn) -> World:
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=6))
    fragments = {3 * i: size for i, size in enumerate(sizes)}
    shards: list[list[int]] = [[] for _ in range(draw(st.integers(1, 3)))]
    shared = {i for i in fragments if draw(st.integers(0, 3)) == 0}
    for fragment_id in fragments:
        shards[draw(st.integers(0, len(shards) - 1))].append(fragment_id)
    shards = [shard for shard in shards if shard]
    if len(shards) > 1:
        for fragment_id in shared:  # a row that was deleted when the one shard was encoded is in another
            other = draw(st.integers(0, len(shards) - 1))
            if fragment_id not in shards[other]:
                shards[other].append(fragment_id)
    owner = {
        (f, o): draw(st.sampled_from([s for s, shard in enumerate(shards) if f in shard] * 3 + [-1]))
        for f, size in fragments.items()
        for o in range(size)
    }
    covers, home, entries, base = [], {}, set(), 0
    for number, shard in enumerate(shards):
        deleted, skipped, first = [], [], 0
        for fragment_id in shard:
            for offset in range(fragments[fragment_id]):
                if owner[fragment_id, offset] != number:
                    deleted.append(first + offset)
                    continue
                home[base + first + offset] = (fragment_id, offset)
                if draw(st.integers(0, 4)) == 0:
                    skipped.append(first + offset)
                else:
                    entries.add(base + first + offset)
            first += fragments[fragment_id]
        covers.append(
            _cover([(f, fragments[f], f"{f}") for f in shard], skipped=skipped, deleted=deleted),
        )
        base += first
    return _aged(draw, fragments, covers, home, entries)


def _aged(
    draw: st.DrawFn, fragments: dict[int, int], covers: list[Cover], home: dict[int, Row], entries: set[int]
) -> World:
    names = {f: f"{f}" for f in fragments}
    where = {(f, o): (f, o) for f, size in fragments.items() for o in range(size)}
    live = {f: set(range(size)) for f, size in fragments.items()}
    sizes, lost_rows, remapped, next_id = dict(fragments), set(), set(), 100

    def delete() -> None:
        for f in list(live):
            live[f] -= draw(st.sets(st.sampled_from(sorted(live[f])))) if draw(st.booleans()) else set()
            if not live[f]:
                del live[f], names[f]

    delete()
    for written_down in draw(st.sampled_from([(), (True,), (False,), (True, False), (False, False)])):
        group = [f for f in live if draw(st.booleans())]
        moving = [(f, o) for f in group for o in sorted(live[f])]
        if not moving:
            continue
        cut = draw(st.integers(1, len(moving)))
        lies_in = {row: origin for origin, row in where.items()}
        for part in (moving[:cut], moving[cut:]):
            for offset, row in enumerate(part):
                where[lies_in[row]] = (next_id, offset)
            if part:
                live[next_id], names[next_id], sizes[next_id] = set(range(len(part))), f"{next_id}", len(part)
            next_id += 1
        for f in group:
            del live[f], names[f]
        if written_down:
            covers = _written(covers, where, live, sizes)
            remapped = {o for o, row in where.items() if row != o and row[0] in live and row[1] in live[row[0]]}
        delete()
    for f in list(live):
        if draw(st.integers(0, 5)) == 0:  # new vectors in the same fragment
            names[f] += " anew"
            lost_rows |= {origin for origin, row in where.items() if row[0] == f}
    if draw(st.booleans()):
        live[next_id], names[next_id], sizes[next_id] = {0, 2}, "added", 3
    states = [_state(f, sizes[f], len(live[f]), names[f]) for f in draw(st.permutations(sorted(live)))]
    now = {
        p: where[row]
        for p, row in home.items()
        if row not in lost_rows and where[row][0] in live and where[row][1] in live[where[row][0]]
    }
    moved = {p for p in now if now[p] != home[p]}
    known = {p for p in moved if home[p] in remapped and _leads(covers, p, now[p])}
    return World(covers, states, live, home, now, entries, known, moved)


def _written(
    covers: list[Cover], where: dict[Row, Row], live: dict[int, set[int]], sizes: dict[int, int]
) -> list[Cover]:
    """Covers that tell where their rows have moved to."""
    told = []
    for cover in covers:
        runs, gone = [], set()
        for start, length in cover.deleted.rows.tolist():
            gone |= set(range(start, start + length))
        for f in cover.fragments:
            for offset in range(f.physical_rows):
                target, at = where[f.fragment_id, offset]
                position = f.first_position + offset
                if position not in gone and target != f.fragment_id and at in live.get(target, ()):
                    runs.append((position, target, at, 1))
        targets = tuple(
            RemapTarget(fragment_id=i, physical_rows=sizes[i], signature=_signature(f"{i}"))
            for i in sorted({run[1] for run in runs})
        )
        remap = Remap(version=2, runs=RunTable.of(np.array(runs, dtype=np.uint64).reshape(-1, 4)), fragments=targets)
        told.append(dataclasses.replace(cover, remap=remap) if runs else cover)
    return told


def _leads(covers: list[Cover], position: int, row: Row) -> bool:
    base = 0
    for cover in covers:
        if base <= position < base + cover.physical_rows and cover.remap is not None:
            return [position - base, *row, 1] in cover.remap.runs.rows.tolist()
        base += cover.physical_rows
    return False


def _followed(world: World, located: Located) -> Places:
    """What following the compactions would find of the rows whose way is not written down."""
    rest = set(located.lost.expanded()[0].tolist())
    rows = sorted((p, *row, 1) for p, row in world.now.items() if p in rest and p in world.moved)
    return Places.of(rows).joined().cut(np.cumsum([cover.physical_rows for cover in world.covers]))


@settings(max_examples=200)
@given(worlds(), st.booleans())
def test_every_row_is_found_or_in_the_tail_and_never_both(world: World, follow: bool) -> None:
    located = locate(world.covers, world.states)
    offsets = {f: np.array(sorted(rows), dtype=np.int64) for f, rows in world.live.items()}
    followed = _followed(world, located) if follow else Places.of([])
    _, snapshot = _settled(world.covers, world.states, offsets, followed)

    found = {p for p in world.now if p not in world.moved or p in world.remapped or follow}
    assert set(np.flatnonzero(snapshot.live).tolist()) == found & world.entries
    positions = np.array(sorted(found), dtype=np.int64)
    addresses = [(world.now[p][0] << 32) + world.now[p][1] for p in positions.tolist()]
    np.testing.assert_array_equal(snapshot.places.numbers(positions), np.array(addresses, dtype=np.uint64))
    np.testing.assert_array_equal(snapshot.places.positions(np.array(addresses, dtype=np.uint64)), positions)
    everything = {(f, o) for f, rows in world.live.items() for o in rows}
    assert _tail(snapshot, world.live) == everything - {world.now[p] for p in found}
    assert snapshot.indexed_rows == len(world.entries)
    assert snapshot.masked_rows == len(world.entries - found)
    assert snapshot.mapped_rows == len(found & world.moved & world.entries)

    # Written down, the same places are found without following anything; a second time there is nothing to write.
    remaps = new_remaps(world.covers, world.states, located, followed, version=8)
    covers = [
        cover if remap is None else dataclasses.replace(cover, remap=remap)
        for cover, remap in zip(world.covers, remaps, strict=True)
    ]
    place = Place()
    read_back = [Cover.from_json(cover.to_json(), place) for cover in covers]
    assert (read_back, place.problems) == (covers, [])
    again, same = _settled(read_back, world.states, offsets)
    assert same.live.tolist() == snapshot.live.tolist()
    np.testing.assert_array_equal(same.places.numbers(positions), snapshot.places.numbers(positions))
    assert (same.mapped_rows, same.tail_rows) == (snapshot.mapped_rows, snapshot.tail_rows)
    assert new_remaps(covers, world.states, again, Places.of([]), version=8) == [None] * len(covers)
    if not follow:
        assert remaps == [None] * len(covers)


@settings(max_examples=100)
@given(st.data())
def test_row_ids_alone_find_rows_that_nobody_wrote_since(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    pairs = st.tuples(st.integers(0, 9), st.integers(1, 3))  # row id and version, few of each: they come again
    covers, encoded, base = [], {}, 0
    for number, size in enumerate(rows):
        known = data.draw(st.lists(pairs, min_size=size, max_size=size, unique_by=lambda pair: pair[0]))
        gaps = data.draw(st.sets(st.integers(0, size - 1)))
        deleted = data.draw(st.sets(st.integers(0, size - 1)))
        cover = _cover([(number, size, f"{number}")], deleted=sorted(deleted))
        told = [(p, *pair, 1) for p, pair in enumerate(known) if p not in gaps]
        tables = [
            RunTable.of(np.array([[t[0], t[i], 1] for t in told], dtype=np.uint64).reshape(-1, 3)) for i in (1, 2)
        ]
        covers.append(dataclasses.replace(cover, row_ids=tables[0], updated=tables[1]))
        encoded.update({base + t[0]: t[1:3] for t in told if t[0] not in deleted})
        base += size
    missing = np.array(data.draw(st.lists(st.booleans(), min_size=base, max_size=base)), dtype=bool)
    live = data.draw(st.lists(pairs, max_size=10, unique_by=lambda pair: pair[0]))
    row_ids, updated = (np.array([pair[i] for pair in live], dtype=np.uint64) for i in range(2))
    offsets = np.arange(len(live), dtype=np.int64)
    found = match_row_ids(covers, missing, row_ids, offsets * 0 + 50, offsets, updated)
    expected = {(p, 50, live.index(pair)) for p, pair in encoded.items() if missing[p] and pair in live}
    rows_found = list(zip(*(column.tolist() for column in found.expanded()), strict=True))
    assert len(rows_found) == len(set(rows_found))
    assert set(rows_found) == expected


def test_a_fragment_that_was_dealt_the_id_of_another_leads_nowhere() -> None:
    # Fragment 1 was encoded and left; later, on a branch that was restored, another fragment got its number and took
    # rows of fragment 0; now both are gone. What became of the later one says nothing about the rows of the first.
    cover = _cover([(0, 2, "zero"), (1, 2, "one")])
    remap = Remap(
        version=3,
        runs=RunTable.of(np.array([(0, 1, 0, 2)], dtype=np.uint64)),
        fragments=(RemapTarget(fragment_id=1, physical_rows=2, signature=_signature("one again")),),
    )
    located = locate([dataclasses.replace(cover, remap=remap)], [_state(7, 4)])
    assert located.signatures == {1: _signature("one again")}
    assert located.lost.in_fragments([1]).expanded()[0].tolist() == [0, 1]


def test_of_two_shards_the_one_that_read_the_later_vectors_can_be_followed() -> None:
    covers = [_cover([(0, 2, "zero")]), _cover([(0, 2, "zero anew")])]
    located = locate(covers, [_state(7, 4)])
    assert located.signatures == {0: _signature("zero anew")}
    assert located.lost.expanded()[0].tolist() == [2, 3]
