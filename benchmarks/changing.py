"""An index while its dataset changes: time to follow, to index what is new, and to search what is not indexed yet."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import lance_dfaiss

from .data import COLUMN, RANK, Corpus, append, ranked, synthetic
from .report import Outcome, Row, compared
from .settings import K, Settings
from .timing import Turn, interleaved_prepared, median, paired_ratio, rates

__all__ = ["run_refresh", "run_tail", "run_update"]

NAME = "ours"
_MB = 1_000_000

_UPDATES = 10


def run_refresh(settings: Settings) -> Outcome:
    """Follow a dataset that changes, in turn with opening the index anew."""
    corpus = _indexed(settings, "refreshed")
    rows = len(corpus.vectors)
    many, added = min(10_000, rows // 10), min(1_000, rows // 10)
    borders = (0, 1, 101, 101 + many)
    changes: dict[str, Callable[[Any], object]] = {
        f"{last - first:,} deleted row{'s' if last - first > 1 else ''}": partial(_delete, first, last)
        for first, last in itertools.pairwise(borders)
    }
    changes[f"an append of {added:,} rows"] = lambda _: append(corpus, added, seed=1)
    changes[f"a compaction of {rows:,} rows"] = lambda dataset: dataset.optimize.compact_files(
        target_rows_per_fragment=2 * rows
    )
    outcome = Outcome(
        notes=["Refreshing and opening move to the same version and find the same; neither reads the tail yet."]
    )
    for what, change in changes.items():
        before = corpus.open()
        change(corpus.open())
        outcome.rows.append(_refreshed(settings, corpus, what, before.version))
    shutil.rmtree(corpus.path)
    return outcome


def run_update(settings: Settings) -> Outcome:
    """Index 1 % more rows, in turn with building the whole index; then merge ten such updates."""
    corpus = _indexed(settings, "updated")
    rows = len(corpus.vectors) // 100
    partitions = settings.partitions(len(corpus.vectors))
    sizes: list[float] = []
    updates = 0

    def update() -> Callable[[], object]:
        nonlocal updates
        updates += 1
        append(corpus, rows, seed=updates)
        return work

    def work() -> None:
        report = lance_dfaiss.update_index(corpus.open(), NAME)
        if report.added_rows != rows:
            raise AssertionError(f"{report.added_rows} rows were indexed, not {rows}")
        sizes.append(_size(corpus, report.generation))

    def build() -> Callable[[], object]:
        return lambda: lance_dfaiss.create_index(
            corpus.open(), COLUMN, "AUTO", "whole", num_partitions=partitions, replace=True
        )

    turns = interleaved_prepared({"ours": update, "peer": build}, min(settings.repeats, _UPDATES))
    turns["ours"] += interleaved_prepared({"ours": update}, _UPDATES - len(turns["ours"]))["ours"]
    whole = _size(corpus, lance_dfaiss.describe_index(corpus.open(), "whole").manifest.generation)
    merging = interleaved_prepared({"ours": lambda: lambda: lance_dfaiss.optimize_index(corpus.open(), NAME)}, 1)
    optimized = _size(corpus, lance_dfaiss.describe_index(corpus.open(), NAME).manifest.generation)
    shutil.rmtree(corpus.path)
    ours, peer = _walls(turns["ours"]), _walls(turns["peer"])
    more = f"{corpus}: update_index of {rows:,} more rows"
    merged = f"{corpus}: optimize_index after {_UPDATES} updates"
    return Outcome(
        rows=[
            compared(
                more,
                median(ours),
                median(peer),
                unit="s",
                peer_name="whole build",
                ratio=paired_ratio(ours[: len(peer)], peer),
                at_most=0.05,
                data={"our_turns": ours, "peer_turns": peer},
            ),
            compared(f"{more}, written", median(sizes), whole, unit="MB", peer_name="whole build"),
            compared(merged, _walls(merging["ours"])[0], median(peer), unit="s", peer_name="whole build"),
            compared(f"{merged}, written", optimized, whole, unit="MB", peer_name="whole build"),
        ]
    )


def run_tail(settings: Settings) -> Outcome:
    """Search with more and more rows outside the index, in turn with searches that leave them out."""
    corpus = _indexed(settings, "tailed")
    index = lance_dfaiss.open_index(corpus.open(), NAME)
    outcome, tail_rows = Outcome(), 0
    for wanted in (0, *settings.tail_rows):
        if wanted > tail_rows:
            append(corpus, wanted - tail_rows, seed=wanted)
            tail_rows = wanted
        index.refresh()
        if index.stats().tail_rows != wanted:
            raise AssertionError(f"{index.stats().tail_rows} rows are outside the index, not {wanted}")
        outcome.rows += _with_tail(settings, corpus, index, wanted)
    shutil.rmtree(corpus.path)
    return outcome


def _indexed(settings: Settings, name: str) -> Corpus:
    corpus = ranked(synthetic(settings), name, fresh=True)
    partitions = settings.partitions(len(corpus.vectors))
    lance_dfaiss.create_index(corpus.open(), COLUMN, "AUTO", NAME, num_partitions=partitions)
    return corpus


def _delete(first: int, last: int, dataset: Any) -> None:
    dataset.delete(f"{RANK} >= {first} AND {RANK} < {last}")


def _refreshed(settings: Settings, corpus: Corpus, what: str, before: int) -> Row:
    read: dict[str, list[int]] = {"ours": [], "peer": []}
    found: dict[str, lance_dfaiss.Index] = {}

    def refresh() -> Callable[[], object]:
        index = lance_dfaiss.open_index(corpus.open().checkout_version(before), NAME)

        def work() -> None:
            start = _bytes_read()
            moved = index.refresh()
            read["ours"].append(_bytes_read() - start)
            if not moved:
                raise AssertionError("there was nothing newer")
            found["ours"] = index

        return work

    def reopen() -> Callable[[], object]:
        def work() -> None:
            start = _bytes_read()
            found["peer"] = lance_dfaiss.open_index(str(corpus.path), NAME)
            read["peer"].append(_bytes_read() - start)

        return work

    works = {"ours": refresh, "peer": reopen}
    interleaved_prepared(works, 1)
    turns = interleaved_prepared(works, settings.repeats)
    ours_found, peer_found = (found[side].knn(corpus.queries[:K], K)[1] for side in works)
    if not np.array_equal(ours_found, peer_found):
        raise AssertionError("a refreshed index and one opened anew found different rows")
    stats = found["ours"].stats()
    ours, peer = ([1000 * seconds for seconds in _walls(turns[side])] for side in works)
    return compared(
        f"{corpus}: refresh after {what}",
        median(ours),
        median(peer),
        unit="ms",
        peer_name="open_index",
        ratio=paired_ratio(ours, peer),
        data={
            "our_turns": ours,
            "peer_turns": peer,
            "our_bytes_read": int(median(read["ours"])),
            "peer_bytes_read": int(median(read["peer"])),
            "masked_rows": stats.masked_rows,
            "mapped_rows": stats.mapped_rows,
            "tail_rows": stats.tail_rows,
        },
    )


def _with_tail(settings: Settings, corpus: Corpus, index: lance_dfaiss.Index, tail_rows: int) -> list[Row]:
    queries = corpus.queries
    singles = queries[: settings.single_queries]

    def one_by_one(*, fast_search: bool) -> None:
        for query in singles:
            index.knn(query, K, fast_search=fast_search)

    def first() -> Callable[[], object]:
        fresh = lance_dfaiss.open_index(corpus.open(), NAME)
        fresh.knn(singles[0], K, fast_search=True)
        return lambda: fresh.knn(singles[0], K)

    asked: Mapping[str, tuple[Callable[..., object], int]] = {
        "one batch": (partial(index.knn, queries, K), len(queries)),
        "one at a time": (one_by_one, len(singles)),
    }
    shown = f"{corpus}: {tail_rows:,} tail rows"
    rows, after = [], 0.0
    for what, (ask, count) in asked.items():
        works = {"ours": partial(ask, fast_search=False), "peer": partial(ask, fast_search=True)}
        found = rates(works, count, settings.repeats, turn_seconds=settings.turn_seconds)
        ours, peer = ([1000 / rate for rate in found[side]] for side in works)
        more = median([a - b for a, b in zip(ours, peer, strict=True)])
        rows.append(
            compared(
                f"{shown}, a query, {what}",
                median(ours),
                median(peer),
                unit="ms",
                peer_name="tail left out",
                ratio=paired_ratio(ours, peer),
                data={
                    "our_turns": ours,
                    "peer_turns": peer,
                    "more_ms_per_10k_rows": more * 10_000 / tail_rows if tail_rows else None,
                },
            )
        )
        after = median(ours)
    if tail_rows:
        reading = [
            1000 * seconds for seconds in _walls(interleaved_prepared({"ours": first}, settings.repeats)["ours"])
        ]
        rows.append(
            compared(
                f"{shown}, the first query, which reads them",
                median(reading),
                after,
                unit="ms",
                peer_name="a later one",
                data={"our_turns": reading},
            )
        )
    return rows


def _walls(turns: list[Turn]) -> list[float]:
    return [turn.wall_seconds for turn in turns]


def _size(corpus: Corpus, generation: str) -> float:
    """Return megabytes of the files that one generation wrote."""
    files = (corpus.path / "_dfaiss" / generation).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file()) / _MB


def _bytes_read() -> int:
    """Return what this process has read so far, by any thread, from files or the page cache."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])
