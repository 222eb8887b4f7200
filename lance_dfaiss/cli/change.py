"""``lance-dfaiss rollback`` and ``adopt``: another generation, or other files, become the dataset's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import typer

from .options import DatasetArgument, JsonFlag, OptionalNameArgument, Reach, TrustedAccess
from .output import Line, Report, output

__all__ = ["adopt", "rollback"]


def rollback(
    dataset: DatasetArgument, access: TrustedAccess, name: OptionalNameArgument = None, as_json: JsonFlag = False
) -> None:
    """Make the generation current again that was current before; run again, it undoes itself."""
    where = access.of_dataset()
    from .. import rollback as roll_back
    from ..lance_io import PinnedDataset, open_dataset
    from ..pointers import find_pointer

    handle = roll_back(open_dataset(dataset, storage_options=where.pop("storage_options")), name, **where)
    found = find_pointer(PinnedDataset(handle), name, access.index_uri)
    document = {
        "name": found.name,
        "version": handle.version,
        "generation": found.pointer.generation,
        "previous": found.pointer.previous,
    }
    said = Line(
        f"{found.name!r} is rolled back from generation {found.pointer.previous}:"
        f" now generation {found.pointer.generation} at version {handle.version}"
    )
    output(as_json=as_json).show(Report(document, [said]))


@dataclass(frozen=True, kw_only=True)
class SourceAccess(Reach):
    """Where the files of an inherited index are."""

    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="DATASET",
            help="Dataset that has the files, or the place where an index outside of one lies.",
        ),
    ] = None
    allow_index_uri: Annotated[
        list[str],
        typer.Option(
            "--allow-index-uri",
            metavar="URI",
            help="Place that the pointer may lead to when no --source is given; may be repeated.",
        ),
    ] = field(default_factory=list)


def adopt(
    dataset: DatasetArgument, access: SourceAccess, name: OptionalNameArgument = None, as_json: JsonFlag = False
) -> None:
    """Copy the files of an index that a clone has inherited, and make them the clone's own."""
    storage_options = access.storage_options()
    from .. import adopt_index
    from ..lance_io import PinnedDataset, open_dataset
    from ..pointers import find_pointer

    handle = open_dataset(dataset, storage_options=storage_options)
    before = find_pointer(PinnedDataset(handle), name)
    adopt_index(
        handle,
        name,
        source=access.source,
        allowed_index_uris=tuple(access.allow_index_uri),
        storage_options=storage_options,
    )
    found = find_pointer(PinnedDataset(handle), name)
    changed = found.text != before.text
    document = {
        "name": found.name,
        "version": handle.version,
        "changed": changed,
        "generation": found.pointer.generation,
    }
    said = "now has its files in the dataset" if changed else "is the dataset's own already"
    output(as_json=as_json).show(
        Report(
            document,
            [Line(f"{found.name!r} {said}: generation {found.pointer.generation} at version {handle.version}")],
        )
    )
