"""Everything within a radius, by distances that can be trusted.

A radius search of FAISS is exact for flat and plain IVF types by their own codes. Fast-scan and RaBitQ
take the radius as a hint at best, a graph only looks at what its walk meets, and a refine store knows
better than any code. So wherever a refine store is, and wherever FAISS cannot be relied on, all rows of
the probed lists (of the whole segment without lists) are compared from the store, or decoded, in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from ..types import Float32Array, Int64Array
from .decode import Decoder, table_of, transforms_of
from .encoder import code_table
from .factory import Capability, ivf_of
from .mask import Mask

__all__ = ["RangeSearcher", "exact_queries", "probed_lists"]

# Rows whose codes are gathered, or decoded, at a time.
_BLOCK_ROWS = 32_768

# Queries of one call: what they find is held twice for a moment.
_FEW_QUERIES = 16

_Bytes = NDArray[np.uint8]
_Found = tuple[Float32Array, Int64Array]
"""Raw distances and positions of one query."""


class RangeSearcher:
    """Radius search over one segment.

    Parameters
    ----------
    base, refine : faiss.Index
        Searchable part, and the refine store or None.
    capability : Capability
        Of the searchable part.
    decoder : Decoder
        Of the same segment.
    """

    def __init__(self, base: Any, refine: Any | None, capability: Capability, decoder: Decoder) -> None:
        self._base = base
        self._refine = refine
        self._capability = capability
        self._decoder = decoder

    @property
    def possible(self) -> bool:
        """Whether there are distances to compare with a radius."""
        return self._refine is not None or self._capability.range != "none"

    def search(
        self, queries: Float32Array, radius: float, nprobe: int, mask: Mask | None
    ) -> tuple[Int64Array, Float32Array, Int64Array]:
        """Return limits int64 ``(n_queries + 1,)``, raw distances and positions; `possible` must hold."""
        with np.errstate(over="ignore"):
            bound = float(np.float32(radius))  # what is too large for FAISS's float is infinite
        if ivf_of(self._base) is None:
            found = self._search_table(queries, bound, mask)
        elif self._refine is None and self._capability.range == "exact":
            found = self._search_lists(queries, bound, nprobe, mask)
        else:
            found = self._search_members(queries, bound, nprobe, mask)
        return _joined(found, descending=self._base.metric_type == faiss.METRIC_INNER_PRODUCT)

    def _search_table(self, queries: Float32Array, radius: float, mask: Mask | None) -> Iterator[_Found]:
        """Compare every row: a graph's walk ends before it has met all that is inside."""
        if self._refine is not None:
            table, seen = self._refine, queries
        else:
            table, seen = table_of(self._base), _seen(self._base, queries)
        if isinstance(table, faiss.IndexFlat):
            return _in_few(table, seen, radius, faiss.SearchParameters(sel=_selector(mask)))
        codes, comparer = code_table(table), _Comparer(table)
        pieces: list[list[_Found]] = [[] for _ in queries]
        for start in range(0, len(codes), _BLOCK_ROWS):
            some = _allowed(np.arange(start, min(start + _BLOCK_ROWS, len(codes))), mask)
            for piece, found in zip(pieces, comparer.inside(seen, radius, some, codes[some]), strict=True):
                piece.append(found)
        return (_together(found) for found in pieces)

    def _search_lists(self, queries: Float32Array, radius: float, nprobe: int, mask: Mask | None) -> Iterator[_Found]:
        nlist = int(ivf_of(self._base).nlist)  # type: ignore[union-attr]
        params = faiss.SearchParametersIVF(nprobe=min(nprobe, nlist), sel=_selector(mask))
        if isinstance(self._base, faiss.IndexPreTransform):
            params = faiss.SearchParametersPreTransform(index_params=params)
        return _in_few(self._base, queries, radius, params)

    def _search_members(self, queries: Float32Array, radius: float, nprobe: int, mask: Mask | None) -> Iterator[_Found]:
        """Compare every row of the probed lists: from the refine store, or decoded."""
        ivf: Any = ivf_of(self._base)
        probed = probed_lists(self._base, queries, nprobe)[1]
        if self._refine is not None:
            comparer, blocks, seen = _Comparer(self._refine), self._refined_blocks, queries
        else:
            # After the transforms, as a search does.
            comparer = _Comparer(faiss.IndexFlat(int(ivf.d), ivf.metric_type))
            blocks, seen = self._decoded_blocks, _seen(self._base, queries)
        for row, numbers in enumerate(probed):
            query = seen[row : row + 1]
            yield _together(
                [
                    found
                    for positions, codes in blocks(numbers[numbers >= 0].tolist(), mask)
                    for found in comparer.inside(query, radius, positions, codes)
                ]
            )

    def _refined_blocks(self, numbers: list[int], mask: Mask | None) -> Iterator[tuple[Int64Array, _Bytes]]:
        codes = code_table(self._refine)
        members = [_allowed(self._decoder.list_positions(number), mask) for number in numbers]
        positions = np.concatenate([np.empty(0, dtype=np.int64), *members])
        for start in range(0, len(positions), _BLOCK_ROWS):
            some = positions[start : start + _BLOCK_ROWS]
            yield some, codes[some]

    def _decoded_blocks(self, numbers: list[int], mask: Mask | None) -> Iterator[tuple[Int64Array, _Bytes]]:
        for number in numbers:
            positions = self._decoder.list_positions(number)
            rows = np.arange(len(positions)) if mask is None else np.flatnonzero(mask.allows(positions))
            for start in range(0, len(rows), _BLOCK_ROWS):
                some = rows[start : start + _BLOCK_ROWS]
                yield positions[some], self._decoder.decode_in_list(number, some).view(np.uint8)


class _Comparer:
    """Compares queries with a block of codes of one flat store, at FAISS's speed.

    The radius search of a flat scalar quantizer decodes row by row, 20 times slower than the same codes
    in a list are compared (faiss 1.15.1): so they are put into the only list of an IVF index.

    Parameters
    ----------
    store : faiss.Index
        Its kind of codes; its rows play no part.
    """

    def __init__(self, store: Any) -> None:
        if isinstance(store, faiss.IndexFlat):
            self._flat, self._lists = faiss.IndexFlat(store.d, store.metric_type), None
            return
        origin = faiss.IndexFlat(store.d, store.metric_type)
        origin.add(np.zeros((1, store.d), dtype=np.float32))
        self._lists = faiss.IndexIVFScalarQuantizer(origin, store.d, 1, store.sq.qtype, store.metric_type, False, True)
        self._lists.referenced_objects = [origin]
        self._lists.own_fields = False
        self._lists.sq = store.sq
        self._lists.is_trained = True

    def inside(self, queries: Float32Array, radius: float, positions: Int64Array, codes: _Bytes) -> Iterator[_Found]:
        """Return for every query what is inside, of rows with these positions and codes."""
        if self._lists is None:
            self._flat.codes.resize(codes.size)
            self._flat.ntotal = len(codes)
            code_table(self._flat)[:] = codes
            for distances, rows in _in_few(self._flat, queries, radius, None):
                yield distances, positions[rows]
            return
        self._lists.reset()
        if len(positions):
            pointer = faiss.swig_ptr
            self._lists.invlists.add_entries(0, len(positions), pointer(positions), pointer(codes))
            self._lists.ntotal = len(positions)
        yield from _in_few(self._lists, queries, radius, None)


def probed_lists(base: Any, queries: Float32Array, nprobe: int) -> tuple[Float32Array, Int64Array]:
    """Return the lists that a search looks into, best first: distances and numbers, ``(n_queries, nprobe)``."""
    ivf: Any = ivf_of(base)
    distances, numbers = ivf.quantizer.search(_seen(base, queries), min(nprobe, int(ivf.nlist)))
    return distances, numbers


def exact_queries(dim: int) -> int:
    """Return how many queries of a call FAISS compares one by one.

    From ``distance_compute_blas_threshold`` elements on it computes L2 in a flat index by
    ``|x|^2 + |y|^2 - 2xy``, which loses small distances (1.15.1).
    """
    return max((int(faiss.cvar.distance_compute_blas_threshold) - 1) // dim, 1)


def _seen(base: Any, queries: Float32Array) -> Float32Array:
    for transform in transforms_of(base):
        queries = transform.apply(queries)
    return queries


def _selector(mask: Mask | None) -> Any | None:
    return None if mask is None else mask.selector


def _allowed(positions: Int64Array, mask: Mask | None) -> Int64Array:
    return positions if mask is None else positions[mask.allows(positions)]


def _in_few(index: Any, queries: Float32Array, radius: float, params: Any) -> Iterator[_Found]:
    width = min(_FEW_QUERIES, exact_queries(int(index.d)))
    for start in range(0, len(queries), width):
        few = queries[start : start + width]
        limits, distances, positions = index.range_search(few, radius, params=params)
        limits = limits.astype(np.int64)
        for row in range(len(few)):
            here = slice(limits[row], limits[row + 1])
            yield distances[here], positions[here]


def _together(pieces: list[_Found]) -> _Found:
    if not pieces:
        return np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
    return np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces])


def _joined(found: Iterator[_Found], *, descending: bool) -> tuple[Int64Array, Float32Array, Int64Array]:
    """Join what the queries found, each sorted best first, equal distances by position."""
    ordered: list[_Found] = []
    for distances, positions in found:
        order = np.lexsort((positions, -distances if descending else distances))
        ordered.append((distances[order], positions[order]))
    limits = np.zeros(len(ordered) + 1, dtype=np.int64)
    np.cumsum([len(positions) for _, positions in ordered], out=limits[1:])
    return limits, *_together(ordered)
