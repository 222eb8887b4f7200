"""The rows of a version that no shard covers, in RAM as one exact segment."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..engine import Model, Segment, flat_segment, prepare
from ..errors import InvalidArgument, TailTooLarge
from ..lance_io import PinnedDataset, VectorColumn
from ..manifest import FragmentSignature
from ..types import Float32Array, Int64Array, Metric, UInt64Array
from .places import row_addresses
from .snapshot import TailFragment

__all__ = ["MAX_TAIL_BYTES", "MAX_TAIL_ROWS", "Tail", "TailLimits", "TailRows"]

_log = logging.getLogger(__name__)

MAX_TAIL_ROWS = 1_000_000
MAX_TAIL_BYTES = 2 * 1024**3
"""What a search reads beside the index unless told otherwise: seconds, the first time, and some tens of
milliseconds a query from then on."""

# Reading this many rows takes about as long as a slow search: from here on it is worth a warning.
_WARN_ROWS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TailLimits:
    """How much may be read into RAM beside the index.

    Parameters
    ----------
    rows : int
        Rows.
    length_bytes : int
        Bytes of their vectors as float32.
    """

    rows: int = MAX_TAIL_ROWS
    length_bytes: int = MAX_TAIL_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class TailRows:
    """The tail, loaded.

    Parameters
    ----------
    segment : Segment or None
        Exact search over the usable rows; None if there are none.
    row_ids, addresses : numpy.ndarray
        uint64 ``(n,)``, of the rows of the segment.
    """

    segment: Segment | None
    row_ids: UInt64Array
    addresses: UInt64Array

    @property
    def rows(self) -> int:
        """Rows that can be found."""
        return len(self.row_ids)

    def places(self, row_ids: UInt64Array) -> Int64Array:
        """Return where rows are, int64 ``(n,)``.

        Raises
        ------
        InvalidArgument
            If one is not here.
        """
        places = np.minimum(np.searchsorted(self.row_ids, row_ids), max(self.rows - 1, 0))
        known = self.row_ids[places] == row_ids if self.rows else np.zeros(len(row_ids), dtype=bool)
        if not known.all():
            row = int(row_ids[~known][0])
            raise InvalidArgument(
                f"row {row} is not in this index", remedy="It was deleted or skipped", parameter="row_ids", value=row
            )
        return places


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What was read of one fragment: usable rows, and all that were asked for.

    Vectors are held once, in the segment that they became part of, at ``places``; before that in ``fresh``.
    """

    asked: Int64Array
    offsets: Int64Array
    row_ids: UInt64Array
    fresh: Float32Array | None = None
    segment: Segment | None = None
    places: Int64Array | None = None

    @property
    def vectors(self) -> Float32Array:
        """Vectors of the usable rows, float32 ``(n, dim)``."""
        if self.fresh is not None:
            return self.fresh
        assert self.segment is not None
        assert self.places is not None
        return self.segment.reconstruct(self.places)

    def only(self, wanted: Int64Array) -> _Read:
        """Return what was read without the rows that are not wanted."""
        kept = np.isin(self.offsets, wanted)
        return _Read(wanted, self.offsets[kept], self.row_ids[kept], self.vectors[kept])

    def settled(self, segment: Segment, places: Int64Array) -> _Read:
        """Return what was read, with its vectors in a segment."""
        return _Read(self.asked, self.offsets, self.row_ids, None, segment, places)


class Tail:
    """The tail of one version, read when it is first searched; safe to use from many threads.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    column : VectorColumn
        What to read.
    metric : str
        Of the index.
    fragments : sequence of TailFragment
        From the snapshot.
    limits : TailLimits
        What may be read.
    name : str
        Of the index, for messages.
    before : Tail, optional
        Of an earlier version: what it has read is not read again.
    """

    def __init__(
        self,
        pinned: PinnedDataset,
        column: VectorColumn,
        metric: Metric,
        fragments: Sequence[TailFragment],
        limits: TailLimits,
        *,
        name: str,
        before: Tail | None = None,
    ) -> None:
        self._pinned = pinned
        self._column = column
        self._metric = metric
        self._fragments = fragments
        self._limits = limits
        self._name = name
        self._lock = threading.Lock()
        self._loaded: TailRows | None = None
        wanted = {(fragment.fragment_id, fragment.state.signature) for fragment in fragments}
        # Only what is of use again: the rest would stay in RAM for as long as nobody searches this tail.
        held = {} if before is None else before._read
        self._read: Mapping[tuple[int, FragmentSignature], _Read] = {k: v for k, v in held.items() if k in wanted}
        self.rows = sum(fragment.rows for fragment in fragments)

    def load(self, model: Model) -> TailRows:
        """Return the tail, reading it first if need be.

        Raises
        ------
        TailTooLarge
            If it is over the limits; names `update_index`.
        """
        loaded = self._loaded
        if loaded is None:
            with self._lock:
                loaded = self._loaded
                if loaded is None:
                    self._check()
                    loaded = self._loaded = self._load(model)
        return loaded

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has nothing to read."""
        return self._loaded is not None

    @property
    def ram_bytes(self) -> int:
        """Bytes of what was read."""
        loaded = self._loaded
        segments = {id(part.segment): part.segment for part in self._read.values() if part.segment is not None}
        if loaded is not None and loaded.segment is not None:
            segments[id(loaded.segment)] = loaded.segment
        rows = sum(part.asked.nbytes + part.offsets.nbytes + part.row_ids.nbytes for part in self._read.values())
        ids = 0 if loaded is None else loaded.row_ids.nbytes + loaded.addresses.nbytes
        return sum(segment.ram_bytes for segment in segments.values()) + rows + ids

    def _check(self) -> None:
        length_bytes = self.rows * self._column.dim * 4
        if self.rows > self._limits.rows or length_bytes > self._limits.length_bytes:
            raise TailTooLarge(
                f"{self.rows:,} rows ({length_bytes:,} bytes) are not in index {self._name!r}; a search reads at most"
                f" {self._limits.rows:,} rows and {self._limits.length_bytes:,} bytes beside it",
                remedy="Run update_index; or search with include_tail=False, or open the index with a larger"
                " max_tail_rows and max_tail_bytes",
                rows=self.rows,
                limit=self._limits.rows,
            )
        if self.rows >= _WARN_ROWS:
            _log.warning(
                "index %r: %d rows are searched one by one, update_index would index them", self._name, self.rows
            )

    def _load(self, model: Model) -> TailRows:
        read = {(f.fragment_id, f.state.signature): self._of_fragment(f) for f in self._fragments}
        counts = [len(part.offsets) for part in read.values()]
        if not sum(counts):
            self._read = {}
            empty = np.empty(0, dtype=np.uint64)
            return TailRows(None, empty, empty)
        row_ids = np.concatenate([part.row_ids for part in read.values()])
        offsets = np.concatenate([part.offsets for part in read.values()])
        fragment_ids = np.repeat(np.array([fragment_id for fragment_id, _ in read], dtype=np.int64), counts)
        # Ties go by row id, and FAISS keeps the first of them when it cuts at k: rows stand in that order.
        order = np.argsort(row_ids, kind="stable")
        vectors = np.concatenate([part.vectors for part in read.values()])
        segment = flat_segment(model, vectors if (order[1:] > order[:-1]).all() else vectors[order])
        places = np.argsort(order, kind="stable")
        ends = np.cumsum(counts)
        self._read = {
            key: part.settled(segment, places[end - count : end])
            for (key, part), count, end in zip(read.items(), counts, ends.tolist(), strict=True)
        }
        return TailRows(segment, row_ids[order], row_addresses(fragment_ids, offsets)[order])

    def _of_fragment(self, fragment: TailFragment) -> _Read:
        held = self._read.get((fragment.fragment_id, fragment.state.signature))
        wanted = fragment.offsets
        if wanted is None and (held is not None or fragment.state.deleted_rows):
            wanted = self._pinned.live_offsets(fragment.fragment_id)
        if held is not None and wanted is not None and np.isin(wanted, held.asked).all():
            return held if len(wanted) == len(held.asked) else held.only(wanted)
        return self._from_dataset(fragment, wanted)

    def _from_dataset(self, fragment: TailFragment, wanted: Int64Array | None) -> _Read:
        offsets, row_ids, vectors = [], [], []
        for block in self._pinned.rows(self._column, fragment.fragment_id, fragment.offsets, self._metric):
            usable = np.isin(block.row_offsets, block.offsets)
            offsets.append(block.offsets)
            row_ids.append(block.row_ids[usable])
            # A copy: the block is a view of the scanner's memory.
            vectors.append(prepare(block.vectors.copy(), self._metric))
        asked = np.arange(fragment.state.physical_rows) if wanted is None else wanted
        if not offsets:
            none = np.empty(0, np.int64)
            return _Read(asked, none, none.astype(np.uint64), np.empty((0, self._column.dim), np.float32))
        return _Read(asked, np.concatenate(offsets), np.concatenate(row_ids), np.concatenate(vectors))
