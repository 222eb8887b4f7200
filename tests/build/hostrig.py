"""A Ray cluster over hosts whose links can be cut: a head on host 0, where builds are started, workers on the others.

The hosts share this machine's disk, as hosts share a file system. Run as a script this file is the process that builds.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lance_dfaiss
from lance_dfaiss.progress import ProgressEvent
from tests.build.rayrig import kill
from tests.serve.hosts import Hosts
from tests.waiting import SECONDS, until

_log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]

# Outside the ports that Ray gives to workers.
_PORT = 6_379

_STARTS = 3

_STORE_BYTES = 80 * 1024 * 1024

KEEPALIVE = {
    "RAY_grpc_client_keepalive_time_ms": "3000",
    "RAY_grpc_client_keepalive_timeout_ms": "3000",
}
"""Without it Ray itself does not notice a cut link for minutes."""


class RayHosts:
    """A cluster with a token; a context manager, which stops all that runs on the hosts.

    Parameters
    ----------
    count : int
        Hosts, the head's included; it runs no task. The others have one core each.
    logs : pathlib.Path
        Where their processes log.
    environment : mapping
        Variables of all processes, beside those that they need.
    head_options : sequence of str
        Further words for ``ray start`` on the head.
    """

    def __init__(
        self,
        count: int,
        logs: Path,
        environment: Mapping[str, str] = KEEPALIVE,
        *,
        head_options: Sequence[str] = (),
    ) -> None:
        self.hosts = Hosts(count)
        self._logs = logs
        self._head_options = head_options
        self._folder = tempfile.mkdtemp(prefix="rh-", dir="/tmp")  # short: Ray makes sockets below it
        self._variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RayHosts:
        self.hosts.__enter__()
        try:
            head = ("--head", f"--port={_PORT}", "--num-cpus=0", "--include-dashboard=false")
            self._start(0, *head, f"--temp-dir={self._folder}", *self._head_options)
            for host in range(1, self.hosts.count):
                self._start(host, f"--address={self.address}", "--num-cpus=1")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.hosts.__exit__(None, None, None)
        for process in self._started:
            process.wait(SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def address(self) -> str:
        """Where the cluster answers."""
        return f"{self.hosts.address(0)}:{_PORT}"

    def _start(self, host: int, *options: str) -> None:
        """Start a node of the cluster on a host, and wait for it."""
        log = self._logs / f"host-{host}.log"
        command = [
            *("-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
            f"--node-ip-address={self.hosts.address(host)}",
            f"--object-store-memory={_STORE_BYTES}",
        ]
        # Ray gives a node 30 seconds, which a busy machine may need more than once.
        for _ in range(_STARTS):
            process = self.run(host, *command, *options, log=log)
            until(partial(_up_or_ended, process, log))
            if process.poll() is None:
                return
            for pid in self.pids(host):
                kill(pid)
        raise AssertionError(log.read_text())

    def build(self, dataset: Path, log: Path, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process on host 0 that builds an index of a dataset; see `main`."""
        given = {"ray_address": self.address, "executor": "ray", **options}
        return self.run(0, "-m", "tests.build.hostrig", str(dataset), json.dumps(given), log=log)

    def pids(self, host: int) -> list[int]:
        """Return the processes on a host."""
        return self.hosts.pids(host)

    def encodes(self, host: int) -> bool:
        """Tell whether a worker on a host has a task: Ray puts it in the title of the process."""
        return any(title(pid).startswith(b"ray::dfaiss_task") for pid in self.pids(host))

    def run(self, host: int, *words: str, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start Python on a host, with the variables of the cluster, or others."""
        given = [f"{name}={value}" for name, value in {**self._variables, **variables}.items()]
        process = self.hosts.run(host, ["env", *given, sys.executable, *words], log)
        self._started.append(process)
        return process


def _up_or_ended(process: subprocess.Popen[bytes], log: Path) -> bool:
    return process.poll() is not None or b"Ray runtime started" in log.read_bytes()


def title(pid: int) -> bytes:
    """Return how a process calls itself; nothing if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class _Told:
    """A listener that logs."""

    def update(self, event: ProgressEvent) -> None:
        _log.debug("%s: %d rows", event.phase, event.done_rows)

    def finish(self, phase: str) -> None:
        _log.debug("%s: done", phase)


def main(dataset: str, options: str) -> None:
    """Build an index of the column ``vec``; steps are logged to stderr."""
    warnings.filterwarnings("ignore", "lance is not fork-safe")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    _log.setLevel(logging.DEBUG)
    logging.getLogger("lance_dfaiss").setLevel(logging.DEBUG)
    lance_dfaiss.create_index(dataset, "vec", progress=_Told(), **json.loads(options))


if __name__ == "__main__":
    main(*sys.argv[1:])
