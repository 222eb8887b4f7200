"""One task of `optimize_index`: lay the encoded rows of several shards into a new one, over the fragments of today."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import engine
from ..manifest import Cover, ShardRecord, ShardTask
from ..progress import PhaseMeter
from ..search.places import Places, RunMap
from ..storage import Store
from ..types import Int64Array
from .encode import write_shard
from .rowbook import RowBook
from .runner import TaskStopped

__all__ = ["MoveJob", "Source", "places_within"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A shard whose rows are moved.

    Parameters
    ----------
    record : ShardRecord
        Where its files are, and what it covers.
    first_position : int
        Of the shard, among the positions of the index.
    places : Places
        Live rows that it covers, with or without an entry, by position of the index.
    """

    record: ShardRecord
    first_position: int
    places: Places


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MoveJob:
    """Everything the tasks of one rearrangement share; call it with a task.

    At any time there are the model, the new shard and one source in RAM.

    Parameters
    ----------
    generation : str
        Where the new shards go.
    model : Model
        Of old and new shards.
    store : Store
        Where generations lie.
    sources : sequence of Source
        The old shards.
    live : numpy.ndarray
        bool ``(positions,)``, over the whole index: rows with an entry that a search can return.
    stable : bool
        Whether rows have ids that stay.
    meter : PhaseMeter
        Told of rows and bytes.
    """

    generation: str
    model: engine.Model
    store: Store
    sources: Sequence[Source]
    live: NDArray[np.bool_]
    stable: bool
    meter: PhaseMeter
    stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """Make running tasks end before their next source."""
        self.stopped.set()

    def __call__(self, task: ShardTask) -> ShardRecord:
        """Move what the old shards hold of the task's fragments, and write the new shard, its record last."""
        rows = _MovedRows(task, stable=self.stable)
        encoder = engine.rearrange(self.model, self._moved(task, rows), task.physical_rows)
        record = write_shard(
            encoder,
            self.store,
            generation=self.generation,
            ordinal=task.ordinal,
            cover=rows.cover(),
            skipped=rows.skipped(),
            training_error=rows.training_error,
            check=None,
        )
        self.meter.add(task.physical_rows - encoder.indexed_rows, sum(entry.length_bytes for entry in record.files))
        return record

    def _moved(self, task: ShardTask, rows: _MovedRows) -> Iterator[tuple[Any, Any | None, Int64Array]]:
        """Book what each source has of a task, and load those that have an entry of it."""
        for source in self.sources:
            if self.stopped.is_set():
                raise TaskStopped
            old, fragment_ids, offsets = source.places.in_fragments(task.fragment_ids).expanded()
            entries = self.live[old]
            targets = rows.book(source.record, old - source.first_position, fragment_ids, offsets, entries)
            moved = int(np.count_nonzero(entries))
            if moved:
                record, size = source.record, source.record.cover.physical_rows
                # No variable keeps the shard: it would be held here while the next one is read.
                yield (
                    *engine.load_shard(self.store, self.model, record.index, record.refine, physical_rows=size),
                    targets,
                )
                self.meter.add(moved, sum(part.length_bytes for part in (record.index, record.refine) if part))


class _MovedRows(RowBook):
    """The account of a new shard to which rows of others are moved."""

    def __init__(self, task: ShardTask, *, stable: bool) -> None:
        super().__init__(task, stable=stable)
        order = np.argsort(np.array(task.fragment_ids, dtype=np.int64))
        self._ids = np.array(task.fragment_ids, dtype=np.int64)[order]
        self._firsts = np.array([f.first_position for f in task.fragments], dtype=np.int64)[order]
        self._errors: list[tuple[float, int]] = []

    def book(
        self,
        record: ShardRecord,
        old: Int64Array,
        fragment_ids: Int64Array,
        offsets: Int64Array,
        entries: NDArray[np.bool_],
    ) -> Int64Array:
        """Enter rows of a source.

        Parameters
        ----------
        record : ShardRecord
            The source.
        old, fragment_ids, offsets : numpy.ndarray
            int64 ``(n,)``: its positions, and where their rows are.
        entries : numpy.ndarray
            bool ``(n,)``: whether they have an entry.

        Returns
        -------
        numpy.ndarray
            int64 ``(positions of the source,)``: where each one's entry goes, -1 for nowhere.
        """
        new = self._firsts[np.searchsorted(self._ids, fragment_ids)] + offsets
        self.covered[new] = True
        self.indexed[new[entries]] = True
        self._count(record, int(np.count_nonzero(~entries)))
        if record.training_error is not None:
            self._errors.append((record.training_error, int(np.count_nonzero(entries))))
        if self.stable:
            self._carry(record.cover, old, new)
        targets = np.full(record.cover.physical_rows, -1, dtype=np.int64)
        targets[old[entries]] = new[entries]
        return targets

    def _count(self, record: ShardRecord, rows: int) -> None:
        """Count rows without an entry; of several reasons, the record does not say which row has which."""
        null = min(rows, record.skipped.null)
        non_finite = min(rows - null, record.skipped.non_finite)
        self.null += null
        self.non_finite += non_finite
        self.zero += rows - null - non_finite

    def _carry(self, cover: Cover, old: Int64Array, new: Int64Array) -> None:
        """Carry row ids, and the versions that wrote the rows, over to the new positions."""
        if cover.row_ids is not None:
            runs = cover.row_ids.rows
            ids = RunMap(runs[:, 0].astype(np.int64), runs[:, 1].copy(), runs[:, 2].astype(np.int64)).numbers(old)
            self.add_ids(new, ids)
        if cover.updated is not None and len(cover.updated):
            starts, values, lengths = cover.updated.rows.astype(np.int64).T
            at = np.maximum(np.searchsorted(starts, old, side="right") - 1, 0)
            known = (old >= starts[at]) & (old < starts[at] + lengths[at])
            self.add_versions(new[known], values[at[known]].astype(np.uint64))

    @property
    def training_error(self) -> float | None:
        """Mean of the sources', by the rows that each gave."""
        rows = sum(count for _, count in self._errors)
        return sum(error * count for error, count in self._errors) / rows if rows else None


def places_within(places: Places, first: int, end: int) -> Places:
    """Return the rows of some positions, from ``first`` up to but without ``end``."""
    starts = np.maximum(places.positions, first)
    ends = np.minimum(places.positions + places.lengths, end)
    inside = starts < ends
    ahead = (starts - places.positions)[inside]
    return Places(starts[inside], places.fragment_ids[inside], places.offsets[inside] + ahead, (ends - starts)[inside])
