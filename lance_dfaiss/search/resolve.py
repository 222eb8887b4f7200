"""Ask a dataset version what a snapshot needs to know, and resolve it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from ..errors import DatasetChanged, InsufficientData, UnknownColumn, UnsupportedColumn
from ..lance_io import DatasetHistory, PinnedDataset, VectorColumn
from ..manifest import Cover, DatasetEntry, ShardRecord
from ..plan import FragmentState
from ..types import Int64Array
from .lineage import apply_rewrites, find_rewrites
from .load import Generation
from .others import Counted, deletions_key, rows_by_group
from .places import Places, split_addresses
from .portion import Portion
from .snapshot import (
    Layout,
    Located,
    Snapshot,
    covered_rows,
    fragments_to_read,
    live_rows_of,
    locate,
    match_row_ids,
    new_remaps,
    placed,
    settle,
)

__all__ = ["Resolution", "column_of", "resolve_generation", "resolve_records"]

LiveOffsets = Mapping[tuple[int, str], Int64Array]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resolution:
    """A generation resolved against a dataset version, and what was learned on the way.

    Parameters
    ----------
    snapshot : Snapshot
        What a search needs.
    column : VectorColumn
        The vector column as it is now.
    records : tuple of ShardRecord
        Shards in order of position; in that of the manifest, where a process answers for a part of them.
    covers : tuple of Cover
        Their covers, with the remaps that hold at this version.
    unsaved_rows : int
        Live rows that were found through a compaction which no record tells of yet.
    live_offsets : dict
        int64 offsets of live rows by fragment and name of its deletions, for the next version to use again.
    rows_by_group : tuple of int
        Rows that can be found, of each group of shards.
    counted : mapping
        What was counted of other groups, for the next version to use again.
    """

    snapshot: Snapshot
    column: VectorColumn
    records: tuple[ShardRecord, ...]
    covers: tuple[Cover, ...]
    unsaved_rows: int
    live_offsets: LiveOffsets
    rows_by_group: tuple[int, ...]
    counted: Counted


def resolve_generation(
    pinned: PinnedDataset,
    generation: Generation,
    *,
    records: Sequence[ShardRecord] | None = None,
    before: Resolution | None = None,
    portion: Portion | None = None,
) -> Resolution:
    """Resolve a generation against a dataset version.

    With a portion, all shards take part all the same, in the order of the manifest: what is covered, and by whom,
    comes out the same for every group.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    generation : Generation
        Its documents.
    records : sequence of ShardRecord, optional
        Its shards in another order than the manifest's, which becomes that of the positions. With a portion those
        that are in RAM, owned or not.
    before : Resolution, optional
        Of an earlier version: what was learned then is not looked up again.
    portion : Portion, optional
        What is answered for; everything by default.

    Raises
    ------
    DatasetChanged
        If the version has no such column, or its vectors have another dimension.
    """
    manifest, found = generation.manifest, generation.found
    held = generation.records if records is None else tuple(records)
    return _resolve(
        pinned,
        manifest.dataset,
        manifest.spec.dim,
        held if portion is None else generation.records,
        own=found.origin == "metadata" and found.pointer.root == pinned.root,
        before=before,
        portion=portion,
        layout=None if portion is None else _layout(generation, held, portion),
    )


def resolve_records(
    pinned: PinnedDataset, built: DatasetEntry, dim: int, records: Sequence[ShardRecord], *, own: bool
) -> Resolution:
    """Resolve shards that no pointer leads to yet, as `resolve_generation` will when one does.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    built : DatasetEntry
        The version and column that the shards were encoded over.
    dim : int
        Dimension of their vectors.
    records : sequence of ShardRecord
        The shards.
    own : bool
        The version is known to be of the dataset that ``built`` tells of: row ids mean the same.

    Raises
    ------
    DatasetChanged
        If the version has no such column, or its vectors have another dimension.
    """
    return _resolve(pinned, built, dim, tuple(records), own=own)


def _resolve(
    pinned: PinnedDataset,
    built: DatasetEntry,
    dim: int,
    records: tuple[ShardRecord, ...],
    *,
    own: bool,
    before: Resolution | None = None,
    portion: Portion | None = None,
    layout: Layout | None = None,
) -> Resolution:
    column = column_of(pinned, built, dim)
    states = pinned.fragments(column)
    covers, since = _known(records, built, before, pinned.version)
    located = locate(covers, states)
    followed, unknown = _follow(pinned, column, located, states, since)
    # A column that was cast, or dropped and written anew, has another field: its values changed, its rows did not.
    if len(unknown) and own and pinned.stable_row_ids and column.field_id == built.field_id:
        followed = Places.join([followed, _by_row_id(pinned, covers, located, followed, unknown, states)])
    # Rows of two shards may have become neighbours, and one run: each cover has its own.
    followed = followed.cut(np.cumsum([cover.physical_rows for cover in covers]))
    _check_followed(pinned, built, dim, column, located, followed)
    live = _live_offsets(pinned, _with_deletions(covers, states, located, followed, layout), before)
    snapshot = settle(covers, states, located, followed, live[0], version=pinned.version, layout=layout)
    remaps = new_remaps(covers, states, located, followed, version=pinned.version)
    covers = tuple(
        cover if remap is None else replace(cover, remap=remap) for cover, remap in zip(covers, remaps, strict=True)
    )
    rows: tuple[int, ...] = (snapshot.live_rows + snapshot.tail_rows,)
    counted: Counted = {}
    if portion is not None:
        places, known = placed(located, followed), {} if before is None else before.counted
        rows, counted = rows_by_group(pinned, portion, records, covers, states, places, snapshot, known)
    return Resolution(
        snapshot=snapshot,
        column=column,
        records=records,
        covers=covers,
        unsaved_rows=_unsaved(records, covers, Places.join([located.mapped, followed]), snapshot, layout),
        live_offsets=live[1],
        rows_by_group=rows,
        counted=counted,
    )


def column_of(pinned: PinnedDataset, built: DatasetEntry, dim: int) -> VectorColumn:
    """Return the column that an index was built over, as it is in a version.

    Raises
    ------
    DatasetChanged
        If the version has no such column, or its vectors have another dimension.
    """
    name = built.column
    try:
        column = pinned.find_column(name, built.field_id, dim)
    except (UnknownColumn, UnsupportedColumn, InsufficientData) as exc:
        raise DatasetChanged(
            f"dataset version {pinned.version} has no vector column {name!r}, over which the index was built",
            remedy="Open the dataset at a version that has it, or index the column that took its place",
            fragments=(),
        ) from exc
    if column.dim != dim:
        raise _other_dimension(pinned, column, dim)
    return column


def _other_dimension(pinned: PinnedDataset, column: VectorColumn, dim: int) -> DatasetChanged:
    return DatasetChanged(
        f"column {column.name!r} of dataset version {pinned.version} holds vectors of dimension {column.dim},"
        f" the index was built over {dim}",
        remedy="Build the index again with create_index(..., replace=True)",
        fragments=(),
    )


def _check_followed(
    pinned: PinnedDataset, built: DatasetEntry, dim: int, column: VectorColumn, located: Located, followed: Places
) -> None:
    """Check that a column without one indexed row can be the one that was indexed.

    Raises
    ------
    DatasetChanged
        If it has another name, as an overwrite deals field ids anew; or lists of another length.
    """
    if len(located.direct) or len(located.mapped) or len(followed):
        return
    if column.odd_is_null:
        with suppress(InsufficientData):  # no list tells
            now = pinned.vector_column(column.name)
            if now.dim != column.dim:
                raise _other_dimension(pinned, now, dim)
    if column.name == built.column:
        return
    raise DatasetChanged(
        f"dataset version {pinned.version} has no column {built.column!r}, over which the index was built;"
        f" column {column.name!r} has its field id, but none of its rows",
        remedy="Open the dataset at a version that has it, or index the column that took its place",
        fragments=(),
    )


def _known(
    records: Sequence[ShardRecord], built: DatasetEntry, before: Resolution | None, version: int
) -> tuple[tuple[Cover, ...], int]:
    """Return the covers with all that is known of compactions, and the version at which they were true."""
    if before is None or before.snapshot.version > version:
        return tuple(record.cover for record in records), built.version
    learned = {record.index.name: cover for record, cover in zip(before.records, before.covers, strict=True)}
    covers = tuple(_newer(record.cover, learned.get(record.index.name)) for record in records)
    # A generation's own covers were true at its version, those that were learned at the version before this one.
    everything = all(record.index.name in learned for record in records)
    since = built.version
    return covers, max(since, before.snapshot.version) if everything else since


def _newer(stored: Cover, learned: Cover | None) -> Cover:
    """Return a cover with the later one of two remaps."""
    if learned is None or replace(learned, remap=None) != replace(stored, remap=None) or learned.remap is None:
        return stored
    older = stored.remap is not None and stored.remap.version >= learned.remap.version
    return stored if older else replace(stored, remap=learned.remap)


def _follow(
    pinned: PinnedDataset, column: VectorColumn, located: Located, states: Sequence[FragmentState], since: int
) -> tuple[Places, Places]:
    """Return lost rows that compactions moved into fragments of this version, and those that nothing is known of."""
    nowhere = Places.of([])
    present = {state.fragment_id: state for state in states}
    gone = {i: signature for i, signature in located.signatures.items() if i not in present}
    covered = set(located.direct.fragment_ids.tolist())
    if not gone or all(i in covered for i in present):
        return nowhere, nowhere
    lost = located.lost.in_fragments(gone)
    if pinned.version <= since:
        return nowhere, lost
    rewrites, unknown = find_rewrites(gone, present, DatasetHistory(pinned, column), since=since, until=pinned.version)
    moved, targets = apply_rewrites(lost, gone, rewrites)
    arrived = [i for i, state in targets.items() if i in present and present[i].signature == state.signature]
    return moved.in_fragments(arrived), moved.in_fragments(unknown)


def _by_row_id(
    pinned: PinnedDataset,
    covers: Sequence[Cover],
    located: Located,
    followed: Places,
    unknown: Places,
    states: Sequence[FragmentState],
) -> Places:
    """Return places of rows that can be found by their stable row ids alone."""
    origins = {fragment.fragment_id for cover in covers for fragment in cover.fragments}
    taken = {int(i) for part in (located.direct, located.mapped, followed) for i in np.unique(part.fragment_ids)}
    strange = [s.fragment_id for s in states if s.live_rows and s.fragment_id not in origins | taken]
    if not strange:
        return Places.of([])
    row_ids, addresses, updated = pinned.row_versions(strange)
    fragment_ids, offsets = split_addresses(addresses)
    found, base = [], 0
    # One cover at a time: what is held meanwhile does not grow with the index.
    for cover, lost in zip(covers, unknown.parts([cover.physical_rows for cover in covers]), strict=True):
        if len(lost):
            missing = np.zeros(cover.physical_rows, dtype=bool)
            lost.mark(missing, {})
            found.append(match_row_ids([cover], missing, row_ids, fragment_ids, offsets, updated).shifted(base))
        base += cover.physical_rows
    return Places.join(found)


def _layout(generation: Generation, held: Sequence[ShardRecord], portion: Portion) -> Layout:
    ordinals = {record.index.name: ordinal for ordinal, record in enumerate(generation.records)}
    return Layout(
        held=tuple(ordinals[record.index.name] for record in held),
        owned=frozenset(ordinals[record.index.name] for record in held if portion.owns(record)),
        owns_fragment=portion.owns_fragment,
    )


def _with_deletions(
    covers: Sequence[Cover], states: Sequence[FragmentState], located: Located, followed: Places, layout: Layout | None
) -> list[FragmentState]:
    """Return the fragments whose deletions tell which of the rows answered for are live, or tail."""
    wanted = set(fragments_to_read(states, located.direct, located.mapped, followed))
    if layout is not None:
        everywhere = placed(located, followed)
        mine = set(layout.laid_out(everywhere, covers).fragment_ids.tolist())
        covered = covered_rows(everywhere)
        partial = {s.fragment_id for s in states if 0 < covered.get(s.fragment_id, 0) < s.physical_rows}
        wanted &= mine | {fragment_id for fragment_id in partial if layout.owns_fragment(fragment_id)}
    return [state for state in states if state.fragment_id in wanted]


def _live_offsets(
    pinned: PinnedDataset, states: Sequence[FragmentState], before: Resolution | None
) -> tuple[dict[int, Int64Array], LiveOffsets]:
    held = {} if before is None else before.live_offsets
    keys = {state.fragment_id: (state.fragment_id, deletions_key(state)) for state in states}
    read = pinned.live_offsets_of([i for i, key in keys.items() if key not in held])
    live = {i: read[i] if i in read else held[key] for i, key in keys.items()}
    return live, {key: live[i] for i, key in keys.items()}


def _unsaved(
    records: Sequence[ShardRecord],
    covers: Sequence[Cover],
    moved: Places,
    snapshot: Snapshot,
    layout: Layout | None,
) -> int:
    if layout is not None:
        moved = layout.laid_out(moved, covers)
        records, covers = [records[i] for i in layout.held], [covers[i] for i in layout.held]
    rows = base = 0
    for record, cover in zip(records, covers, strict=True):
        end = base + cover.physical_rows
        if cover.remap is not None and cover.remap != record.cover.remap:
            mine = moved.select((moved.positions >= base) & (moved.positions < end))
            rows += live_rows_of(mine, snapshot.live)
        base = end
    return rows
