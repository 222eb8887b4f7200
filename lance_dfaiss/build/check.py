"""Measure recall without a second pass: what each shard found exactly and by its codes, merged.

Every shard task scores the held-out queries exactly against the vectors that stream by, and searches
its finished shard with them at several widths. Merging both gives the exact neighbours of the whole
and what the merged index will answer, candidate for candidate. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from ..manifest import RecallPoint, RecallReport
from ..plan import RowCost
from ..spec import ResolvedSpec, SearchOptions
from ..types import AUTO_RECALL_TARGET, Float32Array, Int64Array

__all__ = [
    "EXACT_NEIGHBORS",
    "ExactScorer",
    "RecallMeter",
    "ShardCheck",
    "arrays_of",
    "check_widths",
    "choose_defaults",
    "k_factors",
]

EXACT_NEIGHBORS = 100
"""Exact neighbours kept per query and shard."""

RECALL_K = 10
"""Recall is measured at this k."""

# Rows scored at a time: the table of scores is 200 times as many floats.
_SCORED_ROWS = 16_384

_K_FACTORS = (2, 4, 8, 16)
_EF_WIDTHS = (16, 32, 64, 128, 256)

# FAISS widens ef to the number of candidates, so with a refine store no more are asked for than ef.
_REFINED_EF_WIDTHS = (64, 128, 256)
_HNSW_K_FACTORS = (2, 4)
_NPROBE_STEPS = 5
_MIN_NPROBE = 8

# Reading a refine code is a cache miss; a list is read in order. About this many times dearer a byte.
_RANDOM_READ_COST = 8


_Ranked: TypeAlias = tuple[Any, ...]
"""Arrays ``(n_queries, count)`` in step: what they are ranked by, positions, and more."""


@dataclass(frozen=True, slots=True, eq=False)
class ShardCheck:
    """What one shard found for the held-out queries; positions count from the shard's first.

    Parameters
    ----------
    exact_distances, exact_positions : numpy.ndarray
        float32 and int64 ``(n_queries, 100)``, best first; +inf and -1 for none. Smaller is better.
    positions, code_distances, final_distances : numpy.ndarray
        int64 and float32 ``(n_widths, n_queries, count)``: candidates by code, best first.
    """

    exact_distances: Float32Array
    exact_positions: Int64Array
    positions: Int64Array
    code_distances: Float32Array
    final_distances: Float32Array


class ExactScorer:
    """Keeps the exact nearest rows of some queries while vectors stream by.

    Parameters
    ----------
    queries : numpy.ndarray
        float32 ``(n_queries, dim)``, prepared.
    similarity : bool
        Score by inner product (cosine, dot) instead of squared distance.
    own_positions : numpy.ndarray
        int64 ``(n_queries,)``: position of the query's own row, which is left out; -1 for none.
    """

    def __init__(self, queries: Float32Array, *, similarity: bool, own_positions: Int64Array) -> None:
        # Scores are -qx, or |x|^2 - 2qx: |q|^2 is the same for all candidates of a query and left out.
        # For that the origin is put among the queries: far from it, float32 would leave nothing but rounding.
        nowhere = similarity or not len(queries)
        self._origin = np.zeros(queries.shape[1], np.float32) if nowhere else queries.mean(axis=0)
        self._weights = queries * np.float32(-1) if similarity else (queries - self._origin) * np.float32(-2)
        self._similarity = similarity
        self.own_positions = own_positions
        self._best = np.full((len(queries), EXACT_NEIGHBORS), np.inf, dtype=np.float32)
        self._places = np.full((len(queries), EXACT_NEIGHBORS), -1, dtype=np.int64)
        self._waiting: list[tuple[Int64Array, Float32Array, Int64Array]] = []
        self._num_waiting = 0

    def add(self, positions: Int64Array, vectors: Float32Array) -> None:
        """Score one block.

        Parameters
        ----------
        positions : numpy.ndarray
            int64 ``(n,)``, increasing.
        vectors : numpy.ndarray
            float32 ``(n, dim)``, prepared.
        """
        if len(self._weights):
            for start in range(0, len(positions), _SCORED_ROWS):
                part = slice(start, start + _SCORED_ROWS)
                self._score(positions[part], vectors[part])

    def _score(self, positions: Int64Array, vectors: Float32Array) -> None:
        if not self._similarity:
            vectors = vectors - self._origin
        scores = self._weights @ vectors.T
        if not self._similarity:
            scores += np.einsum("ij,ij->i", vectors, vectors)
        inside = np.flatnonzero((self.own_positions >= positions[0]) & (self.own_positions <= positions[-1]))
        for query in inside.tolist():
            scores[query, positions == self.own_positions[query]] = np.inf
        if np.isinf(self._best[0, -1]) and scores.shape[1] > EXACT_NEIGHBORS:
            columns = np.argpartition(scores, EXACT_NEIGHBORS - 1, axis=1)[:, :EXACT_NEIGHBORS]
            queries = np.repeat(np.arange(len(scores)), EXACT_NEIGHBORS)
            self._hold(queries, scores[queries, columns.ravel()], positions[columns.ravel()])
            self._settle()
            return
        queries, found = np.divmod(np.flatnonzero(scores < self._best[:, -1:]), scores.shape[1])
        self._hold(queries, scores[queries, found], positions[found])
        # Sorting is put off until as many are waiting as are kept: the bound is a little old, never wrong.
        if self._num_waiting >= self._best.size:
            self._settle()

    def result(self) -> tuple[Float32Array, Int64Array]:
        """Return scores (smaller is better) and positions, ``(n_queries, 100)``; +inf and -1 for none."""
        self._settle()
        return self._best, self._places

    def _hold(self, queries: Int64Array, scores: Float32Array, positions: Int64Array) -> None:
        self._waiting.append((queries, scores, positions))
        self._num_waiting += len(queries)

    def _settle(self) -> None:
        """Merge what is waiting into the best."""
        if not self._num_waiting:
            return
        count = len(self._best)
        kept = np.repeat(np.arange(count), EXACT_NEIGHBORS)
        parts = [(kept, self._best.ravel(), self._places.ravel()), *self._waiting]
        queries, scores, places = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort((places, scores, queries))
        firsts = np.searchsorted(queries[order], np.arange(count))
        chosen = order[firsts[:, None] + np.arange(EXACT_NEIGHBORS)]
        self._best, self._places = scores[chosen], places[chosen]
        self._waiting, self._num_waiting = [], 0


def check_widths(spec: ResolvedSpec, family: str) -> tuple[int, ...]:
    """Return the widths (nprobe, or ef of HNSW) at which recall is measured."""
    if family == "hnsw":
        return _EF_WIDTHS if spec.refine is None else _REFINED_EF_WIDTHS
    if family == "flat":
        return (1,)
    first = max(_MIN_NPROBE, spec.num_partitions // 128)
    steps = [min(first << step, spec.num_partitions) for step in range(_NPROBE_STEPS)]
    return tuple(sorted(set(steps)))


class RecallMeter:
    """Merges the checks of a generation's shards, one by one, and reports recall@10.

    Parameters
    ----------
    spec : ResolvedSpec
        What was built.
    cost : RowCost
        Weighs list scans against refining when the default widths are chosen.
    target : float
        Recall that the default widths should reach.
    """

    def __init__(self, spec: ResolvedSpec, cost: RowCost, *, target: float = AUTO_RECALL_TARGET) -> None:
        self._spec = spec
        self._target = target
        self._cost = cost
        self._widths = check_widths(spec, cost.family)
        self._factors = k_factors(spec, cost.family)
        self._exact: _Ranked | None = None
        self._answers: dict[tuple[int, int], _Ranked] = {}

    def add(self, first_position: int, check: ShardCheck) -> None:
        """Take one shard's check; its positions begin at ``first_position`` of the generation."""
        exact = (check.exact_distances, _shifted(check.exact_positions, first_position))
        self._exact = _merged(self._exact, exact, EXACT_NEIGHBORS)
        positions = _shifted(check.positions, first_position)
        for index in range(len(self._widths)):
            codes = np.where(positions[index] < 0, np.inf, check.code_distances[index])
            finals = np.where(positions[index] < 0, np.inf, check.final_distances[index])
            count = RECALL_K * self._factors[-1]
            if self._cost.family != "hnsw":
                # The shards will be one index: its candidates are the best by code of all of them.
                found = (codes, positions[index], finals)
                self._answers[index, 0] = _merged(self._answers.get((index, 0)), found, count)
                continue
            # The shards stay apart: each brings the best of its own candidates.
            _, places, ranked = _merged(None, (codes, positions[index], finals), count)
            for factor in self._factors:
                best = (ranked[:, : RECALL_K * factor], places[:, : RECALL_K * factor])
                self._answers[index, factor] = _merged(self._answers.get((index, factor)), best, RECALL_K)

    def report(self, rows: int) -> RecallReport | None:
        """Return what was measured, for so many indexed rows.

        Returns
        -------
        RecallReport or None
            None when there were no queries, or fewer than two rows to find.
        """
        k = min(RECALL_K, rows - 1)
        if self._exact is None or not len(self._exact[0]) or k < 1:
            return None
        truth = self._exact[1][:, :k]
        points = []
        for index, width in enumerate(self._widths):
            for factor in self._factors:
                options = _options(self._cost.family, width, factor if self._spec.refine is not None else None)
                points.append(RecallPoint(options=options, recall=_recall(self._answer(index, factor, k), truth)))
        return RecallReport(
            k=k,
            queries=len(truth),
            points=tuple(points),
            defaults=choose_defaults(points, spec=self._spec, cost=self._cost, rows=rows, target=self._target),
            method="held-out rows of the dataset, own row left out, against exact search while encoding",
        )

    def _answer(self, index: int, factor: int, k: int) -> Int64Array:
        if self._cost.family == "hnsw":
            return cast("Int64Array", self._answers[index, factor][1][:, :k])
        _, positions, finals = (array[:, : k * factor] for array in self._answers[index, 0])
        order = np.argsort(finals, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(positions, order, axis=1)


def k_factors(spec: ResolvedSpec, family: str) -> tuple[int, ...]:
    """Return the k_factors at which recall is measured; 1 alone without a refine store."""
    if spec.refine is None:
        return (1,)
    return _HNSW_K_FACTORS if family == "hnsw" else _K_FACTORS


def choose_defaults(
    points: Sequence[RecallPoint],
    *,
    spec: ResolvedSpec,
    cost: RowCost,
    rows: int,
    target: float = AUTO_RECALL_TARGET,
) -> SearchOptions:
    """Return the cheapest measured widths that reach the recall target, or the best there are."""
    good = [point for point in points if point.recall >= target]
    if good:
        return min(good, key=lambda point: _work(point.options, spec=spec, cost=cost, rows=rows)).options
    return max(points, key=lambda point: point.recall).options


def arrays_of(check: ShardCheck) -> Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Return a check as named arrays, to be stored."""
    return {name: getattr(check, name) for name in ShardCheck.__slots__}


def _options(family: str, width: int, factor: int | None) -> SearchOptions:
    if family == "ivf":
        return SearchOptions(nprobe=width, k_factor=factor)
    if family == "hnsw":
        return SearchOptions(ef=width, k_factor=factor)
    return SearchOptions(k_factor=factor)


def _work(options: SearchOptions, *, spec: ResolvedSpec, cost: RowCost, rows: int) -> float:
    """Bytes a query touches, those read in no order weighed."""
    refined = RECALL_K * (options.k_factor or 0) * cost.refine_bytes * _RANDOM_READ_COST
    if options.ef is not None:
        return options.ef * cost.code_bytes * _RANDOM_READ_COST + refined
    scanned = rows * cost.code_bytes * (options.nprobe or 1) / max(spec.num_partitions, 1)
    return scanned + refined


def _merged(held: _Ranked | None, more: _Ranked, count: int) -> _Ranked:
    """Return the best ``count`` of two rankings (or of one), by their first array, earlier ones first."""
    both = more if held is None else [np.concatenate(pair, axis=1) for pair in zip(held, more, strict=True)]
    order = np.argsort(both[0], axis=1, kind="stable")[:, :count]
    return tuple(np.take_along_axis(array, order, axis=1) for array in both)


def _shifted(positions: Int64Array, first: int) -> Int64Array:
    return np.where(positions < 0, -1, positions + first)


def _recall(answer: Int64Array, truth: Int64Array) -> float:
    hits = sum(np.isin(found[found >= 0], true).sum() for found, true in zip(answer, truth, strict=True))
    wanted = int((truth >= 0).sum())
    return float(hits / wanted) if wanted else 1.0
