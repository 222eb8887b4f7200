"""The other peer: the index that the format itself has, called in whatever way is fastest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .data import COLUMN, Corpus, Float32Array, Int64Array
from .settings import K

__all__ = ["NATIVE_KINDS", "NativeIndex", "NativeKind", "build_native", "caller_pools"]

NAME = "native"
_CALLERS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeKind:
    """One of Lance's index types and the refine factors it is searched with.

    Parameters
    ----------
    index_type : str
        Lance's name.
    sub_vectors : bool
        Whether it takes ``num_sub_vectors``; one for each 8 dimensions is asked for.
    refine_factors : tuple of (int or None)
        None searches without reading vectors again.
    """

    index_type: str
    sub_vectors: bool
    refine_factors: tuple[int | None, ...]

    def parameters(self, corpus: Corpus, partitions: int) -> dict[str, int]:
        """Return the arguments that decide what is built."""
        dim = corpus.vectors.shape[1]
        return {"num_partitions": partitions, **({"num_sub_vectors": max(dim // 8, 1)} if self.sub_vectors else {})}


NATIVE_KINDS = (
    NativeKind(index_type="IVF_PQ", sub_vectors=True, refine_factors=(4, 16)),
    NativeKind(index_type="IVF_SQ", sub_vectors=False, refine_factors=(None,)),
    NativeKind(index_type="IVF_RQ", sub_vectors=False, refine_factors=(None, 4)),
)


def build_native(corpus: Corpus, index_type: str, parameters: Mapping[str, int]) -> Any:
    """Build Lance's own index over the whole column, committed; return the handle."""
    return corpus.open().create_index(COLUMN, index_type, name=NAME, replace=True, metric="L2", **parameters)


class NativeIndex:
    """Lance's own index, built, prewarmed, searched.

    Parameters
    ----------
    corpus : Corpus
        What it indexes.
    kind : NativeKind
        Its type.
    partitions : int
        IVF lists.
    """

    def __init__(self, corpus: Corpus, kind: NativeKind, partitions: int) -> None:
        build_native(corpus, kind.index_type, kind.parameters(corpus, partitions))
        self._corpus = corpus
        self._dataset = corpus.open()
        self._dataset.prewarm_index(NAME)

    def drop(self) -> None:
        """Remove it from the dataset."""
        self._dataset.drop_index(NAME)

    def positions(
        self, queries: Float32Array, nprobe: int | None, refine_factor: int | None, filter_sql: str | None = None
    ) -> Int64Array:
        """Return positions, int64 ``(n_queries, 10)``, -1 where there were fewer."""
        found = np.full((len(queries), K), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            ids = self.search(query, nprobe, refine_factor, filter_sql)["_rowid"].to_numpy()
            found[row, : len(ids)] = self._corpus.positions(ids)
        return found

    def ways(
        self, queries: Float32Array, nprobe: int, refine_factor: int | None, pools: Mapping[int, ThreadPoolExecutor]
    ) -> dict[str, Callable[[], object]]:
        """Return every way to ask all queries: in one call, or one a call from some threads."""
        one = partial(self.search, nprobe=nprobe, refine_factor=refine_factor)

        def spread(pool: ThreadPoolExecutor) -> object:
            return list(pool.map(one, queries))

        batch: dict[str, Callable[[], object]] = {"one call": partial(one, queries)}
        return batch | {f"{callers} callers": partial(spread, pool) for callers, pool in pools.items()}

    def search(
        self,
        query: Float32Array,
        nprobe: int | None,
        refine_factor: int | None,
        filter_sql: str | None = None,
        *,
        scalar_index: bool = True,
    ) -> Any:
        """Return the table of results.

        Parameters
        ----------
        query : numpy.ndarray
            float32 ``(dim,)`` or ``(n_queries, dim)``.
        nprobe : int or None
            Lists searched; None compares with every row, and leaves the index alone.
        refine_factor : int or None
            None reads no vectors again.
        filter_sql : str, optional
            Only rows that match, found before the search.
        scalar_index : bool
            Whether a scalar index may be used for the filter.
        """
        nearest: dict[str, Any] = {"column": COLUMN, "q": query, "k": K}
        if nprobe is None:
            nearest["use_index"] = False
        else:
            nearest["nprobes"] = nprobe
        if refine_factor is not None:
            nearest["refine_factor"] = refine_factor
        return self._dataset.scanner(
            columns=["_distance"],
            nearest=nearest,
            filter=filter_sql,
            prefilter=filter_sql is not None,
            use_scalar_index=scalar_index,
            with_row_id=True,
            disable_scoring_autoprojection=True,
        ).to_table()


def caller_pools() -> dict[int, ThreadPoolExecutor]:
    """Make a pool of threads for each number of callers that is tried; the caller shuts them down."""
    return {callers: ThreadPoolExecutor(callers) for callers in _CALLERS}
