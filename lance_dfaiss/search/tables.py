"""The tables that searches return, in process and from servers alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InvalidArgument
from ..types import (
    DISTANCE_COLUMN,
    MISSING_ROW_ID,
    QUERY_INDEX_COLUMN,
    ROW_ID_COLUMN,
    Float32Array,
    UInt64Array,
)
from .arguments import OWN_COLUMNS

__all__ = ["columns_with_vectors", "result_table"]


def columns_with_vectors(
    name: str, columns: list[str] | dict[str, str] | None, with_vectors: bool
) -> list[str] | dict[str, str] | None:
    """Return the columns to fetch, the vectors among them if they are wanted.

    Parameters
    ----------
    name : str
        The vector column.
    columns : list or dict or None
        As checked by `arguments.checked_columns`.
    with_vectors : bool
        Whether to fetch it, whatever the columns are.

    Raises
    ------
    InvalidArgument
        If an expression has the name of the vector column.
    """
    if not with_vectors or columns is None:
        return columns
    if isinstance(columns, dict) and columns.get(name, name) not in (name, f"`{name}`"):
        raise InvalidArgument(
            f"columns makes a column {name!r}, and with_vectors=True fetches one of that name",
            remedy="Give it another name",
            parameter="columns",
            value=columns,
        )
    if name in columns:
        return columns
    return {**columns, name: name} if isinstance(columns, dict) else [*columns, name]


def result_table(
    distances: Float32Array,
    row_ids: UInt64Array,
    fetched: pa.Table | None,
    *,
    single: bool,
    metadata: Mapping[bytes, bytes] | None = None,
) -> pa.Table:
    """Return results as a table like ``dataset.to_table(nearest=...)`` does.

    Parameters
    ----------
    distances, row_ids : numpy.ndarray
        float32 and uint64 ``(n_queries, width)``; `MISSING_ROW_ID` where there is none.
    fetched : pyarrow.Table or None
        Columns of the results that are rows, query by query.
    single : bool
        There was one query, which was no batch.
    metadata : mapping, optional
        Of the schema.
    """
    found = row_ids != MISSING_ROW_ID
    arrays: list[Any] = [pa.array(distances[found], pa.float32()), pa.array(row_ids[found], pa.uint64())]
    fields = [pa.field(DISTANCE_COLUMN, pa.float32()), pa.field(ROW_ID_COLUMN, pa.uint64())]
    if fetched is not None:
        kept = [name for name in fetched.schema.names if name not in OWN_COLUMNS]
        arrays = [fetched.column(name) for name in kept] + arrays
        fields = [fetched.schema.field(name) for name in kept] + fields
    if not single:
        query = np.repeat(np.arange(len(distances), dtype=np.int32), found.sum(axis=1))
        arrays.insert(0, pa.array(query))
        fields.insert(0, pa.field(QUERY_INDEX_COLUMN, pa.int32(), nullable=False))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=metadata))
