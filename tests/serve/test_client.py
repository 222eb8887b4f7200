"""The client against servers that misbehave on purpose: real sockets and frames, answers compared with brute force."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import pickle
import signal
import ssl
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lance_dfaiss
from lance_dfaiss.errors import (
    AccessDenied,
    ClientUnusable,
    ClusterFileInvalid,
    DeadlineExceeded,
    IndexNotFound,
    InvalidArgument,
    InvalidFilter,
    InvalidQuery,
    Overloaded,
    ProtocolError,
    ServerFailed,
    SnapshotGone,
    Unavailable,
)
from lance_dfaiss.launch.control import Caller, status_of
from lance_dfaiss.serve import client, fleet, questions, wire
from lance_dfaiss.serve.client import Answer, AsyncClient, connect, connect_async
from lance_dfaiss.serve.cluster import ClusterFile, ServedIndex, ServerEntry, read_cluster, write_cluster
from tests.serve.certificates import Certificates, make_certificates
from tests.serve.scripted import DIM, ClusterThread, ScriptedCluster, ScriptedServer, nearest, offer_of, rows_of

QUERIES = rows_of(200, seed=9)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something about the client, whose changes nobody is told of."""

    async def look() -> None:
        while not holds():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(look(), 20)


def check(cluster: ScriptedCluster, answer: Answer, query: Any, k: int, version: int = 1) -> None:
    distances, row_ids = cluster.nearest(query, k, version)
    np.testing.assert_array_equal(answer[1][:, : row_ids.shape[1]], row_ids)
    np.testing.assert_array_equal(answer[0][:, : row_ids.shape[1]], distances)


def nothing_left(asked: AsyncClient) -> bool:
    replicas = asked._fleet.everyone()
    pending = [
        waiting
        for replica in replicas
        for link in replica.links
        if link.connection is not None
        for waiting in link.connection.pending.values()
        if not isinstance(waiting, fleet._Ping)
    ]
    idle = not asked._fleet.askings and not asked._fleet.waiting and not asked.core._gathered
    return not pending and idle and not any(replica.outstanding for replica in replicas)


def never(_server: ScriptedServer, message: wire.Message) -> Any:
    """Searches are not answered; whether the server lives is."""
    searches = isinstance(message, (wire.Knn, wire.Range, wire.Fetch))
    return asyncio.get_running_loop().create_future() if searches else None


def _open(gate: asyncio.Future[None]) -> None:
    if not gate.done():
        gate.set_result(None)


def failing(error: Any) -> Callable[..., Any]:
    return lambda _server, message: None if isinstance(message, wire.Status) else error


@pytest.mark.parametrize(("groups", "replicas"), [(1, 1), (1, 3), (3, 2)])
def test_answers_are_those_of_one_index(groups: int, replicas: int) -> None:
    async def work() -> None:
        async with ScriptedCluster(groups, replicas) as cluster, await connect_async(cluster.file()) as asked:
            for query, k in ((QUERIES[0], 1), (QUERIES[:5], 7), (QUERIES[:2], 60)):
                answer = await asked.knn(query, k)
                check(cluster, answer, query, k)
                assert answer[0].shape == answer[1].shape == (len(np.atleast_2d(query)), k)
                assert [str(part.dtype) for part in answer] == ["float32", "uint64"]
                assert (answer[1][:, 40:] == lance_dfaiss.MISSING_ROW_ID).all()
                assert np.isposinf(answer[0][:, 40:]).all()
                assert (answer.coverage, answer.version, answer.generation, answer.at) == (1.0, 1, "g1", "1.1")
                answer[0][:] = 0  # the caller's own
            empty = await asked.knn(np.empty((0, DIM), np.float32), 3)
            assert empty[0].shape == (0, 3)
            assert nothing_left(asked)

    run(work())


def test_an_answer_survives_pickling() -> None:
    answer = Answer(
        np.ones((1, 2), np.float32), np.ones((1, 2), np.uint64), coverage=0.5, version=3, generation="g", at="x"
    )
    copy = pickle.loads(pickle.dumps(answer))
    assert (copy.coverage, copy.version, copy.generation, copy.at) == (0.5, 3, "g", "x")
    np.testing.assert_array_equal(copy[1], answer[1])


def test_calls_of_one_moment_travel_together() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster, await connect_async(cluster.file()) as asked:
            answers = await asyncio.gather(*(asked.knn(query, 5) for query in QUERIES[:150]))
            for query, answer in zip(QUERIES, answers, strict=False):
                check(cluster, answer, query, 5)
            for server in cluster.servers:
                assert [m.n for m in server.requests if isinstance(m, wire.Knn)] == [64, 64, 22]
                server.requests.clear()
            await asyncio.gather(asked.knn(QUERIES[0], 5), asked.knn(QUERIES[1], 6), asked.knn(QUERIES[:70], 5))
            assert sorted(m.n for m in cluster.servers[0].requests if isinstance(m, wire.Knn)) == [1, 1, 70]

    run(work())


def test_a_large_call_travels_in_pieces_that_servers_take() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster:
            for server in cluster.servers:
                server.limits = wire.Limits(queries=80, frame_bytes=4_000, k=12)
            async with await connect_async(cluster.file()) as asked:
                check(cluster, await asked.knn(QUERIES, 11), QUERIES, 11)
                sizes = [m.n for m in cluster.servers[0].requests if isinstance(m, wire.Knn)]
                assert sum(sizes) == 200
                assert max(sizes) * 12 * 11 <= 4_000
                # More than servers give, but no more than there are rows.
                assert (await asked.search(QUERIES[0], 10**6, columns=[])).num_rows <= 40

    run(work())


def test_float16_queries() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file(), float16=True) as asked:
            answer = await asked.knn(QUERIES[:3], 4)
            check(cluster, answer, QUERIES[:3].astype(np.float16).astype(np.float32), 4)
            with pytest.raises(InvalidQuery, match="float16"):
                await asked.knn(np.full(DIM, 1e6), 4)

    run(work())


def test_arguments_are_checked_before_anything_is_sent() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            calls: list[tuple[type[Exception], Callable[[], Awaitable[Any]]]] = [
                (InvalidQuery, lambda: asked.knn(np.zeros(DIM + 1), 1)),
                (InvalidQuery, lambda: asked.knn(np.full(DIM, np.nan), 1)),
                (InvalidArgument, lambda: asked.knn(QUERIES[0], 0)),
                (InvalidArgument, lambda: asked.knn(QUERIES[0], 1, nprobe=0)),
                (InvalidArgument, lambda: asked.knn(QUERIES[0], 1, filter=3)),  # type: ignore[arg-type]
                (InvalidArgument, lambda: asked.knn(QUERIES[0], 1, timeout=0)),
                (InvalidArgument, lambda: asked.knn(QUERIES[0], 1, allow_partial=1.5)),
                (InvalidArgument, lambda: asked.search(QUERIES[0], 1, columns="id")),
                (InvalidArgument, lambda: asked.range_search(QUERIES[0], -1.0)),
                (InvalidArgument, lambda: asked.range_search(QUERIES[:2], 1.0)),
                (InvalidArgument, lambda: asked.reconstruct([-1])),
                (InvalidArgument, lambda: asked.drain(77)),
                (IndexNotFound, lambda: asked.knn(QUERIES[0], 1, index="other")),
            ]
            for error, call in calls:
                with pytest.raises(error):
                    await call()
            assert cluster.servers[0].requests == []

    run(work())


def test_search_in_ram_and_from_the_dataset() -> None:
    async def work() -> None:
        async with ScriptedCluster(3) as cluster:
            for server in cluster.servers:
                server.offers = tuple(
                    offer_of(offer.rows, server.group, payload=("half", "id")) for offer in server.offers
                )
            async with await connect_async(cluster.file()) as asked:
                _, row_ids = cluster.nearest(QUERIES[:4], 6)
                table = await asked.search(QUERIES[:4], 6, columns=["half", "id"])
                assert table.schema.names == ["query_index", "half", "id", "_distance", "_rowid"]
                assert table["_rowid"].to_pylist() == row_ids.ravel().tolist()
                assert table["half"].to_pylist() == (row_ids.ravel() / 2).tolist()
                assert table["query_index"].to_pylist() == np.repeat(np.arange(4), 6).tolist()
                assert not any(isinstance(m, wire.Fetch) for s in cluster.servers for m in s.requests)
                assert json.loads(table.schema.metadata[b"lance_dfaiss"]) == {
                    "coverage": 1.0,
                    "version": 1,
                    "generation": "g1",
                }
                for columns, names in ((None, ["id"]), ({"id": "id"}, ["id"])):
                    table = await asked.search(QUERIES[0], 6, columns=columns)
                    assert table.schema.names == [*names, "_distance", "_rowid"]
                    assert table["id"].to_pylist() == (2 * row_ids[0]).tolist()
                table = await asked.search(QUERIES[0], 6, columns=[], with_vectors=False)
                assert table.schema.names == ["_distance", "_rowid"]
                fetches = [m for s in cluster.servers for m in s.requests if isinstance(m, wire.Fetch)]
                assert len(fetches) == 2

    run(work())


def test_range_reconstruct_and_explain() -> None:
    async def work() -> None:
        async with ScriptedCluster(3) as cluster, await connect_async(cluster.file()) as asked:
            distances, row_ids = cluster.nearest(QUERIES[0], 40)
            table = await asked.range_search(QUERIES[0], float(distances[0, 10]), columns=["id"])
            assert table["_rowid"].to_pylist() == row_ids[0, :10].tolist()
            assert table["_distance"].to_pylist() == distances[0, :10].tolist()
            np.testing.assert_array_equal(await asked.reconstruct([7, 3, 39, 7]), cluster.vectors[[7, 3, 39, 7]])
            with pytest.raises(InvalidArgument, match="row 40 is not in this index"):
                await asked.reconstruct([1, 40])
            told = await asked.explain(QUERIES[0], 5)
            assert [(stage.name, stage.facts["group"]) for stage in told.stages] == [("scan", g) for g in range(3)]
            assert told.results == 5

    run(work())


def test_answers_are_of_one_snapshot_while_servers_move() -> None:
    async def work() -> None:
        async with ScriptedCluster(3, 2) as cluster, await connect_async(cluster.file()) as asked:
            over = asyncio.Event()
            seen: list[int] = []

            async def ask(start: int) -> None:
                at = start
                while not over.is_set():
                    query = QUERIES[at % 200]
                    answer = await asked.knn(query, 4)
                    check(cluster, answer, query, 4, answer.version)
                    seen.append(answer.version)
                    at += 1

            tasks = [asyncio.ensure_future(ask(i)) for i in range(8)]
            for version in range(2, 8):
                for server in cluster.servers:
                    newest = offer_of(server.offers[0].rows, server.group, version=version)
                    server.offers = (newest, *server.offers)[:2]  # a slow one may hold the older one alone
                    server.announce()
                    count = len(seen)
                    await until(lambda count=count: len(seen) > count + 4)  # type: ignore[misc]
                await until(lambda version=version: seen[-1] == version)  # type: ignore[misc]
            over.set()
            await asyncio.gather(*tasks)
            assert seen == sorted(seen)
            assert nothing_left(asked)

    run(work())


def test_a_snapshot_that_went_away_is_chosen_anew() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster, await connect_async(cluster.file()) as asked:
            for server in cluster.servers:
                server.offers = (*server.offers, offer_of(server.offers[0].rows, server.group, version=0))
                server.announce()
            await until(lambda: all(len(r.offers) == 2 for r in asked._fleet.everyone()))
            # It has let the newer one go, and its announcement is still on the way.
            cluster.servers[1].offers = cluster.servers[1].offers[1:]
            answer = await asked.knn(QUERIES[0], 3)
            assert answer.at == "1.0"
            assert nothing_left(asked)

    run(work())


def test_rows_found_at_a_snapshot_are_read_at_that_snapshot() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            server = cluster.servers[0]

            def swap(_server: ScriptedServer, message: wire.Message) -> Any:
                if isinstance(message, wire.Fetch) and message.at == "1.1":
                    server.offers = (offer_of(server.offers[0].rows, 0, version=2),)
                    server.announce()
                    return SnapshotGone("gone", snapshot=message.at)
                return None

            server.script = swap
            table = await asked.search(QUERIES[0], 3)
            assert json.loads(table.schema.metadata[b"lance_dfaiss"])["version"] == 2
            assert [m.at for m in server.requests if isinstance(m, (wire.Knn, wire.Fetch))] == [
                "1.1",
                "1.1",
                "1.2",
                "1.2",
            ]

    run(work())


@pytest.mark.parametrize(
    "error",
    [
        Overloaded("full", waiting=1, retry_after_seconds=0.1),
        ServerFailed("broken", server=0),
        Unavailable("draining", groups=(), shards=(), coverage=0.0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_another_replica_answers_for_one_that_fails(error: Exception) -> None:
    async def work() -> None:
        async with ScriptedCluster(2, 2) as cluster, await connect_async(cluster.file()) as asked:
            cluster.servers[0].script = failing(error)
            for query in QUERIES[:20]:
                check(cluster, await asked.knn(query, 3), query, 3)
            assert cluster.servers[0].searches()
            cluster.servers[1].script = failing(error)
            if not isinstance(error, Unavailable):
                with pytest.raises(type(error)):
                    await asked.knn(QUERIES[0], 3)
            answer = await asked.knn(QUERIES[0], 3, allow_partial=0.5)
            assert answer.coverage == 0.5
            assert nothing_left(asked)

    run(work())


def test_what_the_caller_did_wrong_is_told_at_once() -> None:
    async def work() -> None:
        async with ScriptedCluster(2, 2) as cluster, await connect_async(cluster.file()) as asked:
            for server in cluster.servers:
                server.script = failing(InvalidFilter("no such thing", parameter="filter", value="x"))
            outcomes = await asyncio.gather(
                *(asked.knn(query, 3, filter="x", allow_partial=0.1) for query in QUERIES[:3]), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [InvalidFilter] * 3
            assert len({id(outcome) for outcome in outcomes}) == 3
            assert sum(server.searches() for server in cluster.servers) == 2  # one a group
            assert nothing_left(asked)

    run(work())


def test_a_server_that_is_killed_costs_no_query() -> None:
    async def work() -> None:
        async with ScriptedCluster(2, 2) as cluster, await connect_async(cluster.file()) as asked:
            for round_ in range(3):
                tasks = [asyncio.ensure_future(asked.knn(query, 3)) for query in QUERIES[:50]]
                await asyncio.sleep(0)  # they are on their way
                cluster.servers[round_ % 2].kill()
                for query, answer in zip(QUERIES, await asyncio.gather(*tasks), strict=False):
                    check(cluster, answer, query, 3)
                await cluster.servers[round_ % 2].start()
                await until(lambda: all(replica.usable for replica in asked._fleet.everyone()))
            assert nothing_left(asked)

    run(work())


def test_requests_wait_for_a_group_that_is_back_in_a_moment() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster, await connect_async(cluster.file()) as asked:
            cluster.servers[1].kill()
            task = asyncio.ensure_future(asked.knn(QUERIES[0], 3))
            await until(lambda: bool(asked._fleet.waiting))
            await cluster.servers[1].start()
            check(cluster, await task, QUERIES[0], 3)
            assert nothing_left(asked)

    run(work())


def test_without_a_group_strict_fails_and_partial_tells_its_coverage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "GRACE_SECONDS", 0.05)

    async def work() -> None:
        async with ScriptedCluster(3, rows=10) as cluster, await connect_async(cluster.file()) as asked:
            cluster.servers[0].kill()  # 4 of 10 rows
            with pytest.raises(Unavailable) as caught:
                await asked.knn(QUERIES[0], 3)
            assert (caught.value.groups, caught.value.shards, caught.value.coverage) == ((0,), ("shard-0",), 0.6)
            assert "server 0" in str(caught.value)
            answer = await asked.knn(QUERIES[0], 10, allow_partial=0.6)
            assert answer.coverage == 0.6
            left = np.array([row for row in range(10) if row % 3], np.uint64)
            expected = nearest(cluster.vectors[left], left, QUERIES[:1], 10)
            np.testing.assert_array_equal(answer[1][:, :6], expected[1])
            assert (answer[1][:, 6:] == lance_dfaiss.MISSING_ROW_ID).all()
            with pytest.raises(Unavailable):
                await asked.knn(QUERIES[0], 3, allow_partial=0.61)
            table = await asked.search(QUERIES[0], 3, columns=[], allow_partial=0.5)
            assert json.loads(table.schema.metadata[b"lance_dfaiss"])["coverage"] == 0.6
            cluster.servers[1].kill()
            cluster.servers[2].kill()
            with pytest.raises(Unavailable) as caught:
                await asked.knn(QUERIES[0], 3, allow_partial=0.01)
            assert (caught.value.groups, caught.value.coverage) == ((0, 1, 2), 0.0)
            assert nothing_left(asked)

    run(work())


def test_a_partial_answer_is_given_when_the_time_is_over() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster, await connect_async(cluster.file()) as asked:
            cluster.servers[1].script = never
            answer = await asked.knn(QUERIES[0], 3, timeout=0.1, allow_partial=0.5)
            assert answer.coverage == 0.5
            with pytest.raises(DeadlineExceeded):
                await asked.knn(QUERIES[0], 3, timeout=0.1, allow_partial=0.6)
            assert nothing_left(asked)

    run(work())


def test_deadlines_are_each_callers_own() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            server = cluster.servers[0]
            server.script = lambda _server, message: gate if isinstance(message, wire.Knn) else None
            short = asyncio.ensure_future(asked.knn(QUERIES[0], 3, timeout=0.05))
            long = asyncio.ensure_future(asked.knn(QUERIES[1], 3, timeout=20))
            with pytest.raises(DeadlineExceeded) as caught:
                await short
            assert caught.value.seconds == 0.05
            assert server.searches() == 1  # both in one request, with the longer time
            assert isinstance(server.requests[0], wire.Knn)
            assert 10 < (server.requests[0].timeout or 0) <= 20
            gate.set_result(None)
            check(cluster, await long, QUERIES[1], 3)
            assert nothing_left(asked)

    run(work())


def test_what_nobody_waits_for_is_cancelled() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            server = cluster.servers[0]
            server.script = never
            tasks = [asyncio.ensure_future(asked.knn(query, 3)) for query in QUERIES[:2]]
            tasks.append(asyncio.ensure_future(asked.range_search(QUERIES[0], 1.0)))
            await server.until(lambda: len(server.requests) == 2)
            tasks[0].cancel()
            tasks[2].cancel()
            await server.until(lambda: len(server.cancelled) == 1)
            assert len(asked._fleet.askings) == 1  # somebody waits for the other half of it
            tasks[1].cancel()
            await server.until(lambda: len(server.cancelled) == 2)
            assert nothing_left(asked)
            early = asyncio.ensure_future(asked.knn(QUERIES[0], 3))
            await asyncio.sleep(0)
            early.cancel()  # before it was sent
            await asyncio.gather(early, *tasks, return_exceptions=True)
            assert server.searches() == 1

    run(work())


def test_a_slow_replica_is_overtaken_and_then_left_alone() -> None:
    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster, await connect_async(cluster.file()) as asked:
            slow, quick = cluster.servers
            slow.script = never
            loop, worst = asyncio.get_running_loop(), []
            for query in QUERIES:
                began = loop.time()
                check(cluster, await asked.knn(query, 3), query, 3)
                worst.append(loop.time() - began)
            stats = asked.stats()
            assert quick.searches() == 200
            assert 0 < stats.hedged <= 0.05 * stats.queries + 64
            assert stats.hedged == slow.searches() < 20
            await slow.until(lambda: len(slow.cancelled) == slow.searches())
            assert nothing_left(asked)

    run(work())


def test_hedges_are_bounded_where_all_are_slow() -> None:
    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster, await connect_async(cluster.file()) as asked:
            asked._fleet.delay("knn").seconds = 0.0  # every answer is later than that

            def slowly(_server: ScriptedServer, message: wire.Message) -> Any:
                gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_later(0.003, _open, gate)
                asked._fleet.delay("knn").seconds = 0.0
                return gate if isinstance(message, wire.Knn) else None

            for server in cluster.servers:
                server.script = slowly
            for query in QUERIES[:150]:
                await asked.knn(query, 3)
            stats = asked.stats()
            assert 64 <= stats.hedged <= 0.05 * stats.queries + 64

    run(work())


def test_a_frozen_server_costs_no_query_and_is_used_again() -> None:
    async def work() -> None:
        async with ScriptedCluster(2, 2) as cluster, await connect_async(cluster.file()) as asked:
            await asyncio.gather(*(asked.knn(query, 3) for query in QUERIES[:20]))
            frozen = cluster.servers[0]
            asked._fleet.budget._tokens = 0.0  # no hedges: what it owes must be asked elsewhere all the same
            frozen.frozen = True
            tasks = [asyncio.ensure_future(asked.knn(QUERIES[:70], 3)) for _ in range(6)]
            for task in tasks:
                check(cluster, await task, QUERIES[:70], 3)
            replica = asked._fleet.replicas[0]
            assert replica.suspect
            connection = replica.connection()
            assert connection is not None
            before = connection._last_id
            for query in QUERIES[:50]:
                check(cluster, await asked.knn(query, 3), query, 3)
            assert connection._last_id == before
            frozen.thaw()
            await until(lambda: not replica.suspect)
            await until(lambda: nothing_left(asked))

    run(work())


def test_a_server_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "DEAD_SECONDS", 0.9)
    monkeypatch.setattr(fleet, "CONNECT_SECONDS", 0.2)

    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            cluster.servers[0].frozen = True
            with pytest.raises(Unavailable):
                await asked.knn(QUERIES[0], 3)
            cluster.servers[0].thaw()
            await until(lambda: asked._fleet.replicas[0].usable)
            check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3)

    monkeypatch.setattr(fleet, "GRACE_SECONDS", 0.05)
    run(work())


def test_a_long_search_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PING_SECONDS", 0.02)
    monkeypatch.setattr(fleet, "SUSPECT_SECONDS", 0.25)
    monkeypatch.setattr(fleet, "DEAD_SECONDS", 0.4)

    async def work() -> None:
        async with ScriptedCluster() as cluster, await connect_async(cluster.file()) as asked:
            cluster.servers[0].script = never
            with pytest.raises(DeadlineExceeded):
                await asked.knn(QUERIES[0], 3, timeout=1.0)
            assert cluster.servers[0].greeted == 1
            assert not asked._fleet.replicas[0].suspect

    run(work())


def test_a_draining_server_gets_nothing_new() -> None:
    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster, await connect_async(cluster.file()) as asked:
            leaving = cluster.servers[0]
            leaving.draining = True
            leaving.announce()
            await until(lambda: asked._fleet.replicas[0].draining)
            await asyncio.gather(*(asked.knn(query, 3) for query in QUERIES))
            assert leaving.searches() == 0

    run(work())


def test_more_than_a_server_takes_is_refused_here() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster:
            server = cluster.servers[0]
            server.limits = wire.Limits(pending=2)
            server.script = never
            async with await connect_async(cluster.file()) as asked:
                tasks = [asyncio.ensure_future(asked.knn(QUERIES[i], 3 + i)) for i in range(2)]
                await server.until(lambda: server.searches() == 2)
                with pytest.raises(Overloaded):
                    await asked.knn(QUERIES[0], 3)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert nothing_left(asked)

    run(work())


def test_several_connections_to_a_server() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster, await connect_async(cluster.file(), connections=3) as asked:
            await until(lambda: all(server.greeted == 3 for server in cluster.servers))
            answers = await asyncio.gather(*(asked.knn(QUERIES[i], 1 + i) for i in range(9)))
            for i, answer in enumerate(answers):
                check(cluster, answer, QUERIES[i], 1 + i)

    run(work())


def test_servers_that_join_and_leave_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "REREAD_GAP_SECONDS", 0.01)
    monkeypatch.setattr(fleet, "REREAD_SECONDS", 0.02)
    place = str(tmp_path / "cluster.json")

    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster:
            both = cluster.servers
            cluster.servers = both[:1]
            write_cluster(place, cluster.file())
            async with await connect_async(place) as asked:
                check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3)
                cluster.servers = both
                write_cluster(place, cluster.file(epoch=2))
                await both[1].until(lambda: both[1].greeted == 1)
                # The new layout: the old server leaves once the new one answers for it.
                cluster.servers = both[1:]
                write_cluster(place, cluster.file(epoch=3))
                await until(lambda: set(asked._fleet.replicas) == {1})
                check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3)
                assert both[0].connections  # still needed: nobody offers a snapshot of the new layout
                both[1].epoch, both[1].offers = 3, (offer_of(both[1].offers[0].rows, 0, epoch=3),)
                both[1].announce()
                await both[0].until(lambda: not both[0].connections)
                answer = await asked.knn(QUERIES[0], 3)
                assert answer.at == "3.1"

    run(work())


def test_a_cluster_file_that_does_not_parse_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet, "REREAD_GAP_SECONDS", 0.01)
    monkeypatch.setattr(fleet, "REREAD_SECONDS", 0.01)
    place = tmp_path / "cluster.json"
    reads: list[str] = []

    def counted(location: str, options: Any) -> ClusterFile:
        reads.append(location)
        return read_cluster(location, options)

    monkeypatch.setattr(fleet, "read_cluster", counted)

    async def work() -> None:
        async with ScriptedCluster() as cluster:
            write_cluster(str(place), cluster.file(epoch=5))
            async with await connect_async(place) as asked:
                place.write_text(place.read_text()[:50])
                count = len(reads)
                await until(lambda: len(reads) >= count + 4)
                check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3)
                write_cluster(str(place), cluster.file(epoch=4))  # stale
                count = len(reads)
                await until(lambda: len(reads) >= count + 3)
                assert asked._fleet.cluster.epoch == 5

    with caplog.at_level(logging.WARNING, logger="lance_dfaiss"):
        run(work())
    assert [record.getMessage() for record in caplog.records if "cluster file" in record.getMessage()] != []
    assert len([record for record in caplog.records if "cluster file" in record.getMessage()]) == 1


def test_one_warning_for_a_server_that_is_lost_and_one_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster, await connect_async(cluster.file()) as asked:
            for _ in range(3):
                cluster.servers[0].kill()
                await until(lambda: not asked._fleet.replicas[0].usable)
                await cluster.servers[0].start()
                await until(lambda: asked._fleet.replicas[0].usable)

    with caplog.at_level(logging.WARNING, logger="lance_dfaiss"):
        run(work())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "is lost" in said[0]
    assert "is back" in said[1]


def test_connecting_says_what_is_wrong(tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(ClusterFileInvalid):
            await connect_async(tmp_path / "none.json")
        async with ScriptedCluster(2) as cluster:
            server = cluster.servers[1]
            server.token = "secret"
            with pytest.raises(AccessDenied, match="wrong token"):
                await connect_async(cluster.file())
            with pytest.raises(AccessDenied, match="wrong token"):
                await connect_async(cluster.file(), token="guess")
            server.token, server.protocol = "", 99
            with pytest.raises(ProtocolError, match="version 99"):
                await connect_async(cluster.file())
            server.protocol = wire.PROTOCOL
            with pytest.raises(IndexNotFound, match="vec_idx"):
                await connect_async(cluster.file(), index="other")
            with pytest.raises(InvalidArgument):
                await connect_async(cluster.file(), connections=0)
            file = cluster.file()
            server.server = 7  # somebody else has got its port
            with pytest.raises(Unavailable, match="server 7"):
                await connect_async(file, timeout=0.3)
            server.server = 1
            server.kill()
            with pytest.raises(Unavailable, match=f"server 1 .127.0.0.1:{server.port}") as caught:
                await connect_async(cluster.file(), timeout=0.3)
            assert caught.value.coverage == 0.5
            async with await connect_async(cluster.file(), timeout=5, allow_partial=0.5) as asked:
                assert (await asked.knn(QUERIES[0], 3)).coverage == 0.5

    run(work())


def test_a_server_that_starts_late_is_waited_for() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster:
            cluster.servers[1].kill()
            task = asyncio.ensure_future(connect_async(cluster.file()))
            await cluster.servers[0].until(lambda: cluster.servers[0].greeted == 1)
            assert not task.done()
            await cluster.servers[1].start()
            async with await task as asked:
                check(cluster, await asked.knn(QUERIES[0], 3), QUERIES[0], 3)

    run(work())


def test_several_indexes() -> None:
    async def work() -> None:
        async with ScriptedCluster() as cluster:
            server = cluster.servers[0]
            file = cluster.file()
            more = ServedIndex(name="other_idx", dataset="memory", index="other_idx")
            file = ClusterFile(**{**{f: getattr(file, f) for f in file.__slots__}, "indexes": (*file.indexes, more)})
            server.offers = (*server.offers, offer_of((40,), 0, version=3, index="other_idx"))
            async with await connect_async(file) as asked:
                with pytest.raises(InvalidArgument, match="vec_idx"):
                    await asked.knn(QUERIES[0], 3)
                answers = await asyncio.gather(
                    asked.knn(QUERIES[0], 3, index="vec_idx"), asked.knn(QUERIES[0], 3, index="other_idx")
                )
                assert [answer.version for answer in answers] == [1, 3]
                with pytest.raises(IndexNotFound) as caught:
                    await asked.knn(QUERIES[0], 3, index="none")
                assert caught.value.available == ("other_idx", "vec_idx")
            async with await connect_async(file, index="other_idx") as asked:
                assert (await asked.knn(QUERIES[0], 3)).version == 3

    run(work())


def test_admin_and_status() -> None:
    async def work() -> None:
        async with ScriptedCluster(2) as cluster, await connect_async(cluster.file()) as asked:
            told = await asked.reload(version=3)
            assert {server: facts["at"]["vec_idx"] for server, facts in told.items()} == {0: "server 0", 1: "server 1"}
            assert [s.requests for s in cluster.servers] == [[wire.Reload(version=3, hold=True)]] * 2
            # Without a version one of them looks which is the newest, and the others are told.
            await asked.reload()
            assert cluster.servers[0].requests[-1] == wire.Reload()
            assert cluster.servers[1].requests[-1] == wire.Reload(index="vec_idx", version=3)
            await asked.drain(1)
            assert isinstance(cluster.servers[1].requests[-1], wire.Drain)
            cluster.servers[0].script = failing(AccessDenied("no admin"))
            with pytest.raises(AccessDenied):
                await asked.reload()
            cluster.servers[1].kill()
            await until(lambda: not asked._fleet.replicas[1].usable)
            status = await asked.status()
            assert status[0]["ready"]
            assert not status[1]["ready"]
            with pytest.raises(Unavailable):
                await asked.drain(1)
            assert nothing_left(asked)

    run(work())


def test_what_all_servers_are_told_waits_for_those_not_met_yet() -> None:
    # A search needs one server of each group, and that is all that `connect` waits for.
    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster:
            first, late = cluster.servers
            late.frozen = True
            async with await connect_async(cluster.file()) as asked:
                told = asyncio.ensure_future(asked.reload(version=3))
                await first.until(lambda: wire.Reload(version=3, hold=True) in first.requests)
                await late.until(lambda: bool(late.requests))
                late.frozen = False
                for connection in list(late.accepted):
                    connection.data_received(b"")
                assert set(await told) == {0, 1}
                assert nothing_left(asked)

    run(work())


def test_closing_fails_what_waits() -> None:
    async def work() -> None:
        async with ScriptedCluster(1, 2) as cluster:
            for server in cluster.servers:
                server.script = never
            asked = await connect_async(cluster.file())
            tasks = [asyncio.ensure_future(asked.knn(QUERIES[0], 3)), asyncio.ensure_future(asked.search(QUERIES[0]))]
            await until(lambda: sum(server.searches() for server in cluster.servers) == 2)
            tasks.append(asyncio.ensure_future(asked.knn(QUERIES[0], 3)))
            await asyncio.sleep(0)
            await asked.close()
            await asked.close()
            for task in tasks:
                with pytest.raises(ClientUnusable):
                    await task
            with pytest.raises(ClientUnusable):
                await asked.knn(QUERIES[0], 3)
            with pytest.raises(ClientUnusable):
                await asked.status()

    run(work())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def _server_side(certificates: Certificates, name: str, *, mutual: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    identity = getattr(certificates, name)
    context.load_cert_chain(identity.cert, identity.key)
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates.ca.cert)
    return context


def test_tls_with_a_ca_file_or_a_context(certificates: Certificates) -> None:
    with ClusterThread(ScriptedCluster(2), _server_side(certificates, "server", mutual=True)) as running:
        cluster = running.cluster
        context = ssl.create_default_context(cafile=str(certificates.ca.cert))
        context.load_cert_chain(certificates.client.cert, certificates.client.key)
        for server in cluster.servers:
            server.token = "secret"
        with connect(cluster.file(tls=True), tls=context, token="secret") as asked:
            check(cluster, asked.knn(QUERIES[:3], 3), QUERIES[:3], 3)
        with pytest.raises((AccessDenied, Unavailable), match="certificate"):  # without one of its own
            connect(cluster.file(tls=True), tls=certificates.ca.cert, token="secret", timeout=1.0)
    with (
        ClusterThread(ScriptedCluster(), _server_side(certificates, "server")) as running,
        connect(running.cluster.file(tls=True), tls=certificates.ca.cert) as asked,
    ):
        check(running.cluster, asked.knn(QUERIES[0], 3), QUERIES[0], 3)


@pytest.mark.parametrize("name", ["foreign_server", "wrong_host", "expired_server"])
def test_a_token_is_not_sent_to_a_server_that_is_not_trusted(certificates: Certificates, name: str) -> None:
    with ClusterThread(ScriptedCluster(), _server_side(certificates, name)) as running:
        with pytest.raises(AccessDenied, match="not trusted"):
            connect(running.cluster.file(tls=True), tls=certificates.ca.cert, token="secret")
        assert running.cluster.servers[0].greeted == 0


def test_a_token_does_not_travel_in_the_clear(certificates: Certificates) -> None:
    file = ClusterFile(
        epoch=1,
        replicas=1,
        refresh_seconds=0.0,
        indexes=(ServedIndex(name="vec_idx", dataset="memory", index="vec_idx"),),
        servers=(ServerEntry(id=0, host="192.0.2.1", port=9, http_port=None, group=0),),
        tls=False,
    )
    with pytest.raises(AccessDenied, match="unencrypted"):
        connect(file, token="secret")
    told = status_of(file, Caller(token="secret"))[0]
    assert isinstance(told, AccessDenied)
    assert "unencrypted" in told.message
    with pytest.raises(InvalidArgument, match="no certificates"):
        connect(file, tls=certificates.ca.key)


def test_one_side_without_tls(certificates: Certificates) -> None:
    with (
        ClusterThread(ScriptedCluster(), _server_side(certificates, "server")) as running,
        pytest.raises((ProtocolError, Unavailable), match="TLS"),
    ):
        connect(running.cluster.file(), timeout=0.5)
    with ClusterThread(ScriptedCluster()) as running, pytest.raises((ProtocolError, Unavailable)):
        connect(running.cluster.file(tls=True), tls=certificates.ca.cert, timeout=0.5)


def test_many_threads_share_a_client() -> None:
    with ClusterThread(ScriptedCluster(2, 2)) as running, lance_dfaiss.connect(running.cluster.file()) as asked:
        errors: list[BaseException] = []

        def work(start: int) -> None:
            try:
                for at in range(start, start + 40):
                    query = QUERIES[at % 200]
                    check(running.cluster, asked.knn(query, 3), query, 3)
                table = asked.search(QUERIES[start], 4, columns=["id"])
                _, row_ids = running.cluster.nearest(QUERIES[start], 4)
                assert table["id"].to_pylist() == (2 * row_ids[0]).tolist()
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert asked.stats().rows == 40
        assert set(asked.status()) == {0, 1, 2, 3}
        assert asked.explain(QUERIES[0], 3).results == 3
        np.testing.assert_array_equal(asked.reconstruct([5]), running.cluster.vectors[[5]])
        assert asked.range_search(QUERIES[0], 5.0, columns=[]).schema.names == ["_distance", "_rowid"]
        assert asked.reload()[3]["versions"] == {"vec_idx": 3}
        asked.drain(0)


def test_closing_a_client_in_use() -> None:
    with ClusterThread(ScriptedCluster()) as running:
        server = running.cluster.servers[0]
        server.script = never
        asked = connect(running.cluster.file())
        outcomes: list[BaseException] = []

        def work(call: Callable[[], Any]) -> None:
            try:
                call()
            except BaseException as exc:
                outcomes.append(exc)

        calls: list[Callable[[], Any]] = [lambda: asked.knn(QUERIES[0], 3), lambda: asked.search(QUERIES[0], 4)]
        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        running.until(server, lambda: server.searches() == 2)
        asked.close()
        asked.close()
        for thread in threads:
            thread.join(20)
        assert [type(outcome) for outcome in outcomes] == [ClientUnusable] * 2
        calls += [asked.status, asked.stats, lambda: asked.reconstruct([1])]
        for call in calls:
            with pytest.raises(ClientUnusable):
                call()


def test_a_client_that_is_dropped_ends_its_thread() -> None:
    with ClusterThread(ScriptedCluster()) as running:
        asked = connect(running.cluster.file())
        thread, gone = asked._bridge._thread, weakref.ref(asked)
        del asked
        gc.collect()
        assert gone() is None
        thread.join(20)
        assert not thread.is_alive()


def test_a_failed_connect_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(ClusterFileInvalid):
        connect("/nowhere/cluster.json")
    assert threading.active_count() == before


def test_a_forked_child_is_told_to_connect_itself() -> None:
    with ClusterThread(ScriptedCluster()) as running, connect(running.cluster.file()) as asked:
        asked.knn(QUERIES[0], 3)
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lance warns of every fork; the child does nothing with it
            child = os.fork()
        if child == 0:
            signal.alarm(20)  # it must not outlive the test, whatever happens
            said = []
            for call in (lambda: asked.knn(QUERIES[0], 3), asked.status, lambda: asked.search(QUERIES[0])):
                try:
                    call()
                except ClientUnusable as exc:
                    said.append("forked" in str(exc))
                except BaseException:
                    said.append(False)
            asked.close()
            os.write(write, json.dumps(said).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            assert json.loads(pipe.read()) == [True, True, True]
        assert os.waitpid(child, 0)[1] == 0
        check(running.cluster, asked.knn(QUERIES[0], 3), QUERIES[0], 3)


def test_a_client_is_not_pickled() -> None:
    with ClusterThread(ScriptedCluster()) as running, connect(running.cluster.file()) as asked:
        for one in (asked, asked._client):
            with pytest.raises(ClientUnusable, match="pickled"):
                pickle.dumps(one)


@pytest.mark.parametrize("name", ["knn", "search"])
def test_an_interrupted_call_is_cancelled(name: str) -> None:
    with ClusterThread(ScriptedCluster()) as running, connect(running.cluster.file()) as asked:
        server = running.cluster.servers[0]
        server.script = never

        def interrupt() -> None:
            running.until(server, lambda: server.searches() >= 1)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            getattr(asked, name)(QUERIES[0], 3)
        thread.join(20)
        running.until(server, lambda: len(server.cancelled) == 1)
        server.script = lambda _server, _message: None
        check(running.cluster, asked.knn(QUERIES[0], 3), QUERIES[0], 3)


def test_constants_leave_time_for_each_other() -> None:
    assert fleet.PING_SECONDS < fleet.SUSPECT_SECONDS < fleet.DEAD_SECONDS < client.TIMEOUT_SECONDS
    assert fleet.BACKOFF_MAX_SECONDS < fleet.GRACE_SECONDS
    assert questions.COALESCED_QUERIES <= 64
