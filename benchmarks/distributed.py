"""Builds on a Ray cluster: two workers of one core against one, against lance-ray, and memory of each worker."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lance_dfaiss

from .data import COLUMN, Corpus, synthetic
from .report import Outcome, Row, compared
from .settings import Settings
from .timing import median, paired_ratio

__all__ = ["run"]

NAME = "ours"
PYTHON_VARIABLE = "LANCE_DFAISS_LANCE_RAY"
"""Names a Python that has lance-ray; without it that comparison is left out."""

_MIB = 1024 * 1024
_SHARDS = 4

# Type, its parameters, and whether two workers are to take at most 1 / 1.8 of the time of one.
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
_OVER_BUDGET_BYTES = 500 * _MIB


def run(settings: Settings) -> Outcome:
    """Measure builds of the synthetic set on a Ray cluster of two cores."""
    outcome = Outcome()
    corpus, small = synthetic(settings), synthetic(settings, rows=_STARTUP_ROWS)
    with _cluster():
        for index_type, parameters in _KINDS[:1] if settings.quick else _KINDS:
            outcome.rows += _two_against_one(settings, corpus, small, index_type, parameters)
    outcome.take(_against_lance_ray(settings, corpus))
    outcome.notes.append(
        "Builds on Ray: workers of one core each on one machine of two; the cluster is started before the clock, and"
        " the first build on it is not counted. A phase is what the build's own report says it took."
    )
    return outcome


@contextmanager
def _cluster() -> Iterator[None]:
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
    budget = 2 * 1024 * _MIB
    lists = settings.partitions(len(corpus.vectors))
    for turn in range(settings.repeats + 1):
        for workers in (1, 2) if turn % 2 == 0 else (2, 1):
            startup = _build(small, index_type, parameters, workers, _STARTUP_LISTS, budget)
            report = _build(corpus, index_type, parameters, workers, lists, budget)
            peaks += [task.peak_bytes or 0 for task in report.tasks]
            if turn:  # the first warms the page cache and Ray's pool of processes
                fixed[workers].append(_phases(startup))
                seconds[workers].append(_phases(report))
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
            f"{corpus}: {said} on Ray, peak RSS of a worker against budget + 500 MB",
            max(peaks) / _MIB,
            (budget + _OVER_BUDGET_BYTES) / _MIB,
            unit="MB",
            peer_name="allowed",
            at_most=1.0,
        )
    )
    return rows


def _phases(report: Any) -> dict[str, float]:
    return {**{phase.name: phase.seconds for phase in report.phases}, "total": report.seconds}


def _build(corpus: Corpus, index_type: Any, parameters: dict[str, Any], workers: int, lists: int, budget: int) -> Any:
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
        executor="ray",
        ray_remote_args={"num_cpus": 1},
        replace=True,
        **parameters,
    )
    report = lance_dfaiss.describe_index(corpus.open(), NAME, build=True).build
    assert report is not None
    return report


def _against_lance_ray(settings: Settings, corpus: Corpus) -> Outcome:
    outcome = Outcome()
    python = os.environ.get(PYTHON_VARIABLE)
    if python is None:
        outcome.notes.append(f"lance-ray's `create_index` was left out: no {PYTHON_VARIABLE}, a Python that has it.")
        return outcome
    partitions = settings.partitions(len(corpus.vectors))
    for index_type in ("IVF_SQ",) if settings.quick else ("IVF_SQ", "IVF_PQ"):
        ours, theirs = [], []
        for _ in range(min(settings.repeats, 3)):
            corpus.reset()
            theirs.append(_lance_ray_seconds(python, corpus, index_type, partitions))
            corpus.reset()
            with _cluster():
                # A cluster's first build starts its workers; so does lance-ray's.
                parameters = {"num_bits": 8} if index_type == "IVF_PQ" else {}
                ours.append(_build(corpus, index_type, parameters, 2, partitions, 2 * 1024 * _MIB).seconds)
        corpus.reset()
        outcome.rows.append(
            compared(
                f"{corpus}: build {index_type} on Ray, 2 workers of one core",
                median(ours),
                median(theirs),
                unit="s",
                peer_name="lance_ray.create_index",
                ratio=paired_ratio(ours, theirs),
                at_most=1.0,
                data={"ours": ours, "theirs": theirs},
            )
        )
    return outcome


def _lance_ray_seconds(python: str, corpus: Corpus, index_type: str, partitions: int) -> float:
    child = Path(__file__).with_name("lance_ray_build_child.py").absolute()
    command = [
        python,
        str(child),
        str(corpus.path.absolute()),
        index_type,
        str(partitions),
        str(corpus.vectors.shape[1] // 4),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])
