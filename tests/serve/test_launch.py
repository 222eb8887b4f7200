"""Servers as processes: started, watched, restarted, added, removed, and never left behind."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lance_dfaiss
from lance_dfaiss.errors import CannotServe, ClusterFileInvalid, DfaissError, InvalidArgument
from lance_dfaiss.launch import LocalCluster, RestartPolicy, ServeOptions
from lance_dfaiss.launch.notices import NoticeSocket, Notifier
from lance_dfaiss.launch.restarts import Life, State
from lance_dfaiss.launch.sockets import adopted, listen, sockets_from_systemd
from lance_dfaiss.serve.cluster import ServedIndex, plan_cluster, read_cluster, write_cluster
from tests.support import clustered, make_dataset
from tests.waiting import SECONDS, gone, until

ROWS, DIM = 3_000, 16
VECTORS = clustered(ROWS, DIM, 3)
POLICY = RestartPolicy()


# Decisions


def test_crashes_are_answered_with_growing_pauses_and_forgotten_after_a_steady_time() -> None:
    life, pauses = Life(State.STOPPED, 0.0).started(0.0).ready(1.0), []
    for _ in range(10):
        life = life.ended(-9, 2.0, POLICY)
        assert life.state is State.WAITING
        pauses.append(life.due - 2.0)
        life = life.started(2.0).ready(2.0)
    assert pauses[:4] == pytest.approx([0.2, 0.4, 0.8, 1.6])
    assert pauses[-1] == POLICY.longest_seconds
    recovered = life.ended(-9, 2.0 + POLICY.steady_seconds, POLICY)
    assert recovered.due - recovered.since == pytest.approx(0.2)


def test_a_server_that_ends_again_and_again_before_it_is_ready_is_given_up() -> None:
    life = Life(State.STOPPED, 0.0)
    states = []
    for _ in range(POLICY.early_ends):
        life = life.started(0.0).ended(1, 1.0, POLICY)
        states.append(life.state)
    assert states == [State.WAITING] * (POLICY.early_ends - 1) + [State.FAILED]
    # Having been ready in between, it has another few attempts.
    ready = Life(State.WAITING, 0.0, crashes=2, early=2).started(0.0).ready(1.0)
    assert ready.ended(1, 2.0, POLICY).started(2.0).ended(1, 3.0, POLICY).state is State.WAITING


def test_a_server_that_ends_in_order_stays_down_and_one_to_be_restarted_comes_back_at_once() -> None:
    ready = Life(State.STOPPED, 0.0).started(0.0).ready(1.0)
    assert ready.ended(0, 2.0, POLICY).state is State.STOPPED
    for status in (0, 1, -9):
        assert ready.told_to_stop(2.0).ended(status, 3.0, POLICY).state is State.STOPPED
        back = ready.told_to_restart(2.0).ended(status, 3.0, POLICY)
        assert (back.state, back.due) == (State.WAITING, 3.0)
    # One that comes up while it is told to stop does not count as ready.
    assert Life(State.STARTING, 0.0).told_to_stop(1.0).ready(2.0).state is State.STOPPING
    assert Life(State.WAITING, 0.0).told_to_stop(1.0).state is State.STOPPED
    assert Life(State.FAILED, 0.0).told_to_stop(1.0).state is State.FAILED
    assert Life(State.FAILED, 0.0).told_to_restart(1.0).state is State.WAITING


@given(st.lists(st.tuples(st.sampled_from(["ready", "end", "stop", "restart", "start"]), st.integers(-15, 3))))
def test_whatever_happens_a_server_told_to_stop_is_never_started_again(events: list[tuple[str, int]]) -> None:
    life, told = Life(State.STOPPED, 0.0).started(0.0), False
    for now, (event, status) in enumerate(events):
        if event == "ready":
            life = life.ready(now)
        elif event == "end" and life.runs:
            life = life.ended(status, now, POLICY)
        elif event == "stop":
            life, told = life.told_to_stop(now), True
        elif event == "restart" and not told:
            life = life.told_to_restart(now)
        elif event == "start" and life.state is State.WAITING:
            life = life.started(now)
        assert life.early <= POLICY.early_ends
        assert life.due - now <= POLICY.longest_seconds
        assert not (told and life.state in (State.WAITING, State.STARTING, State.READY))


# Sockets and notices


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_listen_takes_connections(host: str) -> None:
    with listen(host, 0) as sock, closing(socket.create_connection(sock.getsockname()[:2])) as client:
        accepted, _ = sock.accept()
        with accepted:
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"


def test_listen_says_what_is_wrong_and_what_to_do() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotServe, match=f"port {port} of 127.0.0.1 is taken.*another port"):
            listen("127.0.0.1", port)
    with pytest.raises(CannotServe, match=r"no such address.*0\.0\.0\.0"):
        listen("203.0.113.7", 0)
    with pytest.raises(CannotServe, match=r"no-such-host\.invalid.*resolved"):
        listen("no-such-host.invalid", 0)


def test_a_socket_that_is_handed_over_must_listen() -> None:
    with socket.socket() as idle:
        with pytest.raises(CannotServe, match="no TCP socket that listens"):
            adopted(idle.fileno())
        assert idle.fileno() >= 0  # still the caller's
    with open(os.devnull) as file, pytest.raises(CannotServe, match="no socket"):
        adopted(file.fileno())


def test_sockets_come_from_systemd_by_name() -> None:
    # A process of its own: the descriptors begin at 3, whatever that is here.
    code = """
import os, sys
from lance_dfaiss.launch.sockets import sockets_from_systemd
first, second = map(int, sys.argv[1:])
os.dup2(first, 103); os.dup2(second, 104); os.dup2(103, 3); os.dup2(104, 4)
given = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:requests"}
found = sockets_from_systemd(given)
print(given, *(f"{name}={sock.getsockname()[1]}" for name, sock in sorted(found.items())))
"""
    with listen("127.0.0.1", 0) as http, listen("127.0.0.1", 0) as requests:
        handed = [http.fileno(), requests.fileno()]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, handed)],
            pass_fds=handed, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        ports = f"http={http.getsockname()[1]} requests={requests.getsockname()[1]}"
    assert done.stdout.strip() == f"{{}} {ports}"
    # Those of another process are not ours.
    assert sockets_from_systemd({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == {}


def test_notices_bear_the_sender() -> None:
    with closing(NoticeSocket()) as listener:
        environment = {"NOTIFY_SOCKET": listener.address}
        notifier = Notifier(environment)
        assert not environment
        notifier.tell(READY=1, STATUS="all\nwell")
        assert list(listener.read()) == [(os.getpid(), {"READY": "1", "STATUS": "all well"})]
        assert list(listener.read()) == []
    notifier.tell(READY=1)  # nobody listens any more
    Notifier({}).tell(READY=1)


# Processes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> ServedIndex:
    path = tmp_path_factory.mktemp("launch") / "rows.lance"
    dataset = make_dataset(path, VECTORS, rows_per_fragment=ROWS // 3)
    lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", name="idx", num_partitions=8, num_shards=3)
    return ServedIndex(name="rows", dataset=str(path), index="idx")


@pytest.fixture(scope="module")
def cluster(served: ServedIndex, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    file = tmp_path_factory.mktemp("cluster") / "cluster.json"
    options = ServeOptions(threads=1)
    with LocalCluster([served], servers=2, replicas=2, cluster_file=file, options=options, refresh_seconds=0) as made:
        yield made
        pids = made.pids
    assert len(pids) == 2
    assert all(map(gone, pids.values()))


class Load:
    """A client that asks all the time."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.errors: list[DfaissError] = []
        self.answers = 0
        self._client = lance_dfaiss.connect(cluster.cluster_file)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            row = self.answers % ROWS
            try:
                distances, _ = self._client.knn(VECTORS[row], 1)
            except DfaissError as exc:
                self.errors.append(exc)
            else:
                assert distances[0, 0] == pytest.approx(0, abs=1e-3)
                self.answers += 1
            self._stop.wait(0.005)

    def goes_on(self) -> None:
        """Wait until some more queries are answered."""
        before = self.answers
        until(lambda: self.answers > before + 5 or bool(self.errors))


def test_the_cluster_answers_as_the_index_does(cluster: LocalCluster, served: ServedIndex) -> None:
    index = lance_dfaiss.open_index(served.dataset, served.index)
    with lance_dfaiss.connect(cluster.cluster_file) as client:
        expected, found = index.knn(VECTORS[:20], 5), client.knn(VECTORS[:20], 5)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_a_killed_server_comes_back_at_its_address_and_no_query_fails(cluster: LocalCluster) -> None:
    before, file = cluster.pids, read_cluster(cluster.cluster_file)
    with Load(cluster) as load:
        load.goes_on()
        os.kill(before[1], signal.SIGKILL)
        until(lambda: cluster.pids.get(1, before[1]) != before[1])
        assert cluster.wait_ready(SECONDS)
        load.goes_on()
        # With the other one gone, only the one that came back can answer.
        until(lambda: sum(len(members) for members in load._client.stats().servers_by_group) == 2)
        os.kill(before[0], signal.SIGKILL)
        load.goes_on()
        assert cluster.wait_ready(SECONDS)
    assert load.errors == []
    assert read_cluster(cluster.cluster_file) == file
    assert cluster.pids[1] != before[1]


def test_a_rolling_restart_fails_no_query(cluster: LocalCluster) -> None:
    before = cluster.pids
    with Load(cluster) as load:
        load.goes_on()
        cluster.rolling_restart()
        load.goes_on()
    assert load.errors == []
    assert not set(before.values()) & set(cluster.pids.values())


def test_servers_join_and_leave_under_load(cluster: LocalCluster) -> None:
    epoch = cluster.cluster.epoch
    with Load(cluster) as load:
        load.goes_on()
        joined = cluster.add_server()
        assert read_cluster(cluster.cluster_file).server(joined.id) == joined
        assert (cluster.cluster.epoch, set(cluster.pids)) == (epoch + 1, {0, 1, joined.id})
        load.goes_on()
        pid = cluster.pids[joined.id]
        cluster.remove_server(joined.id)
        load.goes_on()
    assert load.errors == []
    assert gone(pid)
    assert [entry.id for entry in read_cluster(cluster.cluster_file).servers] == [0, 1]


def test_the_file_of_a_cluster_that_runs_is_not_taken_over(cluster: LocalCluster, served: ServedIndex) -> None:
    before = Path(cluster.cluster_file).read_bytes()
    with pytest.raises(CannotServe, match=r"a cluster that runs.*another cluster file"):
        LocalCluster([served], cluster_file=cluster.cluster_file).start()
    assert Path(cluster.cluster_file).read_bytes() == before


def refused(served: ServedIndex, file: Path, **options: object) -> DfaissError:
    """Start one server in vain; return why."""
    quiet: list[str] = []
    cluster = LocalCluster([served], cluster_file=file, write_line=quiet.append, **options)  # type: ignore[arg-type]
    with pytest.raises(DfaissError) as caught:
        cluster.start()
    assert cluster.pids == {}
    return caught.value


def test_a_server_that_cannot_load_stops_the_start_and_says_why(served: ServedIndex, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    limit = ServeOptions(memory_limit_bytes=1_000_000)
    error = refused(served, file, options=limit)
    assert isinstance(error, CannotServe)
    assert "of 1,000,000 are used" in error.message
    assert "Give the server more memory" in error.message
    # The next attempt gets the next number, so that no client takes the failed one for the newer.
    assert "no index 'other'" in refused(replace(served, index="other"), file).message
    assert read_cluster(file).epoch == 2


def test_a_start_that_is_wrong_starts_nothing(served: ServedIndex, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    with listen("127.0.0.1", 0) as taken:
        assert "is taken" in refused(served, file, port=taken.getsockname()[1]).message
    assert "can be reached from other machines" in refused(served, file, host="0.0.0.0").message
    missing = ServeOptions(token_file=str(tmp_path / "none"))
    assert "token file" in refused(served, file, options=missing).message
    assert isinstance(refused(served, file, replicas=2), InvalidArgument)
    assert not file.exists()
    file.write_text('{"format": 1, "epo')
    assert isinstance(refused(served, file), ClusterFileInvalid)
    assert file.read_text() == '{"format": 1, "epo'
    with pytest.raises(InvalidArgument):
        LocalCluster([served], cluster_file=file, servers=0)


def test_the_error_of_a_server_process_arrives_as_it_is(served: ServedIndex, tmp_path: Path) -> None:
    # The server finds another cluster file than the one that its launcher wrote.
    file = tmp_path / "c.json"

    class Late(LocalCluster):
        def _orders(self, member: object) -> bytes:
            write_cluster(file, replace(plan_cluster([served], [("127.0.0.1", 1, None)]), epoch=9, next_id=8))
            file.write_text(file.read_text().replace('"id": 0', '"id": 7'))
            return super()._orders(member)  # type: ignore[arg-type]

    lines: list[str] = []
    with pytest.raises(ClusterFileInvalid, match="there is no server 0 in epoch 9; there are 7"):
        Late([served], cluster_file=file, write_line=lines.append).start()
    assert any(line.startswith("error: ") for line in lines)


def test_a_server_that_hangs_is_killed_when_the_cluster_stops(served: ServedIndex, tmp_path: Path) -> None:
    with LocalCluster([served], cluster_file=tmp_path / "c.json", stop_seconds=0.2, http=False) as cluster:
        [pid] = cluster.pids.values()
        os.kill(pid, signal.SIGSTOP)
    assert gone(pid)
    assert cluster.states == {0: State.STOPPED}
    cluster.stop()  # again, to no effect
    with pytest.raises(CannotServe, match="started already"):
        cluster.start()
    # Nobody would look after what these start, nor see it end.
    file = read_cluster(cluster.cluster_file)
    for change in (
        cluster.add_server,
        cluster.rolling_restart,
        lambda: cluster.restart(0),
        lambda: cluster.remove_server(0),
    ):
        with pytest.raises(CannotServe, match="was stopped"):
            change()
    assert (read_cluster(cluster.cluster_file), cluster.states) == (file, {0: State.STOPPED})


def test_servers_are_looked_after_by_a_process_with_many_open_files(served: ServedIndex, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2_048:
        pytest.skip("this machine does not allow so many")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2_048), hard))
    try:
        with ExitStack() as stack:
            while stack.enter_context(open(os.devnull)).fileno() < 1_100:
                pass
            cluster = stack.enter_context(LocalCluster([served], cluster_file=tmp_path / "c.json", http=False))
            assert cluster.states == {0: State.READY}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_cannot_be_started_is_tried_again(
    served: ServedIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, failures = subprocess.Popen, [BlockingIOError(11, "Resource temporarily unavailable")]

    def short_of_processes(*args: Any, **kwargs: Any) -> Any:
        if failures:
            raise failures.pop()
        return popen(*args, **kwargs)

    with LocalCluster([served], cluster_file=tmp_path / "cluster.json") as cluster:
        before = cluster.pids[0]
        monkeypatch.setattr(subprocess, "Popen", short_of_processes)
        os.kill(before, signal.SIGKILL)
        until(lambda: not failures and 0 in cluster.pids and cluster.pids[0] != before)
        assert cluster.wait_ready(60)


def test_servers_end_with_a_launcher_that_is_killed(served: ServedIndex, tmp_path: Path) -> None:
    code = """
import sys
from lance_dfaiss.launch import LocalCluster
from lance_dfaiss.serve.cluster import ServedIndex
index = ServedIndex(name="rows", dataset=sys.argv[1], index="idx")
with LocalCluster([index], cluster_file=sys.argv[2]) as cluster:
    print(*cluster.pids.values(), flush=True)
    cluster.wait()
"""
    command = [sys.executable, "-c", code, served.dataset, str(tmp_path / "c.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        [pid] = map(int, launcher.stdout.readline().split())
        assert not gone(pid)
        launcher.kill()
    until(lambda: gone(pid))
