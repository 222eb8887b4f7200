"""Count the rows that other groups answer for, one shard at a time: their rows are not held here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..lance_io import PinnedDataset
from ..manifest import Cover, ShardRecord
from ..plan import FragmentState
from .places import Places, expand
from .portion import Portion
from .snapshot import Snapshot, covered_rows, without_entry

__all__ = ["Counted", "deletions_key", "rows_by_group"]

Counted = Mapping[bytes, int]
"""Rows that were counted, by what they were counted from."""


@dataclass(slots=True)
class _Deletions:
    """Reads which rows of fragments are alive, and keeps those that were asked for last."""

    pinned: PinnedDataset
    states: Mapping[int, FragmentState]
    held: dict[int, NDArray[np.bool_]]

    def alive(self, fragment_ids: Iterable[int]) -> dict[int, NDArray[np.bool_]]:
        """Return bool ``(physical_rows,)`` of those fragments that have deletions."""
        wanted = {i for i in fragment_ids if self.states[i].deleted_rows}
        self.held = {i: rows for i, rows in self.held.items() if i in wanted}
        read = self.pinned.live_offsets_of(sorted(wanted - self.held.keys()))
        for i, offsets in read.items():
            self.held[i] = np.zeros(self.states[i].physical_rows, dtype=bool)
            self.held[i][offsets] = True
        return self.held


def rows_by_group(
    pinned: PinnedDataset,
    portion: Portion,
    records: Sequence[ShardRecord],
    covers: Sequence[Cover],
    states: Sequence[FragmentState],
    places: Places,
    own: Snapshot,
    counted: Counted,
) -> tuple[tuple[int, ...], Counted]:
    """Return how many rows each group can find, and what was counted for that.

    No more is in RAM at a time than the deletions of the fragments of one shard.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    portion : Portion
        What this process answers for.
    records, covers : sequence of ShardRecord, sequence of Cover
        All shards, with the remaps that hold at the version.
    states : sequence of FragmentState
        All fragments.
    places : Places
        All covered rows, none twice; positions count over all covers.
    own : Snapshot
        Of this process's part.
    counted : mapping
        From an earlier version: what is the same is not counted again.
    """
    rows = [0] * portion.groups
    rows[portion.group] = own.live_rows + own.tail_rows
    found: dict[bytes, int] = {}
    by_id = {state.fragment_id: state for state in states}
    deletions = _Deletions(pinned, by_id, {})
    parts = places.parts([cover.physical_rows for cover in covers])
    for record, cover, here in zip(records, covers, parts, strict=True):
        if not portion.owns(record):
            key = _key(record.index.digest, here, by_id)
            found[key] = counted[key] if key in counted else _indexed(cover, here, deletions)
            rows[portion.of_shards[record.index.digest]] += found[key]
    covered = covered_rows(places)
    by_fragment = places.select(np.argsort(places.fragment_ids, kind="stable"))
    for state in states:
        if portion.owns_fragment(state.fragment_id):
            continue
        rows_here = covered.get(state.fragment_id, 0)
        if not rows_here or rows_here == state.physical_rows or not state.deleted_rows:
            left = state.physical_rows - rows_here if rows_here else state.live_rows
        else:
            start, stop = np.searchsorted(by_fragment.fragment_ids, [state.fragment_id, state.fragment_id + 1]).tolist()
            here = by_fragment.select(slice(start, stop))
            key = _key("tail", here, by_id)
            found[key] = left = counted[key] if key in counted else _left(state, here, deletions)
        rows[portion.of_fragment(state.fragment_id)] += left
    return tuple(rows), found


def deletions_key(state: FragmentState) -> str:
    """Return what tells the live rows of a fragment.

    A fragment and a name of deletions can come again on another branch: the files tell.
    """
    return f"{state.deletions} {state.physical_rows} {state.signature.files}"


def _indexed(cover: Cover, here: Places, deletions: _Deletions) -> int:
    """Count the rows of a cover that are alive and have an entry."""
    live = np.zeros(cover.physical_rows, dtype=bool)
    here.mark(live, deletions.alive(np.unique(here.fragment_ids).tolist()))
    live &= ~without_entry([cover])
    return int(np.count_nonzero(live))


def _left(state: FragmentState, here: Places, deletions: _Deletions) -> int:
    """Count the live rows of a fragment that are not covered."""
    alive = deletions.alive([state.fragment_id])[state.fragment_id]
    return state.live_rows - int(np.count_nonzero(alive[expand(here.offsets, here.lengths)]))


def _key(what: str, here: Places, states: Mapping[int, FragmentState]) -> bytes:
    seal = hashlib.sha256(what.encode())
    for column in here.columns:
        seal.update(column.tobytes())
        seal.update(b"|")
    for fragment_id in np.unique(here.fragment_ids).tolist():
        seal.update(f"{fragment_id} {deletions_key(states[fragment_id])}|".encode())
    return seal.digest()
