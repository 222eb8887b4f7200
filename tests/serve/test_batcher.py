"""What is searched together: nothing is lost, nothing twice, keys take turns, the queue is bounded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.serve.batcher import Batcher, Waiting

DIM = 2


def request(key: str, queries: int, *, deadline: float = math.inf, ticket: Any = None) -> Waiting[str]:
    return Waiting(key, np.zeros((queries, DIM), np.float32), deadline, ticket, 0.0)


def drain(batcher: Batcher[str], now: float = 0.0) -> list[tuple[str, list[tuple[Any, int, int]]]]:
    taken: list[tuple[str, list[tuple[Any, int, int]]]] = []
    while True:
        batch, _ = batcher.take(now)
        if batch is None:
            return taken
        taken.append((batch.key, [(part.request.ticket, part.start, part.stop) for part in batch.slices]))


def test_equal_keys_are_searched_together() -> None:
    batcher: Batcher[str] = Batcher(max_waiting=100, max_batch=10)
    for i in range(3):
        assert batcher.offer(request("a", 2, ticket=i))
    assert drain(batcher) == [("a", [(0, 0, 2), (1, 0, 2), (2, 0, 2)])]
    assert batcher.waiting == 0


def test_keys_take_turns() -> None:
    batcher: Batcher[str] = Batcher(max_waiting=1_000, max_batch=2)
    for _ in range(6):
        batcher.offer(request("busy", 1))
    batcher.offer(request("rare", 1))
    keys = [key for key, _ in drain(batcher)]
    assert keys == ["busy", "rare", "busy", "busy"]


def test_a_large_request_is_taken_in_turns() -> None:
    batcher: Batcher[str] = Batcher(max_waiting=4, max_batch=4)
    assert batcher.offer(request("a", 10, ticket="large")), "one request alone may be larger than the queue"
    assert not batcher.offer(request("b", 1))
    assert [parts for _, parts in drain(batcher)] == [[("large", 0, 4)], [("large", 4, 8)], [("large", 8, 10)]]


def test_a_full_queue_takes_nothing_more_and_has_room_again() -> None:
    batcher: Batcher[str] = Batcher(max_waiting=3, max_batch=8)
    assert batcher.offer(request("a", 3))
    assert not batcher.offer(request("b", 1))
    batcher.take(0.0)
    assert batcher.offer(request("b", 1))


def test_what_nobody_waits_for_is_not_searched() -> None:
    batcher: Batcher[str] = Batcher(max_waiting=10, max_batch=8)
    late, gone, good = request("a", 2, deadline=5.0), request("a", 3), request("a", 1, ticket="good")
    for each in (late, gone, good):
        batcher.offer(each)
    batcher.drop(gone)
    assert batcher.waiting == 3
    batch, expired = batcher.take(5.0)
    assert batch is not None
    assert [part.request for part in batch.slices] == [good]
    assert expired == [late]
    assert batcher.waiting == 0
    batcher.drop(gone)
    assert batcher.waiting == 0, "dropped twice counts once"


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, Any]]:
    steps = st.one_of(
        st.tuples(
            st.just("offer"), st.tuples(st.sampled_from("abc"), st.integers(1, 9), st.sampled_from([2.0, math.inf]))
        ),
        st.tuples(st.just("drop"), st.integers(0, 30)),
        st.tuples(st.just("take"), st.sampled_from([1.0, 3.0])),
    )
    return draw(st.lists(steps, max_size=60))


@given(histories(), st.integers(1, 12), st.integers(1, 7))
def test_every_query_is_taken_once_expires_or_is_dropped(
    history: list[tuple[str, Any]], max_waiting: int, max_batch: int
) -> None:
    batcher: Batcher[str] = Batcher(max_waiting=max_waiting, max_batch=max_batch)
    accepted: list[Waiting[str]] = []
    seen: dict[int, list[int]] = {}
    expired_ids: set[int] = set()
    dropped: set[int] = set()

    def take(now: float) -> bool:
        batch, expired = batcher.take(now)
        for late in expired:
            assert late.deadline <= now
            assert id(late) not in expired_ids
            expired_ids.add(id(late))
        if batch is None:
            return bool(expired)
        assert 1 <= batch.queries <= max_batch
        assert batch.queries == sum(part.stop - part.start for part in batch.slices)
        for part in batch.slices:
            assert part.request.key == batch.key
            assert id(part.request) not in dropped | expired_ids
            seen.setdefault(id(part.request), []).extend(range(part.start, part.stop))
        return True

    for action, value in history:
        if action == "offer":
            key, queries, deadline = value
            each = request(key, queries, deadline=deadline)
            room = batcher.waiting == 0 or batcher.waiting + queries <= max_waiting
            assert batcher.offer(each) == room
            if room:
                accepted.append(each)
        elif action == "drop" and accepted:
            each = accepted[value % len(accepted)]
            if len(seen.get(id(each), ())) < len(each.queries):
                dropped.add(id(each))
            batcher.drop(each)
        elif action == "take":
            take(value)
        assert batcher.waiting == sum(each.left for each in accepted)
    while take(1.0):
        pass
    for each in accepted:
        taken = seen.get(id(each), [])
        assert taken == list(range(len(taken))), "in order, none twice"
        if id(each) not in dropped | expired_ids:
            assert len(taken) == len(each.queries)
    assert batcher.waiting == 0
