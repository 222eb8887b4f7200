"""``lance-dfaiss status`` and ``lance-dfaiss reload``: a cluster as a person sees it, and moving it by hand."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonFlag
from .output import Block, Line, Report, Table, output
from .reach import ClusterArgument, ClusterReach
from .text import counted, format_bytes, format_seconds

if TYPE_CHECKING:
    from ..errors import DfaissError
    from ..launch.control import Move
    from ..serve.cluster import ClusterFile
    from ..serve.status import IndexStatus, ServerStatus

    Told = Mapping[int, "ServerStatus | DfaissError"]

__all__ = ["RELOAD_SECONDS", "move_report", "reload", "status"]

STATUS_SECONDS = 5.0
"""For a server to say how it is: it tells that from memory."""

RELOAD_SECONDS = 600.0
"""For a server to move: it loads shards before it answers."""


def status(cluster_file: ClusterArgument, reach: ClusterReach, as_json: JsonFlag = False) -> None:
    """Show the servers and indexes of a cluster; exit status 1 if a part of it is not served."""
    reach.check()
    cluster = reach.cluster(cluster_file)
    from ..launch.control import status_of

    told = status_of(cluster, reach.caller(cluster, seconds=STATUS_SECONDS))
    ready = _groups_ready(cluster, told)
    output(as_json=as_json).show(_status_report(cluster, told, ready))
    if not all(ready):
        raise typer.Exit(1)


def reload(
    cluster_file: ClusterArgument,
    reach: ClusterReach,
    version: Annotated[
        int | None, typer.Option("--version", min=1, help="Dataset version to move to; the newest if left out.")
    ] = None,
    index: Annotated[
        str | None, typer.Option("--index", metavar="NAME", help="Move this index; all of them if left out.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Have all servers take up the cluster file and the newest version, or a given one, now."""
    reach.check()
    cluster = reach.cluster(cluster_file)
    from ..launch.control import move_servers

    moves = move_servers(
        cluster_file,
        reach.caller(cluster, seconds=RELOAD_SECONDS),
        index=index,
        version=version,
        hold=version is not None,
        storage_options=reach.storage_options(),
    )
    output(as_json=as_json).show(move_report(moves))
    if any(move.error is not None for move in moves):
        raise typer.Exit(1)


def move_report(moves: Sequence[Move], document: Mapping[str, Any] | None = None, said: Sequence[Line] = ()) -> Report:
    """Return what came of telling servers to move.

    Parameters
    ----------
    moves : sequence of Move
        By server and index.
    document : mapping, optional
        What else there is to say, for a program.
    said : sequence of Line
        The same for a reader, said before.
    """
    servers = [
        {
            "server": move.server,
            "index": move.index,
            "version": move.version,
            "at": move.at or None,
            "error": None if move.error is None else str(move.error),
        }
        for move in moves
    ]
    rows = [[move.server, move.index, move.version, "failed" if move.error else "serves it"] for move in moves]
    # A token that is no admin's fails once for each index.
    failed = dict.fromkeys(f"server {move.server}: {move.error}" for move in moves if move.error is not None)
    blocks: list[Block] = [*said, Table(["server", "index", "version", ""], rows), *map(Line, failed)]
    return Report({**(document or {}), "servers": servers}, blocks)


def _groups_ready(cluster: ClusterFile, told: Told) -> list[bool]:
    """Tell for each group whether there is a server that is ready."""
    ready = {entry.group for entry in cluster.servers if _is_ready(told[entry.id])}
    return [group in ready for group in range(cluster.groups)]


def _is_ready(told: ServerStatus | DfaissError) -> bool:
    return isinstance(told, dict) and told["ready"]


def _status_report(cluster: ClusterFile, told: Told, ready: Sequence[bool]) -> Report:
    indexes = [_index_of(served.name, cluster, told) for served in cluster.indexes]
    document = {
        "epoch": cluster.epoch,
        "replicas": cluster.replicas,
        "groups": [{"group": group, "ready": is_ready} for group, is_ready in enumerate(ready)],
        "indexes": indexes,
        "servers": [
            {**found, "error": None}
            if isinstance(found, dict)
            else {"server": server, "ready": False, "error": str(found)}
            for server, found in told.items()
        ],
    }
    problems = _problems(told)
    missing = [str(group) for group, is_ready in enumerate(ready) if not is_ready]
    verdict = "all of it is served" if not missing else f"nobody answers for group {', '.join(missing)}"
    servers = counted(len(cluster.servers), "server")
    groups = counted(cluster.groups, "group")
    blocks: list[Block] = [
        Line(f"{servers} in {groups}, layout {cluster.epoch}: {verdict}"),
        _servers_table(cluster, told),
        _indexes_table(indexes),
        *map(Line, problems),
    ]
    return Report(document, blocks)


def _servers_table(cluster: ClusterFile, told: Told) -> Table:
    headers = ["server", "group", "address", "state", "up", "RAM", "QPS", "p50", "p99", "waiting"]
    rows: list[list[Any]] = []
    for entry in cluster.servers:
        found = told[entry.id]
        row: list[Any] = [entry.id, entry.group, f"{entry.host}:{entry.port}"]
        if not isinstance(found, dict):
            rows.append([*row, "no answer", *[None] * 6])
            continue
        state = "ready" if found["ready"] else "draining" if found["draining"] else "not ready"
        knn = [kind for kind in found["traffic"]["kinds"] if kind["kind"] == "knn" and kind["count"]]
        p50, p99 = (format_seconds(knn[0]["p50"]), format_seconds(knn[0]["p99"])) if knn else (None, None)
        up, ram = format_seconds(max(time.time() - found["started_at"], 0.0)), format_bytes(found["ram_bytes"])
        rows.append([*row, state, up, ram, round(found["traffic"]["qps_10s"], 1), p50, p99, found["waiting"]])
    return Table(headers, rows)


def _index_of(name: str, cluster: ClusterFile, told: Told) -> dict[str, Any]:
    """Return what is served of one index: the newest snapshot that all groups have, else the newest of any."""
    shown = {server: _status_of(name, found) for server, found in told.items()}
    held: dict[str, set[int]] = {}
    places: dict[str, int] = {}
    snapshots = {}
    for entry in cluster.servers:
        found = shown[entry.id]
        # Each server lists first what it would have clients ask for, which after a step back is no newer version.
        for place, snapshot in enumerate(() if found is None else found["snapshots"]):
            at = snapshot["at"]
            snapshots[at] = snapshot
            held.setdefault(at, set()).add(entry.group)
            places[at] = min(place, places.get(at, place))
    newest = min(
        snapshots.values(),
        key=lambda each: (len(held[each["at"]]) < cluster.groups, places[each["at"]], -each["version"]),
        default=None,
    )
    if newest is None:
        return {"index": name, "at": None, "version": None, "generation": None, "rows": None, "coverage": 0.0}
    rows, groups = newest["group_rows"], held[newest["at"]]
    served = sum(count for group, count in enumerate(rows) if group in groups)
    return {
        "index": name,
        "at": newest["at"],
        "version": newest["version"],
        "generation": newest["generation"],
        "rows": newest["rows"],
        "coverage": served / newest["rows"] if newest["rows"] else 1.0,
    }


def _status_of(name: str, found: ServerStatus | DfaissError) -> IndexStatus | None:
    if not isinstance(found, dict):
        return None
    return next((each for each in found["indexes"] if each["name"] == name), None)


def _indexes_table(indexes: Sequence[Mapping[str, Any]]) -> Table:
    headers = ["index", "version", "generation", "rows", "served"]
    rows = [
        [each["index"], each["version"], (each["generation"] or "")[:8], each["rows"], f"{each['coverage']:.1%}"]
        for each in indexes
    ]
    return Table(headers, rows)


def _problems(told: Told) -> list[str]:
    lines = []
    for server, found in told.items():
        if not isinstance(found, dict):
            lines.append(f"server {server}: {found.message}")
            continue
        told_of = [f"index {each['name']!r}: {each['problem']}" for each in found["indexes"] if each["problem"]]
        if not found["ready"] and not told_of:
            told_of = [found["reason"]]
        lines += [f"server {server}: {problem}" for problem in told_of]
    return lines
