"""`dataset()`: a LanceDataset whose vector search goes through this package's indexes.

What is ours is answered from RAM; all else, option by option, goes to Lance untouched. The reason for
going to Lance is logged at DEBUG, one line a search.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import lance
import numpy as np
import pyarrow as pa
from lance.dataset import LanceScanner, serialize_row_addrs

from .build import create_index
from .engine import Segment
from .errors import (
    DatasetChanged,
    InvalidArgument,
    InvalidQuery,
    MissingFile,
    StorageError,
    UnsupportedFormat,
    UntrustedLocation,
)
from .lance_io import LanceDataset, PinnedDataset
from .manage import drop_index
from .pointers import find_pointer
from .progress import PhaseMeter, SilentProgress
from .search import Index
from .search.load import Generation, load_segments, read_generation
from .search.resolve import resolve_generation
from .types import (
    DISTANCE_COLUMN,
    INDEX_TYPES,
    MISSING_ROW_ID,
    POINTER_PREFIX,
    QUERY_INDEX_COLUMN,
    ROW_ID_COLUMN,
    Float32Array,
    UInt64Array,
)
from .vectors import as_queries

__all__ = ["DfaissDataset", "DfaissScanner", "dataset"]

_log = logging.getLogger(__name__)

_ROW_ADDRESS_COLUMN = "_rowaddr"

# Versions of a dataset that stay open; those of one generation share their segments.
_KEPT_VERSIONS = 4
_KEPT_GENERATIONS = 16

_LANCE_K = 10

# Options of a scan that only say how it is done, or mean nothing without a filter.
_HOW = frozenset(
    {
        "batch_size", "batch_size_bytes", "batch_readahead", "fragment_readahead", "scan_in_order", "use_stats",
        "io_buffer_size", "late_materialization", "use_scalar_index", "prefilter",
        # Every row of a version that ours answers for is indexed.
        "fast_search",
    }
)  # fmt: skip
_ANSWERED = frozenset(
    {
        "nearest", "columns", "limit", "offset", "with_row_id", "with_row_address", "strict_batch_size",
        "disable_scoring_autoprojection",
    }
)  # fmt: skip
_NEAREST_KEYS = frozenset(
    {
        "column", "q", "k", "metric", "nprobes", "minimum_nprobes", "maximum_nprobes", "refine_factor", "use_index",
        "ef", "query_parallelism", "approx_mode",
    }
)  # fmt: skip

_SCANNER = inspect.signature(LanceDataset.scanner)
_CREATE = inspect.signature(LanceDataset.create_index)
_OURS = frozenset(inspect.signature(create_index).parameters)

# Keywords of Lance's create_index that say what this package does anyway.
_AGREED = {"filter_nan": True, "train": True}

# Factories whose distances are those of the vectors, so that refining changes nothing.
_EXACT_CODES = re.compile(r"(IVF\d+(_HNSW\d+)?,)?Flat|HNSW\d+(,Flat)?")

_F = TypeVar("_F", bound=Callable[..., Any])


def _signed_like(original: Callable[..., Any]) -> Callable[[_F], _F]:
    """Show Lance's signature in help and to `inspect`, whatever parameters it will have."""

    def sign(method: _F) -> _F:
        return cast("_F", functools.update_wrapper(method, original, assigned=(), updated=()))

    return sign


def _plain(handle: LanceDataset) -> LanceDataset:
    """Return a copy of a handle that is Lance's own class."""
    return cast("LanceDataset", cast("Any", LanceDataset).__copy__(handle))


def dataset(
    uri: str | os.PathLike[str] | LanceDataset | None = None,
    *,
    allowed_index_uris: Sequence[str] = (),
    **options: Any,
) -> DfaissDataset:
    """Open a Lance dataset whose vector search goes through this package's indexes.

    Parameters
    ----------
    uri : str, path or lance.LanceDataset, optional
        The dataset. A handle is copied: the new one moves on its own.
    allowed_index_uris : sequence of str
        Places outside the dataset that its pointers may lead to.
    **options
        As `lance.dataset` takes them: ``version``, ``asof``, ``storage_options``, ``namespace_client``, ...

    Returns
    -------
    DfaissDataset

    Raises
    ------
    InvalidArgument
        If options are given together with a handle.
    ValueError
        From Lance, if there is no dataset there.
    """
    trusted = tuple(allowed_index_uris)
    if not isinstance(uri, LanceDataset):
        path = os.fspath(uri) if isinstance(uri, os.PathLike) else uri
        return DfaissDataset._adopt(lance.dataset(path, **options), _OpenIndexes(trusted))
    if options:
        raise InvalidArgument(
            f"{', '.join(sorted(options))} was given together with an open dataset",
            remedy="Pass its URI instead, or leave the options out",
            parameter=min(options),
            value=options[min(options)],
        )
    return DfaissDataset._adopt(_plain(uri), _OpenIndexes(trusted))


class DfaissDataset(LanceDataset):
    """A `lance.LanceDataset` in every respect, with this package's indexes behind its vector search.

    Made by `dataset`. Copies, checkouts, branches, clones and pickles of it are of this class too.
    """

    _opened: _OpenIndexes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opened = _OpenIndexes(())

    @classmethod
    def _adopt(cls, plain: LanceDataset, opened: _OpenIndexes) -> DfaissDataset:
        """Make a handle of this class from one that Lance made and nobody else has."""
        handle = cls.__new__(cls)
        handle.__dict__.update(plain.__dict__)
        handle._opened = opened
        return handle

    def __copy__(self) -> DfaissDataset:
        return self._adopt(_plain(self), self._opened)

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = cast("Any", super()).__reduce__()
        return _unpickle, (rebuild, arguments, self._opened.trusted)

    @_signed_like(LanceDataset.create_branch)
    def create_branch(self, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Create a branch, as Lance does."""
        return self._adopt(super().create_branch(*args, **kwargs), _OpenIndexes(self._opened.trusted))

    @_signed_like(LanceDataset.shallow_clone)
    def shallow_clone(self, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Clone without copying data, as Lance does; the clone does not get the index files."""
        return self._adopt(super().shallow_clone(*args, **kwargs), _OpenIndexes(self._opened.trusted))

    @_signed_like(LanceDataset.deep_clone)
    def deep_clone(self, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Clone with the data, as Lance does; the clone does not get the index files."""
        return self._adopt(super().deep_clone(*args, **kwargs), _OpenIndexes(self._opened.trusted))

    @staticmethod
    @_signed_like(LanceDataset.commit)
    def commit(*args: Any, **kwargs: Any) -> DfaissDataset:
        """Commit an operation, as Lance does."""
        return DfaissDataset._adopt(LanceDataset.commit(*args, **kwargs), _OpenIndexes(()))

    @staticmethod
    @_signed_like(LanceDataset.commit_batch)
    def commit_batch(*args: Any, **kwargs: Any) -> Any:
        """Commit several transactions, as Lance does."""
        result = LanceDataset.commit_batch(*args, **kwargs)
        result["dataset"] = DfaissDataset._adopt(result["dataset"], _OpenIndexes(()))
        return result

    @classmethod
    def from_pydantic_model(cls, *args: Any, **kwargs: Any) -> DfaissDataset:
        """Write a dataset of pydantic models, as Lance does."""
        return cls._adopt(super().from_pydantic_model(*args, **kwargs), _OpenIndexes(()))

    def create_index(
        self,
        column: str | list[str],
        index_type: str = "AUTO",
        name: str | None = None,
        metric: str = "L2",
        replace: bool = False,
        num_partitions: int | None = None,
        ivf_centroids: Any = None,
        pq_codebook: Any = None,
        num_sub_vectors: int | None = None,
        *more: Any,
        **options: Any,
    ) -> DfaissDataset:
        """Build one of this package's indexes where the call asks for one, else Lance's own.

        Ours is built for ``factory=`` and for the types in `lance_dfaiss.types.INDEX_TYPES`, as long as
        each parameter means something to `lance_dfaiss.create_index`. A parameter that only Lance knows
        (``accelerator``, ``fragment_ids``, ``target_partition_size``, ...), another type (``IVF_HNSW_*``),
        the metric ``hamming`` and a multivector column make it Lance's, with the call as it was.

        Parameters
        ----------
        column : str or list of str
            Vector column.
        index_type : str
            Any case.
        name : str, optional
            The column's name and ``_idx`` by default.
        metric : str
            ``"l2"`` (``"euclidean"``), ``"cosine"`` or ``"dot"``, any case.
        replace : bool
            Replace the index of that name.
        num_partitions, num_sub_vectors : int, optional
            IVF lists, PQ sub-quantizers.
        ivf_centroids : numpy.ndarray, pyarrow.FixedSizeListArray or pyarrow.FixedShapeTensorArray, optional
            ``(num_partitions, dim)``.
        pq_codebook : numpy.ndarray, pyarrow.FixedSizeListArray or pyarrow.FixedShapeTensorArray, optional
            ``(num_sub_vectors, 2**num_bits, dim // num_sub_vectors)``, or a list array of its rows.
        *more, **options
            Of `lance_dfaiss.create_index` (``factory``, ``refine``, ``num_bits``, ``num_workers``, ...) or of
            Lance's own.

        Returns
        -------
        DfaissDataset
            Itself, moved to the version that has the index.

        Raises
        ------
        InvalidArgument
            If parameters of ours and parameters of Lance's own index are mixed.
        DfaissError
            As `lance_dfaiss.create_index` does.
        """
        # Lance adds parameters at the end: its own signature names those that came by place.
        base = _CREATE.bind_partial(
            self, column, index_type, name, metric, replace, num_partitions, ivf_centroids, pq_codebook,
            num_sub_vectors, *more,
        ).arguments  # fmt: skip
        asked = {k: v for k, v in base.items() if k not in ("self", "column", "index_type") and v is not None}
        asked.update(options)
        asked = {k: v for k, v in asked.items() if v is not None and not (k in _AGREED and v == _AGREED[k])}
        reason = self._why_lance_builds(column, index_type, asked)
        if reason:
            _log.info("index %s on %s is built by Lance: %s", index_type, column, reason)
            super().create_index(
                column, index_type, name, metric, replace, num_partitions, ivf_centroids, pq_codebook,
                num_sub_vectors, *more, **options,
            )  # fmt: skip
            return self
        if str(index_type).upper() == "IVF_RQ" and asked.get("num_bits") == 1:
            del asked["num_bits"]  # Lance's way to say what the type is.
        for parameter in ("ivf_centroids", "pq_codebook"):
            if parameter in asked:
                asked[parameter] = _model_array(asked[parameter], num_sub_vectors, parameter)
        only = column if isinstance(column, str) else column[0]
        create_index(self, only, cast("Any", index_type), **asked)
        if "index_uri" in asked:
            self._opened = _OpenIndexes((*self._opened.trusted, str(asked["index_uri"])))
        return self

    def _why_lance_builds(self, column: Any, index_type: Any, asked: Mapping[str, Any]) -> str:
        """Return why an index is not ours to build, the empty string when it is."""
        foreign = sorted(set(asked) - _OURS)
        ours = sorted((set(asked) & _OURS) - set(_CREATE.parameters) - {"num_bits", "sample_rate"})
        if foreign and ours:
            raise InvalidArgument(
                f"{', '.join(ours)} and {', '.join(foreign)} were given together: the former are of this"
                " package's indexes, the latter of Lance's own",
                remedy=f"Leave out {', '.join(foreign)}, or {', '.join(ours)}",
                parameter=foreign[0],
                value=asked[foreign[0]],
            )
        kind = index_type.upper() if isinstance(index_type, str) else ""
        if "factory" not in asked and kind not in INDEX_TYPES:
            return "" if ours else f"type {index_type}"
        if foreign:
            return f"parameter {', '.join(foreign)}"
        if str(asked.get("metric", "")).lower() == "hamming":
            return "metric hamming"
        if kind == "IVF_RQ" and asked.get("num_bits", 1) not in (1, 4, 8):
            return f"num_bits={asked['num_bits']}"
        names = [column] if isinstance(column, str) else list(column)
        if len(names) != 1:
            return f"{len(names)} columns"
        return "multivector column" if _is_multivector(self.schema, names[0]) else ""

    def drop_index(self, name: str) -> None:
        """Drop an index: ours, if there is one of that name at the newest version, else Lance's own.

        Parameters
        ----------
        name : str
            Index name.
        """
        newest = PinnedDataset(_plain(self)).latest()
        if POINTER_PREFIX + name in newest.metadata:
            drop_index(self, name)
        else:
            super().drop_index(name)

    @_signed_like(LanceDataset.scanner)
    def scanner(self, *args: Any, **kwargs: Any) -> LanceScanner:
        """Return a scanner; one that asks our index where ``nearest`` is ours to answer.

        Parameters
        ----------
        *args, **kwargs
            As Lance's scanner takes them.

        Returns
        -------
        lance.dataset.LanceScanner
            A `DfaissScanner` when ours answers.

        Raises
        ------
        CorruptIndex, UntrustedLocation
            If an index cannot be read. Where the query names a metric, Lance answers instead when its
            manifest is not there, not allowed to be read, or of a newer format.
        """
        given = {k: v for k, v in _SCANNER.bind(self, *args, **kwargs).arguments.items() if v is not None}
        del given["self"]
        nearest = given.get("nearest")
        if not isinstance(nearest, dict) or not self._has_pointer() or not nearest.get("use_index", True):
            return super().scanner(*args, **kwargs)
        generations = self._generations_for(nearest)
        if not generations:
            return super().scanner(*args, **kwargs)
        # Lance asks its index for the metric that a query does not name, and so do we, whoever answers.
        given["nearest"] = {**nearest, "metric": nearest.get("metric") or generations[0].manifest.spec.metric}
        native = functools.partial(super().scanner, **given)
        handle = PinnedDataset(_plain(self)).lance
        reasons = []
        for generation in generations:
            try:
                request = _Request.read({**(self._default_scan_options or {}), **given}, generation, handle.schema)
                opened = self._opened.version(self, generation)
                return DfaissScanner(_Answer(request, opened, handle), self, native)
            except _NotOurs as exc:
                reasons.append(str(exc))
        _log.debug("search on %r goes to Lance: %s", nearest.get("column"), "; ".join(reasons))
        # Not inside the handler: an error of Lance's stands alone then.
        return native()

    def _has_pointer(self) -> bool:
        return any(key.startswith(POINTER_PREFIX) for key in self.metadata)

    def _generations_for(self, nearest: Mapping[str, Any]) -> list[Generation]:
        """Return the indexes of this column and metric, by name; the first settles a metric that is not named."""
        metric = _metric(nearest.get("metric"))
        found: list[Generation] = []
        other = ""
        for key, text in sorted(self.metadata.items()):
            if not key.startswith(POINTER_PREFIX):
                continue
            try:
                generation = self._opened.generation(self, key.removeprefix(POINTER_PREFIX), text)
            except (MissingFile, UntrustedLocation, UnsupportedFormat) as exc:
                # Without its manifest we do not know its metric, and Lance would take l2.
                if metric is None:
                    raise  # a usable one further on might be of another metric
                _log.warning("an index cannot be used: %s", exc)
                continue
            if generation.manifest.dataset.column != nearest.get("column"):
                continue
            if metric in (None, generation.manifest.spec.metric):
                metric = generation.manifest.spec.metric
                found.append(generation)
            else:
                other = generation.manifest.spec.metric
        if other and not found:
            _log.debug("search on %r goes to Lance: metric %s, not %s", nearest.get("column"), metric, other)
        return found


class DfaissScanner(LanceScanner):
    """A scanner whose rows come from one of this package's indexes.

    Reads give the index's answer, always for the version the dataset was at when the scanner was made.
    Plans are those of the native scanner for the same call.
    """

    def __init__(self, answer: _Answer, dataset: LanceDataset, native: Callable[[], LanceScanner]) -> None:
        self._answer = answer
        self._dataset = dataset
        self._native = native

    def to_table(self) -> pa.Table:
        """Search, and return the rows as a table."""
        return self._answer.table()

    def to_reader(self) -> pa.RecordBatchReader:
        """Search, and return the rows as a reader."""
        table = self.to_table()
        return pa.RecordBatchReader.from_batches(table.schema, table.to_batches(self._answer.request.batch_rows))

    def to_batches(self) -> Iterator[pa.RecordBatch]:
        """Search, and return the rows as batches."""
        yield from self.to_reader()

    def to_pandas(self, *, blob_mode: str = "lazy", **kwargs: Any) -> Any:
        """Search, and return the rows as a data frame; ``blob_mode`` is for columns that ours leaves to Lance."""
        del blob_mode
        return self.to_table().to_pandas(**kwargs)

    def count_rows(self) -> int:
        """Count the rows that the search finds."""
        if self._answer.request.limited:
            return int(self._native().count_rows())
        return len(self._answer.neighbours()[2])

    @property
    def projected_schema(self) -> pa.Schema:
        """Schema of the rows."""
        return self._answer.schema()

    @property
    def dataset_schema(self) -> pa.Schema:
        """Schema of the dataset."""
        return self._dataset.schema

    def explain_plan(self, verbose: bool = False) -> str:
        """Return Lance's own plan for the same call."""
        return str(self._native().explain_plan(verbose=verbose))

    def analyze_plan(self, count_rows: bool = False) -> str:
        """Run Lance's own plan for the same call, and return it with its metrics."""
        return str(self._native().analyze_plan(count_rows=count_rows))


class _NotOurs(Exception):
    """Lance shall answer; says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Request:
    """One search, as far as ours answers it; everything in it has been checked.

    Parameters
    ----------
    queries : numpy.ndarray
        float32 ``(n_queries, dim)``.
    single : bool
        It was one vector, not a batch.
    k : int
        Results per query.
    nprobe : tuple of (int, int) or None
        Least and largest number of lists to search; None for an index without lists.
    ef, k_factor : int or None
        Other widths.
    columns : list or dict or None
        What Lance shall fetch.
    layout : tuple of str or None
        Names of all columns in order; None where all columns of the dataset stand.
    tail : tuple of str
        Names after those.
    offset, limit : int or None
        Cut from the answer.
    batch_rows : int or None
        Rows of a batch.
    """

    queries: Float32Array
    single: bool
    k: int
    nprobe: tuple[int, int] | None
    ef: int | None
    k_factor: int | None
    columns: list[str] | dict[str, str] | None
    layout: tuple[str, ...] | None
    tail: tuple[str, ...]
    offset: int
    limit: int | None
    batch_rows: int | None

    @property
    def limited(self) -> bool:
        """Whether the answer is cut."""
        return self.offset > 0 or self.limit is not None

    @classmethod
    def read(cls, options: Mapping[str, Any], generation: Generation, schema: pa.Schema) -> _Request:
        """Read the options of a scan.

        Raises
        ------
        _NotOurs
            If one of them is for Lance: because ours does not do it, or because Lance shall refuse it.
        """
        for option, value in options.items():
            if option not in _ANSWERED and option not in _HOW and value is not False:
                raise _NotOurs(f"option {option}")
        nearest = options["nearest"]
        _check_keys(nearest, generation)
        spec = generation.manifest.spec
        queries, single = _queries(nearest.get("q"), spec.dim, spec.metric)
        strict = bool(options.get("strict_batch_size"))
        if strict and "batch_size_bytes" in options:
            raise _NotOurs("strict_batch_size and batch_size_bytes")
        k = _whole(nearest, "k", 1)
        ef = _whole(nearest, "ef", 1)
        refine = _whole(nearest, "refine_factor", 1)
        columns, layout, tail = _projection(options, schema, single=single)
        return cls(
            queries=queries,
            single=single,
            k=_LANCE_K if k is None else k,
            nprobe=_nprobe(nearest, spec.num_partitions),
            ef=ef if _is_hnsw(generation) else None,
            k_factor=refine if spec.refine is not None else None,
            columns=columns,
            layout=layout,
            tail=tail,
            offset=_whole(options, "offset", 0) or 0,
            limit=_whole(options, "limit", 0),
            batch_rows=_whole(options, "batch_size", 1) if strict else None,
        )


class _Answer:
    """A request, and the index and the dataset version that answer it."""

    def __init__(self, request: _Request, opened: _Opened, handle: LanceDataset) -> None:
        self.request = request
        self._index = opened.index
        self._default_nprobe = opened.default_nprobe
        self._handle = handle

    def neighbours(self) -> tuple[Any, Float32Array, UInt64Array]:
        """Search: query number int32, distance and row id of each row, ``(n,)`` each."""
        request = self.request
        distances, row_ids = self._search(min(request.k, max(len(self._index), 1)))
        found = row_ids != MISSING_ROW_ID
        numbers = np.repeat(np.arange(len(distances), dtype=np.int32), found.sum(axis=1))
        stop = None if request.limit is None else request.offset + request.limit
        cut = slice(request.offset, stop)
        return numbers[cut], distances[found][cut], row_ids[found][cut]

    def _search(self, k: int) -> tuple[Float32Array, UInt64Array]:
        """Search k rows; like Lance, look in more lists while a query has found too few."""
        request = self.request
        ef = None if request.ef is None else max(request.ef, k)
        ask = functools.partial(self._index.knn, request.queries, k, ef=ef, k_factor=request.k_factor)
        if request.nprobe is None:
            return ask()
        least, widest = request.nprobe
        probed = min(max(self._default_nprobe, least), widest)
        distances, row_ids = ask(nprobe=probed)
        wanted = min(k, len(self._index))
        while probed < widest and ((row_ids != MISSING_ROW_ID).sum(axis=1) < wanted).any():
            probed = min(probed * 4, widest)
            distances, row_ids = ask(nprobe=probed)
        return distances, row_ids

    def table(self) -> pa.Table:
        """Search and fetch: the table that Lance would give."""
        numbers, distances, row_ids = self.neighbours()
        ready = {
            QUERY_INDEX_COLUMN: pa.array(numbers, pa.int32()),
            DISTANCE_COLUMN: pa.array(distances, pa.float32()),
            ROW_ID_COLUMN: pa.array(row_ids, pa.uint64()),
        }
        fetched = self._fetch(row_ids) if self._needs_rows() else self._handle.schema.empty_table()
        schema = self._schema(fetched.schema)
        lead = not self.request.single
        arrays = [
            ready[field.name] if self._is_ours(field.name, first=lead and i == 0) else fetched.column(field.name)
            for i, field in enumerate(schema)
        ]
        return pa.Table.from_arrays(arrays, schema=schema) if arrays else self._fetch(row_ids).select([])

    def schema(self) -> pa.Schema:
        """Return the schema of the table, without searching."""
        return self._schema(self._scanner(np.zeros(0, dtype=np.uint64)).projected_schema)

    def _needs_rows(self) -> bool:
        """Whether the dataset has to be read at all."""
        request = self.request
        made = (DISTANCE_COLUMN, ROW_ID_COLUMN)
        return request.layout is None or any(name not in made for name in (*request.layout, *request.tail))

    def _is_ours(self, name: str, *, first: bool) -> bool:
        return name in (DISTANCE_COLUMN, ROW_ID_COLUMN) or (first and name == QUERY_INDEX_COLUMN)

    def _schema(self, fetched: pa.Schema) -> pa.Schema:
        names = self.request.layout
        if names is None:
            names = tuple(name for name in fetched.names if name not in (ROW_ID_COLUMN, _ROW_ADDRESS_COLUMN))
        made = {DISTANCE_COLUMN: pa.float32(), ROW_ID_COLUMN: pa.uint64()}
        fields = [
            pa.field(name, made[name]) if name in made else fetched.field(name) for name in (*names, *self.request.tail)
        ]
        if not self.request.single:
            fields.insert(0, pa.field(QUERY_INDEX_COLUMN, pa.int32(), nullable=False))
        return pa.schema(fields, metadata=fetched.metadata)

    def _scanner(self, row_ids: UInt64Array) -> LanceScanner:
        return self._handle.scanner(
            columns=self.request.columns,
            with_row_id=True,
            with_row_address=True,
            row_addr_allowlist=serialize_row_addrs(row_ids.tolist()),
        )

    def _fetch(self, row_ids: UInt64Array) -> pa.Table:
        """Read the rows, in the order given, duplicates included."""
        unique, inverse = np.unique(row_ids, return_inverse=True)
        table = self._scanner(unique).to_table()
        found = table[ROW_ID_COLUMN].to_numpy()
        if len(found) != len(unique):
            raise StorageError(
                f"Lance returned {len(found)} of {len(unique)} rows asked for by id",
                remedy=f"Version {self._index.version} of the dataset may have been removed: check out another",
                location=self._handle.uri,
            )
        return table.take(pa.array(np.argsort(found, kind="stable")[inverse]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Opened:
    """An index open for one dataset version; its segments know nothing of versions and are shared."""

    generation: Generation
    segments: list[tuple[int, Segment]]
    index: Index
    default_nprobe: int


class _OpenIndexes:
    """The indexes that a handle and its copies have open, the newest few; safe to use from many threads.

    Parameters
    ----------
    trusted : tuple of str
        Places outside the dataset that pointers may lead to.
    """

    def __init__(self, trusted: tuple[str, ...]) -> None:
        self.trusted = trusted
        # Held while loading: the second of two threads waits for the index instead of loading it again.
        self._lock = threading.Lock()
        self._generations: OrderedDict[tuple[str, str], Generation] = OrderedDict()
        self._versions: OrderedDict[tuple[Any, ...], _Opened | str] = OrderedDict()

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
                pinned = PinnedDataset(_plain(handle))
                found = read_generation(pinned, find_pointer(pinned, name), self.trusted)
            _keep(self._generations, (name, text), found, _KEPT_GENERATIONS)
            return found

    def version(self, handle: LanceDataset, generation: Generation) -> _Opened:
        """Return the index, open for the version that a handle is at.

        Raises
        ------
        _NotOurs
            If the version holds rows that the index does not cover.
        CorruptIndex
            If a shard is missing or damaged.
        """
        # Version numbers repeat on branches, and on a branch made again; the time of the commit does not.
        version = handle.get_version()
        key = (version["version"], version["timestamp"], generation.found.name, generation.found.text)
        with self._lock:
            opened = self._versions.get(key)
            if opened is None:
                opened = self._open(PinnedDataset(_plain(handle)), generation)
            _keep(self._versions, key, opened, _KEPT_VERSIONS)
        if isinstance(opened, str):
            raise _NotOurs(opened)
        return opened

    def _open(self, pinned: PinnedDataset, generation: Generation) -> _Opened | str:
        """Open, or return the reason why this version has rows that the index does not cover."""
        try:
            snapshot = resolve_generation(pinned, generation)
        except DatasetChanged as exc:
            # Once a version, as the answer is kept: a search that became slow should not need DEBUG to be explained.
            _log.warning("index %r cannot answer, Lance searches by itself: %s", generation.manifest.name, exc.message)
            return exc.message
        others = (opened for opened in self._versions.values() if isinstance(opened, _Opened))
        segments = next((opened.segments for opened in others if opened.generation is generation), None)
        if segments is None:
            rows = sum(record.cover.physical_rows for record in generation.records)
            segments = load_segments(generation, PhaseMeter(SilentProgress(), "load", rows))
        index = Index(pinned, generation, snapshot, segments)
        nprobe = index.stats().defaults.nprobe or 1
        return _Opened(generation=generation, segments=segments, index=index, default_nprobe=nprobe)


def _keep(entries: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    entries[key] = value
    entries.move_to_end(key)
    while len(entries) > most:
        entries.popitem(last=False)


def _unpickle(rebuild: Callable[..., DfaissDataset], arguments: tuple[Any, ...], trusted: tuple[str, ...]) -> Any:
    handle = rebuild(*arguments)
    handle._opened = _OpenIndexes(trusted)
    return handle


def _metric(metric: Any) -> str | None:
    folded = metric.lower() if isinstance(metric, str) else metric
    return "l2" if folded == "euclidean" else cast("str | None", folded)


def _is_hnsw(generation: Generation) -> bool:
    spec = generation.manifest.spec
    return "HNSW" in spec.factory and not spec.num_partitions


def _codes_are_exact(generation: Generation) -> bool:
    return _EXACT_CODES.fullmatch(generation.manifest.spec.factory) is not None


def _check_keys(nearest: Mapping[str, Any], generation: Generation) -> None:
    """Refuse what a query asks beyond ours."""
    for key, value in nearest.items():
        if key not in _NEAREST_KEYS and value is not None:
            raise _NotOurs(f"nearest key {key}")
    if nearest.get("approx_mode", "normal") != "normal" and "RaBitQ" in generation.manifest.spec.factory:
        raise _NotOurs("approx_mode")
    if nearest.get("approx_mode", "normal") not in ("fast", "normal", "accurate"):
        raise _NotOurs("approx_mode")
    _whole(nearest, "query_parallelism", -1)
    refine = nearest.get("refine_factor")
    if refine is not None and generation.manifest.spec.refine is None and not _codes_are_exact(generation):
        raise _NotOurs("refine_factor, and the index has no refine store")


def _whole(options: Mapping[str, Any], name: str, least: int) -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise _NotOurs(f"{name}={value!r}")
    return int(value)


def _queries(query: Any, dim: int, metric: Any) -> tuple[Float32Array, bool]:
    """Return queries as an array, and whether it was a single one."""
    if isinstance(query, pa.ExtensionScalar):
        query = query.value
    if isinstance(query, pa.FixedSizeListScalar):
        query = query.values
    flat = isinstance(query, pa.Array) and (pa.types.is_floating(query.type) or pa.types.is_integer(query.type))
    if not flat and not isinstance(query, (np.ndarray, list, tuple)):
        raise _NotOurs(f"a query of type {type(query).__name__}")
    try:
        queries, single = as_queries(query, dim, metric)
    except InvalidQuery as exc:
        raise _NotOurs(exc.message) from exc
    if not len(queries):
        raise _NotOurs("no query")
    return queries, single


def _nprobe(nearest: Mapping[str, Any], lists: int) -> tuple[int, int] | None:
    """Return the least and the largest width in lists, None for an index without lists."""
    both = _whole(nearest, "nprobes", 1)
    least = _whole(nearest, "minimum_nprobes", 0)
    most = _whole(nearest, "maximum_nprobes", 0)
    if most == 0 or (least is not None and most is not None and least > most):
        raise _NotOurs("minimum_nprobes and maximum_nprobes")
    if not lists:
        return None
    least, most = both if least is None else least, both if most is None else most
    widest = lists if most is None else min(most, lists)
    return max(least or 1, 1), widest


def _projection(
    options: Mapping[str, Any], schema: pa.Schema, *, single: bool
) -> tuple[list[str] | dict[str, str] | None, tuple[str, ...] | None, tuple[str, ...]]:
    """Return what to fetch, and the order of the columns, in Lance's way."""
    columns = options.get("columns")
    _check_columns(columns, schema, single=single)
    flagged = {ROW_ID_COLUMN: options.get("with_row_id"), _ROW_ADDRESS_COLUMN: options.get("with_row_address")}
    tail = [name for name, flag in flagged.items() if flag]
    layout = None if columns is None else tuple(
        name for name in columns if name not in tail and (single or name != QUERY_INDEX_COLUMN)
    )  # fmt: skip
    if not options.get("disable_scoring_autoprojection") and (layout is None or DISTANCE_COLUMN not in layout):
        tail.insert(0, DISTANCE_COLUMN)
    made = (DISTANCE_COLUMN, *flagged)
    wanted: list[str] | dict[str, str] | None = None
    if isinstance(columns, dict):
        wanted = {name: columns[name] for name in layout or () if name not in made} or []
    elif columns is not None:
        wanted = [name for name in layout or () if name not in made]
    return wanted, layout, tuple(tail)


def _check_columns(columns: Any, schema: pa.Schema, *, single: bool) -> None:
    if not single and QUERY_INDEX_COLUMN in schema.names:
        raise _NotOurs(f"a batch over a dataset with a column {QUERY_INDEX_COLUMN}")
    if columns is not None and not isinstance(columns, (list, dict)):
        raise _NotOurs(f"columns of type {type(columns).__name__}")
    if isinstance(columns, list) and (
        len(set(columns)) != len(columns) or not all(isinstance(name, str) for name in columns)
    ):
        raise _NotOurs("columns named twice")
    named = columns if isinstance(columns, list) else schema.names
    if any(_holds_blob(field) for field in schema if any(name.split(".")[0] == field.name for name in named)):
        raise _NotOurs("a blob column")
    for name, expression in columns.items() if isinstance(columns, dict) else ():
        plain = name == expression == DISTANCE_COLUMN
        if not plain and (name.startswith("_") or _mentions_result(expression, single=single)):
            raise _NotOurs(f"column {name} is computed from the result")


def _mentions_result(expression: str, *, single: bool) -> bool:
    return DISTANCE_COLUMN in expression or (not single and QUERY_INDEX_COLUMN in expression)


def _holds_blob(field: pa.Field) -> bool:
    metadata = field.metadata or {}
    if metadata.get(b"lance-encoding:blob") == b"true" or b"lance.blob" in metadata.get(b"ARROW:extension:name", b""):
        return True
    if str(getattr(field.type, "extension_name", "")).startswith("lance.blob"):
        return True
    children: Iterable[pa.Field] = (
        [field.type.field(i) for i in range(field.type.num_fields)] if pa.types.is_struct(field.type) else []
    )
    return any(_holds_blob(child) for child in children)


def _is_multivector(schema: pa.Schema, column: str) -> bool:
    if column not in schema.names:
        return False
    kind = schema.field(column).type
    return bool(pa.types.is_list(kind) and pa.types.is_fixed_size_list(kind.value_type))


def _model_array(value: Any, num_sub_vectors: int | None, parameter: str) -> Float32Array:
    """Return centroids or a codebook, given in one of Lance's forms, as float32."""
    if isinstance(value, pa.ExtensionArray):
        value = value.storage
    if isinstance(value, pa.Array):
        if not pa.types.is_fixed_size_list(value.type) or value.null_count:
            raise InvalidArgument(
                f"{parameter} must be a FixedSizeList without nulls, not {value.type}",
                parameter=parameter,
                value=str(value.type),
            )
        value = value.flatten().to_numpy(zero_copy_only=False).reshape(len(value), value.type.list_size)
    array = np.ascontiguousarray(value, dtype=np.float32)
    if parameter == "pq_codebook" and array.ndim == 2 and num_sub_vectors and len(array) % num_sub_vectors == 0:
        array = array.reshape(num_sub_vectors, -1, array.shape[1])
    return array
