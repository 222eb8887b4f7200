"""Filtered search: ours against Lance's prefiltered search, at several shares of matching rows."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import faiss
import numpy as np

import lance_dfaiss

from .curves import widths
from .data import COLUMN, RANK, Corpus, Float32Array, Int64Array, ranked, ranks, synthetic, words
from .native import NATIVE_KINDS, NativeIndex, NativeKind, caller_pools
from .report import Outcome, Row, compared
from .settings import K, Settings
from .timing import interleaved, median, paired_ratio, rates

__all__ = ["first_of", "run"]

NAME = "ours"

_TARGET = 0.95

# Filters in rotation: as an application has that filters by tenant or by category.
_FILTERS = 20

# Callers that Lance is given for a batch, beside one call for all of it.
_CALLERS = (2, 4)

_AIMS = {
    "20 filters": 5.0,
    "every filter new": 1.0,
    "every filter new, scalar index": 1.0,
    "every filter new, filter_columns": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filters:
    """Filters that match one share of the rows each, and what is true for them.

    Parameters
    ----------
    total, matches : int
        Rows, and rows that each filter matches.
    queries : numpy.ndarray
        float32 ``(n_queries, dim)``; query ``i`` is asked with filter ``i % 20``.
    neighbors : numpy.ndarray
        int64 ``(n_queries, min(10, matches))``: positions of the nearest matching rows.
    """

    total: int
    matches: int
    queries: Float32Array
    neighbors: Int64Array

    def sql(self, number: int) -> str:
        """Return a filter; different ones for different numbers, as long as there are different ranges."""
        first = first_of(number, self.total, self.matches)
        return f"{RANK} >= {first} AND {RANK} < {first + self.matches}"

    def recall(self, search: Callable[[Float32Array, str], Int64Array]) -> float:
        """Return the recall of a search, which is given queries and a filter and returns positions."""
        found = 0
        for number in range(min(_FILTERS, len(self.queries))):
            answers = search(self.queries[number::_FILTERS], self.sql(number))
            pairs = zip(self.neighbors[number::_FILTERS], answers, strict=True)
            found += sum(len(np.intersect1d(true, some)) for true, some in pairs)
        return found / self.neighbors.size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Peer:
    """One way to have Lance search.

    Parameters
    ----------
    native : NativeIndex
        The index, built.
    label : str
        Its type.
    nprobe, refine_factor : int or None
        As `NativeIndex.search` takes them.
    scalar_index : bool
        Whether the filter may use the scalar index.
    recall : float
        Measured.
    """

    native: NativeIndex
    label: str
    nprobe: int | None
    refine_factor: int | None
    scalar_index: bool
    recall: float

    def __str__(self) -> str:
        refined = "" if self.refine_factor is None else f" refine {self.refine_factor}"
        probed = "" if self.nprobe is None else f" nprobe {self.nprobe}"
        return f"Lance {self.label}{refined}{probed}{'' if self.scalar_index else ', filter scanned'}"

    def search(self, query: Float32Array, filter_sql: str) -> object:
        """Ask one query or a batch in one call."""
        return self.native.search(query, self.nprobe, self.refine_factor, filter_sql, scalar_index=self.scalar_index)

    def spread(self, pool: ThreadPoolExecutor, queries: Float32Array, filter_sql: str) -> object:
        """Ask a batch one query a call, from some threads."""
        return list(pool.map(lambda query: self.search(query, filter_sql), queries))


def run(settings: Settings) -> Outcome:
    """Measure both sets."""
    outcome = Outcome()
    for corpus in (words(settings), synthetic(settings)):
        outcome.take(_on(settings, corpus))
    return outcome


def _on(settings: Settings, corpus: Corpus) -> Outcome:
    partitions = settings.partitions(len(corpus.vectors))
    mine = ranked(corpus, "filtered")
    mine.reset()
    dataset = lance_dfaiss.create_index(mine.open(), COLUMN, "AUTO", NAME, num_partitions=partitions)
    # The version before the scalar index does not have it, also for those who opened it.
    plain = lance_dfaiss.open_index(dataset, NAME)
    mine.open().create_scalar_index(RANK, "BTREE")
    indexes = dict.fromkeys(_AIMS, plain) | {
        "every filter new, scalar index": lance_dfaiss.open_index(mine.open(), NAME),
        "every filter new, filter_columns": lance_dfaiss.open_index(dataset, NAME, filter_columns=[RANK]),
    }
    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        pools = {callers: stack.enter_context(pool) for callers, pool in caller_pools().items()}
        natives: dict[NativeKind, NativeIndex] = {}
        for kind in (kind for kind in NATIVE_KINDS if kind.index_type in settings.filter_peers):
            theirs = ranked(corpus, f"filtered-{kind.index_type}")
            theirs.reset()
            theirs.open().create_scalar_index(RANK, "BTREE")
            natives[kind] = NativeIndex(theirs, kind, partitions)
            stack.callback(theirs.reset)
        for share in settings.filter_shares:
            filters = _filters(corpus, share, settings.single_queries)
            peers = _peers(filters, natives, partitions)
            outcome.take(_at(settings, mine, share, filters, indexes, peers, pools))
    mine.reset()
    return outcome


def _at(
    settings: Settings,
    corpus: Corpus,
    share: float,
    filters: _Filters,
    indexes: Mapping[str, lance_dfaiss.Index],
    peers: list[_Peer],
    pools: Mapping[int, ThreadPoolExecutor],
) -> Outcome:
    recall = filters.recall(lambda queries, sql: corpus.positions(indexes["20 filters"].knn(queries, K, filter=sql)[1]))
    outcome = Outcome()
    for batch in (False, True):
        peer_name, ask_peer = _fastest(filters, peers, pools, batch=batch)
        for mode, aim in _AIMS.items():
            # Numbers go up from turn to turn, so a filter that is called new has never been asked before.
            numbers = itertools.cycle(range(_FILTERS)) if mode == "20 filters" else itertools.count(_FILTERS)
            index = indexes[mode]

            def ask_ours(queries: Float32Array, sql: str, index: lance_dfaiss.Index = index) -> object:
                return index.knn(queries, K, filter=sql)

            works = {
                "ours": partial(_ask, filters, ask_ours, numbers, batch=batch),
                "peer": partial(_ask, filters, ask_peer, numbers, batch=batch),
            }
            if mode == "20 filters":
                for search, number in itertools.product((ask_ours, ask_peer), range(_FILTERS)):
                    search(filters.queries[:1], filters.sql(number))
            found = rates(works, len(filters.queries), settings.repeats, turn_seconds=settings.turn_seconds)
            outcome.rows.append(
                _row(
                    f"{corpus}: {share:.1%} match, {mode}, {'one batch' if batch else 'one at a time'}",
                    found,
                    recall,
                    peer_name,
                    aim,
                )
            )
    return outcome


def _row(what: str, found: Mapping[str, list[float]], recall: float, peer_name: str, aim: float) -> Row:
    row = compared(
        f"{what}, recall {recall:.3f}",
        median(found["ours"]),
        median(found["peer"]),
        unit="QPS",
        peer_name=peer_name,
        ratio=paired_ratio(found["ours"], found["peer"]),
        at_least=aim,
        data={"recall": recall, "our_turns": found["ours"], "peer_turns": found["peer"]},
    )
    # Speed is worth nothing without the recall that the peer was held to.
    return row if recall >= _TARGET else replace(row, met=False)


def _ask(
    filters: _Filters, search: Callable[[Float32Array, str], object], numbers: Iterator[int], *, batch: bool
) -> None:
    """Ask all queries once: as a batch with one filter, or one a call, each with the next filter."""
    if batch:
        search(filters.queries, filters.sql(next(numbers)))
        return
    for query in filters.queries:
        search(query, filters.sql(next(numbers)))


def _peers(filters: _Filters, natives: Mapping[NativeKind, NativeIndex], partitions: int) -> list[_Peer]:
    """Return Lance's indexes at the least width that reaches the recall, and exact search over what matches."""
    found: list[tuple[NativeIndex, str, int | None, int | None, float]] = []
    for kind, native in natives.items():
        for refine_factor in kind.refine_factors:
            # The filter may need wider searches than a sweep without one goes to.
            for nprobe in sorted({*widths(partitions), partitions // 4, partitions // 2}):
                recall = filters.recall(partial(_positions, native, nprobe, refine_factor))
                if recall >= _TARGET:
                    found.append((native, kind.index_type, nprobe, refine_factor, recall))
                    break
    native = next(iter(natives.values()))
    found.append((native, "without index", None, None, 1.0))
    return [
        _Peer(
            native=native,
            label=label,
            nprobe=nprobe,
            refine_factor=refine_factor,
            scalar_index=scalar_index,
            recall=recall,
        )
        for native, label, nprobe, refine_factor, recall in found
        for scalar_index in (True, False)
    ]


def _positions(
    native: NativeIndex, nprobe: int, refine_factor: int | None, queries: Float32Array, filter_sql: str
) -> Int64Array:
    return native.positions(queries, nprobe, refine_factor, filter_sql)


def _fastest(
    filters: _Filters, peers: list[_Peer], pools: Mapping[int, ThreadPoolExecutor], *, batch: bool
) -> tuple[str, Callable[[Float32Array, str], object]]:
    """Return the fastest of Lance's ways, found with a few queries."""
    some = filters.queries[:_FILTERS]
    ways: dict[str, Callable[[Float32Array, str], object]] = {}
    for peer in peers:
        ways[str(peer)] = peer.search
        if batch:
            ways |= {f"{peer}, {callers} callers": partial(peer.spread, pools[callers]) for callers in _CALLERS}

    def ask(search: Callable[[Float32Array, str], object]) -> None:
        if batch:
            search(some, filters.sql(0))
            return
        for number, query in enumerate(some):
            search(query, filters.sql(number))

    tried = interleaved({name: partial(ask, search) for name, search in ways.items()}, 2)
    name = min(ways, key=lambda name: min(turn.wall_seconds for turn in tried[name]))
    return name, ways[name]


def _filters(corpus: Corpus, share: float, count: int) -> _Filters:
    total, queries = len(corpus.vectors), corpus.queries[:count]
    matches = max(round(share * total), 1)
    numbers = ranks(corpus)
    neighbors = np.empty((count, min(K, matches)), dtype=np.int64)
    for number in range(min(_FILTERS, count)):
        first = first_of(number, total, matches)
        rows = np.flatnonzero((numbers >= first) & (numbers < first + matches))
        _, nearest = faiss.knn(queries[number::_FILTERS], corpus.vectors[rows], neighbors.shape[1])
        neighbors[number::_FILTERS] = rows[nearest]
    return _Filters(total=total, matches=matches, queries=queries, neighbors=neighbors)


def first_of(number: int, total: int, matches: int) -> int:
    """Return where the range of a filter begins: neighbouring numbers far apart, none twice before all were used."""
    return number * 7_919 % (total - matches + 1)
