"""Vectors back from their codes: from the refine store, a flat code table, or the lists."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidArgument
from ..types import Float32Array, Int64Array
from .blocks import block_layout, invlists_of, list_codes, list_ids
from .encoder import code_table
from .factory import Capability, inner_index, ivf_of

__all__ = ["Decoder", "table_of", "transforms_of"]

# A place is list << 32 | row in the list.
_ROW_BITS = 32

# Rotations are computed in float32.
_ORTHONORMAL = 1e-3


class Decoder:
    """Decodes positions of one segment.

    Parameters
    ----------
    base, refine : faiss.Index
        Searchable part, and the refine store or None.
    capability : Capability
        Of the searchable part.
    positions : int
        Positions of the segment.
    """

    def __init__(self, base: Any, refine: Any | None, capability: Capability, positions: int) -> None:
        self._base = base
        self._ivf = ivf_of(base)
        self._refine = refine
        self._reconstruct = capability.reconstruct
        self._positions = positions
        self._layout = block_layout(base)
        self._places: Int64Array | None = None
        self._lock = threading.Lock()

    @cached_property
    def possible(self) -> bool:
        """Whether vectors can be decoded at all."""
        if self._refine is not None:
            return True
        return self._reconstruct and all(_reversible(transform) for transform in transforms_of(self._base))

    def decode(self, positions: Int64Array) -> Float32Array:
        """Return float32 ``(n, dim)``; `possible` must hold.

        Raises
        ------
        InvalidArgument
            If a position lies outside or holds no vector.
        """
        if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < self._positions:
            raise _no_vector(int(positions.min()), int(positions.max()))
        if not len(positions):
            return np.empty((0, int(self._base.d)), dtype=np.float32)
        if self._refine is not None:
            return _decode_table(self._refine, positions)
        vectors = (
            self._decode_lists(positions) if self._ivf is not None else _decode_table(table_of(self._base), positions)
        )
        for transform in reversed(transforms_of(self._base)):
            vectors = transform.reverse_transform(vectors)
        return vectors

    def list_positions(self, number: int) -> Int64Array:
        """Return the positions in a list, int64 ``(n,)``; not to be changed."""
        return list_ids(invlists_of(self._ivf), number)

    def decode_in_list(self, number: int, rows: Int64Array) -> Float32Array:
        """Decode some rows of a list as its codes lie there: after the transforms, if there are any.

        Parameters
        ----------
        number : int
            The list.
        rows : numpy.ndarray
            int64 ``(n,)``: places in `list_positions`.
        """
        return self._decode_places((np.int64(number) << _ROW_BITS) + rows)

    def _decode_lists(self, positions: Int64Array) -> Float32Array:
        places = self._direct_map()[positions]
        if int(places.min()) < 0:
            missing = int(positions[np.argmin(places)])
            raise _no_vector(missing, missing)
        return self._decode_places(places)

    def _decode_places(self, places: Int64Array) -> Float32Array:
        ivf: Any = self._ivf
        codes = self._codes_at(places)
        if not isinstance(ivf, faiss.IndexIVFPQFastScan):
            return ivf.sa_decode(codes)  # type: ignore[no-any-return]
        # Its own `sa_decode` follows a pointer that reading from a file leaves unset (faiss 1.15.1).
        vectors: Float32Array = ivf.pq.decode(np.ascontiguousarray(codes[:, ivf.coarse_code_size() :]))
        return vectors + ivf.quantizer.reconstruct_batch(places >> _ROW_BITS) if ivf.by_residual else vectors

    def _direct_map(self) -> Int64Array:
        # FAISS's own direct map takes six times the memory where ids have gaps, and changes the index
        # under the searches that run.
        with self._lock:
            if self._places is None:
                places = np.full(self._positions, -1, dtype=np.int64)
                lists = invlists_of(self._ivf)
                for number in range(int(lists.nlist)):
                    ids = list_ids(lists, number)
                    places[ids] = (np.int64(number) << _ROW_BITS) + np.arange(len(ids))
                self._places = places
            return self._places

    def _codes_at(self, places: Int64Array) -> NDArray[np.uint8]:
        """Return codes as `sa_decode` takes them: the list's number in front, little-endian."""
        ivf: Any = self._ivf
        lists, ahead, layout = invlists_of(ivf), int(ivf.coarse_code_size()), self._layout
        numbers, rows = places >> _ROW_BITS, places & ((1 << _ROW_BITS) - 1)
        codes = np.empty((len(places), int(ivf.sa_code_size())), dtype=np.uint8)
        codes[:, :ahead] = numbers.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :ahead]
        order = np.argsort(numbers, kind="stable")
        starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            mine = order[start:stop]
            number = int(numbers[mine[0]])
            held = int(lists.list_size(number))
            if layout is None:
                codes[mine, ahead:] = list_codes(lists, number, int(ivf.code_size), held)[rows[mine]]
            else:
                blocks = list_codes(lists, number, layout.block_bytes, layout.blocks(held))
                codes[mine, ahead:] = layout.take(blocks, rows[mine])
        return codes


def transforms_of(base: Any) -> list[Any]:
    """Return what an index does to a vector before it is searched or encoded."""
    if not isinstance(base, faiss.IndexPreTransform):
        return []
    return [faiss.downcast_VectorTransform(base.chain.at(i)) for i in range(base.chain.size())]


def table_of(base: Any) -> Any:
    """Return the flat code table of an index without lists; codes of what comes out of its transforms."""
    inner = inner_index(base)
    return faiss.downcast_index(inner.storage) if isinstance(inner, faiss.IndexHNSW) else inner


def _decode_table(table: Any, positions: Int64Array) -> Float32Array:
    return table.sa_decode(code_table(table)[positions])  # type: ignore[no-any-return]


def _reversible(transform: Any) -> bool:
    """Whether a transform only rotates, projects or pads; a whitening PCA says so of itself once it was read."""
    if isinstance(transform, faiss.RemapDimensionsTransform):
        return int(transform.d_out) >= int(transform.d_in)
    if not isinstance(transform, faiss.LinearTransform):
        return False
    matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
    gram = matrix @ matrix.T if transform.d_out <= transform.d_in else matrix.T @ matrix
    return bool(np.allclose(gram, np.eye(len(gram)), atol=_ORTHONORMAL))


def _no_vector(low: int, high: int) -> InvalidArgument:
    named = f"position {low}" if low == high else f"a position from {low} to {high}"
    return InvalidArgument(f"{named} holds no vector", parameter="positions", value=(low, high))
