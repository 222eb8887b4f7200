"""Processes that all use one dataset at once. As a program: one of them, with a report at the end.

What goes wrong is a conflict that is documented, and counted, or it ends the process.
"""

from __future__ import annotations

import json
import select
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa

import lance_dfaiss
from lance_dfaiss.errors import CommitConflict
from tests.living.truth import DIM, FILTERS, NO_FILTER, Truth, first_schema, make_rows

__all__ = ["ROLES", "prepare"]

# Enough for a fast test, and for compaction to have something to do.
_MOST_ROWS = 600

# How Lance says that another writer was there first; it means the caller to try again.
_CONFLICTS = ("conflict", "incompatible transaction", "too many concurrent writers", "was preempted by concurrent")

# Versions live this long: nobody here holds one for longer without reading the newest.
_VERSION_LIFE = timedelta(seconds=20)


def prepare(folder: Path, *, stable: bool) -> str:
    """Write the dataset and its index."""
    rows = make_rows(first_schema(), 1, range(300))
    dataset = lance.write_dataset(rows, str(folder / "d"), max_rows_per_file=40, enable_stable_row_ids=stable)
    lance_dfaiss.create_index(dataset, "vec", "FLAT", "first", num_shards=2)
    return str(folder / "d")


class Reader:
    """Asks an index that it refreshes, and compares with the version the index says it is at."""

    def __init__(self, uri: str, seed: int) -> None:
        self._uri = uri
        self._rng = np.random.default_rng(seed)
        self._index = lance_dfaiss.open_index(uri, "first", filter_columns=["n"] if seed % 2 else [])

    def turn(self, counts: Counter[str]) -> None:
        index, rng = self._index, self._rng
        counts["moved" if index.refresh() else "stood"] += 1
        truth = Truth(lance.dataset(self._uri, version=index.version))
        stats = index.stats()
        for what in ("tail_rows", "mapped_rows", "masked_rows"):
            counts[what] += bool(getattr(stats, what))
        queries = rng.integers(-3, 4, (3, DIM)).astype(np.float32)
        for condition in (NO_FILTER, FILTERS[rng.integers(len(FILTERS))]):
            k = int(rng.choice([1, 10, len(truth) + 2]))
            distances, row_ids = index.knn(queries, k, filter=condition.sql)
            for at, query in enumerate(queries):
                truth.check("vec", "l2", query, k, truth.mask(condition), distances[at], row_ids[at])
        if rng.random() < 0.1:
            fresh = lance_dfaiss.open_index(self._uri, "first")
            assert fresh.version >= index.version
            counts["opened"] += 1


class Writer:
    """Changes the dataset through plain Lance."""

    def __init__(self, uri: str, seed: int) -> None:
        self._uri = uri
        self._rng = np.random.default_rng(seed)
        self._next_id = seed * 1_000_000

    def _lance(self, counts: Counter[str], run: Callable[[lance.LanceDataset], object]) -> None:
        dataset = lance.dataset(self._uri)
        try:
            run(dataset)
            counts["done"] += 1
        except (OSError, RuntimeError) as exc:
            if not any(said in str(exc).lower() for said in _CONFLICTS):
                raise
            counts["conflicts of Lance"] += 1


class Appender(Writer):
    def turn(self, counts: Counter[str]) -> None:
        def append(dataset: lance.LanceDataset) -> None:
            rows = min(int(self._rng.integers(1, 40)), _MOST_ROWS - dataset.count_rows())
            if rows > 0:
                self._next_id += rows
                table = make_rows(first_schema(), self._next_id, range(self._next_id - rows, self._next_id))
                lance.write_dataset(table, dataset, mode="append")

        self._lance(counts, append)


class Deleter(Writer):
    def turn(self, counts: Counter[str]) -> None:
        modulus = int(self._rng.integers(4, 30))
        self._lance(counts, lambda dataset: dataset.delete(f"id % {modulus} = {self._rng.integers(modulus)}"))


class Updater(Writer):
    def turn(self, counts: Counter[str]) -> None:
        if self._rng.random() < 0.5:
            numbers = ", ".join(f"{float(number)}" for number in self._rng.integers(-3, 4, DIM))
            where = f"id % 17 = {self._rng.integers(17)}"
            self._lance(counts, lambda dataset: dataset.update({"vec": f"[{numbers}]"}, where=where))
            return
        seed = int(self._rng.integers(1_000_000))

        def merge(dataset: lance.LanceDataset) -> None:
            present = dataset.to_table(columns=["id"])["id"].to_pylist()
            ids = self._rng.choice(present, size=min(15, len(present)), replace=False).tolist()
            table: pa.Table = make_rows(first_schema(), seed, ids)
            dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

        self._lance(counts, merge)


class Compactor(Writer):
    def turn(self, counts: Counter[str]) -> None:
        rows = int(self._rng.choice([60, 150, 1_000]))
        share = float(self._rng.choice([0.0, 0.2]))
        self._lance(
            counts,
            lambda dataset: dataset.optimize.compact_files(
                target_rows_per_fragment=rows, materialize_deletions_threshold=share
            ),
        )


class Keeper(Writer):
    """Keeps the index up: updates, optimizes, collects; and lets Lance forget old versions."""

    def turn(self, counts: Counter[str]) -> None:
        what = str(self._rng.choice(["update", "update", "sync", "optimize", "gc", "cleanup"]))
        try:
            if what == "cleanup":
                clean = lambda dataset: dataset.cleanup_old_versions(_VERSION_LIFE)  # noqa: E731
                self._lance(counts, clean)
            elif what == "gc":
                counts["files collected"] += len(lance_dfaiss.gc(self._uri, min_age=timedelta(0)).files)
            else:
                counts[f"{what}: changed"] += self._index(what).changed
            counts[what] += 1
        except CommitConflict:
            counts[f"{what}: conflict"] += 1

    def _index(self, what: str) -> Any:
        if what == "update":
            return lance_dfaiss.update_index(self._uri, "first")
        if what == "sync":
            return lance_dfaiss.sync_index(self._uri, "first")
        return lance_dfaiss.optimize_index(self._uri, "first", max_dead_share=0.1)


ROLES: dict[str, tuple[Callable[[str, int], Any], float]] = {
    "reader": (Reader, 0),
    "second reader": (Reader, 0),
    "appender": (Appender, 0.02),
    "deleter": (Deleter, 0.1),
    "updater": (Updater, 0.05),
    "compactor": (Compactor, 0.2),
    "keeper": (Keeper, 0.05),
    "second keeper": (Keeper, 0.2),
}
"""Each role, and for how many seconds it leaves the dataset to others after a turn."""


def main(role: str, uri: str, report: str) -> int:
    """Play a role until standard input is closed; say ``ready`` before."""
    counts: Counter[str] = Counter()
    error = None
    try:
        make, pause = ROLES[role]
        actor = make(uri, list(ROLES).index(role) + 1)
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], pause)[0]:
            actor.turn(counts)
            counts["turns"] += 1
    except BaseException:
        error = traceback.format_exc()
    Path(report).write_text(json.dumps({"role": role, "counts": counts, "error": error}))
    return 0 if error is None else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
