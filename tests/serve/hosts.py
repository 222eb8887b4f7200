"""Other hosts, as far as one machine can have them: network namespaces, with links to cut; and a relay that delays.

Namespaces need root and iproute2 (`lacking` says what is missing).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

__all__ = ["Hosts", "Relay", "lacking"]

_CLONE_NEWNET = 0x40000000
_SUBNET = "10.91.0"


def lacking() -> str:
    """Tell why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    name = f"dfaiss-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    _ip("netns", "del", name)
    return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Hosts:
    """Some hosts on one switch; host 0 is for clients. A context manager, which ends what still runs on them.

    Parameters
    ----------
    count : int
        How many.
    """

    def __init__(self, count: int) -> None:
        self._prefix = f"dfaiss-{os.getpid()}"
        self._switch = f"{self._prefix}-sw"
        self.count = count
        self._undo = ExitStack()

    def __enter__(self) -> Hosts:
        with ExitStack() as undo:
            self._add(undo, self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for host in range(self.count):
                self._plug(undo, host)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def address(self, host: int) -> str:
        """Return the address of a host."""
        return f"{_SUBNET}.{host + 1}"

    def cut(self, host: int) -> None:
        """Cut the link of a host: what is sent is lost, and nobody is told."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def heal(self, host: int) -> None:
        """Mend it."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def run(self, host: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process on a host; what it says goes to a file."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._name(host), *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def pids(self, host: int) -> list[int]:
        """Return the processes on a host."""
        return _pids(self._name(host))

    @contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """Have this thread, and all threads that it starts meanwhile, stand on a host: their sockets are made there."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{self._name(host)}") as there:
            assert libc.setns(there.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(here.fileno(), _CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())

    def _name(self, host: int) -> str:
        return f"{self._prefix}-{host}"

    def _add(self, undo: ExitStack, name: str) -> None:
        _ip("netns", "add", name)
        undo.callback(_ip, "netns", "del", name)
        undo.callback(_end_all, name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _plug(self, undo: ExitStack, host: int) -> None:
        name, port = self._name(host), f"port{host}"
        self._add(undo, name)
        _ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")


def _end_all(name: str) -> None:
    """End every process in a namespace; all of them were started by the test."""
    for pid in _pids(name):
        if pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _pids(name: str) -> list[int]:
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30)
    return [int(pid) for pid in listed.stdout.split()]


class Relay:
    """A process between clients and one port, which can hold up all that passes, in both directions.

    Parameters
    ----------
    host, port
        Where it leads; it listens on a free port of this host, see ``port``.
    """

    def __init__(self, host: str, port: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, host, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def delay(self, seconds: float) -> None:
        """Hold up everything for so long, from now on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        self._process.stdin.flush()
        assert self._process.stdout.readline() == b"done\n"


class _Pipe(asyncio.Protocol):
    """One end of a connection through the relay: what comes in goes out at the other end, later."""

    def __init__(self, relaying: _Relaying) -> None:
        self.relaying = relaying
        self.other: _Pipe | None = None
        self.transport: asyncio.Transport | None = None
        self.queue: deque[tuple[float, bytes]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.other is None:
            asyncio.get_running_loop().create_task(self.relaying.join(self))

    def data_received(self, data: bytes) -> None:
        due = time.monotonic() + self.relaying.seconds
        self.queue.append((due, data))
        asyncio.get_running_loop().call_at(due, self.pass_on)

    def pass_on(self) -> None:
        """Send what is due, in order."""
        if self.other is None or self.other.transport is None:
            return
        while self.queue and self.queue[0][0] <= time.monotonic() + 1e-3:
            self.other.transport.write(self.queue.popleft()[1])

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - why does not matter
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Relaying:
    """What the process of a `Relay` does."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.seconds = 0.0

    async def join(self, near: _Pipe) -> None:
        """Connect onwards."""
        far = _Pipe(self)
        far.other = near
        assert near.transport is not None
        try:
            await asyncio.get_running_loop().create_connection(lambda: far, self._host, self._port)
        except OSError:
            near.transport.close()
            return
        near.other = far
        near.pass_on()

    async def run(self) -> None:
        """Relay until stdin is closed."""
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(lambda: _Pipe(self), "127.0.0.1", 0)
        sys.stdout.write(f"{listener.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            self.seconds = float(line)
            sys.stdout.write("done\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_Relaying(sys.argv[1], int(sys.argv[2])).run())
