"""``lance-dfaiss search``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidArgument, StorageError
from .edge import usage_error
from .options import DatasetArgument, JsonFlag, TrustedAccess
from .output import Line, Report, Table, output
from .progress import reporting

if TYPE_CHECKING:
    import pyarrow as pa

    from ..lance_io import PinnedDataset
    from ..search import Explanation, Index

__all__ = ["K", "QueryFlags", "ResultFlags", "count_queries", "explanation_report", "given_query", "search"]

_MAX_ROW_ID = 2**64 - 2
K = 10
_QUERY, _RESULT = "What to look for, one of them", "What to return"


@dataclass(frozen=True, kw_only=True)
class QueryFlags:
    """The query, in one of three ways."""

    vector: Annotated[
        str | None,
        typer.Option("--vector", metavar="NUMBERS", rich_help_panel=_QUERY, help="The query itself, as 0.1,0.2,..."),
    ] = None
    vector_file: Annotated[
        str | None,
        typer.Option(
            "--vector-file", metavar="FILE", rich_help_panel=_QUERY, help="A .npy file with one query, or one per row."
        ),
    ] = None
    row: Annotated[
        int | None,
        typer.Option("--row", min=0, rich_help_panel=_QUERY, help="Row of the --vector-file; all rows if left out."),
    ] = None
    like_row: Annotated[
        int | None,
        typer.Option(
            "--like-row",
            min=0,
            max=_MAX_ROW_ID,
            metavar="ROWID",
            rich_help_panel=_QUERY,
            help="Row id of a row in the dataset: look for rows like it.",
        ),
    ] = None

    def check(self) -> None:
        """Raise a usage error unless there is exactly one query."""
        if sum(value is not None for value in (self.vector, self.vector_file, self.like_row)) != 1:
            raise usage_error("give exactly one of --vector, --vector-file and --like-row")
        if self.row is not None and self.vector_file is None:
            raise usage_error("--row needs --vector-file")


@dataclass(frozen=True, kw_only=True)
class ResultFlags:
    """What to return, and how hard to look."""

    k: Annotated[
        int | None, typer.Option("--k", "-k", min=1, rich_help_panel=_RESULT, help=f"Rows to find, {K} if left out.")
    ] = None
    radius: Annotated[
        float | None,
        typer.Option("--radius", rich_help_panel=_RESULT, help="Find all rows nearer than this instead of k rows."),
    ] = None
    filter: Annotated[
        str | None,
        typer.Option(
            "--filter", metavar="SQL", rich_help_panel=_RESULT, help="Look only among the rows that match Lance's SQL."
        ),
    ] = None
    fast_search: Annotated[
        bool,
        typer.Option("--fast-search", rich_help_panel=_RESULT, help="Leave out rows that are not in the index yet."),
    ] = False
    explain: Annotated[
        bool,
        typer.Option("--explain", rich_help_panel=_RESULT, help="Search, and say what was done instead of the rows."),
    ] = False
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="A,B,...",
            rich_help_panel=_RESULT,
            help="Columns to show; all but the vectors if left out.",
        ),
    ] = None
    nprobe: Annotated[
        int | None, typer.Option("--nprobe", min=1, rich_help_panel=_RESULT, help="IVF lists to search.")
    ] = None
    ef: Annotated[int | None, typer.Option("--ef", min=1, rich_help_panel=_RESULT, help="HNSW search width.")] = None
    k_factor: Annotated[
        int | None,
        typer.Option("--k-factor", min=1, rich_help_panel=_RESULT, help="Candidates per result to re-rank."),
    ] = None

    def check(self) -> None:
        """Raise a usage error for options that mean nothing together."""
        if self.radius is None:
            return
        for option in ("explain", "k", "ef", "k_factor"):
            if getattr(self, option) not in (None, False):
                raise usage_error(f"--radius and --{option.replace('_', '-')} cannot be given together")

    def among(self) -> dict[str, Any]:
        """Return keyword arguments that every kind of search takes."""
        return {"filter": self.filter, "nprobe": self.nprobe, "fast_search": self.fast_search}


def search(
    dataset: DatasetArgument,
    query: QueryFlags,
    result: ResultFlags,
    access: TrustedAccess,
    index: Annotated[
        str | None,
        typer.Option("--index", metavar="NAME", help="Name of the index; may be left out when there is one."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find the rows nearest to a query."""
    query.check()
    result.check()
    given, where = given_query(query), access.of_dataset()
    if result.radius is not None and given is not None and count_queries(given) != 1:
        raise usage_error(
            f"--radius takes one query, and {query.vector_file!r} has {count_queries(given)}: choose a --row"
        )
    from .. import open_index
    from ..lance_io import PinnedDataset, open_dataset

    handle = open_dataset(dataset, storage_options=where.pop("storage_options"))
    with reporting(only_on_terminal=True) as progress:
        opened = open_index(handle, index, progress=progress, **where)
    pinned = PinnedDataset(handle)
    if query.like_row is not None:
        given = _vector_of(pinned, opened, query.like_row)
    columns = _columns(result.columns, pinned, opened)
    output(as_json=as_json).show(
        _explained(opened, given, columns, result) if result.explain else _found(opened, given, columns, result)
    )


def _found(opened: Index, query: Any, columns: list[str], result: ResultFlags) -> Report:
    table: pa.Table
    if result.radius is None:
        table = opened.search(
            query, result.k or K, columns=columns, ef=result.ef, k_factor=result.k_factor, **result.among()
        )
    else:
        table = opened.range_search(query, result.radius, columns=columns, **result.among())
    rows = table.to_pylist()
    document = {
        "index": opened.name,
        "version": opened.version,
        "metric": opened.manifest.spec.metric,
        "k": (result.k or K) if result.radius is None else None,
        "radius": result.radius,
        "filter": result.filter,
        "rows": rows,
    }
    return Report(document, [Table(table.schema.names, [list(row.values()) for row in rows])])


def _explained(opened: Index, query: Any, columns: list[str], result: ResultFlags) -> Report:
    told: Explanation = opened.explain(
        query, result.k or K, columns=columns, ef=result.ef, k_factor=result.k_factor, **result.among()
    )
    return explanation_report(opened.name, told, result.filter)


def explanation_report(name: str, told: Explanation, filter: str | None) -> Report:
    """Return what a search says it did.

    Parameters
    ----------
    name : str
        Of the index.
    told : Explanation
        What it says.
    filter : str or None
        Among which rows.
    """
    document = {
        "index": name,
        "version": told.version,
        "queries": told.queries,
        "k": told.k,
        "filter": filter,
        "results": told.results,
        "seconds": told.seconds,
        "rows": {
            "live": told.live_rows,
            "masked": told.masked_rows,
            "mapped": told.mapped_rows,
            "tail": told.tail_rows,
        },
        "stages": [{"name": stage.name, "seconds": stage.seconds, **stage.facts} for stage in told.stages],
    }
    return Report(document, [Line(text) for text in str(told).splitlines()])


def count_queries(queries: Any) -> int:
    """Count the queries: a list is the numbers of one, an array of two dimensions has one per row."""
    return len(queries) if getattr(queries, "ndim", 1) == 2 else 1


def given_query(query: QueryFlags) -> Any:
    """Return the query that was given by its numbers, None if it is a row; a usage error if it cannot be read."""
    if query.vector is not None:
        return _numbers(query.vector)
    return None if query.vector_file is None else _from_file(query.vector_file, query.row)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as exc:
        raise usage_error(f"--vector must be numbers between commas, like 0.1,-2,3e-4: {exc}") from exc


def _from_file(path: str, row: int | None) -> Any:
    import numpy as np

    try:
        # Mapped, so that one row of a large file costs one row.
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as exc:
        raise usage_error(f"--vector-file {path!r} cannot be read as a .npy file: {exc}") from exc
    if not isinstance(stored, np.ndarray) or stored.ndim not in (1, 2):
        raise usage_error(f"--vector-file {path!r} must hold one array of one or two dimensions")
    if row is None:
        return stored
    if stored.ndim == 1 or row >= len(stored):
        held = "one query and no rows" if stored.ndim == 1 else f"rows 0 to {len(stored) - 1}"
        raise usage_error(f"--row {row}: {path!r} has {held}")
    return stored[row]


def _vector_of(pinned: PinnedDataset, opened: Index, row_id: int) -> Any:
    """Return the stored vector of a row, float32 ``(dim,)``."""
    import numpy as np

    from ..vectors import decode_vectors

    column = opened.view.resolution.column.name  # by which it may be called now
    try:
        fetched = pinned.fetch(np.array([row_id], dtype=np.uint64), [column])
    except StorageError as exc:
        raise InvalidArgument(
            f"row {row_id} cannot be read from the dataset: {exc.message}",
            remedy="--like-row takes a row id as a search prints it in the column _rowid",
            parameter="like_row",
            value=row_id,
        ) from exc
    spec = opened.manifest.spec
    decoded = decode_vectors(fetched.column(0).combine_chunks(), spec.dim, spec.metric, column=column)
    if not decoded.usable[0]:
        raise InvalidArgument(
            f"row {row_id} has no usable vector in column {column!r}",
            remedy="Take another row",
            parameter="like_row",
            value=row_id,
        )
    return decoded.values[0]


def _columns(text: str | None, pinned: PinnedDataset, opened: Index) -> list[str]:
    if text is not None:
        return [name.strip() for name in text.split(",") if name.strip()]
    # Hundreds of numbers a row tell a reader nothing; whoever wants them names the column.
    return [name for name in pinned.lance.schema.names if name != opened.view.resolution.column.name]
