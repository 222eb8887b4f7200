"""``lance-dfaiss plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..progress import SilentProgress
from .options import (
    Access,
    BuildFlags,
    ColumnArgument,
    DatasetOrTableArgument,
    JsonFlag,
    NamespaceFlags,
    RayFlags,
)
from .output import Facts, Report, output
from .text import format_bytes, format_seconds

if TYPE_CHECKING:
    from ..build import PlannedBuild

__all__ = ["plan"]


def plan(
    dataset: DatasetOrTableArgument,
    column: ColumnArgument,
    flags: BuildFlags,
    ray: RayFlags,
    access: Access,
    namespace: NamespaceFlags,
    as_json: JsonFlag = False,
) -> None:
    """Say what a build with the same options would do, without doing it."""
    spec, table, storage_options = flags.spec(column), namespace.given(dataset), access.storage_options()
    more = {**ray.given(), **table, "storage_options": storage_options}
    options = flags.options(access.index_uri, SilentProgress(), **more)
    from .. import plan_index
    from ..lance_io import Namespace, open_dataset

    handle = open_dataset(
        namespace.uri(dataset), storage_options=storage_options, namespace=Namespace.of_parameters(*table.values())
    )
    planned = plan_index(handle, spec, options)
    output(as_json=as_json).show(Report(_document(planned), [Facts(_facts(planned))]))


def _document(planned: PlannedBuild) -> dict[str, Any]:
    spec, estimate, tasks = planned.plan.spec, planned.estimate, planned.plan.tasks
    return {
        "name": planned.spec.name,
        "version": planned.pinned.version,
        "column": planned.column.name,
        "index_type": spec.index_type,
        "asked_for": planned.spec.index_type,
        "reason": _reason(planned),
        "factory": spec.factory,
        "refine": spec.refine,
        "metric": spec.metric,
        "dim": spec.dim,
        "num_partitions": spec.num_partitions,
        "rows": planned.rows,
        "sample_rows": planned.sample_rows,
        "shards": [{"fragments": len(task.fragments), "physical_rows": task.physical_rows} for task in tasks],
        "workers": planned.options.num_workers,
        "executor": "ray" if planned.on_ray else "local",
        "budget_bytes": planned.budget_bytes,
        "peak_bytes": estimate.peak_bytes,
        "sample_bytes": estimate.sample_bytes,
        "index_bytes": estimate.index_bytes,
        "train_seconds": estimate.train_seconds,
        "encode_seconds": estimate.encode_seconds,
        "where": planned.store.location,
        "replaces": None if planned.previous is None else planned.previous.pointer.generation,
    }


def _facts(planned: PlannedBuild) -> list[tuple[str, str]]:
    spec, estimate, tasks = planned.plan.spec, planned.estimate, planned.plan.tasks
    fragments = len({i for task in tasks for i in task.fragment_ids})  # one may be in several
    largest = max((task.physical_rows for task in tasks), default=0)
    who = " on Ray" if planned.on_ray else ""
    replaced = "nothing" if planned.previous is None else f"generation {planned.previous.pointer.generation}"
    return [
        ("index", planned.spec.name),
        ("column", f"{planned.column.name}, {spec.dim} x {planned.column.type.value_type}"),
        ("type", f"{spec.index_type}: {spec.factory}{f' refined with {spec.refine}' if spec.refine else ''}"),
        ("because", _reason(planned)),
        ("metric", spec.metric),
        ("rows", f"{planned.rows:,} in {fragments:,} fragments of version {planned.pinned.version}"),
        ("training sample", f"{planned.sample_rows:,} rows, {format_bytes(estimate.sample_bytes)}"),
        (
            "shards",
            f"{len(tasks):,}, the largest of {largest:,} rows, {planned.options.num_workers} at a time{who}",
        ),
        ("memory", f"{format_bytes(estimate.peak_bytes)} of {format_bytes(planned.budget_bytes)} at most, per worker"),
        ("disk", f"{format_bytes(estimate.index_bytes)} at {planned.store.location}"),
        (
            "time",
            f"train {format_seconds(estimate.train_seconds)}, encode {format_seconds(estimate.encode_seconds)}"
            " on this machine, roughly",
        ),
        ("replaces", replaced),
    ]


def _reason(planned: PlannedBuild) -> str:
    """Say why it is this index, in a sentence."""
    asked, spec = planned.spec, planned.plan.spec
    if asked.factory is not None:
        return "the factory string was given"
    if asked.index_type != "AUTO":
        return "the type was given"
    if spec.index_type == "FLAT":
        return f"AUTO: {planned.rows:,} rows are few enough to compare with all of them, which is exact"
    lists = "as given" if asked.num_partitions is not None else f"about the square root of {planned.rows:,} rows"
    if spec.refine is not None:
        refined = f"and a {spec.refine} store to re-rank with"
    elif asked.refine == "auto":
        refined = "and no refine store, since the largest fragment would not fit the memory budget with it"
    else:
        refined = "and no refine store, as given"
    return f"AUTO: {spec.num_partitions:,} IVF lists, {lists}, short codes to scan fast, {refined}"
