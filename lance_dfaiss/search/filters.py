"""Filters: from Lance's SQL to the positions that match, kept for the next search with the same filter."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import UInt64Array
from .places import RunMap

__all__ = ["FilterCache", "Matches", "entry_bytes", "match_addresses"]

# A mask is one bit a row: this holds the masks of 20 filters over 100 million rows.
_CACHE_BYTES = 256 * 1024 * 1024

# What an entry takes beside its arrays and its text: objects, here and in FAISS.
_ENTRY_BYTES = 2 * 1024

# Up to this many runs, one scatter a run is faster than looking every address up.
_FEW_RUNS = 500


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """The rows of one snapshot that a filter matches.

    Parameters
    ----------
    indexed : numpy.ndarray
        uint8: one bit a position, little-endian; live positions only.
    addresses : numpy.ndarray
        uint64, sorted: addresses of matching rows that are not indexed.
    rows : int
        Indexed rows that match.
    """

    indexed: NDArray[np.uint8]
    addresses: UInt64Array
    rows: int

    def mask(self, positions: int) -> NDArray[np.bool_]:
        """Return the positions as bool ``(positions,)``."""
        return np.unpackbits(self.indexed, count=positions, bitorder="little").view(np.bool_)

    @property
    def ram_bytes(self) -> int:
        """Bytes held."""
        return int(self.indexed.nbytes + self.addresses.nbytes)


def match_addresses(addresses: UInt64Array, places: RunMap, live: NDArray[np.bool_]) -> Matches:
    """Return which positions some rows are.

    Parameters
    ----------
    addresses : numpy.ndarray
        uint64 ``(n,)``, of live rows of the version.
    places : RunMap
        Between positions and addresses.
    live : numpy.ndarray
        bool ``(positions,)``.
    """
    if (addresses[1:] < addresses[:-1]).any():
        addresses = np.sort(addresses)
    marks = np.zeros(len(live), dtype=bool)
    first_positions, first_addresses, lengths = places.runs
    if len(first_positions) > _FEW_RUNS:
        positions = places.positions(addresses)
        outside = positions < 0
        marks[positions[~outside]] = True
    else:
        outside = np.ones(len(addresses), dtype=bool)
        starts = np.searchsorted(addresses, first_addresses)
        ends = np.searchsorted(addresses, first_addresses + lengths.astype(np.uint64))
        for position, first, start, end in zip(
            first_positions.tolist(), first_addresses.tolist(), starts.tolist(), ends.tolist(), strict=True
        ):
            marks[(addresses[start:end] - np.uint64(first)).view(np.int64) + position] = True
            outside[start:end] = False
    marks &= live
    return Matches(np.packbits(marks, bitorder="little"), addresses[outside], int(np.count_nonzero(marks)))


def entry_bytes(filter_sql: str) -> int:
    """Return what keeping a filter takes, whatever it matches: one that matches nothing is not free."""
    return sys.getsizeof(filter_sql) + _ENTRY_BYTES


class FilterCache:
    """Keeps what was worked out for the filters used last, up to a number of bytes; for many threads.

    Parameters
    ----------
    max_bytes : int
        Of all that is held, entries of no size of their own included.
    """

    def __init__(self, max_bytes: int = _CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[object, tuple[object, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: object) -> object | None:
        """Return what is held under a key, and count that as a use."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                return None
            self._held.move_to_end(key)
            return found[0]

    def put(self, key: object, value: object, ram_bytes: int) -> None:
        """Hold something; what was used least recently makes room."""
        with self._lock:
            self._bytes += ram_bytes - self._held.pop(key, (None, 0))[1]
            self._held[key] = (value, ram_bytes)
            while self._bytes > self._max_bytes and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1][1]

    @property
    def ram_bytes(self) -> int:
        """Bytes held."""
        return self._bytes
