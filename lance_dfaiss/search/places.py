"""Runs of rows: from position to row id or row address and back, and how compactions move them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import Int64Array, UInt64Array

__all__ = ["Places", "RunMap", "expand", "row_addresses", "run_starts", "split_addresses"]

_OFFSET_BITS = 32
_OFFSET_MASK = np.uint64(2**_OFFSET_BITS - 1)

# Up to this many runs, slices in a loop are faster than an index of every row.
_FEW_RUNS = 2_000


class RunMap:
    """From position to a number (a row id, a row address) and back, by runs where both count up by one.

    Parameters
    ----------
    first_positions, first_numbers, lengths : numpy.ndarray
        int64, uint64 and int64 ``(runs,)``; positions increasing, runs disjoint in position. For `positions`
        they must be disjoint in number too.
    """

    def __init__(self, first_positions: Int64Array, first_numbers: UInt64Array, lengths: Int64Array) -> None:
        self._positions = first_positions
        self._numbers = first_numbers
        self._lengths = lengths
        # Two's complement wraps around, so signed sums give the right unsigned numbers.
        self._shift = first_numbers.view(np.int64) - first_positions
        self._by_number = np.argsort(first_numbers, kind="stable")
        self._ascending = first_numbers[self._by_number]

    @classmethod
    def of_rows(cls, positions: Int64Array, numbers: UInt64Array) -> RunMap:
        """Find the runs of rows given one by one.

        Parameters
        ----------
        positions, numbers : numpy.ndarray
            int64 increasing and uint64, ``(n,)``.
        """
        if not len(positions):
            return cls(np.empty(0, np.int64), np.empty(0, np.uint64), np.empty(0, np.int64))
        starts = run_starts(positions, numbers)
        lengths = np.diff(np.append(starts, len(positions)))
        return cls(positions[starts], numbers[starts], lengths)

    def numbers(self, positions: Int64Array) -> UInt64Array:
        """Return the numbers of positions; for -1 some number.

        Parameters
        ----------
        positions : numpy.ndarray
            int64, any shape; every one -1 or covered by a run.
        """
        if not len(self._positions):
            return np.zeros(positions.shape, dtype=np.uint64)
        run = 1 if len(self._positions) == 1 else self._positions.searchsorted(positions, side="right")
        numbers: UInt64Array = (positions + self._shift[run - 1]).view(np.uint64)
        return numbers

    def positions(self, numbers: UInt64Array) -> Int64Array:
        """Return the positions of numbers, -1 for those that are not covered.

        Parameters
        ----------
        numbers : numpy.ndarray
            uint64 ``(n,)``.
        """
        if not len(self._positions):
            return np.full(len(numbers), -1, dtype=np.int64)
        run = self._by_number[np.maximum(np.searchsorted(self._ascending, numbers, side="right") - 1, 0)]
        ahead = numbers - self._numbers[run]  # unsigned: a row id can be 2**63 and more
        inside = (numbers >= self._numbers[run]) & (ahead < self._lengths[run].astype(np.uint64))
        return np.where(inside, self._positions[run] + ahead.astype(np.int64), -1)

    @property
    def runs(self) -> tuple[Int64Array, UInt64Array, Int64Array]:
        """First positions, first numbers and lengths."""
        return self._positions, self._numbers, self._lengths

    @property
    def ram_bytes(self) -> int:
        """Bytes of the runs."""
        held = (self._positions, self._numbers, self._lengths, self._shift, self._by_number, self._ascending)
        return sum(int(array.nbytes) for array in held)


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Where positions lie in the dataset, by runs.

    Parameters
    ----------
    positions, fragment_ids, offsets, lengths : numpy.ndarray
        int64 ``(runs,)``: first position, fragment, first physical offset in it, rows.
    """

    positions: Int64Array
    fragment_ids: Int64Array
    offsets: Int64Array
    lengths: Int64Array

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Places:
        """Return places from ``(position, fragment, offset, length)`` each."""
        table = np.array(list(rows), dtype=np.int64).reshape(-1, 4)
        return cls(*(np.ascontiguousarray(table[:, i]) for i in range(4)))

    @classmethod
    def join(cls, parts: Iterable[Places]) -> Places:
        """Return all runs of several places, in order of position."""
        held = [part for part in parts if len(part)]
        if not held:
            return cls.of([])
        columns = [np.concatenate([part.columns[i] for part in held]) for i in range(4)]
        order = np.argsort(columns[0], kind="stable")
        return cls(*(column[order] for column in columns))

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def columns(self) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array]:
        """The four arrays."""
        return self.positions, self.fragment_ids, self.offsets, self.lengths

    @property
    def rows(self) -> int:
        """Rows of all runs."""
        return int(self.lengths.sum())

    @property
    def addresses(self) -> UInt64Array:
        """Row address of the first row of each run."""
        return row_addresses(self.fragment_ids, self.offsets)

    def select(self, chosen: NDArray[np.bool_] | Int64Array | slice) -> Places:
        """Return some of the runs: those marked, numbered, or in a range."""
        return Places(*(column[chosen] for column in self.columns))

    def in_fragments(self, fragment_ids: Iterable[int]) -> Places:
        """Return the runs that lie in some fragments."""
        return self.select(np.isin(self.fragment_ids, np.fromiter(fragment_ids, np.int64)))

    def run_map(self) -> RunMap:
        """Return the map between positions and row addresses."""
        return RunMap(self.positions, self.addresses, self.lengths)

    def counts(self, marks: NDArray[np.bool_]) -> Int64Array:
        """Return how many positions of each run are marked, int64 ``(runs,)``.

        Parameters
        ----------
        marks : numpy.ndarray
            bool ``(positions,)``.
        """
        if len(self) <= _FEW_RUNS:
            runs = zip(self.positions.tolist(), self.lengths.tolist(), strict=True)
            counted = (np.count_nonzero(marks[position : position + length]) for position, length in runs)
            return np.fromiter(counted, np.int64, len(self))
        totals = np.concatenate(([0], np.cumsum(marks)))
        counts: Int64Array = totals[self.positions + self.lengths] - totals[self.positions]
        return counts

    def where(self, kept: NDArray[np.bool_]) -> Places:
        """Return the rows whose position is marked.

        Parameters
        ----------
        kept : numpy.ndarray
            bool ``(positions,)``.
        """
        counts = self.counts(kept)
        whole, partly = self.select(counts == self.lengths), self.select((counts > 0) & (counts < self.lengths))
        if not len(partly):
            return whole
        positions, fragment_ids, offsets = partly.expanded()
        chosen = kept[positions]
        return Places.join([whole, _compressed(positions[chosen], fragment_ids[chosen], offsets[chosen])])

    def expanded(self) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Return position, fragment and offset of every row, int64 ``(rows,)`` each."""
        return (
            expand(self.positions, self.lengths),
            np.repeat(self.fragment_ids, self.lengths),
            expand(self.offsets, self.lengths),
        )

    def joined(self) -> Places:
        """Return the same rows in as few runs as there can be."""
        if len(self) < 2:
            return self
        position, fragment_id, offset, length = self.columns
        goes_on = (
            (position[1:] == position[:-1] + length[:-1])
            & (fragment_id[1:] == fragment_id[:-1])
            & (offset[1:] == offset[:-1] + length[:-1])
        )
        starts = np.append(np.zeros(1, np.int64), np.flatnonzero(~goes_on) + 1)
        return Places(position[starts], fragment_id[starts], offset[starts], np.add.reduceat(length, starts))

    def cut(self, borders: Int64Array) -> Places:
        """Return the same rows, no run with positions on both sides of a border.

        Parameters
        ----------
        borders : numpy.ndarray
            int64: first positions of the parts.
        """
        borders = np.unique(borders)  # an empty part begins where the next one does
        first = np.searchsorted(borders, self.positions, side="right")
        inside = np.searchsorted(borders, self.positions + self.lengths, side="left") - first
        if not (inside > 0).any():
            return self
        pieces = np.maximum(inside, 0) + 1
        run = np.repeat(np.arange(len(self)), pieces)
        number = expand(np.zeros(len(self), dtype=np.int64), pieces)
        starts = np.where(number == 0, self.positions[run], borders[np.maximum(first[run] + number - 1, 0)])
        ends = np.append(starts[1:], 0)
        last = np.cumsum(pieces) - 1
        ends[last] = self.positions + self.lengths
        ahead = starts - self.positions[run]
        return Places(starts, self.fragment_ids[run], self.offsets[run] + ahead, ends - starts)

    def shifted(self, by: int) -> Places:
        """Return the same rows at positions that are so much higher."""
        return Places(self.positions + by, self.fragment_ids, self.offsets, self.lengths)

    def parts(self, sizes: Sequence[int]) -> list[Places]:
        """Return the rows of consecutive parts, each with positions of its own from 0.

        Parameters
        ----------
        sizes : sequence of int
            Positions of each part.
        """
        ends = np.cumsum(np.array(sizes, dtype=np.int64))
        firsts = ends - np.array(sizes, dtype=np.int64)
        inside = Places.join([self]).cut(firsts)
        starts, stops = (np.searchsorted(inside.positions, borders).tolist() for borders in (firsts, ends))
        return [
            inside.select(slice(start, stop)).shifted(-first)
            for start, stop, first in zip(starts, stops, firsts.tolist(), strict=True)
        ]

    def disjoint(self) -> Places:
        """Return the same rows, no position and no address twice; the first run in order wins."""
        if not _overlaps(self.positions, self.lengths) and not _overlaps(self.addresses, self.lengths):
            return self
        positions, fragment_ids, offsets = self.expanded()
        addresses = (fragment_ids << _OFFSET_BITS) | offsets
        _, first = np.unique(addresses, return_index=True)
        kept = np.sort(first)
        _, first = np.unique(positions[kept], return_index=True)
        kept = kept[first]
        return _compressed(positions[kept], fragment_ids[kept], offsets[kept])

    def mark(self, marks: NDArray[np.bool_], alive: dict[int, NDArray[np.bool_]]) -> None:
        """Set ``marks[position]`` for every row that is alive.

        Parameters
        ----------
        marks : numpy.ndarray
            bool ``(positions,)``, changed in place.
        alive : dict of int to numpy.ndarray
            bool ``(physical_rows,)`` of the fragments that have dead rows.
        """
        if len(self) <= _FEW_RUNS:
            for position, fragment, offset, length in zip(*(c.tolist() for c in self.columns), strict=True):
                rows = alive.get(fragment)
                marks[position : position + length] = True if rows is None else rows[offset : offset + length]
            return
        ids = np.sort(np.fromiter(alive, np.int64, len(alive)))
        partly = np.isin(self.fragment_ids, ids)
        whole, part = self.select(~partly), self.select(partly)
        marks[expand(whole.positions, whole.lengths)] = True
        if len(part):
            flags = [alive[i] for i in ids.tolist()]
            starts = np.cumsum([0] + [len(rows) for rows in flags[:-1]])[np.searchsorted(ids, part.fragment_ids)]
            rows = np.concatenate(flags)
            marks[expand(part.positions, part.lengths)] = rows[expand(starts + part.offsets, part.lengths)]


def expand(firsts: Int64Array, lengths: Int64Array) -> Int64Array:
    """Return the numbers of all runs, one after the other, int64 ``(sum of lengths,)``."""
    if len(firsts) == 1:
        return np.arange(firsts[0], firsts[0] + lengths[0], dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    numbers: Int64Array = np.arange(total, dtype=np.int64) + np.repeat(firsts - (ends - lengths), lengths)
    return numbers


def row_addresses(fragment_ids: Int64Array, offsets: Int64Array) -> UInt64Array:
    """Return row addresses, uint64 ``(n,)``."""
    addresses: UInt64Array = (fragment_ids.astype(np.uint64) << np.uint64(_OFFSET_BITS)) | offsets.astype(np.uint64)
    return addresses


def split_addresses(addresses: UInt64Array) -> tuple[Int64Array, Int64Array]:
    """Return fragments and offsets of row addresses, int64 each."""
    return (
        (addresses >> np.uint64(_OFFSET_BITS)).astype(np.int64),
        (addresses & _OFFSET_MASK).astype(np.int64),
    )


def run_starts(*arrays: NDArray[np.int64] | NDArray[np.uint64]) -> Int64Array:
    """Return where a run begins: where one of the arrays does not count up by one."""
    breaks = np.zeros(len(arrays[0]) - 1, dtype=bool)
    for array in arrays:
        breaks |= np.diff(array) != 1
    return np.append(np.zeros(1, np.int64), np.flatnonzero(breaks) + 1)


def _compressed(positions: Int64Array, fragment_ids: Int64Array, offsets: Int64Array) -> Places:
    if not len(positions):
        return Places.of([])
    starts = run_starts(positions, (fragment_ids << _OFFSET_BITS) + offsets)
    lengths = np.diff(np.append(starts, len(positions)))
    return Places(positions[starts], fragment_ids[starts], offsets[starts], lengths)


def _overlaps(firsts: NDArray[np.int64] | NDArray[np.uint64], lengths: Int64Array) -> bool:
    order = np.argsort(firsts, kind="stable")
    firsts, ends = firsts[order], (firsts + lengths.astype(firsts.dtype))[order]
    return bool((firsts[1:] < ends[:-1]).any())
