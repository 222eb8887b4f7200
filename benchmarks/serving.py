"""Served search: a client in a process of its own, servers in theirs, against the same indexes searched in process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

import lance_dfaiss
from lance_dfaiss.lance_io import PinnedDataset
from lance_dfaiss.launch.local import LocalCluster
from lance_dfaiss.launch.options import ServeOptions
from lance_dfaiss.merge import merge_topk
from lance_dfaiss.pointers import find_pointer
from lance_dfaiss.search.index import open_view
from lance_dfaiss.search.load import read_generation
from lance_dfaiss.search.portion import Portion
from lance_dfaiss.search.tail import TailLimits
from lance_dfaiss.search.view import View
from lance_dfaiss.serve import wire
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.serve.placement import place_fragment, place_shards

from .curves import widths
from .data import COLUMN, RANK, Corpus, append, ranked, synthetic, words
from .loadgen import LoadGenerator
from .native import NATIVE_KINDS, NativeIndex
from .report import Outcome, Row, compared
from .settings import K, Settings
from .timing import median, paired_ratio

__all__ = ["run", "run_cpu", "run_swap"]

NAME = "ours"

_TARGET = 0.95
_SHARDS = 8

_PAUSE = 5e-4
"""Seconds between calls, for one that is not asked without a pause."""

# Against in process with one server and with several at 32 in flight; more than in process at 1; Lance's search.
_AIM_ONE, _AIM_SEVERAL, _AIM_ONE_SECONDS, _AIM_NATIVE = 0.85, 0.8, 200e-6, 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """An index, and how it is searched."""

    corpus: Corpus
    search: Mapping[str, int]
    queries: Path


def run(settings: Settings) -> Outcome:
    """Measure served search on both sets."""
    outcome = Outcome()
    corpora = [ranked(words(settings), "served")]
    if not settings.quick:
        corpora.append(ranked(synthetic(settings), "served"))
    for corpus in corpora:
        case = _prepared(settings, corpus)
        for servers in settings.servers:
            outcome.take(_against_in_process(settings, case, servers))
        outcome.take(_ways(settings, case))
        outcome.take(_against_native(settings, case))
        outcome.take(_against_lance_ray(settings, case))
        outcome.take(_shards(settings, case))
        corpus.reset()
    return outcome


def run_swap(settings: Settings) -> Outcome:
    """Measure what a swap after one percent more rows reads and takes."""
    corpus = ranked(synthetic(settings), "swapped", fresh=True)
    _prepared(settings, corpus)
    outcome = Outcome()
    with _cluster(settings, corpus, 1) as cluster, lance_dfaiss.connect(cluster.cluster_file) as client:
        pid = cluster.pids[0]
        client.knn(corpus.queries[:64], K)
        before = _memory(pid, "VmRSS")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is counted from here on
        whole = _index_bytes(corpus)
        append(corpus, len(corpus.vectors) // 100, seed=1)
        lance_dfaiss.update_index(str(corpus.path), NAME)
        started = time.perf_counter()
        client.reload()
        seconds = time.perf_counter() - started
        peak = _memory(pid, "VmHWM")
        swap = client.status()[0]["indexes"][0]["last_swap"]
        outcome.rows += [
            compared(
                f"{corpus}: swap after +1 %, bytes read",
                swap["read_bytes"] / 1e6,
                whole / 1e6,
                unit="MB",
                peer_name="the index",
                at_most=0.02,
            ),
            compared(
                f"{corpus}: swap after +1 %, peak memory of the server",
                peak / 1e6,
                before / 1e6,
                unit="MB",
                peer_name="before",
                at_most=1.05,
            ),
        ]
        outcome.notes.append(f"{corpus}: that swap took {seconds:.2f} s from the request to the answer.")
    corpus.reset()
    return outcome


def run_cpu(settings: Settings) -> Outcome:
    """Measure where the CPU time of a query served by one server goes, and what a pause costs the same search."""
    corpus = ranked(words(settings), "served")
    case, outcome = _prepared(settings, corpus), Outcome()
    views = _views(corpus, 1)
    with (
        _one_thread(),
        _cluster(settings, corpus, 1) as cluster,
        LoadGenerator(cluster.cluster_file, case.queries) as load,
    ):
        for in_flight in (1, 32):
            turns = _turns(settings, case, load, views, in_flight, pid=cluster.pids[0])
            outcome.rows.append(_shares(case, in_flight, turns))
    seconds = max(settings.turn_seconds * 5, 0.05)
    pauses = {"paused": _PAUSE, "at once": 0.0}
    found: dict[str, list[float]] = {name: [] for name in pauses}
    for _ in range(settings.repeats + 1):
        for name, pause in pauses.items():
            found[name].append(_in_process(case, views, 1, seconds, pause)["p50"] * 1e6)
    paused, at_once = found["paused"][1:], found["at once"][1:]  # the first of each warms
    outcome.rows.append(
        compared(
            f"{corpus}: in process, one at a time, {_PAUSE * 1e3:g} ms between calls, p50",
            median(paused),
            median(at_once),
            unit="us",
            peer_name="no pause",
            ratio=paired_ratio(paused, at_once),
        )
    )
    corpus.reset()
    return outcome


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have FAISS search with one thread: its threads wait actively for each other, and that is CPU time, too."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _shares(case: _Case, in_flight: int, turns: Mapping[str, Sequence[Mapping[str, float]]]) -> Row:
    """Compare CPU time per query, in microseconds: client and server by their parts, and in process."""
    parts = {
        name: [turn[key] * 1e6 for turn in turns["served"]]
        for name, key in (("search threads", "search_cpu"), ("server's event loop", "loop_cpu"), ("client", "cpu"))
    }
    served = [sum(turn) for turn in zip(*parts.values(), strict=True)]
    peer = [turn["cpu"] * 1e6 for turn in turns["in process"]]
    shares = {name: median(found) for name, found in parts.items()}
    told = ", ".join(f"{name} {share:.3g}" for name, share in shares.items())
    return compared(
        f"{case.corpus}: served by 1, {in_flight} in flight, CPU of a query ({told})",
        median(served),
        median(peer),
        unit="us",
        peer_name=f"in process, one thread, batches of {in_flight}",
        ratio=paired_ratio(served, peer),
        data=shares,
    )


def _prepared(settings: Settings, corpus: Corpus) -> _Case:
    """Build the index, and find the narrowest search that is good enough."""
    corpus.reset()
    partitions = settings.partitions(len(corpus.vectors))
    dataset = lance_dfaiss.create_index(
        corpus.open(), COLUMN, "AUTO", NAME, num_partitions=partitions, num_shards=_SHARDS
    )
    index = lance_dfaiss.open_index(dataset, NAME)
    search: dict[str, int] = {}
    for nprobe in widths(partitions):
        search = {"nprobe": nprobe} | ({"k_factor": 4} if index.manifest.spec.refine is not None else {})
        if corpus.recall(corpus.positions(index.knn(corpus.queries, K, **search)[1])) >= _TARGET:
            break
    queries = settings.into / "serving-queries.npy"
    np.save(queries, corpus.queries)
    return _Case(corpus=corpus, search=search, queries=queries)


@contextlib.contextmanager
def _cluster(
    settings: Settings, corpus: Corpus, servers: int, options: ServeOptions | None = None, name: str = "one"
) -> Iterator[LocalCluster]:
    location = settings.into / f"serving-{name.replace(' ', '-')}.json"
    location.unlink(missing_ok=True)
    served = ServedIndex(name=NAME, dataset=str(corpus.path), index=NAME)
    with LocalCluster(
        [served],
        cluster_file=location,
        servers=servers,
        refresh_seconds=0.0,
        options=ServeOptions() if options is None else options,
    ) as cluster:
        yield cluster


def _against_in_process(settings: Settings, case: _Case, servers: int) -> Outcome:
    """Compare with the indexes of all servers, searched one after the other and merged in this process."""
    corpus, outcome = case.corpus, Outcome()
    views = _views(corpus, servers)
    with _cluster(settings, corpus, servers) as cluster, LoadGenerator(cluster.cluster_file, case.queries) as load:
        recall = corpus.recall(corpus.positions(load.answers(len(corpus.queries), case.search)))
        for in_flight in settings.in_flight:
            turns = _turns(settings, case, load, views, in_flight)
            outcome.rows += _compared(case, servers, in_flight, recall, turns)
        first = load.first_seconds
    outcome.notes.append(f"{corpus}, {servers} servers: the first query of a client took {first * 1e3:.2f} ms.")
    return outcome


def _turns(
    settings: Settings,
    case: _Case,
    load: LoadGenerator,
    views: Sequence[View],
    in_flight: int,
    *,
    pid: int | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Let both sides take turns; with the process id of the only server also its CPU seconds per query."""
    seconds = max(settings.turn_seconds * 5, 0.05)

    def served() -> dict[str, float]:
        before = (0.0, 0.0) if pid is None else _cpu_seconds(pid)
        turn = load.turn(in_flight, seconds, case.search)
        if pid is None:
            return turn
        loop, search = (after - start for after, start in zip(_cpu_seconds(pid), before, strict=True))
        return {**turn, "loop_cpu": loop / turn["queries"], "search_cpu": search / turn["queries"]}

    works: dict[str, Callable[[], dict[str, float]]] = {
        "served": served,
        "in process": lambda: _in_process(case, views, in_flight, seconds),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in works}
    for name in works:
        works[name]()
    for number in range(settings.repeats):
        for name in list(works) if number % 2 == 0 else list(works)[::-1]:
            found[name].append(works[name]())
    return found


def _compared(
    case: _Case, servers: int, in_flight: int, recall: float, turns: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[Row]:
    served, peer = turns["served"], turns["in process"]
    what = f"{case.corpus}: served by {servers}, {in_flight} in flight, recall {recall:.3f}"
    qps = [[turn["qps"] for turn in side] for side in (served, peer)]
    p50, p99, cpu = (median([turn[name] for turn in served]) for name in ("p50", "p99", "cpu"))
    aim = _AIM_ONE if servers == 1 else _AIM_SEVERAL
    rows = [
        compared(
            what,
            median(qps[0]),
            median(qps[1]),
            unit="QPS",
            peer_name=f"in process, batches of {in_flight}",
            ratio=paired_ratio(*qps),
            at_least=aim if in_flight == 32 else None,
            data={"p50": p50, "p99": p99, "client_cpu": cpu},
        )
    ]
    own = median([turn["p50"] for turn in peer])
    more = median([a["p50"] - b["p50"] for a, b in zip(served, peer, strict=True)])
    rows.append(
        Row(
            what=f"{what}: p50 (p99)",
            ours=f"{p50 * 1e3:.2f} ms ({p99 * 1e3:.2f})",
            peer=f"{own * 1e3:.2f} ms (a batch of {in_flight} in process)",
            ratio=more * 1e6,
            aim="≤ 200 us more" if in_flight == 1 else "-",
            met=more <= _AIM_ONE_SECONDS if in_flight == 1 else None,
            data={"p50": p50, "p99": p99, "peer_p50": own, "more_seconds": more},
        )
    )
    return rows


def _in_process(case: _Case, views: Sequence[View], batch: int, seconds: float, pause: float = 0.0) -> dict[str, float]:
    """Search batches for a while, with or without a pause in between."""
    queries, latencies = case.corpus.queries, []
    widths_ = views[0].widths(case.search["nprobe"], None, case.search.get("k_factor"))
    at = count = 0
    cpu, started = time.process_time(), time.perf_counter()
    until = started + seconds
    while (before := time.perf_counter()) < until:
        at = at + batch if at + 2 * batch <= len(queries) else 0
        asked = np.ascontiguousarray(queries[at : at + batch])
        parts = [view.knn(asked, K, widths_, view.select(None, include_tail=True)) for view in views]
        if len(parts) > 1:
            merge_topk(parts, K)
        latencies.append(time.perf_counter() - before)
        count += batch
        if pause:
            time.sleep(pause)
    took, cpu = time.perf_counter() - started, time.process_time() - cpu
    p50, p99 = np.percentile(latencies, [50, 99]).tolist()
    return {"qps": count / took, "p50": p50, "p99": p99, "cpu": cpu / count}


def _views(corpus: Corpus, groups: int) -> list[View]:
    """Open the parts that so many servers hold."""
    pinned = PinnedDataset(corpus.open())
    generation = read_generation(pinned, find_pointer(pinned, NAME))
    weights = [1.0] * groups
    shards = [(record.index.digest, record.index.length_bytes) for record in generation.records]
    owners = dict(zip((digest for digest, _ in shards), place_shards(shards, weights), strict=True))
    portions = [
        Portion(group=group, groups=groups, of_shards=owners, of_fragment=partial(place_fragment, weights=weights))
        for group in range(groups)
    ]
    return [open_view(pinned, generation, TailLimits(), portion=portion) for portion in portions]


def _ways(settings: Settings, case: _Case) -> Outcome:
    """Compare ways to ask one server: TLS, float16, columns from RAM and from the dataset."""
    outcome, corpus = Outcome(), case.corpus
    seconds = max(settings.turn_seconds * 5, 0.05)
    secret, pem = _certificate(settings)
    ways = {
        "plain": (ServeOptions(), {}),
        "columns in RAM": (ServeOptions(payload=(RANK,)), {}),
        "TLS": (ServeOptions(tls_cert=str(pem), tls_key=str(secret)), {"tls": str(pem)}),
    }
    with contextlib.ExitStack() as stack:
        loads = {}
        for name, (options, connect) in ways.items():
            cluster = stack.enter_context(_cluster(settings, corpus, 1, options, name=name))
            loads[name] = stack.enter_context(LoadGenerator(cluster.cluster_file, case.queries, connect))
            if name == "plain":
                loads["float16"] = stack.enter_context(
                    LoadGenerator(cluster.cluster_file, case.queries, {"float16": True})
                )
        works = {name: partial(load.turn, search=case.search) for name, load in loads.items()}
        for name in ("columns in RAM", "columns fetched"):
            load = loads.get(name, loads["plain"])
            works[name] = partial(load.turn, search={**case.search, "columns": [RANK]})
        for in_flight in (settings.in_flight[0], 32):
            found: dict[str, list[dict[str, float]]] = {name: [] for name in works}
            for _ in range(settings.repeats):
                for name, work in works.items():
                    found[name].append(work(in_flight, seconds))
            qps = {name: [turn["qps"] for turn in turns] for name, turns in found.items()}
            outcome.rows += [
                compared(
                    f"{corpus}: served with {name}, {in_flight} in flight",
                    median(qps[name]),
                    median(qps["plain"]),
                    unit="QPS",
                    peer_name="plain float32, no columns",
                    ratio=paired_ratio(qps[name], qps["plain"]),
                )
                for name in works
                if name != "plain"
            ]
    dim = corpus.vectors.shape[1]
    whole, half = _frame_bytes(dim, "f4"), _frame_bytes(dim, "f2")
    outcome.notes.append(f"{corpus}: a query and its answer are {whole:,} bytes, {half:,} as float16.")
    return outcome


def _frame_bytes(dim: int, dtype: str) -> int:
    """Return the bytes that one query and its ten results are."""
    at = "1.2.1a1feac8f63.890af34c-b21"
    ask = wire.Knn(index=NAME, at=at, k=K, n=1, dtype=dtype, nprobe=64, k_factor=4, timeout=10.0)
    query = bytes(dim * (4 if dtype == "f4" else 2))
    reply = wire.KnnReply(n=1, width=K, queued=0.0001, searched=0.0001)
    frames = (*wire.encode(ask, 1, [query]), *wire.encode(reply, 1, [bytes(K * 12)]))
    return sum(map(len, frames))


def _against_native(settings: Settings, case: _Case) -> Outcome:
    """Compare with Lance's own search at equal recall, each asked the fastest way from this process."""
    corpus, outcome = case.corpus, Outcome()
    partitions = settings.partitions(len(corpus.vectors))
    best: tuple[str, float] | None = None
    for kind in NATIVE_KINDS:
        native = NativeIndex(corpus, kind, partitions)
        for refine_factor in kind.refine_factors:
            rate = _native_rate(settings, corpus, native, refine_factor, partitions)
            name = f"Lance {kind.index_type}{'' if refine_factor is None else f' refine {refine_factor}'}"
            if rate is not None and (best is None or rate > best[1]):
                best = (name, rate)
        native.drop()
    if best is None:
        outcome.notes.append(f"{corpus}: Lance's own search never reached recall {_TARGET}.")
        return outcome
    with _cluster(settings, corpus, 1) as cluster, LoadGenerator(cluster.cluster_file, case.queries) as load:
        seconds = max(settings.turn_seconds * 5, 0.05)
        served = [load.turn(32, seconds, case.search)["qps"] for _ in range(settings.repeats)]
    outcome.rows.append(
        compared(
            f"{corpus}: served, 32 in flight, at recall {_TARGET}",
            median(served),
            best[1],
            unit="QPS",
            peer_name=f"{best[0]}, in process",
            at_least=_AIM_NATIVE,
        )
    )
    return outcome


def _against_lance_ray(settings: Settings, case: _Case) -> Outcome:
    """Compare with lance-ray's search on one machine, where `LANCE_DFAISS_LANCE_RAY` names a Python that has it."""
    corpus, outcome = case.corpus, Outcome()
    python = os.environ.get("LANCE_DFAISS_LANCE_RAY")
    if python is None:
        outcome.notes.append("lance-ray was not measured: LANCE_DFAISS_LANCE_RAY names no Python that has it.")
        return outcome
    kind = NATIVE_KINDS[0]
    partitions = settings.partitions(len(corpus.vectors))
    native = NativeIndex(corpus, kind, partitions)
    few = settings.into / "serving-few.npy"
    np.save(few, corpus.queries[:6])
    command = [python, str(Path(__file__).with_name("lance_ray_child.py").absolute())]
    done = subprocess.run(
        [*command, str(corpus.path.absolute()), str(few.absolute()), str(case.search["nprobe"])],
        cwd=settings.into,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    theirs = median(json.loads(done.stdout.splitlines()[-1])["seconds"])
    native.drop()
    with _cluster(settings, corpus, 1) as cluster, LoadGenerator(cluster.cluster_file, case.queries) as load:
        ours = median([load.turn(1, 0.3, case.search)["p50"] for _ in range(settings.repeats)])
    outcome.rows.append(
        compared(
            f"{corpus}: one query at a time, p50",
            ours * 1e3,
            theirs * 1e3,
            unit="ms",
            peer_name=f"lance_ray.vector_search over {kind.index_type}, 2 workers",
        )
    )
    return outcome


def _native_rate(
    settings: Settings, corpus: Corpus, native: NativeIndex, refine_factor: int | None, partitions: int
) -> float | None:
    """Return queries per second of the narrowest search that is good enough, one batch; None if there is none."""
    queries = corpus.queries[: settings.single_queries]
    for nprobe in widths(partitions):
        if corpus.recall(native.positions(queries, nprobe, refine_factor)) >= _TARGET:
            found = []
            for _ in range(settings.repeats):
                started = time.perf_counter()
                native.search(queries, nprobe, refine_factor)
                found.append(len(queries) / (time.perf_counter() - started))
            return median(found)
    return None


def _shards(settings: Settings, case: _Case) -> Outcome:
    """Compare an index of one shard with one of many, both served by one server."""
    corpus, outcome = case.corpus, Outcome()
    seconds = max(settings.turn_seconds * 5, 0.05)
    partitions = settings.partitions(len(corpus.vectors))
    rates: dict[int, list[float]] = {}
    ready: dict[int, float] = {}
    for shards in (1, settings.shards):
        lance_dfaiss.create_index(
            corpus.open(), COLUMN, "AUTO", NAME, num_partitions=partitions, num_shards=shards, replace=True
        )
        started = time.perf_counter()
        with _cluster(settings, corpus, 1) as cluster:
            ready[shards] = time.perf_counter() - started
            with LoadGenerator(cluster.cluster_file, case.queries) as load:
                load.turn(32, seconds, case.search)
                rates[shards] = [load.turn(32, seconds, case.search)["qps"] for _ in range(settings.repeats)]
    outcome.rows += [
        compared(
            f"{corpus}: served from {settings.shards} shards, 32 in flight",
            median(rates[settings.shards]),
            median(rates[1]),
            unit="QPS",
            peer_name="from one shard",
        ),
        compared(
            f"{corpus}: start until ready, {settings.shards} shards",
            ready[settings.shards],
            ready[1],
            unit="s",
            peer_name="one shard",
        ),
    ]
    return outcome


def _certificate(settings: Settings) -> tuple[Path, Path]:
    """Make a certificate for this machine that signs itself."""
    key, pem = settings.into / "serving-key.pem", settings.into / "serving-cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(pem)],
        check=True,
        capture_output=True,
    )
    return key, pem


def _index_bytes(corpus: Corpus) -> int:
    return sum(file.stat().st_size for file in (corpus.path / "_dfaiss").rglob("*.faiss"))


def _cpu_seconds(pid: int) -> tuple[float, float]:
    """Return the CPU seconds of the first thread of a process, which runs a server's event loop, and of the others."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    seconds = {task.name: int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks}
    first = seconds.pop(str(pid))
    return first, sum(seconds.values())


def _memory(pid: int, field: str) -> int:
    """Return a number of the kernel's about the memory of a process, in bytes."""
    lines: list[Any] = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
