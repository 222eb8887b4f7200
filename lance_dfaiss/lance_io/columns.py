"""Columns of a dataset version in RAM, to filter by."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any, cast

import lance
import numpy as np
from lance import LanceDataset

from ..errors import (
    InvalidFilter,
    UnknownColumn,
)
from ..types import UInt64Array
from .failures import lance_errors
from .fields import (
    OFFSET_MASK,
    arrow_field,
)
from .filters import matching_rows
from .pinned import PinnedDataset

__all__ = ["ColumnsInMemory"]

# Rows of a file of columns held in RAM: with whole files, a row's number follows from its address.
_HELD_ROWS = 1 << 24

# Names that mean another thing in a copy of the columns.
_SYSTEM_COLUMN = re.compile(r"\b_row", re.IGNORECASE)


class ColumnsInMemory:
    """Some columns of a dataset version in RAM, to filter by without reading the dataset.

    Deleted rows are held too, so that a version with more or fewer of them is served as well.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    columns : sequence of str
        Columns to keep; of a nested one the whole struct is kept.
    fragment_ids : sequence of int, optional
        Whose rows to keep; all by default. Other rows never match.

    Raises
    ------
    UnknownColumn
        If there is no such column.
    """

    def __init__(
        self, pinned: PinnedDataset, columns: Sequence[str], fragment_ids: Sequence[int] | None = None
    ) -> None:
        for name in columns:
            arrow_field(pinned.lance.schema, name)
        self._fragment_ids = None if fragment_ids is None else list(fragment_ids)
        self._hold(pinned, list(dict.fromkeys(name.split(".")[0] for name in columns)))

    def _hold(self, pinned: PinnedDataset, wanted: list[str]) -> None:
        self._wanted = wanted
        self._state = _state_of(pinned)
        self._held: LanceDataset | None = None
        self._addresses: UInt64Array = np.zeros(0, dtype=np.uint64)
        self.ram_bytes = 0
        """Bytes of the columns and of the rows' addresses."""
        # Lance looks a name up without regard to case where none is spelled that way: hold all it could mean.
        spelled = {name.lower() for name in wanted}
        columns = [name for name in pinned.lance.schema.names if name.lower() in spelled]
        if not columns:
            return
        with lance_errors(pinned.uri):
            # Lance hands out deleted rows only with row ids, which tell them by a null; all rows come in order.
            table = pinned.lance.scanner(
                columns=columns,
                with_row_id=True,
                include_deleted_rows=True,
                scan_in_order=True,
                fragments=None if self._fragment_ids is None else pinned.fragments_of(self._fragment_ids),
            ).to_table()
            kept = table.select(columns)
            self._held = lance.write_dataset(kept, f"memory://{uuid.uuid4().hex}", max_rows_per_file=_HELD_ROWS)
        wanted_fragments = (
            pinned.lance.get_fragments() if self._fragment_ids is None else pinned.fragments_of(self._fragment_ids)
        )
        fragments = [(f.fragment_id, f.metadata.physical_rows) for f in wanted_fragments]
        ranges = [np.arange(i << 32, (i << 32) + rows, dtype=np.uint64) for i, rows in fragments]
        self._addresses = np.concatenate([self._addresses, *ranges])
        self.ram_bytes = int(kept.nbytes + self._addresses.nbytes)

    def at(self, pinned: PinnedDataset) -> ColumnsInMemory:
        """Return the columns at another version, as far as it has them; themselves, if nothing was written there."""
        if self.serves(pinned):
            return self
        moved = ColumnsInMemory.__new__(ColumnsInMemory)
        moved._fragment_ids = self._fragment_ids
        moved._hold(pinned, self._wanted)
        return moved

    def serves(self, pinned: PinnedDataset) -> bool:
        """Tell whether another version differs in nothing but deleted rows."""
        return _state_of(pinned) == self._state

    def matching(self, filter_sql: str) -> UInt64Array | None:
        """Return the addresses of rows that a filter matches, deleted ones among them, uint64 ``(n,)``.

        Parameters
        ----------
        filter_sql : str
            Lance's SQL.

        Returns
        -------
        numpy.ndarray or None
            None if the filter asks for more than is here.
        """
        if self._held is None or _SYSTEM_COLUMN.search(filter_sql):
            return None
        try:
            rows = matching_rows(self._held, filter_sql, None, "memory")
        except (InvalidFilter, UnknownColumn):
            return None  # of another column, or wrong: the dataset itself will say
        numbers = (rows >> np.uint64(32)) * np.uint64(_HELD_ROWS) + (rows & OFFSET_MASK)
        return cast("UInt64Array", self._addresses[numbers])


def _state_of(pinned: PinnedDataset) -> tuple[dict[tuple[str, ...], int], list[dict[str, Any]]]:
    """Return the fields and the fragments without their deletions: equal ones hold equal values under equal names."""
    fields: dict[tuple[str, ...], int] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [
        ((field.name(),), field) for field in pinned.lance.lance_schema.fields()
    ]
    while waiting:
        path, field = waiting.pop()
        fields[path] = int(field.id())
        waiting += [((*path, child.name()), child) for child in field.children()]
    fragments = [fragment.metadata.to_json() for fragment in pinned.lance.get_fragments()]
    for fragment in fragments:
        del fragment["deletion_file"]
    return fields, cast("list[dict[str, Any]]", fragments)
