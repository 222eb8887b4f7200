"""What is known of a new shard's positions while its rows are found, and what its record says of them in the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..manifest import Cover, RunTable, ShardTask, SkipCounts
from ..types import Int64Array, UInt64Array
from .tables import constant_runs, false_runs, id_runs, join_constant_runs, join_id_runs

__all__ = ["RowBook"]


class RowBook:
    """Keeps account of a shard's positions, block by block, in any order.

    Parameters
    ----------
    task : ShardTask
        The shard.
    stable : bool
        Whether rows have ids that stay.
    """

    def __init__(self, task: ShardTask, *, stable: bool) -> None:
        self.task = task
        self.stable = stable
        self.covered: NDArray[np.bool_] = np.zeros(task.physical_rows, dtype=bool)
        self.indexed: NDArray[np.bool_] = np.zeros(task.physical_rows, dtype=bool)
        self.null = self.non_finite = self.zero = 0
        self._row_ids: list[NDArray[np.uint64]] = []
        self._updated: list[NDArray[np.uint64]] = []

    def add_ids(self, positions: Int64Array, row_ids: UInt64Array) -> None:
        """Enter the ids of rows."""
        self._row_ids.append(id_runs(positions, row_ids))

    def add_versions(self, positions: Int64Array, versions: UInt64Array) -> None:
        """Enter the versions that wrote rows."""
        self._updated.append(constant_runs(positions, versions))

    def skipped(self) -> SkipCounts:
        """Return rows without an entry, by reason."""
        return SkipCounts(
            deleted=self.task.physical_rows - int(np.count_nonzero(self.covered)),
            null=self.null,
            non_finite=self.non_finite,
            zero=self.zero,
        )

    def cover(self) -> Cover:
        """Return what the shard covers."""
        return Cover(
            physical_rows=self.task.physical_rows,
            fragments=self.task.fragments,
            row_ids=RunTable.of(join_id_runs(_sorted(self._row_ids))) if self.stable else None,
            skipped=RunTable.of(false_runs(self.indexed)),
            deleted=RunTable.of(false_runs(self.covered)),
            remap=None,
            updated=RunTable.of(join_constant_runs(_sorted(self._updated))) if self.stable else None,
        )


def _sorted(parts: Sequence[NDArray[np.uint64]]) -> list[NDArray[np.uint64]]:
    """Order the runs of several blocks by position; no two of them overlap."""
    runs = np.concatenate([np.empty((0, 3), dtype=np.uint64), *parts])
    return [runs[np.argsort(runs[:, 0], kind="stable")]]
