"""The memory layout of fast-scan lists, read and written in numpy.

A list is a row of blocks. A block holds the 4-bit codes of ``per_block`` rows, interleaved for SIMD
look-ups, and behind them what each row has besides (RaBitQ's factors), row after row. FAISS's own
packer works row by row, and only for blocks of 32 rows: it folds a wider block onto itself (1.15.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ..types import Int64Array
from .factory import ivf_of

__all__ = ["BlockLayout", "block_layout", "invlists_of", "list_codes", "list_ids", "move_what_faiss_cannot"]

_Bytes = NDArray[np.uint8]

# Rows of a block that FAISS's own packer lays out rightly.
_FAISS_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Where the codes of a row lie in a block.

    Within a group of 32 rows, byte ``j`` of a code byte's first 16 bytes holds the low nibbles of rows
    ``j // 2 + 8 * (j % 2)`` and, in its upper half, of the row 16 further; the next 16 bytes hold the high
    nibbles alike.

    Parameters
    ----------
    per_block : int
        Rows of a block, a multiple of 32.
    packed_bytes : int
        Interleaved bytes of a row's code.
    extra_bytes : int
        Bytes of a row that stand behind the block's codes.
    """

    per_block: int
    packed_bytes: int
    extra_bytes: int

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's whole code, as `sa_encode` gives it without the list number."""
        return self.packed_bytes + self.extra_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.per_block * self.code_bytes

    def blocks(self, rows: int) -> int:
        """Blocks that so many rows take."""
        return -(-rows // self.per_block)

    def pack(self, codes: _Bytes) -> _Bytes:
        """Lay rows out in blocks.

        Parameters
        ----------
        codes : numpy.ndarray
            uint8 ``(rows, code_bytes)``.

        Returns
        -------
        numpy.ndarray
            uint8 ``(blocks, block_bytes)``, zero behind the last row.
        """
        count = self.blocks(len(codes))
        padded = np.zeros((count * self.per_block, self.code_bytes), dtype=np.uint8)
        padded[: len(codes)] = codes
        out = np.empty((count, self.block_bytes), dtype=np.uint8)
        rows = padded[:, : self.packed_bytes].reshape(count, -1, 2, 2, 8, self.packed_bytes)
        # (block, group, half, odd, pair, byte) -> (block, byte, group, half, pair, odd)
        rows = rows.transpose(0, 5, 1, 2, 4, 3)
        first, second = rows[:, :, :, 0], rows[:, :, :, 1]
        packed = np.empty((*rows.shape[:3], 2, 8, 2), dtype=np.uint8)
        packed[:, :, :, 0] = (first & 15) | (second << 4)
        packed[:, :, :, 1] = (first >> 4) | (second & 0xF0)
        split = self.per_block * self.packed_bytes
        out[:, :split] = packed.reshape(count, split)
        out[:, split:] = padded[:, self.packed_bytes :].reshape(count, -1)
        return out

    def unpack(self, blocks: _Bytes, rows: int) -> _Bytes:
        """Return the codes of the first rows of some blocks, uint8 ``(rows, code_bytes)``."""
        count, split = len(blocks), self.per_block * self.packed_bytes
        packed = blocks[:, :split].reshape(count, self.packed_bytes, -1, 2, 8, 2)
        low, high = packed[:, :, :, 0], packed[:, :, :, 1]
        halves = np.empty((count, self.per_block // 32, 2, 2, 8, self.packed_bytes), dtype=np.uint8)
        # (block, byte, group, pair, odd) -> (block, group, odd, pair, byte)
        halves[:, :, 0] = ((low & 15) | (high << 4)).transpose(0, 2, 4, 3, 1)
        halves[:, :, 1] = ((low >> 4) | (high & 0xF0)).transpose(0, 2, 4, 3, 1)
        out = np.empty((rows, self.code_bytes), dtype=np.uint8)
        out[:, : self.packed_bytes] = halves.reshape(-1, self.packed_bytes)[:rows]
        out[:, self.packed_bytes :] = blocks[:, split:].reshape(count * self.per_block, -1)[:rows]
        return out

    def take(self, blocks: _Bytes, offsets: Int64Array) -> _Bytes:
        """Return the codes of some rows, uint8 ``(n, code_bytes)``; for few rows of many blocks."""
        block, row = np.divmod(offsets, self.per_block)
        wanted, place = np.unique(block, return_inverse=True)
        codes = self.unpack(blocks[wanted], len(wanted) * self.per_block)
        return codes[place * self.per_block + row]


def invlists_of(ivf: Any) -> Any:
    """Return the lists of an IVF index as their own class."""
    return faiss.downcast_InvertedLists(ivf.invlists)


def block_layout(index: Any) -> BlockLayout | None:
    """Return the layout of an index's lists, or None where a list is simply code after code."""
    ivf = ivf_of(index)
    if ivf is None or not isinstance(invlists_of(ivf), faiss.BlockInvertedLists):
        return None
    lists = invlists_of(ivf)
    packed = int(ivf.M2) // 2
    return BlockLayout(
        per_block=int(lists.n_per_block),
        packed_bytes=packed,
        extra_bytes=int(lists.block_size) // int(lists.n_per_block) - packed,
    )


def list_ids(lists: Any, number: int) -> Int64Array:
    """Return the ids of a list as a writable view, good until the list changes its size."""
    rows = int(lists.list_size(number))
    return faiss.rev_swig_ptr(lists.get_ids(number), rows) if rows else np.empty(0, dtype=np.int64)


def list_codes(lists: Any, number: int, width: int, rows: int) -> _Bytes:
    """Return the codes of a list, or its blocks, as a writable view uint8 ``(rows, width)``."""
    if not rows:
        return np.empty((0, width), dtype=np.uint8)
    view: _Bytes = faiss.rev_swig_ptr(lists.get_codes(number), rows * width).reshape(rows, width)
    return view


def move_what_faiss_cannot(lists: Any, others: Any, layout: BlockLayout, first: int) -> None:
    """Move those fast-scan lists that `merge_from` would spoil; it finds them empty in ``others`` then.

    FAISS 1.15.1 folds the rows of blocks wider than 32 onto each other; and where a list's rows are a
    multiple of ``block_size`` (a number of bytes, but compared with rows), it copies as many bytes as the
    merged list has, to the end of it: the heap behind is overwritten. The rest it moves well, and many
    short lists faster than this does.

    Parameters
    ----------
    lists, others : faiss.BlockInvertedLists
        Where to, and where from.
    layout : BlockLayout
        Of both.
    first : int
        What is added to the ids.
    """
    folds = layout.per_block != _FAISS_ROWS
    for number in range(int(lists.nlist)):
        held, more = int(lists.list_size(number)), int(others.list_size(number))
        if held and more and (folds or held % layout.block_bytes == 0):
            _append(lists, others, layout, number, first)


def _append(lists: Any, others: Any, layout: BlockLayout, number: int, first: int) -> None:
    held, more = int(lists.list_size(number)), int(others.list_size(number))
    whole, rest = divmod(held, layout.per_block)
    moved = list_codes(others, number, layout.block_bytes, layout.blocks(more))
    if rest:
        last = list_codes(lists, number, layout.block_bytes, whole + 1)[whole:]
        moved = layout.pack(np.concatenate([layout.unpack(last, rest), layout.unpack(moved, more)]))
    lists.resize(number, held + more)
    list_ids(lists, number)[held:] = list_ids(others, number) + first
    list_codes(lists, number, layout.block_bytes, layout.blocks(held + more))[whole:] = moved
    others.resize(number, 0)
