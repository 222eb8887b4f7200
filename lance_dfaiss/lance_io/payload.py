"""Columns of whole fragments in RAM, to answer with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InvalidArgument, StorageError
from ..manifest import FragmentSignature
from ..types import Int64Array, UInt64Array
from .failures import lance_errors
from .fields import OFFSET_MASK, arrow_field, lineage_of, signature_of
from .pinned import PinnedDataset

__all__ = ["Payload"]

# Rows are held in pieces of up to this many bytes: one take looks into few of them, while putting rows together takes
# no more memory than that, and text stays below the 2 GiB that Arrow's strings can address.
_PIECE_BYTES = 256 * 1024 * 1024

_BATCH_ROWS = 8_192
_IO_BUFFER_BYTES = 16 * 1024 * 1024

_TAKE = pc.TakeOptions(boundscheck=False)


class _Key(NamedTuple):
    """What tells that a column of a fragment holds the same values: equal keys, equal values."""

    fragment_id: int
    physical_rows: int
    files: tuple[tuple[int, FragmentSignature], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Column:
    """One column: the rows of many fragments, one after the other, in pieces.

    ``starts`` tells where a fragment begins. Rows of fragments that are gone may lie between, up to half of all.
    """

    pieces: tuple[pa.Array, ...]
    ends: Int64Array
    starts: Mapping[_Key, int]

    @classmethod
    def of(cls, pieces: Sequence[pa.Array], starts: Mapping[_Key, int]) -> _Column:
        joined: list[pa.Array] = []
        for piece in pieces:
            joined.append(piece)
            # As a row of ever smaller pieces: each row is copied a few times only, however many versions come.
            while len(joined) > 1 and joined[-2].nbytes <= 2 * joined[-1].nbytes and _fit(joined[-2:]):
                joined[-2:] = [_joined(joined[-2:])]
        ends = np.cumsum([len(piece) for piece in joined], dtype=np.int64)
        return cls(tuple(joined), ends, starts)

    def only(self, keys: Sequence[_Key]) -> _Column:
        """Return the column with some of its fragments, without the others once those are more than half."""
        starts = {key: self.starts[key] for key in keys if key in self.starts}
        rows = sum(key.physical_rows for key in starts)
        if not len(self.ends) or 2 * rows >= self.ends[-1]:
            return _Column(self.pieces, self.ends, starts)
        moved, first = {}, 0
        pieces: list[pa.Array] = []
        for key in sorted(starts, key=starts.__getitem__):
            moved[key] = first
            first += key.physical_rows
            pieces += self._slices(starts[key], key.physical_rows)
        return _Column.of([_joined(group) for group in _groups(pieces)], moved)

    def with_more(self, pieces: Sequence[pa.Array], starts: Mapping[_Key, int]) -> _Column:
        """Return the column with more rows; ``starts`` count from the first of those."""
        first = int(self.ends[-1]) if len(self.ends) else 0
        moved = {key: first + start for key, start in starts.items()}
        return _Column.of([*self.pieces, *pieces], {**self.starts, **moved})

    def take(self, rows: Int64Array) -> pa.Array:
        """Return some rows, in the order given."""
        if len(self.pieces) == 1:
            return _take(self.pieces[0], rows)
        which = np.searchsorted(self.ends, rows, side="right")
        order = np.argsort(which, kind="stable")
        numbers, firsts = np.unique(which[order], return_index=True)
        found = [
            _take(self.pieces[number], rows[some] - (self.ends[number] - len(self.pieces[number])))
            for number, some in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True)
        ]
        if len(found) == 1:
            return found[0]  # then the order is that of the rows
        back = np.empty(len(rows), dtype=np.int64)
        back[order] = np.arange(len(rows))
        return _take(_joined(found), back)

    def _slices(self, start: int, rows: int) -> Iterator[pa.Array]:
        piece = int(np.searchsorted(self.ends, start, side="right"))
        while rows:
            at = start - (int(self.ends[piece]) - len(self.pieces[piece]))
            part = self.pieces[piece].slice(at, rows)
            yield part
            start, rows, piece = start + len(part), rows - len(part), piece + 1


class Payload:
    """Columns of whole fragments of a dataset version in RAM; never changes, so threads share it.

    Rows that are deleted are held too, so that a version with more or fewer of them is served as well.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    columns : sequence of str
        At least one; a nested one by its dotted path.
    fragment_ids : sequence of int
        Fragments of that version.
    before : Payload, optional
        Of another version of the same dataset: columns of fragments whose files are the same are shared with it, and
        only others are read. Rows that only it needs stay in RAM for as long as they are less than half.

    Raises
    ------
    UnknownColumn
        If there is no such column.
    InvalidArgument
        If there is no such fragment, no column is named, or one is a blob column, whose values are not in its rows.
    StorageError
        If the dataset cannot be read.
    """

    def __init__(
        self,
        pinned: PinnedDataset,
        columns: Sequence[str],
        fragment_ids: Sequence[int],
        before: Payload | None = None,
    ) -> None:
        names = list(dict.fromkeys(columns))
        if not names:
            raise InvalidArgument("no column is named", parameter="columns", value=())
        for name in names:
            arrow_field(pinned.lance.schema, name)
        _refuse_blobs(pinned.lance.schema, names)
        with lance_errors(pinned.uri):
            self._schema: pa.Schema = pinned.lance.scanner(columns=names).projected_schema
        keys = _keys(pinned, names, sorted(set(fragment_ids)))
        held = {} if before is None else before._columns
        kinds = {} if before is None else dict(zip(before._schema.names, before._schema.types, strict=True))
        self._columns: dict[str, _Column] = {}
        missing: dict[str, tuple[int, ...]] = {}
        for field in self._schema:
            # Files that name no field prove nothing.
            wanted = [key for key in keys[field.name] if all(files.files for _, files in key.files)]
            known = held.get(field.name) if kinds.get(field.name) == field.type else None
            column = _Column.of([], {}) if known is None else known.only(wanted)
            self._columns[field.name] = column
            missing[field.name] = tuple(key.fragment_id for key in keys[field.name] if key not in column.starts)
        for fragments, group in groupby(sorted(names, key=missing.__getitem__), key=missing.__getitem__):
            if fragments:
                self._read(pinned, list(group), fragments, keys)
        self._index(keys)

    @property
    def schema(self) -> pa.Schema:
        """What `take` returns."""
        return self._schema

    @property
    def ram_bytes(self) -> int:
        """Bytes of all columns; some of them may be shared with another payload."""
        return sum(int(piece.nbytes) for column in self._columns.values() for piece in column.pieces)

    def take(self, addresses: UInt64Array) -> pa.Table:
        """Return rows, in the order given; one may be asked for more than once.

        Parameters
        ----------
        addresses : numpy.ndarray
            uint64 ``(n,)``: row addresses.

        Raises
        ------
        InvalidArgument
            If a row is not in these fragments.
        """
        if not len(addresses):
            return self._nothing
        fragment_ids = (addresses >> np.uint64(32)).astype(np.int64)
        offsets = (addresses & OFFSET_MASK).astype(np.int64)
        at = np.minimum(np.searchsorted(self._fragment_ids, fragment_ids), len(self._fragment_ids) - 1)
        known = (self._fragment_ids[at] == fragment_ids) & (offsets < self._physical_rows[at])
        if not known.all():
            address = int(addresses[~known][0])
            raise InvalidArgument(
                f"row {address >> 32}:{address & 0xFFFFFFFF} (fragment:offset) is not held in RAM",
                remedy="Fetch it from the dataset",
                parameter="addresses",
                value=address,
            )
        arrays: list[pa.Array] = []
        for starts, columns in self._together:
            rows = starts[at] + offsets
            arrays += [column.take(rows) for column in columns]
        return pa.Table.from_arrays([arrays[i] for i in self._order], schema=self._schema)

    def _index(self, keys: Mapping[str, Sequence[_Key]]) -> None:
        """Put the columns whose rows lie alike together, and prepare to find rows by fragment."""
        first = next(iter(keys.values()))
        # One more that is nobody's, so that there is something to look into where no fragment is held.
        self._fragment_ids = np.array([*(key.fragment_id for key in first), 2**62], dtype=np.int64)
        self._physical_rows = np.array([*(key.physical_rows for key in first), 0], dtype=np.int64)
        alike: dict[bytes, tuple[Int64Array, list[_Column], list[int]]] = {}
        for number, name in enumerate(self._schema.names):
            column = self._columns[name]
            starts = np.array([*(column.starts[key] for key in keys[name]), 0], dtype=np.int64)
            _, columns, numbers = alike.setdefault(starts.tobytes(), (starts, [], []))
            columns.append(column)
            numbers.append(number)
        self._together = [(starts, columns) for starts, columns, _ in alike.values()]
        self._order = np.argsort([number for *_, numbers in alike.values() for number in numbers]).tolist()
        empty = [pa.nulls(0, field.type) for field in self._schema]
        self._nothing = pa.Table.from_arrays(empty, schema=self._schema)

    def _read(
        self, pinned: PinnedDataset, names: list[str], fragment_ids: Sequence[int], keys: Mapping[str, Sequence[_Key]]
    ) -> None:
        pieces: dict[str, list[pa.Array]] = {name: [] for name in names}
        waiting: dict[str, list[pa.Array]] = {name: [] for name in names}
        sizes, rows = dict.fromkeys(names, 0), 0
        with lance_errors(pinned.uri):
            # Lance hands out deleted rows only with row ids, which tell them by a null.
            scanner = pinned.lance.scanner(
                columns=names,
                fragments=[cast("Any", pinned.lance.get_fragment(i)) for i in fragment_ids],
                with_row_id=True,
                include_deleted_rows=True,
                scan_in_order=True,
                batch_size=_BATCH_ROWS,
                io_buffer_size=_IO_BUFFER_BYTES,
            )
            with scanner.to_reader() as reader:
                for batch in reader:
                    rows += len(batch)
                    for name in names:
                        array = batch.column(name)
                        if waiting[name] and sizes[name] + array.nbytes > _PIECE_BYTES:
                            pieces[name].append(_joined(waiting[name]))
                            waiting[name], sizes[name] = [], 0
                        waiting[name].append(array)
                        sizes[name] += array.nbytes
        chosen = set(fragment_ids)
        for name in names:
            starts, expected = {}, 0
            for key in keys[name]:
                if key.fragment_id in chosen:
                    starts[key] = expected
                    expected += key.physical_rows
            if rows != expected:
                raise StorageError(
                    f"Lance returned {rows} of {expected} rows of {len(chosen)} fragments", location=pinned.uri
                )
            pieces[name] += [_joined(waiting[name])] if waiting[name] else []
            self._columns[name] = self._columns[name].with_more(pieces[name], starts)


def _keys(pinned: PinnedDataset, names: Sequence[str], fragment_ids: Sequence[int]) -> dict[str, list[_Key]]:
    """Return the key of each fragment, by column; in order of fragment."""
    metas = {int(f.fragment_id): f.metadata for f in pinned.lance.get_fragments()}
    unknown = [i for i in fragment_ids if i not in metas]
    if unknown:
        raise InvalidArgument(
            f"version {pinned.version} has no fragment {unknown[0]}", parameter="fragment_ids", value=unknown[0]
        )
    keys: dict[str, list[_Key]] = {}
    for name in names:
        leaves = [(leaf, lineage_of(pinned.lance, leaf)) for leaf in _leaf_ids(pinned, name)]
        keys[name] = [
            _Key(
                i,
                int(metas[i].physical_rows),
                tuple((leaf, signature_of(metas[i], lineage)) for leaf, lineage in leaves),
            )
            for i in fragment_ids
        ]
    return keys


def _leaf_ids(pinned: PinnedDataset, name: str) -> list[int]:
    """Return the ids of all fields that hold values of a column."""
    fields, found = pinned.lance.lance_schema.fields(), None
    for part in name.split("."):
        found = next(field for field in fields if field.name() == part)
        fields = found.children()
    leaves, waiting = [], [found]
    while waiting:
        field: Any = waiting.pop()
        if field.children():
            waiting += field.children()
        else:
            leaves.append(int(field.id()))
    return sorted(leaves)


def _refuse_blobs(schema: pa.Schema, names: Sequence[str]) -> None:
    for name in names:
        found: Any = schema
        waiting: list[pa.Field] = []
        for part in name.split("."):
            field = found.field(part)
            found = field.type
            waiting.append(field)
        while waiting:
            field = waiting.pop()
            kind = str(getattr(field.type, "extension_name", ""))
            if kind.startswith("lance.blob") or b"lance-encoding:blob" in (field.metadata or {}):
                raise InvalidArgument(
                    f"column {name!r} is a blob column, which is not held in RAM",
                    remedy="Leave it out, and read it from the dataset",
                    parameter="columns",
                    value=name,
                )
            waiting += [field.type.field(i) for i in range(field.type.num_fields)]


def _take(array: pa.Array, rows: Int64Array) -> pa.Array:
    return pc.call_function("array_take", [array, pa.array(rows)], _TAKE)


def _joined(arrays: Sequence[pa.Array]) -> pa.Array:
    """Return arrays as one, which holds nothing but their rows."""
    return pa.concat_arrays(arrays)


def _fit(arrays: Sequence[pa.Array]) -> bool:
    return sum(int(array.nbytes) for array in arrays) <= _PIECE_BYTES


def _groups(pieces: Sequence[pa.Array]) -> Iterator[list[pa.Array]]:
    """Return neighbours in groups that fit into one piece."""
    group: list[pa.Array] = []
    size = 0
    for piece in pieces:
        if group and size + piece.nbytes > _PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.nbytes
    if group:
        yield group
