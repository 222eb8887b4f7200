"""Shards merged in RAM into one immutable FAISS index, and the search over it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np

from ..errors import InvalidArgument
from ..types import Float32Array, Int64Array
from .blocks import block_layout, invlists_of, move_what_faiss_cannot
from .decode import Decoder
from .encoder import ShardEncoder, code_table, list_sizes
from .factory import capability_of, faiss_metric, inner_index, ivf_of
from .mask import Mask
from .model import Model
from .ranges import RangeSearcher, exact_queries, probed_lists

__all__ = ["CodeStage", "Probed", "Segment", "empty_segment", "flat_segment", "merge_shards"]

# Results taken beyond k where FAISS gets L2 from lengths and products, before distances are computed again: rounding
# at the border of the first k then pushes nothing out.
_BLAS_SPARE = 8

# What such a distance may be off by, as a share of both squared lengths: float32 sums of up to some thousand terms.
_BLAS_ERROR = 4e-6

# Rows whose lengths are computed at a time.
_NORM_ROWS = 65_536

# FAISS multiplies k by k_factor as float32 and refuses less than k: above 2**24 that could round down.
# Below 2**21 the product ends up as the same whole number.
_ROUNDED_UP = 1 + 2**-22

# One query over a table of up to this many values is faster on one thread: waking others takes longer than the
# scan, and where the machine is busy much longer (10,000 x 128: 70 us against 180; 100,000 x 128: 1.6 ms, 2.3).
_ALONE_VALUES = 16 * 1024 * 1024

# Kinds of search parameters kept ready per segment, and per mask; a server sees a handful.
_PARAMETER_CACHE = 64


@dataclass(frozen=True, slots=True, eq=False)
class CodeStage:
    """What the codes alone found, before refining; for measuring recall.

    Parameters
    ----------
    positions : numpy.ndarray
        int64 ``(n_queries, count)``, best code first, -1 where there was nothing.
    code_distances : numpy.ndarray
        float32, same shape; smaller is better.
    final_distances : numpy.ndarray
        float32, same shape: after refining; equal to `code_distances` without a refine store.
    """

    positions: Int64Array
    code_distances: Float32Array
    final_distances: Float32Array


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Probed:
    """Where a search looks.

    Parameters
    ----------
    lists : numpy.ndarray or None
        int64 ``(n_queries, nprobe)``, nearest centroid first; None without lists.
    rows_scanned : numpy.ndarray
        int64 ``(n_queries,)``: entries of those lists, masked ones included; every position of a flat
        type; of a graph the ``ef`` rows it keeps (it compares more on its way).
    seconds : float
        Time to find the lists.
    """

    lists: Int64Array | None
    rows_scanned: Int64Array
    seconds: float


class Segment:
    """One immutable FAISS index over consecutive positions.

    Parameters
    ----------
    model : Model
        Model of the generation; its centroids are shared.
    base, refine : faiss.Index
        Searchable part, and the refine store or None.
    positions : int
        Positions, skipped rows included.
    """

    def __init__(self, model: Model, base: Any, refine: Any | None, positions: int) -> None:
        self.model = model
        self.positions = positions
        self.capability = capability_of(base, model.spec.factory)
        self._base = base
        self._refine = refine
        self._searched = base if refine is None else _refined(base, refine)
        self._larger_is_closer = base.metric_type == faiss.METRIC_INNER_PRODUCT
        self._rescored = isinstance(base, faiss.IndexFlat) and not self._larger_is_closer
        self._kind = f"{type(base).__name__} {type(refine).__name__}"
        self._alone = isinstance(base, faiss.IndexFlat) and positions * int(base.d) <= _ALONE_VALUES
        self._parameters: dict[tuple[str, int, int, int], Any] = {}
        self._decoder = Decoder(base, refine, self.capability, positions)
        self._ranges = RangeSearcher(base, refine, self.capability, self._decoder)

    @classmethod
    def of_encoder(cls, encoder: ShardEncoder) -> Segment:
        """Search a finished shard while it is still in the encoder's memory."""
        return cls(encoder.model, encoder.base, encoder.refine, encoder.physical_rows)

    @property
    def larger_is_closer(self) -> bool:
        """Whether raw distances are similarities (cosine, dot)."""
        return bool(self._larger_is_closer)

    @property
    def has_refine(self) -> bool:
        """Whether results are re-ranked from a refine store."""
        return self._refine is not None

    @property
    def can_decode(self) -> bool:
        """Whether `reconstruct` works: there is a refine store, or the codes can be decoded."""
        return self._decoder.possible

    @property
    def can_range(self) -> bool:
        """Whether `range_search` works: there are distances that can be compared with a radius."""
        return self._ranges.possible

    @property
    def ram_bytes(self) -> int:
        """Bytes of codes, ids, links, centroids, codebooks and tables of distances, without allocator slack."""
        refine = 0 if self._refine is None else int(self._refine.codes.size())
        return _payload_bytes(self._base) + refine

    def search(
        self, queries: Float32Array, k: int, *, nprobe: int, ef: int, k_factor: int, mask: Mask | None = None
    ) -> tuple[Float32Array, Int64Array]:
        """Return the raw FAISS answer.

        Parameters
        ----------
        queries : numpy.ndarray
            float32 ``(n_queries, dim)``, C-contiguous, prepared.
        k : int
            Results per query.
        nprobe, ef, k_factor : int
            Search widths; those that the type does not know are ignored. Of any size: beyond the positions
            there is nothing more to look at.
        mask : Mask, optional
            Positions that may be returned.

        Returns
        -------
        tuple of (numpy.ndarray, numpy.ndarray)
            Raw distances float32 and positions int64, both ``(n_queries, k)``, best first, -1 for
            missing. Under l2 squared distances; otherwise similarities, largest first.
        """
        reach = k * k_factor
        if reach > self.positions:
            # FAISS makes room for all of it, and its floats and ints end long before ours.
            reach, k_factor = max(k, self.positions), max(-(-self.positions // k), 1)
        params = self._params(nprobe, min(max(ef, reach), max(k, self.positions)), k_factor, mask)
        if self._rescored and len(queries) > exact_queries(self.model.spec.dim):
            return self._search_rescored(queries, k, params)
        # Straight to the C++ method: FAISS's own wrapper checks again what is known here.
        distances = np.empty((len(queries), k), dtype=np.float32)
        positions = np.empty((len(queries), k), dtype=np.int64)
        if len(queries) > 1 or not self._alone:
            self._search_into(queries, k, distances, positions, params)
            return distances, positions
        threads = faiss.omp_get_max_threads()  # of the calling thread only
        faiss.omp_set_num_threads(1)
        try:
            self._search_into(queries, k, distances, positions, params)
        finally:
            faiss.omp_set_num_threads(threads)
        return distances, positions

    def _search_into(
        self, queries: Float32Array, k: int, distances: Float32Array, positions: Int64Array, params: Any
    ) -> None:
        pointer = faiss.swig_ptr
        self._searched.search_c(len(queries), pointer(queries), k, pointer(distances), pointer(positions), params)

    def candidates(
        self, queries: Float32Array, count: int, widths: Sequence[int], mask: Mask | None = None
    ) -> list[CodeStage]:
        """Return what the codes find at several widths, with refined distances beside.

        Parameters
        ----------
        queries : numpy.ndarray
            float32 ``(n_queries, dim)``, prepared.
        count : int
            Candidates per query.
        widths : sequence of int
            nprobe of IVF types, ef of HNSW.
        mask : Mask, optional
            Positions that may be returned.

        Returns
        -------
        list of CodeStage
            One per width.
        """
        found = [
            self._base.search(queries, count, params=_base_params(self._base, width, max(width, count), mask))
            for width in widths
        ]
        sign = np.float32(-1 if self._larger_is_closer else 1)
        final = self._final_distances(queries, [positions for _, positions in found])
        return [
            CodeStage(positions, sign * raw, sign * (raw if final is None else final[i]))
            for i, (raw, positions) in enumerate(found)
        ]

    def reconstruct(self, positions: Int64Array) -> Float32Array:
        """Decode vectors at positions that hold one.

        Parameters
        ----------
        positions : numpy.ndarray
            int64 ``(n,)``.

        Returns
        -------
        numpy.ndarray
            float32 ``(n, dim)``: from the refine store where there is one, else from the codes; of unit
            length under cosine.

        Raises
        ------
        InvalidArgument
            If neither can be decoded (see `can_decode`), or a position holds no vector.
        """
        if not self.can_decode:
            raise InvalidArgument(
                f"{self.model.spec.factory} cannot decode its vectors",
                remedy="Build the index with a refine store, such as refine='sq8'",
                parameter="refine",
                value=None,
            )
        return self._decoder.decode(positions)

    def range_search(
        self, queries: Float32Array, radius: float, *, nprobe: int, mask: Mask | None = None
    ) -> tuple[Int64Array, Float32Array, Int64Array]:
        """Return everything inside a radius, by the best distances there are.

        With a refine store those are its distances, and every row of the probed lists is compared.
        Without one they are those of the codes. A graph is not walked: all its rows are compared.

        Parameters
        ----------
        queries : numpy.ndarray
            float32 ``(n_queries, dim)``, C-contiguous, prepared.
        radius : float
            Raw: inside is a squared distance below it, otherwise a similarity above it. Any value;
            nothing is inside NaN.
        nprobe : int
            Lists looked into by IVF types, ignored by others.
        mask : Mask, optional
            Positions that may be returned.

        Returns
        -------
        tuple of (numpy.ndarray, numpy.ndarray, numpy.ndarray)
            Limits int64 ``(n_queries + 1,)``: query ``i`` found what lies from ``limits[i]`` to
            ``limits[i + 1]``. Raw distances float32 and positions int64, best first, equal ones in order
            of position.

        Raises
        ------
        InvalidArgument
            If the codes give no distances to go by and there is no refine store (see `can_range`).
        """
        if not self.can_range:
            raise InvalidArgument(
                f"{self.model.spec.factory} cannot search by radius: the distances of its codes are estimates",
                remedy="Build the index with a refine store, such as refine='sq8'",
                parameter="refine",
                value=None,
            )
        return self._ranges.search(queries, radius, nprobe, mask)

    def probe(self, queries: Float32Array, nprobe: int, *, ef: int) -> Probed:
        """Return where a search with these widths looks.

        Parameters
        ----------
        queries : numpy.ndarray
            float32 ``(n_queries, dim)``, C-contiguous, prepared.
        nprobe, ef : int
            As given to `search`.
        """
        started = time.perf_counter()
        ivf = ivf_of(self._base)
        if ivf is None:
            rows = min(ef, self.positions) if self.capability.family == "hnsw" else self.positions
            scanned = np.full(len(queries), rows, dtype=np.int64)
            return Probed(lists=None, rows_scanned=scanned, seconds=time.perf_counter() - started)
        lists = probed_lists(self._base, queries, nprobe)[1]
        seconds = time.perf_counter() - started
        numbers, places = np.unique(lists, return_inverse=True)
        sizes = [0 if number < 0 else int(ivf.invlists.list_size(number)) for number in numbers.tolist()]
        scanned = np.array(sizes, dtype=np.int64)[places.reshape(lists.shape)].sum(axis=1)
        return Probed(lists=lists, rows_scanned=scanned, seconds=seconds)

    def list_sizes(self) -> Int64Array | None:
        """Rows in each IVF list, int64 ``(num_partitions,)``; None without lists."""
        return list_sizes(self._base)

    def _search_rescored(self, queries: Float32Array, k: int, params: Any) -> tuple[Float32Array, Int64Array]:
        width = k + _BLAS_SPARE
        distances, positions = self._base.search(queries, width, params=params)
        reached = np.where(positions[:, -1] < 0, np.inf, distances[:, -1])
        self._base.compute_distance_subset(
            len(queries), faiss.swig_ptr(queries), width, faiss.swig_ptr(distances), faiss.swig_ptr(positions)
        )
        distances[positions < 0] = np.inf
        distances, positions = _in_order(distances, positions, k)
        # A row that was not reached is at least this far: where that is no further than the last result, vectors
        # are so much longer than their distances that the quick way is worth nothing.
        with np.errstate(over="ignore", invalid="ignore"):
            least = reached - _BLAS_ERROR * (np.square(queries).sum(axis=1) + self._longest)
        again = np.flatnonzero(distances[:, -1] > least)
        few = exact_queries(self.model.spec.dim)
        for start in range(0, len(again), few):
            rows = again[start : start + few]
            raw, found = self._base.search(queries[rows], k, params=params)
            distances[rows], positions[rows] = _in_order(raw, found, k)
        return distances, positions

    @cached_property
    def _longest(self) -> float:
        """Largest squared length of a vector of a flat base."""
        table, longest = code_table(self._base).view(np.float32), 0.0
        for start in range(0, len(table), _NORM_ROWS):
            some = table[start : start + _NORM_ROWS]
            with np.errstate(over="ignore"):
                longest = max(longest, float(np.einsum("ij,ij->i", some, some).max()))
        return longest

    def _params(self, nprobe: int, ef: int, k_factor: int, mask: Mask | None) -> Any:
        # Threads share this without a lock. Each step is one dictionary operation, and those are atomic; what
        # was found is held by this call, whoever clears the dictionary meanwhile, and FAISS only reads it. The
        # worst that a race does is to make the same parameters twice, or to drop some that are made again.
        held = self._parameters if mask is None else mask.parameters
        key = (self._kind, nprobe, ef, k_factor)
        found = held.get(key)
        if found is None:
            found = _base_params(self._base, nprobe, ef, mask)
            if self._refine is not None:
                found = faiss.IndexRefineSearchParameters(k_factor=k_factor * _ROUNDED_UP, base_index_params=found)
            if len(held) >= _PARAMETER_CACHE:
                held.clear()
            held[key] = found
        return found

    def _final_distances(self, queries: Float32Array, found: list[Int64Array]) -> list[Float32Array] | None:
        if self._refine is None:
            return None
        finals = [np.full(positions.shape, np.inf, dtype=np.float32) for positions in found]
        for row, query in enumerate(queries):
            unique = np.unique(np.concatenate([positions[row] for positions in found]))
            unique = unique[unique >= 0]
            if not len(unique):
                continue
            vectors = self._refine.reconstruct_batch(unique)
            exact = vectors @ query if self._larger_is_closer else np.square(vectors - query).sum(axis=1)
            for positions, final in zip(found, finals, strict=True):
                known = positions[row] >= 0
                final[row, known] = exact[np.searchsorted(unique, positions[row, known])]
        return finals


def empty_segment(model: Model) -> Segment:
    """Return a segment without positions; it tells what those of a model can do."""
    return Segment(model, model.base, model.refine, 0)


def flat_segment(model: Model, vectors: Float32Array) -> Segment:
    """Return an exact segment over vectors, with the metric of a model.

    Parameters
    ----------
    model : Model
        Whose metric is used; its type plays no part.
    vectors : numpy.ndarray
        float32 ``(n, dim)``, C-contiguous, prepared; copied. May have no rows: nothing is found then.
    """
    base = faiss.IndexFlat(model.spec.dim, faiss_metric(model.spec.metric))
    if len(vectors):
        base.add(vectors)
    return Segment(model, base, None, len(vectors))


def merge_shards(
    model: Model, shards: Iterable[tuple[Any, Any | None, int]], *, positions: int = 0
) -> list[tuple[int, Segment]]:
    """Merge loaded shards into as few segments as their type allows.

    Each shard is let go before the next one is asked for, so an iterator that loads them needs room for the
    merged index and one shard.

    Parameters
    ----------
    model : Model
        Model of the generation.
    shards : iterable of (faiss.Index, faiss.Index or None, int)
        Searchable part, refine store and positions of each, at least one; consumed.
    positions : int
        Positions of all shards together, to make room once; 0 when that is not known.

    Returns
    -------
    list of (int, Segment)
        First position and segment; one segment where the type merges, else one per shard.
    """
    first = 0
    if not model.capability.mergeable:
        segments = []
        for base, refine, rows in shards:
            segments.append((first, Segment(model, base, refine, rows)))
            first += rows
        return segments
    source = iter(shards)
    base, refine, first = next(source)
    layout = block_layout(base)
    _reserve(base, positions)
    _reserve(refine, positions)
    for other, other_refine, rows in source:
        if layout is not None:
            move_what_faiss_cannot(invlists_of(ivf_of(base)), invlists_of(ivf_of(other)), layout, first)
        base.merge_from(other, first if ivf_of(base) is not None else 0)
        if refine is not None:
            refine.merge_from(other_refine, 0)
        first += rows
        del other, other_refine  # before the next one is loaded
    ivf = ivf_of(base)
    if isinstance(ivf, faiss.IndexIVFPQ):
        ivf.precompute_table()
    return [(0, Segment(model, base, refine, first))]


def _in_order(distances: Float32Array, positions: Int64Array, k: int) -> tuple[Float32Array, Int64Array]:
    order = np.lexsort((positions, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(positions, order, axis=1)


def _reserve(store: Any | None, rows: int) -> None:
    """Take a flat code table's memory in one piece, so that merging never doubles it."""
    if store is None or ivf_of(store) is not None:
        return
    store = inner_index(store)
    used = int(store.codes.size())
    store.codes.resize(max(rows * int(store.sa_code_size()), used))
    store.codes.resize(used)


def _refined(base: Any, refine: Any) -> Any:
    # IndexRefine wants equal counts, but lists leave out skipped rows and the store does not:
    # its own count is used for nothing but this check.
    count, base.ntotal = base.ntotal, refine.ntotal
    both = faiss.IndexRefine(base, refine)
    base.ntotal = count
    both.referenced_objects = [base, refine]
    return both


def _base_params(base: Any, nprobe: int, ef: int, mask: Mask | None) -> Any:
    selector = None if mask is None else mask.selector
    ivf = ivf_of(base)
    if ivf is not None:
        params = faiss.SearchParametersIVF(nprobe=min(nprobe, int(ivf.nlist)), sel=selector)
    elif hasattr(_untransformed(base), "hnsw"):
        params = faiss.SearchParametersHNSW(efSearch=ef, sel=selector)
    else:
        params = faiss.SearchParameters(sel=selector)
    if isinstance(base, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=params)
    return params


def _untransformed(base: Any) -> Any:
    return faiss.downcast_index(base.index) if isinstance(base, faiss.IndexPreTransform) else base


def _payload_bytes(base: Any) -> int:
    ivf = ivf_of(base)
    if ivf is not None:
        rows = int(ivf.ntotal) * (int(ivf.code_size) + 8)
        floats = int(ivf.nlist) * int(ivf.d)
        if isinstance(ivf, (faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan)):
            floats += int(ivf.pq.centroids.size()) + int(ivf.precomputed_table.size())
        return rows + 4 * floats
    inner = _untransformed(base)
    if hasattr(inner, "hnsw"):
        links = int(inner.hnsw.neighbors.size()) * 4
        return links + int(faiss.downcast_index(inner.storage).codes.size())
    return int(inner.codes.size())
