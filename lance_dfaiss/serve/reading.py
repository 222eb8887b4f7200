"""What reads data to answer with: columns and vectors of rows, who may see them, and how much at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import AccessDenied, InvalidArgument, UnknownColumn
from ..types import Int64Array, UInt64Array
from .holdings import Held
from .refusals import over_limit, too_long
from .sql import check_filter
from .wire import Buffer, ReconstructReply, TableReply

__all__ = ["Columns", "Reading", "row_bytes"]

MAX_COLUMNS = 1_000
"""Columns in one request."""

MAX_FETCH_ROWS = 1_000_000
"""Rows in one request for columns."""

MAX_EXPRESSIONS = 64
MAX_EXPRESSION_CHARS = 1_024
MAX_EXPRESSION_ROWS = 10_000
"""Of columns that are computed: a value is about as long as its expression, so all of it is some hundred megabytes."""

MAX_ANSWER_BYTES = 256 * 1024**2
"""Columns in one answer."""

FIRST_ROWS, MORE_ROWS = 512, 8_192
"""Rows that are read before it is known how long they are, and then at once."""

Columns: TypeAlias = "list[str] | dict[str, str] | None"
"""As Lance takes them."""


_OFFSET_BYTES = 8
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


class Reading:
    """Reads columns and vectors of snapshots; its checks are for the event loop, the rest for threads.

    Parameters
    ----------
    allowed : sequence of str or None
        Columns that clients may see; None for all.
    """

    def __init__(self, allowed: tuple[str, ...] | None) -> None:
        self._allowed = allowed

    def check_in_ram(self, held: Held, columns: tuple[str, ...]) -> tuple[str, ...]:
        """Check that columns asked for with a search may be seen, and are in RAM.

        Raises
        ------
        AccessDenied, UnknownColumn, InvalidArgument
            If not.
        """
        if columns:
            self.checked_columns(held, columns, 0)
        missing = [name for name in columns if name not in held.offer.payload]
        if missing:
            raise InvalidArgument(
                f"column {missing[0]!r} is not held in RAM by this server",
                remedy="Fetch it by row id",
                parameter="columns",
                value=missing[0],
            )
        return columns

    def checked_columns(self, held: Held, columns: tuple[str, ...] | dict[str, str] | None, rows: int) -> Columns:
        """Check that columns of so many rows may be seen, and return them as Lance takes them.

        Raises
        ------
        AccessDenied, UnknownColumn, InvalidArgument, FilterRefused
            If they may not, do not exist, or are too many.
        """
        if columns is None:
            return None if self._allowed is None else list(held.offer.columns)
        if len(columns) > MAX_COLUMNS:
            raise InvalidArgument(
                f"{len(columns)} columns in one request, at most {MAX_COLUMNS} are fetched",
                parameter="columns",
                value=len(columns),
            )
        if isinstance(columns, dict):
            self._check_expressions(columns, rows)
            return columns
        for name in columns:
            if _is_offered(held, name) or (self._allowed is None and name.startswith("_")):
                continue
            if self._allowed is not None:  # whether there is such a column is not told either
                raise _denied(held, name)
            raise UnknownColumn(
                f"there is no column {name!r}",
                remedy=f"There is {', '.join(held.offer.columns)}",
                column=name,
                available=held.offer.columns,
            )
        return list(columns)

    def check_vectors(self, held: Held) -> None:
        """Check that vectors may be seen.

        Raises
        ------
        AccessDenied
            If not.
        """
        if self._allowed is not None and not _is_offered(held, held.offer.column):
            raise _denied(held, held.offer.column)

    def columns(
        self, held: Held, row_ids: UInt64Array, columns: Columns, go_on: Callable[[], None]
    ) -> tuple[TableReply, list[Buffer]]:
        """Return columns of rows as they travel.

        Parameters
        ----------
        held : Held
            The snapshot.
        row_ids : numpy.ndarray
            uint64 ``(n,)``; a row may come more than once.
        columns : list or dict or None
            From `checked_columns`.
        go_on : callable
            Called between pieces; raises if nobody waits any more.

        Raises
        ------
        InvalidArgument
            If it would be too much.
        """
        table = _bounded(lambda some: held.view.fetch(some, columns), row_ids, go_on)
        return TableReply(rows=len(table)), [_stream(table)]

    def columns_in_ram(
        self, held: Held, row_ids: UInt64Array, columns: tuple[str, ...], go_on: Callable[[], None]
    ) -> Buffer:
        """Return columns of rows that a search has found; parameters as for `columns`."""
        payload = held.payload
        assert payload is not None  # or `check_in_ram` had refused them

        def take(some: UInt64Array) -> pa.Table:
            return payload.take(held.view.result_addresses(some)).select(list(columns))

        return _stream(_bounded(take, row_ids, go_on))

    def vectors(self, held: Held, row_ids: UInt64Array) -> tuple[ReconstructReply, list[Buffer]]:
        """Return which of some rows are here, and their vectors, as they travel.

        Parameters
        ----------
        held : Held
            The snapshot.
        row_ids : numpy.ndarray
            uint64 ``(n,)``.
        """
        here = held.view.holds(row_ids)
        vectors = held.view.vectors(row_ids[here])
        reply = ReconstructReply(n=len(row_ids), held=len(vectors), dim=held.view.model.spec.dim)
        return reply, [here.astype(np.uint8).tobytes(), vectors.astype("<f4", copy=False).tobytes()]

    def _check_expressions(self, columns: dict[str, str], rows: int) -> None:
        """Check columns that are computed: in this process, so there must not be much of it."""
        plain = all(columns[name] in (name, f"`{name}`") for name in columns)
        longest = max(map(len, columns.values()), default=0)
        for parameter, value, most in (
            ("columns", len(columns), MAX_EXPRESSIONS),
            ("columns", longest, MAX_EXPRESSION_CHARS),
            ("row_ids", rows, MAX_FETCH_ROWS if plain else MAX_EXPRESSION_ROWS),
        ):
            if value > most:
                raise over_limit(parameter, value, most)
        for expression in columns.values():
            check_filter(expression, columns=self._allowed)


def row_bytes(array: pa.Array) -> Int64Array:
    """Return about how many bytes each row of an array takes, int64 ``(n,)``; of a type not known here, at most."""
    kind = array.type
    if isinstance(kind, pa.ExtensionType):
        return row_bytes(array.storage)
    if pa.types.is_dictionary(kind):
        return row_bytes(array.indices)
    if pa.types.is_struct(kind):
        return _summed(array.flatten(), len(array))
    if pa.types.is_map(kind):
        ends = np.asarray(array.offsets, dtype=np.int64)
        return _spans(row_bytes(array.keys) + row_bytes(array.items), ends[:-1], ends[1:])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = np.asarray(array.value_lengths().fill_null(0), dtype=np.int64)
        ends = np.cumsum(lengths)
        return _spans(row_bytes(array.flatten()), ends - lengths, ends)
    if any(test(kind) for test in _TEXTS):
        return np.asarray(pc.binary_length(array).fill_null(0), dtype=np.int64) + _OFFSET_BYTES
    width = _width(kind)
    return np.full(len(array), array.nbytes if width is None else width, np.int64)


def _width(kind: pa.DataType) -> int | None:
    """Return the bytes of one value, where all have as many."""
    if pa.types.is_fixed_size_list(kind):
        width = _width(kind.value_type)
        return None if width is None else width * int(kind.list_size)
    try:
        return max(int(kind.bit_width) // 8, 1)
    except ValueError:
        return None


def _spans(values: Int64Array, starts: Int64Array, ends: Int64Array) -> Int64Array:
    """Return the sums of some spans of values, and what their offsets take."""
    sums = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=sums[1:])
    spans: Int64Array = sums[ends] - sums[starts] + _OFFSET_BYTES
    return spans


def _summed(arrays: Iterable[pa.Array], rows: int) -> Int64Array:
    total = np.zeros(rows, np.int64)
    for array in arrays:
        total += row_bytes(array)
    return total


def _bounded(take: Callable[[UInt64Array], pa.Table], row_ids: UInt64Array, go_on: Callable[[], None]) -> pa.Table:
    """Read rows, each once, piece by piece, and stop when it is too much."""
    if len(row_ids) <= FIRST_ROWS:
        table = take(row_ids)
        _check_length(table.nbytes)
        return table
    unique, inverse = np.unique(row_ids, return_inverse=True)
    tables, start, held_bytes = [], 0, 0
    while start < len(unique):
        go_on()
        # No more than is left, if the next rows are as long as those before: they may be pictures.
        fair = FIRST_ROWS if not start else (MAX_ANSWER_BYTES - held_bytes) * start // max(held_bytes, 1)
        stop = min(start + min(max(fair, FIRST_ROWS), MORE_ROWS), len(unique))
        tables.append(take(unique[start:stop]))
        held_bytes += tables[-1].nbytes
        start = stop
        _check_length(held_bytes)
    table = pa.concat_tables(tables).combine_chunks()
    if len(unique) < len(row_ids):
        lengths = _summed(map(_one, table.columns), len(table))
        _check_length(int(lengths[inverse].sum()))
    return table.take(pa.array(inverse))


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _check_length(length_bytes: int) -> None:
    if length_bytes > MAX_ANSWER_BYTES:
        raise too_long("row_ids", length_bytes, MAX_ANSWER_BYTES)


def _is_offered(held: Held, name: str) -> bool:
    return name in held.offer.columns or name.split(".")[0] in held.offer.columns


def _denied(held: Held, name: str) -> AccessDenied:
    return AccessDenied(
        f"column {name!r} is not among those that clients of this server may see",
        remedy=f"These are {', '.join(held.offer.columns)}",
    )


def _stream(table: pa.Table) -> Buffer:
    sink: Any = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())
