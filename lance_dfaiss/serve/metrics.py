"""What a server counts: read by Prometheus at ``/metrics``, and in short on the status page.

The hot path adds to plain numbers under one lock, about a microsecond a call; they become Prometheus's metrics when
somebody reads them. Label values are all from closed sets or from the cluster file, so nothing that a client sends
makes memory grow.
"""

from __future__ import annotations

import platform
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import accumulate
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .. import errors
from .._version import __version__
from .status import KindTraffic, StageTraffic, TrafficSummary
from .wire import PROTOCOL

__all__ = ["CONTENT_TYPE", "KINDS", "OK", "OTHER", "STAGES", "Holding", "ServerMetrics", "Stage"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `ServerMetrics.render` returns."""

OK = "ok"
"""The outcome of requests and swaps that did what was asked."""

OTHER = "other"
"""Stands for kinds and outcomes that are not known here."""

KINDS = ("knn", "range", "fetch", "reconstruct", "status", "reload", "drain")
"""Kinds of requests."""

Stage: TypeAlias = Literal["queue", "search", "filter", "fetch", "encode", "load"]
STAGES: tuple[Stage, ...] = get_args(Stage)
"""What the time of a request (``load``: of a snapshot) is spent on."""

SECONDS_BUCKETS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# Percentiles of the last minute come from finer buckets: each is 19 % wider than the one before, from 10 us to 84 s.
_FINE = tuple(10e-6 * 2 ** (step / 4) for step in range(93))
_FINE_EDGES = np.array((0.0, *_FINE))
_WINDOW = 60
_OUTCOMES = frozenset(errors.__all__)
_PREFIX = "lance_dfaiss_"
_COMPONENTS = ("pylance", "pyarrow", "faiss-cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a server holds of one index: the newest snapshot that it offers.

    Parameters
    ----------
    dataset : str
        URI.
    generation : str
        Of the index.
    version : int
        Dataset version.
    committed_at : float
        When that was committed, in seconds since 1970.
    newest_at : float
        When the newest version that could be served was committed; later than ``committed_at`` while a swap is due.
    rows : int
        That can be found, of all groups together.
    tail_rows : int
        Of those that this server holds, rows without an entry, searched one by one.
    unsaved_rows : int
        Of those, rows found only through Lance's transactions: where a compaction moved them is not written down yet.
    ram_bytes : int
        Of all snapshots of the index in this process.
    shards : int
        Held by this server.
    coverage : float
        Share of the rows that this server's group holds, 0 to 1.
    """

    dataset: str
    generation: str
    version: int
    committed_at: float
    newest_at: float
    rows: int
    tail_rows: int
    unsaved_rows: int
    ram_bytes: int
    shards: int
    coverage: float


class _Histogram:
    """Counts by bucket since the start."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> tuple[list[int], float]:
        return self.counts.copy(), self.total


class _Minute:
    """Durations of the last minute: one fine histogram a second, in a ring."""

    __slots__ = ("_counts", "_current", "_second", "_stamps")

    def __init__(self) -> None:
        self._stamps = [-_WINDOW - 1] * _WINDOW
        self._counts: list[list[int]] = [[]] * _WINDOW
        self._second = -1
        self._current: list[int] = []

    def add(self, second: int, seconds: float) -> None:
        # A thread that took its time before another and the lock after it counts in the other's second.
        if second > self._second:
            # A new list, never an old one emptied: a reader may hold that.
            self._current = self._counts[second % _WINDOW] = [0] * (len(_FINE) + 1)
            self._stamps[second % _WINDOW] = self._second = second
        self._current[bisect_left(_FINE, seconds)] += 1

    def recent(self, second: int) -> list[list[int]]:
        pairs = zip(self._stamps, self._counts, strict=True)
        return [counts for stamp, counts in pairs if second - _WINDOW < stamp <= second]


class _Tally:
    """Numbers by second, for a little more than a minute."""

    __slots__ = ("_numbers", "_stamps")
    _SIZE = _WINDOW + 1

    def __init__(self) -> None:
        self._stamps = [-self._SIZE - 1] * self._SIZE
        self._numbers = [0] * self._SIZE

    def add(self, second: int, number: int) -> None:
        slot = second % self._SIZE
        if self._stamps[slot] != second:
            self._stamps[slot] = second
            self._numbers[slot] = 0
        self._numbers[slot] += number

    def of(self, seconds: Iterable[int]) -> list[int]:
        slots = ((second, second % self._SIZE) for second in seconds)
        return [self._numbers[slot] if self._stamps[slot] == second else 0 for second, slot in slots]


class _Timing:
    """Durations of one kind of thing, since the start and in the last minute."""

    __slots__ = ("ever", "minute")

    def __init__(self) -> None:
        self.ever = _Histogram(SECONDS_BUCKETS)
        self.minute = _Minute()

    def add(self, second: int, seconds: float) -> None:
        self.ever.add(seconds)
        self.minute.add(second, seconds)


@dataclass(slots=True)
class _Kind:
    timing: _Timing
    queries: int = 0


@dataclass(slots=True)
class _Answers:
    """Requests of one kind with one outcome."""

    kind: _Kind
    ok: bool
    requests: int = 0


@dataclass(slots=True)
class _Index:
    """What is known of one index."""

    facts: Holding | None = None
    load_failures: int = 0
    last_swap: tuple[float, float, str] | None = None


class ServerMetrics:
    """Counters of one server. Every method may be called from any thread.

    Parameters
    ----------
    clock : callable
        Seconds that never go back.
    wall : callable
        Seconds since 1970.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._started = clock()
        self._lock = threading.Lock()
        self._kinds = {kind: _Kind(_Timing()) for kind in (*KINDS, OTHER)}
        self._answers: dict[tuple[str, str], _Answers] = {}
        for kind in KINDS[:4]:
            self._known(kind, OK)  # these are there at 0, so that a rate over them exists from the start
        self._stages: dict[str, _Timing] = {stage: _Timing() for stage in STAGES}
        self._batches = _Histogram(BATCH_BUCKETS)
        self._queries = _Tally()
        self._failed = _Tally()
        self._overloaded = 0
        self._filter_restarts = 0
        self._waiting = 0
        self._connections = 0
        self._ready = False
        self._place: dict[str, str] | None = None
        self._indexes: dict[str, _Index] = {}
        self._swaps: dict[tuple[str, str], int] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_Families(self))
        ProcessCollector(registry=self._registry)

    def answered(self, kind: str, outcome: str, queries: int, seconds: float) -> None:
        """Count a request that was answered.

        Parameters
        ----------
        kind : str
            One of `KINDS`; anything else counts as `OTHER`.
        outcome : str
            `OK`, or the name of a class of ``lance_dfaiss.errors``; anything else counts as `OTHER`.
        queries : int
            In the request.
        seconds : float
            From its arrival until its answer was written. Percentiles are of requests that succeeded only: a full
            queue answers fast.
        """
        second = int(self._clock())
        with self._lock:
            answers = self._answers.get((kind, outcome)) or self._known(kind, outcome)
            answers.requests += 1
            if answers.ok:
                answers.kind.queries += queries
                answers.kind.timing.add(second, seconds)
                self._queries.add(second, queries)
            else:
                self._failed.add(second, 1)
                self._overloaded += outcome == "Overloaded"

    def stage(self, name: Stage, seconds: float) -> None:
        """Count the time that one stage of a request, or of a load, has taken.

        Raises
        ------
        KeyError
            If there is no such stage.
        """
        second = int(self._clock())
        with self._lock:
            self._stages[name].add(second, seconds)

    def batch(self, queries: int) -> None:
        """Count queries that were searched together."""
        with self._lock:
            self._batches.add(queries)

    def waiting(self, queries: int) -> None:
        """Say how many queries wait now."""
        self._waiting = queries

    def connections(self, n: int) -> None:
        """Say how many clients are connected now."""
        self._connections = n

    def filter_restarts(self, total: int) -> None:
        """Say how many child processes for filters had to be replaced since the start."""
        self._filter_restarts = total

    def ready(self, is_ready: bool) -> None:
        """Say whether the server is ready. The HTTP port says so itself before each reading."""
        self._ready = is_ready

    def place(self, server: int, group: int, epoch: int) -> None:
        """Say where in the cluster this server is: its id, its shard group, and the epoch of the layout."""
        self._place = {"server": str(server), "group": str(group), "epoch": str(epoch)}

    def holding(self, index: str, facts: Holding) -> None:
        """Say what is held of an index now."""
        with self._lock:
            self._index(index).facts = facts

    def forget(self, index: str) -> None:
        """Drop all that is known of an index that is not served any more."""
        with self._lock:
            self._indexes.pop(index, None)
            self._swaps = {pair: count for pair, count in self._swaps.items() if pair[0] != index}

    def swap(self, index: str, outcome: str, seconds: float) -> None:
        """Count an attempt to serve another snapshot of an index.

        Parameters
        ----------
        index : str
            Name.
        outcome : str
            `OK`, or the name of the error class; from the program, never from outside.
        seconds : float
            It took.
        """
        with self._lock:
            self._index(index).last_swap = (self._wall(), seconds, outcome)
            self._swaps[index, outcome] = self._swaps.get((index, outcome), 0) + 1

    def load_failure(self, index: str) -> None:
        """Count an attempt to serve another snapshot of an index that failed."""
        with self._lock:
            self._index(index).load_failures += 1

    def render(self) -> bytes:
        """Return all metrics as Prometheus's text format, of type `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def summary(self) -> TrafficSummary:
        """Return what happened in the last minute, for people."""
        now = self._clock()
        second = int(now)
        with self._lock:
            queries = self._queries.of(range(second - _WINDOW, second + 1))
            failed = self._failed.of(range(second - _WINDOW + 1, second + 1))
            kinds = [(name, kind.timing.minute.recent(second)) for name, kind in self._kinds.items()]
            stages = [(name, timing.minute.recent(second)) for name, timing in self._stages.items()]
        return TrafficSummary(
            qps_10s=self._rate(queries, 10, now),
            qps_60s=self._rate(queries, _WINDOW, now),
            failed_60s=sum(failed),
            kinds=[_kind_traffic(name, counts) for name, counts in kinds if counts],
            stages=[_stage_traffic(name, counts) for name, counts in stages if counts],
            history=queries[:-1],
        )

    def _rate(self, by_second: list[int], window: int, now: float) -> float:
        # The running second counts for as much of it as is over; a server younger than the window is not averaged
        # over time when it did not exist.
        span = min(window - 1 + now % 1, now - self._started)
        return sum(by_second[-window:]) / max(span, 1.0)

    def _known(self, kind: str, outcome: str) -> _Answers:
        kind = kind if kind in self._kinds else OTHER
        outcome = outcome if outcome == OK or outcome in _OUTCOMES else OTHER
        return self._answers.setdefault((kind, outcome), _Answers(self._kinds[kind], outcome == OK))

    def _index(self, name: str) -> _Index:
        return self._indexes.setdefault(name, _Index())


class _Families(Collector):
    """Turns the numbers of a `ServerMetrics` into Prometheus's metrics, each time they are read."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._of = metrics
        self._build = _build_facts()

    def collect(self) -> Iterator[Metric]:
        yield _gauge("build_info", "Always 1; the labels tell versions.", [(self._build, 1)])
        yield _gauge("ready", "1 if the server takes queries.", [({}, self._of._ready)])
        place = self._of._place
        yield _gauge("server_info", "Always 1; the labels tell its place.", [(place, 1)] if place is not None else [])
        yield from self._traffic()
        yield from self._load()
        yield from self._swaps()
        with self._of._lock:
            held = [(name, index.facts) for name, index in self._of._indexes.items() if index.facts is not None]
        yield from _held_families(held, self._of._wall())

    def _traffic(self) -> Iterator[Metric]:
        of = self._of
        with of._lock:
            answers = [((kind, outcome), known.requests) for (kind, outcome), known in of._answers.items()]
            queries = [((name,), kind.queries) for name, kind in of._kinds.items()]
            kinds = [((name,), kind.timing.ever.copy()) for name, kind in of._kinds.items()]
            stages = [((name,), timing.ever.copy()) for name, timing in of._stages.items()]
            batches = of._batches.copy()
        yield _counter("requests", "Requests that were answered.", ("kind", "outcome"), answers)
        yield _counter("queries", "Queries in requests that succeeded.", ("kind",), queries)
        yield _histogram("request_seconds", "From arrival to answer, if it succeeded.", "kind", kinds, SECONDS_BUCKETS)
        yield _histogram("stage_seconds", "Time by stage.", "stage", stages, SECONDS_BUCKETS)
        yield _histogram("batch_queries", "Queries searched together.", None, [((), batches)], BATCH_BUCKETS)

    def _load(self) -> Iterator[Metric]:
        of = self._of
        yield _counter("overloaded", "Requests refused because the queue was full.", (), [((), of._overloaded)])
        yield _gauge("waiting_queries", "Queries that wait to be searched.", [({}, of._waiting)])
        yield _gauge("connections", "Clients connected.", [({}, of._connections)])
        yield _counter("filter_restarts", "Filter processes replaced.", (), [((), of._filter_restarts)])

    def _swaps(self) -> Iterator[Metric]:
        of = self._of
        with of._lock:
            counts = [((index, outcome), count) for (index, outcome), count in of._swaps.items()]
            failures = [((name,), index.load_failures) for name, index in of._indexes.items()]
            last = [({"index": name}, swap) for name, i in of._indexes.items() if (swap := i.last_swap) is not None]
        yield _counter("swaps", "Attempts to serve another snapshot.", ("index", "outcome"), counts)
        yield _counter("load_failures", "Attempts to serve another snapshot that failed.", ("index",), failures)
        yield _gauge("last_swap_timestamp_seconds", "When it ended.", [(name, swap[0]) for name, swap in last])
        yield _gauge("last_swap_seconds", "How long it took.", [(name, swap[1]) for name, swap in last])
        yield _gauge("last_swap_success", "1 if it did.", [(name, swap[2] == OK) for name, swap in last])


def _held_families(held: list[tuple[str, Holding]], now: float) -> Iterator[Metric]:
    """One gauge for each fact of the indexes."""
    names = [{"index": name} for name, _ in held]
    facts = [fact for _, fact in held]

    def gauge(name: str, text: str, values: Iterable[float]) -> Metric:
        return _gauge(f"index_{name}", text, zip(names, values, strict=True))

    labels = [
        {**name, "dataset": fact.dataset, "generation": fact.generation}
        for name, fact in zip(names, facts, strict=True)
    ]
    yield _gauge("index_info", "Always 1; the labels tell what is served.", [(label, 1) for label in labels])
    yield gauge("version", "Dataset version that is served.", (f.version for f in facts))
    yield gauge("serving_timestamp_seconds", "When that was committed.", (f.committed_at for f in facts))
    yield gauge("newest_timestamp_seconds", "Commit of the newest servable version.", (f.newest_at for f in facts))
    yield gauge(
        "snapshot_age_seconds", "Time since the commit of what is served.", (now - f.committed_at for f in facts)
    )
    yield gauge("rows", "Rows that can be found, of all groups.", (f.rows for f in facts))
    yield gauge("tail_rows", "Rows here without an entry, searched one by one.", (f.tail_rows for f in facts))
    yield gauge("unsaved_rows", "Rows whose compaction is not written down.", (f.unsaved_rows for f in facts))
    yield gauge("ram_bytes", "Memory of all its snapshots here.", (f.ram_bytes for f in facts))
    yield gauge("shards", "Shards held here.", (f.shards for f in facts))
    yield gauge("coverage_ratio", "Share of the rows that this group holds.", (f.coverage for f in facts))


def _gauge(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> Metric:
    rows = list(samples)
    family = GaugeMetricFamily(_PREFIX + name, text, labels=list(rows[0][0]) if rows else ())
    for labels, value in rows:
        family.add_metric([_label(label) for label in labels.values()], float(value))
    return family


def _counter(name: str, text: str, labels: Sequence[str], samples: Iterable[tuple[tuple[str, ...], int]]) -> Metric:
    family = CounterMetricFamily(_PREFIX + name, text, labels=labels)
    for values, count in samples:
        family.add_metric([_label(value) for value in values], count)
    return family


def _histogram(
    name: str,
    text: str,
    label: str | None,
    samples: Iterable[tuple[tuple[str, ...], tuple[list[int], float]]],
    bounds: Sequence[float],
) -> Metric:
    family = HistogramMetricFamily(_PREFIX + name, text, labels=[label] if label else ())
    edges = [*map(floatToGoString, bounds), "+Inf"]
    for values, (counts, total) in samples:
        family.add_metric(values, list(zip(edges, accumulate(counts), strict=True)), total)
    return family


def _label(text: str) -> str:
    # Names of files may hold bytes that are no text; the format is UTF-8.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _build_facts() -> dict[str, str]:
    facts = {"version": __version__, "protocol": str(PROTOCOL), "python": platform.python_version()}
    for name in _COMPONENTS:
        try:
            facts[name.partition("-")[0]] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name.partition("-")[0]] = "unknown"  # built by hand, or installed by something else than pip
    return facts


def _kind_traffic(name: str, by_second: list[list[int]]) -> KindTraffic:
    count, (p50, p90, p99) = _percentiles(by_second)
    return KindTraffic(kind=name, count=count, p50=p50, p90=p90, p99=p99)


def _stage_traffic(name: str, by_second: list[list[int]]) -> StageTraffic:
    count, (p50, p90, p99) = _percentiles(by_second)
    return StageTraffic(stage=name, count=count, p50=p50, p90=p90, p99=p99)


def _percentiles(by_second: list[list[int]]) -> tuple[int, tuple[float, float, float]]:
    counts = np.sum(np.array(by_second, dtype=np.int64), axis=0)
    ends = np.cumsum(counts)
    return int(ends[-1]), (_percentile(ends, 0.5), _percentile(ends, 0.9), _percentile(ends, 0.99))


def _percentile(ends: npt.NDArray[np.int64], share: float) -> float:
    """Return the value below which that share lies, taking values as evenly spread over their bucket."""
    rank = max(1, int(np.ceil(share * ends[-1])))
    bucket = int(np.searchsorted(ends, rank))
    if bucket == len(_FINE):
        return _FINE[-1]
    before = int(ends[bucket - 1]) if bucket else 0
    low, high = _FINE_EDGES[bucket], _FINE_EDGES[bucket + 1]
    return float(low + (high - low) * (rank - before) / (int(ends[bucket]) - before))
