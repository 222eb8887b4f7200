"""A client in a process of its own: ``python -m benchmarks.loadgen CLUSTER_FILE QUERIES.npy OPTIONS``.

Reads one JSON line per turn, keeps so many queries in flight for so long, and answers with one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .settings import K

__all__ = ["LoadGenerator"]

_ROOT = Path(__file__).parents[1]


class LoadGenerator:
    """Starts the process, and tells it what to do.

    Parameters
    ----------
    cluster : str
        Cluster file.
    queries : Path
        ``.npy``, float32 ``(n, dim)``.
    connect : mapping
        Arguments of `lance_dfaiss.connect_async`.
    """

    def __init__(self, cluster: str, queries: Path, connect: Mapping[str, Any] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.loadgen", cluster, str(queries), json.dumps(connect or {})]
        self._process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.first_seconds: float = self._answer()["first_seconds"]
        """How long the first query took, right after connecting."""

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def turn(self, in_flight: int, seconds: float, search: Mapping[str, Any]) -> dict[str, float]:
        """Keep queries in flight for a while.

        Parameters
        ----------
        in_flight : int
            Queries, one a call.
        seconds : float
            How long.
        search : mapping
            Arguments of ``knn``; with ``columns``, of ``search``.

        Returns
        -------
        dict
            ``queries`` that were answered; ``qps``; ``p50`` and ``p99`` in seconds; ``cpu``: CPU seconds of the client
            per query.
        """
        return self._ask({"in_flight": in_flight, "seconds": seconds, "search": dict(search)})

    def answers(self, count: int, search: Mapping[str, Any]) -> Any:
        """Return the row ids of the first queries, uint64 ``(count, 10)``."""
        return np.array(self._ask({"answers": count, "search": dict(search)})["row_ids"], dtype=np.uint64)

    def _ask(self, line: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load generator ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found


async def _serve(cluster: str, queries: Any, connect: Mapping[str, Any]) -> None:
    import lance_dfaiss

    client = await lance_dfaiss.connect_async(cluster, **connect)
    started = time.perf_counter()
    await client.knn(queries[:1], K)
    _say({"first_seconds": time.perf_counter() - started})
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        if "answers" in asked:
            _, row_ids = await client.knn(queries[: asked["answers"]], K, **asked["search"])
            _say({"row_ids": row_ids.tolist()})
        else:
            _say(await _turn(client, queries, asked["in_flight"], asked["seconds"], asked["search"]))
    await client.close()


async def _turn(
    client: Any, queries: Any, in_flight: int, seconds: float, search: Mapping[str, Any]
) -> dict[str, float]:
    latencies: list[float] = []
    ask = client.search if "columns" in search else client.knn
    cpu, started = time.process_time(), time.perf_counter()
    until = started + seconds

    async def keep_asking(number: int) -> None:
        at = number * 37
        # At least one each, however slow the machine is.
        while (before := time.perf_counter()) < until or not latencies:
            at = (at + 1) % len(queries)
            await ask(queries[at : at + 1], K, **search)
            latencies.append(time.perf_counter() - before)

    await asyncio.gather(*(keep_asking(number) for number in range(in_flight)))
    took, cpu = time.perf_counter() - started, time.process_time() - cpu
    p50, p99 = np.percentile(latencies, [50, 99]).tolist()
    count = len(latencies)
    return {"queries": count, "qps": count / took, "p50": p50, "p99": p99, "cpu": cpu / count}


def _say(facts: Mapping[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def main(cluster: str, queries: str, connect: str) -> None:
    """Connect and do as told until the input ends."""
    try:
        import uvloop
    except ImportError:
        pass
    else:
        uvloop.install()
    asyncio.run(_serve(cluster, np.load(queries), json.loads(connect)))


if __name__ == "__main__":
    main(*sys.argv[1:])
