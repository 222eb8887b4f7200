"""Leases: how a builder says that it is alive, so that nobody collects the files it is writing.

A lease is a run of small documents in the generation's folder, ``lease-00000001-<holder>.json`` and so on,
each with an end. The holder writes the next one when a third of the term has passed. A lease that was
allowed to run out is lost for good, even if nobody noticed: whoever collects files may have decided
meanwhile. Several builders may work on one generation, as after a resume beside a living twin; each has a
lease of its own, the files stay while any of them holds, and the commit decides who of them wins.

Clocks of different machines differ. A holder stops at the end that it wrote; a collector waits for
`CLOCK_MARGIN` longer, so clocks may differ by that much before anything goes wrong.
"""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from time import monotonic
from types import TracebackType
from typing import Final

from ..errors import CorruptIndex, InvalidArgument, LeaseExpired, MissingFile, StorageError
from ..manifest import LeaseDocument, decode_lease, encode
from ..storage import Store

__all__ = ["CLOCK_MARGIN", "LEASE_SECONDS", "Lease", "holds", "is_leased", "newest_terms", "read_terms", "utc_now"]

LEASE_SECONDS: Final = 600.0
"""Length of a term: a builder that is stopped, swapped out or cut off for less loses nothing."""

CLOCK_MARGIN: Final = timedelta(minutes=5)
"""How much longer than it says a lease is respected by others, whose clocks may be ahead."""

_RENEWALS_PER_TERM: Final = 3
_MAX_LEASE_BYTES: Final = 64 * 1024
_TERM = re.compile(r"(?P<generation>[^/]+)/lease-(?P<number>[0-9]{8,})-(?P<holder>[0-9a-f-]+)\.json")

_log = logging.getLogger(__name__)


def utc_now() -> datetime:
    """Return the time of day, in UTC."""
    return datetime.now(timezone.utc)


class Lease:
    """Holds a generation while the block runs: ``with Lease.hold(store, generation, root=root) as lease:``.

    A thread renews it. When the block ends well, or nothing else was written, its documents are removed; else
    the last one says that it was given back. An error of the files that the block ends with, when the lease has run out
    as well, is turned into `LeaseExpired`: that is why they are not there.

    Attributes
    ----------
    generation, holder : str
        What is held, and the id of this holder.
    """

    def __init__(
        self, store: Store, generation: str, *, root: str, seconds: float, clock: Callable[[], datetime]
    ) -> None:
        if not seconds > 0:
            raise InvalidArgument(f"seconds must be positive, got {seconds}", parameter="seconds", value=seconds)
        self.generation = generation
        self.holder = uuid.uuid4().hex[:12]
        self._store = store
        self._root = root
        self._seconds = seconds
        self._clock = clock
        self._number = 0
        self._ends: tuple[datetime, float] | None = None  # by the time of day, and by the monotonic clock
        self._failure: Exception | None = None
        self._lost = False
        self._renewing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lance-dfaiss-lease", daemon=True)

    @classmethod
    def hold(
        cls,
        store: Store,
        generation: str,
        *,
        root: str,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], datetime] = utc_now,
    ) -> Lease:
        """Make a lease; it begins with the ``with`` block.

        Parameters
        ----------
        store : Store
            Where generations lie.
        generation : str
            The one to hold; its folder need not exist yet.
        root : str
            URI of the dataset root that is built for.
        seconds : float
            Length of a term.
        clock : callable
            Tells the time of day, with its offset from UTC.

        Raises
        ------
        InvalidArgument
            If ``seconds`` is not positive.
        """
        return cls(store, generation, root=root, seconds=seconds, clock=clock)

    def __enter__(self) -> Lease:
        self.renew()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        expired = isinstance(exc, (StorageError, CorruptIndex)) and self._ran_out()
        try:
            self._leave(well=exc is None)
        except StorageError as failure:
            # It ends by itself at the end of its term; what the block did or raised matters more.
            _log.warning("the lease on generation %s could not be given back: %s", self.generation, failure)
        if expired:
            raise self._expired() from exc

    def check(self) -> None:
        """Make sure that the generation is still held.

        Raises
        ------
        LeaseExpired
            If it is not, with the last failure to renew it as the cause.
        """
        failure = self._failure
        if failure is not None and not isinstance(failure, StorageError):
            raise failure  # not the store's: a fault of this program
        if self._ran_out():
            raise self._expired() from failure

    def renew(self) -> None:
        """Write the next term; the thread does so in time.

        Raises
        ------
        LeaseExpired
            If the last one has run out: then it is too late.
        StorageError
            If it could not be written; what is left of the last term still holds.
        """
        with self._renewing:
            if self._ends is not None and self._ran_out():
                raise self._expired()
            # The end is reckoned from before the write, which may take long.
            began, monotonic_end = self._clock(), monotonic() + self._seconds
            ends = began + timedelta(seconds=self._seconds)
            self._write(began, ends)
            self._ends = ends, monotonic_end
            self._failure = None

    def _keep(self) -> None:
        while not self._stop.wait(self._seconds / _RENEWALS_PER_TERM):
            try:
                self.renew()
            except LeaseExpired:
                return
            except Exception as exc:  # remembered for `check`, tried again while the term lasts
                _log.warning("the lease on generation %s could not be renewed: %s", self.generation, exc)
                self._failure = exc

    def _write(self, begins: datetime, ends: datetime) -> None:
        number = self._number + 1
        term = LeaseDocument(
            generation=self.generation,
            holder=self.holder,
            number=number,
            root=self._root,
            created_at=begins.isoformat(timespec="milliseconds"),
            expires_at=ends.isoformat(timespec="milliseconds"),
        )
        try:
            self._store.write(self._name(number), encode(term))
        except StorageError:
            # A write that was reported as failed may have been done all the same: its number is used up.
            self._number = number
            raise
        self._number = number

    def _leave(self, *, well: bool) -> None:
        own = {self._name(number) for number in range(1, self._number + 1)}
        if not well and any(file.name not in own for file in self._store.list(self.generation)):
            # What was written may be resumed; this dates it for whoever collects.
            now = self._clock()
            self._write(now, now)
            return
        for name in sorted(own):
            self._store.delete(name)

    def _name(self, number: int) -> str:
        return f"{self.generation}/lease-{number:08d}-{self.holder}.json"

    def _ran_out(self) -> bool:
        # The monotonic clock catches a time of day that was put back, the time of day a machine that slept.
        if self._ends is None or self._clock() >= self._ends[0] or monotonic() >= self._ends[1]:
            self._lost = True
        return self._lost

    def _expired(self) -> LeaseExpired:
        ended = "" if self._ends is None else self._ends[0].isoformat(timespec="seconds")
        return LeaseExpired(
            f"the lease on generation {self.generation} ran out at {ended}, and its files may have been collected"
            " since: this process was stopped, or could not write, for too long",
            remedy="Nothing was committed. Run again; a build goes on with what is left under resume=True",
            generation=self.generation,
            expired_at=ended,
        )


def newest_terms(names: Iterable[str]) -> dict[str, list[str]]:
    """Return, by generation, the names of the newest term of each holder among the names of stored files."""
    newest: dict[tuple[str, str], tuple[int, str]] = {}
    for name in names:
        found = _TERM.fullmatch(name)
        if found is not None:
            key = found["generation"], found["holder"]
            newest[key] = max(newest.get(key, (0, "")), (int(found["number"]), name))
    terms: dict[str, list[str]] = {}
    for (generation, _), (_, name) in sorted(newest.items()):
        terms.setdefault(generation, []).append(name)
    return terms


def is_leased(store: Store, generation: str, *, clock: Callable[[], datetime] = utc_now) -> bool:
    """Tell whether any builder holds a generation, as far as this machine's clock can tell.

    Raises
    ------
    CorruptIndex, StorageError
        If a term could not be read.
    """
    names = newest_terms(file.name for file in store.list(generation)).get(generation, [])
    return any(holds(term, clock()) for term in read_terms(store, names))


def holds(term: LeaseDocument, now: datetime) -> bool:
    """Tell whether others must respect a term: to its end by its holder's clock, which may be behind."""
    return not term.given_back and now < term.ends + CLOCK_MARGIN


def read_terms(store: Store, names: Iterable[str]) -> list[LeaseDocument]:
    """Read terms by name; one that is gone by now was ended by its holder.

    Raises
    ------
    UnsupportedFormat, ManifestInvalid
        If one cannot be understood.
    StorageError
        If one could not be read.
    """
    terms = []
    for name in names:
        try:
            data = store.read(name, max_bytes=_MAX_LEASE_BYTES)
        except MissingFile:
            continue
        terms.append(decode_lease(data, location=f"{store.location}/{name}"))
    return terms
