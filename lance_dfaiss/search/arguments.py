"""What callers pass to a search, checked before anything is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, cast

import numpy as np

from ..errors import InvalidArgument
from ..types import DISTANCE_COLUMN, MISSING_ROW_ID, ROW_ID_COLUMN, Float32Array, Metric, UInt64Array

__all__ = [
    "MAX_RESULTS",
    "OWN_COLUMNS",
    "checked_columns",
    "checked_filter",
    "checked_filter_columns",
    "checked_k",
    "checked_radius",
    "checked_row_ids",
    "padded",
    "too_many_results",
]

MAX_RESULTS = 2**31
"""Results of one call over all its queries: 24 GiB of distances and row ids."""

# Distances are float32: beyond this lies nothing, or everything.
_LARGEST_DISTANCE = float(np.finfo(np.float32).max)

OWN_COLUMNS = (ROW_ID_COLUMN, DISTANCE_COLUMN)
"""Columns that an answer has anyway."""


def checked_k(k: int) -> int:
    """Return k as an int of at least 1."""
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InvalidArgument(f"k must be a whole number of at least 1, not {k!r}", parameter="k", value=k)
    return int(k)


def checked_filter(given: Any) -> str | None:
    """Return a filter in Lance's SQL; Lance parses it."""
    if given is None or isinstance(given, str):
        return given
    raise InvalidArgument(
        f"filter must be SQL in a string, not {type(given).__name__}",
        remedy="Write it as Lance's SQL, such as \"lang = 'en' AND year > 2000\"",
        parameter="filter",
        value=given,
    )


def checked_filter_columns(given: Any) -> list[str]:
    """Return the names of columns to keep in RAM."""
    names = None if isinstance(given, (str, bytes)) or not isinstance(given, Iterable) else list(given)
    if names is None or not all(isinstance(name, str) for name in names):
        raise InvalidArgument(
            f"filter_columns must be a list of names, not {given!r}",
            remedy=f"Pass a list: filter_columns=[{given!r}]" if isinstance(given, str) else "Pass a list of names",
            parameter="filter_columns",
            value=given,
        )
    return names


def checked_radius(radius: Any, metric: Metric) -> float:
    """Return a radius in Lance's distances.

    Raises
    ------
    InvalidArgument
        If it is no number; or nothing can lie inside: under l2 and cosine a distance is never below 0.
    """
    if isinstance(radius, bool) or not isinstance(radius, (Real, np.floating, np.integer)) or radius != radius:
        raise InvalidArgument(f"radius must be a number, not {radius!r}", parameter="radius", value=radius)
    if metric != "dot" and radius <= 0:
        raise InvalidArgument(
            f"radius must be above 0 under {metric}, not {radius!r}: a row lies inside when its distance is smaller",
            parameter="radius",
            value=radius,
        )
    try:
        value = float(radius)
    except OverflowError:  # a whole number or a fraction can be any size
        value = math.inf if cast("Any", radius) > 0 else -math.inf
    return value if abs(value) <= _LARGEST_DISTANCE else math.copysign(math.inf, value)


def too_many_results(n_queries: int, k: int) -> InvalidArgument:
    """Return the error for more results than one call gives."""
    return InvalidArgument(
        f"k={k} for {n_queries} queries makes {n_queries * k} results; one call gives {MAX_RESULTS}",
        remedy="Ask for a smaller k, or for fewer queries at once",
        parameter="k",
        value=k,
    )


def padded(distances: Float32Array, row_ids: UInt64Array, k: int) -> tuple[Float32Array, UInt64Array]:
    """Fill up to k results with missing ones."""
    count, width = distances.shape
    all_distances = np.full((count, k), np.inf, dtype=np.float32)
    all_row_ids = np.full((count, k), MISSING_ROW_ID, dtype=np.uint64)
    all_distances[:, :width], all_row_ids[:, :width] = distances, row_ids
    return all_distances, all_row_ids


def checked_columns(columns: Any) -> list[str] | dict[str, str] | None:
    """Return the columns to fetch beside those that an answer has anyway."""
    if columns is None:
        return None
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable):
        raise InvalidArgument(
            f"columns must be a list of names or a mapping, not {columns!r}",
            remedy=f"Pass a list: columns=[{columns!r}]" if isinstance(columns, str) else "Pass a list of names",
            parameter="columns",
            value=columns,
        )
    wanted = dict(columns) if isinstance(columns, Mapping) else list(columns)
    texts = [text for item in wanted.items() for text in item] if isinstance(wanted, dict) else wanted
    if not all(isinstance(text, str) for text in texts):
        raise InvalidArgument(f"columns must be strings, not {wanted!r}", parameter="columns", value=wanted)
    if isinstance(wanted, dict):
        return _checked_expressions(wanted)
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if wanted.count(name) > 1)
        raise InvalidArgument(
            f"columns names {twice!r} more than once", remedy="Name it once", parameter="columns", value=wanted
        )
    return [name for name in wanted if name not in OWN_COLUMNS]


def _checked_expressions(wanted: dict[str, str]) -> dict[str, str]:
    taken = [name for name in OWN_COLUMNS if wanted.get(name, name) != name]
    if taken:
        raise InvalidArgument(
            f"columns makes a column {taken[0]!r}, and the answer has one of that name",
            remedy="Give it another name",
            parameter="columns",
            value=wanted,
        )
    return {name: expression for name, expression in wanted.items() if name not in OWN_COLUMNS}


def checked_row_ids(row_ids: Any) -> UInt64Array:
    """Return row ids as uint64 ``(n,)``."""
    given = np.asarray(row_ids) if hasattr(row_ids, "dtype") else np.asarray(row_ids, dtype=object)
    if given.ndim > 1:
        raise InvalidArgument(
            f"row_ids must have shape (n,), not {given.shape}", parameter="row_ids", value=given.shape
        )
    given = np.atleast_1d(given)
    if given.dtype.kind == "u":
        return given.astype(np.uint64)
    if given.dtype.kind == "i":
        bad = given[given < 0]
    else:  # objects: a list of Python's numbers may not fit any one type of numpy's
        bad = np.array([row for row in given.tolist() if not _is_row_id(row)], dtype=object)
    if len(bad):
        raise InvalidArgument(
            f"row_ids must be whole numbers from 0 to 2**64 - 1, not {bad[0]!r}",
            remedy="Row ids are those that knn and search return",
            parameter="row_ids",
            value=bad[0],
        )
    return given.astype(np.uint64)


def _is_row_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**64
