"""Load on a cluster of which every single answer is checked, and what it says about errors and latency."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import lance_dfaiss
from lance_dfaiss.errors import Overloaded
from lance_dfaiss.launch import LocalCluster, ServeOptions
from lance_dfaiss.serve import wire
from lance_dfaiss.serve.answers import METADATA_KEY
from lance_dfaiss.serve.async_client import AsyncClient
from lance_dfaiss.serve.client import Client
from lance_dfaiss.serve.cluster import ServedIndex, plan_cluster, write_cluster
from tests.serve.certificates import make_certificates
from tests.serve.hosts import Hosts
from tests.serve.rawclient import RawClient
from tests.support import Exact, fixed_size, gaussian, live_table, make_dataset
from tests.waiting import until

__all__ = [
    "LISTS",
    "NAME",
    "K",
    "Load",
    "OnHosts",
    "Place",
    "Seen",
    "Truth",
    "assert_recovered",
    "family_of",
    "first_over_median",
    "overload_a_server",
    "resident",
    "stopped",
    "swap_under_load",
]

_log = logging.getLogger(__name__)

NAME, DIM, K, LISTS = "near", 16, 10, 8
POOL = 48
"""Queries that are asked again and again."""

WINDOW_SECONDS = 0.5
RADIUS = 7.0

RECOVERY_SECONDS = 2.0
"""How long a lost server may be felt."""

NOISE_SECONDS = 0.02
"""What a machine with more to do adds to a 99th percentile."""

LONGEST_SECONDS = 3.0
"""No call takes as long as that, whatever happens to one server: the silence that makes it suspect, and some."""

GROWTH = 1.05
"""RAM of a server after everything, over that before."""


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
        lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", name=NAME, num_partitions=LISTS, num_shards=shards)

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
        ``"knn"``, ``"batch"`` or ``"large"`` of several queries, ``"filter"``, ``"search"`` for columns, ``"range"``.
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


class Truth:
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
            if seen.kind == "range":
                expected = np.sort(truth.distances[which])
                expected = expected[expected < RADIUS]
            if len(expected) != len(found) or not np.allclose(found, expected, rtol=1e-4, atol=1e-4):
                return f"{seen.kind} of query {which} is not the answer of version {seen.version}"
            if not np.allclose(found, truth.distances[which][places], rtol=1e-4, atol=1e-4):
                return f"{seen.kind} of query {which}: a distance is not that of its row"
            if seen.columns is not None and seen.columns != [truth.columns[place] for place in places]:
                return f"{seen.kind} of query {which}: columns of other rows"
        return ""


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
        self._numbers = itertools.count(1)
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

    def problems(self, truth: Truth) -> list[str]:
        """Return what is wrong with the answers, all of which are looked at."""
        return [problem for problem in map(truth.wrong, self.seen) if problem]

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
        count = {"batch": 5, "large": 100}.get(kind, 1)
        which = tuple((query + more) % POOL for more in range(count))
        queries, started = self._place.queries[list(which)], time.monotonic()
        try:
            if kind == "search":
                table = self._client.search(queries[0], K, nprobe=LISTS, columns=["id", "word"], **self._options)
                return _of_table(table, kind, started, which)
            if kind == "range":
                table = self._client.range_search(
                    queries[0], RADIUS, nprobe=LISTS, columns=["id", "word"], **self._options
                )
                return _of_table(table, kind, started, which)
            # Another text each time: servers remember what passed.
            sql = f"id % 3 = 1 AND id > -{next(self._numbers)}" if kind == "filter" else None
            answer = self._client.knn(queries, K, nprobe=LISTS, filter=sql, **self._options)
        except Exception as exc:  # whatever it is, it is told in the end
            return Seen(started, time.monotonic() - started, kind, which, exc)
        seconds = time.monotonic() - started
        return Seen(started, seconds, kind, which, None, answer.version, answer.coverage, answer[0], answer[1])


def _of_table(table: pa.Table, kind: str, started: float, which: tuple[int, ...]) -> Seen:
    seconds = time.monotonic() - started
    facts = json.loads(table.schema.metadata[METADATA_KEY])
    distances, row_ids = (table[name].to_numpy()[None] for name in ("_distance", "_rowid"))
    columns = list(zip(table["id"].to_pylist(), table["word"].to_pylist(), strict=True))
    version, coverage = facts["version"], facts["coverage"]
    return Seen(started, seconds, kind, which, None, version, coverage, distances, row_ids, columns)


def assert_recovered(load: Load, moment: float, what: str, *, seconds: float = RECOVERY_SECONDS) -> None:
    """Assert that calls take no longer than before, from so many seconds after something happened.

    Compared are medians over windows of the 99th percentile in each: one hiccup of the machine is no finding.
    """
    end = load.seen[-1].at
    before, during = load.windows(moment - 1.5, moment), load.windows(moment, moment + seconds)
    after = load.windows(moment + seconds, end)
    longest = max(seen.seconds for seen in load.seen if seen.at >= moment)
    _log.info(
        "%s: p99 (ms) before %s, then %s | %s; longest %.0f", what, *map(_ms, (before, during, after)), 1e3 * longest
    )
    assert len(after) >= 2
    assert np.median(after) <= 2 * np.median(before) + NOISE_SECONDS, f"{what}: still slow"
    assert longest < LONGEST_SECONDS, f"{what}: a call took {longest:.1f} s"


def _ms(seconds: Sequence[float]) -> str:
    return " ".join(f"{1e3 * each:.0f}" for each in seconds)


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
    """Return the bytes of RAM that a server uses, together with the largest process that evaluates its filters.

    The largest: a second one is started when two filters come at once, and that is no growth.
    """
    own, *others = [
        int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for each in family_of(pid)
    ]
    return own + max(others, default=0)


def swap_under_load(folder: Path, *, swaps: int) -> None:
    """Move four servers under load, again and again, and assert that nothing went wrong, nor was left.

    Rows are appended and deleted, the index is updated and the dataset compacted, in turns.
    """
    place, file = Place(folder), folder / "cluster.json"
    options = ServeOptions(grace_seconds=1.0, payload=("word",), filter_columns=("id",))
    with (
        LocalCluster(
            place.served, servers=4, replicas=2, cluster_file=file, refresh_seconds=0.0, http=False, options=options
        ) as cluster,
        lance_dfaiss.connect(file) as client,
        Load(client, place) as load,
    ):
        load.wait_more(2.0)
        pids = cluster.pids
        before = {server: resident(pid) for server, pid in pids.items()}
        for step in range(swaps):
            place.change(step)
            if step % 2:
                client.reload()
            else:
                _reload_in_turn(cluster, load)
            load.wait_more(0.3)
        assert cluster.pids == pids, "a server died"
        after = {server: resident(pid) for server, pid in pids.items()}
    growth = {server: after[server] / before[server] for server in before}
    _log.info("%d swaps, %d answers, RAM over that before: %s", swaps, len(load.seen), _ratios(growth.values()))
    assert not load.problems(Truth(place))
    assert len({seen.version for seen in load.seen}) == swaps + 1
    assert max(growth.values()) <= GROWTH


def _reload_in_turn(cluster: LocalCluster, load: Load) -> None:
    """Move one server after the other, with some calls between: each is at a version of its own for a while."""
    for entry in cluster.cluster.servers:
        with RawClient((entry.host, entry.port)) as admin:
            admin.ask(wire.Reload(), expected=wire.Done)
        load.wait_more(0.0)


def _ratios(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


class OnHosts:
    """Servers, each on a host of its own, with TLS and a token; two of each group.

    Parameters
    ----------
    hosts : Hosts
        One more than there are to be servers; the first is for clients.
    place : Place
        What is served.
    folder : pathlib.Path
        For files.
    """

    def __init__(self, hosts: Hosts, place: Place, folder: Path) -> None:
        self._hosts, self._folder = hosts, folder
        addresses = [hosts.address(host) for host in range(1, hosts.count)]
        self._certificates = make_certificates(folder, addresses=addresses)
        self._file, self._token = folder / "cluster.json", "a token that is long enough"
        (folder / "token").write_text(self._token, encoding="ascii")
        (folder / "token").chmod(0o600)
        layout = plan_cluster(
            place.served, [(address, 7_400, None) for address in addresses], replicas=2, refresh_seconds=0.0, tls=True
        )
        write_cluster(str(self._file), layout)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> OnHosts:
        server = self._certificates.server
        for number in range(self._hosts.count - 1):
            command = [
                *(sys.executable, "-m", "lance_dfaiss", "serve", "--server-id", str(number)),
                *("--cluster-file", str(self._file), "--token-file", str(self._folder / "token")),
                *("--tls-cert", str(server.cert), "--tls-key", str(server.key), "--threads", "1"),
            ]
            log = self._folder / f"server-{number}.log"
            self._processes.append(self._hosts.run(number + 1, command, log))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait(30)

    def connect(self) -> Client:
        """Return a client, once all servers are there."""
        client = lance_dfaiss.connect(self._file, token=self._token, tls=self._certificates.ca.cert, timeout=60.0)
        until(lambda: sum(map(len, client.stats().servers_by_group)) == len(self._processes))
        return client


def first_over_median(cluster: LocalCluster, place: Place, server: int) -> float:
    """Restart a server; return how long its first query takes, over the median of those after it.

    All come one at a time, and with a pause: without one, caches and clocks of the processor are at their best, and
    it is their warmth that would be measured, not that of the server.
    """
    cluster.restart(server)
    entry, pause = cluster.cluster.server(server), threading.Event()
    seconds = []
    with RawClient((entry.host, entry.port)) as client:
        for query in place.queries[:40]:
            pause.wait(0.02)
            started = time.perf_counter()
            client.knn(query, K, client.offer(NAME), nprobe=LISTS)
            seconds.append(time.perf_counter() - started)
    median = float(np.median(seconds))
    _log.info("server %d: first query %.2f ms, median %.2f ms", server, 1e3 * seconds[0], 1e3 * median)
    return seconds[0] / median


BATCH = 64
WAITING = 8 * BATCH
"""Queries in one request, and those that may wait in the server."""


def overload_a_server(folder: Path, *, seconds: float) -> None:
    """Ask a server for ten times as much as it can do, and assert that it refuses the rest and comes to no harm."""
    make_dataset(folder / "d", gaussian(20_000, 64, 1), rows_per_fragment=5_000)
    uri, file = str(folder / "d"), folder / "cluster.json"
    lance_dfaiss.create_index(uri, "vec", "IVF_FLAT", name=NAME, num_partitions=LISTS)
    served = [ServedIndex(name=NAME, dataset=uri, index=NAME)]
    options = ServeOptions(threads=1, max_waiting=WAITING)
    with LocalCluster(served, cluster_file=file, refresh_seconds=0.0, http=False, options=options) as cluster:
        asyncio.run(_overload(file, cluster.pids[0], seconds))


async def _overload(file: Path, pid: int, seconds: float) -> None:
    clients = [await lance_dfaiss.connect_async(file, connections=4) for _ in range(8)]
    queries = gaussian(BATCH, 64, 2)
    alone = await _asked_in_turn(clients[0], queries, 1, 0.7)
    capacity = len(await _asked_in_turn(clients[0], queries, 4, 1.5)) / 1.5
    before = resident(pid)
    answered, refused = await _asked_openly(clients, queries, 10 * capacity, seconds)
    growth = resident(pid) / before
    after = await _asked_in_turn(clients[0], queries, 1, 0.7)
    for client in clients:
        await client.close()
    # Whoever is let in waits for those before, at the rate at which they are answered, and for batches in hand. What a
    # request takes that is refused at once is the time of this process itself, which has a lot to do.
    throughput = len(answered) / seconds
    bound = (WAITING / BATCH + 5) / throughput + float(np.percentile(refused, 99)) + 0.25
    p99 = float(np.percentile(answered, 99))
    _log.info(
        "capacity %.0f/s; at ten times that %.0f/s answered, p99 %.3f s of at most %.3f; %.0f/s refused, p99 %.3f s; "
        "alone p50 %.1f ms before, %.1f after; RAM %.3f",
        *(capacity, throughput, p99, bound, len(refused) / seconds, np.percentile(refused, 99)),
        *(1e3 * np.median(alone), 1e3 * np.median(after), growth),
    )
    assert len(refused) > 5 * len(answered)
    assert throughput > 0.2 * capacity  # the client takes its share of the cores
    assert p99 <= bound
    assert np.percentile(refused, 50) <= bound
    assert np.median(after) <= 3 * np.median(alone) + NOISE_SECONDS
    assert growth <= GROWTH


async def _asked_in_turn(
    client: AsyncClient, queries: NDArray[np.float32], in_flight: int, seconds: float
) -> list[float]:
    """Return the seconds of requests, each made when one before it was answered."""
    found: list[float] = []
    end = time.monotonic() + seconds

    async def ask() -> None:
        while (started := time.monotonic()) < end:
            await client.knn(queries, K, nprobe=LISTS)
            found.append(time.monotonic() - started)

    await asyncio.gather(*(ask() for _ in range(in_flight)))
    return found


async def _asked_openly(
    clients: Sequence[AsyncClient], queries: NDArray[np.float32], per_second: float, seconds: float
) -> tuple[list[float], list[float]]:
    """Make requests at a rate, whatever becomes of them; return the seconds of those answered, and refused."""
    answered: list[float] = []
    refused: list[float] = []

    async def ask(client: AsyncClient) -> None:
        started = time.monotonic()
        try:
            await client.knn(queries, K, nprobe=LISTS, timeout=60.0)
        except Overloaded:
            refused.append(time.monotonic() - started)
        else:
            answered.append(time.monotonic() - started)

    tasks: list[asyncio.Task[None]] = []
    start = time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        while len(tasks) < passed * per_second:
            tasks.append(asyncio.create_task(ask(clients[len(tasks) % len(clients)])))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return answered, refused
