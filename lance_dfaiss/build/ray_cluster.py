"""The cluster that a build runs on: found or started, looked at, and where work may be put; only this file imports Ray.

Before work starts every node is asked for its packages. Workers report to an actor beside the driver, the board.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import logging
import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ..errors import ClusterUnreachable, ExtraMissing, InvalidArgument, WorkerMismatch
from ..machine import usable_cores
from .attempts import AttemptRules
from .ray_worker import Beat, Board

__all__ = [
    "FETCH_SECONDS",
    "INLINE_BYTES",
    "LOOK_SECONDS",
    "WAIT_SECONDS",
    "Listener",
    "RayCluster",
    "bad_environment",
    "first_line",
    "import_ray",
    "mismatch",
    "only_cores_lack",
    "tells_of_growth",
    "too_small",
    "trace_of",
]

_log = logging.getLogger(__name__)

# Python's version is compared too: what was pickled by one may not unpickle in another.
_COMPARED = ("lance_dfaiss", "faiss", "lance")

# Options of a Ray task that a caller may set; the others would change what a task is, or how often it runs.
_REMOTE_ARGS = (
    "accelerator_type", "fallback_strategy", "label_selector", "memory", "num_cpus", "num_gpus", "placement_group",
    "placement_group_bundle_index", "placement_group_capture_child_tasks", "resources", "runtime_env",
    "scheduling_strategy",
)  # fmt: skip

# With any of these the caller says where tasks run, and no retry is sent elsewhere by us.
_PLACING = ("fallback_strategy", "label_selector", "placement_group", "scheduling_strategy")

# A cut link is noticed after about ten seconds; with Ray's own settings a call over it was still waiting after 90.
_KEEPALIVE = {
    "grpc_client_keepalive_time_ms": 3_000,
    "grpc_client_keepalive_timeout_ms": 3_000,
    "health_check_period_ms": 2_000,
    "health_check_timeout_ms": 5_000,
    "health_check_failure_threshold": 3,
}

# Ray puts the machine's outside address in place of 127.0.0.1, and listens there; any other loopback address it keeps.
_LOOPBACK = "127.0.0.2"

_CONNECT_SECONDS = 5.0

# Where Ray's first autoscaler tells `ray status` what it does.
_AUTOSCALING_STATUS = b"__autoscaling_status"

LOOK_SECONDS = 0.5
"""Between two readings of the board."""

WAIT_SECONDS = 0.1
"""For an answer, before the board is looked at again."""

FETCH_SECONDS = 60.0
"""For an object that is ready."""

INLINE_BYTES = 32 * 1024
"""Ray carries small arguments within the call; larger ones go through its object store."""

_NAMED_NODES = 5


class RayCluster:
    """A connection to a Ray cluster, and what this package keeps there while it works.

    A cluster that this process is connected to is used as it is. Else the one at an address is joined, or one is
    started on this machine; `close` ends the connection that was made here, and stops only what was started here.

    Parameters
    ----------
    address : str or None
        As ``ray.init`` takes it; by default what ``RAY_ADDRESS`` says, and without that a cluster is started.
    remote_args : mapping
        Options of each Ray task, as the caller gave them.
    rules : AttemptRules
        Deadlines.

    Attributes
    ----------
    ray : module
        Ray itself.
    rules : AttemptRules
        Deadlines.
    options : dict
        Of each Ray task.
    versions : dict of str to str
        Of the packages that every worker must have alike.
    board : actor handle
        Of the `Board`; None while there is no connection.

    Raises
    ------
    ExtraMissing
        If Ray is not installed.
    InvalidArgument
        If an option cannot be used.
    """

    def __init__(self, address: str | None, remote_args: Mapping[str, Any], rules: AttemptRules) -> None:
        self.ray = import_ray()
        self.rules = rules
        self.versions = _mobile_versions()(_COMPARED)
        self.options = _checked_options(self.ray, dict(remote_args))
        self.board: Any = None
        self._address = address
        self._task: Any = None
        self._part: Any = None
        self._ours = False
        self._idents = 0

    @property
    def threads(self) -> int:
        """Cores that FAISS may use in each worker."""
        return max(int(self.options["num_cpus"]), 1)

    def connect(self) -> None:
        """Connect to the cluster, and look at every node that could run a task; again, this does nothing.

        Raises
        ------
        ClusterUnreachable
            If there is no cluster at the address.
        WorkerMismatch
            If a node lacks a package, or has other versions than this process.
        """
        if self.board is not None:
            return
        if self.ray.is_initialized():
            self._check_address()
        else:
            self._join_or_start()
        try:
            here = self.ray.get_runtime_context().get_node_id()
            self.board = (
                self.ray.remote(Board)
                .options(num_cpus=0, max_restarts=-1, scheduling_strategy=self._at_node(here, soft=False))
                .remote()
            )
            self._look_at_nodes()
            lacking = too_small(_wanted(self.options), [node for node in self.ray.nodes() if node["Alive"]])
            if lacking is not None:
                _log.warning(
                    "%s. Waiting %.0f s in case one joins; else ask for less with ray_remote_args, or add one",
                    lacking,
                    self.rules.start_seconds,
                )
            self._await_board()
            self._task = self.ray.remote(_mobile_task(_COMPARED, self.versions))
            self._part = self.ray.remote(_mobile_part(_COMPARED, self.versions))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give back what was taken; again, this does nothing."""
        if self.board is not None and self.ray.is_initialized():
            with suppress(self.ray.exceptions.RayError):
                self.ray.kill(self.board)
        self.board = self._task = self._part = None
        if self._ours:
            self._ours = False
            self.ray.shutdown()

    def submit(self, recipe: Any, task: Any, name: str, avoid: frozenset[str], busy: Mapping[str, int]) -> Any:
        """Hand an attempt of a task to Ray; return the reference of its answer.

        Parameters
        ----------
        recipe, task : bytes or object reference
            As `carry_out` takes them.
        name : str
            Of the attempt, on the board.
        avoid : frozenset of str
            Nodes where it should not run, if there are others.
        busy : mapping of str to int
            How much runs on each node.
        """
        return self._task.options(**self.options, **self.placement(avoid, busy)).remote(
            recipe, task, self.board, name, self.threads, self.rules.silence_seconds
        )

    def start_part(self, name: str, avoid: frozenset[str], busy: Mapping[str, int], *, shared: bool) -> tuple[Any, Any]:
        """Have Ray start a process for a part of the sample; return its actor, and the reference of its first answer.

        Parameters
        ----------
        name : str
            On the board.
        avoid, busy
            As for `submit`.
        shared : bool
            Whether it may share a core with another worker.

        Returns
        -------
        tuple of (actor handle, object reference)
            The answer is the id of its node, host and process, and the versions found there; where those are not
            `versions`, nothing can be called.
        """
        options = {name: value for name, value in self.options.items() if name != "max_retries"}
        if shared:
            options["num_cpus"] = 0
        actor = self._part.options(**options, **self.placement(avoid, busy)).remote()
        return actor, actor.hello.remote(self.board, name, self.threads, self.rules.silence_seconds)

    def next_ident(self) -> int:
        """Return a number for a part's process."""
        self._idents += 1
        return self._idents

    def room(self) -> list[dict[str, Any]]:
        """Return Ray's description of each living node that is large enough for a worker."""
        wanted = _wanted(self.options)
        return [
            node
            for node in self.ray.nodes()
            if node["Alive"] and all(node["Resources"].get(name, 0) >= count for name, count in wanted.items())
        ]

    def gone(self) -> frozenset[str]:
        """Return the nodes that Ray has declared dead; it does so also where calls to them still hang."""
        return frozenset(node["NodeID"] for node in self.ray.nodes() if not node["Alive"])

    def may_grow(self) -> bool:
        """Tell whether an autoscaler may add nodes; where Ray does not say, it may."""
        # There is no public word for it, and what there is may change.
        try:
            sdk = importlib.import_module("ray.autoscaler.v2.sdk")
            kept = importlib.import_module("ray.experimental.internal_kv")
            here = self.ray.get_runtime_context().gcs_address
            version = sdk.get_cluster_status(here, timeout=_CONNECT_SECONDS).stats.autoscaler_version
            return tells_of_growth(version, kept._internal_kv_get(_AUTOSCALING_STATUS))
        except Exception as exc:
            _log.info("Ray does not say whether the cluster may grow: %s", first_line(exc))
            return True

    def needs_to_share(self, cut_off: frozenset[str], freed: str | None) -> bool:
        """Tell whether another worker can begin soon only if it shares a core.

        Parameters
        ----------
        cut_off : frozenset of str
            Nodes where none should begin.
        freed : str or None
            Node that has just lost a worker, whose resources Ray may still take for used.
        """
        if any(name in self.options for name in _PLACING):
            return False  # what is free where the caller wants it is not known
        wanted = _wanted(self.options)
        living = {node["NodeID"] for node in self.ray.nodes() if node["Alive"]} - cut_off
        try:
            told = importlib.import_module("ray._private.state").available_resources_per_node()
        except Exception as exc:  # not public either
            _log.info("Ray does not say what is free: %s", first_line(exc))
            return False
        free = [
            {name: told.get(node, {}).get(name, 0.0) + (wanted[name] if node == freed else 0.0) for name in wanted}
            for node in living
        ]
        return only_cores_lack(wanted, free) and not self.may_grow()

    def no_room(self) -> ClusterUnreachable:
        """Return the error for a cluster without a node that is large enough."""
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        listed = "; ".join(f"{_name(node)} has {_amounts(node['Resources'])}" for node in nodes[:_NAMED_NODES])
        return ClusterUnreachable(
            f"no node of the Ray cluster has room for a worker of {_amounts(_wanted(self.options))}: {listed}",
            remedy="Ask for less with ray_remote_args, or add nodes that are large enough",
            address=self._address or "",
        )

    def _at_node(self, node: str, *, soft: bool) -> Any:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        # Soft: rather at once on another node than later on this one.
        return strategies.NodeAffinitySchedulingStrategy(node, soft=soft, _spill_on_unavailable=soft)

    def placement(self, avoid: frozenset[str], busy: Mapping[str, int]) -> dict[str, Any]:
        """Return where an attempt should run: elsewhere if it can, spread over the nodes otherwise."""
        if any(name in self.options for name in _PLACING):
            return {}
        others = [node["NodeID"] for node in self.room() if node["NodeID"] not in avoid] if avoid else []
        if not others:
            return {"scheduling_strategy": "SPREAD"}
        return {"scheduling_strategy": self._at_node(min(others, key=lambda node: busy.get(node, 0)), soft=True)}

    def _check_address(self) -> None:
        """Refuse an address beside a connection to another cluster."""
        asked = self._address
        if asked is None or asked == "auto":
            return
        joined = self.ray.get_runtime_context().gcs_address
        if "://" not in asked and _resolved(asked) != _resolved(joined):
            raise InvalidArgument(
                f"this process is connected to the Ray cluster at {joined} already, not to {asked}",
                remedy="Leave the address out, or call ray.shutdown() first",
                parameter="ray_address",
                value=asked,
            )

    def _join_or_start(self) -> None:
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if address == "local":
            options.update(
                num_cpus=usable_cores(),
                include_dashboard=False,
                _node_ip_address=_LOOPBACK,
                _system_config=dict(_KEEPALIVE),
            )
        elif "://" not in address and address != "auto":
            host = _check_listening(address)
            if host is not None:
                options["_node_ip_address"] = host
        try:
            with warnings.catch_warnings():
                # Of every fork; what Ray forks becomes another program at once.
                warnings.filterwarnings("ignore", "lance is not fork-safe")
                self.ray.init(address, **options)
        except (OSError, ValueError, RuntimeError, self.ray.exceptions.RayError) as exc:
            raise _unreachable(address, str(exc)) from exc
        self._ours = True

    def _await_board(self) -> None:
        try:
            self.ray.get(self.board.read.remote(), timeout=self.rules.start_seconds)
        except self.ray.exceptions.RayError as exc:
            raise ClusterUnreachable(
                f"no worker could be started beside this process: {first_line(exc)}",
                remedy="See the logs of Ray on this machine",
                address=self._address or "",
            ) from exc

    def _look_at_nodes(self) -> None:
        """Ask every node that could run a task for its versions; an autoscaled cluster may have none yet."""
        look = self.ray.remote(_mobile_versions())
        environment = {name: self.options[name] for name in ("runtime_env",) if name in self.options}
        asked = {
            look.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=self._at_node(node["NodeID"], soft=False),
                **environment,
            ).remote(_COMPARED): node
            for node in self.room()
        }
        wrong: dict[str, dict[str, str]] = {}
        waiting = list(asked)
        deadline = time.monotonic() + self.rules.start_seconds
        while waiting and time.monotonic() < deadline:
            ready, waiting = self.ray.wait(waiting, timeout=LOOK_SECONDS)
            for ref in ready:
                found = self._versions_of(ref, asked[ref])
                if found is not None and found != self.versions:
                    wrong[_name(asked[ref])] = found
        for ref in waiting:
            _log.warning("node %s did not answer in %.0f s", _name(asked[ref]), self.rules.start_seconds)
            self.ray.cancel(ref, force=True)
        if wrong:
            raise mismatch(self.versions, wrong)

    def _versions_of(self, ref: Any, node: Mapping[str, Any]) -> dict[str, str] | None:
        errors = self.ray.exceptions
        try:
            found: dict[str, str] = self.ray.get(ref, timeout=FETCH_SECONDS)
        except errors.RuntimeEnvSetupError as exc:
            raise bad_environment(exc) from exc
        except errors.RayError as exc:
            _log.warning("node %s could not be looked at: %s", _name(node), exc)  # it has gone since, most likely
            return None
        return found


class Listener:
    """Reads the board, not more often than it makes sense, and never waits for it."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._ray = cluster.ray
        self._reading: Any = None
        self._read_at = float("-inf")

    def hear(self) -> dict[str, Beat] | None:
        """Return the reports since the last time; None if nothing was read now."""
        now = time.monotonic()
        if self._reading is None:
            if now - self._read_at >= LOOK_SECONDS:
                self._reading = self._cluster.board.read.remote()
            return None
        if not self._ray.wait([self._reading], timeout=0)[0]:
            return None
        reading, self._reading, self._read_at = self._reading, None, now
        try:
            beats: dict[str, Beat] = self._ray.get(reading, timeout=FETCH_SECONDS)
        except self._ray.exceptions.RayError as exc:
            _log.info("the board is being started again: %s", first_line(exc))
            return None
        return beats


def _mobile_versions() -> Callable[[Sequence[str]], dict[str, str]]:
    """Return a function that looks up versions, and works where this package is not installed.

    A function that is made inside another one is pickled by value; it imports all it needs itself.
    """

    def versions(names: Sequence[str]) -> dict[str, str]:
        import importlib
        import sys

        found = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
        for name in names:
            try:
                found[name] = str(importlib.import_module(name).__version__)
            except Exception as exc:  # a package that fails while it is imported is as good as missing
                found[name] = f"not importable ({type(exc).__name__}: {exc})"
        return found

    return versions


def _mobile_task(names: Sequence[str], expected: Mapping[str, str]) -> Callable[..., Any]:
    """Return the function that Ray runs: `carry_out`, where the versions are those expected, else host and versions.

    Nodes that join later were not looked at before, so each task looks.
    """
    versions = _mobile_versions()

    def dfaiss_task(recipe: bytes, task: bytes, board: Any, attempt: str, threads: int, orphan_seconds: float) -> Any:
        import importlib
        import socket

        found = versions(names)
        if found != expected:
            return socket.gethostname(), found
        node = importlib.import_module("ray").get_runtime_context().get_node_id()
        worker = importlib.import_module("lance_dfaiss.build.ray_worker")
        return worker.carry_out(
            recipe,
            task,
            board=board,
            attempt=attempt,
            node=node,
            threads=threads,
            orphan_seconds=orphan_seconds,
        )

    return dfaiss_task


def _mobile_part(names: Sequence[str], expected: Mapping[str, str]) -> type:
    """Return the class of the actors that hold parts: a `PartHost`, where the versions are those expected.

    Nodes that join later were not looked at before, so each actor looks, like each task.
    """
    versions = _mobile_versions()

    class DfaissPart:
        _host: Any

        def hello(self, board: Any, name: str, threads: int, orphan_seconds: float) -> tuple[str, str, dict[str, str]]:
            """Begin, if the versions are right; return the node's id, the worker (else its host) and the versions."""
            import importlib
            import socket

            node = importlib.import_module("ray").get_runtime_context().get_node_id()
            found = versions(names)
            if found != expected:
                return node, socket.gethostname(), found
            worker = importlib.import_module("lance_dfaiss.build.ray_worker")
            self._host = worker.PartHost(board, name, threads, orphan_seconds)
            return node, self._host.worker, found

        def call(self, *given: Any) -> Any:
            """See `PartHost.call`."""
            return self._host.call(*given)

    return DfaissPart


def import_ray() -> Any:
    """Return Ray, which is imported when it is needed.

    Raises
    ------
    ExtraMissing
        If it is not installed.
    """
    try:
        importlib.import_module("ray.exceptions")
        return importlib.import_module("ray")
    except ImportError as exc:
        raise ExtraMissing(
            "building on Ray needs the package ray, which is not installed",
            remedy="pip install 'lance-dfaiss[ray]'",
            extra="ray",
        ) from exc


def _checked_options(ray: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of each task, or refuse them in words of the parameter's name."""
    unknown = sorted(set(given) - set(_REMOTE_ARGS))
    if unknown:
        raise InvalidArgument(
            f"ray_remote_args cannot have {', '.join(map(repr, unknown))}",
            remedy=f"Possible are {', '.join(_REMOTE_ARGS)}; retries are the builder's own",
            parameter="ray_remote_args",
            value=given,
        )
    options = {"num_cpus": 1, **given, "max_retries": 0}
    if options["num_cpus"] is None:
        options["num_cpus"] = 1
    try:
        ray.remote(lambda: None).options(**options)
    except (ValueError, TypeError) as exc:
        raise InvalidArgument(
            f"ray_remote_args cannot be used: {exc}",
            remedy="They are the options of a Ray task",
            parameter="ray_remote_args",
            value=given,
        ) from exc
    return options


def _wanted(options: Mapping[str, Any]) -> dict[str, float]:
    """Return what one worker takes, by Ray's names of resources."""
    wanted = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    wanted.update(options.get("resources") or {})
    return {name: float(count) for name, count in wanted.items() if count}


def only_cores_lack(wanted: Mapping[str, float], free: Iterable[Mapping[str, float]]) -> bool:
    """Tell whether a worker has no room now, but would have if it took no core.

    Parameters
    ----------
    wanted : mapping of str to float
        What it takes.
    free : iterable of mapping of str to float
        What is free on each node where it may run.
    """
    nodes = list(free)
    others = {name: count for name, count in wanted.items() if name != "CPU"}
    return not _fits(wanted, nodes) and _fits(others, nodes)


def _fits(wanted: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> bool:
    return any(all(node.get(name, 0.0) >= count for name, count in wanted.items()) for node in nodes)


def too_small(wanted: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what to say of nodes of which none is large enough for a worker; None if one is.

    Parameters
    ----------
    wanted : mapping of str to float
        What it takes.
    nodes : sequence of mapping
        Ray's descriptions of them.
    """
    if _fits(wanted, [node["Resources"] for node in nodes]):
        return None
    said = f"no node of the Ray cluster is large enough for a worker of {_amounts(wanted)}"
    if not nodes:
        return f"{said}: there is no node"
    nearest = max(nodes, key=lambda node: min(node["Resources"].get(name, 0.0) / wanted[name] for name in wanted))
    return f"{said}; the largest, {_name(nearest)}, has {_amounts(nearest['Resources'])}"


def tells_of_growth(version: str, status: bytes | None) -> bool:
    """Tell whether what Ray keeps about autoscaling means that there is any.

    Parameters
    ----------
    version : str
        Of the state that the second autoscaler has left; ``"0"`` if it does not run.
    status : bytes or None
        What the first one has left. Where there is none, a process without power stands in for it, which gives each
        node a kind of its own.
    """
    if version not in ("", "0"):
        return True
    if status is None:
        return False
    kinds = json.loads(status)["autoscaler_report"]["node_type_mapping"]
    return any(kind != f"node_{node}" for node, kind in kinds.items())


def _check_listening(address: str) -> str | None:
    """Refuse an address where nobody listens: Ray itself tries for minutes. Return the host if it is loopback."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS) as connection:
            peer = connection.getpeername()[0]
    except (OSError, ValueError) as exc:
        raise _unreachable(address, str(exc)) from exc
    # A driver on this machine has to go by the same address as the node, or the cluster does not find it.
    return str(peer) if ipaddress.ip_address(peer).is_loopback else None


def _unreachable(address: str, why: str) -> ClusterUnreachable:
    return ClusterUnreachable(
        f"no Ray cluster at {address!r}: {why}" if address != "local" else f"Ray could not be started here: {why}",
        # Ray does not always say so when it is the token.
        remedy="Check the address (host:port as `ray start --head` printed it, or 'auto'), that the cluster runs, and"
        " that RAY_AUTH_TOKEN is its token if it has one",
        address=address,
    )


def _resolved(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return host, port


def mismatch(expected: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> WorkerMismatch:
    """Return the error for nodes that have other packages than this process.

    Parameters
    ----------
    expected : mapping of str to str
        Versions here.
    nodes : mapping of str to mapping of str to str
        Versions there, by name of the node; at least one.
    """
    told = []
    for node, found in list(nodes.items())[:_NAMED_NODES]:
        wrong = [
            f"{name} is {found.get(name, 'unknown')}, here {version}"
            for name, version in expected.items()
            if found.get(name) != version
        ]
        told.append(f"node {node}: {', '.join(wrong)}")
    more = f" (and {len(nodes) - _NAMED_NODES} more nodes)" if len(nodes) > _NAMED_NODES else ""
    first, found = next(iter(nodes.items()))
    return WorkerMismatch(
        f"workers have other packages than this process: {'; '.join(told)}{more}",
        remedy="Install the same versions on every node, or pass ray_remote_args={'runtime_env': {'pip': [...]}}",
        node=first,
        expected=tuple(f"{name} {version}" for name, version in expected.items()),
        found=tuple(f"{name} {version}" for name, version in found.items()),
    )


def bad_environment(exc: Exception) -> InvalidArgument:
    """Return the error for a ``runtime_env`` that a node cannot set up."""
    return InvalidArgument(
        f"the runtime_env of ray_remote_args cannot be set up: {first_line(exc)}",
        parameter="ray_remote_args",
        value="runtime_env",
    )


def trace_of(exc: Exception) -> str:
    """Return the worker's traceback, without the colours that Ray puts in."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(exc))


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {name: count for name, count in resources.items() if not name.startswith(("node:", "object_store"))}
    return ", ".join(f"{count:g} {name}" for name, count in sorted(shown.items()))


def first_line(exc: Exception) -> str:
    """Return class and first line of an error: those of Ray have pages."""
    text = str(exc).strip().partition("\n")[0]
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
