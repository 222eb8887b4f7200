"""Who holds what: groups of servers, and the group of every shard and tail fragment. Pure, no I/O.

All servers and clients compute the same placement from the cluster file and the manifest, without a word between
them. So nothing here may depend on the process, the machine or the Python version: hashes are BLAKE2b, and floats are
added one by one (``sum`` of floats rounds differently from Python 3.12 on).

Scores are those of weighted rendezvous hashing (D. Thaler and C. Ravishankar, "Using name-based mappings to increase
hit rates", 1998; weights by ``-w / ln(u)``). Rendezvous hashing alone leaves few shards badly spread: 8 shards fall on
4 groups as 2 each once in 26 times. Limits on the bytes of a group mend that, but set a naive walk over all groups on
another course as soon as a group joins, and move nearly everything. `place_shards` therefore plays rendezvous hashing
as a knock-out, group after group, and keeps the bytes even in every round.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from ..errors import InvalidArgument

__all__ = ["assign_groups", "join_group", "leave_group", "place_fragment", "place_shards"]

_SLACK: Final = 0.15
"""How far apart two groups may be, in fair shares, for the score to decide between them."""

_EXCESS: Final = 1.25
"""How many fair shares a group may hold, its last shard aside."""

_FEW_SHARDS: Final = 2
"""Up to this many shards a group, one too many in one place is worth moving another when a group joins."""

_LIGHTEST: Final = 1e-6
_HEAVIEST: Final = 1e6

_SCORES_PER_HASH: Final = 8
_SCORES: Final = struct.Struct(f"<{_SCORES_PER_HASH}Q")
_BITS: Final = 52


def assign_groups(hosts: Sequence[str], replicas: int) -> list[int]:
    """Return the shard group of each server of a new cluster.

    There are ``len(hosts) // replicas`` groups. Left-over servers are further replicas, spread over the groups. The
    servers of one host are spread over as many groups as there are, so that a group has two servers on one host only
    where a host has more servers than there are groups.

    Parameters
    ----------
    hosts : sequence of str
        Host of each server.
    replicas : int
        Servers that hold the same shards; at least 1.

    Raises
    ------
    InvalidArgument
        If there are fewer servers than replicas, or no replica is wanted.
    """
    if replicas < 1:
        raise InvalidArgument(f"replicas must be at least 1, got {replicas}", parameter="replicas", value=replicas)
    if replicas > len(hosts):
        raise InvalidArgument(
            f"{replicas} replicas need as many servers, but there are {len(hosts)}",
            remedy="Start more servers, or ask for fewer replicas",
            parameter="replicas",
            value=replicas,
        )
    groups = [0] * len(hosts)
    first_seen = {host: position for position, host in reversed(tuple(enumerate(hosts)))}
    # Neighbours in this order go to different groups, and servers of one host are neighbours.
    for turn, server in enumerate(sorted(range(len(hosts)), key=lambda server: (first_seen[hosts[server]], server))):
        groups[server] = turn % (len(hosts) // replicas)
    return groups


def join_group(groups: Sequence[int], hosts: Sequence[str], replicas: int, host: str) -> list[int]:
    """Return the groups after one more server has joined: those of all servers, the new one last.

    The new server goes to the smallest group, of those the one with the fewest servers on its host. No other server
    changes its group, with one exception: once the new server and the left-over ones (of groups with more than
    ``replicas``) are ``replicas`` together, they become a new group, with the next number.

    Parameters
    ----------
    groups : sequence of int
        Group of each server, 0 to G - 1, each with at least one server.
    hosts : sequence of str
        Host of each server.
    replicas : int
        Servers that a group should have; at least 1.
    host : str
        Host of the new server.
    """
    sizes = Counter(groups)
    joined = [*groups, len(sizes)]
    places = [*hosts, host]
    if min(sizes.values()) < replicas or _left_over(sizes, replicas) + 1 < replicas:
        joined[-1] = _smallest_group(groups, hosts, host)
        return joined
    for _ in range(replicas - 1):
        joined[_spare(joined, places, replicas, len(sizes))] = len(sizes)
    return joined


def leave_group(groups: Sequence[int], hosts: Sequence[str], replicas: int, leaving: int) -> list[int]:
    """Return the groups of the remaining servers, in their order, after one has left.

    If its group has ``replicas`` servers left, no other server changes its group. Else a left-over server of
    another group takes the place. If there is none, there are too few servers for so many groups: the last group is
    given up, because that moves no shard but its own. One of its servers takes the place, the others become further
    replicas. A group that is the only one is never given up: it stays with fewer servers.

    Parameters
    ----------
    groups : sequence of int
        Group of each server, 0 to G - 1, each with at least one server.
    hosts : sequence of str
        Host of each server.
    replicas : int
        Servers that a group should have; at least 1.
    leaving : int
        Position of the server that leaves; not the only server.
    """
    left = [group for server, group in enumerate(groups) if server != leaving]
    places = [host for server, host in enumerate(hosts) if server != leaving]
    short, last = groups[leaving], max(groups)
    sizes = Counter(left)
    if sizes[short] >= replicas or last == 0:
        return left
    if _left_over(sizes, replicas):
        left[_spare(left, places, replicas, short)] = short
        return left
    homeless = [server for server, group in enumerate(left) if group == last]
    if short != last:
        there = [host for host, group in zip(places, left, strict=True) if group == short]
        chosen = min(homeless, key=lambda server: (there.count(places[server]), server))
        left[chosen] = short
        homeless.remove(chosen)
    for server in homeless:
        settled = [other for other, group in enumerate(left) if group != last]
        left[server] = _smallest_group(
            [left[other] for other in settled], [places[other] for other in settled], places[server]
        )
    return left


def _left_over(sizes: Counter[int], replicas: int) -> int:
    return sum(max(0, size - replicas) for size in sizes.values())


def _smallest_group(groups: Sequence[int], hosts: Sequence[str], host: str) -> int:
    sizes = Counter(groups)
    here = Counter(group for group, other in zip(groups, hosts, strict=True) if other == host)
    return min(sizes, key=lambda group: (sizes[group], here[group], group))


def _spare(groups: Sequence[int], hosts: Sequence[str], replicas: int, target: int) -> int:
    """Return the left-over server that suits a group best: new host there, twice on its host here, joined last."""
    sizes = Counter(groups)
    homes = Counter(zip(groups, hosts, strict=True))
    spare = (server for server, group in enumerate(groups) if group != target and sizes[group] > replicas)
    return min(spare, key=lambda at: (homes[target, hosts[at]], -homes[groups[at], hosts[at]], -at))


def place_shards(shards: Sequence[tuple[str, int]], weights: Sequence[float]) -> list[int]:
    """Return the group of each shard.

    Shards are placed one after the other, each by the loads of those before it, so that further shards at the end
    (deltas) move none. A shard begins with group 0 and is claimed by groups 1, 2, ... in turn. Whether a group gets it
    from the one that has it depends on the loads that both would have *if there were no groups beyond it*, relative
    to their weights:

    1. If these are more than 15 % of a fair share apart, the lighter of the two has it.
    2. Else the higher rendezvous score wins; but while 15 % of a fair share are less than the shard, so that one
       shard makes all the difference, it stays where it is unless the other is lighter.
    3. No group may hold more than 1.25 fair shares and the largest shard. If the winner would, the lightest of those
       that would not has it instead; and also, as long as a fair share is no more than two such shards, if the winner
       would hold more than 1.25 fair shares and at least one such shard more than the lightest.

    A group that joins can thus change nothing between the others but for the rare third case: what moves, moves to it.

    What that comes to (the fair share of a group is its part of all bytes, by weight):

    - Bytes of a group: never more than 1.25 times its fair share and the largest shard. Measured with 1 to 24 groups of
      equal weight, as multiples of the fair share, shards of equal size: 1.0 with 1 or 2 shards a group, at most
      1.38 with more, 1.25 with 16 or more. Sizes within ± 30 %: at most 1.72 with 2 a group, 1.24 with 16 or more.
    - Bytes that move when one group joins G others: the share of the new one is 1 / (G + 1). Measured with 16 to 64
      shards a group, of equal size or within ± 30 %, at most 1.5 / (G + 1); with 3 a group it can be more than 2.5.
    - Where a shard is taken out of the middle of the list, of the bytes behind it move on average: nearly all with 2
      shards a group, half with 8, a fifth with 16, a thirtieth with 64.

    Parameters
    ----------
    shards : sequence of (str, int)
        Digest and length in bytes (at least 0) of each, in the order of the manifest.
    weights : sequence of float
        Of each group, 1e-6 to 1e6; twice the weight is twice the bytes.

    Raises
    ------
    InvalidArgument
        If there is no group, or a weight is out of range.
    """
    _check(weights)
    rounds = [_Round(weights[:groups]) for groups in range(1, len(weights) + 1)]
    answer = []
    for digest, length in shards:
        scores = _Scores(digest.encode(), b"shard", weights)
        holder = 0
        for each in rounds:
            holder = each.place(holder, length, scores)
        answer.append(holder)
    return answer


def place_fragment(fragment_id: int, weights: Sequence[float]) -> int:
    """Return the group that searches the rows of a fragment which no shard covers: the highest rendezvous score.

    It depends on nothing else, so a fragment keeps its group while others come and go; one more group moves no
    fragment but to itself. Few fragments may lie unevenly: the tail is small, or it is time to update the index.

    Parameters
    ----------
    fragment_id : int
        In the dataset.
    weights : sequence of float
        Of each group, 1e-6 to 1e6.

    Raises
    ------
    InvalidArgument
        If there is no group, or a weight is out of range.
    """
    _check(weights)
    scores = _Scores(str(fragment_id).encode(), b"fragment", weights)
    return max(range(len(weights)), key=lambda group: (scores.of(group), -group))


def _check(weights: Sequence[float]) -> None:
    if not weights:
        raise InvalidArgument("expected the weight of at least one group", parameter="weights", value=())
    for group, weight in enumerate(weights):
        if not _LIGHTEST <= weight <= _HEAVIEST:
            raise InvalidArgument(
                f"expected a weight from {_LIGHTEST:g} to {_HEAVIEST:g}, found {weight} for group {group}",
                parameter="weights",
                value=weight,
            )


class _Scores:
    """Rendezvous scores of one thing for each group, made when asked for."""

    __slots__ = ("_key", "_kind", "_numbers", "_weights")

    def __init__(self, key: bytes, kind: bytes, weights: Sequence[float]) -> None:
        self._key = key
        self._kind = kind
        self._weights = weights
        self._numbers: dict[int, tuple[int, ...]] = {}

    def of(self, group: int) -> float:
        block, position = divmod(group, _SCORES_PER_HASH)
        if block not in self._numbers:
            salt = block.to_bytes(8, "little")
            digest = hashlib.blake2b(self._key, digest_size=_SCORES.size, salt=salt, person=self._kind).digest()
            self._numbers[block] = _SCORES.unpack(digest)
        # In the open interval from 0 to 1: half a step from either end, in as many bits as a float can hold.
        uniform = ((self._numbers[block][position] >> (64 - _BITS)) + 0.5) / (1 << _BITS)
        return -self._weights[group] / math.log(uniform)


class _Round:
    """What some groups would hold if there were none beyond them; the last of them is the claimant."""

    __slots__ = ("_largest", "_loads", "_placed", "_total", "_weights")

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = weights
        *_, self._total = accumulate(weights)
        self._loads = [0] * len(weights)
        self._placed = 0
        self._largest = 0

    def place(self, holder: int, length: int, scores: _Scores) -> int:
        """Add a shard, and return who has it now; ``holder`` has it without the claimant."""
        self._placed += length
        self._largest = max(self._largest, length)
        claimant = len(self._loads) - 1
        winner = claimant if self._wins(claimant, holder, length, scores) else holder
        if self._is_too_much(winner, length):
            winner = self._lightest(length)
        self._loads[winner] += length
        return winner

    @property
    def _fair(self) -> float:
        return self._placed / self._total

    def _after(self, group: int, length: int) -> float:
        return (self._loads[group] + length) / self._weights[group]

    def _wins(self, claimant: int, holder: int, length: int, scores: _Scores) -> bool:
        heavier = self._after(holder, length) - self._after(claimant, length)
        slack = _SLACK * self._fair
        if slack < length / min(self._weights[holder], self._weights[claimant]) or abs(heavier) > slack:
            return heavier > 0
        return scores.of(claimant) > scores.of(holder)

    def _is_too_much(self, group: int, length: int) -> bool:
        over = self._after(group, length) - _EXCESS * self._fair
        if over <= 0 or not self._may_have(group, length):
            return over > 0
        step = length / self._weights[group]
        if self._fair > _FEW_SHARDS * step:
            return False
        return self._after(group, length) - self._after(self._lightest(length), length) >= step

    def _may_have(self, group: int, length: int) -> bool:
        return self._after(group, length) - _EXCESS * self._fair <= self._largest / self._weights[group]

    def _lightest(self, length: int) -> int:
        # There is one that may have it: the group that holds least for its weight holds less than its fair share.
        candidates = (group for group in range(len(self._loads)) if self._may_have(group, length))
        return min(candidates, key=lambda group: (self._after(group, length), group))
