"""A real Ray cluster of two nodes on this machine: started once for all tests, only on loopback."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Not 127.0.0.1: Ray would put the machine's outside address in its place.
HEAD, SECOND, THIRD = "127.0.0.2", "127.0.0.3", "127.0.0.4"

_STORE_BYTES = 80 * 1024 * 1024

# A node whose processes are killed is noticed soon; one that only has to wait for a core on a busy machine is not lost.
_HEALTH = {"health_check_period_ms": 500, "health_check_timeout_ms": 5_000, "health_check_failure_threshold": 4}


class RayRig:
    """Two nodes of one and two cores; the second has the resource ``second``."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._folder = tempfile.mkdtemp(prefix="rr-", dir="/tmp")  # short: Ray makes sockets below it
        # Where Ray notes the newest cluster's address: not for others on this machine.
        Path(self._folder, "ray").mkdir()
        self._variables = {
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(ROOT),
            "RAY_worker_niceness": "0",
            "RAY_TMPDIR": self._folder,
        }
        with self.variables(), _quiet():
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={
                    "num_cpus": 1,
                    "include_dashboard": False,
                    "include_log_monitor": False,
                    "node_ip_address": HEAD,
                    "temp_dir": self._folder,
                    "object_store_memory": _STORE_BYTES,
                    "_system_config": dict(_HEALTH),
                },
            )
            self.second = self.add_node(SECOND, num_cpus=2, second=2)

    @contextmanager
    def variables(self) -> Iterator[None]:
        """Set what the processes of Ray are to inherit, and what the one that connects to them needs."""
        before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    @property
    def address(self) -> str:
        """Where the cluster answers."""
        return str(self.cluster.address)

    def add_node(self, host: str, *, num_cpus: int = 1, **resources: float) -> Any:
        """Start a node; return it."""
        with _quiet():
            return self.cluster.add_node(
                num_cpus=num_cpus, node_ip_address=host, object_store_memory=_STORE_BYTES, resources=resources
            )

    def remove(self, node: Any) -> None:
        """Stop a node; it may be dead already, or in part."""
        kill_node(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def join(self) -> None:
        """Connect this process, as a caller would."""
        import ray

        ray.init(self.address, _node_ip_address=HEAD, log_to_driver=False, logging_level=logging.ERROR)

    def leave(self) -> None:
        """Disconnect this process."""
        import ray

        ray.shutdown()

    def close(self) -> None:
        """Stop every process."""
        with self.variables():
            self.cluster.shutdown()  # type: ignore[no-untyped-call]
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lance warns of every fork; what Ray forks becomes another program at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe")
        yield


@contextmanager
def ray_rig() -> Iterator[RayRig]:
    """Give a cluster; nobody is connected to it yet."""
    pytest.importorskip("ray")
    rig = RayRig()
    try:
        yield rig
    finally:
        rig.close()


@contextmanager
def connected(rig: RayRig) -> Iterator[None]:
    """Connect this process to a cluster: until it leaves, whoever asks for no other executor builds there."""
    with rig.variables():
        rig.join()
        try:
            yield
        finally:
            rig.leave()


def kill_node(node: Any, *, orphans: bool = False) -> None:
    """Kill a node's processes; with ``orphans``, its workers live on."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = [] if orphans else children_of(raylet)
    for pid in [raylet, *children]:
        kill(pid)


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
            except OSError:
                continue  # it has just ended
            if int(status.rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


def kill(pid: int) -> None:
    """Kill a process, if there is one."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
