"""Ask a dataset version what a snapshot needs to know, and resolve it."""

from __future__ import annotations

from ..errors import DatasetChanged, UnknownColumn, UnsupportedColumn
from ..lance_io import PinnedDataset
from .load import Generation
from .snapshot import Snapshot, fragments_to_read, resolve_snapshot

__all__ = ["resolve_generation"]


def resolve_generation(pinned: PinnedDataset, generation: Generation) -> Snapshot:
    """Resolve a generation against a dataset version.

    Raises
    ------
    DatasetChanged
        If the version holds rows that the index does not cover, or has no such column.
    """
    name = generation.manifest.dataset.column
    try:
        column = pinned.vector_column(name)
    except (UnknownColumn, UnsupportedColumn) as exc:
        raise DatasetChanged(
            f"dataset version {pinned.version} has no vector column {name!r}, over which the index was built",
            remedy="Open the dataset at a version that has it, or index the column that took its place",
            fragments=(),
        ) from exc
    states = pinned.fragments(column)
    covers = [record.cover for record in generation.records]
    live = {i: pinned.live_offsets(i) for i in fragments_to_read(covers, states)}
    return resolve_snapshot(covers, states, live, version=pinned.version)
