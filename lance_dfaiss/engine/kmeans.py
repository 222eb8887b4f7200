"""k-means in pieces: what each worker does with its rows, and what is done with the sum of it.

The result is the same to the last bit however the rows are divided. Distances are computed in blocks of rows that begin
at fixed row numbers, with one thread each. Sums are exact: every value is first rounded to a grid so coarse that no sum
of all of them can need more than the 53 bits of a float64 (pre-rounding, J. Demmel and H. D. Nguyen, "Fast
Reproducible Floating-Point Summation", ARITH 2013), and exact sums do not depend on their order.

First centroids, the repair of empty clusters and the end of the iterations are those of `faiss.Clustering`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from ..plan import KMEANS_GRAPH_LISTS
from ..types import Float32Array, Int64Array

__all__ = [
    "Grid",
    "KMeansPlan",
    "PartialSums",
    "aligned_blocks",
    "means_of",
    "moved_centroids",
    "nearest",
    "objective_of",
    "on_threads",
    "partial_sums",
    "permutation",
    "row_exponents",
    "settled",
]

T = TypeVar("T")
R = TypeVar("R")

Float64Array = NDArray[np.float64]

# Rows whose distances are computed together; as fast as all of them at once (262,144 x 128 with 1,024 centroids).
_BLOCK_ROWS = 1_024

# Rows that are sorted by centroid together, and rows and dimensions that are summed together: what the second-level
# cache holds as float64. Half as fast with 8,192 rows, as fast with 256 (262,144 x 128 with 1,024 centroids).
_SORT_ROWS = 65_536
_SUM_ROWS = 512
_SUM_DIMS = 128

# Graph over the centroids, from KMEANS_GRAPH_LISTS on. Per row of 128 dimensions and one core: 96 us by comparing, 53
# us through the graph with 32,768 centroids, 184 us and 71 us with 65,536 (and 2 s or 5 s to build it, each iteration);
# with 8,192 the graph is slower. The k-means ends .3 % worse (4,096 centroids, 65,536 rows); half the width makes it
# .8 %.
_GRAPH_LINKS = 16
_GRAPH_WIDTH = 32

# FAISS seeds the further initialisations, and the choice of clusters to split, with these (Clustering.cpp).
_ATTEMPT_STEP = 15_486_557
_SPLIT_SEED = 1_234
_SPLIT_STEP = 1 / 1_024

# Rows whose magnitudes differ by more bits than this are rounded to different grids. Distances, which spread wider and
# are summed to one number, have finer classes.
_CLASS_BITS = 12
_DISTANCE_CLASS_BITS = 4

# Exponents that a float32 can have, as `numpy.frexp` gives them; zero is kept apart below them.
_LEAST_EXPONENT, _GREATEST_EXPONENT = -148, 128
_ZERO_EXPONENT = _LEAST_EXPONENT - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KMeansPlan:
    """What is settled about a k-means before it begins.

    Parameters
    ----------
    lists, dim : int
        Centroids, and their dimension.
    iterations : int
        At most.
    attempts : int
        Initialisations, of which the best is kept.
    seed : int
        Of the first centroids.
    gain : float
        The iterations end when one changes the objective by no more than this share.
    spherical : bool
        Whether centroids are brought to unit length.
    similarity : bool
        Whether rows go to the centroid of the largest inner product, instead of the smallest distance.
    max_rows : int
        Rows that are used of a larger sample, drawn by the seed.
    """

    lists: int
    dim: int
    iterations: int
    attempts: int
    seed: int
    gain: float
    spherical: bool
    similarity: bool
    max_rows: int

    @property
    def graph(self) -> bool:
        """Whether the nearest centroid is found through an HNSW graph: nearly always right, and faster for very many.

        Not for inner products of centroids of any length, where a graph misleads.
        """
        return self.lists >= KMEANS_GRAPH_LISTS and (self.spherical or not self.similarity)

    def rows(self, total: int) -> int:
        """Return how many of so many rows are used."""
        return min(total, self.max_rows)

    def focus(self, total: int) -> Int64Array | None:
        """Return the numbers of the rows that are used, increasing; None for all of them."""
        return None if total <= self.max_rows else np.sort(permutation(total, self.seed)[: self.max_rows])

    def first_rows(self, total: int, attempt: int) -> Int64Array:
        """Return the numbers of the rows that are the first centroids, int64 ``(lists,)``."""
        used = self.rows(total)
        if used == self.lists:  # one row each, in order: there is nothing to iterate
            chosen = np.arange(used)
            return chosen if total == used else np.sort(permutation(total, self.seed)[:used])
        chosen = permutation(used, self.seed + 1 + attempt * _ATTEMPT_STEP)[: self.lists]
        return chosen if used == total else permutation(total, self.seed)[chosen]


@dataclass(frozen=True, slots=True)
class PartialSums:
    """What some rows add to an iteration; all of it is exact, so that it can be added in any order.

    Parameters
    ----------
    counts : numpy.ndarray
        int64 ``(lists,)``: rows of each centroid.
    sums : numpy.ndarray
        float64 ``(classes, lists, dimensions)``: sums of rows, by class of magnitude.
    distances : numpy.ndarray
        float64: sums of distances (or inner products), by class of magnitude.
    """

    counts: Int64Array
    sums: Float64Array
    distances: Float64Array


@dataclass(frozen=True, slots=True)
class Grid:
    """How far values are rounded before they are added.

    Rows are classed by their largest value: the first class goes 12 bits down from the largest of all, and so on, so
    that a few huge rows do not take the bits of all the others. Each class has a grid of its own; a value keeps at
    least ``53 - 12 - log2(rows)`` bits below its row's largest one.

    Parameters
    ----------
    top : int
        All values are less than ``2 ** top``.
    classes : tuple of int
        Classes that have rows, increasing.
    rows : tuple of int
        How many each has, over all parts.
    """

    top: int
    classes: tuple[int, ...]
    rows: tuple[int, ...]

    @staticmethod
    def histogram(exponents: NDArray[np.int32]) -> Int64Array:
        """Count exponents; histograms of several parts are added."""
        return np.bincount(exponents - _ZERO_EXPONENT, minlength=_GREATEST_EXPONENT - _ZERO_EXPONENT + 1)

    @classmethod
    def of(cls, histogram: Int64Array) -> Grid:
        """Return the grid for rows of which the exponents were counted."""
        present = np.flatnonzero(histogram[1:]) + 1
        if not len(present):
            return cls(0, (0,), (1,))
        top = int(present[-1])
        rows: dict[int, int] = {}
        for exponent in present.tolist():
            kind = (top - exponent) // _CLASS_BITS
            rows[kind] = rows.get(kind, 0) + int(histogram[exponent])
        kinds = sorted(rows)
        return cls(top + _ZERO_EXPONENT, tuple(kinds), tuple(rows[kind] for kind in kinds))

    def class_of(self, exponents: NDArray[np.int32]) -> NDArray[np.intp]:
        """Return which of ``classes`` rows are in; zero rows are in the first, as they add nothing."""
        kinds = np.where(exponents == _ZERO_EXPONENT, 0, (self.top - exponents) // _CLASS_BITS)
        return np.searchsorted(self.classes, kinds)

    def shifts(self) -> Float64Array:
        """Return the number of each class that rounds when it is added and taken away again, float64 ``(classes,)``."""
        tops = self.top - _CLASS_BITS * np.array(self.classes)
        return np.array([_shift(int(top), rows) for top, rows in zip(tops, self.rows, strict=True)])


def permutation(count: int, seed: int) -> Int64Array:
    """Return FAISS's random order of ``count`` numbers for a seed, int64."""
    order = np.empty(count, dtype=np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), count, seed)
    return order.astype(np.int64)


def row_exponents(rows: Float32Array) -> NDArray[np.int32]:
    """Return the exponent of each row's largest magnitude, int32 ``(n,)``."""
    found = np.empty(len(rows), dtype=np.int32)
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = rows[start : start + _BLOCK_ROWS]
        found[start : start + len(part)] = _exponents(np.maximum(part.max(axis=1), -part.min(axis=1)))
    return found


def nearest(
    rows: Float32Array, first: int, centroids: Float32Array, *, similarity: bool, graph: bool
) -> tuple[Float32Array, Int64Array]:
    """Assign rows to centroids.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 ``(n, dim)``.
    first : int
        Number of the first one: blocks of distances begin at fixed numbers.
    centroids : numpy.ndarray
        float32 ``(lists, dim)``.
    similarity : bool
        Largest inner product instead of smallest squared distance.
    graph : bool
        Through an HNSW graph instead of comparing with all.

    Returns
    -------
    tuple of numpy.ndarray
        float32 ``(n,)`` squared distances or inner products, and int64 ``(n,)`` numbers of the centroids.
    """
    dim = centroids.shape[1]
    metric = faiss.METRIC_INNER_PRODUCT if similarity else faiss.METRIC_L2
    if graph:
        index = faiss.IndexHNSWFlat(dim, _GRAPH_LINKS, metric)
        index.hnsw.efSearch = _GRAPH_WIDTH
    else:
        index = faiss.IndexFlat(dim, metric)
    # A graph built by several threads would be another one each time.
    on_threads(index.add, [centroids], threads=1)
    distances, labels = np.empty(len(rows), dtype=np.float32), np.empty(len(rows), dtype=np.int64)

    def assign(block: tuple[int, int, int]) -> None:
        start, stop, skip = block
        found = index.search(_whole_block(rows, block), 1)
        distances[start:stop], labels[start:stop] = (array[skip : skip + stop - start, 0] for array in found)

    on_threads(assign, aligned_blocks(first, len(rows)))
    # A graph may lose a row; then any centroid does, and the first is one.
    np.maximum(labels, 0, out=labels)
    return distances, labels


def aligned_blocks(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """Cut rows where their numbers are multiples of the block's length: start, stop, and place within the block."""
    start = 0
    while start < count:
        skip = (first + start) % _BLOCK_ROWS
        stop = min(start + _BLOCK_ROWS - skip, count)
        yield start, stop, skip
        start = stop


def _whole_block(rows: Float32Array, block: tuple[int, int, int]) -> Float32Array:
    """Return the rows at their place in a block of full length: a product of matrices may depend on both."""
    start, stop, skip = block
    if stop - start == _BLOCK_ROWS:
        return rows[start:stop]
    whole = np.zeros((_BLOCK_ROWS, rows.shape[1]), dtype=np.float32)
    whole[skip : skip + stop - start] = rows[start:stop]
    return whole


def transform_rows(apply: Callable[[Float32Array], Float32Array], rows: Float32Array, first: int, dim: int) -> Any:
    """Apply a transform to rows, float32 ``(n, dim)``, block by block as `nearest` does."""
    result = np.empty((len(rows), dim), dtype=np.float32)

    def one(block: tuple[int, int, int]) -> None:
        start, stop, skip = block
        result[start:stop] = apply(_whole_block(rows, block))[skip : skip + stop - start]

    on_threads(one, aligned_blocks(first, len(rows)))
    return result


def partial_sums(
    rows: Float32Array,
    distances: Float32Array,
    labels: Int64Array,
    *,
    grid: Grid,
    lists: int,
    start: int,
    stop: int,
) -> PartialSums:
    """Sum rows by centroid, exactly but for the rounding to the grid.

    Parameters
    ----------
    rows : numpy.ndarray
        float32 ``(n, dim)``.
    distances, labels : numpy.ndarray
        ``(n,)``, as `nearest` gives them.
    grid : Grid
        Of all rows of all parts.
    lists : int
        Centroids.
    start, stop : int
        Dimensions to sum.
    """
    shifts = grid.shifts()
    sums = np.zeros((len(shifts) * lists, stop - start))
    kinds = grid.class_of(row_exponents(rows)) if len(shifts) > 1 else None
    keys = labels if kinds is None else kinds * lists + labels

    def add(dims: tuple[int, int]) -> None:
        own = sums[:, dims[0] - start : dims[1] - start]
        for at in range(0, len(rows), _SORT_ROWS):
            part = slice(at, at + _SORT_ROWS)
            _add_rows(own, rows[part, dims[0] : dims[1]], keys[part], shifts, None if kinds is None else kinds[part])

    on_threads(add, [(dim, min(dim + _SUM_DIMS, stop)) for dim in range(start, stop, _SUM_DIMS)])
    return PartialSums(
        np.bincount(labels, minlength=lists), sums.reshape(len(shifts), lists, stop - start), _sums_by_class(distances)
    )


def _add_rows(
    sums: Float64Array, rows: Float32Array, keys: Int64Array, shifts: Float64Array, kinds: NDArray[np.intp] | None
) -> None:
    # numpy sorts 16-bit numbers by their digits.
    order = np.argsort(keys.astype(np.uint16) if len(sums) <= 1 << 16 else keys, kind="stable")
    for at in range(0, len(order), _SUM_ROWS):
        some = order[at : at + _SUM_ROWS]
        shift = shifts[0] if kinds is None else shifts[kinds[some], None]
        values = np.add(rows[some], shift, dtype=np.float64)
        values -= shift
        found = keys[some]
        starts = np.flatnonzero(np.append(True, found[1:] != found[:-1]))
        sums[found[starts]] += np.add.reduceat(values, starts, axis=0)


def _sums_by_class(values: Float32Array) -> Float64Array:
    """Sum values by class of magnitude, exactly; for up to 2**30 of them over all parts."""
    kinds = (_GREATEST_EXPONENT - np.maximum(_exponents(np.abs(values)), _LEAST_EXPONENT)) // _DISTANCE_CLASS_BITS
    count = (_GREATEST_EXPONENT - _LEAST_EXPONENT) // _DISTANCE_CLASS_BITS + 1
    shifts = np.array([_shift(_GREATEST_EXPONENT - _DISTANCE_CLASS_BITS * kind, 1 << 30) for kind in range(count)])
    own = shifts[kinds]
    return np.bincount(kinds, weights=(values + own) - own, minlength=count).astype(np.float64)


def objective_of(distances: Float64Array) -> float:
    """Return the objective from the distances of all `PartialSums`, added."""
    return math.fsum(distances.tolist())


def means_of(counts: Int64Array, sums: Float64Array) -> Float32Array:
    """Return the mean row of each centroid from sums by class, float32 ``(lists, dimensions)``; zero without rows."""
    total = sums[0].copy()
    for more in sums[1:]:
        total += more
    total /= np.maximum(counts, 1)[:, None]
    means: Float32Array = total.astype(np.float32)
    return means


def moved_centroids(plan: KMeansPlan, counts: Int64Array, means: Float32Array) -> Float32Array:
    """Return the next centroids: means, with each empty cluster replaced by half of a big one.

    Parameters
    ----------
    plan : KMeansPlan
        Settings.
    counts : numpy.ndarray
        int64 ``(lists,)``.
    means : numpy.ndarray
        float32 ``(lists, dim)``; changed in place.
    """
    rows, lists = int(counts.sum()), len(counts)
    sizes = counts.astype(np.float32)
    random = np.random.RandomState(_SPLIT_SEED)  # the Mersenne twister that FAISS uses, seeded alike
    for empty in np.flatnonzero(counts == 0).tolist():
        big = _cluster_to_split(sizes, rows - lists, random)
        means[empty] = means[big]
        for dims, sign in ((slice(0, None, 2), 1), (slice(1, None, 2), -1)):
            means[empty, dims] = means[empty, dims].astype(np.float64) * (1 + sign * _SPLIT_STEP)
            means[big, dims] = means[big, dims].astype(np.float64) * (1 - sign * _SPLIT_STEP)
        sizes[empty] = sizes[big] / 2
        sizes[big] -= sizes[empty]
    if plan.spherical:
        faiss.normalize_L2(means)
    return means


def _cluster_to_split(sizes: Float32Array, spare: int, random: np.random.RandomState) -> int:
    """Go through the clusters until one is drawn, with a probability that grows with its size."""
    odds = ((sizes - 1.0) / np.float32(spare)).astype(np.float32)
    # As many draws as FAISS makes, so that the next cluster sees the numbers that it would see there.
    while True:
        state = random.get_state()
        drawn = random.randint(0, 2**32, size=len(sizes), dtype=np.uint32).astype(np.float32) / np.float32(2**32 - 1)
        hits = np.flatnonzero(drawn < odds)
        if len(hits):
            random.set_state(state)
            random.randint(0, 2**32, size=int(hits[0]) + 1, dtype=np.uint32)
            return int(hits[0])


def settled(plan: KMeansPlan, before: float | None, after: float) -> bool:
    """Tell whether an iteration has changed so little that it is the last."""
    return before is not None and abs(before - after) <= plan.gain * abs(before)


def on_threads(work: Callable[[T], R], items: Iterable[T], *, threads: int | None = None) -> list[R]:
    """Do work on as many threads as FAISS may use here, each of which FAISS uses alone."""
    count = int(faiss.omp_get_max_threads()) if threads is None else threads
    with ThreadPoolExecutor(count, "dfaiss-train", initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, items))


def _exponents(magnitudes: Float32Array) -> NDArray[np.int32]:
    exponents = np.frexp(magnitudes)[1]
    return np.where(magnitudes == 0, np.int32(_ZERO_EXPONENT), exponents)


def _shift(top: int, rows: int) -> float:
    """Return the number to add and take away so that sums of so many values below ``2 ** top`` are exact.

    Sums stay below ``2 ** (top + bits)``, so multiples of ``2 ** (top + bits - 53)`` add exactly; a float64 between
    ``2 ** 52`` and ``2 ** 53`` such units holds whole units only.
    """
    bits = max((rows - 1).bit_length(), 2)
    return math.ldexp(1.5, top + bits - 53 + 52)
