"""`open_index` and the `Index` it returns: a generation in RAM, answering for one dataset version."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import InvalidArgument
from ..lance_io import ColumnsInMemory, LanceDataset, PinnedDataset, open_dataset
from ..manifest import Manifest, SkipCounts
from ..pointers import find_pointer
from ..progress import PhaseMeter, Progress, SilentProgress
from ..spec import SearchOptions
from ..storage import ChunkCache, open_cache
from ..types import (
    MISSING_ROW_ID,
    Float32Array,
    Int64Array,
    UInt64Array,
)
from ..vectors import as_queries
from .arguments import (
    MAX_RESULTS,
    checked_columns,
    checked_filter,
    checked_filter_columns,
    checked_k,
    checked_radius,
    checked_row_ids,
    padded,
    too_many_results,
)
from .load import Generation, in_order, is_model_of, load_model_of, load_segments, read_generation, reusable
from .portion import Portion
from .resolve import resolve_generation
from .tables import columns_with_vectors, result_table
from .tail import MAX_TAIL_BYTES, MAX_TAIL_ROWS, TailLimits
from .trace import Explanation, Trace
from .view import Sift, View

__all__ = ["Index", "IndexStats", "open_index", "open_view"]

_log = logging.getLogger(__name__)


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
        Rows with an entry, those deleted or changed since, and those that can be found in the index.
    mapped_rows : int
        Live rows that compactions moved to other fragments than they were indexed from.
    unsaved_rows : int
        Those whose way no file of the index tells: `sync_index` writes it down, before Lance's cleanup loses it.
    tail_rows : int
        Rows of the version that are not indexed, and are searched one by one.
    skipped : SkipCounts
        Rows without an entry, by reason.
    shards, segments : int
        Shards stored, and FAISS indexes they became in RAM.
    ram_bytes : int
        Codes, ids, graph, centroids, masks, row-id runs, tail and filters in use, once the index is open. While it
        opens, about the largest shard is in RAM beside them, and what the allocator keeps between.
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
    mapped_rows: int
    unsaved_rows: int
    tail_rows: int
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
    filter_columns: Sequence[str] = (),
    max_tail_rows: int = MAX_TAIL_ROWS,
    max_tail_bytes: int = MAX_TAIL_BYTES,
    index_uri: str | None = None,
    allowed_index_uris: Sequence[str] = (),
    storage_options: Mapping[str, str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    progress: Progress | None = None,
) -> Index:
    """Load an index into RAM, for the dataset version that the handle is at.

    Parameters
    ----------
    dataset : str, path or lance.LanceDataset
        The dataset; a string opens the newest version.
    name : str, optional
        Index name; may be left out when the dataset has one index.
    filter_columns : sequence of str
        Columns to keep in RAM, so that filters over them need not read the dataset.
    max_tail_rows, max_tail_bytes : int
        Rows outside the index, and bytes of their vectors as float32, that a search reads into RAM at the most.
    index_uri : str, optional
        Where an index of a dataset that cannot be written was built; it is trusted.
    allowed_index_uris : sequence of str
        Places outside the dataset that its pointer may lead to.
    storage_options : mapping, optional
        For a dataset given by URI.
    cache_dir : str or path, optional
        A folder on this machine that keeps the index files which are read, so that opening them again, in this
        process or another, reads only the manifest from the store. What it holds is verified like the rest; if it
        cannot be used, that is logged and the store is read.
    cache_bytes : int, optional
        What that folder may hold; 16 GiB by default. What was used longest ago makes room.
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
        If this version does not have the vector column any more.
    UnknownColumn
        If a filter column does not exist.
    UntrustedLocation
        If the pointer leads to a place that was not allowed.
    InvalidArgument
        If a limit is no number, or the cache is no folder of this machine.
    """
    cache = open_cache(cache_dir, cache_bytes)
    held = checked_filter_columns(filter_columns)
    limits = TailLimits(
        rows=_limit("max_tail_rows", max_tail_rows), length_bytes=_limit("max_tail_bytes", max_tail_bytes)
    )
    pinned = PinnedDataset(open_dataset(dataset, storage_options=storage_options), storage_options)
    found = find_pointer(pinned, name, index_uri)
    allowed = tuple(allowed_index_uris) + (() if index_uri is None else (index_uri,))
    generation = read_generation(pinned, found, allowed, cache=cache)
    columns = ColumnsInMemory(pinned, held) if held else None
    view = open_view(pinned, generation, limits, columns=columns, progress=progress)
    _log.info("index %r: generation %s open at version %d", found.name, generation.manifest.generation, pinned.version)
    if cache is not None:
        kept, read = cache.hit_bytes, cache.missed_bytes
        _log.info("index %r: %d bytes came from the cache, %d from the store", found.name, kept, read)
    return Index(view, limits, index_uri=index_uri, allowed=allowed, columns=columns, cache=cache)


def open_view(
    pinned: PinnedDataset,
    generation: Generation,
    limits: TailLimits,
    *,
    columns: ColumnsInMemory | None = None,
    before: View | None = None,
    progress: Progress | None = None,
    portion: Portion | None = None,
    sift: Sift | None = None,
) -> View:
    """Resolve a generation at a version, and load the shards that are not in RAM yet.

    With a portion, only its shards are loaded, and only its rows are answered for. A segment in RAM that also holds
    shards which another portion owned is used again where at least half of its positions are still wanted.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    generation : Generation
        Its documents.
    limits : TailLimits
        What a search may read beside the index.
    columns : ColumnsInMemory, optional
        Filter columns of this version.
    before : View, optional
        Of another version or generation of the same index; what both have is shared.
    progress : Progress, optional
        Listener.
    portion : Portion, optional
        The part of the index to answer for; all by default.
    sift : callable, optional
        Evaluates filters: from SQL to the addresses, uint64 ``(n,)``, of the live rows that match; those of other
        fragments than ``View.fragment_ids`` may be left out. By default the dataset does.
    """
    if portion is not None:
        portion.check(generation.records)
    owns = None if portion is None else portion.owns
    held = [] if before is None else reusable(generation, before.loaded, owns)
    records = in_order(generation, held, owns)
    resolution = resolve_generation(
        pinned, generation, records=records, before=None if before is None else before.resolution, portion=portion
    )
    waiting = records[sum(len(loaded.shards) for loaded in held) :]
    meter = PhaseMeter(
        SilentProgress() if progress is None else progress,
        "load",
        sum(record.cover.physical_rows for record in waiting),
    )
    model = None if before is None or not is_model_of(generation, before.model) else before.model
    if model is None and not records:
        model = load_model_of(generation)
    loaded = load_segments(generation, meter, held, owns=owns, model=model)
    meter.finish()
    if resolution.unsaved_rows and (before is None or not before.resolution.unsaved_rows):
        _log.warning(
            "index %r: where compactions moved %d of its rows is not written down; run sync_index before old versions"
            " of the dataset are cleaned up",
            generation.manifest.name,
            resolution.unsaved_rows,
        )
    return View(
        pinned,
        generation,
        resolution,
        loaded,
        limits,
        columns=columns,
        before=before,
        model=model,
        portion=portion,
        sift=sift,
    )


class Index:
    """A FAISS index in RAM over one version of a dataset. Made by `open_index`; safe to use from many threads.

    The same query gets the same answer until `refresh` moves it to another version.
    """

    def __init__(
        self,
        view: View,
        limits: TailLimits | None = None,
        *,
        index_uri: str | None = None,
        allowed: Sequence[str] = (),
        columns: ColumnsInMemory | None = None,
        cache: ChunkCache | None = None,
    ) -> None:
        self._view = view
        self._limits = TailLimits() if limits is None else limits
        self._index_uri = index_uri
        self._allowed = tuple(allowed)
        self._columns = columns
        self._cache = cache
        self._moving = threading.Lock()

    def __repr__(self) -> str:
        view = self._view
        spec = view.generation.manifest.spec
        return (
            f"Index({self.name!r}, {spec.factory!r}, {spec.metric!r}, rows={view.rows}, version={view.pinned.version})"
        )

    def __len__(self) -> int:
        """Count the rows that can be found, those outside the index included."""
        return self._view.rows

    @property
    def view(self) -> View:
        """What it answers from, now."""
        return self._view

    @property
    def name(self) -> str:
        """Name of the index."""
        return self._view.generation.manifest.name

    @property
    def manifest(self) -> Manifest:
        """What was built, as stored."""
        return self._view.generation.manifest

    @property
    def version(self) -> int:
        """Dataset version that answers are true to."""
        return self._view.pinned.version

    def refresh(self) -> bool:
        """Move to the newest version of the dataset and the index's newest generation.

        Only what is new is read: shards that are not in RAM, rows added to the tail, deletions that changed.
        Searches that run meanwhile finish on the version they began with.

        Returns
        -------
        bool
            Whether there was anything newer.

        Raises
        ------
        IndexNotFound, CorruptIndex, DatasetChanged, UntrustedLocation
            As `open_index` does; the index stays where it was.
        """
        with self._moving:
            view = self._view
            newest = view.pinned.latest()
            found = find_pointer(newest, self.name, self._index_uri)
            generation = view.generation
            if found.text != generation.found.text:
                generation = read_generation(newest, found, self._allowed, cache=self._cache)
            elif (newest.version, newest.committed_at) == (view.pinned.version, view.pinned.committed_at):
                return False
            columns = None if self._columns is None else self._columns.at(newest)
            # In one step: a search takes the view once, and all it needs from that.
            self._view = open_view(newest, generation, self._limits, columns=columns, before=view)
            self._columns = columns
            _log.debug(
                "index %r: now at version %d, generation %s", self.name, newest.version, generation.manifest.generation
            )
            return True

    def knn(
        self,
        queries: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
    ) -> tuple[Float32Array, UInt64Array]:
        """Find the nearest rows, as arrays.

        Parameters
        ----------
        queries : array-like
            ``(dim,)`` or ``(n_queries, dim)``, any number type.
        k : int
            Results per query; ``n_queries * k`` at most 2**31.
        filter : str, optional
            Lance's SQL: only rows that match are looked for, and ``min(k, matches)`` are found. Few matches are
            compared one by one; for many, wider searches make up for what does not match.
        nprobe : int, optional
            IVF lists to search; more is slower and finds more. Default: measured when the index was built,
            and all of them for a query that would get fewer than ``min(k, live rows)`` results.
        ef : int, optional
            HNSW search width.
        k_factor : int, optional
            Candidates per result that are re-ranked from the refine store.
        include_tail : bool
            Search rows that are not indexed yet too, exactly.
        fast_search : bool
            Lance's name for leaving them out.

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
        InvalidFilter, UnknownColumn
            If Lance cannot use the filter; its message is kept.
        TailTooLarge
            If more rows are not indexed than the index was opened to read.
        """
        view = self._view
        array, _ = as_queries(queries, view.model.spec.dim, view.metric)
        k = checked_k(k)
        if len(array) * k > MAX_RESULTS:
            raise too_many_results(len(array), k)
        widths = view.widths(nprobe, ef, k_factor)
        selection = view.select(checked_filter(filter), include_tail=include_tail and not fast_search)
        distances, row_ids = view.knn(array, k, widths, selection)
        return (distances, row_ids) if distances.shape[1] == k else padded(distances, row_ids, k)

    def search(
        self,
        query: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        with_vectors: bool = False,
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
        filter, nprobe, ef, k_factor, include_tail, fast_search
            As for `knn`.
        with_vectors : bool
            Fetch the vector column too, whatever ``columns`` says.

        Returns
        -------
        pyarrow.Table
            The columns, ``_distance`` and ``_rowid``, ascending by distance; for a batch ``query_index``
            first. Fewer rows than k where there are no more.

        Raises
        ------
        InvalidQuery, InvalidArgument, InvalidFilter, TailTooLarge
            As for `knn`, though k may be any number; and if the columns are no list of different names, or
            Lance cannot make sense of an expression.
        UnknownColumn
            If a column does not exist.
        """
        view = self._view
        array, single = as_queries(query, view.model.spec.dim, view.metric)
        widths = view.widths(nprobe, ef, k_factor)
        wanted = columns_with_vectors(view.resolution.column.name, checked_columns(columns), with_vectors)
        k = checked_k(k)
        if len(array) * min(k, max(view.rows, 1)) > MAX_RESULTS:
            raise too_many_results(len(array), k)
        selection = view.select(checked_filter(filter), include_tail=include_tail and not fast_search)
        distances, row_ids = view.knn(array, k, widths, selection)
        return _table(view, distances, row_ids, wanted, single=single)

    def range_search(
        self,
        query: Any,
        radius: float,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        nprobe: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
        with_vectors: bool = False,
    ) -> pa.Table:
        """Find every row nearer than a radius.

        Parameters
        ----------
        query : array-like
            ``(dim,)``.
        radius : float
            In the values of ``_distance``: squared L2, 1 - cosine, 1 - dot. A row is inside when its distance, by
            the best codes the index has, is smaller.
        nprobe : int, optional
            IVF lists to search; all by default, so that nothing is missed.
        filter, columns, include_tail, fast_search, with_vectors
            As for `search`.

        Returns
        -------
        pyarrow.Table
            As `search` returns it for one query.

        Raises
        ------
        InvalidArgument
            If the radius is no number, or not above 0 under l2 and cosine; or if this index keeps no distances to
            compare with a radius (it has neither codes that give them nor a refine store).
        InvalidQuery, InvalidFilter, UnknownColumn, TailTooLarge
            As for `search`.
        """
        view = self._view
        array, single = as_queries(query, view.model.spec.dim, view.metric)
        if not single and len(array) != 1:
            raise InvalidArgument(
                f"range_search takes one query, not {len(array)}",
                remedy="Call it once a query",
                parameter="query",
                value=array.shape,
            )
        view.widths(nprobe, None, None)
        wanted = columns_with_vectors(view.resolution.column.name, checked_columns(columns), with_vectors)
        radius = checked_radius(radius, view.metric)
        selection = view.select(checked_filter(filter), include_tail=include_tail and not fast_search)
        distances, row_ids = view.within(array, radius, nprobe, selection)
        return _table(view, distances[None, :], row_ids[None, :], wanted, single=True)

    def explain(
        self,
        query: Any,
        k: int = 10,
        *,
        filter: str | None = None,
        columns: Sequence[str] | Mapping[str, str] | None = (),
        nprobe: int | None = None,
        ef: int | None = None,
        k_factor: int | None = None,
        include_tail: bool = True,
        fast_search: bool = False,
    ) -> Explanation:
        """Search, and tell what was done: lists probed, positions scanned, rows masked, tail, filter, times.

        Parameters
        ----------
        query, k, filter, columns, nprobe, ef, k_factor, include_tail, fast_search
            As for `search`; no columns are fetched by default.

        Returns
        -------
        Explanation
            Printed, one line a stage.
        """
        view, trace = self._view, Trace()
        array, single = as_queries(query, view.model.spec.dim, view.metric)
        widths = view.widths(nprobe, ef, k_factor)
        wanted = checked_columns(columns)
        k = checked_k(k)
        start = time.perf_counter()
        selection = view.select(checked_filter(filter), include_tail=include_tail and not fast_search, trace=trace)
        distances, row_ids = view.knn(array, k, widths, selection, trace)
        if wanted is None or len(wanted):
            with trace.stage("fetch") as facts:
                facts["rows"] = len(_table(view, distances, row_ids, wanted, single=single))
        snapshot = view.snapshot
        return Explanation(
            index=f"{self.name} ({view.generation.manifest.spec.factory}, {view.metric})",
            version=snapshot.version,
            queries=len(array),
            k=k,
            live_rows=snapshot.live_rows,
            masked_rows=snapshot.masked_rows,
            mapped_rows=snapshot.mapped_rows,
            tail_rows=snapshot.tail_rows,
            results=int(np.count_nonzero(row_ids != MISSING_ROW_ID)),
            seconds=time.perf_counter() - start,
            stages=tuple(trace.stages),
        )

    def reconstruct(self, row_ids: Any) -> Float32Array:
        """Decode the vectors of some rows, as the index holds them.

        Parameters
        ----------
        row_ids : array-like
            uint64 ``(n,)``, each a row that a search can find.

        Returns
        -------
        numpy.ndarray
            float32 ``(n, dim)``: approximations unless the codes are exact, the vectors themselves for rows outside
            the index; of unit length under cosine.

        Raises
        ------
        InvalidArgument
            If these are no row ids, a row was deleted or skipped, or this index cannot decode.
        TailTooLarge
            If a row is not in the index, and more rows are not than it was opened to read.
        """
        return self._view.vectors(checked_row_ids(row_ids))

    def stats(self) -> IndexStats:
        """Return what the index holds, and how good it was measured to be."""
        view = self._view
        manifest, snapshot = view.generation.manifest, view.snapshot
        sizes = [size for size in (loaded.segment.list_sizes() for loaded in view.loaded) if size is not None]
        return IndexStats(
            name=manifest.name,
            index_type=manifest.spec.index_type,
            factory=manifest.spec.factory,
            metric=manifest.spec.metric,
            dim=manifest.spec.dim,
            version=snapshot.version,
            generation=manifest.generation,
            indexed_rows=snapshot.indexed_rows,
            masked_rows=snapshot.masked_rows,
            live_rows=snapshot.live_rows,
            mapped_rows=snapshot.mapped_rows,
            unsaved_rows=view.resolution.unsaved_rows,
            tail_rows=snapshot.tail_rows,
            skipped=manifest.skipped,
            shards=len(manifest.shards),
            segments=len(view.loaded),
            ram_bytes=view.ram_bytes,
            list_imbalance=_imbalance(sum(sizes[1:], sizes[0])) if sizes else None,
            recall=_default_recall(manifest),
            defaults=view.defaults,
        )


def _table(
    view: View,
    distances: Float32Array,
    row_ids: UInt64Array,
    columns: list[str] | dict[str, str] | None,
    *,
    single: bool,
) -> pa.Table:
    fetched = view.fetch(row_ids[row_ids != MISSING_ROW_ID], columns) if columns is None or len(columns) else None
    return result_table(distances, row_ids, fetched, single=single)


def _limit(parameter: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise InvalidArgument(
            f"{parameter} must be a whole number of at least 0, not {value!r}", parameter=parameter, value=value
        )
    return int(value)


def _default_recall(manifest: Manifest) -> float | None:
    if manifest.recall is None:
        return None
    measured = {point.options: point.recall for point in manifest.recall.points}
    return measured.get(manifest.recall.defaults)


def _imbalance(sizes: Int64Array) -> float | None:
    mean = float(sizes.mean()) if len(sizes) else 0.0
    return float(sizes.max()) / mean if mean else None
