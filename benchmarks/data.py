"""The data: real embeddings of words, and a synthetic set; written once, cached in the run's folder.

`LANCE_DFAISS_WORDNET` may name a folder with ``vectors.f16.npy``, ``queries.f16.npy`` and
``neighbors100.i32.npy``; without it, the rows that ship with the examples are used.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pyarrow as pa
from faiss.contrib.datasets import SyntheticDataset
from numpy.typing import NDArray

import lance_dfaiss

from .settings import K, Settings

__all__ = ["COLUMN", "Corpus", "Float32Array", "Int64Array", "synthetic", "words"]

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

COLUMN = "vector"

_EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
_FRAGMENTS = 8
_NEIGHBORS = 100

# SyntheticDataset draws all its parts from one stream, training rows first: they decide what the others are.
_TRAINING_ROWS = 262_144


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Vectors in a Lance dataset and in RAM, queries, and the true neighbours.

    Parameters
    ----------
    name : str
        As the tables name it.
    path : Path
        The Lance dataset.
    vectors, queries : numpy.ndarray
        float32 ``(rows, dim)`` and ``(n_queries, dim)``.
    neighbors : numpy.ndarray
        int64 ``(n_queries, >= 10)``: positions of the nearest rows by L2, nearest first.
    """

    name: str
    path: Path
    vectors: Float32Array
    queries: Float32Array
    neighbors: Int64Array

    def __str__(self) -> str:
        return f"{self.name} {len(self.vectors):,} x {self.vectors.shape[1]}"

    def open(self) -> Any:
        """Return a new handle at the newest version."""
        return lance.dataset(str(self.path))

    def positions(self, row_ids: NDArray[np.uint64]) -> Int64Array:
        """Return places in `vectors` of row ids (here: addresses), -1 for missing."""
        sizes = [fragment.physical_rows for fragment in self.open().get_fragments()]
        firsts = np.concatenate(([0], np.cumsum(sizes)))
        missing = row_ids == lance_dfaiss.MISSING_ROW_ID
        fragments = np.where(missing, 0, row_ids >> np.uint64(32)).astype(np.int64)
        found = firsts[fragments] + (row_ids & np.uint64(0xFFFFFFFF)).astype(np.int64)
        return np.where(missing, -1, found)

    def recall(self, positions: Int64Array) -> float:
        """Return recall@10 of answers to the first queries, int64 ``(n, >= 10)``."""
        pairs = zip(self.neighbors[:, :K], positions[:, :K], strict=False)
        return float(np.mean([len(np.intersect1d(true, found)) for true, found in pairs]) / K)

    def reset(self) -> None:
        """Remove every index, ours and Lance's own, and the files of those before."""
        dataset = self.open()
        for name in lance_dfaiss.list_indices(dataset):
            dataset = lance_dfaiss.drop_index(dataset, name)
        for description in dataset.describe_indices():
            dataset.drop_index(description.name)
        self.open().cleanup_old_versions(datetime.timedelta(0), delete_unverified=True)
        if (self.path / "_dfaiss").exists():
            shutil.rmtree(self.path / "_dfaiss")


def words(settings: Settings) -> Corpus:
    """Return the embeddings of words, with real queries."""
    folder = Path(os.environ.get("LANCE_DFAISS_WORDNET", _EXAMPLES))
    limit, queries = settings.words_rows, settings.words_queries

    def make() -> tuple[Float32Array, Float32Array, Int64Array]:
        base = np.load(folder / "vectors.f16.npy")[:limit].astype(np.float32)
        asked = np.load(folder / "queries.f16.npy")[:queries].astype(np.float32)
        known = folder / "neighbors100.i32.npy"
        if limit is None and known.exists():
            return base, asked, np.load(known)[:queries].astype(np.int64)
        return base, asked, _exact(base, asked)

    rows = len(np.load(folder / "vectors.f16.npy", mmap_mode="r")[:limit])
    return _cached(settings, "words", rows, _FRAGMENTS, make)


def synthetic(settings: Settings, *, rows: int | None = None, fragments: int = _FRAGMENTS) -> Corpus:
    """Return the synthetic set: vectors of low intrinsic dimension, as FAISS makes them for its own benchmarks."""
    count = settings.synthetic_rows if rows is None else rows

    def make() -> tuple[Float32Array, Float32Array, Int64Array]:
        training = 0 if settings.quick else _TRAINING_ROWS
        made = SyntheticDataset(settings.synthetic_dim, training, count, settings.synthetic_queries)
        base, asked = made.get_database(), made.get_queries()
        return base, asked, _exact(base, asked)

    return _cached(settings, "synthetic", count, fragments, make)


def _exact(base: Float32Array, queries: Float32Array) -> Int64Array:
    _, found = faiss.knn(queries, base, _NEIGHBORS)
    return np.asarray(found, dtype=np.int64)


def _cached(
    settings: Settings,
    name: str,
    rows: int,
    fragments: int,
    make: Callable[[], tuple[Float32Array, Float32Array, Int64Array]],
) -> Corpus:
    folder = settings.into / "data" / f"{name}-{rows}{'-quick' if settings.quick else ''}"
    arrays = folder / "arrays.npz"
    if not arrays.exists():
        folder.mkdir(parents=True, exist_ok=True)
        base, queries, neighbors = make()
        unfinished = folder / "unfinished.npz"
        np.savez(unfinished, vectors=base, queries=queries, neighbors=neighbors)
        unfinished.rename(arrays)
    with np.load(arrays) as stored:
        corpus = Corpus(
            name, folder / f"{fragments}-fragments.lance", stored["vectors"], stored["queries"], stored["neighbors"]
        )
    if not corpus.path.exists():
        _write_dataset(corpus, fragments)
    return corpus


def _write_dataset(corpus: Corpus, fragments: int) -> None:
    rows, dim = corpus.vectors.shape
    # Written under another name first: a folder of the right name is always a whole dataset.
    unfinished = corpus.path.with_suffix(".unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    column = pa.FixedSizeListArray.from_arrays(pa.array(corpus.vectors.reshape(-1)), dim)
    lance.write_dataset(
        pa.table({COLUMN: column}), str(unfinished), max_rows_per_file=-(-rows // fragments), mode="create"
    )
    unfinished.rename(corpus.path)
