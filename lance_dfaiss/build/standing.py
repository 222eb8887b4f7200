"""How what was built stands at the newest version of its dataset, which did not wait for it.

What a search of the index will find is decided by what every reader decides with: `resolve`. A commit writes down what
that found out about compactions, and is refused only where hardly anything was found. Readers never give a wrong
answer; but an index that leaves nearly all of the rows to be compared one by one is none.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..errors import DatasetChanged, DfaissError, InvalidArgument, StorageError
from ..lance_io import PinnedDataset, VectorColumn
from ..manifest import BuildPlan, Cover, DatasetEntry, ShardRecord
from ..plan import FragmentState
from ..search.resolve import Resolution, column_of, resolve_records
from ..search.snapshot import Snapshot, deletions_to_read, locate, revived_fragments
from ..search.tail import MAX_TAIL_BYTES, MAX_TAIL_ROWS
from .commit import mapped_records

__all__ = [
    "Standing",
    "check_handle_is_new",
    "is_of_use",
    "lost_fragments",
    "removal_told",
    "revived_in",
    "stand",
]

_log = logging.getLogger(__name__)

# An index that finds less than a tenth of what it could is refused: nearly every search would be over the tail alone.
_USEFUL_SHARE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How the shards of a build stand at the newest version of the dataset.

    Parameters
    ----------
    dataset : DatasetEntry
        That version, and the column as it is there.
    records : tuple of ShardRecord
        All shards, with what is known of compactions.
    unwritten : tuple of ShardRecord
        Those of them that compactions moved: their records are new.
    mapped_rows, tail_rows : int
        Rows that were found through a compaction, and rows of the version that are not in the index.
    """

    dataset: DatasetEntry
    records: tuple[ShardRecord, ...]
    unwritten: tuple[ShardRecord, ...]
    mapped_rows: int
    tail_rows: int

    def tell(self, name: str, built: int, dim: int) -> None:
        """Log what became of rows since a version, if it is worth knowing.

        Parameters
        ----------
        name : str
            Of the index.
        built : int
            Version that was encoded.
        dim : int
            Of the vectors.
        """
        if self.mapped_rows:
            _log.info("index %r: %d rows were moved by compactions while it was built", name, self.mapped_rows)
        if not self.tail_rows:
            return
        too_many = self.tail_rows > MAX_TAIL_ROWS or self.tail_rows * dim * 4 > MAX_TAIL_BYTES
        _log.warning(
            "index %r does not cover %d rows that were added, written anew or restored since version %d, while it was"
            " built: searches compare them one by one until update_index has indexed them%s",
            name,
            self.tail_rows,
            built,
            ", and refuse to by default, as they are that many" if too_many else "",
        )


def stand(
    records: Sequence[ShardRecord],
    built: DatasetEntry,
    dim: int,
    newest: PinnedDataset,
    generation: str,
    *,
    inside: bool,
) -> Standing:
    """Find out how finished shards stand at the newest version.

    Parameters
    ----------
    records : sequence of ShardRecord
        All shards, in order.
    built : DatasetEntry
        Version and column that they were encoded over.
    dim : int
        Dimension of their vectors.
    newest : PinnedDataset
        The newest version.
    generation : str
        Theirs.
    inside : bool
        The shards lie in the dataset's own folder, and so would not be there any more if it had been deleted.

    Raises
    ------
    DatasetChanged
        If the column is gone, or hardly a row is there as it was encoded; names the fragments.
    """
    covers = [record.cover for record in records]
    column = column_of(newest, built, dim)
    states = newest.fragments(column)
    located = locate(covers, states)
    dataset = replace(
        built,
        version=newest.version,
        column=column.name,
        field_id=column.field_id,
        value_type=column.type.value_type,
    )
    if not located.signatures and not revived_in(newest, covers, states):
        # All fragments are there as they were, and what was appended can be counted without a byte per row in RAM.
        covered = {fragment.fragment_id for cover in covers for fragment in cover.fragments}
        tail = sum(state.live_rows for state in states if state.fragment_id not in covered)
        return Standing(dataset=dataset, records=tuple(records), unwritten=(), mapped_rows=0, tail_rows=tail)
    own = inside or len(located.direct) > 0 or _has_built(newest, built, dim, covers)
    resolution = resolve_records(newest, built, dim, records, own=own)
    if located.signatures and not is_of_use(resolution.snapshot):
        raise _changed(newest, built, resolution, lost_fragments(covers, resolution.snapshot, located.signatures))
    mapped = mapped_records(resolution.records, resolution.covers, generation)
    return Standing(
        dataset=dataset,
        records=tuple(mapped),
        unwritten=tuple(new for new, old in zip(mapped, records, strict=True) if new is not old),
        mapped_rows=resolution.snapshot.mapped_rows,
        tail_rows=resolution.snapshot.tail_rows,
    )


def is_of_use(snapshot: Snapshot) -> bool:
    """Tell whether an index finds enough of the rows that it was built over, as far as there still are so many."""
    could = min(snapshot.indexed_rows, snapshot.live_rows + snapshot.tail_rows)
    return snapshot.live_rows * _USEFUL_SHARE >= could


def lost_fragments(covers: Sequence[Cover], snapshot: Snapshot, moved: Collection[int]) -> list[int]:
    """Return those of some fragments that shards were encoded from of which no row can be found."""
    found, first = set(), 0
    for cover in covers:
        for fragment in cover.fragments:
            start = first + fragment.first_position
            if snapshot.live[start : start + fragment.positions].any():
                found.add(fragment.fragment_id)
        first += cover.physical_rows
    return sorted(set(moved) - found)


def revived_in(pinned: PinnedDataset, covers: Sequence[Cover], states: Sequence[FragmentState]) -> list[int]:
    """Return the fragments with rows that the shards found deleted, and that are live in a version."""
    if not any(len(cover.deleted) for cover in covers):
        return []
    live = {i: pinned.live_offsets(i) for i in deletions_to_read(covers, states)}
    return revived_fragments(covers, states, live)


def check_handle_is_new(plan: BuildPlan, newest: PinnedDataset, column: VectorColumn) -> None:
    """Refuse to build over a version that is out of date before the work has begun.

    Parameters
    ----------
    plan : BuildPlan
        What is going to be built.
    newest : PinnedDataset
        The newest version.
    column : VectorColumn
        The column at the plan's version.

    Raises
    ------
    DatasetChanged
        If there are rows by now that the index would not cover; names their fragments, or those that are gone.
    """
    now = {state.fragment_id: state for state in newest.fragments(newest.vector_column(column.name))}
    planned = {cover.fragment_id: cover for task in plan.tasks for cover in task.fragments}
    changed = {i for i, cover in planned.items() if i in now and now[i].signature != cover.signature}
    gone = {i for i in planned if i not in now}
    added = sorted(set(now) - set(planned))
    if not changed and not added:
        return
    # Fragments that are gone for nothing had their rows deleted; otherwise these may be in what is new.
    named = sorted(changed | gone) or added
    what = "has rows in" if named == added else "rewrote, compacted or restored"
    raise DatasetChanged(
        f"the dataset handle is at version {plan.dataset.version}, and the newest version, {newest.version}, {what}"
        f" fragments {_named(named)}: the index would not cover all rows",
        remedy="Call checkout_latest() on the handle first; if it was the newest when it was passed, call again",
        fragments=tuple(named),
    )


@contextmanager
def removal_told(plan: BuildPlan, pinned: PinnedDataset, column: VectorColumn) -> Iterator[None]:
    """Tell of a version that was cleaned up while it was read, instead of the file that is not there.

    Parameters
    ----------
    plan : BuildPlan
        What is built.
    pinned : PinnedDataset
        The version that is read.
    column : VectorColumn
        Its column.

    Raises
    ------
    DatasetChanged
        Where the block failed for the store, and fragments of the plan went with their version; names them.
    """
    try:
        yield
    except StorageError as failure:
        try:
            gone = _removed(plan, pinned, column)
        except DfaissError as doubt:
            _log.warning("index %r: could not find out whether the dataset changed: %s", plan.name, doubt)
            gone = []
        if not gone:
            raise
        raise DatasetChanged(
            f"version {pinned.version} of {pinned.uri} was cleaned up while its rows were being indexed, and the newest"
            f" version does not have its fragments {_named(gone)} any more",
            remedy="Run it again on the newest version; clean up only versions that are older than a run takes",
            fragments=tuple(gone),
        ) from failure


def _removed(plan: BuildPlan, pinned: PinnedDataset, column: VectorColumn) -> list[int]:
    newest = pinned.latest()
    try:
        newest.at_version(pinned.version)
    except InvalidArgument:
        there = {state.fragment_id: state.signature for state in newest.fragments(column)}
        planned = {cover.fragment_id: cover.signature for task in plan.tasks for cover in task.fragments}
        return sorted(i for i, signature in planned.items() if there.get(i) != signature)
    return []


def _has_built(newest: PinnedDataset, built: DatasetEntry, dim: int, covers: Sequence[Cover]) -> bool:
    """Tell whether a dataset still has the version that was built over.

    One that was deleted and written anew in the same place deals row ids and versions from the beginning: by
    these alone its rows would be taken for the old ones.
    """
    try:
        then = newest.at_version(built.version)
        return not locate(covers, then.fragments(column_of(then, built, dim))).signatures
    except (InvalidArgument, DatasetChanged):
        return False


def _changed(
    newest: PinnedDataset, built: DatasetEntry, resolution: Resolution, fragments: Sequence[int]
) -> DatasetChanged:
    snapshot = resolution.snapshot
    return DatasetChanged(
        f"of {snapshot.indexed_rows:,} rows that were encoded over version {built.version} of {newest.uri},"
        f" {snapshot.live_rows:,} are left in version {newest.version}: fragments {_named(fragments)} were written"
        " anew, restored, or compacted where that cannot be followed, and their rows would have to be encoded again",
        remedy="Run create_index again on the newest version; clean up only versions that are older than a build"
        " takes, and keep updates of the vector column for afterwards",
        fragments=tuple(fragments),
    )


def _named(fragments: Sequence[int]) -> str:
    more = f" and {len(fragments) - 10:,} more" if len(fragments) > 10 else ""
    return ", ".join(map(str, fragments[:10])) + more
