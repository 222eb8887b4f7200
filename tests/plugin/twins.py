"""One dataset seen plainly and through the plug-in, and what it means for their answers to be the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from lance_dfaiss.plugin import DfaissDataset

ROWS, DIM = 400, 8
RNG = np.random.default_rng(7)
VECTORS = RNG.standard_normal((ROWS, DIM)).astype(np.float32)
QUERY = VECTORS[3] + np.float32(0.05)
BATCH = VECTORS[[5, 200, 399]] + np.float32(0.05)

Pair = tuple[lance.LanceDataset, DfaissDataset]


def rows(vectors: np.ndarray[Any, Any], first: int = 0) -> pa.Table:
    ids = range(first, first + len(vectors))
    return pa.table(
        [
            pa.array(ids, pa.int64()),
            pa.array([f"w{i}" for i in ids]),
            pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
            pa.array([{"x": i} for i in ids]),
        ],
        schema=pa.schema(
            [
                pa.field("id", pa.int64(), nullable=False),
                pa.field("s", pa.string(), metadata={"unit": "word"}),
                pa.field("vec", pa.list_(pa.float32(), DIM)),
                pa.field("st", pa.struct([("x", pa.int64())])),
            ],
            metadata={"made": "by hand"},
        ),
    )


def written(path: Path, *, stable: bool = False) -> lance.LanceDataset:
    return lance.write_dataset(rows(VECTORS), path, max_rows_per_file=150, enable_stable_row_ids=stable)


def same(theirs: pa.Table, ours: pa.Table) -> None:
    assert ours.schema.equals(theirs.schema, check_metadata=True), f"{theirs.schema}\n{ours.schema}"
    assert ours.num_rows == theirs.num_rows
    for name in theirs.schema.names:
        if name == "_distance":
            np.testing.assert_allclose(ours[name].to_numpy(), theirs[name].to_numpy(), rtol=1e-4, atol=1e-5)
        else:
            assert ours[name].to_pylist() == theirs[name].to_pylist(), name


def ask(dataset: lance.LanceDataset, nearest: dict[str, Any], options: dict[str, Any]) -> pa.Table:
    return dataset.scanner(nearest={"column": "vec", "q": QUERY, "k": 5, **nearest}, **options).to_table()
