"""Whom to ask, when to ask twice, and how much an answer covers: for any servers and offers, not only likely ones."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from lance_dfaiss.serve.routing import (
    HEDGE_BURST_QUERIES,
    HEDGE_CEILING_SECONDS,
    HEDGE_FLOOR_SECONDS,
    HEDGE_SHARE,
    HEDGE_UNKNOWN_SECONDS,
    REFUSED_MAX_SECONDS,
    SLOW_FIRST_SECONDS,
    SLOW_MAX_SECONDS,
    HedgeBudget,
    LearnedDelay,
    ReplicaLoad,
    Standing,
    choose_route,
    coverage_of,
    missing_of,
    pick,
)
from lance_dfaiss.serve.wire import Offer
from tests.serve.scripted import offer_of


@st.composite
def _clusters(draw: st.DrawFn) -> list[Standing]:
    """Servers of two layouts, each offering any of the snapshots there are."""
    layouts = {1: draw(st.integers(1, 4)), 2: draw(st.integers(1, 4))}
    rows = {
        (epoch, version): draw(st.lists(st.integers(0, 9), min_size=groups, max_size=groups))
        for epoch, groups in layouts.items()
        for version in (1, 2, 3)
    }
    standings = []
    for server in range(draw(st.integers(0, 7))):
        offers = []
        for epoch, groups in layouts.items():
            group = draw(st.integers(0, groups - 1))
            for version in draw(st.sets(st.sampled_from([1, 2, 3]))):
                offers.append(offer_of(rows[epoch, version], group, epoch=epoch, version=version))
        standings.append(Standing(server, draw(st.booleans()), tuple(offers)))
    return standings


def _usable_offers(standings: list[Standing]) -> list[tuple[int, Offer]]:
    return [(each.server, offer) for each in standings if each.usable for offer in each.offers]


@given(_clusters())
def test_a_route_is_one_snapshot_that_its_members_offer(standings: list[Standing]) -> None:
    route = choose_route("vec_idx", standings)
    offered = _usable_offers(standings)
    if route is None:
        assert not offered
        return
    for group, members in enumerate(route.members):
        expected = {server for server, offer in offered if (offer.at, offer.group) == (route.offer.at, group)}
        assert set(members) == expected
    assert set(route.needed) == {g for g, rows in enumerate(route.offer.rows) if rows} or len(route.needed) == 1


@given(_clusters())
def test_the_newest_snapshot_is_taken_that_all_groups_answer_for(standings: list[Standing]) -> None:
    offered = _usable_offers(standings)
    whole = {}
    for _, offer in offered:
        groups = {other.group for _, other in offered if other.at == offer.at}
        if all(group in groups for group, rows in enumerate(offer.rows) if rows):
            whole[offer.at] = offer.order
    route = choose_route("vec_idx", standings)
    if whole:
        assert route is not None
        assert not route.missing
        assert route.coverage == 1.0
        assert whole[route.offer.at] == max(whole.values())
    elif route is not None:
        assert route.missing
        assert route.coverage < 1.0


@given(_clusters())
def test_without_a_whole_one_nothing_covers_more(standings: list[Standing]) -> None:
    route = choose_route("vec_idx", standings)
    if route is None:
        return
    offered = _usable_offers(standings)
    for _, offer in offered:
        groups = {other.group for _, other in offered if other.at == offer.at}
        assert route.coverage >= coverage_of(offer.rows, groups)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=8), st.data())
def test_coverage_is_exact(rows: list[int], data: st.DataObject) -> None:
    answered = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    coverage = coverage_of(rows, answered)
    if sum(rows) == 0:
        assert coverage == 1.0
    else:
        exact = Fraction(sum(rows[group] for group in answered), sum(rows))
        assert coverage == float(exact)
        assert (coverage == 1.0) == (exact == 1)


@given(_clusters(), st.sets(st.integers(0, 3)))
def test_what_is_missing_is_named(standings: list[Standing], failed: set[int]) -> None:
    missing = missing_of("vec_idx", standings, failed)
    assert 0.0 <= missing.coverage <= 1.0
    route = choose_route("vec_idx", standings)
    if route is not None and not route.missing:
        assert set(missing.groups) == failed & set(route.needed)
    assert set(missing.shards) <= {f"shard-{group}" for group in missing.groups}
    if not missing.groups and route is not None:
        assert missing.coverage == 1.0


def test_a_group_that_went_away_is_named_with_its_shards() -> None:
    standings = [Standing(0, True, (offer_of((3, 1), 0),)), Standing(1, False, (offer_of((3, 1), 1),))]
    missing = missing_of("vec_idx", standings)
    assert (missing.groups, missing.shards, missing.coverage) == ((1,), ("shard-1",), 0.75)


def test_with_nobody_left_the_last_snapshot_is_missed() -> None:
    standings = [Standing(server, False, (offer_of((3, 1), server),)) for server in (0, 1)]
    missing = missing_of("vec_idx", standings)
    assert (missing.groups, missing.shards, missing.coverage) == ((0, 1), ("shard-0", "shard-1"), 0.0)


def test_groups_without_rows_need_no_server() -> None:
    route = choose_route("vec_idx", [Standing(0, True, (offer_of((5, 0, 0), 0),))])
    assert route is not None
    assert (route.needed, route.missing, route.coverage) == ((0,), (), 1.0)


def test_an_empty_index_is_asked_all_the_same() -> None:
    route = choose_route("vec_idx", [Standing(0, True, (offer_of((0, 0), 1),))])
    assert route is not None
    assert (route.needed, route.missing) == ((1,), ())


def test_columns_in_ram_are_those_that_all_have_there() -> None:
    offers = [offer_of((5, 5), 0, payload=("a", "b")), offer_of((5, 5), 1, payload=("b", "c"))]
    route = choose_route("vec_idx", [Standing(i, True, (offer,)) for i, offer in enumerate(offers)])
    assert route is not None
    assert route.payload == {"b"}


@st.composite
def _loads(draw: st.DrawFn) -> list[ReplicaLoad]:
    loads = []
    for _ in range(draw(st.integers(1, 5))):
        load = ReplicaLoad()
        load.suspect = draw(st.booleans())
        for seconds in draw(st.lists(st.floats(1e-5, 0.5), max_size=3)):
            load.answered(seconds, 10.0)
        if draw(st.booleans()):
            load.overtaken(0.2, draw(st.sampled_from([9.0, 9.95, 10.0])))
        load.began(draw(st.integers(0, 3)), 9.96)
        loads.append(load)
    return loads


@given(_loads(), st.integers())
def test_the_least_busy_of_the_healthy_is_asked(loads: list[ReplicaLoad], seed: int) -> None:
    chosen = pick(loads, 10.0, random.Random(seed).random)
    for other in loads:
        ours = (chosen.suspect, chosen.rests(10.0), chosen.outstanding, chosen.step(10.0))
        assert ours <= (other.suspect, other.rests(10.0), other.outstanding, other.step(10.0))


def test_equals_take_turns() -> None:
    loads = [ReplicaLoad(), ReplicaLoad()]
    rng = random.Random(1)
    assert {id(pick(loads, 0.0, rng.random)) for _ in range(50)} == {id(load) for load in loads}


def test_a_latency_from_long_ago_counts_for_nothing() -> None:
    slow, unknown = ReplicaLoad(), ReplicaLoad()
    slow.answered(0.4, 0.0)
    assert pick([slow, unknown], 0.5, lambda: 0.5) is unknown
    rng = random.Random(1)
    assert {pick([slow, unknown], 60.0, rng.random) is slow for _ in range(50)} == {True, False}


def test_a_replica_that_hangs_is_tried_less_and_less() -> None:
    hangs, fine = ReplicaLoad(), ReplicaLoad()
    rng = random.Random(1)
    asked, now = [], 0.0
    while now < 60.0:
        chosen = pick([hangs, fine], now, rng.random)
        chosen.began(1, now)
        if chosen is hangs:
            asked.append(now)
            hangs.overtaken(0.01, now + 0.01)
        else:
            fine.answered(0.001, now)
        chosen.ended(1)
        now += 0.005
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert len(asked) < 30  # of 12,000
    assert gaps[0] >= SLOW_FIRST_SECONDS
    assert all(gap >= min(2**i * SLOW_FIRST_SECONDS, SLOW_MAX_SECONDS) for i, gap in enumerate(gaps))


def test_a_replica_that_comes_back_is_trusted_at_once() -> None:
    load = ReplicaLoad()
    for _ in range(8):
        load.began(1, 0.0)
        load.overtaken(0.01, 0.0)
    assert load.rests(SLOW_MAX_SECONDS - 0.1)
    load.answered(0.001, 1.0)
    assert not load.rests(1.0)


def test_all_that_waited_for_it_count_as_one() -> None:
    load = ReplicaLoad()
    for _ in range(8):
        load.overtaken(0.01, 0.0)
    assert not load.rests(SLOW_FIRST_SECONDS)


def test_one_probe_at_a_time() -> None:
    load = ReplicaLoad()
    load.overtaken(0.01, 0.0)
    now = SLOW_FIRST_SECONDS
    assert not load.rests(now)
    load.began(1, now)
    assert load.rests(now)


@given(st.lists(st.tuples(st.integers(1, 64), st.booleans()), max_size=300))
def test_hedges_are_a_twentieth_and_a_burst_at_most(steps: list[tuple[int, bool]]) -> None:
    budget, asked, hedged = HedgeBudget(), 0, 0
    for queries, wants in steps:
        budget.earn(queries)
        asked += queries
        if wants and budget.spend(queries):
            hedged += queries
        assert hedged <= HEDGE_SHARE * asked + HEDGE_BURST_QUERIES + 1e-6
    assert (budget.asked, budget.hedged) == (asked, hedged)


def test_a_full_budget_covers_what_one_server_owes() -> None:
    budget = HedgeBudget()
    assert budget.spend(HEDGE_BURST_QUERIES)
    assert not budget.spend(1)
    budget.earn(40)
    assert budget.spend(2)
    assert not budget.spend(1)


@given(st.lists(st.floats(0, 10), min_size=0, max_size=500))
def test_the_delay_stays_within_its_bounds(latencies: list[float]) -> None:
    delay = LearnedDelay()
    for seconds in latencies:
        delay.saw(seconds)
    assert HEDGE_FLOOR_SECONDS <= delay.seconds <= HEDGE_CEILING_SECONDS


def test_the_delay_follows_what_answers_take() -> None:
    delay = LearnedDelay()
    assert delay.seconds == HEDGE_UNKNOWN_SECONDS
    for _ in range(400):
        delay.saw(0.010)
    assert 0.010 < delay.seconds <= 0.05
    for _ in range(400):
        delay.saw(0.100)
    assert 0.100 < delay.seconds <= 0.5
    for i in range(400):
        delay.saw(0.5 if i % 100 == 0 else 0.001)  # a rare straggler teaches nothing
    assert delay.seconds < 0.1


def test_a_replica_that_refused_is_left_alone_for_as_long_as_it_asks() -> None:
    full, other = ReplicaLoad(), ReplicaLoad()
    full.refused(0.05, 10.0)
    other.began(3, 10.0)  # the other one has more to do
    assert pick([full, other], 10.04, lambda: 0.5) is other
    assert pick([full, other], 10.06, lambda: 0.5) is full
    full.refused(1e9, 20.0)
    assert full.rests(20.0 + 0.99 * REFUSED_MAX_SECONDS)
    assert not full.rests(20.0 + REFUSED_MAX_SECONDS)
    full.refused(-1.0, 30.0)
    assert not full.rests(30.0)
    assert pick([full], 20.0, lambda: 0.5) is full  # where there is nobody else


def test_a_silent_replica_is_asked_where_there_is_nobody_else_and_is_no_help() -> None:
    silent, fine = ReplicaLoad(), ReplicaLoad()
    silent.mute = True
    fine.began(5, 0.0)
    assert pick([silent, fine], 0.0, lambda: 0.5) is fine
    assert pick([silent], 0.0, lambda: 0.5) is silent
    assert (silent.may_help(0.0), fine.may_help(0.0)) == (False, True)
    silent.forget()
    assert silent.may_help(0.0)
    fine.refused(0.5, 0.0)
    assert not fine.may_help(0.4)
    assert fine.may_help(0.5)
