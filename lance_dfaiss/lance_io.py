"""Everything the package asks of a Lance dataset; the only importer of lance beside `plugin`.

Reading is bounded: vectors stream in scanner batches of at most 4,096 rows with little read-ahead,
samples come in blocks of neighbouring rows, never as scattered single ones.
"""

from __future__ import annotations

import itertools
import os
import re
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import lance
import numpy as np
import pyarrow as pa
from lance import LanceDataset
from lance.dataset import serialize_row_addrs

from .errors import (
    CommitConflict,
    DfaissError,
    InsufficientData,
    InvalidArgument,
    InvalidFilter,
    ReadOnlyStorage,
    StorageError,
    UnknownColumn,
    UnsupportedColumn,
)
from .manifest import FragmentSignature, Pointer
from .plan import FragmentState, RewriteGroup
from .storage import FolderSession, LocalStore, SessionStore, Store
from .types import POINTER_PREFIX, ROW_ID_COLUMN, SIDECAR, Float32Array, Int64Array, Metric, UInt64Array
from .vectors import VectorType, decode_vectors, vector_type

__all__ = [
    "Block",
    "DatasetHistory",
    "LanceDataset",
    "PinnedDataset",
    "Sample",
    "VectorColumn",
    "VersionMetadata",
    "move_to_latest",
    "open_dataset",
]

# Scanner batches: smaller ones cost throughput, larger ones memory (measured with pylance 14).
_MIN_BATCH_ROWS, _MAX_BATCH_ROWS = 1_024, 4_096
_BATCH_BYTES = 4 * 1024 * 1024

# What a filter reads is narrow, and a batch costs as much as some thousand rows: 2.4 ms a million rows instead of 4.5
# with Lance's 8,192 rows and 16 batches ahead, which hold as many rows at a time.
_FILTER_BATCH_ROWS = 32_768
_FILTER_READAHEAD = 4

# Bytes the scanner may read ahead; its own default grows without bound behind a slow consumer.
_IO_BUFFER_BYTES = 16 * 1024 * 1024

# A sample block is about one object-store request's worth of neighbouring rows.
_SAMPLE_BLOCK_BYTES = 64 * 1024
_MIN_SAMPLE_ROWS, _MAX_SAMPLE_ROWS = 64, 512

# Rows asked for in one take while sampling.
_TAKE_ROWS = 16_384

# Fragments whose live rows are asked for in one scan: each scan of its own costs about a quarter of a millisecond.
_SCANNED_FRAGMENTS = 1_000

# Times a commit is tried when others commit something else at the same time.
_COMMIT_ATTEMPTS = 5

# How Lance and the object stores behind it say that one may not write; paths may hold the same words or digits.
_REFUSED = re.compile(r"(?i:permission ?denied|access ?denied|read-only)|\bForbidden\b|(?<![\w/.-])403(?![\w/.-])")

# Versions read at the same time: each is a small file, far away on an object store.
_VERSION_READERS = 8

_ADDRESS_COLUMN = "_rowaddr"
_UPDATED_COLUMN = "_row_last_updated_at_version"
_OFFSET_MASK = np.uint64(0xFFFFFFFF)

# Lance ends its messages with the places in its own source.
_LANCE_SOURCE = re.compile(r"(?:, /\S+\.rs:\d+:\d+)+$")

# Rows of a file of columns held in RAM: with whole files, a row's number follows from its address.
_HELD_ROWS = 1 << 24

# Names that mean another thing in a copy of the columns.
_SYSTEM_COLUMN = re.compile(r"\b_row", re.IGNORECASE)

# How Lance's messages begin where it could not read; it raises one class for that and for a filter that is wrong.
_UNREADABLE = re.compile(r"(?:External error: )*(?:Not found:|LanceError\(IO\)|Encountered corrupt file|Object at)")
_UNKNOWN_FIELD = re.compile(r"No field named (\S+?)\. ")


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorColumn:
    """A vector column of one dataset version.

    Parameters
    ----------
    name : str
        Dotted path.
    field_id : int
        Id of its leaf field; changes when the column is cast or written anew.
    type : VectorType
        What it holds.
    dim : int
        Dimension of every vector.
    """

    name: str
    field_id: int
    type: VectorType
    dim: int

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one vector in the dataset."""
        return self.type.value_bytes * self.dim


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionMetadata:
    """Table metadata of one version of a dataset.

    Parameters
    ----------
    branch : str or None
        None for the main one.
    version : int
        Its number.
    metadata : mapping
        By key.
    newest : bool
        Whether it is the branch's newest version.
    """

    branch: str | None
    version: int
    metadata: Mapping[str, str]
    newest: bool


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Decoded live rows of one fragment, in physical order.

    Parameters
    ----------
    fragment_id : int
        Fragment they come from.
    offsets : numpy.ndarray
        int64 ``(n,)`` physical offsets of the usable rows.
    vectors : numpy.ndarray
        float32 ``(n, dim)``, perhaps a read-only view of the scanner's memory.
    row_offsets, row_ids : numpy.ndarray
        int64 and uint64 ``(live,)``: offset and row id of every live row, usable or not.
    null, non_finite, zero : int
        Live rows left out, by reason.
    bad_row_ids : numpy.ndarray
        uint64: row ids of those.
    updated : numpy.ndarray or None
        uint64 ``(live,)``: the version that last wrote every live row; None without stable row ids.
    """

    fragment_id: int
    offsets: Int64Array
    vectors: Float32Array
    row_offsets: Int64Array
    row_ids: UInt64Array
    null: int
    non_finite: int
    zero: int
    bad_row_ids: UInt64Array
    updated: UInt64Array | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Usable rows drawn from all fragments.

    Parameters
    ----------
    vectors : numpy.ndarray
        float32 ``(n, dim)``.
    fragment_ids, offsets : numpy.ndarray
        int64 ``(n,)``: where each comes from.
    drawn_rows : int
        Rows drawn, unusable ones included.
    """

    vectors: Float32Array
    fragment_ids: Int64Array
    offsets: Int64Array
    drawn_rows: int


def open_dataset(
    dataset: str | os.PathLike[str] | LanceDataset,
    *,
    storage_options: Mapping[str, str] | None = None,
    block_size: int | None = None,
) -> LanceDataset:
    """Return a dataset given as itself, or by path or URI.

    Raises
    ------
    InvalidArgument
        If there is no dataset there, or the argument is neither.
    """
    if isinstance(dataset, LanceDataset):
        return dataset
    if not isinstance(dataset, (str, os.PathLike)):
        raise InvalidArgument(
            f"dataset must be a LanceDataset, a path or a URI, not {type(dataset).__name__}",
            parameter="dataset",
            value=type(dataset).__name__,
        )
    uri = os.fspath(dataset)
    try:
        return lance.dataset(
            uri, storage_options=None if storage_options is None else dict(storage_options), block_size=block_size
        )
    except ValueError as exc:
        raise InvalidArgument(
            f"cannot open a Lance dataset at {uri!r}: {_first_line(exc)}",
            remedy="Check the path, and storage_options for an object store",
            parameter="dataset",
            value=uri,
        ) from exc


def move_to_latest(dataset: LanceDataset) -> None:
    """Move a handle to the newest version of its branch, in place."""
    cast("Any", dataset).checkout_latest()


class PinnedDataset:
    """One version of one dataset; every answer is about that version.

    Parameters
    ----------
    dataset : lance.LanceDataset
        Handle; copied, so that the caller's may move on.
    """

    def __init__(self, dataset: LanceDataset) -> None:
        self._dataset = dataset.checkout_version(dataset.version)
        # The caller's defaults (columns, a filter, a limit) are for the caller's scans, not for ours.
        cast("Any", self._dataset)._default_scan_options = None
        self.version: int = dataset.version
        self.uri: str = dataset.uri
        self.stable_row_ids: bool = dataset.has_stable_row_ids
        self.root: str = _main_root(dataset)

    @property
    def lance(self) -> LanceDataset:
        """The pinned handle."""
        return self._dataset

    @property
    def metadata(self) -> Mapping[str, str]:
        """Table metadata of this version."""
        return cast("Mapping[str, str]", self._dataset.metadata)

    def vector_column(self, name: str) -> VectorColumn:
        """Look up a vector column.

        Raises
        ------
        UnknownColumn
            If the dataset has no such column; names those it has.
        UnsupportedColumn
            If it is not a vector column.
        InsufficientData
            If it holds lists and not one row tells their length.
        """
        arrow_field = _arrow_field(self._dataset.schema, name)
        kind = vector_type(name, arrow_field)
        dim = kind.dim if kind.dim is not None else self._list_length(name)
        if dim < 1:
            raise UnsupportedColumn(
                f"column {name!r} has type {arrow_field}: expected vectors of at least 1 element, found {dim}",
                remedy="Index a column whose vectors hold something",
                parameter="column",
                value=name,
            )
        return VectorColumn(name=name, field_id=_leaf_id(self._dataset, name), type=kind, dim=dim)

    def fragments(self, column: VectorColumn) -> list[FragmentState]:
        """Return the state of every fragment, in the dataset's order."""
        with _lance_errors(self.uri):
            lineage = _lineage(self._dataset, column.field_id)
            return [self._state(fragment.metadata, column, lineage) for fragment in self._dataset.get_fragments()]

    def live_offsets(self, fragment_id: int) -> Int64Array:
        """Return the physical offsets of a fragment's live rows, int64 ``(live,)``, increasing."""
        return self.live_offsets_of([fragment_id])[fragment_id]

    def live_offsets_of(self, fragment_ids: Sequence[int]) -> dict[int, Int64Array]:
        """Return the live offsets of some fragments by id, read together; see `live_offsets`."""
        found = {fragment_id: np.zeros(0, dtype=np.int64) for fragment_id in fragment_ids}
        with _lance_errors(self.uri):
            for start in range(0, len(fragment_ids), _SCANNED_FRAGMENTS):
                fragments = [self._fragment(i) for i in fragment_ids[start : start + _SCANNED_FRAGMENTS]]
                scanner = self._dataset.scanner(
                    columns=[], with_row_address=True, fragments=fragments, scan_in_order=True
                )
                addresses = scanner.to_table()[_ADDRESS_COLUMN].to_numpy()
                # In order, normally; looking is a tenth of sorting.
                if (addresses[1:] < addresses[:-1]).any():
                    addresses = np.sort(addresses)
                places = (addresses >> np.uint64(32)).astype(np.int64)
                starts = np.append(np.zeros(1, np.int64), np.flatnonzero(np.diff(places)) + 1)
                offsets = (addresses & _OFFSET_MASK).astype(np.int64)
                for first, part in zip(starts.tolist(), np.split(offsets, starts[1:]), strict=True):
                    if len(part):
                        found[int(places[first])] = part
        return found

    @property
    def committed_at(self) -> datetime:
        """When this version was committed; numbers alone repeat on a branch that is made again."""
        return cast("datetime", cast("Any", self._dataset).get_version()["timestamp"])

    def find_column(self, name: str, field_id: int) -> VectorColumn:
        """Look up the column that an index was built over, also after it was renamed or cast.

        Parameters
        ----------
        name : str
            Name when the index was built.
        field_id : int
            Its leaf field then; renaming keeps it, casting gives a new one.

        Raises
        ------
        UnknownColumn, UnsupportedColumn, InsufficientData
            As `vector_column` does.
        """
        try:
            # The name first: an overwrite deals field ids anew, so the old one may be another column's.
            return self.vector_column(name)
        except (UnknownColumn, UnsupportedColumn):
            path = _field_path(self._dataset, field_id)
            if path is None or path == name:
                raise
            return self.vector_column(path)

    def history(self, column: VectorColumn) -> DatasetHistory:
        """Return what is still known of the versions before this one."""
        return DatasetHistory(self, column)

    def matching(self, filter_sql: str, fragment_ids: Sequence[int] | None = None) -> UInt64Array:
        """Return the addresses of the live rows that a filter matches, uint64 ``(n,)``, in storage order.

        Parameters
        ----------
        filter_sql : str
            Lance's SQL.
        fragment_ids : sequence of int, optional
            Where to look; everywhere by default.

        Raises
        ------
        InvalidFilter
            With Lance's message, if it cannot be parsed or computed.
        UnknownColumn
            If it names a column that does not exist.
        """
        fragments = None if fragment_ids is None else [self._fragment(i) for i in fragment_ids]
        return _matching(self._dataset, filter_sql, fragments, self.uri)

    def row_versions(self, fragment_ids: Sequence[int]) -> tuple[UInt64Array, UInt64Array, UInt64Array]:
        """Return row id, address and last version of every live row of some fragments, uint64 ``(n,)`` each.

        Only with stable row ids.
        """
        with _lance_errors(self.uri):
            table = self._dataset.scanner(
                columns=[_UPDATED_COLUMN],
                with_row_id=True,
                with_row_address=True,
                fragments=[self._fragment(i) for i in fragment_ids],
                scan_in_order=True,
            ).to_table()
        names = (ROW_ID_COLUMN, _ADDRESS_COLUMN, _UPDATED_COLUMN)
        return cast("tuple[UInt64Array, UInt64Array, UInt64Array]", tuple(table[name].to_numpy() for name in names))

    def rows(
        self, column: VectorColumn, fragment_id: int, offsets: Int64Array | None, metric: Metric
    ) -> Generator[Block, None, None]:
        """Stream some live rows of one fragment, decoded; see `blocks`.

        Parameters
        ----------
        column : VectorColumn
            What to read.
        fragment_id : int
            Fragment of this version.
        offsets : numpy.ndarray or None
            int64, physical, increasing; None for every live row.
        metric : str
            Under cosine zero vectors are left out.
        """
        for block in self.blocks(column, [fragment_id], metric):
            if offsets is None:
                yield block
            else:
                yield from _only(block, offsets)

    def blocks(self, column: VectorColumn, fragment_ids: Sequence[int], metric: Metric) -> Generator[Block, None, None]:
        """Stream the rows of some fragments in the given order, decoded.

        Parameters
        ----------
        column : VectorColumn
            What to read.
        fragment_ids : sequence of int
            Fragments, all of this version.
        metric : str
            Under cosine zero vectors are left out.

        Yields
        ------
        Block
            At most 4,096 rows of one fragment.

        Raises
        ------
        InvalidVectors
            If rows of a list column differ in length.
        """
        rows = _BATCH_BYTES // max(column.stored_row_bytes, 1)
        with _lance_errors(self.uri):
            scanner = self._dataset.scanner(
                columns=[column.name, *([_UPDATED_COLUMN] if self.stable_row_ids else [])],
                fragments=[self._fragment(i) for i in fragment_ids],
                with_row_address=True,
                with_row_id=self.stable_row_ids,
                scan_in_order=True,
                batch_size=min(max(rows, _MIN_BATCH_ROWS), _MAX_BATCH_ROWS),
                io_buffer_size=_IO_BUFFER_BYTES,
                batch_readahead=2,
                fragment_readahead=1,
            )
            # Closed by hand: a scan that is given up half-way would go on reading ahead behind our back.
            with scanner.to_reader() as reader:
                for batch in reader:
                    yield from _decode_batch(batch, column, metric)

    def sample(self, column: VectorColumn, rows: int, metric: Metric, seed: int) -> Sample:
        """Draw usable rows in random blocks of neighbours over all fragments, sorted by place.

        Parameters
        ----------
        column : VectorColumn
            What to read.
        rows : int
            Rows to draw; all of them when the dataset has no more.
        metric : str
            Under cosine zero vectors are dropped.
        seed : int
            Decides the blocks.
        """
        states = self.fragments(column)
        total = sum(state.live_rows for state in states)
        chosen = _sample_rows(total, rows, column.stored_row_bytes, seed)
        vectors = np.empty((len(chosen), column.dim), dtype=np.float32)
        usable = np.zeros(len(chosen), dtype=bool)
        filled = 0
        for start in range(0, len(chosen), _TAKE_ROWS):
            rows_now = chosen[start : start + _TAKE_ROWS]
            decoded = decode_vectors(self._take(column, rows_now), column.dim, metric, column=column.name)
            good = decoded.usable
            count = int(good.sum())
            usable[start : start + len(rows_now)] = good
            vectors[filled : filled + count] = decoded.values if count == len(good) else decoded.values[good]
            filled += count
        fragment_ids, offsets = self._places(states, chosen[usable])
        return Sample(vectors[:filled], fragment_ids, offsets, len(chosen))

    def fetch(self, row_ids: UInt64Array, columns: Sequence[str] | Mapping[str, str] | None) -> pa.Table:
        """Read rows by row id, in the order given, duplicates included.

        Parameters
        ----------
        row_ids : numpy.ndarray
            uint64 ``(n,)``, all live.
        columns : sequence of str or mapping or None
            As Lance's scanner takes them; None for all.

        Raises
        ------
        StorageError
            If Lance returns no row for one of the ids.
        UnknownColumn
            If a column does not exist.
        """
        unique, inverse = np.unique(row_ids, return_inverse=True)
        wanted = dict(columns) if isinstance(columns, Mapping) else None if columns is None else list(columns)
        try:
            table = self._dataset.scanner(
                columns=wanted, with_row_id=True, row_addr_allowlist=serialize_row_addrs(unique.tolist())
            ).to_table()
        except (ValueError, OSError) as exc:
            raise self._column_error(wanted, exc) from exc
        found = table[ROW_ID_COLUMN].to_numpy()
        if len(found) != len(unique):
            raise StorageError(
                f"Lance returned {len(found)} of {len(unique)} rows asked for by id",
                remedy="Open the index again: the dataset version it was opened at may have been removed",
                location=self.uri,
            )
        order = np.argsort(found, kind="stable")
        return table.take(pa.array(order[inverse]))

    def session_store(self) -> Store:
        """Return the store of the dataset's own ``_dfaiss`` folder, in the main root also for branches."""
        local = _local_path(self.root)
        if local is not None:
            return LocalStore(local / SIDECAR)
        dataset = self._dataset
        if self.root != dataset.uri:
            dataset = lance.dataset(self.root, storage_options=dataset.latest_storage_options())
        return SessionStore(FolderSession(cast("Any", dataset).new_file_session(), SIDECAR), f"{self.root}/{SIDECAR}")

    def commit_pointer(self, name: str, expected: str | None, value: str | None, *, ours: str) -> None:
        """Set or delete the pointer of an index, if it is still what the caller saw.

        Moves the dataset to a new version; other handles are not touched.

        Parameters
        ----------
        name : str
            Index name.
        expected, value : str or None
            Text of the pointer before and after; None for no pointer.
        ours : str
            Generation of the caller, for messages.

        Raises
        ------
        CommitConflict
            If the pointer is another one by now.
        ReadOnlyStorage
            If the dataset cannot be written.
        StorageError
            If the commit failed otherwise.
        """
        key = POINTER_PREFIX + name
        for attempt in range(1, _COMMIT_ATTEMPTS + 1):
            # A fresh handle: the compare-and-set needs the transactions since the version it read.
            fresh = self._fresh()
            found = fresh.metadata.get(key)
            if found != expected:
                raise _conflict(name, ours, found)
            try:
                fresh.update_metadata({key: value})
            except (OSError, RuntimeError, ValueError) as exc:
                # The message does not tell who was faster, and at what: the pointer does.
                found = self._fresh().metadata.get(key)
                if found is not None and found == value:
                    return  # committed, and only the answer was lost
                if found != expected:
                    raise _conflict(name, ours, found) from exc
                if isinstance(exc, PermissionError) or _REFUSED.search(str(exc)):
                    raise ReadOnlyStorage(
                        f"cannot write to the dataset at {self.uri}: {_first_line(exc)}",
                        remedy="Pass index_uri=... naming a place that can be written",
                        location=self.uri,
                    ) from exc
                said = str(exc).lower()
                if attempt == _COMMIT_ATTEMPTS or not ("conflict" in said or "incompatible transaction" in said):
                    raise StorageError(
                        f"Lance could not commit the index to {self.uri}: {_first_line(exc)}",
                        remedy="Run again with resume=True",
                        location=self.uri,
                    ) from exc
            else:
                return

    def latest(self) -> PinnedDataset:
        """Pin the newest version."""
        return PinnedDataset(self._fresh())

    def check_writable(self) -> None:
        """Fail early if the dataset itself cannot be committed to.

        Raises
        ------
        ReadOnlyStorage
            If its folder cannot be written.
        """
        local = _local_path(self.root)
        if local is not None:
            LocalStore(local / "_versions").check_writable()

    def _fresh(self) -> LanceDataset:
        with _lance_errors(self.uri):
            fresh = self._dataset.checkout_version(self.version)
            move_to_latest(fresh)
        return fresh

    def _state(self, meta: Any, column: VectorColumn, lineage: Sequence[int]) -> FragmentState:
        signature = _signature(meta, lineage)
        if not signature.files and meta.physical_rows and self._holds_values(int(meta.id), column):
            raise UnsupportedColumn(
                f"fragment {meta.id} of {self.uri} holds values of column {column.name!r} in no file that names its"
                f" field {column.field_id}: a change of them could not be noticed",
                remedy="Write the column anew, or index another one",
                parameter="column",
                value=column.name,
            )
        return _fragment_state(meta, signature)

    def _holds_values(self, fragment_id: int, column: VectorColumn) -> bool:
        """Tell whether a fragment has a vector; without a file it has none, as after an append without the column."""
        scanner = self._dataset.scanner(columns=[column.name], fragments=[self._fragment(fragment_id)])
        with scanner.to_reader() as reader:
            return any(batch.column(0).null_count < len(batch) for batch in reader)

    def _fragment(self, fragment_id: int) -> Any:
        return self._dataset.get_fragment(fragment_id)

    def _take(self, column: VectorColumn, rows: Int64Array) -> pa.Array:
        with _lance_errors(self.uri):
            table = self._dataset.take(rows, columns=[column.name])
        array = table.column(0).combine_chunks()
        for part in column.name.split(".")[1:] if pa.types.is_struct(array.type) else []:
            array = _struct_child(array, part)
        return array

    def _places(self, states: Sequence[FragmentState], rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return fragment id and physical offset of live row numbers (counted over all fragments)."""
        firsts = np.cumsum([0] + [state.live_rows for state in states])
        which = np.searchsorted(firsts, rows, side="right") - 1
        offsets = rows - firsts[which]
        for index in np.unique(which):
            if states[index].deleted_rows:
                mine = which == index
                offsets[mine] = self.live_offsets(states[index].fragment_id)[offsets[mine]]
        ids = np.array([state.fragment_id for state in states], dtype=np.int64)
        return ids[which] if len(rows) else np.zeros(0, dtype=np.int64), offsets

    def _list_length(self, name: str) -> int:
        # No filter: a name that is no SQL identifier would have to be quoted in one.
        with _lance_errors(self.uri):
            scanner = self._dataset.scanner(columns=[name], batch_size=_MIN_BATCH_ROWS, io_buffer_size=_IO_BUFFER_BYTES)
            for batch in scanner.to_batches():
                lengths = np.asarray(batch.column(0).value_lengths().fill_null(0))
                if lengths.any():
                    return int(lengths[lengths > 0][0])
        raise InsufficientData(
            f"column {name!r} holds no vector to tell the dimension by",
            remedy="Write vectors first, or use a FixedSizeList column",
            rows=0,
            needed=1,
        )

    def _column_error(self, wanted: Any, exc: Exception) -> Exception:
        names = list(wanted) if wanted is not None and not isinstance(wanted, dict) else []
        for name in names:
            if name not in self._dataset.schema.names and "." not in name:
                return UnknownColumn(
                    f"the dataset has no column {name!r}",
                    remedy=f"It has {', '.join(self._dataset.schema.names)}",
                    column=name,
                    available=tuple(self._dataset.schema.names),
                )
        return StorageError(f"Lance could not read the rows: {_first_line(exc)}", location=self.uri)

    def every_version(self) -> list[VersionMetadata]:
        """Read the table metadata of every version that still exists, of all branches and tags.

        Versions come and go meanwhile: what is listed afterwards and was not yet read is read too, so that no
        version is overlooked that another one was made from (a branch, a restored version) before it went.

        Raises
        ------
        StorageError
            If one cannot be read, though it is there.
        """
        read: dict[tuple[str | None, int], VersionMetadata | None] = {}
        with _lance_errors(self.uri):
            while True:
                heads, places = self._version_places()
                missing = [place for place in places if place not in read]
                if not missing:
                    break
                with ThreadPoolExecutor(_VERSION_READERS, thread_name_prefix="lance-dfaiss-versions") as pool:
                    read.update(zip(missing, pool.map(self._metadata_at, missing), strict=True))
        lost = [version for branch, version in places if read[branch, version] is None and branch in heads]
        if lost:
            raise StorageError(
                f"{self.uri} lists version {lost[0]}, but it cannot be found",
                remedy="Check that the dataset is complete",
                location=self.uri,
            )
        found = [version for version in read.values() if version is not None]
        return [replace(version, newest=heads.get(version.branch) == version.version) for version in found]

    def _version_places(self) -> tuple[dict[str | None, int], list[tuple[str | None, int]]]:
        """Return the newest version of each branch, and branch and number of all versions."""
        heads: dict[str | None, int] = {}
        places: dict[tuple[str | None, int], None] = {}
        tags = cast("Any", self._dataset).tags.list()
        for branch in (None, *cast("Any", self._dataset).branches.list()):
            head = self._at(branch, None)
            if head is not None:
                heads[branch] = head.version
                places.update(((branch, int(entry["version"])), None) for entry in head.versions())
        # Lance keeps what a tag names, so these are listed already; should it ever not, they count all the same.
        places.update(((tag["branch"], int(tag["version"])), None) for tag in tags.values())
        return heads, list(places)

    def _metadata_at(self, place: tuple[str | None, int]) -> VersionMetadata | None:
        found = self._at(*place)
        if found is None:
            return None
        return VersionMetadata(
            branch=place[0], version=place[1], metadata=cast("Mapping[str, str]", found.metadata), newest=False
        )

    def _at(self, branch: str | None, version: int | None) -> LanceDataset | None:
        """Return a handle at a version of a branch (None: main, the newest), or None if it went meanwhile."""
        try:
            return cast("LanceDataset", cast("Any", self._dataset).checkout_version((branch, version)))
        except (OSError, ValueError) as exc:
            # Lance has no class of its own for this either.
            if "not found" in str(exc).lower():
                return None
            raise


# pylance 14 cannot read back the transaction of a compaction that also moved an index: its native side fills in two
# of this record's five fields, and Python refuses. With defaults for the rest, which are not needed here, it can.
_REWRITTEN_INDEX = cast("Any", lance.LanceOperation.RewrittenIndex)
if _REWRITTEN_INDEX.__init__.__defaults__ is None:
    _REWRITTEN_INDEX.__init__.__defaults__ = ("", b"", 0)


class DatasetHistory:
    """What is still known of the versions of a dataset; each version is opened once.

    Parameters
    ----------
    pinned : PinnedDataset
        The newest version to look at.
    column : VectorColumn
        Whose files tell whether a fragment is the same.
    """

    def __init__(self, pinned: PinnedDataset, column: VectorColumn) -> None:
        self._pinned = pinned
        self._column = column
        self._versions: dict[int, PinnedDataset | None] = {pinned.version: pinned}
        self._fragment_ids: dict[int, frozenset[int]] = {}
        self.reads = 0
        """Versions opened so far."""

    def fragment_ids(self, version: int) -> frozenset[int] | None:
        """Return the fragments of a version; None if it was removed."""
        pinned = self._at(version)
        if pinned is None:
            return None
        if version not in self._fragment_ids:
            self._fragment_ids[version] = frozenset(f.fragment_id for f in pinned.lance.get_fragments())
        return self._fragment_ids[version]

    def rewritten(self, version: int) -> list[RewriteGroup] | None:
        """Return what the compaction that made a version did.

        Nothing, where another operation made it; None where that is not known, or brought back another version.
        """
        try:
            transaction = self._pinned.lance.read_transaction(version)
        except (OSError, ValueError, TypeError):
            return None  # removed with its version, or Lance cannot read what it wrote
        operation = None if transaction is None else transaction.operation
        # What Lance's Python does not name comes as the base class.
        if type(operation) in (type(None), lance.LanceOperation.Restore, lance.LanceOperation.BaseOperation):
            return None
        if not isinstance(operation, lance.LanceOperation.Rewrite):
            return []
        lineage = _lineage(self._pinned.lance, self._column.field_id)

        def states(metas: Iterable[Any]) -> tuple[FragmentState, ...]:
            return tuple(_fragment_state(meta, _signature(meta, lineage)) for meta in metas)

        return [
            RewriteGroup(old=states(group.old_fragments), new=states(group.new_fragments)) for group in operation.groups
        ]

    def live_offsets(self, version: int, fragment_id: int) -> Int64Array | None:
        """Return the offsets of the live rows of a fragment in a version, increasing; None if it was removed."""
        pinned = self._at(version)
        return None if pinned is None else pinned.live_offsets(fragment_id)

    def _at(self, version: int) -> PinnedDataset | None:
        if version not in self._versions:
            self.reads += 1
            try:
                self._versions[version] = PinnedDataset(self._pinned.lance.checkout_version(version))
            except (OSError, ValueError):
                self._versions[version] = None  # Lance raises either for a version that is not there
        return self._versions[version]


class ColumnsInMemory:
    """Some columns of a dataset version in RAM, to filter by without reading the dataset.

    Deleted rows are held too, so that a version with more or fewer of them is served as well.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    columns : sequence of str
        Columns to keep; of a nested one the whole struct is kept.

    Raises
    ------
    UnknownColumn
        If there is no such column.
    """

    def __init__(self, pinned: PinnedDataset, columns: Sequence[str]) -> None:
        for name in columns:
            _arrow_field(pinned.lance.schema, name)
        self._hold(pinned, list(dict.fromkeys(name.split(".")[0] for name in columns)))

    def _hold(self, pinned: PinnedDataset, wanted: list[str]) -> None:
        self._wanted = wanted
        self._state = _state_of(pinned)
        self._held: LanceDataset | None = None
        self._addresses: UInt64Array = np.zeros(0, dtype=np.uint64)
        self.ram_bytes = 0
        """Bytes of the columns and of the rows' addresses."""
        # Lance looks a name up without regard to case where none is spelled that way: hold all it could mean.
        spelled = {name.lower() for name in wanted}
        columns = [name for name in pinned.lance.schema.names if name.lower() in spelled]
        if not columns:
            return
        with _lance_errors(pinned.uri):
            # Lance hands out deleted rows only with row ids, which tell them by a null; all rows come in order.
            table = pinned.lance.scanner(
                columns=columns, with_row_id=True, include_deleted_rows=True, scan_in_order=True
            ).to_table()
            kept = table.select(columns)
            self._held = lance.write_dataset(kept, f"memory://{uuid.uuid4().hex}", max_rows_per_file=_HELD_ROWS)
        fragments = [(f.fragment_id, f.metadata.physical_rows) for f in pinned.lance.get_fragments()]
        ranges = [np.arange(i << 32, (i << 32) + rows, dtype=np.uint64) for i, rows in fragments]
        self._addresses = np.concatenate([self._addresses, *ranges])
        self.ram_bytes = int(kept.nbytes + self._addresses.nbytes)

    def at(self, pinned: PinnedDataset) -> ColumnsInMemory:
        """Return the columns at another version, as far as it has them; themselves, if nothing was written there."""
        if _state_of(pinned) == self._state:
            return self
        moved = ColumnsInMemory.__new__(ColumnsInMemory)
        moved._hold(pinned, self._wanted)
        return moved

    def matching(self, filter_sql: str) -> UInt64Array | None:
        """Return the addresses of rows that a filter matches, deleted ones among them, uint64 ``(n,)``.

        Parameters
        ----------
        filter_sql : str
            Lance's SQL.

        Returns
        -------
        numpy.ndarray or None
            None if the filter asks for more than is here.
        """
        if self._held is None or _SYSTEM_COLUMN.search(filter_sql):
            return None
        try:
            rows = _matching(self._held, filter_sql, None, "memory")
        except (InvalidFilter, UnknownColumn):
            return None  # of another column, or wrong: the dataset itself will say
        numbers = (rows >> np.uint64(32)) * np.uint64(_HELD_ROWS) + (rows & _OFFSET_MASK)
        return cast("UInt64Array", self._addresses[numbers])


def _state_of(pinned: PinnedDataset) -> tuple[dict[tuple[str, ...], int], list[dict[str, Any]]]:
    """Return the fields and the fragments without their deletions: equal ones hold equal values under equal names."""
    fields: dict[tuple[str, ...], int] = {}
    waiting: list[tuple[tuple[str, ...], Any]] = [
        ((field.name(),), field) for field in pinned.lance.lance_schema.fields()
    ]
    while waiting:
        path, field = waiting.pop()
        fields[path] = int(field.id())
        waiting += [((*path, child.name()), child) for child in field.children()]
    fragments = [fragment.metadata.to_json() for fragment in pinned.lance.get_fragments()]
    for fragment in fragments:
        del fragment["deletion_file"]
    return fields, cast("list[dict[str, Any]]", fragments)


def _matching(dataset: LanceDataset, filter_sql: str, fragments: list[Any] | None, uri: str) -> UInt64Array:
    try:
        table = dataset.scanner(
            columns=[],
            with_row_address=True,
            filter=filter_sql,
            fragments=fragments,
            scan_in_order=True,
            batch_size=_FILTER_BATCH_ROWS,
            batch_readahead=_FILTER_READAHEAD,
        ).to_table()
    except ValueError as exc:
        said = _LANCE_SOURCE.sub("", str(exc).strip())
        if _UNREADABLE.match(said):
            raise StorageError(f"Lance could not read {uri}: {said}", location=uri) from exc
        unknown = _UNKNOWN_FIELD.search(said)
        if unknown:
            names = tuple(dataset.schema.names)
            raise UnknownColumn(
                f"the filter {filter_sql!r} names a column that the dataset does not have: {said}",
                remedy=f"It has {', '.join(names)}",
                column=unknown[1].strip('"'),
                available=names,
            ) from exc
        raise InvalidFilter(
            f"Lance cannot use the filter {filter_sql!r}: {said}", parameter="filter", value=filter_sql
        ) from exc
    except (OSError, RuntimeError) as exc:
        raise StorageError(f"Lance could not read {uri}: {_first_line(exc)}", location=uri) from exc
    return cast("UInt64Array", table[_ADDRESS_COLUMN].to_numpy())


def _only(block: Block, offsets: Int64Array) -> Iterator[Block]:
    """Return a block without the rows that are not asked for; nothing if none is left."""
    rows = np.isin(block.row_offsets, offsets)
    if not rows.any():
        return
    kept = np.isin(block.offsets, offsets)
    yield Block(
        block.fragment_id,
        block.offsets[kept],
        block.vectors[kept],
        block.row_offsets[rows],
        block.row_ids[rows],
        # Which of the unusable rows are asked for is not told by reason: all of them are counted as null.
        int(np.count_nonzero(rows)) - int(np.count_nonzero(kept)),
        0,
        0,
        np.setdiff1d(block.row_ids[rows], block.row_ids[np.isin(block.row_offsets, block.offsets[kept])]),
        None if block.updated is None else block.updated[rows],
    )


def _fragment_state(meta: Any, signature: FragmentSignature) -> FragmentState:
    deletions = meta.deletion_file
    return FragmentState(
        fragment_id=int(meta.id),
        physical_rows=int(meta.physical_rows),
        deleted_rows=int(deletions.num_deleted_rows) if deletions else 0,
        signature=signature,
        deletions=f"{deletions.read_version}-{deletions.id}" if deletions else "",
    )


def _decode_batch(batch: pa.RecordBatch, column: VectorColumn, metric: Metric) -> Iterator[Block]:
    addresses = batch[_ADDRESS_COLUMN].to_numpy()
    row_ids = batch[ROW_ID_COLUMN].to_numpy() if ROW_ID_COLUMN in batch.schema.names else addresses
    updated = batch[_UPDATED_COLUMN].to_numpy() if _UPDATED_COLUMN in batch.schema.names else None
    fragments = (addresses >> np.uint64(32)).astype(np.int64)
    borders = [0, *(np.flatnonzero(np.diff(fragments)) + 1).tolist(), len(addresses)]
    for start, stop in itertools.pairwise(borders):
        if start == stop:
            continue
        decoded = decode_vectors(batch.column(0)[start:stop], column.dim, metric, column=column.name)
        usable = decoded.usable
        offsets = (addresses[start:stop] & _OFFSET_MASK).astype(np.int64)
        ids = row_ids[start:stop]
        everything = bool(usable.all())
        yield Block(
            int(fragments[start]),
            offsets if everything else offsets[usable],
            decoded.values if everything else decoded.values[usable],
            offsets,
            ids,
            int(decoded.null.sum()),
            int(decoded.non_finite.sum()),
            int(decoded.zero.sum()),
            ids[~usable],
            None if updated is None else updated[start:stop],
        )


def _sample_rows(total: int, rows: int, row_bytes: int, seed: int) -> Int64Array:
    """Return sorted live row numbers: whole random blocks, or everything."""
    if rows >= total:
        return np.arange(total, dtype=np.int64)
    block = min(max(_SAMPLE_BLOCK_BYTES // max(row_bytes, 1), _MIN_SAMPLE_ROWS), _MAX_SAMPLE_ROWS, max(rows // 16, 1))
    blocks = -(-total // block)
    wanted = min(-(-rows // block), blocks)
    chosen = np.sort(np.random.default_rng(seed).choice(blocks, size=wanted, replace=False))
    numbers = (chosen[:, None] * block + np.arange(block)).ravel()
    return cast("Int64Array", numbers[numbers < total][:rows].astype(np.int64))


def _signature(meta: Any, lineage: Sequence[int]) -> FragmentSignature:
    """Return the files of the first field of a lineage (leaf first) that has any, and all overlays."""
    files: list[tuple[str, int]] = []
    for field_id in lineage:
        for data_file in meta.files:
            # Files of the legacy format do not say which column holds a field: the field itself tells them apart.
            indices = data_file.column_indices or data_file.fields
            for field, index in zip(data_file.fields, indices, strict=True):
                if field == field_id:
                    files.append((str(data_file.path), int(index)))
        if files:
            break
    overlays = [
        f"{overlay.data_file.path}@{getattr(overlay, 'committed_version', '')}"
        for overlay in (meta.overlays or [])
        if not set(lineage).isdisjoint(overlay.data_file.fields)
    ]
    return FragmentSignature(files=tuple(sorted(files)), overlays=tuple(sorted(overlays)))


def _lineage(dataset: LanceDataset, field_id: int) -> list[int]:
    """Return a field's id and those of its ancestors, leaf first: a packed struct's files name only the struct."""
    waiting = [(field, [int(field.id())]) for field in dataset.lance_schema.fields()]
    while waiting:
        field, ids = waiting.pop()
        if ids[0] == field_id:
            return ids
        waiting += [(child, [int(child.id()), *ids]) for child in field.children()]
    return [field_id]


def _field_path(dataset: LanceDataset, field_id: int) -> str | None:
    """Return the dotted path of the column whose leaf has that id; None if there is none any more."""
    waiting = [(field, str(field.name())) for field in dataset.lance_schema.fields()]
    while waiting:
        field, path = waiting.pop()
        children = field.children()
        if not children:
            if int(field.id()) == field_id:
                return path
            continue
        # A list's element is part of the column, a struct's member is a column of its own.
        is_struct = pa.types.is_struct(_arrow_field(dataset.schema, path))
        waiting += [(child, f"{path}.{child.name()}" if is_struct else path) for child in children]
    return None


def _leaf_id(dataset: LanceDataset, name: str) -> int:
    fields = dataset.lance_schema.fields()
    found = None
    for part in name.split("."):
        found = next(field for field in fields if field.name() == part)
        fields = found.children()
    while fields:  # a list's element; data files record only leaves
        found, fields = fields[0], fields[0].children()
    if found is None:
        raise InvalidArgument(f"column {name!r} has no field", parameter="column", value=name)
    return int(found.id())


def _arrow_field(schema: pa.Schema, name: str) -> pa.DataType:
    found: Any = schema
    for part in name.split("."):
        names = found.names if isinstance(found, pa.Schema) else [field.name for field in _struct_fields(found)]
        if part not in names:
            raise UnknownColumn(
                f"the dataset has no column {name!r}",
                remedy=f"It has {', '.join(schema.names)}",
                column=name,
                available=tuple(schema.names),
            )
        found = found.field(part).type
    return found


def _struct_fields(arrow_type: pa.DataType) -> list[pa.Field]:
    return [arrow_type.field(i) for i in range(arrow_type.num_fields)] if pa.types.is_struct(arrow_type) else []


def _struct_child(array: pa.StructArray, name: str) -> pa.Array:
    """Return a child with the parent's nulls laid over it."""
    index = array.type.get_field_index(name)
    return array.flatten()[index]


def _main_root(dataset: LanceDataset) -> str:
    """Return the root of the main branch: a branch's handle lies in ``<root>/tree/<branch>``."""
    uri = dataset.uri.rstrip("/")
    if "/tree/" not in uri:
        return _absolute(uri)
    for branch in dataset.branches.list():
        if uri.endswith(f"/tree/{branch}"):
            return _absolute(uri.removesuffix(f"/tree/{branch}"))
    return _absolute(uri)


def _absolute(uri: str) -> str:
    local = _local_path(uri)
    return uri if local is None else str(local)


def _local_path(uri: str) -> Path | None:
    for scheme in ("file://", "file-object-store://"):
        if uri.startswith(scheme):
            return Path(uri.removeprefix(scheme)).absolute()
    return None if "://" in uri else Path(uri).absolute()


def _conflict(name: str, ours: str, found: str | None) -> CommitConflict:
    theirs = (
        "" if found is None else Pointer.from_text(found, location=f"metadata key {POINTER_PREFIX}{name}").generation
    )
    return CommitConflict(
        f"index {name!r} was changed by another writer while generation {ours} was built; the dataset now has"
        f" {f'generation {theirs}' if theirs else 'no such index: it was dropped'}",
        remedy="The other index is untouched. Open it, or build again with replace=True",
        name=name,
        ours=ours,
        theirs=theirs,
    )


@contextmanager
def _lance_errors(uri: str) -> Iterator[None]:
    """Translate what Lance raises, a text from Rust under any class, into a `StorageError`."""
    try:
        yield
    except DfaissError:
        raise
    except (OSError, ValueError, RuntimeError) as exc:
        raise StorageError(
            f"Lance could not read {uri}: {_first_line(exc)}",
            remedy="Check that the dataset is complete and can be reached, and that this version was not removed",
            location=uri,
        ) from exc


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[0].split(", /home/")[0]
