"""Answering a search: the index finds, the dataset's rows are fetched, and the table is Lance's."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from lance.dataset import LanceScanner, serialize_row_addrs

from ..errors import InvalidFilter, StorageError, TailTooLarge, UnknownColumn
from ..lance_io import LanceDataset
from ..types import DISTANCE_COLUMN, MISSING_ROW_ID, QUERY_INDEX_COLUMN, ROW_ID_COLUMN, Float32Array, UInt64Array
from .opened import Opened
from .request import ROW_ADDRESS_COLUMN, Request

__all__ = ["Answer", "DfaissScanner"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


class DfaissScanner(LanceScanner):
    """A scanner whose rows come from one of this package's indexes.

    Reads give the index's answer, always for the version the dataset was at when the scanner was made.
    Plans are those of the native scanner for the same call.
    """

    def __init__(self, answer: Answer, dataset: LanceDataset, native: Callable[[], LanceScanner]) -> None:
        self._answer = answer
        self._dataset = dataset
        self._native = native

    def to_table(self) -> pa.Table:
        """Search, and return the rows as a table."""
        return self._ours_or_lances(self._answer.table, LanceScanner.to_table)

    def to_reader(self) -> pa.RecordBatchReader:
        """Search, and return the rows as a reader."""
        table = self.to_table()
        return pa.RecordBatchReader.from_batches(table.schema, table.to_batches(self._answer.request.batch_rows))

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        """Search, and return the rows as batches."""
        yield from self.to_reader()

    def to_pandas(self, *, blob_mode: str = "lazy", **kwargs: Any) -> Any:
        """Search, and return the rows as a data frame; ``blob_mode`` is for columns that ours leaves to Lance."""
        del blob_mode
        return self.to_table().to_pandas(**kwargs)

    def count_rows(self) -> int:
        """Count the rows that the search finds."""
        if self._answer.request.limited:
            return int(self._native().count_rows())
        return self._ours_or_lances(self._answer.count, LanceScanner.count_rows)

    def _ours_or_lances(self, ours: Callable[[], _T], theirs: Callable[[LanceScanner], _T]) -> _T:
        """Return our answer, or Lance's where ours shows only now that it has none."""
        try:
            return ours()
        except TailTooLarge as exc:
            self._answer.tell_once(exc)
        except (InvalidFilter, UnknownColumn) as exc:
            _log.debug("a filter goes to Lance: %s", exc)
        # Not inside the handler: an error of Lance's stands alone then.
        return theirs(self._native())

    @property
    def projected_schema(self) -> pa.Schema:
        """Schema of the rows."""
        return self._answer.schema()

    @property
    def dataset_schema(self) -> pa.Schema:
        """Schema of the dataset."""
        return self._dataset.schema

    def explain_plan(self, verbose: bool = False) -> str:
        """Return Lance's own plan for the same call."""
        return str(self._native().explain_plan(verbose=verbose))

    def analyze_plan(self, count_rows: bool = False) -> str:
        """Run Lance's own plan for the same call, and return it with its metrics."""
        return str(self._native().analyze_plan(count_rows=count_rows))


class Answer:
    """A request, and the index and the dataset version that answer it."""

    def __init__(self, request: Request, opened: Opened, handle: LanceDataset) -> None:
        self.request = request
        self._opened = opened
        self._index = opened.index
        self._default_nprobe = opened.default_nprobe
        self._handle = handle

    def neighbours(self) -> tuple[Any, Float32Array, UInt64Array]:
        """Search: query number int32, distance and row id of each row, ``(n,)`` each."""
        request = self.request
        distances, row_ids = self._search(min(request.k, max(len(self._index), 1)))
        found = row_ids != MISSING_ROW_ID
        if request.postfilter is not None:
            found &= np.isin(row_ids, self._passing(row_ids[found]))
        numbers = np.repeat(np.arange(len(distances), dtype=np.int32), found.sum(axis=1))
        stop = None if request.limit is None else request.offset + request.limit
        cut = slice(request.offset, stop)
        return numbers[cut], distances[found][cut], row_ids[found][cut]

    def count(self) -> int:
        """Search, and count what was found."""
        return len(self.neighbours()[2])

    def tell_once(self, exc: TailTooLarge) -> None:
        """Warn, the first time for a version, that searches of it are slow."""
        if self._opened.untold.acquire(blocking=False):
            _log.warning(
                "index %r cannot answer, Lance searches by itself until update_index has run: %s",
                self._index.name,
                exc.message,
            )

    def _search(self, k: int) -> tuple[Float32Array, UInt64Array]:
        """Search k rows; like Lance, look in more lists while a query has found too few."""
        request = self.request
        ef = None if request.ef is None else max(request.ef, k)
        ask = functools.partial(
            self._index.knn,
            request.queries,
            k,
            ef=ef,
            k_factor=request.k_factor,
            filter=request.prefilter,
            fast_search=request.fast_search,
        )
        if request.nprobe is None:
            return ask()
        least, widest = request.nprobe
        probed = min(max(self._default_nprobe, least), widest)
        distances, row_ids = ask(nprobe=probed)
        # With a filter the index itself goes on until it has found what there is.
        wanted = min(k, len(self._index)) if request.prefilter is None else 0
        while probed < widest and ((row_ids != MISSING_ROW_ID).sum(axis=1) < wanted).any():
            probed = min(probed * 4, widest)
            distances, row_ids = ask(nprobe=probed)
        return distances, row_ids

    def table(self) -> pa.Table:
        """Search and fetch: the table that Lance would give."""
        numbers, distances, row_ids = self.neighbours()
        ready = {
            QUERY_INDEX_COLUMN: pa.array(numbers, pa.int32()),
            DISTANCE_COLUMN: pa.array(distances, pa.float32()),
            ROW_ID_COLUMN: pa.array(row_ids, pa.uint64()),
        }
        fetched = self._fetch(row_ids) if self._needs_rows() else self._handle.schema.empty_table()
        schema = self._schema(fetched.schema)
        lead = not self.request.single
        arrays = [
            ready[field.name] if self._is_ours(field.name, first=lead and i == 0) else fetched.column(field.name)
            for i, field in enumerate(schema)
        ]
        return pa.Table.from_arrays(arrays, schema=schema) if arrays else self._fetch(row_ids).select([])

    def schema(self) -> pa.Schema:
        """Return the schema of the table, without searching."""
        return self._schema(self._scanner(np.zeros(0, dtype=np.uint64), filtered=True).projected_schema)

    def _needs_rows(self) -> bool:
        """Whether the dataset has to be read at all."""
        request = self.request
        made = (DISTANCE_COLUMN, ROW_ID_COLUMN)
        return request.layout is None or any(name not in made for name in (*request.layout, *request.tail))

    def _is_ours(self, name: str, *, first: bool) -> bool:
        return name in (DISTANCE_COLUMN, ROW_ID_COLUMN) or (first and name == QUERY_INDEX_COLUMN)

    def _schema(self, fetched: pa.Schema) -> pa.Schema:
        names = self.request.layout
        if names is None:
            names = tuple(name for name in fetched.names if name not in (ROW_ID_COLUMN, ROW_ADDRESS_COLUMN))
        made = {DISTANCE_COLUMN: pa.float32(), ROW_ID_COLUMN: pa.uint64()}
        fields = [
            pa.field(name, made[name]) if name in made else fetched.field(name) for name in (*names, *self.request.tail)
        ]
        if not self.request.single:
            fields.insert(0, pa.field(QUERY_INDEX_COLUMN, pa.int32(), nullable=False))
        return pa.schema(fields, metadata=fetched.metadata)

    def _passing(self, row_ids: UInt64Array) -> UInt64Array:
        """Return those of some rows that pass the filter."""
        allowed = serialize_row_addrs(np.unique(row_ids).tolist())
        scanner = self._handle.scanner(
            columns=[], with_row_id=True, filter=self.request.postfilter, row_addr_allowlist=allowed
        )
        passing: UInt64Array = scanner.to_table()[ROW_ID_COLUMN].to_numpy()
        return passing

    def _scanner(self, row_ids: UInt64Array, *, filtered: bool = False) -> LanceScanner:
        return self._handle.scanner(
            columns=self.request.columns,
            filter=self.request.filter if filtered else None,
            with_row_id=True,
            with_row_address=True,
            row_addr_allowlist=serialize_row_addrs(row_ids.tolist()),
        )

    def _fetch(self, row_ids: UInt64Array) -> pa.Table:
        """Read the rows, in the order given, duplicates included."""
        unique, inverse = np.unique(row_ids, return_inverse=True)
        table = self._scanner(unique).to_table()
        found = table[ROW_ID_COLUMN].to_numpy()
        if len(found) != len(unique):
            raise StorageError(
                f"Lance returned {len(found)} of {len(unique)} rows asked for by id",
                remedy=f"Version {self._index.version} of the dataset may have been removed: check out another",
                location=self._handle.uri,
            )
        return table.take(pa.array(np.argsort(found, kind="stable")[inverse]))
