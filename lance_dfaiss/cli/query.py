"""``lance-dfaiss query``: `search`, over a cluster of servers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonFlag
from .output import Line, output
from .queries import QueryFlags, ResultFlags, checked_query, explained, found, found_report, shown_columns
from .reach import ClusterArgument, ClusterReach

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["query"]


@dataclass(frozen=True, kw_only=True)
class ClientFlags(ClusterReach):
    """The same, and what answer is good enough."""

    allow_partial: Annotated[
        float | None,
        typer.Option(
            "--allow-partial",
            min=0.0,
            max=1.0,
            metavar="SHARE",
            help="Share of the rows that is enough where servers are missing; all of them if left out.",
        ),
    ] = None


def query(
    cluster_file: ClusterArgument,
    query: QueryFlags,
    result: ResultFlags,
    reach: ClientFlags,
    index: Annotated[
        str | None,
        typer.Option("--index", metavar="NAME", help="Name of the index; may be left out when one is served."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the rows nearest to a query, asking the servers of a cluster."""
    given = checked_query(query, result)
    reach.check()
    from ..serve.client import connect

    options = reach.of_client(reach.cluster(cluster_file))
    with connect(cluster_file, index=index, allow_partial=reach.allow_partial, **options) as client:
        if query.like_row is not None:
            import numpy as np

            given = client.reconstruct(np.array([query.like_row], dtype=np.uint64))[0]
        stats = client.stats()
        columns = shown_columns(result.columns, stats.columns, stats.column)
        if result.explain:
            report = explained(client, stats.index, given, columns, result)
        else:
            table = found(client, given, columns, result)
            noted = _noted(table)
            version, coverage = noted["version"], noted["coverage"]
            facts = {"index": stats.index, "version": version, "metric": stats.metric, "coverage": coverage}
            missing = Line(f"of {coverage:.1%} of the rows: the servers of the others are missing")
            report = found_report(table, facts, result, [missing] if coverage < 1 else [])
        output(as_json=as_json).show(report)


def _noted(table: pa.Table) -> dict[str, Any]:
    """Return what a client notes with a table: coverage, version and generation of the answer."""
    from ..serve.answers import METADATA_KEY

    noted: dict[str, Any] = json.loads((table.schema.metadata or {})[METADATA_KEY])
    return noted
