"""What a build is going to do: decided, and refused if it cannot work, before anything is written."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from dataclasses import dataclass

from .. import engine
from ..errors import IndexExists, ReadOnlyStorage
from ..lance_io import DatasetPlace, LanceDataset, PinnedDataset, VectorColumn, has_foreign_client
from ..manifest import BuildPlan, DatasetEntry
from ..plan import Estimate, RowCost, estimate, plan_tasks, resolve_spec, sample_rows, training_parts
from ..pointers import FoundPointer, find_pointer, stored_pointers
from ..spec import BuildOptions, IndexSpec, ResolvedSpec
from ..storage import Store, StorePlace
from .executors import namespace_asked, store_place, uses_ray, worker_budget_bytes, working_cores
from .standing import check_handle_is_new

__all__ = ["PlannedBuild", "plan_index", "plan_resolved"]

_log = logging.getLogger(__name__)

# Rows that tell AUTO which share of a column can be indexed.
_PROBE_ROWS = 4_096


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBuild:
    """What a build is going to do, in numbers; nothing has been written.

    Parameters
    ----------
    spec : IndexSpec
        What was asked for.
    options : BuildOptions
        How.
    pinned : PinnedDataset
        The dataset version it is built over.
    column : VectorColumn
        The vector column.
    place : DatasetPlace
        The same version, for other processes.
    store : Store
        Where generations lie.
    store_place : StorePlace
        The same, for other processes.
    previous : FoundPointer or None
        Index of the same name that it will replace.
    on_ray : bool
        Whether Ray's workers build it.
    plan : BuildPlan
        Index, shards and fragments, with nothing left open.
    cost : RowCost
        Bytes of a row.
    rows : int
        Live rows.
    sample_rows : int
        Training rows.
    budget_bytes : int
        Memory per worker.
    estimate : Estimate
        What it will take.
    """

    spec: IndexSpec
    options: BuildOptions
    pinned: PinnedDataset
    column: VectorColumn
    place: DatasetPlace
    store: Store
    store_place: StorePlace
    previous: FoundPointer | None
    on_ray: bool
    plan: BuildPlan
    cost: RowCost
    rows: int
    sample_rows: int
    budget_bytes: int
    estimate: Estimate


def plan_index(dataset: LanceDataset, spec: IndexSpec, options: BuildOptions) -> PlannedBuild:
    """Decide everything about a build, and refuse what cannot work; writes nothing.

    Parameters
    ----------
    dataset : lance.LanceDataset
        Handle at the version to build over.
    spec : IndexSpec
        What to build.
    options : BuildOptions
        How.

    Raises
    ------
    IndexExists, InvalidArgument, UnknownColumn, InsufficientData, BudgetExceeded, DatasetChanged
    ReadOnlyStorage, UnsafeStorage
        With what was expected, found, and what to do.
    """
    pinned = PinnedDataset(dataset, options.storage_options)
    column = pinned.vector_column(spec.column)
    states = pinned.fragments(column)
    rows = sum(state.live_rows for state in states)
    resolved = resolve_spec(
        spec,
        dim=column.dim,
        rows=_usable_rows(pinned, column, spec, rows),
        largest_fragment_rows=max((state.physical_rows for state in states), default=0),
        budget_bytes=worker_budget_bytes(options),
        parts=None if spec.factory is None else engine.split_factory(spec.factory),
    )
    return plan_resolved(pinned, column, spec, resolved, options, _previous(pinned, spec, options))


def plan_resolved(
    pinned: PinnedDataset,
    column: VectorColumn,
    spec: IndexSpec,
    resolved: ResolvedSpec,
    options: BuildOptions,
    previous: FoundPointer | None,
) -> PlannedBuild:
    """Decide about a build whose index is settled already; see `plan_index`.

    Parameters
    ----------
    pinned : PinnedDataset
        The version to build over.
    column : VectorColumn
        The vector column.
    spec : IndexSpec
        What was asked for.
    resolved : ResolvedSpec
        What that came to.
    options : BuildOptions
        How.
    previous : FoundPointer or None
        The index that it will replace.
    """
    states = pinned.fragments(column)
    rows = sum(state.live_rows for state in states)
    budget, on_ray = worker_budget_bytes(options), uses_ray(options)
    engine.check_trainable(resolved, rows)
    cost = engine.footprint(resolved.factory, column.dim, resolved.metric, resolved.refine)
    tasks = plan_tasks(
        states,
        cost,
        num_shards=options.num_shards,
        budget_bytes=budget,
        split=True,
        workers=options.num_workers if on_ray else 1,
    )
    # On Ray the sample is spread over the workers.
    holders = options.num_workers if on_ray else 1
    sample = sample_rows(resolved, rows=rows, budget_bytes=budget * holders)
    if on_ray:
        holders = training_parts(
            sample=sample,
            dim=resolved.dim,
            lists=resolved.num_partitions,
            workers=options.num_workers,
            threads=working_cores(options) // options.num_workers,
            budget_bytes=budget,
        )
        if len(tasks) < options.num_workers:
            _log.warning(
                "index %r: %d of %d workers will encode, as there are no more shards: num_shards asks for more, at"
                " most one for each fragment, or part of one that the budget needs cut",
                spec.name,
                len(tasks),
                options.num_workers,
            )
    plan = BuildPlan(
        generation=str(uuid.uuid4()),
        name=spec.name,
        request=_request_digest(spec, options),
        spec=resolved,
        dataset=DatasetEntry(
            uri=pinned.root,
            version=pinned.version,
            column=column.name,
            field_id=column.field_id,
            value_type=column.type.value_type,
        ),
        previous=None if previous is None else previous.pointer.generation,
        tasks=tasks,
    )
    check_handle_is_new(plan, pinned.latest(), column)
    place_of_store = store_place(pinned, options.index_uri)
    place = DatasetPlace.of(pinned, namespace_asked(options))
    if on_ray and place.namespace is None and has_foreign_client(pinned.lance):
        _log.warning(
            "the handle of %s was opened with a namespace client, which cannot be sent to workers: they get the"
            " credentials of now, and fail when these expire; pass namespace_impl, namespace_properties and table_id",
            pinned.uri,
        )
    return PlannedBuild(
        spec=spec,
        options=options,
        pinned=pinned,
        column=column,
        place=place,
        store=_writable_store(pinned, place_of_store),
        store_place=place_of_store,
        previous=previous,
        on_ray=on_ray,
        plan=plan,
        cost=cost,
        rows=rows,
        sample_rows=sample,
        budget_bytes=budget,
        estimate=estimate(resolved, cost, tasks, sample=sample, cores=working_cores(options), holders=holders),
    )


def _usable_rows(pinned: PinnedDataset, column: VectorColumn, spec: IndexSpec, rows: int) -> int:
    """Return the rows that AUTO should reckon with: a column that is half filled has half as many."""
    if spec.index_type != "AUTO" or rows < 1:
        return rows
    probe = pinned.sample(column, _PROBE_ROWS, spec.metric, spec.seed)
    return max(rows * len(probe.vectors) // max(probe.drawn_rows, 1), 1)


def _previous(pinned: PinnedDataset, spec: IndexSpec, options: BuildOptions) -> FoundPointer | None:
    newest = pinned.latest()
    if spec.name not in stored_pointers(newest, options.index_uri):
        return None
    if not options.replace:
        raise IndexExists(
            f"an index named {spec.name!r} exists on {pinned.uri}",
            remedy="Pass replace=True, or another name",
            name=spec.name,
        )
    return find_pointer(newest, spec.name, options.index_uri)


def _writable_store(pinned: PinnedDataset, place: StorePlace) -> Store:
    pinned.check_commits()  # the commit asks too, but that is an hour later
    store = place.open(pinned.session_store)
    if place.url is not None:
        store.check_writable()
        return store
    try:
        pinned.check_writable()
        store.check_writable()
    except ReadOnlyStorage as exc:
        raise ReadOnlyStorage(
            f"the dataset at {pinned.uri} cannot be written",
            remedy="Pass index_uri=... naming a place for the index that can be written",
            location=pinned.uri,
        ) from exc
    return store


def _request_digest(spec: IndexSpec, options: BuildOptions) -> str:
    """Digest what the caller asked for, so that only the same build is resumed."""
    asked = {
        name: getattr(spec, name)
        for name in (
            "column", "index_type", "metric", "factory", "num_partitions", "num_sub_vectors", "num_bits",
            "coarse", "refine", "sample_rate", "seed",
        )
    }  # fmt: skip
    for name in ("ivf_centroids", "pq_codebook"):
        array = getattr(spec, name)
        asked[name] = None if array is None else hashlib.sha256(array.tobytes()).hexdigest()
    asked["num_shards"] = options.num_shards
    asked["on_invalid"] = options.on_invalid
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
