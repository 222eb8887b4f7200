"""Tables of what is said about positions, made from rows one by one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..types import Int64Array, UInt64Array

__all__ = ["constant_runs", "false_runs", "id_runs", "join_constant_runs", "join_id_runs"]


def id_runs(positions: Int64Array, row_ids: UInt64Array) -> NDArray[np.uint64]:
    """Return ``(first position, first row id, length)`` of runs where both count up by one."""
    if not len(positions):
        return np.empty((0, 3), dtype=np.uint64)
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(row_ids) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(positions)])))
    return np.stack((positions[starts].astype(np.uint64), row_ids[starts], lengths.astype(np.uint64)), axis=1)


def join_id_runs(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Join runs that go on over the border of two blocks."""
    if not parts:
        return np.empty((0, 3), dtype=np.uint64)
    runs = np.concatenate(parts)
    if len(runs) < 2:
        return runs
    ends = runs[:-1, :2] + runs[:-1, 2:]
    goes_on = (ends == runs[1:, :2]).all(axis=1)
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    joined: NDArray[np.uint64] = runs[starts].copy()
    joined[:, 2] = np.add.reduceat(runs[:, 2], starts)
    return joined


def constant_runs(positions: Int64Array, values: UInt64Array) -> NDArray[np.uint64]:
    """Return ``(first position, value, length)`` of runs of neighbours with one value."""
    if not len(positions):
        return np.empty((0, 3), dtype=np.uint64)
    breaks = np.flatnonzero((np.diff(positions) != 1) | (values[1:] != values[:-1])) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(positions)])))
    return np.stack((positions[starts].astype(np.uint64), values[starts], lengths.astype(np.uint64)), axis=1)


def join_constant_runs(parts: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Join runs of one value that go on over the border of two blocks."""
    runs = np.concatenate([np.empty((0, 3), dtype=np.uint64), *parts])
    if len(runs) < 2:
        return runs
    goes_on = (runs[:-1, 0] + runs[:-1, 2] == runs[1:, 0]) & (runs[:-1, 1] == runs[1:, 1])
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    joined: NDArray[np.uint64] = runs[starts].copy()
    joined[:, 2] = np.add.reduceat(runs[:, 2], starts)
    return joined


def false_runs(mask: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return ``(first position, length)`` of the runs of False."""
    edges = np.flatnonzero(np.diff(np.concatenate(([True], mask, [True])).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    return np.stack((starts, ends - starts), axis=1).astype(np.uint64)
