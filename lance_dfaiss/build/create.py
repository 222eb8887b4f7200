"""`create_index`: plan, train, encode, check, commit. Every phase can be run again after an interruption."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .. import engine
from ..errors import (
    BudgetExceeded,
    CommitConflict,
    CorruptIndex,
    DatasetChanged,
    IndexExists,
    InsufficientData,
    InvalidArgument,
    InvalidVectors,
    ReadOnlyStorage,
    RecallTooLow,
    StorageError,
)
from ..lance_io import (
    DatasetPlace,
    LanceDataset,
    PinnedDataset,
    VectorColumn,
    has_foreign_client,
    move_to_latest,
    open_dataset,
)
from ..manifest import (
    BuildPlan,
    DatasetEntry,
    Manifest,
    RecallReport,
    ShardRecord,
    decode_plan,
    decode_shard_record,
    encode,
)
from ..plan import Estimate, RowCost, estimate, plan_tasks, resolve_spec, sample_rows, training_parts
from ..pointers import FoundPointer, find_pointer, stored_pointers
from ..progress import PhaseMeter, Progress, SilentProgress
from ..spec import BuildOptions, IndexSpec, ResolvedSpec
from ..storage import MAX_DOCUMENT_BYTES, Store, StorePlace
from ..types import (
    AUTO_RECALL_TARGET,
    DEFAULT_SEED,
    Coarse,
    Executor,
    Float32Array,
    IndexType,
    Metric,
    OnInvalid,
    Refine,
)
from .check import RecallMeter, ShardCheck
from .commit import publish_manifest, write_manifest, write_records
from .encode import EncodeJob
from .executors import namespace_asked, open_runner, store_place, uses_ray, worker_budget_bytes, working_cores
from .lease import Lease, is_leased
from .parts import PartRecipe
from .ray_runner import RayRunner
from .ray_training import train_on_ray
from .report import ReportBook, TimedWork
from .runner import LocalRunner
from .standing import check_handle_is_new, removal_told, revived_in, stand
from .train import TrainedModel, find_trained, load_arrays, train

__all__ = ["PlannedBuild", "create_index", "plan_index", "plan_resolved", "remove_unfinished", "run_build"]

_log = logging.getLogger(__name__)

_PLAN_FILE = "plan.json"

# Rows that tell AUTO which share of a column can be indexed.
_PROBE_ROWS = 4_096

# After these nothing that was built can be of use to a second try.
_HOPELESS = (InvalidVectors, InsufficientData, CommitConflict, DatasetChanged)

# Nor after these, if there is no model yet.
_HOPELESS_UNTRAINED = (BudgetExceeded, InvalidArgument)


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


def create_index(
    dataset: str | os.PathLike[str] | LanceDataset | None,
    column: str,
    index_type: IndexType = "AUTO",
    name: str | None = None,
    *,
    metric: Metric = "l2",
    replace: bool = False,
    num_partitions: int | None = None,
    num_sub_vectors: int | None = None,
    num_bits: int | None = None,
    sample_rate: int = 256,
    ivf_centroids: Float32Array | None = None,
    pq_codebook: Float32Array | None = None,
    factory: str | None = None,
    coarse: Coarse = "flat",
    refine: Refine | Literal["auto"] | None = "auto",
    num_shards: int | None = None,
    num_segments: int | None = None,
    num_workers: int = 1,
    memory_budget_bytes: int | None = None,
    on_invalid: OnInvalid = "skip",
    min_recall: float | None = None,
    index_uri: str | None = None,
    resume: bool = False,
    seed: int = DEFAULT_SEED,
    storage_options: Mapping[str, str] | None = None,
    block_size: int | None = None,
    executor: Executor = "auto",
    ray_address: str | None = None,
    ray_remote_args: Mapping[str, Any] | None = None,
    task_deadline_seconds: float | None = None,
    namespace_impl: str | None = None,
    namespace_properties: Mapping[str, str] | None = None,
    table_id: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> LanceDataset:
    """Build a FAISS index over a vector column and commit it to the dataset.

    Parameters
    ----------
    dataset : str, path, lance.LanceDataset or None
        The dataset; built over the version that the handle is at. None for a table of a namespace.
    column : str
        Vector column, dotted for a nested field.
    index_type : str
        ``"AUTO"``, ``"FLAT"``, ``"IVF_FLAT"``, ``"IVF_SQ"``, ``"IVF_PQ"``, ``"IVF_RQ"``, ``"HNSW_FLAT"`` or
        ``"HNSW_SQ"``.
    name : str, optional
        Name of the index; the column's name and ``_idx`` by default.
    metric : str
        ``"l2"``, ``"cosine"`` or ``"dot"``.
    replace : bool
        Replace an index of the same name; readers of the old one are not disturbed.
    num_partitions, num_sub_vectors, num_bits : int, optional
        IVF lists, PQ sub-quantizers, bits per code (4 or 8).
    sample_rate : int
        Training rows per partition.
    ivf_centroids : numpy.ndarray, optional
        float32 ``(num_partitions, dim)``, used instead of k-means.
    pq_codebook : numpy.ndarray, optional
        float32 ``(num_sub_vectors, 2**num_bits, dim // num_sub_vectors)``, used instead of PQ training.
    factory : str, optional
        A FAISS factory string, instead of ``index_type`` and its parameters.
    coarse : str
        How the nearest lists are found: ``"flat"``, or ``"hnsw"`` for very many.
    refine : str or None
        Finer codes to re-rank with: ``"sq8"``, ``"fp16"``, ``"flat"``, None, or ``"auto"``.
    num_shards, num_segments : int, optional
        Shards to write (two names for one thing); by default as few as the budget allows.
    num_workers : int
        Shards encoded at the same time: threads of this process, or workers of a Ray cluster.
    memory_budget_bytes : int, optional
        Per worker; by default half of this machine's memory divided by the workers that share a machine. Ray's are
        reckoned to be on machines like this one, as many on each as it has cores for.
    on_invalid : str
        ``"skip"`` counts and skips null, non-finite and (cosine) zero vectors, ``"error"`` refuses them.
    min_recall : float, optional
        Refuse to commit an index that measures less recall@10.
    index_uri : str, optional
        Path or fsspec URL to write the index under, instead of inside the dataset.
    resume : bool
        Go on with an interrupted build of the same index, re-using finished shards.
    seed : int
        Of sampling and k-means: the same rows and seed give the same model.
    storage_options : mapping, optional
        For a dataset given by URI or in a namespace, and for ``index_uri``; workers get them too. Credentials that
        are not in them but in the environment must be in the environment of every worker.
    block_size : int, optional
        Lance's read block size in bytes, for a dataset given by URI or in a namespace.
    executor : str
        ``"local"``, ``"ray"``, or ``"auto"``: Ray where this process is connected to a cluster already (``ray.init``)
        or an option for Ray is given, else local.
    ray_address : str, optional
        Cluster to join, as ``ray.init`` takes it; by default the one that this process is connected to, or, without
        one, that ``RAY_ADDRESS`` names, or one started on this machine.
    ray_remote_args : mapping, optional
        Options of every Ray worker, such as ``{"num_cpus": 4, "memory": 8 * 2**30}``.
    task_deadline_seconds : float, optional
        A Ray task that makes no progress for so long is taken for lost and run again, elsewhere where that can be.
    namespace_impl : str, optional
        ``"dir"``, ``"rest"`` or the full name of a class: the dataset is a table of such a namespace. Workers open it
        there too, so that the credentials they are given are their own and are renewed. Beside a handle it tells the
        workers how to open the same table: what a handle's own client was made from cannot be asked of it.
    namespace_properties : mapping, optional
        Settings of the namespace.
    table_id : sequence of str, optional
        Path of the table in the namespace.
    progress : Progress, optional
        Listener.

    Returns
    -------
    lance.LanceDataset
        The dataset, moved to the version that has the index; the handle passed in, if one was.

    Raises
    ------
    IndexExists
        If the name is taken and ``replace`` is False.
    InvalidArgument, UnknownColumn, InsufficientData, BudgetExceeded
        Before anything is written.
    InvalidVectors
        If there is nothing to index, or ``on_invalid="error"`` met a bad row.
    RecallTooLow, CommitConflict
        At the end; the dataset keeps the index it had.
    DatasetChanged
        If the handle is behind the newest version; or at the end, if hardly any row that was encoded is left as it was.
        Rows that were compacted meanwhile are followed; those added or written anew are left for `update_index`.
    StorageError
        If files could not be written; run again with ``resume=True``.
    """
    spec = IndexSpec(
        name=f"{column}_idx" if name is None else name,
        column=column,
        index_type=index_type,
        metric=metric,
        factory=factory,
        num_partitions=num_partitions,
        num_sub_vectors=num_sub_vectors,
        num_bits=num_bits,
        coarse=coarse,
        refine=refine,
        sample_rate=sample_rate,
        seed=seed,
        ivf_centroids=ivf_centroids,
        pq_codebook=pq_codebook,
    )
    options = BuildOptions(
        replace=replace,
        resume=resume,
        num_shards=_one_of(num_shards, num_segments),
        num_workers=num_workers,
        memory_budget_bytes=memory_budget_bytes,
        on_invalid=on_invalid,
        min_recall=min_recall,
        index_uri=index_uri,
        storage_options=storage_options,
        executor=executor,
        ray_address=ray_address,
        ray_remote_args=ray_remote_args,
        task_deadline_seconds=task_deadline_seconds,
        namespace_impl=namespace_impl,
        namespace_properties=namespace_properties,
        table_id=table_id,
        progress=SilentProgress() if progress is None else progress,
    )
    handle = open_dataset(
        dataset, storage_options=storage_options, block_size=block_size, namespace=namespace_asked(options)
    )
    run_build(plan_index(handle, spec, options))
    move_to_latest(handle)
    return handle


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
    IndexExists, InvalidArgument, UnknownColumn, InsufficientData, BudgetExceeded, ReadOnlyStorage
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
    tasks = plan_tasks(states, cost, num_shards=options.num_shards, budget_bytes=budget, split=True)
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


def run_build(planned: PlannedBuild, *, parent: str | None = None) -> Manifest:
    """Carry out a planned build, or go on with an interrupted one like it.

    Parameters
    ----------
    planned : PlannedBuild
        From `plan_index` or `plan_resolved`.
    parent : str, optional
        Generation whose settings it took over.

    Returns
    -------
    Manifest
        Of the generation that is now current.
    """
    plan, pinned = planned.plan, planned.pinned
    if planned.options.resume:
        found = _find_unfinished(planned)
        if found is None:
            _log.info("index %r: nothing to resume, no unfinished build of the same thing over these rows", plan.name)
        else:
            _log.info("index %r: resuming generation %s", plan.name, found.generation)
            # Over the version at hand, as the one it began with may be cleaned up: the signatures are equal, so only
            # deletions can differ. More of them are masked when the index is opened; shards with fewer are dropped.
            plan = found
    try:
        # The workers first: without them nothing is written.
        with (
            open_runner(planned.options) as runner,
            Lease.hold(planned.store, plan.generation, root=pinned.root) as lease,
        ):
            return _phases(planned, plan, pinned, lease, parent, runner)
    except _HOPELESS:
        remove_unfinished(planned.store, plan.generation)
        raise
    except _HOPELESS_UNTRAINED:
        remove_unfinished(planned.store, plan.generation, unless_trained=True)
        raise


def _phases(
    planned: PlannedBuild,
    plan: BuildPlan,
    pinned: PinnedDataset,
    lease: Lease,
    parent: str | None,
    runner: LocalRunner | RayRunner,
) -> Manifest:
    store, progress = planned.store, planned.options.progress
    book = ReportBook(executor="ray" if planned.on_ray else "local", workers=planned.options.num_workers)
    meter = PhaseMeter(progress, "train", planned.sample_rows)
    # Before the model: whoever goes on finds an unfinished build, and so its model, by the plan.
    if not store.exists(f"{plan.generation}/{_PLAN_FILE}"):
        store.write(f"{plan.generation}/{_PLAN_FILE}", encode(plan))
    with removal_told(plan, pinned, planned.column):
        trained = _train(planned, plan, pinned, runner, meter)
    lease.check()
    meter.finish()
    book.end(meter)
    _log.info("index %r: model %s trained on %d rows", plan.name, plan.spec.factory, trained.record.sampled_rows)

    meter = PhaseMeter(progress, "encode", sum(task.physical_rows for task in plan.tasks))
    with removal_told(plan, pinned, planned.column):
        records = _encode(planned, plan, pinned, trained, runner, meter, book)
    meter.finish()
    book.end(meter)
    indexed = sum(record.indexed_rows for record in records)
    _log.info("index %r: %d rows encoded in %d shards, %.1f s", plan.name, indexed, len(records), meter.seconds)

    lease.check()
    meter = PhaseMeter(progress, "check")
    recall = _check(planned, plan, store, records, meter)
    meter.finish()
    book.end(meter)

    meter = PhaseMeter(progress, "commit")
    # The plan of a build that is gone on with may name an earlier version, where the fragments were the same.
    built = replace(plan.dataset, version=pinned.version)
    inside = planned.options.index_uri is None
    standing = stand(records, built, plan.spec.dim, pinned.latest(), plan.generation, inside=inside)
    write_records(store, standing.unwritten)
    manifest = write_manifest(
        plan,
        trained,
        standing.records,
        dataset=standing.dataset,
        recall=recall,
        seconds=book.seconds,
        parent=parent,
    )
    publish_manifest(
        manifest,
        pinned=pinned,
        store=store,
        previous=planned.previous,
        index_uri=planned.options.index_uri,
        lease=lease,
    )
    meter.finish()
    book.end(meter)
    book.write(store, plan.generation)
    _log.info("index %r: generation %s is current", plan.name, plan.generation)
    standing.tell(plan.name, pinned.version, plan.spec.dim)
    return manifest


def _train(
    planned: PlannedBuild, plan: BuildPlan, pinned: PinnedDataset, runner: LocalRunner | RayRunner, meter: PhaseMeter
) -> TrainedModel:
    store = planned.store
    trained = find_trained(plan, store)
    if trained is not None:
        return trained
    if isinstance(runner, RayRunner):
        recipe = PartRecipe(
            place=planned.place,
            store_place=planned.store_place,
            column=planned.column,
            spec=plan.spec,
            rows=planned.sample_rows,
        )
        return train_on_ray(
            runner,
            recipe,
            plan,
            planned.spec,
            store=store,
            rows=planned.rows,
            budget_bytes=planned.budget_bytes,
            meter=meter,
        )
    return train(
        plan, planned.spec, pinned=pinned, column=planned.column, store=store, rows=planned.sample_rows, meter=meter
    )


def _encode(
    planned: PlannedBuild,
    plan: BuildPlan,
    pinned: PinnedDataset,
    trained: TrainedModel,
    runner: LocalRunner | RayRunner,
    meter: PhaseMeter,
    book: ReportBook,
) -> list[ShardRecord]:
    finished = _finished_records(plan, trained, planned.store) if planned.options.resume else {}
    states = pinned.fragments(planned.column)
    finished = {i: record for i, record in finished.items() if not revived_in(pinned, [record.cover], states)}
    meter.add(sum(record.cover.physical_rows for record in finished.values()))
    job = EncodeJob(
        plan=plan,
        pinned=pinned,
        column=planned.column,
        trained=trained,
        place=planned.place,
        store=planned.store,
        store_place=planned.store_place,
        on_invalid=planned.options.on_invalid,
        meter=meter,
    )
    waiting = [task for task in plan.tasks if task.ordinal not in finished]
    work = TimedWork(job)
    for record in runner.run(work, waiting):
        finished[record.ordinal] = record
    records = [finished[task.ordinal] for task in plan.tasks]
    book.enter_tasks(records, runner.reports if isinstance(runner, RayRunner) else work.times)
    if not any(record.indexed_rows for record in records):
        raise InvalidVectors(
            f"column {planned.column.name!r} holds no usable vector", column=planned.column.name, row_ids=()
        )
    return records


def _check(
    planned: PlannedBuild, plan: BuildPlan, store: Store, records: list[ShardRecord], meter: PhaseMeter
) -> RecallReport | None:
    target = max(AUTO_RECALL_TARGET, planned.options.min_recall or 0)
    recall_meter = RecallMeter(plan.spec, planned.cost, target=target)
    first = 0
    for record in records:
        if record.check is not None:
            recall_meter.add(first, ShardCheck(**load_arrays(store, record.check)))
        first += record.cover.physical_rows
        meter.add()
    report = recall_meter.report(sum(record.indexed_rows for record in records))
    required = planned.options.min_recall
    if report is None:
        return None
    best = max(point.recall for point in report.points)
    if required is None and best < target:
        _log.warning(
            "index %r measured recall@%d %.3f at its widest search, the aim is %.2f:"
            " a refine store, more bits or more sub-vectors find more",
            plan.name,
            report.k,
            best,
            target,
        )
    if required is not None and best < required:
        raise RecallTooLow(
            f"the index measured recall@{report.k} {best:.4f} at its widest search, min_recall is {required}",
            remedy="Nothing was committed. Use a refine store, more bits or more sub-vectors; or run again with"
            " resume=True and a lower min_recall to take this one",
            measured=best,
            required=required,
        )
    return report


def _find_unfinished(planned: PlannedBuild) -> BuildPlan | None:
    """Return the plan of an interrupted build of the same thing over the same rows, the one that got furthest."""
    store, wanted = planned.store, planned.plan
    files = store.list("")
    finished = Counter(
        generation
        for generation, _, name in (file.name.partition("/") for file in files)
        if name.startswith(("model-", "shard-")) and name.endswith(".json")
    )
    candidates = []
    for file in files:
        if file.name.partition("/")[2] != _PLAN_FILE:
            continue
        found = decode_plan(store.read(file.name, max_bytes=MAX_DOCUMENT_BYTES), location=file.name)
        same = (found.name, found.request, found.spec, found.previous) == (
            wanted.name,
            wanted.request,
            wanted.spec,
            wanted.previous,
        )
        if same and _signatures(found) == _signatures(wanted) and found.dataset.field_id == wanted.dataset.field_id:
            candidates.append(found)
    return max(candidates, key=lambda plan: finished[plan.generation], default=None)


def _finished_records(plan: BuildPlan, trained: TrainedModel, store: Store) -> dict[int, ShardRecord]:
    """Return the shards of a plan that are complete, one attempt of each."""
    files = {file.name: file.length_bytes for file in store.list(plan.generation)}
    finished: dict[int, ShardRecord] = {}
    for name in files:
        if not name.startswith(f"{plan.generation}/shard-") or not name.endswith(".json"):
            continue
        record = decode_shard_record(store.read(name, max_bytes=MAX_DOCUMENT_BYTES), location=name)
        complete = all(files.get(entry.name, -1) in (entry.length_bytes, None) for entry in record.files)
        if complete and record.fingerprint == trained.model.fingerprint.digest:
            finished.setdefault(record.ordinal, record)
    return finished


def _signatures(plan: BuildPlan) -> dict[int, object]:
    return {
        cover.fragment_id: (cover.physical_rows, cover.signature) for task in plan.tasks for cover in task.fragments
    }


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


def remove_unfinished(store: Store, generation: str, *, unless_trained: bool = False) -> None:
    """Delete what a build has written, unless it may be current, or somebody still works on it.

    It may be current as soon as there is a manifest: ours, if the answer to its commit was lost, or that of a twin
    that resumed the same build. What stays is for gc. With ``unless_trained``, neither is a generation deleted that has
    a model. Raises nothing of the store's: called after an error that matters more.
    """
    try:
        # The lease first: a twin gives it back after it has written its manifest.
        if is_leased(store, generation):
            _log.warning("generation %s is still held: its files are left to gc", generation)
            return
        files = store.list(generation)
        if unless_trained and any(file.name.startswith(f"{generation}/model-") for file in files):
            return
        if any(file.name.startswith(f"{generation}/manifest") for file in files):
            _log.warning("generation %s has a manifest, so it may be current: its files are left to gc", generation)
            return
        for file in files:
            store.delete(file.name)
    except (StorageError, CorruptIndex) as failure:
        _log.warning("what is left of generation %s is left to gc: %s", generation, failure)


def _one_of(num_shards: int | None, num_segments: int | None) -> int | None:
    if num_shards is not None and num_segments not in (None, num_shards):
        raise InvalidArgument(
            f"num_shards={num_shards} and num_segments={num_segments} are two names for one thing",
            remedy="Pass one of them",
            parameter="num_segments",
            value=num_segments,
        )
    return num_segments if num_shards is None else num_shards
