"""The servers of a cluster, as one client sees them: connected, followed, watched, and who answers for what."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .._version import __version__
from ..errors import AccessDenied, ClientUnusable, DfaissError, ProtocolError, Unavailable
from .cluster import ClusterFile, ServerEntry, read_cluster
from .connection import Connection, connection_error
from .routing import HedgeBudget, LearnedDelay, Missing, ReplicaLoad, Route, Standing, choose_route, missing_of
from .wire import PROTOCOL, Frame, Hello, Limits, Offer, Offers, Status, Welcome

__all__ = ["CONNECT_SECONDS", "GRACE_SECONDS", "Fleet", "FleetOptions", "Replica", "Way"]

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""How long a server may take to welcome a client, TLS included."""

BACKOFF_FIRST_SECONDS = 0.05
"""Before the first attempt to connect again; doubled each time, and shortened by up to a half by chance, so that
clients do not come in step."""

BACKOFF_MAX_SECONDS = 1.0
"""The longest of these: a server that has been restarted is found that soon."""

DENIED_SECONDS = 5.0
"""The same where a server refuses this client: that does not change by itself."""

PING_SECONDS = 0.25
"""Silence of a server that owes answers before it is asked whether it lives: a long search does not keep it from
saying so."""

SUSPECT_SECONDS = 0.75
"""Silence before what it owes is asked of other replicas too."""

DEAD_SECONDS = 5.0
"""Silence before the connection is given up."""

WATCH_SECONDS = 0.1
"""How often silence is looked for, while answers are owed."""

LATE_SECONDS = 0.2
"""A look that comes so much too late tells of this process, not of the servers."""

REREAD_SECONDS = 5.0
"""How often the cluster file is read."""

REREAD_GAP_SECONDS = 0.5
"""The least time from one reading to the next, whatever happens."""

DOUBTFUL_FAILURES = 3
"""Failed attempts to connect before the cluster file is looked into for other addresses."""

GRACE_SECONDS = 3.0
"""How long requests wait for a server of a group that has just lost its last one: three attempts to connect."""

WARN_SECONDS = 10.0
"""At most one warning about one server in this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """How to connect.

    Parameters
    ----------
    token : str or None
        Said to every server.
    tls : ssl.SSLContext or None
        None for none.
    connections : int
        To each server.
    storage_options : mapping or None
        For the cluster file.
    """

    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    connections: int = 1
    storage_options: Mapping[str, str] | None = None


class Question(Protocol):
    """Something that is being asked."""

    def fail(self, error: Exception) -> None:
        """Give it up."""


class Replica(ReplicaLoad):
    """One server.

    Attributes
    ----------
    entry : ServerEntry
        Where it is.
    offers : tuple of Offer
        What it offers, or did when it was last there.
    limits : Limits
        What it takes.
    draining, retired, gone : bool
        It takes nothing new; it is not in the cluster file any more; and no older layout needs it either.
    session : int
        How often it was connected to.
    error : DfaissError or None
        Why it could not be reached the last time; None as long as nothing went wrong.
    settled : bool
        It was reached, or could not be, once at least.
    missed, warned_at : bool, float
        The log says that it was lost, and not yet that it is back; when it last said so, in monotonic seconds.
    """

    __slots__ = (
        "draining", "entry", "error", "gone", "limits", "links", "missed", "offers", "retired", "session", "settled",
        "warned_at",
    )  # fmt: skip

    def __init__(self, entry: ServerEntry) -> None:
        super().__init__()
        self.entry = entry
        self.links: list[Link] = []
        self.offers: tuple[Offer, ...] = ()
        self.limits = Limits()
        self.session = 0
        self.draining = False
        self.retired = False
        self.gone = False
        self.settled = False
        self.error: DfaissError | None = None
        self.missed = False
        self.warned_at = -WARN_SECONDS

    @property
    def name(self) -> str:
        """For messages."""
        return f"server {self.entry.id} ({self.entry.host}:{self.entry.port})"

    @property
    def connected(self) -> bool:
        """Whether it has welcomed this client."""
        return any(link.connection is not None and link.connection.open for link in self.links)

    @property
    def usable(self) -> bool:
        """Whether it takes new requests."""
        return not self.draining and not self.gone and self.connected

    def probe(self, connection: Connection, since: float) -> None:
        """Ask whether it lives, and nothing else until it says so, if nothing has come from it since a moment."""
        if connection.received_at <= since:
            for link in self.links:
                if link.connection is connection and link.ping():
                    self.mute = True

    def owes(self, connection: Connection) -> None:
        """Note that an answer was given up, so that silence means something though none is awaited."""
        for link in self.links:
            if link.connection is connection:
                link.owing = connection.silent = True

    def connection(self) -> Connection | None:
        """Return the connection with the fewest requests that takes one more."""
        links = self.links
        if len(links) == 1:
            only = links[0].connection
            return only if only is not None and only.open and not only.full else None
        found = [link.connection for link in links if link.connection is not None and link.connection.open]
        free = [connection for connection in found if not connection.full]
        return min(free, key=lambda connection: len(connection.pending), default=None)


class _Ping:
    """Waits for any sign of life; what the answer says does not matter."""

    def answered(self, frame: Frame) -> None:
        """Nothing to do: the connection noted that something arrived."""

    def failed(self, error: DfaissError) -> None:
        """Nothing to do: who lost the connection was told so."""

    def doubted(self) -> None:
        """Nothing to do: nobody else can answer for it."""


class Link:
    """One connection of a server, made again whenever it is lost.

    Parameters
    ----------
    fleet : Fleet
        Told of what happens.
    replica : Replica
        The server.
    """

    def __init__(self, fleet: Fleet, replica: Replica) -> None:
        self.connection: Connection | None = None
        self.pinged = False
        self.owing = False
        self._closed = False
        self._fleet = fleet
        self._replica = replica
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run())

    def close(self) -> None:
        """Hang up for good."""
        self._closed = True
        if self.connection is not None:
            self.connection.close(ClientUnusable("the connection was closed"))
        self._task.cancel()

    async def closed(self) -> None:
        """Wait until nothing runs any more."""
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        failures = 0
        while not self._replica.retired:
            try:
                lost = await self._connect()
                failures = 0
                self._replica.error = await lost
            except (OSError, DfaissError, asyncio.TimeoutError) as exc:
                failures += 1
                self._replica.error = connection_error(self._replica.name, exc)
                _log.debug("%s: %s", self._replica.name, self._replica.error)
            if self._closed:
                return
            self._replica.settled = True
            self._fleet.changed()
            if failures >= DOUBTFUL_FAILURES:
                self._fleet.doubt()
            longest = BACKOFF_MAX_SECONDS
            if isinstance(self._replica.error, (AccessDenied, ProtocolError)) and failures > DOUBTFUL_FAILURES:
                longest = DENIED_SECONDS
            wait = min(BACKOFF_FIRST_SECONDS * 2.0 ** min(failures, 20), longest)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def _connect(self) -> asyncio.Future[DfaissError]:
        """Connect, be welcomed, and return what will tell why the connection was lost."""
        entry, options = self._replica.entry, self._fleet.options
        self._welcomed: asyncio.Future[None] = self._loop.create_future()
        self._lost: asyncio.Future[DfaissError] = self._loop.create_future()
        hello = Hello(protocol=PROTOCOL, token=options.token or "", client=f"lance-dfaiss/{__version__}")
        connection = Connection(self._replica.name, hello, self)
        try:
            await asyncio.wait_for(connection.dial(entry.host, entry.port, options.tls), CONNECT_SECONDS)
            if self._closed:
                # In the moment it was: `wait_for` forgets a cancellation when what it waits for ends at the same time.
                raise ClientUnusable("the connection was closed")
            await asyncio.wait_for(asyncio.shield(self._welcomed), CONNECT_SECONDS)
        except BaseException as exc:
            connection.close(connection_error(self._replica.name, exc))
            raise
        return self._lost

    def welcomed(self, connection: Connection, welcome: Welcome) -> None:
        """Begin to use the server."""
        if welcome.server != self._replica.entry.id:
            self._fleet.doubt()
            # No ProtocolError, which would end `connect`: the newest cluster file may have the right address.
            connection.close(
                Unavailable(
                    f"{self._replica.name} says that it is server {welcome.server}", groups=(), shards=(), coverage=0.0
                )
            )
            return
        self.connection, self.pinged, self.owing = connection, False, False
        self._replica.forget()
        self._replica.session += 1
        self._replica.limits = welcome.limits
        self._replica.settled = True
        self._replica.error = None
        self._welcomed.set_result(None)
        if self._replica.missed:
            self._replica.missed = False
            _log.warning("%s is back", self._replica.name)
        _log.debug("%s: connected, epoch %d", self._replica.name, welcome.epoch)
        self._heard_offers(welcome.epoch, welcome.offers, welcome.draining)

    def offered(self, offers: Offers) -> None:
        """Take note of what can be asked for."""
        self._heard_offers(offers.epoch, offers.offers, offers.draining)

    def heard(self) -> None:
        """Take back that the server may be dead."""
        self.pinged = self.owing = False
        self._replica.suspect = self._replica.mute = False

    def lost(self, connection: Connection, error: DfaissError) -> None:
        """Stop using the server."""
        if self.connection is not connection:
            if not self._welcomed.done():
                self._welcomed.set_exception(error)
                self._welcomed.exception()  # whoever waits gets it; nobody may be left to
            return
        self.connection = None
        self._replica.suspect = self._replica.mute = False  # what another connection to it is like is not known
        self._replica.error = error
        self._lost.set_result(error)
        expected = self._replica.draining or self._replica.retired or self._closed
        now = time.monotonic()
        if not expected and now - self._replica.warned_at > WARN_SECONDS:
            self._replica.missed, self._replica.warned_at = True, now
            _log.warning("%s is lost: %s", self._replica.name, error.message)
        self._fleet.changed()

    def unsent(self, connection: Connection) -> None:
        """Remember to write."""
        self._fleet.unsent(connection)

    def ping(self) -> bool:
        """Ask whether it lives; tell whether that is under way."""
        connection = self.connection
        if connection is not None and connection.open and not self.pinged and not connection.full:
            self.pinged = connection.silent = True
            connection.send(Status(), (), _Ping())
        return self.pinged

    def watch(self, now: float, late: bool) -> bool:
        """Do what silence asks for, and tell whether there is anything to watch."""
        connection = self.connection
        if connection is None or not connection.open or not (connection.pending or self.owing):
            return False
        if late:
            connection.heard_at = now
        silence = now - connection.heard_at
        if silence > DEAD_SECONDS:
            connection.close(
                Unavailable(
                    f"{self._replica.name} has been silent for {silence:.1f} s", groups=(), shards=(), coverage=0.0
                )
            )
        elif silence > SUSPECT_SECONDS and self.pinged:
            if not self._replica.suspect:
                self._replica.suspect = True
                _log.debug("%s has been silent for %.2f s", self._replica.name, silence)
            for waiting in list(connection.pending.values()):
                waiting.doubted()
        elif silence > PING_SECONDS:
            self.ping()
        return True

    def _heard_offers(self, epoch: int, offers: tuple[Offer, ...], draining: bool) -> None:
        replica = self._replica
        replica.offers, replica.draining = offers, draining
        if epoch > self._fleet.cluster.epoch:
            self._fleet.doubt()
        self._fleet.changed()


@dataclass(slots=True, eq=False)
class Way:
    """How one index is asked now: a route, and the servers themselves.

    Parameters
    ----------
    route : Route
        The snapshot and who answers for it.
    asked : tuple of (int, tuple of Replica)
        Groups with rows that there is somebody for, and who.
    complete : bool
        Whether those are all.
    rows : int
        Rows of the index.
    limits : Limits
        The least that any of the servers takes.
    """

    route: Route
    asked: tuple[tuple[int, tuple[Replica, ...]], ...]
    complete: bool
    rows: int
    limits: Limits

    @property
    def at(self) -> str:
        """The snapshot."""
        return self.route.offer.at


class Fleet:
    """All servers of a cluster.

    Parameters
    ----------
    cluster : ClusterFile
        As read first.
    location : str or None
        Where from; None to never read it again.
    options : FleetOptions
        How to connect.

    Attributes
    ----------
    ways : dict of str to Way
        By index: how it is asked now. Replaced as a whole, so that other threads may look at it.
    offers : dict of str to Offer
        By index: the one that is asked now, or was the last time that one was; by it queries are checked. Replaced as
        a whole too.
    budget : HedgeBudget
        For asking twice.
    """

    def __init__(self, cluster: ClusterFile, location: str | None, options: FleetOptions) -> None:
        self.cluster = cluster
        self.options = options
        self.replicas: dict[int, Replica] = {}
        self.ways: dict[str, Way] = {}
        self.offers: dict[str, Offer] = {}
        self.budget = HedgeBudget()
        self.delays: dict[str, LearnedDelay] = {}
        self.retries = 0
        self.askings: set[Question] = set()
        """What is being asked."""
        self.waiting: set[Callable[[], None]] = set()
        """Called whenever the ways have changed."""
        self._location = location
        self._leaving: list[Replica] = []
        self._closed = False
        self._incomplete_since: dict[str, float] = {}
        self._loop = asyncio.get_running_loop()
        self._unsent: list[Connection] = []
        self.gathering = False
        """Somebody who calls `write` is about to send."""
        self._watching = False
        self._watch_due = 0.0
        self._doubtful = asyncio.Event()
        self._warned_of_file = False
        self._follower: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._take_up(self.cluster)
        if self._location is not None:
            self._follower = self._loop.create_task(self._follow(self._location))

    async def close(self) -> None:
        """Hang up everywhere; whoever waits gets `ClientUnusable`."""
        self._closed = True
        for question in list(self.askings):
            question.fail(ClientUnusable("the client was closed", remedy="Call connect again"))
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.gather(self._follower, return_exceptions=True)
        links = [link for replica in self.everyone() for link in replica.links]
        for link in links:
            link.close()
        for link in links:
            await link.closed()

    def delay(self, kind: str) -> LearnedDelay:
        """Return how long answers to one kind of request take."""
        found = self.delays.get(kind)
        if found is None:
            found = self.delays[kind] = LearnedDelay()
        return found

    def standings(self) -> list[Standing]:
        """Return what is known of all servers."""
        # By place in the list: for a while there may be two of one id, at an old and a new address.
        everyone = enumerate(self.everyone())
        return [Standing(place, replica.usable, replica.offers) for place, replica in everyone]

    def reasons(self, index: str) -> list[str]:
        """Return why servers do not answer for an index, those that do not."""
        found = []
        for replica in self.everyone():
            if replica.error is not None:
                found.append(f"{replica.name}: {replica.error.message}")
            elif replica.draining:
                found.append(f"{replica.name} is draining")
            elif not any(offer.index == index for offer in replica.offers):
                found.append(f"{replica.name} has not loaded it")
        return found

    def missing(self, index: str, failed: Sequence[int] = ()) -> Missing:
        """Return what nobody answers for."""
        return missing_of(index, self.standings(), failed)

    def grace(self, index: str, now: float) -> float:
        """Return how many seconds more requests may wait for a server to come back."""
        since = self._incomplete_since.get(index)
        return GRACE_SECONDS if since is None else max(since + GRACE_SECONDS - now, 0.0)

    def forget(self, replica: Replica, index: str, at: str) -> None:
        """Take note that a server does not hold a snapshot any more, ahead of its own announcement."""
        kept = tuple(offer for offer in replica.offers if (offer.index, offer.at) != (index, at))
        if len(kept) < len(replica.offers):
            replica.offers = kept
            self.changed()

    def changed(self) -> None:
        """Find the ways anew, and tell those who wait for one."""
        if self._closed:
            return
        everyone = self.everyone()
        standings = self.standings()
        offered = [offer for replica in everyone for offer in replica.offers]
        offers = {offer.index: offer for offer in sorted(offered, key=lambda offer: offer.order)} | self.offers
        ways, now = {}, time.monotonic()
        for index in offers:
            route = choose_route(index, standings)
            if route is not None:
                # Not the newest ever heard of: a dataset that is made anew counts its versions anew.
                ways[index], offers[index] = _way(route, everyone), route.offer
            if route is not None and not route.missing:
                self._incomplete_since.pop(index, None)
            else:
                self._incomplete_since.setdefault(index, now)
        self.ways, self.offers = ways, offers
        self._let_retired_go()
        for tell in list(self.waiting):
            tell()

    def doubt(self) -> None:
        """Have the cluster file read soon."""
        self._doubtful.set()

    def asked(self) -> None:
        """Note that a server owes an answer: watch for silence."""
        if not self._watching:
            self._watching = True
            self._watch_later()

    def unsent(self, connection: Connection) -> None:
        """Have a connection written to before this turn of the loop ends."""
        self._unsent.append(connection)
        if len(self._unsent) == 1 and not self.gathering:
            self._loop.call_soon(self.write)

    def write(self) -> None:
        """Write all that is unsent."""
        unsent, self._unsent = self._unsent, []
        for connection in unsent:
            connection.flush()

    def everyone(self) -> list[Replica]:
        """Return the servers of the cluster file, and those that were in it and are still of use."""
        return [*self.replicas.values(), *self._leaving]

    def _watch_later(self) -> None:
        self._watch_due = time.monotonic() + WATCH_SECONDS
        self._loop.call_later(WATCH_SECONDS, self._watch)

    def _watch(self) -> None:
        now = time.monotonic()
        late = now - self._watch_due > LATE_SECONDS
        links = [link for replica in self.everyone() for link in replica.links]
        if sum([link.watch(now, late) for link in links]) and not self._closed:
            self._watch_later()
        else:
            self._watching = False

    def _let_retired_go(self) -> None:
        """Close what is not in the cluster file any more, once it is not needed for an older layout either."""
        if not self._leaving:
            return
        ways = self.ways.values()
        moved = bool(ways) and all(way.complete and way.route.offer.epoch >= self.cluster.epoch for way in ways)
        for replica in list(self._leaving):
            replica.gone = replica.gone or moved
            owes = any(link.connection is not None and link.connection.pending for link in replica.links)
            if not replica.connected or (replica.gone and not owes):
                self._leaving.remove(replica)
                for link in replica.links:
                    link.close()

    def _take_up(self, cluster: ClusterFile) -> None:
        """Connect to the servers of a cluster file that are new, and let go of those that it does not name."""
        self.cluster = cluster
        entries = {entry.id: entry for entry in cluster.servers}
        for server, replica in list(self.replicas.items()):
            entry = entries.get(server)
            if entry is None or (entry.host, entry.port) != (replica.entry.host, replica.entry.port):
                replica.retired = True
                self._leaving.append(self.replicas.pop(server))
        for server, entry in entries.items():
            known = self.replicas.get(server)
            if known is None:
                replica = self.replicas[server] = Replica(entry)
                replica.links = [Link(self, replica) for _ in range(self.options.connections)]
            else:
                known.entry = entry
        self.changed()

    async def _follow(self, location: str) -> None:
        while not self._closed:
            await asyncio.sleep(REREAD_GAP_SECONDS)
            with contextlib.suppress(asyncio.TimeoutError):  # then it is time anyway
                await asyncio.wait_for(self._doubtful.wait(), REREAD_SECONDS)
            self._doubtful.clear()
            await self._reread(location)

    async def _reread(self, location: str) -> None:
        try:
            cluster = await self._loop.run_in_executor(None, read_cluster, location, self.options.storage_options)
        except (DfaissError, OSError) as exc:
            if not self._warned_of_file:
                self._warned_of_file = True
                _log.warning("the cluster file %s cannot be read, and stays as it was: %s", location, exc)
            return
        self._warned_of_file = False
        # An older file is stale, unless everything that the newer one named is gone: a cluster that was made anew.
        made_anew = cluster != self.cluster and not any(replica.usable for replica in self.replicas.values())
        if cluster.epoch > self.cluster.epoch or made_anew:
            _log.debug("the cluster is at epoch %d, with %d servers", cluster.epoch, len(cluster.servers))
            self._take_up(cluster)


def _way(route: Route, replicas: Sequence[Replica]) -> Way:
    asked = tuple(
        (group, tuple(replicas[server] for server in route.members[group]))
        for group in route.needed
        if route.members[group]
    )
    taken = [replica.limits for _, members in asked for replica in members] or [Limits()]
    limits = Limits(
        frame_bytes=min(limit.frame_bytes for limit in taken),
        k=min(limit.k for limit in taken),
        queries=min(limit.queries for limit in taken),
        pending=min(limit.pending for limit in taken),
    )
    return Way(route, asked, not route.missing, sum(route.offer.rows), limits)
