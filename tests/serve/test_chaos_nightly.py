"""The same as in ``test_chaos.py``, for every server, longer, and with the aims that a busy machine may miss."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.launch import LocalCluster, ServeOptions
from tests.serve.chaos import (
    Load,
    OnHosts,
    Place,
    Truth,
    assert_recovered,
    first_over_median,
    overload_a_server,
    stopped,
    swap_under_load,
)
from tests.serve.hosts import Hosts, lacking
from tests.waiting import until

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
NO_HOSTS = lacking()
KINDS = ("knn", "knn", "batch", "search", "knn", "filter", "knn", "large", "range", "knn")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def truth(place: Place) -> Truth:
    return Truth(place)


@pytest.fixture
def cluster(place: Place, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(
        place.served, servers=4, replicas=2, cluster_file=tmp_path / "c.json", refresh_seconds=0.0, http=False
    ) as started:
        yield started


def test_each_server_may_be_killed_and_stopped(cluster: LocalCluster, place: Place, truth: Truth) -> None:
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place) as load:
        for server in range(4):
            load.wait_more(3.0)
            os.kill(cluster.pids[server], signal.SIGKILL)
            moment = load.wait_more(6.0)
            assert_recovered(load, moment, f"kill -9 of server {server}")
            until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
            load.wait_more(3.0)
            with stopped(cluster.pids[server]):
                moment = load.wait_more(8.0)
                assert_recovered(load, moment, f"SIGSTOP of server {server}")
            until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
    assert not load.problems(truth)


def test_any_server_may_be_killed_at_any_time(cluster: LocalCluster, place: Place, truth: Truth) -> None:
    # Also one that has just come back, but never two of one group at once.
    rng = np.random.default_rng(7)
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place, per_second=100.0) as load:
        for _ in range(25):
            os.kill(cluster.pids[int(rng.integers(4))], signal.SIGKILL)
            load.wait_more(float(rng.uniform(0.0, 0.5)))
            assert cluster.wait_ready(60)
            until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
    assert not load.problems(truth)


def test_two_servers_of_different_groups_at_once(cluster: LocalCluster, place: Place, truth: Truth) -> None:
    layout = cluster.cluster.servers
    first = layout[0]
    second = next(entry for entry in layout if entry.group != first.group)
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place, kinds=KINDS) as load:
        load.wait_more(2.0)
        for entry in (first, second):
            os.kill(cluster.pids[entry.id], signal.SIGKILL)
        moment = load.wait_more(5.0)
        assert_recovered(load, moment, "kill -9 of a server of each group")
        until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
        with stopped(cluster.pids[first.id]), stopped(cluster.pids[second.id]):
            moment = load.wait_more(8.0)
            assert_recovered(load, moment, "SIGSTOP of a server of each group")
            # Who comes now finds the others.
            with lance_dfaiss.connect(cluster.cluster_file) as late:
                assert late.stats().coverage == 1.0
    assert not load.problems(truth)


def test_servers_that_join_and_leave(cluster: LocalCluster, place: Place, truth: Truth) -> None:
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place, kinds=KINDS) as load:
        load.wait_more(2.0)
        joined = [cluster.add_server().id for _ in range(2)]
        until(lambda: sum(map(len, client.stats().servers_by_group)) == 6)
        assert len(client.stats().servers_by_group) == 3
        os.kill(cluster.pids[joined[0]], signal.SIGKILL)
        load.wait_more(1.0)
        assert cluster.wait_ready(60)
        for server in (0, 3):
            cluster.remove_server(server)
        until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
        load.wait_more(1.0)
    assert not load.problems(truth)


def test_as_many_calls_as_there_can_be(cluster: LocalCluster, place: Place, truth: Truth) -> None:
    # Many threads without a pause, so that something is under way whenever something happens.
    with (
        lance_dfaiss.connect(cluster.cluster_file, connections=2) as client,
        Load(client, place, threads=32, per_second=1e6, kinds=KINDS) as load,
    ):
        for server in range(4):
            os.kill(cluster.pids[server], signal.SIGKILL)
            load.wait_more(1.0)
            assert cluster.wait_ready(60)
            until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
            with stopped(cluster.pids[server]):
                load.wait_more(2.0)
            until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
        cluster.rolling_restart()
    assert not load.problems(truth)


@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once(tmp_path: Path, seed: int) -> None:
    # Servers move by themselves, each when it comes to it, while rows come and go, and servers are killed or stopped.
    place, rng = Place(tmp_path), np.random.default_rng(seed)
    with (
        LocalCluster(
            place.served, servers=4, replicas=2, cluster_file=tmp_path / "c.json", refresh_seconds=0.7, http=False,
            options=ServeOptions(grace_seconds=2.0),
        ) as cluster,
        lance_dfaiss.connect(cluster.cluster_file) as client,
        Load(client, place, threads=6, kinds=KINDS) as load,
    ):  # fmt: skip
        for step in range(60):
            place.change(step)
            server = int(rng.integers(4))
            if step % 6 == 2:
                os.kill(cluster.pids[server], signal.SIGKILL)
            if step % 6 == 5:
                with stopped(cluster.pids[server]):
                    load.wait_more(float(rng.uniform(0.1, 2.0)))
            load.wait_more(float(rng.uniform(0.0, 0.7)))
            if step % 6 in (2, 5):
                assert cluster.wait_ready(60)
                until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
    assert not load.problems(Truth(place))
    assert len({seen.version for seen in load.seen}) > 20


def test_rolling_restarts(cluster: LocalCluster, place: Place, truth: Truth) -> None:
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place, threads=8) as load:
        for _ in range(3):
            cluster.rolling_restart()
    assert not load.problems(truth)


@pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS)
def test_each_host_may_be_cut_off(place: Place, truth: Truth, tmp_path: Path) -> None:
    with Hosts(5) as hosts, OnHosts(hosts, place, tmp_path) as servers:
        with hosts.inside(0):
            client = servers.connect()
        with client, Load(client, place) as load:
            for host in range(1, 5):
                load.wait_more(3.0)
                hosts.cut(host)
                moment = load.wait_more(8.0)
                assert_recovered(load, moment, f"cut link of host {host}")
                hosts.heal(host)
                until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
        assert not load.problems(truth)


@pytest.mark.parametrize("swaps", [20, 100])
def test_swaps(tmp_path: Path, swaps: int) -> None:
    swap_under_load(tmp_path, swaps=swaps)


def test_overload(tmp_path: Path) -> None:
    overload_a_server(tmp_path, seconds=30.0)


def test_first_queries(cluster: LocalCluster, place: Place) -> None:
    assert np.median([first_over_median(cluster, place, turn % 4) for turn in range(9)]) <= 2.0
