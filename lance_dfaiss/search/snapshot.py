"""Resolve an index generation against one dataset version: which positions are live, whose rows they are.

Pure: covers and fragment states in, arrays out. A version number proves nothing (committing an index
makes one itself); a fragment's signature does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DatasetChanged
from ..manifest import Cover
from ..plan import FragmentState
from ..types import Int64Array, UInt64Array

__all__ = ["RowIdMap", "Snapshot", "fragments_to_read", "resolve_snapshot", "revived_fragments"]

_MAX_NAMED = 10


class RowIdMap:
    """From position to row id and back, by runs where both count up by one.

    Parameters
    ----------
    first_positions, first_row_ids, lengths : numpy.ndarray
        int64, uint64 and int64 ``(runs,)``; positions increasing, runs disjoint.
    """

    def __init__(self, first_positions: Int64Array, first_row_ids: UInt64Array, lengths: Int64Array) -> None:
        self._positions = first_positions
        self._row_ids = first_row_ids
        self._lengths = lengths
        # Two's complement wraps around, so signed sums give the right unsigned row ids.
        self._shift = first_row_ids.view(np.int64) - first_positions
        self._by_row_id = np.argsort(first_row_ids, kind="stable")

    def row_ids(self, positions: Int64Array) -> UInt64Array:
        """Return the row ids of positions; for -1 some number.

        Parameters
        ----------
        positions : numpy.ndarray
            int64, any shape; every one -1 or covered by a run.
        """
        run = 1 if len(self._positions) == 1 else self._positions.searchsorted(positions, side="right")
        row_ids: UInt64Array = (positions + self._shift[run - 1]).view(np.uint64)
        return row_ids

    def positions(self, row_ids: UInt64Array) -> Int64Array:
        """Return the positions of row ids, -1 for those that are not covered.

        Parameters
        ----------
        row_ids : numpy.ndarray
            uint64 ``(n,)``.
        """
        if not len(self._positions):
            return np.full(len(row_ids), -1, dtype=np.int64)
        order = self._by_row_id
        run = order[np.maximum(np.searchsorted(self._row_ids[order], row_ids, side="right") - 1, 0)]
        ahead = row_ids - self._row_ids[run]  # unsigned: a row id can be 2**63 and more
        inside = (row_ids >= self._row_ids[run]) & (ahead < self._lengths[run].astype(np.uint64))
        return np.where(inside, self._positions[run] + ahead.astype(np.int64), -1)

    @property
    def ram_bytes(self) -> int:
        """Bytes of the runs."""
        return sum(int(a.nbytes) for a in (self._positions, self._row_ids, self._lengths, self._shift, self._by_row_id))


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """An index generation, resolved against one dataset version.

    Parameters
    ----------
    version : int
        Dataset version.
    row_ids : RowIdMap
        Of all covered positions.
    live : numpy.ndarray
        bool ``(positions,)``: indexed and not deleted.
    indexed_rows, masked_rows : int
        Rows with an entry, and how many of those are deleted in this version.
    """

    version: int
    row_ids: RowIdMap
    live: NDArray[np.bool_]
    indexed_rows: int
    masked_rows: int

    @property
    def live_rows(self) -> int:
        """Rows that a search can return."""
        return self.indexed_rows - self.masked_rows


def fragments_to_read(covers: Sequence[Cover], states: Sequence[FragmentState]) -> list[int]:
    """Return the covered fragments whose deletions have to be read: those that have any."""
    covered = {fragment.fragment_id for cover in covers for fragment in cover.fragments}
    return [state.fragment_id for state in states if state.deleted_rows and state.fragment_id in covered]


def resolve_snapshot(
    covers: Sequence[Cover],
    states: Sequence[FragmentState],
    live_offsets: Mapping[int, Int64Array],
    *,
    version: int,
) -> Snapshot:
    """Resolve covers against the fragments of a dataset version.

    Parameters
    ----------
    covers : sequence of Cover
        One per shard, in order of ordinal.
    states : sequence of FragmentState
        All fragments of the version.
    live_offsets : mapping of int to numpy.ndarray
        Live physical offsets of the fragments named by `fragments_to_read`.
    version : int
        Of the dataset.

    Raises
    ------
    DatasetChanged
        If a covered fragment's vectors changed, or the version has fragments that are not covered.
    """
    by_id = {state.fragment_id: state for state in states}
    _check_covered(covers, by_id, revived_fragments(covers, states, live_offsets), version)
    total = sum(cover.physical_rows for cover in covers)
    live = np.ones(total, dtype=bool)
    first = indexed = 0
    for cover in covers:
        part = live[first : first + cover.physical_rows]
        for start, length in cover.skipped.rows.astype(np.int64):
            part[start : start + length] = False
        indexed += int(np.count_nonzero(part))
        _mask_deleted(cover, part, by_id, live_offsets)
        first += cover.physical_rows
    return Snapshot(version, _row_id_map(covers), live, indexed, indexed - int(np.count_nonzero(live)))


def revived_fragments(
    covers: Sequence[Cover], states: Sequence[FragmentState], live_offsets: Mapping[int, Int64Array]
) -> list[int]:
    """Return the fragments with rows that were deleted when they were encoded, and are live in this version.

    That happens when the version is older than the one that was indexed, or a restored one. The index
    has no entry for such rows, so it does not cover their fragments.

    Parameters
    ----------
    covers : sequence of Cover
        Of any shards.
    states : sequence of FragmentState
        All fragments of the version.
    live_offsets : mapping of int to numpy.ndarray
        Live physical offsets of the fragments named by `fragments_to_read`.
    """
    present = {state.fragment_id for state in states}
    revived = []
    for cover in covers:
        if not len(cover.deleted):
            continue
        deleted = np.zeros(cover.physical_rows, dtype=bool)
        for start, length in cover.deleted.rows.astype(np.int64):
            deleted[start : start + length] = True
        for fragment in cover.fragments:
            if fragment.fragment_id not in present:
                continue
            rows = deleted[fragment.first_position : fragment.first_position + fragment.physical_rows]
            alive = live_offsets.get(fragment.fragment_id)
            if rows.any() if alive is None else rows[alive].any():
                revived.append(fragment.fragment_id)
    return revived


def _check_covered(
    covers: Sequence[Cover], by_id: Mapping[int, FragmentState], revived: Sequence[int], version: int
) -> None:
    covered = {fragment.fragment_id: fragment for cover in covers for fragment in cover.fragments}
    changed = [
        i
        for i, fragment in covered.items()
        if i in by_id and (by_id[i].signature != fragment.signature or by_id[i].physical_rows != fragment.physical_rows)
    ]
    new = [i for i in by_id if i not in covered]
    if not changed and not new and not revived:
        return
    reasons = []
    if changed:
        reasons.append(f"the vectors of fragments {_named(changed)} were rewritten")
    if new:
        reasons.append(f"fragments {_named(new)} were added or compacted after the index was built")
    if revived:
        reasons.append(f"rows of fragments {_named(revived)} that were deleted when the index was built are live")
    raise DatasetChanged(
        f"dataset version {version} holds rows that the index does not cover: {' and '.join(reasons)}",
        remedy="Build the index again with create_index(..., replace=True)",
        fragments=tuple(sorted({*changed, *new, *revived})),
    )


def _mask_deleted(
    cover: Cover, part: NDArray[np.bool_], by_id: Mapping[int, FragmentState], live_offsets: Mapping[int, Int64Array]
) -> None:
    for fragment in cover.fragments:
        rows = part[fragment.first_position : fragment.first_position + fragment.physical_rows]
        if fragment.fragment_id not in by_id:
            rows[:] = False  # every row was deleted, so Lance dropped the fragment
        elif fragment.fragment_id in live_offsets:
            alive = np.zeros(fragment.physical_rows, dtype=bool)
            alive[live_offsets[fragment.fragment_id]] = True
            rows &= alive


def _row_id_map(covers: Sequence[Cover]) -> RowIdMap:
    positions, row_ids, lengths = [], [], []
    first = 0
    for cover in covers:
        if cover.row_ids is not None:
            table = cover.row_ids.rows
            positions.append(table[:, 0].astype(np.int64) + first)
            row_ids.append(table[:, 1])
            lengths.append(table[:, 2].astype(np.int64))
        else:
            starts = [fragment.first_position + first for fragment in cover.fragments]
            positions.append(np.array(starts, dtype=np.int64))
            row_ids.append(np.array([fragment.fragment_id << 32 for fragment in cover.fragments], dtype=np.uint64))
            lengths.append(np.array([fragment.physical_rows for fragment in cover.fragments], dtype=np.int64))
        first += cover.physical_rows
    if not positions:
        return RowIdMap(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64))
    return RowIdMap(np.concatenate(positions), np.concatenate(row_ids), np.concatenate(lengths))


def _named(ids: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in sorted(ids)[:_MAX_NAMED])
    return shown if len(ids) <= _MAX_NAMED else f"{shown} and {len(ids) - _MAX_NAMED} more"
