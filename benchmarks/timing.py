"""Both sides of a comparison take turns inside one process, so that a noisy machine hits them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

__all__ = ["Turn", "interleaved", "interleaved_prepared", "median", "paired_ratio", "rates"]


@dataclass(frozen=True, slots=True)
class Turn:
    """Wall and CPU seconds (all threads) of one turn."""

    wall_seconds: float
    cpu_seconds: float


def interleaved(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[Turn]]:
    """Run each of some works ``repeats`` times, in turn, every other round in reverse order."""
    return interleaved_prepared({name: partial(_itself, work) for name, work in works.items()}, repeats)


def interleaved_prepared(
    prepares: Mapping[str, Callable[[], Callable[[], object]]], repeats: int
) -> dict[str, list[Turn]]:
    """Run works that need something made anew for each turn; what makes it returns the work, and is not timed."""
    turns: dict[str, list[Turn]] = {name: [] for name in prepares}
    for number in range(repeats):
        names = list(prepares) if number % 2 == 0 else list(prepares)[::-1]
        for name in names:
            turns[name].append(_turn(prepares[name]()))
    return turns


def rates(
    works: Mapping[str, Callable[[], object]], per_call: int, repeats: int, *, turn_seconds: float
) -> dict[str, list[float]]:
    """Return queries per second of each work and turn, interleaved.

    Parameters
    ----------
    works : mapping
        Each answers ``per_call`` queries.
    per_call : int
        Queries a call answers.
    repeats : int
        Turns of each.
    turn_seconds : float
        Least time of a turn: a work is called as often as that takes.
    """
    # Two calls before the clock counts: the first warms caches, the second says how many calls fill a turn.
    calls = {}
    for name, work in works.items():
        _turn(work)
        calls[name] = max(math.ceil(turn_seconds / max(_turn(work).wall_seconds, 1e-9)), 1)

    def many(name: str) -> Callable[[], object]:
        def run() -> None:
            for _ in range(calls[name]):
                works[name]()

        return run

    turns = interleaved({name: many(name) for name in works}, repeats)
    return {name: [calls[name] * per_call / turn.wall_seconds for turn in found] for name, found in turns.items()}


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Return the median of the ratios of neighbouring turns: what both felt alike cancels out."""
    return median([a / b for a, b in zip(ours, peer, strict=True)])


def _itself(work: Callable[[], object]) -> Callable[[], object]:
    return work


def _turn(work: Callable[[], object]) -> Turn:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Turn(time.perf_counter() - wall, time.process_time() - cpu)
