"""``lance-dfaiss query``: `search`, over a cluster of servers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .edge import usage_error
from .options import JsonFlag
from .output import Block, Line, Report, Table, output
from .reach import ClusterArgument, ClusterReach
from .search import K, QueryFlags, ResultFlags, count_queries, explanation_report, given_query

if TYPE_CHECKING:
    import pyarrow as pa

    from ..serve.client import Client

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
    query.check()
    result.check()
    reach.check()
    given = given_query(query)
    if result.radius is not None and given is not None and count_queries(given) != 1:
        raise usage_error(
            f"--radius takes one query, and {query.vector_file!r} has {count_queries(given)}: choose a --row"
        )
    from ..serve.client import connect

    options = reach.of_client(reach.cluster(cluster_file))
    with connect(cluster_file, index=index, allow_partial=reach.allow_partial, **options) as client:
        if query.like_row is not None:
            import numpy as np

            given = client.reconstruct(np.array([query.like_row], dtype=np.uint64))[0]
        columns = _columns(result.columns, client)
        output(as_json=as_json).show(
            _explained(client, given, columns, result) if result.explain else _found(client, given, columns, result)
        )


def _explained(client: Client, query: Any, columns: list[str], result: ResultFlags) -> Report:
    told = client.explain(
        query, result.k or K, columns=columns, ef=result.ef, k_factor=result.k_factor, **result.among()
    )
    return explanation_report(client.stats().index, told, result.filter)


def _found(client: Client, query: Any, columns: list[str], result: ResultFlags) -> Report:
    table: pa.Table
    if result.radius is None:
        table = client.search(
            query, result.k or K, columns=columns, ef=result.ef, k_factor=result.k_factor, **result.among()
        )
    else:
        table = client.range_search(query, result.radius, columns=columns, **result.among())
    rows = table.to_pylist()
    stats, facts = client.stats(), _facts(table)
    document = {
        "index": stats.index,
        "version": facts["version"],
        "metric": stats.metric,
        "k": (result.k or K) if result.radius is None else None,
        "radius": result.radius,
        "filter": result.filter,
        "coverage": facts["coverage"],
        "rows": rows,
    }
    blocks: list[Block] = [Table(table.schema.names, [list(row.values()) for row in rows])]
    if facts["coverage"] < 1:
        blocks.append(Line(f"of {facts['coverage']:.1%} of the rows: the servers of the others are missing"))
    return Report(document, blocks)


def _facts(table: pa.Table) -> dict[str, Any]:
    """Return what a client notes with a table: coverage, version and generation of the answer."""
    from ..serve.answers import METADATA_KEY

    facts: dict[str, Any] = json.loads((table.schema.metadata or {})[METADATA_KEY])
    return facts


def _columns(text: str | None, client: Client) -> list[str]:
    if text is not None:
        return [name.strip() for name in text.split(",") if name.strip()]
    # Hundreds of numbers a row tell a reader nothing; whoever wants them names the column.
    stats = client.stats()
    return [name for name in stats.columns if name != stats.column]
