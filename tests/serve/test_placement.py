"""Where shards and fragments lie: even, steady, and the same wherever it is computed."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.serve.placement import assign_groups, join_group, leave_group, place_fragment, place_shards

Shards = list[tuple[str, int]]

HOSTS = st.sampled_from(["a", "b", "c", "d"])
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=1, max_size=9)


def shards_of(seed: int, lengths: list[int]) -> Shards:
    """Shards with digests that look like real ones; hypothesis alone would try texts such as ``0000``."""
    draw = random.Random(seed)
    return [(f"{draw.getrandbits(256):064x}", length) for length in lengths]


@st.composite
def any_shards(draw: st.DrawFn, max_size: int = 60) -> Shards:
    lengths = st.lists(st.integers(0, 10**12) | st.sampled_from([1, 1_000, 10**9]), max_size=max_size)
    return shards_of(draw(st.integers(0, 10**6)), draw(lengths))


@st.composite
def similar_shards(draw: st.DrawFn, *, groups: int, least_per_group: int) -> Shards:
    count = groups * least_per_group + draw(st.integers(0, 3 * groups))
    spread = draw(st.sampled_from([0, 50, 300]))
    sizes = random.Random(draw(st.integers(0, 10**6)))
    lengths = [10**6 + 1_000 * sizes.randint(-spread, spread) for _ in range(count)]
    return shards_of(draw(st.integers(0, 10**6)), lengths)


def loads_of(shards: Shards, placed: list[int], groups: int) -> list[int]:
    loads = [0] * groups
    for (_, length), group in zip(shards, placed, strict=True):
        loads[group] += length
    return loads


def moved(shards: Shards, before: list[int], after: list[int]) -> float:
    """Part of the bytes that changed group."""
    total = sum(length for _, length in shards)
    return sum(length for (_, length), a, b in zip(shards, before, after, strict=True) if a != b) / total


@given(any_shards(), WEIGHTS)
def test_every_shard_is_placed_within_the_limit(shards: Shards, weights: list[float]) -> None:
    check_limit(shards, weights)


@pytest.mark.parametrize("seed", range(60))
def test_uneven_shards_on_uneven_groups_stay_within_the_limit(seed: int) -> None:
    draw = random.Random(seed)
    shards = shards_of(seed, [draw.choice([1, 1_000, 10**6]) for _ in range(draw.randint(3, 60))])
    check_limit(shards, [1, 3, 0.5, 1, 1, 1, 1, 10, 1, 0.1])


def check_limit(shards: Shards, weights: list[float]) -> None:
    placed = place_shards(shards, weights)
    assert len(placed) == len(shards)
    assert set(placed) <= set(range(len(weights)))
    total, largest = sum(length for _, length in shards), max((length for _, length in shards), default=0)
    for load, weight in zip(loads_of(shards, placed, len(weights)), weights, strict=True):
        assert load <= (1.25 * total * weight / math.fsum(weights) + largest) * (1 + 1e-9)


@given(any_shards(), any_shards(max_size=5), WEIGHTS)
def test_a_delta_moves_no_shard(shards: Shards, delta: Shards, weights: list[float]) -> None:
    before = place_shards(shards, weights)
    assert place_shards([*shards, *delta], weights)[: len(shards)] == before


@pytest.mark.parametrize("groups", range(1, 13))
@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_few_equal_shards_lie_one_or_two_in_each_group(groups: int, each: int, seed: int) -> None:
    shards = shards_of(seed, [1_000] * (groups * each))
    assert loads_of(shards, place_shards(shards, [1.0] * groups), groups) == [each * 1_000] * groups


@given(st.data(), st.integers(1, 12))
def test_many_similar_shards_lie_evenly(data: st.DataObject, groups: int) -> None:
    shards = data.draw(similar_shards(groups=groups, least_per_group=16))
    loads = loads_of(shards, place_shards(shards, [1.0] * groups), groups)
    assert max(loads) <= 1.3 * sum(loads) / groups
    assert min(loads) >= 0.6 * sum(loads) / groups


@given(st.data(), st.integers(1, 12))
def test_one_more_group_moves_little_but_its_share(data: st.DataObject, groups: int) -> None:
    shards = data.draw(similar_shards(groups=groups, least_per_group=16))
    before = place_shards(shards, [1.0] * groups)
    after = place_shards(shards, [1.0] * (groups + 1))
    assert moved(shards, before, after) <= 1.5 / (groups + 1)
    between_old = [new if new == groups else old for old, new in zip(before, after, strict=True)]
    # Whatever did not go to the new group stayed, but for the few that were one too many for theirs.
    assert moved(shards, between_old, after) <= 0.25 / (groups + 1)


def test_with_few_shards_one_more_group_can_move_much() -> None:
    # What the page on coordination warns of.
    sizes = random.Random(778)
    shards = shards_of(111, [10**6 + 1_000 * sizes.randint(-50, 50) for _ in range(33)])
    share = moved(shards, place_shards(shards, [1.0] * 11), place_shards(shards, [1.0] * 12))
    assert 2.5 / 12 < share < 3 / 12


@given(st.data(), st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=8))
def test_bytes_follow_weights(data: st.DataObject, weights: list[float]) -> None:
    shards = data.draw(similar_shards(groups=len(weights), least_per_group=40))
    loads = loads_of(shards, place_shards(shards, weights), len(weights))
    largest = max(length for _, length in shards)
    for load, weight in zip(loads, weights, strict=True):
        fair = sum(loads) * weight / sum(weights)
        assert 0.7 * fair - 2 * largest <= load <= 1.25 * fair + largest


@given(any_shards(), WEIGHTS, st.integers(-3, 3))
def test_only_the_ratio_of_weights_counts(shards: Shards, weights: list[float], exponent: int) -> None:
    # Powers of two: scaled without rounding.
    assert place_shards(shards, weights) == place_shards(shards, [weight * 2.0**exponent for weight in weights])


def test_where_shards_lie_depends_on_their_digests() -> None:
    """It is hashing, not counting: among many equal shards, which group gets which is up to the digest."""
    lengths = [1_000] * 200
    one, other = (place_shards(shards_of(seed, lengths), [1.0] * 4) for seed in (1, 2))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 120


def test_placement_is_what_it_was() -> None:
    """Servers of two releases must agree: a change here is a change of the cluster's protocol."""
    shards = shards_of(7, [1_000 + 13 * number for number in range(40)])
    placed = place_shards(shards, [1.0, 1.0, 2.0, 0.5])
    assert "".join(map(str, placed)) == "2201220132012202130212122302021210231200"
    assert (
        "".join(str(place_fragment(number, [1.0, 1.0, 2.0, 0.5])) for number in range(40))
        == "2322201322122210232201122301231222032122"
    )


PROGRAM = """
import random
from lance_dfaiss.serve.placement import place_fragment, place_shards
draw = random.Random(3)
shards = [(f"{draw.getrandbits(256):064x}", draw.randint(1, 10**9)) for _ in range(100)]
weights = [1.0, 0.1, 0.7, 2.3, 1.1]
print(place_shards(shards, weights), [place_fragment(number, weights) for number in range(100)])
"""


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_placement_is_the_same_in_another_process(hash_seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(PROGRAM, {})
    environment = {"PYTHONHASHSEED": hash_seed}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == capsys.readouterr().out


@given(st.integers(0, 2**32), WEIGHTS, st.floats(0.1, 10))
def test_a_fragment_moves_to_a_new_group_or_not_at_all(fragment_id: int, weights: list[float], more: float) -> None:
    before, after = place_fragment(fragment_id, weights), place_fragment(fragment_id, [*weights, more])
    assert after in (before, len(weights))


def test_fragments_follow_weights() -> None:
    weights = [1.0, 2.0, 1.0]
    counts = Counter(place_fragment(number, weights) for number in range(4_000))
    assert [counts[group] / 4_000 for group in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [math.nan], [1.0, math.inf], [1e300]])
def test_weights_that_mean_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(InvalidArgument, match="weight"):
        place_shards([], weights)
    with pytest.raises(InvalidArgument, match="weight"):
        place_fragment(0, weights)


def check_groups(groups: list[int], replicas: int) -> None:
    sizes = Counter(groups)
    count = max(1, len(groups) // replicas)
    assert sorted(sizes) == list(range(count))
    assert min(sizes.values()) >= min(replicas, len(groups))


@given(st.lists(HOSTS, min_size=1, max_size=16), st.integers(1, 5))
def test_new_groups_are_full_and_on_different_hosts(hosts: list[str], replicas: int) -> None:
    assume(replicas <= len(hosts))
    groups = assign_groups(hosts, replicas)
    check_groups(groups, replicas)
    sizes = Counter(groups)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for (host, _), count in Counter(zip(hosts, groups, strict=True)).items():
        assert count <= -(-hosts.count(host) // len(sizes))


@pytest.mark.parametrize(("replicas", "count"), [(3, 2), (1, 0), (5, 4)])
def test_more_replicas_than_servers_are_refused_with_both_numbers(replicas: int, count: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        assign_groups(["a"] * count, replicas)
    assert str(replicas) in caught.value.message
    assert str(count) in caught.value.message
    assert caught.value.parameter == "replicas"


def test_no_replica_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least 1"):
        assign_groups(["a"], 0)


@given(st.lists(HOSTS, min_size=1, max_size=8), st.integers(1, 4), st.lists(HOSTS, max_size=8))
def test_joining_moves_only_left_over_servers(hosts: list[str], replicas: int, joining: list[str]) -> None:
    assume(replicas <= len(hosts))
    groups = assign_groups(hosts, replicas)
    for host in joining:
        after = join_group(groups, hosts, replicas, host)
        hosts = [*hosts, host]
        check_groups(after, replicas)
        movers = [new for old, new in zip(groups, after, strict=False) if old != new]
        new_group = max(groups) + 1
        assert set(movers) <= {new_group}
        assert len(movers) == (replicas - 1 if new_group in after else 0)
        groups = after


def test_with_one_replica_each_new_server_is_a_new_group() -> None:
    groups = [0]
    for count in range(1, 6):
        groups = join_group(groups, ["a"] * count, 1, "a")
    assert groups == [0, 1, 2, 3, 4, 5]


def test_a_new_group_takes_servers_on_other_hosts() -> None:
    # Left over is one of the servers in group 0; the one on the new server's host, or the other one of host b.
    assert join_group([0, 1, 1, 0, 0], ["a", "c", "d", "b", "b"], 2, "a") == [0, 1, 1, 0, 2, 2]


def test_a_group_of_too_few_is_filled_first() -> None:
    assert join_group([0], ["a"], 3, "b") == [0, 0]
    assert join_group([0, 1, 1, 1], ["a", "b", "c", "d"], 2, "e") == [0, 1, 1, 1, 0]


@given(st.lists(HOSTS, min_size=2, max_size=12), st.integers(1, 4), st.data())
def test_leaving_keeps_groups_full_and_moves_little(hosts: list[str], replicas: int, data: st.DataObject) -> None:
    assume(replicas <= len(hosts))
    groups = assign_groups(hosts, replicas)
    while len(hosts) > 1:
        leaving = data.draw(st.integers(0, len(hosts) - 1))
        after = leave_group(groups, hosts, replicas, leaving)
        check_groups(after, replicas)
        stay = [group for server, group in enumerate(groups) if server != leaving]
        movers = [(old, new) for old, new in zip(stay, after, strict=True) if old != new]
        if set(after) == set(groups):
            # No group was given up: one server at most took the place of the one that left.
            assert len(movers) <= 1
            assert {new for _, new in movers} <= {groups[leaving]}
        else:
            assert {old for old, _ in movers} <= {max(groups)}
        hosts, groups = [host for server, host in enumerate(hosts) if server != leaving], after


def test_growing_and_shrinking_the_groups_of_equal_servers() -> None:
    hosts = ["h"] * 4
    groups = assign_groups(hosts, 2)
    assert groups == [0, 1, 0, 1]
    assert leave_group(groups, hosts, 2, 0) == [0, 0, 0]  # the last group is given up
    assert leave_group([0, 1, 0, 1, 1], [*hosts, "h"], 2, 0) == [1, 0, 1, 0]  # the left-over server of group 1 steps in
    assert leave_group([0, 1, 2], ["h"] * 3, 1, 0) == [1, 0]  # the server of the last group steps in


def test_rounds_differ_only_by_their_claimant() -> None:
    """From one count of groups to the next, what moves goes to the new group: equal shards, few groups."""
    shards = shards_of(11, [1_000] * 96)
    placements = [place_shards(shards, [1.0] * groups) for groups in range(1, 4)]
    for groups, (before, after) in enumerate(pairwise(placements), start=1):
        assert {new for old, new in zip(before, after, strict=True) if old != new} == {groups}
