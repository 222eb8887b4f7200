"""Ray as a runner: real nodes and processes that are killed, cut off, hang, fall behind, join late, or do not fit."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance_dfaiss.build.attempts import AttemptRules
from lance_dfaiss.errors import (
    ClusterUnreachable,
    ExtraMissing,
    InvalidArgument,
    InvalidVectors,
    TaskFailed,
    WorkerMismatch,
)
from lance_dfaiss.manifest import ShardTask
from tests.build import scripted
from tests.build.rayrig import SECOND, THIRD, RayRig, kill, kill_node
from tests.build.scripted import TASKS, Held, Numbers, Scripted
from tests.waiting import until

pytest.importorskip("ray")

from lance_dfaiss.build.ray_parts import RayParts
from lance_dfaiss.build.ray_runner import RayRunner

TOTAL = sum(task.physical_rows for task in TASKS)
NO_TWINS = AttemptRules(twin_seconds=1_000)


@pytest.fixture
def rig(ray_cluster: RayRig) -> RayRig:
    return ray_cluster


@pytest.fixture
def apart(ray_cluster: RayRig) -> Iterator[RayRig]:
    """The cluster runs, but this process is not connected to it."""
    ray_cluster.leave()
    yield ray_cluster
    ray_cluster.leave()
    ray_cluster.join()


def ordinals(runner: RayRunner, job: Scripted, tasks: list[ShardTask] = TASKS) -> list[int]:
    """Run tasks whose results begin with, or are, their ordinals; every row is booked once."""
    results = [result[0] if isinstance(result, tuple) else result for result in runner.run(job, tasks)]
    assert job.rows == sum(task.physical_rows for task in tasks)
    assert all(rows >= 0 and num_bytes >= 0 for rows, num_bytes in job.booked)
    return sorted(results)


def outcomes(runner: RayRunner, ordinal: int) -> list[str]:
    return [report.outcome for report in runner.reports if report.ordinal == ordinal]


@pytest.mark.usefixtures("rig")
def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    with RayRunner(2, rules=NO_TWINS) as runner:
        assert ordinals(runner, scripted.work(scripted.dies_once, folder=str(tmp_path), bad=2)) == list(range(8))
        assert outcomes(runner, 2) == ["lost", "done"]
        lost, done = [report for report in runner.reports if report.ordinal == 2]
        assert (lost.attempt, done.attempt, done.attempts, done.rows) == (1, 2, 2, TASKS[2].physical_rows)
        assert all(outcomes(runner, ordinal) == ["done"] for ordinal in range(8) if ordinal != 2)
        assert all(report.peak_bytes > 2**20 for report in runner.reports if report.outcome == "done")


@pytest.mark.usefixtures("rig")
def test_a_task_that_kills_its_workers_fails_the_run() -> None:
    rules = AttemptRules(max_retries=1)
    with RayRunner(1, rules=rules) as runner, pytest.raises(TaskFailed, match="lost 2 times") as caught:
        list(runner.run(scripted.work(scripted.always_dies), TASKS[3:4]))
    assert (caught.value.task, caught.value.fragments) == ("shard 3", (6, 7))
    assert "out of memory" in caught.value.remedy


@pytest.mark.usefixtures("rig")
def test_a_task_that_hangs_is_given_up(tmp_path: Path) -> None:
    with RayRunner(2, task_deadline_seconds=2, rules=NO_TWINS) as runner:
        assert ordinals(runner, scripted.work(scripted.hangs_once, folder=str(tmp_path), bad=1)) == list(range(8))
        lost = next(report for report in runner.reports if report.outcome == "lost")
        assert (lost.ordinal, lost.why) == (1, "it made no progress for 2 s")


@pytest.mark.nightly
@pytest.mark.usefixtures("rig")
def test_a_worker_that_falls_silent_is_given_up(tmp_path: Path) -> None:
    job = scripted.work(scripted.waits_once, folder=str(tmp_path), bad=0)

    def freeze() -> None:
        until(lambda: job.rows)
        os.kill(int((tmp_path / "pid-0").read_text()), signal.SIGSTOP)

    with RayRunner(1, rules=AttemptRules(silence_seconds=4, twin_seconds=1_000)) as runner, beside(freeze):
        try:
            assert ordinals(runner, job, TASKS[:1]) == [0]
        finally:
            kill(int((tmp_path / "pid-0").read_text()))  # what is frozen cannot obey
        lost, done = runner.reports
        assert (lost.outcome, lost.why, done.outcome) == ("lost", "nothing was heard of it for 4 s", "done")
        assert lost.node != done.node


@contextmanager
def beside(action: Callable[[], object]) -> Iterator[None]:
    """Do something in a thread at the same time; its errors are the test's."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        yield
        future.result()


@pytest.mark.usefixtures("rig")
def test_a_straggler_gets_a_twin_and_the_first_result_counts(tmp_path: Path) -> None:
    rules = AttemptRules(twin_seconds=0.5)
    with RayRunner(2, rules=rules) as runner:
        job = scripted.work(scripted.waits_once, folder=str(tmp_path), bad=0)
        assert ordinals(runner, job) == list(range(8))
        assert sorted(outcomes(runner, 0)) == ["beaten", "done"]
        twin = next(report for report in runner.reports if report.ordinal == 0 and report.outcome == "done")
        assert (twin.twin, twin.attempts) == (True, 2)
    assert (tmp_path / "left-0").exists()  # it was told to stop, and did


def kill_busy_node(node: Any, folder: Path, *, orphans: bool = False) -> None:
    until(lambda: list(folder.glob("pid-*")))
    kill_node(node, orphans=orphans)


def test_tasks_of_a_killed_node_are_done_elsewhere(rig: RayRig, tmp_path: Path) -> None:
    node = rig.add_node(THIRD, third=2)
    job = scripted.work(scripted.waits_on_host, folder=str(tmp_path), host=THIRD)
    try:
        with RayRunner(4, rules=NO_TWINS) as runner:
            with beside(lambda: kill_busy_node(node, tmp_path)):
                assert ordinals(runner, job) == list(range(8))
            lost = [report for report in runner.reports if report.outcome == "lost"]
            assert lost
            assert all(outcomes(runner, report.ordinal)[-1] == "done" for report in lost)
    finally:
        rig.remove(node)


@pytest.mark.nightly
def test_a_task_on_its_way_to_a_node_that_stands_still_is_done_elsewhere(rig: RayRig, tmp_path: Path) -> None:
    node = rig.add_node(THIRD, num_cpus=2, second=2)
    rules = AttemptRules(start_seconds=10_000, twin_seconds=10_000)
    try:
        with RayRunner(1, remote_args={"resources": {"second": 1}}, rules=rules) as runner:
            # To Ray this is a host whose link was cut: nothing that is sent there fails, and nothing comes back.
            os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGSTOP)
            # It is lost once where it can run, so that it is sent to the other node.
            job = scripted.work(scripted.dies_once, folder=str(tmp_path), bad=2)
            assert ordinals(runner, job, TASKS[2:3]) == [2]
            assert outcomes(runner, 2) == ["lost", "done"]
    finally:
        rig.remove(node)


@pytest.mark.nightly
def test_a_worker_that_outlives_its_node_does_no_harm(rig: RayRig, tmp_path: Path) -> None:
    node = rig.add_node(THIRD, third=2)
    job = scripted.work(scripted.waits_on_host, folder=str(tmp_path), host=THIRD)
    rules = AttemptRules(silence_seconds=5, twin_seconds=3)
    try:
        with RayRunner(4, rules=rules) as runner, beside(lambda: kill_busy_node(node, tmp_path, orphans=True)):
            assert ordinals(runner, job) == list(range(8))
    finally:
        (tmp_path / "go").touch()
        for mark in tmp_path.glob("pid-*"):
            kill(int(mark.read_text()))
        rig.remove(node)


@pytest.mark.usefixtures("rig")
def test_progress_comes_while_a_task_runs() -> None:
    job = scripted.work(scripted.steps, count=10, seconds=0.2)
    with RayRunner(1) as runner:
        assert ordinals(runner, job, TASKS[:1]) == [0]
    assert len(job.booked) >= 3
    assert max(rows for rows, _ in job.booked) < TASKS[0].physical_rows


@pytest.mark.nightly
def test_a_node_that_joins_later_takes_tasks(rig: RayRig) -> None:
    job = scripted.work(scripted.threads)
    with RayRunner(2, remote_args={"resources": {"late": 1}}) as runner, ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: list(runner.run(job, TASKS[:2])))
        node = rig.add_node(THIRD, late=1)
        try:
            assert [host for host, _ in running.result(timeout=100)] == [THIRD, THIRD]
        finally:
            rig.remove(node)


def run_a_task(runner: RayRunner) -> None:
    list(runner.run(scripted.work(scripted.ordinal), TASKS[:1]))


def hold_a_part(runner: RayRunner) -> None:
    RayParts(runner.cluster, Numbers, 100, 1).close()


@pytest.mark.parametrize("work", [hold_a_part, pytest.param(run_a_task, marks=pytest.mark.nightly)])
def test_a_node_that_joins_later_with_other_packages_is_refused(
    rig: RayRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[RayRunner], None]
) -> None:
    (tmp_path / "faiss.py").write_text("__version__ = '0.1'")
    with RayRunner(2, remote_args={"resources": {"late": 1}}) as runner, ThreadPoolExecutor(1) as pool:
        running = pool.submit(work, runner)
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
            node = rig.add_node(THIRD, late=1)
        try:
            with pytest.raises(WorkerMismatch, match=f"node {os.uname().nodename}.*: faiss is 0.1"):
                running.result(timeout=100)
        finally:
            rig.remove(node)


@pytest.mark.usefixtures("rig")
def test_workers_get_what_was_asked_for() -> None:
    with RayRunner(2, remote_args={"num_cpus": 2}) as runner:
        assert list(runner.run(scripted.work(scripted.threads), TASKS[:1])) == [(SECOND, 2)]
    with RayRunner(2, remote_args={"num_cpus": 0.5, "resources": {"second": 1}}) as runner:
        assert list(runner.run(scripted.work(scripted.threads), TASKS[:2])) == [(SECOND, 1)] * 2


@pytest.mark.usefixtures("rig")
def test_a_task_larger_than_every_node_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with RayRunner(2, remote_args={"num_cpus": 64}) as runner:
        # Said as soon as it is known, not when the time for nodes to join is over.
        assert re.search(r"large enough for a worker of 64 CPU; the largest, .* has 2 CPU.* Waiting 300 s", caplog.text)
        # Not earlier: a busy machine needs its time to connect.
        runner.cluster.rules = AttemptRules(start_seconds=1)
        with pytest.raises(ClusterUnreachable, match=r"room for a worker of 64 CPU: .* 2 CPU"):
            list(runner.run(scripted.work(scripted.ordinal), TASKS))


@pytest.mark.usefixtures("rig")
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("__version__ = '0.1'", "faiss is 0.1, here"),
        pytest.param("raise ImportError('no libomp')", "not importable .*no libomp", marks=pytest.mark.nightly),
    ],
)
def test_other_packages_are_found_before_work_starts(tmp_path: Path, source: str, words: str) -> None:
    (tmp_path / "faiss.py").write_text(source)
    environment = {"env_vars": {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}}
    with pytest.raises(WorkerMismatch, match=words) as caught:
        RayRunner(2, remote_args={"runtime_env": environment}).connect()
    assert caught.value.node.startswith(os.uname().nodename)
    same = {text for text in caught.value.expected if text.startswith("lance ")}
    assert same
    assert same <= set(caught.value.found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_retries": 5}, "cannot have 'max_retries'"),
        ({"num_cpu": 1}, "cannot have 'num_cpu'"),
        ({"num_cpus": -1}, "cannot be used"),
        ({"memory": "8 GB"}, "cannot be used"),
        ({"resources": {"CPU": 1}}, "cannot be used"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        RayRunner(2, remote_args=given)
    assert caught.value.parameter == "ray_remote_args"


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExtraMissing, match=r"lance-dfaiss\[ray\]") as caught:
        RayRunner(2)
    assert caught.value.extra == "ray"


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "nonsense"])
def test_no_cluster_at_the_address(address: str) -> None:
    with pytest.raises(ClusterUnreachable, match="no Ray cluster at") as caught:
        RayRunner(2, address).connect()
    assert caught.value.address == address


def test_a_cluster_is_joined_at_its_address_and_left_running(apart: RayRig) -> None:
    import ray

    for _ in range(2):
        with RayRunner(2, apart.address) as runner:
            assert ordinals(runner, scripted.work(scripted.ordinal)) == list(range(8))
        assert not ray.is_initialized()


def test_another_address_than_the_one_of_the_connection_is_refused(rig: RayRig) -> None:
    with RayRunner(1, rig.address) as runner:
        assert ordinals(runner, scripted.work(scripted.ordinal)) == list(range(8))
    with pytest.raises(InvalidArgument, match="connected to the Ray cluster at"):
        RayRunner(1, "127.0.0.9:6379").connect()


@pytest.mark.nightly
@pytest.mark.usefixtures("apart")
def test_without_an_address_a_cluster_is_started_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with RayRunner(2) as runner:
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        assert [node["NodeManagerAddress"].startswith("127.") for node in nodes] == [True]
        assert ordinals(runner, scripted.work(scripted.ordinal)) == list(range(8))
    assert not ray.is_initialized()


# Parts.


@pytest.mark.usefixtures("rig")
def test_parts_are_called_at_once_one_by_one_and_keep_results() -> None:
    with RayRunner(2) as runner, RayParts(runner.cluster, Numbers, 100, 2) as parts:
        assert parts.count == 2
        assert parts.each("total") == [sum(range(0, 100, 2)), sum(range(1, 100, 2))]
        assert parts.each("total", per_part=[(1,), (2,)]) == [2451, 2502]
        assert parts.one(1, "total", 5) == 2505
        parts.setup("scale", np.full(20_000, 2.0))
        kept = parts.keep("scaled")
        assert parts.one(0, "joined", Held(kept), kept[1:]) == 2 * (sum(range(100)) + sum(range(1, 100, 2)))
        assert len(set(parts.each("pid"))) == 2


@pytest.mark.usefixtures("rig")
def test_a_part_that_dies_begins_anew_with_its_setups(tmp_path: Path) -> None:
    with RayRunner(2) as runner, RayParts(runner.cluster, Numbers, 100, 2) as parts:
        parts.setup("scale", np.array([5.0]))
        parts.setup("scale", np.array([3.0]))
        before = parts.each("pid")
        assert parts.each("dies", str(tmp_path)) == [50, 50]
        assert len(set(before) & set(parts.each("pid"))) == 1
        assert sum(parts.each("total")) == 3 * sum(range(100))


@pytest.mark.usefixtures("rig")
def test_errors_of_a_part_come_as_they_are() -> None:
    with RayRunner(2) as runner, RayParts(runner.cluster, Numbers, 100, 2) as parts:
        with pytest.raises(InvalidVectors, match="bad rows") as refused:
            parts.each("refuses")
        assert type(refused.value) is InvalidVectors
        assert isinstance(refused.value.__cause__, TaskFailed)
        with pytest.raises(TaskFailed, match=r"part 1 of the training sample, fails on .* ZeroDivisionError") as failed:
            parts.one(1, "fails")
        assert "_fails_here" in failed.value.worker_traceback
        assert sum(parts.each("total")) == sum(range(100))


@pytest.mark.nightly
def test_kept_results_of_a_dead_node_are_computed_again(rig: RayRig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.add_node(THIRD)
    try:
        with RayRunner(4) as runner, RayParts(runner.cluster, Numbers, 100, 4) as parts:
            parts.setup("scale", np.array([3.0]))
            kept = parts.keep("large", 50_000)
            hosts = parts.each("host")
            assert THIRD in hosts
            # The three cores that are left are taken: the part has to share one, and nothing is waited for.
            monkeypatch.setattr("lance_dfaiss.build.ray_parts._ROOM_SECONDS", 10_000.0)
            kill_node(node)
            asked = next(index for index, host in enumerate(hosts) if host != THIRD)
            assert parts.one(asked, "joined", Held(kept), []) == 3.0 * 50_000 * parts.count
            assert THIRD not in parts.each("host")
    finally:
        rig.remove(node)
