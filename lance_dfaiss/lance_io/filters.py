"""Which rows a filter in Lance's SQL matches."""

from __future__ import annotations

import re
from typing import Any, cast

from lance import LanceDataset

from ..errors import (
    InvalidFilter,
    StorageError,
    UnknownColumn,
)
from ..types import UInt64Array
from .failures import LANCE_SOURCE, UNKNOWN_FIELD, UNREADABLE, LancePanic, first_line, panics_told
from .fields import (
    ADDRESS_COLUMN,
)

__all__ = ["matching_rows"]

# What a filter reads is narrow, and a batch costs as much as some thousand rows: 2.4 ms a million rows instead of 4.5
# with Lance's 8,192 rows and 16 batches ahead, which hold as many rows at a time.
_FILTER_BATCH_ROWS = 32_768

_FILTER_READAHEAD = 4

# More is read no faster, and of wide columns lies about in RAM: 250 MB instead of 500 with texts of 1 KB.
_FILTER_IO_BUFFER_BYTES = 32 * 1024 * 1024

# All that Lance says where its planner came upon a part of SQL that it has no code for ($1, :name, N'text').
_PANIC = "Task was aborted"

# How it says that it cannot fold constants, as in - cast(null as timestamp); nothing was read then.
_INTERNAL = re.compile(r"(?s)Internal error: .*DataFusion")


def matching_rows(dataset: LanceDataset, filter_sql: str, fragments: list[Any] | None, uri: str) -> UInt64Array:
    """Return the addresses of the live rows that match; see `PinnedDataset.matching`."""
    try:
        with panics_told():
            table = dataset.scanner(
                columns=[],
                with_row_address=True,
                filter=filter_sql,
                fragments=fragments,
                scan_in_order=True,
                batch_size=_FILTER_BATCH_ROWS,
                batch_readahead=_FILTER_READAHEAD,
                io_buffer_size=_FILTER_IO_BUFFER_BYTES,
            ).to_table()
    except ValueError as exc:
        said = LANCE_SOURCE.sub("", str(exc).strip())
        if UNREADABLE.match(said) and not _INTERNAL.search(said):
            raise StorageError(f"Lance could not read {uri}: {said}", location=uri) from exc
        unknown = UNKNOWN_FIELD.search(said)
        if unknown:
            names = tuple(dataset.schema.names)
            raise UnknownColumn(
                f"the filter {filter_sql!r} names a column that the dataset does not have: {said}",
                remedy=f"It has {', '.join(names)}",
                column=unknown[1].strip('"'),
                available=names,
            ) from exc
        raise InvalidFilter(
            f"Lance cannot use the filter {filter_sql!r}: {said}", parameter="filter", value=filter_sql
        ) from exc
    except (OSError, RuntimeError) as exc:
        if isinstance(exc, LancePanic) or str(exc) == _PANIC:
            raise InvalidFilter(
                f"Lance gave up on the filter {filter_sql!r}: it holds something that is not implemented",
                parameter="filter",
                value=filter_sql,
            ) from exc
        raise StorageError(f"Lance could not read {uri}: {first_line(exc)}", location=uri) from exc
    return cast("UInt64Array", table[ADDRESS_COLUMN].to_numpy())
