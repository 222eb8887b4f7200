"""Builds on a Ray cluster: two workers of one core against one, against lance-ray and Lance, and memory of workers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import faiss
import numpy as np

import lance_dfaiss

from .data import COLUMN, Corpus, synthetic
from .native import build_native
from .report import Outcome, Row, compared
from .settings import Settings
from .timing import median, paired_ratio

__all__ = ["BUDGET_BYTES", "NAME", "PEER_REPEATS", "build", "cluster", "phases", "run"]

NAME = "ours"
PYTHON_VARIABLE = "LANCE_DFAISS_LANCE_RAY"
"""Names a Python that has lance-ray; without it that comparison is left out."""

_MIB, _MB = 1024 * 1024, 1_000_000
_SHARDS = 4

# Type and its parameters.
_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("IVF_FLAT", {}),
    ("IVF_SQ", {}),
    ("IVF_PQ", {"num_bits": 8}),
    ("IVF_PQ", {"num_bits": 4}),
    ("IVF_RQ", {}),
)
_SCALED_PHASES = ("train", "encode")
# A build so small that what it takes is what every build on Ray takes: to start workers, and to send them things.
_STARTUP_ROWS, _STARTUP_LISTS = 4_096, 16
_TWO_AGAINST_ONE = 1.8
_TOTAL_TWO_AGAINST_ONE = 1.7
_OVER_BUDGET_BYTES = 500 * _MB
BUDGET_BYTES = 2 * 1024 * _MIB
PEER_REPEATS = 3


def run(settings: Settings) -> Outcome:
    """Measure builds of two synthetic sets on a Ray cluster of two cores."""
    outcome = Outcome()
    corpora = [synthetic(settings), synthetic(settings, rows=settings.wide[0], dim=settings.wide[1])]
    for corpus in corpora:
        outcome.rows.append(_two_processes(settings, corpus))
    with cluster():
        for corpus in corpora:
            small = synthetic(settings, rows=_STARTUP_ROWS, dim=corpus.vectors.shape[1])
            for index_type, parameters in _KINDS[:1] if settings.quick else _KINDS:
                outcome.rows += _two_against_one(settings, corpus, small, index_type, parameters)
    for index_type in ("IVF_SQ",) if settings.quick else ("IVF_SQ", "IVF_PQ"):
        outcome.rows += _against_others(settings, corpora[0], index_type)
    outcome.notes.append(
        "Builds on Ray: workers of one core each on one machine of two; the cluster is started before the clock, and"
        " the first build on it is not counted. A phase is what the build's own report says it took."
    )
    if PYTHON_VARIABLE not in os.environ:
        outcome.notes.append(f"lance-ray's `create_index` was left out: no {PYTHON_VARIABLE}, a Python that has it.")
    return outcome


def _two_processes(settings: Settings, corpus: Corpus) -> Row:
    """Tell how well two processes share this machine, whatever they are: no build can do better."""
    one, two = [], []
    lists = settings.partitions(len(corpus.vectors))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        work = [(corpus.vectors.shape[1], lists, 20 if settings.quick else 400)] * 2
        list(pool.map(_assign, work))
        for _ in range(settings.repeats):
            started = time.perf_counter()
            for each in work:
                pool.submit(_assign, each).result()
            one.append(time.perf_counter() - started)
            started = time.perf_counter()
            list(pool.map(_assign, work))
            two.append(time.perf_counter() - started)
    return compared(
        f"{corpus}: FAISS alone assigns rows to {lists:,} lists, one process's time over two's",
        median(one),
        median(two),
        unit="s",
        peer_name="two processes",
        ratio=paired_ratio(one, two),
        data={"one": one, "two": two},
    )


def _assign(work: tuple[int, int, int]) -> None:
    """Compare random rows with random centroids, as k-means does, with one thread."""
    dim, lists, blocks = work
    faiss.omp_set_num_threads(1)
    random = np.random.default_rng(1)
    index = faiss.IndexFlatL2(dim)
    index.add(random.random((lists, dim), dtype=np.float32))
    rows = random.random((1_024 * 8, dim), dtype=np.float32)
    for block in range(blocks):
        start = block % 8 * 1_024
        index.search(rows[start : start + 1_024], 1)


@contextmanager
def cluster() -> Iterator[None]:
    """Run a Ray cluster of two cores."""
    # Measured is how builds scale with workers, not how Ray starts.
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: whatever else runs would come first
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray.init(
            num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False, _temp_dir=folder
        )
        try:
            yield
        finally:
            ray.shutdown()


def _two_against_one(
    settings: Settings, corpus: Corpus, small: Corpus, index_type: Any, parameters: dict[str, Any]
) -> list[Row]:
    seconds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    fixed: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    peaks: list[int] = []
    lists = settings.partitions(len(corpus.vectors))
    for turn in range(settings.repeats + 1):
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            startup = build(small, index_type, parameters, workers, _STARTUP_LISTS, BUDGET_BYTES)
            report = build(corpus, index_type, parameters, workers, lists, BUDGET_BYTES)
            peaks += [task.peak_bytes or 0 for task in report.tasks]
            if turn:  # the first warms the page cache and Ray's pool of processes
                fixed[workers].append(phases(startup))
                seconds[workers].append(phases(report))
    corpus.reset()
    said = ", ".join([index_type, *(f"{value} {name.removeprefix('num_')}" for name, value in parameters.items())])
    rows = []
    for phase in (*_SCALED_PHASES, "total"):
        start = {workers: median([turn[phase] for turn in fixed[workers]]) for workers in (1, 2)}
        one, two = ([max(turn[phase] - start[n], 1e-3) for turn in seconds[n]] for n in (1, 2))
        rows.append(
            compared(
                f"{corpus}: {said} on Ray, {phase} beyond the start-up: one worker's time over two's",
                median(one),
                median(two),
                unit="s",
                peer_name=f"two workers; start-up {start[1]:.1f} and {start[2]:.1f} s",
                ratio=paired_ratio(one, two),
                at_least=_TOTAL_TWO_AGAINST_ONE if phase == "total" else _TWO_AGAINST_ONE,
                data={"one": one, "two": two, "startup": start},
            )
        )
    rows.append(
        compared(
            f"{corpus}: {said} on Ray, peak RSS of a task that encodes against budget + 500 MB",
            max(peaks) / _MB,
            (BUDGET_BYTES + _OVER_BUDGET_BYTES) / _MB,
            unit="MB",
            peer_name="allowed",
            at_most=1.0,
        )
    )
    return rows


def phases(report: Any) -> dict[str, float]:
    """Return the seconds of each phase of a build's report, and of all."""
    return {**{phase.name: phase.seconds for phase in report.phases}, "total": report.seconds}


def build(
    corpus: Corpus,
    index_type: Any,
    parameters: dict[str, Any],
    workers: int,
    lists: int,
    budget: int,
    executor: Any = "ray",
) -> Any:
    """Build the index, and return the report of it."""
    corpus.reset()
    lance_dfaiss.create_index(
        corpus.open(),
        COLUMN,
        index_type,
        NAME,
        num_partitions=lists,
        num_workers=workers,
        num_shards=_SHARDS,
        memory_budget_bytes=budget,
        executor=executor,
        ray_remote_args={"num_cpus": 1} if executor == "ray" else None,
        replace=True,
        **parameters,
    )
    report = lance_dfaiss.describe_index(corpus.open(), NAME, build=True).build
    assert report is not None
    return report


def _against_others(settings: Settings, corpus: Corpus, index_type: str) -> list[Row]:
    """Compare whole builds with two workers of one core to lance-ray's with as many, and to Lance's on both cores."""
    partitions, sub_vectors = settings.partitions(len(corpus.vectors)), corpus.vectors.shape[1] // 8
    codes = {"num_sub_vectors": sub_vectors} if index_type == "IVF_PQ" else {}
    python = os.environ.get(PYTHON_VARIABLE)
    ours: list[float] = []
    peers: dict[str, list[float]] = {}
    for _ in range(min(settings.repeats, PEER_REPEATS)):
        if python is not None:
            corpus.reset()
            spent = _lance_ray_seconds(python, corpus, index_type, partitions, sub_vectors)
            peers.setdefault("lance_ray.create_index", []).append(spent)
        corpus.reset()
        started = time.perf_counter()
        build_native(corpus, index_type, {"num_partitions": partitions, **codes})
        peers.setdefault("Lance, one process of two cores", []).append(time.perf_counter() - started)
        with cluster():
            # A cluster's first build starts its workers; so does lance-ray's.
            ours.append(build(corpus, index_type, codes, 2, partitions, BUDGET_BYTES).seconds)
    corpus.reset()
    return [
        compared(
            f"{corpus}: build {index_type} on Ray, 2 workers of one core",
            median(ours),
            median(theirs),
            unit="s",
            peer_name=name,
            ratio=paired_ratio(ours, theirs),
            at_most=1.0,
            data={"ours": ours, "theirs": theirs},
        )
        for name, theirs in peers.items()
    ]


def _lance_ray_seconds(python: str, corpus: Corpus, index_type: str, partitions: int, sub_vectors: int) -> float:
    child = Path(__file__).with_name("lance_ray_build_child.py").absolute()
    command = [python, str(child), str(corpus.path.absolute()), index_type, str(partitions), str(sub_vectors)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])
