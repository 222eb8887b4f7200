"""The data: real embeddings of words, and a synthetic set; written once, cached in the run's folder.

`LANCE_DFAISS_WORDNET` may name a folder with ``vectors.f16.npy``, ``queries.f16.npy`` and
``neighbors100.i32.npy``; without it, the rows that ship with the examples are used.
"""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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

__all__ = [
    "COLUMN",
    "RANK",
    "Corpus",
    "Float32Array",
    "Int64Array",
    "append",
    "ranked",
    "ranks",
    "synthetic",
    "words",
]

Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]

COLUMN = "vector"

RANK = "rank"
"""A column of numbers 0, 1, 2 ... in random order: a range of it is a random share of the rows."""

_EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
_FRAGMENTS = 8
_NEIGHBORS = 100

# SyntheticDataset draws all its parts from one stream, training rows first: they decide what the others are.
_TRAINING_ROWS = 262_144

_RANK_SEED = 5


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


def synthetic(
    settings: Settings, *, rows: int | None = None, dim: int | None = None, fragments: int = _FRAGMENTS
) -> Corpus:
    """Return the synthetic set: vectors of low intrinsic dimension, as FAISS makes them for its own benchmarks."""
    count = settings.synthetic_rows if rows is None else rows

    def make() -> tuple[Float32Array, Float32Array, Int64Array]:
        training = 0 if settings.quick else _TRAINING_ROWS
        made = SyntheticDataset(dim or settings.synthetic_dim, training, count, settings.synthetic_queries)
        base, asked = made.get_database(), made.get_queries()
        return base, asked, _exact(base, asked)

    return _cached(settings, "synthetic", count, fragments, make, dim=dim)


def ranks(corpus: Corpus) -> Int64Array:
    """Return the numbers in the column `RANK` of a corpus, int64 ``(rows,)``."""
    return np.random.default_rng(_RANK_SEED).permutation(len(corpus.vectors)).astype(np.int64)


def ranked(corpus: Corpus, name: str, *, fresh: bool = False) -> Corpus:
    """Return a corpus with the column `RANK` beside the vectors.

    Parameters
    ----------
    corpus : Corpus
        The vectors.
    name : str
        Of the dataset: one for each use, so that nobody finds another's indexes or changes.
    fresh : bool
        Write it anew also where it is there already, for those who change it.
    """
    made = replace(corpus, path=corpus.path.with_name(f"{name}.lance"))
    if fresh and made.path.exists():
        shutil.rmtree(made.path)
    if not made.path.exists():
        _write_dataset(made, _FRAGMENTS, {RANK: pa.array(ranks(corpus))})
    return made


def append(corpus: Corpus, rows: int, seed: int) -> None:
    """Append rows to a `ranked` dataset: known vectors with a little noise, ranks above all others."""
    random = np.random.default_rng(seed)
    chosen = corpus.vectors[random.integers(0, len(corpus.vectors), rows)]
    noise = random.standard_normal(chosen.shape, dtype=np.float32) * np.float32(0.1 * chosen.std())
    first = corpus.open().count_rows()
    table = pa.table({COLUMN: _fixed_size_lists(chosen + noise), RANK: np.arange(first, first + rows)})
    lance.write_dataset(table, str(corpus.path), mode="append")


def _exact(base: Float32Array, queries: Float32Array) -> Int64Array:
    _, found = faiss.knn(queries, base, _NEIGHBORS)
    return np.asarray(found, dtype=np.int64)


def _cached(
    settings: Settings,
    name: str,
    rows: int,
    fragments: int,
    make: Callable[[], tuple[Float32Array, Float32Array, Int64Array]],
    *,
    dim: int | None = None,
) -> Corpus:
    size = str(rows) if dim is None else f"{rows}x{dim}"
    folder = settings.into / "data" / f"{name}-{size}{'-quick' if settings.quick else ''}"
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


def _write_dataset(corpus: Corpus, fragments: int, columns: Mapping[str, pa.Array] | None = None) -> None:
    # Written under another name first: a folder of the right name is always a whole dataset.
    unfinished = corpus.path.with_suffix(".unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    table = pa.table({COLUMN: _fixed_size_lists(corpus.vectors), **(columns or {})})
    lance.write_dataset(table, str(unfinished), max_rows_per_file=-(-len(table) // fragments), mode="create")
    unfinished.rename(corpus.path)


def _fixed_size_lists(vectors: Float32Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
