"""Resolve an index generation against one dataset version: which positions are live, whose rows they are.

Pure: covers, fragment states and what compactions did in, arrays out. A version number proves nothing
(committing an index makes one itself); a fragment's signature does. What cannot be proven to be the row that
was encoded is tail: rows to be searched in the dataset itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..manifest import Cover, FragmentCover, FragmentSignature, Remap, RemapTarget, RunTable
from ..plan import FragmentState
from ..types import Int64Array, UInt64Array
from .places import Places, RunMap, expand

__all__ = [
    "Layout",
    "Located",
    "Snapshot",
    "TailFragment",
    "covered_rows",
    "deletions_to_read",
    "fragments_to_read",
    "live_rows_of",
    "locate",
    "match_row_ids",
    "new_remaps",
    "placed",
    "revived_fragments",
    "settle",
    "without_entry",
]


@dataclass(frozen=True, slots=True, eq=False)
class TailFragment:
    """Live rows of one fragment that no shard covers.

    Parameters
    ----------
    state : FragmentState
        The fragment.
    offsets : numpy.ndarray or None
        int64, increasing; None for every live row.
    rows : int
        How many.
    reason : str
        ``"added"``: appended, updated, or compacted where that cannot be followed; ``"rewritten"``: new vectors in
        the same fragment; ``"partial"``: the rest of the fragment is covered.
    """

    state: FragmentState
    offsets: Int64Array | None
    rows: int
    reason: Literal["added", "rewritten", "partial"]

    @property
    def fragment_id(self) -> int:
        """Lance's id."""
        return self.state.fragment_id


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """An index generation, resolved against one dataset version.

    Parameters
    ----------
    version : int
        Dataset version.
    row_ids : RunMap
        Row ids of positions.
    places : RunMap
        Row addresses of the positions that are in this version.
    live : numpy.ndarray
        bool ``(positions,)``: indexed and not deleted.
    indexed_rows, masked_rows : int
        Rows with an entry, and how many of those are not in this version, or not as they were encoded; or not
        answered for, where a process answers for a part of an index.
    mapped_rows : int
        Live rows that were found through a compaction, in another fragment than they were encoded from.
    tail : tuple of TailFragment
        Rows that no shard covers.
    """

    version: int
    row_ids: RunMap
    places: RunMap
    live: NDArray[np.bool_]
    indexed_rows: int
    masked_rows: int
    mapped_rows: int
    tail: tuple[TailFragment, ...]

    @property
    def live_rows(self) -> int:
        """Indexed rows that a search can return."""
        return self.indexed_rows - self.masked_rows

    @property
    def tail_rows(self) -> int:
        """Live rows that are not indexed."""
        return sum(fragment.rows for fragment in self.tail)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """What of an index a process holds and answers for, by the ordinals of its covers.

    Parameters
    ----------
    held : tuple of int
        Covers whose shards are in RAM, in order of position.
    owned : frozenset of int
        Those of them whose rows are answered for.
    owns_fragment : callable
        Whether rows of a fragment that no cover has are answered for, by its id.
    """

    held: tuple[int, ...]
    owned: frozenset[int]
    owns_fragment: Callable[[int], bool]

    def laid_out(self, places: Places, covers: Sequence[Cover]) -> Places:
        """Return the rows of owned covers, at the positions where they are in RAM.

        Parameters
        ----------
        places : Places
            Positions count over all covers.
        covers : sequence of Cover
            All of them.
        """
        parts = places.parts([cover.physical_rows for cover in covers])
        mine, base = [], 0
        for ordinal in self.held:
            if ordinal in self.owned:
                mine.append(parts[ordinal].shifted(base))
            base += covers[ordinal].physical_rows
        return Places.join(mine)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Located:
    """What covers alone tell about a dataset version; positions count over all covers.

    Parameters
    ----------
    direct, mapped : Places
        Rows in the fragments they were encoded from, and in those that a written remap leads to.
    lost : Places
        Last known places of the other rows.
    signatures : dict of int to FragmentSignature
        Of the fragments of ``lost``.
    positions : int
        Of all covers.
    """

    direct: Places
    mapped: Places
    lost: Places
    signatures: dict[int, FragmentSignature]
    positions: int


def locate(covers: Sequence[Cover], states: Sequence[FragmentState]) -> Located:
    """Find covered rows by signature.

    Parameters
    ----------
    covers : sequence of Cover
        One per shard, in order of position.
    states : sequence of FragmentState
        All fragments of the version.
    """
    present = {state.fragment_id: state for state in states}
    direct: list[Places] = []
    mapped: list[Places] = []
    lost: list[Places] = []
    signatures: dict[int, FragmentSignature] = {}
    base = 0
    for cover in covers:
        origins = _origins(cover)
        here = [f.fragment_id for f in cover.fragments if _same(present.get(f.fragment_id), f)]
        found = origins.in_fragments(here)
        taken = _marks(found, cover.physical_rows)
        targets = () if cover.remap is None else cover.remap.fragments
        moved = _remapped(cover).in_fragments(target.fragment_id for target in targets)
        arrived = moved.in_fragments(t.fragment_id for t in targets if _same(present.get(t.fragment_id), t))
        arrived = arrived.where(~taken)
        taken |= _marks(arrived, cover.physical_rows)
        # The last known place of a row is where a remap led it, else where it was encoded from.
        known = {f.fragment_id: f.signature for f in cover.fragments} | {t.fragment_id: t.signature for t in targets}
        # A restored version can deal a number again: what then bore it tells nothing of the rows from before.
        clear = [f.fragment_id for f in cover.fragments if known[f.fragment_id] == f.signature]
        stayed = origins.where(~taken & ~_marks(moved, cover.physical_rows)).in_fragments(clear)
        gone = Places.join([moved.where(~taken), stayed])
        direct.append(found.shifted(base))
        mapped.append(arrived.shifted(base))
        for fragment_id in np.unique(gone.fragment_ids).tolist():
            if signatures.get(fragment_id, known[fragment_id]) != known[fragment_id]:
                # Rewritten in place between two shards: only what the later one read can have moved on.
                lost = [part.select(part.fragment_ids != fragment_id) for part in lost]
            signatures[fragment_id] = known[fragment_id]
        lost.append(gone.shifted(base))
        base += cover.physical_rows
    return Located(
        direct=Places.join(direct),
        mapped=Places.join(mapped),
        lost=Places.join(lost),
        signatures=signatures,
        positions=base,
    )


def fragments_to_read(states: Sequence[FragmentState], *places: Places) -> list[int]:
    """Return the fragments whose deletions have to be read: those that have any, and hold covered rows."""
    covered = {int(i) for part in places for i in np.unique(part.fragment_ids)}
    return [state.fragment_id for state in states if state.deleted_rows and state.fragment_id in covered]


def deletions_to_read(covers: Sequence[Cover], states: Sequence[FragmentState]) -> list[int]:
    """Return the fragments that covers were encoded from and that have deletions in a version."""
    covered = {fragment.fragment_id for cover in covers for fragment in cover.fragments}
    return [state.fragment_id for state in states if state.deleted_rows and state.fragment_id in covered]


def revived_fragments(
    covers: Sequence[Cover], states: Sequence[FragmentState], live_offsets: Mapping[int, Int64Array]
) -> list[int]:
    """Return the fragments with rows that were deleted when they were encoded, and are live in this version.

    Parameters
    ----------
    covers : sequence of Cover
        Of any shards.
    states : sequence of FragmentState
        All fragments of the version.
    live_offsets : mapping of int to numpy.ndarray
        Live physical offsets of the fragments named by `deletions_to_read`.
    """
    present = _by_id(states)
    revived = []
    for cover in covers:
        unspoken = np.zeros(cover.physical_rows, dtype=bool)
        rows = cover.deleted.rows.astype(np.int64)
        unspoken[expand(rows[:, 0], rows[:, 1])] = True
        for fragment in cover.fragments if len(rows) else ():
            if fragment.fragment_id in present:
                mine = unspoken[fragment.first_position : fragment.first_position + fragment.positions]
                alive = live_offsets.get(fragment.fragment_id)
                if alive is not None:
                    alive = alive - fragment.first_offset
                    alive = alive[(alive >= 0) & (alive < fragment.positions)]
                if mine.any() if alive is None else mine[alive].any():
                    revived.append(fragment.fragment_id)
    return revived


def placed(located: Located, followed: Places) -> Places:
    """Return where all covered rows are in the version, none twice; arguments as for `settle`."""
    return Places.join([located.direct, located.mapped, followed]).disjoint()


def covered_rows(places: Places) -> dict[int, int]:
    """Return how many rows of each fragment are covered."""
    order = np.argsort(places.fragment_ids, kind="stable")
    ids, firsts = np.unique(places.fragment_ids[order], return_index=True)
    sums = np.add.reduceat(places.lengths[order], firsts) if len(ids) else places.lengths
    return dict(zip(ids.tolist(), sums.tolist(), strict=True))


def without_entry(covers: Sequence[Cover]) -> NDArray[np.bool_]:
    """Return which positions of some covers have no entry, bool ``(positions,)``."""
    skipped = np.zeros(sum(cover.physical_rows for cover in covers), dtype=bool)
    base = 0
    for cover in covers:
        rows = cover.skipped.rows.astype(np.int64)
        if len(rows):
            skipped[base + expand(rows[:, 0], rows[:, 1])] = True
        base += cover.physical_rows
    return skipped


def settle(
    covers: Sequence[Cover],
    states: Sequence[FragmentState],
    located: Located,
    followed: Places,
    live_offsets: Mapping[int, Int64Array],
    *,
    version: int,
    layout: Layout | None = None,
) -> Snapshot:
    """Decide which positions are live, and what is left to be searched in the dataset.

    Parameters
    ----------
    covers : sequence of Cover
        As for `locate`.
    states : sequence of FragmentState
        All fragments of the version.
    located : Located
        From `locate`.
    followed : Places
        Rows of ``located.lost`` that were found in fragments of this version.
    live_offsets : mapping of int to numpy.ndarray
        Live physical offsets of the fragments named by `fragments_to_read`; with a layout, of those among them that
        hold rows answered for.
    version : int
        Of the dataset.
    layout : Layout, optional
        Positions are those of the shards that it holds, and only rows that it answers for are live, or tail. By
        default everything, in the order of the covers.
    """
    everywhere = placed(located, followed)
    moved = Places.join([located.mapped, followed])
    held, places = covers, everywhere
    if layout is not None:
        held = [covers[ordinal] for ordinal in layout.held]
        places, moved = layout.laid_out(everywhere, covers), layout.laid_out(moved, covers)
    alive = {i: _alive(state, live_offsets[i]) for i, state in _by_id(states).items() if i in live_offsets}
    skipped = without_entry(held)
    live = np.zeros(len(skipped), dtype=bool)
    places.mark(live, alive)
    live &= ~skipped
    indexed = len(skipped) - int(np.count_nonzero(skipped))
    addresses = places.run_map()
    return Snapshot(
        version=version,
        # Whether a row is named by its address must not depend on which shards are here.
        row_ids=addresses if any(cover.row_ids is None for cover in covers) else _row_ids(held),
        places=addresses,
        live=live,
        indexed_rows=indexed,
        masked_rows=indexed - int(np.count_nonzero(live)),
        mapped_rows=live_rows_of(moved, live),
        tail=_tail(covers, states, everywhere, alive, None if layout is None else layout.owns_fragment),
    )


def match_row_ids(
    covers: Sequence[Cover],
    missing: NDArray[np.bool_],
    row_ids: UInt64Array,
    fragment_ids: Int64Array,
    offsets: Int64Array,
    updated: UInt64Array,
) -> Places:
    """Find rows by their stable row id where nothing else is left to go by.

    A row counts as found if the version that last wrote it is the one it was encoded from. That trusts whoever
    wrote the dataset to have kept these versions up to date, as Lance's own operations do.

    Parameters
    ----------
    covers : sequence of Cover
        With row ids and versions.
    missing : numpy.ndarray
        bool ``(positions,)``: positions whose rows are looked for.
    row_ids, fragment_ids, offsets, updated : numpy.ndarray
        uint64, int64, int64 and uint64 ``(n,)``: live rows that no shard is known to cover.
    """
    versions = np.zeros(len(missing), dtype=np.uint64)
    wanted = missing.copy()
    base = 0
    for cover in covers:
        known = np.zeros(cover.physical_rows, dtype=bool)
        for start, version, length in () if cover.updated is None else cover.updated.rows.tolist():
            versions[base + start : base + start + length] = version
            known[start : start + length] = True
        _clear(known, cover.deleted)
        wanted[base : base + cover.physical_rows] &= known
        base += cover.physical_rows
    positions = np.flatnonzero(wanted)
    ids = _row_ids(covers).numbers(positions)
    order = np.argsort(ids, kind="stable")
    ids, positions = ids[order], positions[order]
    if not len(ids) or not len(row_ids):
        return Places.of([])
    at = np.minimum(np.searchsorted(ids, row_ids), len(ids) - 1)
    # Of several positions with one id (a row that was updated and indexed again) only one has the right version.
    found_rows, found_positions = [], []
    while True:
        inside = (at < len(ids)) & (ids[np.minimum(at, len(ids) - 1)] == row_ids)
        if not inside.any():
            break
        same = inside & (versions[positions[np.minimum(at, len(ids) - 1)]] == updated)
        found_rows.append(np.flatnonzero(same))
        found_positions.append(positions[at[same]])
        at = at + 1
    if not found_rows:
        return Places.of([])
    rows, where = np.concatenate(found_rows), np.concatenate(found_positions)
    return Places.join([Places(where, fragment_ids[rows], offsets[rows], np.ones(len(rows), dtype=np.int64))]).joined()


def new_remaps(
    covers: Sequence[Cover],
    states: Sequence[FragmentState],
    located: Located,
    followed: Places,
    *,
    version: int,
) -> list[Remap | None]:
    """Return the remap to write down for each cover; None where nothing new was found.

    Parameters
    ----------
    covers, states, located, followed
        As for `settle`.
    version : int
        Dataset version at which this is proven.
    """
    present = _by_id(states)
    remaps: list[Remap | None] = []
    base = 0
    for cover in covers:
        mine = followed.select((followed.positions >= base) & (followed.positions < base + cover.physical_rows))
        if not len(mine):
            remaps.append(None)
        else:
            kept = located.mapped.select(
                (located.mapped.positions >= base) & (located.mapped.positions < base + cover.physical_rows)
            )
            moved = Places.join([kept, mine]).disjoint().shifted(-base).joined()
            remaps.append(
                Remap(
                    version=version,
                    runs=RunTable.of(np.stack(moved.columns, axis=1)),
                    fragments=tuple(
                        RemapTarget(
                            fragment_id=i, physical_rows=present[i].physical_rows, signature=present[i].signature
                        )
                        for i in np.unique(moved.fragment_ids).tolist()
                    ),
                )
            )
        base += cover.physical_rows
    return remaps


def _origins(cover: Cover) -> Places:
    """Return the rows a cover speaks for, where they were encoded from."""
    places = Places.of(
        (f.first_position, f.fragment_id, f.first_offset, f.positions) for f in cover.fragments if f.positions
    )
    if not len(cover.deleted):
        return places
    spoken = np.ones(cover.physical_rows, dtype=bool)
    _clear(spoken, cover.deleted)
    return places.where(spoken)


def _remapped(cover: Cover) -> Places:
    if cover.remap is None:
        return Places.of([])
    table = cover.remap.runs.rows.astype(np.int64)
    return Places(*(np.ascontiguousarray(table[:, i]) for i in range(4)))


def _same(state: FragmentState | None, known: FragmentCover | RemapTarget) -> bool:
    return state is not None and state.signature == known.signature and state.physical_rows == known.physical_rows


def _by_id(states: Sequence[FragmentState]) -> dict[int, FragmentState]:
    return {state.fragment_id: state for state in states}


def _marks(places: Places, positions: int) -> NDArray[np.bool_]:
    marks = np.zeros(positions, dtype=bool)
    places.mark(marks, {})
    return marks


def _alive(state: FragmentState, offsets: Int64Array) -> NDArray[np.bool_]:
    alive = np.zeros(state.physical_rows, dtype=bool)
    alive[offsets] = True
    return alive


def _clear(marks: NDArray[np.bool_], table: RunTable) -> None:
    rows = table.rows.astype(np.int64)
    if len(rows):
        marks[expand(rows[:, 0], rows[:, 1])] = False


def live_rows_of(places: Places, live: NDArray[np.bool_]) -> int:
    """Count the rows whose position is live."""
    return int(places.counts(live).sum())


def _row_ids(covers: Sequence[Cover]) -> RunMap:
    """Return the stable row ids of all positions that had one."""
    tables, base = [], 0
    for cover in covers:
        if cover.row_ids is not None:
            tables.append((cover.row_ids.rows, base))
        base += cover.physical_rows
    empty = np.empty(0, np.int64)
    if not tables:
        return RunMap(empty, empty.astype(np.uint64), empty)
    return RunMap(
        np.concatenate([rows[:, 0].astype(np.int64) + first for rows, first in tables]),
        np.concatenate([rows[:, 1] for rows, _ in tables]),
        np.concatenate([rows[:, 2].astype(np.int64) for rows, _ in tables]),
    )


def _tail(
    covers: Sequence[Cover],
    states: Sequence[FragmentState],
    places: Places,
    alive: Mapping[int, NDArray[np.bool_]],
    owns_fragment: Callable[[int], bool] | None,
) -> tuple[TailFragment, ...]:
    covered = covered_rows(places)
    known = {fragment.fragment_id for cover in covers for fragment in cover.fragments}
    tail = []
    for state in states:
        rows = covered.get(state.fragment_id, 0)
        if rows == state.physical_rows or not (owns_fragment is None or owns_fragment(state.fragment_id)):
            continue
        if not rows:
            if state.live_rows:
                reason: Literal["added", "rewritten"] = "rewritten" if state.fragment_id in known else "added"
                tail.append(TailFragment(state, None, state.live_rows, reason))
            continue
        left = np.ones(state.physical_rows, dtype=bool)
        part = places.select(places.fragment_ids == state.fragment_id)
        left[expand(part.offsets, part.lengths)] = False
        if state.fragment_id in alive:
            left &= alive[state.fragment_id]
        offsets = np.flatnonzero(left)
        if len(offsets):
            tail.append(TailFragment(state, offsets, len(offsets), "partial"))
    return tuple(tail)
