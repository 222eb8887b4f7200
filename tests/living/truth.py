"""What is true of one dataset version, read through plain Lance: its rows, their distances, who matches a filter.

Vectors hold small whole numbers, so L2 and dot are exact in every float type and there are many ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["DIM", "FILTERS", "VECTOR_NAMES", "Filter", "Truth", "make_rows", "make_vectors", "vector_name"]

DIM = 8

VECTOR_NAMES = ("vec", "emb")
"""The vector column is sometimes called the one, sometimes the other."""

_META = pa.struct([("a", pa.int64()), ("b", pa.string())])
_MISSING = np.uint64(2**64 - 1)

# Cosine is computed from rounded unit vectors.
_COSINE_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Filter:
    """A condition as SQL and as Python; None (unknown) counts as no match.

    Attributes
    ----------
    sql : str or None
        For the package under test.
    columns : tuple of str
        What it reads.
    matches : callable
        Row to bool or None.
    """

    sql: str | None
    columns: tuple[str, ...]
    matches: Callable[[Mapping[str, Any]], bool | None]


def _below(limit: int) -> Filter:
    return Filter(f"n < {limit}", ("n",), lambda row: row["n"] is not None and row["n"] < limit)


def _meta(row: Mapping[str, Any], name: str) -> Any:
    return None if row["meta"] is None else row["meta"][name]


FILTERS: tuple[Filter, ...] = (
    _below(0),
    _below(3),
    _below(50),
    Filter("n >= 0", ("n",), lambda row: row["n"] is not None),
    Filter("n < 80 OR n IS NULL", ("n",), lambda row: row["n"] is None or row["n"] < 80),
    Filter("id % 7 = 3", ("id",), lambda row: row["id"] % 7 == 3),
    Filter("id >= 0", ("id",), lambda _: True),
    Filter("word = 'w1'", ("word",), lambda row: row["word"] == "w1"),
    Filter("word IS NULL", ("word",), lambda row: row["word"] is None),
    Filter("word <> 'w1'", ("word",), lambda row: row["word"] is not None and row["word"] != "w1"),
    Filter("word IN ('w0', 'w2') AND n > 20", ("word", "n"),
           lambda row: row["word"] in ("w0", "w2") and row["n"] is not None and row["n"] > 20),
    Filter("meta.a > 4", ("meta",), lambda row: _meta(row, "a") is not None and _meta(row, "a") > 4),
    Filter("meta.a IS NULL", ("meta",), lambda row: _meta(row, "a") is None),
    Filter("meta.b = 'b1' AND id % 2 = 0", ("meta", "id"), lambda row: _meta(row, "b") == "b1" and row["id"] % 2 == 0),
)  # fmt: skip
"""Match sets from nothing to everything, over numbers, strings with nulls and fields of a struct."""

NO_FILTER = Filter(None, (), lambda _: True)


def make_vectors(seed: int, count: int, *, dim: int = DIM, half: bool = False) -> pa.FixedSizeListArray:
    """Return vectors of which some are null, not finite, zero, or hold a null."""
    rng = np.random.default_rng([seed, 1])
    values = rng.integers(-3, 4, (count, dim)).astype(np.float32)
    fate = rng.random(count)
    null, hole = fate < 0.06, (fate >= 0.06) & (fate < 0.08)
    values[(fate >= 0.08) & (fate < 0.11), 0] = np.nan
    values[(fate >= 0.11) & (fate < 0.12), 1] = np.inf
    values[(fate >= 0.12) & (fate < 0.15)] = 0
    holes = np.zeros((count, dim), dtype=bool)
    holes[hole, 2] = True
    kind = pa.float16() if half else pa.float32()
    flat = pa.array(values.ravel().astype(np.float16 if half else np.float32), kind, mask=holes.ravel())
    return pa.FixedSizeListArray.from_arrays(flat, dim, mask=pa.array(null))


def make_rows(schema: pa.Schema, seed: int, ids: Sequence[int]) -> pa.Table:
    """Return rows of a schema; the ``id`` column as given, everything else by the seed."""
    count = len(ids)
    rng = np.random.default_rng([seed, 2])
    columns = {}
    for field in schema:
        if field.name == "id":
            columns[field.name] = pa.array(ids, pa.int64())
        elif pa.types.is_fixed_size_list(field.type):
            half = pa.types.is_float16(field.type.value_type)
            columns[field.name] = make_vectors(seed, count, dim=field.type.list_size, half=half)
        elif pa.types.is_struct(field.type):
            columns[field.name] = pa.array([_some_meta(rng) for _ in range(count)], field.type)
        elif pa.types.is_string(field.type):
            words = [None if rng.random() < 0.2 else f"w{rng.integers(4)}" for _ in range(count)]
            columns[field.name] = pa.array(words, field.type)
        else:
            columns[field.name] = pa.array(rng.integers(0, 100, count), pa.int64()).cast(field.type)
    return pa.table(columns)


def first_schema() -> pa.Schema:
    """Return the schema that a dataset begins with."""
    vector = pa.list_(pa.float32(), DIM)
    return pa.schema([("id", pa.int64()), ("vec", vector), ("n", pa.int64()), ("word", pa.string()), ("meta", _META)])


def vector_name(schema: pa.Schema) -> str | None:
    """Return what the vector column is called now, None when it was dropped."""
    return next((name for name in VECTOR_NAMES if name in schema.names), None)


def _some_meta(rng: np.random.Generator) -> dict[str, Any] | None:
    if rng.random() < 0.15:
        return None
    return {"a": None if rng.random() < 0.15 else int(rng.integers(10)), "b": f"b{rng.integers(3)}"}


class Truth:
    """All rows of one dataset version.

    Parameters
    ----------
    dataset : lance.LanceDataset
        At the version.
    """

    def __init__(self, dataset: lance.LanceDataset) -> None:
        names = [name for name in ("id", "n", "word", "meta", *VECTOR_NAMES) if name in dataset.schema.names]
        table = dataset.to_table(columns=names, with_row_id=True)
        self.version = dataset.version
        self.columns = frozenset(names)
        self.row_ids: NDArray[np.uint64] = table["_rowid"].to_numpy()
        self.rows: list[dict[str, Any]] = table.drop_columns(
            [name for name in VECTOR_NAMES if name in names]
        ).to_pylist()
        self.vectors = {name: _floats(table[name]) for name in VECTOR_NAMES if name in names}
        assert len(set(self.row_ids.tolist())) == len(self.row_ids), "Lance has a row id twice"

    def __len__(self) -> int:
        return len(self.row_ids)

    def usable(self, column: str, metric: str) -> NDArray[np.bool_]:
        """Tell which rows can be found."""
        vectors = self.vectors[column]
        good = np.isfinite(vectors).all(axis=1)
        return np.asarray(good & vectors.any(axis=1)) if metric == "cosine" else np.asarray(good)

    def mask(self, condition: Filter) -> NDArray[np.bool_]:
        """Tell which rows match."""
        return np.array([bool(condition.matches(row)) for row in self.rows], dtype=bool)

    def distances(self, column: str, metric: str, query: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return Lance's distance of every row; nonsense for rows that are not usable."""
        with np.errstate(all="ignore"):
            vectors = self.vectors[column]
            if metric == "l2":
                return np.asarray(np.square(vectors - query).sum(axis=1))
            dots = vectors @ query
            if metric == "cosine":
                dots = dots / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))
            return np.asarray(1 - dots)

    def check(
        self,
        column: str,
        metric: str,
        query: NDArray[np.float32],
        k: int,
        mask: NDArray[np.bool_] | None,
        distances: NDArray[np.float32],
        row_ids: NDArray[np.uint64],
    ) -> None:
        """Assert that an answer is the exact one: rows, distances, order, and what fills up the rest."""
        usable = self.usable(column, metric)
        chosen = np.flatnonzero(usable if mask is None else usable & mask)
        truth = self.distances(column, metric, query.astype(np.float64))
        expected = np.sort(truth[chosen])[:k]
        count = len(expected)
        tolerance = _COSINE_TOLERANCE if metric == "cosine" else 0.0
        assert distances.shape == row_ids.shape == (k,)
        found = row_ids[:count].tolist()
        assert int((row_ids != _MISSING).sum()) == count, f"{count} rows can be found, got {row_ids.tolist()}"
        assert (row_ids[count:] == _MISSING).all()
        assert np.isposinf(distances[count:]).all()
        assert len(set(found)) == count, f"a row came twice: {found}"
        own = dict(zip(self.row_ids[chosen].tolist(), truth[chosen].tolist(), strict=True))
        strangers = [row for row in found if row not in own]
        assert not strangers, f"rows that must not be found: {self._explain(strangers)}"
        np.testing.assert_allclose(distances[:count], expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(distances[:count], [own[row] for row in found], rtol=0, atol=tolerance)
        _check_order(distances[:count], found)

    def check_range(
        self,
        column: str,
        metric: str,
        query: NDArray[np.float32],
        radius: float,
        mask: NDArray[np.bool_] | None,
        table: pa.Table,
    ) -> None:
        """Assert that a range search found exactly the rows within the radius; no row may lie on it."""
        usable = self.usable(column, metric)
        chosen = usable if mask is None else usable & mask
        truth = self.distances(column, metric, query.astype(np.float64))
        expected = np.flatnonzero(chosen & (truth <= radius))
        found, distances = table["_rowid"].to_pylist(), table["_distance"].to_numpy()
        assert sorted(found) == sorted(self.row_ids[expected].tolist())
        own = dict(zip(self.row_ids.tolist(), truth.tolist(), strict=True))
        tolerance = _COSINE_TOLERANCE if metric == "cosine" else 0.0
        np.testing.assert_allclose(distances, [own[row] for row in found], rtol=0, atol=tolerance)
        _check_order(distances, found)

    def gap(self, column: str, metric: str, query: NDArray[np.float32], share: float) -> float:
        """Return a radius that no row lies on, with about that share of rows within."""
        usable = self.usable(column, metric)
        steps = np.unique(np.round(self.distances(column, metric, query.astype(np.float64))[usable], 4))
        if len(steps) < 2:
            return 1e3
        at = min(int(share * len(steps)), len(steps) - 2)
        return float(steps[at] + steps[at + 1]) / 2

    def _explain(self, row_ids: Sequence[int]) -> list[str]:
        known = set(self.row_ids.tolist())
        return [f"{row} ({'unusable or filtered out' if row in known else 'not in this version'})" for row in row_ids]


def _check_order(distances: NDArray[np.float32], row_ids: Sequence[int]) -> None:
    steps = np.diff(distances)
    assert (steps >= 0).all(), "distances must ascend"
    ties = np.flatnonzero(steps == 0)
    assert all(row_ids[at] < row_ids[at + 1] for at in ties.tolist()), "ties must stand in order of row id"


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Return vectors as float64, NaN for whatever is null."""
    parts = []
    for chunk in column.chunks:
        width = chunk.type.list_size
        flat = chunk.values[chunk.offset * width : (chunk.offset + len(chunk)) * width]
        values = pc.cast(flat, pa.float32()).to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)
        values[~np.asarray(chunk.is_valid())] = np.nan
        parts.append(values)
    return np.concatenate(parts) if parts else np.empty((0, column.type.list_size))
