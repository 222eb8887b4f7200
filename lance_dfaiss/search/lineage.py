"""Follow covered rows through the compactions that moved them, without looking at every version.

Pure: what a version holds comes from a `History`. A compaction keeps the order of rows: the live rows of
the old fragments of a group, one after the other, are the rows of its new fragments. Which transaction took
a fragment away is found by bisection between two versions, so 10,000 versions cost about 14 looks.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..manifest import FragmentSignature
from ..plan import FragmentState, RewriteGroup
from ..types import Int64Array
from .places import Places

__all__ = ["History", "Rewrite", "apply_rewrites", "find_rewrites"]


class History(Protocol):
    """What is still known of the versions of a dataset."""

    def fragment_ids(self, version: int) -> frozenset[int] | None:
        """Return the fragments of a version; None if it was removed."""

    def rewritten(self, version: int) -> Sequence[RewriteGroup] | None:
        """Return what the compaction that made a version did.

        Nothing, where another operation made it that took rows away for good; None where that is not known.
        """

    def live_offsets(self, version: int, fragment_id: int) -> Int64Array | None:
        """Return the offsets of the live rows of a fragment in a version, increasing; None if it was removed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rewrite:
    """One group of one compaction, with all that is needed to move rows over it.

    Parameters
    ----------
    old : tuple of (int, FragmentSignature, numpy.ndarray or int)
        Fragment, what it was, and its live offsets; their number where no row is deleted.
    new : tuple of FragmentState
        In order of their rows.
    """

    old: tuple[tuple[int, FragmentSignature, Int64Array | int], ...]
    new: tuple[FragmentState, ...]


def find_rewrites(
    lost: Mapping[int, FragmentSignature],
    present: Mapping[int, FragmentState],
    history: History,
    *,
    since: int,
    until: int,
) -> tuple[list[Rewrite], set[int]]:
    """Return the compactions that took fragments from one version to another, in order.

    Parameters
    ----------
    lost : mapping of int to FragmentSignature
        Fragments that were there at ``since`` and are not at ``until``.
    present : mapping of int to FragmentState
        All fragments at ``until``.
    history : History
        Of the versions between.
    since, until : int
        Dataset versions.

    Returns
    -------
    tuple of (list of Rewrite, set of int)
        Each takes its rows from a fragment of ``lost`` or from one of an earlier entry. And the fragments of
        which is not known what became of them: of ``lost``, or of those that their rows went to.
    """
    waiting = {fragment_id: (since, signature) for fragment_id, signature in lost.items()}
    known = history.fragment_ids(since)
    if known is not None:
        waiting = {fragment_id: entry for fragment_id, entry in waiting.items() if fragment_id in known}
    found: list[tuple[int, Rewrite]] = []
    unknown: set[int] = set()
    # The earliest first, so that a compaction of several waiting fragments is met once.
    queue = sorted((low, fragment_id) for fragment_id, (low, _) in waiting.items())
    while queue:
        low, fragment_id = heapq.heappop(queue)
        if waiting.get(fragment_id, (None, None))[0] != low:
            continue  # settled together with another one
        version = _vanished(fragment_id, history, low, until)
        groups = None if version is None else history.rewritten(version)
        handled = {fragment_id} | _gone_together(waiting, history, version)
        if groups is None:
            unknown |= handled
        elif _went_unseen(fragment_id, groups, history, version or 0):
            unknown.add(fragment_id)
        for group in groups or ():
            ours = {s.fragment_id for s in group.old if waiting.get(s.fragment_id, (0, None))[1] == s.signature}
            if not ours:
                continue
            handled |= ours
            rewrite = _proven(group, history, version or 0)
            if rewrite is None:
                unknown |= ours
                continue
            found.append((version or 0, rewrite))
            for state in rewrite.new:
                # One that is there with another signature was written anew in place: its rows went nowhere.
                if state.fragment_id not in present:
                    waiting[state.fragment_id] = (version or 0, state.signature)
                    heapq.heappush(queue, (version or 0, state.fragment_id))
        for done in handled:
            waiting.pop(done, None)
    # Rows only move forward in time, so by version every entry comes after those that its rows come from.
    return [rewrite for _, rewrite in sorted(found, key=lambda entry: entry[0])], unknown


def _gone_together(
    waiting: Mapping[int, tuple[int, FragmentSignature]], history: History, version: int | None
) -> set[int]:
    """Return the waiting fragments that a version does not have while the one before it does."""
    before = None if version is None else history.fragment_ids(version - 1)
    after = None if version is None else history.fragment_ids(version)
    if before is None or after is None or version is None:
        return set()
    return {i for i in before - after if i in waiting and waiting[i][0] < version}


def _vanished(fragment_id: int, history: History, low: int, high: int) -> int | None:
    """Return a version that does not have a fragment while the one before it does, or is not known."""
    ids = history.fragment_ids(high)
    if low >= high or ids is None or fragment_id in ids:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        ids = history.fragment_ids(middle)
        # Cleaning up removes the oldest versions: what is not known any more is taken to lie before.
        if ids is None or fragment_id in ids:
            low = middle
        else:
            high = middle
    return high


def _went_unseen(fragment_id: int, groups: Sequence[RewriteGroup], history: History, version: int) -> bool:
    """Tell whether a fragment may have gone in an earlier version than the one found, which was removed."""
    taken = {state.fragment_id for group in groups for state in group.old}
    return fragment_id not in taken and history.fragment_ids(version - 1) is None


def _proven(group: RewriteGroup, history: History, version: int) -> Rewrite | None:
    """Return a group with all that is needed to move rows, once its numbers agree."""
    if sum(s.live_rows for s in group.old) != sum(s.physical_rows for s in group.new):
        return None
    old: list[tuple[int, FragmentSignature, Int64Array | int]] = []
    for state in group.old:
        if not state.deleted_rows:
            old.append((state.fragment_id, state.signature, state.physical_rows))
            continue
        live = history.live_offsets(version - 1, state.fragment_id)
        if live is None or len(live) != state.live_rows:
            return None
        old.append((state.fragment_id, state.signature, live))
    return Rewrite(old=tuple(old), new=group.new)


def apply_rewrites(
    places: Places, signatures: Mapping[int, FragmentSignature], rewrites: Sequence[Rewrite]
) -> tuple[Places, dict[int, FragmentState]]:
    """Move rows over compactions.

    Parameters
    ----------
    places : Places
        Where the rows were.
    signatures : mapping of int to FragmentSignature
        Of the fragments that the places name.
    rewrites : sequence of Rewrite
        As found, in order.

    Returns
    -------
    tuple of (Places, dict)
        Where the rows are after the last compaction that moved them; those that were deleted before they were
        moved are left out. And what the fragments that rows were moved to looked like then.
    """
    known = dict(signatures)
    targets: dict[int, FragmentState] = {}
    for rewrite in rewrites:
        moved, gone = [], []
        base = 0
        for fragment_id, signature, live in rewrite.old:
            if known.get(fragment_id) == signature:
                moved.append(_ranked(places.in_fragments([fragment_id]), live, base))
                gone.append(fragment_id)
            base += live if isinstance(live, int) else len(live)
        # After a restore ids are dealt again: rows that were in another fragment of the same id are not in this one.
        gone += [s.fragment_id for s in rewrite.new if known.get(s.fragment_id, s.signature) != s.signature]
        kept = places.select(~np.isin(places.fragment_ids, np.array(gone, dtype=np.int64)))
        places = Places.join([kept, _laid_out(Places.join(moved), rewrite.new)])
        for state in rewrite.new:
            known[state.fragment_id] = state.signature
            targets[state.fragment_id] = state
    return places, targets


def _ranked(places: Places, live: Int64Array | int, base: int) -> Places:
    """Return rows of one fragment with their rank among the live ones, from ``base`` on, as offset."""
    if isinstance(live, int):
        return Places(places.positions, places.fragment_ids, places.offsets + base, places.lengths)
    starts = np.searchsorted(live, places.offsets)
    counts = np.searchsorted(live, places.offsets + places.lengths) - starts
    ranks = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    shifts = np.repeat(places.positions - places.offsets, counts)
    positions = live[ranks] + shifts
    if not len(positions):
        return Places.of([])
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(ranks) != 1)) + 1
    firsts = np.concatenate(([0], breaks))
    lengths = np.diff(np.append(firsts, len(positions)))
    fragment_ids = np.zeros(len(firsts), dtype=np.int64)
    return Places(positions[firsts], fragment_ids, ranks[firsts].astype(np.int64) + base, lengths)


def _laid_out(ranked: Places, new: Sequence[FragmentState]) -> Places:
    """Turn ranks into offsets of the new fragments, which hold them one after the other."""
    parts = []
    first = 0
    for state in new:
        end = first + state.physical_rows
        starts = np.maximum(ranked.offsets, first)
        lengths = np.minimum(ranked.offsets + ranked.lengths, end) - starts
        inside = lengths > 0
        parts.append(
            Places(
                (ranked.positions + starts - ranked.offsets)[inside],
                np.full(int(inside.sum()), state.fragment_id, dtype=np.int64),
                (starts - first)[inside],
                lengths[inside],
            )
        )
        first = end
    return Places.join(parts)
