"""Who carries out a build: threads of this process, or workers of a Ray cluster."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..lance_io import Namespace, PinnedDataset
from ..machine import usable_cores, usable_memory_bytes
from ..pointers import absolute_location
from ..spec import BuildOptions
from ..storage import StorePlace
from .ray_runner import RayRunner
from .runner import LocalRunner

__all__ = [
    "namespace_asked",
    "open_runner",
    "ray_is_connected",
    "store_place",
    "uses_ray",
    "worker_budget_bytes",
    "working_cores",
]


def ray_is_connected() -> bool:
    """Tell whether this process is connected to a Ray cluster; never imports Ray."""
    ray = sys.modules.get("ray")
    connected = getattr(ray, "is_initialized", None)  # there is none while Ray is still being imported
    return connected is not None and bool(connected())


def uses_ray(options: BuildOptions, *, connected: bool | None = None) -> bool:
    """Decide whether a build runs on Ray.

    Parameters
    ----------
    options : BuildOptions
        How to build.
    connected : bool, optional
        Whether this process is connected to a Ray cluster; it is looked up by default.
    """
    if options.executor != "auto":
        return options.executor == "ray"
    return options.names_ray or (ray_is_connected() if connected is None else connected)


def worker_budget_bytes(options: BuildOptions) -> int:
    """Return the memory that one worker may take.

    What was asked for; else half of this machine's memory, divided by the workers that share a machine. Ray's workers
    are reckoned to be on machines like this one, as many on each as it has cores for.
    """
    if options.memory_budget_bytes is not None:
        return options.memory_budget_bytes
    sharing = options.num_workers
    if uses_ray(options):
        sharing = min(sharing, _places(options.ray_remote_args, usable_cores()))
    return usable_memory_bytes() // 2 // sharing


def working_cores(options: BuildOptions) -> int:
    """Return how many cores work on a build: this machine's, or those that Ray's workers ask for."""
    if not uses_ray(options):
        return usable_cores()
    return max(int(options.num_workers * _cpus(options.ray_remote_args)), 1)


def _places(remote_args: Mapping[str, Any] | None, cores: int) -> int:
    """Return how many workers a machine has cores for; Ray gives each one core unless told otherwise."""
    return max(int(cores / _cpus(remote_args)), 1)


def _cpus(remote_args: Mapping[str, Any] | None) -> float:
    wanted = (remote_args or {}).get("num_cpus", 1)
    usable = isinstance(wanted, (int, float)) and not isinstance(wanted, bool) and wanted > 0
    return float(wanted) if usable else 1.0  # Ray refuses it in its own words


def namespace_asked(options: BuildOptions) -> Namespace | None:
    """Return the table that the dataset is said to be.

    Raises
    ------
    InvalidArgument
        If it is said in part.
    """
    return Namespace.of_parameters(options.namespace_impl, options.namespace_properties, options.table_id)


def store_place(pinned: PinnedDataset, index_uri: str | None) -> StorePlace:
    """Return where generations lie, for other processes."""
    if index_uri is None:
        return StorePlace()
    url = absolute_location(index_uri)
    return StorePlace(url=url, storage_options=pinned.options_for(url))


@contextmanager
def open_runner(options: BuildOptions) -> Iterator[LocalRunner | RayRunner]:
    """Give the runner that was asked for, and let its workers go afterwards.

    Raises
    ------
    ExtraMissing, ClusterUnreachable, WorkerMismatch, InvalidArgument
        If Ray is asked for, and is not installed, not found, not fit for it, or cannot use the options.
    """
    if not uses_ray(options):
        yield LocalRunner(options.num_workers)
        return
    with RayRunner(
        options.num_workers,
        options.ray_address,
        options.ray_remote_args,
        task_deadline_seconds=options.task_deadline_seconds,
    ) as runner:
        yield runner
