"""Small datasets, and what the tests of building compare: files on disk and answers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from lance_dfaiss import open_index
from lance_dfaiss.types import Float32Array, UInt64Array

DIM = 8
FRAGMENTS = 4
ROWS_PER_FRAGMENT = 300
NAME = "idx"

NEW: dict[str, Any] = {
    "index_type": "IVF_SQ",
    "num_partitions": 4,
    "refine": "sq8",
    "num_shards": FRAGMENTS,
}
"""What is built: every kind of file, one shard a fragment."""


def vectors(rows: int = FRAGMENTS * ROWS_PER_FRAGMENT, *, dim: int = DIM, seed: int = 7) -> Float32Array:
    """Return float32 ``(rows, dim)``."""
    return np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)


def table(values: Float32Array) -> pa.Table:
    """Return a table with a column ``vector`` and a number per row."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.table({"vector": column, "number": pa.array(range(len(values)), pa.int64())})


def write(path: Path, values: Float32Array | None = None) -> lance.LanceDataset:
    """Write a dataset of four fragments (or as many as the vectors give)."""
    values = vectors() if values is None else values
    return lance.write_dataset(table(values), str(path), max_rows_per_file=ROWS_PER_FRAGMENT)


def copy(template: Path, target: Path) -> Path:
    """Copy a dataset with all that lies in it; return the copy's path."""
    shutil.copytree(template, target)
    return target


def answers(dataset: Any, name: str | None = None, **options: Any) -> tuple[Float32Array, UInt64Array]:
    """Open the index and ask it 20 questions."""
    return open_index(dataset, name, **options).knn(vectors(20, seed=99), k=10)


def same(left: tuple[Any, Any], right: tuple[Any, Any]) -> bool:
    """Tell whether two answers are equal to the last bit."""
    return bool(np.array_equal(left[0], right[0]) and np.array_equal(left[1], right[1]))


def files(folder: Path) -> dict[str, int]:
    """Return all files below a folder with their lengths, temporary ones too."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def temporary(folder: Path) -> list[str]:
    """Return the files below a folder that were never finished."""
    return [name for name in files(folder) if "/.tmp-" in f"/{name}"]
