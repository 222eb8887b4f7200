"""Fill a clone of the model with the vectors of one shard, at their positions.

IVF lists take explicit ids, so a skipped row simply leaves a gap. Flat codes, graphs and refine
stores number rows themselves and get a filler there; searches mask it.
"""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

from ..types import Float32Array, Int64Array
from .factory import inner_index, ivf_of, owned
from .model import Model, limit_tables

__all__ = ["ShardEncoder", "code_rows", "code_table", "copy_index"]

# Of every 16th block so many rows go into the shard's training error: about 1 % of all.
_ERROR_BLOCKS = 16
_ERROR_ROWS = 1024

# Rows whose codes are made before they go to their places; those of a whole block would be as large as the block.
_CODED_ROWS = 4_096

# Rows that fillers of a graph are copied from, in turn.
_FILLER_ROWS = 1024


class ShardEncoder:
    """Encodes the rows of one shard, block after block, in order of position.

    Parameters
    ----------
    model : Model
        Trained, empty index; not changed.
    physical_rows : int
        Positions of the shard, skipped ones included.
    """

    def __init__(self, model: Model, physical_rows: int) -> None:
        limit_tables()
        self.model = model
        self.physical_rows = physical_rows
        self.base = copy_index(model.base)
        self.refine = None if model.refine is None else copy_index(model.refine)
        self._family = model.capability.family
        self._base_codes = _allocate_codes(self.base, physical_rows) if self._family == "flat" else None
        self._refine_codes = None if self.refine is None else _allocate_codes(self.refine, physical_rows)
        self._next_position = 0
        self._filler: Float32Array = np.zeros((1, model.spec.dim), dtype=np.float32)
        self._squared_error = 0.0
        self._error_rows = 0
        self._blocks = 0
        self.indexed_rows = 0

    def add(self, positions: Int64Array, vectors: Float32Array) -> None:
        """Encode one block.

        Parameters
        ----------
        positions : numpy.ndarray
            int64 ``(n,)``, increasing, after those of the block before.
        vectors : numpy.ndarray
            float32 ``(n, dim)``, prepared, every one usable.
        """
        if not len(positions):
            return
        if self._family == "ivf":
            self.base.add_with_ids(vectors, positions)
        elif self._family == "flat":
            code_rows(self.base, self._base_codes, positions, vectors)
        else:
            self._add_to_graph(positions, vectors)
        if self.refine is not None:
            code_rows(self.refine, self._refine_codes, positions, vectors)
        self.indexed_rows += len(positions)
        self._measure(vectors)

    def finish(self) -> None:
        """Fill what is left after the last row; the shard can be written or searched now."""
        if self._family == "hnsw":
            self._fill_graph(self.physical_rows)

    @property
    def training_error(self) -> float | None:
        """Mean squared distance of this shard's rows to their centroids, on a sample."""
        return self._squared_error / self._error_rows if self._error_rows else None

    @property
    def largest_list_rows(self) -> int | None:
        """Rows in the fullest IVF list; None without lists."""
        sizes = self.list_sizes()
        return None if sizes is None else int(sizes.max(initial=0))

    def list_sizes(self) -> Int64Array | None:
        """Rows in each IVF list, int64 ``(num_partitions,)``; None without lists."""
        return list_sizes(self.base)

    def _add_to_graph(self, positions: Int64Array, vectors: Float32Array) -> None:
        # Fillers repeat rows of this block in turn: copies of one vector would crowd its
        # neighbourhood and cut it off from the graph.
        self._filler = vectors[:_FILLER_ROWS].copy()
        start = 0
        gaps = np.flatnonzero(np.diff(positions) > 1) + 1
        for stop in (*gaps.tolist(), len(positions)):
            self._fill_graph(int(positions[start]))
            self.base.add(vectors[start:stop])
            self._next_position = int(positions[stop - 1]) + 1
            start = stop

    def _fill_graph(self, until: int) -> None:
        while self._next_position < until:  # in pieces: a gap may be a million rows long
            count = min(until - self._next_position, len(self._filler))
            self.base.add(self._filler[:count])
            self._next_position += count

    def _measure(self, vectors: Float32Array) -> None:
        self._blocks += 1
        if self._blocks % _ERROR_BLOCKS != 1:
            return
        some = vectors[:_ERROR_ROWS]
        error = self.model.coarse_error(some)
        if error is not None:
            self._squared_error += error * len(some)
            self._error_rows += len(some)


def copy_index(index: Any) -> Any:
    """Return an independent copy without tables for searches; through bytes, as `clone_index` lacks some classes."""
    return owned(faiss.deserialize_index(faiss.serialize_index(index), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE))


def code_rows(store: Any, codes: Any, positions: Int64Array, vectors: Float32Array) -> None:
    """Encode vectors straight into a store's preallocated code table."""
    for start in range(0, len(positions), _CODED_ROWS):
        part = slice(start, start + _CODED_ROWS)
        codes[positions[part]] = store.sa_encode(np.ascontiguousarray(vectors[part]))


def list_sizes(index: Any) -> Int64Array | None:
    """Rows in each IVF list of an index; None without lists."""
    ivf = ivf_of(index)
    if ivf is None:
        return None
    lists = ivf.invlists
    return np.array([lists.list_size(i) for i in range(int(ivf.nlist))], dtype=np.int64)


def code_table(store: Any) -> Any:
    """Return the code table of a flat store as a writable view, uint8 ``(rows, code_bytes)``."""
    table = inner_index(store)
    rows, code_bytes = int(table.ntotal), int(table.sa_code_size())
    if not rows:
        return np.empty((0, code_bytes), dtype=np.uint8)
    return faiss.rev_swig_ptr(table.codes.data(), rows * code_bytes).reshape(rows, code_bytes)


def _allocate_codes(store: Any, rows: int) -> Any:
    """Size a flat code table once, so that it never doubles, and return a writable view of it."""
    table = inner_index(store)
    table.codes.resize(rows * int(table.sa_code_size()))
    table.ntotal = store.ntotal = rows
    view = code_table(store)
    view[:] = 0
    return view
