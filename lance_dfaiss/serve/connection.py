"""One connection of a client: requests out, answers in, many at a time."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Protocol, cast

from ..errors import AccessDenied, DfaissError, InvalidArgument, ProtocolError, Unavailable
from .wire import (
    ANSWERS,
    MAX_FRAME_BYTES,
    PREFIX_BYTES,
    Buffer,
    Cancel,
    Failure,
    Frame,
    FrameReader,
    Hello,
    Message,
    Offers,
    Welcome,
    decode,
    encode,
    error_of,
)

__all__ = ["MAX_ANSWER_BYTES", "Connection", "Listener", "Waiting", "connection_error"]

MAX_ANSWER_BYTES = 1024**3
"""The longest answer that is read: columns of many rows. A server that was let in is trusted that far."""


class Waiting(Protocol):
    """Who waits for the answer to a request: `answered` or `failed` is called once, unless it is cancelled."""

    def answered(self, frame: Frame) -> None:
        """Take the answer; `ProtocolError` if it makes no sense."""

    def failed(self, error: DfaissError) -> None:
        """Learn that there is none."""

    def doubted(self) -> None:
        """Learn that the server has been silent for long, and may never answer. Not the end of waiting."""


class Listener(Protocol):
    """Who is told what happens on a connection."""

    def welcomed(self, connection: Connection, welcome: Welcome) -> None:
        """Begin to ask."""

    def offered(self, offers: Offers) -> None:
        """Take note of what can be asked for now."""

    def heard(self) -> None:
        """Take back what the silence made one think."""

    def lost(self, connection: Connection, error: DfaissError) -> None:
        """Stop asking; those who wait are told next."""

    def unsent(self, connection: Connection) -> None:
        """Have `flush` called before this turn of the loop ends."""


class Connection(asyncio.Protocol):
    """A client's end of a connection.

    Parameters
    ----------
    name : str
        Of the server, for messages.
    hello : Hello
        Sent as soon as there is a connection, which under TLS is after the certificate was checked.
    listener : Listener
        Told of what happens.

    Attributes
    ----------
    pending : dict of int to Waiting
        Who waits for what.
    heard_at : float
        When something arrived, or was first asked after a time without requests; monotonic seconds.
    received_at : float
        When something arrived; monotonic seconds.
    silent : bool
        It was noted as silent; the next byte is told to the listener.
    open : bool
        The server has welcomed this client, and the connection stands.
    """

    def __init__(self, name: str, hello: Hello, listener: Listener) -> None:
        self.name = name
        self.pending: dict[int, Waiting] = {}
        self.heard_at = self.received_at = time.monotonic()
        self.silent = False
        self.open = False
        self.max_pending = 1
        self._max_bytes = MAX_FRAME_BYTES
        self._hello = hello
        self._listener = listener
        self._reader = FrameReader(MAX_ANSWER_BYTES, ANSWERS)
        self._transport: asyncio.Transport | None = None
        self._unsent: list[Buffer] = []
        self._last_id = 0
        self._ended: DfaissError | None = None
        self._welcomed = False

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say who we are."""
        self._transport = cast("asyncio.Transport", transport)
        if self._ended is not None:
            self._transport.abort()  # given up while the connection was being made
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._transport.write(b"".join(encode(self._hello)))

    def data_received(self, data: bytes) -> None:
        """Hand out what has arrived."""
        self.heard_at = self.received_at = time.monotonic()
        if self.silent:
            self.silent = False
            self._listener.heard()
        try:
            for frame in self._reader.feed(data):
                self._take(frame)
                if self._ended is not None:
                    return
        except ProtocolError as exc:
            self.close(exc)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        error = connection_error(self.name, exc)
        if not self._welcomed and isinstance(error, Unavailable):
            # TLS tells a client of a refusal as of any other end: when it has long been connected.
            hint = "before a welcome; see whether it has TLS, and asks for a certificate of the client"
            error = Unavailable(f"{error.message} {hint}", groups=(), shards=(), coverage=0.0)
        self._end(error)

    # What the client calls.

    async def dial(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Connect to the server.

        Parameters
        ----------
        host : str
            Name or address; the certificate must be for it.
        port : int
        tls : ssl.SSLContext or None
            None for no TLS.

        Raises
        ------
        AccessDenied
            If the token would travel unencrypted to another machine.
        OSError
            If there is no connection; see `connection_error`.
        """
        if self._hello.token and tls is None and not _is_loopback(host):
            raise AccessDenied(
                f"the token would travel unencrypted to {self.name}",
                remedy="Give the servers a certificate, and pass tls= or --tls-ca",
            )
        await asyncio.get_running_loop().create_connection(
            lambda: self, host, port, ssl=tls, server_hostname=None if tls is None else host
        )

    @property
    def full(self) -> bool:
        """Whether as many requests wait as the server takes."""
        return len(self.pending) >= self.max_pending

    def send(self, message: Message, payload: Sequence[Buffer], waiting: Waiting) -> int:
        """Ask, and return the id of the request.

        Parameters
        ----------
        message : Message
            What.
        payload : sequence of bytes-like
            What follows it.
        waiting : Waiting
            Who is told the answer.

        Raises
        ------
        InvalidArgument
            If it cannot be written down, or is longer than what the server reads: it would hang up on everybody who
            waits here. Nothing was sent.
        """
        try:
            parts = encode(message, self._last_id + 1, payload)
        except (ValueError, TypeError, OverflowError) as exc:  # half a character, a number of more than 64 bits
            if isinstance(exc, InvalidArgument):
                raise
            raise InvalidArgument(f"a {type(message).__name__} that cannot be sent: {exc}") from exc
        length = sum(map(len, parts)) - PREFIX_BYTES
        if length > self._max_bytes:
            raise InvalidArgument(
                f"a {type(message).__name__} of {length:,} bytes; {self.name} reads at most {self._max_bytes:,}",
                remedy="Ask for less at once",
            )
        self._last_id += 1
        if not self.pending:
            self.heard_at = time.monotonic()  # silence begins with the question
        self.pending[self._last_id] = waiting
        self._write(parts)
        return self._last_id

    def cancel(self, request_id: int) -> None:
        """Wait for an answer no longer."""
        if self.pending.pop(request_id, None) is not None and self._ended is None:
            self._write(encode(Cancel(), request_id))

    def flush(self) -> None:
        """Write what was sent in this turn of the loop, in one piece."""
        unsent, self._unsent = self._unsent, []
        if unsent and self._ended is None and self._transport is not None:
            self._transport.write(b"".join(unsent))

    def close(self, error: DfaissError) -> None:
        """End the connection, with what to tell those who wait; what is unsent stays so."""
        self._end(error)

    def _write(self, parts: list[Buffer]) -> None:
        if not self._unsent:
            self._listener.unsent(self)
        self._unsent += parts

    def _take(self, frame: Frame) -> None:
        kind = frame.kind
        if frame.request_id:
            waiting = self.pending.pop(frame.request_id, None)
            if waiting is None:
                return  # cancelled
            try:
                if kind != Failure.KIND:
                    waiting.answered(frame)
                    return
                error = error_of(decode(frame))
            except ProtocolError as exc:
                waiting.failed(exc)
                raise
            waiting.failed(error)
        elif kind == Failure.KIND:
            self.close(error_of(decode(frame)))
        elif not self.open:
            welcome: Welcome = decode(frame, Welcome)
            if welcome.protocol != self._hello.protocol:
                raise ProtocolError(
                    f"{self.name} speaks protocol version {welcome.protocol}, this client {self._hello.protocol}",
                    remedy="Install the same version of lance-dfaiss on both sides",
                )
            self.open = self._welcomed = True
            self.max_pending = welcome.limits.pending
            self._max_bytes = welcome.limits.frame_bytes
            self._listener.welcomed(self, welcome)
        else:
            self._listener.offered(decode(frame, Offers))

    def _end(self, error: DfaissError) -> None:
        if self._ended is not None:
            return
        self._ended, self.open = error, False
        if self._transport is not None:
            # Not `close`, which waits until all is written: to a server that hangs that is never.
            self._transport.abort()
        pending, self.pending = self.pending, {}
        self._listener.lost(self, error)
        for waiting in pending.values():
            waiting.failed(error)


def connection_error(name: str, exc: BaseException | None) -> DfaissError:
    """Return the error of this package for one of a connection.

    Parameters
    ----------
    name : str
        Of the server.
    exc : BaseException or None
        What happened; None if the server hung up.
    """
    if isinstance(exc, DfaissError):
        return exc
    found: DfaissError
    if isinstance(exc, ssl.SSLCertVerificationError):
        found = AccessDenied(
            f"the certificate of {name} is not trusted: {exc.verify_message}",
            remedy="Pass the CA that signed it as tls=, and name servers in the cluster file as the certificate does",
        )
    elif isinstance(exc, ssl.SSLError) and "alert" in str(exc).lower():
        found = AccessDenied(
            f"{name} refused the TLS connection: {exc.reason}",
            remedy="For mutual TLS pass an ssl.SSLContext with a client certificate that the server trusts as tls=",
        )
    elif isinstance(exc, ssl.SSLError):
        found = ProtocolError(f"no TLS with {name}: {exc.reason}", remedy="See whether the server has TLS")
    elif isinstance(exc, (TimeoutError, asyncio.TimeoutError)):
        found = Unavailable(f"{name} did not answer in time", groups=(), shards=(), coverage=0.0)
    else:
        what = "it hung up" if exc is None else str(exc) or type(exc).__name__
        found = Unavailable(f"no connection to {name}: {what}", groups=(), shards=(), coverage=0.0)
    found.__cause__ = exc
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
