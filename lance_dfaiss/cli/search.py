"""``lance-dfaiss search``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InvalidArgument, StorageError
from .options import DatasetArgument, JsonFlag, TrustedAccess
from .output import output
from .progress import reporting
from .queries import QueryFlags, ResultFlags, checked_query, explained, found, found_report, shown_columns

if TYPE_CHECKING:
    from ..lance_io import PinnedDataset
    from ..search import Index

__all__ = ["search"]


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
    given, where = checked_query(query, result), access.of_dataset()
    from .. import open_index
    from ..lance_io import PinnedDataset, open_dataset

    handle = open_dataset(dataset, storage_options=where["storage_options"])
    with reporting(only_on_terminal=True) as progress:
        opened = open_index(handle, index, progress=progress, **where)
    pinned = PinnedDataset(handle)
    if query.like_row is not None:
        given = _vector_of(pinned, opened, query.like_row)
    columns = shown_columns(result.columns, pinned.column_names, opened.view.resolution.column.name)
    if result.explain:
        report = explained(opened, opened.name, given, columns, result)
    else:
        facts = {"index": opened.name, "version": opened.version, "metric": opened.manifest.spec.metric}
        report = found_report(found(opened, given, columns, result), facts, result)
    output(as_json=as_json).show(report)


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
