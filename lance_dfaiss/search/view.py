"""A generation in RAM, answering for one dataset version; never changes, so threads share it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..engine import Mask, Model, Segment, empty_segment, flat_segment, prepare
from ..errors import InvalidArgument, StorageError, TailTooLarge
from ..lance_io import ColumnsInMemory, PinnedDataset
from ..merge import merge_topk, order_ties
from ..spec import SearchOptions
from ..types import MISSING_ROW_ID, Float32Array, Int64Array, Metric, UInt64Array
from .filters import FilterCache, Matches, entry_bytes, match_addresses
from .load import Generation, LoadedSegment
from .places import RunMap, split_addresses
from .portion import Portion
from .resolve import Resolution
from .tail import Tail, TailLimits
from .trace import Stage, Trace
from .widths import Widths, chosen_widths, default_widths, stored_defaults

__all__ = ["Selection", "Sift", "View"]

Sift = Callable[[str], UInt64Array]
"""From a filter to the addresses of the live rows that match, uint64 ``(n,)``."""

# Matches that are searched one by one, by the bytes of their vectors: about a tenth of a millisecond a query.
_EXACT_BYTES = 8 * 1024 * 1024

# Rounding of a distance, as a share of the radius or of 1.
_RADIUS_SPARE = 2.0**-22

# Lists to search grow with this power of how many times fewer rows match. Measured on embeddings (384 dimensions) and
# a synthetic set (128): 0.25 is what keeps the recall there is without a filter, down to one row in 300.
_WIDER = 0.3

# Codes rank rows that are further away less well: so many times more candidates make up for it.
_MORE_CANDIDATES = 2

# Rows decoded at a time where a graph cannot reach all that match.
_BLOCK_ROWS = 65_536


class Part(NamedTuple):
    """One segment, and what may be returned from it.

    ``row_ids`` are those of its positions; None where the snapshot has them, from position ``first`` on.
    ``is_tail`` tells rows outside the index from those in it.
    """

    first: int
    segment: Segment
    mask: Mask | None
    rows: int
    row_ids: UInt64Array | None
    is_tail: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What one search looks at.

    Parameters
    ----------
    parts : tuple of Part
        Segments with something to return.
    rows : int
        Rows that may be returned.
    share : float
        How many of the rows match the filter, 0 to 1; 1 without one.
    filtered : bool
        Whether there is a filter: then a query is never content with fewer rows than match.
    """

    parts: tuple[Part, ...]
    rows: int
    share: float
    filtered: bool


class View:
    """A generation at one version.

    Parameters
    ----------
    pinned : PinnedDataset
        The version.
    generation : Generation
        Documents.
    resolution : Resolution
        Of the generation at the version, in the order of the segments.
    loaded : sequence of LoadedSegment
        Its shards.
    limits : TailLimits
        What a search may read beside the index.
    columns : ColumnsInMemory or None
        Filter columns in RAM.
    before : View, optional
        What it has read of the tail is not read again.
    model : Model, optional
        Of the generation; may be left out where there are segments.
    portion : Portion, optional
        The part of the index that it answers for.
    sift : callable, optional
        Evaluates filters in place of the dataset.
    """

    def __init__(
        self,
        pinned: PinnedDataset,
        generation: Generation,
        resolution: Resolution,
        loaded: Sequence[LoadedSegment],
        limits: TailLimits,
        *,
        columns: ColumnsInMemory | None = None,
        before: View | None = None,
        model: Model | None = None,
        portion: Portion | None = None,
        sift: Sift | None = None,
    ) -> None:
        self.pinned = pinned
        self.generation = generation
        self.resolution = resolution
        self.snapshot = resolution.snapshot
        self.loaded = tuple(loaded)
        self.metric: Metric = generation.manifest.spec.metric
        self.portion = portion
        if loaded:
            model = loaded[0].segment.model
        assert model is not None, "a view without segments is given its model"
        self.model = model
        # What the type can do is asked of a segment, also where there is none.
        self._kind = loaded[0].segment if loaded else empty_segment(model)
        self.tail: Tail = Tail(
            pinned,
            resolution.column,
            self.metric,
            self.snapshot.tail,
            limits,
            name=generation.manifest.name,
            # Vectors under cosine are of unit length, and zero vectors are left out: of use to no other metric.
            before=None if before is None or before.metric != self.metric else before.tail,
        )
        self.family = self._kind.capability.family
        self.defaults: SearchOptions = stored_defaults(generation.manifest)
        """Widths of a search that names none."""
        self.default_widths: Widths = default_widths(self.defaults)
        self._columns = columns
        self._sift = sift
        self._filters = FilterCache()
        self._indexed = self._indexed_parts()
        self._everything: Selection | None = None
        self._indexed_only = Selection(self._indexed, self.snapshot.live_rows, 1.0, filtered=False)

    @property
    def rows(self) -> int:
        """Rows of the version that can be found, as far as is known before the tail is read."""
        return self.snapshot.live_rows + self.tail.rows

    @property
    def rows_by_group(self) -> tuple[int, ...]:
        """Rows that can be found, of each group; only its own without a portion."""
        return self.resolution.rows_by_group

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the files of the shards that it answers for, in the manifest's order."""
        records = self.generation.records
        return tuple(r.index.name for r in records if self.portion is None or self.portion.owns(r))

    @functools.cached_property
    def fragment_ids(self) -> tuple[int, ...]:
        """Fragments with rows that it answers for, increasing: where a filter has to be evaluated."""
        indexed = split_addresses(self.snapshot.places.runs[1])[0]
        return tuple(sorted({*np.unique(indexed).tolist(), *(part.fragment_id for part in self.snapshot.tail)}))

    @property
    def ram_bytes(self) -> int:
        """Bytes of segments, masks, maps, tail and cached filters."""
        masks = sum(part.mask.ram_bytes for part in self._indexed if part.mask is not None)
        maps = self.snapshot.places.ram_bytes
        if self.snapshot.row_ids is not self.snapshot.places:
            maps += self.snapshot.row_ids.ram_bytes
        segments = sum(loaded.segment.ram_bytes for loaded in self.loaded)
        filters = self._filters.ram_bytes + (0 if self._columns is None else self._columns.ram_bytes)
        return segments + masks + maps + self.snapshot.live.nbytes + self.tail.ram_bytes + filters

    def widths(self, nprobe: int | None, ef: int | None, k_factor: int | None) -> Widths:
        """Return how far a search looks that names some widths, or none.

        Raises
        ------
        InvalidArgument
            If one is out of range, or means nothing to this index.
        """
        if nprobe is None and ef is None and k_factor is None:
            return self.default_widths
        asked = SearchOptions(nprobe=nprobe, ef=ef, k_factor=k_factor)
        return chosen_widths(self.generation.manifest.spec, self.family, self.default_widths, asked)

    def fetch(self, row_ids: UInt64Array, columns: list[str] | dict[str, str] | None) -> pa.Table:
        """Read columns of rows, in the order given.

        Parameters
        ----------
        row_ids : numpy.ndarray
            uint64 ``(n,)``, of live rows of the version.
        columns : list or dict or None
            Names, or names and SQL expressions; None for all.

        Raises
        ------
        InvalidArgument
            If Lance can make no sense of an expression.
        UnknownColumn
            If a column does not exist.
        """
        try:
            return self.pinned.fetch(row_ids, columns)
        except StorageError as exc:
            if columns is None or not _is_projection_error(exc.__cause__, columns):
                raise
            raise InvalidArgument(
                f"these columns cannot be fetched: {exc.message}",
                remedy="Name columns of the dataset, or give SQL expressions over them",
                parameter="columns",
                value=columns,
            ) from exc

    @functools.cached_property
    def positions_of_row_ids(self) -> RunMap:
        """The live positions by row id; built when first asked for."""
        positions = np.flatnonzero(self.snapshot.live)
        return RunMap.of_rows(positions, self.snapshot.row_ids.numbers(positions))

    def select(self, filter_sql: str | None, *, include_tail: bool, trace: Trace | None = None) -> Selection:
        """Return what a search looks at.

        Parameters
        ----------
        filter_sql : str or None
            Only rows that match.
        include_tail : bool
            Rows outside the index too.
        trace : Trace, optional
            Told what was done.

        Raises
        ------
        InvalidFilter, UnknownColumn
            If Lance cannot use the filter.
        TailTooLarge
            If the tail is over the limits.
        """
        if filter_sql is not None:
            return self._filtered(filter_sql, include_tail, trace)
        if not include_tail or not self.tail.rows:
            return self._indexed_only
        if self._everything is None:
            tail = self._tail_part(None)
            parts = self._indexed if tail is None else (*self._indexed, tail)
            # Always the same object: requests of one selection are searched together.
            self._everything = Selection(parts, sum(part.rows for part in parts), 1.0, filtered=False)
        return self._everything

    def cached(self, filter_sql: str | None, include_tail: bool) -> Selection | None:
        """Return what `select` would, if that is known already; reads and computes nothing.

        Parameters
        ----------
        filter_sql, include_tail
            As for `select`.

        Returns
        -------
        Selection or None
            None where the filter is to be evaluated, or the tail to be read.
        """
        if filter_sql is not None:
            return cast("Selection | None", self._filters.get(self._filter_key(filter_sql, include_tail)))
        if include_tail and self.tail.rows and not self.tail.is_loaded:
            return None
        return self.select(None, include_tail=include_tail)

    def prepare(self) -> None:
        """Read the tail, so that the first search need not; one over the limits is left to the search that wants it."""
        with suppress(TailTooLarge):
            self.tail.load(self.model)

    def result_addresses(self, row_ids: UInt64Array) -> UInt64Array:
        """Return where rows lie in the dataset.

        Parameters
        ----------
        row_ids : numpy.ndarray
            uint64 ``(n,)``, of rows that a search of this view has found.

        Returns
        -------
        numpy.ndarray
            uint64 ``(n,)``: row addresses.

        Raises
        ------
        InvalidArgument
            If a row is none of this view's.
        """
        if self.snapshot.row_ids is self.snapshot.places and not self.pinned.stable_row_ids:
            return row_ids  # they are the addresses
        positions = self.positions_of_row_ids.positions(row_ids)
        addresses = self.snapshot.places.numbers(positions)
        outside = positions < 0
        if outside.any():
            tail = self.tail.load(self.model)
            addresses[outside] = tail.addresses[tail.places(row_ids[outside])]
        return addresses

    def knn(
        self, queries: Float32Array, k: int, widths: Widths, selection: Selection, trace: Trace | None = None
    ) -> tuple[Float32Array, UInt64Array]:
        """Return as many results as there can be.

        Parameters
        ----------
        queries : numpy.ndarray
            float32 ``(n_queries, dim)``, C-contiguous; not changed.
        k : int
            Results per query.
        widths : Widths
            How far to look.
        selection : Selection
            Where.
        trace : Trace, optional
            Told what was done.

        Returns
        -------
        tuple of (numpy.ndarray, numpy.ndarray)
            Lance's distances float32 and row ids uint64, ``(n_queries, min(k, rows))``, but one column at least;
            +inf and `MISSING_ROW_ID` where there is none.
        """
        if self.metric == "cosine":
            queries = prepare(queries.copy(), "cosine")  # they may lie in the caller's memory
        wide = self._widened(widths, selection)
        distances, row_ids = self._scan(selection, queries, k, wide, trace)
        if (widths.fixed and not selection.filtered) or not (row_ids[:, -1] == MISSING_ROW_ID).any():
            return distances, row_ids
        # So few of the rows that were met may be returned that some queries found too little: look everywhere.
        for again in (self._everywhere, self._exhaust):
            short = np.count_nonzero(row_ids != MISSING_ROW_ID, axis=1) < min(k, selection.rows)
            if not short.any():
                break
            some = np.ascontiguousarray(queries[short])
            distances[short], row_ids[short] = again(selection, some, k, widths, trace)
        return distances, row_ids

    def within(
        self, query: Float32Array, radius: float, nprobe: int | None, selection: Selection, trace: Trace | None = None
    ) -> tuple[Float32Array, UInt64Array]:
        """Return all rows nearer than a radius.

        Parameters
        ----------
        query : numpy.ndarray
            float32 ``(1, dim)``.
        radius : float
            In Lance's distances.
        nprobe : int or None
            IVF lists to look into; None for all.
        selection : Selection
            Where to look.
        trace : Trace, optional
            Told what was done.

        Returns
        -------
        tuple of (numpy.ndarray, numpy.ndarray)
            Distances float32 and row ids uint64, ``(n,)``, ascending by distance, ties by row id.
        """
        if self.metric == "cosine":
            query = prepare(query.copy(), "cosine")
        # A little wide, as the raw values are rounded other than the distances; those then decide.
        raw_radius = radius if self.metric == "l2" else 1.0 - radius
        spare = _RADIUS_SPARE * max(abs(raw_radius), 1.0) if math.isfinite(raw_radius) else 0.0
        raw_radius += spare if self.metric == "l2" else -spare
        lists = nprobe or max(self.generation.manifest.spec.num_partitions, 1)
        found: list[tuple[Float32Array, UInt64Array]] = []
        if not self._kind.can_range:
            # It says what it needs, also where nothing is left to look at.
            self._kind.range_search(query, raw_radius, nprobe=lists)
        for part in selection.parts:
            with _stage(trace, "scan") as facts:
                _, raw, positions = part.segment.range_search(query, raw_radius, nprobe=lists, mask=part.mask)
                distances = _lance_distances(raw, self.metric)
                inside = distances < np.float64(radius)  # a float would be rounded to a float32
                found.append((distances[inside], self._row_ids(part, positions[inside])))
                facts.update(rows=part.rows, inside=len(found[-1][0]))
        distances = np.concatenate([d for d, _ in found]) if found else np.empty(0, np.float32)
        row_ids = np.concatenate([r for _, r in found]) if found else np.empty(0, np.uint64)
        order = np.lexsort((row_ids, distances))
        return distances[order], row_ids[order]

    def vectors(self, row_ids: UInt64Array) -> Float32Array:
        """Return the vectors of rows as the index holds them, or as the dataset does for those of the tail.

        Parameters
        ----------
        row_ids : numpy.ndarray
            uint64 ``(n,)``.

        Raises
        ------
        InvalidArgument
            If a row can not be found by a search, or the index cannot decode.
        TailTooLarge
            If a row is not in the index, and the tail is over the limits.
        """
        positions = self.positions_of_row_ids.positions(row_ids)
        vectors = np.empty((len(row_ids), self.model.spec.dim), dtype=np.float32)
        for part in self._indexed:
            mine = (positions >= part.first) & (positions < part.first + part.segment.positions)
            if mine.any():
                vectors[mine] = part.segment.reconstruct(positions[mine] - part.first)
        outside = positions < 0
        if outside.any():
            vectors[outside] = self._tail_vectors(row_ids[outside])
        return vectors

    def holds(self, row_ids: UInt64Array) -> NDArray[np.bool_]:
        """Tell which rows this view answers for, bool ``(n,)``.

        Parameters
        ----------
        row_ids : numpy.ndarray
            uint64 ``(n,)``.

        Raises
        ------
        TailTooLarge
            If a row is not in the index, and the tail is over the limits.
        """
        here = self.positions_of_row_ids.positions(row_ids) >= 0
        if self.tail.rows and not here.all():
            here |= np.isin(row_ids, self.tail.load(self.model).row_ids)
        return here

    def _tail_vectors(self, row_ids: UInt64Array) -> Float32Array:
        tail = self.tail.load(self.model)
        places = tail.places(row_ids)
        assert tail.segment is not None  # it holds these rows
        return tail.segment.reconstruct(places)

    def _indexed_parts(self) -> tuple[Part, ...]:
        parts, first = [], 0
        for loaded in self.loaded:
            segment = loaded.segment
            live = self.snapshot.live[first : first + segment.positions]
            rows = int(np.count_nonzero(live))
            # A list holds no skipped rows, so it needs no mask for them; a table of codes does.
            every_entry = segment.capability.family == "ivf" and not self.snapshot.masked_rows
            mask = None if every_entry or rows == segment.positions else Mask(live)
            if rows:
                parts.append(Part(first, segment, mask, rows, None))
            first += segment.positions
        return tuple(parts)

    def _tail_part(self, matches: Matches | None) -> Part | None:
        tail = self.tail.load(self.model)
        if tail.segment is None:
            return None
        if matches is None:
            return Part(0, tail.segment, None, tail.rows, tail.row_ids, is_tail=True)
        at = np.searchsorted(matches.addresses, tail.addresses)
        inside = at < len(matches.addresses)
        inside[inside] = matches.addresses[at[inside]] == tail.addresses[inside]
        rows = int(np.count_nonzero(inside))
        return Part(0, tail.segment, Mask(inside), rows, tail.row_ids, is_tail=True) if rows else None

    def _filtered(self, filter_sql: str, include_tail: bool, trace: Trace | None) -> Selection:
        key = self._filter_key(filter_sql, include_tail)
        found = cast("Selection | None", self._filters.get(key))
        with _stage(trace, "filter") as facts:
            cached = found is not None
            if found is None:
                found, ram_bytes = self._evaluated(filter_sql, include_tail)
                self._filters.put(key, found, ram_bytes + entry_bytes(filter_sql))
            facts.update(matches=found.rows, cached=cached)
        return found

    def _filter_key(self, filter_sql: str, include_tail: bool) -> tuple[str, bool]:
        return filter_sql, include_tail and bool(self.tail.rows)

    def _matching(self, filter_sql: str) -> UInt64Array:
        if self._sift is not None:
            return self._sift(filter_sql)
        addresses = None if self._columns is None else self._columns.matching(filter_sql)
        if addresses is not None:
            return addresses
        return self.pinned.matching(filter_sql, None if self.portion is None else self.fragment_ids)

    def _evaluated(self, filter_sql: str, include_tail: bool) -> tuple[Selection, int]:
        addresses = self._matching(filter_sql)
        matches = match_addresses(addresses, self.snapshot.places, self.snapshot.live)
        tail = self._tail_part(matches) if include_tail and self.tail.rows else None
        marks = matches.mask(len(self.snapshot.live))
        parts, ram_bytes = self._matching_parts(marks, matches.rows)
        rows = matches.rows + (0 if tail is None else tail.rows)
        if tail is not None:
            parts.append(tail)
            ram_bytes += 0 if tail.mask is None else tail.mask.ram_bytes
        total = max(self.snapshot.live_rows, 1)
        return Selection(tuple(parts), rows, min(matches.rows / total, 1.0), filtered=True), ram_bytes

    def _matching_parts(self, marks: NDArray[np.bool_], rows: int) -> tuple[list[Part], int]:
        """Return the indexed rows that match: as vectors of their own when they are few, else by masks."""
        chosen = [(part, marks[part.first : part.first + part.segment.positions]) for part in self._indexed]
        chosen = [(part, some) for part, some in chosen if some.any()]
        length_bytes = rows * self.model.spec.dim * 4
        if chosen and length_bytes <= _EXACT_BYTES and all(part.segment.can_decode for part, _ in chosen):
            held = [(part, np.flatnonzero(some)) for part, some in chosen]
            decoded = [part.segment.reconstruct(positions) for part, positions in held]
            vectors = decoded[0] if len(decoded) == 1 else np.concatenate(decoded)  # megabytes: not copied for nothing
            row_ids = np.concatenate([self._row_ids(part, positions) for part, positions in held])
            return [Part(0, flat_segment(self.model, vectors), None, rows, row_ids)], length_bytes + row_ids.nbytes
        parts = [Part(part.first, part.segment, Mask(some), int(np.count_nonzero(some)), None) for part, some in chosen]
        return parts, sum(part.mask.ram_bytes for part in parts if part.mask is not None)

    def _widened(self, widths: Widths, selection: Selection) -> Widths:
        """Return widths for a filter: the nearest matches lie the further away, the fewer there are.

        With a share s of the rows matching, the nearest k matches are about the nearest k/s rows. Neighbours that
        many times further down the ranking are spread over more lists, but far fewer than 1/s times as many.
        """
        if selection.share >= 1 or widths.fixed:
            return widths
        fewer = 1 / max(selection.share, 1e-9)
        wider = fewer**_WIDER
        lists = max(self.generation.manifest.spec.num_partitions, 1)
        return widths._replace(
            nprobe=min(int(np.ceil(widths.nprobe * wider)), lists),
            ef=int(np.ceil(widths.ef * fewer)),
            k_factor=int(np.ceil(widths.k_factor * min(wider, _MORE_CANDIDATES))),
        )

    def _everywhere(
        self, selection: Selection, queries: Float32Array, k: int, widths: Widths, trace: Trace | None
    ) -> tuple[Float32Array, UInt64Array]:
        lists, positions = self.generation.manifest.spec.num_partitions, len(self.snapshot.live)
        with _stage(trace, "widen") as facts:
            facts.update(queries=len(queries), lists=lists)
            everywhere = Widths(max(lists, 1), max(positions, 1), widths.k_factor, fixed=True)
            return self._scan(selection, queries, k, everywhere, None)

    def _exhaust(
        self, selection: Selection, queries: Float32Array, k: int, widths: Widths, trace: Trace | None
    ) -> tuple[Float32Array, UInt64Array]:
        """Compare with every row of the selection: a graph does not lead to all that match."""
        answers = []
        with _stage(trace, "exhaust") as facts:
            for part in selection.parts:
                if not part.segment.can_decode:
                    answers.append(self._scan_part(part, queries, k, widths))
                    continue
                positions = self._members(part)
                for start in range(0, len(positions), _BLOCK_ROWS):
                    some = positions[start : start + _BLOCK_ROWS]
                    vectors = flat_segment(self.model, part.segment.reconstruct(some))
                    block = Part(0, vectors, None, len(some), self._row_ids(part, some))
                    answers.append(self._scan_part(block, queries, k, widths))
            facts.update(queries=len(queries), rows=selection.rows)
        return merge_topk(answers, min(k, max(selection.rows, 1)))

    def _members(self, part: Part) -> Int64Array:
        everything = np.arange(part.segment.positions, dtype=np.int64)
        return everything if part.mask is None else everything[part.mask.allows(everything)]

    def _scan(
        self, selection: Selection, queries: Float32Array, k: int, widths: Widths, trace: Trace | None
    ) -> tuple[Float32Array, UInt64Array]:
        most = min(k, max(selection.rows, 1))
        if not selection.parts:
            shape = (len(queries), most)
            return np.full(shape, np.inf, dtype=np.float32), np.full(shape, MISSING_ROW_ID, dtype=np.uint64)
        answers = []
        for part in selection.parts:
            if trace is None:
                answers.append(self._scan_part(part, queries, k, widths))
                continue
            self._trace_probe(part, queries, widths, trace)
            with trace.stage("tail" if part.is_tail else "scan") as facts:
                answers.append(self._scan_part(part, queries, k, widths))
                facts.update(rows=part.rows, masked=part.segment.positions - part.rows)
        if len(answers) == 1 and answers[0][0].shape[1] == most:
            return order_ties(*answers[0])
        return merge_topk(answers, most)

    def _scan_part(self, part: Part, queries: Float32Array, k: int, widths: Widths) -> tuple[Float32Array, UInt64Array]:
        # As wide as the caller's k asks for, also where fewer rows are left.
        ef = max(widths.ef, k * widths.k_factor)
        raw, positions = part.segment.search(
            queries, min(k, part.rows), nprobe=widths.nprobe, ef=ef, k_factor=widths.k_factor, mask=part.mask
        )
        # FAISS fills up with -1, always at the end of a query's results.
        missing = positions < 0 if (positions[:, -1] < 0).any() else None
        row_ids = self._row_ids(part, positions)
        distances = _lance_distances(raw, self.metric)
        if missing is not None:
            distances[missing] = np.inf
            row_ids[missing] = MISSING_ROW_ID
        return distances, row_ids

    def _row_ids(self, part: Part, positions: Int64Array) -> UInt64Array:
        if part.row_ids is not None:
            return part.row_ids[positions]
        return self.snapshot.row_ids.numbers(positions + part.first if part.first else positions)

    def _trace_probe(self, part: Part, queries: Float32Array, widths: Widths, trace: Trace) -> None:
        probed = part.segment.probe(queries, widths.nprobe, ef=widths.ef)
        if probed.lists is not None:
            facts = {"lists_probed": int(probed.lists.size), "positions_scanned": int(probed.rows_scanned.sum())}
            trace.stages.append(Stage(name="coarse", seconds=probed.seconds, facts=facts))


def _lance_distances(raw: Float32Array, metric: Metric) -> Float32Array:
    """Turn FAISS's values into Lance's, in place."""
    return np.maximum(raw, 0, out=raw) if metric == "l2" else np.subtract(1, raw, out=raw)


class _NoStage:
    """Stands in for a stage when nobody wants to know."""

    def __enter__(self) -> dict[str, Any]:
        return {}

    def __exit__(self, *exc: object) -> None:
        return None


def _stage(trace: Trace | None, name: str) -> Any:
    return _NoStage() if trace is None else trace.stage(name)


def _is_projection_error(cause: BaseException | None, columns: list[str] | dict[str, str]) -> bool:
    """Tell whether Lance refused the columns, or failed to compute an expression, rather than to read."""
    if not isinstance(cause, ValueError):
        return False
    # Lance raises one class for all of it; only its words tell a division by zero from a missing file.
    return "Invalid user input" in str(cause) or (isinstance(columns, dict) and "LanceError(Arrow)" in str(cause))
