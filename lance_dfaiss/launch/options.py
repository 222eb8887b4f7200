"""What servers are told beside the cluster file: the same for all of them, and sent to each as JSON."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..machine import usable_cores, usable_memory_bytes
from ..serve.security import Access, load_token, server_tls
from ..storage import open_cache

if TYPE_CHECKING:
    from ..serve.cluster import ClusterFile
    from ..serve.server import ServerConfig

__all__ = ["ServeOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How servers serve.

    Parameters
    ----------
    threads : int or None
        Cores that one search of one server may use; None for an equal share of the machine.
    memory_limit_bytes : int or None
        What one server may use; None for an equal share of the machine.
    payload : sequence of str
        Columns to keep in RAM.
    filter_columns : sequence of str
        Columns to keep in the RAM of the process that evaluates filters.
    columns : sequence of str or None
        Columns that clients may see; None for all.
    max_k, max_queries : int or None
        Most results per query, most queries in a request.
    max_waiting : int or None
        Queries that may wait in one server.
    filter_seconds : float or None
        Time for one filter.
    filter_bytes : int or None
        Memory for the process that evaluates filters.
    grace_seconds : float or None
        How long an older snapshot is kept after it was last asked for.
    tls_cert, tls_key, tls_client_ca : str or None
        PEM files; see `serve.security.server_tls`.
    token_file, admin_token_file : str or None
        Files with a token each.
    storage_options : mapping or None
        For the datasets and the cluster file.
    allowed_index_uris : sequence of str
        Places outside the datasets that their indexes may lie in.
    cache_dir : str or None
        Folder on each machine that keeps the index files which its servers read; None for none.
    cache_bytes : int or None
        What all servers of a machine may keep there together; None for 16 GiB.
    log_level : str
        Level from which a server logs, on its stderr.

    Raises
    ------
    InvalidArgument
        If the cache is no folder of this machine, or has a size without one.
    """

    threads: int | None = None
    memory_limit_bytes: int | None = None
    payload: tuple[str, ...] = ()
    filter_columns: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    max_k: int | None = None
    max_queries: int | None = None
    max_waiting: int | None = None
    filter_seconds: float | None = None
    filter_bytes: int | None = None
    grace_seconds: float | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    token_file: str | None = None
    admin_token_file: str | None = None
    storage_options: Mapping[str, str] | None = field(default=None, repr=False)
    allowed_index_uris: tuple[str, ...] = ()
    cache_dir: str | None = None
    cache_bytes: int | None = None
    log_level: str = "warning"

    def __post_init__(self) -> None:
        open_cache(self.cache_dir, self.cache_bytes)  # refuses what is no cache; servers open it themselves

    def shared_by(self, servers: int) -> ServeOptions:
        """Return the same with cores and memory of this machine divided, where they are not set.

        Parameters
        ----------
        servers : int
            That run on this machine.
        """
        return replace(
            self,
            threads=max(usable_cores() // servers, 1) if self.threads is None else self.threads,
            memory_limit_bytes=(
                usable_memory_bytes() // servers if self.memory_limit_bytes is None else self.memory_limit_bytes
            ),
        )

    def access(self) -> Access:
        """Return what clients have to show.

        Raises
        ------
        CannotServe
            If a token cannot be read, or is none.
        """
        return Access(
            read_token=None if self.token_file is None else load_token(self.token_file),
            admin_token=None if self.admin_token_file is None else load_token(self.admin_token_file),
            mutual_tls=self.tls_client_ca is not None,
        )

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS settings of a server; None without TLS.

        Raises
        ------
        CannotServe
            If a file cannot be used.
        """
        if self.tls_cert is None or self.tls_key is None:
            return None
        return server_tls(self.tls_cert, self.tls_key, self.tls_client_ca)

    def config(self, cluster: ClusterFile, server_id: int, location: str | None) -> ServerConfig:
        """Return what one server is told.

        Parameters
        ----------
        cluster : ClusterFile
            Layout and indexes.
        server_id : int
            Which of its servers.
        location : str or None
            Where the cluster file lies.

        Raises
        ------
        CannotServe
            If a file cannot be used.
        """
        from ..serve.answering import Workload
        from ..serve.holdings import HoldingOptions
        from ..serve.server import ServerConfig
        from ..serve.wire import Limits

        here = cluster.server(server_id).host
        shared = self.shared_by(sum(entry.host == here for entry in cluster.servers))
        assert shared.threads is not None
        holding = HoldingOptions(
            payload=self.payload,
            filter_columns=self.filter_columns,
            columns=self.columns,
            storage_options=self.storage_options,
            allowed_index_uris=self.allowed_index_uris,
            cache_dir=self.cache_dir,
            cache_bytes=self.cache_bytes,
            **_given(ram_limit_bytes=shared.memory_limit_bytes, grace_seconds=self.grace_seconds),
        )
        limits = Limits(**_given(k=self.max_k, queries=self.max_queries))
        return ServerConfig(
            cluster=cluster,
            server_id=server_id,
            location=location,
            holding=holding,
            access=self.access(),
            tls=self.tls(),
            workload=Workload(threads=shared.threads, limits=limits, **_given(max_waiting=self.max_waiting)),
            **_given(filter_seconds=self.filter_seconds, filter_bytes=self.filter_bytes),
        )


def _given(**values: Any) -> dict[str, Any]:
    """Return what is set, so that the rest keeps its default."""
    return {name: value for name, value in values.items() if value is not None}
