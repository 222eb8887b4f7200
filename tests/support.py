"""What the correctness tests measure against: datasets of every kind, and exact search in float64.

Nothing here uses the package under test: vectors are read through Python lists, distances are
computed by their definition.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = [
    "KINDS",
    "Exact",
    "assert_exact",
    "clustered",
    "column_of",
    "fixed_size",
    "gaussian",
    "live_table",
    "make_dataset",
    "read_vectors",
    "same_rows",
    "stored_values",
]


_BFLOAT16 = "lance.bfloat16"


def gaussian(rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    """Vectors without structure."""
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def clustered(rows: int, dim: int, seed: int, *, clusters: int = 20) -> NDArray[np.float32]:
    """Vectors like embeddings: in groups, so that an approximate index has something to find."""
    rng = np.random.default_rng(seed)
    centers = 3 * rng.standard_normal((clusters, dim))
    return (centers[rng.integers(clusters, size=rows)] + rng.standard_normal((rows, dim))).astype(np.float32)


def fixed_size(values: NDArray[Any], value_type: pa.DataType | None = None, *, null: Sequence[int] = ()) -> pa.Array:
    """A FixedSizeList column; rows named by ``null`` are null."""
    elements = pa.array(values.ravel(), value_type or pa.from_numpy_dtype(values.dtype))
    mask = None
    if len(null):
        flags = np.zeros(len(values), dtype=bool)
        flags[list(null)] = True
        mask = pa.array(flags)
    return pa.FixedSizeListArray.from_arrays(elements, values.shape[1], mask=mask)


def _bfloat16(values: NDArray[np.float32]) -> pa.Array:
    from lance._arrow.bf16 import BFloat16Type

    kind: Any = BFloat16Type()  # type: ignore[no-untyped-call]
    raw = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2")
    storage = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2), raw.size, [None, pa.py_buffer(raw.tobytes())])
    return pa.FixedSizeListArray.from_arrays(pa.ExtensionArray.from_storage(kind, storage), values.shape[1])


def _tensor(values: NDArray[np.float32]) -> pa.Array:
    kind = pa.fixed_shape_tensor(pa.float32(), [values.shape[1]])
    return pa.ExtensionArray.from_storage(kind, fixed_size(values))


def _struct(values: NDArray[np.float32]) -> pa.Array:
    return pa.StructArray.from_arrays([pa.array(range(len(values))), fixed_size(values)], names=["number", "emb"])


def _bytes(values: NDArray[np.float32], kind: type[np.generic], low: int) -> pa.Array:
    scaled = np.clip(np.round(values * 25) + (0 if low else 100), low, low + 255)
    return fixed_size(scaled.astype(kind))


KINDS: dict[str, Callable[[NDArray[np.float32]], pa.Array]] = {
    "float16": lambda x: fixed_size(x.astype(np.float16)),
    "bfloat16": _bfloat16,
    "float32": fixed_size,
    "float64": lambda x: fixed_size(x.astype(np.float64)),
    "uint8": lambda x: _bytes(x, np.uint8, 0),
    "int8": lambda x: _bytes(x, np.int8, -128),
    "list": lambda x: pa.array(x.tolist(), pa.list_(pa.float32())),
    "large_list": lambda x: pa.array(x.tolist(), pa.large_list(pa.float32())),
    "tensor": _tensor,
    "struct": _struct,
}
"""Makers of a vector column of each kind from float32 values."""


def column_of(kind: str) -> str:
    """Path of the vector leaf in a dataset made with that kind."""
    return "vec.emb" if kind == "struct" else "vec"


def stored_values(kind: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What is left of the values once stored as that kind, as float32."""
    if kind == "float16":
        return values.astype(np.float16).astype(np.float32)
    if kind == "bfloat16":
        raw = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF0000)
        return np.asarray(raw.view(np.float32))
    if kind in ("uint8", "int8"):
        return np.asarray(KINDS[kind](values).values.to_numpy().reshape(values.shape), dtype=np.float32)
    return values


def make_dataset(
    path: Path,
    vectors: NDArray[Any] | pa.Array,
    *,
    rows_per_fragment: int = 10**6,
    stable: bool = False,
    **columns: pa.Array,
) -> lance.LanceDataset:
    """Write a dataset of ``id``, ``vec`` and more columns."""
    array = fixed_size(vectors) if isinstance(vectors, np.ndarray) else vectors
    table = pa.table({"id": pa.array(range(len(array)), pa.int64()), "vec": array, **columns})
    return lance.write_dataset(table, str(path), max_rows_per_file=rows_per_fragment, enable_stable_row_ids=stable)


def read_vectors(dataset: lance.LanceDataset, column: str = "vec") -> tuple[NDArray[np.uint64], list[Any]]:
    """Row ids and vectors of a dataset version, the latter as lists or None, through Python objects."""
    table = dataset.to_table(columns=[column], with_row_id=True)
    row_ids, array = table["_rowid"].to_numpy(), table.column(0).combine_chunks()
    if pa.types.is_fixed_size_list(array.type) and getattr(array.type.value_type, "extension_name", "") == _BFLOAT16:
        # A bfloat16 is the upper half of a float32.
        wide = [struct.unpack("<f", b"\0\0" + half)[0] for half in array.values.storage.to_pylist()]
        return row_ids, np.array(wide).reshape(len(array), -1).tolist()
    return row_ids, array.to_pylist()


class Exact:
    """Exact search over the usable rows of one dataset version, in float64.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    column : str
        Vector column.
    """

    def __init__(self, dataset: lance.LanceDataset, metric: str, column: str = "vec") -> None:
        row_ids, vectors = read_vectors(dataset, column)
        good = [i for i, vector in enumerate(vectors) if _usable(vector, metric)]
        self.metric = metric
        self.row_ids = row_ids[good]
        self.vectors = np.array([[float(v) for v in vectors[i]] for i in good], dtype=np.float64)
        self._place = {int(row): at for at, row in enumerate(self.row_ids)}

    def __len__(self) -> int:
        return len(self.row_ids)

    def distances(self, query: Any) -> NDArray[np.float64]:
        """Lance's distances from one query to every usable row."""
        q = np.asarray(query, dtype=np.float64)
        if self.metric == "l2":
            return np.asarray(np.square(self.vectors - q).sum(axis=1))
        dots = self.vectors @ q
        if self.metric == "cosine":
            dots = dots / (np.linalg.norm(self.vectors, axis=1) * np.linalg.norm(q))
        return np.asarray(1 - dots)

    def knn(self, query: Any, k: int) -> tuple[NDArray[np.float64], NDArray[np.uint64]]:
        """Nearest usable rows of one query: at most k, ties by row id."""
        distances = self.distances(query)
        order = np.lexsort((self.row_ids, distances))[:k]
        return distances[order], self.row_ids[order]

    def vector(self, row_id: int) -> NDArray[np.float64]:
        """Vector of a row."""
        return np.asarray(self.vectors[self._place[int(row_id)]])

    def recall(self, queries: Any, row_ids: NDArray[np.uint64]) -> float:
        """Share of the true neighbours that an answer of the same width holds."""
        k = row_ids.shape[1]
        hits: int = sum(
            len(set(self.knn(query, k)[1].tolist()) & set(found.tolist()))
            for query, found in zip(queries, row_ids, strict=True)
        )
        return float(hits / (len(queries) * min(k, len(self))))


def assert_exact(
    truth: Exact,
    queries: Any,
    distances: NDArray[np.float32],
    row_ids: NDArray[np.uint64],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-6,
    scale: float = 1.0,
) -> None:
    """Assert that an answer is the exact one, up to rounding of its distances.

    Rows whose distances are closer than rounding may stand in either order; every distance must be
    that of the row beside it, and no row may come twice. ``scale`` is the size of what was summed up
    (float32 rounding is relative to that, not to a small difference).
    """
    missing = np.uint64(2**64 - 1)
    for query, found, ids in zip(np.atleast_2d(queries), distances, row_ids, strict=True):
        expected, _ = truth.knn(query, len(found))
        count = len(expected)
        tolerance = atol * scale + rtol * np.abs(expected)
        assert (ids[count:] == missing).all()
        assert np.isposinf(found[count:]).all()
        assert (np.diff(found[:count]) >= 0).all(), "distances must ascend"
        assert (np.abs(found[:count] - expected) <= tolerance).all(), (found[:count] - expected, tolerance)
        assert len(set(ids[:count].tolist())) == count, "a row came twice"
        everything = dict(zip(truth.row_ids.tolist(), truth.distances(query).tolist(), strict=True))
        own = np.array([everything[int(row)] for row in ids[:count]])
        assert (np.abs(found[:count] - own) <= tolerance).all(), "a distance is not that of its row"


def same_rows(
    left: tuple[NDArray[np.float32], NDArray[np.uint64]], right: tuple[NDArray[np.float32], NDArray[np.uint64]]
) -> None:
    """Assert that two answers agree to the bit."""
    np.testing.assert_array_equal(left[1], right[1])
    np.testing.assert_array_equal(left[0], right[0])


def live_table(dataset: lance.LanceDataset) -> dict[int, int]:
    """Row id of each live row's ``id``."""
    table = dataset.to_table(columns=["id"], with_row_id=True)
    return dict(zip(table["id"].to_pylist(), table["_rowid"].to_pylist(), strict=True))


def _usable(vector: Any, metric: str) -> bool:
    if vector is None or any(value is None for value in vector):
        return False
    values = [float(value) for value in vector]
    if not all(math.isfinite(value) for value in values):
        return False
    return metric != "cosine" or any(values)
