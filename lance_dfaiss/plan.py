"""What a build will do, decided before anything is done: pure functions of numbers.

`resolve_spec` settles the index, `sample_rows` the training sample, `plan_tasks` the shards, and
`Estimate` says what it will cost. Nothing here reads a dataset or calls FAISS.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import BudgetExceeded, InsufficientData, InvalidArgument
from .manifest import FragmentCover, FragmentSignature, ShardTask
from .spec import IndexSpec, ResolvedSpec
from .types import IndexType, Refine

__all__ = [
    "KMEANS_GRAPH_LISTS",
    "Estimate",
    "FactoryParts",
    "FragmentState",
    "RewriteGroup",
    "RowCost",
    "encode_peak_bytes",
    "estimate",
    "kmeans_compared",
    "plan_tasks",
    "resolve_spec",
    "sample_rows",
    "sample_rows_fitting",
    "training_parts",
]

# Below this many rows a full scan takes under a millisecond, and is exact.
_FLAT_ROWS = 5_000

# From this many lists on, finding the nearest lists through a graph is faster than comparing with all.
_HNSW_LISTS = 16_384
_MAX_LISTS = 65_536
_HNSW_LINKS = 32

# FAISS wants 39 training points per centroid; AUTO asks for no more lists than that allows.
_ROWS_PER_LIST = 39

# Training rows when there are no lists to train: as many as FAISS's scalar and product quantizers use.
_CODE_SAMPLE_ROWS = 65_536
_PQ_CODEWORDS = 256

# A growing IVF list doubles its memory, so a shard can take twice its codes and ids while it is built.
_LIST_SLACK = 2.0
_GRAPH_SLACK = 2.0

# Blocks in flight, scores of the held-out queries, and what the allocator does not give back.
_WORKING_BYTES = 128 * 1024 * 1024

# A fragment is cut where so many rows fit the budget: one for fewer is a mistake, not a wish.
_MIN_PART_ROWS = 4_096

# The sample may take half of the budget: residuals of it are the other half.
_SAMPLE_SHARE = 0.5

# Sustained multiply-adds per second and core of FAISS's training and assignment, for time estimates only.
_MACS_PER_CORE_SECOND = 4.0e10
_KMEANS_ITERATIONS = 10

# What a driver sends and receives in a second: a link of 10 Gbit/s, less what headers and copies take.
_DRIVER_BYTES_PER_SECOND = 1.0e9

# A coordinate of a centroid goes out as float32, and comes back as a float64 sum.
_COORDINATE_BYTES = 4 + 8

# k-means finds the nearest of so many centroids, and more, through a graph. A row then takes as long as it does to be
# compared with about so many: measured as 18,000 with 32,768 centroids, and as 25,000 with 65,536.
KMEANS_GRAPH_LISTS = 32_768
_GRAPH_COMPARED = 20_000
_PQ_ITERATIONS = 25

# What does not show in operation counts: starting k-means for each sub-vector, moving a row about.
_SUB_VECTOR_SECONDS = 0.005
_ROW_SECONDS = 2e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentState:
    """One fragment as it stands in one dataset version.

    Parameters
    ----------
    fragment_id : int
        Lance's id.
    physical_rows, deleted_rows : int
        Rows written, and how many of them are deleted.
    signature : FragmentSignature
        Equal signatures mean equal vectors at equal offsets.
    deletions : str
        Names what is deleted: equal names, equal rows. Empty for nothing.
    """

    fragment_id: int
    physical_rows: int
    deleted_rows: int
    signature: FragmentSignature
    deletions: str = ""

    @property
    def live_rows(self) -> int:
        """Rows that are not deleted."""
        return self.physical_rows - self.deleted_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RewriteGroup:
    """Fragments that a compaction replaced by others.

    Parameters
    ----------
    old, new : tuple of FragmentState
        As they were right before and right after, in order of their rows.
    """

    old: tuple[FragmentState, ...]
    new: tuple[FragmentState, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCost:
    """What a row and the model of an index cost in RAM, in bytes.

    Parameters
    ----------
    family : str
        ``"flat"``, ``"ivf"`` or ``"hnsw"``.
    code_bytes, id_bytes, refine_bytes, link_bytes : int
        Per row: code, id within its list, refine code, graph edges.
    fixed_bytes : int
        Centroids and codebooks.
    """

    family: Literal["flat", "ivf", "hnsw"]
    code_bytes: int
    id_bytes: int
    refine_bytes: int
    link_bytes: int
    fixed_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row once loaded."""
        return self.code_bytes + self.id_bytes + self.refine_bytes + self.link_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoryParts:
    """A factory string, taken apart.

    Parameters
    ----------
    base : str
        Searchable part.
    refine : str or None
        Refine store it asked for.
    num_lists : int
        IVF lists; 0 without.
    """

    base: str
    refine: Refine | None
    num_lists: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a build will take, and what it will leave.

    Parameters
    ----------
    index_bytes : int
        Of all shards, on disk and once loaded.
    sample_bytes : int
        Of the training sample in RAM.
    peak_bytes : int
        Largest memory any phase needs beside the process itself.
    train_seconds, encode_seconds : float
        Rough; from operation counts.
    """

    index_bytes: int
    sample_bytes: int
    peak_bytes: int
    train_seconds: float
    encode_seconds: float


def resolve_spec(
    spec: IndexSpec, *, dim: int, rows: int, largest_fragment_rows: int, budget_bytes: int, parts: FactoryParts | None
) -> ResolvedSpec:
    """Settle everything that a spec left open.

    ``AUTO`` is FLAT under 5,000 rows; otherwise IVF with as many lists as the square root of the rows
    (rounded up to a power of two, at most 65,536, found through a graph from 16,384 on), 4-bit
    fast-scan PQ with two dimensions a code (one where the dimension is odd), and an SQ8 refine store,
    which is left out when the largest fragment would not fit the budget with it.

    Parameters
    ----------
    spec : IndexSpec
        What was asked for.
    dim : int
        Dimension of the column.
    rows : int
        Live rows.
    largest_fragment_rows : int
        Physical rows of the largest fragment.
    budget_bytes : int
        Memory per worker.
    parts : FactoryParts or None
        The factory string of the spec, taken apart; None when it has none.

    Returns
    -------
    ResolvedSpec

    Raises
    ------
    InsufficientData
        If there are no rows, or fewer than partitions.
    InvalidArgument
        If a parameter does not fit the index type or the dimension.
    """
    if rows < 1:
        raise InsufficientData("the dataset has no rows to index", remedy="Write rows first", rows=rows, needed=1)
    if parts is not None:
        return _resolved_factory(spec, parts, dim, rows)
    kind = spec.index_type
    if kind == "AUTO":
        kind = "FLAT" if rows < _FLAT_ROWS and spec.num_partitions is None else "IVF_PQ"
    lists = _num_lists(spec, kind, rows)
    factory = _coarse(spec, lists) + _codes(spec, kind, dim)
    refine = _refine(spec, kind)
    if spec.index_type == "AUTO" and spec.refine == "auto" and refine is not None:
        peak = largest_fragment_rows * ((dim + 3) // 4 + 8) * _LIST_SLACK + largest_fragment_rows * dim
        if peak + lists * dim * 8 > budget_bytes:
            refine = None
    return ResolvedSpec(
        index_type=kind,
        metric=spec.metric,
        dim=dim,
        factory=factory,
        refine=refine,
        num_partitions=lists,
        sample_rate=spec.sample_rate,
        seed=spec.seed,
    )


def sample_rows(spec: ResolvedSpec, *, rows: int, budget_bytes: int) -> int:
    """Return how many rows to train on: ``sample_rate`` per list, within half of the budget.

    Parameters
    ----------
    spec : ResolvedSpec
        What is trained.
    rows : int
        Live rows of the dataset.
    budget_bytes : int
        Memory per worker.

    Raises
    ------
    BudgetExceeded
        If not even one row per list fits.
    """
    wanted = _CODE_SAMPLE_ROWS
    if spec.num_partitions:
        wanted = spec.sample_rate * max(spec.num_partitions, _PQ_CODEWORDS)
    fitting = sample_rows_fitting(spec.dim, budget_bytes)
    if fitting < min(spec.num_partitions, rows):
        raise BudgetExceeded(
            f"training {spec.num_partitions} lists of dimension {spec.dim} needs at least"
            f" {8 * spec.dim * spec.num_partitions:,} bytes, the budget is {budget_bytes:,}",
            remedy="Raise memory_budget_bytes or lower num_partitions",
            needed_bytes=8 * spec.dim * spec.num_partitions,
            budget_bytes=budget_bytes,
        )
    return max(1, min(wanted, fitting, rows))


def sample_rows_fitting(dim: int, budget_bytes: int) -> int:
    """Return how many training rows a worker may hold."""
    return int(budget_bytes * _SAMPLE_SHARE) // (4 * dim)


def training_parts(
    *,
    sample: int,
    dim: int,
    lists: int,
    workers: int,
    threads: int,
    budget_bytes: int,
    core_macs_per_second: float = _MACS_PER_CORE_SECOND,
    driver_bytes_per_second: float = _DRIVER_BYTES_PER_SECOND,
) -> int:
    """Return over how many workers a training sample should be spread.

    In an iteration of k-means each of ``p`` parts compares its share of the rows with the centroids, and the centroids
    go to, and their sums come from, each part through the driver. With ``m`` multiply-adds and ``b`` bytes a second::

        t(p) = sample * compared * dim / (p * m)  +  p * 12 * lists * dim / b

    which is least where both terms are equal, at ``p = sqrt(sample * compared / lists * b / (12 * m))``: more parts
    would wait for the driver. Rows are compared with all centroids, or through a graph with fewer. Without lists only
    reading is shared, and the number is that of one that compares with all.

    Parameters
    ----------
    sample : int
        Training rows.
    dim : int
        Dimension of the column.
    lists : int
        IVF lists; 0 without.
    workers : int
        That there are.
    threads : int
        Cores of each.
    budget_bytes : int
        Memory per worker: there are at least as many parts as can hold the sample, if there are as many workers.
    core_macs_per_second, driver_bytes_per_second : float
        Multiply-adds of a core, and what the driver sends and receives.
    """
    compared = kmeans_compared(lists) / lists if lists else 1.0
    best = math.sqrt(
        sample * compared * driver_bytes_per_second / (_COORDINATE_BYTES * core_macs_per_second * max(threads, 1))
    )
    holding = -(-sample // max(sample_rows_fitting(dim, budget_bytes), 1))
    return max(1, min(workers, max(holding, round(best))))


def kmeans_compared(lists: int) -> int:
    """Return with how many of so many centroids a row could be compared while k-means finds the nearest."""
    return lists if lists < KMEANS_GRAPH_LISTS else _GRAPH_COMPARED


def encode_peak_bytes(cost: RowCost, rows: int) -> int:
    """Return the most memory that encoding a shard of so many rows takes beside the process itself."""
    if cost.family == "flat":
        held = rows * cost.code_bytes
    elif cost.family == "ivf":
        held = int(rows * (cost.code_bytes + cost.id_bytes) * _LIST_SLACK)
    else:
        held = int(rows * (cost.code_bytes + cost.link_bytes) * _GRAPH_SLACK)
    # The model, and the clone of it that is filled.
    return held + rows * cost.refine_bytes + 2 * cost.fixed_bytes + _WORKING_BYTES


def plan_tasks(
    fragments: Sequence[FragmentState],
    cost: RowCost,
    *,
    num_shards: int | None,
    budget_bytes: int,
    split: bool = False,
    workers: int = 1,
) -> tuple[ShardTask, ...]:
    """Divide fragments into shards of neighbours with about equal rows.

    Parameters
    ----------
    fragments : sequence of FragmentState
        All fragments, in the dataset's order.
    cost : RowCost
        Of the index.
    num_shards : int or None
        Shards wanted (at most one per fragment, or part of one, is made); None for as few as budget and workers allow.
    budget_bytes : int
        Memory per worker.
    split : bool
        Cut a fragment that does not fit the budget into equal parts that do.
    workers : int
        Give each of so many a shard, where the number of shards is open, and shards are merged before they are
        searched: graphs are not, and each one more costs every search.

    Returns
    -------
    tuple of ShardTask
        Every row in exactly one, in order.

    Raises
    ------
    BudgetExceeded
        If a shard does not fit the budget, with the numbers.
    """
    fitting = _rows_fitting(cost, budget_bytes)
    pieces = _pieces(fragments, fitting if split and fitting >= _MIN_PART_ROWS else None)
    rows = [piece.rows for piece in pieces]
    if num_shards is not None:
        groups = _divide(rows, min(num_shards, len(rows)))
    else:
        fitting = max(fitting, 1)
        least = 1 if cost.family == "hnsw" else workers
        count = min(max(-(-sum(rows) // fitting), least), len(rows))
        groups = _divide(rows, count)
        while count < len(rows) and any(sum(rows[a:b]) > fitting for a, b in groups):
            count = min(count + max(count // 8, 1), len(rows))
            groups = _divide(rows, count)
    tasks = tuple(_task(ordinal, pieces[a:b]) for ordinal, (a, b) in enumerate(groups))
    worst = max(tasks, key=lambda task: task.physical_rows)
    if encode_peak_bytes(cost, worst.physical_rows) > budget_bytes:
        more = "ask for more shards" if len(tasks) < len(pieces) else "" if split else "write smaller fragments"
        least = _MIN_PART_ROWS if split and num_shards is None else worst.physical_rows
        raise _does_not_fit(worst, cost, budget_bytes, rows=min(worst.physical_rows, least), more=more)
    return tasks


def estimate(
    spec: ResolvedSpec, cost: RowCost, tasks: Sequence[ShardTask], *, sample: int, cores: int, holders: int = 1
) -> Estimate:
    """Say what a planned build will take.

    Parameters
    ----------
    spec : ResolvedSpec
        What is built.
    cost : RowCost
        Of the index.
    tasks : sequence of ShardTask
        The shards.
    sample : int
        Training rows.
    cores : int
        That work on it.
    holders : int
        Workers that the sample is spread over.
    """
    rows = sum(task.physical_rows for task in tasks)
    speed = _MACS_PER_CORE_SECOND * max(cores, 1)
    lists = max(spec.num_partitions, 1)
    codewords = 16 if "x4fs" in spec.factory else 256 if "PQ" in spec.factory else 0
    subs = int(match[1]) if (match := re.search(r"PQ(\d+)", spec.factory)) else 0
    code_macs = spec.dim * max(codewords, 1)
    graph_macs = spec.dim * _HNSW_LINKS * 40 if cost.family == "hnsw" else 0
    train = sample * lists * spec.dim * _KMEANS_ITERATIONS if spec.num_partitions else 0
    train += min(sample, 256 * codewords) * codewords * spec.dim * _PQ_ITERATIONS
    encode = rows * ((lists * spec.dim if spec.num_partitions else 0) + code_macs + graph_macs + 200 * spec.dim)
    sample_bytes = sample * spec.dim * 4
    worst = max((task.physical_rows for task in tasks), default=0)
    return Estimate(
        index_bytes=rows * cost.row_bytes + cost.fixed_bytes,
        sample_bytes=sample_bytes,
        peak_bytes=max(2 * sample_bytes // holders, encode_peak_bytes(cost, worst)),
        train_seconds=train / speed + subs * _SUB_VECTOR_SECONDS,
        encode_seconds=encode / speed + rows * _ROW_SECONDS,
    )


def _resolved_factory(spec: IndexSpec, parts: FactoryParts, dim: int, rows: int) -> ResolvedSpec:
    if parts.refine is not None and spec.refine not in ("auto", parts.refine):
        raise InvalidArgument(
            f"refine={spec.refine!r} was given, but the factory string refines with {parts.refine!r}",
            remedy="Say it once",
            parameter="refine",
            value=spec.refine,
        )
    _check_lists(parts.num_lists, rows)
    refine = parts.refine if spec.refine == "auto" else spec.refine
    if parts.base == "Flat" and refine is not None:
        raise _refine_of_flat(refine)
    return ResolvedSpec(
        index_type="FACTORY",
        metric=spec.metric,
        dim=dim,
        factory=parts.base,
        refine=refine,
        num_partitions=parts.num_lists,
        sample_rate=spec.sample_rate,
        seed=spec.seed,
    )


def _num_lists(spec: IndexSpec, kind: IndexType, rows: int) -> int:
    if not kind.startswith("IVF"):
        for parameter in ("num_partitions", "ivf_centroids"):
            if getattr(spec, parameter) is not None:
                raise InvalidArgument(
                    f"{parameter} was given, but {kind} has no partitions",
                    remedy=f"Leave it out, or use an IVF type instead of {kind}",
                    parameter=parameter,
                    value=spec.num_partitions,
                )
        if spec.coarse != "flat":
            raise InvalidArgument(
                f"coarse={spec.coarse!r} was given, but {kind} has no partitions to find",
                parameter="coarse",
                value=spec.coarse,
            )
        return 0
    if spec.ivf_centroids is not None:
        lists = len(spec.ivf_centroids)
        if spec.num_partitions not in (None, lists):
            raise InvalidArgument(
                f"num_partitions is {spec.num_partitions}, but ivf_centroids has {lists} rows",
                parameter="num_partitions",
                value=spec.num_partitions,
            )
        return lists
    if spec.num_partitions is not None:
        _check_lists(spec.num_partitions, rows)
        return spec.num_partitions
    root = 1 << math.ceil(math.log2(max(math.sqrt(rows), 1)))
    affordable = 1 << max(int(math.log2(max(rows / _ROWS_PER_LIST, 1))), 0)
    return max(1, min(root, affordable, _MAX_LISTS))


def _check_lists(lists: int, rows: int) -> None:
    if lists > rows:
        raise InsufficientData(
            f"{lists} partitions were asked for, but the dataset has {rows} rows",
            remedy="Lower num_partitions, leave it out, or use index_type='FLAT'",
            rows=rows,
            needed=lists,
        )


def _coarse(spec: IndexSpec, lists: int) -> str:
    if not lists:
        return ""
    graph = spec.coarse == "hnsw" or (spec.index_type == "AUTO" and lists >= _HNSW_LISTS)
    return f"IVF{lists}_HNSW{_HNSW_LINKS}," if graph else f"IVF{lists},"


def _codes(spec: IndexSpec, kind: IndexType, dim: int) -> str:
    if kind != "IVF_PQ":
        for parameter in ("num_sub_vectors", "pq_codebook"):
            if getattr(spec, parameter) is not None:
                raise InvalidArgument(
                    f"{parameter} was given, but {kind} has no sub-vectors",
                    remedy="Leave it out, or use index_type='IVF_PQ'",
                    parameter=parameter,
                    value=spec.num_sub_vectors,
                )
    if kind in ("FLAT", "IVF_FLAT", "HNSW_FLAT", "IVF_RQ"):
        if spec.num_bits is not None:
            raise InvalidArgument(
                f"num_bits={spec.num_bits} was given, but {kind} has a fixed number of bits",
                remedy="Leave it out",
                parameter="num_bits",
                value=spec.num_bits,
            )
        if kind == "IVF_RQ":
            return "RaBitQfs"
        return f"HNSW{_HNSW_LINKS},Flat" if kind == "HNSW_FLAT" else "Flat"
    if kind in ("IVF_SQ", "HNSW_SQ"):
        code = f"SQ{spec.num_bits or 8}"
        return f"HNSW{_HNSW_LINKS},{code}" if kind == "HNSW_SQ" else code
    bits = spec.num_bits or (4 if spec.index_type == "AUTO" else 8)
    subs = _sub_vectors(spec, dim, bits)
    return f"PQ{subs}x4fs" if bits == 4 else f"PQ{subs}np"


def _sub_vectors(spec: IndexSpec, dim: int, bits: int) -> int:
    if spec.num_sub_vectors is None:
        if bits == 4:
            return dim // 2 if dim % 2 == 0 else dim
        return max(m for m in range(1, max(dim // 8, 1) + 1) if dim % m == 0)
    if dim % spec.num_sub_vectors:
        divisors = [m for m in range(1, dim + 1) if dim % m == 0]
        nearest = min(divisors, key=lambda m: abs(m - (spec.num_sub_vectors or 0)))
        raise InvalidArgument(
            f"num_sub_vectors={spec.num_sub_vectors} does not divide the dimension {dim}",
            remedy=f"Use a divisor of {dim}, such as {nearest}",
            parameter="num_sub_vectors",
            value=spec.num_sub_vectors,
        )
    return spec.num_sub_vectors


def _refine(spec: IndexSpec, kind: IndexType) -> Refine | None:
    if spec.refine != "auto":
        if kind == "FLAT" and spec.refine is not None:
            raise _refine_of_flat(spec.refine)
        return spec.refine
    coarse_codes = kind == "IVF_RQ" or (kind == "IVF_PQ" and (spec.num_bits == 4 or spec.index_type == "AUTO"))
    return "sq8" if coarse_codes else None


def _refine_of_flat(refine: Refine) -> InvalidArgument:
    return InvalidArgument(
        f"refine={refine!r} was given, but FLAT is exact already",
        remedy="Leave refine out",
        parameter="refine",
        value=refine,
    )


def _rows_fitting(cost: RowCost, budget_bytes: int) -> int:
    per_row = encode_peak_bytes(cost, 1_000_000) - encode_peak_bytes(cost, 0)
    return max(0, (budget_bytes - encode_peak_bytes(cost, 0)) * 1_000_000 // max(per_row, 1))


def _divide(rows: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Cut into ``count`` non-empty runs whose ends lie nearest to equal shares."""
    total, count = sum(rows), max(count, 1)
    borders, seen, start = [0], 0, 0
    for index, size in enumerate(rows):
        left = count - len(borders)
        if left and index > start and (seen + size / 2 >= total * len(borders) / count or len(rows) - index <= left):
            borders.append(index)
            start = index
        seen += size
    borders.append(len(rows))
    return list(itertools.pairwise(borders))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A fragment, or consecutive rows of one."""

    fragment: FragmentState
    first: int
    rows: int


def _pieces(fragments: Sequence[FragmentState], most_rows: int | None) -> list[_Piece]:
    """Cut fragments of more rows into equal parts; none without a limit."""
    pieces = []
    for fragment in fragments:
        total = fragment.physical_rows
        count = 1 if most_rows is None else max(-(-total // most_rows), 1)
        borders = [total * i // count for i in range(count + 1)]
        pieces += [_Piece(fragment, first, end - first) for first, end in itertools.pairwise(borders)]
    return pieces


def _task(ordinal: int, pieces: Sequence[_Piece]) -> ShardTask:
    covers, position = [], 0
    for fragment, mine in itertools.groupby(pieces, key=lambda piece: piece.fragment):
        parts = list(mine)  # neighbours: what was cut to be small enough may go together after all
        rows = sum(part.rows for part in parts)
        covers.append(
            FragmentCover(
                fragment_id=fragment.fragment_id,
                physical_rows=fragment.physical_rows,
                first_position=position,
                signature=fragment.signature,
                part=None if rows == fragment.physical_rows else (parts[0].first, rows),
            )
        )
        position += rows
    return ShardTask(ordinal=ordinal, fragments=tuple(covers))


def _does_not_fit(task: ShardTask, cost: RowCost, budget_bytes: int, *, rows: int, more: str) -> BudgetExceeded:
    """Return the error for a shard that would have to be of fewer rows than it can be."""
    needed = encode_peak_bytes(cost, rows)
    what = f"a shard of {rows:,} rows"
    if rows < task.physical_rows:
        what = f"even {what} of the {task.physical_rows:,}"
    ways = [f"Raise memory_budget_bytes to {needed:,}"]
    if budget_bytes > _WORKING_BYTES:
        ways += [*([more] if more else []), "choose smaller codes (IVF_PQ with num_bits=4)"]
    return BudgetExceeded(
        f"{what} (fragments {_named(task.fragment_ids)}) needs {needed:,} bytes, {_WORKING_BYTES:,} of them for the"
        f" work itself; the budget is {budget_bytes:,}",
        remedy=f"{', '.join(ways[:-1])}, or {ways[-1]}" if len(ways) > 1 else ways[0],
        needed_bytes=needed,
        budget_bytes=budget_bytes,
    )


def _named(ids: Sequence[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:5])
    return shown if len(ids) <= 5 else f"{shown} and {len(ids) - 5} more"
