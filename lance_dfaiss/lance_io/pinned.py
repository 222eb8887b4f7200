"""One version of a dataset, and all that is asked of it.

Reading is bounded: vectors stream in scanner batches of at most 4,096 rows with little read-ahead,
samples come in blocks of neighbouring rows, never as scattered single ones.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from lance import LanceDataset
from lance.dataset import serialize_row_addrs
from lance.file import LanceFileSession

from ..errors import (
    InsufficientData,
    InvalidArgument,
    ReadOnlyStorage,
    StorageError,
    UnknownColumn,
    UnsupportedColumn,
)
from ..plan import FragmentState
from ..storage import FolderSession, LocalStore, SessionStore, Store, check_conditional_writes, failure_kind
from ..types import POINTER_PREFIX, ROW_ID_COLUMN, SIDECAR, Int64Array, Metric, UInt64Array
from ..vectors import decode_vectors, vector_type
from .blocks import Block, Sample, SampleBlocks, decode_batch, only_rows
from .failures import REFUSED, LancePanic, first_line, lance_errors, panics_told, pointer_conflict
from .fields import (
    ADDRESS_COLUMN,
    OFFSET_MASK,
    UPDATED_COLUMN,
    VectorColumn,
    arrow_field,
    leaf_field_id,
    lineage_of,
    path_of_field,
    signature_of,
    state_of_fragment,
    struct_child,
    without_views,
)
from .filters import matching_rows
from .namespaces import client_of, table_of
from .roots import local_path, main_root

__all__ = ["PinnedDataset", "VersionMetadata", "move_to_latest"]

# Scanner batches: smaller ones cost throughput, larger ones memory (measured with pylance 14).
_MIN_BATCH_ROWS, _MAX_BATCH_ROWS = 1_024, 4_096

_BATCH_BYTES = 4 * 1024 * 1024

# Bytes the scanner may read ahead; its own default grows without bound behind a slow consumer.
_IO_BUFFER_BYTES = 16 * 1024 * 1024

# Rows asked for in one take while sampling.
_TAKE_ROWS = 16_384

# Fragments whose live rows are asked for in one scan: each scan of its own costs about a quarter of a millisecond.
_SCANNED_FRAGMENTS = 1_000

# Times versions are listed while somebody cleans up.
_LISTINGS = 5

# Times a commit is tried when others commit something else at the same time.
_COMMIT_ATTEMPTS = 5

# Versions read at the same time: each is a small file, far away on an object store.
_VERSION_READERS = 8


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


def move_to_latest(dataset: LanceDataset) -> None:
    """Move a handle to the newest version of its branch, in place."""
    cast("Any", dataset).checkout_latest()


class PinnedDataset:
    """One version of one dataset; every answer is about that version.

    Parameters
    ----------
    dataset : lance.LanceDataset
        Handle; copied, so that the caller's may move on.
    storage_options : mapping, optional
        What the caller gave beside it, for places of indexes outside of the dataset.
    """

    def __init__(self, dataset: LanceDataset, storage_options: Mapping[str, str] | None = None) -> None:
        self._given_options = storage_options
        self._dataset = dataset.checkout_version(dataset.version)
        # The caller's defaults (columns, a filter, a limit) are for the caller's scans, not for ours.
        cast("Any", self._dataset)._default_scan_options = None
        self.version: int = dataset.version
        self.uri: str = dataset.uri
        self.stable_row_ids: bool = dataset.has_stable_row_ids
        self.root: str = main_root(dataset)

    @property
    def lance(self) -> LanceDataset:
        """The pinned handle."""
        return self._dataset

    @property
    def metadata(self) -> Mapping[str, str]:
        """Table metadata of this version."""
        return cast("Mapping[str, str]", self._dataset.metadata)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns of this version, nested ones by their root."""
        return tuple(self._dataset.schema.names)

    def at_version(self, version: int) -> PinnedDataset:
        """Pin another version of the same branch.

        Raises
        ------
        InvalidArgument
            If there is no such version.
        """
        found = self._at_same_branch(version)
        if found is None:
            raise InvalidArgument(
                f"{self.uri} has no version {version}; the newest is {self.latest().version}",
                remedy="It may have been cleaned up",
                parameter="version",
                value=version,
            )
        return PinnedDataset(found, self._given_options)

    def vector_column(self, name: str, *, dim_of_lists: int | None = None) -> VectorColumn:
        """Look up a vector column.

        Parameters
        ----------
        name : str
            Dotted path.
        dim_of_lists : int, optional
            Dimension of a column of lists, where an index has settled it; its first list tells otherwise.

        Raises
        ------
        UnknownColumn
            If the dataset has no such column; names those it has.
        UnsupportedColumn
            If it is not a vector column.
        InsufficientData
            If it holds lists and not one row tells their length.
        """
        arrow_type = arrow_field(self._dataset.schema, name)
        kind = vector_type(name, arrow_type)
        settled = kind.dim is None and dim_of_lists is not None
        dim = kind.dim or (dim_of_lists if settled and dim_of_lists else self._list_length(name))
        if dim < 1:
            raise UnsupportedColumn(
                f"column {name!r} has type {arrow_type}: expected vectors of at least 1 element, found {dim}",
                remedy="Index a column whose vectors hold something",
                parameter="column",
                value=name,
            )
        field_id = leaf_field_id(self._dataset, name)
        return VectorColumn(name=name, field_id=field_id, type=kind, dim=dim, odd_is_null=settled)

    def fragments(self, column: VectorColumn) -> list[FragmentState]:
        """Return the state of every fragment, in the dataset's order."""
        with lance_errors(self.uri):
            lineage = lineage_of(self._dataset, column.field_id)
            return [self._state(fragment.metadata, column, lineage) for fragment in self._dataset.get_fragments()]

    def live_offsets(self, fragment_id: int) -> Int64Array:
        """Return the physical offsets of a fragment's live rows, int64 ``(live,)``, increasing."""
        return self.live_offsets_of([fragment_id])[fragment_id]

    def live_offsets_of(self, fragment_ids: Sequence[int]) -> dict[int, Int64Array]:
        """Return the live offsets of some fragments by id, read together; see `live_offsets`."""
        found = {fragment_id: np.zeros(0, dtype=np.int64) for fragment_id in fragment_ids}
        with lance_errors(self.uri):
            for start in range(0, len(fragment_ids), _SCANNED_FRAGMENTS):
                fragments = [self._fragment(i) for i in fragment_ids[start : start + _SCANNED_FRAGMENTS]]
                scanner = self._dataset.scanner(
                    columns=[], with_row_address=True, fragments=fragments, scan_in_order=True
                )
                addresses = scanner.to_table()[ADDRESS_COLUMN].to_numpy()
                # In order, normally; looking is a tenth of sorting.
                if (addresses[1:] < addresses[:-1]).any():
                    addresses = np.sort(addresses)
                places = (addresses >> np.uint64(32)).astype(np.int64)
                starts = np.append(np.zeros(1, np.int64), np.flatnonzero(np.diff(places)) + 1)
                offsets = (addresses & OFFSET_MASK).astype(np.int64)
                for first, part in zip(starts.tolist(), np.split(offsets, starts[1:]), strict=True):
                    if len(part):
                        found[int(places[first])] = part
        return found

    @property
    def committed_at(self) -> datetime:
        """When this version was committed; numbers alone repeat on a branch that is made again."""
        return cast("datetime", cast("Any", self._dataset).get_version()["timestamp"])

    def find_column(self, name: str, field_id: int, dim: int) -> VectorColumn:
        """Look up the column that an index was built over, also after it was renamed or cast.

        Parameters
        ----------
        name : str
            Name when the index was built.
        field_id : int
            Its leaf field then; renaming keeps it, casting gives a new one.
        dim : int
            Its dimension then.

        Raises
        ------
        UnknownColumn, UnsupportedColumn, InsufficientData
            As `vector_column` does.
        """
        try:
            # The name first: an overwrite deals field ids anew, so the old one may be another column's.
            return self.vector_column(name, dim_of_lists=dim)
        except (UnknownColumn, UnsupportedColumn):
            path = path_of_field(self._dataset, field_id)
            if path is None or path == name:
                raise
            return self.vector_column(path, dim_of_lists=dim)

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
        StorageError
            If it cannot be read, or one of the fragments is not of this version.
        """
        fragments = None if fragment_ids is None else self.fragments_of(fragment_ids)
        return matching_rows(self._dataset, filter_sql, fragments, self.uri)

    def fragments_of(self, fragment_ids: Sequence[int]) -> list[Any]:
        """Return Lance's handles of some fragments.

        Raises
        ------
        StorageError
            If one is not of this version.
        """
        found = [self._fragment(i) for i in fragment_ids]
        for fragment_id, fragment in zip(fragment_ids, found, strict=True):
            if fragment is None:
                raise StorageError(
                    f"version {self.version} of {self.uri} has no fragment {fragment_id}", location=self.uri
                )
        return found

    def deleted_addresses(self, fragment_ids: Sequence[int] | None = None) -> UInt64Array:
        """Return the addresses of deleted rows of some fragments (all by default), uint64 ``(n,)``."""
        everything = self._dataset.get_fragments() if fragment_ids is None else self.fragments_of(fragment_ids)
        thinned = {f.fragment_id: f.metadata.physical_rows for f in everything if f.metadata.deletion_file}
        parts = [np.zeros(0, dtype=np.uint64)]
        for fragment_id, live in self.live_offsets_of(list(thinned)).items():
            gone = np.setdiff1d(np.arange(thinned[fragment_id]), live, assume_unique=True)
            parts.append(gone.astype(np.uint64) + (np.uint64(fragment_id) << np.uint64(32)))
        return np.concatenate(parts)

    def row_versions(self, fragment_ids: Sequence[int]) -> tuple[UInt64Array, UInt64Array, UInt64Array]:
        """Return row id, address and last version of every live row of some fragments, uint64 ``(n,)`` each.

        Only with stable row ids.
        """
        with lance_errors(self.uri):
            table = self._dataset.scanner(
                columns=[UPDATED_COLUMN],
                with_row_id=True,
                with_row_address=True,
                fragments=[self._fragment(i) for i in fragment_ids],
                scan_in_order=True,
            ).to_table()
        names = (ROW_ID_COLUMN, ADDRESS_COLUMN, UPDATED_COLUMN)
        return cast("tuple[UInt64Array, UInt64Array, UInt64Array]", tuple(table[name].to_numpy() for name in names))

    def rows(
        self,
        column: VectorColumn,
        fragment_id: int,
        offsets: Int64Array | None,
        metric: Metric,
        *,
        part: tuple[int, int] | None = None,
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
        part : tuple of (int, int), optional
            First physical offset and number of rows, deleted ones included: no others are read.
        """
        if part is None:
            blocks = self.blocks(column, [fragment_id], metric)
        else:
            blocks = self._part(column, fragment_id, part, metric)
        for block in blocks:
            if offsets is None:
                yield block
            else:
                yield from only_rows(block, offsets)

    def _part(
        self, column: VectorColumn, fragment_id: int, part: tuple[int, int], metric: Metric
    ) -> Generator[Block, None, None]:
        # Lance counts live rows.
        start, stop = np.searchsorted(self.live_offsets(fragment_id), [part[0], sum(part)]).tolist()
        if start < stop:
            yield from self._scan(column, [fragment_id], metric, offset=start, limit=stop - start)

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
        yield from self._scan(column, fragment_ids, metric)

    def _scan(
        self,
        column: VectorColumn,
        fragment_ids: Sequence[int],
        metric: Metric,
        *,
        offset: int | None = None,
        limit: int | None = None,
    ) -> Generator[Block, None, None]:
        rows = _BATCH_BYTES // max(column.stored_row_bytes, 1)
        with lance_errors(self.uri):
            scanner = self._dataset.scanner(
                offset=offset,
                limit=limit,
                columns=[column.name, *([UPDATED_COLUMN] if self.stable_row_ids else [])],
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
                    yield from decode_batch(batch, column, metric)

    def sample(
        self, column: VectorColumn, rows: int, metric: Metric, seed: int, *, share: tuple[int, int] = (0, 1)
    ) -> Sample:
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
        share : tuple of int
            Which one of how many equal shares to read; the shares, one after the other, are the whole sample.
        """
        states = self.fragments(column)
        total = sum(state.live_rows for state in states)
        chosen = SampleBlocks.draw(total, rows, column.stored_row_bytes, seed).share(*share)
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
        InvalidArgument
            If Lance gives up on an expression.
        """
        unique, inverse = np.unique(row_ids, return_inverse=True)
        wanted = dict(columns) if isinstance(columns, Mapping) else None if columns is None else list(columns)
        try:
            with panics_told():
                table = self._dataset.scanner(
                    columns=wanted, with_row_id=True, row_addr_allowlist=serialize_row_addrs(unique.tolist())
                ).to_table()
        except (ValueError, OSError, LancePanic) as exc:
            raise self._column_error(wanted, exc) from exc
        found = table[ROW_ID_COLUMN].to_numpy()
        if len(found) != len(unique):
            raise StorageError(
                f"Lance returned {len(found)} of {len(unique)} rows asked for by id",
                remedy="Open the index again: the dataset version it was opened at may have been removed",
                location=self.uri,
            )
        order = np.argsort(found, kind="stable")
        plain = pa.schema([field.with_type(without_views(field.type)) for field in table.schema], table.schema.metadata)
        if plain != table.schema:
            table = table.cast(plain)
        return table.take(pa.array(order[inverse]))

    def session_store(self) -> Store:
        """Return the store of the dataset's own ``_dfaiss`` folder, in the main root also for branches."""
        local = local_path(self.root)
        if local is not None:
            return LocalStore(local / SIDECAR)
        # As the handle itself would make one, but for its base: a branch's handle lies below the root.
        session = LanceFileSession(
            base_path=self.root,
            storage_options=self.storage_options,
            namespace_client=client_of(self._dataset),
            table_id=table_of(self._dataset),
        )
        return SessionStore(FolderSession(cast("Any", session), SIDECAR), f"{self.root}/{SIDECAR}")

    @property
    def storage_options(self) -> dict[str, str] | None:
        """The settings that the dataset is reached with, credentials as they are now; None where it needs none."""
        options = cast("Any", self._dataset).latest_storage_options()
        # Lance adds a setting of its own, which means nothing elsewhere.
        kept = {key: value for key, value in (options or {}).items() if key != "user_agent"}
        return kept or None

    def options_for(self, url: str) -> Mapping[str, str] | None:
        """Return the settings for a place of indexes outside of the dataset.

        Those that the caller gave; without any, the dataset's own where it lies on the same kind of store, or on
        local disk, which needs none. The credentials of one kind of store are not shown to another.
        """
        if self._given_options is not None:
            return self._given_options
        same = local_path(self.root) is not None or urlsplit(url).scheme == urlsplit(self.root).scheme
        return self.storage_options if same else None

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
        UnsafeStorage
            If two commits at once would not notice each other; see `check_commits`.
        StorageError
            If the commit failed otherwise.
        """
        self.check_commits()
        key = POINTER_PREFIX + name
        for attempt in range(1, _COMMIT_ATTEMPTS + 1):
            # A fresh handle: the compare-and-set needs the transactions since the version it read.
            fresh = self._fresh()
            found = fresh.metadata.get(key)
            if found != expected:
                raise pointer_conflict(name, ours, found)
            try:
                fresh.update_metadata({key: value})
            except (OSError, RuntimeError, ValueError) as exc:
                # The message does not tell who was faster, and at what: the pointer does.
                found = self._fresh().metadata.get(key)
                if found is not None and found == value:
                    return  # committed, and only the answer was lost
                if found != expected:
                    raise pointer_conflict(name, ours, found) from exc
                if isinstance(exc, PermissionError) or REFUSED.search(str(exc)):
                    raise ReadOnlyStorage(
                        f"cannot write to the dataset at {self.uri}: {first_line(exc)}",
                        remedy="Pass index_uri=... naming a place that can be written",
                        location=self.uri,
                    ) from exc
                said = str(exc).lower()
                again = "conflict" in said or "incompatible transaction" in said or failure_kind(exc) == "passing"
                if attempt == _COMMIT_ATTEMPTS or not again:
                    raise StorageError(
                        f"Lance could not commit the index to {self.uri}: {first_line(exc)}",
                        remedy="Run again with resume=True",
                        location=self.uri,
                    ) from exc
            else:
                return

    def latest(self) -> PinnedDataset:
        """Pin the newest version."""
        return PinnedDataset(self._fresh(), self._given_options)

    def check_commits(self) -> None:
        """Make sure, once per process, that the dataset lies where a commit can rely on the store.

        Raises
        ------
        UnsafeStorage
            If the store takes no notice of conditional writes.
        """
        if local_path(self.root) is None:
            check_conditional_writes(f"{self.root}/{SIDECAR}", self.storage_options)

    def check_writable(self) -> None:
        """Fail early if the dataset itself cannot be committed to.

        Raises
        ------
        ReadOnlyStorage
            If its folder cannot be written.
        """
        local = local_path(self.root)
        if local is not None:
            LocalStore(local / "_versions").check_writable()

    def _fresh(self) -> LanceDataset:
        with lance_errors(self.uri):
            fresh = self._dataset.checkout_version(self.version)
            move_to_latest(fresh)
        return fresh

    def _state(self, meta: Any, column: VectorColumn, lineage: Sequence[int]) -> FragmentState:
        signature = signature_of(meta, lineage)
        if not signature.files and meta.physical_rows and self._holds_values(int(meta.id), column):
            raise UnsupportedColumn(
                f"fragment {meta.id} of {self.uri} holds values of column {column.name!r} in no file that names its"
                f" field {column.field_id}: a change of them could not be noticed",
                remedy="Write the column anew, or index another one",
                parameter="column",
                value=column.name,
            )
        return state_of_fragment(meta, signature)

    def _holds_values(self, fragment_id: int, column: VectorColumn) -> bool:
        """Tell whether a fragment has a vector; without a file it has none, as after an append without the column."""
        scanner = self._dataset.scanner(columns=[column.name], fragments=[self._fragment(fragment_id)])
        with scanner.to_reader() as reader:
            return any(batch.column(0).null_count < len(batch) for batch in reader)

    def _fragment(self, fragment_id: int) -> Any:
        return self._dataset.get_fragment(fragment_id)

    def _take(self, column: VectorColumn, rows: Int64Array) -> pa.Array:
        with lance_errors(self.uri):
            table = self._dataset.take(rows, columns=[column.name])
        array = table.column(0).combine_chunks()
        for part in column.name.split(".")[1:] if pa.types.is_struct(array.type) else []:
            array = struct_child(array, part)
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
        with lance_errors(self.uri):
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
        if isinstance(exc, LancePanic) and isinstance(wanted, dict):
            return InvalidArgument(
                f"these columns cannot be computed: {first_line(exc)}",
                remedy="Name columns of the dataset, or other SQL expressions over them",
                parameter="columns",
                value=wanted,
            )
        names = list(wanted) if wanted is not None and not isinstance(wanted, dict) else []
        for name in names:
            if name not in self._dataset.schema.names and "." not in name:
                return UnknownColumn(
                    f"the dataset has no column {name!r}",
                    remedy=f"It has {', '.join(self._dataset.schema.names)}",
                    column=name,
                    available=tuple(self._dataset.schema.names),
                )
        return StorageError(f"Lance could not read the rows: {first_line(exc)}", location=self.uri)

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
        with lance_errors(self.uri):
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
                places.update(((branch, number), None) for number in _version_numbers(head))
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

    def _at_same_branch(self, version: int) -> LanceDataset | None:
        try:
            with lance_errors(self.uri):
                return self._dataset.checkout_version(version)
        except StorageError as exc:
            if "not found" in str(exc).lower():
                return None
            raise

    def _at(self, branch: str | None, version: int | None) -> LanceDataset | None:
        """Return a handle at a version of a branch (None: main, the newest), or None if it went meanwhile."""
        try:
            return cast("LanceDataset", cast("Any", self._dataset).checkout_version((branch, version)))
        except (OSError, ValueError) as exc:
            # Lance has no class of its own for this either.
            if "not found" in str(exc).lower():
                return None
            raise


def _version_numbers(head: LanceDataset) -> list[int]:
    """List the versions of a branch; Lance fails over one that is cleaned up while it lists them."""
    for _ in range(_LISTINGS - 1):
        try:
            return [int(entry["version"]) for entry in cast("Any", head).versions()]
        except (OSError, ValueError) as exc:
            if "not found" not in str(exc).lower():
                raise
    return [int(entry["version"]) for entry in cast("Any", head).versions()]
