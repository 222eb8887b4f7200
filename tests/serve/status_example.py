"""A status as a server gives it, and a port that shows it: shared by the tests of the page."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from lance_dfaiss.serve.metrics import ServerMetrics
from lance_dfaiss.serve.page import StatusPort
from lance_dfaiss.serve.status import (
    IndexStatus,
    KindTraffic,
    ServerStatus,
    ServerSummary,
    SnapshotStatus,
    StageTraffic,
    SwapStatus,
    TrafficSummary,
)

GENERATION = "7d0c1a52-8f1e-4a63-9b7e-2f60c1d3e9aa"


def snapshot(now: float, version: int = 214, **changes: object) -> SnapshotStatus:
    made = SnapshotStatus(
        at=f"3.{version}.1a1feb964b1.{GENERATION[:12]}",
        epoch=3,
        version=version,
        generation=GENERATION,
        committed_at=now - 252 - 600 * (214 - version),
        rows=1_204_518 - 1_000 * (214 - version),
        indexed_rows=600_854,
        masked_rows=742,
        tail_rows=4_000,
        unsaved_rows=0,
        group_rows=[604_112, 600_406],
        ram_bytes=402_653_184,
    )
    return made | changes  # type: ignore[return-value]


def index(now: float, **changes: object) -> IndexStatus:
    made = IndexStatus(
        name="words",
        dataset="s3://corpora/wordnet/words.lance",
        index="vector_idx",
        index_type="IVF_PQ",
        factory="IVF4096,PQ192x4fs,Refine(SQ8)",
        metric="cosine",
        dim=384,
        snapshots=[snapshot(now, version) for version in (214, 213, 212)],
        shards=12,
        coverage=0.5015,
        payload=["lemma", "pos"],
        payload_bytes=31_457_280,
        last_swap=SwapStatus(at=now - 190, seconds=3.41, outcome="ok", read_bytes=4_404_019, detail=""),
        loading=None,
        problem=None,
    )
    return made | changes  # type: ignore[return-value]


def traffic(**changes: object) -> TrafficSummary:
    made = TrafficSummary(
        qps_10s=8_412.3,
        qps_60s=7_981.0,
        failed_60s=0,
        kinds=[
            KindTraffic(kind="knn", count=478_860, p50=0.00112, p90=0.0021, p99=0.00463),
            KindTraffic(kind="range", count=312, p50=0.0021, p90=0.0088, p99=0.0191),
            KindTraffic(kind="fetch", count=5_120, p50=0.00034, p90=0.0009, p99=0.0032),
        ],
        stages=[
            StageTraffic(stage="queue", count=479_172, p50=0.00031, p90=0.0008, p99=0.0019),
            StageTraffic(stage="search", count=61_204, p50=0.00058, p90=0.0011, p99=0.0023),
            StageTraffic(stage="filter", count=901, p50=0.0041, p90=0.012, p99=0.044),
            StageTraffic(stage="encode", count=479_172, p50=0.000021, p90=0.00004, p99=0.00011),
        ],
        history=[7_000 + 37 * (second * second % 53) for second in range(60)],
    )
    return made | changes  # type: ignore[return-value]


def status(now: float | None = None, **changes: object) -> ServerStatus:
    """Return the status of server 1 of four: two groups, all well. Keywords replace whole fields."""
    now = time.time() if now is None else now
    made = ServerStatus(
        server=1,
        ready=True,
        draining=False,
        reason="",
        epoch=3,
        group=0,
        groups=2,
        replicas=2,
        address="10.1.0.12:7700",
        started_at=now - 98_400,
        pid=4711,
        version="0.1.0",
        threads=2,
        ram_bytes=1_717_986_918,
        ram_limit_bytes=4_294_967_296,
        waiting=37,
        queue_limit=4_096,
        connections=24,
        filter_restarts=0,
        servers=[
            ServerSummary(
                id=number, address=f"10.1.0.1{number + 1}:7700", http=f"10.1.0.1{number + 1}:7780", group=number // 2
            )
            for number in range(4)
        ],
        indexes=[index(now)],
        traffic=traffic(),
    )
    return made | changes  # type: ignore[return-value]


def troubled(now: float | None = None) -> ServerStatus:
    """Return a status with something to look at: a refused swap, a tail, an index that loads."""
    now = time.time() if now is None else now
    refused = SwapStatus(
        at=now - 75,
        seconds=0.02,
        outcome="BudgetExceeded",
        read_bytes=0,
        detail="Version 215 needs 1.92 GiB beside the 3.10 GiB in use; the limit is 4.00 GiB.",
    )
    words = index(
        now,
        last_swap=refused,
        snapshots=[snapshot(now, 214, tail_rows=96_400, unsaved_rows=14_220), snapshot(now, 213)],
    )
    images = index(
        now,
        name="images",
        dataset="/data/images.lance",
        index="clip",
        index_type="",
        factory="",
        metric="",
        dim=0,
        snapshots=[],
        shards=0,
        coverage=0.0,
        payload=[],
        payload_bytes=0,
        last_swap=None,
        loading="version 12: 3 of 8 shards, 1.20 of 3.10 GiB",
    )
    return status(
        now,
        ready=False,
        reason="images is being loaded",
        ram_bytes=3_972_844_748,
        waiting=3_890,
        filter_restarts=2,
        indexes=[words, images],
        traffic=traffic(failed_60s=1_204),
    )


@contextmanager
def port(
    ask: Callable[[], ServerStatus] = status,
    *,
    ready: Callable[[], bool] = lambda: True,
    metrics: ServerMetrics | None = None,
    hosts: Collection[str] = (),
) -> Iterator[StatusPort]:
    """Run a port on loopback."""
    opened = StatusPort(
        socket.create_server(("127.0.0.1", 0)), metrics=metrics or ServerMetrics(), status=ask, ready=ready, hosts=hosts
    )
    opened.start()
    try:
        yield opened
    finally:
        opened.close()
