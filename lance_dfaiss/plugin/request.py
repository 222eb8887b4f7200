"""Reading what a scan asks for: as far as ours answers it with Lance's meaning, the rest is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from ..errors import InvalidQuery
from ..search.load import Generation
from ..types import DISTANCE_COLUMN, QUERY_INDEX_COLUMN, ROW_ID_COLUMN, Float32Array
from ..vectors import as_queries
from .native import NotOurs

__all__ = ["ROW_ADDRESS_COLUMN", "Request", "read_metric"]

ROW_ADDRESS_COLUMN = "_rowaddr"

_LANCE_K = 10

# Options of a scan that only say how it is done.
_HOW = frozenset(
    {
        "batch_size", "batch_size_bytes", "batch_readahead", "fragment_readahead", "scan_in_order", "use_stats",
        "io_buffer_size", "late_materialization", "use_scalar_index",
    }
)  # fmt: skip
_ANSWERED = frozenset(
    {
        "nearest", "filter", "prefilter", "fast_search", "columns", "limit", "offset", "with_row_id",
        "with_row_address", "strict_batch_size", "disable_scoring_autoprojection",
    }
)  # fmt: skip
_NEAREST_KEYS = frozenset(
    {
        "column", "q", "k", "metric", "nprobes", "minimum_nprobes", "maximum_nprobes", "refine_factor", "use_index",
        "ef", "query_parallelism", "approx_mode",
    }
)  # fmt: skip

# What a filter may be over besides the dataset's columns is not the same before and after a search, and a scan of
# rows by id knows other names than a search does.
_ONLY_LANCE_BEFORE = (DISTANCE_COLUMN, ROW_ADDRESS_COLUMN, "_rowoffset")
_ONLY_LANCE_AFTER = (DISTANCE_COLUMN, "_rowoffset", "_row_created_at_version", "_row_last_updated_at_version")

# Factories whose distances are those of the vectors, so that refining changes nothing.
_EXACT_CODES = re.compile(r"(IVF\d+(_HNSW\d+)?,)?Flat|HNSW\d+(,Flat)?")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One search, as far as ours answers it; everything in it has been checked.

    Parameters
    ----------
    queries : numpy.ndarray
        float32 ``(n_queries, dim)``.
    single : bool
        It was one vector, not a batch.
    k : int
        Results per query.
    nprobe : tuple of (int, int) or None
        Least and largest number of lists to search; None for an index without lists, or as it was measured.
    ef, k_factor : int or None
        Other widths.
    prefilter, postfilter : str or None
        SQL: which rows are searched, and which of those found are kept.
    fast_search : bool
        Rows that are not indexed are left out.
    columns : list or dict or None
        What Lance shall fetch.
    layout : tuple of str or None
        Names of all columns in order; None where all columns of the dataset stand.
    tail : tuple of str
        Names after those.
    offset, limit : int or None
        Cut from the answer.
    batch_rows : int or None
        Rows of a batch.
    """

    queries: Float32Array
    single: bool
    k: int
    nprobe: tuple[int, int] | None
    ef: int | None
    k_factor: int | None
    prefilter: str | None
    postfilter: str | None
    fast_search: bool
    columns: list[str] | dict[str, str] | None
    layout: tuple[str, ...] | None
    tail: tuple[str, ...]
    offset: int
    limit: int | None
    batch_rows: int | None

    @property
    def filter(self) -> str | None:
        """The filter, before or after the search."""
        return self.postfilter if self.prefilter is None else self.prefilter

    @property
    def limited(self) -> bool:
        """Whether the answer is cut."""
        return self.offset > 0 or self.limit is not None

    @classmethod
    def read(cls, options: Mapping[str, Any], generation: Generation, schema: pa.Schema) -> Request:
        """Read the options of a scan.

        Raises
        ------
        NotOurs
            If one of them is for Lance: because ours does not do it, or because Lance shall refuse it.
        """
        for option, value in options.items():
            if option not in _ANSWERED and option not in _HOW and value is not False:
                raise NotOurs(f"option {option}")
        nearest = options["nearest"]
        _check_keys(nearest, generation)
        spec = generation.manifest.spec
        queries, single = _queries(nearest.get("q"), spec.dim, spec.metric)
        strict = bool(options.get("strict_batch_size"))
        if strict and "batch_size_bytes" in options:
            raise NotOurs("strict_batch_size and batch_size_bytes")
        k = _whole(nearest, "k", 1)
        ef = _whole(nearest, "ef", 1)
        refine = _whole(nearest, "refine_factor", 1)
        prefilter, postfilter = _filters(options, single=single)
        columns, layout, tail = _projection(options, schema, single=single)
        return cls(
            queries=queries,
            single=single,
            k=_LANCE_K if k is None else k,
            nprobe=_nprobe(nearest, spec.num_partitions),
            ef=ef if _is_hnsw(generation) else None,
            k_factor=refine if spec.refine is not None else None,
            prefilter=prefilter,
            postfilter=postfilter,
            fast_search=_flag(options, "fast_search"),
            columns=columns,
            layout=layout,
            tail=tail,
            offset=_whole(options, "offset", 0) or 0,
            limit=_whole(options, "limit", 0),
            batch_rows=_whole(options, "batch_size", 1) if strict else None,
        )


def read_metric(metric: Any) -> str | None:
    """Return a metric's name as this package writes it; whatever else it is, as it came."""
    folded = metric.lower() if isinstance(metric, str) else metric
    return "l2" if folded == "euclidean" else cast("str | None", folded)


def _is_hnsw(generation: Generation) -> bool:
    spec = generation.manifest.spec
    return "HNSW" in spec.factory and not spec.num_partitions


def _codes_are_exact(generation: Generation) -> bool:
    return _EXACT_CODES.fullmatch(generation.manifest.spec.factory) is not None


def _check_keys(nearest: Mapping[str, Any], generation: Generation) -> None:
    """Refuse what a query asks beyond ours."""
    for key, value in nearest.items():
        if key not in _NEAREST_KEYS and value is not None:
            raise NotOurs(f"nearest key {key}")
    if nearest.get("approx_mode", "normal") != "normal" and "RaBitQ" in generation.manifest.spec.factory:
        raise NotOurs("approx_mode")
    if nearest.get("approx_mode", "normal") not in ("fast", "normal", "accurate"):
        raise NotOurs("approx_mode")
    _whole(nearest, "query_parallelism", -1)
    refine = nearest.get("refine_factor")
    if refine is not None and generation.manifest.spec.refine is None and not _codes_are_exact(generation):
        raise NotOurs("refine_factor, and the index has no refine store")


def _whole(options: Mapping[str, Any], name: str, least: int) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise NotOurs(f"{name}={value!r}")
    return int(value)


def _queries(query: Any, dim: int, metric: Any) -> tuple[Float32Array, bool]:
    """Return queries as an array, and whether it was a single one."""
    if isinstance(query, pa.ExtensionScalar):
        query = query.value
    if isinstance(query, pa.FixedSizeListScalar):
        query = query.values
    flat = isinstance(query, pa.Array) and (pa.types.is_floating(query.type) or pa.types.is_integer(query.type))
    if not flat and not isinstance(query, (np.ndarray, list, tuple)):
        raise NotOurs(f"a query of type {type(query).__name__}")
    try:
        queries, single = as_queries(query, dim, metric)
    except InvalidQuery as exc:
        raise NotOurs(exc.message) from exc
    if not len(queries):
        raise NotOurs("no query")
    return queries, single


def _nprobe(nearest: Mapping[str, Any], lists: int) -> tuple[int, int] | None:
    """Return the least and the largest width in lists, None where the index knows best."""
    both = _whole(nearest, "nprobes", 1)
    least = _whole(nearest, "minimum_nprobes", 0)
    most = _whole(nearest, "maximum_nprobes", 0)
    if most == 0 or (least is not None and most is not None and least > most):
        raise NotOurs("minimum_nprobes and maximum_nprobes")
    if not lists or (both is None and least is None and most is None):
        return None
    least, most = both if least is None else least, both if most is None else most
    widest = lists if most is None else min(most, lists)
    return max(least or 1, 1), widest


def _filters(options: Mapping[str, Any], *, single: bool) -> tuple[str | None, str | None]:
    """Return the filter as one before the search and one after it; at most one of them is given."""
    before = _flag(options, "prefilter")
    sql = options.get("filter")
    if sql is None:
        return None, None
    if not isinstance(sql, str):
        raise NotOurs(f"a filter of type {type(sql).__name__}")
    for name in (*(_ONLY_LANCE_BEFORE if before else _ONLY_LANCE_AFTER), *(() if single else (QUERY_INDEX_COLUMN,))):
        if name in sql.lower():
            raise NotOurs(f"a filter over {name}")
    return (sql, None) if before else (None, sql)


def _flag(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, (bool, np.bool_)):
        raise NotOurs(f"{name}={value!r}")
    return bool(value)


def _projection(
    options: Mapping[str, Any], schema: pa.Schema, *, single: bool
) -> tuple[list[str] | dict[str, str] | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Return what to fetch, and the order of the columns, in Lance's way."""
    columns = options.get("columns")
    _check_columns(columns, schema, single=single)
    flagged = {ROW_ID_COLUMN: options.get("with_row_id"), ROW_ADDRESS_COLUMN: options.get("with_row_address")}
    tail = [name for name, flag in flagged.items() if flag]
    layout = None if columns is None else tuple(
        name for name in columns if name not in tail and (single or name != QUERY_INDEX_COLUMN)
    )  # fmt: skip
    if not options.get("disable_scoring_autoprojection") and (layout is None or DISTANCE_COLUMN not in layout):
        tail.insert(0, DISTANCE_COLUMN)
    made = (DISTANCE_COLUMN, *flagged)
    wanted: list[str] | dict[str, str] | None = None
    if isinstance(columns, dict):
        wanted = {name: columns[name] for name in layout or () if name not in made} or []
    elif columns is not None:
        wanted = [name for name in layout or () if name not in made]
    return wanted, layout, tuple(tail)


def _check_columns(columns: Any, schema: pa.Schema, *, single: bool) -> None:
    if not single and QUERY_INDEX_COLUMN in schema.names:
        raise NotOurs(f"a batch over a dataset with a column {QUERY_INDEX_COLUMN}")
    if columns is not None and not isinstance(columns, (list, dict)):
        raise NotOurs(f"columns of type {type(columns).__name__}")
    if isinstance(columns, list) and (
        len(set(columns)) != len(columns) or not all(isinstance(name, str) for name in columns)
    ):
        raise NotOurs("columns named twice")
    named = columns if isinstance(columns, list) else schema.names
    if any(_holds_blob(field) for field in schema if any(name.split(".")[0] == field.name for name in named)):
        raise NotOurs("a blob column")
    for name, expression in columns.items() if isinstance(columns, dict) else ():
        plain = name == expression == DISTANCE_COLUMN
        if not plain and (name.startswith("_") or _mentions_result(expression, single=single)):
            raise NotOurs(f"column {name} is computed from the result")


def _mentions_result(expression: str, *, single: bool) -> bool:
    return DISTANCE_COLUMN in expression or (not single and QUERY_INDEX_COLUMN in expression)


def _holds_blob(field: pa.Field) -> bool:
    metadata = field.metadata or {}
    if metadata.get(b"lance-encoding:blob") == b"true" or b"lance.blob" in metadata.get(b"ARROW:extension:name", b""):
        return True
    if str(getattr(field.type, "extension_name", "")).startswith("lance.blob"):
        return True
    children: Iterable[pa.Field] = (
        [field.type.field(i) for i in range(field.type.num_fields)] if pa.types.is_struct(field.type) else []
    )
    return any(_holds_blob(child) for child in children)
