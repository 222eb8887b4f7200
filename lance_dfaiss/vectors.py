"""Arrow vector columns as float32 rows: every kind a Lance dataset can hold, and what is wrong with a row.

Pure: arrays in, arrays out. The kinds are FixedSizeList of float16, bfloat16, float32, float64,
uint8 or int8, uniform lists of float, and fixed_shape_tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .errors import InvalidQuery, InvalidVectors, UnsupportedColumn
from .types import Float32Array, Metric

__all__ = ["DecodedVectors", "VectorType", "as_queries", "decode_vectors", "vector_type"]

_VALUE_NAMES = {
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.uint8(): "uint8",
    pa.int8(): "int8",
}
_BFLOAT16 = "lance.bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorType:
    """What kind of vectors a column holds.

    Parameters
    ----------
    value_type : str
        ``"float16"``, ``"bfloat16"``, ``"float32"``, ``"float64"``, ``"uint8"`` or ``"int8"``.
    dim : int or None
        Dimension; None for lists, whose rows tell.
    """

    value_type: str
    dim: int | None

    @property
    def value_bytes(self) -> int:
        """Bytes of one element as stored."""
        return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "uint8": 1, "int8": 1}[self.value_type]


@dataclass(frozen=True, slots=True, eq=False)
class DecodedVectors:
    """Rows of a column, decoded.

    Parameters
    ----------
    values : numpy.ndarray
        float32 ``(n, dim)``, perhaps a read-only view of the Arrow memory; anything may lie under a bad row.
    null, non_finite, zero : numpy.ndarray
        bool ``(n,)``: the row or one of its elements is null; it holds NaN or Inf, or is too large for
        float32 distances; its length is zero and the metric is cosine. At most one is true for a row.
    """

    values: Float32Array
    null: NDArray[np.bool_]
    non_finite: NDArray[np.bool_]
    zero: NDArray[np.bool_]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Rows that can be indexed, bool ``(n,)``."""
        return ~(self.null | self.non_finite | self.zero)


def vector_type(column: str, arrow_type: pa.DataType) -> VectorType:
    """Return the kind of a vector column.

    Raises
    ------
    UnsupportedColumn
        If the type holds no vectors that can be indexed, with what is supported.
    """
    if isinstance(arrow_type, pa.FixedShapeTensorType):
        if len(arrow_type.shape) != 1:
            raise _unsupported(column, arrow_type, "a tensor of more than one dimension is not a vector")
        arrow_type = arrow_type.storage_type
    if pa.types.is_fixed_size_list(arrow_type):
        return VectorType(value_type=_value_type(column, arrow_type), dim=arrow_type.list_size)
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        inner = arrow_type.value_type
        if pa.types.is_fixed_size_list(inner) or pa.types.is_list(inner) or pa.types.is_large_list(inner):
            raise _unsupported(column, arrow_type, "multivector columns are searched by Lance's own index", "lance")
        if not pa.types.is_floating(inner):
            raise _unsupported(column, arrow_type, "lists must hold floats")
        return VectorType(value_type=_value_type(column, arrow_type), dim=None)
    raise _unsupported(column, arrow_type, "it is not a vector type")


def decode_vectors(
    array: pa.Array, dim: int, metric: Metric, *, column: str = "vector", odd_is_null: bool = False
) -> DecodedVectors:
    """Decode one Arrow array of vectors.

    Parameters
    ----------
    array : pyarrow.Array
        Of a type that `vector_type` accepts; any slice.
    dim : int
        Dimension every row must have.
    metric : str
        Decides whether zero vectors are usable.
    column : str
        Name for messages.
    odd_is_null : bool
        Take a row of another length for one without a vector, instead of refusing it.

    Returns
    -------
    DecodedVectors

    Raises
    ------
    InvalidVectors
        If the rows of a list column differ in length.
    """
    null = np.asarray(array.is_null())
    storage = array.storage if isinstance(array, pa.ExtensionArray) else array
    if pa.types.is_fixed_size_list(storage.type):
        # `.values` ignores the slice and `.flatten()` drops null rows: cut it out by hand.
        elements = storage.values.slice(storage.offset * dim, len(storage) * dim)
    else:
        elements, null = _uniform_elements(storage, null, dim, column, odd_is_null=odd_is_null)
    values, missing = _float32(elements)
    values = values.reshape(len(array), dim)
    if missing is not None:
        null = null | missing.reshape(len(array), dim).any(axis=1)
    # One pass finds NaN, Inf and values whose squares overflow; einsum keeps it free of temporaries.
    norms = np.einsum("ij,ij->i", values, values)
    non_finite = ~np.isfinite(norms) & ~null
    zero = (norms == 0) & ~null if metric == "cosine" else np.zeros(len(array), dtype=bool)
    return DecodedVectors(values, null, non_finite, zero)


def as_queries(queries: Any, dim: int, metric: Metric) -> tuple[Float32Array, bool]:
    """Return queries as float32 ``(n_queries, dim)``, and whether there was only one.

    Parameters
    ----------
    queries : array-like or pyarrow.Array
        ``(dim,)`` or ``(n_queries, dim)``, of any number type.
    dim : int
        Dimension of the index.
    metric : str
        Under cosine a zero query is refused.

    Returns
    -------
    tuple of (numpy.ndarray, bool)
        A C-contiguous array (the caller's own when it already is one) and True for a single query.

    Raises
    ------
    InvalidQuery
        If the shape is wrong, a value is NaN, Inf or too large, or a query is zero under cosine.
    """
    if isinstance(queries, np.ndarray) and queries.shape == (1, dim) and queries.dtype == np.float32:
        # One query as it should be is the latency that counts: a dot and Python floats are all it takes.
        array = np.ascontiguousarray(queries)
        with np.errstate(over="ignore"):
            norm = float(array[0].dot(array[0]))
        if isfinite(norm) and (norm or metric != "cosine"):
            return array, False
    try:
        with np.errstate(over="ignore"):  # what is too large becomes Inf, and is refused below
            array = np.ascontiguousarray(queries, dtype=np.float32)
    except (TypeError, ValueError) as exc:
        raise InvalidQuery(
            f"a query must be numbers of shape ({dim},) or (n, {dim})", parameter="query", value=type(queries).__name__
        ) from exc
    single = array.ndim == 1 and len(array) > 0
    if single:
        array = array.reshape(1, -1)
    if array.ndim != 2 or (array.shape[1] != dim and len(array) > 0):
        raise InvalidQuery(
            f"a query must have shape ({dim},) or (n, {dim}), found {np.shape(queries)}",
            remedy=f"This index holds vectors of dimension {dim}: embed the query with the same model",
            parameter="query",
            value=np.shape(queries),
        )
    if len(array) == 1:
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(array[0].dot(array[0]))
        if isfinite(norm) and (norm or metric != "cosine"):
            return array, single
    norms = np.einsum("ij,ij->i", array, array)
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise InvalidQuery(
            f"query {row} holds NaN, Inf or values too large for float32 distances", parameter="query", value=row
        )
    if metric == "cosine" and not norms.all():
        row = int(np.flatnonzero(norms == 0)[0])
        raise InvalidQuery(
            f"query {row} is the zero vector, which has no direction",
            remedy="Cosine distance is undefined for it: drop the query",
            parameter="query",
            value=row,
        )
    return array, single


def _value_type(column: str, arrow_type: pa.DataType) -> str:
    inner = arrow_type.value_type
    if getattr(inner, "extension_name", None) == _BFLOAT16:
        return "bfloat16"
    name = _VALUE_NAMES.get(inner)
    if name is None:
        raise _unsupported(column, arrow_type, f"elements of type {inner} are not supported")
    return name


def _uniform_elements(
    storage: pa.Array, null: NDArray[np.bool_], dim: int, column: str, *, odd_is_null: bool
) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Return the elements of a list array as if it had fixed size, null rows filled with zeros."""
    offsets = np.asarray(storage.offsets)
    lengths = np.diff(offsets)
    ragged = np.flatnonzero((lengths != dim) & ~null)
    if odd_is_null:
        null = null | (lengths != dim)
    elif len(ragged):
        row = int(ragged[0])
        raise InvalidVectors(
            f"column {column!r} holds lists of different lengths: expected {dim}, found {int(lengths[row])}",
            remedy="Index a column of fixed-size vectors",
            column=column,
            row_ids=(),
        )
    if not null.any():
        return storage.values.slice(int(offsets[0]), len(storage) * dim), null
    # A null row has no elements, or any number of them: gather row by row.
    starts = np.where(null, 0, offsets[:-1])
    take = np.repeat(starts, dim) + np.tile(np.arange(dim), len(storage))
    indices = pa.array(take, mask=np.repeat(null, dim))
    return storage.values.take(indices), null


def _float32(elements: pa.Array) -> tuple[Float32Array, NDArray[np.bool_] | None]:
    """Return elements as float32 values, and which are null (None when none is)."""
    missing = np.asarray(elements.is_null()) if elements.null_count else None
    if isinstance(elements, pa.ExtensionArray) or pa.types.is_fixed_size_binary(elements.type):
        storage = elements.storage if isinstance(elements, pa.ExtensionArray) else elements
        raw = np.frombuffer(storage.buffers()[1], dtype="<u2")[storage.offset : storage.offset + len(storage)]
        return (raw.astype(np.uint32) << 16).view(np.float32), missing
    if missing is not None:
        elements = elements.fill_null(0)
    with np.errstate(over="ignore"):
        return elements.to_numpy(zero_copy_only=False).astype(np.float32, copy=False), missing


def _unsupported(column: str, arrow_type: pa.DataType, reason: str, instead: str = "") -> UnsupportedColumn:
    remedy = (
        "Use LanceDataset.create_index for it"
        if instead
        else "Index a FixedSizeList of float16, bfloat16, float32, float64, uint8 or int8, a uniform list of floats,"
        " or a fixed_shape_tensor"
    )
    return UnsupportedColumn(
        f"column {column!r} has type {arrow_type}: {reason}", remedy=remedy, parameter="column", value=column
    )
