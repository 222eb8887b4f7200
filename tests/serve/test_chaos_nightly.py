"""The same as in ``test_chaos.py``, for every server, longer, and with the aims that a busy machine may miss."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.launch import LocalCluster
from tests.serve.chaos import (
    Load,
    OnHosts,
    Place,
    Words,
    assert_recovered,
    first_over_median,
    overload_a_server,
    stopped,
    swap_under_load,
)
from tests.serve.hosts import Hosts, lacking
from tests.serve.inprocess import until

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]
NO_HOSTS = lacking()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def words(place: Place) -> Words:
    return Words(place)


@pytest.fixture
def cluster(place: Place, tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(
        place.served, servers=4, replicas=2, cluster_file=tmp_path / "c.json", refresh_seconds=0.0, http=False
    ) as started:
        yield started


def test_each_server_may_be_killed_and_stopped(cluster: LocalCluster, place: Place, words: Words) -> None:
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
    assert not load.problems(words)


def test_any_server_may_be_killed_at_any_time(cluster: LocalCluster, place: Place, words: Words) -> None:
    # Also one that has just come back, but never two of one group at once.
    rng = np.random.default_rng(7)
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place, per_second=100.0) as load:
        for _ in range(25):
            os.kill(cluster.pids[int(rng.integers(4))], signal.SIGKILL)
            load.wait_more(float(rng.uniform(0.0, 0.5)))
            assert cluster.wait_ready(60)
            until(lambda: sum(map(len, client.stats().servers_by_group)) == 4)
    assert not load.problems(words)


def test_rolling_restarts(cluster: LocalCluster, place: Place, words: Words) -> None:
    with lance_dfaiss.connect(cluster.cluster_file) as client, Load(client, place, threads=8) as load:
        for _ in range(3):
            cluster.rolling_restart()
    assert not load.problems(words)


@pytest.mark.skipif(bool(NO_HOSTS), reason=NO_HOSTS)
def test_each_host_may_be_cut_off(place: Place, words: Words, tmp_path: Path) -> None:
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
        assert not load.problems(words)


@pytest.mark.parametrize("swaps", [20, 100])
def test_swaps(tmp_path: Path, swaps: int) -> None:
    swap_under_load(tmp_path, swaps=swaps)


def test_overload(tmp_path: Path) -> None:
    overload_a_server(tmp_path, seconds=30.0)


def test_first_queries(cluster: LocalCluster, place: Place) -> None:
    assert np.median([first_over_median(cluster, place, turn % 4) for turn in range(9)]) <= 2.0
