"""Following compactions: against a simulation that knows which row is which, and over thousands of real versions."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lance_dfaiss
from lance_dfaiss.lance_io import DatasetHistory, PinnedDataset, VectorColumn
from lance_dfaiss.manifest import FragmentSignature
from lance_dfaiss.plan import FragmentState, RewriteGroup
from lance_dfaiss.search.lineage import apply_rewrites, find_rewrites
from lance_dfaiss.search.places import Places
from lance_dfaiss.types import Int64Array
from tests.support import Exact, assert_exact, clustered, make_dataset


@dataclass(frozen=True)
class Fragment:
    """A simulated fragment: who each physical row is, and which of them live."""

    signature: FragmentSignature
    rows: tuple[int, ...]
    live: frozenset[int]

    def state(self, fragment_id: int) -> FragmentState:
        return FragmentState(
            fragment_id=fragment_id,
            physical_rows=len(self.rows),
            deleted_rows=len(self.rows) - len(self.live),
            signature=self.signature,
        )


Version = dict[int, Fragment]


@dataclass
class World:
    """A simulated dataset; it is its own history."""

    versions: dict[int, Version] = field(default_factory=dict)
    groups: dict[int, list[RewriteGroup] | None] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    restored: bool = False
    looks: int = 0
    _names: int = 0
    _rows: int = 0
    _next_id: int = 0

    @property
    def newest(self) -> int:
        return max(self.versions, default=0)

    def commit(self, fragments: Version, groups: list[RewriteGroup] | None) -> None:
        version = self.newest + 1
        self.versions[version] = fragments
        self.groups[version] = groups

    def fragment(self, rows: Sequence[int]) -> Fragment:
        self._names += 1
        signature = FragmentSignature(files=((f"{self._names}.lance", 0),), overlays=())
        return Fragment(signature, tuple(rows), frozenset(range(len(rows))))

    def new_rows(self, count: int) -> list[int]:
        self._rows += count
        return list(range(self._rows - count, self._rows))

    def new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def fragment_ids(self, version: int) -> frozenset[int] | None:
        self.looks += 1
        return None if version in self.removed or version not in self.versions else frozenset(self.versions[version])

    def rewritten(self, version: int) -> Sequence[RewriteGroup] | None:
        return None if version in self.removed else self.groups[version]

    def live_offsets(self, version: int, fragment_id: int) -> Int64Array | None:
        if version in self.removed:
            return None
        return np.array(sorted(self.versions[version][fragment_id].live), dtype=np.int64)

    def append(self, rng: random.Random) -> None:
        now = dict(self.versions.get(self.newest, {}))
        for _ in range(rng.randint(1, 3)):
            now[self.new_id()] = self.fragment(self.new_rows(rng.randint(1, 6)))
        self.commit(now, [])

    def delete(self, rng: random.Random) -> None:
        now = {}
        share = rng.choice((0.1, 0.5))
        for fragment_id, fragment in self.versions[self.newest].items():
            live = frozenset(offset for offset in fragment.live if rng.random() > share)
            if live:
                now[fragment_id] = replace(fragment, live=live)
        self.commit(now, [])

    def compact(self, rng: random.Random) -> None:
        before = self.versions[self.newest]
        ids, groups = list(before), []
        now: Version = {}
        while ids:
            taken, ids = ids[: (size := rng.randint(1, 3))], ids[size:]
            if rng.random() < 0.4:
                now.update({i: before[i] for i in taken})
                continue
            rows = [before[i].rows[offset] for i in taken for offset in sorted(before[i].live)]
            cut = rng.randint(1, max(len(rows), 1))
            new = {self.new_id(): self.fragment(part) for part in (rows[:cut], rows[cut:]) if part}
            now.update(new)
            groups.append(
                RewriteGroup(
                    old=tuple(before[i].state(i) for i in taken),
                    new=tuple(fragment.state(i) for i, fragment in new.items()),
                )
            )
        self.commit(now, groups)

    def rewrite(self, rng: random.Random) -> None:
        now = dict(self.versions[self.newest])
        for fragment_id, fragment in now.items():
            if rng.random() < 0.3:
                fresh = self.fragment(self.new_rows(len(fragment.rows)))
                now[fragment_id] = replace(fresh, live=fragment.live)
        self.commit(now, [])

    def restore(self, rng: random.Random) -> None:
        self.restored = True
        target = rng.randint(1, self.newest)
        if rng.random() < 0.5:  # fragment ids are dealt again
            self._next_id = max(self.versions[target], default=-1) + 1
        self.commit(dict(self.versions[target]), None)

    def nothing(self, _: random.Random) -> None:
        self.commit(dict(self.versions[self.newest]), [])


def _grown(seed: int, steps: int, *, restores: bool) -> World:
    world, rng = World(), random.Random(seed)
    world.append(rng)
    kinds = [world.append, world.delete, world.compact, world.compact, world.rewrite, world.nothing]
    for _ in range(steps):
        rng.choice([*kinds, world.restore] if restores else kinds)(rng)
    return world


def _check(world: World, since: int) -> None:
    """Follow every fragment of a version to the newest one."""
    old, now = world.versions[since], world.versions[world.newest]
    lost = {i: fragment.signature for i, fragment in old.items() if i not in now}
    position, table, people = 0, [], {}
    for fragment_id, fragment in old.items():
        if fragment_id in lost:
            table.append((position, fragment_id, 0, len(fragment.rows)))
            people.update({position + offset: row for offset, row in enumerate(fragment.rows)})
            position += len(fragment.rows)
    present = {i: fragment.state(i) for i, fragment in now.items()}
    rewrites, unknown = find_rewrites(lost, present, world, since=since, until=world.newest)
    moved, targets = apply_rewrites(Places.of(table), lost, rewrites)
    arrived = [i for i, state in targets.items() if i in present and present[i].signature == state.signature]
    found = {}
    for at, fragment_id, offset in zip(*(c.tolist() for c in moved.in_fragments(arrived).expanded()), strict=True):
        assert now[fragment_id].rows[offset] == people[at], "a row was placed where another one lies"
        assert at not in found
        found[at] = (fragment_id, offset)
    assert len(set(found.values())) == len(found)
    alive = {row for fragment in now.values() for offset, row in enumerate(fragment.rows) if offset in fragment.live}
    missing = {at for at, row in people.items() if row in alive} - set(found)
    if world.restored:
        return
    if not world.removed:
        assert not missing
        assert not unknown
    # What is not found is at least known to be looked for by other means.
    assert missing <= set(moved.in_fragments(unknown).expanded()[0].tolist())


def _tries(fewest: int) -> int:
    """Return how many worlds are made: so many by day, as many as for other properties at night."""
    return max(fewest, settings().max_examples)


@settings(max_examples=_tries(150))
@given(st.integers(0, 2**32), st.integers(1, 14), st.data())
def test_every_row_that_survives_is_found(seed: int, steps: int, data: st.DataObject) -> None:
    world = _grown(seed, steps, restores=False)
    _check(world, data.draw(st.integers(1, world.newest)))


@settings(max_examples=_tries(150))
@given(st.integers(0, 2**32), st.integers(1, 14), st.data())
def test_rows_are_found_or_named_as_lost_when_old_versions_are_gone(seed: int, steps: int, data: st.DataObject) -> None:
    world = _grown(seed, steps, restores=False)
    since = data.draw(st.integers(1, world.newest))
    world.removed = set(range(1, data.draw(st.integers(1, world.newest))))
    _check(world, since)


@settings(max_examples=_tries(250))
@given(st.integers(0, 2**32), st.integers(1, 14), st.data())
def test_no_row_is_placed_wrongly_whatever_happened(seed: int, steps: int, data: st.DataObject) -> None:
    world = _grown(seed, steps, restores=True)
    since = data.draw(st.integers(1, world.newest))
    world.removed = data.draw(st.sets(st.integers(1, max(world.newest - 1, 1)))) - {world.newest}
    _check(world, since)


def test_an_id_that_is_dealt_again_after_a_restore_is_another_fragment() -> None:
    # Fragments 0 and 1 were compacted into 5 and 6, the version before was restored, and compacted into another 6.
    # With the version between gone, both compactions are found: the second one by way of fragment 2.
    world = _grown(310_361, 7, restores=True)
    world.removed = {5}
    _check(world, 1)


def test_few_versions_are_looked_at() -> None:
    world, rng = World(), random.Random(1)
    world.append(rng)
    for _ in range(5_000):
        world.nothing(rng)
    world.compact(rng)
    for _ in range(5_000):
        world.nothing(rng)
    world.looks = 0
    _check(world, 1)
    assert world.looks <= 20 * len(world.versions[1])


@pytest.mark.parametrize("versions", [1_000, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_thousands_of_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: int) -> None:
    rounds = 3
    plain = make_dataset(tmp_path / "d", clustered(240, 8, 1), rows_per_fragment=10)
    dataset = lance.dataset(lance_dfaiss.create_index(plain, "vec", "FLAT").uri)
    for number in range(rounds):
        dataset.delete(f"id % 10 = {number}")
        dataset.optimize.compact_files(target_rows_per_fragment=40 * 2**number)
        while dataset.version < versions * (number + 1) // rounds:
            dataset.update_metadata({"number": str(number)})
    dataset.delete("id = 5")
    opened: list[DatasetHistory] = []

    def noted(pinned: PinnedDataset, column: VectorColumn) -> DatasetHistory:
        opened.append(DatasetHistory(pinned, column))
        return opened[-1]

    monkeypatch.setattr("lance_dfaiss.search.resolve.DatasetHistory", noted)

    start = time.perf_counter()
    index = lance_dfaiss.open_index(dataset)
    seconds = time.perf_counter() - start
    stats, truth = index.stats(), Exact(dataset, "l2")
    assert (dataset.version >= versions, stats.live_rows, stats.tail_rows) == (True, len(truth), 0)
    assert stats.mapped_rows == stats.unsaved_rows == stats.live_rows
    assert_exact(truth, clustered(5, 8, 2), *index.knn(clustered(5, 8, 2), 20), scale=500)
    # Halving 10,000 takes 14 looks; one more for what lived before each compaction, and for where the index began.
    halvings = versions.bit_length()
    assert halvings <= sum(history.reads for history in opened) <= rounds * (halvings + 2) + 1
    assert seconds < 20  # 50 small files; a machine that does nothing else takes a tenth of a second
