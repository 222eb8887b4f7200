"""`open_index` and the `Index` it returns: a generation in RAM, answering for one dataset version."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..engine import Mask, Segment, prepare
from ..errors import InvalidArgument, StorageError
from ..lance_io import LanceDataset, PinnedDataset, open_dataset
from ..manifest import Manifest, SkipCounts
from ..merge import merge_topk, order_ties
from ..pointers import find_pointer
from ..progress import PhaseMeter, Progress, SilentProgress
from ..spec import SearchOptions
from ..types import (
    DISTANCE_COLUMN,
    MISSING_ROW_ID,
    QUERY_INDEX_COLUMN,
    ROW_ID_COLUMN,
    Float32Array,
    Int64Array,
    Metric,
    UInt64Array,
)
from ..vectors import as_queries
from .load import Generation, load_segments, read_generation
from .resolve import resolve_generation
from .snapshot import Snapshot

__all__ = ["Index", "IndexStats", "open_index"]

_log = logging.getLogger(__name__)

# Without a measurement (too few rows): wide enough for small data, cheap enough for any.
_FALLBACK_NPROBE = 32
_FALLBACK_EF = 64
_FALLBACK_K_FACTOR = 8

# Results of one call over all its queries: 24 GiB of distances and row ids.
_MAX_RESULTS = 2**31

# Columns that an answer has anyway.
_OWN_COLUMNS = (ROW_ID_COLUMN, DISTANCE_COLUMN)


class _Widths(NamedTuple):
    """Search widths with nothing left open; ``fixed`` when the caller named how far to look."""

    nprobe: int
    ef: int
    k_factor: int
    fixed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexStats:
    """What an open index holds.

    Parameters
    ----------
    name, index_type, factory, metric : str
        As built.
    dim : int
        Dimension.
    version : int
        Dataset version it answers for.
    generation : str
        Its generation.
    indexed_rows, masked_rows, live_rows : int
        Rows with an entry, those deleted since, and those that can be found.
    skipped : SkipCounts
        Rows without an entry, by reason.
    shards, segments : int
        Shards stored, and FAISS indexes they became in RAM.
    ram_bytes : int
        Codes, ids, graph, centroids, masks and row-id runs, once the index is open. While it opens, about
        the largest shard is in RAM beside them, and what the allocator keeps between.
    list_imbalance : float or None
        Rows of the fullest IVF list over the mean.
    recall : float or None
        Measured recall@10 at the default widths.
    defaults : SearchOptions
        Widths used when a search names none.
    """

    name: str
    index_type: str
    factory: str
    metric: str
    dim: int
    version: int
    generation: str
    indexed_rows: int
    masked_rows: int
    live_rows: int
    skipped: SkipCounts
    shards: int
    segments: int
    ram_bytes: int
    list_imbalance: float | None
    recall: float | None
    defaults: SearchOptions


def open_index(
    dataset: str | os.PathLike[str] | LanceDataset,
    name: str | None = None,
    *,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Index:
    """Load an index into RAM, for the dataset version that the handle is at.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset; a string opens the newest version.
    name : str, optional
        Index name; may be left out when the dataset has one index.
    index_uri : str, optional
        Where an index of a dataset that cannot be written was built; it is trusted.
    allowed_index_uris : sequence of str
        Places outside the dataset that its pointer may lead to.
    storage_options : mapping, optional
        For a dataset given by URI.
    progress : Progress, optional
        Listener.

    Returns
    -------
    Index

    Raises
    ------
    IndexNotFound
        Naming the indexes that exist.
    CorruptIndex
        If anything stored is missing, damaged, or of a newer format.
    DatasetChanged
        If this version holds rows that the index does not cover.
    UntrustedLocation
        If the pointer leads to a place that was not allowed.
    """
    pinned = PinnedDataset(open_dataset(dataset, storage_options=storage_options))
    found = find_pointer(pinned, name, index_uri)
    allowed = tuple(allowed_index_uris) + (() if index_uri is None else (index_uri,))
    generation = read_generation(pinned, found, allowed)
    snapshot = resolve_generation(pinned, generation)
    meter = PhaseMeter(
        SilentProgress() if progress is None else progress,
        "load",
        sum(record.cover.physical_rows for record in generation.records),
    )
    segments = load_segments(generation, meter)
    meter.finish()
    _log.info("index %r: generation %s open at version %d", found.name, generation.manifest.generation, pinned.version)
    return Index(pinned, generation, snapshot, segments)


class Index:
    """A FAISS index in RAM over one version of a dataset. Made by `open_index`; safe to use from many threads.

    Nothing about it changes after it was opened: the same query gets the same answer.
    """

    def __init__(
        self, pinned: PinnedDataset, generation: Generation, snapshot: Snapshot, segments: list[tuple[int, Segment]]
    ) -> None:
        self._pinned = pinned
        self._generation = generation
        self._snapshot = snapshot
        self._segments = [(first, segment, _mask(snapshot, first, segment)) for first, segment in segments]
        spec = generation.manifest.spec
        self._metric: Metric = spec.metric
        self._dim = spec.dim
        # A search inside takes no more results than there are; at least one, as FAISS wants.
        self._most = max(snapshot.live_rows, 1)
        self._family = segments[0][1].capability.family
        self._refined = segments[0][1].has_refine
        self._defaults = _defaults(generation.manifest)
        self._default_widths = _Widths(
            self._defaults.nprobe or 1, self._defaults.ef or 1, self._defaults.k_factor or 1, fixed=False
        )

    def __repr__(self) -> str:
        return (
            f"Index({self.name!r}, {self._generation.manifest.spec.factory!r}, {self._metric!r},"
            f" rows={self._snapshot.live_rows}, version={self._snapshot.version})"
        )

    def __len__(self) -> int:
        """Count the rows that can be found."""
        return self._snapshot.live_rows

    @property
    def name(self) -> str:
        """Name of the index."""
        return self._generation.manifest.name

    @property
    def manifest(self) -> Manifest:
        """What was built, as stored."""
        return self._generation.manifest

    @property
    def version(self) -> int:
        """Dataset version that answers are true to."""
        return self._snapshot.version

    def knn(
        self,
        queries: Any,
        k: int = 10,
        *,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
    ) -> tuple[Float32Array, UInt64Array]:
        """Find the nearest rows, as arrays.

        Parameters
        ----------
        queries : array-like
            ``(dim,)`` or ``(n_queries, dim)``, any number type.
        k : int
            Results per query; ``n_queries * k`` at most 2**31.
        nprobe : int, optional
            IVF lists to search; more is slower and finds more. Default: measured when the index was built,
            and all of them for a query that would get fewer than ``min(k, live rows)`` results.
        ef : int, optional
            HNSW search width.
        k_factor : int, optional
            Candidates per result that are re-ranked from the refine store.

        Returns
        -------
        tuple of (numpy.ndarray, numpy.ndarray)
            Distances float32 ``(n_queries, k)``, ascending, in Lance's values: squared L2, 1 - cosine,
            1 - dot; and row ids uint64 of the same shape. Where there are fewer rows: +inf and
            `MISSING_ROW_ID`. A single query counts as a batch of one.

        Raises
        ------
        InvalidQuery
            If a query has the wrong dimension, is not finite, or is zero under cosine.
        InvalidArgument
            If k or a width is out of range or means nothing to this index.
        """
        array, _ = as_queries(queries, self._dim, self._metric)
        k = _checked_k(k)
        if len(array) * k > _MAX_RESULTS:
            raise _too_many_results(len(array), k)
        distances, row_ids = self._knn(array, k, self._widths(nprobe, ef, k_factor))
        return (distances, row_ids) if k <= self._most else _padded(distances, row_ids, k)

    def search(
        self,
        query: Any,
        k: int = 10,
        *,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
    ) -> pa.Table:
        """Find the nearest rows, as a table like ``dataset.to_table(nearest=...)`` returns it.

        Parameters
        ----------
        query : array-like
            ``(dim,)``, or ``(n_queries, dim)`` for a batch.
        k : int
            Results per query.
        columns : sequence of str or mapping, optional
            Columns to fetch, each once, or names and SQL expressions; all by default, none for ``[]``.
        nprobe, ef, k_factor : int, optional
            As for `knn`.

        Returns
        -------
        pyarrow.Table
            The columns, ``_distance`` and ``_rowid``, ascending by distance; for a batch ``query_index``
            first. Fewer rows than k where there are no more.

        Raises
        ------
        InvalidQuery, InvalidArgument
            As for `knn`, though k may be any number; and if the columns are no list of different names, or
            Lance cannot make sense of an expression.
        UnknownColumn
            If a column does not exist.
        """
        array, single = as_queries(query, self._dim, self._metric)
        widths = self._widths(nprobe, ef, k_factor)
        wanted = _checked_columns(columns)
        k = _checked_k(k)
        if len(array) * min(k, self._most) > _MAX_RESULTS:
            raise _too_many_results(len(array), k)
        distances, row_ids = self._knn(array, k, widths)
        return self._table(distances, row_ids, wanted, single=single)

    def reconstruct(self, row_ids: Any) -> Float32Array:
        """Decode the vectors of some rows, as the index holds them.

        Parameters
        ----------
        row_ids : array-like
            uint64 ``(n,)``, each a live, indexed row.

        Returns
        -------
        numpy.ndarray
            float32 ``(n, dim)``: approximations unless the codes are exact; of unit length under cosine.

        Raises
        ------
        InvalidArgument
            If these are no row ids, a row is not indexed or not live, or this index cannot decode.
        """
        wanted = _checked_row_ids(row_ids)
        positions = self._snapshot.row_ids.positions(wanted)
        bad = (
            (positions < 0) | ~self._snapshot.live[np.maximum(positions, 0)]
            if len(self._snapshot.live)
            else positions < 0
        )
        if bad.any():
            row = int(wanted[bad][0])
            raise InvalidArgument(
                f"row {row} is not in this index", remedy="It was deleted or skipped", parameter="row_ids", value=row
            )
        vectors = np.empty((len(wanted), self._dim), dtype=np.float32)
        for first, segment, _ in self._segments:
            mine = (positions >= first) & (positions < first + segment.positions)
            if mine.any():
                vectors[mine] = segment.reconstruct(positions[mine] - first)
        return vectors

    def stats(self) -> IndexStats:
        """Return what the index holds, and how good it was measured to be."""
        manifest, snapshot = self._generation.manifest, self._snapshot
        masks = sum(mask.ram_bytes for _, _, mask in self._segments if mask is not None)
        sizes = [size for size in (segment.list_sizes() for _, segment, _ in self._segments) if size is not None]
        return IndexStats(
            name=manifest.name,
            index_type=manifest.spec.index_type,
            factory=manifest.spec.factory,
            metric=manifest.spec.metric,
            dim=self._dim,
            version=snapshot.version,
            generation=manifest.generation,
            indexed_rows=snapshot.indexed_rows,
            masked_rows=snapshot.masked_rows,
            live_rows=snapshot.live_rows,
            skipped=manifest.skipped,
            shards=len(manifest.shards),
            segments=len(self._segments),
            ram_bytes=sum(segment.ram_bytes for _, segment, _ in self._segments)
            + masks
            + snapshot.row_ids.ram_bytes
            + snapshot.live.nbytes,
            list_imbalance=_imbalance(sum(sizes[1:], sizes[0])) if sizes else None,
            recall=_default_recall(manifest),
            defaults=self._defaults,
        )

    def _knn(self, queries: Float32Array, k: int, widths: _Widths) -> tuple[Float32Array, UInt64Array]:
        """Return as many results as there can be: ``(n_queries, min(k, live rows))``, but one at least."""
        if self._metric == "cosine":
            queries = prepare(queries.copy(), "cosine")  # they may lie in the caller's memory
        distances, row_ids = self._scan(queries, k, widths)
        if widths.fixed or not (row_ids[:, -1] == MISSING_ROW_ID).any():
            return distances, row_ids
        # So many rows are deleted that the default widths met too few live ones: look everywhere.
        short = np.count_nonzero(row_ids != MISSING_ROW_ID, axis=1) < min(k, self._snapshot.live_rows)
        if short.any():
            lists, positions = self._generation.manifest.spec.num_partitions, len(self._snapshot.live)
            everywhere = _Widths(max(lists, 1), positions, widths.k_factor, fixed=True)
            distances[short], row_ids[short] = self._scan(np.ascontiguousarray(queries[short]), k, everywhere)
        return distances, row_ids

    def _scan(self, queries: Float32Array, k: int, widths: _Widths) -> tuple[Float32Array, UInt64Array]:
        ef = max(widths.ef, k * widths.k_factor)  # as wide as the caller's k asks for, also where fewer rows are left
        k = min(k, self._most)
        parts = []
        for first, segment, mask in self._segments:
            raw, positions = segment.search(
                queries,
                min(k, segment.positions),
                nprobe=widths.nprobe,
                ef=ef,
                k_factor=widths.k_factor,
                mask=mask,
            )
            # FAISS fills up with -1, always at the end of a query's results.
            missing = positions < 0 if (positions[:, -1] < 0).any() else None
            if first:
                positions = positions + first
            row_ids = self._snapshot.row_ids.row_ids(positions)
            distances = _lance_distances(raw, self._metric)
            if missing is not None:
                distances[missing] = np.inf
                row_ids[missing] = MISSING_ROW_ID
            parts.append((distances, row_ids))
        if len(parts) == 1:
            return order_ties(*parts[0])
        return merge_topk(parts, k)

    def _widths(self, nprobe: int | None, ef: int | None, k_factor: int | None) -> _Widths:
        if nprobe is None and ef is None and k_factor is None:
            return self._default_widths
        asked = SearchOptions(nprobe=nprobe, ef=ef, k_factor=k_factor)
        self._refuse_meaningless(asked)
        default = self._default_widths
        return _Widths(
            asked.nprobe or default.nprobe,
            asked.ef or default.ef,
            asked.k_factor or default.k_factor,
            fixed=asked.nprobe is not None or asked.ef is not None,
        )

    def _refuse_meaningless(self, asked: SearchOptions) -> None:
        lists = self._generation.manifest.spec.num_partitions
        if asked.nprobe is not None and self._family == "ivf" and asked.nprobe > lists:
            raise InvalidArgument(
                f"nprobe must be between 1 and the {lists} partitions of this index, not {asked.nprobe}",
                parameter="nprobe",
                value=asked.nprobe,
            )
        for parameter, works, needs in (
            ("nprobe", self._family == "ivf", "an IVF index"),
            ("ef", self._family == "hnsw", "an HNSW index"),
            ("k_factor", self._refined, "a refine store"),
        ):
            value = getattr(asked, parameter)
            if value is not None and not works:
                raise InvalidArgument(
                    f"{parameter}={value} was given, but it needs {needs} and this is"
                    f" {self._generation.manifest.spec.factory!r} without",
                    remedy=f"Leave {parameter} out",
                    parameter=parameter,
                    value=value,
                )

    def _table(
        self,
        distances: Float32Array,
        row_ids: UInt64Array,
        columns: list[str] | dict[str, str] | None,
        *,
        single: bool,
    ) -> pa.Table:
        found = row_ids != MISSING_ROW_ID
        flat_ids, flat_distances = row_ids[found], distances[found]
        arrays: list[Any] = [pa.array(flat_distances, pa.float32()), pa.array(flat_ids, pa.uint64())]
        fields = [pa.field(DISTANCE_COLUMN, pa.float32()), pa.field(ROW_ID_COLUMN, pa.uint64())]
        if columns is None or len(columns):
            fetched = self._fetch(flat_ids, columns)
            kept = [name for name in fetched.schema.names if name not in _OWN_COLUMNS]
            arrays = [fetched.column(name) for name in kept] + arrays
            fields = [fetched.schema.field(name) for name in kept] + fields
        if not single:
            query = np.repeat(np.arange(len(distances), dtype=np.int32), found.sum(axis=1))
            arrays.insert(0, pa.array(query))
            fields.insert(0, pa.field(QUERY_INDEX_COLUMN, pa.int32(), nullable=False))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def _fetch(self, row_ids: UInt64Array, columns: list[str] | dict[str, str] | None) -> pa.Table:
        try:
            return self._pinned.fetch(row_ids, columns)
        except StorageError as exc:
            if columns is None or not _is_projection_error(exc.__cause__, columns):
                raise
            raise InvalidArgument(
                f"these columns cannot be fetched: {exc.message}",
                remedy="Name columns of the dataset, or give SQL expressions over them",
                parameter="columns",
                value=columns,
            ) from exc


def _mask(snapshot: Snapshot, first: int, segment: Segment) -> Mask | None:
    """Return the mask a segment needs: none when nothing it holds is dead."""
    live = snapshot.live[first : first + segment.positions]
    if segment.capability.family == "ivf":
        return None if not snapshot.masked_rows else Mask(live)
    return None if live.all() else Mask(live)


def _lance_distances(raw: Float32Array, metric: Metric) -> Float32Array:
    """Turn FAISS's values into Lance's, in place."""
    return np.maximum(raw, 0, out=raw) if metric == "l2" else np.subtract(1, raw, out=raw)


def _checked_k(k: int) -> int:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1:
        raise InvalidArgument(f"k must be a whole number of at least 1, not {k!r}", parameter="k", value=k)
    return int(k)


def _too_many_results(n_queries: int, k: int) -> InvalidArgument:
    return InvalidArgument(
        f"k={k} for {n_queries} queries makes {n_queries * k} results; one call gives {_MAX_RESULTS}",
        remedy="Ask for a smaller k, or for fewer queries at once",
        parameter="k",
        value=k,
    )


def _padded(distances: Float32Array, row_ids: UInt64Array, k: int) -> tuple[Float32Array, UInt64Array]:
    """Fill up to k results with missing ones."""
    count, width = distances.shape
    all_distances = np.full((count, k), np.inf, dtype=np.float32)
    all_row_ids = np.full((count, k), MISSING_ROW_ID, dtype=np.uint64)
    all_distances[:, :width], all_row_ids[:, :width] = distances, row_ids
    return all_distances, all_row_ids


def _checked_columns(columns: Any) -> list[str] | dict[str, str] | None:
    """Return the columns to fetch beside those that an answer has anyway."""
    if columns is None:
        return None
    if isinstance(columns, (str, bytes)) or not isinstance(columns, Iterable):
        raise InvalidArgument(
            f"columns must be a list of names or a mapping, not {columns!r}",
            remedy=f"Pass a list: columns=[{columns!r}]" if isinstance(columns, str) else "Pass a list of names",
            parameter="columns",
            value=columns,
        )
    wanted = dict(columns) if isinstance(columns, Mapping) else list(columns)
    texts = [text for item in wanted.items() for text in item] if isinstance(wanted, dict) else wanted
    if not all(isinstance(text, str) for text in texts):
        raise InvalidArgument(f"columns must be strings, not {wanted!r}", parameter="columns", value=wanted)
    if isinstance(wanted, dict):
        return _checked_expressions(wanted)
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if wanted.count(name) > 1)
        raise InvalidArgument(
            f"columns names {twice!r} more than once", remedy="Name it once", parameter="columns", value=wanted
        )
    return [name for name in wanted if name not in _OWN_COLUMNS]


def _checked_expressions(wanted: dict[str, str]) -> dict[str, str]:
    taken = [name for name in _OWN_COLUMNS if wanted.get(name, name) != name]
    if taken:
        raise InvalidArgument(
            f"columns makes a column {taken[0]!r}, and the answer has one of that name",
            remedy="Give it another name",
            parameter="columns",
            value=wanted,
        )
    return {name: expression for name, expression in wanted.items() if name not in _OWN_COLUMNS}


def _is_projection_error(cause: BaseException | None, columns: list[str] | dict[str, str]) -> bool:
    """Tell whether Lance refused the columns, or failed to compute an expression, rather than to read."""
    if not isinstance(cause, ValueError):
        return False
    # Lance raises one class for all of it; only its words tell a division by zero from a missing file.
    return "Invalid user input" in str(cause) or (isinstance(columns, dict) and "LanceError(Arrow)" in str(cause))


def _checked_row_ids(row_ids: Any) -> UInt64Array:
    """Return row ids as uint64 ``(n,)``."""
    given = np.asarray(row_ids) if hasattr(row_ids, "dtype") else np.asarray(row_ids, dtype=object)
    if given.ndim > 1:
        raise InvalidArgument(
            f"row_ids must have shape (n,), not {given.shape}", parameter="row_ids", value=given.shape
        )
    given = np.atleast_1d(given)
    if given.dtype.kind == "u":
        return given.astype(np.uint64)
    if given.dtype.kind == "i":
        bad = given[given < 0]
    else:  # objects: a list of Python's numbers may not fit any one type of numpy's
        bad = np.array([row for row in given.tolist() if not _is_row_id(row)], dtype=object)
    if len(bad):
        raise InvalidArgument(
            f"row_ids must be whole numbers from 0 to 2**64 - 1, not {bad[0]!r}",
            remedy="Row ids are those that knn and search return",
            parameter="row_ids",
            value=bad[0],
        )
    return given.astype(np.uint64)


def _is_row_id(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < 2**64


def _defaults(manifest: Manifest) -> SearchOptions:
    if manifest.recall is not None:
        return manifest.recall.defaults
    lists = manifest.spec.num_partitions
    hnsw = "HNSW" in manifest.spec.factory and not lists
    return SearchOptions(
        nprobe=min(_FALLBACK_NPROBE, lists) if lists else None,
        ef=_FALLBACK_EF if hnsw else None,
        k_factor=_FALLBACK_K_FACTOR if manifest.spec.refine is not None else None,
    )


def _default_recall(manifest: Manifest) -> float | None:
    if manifest.recall is None:
        return None
    measured = {point.options: point.recall for point in manifest.recall.points}
    return measured.get(manifest.recall.defaults)


def _imbalance(sizes: Int64Array) -> float | None:
    mean = float(sizes.mean()) if len(sizes) else 0.0
    return float(sizes.max()) / mean if mean else None
