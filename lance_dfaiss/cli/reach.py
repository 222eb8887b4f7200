"""How commands reach a running cluster: its file, a token and TLS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .edge import usage_error
from .options import Reach

if TYPE_CHECKING:
    import ssl

    from ..launch.control import Caller
    from ..serve.cluster import ClusterFile

__all__ = ["ClusterArgument", "ClusterReach", "ServerReach"]

_PANEL = "How servers are reached"

ClusterArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="CLUSTER_FILE", help="Path or URL of the file that serve --cluster-file wrote.")
]


@dataclass(frozen=True, kw_only=True)
class ServerReach:
    """What servers are shown, and how they are known to be the right ones."""

    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file",
            envvar="LANCE_DFAISS_TOKEN_FILE",
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="File with the token that the servers ask for.",
        ),
    ] = None
    tls_ca: Annotated[
        str | None,
        typer.Option(
            "--tls-ca",
            metavar="FILE",
            rich_help_panel=_PANEL,
            help="Certificates (PEM) that the servers are trusted by; the system's if left out.",
        ),
    ] = None
    tls_cert: Annotated[
        str | None,
        typer.Option(
            "--tls-cert", metavar="FILE", rich_help_panel=_PANEL, help="Certificate to show to the servers (PEM)."
        ),
    ] = None
    tls_key: Annotated[
        str | None,
        typer.Option(
            "--tls-key", metavar="FILE", rich_help_panel=_PANEL, help="Its key; in the same file if left out."
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=0.001, metavar="SECONDS", rich_help_panel=_PANEL, help="The longest to wait."),
    ] = None

    def check(self) -> None:
        """Raise a usage error for options that mean nothing alone."""
        if self.tls_key is not None and self.tls_cert is None:
            raise usage_error("--tls-key needs --tls-cert")

    def token(self) -> str | None:
        """Return the token; None without."""
        from ..serve.security import load_token

        return None if self.token_file is None else load_token(self.token_file).decode()

    def tls(self, cluster: ClusterFile) -> ssl.SSLContext | None:
        """Return how servers are known; None if they have no TLS."""
        from ..serve.security import client_tls

        if not cluster.tls and self.tls_ca is None and self.tls_cert is None:
            return None
        return client_tls(self.tls_ca, self.tls_cert, self.tls_key)

    def caller(self, cluster: ClusterFile, *, seconds: float) -> Caller:
        """Return who asks each server.

        Parameters
        ----------
        cluster : ClusterFile
            Its servers.
        seconds : float
            The longest to wait, where ``--timeout`` does not say otherwise.
        """
        from ..launch.control import Caller

        return Caller(token=self.token() or "", tls=self.tls(cluster), seconds=self.timeout or seconds)


@dataclass(frozen=True, kw_only=True)
class ClusterReach(ServerReach, Reach):
    """The same, for commands that need nothing else."""

    def cluster(self, location: str) -> ClusterFile:
        """Read the cluster file."""
        from ..serve.cluster import read_cluster

        return read_cluster(location, self.storage_options())

    def of_client(self, cluster: ClusterFile) -> dict[str, Any]:
        """Return keyword arguments for `connect`."""
        given = {} if self.timeout is None else {"timeout": self.timeout}
        return {"token": self.token(), "tls": self.tls(cluster), "storage_options": self.storage_options(), **given}
