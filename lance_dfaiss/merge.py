"""Merge answers of several segments, shards or servers into one: pure numpy.

Distances are Lance's values here, smaller is better for every metric, so there is one direction to
merge in and no sign to get wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .types import MISSING_ROW_ID, Float32Array, UInt64Array

__all__ = ["merge_topk", "order_ties"]


def merge_topk(parts: Sequence[tuple[Float32Array, UInt64Array]], k: int) -> tuple[Float32Array, UInt64Array]:
    """Return the best k of several answers to the same queries.

    Parameters
    ----------
    parts : sequence of (numpy.ndarray, numpy.ndarray)
        Distances float32 and row ids uint64, each ``(n_queries, any width)``; missing results have
        distance +inf and row id `MISSING_ROW_ID`. No row id may appear twice for one query.
    k : int
        Results per query.

    Returns
    -------
    tuple of (numpy.ndarray, numpy.ndarray)
        ``(n_queries, k)``: ascending distance, ties by ascending row id, missing ones last.
    """
    distances = np.concatenate([distances for distances, _ in parts], axis=1)
    row_ids = np.concatenate([row_ids for _, row_ids in parts], axis=1)
    short = k - distances.shape[1]
    if short > 0:
        distances = np.pad(distances, ((0, 0), (0, short)), constant_values=np.inf)
        row_ids = np.pad(row_ids, ((0, 0), (0, short)), constant_values=MISSING_ROW_ID)
    order = np.lexsort((row_ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(row_ids, order, axis=1)


def order_ties(distances: Float32Array, row_ids: UInt64Array) -> tuple[Float32Array, UInt64Array]:
    """Return an answer, already ascending in distance, with equal distances in order of row id.

    Parameters
    ----------
    distances : numpy.ndarray
        float32 ``(n_queries, k)``, ascending along each row.
    row_ids : numpy.ndarray
        uint64, same shape.
    """
    # Ties are rare: look before sorting.
    if not np.less_equal(distances[:, 1:], distances[:, :-1]).any():
        return distances, row_ids
    order = np.lexsort((row_ids, distances), axis=1)
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(row_ids, order, axis=1)
