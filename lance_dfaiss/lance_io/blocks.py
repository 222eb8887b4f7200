"""Rows as they stream out of a scan, and the choice of a sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa

from ..types import ROW_ID_COLUMN, Float32Array, Int64Array, Metric, UInt64Array
from ..vectors import decode_vectors
from .fields import (
    ADDRESS_COLUMN,
    OFFSET_MASK,
    UPDATED_COLUMN,
    VectorColumn,
)

__all__ = ["Block", "Sample", "SampleBlocks", "decode_batch", "only_rows"]

# A sample block is about one object-store request's worth of neighbouring rows.
_SAMPLE_BLOCK_BYTES = 64 * 1024

_MIN_SAMPLE_ROWS, _MAX_SAMPLE_ROWS = 64, 512


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Decoded live rows of one fragment, in physical order.

    Parameters
    ----------
    fragment_id : int
        Fragment they come from.
    offsets : numpy.ndarray
        int64 ``(n,)`` physical offsets of the usable rows.
    vectors : numpy.ndarray
        float32 ``(n, dim)``, perhaps a read-only view of the scanner's memory.
    row_offsets, row_ids : numpy.ndarray
        int64 and uint64 ``(live,)``: offset and row id of every live row, usable or not.
    null, non_finite, zero : int
        Live rows left out, by reason.
    bad_row_ids : numpy.ndarray
        uint64: row ids of those.
    updated : numpy.ndarray or None
        uint64 ``(live,)``: the version that last wrote every live row; None without stable row ids.
    """

    fragment_id: int
    offsets: Int64Array
    vectors: Float32Array
    row_offsets: Int64Array
    row_ids: UInt64Array
    null: int
    non_finite: int
    zero: int
    bad_row_ids: UInt64Array
    updated: UInt64Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Usable rows drawn from all fragments.

    Parameters
    ----------
    vectors : numpy.ndarray
        float32 ``(n, dim)``.
    fragment_ids, offsets : numpy.ndarray
        int64 ``(n,)``: where each comes from.
    drawn_rows : int
        Rows drawn, unusable ones included.
    """

    vectors: Float32Array
    fragment_ids: Int64Array
    offsets: Int64Array
    drawn_rows: int


def decode_batch(batch: pa.RecordBatch, column: VectorColumn, metric: Metric) -> Iterator[Block]:
    """Decode a scanner batch: one block a fragment."""
    addresses = batch[ADDRESS_COLUMN].to_numpy()
    row_ids = batch[ROW_ID_COLUMN].to_numpy() if ROW_ID_COLUMN in batch.schema.names else addresses
    updated = batch[UPDATED_COLUMN].to_numpy() if UPDATED_COLUMN in batch.schema.names else None
    fragments = (addresses >> np.uint64(32)).astype(np.int64)
    borders = [0, *(np.flatnonzero(np.diff(fragments)) + 1).tolist(), len(addresses)]
    for start, stop in itertools.pairwise(borders):
        if start == stop:
            continue
        decoded = decode_vectors(
            batch.column(0)[start:stop], column.dim, metric, column=column.name, odd_is_null=column.odd_is_null
        )
        usable = decoded.usable
        offsets = (addresses[start:stop] & OFFSET_MASK).astype(np.int64)
        ids = row_ids[start:stop]
        everything = bool(usable.all())
        yield Block(
            int(fragments[start]),
            offsets if everything else offsets[usable],
            decoded.values if everything else decoded.values[usable],
            offsets,
            ids,
            int(decoded.null.sum()),
            int(decoded.non_finite.sum()),
            int(decoded.zero.sum()),
            ids[~usable],
            None if updated is None else updated[start:stop],
        )


def only_rows(block: Block, offsets: Int64Array) -> Iterator[Block]:
    """Return a block without the rows that are not asked for; nothing if none is left."""
    rows = np.isin(block.row_offsets, offsets)
    if not rows.any():
        return
    kept = np.isin(block.offsets, offsets)
    yield Block(
        block.fragment_id,
        block.offsets[kept],
        block.vectors[kept],
        block.row_offsets[rows],
        block.row_ids[rows],
        # Which of the unusable rows are asked for is not told by reason: all of them are counted as null.
        int(np.count_nonzero(rows)) - int(np.count_nonzero(kept)),
        0,
        0,
        np.setdiff1d(block.row_ids[rows], block.row_ids[np.isin(block.row_offsets, block.offsets[kept])]),
        None if block.updated is None else block.updated[rows],
    )


@dataclass(frozen=True, slots=True, eq=False)
class SampleBlocks:
    """Which rows make a sample: whole blocks of neighbours, drawn at random, in order of place.

    Parameters
    ----------
    total : int
        Live rows of the dataset.
    rows : int
        Rows of the sample, at most.
    block_rows : int
        Rows of a block; the dataset's last one may have fewer.
    blocks : numpy.ndarray
        int64 ``(n,)`` numbers of the blocks, increasing.
    """

    total: int
    rows: int
    block_rows: int
    blocks: Int64Array

    @classmethod
    def draw(cls, total: int, rows: int, row_bytes: int, seed: int) -> SampleBlocks:
        """Draw a sample.

        Parameters
        ----------
        total : int
            Live rows of the dataset.
        rows : int
            Rows to draw; all of them when there are no more.
        row_bytes : int
            Stored bytes of a row.
        seed : int
            Decides the blocks.
        """
        fitting = _SAMPLE_BLOCK_BYTES // max(row_bytes, 1)
        block = min(max(fitting, _MIN_SAMPLE_ROWS), _MAX_SAMPLE_ROWS, max(rows // 16, 1))
        count = -(-total // block)
        if rows >= total:
            return cls(total, total, block, np.arange(count, dtype=np.int64))
        chosen = np.random.default_rng(seed).choice(count, size=min(-(-rows // block), count), replace=False)
        return cls(total, rows, block, np.sort(chosen))

    def share(self, index: int, count: int) -> Int64Array:
        """Return the row numbers of one of ``count`` shares, equal but for a block, int64, increasing.

        The shares, one after the other, are the sample.
        """
        start, stop = (len(self.blocks) * border // count for border in (index, index + 1))
        numbers = (self.blocks[start:stop, None] * self.block_rows + np.arange(self.block_rows)).ravel()
        # Only the dataset's last block is short, and it is the sample's last one too.
        left = max(self.rows - start * self.block_rows, 0)
        return cast("Int64Array", numbers[numbers < self.total][:left].astype(np.int64))
