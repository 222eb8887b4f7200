"""The first searches of a snapshot, before anybody asks: so that no client waits for what happens only once."""

from __future__ import annotations

import time

import numpy as np

from ..engine import limit_threads
from ..search.view import Selection, View
from ..types import Float32Array

__all__ = ["warm"]

# A few more than it takes until code, codes and threads are where they will be used.
_SINGLE, _BATCH, _K = 24, 32, 10

# Between queries that come one at a time the cores go to sleep, and waking them is part of each search.
_GAP_SECONDS = 0.0003


def warm(view: View, threads: int) -> int:
    """Search like clients will, and return how many cores a search of one query is fastest with.

    Several cores share the work, but have to be woken first: for a small index that takes longer than the search.

    Parameters
    ----------
    view : View
        What to search.
    threads : int
        Cores that a search may use.
    """
    if not view.rows:
        return threads
    queries = _likely_queries(view)
    selection = view.cached(None, include_tail=True) or view.select(None, include_tail=False)
    widths = view.widths(None, None, None)
    limit_threads(threads)
    view.knn(queries, _K, widths, selection)
    seconds = {count: _lone_seconds(view, selection, queries, count) for count in {threads: None, 1: None}}
    limit_threads(threads)
    return min(seconds, key=lambda count: seconds[count])


def _lone_seconds(view: View, selection: Selection, queries: Float32Array, threads: int) -> float:
    """Return the median time of queries that come one at a time."""
    limit_threads(threads)
    widths = view.widths(None, None, None)
    seconds = []
    for query in queries[:_SINGLE]:
        time.sleep(_GAP_SECONDS)
        started = time.perf_counter()
        view.knn(query[None], _K, widths, selection)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds))


def _likely_queries(view: View) -> Float32Array:
    """Return float32 ``(_BATCH, dim)``: rows of the index where it can decode them, else noise."""
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(view.snapshot.live)
    if len(positions) and all(loaded.segment.can_decode for loaded in view.loaded):
        chosen = np.sort(rng.choice(positions, size=_BATCH))
        return view.vectors(view.snapshot.row_ids.numbers(chosen))
    return rng.standard_normal((_BATCH, view.model.spec.dim)).astype(np.float32)
