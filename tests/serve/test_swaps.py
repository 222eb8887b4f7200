"""Servers follow a dataset that changes, under load: every answer is that of the version it names, whole and once."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

import lance_dfaiss
from lance_dfaiss.errors import StorageError
from lance_dfaiss.launch import control
from lance_dfaiss.machine import resident_bytes
from lance_dfaiss.serve import wire
from lance_dfaiss.serve.cluster import ServedIndex, note_versions, read_cluster, write_cluster
from lance_dfaiss.serve.holdings import MAX_SNAPSHOTS, HoldingOptions, Shelf
from tests.serve.inprocess import Cluster, Running, Settings, running
from tests.serve.rawclient import RawClient
from tests.support import Exact, assert_exact, clustered, fixed_size, make_dataset
from tests.waiting import until

DIM, ROWS, REFRESH = 8, 500, 0.1


def _table(ids: range, seed: int) -> pa.Table:
    number = pa.array([(7 * i) % 100 for i in ids], pa.int32())
    vectors = fixed_size(clustered(len(ids), DIM, seed))
    return pa.table({"id": pa.array(ids, pa.int64()), "vec": vectors, "number": number})


class World:
    """A dataset with an index, and what may happen to it."""

    def __init__(self, folder: Path, *, stable: bool = False, **asked: Any) -> None:
        self.uri = str(folder / "d")
        self._ids, self._seeds = ROWS, itertools.count(10)
        number = pa.array([(7 * i) % 100 for i in range(ROWS)], pa.int32())
        self.nprobe = None if asked.get("index_type") == "FLAT" else 4  # all lists: what is found is exact
        self._asked = {"index_type": "IVF_FLAT", "num_partitions": 4, "num_shards": 6, **asked}
        make_dataset(folder / "d", clustered(ROWS, DIM, 1), rows_per_fragment=50, stable=stable, number=number)
        self.create()

    @property
    def served(self) -> tuple[ServedIndex, ...]:
        return (ServedIndex(name="i", dataset=self.uri, index="i"),)

    @property
    def dataset(self) -> lance.LanceDataset:
        return lance.dataset(self.uri)

    def create(self, **more: Any) -> None:
        lance_dfaiss.create_index(self.uri, "vec", name="i", **{**self._asked, **more})

    def rebuild(self) -> None:
        self.create(replace=True, seed=next(self._seeds))

    def append(self, rows: int = 30) -> None:
        table = _table(range(self._ids, self._ids + rows), next(self._seeds))
        self._ids += rows
        lance.write_dataset(table, self.uri, mode="append", max_rows_per_file=20)

    def delete(self) -> None:
        self.dataset.delete(f"id % 17 = {next(self._seeds) % 17}")

    def update(self) -> None:
        self.dataset.update({"number": "number + 1"}, where=f"id % 13 = {next(self._seeds) % 13}")

    def merge(self) -> None:
        table = _table(range(self._ids - 40, self._ids + 10), next(self._seeds))  # other vectors, and new rows
        self._ids += 10
        self.dataset.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def compact(self) -> None:
        self.dataset.optimize.compact_files(target_rows_per_fragment=120)

    def index(self) -> None:
        lance_dfaiss.update_index(self.uri, "i")

    def optimize(self) -> None:
        lance_dfaiss.optimize_index(self.uri, "i")

    def roll_back(self) -> None:
        lance_dfaiss.rollback(self.uri, "i")

    def overwrite(self) -> None:
        lance.write_dataset(_table(range(300), next(self._seeds)), self.uri, mode="overwrite", max_rows_per_file=60)


class Truth:
    """What is right at each version."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._known: dict[int, tuple[Exact, dict[int, tuple[int, int]]]] = {}

    def at(self, version: int) -> tuple[Exact, dict[int, tuple[int, int]]]:
        if version not in self._known:
            dataset = lance.dataset(self._uri, version=version)
            table = dataset.to_table(columns=["id", "number"], with_row_id=True)
            values = zip(table["id"].to_pylist(), table["number"].to_pylist(), strict=True)
            rows = dict(zip(table["_rowid"].to_pylist(), values, strict=True))
            self._known[version] = Exact(dataset, "l2"), rows
        return self._known[version]


class Load:
    """Threads that search without a break, and keep what they were answered."""

    def __init__(self, location: str, *, threads: int = 2, nprobe: int | None = 4) -> None:
        self._nprobe = nprobe
        self.queries = clustered(12, DIM, 2)
        self.errors: list[BaseException] = []
        self._answers: list[tuple[str, int, Any]] = []
        self._client = lance_dfaiss.connect(location, timeout=30)
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    @property
    def count(self) -> int:
        return len(self._answers)

    @property
    def versions(self) -> set[int]:
        return {version for _, version, _ in list(self._answers)}

    @property
    def version(self) -> int:
        """The newest that was answered."""
        return max(self.versions, default=0)

    def wait_for(self, version: int) -> None:
        until(lambda: self.errors or self.version >= version)
        assert not self.errors, self.errors

    def check(self, truth: Truth) -> None:
        """Assert that nothing failed, and that all was right."""
        assert not self.errors, self.errors[0]
        for kind, version, (query, distances, rows, columns) in self._answers:
            exact, known = truth.at(version)
            if kind == "some":
                assert_exact(exact, query, distances, rows, scale=300)
                continue
            there = {row for row, (_, number) in known.items() if kind != "filtered" or number < 50}
            found = rows[0][np.isfinite(distances[0])].tolist()
            assert len(found) == len(set(found)), "a row came twice"
            assert set(found) == there & set(exact.row_ids.tolist()), "rows are missing, or there are too many"
            for row, column in zip(found, columns, strict=True):
                assert column == known[row], "columns of another version"

    def _run(self, number: int) -> None:
        turns = itertools.cycle(("some", "all", "some", "filtered"))
        while not self._stop.is_set():
            query = self.queries[np.random.default_rng(number + len(self._answers)).integers(12)][None]
            try:
                self._ask(next(turns), query)
            except BaseException as exc:
                self.errors.append(exc)
                return

    def _ask(self, kind: str, query: Any) -> None:
        if kind == "some":
            answer = self._client.knn(query, 20, nprobe=self._nprobe)
            self._answers.append((kind, answer.version, (query, *answer, None)))
            return
        asked: dict[str, Any] = {"filter": "number < 50"} if kind == "filtered" else {}
        table = self._client.search(query[0], 2_000, nprobe=self._nprobe, columns=["id", "number"], **asked)
        told = json.loads((table.schema.metadata or {})[b"lance_dfaiss"])
        columns = list(zip(table["id"].to_pylist(), table["number"].to_pylist(), strict=True))
        found = (query, table["_distance"].to_numpy()[None], table["_rowid"].to_numpy()[None], columns)
        self._answers.append((kind, told["version"], found))


def _settings(**holding: Any) -> Settings:
    return Settings(holding=HoldingOptions(**{"grace_seconds": 0.3, **holding}))


def _shelf(server: Running) -> Shelf:
    return server.server.holdings.shelves["i"]


def _version(server: Running) -> int:
    newest = _shelf(server).newest
    return 0 if newest is None else newest.offer.version


def _held(cluster: Cluster) -> list[weakref.ref[Any]]:
    """Return references to all views and segments that are held now, and keep none of them alive."""
    found: list[weakref.ref[Any]] = []
    for server in cluster.servers:
        snapshots = _shelf(server).snapshots.values()
        assert len(snapshots) <= MAX_SNAPSHOTS
        for held in snapshots:
            found.append(weakref.ref(held.view))
            found += [weakref.ref(loaded.segment) for loaded in held.view.loaded]
    return found


def _alive(held: list[weakref.ref[Any]]) -> set[int]:
    gc.collect()
    return {id(one) for one in (ref() for ref in held) if one is not None}


_LIFE = (
    "append", "index", "delete", "compact", "append", "update", "roll_back", "merge", "index", "compact", "delete",
    "optimize", "append", "append", "rebuild", "update", "compact", "index", "overwrite", "append", "index", "delete",
    "compact", "optimize", "merge",
)  # fmt: skip


@pytest.mark.parametrize("stable", [False, True], ids=["addresses", "stable ids"])
def test_a_life_under_load(stable: bool, tmp_path: Path) -> None:
    _live(World(tmp_path, stable=stable), tmp_path, _LIFE[:13] if stable else _LIFE)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(8))
def test_long_lives_under_load(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    kinds: tuple[dict[str, Any], ...] = ({}, {"index_type": "FLAT", "num_partitions": None})
    world = World(tmp_path, stable=bool(seed % 2), **kinds[seed // 2 % 2])
    # Rolling back needs a generation to go back to.
    _live(world, tmp_path, ("append", "rebuild", *rng.choice(_LIFE, size=120).tolist()))


def _live(world: World, tmp_path: Path, life: Sequence[str]) -> None:
    first = world.dataset.version
    with running(
        tmp_path, world.served, servers=4, replicas=2, refresh_seconds=REFRESH, settings=_settings(payload=("number",))
    ) as cluster:
        held: list[weakref.ref[Any]] = []
        with Load(cluster.location, nprobe=world.nprobe) as load:
            for step, what in enumerate(life):
                getattr(world, what)()
                if step % 3 != 2:  # one version after the other, or several at once
                    load.wait_for(world.dataset.version)
                held += _held(cluster)
            load.wait_for(world.dataset.version)
            until(lambda: all(_version(server) == world.dataset.version for server in cluster.servers))
            # What nobody asks for any more is freed, while others are served.
            until(lambda: all(len(_shelf(server).snapshots) == 1 for server in cluster.servers))

            until(lambda: _alive(held) <= _alive(_held(cluster)))
        load.check(Truth(world.uri))
        assert len(load.versions) > len(life) // 3
        assert load.version > first + len(life) // 3
        for server in cluster.servers:
            assert _shelf(server).problem is None


def _followed(cluster: Cluster, world: World) -> None:
    version = world.dataset.version
    until(lambda: all(_version(server) == version for server in cluster.servers))


def test_a_swap_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    with running(tmp_path, world.served, refresh_seconds=REFRESH, settings=_settings()) as cluster:
        (server,) = cluster.servers
        before, holdings = world.dataset.version, server.server.holdings
        roomy = holdings._options
        with Load(cluster.location) as load:
            load.wait_for(before)
            # Memory has become scarce since the server was started.
            holdings._options = replace(roomy, ram_limit_bytes=resident_bytes() // 2)
            world.append()
            world.index()
            until(lambda: _shelf(server).problem is not None)
            shelf = _shelf(server)
            assert shelf.swap is not None
            assert shelf.swap.outcome == "BudgetExceeded"
            assert "more RAM in group 0" in str(shelf.problem)
            with lance_dfaiss.connect(cluster.location) as client:
                (told,) = client.status()[0]["indexes"]
            assert told["problem"] == shelf.problem
            assert told["last_swap"]["outcome"] == "BudgetExceeded"
            assert (_version(server), server.server.ready) == (before, True)
            count = load.count
            until(lambda: load.count > count + 10)
            assert load.version == before
            holdings._options = roomy
            load.wait_for(world.dataset.version)
        load.check(Truth(world.uri))
        assert _shelf(server).problem is None


def test_a_dataset_that_is_gone_for_a_while(tmp_path: Path) -> None:
    world = World(tmp_path)
    with running(tmp_path, world.served, servers=2, refresh_seconds=REFRESH, settings=_settings()) as cluster:
        before = world.dataset.version
        with lance_dfaiss.connect(cluster.location) as client:
            query = clustered(1, DIM, 2)
            answer = client.knn(query, 10)
            Path(world.uri).rename(tmp_path / "elsewhere")
            until(lambda: all(_shelf(server).problem is not None for server in cluster.servers))
            for server in cluster.servers:
                assert "d" in str(_shelf(server).problem)
                assert server.server.ready
            again = client.knn(query, 10)
            assert again.version == before
            np.testing.assert_array_equal(answer[1], again[1])
            (tmp_path / "elsewhere").rename(world.uri)
            world.append()
            _followed(cluster, world)
            until(lambda: client.knn(query, 10).version == world.dataset.version)
        assert all(_shelf(server).problem is None for server in cluster.servers)


def test_an_index_that_is_dropped_and_built_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    with running(tmp_path, world.served, servers=2, refresh_seconds=REFRESH, settings=_settings()) as cluster:
        before = world.dataset.version
        with Load(cluster.location) as load:
            load.wait_for(before)
            lance_dfaiss.drop_index(world.uri, "i")
            until(lambda: all(_shelf(server).problem is not None for server in cluster.servers))
            for server in cluster.servers:
                assert _version(server) == before
                swap = _shelf(server).swap
                assert swap is not None
                assert swap.outcome == "IndexNotFound"
            world.append()
            world.create(seed=5)
            load.wait_for(world.dataset.version)
        load.check(Truth(world.uri))
        assert all(_shelf(server).problem is None for server in cluster.servers)


def test_a_dataset_that_is_written_anew(tmp_path: Path) -> None:
    # Its versions begin at 1 again: the old ones, with higher numbers, are not newer.
    world = World(tmp_path)
    for _ in range(3):
        world.append()
    with (
        running(tmp_path, world.served, servers=2, refresh_seconds=REFRESH, settings=_settings()) as cluster,
        lance_dfaiss.connect(cluster.location, timeout=30) as client,
    ):
        query, before = clustered(1, DIM, 2), world.dataset.version
        _followed(cluster, world)
        until(lambda: client.knn(query, 10).version == before)
        shutil.rmtree(world.uri)
        lance.write_dataset(_table(range(200), 77), world.uri, max_rows_per_file=50)
        world.create()
        assert world.dataset.version < before
        _followed(cluster, world)
        answer = until(lambda: (found := client.knn(query, 10)).version < before and found)
        assert_exact(Exact(world.dataset, "l2"), query, *answer, scale=300)


def test_a_step_back_by_hand(tmp_path: Path) -> None:
    world = World(tmp_path)
    with running(tmp_path, world.served, servers=4, replicas=2, settings=_settings(grace_seconds=30.0)) as cluster:
        with Load(cluster.location) as load, lance_dfaiss.connect(cluster.location, timeout=30) as client:
            first, query = world.dataset.version, clustered(1, DIM, 2)
            for _ in range(2):
                world.append()
                client.reload()
                assert client.knn(query).version == world.dataset.version
            for version in (first, first + 1, first, None):  # to some that are held still, and some that are not
                client.reload("i", version)
                expected = world.dataset.version if version is None else version
                assert client.knn(query).version == expected
                assert {_version(server) for server in cluster.servers} == {expected}
        load.check(Truth(world.uri))


def test_a_version_that_is_held(tmp_path: Path) -> None:
    # Servers that follow the dataset stay where they were told to, and one that comes later goes there.
    world = World(tmp_path)
    world.append()
    with running(tmp_path, world.served, servers=1, refresh_seconds=REFRESH, settings=_settings()) as cluster:
        (server,) = cluster.servers
        _followed(cluster, world)
        held = world.dataset.version - 1
        with RawClient(server.address) as admin:
            admin.ask(wire.Reload(index="i", version=held, hold=True), expected=wire.Done)
            assert (_version(server), admin.offer("i").version) == (held, held)
            world.append()
            assert read_cluster(cluster.location).indexes[0].version == held
            cluster.file = read_cluster(cluster.location)
            joined = cluster.join()
            until(lambda: {each.server.holdings.cluster.epoch for each in cluster.servers} == {2})
            until(lambda: all(each.server.ready for each in cluster.servers))
            assert _version(joined) == _version(server) == held
            admin.ask(wire.Reload(index="i"), expected=wire.Done)
            assert _version(server) == world.dataset.version
            world.append()
            _followed(cluster, world)  # the other server too, as the cluster file says so


def test_a_version_that_is_held_though_it_cannot_be_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The cluster file says what it said before, and that is no order to follow the dataset again.
    world = World(tmp_path)
    world.append()
    with running(tmp_path, world.served, refresh_seconds=REFRESH, settings=_settings()) as cluster:
        (server,) = cluster.servers
        _followed(cluster, world)
        held, looks, holdings = world.dataset.version - 1, 0, server.server.holdings
        follow = holdings.follow

        def look(moment: float | None = None) -> None:
            nonlocal looks
            follow(moment)
            looks += 1

        def refused(*_: Any) -> None:
            raise StorageError("this place cannot be written to")

        monkeypatch.setattr(holdings, "follow", look)
        monkeypatch.setattr("lance_dfaiss.serve.server.note_versions", refused)
        with RawClient(server.address) as admin:
            admin.ask(wire.Reload(index="i", version=held, hold=True), expected=wire.Done)
            before = looks
            until(lambda: looks >= before + 3)
            assert _version(server) == held
            note_versions(cluster.location, {"i": held + 1})  # now it says something else
            until(lambda: _version(server) == held + 1)
            note_versions(cluster.location, {"i": None})
            world.append()
            _followed(cluster, world)


def test_the_cluster_file_is_followed_between_two_looks_for_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lance_dfaiss.serve.server.WATCH_SECONDS", REFRESH)
    monkeypatch.setattr("lance_dfaiss.serve.server.RETIRE_SECONDS", REFRESH)
    world = World(tmp_path)
    first = world.dataset.version
    world.append()
    with running(tmp_path, world.served, servers=2, refresh_seconds=1e6, settings=_settings()) as cluster:
        stays, leaves = cluster.servers
        note_versions(cluster.location, {"i": first + 1})
        until(lambda: {_version(server) for server in cluster.servers} == {first + 1})
        note_versions(cluster.location, {"i": first})
        until(lambda: {_version(server) for server in cluster.servers} == {first})
        write_cluster(cluster.location, read_cluster(cluster.location).without_server(1))
        until(lambda: stays.server.holdings.cluster.epoch == 2 and stays.server.ready)
        until(lambda: leaves.ended)


def test_two_indexes_that_are_moved_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Loading may take minutes: where the other one went meanwhile stays in the file.
    world = World(tmp_path)
    served = [replace(world.served[0], name=name) for name in "ab"]
    move = control._move_index

    async def move_while_another_is_moved(*args: Any) -> Any:
        moves = await move(*args)
        note_versions(location, {"b": 1})
        return moves

    monkeypatch.setattr(control, "_move_index", move_while_another_is_moved)
    with running(tmp_path, served, settings=_settings()) as cluster:
        location = cluster.location
        control.move_servers(location, control.Caller(), index="a", version=None, hold=False)
        assert read_cluster(location).versions == {"a": world.dataset.version, "b": 1}


def test_a_step_back_of_an_index_that_lies_elsewhere(tmp_path: Path) -> None:
    # The version of the dataset stays as it is; only the pointer outside of it moves.
    world = World(tmp_path)
    place = str(tmp_path / "elsewhere")
    lance_dfaiss.create_index(world.uri, "vec", "FLAT", name="o", index_uri=place)
    first = lance_dfaiss.open_index(world.uri, "o", index_uri=place).manifest.generation
    served = ServedIndex(name="o", dataset=world.uri, index="o", index_uri=place)
    with (
        running(tmp_path, [served], servers=2, refresh_seconds=REFRESH, settings=_settings()) as cluster,
        lance_dfaiss.connect(cluster.location, timeout=30) as client,
    ):
        query = clustered(1, DIM, 2)
        assert client.knn(query).generation == first
        lance_dfaiss.create_index(world.uri, "vec", "FLAT", name="o", index_uri=place, replace=True, metric="dot")
        second = lance_dfaiss.open_index(world.uri, "o", index_uri=place).manifest.generation
        until(lambda: client.knn(query).generation == second)
        lance_dfaiss.rollback(world.uri, "o", index_uri=place)
        until(lambda: client.knn(query).generation == first)


def _shares(cluster: Cluster) -> dict[int, set[str]]:
    shares = {}
    for server in cluster.servers:
        newest = _shelf(server).newest
        assert newest is not None
        shares[newest.offer.group] = set(newest.offer.shards)
    return shares


def test_a_server_joins_and_leaves_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lance_dfaiss.serve.server.RETIRE_SECONDS", 0.2)
    world = World(tmp_path, num_shards=10)
    world.append()
    with running(tmp_path, world.served, servers=3, refresh_seconds=REFRESH, settings=_settings()) as cluster:
        before = _shares(cluster)
        with Load(cluster.location) as load:
            load.wait_for(world.dataset.version)
            joined = cluster.join()
            count = load.count
            until(lambda: all(server.server.holdings.cluster.epoch == 2 for server in cluster.servers))
            until(lambda: all(server.server.ready for server in cluster.servers))
            after = _shares(cluster)
            # Nothing lost, nothing twice; what moved, moved to the new server, and only that has read anything.
            assert set().union(*after.values()) == set().union(*before.values())
            assert sum(map(len, after.values())) == sum(map(len, before.values())) == 10
            assert after[3]
            for group in range(3):
                assert after[group] <= before[group]
            for server in cluster.servers:
                swap = _shelf(server).swap
                assert swap is not None
                assert swap.outcome == "ok"
                assert (swap.read_bytes > 0) == (server is joined)
            world.append()
            world.index()
            load.wait_for(world.dataset.version)
            assert _version(joined) == world.dataset.version
            # It leaves again: it drains, and the others take over what it had.
            cluster.file = cluster.file.without_server(3)
            write_cluster(cluster.location, cluster.file)
            until(lambda: joined.ended)
            until(lambda: all(server.server.ready for server in cluster.servers[:3]))
            world.delete()
            load.wait_for(world.dataset.version)
        load.check(Truth(world.uri))
        assert load.count > count + 20


def test_another_dataset_under_the_same_name(tmp_path: Path) -> None:
    # Blue and green: the cluster file is written anew, and no query fails or meets a bit of both.
    for colour in ("blue", "green"):
        (tmp_path / colour).mkdir()
    blue, green = World(tmp_path / "blue"), World(tmp_path / "green", num_partitions=4, seed=3)
    for _ in range(3):
        blue.append()  # its version is the higher one
    with running(
        tmp_path, blue.served, servers=4, replicas=2, refresh_seconds=REFRESH, settings=_settings()
    ) as cluster:
        truth = {world: Exact(world.dataset, "l2") for world in (blue, green)}
        assert len(truth[blue]) != len(truth[green])
        _followed(cluster, blue)
        seen: list[World] = []
        with lance_dfaiss.connect(cluster.location, timeout=30) as client:

            def ask() -> bool:
                query = clustered(1, DIM, len(seen) % 7)
                distances, row_ids = client.knn(query, 1_000)
                found = row_ids[0][np.isfinite(distances[0])]
                world = blue if len(found) == len(truth[blue]) else green
                seen.append(world)
                assert set(found.tolist()) == set(truth[world].row_ids.tolist())
                assert_exact(truth[world], query, distances[:, :50], row_ids[:, :50], scale=300)
                return world is green

            until(lambda: client.knn(clustered(1, DIM, 0)).version == blue.dataset.version)
            assert not ask()
            write_cluster(cluster.location, replace(cluster.file, epoch=2, indexes=green.served))
            until(ask)
            for _ in range(20):
                assert ask()
            until(lambda: all(server.server.ready for server in cluster.servers))
            for server in cluster.servers:
                assert _version(server) == green.dataset.version


def test_servers_that_start_at_different_times_agree(tmp_path: Path) -> None:
    world = World(tmp_path)
    with running(tmp_path, world.served, servers=1, refresh_seconds=0.4, settings=_settings()) as cluster:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                world.append(5)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            seen: dict[int, set[str]] = {0: set(), 1: set()}
            cluster.join()

            def agreed() -> bool:
                for number, server in enumerate(cluster.servers):
                    seen[number] |= set(_shelf(server).snapshots)
                return len({at for at in seen[0] & seen[1] if at.startswith("2.")}) >= 4

            until(agreed)
        finally:
            stop.set()
            writer.join()
        # All that both have looked at, not just some: but for what came and went before both were there.
        newest = sorted(at for at in seen[0] | seen[1] if at.startswith("2."))
        alone = seen[0] ^ seen[1]
        assert len(alone & set(newest)) <= 3
