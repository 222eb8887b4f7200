"""Who carries out a build is decided without Ray: from the options, and from whether this process is connected."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.build import executors
from lance_dfaiss.build.executors import uses_ray, worker_budget_bytes
from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.machine import usable_cores, usable_memory_bytes
from lance_dfaiss.spec import BuildOptions

RAY_OPTIONS: tuple[dict[str, Any], ...] = (
    {"ray_address": "auto"},
    {"ray_remote_args": {"num_cpus": 2}},
    {"ray_remote_args": {}},
    {"task_deadline_seconds": 5},
)


@pytest.mark.parametrize("connected", [False, True])
def test_what_is_said_is_done(connected: bool) -> None:
    assert not uses_ray(BuildOptions(executor="local"), connected=connected)
    assert uses_ray(BuildOptions(executor="ray"), connected=connected)


def test_auto_is_ray_where_there_is_a_connection_or_an_option_for_it() -> None:
    assert not uses_ray(BuildOptions(), connected=False)
    assert uses_ray(BuildOptions(), connected=True)
    for options in RAY_OPTIONS:
        assert uses_ray(BuildOptions(**options), connected=False)
        assert uses_ray(BuildOptions(**options, executor="ray"), connected=False)


@pytest.mark.parametrize("options", RAY_OPTIONS)
def test_an_option_for_ray_means_nothing_to_threads(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as raised:
        BuildOptions(executor="local", **options)
    assert raised.value.parameter in options
    assert "executor='local'" in raised.value.message


@pytest.mark.parametrize(
    "options",
    [
        {"executor": "dask"},
        {"ray_address": ""},
        {"ray_address": 10001},
        {"ray_remote_args": ["num_cpus"]},
        {"ray_remote_args": {1: 2}},
        {"task_deadline_seconds": 0},
        {"task_deadline_seconds": -1},
        {"task_deadline_seconds": float("nan")},
        {"task_deadline_seconds": float("inf")},
        {"task_deadline_seconds": 10**400},
        {"task_deadline_seconds": True},
        {"task_deadline_seconds": "60"},
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as raised:
        BuildOptions(**options)
    assert raised.value.parameter in options


def test_credentials_are_not_shown() -> None:
    shown = repr(BuildOptions(storage_options={"key": "sesame"}, namespace_properties={"token": "sesame"}))
    assert "sesame" not in shown


def test_whether_ray_is_connected_is_not_asked_by_importing_it() -> None:
    code = (
        "import sys; from lance_dfaiss.build.executors import ray_is_connected;"
        "assert not ray_is_connected(); assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_module_that_is_still_being_imported_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    assert not executors.ray_is_connected()


@given(workers=st.integers(1, 1000), budget=st.integers(1, 2**40), executor=st.sampled_from(["local", "ray"]))
def test_a_budget_that_is_given_is_each_workers(workers: int, budget: int, executor: Any) -> None:
    options = BuildOptions(num_workers=workers, memory_budget_bytes=budget, executor=executor)
    assert worker_budget_bytes(options) == budget


@given(workers=st.integers(1, 1000))
def test_threads_share_half_of_the_machine(workers: int) -> None:
    budget = worker_budget_bytes(BuildOptions(num_workers=workers, executor="local"))
    assert budget == usable_memory_bytes() // 2 // workers


@given(workers=st.integers(1, 1000), cpus=st.one_of(st.none(), st.integers(1, 64), st.floats(0.1, 8)))
def test_rays_workers_share_a_machine_with_as_many_as_it_has_cores_for(workers: int, cpus: float | None) -> None:
    args = None if cpus is None else {"num_cpus": cpus}
    budget = worker_budget_bytes(BuildOptions(num_workers=workers, executor="ray", ray_remote_args=args))
    half, together = usable_memory_bytes() // 2, max(1, int(usable_cores() / (cpus or 1)))
    # However many workers there are elsewhere, those of one machine fit it, and no worker gets less than its part.
    assert budget * min(workers, together) <= half
    assert (budget + 1) * min(workers, together) > half
