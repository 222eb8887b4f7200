"""The peer that sets the pace: the same FAISS index, in the same process, without anything around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np

import lance_dfaiss

from .data import Corpus, Float32Array, Int64Array
from .settings import K

__all__ = ["RawIndex", "build_raw", "factory_of"]

_REFINE = {"sq8": ",Refine(SQ8)", "fp16": ",Refine(SQfp16)", "flat": ",RFlat"}


def factory_of(planned: lance_dfaiss.PlannedBuild) -> str:
    """Return the FAISS factory string of what a plan builds, refine store included."""
    spec = planned.plan.spec
    return spec.factory + (_REFINE[spec.refine] if spec.refine is not None else "")


def build_raw(factory: str, vectors: Float32Array, *, sample_rows: int, seed: int, target: Path) -> None:
    """Train, add and write, as a FAISS user would: vectors in RAM, the default 10 iterations of k-means.

    Parameters
    ----------
    factory : str
        FAISS factory string.
    vectors : numpy.ndarray
        float32 ``(rows, dim)``.
    sample_rows, seed : int
        Training rows, drawn at random.
    target : Path
        File to write.
    """
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2)
    ivf = faiss.extract_index_ivf(index)
    ivf.cp.seed = seed
    # As small as quick runs are, FAISS would warn about every list.
    ivf.cp.min_points_per_centroid = 1
    chosen = np.random.default_rng(seed).choice(len(vectors), size=sample_rows, replace=False)
    index.train(vectors[np.sort(chosen)])
    index.add(vectors)
    faiss.write_index(index, str(target))


class RawIndex:
    """A raw FAISS index with the trained model of one of ours, so that only what is around it differs.

    Parameters
    ----------
    corpus : Corpus
        What both index.
    name : str
        Our index.
    """

    def __init__(self, corpus: Corpus, name: str) -> None:
        found = lance_dfaiss.describe_index(corpus.open(), name)
        model = found.manifest.model.file.name
        self._index: Any = faiss.read_index(str(corpus.path / "_dfaiss" / model))
        self._index.add(corpus.vectors)
        self._refined = found.manifest.spec.refine is not None
        self._params: dict[tuple[int, int], Any] = {}

    def search(self, queries: Float32Array, nprobe: int, k_factor: int) -> Int64Array:
        """Return positions, int64 ``(n_queries, 10)``."""
        params = self._params.get((nprobe, k_factor))
        if params is None:
            params = faiss.SearchParametersIVF(nprobe=nprobe)
            if self._refined:
                params = faiss.IndexRefineSearchParameters(k_factor=float(k_factor), base_index_params=params)
            self._params[nprobe, k_factor] = params
        _, positions = self._index.search(queries, K, params=params)
        return positions  # type: ignore[no-any-return]
