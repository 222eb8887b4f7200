"""``lance-dfaiss rollback`` and ``adopt``: another generation, or other files, become the dataset's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import IndexNotFound
from .cluster import RELOAD_SECONDS, move_report
from .edge import usage_error
from .options import DatasetArgument, JsonFlag, OptionalNameArgument, Reach, TrustedAccess
from .output import Line, Report, output
from .reach import ServerReach

if TYPE_CHECKING:
    from ..launch.control import Move

__all__ = ["adopt", "rollback"]


@dataclass(frozen=True, kw_only=True)
class ServedBy(ServerReach):
    """Who serves the index, so that they take part in the change."""

    cluster_file: Annotated[
        str | None,
        typer.Option(
            "--cluster-file",
            metavar="FILE",
            help="Have the servers of this cluster move at once, all of them to the new version.",
        ),
    ] = None

    def check(self) -> None:
        """Raise a usage error for options that have no effect without a cluster."""
        ServerReach.check(self)
        options = ("token_file", "tls_ca", "tls_cert", "timeout")
        said = [f"--{name.replace('_', '-')}" for name in options if getattr(self, name) is not None]
        if said and self.cluster_file is None:
            raise usage_error(f"{', '.join(said)} without --cluster-file")


def rollback(
    dataset: DatasetArgument,
    access: TrustedAccess,
    served: ServedBy,
    name: OptionalNameArgument = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the generation current again that was current before; run again, it undoes itself."""
    served.check()
    where = access.of_dataset()
    from .. import rollback as roll_back
    from ..lance_io import PinnedDataset, open_dataset
    from ..pointers import find_pointer

    handle = open_dataset(dataset, storage_options=where["storage_options"])
    # Before anything is changed: a cluster that cannot be told, or serves something else, is a mistake.
    move = None if served.cluster_file is None else _mover(served, dataset, name, handle, access)
    handle = roll_back(handle, name, **where)
    found = find_pointer(PinnedDataset(handle, where["storage_options"]), name, access.index_uri)
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
    if move is None:
        output(as_json=as_json).show(Report(document, [said]))
        return
    moves = move(handle.version)
    output(as_json=as_json).show(move_report(moves, document, [said]))
    if any(each.error is not None for each in moves):
        raise typer.Exit(1)


def _mover(
    served: ServedBy, dataset: str, name: str | None, handle: Any, access: TrustedAccess
) -> Callable[[int], list[Move]]:
    """Return what has all servers of an index move to a version."""
    from ..lance_io import PinnedDataset
    from ..launch.control import move_servers
    from ..pointers import find_pointer
    from ..serve.cluster import read_cluster

    location, storage_options = served.cluster_file or "", access.storage_options()
    cluster = read_cluster(location, storage_options)
    caller = served.caller(cluster, seconds=RELOAD_SECONDS)
    index = find_pointer(PinnedDataset(handle, storage_options), name, access.index_uri).name
    for each in cluster.indexes:
        if each.index == index and _place(each.dataset) == _place(dataset):
            called = each.name
            return lambda version: move_servers(
                location, caller, index=called, version=version, hold=False, storage_options=storage_options
            )
    known = ", ".join(f"{each.index!r} of {each.dataset}" for each in cluster.indexes)
    raise IndexNotFound(
        f"the cluster of {location} does not serve index {index!r} of {dataset}",
        remedy=f"It serves {known}; nothing was changed",
        name=index,
        available=tuple(each.name for each in cluster.indexes),
    )


def _place(dataset: str) -> str:
    return dataset.rstrip("/") if "://" in dataset else os.path.realpath(dataset)


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
