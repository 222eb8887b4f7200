"""What a search did, stage by stage: collected while it runs, told by `Explanation`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Explanation", "Stage", "Trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of a search.

    Parameters
    ----------
    name : str
        ``"filter"``, ``"coarse"``, ``"scan"``, ``"tail"``, ``"widen"``, ``"fetch"``.
    seconds : float
        Wall time.
    facts : mapping of str to value
        What was looked at: counts over all queries.
    """

    name: str
    seconds: float
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What a search did.

    Parameters
    ----------
    index : str
        Index and type.
    version : int
        Dataset version it answered for.
    queries, k : int
        What was asked.
    live_rows, masked_rows, mapped_rows, tail_rows : int
        The snapshot: rows that can be found in the index; entries that cannot; rows found through compactions;
        rows outside the index.
    results : int
        Rows found, over all queries.
    seconds : float
        Of the whole search.
    stages : tuple of Stage
        In the order they ran.
    """

    index: str
    version: int
    queries: int
    k: int
    live_rows: int
    masked_rows: int
    mapped_rows: int
    tail_rows: int
    results: int
    seconds: float
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage | None:
        """Return the first stage of a name, None if it did not run."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def __str__(self) -> str:
        lines = [
            f"{self.index} at version {self.version}: {self.results:,} results of {self.queries:,} queries,"
            f" k={self.k}, {self.seconds * 1e3:.2f} ms",
            f"  snapshot  {self.live_rows:,} rows live, {self.masked_rows:,} masked, {self.mapped_rows:,} mapped,"
            f" {self.tail_rows:,} in the tail",
        ]
        for stage in self.stages:
            facts = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in stage.facts.items())
            lines.append(f"  {stage.name:<9} {stage.seconds * 1e3:8.2f} ms  {facts}")
        return "\n".join(lines)


@dataclass(slots=True, eq=False)
class Trace:
    """Collects stages; one search, one thread."""

    stages: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a stage; the caller fills in the facts."""
        facts: dict[str, Any] = {}
        start = time.perf_counter()
        yield facts
        self.stages.append(Stage(name=name, seconds=time.perf_counter() - start, facts=facts))


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
