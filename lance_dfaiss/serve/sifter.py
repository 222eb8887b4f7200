"""Filters from strangers, evaluated in processes that may be killed.

There are two such processes. The second one is started when a filter comes while the first is busy, so that a slow
filter does not hold up the others; each evaluates one filter at a time, so that it is known which one cost too much.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from ..errors import DfaissError, FilterTooCostly, Overloaded, ServerFailed, SnapshotGone
from ..lance_io import DatasetPlace, PinnedDataset
from ..types import UInt64Array
from . import wire
from .sift_child import LENGTH, Close, Failed, Matched, Open, Opened, Ping, Reply, Request, Sift, pack

__all__ = ["Sifter"]

_log = logging.getLogger(__name__)

_PROCESSES = 2

# Loading the libraries takes half a second, on a machine that is busy a multiple.
_START_SECONDS = 120.0

# Columns that are to be held are read from storage then.
_OPEN_SECONDS = 600.0

# Longest header of an answer: the names of all columns may be in one.
_MAX_HEADER_BYTES = 4 * 1024 * 1024

# Longest line of the process's stderr that goes to the log.
_MAX_LINE_CHARS = 500

# Threads that evaluate a filter: the others are for searches.
_THREADS = "4"

# Twice as much as a thread has by default, four times what the longest filters need that `sql` lets through.
_STACK_BYTES = str(4 * 1024 * 1024)

# The process must find what this one finds, and nothing in the folder it happens to stand in.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[4:]; from lance_dfaiss.serve.sift_child import main;"
    " main(*map(int, sys.argv[1:4]))"
)

_Reply = TypeVar("_Reply", Opened, Matched)


class _Died(Exception):
    """The process ended, or was ended, before it answered."""


class _Process:
    """One process; for one thread at a time, but for `kill`."""

    def __init__(self, memory_limit_bytes: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            arguments = [theirs.fileno(), os.getpid(), memory_limit_bytes]
            try:
                self._popen = subprocess.Popen(
                    [sys.executable, "-c", _BOOT, *map(str, arguments), *sys.path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                )
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        self._replies = msgspec.msgpack.Decoder(Reply)
        self._said: deque[str] = deque(maxlen=8)
        self._listener = threading.Thread(target=self._listen, name="lance-dfaiss-sifter-log", daemon=True)
        self._listener.start()
        self.ready = False
        self.opened: dict[int, int] = {}
        """Most rows that can match, by number."""

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def ask(self, request: Request, expected: type[_Reply], seconds: float) -> _Reply:
        """Send a request and return the header of its answer.

        Raises
        ------
        TimeoutError
            If it takes too long; the process is of no use any more.
        _Died
            If the process ended.
        DfaissError
            That it answered.
        """
        until = time.monotonic() + seconds
        self.tell(request, seconds)
        prefix = self._read(LENGTH.size, until)
        (length,) = LENGTH.unpack(prefix)
        if length > _MAX_HEADER_BYTES:
            raise _Died(f"it announced a header of {length} bytes")
        try:
            reply = self._replies.decode(self._read(length, until))
        except msgspec.MsgspecError as exc:
            raise _Died(f"it answered what is no reply: {exc}") from exc
        if isinstance(reply, Failed):
            raise wire.error_of(reply.failure)
        if not isinstance(reply, expected):
            raise _Died(f"it answered {type(reply).__name__} to {type(request).__name__}")
        return reply

    def tell(self, request: Request, seconds: float) -> None:
        """Send a request."""
        try:
            self._socket.settimeout(max(seconds, 0.001))
            self._socket.sendall(pack(request))
        except TimeoutError:
            raise
        except OSError as exc:
            raise _Died(self._reason()) from exc

    def addresses(self, rows: int, until: float) -> UInt64Array:
        """Read the addresses that follow a header."""
        found = np.empty(rows, dtype="<u8")
        if rows:
            self._read_into(found.data.cast("B"), until)
        return cast("UInt64Array", found)

    def kill(self) -> None:
        """End the process, and wait until it has."""
        self._popen.kill()
        self._popen.wait()

    def dispose(self) -> None:
        """End the process and let everything go."""
        self.kill()
        self._socket.close()
        self._listener.join()

    def _read(self, count: int, until: float) -> bytearray:
        data = bytearray(count)
        self._read_into(memoryview(data), until)
        return data

    def _read_into(self, view: memoryview, until: float) -> None:
        at = 0
        while at < len(view):
            try:
                self._socket.settimeout(max(until - time.monotonic(), 0.001))
                count = self._socket.recv_into(view[at:])
            except TimeoutError:
                raise
            except OSError as exc:
                raise _Died(self._reason()) from exc
            if count == 0:
                raise _Died(self._reason())
            at += count

    def _reason(self) -> str:
        """Say why the process ended."""
        self._popen.kill()  # it may still be at it
        code = self._popen.wait()
        self._listener.join()
        for line in self._said:
            if "memory allocation of" in line:
                return "it needed more memory than one may have"
            if "overflowed its stack" in line:
                return "it is nested too deeply"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _listen(self) -> None:
        """Write what the process says to the log: line by line, and in printable characters."""
        stream = cast("Any", self._popen.stderr)
        with stream:
            while line := stream.readline(_MAX_LINE_CHARS):
                text = line.decode("utf-8", "backslashreplace").rstrip()
                if text:
                    self._said.append(text)
                    _log.warning("filter process %d: %s", self.pid, "".join(map(_printable, text)))


def _printable(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "RUST_MIN_STACK": _STACK_BYTES,
        "RUST_BACKTRACE": "0",
        "LANCE_CPU_THREADS": _THREADS,
        "TOKIO_WORKER_THREADS": _THREADS,
        # Its own pool would reserve a gigabyte that counts as taken and is not.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        # Likewise: a block of some size goes back to the kernel when it is freed, and counts no longer.
        "MALLOC_MMAP_THRESHOLD_": str(256 * 1024),
    }


class _Worker:
    """A process, and the one after it; for one thread at a time, but for `stop`."""

    def __init__(self, memory_limit_bytes: int) -> None:
        self._memory_limit_bytes = memory_limit_bytes
        self._process: _Process | None = None
        self._lock = threading.Lock()  # around changes of the process
        self._stopped = False
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def process(self) -> _Process:
        """Return the process, ready; another one if it is gone."""
        process = self._process
        try:
            if process is None or not process.alive:
                process = self._another()
            if not process.ready:
                process.ask(Ping(), Opened, _START_SECONDS)
                process.ready = True
        except (_Died, OSError) as exc:
            if process is not None:
                process.kill()
            raise ServerFailed(
                f"the process that evaluates filters does not start: {exc}",
                remedy="See the log of the server",
                server=-1,
            ) from exc
        return process

    def replace(self) -> None:
        """End the process and start another, which loads while nobody waits for it."""
        try:
            self._another()
        except (_Died, OSError) as exc:  # the next filter tries again, and says so
            _log.warning("cannot start a process that evaluates filters: %s", exc)

    def stop(self) -> None:
        """End the process for good, from any thread; whoever waits for it gets `_Died`."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.kill()

    def dispose(self) -> None:
        """Let everything go; after `stop`, when nobody uses it any more."""
        if self._process is not None:
            self._process.dispose()
            self._process = None

    def _another(self) -> _Process:
        with self._lock:
            if self._process is not None:
                self._process.dispose()
                self._process = None
                self.restarts += not self._stopped
            if self._stopped:
                raise _Died("the server closes")
            self._process = _Process(self._memory_limit_bytes)
            return self._process


class Sifter:
    """Evaluates filters over dataset versions in processes of their own, for many threads.

    Parameters
    ----------
    memory_limit_bytes : int
        What evaluating one filter may allocate, beside what a process holds anyway. Stacks and buffers take 100 MB of
        it; scanning texts of 1 KB takes 370 MB.
    timeout_seconds : float
        Longest time that evaluating one filter may take, from when it is begun.
    """

    def __init__(self, *, memory_limit_bytes: int, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._memory_limit_bytes = memory_limit_bytes
        self._workers = [_Worker(memory_limit_bytes) for _ in range(_PROCESSES)]
        self._changed = threading.Condition()
        self._idle = list(range(_PROCESSES))
        self._waiting = 0
        self._numbers = itertools.count()
        self._open: dict[str, Open] = {}
        self._closed = False

    def start(self) -> None:
        """Start the first process, and wait until it has loaded its libraries.

        Raises
        ------
        ServerFailed
            If it does not start.
        """
        at = self._take(_START_SECONDS)
        try:
            self._workers[at].process()
        finally:
            self._give(at)

    @property
    def restarts(self) -> int:
        """Processes that were started in place of another one."""
        return sum(worker.restarts for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that were started last."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def open(
        self,
        key: str,
        pinned: PinnedDataset,
        fragment_ids: Sequence[int] | None,
        columns: Sequence[str] = (),
    ) -> None:
        """Register what filters with a key are evaluated on. A process opens it when it first needs it.

        Parameters
        ----------
        key : str
            Replaces what was registered under it.
        pinned : PinnedDataset
            The version.
        fragment_ids : sequence of int or None
            Where to look; None for everywhere.
        columns : sequence of str
            Columns to keep in the RAM of each process.
        """
        chosen = None if fragment_ids is None else tuple(map(int, fragment_ids))
        with self._changed:
            self._open[key] = Open(next(self._numbers), DatasetPlace.of(pinned), chosen, tuple(columns))
        self._tidy_idle()

    def close_key(self, key: str) -> None:
        """Forget a key; one that is not known does not matter."""
        with self._changed:
            self._open.pop(key, None)
        self._tidy_idle()

    def matching(self, key: str, sql: str) -> UInt64Array:
        """Return the addresses of the live rows that a filter matches, uint64 ``(n,)``, in storage order.

        Parameters
        ----------
        key : str
            What to evaluate it on.
        sql : str
            The filter; see `sql.check_filter` about what to refuse at once.

        Raises
        ------
        FilterTooCostly
            If it took more time or memory than it may, or ended the process.
        InvalidFilter
            With Lance's message, if it cannot be parsed or computed.
        UnknownColumn
            If it names a column that does not exist.
        StorageError
            If the dataset cannot be read.
        SnapshotGone
            If nothing is registered under the key.
        Overloaded
            If all processes were busy with other filters for as long as this one may take.
        """
        seconds = self._timeout_seconds
        at = self._take(seconds)
        worker = self._workers[at]
        try:
            return self._sift(worker, self._registered(key), sql, seconds)
        except _Died as exc:
            self._registered(key)  # gone, if the server closes
            worker.replace()
            raise self._too_costly(sql, f"ended the process that evaluates it: {exc}") from exc
        except TimeoutError as exc:
            if isinstance(exc, DfaissError):
                raise
            worker.replace()
            raise self._too_costly(sql, f"took more than {seconds:g} seconds") from exc
        except DfaissError:
            raise
        except BaseException as exc:
            worker.replace()  # the rest of its answer would be taken for the next one
            if isinstance(exc, MemoryError):
                raise self._too_costly(sql, "matches more rows than there is memory for") from exc
            raise
        finally:
            self._give(at)

    def close(self) -> None:
        """End the processes; afterwards nothing is registered."""
        with self._changed:
            self._open.clear()
            self._closed = True
        for worker in self._workers:
            worker.stop()
        with self._changed:
            self._changed.wait_for(lambda: len(self._idle) == len(self._workers))
        for worker in self._workers:
            worker.dispose()

    def _sift(self, worker: _Worker, wanted: Open, sql: str, seconds: float) -> UInt64Array:
        process = worker.process()
        self._tidy(process)
        if wanted.number not in process.opened:
            process.opened[wanted.number] = self._opened(process, wanted)
        until = time.monotonic() + seconds
        matched = process.ask(Sift(wanted.number, sql), Matched, seconds)
        if not 0 <= matched.rows <= process.opened[wanted.number]:
            raise _Died(f"it announced {matched.rows} rows")
        return process.addresses(matched.rows, until)

    def _opened(self, process: _Process, wanted: Open) -> int:
        """Open what is registered, which no filter is to blame for."""
        try:
            return process.ask(wanted, Opened, _OPEN_SECONDS).rows
        except (_Died, TimeoutError) as exc:
            if isinstance(exc, DfaissError):
                raise
            process.kill()
            raise ServerFailed(
                f"the process that evaluates filters could not open {wanted.place.uri}: {exc}",
                remedy="See the log of the server; columns that it is to hold may not fit into memory",
                server=-1,
            ) from exc

    def _too_costly(self, sql: str, why: str) -> FilterTooCostly:
        shown = sql if len(sql) <= 200 else sql[:200] + "..."
        return FilterTooCostly(
            f"evaluating the filter {shown!r} {why}",
            remedy=f"Simplify it; one may take {self._timeout_seconds:g} s and {self._memory_limit_bytes:,} bytes",
            parameter="filter",
            value=shown,
        )

    def _registered(self, key: str) -> Open:
        with self._changed:
            found = self._open.get(key)
        if found is None:
            raise SnapshotGone(f"no dataset is registered as {key!r} for filters", remedy="Search again", snapshot=key)
        return found

    def _take(self, seconds: float) -> int:
        """Wait for an idle process, and return which: the first, if it is."""
        with self._changed:
            self._waiting += 1
            try:
                if not self._changed.wait_for(lambda: self._idle, seconds):
                    raise Overloaded(
                        f"both processes that evaluate filters are busy with slow ones; {self._waiting} wait",
                        remedy="Try again later",
                        waiting=self._waiting,
                        retry_after_seconds=seconds,
                    )
            finally:
                self._waiting -= 1
            at = min(self._idle)
            self._idle.remove(at)
            return at

    def _give(self, at: int) -> None:
        with self._changed:
            self._idle.append(at)
            self._changed.notify_all()

    def _tidy_idle(self) -> None:
        """Let idle processes forget what is not registered any more; busy ones do before their next filter."""
        with self._changed:
            idle, self._idle = self._idle, []
        try:
            for at in idle:
                process = self._workers[at]._process
                if process is not None and process.alive:
                    self._tidy(process)
        except (_Died, TimeoutError) as exc:
            _log.warning("a process that evaluates filters is gone: %s", exc)
        finally:
            with self._changed:
                self._idle += idle
                self._changed.notify_all()

    def _tidy(self, process: _Process) -> None:
        with self._changed:
            wanted = {opened.number for opened in self._open.values()}
        for number in [number for number in process.opened if number not in wanted]:
            process.tell(Close(number), self._timeout_seconds)
            del process.opened[number]
