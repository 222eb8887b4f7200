"""What a server holds: the last few snapshots of each index, loaded, warmed, offered, and freed.

All that changes something runs on one thread, the loader's. Looking something up is safe from any other: what is held
is replaced as a whole, never changed.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from ..errors import BudgetExceeded, DfaissError, IndexNotFound, ServerFailed, SnapshotGone
from ..lance_io import Payload, PinnedDataset, newest_before, open_dataset
from ..machine import resident_bytes, usable_memory_bytes
from ..pointers import find_pointer
from ..search.index import open_view
from ..search.load import Generation, read_generation
from ..search.portion import Portion, new_bytes, ram_need
from ..search.tail import TailLimits
from ..search.view import View
from ..storage import AHEAD_BYTES, is_remote, open_cache
from ..types import UInt64Array
from .cluster import ClusterFile, ServedIndex
from .placement import place_fragment, place_shards
from .refusals import no_index
from .warming import warm
from .wire import Offer

__all__ = ["Held", "HoldingOptions", "Holdings", "Shelf", "Sift", "Swap"]

_log = logging.getLogger(__name__)

KEPT_SNAPSHOTS = 3
"""Snapshots of one index that a server offers: the newest, and those that slower servers may still be at."""

MAX_SNAPSHOTS = 8
"""The same where older ones are still asked for, because some server takes longer to move than others."""

LOADING_SHARE = 8
"""One part in so many of what is loaded is in RAM beside it for a while: buffers, and what the allocator keeps."""

# Names of shards that an offer lists, for messages: a frame must stay small.
_NAMED_SHARDS = 1_000


class Sift(Protocol):
    """Evaluates filters elsewhere; see `sifter.Sifter`."""

    def open(self, key: str, pinned: PinnedDataset, fragment_ids: Sequence[int], columns: Sequence[str]) -> None:
        """Register what filters of a key are evaluated on."""

    def close_key(self, key: str) -> None:
        """Forget a key."""

    def matching(self, key: str, sql: str) -> UInt64Array:
        """Return the addresses of the rows that match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldingOptions:
    """How snapshots are held.

    Parameters
    ----------
    payload : sequence of str
        Columns to keep in RAM.
    filter_columns : sequence of str
        Columns to keep in the RAM of the process that evaluates filters.
    columns : sequence of str or None
        Columns that clients may see; None for all.
    limits : TailLimits
        What is read beside the index.
    ram_limit_bytes : int
        What the process may use.
    grace_seconds : float
        How long an older snapshot is kept after it was last asked for.
    storage_options : mapping or None
        For the datasets.
    allowed_index_uris : sequence of str
        Places that pointers may lead to.
    cache_dir : str or None
        Folder that keeps index files which were read, see `open_index`; None for none.
    cache_bytes : int or None
        What it may hold; None for the default.
    """

    payload: tuple[str, ...] = ()
    filter_columns: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    limits: TailLimits = field(default_factory=TailLimits)
    ram_limit_bytes: int = field(default_factory=usable_memory_bytes)
    grace_seconds: float = 60.0
    storage_options: Mapping[str, str] | None = None
    allowed_index_uris: tuple[str, ...] = ()
    cache_dir: str | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """The last attempt to move an index to another snapshot.

    Parameters
    ----------
    at : float
        When, in seconds since 1970.
    seconds : float
        How long it took.
    outcome : str
        ``"ok"``, or the name of the error.
    detail : str
        The error's message.
    read_bytes : int
        Bytes of shards that were read.
    """

    at: float
    seconds: float
    outcome: str
    detail: str = ""
    read_bytes: int = 0


@dataclass(slots=True, eq=False)
class Held:
    """A snapshot in RAM.

    Parameters
    ----------
    offer : Offer
        What clients are told.
    view : View
        Answers.
    payload : Payload or None
        Columns in RAM.
    lone_threads : int
        Cores that a search of one query is fastest with.
    used_at : float
        When it was last asked for, on the monotonic clock; -inf for never.
    newest_at : float
        Until when it was the newest one.
    """

    offer: Offer
    view: View
    payload: Payload | None
    lone_threads: int
    used_at: float = -math.inf
    newest_at: float = math.inf

    @property
    def was_used(self) -> bool:
        """Whether it was ever asked for."""
        return self.used_at > -math.inf

    def mark(self, *, stale: bool) -> None:
        """Say in its offer whether the server has stepped back from it."""
        if self.offer.stale != stale:
            self.offer = msgspec.structs.replace(self.offer, stale=stale)


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """Everything of one index.

    Parameters
    ----------
    served : ServedIndex
        What it is.
    snapshots : mapping of str to Held
        By name.
    newest : Held or None
        The one that was loaded last.
    swap : Swap or None
        The last attempt to load another.
    problem : str or None
        Why nothing newer is held.
    loading : str or None
        What is being loaded.
    due_at : float
        When the version was committed that should be held now, in seconds since 1970.
    """

    served: ServedIndex
    snapshots: Mapping[str, Held] = field(default_factory=dict)
    newest: Held | None = None
    swap: Swap | None = None
    problem: str | None = None
    loading: str | None = None
    due_at: float = 0.0


class Holdings:
    """The snapshots of a server.

    Parameters
    ----------
    cluster : ClusterFile
        Layout and indexes.
    server_id : int
        Whose share to load.
    options : HoldingOptions
        How.
    sift : Sift
        Evaluates filters.
    threads : int
        Cores that one search may use.
    changed : callable
        Called on the loader's thread whenever the offers have changed.
    swapped : callable
        Called with the name of an index after each attempt to move it.
    """

    def __init__(
        self,
        cluster: ClusterFile,
        server_id: int,
        options: HoldingOptions,
        sift: Sift,
        threads: int,
        changed: Callable[[], None],
        swapped: Callable[[str, Swap], None],
    ) -> None:
        self.cluster = cluster
        self._server_id = server_id
        self._options = options
        self._cache = open_cache(options.cache_dir, options.cache_bytes)
        self._sift = sift
        self._threads = threads
        self._changed = changed
        self._swapped = swapped
        self._one_at_a_time = threading.Lock()
        self.shelves: Mapping[str, Shelf] = {served.name: Shelf(served) for served in cluster.indexes}

    @property
    def group(self) -> int:
        """The shard group of this server."""
        return self.cluster.server(self._server_id).group

    @property
    def allowed_columns(self) -> tuple[str, ...] | None:
        """Columns that clients may see; None for all."""
        return self._options.columns

    @property
    def offers(self) -> tuple[Offer, ...]:
        """All that can be asked for, newest first."""
        found = [held.offer for shelf in self.shelves.values() for held in shelf.snapshots.values()]
        return tuple(sorted(found, key=lambda offer: offer.order, reverse=True))

    @property
    def complete(self) -> bool:
        """Whether every index has a snapshot in the present layout."""
        epoch = self.cluster.epoch
        return all(shelf.newest is not None and shelf.newest.offer.epoch == epoch for shelf in self.shelves.values())

    @property
    def used_at(self) -> float:
        """When anything was last asked for, on the monotonic clock; -inf for never."""
        held = (held for shelf in self.shelves.values() for held in shelf.snapshots.values())
        return max((each.used_at for each in held), default=-math.inf)

    def find(self, index: str, at: str) -> Held:
        """Return a snapshot.

        Raises
        ------
        IndexNotFound
            If no such index is served.
        SnapshotGone
            If it is not held, or not any more.
        """
        shelf = self.shelves.get(index)
        if shelf is None:
            raise no_index(index, tuple(self.shelves))
        held = shelf.snapshots.get(at)
        if held is None:
            raise SnapshotGone(
                f"snapshot {at!r} of index {index!r} is not held here",
                remedy="Ask for one that is offered",
                snapshot=at,
            )
        held.used_at = time.monotonic()
        return held

    def follow(self, moment: float | None = None) -> None:
        """Move every index to the newest version before a moment, where that is not held yet; never raises.

        What goes wrong is logged and kept for the status; what is held goes on being served.

        Parameters
        ----------
        moment : float or None
            Seconds since 1970; None for the newest version there is.
        """
        with self._one_at_a_time:
            for name in self.shelves:
                self._attempt(name, lambda shelf: self._at_moment(shelf, moment))
            self._prune()

    def move(self, index: str | None, version: int | None) -> dict[str, Any]:
        """Move one index, or all, to a version (None: the newest), and return where they are now.

        Raises
        ------
        IndexNotFound
            If there is none of that name.
        DfaissError
            What went wrong; what was held goes on being served.
        """
        if index is not None and index not in self.shelves:
            raise no_index(index, tuple(self.shelves))
        with self._one_at_a_time:
            moved = {}
            for name in self.shelves if index is None else [index]:
                error = self._attempt(name, lambda shelf: _at_version(self._handle(shelf), version))
                if error is not None:
                    raise error
                newest = self.shelves[name].newest
                moved[name] = "" if newest is None else newest.offer.at
            self._prune()
            return moved

    def hold(self, versions: Mapping[str, int | None]) -> None:
        """Note at which versions indexes are to stay; None for those that follow the dataset."""
        with self._one_at_a_time:
            self.cluster = self.cluster.with_versions(versions)
            for served in self.cluster.indexes:
                self._put(served.name, served=served)

    def lay_out(self, cluster: ClusterFile) -> None:
        """Take up another layout: the share of this server in it is loaded, and offered beside the old one."""
        with self._one_at_a_time:
            self.cluster = cluster
            before = self.shelves
            self.shelves = {served.name: _taken_over(before.get(served.name), served) for served in cluster.indexes}
            for name, shelf in before.items():
                if name not in self.shelves:
                    self._let_go(shelf.snapshots.values())
            self._catch_up()
            self._changed()

    def catch_up(self) -> None:
        """Load what should be held in the present layout and is not, because that failed before."""
        with self._one_at_a_time:
            self._catch_up()

    def _catch_up(self) -> None:
        for name, shelf in self.shelves.items():
            if shelf.newest is None or shelf.newest.offer.epoch != self.cluster.epoch:
                self._attempt(name, self._same_version)

    def _attempt(self, name: str, choose: Callable[[Shelf], PinnedDataset | None]) -> DfaissError | None:
        """Move one index to the version that was chosen; return what went wrong."""
        started, now = time.monotonic(), time.time()
        shelf = self.shelves[name]
        try:
            pinned = choose(shelf)
            if pinned is not None:
                self._put(name, due_at=pinned.committed_at.timestamp())
            opened = None if pinned is None else self._open(shelf, pinned)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as exc:  # an edge: whatever it is, what is held goes on being served, and followed
            error = self._known(name, exc)
            if shelf.problem is None or shelf.swap is None or shelf.swap.outcome != type(error).__name__:
                _log.warning("index %r: cannot be moved: %s", name, error)
            swap = Swap(at=now, seconds=time.monotonic() - started, outcome=type(error).__name__, detail=str(error))
            self._put(name, swap=swap, problem=str(error), loading=None)
            self._swapped(name, swap)
            return error
        if opened is None:
            if shelf.problem is not None or shelf.loading is not None:
                self._put(name, problem=None, loading=None)
            return None
        held, read_bytes = opened
        swap = Swap(at=now, seconds=time.monotonic() - started, outcome="ok", read_bytes=read_bytes)
        self._offer(name, held, swap)
        self._swapped(name, swap)
        return None

    def _known(self, name: str, exc: BaseException) -> DfaissError:
        """Return an error that clients can be told."""
        if isinstance(exc, DfaissError):
            return exc
        _log.error("index %r: loading failed", name, exc_info=exc)
        return ServerFailed(
            f"server {self._server_id} failed to load index {name!r}: {type(exc).__name__}",
            remedy="Its log has the traceback",
            server=self._server_id,
        )

    def _at_moment(self, shelf: Shelf, moment: float | None) -> PinnedDataset | None:
        handle = self._handle(shelf)
        newest = shelf.newest
        if shelf.served.version is not None:
            return handle.at_version(shelf.served.version)
        chosen = handle.latest() if moment is None else newest_before(handle, moment)
        if newest is None:
            # Nothing to serve yet: what was committed a moment ago is better than nothing.
            return handle.latest() if chosen is None or not self._has_index(shelf, chosen) else chosen
        if chosen is None or (chosen.version, chosen.committed_at) == _moment_of(newest.view.pinned):
            chosen = newest.view.pinned  # a pointer that lies outside the dataset may have moved all the same
            if shelf.served.index_uri is None and newest.offer.epoch == self.cluster.epoch:
                return None
        elif chosen.version < newest.view.pinned.version and chosen.committed_at <= newest.view.pinned.committed_at:
            return None  # moved ahead of the grid by hand
        return chosen

    def _has_index(self, shelf: Shelf, pinned: PinnedDataset) -> bool:
        try:
            find_pointer(pinned, shelf.served.index, shelf.served.index_uri)
        except IndexNotFound:
            return False
        return True

    def _same_version(self, shelf: Shelf) -> PinnedDataset:
        if shelf.newest is not None:
            return shelf.newest.view.pinned
        return _at_version(self._handle(shelf), shelf.served.version)

    def _handle(self, shelf: Shelf) -> PinnedDataset:
        # Anew each time: the version that is held may have been cleaned up, and the dataset been written anew.
        options = self._options.storage_options
        return PinnedDataset(open_dataset(shelf.served.dataset, storage_options=options), options)

    def _open(self, shelf: Shelf, pinned: PinnedDataset) -> tuple[Held, int] | None:
        """Load what is new of a snapshot; None if it is the newest already."""
        newest = shelf.newest
        generation = self._generation(shelf, pinned)
        at = _name_of(self.cluster.epoch, pinned, generation)
        if at in shelf.snapshots:
            back = shelf.snapshots[at]
            return None if back is newest else (back, 0)
        self._put(shelf.served.name, loading=f"version {pinned.version}, generation {generation.manifest.generation}")
        portion = self._portion(generation)
        before = None if newest is None else newest.view
        read_bytes = new_bytes(generation, portion, before)
        self._make_room(shelf, generation, portion, read_bytes)
        key = f"{shelf.served.name}/{at}"
        view = open_view(
            pinned,
            generation,
            self._options.limits,
            before=before,
            portion=portion,
            sift=functools.partial(self._sift.matching, key),
        )
        view.prepare()
        fragments = view.fragment_ids
        payload = None
        if self._options.payload:
            payload = Payload(
                pinned, self._options.payload, fragments, before=None if newest is None else newest.payload
            )
        lone_threads = warm(view, self._threads)
        offer = self._offer_of(shelf.served.name, at, view, portion)
        # Last, when nothing can fail any more: only what is offered is closed again.
        self._sift.open(key, pinned, fragments, self._options.filter_columns)
        _log.info(
            "index %r: %s ready: version %d, generation %s, %d rows of group %d, %d bytes read",
            shelf.served.name,
            at,
            pinned.version,
            generation.manifest.generation,
            view.rows,
            portion.group,
            read_bytes,
        )
        return Held(offer, view, payload, lone_threads), read_bytes

    def _generation(self, shelf: Shelf, pinned: PinnedDataset) -> Generation:
        served = shelf.served
        found = find_pointer(pinned, served.index, served.index_uri)
        if shelf.newest is not None and shelf.newest.view.generation.found.text == found.text:
            return shelf.newest.view.generation
        allowed = self._options.allowed_index_uris + (() if served.index_uri is None else (served.index_uri,))
        return read_generation(pinned, found, allowed, cache=self._cache)

    def _portion(self, generation: Generation) -> Portion:
        weights = self.cluster.weights_by_group()
        shards = [
            (record.index.digest, record.index.length_bytes + (record.refine.length_bytes if record.refine else 0))
            for record in generation.records
        ]
        groups = place_shards(shards, weights)
        return Portion(
            group=self.group,
            groups=len(weights),
            of_shards={digest: group for (digest, _), group in zip(shards, groups, strict=True)},
            of_fragment=functools.partial(place_fragment, weights=weights),
        )

    def _make_room(self, shelf: Shelf, generation: Generation, portion: Portion, read_bytes: int) -> None:
        """Check that a generation fits, if need be without the snapshots that nobody asks for.

        Raises
        ------
        BudgetExceeded
            With the numbers.
        """
        try:
            self._check_ram(generation, portion, read_bytes)
        except BudgetExceeded:
            idle = _idle(shelf, time.monotonic() - self._options.grace_seconds)
            if not idle:
                raise
            self._forget(shelf.served.name, idle)
            del idle
            self._check_ram(generation, portion, read_bytes)

    def _check_ram(self, generation: Generation, portion: Portion, read_bytes: int) -> None:
        """Refuse to load what does not fit.

        Raises
        ------
        BudgetExceeded
            With the numbers.
        """
        need = ram_need(generation, portion)
        used, limit = resident_bytes(), self._options.ram_limit_bytes
        more = min(need.total_bytes, read_bytes + min(need.largest_shard_bytes, read_bytes) + need.row_bytes)
        more += more // LOADING_SHARE
        if is_remote(generation.store):
            more += min(AHEAD_BYTES, read_bytes)
        if used + more > limit:
            raise BudgetExceeded(
                f"generation {generation.manifest.generation} needs {more:,} bytes more RAM in group {portion.group}"
                f" ({read_bytes:,} of new shards); {used:,} of {limit:,} are used",
                remedy="Give the server more memory, or the cluster more groups",
                needed_bytes=used + more,
                budget_bytes=limit,
            )

    def _offer_of(self, name: str, at: str, view: View, portion: Portion) -> Offer:
        manifest, names = view.generation.manifest, view.pinned.column_names
        allowed = self._options.columns
        return Offer(
            index=name,
            at=at,
            epoch=self.cluster.epoch,
            version=view.pinned.version,
            committed_at=view.pinned.committed_at.timestamp(),
            generation=manifest.generation,
            created_at=manifest.created_at,
            group=portion.group,
            rows=view.rows_by_group,
            shards=view.shards[:_NAMED_SHARDS],
            metric=view.metric,
            dim=view.model.spec.dim,
            lists=manifest.spec.num_partitions if view.family == "ivf" else 0,
            column=view.resolution.column.name,
            columns=tuple(column for column in names if allowed is None or column in allowed),
            payload=tuple(name for name in self._options.payload if allowed is None or name in allowed),
        )

    def _offer(self, name: str, held: Held, swap: Swap) -> None:
        shelf = self.shelves[name]
        now = time.monotonic()
        if shelf.newest is not None:
            shelf.newest.newest_at = now
        held.mark(stale=False)
        # Clients turn to the newest by its order. After a step back, to an older version or a dataset that was written
        # anew and counts anew, that must not be one from before it; until all servers have stepped back, it has to be.
        for each in shelf.snapshots.values():
            if each is not held and each.offer.order > held.offer.order:
                each.mark(stale=True)
        snapshots = {**shelf.snapshots, held.offer.at: held}
        kept = _kept(list(snapshots.values()), now - self._options.grace_seconds)
        self._put(
            name,
            snapshots={each.offer.at: each for each in kept},
            newest=held,
            swap=swap,
            problem=None,
            loading=None,
        )
        self._changed()
        self._let_go([each for each in shelf.snapshots.values() if each not in kept])

    def follow_held(self) -> None:
        """Move to the versions that indexes are to stay at, where the cluster file names others than are held."""
        with self._one_at_a_time:
            for name, shelf in list(self.shelves.items()):
                if shelf.served.version not in (None, self.version_of(name)):
                    self._attempt(name, lambda shelf: self._at_moment(shelf, None))
            self._prune()

    def version_of(self, name: str) -> int | None:
        """Return the version that an index is at; None while it is not loaded."""
        newest = self.shelves[name].newest
        return None if newest is None else newest.offer.version

    def _prune(self) -> None:
        since = time.monotonic() - self._options.grace_seconds
        for name, shelf in list(self.shelves.items()):
            self._forget(name, _left_behind(shelf, since))

    def _forget(self, name: str, snapshots: Sequence[Held]) -> None:
        if snapshots:
            held = self.shelves[name].snapshots
            self._put(name, snapshots={at: each for at, each in held.items() if each not in snapshots})
            self._changed()
            self._let_go(snapshots)

    def _let_go(self, snapshots: Iterable[Held]) -> None:
        keys = [f"{held.offer.index}/{held.offer.at}" for held in snapshots]
        for key in keys:
            self._sift.close_key(key)
        if keys:
            give_memory_back()

    def _put(self, name: str, **changes: Any) -> None:
        self.shelves = {**self.shelves, name: replace(self.shelves[name], **changes)}


def _taken_over(shelf: Shelf | None, served: ServedIndex) -> Shelf:
    """Return the shelf of an index in a new layout, with what is held of it already."""
    if shelf is None:
        return Shelf(served)
    was = shelf.served
    if (was.dataset, was.index, was.index_uri) == (served.dataset, served.index, served.index_uri):
        return replace(shelf, served=served)
    # Another index under the same name: the one before is served until this is loaded, and shares nothing with it.
    if shelf.newest is not None:
        shelf.newest.newest_at = time.monotonic()  # or it would never count as left behind
    return Shelf(served, snapshots=shelf.snapshots)


def _kept(snapshots: list[Held], since: float) -> list[Held]:
    """Return the snapshots to keep: the newest, and of the others those that are still asked for.

    A server that is slow to move holds all others at the snapshot that it has: they must not forget that one. Who asks
    for a snapshot has seen it offered by all groups, so the newest that was ever asked for is the one to come back to.
    """
    snapshots.sort(key=lambda held: held.offer.order, reverse=True)
    newest, others = snapshots[:KEPT_SNAPSHOTS], snapshots[KEPT_SNAPSHOTS:]
    known = next((held for held in snapshots if held.was_used), snapshots[-1])
    wanted = sorted((held for held in others if held.used_at >= since), key=lambda held: held.used_at, reverse=True)
    if known in others:
        wanted = [known, *(held for held in wanted if held is not known)]
    return newest + wanted[: MAX_SNAPSHOTS - KEPT_SNAPSHOTS]


def _left_behind(shelf: Shelf, since: float) -> list[Held]:
    """Return the snapshots that all clients have turned away from: a newer one was asked for, they were not of late."""
    used = [held.offer.order for held in shelf.snapshots.values() if held.was_used]
    return [held for held in _idle(shelf, since) if used and held.offer.order < max(used)]


def _idle(shelf: Shelf, since: float) -> list[Held]:
    """Return the snapshots that nobody has asked for in a while, the newest left out."""
    others = (held for held in shelf.snapshots.values() if held is not shelf.newest)
    return [held for held in others if max(held.used_at, held.newest_at) < since]


def give_memory_back() -> None:
    """Return what was freed to the system: the allocator keeps it otherwise, for searches that never come."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _at_version(handle: PinnedDataset, version: int | None) -> PinnedDataset:
    return handle.latest() if version is None else handle.at_version(version)


def _moment_of(pinned: PinnedDataset) -> tuple[int, Any]:
    return pinned.version, pinned.committed_at


def _name_of(epoch: int, pinned: PinnedDataset, generation: Generation) -> str:
    # A version number can come again, on a branch or a dataset that is made anew; not at the same time.
    moment = int(pinned.committed_at.timestamp() * 1000)
    return f"{epoch}.{pinned.version}.{moment:x}.{generation.manifest.generation[:12]}"
