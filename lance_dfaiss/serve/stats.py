"""What a client tells of a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from .fleet import Fleet, Way

__all__ = ["ClusterStats", "cluster_stats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStats:
    """What a cluster holds of one index, as its client sees it.

    Parameters
    ----------
    index, metric : str
        Name and metric.
    dim : int
        Dimension.
    version : int
        Dataset version that answers are true to now.
    generation, at : str
        Of the index; and the snapshot.
    epoch : int
        Layout of the cluster.
    rows : int
        Rows that can be found.
    rows_by_group : tuple of int
        Those by shard group.
    servers_by_group : tuple of tuple of int
        Servers that answer now.
    coverage : float
        Share of the rows that there is a server for.
    column : str
        The vector column.
    columns, payload : tuple of str
        What may be asked for, and what of that is in RAM.
    queries, hedged, retried : int
        Queries asked by this client; queries asked of a second server because the first one took long; requests asked
        again because a server failed.
    """

    index: str
    metric: str
    dim: int
    version: int
    generation: str
    at: str
    epoch: int
    rows: int
    rows_by_group: tuple[int, ...]
    servers_by_group: tuple[tuple[int, ...], ...]
    coverage: float
    column: str
    columns: tuple[str, ...]
    payload: tuple[str, ...]
    queries: int
    hedged: int
    retried: int


def cluster_stats(fleet: Fleet, way: Way) -> ClusterStats:
    """Return what is known of one index.

    Parameters
    ----------
    fleet : Fleet
        The servers.
    way : Way
        How the index is asked.
    """
    route, replicas = way.route, fleet.everyone()
    offer = route.offer
    return ClusterStats(
        index=offer.index,
        metric=offer.metric,
        dim=offer.dim,
        version=offer.version,
        generation=offer.generation,
        at=offer.at,
        epoch=offer.epoch,
        rows=way.rows,
        rows_by_group=offer.rows,
        servers_by_group=tuple(tuple(replicas[place].entry.id for place in members) for members in route.members),
        coverage=route.coverage,
        column=offer.column,
        columns=offer.columns,
        payload=tuple(name for name in offer.columns if name in route.payload),
        queries=fleet.budget.asked,
        hedged=fleet.budget.hedged,
        retried=fleet.retries,
    )
