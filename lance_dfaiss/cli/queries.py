"""What ``search`` and ``query`` share: the options of a search, and what is shown of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from .edge import usage_error
from .output import Block, Line, Report, Table

if TYPE_CHECKING:
    import pyarrow as pa

    from ..search import Explanation, Index
    from ..serve.client import Client

    Source: TypeAlias = Index | Client

__all__ = ["QueryFlags", "ResultFlags", "checked_query", "explained", "found", "found_report", "shown_columns"]

_MAX_ROW_ID = 2**64 - 2
_K = 10
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
        int | None, typer.Option("--k", "-k", min=1, rich_help_panel=_RESULT, help=f"Rows to find, {_K} if left out.")
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

    @property
    def rows(self) -> int:
        """How many to find."""
        return self.k or _K

    def among(self) -> dict[str, Any]:
        """Return keyword arguments that every kind of search takes."""
        return {"filter": self.filter, "nprobe": self.nprobe, "fast_search": self.fast_search}


def checked_query(query: QueryFlags, result: ResultFlags) -> Any:
    """Check the options; return the query that was given by its numbers, None if it is a row of the dataset."""
    query.check()
    result.check()
    given = _given(query)
    count = len(given) if getattr(given, "ndim", 1) == 2 else 1  # of an array of two dimensions each row is one
    if result.radius is not None and count != 1:
        raise usage_error(f"--radius takes one query, and {query.vector_file!r} has {count}: choose a --row")
    return given


def shown_columns(text: str | None, names: Sequence[str], vector_column: str) -> list[str]:
    """Return the columns to show: those that the option names, else all but the vectors.

    Parameters
    ----------
    text : str or None
        Of the option.
    names : sequence of str
        All columns.
    vector_column : str
        Hundreds of numbers a row tell a reader nothing; whoever wants them names the column.
    """
    if text is not None:
        return [name.strip() for name in text.split(",") if name.strip()]
    return [name for name in names if name != vector_column]


def found(source: Source, query: Any, columns: list[str], result: ResultFlags) -> pa.Table:
    """Search, and return what is found."""
    if result.radius is not None:
        return source.range_search(query, result.radius, columns=columns, **result.among())
    return source.search(query, result.rows, columns=columns, ef=result.ef, k_factor=result.k_factor, **result.among())


def found_report(table: pa.Table, facts: Mapping[str, Any], result: ResultFlags, said: Sequence[Line] = ()) -> Report:
    """Return what was found.

    Parameters
    ----------
    table : pyarrow.Table
        From `found`.
    facts : mapping
        Of what it is the answer, for a program.
    result : ResultFlags
        What was asked for.
    said : sequence of Line
        For a reader, said after it.
    """
    rows = table.to_pylist()
    asked = {
        "k": result.rows if result.radius is None else None,
        "radius": result.radius,
        "filter": result.filter,
    }
    blocks: list[Block] = [Table(table.schema.names, [list(row.values()) for row in rows]), *said]
    return Report({**facts, **asked, "rows": rows}, blocks)


def explained(source: Source, name: str, query: Any, columns: list[str], result: ResultFlags) -> Report:
    """Search, and return what that says it did.

    Parameters
    ----------
    source : Index or Client
        What to search.
    name : str
        Of the index.
    query : array-like
        What to look for.
    columns : list of str
        To fetch.
    result : ResultFlags
        What to return.
    """
    told: Explanation = source.explain(
        query, result.rows, columns=columns, ef=result.ef, k_factor=result.k_factor, **result.among()
    )
    document = {
        "index": name,
        "version": told.version,
        "queries": told.queries,
        "k": told.k,
        "filter": result.filter,
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


def _given(query: QueryFlags) -> Any:
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
