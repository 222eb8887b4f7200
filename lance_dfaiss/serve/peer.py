"""One connection of a server: frames in, frames out, and who is at the other end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from ..errors import AccessDenied, DfaissError, ProtocolError, Unavailable
from .security import Rights
from .wire import (
    HELLO_BYTES,
    PROTOCOL,
    REQUESTS,
    Buffer,
    Failure,
    Frame,
    FrameReader,
    Hello,
    Limits,
    Message,
    Offers,
    Welcome,
    decode,
    encode,
    failure_of,
)

__all__ = ["Host", "Peer", "Ticket"]

_log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""How long somebody who has connected may take to say who they are, TLS included."""

MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""Answers that a client has not read yet; beyond that nothing more is read from it."""

BEHIND_BYTES = 1024 * 1024
"""The same, from which on a client counts as slow; it is left when it is to get more while all have too much."""

STALLED_SECONDS = 30.0
"""How long a client may read nothing of what waits for it."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that is being answered.

    Parameters
    ----------
    peer : Peer
        Who asked.
    request_id : int
        By which the client knows it.
    kind : str
        ``"knn"``, ``"range"``, ``"fetch"``..., for metrics.
    started, deadline : float
        When it came in, and until when somebody waits; on the monotonic clock.
    queries : int
        How many.
    length_bytes : int
        Of its payload, for as long as that is held.
    work : object
        What has come of it so far; of whoever answers it.
    task : asyncio.Task or None
        Works on it.
    gone : bool
        Nobody waits any more.
    """

    peer: Peer
    request_id: int
    kind: str
    started: float
    deadline: float
    queries: int = 1
    length_bytes: int = 0
    work: Any = None
    task: asyncio.Task[None] | None = None
    gone: bool = field(default=False, init=False)

    def check(self) -> None:
        """Raise if nobody waits any more; from any thread.

        Raises
        ------
        Unavailable
            Which nobody sees.
        """
        if self.gone:
            raise Unavailable("nobody waits for this any more")


class Host(Protocol):
    """What a connection needs of its server."""

    @property
    def server_id(self) -> int:
        """Number of the server."""

    @property
    def limits(self) -> Limits:
        """What is taken from one client."""

    @property
    def offers(self) -> Offers:
        """What can be asked for now."""

    def joined(self, peer: Peer) -> bool:
        """Note a connection; False if there are too many."""

    def left(self, peer: Peer) -> None:
        """Note that a connection has ended."""

    def unfinished(self, more_bytes: int) -> bool:
        """Note bytes of a frame that is not complete, or (negative) that are no more; False if there are too many."""

    def unsent(self, more_bytes: int) -> bool:
        """Note bytes of answers that wait to be read, or (negative) that are no more; False if there are too many."""

    def rights_of(self, token: str, *, certificate: bool) -> Rights:
        """Return what somebody may do."""

    def handle(self, peer: Peer, frame: Frame) -> None:
        """Answer a request, now or later."""

    def dropped(self, ticket: Ticket) -> None:
        """Stop working on a request that nobody waits for."""


class Peer(asyncio.Protocol):
    """A client, as the server sees it.

    Parameters
    ----------
    host : Host
        The server.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._reader = FrameReader(HELLO_BYTES, REQUESTS)
        self._unsent: list[Buffer] = []
        self._unfinished = 0
        self._written = 0
        self._waiting_bytes = 0
        self._answers = False
        self._paused = False
        self._stalled: asyncio.TimerHandle | None = None
        self._rights: Rights | None = None
        self.name = ""
        self.pending: dict[int, Ticket] = {}
        """Requests that wait for an answer, by their id."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody has connected."""
        self._transport = cast("asyncio.Transport", transport)
        self._loop = asyncio.get_running_loop()
        address = transport.get_extra_info("peername") or ("?", 0)
        self.name = f"{address[0]}:{address[1]}"
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.set_write_buffer_limits(high=MAX_UNSENT_BYTES)
        self._patience = self._loop.call_later(HELLO_SECONDS, self.close)
        if not self._host.joined(self):
            self._refuse(DfaissError("this server has as many connections as it takes", remedy="Close some"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the requests of the other end, which has gone."""
        self._patience.cancel()
        if self._stalled is not None:
            self._stalled.cancel()
        pending, self.pending = self.pending, {}
        for ticket in pending.values():
            ticket.gone = True
            self._host.dropped(ticket)
        self._host.unfinished(-self._unfinished)
        self._unfinished = 0
        self._host.left(self)
        waiting, self._waiting_bytes = self._waiting_bytes, 0
        self._host.unsent(-waiting)
        if exc is not None:
            _log.debug("client %s is gone: %s", self.name, exc)

    def pause_writing(self) -> None:
        """Read no more from a client that does not read its answers."""
        self._paused = True
        self._transport.pause_reading()
        self._watch()

    def resume_writing(self) -> None:
        """Read on: the client does too."""
        self._paused = False
        self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Handle what has arrived."""
        try:
            for frame in self._reader.feed(data):
                if self._rights is None:
                    self._greet(frame)
                else:
                    self._host.handle(self, frame)
                if self._transport.is_closing():
                    return
            more = self._reader.waiting_bytes - self._unfinished
            self._unfinished += more
            if more and not self._host.unfinished(more):
                raise ProtocolError("this server holds as much of unfinished requests as it takes", remedy="Try later")
        except ProtocolError as exc:
            _log.warning("client %s: %s", self.name, exc)
            self._refuse(exc)
        except DfaissError as exc:
            _log.warning("client %s refused: %s", self.name, exc)
            self._refuse(exc)

    @property
    def admin(self) -> bool:
        """Whether it may do more than ask."""
        return self._rights is not None and self._rights.admin

    def send(self, message: Message, request_id: int, payload: Sequence[Buffer] = ()) -> None:
        """Send a frame, together with others of the same turn of the loop."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += encode(message, request_id, payload)
        self._answers = self._answers or request_id > 0

    def announce(self, offers: Offers) -> None:
        """Tell what can be asked for now, if the client has been welcomed."""
        if self._rights is not None:
            self.send(offers, 0)

    def close(self) -> None:
        """Send what is left, and hang up."""
        self._flush()
        self._transport.close()
        self._watch()

    def abort(self) -> None:
        """Hang up, whatever is left to send."""
        self._transport.abort()

    def recount(self) -> int:
        """Count what waits to be read; return how much more that is than last time, in bytes."""
        before, self._waiting_bytes = self._waiting_bytes, self._transport.get_write_buffer_size()
        return self._waiting_bytes - before

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        answers, self._answers = self._answers, False
        if not unsent or self._transport.is_closing():
            return
        enough = self._host.unsent(self.recount())
        if answers and not enough and (self._paused or self._waiting_bytes > BEHIND_BYTES):
            _log.warning("client %s does not read its answers, and too many wait: left", self.name)
            self._transport.abort()
            return
        data = b"".join(unsent)
        self._written += len(data)
        self._transport.write(data)
        self._host.unsent(self.recount())

    def _watch(self) -> None:
        """Look later whether the client reads."""
        if self._stalled is None:
            self._look(-1)

    def _look(self, read_before: int) -> None:
        """Leave a client that has read nothing since the last look, though it should."""
        self._stalled = None
        left = self._transport.get_write_buffer_size()
        if not left or not (self._paused or self._transport.is_closing()):
            return
        read = self._written - left
        if read == read_before:
            _log.warning("client %s has read nothing for %.0f s: left", self.name, STALLED_SECONDS)
            self._transport.abort()
            return
        self._stalled = self._loop.call_later(STALLED_SECONDS, self._look, read)

    def _greet(self, frame: Frame) -> None:
        hello = decode(frame, Hello)
        if hello.protocol != PROTOCOL:
            raise ProtocolError(
                f"the client speaks protocol version {hello.protocol}, this server {PROTOCOL}",
                remedy="Install the same version of lance-dfaiss on both sides",
            )
        tls: Any = self._transport.get_extra_info("ssl_object")
        rights = self._host.rights_of(hello.token, certificate=tls is not None and bool(tls.getpeercert()))
        if not rights.read:
            raise AccessDenied(
                "wrong token" if hello.token else "this server asks for a token, and none was given",
                remedy="Pass token=... to connect",
            )
        self._patience.cancel()
        self._rights = rights
        limits, offers = self._host.limits, self._host.offers
        self._reader.max_bytes = limits.frame_bytes
        welcome = Welcome(
            protocol=PROTOCOL,
            server=self._host.server_id,
            epoch=offers.epoch,
            limits=limits,
            offers=offers.offers,
            admin=rights.admin,
            draining=offers.draining,
        )
        self.send(welcome, frame.request_id)
        _log.debug("client %s: %r", self.name, hello.client)

    def _refuse(self, error: DfaissError) -> None:
        failure: Failure = failure_of(error)
        self.send(failure, 0)
        self.close()
