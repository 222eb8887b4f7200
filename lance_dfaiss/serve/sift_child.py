"""The process that evaluates filters for a server: what it may take is limited, and it may die.

It talks with the server over one socket: each frame is a length (4 bytes), a header in msgpack, and, for the rows that
match, their addresses as raw uint64. No pickle. `sifter` is the other end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np

from ..errors import DfaissError, FilterTooCostly, StorageError
from ..lance_io import ColumnsInMemory, DatasetPlace, PinnedDataset, PlaceOpener
from ..types import UInt64Array
from . import wire

__all__ = ["Close", "Failed", "Matched", "Open", "Opened", "Ping", "Reply", "Request", "Sift", "main", "pack"]

LENGTH = struct.Struct("<I")
"""Before each header: its length."""

# Lance says at length what it could not parse.
_MAX_MESSAGE_CHARS = 4_000

# Share of the memory for a filter that Lance may fill with its caches.
_CACHE_SHARE = 4

_LOOK_SECONDS = 1.0


class Ping(msgspec.Struct, tag="ping"):
    """Answered by `Opened` as soon as the process has loaded its libraries."""


class Open(msgspec.Struct, tag="open"):
    """Open a dataset version under a number. Answer: `Opened`."""

    number: int
    place: DatasetPlace
    fragment_ids: tuple[int, ...] | None
    columns: tuple[str, ...]


class Close(msgspec.Struct, tag="close"):
    """Forget a number. No answer."""

    number: int


class Sift(msgspec.Struct, tag="sift"):
    """Evaluate a filter. Answer: `Matched`."""

    number: int
    sql: str


class Opened(msgspec.Struct, tag="opened"):
    """``rows`` is the most that can match."""

    rows: int


class Matched(msgspec.Struct, tag="matched"):
    """So many addresses follow, as uint64 (little-endian)."""

    rows: int


class Failed(msgspec.Struct, tag="failed"):
    """What was asked could not be done; the process goes on."""

    failure: wire.Failure


Request: TypeAlias = Ping | Open | Close | Sift
Reply: TypeAlias = Opened | Matched | Failed


def pack(message: Request | Reply) -> bytes:
    """Return a message as a frame."""
    header = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(header)) + header


class _Held(NamedTuple):
    """What filters of one number are evaluated on."""

    request: Open
    pinned: PinnedDataset
    columns: ColumnsInMemory | None
    deleted: UInt64Array

    def matching(self, sql: str) -> UInt64Array:
        found = None if self.columns is None else self.columns.matching(sql)
        if found is None:
            return self.pinned.matching(sql, self.request.fragment_ids)
        return found[~np.isin(found, self.deleted)] if len(self.deleted) else found


class _Child:
    """Answers one request after the other, until the server is gone."""

    def __init__(self, sock: socket.socket, memory_limit_bytes: int) -> None:
        self._stream = sock.makefile("rwb")
        self._limit = memory_limit_bytes
        self._opener = PlaceOpener(memory_limit_bytes // _CACHE_SHARE)
        self._held: dict[int, _Held] = {}
        self._requests = msgspec.msgpack.Decoder(Request)

    def run(self) -> None:
        _limit_memory(self._limit)
        while True:
            prefix = self._stream.read(LENGTH.size)
            if len(prefix) < LENGTH.size:
                return
            request = self._requests.decode(self._stream.read(*LENGTH.unpack(prefix)))
            if isinstance(request, Close):
                self._held.pop(request.number, None)
                continue
            try:
                reply, payload = self._answer(request)
            except DfaissError as exc:
                reply, payload = Failed(_brief(wire.failure_of(exc))), None
            self._stream.write(pack(reply))
            if payload is not None:
                self._stream.write(payload)
            self._stream.flush()

    def _answer(self, request: Ping | Open | Sift) -> tuple[Reply, memoryview | None]:
        if isinstance(request, Ping):
            return Opened(0), None
        if isinstance(request, Open):
            _limit_memory(None)
            try:
                held = self._held[request.number] = self._open(request)
            finally:
                _limit_memory(self._limit)
            chosen = request.fragment_ids
            fragments = held.pinned.lance.get_fragments() if chosen is None else held.pinned.fragments_of(chosen)
            return Opened(sum(fragment.metadata.physical_rows for fragment in fragments)), None
        try:
            found = np.ascontiguousarray(self._held[request.number].matching(request.sql), dtype="<u8")
        except MemoryError as exc:
            raise FilterTooCostly(f"a filter needs too much memory: {exc}", parameter="filter") from exc
        return Matched(len(found)), found.data.cast("B") if len(found) else None

    def _open(self, request: Open) -> _Held:
        pinned = self._opener.open(request.place)
        columns = None
        if request.columns:
            columns = self._same_columns(request, pinned)
            if columns is None:
                columns = ColumnsInMemory(pinned, request.columns, request.fragment_ids)
        chosen = request.fragment_ids
        deleted = np.zeros(0, dtype=np.uint64) if columns is None else pinned.deleted_addresses(chosen)
        return _Held(request, pinned, columns, deleted)

    def _same_columns(self, request: Open, pinned: PinnedDataset) -> ColumnsInMemory | None:
        """Return columns that are here already for another version of the same values."""
        for held in self._held.values():
            same = (held.request.place.uri, held.request.place.branch, held.request.fragment_ids, held.request.columns)
            wanted = (request.place.uri, request.place.branch, request.fragment_ids, request.columns)
            if held.columns is not None and same == wanted and held.columns.serves(pinned):
                return held.columns
        return None


def _brief(failure: wire.Failure) -> wire.Failure:
    """Return a failure without the whole of a long filter."""
    facts = {k: v[:_MAX_MESSAGE_CHARS] if isinstance(v, str) else v for k, v in failure.facts.items()}
    message = failure.message
    if len(message) > _MAX_MESSAGE_CHARS:
        half = _MAX_MESSAGE_CHARS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    return wire.Failure(error=failure.error, message=message, remedy=failure.remedy[:_MAX_MESSAGE_CHARS], facts=facts)


def _limit_memory(more_bytes: int | None) -> None:
    """Let this process allocate so much more than now, or whatever it likes.

    What counts is written-to private memory (RLIMIT_DATA); files that are mapped do not. An allocation beyond that
    fails at once, which ends the process where Lance's is.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = hard
    if more_bytes is not None:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        now = re.search(r"^VmData:\s+(\d+) kB$", status, re.MULTILINE)
        if now is None:
            raise StorageError("/proc/self/status does not tell VmData", location="/proc/self/status")
        soft = int(now[1]) * 1024 + more_bytes
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _end_with(parent: int, fd: int) -> None:
    """End this process when the server does: its end of the socket closes, or the kernel finds another parent."""
    poll = select.poll()
    poll.register(fd, 0)  # only that the other end is gone
    while not poll.poll(_LOOK_SECONDS * 1000) and os.getppid() == parent:
        pass
    os._exit(0)


def main(fd: int, parent: int, memory_limit_bytes: int) -> None:
    """Serve the process at the other end of a socket.

    Parameters
    ----------
    fd : int
        The socket.
    parent : int
        Id of the server's process.
    memory_limit_bytes : int
        What evaluating a filter may allocate.
    """
    threading.Thread(target=_end_with, args=(parent, fd), name="lance-dfaiss-parent", daemon=True).start()
    # These come to a whole group of processes; the server needs filters until it has answered everything.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    # Where the whole machine runs out of memory, this process goes before the server. Sandboxes may forbid it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=fd) as sock:
        _Child(sock, memory_limit_bytes).run()
