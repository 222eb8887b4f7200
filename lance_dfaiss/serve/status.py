"""The shape of a server's status: made by the server, shown by the status page, ``/status.json`` and the command line.

Plain values only, so that it can be sent as JSON or msgpack as it is. Times are seconds since 1970.
"""

from __future__ import annotations

from typing import TypedDict

__all__ = [
    "IndexStatus",
    "KindTraffic",
    "ServerStatus",
    "ServerSummary",
    "SnapshotStatus",
    "StageTraffic",
    "SwapStatus",
    "TrafficSummary",
]


class StageTraffic(TypedDict):
    """How long one stage took in the last minute, in seconds; 0 where ``count`` is."""

    stage: str
    count: int
    p50: float
    p90: float
    p99: float


class KindTraffic(TypedDict):
    """How long requests of one kind took in the last minute, in seconds; those that succeeded only."""

    kind: str
    count: int
    p50: float
    p90: float
    p99: float


class TrafficSummary(TypedDict):
    """What `ServerMetrics.summary` says of the last minute.

    ``qps_10s`` and ``qps_60s`` count queries that were answered, ``failed_60s`` requests that were not. ``history`` is
    queries per second in each of the last 60 full seconds, oldest first.
    """

    qps_10s: float
    qps_60s: float
    failed_60s: int
    kinds: list[KindTraffic]
    stages: list[StageTraffic]
    history: list[int]


class SwapStatus(TypedDict):
    """The last attempt to load another snapshot of an index. ``outcome`` is ``"ok"`` if it is served now."""

    at: float
    seconds: float
    outcome: str
    read_bytes: int
    detail: str


class SnapshotStatus(TypedDict):
    """One snapshot that is offered.

    ``rows`` are those that can be found, of all groups, and ``group_rows`` by group. ``indexed_rows``, ``masked_rows``
    and ``tail_rows`` are of this server.
    """

    at: str
    epoch: int
    version: int
    generation: str
    committed_at: float
    rows: int
    indexed_rows: int
    masked_rows: int
    tail_rows: int
    unsaved_rows: int
    group_rows: list[int]
    ram_bytes: int


class IndexStatus(TypedDict):
    """One index. ``snapshots`` begins with the newest; ``coverage`` is the share of its rows that this server holds.

    ``loading`` says what is being loaded, ``problem`` why nothing newer is served; None when there is no such thing.
    """

    name: str
    dataset: str
    index: str
    index_type: str
    factory: str
    metric: str
    dim: int
    snapshots: list[SnapshotStatus]
    shards: int
    coverage: float
    payload: list[str]
    payload_bytes: int
    last_swap: SwapStatus | None
    loading: str | None
    problem: str | None


class ServerSummary(TypedDict):
    """One server of the cluster file. ``http`` is the host and port of its status page."""

    id: int
    address: str
    http: str | None
    group: int


class ServerStatus(TypedDict):
    """All that a server tells about itself. ``reason`` says why it is not ready, and is empty when it is."""

    server: int
    ready: bool
    draining: bool
    reason: str
    epoch: int
    group: int
    groups: int
    replicas: int
    address: str
    started_at: float
    pid: int
    version: str
    threads: int
    ram_bytes: int
    ram_limit_bytes: int
    waiting: int
    queue_limit: int
    connections: int
    filter_restarts: int
    servers: list[ServerSummary]
    indexes: list[IndexStatus]
    traffic: TrafficSummary
