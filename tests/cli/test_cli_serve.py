"""`serve`, `query`, `status`, `reload` and `rollback --cluster-file`, with servers that are processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.cli.edge import in_command_words
from lance_dfaiss.cli.options import TrustedAccess
from lance_dfaiss.cli.serve import LimitFlags, SafetyFlags, WhatFlags, _serve_options
from lance_dfaiss.errors import AccessDenied, InvalidArgument
from lance_dfaiss.launch import ServeOptions
from lance_dfaiss.serve.cluster import read_cluster
from tests.cli.helpers import ENVIRONMENT, document, invoke, program, vectors, write
from tests.waiting import SECONDS, gone, until


class Serving:
    """A `serve` that is ready."""

    def __init__(self, process: subprocess.Popen[str], started: Any) -> None:
        self.process = process
        self.file: str = started["cluster_file"]
        self.pids: list[int] = list(started["pids"].values())


@contextmanager
def serving(*arguments: str) -> Iterator[Serving]:
    """Run `serve` as a program, until the block ends; what it logs goes to its stderr."""
    command = program("--log-level", "error", "serve", *arguments, "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line == "}\n":
                    break
            yield Serving(process, json.loads("".join(lines)))
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write(tmp_path_factory.mktemp("words"))
    for partitions in ("2", "4"):
        invoke("build", path, "vector", "--index-type", "IVF_FLAT", "--num-partitions", partitions, "--num-shards", "3",
               "--replace")  # fmt: skip
    return path


@pytest.fixture(scope="module")
def cluster(words: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    file = str(tmp_path_factory.mktemp("cluster") / "cluster.json")
    with serving(words, "--servers", "3", "--cluster-file", file, "--refresh", "0", "--payload", "word") as found:
        yield found


def test_query_finds_what_search_finds(cluster: Serving, words: str) -> None:
    for options in (
        ["--like-row", "3", "-k", "4"],
        ["--vector", "1,2,3,4,5,6,7,8", "--filter", "id < 300", "--columns", "id"],
        ["--like-row", "7", "--radius", "5", "--nprobe", "4"],
    ):
        expected, found = document("search", words, *options), document("query", cluster.file, *options)
        assert len(expected["rows"]) > 0
        assert found.pop("coverage") == 1
        for one, other in zip(expected.pop("rows"), found.pop("rows"), strict=True):
            assert other.pop("_distance") == pytest.approx(one.pop("_distance"), abs=1e-4)
            assert other == one
        assert found == expected
    explained = document("query", cluster.file, "--like-row", "3", "--explain")
    assert {stage["group"] for stage in explained["stages"] if stage["name"] == "scan"} == {0, 1, 2}


def test_query_takes_many_queries_from_a_file(cluster: Serving, tmp_path: Path) -> None:
    np.save(tmp_path / "q.npy", vectors()[:2])
    out, _ = invoke("query", cluster.file, "--vector-file", str(tmp_path / "q.npy"), "-k", "1", "--columns", "id")
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["0", "1"]
    _, err = invoke("query", cluster.file, "--vector-file", str(tmp_path / "q.npy"), "--radius", "1", expect=2)
    assert "--radius takes one query" in err


def test_what_is_wrong_with_a_query_is_said(cluster: Serving) -> None:
    for options, said in (
        (["--vector", "1,2"], "dimension 8"),
        (["--like-row", "3", "--columns", "none"], "no column 'none'"),
        (["--like-row", "3", "--index", "other"], "no index 'other'"),
        (["--like-row", "3", "--filter", "id >"], "filter"),
        (["--like-row", "3", "--tls-ca", "none.pem"], "CA file 'none.pem'"),
    ):
        _, err = invoke("query", cluster.file, *options, expect=1)
        assert err.startswith("error: ")
        assert said in err
    assert "exactly one of" in invoke("query", cluster.file, expect=2)[1]
    assert "--tls-key needs" in invoke("query", cluster.file, "--like-row", "1", "--tls-key", "k", expect=2)[1]


def test_remedies_name_the_options_of_the_command_line() -> None:
    assert in_command_words("Pass token=... to connect") == "Pass --token-file to connect"
    assert in_command_words("pass allow_partial= to take it") == "pass --allow-partial to take it"
    assert in_command_words("Pass index=, one of a, b") == "Pass --index, one of a, b"


def test_a_start_that_is_interrupted_leaves_no_server(words: str, tmp_path: Path) -> None:
    command = program("--log-level", "info", "serve", words, "--cluster-file", str(tmp_path / "c.json"))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        until(lambda: bool(children(process.pid)))
        pids = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert "interrupted" in process.stderr.read()
    assert process.returncode == 130
    until(lambda: all(map(gone, pids)))


def children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def test_status_shows_servers_and_indexes(cluster: Serving) -> None:
    found = document("status", cluster.file)
    assert [server["pid"] for server in found["servers"]] == cluster.pids
    assert [group["ready"] for group in found["groups"]] == [True] * 3
    [index] = found["indexes"]
    assert (index["index"], index["rows"], index["coverage"]) == ("vector_idx", 599, 1)
    out, _ = invoke("status", cluster.file)
    assert "3 servers in 3 groups, layout 1: all of it is served" in out
    assert out.count(" ready ") == 3


def test_reload_moves_all_servers_to_one_version(cluster: Serving) -> None:
    before = document("status", cluster.file)["indexes"][0]["version"]
    moved = document("reload", cluster.file, "--version", "2")
    assert [(each["server"], each["version"], each["error"]) for each in moved["servers"]] == [
        (server, 2, None) for server in range(3)
    ]
    assert document("status", cluster.file)["indexes"][0]["version"] == 2
    # A server that is started again starts there, too.
    assert read_cluster(cluster.file).indexes[0].version == 2
    out, err = invoke("reload", cluster.file, "--version", "1", expect=1)
    assert (out.count("failed"), err) == (3, "")
    assert out.count("no index 'vector_idx'") == 3
    assert {each["version"] for each in document("reload", cluster.file)["servers"]} == {before}
    assert "no index 'other'" in invoke("reload", cluster.file, "--index", "other", expect=1)[1]


def test_rollback_takes_the_cluster_along(cluster: Serving, words: str, fresh: str) -> None:
    rolled = document("rollback", words, "--cluster-file", cluster.file)
    assert [each["version"] for each in rolled["servers"]] == [rolled["version"]] * 3
    [index] = document("status", cluster.file)["indexes"]
    assert (index["version"], index["generation"]) == (rolled["version"], rolled["generation"])
    invoke("build", fresh, "vector", "--index-type", "FLAT")
    _, err = invoke("rollback", fresh, "--cluster-file", cluster.file, expect=1)
    assert "does not serve index 'vector_idx'" in err
    assert "--tls-ca without --cluster-file" in invoke("rollback", words, "--tls-ca", "x", expect=2)[1]


def test_servers_that_follow_are_held_by_reload_and_not_by_rollback(fresh: str, tmp_path: Path) -> None:
    for partitions in ("2", "4"):
        invoke("build", fresh, "vector", "--index-type", "IVF_FLAT", "--num-partitions", partitions, "--replace")
    with serving(fresh, "--cluster-file", str(tmp_path / "c.json"), "--no-http") as found:
        [before] = document("status", found.file)["indexes"]
        document("reload", found.file, "--version", str(before["version"]))
        assert read_cluster(found.file).versions == {"vector_idx": before["version"]}
        [rolled] = document("rollback", fresh, "--cluster-file", found.file)["servers"]
        assert rolled["version"] > before["version"]
        assert read_cluster(found.file).versions == {"vector_idx": None}


def test_a_killed_server_is_back_at_its_address(cluster: Serving) -> None:
    def pids() -> list[int | None]:
        with_reply = json.loads(invoke_any("status", cluster.file, "--json"))["servers"]
        return [server.get("pid") if server["ready"] else None for server in with_reply]

    before = pids()
    os.kill(cluster.pids[1], signal.SIGKILL)
    until(lambda: None not in pids() and pids() != before)
    after = pids()
    assert (after[0], after[2]) == (before[0], before[2])
    assert len(document("query", cluster.file, "--like-row", "3")["rows"]) == 10


def invoke_any(*arguments: str) -> str:
    """Run a command whose exit status may be 0 or 1."""
    done = subprocess.run(program(*arguments), capture_output=True, text=True, check=False, timeout=60, env=ENVIRONMENT)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def test_servers_end_with_serve(words: str, tmp_path: Path) -> None:
    with serving(words, "--cluster-file", str(tmp_path / "c.json"), "--no-http") as found:
        [pid] = found.pids
        assert not gone(pid)
        found.process.terminate()
        assert found.process.wait(SECONDS) == 0
        assert gone(pid)
    out, _ = invoke("status", found.file, expect=1)
    assert "nobody answers for group 0" in out
    _, err = invoke("query", found.file, "--like-row", "1", "--timeout", "0.5", expect=1)
    assert "no server answers" in err


def test_servers_can_be_started_by_hand(words: str, tmp_path: Path) -> None:
    file = str(tmp_path / "c.json")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, http_port = one.getsockname()[1], two.getsockname()[1]
    places = ["--address", f"127.0.0.1:{port}/{http_port}", "--address", "[::1]:9"]
    written = document("serve", words, "--cluster-file", file, "--replicas", "2", *places)
    assert (written["epoch"], [server["host"] for server in written["servers"]]) == (1, ["127.0.0.1", "::1"])
    # Written again, those who stay keep their ids.
    again = document("serve", words, "--cluster-file", file, *places[:2], "--address", "127.0.0.1:9", "--replicas", "2")
    assert (again["epoch"], [server["id"] for server in again["servers"]]) == (2, [0, 2])
    command = program("serve", "--cluster-file", file, "--server-id", "0")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            until(lambda: _ready(http_port))
            with lance_dfaiss.connect(file) as client:
                assert client.knn(vectors()[:1], 1)[1].shape == (1, 1)
            assert "server 1" not in invoke("status", file)[0]
        finally:
            process.terminate()
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == 0
    assert f"server 0: listening on 127.0.0.1:{port}, ready" in log
    assert "server 0: stopped" in log


def _ready(http_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/readyz", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_what_keeps_servers_from_starting_is_said(words: str, fresh: str, tmp_path: Path) -> None:
    file = str(tmp_path / "c.json")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        invoke("serve", words, "--cluster-file", file, "--address", f"127.0.0.1:{port}")
        _, err = invoke("serve", "--cluster-file", file, "--server-id", "0", expect=1)
        assert f"port {port} of 127.0.0.1 is taken" in err
    (tmp_path / "half.json").write_text('{"format": 1, "ser')
    for arguments, said in (
        ([str(tmp_path / "none.lance"), "--cluster-file", file], "none.lance"),
        ([fresh, "--cluster-file", file], "has no index"),
        ([words, "--index", "other", "--cluster-file", file], "no index 'other'"),
        ([words, "--cluster-file", str(tmp_path / "half.json")], "half.json: $: not JSON"),
        (["--cluster-file", str(tmp_path / "half.json"), "--server-id", "0"], "half.json: $: not JSON"),
        (["--cluster-file", str(tmp_path / "gone.json"), "--server-id", "0"], "there is no such file"),
        (["--cluster-file", file, "--server-id", "5"], "there is no server 5"),
        ([words, "--cluster-file", file, "--host", "0.0.0.0"], "can be reached from other machines"),
        ([words, "--cluster-file", file, "--token-file", str(tmp_path / "none")], "token file"),
    ):
        _, err = invoke("serve", *arguments, expect=1)
        assert err.startswith("error: ")
        assert said in err


def test_memory_that_is_too_small_is_refused_with_the_numbers(words: str, tmp_path: Path) -> None:
    arguments = ["serve", words, "--cluster-file", str(tmp_path / "c.json"), "--memory-limit", "1MB"]
    done = subprocess.run(program(*arguments), capture_output=True, text=True, check=False, timeout=60, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "of 1,000,000 are used" in done.stderr
    assert "error: server 0 cannot serve" in done.stderr


def test_options_that_contradict_each_other_are_wrong_usage(words: str, tmp_path: Path) -> None:
    file = ["--cluster-file", str(tmp_path / "c.json")]
    for arguments, said in (
        ([words], "--cluster-file"),
        (file, "say which DATASET"),
        ([words, "--server-id", "0", "--servers", "2", *file], "leave out DATASET, --servers"),
        ([words, "--address", "a:1", "--port", "4", *file], "leave out --port"),
        ([words, "--address", "a", *file], "--address must be"),
        ([words, "--also", "b", *file], "--also must be"),
        ([words, "--also", f"{words}:vector_idx", *file], "two indexes would be called 'vector_idx'"),
        ([words, "--no-http", "--http-port", "4000", *file], "--no-http and --http-port"),
        ([words, "--tls-cert", "x", *file], "need each other"),
        ([words, "--tls-client-ca", "x", *file], "--tls-client-ca needs"),
        ([words, "--memory-limit", "much", *file], "is not a size"),
        ([words, "--replicas", "2", *file], "--replicas 2 needs as many --servers"),
        (["--server-id", "x", *file], "--server-id must be"),
    ):
        assert said in " ".join(invoke("serve", *arguments, expect=2)[1].split())


def test_every_flag_becomes_its_option() -> None:
    what = WhatFlags(payload="a, b", filter_columns="c", columns="d,e,")
    limits = LimitFlags(
        threads=3,
        memory_limit="1GB",
        max_k=17,
        max_queries=19,
        queue=23,
        filter_timeout=2.5,
        filter_memory="29MiB",
        grace=31.0,
        cache_dir="/folder",
        cache_bytes="37MiB",
    )
    safety = SafetyFlags(
        tls_cert="cert", tls_key="key", tls_client_ca="ca", token_file="token", admin_token_file="admin"
    )
    access = TrustedAccess(storage_option=["k=v"], allow_index_uri=["s3://b/x"])
    assert None not in {**vars(limits), **vars(safety)}.values()  # a new flag has to be added here, too
    options = _serve_options(what, limits, safety, access)
    assert options == ServeOptions(
        payload=("a", "b"),
        filter_columns=("c",),
        columns=("d", "e"),
        threads=3,
        memory_limit_bytes=10**9,
        max_k=17,
        max_queries=19,
        max_waiting=23,
        filter_seconds=2.5,
        filter_bytes=29 * 2**20,
        grace_seconds=31.0,
        cache_dir="/folder",
        cache_bytes=37 * 2**20,
        tls_cert="cert",
        tls_key="key",
        tls_client_ca="ca",
        token_file="token",
        admin_token_file="admin",
        storage_options={"k": "v"},
        allowed_index_uris=("s3://b/x",),
        log_level=options.log_level,
    )


def test_flags_reach_the_servers(words: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, http_port = one.getsockname()[1], two.getsockname()[1]
    flags = ["--also", f"other={words}:vector_idx", "--threads", "1", "--max-k", "7", "--columns", "id,vector",
             "--host", "localhost", "--port", str(port), "--http-port", str(http_port), "--refresh", "7.5"]  # fmt: skip
    with serving(words, "--index", "vector_idx", "--cluster-file", str(tmp_path / "c.json"), *flags) as found:
        cluster = read_cluster(found.file)
        [entry] = cluster.servers
        assert (entry.host, entry.port, entry.http_port) == ("localhost", port, http_port)
        assert cluster.refresh_seconds == 7.5
        assert _ready(http_port)
        with lance_dfaiss.connect(found.file, index="other") as client:
            assert client.status()[0]["threads"] == 1
            assert client.knn(vectors()[:1], 7)[1].shape == (1, 7)
            with pytest.raises(InvalidArgument, match="k"):
                client.knn(vectors()[:1], 8)
            with pytest.raises(AccessDenied, match="'word'"):
                client.search(vectors()[0], 1, columns=["word"])
        out, _ = invoke("query", found.file, "--index", "vector_idx", "--like-row", "3", "-k", "1")
        assert "word" not in out.splitlines()[0]


def test_the_id_of_a_server_comes_from_the_name_of_its_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = ["--cluster-file", str(tmp_path / "c.json")]
    write_cluster_of(tmp_path / "c.json")
    monkeypatch.setattr(socket, "gethostname", lambda: "words-17.words.svc")
    assert "there is no server 17" in invoke("serve", "--server-id", "from-hostname", *file, expect=1)[1]
    monkeypatch.setenv("LANCE_DFAISS_SERVER_ID", "9")
    assert "there is no server 9" in invoke("serve", *file, expect=1)[1]
    monkeypatch.setattr(socket, "gethostname", lambda: "words")
    assert "ends with no number" in invoke("serve", "--server-id", "from-hostname", *file, expect=2)[1]


def write_cluster_of(file: Path) -> None:
    from lance_dfaiss.serve.cluster import ServedIndex, plan_cluster, write_cluster

    index = ServedIndex(name="a", dataset="/a.lance", index="a")
    write_cluster(file, plan_cluster([index], [("127.0.0.1", 4000, None)]))
