"""``lance-dfaiss update``, ``sync`` and ``optimize``: an index keeps up with its dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DatasetArgument,
    DatasetOrTableArgument,
    InvalidOption,
    JsonFlag,
    NamespaceFlags,
    OptionalNameArgument,
    RayFlags,
    TrustedAccess,
    WorkFlags,
)
from .output import Line, Report, output
from .progress import reporting
from .text import counted, format_seconds

if TYPE_CHECKING:
    from ..build import OptimizeReport, SyncReport, UpdateReport
    from ..lance_io import LanceDataset

__all__ = ["optimize", "sync", "update"]


def update(
    dataset: DatasetOrTableArgument,
    work: WorkFlags,
    ray: RayFlags,
    access: TrustedAccess,
    namespace: NamespaceFlags,
    name: OptionalNameArgument = None,
    on_invalid: InvalidOption = "skip",
    as_json: JsonFlag = False,
) -> None:
    """Index the rows of the newest version that the index does not hold, with the model there is."""
    options, where = work.given(on_invalid=on_invalid, **ray.given(), **namespace.given(dataset)), access.of_dataset()
    from .. import update_index

    handle = _opened(namespace.uri(dataset), where, **options)
    with reporting() as progress:
        report = update_index(handle, name, progress=progress, **options, **where)
    _show(handle, report, _updated(report), as_json=as_json)


def sync(
    dataset: DatasetArgument, access: TrustedAccess, name: OptionalNameArgument = None, as_json: JsonFlag = False
) -> None:
    """Write down where compactions moved indexed rows; do it before Lance cleans up old versions."""
    where = access.of_dataset()
    from .. import sync_index

    handle = _opened(dataset, where)
    report = sync_index(handle, name, **where)
    _show(handle, report, _synced(report), as_json=as_json)


def optimize(
    dataset: DatasetOrTableArgument,
    work: WorkFlags,
    ray: RayFlags,
    access: TrustedAccess,
    namespace: NamespaceFlags,
    name: OptionalNameArgument = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train a new model and encode all rows with it.")] = False,
    max_dead_share: Annotated[
        float,
        typer.Option(
            "--max-dead-share", min=0, max=1, metavar="SHARE", help="Rewrite shards with more dead entries than this."
        ),
    ] = 0.2,
    as_json: JsonFlag = False,
) -> None:
    """Merge the shards that updates added, and drop entries of dead rows."""
    options, where = work.given(**ray.given(), **namespace.given(dataset)), access.of_dataset()
    from .. import optimize_index

    handle = _opened(namespace.uri(dataset), where, **options)
    with reporting() as progress:
        report = optimize_index(
            handle, name, retrain=retrain, max_dead_share=max_dead_share, progress=progress, **options, **where
        )
    _show(handle, report, _optimized(report), as_json=as_json)


def _opened(dataset: str | None, where: dict[str, Any], **options: Any) -> LanceDataset:
    from ..lance_io import Namespace, open_dataset

    table = (options.get(key) for key in ("namespace_impl", "namespace_properties", "table_id"))
    return open_dataset(dataset, storage_options=where["storage_options"], namespace=Namespace.of_parameters(*table))


def _show(
    handle: LanceDataset, report: UpdateReport | SyncReport | OptimizeReport, sentences: list[str], *, as_json: bool
) -> None:
    from dataclasses import asdict

    document = {"version": handle.version, **asdict(report)}
    now = f"generation {report.generation} at version {handle.version}"
    last = f"now {now}" if report.changed else f"nothing to do: {now}"
    output(as_json=as_json).show(Report(document, [Line(text) for text in (*sentences, last)]))


def _updated(report: UpdateReport) -> list[str]:
    said = []
    if report.added_shards:
        shards = counted(report.added_shards, "shard")
        said.append(f"added {counted(report.added_rows, 'row')} in {shards}, in {format_seconds(report.seconds)}")
    said += [_mapped(report.mapped_rows)] if report.mapped_rows else []
    if report.drift is not None:
        said.append(
            f"drift {report.drift:.2f}: mean squared distance of the new rows to their centroids over that of the old"
        )
    return said


def _synced(report: SyncReport) -> list[str]:
    return [_mapped(report.mapped_rows)] if report.changed else []


def _optimized(report: OptimizeReport) -> list[str]:
    if not report.changed:
        return []
    shards = f"{report.shards_before:,} to {counted(report.shards_after, 'shard')}"
    dropped = f"dropped {counted(report.dropped_rows, 'dead row')}"
    return [f"from {shards}, {dropped}, in {format_seconds(report.seconds)}"]


def _mapped(rows: int) -> str:
    return f"wrote down where compactions moved {counted(rows, 'row')}"
