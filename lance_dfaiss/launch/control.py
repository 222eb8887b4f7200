"""Asking each server of a cluster about itself, and telling it to move: also where not all of them answer."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from .._version import __version__
from ..errors import DfaissError
from ..serve.cluster import ClusterFile, ServerEntry, note_versions, read_cluster
from ..serve.connection import Connection, connection_error
from ..serve.refusals import no_index
from ..serve.status import ServerStatus
from ..serve.wire import PROTOCOL, Done, Frame, Hello, Message, Offers, Reload, Status, StatusReply, Welcome, decode

__all__ = ["Caller", "Move", "move_servers", "status_of"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks.

    Parameters
    ----------
    token : str
        Said to every server; empty for none.
    tls : ssl.SSLContext or None
        None for no TLS.
    seconds : float
        How long a server may take to answer.
    """

    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What came of telling one server to move one index.

    Parameters
    ----------
    server : int
        Which server.
    index : str
        Which index.
    at : str
        The snapshot that it offers now; empty if it failed.
    version : int or None
        Dataset version of that.
    error : DfaissError or None
        What went wrong.
    """

    server: int
    index: str
    at: str
    version: int | None
    error: DfaissError | None = None


def status_of(cluster: ClusterFile, caller: Caller) -> dict[int, ServerStatus | DfaissError]:
    """Return what each server says of itself, or why it says nothing.

    Parameters
    ----------
    cluster : ClusterFile
        Its servers.
    caller : Caller
        Who asks.
    """
    return _run(lambda: _status_of(cluster.servers, caller))


def move_servers(
    location: str,
    caller: Caller,
    *,
    index: str | None,
    version: int | None,
    hold: bool,
    storage_options: Mapping[str, str] | None = None,
) -> list[Move]:
    """Have all servers read the cluster file and move to a dataset version: all to the same one.

    Without a version, one server looks for the newest, and the others are told which that is. Where servers do not
    follow versions by themselves, the file then says which one to start at.

    Parameters
    ----------
    location : str
        Of the cluster file.
    caller : Caller
        Who asks; needs the rights of an admin.
    index : str or None
        Name under which an index is served; None for all.
    version : int or None
        Dataset version; None for the newest.
    hold : bool
        Stay there until the next move, also where servers follow the dataset.
    storage_options : mapping, optional
        For the cluster file.

    Raises
    ------
    IndexNotFound
        If no such index is served.
    ClusterFileInvalid
        If there is no cluster file.
    """
    cluster = read_cluster(location, storage_options)
    names = tuple(served.name for served in cluster.indexes)
    if index is not None and index not in names:
        raise no_index(index, names)

    async def move() -> list[Move]:
        wanted = names if index is None else (index,)
        return [move for name in wanted for move in await _move_index(cluster.servers, caller, name, version, hold)]

    moves = _run(move)
    failed = {each.index for each in moves if each.version is None}
    versions = {each.index: each.version for each in moves if each.version is not None and each.index not in failed}
    stays = hold or not cluster.refresh_seconds
    # Servers write it too, where they may; and others may have moved other indexes meanwhile.
    note_versions(location, {name: found if stays else None for name, found in versions.items()}, storage_options)
    return moves


async def _move_index(
    servers: Sequence[ServerEntry], caller: Caller, index: str, version: int | None, hold: bool
) -> list[Move]:
    moves: list[Move] = []
    rest = list(servers)
    while version is None and rest:
        moves.append(await _move(rest.pop(0), caller, index, None, hold))
        version = moves[-1].version
    return [*moves, *await asyncio.gather(*(_move(entry, caller, index, version, hold) for entry in rest))]


async def _move(entry: ServerEntry, caller: Caller, index: str, version: int | None, hold: bool) -> Move:
    try:
        done: Done = await _ask(entry, Reload(index=index, version=version, hold=hold), Done, caller)
    except DfaissError as exc:
        return Move(server=entry.id, index=index, at="", version=None, error=exc)
    return Move(server=entry.id, index=index, at=done.facts["at"][index], version=done.facts["versions"][index])


async def _status_of(servers: Sequence[ServerEntry], caller: Caller) -> dict[int, ServerStatus | DfaissError]:
    async def one(entry: ServerEntry) -> ServerStatus | DfaissError:
        try:
            reply: StatusReply = await _ask(entry, Status(), StatusReply, caller)
        except DfaissError as exc:
            return exc
        return cast("ServerStatus", reply.status)

    return dict(zip((entry.id for entry in servers), await asyncio.gather(*map(one, servers)), strict=True))


class _Call:
    """One connection for one question."""

    def __init__(self, name: str, message: Message, expected: type[Message], token: str) -> None:
        self.answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._message = message
        self._expected = expected
        hello = Hello(protocol=PROTOCOL, token=token, client=f"lance-dfaiss/{__version__}")
        self.connection = Connection(name, hello, self)

    def welcomed(self, connection: Connection, welcome: Welcome) -> None:  # noqa: ARG002 - whoever it is
        """Ask."""
        connection.send(self._message, (), self)

    def unsent(self, connection: Connection) -> None:
        """Send, as soon as all of it is there."""
        asyncio.get_running_loop().call_soon(connection.flush)

    def answered(self, frame: Frame) -> None:
        """Hand over the answer."""
        self.answer.set_result(decode(frame, self._expected))

    def failed(self, error: DfaissError) -> None:
        """Hand over the error."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def lost(self, connection: Connection, error: DfaissError) -> None:  # noqa: ARG002 - there is one
        """Hand over why there will be no answer."""
        self.failed(error)

    def offered(self, offers: Offers) -> None:
        """Nothing to do: only the answer counts."""

    def heard(self) -> None:
        """Nothing to do: only the answer counts."""

    def doubted(self) -> None:
        """Nothing to do: nobody else can answer."""


async def _ask(entry: ServerEntry, message: Message, expected: type[Message], caller: Caller) -> Any:
    name = f"server {entry.id} ({entry.host}:{entry.port})"
    call = _Call(name, message, expected, caller.token)

    async def ask() -> Message:
        await call.connection.dial(entry.host, entry.port, caller.tls)
        return await call.answer

    try:
        return await asyncio.wait_for(ask(), caller.seconds)
    except (OSError, asyncio.TimeoutError) as exc:
        raise connection_error(name, exc) from exc
    finally:
        call.connection.close(connection_error(name, None))
        if call.answer.done() and not call.answer.cancelled():
            call.answer.exception()  # told already, or of no interest


def _run(work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    return asyncio.run(work())
