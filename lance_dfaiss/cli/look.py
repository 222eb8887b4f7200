"""``lance-dfaiss list`` and ``lance-dfaiss describe``."""

from __future__ import annotations

from typing import Annotated

import typer

from .index_report import index_report
from .options import Access, DatasetArgument, JsonFlag, OptionalNameArgument, TrustedAccess
from .output import Line, Report, output

__all__ = ["describe", "list_names"]


def list_names(dataset: DatasetArgument, access: Access, as_json: JsonFlag = False) -> None:
    """List the indexes of a dataset, one name to a line."""
    where = access.of_dataset()
    from .. import list_indices

    names = list_indices(dataset, **where)
    output(as_json=as_json).show(Report({"dataset": dataset, "indexes": names}, [Line(name) for name in names]))


def describe(
    dataset: DatasetArgument,
    access: TrustedAccess,
    name: OptionalNameArgument = None,
    build: Annotated[
        bool, typer.Option("--build", help="Tell what building it took too: phases, shards, retries.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Describe an index from what is stored of it, without loading it."""
    where = access.of_dataset()
    from .. import describe_index

    report = index_report(describe_index(dataset, name, build=build, **where), build=build)
    output(as_json=as_json).show(report)
