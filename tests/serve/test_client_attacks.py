"""What must not happen to a client: one call that harms another, a query that is lost, a storm that feeds itself."""

from __future__ import annotations

import asyncio
import functools
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.errors import (
    DeadlineExceeded,
    FilterRefused,
    InvalidArgument,
    InvalidQuery,
    Overloaded,
    SnapshotGone,
)
from lance_dfaiss.serve import routing, wire
from lance_dfaiss.serve.bridge import Bridge
from lance_dfaiss.serve.client import connect, connect_async
from lance_dfaiss.serve.cluster import ServedIndex
from lance_dfaiss.serve.core import _Once
from lance_dfaiss.serve.sql import MAX_FILTER_BYTES
from tests.serve.inprocess import running
from tests.serve.scripted import DIM, ClusterThread, ScriptedCluster, ScriptedServer, offer_of, rows_of
from tests.serve.test_client import check, failing, never, nothing_left, run, until
from tests.support import Exact, clustered, make_dataset

QUERIES = rows_of(200, seed=9)
HALF_A_CHARACTER = "lang = '\ud800'"
TOO_MUCH: dict[str, Any] = {"nprobe": 2**70}
"""Passes every check, and cannot be written down."""


# One call and another.


def test_a_call_that_cannot_be_sent_harms_no_other_of_its_turn() -> None:
    async def work() -> None:
        async with ScriptedCluster(2, 2) as cluster, await connect_async(cluster.file()) as asked:
            bad = [asyncio.ensure_future(asked.knn(query, 3, **TOO_MUCH)) for query in QUERIES[:3]]
            good = [asyncio.ensure_future(asked.knn(query, k)) for k, query in enumerate(QUERIES[:20], start=1)]
            for task in bad:
                with pytest.raises(InvalidArgument, match="cannot be sent"):
                    await task
            for k, task in enumerate(good, start=1):
                check(cluster, await task, QUERIES[k - 1], k)
            assert nothing_left(asked)
            assert not any(server.cancelled for server in cluster.servers)
            for k in (2, 5):  # in pieces: the first of them fails
                with pytest.raises(InvalidArgument, match="cannot be sent"):
                    await asked.search(QUERIES[:100], k, **TOO_MUCH)
            assert nothing_left(asked)

    run(work())


def test_a_call_that_cannot_be_sent_harms_no_other_thread() -> None:
    class Unhashable(str):
        __hash__ = None  # type: ignore[assignment]

    cluster = ScriptedCluster(1, 2)
    with ClusterThread(cluster), connect(cluster.file()) as asked:
        bridge, gate = asked._bridge, threading.Event()
        found: dict[str, Any] = {}

        def call(name: str, **options: Any) -> None:
            try:
                found[name] = asked.knn(QUERIES[0], 3, **options)
            except Exception as exc:
                found[name] = exc

        bridge._call(gate.wait)  # all that follows is taken in one turn of its loop
        calls: list[tuple[str, dict[str, Any]]] = [
            ("too much", TOO_MUCH),
            ("good", {}),
            ("unhashable", {"filter": Unhashable("a > 1")}),
            ("better", {"nprobe": 3}),
        ]
        threads = [threading.Thread(target=call, args=(name,), kwargs=options, daemon=True) for name, options in calls]
        for waiting, thread in enumerate(threads, start=1):
            thread.start()
            asyncio.run(until(functools.partial(_waits, bridge, waiting)))
        gate.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        check(cluster, found["good"], QUERIES[0], 3)
        check(cluster, found["better"], QUERIES[0], 3)
        assert isinstance(found["too much"], InvalidArgument)
        assert isinstance(found["unhashable"], TypeError)
        check(cluster, asked.knn(QUERIES[1], 3), QUERIES[1], 3)


def _waits(bridge: Bridge, calls: int) -> bool:
    return len(bridge._inbox) == calls


@pytest.mark.parametrize("sql", [HALF_A_CHARACTER, "a > 1" + " " * MAX_FILTER_BYTES, "é" * (MAX_FILTER_BYTES // 2 + 1)])
def test_a_filter_that_no_server_takes_is_refused_before_it_is_sent(sql: str) -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            calls: list[Callable[[], Any]] = [
                lambda: asked.knn(QUERIES[0], 3, filter=sql),
                lambda: asked.search(QUERIES[0], 3, filter=sql),
                lambda: asked.range_search(QUERIES[0], 3.0, filter=sql),
            ]
            for call in calls:
                with pytest.raises(FilterRefused) as refused:
                    await call()
                str(refused.value).encode()  # it can be printed and logged
            longest = "a > 1" + " " * (MAX_FILTER_BYTES - 5)
            check(cluster, await asked.knn(QUERIES[0], 3, filter=longest), QUERIES[0], 3)
            assert cluster.servers[0].searches() == 1

    run(work())


def test_a_frame_that_a_server_would_hang_up_on_is_not_sent() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster:
            server = cluster.servers[0]
            server.limits = wire.Limits(frame_bytes=100_000)
            async with await connect_async(cluster.file()) as asked:
                server.script = never
                other = asyncio.ensure_future(asked.knn(QUERIES[0], 3))
                await server.until(lambda: server.searches() == 1)
                server.script = lambda _server, _message: None
                with pytest.raises(InvalidArgument, match="at most 100,000"):
                    await asked.search(QUERIES[0], 3, columns={"x": "a" * 100_001})
                with pytest.raises(InvalidArgument, match="cannot be sent"):
                    await asked.search(QUERIES[0], 3, columns={"x": HALF_A_CHARACTER})
                with pytest.raises(InvalidArgument, match="cannot be sent"):
                    await asked.reload(version=2**70)
                assert not other.done()
                assert server.greeted == 1
                other.cancel()
                await asyncio.gather(other, return_exceptions=True)
                assert nothing_left(asked)

    run(work())


def test_an_answer_that_arrives_in_the_moment_its_time_is_over_ends_no_connection() -> None:
    async def work() -> None:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        waiting = _Once(wire.Done, future)
        future.cancel()  # as its timeout does, a turn of the loop before the request is taken back
        (frame,) = wire.FrameReader(1000).feed(b"".join(wire.encode(wire.Done(), 1)))
        waiting.answered(frame)
        waiting.failed(DeadlineExceeded("late"))
        assert future.cancelled()

    run(work())


# A dataset that is made anew.


def _move(servers: list[ScriptedServer], offers: list[dict[str, Any]]) -> None:
    for server in servers:
        rows = server.offers[0].rows
        server.offers = tuple(offer_of(rows, server.group, **facts) for facts in offers)
        server.announce()


def test_a_dataset_made_anew_with_lower_versions_replaces_the_one_before() -> None:
    old: dict[str, Any] = {"version": 9}
    new: dict[str, Any] = {"version": 2, "dim": 4, "committed_at": 99.0}

    async def work() -> None:
        async with ScriptedCluster(2) as cluster:
            _move(cluster.servers, [old])
            async with await connect_async(cluster.file()) as asked:
                check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3, version=9)
                _move(cluster.servers[:1], [{**old, "stale": True}, new])
                check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3, version=9)  # one is not there yet
                _move(cluster.servers, [{**old, "stale": True}, new])
                await until(lambda: asked.stats().version == 2)
                assert asked.stats().dim == 4
                with pytest.raises(InvalidQuery):
                    await asked.knn(QUERIES[0], 3)
                answer = await asked.knn(QUERIES[0, :4], 3)
                expected = np.square(cluster.vectors[:, :4] * 2 - QUERIES[0, :4]).sum(axis=1).argsort()[:3]
                np.testing.assert_array_equal(answer[1][0], expected)
                assert answer.version == 2
                assert (await asked.knn(np.empty((0, 4)), 3)).version == 2

    run(work())


def test_a_step_back_to_an_older_version_is_followed() -> None:
    async def work() -> None:
        async with ScriptedCluster(2, 2) as cluster:
            _move(cluster.servers, [{"version": 5}, {"version": 4}])
            async with await connect_async(cluster.file()) as asked:
                assert asked.stats().version == 5
                _move(cluster.servers, [{"version": 4}, {"version": 5, "stale": True}])
                await until(lambda: asked.stats().version == 4)
                check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3, version=4)
                assert asked.core.checks.offer(None).version == 4

    run(work())


def test_what_was_asked_of_the_dataset_before_is_told_of_the_new_one() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            server = cluster.servers[0]
            server.script = never
            tasks = [
                asyncio.ensure_future(asked.knn(QUERIES[0], 3)),
                asyncio.ensure_future(asked.range_search(QUERIES[0], 3.0, columns=[])),
            ]
            await server.until(lambda: len(server.requests) == 2)
            gate = asyncio.get_running_loop().create_future()
            server.script = lambda _server, _message: None
            gate.set_result(SnapshotGone("gone", snapshot="1.1"))
            _move([server], [{"version": 1, "at": "2.1", "epoch": 2, "dim": 4}])
            await until(lambda: asked.stats().dim == 4)
            for connection in server.connections:
                for request_id in (1, 2):
                    connection.send(wire.failure_of(SnapshotGone("gone", snapshot="1.1")), request_id)
            for task in tasks:
                with pytest.raises(InvalidQuery, match="dimension 4 now"):
                    await task
            assert nothing_left(asked)

    run(work())


def test_a_real_dataset_made_anew(tmp_path: Path) -> None:
    def make(dim: int, seed: int) -> Any:
        vectors = clustered(300, dim, seed)
        dataset = make_dataset(tmp_path / "d", vectors, rows_per_fragment=100)
        return lance_dfaiss.create_index(dataset, "vec", "IVF_FLAT", name="i", num_partitions=2)

    dataset = make(16, 1)
    for row in range(4):
        dataset.delete(f"id = {row}")
    served = ServedIndex(name="i", dataset=dataset.uri, index="i")
    with running(tmp_path, [served], servers=2) as cluster, connect(cluster.location) as asked:
        asked.reload()
        before = asked.knn(clustered(1, 16, 7)[0], 3).version
        assert before == lance.dataset(dataset.uri).version
        shutil.rmtree(dataset.uri)
        dataset = make(DIM, 3)
        assert dataset.version < before
        asked.reload()
        answer = asked.knn(QUERIES[:3], 5, nprobe=2)
        assert answer.version == asked.stats().version == dataset.version
        exact = Exact(dataset, "l2")
        for found, query in zip(answer[1], QUERIES, strict=False):
            np.testing.assert_array_equal(found, exact.row_ids[exact.distances(query).argsort()[:5]])
        with pytest.raises(InvalidQuery):
            asked.knn(clustered(1, 16, 7)[0], 3)


# Servers that have too much to do, or say nothing.


def test_in_a_storm_each_query_is_tried_once_at_each_replica() -> None:
    async def work() -> None:
        async with ScriptedCluster(2, 3) as cluster, await connect_async(cluster.file()) as asked:
            for server in cluster.servers:
                server.script = failing(Overloaded("full", waiting=9, retry_after_seconds=0.01))
            tasks = [asyncio.ensure_future(asked.knn(QUERIES[k], k)) for k in range(1, 40)]
            for task in tasks:
                with pytest.raises(Overloaded):
                    await task
            for server in cluster.servers:
                tries = Counter(message.k for message in server.requests if isinstance(message, wire.Knn))
                assert max(tries.values()) == 1
            assert asked.stats().hedged == 0
            assert nothing_left(asked)

    run(work())


def test_a_server_that_refuses_is_left_alone_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "REFUSED_MAX_SECONDS", 3600.0)

    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster, await connect_async(cluster.file()) as asked:
            full, other = cluster.servers
            full.script = failing(Overloaded("full", waiting=9, retry_after_seconds=1800.0))
            for query in QUERIES[:100]:  # it has nothing outstanding all the while: the idlest of the two
                check(cluster, await asked.knn(query, 3), query, 3)
            assert full.searches() == 1
            assert other.searches() == 100
            other.kill()
            await until(lambda: not asked._fleet.replicas[1].connected)
            full.script = lambda _server, _message: None
            check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3)  # nobody else is there

    run(work())


def test_no_query_is_spent_on_finding_out_whether_a_silent_server_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slowness alone keeps nobody away here.
    monkeypatch.setattr(routing, "SLOW_FIRST_SECONDS", 0.0)
    monkeypatch.setattr(routing, "SLOW_MAX_SECONDS", 0.0)

    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster, await connect_async(cluster.file()) as asked:
            frozen = cluster.servers[0]
            frozen.frozen = True
            replica = asked._fleet.replicas[0]
            for query in QUERIES[:100]:
                check(cluster, await asked.knn(query, 3), query, 3)
            assert replica.mute
            assert frozen.searches() == 1
            assert asked.stats().hedged == 1
            assert any(isinstance(message, wire.Status) for message in frozen.requests)
            frozen.thaw()
            await until(lambda: not replica.mute)
            before = frozen.searches()
            await asyncio.gather(*(asked.knn(QUERIES[k], k) for k in range(1, 21)))
            assert frozen.searches() > before

    run(work())


def test_a_silent_server_is_not_asked_for_help() -> None:
    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster, await connect_async(cluster.file()) as asked:
            frozen, slow = cluster.servers
            frozen.frozen = True
            await until_mute(cluster, asked)
            frozen.requests.clear()
            asked._fleet.delay("knn").seconds = 0.001
            gate = asyncio.get_running_loop().create_future()
            slow.script = lambda _server, message: gate if isinstance(message, wire.Knn) else None
            hedged, task = asked.stats().hedged, asyncio.ensure_future(asked.knn(QUERIES[0], 3))
            await asyncio.wait([task], timeout=0.05)  # many times the delay
            gate.set_result(None)
            check(cluster, await task, QUERIES[0], 3)
            assert frozen.searches() == 0
            assert asked.stats().hedged == hedged

    async def until_mute(cluster: ScriptedCluster, asked: Any) -> None:
        while not asked._fleet.replicas[0].mute:
            check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3)

    run(work())
