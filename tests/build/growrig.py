"""A real Ray cluster that grows and shrinks by itself, on a host of its own: Ray's autoscaler decides when.

The nodes that it starts are processes on that host, of one core each, at loopback addresses of their own. (The class
that Ray has for this, `ray.cluster_utils.AutoscalingCluster`, stops every other Ray cluster of the machine first.)

Run as a script this file is a process that uses the cluster.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE

import lance_dfaiss
from lance_dfaiss.build import ray_parts
from lance_dfaiss.build.ray_parts import RayParts
from lance_dfaiss.build.ray_runner import RayRunner
from lance_dfaiss.progress import ProgressEvent
from tests.build.gate import IMPL, Gate
from tests.build.hostrig import KEEPALIVE, RayHosts
from tests.build.scripted import Numbers
from tests.waiting import until

_log = logging.getLogger(__name__)

_HEAD = "head"
_NODE = "node"

# Of a node that is set up over SSH; here there is nothing to say, but they have to be there.
_WHOSE = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")

_STORE_BYTES = 80 * 1024 * 1024

# Longer than any test runs.
_HELD_SECONDS = 600.0


class LoopbackNodes(NodeProvider):
    """What the autoscaler orders nodes from; it runs in a process of the head.

    Parameters
    ----------
    provider_config : dict
        ``gcs_address``; ``folder``, where each node that was started leaves a file with its address, named by number.
        While that of a number with ``-held`` exists, the node is held back.
    cluster_name : str
        Of no use here.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])
        self._lock = threading.Lock()
        self._count = 0
        self._nodes: dict[str, Any] = {}
        self._tags = {_HEAD: {TAG_RAY_NODE_KIND: "head", TAG_RAY_USER_NODE_TYPE: _HEAD}}
        self._addresses: dict[str, str] = {_HEAD: provider_config["gcs_address"].rpartition(":")[0]}

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        with self._lock:
            return [name for name, tags in self._tags.items() if tag_filters.items() <= tags.items()]

    def is_running(self, node_id: str) -> bool:
        with self._lock:
            return node_id in self._tags

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._lock:
            return dict(self._tags[node_id])

    def set_node_tags(self, node_id: str, tags: Mapping[str, str]) -> None:
        with self._lock:
            self._tags[node_id].update(tags)

    def internal_ip(self, node_id: str) -> str:
        with self._lock:
            return self._addresses[node_id]

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],  # noqa: ARG002 - there is nothing to say of a node
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],  # noqa: ARG002
    ) -> None:
        # As from a cloud: a machine is known as soon as it is ordered, long before Ray runs on it.
        for _ in range(count):
            with self._lock:
                self._count += 1
                number, name = self._count, f"{_NODE}-{self._count}"
                self._addresses[name] = f"127.0.0.{10 + number}"
                self._tags[name] = {**tags, TAG_RAY_NODE_STATUS: "up-to-date"}
            until(partial(self._may_come, number), _HELD_SECONDS)
            self._start(number, name, dict(resources))

    def _may_come(self, number: int) -> bool:
        return not (self._folder / f"{number}-held").exists()

    def _start(self, number: int, name: str, resources: dict[str, float]) -> None:
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        address = self.internal_ip(name)
        node = Node(
            RayParams(
                gcs_address=self.provider_config["gcs_address"],
                redis_address=self.provider_config["gcs_address"],
                node_ip_address=address,
                node_manager_port=0,
                min_worker_port=0,
                max_worker_port=0,
                num_cpus=int(resources.pop("CPU")),
                num_gpus=0,
                object_store_memory=_STORE_BYTES,
                resources=resources,
                env_vars={"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": _NODE},
            ),
            head=False,
            shutdown_at_exit=False,
            spawn_reaper=False,
        )
        with self._lock:
            self._nodes[name] = node
        (self._folder / str(number)).write_text(address)

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            node = self._nodes.pop(node_id)
            del self._tags[node_id]
        node.kill_all_processes(check_alive=False, allow_graceful=True)
        (self._folder / node_id.rpartition("-")[2]).unlink()


class GrowingRay:
    """A cluster without workers that may grow; a context manager, as `RayHosts`.

    Parameters
    ----------
    most_nodes : int
        How large it may grow.
    folder : pathlib.Path
        For logs, and for the state of its nodes.
    idle_seconds : float
        A node that has nothing to do for so long is stopped.
    """

    def __init__(self, most_nodes: int, folder: Path, *, idle_seconds: float = 5.0) -> None:
        self._nodes = folder / "nodes"
        self._nodes.mkdir()
        self._folder = folder
        path = folder / "grow.json"
        environment = {
            # The second autoscaler, as on Kubernetes.
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD,
            "RAY_NODE_TYPE_NAME": _HEAD,
        }
        self._hosts = RayHosts(1, folder, KEEPALIVE | environment, head_options=[f"--autoscaling-config={path}"])
        worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most_nodes}
        config = {
            "cluster_name": "grows",
            "max_workers": most_nodes,
            "idle_timeout_minutes": idle_seconds / 60,
            "upscaling_speed": most_nodes,
            "provider": {
                "type": "external",
                "module": f"{__name__}.{LoopbackNodes.__name__}",
                "gcs_address": self._hosts.address,
                "folder": str(self._nodes),
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": _HEAD,
            "available_node_types": {
                _HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                _NODE: worker,
            },
            "file_mounts": {},
            "cluster_synced_files": [],
            **{f"{whose}_commands": [] for whose in _WHOSE},
        }
        path.write_text(json.dumps(config))

    def __enter__(self) -> GrowingRay:
        self._hosts.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._hosts.__exit__()

    def hold(self, number: int) -> None:
        """Have a node come later than it is ordered."""
        (self._nodes / f"{number}-held").touch()

    def release(self, number: int) -> None:
        """Let it come."""
        (self._nodes / f"{number}-held").unlink()

    @property
    def addresses(self) -> set[str]:
        """Of the nodes that there are now."""
        return {path.read_text() for path in self._nodes.iterdir() if path.name.isdigit()}

    def build(self, gate: Gate, table: Path, *, room_seconds: float, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process that builds an index of a table, whose workers wait at a gate once training has ended.

        Parameters
        ----------
        gate : Gate
            Where they wait.
        table : pathlib.Path
            Its folder is the namespace.
        room_seconds : float
            How long workers are waited for without which it would train as well.
        **options
            Of ``create_index``.
        """
        given = json.dumps({"executor": "ray", "ray_address": self._hosts.address, **options})
        return self._run(room_seconds, "build", gate.path, str(table), given, log=self._folder / f"{table.stem}.log")

    def hold_parts(self, enough: int, *, room_seconds: float, log: Path) -> subprocess.Popen[bytes]:
        """Start a process that holds two parts, or as many as there is room for, and logs their number."""
        return self._run(room_seconds, "hold", self._hosts.address, str(enough), log=log)

    def _run(self, room_seconds: float, *words: str, log: Path) -> subprocess.Popen[bytes]:
        return self._hosts.run(0, "-m", __name__, str(room_seconds), *words, log=log)


class _Closing:
    """Closes a gate when training has ended."""

    def __init__(self, gate: Path) -> None:
        self._gate = gate

    def update(self, event: ProgressEvent) -> None:
        """Nothing is done in the middle of a phase."""

    def finish(self, phase: str) -> None:
        if phase == "train":
            (self._gate / "closed").touch()


def build(gate: str, table: str, options: str) -> None:
    """Build an index of the column ``vec``."""
    (Path(gate) / "driver").write_text(str(os.getpid()))
    lance_dfaiss.create_index(
        None,
        "vec",
        namespace_impl=IMPL,
        namespace_properties={"root": str(Path(table).parent), "gate": gate},
        table_id=[Path(table).stem],
        progress=_Closing(Path(gate)),
        **json.loads(options),
    )


def hold(address: str, enough: str) -> None:
    """Hold parts."""
    with RayRunner(2, address) as runner, RayParts(runner.cluster, Numbers, 100, 2, enough=int(enough)) as parts:
        _log.info("%d parts", parts.count)


def main(room_seconds: str, what: str, *words: str) -> None:
    """Do one of them; what happens is logged to stderr."""
    warnings.filterwarnings("ignore", "lance is not fork-safe")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    ray_parts._ROOM_SECONDS = float(room_seconds)
    if what == "build":
        build(*words)
    else:
        hold(*words)


if __name__ == "__main__":
    main(*sys.argv[1:])
