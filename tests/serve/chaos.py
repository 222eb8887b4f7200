"""Load on a cluster of which every single answer is checked, and what it says about errors and latency."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import lance_dfaiss
from lance_dfaiss.errors import DfaissError
from lance_dfaiss.serve.answers import METADATA_KEY
from lance_dfaiss.serve.client import Client
from lance_dfaiss.serve.cluster import ServedIndex
from tests.serve.inprocess import until
from tests.support import Exact, fixed_size, gaussian, live_table, make_dataset

__all__ = ["K", "NAME", "Events", "Load", "Place", "Seen", "Words", "family_of", "resident", "settled_resident", "stopped"]

NAME, DIM, K, LISTS = "near", 16, 10, 8
POOL = 48
"""Queries that are asked again and again."""

WINDOW_SECONDS = 0.5
FILTER = "id % 3 = 1"


class Place:
    """A dataset with an index that finds everything, and how it changes.

    Every change puts rows beside the queries, and takes away some that were near: an answer of one version is wrong
    at any other.
    """

    def __init__(self, folder: Path, *, rows: int = 3_000, shards: int = 6, stable: bool = False) -> None:
        self.uri = str(folder / "d")
        self.queries = gaussian(POOL, DIM, 9)
        self._rng = np.random.default_rng(5)
        self._next_id = rows
        dataset = make_dataset(
            folder / "d",
            gaussian(rows, DIM, 1),
            rows_per_fragment=500,
            stable=stable,
            word=pa.array([f"word {i}" for i in range(rows)]),
        )
        lance_dfaiss.create_index(
            dataset, "vec", "IVF_FLAT", name=NAME, num_partitions=LISTS, num_shards=shards
        )

    @property
    def served(self) -> list[ServedIndex]:
        return [ServedIndex(name=NAME, dataset=self.uri, index=NAME)]

    def append(self, rows: int = 60) -> None:
        """Add rows, beside the queries."""
        near = self.queries[self._rng.integers(POOL, size=rows)]
        vectors = (near + 0.4 * self._rng.standard_normal(near.shape)).astype(np.float32)
        ids = range(self._next_id, self._next_id + rows)
        self._next_id += rows
        table = pa.table(
            {
                "id": pa.array(ids, pa.int64()),
                "vec": fixed_size(vectors),
                "word": pa.array([f"word {i}" for i in ids]),
            }
        )
        lance.write_dataset(table, self.uri, mode="append")

    def delete(self, rows: int = 60) -> None:
        """Delete rows that are answers now."""
        dataset = lance.dataset(self.uri)
        truth, ids = Exact(dataset, "l2"), {row: number for number, row in live_table(dataset).items()}
        near = {int(truth.knn(query, 4)[1][self._rng.integers(4)]) for query in self.queries}
        doomed = [ids[row] for row in sorted(near)[:rows]]
        dataset.delete(f"id in ({', '.join(map(str, doomed))})")

    def change(self, step: int) -> None:
        """Make the next change of a round of four, each of which every server takes up as a swap."""
        kinds: list[Callable[[], object]] = [
            self.append,
            self.delete,
            lambda: lance_dfaiss.update_index(self.uri, NAME),
            lambda: (lance.dataset(self.uri).optimize.compact_files(), lance_dfaiss.update_index(self.uri, NAME)),
        ]
        kinds[step % len(kinds)]()


class _Version:
    """What is right at one version."""

    def __init__(self, uri: str, version: int, queries: NDArray[np.float32]) -> None:
        dataset = lance.dataset(uri, version=version)
        truth = Exact(dataset, "l2")
        order = np.argsort(truth.row_ids)
        self.row_ids = truth.row_ids[order]
        self.distances = np.array([truth.distances(query) for query in queries])[:, order]
        table = dataset.to_table(columns=["id", "word"], with_row_id=True)
        columns = {row: (number, word) for row, number, word in zip(*(
            table[name].to_pylist() for name in ("_rowid", "id", "word")
        ), strict=True)}  # fmt: skip
        self.columns = [columns[int(row)] for row in self.row_ids]
        self.passes = np.array([number % 3 == 1 for number, _ in self.columns])


@dataclass(frozen=True, slots=True)
class Seen:
    """One call and what came of it.

    Parameters
    ----------
    at, seconds : float
        When it was made, monotonic, and how long it took.
    kind : str
        ``"knn"``, ``"batch"``, ``"filter"`` or ``"search"``.
    which : tuple of int
        Queries of the pool.
    error : BaseException or None
        What was raised.
    version, coverage, distances, row_ids, columns
        The answer.
    """

    at: float
    seconds: float
    kind: str
    which: tuple[int, ...]
    error: BaseException | None = None
    version: int = -1
    coverage: float = 0.0
    distances: NDArray[np.float32] | None = None
    row_ids: NDArray[np.uint64] | None = None
    columns: list[tuple[int, str]] | None = None


class Words:
    """What is right at every version of a place.

    Parameters
    ----------
    place : Place
        Its dataset.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._versions: dict[int, _Version] = {}

    def at(self, version: int) -> _Version:
        """Return what is right at a version; the dataset must still have it."""
        found = self._versions.get(version)
        if found is None:
            found = self._versions[version] = _Version(self._place.uri, version, self._place.queries)
        return found

    def wrong(self, seen: Seen, among: NDArray[np.uint64] | None = None) -> str:
        """Tell what is wrong with an answer; nothing is the empty text.

        Parameters
        ----------
        seen : Seen
            The call.
        among : numpy.ndarray, optional
            Row ids that the answer was found among; all by default.
        """
        if seen.error is not None:
            return f"{seen.kind} failed: {type(seen.error).__name__}: {seen.error}"
        assert seen.distances is not None
        assert seen.row_ids is not None
        truth = self.at(seen.version)
        allowed = truth.passes if seen.kind == "filter" else np.ones(len(truth.row_ids), bool)
        if among is not None:
            allowed = allowed & np.isin(truth.row_ids, among)
        for position, which in enumerate(seen.which):
            found, ids = seen.distances[position], seen.row_ids[position]
            places = np.searchsorted(truth.row_ids, ids)
            places[places == len(truth.row_ids)] = 0
            if (truth.row_ids[places] != ids).any():
                return f"{seen.kind} of query {which}: rows that version {seen.version} does not have"
            if not allowed[places].all():
                return f"{seen.kind} of query {which}: rows that are not to be found"
            if len(set(ids.tolist())) < len(ids):
                return f"{seen.kind} of query {which}: a row twice"
            expected = np.sort(truth.distances[which][allowed])[:K]
            if len(expected) != len(found) or not np.allclose(found, expected, rtol=1e-4, atol=1e-4):
                return f"{seen.kind} of query {which} is not the answer of version {seen.version}"
            if not np.allclose(found, truth.distances[which][places], rtol=1e-4, atol=1e-4):
                return f"{seen.kind} of query {which}: a distance is not that of its row"
            if seen.columns is not None and seen.columns != [truth.columns[place] for place in places]:
                return f"{seen.kind} of query {which}: columns of other rows"
        return ""


@dataclass
class Events:
    """What was done to the cluster, and when; monotonic seconds."""

    times: list[tuple[float, str]] = field(default_factory=list)

    def note(self, what: str) -> float:
        now = time.monotonic()
        self.times.append((now, what))
        return now


class Load:
    """Threads that ask a cluster, each at its own pace, for as long as the context lasts.

    Parameters
    ----------
    client : Client
        Whom.
    place : Place
        Has the queries.
    threads : int
        How many.
    per_second : float
        Calls of each thread; fewer if the cluster is slower than that.
    kinds : sequence of str
        Kinds of call, in turns; see `Seen`.
    """

    def __init__(
        self,
        client: Client,
        place: Place,
        *,
        threads: int = 4,
        per_second: float = 50.0,
        kinds: Sequence[str] = ("knn", "knn", "knn", "batch", "knn", "knn", "search", "knn", "knn", "filter"),
        **options: Any,
    ) -> None:
        self._client = client
        self._place = place
        self._pause = 1.0 / per_second
        self._kinds = kinds
        self._options = options
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self.seen: list[Seen] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"load-{number}") for number in range(threads)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_until(self, moment: float) -> None:
        """Go on until calls were answered that were made after a moment, by all threads."""
        wanted = len(self._threads)
        with self._changed:
            done = self._changed.wait_for(
                lambda: sum(seen.at > moment for seen in self.seen[-4 * wanted :]) >= wanted,
                max(moment - time.monotonic(), 0.0) + 30.0,
            )
        assert done, "no answers any more"

    def wait_more(self, seconds: float) -> float:
        """Go on for some seconds; return when they began."""
        now = time.monotonic()
        self.wait_until(now + seconds)
        return now

    def problems(self, words: Words) -> list[str]:
        """Return what is wrong with the answers, all of which are looked at."""
        return [problem for problem in map(words.wrong, self.seen) if problem]

    def p99(self, start: float, end: float, kind: str = "knn") -> float:
        """Return the 99th percentile of the seconds of calls made between two moments."""
        found = [seen.seconds for seen in self.seen if seen.kind == kind and start <= seen.at < end]
        return float(np.percentile(found, 99)) if found else float("nan")

    def windows(self, start: float, end: float) -> list[float]:
        """Return `p99` of each half second between two moments."""
        return [self.p99(at, at + WINDOW_SECONDS) for at in np.arange(start, end - WINDOW_SECONDS / 2, WINDOW_SECONDS)]

    def _run(self, number: int) -> None:
        calls = itertools.count(number * 13)
        due = time.monotonic() + number * self._pause / len(self._threads)
        while not self._stop.wait(max(due - time.monotonic(), 0.0)):
            turn = next(calls)
            seen = self._ask(self._kinds[turn % len(self._kinds)], turn % POOL)
            with self._changed:
                self.seen.append(seen)
                self._changed.notify_all()
            # Whoever was held up does not make up for it.
            due = max(due + self._pause, time.monotonic())

    def _ask(self, kind: str, query: int) -> Seen:
        which = tuple((query + more) % POOL for more in range(5 if kind == "batch" else 1))
        queries, started = self._place.queries[list(which)], time.monotonic()
        try:
            if kind == "search":
                table = self._client.search(queries[0], K, nprobe=LISTS, columns=["id", "word"], **self._options)
                return _of_table(table, started, which)
            more = {"filter": FILTER} if kind == "filter" else {}
            answer = self._client.knn(queries, K, nprobe=LISTS, **more, **self._options)
        except DfaissError as exc:
            return Seen(started, time.monotonic() - started, kind, which, exc)
        seconds = time.monotonic() - started
        return Seen(started, seconds, kind, which, None, answer.version, answer.coverage, answer[0], answer[1])


def _of_table(table: pa.Table, started: float, which: tuple[int, ...]) -> Seen:
    seconds = time.monotonic() - started
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    distances, row_ids = (table[name].to_numpy()[None] for name in ("_distance", "_rowid"))
    columns = list(zip(table["id"].to_pylist(), table["word"].to_pylist(), strict=True))
    version, coverage = facts["version"], facts["coverage"]
    return Seen(started, seconds, "search", which, None, version, coverage, distances, row_ids, columns)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process do nothing for a while, without its knowing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def family_of(pid: int) -> list[int]:
    """Return a process and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += family_of(int(child))
    return found


def resident(pid: int) -> int:
    """Return the bytes of RAM that a process and its descendants use."""
    pages = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in family_of(pid)]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def settled_resident(pid: int) -> int:
    """Return the same, once it does not change any more; for a server that nobody asks."""
    last = [resident(pid)]

    def steady() -> bool:
        last.append(resident(pid))
        return len(last) > 100 and max(last[-100:]) == min(last[-100:])

    until(steady)
    return last[-1]
