"""``lance-dfaiss serve``: server processes on this machine, one server by hand, or only the cluster file."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .edge import usage_error
from .options import JsonFlag, TrustedAccess, option, usage_errors
from .output import Line, Report, Table, output
from .text import counted, parse_bytes

if TYPE_CHECKING:
    from types import FrameType

    from ..launch import LocalCluster, ServeOptions
    from ..serve.cluster import ClusterFile, ServedIndex

__all__ = ["serve"]

_WHAT, _CLUSTER, _LIMITS, _SAFETY = "What to serve", "By which servers", "How much to take on", "Who may ask"
_FROM_HOST_NAME = "from-hostname"
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]]+)):([0-9]{1,5})(?:/([0-9]{1,5}))?")
_ALSO = re.compile(r"(?:([^\s=/:]+)=)?(.+):([^:]+)")


@dataclass(frozen=True, kw_only=True)
class WhatFlags:
    """What is served."""

    index: Annotated[
        list[str],
        option("--index", "Index of DATASET, the only one if left out; may be repeated.", _WHAT, "NAME"),
    ] = field(default_factory=list)
    also: Annotated[
        list[str],
        option("--also", "Index of another dataset, and how to call it; may be repeated.", _WHAT, "[AS=]DATASET:NAME"),
    ] = field(default_factory=list)
    payload: Annotated[
        str | None, option("--payload", "Columns to hold in RAM, so that answers have them at once.", _WHAT, "A,B,...")
    ] = None
    filter_columns: Annotated[
        str | None, option("--filter-columns", "Columns to hold in RAM for filters.", _WHAT, "A,B,...")
    ] = None
    columns: Annotated[
        str | None, option("--columns", "Columns that clients may see; all if left out.", _WHAT, "A,B,...")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """By which servers, and where they listen."""

    cluster_file: Annotated[
        str, option("--cluster-file", "File that tells clients and servers of each other.", _CLUSTER, "FILE")
    ]
    servers: Annotated[int | None, option("--servers", "Processes to start, 1 if left out.", _CLUSTER, min=1)] = None
    replicas: Annotated[
        int | None, option("--replicas", "Servers that hold the same, 1 if left out.", _CLUSTER, min=1)
    ] = None
    refresh: Annotated[
        float | None,
        option("--refresh", "How often to look for new versions, 10 if left out; 0 never.", _CLUSTER, "SECONDS", min=0),
    ] = None
    host: Annotated[
        str | None, option("--host", "Address to listen on, 127.0.0.1 if left out.", _CLUSTER, "ADDRESS")
    ] = None
    port: Annotated[
        int | None,
        option("--port", "Port of the first server, the next ones follow; any free one if left out.", _CLUSTER,
                min=1, max=65_535),
    ] = None  # fmt: skip
    http_port: Annotated[
        int | None, option("--http-port", "The same for health, metrics and status.", _CLUSTER, min=1, max=65_535)
    ] = None
    no_http: Annotated[bool, option("--no-http", "No port for health, metrics and status.", _CLUSTER)] = False
    server_id: Annotated[
        str | None,
        option(
            "--server-id",
            f"Run only this server of the file; {_FROM_HOST_NAME} takes the number at the end of the host's name.",
            _CLUSTER,
            "ID",
            envvar="LANCE_DFAISS_SERVER_ID",
        ),
    ] = None
    address: Annotated[
        list[str],
        option(
            "--address",
            "Server that will be started by hand; may be repeated. Writes the cluster file and starts nothing.",
            _CLUSTER,
            "HOST:PORT[/HTTP_PORT]",
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """How much a server takes on."""

    threads: Annotated[
        int | None, option("--threads", "Cores for one search; cores over servers if left out.", _LIMITS, min=1)
    ] = None
    memory_limit: Annotated[
        str | None,
        option("--memory-limit", "Per server, like 16GiB; memory over servers if left out.", _LIMITS, "SIZE"),
    ] = None
    max_k: Annotated[int | None, option("--max-k", "Most rows per query.", _LIMITS, min=1)] = None
    max_queries: Annotated[int | None, option("--max-queries", "Most queries per request.", _LIMITS, min=1)] = None
    queue: Annotated[int | None, option("--queue", "Queries that may wait in a server.", _LIMITS, min=1)] = None
    filter_timeout: Annotated[
        float | None, option("--filter-timeout", "Time for one filter.", _LIMITS, "SECONDS", min=0.001)
    ] = None
    filter_memory: Annotated[
        str | None, option("--filter-memory", "Memory of a process that evaluates filters.", _LIMITS, "SIZE")
    ] = None
    grace: Annotated[
        float | None,
        option("--grace", "How long an older version is held after it was last asked for.", _LIMITS, "SECONDS", min=0),
    ] = None
    cache_dir: Annotated[
        str | None,
        option("--cache-dir", "Folder that keeps index files read from far away, for all servers.", _LIMITS, "DIR"),
    ] = None
    cache_bytes: Annotated[
        str | None, option("--cache-bytes", "What it may hold, 16GiB if left out.", _LIMITS, "SIZE")
    ] = None


@dataclass(frozen=True, kw_only=True)
class SafetyFlags:
    """Who may ask."""

    tls_cert: Annotated[str | None, option("--tls-cert", "Certificate of the servers (PEM).", _SAFETY, "FILE")] = None
    tls_key: Annotated[str | None, option("--tls-key", "Its key (PEM).", _SAFETY, "FILE")] = None
    tls_client_ca: Annotated[
        str | None,
        option("--tls-client-ca", "Clients need a certificate that one of these has signed (PEM).", _SAFETY, "FILE"),
    ] = None
    token_file: Annotated[
        str | None, option("--token-file", "File with the token that clients need.", _SAFETY, "FILE")
    ] = None
    admin_token_file: Annotated[
        str | None, option("--admin-token-file", "File with the token to reload and drain with.", _SAFETY, "FILE")
    ] = None

    def check(self) -> None:
        """Raise a usage error for options that mean nothing together."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise usage_error("--tls-cert and --tls-key need each other")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise usage_error("--tls-client-ca needs --tls-cert and --tls-key")


def serve(
    what: WhatFlags,
    layout: ClusterFlags,
    limits: LimitFlags,
    safety: SafetyFlags,
    access: TrustedAccess,
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="Path or URI of the Lance dataset; not with --server-id.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Serve indexes from the RAM of several processes, until told to stop."""
    safety.check()
    _check_modes(dataset, what, layout, access)
    # Before anything loads OpenMP: threads that spin while they wait would take the cores from the event loop.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _serve_options(what, limits, safety, access)
    if layout.server_id is not None:
        _serve_one(layout, options, _server_number(layout.server_id))
    assert dataset is not None
    indexes = _served(dataset, what, access, follow=layout.refresh != 0)
    if layout.address:
        cluster = _write_only(indexes, layout, options)
        said = f"{layout.cluster_file}: {counted(len(cluster.servers), 'server')}, layout {cluster.epoch}"
        document = {"cluster_file": layout.cluster_file, **cluster.to_json()}
        output(as_json=as_json).show(Report(document, [Line(said)]))
        return
    _serve_all(indexes, layout, options, as_json=as_json)


def _check_modes(dataset: str | None, what: WhatFlags, layout: ClusterFlags, access: TrustedAccess) -> None:
    """Raise a usage error for options that the cluster file has decided already, or that nothing will read."""
    if layout.server_id is not None:
        given = {
            "DATASET": dataset,
            "--index": what.index,
            "--also": what.also,
            "--index-uri": access.index_uri,
            "--servers": layout.servers,
            "--replicas": layout.replicas,
            "--refresh": layout.refresh,
            "--port": layout.port,
            "--http-port": layout.http_port,
            "--no-http": layout.no_http,
            "--address": layout.address,
        }
        said = [name for name, value in given.items() if value]
        if said:
            raise usage_error(f"with --server-id the cluster file says what is served: leave out {', '.join(said)}")
    elif dataset is None:
        raise usage_error("say which DATASET to serve, or which --server-id of a cluster file to run")
    if layout.address:
        given = {
            "--servers": layout.servers,
            "--host": layout.host,
            "--port": layout.port,
            "--http-port": layout.http_port,
            "--no-http": layout.no_http,
        }
        said = [name for name, value in given.items() if value]
        if said:
            raise usage_error(f"--address says where servers are: leave out {', '.join(said)}")
    elif (layout.replicas or 1) > (layout.servers or 1):
        raise usage_error(f"--replicas {layout.replicas} needs as many --servers")
    if layout.no_http and layout.http_port is not None:
        raise usage_error("--no-http and --http-port cannot be given together")


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def _serve_options(what: WhatFlags, limits: LimitFlags, safety: SafetyFlags, access: TrustedAccess) -> ServeOptions:
    from ..launch import ServeOptions

    with usage_errors():
        memory = None if limits.memory_limit is None else parse_bytes(limits.memory_limit)
        filter_memory = None if limits.filter_memory is None else parse_bytes(limits.filter_memory)
        cache_bytes = None if limits.cache_bytes is None else parse_bytes(limits.cache_bytes)
    if cache_bytes is not None and limits.cache_dir is None:
        raise usage_error("--cache-bytes needs --cache-dir")
    return ServeOptions(
        threads=limits.threads,
        memory_limit_bytes=memory,
        payload=_names(what.payload) or (),
        filter_columns=_names(what.filter_columns) or (),
        columns=_names(what.columns),
        max_k=limits.max_k,
        max_queries=limits.max_queries,
        max_waiting=limits.queue,
        filter_seconds=limits.filter_timeout,
        filter_bytes=filter_memory,
        grace_seconds=limits.grace,
        tls_cert=safety.tls_cert,
        tls_key=safety.tls_key,
        tls_client_ca=safety.tls_client_ca,
        token_file=safety.token_file,
        admin_token_file=safety.admin_token_file,
        storage_options=access.storage_options(),
        allowed_index_uris=tuple(access.allow_index_uri),
        # Servers may stand in another folder.
        cache_dir=None if limits.cache_dir is None else os.path.abspath(limits.cache_dir),
        cache_bytes=cache_bytes,
        log_level=logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower(),
    )


def _served(dataset: str, what: WhatFlags, access: TrustedAccess, *, follow: bool) -> list[ServedIndex]:
    """Return what is to be served, after a look at each pointer: a wrong name is told before anything starts."""
    names: list[str | None] = [*what.index] or [None]
    asked: list[tuple[str | None, str, str | None]] = [(None, dataset, name) for name in names]
    for text in what.also:
        match = _ALSO.fullmatch(text)
        if match is None:
            raise usage_error(f"--also must be DATASET:NAME or AS=DATASET:NAME, not {text!r}")
        asked.append((match[1], match[2], match[3]))
    from ..lance_io import PinnedDataset, open_dataset
    from ..pointers import find_pointer
    from ..serve.cluster import ServedIndex

    found: dict[str, ServedIndex] = {}
    options = access.storage_options()
    for called, place, name in asked:
        pinned = PinnedDataset(open_dataset(place, storage_options=options), options)
        index = find_pointer(pinned, name, access.index_uri).name
        served = ServedIndex(
            name=called or index,
            # Servers may stand in another folder.
            dataset=place if "://" in place else os.path.abspath(place),
            index=index,
            index_uri=access.index_uri,
            # Else servers that start at different times would start at different versions.
            version=None if follow else pinned.version,
        )
        if served.name in found:
            raise usage_error(f"two indexes would be called {served.name!r}: say --also ANOTHER_NAME={place}:{index}")
        found[served.name] = served
    return list(found.values())


def _write_only(indexes: list[ServedIndex], layout: ClusterFlags, options: ServeOptions) -> ClusterFile:
    """Write a cluster file for servers that somebody else starts.

    Servers that are in the file already keep their ids and groups as far as that can be.
    """
    from dataclasses import replace

    from ..serve.cluster import existing_cluster, plan_cluster, write_cluster

    addresses = [_address(text) for text in layout.address]
    old = existing_cluster(layout.cluster_file, options.storage_options)
    with usage_errors():
        planned = plan_cluster(
            indexes,
            addresses,
            replicas=layout.replicas or 1,
            refresh_seconds=10.0 if layout.refresh is None else layout.refresh,
            tls=options.tls_cert is not None,
        )
    cluster = planned
    if old is not None:
        cluster = planned if old.replicas != planned.replicas else _grown(old, addresses)
        cluster = replace(planned, servers=cluster.servers, next_id=cluster.next_id, epoch=old.epoch + 1)
    write_cluster(
        layout.cluster_file,
        cluster,
        expected_epoch=0 if old is None else old.epoch,
        storage_options=options.storage_options,
    )
    return cluster


def _grown(cluster: ClusterFile, addresses: list[tuple[str, int, int | None]]) -> ClusterFile:
    """Return a layout with the servers that are wanted: new ones join before the others leave."""
    present = {(entry.host, entry.port, entry.http_port) for entry in cluster.servers}
    for host, port, http_port in addresses:
        if (host, port, http_port) not in present:
            cluster, _ = cluster.with_server(host, port, http_port=http_port)
    for entry in cluster.servers:
        if (entry.host, entry.port, entry.http_port) not in addresses:
            cluster = cluster.without_server(entry.id)
    return cluster


def _address(text: str) -> tuple[str, int, int | None]:
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise usage_error(f"--address must be HOST:PORT or HOST:PORT/HTTP_PORT, not {text!r}")
    return match[1] or match[2], int(match[3]), None if match[4] is None else int(match[4])


def _server_number(text: str) -> int:
    if text == _FROM_HOST_NAME:
        host = socket.gethostname().split(".")[0]
        found = re.search(r"([0-9]+)$", host)
        if found is None:
            raise usage_error(f"--server-id {_FROM_HOST_NAME}: the name of this host, {host!r}, ends with no number")
        return int(found[1])
    if not text.isdecimal():
        raise usage_error(f"--server-id must be a number or {_FROM_HOST_NAME}, not {text!r}")
    return int(text)


def _serve_one(layout: ClusterFlags, options: ServeOptions, server_id: int) -> NoReturn:
    """Run one server in this process, until it is told to stop."""
    from ..launch.process import leave, quiet_libraries, run_server
    from ..launch.sockets import listen, sockets_from_systemd
    from ..serve.cluster import read_cluster
    from ..serve.security import check_listen

    quiet_libraries()
    cluster = read_cluster(layout.cluster_file, options.storage_options)
    entry = cluster.server(server_id)
    config = options.config(cluster, server_id, layout.cluster_file)
    os.environ["OMP_NUM_THREADS"] = str(config.workload.threads)
    host = layout.host or entry.host
    passed = sockets_from_systemd(os.environ)
    if "requests" not in passed:
        check_listen(host, config.access, config.tls)
        passed["requests"] = listen(host, entry.port)
    if "http" not in passed and entry.http_port is not None:
        passed["http"] = listen(host, entry.http_port)
    leave(run_server(config, passed["requests"], passed.get("http")))


def _serve_all(indexes: list[ServedIndex], layout: ClusterFlags, options: ServeOptions, *, as_json: bool) -> None:
    """Start all servers, and watch over them until told to stop."""
    from ..launch import LocalCluster

    with usage_errors():
        cluster = LocalCluster(
            indexes,
            cluster_file=layout.cluster_file,
            servers=layout.servers or 1,
            replicas=layout.replicas or 1,
            options=options,
            host=layout.host or "127.0.0.1",
            port=layout.port,
            http_port=layout.http_port,
            http=not layout.no_http,
            refresh_seconds=10.0 if layout.refresh is None else layout.refresh,
        )
    with _Signals(cluster) as signals, cluster:
        signals.serving = True
        output(as_json=as_json).show(_started(cluster))
        sys.stdout.flush()
        while not (cluster.wait(signals.LOOK_SECONDS) or signals.stop):
            pass
        failed = cluster.failed
    if failed:
        from ..errors import CannotServe

        raise CannotServe(
            f"{counted(len(failed), 'server')} given up: {', '.join(map(str, failed))}",
            remedy="The log above says why; start the cluster again once that is mended",
        )


class _Signals:
    """What the launcher is told by signals: to stop, to stop at once, and to look for changes."""

    LOOK_SECONDS = 0.1

    def __init__(self, cluster: LocalCluster) -> None:
        self.serving = False
        self.stop = False
        self._cluster = cluster
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        told = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop, signal.SIGHUP: self._look}
        self._before = {number: signal.signal(number, handler) for number, handler in told.items()}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as Python calls it
        if self.stop:
            self._cluster.kill()
            return
        self.stop = True
        if not self.serving:
            raise KeyboardInterrupt

    def _look(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as Python calls it
        self._cluster.reload()


def _started(cluster: LocalCluster) -> Report:
    found, pids = cluster.cluster, cluster.pids
    document = {"cluster_file": cluster.cluster_file, "pids": pids, **found.to_json()}
    rows = [
        [
            entry.id,
            entry.group,
            f"{entry.host}:{entry.port}",
            None if entry.http_port is None else f"http://{entry.host}:{entry.http_port}/",
            pids.get(entry.id),
        ]
        for entry in found.servers
    ]
    table = Table(["server", "group", "address", "status page", "process"], rows)
    return Report(document, [table, Line(f"ready: clients connect with {cluster.cluster_file}")])
