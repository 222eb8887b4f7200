"""Keeping indexes true over what moves rows: after a compaction, and before a cleanup removes its record.

An index follows a compaction through the transaction that made it. Once `sync_index` has written down
where the rows went, the transaction may go.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from lance.dataset import DatasetOptimizer

from ..build.update import sync_index
from ..lance_io import LanceDataset, PinnedDataset
from ..pointers import stored_pointers
from .native import plain, signed_like
from .opened import Locations

__all__ = ["DfaissOptimizer", "persist_moves"]

_log = logging.getLogger(__name__)


class DfaissOptimizer(DatasetOptimizer):
    """Lance's optimizer; after a compaction, this package's indexes have written down where their rows went.

    Parameters
    ----------
    dataset : lance.LanceDataset
        What to optimize; moves with every operation.
    locations : Locations
        Where indexes may lie beside the dataset's own folder.
    """

    def __init__(self, dataset: LanceDataset, locations: Locations) -> None:
        super().__init__(dataset)
        self._locations = locations

    @signed_like(DatasetOptimizer.compact_files)
    def compact_files(self, **options: Any) -> Any:
        """Compact, as Lance does, and persist where the rows of this package's indexes went.

        The dataset moves to the newest version. A move that cannot be persisted is a warning, not an error.

        Parameters
        ----------
        **options
            As Lance takes them.

        Returns
        -------
        lance.optimize.CompactionMetrics
        """
        metrics = super().compact_files(**options)
        if metrics.fragments_removed:
            persist_moves(self._dataset, self._locations)
        return metrics


def persist_moves(dataset: LanceDataset, locations: Locations) -> int:
    """Run `sync_index` over all indexes; one that fails is a warning and does not stop the others.

    Parameters
    ----------
    dataset : lance.LanceDataset
        Moves to the newest version.
    locations : Locations
        Where indexes may lie beside the dataset's own folder.

    Returns
    -------
    int
        How many indexes had something to persist.
    """
    changed = 0
    for name in _names(dataset, locations):
        try:
            report = sync_index(dataset, name, index_uri=locations.index_uri, allowed_index_uris=locations.allowed)
            changed += report.changed
        # Whatever it was: the compaction is done, and the cleanup was asked for.
        except Exception as exc:
            _warn(f"index {name!r}", exc)
    return changed


def _names(dataset: LanceDataset, locations: Locations) -> Iterable[str]:
    try:
        return stored_pointers(PinnedDataset(plain(dataset)).latest(), locations.index_uri)
    except Exception as exc:
        _warn("the indexes", exc)
        return ()


def _warn(what: str, exc: Exception) -> None:
    _log.warning(
        "where the compacted rows of %s went was not persisted: call sync_index before old versions are cleaned up,"
        " or these rows have to be indexed again (%s)",
        what,
        exc,
    )
