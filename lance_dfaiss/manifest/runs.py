"""Tables of runs: what is said about rows, in one line per stretch of rows instead of one per row."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any, Final, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from lance_dfaiss.errors import InvalidArgument
from lance_dfaiss.types import UInt64Array

from .validation import MAX_INTEGER, Fields, Parser, Place, constant, integer

__all__ = ["MAX_TABLE_BYTES", "RunTable", "RunTableJSON", "check_ranges", "run_table"]

MAX_TABLE_BYTES: Final = 1 << 30
"""Largest table that is read: 2**25 runs of four numbers, more than one shard can have use for, and
little enough that a forged document cannot exhaust a machine."""

_NUMBER_BYTES: Final = 8
_STORED: Final = np.dtype("<u8")


class RunTableJSON(TypedDict):
    """Stored form of a `RunTable`."""

    count: int
    width: int
    data: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class RunTable:
    """An immutable table of whole numbers; compares and hashes by value.

    Parameters
    ----------
    rows : numpy.ndarray
        uint64 ``(n, width)``, C order, read-only. Make tables with `RunTable.of`, which sees to that.

    Raises
    ------
    InvalidArgument
        If the array is none of that.
    """

    rows: UInt64Array

    def __post_init__(self) -> None:
        rows: Any = self.rows
        if (
            not isinstance(rows, np.ndarray)
            or rows.dtype != np.uint64
            or rows.ndim != 2
            or not rows.shape[1]
            or rows.flags.writeable
            or not rows.flags.c_contiguous
        ):
            raise _bad_table(rows, "a read-only uint64 array of shape (n, width) in C order", "Use RunTable.of(array)")

    @classmethod
    def of(cls, array: ArrayLike) -> RunTable:
        """Return a table holding a copy of the array.

        Parameters
        ----------
        array : array_like
            Whole numbers of at least 0, ``(n, width)``.

        Raises
        ------
        InvalidArgument
            If it has another shape or holds anything else.
        """
        given = np.asarray(array)
        if given.ndim != 2 or not given.shape[1] or given.dtype.kind not in "iu" or (given.size and given.min() < 0):
            raise _bad_table(given, "whole numbers of at least 0 in shape (n, width)", "")
        rows = np.array(given, dtype=np.uint64, order="C", copy=True)
        rows.flags.writeable = False
        return cls(rows=rows)

    @classmethod
    def empty(cls, width: int) -> RunTable:
        """Return a table of no runs."""
        return cls.of(np.zeros((0, width), dtype=np.uint64))

    @property
    def width(self) -> int:
        """Numbers per run."""
        return int(self.rows.shape[1])

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RunTable):
            return NotImplemented
        return self.rows.shape == other.rows.shape and bool((self.rows == other.rows).all())

    def __hash__(self) -> int:
        return hash((self.rows.shape, self.rows.tobytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        # An unpickled array is writeable: pass through `of` again.
        return RunTable.of, (self.rows,)

    def to_json(self) -> RunTableJSON:
        """Return the stored form: little-endian rows, deflated, in base64."""
        deflated = zlib.compress(self.rows.astype(_STORED, copy=False).tobytes())
        return {"count": len(self), "width": self.width, "data": base64.b64encode(deflated).decode("ascii")}


def run_table(width: int) -> Parser[RunTable]:
    """Make a parser of tables of a given width."""

    def parse(value: object, place: Place) -> RunTable:
        fields = Fields(value, place, shape=RunTableJSON)
        count = fields.get("count", integer)
        fields.get("width", constant(width))
        encoded = fields.get("data", _string)
        if not fields.clean:
            return RunTable.empty(width)
        size_bytes = count * width * _NUMBER_BYTES
        if size_bytes > MAX_TABLE_BYTES:
            place.at("count").report(f"a table of {size_bytes} bytes is over the limit of {MAX_TABLE_BYTES}")
            return RunTable.empty(width)
        raw = _inflate(encoded, size_bytes, place.at("data"))
        rows = np.frombuffer(raw, dtype=_STORED).astype(np.uint64, copy=False)
        rows.flags.writeable = False
        return RunTable(rows=rows.reshape(-1, width))

    return parse


def _string(value: object, place: Place) -> str:
    if isinstance(value, str):
        return value
    place.expected("a string", value)
    return ""


def _inflate(encoded: str, size_bytes: int, place: Place) -> bytes:
    inflater = zlib.decompressobj()
    try:
        deflated = base64.b64decode(encoded, validate=True)
        # One byte more than is right: enough to notice too much, however much more there is.
        raw = inflater.decompress(deflated, size_bytes + 1)
    except (ValueError, zlib.error) as exc:
        place.report(f"not deflated data in base64: {exc}")
        return b""
    if len(raw) > size_bytes:
        place.report(f"holds more than the {size_bytes} bytes that count and width say")
        return b""
    if len(raw) < size_bytes or not inflater.eof or inflater.unused_data:
        place.report(f"expected one complete stream of {size_bytes} bytes, found {len(raw)} bytes")
        return b""
    return raw


def check_ranges(first: UInt64Array, length: UInt64Array, place: Place, *, limit: int, what: str) -> None:
    """Report the first range that is empty, out of bounds, or not after the one before it.

    Parameters
    ----------
    first, length : numpy.ndarray
        uint64 ``(n,)``: the ranges, in the order in which they must lie.
    place : Place
        Of the table.
    limit : int
        All ranges lie in ``[0, limit)``.
    what : str
        Names what is counted, such as ``"positions"``.
    """
    bound = np.uint64(min(limit, MAX_INTEGER))
    # In this order uint64 cannot wrap: `bound - length` counts only where length <= bound.
    outside = np.flatnonzero((length == 0) | (length > bound) | (first > bound - length))
    if outside.size:
        at = int(outside[0])
        place.report(f"run {at} has {length[at]} {what} from {first[at]}: it must be non-empty and end by {limit}")
        return
    overlapping = np.flatnonzero(first[1:] < first[:-1] + length[:-1])
    if overlapping.size:
        at = int(overlapping[0]) + 1
        place.report(f"run {at} starts at {first[at]} of the {what}, before the run ahead of it has ended")


def _bad_table(value: Any, expected: str, remedy: str) -> InvalidArgument:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", type(value).__name__)
    return InvalidArgument(
        f"a run table holds {expected}, not {dtype} of shape {shape}", remedy=remedy, parameter="rows", value=shape
    )
