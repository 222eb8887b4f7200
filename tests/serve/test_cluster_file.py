"""The cluster file: what is wrong with one is told at once, and replacing it never shows half of it."""

from __future__ import annotations

import fcntl
import json
import os
import random
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.errors import ClusterFileInvalid, InvalidArgument, StorageError, UntrustedLocation
from lance_dfaiss.serve.cluster import (
    ClusterFile,
    ServedIndex,
    ServerEntry,
    existing_cluster,
    note_versions,
    plan_cluster,
    read_cluster,
    write_cluster,
)
from lance_dfaiss.serve.placement import place_fragment, place_shards

INDEX = ServedIndex(name="words", dataset="/data/words.lance", index="vector_idx")


def planned(count: int = 4, replicas: int = 2, weights: list[float] | None = None) -> ClusterFile:
    servers = [("127.0.0.1", 7_000 + number, 8_000 + number) for number in range(count)]
    return plan_cluster([INDEX], servers, replicas=replicas, refresh_seconds=5, weights=weights)


def stored(change: Callable[[dict[str, Any]], object] | None = None) -> bytes:
    """The bytes of a good file, or of one that was good before a change."""
    value = planned().to_json()
    if change is not None:
        change(value)
    return json.dumps(value).encode()


def problems_of(data: bytes, folder: Path) -> tuple[str, ...]:
    path = folder / "cluster.json"
    path.write_bytes(data)
    with pytest.raises(ClusterFileInvalid) as caught:
        read_cluster(path)
    error = caught.value
    assert error.location == str(path)
    assert str(path) in error.message
    assert error.remedy
    assert all(problem in error.message for problem in error.problems)
    return error.problems


def test_a_plan_numbers_servers_and_groups() -> None:
    cluster = planned(5, 2, [1, 2, 3, 0.5, 4])
    assert cluster.epoch == 1
    assert [server.id for server in cluster.servers] == [0, 1, 2, 3, 4]
    assert [server.group for server in cluster.servers] == [0, 1, 0, 1, 0]
    assert cluster.groups == 2
    assert cluster.weights_by_group() == (1.0, 0.5)
    assert cluster.server(3) == ServerEntry(id=3, host="127.0.0.1", port=7_003, http_port=8_003, group=1, weight=0.5)


def test_a_plan_wants_a_weight_for_each_server() -> None:
    with pytest.raises(InvalidArgument, match="2 servers, found 1"):
        planned(2, 1, [1.0])
    with pytest.raises(InvalidArgument, match="3 replicas"):
        planned(2, 3)


def test_layouts_do_not_change_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        planned().epoch = 2  # type: ignore[misc]


def test_an_unknown_server_is_refused_with_those_there_are() -> None:
    with pytest.raises(ClusterFileInvalid, match="no server 9 in epoch 1; there are 0, 1, 2, 3"):
        planned().server(9)
    with pytest.raises(ClusterFileInvalid, match="no server 9"):
        planned().without_server(9)


def test_ids_are_never_given_twice(tmp_path: Path) -> None:
    cluster, joined = planned(2, 1).with_server("10.0.0.9", 7_100, http_port=None, weight=2)
    assert (joined.id, joined.group, joined.weight, cluster.epoch) == (2, 2, 2.0, 2)
    assert cluster.server(2) is joined
    cluster = cluster.without_server(2)
    write_cluster(tmp_path / "c.json", cluster)
    again, joined = read_cluster(tmp_path / "c.json").with_server("10.0.0.9", 7_100, http_port=None)
    assert (joined.id, again.epoch) == (3, 4)


def test_without_a_server_its_group_is_kept_full() -> None:
    cluster = planned(5, 2)  # groups 0 1 0 1 0
    left = cluster.without_server(1)
    assert sorted(server.group for server in left.servers) == [0, 0, 1, 1]
    assert left.server(3).group == 1
    assert left.server(4).group == 1  # the one that joined last takes the place
    fewer = left.without_server(3)
    assert {server.group for server in fewer.servers} == {0}
    assert fewer.replicas == 2


def test_the_last_server_stays() -> None:
    cluster = planned(2, 2).without_server(0)
    assert cluster.groups == 1
    with pytest.raises(InvalidArgument, match="only one"):
        cluster.without_server(1)
    grown, joined = cluster.with_server("h", 1, http_port=None)
    assert (joined.id, joined.group, grown.groups) == (2, 0, 1)


names = st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable())


@given(
    st.lists(names, min_size=1, max_size=3, unique=True),
    st.lists(st.tuples(st.sampled_from(["a", "::1", "10.0.0.1"]), st.booleans()), min_size=1, max_size=7),
    st.integers(1, 3),
    st.lists(st.booleans(), max_size=4),
)
def test_what_is_written_is_read(
    indexes: list[str], hosts: list[tuple[str, bool]], replicas: int, changes: list[bool]
) -> None:
    served = [ServedIndex(name=name, dataset="s3://b/x", index=name, index_uri="s3://c/") for name in indexes]
    servers = [(host, 1 + 2 * at, 2 + 2 * at if http else None) for at, (host, http) in enumerate(hosts)]
    cluster = plan_cluster(served, servers, replicas=min(replicas, len(servers)), tls=True)
    for number, grow in enumerate(changes):
        if grow:
            cluster, _ = cluster.with_server("new", 100 + number, http_port=None)
        elif len(cluster.servers) > 1:
            cluster = cluster.without_server(cluster.servers[0].id)
    location = f"memory://{uuid.uuid4().hex}/cluster.json"
    write_cluster(location, cluster)
    assert read_cluster(location) == cluster
    assert ClusterFile.from_json(cluster.to_json()) == cluster


def test_a_cluster_may_move_only_when_told_to(tmp_path: Path) -> None:
    write_cluster(tmp_path / "c.json", replace(planned(), refresh_seconds=0))
    assert read_cluster(tmp_path / "c.json").refresh_seconds == 0


def test_a_file_by_hand_may_leave_out_what_has_a_default(tmp_path: Path) -> None:
    def strip(value: dict[str, Any]) -> None:
        del value["next_id"], value["indexes"][0]["index_uri"]
        for server in value["servers"]:
            del server["http_port"], server["weight"]

    path = tmp_path / "cluster.json"
    path.write_bytes(stored(strip))
    cluster = read_cluster(path)
    assert cluster.next_id == 4
    assert cluster.server(0).http_port is None
    assert cluster.server(0).weight == 1.0


def change_server(**facts: object) -> Callable[[dict[str, Any]], object]:
    return lambda value: value["servers"][2].update(facts)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_server(id=0), ["$.servers[2]: id 0 is taken by $.servers[0]"]),
        (change_server(port=7_001), ["$.servers[2]: port 7001 of '127.0.0.1' is taken by $.servers[1]"]),
        (change_server(http_port=7_001), ["$.servers[2]: port 7001 of '127.0.0.1' is taken by $.servers[1]"]),
        (change_server(http_port=7_002), ["$.servers[2]: port 7002 of '127.0.0.1' is taken by $.servers[2]"]),
        (change_server(port=0), ["$.servers[2].port: expected a port from 1 to 65535, found 0"]),
        (change_server(port=65_536), ["$.servers[2].port: expected a port from 1 to 65535, found 65536"]),
        (change_server(port=True), ["$.servers[2].port: expected a port from 1 to 65535, found true"]),
        (change_server(http_port="80"), ["$.servers[2].http_port: expected a port from 1 to 65535, found '80'"]),
        (change_server(host="a b"), ["$.servers[2].host: expected a host name or address, found 'a b'"]),
        (change_server(host="user@h"), ["$.servers[2].host: expected a host name or address, found 'user@h'"]),
        (change_server(weight=0), ["$.servers[2].weight: expected a weight from 0.001 to 1000, found 0"]),
        (change_server(group=-1), ["$.servers[2].group: expected a whole number from 0 to 2**64 - 1, found -1"]),
        (change_server(colour=1), ["$.servers[2].colour: this key is not known to this version"]),
        (
            change_server(group=3),
            ["$.servers: 3 groups must be numbered 0 to 2, but no server is in group 2"],
        ),
        (
            lambda value: [server.update(group=server["group"] + 2**50) for server in value["servers"]],
            ["$.servers: 2 groups must be numbered 0 to 1, but no server is in group 0, 1"],
        ),
        (lambda value: value.update(servers=[]), ["$.servers: expected at least one, found none"]),
        (lambda value: value.update(servers={}), ["$.servers: expected a list, found an object of 0 keys"]),
        (lambda value: value["servers"].append(None), ["$.servers[4]: expected an object, found null"]),
        (lambda value: value.update(indexes=[]), ["$.indexes: expected at least one, found none"]),
        (
            lambda value: value["indexes"].append(value["indexes"][0]),
            ["$.indexes[1]: name 'words' is taken by $.indexes[0]"],
        ),
        (lambda value: value.update(epoch=0), ["$.epoch: expected a whole number from 1 to 2**64 - 1, found 0"]),
        (lambda value: value.update(replicas=0), ["$.replicas: expected a whole number from 1 to 2**64 - 1, found 0"]),
        (
            lambda value: value.update(refresh_seconds=1e-9),
            ["$.refresh_seconds: expected 0 or a number of seconds from 0.01 to 1e+06, found 1e-09"],
        ),
        (lambda value: value.update(tls="yes"), ["$.tls: expected true or false, found 'yes'"]),
        (lambda value: value.pop("tls"), ["$: key 'tls' is missing"]),
        (lambda value: value.update(format=0), ["$.format: expected 1, found 0"]),
        (lambda value: value.update(format=2), ["$.format: expected 1, found 2, which a later release wrote"]),
    ],
)
def test_a_problem_is_told_with_its_place(
    change: Callable[[dict[str, Any]], object], expected: list[str], tmp_path: Path
) -> None:
    assert list(problems_of(stored(change), tmp_path)) == expected


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    def spoil(value: dict[str, Any]) -> None:
        value["epoch"] = "one"
        value["indexes"][0]["dataset"] = ""
        value["servers"][0]["port"] = 10**6
        value["servers"][3]["id"] = 1
        del value["servers"][2]["host"]

    assert [problem.partition(":")[0] for problem in problems_of(stored(spoil), tmp_path)] == [
        "$.indexes[0].dataset",
        "$.servers[0].port",
        "$.servers[2]",
        "$.servers[3]",
        "$.epoch",
    ]


def test_a_file_of_a_later_release_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_bytes(stored(lambda value: value.update(format=2)))
    with pytest.raises(ClusterFileInvalid, match="Upgrade lance-dfaiss"):
        read_cluster(path)


def test_any_half_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    whole = stored()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ClusterFileInvalid, match="If it is being written, read it again") as caught:
            read_cluster(path)
        assert len(caught.value.problems) == 1
    assert "empty" in problems_of(b"", tmp_path)[0]


@pytest.mark.parametrize(
    "data", [b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"{" * 100_000, b"[" * 100_000, b"NaN", b'{"epoch": 1e999}']
)
def test_other_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_bytes(data)
    with pytest.raises(ClusterFileInvalid) as caught:
        read_cluster(path)
    assert caught.value.problems


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5), st.data()
)
def test_no_value_anywhere_ends_otherwise(junk: object, data: st.DataObject) -> None:
    value = planned().to_json()
    where: Any = value
    while True:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else list(range(len(where)))))
        if not isinstance(where[key], (dict, list)) or data.draw(st.booleans()):
            break
        where = where[key]
    where[key] = junk
    cluster = None
    with suppress(ClusterFileInvalid):
        cluster = ClusterFile.from_json(value)
    if cluster is not None:
        assert ClusterFile.from_json(cluster.to_json()) == cluster
        assert len(cluster.weights_by_group()) == cluster.groups


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for location in (tmp_path / "none.json", tmp_path, f"memory://{uuid.uuid4().hex}/none.json"):
        with pytest.raises(ClusterFileInvalid, match=r"no such file|this is a folder") as caught:
            read_cluster(location)
        assert "serve --cluster-file" in caught.value.remedy
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(17 * 1024 * 1024)
    with pytest.raises(ClusterFileInvalid, match="this is another file"):
        read_cluster(big)


def test_a_place_that_cannot_be_used_is_a_storage_error(tmp_path: Path) -> None:
    write_cluster(tmp_path / "cluster.json", planned())
    below_a_file = tmp_path / "cluster.json" / "cluster.json"
    with pytest.raises(StorageError, match="Reading"):
        read_cluster(below_a_file)
    for location in (below_a_file, tmp_path / "no_folder" / "cluster.json"):
        with pytest.raises(StorageError, match="Writing"):
            write_cluster(location, planned())


@pytest.mark.parametrize("url", ["simplecache::memory://a/c.json", "filecache::/a"])
def test_chained_urls_are_refused(url: str) -> None:
    with pytest.raises(UntrustedLocation):
        read_cluster(url)
    with pytest.raises(UntrustedLocation):
        write_cluster(url, planned())


def test_unknown_protocols_and_empty_locations_are_refused() -> None:
    for location in ("nosuch://a/c.json", ""):
        with pytest.raises(InvalidArgument):
            read_cluster(location)


def test_file_urls_and_links_lead_to_the_file(tmp_path: Path) -> None:
    real = tmp_path / "real" / "a b.json"
    real.parent.mkdir()
    write_cluster(f"file://{real.parent}/a%20b.json", planned())
    link = tmp_path / "link.json"
    link.symlink_to(real)
    write_cluster(link, planned().without_server(0))
    assert link.is_symlink()
    assert read_cluster(real).epoch == 2


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster.json"
    write_cluster(path, planned())
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError):
        write_cluster(path, planned().without_server(0))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["cluster.json"]


def test_a_wrong_layout_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    twice = replace(planned(), servers=planned().servers * 2)
    with pytest.raises(ClusterFileInvalid, match=r"to be written to .*id 0 is taken"):
        write_cluster(path, twice)
    with pytest.raises(ClusterFileInvalid, match="refresh_seconds"):
        write_cluster(path, replace(planned(), refresh_seconds=float("nan")))
    assert not path.exists()


@pytest.mark.parametrize("remote", [False, True])
def test_a_stale_copy_does_not_replace_a_newer_layout(remote: bool, tmp_path: Path) -> None:
    location = f"memory://{uuid.uuid4().hex}/cluster.json" if remote else str(tmp_path / "cluster.json")
    first = planned()
    with pytest.raises(ClusterFileInvalid, match="expected epoch 1 there, found no file"):
        write_cluster(location, first, expected_epoch=1)
    write_cluster(location, first, expected_epoch=0)
    with pytest.raises(ClusterFileInvalid, match="expected no file there, found epoch 1"):
        write_cluster(location, first, expected_epoch=0)
    write_cluster(location, first.without_server(0), expected_epoch=1)
    with pytest.raises(ClusterFileInvalid, match="expected epoch 1 there, found epoch 2"):
        write_cluster(location, first.without_server(1), expected_epoch=1)
    assert [server.id for server in read_cluster(location).servers] == [1, 2, 3]


def test_there_may_be_no_file_yet_but_not_another_one(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    assert existing_cluster(path) is None
    write_cluster(path, planned())
    assert existing_cluster(path) == planned()
    path.write_text("")
    for other in (path, tmp_path):
        with pytest.raises(ClusterFileInvalid):
            existing_cluster(other)


def test_versions_that_are_noted_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path, names, rounds = tmp_path / "cluster.json", "abc", 20
    indexes = [replace(INDEX, name=name) for name in names]
    write_cluster(path, plan_cluster(indexes, [("127.0.0.1", 4000, None)]))
    together, found = threading.Barrier(len(names)), []

    def note(name: str) -> None:
        for version in range(1, rounds + 1):
            together.wait(60)
            note_versions(path, {name: version, "unknown": 1})
            if together.wait(60) == 0:
                found.append(read_cluster(path).versions)

    threads = [threading.Thread(target=note, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [dict.fromkeys(names, version) for version in range(1, rounds + 1)]
    note_versions(path, {"a": None})
    assert read_cluster(path).versions == {"a": None, "b": rounds, "c": rounds}
    assert os.listdir(tmp_path) == ["cluster.json"]


def test_a_folder_that_somebody_keeps_locked_can_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance_dfaiss.storage.replaced._LOCK_SECONDS", 0.01)
    write_cluster(tmp_path / "cluster.json", planned())
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        note_versions(tmp_path / "cluster.json", {INDEX.name: 3})
    finally:
        os.close(folder)
    assert read_cluster(tmp_path / "cluster.json").versions == {INDEX.name: 3}


def test_readers_meet_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    cluster = planned()
    write_cluster(path, cluster)
    program = (
        "import sys\n"
        "from lance_dfaiss.serve.cluster import read_cluster\n"
        "seen = 0\n"
        "while seen < 60:\n"
        "    epoch = read_cluster(sys.argv[1]).epoch\n"
        "    assert epoch >= seen, (epoch, seen)\n"
        "    seen = epoch\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stderr=subprocess.PIPE, text=True) as reader:
        while reader.poll() is None:
            cluster = replace(cluster, epoch=cluster.epoch + 1)
            write_cluster(path, cluster)
        assert reader.stderr is not None
        assert (reader.returncode, reader.stderr.read()) == (0, "")


def test_credentials_in_a_url_are_not_shown() -> None:
    with pytest.raises(ClusterFileInvalid) as caught:
        read_cluster("memory://user:secret@host/none.json?token=secret")
    assert "secret" not in str(caught.value)
    assert "secret" not in caught.value.location


PROGRAM = """
import random, sys
from lance_dfaiss.serve.cluster import read_cluster
from lance_dfaiss.serve.placement import place_fragment, place_shards
weights = read_cluster(sys.argv[1]).weights_by_group()
draw = random.Random(5)
shards = [(f"{draw.getrandbits(256):064x}", draw.randint(1, 10**9)) for _ in range(60)]
print(place_shards(shards, weights), [place_fragment(number, weights) for number in range(60)])
"""


def test_another_process_places_by_the_file_as_its_writer_does(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    cluster = planned(7, 2, [1 / 3, 0.1, 1, 2.7, 1.1, 1e-3, 1e3])
    write_cluster(path, cluster)
    draw = random.Random(5)
    shards = [(f"{draw.getrandbits(256):064x}", draw.randint(1, 10**9)) for _ in range(60)]
    weights = cluster.weights_by_group()
    here = f"{place_shards(shards, weights)} {[place_fragment(number, weights) for number in range(60)]}\n"
    run = [sys.executable, "-c", PROGRAM, str(path)]
    for hash_seed in ("0", "9"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        there = subprocess.run(run, env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert there.stdout == here
