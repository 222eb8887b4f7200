"""Whom to ask: the decisions of a client, without sockets or clocks.

Which snapshot an answer is made of, which replica of a group is asked, when another one is asked too, and how much
of the index an answer covers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .wire import Offer

__all__ = [
    "HEDGE_BURST_QUERIES",
    "HEDGE_SHARE",
    "HedgeBudget",
    "LearnedDelay",
    "Missing",
    "ReplicaLoad",
    "Route",
    "Standing",
    "choose_route",
    "coverage_of",
    "missing_of",
    "pick",
]

HEDGE_SHARE = 0.05
"""Queries asked twice, as a share of all: what a slow replica may cost the others."""

HEDGE_BURST_QUERIES = 64
"""Queries asked twice beyond that share, at once: what waits for a server at the moment it hangs."""

HEDGE_FLOOR_SECONDS = 0.002
"""The least wait before another replica is asked: a turn of a busy event loop takes as long."""

HEDGE_CEILING_SECONDS = 1.0
"""The longest wait: longer than that, waiting has become the problem."""

HEDGE_UNKNOWN_SECONDS = 0.05
"""The wait as long as too few answers were seen to know better."""

HEDGE_FACTOR = 2.0
"""The wait over the 95th percentile: twice as long as nearly all answers take is no chance."""

LATENCIES_KEPT = 200
"""Answers whose time is remembered, by kind of request: a second or less under load."""

LATENCIES_NEEDED = 20
"""Answers before their percentile means something."""

LATENCIES_BETWEEN = 20
"""Answers from one look at the percentile to the next: sorting costs more than an answer does."""

LATENCY_WEIGHT = 0.2
"""Of the newest answer in a replica's mean."""

LATENCY_FRESH_SECONDS = 1.0
"""How long a replica's latency counts: after that it may have changed, and is worth finding out."""

SLOW_FIRST_SECONDS = 0.1
"""How long a replica that was overtaken is left alone, the first time; doubled each time it fails to do better."""

SLOW_MAX_SECONDS = 5.0
"""And at the most: a server that has come back is used again within that time."""

REFUSED_MAX_SECONDS = 1.0
"""The longest that a server which has too much to do is left alone, whatever it asks for."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a client knows of one server.

    Parameters
    ----------
    server : int
        Its id.
    usable : bool
        It is connected and takes new requests.
    offers : tuple of Offer
        What it offered last, also when it is gone since.
    """

    server: int
    usable: bool
    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class Route:
    """One snapshot of an index, and who answers for it.

    Parameters
    ----------
    offer : Offer
        The snapshot, as one of the servers offers it.
    members : tuple of tuple of int
        By group: the usable servers that offer it.
    needed : tuple of int
        Groups that have rows, one at least: only those are asked.
    payload : frozenset of str
        Columns that all members have in RAM.
    """

    offer: Offer
    members: tuple[tuple[int, ...], ...]
    needed: tuple[int, ...]
    payload: frozenset[str]

    @property
    def missing(self) -> tuple[int, ...]:
        """Needed groups that nobody answers for."""
        return tuple(group for group in self.needed if not self.members[group])

    @property
    def coverage(self) -> float:
        """Share of the rows that there is somebody for, 0 to 1."""
        return coverage_of(self.offer.rows, (group for group in self.needed if self.members[group]))


@dataclass(frozen=True, slots=True)
class Missing:
    """What nobody answers for.

    Parameters
    ----------
    groups : tuple of int
        Shard groups.
    shards : tuple of str
        What those held, as far as is known.
    coverage : float
        Share of the rows that is left, 0 to 1.
    """

    groups: tuple[int, ...]
    shards: tuple[str, ...]
    coverage: float


def choose_route(index: str, standings: Iterable[Standing]) -> Route | None:
    """Return the newest snapshot that all groups answer for.

    Parameters
    ----------
    index : str
        Name of the index.
    standings : iterable of Standing
        All servers.

    Returns
    -------
    Route or None
        Without a snapshot that all groups answer for, the one that covers most rows, the newest of equals. None if
        no usable server offers the index.
    """
    found: dict[str, list[tuple[int, Offer]]] = {}
    for standing in standings:
        if standing.usable:
            for offer in standing.offers:
                if offer.index == index and 0 <= offer.group < len(offer.rows):
                    found.setdefault(offer.at, []).append((standing.server, offer))
    routes = [_route(offers) for offers in found.values()]
    whole = [route for route in routes if not route.missing]
    if whole:
        return max(whole, key=lambda route: (route.offer.order, route.offer.at))
    return max(routes, key=lambda route: (route.coverage, route.offer.order, route.offer.at), default=None)


def _route(offers: Sequence[tuple[int, Offer]]) -> Route:
    # A snapshot that one server has stepped back from goes behind others.
    first = min((offer for _, offer in offers), key=lambda offer: offer.order)
    groups = len(first.rows)
    members: list[list[int]] = [[] for _ in range(groups)]
    payload = frozenset(first.payload)
    for server, offer in offers:
        if offer.group < groups:
            members[offer.group].append(server)
            payload &= frozenset(offer.payload)
    needed = tuple(group for group, rows in enumerate(first.rows) if rows > 0)
    # An empty index is asked too: a request that means nothing is an error there as elsewhere.
    return Route(first, tuple(map(tuple, members)), needed or (first.group,), payload)


def coverage_of(rows: Sequence[int], answered: Iterable[int]) -> float:
    """Return the share of rows that groups hold.

    Parameters
    ----------
    rows : sequence of int
        Rows by group.
    answered : iterable of int
        Different groups.

    Returns
    -------
    float
        0 to 1, exactly 1.0 if no row is left out; 1.0 where there are no rows.
    """
    total = sum(rows)
    return sum(rows[group] for group in answered) / total if total else 1.0


def missing_of(index: str, standings: Sequence[Standing], failed: Iterable[int] = ()) -> Missing:
    """Return what nobody answers for.

    Parameters
    ----------
    index : str
        Name of the index.
    standings : sequence of Standing
        All servers, with what they offered when they were there.
    failed : iterable of int
        Groups that have servers, which failed.
    """
    route = choose_route(index, standings)
    everyone = [Standing(standing.server, True, standing.offers) for standing in standings]
    before = choose_route(index, everyone)
    if before is None:
        return Missing((), (), 0.0)
    if route is None or (before.offer.epoch == route.offer.epoch and len(before.missing) < len(route.missing)):
        # The snapshot that was answered for is the one that people miss.
        route = route if route is not None and route.offer.at == before.offer.at else _only_usable(before, standings)
    groups = tuple(sorted({*route.missing, *(group for group in failed if group in route.needed)}))
    held: dict[int, tuple[str, ...]] = {}
    for standing in standings:
        for offer in standing.offers:
            if offer.index == index and offer.epoch == route.offer.epoch and offer.group in groups:
                held[offer.group] = offer.shards
    shards = tuple(name for group in groups for name in held.get(group, ()))
    answered = (group for group in route.needed if group not in groups)
    return Missing(groups, shards, coverage_of(route.offer.rows, answered))


def _only_usable(route: Route, standings: Iterable[Standing]) -> Route:
    usable = {standing.server for standing in standings if standing.usable}
    members = tuple(tuple(server for server in group if server in usable) for group in route.members)
    return Route(route.offer, members, route.needed, route.payload)


class ReplicaLoad:
    """How busy and how quick one server is, as its client sees it.

    Attributes
    ----------
    outstanding : int
        Queries asked and not answered.
    latency : float
        Mean of recent answers, in seconds.
    suspect : bool
        It has been silent for too long; asked only where there is nobody else.
    mute : bool
        Nothing has come from it since a query was sent that another one answered; whether it lives is asked by a ping.
        Until it says so no query is spent on finding out.
    """

    __slots__ = (
        "_probed", "_refused_until", "_seen_at", "_slow_seconds", "_slow_until", "latency", "mute", "outstanding",
        "suspect",
    )  # fmt: skip

    def __init__(self) -> None:
        self.outstanding = 0
        self.latency = 0.0
        self.suspect = False
        self.mute = False
        self._seen_at = -math.inf
        self._refused_until = -math.inf
        self._slow_until = -math.inf
        self._slow_seconds = 0.0
        self._probed = False

    def began(self, queries: int, now: float) -> None:
        """Note that it was asked."""
        self.outstanding += queries
        if self._slow_seconds:
            # It has one chance to do better; the next one comes when this one's time is over.
            self._slow_until = now + self._slow_seconds
            self._probed = True

    def ended(self, queries: int) -> None:
        """Note that nothing is awaited any more: it was answered, cancelled or lost."""
        self.outstanding -= queries

    def answered(self, seconds: float, now: float) -> None:
        """Note that it answered before anybody else did."""
        fresh = now - self._seen_at <= LATENCY_FRESH_SECONDS
        self.latency += (seconds - self.latency) * LATENCY_WEIGHT if fresh else seconds - self.latency
        self._seen_at = now
        self._slow_seconds, self._slow_until = 0.0, -math.inf

    def overtaken(self, seconds: float, now: float) -> None:
        """Note that another replica, asked later, answered first."""
        self.latency, self._seen_at = max(self.latency, seconds), now
        if self._probed or not self._slow_seconds:  # all that waited for it when it became slow are one event
            self._slow_seconds = min(max(SLOW_FIRST_SECONDS, 2 * self._slow_seconds), SLOW_MAX_SECONDS)
            self._probed = False
        self._slow_until = now + self._slow_seconds

    def refused(self, seconds: float, now: float) -> None:
        """Note that it has too much to do, and when it wants to be asked again.

        Who refuses at once has little outstanding, and would draw more and more queries without this.
        """
        self._refused_until = max(self._refused_until, now + min(max(seconds, 0.0), REFUSED_MAX_SECONDS))

    def forget(self) -> None:
        """Note that the connection is a new one: nothing that was known holds."""
        self.latency, self._seen_at, self.suspect, self.mute = 0.0, -math.inf, False, False
        self._slow_seconds, self._slow_until, self._refused_until = 0.0, -math.inf, -math.inf

    def rests(self, now: float) -> bool:
        """Tell whether it is to be left alone, as it is slow, silent, or full."""
        return self.mute or now < self._slow_until or now < self._refused_until

    def may_help(self, now: float) -> bool:
        """Tell whether it is worth asking beside another one: neither silent nor full."""
        return not self.suspect and not self.mute and now >= self._refused_until

    def step(self, now: float) -> int:
        """Return its recent latency in steps of a factor of two, 0 if unknown: less than that is chance."""
        if now - self._seen_at > LATENCY_FRESH_SECONDS:
            return 0
        return max(int(self.latency * 1e6), 1).bit_length()


_Replica = TypeVar("_Replica", bound=ReplicaLoad)


def pick(replicas: Sequence[_Replica], now: float, random: Callable[[], float]) -> _Replica:
    """Return the replica to ask.

    Parameters
    ----------
    replicas : sequence of ReplicaLoad
        One at least.
    now : float
        Seconds, of the clock that the loads were told.
    random : callable
        Breaks ties; 0 to 1.

    Returns
    -------
    ReplicaLoad
        Neither suspect nor at rest if there is such a one; of those that with the fewest outstanding queries, then the
        quickest lately, then any.
    """
    if len(replicas) == 1:
        return replicas[0]
    return min(
        replicas,
        key=lambda load: (load.suspect, load.rests(now), load.outstanding, load.step(now), random()),
    )


class HedgeBudget:
    """How many queries may be asked twice: a token bucket.

    Parameters
    ----------
    share : float
        Of all queries.
    burst : int
        Queries beyond that, at once.

    Attributes
    ----------
    asked, hedged : int
        Queries so far: asked once, and asked again.
    """

    __slots__ = ("_burst", "_share", "_tokens", "asked", "hedged")

    def __init__(self, share: float = HEDGE_SHARE, burst: int = HEDGE_BURST_QUERIES) -> None:
        self._share = share
        self._burst = burst
        self._tokens = float(burst)
        self.asked = 0
        self.hedged = 0

    def earn(self, queries: int) -> None:
        """Note that queries are asked."""
        self.asked += queries
        self._tokens = min(self._tokens + queries * self._share, self._burst)

    def spend(self, queries: int) -> bool:
        """Tell whether queries may be asked a second time, and count them if so."""
        if self._tokens < queries:
            return False
        self._tokens -= queries
        self.hedged += queries
        return True


class LearnedDelay:
    """How long to wait for one kind of answer before another replica is asked too.

    Attributes
    ----------
    seconds : float
        `HEDGE_FACTOR` times the 95th percentile of recent answers, between a floor and a ceiling.
    """

    __slots__ = ("_at", "_latencies", "_since", "seconds")

    def __init__(self) -> None:
        self._latencies: list[float] = []
        self._at = 0
        self._since = 0
        self.seconds = HEDGE_UNKNOWN_SECONDS

    def saw(self, seconds: float) -> None:
        """Note how long an answer took, from when that server was asked."""
        if len(self._latencies) < LATENCIES_KEPT:
            self._latencies.append(seconds)
        else:
            self._latencies[self._at] = seconds
            self._at = (self._at + 1) % LATENCIES_KEPT
        self._since += 1
        if self._since >= LATENCIES_BETWEEN and len(self._latencies) >= LATENCIES_NEEDED:
            self._since = 0
            high = sorted(self._latencies)[int(0.95 * len(self._latencies))]
            self.seconds = min(max(HEDGE_FACTOR * high, HEDGE_FLOOR_SECONDS), HEDGE_CEILING_SECONDS)
