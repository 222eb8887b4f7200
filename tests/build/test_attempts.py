"""Decisions about attempts, under any order of events: every task ends once, nothing is counted twice."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.build.attempts import Attempt, AttemptRules, Attempts, Pulse

RULES = AttemptRules(
    max_retries=3, silence_seconds=60, stall_seconds=900, start_seconds=300, twin_factor=2, twin_seconds=20
)


def begin_all(attempts: Attempts, now: float = 0.0) -> list[Attempt]:
    begun = []
    while (attempt := attempts.begin(now)) is not None:
        begun.append(attempt)
    return begun


def begin_one(attempts: Attempts, now: float = 0.0) -> Attempt:
    attempt = attempts.begin(now)
    assert attempt is not None
    return attempt


@given(
    rows=st.lists(st.integers(0, 1_000), min_size=1, max_size=12),
    slots=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_every_task_ends_once_whatever_happens(rows: list[int], slots: int, seed: int) -> None:
    rng = random.Random(seed)
    attempts = Attempts(rows, slots, RULES)
    now, counted, results = 0.0, 0, [0] * len(rows)
    lost = [0] * len(rows)
    while not attempts.done:
        now += rng.choice([0.1, 1.0, 30.0])
        while (begun := attempts.begin(now)) is not None:
            twins = [each for each in attempts.running if each.task == begun.task]
            assert len(twins) <= 2
            assert begun.twin == (len(twins) == 2)
            assert results[begun.task] == 0
        assert 0 < len(attempts.running) <= slots
        attempt = rng.choice(attempts.running)
        event = rng.choice(["heard", "heard", "finished", "lost", "put back", "look"])
        if event == "heard":
            done = rng.randrange(rows[attempt.task] + 1)
            gain = attempts.heard(attempt.ident, f"node {rng.randrange(3)}", "w", done, done * 4, now=now)
            counted += gain.rows
        elif event == "finished":
            won = attempts.finished(attempt.ident, rows[attempt.task], rows[attempt.task] * 4, rng.uniform(0.1, 50))
            assert won is not None
            counted += won[0].rows
            results[attempt.task] += 1
            assert all(other.task != attempt.task for other in attempts.running)
        elif event == "lost" and lost[attempt.task] < RULES.max_retries:
            lost[attempt.task] += 1
            assert attempts.lost(attempt.ident, "gone", cut_off=rng.random() < 0.5)
        elif event == "put back" and attempt.begun is None:
            attempts.put_back(attempt.ident)
        elif event == "look":
            silent, stalled, late = attempts.look(now)
            assert not {*silent, *stalled} & set(late)
            assert all(each.begun is not None for each in (*silent, *stalled))
        assert counted <= sum(rows)
    assert results == [1] * len(rows)
    assert counted == sum(rows)
    assert attempts.begin(now) is None


@given(st.integers(0, 5))
def test_a_task_may_be_lost_so_many_times(max_retries: int) -> None:
    attempts = Attempts([10], 1, AttemptRules(max_retries=max_retries))
    for number in range(max_retries + 1):
        attempt = begin_one(attempts)
        assert attempt.number == number + 1
        assert attempts.lost(attempt.ident, f"reason {number}") == (number < max_retries)
    assert attempts.losses(0) == tuple(f"reason {number}" for number in range(max_retries + 1))


def test_a_retry_goes_elsewhere_and_comes_first() -> None:
    attempts = Attempts([10, 10, 10], 1, RULES)
    lost = begin_one(attempts)
    attempts.heard(lost.ident, "a", "w", 1, 1, now=1)
    attempts.lost(lost.ident, "gone")
    again = begin_one(attempts)
    assert (again.task, again.avoid, again.twin) == (lost.task, frozenset({"a"}), False)


def test_all_tasks_avoid_a_node_that_was_cut_off() -> None:
    attempts = Attempts([10, 10], 1, RULES)
    lost = begin_one(attempts)
    attempts.heard(lost.ident, "a", "w", 1, 1, now=1)
    attempts.lost(lost.ident, "silent", cut_off=True)
    attempts.finished(begin_one(attempts).ident, 10, 10, 1.0)
    assert begin_one(attempts).avoid == {"a"}


def test_what_a_retry_repeats_is_not_counted_again() -> None:
    attempts = Attempts([100], 1, RULES)
    first = begin_one(attempts)
    assert attempts.heard(first.ident, "a", "w", 60, 600, now=1).rows == 60
    attempts.lost(first.ident, "gone")
    second = begin_one(attempts)
    assert attempts.heard(second.ident, "b", "w", 40, 700, now=2).rows == 0
    assert attempts.heard(first.ident, "a", "w", 99, 990, now=2).rows == 0  # it is given up: what it says is nothing
    won = attempts.finished(second.ident, 100, 1_000, 2.0)
    assert won is not None
    assert (won[0].rows, won[0].num_bytes) == (40, 300)


def test_who_is_silent_who_stands_still_and_who_has_not_begun() -> None:
    attempts = Attempts([10] * 4, 4, RULES)
    works, silent, stalled, waits = begin_all(attempts)
    for attempt in (works, silent, stalled):
        attempts.heard(attempt.ident, "a", "w", 1, 1, now=0)
    found: dict[int, tuple[str, float]] = {}
    for second in range(1_000):
        attempts.heard(works.ident, "a", "w", 1, second + 2, now=second)
        attempts.heard(stalled.ident, "a", "w", 1, 1, now=second)
        for kind, overdue in zip(("silent", "stalled", "late"), attempts.look(second), strict=True):
            for attempt in overdue:
                found.setdefault(attempt.ident, (kind, second))
    assert found == {silent.ident: ("silent", 61), stalled.ident: ("stalled", 901), waits.ident: ("late", 301)}


def test_what_a_node_that_has_gone_leaves_behind() -> None:
    attempts = Attempts([10] * 3, 3, RULES, gone={"gone before"})
    there, elsewhere, on_its_way = begin_all(attempts)
    attempts.heard(there.ident, "a", "w", 0, 0, now=1.0)
    attempts.heard(elsewhere.ident, "b", "w", 0, 0, now=1.0)
    assert attempts.left_behind({"gone before"}) == ((), ())
    assert attempts.left_behind({"gone before", "a"}) == ((there,), (on_its_way,))
    # It is news once, and what is sent again is not sent as before.
    assert attempts.left_behind({"gone before", "a"}) == ((), ())
    attempts.put_back(on_its_way.ident)
    on_its_way = begin_one(attempts)
    assert on_its_way.avoid == {"a"}
    assert attempts.left_behind({"gone before", "a", "b"}) == ((elsewhere,), (on_its_way,))


def test_a_pause_of_the_driver_is_not_held_against_workers() -> None:
    attempts = Attempts([10], 1, RULES)
    attempt = begin_one(attempts)
    attempts.heard(attempt.ident, "a", "w", 1, 1, now=0)
    attempts.look(0)
    assert attempts.look(3_600) == ((), (), ())
    pulse = Pulse(10)
    pulse.heard(1)
    assert pulse.overdue(0) == pulse.overdue(500) == pulse.overdue(1_000) == set()
    assert pulse.overdue(1_001) == {1}
    pulse.forget(1)
    assert pulse.overdue(5_000) == set()


@pytest.mark.parametrize(
    ("elapsed", "rows", "gets"),
    [
        (19.0, 0, False),  # too early for anybody
        (21.0, 0, True),  # others took 10 s for as many rows, and it has none
        (21.0, 90, False),  # nearly there
        (21.0, 50, True),  # as long again; a new one takes 10 s
        (100.0, 100, True),  # all rows done, and does not come to an end
    ],
)
def test_who_gets_a_twin(elapsed: float, rows: int, gets: bool) -> None:
    attempts = Attempts([100] * 3, 2, RULES)
    slow, quick = begin_all(attempts)
    attempts.heard(slow.ident, "a", "w", 0, 1, now=0)
    attempts.heard(quick.ident, "b", "w", 0, 1, now=0)
    attempts.finished(quick.ident, 100, 1, 10.0)
    last = begin_one(attempts, 10)
    assert last.task == 2  # a task that waits comes before any twin
    attempts.finished(last.ident, 100, 1, 10.0)
    attempts.heard(slow.ident, "a", "w", rows, 1, now=elapsed)
    twin = attempts.begin(elapsed)
    assert (twin is not None) == gets
    if twin is not None:
        assert (twin.task, twin.twin, twin.avoid) == (slow.task, True, frozenset({"a"}))
        assert attempts.begin(elapsed + 1_000) is None  # one twin is enough
        won = attempts.finished(twin.ident, 100, 1, 10.0)
        assert won is not None
        assert [loser.ident for loser in won[1]] == [slow.ident]
        assert attempts.finished(slow.ident, 100, 1, 200.0) is None
        assert attempts.done


def test_a_lost_twin_leaves_the_other_one_running() -> None:
    attempts = Attempts([100] * 2, 2, RULES)
    slow, quick = begin_all(attempts)
    attempts.heard(slow.ident, "a", "w", 0, 1, now=0)
    attempts.finished(quick.ident, 100, 1, 1.0)
    twin = begin_one(attempts, 50)
    for _ in range(RULES.max_retries + 1):
        assert attempts.lost(twin.ident, "gone")
        twin = begin_one(attempts, 50)
        assert twin.twin
    assert attempts.finished(slow.ident, 100, 1, 60.0) is not None
    assert attempts.done
