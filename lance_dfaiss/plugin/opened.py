"""The indexes that a handle and its copies have open, for the versions they were last at."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..errors import DatasetChanged, InsufficientData, UnknownColumn, UnsupportedColumn
from ..lance_io import LanceDataset, PinnedDataset
from ..pointers import find_pointer, stored_pointers
from ..search import Index
from ..search.index import open_view
from ..search.load import Generation, read_generation
from ..search.resolve import resolve_generation
from ..search.tail import TailLimits
from ..search.view import View
from ..types import POINTER_PREFIX
from .native import NotOurs, plain

__all__ = ["Locations", "OpenIndexes", "Opened"]

_log = logging.getLogger(__name__)

# Versions of a dataset that stay open; those of one generation share their segments.
_KEPT_VERSIONS = 4
_KEPT_GENERATIONS = 16
_KEPT_NAMES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Locations:
    """Where indexes may lie beside the dataset's own folder.

    Parameters
    ----------
    allowed : tuple of str
        Locations outside the dataset that its pointers may lead to.
    index_uri : str or None
        Where pointers are looked for beside the dataset's; it is trusted.
    """

    allowed: tuple[str, ...] = ()
    index_uri: str | None = None

    @property
    def trusted(self) -> tuple[str, ...]:
        """All places that a pointer may lead to."""
        return self.allowed if self.index_uri is None else (*self.allowed, self.index_uri)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """An index open for one dataset version; its segments know nothing of versions and are shared.

    Parameters
    ----------
    index : Index
        Answers.
    default_nprobe : int
        Lists that a search looks in when it does not say.
    untold : threading.Lock
        Taken by who tells that this version has to be searched by Lance.
    """

    index: Index
    default_nprobe: int
    untold: threading.Lock


class OpenIndexes:
    """The indexes that a handle and its copies have open, the newest few; safe to use from many threads.

    Parameters
    ----------
    locations : Locations
        Where indexes may lie beside the dataset's own folder.
    """

    def __init__(self, locations: Locations) -> None:
        self.locations = locations
        # Held while loading: the second of two threads waits for the index instead of loading it again.
        self._lock = threading.Lock()
        self._generations: OrderedDict[tuple[str, str], Generation] = OrderedDict()
        self._versions: OrderedDict[tuple[Any, ...], Opened | str] = OrderedDict()
        self._columns: OrderedDict[tuple[Any, ...], str] = OrderedDict()
        self._tails: OrderedDict[tuple[Any, ...], int | str] = OrderedDict()
        self._pointers: OrderedDict[tuple[Any, ...], dict[str, str]] = OrderedDict()

    def pointers(self, handle: LanceDataset) -> dict[str, str]:
        """Return the texts of the pointers of the version that a handle is at, by index name, in that order.

        Those under ``index_uri`` are no part of a version: they are listed once for each, until `look_again`.
        """
        if self.locations.index_uri is None:
            metadata = handle.metadata
            named = ((key.removeprefix(POINTER_PREFIX), key) for key in metadata if key.startswith(POINTER_PREFIX))
            return {name: metadata[key] for name, key in sorted(named)}
        key = _version_key(handle)
        with self._lock:
            found = self._pointers.get(key)
            if found is None:
                stored = stored_pointers(PinnedDataset(plain(handle)), self.locations.index_uri)
                found = {name: pointer.text for name, pointer in stored.items()}
            _keep(self._pointers, key, found, _KEPT_VERSIONS)
            return found

    def look_again(self) -> None:
        """List the pointers under ``index_uri`` anew when they are next asked for."""
        with self._lock:
            self._pointers.clear()

    def generation(self, handle: LanceDataset, name: str, text: str) -> Generation:
        """Return the documents behind a pointer.

        Raises
        ------
        CorruptIndex, UntrustedLocation
            If they cannot be read or believed.
        """
        with self._lock:
            found = self._generations.get((name, text))
            if found is None:
                # A plain handle: one of ours would lead back to this cache and keep it alive.
                pinned = PinnedDataset(plain(handle))
                pointer = find_pointer(pinned, name, self.locations.index_uri)
                found = read_generation(pinned, pointer, self.locations.trusted)
            _keep(self._generations, (name, text), found, _KEPT_GENERATIONS)
            return found

    def column(self, handle: LanceDataset, generation: Generation) -> str:
        """Return the name that the column of an index has by now, or had when there is no such column any more."""
        built, dim = generation.manifest.dataset, generation.manifest.spec.dim
        key = (*_version_key(handle), generation.found.name, generation.found.text)
        with self._lock:
            found = self._columns.get(key)
            if found is None:
                try:
                    found = PinnedDataset(plain(handle)).find_column(built.column, built.field_id, dim).name
                except (UnknownColumn, UnsupportedColumn, InsufficientData):
                    found = built.column
            _keep(self._columns, key, found, _KEPT_NAMES)
            return found

    def tail_rows(self, handle: LanceDataset, generation: Generation) -> int:
        """Return how many rows of the version that a handle is at the index does not hold, without loading it.

        Raises
        ------
        NotOurs
            If it cannot answer for this version at all.
        """
        key = (*_version_key(handle), generation.found.name, generation.found.text)
        with self._lock:
            found = self._tails.get(key)
            if found is None:
                try:
                    snapshot = resolve_generation(PinnedDataset(plain(handle)), generation).snapshot
                    found = sum(fragment.rows for fragment in snapshot.tail)
                except DatasetChanged as exc:
                    found = self._refused(generation, exc)
            _keep(self._tails, key, found, _KEPT_NAMES)
        if isinstance(found, str):
            raise NotOurs(found)
        return found

    def version(self, handle: LanceDataset, generation: Generation) -> Opened:
        """Return the index, open for the version that a handle is at.

        Raises
        ------
        NotOurs
            If the version does not have the column any more.
        CorruptIndex
            If a shard is missing or damaged.
        """
        key = (*_version_key(handle), generation.found.name, generation.found.text)
        with self._lock:
            opened = self._versions.get(key)
            if opened is None:
                opened = self._open(PinnedDataset(plain(handle)), generation)
            _keep(self._versions, key, opened, _KEPT_VERSIONS)
        if isinstance(opened, str):
            raise NotOurs(opened)
        return opened

    def _open(self, pinned: PinnedDataset, generation: Generation) -> Opened | str:
        """Open, or return the reason why this version cannot be searched with the index."""
        try:
            view = open_view(pinned, generation, TailLimits(), before=self._before(generation.found.name))
        except DatasetChanged as exc:
            return self._refused(generation, exc)
        index = Index(view)
        return Opened(index=index, default_nprobe=index.stats().defaults.nprobe or 1, untold=threading.Lock())

    def _before(self, name: str) -> View | None:
        """Return what was last used of an index: what it has in RAM need not be read again."""
        others = (opened for opened in reversed(self._versions.values()) if isinstance(opened, Opened))
        return next((opened.index.view for opened in others if opened.index.name == name), None)

    def _refused(self, generation: Generation, exc: DatasetChanged) -> str:
        # Once a version, as the answer is kept: a search that became slow should not need DEBUG to be explained.
        _log.warning("index %r cannot answer, Lance searches by itself: %s", generation.manifest.name, exc.message)
        return exc.message


def _version_key(handle: LanceDataset) -> tuple[Any, ...]:
    # Version numbers repeat on branches, and on a branch made again; the time of the commit does not.
    version = handle.get_version()
    return (version["version"], version["timestamp"])


def _keep(entries: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > most:
        entries.popitem(last=False)
